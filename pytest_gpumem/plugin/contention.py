"""Recognises OOMs that other workers helped to cause, and adds advice to the failure.

Without the other workers such an OOM would not have happened: the test's live bytes and
its request together fit into the test's own budget, or into the card if the test has no
budget. An injected OOM is never of this kind. The test fails. With the marker
``requires_vram`` it would wait for its bytes instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from pytest_gpumem.plugin.record_keeping import record_of
from pytest_gpumem.records.record import Contention

if TYPE_CHECKING:
    from collections.abc import Generator

    from pytest_gpumem.plugin import marks
    from pytest_gpumem.plugin.session import Run
    from pytest_gpumem.records.incidents import Incident

_MIB: Final = 2**20


class ContentionCheck:
    """Distinguishes OOMs under contention from OOMs of the test alone.

    Args:
        run: The run.
        markers: The arguments of each test's markers.
    """

    def __init__(self, run: Run, markers: marks.MarkersByTest) -> None:
        self._run: Final = run
        self._markers: Final = markers
        self._item: pytest.Item | None = None
        self._seen: Contention | None = None

    def note(self, incident: Incident) -> None:
        """Note an OOM if it is one under contention."""
        device = self._run.device
        if device is None or self._item is None or incident.kind != "oom":
            return
        index, nbytes = incident.device_index, incident.nbytes
        total = incident.total_bytes - device.context_bytes(index)
        own = self._markers[self._item].budgets
        budget = self._run.settings.budget_bytes(index, incident.total_bytes, own)
        share = self._run.sharing.cap_bytes(device, index)
        in_force = incident.budget_bytes
        if in_force is not None and in_force != share:
            # The smallest active budget counts. A budget of a fixture or a block also
            # belongs to the test.
            budget = min(budget or in_force, in_force)
        needed = incident.allocated_bytes + nbytes
        if incident.injected_by or needed > min(budget or total, total):
            return  # without other workers the test would also have run out of memory
        others = device.others_bytes(index)
        lacks_share = budget is None and share is not None
        if lacks_share or total - others - incident.reserved_bytes < nbytes:
            self._seen = Contention(
                index, needed, share if lacks_share else None, others, incident.site
            )

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None]:
        """Forget the OOMs of the previous test."""
        self._item, self._seen = item, None
        return (yield)

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Add to a failure a description of the OOM, and the marker that the test lacks."""
        report = yield
        if report.failed and self._seen is not None:
            record_of(item).contention = self._seen
            text = f"{describe_contention(self._seen)}; {advice(self._seen)}"
            report.sections.append(("GPU contention", text))
            self._seen = None
        if report.when == "teardown":
            self._item = None
        return report


def describe_contention(seen: Contention) -> str:
    """Describe an OOM under contention on one line."""
    from pytest_gpumem.sizes import format_size

    needed = f"an OOM under contention: {format_size(seen.needed_bytes)} were needed"
    others = f"others held {format_size(seen.others_bytes)}"
    if seen.share_bytes is None:
        return f"{needed}, {others}"
    return f"{needed} of a share of {format_size(seen.share_bytes)}, {others}"


def advice(seen: Contention) -> str:
    """Return the marker that makes the test wait for its bytes, in words."""
    mebibytes = -(-seen.needed_bytes // _MIB)
    size = f"{mebibytes // 1024}GiB" if mebibytes % 1024 == 0 else f"{mebibytes}MiB"
    return f'@pytest.mark.requires_vram("{size}") makes it wait until that much is free'
