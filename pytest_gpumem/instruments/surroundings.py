"""The state that every run of a sweep starts from: generators, defaults, threads."""

from __future__ import annotations

import gc
import logging
import random
import sys
import threading
import time
from concurrent.futures.thread import _worker
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from pytest_gpumem.devices import allocated_bytes
from pytest_gpumem.devices.default_device import clear_default_device
from pytest_gpumem.stacks import clear_exception, clear_frame, frames_from

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from pytest_gpumem.devices import Device

#: The code of a pool's threads; it is their innermost frame while they wait for work.
_POOL_WORKER: Final = _worker.__code__
_LOOK_S: Final = 0.01


class RandomState:
    """The state of all random generators that a run may use."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._torch = torch.get_rng_state()
        self._cards = torch.cuda.get_rng_state_all()
        numpy: Any = sys.modules.get("numpy")
        self._numpy = None if numpy is None else numpy.random.get_state()

    def restore(self) -> None:
        """Restore every generator."""
        random.setstate(self._python)
        torch.set_rng_state(self._torch)
        torch.cuda.set_rng_state_all(self._cards)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)


class _Setting(NamedTuple):
    """A setting of torch for the process or the thread.

    Attributes:
        name: The setting's name, for texts.
        read: Returns the value.
        write: Sets the value.
        counts: Whether the value changes computed numbers.
    """

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], Any]
    counts: bool = True


def _set_default_device(device: torch.device) -> None:
    if device.type == "cpu":
        clear_default_device()
    else:
        torch.set_default_device(device)


#: The tables of hooks that every module calls.
_HOOKS: Final = tuple(
    table
    for name, table in vars(torch.nn.modules.module).items()
    if name.startswith("_global_") and isinstance(table, dict)
)


def _global_hooks() -> frozenset[int]:
    return frozenset(number for table in _HOOKS for number in table)


def _keep_global_hooks(kept: frozenset[int]) -> None:
    for table in _HOOKS:
        for number in table.keys() - kept:
            del table[number]


def _autocast_depth() -> int:
    """Return how many regions of autocast this thread is in.

    torch returns it only when the number changes. At the end of the outermost region
    torch deletes the cached casts of weights.
    """
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return depth


def _set_autocast_depth(depth: int) -> None:
    while _autocast_depth() > depth:
        torch.autocast_decrement_nesting()
    while _autocast_depth() < depth:
        torch.autocast_increment_nesting()
    if not depth:
        torch.clear_autocast_cache()


def _attribute(name: str) -> _Setting:
    """Return the setting that an attribute of torch holds; ``name`` is its path."""
    owner, _, attribute = name.rpartition(".")
    of = attrgetter(owner.removeprefix("torch."))
    return _Setting(
        name,
        lambda: getattr(of(torch), attribute),
        lambda value: _write(of(torch), attribute, value),
    )


def _has(name: str) -> bool:
    """Tell whether this torch has an attribute of ``torch.backends``; 2.8 lacks some."""
    try:
        attrgetter(name)(torch.backends)
    except AttributeError:
        return False
    except RuntimeError:
        pass  # torch raises if the old and the new name have different values
    return True


def _write(owner: Any, attribute: str, value: Any) -> None:
    """Set an attribute of torch, also after a call of ``disable_global_flags``.

    torch's own test utilities call this function when they are imported, for the whole
    process.
    """
    allowing = getattr(torch.backends, "__allow_nonbracketed_mutation", nullcontext)
    with allowing():
        setattr(owner, attribute, value)


_SETTINGS: Final = (
    _Setting("the default dtype", torch.get_default_dtype, torch.set_default_dtype),
    _Setting("the default device", torch.get_default_device, _set_default_device),
    _Setting("grad mode", torch.is_grad_enabled, torch.set_grad_enabled),
    *(
        _Setting(
            f"autocast of {kind}",
            partial(torch.is_autocast_enabled, kind),
            partial(torch.set_autocast_enabled, kind),
        )
        for kind in ("cuda", "cpu")
    ),
    _Setting(
        "autocast's cache",
        torch.is_autocast_cache_enabled,
        torch.set_autocast_cache_enabled,
        counts=False,
    ),
    _Setting("regions of autocast", _autocast_depth, _set_autocast_depth, counts=False),
    _Setting(
        "the debug mode of deterministic algorithms",
        torch.get_deterministic_debug_mode,
        torch.set_deterministic_debug_mode,
    ),
    _Setting("the set of global module hooks", _global_hooks, _keep_global_hooks),
    # torch has an older and a newer name for each precision. The older one also sets the
    # newer one, so it comes first.
    _Setting(
        "the precision of float32 products",
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    *(
        _attribute(f"torch.backends.{name}")
        for name in (
            "cuda.matmul.fp32_precision",
            "cudnn.allow_tf32",
            "cudnn.conv.fp32_precision",
            "cudnn.rnn.fp32_precision",
        )
        if _has(name)
    ),
    *(
        _attribute(f"torch.backends.cudnn.{name}")._replace(counts=False)
        for name in ("enabled", "benchmark", "deterministic")
    ),
    _Setting("threads", torch.get_num_threads, torch.set_num_threads, counts=False),
    _Setting(
        "the card", torch.cuda.current_device, torch.cuda.set_device, counts=False
    ),
    _Setting(
        "the stream", torch.cuda.current_stream, torch.cuda.set_stream, counts=False
    ),
)


class Defaults:
    """The settings of torch that a failed run may leave changed."""

    def __init__(self) -> None:
        self._values = [_read(each) for each in _SETTINGS]

    def restore(self) -> None:
        """Restore the settings that were changed."""
        for setting, value in zip(_SETTINGS, self._values, strict=True):
            if value is not None and _read(setting) != value:
                setting.write(value)

    def changed(self) -> frozenset[str]:
        """Return the changed settings that change computed numbers, in words."""
        return frozenset(
            f"{setting.name} is {now}, and was {value}"
            for setting, value in zip(_SETTINGS, self._values, strict=True)
            if setting.counts and (now := _read(setting)) != value
        )


def _read(setting: _Setting) -> Any:
    """Return a setting's value; None if its old and its new name have different values."""
    try:
        return setting.read()
    except RuntimeError:
        return None


