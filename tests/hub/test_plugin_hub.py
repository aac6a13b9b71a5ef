"""Models served under their hub names in a run: option, ini file, marker, children."""

from __future__ import annotations

import os

import pytest
import torch  # an inner run would import it anew, which torch does not survive
import transformers

# An inner run drops what it is the first to import: torch's operators cannot be
# registered twice, and classes of two imports do not fit together.
assert torch.__version__
assert transformers.BertForSequenceClassification is not None
assert transformers.GPT2LMHeadModel is not None

PLAIN = ("-p", "no:cacheprovider", "-W", "ignore")
SCRIPT = """
from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification.from_pretrained("bert-tiny-uncased")
model = AutoModelForSequenceClassification.from_pretrained(
    "bert-tiny-uncased", device_map="auto", torch_dtype="auto"
)
"""
TEST = """
import runpy
from pathlib import Path


def test_the_script():
    made = runpy.run_path(Path(__file__).with_name("script.py"))
    assert made["model"].device.type == "cuda"
"""


def test_a_script_loads_by_name(pytester: pytest.Pytester) -> None:
    """It knows nothing of pytest; too small a budget sends it to the CPU."""
    pytester.makepyfile(script=SCRIPT, test_it=TEST)
    served = (*PLAIN, "--gpu-hub-model=bert-tiny-uncased")

    passed = pytester.runpytest_inprocess(*served)
    failed = pytester.runpytest_inprocess(*served, "--gpu-budget=8MiB")

    passed.assert_outcomes(passed=1)
    passed.stdout.fnmatch_lines(["gpumem: hub models bert-tiny-uncased=bert-tiny"])
    failed.assert_outcomes(failed=1)
    failed.stdout.fnmatch_lines(["E *AssertionError: assert 'cpu' == 'cuda'"])
    assert "PYTEST_GPUMEM_HUB" not in os.environ


def test_the_ini_file_and_the_command_line_add_up(pytester: pytest.Pytester) -> None:
    """Each path starts from where it is said; of one name, the command line wins."""
    pytester.makeini(
        """
        [pytest]
        gpu_hub_models =
            my-org/first=configs
            my-org/second=bert-tiny
        """
    )
    pytester.mkdir("configs")
    pytester.path.joinpath("configs", "config.json").write_text(
        '{"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, '
        '"num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 50}',
        encoding="utf-8",
    )
    pytester.makepyfile(
        **{
            "below/test_it": """
                from transformers import AutoConfig, AutoTokenizer


                def test_it():
                    assert 50 == len(AutoTokenizer.from_pretrained("my-org/first"))
                    assert 64 == AutoConfig.from_pretrained("my-org/second").n_embd
            """
        }
    )

    result = pytester.runpytest_inprocess(
        *PLAIN, "--gpu-hub-model=my-org/second=gpt2-tiny", "below"
    )

    result.assert_outcomes(passed=1)


def test_a_marker_serves_for_its_test(pytester: pytest.Pytester) -> None:
    """In setup, call and teardown; the nearest wins; it needs no device.

    The next test has it not.
    """
    pytester.makepyfile(
        """
        import os
        import pytest
        from huggingface_hub import list_repo_files, snapshot_download

        pytestmark = pytest.mark.hub_model("my-org/far", source="bert-tiny")


        @pytest.fixture
        def files():
            yield list_repo_files("my-org/near")
            assert list_repo_files("my-org/near")


        @pytest.mark.hub_model("my-org/near", source="bert-tiny", seed=1)
        @pytest.mark.hub_model("my-org/far", source="bert-tiny", format="bin")
        def test_marked(files):
            assert "model.safetensors" in files
            assert "pytorch_model.bin" in list_repo_files("my-org/far")


        def test_other():
            assert "model.safetensors" in list_repo_files("my-org/far")
            with pytest.raises(OSError):
                snapshot_download("my-org/near", local_files_only=True)
        """
    )

    result = pytester.runpytest_inprocess(*PLAIN)
    pytester._monkeypatch.delenv("PYTEST_ADDOPTS")
    unasked = pytester.runpytest_inprocess(*PLAIN)

    result.assert_outcomes(passed=2)
    unasked.assert_outcomes(passed=2)
    unasked.stdout.fnmatch_lines(["gpumem: not in use, *"])


