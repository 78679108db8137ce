"""The entry point ``lmms_eval.models``: how lmms-eval learns that ``--model vlmeff`` exists.

lmms-eval loads all entry points of the group in one ``try``: one that raises takes every other plug-in with it. So
nothing is imported here before lmms-eval asks, torch and the models not even then, and nothing may raise.
"""

from __future__ import annotations

from typing import Any

MODEL_ID = "vlmeff"
CHAT_CLASS = "vlmeff.integrations.lmms_model.VlmeffChat"
SIMPLE_CLASS = "vlmeff.integrations.lmms_model.VlmeffSimple"


def manifests() -> list[Any]:
    """The ``ModelManifest`` of ``vlmeff``; [] for a version of lmms-eval without manifests of this form."""
    try:
        from lmms_eval.models.registry_v2 import ModelManifest

        manifest = ModelManifest(
            model_id=MODEL_ID, chat_class_path=CHAT_CLASS, simple_class_path=SIMPLE_CLASS, aliases=("vlm_eff",)
        )
    except (ImportError, TypeError, ValueError):
        return []
    return [manifest]