def wait_for_threads(before: Collection[threading.Thread], patience_s: float) -> None:
    """Wait until each new thread has ended, or is an idle thread of a pool."""
    end_s = time.monotonic() + patience_s
    while time.monotonic() <= end_s:
        working = (
            thread
            for thread in threading.enumerate()
            if thread not in before and not _waits_for_work(thread)
        )
        first = next(working, None)
        if first is None:
            return
        first.join(_LOOK_S)


def _waits_for_work(thread: threading.Thread) -> bool:
    """Tell whether a thread is an idle thread of a pool."""
    frame = sys._current_frames().get(thread.ident or 0)  # noqa: SLF001  # the documented way to see other threads
    return frame is None or frame.f_code is _POOL_WORKER


@contextmanager
def frozen_heap() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Exclude existing objects from garbage collections for a block.

    This makes collections fast. If the program has frozen its heap itself, nothing is
    changed.

    Yields:
        A function that returns a block in which these objects are included again.
    """
    gc.collect()
    if gc.get_freeze_count():
        yield nullcontext
        return

    @contextmanager
    def thawed() -> Iterator[None]:
        gc.unfreeze()
        try:
            yield
        finally:
            gc.freeze()

    gc.freeze()
    try:
        yield thawed
    finally:
        gc.unfreeze()


def num_ooms(device: Device) -> int:
    """Return how often an allocation failed so far, over all cards."""
    return sum(
        device.memory_stats(index).get("num_ooms", 0)
        for index in range(device.device_count)
    )


def settle(device: Device, start_bytes: int) -> tuple[int, int]:
    """Collect garbage and empty the caches.

    Returns:
        The bytes that are allocated in addition to those at the start, and the bytes that
        only captured log records held.
    """
    left = remaining = _collected(device) - start_bytes
    if left > 0:
        release_log_records()
        remaining = _collected(device) - start_bytes
    return remaining, left - remaining


def _collected(device: Device) -> int:
    gc.collect()
    device.empty_cache()
    return allocated_bytes(device)


def release_log_records() -> None:
    """Clear the frames of the exceptions in records that a handler has kept.

    pytest's log capture keeps every record until the test's teardown. A record of
    ``logger.exception`` holds the error, its frames and the tensors in these frames. The
    texts of the records stay.
    """
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):
            for record in _kept(handler):
                error = record.exc_info[1] if record.exc_info else None
                if error is None:
                    continue
                clear_exception(error)
                # The callers of the traceback's first frame.
                if error.__traceback__ is not None:
                    for frame in frames_from(error.__traceback__.tb_frame.f_back):
                        clear_frame(frame)


def _kept(handler: logging.Handler) -> list[logging.LogRecord]:
    records = getattr(handler, "records", None) or getattr(handler, "buffer", None)
    if not isinstance(records, list):
        return []
    return [each for each in records if isinstance(each, logging.LogRecord)]
