"""Tells, by simulation, whether a model fits on a card and what takes the memory."""
