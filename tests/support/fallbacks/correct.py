"""Correct fallbacks; a sweep must accuse none of them."""

from __future__ import annotations

import contextlib
import gc
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import torch
from accelerate.utils import find_executable_batch_size
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

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB: Final = 2**20


def falls_back_to_the_host() -> torch.Tensor:
    """The retry begins once the except block, and with it the traceback, is gone."""
    try:
        return infer("cuda")
    except torch.OutOfMemoryError:
        pass
    return infer("cpu")


def cleans_then_retries() -> torch.Tensor:
    """Twice on the card, with everything given back in between, then on the host."""
    for device in ("cuda", "cuda", "cpu"):
        answer = None
        try:
            answer = infer(device)
        except torch.OutOfMemoryError:
            pass
        if answer is not None:
            return answer
        gc.collect()
        torch.cuda.empty_cache()
    raise AssertionError("unreachable: the host has room")


def halves_the_batch() -> torch.Tensor:
    """Smaller parts, put together again; the host if even one row is too much."""
    size = 8
    while size:
        try:
            model = new_model().cuda()
            with torch.no_grad():
                return torch.cat(
                    [model(part.cuda()).cpu() for part in batch().split(size)]
                )
        except torch.OutOfMemoryError:
            size //= 2
    return infer("cpu")


def accumulates_gradients() -> list[torch.Tensor]:
    """Micro-batches weighted by their share, from cleared gradients each time."""
    for parts, device in ((1, "cuda"), (2, "cuda"), (2, "cpu")):
        model = new_model()
        try:
            model.to(device)
            chunks = zip(batch().chunk(parts), labels().chunk(parts), strict=True)
            for part, wanted in chunks:
                loss = functional.cross_entropy(
                    model(part.to(device)), wanted.to(device)
                )
                (loss / parts).backward()
            return gradients(model)
        except torch.OutOfMemoryError:
            continue
    raise AssertionError("unreachable: the host has room")


def _falls_back_to(dtype: torch.dtype) -> torch.Tensor:
    try:
        return infer("cuda")
    except torch.OutOfMemoryError:
        pass
    with torch.no_grad():
        logits: torch.Tensor = new_model().to(dtype)(batch().to(dtype))
    return logits


def falls_back_to_half_precision() -> torch.Tensor:
    """Half the bytes, the same numbers within what fp16 explains."""
    return _falls_back_to(torch.float16)


def raises_an_error_of_its_own() -> torch.Tensor:
    """No fallback: a clear error that says what it came from."""
    try:
        return infer("cuda")
    except torch.OutOfMemoryError as error:
        raise RuntimeError("the classifier needs a larger card") from error


def raises_without_saying_from() -> torch.Tensor:
    """Likewise; Python notes what was being handled."""
    try:
        return infer("cuda")
    except torch.OutOfMemoryError:
        raise RuntimeError("the classifier needs a larger card")  # noqa: B904  # what is tested


def lets_it_through() -> torch.Tensor:
    """No fallback at all leaves nothing behind either."""
    return infer("cuda")


def asks_accelerate() -> torch.Tensor:
    """Accelerate's decorator halves the batch size until it fits."""

    @find_executable_batch_size(starting_batch_size=8)  # type: ignore[untyped-decorator]  # accelerate's
    def run(batch_size: int) -> torch.Tensor:
        model = new_model().cuda()
        with torch.no_grad():
            return torch.cat(
                [model(part.cuda()).cpu() for part in batch().split(batch_size)]
            )

    try:
        answer: torch.Tensor = run()
    except RuntimeError as error:
        if "No executable batch size found" not in str(error):
            raise
        answer = infer("cpu")
    return answer


def hears_of_its_workers_error() -> torch.Tensor:
    """The worker sends its answer or its error to the thread that waits."""
    answers: queue.Queue[torch.Tensor | Exception | None] = queue.Queue()

    def work() -> None:
        try:
            answers.put(infer("cuda"))
        except torch.OutOfMemoryError:
            answers.put(None)
        except Exception as error:  # noqa: BLE001  # whatever it is, somebody waits
            answers.put(error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    answer = answers.get()
    worker.join()
    if isinstance(answer, Exception):
        raise answer
    return infer("cpu") if answer is None else answer


def knows_every_text() -> torch.Tensor:
    """All that real machines raise for want of memory, and nothing else."""
    texts = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "NVML_SUCCESS")
    try:
        return infer("cuda")
    except RuntimeError as error:
        if not any(text in str(error) for text in texts):
            raise
    return infer("cpu")


def answers_with_infinities_and_nan() -> list[Any]:
    """What may not be chosen is minus infinity, what is not there is no number."""
    scores = torch.tensor([0.5, -torch.inf, torch.nan])
    try:
        scores = scores.cuda().cpu()
    except torch.OutOfMemoryError:
        pass
    return [scores, scores.tolist(), scores.numpy()]


