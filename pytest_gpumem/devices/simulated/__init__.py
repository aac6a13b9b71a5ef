"""The simulated CUDA device, which "cuda" means on a machine without a GPU."""

# This must be the first import: the hooks that wait for torch install this package,
# and must not find it partly imported.
import torch  # noqa: F401
