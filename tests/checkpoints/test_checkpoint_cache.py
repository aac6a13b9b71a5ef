"""The cache of checkpoints: whole or not there, and built once."""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock
from small_bert import names_in, small_config

from pytest_gpumem.checkpoints import cache, find_damage, make_checkpoint
from pytest_gpumem.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint, for tests that only read."""
    return make_checkpoint(small_config(), cache_dir=tmp_path_factory.mktemp("cache"))


def test_a_whole_checkpoint_is_not_built_again(tmp_path: Path) -> None:
    """The second request is answered from the cache, in silence."""
    said: list[str] = []
    first = make_checkpoint(small_config(), cache_dir=tmp_path, progress=said.append)
    built_ns = (first / "model.safetensors").stat().st_mtime_ns
    told = len(said)

    second = make_checkpoint(small_config(), cache_dir=tmp_path, progress=said.append)

    assert second == first
    assert (second / "model.safetensors").stat().st_mtime_ns == built_ns
    assert (told, len(said)) == (3, 3)


def test_progress_is_a_line_for_each_step(tmp_path: Path) -> None:
    """What is built, how large it is, where it goes, how long it took."""
    said: list[str] = []

    folder = make_checkpoint("bert-tiny", cache_dir=tmp_path, progress=said.append)

    assert said[:2] == [
        "building bert-tiny: 4,386,178 parameters, 16.73 MiB in float32 ...",
        f"writing {folder.parent} ...",
    ]
    assert re.fullmatch(r"built bert-tiny: 16\.73 MiB in \d+\.\d s", said[2])


@pytest.mark.parametrize("part", ["config.json", "model.safetensors"])
def test_a_truncated_file_is_built_anew_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    """Half a file is not taken for a checkpoint."""
    folder = make_checkpoint(small_config(), cache_dir=tmp_path)
    whole = (folder / part).read_bytes()
    (folder / part).write_bytes(whole[:100])

    again = make_checkpoint(small_config(), cache_dir=tmp_path)

    assert (again, (again / part).read_bytes()) == (folder, whole)
    assert caplog.record_tuples == [
        (
            "pytest_gpumem.checkpoints.cache",
            logging.WARNING,
            (
                f"checkpoint {folder} is damaged: {part} has 100 bytes instead of "
                f"{len(whole)}; building it again"
            ),
        )
    ]


def test_a_missing_file_is_built_anew(tmp_path: Path) -> None:
    """So is a checkpoint whose weights someone moved away."""
    folder = make_checkpoint(small_config(), cache_dir=tmp_path)
    (folder / "model.safetensors").unlink()

    assert find_damage(folder) == (
        "model.safetensors cannot be read: No such file or directory"
    )
    assert find_damage(make_checkpoint(small_config(), cache_dir=tmp_path)) is None


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"request": 1, "files": 2}'])
def test_a_damaged_manifest_is_built_anew(tmp_path: Path, text: str) -> None:
    """What says nothing is not trusted."""
    folder = make_checkpoint(small_config(), cache_dir=tmp_path)
    (folder / cache.MANIFEST).write_text(text)

    again = make_checkpoint(small_config(), cache_dir=tmp_path)

    assert find_damage(again) is None


@pytest.mark.parametrize(("offset", "verify"), [(100, "quick"), (4 * 2**20, "full")])
def test_changed_bytes_are_found(tmp_path: Path, offset: int, verify: str) -> None:
    """The quick check sees the first and last MiB of a file, the full one all."""
    folder = make_checkpoint("bert-tiny", cache_dir=tmp_path)
    file = folder / "model.safetensors"
    with file.open("r+b") as stream:
        stream.seek(offset)
        stream.write(b"\xff" * 8)
    assert find_damage(folder, check_all=verify == "full") == (
        "model.safetensors is not as it was written"
    )

    make_checkpoint("bert-tiny", cache_dir=tmp_path, verify=verify)

    assert find_damage(folder, check_all=True) is None


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    """Its half-built folder is not kept for ever."""
    folder = make_checkpoint(small_config(), cache_dir=tmp_path)
    shutil.rmtree(folder)
    (tmp_path / f".{folder.name}.abc.building").mkdir()

    make_checkpoint(small_config(), cache_dir=tmp_path)

    assert names_in(tmp_path) == [folder.name]


def test_a_build_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C in the middle, and the next run starts afresh."""

    def interrupt(text: str) -> None:
        if text.startswith("writing"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_checkpoint(small_config(), cache_dir=tmp_path, progress=interrupt)

    assert names_in(tmp_path) == []
    assert find_damage(make_checkpoint(small_config(), cache_dir=tmp_path)) is None


def test_a_cache_that_cannot_be_written_still_serves_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No lock is taken to read."""
    folder = make_checkpoint(small_config(), cache_dir=tmp_path)

    def no_lock(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(cache, "FileLock", no_lock)

    assert make_checkpoint(small_config(), cache_dir=tmp_path) == folder


def test_the_cache_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An argument comes before the variable, the variable before the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("PYTEST_GPUMEM_CACHE", raising=False)
    assert cache.cache_folder() == tmp_path / "xdg" / "pytest-gpumem" / "checkpoints"

    monkeypatch.setenv("PYTEST_GPUMEM_CACHE", str(tmp_path / "named"))
    assert cache.cache_folder() == tmp_path / "named"
    assert cache.cache_folder(tmp_path) == tmp_path


def test_others_may_read_what_the_umask_lets_them(built: Path) -> None:
    """The weights are not shut away, as safetensors would have it."""
    (built.parent / "ordinary").touch()
    mode = (built.parent / "ordinary").stat().st_mode & 0o777

    assert {file.stat().st_mode & 0o777 for file in built.iterdir()} == {mode}
    assert built.stat().st_mode & 0o444 == mode & 0o444


def test_a_build_of_another_process_is_waited_for_with_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that holds the lock for ever does not stop the others for ever."""
    folder = make_checkpoint(small_config(), cache_dir=tmp_path)
    shutil.rmtree(folder)
    monkeypatch.setattr(cache, "_PATIENCE_S", 0.1)
    said: list[str] = []

    with (
        FileLock(tmp_path / f".{folder.name}.lock"),
        pytest.raises(CheckpointError, match="in another process for 0 s; end that"),
    ):
        make_checkpoint(small_config(), cache_dir=tmp_path, progress=said.append)

    assert said == [f"waiting for another process that builds {folder}"]


BUILD = """
import sys
from pytest_gpumem.checkpoints import make_checkpoint
print(make_checkpoint("bert-tiny", progress=lambda text: print(text.split()[0])))
"""


@pytest.mark.slow
def test_two_processes_at_once_build_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One builds, the other waits or finds the result; both get the same folder."""
    monkeypatch.setenv("PYTEST_GPUMEM_CACHE", str(tmp_path))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BUILD], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    lines = [process.communicate(timeout=120)[0].split() for process in processes]

    (name,) = names_in(tmp_path)
    assert [process.returncode for process in processes] == [0, 0]
    assert [each[-1] for each in lines] == [str(tmp_path / name)] * 2
    assert sorted("built" in each for each in lines) == [False, True]
    assert find_damage(tmp_path / name, check_all=True) is None


def test_a_cached_checkpoint_is_found_without_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seconds of imports are spared where nothing is built."""
    monkeypatch.setenv("PYTEST_GPUMEM_CACHE", str(tmp_path))
    folder = make_checkpoint("gpt2-tiny")
    code = (
        "import sys; from pytest_gpumem.checkpoints import resolve_checkpoint; "
        "print(resolve_checkpoint('gpt2-tiny')); "
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )

    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout

    assert output.splitlines() == [str(folder), "False False"]
