"""Reads the stack of a running program without changing it.

No reference to the objects that were read is kept, no dictionary of the program is
changed, and no code of the program is called.

Note [Variables of a running function]
Before Python 3.13, reading ``f_locals`` of a frame changes the program. A frame has only
one such dictionary, which ``locals()`` also returns to the program. Reading ``f_locals``
updates it and leaves it in the frame, where it keeps objects alive that the function
releases later. Therefore this module reads the slots in which the interpreter keeps a
function's variables. Python 3.10 to 3.12 get no more changes to their frames, so the slots
are at fixed offsets. Each time it is checked that the memory belongs to the right frame.
Source: CPython, ``Include/internal/pycore_frame.h`` (3.11, 3.12),
``Include/cpython/frameobject.h`` (3.10).
"""

from __future__ import annotations

import builtins
import ctypes
import functools
import inspect
import opcode
import os
import re
import site
import sys
import sysconfig
import traceback
from pathlib import Path
from types import CellType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import CodeType, FrameType

#: The names of directories of installed packages, also on Debian and in conda.
_PACKAGES: Final = re.compile(r"(?:site|dist)-packages[\\/]")
_ARCHIVE: Final = re.compile(r"\.(?:zip|egg|whl|pyz)[\\/]")
#: The file names that Python gives to the user's code that is not in a file.
_TYPED: Final = ("<doctest ", "<ipython-input", "<stdin>")
_YIELDS: Final = {
    opcode.opmap[name]
    for name in ("YIELD_VALUE", "YIELD_FROM", "SEND", "RETURN_GENERATOR")
    if name in opcode.opmap
}
_WAITS: Final = (
    bytes([opcode.opmap["YIELD_FROM"]]) if "YIELD_FROM" in opcode.opmap else None
)
_SUSPENDS: Final = (
    inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
)
#: The class of groups of exceptions; Python has it since 3.11.
_GROUP: Final = getattr(builtins, "BaseExceptionGroup", ())


def _count_local() -> int:
    local = object()
    return sys.getrefcount(local)


#: The reference count of an object that only a local variable holds: the variable counts as
#: one, and up to Python 3.13 so does each function argument that the object is passed as,
#: also that of ``getrefcount``. From 3.14 on arguments borrow the variable's reference.
#: Source: ``LOAD_FAST_BORROW``.
LOCAL_USES: Final = _count_local()
#: The reference count of a dictionary that a frame and a local variable hold.
_HELD_BY_FRAME: Final = 1 + LOCAL_USES


