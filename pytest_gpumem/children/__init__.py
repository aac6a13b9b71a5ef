"""Child processes of a run: they get its device, budgets and rules, and report peaks.

Note [How a child is reached]
The wheel puts ``pytest_gpumem_child.pth`` beside the package. Python runs its one line
at the start of every process of that environment; it looks at one environment variable
and does nothing where that is not set. Where the file is not installed (the package is
used from a folder on the path), the run puts ``shim`` on ``PYTHONPATH`` instead, whose
``sitecustomize`` does the same and then lets the environment's own one have its turn.
"""
