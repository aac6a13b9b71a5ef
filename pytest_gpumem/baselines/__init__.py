"""Baselines: reviewed and committed peaks, and the comparison with them."""

from pytest_gpumem.baselines.baseline import Baseline
from pytest_gpumem.baselines.regressions import Tolerance, compare_figures
from pytest_gpumem.records.run_record import Change

__all__ = ["Baseline", "Change", "Tolerance", "compare_figures"]
