"""The record of one test: what it needed, how it was held to it, and what was found.

A field here is all that the JSON report, its schema, JUnit's properties and the way from
a worker of pytest-xdist need to know; it is set where it is measured.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pytest_gpumem.records.codec import COMPACT, AsText, Count, decode, encode
from pytest_gpumem.records.memory_figures import MemoryFigures

#: The values of ``sweeps.report.Verdict``.
VerdictName = Literal[
    "recovered",
    "clean OOM",
    "wrong result",
    "leak",
    "swallowed",
    "other error",
    "hang",
    "over budget",
]


#: What a limit may be on, and when it holds.
Metric = Literal["allocated", "reserved", "process", "leak"]
LimitPhase = Literal["call", "test", "children"]


@dataclass(frozen=True, slots=True)
class PhaseFigures(MemoryFigures):
    """The figures of one phase of a test on one card.

    Attributes:
        phase: ``setup``, ``call``, ``teardown``, or ``children``.
    """

    phase: str = field(kw_only=True)

    @classmethod
    def of(cls, phase: str, figures: MemoryFigures) -> PhaseFigures:
        """Return a phase's figures."""
        return cls(phase=phase, **encode(figures))


@dataclass(frozen=True, slots=True)
class LimitOutcome:
    """A limit, and what was measured.

    Attributes:
        metric: What is limited; ``leak`` is what the test left.
        device_index: The card; None for all cards together, as of ``leak``.
        phase: When it holds.
        limit_bytes: The limit, inclusive.
        measured_bytes: What was measured; where that is not known, what was reserved.
        held: Whether it held; false also where the bytes are not known.
    """

    metric: Metric
    device_index: Count | None
    phase: LimitPhase
    limit_bytes: Count
    measured_bytes: Count
    held: bool


@dataclass(frozen=True, slots=True)
class WiderFixture:
    """A fixture of wider scope that the test's setup made, and its bytes."""

    scope: str
    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class MadeFixture:
    """A fixture that was made for the test, and what it added.

    Attributes:
        key: Where it is defined, its name and its parameter.
        scope: Its scope.
        peaks: Its figures, as a baseline has them.
    """

    key: str
    scope: str
    peaks: dict[str, Count]


