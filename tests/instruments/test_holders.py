"""Who holds a leaked tensor: a corpus of leaks, and the words for each holder."""

from __future__ import annotations

import gc
import sys
import textwrap
from types import ModuleType
from typing import Final, NamedTuple

import pytest
import torch

from pytest_gpumem.devices.active import active_device
from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.instruments.holders import blocks_on_cards, find_holders

MODULE: Final = "leaks"
NOBODY: Final = "no Python object that can be named"


class Leak(NamedTuple):
    """A program that leaves a tensor on the card.

    Attributes:
        code: A module; ``big()`` makes the tensor, ``leak()`` runs, ``undo()`` ends it.
        words: What the holder's words have, in their order.
        why_not: Why the holder cannot be named, where it cannot.
        is_old: Whether the holder was there before, so that a frozen heap hides it.
    """

    code: str
    words: tuple[str, ...]
    why_not: str = ""
    is_old: bool = False


START: Final = """
import torch

def big():
    return torch.zeros(2**20, device="cuda")
"""


def suspended(name: str) -> tuple[str, ...]:
    """Return the words for a suspended function; before 3.11 its frame is an object."""
    if sys.version_info < (3, 11):
        return f"local 'large' of {name}", f"suspended {name}"
    return (f"local 'large' of suspended {name}",)


