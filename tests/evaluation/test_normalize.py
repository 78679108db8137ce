"""The normalisers give the published figures' spelling, quirks included."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmeff.evaluation.normalize import CONTRACTIONS, evalai, first_word, no_punctuation, plain, vqa

VECTORS = [
    ("The dog.", "dog", "dog"),
    ("two", "2", "2"),
    ("none", "0", "0"),
    ("2,000", "2000", "2000"),
    ("10:30 a.m.", "10:30 am", "10:30 am"),
    ("it is 1.5 m", "it is 1.5 m", "it is 1.5 m"),
    ("dont", "don't", "don't"),
    ("red,white", "red white", "redwhite"),
    ("red, white and blue", "red white and blue", "red white and blue"),
    ("t-shirt", "t shirt", "t shirt"),
    ("N/A", "n", "n"),
    ("mother's", "mother's", "mother 's"),
    ("$5.00", "$5.00", "$5.00"),
]
# Marks, digits, articles, numbers and spaces in every neighbourhood.
texts = st.text(alphabet="aA theTen1,.;/-?'\n\t!$\"", max_size=30)


@pytest.mark.parametrize(("text", "by_vqa", "by_evalai"), VECTORS)
def test_published_vectors(text, by_vqa, by_evalai):
    assert (vqa(text), evalai(text)) == (by_vqa, by_evalai)


def test_the_contraction_table_has_the_120_published_entries():
    assert len(CONTRACTIONS) == 120
    picked = {"dont": "don't", "Im": "I'm", "twas": "'twas", "oclock": "o'clock", "shant": "shan't"}
    picked |= {"couldnt've": "couldn't've", "couldn'tve": "couldn't've", "y'allll": "y'all'll", "yall'll": "y'all'll"}
    picked |= {"somebody'd": "somebodyd", "let's": "let's", "'ow'sat": "'ow's'at", "y'all'dve": "y'all'd've"}
    assert {key: CONTRACTIONS[key] for key in picked} == picked
    assert all(key == value or key.replace("'", "") == value.replace("'", "") for key, value in CONTRACTIONS.items())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Im here", "im here"),  # a key with a capital never fires: the words are in lower case by then
        ("a b-c", "b c"),  # neither neighbour of the hyphen is a space
        ("a b- c-d", "b cd"),  # one of the hyphens has a space, so every hyphen is deleted
        ("1,000 b-c", "1000 bc"),  # a comma between digits makes every mark be deleted
        ("." * 33 + "x", ".x"),  # at most 32 full stops
        ("The Ten\tan\nOne", "10 1"),
    ],
)
def test_quirks_of_the_official_script_are_kept(text, expected):
    assert vqa(text) == expected


def slow_vqa(text):
    """The four steps of the rule, one character at a time."""
    original = "".join(" " if c in "\n\t" else c for c in text).strip()
    digits = any(
        original[i].isdecimal() and original[i + 1] == "," and original[i + 2].isdecimal()
        for i in range(len(original) - 2)
    )
    marks = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]
    out = []
    for c in original:
        beside = any(
            original[i] == c and " " in (original[i - 1 : i], original[i + 1 : i + 2]) for i in range(len(original))
        )
        out.append(c if c not in marks else "" if beside or digits else " ")
    joined, kept, deleted = "".join(out), "", 0
    for i, c in enumerate(joined):
        if c == "." and deleted < 32 and not joined[i + 1 : i + 2].isdecimal():
            deleted += 1
        else:
            kept += c
    words = []
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    for word in kept.lower().split():
        word = str(names.index(word)) if word in names else "0" if word == "none" else word
        if word not in ("a", "an", "the"):
            words.append(CONTRACTIONS.get(word, word))
    return " ".join(words)


@given(texts)
def test_vqa_equals_the_rule_step_by_step(text):
    assert vqa(text) == slow_vqa(text)


@given(texts)
def test_evalai_is_vqa_behind_its_own_tokenisation(text):
    tokens = re.sub("'s", " 's", re.sub("[,?]", "", text.lower())).strip()
    assert evalai(text) == slow_vqa(tokens)


@pytest.mark.parametrize(("text", "expected"), [("Dog.", "dog"), ("a dog", "a dog"), ("t-shirt", "tshirt")])
def test_no_punctuation_deletes_marks_alone(text, expected):
    assert no_punctuation(text) == expected


@pytest.mark.parametrize(
    ("text", "whole", "word"),
    [(" Red. ", "red", "red"), ("Red..", "red.", "red."), ("Yes, it is.", "yes, it is", "yes,"), ("", "", "")],
)
def test_plain_strips_one_full_stop_and_first_word_takes_one(text, whole, word):
    assert (plain(text), first_word(text)) == (whole, word)
