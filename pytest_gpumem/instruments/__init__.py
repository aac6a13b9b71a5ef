"""Instruments: context managers on a device, each for one purpose, which can be nested."""

# torch is imported before anything else. Hooks that run when torch is imported use this
# package, so none of its modules may be half imported at that moment.
import torch  # noqa: F401
