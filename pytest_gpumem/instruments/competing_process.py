"""Another process that holds memory of a card, for a block of code."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.allocator.tenant import FixedTenant
from pytest_gpumem.devices.active import active_device
from pytest_gpumem.errors import TenantError
from pytest_gpumem.inheritance import CHILDREN_VARIABLE, pass_tenant_on
from pytest_gpumem.sizes import format_size, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_gpumem.devices import Device

#: The most time that a real process may take to start, and that the driver may take to
#: free its memory.
TIMEOUT_S: Final = 60.0

_pids: Final = itertools.count(900_001)

#: The program of a real process. Each line of its input is the bytes to hold from then on.
_PROGRAM: Final = """
import sys, torch
held = []
card = torch.device("cuda", int(sys.argv[1]))
torch.cuda.mem_get_info(card)
print("ready", flush=True)
for line in sys.stdin:
    wanted = int(line)
    try:
        if not wanted:
            held.clear()
            torch.cuda.empty_cache()
        while (more := wanted - sum(each.numel() for each in held)) > 0:
            held.append(torch.empty(more, dtype=torch.uint8, device=card))
        print("ready", flush=True)
    except torch.OutOfMemoryError as error:
        print(str(error).replace(chr(10), " "), flush=True)
"""


@contextmanager
def _simulated(device: Any, index: int) -> Iterator[tuple[int, Callable[[int], None]]]:
    """Yield a process's id, and a function that sets the bytes that it holds."""
    card, tenant = device.machine.cards[index], FixedTenant(next(_pids), 0)

    def hold(nbytes: int) -> None:
        with card.locked():
            tenant.nbytes = nbytes
        pass_tenant_on(index, tenant.pid, nbytes)

    card.driver.tenants.append(tenant)
    try:
        yield tenant.pid, hold
    finally:
        hold(0)
        # If the card was set up again, the process is no longer on it.
        with card.locked(), suppress(ValueError):
            card.driver.tenants.remove(tenant)


@contextmanager
def _real(device: Device, index: int) -> Iterator[tuple[int, Callable[[int], None]]]:
    """Yield the id of a real process, and a function that sets the bytes that it holds."""
    free_before = device.mem_get_info(index)[0]
    environment = {k: v for k, v in os.environ.items() if k != CHILDREN_VARIABLE}
    process = subprocess.Popen(  # noqa: S603  # our own program
        [sys.executable, "-c", _PROGRAM, str(index)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )

    def hold(nbytes: int) -> None:
        if process.stdin is not None:
            with suppress(OSError):  # the process has ended
                process.stdin.write(f"{nbytes}\n")
                process.stdin.flush()
            _wait_for(process)

    try:
        _wait_for(process)
        yield process.pid, hold
    finally:
        process.kill()
        process.communicate()
        until = time.monotonic() + TIMEOUT_S
        while device.mem_get_info(index)[0] < free_before:
            if time.monotonic() > until:
                break  # another process has taken the memory
            time.sleep(0.05)


def _wait_for(process: subprocess.Popen[str]) -> None:
    # If the process does not answer, it is killed, and the answer is empty.
    patience = threading.Timer(TIMEOUT_S, process.kill)
    patience.start()
    try:
        answer = process.stdout.readline().strip() if process.stdout else ""
    finally:
        patience.cancel()
    if answer != "ready":
        raise TenantError(
            "the competing process does not hold that: "
            f"{answer or f'it has ended, or did not answer in {TIMEOUT_S:.0f} s'}"
        )


@dataclass(slots=True)
class Tenant:
    """A process that holds memory of a card.

    Attributes:
        pid: The process id that the card reports; on a simulated card no real process
            has it.
        nbytes: The bytes that it was told to hold.
    """

    pid: int
    _hold: Callable[[int], None]
    _device: Device
    _index: int
    nbytes: int = 0

    def grow(self, size: int | str) -> None:
        """Hold ``size`` more bytes.

        Raises:
            SizeError: The text is not a size.
            TenantError: Fewer bytes are free; the process holds as many as before.
        """
        free, total = self._device.mem_get_info(self._index)
        more = parse_size(size, of=total)
        if more > free:
            raise TenantError(
                f"a competing process that takes {size!r} ({more} bytes) of "
                f"cuda:{self._index}: only {format_size(free)} ({free} bytes) of "
                f"{format_size(total)} are free; take less, or use a larger card"
            )
        self._hold(self.nbytes + more)
        self.nbytes += more

    def leave(self) -> None:
        """Free all bytes; the process may grow again."""
        self._hold(0)
        self.nbytes = 0


@contextmanager
def competing_process(
    size: int | str, *, device_index: int = 0, device: Device | None = None
) -> Iterator[Tenant]:
    """Let another process hold memory of a card for a block.

    On a real card a real process is started, and its CUDA context takes further bytes. On
    a simulated card free memory, NVML and the text of an OOM all count the bytes.

    Args:
        size: Bytes, or a text such as ``"6GiB"`` or ``"50%"`` of the card.
        device_index: The card.
        device: The device; None means the active device.

    Yields:
        The tenant, which may grow and leave.

    Raises:
        SizeError: The text is not a size.
        TenantError: Fewer bytes are free.
        DeviceUnavailableError: There is no active device.

    Example::

        with competing_process("6GiB") as tenant:
            model = load()
            tenant.leave()
    """
    device = active_device() if device is None else device
    process = _simulated if device.kind == "simulated" else _real
    with process(device, device_index) as (pid, hold):
        tenant = Tenant(pid, hold, device, device_index)
        tenant.grow(size)
        yield tenant
