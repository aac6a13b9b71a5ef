"""A run's record as one HTML page that needs no network."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.errors import ReportError
from pytest_gpumem.reports.document import to_text

if TYPE_CHECKING:
    from collections.abc import Mapping

_TEMPLATES: Final = Path(__file__).parent / "templates"


def check_available() -> None:
    """Make sure that the page's template can be filled in.

    Raises:
        ReportError: jinja2 is missing.
    """
    if find_spec("jinja2") is None:
        raise ReportError(
            "an HTML report needs jinja2; install it with "
            "pip install pytest-gpumem[report]"
        )


def page(report: Mapping[str, Any]) -> str:
    """Return the page.

    Raises:
        ReportError: jinja2 is missing.
    """
    check_available()
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # noqa: PLC0415  # an extra
    from markupsafe import Markup  # noqa: PLC0415  # likewise

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
    )
    # In a script element only "<" can end what is data.
    data = Markup(to_text(report).replace("<", "\\u003c"))  # noqa: S704  # escaped in this line
    return environment.get_template("report.html").render(report=report, data=data)
