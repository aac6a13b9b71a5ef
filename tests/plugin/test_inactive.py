"""A run that asks for no device: torch and the tests are left alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch  # an inner run would import it anew, which torch does not survive
from ways import WORKERS

from pytest_gpumem.inheritance import CHILDREN_VARIABLE
from pytest_gpumem.plugin.options import load_object, options_of
from pytest_gpumem.plugin.settings import OPTIONS, Settings, is_asked

LIGHT = ("-p", "no:cacheprovider")
MARKERS = (
    "gpu_budget('1GiB')",
    "max_vram('1GiB')",
    "max_vram_leak",
    "requires_vram('1GiB')",
    "gpu_exclusive",
    "inject_oom('any:nth=1')",
    "oom_sweep",
    "oom_fallback",
)
HOW = (
    "but this run asks for no device; put 'gpu_backend = auto' into the ini file, or "
    "give --gpu-backend=auto"
)


@pytest.fixture(autouse=True)
def _unasked(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inner runs have no option and no ini file, and are nobody's children."""
    monkeypatch.delenv("PYTEST_ADDOPTS")
    monkeypatch.delenv(CHILDREN_VARIABLE, raising=False)
    pytester.makeini("[pytest]\naddopts = --strict-markers\nfilterwarnings = error\n")


@pytest.mark.parametrize("workers", WORKERS)
def test_installing_the_plugin_changes_nothing(
    pytester: pytest.Pytester, workers: tuple[str, ...]
) -> None:
    """No card, in tests or in their children; no patch; a suite's own gpu marker."""
    pytester.makepyfile(
        """
        import subprocess
        import sys

        import pytest
        import torch

        def test_there_is_no_card():
            assert not torch.cuda.is_available()
            assert not [n for n in sys.modules if "gpumem.devices.simulated." in n]
            assert not [f for f in sys.meta_path if "gpumem" in type(f).__module__]

        def test_children_have_none():
            code = "import sys; print('pytest_gpumem' in sys.modules)"
            command = [sys.executable, "-c", code]
            assert "False" == subprocess.check_output(command, text=True).strip()

        @pytest.mark.skipif(not torch.cuda.is_available(), reason="no card")
        def test_skips_itself():
            raise SystemError("was run")

        @pytest.mark.gpu("a100", count=2)
        def test_has_a_marker_of_its_own():
            pass
        """
    )

    result = pytester.runpytest_subprocess(*LIGHT, "-rs", *workers)

    result.assert_outcomes(passed=3, skipped=1)
    result.stdout.fnmatch_lines(
        ["gpumem: not in use, as no option or ini setting asks for it *"]
    )
    assert "GPU" not in result.stdout.str()
    assert torch.__version__


@pytest.mark.parametrize("marker", MARKERS)
def test_a_marker_says_what_to_add(pytester: pytest.Pytester, marker: str) -> None:
    """Before any test, with exit code 4."""
    pytester.makepyfile(
        f"""
        import pytest

        @pytest.mark.{marker}
        def test_it(): raise SystemError("was run")
        """
    )

    result = pytester.runpytest(*LIGHT)

    assert pytest.ExitCode.USAGE_ERROR == result.ret
    name = marker.partition("(")[0]
    result.stderr.fnmatch_lines(
        [f"ERROR: *::test_it: @pytest.mark.{name} needs a device, {HOW}"]
    )
    result.stdout.no_fnmatch_line("*was run*")


def test_a_marker_that_a_worker_finds_ends_the_run(pytester: pytest.Pytester) -> None:
    """As without workers: the controller has no tests of its own."""
    pytester.makepyfile(
        "import pytest\n@pytest.mark.max_vram('1GiB')\ndef test_it(): pass"
    )

    result = pytester.runpytest(*LIGHT, "-n", "1")

    assert pytest.ExitCode.USAGE_ERROR == result.ret
    result.stderr.fnmatch_lines([f"ERROR: *@pytest.mark.max_vram *{HOW}"])


