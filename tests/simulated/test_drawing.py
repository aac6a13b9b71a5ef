"""Random numbers on a simulated card: its own generator, whatever draws, whoever else draws."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch
from torch.nn import functional

from pytest_gpumem import simulated_device
from pytest_gpumem.devices.simulated.rng import GENERATOR
from pytest_gpumem.errors import UnsupportedOnSimulatedDeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: What arguments of operators that draw are given, by name; see ``_argument``.
_ARGUMENTS: Final[dict[str, Any]] = {
    "dtype": None,
    "from": 1,
    "mean": 0.0,
    "to": 1000,
    "device": torch.device("cuda", 0),
    "generator": None,
    "high": 1000,
    "lambd": 1.0,
    "low": 1,
    "n": 50,
    "num_samples": 1,
    "p": 0.5,
    "prob": 0.5,
    "size": [50],
    "std": 1.0,
    "train": True,
    "training": True,
}
#: Of no kernel that runs without a card of its own, or that draws nothing.
_NOT_DRAWN: Final = (
    "_cudnn_",
    "_efficient_attention",
    "_fill_mem_eff_dropout_mask_",
    "_flash_attention",
    "_fused_dropout",
    "_fused_sdp_choice",
    "_lstm_mps",
    "_nested_tensor_softmax_with_shape",
    "_scaled_dot_product_attention_math_for_mps",
    "_scaled_dot_product_cudnn",
    "_scaled_dot_product_efficient",
    "_scaled_dot_product_flash",
    "_scaled_dot_product_fused_attention_overrideable",
    "_triton_scaled_dot_attention",
    "miopen_rnn",
)


def _seeded() -> list[Any]:
    """Return every overload of torch's that draws random numbers by itself."""
    found = []
    for full in torch._C._dispatch_get_all_op_names():
        namespace, _, name = full.partition("::")
        packet, _, overload = name.partition(".")
        if namespace != "aten" or packet.startswith(_NOT_DRAWN):
            continue
        func = getattr(getattr(torch.ops.aten, packet), overload or "default")
        composed = torch._C._dispatch_has_kernel_for_dispatch_key(
            full, "CompositeImplicitAutograd"
        )
        if torch.Tag.nondeterministic_seeded in func.tags and not composed:
            found.append(func)
    return sorted(found, key=str)


@pytest.fixture(autouse=True)
def _card() -> Iterator[None]:
    with simulated_device("T4"):
        yield


def _argument(name: str, argument: Any) -> Any:
    kind = str(argument.type)
    if "Tensor" not in kind:
        return _ARGUMENTS.get(argument.name, argument.default_value)
    if argument.name == "high":
        return torch.tensor(1000)
    if argument.is_out and name == "multinomial":
        return torch.zeros(1, dtype=torch.int64, device="cuda")
    value = -1.0 if name == "rrelu_with_noise" else 0.5
    value = 100.0 if argument.name == "count" else value
    if argument.alias_info is not None:
        return torch.full((50,), value, device="cuda")
    # As torch.distributions gives its parameters.
    return torch.full((1,), value, device="cuda").expand(50)


def _call(func: Any) -> list[list[float]]:
    """Run an operator that draws; return the numbers of its results."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    name = func.overloadpacket.__name__.removesuffix("_").removesuffix("_functional")
    for each in func._schema.arguments:
        if each.kwarg_only or each.is_out:
            kwargs[each.name] = _argument(name, each)
        else:
            args.append(_argument(name, each))
    results = func(*args, **kwargs)
    results = results if isinstance(results, tuple) else (results,)
    assert all(each.is_cuda for each in results)
    return [each.tolist() for each in results]


@pytest.mark.parametrize("func", _seeded(), ids=str)
def test_an_operator_draws_from_the_card(func: Any) -> None:
    """The same seed draws the same, the next draw is another, and the host's is left alone."""
    host = torch.get_rng_state()
    torch.cuda.manual_seed(3)
    first = _call(func)
    assert _call(func) != first
    torch.cuda.manual_seed(3)
    assert _call(func) == first
    assert torch.equal(host, torch.get_rng_state())


