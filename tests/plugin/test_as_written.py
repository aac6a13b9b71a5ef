"""pytest does not rewrite the plugin's modules, which would take most of the plugin's start."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def test_own_modules_are_not_rewritten_and_others_are(
    pytester: pytest.Pytester,
) -> None:
    """The finder is gone when the run has ended."""
    pytester.makeconftest(
        """
        import atexit
        import sys

        def rewritten():
            return {
                name
                for name, module in sys.modules.items()
                if "rewrite" in type(getattr(module, "__loader__", None)).__module__
            }

        def finders():
            return [f for f in sys.meta_path if "as_written" in type(f).__module__]

        def pytest_sessionfinish():
            # Those that are imported before the finder is there.
            first = {"pytest_gpumem", "pytest_gpumem.plugin", "pytest_gpumem.as_written"}
            print("ours:", {n for n in rewritten() if "gpumem" in n} - first)
            print("the test:", "test_it" in rewritten(), "finders:", len(finders()))

        atexit.register(lambda: print("at the end:", len(finders())))
        """
    )
    pytester.makepyfile(test_it="def test_it(): assert True")

    result = pytester.runpytest_subprocess(
        "--gpu-backend=auto", "-s", "-p", "no:cacheprovider"
    )

    assert 0 == result.ret
    result.stdout.fnmatch_lines(
        ["*ours: set()", "the test: True finders: 1", "*at the end: 0"]
    )
