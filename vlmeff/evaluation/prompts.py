"""What is asked: the question of a sample with what a benchmark puts around it, before any chat template.

The texts equal lmms-eval's defaults, line feeds included, so that figures can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vlmeff.evaluation.metrics.base import option_letters
from vlmeff.evaluation.samples import Sample

PHRASE = "\nAnswer the question using a single word or phrase."
WORD = "\nAnswer the question with a single word."
EASY = "\nAnswer the question using a single word."
LETTER = "\nAnswer with the option's letter from the given choices directly."
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
MME_ENDING = " Please answer yes or no."


@dataclass(frozen=True)
class Template:
    """``text`` shows what ``build`` does, for people and for the fingerprint of a run: change both or neither."""

    name: str
    text: str
    build: Callable[[Sample], str]


def suffixed(name: str, suffix: str) -> Template:
    return Template(name, "{question}" + suffix, lambda sample: sample.question + suffix)


def capitalized(name: str, suffix: str) -> Template:
    """``str.capitalize`` also lower-cases everything behind the first letter; lmms-eval does so."""
    text = "{question.capitalize()}" + suffix
    return Template(name, text, lambda sample: sample.question.capitalize() + suffix)


def options(sample: Sample) -> str:
    """ "A. ..." and so on, one option a line."""
    pairs = zip(option_letters(sample), sample.choices or (), strict=True)
    return "\n".join(f"{letter}. {text}" for letter, text in pairs)


def _with_ocr(sample: Sample) -> str:
    tokens = ", ".join(sample.meta["ocr_tokens"])
    return f"{sample.question.capitalize()}\nReference OCR token: {tokens}{PHRASE}"


def _mme(sample: Sample) -> str:
    return sample.question.strip().removesuffix(MME_ENDING) + PHRASE


def _scienceqa(sample: Sample) -> str:
    hint = sample.meta.get("hint")
    context = f"Context: {hint}\n" if hint else ""
    return f"{context}{sample.question}\n{options(sample)}{LETTER}"


def _mmbench(sample: Sample) -> str:
    hint = sample.meta.get("hint")
    context = f"{hint} " if hint and hint != "nan" else ""
    # The sentence keeps its own line feed behind that of the options: lmms-eval's prompt has a blank line there.
    return f"{context}{sample.question} There are several options:\n{options(sample)}\n{LETTER}"


def _mmmu(sample: Sample) -> str:
    if sample.choices:
        return f"{sample.question}\n{options(sample)}\n{LETTER}"
    return f"{sample.question}\n{PHRASE}"


def folder(suffix: str) -> Template:
    """Of a user's own questions: ``suffix``, or options and the request for a letter where there are choices."""

    def build(sample: Sample) -> str:
        return f"{sample.question}\n{options(sample)}{LETTER}" if sample.choices else sample.question + suffix

    return Template("folder", "{question}" + suffix + " | {question}\n{options}" + LETTER, build)


phrase = suffixed("phrase", PHRASE)
word = suffixed("word", WORD)
easy_vqa = suffixed("easy_vqa", EASY)
textvqa = capitalized("textvqa", PHRASE)
textvqa_ocr = Template(
    "textvqa_ocr", "{question.capitalize()}\nReference OCR token: {', '.join(ocr_tokens)}" + PHRASE, _with_ocr
)
vizwiz = capitalized("vizwiz", UNANSWERABLE + PHRASE)
mme = Template("mme", "{question.removesuffix(' Please answer yes or no.')}" + PHRASE, _mme)
scienceqa = Template("scienceqa", "[Context: {hint}\n]{question}\n{options}" + LETTER, _scienceqa)
mmbench = Template("mmbench", "[{hint} ]{question} There are several options:\n{options}\n" + LETTER, _mmbench)
mmmu = Template("mmmu", "{question}\n{options}\n" + LETTER + " | {question}\n" + PHRASE, _mmmu)
