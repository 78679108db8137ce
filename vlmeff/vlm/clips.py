"""Key clips: the short stretches of a long video that a question is about, at a constant number of visual tokens.

In the manner of F2C ("From Frames to Clips", arXiv 2510.02262): frames are scored against the question by a CLIP; the
peaks of the scores, spread over time, become anchors; each anchor grows into a clip; the longer the clips, the smaller
their frames. The scoring and choosing functions are pure; ``select_clips`` runs the CLIP and puts them together.

Where this differs from the paper, or where its text left a choice: peaks below the mean score are dropped, so that a
video with one relevant stretch is not padded with irrelevant ones; k-means over time is solved exactly (it is one-
dimensional) instead of from random starts; redundancy averages over all pairs of frames of a clip, a frame with itself
among them, for otherwise a clip of one frame has none and always wins; clips that overlap become one clip with the
tokens of both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlmeff.errors import ConfigError, DataError

# As in a public implementation; the paper's text was not at hand.
REDUNDANCY_WEIGHT = 0.5  # lambda_r
LENGTH_WEIGHT = 0.05  # lambda_l
Size = tuple[int, int]  # (height, width)


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Frames ``start`` to ``stop - 1`` of the video; grown from ``anchors``; ``size`` (height, width) in px is what its
    frames are to be resized to."""

    start: int
    stop: int
    anchors: tuple[int, ...]
    size: Size

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, eq=False, kw_only=True)
class ClipSelection:
    """What ``select_clips`` chose.

    ``frames``: the chosen frames as they were given. ``indices``: their numbers in the video, ascending. ``sizes``:
    (height, width) that each is to be resized to, multiples of ``token_side``. ``clips`` in order, without overlap.
    ``scores`` [F] float32 on the CPU: relevance of every frame of the video. ``token_count``: visual tokens of the
    resized frames, at most the budget.
    """

    frames: list[Any]
    indices: list[int]
    sizes: list[Size]
    clips: tuple[Clip, ...]
    scores: Tensor
    token_count: int

    def resized(self) -> list[Any]:
        """``frames`` in their new sizes, bicubic; a tensor keeps its dtype."""
        return [_resize(frame, size) for frame, size in zip(self.frames, self.sizes, strict=True)]


