"""The reference of options."""

from __future__ import annotations

from typing import TYPE_CHECKING

from generators.markdown import block, page
from pytest_gpumem.plugin.settings import OPTIONS

if TYPE_CHECKING:
    from pytest_gpumem.plugin.options import Option


def options() -> str:
    """Return the page."""
    return page(
        [
            "# Options",
            "Each option is one of the command line and one of the ini file; the command "
            "line wins. A value that makes no sense ends the run with exit code 4 and "
            "one sentence, before any test.",
            "A run in which none of them is given, at either place, leaves torch and the "
            "tests alone: nothing is simulated, patched or recorded. A marker of this "
            "plugin (all but `gpu`, whose name many suites use) then ends the run, and a "
            "fixture that needs a device fails its test; both say that "
            "`gpu_backend = auto` is the line to add to the ini file.",
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
            *(part for each in OPTIONS for part in _entry(each)),
        ]
    )


def _entry(option: Option) -> list[str]:
    text = _help(option)
    return [
        f"## {option.flag}",
        f"`{_flag(option)}`, in the ini file `{option.ini}`; default: "
        f"{_default(option)}.",
        f"{text[0].upper()}{text[1:]}.",
    ]


def _flag(option: Option) -> str:
    if option.is_flag:
        return option.flag
    value = f"={option.metavar}"
    return option.flag + (f"[{value}]" if option.alone else value)


def _default(option: Option) -> str:
    if option.is_flag:
        return "off"
    return f"`{option.default_text}`" if option.default_text else "none"


def _help(option: Option) -> str:
    return option.help.replace("%%", "%")
