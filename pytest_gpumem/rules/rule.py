"""Injection rules: which allocations fail, how often, and with which error.

``rules.parser.parse_rule`` reads them from text; ``KEYS`` there lists the keys.
"""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final, Literal, get_args

from pytest_gpumem.sizes import format_size

Phase = Literal["any", "load", "forward", "backward", "optimizer"]

PHASES: Final[tuple[str, ...]] = get_args(Phase)
#: The errors that a rule can raise; ``instruments.flavours`` makes them.
FLAVOURS: Final = (
    "native",
    "legacy",
    "async",
    "driver",
    "address-space",
    "cublas",
    "cudnn",
    "cudnn-unsupported",
    "cufft",
    "cusolver",
    "launch",
    "nccl",
    "triton",
    "cupy",
    "nvml",
    "hip",
    "xpu",
    "mps",
    "host",
    "not-oom",
)
#: The flavour of the error that no handler may swallow.
NOT_OOM: Final = "not-oom"


@dataclass(frozen=True, slots=True)
class Request:
    """One request for device memory, as a rule sees it.

    Attributes:
        nbytes: Requested bytes, before any rounding.
        device_index: The card from which they are requested.
        phase: What the program was doing: one of ``PHASES`` except ``"any"``, or
            ``"other"``.
        thread: Name of the thread that requests them; ``"main"`` for the main thread.
        names: What a ``site`` pattern may match: ``file.py:function`` of each frame,
            the path of the active module, the name of the parameter being loaded.
    """

    nbytes: int
    device_index: int
    phase: str
    thread: str = "main"
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule: which allocations fail, and with which error.

    Attributes:
        phase: Only requests of this phase count; ``"any"`` counts all.
        nth: The first counted request that fails, from 1.
        min_bytes: Only requests of at least this many bytes count.
        max_bytes: Only requests of at most this many bytes count; None means no bound.
        device_index: Only requests to this card count; None means all cards.
        times: How many requests fail; None means all of them from the first on
            (persistent).
        site: Only requests with a name that matches this pattern count; None means all.
        thread: Only requests of threads with matching names count; ``"other"`` means
            every thread except the main one; None means all.
        after_bytes: The first to fail is the one that brings the sum of counted
            requests above this; None means that ``nth`` decides.
        every: With N, every Nth request fails; None means that ``nth`` decides.
        probability: Each fails with this probability; None means that ``nth`` decides.
        seed: The seed of the probability's random numbers.
        flavour: One of ``FLAVOURS``.
    """

    phase: str = "any"
    nth: int = 1
    min_bytes: int = 0
    max_bytes: int | None = None
    device_index: int | None = None
    times: int | None = 1
    site: str | None = None
    thread: str | None = None
    after_bytes: int | None = None
    every: int | None = None
    probability: float | None = None
    seed: int = 0
    flavour: str = "native"

    def counts(self, request: Request) -> bool:
        """Tell whether the rule counts a request."""
        return (
            self.phase in ("any", request.phase)
            and request.nbytes >= self.min_bytes
            and (self.max_bytes is None or request.nbytes <= self.max_bytes)
            and self.device_index in (None, request.device_index)
            and self._takes_thread(request.thread)
            and self._takes_site(request.names)
        )

    def _takes_thread(self, name: str) -> bool:
        if self.thread is None:
            return True
        if self.thread == "other":
            return name != "main"
        return fnmatchcase(name, self.thread)

    def _takes_site(self, names: tuple[str, ...]) -> bool:
        pattern = self.site
        return pattern is None or any(fnmatchcase(name, pattern) for name in names)

    @property
    def is_repeated(self) -> bool:
        """Whether it may fail any number of requests: ``every`` or a probability."""
        return self.every is not None or self.probability is not None

    def __str__(self) -> str:
        parts = []
        if self.after_bytes is not None:
            parts.append(f"after={self.after_bytes}")
        elif self.every is not None:
            parts.append(f"every={self.every}")
        elif self.probability is not None:
            parts += [f"p={self.probability!r}", f"seed={self.seed}"]
        else:
            parts.append(f"nth={self.nth}")
        if self.min_bytes:
            parts.append(f"min={self.min_bytes}")
        named = {
            "max": self.max_bytes,
            "device": self.device_index,
            "site": self.site,
            "thread": self.thread,
        }
        parts += [f"{key}={value}" for key, value in named.items() if value is not None]
        if self.is_repeated:
            parts += [] if self.times is None else [f"times={self.times}"]
        elif self.times is None:
            parts.append("persistent")
        elif self.times != 1:
            parts.append(f"times={self.times}")
        if self.flavour != "native":
            parts.append(f"flavour={self.flavour}")
        return f"{self.phase}:{','.join(parts)}"

    def describe(self) -> str:
        """Return the rule in words, such as "allocation number 3 in load"."""
        size = f" of at least {format_size(self.min_bytes)}" if self.min_bytes else ""
        phase = "" if self.phase == "any" else f" in {self.phase}"
        if self.every is not None:
            return f"every {self.every}th allocation{size}{phase}"
        if self.probability is not None:
            return f"allocations{size}{phase} with probability {self.probability:g}"
        often = {None: " and every later one", 1: ""}.get(
            self.times, f" and the next {(self.times or 1) - 1}"
        )
        if self.after_bytes is not None:
            first = f"the first allocation{size} after {format_size(self.after_bytes)}"
            return f"{first}{phase}{often}"
        return f"allocation number {self.nth}{size}{phase}{often}"


class Schedule:
    """A rule and its counts; asked once for every request.

    Thread-safe: a loader's worker threads share one count.

    Attributes:
        rule: The rule.
        num_counted: Requests that the rule has numbered so far.
        num_failed: Requests that it has failed so far.
    """

    def __init__(self, rule: Rule) -> None:
        self.rule: Final = rule
        self.num_counted = 0
        self.num_failed = 0
        self._counted_bytes = 0
        self._random = random.Random(rule.seed)  # noqa: S311  # a repeatable choice
        self._lock = threading.Lock()

    @property
    def is_spent(self) -> bool:
        """Whether the rule will fail no more requests."""
        times = self.rule.times
        return times is not None and self.num_failed >= times

    def fails(self, request: Request) -> bool:
        """Count a request and tell whether it is to fail."""
        if not self.rule.counts(request):
            return False
        with self._lock:
            self.num_counted += 1
            self._counted_bytes += request.nbytes
            if not self._is_due() or self.is_spent:
                return False
            self.num_failed += 1
            return True

    def _is_due(self) -> bool:
        rule = self.rule
        if rule.probability is not None:
            return self._random.random() < rule.probability
        if rule.every is not None:
            return self.num_counted % rule.every == 0
        if rule.after_bytes is not None:
            return self._counted_bytes > rule.after_bytes
        return self.num_counted >= rule.nth


__all__ = ["FLAVOURS", "NOT_OOM", "PHASES", "Phase", "Request", "Rule", "Schedule"]
