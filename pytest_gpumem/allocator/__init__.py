"""A pure-Python model of PyTorch's CUDA caching allocator and of the CUDA driver."""
