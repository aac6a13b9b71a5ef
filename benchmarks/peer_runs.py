"""One peer's run of the task of ``peers.py``, in a process of its own.

The task: load bert-large in single precision, move it to the card, and pass 8 rows of 128
tokens through it. Each run is made twice, and the second counts.

Run: ``python benchmarks/peer_runs.py PEER CHECKPOINT RESULT.json``
"""

from __future__ import annotations

import gc
import json
import re
import sys
import tempfile
import time
import warnings
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

#: The card of the recording that all are compared with.
CARD = "16GiB,cc=8.0"
#: One on which the move to the card runs out of memory in that recording.
SMALL_CARD = "1GiB,cc=8.0"
#: The smallest NVIDIA card that FakeGPU knows, except for its own tests' card.
FAKEGPU_CARD, FAKEGPU_SMALL_CARD = "t4", "test-512m"


def task(
    path: str,
    device: str,
    *,
    note: Callable[[str], None] = lambda _: None,
    mend: Callable[[Any], None] = lambda _: None,
) -> Any:
    """Load, move and pass, as a user would write it; ``mend`` comes after the load."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        path, attn_implementation="sdpa"
    )
    mend(model)
    model.to(device)
    note("load")
    with torch.no_grad():
        return _forward(model, device, note)


def adapted_task(
    path: str, device: str, *, note: Callable[[str], None] = lambda _: None
) -> Any:
    """Create the model on the device instead, with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    with torch.no_grad(), torch.device(device):
        config = AutoConfig.from_pretrained(path)
        auto: Any = AutoModelForSequenceClassification
        model = auto.from_config(config, attn_implementation="sdpa").eval()
        note("load")
        return _forward(model, device, note)


def mend_buffers(model: Any) -> None:
    """Set the buffers that are in no file; FakeGPU leaves them uninitialised."""
    import torch

    embeddings = model.bert.embeddings
    embeddings.position_ids = torch.arange(512)[None]
    embeddings.token_type_ids = torch.zeros(1, 512, dtype=torch.int64)


def _forward(model: Any, device: str, note: Callable[[str], None]) -> Any:
    import torch

    tokens = torch.ones(8, 128, dtype=torch.int64).to(device)
    mask = torch.ones(8, 128, dtype=torch.int64).to(device)
    labels = torch.ones(8, dtype=torch.int64).to(device)  # as in the recording
    logits = model(tokens, attention_mask=mask).logits
    note("forward")
    return logits, labels


class CudaPeaks:
    """The figures of ``torch.cuda`` at the end of each step."""

    def __init__(self) -> None:
        """Begin."""
        self.found: dict[str, int] = {}

    def note(self, step: str) -> None:
        """Read the figures."""
        import torch

        self.found[f"{step}_bytes"] = torch.cuda.max_memory_allocated()
        self.found["reserved_bytes"] = torch.cuda.max_memory_reserved()


def timed(run: Callable[[], dict[str, int]]) -> dict[str, Any]:
    """Return the figures of a second run, and its seconds of processor time."""
    run()
    gc.collect()
    started_s = time.process_time()
    found = run()
    return {"seconds": time.process_time() - started_s, **found}


def attempt(run: Callable[[], Any]) -> str:
    """Return the error that a run ends with; empty without an error."""
    try:
        run()
    except Exception as error:  # noqa: BLE001  # any error of a peer is a result
        return f"{type(error).__name__}: {error}"
    return ""


def cpu(path: str) -> dict[str, Any]:
    """Run the task on the CPU without any tool; other times are compared with this one."""

    def run() -> dict[str, int]:
        task(path, "cpu")
        return {}

    return timed(run)


def gpumem(path: str) -> dict[str, Any]:
    """Run the task on a simulated card."""
    from pytest_gpumem import OomInjector, simulated_device

    def run() -> dict[str, int]:
        peaks = CudaPeaks()
        with simulated_device(CARD):
            task(path, "cuda", note=peaks.note)
        return peaks.found

    def injected() -> None:
        with simulated_device(CARD), OomInjector("any:nth=100"):
            task(path, "cuda")

    def small() -> None:
        with simulated_device(SMALL_CARD):
            task(path, "cuda")

    return {
        **timed(run),
        "unmodified": "",
        "small_card": attempt(small),
        "injected": attempt(injected),
    }


def as_a_test(
    folder: Path, path: str, *options: str, mark: str = "", plugins: Any = ()
) -> float:
    """Run the task on the CPU as a test, and return its seconds of processor time.

    Args:
        folder: An empty folder.
        path: The checkpoint.
        options: Of pytest, for the plugin that is compared.
        mark: A decorator of the test.
        plugins: Further plugins.
    """
    import pytest

    (folder / "test_task.py").write_text(
        "import sys, time, pytest\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from peer_runs import task\n"
        "def test_first():\n"
        f"    task({path!r}, 'cpu')\n"
        f"{mark}\n"
        "def test_task():\n"
        "    began = time.process_time()\n"
        f"    task({path!r}, 'cpu')\n"
        f"    open({str(folder / 'seconds')!r}, 'w').write(str(time.process_time() - began))\n",
        encoding="utf-8",
    )
    own = ["-q", "--rootdir", str(folder), "-p", "no:cacheprovider", "-p", "no:gpumem"]
    code = pytest.main([*own, *options, str(folder)], plugins)
    if code != 0:
        raise RuntimeError(f"pytest ended with {code}")
    return float((folder / "seconds").read_text(encoding="ascii"))


