"""vlmeff: vision-language models that cost less to run, called as before.

``model = vlmeff.wrap(model, preset="fast")``; ``vlmeff.report(model)`` says what the last call did;
``vlmeff.unwrap(model)`` gives the model back. Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kvcache import (
        H2O,
        TOVA,
        KNorm,
        PrefixKV,
        PyramidKV,
        RandomKV,
        Recipe,
        SnapKV,
        StreamingLLM,
        VLCache,
        convert_official,
        read_recipe,
    )
    from kvcache.cache import RetainedCache
    from tokenpruning import (
        AdaptInfer,
        DivPrune,
        Downsample,
        Fourier,
        HiPrune,
        HiPrunePlus,
        PerFrame,
        Random,
        Schedule,
        Scope,
        TextTopK,
        VisionZip,
    )
    from vlmeff.diffusion.plan import Quant
    from vlmeff.drawing import Overlay, overlays
    from vlmeff.errors import VlmeffError
    from vlmeff.loading import load
    from vlmeff.planning import Forecast, plan
    from vlmeff.reporting import Report, report
    from vlmeff.shared import ManyAnswers, ask_many
    from vlmeff.speculative.assistant import Assistant
    from vlmeff.speculative.continuous import Continuous
    from vlmeff.speculative.lookup import Lookup
    from vlmeff.speculative.recycle import Recycle
    from vlmeff.speculative.text import TextSpeculation
    from vlmeff.speculative.text_report import TextStatistics
    from vlmeff.vlm.calibrate_kv import calibrate_prefixkv
    from vlmeff.vlm.clips import select_clips
    from vlmeff.vlm.relevance import EmbeddingText, OpenClipText, TowerText
    from vlmeff.wrapping import is_wrapped, presets, unwrap, wrap

_HOMES = {
    "AdaptInfer": "tokenpruning",
    "Assistant": "vlmeff.speculative.assistant",
    "Continuous": "vlmeff.speculative.continuous",
    "DivPrune": "tokenpruning",
    "Downsample": "tokenpruning",
    "EmbeddingText": "vlmeff.vlm.relevance",
    "Forecast": "vlmeff.planning",
    "Fourier": "tokenpruning",
    "H2O": "kvcache",
    "HiPrune": "tokenpruning",
    "HiPrunePlus": "tokenpruning",
    "KNorm": "kvcache",
    "Lookup": "vlmeff.speculative.lookup",
    "ManyAnswers": "vlmeff.shared",
    "OpenClipText": "vlmeff.vlm.relevance",
    "Overlay": "vlmeff.drawing",
    "PerFrame": "tokenpruning",
    "PrefixKV": "kvcache",
    "PyramidKV": "kvcache",
    "Quant": "vlmeff.diffusion.plan",
    "Random": "tokenpruning",
    "RandomKV": "kvcache",
    "Recipe": "kvcache",
    "Recycle": "vlmeff.speculative.recycle",
    "Report": "vlmeff.reporting",
    "RetainedCache": "kvcache.cache",
    "Schedule": "tokenpruning",
    "Scope": "tokenpruning",
    "SnapKV": "kvcache",
    "StreamingLLM": "kvcache",
    "TOVA": "kvcache",
    "TextSpeculation": "vlmeff.speculative.text",
    "TextStatistics": "vlmeff.speculative.text_report",
    "TextTopK": "tokenpruning",
    "TowerText": "vlmeff.vlm.relevance",
    "VLCache": "kvcache",
    "VisionZip": "tokenpruning",
    "VlmeffError": "vlmeff.errors",
    "ask_many": "vlmeff.shared",
    "calibrate_prefixkv": "vlmeff.vlm.calibrate_kv",
    "convert_official": "kvcache",
    "is_wrapped": "vlmeff.wrapping",
    "load": "vlmeff.loading",
    "overlays": "vlmeff.drawing",
    "plan": "vlmeff.planning",
    "presets": "vlmeff.wrapping",
    "read_recipe": "kvcache",
    "report": "vlmeff.reporting",
    "select_clips": "vlmeff.vlm.clips",
    "unwrap": "vlmeff.wrapping",
    "wrap": "vlmeff.wrapping",
}

__all__ = [
    "H2O",
    "TOVA",
    "AdaptInfer",
    "Assistant",
    "Continuous",
    "DivPrune",
    "Downsample",
    "EmbeddingText",
    "Forecast",
    "Fourier",
    "HiPrune",
    "HiPrunePlus",
    "KNorm",
    "Lookup",
    "ManyAnswers",
    "OpenClipText",
    "Overlay",
    "PerFrame",
    "PrefixKV",
    "PyramidKV",
    "Quant",
    "Random",
    "RandomKV",
    "Recipe",
    "Recycle",
    "Report",
    "RetainedCache",
    "Schedule",
    "Scope",
    "SnapKV",
    "StreamingLLM",
    "TextSpeculation",
    "TextStatistics",
    "TextTopK",
    "TowerText",
    "VLCache",
    "VisionZip",
    "VlmeffError",
    "__version__",
    "ask_many",
    "calibrate_prefixkv",
    "convert_official",
    "is_wrapped",
    "load",
    "overlays",
    "plan",
    "presets",
    "read_recipe",
    "report",
    "select_clips",
    "unwrap",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'vlmeff' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
