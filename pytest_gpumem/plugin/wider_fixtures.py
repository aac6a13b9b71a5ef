"""Measures the bytes of fixtures of wider scope, which do not count for any test."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import pytest

from pytest_gpumem.devices import allocated_bytes
from pytest_gpumem.plugin.record_keeping import record_of

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from pytest_gpumem.plugin.session import Run


def has_wider_fixtures(items: Iterable[pytest.Item]) -> bool:
    """Tell whether tests have, or may ask for, fixtures of a wider scope than their own.

    Names passed to ``request.getfixturevalue`` are not known yet.
    """
    infos = {id(info): info for each in items if (info := _fixtures_of(each))}
    return any(
        "request" in info.names_closure
        or any(
            definition.scope != "function"
            for several in info.name2fixturedefs.values()
            for definition in several
        )
        for info in infos.values()
    )


def _fixtures_of(item: pytest.Item) -> Any:
    """Return pytest's information on a test's fixtures; tests of one function share it."""
    return getattr(item, "_fixtureinfo", None)


class WiderFixtures:
    """Measures each fixture of class, module, package or session scope as it is made.

    Args:
        run: The run; its device may be created in the middle of a fixture.
    """

    def __init__(self, run: Run) -> None:
        self._run: Final = run
        self._held: Final[dict[Any, int]] = {}
        #: Bytes of the fixtures that are being made. A fixture may request another one
        #: while it is made; the bytes of the inner fixture count only once.
        self._inner = [0]

    @property
    def held_bytes(self) -> int:
        """The bytes that all fixtures added when they were made, also if freed since."""
        device = self._run.device
        held = sum(self._held.values())
        return held if device is None else min(held, allocated_bytes(device))

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> Generator[None, object, object]:
        """Measure a fixture, without the fixtures that it requests."""
        if fixturedef.scope == "function":
            return (yield)
        device = self._run.device
        before = 0 if device is None else allocated_bytes(device)
        self._inner.append(0)
        is_made = False
        try:
            value = yield
            is_made = True
        finally:
            inner = self._inner.pop()
            device = self._run.device
            if device is not None:
                total = allocated_bytes(device) - before
                self._inner[-1] += total
                own = total - inner
                # A failed fixture's bytes are freed together with its frames.
                if own and is_made:
                    from pytest_gpumem.records.record import WiderFixture

                    self._held[fixturedef] = own
                    node = getattr(request, "_pyfuncitem", request.node)
                    made = WiderFixture(fixturedef.scope, fixturedef.argname, own)
                    record_of(node).fixtures.append(made)
        return value

    def pytest_fixture_post_finalizer(self, fixturedef: pytest.FixtureDef[Any]) -> None:
        """Forget a fixture that was torn down."""
        self._held.pop(fixturedef, None)
