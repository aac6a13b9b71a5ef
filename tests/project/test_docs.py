"""The documentation's pages are up to date with the code, and their examples run."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch  # an inner run must not import torch a second time
from transformers import BertForSequenceClassification  # noqa: F401  # imports torch, which cannot be imported twice

import pytest_gpumem
from pytest_gpumem.plugin.marks import DESCRIPTIONS
from pytest_gpumem.plugin.settings import OPTIONS

pytest_plugins = ["pytester"]

pytestmark = pytest.mark.usefixtures("as_read")

DOCS = Path(__file__).parents[2] / "docs"
PAGES = runpy.run_path(str(DOCS / "generate.py"))["PAGES"]
REFERENCE = [Path(name).stem for name in PAGES if name.startswith("reference/")]
LIGHT = ("-p", "no:cacheprovider")


def blocks(page: str) -> list[str]:
    """Return the Python blocks of a page."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", sorted(PAGES))
def test_a_generated_page_is_in_step(name: str) -> None:
    """Otherwise: run python docs/generate.py."""
    assert torch.__version__
    assert (DOCS / name).read_text(encoding="utf-8") == PAGES[name]()


def test_the_reference_is_complete() -> None:
    """Every option, marker, fixture and public name is there, and has its words."""
    pages = {name: PAGES[f"reference/{name}.md"]() for name in REFERENCE}

    for option in OPTIONS:
        assert f"`{option.flag}" in pages["options"]
        is_set_in_the_file = not (option.is_action or option.replaced)
        assert (f"`{option.ini}`" in pages["options"]) is is_set_in_the_file
    for description in DESCRIPTIONS:
        name = re.split(r"[:(]", description)[0]
        assert f"## {name}\n" in pages["markers"]
    for name in set(pytest_gpumem.__all__) - {"__version__"}:
        assert f"### {name}\n" in pages["api"]
    assert "scope `session`" in pages["fixtures"].partition("## bert_large")[2]
    for name in ("checkpoint", "merge", "Exit codes"):
        assert f"## {name}\n" in pages["command-line"]
    assert "read by" not in pages["environment"], "say what the variable means"


def test_the_examples_of_markers_run(pytester: pytest.Pytester) -> None:
    """As they stand, and swept."""
    examples = [each for each in blocks("reference/markers.md") if "import" in each]
    pytester.makepyfile(**{f"test_{n}": each for n, each in enumerate(examples)})

    result = pytester.runpytest(*LIGHT, "--gpu-backend=simulated", "--gpu-oom-sweep")

    assert len(examples) > 1
    assert {"passed", "skipped"} == set(result.parseoutcomes())
    result.stdout.fnmatch_lines(["*1 skipped*"])


def test_the_ini_example_is_accepted(pytester: pytest.Pytester) -> None:
    """A card, a budget, and what may be repeated."""
    text = (DOCS / "reference" / "options.md").read_text(encoding="utf-8")
    pytester.makepyprojecttoml(text.partition("```toml\n")[2].partition("```")[0])
    pytester.makepyfile("def test_it(pytestconfig): pass")

    result = pytester.runpytest(*LIGHT)

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["gpumem: * card NVIDIA A100*, budget 4GiB"])


@pytest.mark.parametrize(
    "page", [DOCS.parent / "README.md", *DOCS.rglob("*.md")], ids=lambda path: path.name
)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    """Files exist and have the heading that an anchor names."""
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _hash, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text("utf-8"), re.MULTILINE)
            slugs = {
                re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings
            }
            assert anchor in slugs, f"{page.name}: {target}"


def test_each_cause_and_each_fix_has_a_page_with_one_file() -> None:
    """It shows the error first, and is in the table of contents."""
    contents = (DOCS / "how-to" / "README.md").read_text("utf-8")
    pages = {each.stem for each in (DOCS / "how-to").glob("*.md")} - {"README"}

    assert pages
    for name in pages:
        (code,) = blocks(f"how-to/{name}.md")
        assert "OutOfMemoryError" in code, name
        assert f"]({name}.md)" in contents


def test_the_ways_to_ask_for_a_sweep_work(pytester: pytest.Pytester) -> None:
    """Marker, fixture, function."""
    pytester.makepyfile(blocks("sweeps.md")[0])
    result = pytester.runpytest(*LIGHT)

    result.assert_outcomes(passed=3)


def test_the_bug_is_found_and_the_fix_is_one(pytester: pytest.Pytester) -> None:
    """With the figures that the page shows."""
    found, fixed = blocks("sweeps.md")[1:]
    pytester.makepyfile(test_loader=found)
    before = pytester.runpytest(*LIGHT)
    pytester.makepyfile(test_loader=fixed)
    after = pytester.runpytest(*LIGHT)

    before.stdout.fnmatch_lines(
        [
            "*allocation 2, transient, native: other error",
            "*RuntimeError: Expected all tensors to be on the same device*",
            "*replay: pytest test_loader.py::test_the_loaded_model_answers "
            "--gpu-replay-oom=load:nth=2",
            "*: 8 allocations at 1 site, 16 points: 2 recovered, 14 other error (*",
        ]
    )
    after.assert_outcomes(passed=1)
    after.stdout.fnmatch_lines(["*at 1 site, 16 points: 16 recovered (*"])


def test_the_trainers_reproduction_shows_the_finding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are in tests/third_party: their libraries are not installed here."""
    (code,) = (each for each in blocks("third-party.md") if "_train" in each)
    (tmp_path / "script.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(DOCS.parent))

    runpy.run_path("script.py")

    assert "False" == capsys.readouterr().out.splitlines()[-1]


@pytest.mark.slow
def test_tests_beside_each_other_do_what_the_page_says(
    pytester: pytest.Pytester,
) -> None:
    """All blocks are one file, run by two workers on one card of 16 GiB."""
    pytester.makepyfile("\n".join(blocks("many-processes.md")))
    result = pytester.runpytest(
        *LIGHT, "-n", "2", "--gpu-card=16GiB", "--gpu-values=none"
    )

    result.assert_outcomes(passed=4)
    assert "contended" not in result.stdout.str()


def test_the_loop_that_must_not_grow_is_as_shown(pytester: pytest.Pytester) -> None:
    """The tests of the page pass: one that forgets, one whose growth is found, one again."""
    loop, marker = blocks("steady.md")
    pytester.makepyfile(test_loop=loop, test_marker=marker)

    result = pytester.runpytest(*LIGHT)

    result.assert_outcomes(passed=3)


def test_a_loader_is_checked_as_shown() -> None:
    """From Python; the page's command is walked."""
    _models, example = blocks("check.md")

    exec(compile(example, "check.md", "exec"), {})  # noqa: S102  # our own page


def test_a_model_is_tried_on_a_card_as_shown() -> None:
    """From Python; the command has tests of its own."""
    (example,) = blocks("fit.md")

    exec(compile(example, "fit.md", "exec"), {})  # noqa: S102  # our own page
