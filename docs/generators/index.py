"""The site's first page: the README's beginning, then the list of all pages.

The list is written by hand, in the page itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

DOCS: Final = Path(__file__).parents[1]
#: Where the README's beginning ends, and where the page's own part begins.
_END: Final = "## Try it with a real model\n"
_OWN: Final = "## All pages\n"


def index() -> str:
    """Return the page."""
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    present = (DOCS / "index.md").read_text(encoding="utf-8")
    shared = readme.partition(_END)[0].replace("](docs/", "](")
    return f"{shared}{_OWN}{present.partition(_OWN)[2]}"
