"""Write the pages of the documentation that are made from the code.

``python docs/generate.py`` writes them, ``--check`` names those that are out of date.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

HERE = Path(__file__).parent
if str(HERE) not in sys.path:
    sys.path.append(str(HERE))

from generators.api import api  # noqa: E402  # after sys.path is set
from generators.cards import cards  # noqa: E402  # after sys.path is set
from generators.command_line import command_line  # noqa: E402  # after sys.path is set
from generators.environment import environment  # noqa: E402  # after sys.path is set
from generators.fixtures import fixtures  # noqa: E402  # after sys.path is set
from generators.index import index  # noqa: E402  # after sys.path is set
from generators.markers import markers  # noqa: E402  # after sys.path is set
from generators.options import options  # noqa: E402  # after sys.path is set
from generators.report_schema import report_schema  # noqa: E402  # after sys.path is set
from generators.rules import rules  # noqa: E402  # after sys.path is set
from generators.simulated_device import simulated_device  # noqa: E402  # after sys.path is set

if TYPE_CHECKING:
    from collections.abc import Callable

PAGES: dict[str, Callable[[], str]] = {
    "index.md": index,
    "simulated-device.md": simulated_device,
    "report.schema.json": report_schema,
    "rules.md": rules,
    "reference/options.md": options,
    "reference/markers.md": markers,
    "reference/fixtures.md": fixtures,
    "reference/api.md": api,
    "reference/environment.md": environment,
    "reference/command-line.md": command_line,
    "cards.md": cards,
}


def main() -> int:
    """Write the pages, or with ``--check`` compare them."""
    stale = []
    for name, page in PAGES.items():
        path, text = HERE / name, page()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if "--check" not in sys.argv:
                path.parent.mkdir(exist_ok=True)
                path.write_text(text, encoding="utf-8")
    if "--check" not in sys.argv:
        print(f"written: {', '.join(stale) or 'nothing; all pages are up to date'}")
        return 0
    if stale:
        print(f"out of date: {', '.join(stale)}; run python docs/generate.py")
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
