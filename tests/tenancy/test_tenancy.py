"""Who holds what of a card, across processes, and who waits."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpumem.allocator.driver import Driver
from pytest_gpumem.errors import AdmissionTimeoutError, BudgetError
from pytest_gpumem.tenancy.entries import Folder
from pytest_gpumem.tenancy.ledger import Ledger
from pytest_gpumem.tenancy.load_lock import gpu_load_lock, physical_card
from pytest_gpumem.tenancy.queue import (
    PATIENCE_ALONE_S,
    PATIENCE_S,
    QueuedRequest,
    admissible,
)
from pytest_gpumem.tenancy.shared_card import SharedCard

if TYPE_CHECKING:
    from pathlib import Path

HOLDER = """
import sys, time
from pytest_gpumem.tenancy.ledger import Ledger
with Ledger(sys.argv[1], 16).admitted(12):
    print("held", flush=True)
    time.sleep(60)
"""

LOADER = """
import sys, time
from contextlib import nullcontext
from pytest_gpumem.allocator.driver import Driver
from pytest_gpumem.tenancy.load_lock import gpu_load_lock
from pytest_gpumem.tenancy.shared_card import SharedCard
folder, is_locked = sys.argv[1], sys.argv[2] == "locked"
driver = Driver(10)
driver.tenants.append(SharedCard(folder + "/card"))
print("ready", flush=True)
sys.stdin.readline()
with gpu_load_lock(folder=folder) if is_locked else nullcontext():
    weights, scratch = driver.malloc(4), None
    time.sleep(0.5)  # both have their weights by now, where nothing keeps one back
    scratch = driver.malloc(2)
    print("OOM" if weights is None or scratch is None else "loaded", flush=True)
    time.sleep(0.5)  # both have asked by now
    if scratch is not None:
        driver.free(scratch)
