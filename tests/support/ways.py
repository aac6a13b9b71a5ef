"""How a run of pytest may go; what the plugin does must show in each the same."""

from __future__ import annotations

from typing import Final

WAYS: Final = {
    "plain": (),
    "xdist": ("-n", "2"),
    "junit": ("--junitxml=junit.xml",),
    "both": ("-n", "2", "--junitxml=junit.xml"),
}