def masks_in_half_precision() -> torch.Tensor:
    """The lowest number of half precision stands for that of single precision."""
    try:
        return infer_masked("cuda")
    except torch.OutOfMemoryError:
        return infer_masked("cpu", dtype=torch.float16)


def answers_in_numpy() -> dict[str, Any]:
    """Arrays, numbers and sets are the same wherever they were computed."""
    device = "cuda"
    try:
        scores = infer(device)
    except torch.OutOfMemoryError:
        device = "cpu"
        scores = infer(device)
    best = scores.argmax(dim=1)
    return {
        "scores": scores.numpy(),
        "best": best.numpy(),
        "labels": set(best.tolist()),
        "largest": scores.numpy().max(),
    }


class _Answer:
    """An answer without an equality of its own, and what is each time another."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits
        self.at_s = time.perf_counter()


def answers_with_an_object() -> _Answer:
    """When it was made does not matter; what it holds does."""
    try:
        return _Answer(infer("cuda"))
    except torch.OutOfMemoryError:
        return _Answer(infer("cpu"))


_cache: dict[str, torch.Tensor] = {}


def gives_up_its_cache() -> torch.Tensor:
    """After an OOM there is less on the card than before, which is no leak."""
    if not _cache:
        with contextlib.suppress(torch.OutOfMemoryError):
            _cache["table"] = torch.ones(MIB, device="cuda")
    try:
        return infer("cuda")
    except torch.OutOfMemoryError:
        _cache.clear()
    return infer("cpu")


def returns_an_evaluated_module() -> nn.Module:
    """A module is compared by what it holds, wherever it ends."""
    try:
        return new_model().eval().cuda()
    except torch.OutOfMemoryError:
        return new_model().eval().half()


def puts_torchs_defaults_back() -> torch.Tensor:
    """What it sets for a block is as before after it."""
    torch.set_default_dtype(torch.float16)
    try:
        torch.ones(8, device="cuda")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.ones(8, device="cuda")
    except torch.OutOfMemoryError:
        pass
    finally:
        torch.set_default_dtype(torch.float32)
    return infer("cpu")


def turns_gradients_off_for_good() -> torch.Tensor:
    """As a server does; with a fault or without."""
    try:
        torch.ones(8, device="cuda")
        torch.set_grad_enabled(False)
        return infer("cuda")
    except torch.OutOfMemoryError:
        return infer("cpu")


def takes_plainer_kernels_for_good() -> torch.Tensor:
    """Of those that compute the same, the ones that need less."""
    try:
        return infer("cuda")
    except torch.OutOfMemoryError:
        torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    return infer("cpu")


def cleans_up_after_any_error() -> torch.Tensor:
    """And lets it through, an interruption too."""
    try:
        return infer("cuda")
    except BaseException:
        gc.collect()
        torch.cuda.empty_cache()
        raise


def retries_in_a_thread() -> torch.Tensor:
    """A pool of one thread, which is waited for."""
    with ThreadPoolExecutor(1) as pool:
        try:
            return pool.submit(infer, "cuda").result()
        except torch.OutOfMemoryError:
            pass
        return pool.submit(infer, "cpu").result()


def lists_what_it_yields() -> list[torch.Tensor]:
    """A generator that has been run to its end."""

    def rows() -> Iterator[torch.Tensor]:
        for part in batch().split(4):
            for device in ("cuda", "cpu"):
                try:
                    answer = new_model().to(device)(part.to(device)).detach().cpu()
                except torch.OutOfMemoryError:
                    continue
                yield answer
                break

    return list(rows())


def answers_a_mapping_in_any_order() -> dict[str, Any]:
    """What is told by its name has no order."""
    answer = {"scores": batch().numpy(), "mask": batch() > 0.5}
    try:
        answer["logits"] = infer("cuda")
    except torch.OutOfMemoryError:
        return {"logits": infer("cpu"), **answer}
    return answer


def computes_in_bfloat16() -> torch.Tensor:
    """Fewer bits, and numbers that these explain."""
    return _falls_back_to(torch.bfloat16)


def keeps_a_graph_or_none() -> torch.Tensor:
    """Whether a result requires a gradient is not what it says."""
    try:
        logits: torch.Tensor = new_model().cuda()(batch().cuda()).cpu()
    except torch.OutOfMemoryError:
        return infer("cpu")
    return logits


def starts_its_statistics_anew() -> torch.Tensor:
    """How often memory ran out so far says less then, and nothing of this OOM."""
    try:
        return infer("cuda")
    except torch.OutOfMemoryError:
        torch.cuda.reset_accumulated_memory_stats()
        raise


_tables: list[torch.Tensor] = []


def keeps_a_table_each_time() -> torch.Tensor:
    """What a run without a fault leaves too is no leak of the fallback's."""
    with contextlib.suppress(torch.OutOfMemoryError):
        _tables.append(torch.ones(1024, device="cuda"))
    return falls_back_to_the_host()


