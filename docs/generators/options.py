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
            "Each option can be given on the command line and in the ini file; the command "
            "line wins. Options for a single run, such as updating a baseline, belong on the "
            "command line only. A value that makes no sense ends the run with exit code 4 and "
            "one sentence, before any test.",
            "If none of them is given, the plugin changes nothing: nothing is simulated, "
            "patched or recorded. In such a run a marker of this plugin ends the run (except "
            "`gpu`, whose name many suites use), and a fixture that needs a device fails its "
            "test. Both messages give the line to add to the ini file: `gpu_backend = auto`.",
            "In `pyproject.toml` an option that may be repeated is a list:",
            block(
                "[tool.pytest.ini_options]\n"
                'gpu_card = "A100-80GB"\n'
                'gpu_budget = "4GiB"\n'
                "gpu_leak_check = true\n"
                'gpu_compare_fail = ["allocated:5%", "reserved:16MiB"]',
                "toml",
            ),
            "Sizes are `4GiB` (binary), `4GB` (decimal) or plain bytes; some options also "
            "accept `50%` of the card. There are pages for [rules](../rules.md) and for "
            "[environment variables](environment.md).",
            *(part for each in OPTIONS if not each.replaced for part in _entry(each)),
            "## Old spellings",
            "They still work, with one warning: "
            + ", ".join(
                f"`{each.flag}` is `{each.replaced}`"
                for each in OPTIONS
                if each.replaced
            )
            + ".",
        ]
    )


def _entry(option: Option) -> list[str]:
    text = _help(option)
    return [
        f"## {option.flag}",
        f"`{_flag(option)}`, {_place(option)}; default: {_default(option)}.",
        f"{text[0].upper()}{text[1:]}.",
    ]


def _flag(option: Option) -> str:
    if option.is_flag:
        return option.flag
    value = f"={option.metavar}"
    return option.flag + (f"[{value}]" if option.alone else value)


def _place(option: Option) -> str:
    if option.is_action:
        return "on the command line only"
    return f"in the ini file `{option.ini}`"


def _default(option: Option) -> str:
    if option.is_flag:
        return "off"
    return f"`{option.default_text}`" if option.default_text else "none"


def _help(option: Option) -> str:
    return option.help.replace("%%", "%")
