"""A session leaves the process as it found it: looked at from outside, twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from inner_tests import SWEEP_AND_FALLBACK

from pytest_gpumem.inheritance import CHILDREN_VARIABLE

ROOT = Path(__file__).parents[2]
#: A session that uses everything once; some of it fails on purpose.
TESTS = (
    """
    import multiprocessing
    import subprocess
    import sys

    import pynvml
    import pytest
    import torch

    CODE = "import torch; torch.zeros(1024, device='cuda')"

    def allocate():
        return torch.zeros(2**18, device="cuda")

    def fork():
        torch.zeros(2**18, device="cuda")

    # First, as CUDA refuses to be used in a fork of a process that has used it.
    def test_fork():
        process = multiprocessing.get_context("fork").Process(target=fork)
        process.start()
        process.join()
        assert process.exitcode == 0

    def test_peak(vram_recorder):
        with vram_recorder():
            allocate()

    @pytest.mark.gpu_budget("2MiB")
    def test_over_the_budget():
        torch.zeros(2**22, device="cuda")

    @pytest.mark.max_vram("512KiB")
    def test_over_the_limit():
        allocate()

    @pytest.mark.inject_oom("any:nth=1")
    def test_injected():
        allocate()
"""
    + SWEEP_AND_FALLBACK
    + """
    def test_competing(competing_process):
        with competing_process("1GiB"):
            allocate()

    def test_child():
        subprocess.run([sys.executable, "-c", CODE], check=True)

    def test_nvml():
        pynvml.nvmlInit()
        try:
            pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0))
        finally:
            pynvml.nvmlShutdown()

    def test_training():
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LSTM(8, 8)).to("cuda")
        optimizer = torch.optim.AdamW(model.parameters())
        with torch.autocast("cuda"):
            model(torch.ones(1, 2, 8, device="cuda"))[0].sum().backward()
        optimizer.step()
        with torch.cuda.stream(torch.cuda.Stream()):
            allocate()
"""
)
OPTIONS = (
    "-p",
    "no:cacheprovider",
    "-p",
    "pytest_gpumem.plugin",
    "--gpu-snapshots=out/snapshots",
    "--gpu-report=json:out/r.json",
    "--gpu-report=html:out/r.html",
    "--gpu-baseline=out/b.json",
    "--gpu-update-baseline",
    "--gpu-suggest=print",
    "--gpu-inject-oom=any:nth=100",
)
SCRIPT = """
import atexit, gc, importlib, json, logging, os, signal, sys, tempfile, threading, warnings
import multiprocessing.util  # it works at exit, as long as the process lives
import pytest

def attributes():
    # Every attribute of every module, and of torch's and NVML's classes.
    owners = {
        name: vars(module)
        for name, module in list(sys.modules.items())
        if hasattr(module, "__dict__") and name.partition(".")[0] not in OWN
    }
    for module in list(owners.values()):
        for value in list(module.values()):
            if issubclass(type(value), type) and str(value.__module__).startswith(ROOMS):
                owners[f"{value.__module__}:{value.__qualname__}"] = vars(value)
    return {name: dict(each) for name, each in owners.items()}

OWN = ("__main__", "__mp_main__", "pytest_gpumem", "_pytest", "pytest", "linecache", "test_it")
ROOMS = ("torch", "pynvml", "threading", "multiprocessing", "subprocess")

def state():
    gc.collect()
    files = {}
    for each in os.listdir("/proc/self/fd"):
        try:
            files[each] = os.readlink("/proc/self/fd/" + each)
        except OSError:
            pass  # what has just listed them
    hooks = (sys.excepthook, threading.excepthook, sys.unraisablehook, sys.displayhook)
    return {
        "threads": sorted(f"{each.name} {each.ident}" for each in threading.enumerate()),
        "children": [each.name for each in multiprocessing.active_children()],
        "files": files,
        "environment": {k: v for k, v in os.environ.items() if k not in BY_TORCH},
        "meta_path": list(map(repr, sys.meta_path)),
        "path_hooks": list(map(repr, sys.path_hooks)),
        "path": list(sys.path),
        "temporary": [k for k in os.listdir(tempfile.gettempdir()) if k not in BY_TORCH],
        "signals": [repr(signal.getsignal(each)) for each in signal.Signals],
        "hooks": [*map(repr, hooks), repr(sys.gettrace()), repr(sys.getprofile())],
        "collector": list(map(repr, gc.callbacks)),
        "loggers": list(map(repr, logging.getLogger().handlers)),
        "warnings": list(map(repr, warnings.filters)),
        "at_exit": atexit._ncallbacks() if early else None,
        "torch": torch_state() if "torch" in sys.modules else None,
    }

