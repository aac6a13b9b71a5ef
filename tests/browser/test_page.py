"""The HTML report in Chromium, checked by axe: ``tox run -e browser``.

It needs Debian's packages chromium and chromium-driver, or Chrome and its driver.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import pytest
from axe_core_python.selenium import Axe
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from pytest_gpumem.records.memory_figures import MemoryFigures
from pytest_gpumem.records.record import PhaseFigures, Record
from pytest_gpumem.reports.document import Report
from pytest_gpumem.reports.page import page

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: A phone, a small window, a large one.
WIDTHS: Final = (390, 800, 1280)
#: The rules of WCAG 2.1, levels A and AA, and axe's best practices.
RULES: Final = {
    "runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]
}
SUITE: Final = """
import pytest
import torch

KEPT = []


def model():
    return torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU())


def load():
    try:
        return model().cuda()
    except torch.OutOfMemoryError:
        return model()


def test_train():
    trained = model().cuda()
    optimizer = torch.optim.AdamW(trained.parameters())
    for _ in range(2):
        trained(torch.ones(64, 256, device="cuda")).sum().backward()
        optimizer.step()


@pytest.mark.oom_sweep("sites", recover=True)
def test_swept():
    load().to("cuda")


def test_fallback(fallback):
    fallback(load, budgets=["4MiB", "1MiB"])


@pytest.mark.gpu_budget("32MiB")
def test_runs_out():
    kept = [torch.ones(2**20, device="cuda") for _ in range(100)]


@pytest.mark.max_vram("1MiB")
@pytest.mark.parametrize("mib", [2, 10, 1])
def test_limited(mib):
    torch.ones(mib * 2**18, device="cuda")


@pytest.mark.max_vram_leak
def test_leak():
    KEPT.append(torch.ones(7, device="cuda"))


def test_without_a_card():
    assert False
