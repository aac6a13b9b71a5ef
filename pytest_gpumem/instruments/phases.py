"""What the program is doing when it asks for memory: a load, a forward, ….

A request's phase is read off the Python stack of the thread that makes it, from the
inside out, so that it needs no cooperation from user code and holds in a loader's
worker threads. Only an armed rule that names a phase looks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pytest_gpumem.stacks import calling_frame, frames_from

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import FrameType

#: Functions whose work is a load: the file's end and the function names; an empty set
#: means every function of the file.
_LOADS: Final[tuple[tuple[str, frozenset[str]], ...]] = (
    ("/transformers/core_model_loading.py", frozenset()),
    ("/transformers/modeling_utils.py", frozenset({"from_pretrained"})),
    ("/accelerate/big_modeling.py", frozenset()),
    ("/accelerate/utils/modeling.py", frozenset()),
    ("/safetensors/torch.py", frozenset()),
    ("/torch/serialization.py", frozenset()),
    (
        "/torch/nn/modules/module.py",
        frozenset({"to", "cuda", "_apply", "load_state_dict", "to_empty"}),
    ),
)
_OPTIMIZERS: Final = ("/torch/optim/",)
_BACKWARD: Final = ("/torch/autograd/__init__.py", "/torch/autograd/graph.py")
_MODULE_CALLS: Final = frozenset({"_call_impl", "_wrapped_call_impl"})


def current_phase(frame: FrameType | None = None) -> str:
    """Return the phase of the calling code: load, forward, backward, optimizer, other.

    Args:
        frame: Where to begin; None means the caller.

    Limits: a model built on a card inside its own ``forward`` counts as forward; a
    backward's gradient hooks count as backward.
    """
    return phase_at(
        (each.f_code.co_filename, each.f_code.co_name)
        for each in frames_from(frame or calling_frame())
    )


def phase_at(functions: Iterable[tuple[str, str]]) -> str:
    """Return the phase of functions, each a file and a name, from the inside out."""
    found = (_phase_of(filename, function) for filename, function in functions)
    return next((phase for phase in found if phase is not None), "other")


def _phase_of(filename: str, function: str) -> str | None:
    if function in _MODULE_CALLS and filename.endswith("/torch/nn/modules/module.py"):
        return "forward"
    for ending, functions in _LOADS:
        if filename.endswith(ending) and (not functions or function in functions):
            return "load"
    if filename.endswith(_BACKWARD):
        return "backward"
    if any(part in filename for part in _OPTIMIZERS):
        return "optimizer"
    return None
