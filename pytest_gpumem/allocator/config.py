"""Settings of the caching allocator, in the syntax of ``PYTORCH_CUDA_ALLOC_CONF``."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from typing import Any, Final

from pytest_gpumem.allocator.versions import (
    NEWEST,
    SETTINGS_SINCE,
    AllocatorVersion,
    installed_version,
)
from pytest_gpumem.errors import AllocatorSettingError

MIB: Final = 2**20
#: "No limit", as torch stores it (``std::numeric_limits<size_t>::max()``).
UNLIMITED: Final = 2**64 - 1
#: Entries of the table of divisions: one for each power of two from 1 MiB to 32 GiB.
NUM_DIVISIONS: Final = 16
_NUMBER: Final = re.compile(r"[0-9]{1,12}")
#: Keys that do not change the allocator's byte counts. They are accepted, and their
#: values are not read.
_WITHOUT_EFFECT: Final = frozenset(
    {
        "release_lock_on_cudamalloc",
        "release_lock_on_hipmalloc",
        "pinned_use_cuda_host_register",
        "pinned_use_hip_host_register",
        "pinned_num_register_threads",
        "pinned_reserve_segment_size_mb",
        "pinned_free_catch_all",
        "pinned_max_cached_size_mb",
        "pinned_max_round_threshold_mb",
        "expandable_segments_reserve",
        "expandable_segments_reserve_by_class",
        "pinned_use_background_threads",
        "graph_capture_record_stream_reuse",
    }
)


@dataclass(frozen=True, slots=True)
class AllocatorConfig:
    """Settings of one allocator; the defaults are PyTorch's.

    Source: ``c10/core/AllocatorConfig.h`` and ``c10/cuda/CUDAAllocatorConfig.h``,
    torch 2.13.

    Attributes:
        text: The text from which the settings were read.
        max_split_size: Blocks of at least this many bytes are never split.
        max_non_split_rounding: The most bytes by which a block that is never split may be
            larger than the request.
        large_segment_size: Bytes of a segment for requests between 1 MiB and 10 MiB.
        divisions: Number of rounding steps between two powers of two, for each power of
            two from 1 MiB on; 0 means rounding to 512 bytes.
        gc_threshold: Share of the limit from which unused blocks are returned to the
            driver; 0 means never.
        memory_fraction: Memory fraction that applies from the start; None means no limit.
        expandable_segments: Whether segments grow page by page.
        version: The PyTorch version whose allocator is modelled.
    """

    text: str = ""
    max_split_size: int = UNLIMITED
    max_non_split_rounding: int = 20 * MIB
    large_segment_size: int = 20 * MIB
    divisions: tuple[int, ...] = (0,) * NUM_DIVISIONS
    gc_threshold: float = 0.0
    memory_fraction: float | None = None
    expandable_segments: bool = False
    version: AllocatorVersion = NEWEST

    @classmethod
    def parse(cls, text: str, version: AllocatorVersion = NEWEST) -> AllocatorConfig:
        """Read settings.

        Args:
            text: ``key:value,…`` as in ``PYTORCH_CUDA_ALLOC_CONF``.
            version: The PyTorch version whose allocator is modelled.

        Raises:
            ValueError: Torch refuses a key or value, or the model does not support it.
        """
        return _read_all(cls(text=text, version=version))

    def renewed(self, text: str) -> AllocatorConfig:
        """Return the settings that hold after new ones are set while torch runs.

        Source: ``AcceleratorAllocatorConfig::parseArgs`` of
        ``c10/core/AllocatorConfig.cpp``: three settings return to their defaults if the
        text does not name them; the others keep their values.

        Args:
            text: ``key:value,…`` as in ``PYTORCH_CUDA_ALLOC_CONF``.

        Raises:
            ValueError: Torch refuses a key or value, or the model does not support it.
        """
        default = AllocatorConfig()
        start = replace(
            self,
            max_split_size=default.max_split_size,
            divisions=default.divisions,
            gc_threshold=default.gc_threshold,
        )
        return _read_all(replace(start, text=text))


def _read_all(config: AllocatorConfig) -> AllocatorConfig:
    """Return the settings with the values from their text."""
    # A comma inside brackets separates the entries of a list, not two settings.
    for part in re.split(r",(?![^\[]*\])", config.text):
        if not part.strip():
            continue
        key, colon, value = (piece.strip() for piece in part.partition(":"))
        if not colon:
            raise ValueError(f"allocator setting {part!r} has no value")
        config = replace(config, **_read(key, value, config))
    return config


def _variable() -> str | None:
    """Return the environment variable that has settings for the installed torch."""
    names = installed_version().variables
    return next((each for each in names if os.environ.get(each)), None)


def config_text() -> str:
    """Return the text of the settings in the environment; empty if there are none."""
    name = _variable()
    return "" if name is None else os.environ[name]


def config_from_environment() -> AllocatorConfig:
    """Return the settings in the environment, as the installed torch reads them.

    Raises:
        AllocatorSettingError: The settings cannot be read, or the model does not support
            them.
    """
    text = config_text()
    try:
        return AllocatorConfig.parse(text, installed_version())
    except ValueError as error:
        raise AllocatorSettingError(f"{_variable()}={text!r}: {error}") from None


def _megabytes(key: str, value: str, lowest: int) -> int:
    if not _NUMBER.fullmatch(value) or int(value) < lowest:
        raise ValueError(
            f"CachingAllocator option {key} too small, must be >= {lowest}, got {value!r}"
        )
    return int(value) * MIB


def _fraction(key: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{key} must be between 0 and 1, got {value!r}")
    return number


def _read(  # noqa: C901, PLR0911, PLR0912  # one branch per key
    key: str, value: str, config: AllocatorConfig
) -> dict[str, Any]:
    version = config.version
    if version.since < SETTINGS_SINCE.get(key, version.since):
        raise ValueError(version.unknown_key.format(key=key))
    if key == "max_split_size_mb":
        lowest = max(version.least_megabytes, config.large_segment_size // MIB)
        return {"max_split_size": _megabytes(key, value, lowest)}
    if key == "max_non_split_rounding_mb":
        return {
            "max_non_split_rounding": _megabytes(key, value, version.least_megabytes)
        }
    if key == "large_segment_size_mb":
        return {"large_segment_size": _megabytes(key, value, 11)}
    if key == "garbage_collection_threshold":
        threshold = _fraction(key, value)
        if threshold in (0.0, 1.0):
            raise ValueError(f"{key} must be above 0 and below 1, got {value!r}")
        return {"gc_threshold": threshold}
    if key == "per_process_memory_fraction":
        return {"memory_fraction": _fraction(key, value)}
    if key == "expandable_segments":
        if value not in ("True", "False"):
            raise ValueError(f"Expected 'True' or 'False' for {key}, got {value!r}")
        return {"expandable_segments": value == "True"}
    if key == "roundup_power2_divisions":
        return {"divisions": _divisions(value)}
    if key == "backend":
        if value != "native":
            raise ValueError(f"allocator backend {value!r} is not modelled; use native")
        return {}
    if key in _WITHOUT_EFFECT:
        return {}
    if key == "throw_on_cudamalloc_oom":
        if value not in ("True", "False"):
            raise ValueError(f"Expected 'True' or 'False' for {key}, got {value!r}")
        if value == "True":
            raise ValueError(f"{key}:True is not modelled; use False")
        return {}
    raise ValueError(version.unknown_key.format(key=key))


def _power_of_two(value: str) -> int:
    if not _NUMBER.fullmatch(value) or int(value).bit_count() != 1:
        raise ValueError(
            f"For roundups, the divisions has to be power of 2, got {value!r}"
        )
    return int(value)


def _divisions(value: str) -> tuple[int, ...]:
    """Read ``4`` or ``[256:1,512:2,>:4]``: steps by megabytes.

    The first entry of a list also applies to every smaller power of two. A power between
    two entries keeps 0. The entry ``>`` applies to every power above the last entry.
    """
    if not value.startswith("["):
        return (_power_of_two(value),) * NUM_DIVISIONS
    table = [0] * NUM_DIVISIONS
    last = 0
    for position, part in enumerate(value.strip("[]").split(",")):
        size, _colon, steps = (piece.strip() for piece in part.partition(":"))
        number = _power_of_two(steps)
        if size == ">":
            table[last:] = [number] * (NUM_DIVISIONS - last)
            break
        index = min(max(_power_of_two(size).bit_length() - 1, 0), NUM_DIVISIONS - 1)
        if position == 0:
            table[:index] = [number] * index
        table[index] = number
        last = index + 1
    return tuple(table)
