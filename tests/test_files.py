"""Files that are whole or not there at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pytest_gpumem.files import write_atomically, write_bytes_atomically


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
