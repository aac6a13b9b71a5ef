"""Checks the files that a run writes, before any test: no two may have the same path."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest

from pytest_gpumem.files import is_special, why_not_writable

if TYPE_CHECKING:
    from pytest_gpumem.plugin.settings import Settings

#: The environment variable with GitHub's file for a step's summary.
STEP_SUMMARY: Final = "GITHUB_STEP_SUMMARY"


class Output(NamedTuple):
    """A file of a run.

    Attributes:
        option: The option that names the file, as on the command line.
        path: The file.
        is_ours: Whether this plugin writes it.
    """

    option: str
    path: Path
    is_ours: bool = True


def outputs(settings: Settings, config: pytest.Config) -> list[Output]:
    """Return the files that a run writes, or that it reads and must not overwrite."""
    base = Path(config.invocation_params.dir)
    found = []
    if settings.baseline is not None:
        found.append(
            Output("--gpu-baseline", settings.baseline, settings.updates_baseline)
        )
    found += [
        Output(f"--gpu-report={kind}:{path}", base / path)
        for kind, path in settings.reports
    ]
    if settings.snapshots is not None:
        found.append(Output("--gpu-snapshots", settings.snapshots, is_ours=False))
    others = [
        (flag, getattr(config.option, name, None))
        for flag, name in (("--junitxml", "xmlpath"), ("--log-file", "log_file"))
    ]
    summary = os.environ.get(STEP_SUMMARY)
    others.append((STEP_SUMMARY, summary if settings.reports else None))
    found += [
        Output(flag, base / os.path.expanduser(os.path.expandvars(path)), is_ours=False)  # noqa: PTH111  # as pytest does
        for flag, path in others
        if path
    ]
    return found


def check_outputs(settings: Settings, config: pytest.Config) -> None:
    """Reject two outputs on one path, and a file that cannot be written.

    Raises:
        pytest.UsageError: There are such outputs.
    """
    found = outputs(settings, config)
    by_path: dict[tuple[int, int] | str, Output] = {}
    for output in found:
        if is_special(output.path):
            continue  # several outputs may go to a terminal or /dev/null
        other = by_path.setdefault(_identity(output.path), output)
        if other is not output and (other.is_ours or output.is_ours):
            raise pytest.UsageError(
                f"{output.option}: {other.option} is the same file "
                f"({os.path.relpath(output.path)}), and one would overwrite the "
                "other; name another file for one of them"
            )
    for output in found:
        problem = why_not_writable(output.path) if output.is_ours else None
        if problem is not None:
            option = output.option.partition("=")[0]
            raise pytest.UsageError(
                f"{option}: {output.path} cannot be written: {problem}"
            )


def _identity(path: Path) -> tuple[int, int] | str:
    """Return a key that is the same for all paths to one file, also a missing file."""
    try:
        found = path.stat()
    except OSError:
        return os.path.normcase(os.path.realpath(path))
    return found.st_dev, found.st_ino
