"""How far one pipeline is from another: SSIM and PSNR by their formulas, CLIP score by hand, and ``compare``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import correlate1d
from tiny_video import wan_pipeline, wan_transformer

import vlmeff
from vlmeff.diffusion import quality
from vlmeff.errors import ConfigError, UnsupportedModelError

pytest.importorskip("diffusers")

CALL = {
    "height": 32,
    "width": 32,
    "num_frames": 5,
    "num_inference_steps": 2,
    "guidance_scale": 3.0,
    "max_sequence_length": 16,
}
PROMPTS = ["a red circle moving left", "a blue square moving up"]


def frames(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def slow_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """One window after the other, each with its own weighted sums (Wang et al. 2004, equations 13 to 16)."""
    at = np.arange(11) - 5
    weights = np.exp(-(at[:, None] ** 2 + at[None, :] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    found = []
    for channel in range(x.shape[2]):
        for row in range(x.shape[0] - 10):
            for column in range(x.shape[1] - 10):
                here = np.s_[row : row + 11, column : column + 11, channel]
                a, b = x[here].astype(np.float64), y[here].astype(np.float64)
                mu_a, mu_b = (weights * a).sum(), (weights * b).sum()
                var_a, var_b = (weights * (a - mu_a) ** 2).sum(), (weights * (b - mu_b) ** 2).sum()
                cov = (weights * (a - mu_a) * (b - mu_b)).sum()
                top = (2 * mu_a * mu_b + 1e-4) * (2 * cov + 9e-4)
                found.append(top / ((mu_a**2 + mu_b**2 + 1e-4) * (var_a + var_b + 9e-4)))
    return float(np.mean(found))


def scipy_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """The same over a whole picture by scipy's filters, its border cut off."""
    line = np.exp(-((np.arange(11) - 5) ** 2) / 4.5)
    line /= line.sum()

    def mean(values: np.ndarray) -> np.ndarray:
        once = correlate1d(values.astype(np.float64), line, axis=0)
        return correlate1d(once, line, axis=1)[5:-5, 5:-5]

    x, y = x.astype(np.float64), y.astype(np.float64)
    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    return float(((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))).mean())


def test_ssim_is_the_mean_over_windows_that_lie_in_the_frame() -> None:
    x = frames((2, 15, 13, 3), 0)
    y = np.clip(x + 0.3 * (frames(x.shape, 1) - 0.5), 0, 1)
    got = quality.ssim(torch.from_numpy(x), torch.from_numpy(y))
    assert got.dtype == torch.float64
    expected = [slow_ssim(a, b) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-10)


@settings(max_examples=20, deadline=None)
@given(st.integers(11, 30), st.integers(11, 30), st.floats(0, 1), st.integers(0, 2**16))
def test_ssim_agrees_with_scipy_is_symmetric_and_at_most_one(h: int, w: int, mix: float, seed: int) -> None:
    x = frames((1, h, w, 3), seed)
    y = (1 - mix) * x + mix * frames(x.shape, seed + 1)
    a, b = torch.from_numpy(x), torch.from_numpy(np.asarray(y, np.float32))
    got = float(quality.ssim(a, b))
    assert got == pytest.approx(scipy_ssim(x[0], y[0].astype(np.float32)), rel=1e-9, abs=1e-12)
    assert got == pytest.approx(float(quality.ssim(b, a)), rel=1e-12)
    assert got <= 1 + 1e-12
    assert float(quality.ssim(a, a)) == pytest.approx(1, abs=1e-12)


def test_ssim_of_two_grounds_is_the_luminance_term() -> None:
    a, b = torch.full((1, 12, 12, 3), 0.2), torch.full((1, 12, 12, 3), 0.6)
    x, y = float(a[0, 0, 0, 0]), float(b[0, 0, 0, 0])
    assert float(quality.ssim(a, b)) == pytest.approx((2 * x * y + 1e-4) / (x * x + y * y + 1e-4), rel=1e-9)


def test_a_clip_is_looked_at_in_parts_that_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = frames((5, 16, 16, 3), 2), frames((5, 16, 16, 3), 3)
    whole = quality.clip_ssim(x, y)
    assert whole == pytest.approx(np.mean([scipy_ssim(a, b) for a, b in zip(x, y, strict=True)]), rel=1e-9)
    monkeypatch.setattr(quality, "PIXELS_AT_ONCE", 2 * 16 * 16)
    assert quality.clip_ssim(x, y) == pytest.approx(whole, rel=1e-12)


