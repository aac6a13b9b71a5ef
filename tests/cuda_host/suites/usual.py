"""What tests do with a card, and none looks at a value: figures must not depend on them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

MIB = 2**20


def _bytes(count: int, device: str = "cuda") -> torch.Tensor:
    return torch.empty(count, dtype=torch.uint8, device=device)


def _bert() -> Any:
    config = BertConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=4096,
    )
    return BertForSequenceClassification(config)


def _asked() -> dict[str, torch.Tensor]:
    # No mask: transformers drops one whose values allow it, and values mean nothing here.
    return {"input_ids": torch.ones(2, 64, dtype=torch.long).cuda()}


def _or_on_the_host(make: Any) -> Any:
    try:
        return make("cuda")
    except torch.OutOfMemoryError:
        return make("cpu")


@pytest.fixture(scope="class")
def weights() -> torch.Tensor:
    return _bytes(7 * MIB)


# -- sizes: rounding, pools, splitting, what is cached ---------------------------------


def test_small_and_large_blocks() -> None:
    kept = [_bytes(each) for each in (1, 511, 513, MIB - 1, MIB, MIB + 1, 20 * MIB)]
    del kept[1::2]
    kept += [_bytes(each) for each in (700, 3 * MIB, 9 * MIB, 11 * MIB)]


def test_a_segment_is_split_and_joined() -> None:
    large = _bytes(40 * MIB)
    del large
    parts = [_bytes(3 * MIB) for _ in range(8)]
    del parts[::2]
    assert 12 * MIB == _bytes(12 * MIB).numel()


def test_views_share_a_block() -> None:
    block = _bytes(7 * MIB)
    halves = block.view(2, -1)
    assert halves[1].data_ptr() == block.data_ptr() + block.numel() // 2
    assert halves[1].clone().is_cuda


def test_what_another_stream_uses_lives_on() -> None:
    stream = torch.cuda.Stream()
    block = _bytes(30 * MIB)
    with torch.cuda.stream(stream):
        copied = block.clone()
    block.record_stream(stream)
    del block
    again = _bytes(30 * MIB)
    torch.cuda.synchronize()
    del copied, again


def test_peaks_are_reset_by_the_test() -> None:
    _bytes(50 * MIB)
    torch.cuda.reset_peak_memory_stats()
    _bytes(5 * MIB)


def test_counts_are_reset_by_the_test() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        _bytes(2**50)
    torch.cuda.reset_accumulated_memory_stats()


def test_the_cache_is_emptied() -> None:
    _bytes(50 * MIB)
    torch.cuda.empty_cache()


def test_the_second_card() -> None:
    there = _bytes(6 * MIB, "cuda:1")
    here = there.to("cuda:0")
    assert torch.cuda.memory_allocated(1) >= here.numel()


def test_to_the_card_and_back() -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 128)).cuda()
    model.half().cpu()
    model.to("cuda", torch.bfloat16)


# -- models ----------------------------------------------------------------------------


def test_a_forward() -> None:
    model = _bert().cuda().eval()
    with torch.no_grad():
        model(**_asked())


def test_a_forward_in_half() -> None:
    model = _bert().to("cuda", torch.float16).eval()
    with torch.no_grad():
        model(**_asked())


@pytest.mark.parametrize("foreach", [True, False])
def test_two_steps_of_training(foreach: bool) -> None:
    model = _bert().cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=foreach)
    for _ in range(2):
        loss = model(**_asked(), labels=torch.zeros(2, dtype=torch.long).cuda()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_forward_of_autocast() -> None:
    model = _bert().cuda().train()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        logits = model(**_asked()).logits
    logits.float().sum().backward()


# -- limits ----------------------------------------------------------------------------


@pytest.mark.max_vram("8MiB")
@pytest.mark.max_vram("20MiB", metric="reserved")
def test_within_its_limits() -> None:
    _bytes(8 * MIB)


@pytest.mark.max_vram("8MiB")
def test_over_its_limit() -> None:
    _bytes(8 * MIB + 1)


class TestOfOneFixture:
    @pytest.mark.max_vram("1MiB", phase="test")
    def test_over_its_limit_by_its_fixture(self, weights: torch.Tensor) -> None:
        assert weights.is_cuda

    @pytest.mark.max_vram("8MiB")
    def test_within_its_limit(self, weights: torch.Tensor) -> None:
        _bytes(MIB // 2)
        assert weights.is_cuda


# -- running out -----------------------------------------------------------------------


@pytest.mark.gpu_budget("64MiB")
def test_over_its_budget() -> None:
    kept = [_bytes(30 * MIB) for _ in range(2)]
    kept.append(_bytes(30 * MIB))


@pytest.mark.gpu_budget("64MiB")
def test_within_its_budget() -> None:
    free, total = torch.cuda.mem_get_info()
    assert (64 * MIB, True) == (free + torch.cuda.memory_reserved(), total > 2**33)
    with pytest.raises(torch.OutOfMemoryError, match=r"64\.00 MiB allowed"):
        _bytes(70 * MIB)


@pytest.mark.gpu_budget("32MiB", device=1)
def test_the_other_cards_budget() -> None:
    _bytes(40 * MIB, "cuda:0")
    with pytest.raises(torch.OutOfMemoryError, match=r"GPU 1 .*32\.00 MiB allowed"):
        _bytes(40 * MIB, "cuda:1")


def test_more_than_the_card() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        _bytes(2**40)


def test_a_retry_frees_what_is_cached() -> None:
    free, _total = torch.cuda.mem_get_info()
    _bytes(free - 100 * MIB)
    _bytes(200 * MIB)


# -- injection -------------------------------------------------------------------------


@pytest.mark.inject_oom("any:nth=2")
def test_the_second_fails() -> None:
    kept = [_or_on_the_host(lambda d: torch.empty(MIB, device=d)) for _ in range(3)]
    assert ["cuda", "cpu", "cuda"] == [each.device.type for each in kept]


@pytest.mark.inject_oom("any:min=5MiB,persistent")
def test_large_ones_fail() -> None:
    kept = [
        _or_on_the_host(lambda d, n=n: torch.empty(n * MIB // 4, device=d))
        for n in (4, 5, 6)
    ]
    assert ["cuda", "cpu", "cpu"] == [each.device.type for each in kept]


@pytest.mark.inject_oom("any:nth=3")
def test_nobody_catches_it() -> None:
    kept = [_bytes(MIB) for _ in range(3)]
    del kept


@pytest.mark.inject_oom("any:nth=1,times=2,site=*_in_a_thread*")
def test_a_thread_fails() -> None:
    made: list[Any] = []

    def make_in_a_thread() -> None:
        made.append(_or_on_the_host(lambda d: torch.empty(MIB, device=d)))

    thread = threading.Thread(target=make_in_a_thread)
    thread.start()
    thread.join()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(make_in_a_thread).result()
        pool.submit(make_in_a_thread).result()
    assert ["cpu", "cpu", "cuda"] == [each.device.type for each in made]


@pytest.mark.inject_oom("any:nth=1,min=1MiB,flavour=cublas")
def test_of_another_flavour() -> None:
    with pytest.raises(RuntimeError, match="CUBLAS_STATUS_ALLOC_FAILED"):
        _bytes(MIB)


# -- sweeps and ladders ----------------------------------------------------------------


@pytest.mark.oom_sweep(points="sites", recover=True)
def test_a_sweep_by_sites() -> None:
    _or_on_the_host(lambda d: nn.Linear(64, 64).to(d))
    for _ in range(3):
        _or_on_the_host(lambda d: torch.empty(MIB, device=d))


@pytest.mark.oom_sweep
def test_a_sweep_finds_what_is_not_caught() -> None:
    _or_on_the_host(lambda d: torch.empty(MIB, device=d))
    _bytes(MIB)


def test_a_ladder(fallback: Any) -> None:
    def load() -> nn.Module:
        model = nn.Linear(2048, 2048)
        try:
            return model.to("cuda")
        except torch.OutOfMemoryError:
            pass
        try:
            return model.half().to("cuda")
        except torch.OutOfMemoryError:
            pass
        return model.float().to("cpu")

    fallback(load, budgets=["20MiB", "18MiB", "8MiB"])


KEPT: list[torch.Tensor] = []


@pytest.mark.max_vram_leak("1MiB")
def test_it_leaks() -> None:
    KEPT.append(_bytes(3 * MIB))
