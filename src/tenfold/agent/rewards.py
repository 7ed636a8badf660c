"""What a rollout is worth: the paper's reward (section 3.2), and metrics that need no judge.

`R = format + accuracy + extra`, each 0 or 1. Accuracy passes by a loose grader at first (a score of 6 of 10) and by a
strict one later (2 of 3 votes). The extra reward is a property of the whole group of rollouts of one question.
"""

from __future__ import annotations

import datetime
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Stage = Literal["loose", "strict"]
# Paper, section 3.2: scores are 1 to 10, and 6 passes; 2 of 3 votes pass.
LOOSE_PASS, STRICT_PASS = 6, 2
# Keeps the advantage finite; TRL's value.
_EPSILON = 1e-4


@dataclass(frozen=True)
class Graded:
    """A rollout with its grades.

    Args:
        searches: rounds in which it searched.
        loose_score: the loose grader's score, 1 to 10.
        strict_votes: the strict graders' verdicts; one that gave none counts as False.
        format_ok: whether every turn kept to the form.
        answered: whether it ended with an answer.
    """

    searches: int
    loose_score: float
    strict_votes: tuple[bool, ...]
    format_ok: bool
    answered: bool

    @property
    def strict_pass(self) -> bool:
        """Whether enough of the strict graders voted for it."""
        return sum(map(bool, self.strict_votes)) >= STRICT_PASS


@dataclass(frozen=True)
class Reward:
    """The parts of one reward, each 0.0 or 1.0."""

    format: float
    accuracy: float
    extra: float

    @property
    def total(self) -> float:
        """0.0 to 3.0."""
        return self.format + self.accuracy + self.extra


def format_reward(rollout: Graded) -> float:
    """1 for a rollout of which every turn kept to the form and that gave an answer, else 0."""
    return float(rollout.format_ok)


def accuracy_reward(rollout: Graded, stage: Stage) -> float:
    """1 for a right answer, by the loose or the strict grader. Without the right format there is none (our choice: the
    paper does not say)."""
    if not (rollout.format_ok and rollout.answered):
        return 0.0
    if stage == "loose":
        return float(rollout.loose_score >= LOOSE_PASS)
    return float(rollout.strict_pass)


def extra_rewards(searches: Sequence[int], success: Sequence[bool]) -> list[float]:
    """The extra search reward of a group: 1 for each success with searches, if there is no success without.

    Args:
        searches: rounds of search of each rollout of one question.
        success: whether each was right.
    """
    if any(right and not searched for searched, right in zip(searches, success, strict=True)):
        return [0.0] * len(success)
    return [float(bool(right and searched)) for searched, right in zip(searches, success, strict=True)]


def group_rewards(group: Sequence[Graded], stage: Stage, extra: bool = True) -> list[Reward]:
    """The rewards of all rollouts of one question.

    Args:
        group: every rollout of one question, and of no other.
        stage: `loose` for the first 80 steps in the paper, `strict` after them.
        extra: False leaves the extra search reward out.
    """
    accuracy = [accuracy_reward(rollout, stage) for rollout in group]
    bonus = extra_rewards([rollout.searches for rollout in group], [value > 0 for value in accuracy])
    return [
        Reward(format_reward(rollout), right, more if extra else 0.0)
        for rollout, right, more in zip(group, accuracy, bonus, strict=True)
    ]


def advantages(rewards: Sequence[float], scale: Literal["group", "none"] = "group") -> list[float]:
    """How much better each rollout of a group is than its mean, in unbiased standard deviations or as it is.

    A group in which all are equal gives zeros.
    """
    mean = math.fsum(rewards) / len(rewards)
    differences = [reward - mean for reward in rewards]
    if scale == "none" or len(rewards) < 2:
        return differences
    deviation = math.sqrt(math.fsum(value * value for value in differences) / (len(rewards) - 1))
    return [value / (deviation + _EPSILON) for value in differences]


