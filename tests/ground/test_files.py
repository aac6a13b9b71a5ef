"""Files that are whole or not there at all."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from pytest_gpumem import files
from pytest_gpumem.files import (
    is_special,
    locked,
    why_not_writable,
    write_atomically,
    write_bytes_atomically,
)


def test_a_file_is_made_with_its_folders(tmp_path: Path) -> None:
    """UTF-8; a lone surrogate becomes the escape that JSON reads as the same."""
    path = tmp_path / "a" / "b" / "c.txt"

    write_atomically(path, "é\udc80\n")

    assert b"\xc3\xa9\\udc80\n" == path.read_bytes()
    assert [path] == list(path.parent.iterdir())


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_new_file_has_the_rights_of_any_other(tmp_path: Path, umask: int) -> None:
    """What the umask leaves; the umask itself stays."""
    path = tmp_path / "new"
    before = os.umask(umask)
    try:
        write_bytes_atomically(path, b"x")
        assert umask == os.umask(umask)
    finally:
        os.umask(before)

    assert 0o666 & ~umask == path.stat().st_mode & 0o777


def test_a_replaced_file_keeps_its_rights(tmp_path: Path) -> None:
    """And has all of the new content, however short."""
    path = tmp_path / "old"
    path.write_bytes(b"long before")
    path.chmod(0o640)

    write_bytes_atomically(path, b"x")

    assert b"x" == path.read_bytes()
    assert 0o640 == path.stat().st_mode & 0o777


def test_what_fails_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whatever point it fails; the error is the one that there was."""
    path = tmp_path / "kept"
    path.write_bytes(b"before")

    def fail(*_arguments: object) -> None:
        raise OSError("the disk is full")

    for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "chmod")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(OSError, match="the disk is full"):
                write_bytes_atomically(path, b"after")

        assert [path] == list(tmp_path.iterdir())
        assert b"before" == path.read_bytes()


def test_a_link_and_what_is_no_file_stay_what_they_are(tmp_path: Path) -> None:
    """A link's target is replaced, there or not yet; a pipe is written to."""
    folder = tmp_path / "other"
    folder.mkdir()
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(folder / "real")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        for text in ("first", "second"):
            write_atomically(link, text)
            write_atomically(pipe, text)

            assert text == (folder / "real").read_text(encoding="utf-8")
            assert text == os.read(reader, 100).decode()
    finally:
        os.close(reader)

    assert link.is_symlink()
    assert pipe.is_fifo()
    assert ["real"] == [each.name for each in folder.iterdir()]
    assert {"link", "pipe", "other"} == {each.name for each in tmp_path.iterdir()}
    assert not is_special(link)
    assert is_special(pipe)
    assert is_special("/dev/null")


def test_a_new_file_never_changes_the_processs_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread could make a file in that moment, open to all."""
    monkeypatch.setattr(os, "umask", None)

    write_atomically(tmp_path / "new", "x")

    assert [tmp_path / "new"] == list(tmp_path.iterdir())


def _add(path: str, times: int) -> None:
    for _ in range(times):
        with locked(path):
            number = int(Path(path).read_text(encoding="utf-8"))
            write_atomically(path, str(number + 1))


def test_a_lock_lets_one_process_at_a_time_change_a_file(tmp_path: Path) -> None:
    """Also through a link; the lock leaves no file behind."""
    path, link = tmp_path / "number", tmp_path / "link"
    write_atomically(path, "0")
    link.symlink_to(path)
    threads = [
        threading.Thread(target=_add, args=(str(each), 10)) for each in (path, link)
    ]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert "20" == path.read_text(encoding="utf-8")
    assert {path, link} == set(tmp_path.iterdir())


def test_a_lock_that_is_kept_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names the lock's file; a block that raises gives its lock back."""
    monkeypatch.setattr(files, "LOCK_WAIT_S", 0.0)
    path = tmp_path / "file"

    with locked(path), pytest.raises(TimeoutError, match=r"\.file\.lock"), locked(path):
        pass
    with pytest.raises(KeyError), locked(path):
        raise KeyError
    with locked(path):
        assert [tmp_path / ".file.lock"] == list(tmp_path.iterdir())


def test_it_is_told_beforehand_what_cannot_be_written(tmp_path: Path) -> None:
    """Nothing is made for it."""
    (tmp_path / "file").touch()

    assert why_not_writable(tmp_path / "new" / "deep" / "file") is None
    assert why_not_writable(tmp_path / "file") is None
    assert why_not_writable(Path("/dev/null")) is None
    assert "it is a folder; name a file in it" == why_not_writable(tmp_path)
    assert f"{tmp_path / 'file'} is not a folder" == (
        why_not_writable(tmp_path / "file" / "a")
    )
    assert "null" in str(why_not_writable(tmp_path / "a\0b"))
    assert ["file"] == [each.name for each in tmp_path.iterdir()]
