"""The temporary memory of CUDA's kernels and of cuBLAS, computed from the shapes."""
