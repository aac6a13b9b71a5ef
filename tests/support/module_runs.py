"""PyTorch's databases of modules and optimisers, run on a simulated card and the CPU."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Final

import torch
from operator_runs import (
    Gathered,
    bytes_left,
    judge,
    name_of,
    quietly,
    seed,
)
from torch.utils._pytree import tree_leaves, tree_map
from torch_databases import module_db, optim_db

if TYPE_CHECKING:
    from operator_differences import Finding

#: By their names, which are unique.
MODULES: Final = {each.formatted_name: each for each in module_db}
OPTIMISERS: Final[dict[str, Any]] = {
    vars(each)["optim_cls"].__name__: each for each in optim_db
}
MODULE_TYPES: Final = (torch.float32, torch.float16)
#: How an optimiser goes through its parameters.
IMPLEMENTATIONS: Final = ("for loop", "foreach", "fused")
STEPS: Final = 2


# -- modules ----------------------------------------------------------------------------


def run_module(name: str, limit: int | None) -> list[Finding]:
    """Run a module forward and backward, moved to the card and made there.

    Args:
        name: The module's name in the database.
        limit: How many sets of inputs at most; None for all.
    """
    info = MODULES[name]
    findings: list[Finding] = []
    for dtype in MODULE_TYPES:
        if dtype in info.dtypes:
            findings += _run_module_type(info, dtype, limit)
    return findings


def _run_module_type(info: Any, dtype: torch.dtype, limit: int | None) -> list[Finding]:
    gathered = Gathered(info.formatted_name, name_of(dtype))
    with quietly():
        held = torch.cuda.memory_allocated()
        for training in (True, False) if info.train_and_eval_differ else (True,):
            for inputs in _module_inputs(info, dtype, training)[:limit]:
                _judge_module(info, dtype, inputs, gathered, training=training)
            inputs = None
        gathered.add("bytes left", bytes_left(held))
    return gathered.findings()


def _module_inputs(info: Any, dtype: torch.dtype, training: bool) -> list[Any]:  # noqa: FBT001  # torch's own order
    seed()
    return list(
        info.module_inputs_func(
            info, device="cpu", dtype=dtype, requires_grad=True, training=training
        )
    )


def _judge_module(
    info: Any, dtype: torch.dtype, inputs: Any, gathered: Gathered, *, training: bool
) -> None:
    made, called = inputs.constructor_input, inputs.forward_input

    def build() -> Any:
        seed()
        module = info.module_cls(*made.args, **made.kwargs)
        return module.to(dtype).train(training)

    def run(module: Any, device: str) -> Any:
        args, options = tree_map(
            lambda each: _on(each, device), (called.args, called.kwargs)
        )
        seed()
        results = module(*args, **options)
        wanted = [
            each
            for each in tree_leaves(results)
            if isinstance(each, torch.Tensor) and each.requires_grad
        ]
        torch.autograd.backward(wanted, [torch.ones_like(each) for each in wanted])
        leaves = [
            each for each in tree_leaves((args, options)) if hasattr(each, "grad")
        ]
        gradients = [each.grad for each in (*leaves, *module.parameters())]
        return results, gradients, list(module.buffers())

    gathered.add(
        "moved",
        judge(
            lambda: run(build().to("cuda"), "cuda"),
            lambda: run(build(), "cpu"),
        ),
    )
    gathered.add(
        "copied",
        judge(
            lambda: run(copy.deepcopy(build().cuda()), "cuda"),
            lambda: run(build(), "cpu"),
        ),
    )

    def back() -> Any:
        module = build().cuda()
        run(module, "cuda")
        module.cpu()
        places = {each.device.type for each in module.state_dict().values()}
        places |= {
            each.grad.device.type
            for each in module.parameters()
            if each.grad is not None
        }
        assert places <= {"cpu"}, places  # what is to be shown
        module.zero_grad()
        return tree_map(_to_card, run(module, "cpu"))

    def twice() -> Any:
        module = build()
        run(module, "cpu")
        module.zero_grad()
        return run(module, "cpu")

    gathered.add("moved back", judge(back, twice))


def _to_card(value: Any) -> Any:
    return value.cuda() if isinstance(value, torch.Tensor) else value


def _on(value: Any, device: str) -> Any:
    """Return a leaf on a device, with the gradients that it requires."""
    if not isinstance(value, torch.Tensor):
        return value
    moved = value.detach().clone().to(device)
    return moved.requires_grad_(value.requires_grad)


# -- optimisers -------------------------------------------------------------------------


def run_optimiser(name: str, limit: int | None) -> list[Finding]:
    """Take two steps of an optimiser in each implementation and setting.

    Args:
        name: The optimiser's name.
        limit: How many settings at most; None for all.
    """
    info = OPTIMISERS[name]
    gathered = Gathered(name, name_of(torch.float32))
    with quietly():
        held = torch.cuda.memory_allocated()
        for setting in info.optim_inputs_func("cuda")[:limit]:
            for way in IMPLEMENTATIONS:
                if way == "for loop" or way in info.supported_impls:
                    _judge_steps(info, setting.kwargs, way, gathered)
        gathered.add("bytes left", bytes_left(held))
    return gathered.findings()


def _judge_steps(info: Any, setting: Any, way: str, gathered: Gathered) -> None:
    options = dict(setting)
    options |= {
        each: way == each
        for each in IMPLEMENTATIONS[1:]
        if each in info.supported_impls
    }
    on_host = dict(options)
    if "cpu" not in info.supports_fused_on:
        on_host["fused"] = False
    on_host = {key: value for key, value in on_host.items() if key in options}
    if on_host.get("capturable"):  # a card's alone
        on_host |= {
            each: False for each in ("capturable", "foreach") if each in on_host
        }
    gathered.add(
        way,
        judge(
            lambda: _steps(info, options, "cuda"), lambda: _steps(info, on_host, "cpu")
        ),
    )


def _steps(info: Any, options: Any, device: str) -> Any:
    seed()
    has_bias = info.optim_cls is not torch.optim.Muon  # it steps matrices alone
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4, has_bias), torch.nn.Linear(4, 2, has_bias)
    ).to(device)
    source = torch.linspace(-1, 1, 6).reshape(2, 3).to(device)
    options = tree_map(lambda each: _on(each, device), options)
    optimiser = info.optim_cls(list(model.parameters()), **options)

    def closure() -> Any:
        optimiser.zero_grad()
        loss = model(source).square().sum()
        loss.backward()
        if info.only_supports_sparse_grads:
            for each in model.parameters():
                gradient: Any = each.grad
                each.grad = gradient.to_sparse()
        return loss

    for _step in range(STEPS):
        if info.step_requires_closure:
            optimiser.step(closure)
        else:
            closure()
            optimiser.step()
    return list(model.parameters()), [
        {
            key: value
            for key, value in state.items()
            if isinstance(value, torch.Tensor) and value.dim()
        }
        for state in optimiser.state.values()
    ]


__all__ = ["MODULES", "OPTIMISERS", "run_module", "run_optimiser"]
