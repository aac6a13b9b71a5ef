"""Adapts the README for package indexes.

An index shows the README alone, so a link to another file of the project leads nowhere
there. Such links become links to the address ``Source`` of ``[project.urls]``. Without
this address the README is not changed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

#: The text between brackets, after ``!`` for a picture, and the path of a file.
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)\s]+)\)")


def for_index(text: str, source: str) -> str:
    """Return a README whose links are full addresses.

    Args:
        text: Markdown with links relative to the project's folder.
        source: The address of the project on GitHub; its default branch is linked to.
    """

    def whole(link: re.Match[str]) -> str:
        mark, words, path = link.groups()
        kind = "raw" if mark else "blob"
        return f"{mark}[{words}]({source.rstrip('/')}/{kind}/HEAD/{path})"

    return _LINK.sub(whole, text)


class CustomMetadataHook(MetadataHookInterface):
    """Writes the field ``readme`` of the metadata."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the README to the metadata, with the links of an index."""
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        source = metadata.get("urls", {}).get("Source")
        if source is not None:
            text = for_index(text, source)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
