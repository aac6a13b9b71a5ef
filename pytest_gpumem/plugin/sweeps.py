"""Runs sweeps in pytest: markers, the fixture, shards, replays and subtests."""

from __future__ import annotations

import hashlib
import shlex
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pytest

from pytest_gpumem.errors import SweepError
from pytest_gpumem.plugin.isolated import ISOLATION
from pytest_gpumem.plugin.record_keeping import record_of, set_progress
from pytest_gpumem.plugin.repeats import body_of
from pytest_gpumem.plugin.sweep_progress import Progress, show_progress
from pytest_gpumem.sweeps.sweep_record import summary_of
from pytest_gpumem.sweeps.text import SHOWN, describe_point, explain_failures, replays

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem.plugin.marks import MarkersByTest
    from pytest_gpumem.plugin.session import Run
    from pytest_gpumem.records.record import Verdict
    from pytest_gpumem.sweeps.report import Outcome, SweepReport

#: The key of the command-line arguments that select a test without a node id of its own.
CHOSEN_BY: Final = pytest.StashKey[str]()
#: The test's argument that names a worker's share of the points.
SHARD: Final = "_gpumem_shard"


def shard_tests(metafunc: pytest.Metafunc, *, is_replay: bool) -> None:
    """Turn a swept test into one test for each worker of pytest-xdist.

    With N workers each test runs every Nth point; together they run the whole sweep.
    """
    config = metafunc.config
    isolation = config.stash.get(ISOLATION, None)
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    if isolation is not None:
        workers = isolation.workers
    if workers < 2 or is_replay:  # noqa: PLR2004  # the points are not shared
        return
    # The number of the test's ids so far; other parameters may come before or after them.
    position = max((len(each._idlist) for each in metafunc._calls), default=0)  # noqa: SLF001  # no public name
    metafunc.fixturenames.append(SHARD)
    metafunc.parametrize(
        SHARD,
        [Shard(index, workers, position) for index in range(workers)],
        ids=[f"points {index + 1} of {workers}" for index in range(workers)],
    )


class Shard(NamedTuple):
    """A worker's share of a sweep's points; with N shares it has every Nth point.

    Attributes:
        part: The share's number, from 0.
        parts: The number of shares.
        position: The position of the share's id among the ids of the test's parameters.
    """

    part: int
    parts: int
    position: int


