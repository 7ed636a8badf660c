from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tenfold.agent.rewards import (
    Graded,
    advantages,
    dates,
    exact_match,
    extra_rewards,
    f1,
    group_rewards,
    same_value,
    sub_exact_match,
    without_marks,
)

CASES = json.loads((Path(__file__).parents[1] / "data" / "agent" / "reward_cases.json").read_text())


@pytest.mark.parametrize("stage", ["loose", "strict"])
@pytest.mark.parametrize("case", CASES["reward_groups"], ids=[case["name"] for case in CASES["reward_groups"]])
def test_rewards_and_advantages_of_a_group_are_those_of_the_fixture(case: dict, stage: str) -> None:
    group = [Graded(**{**row, "strict_votes": tuple(map(bool, row["strict_votes"]))}) for row in case["rollouts"]]
    rewards = group_rewards(group, stage)  # type: ignore[arg-type]
    wanted = case[stage]
    assert [{"format": r.format, "accuracy": r.accuracy, "extra": r.extra} for r in rewards] == wanted["parts"]
    totals = [reward.total for reward in rewards]
    assert totals == wanted["total"]
    assert any(reward.extra for reward in rewards) == wanted["bonus_fires"]
    assert advantages(totals) == pytest.approx(wanted["advantages"], abs=1e-6)
    assert advantages(totals, "none") == pytest.approx(wanted["advantages_no_std"], abs=1e-6)


def test_without_the_extra_reward_the_other_parts_stay() -> None:
    group = [Graded(2, 8, (True, True, True), True, True), Graded(1, 1, (False,) * 3, True, True)]
    with_extra, without = group_rewards(group, "loose"), group_rewards(group, "loose", extra=False)
    assert [reward.total for reward in with_extra] == [3.0, 1.0]
    assert [reward.total for reward in without] == [2.0, 1.0]


def test_the_extra_reward_is_never_given_beside_a_success_without_search() -> None:
    assert extra_rewards([0, 2, 3], [True, True, False]) == [0.0, 0.0, 0.0]
    assert extra_rewards([0, 2, 3], [False, True, False]) == [0.0, 1.0, 0.0]


def test_a_group_of_one_and_a_group_of_equals_have_no_advantage() -> None:
    assert advantages([2.0]) == [0.0]
    assert advantages([1.0] * 5) == [0.0] * 5
    assert all(math.isfinite(value) for value in advantages([0.1] * 14))


@pytest.mark.parametrize("case", CASES["string_metrics"], ids=[case["prediction"] for case in CASES["string_metrics"]])
def test_string_metrics_are_those_of_the_fixture(case: dict) -> None:
    for metric, name in ((exact_match, "em"), (sub_exact_match, "subem"), (f1, "f1")):
        assert metric(case["prediction"], case["golds"]) == pytest.approx(case[name], abs=1e-9), name


@pytest.mark.parametrize(
    ("said", "gold", "same"),
    [
        ("July 20, 1851", "20 July 1851", 1),
        ("He died on the 20th of July 1851 [3].", "20 July 1851", 1),
        ("1851-07-20", "20 July 1851", 1),
        ("1851年7月20日", "20 July 1851", 1),
        ("21 July 1851", "20 July 1851", 0),
        ("21 July 1851 or 20 July 1851", "20 July 1851", 0),
        ("about 1,200 people", "1200", 1),
        ("1201", "1200", 0),
        ("no date", "20 July 1851", 0),
        ("31 June 1851", "30 June 1851", 0),
        ("The Beatles", "beatles", 1),
    ],
)
def test_dates_and_numbers_count_however_they_are_written(said: str, gold: str, same: float) -> None:
    assert same_value(without_marks(said), [gold]) == same


def test_numbers_have_a_tolerance() -> None:
    assert same_value("about 1,190", ["1200"], tolerance=0.01) == 1
    assert same_value("about 1,180", ["1200"], tolerance=0.01) == 0


def test_dates_come_in_the_order_of_the_text() -> None:
    assert [date.year for date in dates("From May 3, 1900 to 4 June 1920, 1930-01-02.")] == [1900, 1920, 1930]
