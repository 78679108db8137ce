"""A classifier of colour, shape and direction: what tells whether a generated clip shows what its prompt says.

It is trained on real clips, disturbed as generated ones may be (blur, noise, brightness), never on generated ones.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlmeff.models.tiny_wan import clips
from vlmeff.models.tiny_wan.autoencoding import video_tensor
from vlmeff.models.tiny_wan.fitting import seeded

ANSWERS = {"color": tuple(clips.COLORS), "shape": clips.SHAPES, "direction": tuple(clips.DIRECTIONS)}


class Probe(nn.Module):
    """Four strided convolutions, the first within frames and the others over time too, and three answers."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            *_layer(3, 16, (1, 5, 5), (1, 2, 2)),
            *_layer(16, 24, (3, 3, 3), (2, 2, 2)),
            *_layer(24, 32, (3, 3, 3), (2, 2, 2)),
            *_layer(32, 32, (3, 3, 3), (1, 2, 2)),
        )
        self.answers = nn.Linear(32 * 3 * 4 * 4, sum(map(len, ANSWERS.values())))

    def forward(self, video: Tensor) -> dict[str, Tensor]:
        """Logits by question.

        Args:
            video: [B, 3, 9, 64, 64] in [-1, 1].
        Returns:
            {"color": [B, 4], "shape": [B, 3], "direction": [B, 4]}.
        """
        logits = self.answers(self.convolutions(video).flatten(1))
        return dict(zip(ANSWERS, logits.split([len(a) for a in ANSWERS.values()], dim=1), strict=True))


def _layer(inputs: int, outputs: int, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> list[nn.Module]:
    padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
    return [nn.Conv3d(inputs, outputs, kernel, stride, padding), nn.GroupNorm(4, outputs), nn.GELU()]


def probe_step(probe: Probe, step: int, seed: int, *, batch: int) -> tuple[Tensor, str]:
    generator = seeded(seed, 31, step)
    indices = np.random.default_rng([seed, 32, step]).integers(2**31, size=batch)
    pixels, drawn = clips.clip_batch("probe", indices, seed=seed)
    logits = probe(disturbed(video_tensor(pixels), generator))
    losses = [F.cross_entropy(logits[name], labels(drawn, name)) for name in ANSWERS]
    right = torch.stack([logits[name].argmax(1) == labels(drawn, name) for name in ANSWERS]).all(0)
    return torch.stack(losses).sum(), f"all three right {right.float().mean().item():.2f}"


def labels(drawn: list[clips.Clip], name: str) -> Tensor:
    return torch.tensor([ANSWERS[name].index(getattr(clip, name)) for clip in drawn])


def disturbed(video: Tensor, generator: torch.Generator) -> Tensor:
    """Blur by the same 3 x 3 mean for half of the batch, noise and brightness of random strength for all."""
    count = len(video)
    blurred = F.avg_pool3d(video, (1, 3, 3), stride=1, padding=(0, 1, 1), count_include_pad=False)
    chosen = (torch.rand(count, generator=generator) < 0.5).view(-1, 1, 1, 1, 1)
    strength, gain, shift = (torch.rand(count, 1, 1, 1, 1, generator=generator) for _ in range(3))
    noise = torch.randn(video.shape, generator=generator) * 0.15 * strength
    return torch.where(chosen, blurred, video) * (0.85 + 0.3 * gain) + 0.2 * (shift - 0.5) + noise


@torch.no_grad()
def classify(probe: Probe, frames: np.ndarray) -> list[tuple[str, str, str]]:
    """(colour, shape, direction) of every clip.

    Args:
        frames: [B, 9, 64, 64, 3], uint8 or floats in [0, 1] as the pipeline's ``output_type="np"`` gives them.
    """
    frames = np.asarray(frames)
    video = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 4, 1, 2, 3).float()
    video = video / 127.5 - 1 if frames.dtype == np.uint8 else 2 * video - 1
    logits = probe(video)
    found = [[ANSWERS[name][i] for i in logits[name].argmax(1).tolist()] for name in ANSWERS]
    return list(zip(*found, strict=True))


def save_probe(probe: Probe, file: Path) -> None:
    save_file({name: value.half().contiguous() for name, value in probe.state_dict().items()}, str(file))


def load_probe(file: str | Path | None = None) -> Probe:
    """The probe that ships with tiny-wan, or another file's."""
    if file is None:
        from vlmeff.loading import embedded_folder

        file = embedded_folder("tiny_wan") / "probe.safetensors"
    probe = Probe()
    probe.load_state_dict({name: value.float() for name, value in load_file(str(file)).items()})
    return probe.eval()
