"""Run every architecture on the CPU and on a simulated card, and compare.

Run: ``python tests/upstream/architectures.py [--out FILE] [--family F] [--write]
[NAME ...]``; models that have a row in the file are not run again. For each model: a
forward, a backward, a generation where it can generate, and the bytes that are left on
the card once all is deleted. Each model has a process of its own with a limit of time and
of memory: what crashes is one row. Values are compared bit by bit.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import json
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from architecture_page import text_of
from subjects import FAMILIES, Subject
from torch.overrides import TorchFunctionMode

from pytest_gpumem import simulated_device

#: What one model may take: seconds of processor time, and bytes of address space.
LIMIT_S: Final = 120
LIMIT_BYTES: Final = 12 * 2**30
CARD: Final = "A100-80GB"
PAGE: Final = Path(__file__).parents[2] / "docs" / "architectures.md"
#: How deep tensors of an output are looked for.
DEPTH: Final = 5
NEW_TOKENS: Final = 4


@dataclass
class Row:
    """What one model did.

    Attributes:
        family: The library.
        name: The class, or the library's name of the model.
        cpu: ``ran``, or why it did not run on the CPU.
        forward: ``equal``, ``differs: …`` or an error; empty where not tried.
        backward: The same, of the gradients of all parameters.
        generate: The same, of the tokens.
        bytes_left: Bytes on the card once everything is deleted.
        bytes_cached: Bytes that the library's own function caches kept until then.
        parameters: How many.
        seconds: How long it took.
        details: The end of a traceback.
        beside: What the CPU did not do.
        by_rows: Whether the CPU's group norms were given rows, as a card's are.
        versions: Those of the library and of torch, as text.
    """

    family: str
    name: str
    cpu: str = "crashed"
    forward: str = ""
    backward: str = ""
    generate: str = ""
    bytes_left: int = 0
    bytes_cached: int = 0
    parameters: int = 0
    seconds: float = 0.0
    details: str = ""
    beside: list[str] = field(default_factory=list)
    by_rows: bool = False
    versions: str = ""


def _tensors(output: Any, deeper: int = DEPTH) -> list[torch.Tensor]:
    """Return the tensors of a model's output, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    if deeper == 0:
        return []
    if isinstance(output, dict):
        output = output.values()
    elif not isinstance(output, (list, tuple)):
        # A cache, or what else a model returns.
        return []
    return [found for each in output for found in _tensors(each, deeper - 1)]


def _loss(output: Any) -> torch.Tensor | None:
    used = [
        each.abs().float().pow(2).mean()
        for each in _tensors(output)
        if (each.is_floating_point() or each.is_complex()) and each.requires_grad
    ]
    return torch.stack(used).sum() if used else None


def _difference(expected: torch.Tensor, found: torch.Tensor) -> str:
    """Say how two tensors differ; empty if they are equal bit by bit."""
    if found.device.type != "cuda":
        return f"on {found.device}"
    if expected.dtype != found.dtype or expected.shape != found.shape:
        return f"{found.dtype} {tuple(found.shape)} instead of {expected.dtype} {tuple(expected.shape)}"
    host = found.detach().cpu()
    if torch.equal(expected, host):
        return ""
    same = (expected == host) | (expected.isnan() & host.isnan())
    if bool(same.all()):
        return ""
    if not expected.is_floating_point():
        return f"{int((~same).sum())} of {same.numel()} elements"
    worst = (expected.double() - host.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    return f"{int((~same).sum())} of {same.numel()} elements, by {worst:.2g} of {scale:.2g}"


def _compare(expected: list[torch.Tensor], found: list[torch.Tensor]) -> str:
    if len(expected) != len(found):
        return f"{len(found)} tensors instead of {len(expected)}"
    words = [_difference(a, b) for a, b in zip(expected, found, strict=True)]
    first = next((each for each in words if each), "")
    return f"differs: {first}" if first else "equal"


def _compare_gradients(expected: torch.nn.Module, found: torch.nn.Module) -> str:
    there = dict(found.named_parameters())
    for name, mine in expected.named_parameters():
        its = there[name].grad
        if (mine.grad is None) != (its is None):
            return f"differs: {name}: {'no' if its is None else 'a'} gradient"
        if mine.grad is None or its is None:
            continue
        words = _difference(mine.grad, its)
        if words:
            return f"differs: {name}: {words}"
    return "equal"


def _generate(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    # Some models write their first token into what they are given.
    given = {
        name: copy.deepcopy(each)
        for name, each in inputs.items()
        if name != "decoder_input_ids"
    }
    torch.manual_seed(0)
    tokens = model.generate(
        **given, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True
    )
    return _tensors(tokens)[0]


def _moved(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_moved, value))
    return value.to("cuda") if isinstance(value, torch.Tensor) else value


def _says(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:300]}"


