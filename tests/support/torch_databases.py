"""PyTorch's own test databases, without what importing them does to the process.

They take seconds to import; who needs them only now and then imports this late.
"""

from __future__ import annotations

import torch
from torch.testing._internal import common_utils
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.testing._internal.common_optimizers import optim_db
from torch.testing._internal.opinfo import core

# ``common_utils`` calls ``torch.backends.disable_global_flags``, for the whole process.
torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True

# For each iterator of samples it reads the sources of the whole stack, to find a
# ``unittest.TestCase`` that names a seed. There is none here.
for _module in (common_utils, core):
    vars(_module)["extract_test_fn"] = lambda: None

__all__ = ["module_db", "op_db", "optim_db"]
