"""Small programs that notice what is done to them while they run.

Each is given a function to print with and returns a result. It must be the same, with
all that it prints, raises and leaves, whether somebody observes it or not.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import inspect
import io
import random
import signal
import sys
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

Say = Callable[..., None]
MIB: Final = 2**20


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def _take(count: int) -> torch.Tensor:
    return torch.ones(count * MIB, dtype=torch.uint8, device="cuda")


def _too_much() -> torch.Tensor:
    return torch.ones(2**40, dtype=torch.uint8, device="cuda")


def loads_a_model(_say: Say) -> Any:
    """Weights onto the card."""
    return _model().cuda()


def trains(say: Say) -> Any:
    """Three steps of AdamW."""
    model = _model().cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    for _step in range(3):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 8, device="cuda")).square().mean()
        loss.backward()
        optimizer.step()
        say(float(loss))
    return [each.grad for each in model.parameters()], model


def accumulates_gradients(_say: Say) -> Any:
    """With checkpointing, and a hook on each gradient."""
    model = _model().cuda()
    seen: list[Any] = []
    for each in model.parameters():
        each.register_hook(lambda grad: seen.append(float(grad.sum())))
    for _part in range(2):
        rows = torch.randn(2, 8, device="cuda", requires_grad=True)
        checkpoint(model, rows, use_reentrant=False).sum().backward()
    return seen


def runs_out_of_memory(_say: Say) -> Any:
    """And lets it through."""
    kept = _take(1)
    return kept, _too_much()


def recovers_from_an_oom(say: Say) -> Any:
    """On the host."""
    try:
        return _too_much()
    except torch.OutOfMemoryError as error:
        say(str(error))
    return torch.ones(3)


def retries_smaller_and_smaller(say: Say) -> Any:
    """Until it fits."""
    size = 2**40
    while True:
        try:
            return torch.ones(size, dtype=torch.uint8, device="cuda")[:4]
        except torch.OutOfMemoryError:
            size //= 2**8
            say(size, torch.cuda.memory_stats()["num_ooms"])


def keeps_its_variables(_say: Say) -> Any:
    """The dictionary of locals() is the program's own."""
    first = _take(1)
    params = locals()
    with contextlib.suppress(torch.OutOfMemoryError):
        _too_much()
    return sorted(params), params["first"] is first


def has_old_variables(_say: Say) -> Any:
    """What locals() gave is as old as the call; nobody else brings it up to date."""
    number = 1
    params = locals()
    number = 2
    late = _take(1)
    with contextlib.suppress(torch.OutOfMemoryError):
        _too_much()
    return number, sorted(params), params["number"] if _is_old() else 1, late


def _is_old() -> bool:
    return sys.version_info < (3, 13)


def changes_its_variables(_say: Say) -> Any:
    """A key of its own stays in the dictionary."""
    params = locals()
    params["extra"] = 3
    with contextlib.suppress(torch.OutOfMemoryError):
        _too_much()
    return sorted(params)


def looks_at_its_frame(_say: Say) -> Any:
    """A frame is what it was."""
    frame = inspect.currentframe()
    assert frame is not None
    _take(1)
    with contextlib.suppress(torch.OutOfMemoryError):
        _too_much()
    return frame.f_code.co_name, frame.f_trace, "frame" in frame.f_locals


def generates(_say: Say) -> Any:
    """Piece by piece; the last one is closed on the way."""

    def pieces() -> Iterator[torch.Tensor]:
        for count in range(1, 4):
            yield _take(count)

    found = [int(each.sum()) for each in pieces()]
    last: Any = pieces()
    found.append(int(next(last).sum()))
    last.close()
    return found


def generates_through_an_oom(say: Say) -> Any:
    """A generator that caught an error goes on."""
    kept = []

    def pieces() -> Iterator[int]:
        held = _take(1)
        try:
            _too_much()
        except torch.OutOfMemoryError as error:
            kept.append(error)
        yield int(held[0])
        yield 2

    numbers = pieces()
    say(next(numbers))
    with contextlib.suppress(torch.OutOfMemoryError):
        _too_much()
    return list(numbers), len(kept)


