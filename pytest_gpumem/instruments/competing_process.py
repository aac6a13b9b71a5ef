"""Another process that holds memory of a card, for a block of code."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.allocator.tenant import FixedTenant
from pytest_gpumem.devices.active import active_device
from pytest_gpumem.errors import TenantError
from pytest_gpumem.inheritance import VARIABLE, pass_tenant_on
from pytest_gpumem.sizes import format_size, parse_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.devices import Device

#: How long a real process may take to start, and the driver to take its memory back.
TIMEOUT_S: Final = 60.0

_pids: Final = itertools.count(900_001)

#: What a real tenant runs: it holds as many bytes as each line says.
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


class _Simulated:
    def __init__(self, device: Any, index: int) -> None:
        self.pid: Final = next(_pids)
        self._index: Final = index
        self._card: Final = device.machine.cards[index]
        self._tenant: Final = FixedTenant(self.pid, 0)
        self._card.driver.tenants.append(self._tenant)

    def hold(self, nbytes: int) -> None:
        with self._card.locked():
            self._tenant.nbytes = nbytes
        pass_tenant_on(self._index, self.pid, nbytes)

    def close(self) -> None:
        self.hold(0)
        with self._card.locked(), suppress(ValueError):  # the card was set up anew
            self._card.driver.tenants.remove(self._tenant)


class _Real:
    def __init__(self, device: Device, index: int) -> None:
        self._device, self._index = device, index
        self._free = device.mem_get_info(index)[0]
        environment = {k: v for k, v in os.environ.items() if k != VARIABLE}
        self._process = subprocess.Popen(  # noqa: S603  # our own program
            [sys.executable, "-c", _PROGRAM, str(index)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self.pid = self._process.pid
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        # A process that does not answer is ended, and its answer is empty then.
        patience = threading.Timer(TIMEOUT_S, self._process.kill)
        patience.start()
        try:
            out = self._process.stdout
            answer = out.readline().strip() if out else ""
        finally:
            patience.cancel()
        if answer != "ready":
            raise TenantError(
                "the competing process does not hold that: "
                f"{answer or f'it has ended, or did not answer in {TIMEOUT_S:.0f} s'}"
            )

    def hold(self, nbytes: int) -> None:
        if self._process.stdin is not None:
            with suppress(OSError):  # it has ended, and gives no answer
                self._process.stdin.write(f"{nbytes}\n")
                self._process.stdin.flush()
            self._wait()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        until = time.monotonic() + TIMEOUT_S
        while self._device.mem_get_info(self._index)[0] < self._free:
            if time.monotonic() > until:
                return  # somebody else has taken it
            time.sleep(0.05)


class Tenant:
    """A process that holds memory of a card.

    Attributes:
        pid: What the card calls it; a simulated card's tenant is not a real process.
        nbytes: What it was told to hold.
    """

    def __init__(self, holder: _Simulated | _Real, device: Device, index: int) -> None:
        self._holder = holder
        self._device = device
        self._index = index
        self.pid = holder.pid
        self.nbytes = 0

    def grow(self, size: int | str) -> None:
        """Hold so much more.

        Raises:
            SizeError: The text is not a size.
            TenantError: So much is not free; it holds what it did.
        """
        free, total = self._device.mem_get_info(self._index)
        more = parse_size(size, of=total)
        if more > free:
            raise TenantError(
                f"a competing process that takes {size!r} ({more} bytes) of "
                f"cuda:{self._index}: only {format_size(free)} ({free} bytes) of "
                f"{format_size(total)} are free; take less, or use a larger card"
            )
        self._holder.hold(self.nbytes + more)
        self.nbytes += more

    def leave(self) -> None:
        """Give everything back; it may grow again."""
        self._holder.hold(0)
        self.nbytes = 0


@contextmanager
def competing_process(
    size: int | str, *, device_index: int = 0, device: Device | None = None
) -> Iterator[Tenant]:
    """Let another process hold memory of a card for a block.

    On a real card a process really holds it; its CUDA context comes on top. On a
    simulated one free memory, NVML and the text of an OOM say the same.

    Args:
        size: Bytes, or a text such as ``"6GiB"`` or ``"50%"`` of the card.
        device_index: The card.
        device: Where; None means the active device.

    Yields:
        The tenant, which may grow and leave.

    Raises:
        SizeError: The text is not a size.
        TenantError: So much is not free.
        DeviceUnavailableError: There is no active device.

    Example::

        with competing_process("6GiB") as tenant:
            model = load()
            tenant.leave()
    """
    device = active_device() if device is None else device
    kind = _Simulated if device.kind == "simulated" else _Real
    holder = kind(device, device_index)
    try:
        tenant = Tenant(holder, device, device_index)
        tenant.grow(size)
        yield tenant
    finally:
        holder.close()
