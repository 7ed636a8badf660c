"""When reinforcement learning of a searching policy goes wrong, and what is done about it.

Public runs with the paper's settings collapsed after some hundred steps (PeterGriffinJin/Search-R1, issues 88, 89 and
186). Four signs are watched, each against its own recent past. At a sign the learning rate is halved; at the fourth
the run stops, with its last checkpoints on the disk.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

# Steps that the present is held against; signs that are given time before the next one counts; signs that end a run.
WINDOW, PATIENCE, LAST_SIGN = 20, 10, 4
# A policy that learns moves away from its reference; what is below half a nat a token is no sign of anything.
_KL_RATIO, _LEAST_KL = 10.0, 0.5
_FORMAT_DROP, _LENGTH_RATIO = 0.20, 0.5


@dataclass
class CollapseGuard:
    """Watches a run.

    Args:
        entropy_floor: mean entropy of the policy's tokens, in nats, below which it no longer explores.
    """

    entropy_floor: float = 0.05
    rows: int = 0
    signs: list[str] = field(default_factory=list)
    _past: deque[dict[str, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _judge_from: int = WINDOW

    @property
    def factor(self) -> float:
        """Factor of the learning rate."""
        return 0.5 ** len(self.signs)

    @property
    def stop(self) -> bool:
        """Whether the run should end."""
        return len(self.signs) >= LAST_SIGN

    def see(self, row: Mapping[str, float]) -> str:
        """Take in one step's figures: kl, entropy, format, response_tokens. The sign that they are; empty if none."""
        sign = ""
        if self.rows >= self._judge_from:
            median = {name: statistics.median(past[name] for past in self._past) for name in self._past[0]}
            if row["kl"] > max(_LEAST_KL, _KL_RATIO * median["kl"]):
                sign = f"KL {row['kl']:.3g} is more than {_KL_RATIO:.0f} times its median {median['kl']:.3g}"
            elif row["entropy"] < self.entropy_floor:
                sign = f"entropy {row['entropy']:.3g} is below {self.entropy_floor:.3g}"
            elif row["format"] < median["format"] - _FORMAT_DROP:
                sign = f"only {row['format']:.0%} keep to the form, where {median['format']:.0%} did"
            elif row["response_tokens"] < _LENGTH_RATIO * median["response_tokens"]:
                sign = f"{row['response_tokens']:.0f} tokens a run, where {median['response_tokens']:.0f} were usual"
        self._past.append({name: row[name] for name in ("kl", "entropy", "format", "response_tokens")})
        self.rows += 1
        if sign:
            self.signs.append(f"step {self.rows}: {sign}")
            self._judge_from = self.rows + PATIENCE
        return sign
