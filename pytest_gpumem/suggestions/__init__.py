"""Limits that a suite could have: how much, and where."""
