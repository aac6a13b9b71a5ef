"""The command line: checkpoints and replays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pytest_gpumem.cli import main

TRACE = (
    Path(__file__).parents[1] / "recordings" / "traces" / "05_default_small_256m.json"
)


def test_replay_prints_the_traces_own_format(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rows and errors come out as JSON, equal to the recorded ones."""
    code = main(["replay", str(TRACE)])

    trace = json.loads(TRACE.read_text(encoding="utf-8"))
    assert 0 == code
    assert {"rows": trace["rows"], "oom": trace["oom"]} == json.loads(
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "not a trace that can be replayed"),
        (None, "No such file"),
    ],
)
def test_replay_refuses_what_is_no_trace(
    content: str | None,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A bad file ends in one sentence and exit code 1."""
    file = tmp_path / "trace.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")

    code = main(["replay", str(file)])

    assert 1 == code
    assert message in capsys.readouterr().err


def test_checkpoint_writes_where_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoint NAME --out DIR builds a loadable folder and prints its path."""
    target = tmp_path / "tiny"

    code = main(["checkpoint", "bert-tiny", "--out", str(target), "--format", "bin"])

    captured = capsys.readouterr()
    assert 0 == code
    assert str(target) == captured.out.strip()
    assert (target / "pytorch_model.bin").is_file()
    assert (target / "config.json").is_file()
    assert "bert-tiny" in captured.err


def test_an_unknown_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """What is neither a name nor a config ends in one sentence."""
    assert 1 == main(["checkpoint", "no-such-model"])
    assert "no-such-model" in capsys.readouterr().err


def test_wrong_usage_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """A missing command exits with 2 and shows the usage."""
    with pytest.raises(SystemExit, match="2"):
        main([])

    assert "usage: pytest-gpumem" in capsys.readouterr().err
