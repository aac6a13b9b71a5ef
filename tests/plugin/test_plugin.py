"""The plugin as a user of pytest meets it."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

import pytest
import torch  # an inner run would import it anew, which torch does not survive
from ways import WORKERS

if TYPE_CHECKING:
    from pathlib import Path

CARD = "--gpu-card=256MiB,cc=8.0"

HEAD = """
import pytest
import torch

def mib(count):
    return torch.zeros(count * 2**20, dtype=torch.uint8, device="cuda")
"""


@pytest.fixture(autouse=True)
def _quiet(pytester: pytest.Pytester) -> None:
    """Inner runs keep no cache and treat warnings as errors."""
    pytester.makeini(
        "[pytest]\naddopts = -p no:cacheprovider --strict-markers\n"
        "filterwarnings = error\n"
    )


# -- header -----------------------------------------------------------------------------


def test_the_header_says_what_and_why(pytester: pytest.Pytester) -> None:
    """Device, card, budget and reason stand on one line."""
    pytester.makepyfile("def test_nothing(): pass")

    result = pytester.runpytest("--gpu-backend=simulated", "--gpu-budget=50%")

    result.stdout.fnmatch_lines(
        ["gpumem: backend simulated (as requested), card Tesla T4 * cc 7.5, budget 50%"]
    )


def test_off_means_off(pytester: pytest.Pytester) -> None:
    """With the backend off nothing is installed, and tests that need it are skipped."""
    pytester.makepyfile(
        """
        import pytest

        def test_plain(): pass

        @pytest.mark.max_vram("1GiB")
        def test_marked(): pass
        """
    )

    result = pytester.runpytest("--gpu-backend=off", "-rs")

    result.stdout.fnmatch_lines(
        [
            "gpumem: backend off (switched off)",
            "SKIPPED * needs a GPU, but gpumem's backend is off: switched off",
        ]
    )
    result.assert_outcomes(passed=1, skipped=1)


# -- wrong usage ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--gpu-backend=gpu", "--gpu-backend: 'gpu' is unknown; accepted are auto,"),
        ("--gpu-backend=cuda", "--gpu-backend: backend 'cuda' was requested, but "),
        ("--gpu-card=T5", "--gpu-card: card 'T5'*"),
        ("--gpu-checkpoint=bert-hugee", "--gpu-checkpoint: model 'bert-hugee' is nei"),
        ("--gpu-budget=lots", "--gpu-budget: *'lots'*"),
        ("--gpu-budget=", "--gpu-budget: *''*"),
        ("--gpu-budget=0", "--gpu-budget: *'0'*"),
        ("--gpu-budget=-1GiB", "--gpu-budget: *'-1GiB'*"),
        ("--gpu-budget=1TiB", "--gpu-budget: '1TiB' is 1099511627776 bytes, more than"),
        (
            "--gpu-budget=3=1GiB",
            "--gpu-budget: there is no card 3; this run has 1 card",
        ),
        (
            "--gpu-inject-oom=load:nth=0",
            "--gpu-inject-oom: injection rule 'load:nth=0'",
        ),
    ],
)
def test_a_bad_option_stops_before_any_test(
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    message: str,
) -> None:
    """Exit code 4 and one sentence that names option and value."""
    pytester.makepyfile("def test_nothing(): raise SystemError('was run')")

    backend = ["--gpu-backend=simulated"]
    if "backend" in option:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        backend = []
    result = pytester.runpytest(*backend, option)

    assert pytest.ExitCode.USAGE_ERROR == result.ret
    result.stderr.fnmatch_lines([f"ERROR: {message}*"])
    result.stdout.no_fnmatch_line("*was run*")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("gpu_budget", "lots", "gpu_budget: *'lots'*"),
        ("gpu_card", "T5", "gpu_card: *'T5'*"),
        ("gpu_inject_oom", "x:nth=1", "gpu_inject_oom: *'x'*"),
    ],
)
def test_a_bad_ini_value_stops_in_the_same_way(
    pytester: pytest.Pytester, name: str, value: str, message: str
) -> None:
    """The ini file is read by the same parsers as the command line."""
    pytester.makeini(f"[pytest]\n{name} = {value}\n")

    result = pytester.runpytest("--gpu-backend=simulated")

    assert pytest.ExitCode.USAGE_ERROR == result.ret
    result.stderr.fnmatch_lines([f"ERROR: {message}"])


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ("max_vram", "missing a required argument: 'limit'"),
        ("max_vram('lots')", "'lots'"),
        ("max_vram('1GiB', metric='speed')", "metric='speed'; accepted are allocated"),
        ("max_vram('1GiB', device=-1)", "device=-1 is not a card's index"),
        ("max_vram('1GiB', color=1)", "got an unexpected keyword argument 'color'"),
        ("gpu_budget(0)", "size 0 is zero"),
        ("inject_oom('load:x=1')", "no key 'x'"),
        ("inject_oom(3)", "rule=3 is not a text"),
        (
            "max_vram('1GiB', device=3)",
            "device=3: there is no such card; this run has 1",
        ),
        ("gpu_budget('1TiB')", "'1TiB' is more than card 0 has"),
    ],
)
def test_a_bad_marker_stops_before_any_test(
    pytester: pytest.Pytester, mark: str, message: str
) -> None:
    """The error names the test and the marker."""
    pytester.makepyfile(
        f"""
        import pytest

        def test_first(): raise SystemError('was run')

        @pytest.mark.{mark}
        def test_bad(): pass
        """
    )

    result = pytester.runpytest(CARD)

    assert pytest.ExitCode.USAGE_ERROR == result.ret
    output = result.stdout.str() + result.stderr.str()
    name = mark.partition("(")[0]
    assert f"::test_bad: @pytest.mark.{name}: " in output
    assert message in output
    assert "was run" not in output


# -- budget -----------------------------------------------------------------------------


def test_the_runs_budget_holds_in_every_test(pytester: pytest.Pytester) -> None:
    """A plain test meets torch's OOM, with what is allowed in its text."""
    pytester.makepyfile(
        HEAD
        + """
def test_fits():
    mib(64)
    assert torch.cuda.mem_get_info()[1] == 256 * 2**20

def test_does_not():
    mib(65)
"""
    )

    result = pytester.runpytest(CARD, "--gpu-budget=64MiB")

    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        ["E *OutOfMemoryError: CUDA out of memory.*64.00 MiB al*"]
    )