# Made by torch._inductor where it is first imported.
BY_TORCH = ("TORCHINDUCTOR_CACHE_DIR", "torchinductor_root", "torchinductor_" + os.environ.get("USER", ""))

def torch_state():
    import torch
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return [
        torch._C._len_torch_dispatch_stack(),
        torch._C._len_torch_function_stack(),
        has("aten::empty.memory_format", "CUDA"),
        has("aten::empty_strided", "CUDA"),
        torch.cuda.is_available(),
        str(torch.get_default_dtype()),
        torch.is_grad_enabled(),
        sum(len(v) for k, v in vars(torch.nn.modules.module).items() if k.startswith("_global") and k.endswith("hooks")),
    ]

def changes(before, after):
    found = []
    for owner, names in before.items():
        now = after[owner]
        found += [f"{owner}.{name}" for name in names if now.get(name) is not names[name]]
        if ":" in owner:
            found += [f"{owner}.{name} is new" for name in now.keys() - names.keys()]
    return found

early = sys.argv[1] == "early"
if early:
    # What torch itself changes when it is first used, on a CPU.
    import pynvml, torch._dynamo, torch._inductor.compile_fx
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    with torch.autocast("cpu"):
        model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    del model, optimizer

tempfile.NamedTemporaryFile().close()
states, codes, changed = [state()], [], []
before = attributes() if early else None
for _session in range(2):
    codes.append(int(pytest.main(sys.argv[2:])))
    states.append(state())
    # What imports torch for the first time has it change other modules.
    before = before or attributes()
    changed += changes(before, attributes())
with open("found.json", "w") as file:
    json.dump({"codes": codes, "states": states, "changed": changed}, file)
"""


def _run(folder: Path, early: str) -> dict[str, Any]:
    """Return what a process saw before and after two sessions."""
    (folder / "tmp").mkdir()
    script = folder / "script.py"
    script.write_text(SCRIPT, "utf-8")
    environment = {
        **os.environ,
        "TMPDIR": str(folder / "tmp"),
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        # Other plugins are not looked at.
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    for name in ("GITHUB_STEP_SUMMARY", "PYTEST_CURRENT_TEST", CHILDREN_VARIABLE):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, str(script), early, *OPTIONS, "test_it.py"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert 0 == done.returncode, done.stdout + done.stderr
    assert 2 == done.stdout.count(" 3 failed, 8 passed"), done.stdout
    found: dict[str, Any] = json.loads((folder / "found.json").read_text("utf-8"))
    return found


def _untouched() -> list[Any]:
    """Return the state of a torch that nothing but the build itself has touched."""
    of_torch = SCRIPT.partition("def torch_state")[2].partition("\ndef ")[0]
    script = f"def torch_state{of_torch}\nimport json\nprint(json.dumps(torch_state()))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={
            name: value
            for name, value in os.environ.items()
            if name != CHILDREN_VARIABLE
        },
        capture_output=True,
        text=True,
        check=True,
    )
    found: list[Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("when", ["early", "late"])
def test_a_session_leaves_nothing_behind(when: str, pytester: pytest.Pytester) -> None:
    """Threads, files, environment, hooks, folders and torch are as before.

    With torch imported before the first session, and by it.
    """
    pytester.makepyfile(test_it=TESTS)

    found = _run(pytester.path, when)

    first, *others = found["states"]
    if when == "late":
        first["torch"] = _untouched()
    for name, before in first.items():
        assert [before, before] == [each[name] for each in others], name
    # How many hooks torch has handed out so far; each was taken back.
    assert {"torch.utils.hooks:RemovableHandle.next_id"} >= set(found["changed"])