def works_in_a_thread(say: Say) -> Any:
    """With an error of its own."""

    def work() -> None:
        say(threading.current_thread().name, int(_take(1)[0]))
        try:
            _too_much()
        except torch.OutOfMemoryError as error:
            say(type(error).__name__)

    thread = threading.Thread(target=work, name="worker")
    thread.start()
    thread.join()
    return sorted(each.name for each in threading.enumerate() if each is thread)


def works_in_a_pool(_say: Say) -> Any:
    """Four pieces, in another thread."""
    with ThreadPoolExecutor(1) as pool:
        return list(pool.map(lambda count: int(_take(count).sum()), range(1, 5)))


def keeps_an_error(say: Say) -> Any:
    """Its traceback has the frames and their variables."""
    try:
        held = _take(2)
        _too_much()
    except torch.OutOfMemoryError as error:
        kept = error
        del held
    names = [each.name for each in traceback.extract_tb(kept.__traceback__)][:2]
    say(names, torch.cuda.memory_allocated())
    trace = kept.__traceback__
    assert trace is not None
    return sorted(trace.tb_frame.f_locals), kept.args, kept.__context__


def lets_go_of_an_error(_say: Say) -> Any:
    """The frame that failed, and its tensor, are gone with it, without a collection."""
    gone: list[Any] = []

    def attempt() -> None:
        held = _take(2)
        gone.append(weakref.ref(held))
        _too_much()

    with contextlib.suppress(torch.OutOfMemoryError):
        attempt()
    return gone[0]() is None, torch.cuda.memory_allocated()


def chains_errors(say: Say) -> Any:
    """Cause and context are as raised."""
    try:
        try:
            _too_much()
        except torch.OutOfMemoryError as error:
            raise KeyError("load") from error
    except KeyError as error:
        say(type(error.__cause__).__name__, error.__suppress_context__)
        return error.args
    return None


def asks_what_is_being_handled(_say: Say) -> Any:
    """Inside the handler and after it."""
    before = sys.exc_info()[0]
    try:
        _too_much()
    except torch.OutOfMemoryError:
        during = sys.exc_info()[0]
        _take(1)
        still = sys.exc_info()[0]
    return before, during, still, sys.exc_info()[0]


def watches_tensors_go(_say: Say) -> Any:
    """A weak reference is dead as soon as the last strong one is."""
    tensor = _take(1)
    reference = weakref.ref(tensor)
    other = _take(1)
    del tensor
    return reference() is None, torch.cuda.memory_allocated() - other.numel()


def watches_modules_go(say: Say) -> Any:
    """And so is a finaliser's moment."""
    model = _model().cuda()
    weakref.finalize(model, say, "the model goes")
    output = model(torch.ones(1, 8, device="cuda")).detach()
    del model
    say("the model is gone", torch.cuda.memory_allocated())
    return output.shape


def watches_forward_arguments_go(_say: Say) -> Any:
    """A module's call leaves nothing at its frames."""
    model = _model().cuda().requires_grad_(requires_grad=False)
    rows = torch.ones(2, 8, device="cuda")
    gone = weakref.ref(rows)
    with torch.no_grad():
        answer = model(rows)
    del rows
    return gone() is None, float(answer.sum()) == float(answer.sum())


def counts_collections(say: Say) -> Any:
    """Only its own."""
    seen: list[Any] = []

    def note(phase: str, info: dict[str, int]) -> None:
        seen.append((phase, info["generation"]))

    gc.disable()
    gc.callbacks.append(note)
    try:
        _model().cuda()
        with contextlib.suppress(torch.OutOfMemoryError):
            _too_much()
        gc.collect(0)
    finally:
        gc.callbacks.remove(note)
        gc.enable()
    say(seen)
    return gc.get_threshold(), gc.isenabled()


def has_a_finaliser(say: Say) -> Any:
    """An object's last words come in order."""

    class Holder:
        def __init__(self) -> None:
            self.held = _take(1)

        def __del__(self) -> None:
            say("goes with", self.held.numel())

    holder = Holder()
    say("has it")
    del holder
    return torch.cuda.memory_allocated()


def handles_signals(say: Say) -> Any:
    """With a handler that allocates."""
    before = signal.getsignal(signal.SIGUSR2)
    signal.signal(signal.SIGUSR2, lambda *_args: say("signal", _take(1).numel()))
    try:
        signal.raise_signal(signal.SIGUSR2)
        with contextlib.suppress(torch.OutOfMemoryError):
            _too_much()
        signal.raise_signal(signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)
    return before


