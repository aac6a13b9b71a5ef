"""Which folders processes share, and what another user can make of them."""

from __future__ import annotations

import ast
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import pytest_gpumem
from pytest_gpumem.errors import SharedFolderError
from pytest_gpumem.tenancy.entries import Folder
from pytest_gpumem.tenancy.ledger import Ledger
from pytest_gpumem.tenancy.load_lock import gpu_load_lock
from pytest_gpumem.tenancy.shared_card import SharedCard

if TYPE_CHECKING:
    from collections.abc import Callable

pytest_plugins = ["pytester"]

NOBODY = 65534


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a user's processes share; nobody has made it yet."""
    path = tmp_path / "pytest-gpumem-0"
    monkeypatch.setenv("PYTEST_GPUMEM_TENANCY", str(path))
    monkeypatch.delenv("PYTEST_GPUMEM_LOCKS", raising=False)
    return path


def _enter() -> None:
    with gpu_load_lock(timeout_s=1):
        pass


USES: dict[str, Callable[[Path], Any]] = {
    "load lock": lambda _root: _enter(),
    "ledger": lambda root: Ledger(root / "ledger-0", 16).requests(),
    "shared card": lambda root: SharedCard(root / "run-1" / "card-0").others(),
}


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.mark.parametrize("use", USES)
def test_what_is_made_is_for_this_user_alone(root: Path, use: str) -> None:
    """Whatever the umask: folders 0700, files 0600."""
    umask = os.umask(0)
    try:
        USES[use](root)
        entry = Folder(root / "run-1").add({})
    finally:
        os.umask(umask)

    made = [root, *root.rglob("*")]
    assert {0o700} == {_mode(each) for each in made if each.is_dir()}
    files = [each for each in made if each.is_file() and each.name != "count"]
    assert {0o600} == {_mode(each) for each in files}
    entry.close()


def _a_link(root: Path) -> str:
    elsewhere = root.parent / "secret"
    elsewhere.mkdir(mode=0o700)
    root.symlink_to(elsewhere)
    return "is a symbolic link, which is not followed"


def _a_dangling_link(root: Path) -> str:
    root.symlink_to(root.parent / "secret")
    return "is a symbolic link, which is not followed"


def _a_file(root: Path) -> str:
    root.write_text("")
    return "is not a folder"


def _open_to_all(root: Path) -> str:
    root.mkdir()
    root.chmod(0o777)
    return r"may be written to by others \(mode 777\)"


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("plant", [_a_link, _a_dangling_link, _a_file, _open_to_all])
def test_a_folder_that_another_made_is_refused(
    root: Path, use: str, plant: Callable[[Path], str]
) -> None:
    """In one sentence that says what is wrong with which path, and what to do."""
    words = plant(root)
    with pytest.raises(
        SharedFolderError,
        match=f"{root} {words}; remove it, or name a folder .* PYTEST_GPUMEM_TENANCY$",
    ) as caught:
        USES[use](root)

    assert str(root) == caught.value.path
    assert not list((root.parent / "secret").glob("*"))


