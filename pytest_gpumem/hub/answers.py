"""Answers requests about served models as the hub does.

Source: https://huggingface.co/docs/hub/api, and the parts of answers that
``huggingface_hub.hf_api`` and ``file_download`` read.
"""

from __future__ import annotations

import json
import re
from posixpath import normpath
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import parse_qs, unquote

from pytest_gpumem.hub.layout import (
    MAIN,
    HubFile,
    commit_of,
    files_of,
    have_file,
    have_revision,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_gpumem.hub.names import HubModel

    #: Returns the model that is served under a name, and its folder; None if there is none.
    Find = Callable[[str], tuple[HubModel, Path] | None]

#: The tasks of transformers' classes, by the end of a class's name.
#: Source: ``PIPELINE_TAGS_AND_AUTO_MODELS`` in transformers' ``update_metadata.py``.
_TASKS: Final = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForPreTraining": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForConditionalGeneration": "text2text-generation",
    "ForImageClassification": "image-classification",
    "Model": "feature-extraction",
}
_RANGE: Final = re.compile(r"bytes=(\d+)-(\d*)")
#: The date of a served model's last change, in answers.
_WHEN: Final = "2024-01-01T00:00:00.000Z"


class Answer(NamedTuple):
    """An answer to a request.

    Attributes:
        status: The status of HTTP.
        headers: The headers, by name.
        content: The body, unless it is a file.
        path: The file that is the body.
        start: The byte of the file with which the body begins.
    """

    status: int
    headers: dict[str, str]
    content: bytes = b""
    path: Path | None = None
    start: int = 0


def answer(
    method: str, target: str, body: bytes, find: Find, *, wanted_range: str = ""
) -> Answer | None:
    """Return the hub's answer; None if the hub itself must be asked.

    Args:
        method: The HTTP method.
        target: Path and query of the address, as sent.
        body: The request's body.
        find: See ``Find``.
        wanted_range: The ``Range`` header: which bytes of a file.
    """
    path, _question, query = target.partition("?")
    parts = path.strip("/").split("/")
    if parts[:2] == ["api", "models"]:
        for length in (2, 1):
            name = "/".join(parts[2 : 2 + length])
            found = find(name) if len(parts) >= 2 + length else None
            if found is not None:
                rest = [unquote(each) for each in parts[2 + length :]]
                if method == "POST" and rest[:1] == ["paths-info"]:
                    return _paths(found[1], body)
                return _about(method, name, found[1], rest, query)
        return None
    for length in (2, 1):
        if parts[length : length + 1] in (["resolve"], ["raw"]):
            found = find("/".join(parts[:length]))
            if found is not None and len(parts) > length + 2:
                revision = unquote(parts[length + 1])
                file = normpath(unquote("/".join(parts[length + 2 :])))
                return _file(found, revision, file, wanted_range)
    return None


def _file(
    found: tuple[HubModel, Path], revision: str, name: str, wanted_range: str
) -> Answer:
    model, folder = found
    have_revision(folder, revision)
    have_file(model, folder, name)
    headers = {"X-Repo-Commit": commit_of(folder), "Accept-Ranges": "bytes"}
    file = next((each for each in files_of(folder) if each.name == name), None)
    if file is None:
        headers["X-Error-Code"] = "EntryNotFound"
        return _refused(404, f"Entry not found: {name}", headers)
    headers["ETag"] = f'"{file.digest}"'
    asked = _RANGE.fullmatch(wanted_range)
    if asked is None:
        headers["Content-Length"] = str(file.nbytes)
        return Answer(200, headers, path=file.path)
    start = int(asked[1])
    end = min(int(asked[2] or file.nbytes), file.nbytes - 1)
    if start > end:
        headers["Content-Range"] = f"bytes */{file.nbytes}"
        return _refused(416, f"{name} has no byte {start}", headers)
    headers["Content-Length"] = str(end + 1 - start)
    headers["Content-Range"] = f"bytes {start}-{end}/{file.nbytes}"
    return Answer(206, headers, path=file.path, start=start)


