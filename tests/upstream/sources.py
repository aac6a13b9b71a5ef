"""Get released sources, as they are, from the package index."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from suites import Suite


def unpacked(suite: Suite, cache: Path) -> Path:
    """Return the folder of a release's source, which is fetched if it is not there.

    Args:
        suite: Whose distribution and version.
        cache: The folder of all sources.

    Raises:
        CalledProcessError: pip could not fetch it.
        ValueError: It is not the archive that ``suite.sha256`` names.
    """
    name = f"{suite.distribution}-{suite.version}"
    home = cache / name
    if home.exists():
        return home
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        wanted = [f"--no-binary={suite.distribution}", f"--dest={folder}"]
        release = f"{suite.distribution}=={suite.version}"
        subprocess.run([*pip, *wanted, release], check=True)
        (archive,) = Path(folder).glob("*.tar.gz")
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != suite.sha256:
            raise ValueError(
                f"{archive.name} has the SHA-256 {found}; {suite.sha256} is expected. "
                "Look at what has changed in the index, and at suites.py"
            )
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
        (Path(folder) / name).rename(home)
    return home
