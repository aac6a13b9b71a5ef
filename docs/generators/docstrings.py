"""Google docstrings, read into their sections."""

from __future__ import annotations

import inspect
import re
import textwrap
from typing import Any, Final, NamedTuple

_SECTION: Final = re.compile(
    r"^(Args|Attributes|Raises|Returns|Yields|Example)::?\n((?:[ ]+.*\n|\n)*)",
    re.MULTILINE,
)


class Docstring(NamedTuple):
    """A docstring.

    Attributes:
        paragraphs: The paragraphs outside all sections.
        sections: The text of each section, dedented.
    """

    paragraphs: tuple[str, ...]
    sections: dict[str, str]

    def entries(self, name: str) -> list[tuple[str, str]]:
        """Return a section's names with their descriptions."""
        text = self.sections.get(name, "")
        found = re.split(r"^([\w.*]+): ", text, flags=re.MULTILINE)[1:]
        return list(zip(found[::2], found[1::2], strict=True))


def read(thing: Any) -> Docstring:
    """Return an object's docstring."""
    return parse(inspect.getdoc(thing) or "")


def parse(text: str) -> Docstring:
    """Read a cleaned docstring."""
    text += "\n"
    sections = {
        name: textwrap.dedent(body).strip("\n") for name, body in _SECTION.findall(text)
    }
    words = _SECTION.sub("", text).strip("\n")
    return Docstring(tuple(filter(None, re.split(r"\n{2,}", words))), sections)
