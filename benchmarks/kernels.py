"""Measure every op of ``vlmeff.ops``: ``python benchmarks/kernels.py --help``. The work is done in ``kernels_run.py``.

Hugging Face publishes a package of this file's name, and transformers and diffusers look for it. When any script of
this folder runs, the folder comes first on ``sys.path``, and they find this file: it then steps aside for the installed
package, or for an empty module, which they take for "not installed".
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def installed() -> ModuleType:
    """The package ``kernels`` from anywhere but this folder, or an empty module."""
    here = Path(__file__).resolve().parent
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    spec = importlib.machinery.PathFinder.find_spec("kernels", elsewhere)
    if spec is None or spec.loader is None or spec.origin is None:  # without an origin it is a plain folder
        nothing = ModuleType("kernels")
        nothing.__spec__ = importlib.machinery.ModuleSpec("kernels", None)
        return nothing
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernels"] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    from kernels_run import main

    main()
else:
    sys.modules["kernels"] = installed()
