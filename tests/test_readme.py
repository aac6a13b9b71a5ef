"""The README's Python blocks run as they stand."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch  # an inner run would import it anew, which torch does not survive

pytestmark = pytest.mark.usefixtures("as_read")

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_the_readme_has_examples() -> None:
    """Four: a fallback that fails, a plain test, a proved fallback, a script."""
    assert 4 == len(BLOCKS)
    assert torch.__version__


def test_the_newcomer_sees_what_the_first_screen_shows(
    pytester: pytest.Pytester,
) -> None:
    """The fallback fails, is mended, has a baseline, and is gated."""
    budget = ("-p", "no:cacheprovider", "--gpu-budget=280MiB")
    gate = (*budget, "--gpu-baseline=gpu-baseline.json")
    shown = README.partition("$ pytest --gpu-budget=280MiB\n")[2].partition("```")[0]
    mended = BLOCKS[0].replace("model.half()", "model.cpu().half()")

    pytester.makepyfile(test_load=BLOCKS[0])
    before = pytester.runpytest_subprocess(*budget)
    pytester.makepyfile(test_load=mended)
    after = pytester.runpytest_subprocess(*gate, "--gpu-update-baseline")
    pytester.makepyfile(test_load=mended.replace("4096, 4096", "4160, 4160"))
    larger = pytester.runpytest_subprocess(*gate)

    before.assert_outcomes(failed=1)
    before.stdout.fnmatch_lines(
        [each.replace("…", "*") for each in shown.splitlines() if each.strip() != "…"]
    )
    after.assert_outcomes(passed=1)
    larger.assert_outcomes(failed=1)
    larger.stdout.fnmatch_lines(
        [line.strip() for line in README.splitlines() if "+8.07 MiB" in line]
    )


def test_the_plain_script_meets_its_budget(pytester: pytest.Pytester) -> None:
    """Under 1 GiB it fails with torch's error, under 4 GiB it passes with its peak."""
    pytester.makepyfile(BLOCKS[1])
    served = ("-p", "no:cacheprovider", "--gpu-hub-model=bert-large-uncased")

    short = pytester.runpytest_subprocess(*served, "--gpu-budget=1GiB")
    ample = pytester.runpytest_subprocess(*served, "--gpu-budget=4GiB")

    short.assert_outcomes(failed=1, passed=1)
    short.stdout.fnmatch_lines(
        ["E *torch.OutOfMemoryError: CUDA out of memory.* 1024.00 MiB allowed; *"]
    )
    ample.assert_outcomes(passed=2)
    ample.stdout.fnmatch_lines(["* 1.25 GiB * - * - *::test_it_loads"])
    ample.stdout.fnmatch_lines(["* 1.25 GiB * - * - *::test_auto_finds_room"])


def test_the_fallback_is_proved(pytester: pytest.Pytester) -> None:
    """The example of judge_load passes."""
    pytester.makepyfile(BLOCKS[2])

    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")

    result.assert_outcomes(passed=2)


def test_the_script_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The example without pytest prints the error and the peak."""
    script = tmp_path / "script.py"
    script.write_text(BLOCKS[3], encoding="utf-8")

    runpy.run_path(str(script))

    assert (
        "CUDA out of memory. Tried to allocate 20.00 MiB"[:40]
        in capsys.readouterr().out
    )
