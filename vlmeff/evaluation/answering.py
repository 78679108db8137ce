"""One document, answered by every run in turn: picture, prompt, ``generate``, score."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from vlmeff.errors import RunError, UnsupportedModelError, VlmeffError
from vlmeff.evaluation.benchmarks import Benchmark
from vlmeff.evaluation.controls import RunSpec
from vlmeff.evaluation.measuring import generate_measured
from vlmeff.evaluation.metrics import failed
from vlmeff.evaluation.samples import Sample, SampleRow


@dataclass(eq=False)
class Answerer:
    """A loaded model that answers samples as runs say.

    Args:
        timed: measure the time to the first token and peak memory of every call.
    Raises:
        UnsupportedModelError: the processor has no chat template, or takes no pictures.
    """

    model: Any
    processor: Any
    max_new_tokens: int | None = None
    timed: bool = True
    rank: int = 0
    _prepared: dict[Any, tuple[dict[str, Any], float]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not hasattr(self.processor, "image_processor"):
            raise UnsupportedModelError(f"eval: {type(self.model).__name__} takes no pictures.")
        if not getattr(self.processor, "chat_template", None):
            raise UnsupportedModelError(
                f"eval: {type(self.processor).__name__} has no chat template; add chat_template.jinja to the model."
            )

    def answer(
        self, benchmark: Benchmark, sample: Sample, runs: Sequence[RunSpec], attempts: Sequence[int]
    ) -> list[SampleRow]:
        """A row of each run. What fails becomes a row with ``error``; only running out of memory at once raises."""
        self._prepared.clear()
        return [self._row(benchmark, sample, run, n) for run, n in zip(runs, attempts, strict=True)]

    def _row(self, benchmark: Benchmark, sample: Sample, run: RunSpec, attempt: int) -> SampleRow:
        base = {**described(sample), "rank": self.rank, "attempt": attempt}
        try:
            return SampleRow(**base, **self._measured(benchmark, sample, run))
        except (torch.OutOfMemoryError, MemoryError) as error:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            reason = f"E-MODEL-04: out of memory at {sample.doc_id!r}: {_brief(error)}. {ADVICE}"
            return self.failed(benchmark, sample, reason, attempt)
        except VlmeffError:
            raise  # a setting that cannot work fails every document alike
        except Exception as error:
            # Counted against the error budget by the runner, and shown in every table.
            return self.failed(benchmark, sample, f"{type(error).__name__}: {_brief(error)}", attempt)

    def failed(self, benchmark: Benchmark, sample: Sample, reason: str, attempt: int) -> SampleRow:
        """The row of a document that has no answer: it counts as wrong."""
        return SampleRow(
            **described(sample),
            rank=self.rank,
            attempt=attempt,
            scores=failed(benchmark.metric, sample)["scores"],
            unparsed=True,
            timing_valid=False,
            error=reason,
        )

    def _measured(self, benchmark: Benchmark, sample: Sample, run: RunSpec) -> dict[str, Any]:
        inputs, preprocess_ms = self._inputs(benchmark, sample, run)
        run.apply(self.model)
        limit = self.max_new_tokens or benchmark.max_new_tokens
        found = generate_measured(self.model, inputs, max_new_tokens=limit, timed=self.timed)
        new = found.tokens[0]
        text = self.processor.decode(new, skip_special_tokens=True).strip()
        scored = benchmark.metric.score(sample, text)
        return {
            "prediction": text,
            "parsed": scored["parsed"],
            "unparsed": scored["unparsed"],
            "scores": scored["scores"],
            "visual_tokens_in": found.visual_tokens_in,
            "visual_tokens_kept": found.visual_tokens_kept,
            "visual_tokens_layer_mean": found.visual_tokens_layer_mean,
            "prompt_tokens": found.prompt_tokens,
            "prefill_tokens": found.prefill_tokens,
            "output_tokens": len(new),
            "hit_max": len(new) == limit and int(new[-1]) not in _end_ids(self.model),
            "kv_bytes_prefill": found.kv_bytes_prefill,
            "kv_bytes_end": found.kv_bytes_end,
            "prefill_gflops": found.prefill_gflops,
            "preprocess_ms": preprocess_ms if self.timed else None,
            "ttft_ms": found.ttft_ms,
            "e2e_ms": found.e2e_ms if self.timed else None,
            "peak_mem_bytes": found.peak_bytes,
            "timing_valid": self.timed,
        }

    def _inputs(self, benchmark: Benchmark, sample: Sample, run: RunSpec) -> tuple[dict[str, Any], float]:
        """The processor's inputs on the model's device and its milliseconds; runs with the same pictures share them."""
        key = None if run.change is None else run.name
        if key not in self._prepared:
            pictures = [load() for load in sample.images]
            if run.change is not None:
                pictures = [run.change(picture) for picture in pictures]
            start = time.perf_counter()
            inputs = self._processed(pictures, benchmark.prompt(sample))
            elapsed = 1000 * (time.perf_counter() - start)
            self._prepared[key] = (inputs, elapsed)
        inputs, elapsed = self._prepared[key]
        return dict(inputs), elapsed

    def _processed(self, pictures: Sequence[Image.Image], prompt: str) -> dict[str, Any]:
        content: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        out = {}
        for name, value in inputs.items():
            value = value.to(self.model.device) if isinstance(value, torch.Tensor) else value
            floating = isinstance(value, torch.Tensor) and value.is_floating_point()
            out[name] = value.to(self.model.dtype) if floating else value
        return out


def described(sample: Sample) -> dict[str, Any]:
    """The fields of a row that come from the sample."""
    return {
        "doc_id": sample.doc_id,
        "group": sample.group,
        "split": sample.split,
        "category": sample.category,
        "question": sample.question,
        "references": list(sample.answers),
        "n_images": len(sample.images),
    }


ADVICE = "Lower max_pixels of the processor, take a stronger preset, or a smaller dtype."


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")


def _end_ids(model: Any) -> set[int]:
    found = getattr(model.generation_config, "eos_token_id", None)
    return set(found) if isinstance(found, list) else {found} if isinstance(found, int) else set()


def check_effect(run: RunSpec, rows: Sequence[SampleRow], baseline: Sequence[SampleRow] | None) -> None:
    """Raise ``RunError`` (E-MODEL-03) when a run that has to reduce something reduced nothing.

    ``baseline``: rows of the same documents, for what only the size of the cache shows.
    """
    if not run.reduces:
        return
    full = {row.doc_id: row for row in baseline or ()}
    seen = [row for row in rows if row.error is None and (row.visual_tokens_in or row.prompt_tokens)]
    if not seen:
        return

    def reduced(row: SampleRow) -> bool:
        mean, whole = row.visual_tokens_layer_mean, full.get(row.doc_id)
        # A picture that was made smaller before the encoder has fewer tokens in than the baseline.
        before = row.visual_tokens_in if whole is None else max(row.visual_tokens_in, whole.visual_tokens_in)
        if row.visual_tokens_kept < before or (mean is not None and mean < before):
            return True
        bytes_of = (row.kv_bytes_prefill, None if whole is None else whole.kv_bytes_prefill)
        return whole is not None and None not in bytes_of and bytes_of[0] < bytes_of[1]  # type: ignore[operator]

    if not any(map(reduced, seen)):
        raise RunError(
            f"E-MODEL-03: {run.name} had no effect: none of {len(seen)} documents lost visual tokens or cache entries "
            f"({run.parameters.get('method')}). Check min_visual_tokens and the budget of the preset."
        )
