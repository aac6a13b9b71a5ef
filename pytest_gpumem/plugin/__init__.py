"""The pytest plugin: options, markers, fixtures and the hooks of a run.

Only this package imports pytest. None of its modules imports torch when it is imported.
pytest imports this module wherever the plugin is installed, so the modules for a run with
a device are imported only in such a run.
"""

from __future__ import annotations

import json
import os
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pytest

from pytest_gpumem import as_written
from pytest_gpumem.plugin import marks
from pytest_gpumem.plugin.fixtures import (
    competing_process,
    fallback,
    oom_injector,
    oom_sweep,
    steady,
    vram_budget,
    vram_recorder,
)
from pytest_gpumem.plugin.hub import HubAdvice, HubModels
from pytest_gpumem.plugin.inactive import Inactive
from pytest_gpumem.plugin.options import add_options, bind_values
from pytest_gpumem.plugin.settings import (
    OPTIONS,
    REMOVED,
    Settings,
    is_asked,
    read_settings,
    warn_of_removed,
)

if TYPE_CHECKING:
    from pytest_gpumem.plugin.collection import Collection
    from pytest_gpumem.plugin.record_keeping import BrokenLimits
    from pytest_gpumem.plugin.session import Run

PLUGIN_NAME: Final = "gpumem-session"
_key: Final = pytest.StashKey["Run"]()
_hub_key: Final = pytest.StashKey[HubModels]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options."""
    add_options(parser, (*OPTIONS, *REMOVED))


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config, args: list[str]) -> None:
    """Set up the device before any conftest or test module is imported."""
    bind_values(args, early_config.known_args_namespace, OPTIONS)
    if is_asked(early_config, early_config.known_args_namespace):
        _start(early_config, early_config.known_args_namespace)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Bring the fixtures of checkpoints into suites that use them.

    Names passed to ``request.getfixturevalue`` are not known yet. So every suite that
    uses ``request`` gets them, except when fixtures are only listed.
    """
    names = {"bert_large", "make_checkpoint"}
    if not config.option.showfixtures:
        names.add("request")
    if any(names & set(getattr(item, "fixturenames", ())) for item in items):
        from pytest_gpumem.plugin import checkpoint_fixtures

        if not config.pluginmanager.is_registered(checkpoint_fixtures):
            config.pluginmanager.register(checkpoint_fixtures, "gpumem-checkpoints")


def _start(config: pytest.Config, namespace: Any) -> None:
    from pytest_gpumem.plugin.session import Run

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
        # The plugin was loaded late, by ``pytest_plugins`` of a conftest. It works from
        # here on.
        _start(config, config.option)
    warn_of_removed(config)
    run = config.stash.get(_key, None)
    if run is not None:
        config.add_cleanup(as_written.stop)
        _configure(run, config)
    else:
        as_written.stop()
        settings = read_settings(config, config.option)
        _serve(settings, config)
        config.pluginmanager.register(Inactive(settings, config), PLUGIN_NAME)
    config.pluginmanager.register(config.stash[_hub_key], "gpumem-hub")


def _configure(run: Run, config: pytest.Config) -> None:
    from pytest_gpumem.devices.on_import import AfterImport
    from pytest_gpumem.plugin.collection import Collection
    from pytest_gpumem.plugin.isolated import ISOLATION
    from pytest_gpumem.plugin.outputs import check_outputs

    register = config.pluginmanager.register
    is_worker = hasattr(config, "workerinput")
    if not is_worker and ISOLATION not in config.stash:
        check_outputs(run.settings, config)
    collection = Collection(run, config)
    register(run, PLUGIN_NAME)
    register(collection, "gpumem-collection")
    # Most suites load nothing from the hub, and each hook around a report takes time.
    advice = AfterImport(
        "huggingface_hub", partial(register, HubAdvice, "gpumem-hub-advice")
    )
    config.add_cleanup(advice.stop)
    advice.start()
    is_real = run.choice.kind == "cuda" and run.settings.share == "equal"
    if run.sharing.admits or is_real:
        # Registered before the other plugins that run tests, such as the search for the
        # smallest budgets.
        _share(run, config, collection)
    if run.settings.baseline is not None:
        from pytest_gpumem.plugin.gate import WORKER_INPUT, Gate

        text = getattr(config, "workerinput", {}).get(WORKER_INPUT)
        run.gate = Gate(run.settings, text)
    if run.gate is not None or run.settings.reports:
        from pytest_gpumem.plugin.growth import Growth

        run.growth = Growth(run)
        register(run.growth, "gpumem-growth")
    isolation = config.stash.get(ISOLATION, None)
    if isolation is not None:
        from pytest_gpumem.plugin.summary import notes

        isolation.notes.update(notes(collection.phases))
    elif is_worker:
        _tell_controller(run, config, collection)
    else:
        _control(run, config, collection)
    if run.settings.check is not None:
        from pytest_gpumem.plugin.loader_tests import LoaderTests

        register(
            LoaderTests(run.settings.check, run.settings.replay, config), "gpumem-check"
        )
    if run.settings.finds_budgets:
        _find_budgets(run, config)


