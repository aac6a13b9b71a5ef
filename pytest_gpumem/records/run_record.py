"""The record of a run: its machines, and the comparison with the baseline."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pytest_gpumem.records.codec import Count  # noqa: TC001  # the codec reads the types at run time
from pytest_gpumem.sizes import format_size


@dataclass(frozen=True, slots=True)
class CardFacts:
    """A card of a machine.

    Attributes:
        name: Its name.
        total_bytes: Its total.
        budget_bytes: The run's budget, or None; a test may have a budget of its own.
    """

    name: str
    total_bytes: Count
    budget_bytes: Count | None


@dataclass(frozen=True, slots=True)
class Environment:
    """A machine that tests ran on.

    Attributes:
        host: Its name.
        python: Python's version.
        platform: The operating system.
        torch: PyTorch's version, or None.
        backend: The device that ``"cuda"`` meant: real or simulated cards.
        driver: Version of NVIDIA's driver; None for simulated cards or if not known.
        cards: Its cards; empty if that process used none.
    """

    host: str
    python: str
    platform: str
    torch: str | None
    backend: Literal["cuda", "simulated", "off"]
    driver: str | None
    cards: tuple[CardFacts, ...] = ()


@dataclass(frozen=True, slots=True)
class Change:
    """A figure of a test or a fixture, before and now.

    Attributes:
        test: The test, or the fixture.
        metric: The metric, with the name of the card unless it is the first card. The
            bytes are the growth, or the bytes left; if the baseline's entry has format 1,
            the absolute peak.
        before: Bytes in the baseline.
        now: Bytes in this run.
        is_regression: Whether it is above the tolerance.
    """

    test: str
    metric: str
    before: Count
    now: Count
    is_regression: bool

    @property
    def percent(self) -> float:
        """The change as a share."""
        if self.before == 0:
            return float("inf") if self.now else 0.0
        return self.excess / self.before * 100

    @property
    def excess(self) -> int:
        """The change in bytes."""
        return self.now - self.before

    @property
    def excess_text(self) -> str:
        """The change in bytes as text, with its sign."""
        return f"{'+' if self.excess >= 0 else '-'}{format_size(abs(self.excess))}"

    def __str__(self) -> str:
        return (
            f"{self.metric} {format_size(self.before)} -> {format_size(self.now)} "
            f"({self.excess_text}, {self.percent:+.1f} %)"
        )


@dataclass(frozen=True, slots=True)
class Entry:
    """A test or a fixture that is new in a run, or stale in the baseline.

    Attributes:
        environment: Card, backend and PyTorch's version.
        test: The test, or the fixture.
        peaks: Bytes by metric, as a baseline has them.
    """

    environment: str
    test: str
    peaks: dict[str, Count]


@dataclass(frozen=True, slots=True)
class BaselineOutcome:
    """The comparison with a baseline.

    Attributes:
        file: The baseline's name.
        changes: The figures that changed.
        new: Tests of this run that the file lacks.
        stale: Tests of the file that no longer exist or no longer use a card, with the
            file's peaks.
    """

    file: str
    changes: list[Change] = field(default_factory=list)
    new: list[Entry] = field(default_factory=list)
    stale: list[Entry] = field(default_factory=list)