def test_the_ini_file_sets_the_budget_and_the_command_line_wins(
    pytester: pytest.Pytester,
) -> None:
    """gpu_budget in the ini file is the default of --gpu-budget."""
    pytester.makeini("[pytest]\ngpu_card = 256MiB,cc=8.0\ngpu_budget = 64MiB\n")
    pytester.makepyfile(
        """
        import torch

        def test_free():
            print("FREE", torch.cuda.mem_get_info()[0] // 2**20)
        """
    )

    from_ini = pytester.runpytest("-s")
    from_both = pytester.runpytest("-s", "--gpu-budget=32MiB")

    from_ini.stdout.fnmatch_lines(["*FREE 64"])
    from_both.stdout.fnmatch_lines(["*FREE 32"])


def test_a_tests_own_budget_is_its_own(pytester: pytest.Pytester) -> None:
    """gpu_budget replaces the run's budget for one test, whatever becomes of it."""
    pytester.makepyfile(
        HEAD
        + """
def free():
    return torch.cuda.mem_get_info()[0] // 2**20

@pytest.mark.gpu_budget("16MiB")
def test_small():
    assert free() == 16
    raise KeyError

def test_after():
    assert free() == 64

@pytest.mark.gpu_budget("128MiB")
class TestWide:
    def test_wide(self):
        assert free() == 128

    @pytest.mark.gpu_budget("8MiB")
    def test_nearest(self):
        assert free() == 8
"""
    )

    result = pytester.runpytest(CARD, "--gpu-budget=64MiB")

    result.assert_outcomes(passed=3, failed=1)


