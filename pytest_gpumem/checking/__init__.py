"""Runs all checks on a loader that a project already has."""