LEAKS: Final = {
    "module global": Leak(
        """
        def leak():
            global KEPT
            KEPT = big()
        """,
        ("global 'KEPT' of leaks",),
    ),
    "list of a module": Leak(
        """
        CACHE = []
        def leak():
            CACHE.append(big())
        """,
        ("a list of 1", "global 'CACHE' of leaks"),
    ),
    "nested containers": Leak(
        """
        CACHE = {}
        def leak():
            CACHE["a"] = [({"b": big()},)]
        """,
        ("entry 'b'", "entry 'a'", "global 'CACHE' of leaks"),
    ),
    "deque": Leak(
        """
        from collections import deque
        RECENT = deque(maxlen=3)
        def leak():
            RECENT.append(big())
        """,
        ("a deque of 1", "global 'RECENT' of leaks"),
    ),
    "queue": Leak(
        """
        import queue
        WORK = queue.Queue()
        def leak():
            WORK.put(big())
        """,
        ("a deque of 1", "attribute 'queue' of a Queue", "global 'WORK' of leaks"),
    ),
    "gradient of a global model": Leak(
        """
        def leak():
            global MODEL
            MODEL = torch.nn.Linear(1024, 1024, bias=False).cuda()
            MODEL(torch.ones(1, 1024, device="cuda")).sum().backward()
        """,
        (
            "gradient of a 1024x1024 float32",
            "'weight' of Linear",
            "global 'MODEL' of leaks",
        ),
    ),
    "gradient of a parameter that is on a list": Leak(
        """
        PARAMETERS = []
        def leak():
            weight = big().requires_grad_()
            (weight * 2).sum().backward()
            PARAMETERS.append(weight)
        """,
        ("gradient of a 1048576 float32", "a list of 1", "global 'PARAMETERS'"),
    ),
    "state of an optimizer": Leak(
        """
        def leak():
            global OPTIMIZER
            weight = big().requires_grad_()
            OPTIMIZER = torch.optim.Adam([weight])
            (weight * 2).sum().backward()
            OPTIMIZER.step()
        """,
        ("attribute 'state' of a Adam", "global 'OPTIMIZER' of leaks"),
    ),
    "saved for backward": Leak(
        """
        LOSSES = []
        def leak():
            weight = torch.ones(1, device="cuda", requires_grad=True)
            LOSSES.append((big() * weight).sum())
        """,
        (
            "saved for backward, graph of a gradient-tracked scalar float32",
            "a list of 1",
            "global 'LOSSES'",
        ),
    ),
    "saved by a function of one's own": Leak(
        """
        class Double(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.kept = x * 2
                return x.sum()
            @staticmethod
            def backward(ctx, grad):
                return None

        def leak():
            global LOSS
            LOSS = Double.apply(big().requires_grad_())
        """,
        ("graph of a gradient-tracked scalar float32", "global 'LOSS' of leaks"),
    ),
    "leaf of a graph": Leak(
        """
        LOSSES = []
        def leak():
            LOSSES.append((big().requires_grad_() + 1).sum())
        """,
        (
            "saved for backward, graph of a gradient-tracked scalar float32",
            "global 'LOSSES' of leaks",
        ),
    ),
    "hook of a tensor": Leak(
        """
        def leak():
            global SMALL
            SMALL = torch.ones(1, requires_grad=True)
            large = big()
            SMALL.register_hook(lambda grad: grad * large[0].cpu())
        """,
        ("a closure", "global 'SMALL' of leaks"),
    ),
    "hook of a module": Leak(
        """
        MODEL = torch.nn.Linear(1, 1)
        SEEN = []
        def leak():
            MODEL.register_forward_hook(lambda *_: big_one)
            big_one = big()
        """,
        (
            "a closure",
            "attribute '_forward_hooks' of a Linear",
            "global 'MODEL' of leaks",
        ),
    ),
    "closure": Leak(
        """
        def leak():
            global later
            large = big()
            def later():
                return large
        """,
        ("a closure", "function later", "global 'later' of leaks"),
    ),
    "default argument": Leak(
        """
        def leak():
            global later
            def later(large=big()):
                return large
        """,
        ("a default argument of function later", "global 'later'"),
    ),
    "default argument by keyword": Leak(
        """
        def leak():
            global later
            def later(*, large=big()):
                return large
        """,
        ("entry 'large'", "a default argument of function", "global 'later'"),
    ),
    "attribute of a function": Leak(
        """
        def leak():
            leak.kept = big()
        """,
        ("attribute 'kept' of function leak", "global 'leak' of leaks"),
    ),
    "class attribute": Leak(
        """
        class Model:
            shared = None
        def leak():
            Model.shared = big()
        """,
        ("attribute 'shared' of class Model", "global 'Model' of leaks"),
    ),
    "slot": Leak(
        """
        class Point:
            __slots__ = ("where",)
        def leak():
            global POINT
            POINT = Point()
            POINT.where = big()
        """,
        ("attribute 'where' of a Point", "global 'POINT' of leaks"),
    ),
    "dataclass with slots": Leak(
        """
        from dataclasses import dataclass
        @dataclass(slots=True)
        class Batch:
            inputs: object
        def leak():
            global BATCH
            BATCH = Batch(big())
        """,
        ("attribute 'inputs' of a Batch", "global 'BATCH' of leaks"),
    ),
    "cached property": Leak(
        """
        from functools import cached_property
        class Model:
            @cached_property
            def weights(self):
                return big()
        def leak():
            global MODEL
            MODEL = Model()
            MODEL.weights
        """,
        ("attribute 'weights' of a Model", "global 'MODEL' of leaks"),
    ),
    "lru_cache": Leak(
        """
        from functools import lru_cache
        @lru_cache
        def load(name):
            return big()
        def leak():
            load("a")
        """,
        ("the cache of function load", "global 'load' of leaks"),
    ),
    "lru_cache of a method": Leak(
        """
        from functools import lru_cache
        class Model:
            def __init__(self):
                self.weights = big()
            @lru_cache
            def compute(self):
                return 1
        def leak():
            Model().compute()
        """,
        ("a Model", "the cache of function Model.compute", "class Model"),
    ),
    "partial": Leak(
        """
        from functools import partial
        def leak():
            global STEP
            STEP = partial(print, big())
        """,
        ("an argument of functools.partial(print)", "global 'STEP' of leaks"),
    ),
    "bound method": Leak(
        """
        def leak():
            global ADD
            ADD = big().add
        """,
        ("method 'add'", "global 'ADD' of leaks"),
    ),
    "generator": Leak(
        """
        def batches():
            large = big()
            yield 1
            yield large
        def leak():
            global BATCHES
            BATCHES = batches()
            next(BATCHES)
        """,
        (*suspended("batches"), "global 'BATCHES' of leaks"),
    ),
    "coroutine": Leak(
        """
        class Wait:
            def __await__(self):
                yield
        async def serve():
            large = big()
            await Wait()
            return large
        def leak():
            global SERVING
            SERVING = serve()
            SERVING.send(None)
        def undo():
            SERVING.close()
        """,
        (*suspended("serve"), "global 'SERVING' of leaks"),
    ),
    "asynchronous generator": Leak(
        """
        async def batches():
            large = big()
            yield 1
            yield large
        def leak():
            global BATCHES
            BATCHES = batches()
            try:
                BATCHES.__anext__().send(None)
            except StopIteration:
                pass
        """,
        (*suspended("batches"), "global 'BATCHES' of leaks"),
    ),
    "thread": Leak(
        """
        import threading
        END = threading.Event()
        READY = threading.Event()
        def work():
            large = big()
            READY.set()
            END.wait()
            del large
        def leak():
            global THREAD
            THREAD = threading.Thread(target=work, name="loader")
            THREAD.start()
            READY.wait()
        def undo():
            END.set()
            THREAD.join()
        """,
        ("local 'large' of running work (",),
    ),
    "thread that keeps a list": Leak(
        """
        import threading
        END = threading.Event()
        READY = threading.Event()
        def work():
            batches = [big()]
            READY.set()
            END.wait()
        def leak():
            global THREAD
            THREAD = threading.Thread(target=work)
            THREAD.start()
            READY.wait()
        def undo():
            END.set()
            THREAD.join()
        """,
        ("a list of 1", "local 'batches' of running work ("),
    ),
    "arguments of a thread that has not begun": Leak(
        """
        import threading
        def leak():
            global THREAD
            THREAD = threading.Thread(target=print, args=(big(),), name="later")
        """,
        ("thread 'later'",),
    ),
    "thread-local": Leak(
        """
        import threading
        LOCAL = threading.local()
        def leak():
            LOCAL.large = big()
        """,
        ("entry 'large'", "a _local", "global 'LOCAL' of leaks"),
    ),
    "context variable": Leak(
        """
        from contextvars import ContextVar
        CURRENT = ContextVar("current")
        def leak():
            global token
            token = CURRENT.set(big())
        def undo():
            CURRENT.reset(token)
        """,
        ("context variable 'current'",),
        is_old=True,
    ),
    "exception": Leak(
        """
        def leak():
            global LAST
            try:
                fail()
            except ValueError as error:
                LAST = error
        def fail():
            large = big()
            raise ValueError("too long")
        """,
        ("local 'large' of fail (", "a traceback", "ValueError('too long')", "'LAST'"),
    ),
    "cause of an exception": Leak(
        """
        def leak():
            global LAST
            try:
                try:
                    fail()
                except ValueError as error:
                    raise KeyError("outer") from error
            except KeyError as error:
                LAST = error
        def fail():
            large = big()
            raise ValueError("inner")
        """,
        ("local 'large' of fail (", "ValueError('inner')", "KeyError(\"'outer'\")"),
    ),
    "log record": Leak(
        """
        import logging
        class Keeps(logging.Handler):
            def emit(self, record):
                RECORDS.append(record)
        RECORDS = []
        LOGGER = logging.Logger("trainer")
        LOGGER.addHandler(Keeps())
        def leak():
            LOGGER.warning("batch of %s", big())
        """,
        ("a log record of logger 'trainer'",),
    ),
    "attribute of a logger": Leak(
        """
        import logging
        def leak():
            logging.getLogger("leaky").last = big()
        def undo():
            del logging.getLogger("leaky").last
        """,
        ("'last'", "Logger"),
        is_old=True,
    ),
    "finalizer": Leak(
        """
        import weakref
        class Owner:
            pass
        OWNER = Owner()
        def leak():
            global FINALIZER
            FINALIZER = weakref.finalize(OWNER, print, big())
        def undo():
            FINALIZER.detach()
        """,
        ("an argument of weakref.finalize(…, print)",),
        is_old=True,
    ),
    "value of a weak dictionary": Leak(
        """
        import weakref
        class Owner:
            pass
        OWNER = Owner()
        BY_OWNER = weakref.WeakKeyDictionary()
        def leak():
            BY_OWNER[OWNER] = big()
        """,
        ("attribute 'data' of a WeakKeyDictionary", "global 'BY_OWNER' of leaks"),
    ),
    "iterator": Leak(
        """
        def leak():
            global LEFT
            LEFT = iter([1, big()])
        """,
        ("a list_iterator", "global 'LEFT' of leaks"),
    ),
    "iterator of a data loader": Leak(
        """
        from torch.utils.data import DataLoader, TensorDataset
        def leak():
            global BATCHES
            BATCHES = iter(DataLoader(TensorDataset(big())))
        """,
        ("'tensors' of a TensorDataset", "global 'BATCHES' of leaks"),
    ),
    "view": Leak(
        """
        def leak():
            global FIRST
            FIRST = big()[:1]
        """,
        ("global 'FIRST' of leaks",),
    ),
    "storage": Leak(
        """
        def leak():
            global STORAGE
            STORAGE = big().untyped_storage()
        """,
        (),
        why_not="no tensor is left: the bytes are a storage's",
    ),
    "attribute of torch": Leak(
        """
        def leak():
            torch.leaked = big()
        def undo():
            del torch.leaked
        """,
        ("global 'leaked' of torch",),
        is_old=True,
    ),
    "last value": Leak(
        """
        import builtins
        def leak():
            builtins._ = big()
        def undo():
            del builtins._
        """,
        ("global '_' of builtins",),
        is_old=True,
    ),
    "signal handler": Leak(
        """
        import signal
        def leak():
            global before
            large = big()
            before = signal.signal(signal.SIGUSR2, lambda *_: large)
        def undo():
            signal.signal(signal.SIGUSR2, before)
        """,
        ("a closure", "the handler of signal SIGUSR2"),
    ),
    "call of a mock": Leak(
        """
        from unittest.mock import Mock
        SEEN = Mock()
        def leak():
            SEEN(big())
        """,
        ("Mock", "global 'SEEN' of leaks"),
    ),
    "cycle": Leak(
        """
        import gc
        class Node:
            pass
        def leak():
            gc.disable()
            node = Node()
            node.itself = node
            node.large = big()
        def undo():
            gc.enable()
        """,
        ("a reference cycle, which only a collection frees", "Node"),
    ),
    "cycle and holders that end nowhere": Leak(
        """
        import atexit, gc
        class Node:
            pass
        def leak():
            gc.disable()
            large = big()
            atexit.register(later, [large])
            node = Node()
            node.itself = node
            node.large = large
            atexit.register(later, [large])
        def later(large):
            pass
        def undo():
            atexit.unregister(later)
            gc.enable()
        """,
        ("a reference cycle, which only a collection frees", "Node"),
    ),
    "registered to be called at the end": Leak(
        """
        import atexit
        def leak():
            atexit.register(later, big())
        def later(large):
            pass
        def undo():
            atexit.unregister(later)
        """,
        (NOBODY,),
        why_not="the interpreter keeps the arguments where the collector sees none",
    ),
}


