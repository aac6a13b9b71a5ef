"""Workers of pytest-xdist share the cards of their machine, by bytes."""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch  # noqa: F401  # an inner run may not be the first to import it

from pytest_gpumem.plugin.cardless_tests import CardlessTests
from pytest_gpumem.plugin.claims import Claim, declared_claims
from pytest_gpumem.plugin.marks import Budget, Limit, Markers, Requirement
from pytest_gpumem.plugin.record_keeping import Collector
from pytest_gpumem.plugin.settings import Settings
from pytest_gpumem.plugin.sharing import (
    WORKER_VARIABLE,
    Sharing,
    WorkerPosition,
    take_position,
)
from pytest_gpumem.plugin.workers import Workers
from pytest_gpumem.sizes import parse_size_spec
from pytest_gpumem.tenancy.entries import Folder

GiB = 2**30

#: Two tests at a time would need 18 of 16 GiB; none says so but by its marker.
DECLARED = """
import time
import pytest
import torch  # noqa: F401  # an inner run may not be the first to import it
import torch

@pytest.mark.requires_vram("9GiB")
@pytest.mark.parametrize("number", range(4))
def test_needs_nine(number):
    weights = torch.empty(9 * 2**30, dtype=torch.uint8, device="cuda")
    time.sleep(0.25)
"""

#: Each fits the card, and not an equal share of it.
UNDECLARED = """
import torch

def test_small():
    torch.empty(2**30, dtype=torch.uint8, device="cuda")

def test_large():
    torch.empty(9 * 2**30, dtype=torch.uint8, device="cuda")

def test_that_hides_it():
    try:
        weights = torch.empty(9 * 2**30, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError:
        weights = None
    assert weights is not None
"""

WITH_FIXTURE = """
import pytest
import torch  # noqa: F401  # an inner run may not be the first to import it
import torch

@pytest.fixture(scope="module")
def model():
    return torch.empty(9 * 2**30, dtype=torch.uint8, device="cuda")

def test_of_a_fixture(model):
    assert 9 * 2**30 == model.numel()
"""

OPTIONS = ("--gpu-card=16GiB", "--gpu-values=none", "-p", "no:cacheprovider")


@pytest.fixture(autouse=True)
def _own_tenancy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_GPUMEM_TENANCY", str(tmp_path / "tenancy"))


def test_tests_that_say_what_they_need_wait_for_it(pytester: pytest.Pytester) -> None:
    """One of nine GiB fits on a card of 16, two do not."""
    pytester.makepyfile(DECLARED)

    result = pytester.runpytest(*OPTIONS, "-n", "2")

    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(
        [
            "gpumem: 2 workers share each machine's cards (an equal share each*",
            "*test(s) waited for their bytes of a card*",
        ]
    )
    assert "under contention" not in result.stdout.str()


@pytest.mark.slow
def test_workers_may_have_cards_of_their_own(pytester: pytest.Pytester) -> None:
    """--gpu-share=own is what simulated cards allow and real ones do not."""
    pytester.makepyfile(test_a=UNDECLARED, test_b=WITH_FIXTURE)

    result = pytester.runpytest(*OPTIONS, "-n", "2", "--gpu-share=own")

    result.assert_outcomes(passed=4)
    assert "shared GPUs" not in result.stdout.str()


@pytest.mark.slow
def test_nobody_waits_where_sharing_is_off(pytester: pytest.Pytester) -> None:
    """Then workers are in each other's way, as on a real card without a plugin."""
    pytester.makepyfile(
        """
        import time
        from pathlib import Path
        import pytest
        import torch

        @pytest.mark.requires_vram("9GiB")
        @pytest.mark.parametrize("number", range(2))
        def test_needs_nine(number):
            here = Path(__file__).parent
            try:
                weights = torch.empty(9 * 2**30, dtype=torch.uint8, device="cuda")
            finally:
                (here / f"tried-{number}").touch()
                for _ in range(600):
                    if len(list(here.glob("tried-*"))) == 2:
                        break
                    time.sleep(0.05)
        """
    )

    result = pytester.runpytest(*OPTIONS, "-n", "2", "--gpu-share=off")

    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*OutOfMemoryError*Process * has 9.00 GiB memory*"])


@pytest.mark.slow
def test_ooms_for_want_of_the_whole_card_name_the_marker_to_add(
    pytester: pytest.Pytester,
) -> None:
    """Each test fails once, and its report, the summary and JUnit say why."""
    pytester.makepyfile(test_a=UNDECLARED, test_b=WITH_FIXTURE)

    result = pytester.runpytest(*OPTIONS, "-n", "2", "--junitxml=junit.xml")

    result.assert_outcomes(passed=1, failed=2, errors=1)
    result.stdout.fnmatch_lines(
        [
            "*GPU contention*",
            "an OOM under contention: 9 GiB were needed of a share of 8 GiB*; "
            '@pytest.mark.requires_vram("9GiB") makes it wait until that much is free',
            "*= shared GPUs =*",
        ],
    )
    cases = ET.fromstring(Path("junit.xml").read_text()).findall(".//testcase")  # noqa: S314  # our own file
    told = {
        str(case.get("name"))
        for case in cases
        for each in case.findall(".//property")
        if each.get("name") == "gpumem.contention"
    }
    assert {"test_large", "test_of_a_fixture", "test_that_hides_it"} == told


@pytest.mark.slow
def test_the_retries_of_earlier_versions_are_accepted_with_one_warning(
    pytester: pytest.Pytester,
) -> None:
    """On the command line and in the ini file; workers say nothing of their own."""
    pytester.makepyfile("def test_it(): pass")
    pytester.makeini("[pytest]\ngpu_max_contention_retries = 3\n")

    result = pytester.runpytest("-n", "2", "--gpu-max-contention-retries=1")

    result.assert_outcomes(passed=1, warnings=1)
    result.stdout.fnmatch_lines(
        ["*--gpu-max-contention-retries: tests are no longer *"]
    )


@pytest.mark.slow
def test_an_oom_of_its_own_is_not_told_as_others(pytester: pytest.Pytester) -> None:
    """Neither what no card holds, nor a budget's, nor a rule's."""
    pytester.makepyfile(
        """
        import pytest
        import torch

        def test_more_than_the_card():
            torch.empty(17 * 2**30, dtype=torch.uint8, device="cuda")

        @pytest.mark.gpu_budget("1GiB")
        def test_more_than_its_budget():
            torch.empty(2 * 2**30, dtype=torch.uint8, device="cuda")

        def test_more_than_the_budget_of_a_block(vram_budget):
            with vram_budget("1GiB"):
                torch.empty(2 * 2**30, dtype=torch.uint8, device="cuda")

        @pytest.mark.inject_oom("any:nth=1")
        def test_injected():
            torch.empty(1024, device="cuda")
        """
    )

    result = pytester.runpytest(*OPTIONS, "-n", "2")

    result.assert_outcomes(failed=4)
    assert "under contention" not in result.stdout.str()


@pytest.mark.slow
def test_an_oom_that_others_caused_within_a_budget_is_told(
    pytester: pytest.Pytester,
) -> None:
    """A test's budget is its own; what others hold beyond their claims is not."""
    pytester.makepyfile(
        """
        import time
        from pathlib import Path
        import pytest
        import torch

        HERE = Path(__file__).parent

        @pytest.mark.requires_vram("1GiB")
        def test_a_that_takes_more_than_it_says():
            weights = torch.empty(14 * 2**30, dtype=torch.uint8, device="cuda")
            (HERE / "taken").touch()
            for _ in range(1200):
                if (HERE / "tried").exists():
                    break
                time.sleep(0.05)

        @pytest.mark.gpu_budget("4GiB")
        def test_b_that_suffers():
            for _ in range(1200):
                if (HERE / "taken").exists():
                    break
                time.sleep(0.05)
            try:
                torch.empty(4 * 2**30, dtype=torch.uint8, device="cuda")
            finally:
                (HERE / "tried").touch()
        """
    )

    result = pytester.runpytest(*OPTIONS, "-n", "2")

    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            "*test_b_that_suffers: an OOM under contention: 4 GiB were needed, others "
            'held 14 GiB; @pytest.mark.requires_vram("4GiB") makes it wait *',
        ]
    )


