"""Products of three tensors, for example in ``torch.nn.Bilinear``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from pytest_gpumem.devices.simulated.kernel_types import INTEGERS, lacking
from pytest_gpumem.devices.simulated.operators.composing import only
from pytest_gpumem.devices.simulated.operators.registry import register

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence


def _sum_of_products(
    left: torch.Tensor, right: torch.Tensor, summed: Collection[int]
) -> torch.Tensor:
    """Multiply and sum over some dimensions, which are kept: ``sumproduct_pair``."""
    if not summed:
        return left * right
    both, lefts, sums, rights = [], [], [], []
    for dim in range(left.dim()):
        has_left, has_right = left.shape[dim] != 1, right.shape[dim] != 1
        if dim in summed:
            if has_left and has_right:
                sums.append(dim)
            elif has_left:
                left = left.sum(dim, keepdim=True)
            elif has_right:
                right = right.sum(dim, keepdim=True)
        elif has_left and has_right:
            both.append(dim)
        elif has_left:
            lefts.append(dim)
        else:
            rights.append(dim)
    gone = sorted(summed)
    left_sizes, right_sizes = left.shape, right.shape
    length = math.prod(left_sizes[dim] for dim in sums)
    batch = math.prod(left_sizes[dim] for dim in both)
    rows = math.prod(left_sizes[dim] for dim in lefts)
    columns = math.prod(right_sizes[dim] for dim in rights)
    # Summed dimensions of length 1 are placed with the left operand's own dimensions.
    ones = [dim for dim in gone if dim not in sums]
    first = left.permute([*both, *lefts, *ones, *sums, *rights])
    second = right.permute([*both, *sums, *ones, *rights, *lefts])
    product = torch.bmm(
        first.reshape(batch, rows, length), second.reshape(batch, length, columns)
    )
    order = [*both, *lefts, *gone, *rights]
    sizes = [
        *(left_sizes[dim] for dim in (*both, *lefts)),
        *(1 for _dim in gone),
        *(right_sizes[dim] for dim in rights),
    ]
    positions = [order.index(dim) for dim in range(len(order))]
    return product.view(sizes).permute(positions)


def _trilinear(  # noqa: PLR0917  # the operator's signature
    i1: torch.Tensor,
    i2: torch.Tensor,
    i3: torch.Tensor,
    expand1: Sequence[int],
    expand2: Sequence[int],
    expand3: Sequence[int],
    sumdim: Sequence[int],
    unroll_dim: int = 1,
) -> torch.Tensor:
    """Run ``_trilinear``: one slice of a dimension after the other."""
    count = i1.dim() + len(expand1)
    tensors = [i1, i2, i3]
    for index, expanded in enumerate((expand1, expand2, expand3)):
        for dim in sorted(expanded):
            tensors[index] = tensors[index].unsqueeze(dim)
    # C++ takes the length from the last of the three tensors that has the dimension.
    lengths = [
        next(
            (
                tensor.shape[dim]
                for tensor, expanded in zip(
                    reversed(tensors), (expand3, expand2, expand1), strict=True
                )
                if dim not in expanded
            ),
            0,
        )
        for dim in range(count)
    ]
    summed = [dim for dim in sumdim if dim != unroll_dim]
    early = {dim for dim in summed if dim in expand3}
    late = {dim for dim in summed if dim not in expand3}
    sizes = [1 if dim in sumdim else lengths[dim] for dim in range(count)]
    result = i1.new_zeros(sizes)
    if all(each.numel() for each in tensors):
        for number in range(lengths[unroll_dim]):
            slices = [
                tensor.narrow(unroll_dim, 0 if unroll_dim in expanded else number, 1)
                for tensor, expanded in zip(
                    tensors, (expand1, expand2, expand3), strict=True
                )
            ]
            buffer = _sum_of_products(slices[0], slices[1], early)
            buffer = _sum_of_products(buffer, slices[2], late)
            target = result
            if unroll_dim not in sumdim:
                target = result.narrow(unroll_dim, number, 1)
            target.add_(buffer)
    for dim in sorted(sumdim, reverse=True):
        result = result.squeeze(dim)
    return result


register(
    "_trilinear",
    decomposed=only(_trilinear),
    lacks=lacking("baddbmm_cuda", INTEGERS),
    source="Linear.cpp, _trilinear and sumproduct_pair",
)
