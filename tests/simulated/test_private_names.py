"""Private names that torch's own Python code calls for CUDA: all are answered.

They are read out of the sources of the torch that is installed: a new one that brings
a name which is neither answered nor refused by name makes this fail.
"""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from versions import needs

from pytest_gpumem.devices.simulated.cuda_functions import C_FUNCTIONS
from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.errors import UnsupportedOnSimulatedDeviceError

ROOT = Path(torch.__file__).parent
#: The code whose names are all read; of the other, only names that speak of CUDA.
ALL_OF = ("cuda", "accelerator", "backends/cuda", "backends/cudnn")
OTHERS = ("_inductor", "_dynamo", "utils", "nn", "optim", "distributed")
OF_CUDA = re.compile(
    r"_C\W+(_(?:cuda|Cuda|CUDA|accelerator|cudnn|nccl|gds|graph_pool|cudart|nvtx)\w*)"
)

#: The rest of a build for CUDA, which one without it is given as well.
OF_BUILD = {"_cudnn", "_cuda_CUDAAllocator_AllocatorState"}
#: Behind classes that are replaced as a whole.
BASES = {"_CudaStreamBase", "_CudaEventBase"}


class _Reader(ast.NodeVisitor):
    """Collects the dotted paths below ``torch._C`` that a module names."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def visit_Attribute(self, node: ast.Attribute) -> None:  # ast's name
        """``torch._C.name`` and ``_C.name``."""
        if ast.unparse(node.value) in {"torch._C", "_C"}:
            self.names.add(node.attr)
        self.generic_visit(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:  # ast's name
        """``from torch._C import name``."""
        if node.module == "torch._C":
            self.names.update(each.name for each in node.names)

    def visit_Call(self, node: ast.Call) -> None:  # ast's name
        """``getattr(torch._C, "name")`` and ``hasattr``."""
        if (
            ast.unparse(node.func) in {"getattr", "hasattr"}
            and ast.unparse(node.args[0]) in {"torch._C", "_C"}
            and isinstance(node.args[1], ast.Constant)
        ):
            self.names.add(str(node.args[1].value))
        self.generic_visit(node)


def _called() -> set[str]:
    """Return the names that torch's code for CUDA and accelerators calls."""
    reader = _Reader()
    for folder in ALL_OF:
        for path in (ROOT / folder).rglob("*.py"):
            reader.visit(ast.parse(path.read_text(encoding="utf-8")))
    for folder in OTHERS:
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8", errors="replace")
            reader.names.update(OF_CUDA.findall(text))
    return reader.names


CALLED = _called()


def test_the_reader_reads() -> None:
    """It finds what is known to be there; a layout that it does not know is seen."""
    assert {"_cuda_init", "_cudart", "_accelerator_setStream"} <= CALLED
    assert len(CALLED) > 100


def test_every_private_name_is_answered() -> None:
    """Each is there while cards are simulated, on a build without CUDA as well."""
    with simulated_device("T4"):
        missing = {name for name in CALLED if not hasattr(torch._C, name)}

    assert set() == missing


def test_what_speaks_of_cuda_is_replaced() -> None:
    """On a build with CUDA, too, no such name asks a driver that is not there."""
    names = {name for name in CALLED if OF_CUDA.fullmatch(f"_C.{name}")}

    assert set() == names - set(C_FUNCTIONS) - OF_BUILD - BASES


def test_modules_that_bind_a_name_themselves_have_the_same() -> None:
    """A module of ``torch.cuda`` that imported a name calls the replacement."""
    with simulated_device("T4"):
        for path in (ROOT / "cuda").glob("*.py"):
            module = importlib.import_module(
                f"torch.cuda.{path.stem}".removesuffix(".__init__")
            )
            for name in set(vars(module)) & set(C_FUNCTIONS):
                bound: Any = getattr(module, name)
                assert bound is getattr(torch._C, name), (path.stem, name)


@needs("backends.cuda.cublas_workspace_size")
def test_answers_and_refusals() -> None:
    """What was missing answers as a card's build does, or says what to do."""
    with simulated_device("A100-40GB"):
        limit = torch.backends.cudnn.benchmark_limit
        torch.backends.cudnn.benchmark_limit = 4
        workspace = torch.backends.cuda.cublas_workspace_size()
        version = torch._C._cuda_getCompiledVersion()
        major, minor = map(int, str(torch.version.cuda).split("."))

        assert (10, 4) == (limit, torch.backends.cudnn.benchmark_limit)
        assert 8_519_680 == workspace
        assert version == 1000 * major + 10 * minor
        for refused in (
            lambda: torch.backends.cuda.cublas_workspace_size(1024),
            torch.backends.cuda.cublaslt_workspace_size,
            torch.cuda.memory._get_current_allocator,
            lambda: torch._C._cuda_getCheckpointState(0, (0, 0)),
        ):
            with pytest.raises(UnsupportedOnSimulatedDeviceError):
                refused()
