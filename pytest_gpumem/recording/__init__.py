"""Recordings: the answers of a card and of PyTorch's allocator to a fixed script.

The simulated device is compared with recordings of real cards. The script uses only
torch's public functions, so it runs on both kinds of devices.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.files import write_atomically

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

#: Version of the format.
FORMAT: Final = 1
KIND: Final = "pytest-gpumem recording"


def record(
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run the script on the current device and return its answers.

    This takes a minute or two on a real card, and at most the memory of the model's
    training (about 7 GB with bert-large). Afterwards the memory fraction is 1, the cache
    is empty, and the peaks of the statistics are reset.

    Args:
        checkpoint: Folder of a BERT classifier for the model's phases; None leaves
            them out.
        progress: Called with a line of text before each step.

    Returns:
        ``kind``, ``format``, ``card``, ``versions``, ``context_bytes``,
        ``workspace_bytes``, ``oom_texts``, ``traces`` and ``phases``, ready for JSON.

    Raises:
        DeviceUnavailableError: "cuda" means no device on this machine.
    """
    from pytest_gpumem.recording.facts import (
        describe_card,
        measure_context,
        measure_workspace,
        oom_texts,
        versions,
    )
    from pytest_gpumem.recording.traces import play_all
    from pytest_gpumem.recording.workload import PLANS, measure

    say = progress or (lambda _text: None)
    say("card, versions, context")
    recorded: dict[str, Any] = {
        "kind": KIND,
        "format": FORMAT,
        "card": describe_card(),
        "versions": versions(),
        "context_bytes": measure_context(),
    }
    say("allocator traces")
    recorded["traces"] = play_all()
    say("OOM texts")
    recorded["oom_texts"] = oom_texts()
    say("library workspaces")
    recorded["workspace_bytes"] = measure_workspace()
    recorded["phases"] = []
    for plan in PLANS if checkpoint is not None else ():
        say(f"model: {plan}")
        recorded["phases"].append(measure(Path(str(checkpoint)), plan))
    return recorded


def save(recorded: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a recording, completely or not at all.

    Raises:
        OSError: The file cannot be written; an old file does not change.
    """
    write_atomically(path, json.dumps(recorded, indent=1, sort_keys=True) + "\n")


__all__ = ["FORMAT", "KIND", "record", "save"]
