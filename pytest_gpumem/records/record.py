"""The record of one test: its figures, its limits, and the results of its checks.

The JSON report, its schema, JUnit's properties and the transport from a worker of
pytest-xdist are all made from the fields here. A field is set by the code that measures
it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any, Literal

from pytest_gpumem.records.codec import COMPACT, AsText, Count, decode, encode
from pytest_gpumem.records.memory_figures import Kind, MemoryFigures


class Verdict(Enum):
    """How a run with a fault ended; the value is the name in reports."""

    RECOVERED = "recovered"
    CLEAN_OOM = "clean OOM"
    WRONG_RESULT = "wrong result"
    LEAK = "leak"
    SWALLOWED = "swallowed"
    OTHER_ERROR = "other error"
    HANG = "hang"
    OVER_BUDGET = "over budget"

    def passes(self, *, recover: bool) -> bool:
        """Tell whether the verdict passes; a clean OOM passes if the code need not recover."""
        return self is Verdict.RECOVERED or (self is Verdict.CLEAN_OOM and not recover)


#: The metrics of limits, and the phases to which limits apply.
Metric = Literal[
    "allocated", "reserved", "process", "fragmented", "activations", "leak", "host"
]
LimitPhase = Literal["call", "test", "children"]


@dataclass(frozen=True, slots=True)
class PhaseFigures(MemoryFigures):
    """The figures of one phase of a test on one card.

    Attributes:
        phase: ``setup``, ``call``, ``teardown``, or ``children``.
        kinds: The allocated bytes at the phase's peak, by kind; empty if they were not
            recorded.
    """

    phase: str = field(kw_only=True)
    kinds: dict[Kind, Count] = field(kw_only=True, default_factory=dict)

    @classmethod
    def of(cls, phase: str, figures: MemoryFigures) -> PhaseFigures:
        """Return a phase's figures."""
        return cls(phase=phase, **encode(figures))


