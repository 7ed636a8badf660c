"""The pre-training schedule by tokens: sequence length, rotary base, batch and learning rate. Imports no torch.

A run's only clock is the number of its steps; how many tokens they took follows from the phases. A step belongs to the
phase in which the tokens before it end, so that the last step of a stretch may reach a little into the next.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tenfold.core.console import UserError
from tenfold.llm.config import PRESETS, Phase, Recipe, TrainConfig

T = 1e12  # tokens
K = 1024  # tokens of a sequence

# Paper section 3.1.3 and 3.2. How the last 0.4 T tokens are split between 32K and 128K is not stated: halves.
PANGU_ULTRA: tuple[Phase, ...] = (
    Phase(
        name="general a",
        start=0,
        end=7.4 * T,
        length=4 * K,
        rope_base=1e4,
        batch=((0, 1024), (1.2 * T, 1536), (1.9 * T, 2048)),
        learning_rate=1e-4,
        final_learning_rate=1e-5,
        warmup_steps=4000,
    ),
    Phase("general b", 7.4 * T, 12 * T, 4 * K, 1e4, ((7.4 * T, 2048),), 1e-5),
    Phase("reasoning", 12 * T, 12.8 * T, 8 * K, 1e5, ((12 * T, 1536),), 1e-5, final_learning_rate=7.5e-6),
    Phase("long 32K", 12.8 * T, 13 * T, 32 * K, 1.6e6, ((12.8 * T, 384),), 7.5e-6),
    Phase("long 128K", 13 * T, 13.2 * T, 128 * K, 2.56e7, ((13 * T, 96),), 7.5e-6),
)


@dataclass(frozen=True)
class State:
    """What holds at a moment of a run.

    Attributes:
        phase: name of the phase.
        step: steps done.
        tokens: tokens that they took.
        length: tokens of a sequence of the next step.
        rope_base: base of the rotary embedding.
        batch: sequences of the next step.
        learning_rate: of the next step.
    """

    phase: str
    step: int
    tokens: int
    length: int
    rope_base: float
    batch: int
    learning_rate: float


@dataclass(frozen=True)
class Stretch:
    """Steps that are alike: one batch size of one phase.

    Attributes:
        phase: number of the phase.
        step: its first step.
        tokens: tokens before it.
        sequence: sequences before it.
        sequences: of a step.
        length: tokens of a sequence.
        steps: number of steps.
    """

    phase: int
    step: int
    tokens: int
    sequence: int
    sequences: int
    length: int
    steps: int


class Timetable:
    """The phases of a run, step by step.

    Args:
        phases: in order; each begins where the one before ends, the first at 0.

    Raises:
        UserError: none, a gap or an overlap.

    Example:
        >>> table = Timetable(PANGU_ULTRA)
        >>> table.at(12.5e12).batch, table.at(12.5e12).length
        (1536, 8192)
    """

    def __init__(self, phases: Sequence[Phase]) -> None:
        _check(phases)
        self.phases = tuple(phases)
        self.stretches: list[Stretch] = []
        step = tokens = sequence = 0
        for number, phase in enumerate(phases):
            ends = [mark for mark, _ in phase.batch[1:]] + [phase.end]
            for (_, sequences), end in zip(phase.batch, ends, strict=True):
                per_step = sequences * phase.length
                steps = max(0, -(-(int(end) - tokens) // per_step))
                if steps:
                    self.stretches.append(Stretch(number, step, tokens, sequence, sequences, phase.length, steps))
                step, tokens, sequence = step + steps, tokens + steps * per_step, sequence + steps * sequences
        self.steps, self.tokens = step, tokens
        self._starts = [stretch.step for stretch in self.stretches]
        self._phase_starts: dict[int, Stretch] = {}
        for stretch in self.stretches:
            self._phase_starts.setdefault(stretch.phase, stretch)

    def _stretch(self, step: int) -> Stretch:
        return self.stretches[max(0, bisect_right(self._starts, step) - 1)]

    def tokens_before(self, step: int) -> int:
        """Tokens that the first `step` steps take."""
        stretch = self._stretch(step)
        return stretch.tokens + (step - stretch.step) * stretch.sequences * stretch.length

    def sequences(self, step: int) -> range:
        """Numbers of the sequences of a step, counted from the run's beginning."""
        stretch = self._stretch(step)
        first = stretch.sequence + (step - stretch.step) * stretch.sequences
        return range(first, first + stretch.sequences)

    def phase_of_sequence(self, number: int) -> tuple[int, int]:
        """The phase of a sequence, and its number inside the phase."""
        starts = [stretch.sequence for stretch in self.stretches]
        phase = self.stretches[bisect_right(starts, number) - 1].phase
        return phase, number - self._phase_starts[phase].sequence

    def sequences_of_phase(self, phase: int) -> int:
        """How many sequences a phase takes."""
        return sum(stretch.steps * stretch.sequences for stretch in self.stretches if stretch.phase == phase)

    def step_at(self, tokens: float) -> int:
        """The first step before which at least `tokens` tokens were taken."""
        starts = [stretch.tokens for stretch in self.stretches]
        stretch = self.stretches[max(0, bisect_right(starts, tokens) - 1)]
        return min(
            self.steps, stretch.step + math.ceil((tokens - stretch.tokens) / (stretch.sequences * stretch.length))
        )

    def at(self, tokens: float) -> State:
        """What holds when `tokens` tokens are done (rounded up to a whole step)."""
        return self.at_step(self.step_at(tokens))

    def at_step(self, step: int) -> State:
        """What holds before step number `step`, counted from 0; at the run's end what held in the last step."""
        stretch = self._stretch(step)
        phase = self.phases[stretch.phase]
        return State(
            phase=phase.name,
            step=step,
            tokens=self.tokens_before(step),
            length=phase.length,
            rope_base=phase.rope_base,
            batch=stretch.sequences,
            learning_rate=self.learning_rate(step),
        )

    def learning_rate(self, step: int) -> float:
        """The learning rate of step number `step`."""
        number = self._stretch(step).phase
        phase, first = self.phases[number], self._phase_starts[number]
        inside = step - first.step
        if inside < phase.warmup_steps:
            return phase.learning_rate * (inside + 1) / phase.warmup_steps
        if phase.final_learning_rate is None:
            return phase.learning_rate
        begin = self.tokens_before(first.step + phase.warmup_steps)
        progress = min(1.0, (self.tokens_before(step) - begin) / max(1.0, phase.end - begin))
        left = (1 + math.cos(math.pi * progress)) / 2 if phase.shape == "cosine" else 1 - progress
        return phase.final_learning_rate + (phase.learning_rate - phase.final_learning_rate) * left

    @property
    def peak(self) -> float:
        """The highest learning rate."""
        return max(max(phase.learning_rate, phase.final_learning_rate or 0.0) for phase in self.phases)