def test_each_card_can_have_a_budget(pytester: pytest.Pytester) -> None:
    """INDEX=SIZE budgets hold on their cards only."""
    pytester.makepyfile(
        """
        import torch

        def test_free():
            free = [torch.cuda.mem_get_info(i)[0] // 2**20 for i in range(2)]
            assert free == [64, 128]
        """
    )

    result = pytester.runpytest(
        "--gpu-card=256MiB,cc=8.0*2", "--gpu-budget=0=64MiB,1=50%"
    )

    result.assert_outcomes(passed=1)


def test_a_failed_test_leaves_the_card_to_the_next(pytester: pytest.Pytester) -> None:
    """Tensors in a failed test's traceback are gone when the next test begins."""
    pytester.makepyfile(
        HEAD
        + """
def test_fails():
    kept = mib(60)
    mib(60)

def test_next():
    assert torch.cuda.memory_allocated() == 0
    mib(60)
"""
    )

    result = pytester.runpytest(CARD, "--gpu-budget=64MiB")

    result.assert_outcomes(passed=1, failed=1)


def test_the_budget_fixture_caps_a_block(pytester: pytest.Pytester) -> None:
    """vram_budget is a context manager inside a test."""
    pytester.makepyfile(
        HEAD
        + """
def test_block(vram_budget):
    with vram_budget("10%") as budget:
        assert budget == 256 * 2**20 // 10
        with pytest.raises(torch.OutOfMemoryError):
            mib(30)
    mib(30)
"""
    )

    pytester.runpytest(CARD).assert_outcomes(passed=1)


# -- limits -----------------------------------------------------------------------------


def test_a_limit_is_inclusive(pytester: pytest.Pytester) -> None:
    """A peak equal to the limit passes, one block more fails, and says where."""
    pytester.makepyfile(
        HEAD
        + """
@pytest.mark.max_vram("32MiB")
def test_equal():
    mib(32)

@pytest.mark.max_vram("32MiB")
def test_above():
    kept = mib(32)
    torch.zeros(1, device="cuda")

@pytest.mark.max_vram("33MiB", metric="reserved")
def test_reserved():
    kept = mib(32)
    torch.zeros(1, device="cuda")
"""
    )

    result = pytester.runpytest(CARD)

    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(
        [
            "peak VRAM above max_vram: allocated 32 MiB (33554944 bytes) on cuda:0, "
            "limit 32 MiB (33554432 bytes), 512 B too much",
            "first over the limit at *test_a_limit_is_inclusive.py:14 in test_above "
            "(other)",
            "peak VRAM above max_vram: reserved 34 MiB (35651584 bytes) on cuda:0, "
            "limit 33 MiB (34603008 bytes), 1 MiB too much",
        ]
    )


def test_a_limit_counts_what_fixtures_hold(pytester: pytest.Pytester) -> None:
    """What was allocated before the call is part of its peak, and is named."""
    pytester.makepyfile(
        HEAD
        + """
@pytest.fixture
def model():
    return mib(20)

@pytest.mark.max_vram("32MiB")
def test_it(model):
    mib(20)
"""
    )

    result = pytester.runpytest(CARD)

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*; 20 MiB were allocated before the call began"])


def test_a_tests_own_failure_comes_first(pytester: pytest.Pytester) -> None:
    """A test that fails by itself is not also failed for its peak."""
    pytester.makepyfile(
        HEAD
        + """
@pytest.mark.max_vram("1MiB")
def test_it():
    mib(20)
    raise KeyError("its own")
"""
    )

    result = pytester.runpytest(CARD)

    result.stdout.fnmatch_lines(["E *KeyError: 'its own'"])
    result.stdout.no_fnmatch_line("*peak VRAM above*")


