"""Starts a test when its bytes of the cards are free.

See Note [A card among workers] in ``sharing.py``.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

import pytest

from pytest_gpumem.errors import AdmissionTimeoutError
from pytest_gpumem.plugin.claims import Claim, declared_claims
from pytest_gpumem.plugin.record_keeping import has_record, record_of

if TYPE_CHECKING:
    from collections.abc import Generator

    from pytest_gpumem.devices import Device
    from pytest_gpumem.plugin import marks
    from pytest_gpumem.plugin.phases import Phases
    from pytest_gpumem.plugin.session import Run

#: The fixture that puts other processes on a card.
TENANTS: Final = "competing_process"
#: Waits of fewer seconds are not reported.
_SHORT_S: Final = 0.05


class Admission:
    """Lets every test wait for the bytes that it claims, and hold them until its teardown.

    Args:
        run: The run.
        phases: The hooks around tests' phases, which clean up between tests.
        markers: The arguments of each test's markers.
        idle: Tests that used no card in earlier runs; they claim no share.
    """

    def __init__(
        self,
        run: Run,
        phases: Phases,
        markers: marks.MarkersByTest,
        idle: frozenset[str] = frozenset(),
    ) -> None:
        self._run: Final = run
        self._phases: Final = phases
        self._markers: Final = markers
        self._idle: Final = idle
        self._waited_s = 0.0
        self._refusal: AdmissionTimeoutError | None = None

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Claim the test's bytes before other plugins measure or limit its time."""
        with ExitStack() as stack:
            self._claim(item, stack)
            try:
                return (yield)
            finally:
                self._refusal = None
                self._run.sharing.is_capped = True
                if self._run.device is not None:
                    self._settle(self._run.device)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        """Fail the setup of a test that waited too long."""
        if self._refusal is not None:
            pytest.fail(
                f"{self._refusal} (--gpu-wait-timeout, @pytest.mark.requires_vram)",
                pytrace=False,
            )

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        """Report how long a test waited, if it used a card."""
        waited_s, self._waited_s = self._waited_s, 0.0
        if waited_s > _SHORT_S and (item in self._markers or has_record(item)):
            record_of(item).waited_s = round(waited_s, 2)

    def _claim(self, item: pytest.Item, stack: ExitStack) -> None:
        if item.get_closest_marker("skip") is not None:
            return
        if item in self._markers:
            self._run.require_device()
        device = self._run.device
        if device is None or not device.device_count:
            return
        claims = self._claims(item, device)
        self._waited_s = waited = 0.0
        sharing = self._run.sharing
        # The cards are always claimed in the same order, to prevent a deadlock of two tests.
        by_card = sorted(claims, key=device.card_id)
        try:
            for index in by_card:
                claim, total = claims[index], device.total_bytes(index)
                waited += stack.enter_context(
                    sharing.ledger(device, index, total).admitted(
                        claim.nbytes,
                        is_exclusive=claim.is_alone,
                        is_share=claim.is_share,
                        timeout_s=self._run.settings.wait_s,
                    )
                )
        except AdmissionTimeoutError as error:
            stack.close()
            self._refusal = error
        self._waited_s = waited

    def _claims(self, item: pytest.Item, device: Device) -> dict[int, Claim]:
        sharing = self._run.sharing
        totals = {
            index: device.total_bytes(index) for index in range(device.device_count)
        }
        claims = declared_claims(self._markers[item], self._run.settings, totals)
        # A test with a competing process gets the card for itself, because the process and
        # the tests of other workers would take bytes from each other.
        if TENANTS in getattr(item, "fixturenames", ()):
            claims = {
                index: claims.get(index, Claim(0))._replace(is_alone=True)
                for index in totals
            }
        sharing.is_capped = not claims
        if not claims and sharing.admits and item.nodeid not in self._idle:
            share = sharing.share_bytes(device, 0, totals[0])
            claims[0] = Claim(min(share, totals[0]), is_share=True)
        return claims

    def _settle(self, device: Device) -> None:
        """Empty the cache, and note the bytes that stay held after the test."""
        self._phases.clean(device)
        for index in range(device.device_count):
            self._run.sharing.hold_idle(device, index)
