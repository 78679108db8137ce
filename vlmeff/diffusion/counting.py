"""Count what a video transformer really computes, so that the effect of a cache is measured and not claimed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vlmeff.diffusion.families import family_of


@dataclass(eq=False)
class Work:
    """What was really computed while it was counted.

    ``blocks`` and ``attentions``: how often they were called, and how often a linear layer inside them ran.
    ``linear_share``: operations of the linear layers against those of as many calls like the fullest one.
    """

    calls: int = 0
    blocks_called: int = 0
    blocks_computed: int = 0
    attentions_called: int = 0
    attentions_computed: int = 0
    linear_flops: float = 0.0
    fullest_call: float = 0.0

    @property
    def linear_share(self) -> float:
        """1 where no call did less than the fullest one."""
        return self.linear_flops / (self.calls * self.fullest_call) if self.fullest_call else 1.0

    def __str__(self) -> str:
        return (
            f"measured over {self.calls} calls: {self.blocks_computed} of {self.blocks_called} blocks and "
            f"{self.attentions_computed} of {self.attentions_called} attention layers computed, "
            f"{self.linear_share:.0%} of the linear layers' work"
        )


@contextmanager
def count_work(transformer: nn.Module) -> Iterator[Work]:
    """Count with hooks which blocks and attention layers are computed and which a cache skips.

    Enable caches before or inside. Counting slows a compiled model down (the hooks break its graphs): count in a run of
    its own, not in the timed one.
    """
    work = Work()
    lists = family_of(transformer).block_lists(transformer)
    blocks = [block for members in lists.values() for block in members]
    attentions = [module for block in blocks for module in block.modules() if hasattr(module, "to_q")]
    running: list[list[Any]] = []  # modules inside which the call is, each with whether a linear layer ran

    def enter(kind: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            running.append([kind, False])

        return hook

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        kind, ran = running.pop()
        setattr(work, f"{kind}_called", getattr(work, f"{kind}_called") + 1)
        setattr(work, f"{kind}_computed", getattr(work, f"{kind}_computed") + ran)

    begin = [0.0]

    def call_begins(module: nn.Module, args: Any) -> None:
        begin[0] = work.linear_flops

    def call_ends(module: nn.Module, args: Any, result: Any) -> None:
        work.calls += 1
        work.fullest_call = max(work.fullest_call, work.linear_flops - begin[0])

    def linear_runs(module: Any, args: tuple[Any, ...], result: Tensor) -> None:
        for entry in running:
            entry[1] = True
        work.linear_flops += 2.0 * result.numel() * module.in_features

    handles = [transformer.register_forward_pre_hook(call_begins), transformer.register_forward_hook(call_ends)]
    for kind, modules in (("blocks", blocks), ("attentions", attentions)):
        for module in modules:
            handles += [module.register_forward_pre_hook(enter(kind)), module.register_forward_hook(leave)]
    for block in blocks:
        leaves = (module for module in block.modules() if hasattr(module, "in_features"))
        handles += [leaf.register_forward_hook(linear_runs) for leaf in leaves]
    try:
        yield work
    finally:
        for handle in handles:
            handle.remove()
