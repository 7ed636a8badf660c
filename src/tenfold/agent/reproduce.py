"""Search intensity scaling at small scale: does reinforcement teach a policy to search as much as a question needs?

A policy of about 150,000 parameters learns in a closed world (`world.py`): a cold start on an expert's runs, most of
which have one or two hops, then GRPO on one to four hops. Measured on questions that begin with people whom training
never began with, one to five hops deep. As in the paper's section 5.4, the run is split at the switch of the grader:
one half goes on with the strict one, the other stays with the loose one. Controls: no extra search reward, and a fifth
of the questions about facts that the cold start taught by heart, which take no search.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold.agent.config import Budget, GrpoConfig, SftConfig
from tenfold.agent.evaluation import spearman
from tenfold.agent.protocol import protocol
from tenfold.agent.rewards import exact_match
from tenfold.agent.rollouts import Batched, Example, Setting, Taught, example, play
from tenfold.agent.training import grpo, sft
from tenfold.agent.world import MISS, RL_WEIGHTS, SFT_WEIGHTS, World, tiny_policy
from tenfold.core import console
from tenfold.core.files import check_writable, read_json, write_json
from tenfold.core.plots import plot_lines, save_plot
from tenfold.core.results import Table, write_results

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HOPS = (1, 2, 3, 4, 5)
# The share of questions about facts known by heart, in the control that has them; their depth is 0.
KNOWN_SHARE = 0.2
BUDGET = Budget(rounds=7, queries=1, results=1, tokens=1024, turn_tokens=14, seconds=3_600.0)


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
    sft: SftConfig = field(default_factory=lambda: SftConfig(600, 16, 5e-3, 1.0, 150))
    loose: int = 60
    strict: int = 40
    questions: int = 16
    group: int = 14
    learning_rate: float = 5e-4
    evaluate: int = 100


QUICK = Plan(seeds=(0,), sft=SftConfig(6, 8, 5e-3, 1.0, 6), loose=2, strict=1, questions=2, group=3, evaluate=4)

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


@dataclass(frozen=True)
class Depth:
    """What a policy does on the questions of one depth: means, and the rounds of each question."""

    hops: int
    questions: int
    accuracy: float
    rounds: float
    queries: float
    format: float
    tokens: float
    all_rounds: list[int]


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World, hops: Sequence[int], count: int
) -> list[Depth]:
    """Accuracy (exact match) and searches by depth, greedy, on held-out questions."""
    policy = Batched(model.eval(), tokenizer)
    rows = []
    for depth in hops:
        questions = world.held_out([depth], count)
        rollouts = play(setting(world), policy, questions, [0] * len(questions))
        right = [
            exact_match(rollout.answer, question.answers) for rollout, question in zip(rollouts, questions, strict=True)
        ]
        rows.append(
            Depth(
                hops=depth,
                questions=len(questions),
                accuracy=sum(right) / len(right),
                rounds=sum(rollout.rounds for rollout in rollouts) / len(rollouts),
                queries=sum(rollout.queries for rollout in rollouts) / len(rollouts),
                format=sum(rollout.format_ok for rollout in rollouts) / len(rollouts),
                tokens=sum(sum(rollout.mask) for rollout in rollouts) / len(rollouts),
                all_rounds=[rollout.rounds for rollout in rollouts],
            )
        )
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
    from tenfold.core.checkpoint import load_weights

    model, tokenizer = tiny_policy(seed)
    known = arm.startswith("known")
    if arm.endswith("sft"):
        cold_start(model, tokenizer, world, replace(plan.sft, seed=seed), folder / arm, with_known(SFT_WEIGHTS, known))
        return model, tokenizer
    half = arm.endswith("-half")
    stem = "no-extra" if arm.startswith("no-extra") else "known" if known else "loose"
    before = folder / (("known-sft" if known else "sft") if half else f"{stem}-half") / "model.safetensors"
    load_weights(model, before)
    start, _ = tiny_policy(seed)
    first = folder / ("known-sft" if known else "sft") / "model.safetensors"
    load_weights(start, first)
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
    teacher = Taught(copy.deepcopy(model), tokenizer, world.expert())

    def examples_of(numbers: Sequence[int]) -> list[Example]:
        questions = [world.draw(number, weights, config.seed) for number in numbers]
        return [example(rollout) for rollout in play(place, teacher, questions, [0] * len(questions))]

    sft(
        model,
        examples_of,
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


# --- What came of it ----------------------------------------------------------------------------------------------

_SHOWN = {
    "sft": "cold start",
    "grpo": "GRPO",
    "no-extra": "GRPO without the extra reward",
    "loose-only": "GRPO, loose grader only",
    "known-sft": "with known facts: cold start",
    "known": "with known facts: GRPO",
}


def reproduce(output: Path, plan: Plan, runs: Path, known_seeds: Sequence[int] | None = None) -> dict[str, Any]:
    """Run the experiment, or what is left of it, print its tables, write them and two plots.

    Args:
        output: result file; the plots go beside it.
        plan: seeds and lengths.
        runs: folder of the training runs; a stopped run goes on.
        known_seeds: seeds of the control with known facts; all by default.

    Returns:
        The written object.
    """
    check_writable(output.parent)
    started = time.time()
    chosen = plan.seeds if known_seeds is None else known_seeds
    with_facts = {seed: one_seed(seed, plan, runs, _arms(seed in chosen)) for seed in plan.seeds}
    results = [with_facts[seed] for seed in plan.seeds]
    found = [accuracy_table(results), rounds_table(results), bars_table(results)]
    for item in found:
        console.table(item.columns, item.rows, title=item.caption)
    for name, label in (("rounds", "rounds of search"), ("accuracy", "accuracy")):
        save_plot(plot(results, name, label), output.with_name(f"{output.stem}_{name}.svg"))
    return write_results(
        output,
        room="agent",
        kind="reproduce",
        seconds=time.time() - started,
        tables=found,
        config=asdict(plan) | {"sft_weights": _named(SFT_WEIGHTS), "rl_weights": _named(RL_WEIGHTS), "miss": MISS},
        seeds=plan.seeds,
        packages=("transformers", "tokenizers"),
        processor_seconds=sum(arm["cpu_s"] for result in results for arm in result.values()),
        arms={f"seed {seed}": _bare(result) for seed, result in with_facts.items()},
        bars=[bars(result) for result in results],
    )


def _arms(known: bool) -> tuple[str, ...]:
    return tuple(arm for arm in ARMS if known or not arm.startswith("known"))


def _named(weights: Mapping[int, float]) -> dict[str, float]:
    return {str(hops): weight for hops, weight in weights.items()}


def _bare(result: Mapping[str, Any]) -> dict[str, Any]:
    """Results without the rounds of every single question."""
    return {
        arm: [{name: value for name, value in row.items() if name != "all_rounds"} for row in done["rows"]]
        for arm, done in result.items()
    }


def _value(result: Mapping[str, Any], arm: str, hops: int, name: str) -> float:
    return float(next(row[name] for row in result[arm]["rows"] if row["hops"] == hops))


def bars(result: Mapping[str, Any]) -> dict[str, Any]:
    """The claims of one seed as figures.

    Returns:
        `deep_hops`: depths at which the cold start is right between 2 % and 60 % of the time; `gain` and
        `gain_no_extra`: mean gain of accuracy there by GRPO with and without the extra reward; `spearman` of rounds and
        depth over the trained depths; `more_searches_at_1`: rounds at one hop, GRPO less cold start; `strict`, `loose`:
        mean accuracy over the trained depths with the strict grader after the switch, and without a switch;
        `known_rounds`: rounds for facts known by heart, where that control was run.
    """
    deep = [hops for hops in HOPS if 0.02 <= _value(result, "sft", hops, "accuracy") <= 0.6]
    trained = tuple(RL_WEIGHTS)

    def gain(arm: str) -> float | None:
        if not deep:
            return None
        better = [_value(result, arm, hops, "accuracy") - _value(result, "sft", hops, "accuracy") for hops in deep]
        return sum(better) / len(deep)

    def mean(arm: str) -> float | None:
        if arm not in result:  # a control that is still to be run
            return None
        return sum(_value(result, arm, hops, "accuracy") for hops in trained) / len(trained)

    return {
        "deep_hops": deep,
        "gain": gain("grpo"),
        "gain_no_extra": gain("no-extra"),
        "spearman": rank_correlation(result["grpo"]["rows"]),
        "spearman_of_means": _spearman_of_means(result["grpo"]["rows"]),
        "more_searches_at_1": _value(result, "grpo", 1, "rounds") - _value(result, "sft", 1, "rounds"),
        "strict": mean("grpo"),
        "loose": mean("loose-only"),
        "known_rounds": _value(result, "known", 0, "rounds") if "known" in result else None,
        "known_accuracy": _value(result, "known", 0, "accuracy") if "known" in result else None,
    }


def _spearman_of_means(rows: Sequence[Mapping[str, Any]]) -> float | None:
    level = [(float(row["hops"]), float(row["rounds"])) for row in rows if row["hops"] in RL_WEIGHTS]
    found = spearman([hops for hops, _ in level], [rounds for _, rounds in level])
    return found[0] if found else None


def _cells(results: Sequence[Mapping[str, Any]], arm: str, name: str, form: str) -> list[str | None]:
    cells: list[str | None] = []
    for hops in (0, *HOPS):
        values = [
            float(row[name])
            for result in results
            if arm in result
            for row in result[arm]["rows"]
            if row["hops"] == hops
        ]
        if not values:
            cells.append(None)
        elif len(values) == 1:
            cells.append(format(values[0], form))
        else:
            cells.append(f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form}}")
    return cells


def _by_depth(results: Sequence[Mapping[str, Any]], name: str, form: str) -> list[list[str | None]]:
    return [
        [label, str(sum(arm in result for result in results)), *_cells(results, arm, name, form)]
        for arm, label in _SHOWN.items()
        if any(arm in result for result in results)
    ]


_COLUMNS = ("", "seeds", "known by heart", "1 hop", "2", "3", "4", "5 (not trained)")


def accuracy_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Accuracy by depth, mean and standard deviation over seeds."""
    return Table(
        "accuracy",
        "Exact match on held-out questions by depth, greedy: mean and standard deviation over seeds",
        _COLUMNS,
        _by_depth(results, "accuracy", ".2f"),
    )