@pytest.mark.slow
def test_who_has_a_card_alone_meets_nobody(pytester: pytest.Pytester) -> None:
    """Nor does anybody begin meanwhile."""
    pytester.makepyfile(
        """
        import os
        import time
        from pathlib import Path
        import pytest
        import torch

        HERE = Path(__file__).parent

        def _meet(kind):
            mark = HERE / f"{kind}-{os.getpid()}"
            mark.touch()
            torch.empty(2**20, device="cuda")
            time.sleep(0.05)
            others = [path.name for path in HERE.glob("*-*") if path != mark]
            mark.unlink()
            return others

        @pytest.mark.parametrize("number", range(6))
        def test_shared(number):
            assert not [name for name in _meet("shared") if "alone" in name]

        @pytest.mark.gpu_exclusive
        @pytest.mark.parametrize("number", range(3))
        def test_alone(number):
            assert [] == _meet("alone")
        """
    )

    pytester.runpytest(*OPTIONS, "-n", "3").assert_outcomes(passed=9)


@pytest.mark.slow
def test_who_waits_too_long_is_an_error(pytester: pytest.Pytester) -> None:
    """It names who holds the card, and how to wait longer."""
    pytester.makepyfile(
        """
        import os
        import time
        from pathlib import Path
        import pytest
        import torch

        @pytest.mark.requires_vram("12GiB")
        @pytest.mark.parametrize("number", range(2))
        def test_large(number):
            torch.empty(1024, device="cuda")
            time.sleep(5)
        """
    )

    result = pytester.runpytest(*OPTIONS, "-n", "2", "--gpu-wait-timeout=0.5")

    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(
        ["*waited 0.5 s for 12884901888 bytes of a card of 17179869184*process(es)*"]
    )


