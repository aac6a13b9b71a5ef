"""Broken fallbacks, one for each way in which they go wrong in the wild.

Each takes no argument and returns a result; ``EXPECTED`` names how a sweep must judge
at least one of its points.
"""

from __future__ import annotations

import gc
import logging
import queue
import sys
import threading
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fallbacks.parts import (
    Service,
    batch,
    gradients,
    infer,
    infer_masked,
    labels,
    new_model,
)
from pytest_gpumem import Verdict

MIB: Final = 2**20
KEPT: Final[list[Any]] = []
MODELS: Final[dict[str, nn.Module]] = {}


def reset() -> None:
    """Forget what the leaks of this module kept."""
    KEPT.clear()
    MODELS.clear()
    _Service.error = None


def keeps_the_error() -> torch.Tensor:
    """The error's traceback holds the half-loaded model."""
    try:
        return infer("cuda")
    except torch.OutOfMemoryError as error:
        KEPT.append(error)
    return infer("cpu")


class _Service:
    """Notes its last error on the class, for a status page."""

    error: BaseException | None = None

    def answer(self) -> torch.Tensor:
        try:
            return infer("cuda")
        except torch.OutOfMemoryError as error:
            type(self).error = error
        return infer("cpu")


def notes_the_error_on_a_class() -> torch.Tensor:
    """As above, by an attribute that outlives the call."""
    return _Service().answer()


def registers_before_it_has_loaded() -> torch.Tensor:
    """A registry has the model that failed half-way, for good."""
    model = new_model()
    MODELS["classifier"] = model
    try:
        model.cuda()
        with torch.no_grad():
            logits: torch.Tensor = model(batch().cuda())
        answer = logits.cpu()
    except torch.OutOfMemoryError:
        return infer("cpu")
    MODELS.clear()
    return answer


def leaves_half_a_module_on_each_device() -> nn.Module:
    """``Module.cuda`` moved some parameters before it failed; nobody moves them back."""
    model = new_model()
    try:
        return model.cuda()
    except torch.OutOfMemoryError:
        return model


def runs_half_a_module_on_each_device() -> torch.Tensor:
    """And then the host's batch meets weights of the card."""
    model = new_model()
    moved = True
    try:
        model.cuda()
    except torch.OutOfMemoryError:
        moved = False
    with torch.no_grad():
        logits: torch.Tensor = model(batch().cuda() if moved else batch())
    return logits.cpu()