@dataclass(slots=True)
class Judgement:
    """What a baseline's gate has found out about a test beside its figures.

    Attributes:
        moved: Bytes that it paid for others, or others for it, by figure.
        because: Fixtures that explain what it needs more.
        denied: Who is to blame after all: figure, test, bytes.
    """

    moved: dict[str, int] = field(default_factory=dict)
    because: list[str] = field(default_factory=list)
    denied: list[tuple[str, str, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Contention:
    """An OOM that the test would not have had with the card to itself.

    Attributes:
        device_index: The card.
        needed_bytes: What was live and what was asked for.
        share_bytes: The worker's share; None where that was not what lacked.
        others_bytes: What other processes held.
        site: Who asked, in words.
    """

    device_index: Count
    needed_bytes: Count
    share_bytes: Count | None
    others_bytes: Count
    site: str


@dataclass(frozen=True, slots=True)
class SweptSite:
    """What a sweep tried at a place that allocates, and how it ended."""

    site: str
    allocations: Count
    failed: Count
    verdicts: dict[VerdictName, Count]


@dataclass(frozen=True, slots=True)
class Replay:
    """A command that runs the first of some points of a sweep alone."""

    site: str
    verdict: str
    points: Count
    command: str


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep, or one worker's part of it.

    Attributes:
        nodeid: The test, without the worker's part.
        name: What was swept.
        recover: Whether only recovery passes.
        points: Faults that were tried.
        failures: Those of them that ended badly.
        resumed: Those that were read from an interrupted sweep.
        seconds: How long they took together.
        sites: What was tried at each place that allocates.
        replays: Commands for groups of points that ended badly.
    """

    nodeid: str
    name: str
    recover: bool
    points: Count
    failures: Count
    resumed: Count
    seconds: float
    sites: list[SweptSite]
    replays: list[Replay]


@dataclass(frozen=True, slots=True)
class FallbackStep:
    """A step of a fallback's check: a budget or a fault, and where the fallback ended."""

    cause: str
    budget_bytes: Count | None
    fault: str | None
    rung: str
    num_ooms: Count
    peak_reserved_bytes: Count
    left_bytes: int
    holders: list[str]
    problems: list[str]


@dataclass(frozen=True, slots=True)
class Owner:
    """A block that was live at a peak, by who owns it."""

    owner: str
    bytes: Count


@dataclass(frozen=True, slots=True)
class LiveGroup:
    """Blocks that were live at a peak.

    Attributes:
        site: The place that allocated, or what owns them, with numbers of layers left out.
        bytes: Their bytes.
        blocks: How many they are.
        largest: The largest of them by name.
    """

    site: str
    bytes: Count
    blocks: Count = 0
    largest: list[Owner] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class CardTimeline:
    """A card over the time of a test.

    Attributes:
        device_index: The card.
        budget_bytes: Its budget, or None.
        total_bytes: Its total.
        num_events: Allocations and releases.
        peak_bytes: The most that was allocated at once.
        points: Event, allocated bytes, reserved bytes; neighbours are merged to keep the
            series short.
        live_at_peak: What was live at the peak.
    """

    device_index: Count
    budget_bytes: Count | None
    total_bytes: Count
    num_events: Count
    peak_bytes: Count
    points: list[tuple[Count, Count, Count]]
    live_at_peak: list[LiveGroup]


@dataclass(slots=True)
class Record:
    """One test that used a card.

    Attributes:
        nodeid: The test.
        outcome: How it ended.
        seconds: How long all of its phases took.
        environment: Card, backend and PyTorch's version.
        figures: Its figures by phase and card.
        host: Where it ran; empty in what an earlier format recorded.
        fixtures: Fixtures of wider scope that its setup made.
        growth: What it added, as a baseline has it; empty if its call used no card, and in
            what an earlier format recorded.
        judgement: What the gate has found out beside its figures, or None.
        fixture_growth: Fixtures that were made for it, and what each added.
        limits: Its limits, held or not.
        children: How many of its child processes used a card.
        unknown: Why ``peak_process_bytes`` is not known, in words, or None.
        waited_s: Seconds that it waited for its bytes of the cards.
        contention: The last OOM that it would not have had with the card to itself, or
            None.
        broken_limit: The limit or baseline that was broken, on one line, or None.
        incident: What happened when its memory ran out, on one line, or None.
        site: Where that was: ``file.py:42 in function (phase)``, or None.
        snapshot: The file of its snapshot, or None.
        max_vram_bytes: The smallest limit on allocated bytes that its markers set; only
            where limits are suggested.
        smallest_budget_bytes: The smallest budget under which it passes, if that was
            sought and found.
        smallest_budget_note: Why that was not sought or found, or what was amiss in it.
        sweeps: Its sweeps.
        fallbacks: The steps of each fallback that it checked.
        timeline: Its cards over time; null where that was not recorded.
    """

    nodeid: str
    outcome: Literal["passed", "skipped", "failed", "error"]
    seconds: float
    environment: str
    figures: list[PhaseFigures]
    host: str = ""
    fixtures: list[WiderFixture] = field(default_factory=list)
    growth: dict[str, Count] = field(default_factory=dict)
    judgement: Judgement | None = None
    fixture_growth: list[MadeFixture] = field(default_factory=list)
    limits: list[LimitOutcome] = field(default_factory=list)
    children: Count = 0
    unknown: str | None = None
    waited_s: float = 0.0
    contention: Contention | None = None
    broken_limit: str | None = None
    incident: str | None = None
    site: str | None = None
    snapshot: str | None = None
    max_vram_bytes: Count | None = None
    smallest_budget_bytes: Count | None = None
    smallest_budget_note: str = ""
    sweeps: list[Sweep] = field(default_factory=list)
    fallbacks: list[list[FallbackStep]] = field(default_factory=list)
    timeline: Annotated[str, AsText(list[CardTimeline] | None)] = "null"

    @classmethod
    def begin(cls, nodeid: str) -> Record:
        """Return the record of a test of which nothing is known yet."""
        return cls(nodeid, "passed", 0.0, "", [])

    def lasting(self) -> Record | None:
        """Return what holds for a further attempt at the test; None if nothing does."""
        kept = Record.begin(self.nodeid)
        kept.fixtures, kept.fixture_growth = self.fixtures, self.fixture_growth
        kept.waited_s = self.waited_s
        kept.smallest_budget_bytes = self.smallest_budget_bytes
        kept.smallest_budget_note = self.smallest_budget_note
        return None if kept == Record.begin(self.nodeid) else kept

    def of_phase(self, *phases: str) -> list[PhaseFigures]:
        """Return the figures of some phases."""
        return [each for each in self.figures if each.phase in phases]

    def top_figures(self) -> PhaseFigures | None:
        """Return the most telling figures: the call's largest, else any phase's."""
        return max(
            self.figures,
            key=lambda each: (each.phase == "call", each.peak_allocated_bytes),
            default=None,
        )

    def to_texts(self) -> list[str]:
        """Return the record as JSON, its timeline apart: that is most of it."""
        head = encode(self)
        timeline: str = head.pop("timeline")
        return [json.dumps(head, separators=COMPACT), timeline]

    @classmethod
    def of_texts(cls, texts: list[str]) -> Record:
        """Read what ``to_texts`` returned."""
        head, timeline = texts
        found: dict[str, Any] = json.loads(head)
        record = decode(cls, found)
        record.timeline = timeline
        return record

    @property
    def text(self) -> str:
        """The whole record as JSON in ASCII, on one line."""
        head, timeline = self.to_texts()
        return f'{head[:-1]},"timeline":{timeline}}}'
