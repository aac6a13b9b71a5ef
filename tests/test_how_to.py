"""Each page of docs/how-to holds a test file that passes: the OOM first, then the fix."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

PAGES = Path(__file__).parents[1] / "docs" / "how-to"
FILES = {
    page.stem: re.findall(
        r"^```python\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    for page in sorted(PAGES.glob("*.md"))
    if page.name != "README.md"
}


def test_every_page_has_its_example() -> None:
    """One block each, and every page is in the table of contents."""
    contents = (PAGES / "README.md").read_text("utf-8")

    assert FILES
    for name, found in FILES.items():
        assert 1 == len(found), name
        assert "OutOfMemoryError" in found[0], name
        assert f"]({name}.md)" in contents


def test_the_examples_run_as_they_stand(pytester: pytest.Pytester) -> None:
    """All of their tests pass, in one run as a reader would make it."""
    pytester.makepyfile(
        **{f"test_{name.replace('-', '_')}": found[0] for name, found in FILES.items()}
    )

    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-W", "error")

    assert {"passed"} == set(result.parseoutcomes())
    for name in FILES:
        result.stdout.fnmatch_lines([f"test_{name.replace('-', '_')}.py *"])
