"""Experimental plug-in of vLLM; see README.md. It has not been run with vLLM."""

from __future__ import annotations

ARCHITECTURE = "VlmeffLlavaForConditionalGeneration"
CLASS = "vlmeff_vllm.llava:VlmeffLlavaForConditionalGeneration"


def register() -> None:
    """Tell vLLM of the architecture. vLLM calls this in each of its processes, perhaps more than once.

    The class is named, not imported: that would initialise CUDA before vLLM forks. vLLM's own LLaVA stays as it is.
    """
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, CLASS)