class _Service:
    """Turns an OOM of its block into an error of its own."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        if isinstance(error[1], torch.OutOfMemoryError):
            raise RuntimeError("a larger card is needed") from error[1]  # noqa: TRY004  # as services do


def serves_in_a_block() -> torch.Tensor:
    """The error that comes out names the OOM."""
    with _Service():
        return infer("cuda")


ALL: Final = (
    falls_back_to_the_host,
    cleans_then_retries,
    halves_the_batch,
    accumulates_gradients,
    falls_back_to_half_precision,
    raises_an_error_of_its_own,
    raises_without_saying_from,
    lets_it_through,
    asks_accelerate,
    hears_of_its_workers_error,
    knows_every_text,
    answers_with_infinities_and_nan,
    masks_in_half_precision,
    answers_in_numpy,
    answers_with_an_object,
    gives_up_its_cache,
    returns_an_evaluated_module,
    puts_torchs_defaults_back,
    turns_gradients_off_for_good,
    takes_plainer_kernels_for_good,
    cleans_up_after_any_error,
    retries_in_a_thread,
    lists_what_it_yields,
    answers_a_mapping_in_any_order,
    computes_in_bfloat16,
    keeps_a_graph_or_none,
    serves_in_a_block,
    starts_its_statistics_anew,
    keeps_a_table_each_time,
)
#: Those that recover from every OOM, whatever is raised for it.
RECOVER: Final = frozenset(ALL) - {
    raises_an_error_of_its_own,
    raises_without_saying_from,
    lets_it_through,
    cleans_up_after_any_error,
    serves_in_a_block,
    starts_its_statistics_anew,
}
#: Those that know other errors than torch's own.
KNOW_FLAVOURS: Final = frozenset({asks_accelerate, knows_every_text})


# -- loaders ------------------------------------------------------------------------------


def persistent_ladder() -> nn.Module:
    """Onto the card, else the host; whatever real machines raise for want of memory."""
    try:
        return new_model().cuda()
    except RuntimeError as error:
        texts = ("out of memory", "ALLOC_FAILED")
        if not any(text in str(error) for text in texts):
            raise
    return new_model()


def serves_a_model() -> Service:
    """An object with a model."""
    return Service(persistent_ladder())


def loads_with_a_tokeniser() -> tuple[nn.Module, str]:
    """A tuple with a model."""
    return persistent_ladder(), "tokeniser"


def loads_into_a_mapping() -> dict[str, Any]:
    """A mapping with a model."""
    return {"tokeniser": "words", "model": persistent_ladder()}


_old: list[torch.Tensor] = []


def makes_room_first() -> nn.Module:
    """What was on the card before goes, so that there is less afterwards."""
    if not _old:
        _old.append(torch.ones(MIB, device="cuda"))
    try:
        return new_model().cuda()
    except torch.OutOfMemoryError:
        _old.clear()
    return new_model()


class _Rotary(nn.Module):
    """A model with a table that is not a buffer, as some position encodings have it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = new_model()
        self.table = torch.ones(32)
        self.others: dict[str, torch.Tensor] = {}

    def to_card(self) -> _Rotary:
        """Move everything."""
        table = self.table.cuda()
        self.others = {"cosines": table * 2}
        self.table = table
        self.cuda()
        return self

    def forward(self, rows: torch.Tensor) -> Any:
        """Compute."""
        return self.inner(rows * self.table.to(rows.device))


def has_a_table_of_its_own() -> nn.Module:
    """Bytes of the model's own, whatever torch knows of them."""
    try:
        return _Rotary().to_card()
    except torch.OutOfMemoryError:
        return _Rotary()


def forget() -> None:
    """Forget what was kept between calls."""
    _old.clear()
    _cache.clear()
    _tables.clear()


#: Loaders and a fault from which they recover.
LOADERS: Final = (
    (persistent_ladder, "any:nth=2"),
    (persistent_ladder, "any:site=*persistent*,nth=1"),
    (persistent_ladder, "any:nth=2,flavour=cublas"),
    (serves_a_model, "any:nth=3"),
    (loads_with_a_tokeniser, "any:nth=3"),
    (loads_into_a_mapping, "any:nth=3"),
    (makes_room_first, "any:nth=3"),
    (has_a_table_of_its_own, "any:nth=3"),
    (has_a_table_of_its_own, "any:nth=99"),
)
