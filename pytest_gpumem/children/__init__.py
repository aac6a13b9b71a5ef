"""Child processes of a run: they get its device, budgets and rules, and report peaks.

Note [How a child is reached]
The wheel installs ``pytest_gpumem_child.pth`` beside the package. Python runs the one line
of this file at the start of every process of the environment. The line reads one
environment variable and does nothing if it is not set. If the package is used from a
folder on the path, the file is not installed. The run then puts ``shim`` on
``PYTHONPATH``. The ``sitecustomize`` in ``shim`` does the same as the file, and then runs
the environment's own ``sitecustomize``.
"""
