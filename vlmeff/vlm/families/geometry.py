"""Finds out by experiment which tokens of a vision tower become which token of the prompt.

A picture is encoded once while the outputs of the tower's layers are recorded. Then the encoder runs again and again
with the layers replaced by their recorded outputs, so that a pass costs the connector alone, and with some of the
recorded tokens changed: for every bit of the coordinates of the prompt's tokens the tower tokens that should belong to
tokens with that bit. If exactly those tokens of the prompt change each time, each depends on its own block and on
nothing else, for a token outside the block would differ from the block's in some bit. The same is done with the pixels
and the tokens that enter the first layer, and the queries and keys of every layer are checked by computing the layer's
attention from them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenpruning.layout import Grid
from vlmeff.errors import UnsupportedModelError
from vlmeff.vlm.families.timm_attention import is_timm_attention
from vlmeff.vlm.probe import QueryKey, QueryKeyFn

MOST_PREFIX_TOKENS = 16  # class and register tokens
CHANGED = 1e-5  # of the largest value: far above rounding, far below what a change of one standard deviation does
SAME_ATTENTION = {torch.float32: 5e-3}  # of the largest value; TF32 has 10 bits
SAME_ATTENTION_HALF = 2e-2  # bfloat16 has 8 bits
OUT_PROJECTIONS = ("out_proj", "o_proj", "proj", "projection_layer")


class UnverifiedError(Exception):
    """The model does not do what was supposed; the message says what."""


@dataclass(frozen=True)
class Geometry:
    """Of pictures of one size.

    ``grid``: tokens of the prompt. ``block``: tower tokens along an edge of one of them. ``prefix``: tower tokens
    before the raster. ``feeding``: 0-based layers whose output reaches the prompt; empty where the tower has no layers
    that can be told apart. ``scored``: layers whose queries and keys are known to be right.
    """

    grid: Grid
    block: int
    prefix: int
    feeding: tuple[int, ...]
    scored: frozenset[int]

    @property
    def tower_tokens(self) -> int:
        return self.prefix + self.grid[0] * self.grid[1] * self.block**2

    def pooled(self, score: Tensor) -> Tensor:
        """[n, tower tokens] -> [n, H * W]: the mean of each block."""
        (height, width), s = self.grid, self.block
        return score[:, self.prefix :].view(-1, height, s, width, s).mean((2, 4)).flatten(1)


@torch.no_grad()
def measure(
    encode: Callable[[Tensor], Tensor],
    tower: nn.Module,
    layers: Sequence[tuple[nn.Module, nn.Module]],
    query_key: QueryKeyFn,
    pictures: Tensor,
) -> Geometry:
    """The geometry of two equal ``pictures`` [..., 3, h, w].

    Args:
        encode: pixels -> [tokens of both pictures, D] as they fill the placeholders.
        layers: of the tower, each with its attention module; none: the tower as a whole is replaced.
    Raises:
        UnverifiedError: what is wrong.
    """
    stages = [block for block, _ in layers] or [tower]
    with ExitStack() as hooks:
        recorded = hooks.enter_context(_recorded(stages))
        faithful = hooks.enter_context(_faithful([attention for _, attention in layers], query_key))
        base = _per_picture(encode(pictures))
    outputs, entering = recorded.outputs, recorded.entering
    count = _token_count(outputs[-1])
    generator = torch.Generator().manual_seed(0)

    def changed(cells: Tensor, which: Sequence[int]) -> Tensor:
        """[2, n] bool: the prompt's tokens that differ when ``cells`` [2, M] of some stages' outputs do."""
        other = [_disturbed(o, cells, generator) if i in which else _copied(o) for i, o in enumerate(outputs)]
        with _replaced(stages, other):
            return _differs(_per_picture(encode(pictures)), base)

    none, every = torch.zeros(2, count, dtype=torch.bool), torch.ones(2, count, dtype=torch.bool)
    if bool(changed(none, ()).any()):
        raise UnverifiedError("its encoder gives other tokens for the same tower output (is the model in eval mode?)")
    feeding = [i for i in range(len(stages)) if bool(changed(every, (i,)).any())]
    if not feeding:
        raise UnverifiedError(f"its tokens do not come from the output of {type(tower).__name__}'s layers")
    size = (pictures.shape[-2], pictures.shape[-1])
    grid, block, prefix = _fitting(base.shape[1], count, size, lambda cells: changed(cells, feeding))
    if layers and entering is not None:

        def entered(pixels: Tensor) -> Tensor:
            with _recorded(stages[:1]) as again, _replaced(stages, [_copied(o) for o in outputs]):
                encode(pixels)
            assert again.entering is not None
            return _differs(again.entering, entering)

        _check_raster((grid[0] * block, grid[1] * block), prefix, pictures, entered, generator)
    return Geometry(grid, block, prefix, tuple(feeding) if layers else (), frozenset(faithful))


def _fitting(n: int, count: int, size: Grid, changed: Callable[[Tensor], Tensor]) -> tuple[Grid, int, int]:
    """(grid, block, prefix) under which exactly the tokens of disturbed blocks change."""
    tried = []
    for block in range(1, count + 1):
        prefix = count - n * block**2
        if prefix < 0:
            break
        grids = _grids(n, size) if prefix <= MOST_PREFIX_TOKENS else []
        for grid in grids:
            tried.append((grid, block))
            if all(
                torch.equal(changed(F.pad(_blown_up(tokens, grid, block), (prefix, 0))), tokens)
                for tokens in map(_pair, _bits(grid))
            ):
                return grid, block, prefix
    if not tried:
        raise UnverifiedError(
            f"a picture of {size[0]} x {size[1]} pixels becomes {count} tower tokens and {n} tokens of the prompt, "
            "which are no grid of square blocks"
        )
    raise UnverifiedError(
        f"its {n} tokens per picture are not made of one block of the {count} tower tokens each (a resampler, Q-Former "
        "or overlapping convolution mixes them)"
    )


def _grids(n: int, size: Grid) -> list[Grid]:
    """Grids of ``n`` tokens that a picture of this size can have: of its aspect ratio, or square."""
    if n < 2:
        return []
    height, side = round((n * size[0] / size[1]) ** 0.5), round(n**0.5)
    found = [(height, n // max(height, 1))] if height and n % height == 0 else []
    return [grid for grid in dict.fromkeys([*found, (side, side)]) if grid[0] * grid[1] == n]


def _check_raster(
    raster: Grid, prefix: int, pictures: Tensor, entered: Callable[[Tensor], Tensor], generator: torch.Generator
) -> None:
    """Each tower token must stand where its patch of the picture is."""
    (height, width), (rows, columns) = pictures.shape[-2:], raster
    if height % rows or width % columns:
        raise UnverifiedError(f"{height} x {width} pixels do not divide into the tower's {rows} x {columns} patches")
    noise = torch.randn(pictures.shape, generator=generator).to(pictures) * pictures.float().std().to(pictures)
    for cells in map(_pair, _bits(raster)):
        mask = cells.view(2, rows, columns).to(pictures.device)
        mask = mask.repeat_interleave(height // rows, 1).repeat_interleave(width // columns, 2)
        if not torch.equal(entered(pictures + noise * mask[:, None]), F.pad(cells, (prefix, 0))):
            raise UnverifiedError(f"its tower does not cut pictures into {rows} x {columns} patches in raster order")


def _bits(grid: Grid) -> list[Tensor]:
    """Masks [H * W]: the cells that have a bit of their row or column number set, for each bit."""
    height, width = grid
    y, x = torch.arange(height * width) // width, torch.arange(height * width) % width
    return [(axis >> b & 1).bool() for axis, end in ((y, height), (x, width)) for b in range((end - 1).bit_length())]


def _pair(mask: Tensor) -> Tensor:
    """[2, n]: the mask for the first picture, its complement for the second."""
    return torch.stack([mask, ~mask])


def _blown_up(mask: Tensor, grid: Grid, block: int) -> Tensor:
    """[2, H * W] -> [2, s*H * s*W]."""
    return mask.view(2, *grid).repeat_interleave(block, 1).repeat_interleave(block, 2).flatten(1)


def _per_picture(features: Tensor) -> Tensor:
    """[tokens of two pictures, D] -> [2, n, D]."""
    if not len(features) or len(features) % 2:
        raise UnverifiedError(f"two equal pictures become {len(features)} tokens")
    return features.view(2, -1, features.shape[-1])


def _differs(a: Tensor, b: Tensor) -> Tensor:
    """[2, n] bool on the CPU."""
    if a.shape != b.shape:
        raise UnverifiedError("the number of tokens changes with what the picture shows")
    a, b = a.float(), b.float()
    return ((a - b).abs().amax(-1) > CHANGED * b.abs().amax()).cpu()


# -- outputs of modules: a tensor [2, M, C] or [2, C, h, w], or something that holds one -----------------------------


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    for part in output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ():
        yield from _tensors(part)


def _mapped(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same container with other tensors."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, Mapping):
        return type(output)(**{name: _mapped(part, change) for name, part in output.items()})  # type: ignore[call-arg]
    return tuple(_mapped(part, change) for part in output) if isinstance(output, tuple) else output


def _token_count(output: Any) -> int:
    """Tokens per picture in the first tensor of a module's output."""
    first = next(_tensors(output), None)
    if first is None or first.ndim not in (3, 4) or first.shape[0] != 2:
        shape = None if first is None else tuple(first.shape)
        raise UnverifiedError(f"its tower gives {shape} for two pictures and not [pictures, tokens, channels]")
    return first.shape[1] if first.ndim == 3 else first.shape[2] * first.shape[3]


