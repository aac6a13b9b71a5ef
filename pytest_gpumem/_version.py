"""The version of pytest-gpumem."""

__version__ = "0.1.0"
