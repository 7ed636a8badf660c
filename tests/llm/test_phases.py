"""The schedule by tokens: the paper's table, arithmetic between tokens and steps, phases that do not fit together."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.core.config import from_mapping
from tenfold.core.console import UserError
from tenfold.llm.config import Phase, Recipe
from tenfold.llm.phases import PANGU_ULTRA, RECIPES, Timetable, single_phase, with_single_phase

T = 1e12


@pytest.fixture(scope="module")
def paper() -> Timetable:
    return Timetable(PANGU_ULTRA)


@pytest.mark.parametrize(
    ("tokens", "length", "base", "batch"),
    [
        (0.5 * T, 4096, 1e4, 1024),
        (1.3 * T, 4096, 1e4, 1536),
        (1.95 * T, 4096, 1e4, 2048),
        (11 * T, 4096, 1e4, 2048),
        (12.5 * T, 8192, 1e5, 1536),
        (12.9 * T, 32768, 1.6e6, 384),
        (13.1 * T, 131072, 2.56e7, 96),
    ],
)
def test_length_base_and_batch_are_the_papers(
    paper: Timetable, tokens: float, length: int, base: float, batch: int
) -> None:
    state = paper.at(tokens)
    assert (state.length, state.rope_base, state.batch) == (length, base, batch)
    assert 0 <= state.tokens - tokens < length * batch


def test_learning_rate_is_the_papers(paper: Timetable) -> None:
    rate = paper.learning_rate
    assert [rate(0), rate(1999), rate(3999)] == pytest.approx([1e-4 / 4000, 0.5e-4, 1e-4])
    warm = 4000 * 1024 * 4096
    half = paper.at(warm + (7.4 * T - warm) / 2).learning_rate
    assert half == pytest.approx((1e-4 + 1e-5) / 2, rel=1e-5)
    quarter = paper.at(warm + (7.4 * T - warm) / 4).learning_rate
    assert quarter == pytest.approx(1e-5 + 9e-5 * (1 + math.cos(math.pi / 4)) / 2, rel=1e-5)
    assert paper.at(7.3999 * T).learning_rate == pytest.approx(1e-5, rel=1e-3)
    assert paper.at(10 * T).learning_rate == 1e-5
    assert paper.at(12.4 * T).learning_rate == pytest.approx(8.75e-6, rel=1e-4)
    assert paper.at(13 * T).learning_rate == paper.at(13.19 * T).learning_rate == 7.5e-6


def test_steps_of_each_stretch_follow_from_its_tokens(paper: Timetable) -> None:
    steps = [stretch.steps for stretch in paper.stretches]
    exact = [1.2 * T / 1024, 0.7 * T / 1536, 5.5 * T / 2048, 4.6 * T / 2048]
    assert steps[:4] == pytest.approx([tokens / 4096 for tokens in exact], abs=1)
    assert [round(count, -3) for count in steps] == [286_000, 111_000, 656_000, 548_000, 64_000, 16_000, 16_000]
    assert 0 <= paper.tokens - 13.2 * T < 96 * 131072


def small_phases(ends: list[int], lengths: list[int], batches: list[int]) -> list[Phase]:
    starts = [0, *ends[:-1]]
    return [
        Phase(f"p{i}", start, end, length, 1e4, ((start, batch),), 1e-3, 1e-4, warmup_steps=i)
        for i, (start, end, length, batch) in enumerate(zip(starts, ends, lengths, batches, strict=True))
    ]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=4),
    st.lists(st.integers(1, 9), min_size=4, max_size=4),
    st.lists(st.integers(1, 7), min_size=4, max_size=4),
)
def test_the_timetable_equals_a_run_that_counts(sizes: list[int], lengths: list[int], batches: list[int]) -> None:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    phases = small_phases(ends, lengths[: len(sizes)], batches[: len(sizes)])
    table = Timetable(phases)
    tokens = sequences = step = 0
    inside = dict.fromkeys(range(len(phases)), 0)
    while tokens < ends[-1]:  # the rule in words: a step belongs to the phase in which the tokens before it end
        number = next(i for i, end in enumerate(ends) if tokens < end)
        phase = phases[number]
        size = phase.batch[0][1]
        state = table.at_step(step)
        assert (state.phase, state.tokens, state.length, state.batch) == (phase.name, tokens, phase.length, size)
        assert table.sequences(step) == range(sequences, sequences + size)
        assert table.phase_of_sequence(sequences) == (number, inside[number])
        assert table.step_at(tokens) == step
        assert 0 < state.learning_rate <= 1e-3
        tokens, sequences, step = tokens + size * phase.length, sequences + size, step + 1
        inside[number] += size
    assert (table.steps, table.tokens) == (step, tokens)
    assert [table.sequences_of_phase(number) for number in range(len(phases))] == list(inside.values())


@pytest.mark.parametrize(
    ("second", "words"),
    [((120, 200), "a gap between 'p0' and 'p1'"), ((90, 200), "an overlap between 'p0' and 'p1'")],
)
def test_phases_that_do_not_meet_are_refused_in_one_line(second: tuple[int, int], words: str) -> None:
    first = small_phases([100], [5], [2])[0]
    start, end = second
    with pytest.raises(UserError, match=words) as caught:
        Timetable([first, Phase("p1", start, end, 5, 1e4, ((start, 2),), 1e-3)])
    assert "let it start at 100" in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_does_not_start_in_the_middle() -> None:
    with pytest.raises(UserError, match="a gap between the run's beginning and 'late'"):
        Timetable([Phase("late", 10, 20, 5, 1e4, ((10, 1),), 1e-3)])
    with pytest.raises(UserError, match="there is none"):
        Timetable([])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"end": 0}, "which is no stretch"),
        ({"rope_base": 0.0}, "rope_base 0.0 should be positive"),
        ({"batch": ((5, 1),)}, "rising from 0"),
        ({"batch": ((0, 1), (50, 2), (50, 3))}, "rising from 0"),
        ({"batch": ((0, 1), (100, 2))}, "to below 100"),
        ({"learning_rate": 0.0}, "learning rates from 0.0"),
    ],
)
def test_a_phase_that_makes_no_sense_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(Phase("p", 0, 100, 5, 1e4, ((0, 1),), 1e-3), **changes)


def test_a_recipe_file_says_where_a_phase_is_wrong() -> None:
    phase = {"name": "p", "start": 0, "end": 0, "length": 4, "rope_base": 1e4, "batch": [[0, 1]], "learning_rate": 1}
    model = {"vocabulary": 9, "width": 8, "layers": 1, "heads": 1, "kv_heads": 1, "ffn": 8}
    with pytest.raises(UserError, match=r"train.phases\[0\]: phase p: it goes from 0 to 0 tokens"):
        from_mapping(Recipe, {"model": model, "train": {"phases": [phase]}})


def test_a_single_phase_takes_the_steps_it_is_given() -> None:
    table = Timetable(single_phase(200, 8, 64, 3e-2, warmup=10, final=0.1))
    assert (table.steps, table.tokens, table.peak) == (200, 200 * 512, 3e-2)
    assert table.learning_rate(0) == pytest.approx(3e-3)
    assert table.learning_rate(9) == table.learning_rate(10) == pytest.approx(3e-2)
    assert 3e-3 < table.learning_rate(199) < 3.01e-3


def test_options_change_a_single_phase_and_leave_the_rest() -> None:
    recipe = RECIPES["tenfold-tiny"]
    changed = with_single_phase(recipe, steps=7, batch=None, learning_rate=1e-3)
    before, after = Timetable(recipe.train.phases), Timetable(changed.train.phases)
    assert after.steps == 7 and after.peak == 1e-3
    assert after.at_step(0).batch == before.at_step(0).batch
    assert with_single_phase(recipe, steps=None) == recipe
    with pytest.raises(UserError, match="--learning-rate: this recipe has several phases"):
        with_single_phase(RECIPES["pangu-ultra"], learning_rate=1e-3)
