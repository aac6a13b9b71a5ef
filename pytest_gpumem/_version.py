"""The version of pytest-gpumem, as it was built from the repository's tag."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("pytest-gpumem")
except PackageNotFoundError:  # imported from its folder, without an installation
    __version__ = "unknown"
