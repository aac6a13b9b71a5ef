"""The plugin's options: one table for the command line and the ini file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pytest

from pytest_gpumem.devices.selection import BACKENDS
from pytest_gpumem.errors import GpuMemError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pytest_gpumem.baselines.gate import Tolerance
    from pytest_gpumem.cards import Card
    from pytest_gpumem.model.rules import Rule
    from pytest_gpumem.sizes import SizeSpec


class Option(NamedTuple):
    """A row of the table.

    Attributes:
        flag: The command line's name; the ini name is the same with underscores.
        metavar: What follows the flag in help.
        default: What holds where neither is given, as text.
        parse: Text in, value out; raises ``GpuMemError`` or ``ValueError``.
        help: What the option does.
        repeated: Whether it may be given several times.
        is_flag: Whether it stands alone, without a value.
    """

    flag: str
    metavar: str
    default: str
    parse: Callable[[str], Any]
    help: str
    repeated: bool = False
    is_flag: bool = False

    @property
    def ini(self) -> str:
        """The name in the ini file."""
        return self.flag.removeprefix("--").replace("-", "_")


#: What a simulated card may keep of tensors' values; ``machine.VALUES``, likewise.
VALUES: Final = ("computed", "none")

#: The simulated card of a run that names none; ``cards.DEFAULT_CARD``, said here so
#: that a run without a GPU test need not read the table of cards.
DEFAULT_CARD: Final = "T4"


# Parsers are imported once there is something to parse: most runs give no option.


def _find_card(text: str) -> Any:
    from pytest_gpumem.cards import find_card  # noqa: PLC0415  # see above

    return find_card(text)


def _parse_sizes(text: str) -> Any:
    from pytest_gpumem.sizes import parse_device_sizes  # noqa: PLC0415  # see above

    return parse_device_sizes(text)


def _parse_size_spec(text: str) -> Any:
    from pytest_gpumem.sizes import parse_size_spec  # noqa: PLC0415  # see above

    return parse_size_spec(text)


def _parse_tolerance(text: str) -> Any:
    from pytest_gpumem.baselines.gate import Tolerance  # noqa: PLC0415  # see above

    return Tolerance.parse(text)


def _parse_rule(text: str) -> Any:
    from pytest_gpumem.model.rule_parser import parse_rule  # noqa: PLC0415  # see above

    return parse_rule(text)


def _parse_rule_text(text: str) -> str:
    _parse_rule(text)
    return text


def _parse_points(text: str) -> str | int:
    if text in ("all", "sites"):
        return text
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ValueError(
            f"{text!r} is neither all, sites nor a number of allocations from 1 on"
        )
    return int(text)


def _parse_values(text: str) -> str:
    if text not in VALUES:
        raise ValueError(f"{text!r} is unknown; accepted are {', '.join(VALUES)}")
    return text


def _parse_backend(text: str) -> str:
    if text not in BACKENDS:
        raise ValueError(f"{text!r} is no backend; accepted are {', '.join(BACKENDS)}")
    return text


OPTIONS: Final = (
    Option(
        "--gpu-backend",
        "KIND",
        "auto",
        _parse_backend,
        "the device that 'cuda' means: auto (a usable CUDA card, else simulated), "
        "cuda, simulated, off",
    ),
    Option(
        "--gpu-card",
        "CARD",
        DEFAULT_CARD,
        _find_card,
        "the simulated card: a name such as T4 or A100-80GB, two of them with "
        "A100-80GB*2, or a made-up one with 16GiB,cc=8.0",
    ),
    Option(
        "--gpu-values",
        "KEPT",
        "computed",
        _parse_values,
        "what the simulated card keeps of tensors: computed values, or none, only "
        "shapes and bytes, for models larger than the host",
    ),
    Option(
        "--gpu-budget",
        "SIZE",
        "",
        _parse_sizes,
        "bytes of the card that a test may hold, inclusive: 4GiB, 4GB, 512MiB, 50%% "
        "of the card, plain bytes, or 0=4GiB,1=8GiB for each card",
    ),
    Option(
        "--gpu-max-vram",
        "SIZE",
        "",
        _parse_size_spec,
        "limit on the peak of allocated bytes of every test's call that carries no "
        "max_vram of its own for them: a size, or a percentage of the card",
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
        _parse_tolerance,
        "how much more than the baseline passes: allocated:5%% or reserved:16MiB; may "
        "be repeated (default: allocated:1%%, and reserved is reported)",
        repeated=True,
    ),
    Option(
        "--gpu-inject-oom",
        "RULE",
        "",
        _parse_rule,
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
        _parse_points,
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
        _parse_rule_text,
        "in swept tests run the one point that this rule names; a failing point prints "
        "the line",
    ),
    Option(
        "--gpu-checkpoint",
        "NAME_OR_DIR",
        "bert-large",
        str,
        "what the bert_large fixture gives: a folder with a checkpoint, or the name "
        "of one to build",
    ),
)


class Settings(NamedTuple):
    """The options of a run, parsed.

    Attributes:
        backend: One of ``BACKENDS``.
        card_text: How the simulated cards were named.
        values: One of ``VALUES``.
        budgets: Budget by device index; None stands for every card. Empty: none.
        rules: Injection rules for every test.
        checkpoint: Name or folder of the ``bert_large`` fixture's checkpoint.
        oom_sweep: Whether tests with ``oom_fallback`` are swept.
        oom_points: What all sweeps fail; None leaves it to the markers.
        resume: Whether interrupted sweeps go on.
        max_vram: Limit of tests that carry none, or None.
        leak_check: Whether every test is held to leave nothing.
        baseline: The file of peaks to compare with, or None.
        updates_baseline: Whether it is written instead.
        compare_fail: How much more passes; none for the default.
        replay: The rule of the one point to run in sweeps, or None.
    """

    backend: str
    card_text: str
    values: str
    budgets: Mapping[int | None, SizeSpec]
    rules: tuple[Rule, ...]
    checkpoint: str
    oom_sweep: bool = False
    oom_points: str | int | None = None
    resume: bool = False
    replay: str | None = None
    max_vram: SizeSpec | None = None
    leak_check: bool = False
    baseline: Path | None = None
    updates_baseline: bool = False
    compare_fail: tuple[Tolerance, ...] = ()

    @property
    def cards(self) -> tuple[Card, ...]:
        """The simulated cards."""
        from pytest_gpumem.cards import visible_cards  # noqa: PLC0415  # a device is wanted

        return visible_cards(_find_card(self.card_text))

    def budget_bytes(self, index: int, total_bytes: int) -> int | None:
        """Return the budget of a card of so many bytes; None where there is none.

        Raises:
            SizeError: A percentage of the card comes to nothing.
        """
        spec = self.budgets.get(index, self.budgets.get(None))
        return None if spec is None else spec.resolve(total_bytes)


def add_options(parser: pytest.Parser) -> None:
    """Declare every row on the command line and in the ini file."""
    group = parser.getgroup("gpumem", "GPU memory: budgets, peaks and OOM injection")
    for option in OPTIONS:
        if option.is_flag:
            group.addoption(
                option.flag, action="store_true", default=None, help=option.help
            )
            parser.addini(option.ini, option.help, type="bool", default=False)
            continue
        default = f" (default: {option.default})" if option.default else ""
        group.addoption(
            option.flag,
            action="append" if option.repeated else "store",
            default=None,
            metavar=option.metavar,
            help=option.help + default,
        )
        plain_help = option.help.replace("%%", "%")
        if option.repeated:
            parser.addini(option.ini, plain_help, type="linelist", default=[])
        else:
            parser.addini(option.ini, plain_help, default=option.default)


def read_settings(config: pytest.Config, namespace: Any) -> Settings:
    """Parse the options of a run.

    Args:
        config: For the ini file.
        namespace: The command line, as far as it is parsed.

    Raises:
        pytest.UsageError: A value cannot be read, or makes no sense.
    """
    values = {option.ini: _value(option, config, namespace) for option in OPTIONS}
    return Settings(
        backend=values["gpu_backend"],
        card_text=_text(OPTIONS[1], config, namespace) or DEFAULT_CARD,
        values=values["gpu_values"],
        budgets=values["gpu_budget"] or {},
        rules=tuple(values["gpu_inject_oom"]),
        checkpoint=values["gpu_checkpoint"],
        oom_sweep=values["gpu_oom_sweep"],
        oom_points=values["gpu_oom_points"],
        resume=values["gpu_oom_resume"],
        replay=values["gpu_replay_oom"],
        max_vram=values["gpu_max_vram"],
        leak_check=values["gpu_leak_check"],
        baseline=_baseline_path(values, config, namespace),
        updates_baseline=values["gpu_update_baseline"],
        compare_fail=tuple(values["gpu_compare_fail"]),
    )


def _baseline_path(
    values: Mapping[str, Any], config: pytest.Config, namespace: Any
) -> Path | None:
    """Return where the baseline is: from the ini file's folder, or from where we are.

    Raises:
        pytest.UsageError: It is to be written, and there is no name for it.
    """
    text = values["gpu_baseline"]
    if not text:
        if values["gpu_update_baseline"]:
            raise pytest.UsageError(
                "--gpu-update-baseline: which file? name it with --gpu-baseline=FILE"
            )
        return None
    is_ini = getattr(namespace, "gpu_baseline", None) is None
    base = config.rootpath if is_ini else Path(config.invocation_params.dir)
    return base / str(text)


def check_budgets(settings: Settings, totals: Mapping[int, int]) -> None:
    """Refuse budgets that the cards cannot give.

    Args:
        settings: The options.
        totals: Total bytes by device index.

    Raises:
        pytest.UsageError: A budget is more than its card has, or names no card.
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


def _text(option: Option, config: pytest.Config, namespace: Any) -> Any:
    given = getattr(namespace, option.ini, None)
    return config.getini(option.ini) if given is None else given


def _value(option: Option, config: pytest.Config, namespace: Any) -> Any:
    given = getattr(namespace, option.ini, None)
    source = option.flag if given is not None else option.ini
    text = _text(option, config, namespace)
    try:
        if option.is_flag:
            return bool(text)
        if option.repeated:
            return [option.parse(each) for each in text]
        if given is None and text in ("", option.default):
            return text or None
        return option.parse(text)
    except (GpuMemError, ValueError) as error:
        raise pytest.UsageError(f"{source}: {error}") from None
