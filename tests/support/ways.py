"""How a run of pytest may go; what the plugin does must show in each the same."""

from __future__ import annotations

from typing import Final

import pytest

WAYS: Final = {
    "plain": (),
    "xdist": ("-n", "2"),
    "junit": ("--junitxml=junit.xml",),
    "both": ("-n", "2", "--junitxml=junit.xml"),
}
#: Every worker imports torch, which takes seconds.
_SLOW_WAYS: Final = [
    pytest.param(name, marks=pytest.mark.slow) if "-n" in options else name
    for name, options in WAYS.items()
]


def each_way(daily: str = "") -> list[object]:
    """Return the names of all ways as parameters; those with workers are slow.

    Args:
        daily: One of those with workers that is tried every day all the same.
    """
    return [
        each if name != daily else name
        for name, each in zip(WAYS, _SLOW_WAYS, strict=True)
    ]


#: Options without workers and with some.
WORKERS: Final = [
    pytest.param((), id="alone"),
    pytest.param(("-n", "2"), id="xdist", marks=pytest.mark.slow),
]