class _Reference(NamedTuple):
    """What a model did on the CPU.

    Attributes:
        model: The model, with gradients where it has gone backward.
        fresh: Its copy from before.
        inputs: What it was called with.
        output: The tensors that it returned.
        went_back: Whether it could go backward.
        tokens: What it generated; None if it cannot.
    """

    model: Any
    fresh: Any
    inputs: dict[str, Any]
    output: list[torch.Tensor]
    went_back: bool
    tokens: torch.Tensor | None


def _first_that_runs(subject: Subject, row: Row) -> tuple[Any, Any, Any, Any] | None:
    """Return a model that runs on the CPU, its copy from before, its inputs and output."""
    reasons: list[str] = []
    tried = subject.make()
    while True:
        try:
            pair = next(tried, None)
        except Exception as error:  # noqa: BLE001  # a stranger's constructor
            reasons.append(_says(error))
            break
        if pair is None:
            break
        model, inputs = pair
        try:
            fresh = copy.deepcopy(model)
            torch.manual_seed(0)
            return model, fresh, inputs, model(**inputs)
        except Exception as error:  # noqa: BLE001  # a stranger's forward
            reasons.append(_says(error))
    row.cpu = reasons[0] if reasons else "nothing to try"
    row.details = "\n".join(dict.fromkeys(reasons))[:1500]
    return None


def _on_host(subject: Subject, row: Row) -> _Reference | None:
    """Run a model on the CPU; None if it does not run."""
    found = _first_that_runs(subject, row)
    if found is None:
        return None
    model, fresh, inputs, output = found
    row.cpu = "ran"
    row.parameters = sum(each.numel() for each in model.parameters())
    went_back, tokens = False, None
    loss = _loss(output)
    try:
        if loss is not None:
            torch.manual_seed(0)
            loss.backward()
            went_back = True
    except Exception as error:  # noqa: BLE001  # not made to train
        row.beside.append(f"backward on the CPU: {_says(error)}")
    try:
        if callable(getattr(model, "can_generate", None)) and model.can_generate():
            tokens = _generate(model, inputs)
    except Exception as error:  # noqa: BLE001  # its inputs are not a generation's
        row.beside.append(f"generate on the CPU: {_says(error)}")
    expected = [each.detach() for each in _tensors(output)]
    return _Reference(model, fresh, inputs, expected, went_back, tokens)