def test_ssim_refuses_frames_that_its_window_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="10 x 40 are smaller"):
        quality.ssim(torch.zeros(1, 10, 40, 3), torch.zeros(1, 10, 40, 3))
    with pytest.raises(ConfigError, match="one shape"):
        quality.ssim(torch.zeros(1, 12, 12, 3), torch.zeros(1, 12, 13, 3))


def test_psnr_by_hand_and_of_equal_clips() -> None:
    base = np.zeros((2, 4, 4, 3), np.float32)
    other = base.copy()
    other[0] = 0.5  # mean squared error 0.125
    assert quality.psnr(base, other) == pytest.approx(10 * math.log10(8))
    assert quality.psnr(base, base) == quality.SAME_DB == quality.psnr(base, base + 1e-9)


def test_the_clip_score_is_the_cosine_of_frame_and_text_a_hundred_times() -> None:
    from vlmeff.models import tiny_clip
    from vlmeff.models.tiny_clip import architecture

    torch.manual_seed(0)
    model = architecture.build_model().eval()  # random: the score's arithmetic is tested, not the model
    _, preprocess, tokenizer = tiny_clip.load()
    shown, texts = frames((2, 3, 20, 24, 3), 5), ["a red circle .", "two blue triangles ."]
    got = quality.clip_scores(shown, texts, (model, preprocess, tokenizer))
    from PIL import Image

    for i, text in enumerate(texts):
        with torch.no_grad():
            word = model.encode_text(tokenizer([text]))[0].double().numpy()
            seen = [
                model.encode_image(preprocess(Image.fromarray(np.rint(f * 255).astype(np.uint8)))[None])[0]
                .double()
                .numpy()
                for f in shown[i]
            ]
        cosines = [v @ word / (np.linalg.norm(v) * np.linalg.norm(word)) for v in seen]
        assert got[i] == pytest.approx(100 * np.mean(np.maximum(cosines, 0)), abs=1e-3)
    first = quality.clip_scores(shown, texts, (model, preprocess, tokenizer), every=3)
    assert first == pytest.approx(quality.clip_scores(shown[:, :1], texts, (model, preprocess, tokenizer)), abs=1e-4)
    with pytest.raises(ConfigError, match="2 clips and 1 texts"):
        quality.clip_scores(shown, texts[:1], (model, preprocess, tokenizer))


# ---- whole pipelines


@pytest.fixture(scope="module")
def pipe() -> Any:
    return wan_pipeline()


