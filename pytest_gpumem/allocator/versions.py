"""The differences between the allocators of PyTorch's versions, in one table.

Everything else is modelled as in torch 2.13, see ``docs/versions.md``. Source: the
responses of ``torch._C`` to settings, and the messages in ``libc10.so`` and
``libc10_cuda.so``, in the CUDA wheels of torch 2.8.0, 2.9.1, 2.10.0, 2.11.0, 2.12.0,
2.13.0, 2.14.1 and 2.15.0. The behaviour of graphs and the lines of assertions are those
in ``tests/recordings/captures.json.xz``, recorded with 2.13.0, 2.14.1 and 2.15.0 on the
substitute runtime (``tests/cuda_host``). The effect of a memory fraction of 1.0, and
what can be read from a generator during a capture, were observed there with 2.8.0,
2.9.1, 2.10.0 and 2.14.1.
"""

from __future__ import annotations

import re
from enum import Enum, auto
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Final, NamedTuple

_HELP: Final = (
    " If reserved but unallocated memory is large try setting {variable}="
    "expandable_segments:True to avoid fragmentation.  See documentation for Memory "
    "Management  ({page})"
)
_OLD_PAGE: Final = (
    "https://pytorch.org/docs/stable/notes/cuda.html#environment-variables"
)
_PAGE: Final = (
    "https://docs.pytorch.org/docs/stable/notes/cuda.html"
    "#optimizing-memory-usage-with-pytorch-cuda-alloc-conf"
)
#: Source: torch 2.15, where segments grow.
_EXPANDABLE_HELP: Final = (
    " expandable_segments is enabled. If instead the process is running out of virtual "
    "address space (VSZ), expandable segments may be over-reserving VA (each segment "
    "reserves ~9/8 of device memory, times the number of streams); reduce it via "
    "PYTORCH_CUDA_ALLOC_CONF expandable_segments_reserve / "
    "expandable_segments_reserve_by_class."
)
#: Source: ``get_cuda_check_suffix`` of ``c10/cuda/CUDAMiscFunctions.cpp``, and
#: ``get_cuda_async_error_suffix`` from torch 2.13 on.
_LATER: Final = (
    "CUDA kernel errors might be asynchronously reported at some other API call, so the "
    "stacktrace below might be incorrect.\n"
    "For debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
)
_ASSERTIONS: Final = (
    "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)
_LOG: Final = "For more detailed error information, run with CUDA_LOG_FILE=stderr\n"
_OF_CUDA: Final = "PYTORCH_CUDA_ALLOC_CONF"
_OF_ALL: Final = "PYTORCH_ALLOC_CONF"


class Asserts(NamedTuple):
    """Messages of PyTorch's internal assertions, which name a line of its source.

    Attributes:
        pool_is_used: A pool gets a user again, but still has segments without one.
        pool_exists: A pool is released that does not exist.
        capture_status: Memory is requested in a capture that has failed.
        no_capture: A capture ends that did not begin.
    """

    pool_is_used: str
    pool_exists: str
    capture_status: str
    no_capture: str


def _asserts(
    pool_is_used: int, pool_exists: int, capture_status: int, no_capture: str
) -> Asserts:
    """Return the messages, from the lines of ``CUDACachingAllocator.cpp``.

    Args:
        pool_is_used: The line of that assertion.
        pool_exists: The line of that assertion.
        capture_status: The line of that assertion.
        no_capture: The message of that assertion.
    """
    file = "CUDACachingAllocator.cpp"
    return Asserts(
        _failed("it->second->use_count > 0", file, pool_is_used),
        _failed("it != graph_pools.end()", file, pool_exists),
        _failed(
            "info.status != cudaStreamCaptureStatusInvalidated",
            file,
            capture_status,
            "Invalid stream capture status",
        ),
        no_capture,
    )


def _failed(condition: str, file: str, line: int, text: str = "") -> str:
    """Return the message of a failed assertion. Source: ``TORCH_INTERNAL_ASSERT``."""
    place = f"/__w/pytorch/pytorch/c10/cuda/{file}"
    return (
        f'{condition} INTERNAL ASSERT FAILED at "{place}":{line}, please report a bug to '
        f"PyTorch. {text}"
    )


def _no_mark(line: int) -> str:
    return _failed(
        "num_active_captures_ > 0",
        "CUDACachingAllocator.cpp",
        line,
        "markCaptureEnd called with no captures in progress",
    )


class StateHolder(Enum):
    """Who owns the memory for the state of a generator that a captured graph uses."""

    #: The generator, as long as a graph exists with which it is registered.
    GENERATOR = auto()
    #: Each graph; it takes memory for each registered generator when its capture begins.
    CAPTURE = auto()
    #: Each graph; it takes memory at the first draw in its capture.
    DRAW = auto()


class AllocatorVersion(NamedTuple):
    """The properties that the allocator has from one version on.

    Attributes:
        since: The first version with these properties.
        help: The last sentences of the out-of-memory message.
        expandable_help: The same where segments grow page by page.
        variables: The environment variables for settings; the first that is set is used.
        least_megabytes: The smallest ``max_split_size_mb`` and
            ``max_non_split_rounding_mb``.
        unknown_key: The message for an unknown key.
        explains_errors: Whether the message of an error of CUDA's runtime has a line
            that explains the error.
        error_end: The last lines of that message.
        kernel_error_end: The same for an error that a kernel can cause.
        keeps_workspaces: Whether cuBLAS's workspaces are kept for the next product if
            ``TORCH_CUBLAS_WORKSPACE_CACHE`` does not say so.
        generator_states: Who owns the memory for the state of a generator in graphs.
        releases_failed_captures: Whether a graph whose capture failed releases its
            pool.
        hides_seeds: Whether the seed of a generator can neither be read nor set in a capture.
        names_whole_fraction: Whether a memory fraction of 1.0 that was set is a limit.
        asserts: Messages of internal assertions.
    """

    since: tuple[int, int]
    help: str
    expandable_help: str
    variables: tuple[str, ...]
    least_megabytes: int
    unknown_key: str
    explains_errors: bool
    error_end: str
    kernel_error_end: str
    keeps_workspaces: bool
    generator_states: StateHolder
    releases_failed_captures: bool
    hides_seeds: bool
    names_whole_fraction: bool
    asserts: Asserts


_OLDEST: Final = AllocatorVersion(
    since=(2, 8),
    help=_HELP.format(variable=_OF_CUDA, page=_OLD_PAGE),
    expandable_help=_HELP.format(variable=_OF_CUDA, page=_OLD_PAGE),
    variables=(_OF_CUDA,),
    least_megabytes=21,
    unknown_key="Unrecognized CachingAllocator option: {key}",
    explains_errors=False,
    error_end=_LATER + _ASSERTIONS,
    kernel_error_end=_LATER + _ASSERTIONS,
    keeps_workspaces=True,
    generator_states=StateHolder.GENERATOR,
    releases_failed_captures=False,
    hides_seeds=True,
    names_whole_fraction=True,
    asserts=_asserts(3332, 3340, 2213, _no_mark(3211)),  # the lines of torch 2.13
)
_THAT_EXPLAINS_ERRORS: Final = _OLDEST._replace(since=(2, 9), explains_errors=True)
#: ``c10/core/AllocatorConfig.cpp`` reads the settings, no longer CUDA's own code.
_WITH_A_COMMON_READER: Final = _THAT_EXPLAINS_ERRORS._replace(
    since=(2, 10),
    help=_HELP.format(variable=_OF_ALL, page=_OLD_PAGE),
    expandable_help=_HELP.format(variable=_OF_ALL, page=_OLD_PAGE),
    variables=(_OF_ALL, _OF_CUDA),
    least_megabytes=20,
    unknown_key="Unrecognized key '{key}' in Accelerator allocator config.",
    hides_seeds=False,
    names_whole_fraction=False,
)
_WITH_A_NEW_PAGE: Final = _WITH_A_COMMON_READER._replace(
    since=(2, 11),
    help=_HELP.format(variable=_OF_CUDA, page=_PAGE),
    expandable_help=_HELP.format(variable=_OF_CUDA, page=_PAGE),
)
_WITH_A_LOG: Final = _WITH_A_NEW_PAGE._replace(
    since=(2, 13),
    error_end=_LOG,
    kernel_error_end=_LATER,
    generator_states=StateHolder.CAPTURE,
)
_WITH_NEW_GRAPHS: Final = _WITH_A_LOG._replace(
    since=(2, 14),
    error_end="",
    generator_states=StateHolder.DRAW,
    releases_failed_captures=True,
    asserts=_asserts(3329, 3337, 2214, _no_mark(3209)),
)
#: All versions with differences, from the oldest to the newest.
VERSIONS: Final = (
    _OLDEST,
    _THAT_EXPLAINS_ERRORS,
    _WITH_A_COMMON_READER,
    _WITH_A_NEW_PAGE,
    _WITH_A_NEW_PAGE._replace(since=(2, 12)),
    _WITH_A_LOG,
    _WITH_NEW_GRAPHS,
    _WITH_NEW_GRAPHS._replace(
        since=(2, 15),
        expandable_help=_EXPANDABLE_HELP,
        keeps_workspaces=False,
        asserts=_asserts(
            3473,
            3481,
            2362,
            _failed(
                "active_captures_ > 0",
                "CUDAGraphMemory.cpp",
                12,
                "captureEnd called with no active capture",
            ),
        ),
    ),
)
#: The newest version that knows every setting.
NEWEST: Final = VERSIONS[-1]
#: Settings that older versions do not know, and the first version that knows each.
SETTINGS_SINCE: Final = {
    "graph_capture_record_stream_reuse": (2, 9),
    "per_process_memory_fraction": (2, 10),
    "pinned_reserve_segment_size_mb": (2, 10),
    "large_segment_size_mb": (2, 11),
    "pinned_free_catch_all": (2, 12),
    "throw_on_cudamalloc_oom": (2, 12),
    "pinned_max_round_threshold_mb": (2, 13),
    "pinned_max_cached_size_mb": (2, 13),
    "expandable_segments_reserve": (2, 15),
    "expandable_segments_reserve_by_class": (2, 15),
}


def version_of(text: str) -> AllocatorVersion:
    """Return the properties of a torch version in the format of ``torch.__version__``."""
    numbers = re.match(r"([0-9]+)\.([0-9]+)", text)
    if numbers is None:
        return NEWEST
    which = (int(numbers[1]), int(numbers[2]))
    older = [each for each in VERSIONS if each.since <= which]
    return older[-1] if older else VERSIONS[0]


@cache
def installed_version() -> AllocatorVersion:
    """Return the properties of the installed torch; of the newest if there is none.

    They are kept, because reading the version parses all of torch's metadata.
    """
    try:
        return version_of(version("torch"))
    except PackageNotFoundError:
        return NEWEST
