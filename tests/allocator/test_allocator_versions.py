"""What differs between the allocators of PyTorch's versions."""

from __future__ import annotations

import pytest

from pytest_gpumem.allocator.config import AllocatorConfig
from pytest_gpumem.allocator.versions import NEWEST, version_of

#: What torch itself answers to a setting, by version; None where it takes it.
OLD = "Unrecognized CachingAllocator option: {}"
NEW = "Unrecognized key '{}' in Accelerator allocator config."
ANSWERS = [
    ("2.8.0+cu128", "nonsense", "1", OLD),
    ("2.9.1+cu128", "nonsense", "1", OLD),
    ("2.10.0+cu128", "nonsense", "1", NEW),
    ("2.13.0", "nonsense", "1", NEW),
    ("2.9.1", "max_split_size_mb", "20", "option {} too small"),
    ("2.9.1", "max_split_size_mb", "21", None),
    ("2.9.1", "max_non_split_rounding_mb", "20", "option {} too small"),
    ("2.10.0", "max_split_size_mb", "20", None),
    ("2.10.0", "max_non_split_rounding_mb", "20", None),
    ("2.8.0", "graph_capture_record_stream_reuse", "True", OLD),
    ("2.9.1", "graph_capture_record_stream_reuse", "True", None),
    ("2.9.1", "per_process_memory_fraction", "0.5", OLD),
    ("2.10.0", "per_process_memory_fraction", "0.5", None),
    ("2.9.1", "pinned_reserve_segment_size_mb", "4", OLD),
    ("2.10.0", "pinned_reserve_segment_size_mb", "4", None),
    ("2.10.0", "large_segment_size_mb", "64", NEW),
    ("2.11.0", "large_segment_size_mb", "64", None),
    ("2.11.0", "pinned_free_catch_all", "True", NEW),
    ("2.12.0", "pinned_free_catch_all", "True", None),
    ("2.11.0", "throw_on_cudamalloc_oom", "False", NEW),
    ("2.12.0", "throw_on_cudamalloc_oom", "False", None),
    ("2.12.0", "pinned_max_cached_size_mb", "8", NEW),
    ("2.13.0", "pinned_max_cached_size_mb", "8", None),
    ("2.14.1", "expandable_segments_reserve", "0.5", NEW),
    ("2.15.0", "expandable_segments_reserve", "0.5", None),
]


@pytest.mark.parametrize(("version", "key", "value", "answer"), ANSWERS)
def test_a_setting_is_taken_as_that_version_does(
    version: str, key: str, value: str, answer: str | None
) -> None:
    """Its keys, its smallest values and its words."""
    found = None
    try:
        AllocatorConfig.parse(f"{key}:{value}", version_of(version))
    except ValueError as error:
        found = str(error)

    assert (answer is None) is (found is None)
    assert answer is None or answer.format(key) in str(found)


@pytest.mark.parametrize(
    ("version", "variable", "page"),
    [
        ("2.8.0", "PYTORCH_CUDA_ALLOC_CONF", "//pytorch.org/"),
        ("2.9.1", "PYTORCH_CUDA_ALLOC_CONF", "//pytorch.org/"),
        ("2.10.0", "PYTORCH_ALLOC_CONF", "//pytorch.org/"),
        ("2.11.0", "PYTORCH_CUDA_ALLOC_CONF", "//docs.pytorch.org/"),
        ("2.15.0", "PYTORCH_CUDA_ALLOC_CONF", "//docs.pytorch.org/"),
    ],
)
def test_the_text_ends_as_that_versions(version: str, variable: str, page: str) -> None:
    """With its name of the variable and its address of the page."""
    words = version_of(version).help

    assert f"setting {variable}=expandable_segments:True" in words
    assert f"https:{page}" in words


def test_torch_2_15_speaks_of_addresses_where_segments_grow() -> None:
    """Older ones advise what is done already."""
    old, new = version_of("2.14.1"), version_of("2.15.0")

    assert old.expandable_help == old.help == new.help
    assert new.expandable_help.startswith(" expandable_segments is enabled. If instead")


@pytest.mark.parametrize(
    ("version", "explains", "end", "kernel_end"),
    [
        ("2.8.0", False, "device-side assertions.\n", "device-side assertions.\n"),
        ("2.12.0", True, "device-side assertions.\n", "device-side assertions.\n"),
        ("2.13.0", True, "CUDA_LOG_FILE=stderr\n", "CUDA_LAUNCH_BLOCKING=1\n"),
        ("2.14.1", True, "", "CUDA_LAUNCH_BLOCKING=1\n"),
        ("2.15.0", True, "", "CUDA_LAUNCH_BLOCKING=1\n"),
    ],
)
def test_errors_of_the_runtime_end_as_that_versions(
    version: str,
    explains: bool,  # noqa: FBT001  # a parameter of the test
    end: str,
    kernel_end: str,
) -> None:
    """What 2.13.0, 2.14.1 and 2.15.0 said on the substitute runtime, the others' files."""
    found = version_of(version)

    assert found.explains_errors is explains
    assert found.error_end[-len(end) :] == end if end else not found.error_end
    assert found.kernel_error_end.endswith(kernel_end)


def test_versions_between_and_beyond_have_the_nearest_older_one() -> None:
    """One older than all has the oldest, one that cannot be read the newest."""
    assert (2, 8) == version_of("1.13.1").since
    assert (2, 10) == version_of("2.10.1").since
    assert NEWEST == version_of("3.0") == version_of("unknown")
