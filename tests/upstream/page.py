"""The page of the docs about other projects' tests."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from runs import CARD, LIMIT_S, ONE, TWO
from suites import SUITES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from verdicts import Verdict

#: What a kind of outcome is called over its column, and in words.
COLUMNS: Final = {
    "passed": "passed",
    "refused": "refused by name",
    "hub": "hub",
    "kernels": "compiled kernels",
    "host": "fails on the host",
    "explained": "explained",
    "unexplained": "not explained",
}
#: Kinds that say nothing of the simulated card.
OUTSIDE: Final = ("hub", "kernels", "host")

HEAD: Final = f"""# Other projects' tests on simulated cards

The GPU tests of other projects run here unchanged: without the plugin, and with it on one simulated
card (`{CARD}`). Tests that are skipped on one card run on two cards. A test that is skipped without
a card and runs with one must pass, or be refused by name.

```console
$ tox run -e upstream
```

This command fetches the released sources from the package index and runs their tests. `tox run -e
upstream -- --write` also writes this page. It takes hours on one core, and needs no card. Each test has
{LIMIT_S:.0f} s; a test that takes longer, or that ends its process, counts as failed. No hub is
reachable: a test that needs files of a hub either fails on the host, too, or counts as `hub`. Groups of
NCCL are [simulated](nccl.md), too. Tests that the host skips run first, so they are complete even if a
run is ended early, for example by `--minutes`; the next run continues. Lightning's standalone tests
start their process's command again for each rank, so each of them runs in its own process, as in
Lightning's own runs. Imports take most of the time: every rank of Lightning imports for 6 s of
processor time.
"""

#: A row some of whose tests are in another row, too: its tests are not counted.
AGAIN: Final = {("Lightning, CUDA tests", ONE)}
#: Of the tests that need two cards: how many there were, and how many passed, before
#: groups of NCCL were simulated. They were counted by the same command at that time;
#: 14 of accelerate's tests ended in "needs NCCL".
BEFORE: Final = {"accelerate": (21, 7)}


#: What ran once, by hand: those suites are not run by this command.
BY_HAND: Final = Path(__file__).with_name("by_hand.md").read_text(encoding="utf-8")


def _row(name: str, setting: str, group: Mapping[str, int]) -> str:
    numbers = [str(group.get(each, 0) or "-") for each in COLUMNS]
    return f"| {name} | {setting} | {sum(group.values())} | {' | '.join(numbers)} |"


def _table(
    verdicts: Mapping[str, Mapping[str, Verdict]], group: str, title: str
) -> list[str]:
    head = f"| suite | cards | {title} | {' | '.join(COLUMNS.values())} |"
    rule = "|---" * (3 + len(COLUMNS)) + "|"
    rows = [
        _row(name, setting, getattr(verdict, group))
        for name, settings in verdicts.items()
        for setting, verdict in settings.items()
        if getattr(verdict, group)
    ]
    return [head, rule, *rows]


def _before_and_after(verdicts: Mapping[str, Mapping[str, Verdict]]) -> list[str]:
    """Return the table of the tests that need two cards."""
    lines = [
        "| suite | skipped on one card | of these ran | skipped on two, too | un-skipped | "
        "passed before | pass |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, settings in verdicts.items():
        if TWO not in settings:
            continue
        found = settings[TWO]
        unskipped = sum(found.unskipped.values())
        before = "{1} of {0}".format(*BEFORE[name]) if name in BEFORE else "not run"
        lines.append(
            f"| {name} | {found.of} | {found.tests} | {found.skipped} | {unskipped} | "
            f"{before} | {found.unskipped.get('passed', 0)} |"
        )
    return lines


def share(verdicts: Mapping[str, Mapping[str, Verdict]]) -> tuple[int, int]:
    """Return how many un-skipped tests pass, of those that could."""
    passed = could = 0
    for name, settings in verdicts.items():
        for setting, verdict in settings.items():
            if (name, setting) in AGAIN:
                continue
            passed += verdict.unskipped.get("passed", 0)
            could += sum(
                number
                for kind, number in verdict.unskipped.items()
                if kind not in OUTSIDE
            )
    return passed, could


def _short(test: str) -> str:
    """Return a test's name without its folders and its parameters."""
    file, _, name = test.partition("::")
    return re.sub(r"\[.*", "", f"{file.rpartition('/')[2]}::{name}")


def _failures(verdicts: Mapping[str, Mapping[str, Verdict]]) -> list[str]:
    """Return every test that does not pass on cards, under its suite and reason."""
    lines = []
    for name, settings in verdicts.items():
        by_reason: dict[tuple[str, str], dict[str, set[str]]] = {}
        for setting, verdict in settings.items():
            for test, (kind, reason) in verdict.failures.items():
                if kind == "host":
                    continue
                tests = by_reason.setdefault((kind, reason), {})
                tests.setdefault(_short(test), set()).add(setting)
        if not by_reason:
            continue
        lines += [f"### {name}", ""]
        for (kind, reason), tests in sorted(by_reason.items()):
            named = ", ".join(f"`{each}`" for each in sorted(tests))
            lines.append(f"- **{COLUMNS[kind]}**: {reason.splitlines()[0]}: {named}")
        lines.append("")
    return lines


def _number(verdict: Verdict) -> str:
    if verdict.tests >= verdict.of:
        return f"{verdict.tests} tests"
    if not verdict.left:
        return (
            f"all tests that the host skips, and {sum(verdict.others.values())} of the "
            f"others, of {verdict.of}"
        )
    return (
        f"{verdict.tests} of {verdict.of} tests, then the run was ended; {verdict.left} "
        "of those that did not run are skipped with fewer cards"
    )


def text_of(verdicts: Mapping[str, Mapping[str, Verdict]]) -> str:
    """Return the page.

    Args:
        verdicts: By suite and setting.
    """
    passed, could = share(verdicts)
    sources = [
        f"- {each.name} {each.version}: "
        + (
            "the release's source"
            if each.is_released
            else "the release's source has no tests; those of a checkout"
        )
        + (
            f", one in {each.every} of the files with a thousand tests and more"
            if each.every > 1
            else ""
        )
        + (f", with `-W '{each.ignores}'`" if each.ignores else "")
        + "".join(
            f"; {setting}: {_number(verdict)}"
            for setting, verdict in verdicts[each.name].items()
        )
        for each in SUITES
        if verdicts.get(each.name)
    ]
    lines = [
        HEAD,
        *sources,
        "",
        "## Tests that need a card",
        "",
        "These tests are skipped on the host and run with a card. Of those that need neither",
        f"the hub nor compiled kernels, **{passed} of {could} pass "
        f"({100 * passed / max(could, 1):.1f} %)**. On one card the row “Lightning, CUDA tests” is not",
        "counted, because some of its tests are in the row “Lightning”, too.",
        "",
        *_table(verdicts, "unskipped", "un-skipped"),
        "",
        "## Tests that need two cards, before and after",
        "",
        "These tests are skipped on one card, too. “Before” is before groups of NCCL were",
        "simulated. What is skipped on two cards as well needs another library, or four cards.",
        "",
        *_before_and_after(verdicts),
        "",
        "## Tests that also run on the host",
        "",
        "Most of these tests use a card if there is one.",
        "",
        *_table(verdicts, "others", "tests"),
        "",
        "## Tests that do not pass, and why",
        "",
        "Tests that fail in the same way on the host are counted above, but not named here.",
        "",
        *_failures(verdicts),
    ]
    return "\n".join(lines).rstrip() + "\n\n" + BY_HAND
