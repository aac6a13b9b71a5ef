"""What the values of options mean: text in, value out.

Each raises ``GpuMemError`` or ``ValueError`` for text that makes no sense. Parsers are
imported once there is something to parse: most runs give no option.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from pytest_gpumem.devices.selection import BACKENDS

#: What a simulated card may keep of tensors' values; ``machine.VALUES``, likewise.
VALUES: Final = ("computed", "none")

#: What the workers of pytest-xdist may have of each card.
SHARES: Final = ("equal", "off", "own")

#: Whether a check that holds nothing fails the run; auto: in CI.
STRICT: Final = ("auto", "true", "false")

#: Kinds of reports.
REPORTS: Final = ("json", "html", "md")


def find_card(text: str) -> Any:
    """Read ``--gpu-card``."""
    from pytest_gpumem.cards import find_card  # noqa: PLC0415  # see above

    return find_card(text)


def parse_sizes(text: str) -> Any:
    """Read sizes, for all cards or by card."""
    from pytest_gpumem.sizes import parse_device_sizes  # noqa: PLC0415  # see above

    return parse_device_sizes(text)


def parse_size_spec(text: str) -> Any:
    """Read one size, or a share of a card."""
    from pytest_gpumem.sizes import parse_size_spec  # noqa: PLC0415  # see above

    return parse_size_spec(text)


def parse_checkpoint(text: str) -> str:
    """Read ``--gpu-checkpoint``: what can be built, or is there; it stays as it is."""
    from pytest_gpumem.checkpoints import check_checkpoint  # noqa: PLC0415  # see above

    check_checkpoint(text)
    return text


def parse_tolerance(text: str) -> Any:
    """Read ``--gpu-compare-fail``."""
    from pytest_gpumem.baselines.gate import Tolerance  # noqa: PLC0415  # see above

    return Tolerance.parse(text)


def parse_report(text: str) -> tuple[str, str]:
    """Read ``--gpu-report``."""
    kind, colon, path = text.partition(":")
    if kind not in REPORTS or not colon or not path:
        raise ValueError(
            f"{text!r} is no report; accepted are "
            f"{', '.join(f'{each}:PATH' for each in REPORTS)}"
        )
    return kind, path


def parse_rule(text: str) -> Any:
    """Read an injection rule."""
    from pytest_gpumem.rules.parser import parse_rule  # noqa: PLC0415  # see above

    return parse_rule(text)


def parse_rule_text(text: str) -> str:
    """Check an injection rule and keep its text."""
    parse_rule(text)
    return text


def parse_points(text: str) -> str | int:
    """Read ``--gpu-oom-points``."""
    if text in ("all", "sites"):
        return text
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ValueError(
            f"{text!r} is neither all, sites nor a number of allocations from 1 on"
        )
    return int(text)


def parse_folder(text: str) -> Path:
    """Read ``--gpu-snapshots``: a folder, or where one can be made."""
    import tempfile  # noqa: PLC0415  # see above

    folder = Path(text).absolute()
    there = next(each for each in (folder, *folder.parents) if each.exists())
    if not there.is_dir():
        raise ValueError(f"{text!r}: {there} is no folder; name another")
    try:
        with tempfile.TemporaryFile(dir=there):
            return folder
    except OSError as error:
        raise ValueError(
            f"{text!r}: nothing can be written in {there}: {error.strerror}; name "
            "another folder"
        ) from None


def parse_suggest(text: str) -> str:
    """Read ``--gpu-suggest``; a test file that follows it is no patch to overwrite."""
    if text != "print" and Path(text).suffix not in (".patch", ".diff"):
        raise ValueError(
            f"{text!r} is no name of a patch; write --gpu-suggest=print, or "
            "--gpu-suggest=FILE with a FILE that ends in .patch or .diff"
        )
    return text


def parse_values(text: str) -> str:
    """Read ``--gpu-values``."""
    if text not in VALUES:
        raise ValueError(f"{text!r} is unknown; accepted are {', '.join(VALUES)}")
    return text


def parse_share(text: str) -> str:
    """Read ``--gpu-share``."""
    if text not in SHARES:
        raise ValueError(f"{text!r} is unknown; accepted are {', '.join(SHARES)}")
    return text


def parse_strict(text: str) -> str:
    """Read ``gpu_strict``."""
    chosen = text.strip().lower()
    if chosen not in STRICT:
        raise ValueError(f"{text!r} is unknown; accepted are {', '.join(STRICT)}")
    return chosen


def parse_seconds(text: str) -> float:
    """Read ``--gpu-wait-timeout``."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"{text!r} is no time; give seconds, such as 60 or 0.5")
    return seconds


def parse_count(text: str) -> int:
    """Read ``--gpu-max-contention-retries``."""
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"{text!r} is no number; give 0, 1, 2, ...")
    return int(text)


def parse_backend(text: str) -> str:
    """Read ``--gpu-backend``."""
    if text not in BACKENDS:
        raise ValueError(f"{text!r} is no backend; accepted are {', '.join(BACKENDS)}")
    return text