"""
#: What the pictures and tables are shown for.
SHOWN: Final = ("test_train", "test_swept", "test_fallback", "test_runs_out")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run's page, and a page that compares it with another run."""
    place = tmp_path_factory.mktemp("run")
    (place / "test_it.py").write_text(SUITE, "utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "--gpu-report=html:page.html"]
    run = subprocess.run(
        [*command, "--gpu-report=json:now.json"],
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
    )
    (place / "output.txt").write_text(run.stdout, "utf-8")
    (place / "test_it.py").write_text(SUITE.replace("256", "512"), "utf-8")
    subprocess.run(
        [*command[:4], "--gpu-report=json:before.json", "-k", "train or fallback"],
        cwd=place,
        capture_output=True,
        check=True,
    )
    compare = ["compare", "before.json", "now.json", "--html", "both.html"]
    subprocess.run(
        [sys.executable, "-m", "pytest_gpumem.cli", *compare],
        cwd=place,
        capture_output=True,
        check=True,
    )
    return place


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Return a browser without a window."""
    options = webdriver.ChromeOptions()
    options.add_argument("--headless=new")
    options.add_argument("--no-sandbox")  # root, in a container, has none
    names = ("chromium", "google-chrome", "chromium-browser")
    options.binary_location = next(filter(None, map(shutil.which, names)), "")
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


def show(browser: Any, file: Path, *, width: int = 1280, scheme: str = "light") -> None:
    """Open a page."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(file.as_uri())


def choose(browser: Any, test: str) -> None:
    """Open a test's details by its name in the table, and everything that is folded."""
    names = browser.find_elements(By.CSS_SELECTOR, "#tests button.name")
    (name,) = (each for each in names if each.text.endswith(f"::{test}"))
    browser.execute_script("arguments[0].click()", name)
    browser.execute_script(
        "document.querySelectorAll('details').forEach(e => e.open = 1)"
    )


def faults_of(browser: Any) -> list[str]:
    """Return what axe finds, and whether the page is wider than its window."""
    axe = Axe()
    found = axe.run(browser, options=RULES)["violations"]
    faults = [f"{each['id']}: {each['nodes'][0]['html']}" for each in found]
    wide = browser.execute_script("return document.body.scrollWidth - innerWidth")
    return faults + ([f"{wide} pixels too wide"] if wide > 0 else [])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_everybody_can_read_the_page(
    browser: Any, folder: Path, width: int, scheme: str
) -> None:
    """At each width, light and dark, with each kind of picture."""
    show(browser, folder / "page.html", width=width, scheme=scheme)
    found = {}
    for test in SHOWN:
        choose(browser, test)
        found[test] = faults_of(browser)

    assert {key: [] for key in SHOWN} == found


@pytest.mark.parametrize("width", WIDTHS)
def test_everybody_can_read_two_reports_side_by_side(
    browser: Any, folder: Path, width: int
) -> None:
    """Each test of both has two timelines on one scale, and its bytes before and now."""
    show(browser, folder / "both.html", width=width)
    choose(browser, "test_train")
    pair = browser.find_elements(By.CSS_SELECTOR, ".pair svg[role=img]")

    assert len(pair) == 2  # before and now
    scales = [each.text.split("\n")[:3] for each in pair]
    assert scales[0] == scales[1]
    assert [] == faults_of(browser)


def test_the_page_answers_first(browser: Any, folder: Path) -> None:
    """The counts are the terminal's; each cause is there once, sorted as people sort."""
    show(browser, folder / "page.html")
    last = (folder / "output.txt").read_text("utf-8").strip().splitlines()[-1]
    told = browser.find_element(By.CSS_SELECTOR, "header .run").text
    causes = browser.find_element(By.ID, "broke").text
    tiles = browser.find_elements(By.CSS_SELECTOR, "#tiles button")
    counts = dict(reversed(each.text.split("\n")) for each in tiles)
    listed = browser.find_elements(By.CSS_SELECTOR, "#broke li")

    assert sorted(told.split(", ")) == sorted(last.partition(" in ")[0].split(", "))
    assert str(len(listed)) == counts["tests broke"]
    assert causes.count("Above a limit: 2 tests") == 1
    assert causes.index("[2]") < causes.index("[10]")
    assert "Out of memory: 1 test" in causes
    assert "Faults of a sweep ended badly: 1 test" in causes


def test_pictures_have_round_ticks_a_budget_and_marks(
    browser: Any, folder: Path
) -> None:
    """And a legend of the kinds that are there."""
    show(browser, folder / "page.html")
    choose(browser, "test_runs_out")
    picture = browser.find_element(By.CSS_SELECTOR, "#detail svg[role=img]")
    texts = [each.text for each in picture.find_elements(By.TAG_NAME, "text")]
    legend = browser.find_element(By.CSS_SELECTOR, "#detail .legend").text
    choose(browser, "test_train")
    kinds = browser.find_element(By.CSS_SELECTOR, "#detail .legend").text

    assert ["0 B", "8 MiB", "16 MiB", "24 MiB", "32 MiB"] == texts[:5]
    assert any(text.endswith(("OOM", "OOMs")) for text in texts)
    assert "budget 32 MiB" in legend
    for kind in ("weights", "gradients", "optimiser", "activations", "workspaces"):
        assert kind in kinds


def test_a_sweep_is_a_matrix_and_a_fallback_a_staircase(
    browser: Any, folder: Path
) -> None:
    """Sites by verdict, and a bar in the outline of each budget."""
    show(browser, folder / "page.html")
    choose(browser, "test_swept")
    heads = browser.find_element(By.CSS_SELECTOR, "#detail thead").text
    cells = [
        each.text for each in browser.find_elements(By.CSS_SELECTOR, "#detail td.cell")
    ]
    choose(browser, "test_fallback")
    stairs = browser.find_elements(By.CSS_SELECTOR, "#detail svg[role=img]")[-1]

    assert heads.startswith("site allocations failed here")
    assert {"✓", "✗"} >= {each[0] for each in cells} > set()
    assert "4 MiB → " in stairs.text
    assert "1 MiB → " in stairs.text


def test_the_keyboard_is_enough(browser: Any, folder: Path) -> None:
    """A tile, then a test: the focus moves to its details."""
    show(browser, folder / "page.html")
    body = browser.find_element(By.TAG_NAME, "body")
    body.send_keys(Keys.TAB)
    first = browser.switch_to.active_element
    first.send_keys(Keys.ENTER)
    name = browser.find_element(By.CSS_SELECTOR, "#broke button.name")
    wanted = name.text
    name.send_keys(Keys.ENTER)

    assert "tile" in first.get_attribute("class")
    assert wanted == browser.switch_to.active_element.text


def test_print_shows_what_is_folded(browser: Any, folder: Path) -> None:
    """And folds it again afterwards."""
    show(browser, folder / "both.html")
    count = "return document.querySelectorAll('details[open]').length"
    before = browser.execute_script(count)
    browser.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    printed = browser.execute_script(count)
    browser.execute_script("window.dispatchEvent(new Event('afterprint'))")

    assert before < printed
    assert before == browser.execute_script(count)


def test_ten_thousand_tests_stay_usable(browser: Any, tmp_path: Path) -> None:
    """The page is there in seconds, and has only one page of rows."""
    figures = MemoryFigures(0, 2**20, 2**20, 2**20, 2**20, 0, 0, 0, 0, 0)
    tests = tuple(
        Record(
            f"test_it.py::test_it[{number}]",
            "failed" if number % 10 == 0 else "passed",
            0.1,
            "T4",
            [PhaseFigures.of("call", figures)],
            site=f"model.py:{number % 30} in load (load)",
        )
        for number in range(10_000)
    )
    file = tmp_path / "page.html"
    file.write_text("".join(page(Report(("a run",), tests=tests))), "utf-8")

    began_s = time.monotonic()
    show(browser, file)
    browser.find_element(By.ID, "filter").send_keys("[9999]")
    took_s = time.monotonic() - began_s

    rows = browser.find_elements(By.CSS_SELECTOR, "#tests tbody tr")
    assert ["test_it.py::test_it[9999]"] == [each.text.split()[0] for each in rows]
    assert took_s < 10  # it takes about one second
    assert browser.execute_script("return document.all.length") < 5000
