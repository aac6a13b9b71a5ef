"""Baselines: reviewed and committed peaks, and the comparison with them."""
