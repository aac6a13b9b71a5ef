"""How much of which card a test claims while others share it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_gpumem.plugin.marks import Markers
    from pytest_gpumem.plugin.settings import Settings


class Claim(NamedTuple):
    """What a test needs of one card.

    Attributes:
        nbytes: Bytes; 0 for a test that only wants the card alone.
        is_alone: Whether no other test may use the card meanwhile.
        is_share: Whether less will do where other workers hold contexts on the card.
    """

    nbytes: int
    is_alone: bool = False
    is_share: bool = False


def declared_claims(
    markers: Markers | None, settings: Settings, totals: Mapping[int, int]
) -> dict[int, Claim]:
    """Return what a test's markers and the run's options say that it needs, by card.

    ``requires_vram`` comes first, then a budget of the test's own, then its limits, then
    the run's limit, then the run's budget. What names no card means the first.

    Args:
        markers: What the test's markers ask for.
        settings: The run's options.
        totals: Bytes of each card.

    Returns:
        Claims by device index; empty where nothing is said.
    """
    claims: dict[int, Claim] = {}
    for index, total in totals.items():
        nbytes = _declared(markers, settings, index, total)
        if nbytes is not None:
            claims[index] = Claim(min(nbytes, total))
    for alone_on in () if markers is None else markers.alone_on:
        for index in totals if alone_on is None else (alone_on,):
            own = claims.get(index, Claim(0))
            claims[index] = own._replace(is_alone=True)
    return claims


def _declared(
    markers: Markers | None, settings: Settings, index: int, total: int
) -> int | None:
    if markers is not None:
        required = [
            each.size.resolve(total)
            for each in markers.requirements
            if each.device_index == index
        ]
        if required:
            return max(required)
        budgets = [each for each in markers.budgets if each.device_index == index]
        if budgets:
            return budgets[0].size.resolve(total)
        limits = [
            each.size.resolve(total)
            for each in markers.limits
            if (each.device_index or 0) == index
        ]
        if limits:
            return max(limits)
    if index:
        return None
    if settings.max_vram is not None:
        return settings.max_vram.resolve(total)
    return settings.budget_bytes(0, total)
