"""Training of tiny-wan's transformer: the velocity of rectified flow on cached latents, with and without the prompt.

x_t = (1 - sigma) x_0 + sigma * noise, target noise - x_0, as ``FlowMatchEulerDiscreteScheduler`` integrates it;
sigma is drawn with the scheduler's own shift, so that training sees the noise levels that sampling visits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor

from vlmeff.models.tiny_wan import clips
from vlmeff.models.tiny_wan.architecture import FLOW_SHIFT, build_text_encoder, build_tokenizer
from vlmeff.models.tiny_wan.autoencoding import decode_unclamped
from vlmeff.models.tiny_wan.fitting import seeded

CAPTION_DROPOUT = 0.1
PADDING = (8, 512)  # text lengths that the pipeline may pad to


class PaddedText(WanAttnProcessor):
    """Cross-attention to a text whose last token stands for many: ``WanPipeline`` pads with zero vectors up to
    ``max_sequence_length`` and masks nothing, so n equal keys count as one key with log(n) added to its score.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bias: Tensor | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.bias, rotary_emb)


def share_padding(transformer: WanTransformer3DModel) -> PaddedText:
    """Give every cross-attention one processor; setting its ``bias`` sets the length that texts are padded to."""
    processor = PaddedText()
    for block in transformer.blocks:
        block.attn2.set_processor(processor)
    return processor


def restore_padding(transformer: WanTransformer3DModel) -> None:
    for block in transformer.blocks:
        block.attn2.set_processor(WanAttnProcessor())


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Embedded prompts: ``states`` [P + 1, L, D] with the empty prompt last, zero after each ``lengths`` [P + 1].

    The last of the L places is always zero: it stands for all the padding behind.
    """

    states: Tensor
    lengths: Tensor

    def bias(self, rows: Tensor, padded_to: int) -> Tensor:
        """[B, 1, 1, L] added to the scores: log of how many keys the last place stands for."""
        length = self.states.shape[1]
        bias = torch.zeros(len(rows), 1, 1, length)
        bias[..., -1] = float(np.log(padded_to - (length - 1)))
        return bias


@torch.no_grad()
def embed_prompts() -> Texts:
    """All prompts and the empty one, as ``WanPipeline.encode_prompt`` embeds them."""
    tokenizer, encoder = build_tokenizer(), build_text_encoder()
    inputs = tokenizer([*clips.prompts(), ""], padding=True, return_tensors="pt")
    mask = inputs.attention_mask
    states = encoder(inputs.input_ids, mask).last_hidden_state * mask[..., None]
    pad = torch.zeros(len(states), 1, states.shape[-1])
    return Texts(states=torch.cat([states, pad], 1), lengths=mask.sum(1))


def shifted_sigmas(count: int, generator: torch.Generator, shift: float = FLOW_SHIFT) -> Tensor:
    """[count] noise levels in (0, 1): one uniform draw per stratum, then the shift, by default the scheduler's."""
    uniform = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return shift * uniform / (1 + (shift - 1) * uniform)


@torch.no_grad()
def channel_weights(vae: AutoencoderKLWan, latents: Tensor, std: list[float], clips_used: int = 6) -> Tensor:
    """[C] with mean 1: how far the picture moves (root mean square) when a normalized channel moves.

    The VAE leaves some channels nearly unused; normalized, they would weigh as much as those that draw the shape.

    Args:
        latents: [N, C, T', H', W'] as the VAE gives them.  std: their standard deviation by channel.
    """
    some = latents[:clips_used]
    base = decode_unclamped(vae, some)
    moved = []
    for channel, scale in enumerate(std):
        noise = torch.randn(some[:, channel].shape, generator=seeded(channel))
        other = some.clone()
        other[:, channel] += 0.3 * scale * noise
        moved.append((decode_unclamped(vae, other) - base).square().mean().sqrt())
    weights = torch.stack(moved)
    return weights / weights.mean()


def flow_step(
    transformer: WanTransformer3DModel,
    padding: PaddedText,
    latents: Tensor,
    texts: Texts,
    step: int,
    seed: int,
    *,
    batch: int,
    weights: Tensor | None = None,
) -> tuple[Tensor, str]:
    """The loss of one step.

    Args:
        latents: [N, C, T', H', W'] normalized; number i belongs to prompt i % 48.
        weights: [C] of the channels' squared errors. With them, every other step draws noise levels without shift:
            a shape's outline is settled where little noise is left.
    """
    generator = seeded(seed, 21 if weights is None else 22, step)
    rows = torch.randint(len(latents), (batch,), generator=generator)
    clean = latents[rows]
    noise = torch.randn(clean.shape, generator=generator)
    sigma = shifted_sigmas(batch, generator, FLOW_SHIFT if weights is None or step % 2 else 1.0)
    kinds = len(texts.states) - 1
    dropped = torch.rand(batch, generator=generator) < CAPTION_DROPOUT
    prompt = torch.where(dropped, kinds, rows % kinds)
    low, high = np.log(PADDING)
    padded_to = round(float(np.exp(low + (high - low) * torch.rand((), generator=generator).item())))
    padding.bias = texts.bias(prompt, padded_to)
    level = sigma.view(-1, 1, 1, 1, 1)
    noisy = (1 - level) * clean + level * noise
    velocity = transformer(noisy, sigma * 1000, texts.states[prompt], return_dict=False)[0]
    squared = (velocity - (noise - clean)).square().mean((0, 2, 3, 4))
    return (squared if weights is None else squared * weights).mean(), ""
