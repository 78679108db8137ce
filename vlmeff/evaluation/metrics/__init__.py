"""Metrics by name. Scores are 0 to 1 (MME: points); both functions are pure and change nothing they are given.

Importing the package registers every metric; none of them needs torch.
"""

from vlmeff.evaluation.metrics import (
    anls,
    choice,
    consensus,
    easy_vqa,
    exact,
    mmbench,
    mme,
    mmmu,
    objects,
    pope,
    relaxed,
    scienceqa,
    yesno,
)
from vlmeff.evaluation.metrics.base import FACT, Metric, failed, metrics

# What a user's own folder of questions may name in its manifest.
FOLDER_METRICS = ("exact", "exact_nopunct", "vqa", "vqa_evalai", "anls", "relaxed", "choice", "yesno")

__all__ = [
    "FACT",
    "FOLDER_METRICS",
    "Metric",
    "anls",
    "choice",
    "consensus",
    "easy_vqa",
    "exact",
    "failed",
    "metrics",
    "mmbench",
    "mme",
    "mmmu",
    "objects",
    "pope",
    "relaxed",
    "scienceqa",
    "yesno",
]
