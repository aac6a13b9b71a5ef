"""NVML's functions in C for simulated cards, for programs that call them with ctypes.

nvitop does not call ``pynvml``'s functions but NVML's own, which it fetches through
``pynvml``. Such a function returns a code, and writes its results to addresses that it
gets as arguments. Handles are the same as those of ``pynvml``'s functions.

Source: ``nvml.h``.
"""

from __future__ import annotations

import ctypes
import os
import re
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

#: Source: ``nvmlReturn_t``.
_SUCCESS: Final = 0
_NOT_SUPPORTED: Final = 3
_NOT_FOUND: Final = 6
_INSUFFICIENT_SIZE: Final = 7
_ERRORS: Final = {_NOT_SUPPORTED: b"Not Supported", _NOT_FOUND: b"Not Found"}

#: The end of a function's name that gives its version.
_VERSION: Final = re.compile(r"_v\d+$")


class NvmlLibrary:
    """The functions of ``libnvidia-ml.so.1``.

    Args:
        functions: The functions in Python, by NVML's names.
        error_type: The class of the errors that the functions raise, with ``value``.
    """

    def __init__(
        self,
        functions: dict[str, Callable[..., Any]],
        error_type: type[Exception],
    ) -> None:
        self._functions = functions
        self._error_type = error_type

    def function(self, name: str) -> Callable[..., Any]:
        """Return a function of the library; all its versions are the same function."""
        bare = _VERSION.sub("", name)

        def called(*args: Any) -> Any:
            if bare == "nvmlErrorString":
                return _ERRORS.get(_number(args[0]), b"Unknown Error")
            if bare == "nvmlSystemGetProcessName":
                return _write_process_name(*args)
            return self._call(bare, [each for each in args if each is not None])

        return called

    def _call(self, name: str, args: list[Any]) -> int:
        function = self._functions.get(name)
        if function is None:
            return _NOT_SUPPORTED
        targets = [_target(each) for each in args if _is_target(each)]
        inputs = [getattr(each, "value", each) for each in args if not _is_target(each)]
        room = None
        if targets and hasattr(targets[0], "raw"):
            room = inputs.pop()  # the size of the text's buffer
        try:
            result = function(*inputs)
        except self._error_type as error:
            code: int = getattr(error, "value", _NOT_SUPPORTED)
            return code
        if name.endswith("RunningProcesses"):
            return _write_processes(result, *targets)
        if room is not None:
            return _write_text(result, targets[0], room)
        _write(result, targets)
        return _SUCCESS


def _is_target(value: Any) -> bool:
    return hasattr(value, "_obj") or isinstance(value, ctypes.Array)


def _target(value: Any) -> Any:
    """Return the object behind ``ctypes.byref``, or the array itself."""
    return getattr(value, "_obj", value)


def _number(value: Any) -> int:
    return int(getattr(value, "value", value))


def _write(result: Any, targets: list[Any]) -> None:
    """Write a result to its targets; without a result there is no target."""
    if isinstance(result, int):
        targets[0].value = result
    elif isinstance(result, list) or type(result) is tuple:
        numbers = list(result)
        if isinstance(targets[0], ctypes.Array):
            targets[0][: len(numbers)] = numbers
        else:
            for target, number in zip(targets, numbers, strict=True):
                target.value = number
    elif result is not None:
        _write_structure(result, targets[0])


def _write_text(text: str, buffer: Any, room: int) -> int:
    data = text.encode()
    if len(data) >= room:
        return _INSUFFICIENT_SIZE
    buffer.value = data
    return _SUCCESS


def _write_structure(result: Any, target: Any) -> None:
    """Write the fields of a structure that the result contains."""
    values = asdict(result) if is_dataclass(result) else result._asdict()  # type: ignore[arg-type]  # not a class, but an object
    for name, *_kind in target._fields_:
        if name in values:
            value = values[name]
            setattr(target, name, value.encode() if isinstance(value, str) else value)


def _write_processes(found: list[Any], count: Any, array: Any = None) -> int:
    """Write the processes and their number; only the number if the array is too small."""
    room, count.value = count.value, len(found)
    if len(found) > room:
        return _INSUFFICIENT_SIZE
    for position, each in enumerate(found):
        _write_structure(each, array[position])
    return _SUCCESS


def _write_process_name(pid: Any, buffer: Any, room: Any) -> int:
    """Write the path of a process's program, shortened to the buffer's size."""
    try:
        name = Path(f"/proc/{_number(pid)}/exe").readlink()
    except OSError:
        return _NOT_FOUND
    buffer.value = os.fsencode(name)[: _number(room) - 1]
    return _SUCCESS
