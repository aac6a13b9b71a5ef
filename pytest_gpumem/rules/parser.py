"""The language of injection rules: ``phase[:key=value,…]``.

``load:nth=3``, ``forward:min=64MiB,persistent``, ``any:p=0.01,seed=7``,
``load:site=*embeddings*,flavour=driver``.
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pytest_gpumem.errors import RuleError
from pytest_gpumem.rules.rule import FLAVOURS, PHASES, Rule
from pytest_gpumem.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Collection


class Key(NamedTuple):
    """A key of the language.

    Attributes:
        field: The field of ``Rule`` that it sets.
        read: Returns the value of a text, or raises ``ValueError`` with the reason.
        help: What it does, for the docs.
        example: A rule that uses it.
    """

    field: str
    read: Callable[[str], Any]
    help: str
    example: str


def _whole_from(lowest: int) -> Callable[[str], int]:
    def read(value: str) -> int:
        if not value.isascii() or not value.isdigit() or int(value) < lowest:
            raise ValueError(f"{value!r} is not a whole number from {lowest} on")
        return int(value)

    return read


def _probability(value: str) -> float:
    try:
        probability = float(value)
    except ValueError:
        probability = -1.0
    if not 0 < probability <= 1:
        raise ValueError(f"{value!r} is not a probability above 0 and up to 1")
    return probability


def _pattern(value: str) -> str:
    if not value:
        raise ValueError("'' matches nothing; write a name with wildcards, such as *")
    return value


def _flavour(value: str) -> str:
    if value not in FLAVOURS:
        raise ValueError(
            f"{value!r} is not a flavour{_meant(value, FLAVOURS)}; accepted are "
            f"{', '.join(FLAVOURS)}"
        )
    return value


#: The keys, in the order in which a rule is written.
KEYS: Final[dict[str, Key]] = {
    "nth": Key("nth", _whole_from(1), "the first that fails", "load:nth=3"),
    "after": Key(
        "after_bytes",
        parse_size,
        "the first that fails is the one that brings the sum of all counted requests "
        "above this size",
        "any:after=1GiB",
    ),
    "every": Key(
        "every", _whole_from(1), "with N, every Nth fails", "forward:every=10"
    ),
    "p": Key(
        "probability",
        _probability,
        "each fails with this probability",
        "any:p=0.01,seed=7",
    ),
    "seed": Key(
        "seed",
        _whole_from(0),
        "seed of the probability's own random numbers (default 0)",
        "any:p=0.5,seed=1",
    ),
    "min": Key(
        "min_bytes",
        parse_size,
        "only requests of at least this many bytes count",
        "any:min=64MiB",
    ),
    "max": Key(
        "max_bytes",
        parse_size,
        "only requests of at most this many bytes count",
        "any:max=1KiB",
    ),
    "device": Key(
        "device_index",
        _whole_from(0),
        "only this card's requests count",
        "any:device=1",
    ),
    "site": Key(
        "site",
        _pattern,
        "only requests with a matching name count; the names of a request are "
        "file.py:function of each frame, the path of the module that is being called or "
        "moved, and the parameter that is being loaded",
        "load:site=*embeddings*",
    ),
    "thread": Key(
        "thread",
        _pattern,
        "only requests of threads with matching names count; main means the main thread, "
        "other means every other thread",
        "load:thread=other",
    ),
    "times": Key(
        "times",
        _whole_from(1),
        "how many fail (default 1; with every and p: no end)",
        "forward:every=10,times=3",
    ),
    "persistent": Key(
        "times", _pattern, "that one and all later ones fail", "any:persistent"
    ),
    "flavour": Key(
        "flavour",
        _flavour,
        "which real-world error is raised (default native)",
        "forward:nth=2,flavour=cublas",
    ),
}
#: Longer spellings.
ALIASES: Final = {"probability": "p"}
#: Keys that each say on their own which request is the first to fail.
_CHOICES: Final = ("nth", "after", "every", "p")


def parse_rule(text: str) -> Rule:
    """Read a rule.

    Args:
        text: ``phase[:key[=value],…]``. Phases: any, load, forward, backward,
            optimizer. ``KEYS`` lists the keys.

    Raises:
        RuleError: The text is not a rule; the message points at the character.

    Example::

        parse_rule("forward:every=10,times=3,flavour=cublas")
    """
    phase, colon, rest = text.partition(":")
    if phase.strip() not in PHASES:
        reason = f"{phase.strip()!r} is not a phase{_meant(phase.strip(), PHASES)}"
        raise _error(text, 0, reason, PHASES)
    rule = Rule(phase=phase.strip())
    if colon and not rest.strip():
        raise _error(text, len(text), "nothing follows the colon", tuple(KEYS))
    position = len(phase) + 1
    positions: dict[str, int] = {}
    for part in rest.split(",") if rest else []:
        at = position + len(part) - len(part.lstrip())
        written = part.partition("=")[0].strip()
        key = ALIASES.get(written, written)
        if key in positions:
            raise _error(text, at, f"{written!r} is given twice", ())
        positions[key] = at
        rule = _with_key(rule, key, part, text, position)
        position += len(part) + 1
    _check(rule, text, positions)
    if rule.is_repeated and "times" not in positions:
        rule = replace(rule, times=None)
    return rule


def _with_key(rule: Rule, key: str, part: str, text: str, position: int) -> Rule:
    written, equals, value = (piece.strip() for piece in part.partition("="))
    at = position + len(part) - len(part.lstrip())
    if key not in KEYS:
        reason = f"no key {written!r}{_meant(written, KEYS)}"
        raise _error(text, at, reason, tuple(KEYS))
    if key == "persistent":
        if equals:
            raise _error(text, at, "'persistent' takes no value", ())
        return replace(rule, times=None)
    value_at = position + (part.index("=") + 1 if equals else len(part))
    if not equals:
        example = KEYS[key].example
        raise _error(text, value_at, f"{key!r} needs a value, as in {example}", ())
    try:
        read = KEYS[key].read(value)
    except ValueError as error:
        raise _error(text, value_at, f"{key}: {error}", ()) from None
    return replace(rule, **{KEYS[key].field: read})


def _check(rule: Rule, text: str, positions: dict[str, int]) -> None:
    """Reject keys that contradict each other; point at the later one.

    Raises:
        RuleError: Some do.
    """
    exclusive = [
        _CHOICES,
        ("times", "persistent"),
        ("every", "persistent"),
        ("p", "persistent"),
    ]
    for keys in exclusive:
        given = sorted(
            (key for key in keys if key in positions), key=positions.__getitem__
        )
        if len(given) > 1:
            reason = f"{given[0]!r} and {given[1]!r} exclude each other"
            raise _error(text, positions[given[1]], reason, ())
    if "seed" in positions and "p" not in positions:
        raise _error(text, positions["seed"], "'seed' without 'p' has no meaning", ())
    if rule.max_bytes is not None and rule.max_bytes < rule.min_bytes:
        raise _error(text, positions["max"], "'max' is below 'min'", ())


def _meant(word: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def _error(
    text: str, position: int, reason: str, accepted: tuple[str, ...]
) -> RuleError:
    hint = f"; accepted are {', '.join(accepted)}" if accepted else ""
    return RuleError(
        f"injection rule {text!r}: {reason}{hint}\n"
        f"  {text}\n  {' ' * position}^\n"
        "  a rule reads PHASE[:KEY=VALUE,...], for example load:nth=3 or "
        "any:min=64MiB,persistent",
        value=text,
        position=position,
    )


__all__ = ["ALIASES", "KEYS", "Key", "parse_rule"]