def draws(_say: Say) -> Any:
    """From every generator there is."""
    return (
        random.random(),  # noqa: S311  # the global generator is tested
        np.random.rand(),  # noqa: NPY002  # the global generator is tested
        torch.rand(2),
        torch.rand(2, device="cuda"),
        torch.randn(2, device="cuda", generator=torch.Generator("cuda").manual_seed(1)),
        nn.Dropout()(torch.ones(8, device="cuda")),
    )


def reads_and_resets_peaks(say: Say) -> Any:
    """As a benchmark does."""
    for count in (3, 1):
        torch.cuda.reset_peak_memory_stats()
        _take(count)
        say(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
    torch.cuda.empty_cache()
    torch.cuda.reset_accumulated_memory_stats()
    return torch.cuda.memory_reserved()


def asks_for_free_memory(say: Say) -> Any:
    """Before and after."""
    say(torch.cuda.mem_get_info())
    kept = _take(30)
    say(torch.cuda.mem_get_info(), torch.cuda.memory_summary()[:400])
    return kept[:1], torch.cuda.memory_usage is not None


def keeps_history(_say: Say) -> Any:
    """Actions and the frames of its own file."""
    torch.cuda.memory._record_memory_history()  # torch has no public function for it
    kept = _take(1)
    snapshot: Any = torch.cuda.memory._snapshot()  # torch has no public function for it
    torch.cuda.memory._record_memory_history(enabled=None)  # not public
    return kept[:1], [
        (each["action"], each["size"], [f["name"] for f in each["frames"]][:3])
        for each in snapshot["device_traces"][0]
    ]


def has_an_observer_of_its_own(say: Say) -> Any:
    """Which torch calls at an OOM."""
    tell = [say]  # torch keeps an observer for good
    attach: Any = torch._C._cuda_attach_out_of_memory_observer  # type: ignore[attr-defined]  # not on CPU builds
    attach(lambda index, nbytes, _limit, _free: [each(index, nbytes) for each in tell])
    with contextlib.suppress(torch.OutOfMemoryError):
        _too_much()
    tell.clear()


def counts_functions(_say: Say) -> Any:
    """A mode sees the functions of the program, and none of an observer's."""
    seen: list[str] = []

    class Counting(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            del types
            seen.append(getattr(func, "__name__", str(func)))
            return func(*args, **(kwargs or {}))

    host = torch.ones(3)
    with Counting():
        model = _model().cuda()
        model(torch.ones(2, 8, device="cuda"))
        with contextlib.suppress(torch.OutOfMemoryError):
            _too_much()
    return seen, host


def counts_operators(_say: Say) -> Any:
    """So does a mode for operators."""
    seen: list[str] = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            del types
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Counting():  # type: ignore[no-untyped-call]  # torch's
        rows = torch.ones(2, 8, device="cuda")
        (rows @ rows.t()).sum()
        with contextlib.suppress(torch.OutOfMemoryError):
            _too_much()
    return seen


def hooks_modules(say: Say) -> Any:
    """In the order of calls."""
    model = _model()
    for name, each in model.named_modules():
        each.register_forward_hook(lambda *_args, name=name: say(name or "model"))
    model.cuda()
    return model(torch.ones(1, 8, device="cuda")).shape


class Unfriendly(nn.Module):
    """A module that tells of every question."""

    def __init__(self, say: Say) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        object.__setattr__(self, "say", say)

    def __getattr__(self, name: str) -> Any:
        if name not in {"inner", "weight"}:
            object.__getattribute__(self, "say")("asked for", name)
        return super().__getattr__(name)

    def named_modules(self, *args: Any, **options: Any) -> Any:
        """Tell of it."""
        object.__getattribute__(self, "say")("named_modules")
        return super().named_modules(*args, **options)

    def __repr__(self) -> str:
        object.__getattribute__(self, "say")("repr")
        return "Unfriendly"

    def __hash__(self) -> int:
        return id(self)

    def forward(self, rows: torch.Tensor) -> Any:
        """Compute."""
        return self.inner(rows)


def tells_of_every_question(say: Say) -> Any:
    """Nobody but the program asks anything of a module."""
    model = Unfriendly(say)
    model.cuda()
    answer = model(torch.ones(1, 8, device="cuda"))
    with contextlib.suppress(torch.OutOfMemoryError):
        _too_much()
    return answer.shape


class Telling(dict[Any, Any]):
    """A dictionary that tells of every walk over it."""

    say: Say = print

    def items(self) -> Any:
        """Tell of it."""
        self.say("items")
        return super().items()

    def __iter__(self) -> Any:
        self.say("iter")
        return super().__iter__()

    def __len__(self) -> int:
        self.say("len")
        return super().__len__()


def tells_of_every_walk(say: Say) -> Any:
    """Nobody walks over its containers."""
    tensors = Telling()
    tensors.say = say
    tensors["a"] = _take(1)
    with contextlib.suppress(torch.OutOfMemoryError):
        _too_much()
    return dict.__len__(tensors)


def is_awaited(say: Say) -> Any:
    """Two coroutines take turns."""

    async def work(name: str) -> int:
        kept = _take(1)
        await asyncio.sleep(0)
        with contextlib.suppress(torch.OutOfMemoryError):
            _too_much()
        say(name)
        return kept.numel()

    async def both() -> Any:
        return await asyncio.gather(work("a"), work("b"))

    return asyncio.run(both())


def is_profiled(_say: Say) -> Any:
    """A profile sees the calls of the program's own file in order."""
    seen: list[str] = []

    def profile(frame: Any, event: str, _arg: Any) -> None:
        if event == "call" and frame.f_code.co_filename == __file__:
            seen.append(frame.f_code.co_name)

    sys.setprofile(profile)
    try:
        _take(1)
        with contextlib.suppress(torch.OutOfMemoryError):
            _too_much()
    finally:
        sys.setprofile(None)
    return seen


def copies(_say: Say) -> Any:
    """A model, and its state through a file."""
    model = copy.deepcopy(_model().cuda())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = _model()
    other.load_state_dict(torch.load(file, map_location="cuda"))
    gc.collect()  # up to torch 2.8 a cycle of torch.save holds the storages
    return other, model


def warns(_say: Say) -> Any:
    """What it is warned of is what it does itself."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = torch.ones(2, device="cuda", requires_grad=True) * 2
        with contextlib.suppress(torch.OutOfMemoryError):
            _too_much()
        warnings.warn("its own", stacklevel=1)
    return result, [str(each.message) for each in caught]


def changes_defaults(_say: Say) -> Any:
    """For a block."""
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), torch.device("cuda"):
            return torch.ones(2), torch.is_grad_enabled()
    finally:
        torch.set_default_dtype(torch.float32)


def uses_streams(_say: Say) -> Any:
    """Events and another stream."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        kept = _take(1)
        event = stream.record_event()
    event.synchronize()
    return kept[:1], torch.cuda.current_stream() == torch.cuda.default_stream()


class Own(torch.autograd.Function):
    """A function of the program's own."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        """Double."""
        ctx.save_for_backward(rows)
        return rows * 2

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        """Double back."""
        (rows,) = ctx.saved_tensors
        doubled: torch.Tensor = gradients[0] * 2 + rows * 0
        return doubled


def has_a_function_of_its_own(_say: Say) -> Any:
    """Forward and backward."""
    rows = torch.randn(3, device="cuda", requires_grad=True)
    Own.apply(rows).sum().backward()  # type: ignore[no-untyped-call]  # torch's
    return rows.grad


def goes_deep(_say: Say) -> Any:
    """An allocation under many frames."""

    def dive(depth: int) -> int:
        return dive(depth - 1) if depth else _take(1).numel()

    return dive(200)


def allocates_in_a_class(_say: Say) -> Any:
    """A class body has variables too."""

    class Body:
        table = _take(1)
        names = sorted(each for each in vars() if not each.startswith("__"))
        with contextlib.suppress(torch.OutOfMemoryError):
            _too_much()

    return Body.names, Body.table.numel(), sorted(n for n in vars(Body) if n[0] != "_")


def exits(_say: Say) -> Any:
    """With the card in use."""
    kept = _take(1)
    sys.exit(int(kept[0]))


PROGRAMS: Final = [
    each
    for name, each in list(globals().items())
    if inspect.isfunction(each) and each.__module__ == __name__ and name[0] != "_"
]