def memray(path: str) -> dict[str, Any]:
    """Run the task on the CPU under pytest-memray."""
    from memray import FileReader  # type: ignore[import-not-found]

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds = as_a_test(folder, path, "--memray", f"--memray-bin-path={name}")
        (results,) = folder.glob("*py-test_task.bin")
        peak = FileReader(results).metadata.peak_memory
    return {"seconds": seconds, "forward_bytes": peak}


def pytest_torch(path: str) -> dict[str, Any]:
    """Run the task on the CPU with pytest-torch's limit on memory, and read what it says."""
    import_module("pytest_torch")  # or it is missing

    class Said:
        """Keeps the message of the limit about the task."""

        text = ""

        def pytest_runtest_logreport(self, report: Any) -> None:
            """Read a report."""
            for title, text in report.sections:
                if "torch_max_memory" in title:
                    self.text = text

    said = Said()
    with tempfile.TemporaryDirectory() as name:
        seconds = as_a_test(
            Path(name),
            path,
            mark="@pytest.mark.torch_max_memory(mb=16000)",
            plugins=[said],
        )
    peak = re.match(r"peak ([0-9.]+) MB", said.text)
    if peak is None and not said.text.startswith("not checked"):
        raise RuntimeError(f"pytest-torch says {said.text!r}")
    told = {} if peak is None else {"forward_bytes": round(float(peak[1]) * 2**20)}
    return {"seconds": seconds, **told}


def _tracked(tracker: Any, device: str) -> int:
    snapshot = tracker.get_tracker_snapshot("peak")
    return next(
        int(figures["Total"])
        for place, figures in snapshot.items()
        if str(place).startswith(device)
    )


def memtracker(path: str) -> dict[str, Any]:
    """Run the task on the CPU inside torch's MemTracker.

    Weights that come from a mapped file are seen when they are first used.
    """
    from torch.distributed._tools.mem_tracker import MemTracker

    def run() -> dict[str, int]:
        with MemTracker() as tracker:
            task(path, "cpu")
            return {"forward_bytes": _tracked(tracker, "cpu")}

    return {
        **timed(run),
        "unmodified": attempt(lambda: task(path, "cuda")),
    }


def fake(path: str) -> dict[str, Any]:
    """Make the model under FakeTensorMode, MemTracker counting."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    def run() -> dict[str, int]:
        found: dict[str, int] = {}
        with FakeTensorMode(), MemTracker() as tracker:
            adapted_task(
                path,
                "cpu",
                note=lambda step: found.update(
                    {f"{step}_bytes": _tracked(tracker, "cpu")}
                ),
            )
        return found

    def unmodified() -> None:
        with FakeTensorMode():
            task(path, "cuda")

    return {**timed(run), "unmodified": attempt(unmodified)}


def accelerate(path: str) -> dict[str, Any]:
    """Add up the sizes of a model without weights, as estimate-memory does.

    The command itself asks the hub for the model's library, so it needs a name on the
    hub.
    """
    from accelerate import init_empty_weights
    from accelerate.utils import calculate_maximum_sizes
    from transformers import AutoConfig, AutoModelForSequenceClassification

    def run() -> dict[str, int]:
        config = AutoConfig.from_pretrained(path)
        with init_empty_weights():
            auto: Any = AutoModelForSequenceClassification
            model = auto.from_config(config)
        return {"load_bytes": calculate_maximum_sizes(model)[0]}

    return timed(run)


def fakegpu(path: str, card: str = FAKEGPU_CARD) -> dict[str, Any]:
    """Run the task on FakeGPU's own CUDA, which must come before torch."""
    import fakegpu as peer  # type: ignore[import-not-found]

    peer.init(runtime="fakecuda", profile=card, device_count=1)
    import torch

    if card != FAKEGPU_CARD:
        return {"small_card": attempt(lambda: task(path, "cuda"))}

    def run() -> dict[str, int]:
        torch.cuda.reset_peak_memory_stats()
        peaks = CudaPeaks()
        task(path, "cuda", note=peaks.note, mend=mend_buffers)
        return peaks.found

    found = {"unmodified": attempt(lambda: task(path, "cuda"))}
    gc.collect()
    return {**timed(run), **found}


PEERS: dict[str, Callable[[str], dict[str, Any]]] = {
    "cpu": cpu,
    "gpumem": gpumem,
    "memray": memray,
    "torch": pytest_torch,
    "memtracker": memtracker,
    "fake": fake,
    "accelerate": accelerate,
    "fakegpu": fakegpu,
    "fakegpu-small": lambda path: fakegpu(path, FAKEGPU_SMALL_CARD),
}


def main() -> None:
    """Run the peer that is named, and write what it found."""
    name, path, result = sys.argv[1:]
    warnings.simplefilter("ignore")
    try:
        found = PEERS[name](path)
    except ImportError as error:
        found = {"missing": str(error)}
    Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
