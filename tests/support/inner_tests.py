"""Tests of inner runs that several test files share, as text."""

from __future__ import annotations

from typing import Final

#: A swept test, and one of a fallback.
SWEEP_AND_FALLBACK: Final = """
    @pytest.mark.oom_sweep
    def test_sweep():
        try:
            torch.zeros(2**18, device="cuda")
        except torch.OutOfMemoryError:
            pass

    def test_fallback(fallback):
        def load():
            model = torch.nn.Linear(8, 8)
            try:
                return model.to("cuda")
            except torch.OutOfMemoryError:
                return model.to("cpu")
        fallback(load, budgets=["2MiB"])
"""
