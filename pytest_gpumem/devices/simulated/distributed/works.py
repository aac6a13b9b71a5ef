"""A collective in progress on simulated cards, and the errors that it may raise."""

from __future__ import annotations

import re
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d
from torch.futures import Future, collect_all

from pytest_gpumem.devices.simulated.torch_build import NCCL_VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_VERSION: Final = ".".join(map(str, NCCL_VERSION))
_NO_TIMEOUT: Final = timedelta(0)


def nccl_error(result: str, detail: str, last: str) -> dist.DistBackendError:
    """Return the error of a failed NCCL call.

    Source: ``C10D_NCCL_CHECK`` and ``getNcclErrorDetailStr`` of
    ``torch/csrc/distributed/c10d/NCCLUtils.hpp`` and ``.cpp``.
    """
    return dist.DistBackendError(
        "NCCL error in: torch/csrc/distributed/c10d/NCCLUtils.cpp, "
        f"{result}, NCCL version {_VERSION}\n{detail}\nLast error:\n{last}"
    )


#: The host and the port in a message of gloo about a connection.
_PEER: Final = re.compile(r"\[([^\[\]]+)\]:(\d+)")
_RESET: Final = re.compile(r"(Read|Write) error \[[^\]]+\]:\d+: (.+)")


def remote_error(said: str) -> dist.DistBackendError:
    """Return NCCL's error for another rank that has exited.

    Source of the last line: ``socketProgressOpt`` and ``ncclSocketToString`` of NCCL's
    ``socket.cc``.

    Args:
        said: Gloo's text about the connection.
    """
    found = _PEER.search(said)
    peer = f" {found[1]}<{found[2]}>" if found else ""
    last = f"socketProgress: Connection closed by remote peer{peer}"
    reset = _RESET.search(said)
    if reset:
        way = "recv from" if reset[1] == "Read" else "send to"
        last = f"socketProgressOpt: Call to {way}{peer} failed : {reset[2]}"
    return nccl_error(
        "remote process exited or there was a network error",
        "ncclRemoteError: A call failed possibly due to a network error or a remote "
        "process exiting prematurely.",
        last,
    )


