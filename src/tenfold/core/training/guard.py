"""Which steps to leave out: non-finite numbers, and values far above what has been normal. Imports no torch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

WINDOW = 64  # accepted steps that "normal" is measured on
ENOUGH = 16  # accepted steps before a spike can be told from a start
SPIKE_WINDOW = 50  # losses that `spike_bar` is measured on


def spike_bar(losses: Sequence[float], height: float = 0.2) -> float | None:
    """The loss above which a step is a spike after `losses`: the median of the last 50 plus max(height, 6 sigma).

    Sigma is 1.4826 times the median absolute deviation from the median, which is the standard deviation of normal noise
    and takes no notice of earlier spikes.

    Args:
        losses: of the steps before, the newest last.
        height: smallest height of a spike, in the loss's unit.

    Returns:
        The bar; None where fewer than 16 losses came before.
    """
    window = list(losses)[-SPIKE_WINDOW:]
    if len(window) < ENOUGH:
        return None
    middle = median(window)
    sigma = 1.4826 * median(abs(loss - middle) for loss in window)
    return middle + max(height, 6 * sigma)


class Guard:
    """Judges each step by its loss and gradient norm before the weights change.

    A value is a spike when it is above `factor` times the median of the last accepted ones. All processes judge the
    same reduced numbers and so decide alike.

    Args:
        loss_factor: bar for the loss; None never calls a loss a spike.
        gradient_factor: bar for the gradient norm, in the same way.
        loss_height: further bar for the loss, that of `spike_bar`; None has none.
    """

    def __init__(
        self, loss_factor: float | None, gradient_factor: float | None, loss_height: float | None = None
    ) -> None:
        self.loss_height = loss_height
        self.loss_factor = loss_factor
        self.gradient_factor = gradient_factor
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.consecutive = 0

    def judge(self, loss: float, gradient_norm: float) -> str | None:
        """Say why a step must be skipped, or None to take it, and remember the verdict."""
        reason = None
        if not math.isfinite(loss):
            reason = f"the loss is {loss}"
        elif not math.isfinite(gradient_norm):
            reason = f"the gradient norm is {gradient_norm}"
        else:
            reason = (
                _spike("loss", loss, self.losses, self.loss_factor)
                or self._height(loss)
                or _spike("gradient norm", gradient_norm, self.norms, self.gradient_factor)
            )
        if reason:
            self.consecutive += 1
        else:
            self.consecutive = 0
            self.losses.append(loss)
            self.norms.append(gradient_norm)
        return reason

    def _height(self, loss: float) -> str | None:
        bar = None if self.loss_height is None else spike_bar(self.losses, self.loss_height)
        if bar is None or loss <= bar:
            return None
        return f"the loss {loss:.4g} is a spike: above {bar:.4g}, its running median and 6 robust standard deviations"

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"losses": list(self.losses), "norms": list(self.norms), "consecutive": self.consecutive}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.losses = deque(state["losses"], maxlen=WINDOW)
        self.norms = deque(state["norms"], maxlen=WINDOW)
        self.consecutive = state["consecutive"]


def _spike(name: str, value: float, history: deque[float], factor: float | None) -> str | None:
    if factor is None or len(history) < ENOUGH:
        return None
    normal = median(history)
    # A ratio to a median of zero or below says nothing.
    if normal <= 0 or value <= factor * normal:
        return None
    return f"the {name} {value:.4g} is above {factor:g} x its running median {normal:.4g}"