def test_what_no_card_has_is_skipped_with_the_reason(
    pytester: pytest.Pytester,
) -> None:
    """Also without workers; a wait would never end."""
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.requires_vram("20GiB")
        def test_large(): pass

        @pytest.mark.requires_vram("1GiB", device=1)
        def test_second_card(): pass

        @pytest.mark.gpu_budget("2GiB")
        @pytest.mark.requires_vram("3GiB")
        def test_budget(): pass

        @pytest.mark.requires_vram("100%")
        def test_fits(): pass
        """
    )

    result = pytester.runpytest(*OPTIONS, "-rs")

    result.assert_outcomes(passed=1, skipped=3)
    result.stdout.fnmatch_lines_random(
        [
            "*requires 20GiB of card 0; the card has 16 GiB",
            "*requires 1GiB of card 1; this run has 1 card(s)*",
            "*requires 3GiB of card 0; its budget is 2 GiB",
        ]
    )


@pytest.mark.slow
def test_workers_are_spread_over_the_cards(pytester: pytest.Pytester) -> None:
    """Each sees every card, another one first, in the order of the environment."""
    pytester.makepyfile(
        """
        import os
        import time
        import pytest
        import torch

        @pytest.mark.parametrize("number", range(6))
        def test_cards(number):
            time.sleep(0.3)
            name = os.environ["PYTEST_XDIST_WORKER"]
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            with open("seen", "a") as file:
                file.write(f"{name} {visible} {torch.cuda.device_count()}\\n")
        """
    )

    pytester.runpytest(*OPTIONS[1:], "--gpu-card=16GiB*3", "-n", "3")

    seen = set((pytester.path / "seen").read_text().splitlines())
    assert {"gw0 None 3", "gw1 1,2,0 3", "gw2 2,0,1 3"} == seen


@pytest.mark.parametrize("option", ["--gpu-share=most", "--gpu-wait-timeout=soon"])
def test_bad_values_are_refused(pytester: pytest.Pytester, option: str) -> None:
    """Before any test, with what is accepted."""
    result = pytester.runpytest(option)

    assert pytest.ExitCode.USAGE_ERROR == result.ret
    result.stderr.fnmatch_lines([f"*{option.partition('=')[0]}: *"])


@pytest.mark.slow
def test_a_wrong_marker_ends_the_run_as_without_workers(
    pytester: pytest.Pytester,
) -> None:
    """Exit code 4 and one sentence, before any test; no internal error."""
    pytester.makepyfile(
        """
        import pytest

        def test_first(): raise SystemError("was run")

        @pytest.mark.requires_vram("much")
        def test_wrong(): pass
        """
    )

    for workers in ([], ["-n", "2"]):
        result = pytester.runpytest(*OPTIONS, *workers)

        assert pytest.ExitCode.USAGE_ERROR == result.ret
        result.stderr.fnmatch_lines(
            ["ERROR: *test_wrong: @pytest.mark.requires_vram: size 'much' cannot be*"]
        )
        assert "INTERNALERROR" not in result.stdout.str()


@pytest.mark.slow
def test_nothing_is_left_behind(pytester: pytest.Pytester, tmp_path: Path) -> None:
    """No folder of a run that is over, with workers or without."""
    pytester.makepyfile(DECLARED)

    pytester.runpytest(*OPTIONS, "-n", "2")
    pytester.runpytest_inprocess(*OPTIONS)

    assert [] == list((tmp_path / "tenancy").glob("run-*"))


@pytest.mark.slow
def test_a_killed_worker_gives_its_claim_back(
    pytester: pytest.Pytester, tmp_path: Path
) -> None:
    """Its test fails, every other one has its turn, and nothing is left."""
    pytester.makepyfile(
        """
        import os
        import signal
        from pathlib import Path
        import pytest
        import torch

        @pytest.mark.requires_vram("12GiB")
        @pytest.mark.parametrize("number", range(8))
        def test_large(number):
            weights = torch.empty(12 * 2**30, dtype=torch.uint8, device="cuda")
            if number == 3:
                os.kill(os.getpid(), signal.SIGKILL)
        """
    )

    result = pytester.runpytest(*OPTIONS, "-n", "2", "--gpu-wait-timeout=120")

    result.assert_outcomes(passed=7, failed=1)
    result.stdout.fnmatch_lines(["*crashed while running *test_large?3?*"])
    assert [] == [path for path in (tmp_path / "tenancy").rglob("*") if path.is_file()]


@pytest.mark.slow
def test_the_next_run_removes_what_a_killed_one_left(
    pytester: pytest.Pytester, tmp_path: Path
) -> None:
    """Not what is of a run that lives, or has only just begun."""
    dead, alive, young = (
        tmp_path / "tenancy" / f"run-{name}" for name in ("dead", "alive", "young")
    )
    for folder in (dead, alive, young):
        (folder / "card-0").mkdir(parents=True)
    (dead / "1-a.entry").touch()
    sign = Folder(alive).add({})
    for folder in (dead, alive):
        os.utime(folder, (1, 1))
    pytester.makepyfile(
        "import torch; torch.empty(1, device='cuda')\ndef test_it(): pass"
    )

    pytester.runpytest_subprocess(*OPTIONS).assert_outcomes(passed=1)

    assert [alive, young] == sorted((tmp_path / "tenancy").iterdir())
    sign.close()


def test_a_place_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's children, and runs inside of it, are no workers."""
    place = WorkerPosition(2, 8, "abc")
    monkeypatch.setenv(WORKER_VARIABLE, place.text)

    assert place == take_position()
    assert WORKER_VARIABLE not in os.environ
    assert take_position() is None


@pytest.mark.parametrize("kept", [None, {"a": 1}, "idle", 3])
def test_a_broken_cache_knows_no_test(kept: Any) -> None:
    """Whatever somebody has written there."""
    cache = SimpleNamespace(get=lambda _key, _default: kept)
    config: Any = SimpleNamespace(cache=cache)

    assert set() == CardlessTests(config, Collector()).idle


@pytest.mark.slow
def test_who_used_no_card_claims_nothing_in_the_next_run(
    pytester: pytest.Pytester,
) -> None:
    """It does not wait for one that has the card alone, and is no GPU test."""
    pytester.makepyfile(
        """
        import time
        from pathlib import Path
        import pytest
        import torch

        HERE = Path(__file__).parent

        def pause_until(name):
            for _ in range(600):
                if (HERE / name).exists() or not (HERE / "second").exists():
                    return
                time.sleep(0.05)
            raise AssertionError(name)

        @pytest.mark.gpu_exclusive
        def test_alone():
            torch.empty(1024, device="cuda")
            pause_until("idle")

        def test_idle():
            (HERE / "idle").touch()
        """
    )
    options = [option for option in OPTIONS if "cache" not in option and option != "-p"]
    order = ("-n", "2", "--gpu-report=json:r.json", "--gpu-wait-timeout=20")

    pytester.runpytest(*options, *order).assert_outcomes(passed=2)
    (pytester.path / "idle").unlink()
    (pytester.path / "second").touch()
    result = pytester.runpytest(*options, *order)

    result.assert_outcomes(passed=2)
    assert "waited" not in result.stdout.str()
    tests = json.loads((pytester.path / "r.json").read_text())["tests"]
    assert ["test_alone"] == [each["nodeid"].partition("::")[2] for each in tests]


