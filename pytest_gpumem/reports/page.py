"""A run's record as one HTML page that needs no network."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pytest_gpumem.errors import ReportError
from pytest_gpumem.reports.document import to_chunks
from pytest_gpumem.reports.words import environment_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.reports.document import Report

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


def page(report: Report) -> Iterator[str]:
    """Return the page, piece by piece.

    Raises:
        ReportError: jinja2 is missing.
    """
    check_available()
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
    )
    # In a script element only "<" can end the data.
    data = (
        Markup(chunk.replace("<", "\\u003c"))  # noqa: S704  # escaped in this line
        for chunk in to_chunks(report)
    )
    return environment.get_template("report.html").generate(
        report=report,
        machines=[environment_line(each) for each in report.environments],
        data=data,
    )
