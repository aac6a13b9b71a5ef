"""The tutorial's files do what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("as_read")

PAGE = (Path(__file__).parents[1] / "docs" / "tutorial.md").read_text("utf-8")
BROKEN, ON_THE_SERVER, FIXED, EVERYWHERE = re.findall(
    r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE
)
K80 = ("-p", "no:cacheprovider", "--gpu-card=K80", "-q")


def test_the_fallback_fails_is_fixed_proved_and_gated(
    pytester: pytest.Pytester,
) -> None:
    """Each step of the page, as a reader makes it."""
    pytester.makepyfile(service=BROKEN, test_service=ON_THE_SERVER)
    broken = pytester.runpytest_subprocess(*K80)

    broken.assert_outcomes(failed=1)
    broken.stdout.fnmatch_lines(
        [
            "E *torch.OutOfMemoryError: CUDA out of memory. Tried to allocate *"
            "a total capacity of 11.17 GiB * has 8.00 GiB memory in use*",
            "During handling of the above exception, another exception occurred:",
            "E *torch.OutOfMemoryError: CUDA out of memory.*",
            "*- GPU memory -*",
        ]
    )

    pytester.makepyfile(service=FIXED, test_everywhere=EVERYWHERE)
    gate = "--gpu-baseline=vram.json"
    fixed = pytester.runpytest_subprocess(*K80, gate, "--gpu-update-baseline")

    assert 0 == fixed.ret
    fixed.stdout.fnmatch_lines(["vram.json written: 2 tests"])

    gated = pytester.runpytest_subprocess(
        *K80, gate, "--gpu-compare-fail=allocated:5%", "test_service.py"
    )

    assert 0 == gated.ret
    gated.stdout.fnmatch_lines(["*1 the same*"])
