"""What the simulated device answers."""

from __future__ import annotations

from generators.markdown import page, table
from pytest_gpumem.devices.simulated import catalogue
from pytest_gpumem.devices.simulated.refusals import ADVICE


def simulated_device() -> str:
    """Return the page of the simulated surface."""
    parts = [
        "# What the simulated device answers\n",
        'On a machine without a GPU `"cuda"` means a simulated card. The CPU computes '
        "the values, and a model of PyTorch's caching allocator counts the bytes. "
        "This page lists every public name of `torch.cuda` and `torch.accelerator`. "
        "It is generated from the code.\n",
        table(("kind", "means"), catalogue.KINDS.items()),
    ]
    for module in ("torch.cuda", "torch.accelerator"):
        kinds = catalogue.kinds_of_names(module)
        parts.append(f"\n## {module}\n")
        for kind in catalogue.KINDS:
            names = sorted(name for name, other in kinds.items() if other == kind)
            noted = [
                (f"`{name}`", catalogue.note_of(f"{module}.{name}")) for name in names
            ]
            plain = ", ".join(name for name, note in noted if not note)
            parts.append(f"\n### {kind}\n")
            if plain:
                parts.append(plain + "\n")
            rows = [(name, note) for name, note in noted if note]
            if rows:
                heading = "what to do" if kind == "refused" else "note"
                parts.append(table(("name", heading), rows))
    parts.append("\n## Beyond these modules\n")
    for kind, lines in catalogue.BEYOND.items():
        parts.append(f"\n**{kind}**\n\n" + "".join(f"- {line}\n" for line in lines))
    public = ("torch.cuda.", "torch.accelerator.")
    refused = [
        (name if " " in name else f"`{name}`", advice)
        for name, advice in ADVICE.items()
        if not name.startswith(public)
    ]
    parts.append("\n**refused**\n\n" + table(("feature", "what to do"), refused))
    parts.append(
        "\nIf the CPU cannot compute an operator, an error names the operator. The "
        "driver's [context](cards.md) is modelled for each card.\n"
    )
    return page(parts)