def _copied(output: Any) -> Any:
    """A container of its own: models write into what a tower returns."""
    return _mapped(output, lambda tensor: tensor)


def _disturbed(output: Any, cells: Tensor, generator: torch.Generator) -> Any:
    """``output`` with noise of one standard deviation on the tokens ``cells`` [2, M]."""

    def change(tensor: Tensor) -> Tensor:
        if tensor.ndim == 3 and tensor.shape[:2] == cells.shape:
            mask = cells[..., None]
        elif tensor.ndim == 4 and tensor.shape[0] == 2 and tensor.shape[2] * tensor.shape[3] == cells.shape[1]:
            mask = cells.view(2, 1, *tensor.shape[2:])
        else:
            return tensor
        noise = torch.randn(tensor.shape, generator=generator).to(tensor) * tensor.float().std().to(tensor.dtype)
        return tensor + noise * mask.to(tensor.device)

    return _mapped(output, change)


@dataclass(eq=False)
class _Record:
    """What went into the first stage, and what came out of each."""

    outputs: list[Any]
    entering: Tensor | None = None


@contextmanager
def _recorded(stages: Sequence[nn.Module]) -> Iterator[_Record]:
    """Record the stages' outputs in this thread; each must run once."""
    record, owner = _Record([None] * len(stages)), threading.get_ident()
    runs = [0] * len(stages)

    def hook(number: int) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if threading.get_ident() != owner:
                return
            runs[number] += 1
            record.outputs[number] = _copied(output)
            if number == 0:
                record.entering = _hidden(args, kwargs)

        return note

    handles = [s.register_forward_hook(hook(i), with_kwargs=True) for i, s in enumerate(stages)]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
    if runs != [1] * len(runs):
        raise UnverifiedError("not every layer of its tower runs exactly once per call")


