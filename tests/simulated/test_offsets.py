"""A card's generator: its offset moves as CUDA's code moves it, and brings numbers back.

The figures are what ``torch.cuda.default_generators[0].get_offset()`` answers after each
call on torch 2.13's own CUDA code, with 108 processors of 2,048 threads
(``tests/cuda_host``).
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch
from torch.nn import functional

from pytest_gpumem import simulated_device
from pytest_gpumem.kernels.random_numbers import by_iterator, by_permutation
from pytest_gpumem.kernels.reduction_memory import Processors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_A100: Final = Processors(108, 2048)


@pytest.fixture(autouse=True)
def _card() -> Iterator[None]:
    with simulated_device("A100-40GB"):
        yield


def _full(*shape: int, value: float = 0.5, dtype: torch.dtype = torch.float32) -> Any:
    return torch.full(shape, value, device="cuda", dtype=dtype)


def _moved(draw: Callable[[], Any]) -> int:
    torch.cuda.init()
    generator = torch.cuda.default_generators[0]
    generator.manual_seed(1)
    draw()
    return generator.get_offset()


@pytest.mark.parametrize(
    ("draw", "few", "many"),
    [
        (lambda n: _full(n).uniform_(), 4, 8),
        (lambda n: _full(n, dtype=torch.half).normal_(), 4, 8),
        (lambda n: _full(n, dtype=torch.double).uniform_(), 4, 12),
        (lambda n: torch.randn(n, device="cuda", dtype=torch.complex64), 4, 12),
        (lambda n: torch.rand(n, out=_full(n)), 4, 8),
        (lambda n: torch.randn_like(_full(n)), 4, 8),
        (lambda n: torch.normal(_full(n), 1.0), 4, 8),
        (lambda n: _full(n).exponential_(), 4, 8),
        (lambda n: _full(n, dtype=torch.long).geometric_(0.5), 4, 8),
        (lambda n: _full(n, dtype=torch.int).random_(), 4, 8),
        (lambda n: _full(n, value=0, dtype=torch.long).random_(), 4, 12),
        (lambda n: _full(n).random_(3, None), 4, 8),
        (lambda n: _full(n, dtype=torch.double).random_(3, None), 4, 12),
        (lambda n: torch.randint(2**28 - 1, (n,), device="cuda"), 4, 8),
        (lambda n: torch.randint(2**28, (n,), device="cuda"), 4, 12),
        (lambda n: torch.randint_like(_full(n), 9), 4, 8),
        (lambda n: torch.bernoulli(_full(n)), 12, 12),
        (lambda n: torch.bernoulli(_full(n), 0.3), 4, 8),
        (lambda n: functional.dropout(_full(n, dtype=torch.double), 0.3), 4, 8),
        (lambda n: functional.dropout(_full(n), 1.0), 0, 0),
        (lambda n: functional.dropout(_full(n), 0.3, training=False), 0, 0),
        (lambda n: functional.rrelu(_full(n), training=True), 4, 8),
        (lambda n: torch.poisson(_full(n)), 20, 20),
        (lambda n: torch.binomial(_full(n, value=2), _full(n)), 44, 44),
        (lambda n: torch._standard_gamma(_full(n)), 12, 12),
        (lambda n: torch.randperm(n, device="cuda"), 260, 1_000_012),
        (lambda n: torch.multinomial(_full(n // 5, 5), 2), 4, 8),
        (lambda n: torch.multinomial(_full(n // 5, 5), 2, replacement=True), 4, 16),
    ],
)
def test_an_operator_moves_the_offset(
    draw: Callable[[int], Any], few: int, many: int
) -> None:
    """By what each of its kernel's threads may draw."""
    assert (few, many) == tuple(_moved(lambda n=n: draw(n)) for n in (255, 10**6))  # type: ignore[misc]  # n is bound


@pytest.mark.parametrize(
    ("dtype", "masked", "move"),
    [(torch.half, False, 192), (torch.half, True, 384), (torch.float, False, 384)],
)
def test_attention_moves_the_offset(
    dtype: torch.dtype, move: int, *, masked: bool
) -> None:
    """Flash attention by its heads, the memory-efficient one by its scores."""
    query = _full(2, 3, 8, 64, dtype=dtype)
    mask = _full(8, 8, dtype=dtype) if masked else None

    def attend() -> Any:
        return functional.scaled_dot_product_attention(
            query, query, query, attn_mask=mask, dropout_p=0.1
        )

    assert move == _moved(attend)


