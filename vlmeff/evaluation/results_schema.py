"""The shape of ``results.json`` (schema ``vlmeff.results/1``): what was run, what it scored and cost, how it compares.

Scores, differences and their intervals are 0 to 1; ``scale`` of a run is what they are multiplied with for printing
(100, and 1 for scores that come in points of their own, as MME's). Paths are relative to the file. A figure that
is not known is null, never NaN.
"""

from __future__ import annotations

from pathlib import PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

SCHEMA = "vlmeff.results/1"

Kind = Literal["baseline", "preset", "control"]
Verdict = Literal["non-inferior", "inferior", "worse but within margin", "inconclusive"]
ControlVerdict = Literal["better", "worse", "inconclusive"]


def _ordered(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"an interval goes from low to high, this one is {list(value)}")
    return value


def _relative(value: str) -> str:
    # A report can be written on one system and read on another: both spellings of an absolute path are refused.
    if PurePosixPath(value).is_absolute() or PureWindowsPath(value).drive or "\\" in value:
        raise ValueError(f"{value!r} is not a path relative to the file, with / between its parts")
    if ".." in PurePosixPath(value).parts:
        raise ValueError(f"{value!r} leaves the folder of the file")
    return value


Interval = Annotated[tuple[float, float], AfterValidator(_ordered)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
RelativePath = Annotated[str, AfterValidator(_relative)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class MetricValue(_Record):
    """One figure of a run over ``n`` documents; an interval is given for the headline figure."""

    value: float | None
    ci95: Interval | None = None
    n: Count


class Cost(_Record):
    """Deterministic costs: means per document. ``kept_ratio``: all tokens kept over all tokens in."""

    visual_tokens_in: float
    visual_tokens_kept: float
    visual_tokens_layer_mean: float | None = None
    kept_ratio: float | None
    prompt_tokens: float
    prefill_tokens: float
    output_tokens: float
    kv_bytes_prefill: float | None
    kv_bytes_end: float | None
    prefill_gflops: float | None


class Quantiles(_Record):
    """Median and 95th percentile."""

    p50: float
    p95: float


class Latency(_Record):
    """Wall-clock figures over the ``n`` documents whose times are valid. ``peak_mem_bytes``: the largest of them."""

    valid: bool
    n: Count
    ttft_ms: Quantiles | None = None
    e2e_ms: Quantiles | None = None
    decode_ms_per_token: float | None = None
    preprocess_ms: float | None = None
    peak_mem_bytes: Count | None = None


class Run(_Record):
    """One run: a model with a preset or a control, or as it is, on one benchmark.

    ``id`` is the folder of the run below that of the model. ``metric``: the headline among ``metrics``.
    ``unparsed`` and ``hit_max`` are shares of the documents, ``errors`` is a count.
    """

    id: str
    label: str
    kind: Kind
    preset: str | None
    control: str | None = None
    parameters: dict[str, Any]
    benchmark: str
    data: dict[str, Any]
    partial: bool
    metric: str
    scale: float
    metrics: dict[str, MetricValue]
    cost: Cost
    latency: Latency | None
    unparsed: Share
    errors: Count
    hit_max: Share
    caption_notes: list[str]
    fingerprint: str
    created: str
    samples: RelativePath


class McNemar(_Record):
    """b documents were wrong and are right now, c were right and are wrong now; ``p`` is exact and two-sided."""

    b: Count
    c: Count
    p: Share


class Speedup(_Record):
    """Medians of the ratios baseline / candidate per document; ``ci95`` belongs to ``ttft``."""

    ttft: float | None
    e2e: float | None
    decode: float | None
    ci95: Interval | None
    n: Count


class CategoryDelta(_Record):
    """The difference of the per-document scores inside one category."""

    delta: float
    ci95: Interval | None
    n: Count


class Comparison(_Record):
    """A candidate against the baseline on the documents they share.

    ``margin`` is in the unit of ``delta``. ``detectable``: the smallest difference that this many documents show with
    80 % power. ``churn``: share of documents whose score changed, in either direction. ``retained``: candidate over
    baseline in percent. ``token_ratio``: visual tokens that the language model sees, over the baseline's.
    ``unmatched``: documents of either run that the other lacks.
    """

    baseline: str
    candidate: str
    label: str
    kind: Kind
    benchmark: str
    metric: str
    n: Count
    unmatched: Count
    delta: float
    ci95: Interval | None
    resamples: Count
    margin: float
    verdict: Verdict
    mcnemar: McNemar | None
    p_holm: Share | None = None
    detectable: float | None
    agreement: Share
    churn: Share
    retained: float | None
    retained_ci95: Interval | None
    token_ratio: float | None
    kv_ratio: float | None
    speedup: Speedup | None
    categories: dict[str, CategoryDelta]


class ControlComparison(_Record):
    """A preset against one of its controls on the documents that both have: ``delta`` is preset - control.

    ``verdict``: better or worse where the interval leaves out 0. ``mcnemar``: b documents are right with the preset
    alone, c with the control alone. ``p_holm``: adjusted over all presets, controls and benchmarks. ``token_ratio``:
    visual tokens of the preset over the control's; 1 says that they had the same budget.
    """

    preset: str
    control: str
    preset_label: str
    control_label: str
    benchmark: str
    metric: str
    n: Count
    unmatched: Count
    delta: float
    ci95: Interval | None
    resamples: Count
    verdict: ControlVerdict
    mcnemar: McNemar | None
    p_holm: Share | None = None
    token_ratio: float | None


class Retained(_Record):
    """What a preset or control keeps of the baseline's accuracy, in percent, by benchmark and on average.

    ``mean`` is null unless there is a figure for every benchmark that has a baseline. ``token_ratio`` and
    ``ttft_speedup`` are geometric means over the same benchmarks.
    """

    label: str
    kind: Kind
    benchmarks: dict[str, float | None]
    mean: float | None
    ci95: Interval | None
    token_ratio: float | None
    ttft_speedup: float | None


class Results(_Record):
    """A whole report."""

    schema_: Literal["vlmeff.results/1"] = Field(alias="schema")
    vlmeff: str
    created: str
    partial: bool
    margin: float
    seed: int
    environment: dict[str, Any]
    model: dict[str, Any]
    runs: list[Run]
    comparisons: list[Comparison]
    against_controls: list[ControlComparison] = []
    retained: list[Retained]
    notes: list[str]

    def runs_of(self, benchmark: str) -> list[Run]:
        """Baseline, presets, controls of ``benchmark``, in the order of the table."""
        return [run for run in self.runs if run.benchmark == benchmark]

    def comparison_of(self, run: Run) -> Comparison | None:
        """How ``run`` compares with its baseline."""
        return next((c for c in self.comparisons if c.candidate == run.id), None)

    def against_controls_of(self, benchmark: str) -> list[ControlComparison]:
        """How the presets of ``benchmark`` compare with their controls, preset by preset."""
        return [c for c in self.against_controls if c.benchmark == benchmark]

    @property
    def benchmarks(self) -> list[str]:
        """Names of the benchmarks, each once, in order."""
        return list(dict.fromkeys(run.benchmark for run in self.runs))

    @property
    def regressions(self) -> list[Comparison]:
        """Presets that are worse than the baseline by more than the margin: what ``--fail-on-regression`` looks at."""
        return [c for c in self.comparisons if c.kind == "preset" and c.verdict == "inferior"]


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of ``results.json``."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Results.model_json_schema(by_alias=True)}
