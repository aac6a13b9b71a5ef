"""Limits that a suite could have: how much, where, and as a patch."""
