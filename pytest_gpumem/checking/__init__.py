"""The whole battery on a loader that a project already has."""
