"""Reports what this machine has, what the plugin would do on it, and problems."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem._version import __version__
from pytest_gpumem.allocator.config import config_from_environment
from pytest_gpumem.allocator.versions import installed_version
from pytest_gpumem.cards import DEFAULT_CARD, find_card
from pytest_gpumem.checkpoints.cache import cache_folder
from pytest_gpumem.devices.environment import driver_version
from pytest_gpumem.devices.nvml import why_uncounted
from pytest_gpumem.devices.selection import Choice, choose, torch_build
from pytest_gpumem.errors import AllocatorSettingError
from pytest_gpumem.sizes import format_size

if TYPE_CHECKING:
    from pathlib import Path

#: Distributions that the plugin works with, and what for.
LIBRARIES: Final = {
    "transformers": "the fixture bert_large and loaders",
    "accelerate": "device_map and offloading",
    "safetensors": "checkpoints",
    "hypothesis": "pytest_gpumem.strategies",
    "pytest-xdist": "several workers (-n)",
    "jinja2": "the HTML report",
    "nvidia-ml-py": "process bytes and other processes on real cards",
}
#: With fewer free bytes of disk than this, a bert-large checkpoint and its copies do not
#: fit.
_LITTLE: Final = 4 * 2**30


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem; ``is_fatal`` if tests cannot run because of it."""

    what: str
    advice: str
    is_fatal: bool = False


@dataclass(frozen=True, slots=True)
class Examination:
    """The findings.

    Attributes:
        facts: By name, plain values.
        backend: What ``--gpu-backend=auto`` chooses.
        reason: Why it chooses this backend.
        card: The card of a run that names none.
        problems: The problems, the worst first.
    """

    facts: dict[str, Any]
    backend: str
    reason: str
    card: str
    problems: tuple[Problem, ...]

    @property
    def is_well(self) -> bool:
        """Whether tests can run."""
        return not any(each.is_fatal for each in self.problems)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {**asdict(self), "is_well": self.is_well}

    def lines(self) -> list[str]:
        """Return everything as text."""
        width = max(len(name) for name in self.facts)
        found = [f"{name.ljust(width)}  {_show(v)}" for name, v in self.facts.items()]
        found += ["", f"--gpu-backend=auto means {self.backend}: {self.reason}"]
        if self.card:
            found.append(f"a run that names no card uses {self.card}")
        found.append("")
        for each in self.problems:
            word = "problem" if each.is_fatal else "note"
            found.append(f"{word}: {each.what}; {each.advice}")
        found.append("all is well" if self.is_well else "tests cannot run like this")
        return found


def examine() -> Examination:
    """Examine this machine. Imports torch if there is one; uses no card."""
    problems: list[Problem] = []
    choice = choose("auto")
    facts: dict[str, Any] = {
        "pytest-gpumem": __version__,
        "python": platform.python_version(),
        "pytest": _version("pytest"),
        "platform": platform.platform(),
        **_torch(problems),
        **_nvml(),
    }
    for name, use in LIBRARIES.items():
        facts[name] = _version(name)
        if facts[name] is None:
            problems.append(
                Problem(f"{name} is not installed", f"pip install {name} for {use}")
            )
    facts.update(_environment(problems))
    facts.update(_room(problems))
    card = _card(choice)
    problems.sort(key=lambda each: not each.is_fatal)
    return Examination(facts, choice.kind, choice.reason, card, tuple(problems))


def _torch(problems: list[Problem]) -> dict[str, Any]:
    found = torch_build()
    if found is None:
        problems.append(
            Problem(
                "torch is not installed",
                "pip install torch; the build for CPUs is enough for simulated cards",
                is_fatal=True,
            )
        )
        return {"torch": None}
    version, cuda = found.version, found.cuda
    try:
        import torch
    except (ImportError, OSError) as error:
        problems.append(
            Problem(f"torch cannot be imported: {error}", "reinstall it", is_fatal=True)
        )
        return {"torch": version, "torch built with CUDA": cuda}
    names: list[str] = []
    if torch.cuda.is_available():
        names = [
            f"{torch.cuda.get_device_name(index)}, "
            f"{format_size(torch.cuda.get_device_properties(index).total_memory)}"
            for index in range(torch.cuda.device_count())
        ]
    return {"torch": version, "torch built with CUDA": cuda, "cards": names}


def _nvml() -> dict[str, Any]:
    """Ask NVIDIA's library for the driver."""
    why = why_uncounted()
    known = f"unknown: {why}" if why else "NVML counts them"
    return {"driver": driver_version(), "process bytes": known}


def _environment(problems: list[Problem]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for name in (*installed_version().variables, "CUDA_VISIBLE_DEVICES"):
        facts[name] = os.environ.get(name)
    try:
        config_from_environment()
    except AllocatorSettingError as error:
        problems.append(Problem(str(error), "change or unset it", is_fatal=True))
    return facts


def _room(problems: list[Problem]) -> dict[str, Any]:
    """Return the sizes of memory and disk."""
    folder = cache_folder()
    there = next(each for each in (folder, *folder.parents) if each.is_dir())
    free = shutil.disk_usage(there).free
    if free < _LITTLE:
        problems.append(
            Problem(
                f"{format_size(free)} of disk are free at {there}",
                f"a bert-large checkpoint takes 1.3 GiB; free {format_size(_LITTLE)}, or "
                "set PYTEST_GPUMEM_CACHE to another folder",
            )
        )
    if not os.access(there, os.W_OK):
        problems.append(
            Problem(
                f"the cache {folder} cannot be written",
                "set PYTEST_GPUMEM_CACHE to another folder",
            )
        )
    return {
        "memory of the host": format_size(_host_bytes()) if _host_bytes() else None,
        "checkpoint cache": f"{folder}, {format_size(_size_of(folder))}",
        "free disk": format_size(free),
    }


def _host_bytes() -> int:
    """Return the host's memory in bytes; 0 if the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _size_of(folder: Path) -> int:
    """Return the bytes that a folder's files take on disk."""
    return sum(
        getattr(each.lstat(), "st_blocks", 0) * 512
        for each in folder.rglob("*")
        if each.is_file() and not each.is_symlink()
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _card(choice: Choice) -> str:
    if choice.kind != "simulated":
        return ""
    (card,) = find_card(DEFAULT_CARD)
    return f"{DEFAULT_CARD} ({card.name}, {format_size(card.total_bytes)}, simulated)"


def _show(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(map(str, value)) or "none"
    return "-" if value is None else str(value)


def print_findings(*, as_json: bool) -> int:
    """Print what was found; return 1 if tests cannot run, else 0."""
    found = examine()
    if as_json:
        import json

        text = json.dumps(found.to_dict(), indent=2)
    else:
        text = "\n".join(found.lines())
    sys.stdout.write(f"{text}\n")
    return 0 if found.is_well else 1