def test_users_own_reset_does_not_hide_a_peak(pytester: pytest.Pytester) -> None:
    """reset_peak_memory_stats inside a test changes nothing for its limit."""
    pytester.makepyfile(
        HEAD
        + """
@pytest.mark.max_vram("1MiB")
def test_it():
    mib(20)
    torch.cuda.reset_peak_memory_stats()
"""
    )

    pytester.runpytest(CARD).assert_outcomes(failed=1)


def test_the_recorder_fixture_records_a_block(pytester: pytest.Pytester) -> None:
    """vram_recorder gives the figures of a block."""
    pytester.makepyfile(
        HEAD
        + """
def test_block(vram_recorder):
    with vram_recorder() as recorder:
        mib(20)
    assert recorder.figures.peak_allocated_bytes == 20 * 2**20
"""
    )

    pytester.runpytest(CARD).assert_outcomes(passed=1)


# -- injection --------------------------------------------------------------------------


def test_the_run_can_inject(pytester: pytest.Pytester) -> None:
    """--gpu-inject-oom fails the chosen allocation of every test's call."""
    pytester.makepyfile(
        HEAD
        + """
@pytest.fixture
def model():
    return mib(1)

@pytest.mark.parametrize("number", [1, 2])
def test_it(number, model):
    mib(1)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 20.00 MiB"):
        mib(2)
"""
    )

    result = pytester.runpytest(
        CARD, "--gpu-inject-oom=any:nth=2", "--gpu-inject-oom=load:nth=1"
    )

    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["--gpu-inject-oom=load:nth=1 was never reached"])
    result.stdout.no_fnmatch_line("--gpu-inject-oom=any:nth=2 was never*")


def test_a_test_can_inject(pytester: pytest.Pytester) -> None:
    """inject_oom applies to its test alone, and fails it if it is never reached."""
    pytester.makepyfile(
        HEAD
        + """
@pytest.mark.inject_oom("any:min=10MiB")
def test_reached():
    mib(1)
    with pytest.raises(torch.OutOfMemoryError):
        mib(10)

@pytest.mark.inject_oom("any:nth=5")
def test_not_reached():
    mib(1)

def test_without():
    mib(10)
"""
    )

    result = pytester.runpytest(CARD)

    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(
        ["inject_oom 'any:nth=5' was never reached: the test made 1 allocation(s)*"]
    )


def test_the_injector_fixture_is_armed_inside(pytester: pytest.Pytester) -> None:
    """oom_injector takes rules during the test."""
    pytester.makepyfile(
        HEAD
        + """
def test_it(oom_injector):
    mib(1)
    oom_injector.arm("any:nth=1")
    with pytest.raises(torch.OutOfMemoryError):
        mib(1)
    assert oom_injector.num_injected == 1
"""
    )

    pytester.runpytest(CARD).assert_outcomes(passed=1)


# -- outputs ----------------------------------------------------------------------------


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("junit", [False, True], ids=["terminal", "junit"])
def test_peaks_are_shown_in_every_setting(
    pytester: pytest.Pytester, workers: tuple[str, ...], *, junit: bool
) -> None:
    """The table is the same plain, under xdist, and beside a JUnit file."""
    pytester.makepyfile(
        HEAD
        + """
@pytest.fixture
def model():
    return mib(30)

def test_large(model):
    mib(40)

def test_small():
    kept = mib(2)

def test_oom():
    with pytest.raises(torch.OutOfMemoryError):
        mib(300)

def test_none():
    pass
"""
    )
    options = ["--junit-xml=out.xml"] if junit else []

    result = pytester.runpytest(CARD, *workers, *options)

    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(
        [
            "*= GPU memory =*",
            "peak allocated  peak reserved *left  OOMs  retries  test",
            "* 70 MiB * 70 MiB * 30 MiB * - * - *::test_large",
            "* 2 MiB * 20 MiB * - * - * - *::test_small",
            "* 0 B * 0 B * - * 1 * 1 *::test_oom",
        ],
        consecutive=False,
    )
    result.stdout.no_fnmatch_line("*::test_none*")
    if junit:
        properties = _properties(pytester.path / "out.xml", "test_large")
        assert str(70 * 2**20) == properties["gpumem.call.cuda0.peak_allocated_bytes"]
        assert str(30 * 2**20) == properties["gpumem.setup.cuda0.peak_allocated_bytes"]


