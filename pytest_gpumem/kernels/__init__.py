"""Memory that CUDA's kernels and cuBLAS take for themselves while they run, by shape."""
