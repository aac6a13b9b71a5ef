"""Decides how many bytes of each card a test claims while workers share the cards."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_gpumem.plugin.marks import Markers
    from pytest_gpumem.plugin.settings import Settings


class Claim(NamedTuple):
    """The bytes that a test claims of one card.

    Attributes:
        nbytes: Bytes; 0 for a test that only needs the card for itself.
        is_alone: Whether no other test may use the card at the same time.
        is_share: Whether fewer bytes are enough if other workers hold contexts on the
            card.
    """

    nbytes: int
    is_alone: bool = False
    is_share: bool = False


def declared_claims(
    markers: Markers, settings: Settings, totals: Mapping[int, int]
) -> dict[int, Claim]:
    """Return the bytes of each card that a test needs by its markers and the options.

    The first of these that exists is used: ``requires_vram``, a budget of the test's own,
    its limits, the run's limit, the run's budget. A limit without a card is for the first
    card.

    Args:
        markers: The arguments of the test's markers.
        settings: The run's options.
        totals: Bytes of each card.

    Returns:
        Claims by device index; empty if no marker and no option says what the test needs.
    """
    claims: dict[int, Claim] = {}
    for index, total in totals.items():
        nbytes = _declared(markers, settings, index, total)
        if nbytes is not None:
            claims[index] = Claim(min(nbytes, total))
    for alone_on in markers.alone_on:
        for index in totals if alone_on is None else (alone_on,):
            own = claims.get(index, Claim(0))
            claims[index] = own._replace(is_alone=True)
    return claims


def _declared(
    markers: Markers, settings: Settings, index: int, total: int
) -> int | None:
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
