"""A served model's folder, laid out as huggingface_hub lays out its cache.

Note [A folder of the hub's cache]
``models--ORG--NAME`` holds ``refs/main`` with a commit, ``snapshots/COMMIT`` with the
files, and ``blobs`` with their contents, each under its digest; a file of a snapshot is
a link to its blob. Here a blob of a checkpoint is itself a link to the checkpoint's own
file. So nothing is copied, and removing the folder does not remove the checkpoint.
Source: "Understand caching" in huggingface_hub's guides, and ``file_download.py``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple

from pytest_gpumem.checkpoints import make_checkpoint
from pytest_gpumem.checkpoints.cache import MANIFEST
from pytest_gpumem.errors import CheckpointError
from pytest_gpumem.files import write_atomically
from pytest_gpumem.hub.names import HubModel, known_model

MAIN: Final = "main"
LEGACY: Final = "pytorch_model.bin"
#: Files that make a tokenizer; one of them is enough for a folder to have its own.
_TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
)

#: Files up to this size are named by a digest of their contents. Larger files, which the
#: hub keeps in git's large file storage, are named without reading them.
_READ_BYTES: Final = 2**20
_COMMIT_DIGITS: Final = 40


class HubFile(NamedTuple):
    """A file of a served model.

    Attributes:
        name: Its name in the repository.
        path: Its path on this machine.
        nbytes: Its size.
        digest: Its blob's name: 64 hexadecimal digits for a large file, 40 for others.
    """

    name: str
    path: Path
    nbytes: int
    digest: str

    @property
    def is_large(self) -> bool:
        """Whether it is named as a file of the hub's large file storage."""
        return len(self.digest) > _COMMIT_DIGITS


def repository(model: HubModel, root: Path) -> Path:
    """Return a model's folder below ``root``; build the folder if it does not exist.

    Several processes may call this at the same time.

    Raises:
        CheckpointError: The checkpoint cannot be built.
        OSError: The folder cannot be written.
    """
    name = f"models--{model.name.replace('/', '--')}"
    home = root / _digest(json.dumps(model.to_json()).encode())[:16]
    target = home / name
    if target.is_dir():
        return target
    checkpoint = _checkpoint(model)
    home.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=home))
    try:
        _lay_out(model, checkpoint, building)
        try:
            building.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was faster
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def commit_of(folder: Path) -> str:
    """Return the commit that a model's folder holds."""
    return (folder / "refs" / MAIN).read_text(encoding="utf-8")


def files_of(folder: Path) -> list[HubFile]:
    """Return the files of a model's folder, by name."""
    snapshot = folder / "snapshots" / commit_of(folder)
    found = []
    for path in sorted(snapshot.rglob("*")):
        if path.is_file():
            digest = path.readlink().name
            name = path.relative_to(snapshot).as_posix()
            found.append(HubFile(name, path, path.stat().st_size, digest))
    return found


def have_revision(folder: Path, revision: str) -> None:
    """Add a branch, tag or commit; all of them have the same files."""
    ref = folder / "refs" / revision
    is_inside = ".." not in revision and not revision.startswith("/")
    if revision != MAIN and is_inside and not ref.exists():
        commit = commit_of(folder)
        write_atomically(ref, commit)
        if len(revision) == _COMMIT_DIGITS:
            _make_link(folder / "snapshots" / revision, commit)


def have_file(model: HubModel, folder: Path, name: str) -> None:
    """Build the legacy format of a model's weights, if code asks for that file.

    Most published models have both formats. Here the second one is built when code asks
    for it, unless the model's options name a format.
    """
    chosen = {key for key, _value in model.options}
    if name != LEGACY or model.is_folder or chosen & {"format", "max_shard_size"}:
        return
    if chosen & {"weights"} or not (_snapshot(folder) / "model.safetensors").exists():
        return
    if not (_snapshot(folder) / LEGACY).exists():
        built = _make(model, format="bin")
        _link(folder, _snapshot(folder), built / LEGACY, LEGACY, _written(built))


# -- building -----------------------------------------------------------------------------


def _checkpoint(model: HubModel) -> Path:
    return Path(model.source) if model.is_folder else _make(model)


def _make(model: HubModel, **more: Any) -> Path:
    return make_checkpoint(model.source, **{**dict(model.options), **more})


def _snapshot(folder: Path) -> Path:
    return folder / "snapshots" / commit_of(folder)


def _lay_out(model: HubModel, checkpoint: Path, folder: Path) -> None:
    written = _written(checkpoint)
    sources = {
        path.relative_to(checkpoint).as_posix(): path
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != MANIFEST and not _is_hidden(path, checkpoint)
    }
    sources |= _own_tokenizer(model)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        # Without the library tokenizers, no code would read the files that it makes.
        if not sources.keys() & set(_TOKENIZER_FILES) and find_spec("tokenizers"):
            from pytest_gpumem.hub.tokenizer import write_tokenizer

            config = json.loads((checkpoint / "config.json").read_text("utf-8"))
            write_tokenizer(Path(scratch), config, name=model.name)
        made = {path.name: path for path in sorted(Path(scratch).iterdir())}
        digests = {
            name: _blob_name(path, written) for name, path in (sources | made).items()
        }
        commit = _digest(json.dumps(digests, sort_keys=True).encode())[:_COMMIT_DIGITS]
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (folder / "blobs").mkdir()
        (folder / "refs").mkdir()
        for name, path in made.items():
            path.replace(folder / "blobs" / digests[name])
            _make_link(snapshot / name, Path("../../blobs", digests[name]))
        for name, path in sources.items():
            _link(folder, snapshot, path, name, written)
    write_atomically(folder / "refs" / MAIN, commit)


def _make_link(link: Path, target: Path | str) -> None:
    """Make a symbolic link, as the hub's own cache does.

    Raises:
        CheckpointError: The system or the folder does not support symbolic links.
    """
    try:
        link.symlink_to(target)
    except FileExistsError:
        pass  # another process was faster
    except OSError as error:
        raise CheckpointError(
            f"a model is served by symbolic links, which cannot be made in "
            f"{link.parent} ({error}); on Windows switch on Developer Mode, elsewhere "
            "set PYTEST_GPUMEM_CACHE to a folder that supports them"
        ) from error


def _own_tokenizer(model: HubModel) -> dict[str, Path]:
    """Return the tokenizer's files beside the config that the model is built from."""
    path = Path(model.source)
    if model.is_folder or known_model(model.source) is not None:
        return {}
    beside = path if path.is_dir() else path.parent
    return {
        name: (beside / name).resolve()
        for name in _TOKENIZER_FILES
        if (beside / name).is_file()
    }


def _link(
    folder: Path, snapshot: Path, path: Path, name: str, written: dict[str, str]
) -> None:
    digest = _blob_name(path, written)
    _make_link(folder / "blobs" / digest, path.resolve())
    pointer = snapshot / name
    pointer.parent.mkdir(parents=True, exist_ok=True)
    blob = os.path.relpath(folder / "blobs" / digest, pointer.parent)
    _make_link(pointer, blob)


def _written(checkpoint: Path) -> dict[str, str]:
    """Return the digests in a checkpoint's manifest, by file."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        return {name: str(of["sha256"]) for name, of in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # a checkpoint that was not built here has no manifest


def _blob_name(path: Path, written: dict[str, str]) -> str:
    about = path.stat()
    if about.st_size <= _READ_BYTES:
        return _digest(path.read_bytes())[:_COMMIT_DIGITS]
    known = f"{path.resolve()} {about.st_size} {about.st_mtime_ns}"
    return written.get(path.name) or _digest(known.encode())


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
