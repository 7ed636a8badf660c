"""Search intensity scaling at small scale: does reinforcement teach a policy to search as much as a question needs?

A policy of about 150,000 parameters learns in a closed world (`world.py`): a cold start on an expert's runs, most of
which have one or two hops, then GRPO on one to four hops. Measured on questions that begin with people whom training
never began with, one to five hops deep. As in the paper's section 5.4, the run is split at the switch of the grader:
one half goes on with the strict one, the other stays with the loose one. Controls: no extra search reward, and a fifth
of the questions about facts that the cold start taught by heart, which take no search.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold.agent.config import Budget, GrpoConfig, SftConfig
from tenfold.agent.evaluation import spearman
from tenfold.agent.protocol import protocol
from tenfold.agent.rewards import exact_match
from tenfold.agent.rollouts import Batched, Setting, example, play, taught
from tenfold.agent.training import grpo, sft
from tenfold.agent.world import MISS, World, tiny_policy
from tenfold.core import console
from tenfold.core.files import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HOPS = (1, 2, 3, 4, 5)
SFT_WEIGHTS = {1: 0.48, 2: 0.45, 3: 0.04, 4: 0.03}
RL_WEIGHTS = {1: 0.1, 2: 0.2, 3: 0.4, 4: 0.3}
# The share of questions about facts known by heart, in the control that has them; their depth is 0.
KNOWN_SHARE = 0.2
BUDGET = Budget(rounds=7, queries=1, results=1, tokens=1024, turn_tokens=16, seconds=3_600.0)


@dataclass(frozen=True)
class Plan:
    """How long everything is.

    Args:
        seeds: runs.
        sft: the cold start.
        loose, strict: steps of GRPO with each grader.
        questions, group: of a step of GRPO.
        learning_rate: of GRPO.
        evaluate: questions of each depth.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    sft: SftConfig = SftConfig(440, 16, 5e-3, 1.0, 110)
    loose: int = 60
    strict: int = 40
    questions: int = 8
    group: int = 14
    learning_rate: float = 5e-4
    evaluate: int = 100


QUICK = Plan(seeds=(0,), sft=SftConfig(30, 16, 5e-3, 1.0, 30), loose=2, strict=1, questions=2, group=4, evaluate=8)

# Runs of one seed: name to what they are.
ARMS = {
    "sft": "cold start",
    "loose-half": "GRPO, loose grader, up to the switch",
    "grpo": "GRPO, loose, then strict",
    "loose-only": "GRPO, loose throughout",
    "no-extra-half": "no extra search reward, up to the switch",
    "no-extra": "no extra search reward, loose, then strict",
    "known-sft": "cold start with known facts",
    "known-half": "known facts, up to the switch",
    "known": "known facts, GRPO, loose, then strict",
}


def setting(world: World) -> Setting:
    """The environment of the experiment."""
    return Setting(world, protocol("brief"), BUDGET)


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World, hops: Sequence[int], count: int
) -> list[dict[str, float]]:
    """Accuracy (exact match) and searches by depth, greedy, on held-out questions."""
    policy = Batched(model.eval(), tokenizer)
    rows = []
    for depth in hops:
        questions = world.held_out([depth], count)
        rollouts = play(setting(world), policy, questions, [0] * len(questions))
        right = [
            exact_match(rollout.answer, question.answers)
            for rollout, question in zip(rollouts, questions, strict=True)
        ]
        rows.append(
            {
                "hops": depth,
                "questions": len(questions),
                "accuracy": sum(right) / len(right),
                "rounds": sum(rollout.rounds for rollout in rollouts) / len(rollouts),
                "queries": sum(rollout.queries for rollout in rollouts) / len(rollouts),
                "format": sum(rollout.format_ok for rollout in rollouts) / len(rollouts),
                "tokens": sum(sum(rollout.mask) for rollout in rollouts) / len(rollouts),
            }
        )
        rows[-1]["all_rounds"] = [rollout.rounds for rollout in rollouts]  # type: ignore[assignment]
    return rows


