"""Building a checkpoint where the disk is full or closed."""

from __future__ import annotations

import re
import resource
import shutil
from typing import TYPE_CHECKING

import pytest
import transformers
from small_bert import names_in, small_config

from pytest_gpumem.checkpoints import make_checkpoint
from pytest_gpumem.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def test_a_disk_without_room_is_refused_before_building(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message says how much is needed and how much is there."""
    usage = shutil.disk_usage(tmp_path)._replace(free=10 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    said: list[str] = []
    message = (
        f"the disk of {tmp_path} is too full: 17.73 MiB are needed, 10 MiB are free; "
        "free some, or set PYTEST_GPUMEM_CACHE to a folder of another disk"
    )

    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        make_checkpoint("bert-tiny", cache_dir=tmp_path, progress=said.append)

    assert said == []
    assert names_in(tmp_path) == []


@pytest.fixture
def largest_file() -> Iterator[int]:
    """A limit of 64 KiB for a file of this process: writing more is an error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    yield 2**16
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("largest_file")
@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_a_disk_that_fills_while_writing_leaves_no_half_files(
    tmp_path: Path, file_format: str
) -> None:
    """What torch and safetensors make of it becomes the one clear error."""
    with pytest.raises(CheckpointError) as caught:
        make_checkpoint("gpt2-tiny", cache_dir=tmp_path, format=file_format)

    assert str(caught.value).startswith(f"the disk of {tmp_path} is full: ")
    assert str(caught.value).endswith(
        "; free some, or set PYTEST_GPUMEM_CACHE to a folder of another disk"
    )
    assert names_in(tmp_path) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A file where a folder should be, a folder without permission: one error."""
    (tmp_path / "file").touch()

    with pytest.raises(
        CheckpointError,
        match=r"file/cache/bert-\w+ cannot be written: .*; choose another folder",
    ):
        make_checkpoint(small_config(), cache_dir=tmp_path / "file" / "cache")


def test_a_failure_that_is_no_write_stays_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a failed write is called one; nothing is left behind either way."""

    def fail(*_args: object, **_options: object) -> None:
        raise LookupError("of its own")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", fail)

    with pytest.raises(LookupError, match="of its own"):
        make_checkpoint(small_config(), cache_dir=tmp_path)

    assert names_in(tmp_path) == []
