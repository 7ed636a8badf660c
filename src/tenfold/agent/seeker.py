"""The small policy that comes with tenfold: trained by `reproduce` to search in the closed world, and nowhere else."""

from __future__ import annotations

from tenfold.agent.config import MODELS, Sampling
from tenfold.agent.rollouts import Batched
from tenfold.agent.world import tiny_policy
from tenfold.core.checkpoint import load, load_into


def load_seeker(name: str = "tenfold-seeker", sampling: Sampling | None = None) -> Batched:
    """The policy as it answers questions of `world.World`, in the protocol `brief`; greedy unless told otherwise.

    Args:
        name: a name of MODELS.
        sampling: how tokens are chosen; its temperature counts.
    """
    model, tokenizer = tiny_policy()
    found = load(name, MODELS, "tenfold.agent")
    load_into(model, found.tensors, found.origin)
    return Batched(model, tokenizer, sampling or Sampling(0.0, 1.0), name)
