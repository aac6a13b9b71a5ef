"""``torch.backends.cuda``: which of CUDA's libraries a program prefers, and cuFFT's plans.

A CPU build refuses each of these settings, because it has none of the libraries. Here
they are stored and reported. Limits: operators request what they request with torch's
own choice of library, and no plan of cuFFT is ever kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch.backends.cuda import cuFFTPlanCacheManager

from pytest_gpumem.devices.simulated.machine import current_machine

if TYPE_CHECKING:
    from collections.abc import Callable

#: Source: ``CUFFT_DEFAULT_CACHE_SIZE`` of ``aten/src/ATen/native/cuda/CuFFTPlanCache.h``.
_PLANS: Final = 4096
#: Libraries that this build does not have; see ``torch.cuda.has_magma`` and
#: ``torch.version.hip``. Source: ``Context::setLinalgPreferredBackend`` of
#: ``aten/src/ATen/Context.cpp``.
_OTHERS: Final = {"Magma": "with MAGMA", "Ck": "for ROCm"}


def _setter(name: str) -> Callable[[Any], None]:
    def prefer(library: Any) -> None:
        other = _OTHERS.get(library.name)
        if other is not None:
            raise RuntimeError(
                f"Cannot set preferred backend to {library.name.upper()} if PyTorch has "
                f"not been compiled {other}."
            )
        current_machine().preferred[name] = library

    return prefer


def _getter(name: str) -> Callable[[], Any]:
    original: Callable[[], Any] = getattr(torch._C, name)
    of_setter = name.replace("_get", "_set")
    return lambda: current_machine().preferred.get(of_setter) or original()


#: Replacements in ``torch._C``.
C_LIBRARIES: Final[dict[str, Any]] = {
    f"_{action}_{kind}_preferred_backend": make(f"_{action}_{kind}_preferred_backend")
    for kind in ("linalg", "blas")
    for action, make in (("get", _getter), ("set", _setter))
}


def _set_plans(cache: Any, number: int) -> None:
    """Set how many plans a card may keep.

    Source: ``CuFFTParamsLRUCache::_set_max_size``.
    """
    if number < 0:
        raise RuntimeError(
            f"cuFFT plan cache size must be non-negative, but got {number}"
        )
    current_machine().preferred["plans", cache.device_index] = number


#: Replacements in the class of a card's cache of plans.
PLANS: Final[dict[str, Any]] = {
    "size": torch.backends.cuda.cuFFTPlanCacheAttrContextProp(
        lambda _index: 0,
        ".size is a read-only property showing the number of plans currently in the "
        "cache. To change the cache capacity, set cufft_plan_cache.max_size.",
    ),
    "max_size": property(
        lambda cache: current_machine().preferred.get(
            ("plans", cache.device_index), _PLANS
        ),
        _set_plans,
    ),
    "clear": lambda _cache: None,
}


def plan_caches() -> dict[str, Any]:
    """Return the object with a cache for each card; torch's own keeps its first count."""
    return {"cufft_plan_cache": cuFFTPlanCacheManager()}
