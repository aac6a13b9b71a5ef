"""A user's function, named as ``package.module:function``."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from contextlib import contextmanager
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pytest_gpumem.errors import CheckError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: The most functions of a module that an error lists.
_SHOWN: Final = 8


class NamedFunction(NamedTuple):
    """The name of a function.

    Attributes:
        module: The module, as an import statement names it.
        path: The function's name in the module, with dots if it is inside a class.
    """

    module: str
    path: str

    @property
    def expression(self) -> str:
        """The function's name in code that has imported the module."""
        return f"{self.module}.{self.path}"

    def __str__(self) -> str:
        return f"{self.module}:{self.path}"

    @classmethod
    def parse(cls, text: str) -> NamedFunction:
        """Read ``package.module:function``.

        Raises:
            CheckError: The text has another form.
        """
        module, _colon, path = text.partition(":")
        names = [*module.split("."), *path.split(".")]
        if not all(name.isidentifier() for name in names):
            raise CheckError(
                f"{text!r} names no function; write MODULE:FUNCTION as an import names "
                "them, such as package.module:load",
                value=text,
            )
        return cls(module, path)

    def resolve(self, *arguments: str) -> Callable[..., Any]:
        """Import the module and return the function.

        Args:
            arguments: A description of each argument that the function will get.

        Raises:
            CheckError: There is no such function, or it does not take these arguments.
        """
        module = self._import()
        try:
            found = attrgetter(self.path)(module)
        except AttributeError:
            own = [
                name
                for name, each in vars(module).items()
                if inspect.isfunction(each) and each.__module__ == module.__name__
            ]
            there = f"its functions are {', '.join(own[:_SHOWN])}" if own else ""
            raise CheckError(
                f"{self.module} has no {self.path!r}; "
                f"{there or 'it defines no function'}",
                value=str(self),
            ) from None
        if not callable(found):
            raise CheckError(
                f"{self} is of type {type(found).__name__}, which cannot be called; name "
                "a function",
                value=str(self),
            )
        if inspect.iscoroutinefunction(found) or inspect.isgeneratorfunction(found):
            raise CheckError(
                f"{self} does nothing when it is called, as it is a generator or async; "
                "name a function that calls it and returns the result",
                value=str(self),
            )
        self._check_arguments(found, arguments)
        function: Callable[..., Any] = found
        return function

    def _import(self) -> Any:
        try:
            return importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            parts = self.module.split(".")
            heads = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
            if error.name not in heads:
                raise self._import_failed(error) from error
            raise CheckError(
                f"there is no module {error.name!r}, neither in {os.getcwd()} nor "  # noqa: PTH109  # sys.path has text
                "installed; change to the folder that the import starts in",
                value=str(self),
            ) from None
        except (Exception, SystemExit) as error:
            raise self._import_failed(error) from error

    def _import_failed(self, error: BaseException) -> CheckError:
        return CheckError(
            f"{self.module} cannot be imported: {type(error).__name__}: {error}",
            value=str(self),
        )

    def _check_arguments(
        self, found: Callable[..., Any], arguments: tuple[str, ...]
    ) -> None:
        try:
            signature = inspect.signature(found)
        except ValueError:  # a function in C has no signature
            return
        try:
            signature.bind(*arguments)
        except TypeError:
            given = " and ".join(arguments) or "no arguments"
            raise CheckError(
                f"{self} takes {signature}, and is called with {given}; name a function "
                "of yours that calls it with the rest",
                value=str(self),
            ) from None


@contextmanager
def working_folder_importable() -> Iterator[None]:
    """Let modules of the working folder be imported, as ``python -m`` does."""
    folder = os.getcwd()  # noqa: PTH109  # sys.path has text
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
