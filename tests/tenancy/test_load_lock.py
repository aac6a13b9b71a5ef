"""Two processes load bert-large at once; a lock lets one after the other do so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

#: One load has the weights on the card twice, 2.5 GiB, and leaves 1.25 behind; a card of
#: 4.2 GiB holds a loaded model and a load, and not two loads.
SUITE = """
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification
from pytest_gpumem import gpu_load_lock

def load(path, is_locked, tried, other):
    with gpu_load_lock(timeout_s=300) if is_locked else nullcontext():
        try:
            weights = load_file(f"{path}/model.safetensors", device="cuda")
            config = AutoConfig.from_pretrained(path)
            model = AutoModelForSequenceClassification.from_config(config).cuda()
        finally:
            tried.touch()
        for _ in range(0 if is_locked else 2000):
            if other.exists():
                break
            time.sleep(0.05)
        model.load_state_dict(weights)
        del weights
        torch.cuda.empty_cache()
    return model

def two_loads(path, tmp_path, is_locked):
    names = [str(tmp_path / name) for name in ("a", "b")]
    command = [sys.executable, __file__, str(path), "locked" if is_locked else "free"]
    loads = [
        subprocess.Popen(
            [*command, *order], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for order in (names, names[::-1])
    ]
    # A loaded model stays on the card until both are done.
    if is_locked:
        while not all(Path(name + "-loaded").exists() for name in names):
            assert all(each.poll() is None for each in loads), loads[0].stderr.read()
            time.sleep(0.05)
    ends = [each.communicate("done")[1] for each in loads]
    return [each.returncode for each in loads], "".join(ends)

def test_at_once(make_checkpoint, tmp_path):
    path = make_checkpoint("bert-large", weights="zeros")
    codes, text = two_loads(path, tmp_path, is_locked=False)
    assert 1 in codes  # one of them, or both
    assert "OutOfMemoryError: CUDA out of memory" in text

def test_one_after_the_other(make_checkpoint, tmp_path):
    path = make_checkpoint("bert-large", weights="zeros")
    assert [0, 0] == two_loads(path, tmp_path, is_locked=True)[0]

if __name__ == "__main__":
    path, how, own, other = sys.argv[1:]
    model = load(path, how == "locked", Path(own), Path(other))
    Path(own + "-loaded").touch()
    sys.stdin.read()
"""


@pytest.mark.slow
def test_loads_that_do_not_fit_at_once_fit_in_turn(
    pytester: pytest.Pytester, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bert-large at its real size, on one simulated card that both processes share."""
    monkeypatch.setenv("PYTEST_GPUMEM_TENANCY", str(tmp_path / "tenancy"))
    pytester.makepyfile(SUITE)

    result = pytester.runpytest_subprocess(
        "--gpu-card=4.2GiB,cc=8.6", "--gpu-values=none", "-p", "no:cacheprovider"
    )

    result.assert_outcomes(passed=2)