@dataclass(frozen=True, slots=True)
class LimitOutcome:
    """A limit, and the measured bytes.

    Attributes:
        metric: The limited metric; ``leak`` means the bytes that the test left, and
            ``host`` those that it added to the host's memory.
        device_index: The card; None means all cards together, as for ``leak``, or none,
            as for ``host``.
        phase: The phases to which the limit applies.
        limit_bytes: The limit, inclusive.
        measured_bytes: The measured bytes; if they are not known, the reserved bytes.
        held: Whether the limit held; false if the bytes are not known.
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
    """A fixture that was made for the test, and the bytes that it added.

    Attributes:
        key: Where it is defined, its name and its parameter.
        scope: Its scope.
        peaks: Its figures, named as in a baseline.
    """

    key: str
    scope: str
    peaks: dict[str, Count]


@dataclass(frozen=True, slots=True)
class ShrunkBatch:
    """A batch that a library made smaller after an OOM.

    Attributes:
        function: The function that was run with the batch.
        first: The size before the first OOM.
        last: The size after the last OOM.
    """

    function: str
    first: Count
    last: Count


@dataclass(slots=True)
class Judgement:
    """The findings of a baseline's gate about a test, in addition to its figures.

    Attributes:
        moved: Bytes, by figure, of first uses that count for another test than the one
            that made them: this test for another one, or another one for this test.
        because: Fixtures that explain why the test needs more bytes.
        denied: Leaks that were first taken for first uses: figure, test, bytes.
    """

    moved: dict[str, int] = field(default_factory=dict)
    because: list[str] = field(default_factory=list)
    denied: list[tuple[str, str, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Contention:
    """An OOM that would not have happened if no other process had used the card.

    Attributes:
        device_index: The card.
        needed_bytes: The live bytes and the request together.
        share_bytes: The worker's share; None if the share was not the cause.
        others_bytes: Bytes that other processes held.
        site: The code that requested memory, in words.
    """

    device_index: Count
    needed_bytes: Count
    share_bytes: Count | None
    others_bytes: Count
    site: str


@dataclass(frozen=True, slots=True)
class SweptSite:
    """The faults of a sweep at one site, and how the runs ended."""

    site: str
    allocations: Count
    failed: Count
    verdicts: dict[Verdict, Count]


@dataclass(frozen=True, slots=True)
class Replay:
    """A command that runs the first point of a group of a sweep's points alone."""

    site: str
    verdict: str
    points: Count
    command: str


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep, or one worker's part of it.

    Attributes:
        nodeid: The test's node id, without the part that names a worker.
        name: The name of the swept code.
        recover: Whether the code must recover from each fault to pass.
        points: Number of faults that were tried.
        failures: Number of points that ended badly.
        resumed: Number of points that were read from an interrupted sweep.
        seconds: The total time of all points.
        sites: The coverage of each site.
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
    """One run of the loader in a fallback's check.

    Attributes:
        cause: The budget or the fault, in words.
        budget_bytes: The budget; None means the whole card.
        fault: The injection rule; None if there is none.
        rung: Where the model ended, for example ``"cuda:0 float16"``; if the loader
            raised, the error.
        num_ooms: The number of failed allocations: how often the loader had to retry.
        peak_reserved_bytes: The reserved peak of load and run together.
        left_bytes: Bytes on the card that do not belong to the model.
        holders: What holds the bytes that are left, and which reference cycles held more
            bytes until a garbage collection.
        problems: What is wrong, one sentence each.
    """

    cause: str
    budget_bytes: Count | None
    fault: str | None
    rung: str
    num_ooms: Count
    peak_reserved_bytes: Count
    left_bytes: int
    holders: tuple[str, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Owner:
    """A block that was live at a peak, with the name of its owner."""

    owner: str
    bytes: Count


@dataclass(frozen=True, slots=True)
class LiveGroup:
    """Blocks that were live at a peak.

    Attributes:
        site: The site that allocated the blocks, or their owner, without numbers of
            layers.
        bytes: The bytes of all blocks.
        blocks: The number of blocks.
        largest: The largest blocks, with their names.
        kind: The kind of most of the bytes.
    """

    site: str
    bytes: Count
    blocks: Count = 0
    largest: list[Owner] = field(default_factory=list)
    kind: Kind = "unnamed"


@dataclass(frozen=True, slots=True)
class CardTimeline:
    """The memory of a card over the time of a test.

    Attributes:
        device_index: The card.
        budget_bytes: The card's budget, or None.
        total_bytes: The card's total.
        num_events: Allocations and releases.
        peak_bytes: The most allocated bytes at once.
        points: Event, allocated bytes, reserved bytes; neighbours are merged to keep the
            series short.
        live_at_peak: The blocks that were live at the peak.
        kinds: The allocated bytes of each point, by kind; empty in older documents.
        ooms: The events after which an allocation failed.
    """

    device_index: Count
    budget_bytes: Count | None
    total_bytes: Count
    num_events: Count
    peak_bytes: Count
    points: list[tuple[Count, Count, Count]]
    live_at_peak: list[LiveGroup]
    kinds: dict[Kind, list[Count]] = field(default_factory=dict)
    ooms: list[Count] = field(default_factory=list)


@dataclass(slots=True)
class Record:
    """One test that used a card.

    Attributes:
        nodeid: The test.
        outcome: How it ended.
        seconds: The total time of its phases.
        environment: Card, backend and PyTorch's version.
        figures: Its figures by phase and card.
        host: The machine on which it ran; empty in records of an earlier format.
        fixtures: Fixtures of wider scope that its setup made.
        growth: The bytes that it added, named as in a baseline; empty if its call used no
            card, and in records of an earlier format.
        judgement: The gate's other findings, or None.
        fixture_growth: Fixtures that were made for it, and the bytes that each added.
        limits: Its limits, held or not.
        children: The number of its child processes that used a card.
        peak_host_bytes: The most bytes of the host's memory that the process held during
            the test, mapped files and a simulated card's values included; None if it is
            not known, or was not asked for.
        unknown: Why ``peak_process_bytes`` is not known, in words, or None.
        waited_s: Seconds that it waited for its bytes of the cards.
        contention: The last OOM that would not have happened if no other process had used
            the card, or None.
        broken_limit: The limit or baseline that was broken, on one line, or None.
        incident: What happened when memory ran out, on one line, or None.
        site: The code line of the incident: ``file.py:42 in function (phase)``, or None.
        snapshot: The file of its snapshot, or None.
        max_vram_bytes: The smallest limit on allocated bytes that its markers set; only
            where limits are suggested.
        smallest_budget_bytes: The smallest budget with which it passes, if the search was
            made and found one.
        smallest_budget_note: Why there was no search or no result, or what failed.
        sweeps: Its sweeps.
        fallbacks: The steps of each fallback that it checked.
        shrunk_batches: Batches that a library made smaller after an OOM.
        timeline: The memory of its cards over time; None if it was not recorded.
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
    peak_host_bytes: Count | None = None
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
    shrunk_batches: list[ShrunkBatch] = field(default_factory=list)
    timeline: Annotated[str, AsText(list[CardTimeline] | None)] = "null"

    @classmethod
    def begin(cls, nodeid: str) -> Record:
        """Return an empty record of a test."""
        return cls(nodeid, "passed", 0.0, "", [])

    def lasting(self) -> Record | None:
        """Return the fields that stay valid if the test is run again; None if none do."""
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
        """Return the largest figures of the call, or of any phase if the call has none."""
        return max(
            self.figures,
            key=lambda each: (each.phase == "call", each.peak_allocated_bytes),
            default=None,
        )

    def to_texts(self) -> list[str]:
        """Return the record as JSON, and its timeline, which is large, as another text."""
        head = encode(self)
        timeline: str = head.pop("timeline")
        return [json.dumps(head, separators=COMPACT), timeline]

    @classmethod
    def of_texts(cls, texts: list[str]) -> Record:
        """Return the record of texts from ``to_texts``."""
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
