"""Another process holds memory of a card."""

from __future__ import annotations

import pytest
import torch

from pytest_gpumem import competing_process, simulated_device
from pytest_gpumem.errors import TenantError

MIB = 2**20
GIB = 2**30


def test_a_tenant_takes_grows_and_leaves() -> None:
    """Free memory and the text of an OOM tell of it; it is gone afterwards."""
    with simulated_device("16GiB,cc=8.0"):
        with competing_process("10GiB") as tenant:
            held = torch.cuda.mem_get_info()[0]
            tenant.grow("4GiB")
            with pytest.raises(TenantError, match=r"only 2 GiB .* of 16 GiB are free"):
                tenant.grow("3GiB")
            with pytest.raises(
                torch.OutOfMemoryError,
                match=rf"Process {tenant.pid} has 14.00 GiB memory in use",
            ):
                torch.empty(3 * GIB, dtype=torch.uint8, device="cuda")
            tenant.leave()
            left = torch.cuda.mem_get_info()[0]
            tenant.grow(MIB)
        after = torch.cuda.mem_get_info()[0]

    assert (6 * GIB, 16 * GIB, 16 * GIB) == (held, left, after)


def test_a_tenant_goes_with_an_error() -> None:
    """Whatever happens in the block, the memory is free afterwards."""
    with simulated_device("16GiB,cc=8.0"):
        with pytest.raises(KeyError), competing_process("10GiB"):
            raise KeyError
        after = torch.cuda.mem_get_info()[0]

    assert 16 * GIB == after
