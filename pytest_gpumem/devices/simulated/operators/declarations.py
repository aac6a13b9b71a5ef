"""Reads torch's own declarations of its operators, from files that come with torch.

``native_functions.yaml`` is installed for code generators, ``autocast_mode.h`` for
extensions. Both files are searched as text. That needs no YAML library and no compiler,
and is correct for whichever version is installed.
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
        is_structured: Whether the overload's code is generated for a ``structured`` kernel.
        checks_devices: Whether generated code compares the operands' devices.
        names_card: Whether a card has a kernel of its own.
    """

    is_structured: bool
    checks_devices: bool
    names_card: bool = False


@lru_cache(maxsize=1)
def _text() -> str:
    found = find_spec("torchgen")
    folders = (found and found.submodule_search_locations) or ["."]
    path = Path(folders[0], "packaged/ATen/native/native_functions.yaml")
    return path.read_text(encoding="utf-8") if path.exists() else ""


def declaration_of(func: Any) -> Declaration:
    """Return the declaration of an overload.

    An operator that a library has registered has no declaration in torch's files and no
    generated code.
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
        names_card=re.search(r"\n    [\w, ]*\bCUDA\b[\w, ]*:", entry) is not None,
    )


def autocast_names(policy: str) -> list[str]:
    """Return the overloads to which ``torch.autocast`` applies a policy.

    Args:
        policy: The suffix of a macro's name in ``autocast_mode.h``, such as ``"FP32"``.

    Returns:
        Names in the format of ``torch.library``; none in a build without the file.
    """
    path = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    _before, _macro, rest = text.partition(f"#define AT_FORALL_{policy}(_)")
    # Up to the first line without a continuation.
    macro = re.match(r"(.*\\\n)*.*", rest)
    entries = re.findall(r"_\((\w+)(?:, (\w+))?\)", macro.group() if macro else "")
    return [f"{name}.{overload}" if overload else name for name, overload in entries]
