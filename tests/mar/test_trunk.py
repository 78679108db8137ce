"""The transformer: official names and sizes, blocks of timm as the oracle, ragged rows."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn

from vlmeff.errors import CheckpointError, ConfigError, UnknownNameError
from vlmeff.models.mar.config import MARConfig
from vlmeff.models.mar.trunk import MAR

SMALL = MARConfig.named("mar_nano_digits", decoder_dim=48, decoder_depth=2, encoder_depth=2, head_width=24)
CLOSE = 1e-5  # float32, other shapes of the same products


def model(config: MARConfig = SMALL, seed: int = 0) -> MAR:
    torch.manual_seed(seed)
    made = MAR(config).eval()
    for parameter in made.parameters():  # fresh norms and modulations are trivial
        parameter.data += 0.05 * torch.randn_like(parameter)
    return made


def inputs(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(rows, SMALL.seq_len, SMALL.token_dim, generator=generator)
    share = torch.linspace(0, 1, rows)[:, None]
    visible = torch.rand(rows, SMALL.seq_len, generator=generator) < share
    return tokens, visible, torch.randn(rows, SMALL.encoder_dim, generator=generator)


@pytest.mark.parametrize(
    ("name", "total", "head", "entries"),
    [
        ("mar_base", 207_924_768, 35_749_920, 364),
        ("mar_large", 478_326_304, 72_230_432, 476),
        ("mar_huge", 942_403_104, 151_206_944, 604),
        ("mar_tiny_digits", 509_480, None, None),
        ("mar_nano_digits", 74_312, None, None),
    ],
)
def test_parameter_counts_are_the_official_ones(name, total, head, entries):
    with torch.device("meta"):
        made = MAR(MARConfig.named(name))
    assert sum(p.numel() for p in made.parameters()) == total
    assert head is None or sum(p.numel() for p in made.diffloss.parameters()) == head
    assert entries is None or len(made.state_dict()) == entries


@pytest.mark.parametrize("name", ["mar_base", "mar_large", "mar_huge", "mar_tiny_digits"])
def test_names_and_shapes_are_the_official_ones(name):
    c = MARConfig.named(name)
    length, e, d, w, n = c.seq_len, c.encoder_dim, c.decoder_dim, c.head_width, c.token_dim
    expected = {
        "class_emb.weight": (c.class_num, e),
        "fake_latent": (1, e),
        "mask_token": (1, 1, d),
        "encoder_pos_embed_learned": (1, length + c.buffer_size, e),
        "decoder_pos_embed_learned": (1, length + c.buffer_size, d),
        "diffusion_pos_embed_learned": (1, length, d),
    }

    def add(prefix: str, out: int, into: int | None = None) -> None:
        expected[f"{prefix}.weight"] = (out,) if into is None else (out, into)
        expected[f"{prefix}.bias"] = (out,)

    add("z_proj", e, n)
    add("z_proj_ln", e)
    add("encoder_norm", e)
    add("decoder_norm", d)
    add("decoder_embed", d, e)
    for part, width, depth in (("encoder", e, c.encoder_depth), ("decoder", d, c.decoder_depth)):
        for i in range(depth):
            block = f"{part}_blocks.{i}"
            add(f"{block}.norm1", width)
            add(f"{block}.attn.qkv", 3 * width, width)
            add(f"{block}.attn.proj", width, width)
            add(f"{block}.norm2", width)
            add(f"{block}.mlp.fc1", 4 * width, width)
            add(f"{block}.mlp.fc2", width, 4 * width)
    net = "diffloss.net"
    add(f"{net}.time_embed.mlp.0", w, 256)
    add(f"{net}.time_embed.mlp.2", w, w)
    add(f"{net}.cond_embed", w, d)
    add(f"{net}.input_proj", w, n)
    for j in range(c.head_depth):
        add(f"{net}.res_blocks.{j}.in_ln", w)
        add(f"{net}.res_blocks.{j}.mlp.0", w, w)
        add(f"{net}.res_blocks.{j}.mlp.2", w, w)
        add(f"{net}.res_blocks.{j}.adaLN_modulation.1", 3 * w, w)
    add(f"{net}.final_layer.linear", 2 * n, w)
    add(f"{net}.final_layer.adaLN_modulation.1", 2 * w, w)
    with torch.device("meta"):
        state = MAR(c).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == expected


class OfficialTrunk(nn.Module):
    """The published forward pass, of timm's blocks: rows must have equally many visible tokens."""

    def __init__(self, config: MARConfig, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.c, self.s = config, state
        e, d = config.encoder_dim, config.decoder_dim
        self.encoder_blocks = self._blocks("encoder_blocks", e, config.encoder_heads, config.encoder_depth)
        self.decoder_blocks = self._blocks("decoder_blocks", d, config.decoder_heads, config.decoder_depth)

    def _blocks(self, name: str, dim: int, heads: int, depth: int) -> nn.ModuleList:
        norm = partial(nn.LayerNorm, eps=1e-6)
        blocks = nn.ModuleList(Block(dim, heads, 4, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        blocks.load_state_dict({k[len(name) + 1 :]: v for k, v in self.s.items() if k.startswith(f"{name}.")})
        return blocks.eval()

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], self.s[f"{name}.weight"], self.s[f"{name}.bias"], 1e-6)

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self.s[f"{name}.weight"].T + self.s[f"{name}.bias"]

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        buffer, rows = self.c.buffer_size, len(tokens)
        x = torch.cat([classes[:, None].repeat(1, buffer, 1), self._linear(tokens, "z_proj")], 1)
        mask = torch.cat([torch.zeros(rows, buffer, dtype=torch.bool), mask], 1)
        x = self._norm(x + self.s["encoder_pos_embed_learned"], "z_proj_ln")
        x = x[~mask].view(rows, -1, x.shape[-1])
        for block in self.encoder_blocks:
            x = block(x)
        x = self._linear(self._norm(x, "encoder_norm"), "decoder_embed")
        whole = self.s["mask_token"].repeat(rows, mask.shape[1], 1)
        whole[~mask] = x.reshape(-1, x.shape[-1])
        x = whole + self.s["decoder_pos_embed_learned"]
        for block in self.decoder_blocks:
            x = block(x)
        return self._norm(x, "decoder_norm")[:, buffer:] + self.s["diffusion_pos_embed_learned"]


@torch.no_grad()
@pytest.mark.parametrize("seen", [0, 1, 7, 16])
def test_trunk_is_the_published_forward_pass_of_timm_blocks(seen):
    made = model()
    tokens, _, classes = inputs(3)
    ranks = torch.rand(3, 16, generator=torch.Generator().manual_seed(1)).argsort(1)
    visible = ranks < seen
    expected = OfficialTrunk(SMALL, made.state_dict())(tokens, ~visible, classes)
    torch.testing.assert_close(made.trunk(tokens, visible, classes), expected, atol=CLOSE, rtol=0)


@torch.no_grad()
def test_ragged_rows_are_the_rows_alone_and_follow_a_permutation():
    made = model()
    tokens, visible, classes = inputs(6)
    assert len(set(visible.sum(1).tolist())) > 3
    together = made.trunk(tokens, visible, classes)
    official = OfficialTrunk(SMALL, made.state_dict())
    for row in range(6):
        one = slice(row, row + 1)
        alone = official(tokens[one], ~visible[one], classes[one])
        torch.testing.assert_close(together[one], alone, atol=CLOSE, rtol=0)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    permuted = made.trunk(tokens[order], visible[order], classes[order])
    torch.testing.assert_close(permuted, together[order], atol=CLOSE, rtol=0)


@torch.no_grad()
def test_what_stands_at_hidden_positions_never_reaches_the_model():
    made = model()
    tokens, visible, classes = inputs(5)
    other = torch.where(visible[..., None], tokens, torch.full_like(tokens, float("nan")))
    assert torch.equal(made.trunk(other, visible, classes), made.trunk(tokens, visible, classes))


def test_dropout_is_of_training_only():
    made = model(MARConfig.named("mar_nano_digits", dropout=0.5))
    tokens, visible, _ = inputs(2)
    classes = made.class_embedding(torch.tensor([1, 2]), 2)
    assert torch.equal(made.trunk(tokens, visible, classes), made.trunk(tokens, visible, classes))
    made.train()
    assert not torch.equal(made.trunk(tokens, visible, classes), made.trunk(tokens, visible, classes))


def test_labels_that_cannot_work_are_named():
    made = model()
    assert torch.equal(made.class_embedding(None, 2), made.fake_latent.expand(2, -1))
    for labels, message in [
        (torch.tensor([3, 10]), r"10 is not a class; they lie in \[0, 10\)"),
        (torch.tensor([-1, 0]), "-1 is not a class"),
        (torch.tensor([1]), "for a batch of 2"),
        (torch.tensor([1.0, 2.0]), "float32"),
    ]:
        with pytest.raises(ConfigError, match=message):
            made.class_embedding(labels, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_heads": 5}, "encoder_dim=32 is not a multiple of encoder_heads=5"),
        ({"head_depth": 0}, "head_depth=0"),
        ({"patch_size": 3}, "img_size=8 is not a multiple"),
        ({"num_sampling_steps": 1001}, "num_sampling_steps=1001"),
        ({"clip_x0": 0.0}, "clip_x0=0.0"),
        ({"noise_schedule": "linear"}, "noise_schedule='linear'"),
        ({"codec": "vq"}, "codec='vq'"),
        ({"latent_scale": 0.0}, "latent_scale=0.0"),
        ({"width": 3}, "no field 'width'"),
    ],
)
def test_configurations_that_cannot_work_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        MARConfig.named("mar_nano_digits", **changes)


