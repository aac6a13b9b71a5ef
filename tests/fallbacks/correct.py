"""Correct fallbacks; a sweep must accuse none of them."""

from __future__ import annotations

import gc
import queue
import threading
from typing import Final

import torch
from accelerate.utils import find_executable_batch_size
from torch.nn import functional

from fallbacks.parts import batch, gradients, infer, labels, new_model


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


def falls_back_to_half_precision() -> torch.Tensor:
    """Half the bytes, the same numbers within what fp16 explains."""
    try:
        return infer("cuda")
    except torch.OutOfMemoryError:
        pass
    with torch.no_grad():
        logits: torch.Tensor = new_model().half()(batch().half())
    return logits


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
)
#: Those that recover from every OOM, whatever is raised for it.
RECOVER: Final = frozenset(ALL) - {
    raises_an_error_of_its_own,
    raises_without_saying_from,
    lets_it_through,
}
#: Those that know other errors than torch's own.
KNOW_FLAVOURS: Final = frozenset({asks_accelerate, knows_every_text})