# --- Metrics without a judge --------------------------------------------------------------------------------------

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_MARKS = re.compile(r"\s*\[\d[\d,\s]*\]")
_MONTHS = {
    name: number
    for number, month in enumerate(
        (
            "january",
            "february",
            "march",
            "april",
            "may",
            "june",
            "july",
            "august",
            "september",
            "october",
            "november",
            "december",
        ),
        start=1,
    )
    for name in (month, month[:3])
} | {"sept": 9}
_NAME = "|".join(sorted(_MONTHS, key=len, reverse=True))
DATE = (
    re.compile(rf"(?P<day>\d{{1,2}})(?:st|nd|rd|th)?\s+(?:of\s+)?(?P<month>{_NAME})\.?,?\s+(?P<year>\d{{3,4}})", re.I),
    re.compile(rf"(?P<month>{_NAME})\.?\s+(?P<day>\d{{1,2}})(?:st|nd|rd|th)?,?\s+(?P<year>\d{{3,4}})", re.I),
    re.compile(r"(?P<year>\d{4})-(?P<month>\d{1,2})-(?P<day>\d{1,2})"),
    re.compile(r"(?P<year>\d{4})\s*年\s*(?P<month>\d{1,2})\s*月\s*(?P<day>\d{1,2})\s*日"),
)
_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?![\w])")


def normalise_answer(text: str) -> str:
    """Lower case without ASCII punctuation, articles and surplus spaces, as SQuAD's evaluation does it."""
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def without_marks(answer: str) -> str:
    """An answer without its citation marks."""
    return _MARKS.sub("", answer)


def _best(metric: Callable[[str, str], float], prediction: str, golds: Sequence[str]) -> float:
    return max((metric(prediction, gold) for gold in golds), default=0.0)


def exact_match(prediction: str, golds: Sequence[str]) -> float:
    """1 if the normalised prediction is one of the right answers, else 0."""
    return _best(lambda one, other: float(normalise_answer(one) == normalise_answer(other)), prediction, golds)


def sub_exact_match(prediction: str, golds: Sequence[str]) -> float:
    """1 if a right answer stands in the prediction, both normalised, else 0."""

    def covers(one: str, other: str) -> float:
        gold = normalise_answer(other)
        return float(bool(gold) and gold in normalise_answer(one))

    return _best(covers, prediction, golds)


def f1(prediction: str, golds: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over normalised words, the best over the right answers."""

    def overlap(one: str, other: str) -> float:
        said, gold = normalise_answer(one).split(), normalise_answer(other).split()
        common = sum((Counter(said) & Counter(gold)).values())
        return 2 * common / (len(said) + len(gold)) if common else 0.0

    return _best(overlap, prediction, golds)


def dates(text: str) -> list[datetime.date]:
    """The full dates in a text, however they are written; day and month in figures are read as ISO 8601 only."""
    found = []
    for pattern in DATE:
        for match in pattern.finditer(text):
            month = match["month"].lower()
            try:
                found.append(
                    (
                        match.start(),
                        datetime.date(int(match["year"]), _MONTHS.get(month) or int(month), int(match["day"])),
                    )
                )
            except ValueError:
                continue  # the 31st of June
    return [date for _, date in sorted(found)]


def same_value(prediction: str, golds: Sequence[str], tolerance: float = 0.0) -> float:
    """1 if the date or number of a right answer is the first of its kind in the prediction, however it is written.

    Forgives what `exact_match` does not: 20 July 1851 and July 20, 1851. Right answers that are neither dates nor
    numbers are compared by `exact_match`.

    Args:
        prediction: an answer.
        golds: right answers.
        tolerance: allowed relative difference of numbers.
    """

    def same(one: str, other: str) -> float:
        gold_dates = dates(other)
        if gold_dates:
            return float(dates(one)[:1] == gold_dates[:1])
        if _NUMBER.fullmatch(other.strip()):
            said, gold = _NUMBER.search(one), float(other.replace(",", ""))
            return float(said is not None and abs(float(said[0].replace(",", "")) - gold) <= tolerance * abs(gold))
        return exact_match(one, [other])

    return _best(same, prediction, golds)
