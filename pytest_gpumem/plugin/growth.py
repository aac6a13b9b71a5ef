"""Measures the bytes that a test itself adds to the cards, apart from all other bytes.

Note [Which bytes belong to a test]
Bytes belong to the running test, with one exception. A fixture of wider scope may add
bytes while it is made, in the setup or call of any test. Several tests share the fixture,
so these bytes have figures under the fixture's name. Therefore the time from a test's
setup to its teardown is divided where such a fixture begins and ends, and where the first
of them is torn down. Changes in the remaining pieces of time belong to the test. Fixtures
of function scope belong to the test. They also have figures under their own names, so that
a fixture that grew is reported separately from its tests.

cuBLAS keeps a workspace for each thread and stream that multiplied matrices. Between tests
and after each fixture of wider scope the workspaces and the cache are cleared. Otherwise a
workspace would count for the first test that multiplies, and for no later test.
"""

from __future__ import annotations

import gc
import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from pytest_gpumem.baselines.baseline import (
    BEFORE,
    GROWTH,
    LEFT,
    METRICS,
    REQUESTED,
    metric_key,
)
from pytest_gpumem.plugin.record_keeping import record_of
from pytest_gpumem.records.record import MadeFixture

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Mapping

    from pytest_gpumem.devices import Device, Tracker
    from pytest_gpumem.plugin.session import Run
    from pytest_gpumem.records.memory_figures import MemoryFigures
    from pytest_gpumem.records.record import Judgement

_WORDS: Final = (*METRICS, REQUESTED)

#: Bytes by card and metric.
Bytes = dict[tuple[int, str], int]


def current_bytes(device: Device) -> Bytes:
    """Return the bytes that are on the cards now."""
    found = {}
    for index in range(device.device_count):
        stats = device.memory_stats(index)
        for word in _WORDS:
            found[index, word] = stats.get(f"{word}_bytes.all.current", 0)
    return found


def _plus(one: Bytes, other: Mapping[tuple[int, str], int], sign: int = 1) -> Bytes:
    return {
        key: one.get(key, 0) + sign * other.get(key, 0)
        for key in one.keys() | other.keys()
    }


class Meter:
    """Measures the peak growth of code, without that of other code that runs in between.

    The measurement may begin before there is a device. Until there is one, the cards count
    as empty.
    """

    def __init__(self, run: Run) -> None:
        self._run: Final = run
        self._trackers: list[Tracker] = []
        #: Bytes that were on the cards at the start, and bytes that other code has added.
        self.before: Bytes = {}
        self._paused: Bytes | None = None
        #: The most bytes that were on the cards in addition to those in ``before``.
        self.growth: Bytes = {}
        #: The most bytes that were on the cards.
        self.peak: Bytes = {}
        self._requests = 0
        #: Whether the code made any request to a card.
        self.is_used = False
        device = run.device
        if device is not None:
            self.before = current_bytes(device)
            self.start(device)

    def start(self, device: Device) -> None:
        """Begin a piece of time; the device may have been created just now."""
        self._requests = device.num_requests
        self._trackers = [
            device.open_tracker(index) for index in range(device.device_count)
        ]

    def pause(self) -> None:
        """End a piece of time; later changes are not counted."""
        device = self._run.device
        if device is None or self._paused is not None:
            return
        trackers, self._trackers = self._trackers, []
        for tracker in trackers:
            figures = tracker.close()
            for word in _WORDS:
                key = (figures.device_index, word)
                peak: int = getattr(figures, f"peak_{word}_bytes")
                grown = peak - self.before.get(key, 0)
                self.peak[key] = max(peak, self.peak.get(key, 0))
                self.growth[key] = max(grown, self.growth.get(key, 0))
        self.is_used = self.is_used or device.num_requests != self._requests
        self._paused = current_bytes(device)

    def resume(self) -> None:
        """Begin the next piece of time; changes since the last one are not counted."""
        device = self._run.device
        if device is None or self._paused is None:
            return
        added = _plus(current_bytes(device), self._paused, -1)
        self.before = _plus(self.before, added)
        self._paused = None
        self.start(device)

    def close(self) -> Bytes:
        """End the last piece of time; return the bytes that stayed."""
        self.pause()
        return self.stayed()

    def stayed(self) -> Bytes:
        """Return the bytes that have stayed so far, after the last piece of time."""
        if self._paused is None or self._run.device is None:
            return {}
        return _plus(current_bytes(self._run.device), self.before, -1)


