"""Pages do what they print, walked as a reader does it; and the walk itself."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT: Final = Path(__file__).parents[2]
HOW_TO: Final = ROOT / "docs" / "how-to"
#: Pages, each after those that it counts on.
CHAPTERS: Final = [
    ("README.md",),
    *(
        (f"docs/{name}.md",)
        for name in (
            "check",
            "ci",
            "failures",
            "fallbacks",
            "host-memory",
            "isolated",
            "process-bytes",
            "quick-start",
            "scripts",
            "suggestions",
            "tutorial",
        )
    ),
    *(
        ("docs/how-to/README.md", f"docs/how-to/{page.name}")
        for page in sorted(HOW_TO.glob("*.md"))
        if page.name != "README.md"
    ),
]


def _load() -> Any:
    spec = importlib.util.spec_from_file_location("walk", ROOT / "tools" / "walk.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["walk"] = module
    spec.loader.exec_module(module)
    return module


walk: Final = _load()


@pytest.mark.slow
@pytest.mark.parametrize("pages", CHAPTERS, ids=lambda pages: Path(pages[-1]).stem)
def test_a_page_does_what_it_prints(pages: Sequence[str], tmp_path: Path) -> None:
    """Every file saved, every command typed, every shown line compared."""
    assert walk.walk([ROOT / page for page in pages], tmp_path) > 1


def _page(tmp_path: Path, *lines: str) -> list[Path]:
    page = tmp_path / "page.md"
    page.write_text("\n".join([*lines, ""]), encoding="utf-8")
    (tmp_path / "scratch").mkdir()
    return [page]


def test_a_reader_saves_changes_and_types(tmp_path: Path) -> None:
    """In one shell with an empty home; what makes environments is left out."""
    page = _page(
        tmp_path,
        "    ```python",
        "    # code/one.py",
        "    print('first', 1)",
        "    ```",
        "```console",
        "$ pip install no-such-project",
        "Successfully installed no-such-project",
        "$ cd code && SHOWN=set",
        "$ python one.py  # run it",
        "first …",
        "$ ls -A ~; echo $SHOWN",
        "set",
        "```",
        "```diff",
        "# one.py",
        " print('first', 1)",
        "+print('1 failed')",
        "+raise SystemExit(3)",
        "```",
        "```console",
        "$ python one.py",
        "…",
        "1 failed",
        "```",
    )

    assert 7 == walk.walk(page, tmp_path / "scratch")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["$ echo a; echo b", "a"], "the page shows:\na\n"),
        (["$ echo a; echo b", "…", "c", "…"], "the page shows:\nc\n"),
        (["$ echo a; echo b; echo c", "a", "c"], "the page shows:\nc\n"),
        (["$ false"], "ended with 1, the page shows success"),
        (["$ echo 1 failed", "1 failed"], "ended with 0, the page shows a failure"),
        (["$ exit 3"], "ended the shell"),
    ],
)
def test_a_page_that_shows_something_else_is_found(
    tmp_path: Path, lines: Sequence[str], message: str
) -> None:
    """A line that is not there, or not at that place; another end."""
    page = _page(tmp_path, "```console", *lines, "```")

    with pytest.raises(walk.WalkError, match=r"page\.md: ") as raised:
        walk.walk(page, tmp_path / "scratch")

    assert message in str(raised.value)


def test_what_nobody_can_save_or_change_is_found(tmp_path: Path) -> None:
    """A block of Python without a name; lines that the file does not have."""
    with pytest.raises(walk.WalkError, match="this block has no name"):
        walk.steps("```python\nimport torch\n```\n")
    page = _page(
        tmp_path, "```python", "# a.py", "1", "```", "```diff", "# a.py", "-2", "```"
    )

    with pytest.raises(walk.WalkError, match=r"a\.py has not once:\n2"):
        walk.walk(page, tmp_path / "scratch")


def test_a_part_can_be_walked_alone() -> None:
    """From its heading to the next of its level."""
    page = "# A\n## B\n```console\n$ b\n```\n### C\n```console\n$ c\n```\n## D\n```console\n$ d\n```\n"

    assert ["b", "c"] == [each.line for each in walk.steps(page, "B")]
    assert ["c"] == [each.line for each in walk.steps(page, "C")]
    with pytest.raises(walk.WalkError, match="no heading 'E'"):
        walk.steps(page, "E")


def test_any_text_may_be_none() -> None:
    """Where a page has … between blanks the output may have the blanks alone."""
    assert walk.first_missing(["E   … Error: …"], "E       Error: no\n") is None
    assert walk.first_missing(["E   … Error: …"], "E       Warning\n") is not None
