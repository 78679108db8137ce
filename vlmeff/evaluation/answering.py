"""Documents, answered by every run in turn: picture, prompt, ``generate``, score."""

from __future__ import annotations

import inspect
import statistics
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image

from vlmeff.errors import RunError, UnsupportedModelError, VlmeffError
from vlmeff.evaluation.batching import end_ids, generate_together, until_end
from vlmeff.evaluation.benchmarks import Benchmark
from vlmeff.evaluation.controls import RunSpec
from vlmeff.evaluation.measuring import Generated, generate_measured
from vlmeff.evaluation.metrics import failed
from vlmeff.evaluation.samples import Sample, SampleRow

TIMES = ("preprocess_ms", "vision_ms", "score_ms", "ttft_ms", "e2e_ms")
REMEMBERED = 4096  # answers of the blank control


@dataclass(eq=False)
class Answerer:
    """A loaded model that answers samples as runs say.

    Args:
        timed: measure the times and the peak memory of every call that is of one document.
        repeats: calls of each run that are timed; a row has their median.
        fixed_output: generate so many tokens whatever ends the answer; what follows its end is no part of it.
    Raises:
        UnsupportedModelError: the processor has no chat template, or takes no pictures.
    """

    model: Any
    processor: Any
    max_new_tokens: int | None = None
    timed: bool = True
    rank: int = 0
    repeats: int = 1
    fixed_output: int | None = None
    _takes_processor_kwargs: bool = field(default=False, repr=False)  # or warns of them, by the version
    _timing: bool = field(default=True, repr=False)  # of the call that is at work
    _prepared: dict[Any, tuple[dict[str, Any], float]] = field(default_factory=dict, repr=False)
    _unseen: OrderedDict[Any, Generated] = field(default_factory=OrderedDict, repr=False)

    def __post_init__(self) -> None:
        if not hasattr(self.processor, "image_processor"):
            raise UnsupportedModelError(f"eval: {type(self.model).__name__} takes no pictures.")
        if not getattr(self.processor, "chat_template", None):
            raise UnsupportedModelError(
                f"eval: {type(self.processor).__name__} has no chat template; add chat_template.jinja to the model."
            )
        template = inspect.signature(self.processor.apply_chat_template)
        self._takes_processor_kwargs = "processor_kwargs" in template.parameters

    def answer(
        self,
        benchmark: Benchmark,
        sample: Sample,
        runs: Sequence[RunSpec],
        attempts: Sequence[int],
        *,
        timed: bool = True,
        repeats: int | None = None,
    ) -> list[SampleRow]:
        """A row of each run. What fails becomes a row with ``error``; only running out of memory at once raises.

        ``timed`` False: without times, whatever the answerer was made for.
        """
        self._prepared.clear()
        self._timing = self.timed and timed
        count = (repeats or self.repeats) if self._timing else 1
        found = [[self._row(benchmark, sample, run, n)] for run, n in zip(runs, attempts, strict=True)]
        for _ in range(count - 1):
            for rows, run, n in zip(found, runs, attempts, strict=True):
                if not run.sees_nothing:
                    rows.append(self._row(benchmark, sample, run, n))
        return [_median(rows) for rows in found]

    def answer_together(
        self,
        benchmark: Benchmark,
        samples: Sequence[Sample],
        runs: Sequence[RunSpec],
        attempts: Sequence[Sequence[int]],
    ) -> list[list[SampleRow]]:
        """``answer`` of several samples in one padded batch for each run, without times.

        Raises:
            Exception: whatever goes wrong; which sample it is of shows when they are answered one by one.
        """
        self._prepared.clear()
        self._timing = False
        columns = []
        for number, run in enumerate(runs):
            made = self._generated_together(benchmark, samples, run)
            columns.append(
                [
                    SampleRow(
                        **described(sample),
                        rank=self.rank,
                        attempt=tries[number],
                        **self._scored(benchmark, sample, found, None),
                    )
                    for sample, found, tries in zip(samples, made, attempts, strict=True)
                ]
            )
        return [list(rows) for rows in zip(*columns, strict=True)]

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

    # -- one document

    def _measured(self, benchmark: Benchmark, sample: Sample, run: RunSpec) -> dict[str, Any]:
        if run.sees_nothing:
            pictures = [load() for load in sample.images]
            key = _unseen_key(benchmark, benchmark.prompt(sample), pictures)
            if key not in self._unseen:
                self._remember(key, self._generated(benchmark, sample, run, timed=False)[0])
            return self._scored(benchmark, sample, self._unseen[key], None)
        return self._scored(benchmark, sample, *self._generated(benchmark, sample, run, timed=self._timing))

    def _generated(
        self, benchmark: Benchmark, sample: Sample, run: RunSpec, *, timed: bool
    ) -> tuple[Generated, float | None]:
        inputs, preprocess_ms = self._inputs(benchmark, [sample], run)
        run.apply(self.model)
        found = generate_measured(
            self.model,
            inputs,
            max_new_tokens=self.fixed_output or self._limit(benchmark),
            timed=timed,
            fixed_output=self.fixed_output is not None,
        )
        return found, preprocess_ms if timed else None

    def _limit(self, benchmark: Benchmark) -> int:
        return self.max_new_tokens or benchmark.max_new_tokens

    def _scored(
        self, benchmark: Benchmark, sample: Sample, found: Generated, preprocess_ms: float | None
    ) -> dict[str, Any]:
        """The fields of a row. ``preprocess_ms`` None: there are no times."""
        made, ends = found.tokens[0].tolist(), end_ids(self.model)
        limit = self._limit(benchmark)
        answer = until_end(made, ends)[:limit]
        timed = preprocess_ms is not None
        text = self.processor.decode(answer, skip_special_tokens=True).strip()
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
            "output_tokens": len(made),
            "hit_max": len(answer) == min(limit, self.fixed_output or limit) and answer[-1] not in ends,
            "kv_bytes_prefill": found.kv_bytes_prefill,
            "kv_bytes_end": found.kv_bytes_end,
            "prefill_gflops": found.prefill_gflops,
            "preprocess_ms": preprocess_ms,
            "vision_ms": found.vision_ms if timed else None,
            "score_ms": found.score_ms if timed else None,
            "ttft_ms": found.ttft_ms if timed else None,
            "e2e_ms": found.e2e_ms if timed else None,
            "peak_mem_bytes": found.peak_bytes if timed else None,
            "timing_valid": timed,
        }

    # -- several documents

    def _generated_together(self, benchmark: Benchmark, samples: Sequence[Sample], run: RunSpec) -> list[Generated]:
        if not run.sees_nothing:
            return self._batch(benchmark, samples, run)
        keys = []
        new: dict[Any, Sample] = {}
        for sample in samples:
            pictures = [load() for load in sample.images]
            keys.append(_unseen_key(benchmark, benchmark.prompt(sample), pictures))
            new.setdefault(keys[-1], sample)
        found = {key: self._unseen[key] for key in new if key in self._unseen}
        missing = {key: sample for key, sample in new.items() if key not in found}
        if missing:
            made = self._batch(benchmark, list(missing.values()), run)
            found |= dict(zip(missing, made, strict=True))
            for key in missing:
                self._remember(key, found[key])
        return [found[key] for key in keys]

    def _remember(self, key: Any, found: Generated) -> None:
        self._unseen[key] = replace(found, report=None)
        if len(self._unseen) > REMEMBERED:
            self._unseen.popitem(last=False)

    def _batch(self, benchmark: Benchmark, samples: Sequence[Sample], run: RunSpec) -> list[Generated]:
        inputs, _ = self._inputs(benchmark, samples, run)
        run.apply(self.model)
        return generate_together(
            self.model,
            inputs,
            [len(sample.images) for sample in samples],
            max_new_tokens=self.fixed_output or self._limit(benchmark),
            fixed_output=self.fixed_output is not None,
        )

    # -- inputs

    def _inputs(self, benchmark: Benchmark, samples: Sequence[Sample], run: RunSpec) -> tuple[dict[str, Any], float]:
        """The processor's inputs on the model's device and its milliseconds; runs with the same pictures share them."""
        key = None if run.change is None else run.name
        if key not in self._prepared:
            pictures = [self._pictures(sample, run) for sample in samples]
            start = time.perf_counter()
            inputs = self._processed(pictures, [benchmark.prompt(sample) for sample in samples])
            elapsed = 1000 * (time.perf_counter() - start)
            self._prepared[key] = (inputs, elapsed)
        inputs, elapsed = self._prepared[key]
        return dict(inputs), elapsed

    def _pictures(self, sample: Sample, run: RunSpec) -> list[Image.Image]:
        pictures = [load() for load in sample.images]
        return pictures if run.change is None else [run.change(picture) for picture in pictures]

    def _processed(self, pictures: Sequence[Sequence[Image.Image]], prompts: Sequence[str]) -> dict[str, Any]:
        """Of one prompt, or of several, padded on the left."""
        turns = []
        for images, prompt in zip(pictures, prompts, strict=True):
            content: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in images]
            turns.append([{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}])
        options: dict[str, Any] = {"return_tensors": "pt"}
        if len(turns) > 1:
            tokenizer = getattr(self.processor, "tokenizer", self.processor)
            tokenizer.padding_side = "left"
            if tokenizer.pad_token is None:  # masked out, so any token will do
                tokenizer.pad_token = tokenizer.eos_token
            options["padding"] = True
        inputs = self.processor.apply_chat_template(
            turns if len(turns) > 1 else turns[0],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **({"processor_kwargs": options} if self._takes_processor_kwargs else options),
        )
        out = {}
        for name, value in inputs.items():
            value = value.to(self.model.device) if isinstance(value, torch.Tensor) else value
            floating = isinstance(value, torch.Tensor) and value.is_floating_point()
            out[name] = value.to(self.model.dtype) if floating else value
        return out


