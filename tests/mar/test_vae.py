"""KL-16: the names and counts of the official file, and the forward pass written out on its state dict."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vlmeff.errors import CheckpointError, ConfigError
from vlmeff.models.mar.config import MARConfig
from vlmeff.models.mar.trunk import MAR
from vlmeff.models.mar.vae import KL16, load_vae

CLOSE = 2e-5


def small() -> KL16:
    torch.manual_seed(0)
    made = KL16(32, (1, 1, 2, 2, 4), 4).eval()
    for name, parameter in made.named_parameters():
        if "norm" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return made


def test_names_shapes_and_counts_are_the_official_ones():
    with torch.device("meta"):
        state = KL16().state_dict()
    assert len(state) == 312
    assert sum(value.numel() for value in state.values()) == 66_456_019
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert shapes["quant_conv.weight"] == (32, 32, 1, 1)
    assert shapes["post_quant_conv.weight"] == (16, 16, 1, 1)
    assert shapes["encoder.conv_out.weight"] == (32, 512, 3, 3)
    assert shapes["decoder.conv_in.weight"] == (512, 16, 3, 3)
    assert shapes["encoder.down.2.block.0.nin_shortcut.weight"] == (256, 128, 1, 1)
    assert shapes["decoder.up.1.block.0.nin_shortcut.weight"] == (128, 256, 1, 1)
    assert shapes["encoder.down.3.downsample.conv.weight"] == (256, 256, 3, 3)
    attention = {name.rsplit(".", 2)[0] for name in state if ".attn" in name}
    assert attention == {"encoder.down.4.attn.0", "encoder.down.4.attn.1", "encoder.mid.attn_1", "decoder.mid.attn_1"}
    assert {name.split(".")[2] for name in state if "upsample" in name} == {"1", "2", "3", "4"}
    assert {name.split(".")[2] for name in state if "downsample" in name} == {"0", "1", "2", "3"}


class Written:
    """The autoencoder of latent diffusion, level by level, on names of a state dict."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.s = {name: value.double() for name, value in state.items()}

    def conv(self, x, name, **options):
        return F.conv2d(x, self.s[f"{name}.weight"], self.s[f"{name}.bias"], **options)

    def norm(self, x, name):
        groups = x.reshape(len(x), 32, -1)
        groups = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        scale, shift = (self.s[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
        return groups.view(x.shape) * scale + shift

    def swish(self, x):
        return x * torch.sigmoid(x)

    def res(self, x, name):
        h = self.conv(self.swish(self.norm(x, f"{name}.norm1")), f"{name}.conv1", padding=1)
        h = self.conv(self.swish(self.norm(h, f"{name}.norm2")), f"{name}.conv2", padding=1)
        if f"{name}.nin_shortcut.weight" in self.s:
            x = self.conv(x, f"{name}.nin_shortcut")
        return x + h

    def attend(self, x, name):
        h = self.norm(x, f"{name}.norm")
        q, k, v = (self.conv(h, f"{name}.{part}").flatten(2) for part in "qkv")
        weights = (torch.einsum("bci,bcj->bij", q, k) / q.shape[1] ** 0.5).softmax(2)
        return x + self.conv(torch.einsum("bij,bcj->bci", weights, v).view(x.shape), f"{name}.proj_out")

    def middle(self, x, side):
        return self.res(self.attend(self.res(x, f"{side}.mid.block_1"), f"{side}.mid.attn_1"), f"{side}.mid.block_2")

    def out(self, x, side):
        return self.conv(self.swish(self.norm(x, f"{side}.norm_out")), f"{side}.conv_out", padding=1)

    def encode(self, x):
        h = self.conv(x, "encoder.conv_in", padding=1)
        for level in range(5):
            for block in range(2):
                h = self.res(h, f"encoder.down.{level}.block.{block}")
                if level == 4:
                    h = self.attend(h, f"encoder.down.4.attn.{block}")
            if level < 4:
                h = self.conv(F.pad(h, (0, 1, 0, 1)), f"encoder.down.{level}.downsample.conv", stride=2)
        return self.conv(self.out(self.middle(h, "encoder"), "encoder"), "quant_conv").chunk(2, 1)

    def decode(self, z):
        h = self.middle(self.conv(self.conv(z, "post_quant_conv"), "decoder.conv_in", padding=1), "decoder")
        for level in (4, 3, 2, 1, 0):
            for block in range(3):
                h = self.res(h, f"decoder.up.{level}.block.{block}")
            if level:
                h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
                h = self.conv(h, f"decoder.up.{level}.upsample.conv", padding=1)
        return self.out(h, "decoder")


@torch.no_grad()
def test_forward_passes_are_the_written_out_ones():
    made = small()
    written = Written(made.state_dict())
    pictures = torch.rand(2, 3, 32, 48) * 2 - 1
    mean, log_variance = made.moments(pictures)
    wanted = written.encode(pictures.double())
    torch.testing.assert_close(mean.double(), wanted[0], atol=CLOSE, rtol=1e-4)
    torch.testing.assert_close(log_variance.double(), wanted[1], atol=CLOSE, rtol=1e-4)
    assert torch.equal(made.encode(pictures), mean)
    samples = torch.randn(2, 4, 2, 3)
    torch.testing.assert_close(made.decode(samples).double(), written.decode(samples.double()), atol=CLOSE, rtol=1e-4)


@torch.no_grad()
def test_posterior_is_sampled_with_its_own_width(monkeypatch):
    made = small()
    pictures = torch.rand(1, 3, 32, 32) * 2 - 1
    mean, log_variance = made.moments(pictures)
    monkeypatch.setattr(made, "moments", lambda _: (mean, log_variance))  # the same 200 times
    draws = torch.stack([made.encode(pictures, generator=torch.Generator().manual_seed(n)) for n in range(200)])
    wanted = (0.5 * log_variance).exp()
    assert float(((draws.std(0) - wanted) / wanted).abs().mean()) < 0.06
    assert float(((draws.mean(0) - mean) / wanted).abs().mean()) < 4 / 200**0.5


def test_sides_must_be_multiples_of_the_stride():
    with pytest.raises(ConfigError, match=r"\(32, 40\).*16"):
        small().encode(torch.zeros(1, 3, 32, 40))


def test_official_file_loads_unchanged_and_others_are_refused(tmp_path):
    torch.manual_seed(1)
    made = KL16()
    torch.save({"model": made.state_dict()}, tmp_path / "kl16.ckpt")
    loaded = load_vae(tmp_path / "kl16.ckpt")
    assert torch.equal(loaded.decoder.conv_out.weight, made.decoder.conv_out.weight)
    torch.save({"model": small().state_dict()}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="of another shape"):
        load_vae(tmp_path / "other.ckpt")


@torch.no_grad()
def test_scale_of_latents_is_the_models():
    """image = decode(latent / 0.2325), latent = sample * 0.2325."""
    config = MARConfig.named(
        "mar_nano_digits", img_size=32, vae_stride=16, vae_embed_dim=4, patch_size=1, codec="kl16", latent_shift=0.0,
        latent_scale=0.2325,
    )  # fmt: skip
    vae = small()
    made = MAR(config, vae).eval()
    pictures = torch.rand(1, 3, 32, 32) * 2 - 1
    latents = made.encode_images(pictures)
    torch.testing.assert_close(latents, (vae.encode(pictures) * 0.2325).flatten(2).transpose(1, 2))
    images = made.decode_latents(latents)
    torch.testing.assert_close(images, vae.decode(vae.encode(pictures)).clamp(-1, 1), atol=1e-5, rtol=0)
