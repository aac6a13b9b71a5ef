"""Storages on a card: made there, typed or not, and taken by tensors of the card."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.multiprocessing import reductions

from pytest_gpumem.devices.simulated.install import simulated_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Makers of typed storages are not in torch's own annotations.
cuda: Any = torch.cuda


@pytest.fixture(autouse=True)
def _card() -> Iterator[None]:
    with simulated_device("T4"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TypedStorage is deprecated")
        yield


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.TypedStorage(3, dtype=torch.float16, device="cuda"),
        lambda: torch.TypedStorage([1, 2, 3], dtype=torch.float16, device="cuda:0"),
        lambda: cuda.HalfStorage(3),
        lambda: cuda.HalfStorage([1, 2, 3]),
    ],
)
def test_a_typed_storage_is_made_on_a_card(make: Callable[[], Any]) -> None:
    """It holds a block there, says its type, and goes with its last reference."""
    storage = make()

    assert "torch.cuda.HalfStorage" == storage.type()
    assert (3, "cuda:0") == (len(storage), str(storage.device))
    assert 512 == torch.cuda.memory_allocated()
    assert isinstance(storage, cuda.HalfStorage)

    del storage

    assert 0 == torch.cuda.memory_allocated()


def test_a_typed_storage_holds_what_it_is_given() -> None:
    """Values are copied to the card, and read from it."""
    storage = cuda.LongStorage([1, 2, 3])

    assert [1, 2, 3] == storage.tolist()
    assert [1, 2, 3] == torch.empty(0, dtype=torch.int64, device="cuda").set_(
        storage
    ).tolist()


@pytest.mark.parametrize(
    ("own", "other"), [("cuda:0", "cpu"), ("cpu", "cuda:0")], ids=["card", "host"]
)
@pytest.mark.parametrize("kind", ["untyped", "typed", "tensor"])
def test_a_tensor_takes_no_storage_of_another_device(
    own: str, other: str, kind: str
) -> None:
    """C++ compares devices, which for it are the same here."""
    source: Any = torch.ones(2, device=other)
    if kind != "tensor":
        source = source.storage() if kind == "typed" else source.untyped_storage()
    with pytest.raises(RuntimeError) as caught:
        torch.empty(0, device=own).set_(source)

    assert (
        f'Attempted to set the storage of a tensor on device "{own}" to a storage on '
        f'different device "{other}".  This is no longer allowed; the devices must match.'
    ) == str(caught.value)


@pytest.mark.parametrize("kind", ["untyped", "typed"])
def test_a_storage_without_values_is_not_copied_to_the_host(kind: str) -> None:
    """A storage on ``meta`` is not on a card, and so torch's own method refuses it."""
    source: Any = torch.ones(2, device="meta")
    source = source.storage() if kind == "typed" else source.untyped_storage()
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):
        source.cpu()
    with pytest.raises(RuntimeError, match="_share_cuda_: only available on CUDA"):
        source._share_cuda_()


def test_weak_references_to_one_storage_are_equal() -> None:
    """As torch's are, which compare the pointer to it."""
    tensor, other = torch.ones(2, device="cuda"), torch.ones(2, device="cuda")
    first, second, third = (
        reductions.StorageWeakRef(each.untyped_storage())
        for each in (tensor, tensor[1:], other)
    )

    assert first == second
    assert {first: 1} == {second: 1}
    assert first != third
    assert first.cdata == tensor.untyped_storage()._cdata
    del tensor
    assert first.expired()
    assert not third.expired()
