"""Operators ask for what PyTorch's own CUDA code asks for, one after the other.

The figures are those of ``tests/recordings/requests``, on compute capability 8.0 with 108
multiprocessors; the recordings' own test tries a part of them.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from allocator_requests import Notes, sizes, stop
from allocator_requests import kept as kept_of
from recorded_requests import warm_up
from torch.nn import functional
from versions import since

from pytest_gpumem.devices.simulated.install import simulated_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_HALF = torch.float16


@pytest.fixture(autouse=True)
def _card() -> Iterator[None]:
    with simulated_device("A100-40GB"):
        warm_up()
        yield
        stop()


def _ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device="cuda")


def _asked_for(operator: Callable[..., Any], *operands: Any) -> list[int]:
    """Return the bytes of an operator's requests, in order."""
    notes = Notes()
    with notes.phase("it"):
        result = operator(*operands)
    del result
    return sizes(notes.phases["it"])


def _invert(matrices: torch.Tensor) -> torch.Tensor:
    inverse: torch.Tensor = torch.linalg.inv_ex(matrices)[0]
    return inverse


@pytest.mark.parametrize(
    ("operator", "shapes", "wanted"),
    [
        (lambda x: torch.roll(x, (4, 5), (0, 1)), [(9, 10)], [360, 360]),
        (torch.dist, [(5, 5, 5), (5, 5, 5)], [500, 4]),
        (torch.ldexp, [(5,), ()], [4, 8, 20]),
        (lambda x: torch.mvlgamma(x + 1, 2), [(5, 5)], [100, 8, 200, 100]),
        (torch.isin, [(20,), (5,)], [20, 100, 20]),
        (torch.equal, [(5, 5), (5, 5)], [25, 1]),
        (torch.trace, [(5, 5)], [4]),
        (torch.cov, [(2,)], [8, 4, 4, 8, 1, 1, 1, 1, 8, 4, 4]),
        (
            lambda x: torch.multinomial(x, 3),
            [(3, 10)],
            [72, 4, 4, 1, 1, 1, 12, 3, 1, 1, 120, 36],
        ),
        (lambda x: functional.unfold(x, 2), [(2, 3, 5, 5)], [600, 1536]),
        (lambda x: torch.cumsum(x, 0), [(1048576,)], [4194304, 5375]),
        (
            lambda x: torch.topk(x, 5),
            [(16, 30522)],
            [320, 640, 64, 128, 128, 245760, 16384, 1920, 1920, 1279, 1279],
        ),
        (_invert, [(2, 5, 5)], [200, 8, 200, 40, 16, 16, 16]),
        (
            lambda x, y: torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist"),
            [(5, 5), (5, 5)],
            [100, 20, 20, 100, 20, 20, 100, 140, 140, 100],
        ),
        (lambda x: functional.dropout1d(x, 1.0), [(5, 5, 5)], [4, 500]),
    ],
)
def test_what_an_operator_asks_for(
    operator: Callable[..., Any], shapes: list[tuple[int, ...]], wanted: list[int]
) -> None:
    """Sizes and order are the recorded ones."""
    operands = [_ones(*shape) for shape in shapes]

    assert wanted == _asked_for(operator, *operands)


def test_half_precision_is_sorted_by_its_digits() -> None:
    """Each block has its counters."""
    source = _ones(8000, dtype=_HALF)

    assert [16000, 64000, 64000, 4549119] == _asked_for(torch.sort, source)


def test_moments_of_half_precision_are_kept_wider() -> None:
    """So is the scale of each channel."""
    source, weight = _ones(5, 5, 5, dtype=_HALF), _ones(5, dtype=_HALF)

    found = _asked_for(functional.group_norm, source, 1, weight, weight)

    assert [250, 10, 10, 20, 20, 100, 100] == found