CHILDREN = """
import subprocess, sys
import pytest

ASK = (
    "import sys; from huggingface_hub import try_to_load_from_cache as find; "
    "print(*(name for name in sys.argv[1:] if find(name, 'config.json')))"
)


def found():
    command = [sys.executable, "-c", ASK, "bert-tiny", "my-org/mine"]
    return subprocess.run(command, capture_output=True, text=True).stdout.split()


@pytest.mark.hub_model("my-org/mine", source="bert-tiny")
def test_it():
    assert FOUND == found()


def test_it_is_over():
    assert FOUND[:1] == found()
"""


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--gpu-backend=simulated"], ["bert-tiny", "my-org/mine"]),
        (["--gpu-backend=off"], ["bert-tiny", "my-org/mine"]),
        (["--gpu-backend=simulated", "--gpu-no-children"], []),
    ],
)
def test_children_find_what_is_served(
    pytester: pytest.Pytester, options: list[str], names: list[str]
) -> None:
    """Those of a test too that only a marker serves for; unless children are let be."""
    pytester.makepyfile(CHILDREN.replace("FOUND", repr(names)))

    result = pytester.runpytest_inprocess(*PLAIN, *options, "--gpu-hub-model=bert-tiny")

    result.assert_outcomes(passed=2)


def test_workers_find_what_is_served(pytester: pytest.Pytester) -> None:
    """A worker of pytest-xdist serves what the run does."""
    pytester.makepyfile(
        """
        import pytest
        from huggingface_hub import list_repo_files


        @pytest.mark.hub_model("my-org/mine", source="bert-tiny")
        def test_it():
            assert list_repo_files("bert-tiny") == list_repo_files("my-org/mine")
        """
    )

    result = pytester.runpytest_inprocess(*PLAIN, "-n1", "--gpu-hub-model=bert-tiny")

    result.assert_outcomes(passed=1)


def test_a_model_that_nobody_serves_says_what_to_do(pytester: pytest.Pytester) -> None:
    """The report has one sentence more, whoever asked the hub."""
    pytester.makepyfile(
        """
        from huggingface_hub import snapshot_download
        from transformers import AutoModel


        def test_transformers():
            AutoModel.from_pretrained("nobody/first")


        def test_hub():
            snapshot_download("nobody/second")
        """
    )

    result = pytester.runpytest_inprocess(*PLAIN, "--gpu-backend=simulated")

    result.assert_outcomes(failed=2)
    for name in ("nobody/first", "nobody/second"):
        result.stdout.fnmatch_lines([f"E * serves no model '{name}': *"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--gpu-hub-model=nobody/it"], "--gpu-hub-model: hub model 'nobody/it': no *"),
        (
            ["-o", "gpu_hub_models=a--b"],
            "gpu_hub_models: hub model 'a--b': this is no*",
        ),
        ([], "*test_it: @pytest.mark.hub_model: hub model: option 'colour' is not *"),
    ],
)
def test_what_makes_no_sense_ends_the_run(
    pytester: pytest.Pytester, given: list[str], message: str
) -> None:
    """With exit code 4 and one sentence, before any test."""
    pytester.makepyfile(
        """
        import pytest


        @pytest.mark.hub_model("my-org/mine", source="bert-tiny", colour="red")
        def test_it():
            pass
        """
    )

    result = pytester.runpytest_inprocess(*PLAIN, "--gpu-backend=simulated", *given)

    assert pytest.ExitCode.USAGE_ERROR == result.ret
    result.stderr.fnmatch_lines([f"ERROR: {message}"])
