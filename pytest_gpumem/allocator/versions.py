"""The differences between the allocators of PyTorch's versions, in one table.

Everything else is modelled as in torch 2.13, see ``docs/versions.md``. Source: the
responses of ``torch._C`` to settings, and the messages in ``libc10.so`` and
``libc10_cuda.so``, in the CUDA wheels of torch 2.8.0, 2.9.1, 2.10.0 and 2.13.0.
"""

from __future__ import annotations

import re
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
_OF_CUDA: Final = "PYTORCH_CUDA_ALLOC_CONF"
_OF_ALL: Final = "PYTORCH_ALLOC_CONF"


class AllocatorVersion(NamedTuple):
    """The properties that the allocator has from one version on.

    Attributes:
        since: The first version with these properties.
        help: The last sentences of the out-of-memory message.
        variables: The environment variables for settings; the first that is set is used.
        least_megabytes: The smallest ``max_split_size_mb`` and
            ``max_non_split_rounding_mb``.
        unknown_key: The message for an unknown key.
    """

    since: tuple[int, int]
    help: str
    variables: tuple[str, ...]
    least_megabytes: int
    unknown_key: str


_OLDEST: Final = AllocatorVersion(
    since=(2, 8),
    help=_HELP.format(variable=_OF_CUDA, page=_OLD_PAGE),
    variables=(_OF_CUDA,),
    least_megabytes=21,
    unknown_key="Unrecognized CachingAllocator option: {key}",
)
#: ``c10/core/AllocatorConfig.cpp`` reads the settings, no longer CUDA's own code.
_WITH_A_COMMON_READER: Final = AllocatorVersion(
    since=(2, 10),
    help=_HELP.format(variable=_OF_ALL, page=_OLD_PAGE),
    variables=(_OF_ALL, _OF_CUDA),
    least_megabytes=20,
    unknown_key="Unrecognized key '{key}' in Accelerator allocator config.",
)
#: All versions with differences, from the oldest to the newest.
VERSIONS: Final = (
    _OLDEST,
    _OLDEST._replace(since=(2, 9)),
    _WITH_A_COMMON_READER,
    _WITH_A_COMMON_READER._replace(
        since=(2, 11), help=_HELP.format(variable=_OF_CUDA, page=_PAGE)
    ),
)
NEWEST: Final = VERSIONS[-1]
#: Settings that older versions do not know, and the first version that knows each.
SETTINGS_SINCE: Final = {
    "graph_capture_record_stream_reuse": (2, 9),
    "per_process_memory_fraction": (2, 10),
    "pinned_reserve_segment_size_mb": (2, 10),
    "large_segment_size_mb": (2, 11),
}


def version_of(text: str) -> AllocatorVersion:
    """Return the properties of a torch version in the format of ``torch.__version__``."""
    numbers = re.match(r"([0-9]+)\.([0-9]+)", text)
    if numbers is None:
        return NEWEST
    which = (int(numbers[1]), int(numbers[2]))
    older = [each for each in VERSIONS if each.since <= which]
    return older[-1] if older else VERSIONS[0]


def installed_version() -> AllocatorVersion:
    """Return the properties of the installed torch; of the newest if there is none."""
    try:
        return version_of(version("torch"))
    except PackageNotFoundError:
        return NEWEST
