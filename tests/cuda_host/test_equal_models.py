"""Models of transformers have the same figures on PyTorch's own code and simulated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from substitute import environment

if TYPE_CHECKING:
    from collections.abc import Mapping

_PROGRAM = Path(__file__).parents[1] / "support" / "model_figures.py"


def _figures(folder: Path, environ: Mapping[str, str], *card: str) -> dict[str, Any]:
    output = folder / "figures.json"
    command = [sys.executable, str(_PROGRAM), str(output), *card]
    done = subprocess.run(
        command, env=dict(environ), capture_output=True, text=True, check=False
    )
    assert 0 == done.returncode, done.stderr
    found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize(
    ("capability", "processors"), [("7.5", "40"), ("8.0", "108"), ("9.0", "132")]
)
def test_figures_of_models(
    tmp_path: Path, runtime: Path, capability: str, processors: str
) -> None:
    """Allocated, reserved, requested, active, segments; after each phase, and the peaks."""
    card = (capability, processors)
    host = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    real = _figures(
        tmp_path,
        environment(runtime)
        | {
            "CUDA_HOST_DEVICES": "1",
            "CUDA_HOST_TOTAL": "16G",
            "CUDA_HOST_CC": capability,
            "CUDA_HOST_SMS": processors,
            "CUDA_HOST_CONTEXT": "0",
            "CUDA_HOST_VALUES": "none",
            "CUDA_HOST_STATE": str(tmp_path / "cards"),
        },
        *card,
    )
    simulated = _figures(tmp_path, host | {"SIMULATED": "1"}, *card)

    assert simulated.keys() == real.keys()
    differing = [
        f"{name}, {phase}: {figures}, simulated {simulated[name].get(phase)}"
        for name, phases in real.items()
        for phase, figures in phases.items()
        if simulated[name].get(phase) != figures
    ]
    assert [] == differing
    assert 50 <= sum("error" not in phases for phases in real.values()), real
