"""What a retention policy sees of a prompt and what it answers. Tensors only: no hooks, no model access.

A *retained* layer is a full-attention layer; sliding, linear and sharing layers are never touched. Statistics are of
one layer and one row of the batch, over its n real prompt tokens, oldest first: padding is never there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from vlmeff.registry import Registry

Selection = Literal["shared", "per_head"]
Scope = Literal["layer", "model"]


@dataclass(frozen=True, kw_only=True)
class ScoreSpec:
    """What has to be measured while the prompt goes through.

    ``kind``: "none"; "keys" (norms of the keys); "window" (attention of the last ``window`` queries); "full" (of all
    queries); "post_vision" (of the queries behind the last visual token). ``summed``: of a window the sum over its
    queries will do, so that no rows have to be held. ``query_heads``: sums are wanted for each query head.
    """

    kind: Literal["none", "keys", "window", "full", "post_vision"] = "none"
    window: int = 32
    summed: bool = False
    query_heads: bool = False

    @property
    def sums(self) -> bool:
        """Whether ``LayerStats.scores`` is what is measured, not rows of attention."""
        return self.kind == "full" or self.summed

    def reduction(self, selection: Selection) -> Literal["none", "group", "mean"]:
        """Over which query heads the sums are averaged for a policy that selects like this: none, each key head's
        group, all."""
        return "none" if self.query_heads else "group" if selection == "per_head" else "mean"


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerStats:
    """What was measured of one layer and row.

    ``layer``: its number among the ``layers`` retained ones. ``n`` real prompt tokens. ``kv_heads`` Hkv.
    ``scores`` [n] float32 ("full" and what is ``summed``: attention received, mean over all query heads, summed over
    queries), or [Hkv, n] for a policy that selects per head (mean over each head's group), or [Hq, n] where the needs
    say ``query_heads``. ``probs`` [Hq, w, n] float32 ("window", "post_vision": the attention rows themselves, w queries
    at most). ``key_norms`` [Hkv, n] float32 ("keys"). ``vision`` [n] bool: visual tokens, None when unknown.
    """

    layer: int
    layers: int
    n: int
    kv_heads: int
    scores: Tensor | None = None
    probs: Tensor | None = None
    key_norms: Tensor | None = None
    vision: Tensor | None = None


@runtime_checkable
class RetentionPolicy(Protocol):
    """Which entries of the prompt a layer keeps. A frozen dataclass, registered with ``policies.register``.

    ``keep_ratio``: share of the prompt's entries that stays, averaged over the layers. ``selection``: one index set for
    all key/value heads of a layer, or one per head (of equal size). ``scope``: "layer" needs nothing of the other
    layers, so a layer is compacted as soon as its prompt is through. ``query_aware``: the question shaped the choice,
    so the cache must not be used for another one.
    """

    @property
    def keep_ratio(self) -> float: ...

    @property
    def needs(self) -> ScoreSpec: ...

    @property
    def selection(self) -> Selection: ...

    @property
    def scope(self) -> Scope: ...

    @property
    def query_aware(self) -> bool: ...

    def budgets(self, stats: list[LayerStats]) -> list[int]:
        """Entries kept of each retained layer of one row (scope "layer": the list holds that one layer only, and
        ``stats[0].layer`` says which)."""
        ...

    def select(self, stats: LayerStats, k: int) -> Tensor:
        """The kept tokens, 0 .. n - 1, int64 ascending: [k], or [Hkv, k] per head."""
        ...


policies: Registry[RetentionPolicy] = Registry("KV retention policy")
