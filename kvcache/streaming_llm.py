"""StreamingLLM: the first tokens, which attention sinks into, and the last ones ("StreamingLLM", arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from kvcache.budget import uniform_budget
from kvcache.checks import check_choice, check_ints, check_keep_ratio
from kvcache.policy import LayerStats, Scope, ScoreSpec, Selection, policies

StreamingDecode = Literal["grow", "window"]


@policies.register("streaming_llm")
@dataclass(frozen=True, kw_only=True)
class StreamingLLM:
    """Keep the first ``sink`` tokens of the prompt and the last k - sink, in every layer.

    A floor for quality tables: it never looks at the prompt.

    Args:
        keep_ratio: share of the prompt's entries that stays, in (0, 1]; k = round(keep_ratio * n).
        sink: first tokens that stay.
        decode: "window" holds the last ``decode_window`` generated tokens, as the paper's rolling cache does; "grow"
            keeps all of them.

    Source: arXiv 2309.17453. Differs in keeping the tokens' positions, where the paper counts places in the cache.
    """

    keep_ratio: float = 0.5
    sink: int = 4
    decode: StreamingDecode = "window"
    decode_window: int = 1024

    needs: ClassVar[ScoreSpec] = ScoreSpec(kind="none")
    selection: ClassVar[Selection] = "shared"
    scope: ClassVar[Scope] = "layer"
    query_aware: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_keep_ratio("StreamingLLM", self.keep_ratio)
        check_ints("StreamingLLM", 0, sink=self.sink)
        check_ints("StreamingLLM", 1, decode_window=self.decode_window)
        check_choice("StreamingLLM", "decode", self.decode, get_args(StreamingDecode))

    def budgets(self, stats: list[LayerStats]) -> list[int]:
        return [
            uniform_budget("StreamingLLM", keep_ratio=self.keep_ratio, n=s.n, floor=self.sink + 1, say=s.layer == 0)
            for s in stats
        ]

    def select(self, stats: LayerStats, k: int) -> Tensor:
        sink = min(self.sink, k)
        return torch.cat([torch.arange(sink), torch.arange(stats.n - (k - sink), stats.n)])