def frames_from(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield a frame and its callers, from the inside out."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def calling_frame() -> FrameType:
    """Return the frame that called the caller of this function.

    The caller's own frame would be a reference to itself, which is a cycle.
    """
    return sys._getframe(2)  # noqa: SLF001  # the documented way to walk a stack


# -- code ---------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def is_users_own(filename: str) -> bool:
    """Tell whether code is the user's: not installed, and not part of the interpreter."""
    if filename.startswith("<"):
        return filename.startswith(_TYPED)
    if _PACKAGES.search(filename) or _ARCHIVE.search(filename):
        return False
    return not os.path.normcase(filename).startswith(_installed())


@functools.lru_cache(maxsize=1)
def _installed() -> tuple[str, ...]:
    """Return the directories of installed packages, each with its separator."""
    paths = sysconfig.get_paths()
    found = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    found += [*site.getsitepackages(), site.getusersitepackages()]
    return tuple({os.path.normcase(each).rstrip(os.sep) + os.sep for each in found})


def short_path(filename: str) -> str:
    """Return a file's path, relative to its package's parent or the working directory."""
    tail = _PACKAGES.split(filename)[-1]
    if tail != filename:
        return tail
    try:
        return filename.removeprefix(f"{Path.cwd()}{os.sep}")
    except OSError:
        return filename  # the directory was removed


# -- variables ----------------------------------------------------------------------------


def variables_of(frame: FrameType, *names: str) -> dict[str, Any]:
    """Return a frame's variables: all of them, or only those with given names.

    See Note [Variables of a running function].

    Limits: before Python 3.13 this works only on an ordinary 64-bit CPython; elsewhere
    the variables of functions are not known.
    """
    is_function = frame.f_code.co_flags & inspect.CO_OPTIMIZED
    if is_function and sys.version_info < (3, 13):
        return _in_slots(frame, names)
    found = dict(frame.f_locals)
    return {name: found[name] for name in names if name in found} if names else found


class _Layout(NamedTuple):
    """The offsets of the parts of a frame, in bytes."""

    is_apart: bool
    code: int
    dictionary: int
    slots: int


_LAYOUTS: Final = {
    (3, 10): _Layout(is_apart=False, code=32, dictionary=56, slots=352),
    (3, 11): _Layout(is_apart=True, code=32, dictionary=24, slots=72),
    (3, 12): _Layout(is_apart=True, code=0, dictionary=40, slots=72),
}
#: The offset, in bytes, of the frame object's pointer to the interpreter's frame.
_APART: Final = 24
_WORD: Final = 8
_is_ordinary = (
    sys.implementation.name == "cpython"
    and ctypes.sizeof(ctypes.c_void_p) == _WORD
    and not hasattr(sys, "gettotalrefcount")
)
_layout: Final = _LAYOUTS.get(sys.version_info[:2]) if _is_ordinary else None


def _start(frame: FrameType) -> int | None:
    """Return the address of the interpreter's frame; None if it is not known."""
    if _layout is None:
        return None
    start = id(frame)
    if _layout.is_apart:
        start = _word(start + _APART)
    return start if _word(start + _layout.code) == id(frame.f_code) else None


def _word(address: int) -> int:
    return ctypes.c_size_t.from_address(address).value


def _object(address: int) -> Any:
    """Return the object that a word points to; None if it points nowhere."""
    return ctypes.py_object.from_address(address).value if _word(address) else None


@functools.lru_cache(maxsize=512)
def _slots(code: CodeType) -> dict[str, tuple[int, bool]]:
    """Return each variable's index in its function, and whether it is a cell."""
    cells = code.co_cellvars
    if sys.version_info >= (3, 11):  # an argument that is also a cell has one slot only
        cells = tuple(name for name in cells if name not in code.co_varnames)
    in_cells = {*code.co_cellvars, *code.co_freevars}
    every = (*code.co_varnames, *cells, *code.co_freevars)
    return {name: (place, name in in_cells) for place, name in enumerate(every)}


def _in_slots(frame: FrameType, names: tuple[str, ...]) -> dict[str, Any]:
    start = _start(frame)
    if start is None or _layout is None:
        return {}
    slots = _slots(frame.f_code)
    found = {}
    for name in names or slots:
        if name not in slots:
            continue
        place, is_cell = slots[name]
        address = start + _layout.slots + place * _WORD
        value = _object(address)
        if value is None and not _word(address):
            continue  # the variable is not bound at this moment
        if is_cell and type(value) is CellType:
            try:
                value = value.cell_contents
            except ValueError:
                continue
        found[name] = value
    return found


def clear_frame(frame: FrameType) -> None:
    """Clear the variables of a frame, unless it is running or suspended.

    Before Python 3.13 reading ``f_locals`` leaves a dictionary in the frame, and pytest
    reads it for tracebacks. This dictionary is emptied too, unless the program refers to
    it.
    """
    code = frame.f_code
    if _is_suspended(frame):
        return  # clearing the frame would close the generator
    try:
        frame.clear()
    except RuntimeError:
        return  # the frame is running
    start = _start(frame) if code.co_flags & inspect.CO_OPTIMIZED else None
    if start is None or _layout is None:
        return
    left = _object(start + _layout.dictionary)
    if type(left) is dict and sys.getrefcount(left) <= _HELD_BY_FRAME:
        left.clear()


def _is_suspended(frame: FrameType) -> bool:
    """Return whether a frame belongs to a suspended generator or coroutine.

    Before Python 3.11 the next instruction of a frame that waits for another generator
    is ``YIELD_FROM``.
    """
    code = frame.f_code
    if not code.co_flags & _SUSPENDS:
        return False
    last = max(frame.f_lasti, 0)
    return code.co_code[last] in _YIELDS or code.co_code[last + 2 :][:1] == _WAITS


def errors_behind(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, the errors it is chained to and members of groups, each once."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        current = waiting.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        waiting += [current.__context__, current.__cause__]
        if issubclass(type(current), _GROUP):
            waiting += current.exceptions  # type: ignore[attr-defined]  # only a group has this attribute


def clear_exception(error: BaseException) -> None:
    """Clear the local variables of all frames of an exception and of chained exceptions.

    Tensors that only these frames hold are freed. Frames that are running keep their
    variables; the exception's text and line numbers stay.
    """
    for each in errors_behind(error):
        for frame, _line in traceback.walk_tb(each.__traceback__):
            clear_frame(frame)
