"""Helpers: documents as dictionaries, scored and stored as a run stores them."""

from __future__ import annotations

from vlmeff.evaluation.metrics import failed, metrics
from vlmeff.evaluation.samples import Sample, SampleRow


def document(answers, *, doc_id="d", question="q?", choices=None, group=None, category=None, split=None, meta=None):
    return Sample(
        doc_id=doc_id,
        images=(),
        question=question,
        answers=answers,
        choices=choices,
        group=group,
        category=category,
        split=split,
        meta=meta or {},
    )


def score(metric, prediction, answers, **fields):
    return metrics.get(metric)().score(document(answers, **fields), prediction)


def stored(metric, documents):
    """SampleRows of {"prediction": ..., "answers": ..., ...}; a prediction of None is a failed generation."""
    rows, scorer = [], metrics.get(metric)()
    for number, fields in enumerate(documents):
        fields = {"doc_id": str(number), **fields}
        prediction = fields.pop("prediction")
        sample = document(fields.pop("answers"), **fields)
        result = failed(scorer, sample) if prediction is None else scorer.score(sample, prediction)
        rows.append(
            SampleRow(
                doc_id=sample.doc_id,
                group=sample.group,
                split=sample.split,
                category=sample.category,
                prediction=prediction or "",
                error="out of memory" if prediction is None else None,
                **result,
            )
        )
    return rows


def evaluate(metric, documents):
    return metrics.get(metric)().aggregate(stored(metric, documents))
