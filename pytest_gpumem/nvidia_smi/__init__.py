"""``nvidia-smi`` for simulated cards: it shows people and programs their memory.

Note [How a program finds it]
A run on simulated cards puts ``bin`` first on ``PATH``, for itself and its children. The
program there reads the settings that the run passes to its children (``inheritance``) and
the bytes that the processes on each card have noted (``tenancy``). It imports no torch.
"""
