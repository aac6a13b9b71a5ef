"""Instruments: one concern each, stackable context managers on a device."""

# First of all: the hooks that wait for torch use this package,
# and must not meet it half imported.
import torch  # noqa: F401
