"""``MAR``: the masked autoregressive transformer (arXiv 2406.11838), with the official parameter names.

It differs from the official class in that rows of a batch may have different numbers of visible tokens: speculation
verifies several prefixes of one picture at once. With equal numbers no mask is built.
"""

# R rows, L positions, B buffer positions, V visible tokens of the longest row, D token dim, E encoder dim,
# Dd decoder dim, H heads

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmeff.errors import ConfigError
from vlmeff.models.mar.codec import Codec, make_codec
from vlmeff.models.mar.config import MARConfig
from vlmeff.models.mar.head import DiffusionHead
from vlmeff.models.mar.patchify import patchify, unpatchify

if TYPE_CHECKING:
    from vlmeff.models.mar.sampling import NoiseBank
    from vlmeff.speculative.statistics import Stats

INIT_STD = 0.02
EPS = 1e-6


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """x [R, S, E]; keys [R, 1, 1, S] bool, the positions that may be looked at."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=keys, dropout_p=dropout)
        return F.dropout(self.proj(mixed.transpose(1, 2).flatten(2)), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.dropout(F.gelu(self.fc1(x)), self.dropout, self.training)
        return F.dropout(self.fc2(hidden), self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm ViT block: x + attn(norm1(x)), then + mlp(norm2(.))."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = Attention(dim, heads, dropout)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = MLP(dim, int(dim * mlp_ratio), dropout)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), keys)
        return x + self.mlp(self.norm2(x))


@dataclass(frozen=True, eq=False)
class MAROutput:
    """``latents`` [B, L, D] float32; ``images`` [B, C, H, W] in [-1, 1], None without a codec; ``stats``."""

    latents: Tensor
    images: Tensor | None
    stats: Stats


class MAR(nn.Module):
    """A class-conditional image generator: ``model.sample(labels)``.

    ``codec`` turns latents into pictures. It follows the model to devices and dtypes but is no submodule (it stands in
    a list): official state dicts have no VAE, and a strict load must not ask for one.
    """

    def __init__(self, config: MARConfig, codec: Codec | None = None) -> None:
        super().__init__()
        self.config = config
        self._codec: list[Codec | None] = [codec if codec is not None else make_codec(config)]
        encoder, decoder = config.encoder_dim, config.decoder_dim
        whole = config.seq_len + config.buffer_size
        self.class_emb = nn.Embedding(config.class_num, encoder)
        self.fake_latent = nn.Parameter(torch.zeros(1, encoder))
        self.z_proj = nn.Linear(config.token_dim, encoder)
        self.z_proj_ln = nn.LayerNorm(encoder, eps=EPS)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, whole, encoder))
        self.encoder_blocks = nn.ModuleList(
            Block(encoder, config.encoder_heads, config.mlp_ratio, config.dropout) for _ in range(config.encoder_depth)
        )
        self.encoder_norm = nn.LayerNorm(encoder, eps=EPS)
        self.decoder_embed = nn.Linear(encoder, decoder)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, whole, decoder))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder, config.decoder_heads, config.mlp_ratio, config.dropout) for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder, eps=EPS)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, config.seq_len, decoder))
        self.diffloss = DiffusionHead(config)
        self.initialize()

    def initialize(self) -> None:
        """Fresh weights, drawn as by the official code."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for name in ("fake_latent", "mask_token", "encoder_pos_embed_learned", "decoder_pos_embed_learned"):
            nn.init.normal_(getattr(self, name), std=INIT_STD)
        nn.init.normal_(self.diffusion_pos_embed_learned, std=INIT_STD)
        nn.init.normal_(self.class_emb.weight, std=INIT_STD)
        self.diffloss.net.initialize()

    @property
    def device(self) -> torch.device:
        return self.fake_latent.device

    @property
    def dtype(self) -> torch.dtype:
        return self.fake_latent.dtype

    @property
    def head(self) -> DiffusionHead:
        return self.diffloss

    @property
    def codec(self) -> Codec | None:
        return self._codec[0]

    def use_codec(self, codec: Codec | None) -> MAR:
        """Decode latents with this codec, for example a ``KL16``; returns the model."""
        self._codec[0] = codec.to(self.device, self.dtype) if isinstance(codec, nn.Module) else codec
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> MAR:
        if isinstance(self.codec, nn.Module):
            self.codec._apply(fn, recurse)
        return super()._apply(fn, recurse)

    # -- the trunk ----------------------------------------------------------------------------------------------------

    def class_embedding(self, labels: Tensor | None, batch: int) -> Tensor:
        """[batch, E]: of the labels [batch], or of no class where ``labels`` is None.

        Raises:
            ConfigError: not ``batch`` labels, or one outside [0, class_num).
        """
        if labels is None:
            return self.fake_latent.expand(batch, -1)
        labels = torch.as_tensor(labels, device=self.device)
        if labels.ndim != 1 or labels.shape[0] != batch:
            raise ConfigError(f"labels: {tuple(labels.shape)} labels for a batch of {batch}; give one for each sample.")
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise ConfigError(f"labels: dtype {labels.dtype} must be an integer one.")
        wrong = labels[(labels < 0) | (labels >= self.config.class_num)]
        if wrong.numel():
            raise ConfigError(f"labels: {int(wrong[0])} is not a class; they lie in [0, {self.config.class_num}).")
        return self.class_emb(labels)

    def trunk(self, tokens: Tensor, visible: Tensor, class_embedding: Tensor) -> Tensor:
        """What the head needs to know of every position: z [R, L, Dd] in the model's dtype.

        Args:
            tokens: [R, L, D]; what stands at positions that are not visible never reaches the model.
            visible: [R, L] bool, the tokens that exist.  class_embedding: [R, E].
        """
        encoded, order, counts = self._encode(tokens, visible, class_embedding)
        return self._decode(encoded, order, counts)

    def _encode(self, tokens: Tensor, visible: Tensor, class_embedding: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Encoded buffer and visible tokens [R, B + V, E], the positions [R, V] they came from, and the numbers [R] of
        real ones among them, None where all rows have V."""
        rows, buffer = tokens.shape[0], self.config.buffer_size
        counts = visible.sum(1)
        fewest, longest = (int(n) for n in torch.aminmax(counts)) if rows else (0, 0)
        # Visible tokens first, in the order of their positions.
        order = (~visible).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
        chosen = tokens.to(self.dtype).gather(1, order[..., None].expand(-1, -1, tokens.shape[-1]))
        ragged, keys = longest != fewest, None
        if ragged:
            real = torch.arange(longest, device=chosen.device) < counts[:, None]
            keys = torch.cat([real.new_ones(rows, buffer), real], 1)[:, None, None]
            # A masked key still has a value, and 0 times an infinite one is NaN.
            chosen = chosen.masked_fill(~real[..., None], 0.0)
        positions = self.encoder_pos_embed_learned[0]
        body = self.z_proj(chosen) + positions[buffer:][order]
        front = class_embedding.to(self.dtype)[:, None] + positions[:buffer]
        x = self.z_proj_ln(torch.cat([front, body], 1))
        for block in self.encoder_blocks:
            x = block(x, keys)
        return self.encoder_norm(x), order, counts if ragged else None

    def _decode(self, encoded: Tensor, order: Tensor, counts: Tensor | None) -> Tensor:
        buffer, rows = self.config.buffer_size, encoded.shape[0]
        embedded = self.decoder_embed(encoded)
        width = embedded.shape[-1]
        body = embedded[:, buffer:]
        mask = self.mask_token.to(embedded.dtype)
        if counts is not None:
            real = torch.arange(order.shape[1], device=order.device) < counts[:, None]
            # Padding lies at positions that are not visible: they get the mask token, which is what they are.
            body = torch.where(real[..., None], body, mask)
        whole = mask.expand(rows, self.config.seq_len, width)
        whole = whole.scatter(1, order[..., None].expand(-1, -1, width), body)
        x = torch.cat([embedded[:, :buffer], whole], 1) + self.decoder_pos_embed_learned
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, buffer:] + self.diffusion_pos_embed_learned

    # -- generation ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        labels: Tensor | list[int] | int | None = None,
        *,
        num_iter: int | None = None,
        cfg: float = 1.0,
        cfg_schedule: str = "linear",
        temperature: float = 1.0,
        seed: int = 0,
        batch: int | None = None,
        order: Tensor | None = None,
        noise: NoiseBank | None = None,
        mode: Any = None,
        draft: MAR | None = None,
    ) -> MAROutput:
        """Draw pictures of classes.

        A sample depends on (weights, label, seed + its number in the batch) and the arguments, not on its batch mates.

        Args:
            labels: [B] classes, or one; None draws without a class.
            num_iter: K steps of the transformer, at most L; None is L, one token a step. Fewer are faster and worse.
            cfg: weight of classifier-free guidance; 1 does without it.  cfg_schedule: "linear" or "constant".
            temperature: of the denoising noise.  seed: sample b uses seed + b.
            batch: how many; needed only without labels.
            order: [B, L] positions in the order of generation.  noise: to be used instead of the seed's.
            mode: None decodes plainly; a ``vlmeff.Continuous`` or the name of one of its presets decodes speculatively.
            draft: of modes that need one.
        Raises:
            ConfigError: an argument cannot work.  FloatingPointError: a latent is not finite.
        """
        if isinstance(labels, int):
            labels = [labels] * (batch or 1)
        chosen = None if labels is None else torch.as_tensor(labels, device=self.device)
        call: dict[str, Any] = {
            **{"num_iter": num_iter, "cfg": cfg, "cfg_schedule": cfg_schedule, "temperature": temperature},
            **{"seed": seed, "batch": batch, "order": order, "noise": noise},
        }
        if mode is None:
            from vlmeff.models.mar.sampling import plain

            latents, stats = plain(self, chosen, **call)
        else:
            from vlmeff.speculative.continuous import Continuous, decode

            config = Continuous.named(mode) if isinstance(mode, str) else mode
            latents, stats = decode(self, draft, chosen, config=config, **call)
        return MAROutput(latents, self.decode_latents(latents), stats)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor | None:
        """Pictures [B, C, H, W] in [-1, 1] of latents [B, L, D]; None without a codec."""
        if self.codec is None:
            return None
        config = self.config
        grid = unpatchify(latents.float(), config.patch_size, config.seq_h, config.seq_w)
        return self.codec.decode(grid / config.latent_scale + config.latent_shift).float().clamp(-1, 1)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Latents [B, L, D] of pictures [B, C, H, W] in [-1, 1].

        Raises:
            ConfigError: the model has no codec.
        """
        if self.codec is None:
            raise ConfigError(
                "encode_images: the model has no codec; give it one: model.use_codec(load_vae('kl16.ckpt'))."
            )
        sample = self.codec.encode(images)
        return patchify((sample - self.config.latent_shift) * self.config.latent_scale, self.config.patch_size)
