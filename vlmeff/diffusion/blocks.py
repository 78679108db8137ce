"""Depth pruning of video transformers without training: drop blocks, rank them, and see what dropping costs.

TinyFusion (arXiv 2412.01199) learns which blocks to drop and retrains the rest. Here blocks are ranked on recorded
calls and nothing is retrained, so expect visible damage after few blocks: look at ``quality_curve`` before choosing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlmeff.diffusion.families import family_of
from vlmeff.errors import ConfigError, IncompatibleError, UnsupportedModelError

Block = tuple[str, int]
Keep = Sequence[int] | Mapping[str, Sequence[int]]
Call = Mapping[str, Any]
Method = Literal["greedy", "error", "cosine"]

# The configuration entry that says how many blocks a list has.
COUNTS = {"blocks": "num_layers", "transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"}


@dataclass(eq=False)
class DroppedBlocks:
    """Blocks taken out of a transformer; ``undo()``, or leaving a ``with`` block, puts them back.

    ``kept`` and ``dropped`` hold the original indices by block list; ``params`` counts what was dropped.
    """

    transformer: nn.Module = field(repr=False)
    kept: dict[str, tuple[int, ...]]
    dropped: dict[str, tuple[int, ...]]
    params: int
    _lists: dict[str, nn.ModuleList] = field(repr=False)
    _undone: bool = field(default=False, repr=False)

    def undo(self) -> None:
        """Put the very same block lists back; a second call does nothing.

        Raises:
            IncompatibleError: the lists were changed since by something else.
        """
        if self._undone:
            return
        for name, blocks in self._lists.items():
            now = getattr(self.transformer, name)
            if [id(block) for block in now] != [id(blocks[index]) for index in self.kept[name]]:
                raise IncompatibleError(
                    f"drop_blocks: {name} was changed after blocks were dropped. Undo the later change first."
                )
        for name, blocks in self._lists.items():
            _set_blocks(self.transformer, name, blocks)
        self._undone = True

    def __enter__(self) -> DroppedBlocks:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def drop_blocks(transformer: nn.Module, keep: Keep) -> DroppedBlocks:
    """Keep only some blocks, in their order; the others are taken out until ``undo()``.

    The configuration's number of layers follows, so that the shortened model can be saved and loaded.

    Args:
        keep: indices of blocks, ascending. For a model with two block lists (HunyuanVideo) a mapping from the list's
            name to indices; a list that is not named stays whole.
    Raises:
        ConfigError: indices that are out of range, repeated or not ascending, nothing kept, or an unknown list.
        UnsupportedModelError: the class is not known, or other parts count its blocks (WanVACE).
        IncompatibleError: a feature cache is enabled; its state refers to the blocks there were.
    """
    lists = droppable(transformer)
    if not isinstance(keep, Mapping):
        if len(lists) > 1:
            raise ConfigError(
                f"drop_blocks: {type(transformer).__name__} has {len(lists)} block lists ({', '.join(lists)}). "
                f"Pass keep={{{next(iter(lists))!r}: [...], ...}}."
            )
        keep = {next(iter(lists)): keep}
    unknown = set(keep) - set(lists)
    if unknown:
        raise ConfigError(f"drop_blocks: no block list {sorted(unknown)[0]!r}. This model has {', '.join(lists)}.")
    if getattr(transformer, "is_cache_enabled", False):
        raise IncompatibleError("drop_blocks: a cache is enabled. Call disable_cache() first, drop, then enable it.")
    kept = {name: _checked(name, indices, len(lists[name])) for name, indices in keep.items()}
    if not sum(len(kept.get(name, lists[name])) for name in lists):
        raise ConfigError("drop_blocks: keep names no block at all. Keep one or more.")
    dropped = {name: tuple(i for i in range(len(lists[name])) if i not in set(kept[name])) for name in kept}
    params = sum(p.numel() for name, indices in dropped.items() for i in indices for p in lists[name][i].parameters())
    for name, indices in kept.items():
        _set_blocks(transformer, name, nn.ModuleList([lists[name][i] for i in indices]))
    return DroppedBlocks(transformer, kept, dropped, params, {name: lists[name] for name in kept})


def droppable(transformer: nn.Module) -> dict[str, nn.ModuleList]:
    """The block lists whose blocks can be dropped, by attribute name.

    Raises:
        UnsupportedModelError: the class is not known, or other parts count its blocks (WanVACE).
    """
    lists = family_of(transformer).block_lists(transformer)
    if "vace_blocks" in lists:
        raise UnsupportedModelError(
            "drop_blocks: WanVACE adds its control hints after the blocks that vace_layers counts, so dropping blocks "
            "would move them. Use a WanTransformer3DModel."
        )
    return lists


def _checked(name: str, indices: Sequence[int], count: int) -> tuple[int, ...]:
    kept = tuple(indices)
    for index in kept:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
            raise ConfigError(f"drop_blocks: {index!r} is not a block of {name}, which has blocks 0 to {count - 1}.")
    if list(kept) != sorted(set(kept)):
        raise ConfigError(f"drop_blocks: keep={list(kept)} of {name} must be ascending, each index once.")
    return kept


def _set_blocks(transformer: nn.Module, name: str, blocks: nn.ModuleList) -> None:
    setattr(transformer, name, blocks)
    register: Callable[..., None] | None = getattr(transformer, "register_to_config", None)
    if register is not None:
        register(**{COUNTS[name]: len(blocks)})


@contextmanager
def recorded_calls(transformer: nn.Module, *, limit: int = 8) -> Iterator[list[dict[str, Any]]]:
    """Record arguments of the transformer's calls while a pipeline runs, as calibration inputs.

    Keeps at most ``limit`` calls spread evenly over all that are made: when full, every second one is dropped and from
    then on half as many are recorded.

    Yields:
        the list of keyword arguments, which grows as calls are made.
    """
    if limit < 2:
        raise ConfigError(f"recorded_calls: limit={limit} must be 2 or more.")
    calls: list[dict[str, Any]] = []
    seen, stride = 0, 1

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal seen, stride
        if args:
            raise ConfigError("recorded_calls: the transformer was called with positional arguments; name them.")
        if seen % stride == 0:
            calls.append({key: _copied(value) for key, value in kwargs.items()})
            if len(calls) > limit:
                del calls[1::2]
                stride *= 2
        seen += 1

    handle = transformer.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return type(value)(_copied(entry) for entry in value) if type(value) in (list, tuple) else value


@torch.no_grad()
def outputs(transformer: nn.Module, calls: Sequence[Call]) -> list[Tensor]:
    """The transformer's result for each recorded call."""
    if not calls:
        raise ConfigError("calls is empty: record some with recorded_calls(transformer) around a pipeline's call.")
    return [transformer(**{**call, "return_dict": False})[0] for call in calls]


