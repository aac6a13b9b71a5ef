"""Keeps account, among processes, of who holds or waits for bytes of this machine's cards.

It is pure Python without torch or pytest. Each entry is a file that its process keeps
locked. When the process ends, for whatever reason, the kernel releases the lock, and the
entry is no longer valid.
"""
