"""The metaclass of classes that replace torch's classes while cards are simulated."""

from __future__ import annotations

from typing import Any


class ReplacementType(type):
    """The metaclass of a class that replaces one of torch, its ``original``.

    The class equals the original, has its attributes, and ``isinstance`` accepts the
    original's instances. So annotations and tables that already contain the original
    stay valid.

    Limits: ``type(instance)`` is the original, so that ``type(instance) is torch.NAME`` is
    False; ``==`` and ``isinstance`` work.
    """

    original: Any

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, cls.original)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return subclass is cls or issubclass(subclass, cls.original)

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.original

    def __hash__(cls) -> int:
        return hash(cls.original)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.original, name)