def test_configuration_survives_a_dictionary():
    config = MARConfig.named("mar_tiny_digits")
    assert MARConfig.from_dict(config.to_dict()) == config
    assert (config.seq_len, config.token_dim) == (16, 4)
    base = MARConfig.named("mar_base")
    assert (base.seq_len, base.token_dim, base.head_depth, base.head_width) == (256, 16, 6, 1024)
    with pytest.raises(CheckpointError, match="no field 'x'"):
        MARConfig.from_dict(config.to_dict() | {"x": 1})
    with pytest.raises(UnknownNameError, match="mar_base"):
        MARConfig.named("mar_bass")


def test_pictures_survive_the_tokens():
    made = model()
    pictures = torch.rand(3, 1, 8, 8) * 2 - 1
    latents = made.encode_images(pictures)
    assert latents.shape == (3, 16, 4)
    # Token 1 is the second patch of the first row, its numbers are ordered (row, column).
    patch = (pictures[0, 0, 0:2, 2:4].flatten() + 1) / 2
    torch.testing.assert_close(latents[0, 1], (patch - 0.3053) / 0.3761, atol=1e-5, rtol=0)
    torch.testing.assert_close(made.decode_latents(latents), pictures, atol=1e-5, rtol=0)
    bare = MAR(MARConfig.named("mar_nano_digits", codec="kl16", vae_embed_dim=1))
    assert bare.decode_latents(latents) is None
    with pytest.raises(ConfigError, match="use_codec"):
        bare.encode_images(pictures)


def test_a_codec_follows_the_model_and_stays_out_of_its_state():
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def encode(self, images):
            return images / self.scale

        def decode(self, samples):
            return samples * self.scale

    made, codec = model(), Scale()
    names = set(made.state_dict())
    assert made.use_codec(codec) is made
    assert made.codec is codec
    made.double()
    assert codec.scale.dtype == torch.float64
    assert set(made.state_dict()) == names
