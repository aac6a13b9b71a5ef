"""Stacks are read without a trace, and what reads them cannot harm a program."""

from __future__ import annotations

import builtins
import faulthandler
import gc
import json
import os
import signal
import sys
import weakref
from pathlib import Path
from types import coroutine
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from ways import WORKERS

from pytest_gpumem import OomInjector, active_device, stacks, sweep_ooms
from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.guards import Guarded, guarded, take_dropped
from pytest_gpumem.instruments.module_parts import modules_of, tensors_of
from pytest_gpumem.instruments.sites import (
    Line,
    describe_site,
    module_path,
    site_of,
)
from pytest_gpumem.instruments.timeline import Timeline
from pytest_gpumem.instruments.witness import OomWitness
from pytest_gpumem.stacks import (
    calling_frame,
    clear_exception,
    clear_frame,
    frames_from,
    is_users_own,
    short_path,
    variables_of,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from types import FrameType

pytest_plugins = ["pytester"]

MIB = 2**20


@pytest.fixture(autouse=True)
def _card() -> Iterator[None]:
    with simulated_device("64MiB"):
        yield
    take_dropped()


class _Thing:
    """Something that a weak reference can point to."""


def _here() -> FrameType:
    return calling_frame()


def _mib(count: int) -> torch.Tensor:
    return torch.zeros(count * MIB, dtype=torch.uint8, device="cuda")


# -- reading ------------------------------------------------------------------------------


def test_every_kind_of_variable_is_read() -> None:
    """Arguments, locals, cells and free variables; what is not bound is not there."""

    def outer(shared: int, *rest: int, **named: int) -> dict[str, Any]:
        own, kept = 5, 6
        assert rest
        assert named

        def inner(own_argument: int) -> dict[str, Any]:
            found = variables_of(_here())
            return {**found, "free": (shared, kept), "given": own_argument}

        seen = {**variables_of(_here()), "wanted": variables_of(_here(), "no", "own")}
        seen["inner"] = inner(own)
        late = seen
        assert late is seen
        return seen

    found = outer(1, 3, named=4)
    inner = found.pop("inner")

    assert {"shared": 1, "rest": (3,), "named": {"named": 4}}.items() <= (found.items())
    assert (5, 6, {"own": 5}) == (found["own"], found["kept"], found["wanted"])
    assert "late" not in found
    assert {"shared": 1, "kept": 6, "own_argument": 5}.items() <= inner.items()


def test_a_cell_is_read_where_it_is_a_variables_own() -> None:
    """One that is empty hides no other, one that is a value is no place for another."""
    bound = 5

    def both() -> tuple[int, int]:
        return bound, assigned_later

    held = (both.__closure__ or ())[1]
    found = variables_of(_here())
    assigned_later = 6

    assert (5, 6) == both()
    assert "assigned_later" not in found
    assert 5 == found["bound"]
    assert found["held"] is held


def test_the_variables_of_a_namespace_are_read() -> None:
    """A class body's and a module's, which are no function's."""

    class Body:
        inside = 3
        found = variables_of(_here(), "inside", "outside")

    module = variables_of(
        next(each for each in frames_from(_here()) if each.f_code.co_name == "<module>")
    )

    assert {"inside": 3} == Body.found
    assert "__name__" in module


@pytest.mark.skipif(
    sys.version_info >= (3, 13), reason="a look at f_locals writes nothing any more"
)
@pytest.mark.parametrize("is_known", [True, False])
def test_frames_that_are_laid_out_otherwise_are_not_read(
    monkeypatch: pytest.MonkeyPatch, *, is_known: bool
) -> None:
    """Where the frame's code is not at its place, nothing else is looked for."""

    def fail() -> None:
        raise KeyError

    with pytest.raises(KeyError) as caught:
        fail()
    layout = stacks._layout
    assert layout is not None
    assert "layout" in variables_of(_here())

    other = layout._replace(code=layout.code + 32) if is_known else None
    monkeypatch.setattr(stacks, "_layout", other)
    clear_exception(caught.value)

    assert {} == variables_of(_here())


def test_reading_leaves_no_trace() -> None:
    """A dictionary of the program's stays as it is; what it lets go of is gone."""
    thing = _Thing()
    gone = weakref.ref(thing)
    number = 1
    params = locals()
    del params["thing"]
    number = 2

    read = variables_of(_here())["number"]
    del thing

    assert (2, 1) == (read, params["number"])
    assert "read" not in params
    assert gone() is None
    assert number == 2


def test_a_dictionary_of_the_program_outlives_its_frame() -> None:
    """The one that locals() gave it; one that a debugger's look has left does not."""
    kept: list[Any] = []

    def fail(*, keeps: bool) -> None:
        thing = _Thing()
        kept.append(weakref.ref(thing))
        if keeps:
            kept.append(locals())
        raise ValueError

    for keeps in (True, False):
        try:
            fail(keeps=keeps)
        except ValueError as error:
            trace = error.__traceback__
            assert trace is not None
            assert trace.tb_next is not None
            if not keeps:
                assert trace.tb_next.tb_frame.f_locals["thing"] is not None
            clear_exception(error)
    first, params, second = kept

    assert first() is params["thing"]
    assert second() is None


def test_a_generator_that_waits_is_not_closed() -> None:
    """Its frame may be in the traceback of an error that it has caught."""
    caught = []

    def generate() -> Iterator[int]:
        try:
            _ = {1: 1}[0]
        except KeyError as error:
            caught.append(error)
        yield 1
        yield 2

    numbers = generate()
    first = next(numbers)
    clear_exception(caught[0])

    assert [1, 2] == [first, *numbers]


def test_a_coroutine_that_waits_is_not_closed() -> None:
    """Nor an asynchronous generator's."""
    caught: list[BaseException] = []

    @coroutine
    def pause() -> Iterator[int]:
        yield 1

    async def work() -> int:
        try:
            _ = {1: 1}[0]
        except KeyError as error:
            caught.append(error)
        await pause()
        return 2

    async def generate() -> AsyncIterator[int]:
        yield await work()

    waits: list[Any] = [work(), generate().__anext__()]
    for each in waits:
        assert 1 == each.send(None)
    for error in caught:
        clear_exception(error)
    for each in waits:
        with pytest.raises(StopIteration, match="2"):
            each.send(None)


def test_frames_of_a_finished_generator_are_cleared() -> None:
    """And those of every member of a group of errors."""
    things = []

    def generate() -> Iterator[int]:
        thing = _Thing()
        things.append(weakref.ref(thing))
        yield from ()
        raise KeyError(len(str(thing)))

    errors: list[Exception] = []
    for _ in range(2):
        try:
            next(generate())
        except KeyError as error:
            errors.append(error)
    group = getattr(builtins, "ExceptionGroup", None)  # not before Python 3.11
    for each in errors if group is None else [group("two", errors)]:
        clear_exception(each)

    assert [None, None] == [each() for each in things]


def test_a_running_frame_stays_whole() -> None:
    """It cannot be cleared."""
    number = 3

    clear_frame(_here())

    assert 3 == number


@pytest.mark.parametrize(
    ("filename", "is_own"),
    [
        (__file__, True),
        ("/home/me/project/model.py", True),
        ("<doctest test_it.answer[0]>", True),
        ("<ipython-input-3-abc>", True),
        ("/x/lib/python3.11/site-packages/torch/nn/x.py", False),
        ("/usr/lib/python3/dist-packages/torch/nn/x.py", False),
        ("/usr/local/lib/python3.10/dist-packages/x.py", False),
        ("C:\\Python\\Lib\\site-packages\\x.py", False),
        ("<frozen importlib._bootstrap>", False),
        ("<string>", False),
        ("/home/me/app.zip/model.py", False),
        ("/home/me/thing-1.0-py3.11.egg/thing/model.py", False),
        (os.__file__, False),
        (json.__file__, False),
    ],
)
def test_the_users_own_code_is_told_apart(filename: str, *, is_own: bool) -> None:
    """Installed, zipped and frozen code is not the user's, on any distribution."""
    assert is_own == is_users_own(filename)


def test_paths_are_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From the package or the working directory on; also where that was removed."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(tmp_path)

    assert "a/b.py" == short_path(str(tmp_path / "a" / "b.py"))
    assert "/else/where.py" == short_path("/else/where.py")
    assert "torch/x.py" == short_path("/usr/lib/python3/dist-packages/torch/x.py")
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert __file__ == short_path(__file__)


# -- hostile programs ---------------------------------------------------------------------


class Hostile(nn.Module):
    """A module that lets nobody look at it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.is_closed = True

    def named_modules(self, *_args: Any, **_options: Any) -> Any:
        raise RuntimeError("hands off")

    modules = children = named_children = named_parameters = named_buffers = (
        parameters
    ) = buffers = named_modules

    def __repr__(self) -> str:
        raise RuntimeError("hands off")

    __hash__ = nn.Module.__hash__

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("hands off")

    def forward(self, batch: torch.Tensor) -> Any:
        """Compute."""
        return self.inner(batch)


class Answerless:
    """An object that answers any question with an error."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __hash__(self) -> int:
        return 3

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no equality")


class OddDict(dict[Any, Any]):
    """A dictionary that cannot be walked."""

    def items(self) -> Any:
        raise RuntimeError("no items")


class OddList(list[Any]):
    """A list that cannot be sliced."""

    def __getitem__(self, _index: Any) -> Any:
        raise RuntimeError("no items")


def test_an_oom_among_hostile_objects_is_described() -> None:
    """Nothing of them is called; the OOM is the one that reaches the program."""
    model = Hostile()
    object.__setattr__(model, "inner", model.inner)
    model.inner.cuda()
    hostile = Answerless()
    odd = OddDict({hostile: _mib(1)}), OddList([_mib(2)])
    by_key = {hostile: _mib(3)}
    with OomWitness(active_device()) as witness, Timeline(active_device()) as timeline:
        with pytest.raises(torch.OutOfMemoryError):
            _mib(100)
        with OomInjector("any:nth=1,site=*never*") as injector:
            model(torch.ones(2, 4, device="cuda"))
    (incident,) = witness.incidents

    assert not take_dropped()
    assert "" == incident.note
    assert "Hostile" in {each.name for each in incident.models}
    assert {"by_key[…] of test_an_oom_among"} <= {
        each.owner[: len("by_key[…] of test_an_oom_among")] for each in incident.tensors
    }
    assert not injector.num_injected
    assert timeline.result()
    assert len(odd) == len(by_key) + 1


def test_parts_are_read_from_torchs_own_registries() -> None:
    """With their paths; a module inside itself, or a torn one, is no danger."""
    model = nn.Sequential(nn.Linear(2, 2), Hostile())
    model.add_module("again", model)
    model.add_module("nothing", None)
    torn = nn.Module.__new__(nn.Module)

    assert ["", "0", "1", "1.inner"] == [path for path, _module in modules_of(model)]
    assert ["weight", "bias"] == [name for name, _part in tensors_of(model[0])]
    assert [("", torn)] == list(modules_of(torn))
    assert [] == list(tensors_of(torn))


def test_a_site_is_the_users_line_and_the_librarys_function() -> None:
    """The innermost of each; torch only passes a request on."""
    library = str(Path(torch.__file__).parents[1] / "loads" / "load.py")
    lines = [
        Line(torch.__file__, 1, "empty"),
        Line(library, 7, "fill"),
        Line(library, 9, "load"),
        Line(__file__, 42, "test_it"),
        Line(__file__, 43, "outer"),
    ]

    assert (
        "tests/instruments/test_stacks.py:42 in test_it (other) via loads/load.py fill"
        == site_of(lines)
    )
    assert "loads/load.py:7 in fill (other)" == site_of(lines[:3])
    assert "unknown site (other)" == site_of(lines[:1])


def test_each_line_of_a_function_is_a_site_of_its_own() -> None:
    """However far down it is."""

    def lines() -> list[str]:
        numbers = [1, 2, 3, 4, 5, 6, 7, 8]
        total = sum(numbers) + sum(numbers[1:]) + sum(numbers[2:]) + sum(numbers[3:])
        first = describe_site(_here())
        second = describe_site(_here())
        third = describe_site(_here())
        assert 36 + 35 + 33 + 30 == total
        return [first, second, third]

    first = lines.__code__.co_firstlineno + 3
    assert [str(first + 0), str(first + 1), str(first + 2)] == [
        each.partition(" in ")[0].rpartition(":")[2] for each in lines()
    ]


def test_the_module_at_work_is_named_whatever_it_overrides() -> None:
    """By its path in the outermost one."""
    seen = []

    class Probe(nn.Module):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            seen.append(module_path(_here()))
            return batch

    model = Hostile()
    model.inner = nn.Sequential(Probe())  # type: ignore[assignment]  # another module
    model(torch.ones(1))

    assert ["inner.0"] == seen


# -- the cause of faults ------------------------------------------------------------------


def test_an_oom_leaves_the_programs_own_dictionary_alone() -> None:
    """What locals() gave it is as it was when an OOM is described."""
    first = _mib(1)
    params = locals()
    second = _mib(2)

    with OomWitness(active_device()) as witness, pytest.raises(torch.OutOfMemoryError):
        _mib(100)

    assert params["first"] is first
    assert "second" not in params
    assert 1 == len(witness.incidents)
    assert second.is_cuda


def test_a_rule_for_a_site_keeps_nothing_alive() -> None:
    """Bytes that the program lets go of are free at once."""
    model = nn.Linear(4, 4).cuda()

    def work() -> int:
        batch = torch.ones(MIB, 4, device="cuda")
        answer = model(batch)
        before = torch.cuda.memory_allocated()
        del batch, answer
        return before - torch.cuda.memory_allocated()

    with torch.no_grad(), OomInjector("forward:nth=99,site=*never*"):
        assert 32 * MIB == work()


@pytest.mark.parametrize("watched", ["witness", "timeline", "site", "nothing"])
def test_without_a_working_directory_memory_runs_out_as_ever(
    watched: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The program sees torch's error, and no bytes are lost."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    observers: dict[str, Any] = {
        "witness": lambda: OomWitness(active_device()),
        "timeline": lambda: Timeline(active_device()),
        "site": lambda: OomInjector("any:nth=99,site=*x*"),
        "nothing": OomInjector,
    }
    try:
        with observers[watched]():
            kept = _mib(1)
            with pytest.raises(torch.OutOfMemoryError):
                _mib(100)
            del kept
        described = describe_site(_here())
    finally:
        monkeypatch.undo()

    assert 0 == torch.cuda.memory_allocated()
    assert __file__ in described
    assert not take_dropped()


# -- the guard ----------------------------------------------------------------------------


def _broken(*_args: Any) -> Any:
    raise ValueError("a bug of the observer's")


def _broken_later(*_args: Any) -> Any:
    return _broken


@pytest.mark.parametrize(
    ("kind", "observe"),
    [
        ("watching", _broken),
        ("watching", _broken_later),
        ("tracing", _broken),
        ("observing_ooms", _broken),
    ],
)
def test_an_observer_that_raises_is_dropped(kind: str, observe: Any) -> None:
    """The program goes on, with all its bytes; the run is told once."""
    with getattr(active_device(), kind)(observe):
        kept = [_mib(1), _mib(2)]
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                _mib(100)
        during = torch.cuda.memory_allocated()
        kept.clear()

    (told,) = take_dropped()
    assert 3 * MIB == during
    assert 0 == torch.cuda.memory_allocated()
    assert told == (
        f"{__name__}._broken was stopped, so its record is incomplete: ValueError: "
        f"a bug of the observer's (_broken, line {_broken.__code__.co_firstlineno + 1})"
    )
    assert not take_dropped()


@pytest.mark.parametrize("is_later", [False, True])
def test_an_interruption_reaches_the_program_and_costs_no_bytes(
    *, is_later: bool
) -> None:
    """Ctrl-C is for the program; the bytes that it was being given are free."""

    def interrupt(*_args: Any) -> Any:
        raise KeyboardInterrupt

    watch = (lambda *_args: interrupt) if is_later else interrupt
    with active_device().watching(watch), pytest.raises(KeyboardInterrupt):
        _mib(1)

    assert 0 == torch.cuda.memory_allocated()
    assert not take_dropped()


def test_a_dropped_observer_is_called_no_more() -> None:
    """What it would have given back to be called is guarded too."""
    calls = []

    def observe(number: int) -> Any:
        calls.append(number)
        return (lambda: number * 2) if number < 2 else _broken()

    observer = Guarded(observe)

    assert 2 == observer(1)()
    assert [None, None] == [observer(2), observer(3)]
    assert [1, 2] == calls
    assert 1 == len(take_dropped())


def test_the_innermost_line_is_told() -> None:
    """However deep in the observer it is."""

    def look() -> Any:
        return _broken_later()()

    assert guarded(lambda: look(), otherwise=None) is None  # noqa: PLW0108  # a frame more
    line = _broken.__code__.co_firstlineno + 1
    assert take_dropped()[0].endswith(f"(_broken, line {line})")


def test_an_error_without_a_text_is_told_too() -> None:
    """Its class may be the program's own."""

    class OddError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    def look() -> int:
        raise OddError

    assert 7 == guarded(look, otherwise=7)
    assert "OddError: its text cannot be read (look, line " in take_dropped()[0]


@pytest.mark.parametrize("options", WORKERS)
def test_the_run_says_what_was_dropped(
    pytester: pytest.Pytester, options: tuple[str, ...]
) -> None:
    """One line at its end, from workers too; the tests pass."""
    pytester.makepyfile(
        """
        import torch
        from pytest_gpumem import active_device

        def broken(*_told):
            raise ValueError("a bug")

        def test_it():
            with active_device().watching(broken):
                for _ in range(3):
                    assert torch.ones(3, device="cuda").is_cuda
        """
    )
    result = pytester.runpytest(
        "-p", "no:cacheprovider", "--gpu-backend=simulated", *options
    )

    result.assert_outcomes(passed=1)
    said = [line for line in result.outlines if "was stopped" in line]
    assert [
        "gpumem: test_the_run_says_what_was_dropped.broken was stopped, so its"
    ] == [line[: len(said[0].partition(" record")[0])] for line in said]


def test_a_sweep_leaves_the_systems_handlers_alone(tmp_path: Path) -> None:
    """Also faulthandler's, of which Python's signal module does not know."""
    with (tmp_path / "stacks.txt").open("w+") as file:
        faulthandler.register(signal.SIGUSR2, file=file, all_threads=False)
        try:
            sweep_ooms(lambda: float(torch.ones(1, device="cuda")), points=1)
            os.kill(os.getpid(), signal.SIGUSR2)
        finally:
            faulthandler.unregister(signal.SIGUSR2)
        file.seek(0)

        assert "test_a_sweep_leaves_the_systems_handlers_alone" in file.read()
    gc.collect()
