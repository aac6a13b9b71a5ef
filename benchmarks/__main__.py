"""Run every benchmark and print all their figures, in Markdown.

Run: ``python -m benchmarks [--quick] [SCRIPT ...]``. ``--quick`` leaves out the sweep of
each allocation of bert-large, and makes one round where others are compared. Scripts that
are named are run alone. Let the machine do nothing else meanwhile; the output says how
busy it was. ``docs/performance.md`` and ``docs/comparison.md`` have the figures of a run.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Final, NamedTuple

HERE: Final = Path(__file__).parent
LIBRARIES: Final = ("pytest-gpumem", "torch", "transformers", "accelerate", "pytest")


class Section(NamedTuple):
    """A script of this folder.

    Attributes:
        title: The heading above what it prints.
        script: Its name, without ``.py``.
        slow: Its arguments, unless the run is to be quick.
        quick: Its arguments in a quick run.
        is_text: Whether what it prints is no Markdown.
    """

    title: str
    script: str
    slow: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()
    is_text: bool = False


SECTIONS: Final = (
    Section("Comparison with other tools", "peers", quick=("--quick",)),
    Section("What the plugin costs a run", "startup"),
    Section("The simulated card", "device"),
    Section("The allocator model", "allocator"),
    Section("Sweeps", "sweep", ("--full",)),
    Section("Timelines", "timeline"),
    Section("Reports", "reports"),
    Section("What the driver counts", "nvml", is_text=True),
    Section("Many processes on one card", "contention", is_text=True),
)


def machine() -> list[str]:
    """Return lines about where this runs."""
    cpus = Path("/proc/cpuinfo").read_text(encoding="ascii").splitlines()
    names = {line.partition(": ")[2] for line in cpus if line.startswith("model name")}
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cards = "no GPU" if shutil.which("nvidia-smi") is None else "a GPU"
    versions = (f"{name} {metadata.version(name)}" for name in LIBRARIES)
    return [
        f"- {os.cpu_count()} cores ({', '.join(names)}), {pages / 2**30:.0f} GiB, {cards}",
        f"- Python {platform.python_version()}, {', '.join(versions)}",
    ]


def run(section: Section, *, quick: bool) -> str:
    """Return what a script prints to stdout; its stderr is this program's."""
    arguments = section.quick if quick else section.slow
    command = [sys.executable, str(HERE / f"{section.script}.py"), *arguments]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    found = done.stdout.strip()
    return f"```text\n{found}\n```" if section.is_text else found


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = [each.script for each in SECTIONS]
    parser.add_argument(
        "scripts", nargs="*", metavar="SCRIPT", help=f"of {', '.join(names)}"
    )
    parser.add_argument("--quick", action="store_true", help="measure less")
    asked = parser.parse_args()
    unknown = [each for each in asked.scripts if each not in names]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(names)}")
    return asked


def main() -> None:
    """Print the figures, then where they were measured."""
    asked = _asked()
    quick = asked.quick
    started_s, load = time.monotonic(), os.getloadavg()[0]
    named = [each for each in SECTIONS if each.script in asked.scripts] or list(
        SECTIONS
    )
    left_out = [each.script for each in SECTIONS if each not in named]
    for number, section in enumerate(named, start=1):
        print(f"[{number}/{len(named)}] {section.title} ...", file=sys.stderr)
        began_s = time.monotonic()
        print(f"## {section.title}\n\n{run(section, quick=quick)}\n", flush=True)
        print(f"      {time.monotonic() - began_s:.0f} s", file=sys.stderr)
    minutes = (time.monotonic() - started_s) / 60
    about = [
        *machine(),
        f"- {minutes:.0f} minutes{', `--quick`' if quick else ''}; load of the machine "
        f"{load:.1f} at the start",
        *([f"- not in this run: {', '.join(left_out)}"] if left_out else []),
    ]
    print("\n".join(about))


if __name__ == "__main__":
    main()
