"""Checkpoints in folders of one's own: written, found, never overwritten."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from small_bert import names_in, small_config

from pytest_gpumem.checkpoints import (
    cache,
    find_damage,
    make_checkpoint,
    resolve_checkpoint,
)
from pytest_gpumem.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path


def test_a_folder_is_written_and_found_again(tmp_path: Path) -> None:
    """A second request for the same leaves it as it is, and no lock beside it."""
    first = make_checkpoint(small_config(), out=tmp_path / "a" / "b")
    built_ns = (first / "model.safetensors").stat().st_mtime_ns

    second = make_checkpoint(small_config(), out=tmp_path / "a" / "b")

    assert second == first == tmp_path / "a" / "b"
    assert (second / "model.safetensors").stat().st_mtime_ns == built_ns
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == ["b"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    """Whoever made it meant it to be used."""
    (tmp_path / "x").mkdir()

    folder = make_checkpoint(small_config(), out=tmp_path / "x")

    assert find_damage(folder) is None


def test_a_damaged_checkpoint_of_the_same_request_is_built_anew(tmp_path: Path) -> None:
    """The manifest says that nothing but this checkpoint is lost."""
    folder = make_checkpoint(small_config(), out=tmp_path / "x")
    (folder / "model.safetensors").write_bytes(b"")

    make_checkpoint(small_config(), out=folder)

    assert find_damage(folder) is None


@pytest.mark.parametrize("kind", ["another request", "someone's folder", "a file"])
def test_what_else_is_there_is_never_replaced(tmp_path: Path, kind: str) -> None:
    """Neither another checkpoint nor anything of somebody else's."""
    out = tmp_path / "x"
    if kind == "another request":
        make_checkpoint(small_config(), out=out, seed=1)
    elif kind == "a file":
        out.write_text("precious")
    else:
        out.mkdir()
        (out / "notes.txt").write_text("precious")
    message = (
        f"{out} exists and contains other files; choose another folder or remove it"
    )

    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        make_checkpoint(small_config(), out=out)

    assert names_in(tmp_path) == ["x"]
    if kind == "a file":
        assert out.read_text() == "precious"
    else:
        assert names_in(out)


def test_the_first_of_two_writers_of_a_folder_wins(tmp_path: Path) -> None:
    """Another process that has built the same meanwhile is no error."""
    out = tmp_path / "x"

    def race(text: str) -> None:
        if text.startswith("writing"):
            make_checkpoint(small_config(), out=out)

    make_checkpoint(small_config(), out=out, progress=race)

    assert names_in(tmp_path) == ["x"]
    assert find_damage(out, check_all=True) is None


def test_a_folder_with_a_checkpoint_is_used_as_it_is(tmp_path: Path) -> None:
    """It need not have been built here."""
    folder = make_checkpoint(small_config(), out=tmp_path / "own")
    (folder / cache.MANIFEST).unlink()

    assert resolve_checkpoint(folder) == folder
    assert resolve_checkpoint(str(folder)) == folder


def test_a_known_name_is_built(tmp_path: Path) -> None:
    """And found again."""
    folder = resolve_checkpoint("gpt2-tiny", cache_dir=tmp_path)

    assert folder.parent == tmp_path
    assert resolve_checkpoint("gpt2-tiny", cache_dir=tmp_path) == folder


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_every_shard_of_a_folder_is_looked_for(
    tmp_path: Path, file_format: str
) -> None:
    """An index is only as good as the files that it names."""
    folder = make_checkpoint(
        small_config(), out=tmp_path / "x", format=file_format, max_shard_size="10KB"
    )
    assert resolve_checkpoint(folder) == folder
    shard = sorted(file.name for file in folder.iterdir() if "-of-" in file.name)[1]
    (folder / shard).unlink()

    with pytest.raises(
        CheckpointError, match=f"is not a checkpoint: {shard} is missing"
    ):
        resolve_checkpoint(folder)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "it has no config.json"),
        (
            {"config.json": "{}", "vocab.txt": ""},
            (
                "it has neither model.safetensors nor pytorch_model.bin, nor an index "
                "of either"
            ),
        ),
        (
            {"config.json": "{}", "pytorch_model.bin.index.json": "[]"},
            "pytorch_model.bin.index.json cannot be read",
        ),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused(
    tmp_path: Path, files: dict[str, str], reason: str
) -> None:
    """The message says what is missing."""
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    message = f"{tmp_path} is not a checkpoint: {reason}"

    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        resolve_checkpoint(tmp_path)
