"""The program: ``python -m pytest_gpumem.nvidia_smi``, as ``nvidia-smi`` on ``PATH``."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, NoReturn

from pytest_gpumem.cards import CUDA_VERSION, DRIVER_VERSION
from pytest_gpumem.nvidia_smi.card_status import CardNow, read_cards
from pytest_gpumem.nvidia_smi.display import listing, log, summary
from pytest_gpumem.nvidia_smi.fields import fields_of_cards, fields_of_processes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from contextlib import AbstractContextManager

    from pytest_gpumem.nvidia_smi.card_status import CardProcess
    from pytest_gpumem.nvidia_smi.fields import Field

#: Exit codes. Source: ``man nvidia-smi``, "RETURN VALUE".
_BAD_ARGUMENT: Final = 2
_NOT_FOUND: Final = 6
_NO_DRIVER: Final = 9
_FORMATS: Final = ("csv", "noheader", "nounits")
_NOT_SIMULATED: Final = (
    "It shows the cards and their memory: no option, -L, -q [-d MEMORY], --query-gpu=…, "
    "--query-compute-apps=…, --format=csv[,noheader][,nounits], -i, -l, -lms, -f."
)


class _RefusalError(Exception):
    """A usage error, with the program's exit code."""

    def __init__(self, words: str, code: int = _BAD_ARGUMENT) -> None:
        super().__init__(words)
        self.code = code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _RefusalError(
            f"nvidia-smi of a simulated card: {message}. {_NOT_SIMULATED}"
        )


def _parser() -> _Parser:
    parser = _Parser("nvidia-smi", description=_NOT_SIMULATED, allow_abbrev=False)
    parser.add_argument("-L", "--list-gpus", action="store_true", dest="list")
    parser.add_argument("-q", "--query", action="store_true")
    parser.add_argument("-d", "--display", default="MEMORY", metavar="TYPE")
    parser.add_argument("-i", "--id", default="", metavar="CARD")
    parser.add_argument("-f", "--filename", default="", metavar="FILE")
    parser.add_argument("--query-gpu", metavar="FIELDS")
    parser.add_argument("--query-compute-apps", metavar="FIELDS")
    parser.add_argument("--format", default="", metavar="csv[,noheader][,nounits]")
    parser.add_argument(
        "-l", "--loop", type=_positive, nargs="?", const=5, metavar="SECONDS"
    )
    parser.add_argument("-lms", "--loop-ms", type=_positive, metavar="MILLISECONDS")
    parser.add_argument("--version", action="store_true")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _chosen(cards: Sequence[CardNow], wanted: str) -> list[CardNow]:
    """Return the cards that ``-i`` names by index, UUID or bus id."""
    if not wanted:
        return list(cards)
    found = []
    for name in wanted.split(","):
        matches = [
            card
            for card in cards
            if name.strip() in (str(card.index), card.uuid, card.bus_id)
        ]
        if not matches:
            raise _RefusalError("No devices were found", _NOT_FOUND)
        found += matches
    return found


def _table(
    fields: dict[str, Field],
    names: str,
    rows: Iterable[tuple[CardNow, CardProcess | None]],
    style: str,
) -> list[str]:
    """Return the lines of a query's answer."""
    parts = [part.strip() for part in style.split(",") if part.strip()]
    wrong = [part for part in parts if part not in _FORMATS]
    if "csv" not in parts or wrong:
        raise _RefusalError(
            f"Invalid --format={style!r} of a query: write csv[,noheader][,nounits]"
        )
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in fields:
            raise _RefusalError(f'Field "{name}" is not a valid field to query.\n')
    chosen = [fields[name] for name in wanted]
    with_units = "nounits" not in parts
    lines = []
    if "noheader" not in parts:
        lines.append(
            [
                f"{each.name} [{each.unit}]" if each.unit else each.name
                for each in chosen
            ]
        )
    for card, process in rows:
        values = [(each.read(card, process), each.unit) for each in chosen]
        lines.append(
            [
                f"{value} {unit}"
                if unit and with_units and not value.startswith("[")
                else value
                for value, unit in values
            ]
        )
    return [", ".join(line) for line in lines]


def _answer(given: argparse.Namespace, cards: Sequence[CardNow]) -> list[str]:
    if given.query and given.display.upper() != "MEMORY":
        raise _RefusalError(
            f"nvidia-smi of a simulated card: -d {given.display}: of the log only "
            f"MEMORY is simulated. {_NOT_SIMULATED}"
        )
    now = datetime.now()  # noqa: DTZ005  # the program shows local time
    date = f"{now:%a %b} {now.day:>2} {now:%H:%M:%S %Y}"
    stamp = f"{now:%Y/%m/%d %H:%M:%S}.{now.microsecond // 1000:03d}"
    chosen = _chosen(cards, given.id)
    about = (DRIVER_VERSION, stamp, len(cards))
    if given.query_gpu is not None:
        rows: list[tuple[CardNow, CardProcess | None]] = [
            (card, None) for card in chosen
        ]
        return _table(fields_of_cards(*about), given.query_gpu, rows, given.format)
    if given.query_compute_apps is not None:
        apps: list[tuple[CardNow, CardProcess | None]] = [
            (card, each) for card in chosen for each in card.processes
        ]
        names = given.query_compute_apps
        return _table(fields_of_processes(*about), names, apps, given.format)
    if given.list:
        return list(listing(chosen))
    draw = log if given.query else summary
    return list(draw(chosen, driver=DRIVER_VERSION, cuda=CUDA_VERSION, date=date))


def _run_the_real_one(arguments: Sequence[str]) -> NoReturn:
    """Run the next ``nvidia-smi`` on ``PATH``, because no card is simulated."""
    own = Path(__file__).with_name("bin").resolve()
    folders = [
        folder
        for folder in os.environ.get("PATH", "").split(os.pathsep)
        if folder and Path(folder).resolve() != own
    ]
    real = shutil.which("nvidia-smi", path=os.pathsep.join(folders))
    if real is None:
        raise _RefusalError(
            "NVIDIA-SMI has failed because no run on simulated cards started this "
            "process, and there is no other nvidia-smi on PATH.",
            _NO_DRIVER,
        )
    os.execv(real, [real, *arguments])  # noqa: S606  # the machine's own program


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer once, or repeatedly; return the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        cards = read_cards()
        if cards is None:
            _run_the_real_one(arguments)
        given = _parser().parse_args(arguments)
        if given.version:
            sys.stdout.write(
                f"NVIDIA-SMI version  : {DRIVER_VERSION}\n"
                f"DRIVER version      : {DRIVER_VERSION}\n"
                f"CUDA Version        : {CUDA_VERSION}\n"
            )
            return 0
        pause = given.loop_ms / 1000 if given.loop_ms else given.loop
        with _output(given.filename) as output:
            while True:
                output.writelines(f"{line}\n" for line in _answer(given, cards))
                output.flush()
                if not pause:
                    return 0
                time.sleep(pause)
                cards = read_cards() or []
    except _RefusalError as refusal:
        sys.stdout.write(f"{refusal}\n")
        return refusal.code
    except ValueError as error:
        sys.stdout.write(f"NVIDIA-SMI has failed: {error}\n")
        return _BAD_ARGUMENT
    except KeyboardInterrupt:
        return 130


def _output(filename: str) -> AbstractContextManager[IO[str]]:
    if not filename:
        return nullcontext(sys.stdout)
    try:
        return Path(filename).open("w", encoding="utf-8")
    except OSError as error:
        raise _RefusalError(f"Unable to open {filename} for writing: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
