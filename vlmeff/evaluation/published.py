"""The published benchmarks: prompts, lengths and metrics as lmms-eval has them, so that figures can be compared.

``expected_count`` is what the data sets' own documentation says. No commit of the hub's data sets has been verified, so
none is pinned; the one that was used is recorded with every result. Organisation ``lmms-lab`` was renamed to
``lmms-lab-encoder``; both are tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmeff.errors import DataError
from vlmeff.evaluation import hub_rows, prompts, sources
from vlmeff.evaluation.benchmarks import Benchmark, enough_references, register
from vlmeff.evaluation.metrics.base import gold_letter, gold_yes
from vlmeff.evaluation.metrics.mmbench import SHIFT, check_shifts
from vlmeff.evaluation.samples import Sample
from vlmeff.evaluation.sources import Hub, Package

THIRD_PARTY = "The pictures carry rights of third parties; none is shipped."
SEE_CARD = "See the card of the data set; none of it is shipped."


def _hub(name: str, split: str, convert: Any, **more: Any) -> tuple[Hub]:
    ids = (f"lmms-lab-encoder/{name}", f"lmms-lab/{name}")
    return (Hub(ids=ids, split=split, convert=convert, **more),)


def _pair(group: str, samples: Sequence[Sample]) -> None:
    if len(samples) != 2:
        raise DataError(
            f"E-DATA-07: MME's picture {group!r} has {len(samples)} questions instead of 2; complete the data."
        )


def _circular(group: str, samples: Sequence[Sample]) -> None:
    check_shifts(group, [int(sample.meta["index"]) // SHIFT for sample in samples])


def _mmbench_row(sample: Sample) -> None:
    index = sample.meta.get("index")
    if not isinstance(index, int) or isinstance(index, bool) or index < 0:
        raise DataError(
            f"E-DATA-03: document {sample.doc_id!r} has no whole number meta.index: MMBench's circular shifts are "
            "told apart by it."
        )
    gold_letter(sample)


def _with_ocr(sample: Sample) -> None:
    enough_references(sample)
    tokens = sample.meta.get("ocr_tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise DataError(f"E-DATA-03: document {sample.doc_id!r} has no list of strings meta.ocr_tokens.")


def _mmmu_row(sample: Sample) -> None:
    if sample.choices:
        gold_letter(sample)


register(
    Benchmark(
        name="vqav2_val",
        template=prompts.phrase,
        metric_name="vqa",
        max_new_tokens=16,
        answer_kind="consensus of 10",
        split="validation",
        sources=_hub("VQAv2", "validation", hub_rows.vqav2),
        group_key="image id",
        check=enough_references,
        expected_count=214_354,
        license_note=THIRD_PARTY,
        citation="arXiv 1612.00837",
    )
)
register(
    Benchmark(
        name="gqa",
        template=prompts.phrase,
        metric_name="exact_nopunct",
        max_new_tokens=16,
        answer_kind="word",
        split="testdev",
        sources=_hub(
            "GQA", "testdev", hub_rows.gqa, config="testdev_balanced_instructions", joined="testdev_balanced_images"
        ),
        group_key="image id",
        expected_count=12_578,
        license_note=THIRD_PARTY,
        citation="arXiv 1902.09506",
    )
)
_TEXTVQA: dict[str, Any] = {
    "metric_name": "vqa_evalai",
    "max_new_tokens": 32,
    "answer_kind": "consensus of 10",
    "split": "validation",
    "sources": _hub("textvqa", "validation", hub_rows.textvqa),
    "group_key": "image id",
    "expected_count": 5_000,
    "license_note": THIRD_PARTY,
    "citation": "arXiv 1904.08920",
}
register(
    Benchmark(
        name="textvqa_val",
        template=prompts.textvqa,
        check=enough_references,
        caption_notes=("without OCR tokens: not comparable to figures with them",),
        **_TEXTVQA,
    )
)
register(
    Benchmark(
        name="textvqa_val_ocr",
        template=prompts.textvqa_ocr,
        check=_with_ocr,
        folders=("textvqa_val_ocr", "textvqa_val"),
        caption_notes=("with OCR tokens in the prompt: not comparable to figures without them",),
        **_TEXTVQA,
    )
)
register(
    Benchmark(
        name="pope",
        template=prompts.phrase,
        metric_name="pope",
        max_new_tokens=128,
        answer_kind="yes/no",
        split="test",
        sources=_hub("POPE", "test", hub_rows.pope),
        group_key="image id",
        check=gold_yes,
        expected_count=9_000,
        caption_notes=("answers read as the official script does: whatever does not say no is a yes",),
        license_note=THIRD_PARTY,
        citation="arXiv 2305.10355",
    )
)
register(
    Benchmark(
        name="mme",
        template=prompts.mme,
        metric_name="mme",
        max_new_tokens=16,
        answer_kind="yes/no",
        split="test",
        sources=_hub("MME", "test", hub_rows.mme),
        group_key="image id",
        complete=_pair,
        check=gold_yes,
        expected_count=2_374,
        caption_notes=("points, at most 2000 for perception and 800 for cognition",),
        license_note=THIRD_PARTY,
        citation="arXiv 2306.13394",
    )
)
register(
    Benchmark(
        name="mmbench_en_dev",
        template=prompts.mmbench,
        metric_name="mmbench",
        max_new_tokens=16,
        answer_kind="letter",
        split="dev",
        sources=_hub("MMBench", "dev", hub_rows.mmbench, config="en"),
        group_key="base question",
        complete=_circular,
        check=_mmbench_row,
        expected_count=4_329,
        caption_notes=("circular; answers are read by rules, no judge model is asked",),
        license_note=SEE_CARD,
        citation="arXiv 2307.06281",
    )
)
register(
    Benchmark(
        name="scienceqa_img",
        template=prompts.scienceqa,
        metric_name="scienceqa",
        max_new_tokens=16,
        answer_kind="letter",
        split="test",
        sources=_hub("ScienceQA", "test", hub_rows.scienceqa, config="ScienceQA-IMG"),
        check=gold_letter,
        expected_count=2_017,
        license_note=SEE_CARD,
        citation="arXiv 2209.09513",
    )
)
register(
    Benchmark(
        name="vizwiz_val",
        template=prompts.vizwiz,
        metric_name="vqa_evalai",
        max_new_tokens=32,
        answer_kind="consensus of 10",
        split="val",
        sources=_hub("VizWiz-VQA", "val", hub_rows.vizwiz),
        check=enough_references,
        expected_count=4_319,
        license_note=THIRD_PARTY,
        citation="arXiv 1802.08218",
    )
)
register(
    Benchmark(
        name="docvqa_val",
        template=prompts.phrase,
        metric_name="anls",
        max_new_tokens=32,
        answer_kind="phrase",
        split="validation",
        sources=_hub("DocVQA", "validation", hub_rows.docvqa, config="DocVQA"),
        group_key="document id",
        expected_count=5_349,
        license_note=THIRD_PARTY,
        citation="arXiv 2007.00398",
    )
)
register(
    Benchmark(
        name="chartqa",
        template=prompts.word,
        metric_name="relaxed",
        max_new_tokens=16,
        answer_kind="word or number",
        split="test",
        sources=_hub("ChartQA", "test", hub_rows.chartqa),
        expected_count=2_500,
        license_note=THIRD_PARTY,
        citation="arXiv 2203.10244",
    )
)
register(
    Benchmark(
        name="mmmu_val",
        template=prompts.mmmu,
        metric_name="mmmu",
        max_new_tokens=128,
        answer_kind="letter or phrase",
        split="validation",
        sources=_hub("MMMU", "validation", hub_rows.mmmu, pictures=hub_rows.mmmu_pictures),
        check=_mmmu_row,
        expected_count=900,
        caption_notes=(
            "where no option can be read one is drawn, the same for every run; acc_no_guess counts it wrong",
        ),
        license_note=THIRD_PARTY,
        citation="arXiv 2311.16502",
    )
)
register(
    Benchmark(
        name="easy_vqa",
        template=prompts.easy_vqa,
        metric_name="easy_vqa",
        max_new_tokens=8,
        answer_kind="word",
        split="test",
        sources=(Package(sources.easy_vqa),),
        group_key="image id",
        expected_count=9_673,
        caption_notes=(
            "blind prior (the most frequent training answer of each question, of equally frequent ones the first): "
            "open 23.3 %, shape 34.8 %, color 12.0 %, yes/no 82.5 %, all 67.0 %",
        ),
        license_note="MIT",
        citation="https://github.com/vzhou842/easy-VQA",
    )
)