@pytest.mark.parametrize("use", USES)
def test_a_folder_of_another_user_is_refused(
    root: Path, use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that only its owner may write to."""
    root.mkdir(mode=0o700)
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    with pytest.raises(
        SharedFolderError, match=f"belongs to user {own}, not to this user"
    ):
        USES[use](root)

    assert not list(root.iterdir())


@pytest.mark.parametrize("name", ["run-1", "run-1/card-0", "run-1/card-0/mutex"])
def test_a_link_further_in_is_not_followed(root: Path, name: str) -> None:
    """Such as one that was put there while the folder was open to all."""
    elsewhere = root.parent / "secret"
    elsewhere.mkdir()
    target = elsewhere / "planted" if name.endswith("mutex") else elsewhere
    (root / name).parent.mkdir(parents=True)
    (root / name).symlink_to(target)
    with pytest.raises(SharedFolderError, match=r"remove it"):
        USES["shared card"](root)

    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "dangling"])
def test_a_lock_is_a_regular_file(root: Path, kind: str) -> None:
    """Nothing else is opened: a pipe would block, a link make a file elsewhere."""
    root.mkdir()
    lock = root / "0.lock"
    if kind == "pipe":
        os.mkfifo(lock)
    elif kind == "folder":
        lock.mkdir()
    else:
        target = root.parent / "target"
        if kind == "link":
            target.write_text("kept")
        lock.symlink_to(target)
    with pytest.raises(SharedFolderError, match=f"{lock} is not a regular file"):
        _enter()

    assert kind == "link" or not (root.parent / "target").exists()


def test_a_name_of_a_card_stays_in_the_folder(root: Path) -> None:
    """A MIG instance's has slashes."""
    for name in ("MIG-GPU-1/2/0", "../../x", "/etc/x"):
        with gpu_load_lock(name, timeout_s=1):
            pass

    assert [
        ".._.._x.lock",
        "MIG-GPU-1_2_0.lock",
        "_etc_x.lock",
    ] == sorted(each.name for each in root.iterdir())


def test_users_share_locks_where_one_chose_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder open to all with the sticky bit, a lock is open to all, too."""
    shared = tmp_path / "locks"
    shared.mkdir()
    shared.chmod(0o1777)
    monkeypatch.setenv("PYTEST_GPUMEM_LOCKS", str(shared))
    with gpu_load_lock(timeout_s=1), gpu_load_lock(1, timeout_s=1):
        names = sorted(each.name for each in shared.iterdir())

    assert ["0.lock", "1.lock"] == names
    assert {0o666} == {_mode(each) for each in shared.iterdir()}
    assert not root.exists()


def test_a_group_shares_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock is open to whom the folder is; of a private one, to its user alone."""
    shared = tmp_path / "locks"
    monkeypatch.setenv("PYTEST_GPUMEM_LOCKS", str(shared))
    _enter()
    private = _mode(shared / "0.lock")
    shared.chmod(0o3770)
    with gpu_load_lock(1, timeout_s=1):
        pass

    assert (0o600, 0o660) == (private, _mode(shared / "1.lock"))


def test_a_shared_folder_without_the_sticky_bit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody could remove a lock that is held, and so could a stranger who owns it."""
    shared = tmp_path / "locks"
    shared.mkdir()
    shared.chmod(0o777)
    words = "lacks the sticky bit, so its locks could be replaced"
    with (
        pytest.raises(SharedFolderError, match=rf"{words}; .* -m 1777 {shared}$"),
        gpu_load_lock(folder=shared),
    ):
        pass
    if os.geteuid() == 0:
        os.chown(shared, NOBODY, NOBODY)
    else:
        own = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    shared.chmod(0o1777)
    with (
        pytest.raises(SharedFolderError, match="neither to root nor to this user"),
        gpu_load_lock(folder=shared),
    ):
        pass


OTHER_USER = """
import os, sys
from pytest_gpumem.tenancy.load_lock import gpu_load_lock
os.setgid(65534)
os.setuid(65534)
try:
    with gpu_load_lock(folder=sys.argv[1], timeout_s=0.05):
        print("in")
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_root_and_another_user_wait_for_each_other() -> None:
    """In a folder of root's, whoever makes the lock; in none that is root's alone."""

    def as_another(folder: Path) -> str:
        run = subprocess.run(
            [sys.executable, "-c", OTHER_USER, str(folder)],
            capture_output=True,
            text=True,
            check=False,
        )
        return run.stdout.strip() or run.stderr

    with tempfile.TemporaryDirectory() as above:  # pytest's own are root's alone
        Path(above).chmod(0o711)
        shared, private = Path(above, "locks"), Path(above, "private")
        shared.mkdir()
        shared.chmod(0o1777)
        private.mkdir(mode=0o700)

        assert "in" == as_another(shared)
        with gpu_load_lock(folder=shared, timeout_s=1):
            assert as_another(shared).startswith("TimeoutError")
        assert "in" == as_another(shared)
        assert as_another(private).startswith("SharedFolderError")


def test_a_run_says_at_its_start_that_it_cannot_share(
    root: Path, pytester: pytest.Pytester
) -> None:
    """With exit code 4, before any test."""
    _open_to_all(root)
    pytester.makepyfile("def test_it():\n    pass")
    result = pytester.runpytest("--gpu-backend=simulated")

    assert pytest.ExitCode.USAGE_ERROR == result.ret
    result.stderr.fnmatch_lines([f"*{root} may be written to by others*"])


def test_nothing_that_is_read_is_executed() -> None:
    """No module of the package unpickles, evaluates or unmarshals anything."""
    forbidden = {"eval", "exec", "compile", "pickle.load", "pickle.loads"}
    forbidden |= {"pickle.Unpickler", "marshal.loads", "shelve.open", "torch.load"}
    found = [
        f"{path}: {name}"
        for path in sorted(Path(pytest_gpumem.__path__[0]).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in forbidden
    ]

    assert [] == found
