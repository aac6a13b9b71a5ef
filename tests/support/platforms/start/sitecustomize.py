"""Imitate another system from the start of Python, where the environment names one."""

from __future__ import annotations

import importlib
import os

importlib.import_module(f"like_{os.environ['IMITATED_PLATFORM']}")
