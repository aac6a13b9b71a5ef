"""Reads torch's own declarations of its operators, from files that come with torch.

``native_functions.yaml`` is there for programs that generate code, ``autocast_mode.h``
for extensions. They are searched as text: that takes no YAML library and no compiler,
and is right for whatever version is installed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Declaration:
    """The declaration of one overload.

    Attributes:
        is_structured: Whether its code is generated around a ``structured`` kernel.
        checks_devices: Whether generated code compares its operands' devices.
    """

    is_structured: bool
    checks_devices: bool


@lru_cache(maxsize=1)
def _text() -> str:
    found = find_spec("torchgen")
    folders = (found and found.submodule_search_locations) or ["."]
    path = Path(folders[0], "packaged/ATen/native/native_functions.yaml")
    return path.read_text(encoding="utf-8") if path.exists() else ""


def declaration_of(func: Any) -> Declaration:
    """Return the declaration of an overload.

    An operator that a library registered is declared nowhere, and none of its code is
    generated.
    """
    if func.namespace != "aten":
        return Declaration(is_structured=False, checks_devices=False)
    overload = func._overloadname
    name = func.overloadpacket.__name__ + (
        "" if overload == "default" else f".{overload}"
    )
    _before, _func, rest = _text().partition(f"\n- func: {name}(")
    entry = rest.partition("\n- func: ")[0]
    if not entry:  # a build without the file
        return Declaration(False, torch.Tag.pointwise not in func.tags)
    return Declaration(
        is_structured="\n  structured" in entry,
        checks_devices="\n  device_check: NoCheck" not in entry,
    )


def autocast_names(policy: str) -> list[str]:
    """Return the operators that ``torch.autocast`` treats by a policy, with overloads.

    Args:
        policy: The end of a macro's name in ``autocast_mode.h``, as ``"FP32"``.

    Returns:
        Names as ``torch.library`` takes them; none in a build without the file.
    """
    path = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    _before, _macro, rest = text.partition(f"#define AT_FORALL_{policy}(_)")
    macro = re.match(r"(.*\\\n)*.*", rest)  # to the line that is not continued
    entries = re.findall(r"_\((\w+)(?:, (\w+))?\)", macro.group() if macro else "")
    return [f"{name}.{overload}" if overload else name for name, overload in entries]