class _RowsForGroupNorms(TorchFunctionMode):
    """Give group norms of the CPU what a card gives its own: values stored by rows.

    The CPU's kernel for channels last, and its convolutions after it, sum in another order
    than those for rows. Source: ``group_norm.cpp``, ``group_norm``.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.nn.functional.group_norm:
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))


def _judge(subject: Subject, row: Row) -> None:
    """Fill in a row."""
    _compare_on_both(subject, row)
    if row.forward.startswith("differs"):
        again = Row(subject.family, subject.name, by_rows=True)
        with _RowsForGroupNorms():
            _compare_on_both(subject, again)
        if again.forward == "equal":
            vars(row).update(vars(again))


def _compare_on_both(subject: Subject, row: Row) -> None:
    reference = _on_host(subject, row)
    if reference is None:
        return
    with simulated_device(CARD):
        _on_card(row, reference)
        if row.details:
            return
        reference = None  # its copy was on the card
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()  # the only way
        row.bytes_left = torch.cuda.memory_allocated()
        if row.bytes_left and _forget_cached():
            gc.collect()
            row.bytes_cached = row.bytes_left - torch.cuda.memory_allocated()
            row.bytes_left -= row.bytes_cached


def _forget_cached() -> int:
    """Empty the caches of functions (``functools.lru_cache``); return how many."""
    caches = [
        each
        for each in gc.get_objects()
        if isinstance(each, functools._lru_cache_wrapper)  # no public name
        and (each.__module__ or "").partition(".")[0] in FAMILIES
        and each.cache_info().currsize
    ]
    for each in caches:
        each.cache_clear()
    return len(caches)


def _on_card(row: Row, reference: _Reference) -> None:
    """Run the copy on the card, beside what the model did on the CPU."""
    fresh, stage = reference.fresh, "forward"
    try:
        fresh.to("cuda")
        inputs = {name: _moved(each) for name, each in reference.inputs.items()}
        torch.manual_seed(0)
        output = fresh(**inputs)
        row.forward = _compare(reference.output, _tensors(output))
        stage = "backward"
        if reference.went_back:
            loss = _loss(output)
            if loss is None:
                row.backward = "differs: nothing to go back from"
            else:
                torch.manual_seed(0)
                loss.backward()
                row.backward = _compare_gradients(reference.model, fresh)
        stage = "generate"
        if reference.tokens is not None:
            row.generate = _compare([reference.tokens], [_generate(fresh, inputs)])
    except Exception as error:  # noqa: BLE001  # the finding
        setattr(row, stage, _says(error))
        row.details = traceback.format_exc()[-3500:]


def _alone(subject: Subject) -> Row:
    """Run a model in a forked process, and return its row whatever happens there."""
    row, began_s = Row(subject.family, subject.name), time.monotonic()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        # Of the processor: on a busy machine the same models are too slow.
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S, LIMIT_S + 5))
        try:
            _judge(subject, row)
        except BaseException:  # noqa: BLE001  # a row must come back
            row.details = traceback.format_exc()[-3000:]
            row.cpu = row.cpu if row.cpu == "ran" else f"error: {row.details[-200:]}"
        os.write(write, json.dumps(asdict(row)).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if text:
        row = Row(**json.loads(text))
    else:
        number = os.waitstatus_to_exitcode(status)
        row.cpu = "too slow" if number == -signal.SIGXCPU else f"crashed: {number}"
    row.seconds = round(time.monotonic() - began_s, 1)
    row.versions = f"{subject.family} {metadata.version(subject.family)} and torch {torch.__version__}"
    return row


def main() -> None:
    """Run what is asked for, and write a line of JSON for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("architectures.jsonl"))
    parser.add_argument("--family", choices=sorted(FAMILIES), action="append")
    parser.add_argument("--write", action="store_true", help="docs/architectures.md")
    parser.add_argument("names", nargs="*")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for family in asked.family or FAMILIES:
        done = {each.name for each in _read(asked.out) if each.family == family}
        try:
            for subject in FAMILIES[family]():
                wanted = not asked.names or subject.name in asked.names
                if wanted and subject.name not in done:
                    _append(asked.out, _alone(subject))
        except ImportError as error:
            print(f"{family}: {error}", file=sys.stderr)
    if asked.write:
        PAGE.write_text(text_of(_read(asked.out)), encoding="utf-8")


def _read(file: Path) -> list[Row]:
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines()
    return [Row(**json.loads(each)) for each in lines]


def _append(file: Path, row: Row) -> None:
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(asdict(row)) + "\n")
    stages = (row.forward, row.backward, row.generate)
    found = [row.name, row.cpu, *stages, str(row.bytes_left)]
    print(f"{row.seconds:5.1f}", " | ".join(each[:60] for each in found), flush=True)


if __name__ == "__main__":
    main()
