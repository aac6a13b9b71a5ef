"""The simulated CUDA device: what "cuda" means on a machine without a GPU."""

# First of all: the hooks that wait for torch install this package,
# and must not meet it half imported.
import torch  # noqa: F401
