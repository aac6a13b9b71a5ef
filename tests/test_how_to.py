"""Each page of docs/how-to holds a test file that passes: the OOM first, then the fix."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

pytestmark = pytest.mark.usefixtures("as_read")

PAGES = Path(__file__).parents[1] / "docs" / "how-to"
LIGHT = ("-p", "no:cacheprovider", "-W", "error")
FILES = {
    page.stem: re.findall(
        r"^```python\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    for page in sorted(PAGES.glob("*.md"))
    if page.name != "README.md"
}
#: Options that a page says its tests are run with; such a page is run by itself.
OPTIONS: Final = {
    page.stem: found.group(1).split()
    for page in sorted(PAGES.glob("*.md"))
    if (
        found := re.search(r"^\$ pytest (--.*)$", page.read_text("utf-8"), re.MULTILINE)
    )
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
    plain = [name for name in FILES if name not in OPTIONS]
    pytester.makepyfile(**{_module(name): FILES[name][0] for name in plain})

    result = pytester.runpytest_subprocess(*LIGHT)

    assert {"passed"} == set(result.parseoutcomes())
    for name in plain:
        result.stdout.fnmatch_lines([f"{_module(name)}.py *"])


@pytest.mark.parametrize("name", OPTIONS)
def test_an_example_with_options_runs_with_them(
    pytester: pytest.Pytester, name: str
) -> None:
    """As the page says."""
    pytester.makepyfile(**{_module(name): FILES[name][0]})

    result = pytester.runpytest_subprocess(*LIGHT, *OPTIONS[name])

    assert {"passed"} == set(result.parseoutcomes())


def _module(page: str) -> str:
    return f"test_{page.replace('-', '_')}"
