"""The options of a run, parsed and checked before any test."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from pytest_gpumem.errors import GpuMemError
from pytest_gpumem.plugin.option_values import find_card
from pytest_gpumem.plugin.options import DEFAULT_CARD, OPTIONS, Option

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_gpumem.baselines.gate import Tolerance
    from pytest_gpumem.cards import Card
    from pytest_gpumem.hub import HubModel
    from pytest_gpumem.plugin.marks import Budget
    from pytest_gpumem.rules.rule import Rule
    from pytest_gpumem.sizes import SizeSpec


class Settings(NamedTuple):
    """The options of a run, parsed.

    Attributes:
        backend: One of ``BACKENDS``.
        card_text: How the simulated cards were named.
        values: One of ``VALUES``.
        budgets: Budget by device index; None stands for every card. Empty: none.
        rules: Injection rules for every test.
        checkpoint: Name or folder of the ``bert_large`` fixture's checkpoint.
        oom_sweep: Whether it was asked that tests with ``oom_fallback`` be swept.
        oom_points: What all sweeps fail; None leaves it to the markers.
        resume: Whether interrupted sweeps go on.
        max_vram: Limit of tests that carry none, or None.
        leak_check: Whether every test is held to leave nothing.
        baseline: The file of peaks to compare with, or None.
        updates_baseline: Whether it is written instead.
        compare_fail: How much more passes; none for the default.
        is_strict: Whether a check that holds nothing fails the run.
        snapshots: The folder for snapshots of failed tests, or None.
        suggest: ``"print"``, the patch to write, or None for no suggestions.
        find_budget: Whether each test's smallest budget is sought.
        replay: The rule of the one point to run in sweeps, or None.
        reaches_children: Whether child processes take the settings over.
        reports: Kind and path of each report to write.
        share: One of ``SHARES``.
        wait_s: The longest that a test waits for its bytes of a card, in seconds.
        max_retries: How many tests may be retried alone.
        hub_models: What is served under names of the hub; the later ones win.
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
    is_strict: bool = False
    snapshots: Path | None = None
    suggest: str | None = None
    find_budget: bool = False
    reaches_children: bool = True
    reports: tuple[tuple[str, str], ...] = ()
    share: str = "equal"
    wait_s: float = 600.0
    max_retries: int = 20
    hub_models: tuple[HubModel, ...] = ()

    @property
    def sweeps_fallbacks(self) -> bool:
        """Whether tests with ``oom_fallback`` are swept."""
        return self.oom_sweep or self.replay is not None

    @property
    def all_cards(self) -> tuple[Card, ...]:
        """The simulated machine's cards, whether a process sees them or not."""
        cards: tuple[Card, ...] = find_card(self.card_text)
        return cards

    @property
    def cards(self) -> tuple[Card, ...]:
        """The simulated cards."""
        from pytest_gpumem.cards import visible_cards  # noqa: PLC0415  # a device is wanted

        return visible_cards(self.all_cards)

    def budget_bytes(
        self, index: int, total_bytes: int, own: Sequence[Budget] = ()
    ) -> int | None:
        """Return the budget of a card of so many bytes; None where there is none.

        Args:
            index: The card.
            total_bytes: Its bytes.
            own: A test's own budgets, the nearest first; they come before the run's.

        Raises:
            SizeError: A percentage of the card comes to nothing.
        """
        run_wide = self.budgets.get(index, self.budgets.get(None))
        sizes = (each.size for each in own if each.device_index == index)
        spec = next(sizes, run_wide)
        return None if spec is None else spec.resolve(total_bytes)


def is_asked(config: pytest.Config, namespace: Any) -> bool:
    """Tell whether a run asks for a device: by any option or ini setting of the plugin.

    Args:
        config: For the ini file.
        namespace: The command line, as far as it is parsed.
    """
    return any(
        getattr(namespace, option.ini, None) is not None
        or config.getini(option.ini) is not None
        for option in OPTIONS
    )


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
        is_strict=_is_strict(values["gpu_strict"]),
        snapshots=values["gpu_snapshots"],
        suggest=values["gpu_suggest"],
        find_budget=values["gpu_find_budget"],
        reaches_children=not values["gpu_no_children"],
        reports=tuple(values["gpu_report"]),
        share=values["gpu_share"],
        wait_s=float(values["gpu_wait_timeout"]),
        max_retries=int(values["gpu_max_contention_retries"]),
        hub_models=_hub_models(config, namespace),
    )


def _hub_models(config: pytest.Config, namespace: Any) -> tuple[HubModel, ...]:
    """Return what is served: the ini file's models, then the command line's.

    A path starts from where it is said: from the ini file, or from where we are.

    Raises:
        pytest.UsageError: One of them makes no sense.
    """
    ini = config.getini("gpu_hub_models") or ()
    line = getattr(namespace, "gpu_hub_models", None) or ()
    if not ini and not line:
        return ()
    from pytest_gpumem.hub import parse_hub_model  # noqa: PLC0415  # there are some

    def read(source: str, texts: Sequence[str], base: Path) -> list[HubModel]:
        try:
            return [parse_hub_model(text, base=base) for text in texts]
        except GpuMemError as error:
            raise pytest.UsageError(f"{source}: {error}") from None

    return (
        *read("gpu_hub_models", ini, config.rootpath),
        *read("--gpu-hub-model", line, Path(config.invocation_params.dir)),
    )


def _is_strict(chosen: object) -> bool:
    """Tell whether the run is strict: as was chosen, else where ``CI`` is set."""
    if chosen in (True, "true", "false"):
        return chosen != "false"
    return os.environ.get("CI", "").strip().lower() not in ("", "0", "false")


def _baseline_path(
    values: Mapping[str, Any], config: pytest.Config, namespace: Any
) -> Path | None:
    """Return where the baseline is: from the ini file's folder, or from where we are.

    Raises:
        pytest.UsageError: There is none, and it is to be written or compared with.
    """
    text = values["gpu_baseline"]
    if not text:
        if values["gpu_update_baseline"]:
            raise pytest.UsageError(
                "--gpu-update-baseline: which file? name it with --gpu-baseline=FILE"
            )
        if getattr(namespace, "gpu_compare_fail", None):
            raise pytest.UsageError(
                "--gpu-compare-fail: there is nothing to compare with; name it with "
                "--gpu-baseline=FILE, or put gpu_compare_fail into the ini file, for "
                "those runs that compare"
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
    if given is None:
        given = config.getini(option.ini)
    return option.default if given is None else given


def _value(option: Option, config: pytest.Config, namespace: Any) -> Any:
    given = getattr(namespace, option.ini, None)
    source = option.flag if given is not None else option.ini
    try:
        text = _text(option, config, namespace)
        if option.is_flag and (given or not option.default):
            return bool(text)
        if option.repeated:
            return [option.parse(each) for each in text]
        if given is None and text in ("", option.default):
            return text or None
        return option.parse(text)
    except (GpuMemError, ValueError, TypeError, pytest.UsageError) as error:
        # pytest's own, of an ini file's value of the wrong kind, do not name it.
        raise pytest.UsageError(f"{source}: {error}") from None
