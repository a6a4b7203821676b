"""Answers to questions about images, compared as the VQA challenge does.

Source: visualqa.org/evaluation.html; Antol et al. 2015 (arXiv 1505.00468), Goyal et al. 2017 (arXiv
1612.00837).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean

ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
"""Number words, of which the challenge reads those up to ten; it counts "none" as one."""
AGREEING = 3
"""So many annotators make an answer fully right."""

_CONTRACTIONS = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll "
    "how's i'd i'm i've isn't it'd it'll let's ma'am might've mightn't must've mustn't needn't o'clock "
    "oughtn't shan't she'd she's should've shouldn't somebody's someone's something's that'd that'll that's "
    "there'd there're there's they'd they'll they're they've wasn't we've weren't what'll what're what's "
    "what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've "
    "wouldn't y'all you'd you'll you're you've"
)
CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTIONS.split()} | {
    "shes": "she's",
    "hes": "he's",
}
"""Contractions by how they are written without the apostrophe."""

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_THOUSANDS = re.compile(r"(?<=\d),(?=\d)")
_PERIOD = re.compile(r"(?<!\d)\.|\.(?!\d)")


def normalized_answer(text: str) -> str:
    """An answer in the form in which answers are compared.

    In lower case; commas between digits and periods that are no decimal points removed, other punctuation but
    apostrophes and colons removed at the edge of a word and a space within one; number words up to ten as
    digits; without articles; contractions with their apostrophe.
    """
    text = " ".join(text.split()).lower()
    text = _THOUSANDS.sub("", text)
    for mark in _PUNCTUATION:
        beside_space = (
            f"{mark} " in text or f" {mark}" in text or text.startswith(mark) or text.endswith(mark)
        )
        text = text.replace(mark, "" if beside_space else " ")
    words = (NUMBERS.get(word, word) for word in _PERIOD.sub("", text).split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(response: str, answers: Sequence[str]) -> float:
    """How right (0 to 1) an answer is by those of several annotators.

    Acc = mean over the annotators left out, one at a time, of min(1, others who gave this answer / 3). With
    three annotators or fewer there are not enough others: 1 if any of them gave it.

    The challenge's script normalises annotators' answers only where these differ, and never their articles
    and number words; here both sides are always normalised alike, as the rules are written.

    Args:
        response: the answer to score.
        answers: one for each annotator, at least one.
    """
    given = [normalized_answer(answer) for answer in answers]
    said = normalized_answer(response)
    if len(given) <= AGREEING:
        return float(said in given)
    total = given.count(said)
    return fmean(min(1.0, (total - (one == said)) / AGREEING) for one in given)