@pytest.mark.parametrize(
    ("listed", "turned"),
    [
        ("GPU-aa,GPU-bb,GPU-cc", "GPU-bb,GPU-cc,GPU-aa"),
        ("MIG-1, MIG-2", "MIG-2,MIG-1"),
        ("3,1", "1,3"),
        ("GPU-aa", "GPU-aa"),
    ],
)
def test_names_of_real_cards_are_turned_as_they_stand(
    monkeypatch: pytest.MonkeyPatch, listed: str, turned: str
) -> None:
    """Indices, UUIDs and MIG instances; afterwards the environment is as before."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    settings = Settings(backend="cuda")
    sharing = Sharing(settings, WorkerPosition(1, 4, "abc"))

    sharing.spread("cuda")
    assert turned == os.environ["CUDA_VISIBLE_DEVICES"]
    count = len(turned.split(","))
    assert len(range(1 % count, 4, count)) == sharing.num_sharing(0)
    assert count == 1 or sharing.num_sharing(1) == 4
    sharing.stop()
    assert listed == os.environ["CUDA_VISIBLE_DEVICES"]


class _Spec:
    def __init__(self, **given: str) -> None:
        self.ssh = self.socket = self.via = self.vagrant_ssh = None
        self.env: dict[str, str] = {}
        self.__dict__.update(given)


def test_workers_of_each_host_share_its_cards(pytestconfig: pytest.Config) -> None:
    """A place is one among the workers of the same host."""
    here = [_Spec(), _Spec()]
    there = [_Spec(ssh="far"), _Spec(ssh="far"), _Spec(ssh="far")]
    specs = [here[0], *there, here[1]]

    Workers(CardlessTests(pytestconfig, Collector()), "equal").pytest_xdist_setupnodes(
        specs
    )

    def places(of: list[_Spec]) -> list[str]:
        return [each.env[WORKER_VARIABLE].rpartition("/")[0] for each in of]

    assert ["0/2", "1/2"] == places(here)
    assert ["0/3", "1/3", "2/3"] == places(there)
    assert 1 == len({each.env[WORKER_VARIABLE].rpartition("/")[2] for each in specs})


def test_what_tests_claim() -> None:
    """requires_vram, then a budget, a limit, the run's limit, the run's budget."""
    size = parse_size_spec
    plain = Settings()
    limited = replace(plain, max_vram=size("3GiB"), budgets={None: size("50%")})
    totals = {0: 16 * GiB, 1: 16 * GiB}
    limits = (Limit(size("2GiB")), Limit(size("5GiB"), "reserved"))
    budget = (Budget(size("4GiB"), 0),)
    required = (Requirement(size("6GiB"), 0), Requirement(size("1GiB"), 1))

    assert {} == declared_claims(Markers(), plain, totals)
    assert {0: Claim(3 * GiB)} == declared_claims(Markers(), limited, totals)
    assert {0: Claim(8 * GiB)} == declared_claims(
        Markers(), replace(limited, max_vram=None), totals
    )
    assert {0: Claim(5 * GiB)} == declared_claims(
        Markers(limits=limits), limited, totals
    )
    assert {0: Claim(4 * GiB)} == declared_claims(
        Markers(limits=limits, budgets=budget), limited, totals
    )
    assert {0: Claim(6 * GiB), 1: Claim(GiB)} == declared_claims(
        Markers(limits=limits, budgets=budget, requirements=required), plain, totals
    )
    assert {0: Claim(0, is_alone=True), 1: Claim(0, is_alone=True)} == declared_claims(
        Markers(alone_on=(None,)), plain, totals
    )
