"""``nvidia-smi`` for simulated cards: people and programs ask it about memory.

Note [How a program finds it]
A run on simulated cards puts ``bin`` first on ``PATH``, for itself and its children. The
program there reads what the run says to its children (``inheritance``) and what the
processes on each card have noted (``tenancy``); it imports no torch.
"""