@pytest.mark.parametrize(
    ("count", "size", "move"),
    [(2**29 + 1000, 4, 4860), (2**30 + 7, 2, 9712), (3 * (2**28 + 1000), 4, 7292)],
)
def test_numbers_that_32_bits_cannot_count(count: int, size: int, move: int) -> None:
    """The whole moves the offset, and so does each part that a kernel fills."""
    assert move == by_iterator(count, size, 4, _A100)


@pytest.mark.parametrize(("count", "move"), [(0, 0), (1, 8), (255, 260), (1000, 1004)])
def test_a_permutations_keys_are_drawn_anew(count: int, move: int) -> None:
    """A draw for each key beside those that make the keys."""
    assert move == by_permutation(count, _A100)


def test_without_values_the_offset_moves_too() -> None:
    """Nothing is drawn, but a card would have."""
    with simulated_device("A100-40GB", values="none"):
        assert 4 == _moved(lambda: functional.dropout(_full(255), 0.5))


def _state() -> list[int]:
    return torch.cuda.get_rng_state().tolist()


def test_a_state_is_a_seed_and_an_offset() -> None:
    """16 bytes, as on a card; what is built on their layout finds them."""
    torch.cuda.manual_seed(7)
    torch.rand(3, device="cuda")

    assert [7, *[0] * 7, 4, *[0] * 7] == _state()
    torch.cuda.set_rng_state(torch.tensor([9, *[0] * 7], dtype=torch.uint8))
    assert [9, *[0] * 15] == _state()
    with pytest.raises(RuntimeError, match="RNG state is wrong size"):
        torch.cuda.set_rng_state(torch.get_rng_state())
    with pytest.raises(TypeError, match=r"must be a torch\.ByteTensor"):
        torch.cuda.set_rng_state(torch.zeros(16))
    with pytest.raises(RuntimeError, match="offset must be a multiple of 4"):
        torch.cuda.default_generators[0].set_offset(3)


@pytest.mark.parametrize(
    "module", [torch, torch.random, torch.cuda], ids=lambda each: each.__name__
)
def test_a_state_on_a_card_is_refused(module: Any) -> None:
    """As a checkpoint has it that was loaded with ``map_location="cuda"``."""
    state = module.get_rng_state()

    with pytest.raises(TypeError, match=r"must be a torch\.ByteTensor"):
        module.set_rng_state(state.cuda())
    module.set_rng_state(state)


def test_an_offset_brings_its_numbers_back() -> None:
    """Also in another generator, also one that nobody has drawn at before."""
    first = torch.Generator("cuda").manual_seed(3)
    torch.rand(3, device="cuda", generator=first)
    offset, state = first.get_offset(), first.get_state()

    def draw(generator: torch.Generator) -> list[float]:
        return torch.rand(3, device="cuda", generator=generator).tolist()

    expected = draw(first)
    first.set_offset(offset)
    other = torch.Generator("cuda")
    other.set_state(state)
    twin = pickle.loads(pickle.dumps(other))
    assert [expected] * 3 == [draw(first), draw(other), draw(twin)]
    assert 3 == other.initial_seed()

    first.set_offset(400)
    far = draw(first)
    assert far != expected
    other.set_offset(400)
    assert far == draw(other)
    first.set_offset(0)
    assert draw(first) == draw(torch.Generator("cuda").manual_seed(3))


def test_a_seed_begins_anew() -> None:
    """``manual_seed`` and ``seed`` take the offset back; a clone keeps it."""
    generator = torch.Generator("cuda").manual_seed(5)
    torch.rand(3, device="cuda", generator=generator)

    assert (5, 4) == (
        generator.clone_state().initial_seed(),
        generator.clone_state().get_offset(),
    )
    generator.seed()
    assert 0 == generator.get_offset()


def test_a_graph_moves_the_offset_as_it_is_replayed() -> None:
    """Not as it is captured."""
    torch.cuda.init()
    generator = torch.cuda.default_generators[0].manual_seed(1)
    source = _full(100)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        functional.dropout(source, 0.5)
    offsets = [generator.get_offset()]
    for _ in range(2):
        graph.replay()
        offsets.append(generator.get_offset())

    assert [0, 4, 8] == offsets
