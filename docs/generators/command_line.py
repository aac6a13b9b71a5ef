"""The reference of the command ``pytest-gpumem`` and of exit codes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from generators.markdown import DASH, block, page, table
from pytest_gpumem import cli

if TYPE_CHECKING:
    from collections.abc import Iterator


def command_line() -> str:
    """Return the page."""
    parts = [
        "# The command line",
        "This page is about the command `pytest-gpumem` (or `python -m pytest_gpumem.cli`). "
        "The options of `pytest` are on [another page](options.md).",
    ]
    commands = list(_commands())
    parts.append(
        table(
            ("command", "to"),
            ((f"[`{name}`](#{name})", help_) for name, help_, _parser in commands),
        )
    )
    for name, help_, parser in commands:
        parts += [
            f"## {name}",
            f"{help_[0].upper()}{help_[1:]}. {parser.description or ''}",
            block(" ".join(["pytest-gpumem", name, *_usage(parser)]), "text"),
            table(("argument", "default", "meaning"), _arguments(parser)),
        ]
    parts += [
        "## Exit codes",
        "Of `pytest-gpumem`:",
        table(
            ("code", "means"),
            [
                ("0", "done"),
                (
                    "1",
                    "failed, with one sentence; `compare`: a peak grew by more than "
                    "`--fail` allows; `doctor`: tests cannot run on this machine",
                ),
                ("2", "the arguments make no sense"),
                ("130", "interrupted"),
            ],
        ),
        "Of `pytest`, whose own codes these are:",
        table(
            ("code", "means"),
            [
                ("0", "all tests passed, and kept to their limits"),
                (
                    "1",
                    "a test failed: an OOM, a broken limit, a leak, a sweep, or more "
                    "than the baseline",
                ),
                ("2", "interrupted"),
                (
                    "4",
                    "an option, an ini setting or a marker makes no sense; no test ran",
                ),
                ("5", "no tests were found"),
            ],
        ),
    ]
    return page(parts)


def _commands() -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    (group,) = (
        action
        for action in cli._parser()._actions  # noqa: SLF001  # argparse lists them nowhere else
        if isinstance(action, argparse._SubParsersAction)  # noqa: SLF001  # argparse lists them nowhere else
    )
    helps = {each.dest: each.help or "" for each in group._choices_actions}  # noqa: SLF001  # argparse lists them nowhere else
    for name, parser in group.choices.items():
        yield name, helps[name], parser


def _arguments_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    actions = [each for each in parser._actions if each.dest != "help"]  # noqa: SLF001  # argparse lists them nowhere else
    return sorted(actions, key=lambda each: bool(each.option_strings))


def _usage(parser: argparse.ArgumentParser) -> Iterator[str]:
    for each in _arguments_of(parser):
        text = _name(each)
        yield text if each.required else f"[{text}]"


def _name(action: argparse.Action) -> str:
    value = "" if action.nargs == 0 else _value(action)
    if not action.option_strings:
        return f"{value}..." if action.nargs == "+" else value
    return f"{action.option_strings[-1]} {value}".strip()


def _value(action: argparse.Action) -> str:
    if isinstance(action.metavar, str):
        return action.metavar
    if action.choices:
        return "{" + ",".join(map(str, action.choices)) + "}"
    return action.dest.upper()


def _arguments(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str, str]]:
    for each in _arguments_of(parser):
        default = each.default
        shown = (
            f"`{default}`" if default not in (None, False, [], "==SUPPRESS==") else DASH
        )
        meaning = (each.help or "").replace("%%", "%").partition("(default")[0].strip()
        yield f"`{_name(each)}`", shown, meaning or DASH
