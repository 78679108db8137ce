"""Normalisers of short answers: what two spellings of the same answer have in common.

``vqa`` is the normaliser of the VQA evaluation script (GT-Vision-Lab/VQA, Simplified BSD), quirks included; ``evalai``
adds the tokenisation that the TextVQA and VizWiz servers put in front of it (facebookresearch/mmf, BSD).
"""

from __future__ import annotations

import re
import string

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = {
    word: str(number)
    for number, words in enumerate("none zero|one|two|three|four|five|six|seven|eight|nine|ten".split("|"))
    for word in words.split()
}
MAX_FULL_STOPS = 32  # the official script passes a regex flag (32) where Python expects a count

_ONE_APOSTROPHE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's I'm I've
isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd
they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd
who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
""".split()
_TWO_APOSTROPHES = """
couldn't've hadn't've he'd've I'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
""".split()
_EXCEPTIONS = {
    "let's": "let's",
    "she's": "she's",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "somebody'd": "somebodyd",  # a published typo that every port keeps
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
}


def _contractions() -> dict[str, str]:
    table = {target.replace("'", ""): target for target in _ONE_APOSTROPHE}
    for target in _TWO_APOSTROPHES:
        first, second = target.index("'"), target.rindex("'")
        table[target[:first] + target[first + 1 :]] = target
        table[target[:second] + target[second + 1 :]] = target
    return table | _EXCEPTIONS


CONTRACTIONS = _contractions()


def vqa(text: str) -> str:
    """N_vqa: punctuation, full stops, numbers as digits, articles and contractions, in the official order.

    Two quirks of the official script are kept, as every port keeps them: a digit-comma-digit anywhere makes *every*
    mark be deleted instead of replaced by a space, and at most 32 full stops are deleted.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    out = text
    thousands = re.search(r"\d,\d", text) is not None
    for mark in PUNCTUATION:
        # The test looks at the original string, not at what earlier marks left of it.
        delete = thousands or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if delete else " ")
    out = re.sub(r"\.(?!\d)", "", out, count=MAX_FULL_STOPS)
    words = [NUMBERS.get(word, word) for word in out.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def evalai(text: str) -> str:
    """N_evalai: lower case, commas and question marks deleted, the genitive split off; then ``vqa``."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return vqa(text)


_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def no_punctuation(text: str) -> str:
    """Lower case without any character of ``string.punctuation``; nothing else (GQA)."""
    return text.lower().translate(_WITHOUT_PUNCTUATION)


def plain(text: str) -> str:
    """Lower case, stripped, without one trailing full stop."""
    return text.strip().lower().removesuffix(".").strip()


def first_word(text: str) -> str:
    """The first word of ``plain`` (easy-vqa)."""
    return next(iter(plain(text).split()), "")
