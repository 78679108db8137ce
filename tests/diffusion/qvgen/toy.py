"""A video transformer that trains in seconds: Wan's class, two blocks of width 32, on blobs that move over 3 frames."""

from __future__ import annotations

import copy
from functools import cache

import torch

CHANNELS, FRAMES, SIDE, TEXT, WIDTH = 4, 3, 8, 4, 8


def build_toy(seed=0):
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=WIDTH,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=16,
    )


def scheduler(shift=1.0):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=shift)


def clips(count=40, seed=0):
    """[(latents [C, F, H, W], prompt [L, D])]: a blob that moves to one of four sides; the prompt says which."""
    generator = torch.Generator().manual_seed(seed)
    sides = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    words = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9))).Q[:4] * WIDTH**0.5
    colors = torch.randn(4, CHANNELS, generator=torch.Generator().manual_seed(8))
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    made = []
    for i in range(count):
        start = torch.rand(2, generator=generator) * 3 + 2.5
        frames = []
        for f in range(FRAMES):
            cx, cy = start + sides[i % 4] * f
            frames.append(torch.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 3))
        color = colors[int(torch.randint(4, (1,), generator=generator))]
        latents = color[:, None, None, None] * torch.stack(frames)
        prompt = torch.zeros(TEXT, WIDTH)
        prompt[0] = words[i % 4]
        made.append((latents, prompt))
    return made


def empty_prompt():
    return torch.zeros(TEXT, WIDTH)


@cache
def _teacher_state(steps):
    model, data = build_toy(), clips()
    latents, prompts = (torch.stack([pair[i] for pair in data]) for i in (0, 1))
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        chosen = torch.randint(len(data), (8,), generator=generator)
        noise = torch.randn(8, *latents.shape[1:], generator=generator)
        sigma = torch.rand(8, generator=generator)
        shaped = sigma.view(-1, 1, 1, 1, 1)
        noised = (1 - shaped) * latents[chosen] + shaped * noise
        out = model(
            hidden_states=noised,
            timestep=1000 * sigma,
            encoder_hidden_states=prompts[chosen],
            return_dict=False,
        )[0]
        loss = (out - (noise - latents[chosen])).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return copy.deepcopy(model.state_dict())


def trained_toy(steps=150):
    """A copy of the trained toy; trained once in a process."""
    model = build_toy()
    model.load_state_dict(_teacher_state(steps))
    return model.eval()
