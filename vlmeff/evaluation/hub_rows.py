"""Rows of published data sets as samples, without their pictures: one function for each data set.

Field names are those of the hub repositories that lmms-eval uses (``benchmarks.py`` names them). ``number`` is the
row's place in its split: an id where the data set has none.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from vlmeff.evaluation.folder import category_path
from vlmeff.evaluation.samples import Sample

Row = Mapping[str, Any]

# Subjects of MMMU by discipline (arXiv 2311.16502, figure 3).
DISCIPLINES = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy "
    "Public_Health",
    "Humanities and Social Science": "History Literature Psychology Sociology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power "
    "Materials Mechanical_Engineering",
}
DISCIPLINE_OF = {subject: discipline for discipline, names in DISCIPLINES.items() for subject in names.split()}


def vqav2(row: Row, number: int) -> Sample:
    answers = [answer["answer"] if isinstance(answer, Mapping) else answer for answer in row["answers"]]
    return _sample(row["question_id"], row, answers, group=row.get("image_id"), category=row.get("answer_type"))


def gqa(row: Row, number: int) -> Sample:
    image = str(row["imageId"])
    return _sample(row.get("id", number), row, [row["answer"]], group=image, meta={"image_id": image})


def textvqa(row: Row, number: int) -> Sample:
    meta = {"ocr_tokens": list(row.get("ocr_tokens") or [])}
    return _sample(row.get("question_id", number), row, list(row["answers"]), group=row.get("image_id"), meta=meta)


def vizwiz(row: Row, number: int) -> Sample:
    return _sample(row["question_id"], row, list(row["answers"]))


def pope(row: Row, number: int) -> Sample:
    split = row.get("category")
    return _sample(
        f"{split or 'pope'}/{row['question_id']}",
        row,
        [row["answer"].strip().lower()],
        group=row.get("image_source"),
        split=split,
    )


def mme(row: Row, number: int) -> Sample:
    category, picture = row["category"], str(row["question_id"])
    group = picture if picture.startswith(f"{category}/") else f"{category}/{picture}"
    return _sample(f"mme/{number}", row, [row["answer"].strip().lower()], group=group, category=category)


def mmbench(row: Row, number: int) -> Sample:
    index = int(row["index"])
    choices = [str(row[letter]) for letter in "ABCD" if not missing(row.get(letter))]
    meta = {"index": index} | ({} if missing(row.get("hint")) else {"hint": row["hint"]})
    category = category_path({"l2": row.get("L2-category") or "", "category": row.get("category") or ""})
    group = str(index % 1_000_000)
    return _sample(index, row, [row["answer"]], choices=choices, group=group, category=category, meta=meta)


def scienceqa(row: Row, number: int) -> Sample:
    answer = chr(ord("A") + int(row["answer"]))
    meta = {"hint": row["hint"]} if row.get("hint") else {}
    return _sample(
        f"scienceqa/{number}", row, [answer], choices=list(row["choices"]), category=row.get("subject"), meta=meta
    )


def docvqa(row: Row, number: int) -> Sample:
    return _sample(row["questionId"], row, list(row["answers"]), group=row.get("docId"))


def chartqa(row: Row, number: int) -> Sample:
    kind = row.get("type") or ""
    return _sample(f"chartqa/{number}", row, [row["answer"]], category=kind.removesuffix("_test") or None)


def mmmu(row: Row, number: int) -> Sample:
    identifier, answer = str(row["id"]), str(row["answer"])
    subject = re.sub(r"^[a-z]+_|_\d+$", "", identifier)
    choices = parsed_list(row["options"]) if row["question_type"] == "multiple-choice" else None
    category = category_path({"discipline": DISCIPLINE_OF.get(subject, "Other"), "subject": subject})
    answers = [answer] if choices else parsed_list(answer) or [answer]
    return _sample(identifier, row, answers, choices=choices, category=category)


def mmmu_pictures(sample: Sample) -> list[str]:
    """Columns of the pictures that question and options refer to as "<image 1>", in the order of their numbers."""
    text = "\n".join([sample.question, *(sample.choices or ())])
    numbers = sorted({int(n) for n in re.findall(r"<image (\d+)>", text)})
    return [f"image_{n}" for n in numbers] or ["image_1"]


def parsed_list(text: str) -> list[str] | None:
    """The strings of a list that is written as Python source; None if it is none."""
    if not text.lstrip().startswith("["):
        return None
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return [str(item) for item in value] if isinstance(value, list) else None


def missing(value: Any) -> bool:
    """Whether a cell of a table that went through pandas is empty."""
    return value is None or value != value or str(value).strip() in ("", "nan")


def _sample(
    doc_id: object,
    row: Row,
    answers: list[str],
    *,
    choices: list[str] | None = None,
    group: object = None,
    category: str | None = None,
    split: str | None = None,
    meta: dict[str, Any] | None = None,
) -> Sample:
    return Sample(
        doc_id=str(doc_id),
        images=(),
        question=row["question"],
        answers=[str(answer) for answer in answers],
        choices=choices,
        group=None if group is None else str(group),
        category=category or None,
        split=split,
        meta=meta or {},
    )