def _unseen_key(benchmark: Benchmark, prompt: str, pictures: Sequence[Image.Image]) -> Any:
    return benchmark.name, prompt, tuple(picture.size for picture in pictures)


def _median(rows: Sequence[SampleRow]) -> SampleRow:
    """The first row with the median times of all, or the first that failed."""
    bad = next((row for row in rows if row.error is not None), None)
    if bad is not None or len(rows) == 1:
        return bad or rows[0]
    times = {name: [getattr(row, name) for row in rows] for name in TIMES}
    peaks = [row.peak_mem_bytes for row in rows if row.peak_mem_bytes is not None]
    medians: dict[str, Any] = {n: None if None in values else statistics.median(values) for n, values in times.items()}
    return replace(
        rows[0],
        **medians,
        peak_mem_bytes=max(peaks, default=None),
    )


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


ADVICE = "Lower max_pixels of the processor, take a stronger preset, a smaller dtype, or --batch-size 1."


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")


def check_effect(run: RunSpec, rows: Sequence[SampleRow], baseline: Sequence[SampleRow] | None) -> None:
    """Raise ``RunError`` (E-MODEL-03) when a run that has to reduce something reduced nothing.

    ``baseline``: rows of the same documents, for what only the size of the cache shows.
    """
    if not run.reduces:
        return
    full = {row.doc_id: row for row in baseline or ()}
    seen = [row for row in rows if row.error is None and (row.visual_tokens_in or row.prompt_tokens)]

    def reduced(row: SampleRow) -> bool:
        mean, whole = row.visual_tokens_layer_mean, full.get(row.doc_id)
        # A picture that was made smaller before the encoder has fewer tokens in than the baseline.
        before = row.visual_tokens_in if whole is None else max(row.visual_tokens_in, whole.visual_tokens_in)
        if row.visual_tokens_kept < before or (mean is not None and mean < before):
            return True
        bytes_of = (row.kv_bytes_prefill, None if whole is None else whole.kv_bytes_prefill)
        return whole is not None and None not in bytes_of and bytes_of[0] < bytes_of[1]  # type: ignore[operator]

    def unknown(row: SampleRow) -> bool:
        """Only the cache could have become smaller, and its size is not known of this row (batches) or the baseline."""
        whole = full.get(row.doc_id)
        return not run.parameters.get("tokens") and (
            row.kv_bytes_prefill is None or whole is None or whole.kv_bytes_prefill is None
        )

    known = [row for row in seen if reduced(row) or not unknown(row)]
    if known and not any(map(reduced, known)):
        raise RunError(
            f"E-MODEL-03: {run.name} had no effect: none of {len(known)} documents lost visual tokens or cache entries "
            f"({run.parameters.get('method')}). Check min_visual_tokens and the budget of the preset."
        )