class Growth:
    """Measures each test and each fixture; see Note [Which bytes belong to a test].

    Args:
        run: The run; its device may be created at any time.
    """

    def __init__(self, run: Run) -> None:
        self._run: Final = run
        self._meters: list[Meter] = []
        self._item: pytest.Item | None = None
        self._phase = ""
        self._own: Bytes = {}
        self._start: Bytes = {}
        self._is_over = False
        #: The fixtures that were made for the running test.
        self.made: list[MadeFixture] = []
        #: The living fixtures of wider scope.
        self.alive: Final[dict[Any, MadeFixture]] = {}
        #: The test's growth up to the end of its call, named as in a baseline.
        self.peaks: dict[str, int] = {}

    def device_came(self, device: Device) -> None:
        """Continue the open measurements with a device that was created just now."""
        for meter in self._meters:
            meter.start(device)

    # -- a test ---------------------------------------------------------------------------

    def begin(self, item: pytest.Item) -> None:
        """Begin to measure a test, before its setup."""
        for meter in self._meters:
            meter.close()  # an interrupted trial has left this meter open
        self._meters = []
        self._item, self._phase = item, "setup"
        self._own, self._start, self._is_over = {}, {}, False
        self.made, self.peaks = [], {}

    def begin_call(self) -> None:
        """Begin to measure the test's call."""
        self._phase = "call"
        self._meters.append(Meter(self._run))

    def end_call(self, children: Iterable[MemoryFigures] = ()) -> None:
        """End the measurement of the test's call.

        Args:
            children: The combined figures of the processes that the test started.
        """
        if self._phase != "call":
            return
        meter = self._meters.pop()
        stayed = meter.close()
        if meter.is_used:
            self._note(self.peaks, meter, "", self._own)
        for each in children:
            _note_child(self.peaks, each)
        self._own = _plus(self._own, stayed)
        self._phase, self._start = "called", self._now()

    def begin_teardown(self) -> None:
        """Begin to measure the test's teardown."""
        if self._phase == "called":
            self._own = self._so_far()
        self._phase, self._start = "teardown", self._now()

    def end(self) -> dict[str, int]:
        """End the test; return the bytes that it leaves, by figure."""
        self._end_own()
        self._phase, self._item = "", None
        return _left(self._own)

    def left(self) -> dict[str, int]:
        """Return the bytes that the test would leave if it ended now, by figure."""
        if _left(self._so_far()):
            _clear_workspaces()
        return _left(self._so_far())

    def _now(self) -> Bytes:
        device = self._run.device
        return {} if device is None else current_bytes(device)

    def _so_far(self) -> Bytes:
        return _plus(self._own, _plus(self._now(), self._start, -1))

    def _end_own(self) -> None:
        """End the measurement of the test, before wider fixtures are torn down."""
        if self._is_over or self._phase != "teardown" or self._run.device is None:
            return
        self._is_over = True
        if _left(self._so_far()):
            _clear_workspaces()
        if _left(self._so_far()):
            # pytest clears the test's fixture values only after the hooks of the teardown.
            getattr(self._item, "funcargs", {}).clear()
        if _left(self._so_far()):
            gc.collect()
        self._own = self._so_far()

    @staticmethod
    def _note(
        peaks: dict[str, int],
        meter: Meter,
        prefix: str,
        own: Mapping[tuple[int, str], int],
    ) -> None:
        """Put a meter's figures into an entry; ``own`` are the bytes before its start."""
        for (index, word), peak in meter.peak.items():
            key = f"{prefix}{metric_key(word, index)}"
            mine = max(own.get((index, word), 0), 0)
            grown = max(meter.growth.get((index, word), 0) + mine, 0)
            if not peak and index:
                continue  # a card that was not used
            peaks[f"{key} {GROWTH}"] = grown
            if word in METRICS:
                peaks[key] = peak
                before = meter.before.get((index, word), 0) - mine
                peaks[f"{key} {BEFORE}"] = max(before, 0)

    def tell(
        self,
        item: pytest.Item,
        left: Mapping[str, int],
        judgement: Judgement | None = None,
    ) -> None:
        """Put the growth of a test and of its fixtures into the test's record."""
        if self.made:
            record_of(item).fixture_growth += self.made
        if self.peaks:
            record = record_of(item)
            record.growth = {**self.peaks, **left}
            record.judgement = judgement

    # -- fixtures -------------------------------------------------------------------------

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> Generator[None, object, object]:
        """Measure a fixture as it is made."""
        is_wider = fixturedef.scope != "function"
        if is_wider:
            for each in self._meters:
                each.pause()
        meter = Meter(self._run)
        self._meters.append(meter)
        try:
            return (yield)
        finally:
            self._meters.remove(meter)
            stayed = meter.close()
            device = self._run.device
            if is_wider:
                if device is not None and meter.is_used:
                    device.empty_cache()
                    stayed = meter.stayed()
                fixturedef.addfinalizer(self._end_own)
            if meter.is_used:
                self._take(fixturedef, request, meter, stayed)
            if is_wider:
                for each in self._meters:
                    each.resume()
            elif self._phase == "setup" and not self._meters:
                self._own = _plus(self._own, stayed)

    def _take(
        self,
        fixturedef: pytest.FixtureDef[Any],
        request: pytest.FixtureRequest,
        meter: Meter,
        stayed: Bytes,
    ) -> None:
        peaks: dict[str, int] = {}
        self._note(peaks, meter, "", {})
        peaks |= _left(stayed)
        made = MadeFixture(
            fixture_key(fixturedef, request), str(fixturedef.scope), peaks
        )
        self.made.append(made)
        if fixturedef.scope != "function":
            self.alive[fixturedef] = made

    def pytest_fixture_post_finalizer(self, fixturedef: pytest.FixtureDef[Any]) -> None:
        """Forget a fixture that was torn down."""
        self.alive.pop(fixturedef, None)

    def used_by(self, item: pytest.Item) -> list[MadeFixture]:
        """Return the fixtures that a test uses and that used a card."""
        info = getattr(item, "_fixtureinfo", None)
        known = getattr(info, "name2fixturedefs", {})
        names = getattr(item, "fixturenames", ())
        mine = {id(each) for name in names for each in known.get(name, ())}
        own = [each for each in self.made if each.scope == "function"]
        wider = [made for each, made in self.alive.items() if id(each) in mine]
        return [*wider, *own]


