"""Sweeps: fail each allocation of a body in turn, judge each run, report what was found."""
