"""The version of pytest-gpumem, as it was built from the repository's tag."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("pytest-gpumem")
except PackageNotFoundError:  # its folder is on the path, and it is not installed
    __version__ = "unknown"
