"""Learning-rate schedules: plain functions from the step to a factor of the base learning rate. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Schedule = Callable[[int], float]
"""From the number of steps done (0 for the first step) to the factor of each parameter group's learning rate."""


def _warmed(step: int, warmup: int) -> float:
    """Linear warm-up: 1/warmup at step 0, 1 from step warmup - 1 on."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def constant(warmup: int = 0) -> Schedule:
    """1 after `warmup` steps of linear rise."""
    return lambda step: _warmed(step, warmup)


def multistep(milestones: Sequence[int], gamma: float = 0.5, warmup: int = 0) -> Schedule:
    """Multiply by `gamma` at every milestone (torch's MultiStepLR), after `warmup` steps of linear rise."""
    marks = sorted(milestones)
    return lambda step: _warmed(step, warmup) * gamma ** sum(step >= mark for mark in marks)


def cosine(steps: int, warmup: int = 0, floor: float = 0.0) -> Schedule:
    """Rise linearly for `warmup` steps, then fall along half a cosine to `floor` at step `steps`.

    Source: Loshchilov & Hutter, SGDR (2017), equation 5, with one period and after a warm-up.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return _warmed(step, warmup)
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor
