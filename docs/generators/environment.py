"""The reference of environment variables: those whose names the package's source has."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Final

import pytest_gpumem
from generators.markdown import page, table

_NAME: Final = re.compile(
    r"(PYTEST_GPUMEM|PYTORCH|CUDA|TORCH_CUBLAS|CUBLAS|GITHUB)_[A-Z_]+"
)

NOTES: Final = {
    "PYTEST_GPUMEM_CACHE": "the folder in which built checkpoints are kept; by default the "
    "user's cache folder, as XDG defines it",
    "PYTEST_GPUMEM_TENANCY": "the folder that a user's processes share, for "
    "`gpu_load_lock` and for cards that several processes use; by default a folder of the "
    "user in the temporary folder; see [security](../security.md)",
    "PYTEST_GPUMEM_LOCKS": "the folder of `gpu_load_lock` that several users share; see "
    "[security](../security.md#one-lock-for-all-users-of-a-machine)",
    "PYTEST_GPUMEM_WORKER": "the number of a pytest-xdist worker; a run sets it, do not "
    "set it yourself",
    "PYTEST_GPUMEM_CHILDREN": "device, budgets and rules for child processes; a run sets "
    "it, do not set it yourself",
    "PYTEST_GPUMEM_PYTHON": "the Python that runs `nvidia-smi` for simulated cards; a run "
    "sets it, do not set it yourself",
    "PYTEST_GPUMEM_NO_CHILDREN": "any value: no run reaches child processes, as with "
    "`--gpu-no-children`, and the file that Python reads at its start does nothing",
    "PYTEST_GPUMEM_HUB": "the hub models that child processes serve; a run sets it, do not "
    "set it yourself",
    "CUDA_VISIBLE_DEVICES": "the visible cards and their order, real or simulated; a "
    "process reads it when it first uses a card",
    "CUBLAS_WORKSPACE_CONFIG": "the size of cuBLAS's workspace, on simulated cards too",
    "TORCH_CUBLAS_WORKSPACE_CACHE": "`1`: cuBLAS keeps its workspaces also from torch 2.15 "
    "on, on simulated cards too",
    "PYTORCH_ALLOC_CONF": "settings of the caching allocator, which the simulated card "
    "follows; a setting that is not modelled ends the run at its start",
    "PYTORCH_CUDA_ALLOC_CONF": "the older name of `PYTORCH_ALLOC_CONF`",
    "PYTORCH_HIP_ALLOC_CONF": "not read; only in the text of the flavour `hip`",
    "GITHUB_ACTIONS": "`true` in a run of GitHub Actions: tests that fail for their memory "
    "get annotations in the pull request; with any other value they do not",
    "GITHUB_WORKSPACE": "set by GitHub Actions: the checkout; paths of annotations are "
    "relative to it",
    "GITHUB_STEP_SUMMARY": "set by GitHub Actions; runs that used a card write their "
    "summary there",
}


def environment() -> str:
    """Return the page."""
    found = find_names()
    ours = [name for name in found if name.startswith("PYTEST_GPUMEM")]
    theirs = [name for name in found if name not in ours]
    return page(
        [
            "# Environment variables",
            "[Options](options.md) are not read from the environment, except through pytest's "
            "own `PYTEST_ADDOPTS`. These variables have an effect:",
            "## Variables of the plugin",
            _table(ours, found),
            "## Variables of CUDA, PyTorch and GitHub",
            _table(theirs, found),
        ]
    )


def _table(names: list[str], found: dict[str, str]) -> str:
    return table(
        ("variable", "meaning"),
        ((f"`{name}`", NOTES.get(name, f"read by `{found[name]}`")) for name in names),
    )


def find_names() -> dict[str, str]:
    """Return the variables that the source names, and the module of each."""
    found: dict[str, str] = {}
    root = Path(pytest_gpumem.__path__[0])
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            value = node.value if isinstance(node, ast.Constant) else None
            if isinstance(value, str) and _NAME.fullmatch(value):
                module = path.relative_to(root).with_suffix("").as_posix()
                found.setdefault(value, module.replace("/", "."))
    return dict(sorted(found.items()))
