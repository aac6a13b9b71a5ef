"""The reference of options."""

from __future__ import annotations

from generators.markdown import DASH, block, page, table
from pytest_gpumem.plugin.options import OPTIONS, Option


def options() -> str:
    """Return the page."""
    return page(
        [
            "# Options",
            "Each option is one of the command line and one of the ini file; the command "
            "line wins. A value that makes no sense ends the run with exit code 4 and "
            "one sentence, before any test.",
            table(
                ("option", "in the ini file", "default", "meaning"),
                (
                    (f"`{_flag(each)}`", f"`{each.ini}`", _default(each), _help(each))
                    for each in OPTIONS
                ),
            ),
            "In `pyproject.toml`, where what may be repeated is a list:",
            block(
                "[tool.pytest.ini_options]\n"
                'gpu_card = "A100-80GB"\n'
                'gpu_budget = "4GiB"\n'
                "gpu_leak_check = true\n"
                'gpu_compare_fail = ["allocated:5%", "reserved:16MiB"]',
                "toml",
            ),
            "Sizes are `4GiB` (binary), `4GB` (decimal), plain bytes, or `50%` of the "
            "card where that is said. Rules have [a page of their own](../rules.md), "
            "and what the environment says has [another](environment.md).",
        ]
    )


def _flag(option: Option) -> str:
    if option.is_flag:
        return option.flag
    value = f"={option.metavar}"
    return option.flag + (f"[{value}]" if option.alone else value)


def _default(option: Option) -> str:
    if option.is_flag:
        return "off"
    return f"`{option.default}`" if option.default else DASH


def _help(option: Option) -> str:
    return option.help.replace("%%", "%")
