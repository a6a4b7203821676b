"""Answers to questions about images, compared as the VQA challenge does.

Source: the challenge's script, github.com/GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py
at commit c4e6a0e; Antol et al. 2015 (arXiv 1505.00468), Goyal et al. 2017 (arXiv 1612.00837).
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
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't "
    "haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't "
    "mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've "
    "shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's someone'd someone'd've "
    "someone'll someone's something'd something'd've something'll that's there'd there'd've there're "
    "there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're "
    "what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're "
    "why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're "
    "you've"
)
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, letter in enumerate(word)
    if letter == "'"
}
"""Contractions by how they are written with one apostrophe less."""

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_THOUSANDS = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")


def normalized_answer(text: str) -> str:
    """An answer in the form in which answers are compared.

    Punctuation but apostrophes, colons and periods becomes a space; a mark that stands beside a space
    anywhere in the answer is removed instead, and all marks are where a comma stands between digits. Periods
    that no digit follows are removed. In lower case; number words up to ten as digits; without articles;
    contractions with their apostrophe.
    """
    text = " ".join(text.split())
    grouped = _THOUSANDS.search(text) is not None
    plain = text
    for mark in _PUNCTUATION:
        removed = grouped or f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if removed else " ")
    words = (NUMBERS.get(word, word) for word in _PERIOD.sub("", plain).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(response: str, answers: Sequence[str]) -> float:
    """How right (0 to 1) an answer is by those of several annotators.

    Acc = mean over the annotators left out, one at a time, of min(1, others who gave this answer / 3). With
    three annotators or fewer there are not enough others: 1 if any of them gave it.

    The challenge's script takes punctuation out of annotators' answers where these differ, and leaves their
    articles and number words as its data have them; here both sides are always normalised alike.

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
