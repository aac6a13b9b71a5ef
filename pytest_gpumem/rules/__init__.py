"""Injection rules: which allocations fail. Pure Python."""
