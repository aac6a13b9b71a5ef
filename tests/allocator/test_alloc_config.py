"""Settings of the allocator are read, or refused, as torch does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpumem.allocator.config import AllocatorConfig

MIB = 2**20


@pytest.mark.parametrize(
    ("text", "attribute", "value"),
    [
        ("max_split_size_mb:64", "max_split_size", 64 * MIB),
        ("max_non_split_rounding_mb:40", "max_non_split_rounding", 40 * MIB),
        ("large_segment_size_mb:64", "large_segment_size", 64 * MIB),
        ("garbage_collection_threshold:0.6", "gc_threshold", 0.6),
        ("per_process_memory_fraction:0.5", "memory_fraction", 0.5),
        ("roundup_power2_divisions:8", "divisions", (8,) * 16),
        (
            "roundup_power2_divisions:[256:1,512:2,1024:4,>:8]",
            "divisions",
            (1,) * 9 + (2, 4) + (8,) * 5,
        ),
        (
            "roundup_power2_divisions:[64:2,256:4]",
            "divisions",
            (2,) * 7 + (0, 4) + (0,) * 7,
        ),
        ("expandable_segments:True", "expandable_segments", True),
        ("expandable_segments:False", "expandable_segments", False),
        ("throw_on_cudamalloc_oom:False", "gc_threshold", 0.0),
        ("backend:native, pinned_num_register_threads:4", "gc_threshold", 0.0),
    ],
)
def test_settings_are_read(text: str, attribute: str, value: object) -> None:
    """Each key of PYTORCH_CUDA_ALLOC_CONF sets its value."""
    assert value == getattr(AllocatorConfig.parse(text), attribute)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_split_size_mb:19", "must be >= 20"),
        ("garbage_collection_threshold:1.0", "above 0 and below 1"),
        ("per_process_memory_fraction:2", "between 0 and 1"),
        ("per_process_memory_fraction:-0.5", "between 0 and 1"),
        ("per_process_memory_fraction:x", "between 0 and 1"),
        ("roundup_power2_divisions:3", "power of 2"),
        ("expandable_segments:true", "Expected 'True' or 'False'"),
        ("throw_on_cudamalloc_oom:1", "Expected 'True' or 'False'"),
        ("throw_on_cudamalloc_oom:True", "not modelled"),
        ("max_non_split_rounding_mb:19", "must be >= 20"),
        ("large_segment_size_mb:10", "must be >= 11"),
        ("garbage_collection_threshold:0", "above 0 and below 1"),
        ("garbage_collection_threshold:nan", "between 0 and 1"),
        ("roundup_power2_divisions:[256:3]", "power of 2"),
        ("roundup_power2_divisions:[300:2]", "power of 2"),
        ("large_segment_size_mb:64,max_split_size_mb:20", "must be >= 64"),
        ("backend:cudaMallocAsync", "not modelled"),
        ("speed:11", "Unrecognized key 'speed'"),
        ("max_split_size_mb", "has no value"),
    ],
)
def test_bad_settings_are_refused(text: str, message: str) -> None:
    """What torch refuses, or the model does not know, raises at once."""
    with pytest.raises(ValueError, match=message):
        AllocatorConfig.parse(text)


def test_no_text_is_the_defaults() -> None:
    """An empty text, and empty parts, set nothing."""
    assert AllocatorConfig() == AllocatorConfig.parse("")
    assert AllocatorConfig(text=",") == AllocatorConfig.parse(",")


def test_settings_are_separated_by_commas() -> None:
    """Several keys hold together; commas inside brackets belong to the list."""
    config = AllocatorConfig.parse(
        "max_split_size_mb:32,roundup_power2_divisions:[1:2,>:4],"
        "garbage_collection_threshold:0.8"
    )

    assert 32 * MIB == config.max_split_size
    assert (2, *(4,) * 15) == config.divisions
    assert 0.8 == config.gc_threshold


@given(st.text(alphabet="expandblsgmt_:,[]>0123456789.TrueFalse ", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    """No text makes the reading fail in any other way than ValueError."""
    try:
        config = AllocatorConfig.parse(text)
    except ValueError:
        return

    assert text == config.text


def test_a_division_beyond_the_table_is_its_last() -> None:
    """As PyTorch takes it."""
    config = AllocatorConfig.parse("roundup_power2_divisions:[1:2,1048576:4]")

    assert 2 == config.divisions[0]
    assert 4 == config.divisions[-1]
    assert {0} == set(config.divisions[1:-1])


def test_without_settings_no_block_is_too_large_to_split() -> None:
    """The bound is PyTorch's own: as many bytes as there can be."""
    assert 2**64 - 1 == AllocatorConfig.parse("").max_split_size
    assert 20 * MIB == AllocatorConfig.parse("").max_non_split_rounding
