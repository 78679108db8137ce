"""vlmeff: vision-language models that cost less to run, called as before.

``model = vlmeff.wrap(model, preset="fast")``; ``vlmeff.report(model)`` says what the last call did;
``vlmeff.unwrap(model)`` gives the model back. Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tokenpruning import Downsample, HiPrune, Random
    from vlmeff.errors import VlmeffError
    from vlmeff.loading import load
    from vlmeff.reporting import Report, report
    from vlmeff.wrapping import is_wrapped, presets, unwrap, wrap

_HOMES = {
    "Downsample": "tokenpruning",
    "HiPrune": "tokenpruning",
    "Random": "tokenpruning",
    "Report": "vlmeff.reporting",
    "VlmeffError": "vlmeff.errors",
    "is_wrapped": "vlmeff.wrapping",
    "load": "vlmeff.loading",
    "presets": "vlmeff.wrapping",
    "report": "vlmeff.reporting",
    "unwrap": "vlmeff.wrapping",
    "wrap": "vlmeff.wrapping",
}

__all__ = [
    "Downsample",
    "HiPrune",
    "Random",
    "Report",
    "VlmeffError",
    "__version__",
    "is_wrapped",
    "load",
    "presets",
    "report",
    "unwrap",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'vlmeff' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