def one_seed(seed: int, plan: Plan, folder: Path, arms: Sequence[str] = tuple(ARMS)) -> dict[str, Any]:
    """All runs of a seed; each is kept in its folder, and one that is done or stopped is not begun anew.

    Args:
        seed: of the weights, the questions and the sampling; the world is the same for all.
        plan: lengths.
        folder: for the runs.
        arms: which ones; those that another one begins with have to be among them.
    """
    world = World()
    done: dict[str, Any] = {}
    for arm in arms:
        result = folder / f"seed-{seed}" / arm / "result.json"
        if not result.exists():
            started = time.process_time()
            model, tokenizer = _arm(arm, seed, plan, folder / f"seed-{seed}", world)
            hops = (0, *HOPS) if arm.startswith("known") else HOPS
            rows = measure(model, tokenizer, world, hops, plan.evaluate)
            write_json(result, {"arm": arm, "seed": seed, "rows": rows, "cpu_s": time.process_time() - started})
        done[arm] = read_json(result)
        console.say(
            f"seed {seed}, {ARMS[arm]}: "
            + ", ".join(f"{row['hops']}: {row['accuracy']:.2f} ({row['rounds']:.2f})" for row in done[arm]["rows"])
        )
    return done


def _arm(arm: str, seed: int, plan: Plan, folder: Path, world: World) -> tuple[Any, Any]:
    """Train one arm and return its model and tokenizer."""
    from tenfold.core.checkpoint import load_file, load_into

    model, tokenizer = tiny_policy(seed)
    known = arm.startswith("known")
    if arm.endswith("sft"):
        cold_start(model, tokenizer, world, replace(plan.sft, seed=seed), folder / arm, with_known(SFT_WEIGHTS, known))
        return model, tokenizer
    half = arm.endswith("-half")
    stem = "no-extra" if arm.startswith("no-extra") else "known" if known else "loose"
    before = folder / (("known-sft" if known else "sft") if half else f"{stem}-half") / "model.safetensors"
    load_into(model, load_file(before).tensors, str(before))
    start, _ = tiny_policy(seed)
    first = folder / ("known-sft" if known else "sft") / "model.safetensors"
    load_into(start, load_file(first).tensors, str(first))
    steps = plan.loose if half else plan.strict
    config = GrpoConfig(
        steps=steps,
        questions=plan.questions,
        group=plan.group,
        learning_rate=plan.learning_rate,
        strict_after=steps if half or arm == "loose-only" else 0,
        extra=stem != "no-extra",
        entropy_floor=0.0,  # a policy that has learned this world is sure of what it does
        checkpoint_every=20,
        seed=2 * seed + (not half),
    )
    weights = with_known(RL_WEIGHTS, known)
    grpo(
        model,
        tokenizer,
        start,
        setting(world),
        lambda number: world.draw(number, weights, config.seed + 1_000),
        config,
        folder / arm,
        recipe={"weights": {str(key): value for key, value in weights.items()}},
    )
    return model, tokenizer


def with_known(weights: Mapping[int, float], known: bool) -> dict[int, float]:
    """Weights of depths, a fifth of them given to the known facts if these take part."""
    if not known:
        return dict(weights)
    return {0: KNOWN_SHARE, **{hops: (1 - KNOWN_SHARE) * weight for hops, weight in weights.items()}}


def cold_start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    config: SftConfig,
    folder: Path,
    weights: Mapping[int, float],
) -> None:
    """SFT on the expert's runs."""
    place = setting(world)
    still = copy.deepcopy(model)

    def example_of(number: int) -> Any:
        question = world.draw(number, weights, config.seed)
        return example(taught(place, still, tokenizer, question, world.expert(question)))

    sft(
        model,
        example_of,
        config,
        folder,
        recipe={"weights": {str(key): value for key, value in weights.items()}, "world": asdict(world)},
    )


def ideal_rounds(hops: int) -> float:
    """Searches that a policy needs on average which asks again after each miss."""
    return hops / (1 - MISS)


def rank_correlation(rows: Sequence[Mapping[str, Any]], trained: Sequence[int] = (1, 2, 3, 4)) -> float:
    """Spearman of rounds and depth over the single questions of the trained depths."""
    pairs = [(float(row["hops"]), float(n)) for row in rows if row["hops"] in trained for n in row["all_rounds"]]
    found = spearman([depth for depth, _ in pairs], [rounds for _, rounds in pairs])
    return found[0] if found else float("nan")
