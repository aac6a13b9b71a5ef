"""What a test's outcome on simulated cards says, seen beside that on the host."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from reasons import Reason
    from runs import Outcome

#: What an error says that has a reason outside of the tested code: the kind, the words
#: that are looked for, the reason.
OUTSIDE: Final = (
    (
        "refused",
        re.compile(r"UnsupportedOnSimulatedDeviceError|simulated card"),
        "refused by name",
    ),
    (
        "hub",
        re.compile(
            r"huggingface\.co|OfflineModeIsEnabled|LocalEntryNotFound|Repo for model|"
            r"is not a valid model identifier|HF_HUB_OFFLINE|on the Hub|"
            r"Cannot find the requested files|couldn't find them in the cached files|"
            r"outgoing traffic has been disabled|Couldn't reach|couldn't connect|"
            r"Can't load .* for '",
            re.IGNORECASE,
        ),
        "needs files of the hub",
    ),
    (
        "kernels",
        re.compile(
            r"flash_attn|FlashAttention|flash attention|bitsandbytes|triton|deepspeed|"
            r"transformer_engine|msamp|cutlass|xformers",
            re.IGNORECASE,
        ),
        "needs kernels compiled for a card",
    ),
)

#: What can be said of a test, from best to worst.
KINDS: Final = (
    "passed",
    "refused",
    "hub",
    "kernels",
    "host",
    "explained",
    "unexplained",
)


@dataclass
class Verdict:
    """What a suite did in one setting.

    Attributes:
        tests: How many ran or were skipped.
        of: How many the host has; a run that was ended early has fewer.
        left: How many of those that the host skips have not run.
        skipped: Skipped on cards, too.
        unskipped: Those that the host skips and cards do not, by kind.
        others: Those that run on the host, too, by kind.
        on_card: Tests that asked a card for bytes in their own process.
        failures: Of each test that did not pass, its kind and the reason.
    """

    tests: int = 0
    of: int = 0
    left: int = 0
    skipped: int = 0
    unskipped: dict[str, int] = field(default_factory=dict)
    others: dict[str, int] = field(default_factory=dict)
    on_card: int = 0
    failures: dict[str, tuple[str, str]] = field(default_factory=dict)


def words_of(outcome: Outcome) -> str:
    """Return classes and texts of the errors behind an outcome."""
    return "\n".join(f"{kind}: {text}" for kind, text in outcome.chain)


def kind_of(
    name: str,
    host: Outcome | None,
    found: Outcome,
    reasons: tuple[Reason, ...],
) -> tuple[str, str]:
    """Return the kind of an outcome on cards, and the reason where there is one.

    Args:
        name: The test.
        host: Its outcome on the host.
        found: Its outcome on cards.
        reasons: What is known of tests that fail.
    """
    if found.outcome in {"passed", "xfailed"}:
        return "passed", ""
    words = words_of(found)
    for each in reasons:
        if re.search(each.tests, name) and re.search(each.words, words):
            return each.kind, each.text
    if host is not None and host.outcome in {"failed", "died"}:
        return "host", "fails on the host, too"
    refusal = re.search(r"[^\n:]+ is not supported on the simulated CUDA device", words)
    if refusal:
        return "refused", refusal[0].strip()
    for kind, expression, text in OUTSIDE:
        if expression.search(words):
            return kind, text
    return "unexplained", words[:400] or "its process ended"


def judge(
    host: Mapping[str, Outcome],
    found: Mapping[str, Outcome],
    reasons: tuple[Reason, ...],
) -> Verdict:
    """Count a suite's outcomes on cards beside those on the host."""
    needing = {name for name, each in host.items() if each.outcome == "skipped"}
    verdict = Verdict(of=len(host), left=len(needing - found.keys()))
    for name, outcome in found.items():
        verdict.tests += 1
        verdict.on_card += outcome.allocations > 0
        if outcome.outcome == "skipped":
            verdict.skipped += 1
            continue
        before = host.get(name)
        kind, reason = kind_of(name, before, outcome, reasons)
        was_skipped = before is not None and before.outcome == "skipped"
        group = verdict.unskipped if was_skipped else verdict.others
        group[kind] = group.get(kind, 0) + 1
        if kind != "passed":
            verdict.failures[name] = (kind, reason)
    return verdict
