"""toma: decorators that halve a batch or a step until it fits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import toma
import torch
from evidence import MIB, CountOoms, accepted_by

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_gpumem import OomInjector


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    """Toma remembers sizes by call site for the life of the process."""
    toma.get_cache_for_context.cache_clear()
    yield
    toma.get_cache_for_context.cache_clear()


@pytest.fixture
def numbers() -> torch.Tensor:
    """Numbers on the host, 32 MiB of them."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8192, 1024, generator=generator)


def test_a_batch_is_halved_until_it_fits(
    numbers: torch.Tensor, vram_budget: Callable[..., Any]
) -> None:
    """``toma.batch``: one size for all the work, the same numbers as on the CPU."""
    tried: list[int] = []

    @toma.toma.batch(initial_batchsize=len(numbers))  # type: ignore[untyped-decorator]  # toma's
    def run(batchsize: int) -> torch.Tensor:
        tried.append(batchsize)
        return torch.cat(
            [part.cuda().softmax(1).cpu() for part in numbers.split(batchsize)]
        )

    with vram_budget("40MiB"), CountOoms() as ooms:
        result = run()

    assert tried == [8192, 4096]
    assert ooms.num == 1
    assert torch.equal(numbers.softmax(1), result)


def test_a_chunk_is_halved_where_it_fails(
    numbers: torch.Tensor, vram_budget: Callable[..., Any]
) -> None:
    """``toma.chunked``: what is done stays done, the rest goes on in smaller steps."""
    result = torch.full_like(numbers, torch.nan)
    steps: list[tuple[int, int]] = []

    with vram_budget("40MiB"), CountOoms() as ooms:

        @toma.toma.execute.chunked(numbers, len(numbers))  # type: ignore[untyped-decorator]  # toma's
        def run(part: torch.Tensor, start: int, end: int) -> None:
            result[start:end] = part.cuda().softmax(1).cpu()
            steps.append((start, end))

    assert steps == [(0, 4096), (4096, 8192)]
    assert ooms.num == 1
    assert torch.equal(numbers.softmax(1), result)


@pytest.mark.parametrize("nth", [1, 3])
def test_an_injected_oom_halves_the_step_from_there(
    numbers: torch.Tensor, oom_injector: OomInjector, nth: int
) -> None:
    """``simple.chunked`` repeats only the chunk that failed."""
    result = torch.full_like(numbers, torch.nan)
    starts: list[int] = []

    def run(part: torch.Tensor, start: int, end: int) -> None:
        starts.append(start)
        result[start:end] = part.cuda().softmax(1).cpu()

    rule = oom_injector.arm(f"any:nth={nth}")
    toma.simple.chunked(run, numbers, 4096)

    assert rule.num_failed == 1
    assert starts == ([0, 0, 2048, 4096, 6144] if nth == 1 else [0, 4096, 4096, 6144])
    assert torch.equal(numbers.softmax(1), result)


def test_a_remembered_size_holds_for_the_next_call(
    numbers: torch.Tensor, oom_injector: OomInjector
) -> None:
    """The second call begins with what the first one ended with."""
    tried: list[int] = []

    @toma.toma.batch(initial_batchsize=8192, cache_type=toma.GlobalBatchsizeCache)  # type: ignore[untyped-decorator]  # toma's
    def run(batchsize: int) -> None:
        tried.append(batchsize)
        numbers[:batchsize].cuda()

    rule = oom_injector.arm("any:nth=1,times=2")
    run()
    run()

    assert rule.num_failed == 2
    assert tried == [8192, 4096, 2048, 2048]


def test_the_smallest_batch_raises_the_allocators_error(
    vram_budget: Callable[..., Any],
) -> None:
    """Where one does not fit, the caller sees the OOM itself."""
    with (
        vram_budget("8MiB"),
        CountOoms() as ooms,
        pytest.raises(torch.OutOfMemoryError),
    ):
        toma.simple.batch(lambda size: torch.empty(size * 16 * MIB, device="cuda"), 4)

    assert ooms.num == 3


def test_its_detector() -> None:
    """The text of the CUDA allocator, one of cuDNN's and the host's."""
    assert accepted_by(toma.should_reduce_batch_size) == {
        "native",
        "legacy",
        "cudnn-unsupported",
        "host",
    }
