"""Who may import whom, read from the source; and what must stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pytest_gpumem

ROOT = Path(pytest_gpumem.__file__).parent
GROUND = {
    "as_written",
    "errors",
    "files",
    "guards",
    "host_memory",
    "inheritance",
    "living_objects",
    "sizes",
    "stacks",
    "tables",
    "cards",
    "cards_table",
    "visibility",
    "_version",
}
#: What is pure Python: no torch, no pytest.
PURE = GROUND | {"allocator", "kernels", "records", "rules", "sweeps"}
MAY_IMPORT = {
    "ground": GROUND,
    "allocator": GROUND | {"allocator"},
    "kernels": GROUND | {"kernels"},
    "records": GROUND | {"records"},
    "rules": GROUND | {"rules"},
    "sweeps": GROUND | {"records", "rules", "sweeps"},
    # What runs a sweep, beside what a sweep is.
    "sweeps.run": PURE | {"devices", "instruments"},
    "sweeps.judge": PURE | {"devices", "instruments"},
    "devices": PURE | {"devices"},
    "instruments": PURE | {"devices", "instruments"},
    "checking": PURE | {"devices", "instruments", "checking"},
    "tenancy": GROUND | {"allocator", "tenancy"},
    "reports": PURE | {"reports"},
    "children": PURE | {"devices", "instruments", "tenancy", "hub", "children"},
    "planning": GROUND | {"devices", "checkpoints", "instruments", "planning"},
    "nvidia_smi": GROUND | {"tenancy", "nvidia_smi"},
    "baselines": GROUND | {"records", "baselines"},
    "checkpoints": GROUND | {"checkpoints"},
    # Of devices only what waits for imports and replaces attributes.
    "hub": GROUND | {"devices", "checkpoints", "hub"},
    "strategies": GROUND | {"rules"},
    "recording": GROUND | {"allocator", "devices", "recording"},
    "doctor": GROUND | {"allocator", "devices", "checkpoints"},
    "commands": GROUND
    | {"records", "baselines", "reports", "checking", "devices", "commands"},
    "cli": GROUND
    | {
        "allocator",
        "commands",
        "devices",
        "planning",
        "checkpoints",
        "recording",
        "baselines",
        "reports",
        "doctor",
    },
    "plugin": PURE
    | {
        "devices",
        "instruments",
        "reports",
        "baselines",
        "checkpoints",
        "hub",
        "checking",
        "children",
        "tenancy",
        "plugin",
    },
}
MODULES = sorted(ROOT.rglob("*.py"))


def _room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if ".".join(parts) in MAY_IMPORT:
        return ".".join(parts)
    return "ground" if parts[0] in GROUND else parts[0]


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if path.parent != ROOT or path.name != "__init__.py"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_arrows_point_one_way(path: Path) -> None:
    """A room imports only the rooms below it, and only the plugin imports pytest."""
    room = _room(path)
    ours = {
        name.split(".")[1]
        for name in _imports(path)
        if name.startswith("pytest_gpumem.")
    }

    assert ours <= MAY_IMPORT[room]
    if room != "plugin":
        assert not {n for n in _imports(path) if n.split(".")[0] == "pytest"}
    assert not {n for n in _imports(path) if n.split(".")[0] == "_pytest"}
    if room in ("ground", "reports") or room in PURE:
        assert not {n for n in _imports(path) if n.split(".")[0] == "torch"}


@pytest.mark.parametrize(
    "code",
    [
        "import pytest_gpumem",
        "import pytest_gpumem.plugin",
        "import pytest_gpumem.cli",
        "import pytest; pytest.main(['--help', '-q'])",
    ],
)
def test_importing_stays_light(code: str, tmp_path: Path) -> None:
    """Neither the package, nor the plugin, nor pytest --help imports torch."""
    check = f"{code}\nimport sys; sys.exit('torch' in sys.modules)"

    done = subprocess.run(
        [sys.executable, "-c", check], cwd=tmp_path, capture_output=True, check=False
    )

    assert 0 == done.returncode, done.stderr.decode()


#: What reads pickles, or code, out of a file.
_UNSAFE = {
    ("pickle", "load"),
    ("pickle", "loads"),
    ("pickle", "Unpickler"),
    ("torch", "load"),
    ("torch.jit", "load"),
    ("torch.hub", "load"),
    ("numpy", "load"),
    ("np", "load"),
    ("marshal", "loads"),
    ("shelve", "open"),
    ("builtins", "eval"),
    ("builtins", "exec"),
}


def _unsafe(source: str) -> list[str]:
    """Return the calls and imports in a source that would run what a file says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[tuple[str, str]] = []
        if isinstance(node, ast.ImportFrom):
            names = [(node.module or "", alias.name) for alias in node.names]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            names = [(ast.unparse(node.func.value), node.func.attr)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            names = [("builtins", node.func.id)]
        found += [f"{node.lineno}: {name}" for name in names if name in _UNSAFE]  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load('x')",
        "from pickle import loads",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "pickle.Unpickler(stream).load()",
        "eval(text)",
    ],
)
def test_an_unsafe_call_is_seen(source: str) -> None:
    """The next test can fail."""
    assert 1 == len(_unsafe(source))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled(path: Path) -> None:
    """The package loads no pickle and runs no text, whoever wrote the file.

    Checkpoints in the legacy format are read by the user's own call of transformers.
    """
    assert [] == _unsafe(path.read_text(encoding="utf-8"))


def test_every_public_name_can_be_had() -> None:
    """What __all__ promises is there."""
    for name in pytest_gpumem.__all__:
        assert getattr(pytest_gpumem, name) is not None
    assert set(pytest_gpumem.__all__) <= set(dir(pytest_gpumem))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pytest_gpumem.nothing


def test_every_test_file_is_in_a_room() -> None:
    """Under a name of its own, as pytest imports test files by their names."""
    tests = Path(__file__).parents[1]
    names = [each.name for each in tests.rglob("test_*.py")]

    assert [] == list(tests.glob("test_*.py"))
    assert sorted(set(names)) == sorted(names)
