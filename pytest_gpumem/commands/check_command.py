"""The command ``check``: runs all checks on a loader that a project already has."""

from __future__ import annotations

import io
import sys
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from pytest_gpumem.cards import DEFAULT_CARD
from pytest_gpumem.checking.named_function import (
    NamedFunction,
    working_folder_importable,
)
from pytest_gpumem.devices.selection import choose
from pytest_gpumem.errors import CheckError, DeviceUnavailableError
from pytest_gpumem.files import write_atomically
from pytest_gpumem.sizes import parse_size

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator


def add_check(commands: Any) -> None:
    """Declare it on argparse's subparsers."""
    check = commands.add_parser(
        "check",
        help="run all checks on your loader: budgets, faults, every allocation",
        description="Load on the whole card, under smaller and smaller budgets, with "
        "allocations failing, and with an error that is not an OOM; check where the model "
        "ended, what is left on the card and what it computes. Exit with 1 if a check "
        "fails.",
    )
    check.add_argument(
        "load",
        metavar="MODULE:FUNCTION",
        help="the loader, a function without arguments that returns a model",
    )
    check.add_argument(
        "--run",
        dest="infer",
        metavar="MODULE:FUNCTION",
        help="a function that computes an output from what the loader returned, to be "
        "compared with the CPU's",
    )
    check.add_argument(
        "--card",
        help="the simulated card (default: this machine's real one, else T4)",
    )
    check.add_argument(
        "--budgets",
        metavar="SIZES",
        help="budgets to load under, separated by commas: 4GiB,1GiB (default: shares of "
        "the bytes that a load on the whole card takes)",
    )
    check.add_argument(
        "--points",
        default="ends",
        help="which allocations fail: ends (the first and the last of each place that "
        "allocates), sites, all, or a number of them (default: ends)",
    )
    check.add_argument(
        "--replay",
        metavar="RULE|SIZE",
        help="do only one run, with the injection rule or the budget that the report "
        "names",
    )
    check.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="write a test file with the same requirements; an existing file is never "
        "overwritten",
    )
    check.set_defaults(run=_check)


def _check(options: argparse.Namespace) -> int:
    from pytest_gpumem.checking.check_report import (
        CheckRequest,
        as_test_file,
        check_lines,
    )

    load = NamedFunction.parse(options.load)
    run = None if options.infer is None else NamedFunction.parse(options.infer)
    request = CheckRequest(load, run, options.card)
    if options.write is not None:
        _check_writable(options.write)
    with ExitStack() as stack:
        stack.enter_context(working_folder_importable())
        stack.enter_context(_card(options.card))
        say = _say_to(sys.stderr)
        # A loader's own progress bars would bury the progress of all its loads.
        stack.enter_context(redirect_stderr(io.StringIO()))
        stack.enter_context(redirect_stdout(io.StringIO()))
        from pytest_gpumem.checking.battery import check_loader

        loader, infer = request.resolve()
        found = check_loader(
            loader,
            run=infer,
            budgets=_sizes(options.budgets),
            points=int(options.points) if options.points.isdigit() else options.points,
            only=options.replay,
            name=str(load),
            progress=say,
        )
    for line in check_lines(found, request):
        sys.stdout.write(f"{line}\n")
    if options.replay is not None:
        return int(not found.is_good)
    if options.write is None:
        file = f"tests/test_{load.module.replace('.', '_')}_{load.path.lower()}.py"
        told = f"as a test: {request.command('--write', file)}"
    else:
        write_atomically(options.write, as_test_file(load, run, found))
        told = f"written: python -m pytest --gpu-backend=auto {options.write}"
    sys.stdout.write(f"\n{told}\n")
    return int(not found.is_good)


def _say_to(stream: TextIO) -> Callable[[str], None]:
    def say(text: str) -> None:
        stream.write(f"  {text}\n")
        stream.flush()

    return say


def _sizes(text: str | None) -> list[str] | None:
    """Read ``--budgets``.

    Raises:
        SizeError: One of them is not a size.
    """
    if text is None:
        return None
    sizes = [each.strip() for each in text.split(",")]
    for each in sizes:
        parse_size(each)
    return sizes


def _check_writable(path: Path) -> None:
    """Reject a file that cannot be written, before any run.

    Raises:
        CheckError: It exists, is not a Python file, or its folder does not exist.
    """
    if path.exists():
        raise CheckError(
            f"--write: {path} exists and is not overwritten; name another file, or remove "
            "it",
            value=path,
        )
    if path.suffix != ".py":
        raise CheckError(f"--write: {path} does not end in .py", value=path)
    if not path.parent.is_dir():
        raise CheckError(
            f"--write: {path.parent} is not a folder; make it, or choose another",
            value=path,
        )


@contextmanager
def _card(name: str | None) -> Iterator[None]:
    """Enter a block with a card: the named one, the machine's, or a simulated T4.

    Raises:
        CardError: No card has this name.
        DeviceUnavailableError: There is no torch, or torch uses another accelerator.
    """
    if name is None:
        choice = choose("auto")
        if choice.kind == "off":
            raise DeviceUnavailableError(
                f"there is no card to check on: {choice.reason}; --card T4 simulates one"
            )
        if choice.kind == "cuda":
            import torch

            if torch.cuda.device_count():
                yield
                return
        name = DEFAULT_CARD
    from pytest_gpumem.devices.simulated.install import simulated_device

    with simulated_device(name):
        yield
