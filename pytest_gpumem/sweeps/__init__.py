"""Sweeps: make each allocation of a body fail in turn, judge each run, report results."""