def _share(run: Run, config: pytest.Config, collection: Collection) -> None:
    from pytest_gpumem.plugin.admission import Admission
    from pytest_gpumem.plugin.contention import ContentionCheck
    from pytest_gpumem.plugin.workers import IDLE_INPUT

    given = getattr(config, "workerinput", {})
    idle = frozenset(json.loads(given.get(IDLE_INPUT, "[]")))
    admission = Admission(run, collection.phases, collection.markers, idle)
    contention = ContentionCheck(run, collection.markers)
    collection.incidents.listeners.append(contention.note)
    config.pluginmanager.register(admission, "gpumem-admission")
    config.pluginmanager.register(contention, "gpumem-contention")


def _tell_controller(run: Run, config: pytest.Config, collection: Collection) -> None:
    """Let a worker of pytest-xdist send its notes to the controller."""
    from pytest_gpumem.plugin.outputs import STEP_SUMMARY
    from pytest_gpumem.plugin.summary import notes
    from pytest_gpumem.plugin.workers import WorkerNotes

    told = WorkerNotes(config)
    told.parts.update(notes(collection.phases))
    if run.gate is not None:
        from pytest_gpumem.plugin.baseline_record import Deselected

        deselected = Deselected()
        told.parts["deselected"] = lambda: sorted(deselected.deselected)
        config.pluginmanager.register(deselected, "gpumem-deselected")
    if run.settings.reports or os.environ.get(STEP_SUMMARY):
        from pytest_gpumem.plugin.reporting import machine_of
        from pytest_gpumem.records.codec import encode

        told.parts["machine"] = lambda: encode(machine_of(run))
    config.pluginmanager.register(told, "gpumem-notes")


def _control(run: Run, config: pytest.Config, collection: Collection) -> None:
    """Let the process that receives reports collect records and print the results."""
    from pytest_gpumem.plugin.endings import PLUGIN_NAME as ENDINGS_NAME
    from pytest_gpumem.plugin.endings import Endings
    from pytest_gpumem.plugin.outputs import STEP_SUMMARY
    from pytest_gpumem.plugin.record_keeping import BrokenLimits, Collector
    from pytest_gpumem.plugin.summary import SummaryPlugin

    register = config.pluginmanager.register
    run.endings = Endings(is_strict=run.settings.is_strict)
    register(run.endings, ENDINGS_NAME)
    collector = Collector()
    collector.on_broken_limit = partial(_register_once, config, BrokenLimits)
    register(collector, "gpumem-collector")
    if run.gate is not None:
        from pytest_gpumem.plugin.baseline_summary import BaselineSummary

        plugin = BaselineSummary(run, run.gate, config, collector, run.endings)
        register(plugin, "gpumem-baseline")
    summary = SummaryPlugin(run, collection.phases, config, collector)
    register(summary, "gpumem-summary")
    is_distributed = bool(config.getoption("tx", default=None))
    if is_distributed or run.choice.kind == "cuda":
        from pytest_gpumem.plugin.cardless_tests import CardlessTests

        history = CardlessTests(config, collector)
        register(history, "gpumem-history")
        if is_distributed and run.settings.share != "own":
            from pytest_gpumem.plugin.workers import Workers

            register(Workers(history, run.settings.share), "gpumem-workers")
    if os.environ.get("GITHUB_ACTIONS") == "true":
        from pytest_gpumem.plugin.failure_annotations import Annotations

        annotations = Annotations(config)
        collector.listeners.append(annotations.take)
        register(annotations, "gpumem-annotations")
    if run.settings.reports or os.environ.get(STEP_SUMMARY):
        from pytest_gpumem.plugin.reporting import Reporting

        register(Reporting(run, config, collector), "gpumem-reports")


def _register_once(config: pytest.Config, plugin: type[BrokenLimits]) -> None:
    if not config.pluginmanager.is_registered(plugin):
        config.pluginmanager.register(plugin, "gpumem-broken-limits")


def _find_budgets(run: Run, config: pytest.Config) -> None:
    if config.getoption("usepdb", default=False):
        raise pytest.UsageError(
            "--gpu-suggest=budgets makes tests fail on purpose; run it without --pdb"
        )
    from pytest_gpumem.plugin.smallest import SmallestBudgets

    config.pluginmanager.register(SmallestBudgets(run), "gpumem-smallest")


__all__ = [
    "PLUGIN_NAME",
    "competing_process",
    "fallback",
    "oom_injector",
    "oom_sweep",
    "pytest_addoption",
    "pytest_collection_modifyitems",
    "pytest_configure",
    "pytest_load_initial_conftests",
    "steady",
    "vram_budget",
    "vram_recorder",
]
