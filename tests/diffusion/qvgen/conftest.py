"""The toy stands beside the tests; an import by name needs the folder on the path."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def _load_toy():
    name = "qvgen_toy"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("toy.py"))
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)


_load_toy()