@pytest.mark.parametrize(("is_enabled", "wanted"), [(True, [108]), (False, [108, 972])])
def test_convolutions_without_cudnn_make_columns(
    *, is_enabled: bool, wanted: list[int]
) -> None:
    """With cuDNN they ask for their result; its workspace is not known."""
    source, weight = _ones(1, 3, 4, 4), _ones(3, 3, 3, 3)

    with torch.backends.cudnn.flags(enabled=is_enabled):
        found = _asked_for(functional.conv2d, source, weight, None, 2, 2)

    assert wanted == found


def test_a_dilated_convolution_that_must_be_deterministic_is_torchs_own() -> None:
    """It makes columns, unless the channels come last, which cuDNN's kernel takes."""
    source, weight = _ones(1, 3, 8, 8), _ones(3, 3, 3, 3)

    def convolve(image: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(image, weight, dilation=2)

    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        own = _asked_for(convolve, source)
        last = _asked_for(convolve, source.to(memory_format=torch.channels_last))
    with torch.backends.cudnn.flags(enabled=True, deterministic=False):
        plain = _asked_for(convolve, source)

    assert ([192, 1728], [192], [192]) == (own, last, plain)


@pytest.mark.parametrize("empties", [True, False])
def test_the_cache_is_emptied_after_cudnn_has_measured_its_kernels(
    *, empties: bool
) -> None:
    """Once for each kind of convolution and each gradient, with ``benchmark=True``."""
    weight = _ones(3, 3, 3, 3).requires_grad_()
    sources = [_ones(1, 3, size, size).requires_grad_() for size in (8, 9)]
    small = torch.cuda.memory_reserved()

    def emptied(run: Callable[[], Any]) -> bool:
        """Tell whether 40 MiB in the cache are given back while something runs."""
        _ones(10 * 2**20)
        assert small + 40 * 2**20 == torch.cuda.memory_reserved()
        kept.append(run())
        is_emptied = small == torch.cuda.memory_reserved()
        torch.cuda.empty_cache()
        return is_emptied

    kept: list[Any] = []
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        torch._C._cudnn_set_conv_benchmark_empty_cache(empties)
        first, again, other = (
            emptied(partial(functional.conv2d, image, weight))
            for image in (sources[0], sources[0], sources[1])
        )
        backward = emptied(lambda: kept[0].sum().backward())
        backward_again = emptied(lambda: kept[1].sum().backward())
    with torch.backends.cudnn.flags(enabled=True, benchmark=False):
        plain = emptied(lambda: functional.conv2d(_ones(1, 3, 7, 7), weight))

    assert (empties, False, empties) == (first, again, other)
    assert (empties, False, False) == (backward, backward_again, plain)


def test_matrices_that_are_conjugated_where_they_lie_are_copied() -> None:
    """The product conjugates what it transposes, and nothing else."""
    source = _ones(3, 3, dtype=torch.complex64)

    assert [72, 72] == _asked_for(torch.mm, source, source.conj())
    assert [72] == _asked_for(torch.mm, source, source.t().conj())


def test_a_conjugated_row_is_stored_by_rows_and_copied() -> None:
    """Also if the strides of its transpose would fit; without a result nothing is."""
    column = _ones(2, 1, dtype=torch.complex64)
    empty = _ones(0, 1, dtype=torch.complex64)

    assert [16, 16] == _asked_for(torch.mm, column[:1], column.t().conj())
    assert [] == _asked_for(torch.mm, empty, column.t().conj())


@pytest.mark.parametrize(
    ("capability", "dtype", "shapes", "wanted"),
    [
        ("8.0", torch.bfloat16, [(8, 16), (2, 16, 32)], [512]),
        ("9.0", torch.float32, [(8, 24), (2, 24, 36)], [1152]),
        ("9.0", torch.bfloat16, [(8, 16), (2, 16, 32)], [512, 120, 67584]),
        ("9.0", torch.bfloat16, [(5, 64, 64), (5, 64, 128)], [81920, 324, 67584]),
        ("9.0", torch.bfloat16, [(64, 64), (64, 128)], [81920, 324, 67584]),
        ("10.0", torch.bfloat16, [(8, 64, 64), (64, 128)], [16384, 480, 709632]),
        ("10.0", torch.bfloat16, [(3, 256, 64), (3, 64, 256)], [393216, 204, 777216]),
    ],
)
@pytest.mark.parametrize(
    "values",
    [
        pytest.param(
            "computed",
            marks=pytest.mark.skipif(
                not any(
                    torch._C._dispatch_has_kernel_for_dispatch_key(
                        "aten::_grouped_mm", key
                    )
                    for key in ("CPU", "CompositeExplicitAutograd")
                ),
                reason="the CPU has no such product, to take the values from",
            ),
        ),
        "none",
    ],
)
def test_products_of_groups(
    capability: str,
    dtype: torch.dtype,
    shapes: list[tuple[int, ...]],
    wanted: list[int],
    values: str,
) -> None:
    """CUTLASS has a kernel for bfloat16 on some cards; elsewhere cuBLAS does it."""
    name = f"16GiB,cc={capability},sms=132"
    with simulated_device(name, values=values):
        warm_up()
        first, second = (_ones(*shape, dtype=dtype) for shape in shapes)
        # What the groups divide: rows, columns, or the dimension that is summed.
        divided = {
            (2, 3): (first.shape[-2], second.shape[0]),
            (3, 2): (second.shape[-1], first.shape[0]),
            (2, 2): (first.shape[-1], 5),
        }.get((first.dim(), second.dim()))
        offsets = None
        if divided is not None:
            length, count = divided
            ends = [*range(1, count), length]
            offsets = torch.tensor(ends, dtype=torch.int32, device="cuda")

        found = _asked_for(lambda: torch._grouped_mm(first, second, offs=offsets))

    assert wanted == found


def _exchanged(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return ones whose first two dimensions are exchanged in memory."""
    first, second, *others = shape
    return _ones(second, first, *others, dtype=dtype).transpose(0, 1)


@pytest.mark.parametrize(
    ("operator", "shape", "wanted"),
    [
        (
            lambda x: functional.layer_norm(x, (32,)),
            (8, 16, 32),
            [16384, 16384, 512, 512],
        ),
        pytest.param(
            lambda x: functional.rms_norm(x, (32,)),
            (8, 16, 32),
            [16384, 16384, 512],
            marks=since(2, 9, "rms_norm is composed of other operators"),
        ),
        (lambda x: x.softmax(-1), (8, 16, 32), [16384, 16384]),
        (lambda x: x.log_softmax(1), (8, 16, 32), [16384, 16384]),
        (lambda x: x.topk(4)[0], (8, 16, 32), [2048, 4096, 16384]),
        (lambda x: x.roll(1, 1), (8, 16, 32), [16384, 16384]),
        (lambda x: functional.max_pool2d(x, 2), (4, 16, 8, 8), [4096, 8192, 16384]),
        (lambda x: functional.avg_pool2d(x, 2), (4, 16, 8, 8), [4096, 16384]),
        (lambda x: functional.interpolate(x, 16), (4, 16, 8, 8), [65536, 16384]),
        (
            lambda x: functional.pad(x, (1, 1, 1, 1), "reflect"),
            (4, 16, 8, 8),
            [25600, 16384],
        ),
    ],
)
def test_what_is_not_stored_by_rows_is_copied(
    operator: Callable[..., Any], shape: tuple[int, ...], wanted: list[int]
) -> None:
    """What is stored by rows is not."""
    copied = _ones(*shape).nbytes
    without = list(wanted)
    without.remove(copied)

    assert wanted == _asked_for(operator, _exchanged(*shape))
    assert without == _asked_for(operator, _ones(*shape))


def test_a_gradient_that_is_not_stored_by_rows_is_copied() -> None:
    """An expanded one, as of a sum, is not either."""
    source = _ones(8, 16, 32).requires_grad_()
    result = functional.layer_norm(source, (32,))

    found = _asked_for(lambda: torch.autograd.grad(result.sum(), source))

    assert [4, 4, 16384, 16384] == found


def test_moments_of_half_precision_are_of_single_precision() -> None:
    """Of each row, a mean and a standard deviation."""
    source = _ones(1024, 32, dtype=torch.bfloat16)

    found = _asked_for(lambda x: functional.layer_norm(x, (32,)), source)

    assert [65536, 4096, 4096] == found


def test_channels_last_are_kept_where_a_card_keeps_them() -> None:
    """Pooling does; group normalisation, reflection and shuffling store by rows."""
    source = _ones(4, 16, 8, 8).to(memory_format=torch.channels_last)
    weight = _ones(16)

    pooled = functional.max_pool2d(source, 2)
    others = (
        functional.group_norm(source, 4, weight, weight),
        functional.pad(source, (1, 1, 1, 1), "reflect"),
        functional.pixel_shuffle(source, 2),
    )

    assert pooled.is_contiguous(memory_format=torch.channels_last)
    assert all(each.is_contiguous() for each in others)


def test_a_norm_of_a_single_complex_number_over_a_dimension() -> None:
    """Over all dimensions it is an absolute value, which is complex first."""
    number = torch.ones((), dtype=torch.complex64, device="cuda")

    assert [4, 8] == _asked_for(torch.linalg.vector_norm, number)
    assert [4] == _asked_for(lambda: torch.linalg.vector_norm(number, 2, 0))


def test_the_gradient_of_renorm_is_summed_in_single_precision() -> None:
    """A card accumulates single precision in itself, the host in double precision."""
    source = _ones(5, 25).requires_grad_()
    result = source.renorm(1, 0, 1.0)
    gradient = _ones(5, 25)

    found = _asked_for(lambda: torch.autograd.grad(result, source, gradient))

    assert [20, 500, 20] == found[:3]
    assert max(found) == source.nbytes


def test_a_gradient_of_places_that_overlap_numbers_them() -> None:
    """The numbers of all places, and those of the view."""
    source = _ones(16).requires_grad_()
    gradient = _ones(2, 2, 2, 2)
    view = source.as_strided((2, 2, 2, 2), (1, 1, 1, 1))

    found = _asked_for(lambda: torch.autograd.grad(view, source, gradient))

    assert [64, 128, 128] == found


def test_a_gradient_is_written_into_its_zeros() -> None:
    """C++ makes zeros, and scatters into them."""
    source = _ones(5, 5, 5).requires_grad_()
    values = torch.cummax(source, 0).values
    gradient = _ones(5, 5, 5)

    assert [500] == _asked_for(lambda: torch.autograd.grad(values, source, gradient))


@pytest.mark.parametrize("values", ["computed", "none"])
@pytest.mark.parametrize(
    ("index", "wanted"),
    [([0, 2], [16, 40]), (range(2), [16, 40]), (torch.tensor([0, 2]), [40])],
    ids=["list", "range", "host"],
)
def test_an_index_that_is_a_sequence_stays_for_backward(
    values: str, index: Any, wanted: list[int]
) -> None:
    """C++ makes it a tensor on the card; a tensor on the host is copied for the call."""
    with simulated_device("A100-40GB", values=values):
        source = _ones(4, 5).requires_grad_()
        notes = Notes()
        with notes.phase("it"):
            result = source[index]
        stop()

    assert result.shape == (2, 5)
    assert [16, 40] == sizes(notes.phases["it"])
    assert kept_of(notes.phases["it"]) == wanted


def test_autocast_casts_the_last_operand_first() -> None:
    """The order in which gcc evaluates the arguments of a call."""
    source, weight = _ones(8, 16), _ones(32, 16)

    with torch.autocast("cuda", torch.bfloat16):
        asked = _asked_for(functional.linear, source, weight)

    assert asked == [1024, 256, 512]
