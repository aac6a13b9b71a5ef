"""The budgets of a card and their owners; the smallest budget applies.

Note [Owners of budgets]
The run, a test, a fixture of any scope, a ``with`` block and a trial can each cap a card.
Each removes its own cap, and they may end in any order: a fixture can exist longer than
the test that created it, and blocks of two threads or fixtures can overlap. A card
therefore stores the budget of every owner, and no "previous" budget.
"""

from __future__ import annotations

import threading
from typing import Final

from pytest_gpumem.errors import BudgetError


class Budgets:
    """The budgets of one card, by owner; see Note [Owners of budgets].

    Attributes:
        lock: Held while an owner's budget is changed and applied to the card.
    """

    def __init__(self) -> None:
        self._by_owner: Final[dict[object, int]] = {}
        self.lock: Final = threading.RLock()

    @property
    def smallest(self) -> int | None:
        """The smallest budget in bytes; None if there is no budget."""
        return min(self._by_owner.values(), default=None)

    def put(
        self,
        owner: object,
        budget_bytes: int | None,
        *,
        total_bytes: int,
        index: int,
        name: str,
    ) -> None:
        """Set an owner's budget, which replaces the owner's last one; None removes it.

        Args:
            owner: Any hashable object; two equal objects are the same owner.
            budget_bytes: The most reserved bytes, inclusive.
            total_bytes: The card's bytes.
            index: Index of the card.
            name: The card's name, for the error.

        Raises:
            BudgetError: The budget is not between one byte and the card's total.
        """
        if budget_bytes is None:
            self._by_owner.pop(owner, None)
        elif 0 < budget_bytes <= total_bytes:
            self._by_owner[owner] = budget_bytes
        else:
            raise BudgetError(
                f"budget of {budget_bytes} bytes on cuda:{index}: accepted are 1 to "
                f"{total_bytes} bytes, the total of {name}",
                value=budget_bytes,
            )


__all__ = ["Budgets"]
