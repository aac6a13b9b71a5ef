"""The pytest plugin: options, markers, fixtures and the hooks of a run.

This is the only room that imports pytest; nothing in it imports torch at its top.
"""

from __future__ import annotations

import json
import os
from typing import Any, Final

import pytest

from pytest_gpumem.plugin import marks
from pytest_gpumem.plugin.collection import Collection
from pytest_gpumem.plugin.endings import PLUGIN_NAME as ENDINGS_NAME
from pytest_gpumem.plugin.endings import Endings
from pytest_gpumem.plugin.fixtures import (
    bert_large,
    competing_process,
    fallback,
    make_checkpoint,
    oom_injector,
    oom_sweep,
    vram_budget,
    vram_recorder,
)
from pytest_gpumem.plugin.hub import HubAdvice, HubModels
from pytest_gpumem.plugin.options import add_options
from pytest_gpumem.plugin.outputs import check_outputs
from pytest_gpumem.plugin.session import Run
from pytest_gpumem.plugin.settings import (
    OPTIONS,
    REMOVED,
    Settings,
    is_asked,
    read_settings,
    warn_of_removed,
)
from pytest_gpumem.plugin.summary import DroppedNote, SummaryPlugin
from pytest_gpumem.plugin.unasked import Unasked

PLUGIN_NAME: Final = "gpumem-session"
_key: Final = pytest.StashKey[Run]()
_hub_key: Final = pytest.StashKey[HubModels]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options."""
    add_options(parser, (*OPTIONS, *REMOVED))


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Have the device ready before any conftest or test module is imported."""
    if is_asked(early_config, early_config.known_args_namespace):
        _start(early_config, early_config.known_args_namespace)


def _start(config: pytest.Config, namespace: Any) -> None:
    settings = read_settings(config, namespace)
    run = Run(settings)
    config.stash[_key] = run
    config.add_cleanup(run.stop)
    run.start()
    _serve(settings, config)


def _serve(settings: Settings, config: pytest.Config) -> None:
    hub = HubModels(settings)
    config.stash[_hub_key] = hub
    config.add_cleanup(hub.stop)
    hub.start()


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers and the run's own hooks."""
    for description in marks.DESCRIPTIONS:
        config.addinivalue_line("markers", description)
    if _key not in config.stash and is_asked(config, config.option):
        # Loaded late, by a conftest's pytest_plugins: from here on it works too.
        _start(config, config.option)
    warn_of_removed(config)
    run = config.stash.get(_key, None)
    if run is not None:
        _configure(run, config)
    else:
        settings = read_settings(config, config.option)
        _serve(settings, config)
        config.pluginmanager.register(Unasked(settings, config), PLUGIN_NAME)
    config.pluginmanager.register(config.stash[_hub_key], "gpumem-hub")


def _configure(run: Run, config: pytest.Config) -> None:
    collection = Collection(run, config)
    config.pluginmanager.register(run, PLUGIN_NAME)
    config.pluginmanager.register(collection, "gpumem-collection")
    config.pluginmanager.register(run.children, "gpumem-children")
    config.pluginmanager.register(HubAdvice, "gpumem-hub-advice")
    is_real = run.choice.kind == "cuda" and run.settings.share == "equal"
    if run.sharing.admits or is_real:
        # Before what else runs tests, such as the search for their smallest budgets.
        _share(run, config, collection)
    is_worker = hasattr(config, "workerinput")
    if not is_worker:
        check_outputs(run.settings, config)
        run.endings = Endings(is_strict=run.settings.is_strict)
        config.pluginmanager.register(run.endings, ENDINGS_NAME)
    if run.settings.baseline is not None:
        _gate(run, config)
    _measure(run, config)
    if run.settings.suggest or run.settings.find_budget:
        _suggest(run, config)
    if is_worker:
        config.pluginmanager.register(DroppedNote(collection.phases), "gpumem-dropped")
    else:
        config.pluginmanager.register(
            SummaryPlugin(run, collection.phases, config), "gpumem-summary"
        )
        _control(run, config)
        if os.environ.get("GITHUB_ACTIONS") == "true":
            _annotate(config)
    if run.settings.reports or os.environ.get("GITHUB_STEP_SUMMARY"):
        _report(run, config)