def rounds_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Rounds of search by depth, beside those of a policy that asks again after each miss."""
    ideal: list[str | None] = [
        "asking again after each miss",
        None,
        "0",
        *(f"{ideal_rounds(hops):.2f}" for hops in HOPS),
    ]
    return Table(
        "rounds",
        "Rounds of search by depth on the same questions, of at most seven",
        _COLUMNS,
        [*_by_depth(results, "rounds", ".2f"), ideal],
    )


def bars_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """The claims, seed by seed."""
    rows: list[list[str | float | None]] = []
    for result in results:
        figures = bars(result)
        rows.append(
            [
                str(result["sft"]["seed"]),
                ", ".join(map(str, figures["deep_hops"])) or "-",
                *(
                    None if figures[name] is None else f"{100 * figures[name]:+.0f}"
                    for name in ("gain", "gain_no_extra")
                ),
                f"{figures['spearman']:.2f}",
                f"{figures['more_searches_at_1']:+.2f}",
                *(None if figures[name] is None else f"{figures[name]:.3f}" for name in ("strict", "loose")),
                None if figures["known_rounds"] is None else f"{figures['known_rounds']:.2f}",
            ]
        )
    return Table(
        "claims",
        "Seed by seed: points of accuracy that GRPO adds where the cold start is right 2 to 60 % of the time, rank "
        "correlation of rounds and hops over single questions of 1 to 4 hops, change of rounds at one hop, mean "
        "accuracy over 1 to 4 hops with and without the switch to the strict grader, rounds for facts known by heart",
        (
            "seed",
            "hops",
            "gain",
            "gain, no extra reward",
            "Spearman",
            "rounds at 1 hop",
            "loose, then strict",
            "loose only",
            "known: rounds",
        ),
        rows,
    )


def plot(results: Sequence[Mapping[str, Any]], name: str, label: str) -> Any:
    """One figure by depth: cold start and GRPO, mean of the seeds with their range."""
    hops = [float(depth) for depth in HOPS]
    series: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    spread = {}
    for arm in ("sft", "grpo", "no-extra"):
        values = [[_value(result, arm, depth, name) for result in results] for depth in HOPS]
        series[_SHOWN[arm]] = (hops, [statistics.mean(value) for value in values])
        spread[_SHOWN[arm]] = ([min(value) for value in values], [max(value) for value in values])
    if name == "rounds":
        series["asking again after each miss"] = (hops, [ideal_rounds(depth) for depth in HOPS])
    return plot_lines(series, "hops of the question", label, spread=spread)
