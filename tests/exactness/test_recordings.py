"""The simulated device is held to every recording there is."""

from __future__ import annotations

import copy
import json
import lzma
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from recorded_answers import differences
from versions import TORCH

from pytest_gpumem.cards import find_card
from pytest_gpumem.checkpoints import make_checkpoint
from pytest_gpumem.cli import main
from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.recording import FORMAT, KIND, record, save

FOLDER = Path(__file__).parents[1] / "recordings"
#: But for what operators ask for and what captures do, which test_recorded_requests.py
#: and test_graphs.py hold.
FILES = sorted(set(FOLDER.rglob("*.json")) - set(FOLDER.glob("requests/*.json")))
#: Relative error that a modelled figure may have; load is exact.
TOLERANCE = 0.01


def _kind(path: Path) -> str:
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("kind") == KIND:
        return "recording"
    return "trace" if "events" in content else "cases" if "cases" in content else ""


FROM_CARDS = [path for path in FILES if _kind(path) == "recording"]


def test_every_file_is_held_to() -> None:
    """No file lies here that no test reads."""
    kinds = {path.relative_to(FOLDER): _kind(path) for path in FILES}

    assert "" not in kinds.values(), kinds
    assert {"bert_large_allocator.json"} == {
        str(path) for path, kind in kinds.items() if kind == "cases"
    }
    assert {Path("traces")} == {
        path.parent for path, kind in kinds.items() if kind == "trace"
    }


def _simulate(recorded: dict[str, Any], checkpoint: Path | None) -> dict[str, Any]:
    """Run the recording's script on the simulated card that it was taken from."""
    facts = recorded["card"]
    major, minor = facts["compute_capability"]
    (made_up,) = find_card(
        f"{facts['total_bytes']},cc={major}.{minor},"
        f"sms={facts['multi_processor_count']},name={facts['name']}"
    )
    card = replace(made_up, given_context_bytes=recorded["context_bytes"])
    with simulated_device([card]):
        return record(checkpoint)


def _beyond(recorded: dict[str, Any], measured: dict[str, Any]) -> list[str]:
    return [
        f"{each.where}: recorded {each.recorded}, simulated {each.measured}"
        for each in differences(recorded, measured)
        if each.error > (0 if ", load, " in each.where else TOLERANCE)
    ]


def test_the_simulated_device_answers_as_the_recorded_cards() -> None:
    """Traces and texts are equal, loads exact, every other figure within 1 %."""
    for path in FROM_CARDS:
        recorded = json.loads(path.read_text("utf-8"))
        measured = _simulate(recorded, make_checkpoint("bert-large"))

        assert not _beyond(recorded, measured), path


#: Of this torch, if there is one: traces, OOM texts and workspaces on the substitute
#: runtime, from ``python tests/cuda_host/substitute.py FOLDER -- pytest-gpumem record
#: --checkpoint none --out FILE``, compressed by ``xz``.
OF_THIS_TORCH = FOLDER / "torch-{}.{}.json.xz".format(*TORCH)


@pytest.mark.skipif(not OF_THIS_TORCH.is_file(), reason="no recording of this torch")
def test_the_simulated_device_answers_as_this_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every figure and every text is equal, with torch's own choice of workspaces."""
    monkeypatch.delenv("TORCH_CUBLAS_WORKSPACE_CACHE", raising=False)
    recorded = json.loads(lzma.decompress(OF_THIS_TORCH.read_bytes()))

    assert "{}.{}".format(*TORCH) == recorded["versions"]["torch"].rpartition(".")[0]
    assert not differences(recorded, _simulate(recorded, None))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recording of a simulated card, by the command."""
    out = tmp_path_factory.mktemp("recording") / "card.json"
    options = ["--checkpoint", "bert-tiny", "--simulate", "2GiB,cc=8.6,ctx=300MiB"]

    assert 0 == main(["record", "--out", str(out), *options])
    found: dict[str, Any] = json.loads(out.read_text("utf-8"))
    return found


def test_a_recording_says_where_it_is_from(recorded: dict[str, Any]) -> None:
    """Card, versions and what the context takes are in it."""
    assert (KIND, FORMAT) == (recorded["kind"], recorded["format"])
    assert 2 * 2**30 == recorded["card"]["total_bytes"]
    assert [8, 6] == recorded["card"]["compute_capability"]
    assert 300 * 2**20 == recorded["context_bytes"]
    assert {"torch", "transformers"} <= set(recorded["versions"])
    assert 8519680 == recorded["workspace_bytes"]["matmul fp32"]


def test_a_recordings_traces_reach_every_corner(recorded: dict[str, Any]) -> None:
    """Requests fail and are retried; small, large and split blocks come and go."""
    traces = recorded["traces"]
    last = [
        dict(zip(trace["fields"], trace["rows"][-1], strict=True)) for trace in traces
    ]

    assert 3 == len(traces)
    assert all(trace["oom"] for trace in traces)
    assert all("192.00 MiB allowed" in str(trace["oom"]) for trace in traces)
    assert all(row["num_ooms"] > 0 for row in last)
    assert any(row["num_alloc_retries"] > row["num_ooms"] for row in last)
    assert all(row["num_device_free"] == row["num_device_alloc"] for row in last)
    assert (
        "64.00 MiB allowed" in recorded["oom_texts"]["more than the fraction of 64 MiB"]
    )


def test_the_same_card_gives_the_same_recording(recorded: dict[str, Any]) -> None:
    """The device, asked again through tensors, and the model agree with the file."""
    again = _simulate(recorded, make_checkpoint("bert-tiny"))

    assert not differences(recorded, again)
    assert any("train" in phase["plan"].values() for phase in again["phases"])


@pytest.mark.parametrize("part", ["traces", "phases", "oom_texts", "workspace_bytes"])
def test_a_wrong_answer_is_found(recorded: dict[str, Any], part: str) -> None:
    """One changed figure in any part is a difference."""
    other = copy.deepcopy(recorded)
    if part == "traces":
        other[part][1]["rows"][30][0] += 512
    elif part == "phases":
        other[part][0]["phases"]["forward_1"]["peak_allocated"] *= 2
    elif part == "oom_texts":
        other[part]["more than the card"] += "!"
    else:
        other[part]["matmul fp16"] += 1

    found = differences(other, recorded)

    assert 1 == len(found)
    assert found[0].error > 0


def test_a_recording_is_whole_or_not_written(tmp_path: Path) -> None:
    """What cannot be written as JSON leaves the old file, and no other."""
    target = tmp_path / "card.json"
    save({"kind": KIND, "before": True}, target)

    with pytest.raises(TypeError):
        save({"kind": KIND, "bad": object()}, target)

    assert [target] == list(tmp_path.iterdir())
    assert json.loads(target.read_text("utf-8"))["before"]


def test_the_command_needs_a_card_or_a_simulated_one(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a card it says how to go on; nothing is written."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    out = tmp_path / "card.json"

    code = main(["record", "--out", str(out), "--checkpoint", "none"])

    assert 1 == code
    assert "--simulate CARD" in capsys.readouterr().err
    assert not out.exists()


def test_the_command_wants_a_folder_that_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A minute of work is not lost to a typo."""
    out = tmp_path / "nowhere" / "card.json"

    code = main(["record", "--out", str(out), "--simulate", "T4"])

    assert 1 == code
    assert "is not a folder" in capsys.readouterr().err
