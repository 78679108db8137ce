"""What goes into an evaluation and what comes out of it for one document. Plain data: nothing here needs torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

ROW_SCHEMA = "vlmeff.evalsample/1"


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One question. ``doc_id`` is unique in its benchmark and the only key that runs are joined by.

    ``images``: one callable per picture that decodes it (RGB), so that a benchmark need not be held in memory.
    ``answers``: all references; their order means nothing, how often one occurs does. ``choices``: texts of the
    options A, B, ... ``group``: the smallest unit that a metric can score and that intervals are resampled by
    (None: the document itself). ``category``: what sub-scores are reported by. ``split``: sub-split of a benchmark
    (POPE: "random", "popular", "adversarial"). ``meta`` is passed through.
    """

    doc_id: str
    images: Sequence[Callable[[], Image]]
    question: str
    answers: Sequence[str]
    choices: Sequence[str] | None = None
    group: str | None = None
    category: str | None = None
    split: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SampleRow:
    """One finished document of one run: a line of ``samples.jsonl``. Times in milliseconds, sizes in bytes.

    ``prediction``: raw text. ``parsed``: what the metric read in it (None: nothing). ``scores``: numbers by name, what
    metrics aggregate. ``error``: why there is no prediction; the document then counts as wrong. ``timing_valid`` is
    False where the times may not be compared (another machine than the rest of the run), or where there are none.
    ``vision_ms`` (vision encoder) and ``score_ms`` (choice of tokens) are parts of ``ttft_ms``. ``question`` and
    ``references`` are there for people who read a report, which is made without the benchmark's data.
    """

    doc_id: str
    group: str | None = None
    split: str | None = None
    category: str | None = None
    prediction: str = ""
    parsed: str | None = None
    scores: dict[str, Any] = field(default_factory=dict)
    unparsed: bool = False
    n_images: int = 0
    visual_tokens_in: int = 0
    visual_tokens_kept: int = 0
    visual_tokens_layer_mean: float | None = None
    prompt_tokens: int = 0
    prefill_tokens: int = 0
    output_tokens: int = 0
    hit_max: bool = False
    kv_bytes_prefill: int | None = None
    kv_bytes_end: int | None = None
    prefill_gflops: float | None = None
    preprocess_ms: float | None = None
    vision_ms: float | None = None
    score_ms: float | None = None
    ttft_ms: float | None = None
    e2e_ms: float | None = None
    peak_mem_bytes: int | None = None
    timing_valid: bool = True
    rank: int = 0
    attempt: int = 1
    error: str | None = None
    question: str | None = None
    references: Sequence[str] | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values, ``schema`` first."""
        return {"schema": ROW_SCHEMA, **{f.name: getattr(self, f.name) for f in fields(self)}}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> SampleRow:
        """Inverse of ``to_json``; keys of later versions are ignored."""
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in row.items() if name in known})
