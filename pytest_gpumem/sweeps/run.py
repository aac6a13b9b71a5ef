"""Makes each allocation of a piece of code fail in turn, and judges every run.

Note [The method]
The code runs once to warm up and once more to count its allocations. Then it runs twice
for each N = 1, 2, ...: once only the Nth allocation fails (transient), and once the Nth
and all later allocations fail (persistent). The sweep stops when a run ends before its
fault was reached. It does not stop when a run succeeds, because code that recovers
succeeds at N = 1. SQLite's ``do_malloc_test`` and Linux's ``fail-nth`` use this method.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.devices.active import active_device
from pytest_gpumem.errors import SweepError
from pytest_gpumem.instruments.injector import OomInjector
from pytest_gpumem.instruments.sites import describe_site
from pytest_gpumem.instruments.surroundings import frozen_heap
from pytest_gpumem.stacks import calling_frame
from pytest_gpumem.sweeps.judge import SweepJudge
from pytest_gpumem.sweeps.plan import SweepPlan
from pytest_gpumem.sweeps.report import Outcome, SweepReport
from pytest_gpumem.sweeps.state import SweepState

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from pytest_gpumem.devices import Device

#: A run may take this many times as long as the clean run, and at least this many seconds.
_PATIENCE: Final = 20.0
_LEAST_S: Final = 10.0
#: An allocation that no run reaches.
_NEVER: Final = 2**31


def sweep_ooms(
    body: Callable[..., Any],
    *args: Any,
    setup: Callable[[], Sequence[Any]] | None = None,
    same: Callable[[Any, Any], bool] | None = None,
    run: Callable[[Any], Any] | None = None,
    variants: bool = False,
    name: str | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int, Outcome], None] | None = None,
    device: Device | None = None,
    **plan: Any,
) -> SweepReport:
    """Make every allocation of ``body(*args)`` fail in turn, and judge each run.

    Before each run random states and torch's defaults (dtype, card, gradients, ...) are
    restored, caches are emptied, and ``setup`` makes new arguments, if it is given. The
    sweep waits for threads that the previous run has left. The result of a run is
    compared with that of a run without faults: tensors by value, on any device, and
    modules by their state.

    Args:
        body: The code under test; returns a result to compare.
        args: Its arguments, the same for each run.
        setup: Makes the arguments before each run, without faults; replaces ``args``.
        same: Tells whether a run's result is right; its arguments are portraits of the
            clean run's result and of this run's result. None compares values within the
            tolerance of their dtypes.
        run: For a body that loads a model: computes an output from the body's result,
            without faults. Then the model must be whole, and the outputs are compared
            instead of the results, within the tolerance of the model's dtypes.
        variants: Whether the body may load a different model, with another number of
            parameters; the output of such a model is not compared.
        name: The name in texts; None means the body's name.
        resume: A file that keeps the finished points, so that an interrupted sweep can
            continue.
        progress: Called after each point with the number of finished points, the number
            of all points, and the outcome.
        device: The device; None means the active device.
        plan: The fields of ``SweepPlan``: ``points``, ``modes``, ``flavours``,
            ``rule``, ``recover``, ``timeout_s``, ``only``.

    Returns:
        The report; its ``failures`` are the points that ended badly.

    Raises:
        SweepError: The plan makes no sense, or the body raises without any fault.
        RuleError: The plan's rule cannot be read.

    Example::

        report = sweep_ooms(lambda: load_with_fallback(path)(batch), recover=True)
        assert not report.failures

    Limits: state outside the arguments (module globals) is not restored between runs. If
    threads allocate in no fixed order, the Nth allocation differs from run to run.
    """
    wanted = SweepPlan(**plan)
    if setup is not None and args:
        raise SweepError("give the arguments or a setup that makes them, not both")
    judge = SweepJudge(
        body,
        setup or (lambda: args),
        same=same,
        run=run,
        variants=variants,
        device=active_device() if device is None else device,
    )
    title = name or str(getattr(body, "__qualname__", repr(body)))
    sweep = _Sweep(judge, wanted, title, progress or (lambda *_point: None))
    with frozen_heap() as judge.thawed:
        return sweep.run(resume)


@dataclass(frozen=True, slots=True)
class _Sweep:
    judge: SweepJudge
    plan: SweepPlan
    name: str
    progress: Callable[[int, int, Outcome], None]

    def run(self, resume: str | os.PathLike[str] | None) -> SweepReport:
        clean = self.judge.clean()
        sites = self._count()
        timeout_s = self.plan.timeout_s or max(_LEAST_S, _PATIENCE * clean.seconds)
        report = SweepReport(self.name, self.plan.recover, sites)
        state = SweepState(resume, self.name, len(sites), self.plan)
        points = list(self.plan.points_of(sites))
        with state:
            for done, point in enumerate(points, start=1):
                outcome = state.known(point)
                if outcome is not None:
                    report.num_resumed += 1
                else:
                    outcome = self.judge.judge(point, timeout_s)
                    if outcome is None:
                        continue  # the fault was not reached
                    state.note(outcome)
                report.outcomes.append(outcome)
                self.progress(done, len(points), outcome)
            if self.plan.is_whole:
                self._run_on(report, len(sites), timeout_s)
        return report

    def _run_on(self, report: SweepReport, count: int, timeout_s: float) -> None:
        """Run points until a run ends before its fault was reached."""
        for mode in self.plan.modes:
            for flavour in self.plan.flavours:
                for number in range(count + 1, 2 * count + 2):
                    point = self.plan.point(number, mode, flavour)
                    outcome = self.judge.judge(point, timeout_s)
                    if outcome is None:
                        break
                    report.outcomes.append(outcome)
                    done = len(report.outcomes)
                    self.progress(done, done, outcome)

    def _count(self) -> tuple[str, ...]:
        """Return the site of each allocation of a clean run that the rule counts."""
        rule = replace(self.plan.base(), nth=_NEVER, times=1)
        injector = OomInjector(rule, device=self.judge.device)
        schedule = injector.schedules[0]
        sites: list[str] = []
        lock = threading.Lock()

        def count(device_index: int, nbytes: int) -> bool:
            if self.judge.is_looking:
                return False
            with lock:
                before = schedule.num_counted
                injector.fails(device_index, nbytes)
                if schedule.num_counted > before:
                    sites.append(describe_site(calling_frame()))
            return False

        with self.judge.device.failing(count):
            self.judge.clean()
        if not sites:
            raise SweepError(
                f"{self.name} makes no allocation that {str(self.plan.base().phase)!r} "
                "counts: there is nothing to sweep; does it use the card?"
            )
        return tuple(sites)


__all__ = ["sweep_ooms"]