def _shard(item: Any) -> Shard | None:
    """Return a test's share of the points; None if they are not divided among workers."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    shard = parameters.get(SHARD)
    return shard if isinstance(shard, Shard) else None


def _whole_name(item: Any) -> str:
    """Return the name that a test would have if its points were not divided."""
    shard = _shard(item)
    if shard is None:
        return str(item.name)
    ids = list(item.callspec._idlist)  # noqa: SLF001  # no public name
    del ids[shard.position]
    return f"{item.originalname}[{'-'.join(ids)}]" if ids else str(item.originalname)


def _whole_id(item: pytest.Item) -> str:
    """Return the node id that a test would have if its points were not divided."""
    return item.nodeid.removesuffix(item.name) + _whole_name(item)


class Sweeps:
    """Runs the sweeps of tests and reports the result of each point to pytest.

    Args:
        run: The run, for its device and options.
        markers: The arguments of the tests' markers.
    """

    def __init__(self, run: Run, markers: MarkersByTest) -> None:
        self._run: Final = run
        self._markers: Final = markers

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> object | None:
        """Sweep a test if its marker says so, instead of calling it once."""
        plan = self._markers[pyfuncitem].sweep
        if plan is None:
            return None
        shard = _shard(pyfuncitem)
        options = dict(plan)
        if shard is not None:
            options["shard"] = (shard.part, shard.parts)
        report = self.sweep(pyfuncitem, body_of(pyfuncitem), options=options)
        self.check(pyfuncitem, report)
        return True

    def sweep(
        self,
        item: pytest.Item,
        body: Callable[..., Any],
        *arguments: Any,
        options: dict[str, Any],
    ) -> SweepReport:
        """Run a sweep for a test and report each point as a subtest.

        Raises:
            SweepError: The options make no sense, or the body fails without a fault, but
                not by an exception that it raised.
        """
        from pytest_gpumem.sweeps.run import sweep_ooms

        settings = self._run.settings
        if settings.points is not None:
            options["points"] = settings.points
        if settings.replay is not None:
            options["only"] = settings.replay
        options.setdefault("name", _whole_name(item))
        recover = bool(options.get("recover", False))
        subtests = _subtests(item)

        seen: Counter[tuple[str, Verdict]] = Counter()
        failing = 0
        so_far: Progress | None = None

        def progress(done: int, total: int, outcome: Outcome) -> None:
            nonlocal failing, so_far
            passes = outcome.passes(recover=recover)
            failing += not passes
            kind = (outcome.point.site, outcome.verdict)
            seen[kind] += 1
            so_far = Progress(item.nodeid, done, total, failing)
            if subtests is None:
                show_progress(item.config, so_far)
                return
            set_progress(item, list(so_far))
            try:
                _tell(
                    item, subtests, outcome, passes=passes, is_new=seen[kind] <= SHOWN
                )
            finally:
                set_progress(item, None)

        resume = self._state_file(item, str(options["name"]))
        device = self._run.require_device()
        witness = self._run.witness
        timeline = self._run.timeline
        try:
            with (
                nullcontext() if witness is None else witness.paused(),
                nullcontext() if timeline is None else timeline.paused(),
            ):
                report = sweep_ooms(
                    body,
                    *arguments,
                    device=device,
                    progress=progress,
                    resume=resume,
                    **options,
                )
        except KeyboardInterrupt as error:
            # pytest prints the text at the end of the run.
            if resume is not None and so_far is not None:
                error.args = (
                    f"a sweep of {_whole_id(item)} was interrupted after {so_far.done} "
                    f"of {so_far.total} points; go on with --gpu-oom-resume",
                )
            raise
        except SweepError as error:
            if error.__cause__ is not None:
                raise error.__cause__ from None  # the test fails without any fault
            raise
        commands = replays(report, replay_line(item))
        found = summary_of(report, _whole_id(item), commands)
        record_of(item).sweeps.append(found)
        return report

    def check(self, item: pytest.Item, report: SweepReport) -> None:
        """Fail a test if points of its sweep ended badly."""
        if self._run.settings.replay is not None and not report.outcomes:
            pytest.fail(
                f"--gpu-replay-oom={self._run.settings.replay}: no allocation of this "
                "test was failed by it",
                pytrace=False,
            )
        if report.failures:
            # If there are subtests, they have described each point.
            detailed = _subtests(item) is None
            text = explain_failures(report, replay_line(item), detailed=detailed)
            pytest.fail(text, pytrace=False)

    def _state_file(self, item: pytest.Item, name: str) -> Path | None:
        """Return the file of a sweep's progress; None without pytest's cache."""
        cache: pytest.Cache | None = getattr(item.config, "cache", None)
        if cache is None or self._run.settings.replay is not None:
            return None
        digest = hashlib.sha256(f"{item.nodeid} {name}".encode()).hexdigest()[:16]
        file = Path(cache.mkdir("gpumem-sweeps")) / f"{digest}.jsonl"
        if not self._run.settings.resume:
            file.unlink(missing_ok=True)
        return file


def _tell(
    item: pytest.Item, subtests: Any, outcome: Outcome, *, passes: bool, is_new: bool
) -> None:
    """Report one point as a subtest."""
    with subtests.test(str(outcome.point)):
        if not passes:
            text = describe_point(outcome, replay_line(item), detailed=is_new)
            pytest.fail(text, pytrace=False)


def replay_line(item: pytest.Item) -> Callable[[str], str]:
    """Return a function that turns a point's rule into the command that replays it."""
    chosen = item.stash.get(CHOSEN_BY, _whole_id(item))
    return lambda rule: (
        f"pytest {shlex.quote(chosen)} --gpu-replay-oom={shlex.quote(rule)}"
    )


def _subtests(item: pytest.Item) -> Any:
    """Return pytest's subtests fixture; None before pytest 9."""
    if not hasattr(pytest, "Subtests"):
        return None
    request: Any = item._request  # type: ignore[attr-defined]  # noqa: SLF001  # pytest's test functions have it
    return request.getfixturevalue("subtests")
