"""Random numbers of a step: a pure function of the seed, the step and the process, as the samples are of their numbers.

A checkpoint then needs no generator's state, and what happens between steps (an evaluation, a library that draws a
number when it is first imported, as rich does) cannot change the training. A run that was resumed is exact for this
reason.
"""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_step(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Seed Python's, NumPy's and torch's global generators for one step of one process.

    Args:
        seed: of the run.
        step: steps done.
        rank: number of the process.
        device: whose generator is seeded beside the CPU's.
    """
    state = np.random.SeedSequence((seed, step, rank)).generate_state(4, np.uint64)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]) % 2**32)
    # Not torch.manual_seed, which takes 0.4 ms where CUDA is not initialised.
    torch.default_generator.manual_seed(int(state[2]))
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(int(state[3]) % 2**63)
