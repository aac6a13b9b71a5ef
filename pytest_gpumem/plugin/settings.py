"""Declares the options of a run, each as one field, and reads them before any test."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from pytest_gpumem.devices.selection import BACKENDS
from pytest_gpumem.errors import GpuMemError
from pytest_gpumem.inheritance import REFUSAL_VARIABLE
from pytest_gpumem.plugin.options import (
    Option,
    is_given,
    option,
    options_of,
    read_option,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_gpumem.baselines.regressions import Tolerance
    from pytest_gpumem.cards import Card
    from pytest_gpumem.checking.check_report import CheckRequest
    from pytest_gpumem.hub import HubModel
    from pytest_gpumem.plugin.marks import Budget
    from pytest_gpumem.rules.rule import Rule
    from pytest_gpumem.sizes import SizeSpec

#: The default simulated card; ``cards.DEFAULT_CARD``, copied here so that a run without a
#: GPU test need not import the table of cards.
DEFAULT_CARD: Final = "T4"

#: Kinds of reports.
REPORTS: Final = ("json", "html", "md", "issue")


def parse_report(text: str) -> tuple[str, str]:
    """Read ``--gpu-report``."""
    kind, colon, path = text.partition(":")
    if kind not in REPORTS or not colon or not path:
        raise ValueError(
            f"{text!r} is not a report; accepted are "
            f"{', '.join(f'{each}:PATH' for each in REPORTS)}"
        )
    return kind, path


def parse_sweep(text: str) -> str | int | None:
    """Read ``--gpu-oom-sweep``; ``true`` and ``false`` are its older values.

    Returns:
        The points of every sweep, or ``"marked"`` for those of the markers.
    """
    chosen = text.strip().lower()
    if chosen in ("marked", "true", "yes", "on"):
        return "marked"
    return None if chosen in ("false", "no", "off") else parse_points(text)


def parse_points(text: str) -> str | int:
    """Read ``--gpu-oom-points``."""
    if text in ("all", "sites", "ends"):
        return text
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ValueError(
            f"{text!r} is neither all, sites, ends nor a number of allocations from 1 on"
        )
    return int(text)


def parse_folder(text: str) -> Path:
    """Read ``--gpu-snapshots``: a folder that exists or can be made."""
    import tempfile

    folder = Path(text).absolute()
    there = next(each for each in (folder, *folder.parents) if each.exists())
    if not there.is_dir():
        raise ValueError(f"{text!r}: {there} is not a folder; name another")
    try:
        with tempfile.TemporaryFile(dir=there):
            return folder
    except OSError as error:
        raise ValueError(
            f"{text!r}: nothing can be written in {there}: {error.strerror}; name "
            "another folder"
        ) from None


def parse_suggest(text: str) -> str:
    """Read ``--gpu-suggest``; a patch's name is still accepted: see ``PATCHES``."""
    if Path(text).suffix in PATCHES:
        return "print"
    if text not in ("print", "budgets"):
        raise ValueError(f"{text!r} is not accepted; accepted are print and budgets")
    return text