def _check(phases: Sequence[Phase]) -> None:
    if not phases:
        raise UserError("phases: there is none: give at least one")
    end, before = 0.0, "the run's beginning"
    for phase in phases:
        if phase.start != end:
            fault = "a gap" if phase.start > end else "an overlap"
            raise UserError(
                f"phases: {fault} between {before} and {phase.name!r}, which starts at {phase.start:,.0f} tokens: "
                f"let it start at {end:,.0f}"
            )
        end, before = phase.end, repr(phase.name)


def single_phase(
    steps: int,
    batch: int,
    length: int,
    learning_rate: float,
    warmup: int = 0,
    final: float = 0.1,
    rope_base: float = 1e4,
) -> tuple[Phase, ...]:
    """One phase of `steps` steps: warm-up, then half a cosine to `final` times the rate.

    Args:
        steps: of the run.
        batch: sequences of a step.
        length: tokens of a sequence.
        learning_rate: the highest.
        warmup: steps of linear rise.
        final: share of the rate that is left at the end; 1 is constant.
        rope_base: base of the rotary embedding.
    """
    phase = Phase(
        name="single",
        start=0,
        end=steps * batch * length,
        length=length,
        rope_base=rope_base,
        batch=((0, batch),),
        learning_rate=learning_rate,
        final_learning_rate=None if final == 1 else learning_rate * final,
        warmup_steps=warmup,
    )
    return (phase,)


RECIPES: dict[str, Recipe] = {
    "pangu-ultra": Recipe(PRESETS["pangu-ultra-135b"], TrainConfig(PANGU_ULTRA, precision="bf16")),
    "tenfold-tiny": Recipe(
        PRESETS["tenfold-tiny"],
        TrainConfig(
            single_phase(steps=1500, batch=8, length=256, learning_rate=5e-3, warmup=100, final=0.05),
            evaluate_every=250,
            checkpoint_every=100,
        ),
    ),
}


def with_single_phase(recipe: Recipe, **changes: float | None) -> Recipe:
    """The recipe with one phase whose steps, batch, length, rate, warm-up or final share are changed.

    Args:
        recipe: its own phase gives what `changes` leave out.
        changes: of `single_phase`; None leaves a value as it is.

    Raises:
        UserError: the recipe has several phases, which are for a file to change; values that cannot be.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    if not given:
        return recipe
    if len(recipe.train.phases) > 1 or len(recipe.train.phases[0].batch) > 1:
        raise UserError(
            f"--{next(iter(given)).replace('_', '-')}: this recipe has several phases or batch sizes: change them in "
            "its YAML file"
        )
    phase, table = recipe.train.phases[0], Timetable(recipe.train.phases)
    own = {
        "steps": table.steps,
        "batch": phase.batch[0][1],
        "length": phase.length,
        "learning_rate": phase.learning_rate,
        "warmup": phase.warmup_steps,
        "final": (phase.final_learning_rate or phase.learning_rate) / phase.learning_rate,
        "rope_base": phase.rope_base,
    }
    for name in ("steps", "batch", "length"):
        if (own | given)[name] < 1:
            raise UserError(f"these settings cannot be used: {name} is {(own | given)[name]}, and should be 1 or more")
    try:
        phases = single_phase(**(own | given))  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(f"these settings cannot be used: {error}") from None
    return replace(recipe, train=replace(recipe.train, phases=phases))
