"""PyTorch's build for CPUs is taken where its index answers, and missed nowhere."""

from __future__ import annotations

import http.server
import runpy
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parents[2]
INSTALL: Final[dict[str, Any]] = runpy.run_path(str(ROOT / "tools" / "install.py"))


class _Index(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/whl/torch/" else 404)
        self.end_headers()

    def log_message(self, *_args: object) -> None:
        """Say nothing."""


@pytest.fixture
def index() -> Iterator[str]:
    """An index that has PyTorch below ``/whl``."""
    with http.server.HTTPServer(("127.0.0.1", 0), _Index) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_an_index_answers_or_not(index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has PyTorch; it has not; nobody is there; somebody is and says nothing."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    answers = INSTALL["answers"]

    assert answers(f"{index}/whl")
    assert not answers(f"{index}/other")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert not answers(address, timeout_s=0.05)
    assert not answers(address)
    assert not answers("no address")


@pytest.mark.parametrize(
    ("has", "added", "said"),
    [
        (True, ["--extra-index-url", INSTALL["INDEX"]], "PyTorch's build for CPUs"),
        (False, [], "does not answer: PyTorch comes from pip's own index"),
    ],
)
def test_the_index_is_added_where_it_answers(
    has: bool,  # noqa: FBT001  # a parameter of the test
    added: list[str],
    said: str,
) -> None:
    """And what comes otherwise is said, with what it takes."""
    asked: list[str] = []

    def answers(index: str) -> bool:
        asked.append(index)
        return has

    line, words = INSTALL["command"](["-q", "torch==2.13.0", "numpy"], answers)

    assert ["pip", "install", "-q", "torch==2.13.0", "numpy", *added] == line[3:]
    assert said in words
    assert [INSTALL["INDEX"]] == asked


def test_nobody_is_asked_where_there_is_no_need() -> None:
    """Other projects, also those whose names begin in the same way."""
    arguments = ["torchao==0.18.0", "torch-max-mem", "pytest>=9"]

    line, words = INSTALL["command"](arguments, pytest.fail)

    assert ("", arguments) == (words, line[5:])