def _properties(file: Path, test: str) -> dict[str, str]:
    (case,) = (c for c in ET.parse(file).iter("testcase") if c.get("name") == test)  # noqa: S314  # our own file
    return {p.attrib["name"]: p.attrib["value"] for p in case.iter("property")}


def test_verbosity_scales_the_table(pytester: pytest.Pytester) -> None:
    """-v shows every phase, -q no table."""
    pytester.makepyfile(
        HEAD
        + """
@pytest.fixture
def model():
    yield mib(30)
    mib(10)

def test_it(model):
    mib(40)
"""
    )

    loud = pytester.runpytest(CARD, "-v")
    quiet = pytester.runpytest(CARD, "-q")

    loud.stdout.fnmatch_lines(
        ["*::test_it", "*::test_it (teardown)", "*::test_it (setup)"]
    )
    quiet.stdout.no_fnmatch_line("*GPU memory*")


def test_a_gpu_test_is_skipped_with_the_reason(pytester: pytest.Pytester) -> None:
    """Where there is no real card, tests marked gpu say why they are skipped."""
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.gpu
        def test_real(): pass
        """
    )

    result = pytester.runpytest("--gpu-backend=simulated", "-rs")

    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED * needs a real CUDA card: as requested"])


# -- life -------------------------------------------------------------------------------


def test_the_device_is_there_before_any_conftest(pytester: pytest.Pytester) -> None:
    """Libraries that look for CUDA when they are imported find it."""
    pytester.makeconftest("import torch\nAVAILABLE = torch.cuda.is_available()")
    pytester.makepyfile(
        """
        import torch

        AT_IMPORT = torch.cuda.device_count()

        def test_it(request):
            import conftest
            assert conftest.AVAILABLE
            assert AT_IMPORT == 1
        """
    )

    result = pytester.runpytest_subprocess("--gpu-backend=simulated")

    result.assert_outcomes(passed=1)


def test_what_tests_do_not_need_is_not_imported(pytester: pytest.Pytester) -> None:
    """A suite without torch stays without it, budget or not; likewise without a hub."""
    pytester.makepyfile(
        """
        import sys

        def test_it():
            names = {
                "torch",
                "pytest_gpumem.hub",
                "pytest_gpumem.checkpoints",
                "huggingface_hub",
            }
            assert not names & set(sys.modules)
        """
    )

    result = pytester.runpytest_subprocess("--gpu-budget=1GiB")

    result.assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("name", "outcomes"),
    [
        ("plain", {"passed": 1, "deselected": 1}),
        pytest.param("test", {"passed": 1, "failed": 1}, marks=pytest.mark.slow),
    ],
)
def test_torch_imported_inside_a_test_meets_budget_and_rules(
    name: str, outcomes: dict[str, int], pytester: pytest.Pytester
) -> None:
    """The first import of torch, wherever it is, finds card, budget, rules and recording."""
    pytester.makepyfile(
        """
        import pytest

        def take():
            import torch
            with pytest.raises(torch.OutOfMemoryError):
                torch.zeros(1, device="cuda")
            torch.zeros(20 * 2**20, dtype=torch.uint8, device="cuda")
            return torch.cuda.mem_get_info()[0]

        @pytest.mark.max_vram("10MiB")
        def test_marked():
            take()

        def test_plain():
            assert take() == 44 * 2**20
        """
    )

    result = pytester.runpytest_subprocess(
        CARD, "--gpu-budget=64MiB", "--gpu-inject-oom=any:nth=1", "-k", name
    )

    assert outcomes == result.parseoutcomes()
    result.stdout.fnmatch_lines(["* 20 MiB *::test_plain"])
    result.stdout.no_fnmatch_line("*was never reached*")


def test_everything_is_put_back_at_the_end(pytester: pytest.Pytester) -> None:
    """After the run torch is as it was, also when a test crashed in its middle."""
    before = (torch.Tensor.to, torch.empty, torch.device, torch.cuda.device_count())
    pytester.makepyfile(
        HEAD
        + """
