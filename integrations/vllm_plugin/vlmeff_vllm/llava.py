"""LLaVA-1.5 of vLLM with fewer visual tokens. Written from vLLM's sources and never run: treat it as a draft.

Three places have to agree on the number of a picture's tokens: the Hugging Face processor (placeholders in the prompt),
``get_num_image_tokens`` (the prompt update, profiling, the cache) and the features. All three ask the same contract,
which is read from the model's config, so that every process of an engine has the same.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.models import llava
from vllm.multimodal import MULTIMODAL_REGISTRY

from vlmeff.errors import UnsupportedInputError, UnsupportedModelError
from vlmeff_vllm.contract import Contract, grid_of, read_contract


def _contract(config: Any) -> Contract:
    contract = read_contract(getattr(config, "vlmeff", None))
    if hasattr(contract.method, "select"):
        raise UnsupportedModelError(
            "vlmeff: the count of HiPrune's tokens is settled (vlmeff_vllm.contract), but its scores are not read from "
            "vLLM's vision tower yet. Use the method fourier here, or transformers for HiPrune."
        )
    return contract


class VlmeffLlavaProcessingInfo(llava.LlavaProcessingInfo):
    def get_hf_processor(self, **kwargs: object) -> Any:
        config = self.get_hf_config()
        processor = super().get_hf_processor(**kwargs)
        strategy = config.vision_feature_select_strategy
        processor.num_additional_image_tokens = _contract(config).additional_tokens(grid_of(config), strategy)
        return processor

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        config = self.get_hf_config()
        return _contract(config).tokens(grid_of(config))


@MULTIMODAL_REGISTRY.register_processor(
    llava.LlavaMultiModalProcessor, info=VlmeffLlavaProcessingInfo, dummy_inputs=llava.LlavaDummyInputsBuilder
)
class VlmeffLlavaForConditionalGeneration(llava.LlavaForConditionalGeneration):
    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        self._grid, self._contract = grid_of(config), _contract(config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def _process_image_pixels(self, inputs: Any) -> torch.Tensor:
        features = super()._process_image_pixels(inputs)
        return self._contract.reduce(features, self._grid)

    def _process_image_input(self, image_input: Any) -> Any:
        if image_input["type"] == "image_embeds":
            raise UnsupportedInputError("vlmeff: pass pictures; embeddings have passed the place of the reduction.")
        return super()._process_image_input(image_input)
