"""Who holds what of this machine's cards, across processes, and who waits for it.

Pure Python without torch or pytest. Each entry is a file that its process keeps locked;
the kernel drops the lock when the process dies, however it dies, and so the entry.
"""
