"""Limits and what is said of a broken one hold for every kind of test."""

from __future__ import annotations

import pytest
import torch  # noqa: F401  # inner runs in this process must find it imported
from ways import WAYS, each_way

pytest_plugins = ["pytester"]

TESTS = '''
    import asyncio
    import unittest
    import pytest
    import torch

    attempts = []

    def take(mib):
        """Take some.

        >>> take(1)
        >>> take(3)
        """
        torch.zeros(mib * 2**18, device="cuda")

    @pytest.fixture
    def anyio_backend():
        return "asyncio"

    @pytest.mark.anyio
    async def test_async():
        await asyncio.sleep(0)
        take(3)

    class TestUnit(unittest.TestCase):
        def test_unit(self):
            take(3)

        def test_small(self):
            take(1)

    @pytest.mark.parametrize("mib", [1, 3])
    def test_many(mib):
        take(mib)

    @pytest.mark.flaky(reruns=1)
    def test_second_attempt():
        attempts.append(1)
        take(3 if len(attempts) == 1 else 1)

    @pytest.mark.flaky(reruns=1)
    def test_another_error():
        attempts.append(1)
        if attempts.count(1) % 2:
            take(3)
        else:
            raise ValueError("another")

    def test_in_a_thread():
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor() as pool:
            pool.submit(take, 3).result()
'''


@pytest.mark.parametrize("way", each_way())
def test_every_kind_of_test_is_held_to_its_limit(
    way: str, pytester: pytest.Pytester
) -> None:
    """Async, unittest, parameters, doctests, threads; a rerun begins anew."""
    pytester.makepyfile(test_it=TESTS.replace("attempts.count(1) % 2", "first()"))
    (pytester.path / "test_it.py").write_text(
        (pytester.path / "test_it.py").read_text(encoding="utf-8")
        + "\n\nfirsts = []\ndef first():\n    firsts.append(1)\n"
        "    return len(firsts) == 1\n",
        encoding="utf-8",
    )
    result = pytester.runpytest(
        "-p",
        "no:cacheprovider",
        *WAYS[way],
        "--gpu-max-vram=2MiB",
        "--doctest-modules",
    )

    counts = result.parseoutcomes()
    assert (3, 6, 2) == tuple(counts[each] for each in ("passed", "failed", "rerun"))
    names = (
        "test_async*",
        "TestUnit::test_unit",
        "test_many[[]3]",
        "test_in_a_thread",
        "test_it.take",
    )
    result.stdout.fnmatch_lines_random(
        [
            *(f"OVER VRAM LIMIT test_it.py::{name} - *" for name in names),
            "FAILED test_it.py::test_another_error - ValueError: another",
            "the limit of 2 MiB allocated was broken on cuda:0 (*",
        ]
    )