@contextmanager
def _replaced(stages: Sequence[nn.Module], outputs: Sequence[Any]) -> Iterator[None]:
    """Let the stages' forward answer ``outputs`` in this thread; other threads' calls go to the real ones."""
    owner = threading.get_ident()

    def stand_in(original: Callable[..., Any], output: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: output if threading.get_ident() == owner else original(*args, **kwargs)

    before = [stage.__dict__.get("forward") for stage in stages]
    try:
        for stage, output in zip(stages, outputs, strict=True):
            stage.__dict__["forward"] = stand_in(stage.forward, output)
        yield
    finally:
        for stage, forward in zip(stages, before, strict=True):
            if forward is None:
                stage.__dict__.pop("forward", None)
            else:
                stage.__dict__["forward"] = forward


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    hidden = args[0] if args else kwargs.get("hidden_states")
    return hidden if isinstance(hidden, Tensor) else None


@contextmanager
def _faithful(attentions: Sequence[nn.Module], query_key: QueryKeyFn) -> Iterator[set[int]]:
    """Collect the numbers of the attention modules that do what ``query_key`` says of them."""
    good: set[int] = set()
    owner = threading.get_ident()

    def hook(number: int) -> Any:
        def compare(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            hidden = _hidden(args, kwargs)
            if hidden is None or threading.get_ident() != owner:
                return
            if _is_attention_of(query_key, module, hidden, kwargs, next(_tensors(output))):
                good.add(number)

        return compare

    handles = [a.register_forward_hook(hook(i), with_kwargs=True) for i, a in enumerate(attentions)]
    try:
        yield good
    finally:
        for handle in handles:
            handle.remove()


def _is_attention_of(query_key: QueryKeyFn, module: Any, hidden: Tensor, kwargs: Any, output: Tensor) -> bool:
    """Whether softmax(q k^T) v, projected, is what the module gave. What ``query_key`` takes of timm is known."""
    try:
        qk = query_key(module, hidden, kwargs)
        if is_timm_attention(module):
            return True
        assert isinstance(qk, QueryKey)
        v = module.v_proj(hidden).unflatten(-1, (-1, qk.q.shape[-1])).transpose(1, 2)
        v = v.repeat_interleave(qk.q.shape[1] // v.shape[1], 1)
        mixed = F.scaled_dot_product_attention(qk.q.float(), qk.k.float(), v.float(), scale=qk.scale)
        project = next(getattr(module, name) for name in OUT_PROJECTIONS if hasattr(module, name))
        expected = project(mixed.transpose(1, 2).flatten(2).to(hidden.dtype))
    except (AttributeError, RuntimeError, StopIteration, UnsupportedModelError):
        return False  # built otherwise than guessed, which is what is to be found out
    if expected.shape != output.shape:
        return False
    tolerance = SAME_ATTENTION.get(hidden.dtype, SAME_ATTENTION_HALF)
    return bool((expected - output).abs().amax() <= tolerance * output.abs().amax())