def _share(run: Run, config: pytest.Config, collection: Collection) -> None:
    from pytest_gpumem.plugin.admission import Admission  # noqa: PLC0415  # there are others
    from pytest_gpumem.plugin.contention import Contention  # noqa: PLC0415  # likewise
    from pytest_gpumem.plugin.workers import IDLE_INPUT  # noqa: PLC0415  # likewise

    given = getattr(config, "workerinput", {})
    admission = Admission(
        run,
        collection.phases,
        collection.wishes,
        frozenset(json.loads(given.get(IDLE_INPUT, "[]"))),
    )
    contention = Contention(run, collection.wishes)
    collection.incidents.listeners.append(contention.note)
    config.pluginmanager.register(admission, "gpumem-admission")
    config.pluginmanager.register(contention, "gpumem-contention")


def _control(run: Run, config: pytest.Config) -> None:
    is_distributed = bool(config.getoption("tx", default=None))
    if not is_distributed and run.choice.kind != "cuda":
        return
    from pytest_gpumem.plugin.history import History  # noqa: PLC0415  # there are workers
    from pytest_gpumem.plugin.sharing_summary import SharingSummary  # noqa: PLC0415  # likewise
    from pytest_gpumem.plugin.workers import Workers  # noqa: PLC0415  # likewise

    history = History(config)
    config.pluginmanager.register(history, "gpumem-history")
    config.pluginmanager.register(SharingSummary(), "gpumem-sharing")
    if is_distributed and run.settings.share != "own":
        config.pluginmanager.register(
            Workers(history, run.settings.share), "gpumem-workers"
        )


def _report(run: Run, config: pytest.Config) -> None:
    from pytest_gpumem.plugin.reporting import MachineNote, Reporting  # noqa: PLC0415  # one was asked for

    kind = MachineNote if hasattr(config, "workerinput") else Reporting
    config.pluginmanager.register(kind(run, config), "gpumem-reports")


def _annotate(config: pytest.Config) -> None:
    from pytest_gpumem.plugin.annotations import Annotations  # noqa: PLC0415  # GitHub shows them

    config.pluginmanager.register(Annotations(config), "gpumem-annotations")


def _suggest(run: Run, config: pytest.Config) -> None:
    from pytest_gpumem.plugin.suggest import Suggestions  # noqa: PLC0415  # it was asked for

    if not hasattr(config, "workerinput"):
        plugin = Suggestions(run)
        config.pluginmanager.register(plugin, "gpumem-suggestions")
    if run.settings.find_budget:
        if config.getoption("usepdb", default=False):
            raise pytest.UsageError(
                "--gpu-find-budget makes tests fail on purpose; run it without --pdb"
            )
        from pytest_gpumem.plugin.smallest import SmallestBudgets  # noqa: PLC0415  # likewise

        config.pluginmanager.register(SmallestBudgets(run), "gpumem-smallest")


def _measure(run: Run, config: pytest.Config) -> None:
    if run.gate is None and not run.settings.reports:
        return
    from pytest_gpumem.plugin.growth import Growth  # noqa: PLC0415  # somebody wants it

    run.growth = Growth(run)
    config.pluginmanager.register(run.growth, "gpumem-growth")


def _gate(run: Run, config: pytest.Config) -> None:
    from pytest_gpumem.plugin.baseline_record import Spared  # noqa: PLC0415  # there is a baseline
    from pytest_gpumem.plugin.baseline_summary import BaselineSummary  # noqa: PLC0415  # likewise
    from pytest_gpumem.plugin.gate import WORKER_INPUT, Gate  # noqa: PLC0415  # likewise

    text = getattr(config, "workerinput", {}).get(WORKER_INPUT)
    run.gate = Gate(run.settings, text)
    if run.endings is not None:
        plugin = BaselineSummary(run, run.gate, config, run.endings)
        config.pluginmanager.register(plugin, "gpumem-baseline")
    else:
        config.pluginmanager.register(Spared(config), "gpumem-spared")


__all__ = [
    "PLUGIN_NAME",
    "bert_large",
    "competing_process",
    "fallback",
    "make_checkpoint",
    "oom_injector",
    "oom_sweep",
    "pytest_addoption",
    "pytest_configure",
    "pytest_load_initial_conftests",
    "vram_budget",
    "vram_recorder",
]