sys.stdin.readline()
"""


def _start(source: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", source, *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_killed_process_gives_its_share_back(tmp_path: Path) -> None:
    """Nobody has to clean up after SIGKILL."""
    ledger = Ledger(tmp_path, 16)
    with _start(HOLDER, tmp_path) as holder:
        assert "held" == _line(holder)
        assert 12 == ledger.held_bytes
        waits: list[int] = []
        with (
            pytest.raises(
                AdmissionTimeoutError, match=f"12 are held by process.* {holder.pid};"
            ),
            ledger.admitted(8, timeout_s=0.1, on_wait=waits.append),
        ):
            pass
        assert [12] == waits
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        with ledger.admitted(16, timeout_s=5):
            assert 16 == ledger.held_bytes
    assert {} == ledger.requests()


def test_a_forked_child_holds_nothing_of_its_parents(tmp_path: Path) -> None:
    """A child that outlives its parent must not keep the parent's share."""
    ledger = Ledger(tmp_path, 16)
    source = (
        "import os, sys, time\n"
        "from pytest_gpumem.tenancy.ledger import Ledger\n"
        "with Ledger(sys.argv[1], 16).admitted(12):\n"
        "    pid = os.fork()\n"
        "    if not pid:\n"
        "        time.sleep(60)\n"
        "    print(pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with _start(source, tmp_path) as holder:
        child = int(_line(holder))
        try:
            os.kill(holder.pid, signal.SIGKILL)
            holder.wait()
            time.sleep(0.1)
            assert 0 == ledger.held_bytes
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize(
    "text", ["", "[]", "1", "[" * 9999, "\udcff", '{"nbytes": 1}', '{"new": 1}']
)
def test_an_entry_that_says_nothing_is_passed_over(tmp_path: Path, text: str) -> None:
    """Its process was killed as it wrote, or is of another version."""
    entry = Folder(tmp_path).add({})
    entry.path.write_bytes(text.encode("utf-8", "surrogateescape"))
    ledger = Ledger(tmp_path, 16)

    assert {} == ledger.requests()
    with ledger.admitted(16, timeout_s=0):
        assert 16 == ledger.held_bytes
    entry.close()


def test_more_than_the_card_is_refused_at_once(tmp_path: Path) -> None:
    """Waiting would never end."""
    with (
        pytest.raises(BudgetError, match="accepted are 0 to 16"),
        Ledger(tmp_path, 16).admitted(17),
    ):
        pass


def test_the_order_of_admission() -> None:
    """Exclusive, then large, then who came first; what fits passes what does not."""
    requests = [
        QueuedRequest("small", 2, since=0),
        QueuedRequest("late", 4, since=2),
        QueuedRequest("early", 4, since=1),
        QueuedRequest("large", 12, since=3),
    ]

    assert ["large", "early"] == admissible(requests, total_bytes=16, now=4)
    held = QueuedRequest("held", 5, since=0, is_admitted=True)
    assert ["early", "late", "small"] == admissible(
        [held, *requests], total_bytes=16, now=4
    )
    alone = QueuedRequest("alone", 0, since=3, is_exclusive=True)
    assert ["alone"] == admissible([*requests, alone], total_bytes=16, now=4)


def test_what_stands_is_part_of_what_is_admitted(tmp_path: Path) -> None:
    """A model that a fixture holds is not asked for twice, and hinders nobody alone."""
    mine, other = Ledger(tmp_path, 16), Ledger(tmp_path, 16)
    mine.hold_idle(6)
    with mine.admitted(8, timeout_s=0):
        assert 8 == mine.held_bytes
        with other.admitted(8, timeout_s=0):
            pass
    with pytest.raises(AdmissionTimeoutError), other.admitted(11, timeout_s=0):
        pass
    with other.admitted(0, is_exclusive=True, timeout_s=0):
        pass
    mine.hold_idle(0)
    with other.admitted(16, timeout_s=0):
        pass


def test_a_share_is_less_by_what_stands_of_others(tmp_path: Path) -> None:
    """A context stays until its process ends: waiting for its bytes would last as long."""
    mine, other = Ledger(tmp_path, 100), Ledger(tmp_path, 100)
    mine.hold_idle(5)
    other.hold_idle(7)

    with mine.admitted(100, is_share=True, timeout_s=0.1):
        held = mine.held_bytes
    with (
        pytest.raises(AdmissionTimeoutError, match="for 100 bytes of a card of 100"),
        mine.admitted(100, timeout_s=0.0),
    ):
        pass

    assert 100 == held


def test_who_wants_the_card_alone_waits_less_patiently() -> None:
    """It needs everybody to have ended, so nobody new begins."""
    held = QueuedRequest("held", 5, since=0, is_admitted=True)
    alone = QueuedRequest("alone", 0, since=0, is_exclusive=True)
    new = QueuedRequest("new", 1, since=PATIENCE_ALONE_S)
    requests = [held, alone, new]

    assert ["new"] == admissible(requests, total_bytes=16, now=PATIENCE_ALONE_S / 2)
    assert [] == admissible(requests, total_bytes=16, now=PATIENCE_ALONE_S)


def test_who_has_waited_long_is_not_passed() -> None:
    """No starvation: later small requests wait behind an old large one."""
    held = QueuedRequest("held", 5, since=0, is_admitted=True)
    old = QueuedRequest("old", 12, since=0)
    new = QueuedRequest("new", 1, since=PATIENCE_S)

    assert ["new"] == admissible([held, old, new], total_bytes=16, now=PATIENCE_S - 1)
    assert [] == admissible([held, old, new], total_bytes=16, now=PATIENCE_S)
    assert ["old", "new"] == admissible([old, new], total_bytes=16, now=PATIENCE_S)
    small = QueuedRequest("small", 1, since=1)
    alone = QueuedRequest("alone", 0, since=5, is_exclusive=True)
    assert ["small"] == admissible([alone, small], total_bytes=16, now=PATIENCE_S + 1)


@given(
    st.lists(
        st.tuples(st.integers(0, 16), st.floats(0, 30), st.booleans()),
        max_size=12,
    )
)
def test_every_request_is_served_and_the_card_never_overbooked(
    requests: list[tuple[int, float, bool]],
) -> None:
    """Whatever waits: admitting and finishing in turn serves everybody."""
    waiting = {
        str(number): QueuedRequest(str(number), *request)
        for number, request in enumerate(requests)
    }
    held: dict[str, QueuedRequest] = {}
    while waiting or held:
        names = admissible(
            [*waiting.values(), *held.values()], total_bytes=16, now=30.0
        )
        assert names or held
        for name in names:
            request = waiting.pop(name)
            held[name] = QueuedRequest(
                name,
                request.nbytes,
                request.since,
                request.is_exclusive,
                is_admitted=True,
            )
        assert sum(each.nbytes for each in held.values()) <= 16
        if any(each.is_exclusive for each in held.values()):
            assert 1 == len(held)
        if held:
            held.pop(next(iter(held)))


def test_processes_on_one_card_see_one_anothers_bytes(tmp_path: Path) -> None:
    """Two drivers over one folder are one card; what one gives, the other has."""
    first, second = Driver(10), Driver(10)
    for driver in (first, second):
        driver.tenants.append(SharedCard(tmp_path))

    address = first.malloc(7)
    assert 3 == second.free_bytes
    assert [(os.getpid(), 7)] == second.other_processes()
    assert second.malloc(4) is None
    assert address is not None
    first.free(address)
    assert second.malloc(4) is not None
    assert 6 == first.free_bytes


@pytest.mark.parametrize(
    ("mode", "ends"), [("free", ["OOM"]), ("locked", ["loaded", "loaded"])]
)
def test_two_loads_at_once(tmp_path: Path, mode: str, ends: list[str]) -> None:
    """Two models fit a card; the scratch of both loads does not, unless in turn."""
    with _start(LOADER, tmp_path, mode) as one, _start(LOADER, tmp_path, mode) as two:
        loaders = (one, two)
        assert ["ready", "ready"] == [_line(each) for each in loaders]
        for each in loaders:
            assert each.stdin is not None
            each.stdin.write("go\n")
            each.stdin.flush()
        results = [_line(each) for each in loaders]
    if mode == "free":
        assert ends[0] in results
    else:
        assert ends == results


def test_the_load_lock_times_out_with_a_word(tmp_path: Path) -> None:
    """A process that hangs is told of."""
    source = (
        "import sys, time\n"
        "from pytest_gpumem import gpu_load_lock\n"
        "with gpu_load_lock(folder=sys.argv[1]):\n"
        "    print('in', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with _start(source, tmp_path) as holder:
        assert "in" == _line(holder)
        with (
            pytest.raises(TimeoutError, match=r"over 0\.1 s"),
            gpu_load_lock(folder=tmp_path, timeout_s=0.1),
        ):
            pass
        holder.kill()
        holder.wait()
        with gpu_load_lock(folder=tmp_path, timeout_s=5):
            pass


def test_a_child_forked_in_a_load_does_not_keep_the_lock(tmp_path: Path) -> None:
    """DataLoader workers that a load starts live on after it."""
    source = (
        "import os, sys, time\n"
        "from pytest_gpumem import gpu_load_lock\n"
        "with gpu_load_lock(folder=sys.argv[1]):\n"
        "    pid = os.fork()\n"
        "    if not pid:\n"
        "        time.sleep(60)\n"
        "print(pid, flush=True)\n"
        "sys.stdin.readline()\n"
    )
    with _start(source, tmp_path) as holder:
        child = int(_line(holder))
        try:
            time.sleep(0.1)
            with gpu_load_lock(folder=tmp_path, timeout_s=2):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def _another_enters(folder: Path) -> bool:
    source = (
        "import sys\n"
        "from pytest_gpumem import gpu_load_lock\n"
        "with gpu_load_lock(folder=sys.argv[1], timeout_s=0.05):\n"
        "    print('in', flush=True)\n"
    )
    command = [sys.executable, "-c", source, str(folder)]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert run.returncode == 0 or "TimeoutError" in run.stderr
    return run.stdout == "in\n"


def test_a_load_within_a_load_has_the_lock_already(tmp_path: Path) -> None:
    """A pipeline holds it, and so does each of its parts; others wait for the whole."""

    def enters() -> bool:
        with suppress(TimeoutError), gpu_load_lock(folder=tmp_path, timeout_s=0.05):
            return True
        return False

    with ThreadPoolExecutor(1) as pool:
        with gpu_load_lock(folder=tmp_path, timeout_s=5):
            assert enters()
            assert not pool.submit(enters).result(timeout=5)
            assert not _another_enters(tmp_path)
        assert pool.submit(enters).result(timeout=5)
        assert _another_enters(tmp_path)


def test_the_load_lock_outlives_what_cleans_temporary_folders(tmp_path: Path) -> None:
    """A service runs for weeks."""
    folder = tmp_path / "shared"
    for _ in range(2):
        with gpu_load_lock(folder=folder, timeout_s=5):
            pass
        shutil.rmtree(folder)


def test_threads_of_a_load_may_use_the_card(tmp_path: Path) -> None:
    """A loader's thread pool allocates while the main thread holds the lock."""
    driver = Driver(10)
    driver.tenants.append(SharedCard(tmp_path / "card"))
    with ThreadPoolExecutor(1) as pool, gpu_load_lock(folder=tmp_path, timeout_s=5):
        address = pool.submit(driver.malloc, 4).result(timeout=5)

    assert address is not None


def test_cards_are_named_as_the_machine_names_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two processes that number one card differently share its lock."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "1" == physical_card(1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, MIG-GPU-1/2/0,GPU-abc")
    assert ["3", "MIG-GPU-1/2/0", "GPU-abc"] == [physical_card(i) for i in range(3)]
    with pytest.raises(ValueError, match=r"shows 3 card\(s\)"):
        physical_card(3)
