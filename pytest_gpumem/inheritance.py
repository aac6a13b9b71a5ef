"""The settings that child processes take over: one environment variable, as JSON.

A run of pytest sets the variable. ``pytest_gpumem.children`` reads it at the start of
every Python process below, before any code of that process runs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from pytest_gpumem.visibility import numbers_of

if TYPE_CHECKING:
    from collections.abc import Sequence

CHILDREN_VARIABLE: Final = "PYTEST_GPUMEM_CHILDREN"

#: The variable with the path of a file that lists the hub models that children serve.
HUB_VARIABLE: Final = "PYTEST_GPUMEM_HUB"

#: If this variable is set, no child process is reached, and the package does nothing in one.
REFUSAL_VARIABLE: Final = "PYTEST_GPUMEM_NO_CHILDREN"

#: The variable with the path of the Python that runs ``nvidia-smi`` for simulated cards.
PYTHON_VARIABLE: Final = "PYTEST_GPUMEM_PYTHON"

#: The variable with the path of the folder in which processes note their bytes.
FOLDER_VARIABLE: Final = "PYTEST_GPUMEM_TENANCY"

#: The variable with the path of the folder of load locks that several users share.
LOCKS_VARIABLE: Final = "PYTEST_GPUMEM_LOCKS"

#: The key of a budget for every card.
EVERY_CARD: Final = ""
_INDEX: Final = re.compile(r"[0-9]{1,4}")


class Inheritance(NamedTuple):
    """A run's settings, for its children.

    Attributes:
        backend: ``"cuda"`` or ``"simulated"``.
        folder: The folder in which children write their figures; the first child makes it.
        options: The run's options that children take over, by name, as text.
        budgets: Sizes as text, by the card's index as text, or by ``EVERY_CARD``.
        rules: Injection rules as text.
        visible: The run's own ``CUDA_VISIBLE_DEVICES``, or None.
        shared: The folder in which processes that share simulated cards note their bytes;
            empty if they share none.
        tenants: Bytes of simulated competing processes, by the card's index and by process
            id, both as text.
    """

    backend: str
    folder: str
    options: dict[str, str]
    budgets: dict[str, str]
    rules: tuple[str, ...] = ()
    visible: str | None = None
    shared: str = ""
    tenants: dict[str, dict[str, int]] = {}  # noqa: RUF012  # nobody writes to it

    @property
    def text(self) -> str:
        """The variable's value."""
        return json.dumps(self._asdict())

    @classmethod
    def parse(cls, text: str) -> Inheritance:
        """Read the variable's value.

        Raises:
            ValueError: A run of this version does not set such a value.
        """
        try:
            given = cls(**json.loads(text))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{CHILDREN_VARIABLE} was not set by a run of this version ({error}); unset it"
            ) from None
        wrong = [
            name
            for name, value in zip(cls._fields, given, strict=False)
            if not _is(name, value)
        ]
        if wrong:
            raise ValueError(
                f"{CHILDREN_VARIABLE} was not set by a run of this version (its {wrong[0]!r} is of "
                "another type); unset it"
            )
        return given._replace(rules=tuple(given.rules))

    def seen_of(self, uuids: Sequence[str]) -> tuple[int, ...]:
        """Return the number of each simulated card that the run sees, in its order.

        Args:
            uuids: The UUIDs of the machine's cards.
        """
        return numbers_of(self.visible, uuids)

    def indices_here(self, visible: str | None, count: int) -> list[int]:
        """Return the run's index of each card that this process sees.

        Args:
            visible: This process's ``CUDA_VISIBLE_DEVICES``.
            count: The number of cards that it sees.
        """
        own, theirs = _entries(visible), _entries(self.visible)
        names = own[:count] or [str(index) for index in range(count)]
        if own == theirs:
            return list(range(count))
        if theirs:
            return [
                theirs.index(name) if name in theirs else index
                for index, name in enumerate(names)
            ]
        return [
            int(name) if _INDEX.fullmatch(name) else index
            for index, name in enumerate(names)
        ]


def tenancy_root() -> str:
    """Return the folder that this user's processes on this machine share."""
    named = os.environ.get(FOLDER_VARIABLE)
    user = os.geteuid() if hasattr(os, "geteuid") else "user"
    return named or os.path.join(tempfile.gettempdir(), f"pytest-gpumem-{user}")  # noqa: PTH118  # os.path is imported faster than pathlib


def run_folder(run: str) -> str:
    """Return the folder in which a run's processes note their bytes of simulated cards."""
    return os.path.join(tenancy_root(), f"run-{run}")  # noqa: PTH118  # os.path is imported faster than pathlib


def remove_run(folder: str) -> None:
    """Remove a run's folder, and the one around it if nothing else is in there."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        os.rmdir(os.path.dirname(folder))  # noqa: PTH106, PTH120  # os.path is imported faster than pathlib


def _is(name: str, value: object) -> bool:
    """Tell whether a setting has the right type."""
    if name in ("budgets", "options"):
        return isinstance(value, dict) and all(
            isinstance(size, str) for size in value.values()
        )
    if name == "tenants":
        return isinstance(value, dict) and all(
            isinstance(held, dict)
            and all(pid.isdecimal() and isinstance(n, int) for pid, n in held.items())
            for held in value.values()
        )
    if name == "rules":
        return isinstance(value, (list, tuple)) and all(
            isinstance(rule, str) for rule in value
        )
    return isinstance(value, str) or (name == "visible" and value is None)


def _entries(visible: str | None) -> list[str]:
    listed = (visible or "").strip()
    return [] if listed in ("", "-1") else [each.strip() for each in listed.split(",")]


def pass_budget_on(index: int, budget_bytes: int | None) -> None:
    """Pass a card's budget, or None, on to children that start from here on.

    Nothing happens outside a run of pytest.
    """
    given = _given_now()
    if given is None:
        return
    budgets = dict(given.budgets)
    budgets.pop(str(index), None)
    if budget_bytes is not None:
        budgets[str(index)] = str(budget_bytes)
    os.environ[CHILDREN_VARIABLE] = given._replace(budgets=budgets).text


#: The competing processes on the simulated cards now, as ``Inheritance.tenants``.
_tenants: Final[dict[str, dict[str, int]]] = {}


def present_tenants() -> dict[str, dict[str, int]]:
    """Return the competing processes on the cards, as ``Inheritance.tenants``."""
    return {index: dict(held) for index, held in _tenants.items()}


def pass_tenant_on(index: int, pid: int, nbytes: int) -> None:
    """Pass the bytes of a simulated competing process on to children that start later.

    Args:
        index: The card.
        pid: The process id that the card reports.
        nbytes: The bytes that it holds; 0 removes it from the card.
    """
    held = _tenants.setdefault(str(index), {})
    held[str(pid)] = nbytes
    if not nbytes:
        del held[str(pid)]
    if not held:
        del _tenants[str(index)]
    given = _given_now()
    if given is not None:
        os.environ[CHILDREN_VARIABLE] = given._replace(tenants=present_tenants()).text


def _given_now() -> Inheritance | None:
    """Return the settings in the environment; None outside a run of pytest."""
    text = os.environ.get(CHILDREN_VARIABLE)
    if not text:
        return None
    try:
        return Inheritance.parse(text)
    except ValueError:
        return None  # the variable was not set by a run of this version
