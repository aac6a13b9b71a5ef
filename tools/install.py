"""Run pip install, with PyTorch's build for CPUs if its index can be reached.

The project's tests need no GPU. Most package indices have PyTorch's build for CUDA only,
which takes 5 GB of disk with all it needs; PyTorch's own index has one for CPUs, which
takes 1.5 GB. If that index answers, it is passed to pip; otherwise pip runs without it.

    python tools/install.py OPTION ... REQUIREMENT ...

It needs nothing but Python and pip.
"""

from __future__ import annotations

import re
import subprocess
import sys
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

INDEX: Final = "https://download.pytorch.org/whl/cpu"
#: How long the index has to answer, in seconds.
PATIENCE_S: Final = 5.0


def answers(index: str, *, timeout_s: float = PATIENCE_S) -> bool:
    """Tell whether an index has PyTorch and can be reached, as pip would."""
    try:
        with urllib.request.urlopen(f"{index}/torch/", timeout=timeout_s):  # noqa: S310  # it is https
            return True
    except urllib.error.HTTPError as error:
        error.close()
        return False
    except (OSError, ValueError):
        return False


def command(
    arguments: Sequence[str], has: Callable[[str], bool] = answers
) -> tuple[list[str], str]:
    """Return what to run, and what to say before it.

    Args:
        arguments: What pip gets.
        has: Whether an index answers; it is asked only if PyTorch is to be installed.
    """
    pip = [sys.executable, "-I", "-m", "pip", "install", *arguments]
    if not any(re.match(r"torch\b(?!-)", each) for each in arguments):
        return pip, ""
    if has(INDEX):
        # A version with "+cpu" is newer to pip than the same one without.
        return [*pip, "--extra-index-url", INDEX], f"PyTorch's build for CPUs: {INDEX}"
    return pip, (
        f"{INDEX} does not answer: PyTorch comes from pip's own index, where it is "
        "most often the build for CUDA (2.9 GB to download, 5 GB of disk)"
    )


def main() -> int:
    """Install what the command line names; return pip's exit code."""
    line, words = command(sys.argv[1:])
    if words:
        sys.stderr.write(f"{words}\n")
    return subprocess.run(line, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