@pytest.mark.parametrize(
    "draw",
    [
        torch.rand_like,
        torch.Tensor.normal_,
        functional.dropout,
        lambda x: functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    ],
    ids=["like", "in place", "dropout", "attention"],
)
def test_threads_that_draw_on_the_card_are_not_seen_on_the_host(
    draw: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Nor are those that draw on the host seen on the card."""
    source = torch.zeros(1, 1, 256, 256, device="cuda")
    torch.manual_seed(3)
    expected = [torch.rand(3).tolist() for _ in range(5_000)]
    expected_on_card = [draw(source).sum().item() for _ in range(5)]

    torch.manual_seed(3)
    found_on_card: list[float] = []
    source.zero_()
    thread = threading.Thread(
        target=lambda: found_on_card.extend(draw(source).sum().item() for _ in range(5))
    )
    thread.start()
    found = [torch.rand(3).tolist() for _ in range(5_000)]
    thread.join()

    assert found == expected
    assert found_on_card == expected_on_card


@contextmanager
def _operator(schema: str, kernel: Callable[..., torch.Tensor]) -> Iterator[Any]:
    """Define an operator of another library that draws, and run it on the CPU so."""
    library = torch.library.Library("pytest_gpumem_drawing", "DEF")
    library.define(f"noise{schema}", tags=(torch.Tag.nondeterministic_seeded,))
    library.impl("noise", kernel, "CPU")
    try:
        yield torch.ops.pytest_gpumem_drawing.noise
    finally:
        library._destroy()


@contextmanager
def _within_a_draw() -> Iterator[None]:
    """Run a block while another thread is drawing on the card."""
    drawing, go_on = threading.Event(), threading.Event()

    def kernel(source: torch.Tensor, *, generator: Any = None) -> torch.Tensor:
        drawing.set()
        assert go_on.wait(60)
        return torch.rand(source.shape, generator=generator)

    source = torch.zeros(3, device="cuda")
    with _operator("(Tensor x, *, Generator? generator=None) -> Tensor", kernel) as op:
        thread = threading.Thread(target=op, args=(source,))
        thread.start()
        try:
            assert drawing.wait(60)
            yield
        finally:
            go_on.set()
            thread.join()


def test_a_draw_on_the_host_during_one_on_the_card_is_as_without_it() -> None:
    """Wherever the other thread stands."""
    torch.manual_seed(3)
    expected = [torch.rand(3).tolist(), torch.rand(3).tolist()]
    torch.manual_seed(3)
    torch.rand(3, device="cuda")
    with _within_a_draw():
        found = [torch.rand(3).tolist()]
    assert [*found, torch.rand(3).tolist()] == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_forked_during_a_draw_goes_on() -> None:
    """The child draws on the host what it would have drawn, and waits for nobody."""
    torch.manual_seed(3)
    expected = torch.rand(3).tolist()
    torch.manual_seed(3)
    torch.rand(3, device="cuda")
    generator = torch.cuda.default_generators[0]
    with _within_a_draw():
        child = os.fork()
        if not child:
            status = 2
            try:
                signal.alarm(60)
                generator.get_state()
                status = int(torch.rand(3).tolist() != expected)
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0


def test_where_no_values_are_kept_nothing_is_drawn() -> None:
    """What computes the numbers of a card's generator stays where it is."""
    with simulated_device("T4", values="none"):
        torch.cuda.init()
        inner = GENERATOR.get_state(torch.cuda.default_generators[0])
        functional.dropout(torch.rand(3, device="cuda"))
        assert torch.equal(inner, GENERATOR.get_state(torch.cuda.default_generators[0]))


def test_an_operator_that_names_no_generator_is_refused() -> None:
    """Of a library: its kernel would draw from the host's generator."""
    with _operator("(Tensor x) -> Tensor", torch.rand_like) as noise:
        assert noise(torch.zeros(3)).shape == (3,)
        with pytest.raises(
            UnsupportedOnSimulatedDeviceError, match=r"takes no generator"
        ):
            noise(torch.zeros(3, device="cuda"))
