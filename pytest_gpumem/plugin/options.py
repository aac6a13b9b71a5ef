"""The plugin's options: one table for the command line and the ini file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pytest_gpumem.plugin.option_values import (
    find_card,
    parse_backend,
    parse_checkpoint,
    parse_count,
    parse_folder,
    parse_points,
    parse_report,
    parse_rule,
    parse_rule_text,
    parse_seconds,
    parse_share,
    parse_size_spec,
    parse_sizes,
    parse_strict,
    parse_suggest,
    parse_tolerance,
    parse_values,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest


class Option(NamedTuple):
    """A row of the table.

    Attributes:
        flag: The command line's name; the ini name is the same with underscores.
        metavar: What follows the flag in help.
        default: What holds where neither is given, as text.
        parse: Text in, value out; raises ``GpuMemError`` or ``ValueError``.
        help: What the option does.
        repeated: Whether it may be given several times.
        is_flag: Whether it stands alone, without a value; the ini file's is a truth
            value, or, where there is a default, text.
        alone: What it means where it stands without a value; None if it may not.
        ini_name: The name in the ini file, where it is another.
    """

    flag: str
    metavar: str
    default: str
    parse: Callable[[str], Any]
    help: str
    repeated: bool = False
    is_flag: bool = False
    alone: str | None = None
    ini_name: str = ""

    @property
    def ini(self) -> str:
        """The name in the ini file."""
        return self.ini_name or self.flag.removeprefix("--").replace("-", "_")


#: The simulated card of a run that names none; ``cards.DEFAULT_CARD``, said here so
#: that a run without a GPU test need not read the table of cards.
DEFAULT_CARD: Final = "T4"


OPTIONS: Final = (
    Option(
        "--gpu-backend",
        "KIND",
        "auto",
        parse_backend,
        "the device that 'cuda' means: auto (a usable CUDA card, else simulated), "
        "cuda, simulated, off",
    ),
    Option(
        "--gpu-card",
        "CARD",
        DEFAULT_CARD,
        find_card,
        "the simulated card: a name such as T4 or A100-80GB, two of them with "
        "A100-80GB*2, or a made-up one with 16GiB,cc=8.0",
    ),
    Option(
        "--gpu-values",
        "KEPT",
        "computed",
        parse_values,
        "what the simulated card keeps of tensors: computed values, or none, only "
        "shapes and bytes, for models larger than the host",
    ),
    Option(
        "--gpu-budget",
        "SIZE",
        "",
        parse_sizes,
        "bytes of the card that a test may hold, inclusive: 4GiB, 4GB, 512MiB, 50%% "
        "of the card, plain bytes, or 0=4GiB,1=8GiB for each card",
    ),
    Option(
        "--gpu-max-vram",
        "SIZE",
        "",
        parse_size_spec,
        "limit on the peak of allocated bytes of every test's call, and of each process "
        "that it starts, unless the test carries a max_vram of its own for them: a size, "
        "or a percentage of the card",
    ),
    Option(
        "--gpu-leak-check",
        "",
        "",
        bool,
        "fail every test that leaves bytes on the cards, and say who holds them; "
        "@pytest.mark.max_vram_leak(size) allows some",
        is_flag=True,
    ),
    Option(
        "--gpu-baseline",
        "FILE",
        "",
        str,
        "compare every test's peaks with those in this file, and fail tests that need "
        "more; a path in the ini file starts at the ini file",
    ),
    Option(
        "--gpu-update-baseline",
        "",
        "",
        bool,
        "write the peaks of the tests that pass into the file of --gpu-baseline, and "
        "drop tests that are no more",
        is_flag=True,
    ),
    Option(
        "--gpu-compare-fail",
        "METRIC:TOLERANCE",
        "",
        parse_tolerance,
        "how much more than the baseline passes: allocated:5%% or reserved:16MiB; may "
        "be repeated (default: allocated:1%%, and reserved is reported)",
        repeated=True,
    ),
    Option(
        "--gpu-strict",
        "",
        "auto",
        parse_strict,
        "fail the run where a check that was asked for holds nothing: a baseline "
        "without figures of this card and torch, a test that it lacks or that no "
        "longer uses the card, a replay with nothing to replay; in the ini file auto "
        "(where the environment variable CI is set), true or false",
        is_flag=True,
    ),
    Option(
        "--gpu-snapshots",
        "DIR",
        "",
        parse_folder,
        "write a snapshot for PyTorch's memory_viz into this folder for every test "
        "that fails with an OOM or a broken limit",
    ),
    Option(
        "--gpu-suggest",
        "FILE",
        "",
        parse_suggest,
        "suggest the max_vram markers that tests lack, from the peaks of this run, and "
        "the cards that the suite fits on; with =FILE.patch write a patch that adds the "
        "markers",
        alone="print",
    ),
    Option(
        "--gpu-find-budget",
        "",
        "",
        bool,
        "run each test that uses a card again under smaller and smaller budgets, and "
        "say from which one on it passes",
        is_flag=True,
    ),
    Option(
        "--gpu-report",
        "KIND:PATH",
        "",
        parse_report,
        "write a report of the run: json:PATH, html:PATH (one page that needs no "
        "network) or md:PATH; may be repeated",
        repeated=True,
    ),
    Option(
        "--gpu-inject-oom",
        "RULE",
        "",
        parse_rule,
        "make allocations fail in every test's call: PHASE[:KEY=VALUE,...], for "
        "example load:nth=3 or any:min=64MiB,persistent; may be repeated",
        repeated=True,
    ),
    Option(
        "--gpu-oom-sweep",
        "",
        "",
        bool,
        "sweep every test that carries @pytest.mark.oom_fallback: fail each of its "
        "allocations in turn",
        is_flag=True,
    ),
    Option(
        "--gpu-oom-points",
        "POINTS",
        "",
        parse_points,
        "which allocations the sweeps of this run fail, whatever the markers say: all, "
        "sites (the first of each place that allocates), or a number of them",
    ),
    Option(
        "--gpu-oom-resume",
        "",
        "",
        bool,
        "go on with sweeps that were interrupted",
        is_flag=True,
    ),
    Option(
        "--gpu-replay-oom",
        "RULE",
        "",
        parse_rule_text,
        "in swept tests run the one point that this rule names; a failing point prints "
        "the line",
    ),
    Option(
        "--gpu-no-children",
        "",
        "",
        bool,
        "leave child processes alone: without it they have the run's device, budgets "
        "and rules, and their peaks come back to the test that started them",
        is_flag=True,
    ),
    Option(
        "--gpu-share",
        "KIND",
        "equal",
        parse_share,
        "what the workers of pytest-xdist have of each card: equal (a test that does "
        "not say how much it needs has an equal share; one that does waits until that "
        "much is free), off (they share it and nobody waits: they are in each other's "
        "way), or own (each has simulated cards for itself; real ones as off)",
    ),
    Option(
        "--gpu-wait-timeout",
        "SECONDS",
        "600",
        parse_seconds,
        "the longest that a test waits until its bytes of a card are free; then it is "
        "an error that names who holds them",
    ),
    Option(
        "--gpu-max-contention-retries",
        "N",
        "20",
        parse_count,
        "how many tests of a run may be retried alone after an OOM that other workers "
        "had a part in",
    ),
    Option(
        "--gpu-checkpoint",
        "NAME_OR_DIR",
        "bert-large",
        parse_checkpoint,
        "what the bert_large fixture gives: a folder with a checkpoint, or the name "
        "of one to build",
    ),
    Option(
        "--gpu-hub-model",
        "NAME[=SOURCE]",
        "",
        str,
        "serve a model under its name on the hub, without network: bert-large-uncased, "
        "or my-org/mine=SOURCE, where SOURCE is a known name, a config.json, or a "
        "checkpoint's folder; hub means the hub's own; may be repeated, and adds to "
        "the ini file's",
        repeated=True,
        ini_name="gpu_hub_models",
    ),
)


def add_options(parser: pytest.Parser) -> None:
    """Declare every row on the command line and in the ini file.

    None stands for what is not given at either place, so that ``is_asked`` can tell.
    """
    group = parser.getgroup("gpumem", "GPU memory: budgets, peaks and OOM injection")
    for option in OPTIONS:
        if option.is_flag:
            group.addoption(
                option.flag,
                dest=option.ini,
                action="store_true",
                default=None,
                help=option.help,
            )
            if option.default:
                parser.addini(option.ini, option.help, default=None)
            else:
                parser.addini(option.ini, option.help, type="bool", default=None)
            continue
        default = f" (default: {option.default})" if option.default else ""
        optional = {"nargs": "?", "const": option.alone} if option.alone else {}
        group.addoption(
            option.flag,
            dest=option.ini,
            action="append" if option.repeated else "store",
            default=None,
            metavar=option.metavar,
            help=option.help + default,
            **optional,
        )
        plain_help = option.help.replace("%%", "%")
        if option.repeated:
            parser.addini(option.ini, plain_help, type="linelist", default=None)
        else:
            parser.addini(option.ini, plain_help, default=None)
