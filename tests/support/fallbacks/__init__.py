"""Fallbacks to be judged: broken ones as they are found in the wild, and correct ones."""
