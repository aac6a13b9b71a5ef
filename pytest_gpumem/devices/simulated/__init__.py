"""The simulated CUDA device: what "cuda" means on a machine without a GPU."""
