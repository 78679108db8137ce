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
            "told apart by it. Import the data again (vlmeff eval import-tsv)."
        )
    gold_letter(sample)


def _with_ocr(sample: Sample) -> None:
    enough_references(sample)
    tokens = sample.meta.get("ocr_tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise DataError(
            f"E-DATA-03: document {sample.doc_id!r} has no list of strings meta.ocr_tokens: add them, or "
            "take textvqa_val."
        )


def _mmmu_row(sample: Sample) -> None:
    if sample.choices:
        gold_letter(sample)


def _published(
    name: str,
    hub_name: str,
    split: str,
    convert: Any,
    *,
    paper: str,
    of_hub: dict[str, Any] | None = None,
    **fields: Any,
) -> None:
    """Register a benchmark of the hub; ``of_hub``: more fields of its ``Hub``, ``fields``: those of ``Benchmark``."""
    ids = (f"lmms-lab-encoder/{hub_name}", f"lmms-lab/{hub_name}")
    sources = (Hub(ids=ids, split=split, convert=convert, **(of_hub or {})),)
    given = {"license_note": THIRD_PARTY, "citation": f"arXiv {paper}", **fields}
    register(Benchmark(name=name, split=split, sources=sources, **given))


CONSENSUS: dict[str, Any] = {"answer_kind": "consensus of 10", "check": enough_references}
YES_NO: dict[str, Any] = {"answer_kind": "yes/no", "check": gold_yes, "group_key": "image id"}

_published(
    "vqav2_val", "VQAv2", "validation", hub_rows.vqav2,
    template=prompts.phrase, metric_name="vqa", max_new_tokens=16, **CONSENSUS,
    group_key="image id", expected_count=214_354, paper="1612.00837",
)  # fmt: skip
_published(
    "gqa", "GQA", "testdev", hub_rows.gqa,
    of_hub={"config": "testdev_balanced_instructions", "joined": "testdev_balanced_images"},
    template=prompts.phrase, metric_name="exact_nopunct", max_new_tokens=16, answer_kind="word",
    group_key="image id", expected_count=12_578, paper="1902.09506",
)  # fmt: skip
_TEXTVQA: dict[str, Any] = {
    "metric_name": "vqa_evalai", "max_new_tokens": 32, "group_key": "image id", "expected_count": 5_000,
    "paper": "1904.08920",
}  # fmt: skip
_published(
    "textvqa_val", "textvqa", "validation", hub_rows.textvqa,
    template=prompts.textvqa, **CONSENSUS, **_TEXTVQA,
    caption_notes=("without OCR tokens: not comparable to figures with them",),
)  # fmt: skip
_published(
    "textvqa_val_ocr", "textvqa", "validation", hub_rows.textvqa,
    template=prompts.textvqa_ocr, **(CONSENSUS | {"check": _with_ocr}), **_TEXTVQA,
    folders=("textvqa_val_ocr", "textvqa_val"),
    caption_notes=("with OCR tokens in the prompt: not comparable to figures without them",),
)  # fmt: skip
_published(
    "pope", "POPE", "test", hub_rows.pope,
    template=prompts.phrase, metric_name="pope", max_new_tokens=128, **YES_NO,
    expected_count=9_000, paper="2305.10355",
    caption_notes=("answers read as the official script does: whatever does not say no is a yes",),
)  # fmt: skip
_published(
    "mme", "MME", "test", hub_rows.mme,
    template=prompts.mme, metric_name="mme", max_new_tokens=16, **YES_NO,
    complete=_pair, expected_count=2_374, paper="2306.13394",
    caption_notes=("points, at most 2000 for perception and 800 for cognition",),
)  # fmt: skip
_published(
    "mmbench_en_dev", "MMBench", "dev", hub_rows.mmbench, of_hub={"config": "en"},
    template=prompts.mmbench, metric_name="mmbench", max_new_tokens=16, answer_kind="letter", check=_mmbench_row,
    group_key="base question", complete=_circular, expected_count=4_329, paper="2307.06281", license_note=SEE_CARD,
    caption_notes=("circular; answers are read by rules, no judge model is asked",),
)  # fmt: skip
_published(
    "scienceqa_img", "ScienceQA", "test", hub_rows.scienceqa, of_hub={"config": "ScienceQA-IMG"},
    template=prompts.scienceqa, metric_name="scienceqa", max_new_tokens=16, answer_kind="letter", check=gold_letter,
    expected_count=2_017, paper="2209.09513", license_note=SEE_CARD,
)  # fmt: skip
_published(
    "vizwiz_val", "VizWiz-VQA", "val", hub_rows.vizwiz,
    template=prompts.vizwiz, metric_name="vqa_evalai", max_new_tokens=32, **CONSENSUS,
    expected_count=4_319, paper="1802.08218",
)  # fmt: skip
_published(
    "docvqa_val", "DocVQA", "validation", hub_rows.docvqa, of_hub={"config": "DocVQA"},
    template=prompts.phrase, metric_name="anls", max_new_tokens=32, answer_kind="phrase",
    group_key="document id", expected_count=5_349, paper="2007.00398",
)  # fmt: skip
_published(
    "chartqa", "ChartQA", "test", hub_rows.chartqa,
    template=prompts.word, metric_name="relaxed", max_new_tokens=16, answer_kind="word or number",
    expected_count=2_500, paper="2203.10244",
)  # fmt: skip
_published(
    "mmmu_val", "MMMU", "validation", hub_rows.mmmu, of_hub={"pictures": hub_rows.mmmu_pictures},
    template=prompts.mmmu, metric_name="mmmu", max_new_tokens=128, answer_kind="letter or phrase", check=_mmmu_row,
    expected_count=900, paper="2311.16502",
    caption_notes=("where no option can be read one is drawn, the same for every run; acc_no_guess counts it wrong",),
)  # fmt: skip
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
