"""Recordings of what PyTorch's own CUDA code asks of its allocator, case by case.

``tests/cuda_host/record_requests.py`` makes them on a substitute of the CUDA runtime;
the simulated card is held to them without one. There is a file for each room: cases of
one kind. A room has groups, a group has cases, a case has phases.
"""

from __future__ import annotations

import contextlib
import gc
import json
import lzma
import random
import re
import warnings
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import torch
from allocator_requests import Notes, kept, peaks, sizes

from pytest_gpumem.cards import find_card
from pytest_gpumem.devices.simulated.install import simulated_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

FOLDER: Final = Path(__file__).parents[1] / "recordings" / "requests"
#: Groups that are not the same, by room: verdict and error.
DIFFERING: Final = FOLDER / "differing.json"
#: The modules with the cases.
ROOMS: Final = (
    "operators",
    "sizes",
    "layouts",
    "attention",
    "modules",
    "optimizers",
    "training",
    "models",
    "uses",
)


class Case(NamedTuple):
    """One thing that is run.

    Attributes:
        name: Its name within its group.
        mark: What it is told by; another mark means another case of the same name.
        run: Runs it and notes its phases.
    """

    name: str
    mark: int
    run: Callable[[Notes], object]


class Room(Protocol):
    """A module with cases of one kind.

    Attributes:
        CARDS: Compute capability and multiprocessors of the cards to run them on.
        VALUES: What the simulated card keeps of tensors.
        WITHOUT_VALUES: How groups begin for which it keeps none; there may be no such.
    """

    CARDS: tuple[tuple[str, int], ...]
    VALUES: str

    def groups(self) -> list[str]:
        """Return the names of the groups."""

    def cases(self, group: str) -> Iterable[Case]:
        """Yield a group's cases; they are made when they are asked for."""


def room_of(name: str) -> Any:
    """Return a room's module."""
    return import_module(f"cases_of_{name}")


class Outcome(NamedTuple):
    """What a case asked for.

    Attributes:
        mark: The case's.
        phases: Requests by phase, up to the error if there was one.
        error: The error that it ended in, or "".
        reads: How many copies from the card to the host it made; 0 on the simulated
            card, which has values.
    """

    mark: int
    phases: dict[str, list[int]]
    error: str = ""
    reads: int = 0


def warm_up() -> None:
    """Have the workspaces of both threads, which stay."""
    source = torch.randn(8, 8, device="cuda", requires_grad=True)
    (source @ source).sum().backward()


def outcome(case: Case, settle: Callable[[], object] = lambda: None) -> Outcome:
    """Run a case on whatever "cuda" is."""
    torch.manual_seed(0)
    random.seed(0)
    notes = Notes(settle)
    error = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.run(notes)
    except Exception as failure:  # noqa: BLE001  # any; it is part of the outcome
        lines = str(failure).splitlines() or [""]
        error = f"{type(failure).__name__}: {lines[0][:150]}"
    return Outcome(case.mark, notes.phases, error)


@contextlib.contextmanager
def simulated(capability: str, processors: int, values: str) -> Iterator[None]:
    """Have a simulated card like the one that a room was recorded on."""
    card = find_card(f"16GiB,cc={capability},sms={processors}")
    gc.collect()
    with simulated_device(card, values=values):
        warm_up()
        yield


def simulate(
    room: Any, group: str, wanted: Iterable[str] | None = None
) -> dict[str, Outcome]:
    """Run a group's cases, all or those wanted, on the simulated card that there is."""
    names = None if wanted is None else set(wanted)
    found = {}
    for case in room.cases(group):
        if names is None or case.name in names:
            found[case.name] = outcome(case)
    return found


# -- files -----------------------------------------------------------------------------

Phases = dict[str, list[int]]
Recorded = dict[str, dict[str, dict[str, Outcome]]]


def save(room: str, recorded: Recorded) -> Path:
    """Write a room's recordings: by card, group and case."""
    content = {
        "kind": "allocator requests",
        "room": room,
        "torch": torch.__version__,
        "cards": recorded,
    }
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{room}.json.xz"
    text = json.dumps(content, separators=(",", ":"))
    path.write_bytes(lzma.compress(text.encode(), preset=9))
    return path


@cache
def load(room: str) -> tuple[str, Recorded]:
    """Return the version of torch that a room was recorded with, and its recordings."""
    content = json.loads(lzma.decompress((FOLDER / f"{room}.json.xz").read_bytes()))
    cards = {
        card: {
            group: {name: Outcome(*each) for name, each in cases.items()}
            for group, cases in groups.items()
        }
        for card, groups in content["cards"].items()
    }
    return content["torch"], cards