def latents_and_frames(pipe: Any, prompt: str, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """By two plain calls."""
    made = [
        pipe(prompt, generator=torch.Generator().manual_seed(seed), output_type=kind, **CALL).frames
        for kind in ("latent", "np")
    ]
    return made[0][0].double(), made[1][0]


def test_compare_is_what_plain_calls_give_clip_by_clip(pipe: Any) -> None:
    asked: list[list[str]] = []

    def judge(shown: np.ndarray, prompts: Any) -> list[bool]:
        asked.append(list(prompts))
        return [bool(clip.mean() > 0) for clip in shown[:-1]] + [False]

    found = quality.compare(pipe, PROMPTS, (0, 2), ["w4a4_int"], call=CALL, batch=4, judge=judge)
    assert list(found) == ["unwrapped", "w4a4_int"]
    assert not vlmeff.is_wrapped(pipe)
    same, got = found["unwrapped"], found["w4a4_int"]
    assert (same.latent_error, same.psnr_db, same.ssim) == (0, quality.SAME_DB, pytest.approx(1))
    assert (same.clips, same.right, got.right, asked[0]) == (4, 3, 3, PROMPTS * 2)
    where = [(prompt, 1000 * seed + i) for seed in (0, 2) for i, prompt in enumerate(PROMPTS)]
    plain = [latents_and_frames(pipe, *one) for one in where]
    vlmeff.wrap(pipe, None, quant="w4a4_int")
    try:
        other = [latents_and_frames(pipe, *one) for one in where]
        size = sum(t.nbytes for t in [*pipe.transformer.parameters(), *pipe.transformer.buffers()])
    finally:
        vlmeff.unwrap(pipe)
    errors = [float((b[0] - a[0]).norm() / a[0].norm()) for a, b in zip(plain, other, strict=True)]
    assert min(errors) > 1e-3
    assert got.latent_error == pytest.approx(np.mean(errors), rel=1e-3)
    assert got.latent_error_worst == pytest.approx(max(errors), rel=1e-3)
    levels = [
        -10 * math.log10(np.square(a[1] - b[1].astype(np.float64)).mean()) for a, b in zip(plain, other, strict=True)
    ]
    assert got.psnr_db == pytest.approx(np.mean(levels), rel=1e-3)
    alike = [
        np.mean([scipy_ssim(x, y) for x, y in zip(a[1], b[1], strict=True)]) for a, b in zip(plain, other, strict=True)
    ]
    assert got.ssim == pytest.approx(np.mean(alike), abs=1e-4)
    assert got.transformer_bytes == size < same.transformer_bytes
    assert got.blocks_skipped == 0
    assert same.blocks_skipped is got.clip_score is None


@pytest.mark.filterwarnings("ignore:vlmeff. preset")
def test_plans_may_be_presets_and_what_a_cache_skips_is_counted(pipe: Any) -> None:
    everything = {"kind": "first_block", "threshold": 10.0}  # skips all that it may
    done: list[tuple[str, int]] = []
    found = quality.compare(
        pipe,
        PROMPTS[:1],
        (0,),
        {"fast": {"preset": "fast"}, "lazy": {"cache": everything}},
        call=CALL | {"num_inference_steps": 4},
        progress=lambda name, count: done.append((name, count)),
    )
    assert found["lazy"].blocks_skipped == pytest.approx(3 * 3 / (4 * 4))  # all blocks but the first, from step 2 on
    assert found["fast"].transformer_bytes < found["lazy"].transformer_bytes
    assert done == [("unwrapped", 1), ("fast", 1), ("lazy", 1)]
    assert not vlmeff.is_wrapped(pipe)


def test_a_pipeline_of_another_transformer_can_be_compared(pipe: Any) -> None:
    reference = quality.Reference(pipe, PROMPTS[:1], call=CALL)
    original = pipe.transformer
    from vlmeff.diffusion.blocks import drop_blocks

    with drop_blocks(original, [0, 2]):
        short = reference.compare(pipe)
    again = reference.compare(pipe)
    assert short.latent_error > 0
    assert short.transformer_bytes < again.transformer_bytes
    assert (again.latent_error, again.psnr_db) == (0, quality.SAME_DB)
    values = again.to_dict()
    assert values["clips"] == 1
    assert values["right"] is None


def test_what_cannot_be_compared_is_said(pipe: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="pass the pipeline"):
        quality.compare(wan_transformer(), PROMPTS, (0,), ["w4a16"], call=CALL)
    for prompts, seeds in (([], (0,)), ("a red circle", (0,)), (PROMPTS, ())):
        with pytest.raises(ConfigError, match="list of one prompt"):
            quality.compare(pipe, prompts, seeds, ["w4a16"], call=CALL)
    vlmeff.wrap(pipe, None, quant="w8a8_int8")
    try:
        with pytest.raises(ConfigError, match="wrapped already"):
            quality.compare(pipe, PROMPTS, (0,), ["w4a16"], call=CALL)
    finally:
        vlmeff.unwrap(pipe)
    reference = quality.Reference(pipe, PROMPTS[:1], call=CALL)
    other = reference.rendering
    smaller = quality.Rendering(other.frames[:, :1], other.latents, 0.0, None)
    with pytest.raises(ConfigError, match="use one size"):
        reference.measure(smaller, transformer_bytes=0)


def test_a_plan_that_fails_leaves_the_pipeline_unwrapped(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def judge(shown: np.ndarray, prompts: Any) -> list[bool]:
        calls.append(len(shown))
        if len(calls) == 2:
            raise RuntimeError("judge")
        return [True] * len(shown)

    with pytest.raises(RuntimeError, match="judge"):
        quality.compare(pipe, PROMPTS[:1], (0,), ["w8a8_int8"], call=CALL, judge=judge)
    assert not vlmeff.is_wrapped(pipe)