@pytest.mark.parametrize("name", LEAKS)
def test_the_holder_of_a_leak_is_named(
    name: str, request: pytest.FixtureRequest
) -> None:
    """Or it is known why not; nothing is alive for having been looked for."""
    leak = LEAKS[name]
    if leak.is_old:
        request.getfixturevalue("thawed_heap")
    module = ModuleType(MODULE)
    with simulated_device("T4"):
        device = active_device()
        sys.modules[MODULE] = module
        try:
            before = blocks_on_cards()
            exec(START + textwrap.dedent(leak.code), vars(module))  # noqa: S102  # a test's own
            vars(module)["leak"]()
            if not name.startswith("cycle"):
                gc.collect(1)
            texts = [each.partition("): ")[2] for each in find_holders(device, before)]
        finally:
            del sys.modules[MODULE]
            vars(module).get("undo", lambda: None)()
            vars(module).clear()
            gc.collect(1)
            if torch.cuda.memory_allocated():
                gc.collect()  # a cycle with older objects
            device.empty_cache()
            left = torch.cuda.memory_allocated()

    if not leak.words:
        assert leak.why_not
        assert [] == texts
    else:
        assert any(_has(text, leak.words) for text in texts), texts
        assert leak.why_not or not any(text.startswith(NOBODY) for text in texts), texts
    assert (NOBODY in leak.words or not leak.words) == bool(leak.why_not)
    assert 0 == left


def _has(text: str, words: tuple[str, ...]) -> bool:
    """Tell whether a text has words in their order."""
    place = 0
    for word in words:
        place = text.find(word, place)
        if place < 0:
            return False
        place += len(word)
    return True


def test_the_corpus_is_large_enough() -> None:
    """Thirty leaks at least, and few that cannot be named."""
    unnamed = [name for name, leak in LEAKS.items() if leak.why_not]

    assert len(LEAKS) >= 30
    assert len(unnamed) <= 4