def parse_seconds(text: str) -> float:
    """Read ``--gpu-wait-timeout``."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"{text!r} is not a time; give seconds, such as 60 or 0.5")
    return seconds


def _baseline(text: str, *, base: Path) -> Path | None:
    return base / text if text else None


# Each generated method takes time in every run of pytest, and these two are not used.
@dataclass(frozen=True, repr=False, eq=False)
class Settings:
    """The options of a run, parsed.

    A new option needs one field here, and the code that uses it.
    """

    backend: str = option(
        "--gpu-backend",
        "KIND",
        default="auto",
        choices=BACKENDS,
        help="the device that 'cuda' means: auto (a usable CUDA card, else simulated), "
        "cuda, simulated, off",
    )
    card: str = option(
        "--gpu-card",
        "CARD",
        default=DEFAULT_CARD,
        check="pytest_gpumem.cards:find_card",
        is_inherited=True,
        help="the simulated card: a name such as T4 or A100-80GB, two of them with "
        "A100-80GB*2, or a made-up one with 16GiB,cc=8.0",
    )
    values: str = option(
        "--gpu-values",
        "KEPT",
        default="computed",
        choices=("computed", "none"),
        is_inherited=True,
        help="the contents of tensors on the simulated card: computed values, or none (only "
        "shapes and bytes, for models larger than the host's memory)",
    )
    compiled: str = option(
        "--gpu-compiled",
        "WAY",
        default="eager",
        choices=("eager", "refused"),
        is_inherited=True,
        help="how a simulated card runs code for torch.compile: eager (without compilation, "
        "with the values and bytes of eager code, and one warning) or refused",
    )
    #: By device index; the key None means every card. A child process takes over the
    #: budgets at the moment of its start.
    budgets: Mapping[int | None, SizeSpec] = option(
        "--gpu-budget",
        "SIZE",
        default={},
        parse="pytest_gpumem.sizes:parse_device_sizes",
        help="bytes of the card that a test may hold, inclusive: 4GiB, 4GB, 512MiB, 50%% "
        "of the card, plain bytes, or 0=4GiB,1=8GiB for each card",
    )
    host_budget: int | None = option(
        "--gpu-host-budget",
        "SIZE",
        parse="pytest_gpumem.sizes:parse_size",
        help="bytes that a test's call may add to those that the process holds in the "
        "host's memory, inclusive: device_map='auto' puts the rest of a model on the disk, "
        "and a test that takes more fails",
    )
    max_vram: SizeSpec | None = option(
        "--gpu-max-vram",
        "SIZE",
        parse="pytest_gpumem.sizes:parse_size_spec",
        help="limit on the allocated peak of every test's call, and of each process that "
        "the test starts, unless the test has its own max_vram marker: a size, or a "
        "percentage of the card",
    )
    leak_check: bool = option(
        "--gpu-leak-check",
        default=False,
        help="fail every test that leaves bytes on the cards, and name what holds them; "
        "@pytest.mark.max_vram_leak(size) allows some bytes",
    )
    baseline: Path | None = option(
        "--gpu-baseline",
        "FILE",
        parse=_baseline,
        takes_base=True,
        help="compare every test's peaks with those in this file, and fail tests that "
        "need more; a path in the ini file starts at the ini file",
    )
    updates_baseline: bool = option(
        "--gpu-update-baseline",
        default=False,
        is_action=True,
        help="write the peaks of the tests that pass into the file of --gpu-baseline, "
        "and remove tests that no longer exist",
    )
    compare_fail: tuple[Tolerance, ...] = option(
        "--gpu-compare-fail",
        "METRIC:TOLERANCE",
        default=(),
        parse="pytest_gpumem.baselines.regressions:Tolerance.parse",
        repeated=True,
        help="how much above the baseline is accepted: allocated:5%% or reserved:16MiB; "
        "may be repeated (default: allocated:1%%, and reserved is reported)",
    )
    strict: str = option(
        "--gpu-strict",
        default="auto",
        choices=("auto", "true", "false"),
        help="fail the run if a requested check could check nothing: the baseline has no "
        "figures of this card and torch, or lacks a test; a test of the baseline no longer "
        "uses the card; a replay has nothing to replay; in the ini file auto (true if the "
        "environment variable CI is set), true or false",
    )
    snapshots: Path | None = option(
        "--gpu-snapshots",
        "DIR",
        parse=parse_folder,
        help="write a snapshot for PyTorch's memory_viz into this folder for every test "
        "that fails with an OOM or a broken limit",
    )
    suggest: str = option(
        "--gpu-suggest",
        "WHAT",
        default="",
        alone="print",
        parse=parse_suggest,
        is_action=True,
        help="what to suggest at the end of the run: print (used if no value is given; "
        "the max_vram markers that tests lack, from the peaks of this run, and the cards "
        "that the suite fits on), or budgets (the smallest budget with which each test "
        "passes, found by running the test again under smaller budgets)",
    )
    find_budget: bool = option(
        "--gpu-find-budget",
        default=False,
        replaced="--gpu-suggest=budgets",
        help="old spelling of --gpu-suggest=budgets",
    )
    reports: tuple[tuple[str, str], ...] = option(
        "--gpu-report",
        "KIND:PATH",
        default=(),
        parse=parse_report,
        repeated=True,
        help="write a report of the run: json:PATH, html:PATH (one page that needs no "
        "network), md:PATH, or issue:PATH (what failed and how to run it again, to paste "
        "into an issue); may be repeated",
    )
    rules: tuple[Rule, ...] = option(
        "--gpu-inject-oom",
        "RULE",
        default=(),
        parse="pytest_gpumem.rules.parser:parse_rule",
        repeated=True,
        help="make allocations fail in every test's call: PHASE[:KEY=VALUE,...], for "
        "example load:nth=3 or any:min=64MiB,persistent; may be repeated",
    )
    oom_sweep: str | int | None = option(
        "--gpu-oom-sweep",
        "POINTS",
        alone="marked",
        parse=parse_sweep,
        help="sweep also tests that are marked with oom_sweep(on_demand=True); a value says "
        "which allocations all sweeps of this run make fail, whatever the markers say: "
        "all, sites (the first allocation of each site), ends (the first and the last of "
        "each), or a number of them",
    )
    oom_points: str | int | None = option(
        "--gpu-oom-points",
        "POINTS",
        parse=parse_points,
        replaced="--gpu-oom-sweep=POINTS",
        help="old spelling of the value of --gpu-oom-sweep; it sweeps no further tests",
    )
    resume: bool = option(
        "--gpu-oom-resume",
        default=False,
        is_action=True,
        help="continue sweeps that were interrupted",
    )
    replay: str | None = option(
        "--gpu-replay-oom",
        "RULE",
        is_action=True,
        check="pytest_gpumem.rules.parser:parse_rule",
        help="in swept tests run only the point that this rule names; a failing point "
        "prints the command with its rule",
    )
    no_children: bool = option(
        "--gpu-no-children",
        default=False,
        help="do not reach child processes; otherwise they have the run's device, budgets "
        "and rules, and their peaks are reported with the test that started them",
    )
    share: str = option(
        "--gpu-share",
        "KIND",
        default="equal",
        choices=("equal", "off", "own"),
        help="how the workers of pytest-xdist share each card: equal (a test that declares "
        "its bytes waits until they are free, any other test has an equal share), off (no "
        "test waits, so tests may take memory from each other), or own (each worker has its "
        "own simulated cards; real cards are shared as with off)",
    )
    wait_s: float = option(
        "--gpu-wait-timeout",
        "SECONDS",
        default=600.0,
        parse=parse_seconds,
        help="how long a test may wait until its bytes of a card are free; after that it "
        "ends in an error that names the processes that hold them",
    )
    check: CheckRequest | None = option(
        "--gpu-check",
        "MODULE:LOAD[,run=MODULE:INFER]",
        is_action=True,
        parse="pytest_gpumem.checking.check_report:CheckRequest.parse",
        help="run all checks of 'pytest-gpumem check' on a loader, a function without "
        "arguments that returns a model; the function that run= names computes an output "
        "from it; tests are also run if they are named",
    )
    checkpoint: str = option(
        "--gpu-checkpoint",
        "NAME_OR_DIR",
        default="bert-large",
        check="pytest_gpumem.checkpoints:check_checkpoint",
        help="the checkpoint of the fixture bert_large: a folder with one, or the "
        "name of one to build",
    )
    hub_models: tuple[HubModel, ...] = option(
        "--gpu-hub-model",
        "NAME[=SOURCE]",
        default=(),
        parse="pytest_gpumem.hub:parse_hub_model",
        repeated=True,
        adds=True,
        takes_base=True,
        ini_name="gpu_hub_models",
        help="serve a model under its name on the hub, without network: "
        "bert-large-uncased, or my-org/mine=SOURCE, where SOURCE is a known name, a "
        "config.json, a checkpoint's folder, or hub for the hub's own model; may be "
        "repeated; models of the ini file are served, too",
    )

    @property
    def is_strict(self) -> bool:
        """Whether a check that checks nothing fails the run; by default only in CI."""
        if self.strict == "auto":
            return os.environ.get("CI", "").strip().lower() not in ("", "0", "false")
        return self.strict == "true"

    @property
    def reaches_children(self) -> bool:
        """Whether child processes take over the settings."""
        return not (self.no_children or os.environ.get(REFUSAL_VARIABLE))

    @property
    def inherited(self) -> dict[str, str]:
        """The options that child processes take over, by field."""
        return {
            name: getattr(self, name)
            for name, each in options_of(Settings).items()
            if each.is_inherited
        }

    @property
    def sweeps_on_demand(self) -> bool:
        """Whether tests that are only swept on demand are swept."""
        return self.oom_sweep is not None or self.replay is not None

    @property
    def points(self) -> str | int | None:
        """The points of every sweep of the run; None means those of the markers."""
        return self.oom_points if self.oom_sweep in (None, "marked") else self.oom_sweep

    @property
    def suggests_limits(self) -> bool:
        """Whether limits are suggested at the end of the run."""
        return self.suggest == "print"

    @property
    def finds_budgets(self) -> bool:
        """Whether the smallest budgets are sought."""
        return self.find_budget or self.suggest == "budgets"

    @property
    def all_cards(self) -> tuple[Card, ...]:
        """All cards of the simulated machine, also those that a process does not see."""
        from pytest_gpumem.cards import find_card

        return find_card(self.card)

    @property
    def cards(self) -> tuple[Card, ...]:
        """The simulated cards that this process sees."""
        from pytest_gpumem.cards import visible_cards

        return visible_cards(self.all_cards)

    def budget_bytes(
        self, index: int, total_bytes: int, own: Sequence[Budget] = ()
    ) -> int | None:
        """Return the budget of a card in bytes; None if there is none.

        Args:
            index: The card's index.
            total_bytes: The card's total.
            own: A test's own budgets, the nearest first; they override the run's.

        Raises:
            SizeError: A percentage of the card is less than one byte.
        """
        run_wide = self.budgets.get(index, self.budgets.get(None))
        sizes = (each.size for each in own if each.device_index == index)
        spec = next(sizes, run_wide)
        return None if spec is None else spec.resolve(total_bytes)


OPTIONS: Final[tuple[Option, ...]] = tuple(options_of(Settings).values())

#: Options of earlier versions; they are accepted without effect, with one warning.
REMOVED: Final = (
    Option(
        "--gpu-max-contention-retries",
        metavar="N",
        help="no longer in use",
        removed="tests are no longer retried after an OOM that other workers helped "
        "to cause; such a failure names the requires_vram marker to add",
    ),
)
#: File names that ``--gpu-suggest=FILE`` wrote patches to in earlier versions.
PATCHES: Final = (".patch", ".diff")
_NO_PATCH: Final = (
    "patches are no longer written; copy the suggested markers from the end of the "
    "output, or compare the whole suite with a baseline by --gpu-baseline"
)


def is_asked(config: pytest.Config, namespace: Any) -> bool:
    """Tell whether a run asks for a device, by any option or ini setting of the plugin."""
    return is_given((*OPTIONS, *REMOVED), config, namespace)


def warn_of_removed(config: pytest.Config) -> None:
    """Warn once about each given option that has changed, with advice."""
    if hasattr(config, "workerinput"):
        return
    for each in REMOVED:
        if is_given((each,), config, config.option):
            _warn(config, f"{each.flag}: {each.removed}")
    for each in OPTIONS:
        if each.replaced and is_given((each,), config, config.option):
            _warn(config, f"{each.flag} is now {each.replaced}; it still works")
        elif each.is_action and config.getini(each.ini) is not None:
            text = f"{each.ini} in the ini file: put {each.flag} on the command line"
            _warn(config, f"{text}, as it is for one run; it still works")
    text = getattr(config.option, "gpu_suggest", None) or config.getini("gpu_suggest")
    if text and Path(text).suffix in PATCHES:
        _warn(config, f"--gpu-suggest={text}: {_NO_PATCH}")


def _warn(config: pytest.Config, text: str) -> None:
    config.issue_config_time_warning(pytest.PytestDeprecationWarning(text), 2)


def read_settings(config: pytest.Config, namespace: Any) -> Settings:
    """Read the options of a run.

    Args:
        config: The config, for the ini file.
        namespace: The command line, as far as it is parsed.

    Raises:
        pytest.UsageError: A value cannot be read, or makes no sense.
    """
    settings = Settings(
        **{
            name: read_option(each, config, namespace)
            for name, each in options_of(Settings).items()
        }
    )
    _check_baseline(settings, namespace)
    return settings


def _check_baseline(settings: Settings, namespace: Any) -> None:
    """Reject options about a baseline if no baseline is named.

    Raises:
        pytest.UsageError: There are such options.
    """
    if settings.baseline is not None:
        return
    if settings.updates_baseline:
        raise pytest.UsageError(
            "--gpu-update-baseline: which file? name it with --gpu-baseline=FILE"
        )
    if getattr(namespace, "gpu_compare_fail", None):
        raise pytest.UsageError(
            "--gpu-compare-fail: there is nothing to compare with; name it with "
            "--gpu-baseline=FILE, or put gpu_compare_fail into the ini file, for "
            "those runs that compare"
        )


def check_budgets(settings: Settings, totals: Mapping[int, int]) -> None:
    """Reject budgets that are larger than their cards.

    Args:
        settings: The options.
        totals: Total bytes by device index.

    Raises:
        pytest.UsageError: A budget is larger than its card, or its card does not exist.
    """
    for index, spec in settings.budgets.items():
        if index is not None and index not in totals:
            raise pytest.UsageError(
                f"--gpu-budget: there is no card {index}; this run has "
                f"{len(totals)} card(s), numbered from 0"
            )
        for card in totals if index is None else (index,):
            try:
                budget = spec.resolve(totals[card])
            except GpuMemError as error:
                raise pytest.UsageError(f"--gpu-budget: {error}") from None
            if budget > totals[card]:
                raise pytest.UsageError(
                    f"--gpu-budget: {spec.text!r} is {budget} bytes, more than card "
                    f"{card} has ({totals[card]} bytes); give less, or name a larger "
                    "card with --gpu-card"
                )
