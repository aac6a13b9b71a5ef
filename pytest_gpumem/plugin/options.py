"""Declares options, and reads their values.

An option is one field of ``settings.Settings``, with ``option(...)`` as its default. From
this field follow the command line, the ini file, the help, the documentation and the
settings of child processes.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpumem.errors import GpuMemError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


@dataclass(frozen=True, repr=False, eq=False)
class Option:
    """An option: one of the command line and one of the ini file.

    Attributes:
        flag: The name on the command line; the name in the ini file is the same with
            underscores.
        help: The help text.
        metavar: The name of the value in help; empty for a flag without a value.
        default: The value if none is given.
        choices: The accepted texts, if there are only a few.
        parse: Returns the value of a text, or raises ``GpuMemError`` or ``ValueError``. It
            is a function, or its name as ``"module:function"``, which is imported only if
            the option is given.
        check: Like ``parse``, but the text itself stays the option's value.
        repeated: Whether it may be given several times; the value is a tuple.
        adds: Whether values of the command line are added to those of the ini file;
            otherwise they replace them.
        alone: The text that the flag means if no value follows; None requires a value.
        takes_base: Whether ``parse`` has an argument ``base``, the folder of relative
            paths.
        is_inherited: Whether child processes take over the text.
        ini_name: The name in the ini file, if it differs.
        removed: A warning, for an option that no longer has an effect.
        replaced: What to write instead, for an old spelling that still works.
        is_action: Whether it asks for something that one run does, so that it belongs on
            the command line; in the ini file it still works, with a warning.
    """

    flag: str
    help: str
    metavar: str = ""
    default: Any = None
    choices: tuple[str, ...] = ()
    parse: str | Callable[..., Any] = ""
    check: str = ""
    repeated: bool = False
    adds: bool = False
    alone: str | None = None
    takes_base: bool = False
    is_inherited: bool = False
    ini_name: str = ""
    removed: str = ""
    replaced: str = ""
    is_action: bool = False

    @property
    def ini(self) -> str:
        """The name in the ini file."""
        return self.ini_name or self.flag.removeprefix("--").replace("-", "_")

    @property
    def is_flag(self) -> bool:
        """Whether the command line's flag takes no value."""
        return not self.metavar

    @property
    def default_text(self) -> str:
        """The default as help shows it; empty if there is none."""
        if isinstance(self.default, (int, float)) and not isinstance(
            self.default, bool
        ):
            return f"{self.default:g}"
        return self.default if isinstance(self.default, str) else ""

    def value(self, text: Any, base: Path) -> Any:
        """Return the value of a text.

        Args:
            text: The text on the command line or in the ini file.
            base: The folder of relative paths.

        Raises:
            GpuMemError: The text makes no sense.
            ValueError: The text makes no sense.
        """
        if self.repeated:
            return tuple(self._one(each, base) for each in text)
        return self._one(text, base)

    def _one(self, text: str, base: Path) -> Any:
        if self.choices:
            chosen = text.strip().lower()
            if chosen not in self.choices:
                raise ValueError(
                    f"{text!r} is unknown; accepted are {', '.join(self.choices)}"
                )
            return chosen
        if self.check:
            load_object(self.check)(text)
            return text
        parse = load_object(self.parse) if isinstance(self.parse, str) else self.parse
        return parse(text, base=base) if self.takes_base else parse(text)


def load_object(name: str) -> Callable[..., Any]:
    """Return what ``"module:function"`` names."""
    module, _colon, function = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in function.split("."):
        found = getattr(found, part)
    loaded: Callable[..., Any] = found
    return loaded


def option(flag: str, metavar: str = "", **row: Any) -> Any:
    """Declare an option as a field of a dataclass; see ``Option``."""
    declared = Option(flag, metavar=metavar, **row)
    default: dict[str, Any] = {"default": declared.default}
    if isinstance(declared.default, dict):
        default = {"default_factory": dict}
    return field(metadata={"option": declared}, **default)


def options_of(settings: type) -> dict[str, Option]:
    """Return the options that a class declares, by the names of its fields."""
    return {each.name: each.metadata["option"] for each in fields(settings)}


def add_options(parser: pytest.Parser, options: Iterable[Option]) -> None:
    """Declare options on the command line and in the ini file.

    Their default for pytest is None, which means that an option was not given.
    """
    group = parser.getgroup("gpumem", "GPU memory: budgets, peaks and OOM injection")
    for each in options:
        words: dict[str, Any] = {"dest": each.ini, "default": None, "help": each.help}
        kind: Any = None
        if each.is_flag:
            words["action"] = "store_true"
            kind = None if each.choices else "bool"
        else:
            words["metavar"] = each.metavar
            if each.default_text:
                words["help"] += f" (default: {each.default_text})"
            if each.repeated:
                words["action"], kind = "append", "linelist"
            if each.alone is not None:
                words.update(nargs="?", const=each.alone)
        group.addoption(each.flag, **words)
        ini_help = each.help.replace("%%", "%")
        if kind is None:
            parser.addini(each.ini, ini_help, default=None)
        else:
            parser.addini(each.ini, ini_help, type=kind, default=None)


def bind_values(args: list[str], namespace: Any, options: Iterable[Option]) -> None:
    """Give a flag that was written without a value its own value, in place.

    argparse would take the next word for the value, which may be a test file.

    Args:
        args: The words of the command line, which pytest reads once more.
        namespace: The command line as it was read so far.
        options: The options.
    """
    flags = {each.flag: each for each in options if each.alone is not None}
    for index, word in enumerate(args):
        option = flags.get(word)
        following = args[index + 1] if index + 1 < len(args) else "--"
        if option is None or following.startswith("-"):
            continue
        try:
            option.value(following, Path())
        except (GpuMemError, ValueError):
            args[index] = f"{word}={option.alone}"
            setattr(namespace, option.ini, option.alone)
            files = getattr(namespace, "file_or_dir", None)
            if isinstance(files, list):
                files.append(following)


def is_given(options: Iterable[Option], config: pytest.Config, namespace: Any) -> bool:
    """Tell whether any of some options is given, on the command line or in the ini file.

    Args:
        options: The options.
        config: The config, for the ini file.
        namespace: The command line, as far as it is parsed.
    """
    return any(
        getattr(namespace, each.ini, None) is not None
        or config.getini(each.ini) is not None
        for each in options
    )


def read_option(option: Option, config: pytest.Config, namespace: Any) -> Any:
    """Return an option's value: from the command line, else the ini file, else the default.

    Args:
        option: The option.
        config: The config, for the ini file.
        namespace: The command line, as far as it is parsed.

    Raises:
        pytest.UsageError: A text makes no sense; the error names its place.
    """
    given = getattr(namespace, option.ini, None)

    def from_line() -> Any:
        if option.is_flag:
            return "true" if option.choices else bool(given)
        return option.value(given, Path(config.invocation_params.dir))

    def from_ini() -> Any:
        text = config.getini(option.ini)
        if text is None or text == "":
            return option.default
        if isinstance(text, bool) and not option.is_flag:  # a boolean of TOML
            text = str(text)
        return text if isinstance(text, bool) else option.value(text, config.rootpath)

    if given is None:
        return _named(option.ini, from_ini)
    value = _named(option.flag, from_line)
    return _named(option.ini, from_ini) + value if option.adds else value


def _named(source: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (GpuMemError, ValueError, TypeError, pytest.UsageError) as error:
        # pytest's own error for an ini value of the wrong type does not name the option.
        raise pytest.UsageError(f"{source}: {error}") from None
