"""A real tenant is a process of its own: here with a stand-in for its torch and card."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpumem.errors import TenantError
from pytest_gpumem.inheritance import CHILDREN_VARIABLE
from pytest_gpumem.instruments import competing_process as tenants
from pytest_gpumem.instruments.competing_process import competing_process

if TYPE_CHECKING:
    from pathlib import Path

MIB = 2**20
TOTAL = 1000 * MIB
CONTEXT = 100 * MIB

#: What the process finds as ``torch``: its bytes stand in a file beside the module.
TORCH = """
import os
import pathlib

uint8 = None
card = pathlib.Path(__file__).with_name("card")
room = int(os.environ.get("ROOM", "10000000000"))
held = 0


class OutOfMemoryError(RuntimeError):
    pass


def device(kind, index):
    assert (kind, index) == ("cuda", 1)
    return index


def note(more):
    global held
    held += more
    new = card.with_name("new")
    new.write_text(f"{os.getpid()} {held}")
    new.replace(card)


class cuda:
    @staticmethod
    def mem_get_info(index):
        if "PYTEST_GPUMEM_CHILDREN" in os.environ:
            raise RuntimeError("a run has reached its tenant")
        if os.environ.get("TENANT") == "broken":
            raise RuntimeError("CUDA error: unknown error")
        if os.environ.get("TENANT") == "hangs":
            import time
            time.sleep(600)
        note(100 * 2**20)

    @staticmethod
    def empty_cache():
        pass


class empty:
    def __init__(self, nbytes, dtype, device):
        self.nbytes = 0
        if held + nbytes > room:
            raise OutOfMemoryError("CUDA out of memory.\\nProcess 7 has the rest")
        if os.environ.get("TENANT") == "dies":
            os._exit(3)
        self.nbytes = nbytes
        note(nbytes)

    def numel(self):
        return self.nbytes

    def __del__(self):
        note(-self.nbytes)
"""


class _Card:
    """A card whose driver takes memory back some time after a process has ended."""

    kind = "cuda"

    def __init__(self, file: Path, polls: float = 3) -> None:
        self._file = file
        self._polls = polls
        self.asked: list[int] = []

    def held_bytes(self) -> int:
        """What the tenant holds."""
        if not self._file.exists():
            return 0
        pid, held = map(int, self._file.read_text(encoding="utf-8").split())
        if not _is_alive(pid):
            self._polls -= 1
            return held if self._polls > 0 else 0
        return held

    def mem_get_info(self, index: int) -> tuple[int, int]:
        """Free and total bytes."""
        self.asked.append(index)
        return TOTAL - self.held_bytes(), TOTAL


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Card:
    """A card on which a process with the stand-in holds memory."""
    (tmp_path / "torch.py").write_text(TORCH, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv(CHILDREN_VARIABLE, "what a run gives its children")
    return _Card(tmp_path / "card")


def _compete(card: Any, size: int | str) -> Any:
    return competing_process(size, device_index=1, device=card)


def test_it_holds_grows_leaves_and_grows(card: _Card) -> None:
    """To the byte, its context on top; it is another process, that no run reaches."""
    with _compete(card, "200MiB") as tenant:
        held = [card.held_bytes()]
        tenant.grow(300 * MIB)
        held.append(card.held_bytes())
        tenant.leave()
        held.append(card.held_bytes())
        tenant.grow(1)
        held.append(card.held_bytes())
        alive = _is_alive(tenant.pid)

    assert [300 * MIB, 600 * MIB, CONTEXT, CONTEXT + 1] == held
    assert alive
    assert tenant.pid not in (os.getpid(), os.getppid())
    assert {1} == set(card.asked)


def test_its_end_waits_for_the_driver(card: _Card) -> None:
    """The process is gone, and so is what it held, before the block is left."""
    with _compete(card, "200MiB") as tenant:
        pass
    asked = len(card.asked)

    assert not _is_alive(tenant.pid)
    assert 0 == card.held_bytes()
    assert asked >= 3, "the driver took its time"


def test_memory_that_does_not_come_back_ends_the_wait(
    card: _Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else may have taken it: the test goes on."""
    card._polls = float("inf")
    with _compete(card, "200MiB"):
        monkeypatch.setattr(tenants, "TIMEOUT_S", 0.1)

    assert 300 * MIB == card.held_bytes()


def test_it_goes_with_an_error(card: _Card) -> None:
    """Whatever happens in the block, the process ends."""

    def fail() -> None:
        with _compete(card, "200MiB"):
            assert card.held_bytes()
            raise KeyError

    with pytest.raises(KeyError):
        fail()

    assert 0 == card.held_bytes()


def test_more_than_is_free_is_refused_here(card: _Card) -> None:
    """Before the process is asked; it has its context by then."""
    with (
        pytest.raises(TenantError, match=r"takes '950MiB' .* only 900 MiB"),
        _compete(card, "950MiB"),
    ):
        pass

    assert 0 == card.held_bytes()


def test_an_oom_of_the_process_is_told(
    card: _Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one line; it holds what it did, and may be asked again."""
    monkeypatch.setenv("ROOM", str(500 * MIB))
    with _compete(card, "200MiB") as tenant:
        with pytest.raises(
            TenantError, match=r"CUDA out of memory\. Process 7 has the rest"
        ):
            tenant.grow("300MiB")
        held = card.held_bytes(), tenant.nbytes
        tenant.grow("200MiB")

        assert (300 * MIB, 200 * MIB) == held
        assert 500 * MIB == card.held_bytes()


@pytest.mark.parametrize("kind", ["broken", "dies"])
def test_a_process_that_ends_by_itself_is_told(
    card: _Card, kind: str, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """At its start, or when it is to hold something; its own words are on stderr."""
    monkeypatch.setenv("TENANT", kind)
    with (
        pytest.raises(TenantError, match="it has ended, or did not answer in"),
        _compete(card, "200MiB"),
    ):
        pass

    assert 0 == card.held_bytes()
    assert ("unknown error" in capfd.readouterr().err) == (kind == "broken")


def test_a_process_that_does_not_answer_is_ended(
    card: _Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a while."""
    monkeypatch.setenv("TENANT", "hangs")
    monkeypatch.setattr(tenants, "TIMEOUT_S", 0.3)
    began = time.monotonic()
    with pytest.raises(TenantError, match="did not answer in 0 s"), _compete(card, 1):
        pass

    assert time.monotonic() - began < 60
    assert 0 == card.held_bytes()


def test_a_killed_process_is_told_at_the_next_word(card: _Card) -> None:
    """Somebody's OOM killer may have been there."""
    with _compete(card, "200MiB") as tenant:
        os.kill(tenant.pid, 9)
        with pytest.raises(TenantError, match="it has ended"):
            tenant.leave()

    assert 0 == card.held_bytes()


@pytest.mark.gpu
def test_a_real_card_has_a_real_tenant() -> None:
    """Its bytes are gone for this process, and come back."""
    import torch

    free = torch.cuda.mem_get_info()[0]
    with competing_process("1GiB") as tenant:
        held = free - torch.cuda.mem_get_info()[0]
        tenant.leave()
        left = free - torch.cuda.mem_get_info()[0]
    after = torch.cuda.mem_get_info()[0]

    assert held >= 2**30
    assert 0 < left < held
    assert after >= free
