"""Recurrent layers and cells.

On a card C++ computes the gates of a cell in one kernel, after two products without
biases. It unrolls a layer step by step, each step with its own products; the CPU first
makes one product for all steps. C++ reads the tensors' device, which is the host, so
cells, and layers that cuDNN does not compute, are composed here.

A layer that a card leaves to cuDNN runs as on the CPU. cuDNN's own requests are not
simulated.
"""

from __future__ import annotations

from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pytest_gpumem.devices.simulated.operators.composing import by_formula, only
from pytest_gpumem.devices.simulated.operators.registry import register
from pytest_gpumem.devices.simulated.operators.requests import Results
from pytest_gpumem.devices.simulated.tensor import SimulatedTensor, make

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pytest_gpumem.devices.simulated.operators.checks import Operand
    from pytest_gpumem.devices.simulated.operators.registry import Kernel
    from pytest_gpumem.devices.simulated.operators.requests import Call, RequestStep

_aten = torch.ops.aten

# -- cells ----------------------------------------------------------------------------


def _sum_of_gates(
    by_input: torch.Tensor,
    by_hidden: torch.Tensor,
    input_bias: torch.Tensor | None,
    hidden_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both products with their biases."""
    if input_bias is not None:
        by_input = by_input + input_bias
    if hidden_bias is not None:
        by_hidden = by_hidden + hidden_bias
    return by_input, by_hidden


def _lstm_gates(
    by_input: torch.Tensor,
    by_hidden: torch.Tensor,
    cell: torch.Tensor,
    input_bias: torch.Tensor | None = None,
    hidden_bias: torch.Tensor | None = None,
) -> Any:
    """Run ``_thnn_fused_lstm_cell``: the new state, the new cell, and all gates."""
    parts = _sum_of_gates(by_input, by_hidden, input_bias, hidden_bias)
    taken, kept, new, shown = (parts[1] + parts[0]).chunk(4, 1)
    taken, kept, shown = taken.sigmoid(), kept.sigmoid(), shown.sigmoid()
    new = new.tanh()
    cell = kept * cell + taken * new
    return shown * cell.tanh(), cell, torch.cat([taken, kept, new, shown], 1)


def _lstm_gates_backward(  # noqa: PLR0917  # the operator's signature
    grad_hidden: torch.Tensor | None,
    grad_cell: torch.Tensor | None,
    cell: torch.Tensor,
    new_cell: torch.Tensor,
    gates: torch.Tensor,
    has_bias: bool,  # noqa: FBT001
) -> Any:
    """Run ``_thnn_fused_lstm_cell_backward_impl`` by the formulas of single operators."""
    if grad_hidden is None and grad_cell is None:
        return None, None, None
    taken, kept, new, shown = gates.chunk(4, 1)
    by_cell = torch.zeros_like(cell) if grad_cell is None else grad_cell
    if grad_hidden is None:
        by_shown = torch.zeros_like(shown)
    else:
        flattened = new_cell.tanh()
        by_shown = _aten.sigmoid_backward(grad_hidden * flattened, shown)
        by_cell = by_cell + _aten.tanh_backward(grad_hidden * shown, flattened)
    by_gates = torch.cat(
        [
            _aten.sigmoid_backward(by_cell * new, taken),
            _aten.sigmoid_backward(by_cell * cell, kept),
            _aten.tanh_backward(by_cell * taken, new),
            by_shown,
        ],
        1,
    )
    return by_gates, by_cell * kept, by_gates.sum(0) if has_bias else None


def _gru_gates(
    by_input: torch.Tensor,
    by_hidden: torch.Tensor,
    hidden: torch.Tensor,
    input_bias: torch.Tensor | None = None,
    hidden_bias: torch.Tensor | None = None,
) -> Any:
    """Run ``_thnn_fused_gru_cell``: the new state, and five numbers per element."""
    parts = _sum_of_gates(by_input, by_hidden, input_bias, hidden_bias)
    (in_reset, in_kept, in_new), (reset, kept, shown) = (
        each.chunk(3, 1) for each in parts
    )
    reset, kept = (reset + in_reset).sigmoid(), (kept + in_kept).sigmoid()
    new = (in_new + shown * reset).tanh()
    saved = torch.cat([reset, kept, new, hidden, shown], 1)
    return (hidden - new) * kept + new, saved


def _gru_gates_backward(
    grad: torch.Tensor,
    saved: torch.Tensor,
    has_bias: bool,  # noqa: FBT001  # the operator's signature
) -> Any:
    """Run ``_thnn_fused_gru_cell_backward`` by the formulas of single operators."""
    reset, kept, new, hidden, shown = saved.chunk(5, 1)
    by_product = grad * kept
    by_new = _aten.tanh_backward(grad - by_product, new)
    by_reset = _aten.sigmoid_backward(by_new * shown, reset)
    by_kept = _aten.sigmoid_backward(grad * (hidden - new), kept)
    by_input = torch.cat([by_reset, by_kept, by_new], 1)
    by_hidden = torch.cat([by_reset, by_kept, by_new * reset], 1)
    biases = (by_input.sum(0), by_hidden.sum(0)) if has_bias else (None, None)
    return by_input, by_hidden, by_product, *biases


def _gates_first(_call: Call) -> Iterator[RequestStep]:
    """Request the workspace first: the last result."""
    yield Results(len(_call.results) - 1)


_FUSED = "cuda/RNN.cu"

for _name, _kernel in (
    ("_thnn_fused_lstm_cell", _lstm_gates),
    ("_thnn_fused_gru_cell", _gru_gates),
):
    register(
        _name,
        compute=only(_kernel),
        requests=_gates_first,
        source=f"{_FUSED}, {_name}_cuda",
    )
register(
    "_thnn_fused_lstm_cell_backward_impl",
    compute=only(_lstm_gates_backward),
    source=f"{_FUSED}, _thnn_fused_lstm_cell_backward_impl_cuda",
)
register(
    "_thnn_fused_gru_cell_backward",
    compute=only(_gru_gates_backward),
    source=f"{_FUSED}, _thnn_fused_gru_cell_backward_cuda",
)


class _Weights(NamedTuple):
    """The parameters of one layer in one direction: ``CellParams``."""

    by_input: torch.Tensor
    by_hidden: torch.Tensor
    input_bias: torch.Tensor | None = None
    hidden_bias: torch.Tensor | None = None
    projection: torch.Tensor | None = None

    def products(
        self, source: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the products without biases."""
        by_input = torch.matmul(source, self.by_input.t())
        return by_input, torch.matmul(hidden, self.by_hidden.t())


#: The state of a layer: one tensor, or two of an LSTM.
_State = tuple[torch.Tensor, ...]


def _lstm_step(source: torch.Tensor, state: _State, weights: _Weights) -> _State:
    hidden, cell = state
    products = weights.products(source, hidden)
    biases = weights.input_bias, weights.hidden_bias
    hidden, cell, _gates = _aten._thnn_fused_lstm_cell.default(*products, cell, *biases)
    if weights.projection is not None:
        hidden = torch.matmul(hidden, weights.projection.t())
    return hidden, cell


def _gru_step(source: torch.Tensor, state: _State, weights: _Weights) -> _State:
    products = weights.products(source, state[0])
    biases = weights.input_bias, weights.hidden_bias
    hidden, _saved = _aten._thnn_fused_gru_cell.default(*products, *state, *biases)
    return (hidden,)


def _simple_step(nonlinearity: Callable[..., torch.Tensor]) -> Any:
    def step(source: torch.Tensor, state: _State, weights: _Weights) -> _State:
        linear = torch.nn.functional.linear
        hidden = linear(state[0], weights.by_hidden, weights.hidden_bias)
        by_input = linear(source, weights.by_input, weights.input_bias)
        made = nonlinearity(hidden.add_(by_input))
        del by_input  # as in C++, the newer tensor is freed first
        return (made,)

    return step


def _fits(
    source: torch.Tensor, state: Sequence[torch.Tensor], weights: _Weights
) -> bool:
    """Return whether C++ would fuse: ``check_rnn_cell_forward_input``, and a card."""
    return (
        source.is_cuda
        and source.dim() == 2  # noqa: PLR2004  # dimensions of a matrix
        and source.shape[1] == weights.by_input.shape[1]
        and all(
            each.dim() == 2  # noqa: PLR2004  # dimensions of a matrix
            and each.shape == (source.shape[0], weights.by_hidden.shape[1])
            for each in state
        )
    )


def _cell(step: Any) -> Callable[[Any], Kernel]:
    """Return a function that makes a cell's kernel; C++ refuses wrong operands."""

    def making(func: Any) -> Kernel:
        def kernel(source: torch.Tensor, state: Any, *parameters: Any) -> Any:
            states = (state,) if isinstance(state, torch.Tensor) else tuple(state)
            weights = _Weights(*parameters)
            if not _fits(source, states, weights):
                return func.decompose(source, state, *parameters)
            made = step(source, states, weights)
            return made[0] if isinstance(state, torch.Tensor) else made

        return kernel

    return making


register("lstm_cell", composed=_cell(_lstm_step), source="RNN.cpp, struct LSTMCell")
register("gru_cell", composed=_cell(_gru_step), source="RNN.cpp, struct GRUCell")

# -- layers ----------------------------------------------------------------------------


class _Packed(NamedTuple):
    """Sequences of several lengths: the rows of all steps, and the rows of each step."""

    data: torch.Tensor
    sizes: list[int]

    def steps(self) -> tuple[torch.Tensor, ...]:
        """Return the rows of each step."""
        return tuple(
            self.data.narrow(0, end - size, size)
            for size, end in zip(self.sizes, accumulate(self.sizes), strict=True)
        )


def _run_steps(
    step: Any, steps: Sequence[torch.Tensor], state: _State, weights: _Weights
) -> tuple[list[torch.Tensor], _State]:
    """Run a layer over equally large steps."""
    shown = []
    for each in steps:
        state = step(each, state, weights)
        shown.append(state[0])
    return shown, state


def _rows(state: _State, start: int, end: int) -> _State:
    return tuple(each.narrow(0, start, end - start) for each in state)


def _joined(states: Sequence[_State]) -> _State:
    return tuple(torch.cat(each, 0) for each in zip(*states, strict=True))


def _run_shrinking(
    step: Any, steps: Sequence[torch.Tensor], state: _State, weights: _Weights
) -> tuple[list[torch.Tensor], _State]:
    """Run a layer over steps of which each has fewer rows: ``PackedLayer``."""
    shown, ended, rows = [], [], len(steps[0])
    for each in steps:
        if len(each) < rows:
            ended.append(_rows(state, len(each), rows))
            state = _rows(state, 0, len(each))
            rows = len(each)
        state = step(each, state, weights)
        shown.append(state[0])
    return shown, _joined([state, *reversed(ended)])


def _run_growing(
    step: Any, steps: Sequence[torch.Tensor], start: _State, weights: _Weights
) -> tuple[list[torch.Tensor], _State]:
    """Run a layer in reverse over such steps: ``ReversedPackedLayer``."""
    shown, rows = [], len(steps[-1])
    state = _rows(start, 0, rows)
    for each in reversed(steps):
        if len(each) > rows:
            state = _joined([state, _rows(start, rows, len(each))])
            rows = len(each)
        state = step(each, state, weights)
        shown.append(state[0])
    return shown[::-1], state


def _run_reversed(
    step: Any, steps: Sequence[torch.Tensor], state: _State, weights: _Weights
) -> tuple[list[torch.Tensor], _State]:
    shown, state = _run_steps(step, steps[::-1], state, weights)
    return shown[::-1], state


def _run_layer(
    step: Any, source: Any, states: Sequence[_State], weights: Sequence[_Weights]
) -> tuple[Any, list[_State]]:
    """Run one layer, in one direction or in both."""
    is_packed = isinstance(source, _Packed)
    steps = source.steps() if is_packed else source.unbind(0)
    if not steps:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    runs = (_run_shrinking, _run_growing) if is_packed else (_run_steps, _run_reversed)
    join = torch.cat if is_packed else torch.stack
    shown, ended = [], []
    for run, state, each in zip(runs, states, weights, strict=False):
        outputs, state_after = run(step, steps, state, each)
        shown.append(join(outputs, 0))
        ended.append(state_after)
    made = shown[0] if len(shown) == 1 else torch.cat(shown, -1)
    return _Packed(made, source.sizes) if is_packed else made, ended


def _compare_devices(
    source: torch.Tensor,
    hidden: list[torch.Tensor],
    parameters: list[torch.Tensor],
) -> None:
    for name, tensors in (("hidden", hidden), ("parameter", parameters)):
        for each in tensors:
            if each.device != source.device:
                raise RuntimeError(
                    f"Input and {name} tensors are not at the same device, found input "
                    f"tensor at {source.device} and {name} tensor at {each.device}"
                )


def _gathered(
    parameters: Sequence[torch.Tensor], *, has_biases: bool, has_projections: bool
) -> list[_Weights]:
    """Return the parameters of each layer and direction: ``gather_params``."""
    count = (4 if has_biases else 2) + has_projections
    made = []
    for start in range(0, len(parameters), count):
        own = list(parameters[start : start + count])
        projection = own.pop() if has_projections else None
        made.append(_Weights(*own)._replace(projection=projection))
    return made


def _unrolled(step: Any) -> Callable[[Any], Kernel]:
    """Return a function that makes a layer's kernel, unrolled if cuDNN does not run."""

    def making(func: Any) -> Kernel:
        on_cpu = by_formula(func)

        def kernel(source: torch.Tensor, *others: Any) -> Any:
            is_packed = func._overloadname == "data"
            given = others
            sizes: Any = others[
                0
            ]  # batch sizes, or the hidden state if the layer is not packed
            others = others[1:] if is_packed else others
            hidden, parameters, has_biases, layers, rate, is_training, both = others[:7]
            states = (hidden,) if isinstance(hidden, torch.Tensor) else tuple(hidden)
            _compare_devices(source, list(states), parameters)
            is_cudnns = torch._C._get_cudnn_enabled() and source.numel()
            is_mixed = any(
                each.dtype != source.dtype for each in (*states, *parameters)
            )
            if is_cudnns or is_mixed:
                run = func.decompose if torch.is_inference_mode_enabled() else on_cpu
                return run(source, *given)
            is_by_batch = not is_packed and others[7]
            rows = source.transpose(0, 1) if is_by_batch else source
            stack = _Stack(step, layers, 2 if both else 1, rate if is_training else 0)
            has_projections = len({each.shape[2] for each in states}) > 1
            weights = _gathered(
                parameters, has_biases=has_biases, has_projections=has_projections
            )
            made, ended = stack.run(
                _Packed(rows, sizes.tolist()) if is_packed else rows,
                list(zip(*(each.unbind(0) for each in states), strict=True)),
                weights,
            )
            output = made.data if is_packed else made
            if is_by_batch:
                output.transpose_(0, 1)
            after = [torch.stack(each, 0) for each in zip(*ended, strict=True)]
            ended.reverse()  # Python frees a list's last element first, C++ the first one
            return (output, *after)

        return kernel

    return making


class _Stack(NamedTuple):
    """Layers one after the other: ``apply_layer_stack``.

    Attributes:
        step: Runs a cell.
        layers: The number of layers.
        directions: 1, or 2.
        rate: The rate of the dropout between layers; 0 for none.
    """

    step: Any
    layers: int
    directions: int
    rate: float

    def run(
        self, source: Any, states: Sequence[_State], weights: Sequence[_Weights]
    ) -> tuple[Any, list[_State]]:
        """Run the layers; return the output, and the states at the end."""
        ended: list[_State] = []
        for layer in range(self.layers):
            own = slice(layer * self.directions, (layer + 1) * self.directions)
            source, after = _run_layer(self.step, source, states[own], weights[own])
            ended += after
            if self.rate and layer < self.layers - 1:
                source = _dropped(source, self.rate)
        return source, ended


def _dropped(source: Any, rate: float) -> Any:
    if isinstance(source, _Packed):
        return _Packed(torch.dropout(source.data, rate, train=True), source.sizes)
    return torch.dropout(source, rate, train=True)


for _name, _step in (
    ("lstm", _lstm_step),
    ("gru", _gru_step),
    ("rnn_relu", _simple_step(torch.relu)),
    ("rnn_tanh", _simple_step(torch.tanh)),
):
    register(
        _name,
        composed=_unrolled(_step),
        source="RNN.cpp, check_attributes and apply_layer_stack",
    )


def _layer(_func: Any, operands: list[Operand]) -> None:
    """Check the devices of one LSTM layer, the operator by which the CPU computes an LSTM.

    For a layer without biases, C++ creates biases on the host.
    """
    named = {each.name: each.tensor for each in operands}
    _compare_devices(
        named["input"],
        [named["hx_"], named["cx_"]],
        [named["weight0"], named["weight1"]],
    )


register(
    "mkldnn_rnn_layer",
    check=_layer,
    source="RNN.cpp, check_attributes; mkldnn/RNN.cpp, mkldnn_rnn_layer",
)


def _pack_padded_sequence(args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
    """Run ``_pack_padded_sequence``; lengths and batch sizes are on the host.

    Raises:
        RuntimeError: The lengths are on a card (torch's message).
    """
    source, lengths, batch_first = args
    if isinstance(lengths, SimulatedTensor):
        raise RuntimeError(  # noqa: TRY004  # torch raises this class
            "'lengths' argument should be a 1D CPU int64 tensor, but got "
            f"{lengths.dim()}D {lengths.device} Long tensor"
        )
    data, batch_sizes = _aten._pack_padded_sequence.default(
        source._gpumem_value, lengths, batch_first
    )
    return make(data, source._gpumem_card), batch_sizes


def _pad_sequence(
    sequences: list[torch.Tensor],
    batch_first: bool = False,  # noqa: FBT001, FBT002  # the operator's signature
    padding_value: float = 0.0,
    padding_side: str = "right",
) -> torch.Tensor:
    """Run ``pad_sequence``: one large tensor is filled row by row."""
    longest = max(len(sequence) for sequence in sequences)
    first = sequences[0]
    outer = (len(sequences), longest) if batch_first else (longest, len(sequences))
    padded = first.new_full((*outer, *first.shape[1:]), padding_value)
    for index, sequence in enumerate(sequences):
        start = longest - len(sequence) if padding_side == "left" else 0
        row = padded.select(0 if batch_first else 1, index)
        row.narrow(0, start, len(sequence)).copy_(sequence)
    return padded


def _pad_packed_sequence(
    data: torch.Tensor,
    batch_sizes: torch.Tensor,
    batch_first: bool,  # noqa: FBT001  # the operator's signature
    padding_value: float,
    total_length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run ``_pad_packed_sequence``: steps of equal batch size are copied together."""
    sizes = batch_sizes.tolist()
    longest = max(total_length, len(sizes))
    padded = data.new_full((longest, sizes[0], *data.shape[1:]), padding_value)
    start = offset = 0
    for size, steps in ((size, len(list(same))) for size, same in groupby(sizes)):
        chunk = data.narrow(0, offset, size * steps)
        goal = padded.narrow(0, start, steps).narrow(1, 0, size)
        goal.copy_(chunk.view(steps, size, *data.shape[1:]))
        start, offset = start + steps, offset + size * steps
    lengths = [sum(size > row for size in sizes) for row in range(sizes[0])]
    return (
        padded.transpose(0, 1) if batch_first else padded,
        torch.tensor(lengths, device="cpu"),
    )


_PACKED = "PackedSequence.cpp"

register(
    "_pack_padded_sequence",
    handler=_pack_padded_sequence,
    source=f"{_PACKED}, checkLongTensor",
)
register(
    "pad_sequence", composed=only(_pad_sequence), source=f"{_PACKED}, pad_sequence"
)
register(
    "_pad_packed_sequence",
    composed=only(_pad_packed_sequence),
    source=f"{_PACKED}, _pad_packed_sequence",
)
