"""The rule language."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from generators.markdown import table
from pytest_gpumem import OomInjector, simulated_device
from pytest_gpumem.instruments.flavours import COUNTED
from pytest_gpumem.rules.parser import KEYS
from pytest_gpumem.rules.rule import FLAVOURS, PHASES, Rule

if TYPE_CHECKING:
    from collections.abc import Iterable


def rules() -> str:
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
            "makes no sense ends the run before any test, with an error that points "
            "at the wrong character.\n",
            table(("key", "meaning", "example"), keys),
            "## Flavours\n",
            "CUDA and its libraries report a lack of memory with different errors. `flavour=` "
            "chooses one. Each has the class, the single argument and the text of the real "
            "error, with the card's figures at that moment. “OOM class” says whether "
            "`except torch.OutOfMemoryError` catches it, “counted” whether the allocator's "
            "`num_ooms` counts it. `not-oom` is the negative control: an error that is "
            "not an OOM and that no fallback may swallow.\n",
            table(("flavour", "class", "OOM class", "counted", "text"), _flavours()),
        ]
    )


def _flavours() -> Iterable[tuple[str, ...]]:
    for flavour in FLAVOURS:
        error = _error(flavour)
        text = str(error).split("\n", maxsplit=1)[0]
        if len(text) > 90:  # noqa: PLR2004  # longer texts do not fit into a table
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
        except Exception as error:  # noqa: BLE001  # any error is shown
            return error
    raise AssertionError(f"{flavour}: nothing was raised")
