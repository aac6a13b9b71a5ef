"""The model: allocator, rules and records, in pure Python without torch or pytest."""