def cleans_inside_the_except_block() -> int:
    """The traceback still holds the first attempt while the second one begins."""

    def attempt(nbytes: int) -> int:
        first = torch.empty(nbytes // 2, dtype=torch.uint8, device="cuda")
        second = torch.empty(nbytes // 2, dtype=torch.uint8, device="cuda")
        return (first.numel() + second.numel()) // nbytes

    try:
        return attempt(48 * MIB)
    except torch.OutOfMemoryError:
        gc.collect()
        torch.cuda.empty_cache()
        return attempt(48 * MIB)


def scales_gradients_by_the_number_of_parts() -> list[torch.Tensor]:
    """Micro-batches whose losses are means are summed, not averaged."""
    model = new_model()
    try:
        model.cuda()
        functional.cross_entropy(model(batch().cuda()), labels().cuda()).backward()
        return gradients(model)
    except torch.OutOfMemoryError:
        model = new_model()
    for part, wanted in zip(batch().chunk(2), labels().chunk(2), strict=True):
        functional.cross_entropy(model(part), wanted).backward()
    return gradients(model)


def retries_without_clearing_gradients() -> list[torch.Tensor]:
    """What the failed attempt had accumulated counts twice."""
    model = new_model()
    model.cuda()
    for _attempt in range(2):
        try:
            for part, wanted in zip(batch().chunk(2), labels().chunk(2), strict=True):
                loss = functional.cross_entropy(model(part.cuda()), wanted.cuda())
                (loss / 2).backward()
            return gradients(model)
        except torch.OutOfMemoryError:
            continue
    raise RuntimeError("both attempts failed")


def swallows_every_runtime_error() -> torch.Tensor:
    """A bug in the model shrinks the batch to nothing."""
    size = 8
    while size:
        try:
            model = new_model().cuda()
            parts = [model(part.cuda()).cpu() for part in batch().split(size)]
            return torch.cat(parts)
        except RuntimeError:
            size //= 2
    return torch.empty(0)


def uses_what_was_never_bound() -> torch.Tensor:
    """The OOM is warned away, and the variable it should have set is used."""
    try:
        logits = infer("cuda")
    except torch.OutOfMemoryError:
        logging.getLogger(__name__).debug("out of memory, going on")
    return logits


def waits_for_a_worker_that_died() -> torch.Tensor:
    """The worker thread ends with the error; the main thread waits for its answer."""
    answers: queue.Queue[torch.Tensor] = queue.Queue()

    def work() -> None:
        try:
            answers.put(infer("cuda"))
        except torch.OutOfMemoryError:
            logging.getLogger(__name__).debug("worker is out of memory")

    threading.Thread(target=work, daemon=True).start()
    return answers.get()


def retries_for_ever() -> torch.Tensor:
    """There is always hope that another process ends."""
    while True:
        try:
            return infer("cuda")
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()


def knows_the_native_text_only() -> torch.Tensor:
    """The message of cuBLAS, the driver or another allocator is not recognised."""
    try:
        return infer("cuda")
    except RuntimeError as error:
        if "CUDA out of memory" not in str(error):
            raise
    return infer("cpu")


def knows_the_native_class_only() -> torch.Tensor:
    """Other parts of CUDA raise other classes."""
    try:
        return infer("cuda")
    except torch.OutOfMemoryError:
        pass
    return infer("cpu")


def calls_what_no_longer_exists() -> torch.Tensor:
    """The path that nobody ran since the method was renamed."""
    try:
        return infer("cuda")
    except torch.OutOfMemoryError:
        pass
    model: Any = new_model()
    logits: torch.Tensor = model.forward_on_cpu(batch())
    return logits


def falls_back_to_more_than_the_budget() -> int:
    """The fallback wants more than the first attempt."""
    try:
        return torch.ones(8 * MIB, dtype=torch.uint8, device="cuda").numel() // MIB
    except torch.OutOfMemoryError:
        pass
    return torch.ones(128 * MIB, dtype=torch.uint8, device="cuda").numel() // (16 * MIB)


def overflows_in_half_precision() -> torch.Tensor:
    """Half the bytes, and a sum that fp16 cannot hold."""
    values = torch.full((64,), 2000.0)
    try:
        return values.cuda().sum().cpu()
    except torch.OutOfMemoryError:
        pass
    return values.half().sum().float()


def drops_the_batch() -> list[float]:
    """The rows that did not fit are missing from the answer."""
    model = new_model().cuda()
    answer: list[float] = []
    for part in batch().split(2):
        try:
            answer += model(part.cuda()).sum(dim=1).tolist()
        except torch.OutOfMemoryError:
            continue
    return answer


def returns_nothing() -> torch.Tensor | None:
    """The caller learns of it when it uses the None."""
    try:
        return infer("cuda")
    except torch.OutOfMemoryError:
        return None


def draws_again() -> torch.Tensor:
    """The retry draws its augmentation anew: other data than without the fault."""
    for _attempt in range(3):
        noise = torch.rand(8, 32)
        try:
            with torch.no_grad():
                logits: torch.Tensor = new_model().cuda()((batch() + noise).cuda())
            return logits.cpu()
        except torch.OutOfMemoryError:
            continue
    raise RuntimeError("three attempts failed")


def turns_an_oom_into_an_error_of_its_own_making() -> torch.Tensor:
    """The handler itself fails: it formats what is not there."""
    try:
        return infer("cuda")
    except torch.OutOfMemoryError as error:
        details: Any = error.args[1]
        raise RuntimeError(f"out of memory: {details}") from None


def logs_the_error_and_tries_again() -> int:
    """Right in itself, but a log capture keeps the error, and the error the tensors."""

    def attempt(nbytes: int) -> int:
        first = torch.empty(nbytes // 2, dtype=torch.uint8, device="cuda")
        second = torch.empty(nbytes // 2, dtype=torch.uint8, device="cuda")
        return (first.numel() + second.numel()) // nbytes

    try:
        return attempt(48 * MIB)
    except torch.OutOfMemoryError:
        logging.getLogger(__name__).exception("out of memory, once more")
    gc.collect()
    torch.cuda.empty_cache()
    return attempt(48 * MIB)


def spoils_what_is_beside_an_infinity() -> torch.Tensor:
    """Scores that may not be chosen are minus infinity; the others are wrong."""
    scores = torch.tensor([0.5, -torch.inf])
    try:
        return scores.cuda().cpu()
    except torch.OutOfMemoryError:
        return torch.tensor([99.0, torch.nan])


def spoils_what_is_beside_a_mask() -> torch.Tensor:
    """A mask's huge numbers say nothing of what the others may be."""
    try:
        return infer_masked("cuda")
    except torch.OutOfMemoryError:
        pass
    logits = infer_masked("cpu")
    logits[0, 0] += 1.0
    return logits


def divides_by_nothing() -> torch.Tensor:
    """Where there were no rows the mean is not a number, and not 0."""
    try:
        return torch.zeros(3).cuda().mean().cpu()
    except torch.OutOfMemoryError:
        return torch.zeros(0).mean()


def answers_a_number_for_nan() -> list[float]:
    """And a number is not right where there is none."""
    try:
        return [float("nan"), float(torch.ones(1).cuda())]
    except torch.OutOfMemoryError:
        return [0.0, 1.0]


def cuts_off_the_fraction() -> torch.Tensor:
    """The fallback counts in integers."""
    prices = torch.tensor([1.7, 2.2])
    try:
        return prices.cuda().cpu()
    except torch.OutOfMemoryError:
        return prices.to(torch.int64)


def answers_other_numbers_in_numpy() -> dict[str, Any]:
    """A service answers with arrays."""
    try:
        return {"scores": infer("cuda").numpy()}
    except torch.OutOfMemoryError:
        return {"scores": infer("cpu").numpy() + 1}


class _Answer:
    """An answer without an equality of its own."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


def answers_other_numbers_in_an_object() -> _Answer:
    """Only a look inside tells the two answers apart."""
    try:
        return _Answer(infer("cuda"))
    except torch.OutOfMemoryError:
        return _Answer(infer("cpu") + 1)


def forgets_to_evaluate() -> nn.Module:
    """The model that is built anew would train: dropout is on."""
    try:
        return new_model().eval().cuda()
    except torch.OutOfMemoryError:
        return new_model()


def doubles_small_gradients() -> list[torch.Tensor]:
    """The gradients of a mean over many rows are small, and still wrong."""
    weight = torch.ones(8, requires_grad=True)
    try:
        (weight.cuda() * 2e-5).sum().backward()
    except torch.OutOfMemoryError:
        weight.grad = torch.full((8,), 4e-5)
    assert weight.grad is not None
    return [weight.grad.cpu()]


def keeps_and_raises_the_error() -> torch.Tensor:
    """It lets the error through, and a status page has it for ever."""
    try:
        return infer("cuda")
    except torch.OutOfMemoryError as error:
        KEPT.append(error)
        raise


def does_not_wait_for_its_retry() -> torch.Tensor:
    """A thread tries again, and the answer is given before it has one."""
    logits = torch.zeros(8, 8)
    try:
        return infer("cuda")
    except torch.OutOfMemoryError:
        pass
    begin = threading.Event()

    def retry() -> None:
        begin.wait(0.2)
        logits.copy_(infer("cpu"))

    threading.Thread(target=retry).start()
    return logits.clone()


class Rotary(nn.Module):
    """A model with a table that is not saved."""

    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = new_model()
        self.register_buffer("table", torch.ones(32), persistent=False)

    def forward(self, rows: torch.Tensor) -> Any:
        """Compute."""
        return self.inner(rows * self.table)


def moves_the_parameters_back_alone() -> nn.Module:
    """A table of the model's stays on the card."""
    model = Rotary()
    model.register_buffer("table", torch.ones(32).cuda(), persistent=False)
    try:
        return model.cuda()
    except torch.OutOfMemoryError:
        for each in model.parameters():
            each.data = each.data.cpu()
    return model


def returns_a_model_that_does_not_train() -> nn.Module:
    """What was frozen to save memory stays so."""
    try:
        return new_model().cuda()
    except torch.OutOfMemoryError:
        return new_model().requires_grad_(requires_grad=False)


def answers_one_other_number() -> dict[str, Any]:
    """One of many, deep in the answer."""
    table = np.arange(6.0).reshape(2, 3)
    answer: dict[str, Any] = {
        "pages": [{"scores": table, "title": "a"}, {"scores": table + 1}]
    }
    try:
        torch.ones(8, device="cuda")
    except torch.OutOfMemoryError:
        other = table + 1
        other[1, 2] += 0.5
        answer["pages"][1]["scores"] = other
    return answer


def squeezes_a_batch_of_one() -> torch.Tensor:
    """The fallback goes row by row, and one row is no batch to it."""
    try:
        return infer("cuda")[:1]
    except torch.OutOfMemoryError:
        return infer("cpu")[0]


def answers_in_another_order() -> list[str]:
    """The parts are joined as they come."""
    try:
        torch.ones(8, device="cuda")
    except torch.OutOfMemoryError:
        return ["second", "first"]
    return ["first", "second"]


def answers_zeros_and_ones() -> torch.Tensor:
    """A mask of numbers selects other rows than one of truth values."""
    try:
        return (torch.arange(4).cuda() > 1).cpu()
    except torch.OutOfMemoryError:
        return torch.tensor([0, 0, 1, 1])


def retries_on_changed_arguments() -> torch.Tensor:
    """The rows were scaled in place before memory ran out."""
    rows = batch()
    for device in ("cuda", "cuda", "cpu"):
        rows /= 2
        try:
            with torch.no_grad():
                logits: torch.Tensor = new_model().to(device)(rows.to(device))
            return logits.cpu()
        except torch.OutOfMemoryError:
            continue
    raise AssertionError("unreachable: the host has room")


def leaves_half_precision_as_the_default() -> torch.Tensor:
    """Whatever the program makes next is of another dtype."""
    try:
        return infer("cuda")
    except torch.OutOfMemoryError:
        pass
    logits = infer("cpu")
    torch.set_default_dtype(torch.float16)
    return logits


def leaves_gradients_off() -> torch.Tensor:
    """The error passes before they are on again: nothing trains from here on."""
    torch.set_grad_enabled(False)
    logits = infer("cuda")
    torch.set_grad_enabled(True)
    return logits


def leaves_autocast_on() -> torch.Tensor:
    """A block that is entered by hand and never left."""
    try:
        return infer("cuda")
    except torch.OutOfMemoryError:
        pass
    torch.autocast("cpu", dtype=torch.bfloat16).__enter__()
    return infer("cpu")


def leaves_products_inexact() -> torch.Tensor:
    """Later products on a card are of fewer bits."""
    try:
        return infer("cuda")
    except torch.OutOfMemoryError:
        torch.set_float32_matmul_precision("high")
    return infer("cpu")


def leaves_a_hook() -> torch.Tensor:
    """Of all modules: it watches, or changes, whatever is called from here on."""
    try:
        return infer("cuda")
    except torch.OutOfMemoryError:
        pass
    nn.modules.module.register_module_forward_hook(lambda *_call: None)
    return infer("cpu")


class Slotted:
    """An answer without a dictionary."""

    __slots__ = ("logits",)

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


def answers_other_numbers_in_a_slot() -> Slotted:
    """An object need not have a dictionary."""
    try:
        return Slotted(infer("cuda"))
    except torch.OutOfMemoryError:
        return Slotted(infer("cpu") + 1)


def answers_other_values() -> Any:
    """A view of a mapping's values, without its names."""
    try:
        return {"logits": infer("cuda")}.values()
    except torch.OutOfMemoryError:
        return {"logits": infer("cpu") + 1}.values()


def ends_the_program() -> torch.Tensor:
    """As a script does, in a place that others call."""
    try:
        return infer("cuda")
    except torch.OutOfMemoryError:
        sys.exit("out of memory")


def catches_everything() -> torch.Tensor:
    """An interruption and a bug are no reasons to go on."""
    try:
        return infer("cuda")
    except BaseException:  # noqa: BLE001  # what is tested
        return infer("cpu")


def catches_everything_for_ever() -> torch.Tensor:
    """Nothing ends it, not even an interruption."""
    while True:
        try:
            return infer("cuda")
        except BaseException:  # noqa: BLE001, S110  # what is tested
            pass


class Case(NamedTuple):
    """How a sweep must judge a broken fallback.

    Attributes:
        verdict: Of at least one point.
        flavours: The errors to raise.
        budget: The card's share.
        points: How many allocations fail at the most.
        says: What a failing point's text must name.
    """

    verdict: Verdict
    flavours: tuple[str, ...] = ("native",)
    budget: str | None = None
    points: int = 12
    says: str = ""


EXPECTED: Final = {
    keeps_the_error: Case(Verdict.LEAK),
    notes_the_error_on_a_class: Case(Verdict.LEAK),
    registers_before_it_has_loaded: Case(Verdict.LEAK),
    leaves_half_a_module_on_each_device: Case(Verdict.WRONG_RESULT),
    runs_half_a_module_on_each_device: Case(Verdict.OTHER_ERROR),
    cleans_inside_the_except_block: Case(Verdict.OVER_BUDGET, budget="60MiB"),
    logs_the_error_and_tries_again: Case(
        Verdict.OVER_BUDGET,
        budget="60MiB",
        says="24 MiB were held by captured log records alone; that is pytest's log",
    ),
    scales_gradients_by_the_number_of_parts: Case(Verdict.WRONG_RESULT),
    retries_without_clearing_gradients: Case(Verdict.WRONG_RESULT),
    swallows_every_runtime_error: Case(Verdict.SWALLOWED, flavours=("not-oom",)),
    uses_what_was_never_bound: Case(Verdict.OTHER_ERROR),
    # Each point takes the whole time limit.
    waits_for_a_worker_that_died: Case(Verdict.HANG, points=2),
    retries_for_ever: Case(Verdict.HANG, points=2),
    knows_the_native_text_only: Case(
        Verdict.CLEAN_OOM, flavours=("cublas", "driver", "async", "mps")
    ),
    knows_the_native_class_only: Case(
        Verdict.CLEAN_OOM, flavours=("legacy", "cublas", "driver")
    ),
    calls_what_no_longer_exists: Case(Verdict.OTHER_ERROR),
    falls_back_to_more_than_the_budget: Case(Verdict.OVER_BUDGET, budget="60MiB"),
    overflows_in_half_precision: Case(Verdict.WRONG_RESULT),
    drops_the_batch: Case(Verdict.WRONG_RESULT),
    returns_nothing: Case(Verdict.WRONG_RESULT),
    draws_again: Case(Verdict.WRONG_RESULT),
    turns_an_oom_into_an_error_of_its_own_making: Case(Verdict.OTHER_ERROR),
    spoils_what_is_beside_an_infinity: Case(
        Verdict.WRONG_RESULT, says="first at [0]: 99.0 instead of 0.5"
    ),
    spoils_what_is_beside_a_mask: Case(Verdict.WRONG_RESULT, says="first at [0, 0]"),
    divides_by_nothing: Case(Verdict.WRONG_RESULT, says="nan instead of 0.0"),
    answers_a_number_for_nan: Case(
        Verdict.WRONG_RESULT, says="the result[0] is 0.0 instead of nan"
    ),
    cuts_off_the_fraction: Case(Verdict.WRONG_RESULT, says="has dtype torch.int64"),
    answers_other_numbers_in_numpy: Case(
        Verdict.WRONG_RESULT, says="the result['scores'] differs by 1"
    ),
    answers_other_numbers_in_an_object: Case(
        Verdict.WRONG_RESULT, says="the result.logits differs by 1"
    ),
    forgets_to_evaluate: Case(
        Verdict.WRONG_RESULT, says="the result['training'][''] is True instead of False"
    ),
    doubles_small_gradients: Case(Verdict.WRONG_RESULT, says="differs by 2e-05"),
    keeps_and_raises_the_error: Case(Verdict.LEAK),
    does_not_wait_for_its_retry: Case(
        Verdict.WRONG_RESULT, says="differs by ", points=4
    ),
    moves_the_parameters_back_alone: Case(Verdict.WRONG_RESULT, says="half moved"),
    returns_a_model_that_does_not_train: Case(
        Verdict.WRONG_RESULT, says="['trains']['0.weight'] is False instead of True"
    ),
    answers_one_other_number: Case(
        Verdict.WRONG_RESULT,
        says="the result['pages'][1]['scores'] differs by 0.5, more than",
    ),
    squeezes_a_batch_of_one: Case(Verdict.WRONG_RESULT, says="has shape (8,)"),
    answers_in_another_order: Case(
        Verdict.WRONG_RESULT, says="the result[0] is 'second' instead of 'first'"
    ),
    answers_zeros_and_ones: Case(
        Verdict.WRONG_RESULT, says="has dtype torch.int64 instead of torch.bool"
    ),
    retries_on_changed_arguments: Case(Verdict.WRONG_RESULT),
    leaves_half_precision_as_the_default: Case(
        Verdict.LEAK,
        says="torch changed: the default dtype is torch.float16, and was torch.float32",
    ),
    leaves_gradients_off: Case(
        Verdict.LEAK, says="it leaves torch changed: grad mode is False, and was True"
    ),
    leaves_autocast_on: Case(Verdict.LEAK, says="autocast of cpu is True, and was"),
    leaves_products_inexact: Case(
        Verdict.LEAK, says="the precision of float32 products is high, and was highest"
    ),
    leaves_a_hook: Case(Verdict.LEAK, says="the set of global module hooks is"),
    answers_other_numbers_in_a_slot: Case(
        Verdict.WRONG_RESULT, says="the result.logits differs by 1"
    ),
    answers_other_values: Case(Verdict.WRONG_RESULT, says="the result[0] differs by 1"),
    ends_the_program: Case(Verdict.OTHER_ERROR, says="SystemExit: out of memory"),
    catches_everything: Case(Verdict.SWALLOWED, flavours=("not-oom",)),
    catches_everything_for_ever: Case(Verdict.HANG, points=1),
}


# -- loaders ------------------------------------------------------------------------------


def persistent_load() -> nn.Module:
    """No fallback at all; a rule's pattern may say "persistent" all the same."""
    return new_model().cuda()


def knows_one_text_only() -> nn.Module:
    """An OOM of cuBLAS or the driver is none for it."""
    try:
        return new_model().cuda()
    except torch.OutOfMemoryError:
        return new_model()


def loads_other_weights() -> nn.Module:
    """What is computed is something else, beside an output of infinities."""
    model = new_model()
    try:
        return model.cuda()
    except torch.OutOfMemoryError:
        model = new_model()
    for parameter in model.parameters():
        nn.init.constant_(parameter, 1.0)
    return model


def loads_half() -> nn.Module:
    """The module whose move failed."""
    model = new_model()
    try:
        return model.cuda()
    except torch.OutOfMemoryError:
        return model


def keeps_its_first_attempt() -> nn.Module:
    """In a list, as a log of errors would."""
    try:
        return new_model().cuda()
    except torch.OutOfMemoryError as error:
        KEPT.append(error)
    return new_model()


def serves_half_a_model() -> Service:
    """An object with half of a model on each device."""
    return Service(loads_half())


def loads_nothing() -> nn.Module | None:
    """Neither a model nor an error."""
    try:
        return new_model().cuda()
    except torch.OutOfMemoryError:
        return None


def breaks_on_the_way_down() -> nn.Module:
    """The path that nobody ran; another error lets it break too."""
    try:
        return new_model().cuda()
    except RuntimeError:
        pass
    model: Any = new_model()
    return model.to_host()  # type: ignore[no-any-return]  # there is no such method


#: Loaders, the fault that shows what is wrong, and what both judges must say of it.
LOADERS: Final = {
    persistent_load: ("any:site=*persistent_load*,nth=1", "CUDA out of memory"),
    knows_one_text_only: ("any:nth=2,flavour=cublas", "CUBLAS_STATUS_ALLOC_FAILED"),
    loads_other_weights: ("any:nth=2", "the output differs by"),
    loads_half: ("any:nth=3", "the model is half moved: weights on cpu, cuda:0"),
    keeps_its_first_attempt: ("any:nth=3", "of a failed attempt stay on the card"),
    serves_half_a_model: ("any:nth=3", "the model is half moved"),
    loads_nothing: ("any:nth=1", "the loader returned no model and raised nothing"),
}