def relative_error(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """|got - wanted| / |wanted| over all calls (Frobenius, in float64)."""
    off = sum((a.double() - b.double()).square().sum().item() for a, b in zip(got, wanted, strict=True))
    size = sum(b.double().square().sum().item() for b in wanted)
    return (off / size) ** 0.5 if size else float(off > 0)


def block_importance(transformer: nn.Module, calls: Sequence[Call], *, method: Method = "error") -> dict[Block, float]:
    """How much each block matters on recorded calls; blocks with small values are dropped first.

    "error": relative error of the model's result when the block alone is skipped, one pass per block.
    "cosine": 1 - mean cosine similarity of a block's input and output tokens, a single pass; blind to what the later
    blocks make of the difference.

    Raises:
        ConfigError: no calls, or another method (greedy ranks, see ``rank_blocks``).
    """
    lists = droppable(transformer)
    if method == "cosine":
        return _cosine_distances(transformer, lists, calls)
    if method != "error":
        raise ConfigError(f"block_importance: method={method!r} must be 'error' or 'cosine'.")
    reference = outputs(transformer, calls)
    return {block: _error_without(transformer, [block], calls, reference) for block in _all_blocks(lists)}


def rank_blocks(
    transformer: nn.Module, calls: Sequence[Call], *, method: Method = "greedy", drop: int | None = None
) -> list[tuple[Block, float]]:
    """The order in which to drop blocks, each with its score at that point.

    "greedy": again and again drop the block whose loss changes the result least, given those dropped already; costs
    about drop * blocks passes. "error" and "cosine": ascending ``block_importance``, all blocks scored alone.

    Args:
        drop: how many; one block is always left. None: all but one.
    Raises:
        ConfigError: no calls, another method, or ``drop`` that leaves no block.
    """
    lists = droppable(transformer)
    blocks = _all_blocks(lists)
    drop = len(blocks) - 1 if drop is None else drop
    if not 0 <= drop < len(blocks):
        raise ConfigError(f"rank_blocks: drop={drop} of {len(blocks)} blocks must leave one or more.")
    if method != "greedy":
        scores = block_importance(transformer, calls, method=method)
        return sorted(scores.items(), key=lambda entry: entry[1])[:drop]
    reference = outputs(transformer, calls)
    gone: list[Block] = []
    order = []
    for _ in range(drop):
        left = [block for block in blocks if block not in gone]
        errors = {block: _error_without(transformer, [*gone, block], calls, reference) for block in left}
        best = min(left, key=lambda block: errors[block])
        gone.append(best)
        order.append((best, errors[best]))
    return order


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """``error``: relative error of the result with ``kept`` blocks; ``keep`` is what ``drop_blocks`` takes."""

    kept: int
    error: float
    keep: dict[str, tuple[int, ...]] = field(repr=False)


def quality_curve(transformer: nn.Module, calls: Sequence[Call], order: Sequence[Block]) -> list[CurvePoint]:
    """Relative error of the result while blocks are dropped in this order, from all blocks down.

    Args:
        order: blocks (list name, index), e.g. ``[block for block, _ in rank_blocks(...)]``.
    """
    lists = droppable(transformer)
    reference = outputs(transformer, calls)
    points = []
    for count in range(len(order) + 1):
        keep = keep_without(lists, order[:count])
        with drop_blocks(transformer, keep):
            error = relative_error(outputs(transformer, calls), reference)
        points.append(CurvePoint(kept=sum(map(len, keep.values())), error=error, keep=keep))
    return points


def keep_without(lists: Mapping[str, nn.ModuleList], gone: Sequence[Block]) -> dict[str, tuple[int, ...]]:
    """What ``drop_blocks`` has to keep so that these blocks are gone."""
    missing = set(gone)
    unknown = missing - set(_all_blocks(lists))
    if unknown:
        raise ConfigError(f"no block {sorted(unknown)[0]!r}; blocks are (list name, index) of {', '.join(lists)}.")
    return {name: tuple(i for i in range(len(blocks)) if (name, i) not in missing) for name, blocks in lists.items()}


def _all_blocks(lists: Mapping[str, nn.ModuleList]) -> list[Block]:
    return [(name, index) for name, blocks in lists.items() for index in range(len(blocks))]


def _error_without(
    transformer: nn.Module, gone: Sequence[Block], calls: Sequence[Call], reference: Sequence[Tensor]
) -> float:
    with drop_blocks(transformer, keep_without(droppable(transformer), gone)):
        return relative_error(outputs(transformer, calls), reference)


def _cosine_distances(
    transformer: nn.Module, lists: Mapping[str, nn.ModuleList], calls: Sequence[Call]
) -> dict[Block, float]:
    sums: dict[Block, float] = dict.fromkeys(_all_blocks(lists), 0.0)
    tokens = dict.fromkeys(sums, 0)

    def hook(block: Block) -> Callable[..., None]:
        def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            # Video tokens, and text tokens where the block returns them too.
            names = ("hidden_states", "encoder_hidden_states")
            given = [args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names)]
            made = result if isinstance(result, tuple) else (result,)
            for before, after in zip(given, made, strict=False):
                similar = torch.cosine_similarity(before.float(), after.float(), dim=-1)
                sums[block] += (1 - similar).sum().item()
                tokens[block] += similar.numel()

        return compare

    handles = [
        blocks[index].register_forward_hook(hook((name, index)), with_kwargs=True)
        for name, blocks in lists.items()
        for index in range(len(blocks))
    ]
    try:
        outputs(transformer, calls)
    finally:
        for handle in handles:
            handle.remove()
    return {block: sums[block] / tokens[block] for block in sums}