def _clear_workspaces() -> None:
    """Free cuBLAS's workspaces; cuBLAS allocates them again when it needs them."""
    import torch

    # The function is missing in a build of torch without CUDA, if no card is simulated.
    clear: Any = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)  # noqa: SLF001  # no public name
    if clear is not None:
        clear()


def _left(found: Mapping[tuple[int, str], int]) -> dict[str, int]:
    return {
        f"{metric_key(word, index)} {LEFT}": nbytes
        for (index, word), nbytes in found.items()
        if word == "allocated" and nbytes > 0
    }


def _note_child(peaks: dict[str, int], figures: MemoryFigures) -> None:
    """Put the figures of children into an entry; a new process begins with no bytes."""
    for word in METRICS:
        key = f"children {metric_key(word, figures.device_index)}"
        peak = figures.peak(word) or 0
        peaks[key] = peaks[f"{key} {GROWTH}"] = peak


def fixture_key(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> str:
    """Return a fixture's key: where it is defined, its name, and its parameter if any."""
    where = fixturedef.baseid
    if ".py" not in where:
        code = getattr(inspect.unwrap(fixturedef.func), "__code__", None)
        file = Path(code.co_filename) if code is not None else None
        root = request.config.rootpath
        if file is not None and file.is_relative_to(root):
            where = file.relative_to(root).as_posix()
        else:
            where = str(getattr(fixturedef.func, "__module__", where))
    name = f"{where}::{fixturedef.argname}"
    if not hasattr(request, "param"):
        return name
    return f"{name}[{_param_id(fixturedef, request)}]"


def _param_id(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> str:
    param: Any = request.param
    index: int = getattr(request, "param_index", 0)
    ids: Any = fixturedef.ids
    found = None
    if callable(ids):
        found = ids(param)
    elif ids is not None and index < len(ids):
        found = ids[index]
    if found is None and isinstance(param, str | int | float | bool | None):
        found = param
    if found is None:
        found = getattr(param, "__name__", f"{fixturedef.argname}{index}")
    return str(found).replace(os.linesep, " ")
