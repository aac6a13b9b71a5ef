"""A program on a card and the same program on the CPU, step by step, to the byte.

The second one is PyTorch's own: it runs on the CPU throughout, and each storage carries
a mark that says on which device it would be. What a tensor is after a step (its values,
type, version, gradient, whom it shares its memory with) and how many bytes are marked
as the card's is what the simulated card is held to.

The marks are not attributes of storages, which torch 2.8 and 2.9 lose in garbage collections.
"""

from __future__ import annotations

import copy
import gc
import io
from typing import TYPE_CHECKING, Any, Final

import torch
from fuzzing import EXAMPLES
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
)
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.devices.simulated.machine import current_machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: An allocation is a multiple of this (``kMinBlockSize``).
ROUNDING = 512


class Marks(TorchDispatchMode):
    """Marks what operators make as being where their operands are."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.forced: str | None = None
        _places.clear()

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and mark its results."""
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        places = [place_of(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]
        place = self.forced or next(filter(None, places), "cpu")
        result = func(*args, **(kwargs or {}))
        for made in torch.utils._pytree.tree_leaves(result):
            if isinstance(made, torch.Tensor):
                self.mark(made, place)
        return result

    def mark(self, tensor: torch.Tensor, place: str) -> None:
        """Say where a tensor's memory is, unless it is said already."""
        if not place_of(tensor):
            set_place(tensor, place)

    def card_bytes(self) -> int:
        """Return the bytes on the card, as its allocator counts them."""
        on_card = [
            torch.UntypedStorage._new_with_weak_ptr(each.cdata)
            for each, place in _places.values()
            if place == "cuda"
        ]
        return sum(
            -(-storage.nbytes() // ROUNDING) * ROUNDING
            for storage in on_card
            if storage is not None
        )


def place_of(tensor: torch.Tensor) -> str:
    """Return where a tensor of either world is: ``"cpu"`` or ``"cuda"``."""
    if tensor.device.type == "cuda":
        return "cuda"
    return _places.get(storage_of(tensor), (None, ""))[1]


def set_place(tensor: torch.Tensor, place: str) -> None:
    """Mark a tensor's storage as being on a device."""
    _places[storage_of(tensor)] = StorageWeakRef(tensor.untyped_storage()), place


def mark_like(copied: torch.Tensor, source: torch.Tensor) -> None:
    """Mark a copy as its source: a storage is copied by operators that know neither."""
    set_place(copied, place_of(source))


#: Where each storage of the CPU's program is, by ``storage_of``. No other storage gets the
#: number of one that has a weak reference of C++.
_places: Final[dict[int, tuple[Any, str]]] = {}


def storage_of(tensor: torch.Tensor) -> int:
    """Return what identifies a tensor's memory."""
    return int(tensor.untyped_storage()._cdata)


class Gain(nn.Parameter):
    """A user's class of parameters."""

    label: str


class Scale(torch.Tensor):
    """A user's class of tensors; what is computed from it is of it."""

    def new_empty(self, *args: Any, **options: Any) -> Any:
        """Return one of the class, without which torch copies none."""
        return super().new_empty(*args, **options).as_subclass(type(self))


class Net(nn.Module):
    """Two layers, a norm, a buffer; one of them and a parameter of users' classes."""

    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.gain = Gain(torch.ones(8))
        self.gain.label = "kept"
        self.first = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.last = nn.Linear(8, 8, bias=False)
        self.register_buffer("scale", torch.full((8,), 0.5).as_subclass(Scale))

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        """Return a loss."""
        hidden = torch.tanh(self.norm(self.first(source)) * self.gain) * self.scale
        loss: torch.Tensor = self.last(hidden).square().sum()
        return loss


WHERE = st.sampled_from(["cpu", "cuda"])
INDEX = st.integers(0, 7)


class Programs(RuleBasedStateMachine):
    """One program in two worlds: [0] is the CPU's, [1] the card's."""

    def __init__(self) -> None:
        super().__init__()
        self._device = simulated_device("T4")
        self._device.__enter__()
        self.marks = Marks()
        self.nets: list[tuple[Net, Net]] = []
        self.views: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.buckets: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.graphs: list[tuple[Any, Any, tuple[Net, Net], list[Any], str]] = []
        self.optimizers: list[tuple[Any, Any]] = []
        self.hooked: tuple[list[str], list[str]] = ([], [])
        gc.collect()
        self.new_net()

    def teardown(self) -> None:
        """Drop everything; nothing is left on the card."""
        kinds: Any = (self.nets, self.views, self.buckets, self.graphs, self.optimizers)
        for kept in kinds:
            kept.clear()
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()
        left = torch.cuda.memory_allocated()
        self._device.__exit__(None, None, None)
        assert 0 == left

    # -- helpers ------------------------------------------------------------------

    def both(self, action: Callable[..., Any], *pairs: Any) -> tuple[Any, Any]:
        """Do the same in both worlds."""
        with self.marks:
            first = action(0, *(pair[0] for pair in pairs))
        return first, action(1, *(pair[1] for pair in pairs))

    def put(self, world: int, tensor: torch.Tensor, where: str) -> torch.Tensor:
        """Return a tensor where it is wanted: itself, or a copy."""
        if world:
            return tensor.to(where)
        if place_of(tensor) == where:
            return tensor
        self.marks.forced = where
        try:
            return tensor.clone()
        finally:
            self.marks.forced = None

    def net(self, index: int) -> tuple[Net, Net]:
        """Return one of the modules."""
        return self.nets[index % len(self.nets)]

    def parameter(self, index: int, which: int) -> tuple[Any, Any]:
        """Return a parameter of a module, in both worlds."""
        pairs = list(zip(*(each.parameters() for each in self.net(index)), strict=True))
        return pairs[which % len(pairs)]

    def wholly(self, net: Net) -> str | None:
        """Return where a module is with all that it has, in float32; None for nowhere."""
        tensors = [*net.parameters(), *net.buffers()]
        places = {place_of(each) for each in tensors}
        dtypes = {each.dtype for each in tensors}
        is_one = len(places) == 1 and dtypes == {torch.float32}
        return places.pop() if is_one else None

    # -- modules --------------------------------------------------------------------

    @precondition(lambda self: len(self.nets) < 3)
    @rule()
    def new_net(self) -> None:
        """Make a module on the host."""

        def making(_world: int) -> Net:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return Net()

        self.nets.append(self.both(making))

    @rule(index=INDEX, where=WHERE)
    def move(self, index: int, where: str) -> None:
        """``module.to(device)``."""
        self.both(
            lambda world, net: net._apply(lambda each: self.put(world, each, where)),
            self.net(index),
        )

    @rule(index=INDEX, nth=st.integers(1, 12))
    def run_out_while_moving(self, index: int, nth: int) -> None:
        """``module.cuda()`` that fails half-way: what was moved stays moved."""
        count = 0

        def moving(each: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count += place_of(each) == "cpu"
            if count == nth:
                raise torch.OutOfMemoryError
            return self.put(0, each, "cuda")

        requests = 0

        def refuses(_index: int, _nbytes: int) -> bool:
            nonlocal requests
            requests += 1
            return requests == nth

        first, second = self.net(index)
        with self.marks:
            failed = is_out_of_memory(
                lambda: first._apply(moving)  # type: ignore[no-untyped-call]  # torch's
            )
        faults = current_machine().cards[0].faults
        faults.append(refuses)
        try:
            assert failed == is_out_of_memory(second.cuda)
        finally:
            faults.remove(refuses)

    @rule(index=INDEX, is_half=st.booleans())
    def cast(self, *, index: int, is_half: bool) -> None:
        """``module.half()`` and ``module.float()``."""
        self.both(
            lambda _world, net: net.half() if is_half else net.float(), self.net(index)
        )

    @precondition(lambda self: len(self.nets) < 3)
    @rule(index=INDEX)
    def duplicate(self, index: int) -> None:
        """``copy.deepcopy(module)``."""
        nets = self.net(index)
        self.nets.append(self.both(lambda _world, net: copy.deepcopy(net), nets))
        copied = self.nets[-1][0].state_dict(keep_vars=True)
        for name, source in nets[0].state_dict(keep_vars=True).items():
            mark_like(copied[name], source)

    @precondition(lambda self: len(self.nets) > 1)
    @rule(index=INDEX)
    def delete(self, index: int) -> None:
        """``del module``, with the graphs and optimisers that hold it."""
        gone = self.nets.pop(index % len(self.nets))
        self.graphs = [each for each in self.graphs if each[2] is not gone]
        self.optimizers.clear()

    @rule(index=INDEX, other=INDEX)
    def tie(self, index: int, other: int) -> None:
        """Two layers with one parameter."""
        self.optimizers.clear()

        def tying(_world: int, net: Net, source: Net) -> None:
            net.last.weight.grad = None
            net.last.weight = source.first.weight

        self.both(tying, self.net(index), self.net(other))

    @rule(index=INDEX, where=WHERE, assign=st.booleans())
    def save_and_load(self, *, index: int, where: str, assign: bool) -> None:
        """``torch.save`` of a state and ``load_state_dict`` from another device."""

        def loading(world: int, net: Net) -> None:
            buffer = io.BytesIO()
            torch.save(net.state_dict(), buffer)
            buffer.seek(0)
            if world:
                state = torch.load(buffer, map_location=where, weights_only=False)
            else:
                self.marks.forced = where
                state = torch.load(buffer, weights_only=False)  # with a user's class
                self.marks.forced = None
            net.load_state_dict(state, assign=assign)
            del state
            gc.collect()  # up to torch 2.8 cycles of save and load hold storages

        if assign:  # the parameters go
            self.optimizers.clear()
            self.both(lambda _world, net: net.zero_grad(), self.net(index))
        self.both(loading, self.net(index))

    # -- parameters -------------------------------------------------------------------

    @rule(index=INDEX, which=INDEX, where=WHERE)
    def set_data(self, index: int, which: int, where: str) -> None:
        """``p.data = p.data.to(device)``."""

        def setting(world: int, parameter: Any) -> None:
            parameter.data = self.put(world, parameter.data, where)

        self.both(setting, self.parameter(index, which))

    @rule(index=INDEX, which=INDEX, other=INDEX, another=INDEX)
    def share(self, index: int, which: int, other: int, another: int) -> None:
        """``p.data = q.data``: one memory for two parameters, whatever their device."""

        def setting(_world: int, parameter: Any, source: Any) -> None:
            parameter.grad = None
            parameter.data = source.data

        self.optimizers.clear()
        goal, source = self.parameter(index, which), self.parameter(other, another)
        if goal[0].shape == source[0].shape:
            self.both(setting, goal, source)

    @precondition(lambda self: len(self.views) < 4)
    @rule(index=INDEX, which=INDEX, is_transposed=st.booleans())
    def view(self, *, index: int, which: int, is_transposed: bool) -> None:
        """A view of a parameter, turned in place or cut."""

        def viewing(_world: int, parameter: Any) -> Any:
            alias = parameter.data
            if is_transposed and alias.dim() > 1:
                alias.t_()
                return alias
            return alias[:3]

        self.views.append(self.both(viewing, self.parameter(index, which)))

    @precondition(lambda self: self.views)
    @rule(index=INDEX, kind=st.sampled_from(["write", "copy", "drop", "move"]))
    def use_view(self, index: int, kind: str) -> None:
        """Write through a view, copy it with its memory, move it, drop it."""
        place = index % len(self.views)
        pair = self.views[place]
        if kind == "drop":
            del self.views[place]
        elif kind == "write":
            self.both(lambda _world, view: view.mul_(0.5), pair)
        elif kind == "copy":
            self.views[place] = self.both(
                lambda _world, view: copy.deepcopy([view, view[:1]])[1], pair
            )
            mark_like(self.views[place][0], pair[0])
        else:
            self.views[place] = self.both(
                lambda world, view: self.put(world, view, "cuda"), pair
            )

    @rule(index=INDEX, which=INDEX)
    def hook(self, index: int, which: int) -> None:
        """Hooks stay with their tensor wherever it goes."""

        def hooking(world: int, parameter: Any) -> None:
            seen = self.hooked[world]
            parameter.register_hook(lambda _grad: seen.append("hook"))
            parameter.register_post_accumulate_grad_hook(
                lambda _parameter: seen.append("later")
            )

        self.both(hooking, self.parameter(index, which))

    # -- gradients ----------------------------------------------------------------------

    @precondition(lambda self: len(self.graphs) < 2)
    @rule(index=INDEX)
    def forward(self, index: int) -> None:
        """Compute a loss and keep its graph."""
        nets = self.net(index)
        where = self.wholly(nets[0])
        if where is None:
            return

        def computing(world: int, net: Net) -> Any:
            return net(self.put(world, torch.ones(2, 8), where))

        first, second = self.both(computing, nets)
        leaves = list(nets[0].parameters())
        self.graphs.append((first, second, nets, leaves, where))

    @precondition(lambda self: self.graphs)
    @rule(index=INDEX, drops=st.booleans())
    def backward(self, *, index: int, drops: bool) -> None:
        """Go back through a graph whose module is where it was, or drop the graph.

        The parameters of that time count: the module may have others by now.
        """
        first, second, nets, leaves, where = self.graphs.pop(index % len(self.graphs))
        used = [*nets[0].parameters(), *leaves]
        used += [each.grad for each in used if each.grad is not None]
        is_there = self.wholly(nets[0]) == where and all(
            place_of(each) == where and each.dtype is torch.float32 for each in used
        )
        if drops or not is_there:
            return

        def going_back(_world: int, loss: Any) -> str:
            try:
                loss.backward()
            except RuntimeError as error:
                return str(error).partition("[")[0]
            return ""

        results = self.both(going_back, (first, second))
        assert results[0] == results[1]

    @rule(index=INDEX, to_none=st.booleans())
    def zero_grad(self, *, index: int, to_none: bool) -> None:
        """``module.zero_grad()``."""
        self.both(
            lambda _world, net: net.zero_grad(set_to_none=to_none), self.net(index)
        )

    @rule(index=INDEX, which=INDEX)
    def set_grad(self, index: int, which: int) -> None:
        """``p.grad = …``, a view of something larger."""

        def setting(_world: int, parameter: Any) -> None:
            shape = (2, *parameter.shape)
            parameter.grad = parameter.data.new_full(shape, 0.25)[1].detach()

        self.both(setting, self.parameter(index, which))

    @precondition(lambda self: len(self.buckets) < 2)
    @rule(index=INDEX)
    def bucket(self, index: int) -> None:
        """Gradients that are views of one tensor, as ``gradient_as_bucket_view`` has them.

        They are kept, as the C++ of DDP keeps them; backward adds to them in place.
        """
        nets = self.net(index)
        if self.wholly(nets[0]) is None:
            return

        def bucketing(_world: int, net: Net) -> torch.Tensor:
            parameters = list(net.parameters())
            total = sum(each.numel() for each in parameters)
            flat = parameters[0].data.new_zeros(total)
            start = 0
            for each in parameters:
                part = flat[start : start + each.numel()].view_as(each)
                start += each.numel()
                if each.grad is not None and each.grad.dtype is each.dtype:
                    part.copy_(each.grad)
                each.grad = part
            return flat

        places = {
            place_of(each.grad)
            for each in nets[0].parameters()
            if each.grad is not None
        }
        if places <= {self.wholly(nets[0])}:
            self.buckets.append(self.both(bucketing, nets))

    @precondition(lambda self: self.buckets)
    @rule(index=INDEX, drops=st.booleans())
    def reduce(self, *, index: int, drops: bool) -> None:
        """Change a bucket as a reduction over ranks does, or let go of it."""
        place = index % len(self.buckets)
        if drops:
            del self.buckets[place]
        else:
            self.both(lambda _world, flat: flat.div_(2), self.buckets[place])

    @rule(index=INDEX, which=INDEX, where=WHERE)
    def move_grad(self, index: int, which: int, where: str) -> None:
        """``p.grad.data = p.grad.data.to(device)``, whatever its owner's device is."""

        def setting(world: int, parameter: Any) -> None:
            if parameter.grad is not None:
                parameter.grad.data = self.put(world, parameter.grad.data, where)

        self.both(setting, self.parameter(index, which))

    @rule(index=INDEX, foreach=st.booleans())
    def step(self, *, index: int, foreach: bool) -> None:
        """A step of an optimiser with state, where all its tensors are together."""
        nets = self.net(index)
        where = self.wholly(nets[0])
        grads = [each.grad for each in nets[0].parameters() if each.grad is not None]
        if where is None or any(
            place_of(each) != where or each.dtype is not torch.float32 for each in grads
        ):
            return

        def stepping(_world: int, net: Net) -> Any:
            # The CPU's own foreach counts versions otherwise in a mode than without.
            optimizer = torch.optim.SGD(
                net.parameters(),
                lr=0.1,
                momentum=0.9,
                foreach=foreach and where == "cuda",
            )
            optimizer.step()
            return optimizer

        self.optimizers = [self.both(stepping, nets)]

    # -- what holds after each step -------------------------------------------------------

    def tensors(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield every tensor that Python can reach, in both worlds."""
        for first, second in self.nets:
            yield from zip(first.parameters(), second.parameters(), strict=True)
            yield from zip(first.buffers(), second.buffers(), strict=True)
            for one, other in zip(first.parameters(), second.parameters(), strict=True):
                assert (one.grad is None) is (other.grad is None)
                if one.grad is not None and other.grad is not None:
                    yield one.grad, other.grad
        yield from self.views
        yield from self.buckets

    def bucketed(self) -> set[int]:
        """Return buckets and the gradients that began in one, by id.

        Such gradients count versions together with their bucket, where they have moved
        to another device, too. Here one that has moved counts alone.
        """
        grads = [
            each.grad for first, _second in self.nets for each in first.parameters()
        ]
        return {id(flat) for flat, _other in self.buckets} | {
            id(each) for each in grads if each is not None and each._is_view()
        }

    @invariant()
    def tensors_agree(self) -> None:
        """Every tensor is in both worlds the same, and where it is said to be."""
        pairs = list(self.tensors())
        bucketed = self.bucketed()
        for one, other in pairs:
            assert place_of(one) == other.device.type
            assert isinstance(one, nn.Parameter) is isinstance(other, nn.Parameter)
            if other.device.type == "cpu" or type(one) in {Gain, Scale}:
                assert type(one) is type(other)
            assert getattr(one, "label", "") == getattr(other, "label", "")
            assert (one.dtype, one.shape, one.stride(), one.storage_offset()) == (
                other.dtype,
                other.shape,
                other.stride(),
                other.storage_offset(),
            )
            assert (one.requires_grad, one.is_leaf) == (
                other.requires_grad,
                other.is_leaf,
            )
            assert id(one) in bucketed or one._version == other._version
            torch.testing.assert_close(one.detach(), other.detach().cpu())
        for numbers in zip(
            *((storage_of(one), storage_of(other)) for one, other in pairs),
            strict=True,
        ):
            assert len(set(numbers)) == len({storage_of(p[0]) for p in pairs})
        assert len({(storage_of(a), storage_of(b)) for a, b in pairs}) == len(
            {storage_of(a) for a, _b in pairs}
        )
        assert self.hooked[0] == self.hooked[1]

    @invariant()
    def bytes_agree(self) -> None:
        """The card holds what is marked as the card's, and nothing else."""
        torch._C._cuda_clearCublasWorkspaces()
        assert self.marks.card_bytes() == torch.cuda.memory_allocated()


def is_out_of_memory(action: Callable[[], object]) -> bool:
    """Do something; tell whether memory ran out."""
    try:
        action()
    except torch.OutOfMemoryError:
        return True
    return False


TestPrograms = Programs.TestCase
TestPrograms.settings = settings(
    max_examples=EXAMPLES // 10,
    stateful_step_count=25,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking takes minutes
    suppress_health_check=list(HealthCheck),
)
