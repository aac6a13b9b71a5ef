"""The commands of ``pytest-gpumem`` on reports, baselines and loaders."""
