"""Applies the settings of a run of pytest, then runs the real sitecustomize.

It is found only where a run has put this folder on ``PYTHONPATH``.
"""

import contextlib
import os
import sys

_here = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120  # this runs in every process, so pathlib is not imported


def _activate() -> None:
    root = os.path.dirname(os.path.dirname(os.path.dirname(_here)))  # noqa: PTH120  # this runs in every process, so pathlib is not imported
    sys.path.append(root)
    try:
        from pytest_gpumem.children.child import activate

        activate()
    except Exception as error:  # noqa: BLE001  # this may be another Python, which must still start
        sys.stderr.write(f"pytest-gpumem does not reach this process: {error}\n")
    finally:
        sys.path.remove(root)


if not os.environ.get("PYTEST_GPUMEM_NO_CHILDREN") and (
    os.environ.get("PYTEST_GPUMEM_CHILDREN") or os.environ.get("PYTEST_GPUMEM_HUB")
):
    _activate()
sys.path[:] = [
    each
    for each in sys.path
    if os.path.abspath(each) != _here  # noqa: PTH100  # this runs in every process, so pathlib is not imported
]
_shim = sys.modules.pop("sitecustomize", None)
with contextlib.suppress(ImportError):
    import sitecustomize  # type: ignore[import-not-found]  # noqa: F401  # the environment's own
if _shim is not None:
    sys.modules.setdefault("sitecustomize", _shim)