# -- comparing -------------------------------------------------------------------------

#: What comparing a case, or a group of them, ends in; from best to worst.
VERDICTS: Final = {
    "unrecorded": "PyTorch's code ended in an error, or ended its process",
    "same": "the same sizes in the same order, the same peaks, the same is kept",
    "peaks": "the same peaks by other requests",
    "values": "other peaks, after PyTorch's code read values that nobody computed",
    "differs": "another peak",
    "fails": "the simulated card ends in an error",
    "unlike": "the case is another one here",
}
_RANKS: Final = {name: rank for rank, name in enumerate(VERDICTS)}


class Comparison(NamedTuple):
    """How a simulated case compares with its recording.

    Attributes:
        verdict: One of ``VERDICTS``.
        error: By how much a peak differs at most, as a share of the recorded one.
        text: Where they differ first.
    """

    verdict: str
    error: float = 0.0
    text: str = ""

    @property
    def rank(self) -> tuple[int, float]:
        """How bad it is."""
        return _RANKS[self.verdict], self.error


def compare(  # noqa: PLR0911  # one for each verdict
    recorded: Outcome, here: Outcome
) -> Comparison:
    """Compare a simulated case with its recording."""
    if recorded.error:
        return Comparison("unrecorded", text=recorded.error)
    if recorded.mark != here.mark:
        return Comparison("unlike")
    if here.error:
        return Comparison("fails", text=here.error)
    if recorded.phases.keys() != here.phases.keys():
        verdict = "values" if recorded.reads else "differs"
        return Comparison(verdict, 1.0, f"{[*recorded.phases]} {[*here.phases]}")
    wanted, found = peaks(recorded.phases), peaks(here.phases)
    error = max(
        (abs(found[name] - wanted[name]) / max(wanted[name], 512) for name in wanted),
        default=0.0,
    )
    text = _first_difference(recorded.phases, here.phases)
    if not text and not error:
        return Comparison("same")
    if not error:
        return Comparison("peaks", 0.0, text)
    if recorded.reads:
        return Comparison("values", error, text)
    return Comparison("differs", error, text or f"{recorded.phases} {here.phases}")


def _first_difference(recorded: Phases, here: Phases) -> str:
    for name, requests in recorded.items():
        if sizes(requests) != sizes(here[name]):
            return _beside(name, requests, here[name])
    for name, requests in recorded.items():
        if kept(requests) != kept(here[name]):
            return _beside(f"{name} keeps", requests, here[name])
        break
    return ""


def _beside(name: str, requests: list[int], here: list[int]) -> str:
    """Return two lists from a little before they differ."""
    first = next(
        (
            place
            for place, both in enumerate(zip(requests, here, strict=False))
            if both[0] != both[1]
        ),
        min(len(requests), len(here)),
    )
    start = max(first - 4, 0)
    end = first + 8
    return f"{name} at {first}: {requests[start:end]} here {here[start:end]}"


#: Operators whose gradients are independent of each other. Autograd's engine takes nodes
#: of equal rank in an order that differs from process to process, also on the substitute.
_IN_ANY_ORDER: Final = ("meshgrid.",)


def compare_groups(
    room: str, recorded: Recorded, wanted: Callable[[str], bool] = lambda _name: True
) -> Iterator[tuple[str, Comparison]]:
    """Yield the worst comparison of each group, by ``card: group``.

    Args:
        room: The room's name.
        recorded: Its recordings.
        wanted: Tells whether to compare a group.
    """
    module = room_of(room)
    for card, groups in recorded.items():
        capability, processors = re.findall(r"=([\d.]+)", card)
        chosen = [
            group
            for group, cases in groups.items()
            if cases and wanted(f"{card}: {group}")
        ]
        for values in ("computed", "none"):
            alike = [each for each in chosen if values_of(module, each) == values]
            if alike:
                with simulated(capability, int(processors), values):
                    for group in alike:
                        yield f"{card}: {group}", _worst(module, group, groups[group])


def values_of(room: Any, group: str) -> str:
    """Return what a card keeps of tensors while it runs a group."""
    without: tuple[str, ...] = getattr(room, "WITHOUT_VALUES", ())
    return "none" if group.startswith(without) else str(room.VALUES)


def _worst(room: Any, group: str, cases: dict[str, Outcome]) -> Comparison:
    here = simulate(room, group, cases)
    missing = Outcome(-1, {})
    worst = max(
        (compare(each, here.get(name, missing)) for name, each in cases.items()),
        key=lambda each: each.rank,
    )
    is_same = worst.verdict == "peaks" and group.startswith(_IN_ANY_ORDER)
    return Comparison("same") if is_same else worst
