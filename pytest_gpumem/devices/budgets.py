"""Who caps a card at how much; the smallest of what is alive holds.

Note [Owners of budgets]
The run, a test, a fixture of any scope, a ``with`` block and a trial each cap a card, and
each takes its own cap back, in whatever order they end: a fixture's outlives the test
that made it, blocks of two threads or of two fixtures cross. So a card keeps every
owner's budget, and none is "the one from before".
"""

from __future__ import annotations

import threading
from typing import Final

from pytest_gpumem.errors import BudgetError


class Budgets:
    """The budgets of one card, by owner; see Note [Owners of budgets].

    Attributes:
        lock: Held while an owner's budget is changed and the card told of it.
    """

    def __init__(self) -> None:
        self._by_owner: Final[dict[object, int]] = {}
        self.lock: Final = threading.RLock()

    @property
    def smallest(self) -> int | None:
        """What holds, in bytes; None where nobody has a budget."""
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
        """Give an owner a budget in place of its last one; None takes it back.

        Args:
            owner: Any hashable object; owners are told apart by equality.
            budget_bytes: What reserved bytes may come to, inclusive.
            total_bytes: The card's bytes.
            index: The card.
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
