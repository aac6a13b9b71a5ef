"""pytest-gpumem: VRAM budgets, peak limits and OOM injection for tests.

Everything is imported on first use: importing this package imports neither torch nor
pytest. PYTEST_DONT_REWRITE: a worker of pytest-xdist has imported it before pytest.
"""

from __future__ import annotations

#: Type checkers treat this name as true, like ``typing.TYPE_CHECKING``. To import
#: ``typing`` would take longer than the rest of this module.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any, Final

    from pytest_gpumem._version import __version__
    from pytest_gpumem.cards import Card, find_card
    from pytest_gpumem.checking.battery import LoaderCheck, check_loader
    from pytest_gpumem.checkpoints import make_checkpoint
    from pytest_gpumem.devices import Device
    from pytest_gpumem.devices.active import active_device
    from pytest_gpumem.devices.simulated.install import simulated_device
    from pytest_gpumem.errors import GpuMemError
    from pytest_gpumem.hub import serve_models
    from pytest_gpumem.instruments.budget import vram_budget
    from pytest_gpumem.instruments.competing_process import competing_process
    from pytest_gpumem.instruments.fallback import FallbackReport, check_fallback
    from pytest_gpumem.instruments.injector import OomInjector
    from pytest_gpumem.instruments.loads import LoadVerdict, judge_load
    from pytest_gpumem.instruments.recorder import PeakRecorder
    from pytest_gpumem.instruments.sampler import MemorySampler
    from pytest_gpumem.instruments.steady import steady
    from pytest_gpumem.planning.fit import FitReport, fit_model
    from pytest_gpumem.planning.task import FitTask
    from pytest_gpumem.records.memory_figures import MemoryFigures
    from pytest_gpumem.records.record import Verdict
    from pytest_gpumem.rules.parser import parse_rule
    from pytest_gpumem.rules.rule import Rule
    from pytest_gpumem.sizes import format_size, parse_size
    from pytest_gpumem.sweeps.report import Outcome, Point, SweepReport
    from pytest_gpumem.sweeps.run import sweep_ooms
    from pytest_gpumem.tenancy.load_lock import gpu_load_lock

_HOMES: Final = {
    "Card": "cards",
    "Device": "devices",
    "FallbackReport": "instruments.fallback",
    "FitReport": "planning.fit",
    "FitTask": "planning.task",
    "GpuMemError": "errors",
    "LoaderCheck": "checking.battery",
    "LoadVerdict": "instruments.loads",
    "MemoryFigures": "records.memory_figures",
    "MemorySampler": "instruments.sampler",
    "OomInjector": "instruments.injector",
    "Outcome": "sweeps.report",
    "Point": "sweeps.report",
    "PeakRecorder": "instruments.recorder",
    "Rule": "rules.rule",
    "SweepReport": "sweeps.report",
    "Verdict": "records.record",
    "__version__": "_version",
    "active_device": "devices.active",
    "check_fallback": "instruments.fallback",
    "check_loader": "checking.battery",
    "competing_process": "instruments.competing_process",
    "find_card": "cards",
    "fit_model": "planning.fit",
    "format_size": "sizes",
    "gpu_load_lock": "tenancy.load_lock",
    "judge_load": "instruments.loads",
    "make_checkpoint": "checkpoints",
    "parse_rule": "rules.parser",
    "parse_size": "sizes",
    "serve_models": "hub",
    "simulated_device": "devices.simulated.install",
    "steady": "instruments.steady",
    "sweep_ooms": "sweeps.run",
    "vram_budget": "instruments.budget",
}

__all__ = [
    "Card",
    "Device",
    "FallbackReport",
    "FitReport",
    "FitTask",
    "GpuMemError",
    "LoadVerdict",
    "LoaderCheck",
    "MemoryFigures",
    "MemorySampler",
    "OomInjector",
    "Outcome",
    "PeakRecorder",
    "Point",
    "Rule",
    "SweepReport",
    "Verdict",
    "__version__",
    "active_device",
    "check_fallback",
    "check_loader",
    "competing_process",
    "find_card",
    "fit_model",
    "format_size",
    "gpu_load_lock",
    "judge_load",
    "make_checkpoint",
    "parse_rule",
    "parse_size",
    "serve_models",
    "simulated_device",
    "steady",
    "sweep_ooms",
    "vram_budget",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
