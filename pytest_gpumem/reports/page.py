"""A run's record as one HTML page that needs no network."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pytest_gpumem.errors import ReportError
from pytest_gpumem.reports.descriptions import environment_line, outcome_words
from pytest_gpumem.reports.document import to_chunks

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


def page(report: Report, before: Report | None = None) -> Iterator[str]:
    """Return the page, piece by piece.

    Args:
        report: The run.
        before: Another run, whose tests are shown beside those of the same name.

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

    def data_of(source: Report) -> Iterator[str]:
        # In a script element only "<" can end the data.
        for chunk in to_chunks(source):
            yield Markup(chunk.replace("<", "\\u003c"))  # noqa: S704  # escaped in this line

    return environment.get_template("report.html").generate(
        report=report,
        outcomes=outcome_words(report.outcomes),
        machines=[environment_line(each) for each in report.environments],
        data=data_of(report),
        before=None if before is None else data_of(before),
    )
