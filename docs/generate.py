"""Write the pages of the documentation that are made from the code.

``python docs/generate.py`` writes them, ``--check`` says which are out of step.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pytest_gpumem import OomInjector, simulated_device
from pytest_gpumem.devices.simulated import catalogue
from pytest_gpumem.devices.simulated.refusals import ADVICE
from pytest_gpumem.instruments.flavours import COUNTED
from pytest_gpumem.model.rule_parser import KEYS
from pytest_gpumem.model.rules import FLAVOURS, PHASES, Rule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

HERE = Path(__file__).parent


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table; bars in cells are escaped."""
    head = list(head)
    lines = [head, ["---"] * len(head), *(list(row) for row in rows)]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"


def simulated_device_page() -> str:
    """Return the page of the simulated surface."""
    parts = [
        "# What the simulated device answers\n",
        'On a machine without a GPU `"cuda"` means a simulated card. Values are '
        "computed by the CPU; bytes go through a model of PyTorch's caching allocator. "
        "This page lists every public name of `torch.cuda` and `torch.accelerator`, "
        "written from the code by `docs/generate.py`.\n",
        table(("kind", "means"), catalogue.KINDS.items()),
    ]
    for module in ("torch.cuda", "torch.accelerator"):
        kinds = catalogue.names_of(module)
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
        "\nAn operator that the CPU cannot compute is refused by name too. The driver's "
        "own context bytes (`ctx=` of `--gpu-card`) are 0 unless given, and cuDNN's "
        "workspaces are not simulated.\n"
    )
    return "\n".join(part.strip("\n") + "\n" for part in parts)


def rules_page() -> str:
    """Return the page of the rule language."""
    keys = [
        (
            f"`{name}`" if name == "persistent" else f"`{name}=…`",
            key.help,
            f"`{key.example}`",
        )
        for name, key in KEYS.items()
    ]
    return "\n".join(
        [
            "# Rules: which allocations fail, and how\n",
            "One small language serves the command line (`--gpu-inject-oom=RULE`), the "
            "marker (`@pytest.mark.inject_oom(RULE)`), the fixture (`oom_injector.arm("
            "RULE)`) and the API (`OomInjector(RULE)`):\n",
            "```text\nPHASE[:KEY=VALUE,…]\n```\n",
            f"Phases are {', '.join(f'`{phase}`' for phase in PHASES)}. A rule that "
            "makes no sense is refused before any test runs, by an error that points "
            "at the character.\n",
            table(("key", "meaning", "example"), keys),
            "## Flavours\n",
            "Memory runs out with many words. `flavour=` chooses them; each error has "
            "the class, the one argument and the text of the real thing, with the "
            "card's figures of that moment. “OOM class” says whether `except "
            "torch.OutOfMemoryError` catches it, “counted” whether the allocator's "
            "`num_ooms` goes up. `not-oom` is the negative control: an error that is "
            "no OOM and that no fallback may swallow.\n",
            table(("flavour", "class", "OOM class", "counted", "text"), _flavours()),
        ]
    )


def _flavours() -> Iterable[tuple[str, ...]]:
    for flavour in FLAVOURS:
        error = _error(flavour)
        text = str(error).split("\n", maxsplit=1)[0]
        if len(text) > 90:  # noqa: PLR2004  # what fits into a table
            text = text[:89] + "…"
        yield (
            f"`{flavour}`",
            f"`{type(error).__name__}`",
            "yes" if isinstance(error, torch.OutOfMemoryError) else "no",
            "yes" if flavour in COUNTED else "no",
            f"``{text}``" if "`" in text else f"`{text}`",
        )


def _error(flavour: str) -> BaseException:
    """Return what a request of 1 GiB on a T4 fails with."""
    with simulated_device("T4"), OomInjector(Rule(flavour=flavour)):
        try:
            torch.empty(2**28, device="cuda")
        except Exception as error:  # noqa: BLE001  # whatever it is
            return error
    raise AssertionError(f"{flavour}: nothing was raised")


PAGES: dict[str, Callable[[], str]] = {
    "simulated-device.md": simulated_device_page,
    "rules.md": rules_page,
}


def main() -> int:
    """Write the pages, or with ``--check`` compare them."""
    stale = []
    for name, page in PAGES.items():
        path, text = HERE / name, page()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if "--check" not in sys.argv:
                path.write_text(text, encoding="utf-8")
    if "--check" not in sys.argv:
        print(f"written: {', '.join(stale) or 'nothing, all are in step'}")
        return 0
    if stale:
        print(f"out of step: {', '.join(stale)}; run python docs/generate.py")
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