def select_clips(
    frames: Sequence[Any] | Tensor,
    question: str,
    *,
    clip: Any,
    tokenizer: Any = None,
    preprocess: Any = None,
    clips: int = 8,
    clip_length: int | Literal["adaptive"] = "adaptive",
    token_budget: int | None = None,
    token_side: int = 28,
    max_shrink: float = 2.0,
    batch_size: int = 32,
) -> ClipSelection:
    """Choose the clips of a video that a question is about.

    With n anchors each clip has ``token_budget / n`` tokens; a clip of l frames shrinks their sides by
    sqrt(l * tokens of a full frame / tokens of the clip), at most by ``max_shrink``.

    Args:
        frames: pictures of one size, sampled evenly (1 a second in the paper): PIL images or tensors [3, H, W], uint8
            or float in [0, 1]; a tensor [F, 3, H, W] will do.
        question: text; with the candidate answers if there are any.
        clip: open_clip model in evaluation mode, with its ``tokenizer`` and ``preprocess`` (for inference); or
            "tiny-clip", the model of coloured shapes that ships with vlmeff, for trials.
        clips: most clips to choose; fewer when the scores have fewer peaks.
        clip_length: frames in each clip, or "adaptive".
        token_budget: visual tokens of all chosen frames; None: as many as ``clips`` frames have in full size.
        token_side: px of a side of the square that becomes one token (28 in Qwen2-VL and Qwen2.5-VL).
        max_shrink: most by which a side shrinks.
        batch_size: frames that the CLIP sees at once.
    Raises:
        ConfigError: an argument cannot work, the question is empty, or the budget cannot hold the clips.
        DataError: no frames, or frames of different sizes or kinds.
    """
    if not isinstance(question, str) or not question.strip():
        raise ConfigError("select_clips: question is empty. Ask what the chosen frames should show.")
    for name, value in (("clips", clips), ("token_side", token_side), ("batch_size", batch_size)):
        if type(value) is not int or value < 1:
            raise ConfigError(f"select_clips: {name}={value!r} must be an int from 1 on.")
    if clip_length != "adaptive" and (type(clip_length) is not int or clip_length < 1):
        raise ConfigError(f"select_clips: clip_length={clip_length!r} must be an int from 1 on or 'adaptive'.")
    if not max_shrink >= 1:
        raise ConfigError(f"select_clips: max_shrink={max_shrink!r} must be at least 1.")
    if token_budget is not None and (type(token_budget) is not int or token_budget < 1):
        raise ConfigError(f"select_clips: token_budget={token_budget!r} must be an int from 1 on, or None.")
    clip, tokenizer, preprocess = _models(clip, tokenizer, preprocess)
    video = list(frames)
    height, width = _common_size(video)

    embeddings, text = embed(video, question, clip=clip, tokenizer=tokenizer, preprocess=preprocess, batch=batch_size)
    scores = embeddings @ text
    anchors = choose_anchors(scores, clips)
    full = math.prod(token_grid((height, width), token_side))
    budget = clips * full if token_budget is None else token_budget
    share = budget / len(anchors)
    longest = math.floor(max_shrink**2 * share / full + 1e-6)
    if longest < (1 if clip_length == "adaptive" else min(clip_length, len(video))):
        needs = math.ceil(len(anchors) * full / max_shrink**2) * (1 if clip_length == "adaptive" else clip_length)
        raise ConfigError(
            f"select_clips: token_budget={budget} cannot hold {len(anchors)} clips: a full frame has {full} tokens and "
            f"its sides may shrink by {max_shrink:g}. Give token_budget={needs} or more, fewer or shorter clips, or a "
            "larger max_shrink."
        )
    spans = []
    for anchor in anchors:
        length = best_length(anchor, scores, embeddings, longest) if clip_length == "adaptive" else clip_length
        spans.append((*window(anchor, length, len(video)), anchor))
    chosen = []
    for start, stop, merged in merge_spans(spans):
        tokens = math.floor(len(merged) * share / (stop - start) + 1e-6)
        chosen.append(Clip(start=start, stop=stop, anchors=merged, size=fit((height, width), tokens, token_side)))
    indices = [i for c in chosen for i in range(c.start, c.stop)]
    return ClipSelection(
        frames=[video[i] for i in indices],
        indices=indices,
        sizes=[c.size for c in chosen for _ in range(len(c))],
        clips=tuple(chosen),
        scores=scores,
        token_count=sum(len(c) * c.size[0] * c.size[1] // token_side**2 for c in chosen),
    )


@torch.no_grad()
def embed(
    video: list[Any], question: str, *, clip: Any, tokenizer: Any, preprocess: Any, batch: int = 32
) -> tuple[Tensor, Tensor]:
    """Unit vectors of the frames [F, E] and of the question [E], float32 on the CPU."""
    parameter = next(clip.parameters())
    parts = []
    for start in range(0, len(video), batch):
        pixels = torch.stack([preprocess(_as_image(frame)) for frame in video[start : start + batch]])
        parts.append(clip.encode_image(pixels.to(parameter.device, parameter.dtype)).float().cpu())
    text = clip.encode_text(tokenizer([question]).to(parameter.device))[0].float().cpu()
    return F.normalize(torch.cat(parts), dim=-1), F.normalize(text, dim=-1)


def peaks(scores: Tensor) -> list[int]:
    """Local maxima of [F] scores, ascending: one for each basin of the watershed of -scores.

    The middle of a plateau stands for it; the first and last frame are peaks when their one neighbour is lower.
    """
    values = scores.tolist()
    out, start = [], 0
    while start < len(values):
        stop = start + 1
        while stop < len(values) and values[stop] == values[start]:
            stop += 1
        rises = start == 0 or values[start - 1] < values[start]
        falls = stop == len(values) or values[stop] < values[start]
        if rises and falls:
            out.append((start + stop - 1) // 2)
        start = stop
    return out


def choose_anchors(scores: Tensor, clips: int, *, relevant_only: bool = True) -> list[int]:
    """At most ``clips`` frames, ascending: relevant and spread over time.

    The peaks of the scores; with ``relevant_only`` those that reach the mean score; when they are too many, k-means
    groups them by time into ``clips`` groups and the best of each group stays (first among equals).
    """
    candidates = peaks(scores)
    if relevant_only:
        mean = float(scores.mean())
        candidates = [i for i in candidates if float(scores[i]) >= mean] or [int(scores.argmax())]
    if len(candidates) <= clips:
        return candidates
    groups = _groups_in_time(candidates, clips)
    return [max(group, key=lambda i: (float(scores[i]), -i)) for group in groups]


def _groups_in_time(times: list[int], k: int) -> list[list[int]]:
    """The k consecutive groups of ascending ``times`` with the least sum of squares about their means.

    Exact 1-D k-means by dynamic programming: cost[g][j] = min_i cost[g-1][i] + sse(i, j); O(k n^2).
    """
    n = len(times)
    t = torch.tensor(times, dtype=torch.float64)
    zero = t.new_zeros(1)
    sums, squares = torch.cat([zero, t.cumsum(0)]), torch.cat([zero, (t * t).cumsum(0)])
    i, j = torch.arange(n + 1)[:, None], torch.arange(n + 1)[None]
    sse = squares[j] - squares[i] - (sums[j] - sums[i]) ** 2 / (j - i).clamp(min=1)
    sse = torch.where(j > i, sse, torch.inf)  # [from, to]; a group is never empty
    cost = sse[0]
    cuts: list[Tensor] = []
    for _ in range(k - 1):
        best = (cost[:, None] + sse).min(0)
        cost, cuts = best.values, [*cuts, best.indices]
    out, stop = [], n
    for cut in reversed(cuts):
        start = int(cut[stop])
        out.append(times[start:stop])
        stop = start
    return [times[:stop], *reversed(out)]


def best_length(
    anchor: int,
    scores: Tensor,
    embeddings: Tensor,
    longest: int,
    *,
    redundancy_weight: float = REDUNDANCY_WEIGHT,
    length_weight: float = LENGTH_WEIGHT,
) -> int:
    """Number of frames of the clip around ``anchor``, 1 to ``longest``.

    argmax_l  mean_{i in c} s_i - lambda_r mean_{i, j in c} <e_i, e_j> + lambda_l l / longest,  c = window(anchor, l)

    The first among equals. ``embeddings`` [F, E] are unit vectors.
    """
    longest = min(longest, len(scores))
    best, best_value = 1, -math.inf
    for length in range(1, longest + 1):
        start, stop = window(anchor, length, len(scores))
        # the mean of all inner products is the square of the mean vector
        redundancy = float(embeddings[start:stop].mean(0).square().sum())
        value = float(scores[start:stop].mean()) - redundancy_weight * redundancy + length_weight * length / longest
        if value > best_value + 1e-9:
            best, best_value = length, value
    return best


def window(anchor: int, length: int, n_frames: int) -> tuple[int, int]:
    """[start, stop) of ``length`` frames around ``anchor``, moved into the video; the whole video if it is shorter."""
    length = min(length, n_frames)
    start = min(max(anchor - (length - 1) // 2, 0), n_frames - length)
    return start, start + length


def merge_spans(spans: list[tuple[int, int, int]]) -> list[tuple[int, int, tuple[int, ...]]]:
    """(start, stop, anchor) of each clip -> (start, stop, anchors) ascending, those that share a frame made one."""
    out: list[tuple[int, int, tuple[int, ...]]] = []
    for start, stop, anchor in sorted(spans):
        if out and start < out[-1][1]:
            before = out.pop()
            out.append((before[0], max(before[1], stop), (*before[2], anchor)))
        else:
            out.append((start, stop, (anchor,)))
    return out


def token_grid(size: Size, token_side: int) -> tuple[int, int]:
    """Rows and columns of tokens of a picture of ``size`` px."""
    return max(1, round(size[0] / token_side)), max(1, round(size[1] / token_side))


def fit(size: Size, tokens: int, token_side: int) -> Size:
    """The largest size in px of whole tokens, about in shape, with at most ``tokens`` of them; never above ``size``
    rounded up to whole tokens."""
    rows, columns = token_grid(size, token_side)
    if rows * columns <= tokens:
        return rows * token_side, columns * token_side
    shrink = math.sqrt(tokens / (rows * columns))
    fitting = [
        (r, c)
        for r in {max(1, math.floor(rows * shrink)), math.ceil(rows * shrink)}
        for c in {max(1, math.floor(columns * shrink)), math.ceil(columns * shrink)}
        if r * c <= tokens
    ]
    # A very long or very flat picture: one token across, the rest along.
    fitting = fitting or [(min(rows, tokens), 1) if rows > columns else (1, min(columns, tokens))]
    r, c = max(fitting, key=lambda grid: (grid[0] * grid[1], -abs(math.log(grid[0] * columns / (grid[1] * rows)))))
    return r * token_side, c * token_side


def _models(clip: Any, tokenizer: Any, preprocess: Any) -> tuple[Any, Any, Any]:
    if isinstance(clip, str):
        if clip != "tiny-clip":
            raise ConfigError(
                f"select_clips: clip={clip!r} is not a model. Pass an open_clip model with tokenizer= and preprocess= "
                "(open_clip.create_model_and_transforms, open_clip.get_tokenizer), or clip='tiny-clip'."
            )
        if tokenizer is not None or preprocess is not None:
            raise ConfigError("select_clips: clip='tiny-clip' brings its own tokenizer and preprocess: leave them out.")
        from vlmeff.models import tiny_clip

        model, preprocess, tokenizer = tiny_clip.load()
        return model, tokenizer, preprocess
    if tokenizer is None or preprocess is None:
        raise ConfigError("select_clips: clip is a model, so its tokenizer= and preprocess= must be given with it.")
    return clip, tokenizer, preprocess


def _common_size(video: list[Any]) -> Size:
    if not video:
        raise DataError("select_clips: frames is empty. Pass at least one picture.")
    for frame in video:
        is_tensor = isinstance(frame, Tensor) and frame.ndim == 3 and len(frame) == 3
        if not is_tensor and not isinstance(frame, Image.Image):
            raise DataError(
                f"select_clips: frames must be PIL images or tensors [3, H, W], got {type(frame).__name__}"
                + (f" of shape {tuple(frame.shape)}." if isinstance(frame, Tensor) else ".")
            )
    sizes = {f.size[::-1] if isinstance(f, Image.Image) else tuple(f.shape[1:]) for f in video}
    if len(sizes) > 1:
        raise DataError(f"select_clips: frames have different sizes {sorted(sizes)[:3]}. Pass frames of one video.")
    height, width = sizes.pop()
    return height, width


def _as_image(frame: Any) -> Image.Image:
    from torchvision.transforms.functional import to_pil_image

    return frame if isinstance(frame, Image.Image) else to_pil_image(frame.cpu())


def _resize(frame: Any, size: Size) -> Any:
    if isinstance(frame, Image.Image):
        return frame.resize(size[::-1], Image.Resampling.BICUBIC)
    x = F.interpolate(frame[None].float(), size=size, mode="bicubic", antialias=True, align_corners=False)[0]
    return x.round().clamp(0, 255).to(frame.dtype) if frame.dtype == torch.uint8 else x.clamp(0, 1).to(frame.dtype)
