"""Change the code a little, and see whether its tests notice: tox run -e mutation.

Needs cosmic-ray. For each module a sample of its mutants is run against the module's own
test files, in a copy of the project. Those that survive are printed as diffs, on the
standard error.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkItem, WorkResult

ROOT = Path(__file__).parents[1]
#: Modules, and the test files that hold them.
MODULES = {
    "sizes": "sizes",
    "cards": "cards",
    "files": "files",
    "inheritance": "fuzz_texts",
    "rules/rule": "rules",
    "rules/parser": "rules",
    "allocator/config": "alloc_config allocator",
    "sweeps/plan": "sweep_model",
    "sweeps/report": "sweep_model",
    "sweeps/sweep_record": "sweep_model",
    "records/staircase": "sweep_model",
    "records/memory_figures": "records",
    "records/codec": "records fuzz_files",
    "records/junit": "records",
    "records/record": "records",
    "allocator/oom_text": "oom_text allocator",
    "allocator/blocks": "allocator replay",
    "allocator/freelist": "freelist",
    "allocator/heap": "allocator replay",
    "allocator/pools": "allocator replay",
    "allocator/stats": "allocator replay",
    "allocator/release": "allocator replay",
    "allocator/caching": "allocator replay",
    "allocator/expandable": "allocator_expandable replay",
    "allocator/driver": "allocator_driver replay tenants",
    "allocator/replay": "replay",
    "tenancy/queue": "tenancy",
    "baselines/baseline": "baselines",
    "baselines/regressions": "baselines",
    "recording/shape": "fuzz_files",
    # Minutes for each mutant, as the judges wait for threads and for hangs.
    "guards": "stacks",
    "stacks": "stacks",
    "devices/budgets": "budgets",
    "instruments/equality": "equality",
    "instruments/portraits": "equality",
    "instruments/surroundings": "surroundings corpus",
    "instruments/trials": "trials loads surroundings verdict corpus",
    "sweeps/judge": "sweep corpus",
    "sweeps/run": "sweep",
    "sweeps/state": "sweep_model fuzz_state",
    "instruments/fallback": "loads fallback corpus",
    "instruments/loads": "loads verdict corpus",
}
CONFIG = """
[cosmic-ray]
module-path = "{module}"
timeout = 900.0
excluded-modules = []
test-command = "{python} -m pytest -x -q -p no:cacheprovider {tests}"
[cosmic-ray.distributor]
name = "local"
"""


#: In ``int | None``, which is never run.
UNSEEN = "core/ReplaceBinaryOperator_BitOr"


def place(item: WorkItem) -> tuple[object, ...]:
    """Return what orders mutants in each session alike."""
    one = item.mutations[0]
    return (one.start_pos, one.operator_name, one.occurrence)


def sample(session: Path, most: int, seed: int) -> None:
    """Leave so many of a session's mutants to be run."""
    draw = random.Random(seed)  # noqa: S311  # a repeatable sample
    with use_db(session, WorkDB.Mode.open) as work:
        items = sorted(work.pending_work_items, key=place)
        seen = [
            each.job_id
            for each in items
            if not each.mutations[0].operator_name.startswith(UNSEEN)
        ]
        chosen = set(draw.sample(seen, min(most, len(seen))))
        for each in items:
            if each.job_id not in chosen:
                skipped = WorkResult(worker_outcome=WorkerOutcome.SKIPPED)
                work.set_result(each.job_id, skipped)


def run(folder: Path, name: str, most: int, seed: int) -> tuple[int, list[str]]:
    """Return how many mutants of a module were run, and the diffs of the survivors."""
    wanted = {f"test_{each}.py" for each in MODULES[name].split()}
    files = [
        str(each) for each in (folder / "tests").rglob("*.py") if each.name in wanted
    ]
    config, session = folder / "mutation.toml", folder / "mutation.sqlite"
    session.unlink(missing_ok=True)
    config.write_text(
        CONFIG.format(
            module=f"pytest_gpumem/{name}.py",
            python=sys.executable,
            tests=" ".join(files),
        ),
        encoding="utf-8",
    )
    tool = [sys.executable, "-m", "cosmic_ray.cli"]
    # Tests that fail as they are would kill every mutant.
    subprocess.run([*tool, "baseline", config], cwd=folder, check=True)
    subprocess.run([*tool, "init", config, session], cwd=folder, check=True)
    sample(session, most, seed)
    subprocess.run([*tool, "exec", config, session], cwd=folder, check=True)
    with use_db(session, WorkDB.Mode.open) as work:
        results = [
            each
            for _job, each in work.results
            if each.worker_outcome is WorkerOutcome.NORMAL
        ]
    survived = [
        str(each.diff) for each in results if each.test_outcome is TestOutcome.SURVIVED
    ]
    return len(results), survived


def main() -> None:
    """Print a row for each module, and the survivors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", default=list(MODULES))
    parser.add_argument("--most", type=int, default=15, help="mutants of each module")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print("| module | mutants | killed |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        shutil.copytree(
            ROOT,
            folder,
            ignore=shutil.ignore_patterns(".git", ".tox", "build", ".*_cache"),
        )
        for name in options.modules:
            count, survived = run(folder, name, options.most, options.seed)
            print(f"| `{name}` | {count} | {count - len(survived)} |", flush=True)
            print("\n".join(survived), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