def _about(method: str, name: str, folder: Path, rest: list[str], query: str) -> Answer:
    what = rest[0] if rest else ""
    if method == "GET" and what in ("", "revision"):
        return _json(_information(name, folder))
    if method == "GET" and what == "tree":
        below = "/".join(rest[2:])
        is_deep = parse_qs(query).get("recursive", [""])[0].lower() in ("1", "true")
        return _json(_tree(folder, below, is_deep=is_deep))
    if method == "GET" and what == "refs":
        main = {
            "name": MAIN,
            "ref": f"refs/heads/{MAIN}",
            "targetCommit": commit_of(folder),
        }
        return _json({"branches": [main], "converts": [], "tags": []})
    if method == "GET" and what == "commits":
        commit = {
            "id": commit_of(folder),
            "title": "Served by pytest-gpumem",
            "message": "",
            "date": _WHEN,
            "authors": [],
        }
        return _json([commit])
    return _refused(
        403,
        f"{name} is served by pytest-gpumem, which has only its files: no "
        f"{method} {'/'.join(rest)}",
    )


def _paths(folder: Path, body: bytes) -> Answer:
    asked = _asked_paths(body)
    return _json([_entry(each) for each in files_of(folder) if each.name in asked])


def _information(name: str, folder: Path) -> dict[str, Any]:
    files = files_of(folder)
    commit = commit_of(folder)
    config = json.loads(
        (folder / "snapshots" / commit / "config.json").read_text("utf-8")
    )
    classes = config.get("architectures") or [""]
    task = next(
        (task for end, task in _TASKS.items() if str(classes[0]).endswith(end)), None
    )
    return {
        "_id": commit[:24],
        "id": name,
        "modelId": name,
        "author": name.rpartition("/")[0] or None,
        "sha": commit,
        "lastModified": _WHEN,
        "createdAt": _WHEN,
        "private": False,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "library_name": "transformers",
        "pipeline_tag": task,
        "tags": ["transformers", str(config.get("model_type"))],
        "config": {key: config.get(key) for key in ("architectures", "model_type")},
        "siblings": [
            {"rfilename": file.name, "size": file.nbytes, **_blob(file)}
            for file in files
        ],
    }


def _tree(folder: Path, below: str, *, is_deep: bool) -> list[dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = {}
    start = f"{below}/" if below else ""
    for file in files_of(folder):
        if not file.name.startswith(start):
            continue
        inner = file.name.removeprefix(start).split("/")
        for depth in range(1, len(inner)):
            path = start + "/".join(inner[:depth])
            if is_deep or depth == 1:
                entries.setdefault(
                    path,
                    {"type": "directory", "oid": "0" * 40, "size": 0, "path": path},
                )
        if is_deep or len(inner) == 1:
            entries[file.name] = _entry(file)
    return list(entries.values())


def _entry(file: HubFile) -> dict[str, Any]:
    blob = _blob(file)
    return {
        "type": "file",
        "oid": blob.pop("blobId"),
        "size": file.nbytes,
        "path": file.name,
        **blob,
    }


def _blob(file: HubFile) -> dict[str, Any]:
    if not file.is_large:
        return {"blobId": file.digest}
    large = {"oid": file.digest, "sha256": file.digest, "size": file.nbytes}
    return {"blobId": file.digest[:40], "lfs": {**large, "pointerSize": 135}}


def _asked_paths(body: bytes) -> list[str]:
    try:
        paths = json.loads(body)["paths"]
    except (ValueError, KeyError, TypeError):
        paths = parse_qs(body.decode("utf-8", "replace")).get("paths", [])
    return [paths] if isinstance(paths, str) else list(paths)


def _json(content: Any) -> Answer:
    headers = {"Content-Type": "application/json"}
    return Answer(200, headers, json.dumps(content).encode())


def _refused(status: int, text: str, headers: dict[str, str] | None = None) -> Answer:
    content = json.dumps({"error": text}).encode()
    told = {"Content-Type": "application/json", "X-Error-Message": text}
    return Answer(status, {**told, **(headers or {})}, content)
