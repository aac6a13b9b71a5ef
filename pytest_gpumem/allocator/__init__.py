"""PyTorch's CUDA caching allocator and the driver below it, in pure Python."""