def test_a_fixture_says_what_to_add(pytester: pytest.Pytester) -> None:
    """Those that need a device; those that build checkpoints do not."""
    names = (
        "vram_budget",
        "competing_process",
        "vram_recorder",
        "oom_injector",
        "oom_sweep",
        "fallback",
    )
    tests = [f"def test_{name}({name}): pass" for name in names]
    pytester.makepyfile(
        "\n".join([*tests, "def test_no_device(make_checkpoint): pass"])
    )

    result = pytester.runpytest(*LIGHT)

    result.assert_outcomes(errors=len(names), passed=1)
    said = [line for line in result.outlines if line.endswith(HOW)]
    assert ["a fixture of gpumem needs a device, " + HOW] * len(names) == said


def test_every_option_and_setting_asks() -> None:
    """Whatever its value: whoever writes it down wants the plugin to work."""
    nothing: Any = SimpleNamespace(getini=lambda _name: None)

    assert not is_asked(nothing, SimpleNamespace())
    for option in OPTIONS:
        for value in ("", "x", [], ["x"], False, True):
            given: Any = SimpleNamespace(getini={option.ini: value}.get)
            assert is_asked(given, SimpleNamespace())
            assert is_asked(nothing, SimpleNamespace(**{option.ini: value}))


@pytest.mark.parametrize(
    "line", ["gpu_backend = auto", "gpu_max_vram = 1GiB", "gpu_leak_check = false"]
)
def test_a_line_of_the_ini_file_is_enough(pytester: pytest.Pytester, line: str) -> None:
    """The header names the device then, and markers and fixtures work."""
    pytester.makeini(f"[pytest]\n{line}\n")
    pytester.makepyfile(
        """
        import pytest
        import torch

        @pytest.mark.max_vram("1MiB")
        def test_it(vram_recorder):
            with vram_recorder() as recorder:
                torch.zeros(2**18, device="cuda")
            assert recorder.figures.peak_allocated_bytes == 2**20
        """
    )

    result = pytester.runpytest(*LIGHT)

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["gpumem: backend *"])


def test_an_option_is_one_line() -> None:
    """What it names is there, and its default is what its text would give."""
    for name, option in options_of(Settings).items():
        assert hasattr(Settings(), name)
        for each in (option.parse, option.check):
            if isinstance(each, str) and each:
                assert callable(load_object(each))
        if option.default_text:
            assert option.default == option.value(option.default_text, Path())


def test_a_new_option_needs_no_more_than_its_declaration(
    pytester: pytest.Pytester,
) -> None:
    """The flag, the ini setting, help and the value are its own."""
    pytester.syspathinsert()
    pytester.makepyfile(
        more_options="""
        from dataclasses import dataclass

        from pytest_gpumem.plugin.options import (
            add_options,
            option,
            options_of,
            read_option,
        )

        @dataclass
        class More:
            steps: int = option("--gpu-steps", "N", parse=int, default=3, help="steps")

        OPTIONS = options_of(More)

        def pytest_addoption(parser):
            add_options(parser, OPTIONS.values())

        def pytest_report_header(config):
            return f"steps {read_option(OPTIONS['steps'], config, config.option)}"
        """
    )
    pytester.makeini("[pytest]\ngpu_steps = 5\n")

    asked, said = (
        pytester.runpytest("-p", "more_options", "--gpu-steps=7"),
        pytester.runpytest("-p", "more_options"),
    )
    wrong = pytester.runpytest("-p", "more_options", "--gpu-steps=few")

    asked.stdout.fnmatch_lines(["steps 7"])
    said.stdout.fnmatch_lines(["steps 5"])
    wrong.stderr.fnmatch_lines(["*--gpu-steps: *few*"])
    pytester.runpytest("-p", "more_options", "--help").stdout.fnmatch_lines(
        ["*--gpu-steps=N*steps (default: 3)*"]
    )