def test_it():
    torch.cuda.set_per_process_memory_fraction(0.1)
    raise KeyboardInterrupt
"""
    )

    pytester.runpytest("--gpu-card=T4*3", "--gpu-budget=1GiB", no_reraise_ctrlc=True)

    assert before == (
        torch.Tensor.to,
        torch.empty,
        torch.device,
        torch.cuda.device_count(),
    )


def test_nvml_is_simulated_too(pytester: pytest.Pytester) -> None:
    """Pynvml imported by a test shows the card under its budget."""
    pytest.importorskip("pynvml")
    pytester.makepyfile(
        """
        import pynvml

        def test_it():
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(0)
            assert pynvml.nvmlDeviceGetName(handle) == "Tesla T4"
            assert pynvml.nvmlDeviceGetMemoryInfo(handle).free == 2**30
        """
    )

    result = pytester.runpytest_subprocess(
        "--gpu-backend=simulated", "--gpu-budget=1GiB"
    )

    result.assert_outcomes(passed=1)


def test_options_and_markers_are_documented(pytester: pytest.Pytester) -> None:
    """--help and --markers list every option and marker."""
    options = pytester.runpytest("--help").stdout.str()
    markers = pytester.runpytest("--markers").stdout.str()
    fixtures = pytester.runpytest("--fixtures").stdout.str()

    for option in ("backend", "card", "budget", "inject-oom", "checkpoint"):
        assert f"--gpu-{option}=" in options
        assert f"gpu_{option.replace('-', '_')}" in options
    for marker in ("gpu", "gpu_budget", "max_vram", "inject_oom"):
        assert f"@pytest.mark.{marker}" in markers
    for fixture in (
        "vram_budget",
        "vram_recorder",
        "oom_injector",
    ):
        assert fixture in fixtures
    # Only a suite that uses them has them.
    assert "bert_large" not in fixtures


def test_a_checkpoint_may_be_asked_for_by_its_name_alone(
    pytester: pytest.Pytester,
) -> None:
    """In a suite where no test names the fixture as an argument; a list leaves it out."""
    pytester.makepyfile(
        """
        import pytest

        @pytest.fixture
        def folder(request):
            return request.getfixturevalue("bert_large")

        def test_it(folder):
            assert (folder / "config.json").is_file()
        """
    )

    result = pytester.runpytest("-p", "no:cacheprovider", "--gpu-checkpoint=bert-tiny")
    fixtures = pytester.runpytest("--fixtures").stdout.str()

    result.assert_outcomes(passed=1)
    assert "folder" in fixtures
    assert "bert_large" not in fixtures


def test_the_checkpoint_option_names_the_models_folder(
    pytester: pytest.Pytester,
) -> None:
    """--gpu-checkpoint puts another in bert_large's place; a wrong one ends the run."""
    pytester.makepyfile(
        """
        def test_it(bert_large, make_checkpoint):
            assert (bert_large / "config.json").is_file()
            assert bert_large == make_checkpoint("bert-tiny")
        """
    )

    by_name = pytester.runpytest("--gpu-checkpoint=bert-tiny")
    missing = pytester.runpytest("--gpu-checkpoint=/nowhere")

    by_name.assert_outcomes(passed=1)
    assert pytest.ExitCode.USAGE_ERROR == missing.ret
    missing.stderr.fnmatch_lines(["*--gpu-checkpoint: model '/nowhere' is neither*"])