class NcclWork(dist.Work):
    """A collective of an NCCL group.

    Args:
        what: Torch's name of the collective, such as ``ALLREDUCE``.
        rank: This process's rank in the group.
        sequence: The sequence number of the collective in the group.
        timeout: The longest time that the collective may take.
        inner: The works of gloo that send the values.
        finish: The function that this rank calls when these works are complete.
        outputs: The card's tensors that hold the result.
        counts: Numbers of input and output elements, for an error message.
        held: Memory that the collective holds on the card until it is complete.
        explain: Returns why the collective may have failed, or nothing.
        shelf: The tensors that the group keeps alive until a caller has waited.
    """

    def __init__(
        self,
        what: str,
        *,
        rank: int,
        sequence: int,
        timeout: timedelta,
        inner: Sequence[dist.Work],
        finish: Callable[[], None] | None = None,
        outputs: Sequence[torch.Tensor] = (),
        counts: tuple[int, int] = (0, 0),
        held: object = None,
        explain: Callable[[], str] | None = None,
        shelf: list[object] | None = None,
    ) -> None:
        super().__init__()
        milliseconds = timeout // timedelta(milliseconds=1)
        self._what = (
            f"WorkNCCL(SeqNum={sequence}, OpType={what}, NumelIn={counts[0]}, "
            f"NumelOut={counts[1]}, Timeout(ms)={milliseconds})"
        )
        self._rank = rank
        self._timeout = timeout
        self._inner = tuple(inner)
        self._finish = finish
        self._outputs = list(outputs)
        self._held = held
        self._explain = explain
        self._shelf: list[object] = [] if shelf is None else shelf
        self._lock = threading.RLock()  # a callback may run immediately
        #: Held by the waiting thread, because a send or receive can be waited for only once.
        self._waiting = threading.Lock()
        self._began = time.monotonic()
        self._is_done = False
        self._error: BaseException | None = None
        #: Called when a caller has received the result of the work.
        self.released: Callable[[NcclWork], None] | None = None
        self._future: Future[Any] | None = None
        self._waiter: threading.Thread | None = None

    # -- methods that torch calls ---------------------------------------------------

    @property
    def timeout(self) -> timedelta:  # torch 2.15 has it in C++
        """The longest time that the collective may take."""
        return self._timeout

    def wait(self, timeout: timedelta = _NO_TIMEOUT) -> bool:
        """Wait until the values have arrived.

        Raises:
            torch.distributed.DistBackendError: The values did not arrive in time, or
                another rank has exited.
        """
        try:
            self._complete(timeout)
        finally:
            self._release()
            self._shelf.clear()
        return True

    def synchronize(self) -> None:
        """Wait until the values have arrived; on a real card the current stream waits."""
        self.wait()

    block_current_stream = synchronize

    def is_completed(self) -> bool:
        """Return whether the collective has ended, with or without an error."""
        if self.look():
            self._release()
        return self._is_done

    def look(self) -> bool:
        """Return whether the collective has ended, without waiting or releasing the work."""
        if not self._is_done:
            if all(each.is_completed() for each in self._inner):
                self._quietly_complete()
            elif not self._has_futures():
                # A send or receive reports its end only to a caller that waits.
                self._wait_elsewhere()
        return self._is_done

    def is_success(self) -> bool:
        """Return whether the collective has ended without an error."""
        return self.is_completed() and self._error is None

    def exception(self) -> BaseException | None:
        """Return the error of the collective, or None."""
        return self._error

    def result(self) -> list[torch.Tensor]:
        """Return the tensors that hold the result."""
        return self._outputs

    def get_future(self) -> Future[Any]:
        """Return a future for the tensors that hold the result."""
        with self._lock:
            if self._future is None:
                self._future = self._make_future()
            return self._future

    # -- implementation -------------------------------------------------------------

    def _has_futures(self) -> bool:
        return all(_future_of(each) is not None for each in self._inner)

    def _make_future(self) -> Future[Any]:
        if not self._inner:  # there were no values to send
            self._conclude(None)
            empty: Future[Any] = Future()
            empty.set_result(self._outputs)
            return empty
        futures = [_future_of(each) for each in self._inner]
        known = [each for each in futures if each is not None]
        if len(known) == len(futures):
            # A single future needs no combination.
            all_done = known[0] if len(known) == 1 else collect_all(known)
            return all_done.then(self._after)
        done: Future[Any] = Future()
        future = done.then(self._after)
        self._wait_elsewhere(done)
        return future

    def _after(self, done: Future[Any]) -> list[torch.Tensor]:
        """Call ``finish``, in the thread that received the values."""
        try:
            for each in done.value() if _is_of_futures(done) else (done,):
                each.value()
        except RuntimeError as error:
            self._conclude(error)
        else:
            self._conclude(None)
        self._release()
        if self._error is not None:
            raise self._error
        return self._outputs

    def _release(self) -> None:
        released, self.released = self.released, None
        if released is not None:
            released(self)

    def _wait_elsewhere(self, done: Future[Any] | None = None) -> None:
        def wait() -> None:
            self._quietly_complete()
            if done is not None:
                done.set_result([])

        if self._waiter is None or done is not None:
            self._waiter = threading.Thread(target=wait, daemon=True)
            self._waiter.start()

    def _quietly_complete(self) -> None:
        try:
            self._complete()
        except RuntimeError:
            pass  # the error is stored, and raised in ``wait``

    def _complete(self, timeout: timedelta = _NO_TIMEOUT) -> None:
        with self._waiting:
            if not self._is_done:
                self._conclude(self._waited(timeout))
        if self._error is not None:
            raise self._error

    def _waited(self, timeout: timedelta) -> RuntimeError | None:
        try:
            for each in self._inner:
                each.wait(timeout) if timeout else each.wait()
        except RuntimeError as error:
            return error
        return None

    def _conclude(self, failure: RuntimeError | None) -> None:
        with self._lock:
            if self._is_done:
                return
            try:
                if failure is not None:
                    self._error = self._named(str(failure))
                elif self._finish is not None:
                    with torch.no_grad():
                        self._finish()
            finally:
                self._is_done = True
                self._held = self._finish = None

    def _named(self, said: str) -> dist.DistBackendError:
        """Return NCCL's error for an error message of gloo.

        Source: ``WorkNCCL::checkTimeout`` of ``ProcessGroupNCCL.cpp``.
        """
        why = "" if self._explain is None else self._explain()
        if why:
            return dist.DistBackendError(why)
        if "timed out" not in said.lower():
            return remote_error(said)
        spent = round((time.monotonic() - self._began) * 1000)
        return dist.DistBackendError(
            f"[Rank {self._rank}] Watchdog caught collective operation timeout: "
            f"{self._what} ran for {spent} milliseconds before timing out. "
            "A rank of the group did not call the same collective: it may have met an "
            "error, such as an out-of-memory, and gone another way."
        )


def _future_of(work: dist.Work) -> Future[Any] | None:
    """Return a work's future; None for a send or receive, which has none."""
    try:
        return work.get_future()
    except RuntimeError:
        return None


def _is_of_futures(done: Future[Any]) -> bool:
    found = done.value()
    return isinstance(found, list) and any(isinstance(each, Future) for each in found)


def idle_work() -> dist.Work:
    """Return a completed work, for use in a group of works."""
    future: Future[list[torch.Tensor]] = Future()
    future.set_result([])
    work: dist.Work = vars(c10d)["_create_work_from_future"](future)
    return work
