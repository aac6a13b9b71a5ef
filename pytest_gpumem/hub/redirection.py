"""Redirects huggingface_hub to the folders of served models.

Note [Two places]
huggingface_hub joins every path into its cache from the cache's folder and the result of
``repo_folder_name``. For a served model that function here returns an absolute path. So
the model is found in the run's own folder, for every cache that a variable, an argument
or a default names, and the user's cache does not change. Every request is sent by
``Client.send``, before 1.0 by ``Session.send``. For a served model the request is answered here, without network.
``local_files_only`` and the offline mode need only the first of the two.
Source: ``huggingface_hub.file_download``, ``_snapshot_download``, ``hf_api`` and
``utils._http``, 0.36 to 2.4.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from pytest_gpumem.devices.on_import import AfterImport
from pytest_gpumem.devices.patches import PatchSet
from pytest_gpumem.hub.advice import advise
from pytest_gpumem.hub.answers import Answer, answer
from pytest_gpumem.hub.layout import have_file, have_revision

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pytest_gpumem.hub.names import HubModel

_LIBRARY: Final = "huggingface_hub"
_CHUNK_BYTES: Final = 2**22
#: Hosts of the hub; ``HF_ENDPOINT`` may name another.
_HOSTS: Final = frozenset(("huggingface.co", "hf.co"))


class Patches:
    """The functions that are replaced in libraries as soon as each is imported.

    Args:
        find: Returns the model that is served under a name, and its folder; None if
            there is none.
    """

    def __init__(self, find: Callable[[str], tuple[HubModel, Path] | None]) -> None:
        self._find: Final = find
        self._patches: Final = PatchSet()
        self._hooks: Final = [
            AfterImport(f"{_LIBRARY}.utils._http", self._patch_client),
            AfterImport(f"{_LIBRARY}.file_download", self._patch_downloads),
            AfterImport(f"{_LIBRARY}._snapshot_download", self._patch_snapshots),
            AfterImport(f"{_LIBRARY}.hf_api", self._patch_api),
            AfterImport("transformers.utils.hub", self._patch_transformers),
        ]

    def start(self) -> None:
        """Replace functions of imported libraries, and wait for the others."""
        for hook in self._hooks:
            hook.start()

    def stop(self) -> None:
        """Restore all functions."""
        for hook in self._hooks:
            hook.stop()
        self._patches.restore()

    # -- the cache's folders --------------------------------------------------------------

    def _patch_downloads(self) -> None:
        module = importlib.import_module(f"{_LIBRARY}.file_download")
        plain = module.repo_folder_name

        @functools.wraps(plain)
        def repo_folder_name(*, repo_id: str, repo_type: str) -> str:
            found = self._find(repo_id) if repo_type == "model" else None
            if found is None:
                name: str = plain(repo_id=repo_id, repo_type=repo_type)
                return name
            return str(found[1])

        self._replace(plain, repo_folder_name)
        self._wrap(module, "_hf_hub_download_to_cache_dir")
        lookup = module.try_to_load_from_cache
        if plain.__name__ not in inspect.unwrap(lookup).__code__.co_names:  # before 1.0
            self._replace(lookup, self._looking_up(lookup))

    def _looking_up(self, plain: Any) -> Any:
        """Return a lookup in the cache that knows the folders of served models."""

        @functools.wraps(plain)
        def try_to_load_from_cache(
            repo_id: str,
            filename: str,
            cache_dir: Any = None,
            revision: str | None = None,
            repo_type: str | None = None,
        ) -> Any:
            found = self._find(repo_id) if repo_type in {None, "model"} else None
            if found is not None:  # the model may be in the cache under another name
                cache_dir, folder = found[1].parent, found[1].name
                repo_id = folder.removeprefix("models--").replace("--", "/")
            return plain(repo_id, filename, cache_dir, revision, repo_type)

        return try_to_load_from_cache

    def _patch_snapshots(self) -> None:
        module = importlib.import_module(f"{_LIBRARY}._snapshot_download")
        self._replace(
            module.snapshot_download, self._prepared(module.snapshot_download)
        )

    def _patch_api(self) -> None:
        module = importlib.import_module(f"{_LIBRARY}.hf_api")
        if hasattr(module.HfApi, "resolve_revision"):  # from 2.0 on
            self._wrap(module.HfApi, "resolve_revision")

    def _replace(self, plain: Any, other: Any) -> None:
        """Replace a function in every imported module of the libraries that has it."""
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] in {_LIBRARY, "transformers"}:
                for key, value in list(vars(module).items()):
                    if value is plain:
                        self._patches.set(module, key, other)

    def _wrap(self, owner: Any, name: str) -> None:
        plain = getattr(owner, name, None)
        if plain is not None:
            self._patches.set(owner, name, self._prepared(plain))

    def _prepared(self, plain: Any) -> Any:
        """Return a wrapper that gives a served model the requested revision first."""

        @functools.wraps(plain)
        def prepared(*args: Any, **kwargs: Any) -> Any:
            texts = (each for each in args if isinstance(each, str))
            name = kwargs.get("repo_id") or next(texts, None)
            is_model = kwargs.get("repo_type") in (None, "model")
            found = self._find(name) if is_model and isinstance(name, str) else None
            if found is not None:
                have_revision(found[1], str(kwargs.get("revision") or "main"))
                have_file(found[0], found[1], str(kwargs.get("filename")))
            return plain(*args, **kwargs)

        return prepared

    # -- requests -------------------------------------------------------------------------

    def _patch_client(self) -> None:
        http = importlib.import_module(f"{_LIBRARY}.utils._http")
        library: Any = getattr(http, "httpx2", None) or getattr(http, "httpx", None)
        if library is None:
            self._patch_requests(http.requests)
            return
        plain = library.Client.send

        @functools.wraps(plain)
        def send(client: Any, request: Any, **options: Any) -> Any:
            made = self._answer(library, request)
            if made is None:
                return plain(client, request, **options)
            if not options.get("stream"):
                made.read()
            return made

        self._patches.set(library.Client, "send", send)

    def _patch_requests(self, library: Any) -> None:
        """Answer requests that the library sends through ``requests`` before 1.0."""
        plain = library.Session.send

        @functools.wraps(plain)
        def send(session: Any, request: Any, **options: Any) -> Any:
            body = request.body or b""
            made = self._answered(
                request,
                str(request.url),
                body if isinstance(body, bytes) else body.encode(),
            )
            if made is None:
                return plain(session, request, **options)
            found = library.Response()
            found.status_code, found.request, found.url = (
                made.status,
                request,
                request.url,
            )
            found.headers.update(made.headers)
            chunks = (
                iter([made.content]) if made.path is None else _read(made, made.path)
            )
            found.raw = _Body(iter(()) if request.method == "HEAD" else chunks)
            if not options.get("stream"):
                found.content  # noqa: B018  # reads the body
            return found

        self._patches.set(library.Session, "send", send)

    def _answer(self, library: Any, request: Any) -> Any:
        body = request.read() if request.method == "POST" else b""
        made = self._answered(request, str(request.url), body)
        if made is None:
            return None
        is_head = request.method == "HEAD"
        content: Any = made.content if made.path is None else _read(made, made.path)
        return library.Response(
            made.status,
            headers=made.headers,
            content=b"" if is_head else content,
            request=request,
        )

    def _answered(self, request: Any, url: str, body: bytes) -> Answer | None:
        """Return the answer to a request; None if its host is not the hub's."""
        endpoint = urlsplit(os.environ.get("HF_ENDPOINT", ""))
        asked = urlsplit(url)
        if asked.hostname not in _HOSTS and asked.hostname != endpoint.hostname:
            return None
        target = asked.path.removeprefix(endpoint.path)
        if asked.query:
            target += f"?{asked.query}"
        wanted = request.headers.get("Range", "")
        return answer(request.method, target, body, self._find, wanted_range=wanted)

    # -- models that are not served -------------------------------------------------------

    def _patch_transformers(self) -> None:
        module = importlib.import_module("transformers.utils.hub")
        plain = module.cached_files

        @functools.wraps(plain)
        def cached_files(*args: Any, **kwargs: Any) -> Any:
            try:
                return plain(*args, **kwargs)
            except OSError as error:
                advise(error)
                raise

        self._patches.set(module, "cached_files", cached_files)


class _Body:
    """The file-like object from which ``requests`` reads an answer."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks

    def read(self, _size: int = 0) -> bytes:
        """Return the next bytes, whatever their number; none at the end."""
        return next(self._chunks, b"")

    def close(self) -> None:
        """Close the file."""
        close = getattr(self._chunks, "close", None)
        if close is not None:
            close()


def _read(made: Answer, path: Path) -> Iterator[bytes]:
    """Yield the bytes of a file, as an answer."""
    left = int(made.headers["Content-Length"])
    with path.open("rb") as stream:
        stream.seek(made.start)
        while left and (chunk := stream.read(min(left, _CHUNK_BYTES))):
            left -= len(chunk)
            yield chunk
