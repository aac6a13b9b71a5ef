"""Tells whether a model fits on a card, and what takes the memory, by simulation."""
