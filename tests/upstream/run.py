"""Run other projects' tests on simulated cards, and write the page that says how it went.

Run: ``tox run -e upstream [-- --write] [-- SUITE ...]``, or
``python tests/upstream/run.py``. The sources come from the package index. Projects whose
released source has no tests need a checkout: ``--checkout diffusers=FOLDER``. Two
cards run what one card skips.
``--write`` writes ``docs/upstream.md`` and ``docs/upstream.json``; suites and
settings that did not run keep the figures of the run before. With ``--minutes`` a run
ends early; the next one with the same ``--out`` goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Final

import page
import runs
from platformdirs import user_cache_path
from reasons import REASONS
from sources import unpacked
from suites import SUITES
from verdicts import Verdict, judge

DOCS: Final = Path(__file__).parents[2] / "docs"
FIGURES: Final = DOCS / "upstream.json"


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="*", help="their names; default: all")
    parser.add_argument(
        "--out", type=Path, help="outcomes that are there already stand"
    )
    parser.add_argument(
        "--checkout", action="append", default=[], metavar="SUITE=FOLDER"
    )
    parser.add_argument(
        "--setting",
        action="append",
        choices=[each.name for each in runs.SETTINGS],
        help="run this one only; the others keep the figures of the run before",
    )
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="no test begins later"
    )
    parser.add_argument(
        "--judge", action="store_true", help="run nothing: judge the outcomes in --out"
    )
    parser.add_argument("--write", action="store_true")
    return parser.parse_args()


def main() -> int:
    """Run the suites; return 1 if a failure has no reason, or a reason no failure."""
    asked = _asked()
    until_s = time.time() + 60 * asked.minutes
    cache = user_cache_path("pytest-gpumem") / "upstream"
    out = asked.out or cache / "outcomes"
    checkouts = dict(each.split("=", 1) for each in asked.checkout)
    figures = json.loads(FIGURES.read_text("utf-8")) if FIGURES.exists() else {}
    used = set()
    wanted = [each for each in SUITES if not asked.suites or each.name in asked.suites]
    for suite in wanted:
        if suite.name in checkouts:
            home = Path(checkouts[suite.name]).resolve()
        elif suite.is_released:
            home = unpacked(suite, cache)
        else:
            print(f"{suite.name}: its release has no tests; give --checkout")
            continue
        mine = tuple(each for each in REASONS if each.suite == suite.name)
        settings = [
            each
            for each in runs.SETTINGS
            if not asked.setting or each.name in asked.setting
        ]
        outcomes = {}
        for setting in settings:
            if not asked.judge:
                runs.run(suite, setting, home, out, until_s)
            outcomes[setting.name] = runs.outcomes(suite, setting, out)
            if not outcomes[setting.name]:
                del outcomes[setting.name]
                continue
            print(suite.name, setting.name, runs.counts(outcomes[setting.name]))
        outcomes.pop(runs.HOST, None)
        host = runs.outcomes(suite, runs.SETTINGS[0], out)
        one = runs.outcomes(suite, runs.SETTINGS[1], out)
        skipped = {
            name: each for name, each in one.items() if each.outcome == "skipped"
        }
        verdicts = {
            name: judge(skipped if name == runs.TWO else host, each, mine)
            for name, each in outcomes.items()
        }
        for verdict in verdicts.values():
            used |= {reason for _, reason in verdict.failures.values()}
        known = figures.get(suite.name, {"settings": {}})["settings"]
        figures[suite.name] = {
            "version": suite.version,
            "host": runs.counts(host),
            "settings": known | {name: asdict(each) for name, each in verdicts.items()},
        }
    text = page.text_of(
        {
            name: {kind: Verdict(**each) for kind, each in suite["settings"].items()}
            for name, suite in figures.items()
        }
    )
    print(text)
    if asked.write:
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        (DOCS / "upstream.md").write_text(text, encoding="utf-8")
    unknown = [
        f"{name} [{setting}] {test}: {reason}"
        for name, suite in figures.items()
        for setting, verdict in suite["settings"].items()
        for test, (kind, reason) in verdict["failures"].items()
        if kind == "unexplained"
    ]
    names = {each.name for each in wanted}
    stale = [
        f"no test fails for this reason any more: {each.suite}: {each.text}"
        for each in REASONS
        if each.suite in names and each.text not in used and not each.varies
    ]
    print("\n".join([*unknown, *stale]), file=sys.stderr)
    return bool(unknown or stale)


if __name__ == "__main__":
    sys.exit(main())
