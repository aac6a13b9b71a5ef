"""The fixtures of checkpoints, in suites whose tests ask for them or use ``request``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_gpumem.plugin.fixtures import session_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="session", name="bert_large")
def bert_large(request: pytest.FixtureRequest) -> Path:
    """The folder of a bert-large checkpoint at its real size, built once.

    ``--gpu-checkpoint`` chooses another checkpoint.
    """
    from pytest_gpumem.checkpoints import resolve_checkpoint

    return resolve_checkpoint(session_of(request.config).settings.checkpoint)


@pytest.fixture(scope="session", name="make_checkpoint")
def make_checkpoint() -> Callable[..., Path]:
    """A function that builds any checkpoint offline; see ``make_checkpoint``."""
    from pytest_gpumem.checkpoints import make_checkpoint as make

    return make
