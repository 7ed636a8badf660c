"""The room's verbs. What computes is imported inside them, so that help is quick."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from tyro.conf import Positional, arg

from tenfold.core.console import UserError
from tenfold.core.devices import DeviceName

OutputFolder = Annotated[Path, arg(aliases=["-o"])]
Config = TypeVar("Config")


def pretrain(
    config: Positional[Path | None] = None,
    *,
    output: OutputFolder,
    text: list[Path] | None = None,
    recipe: str = "tenfold-tiny",
    tokenizer: Path | None = None,
    validation: list[Path] | None = None,
    norm: Literal["pre", "sandwich", "dssn", "post"] | None = None,
    init: Literal["tiny", "small"] | None = None,
    layers: int | None = None,
    width: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    ffn: int | None = None,
    vocabulary: int | None = None,
    post_norm_eps: float | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    length: int | None = None,
    learning_rate: float | None = None,
    warmup: int | None = None,
    precision: Literal["no", "bf16", "fp16"] | None = None,
    accumulate: int | None = None,
    guard: Literal["skip", "rollback", "off"] | None = None,
    evaluate_every: int | None = None,
    checkpoint_every: int | None = None,
    peak_flops: float | None = None,
    seed: int | None = None,
    device: DeviceName = "auto",
) -> object:
    """Pre-train a deep decoder on text; the same command again resumes a run that was stopped.

    OUTPUT is then a model that generate, evaluate, export and inspect load. It keeps the loss and the gradient norm of
    every step, and looks at gains and activations; `inspect` draws them.

    Args:
        config: YAML file with `model`, `train` (with its phases) and `data`, instead of a recipe.
        output: folder of the run.
        text: what to train on: .txt or .jsonl files, folders of such, or prefixes of token shards.
        recipe: tenfold-tiny (the built-in model) or pangu-ultra (the paper's phases).
        tokenizer: a tokenizer.json or the folder of one; by default one is trained on the text.
        validation: texts to score, in bits per byte.
        norm: where normalisation stands: pre, sandwich, dssn (depth-scaled sandwich) or post.
        init: initialisation: tiny or small.
        layers: number of layers.
        width: hidden channels.
        heads: query heads.
        kv_heads: key/value heads.
        ffn: channels of the feed-forward network.
        vocabulary: number of token ids.
        post_norm_eps: epsilon of the norms after sub-layers.
        steps: optimiser steps, of a recipe with a single phase (so are the next four).
        batch_size: sequences of a step, over all processes.
        length: tokens of a sequence.
        learning_rate: the highest.
        warmup: steps over which the rate rises.
        precision: no (float32), bf16 or fp16.
        accumulate: micro-batches of a step.
        guard: against loss spikes: skip the batch, rollback to the last checkpoint, or off.
        evaluate_every: steps between two validations.
        checkpoint_every: steps between two checkpoints.
        peak_flops: of one device, for the utilisation that is printed; by default known or measured.
        seed: of weights and data order.
        device: where to train.

    Example:
        tenfold llm pretrain --text book.txt -o runs/book --norm dssn --layers 48 --steps 500
        tenfold llm pretrain recipe.yaml -o runs/large
    """
    import dataclasses

    from tenfold.core.config import load_yaml, near
    from tenfold.llm.config import DataSource, Recipe
    from tenfold.llm.phases import RECIPES, Timetable, with_single_phase

    if config is not None:
        chosen = load_yaml(Recipe, config)
    elif recipe in RECIPES:
        chosen = RECIPES[recipe]
    else:
        raise UserError(f"--recipe {recipe}: no such recipe; {near(recipe, list(RECIPES))}")
    chosen = with_single_phase(
        chosen, steps=steps, batch=batch_size, length=length, learning_rate=learning_rate, warmup=warmup
    )
    model = _replaced(
        chosen.model,
        norm=norm,
        init=init,
        layers=layers,
        width=width,
        head_dim=0 if width or heads else None,
        heads=heads,
        kv_heads=kv_heads,
        ffn=ffn,
        vocabulary=vocabulary,
        post_norm_eps=post_norm_eps,
    )
    train = _replaced(
        chosen.train,
        precision=precision,
        accumulate=accumulate,
        guard=guard,
        evaluate_every=evaluate_every,
        checkpoint_every=checkpoint_every,
        seed=seed,
    )
    sources = tuple(DataSource(str(path)) for path in text) if text else chosen.data
    Timetable(train.phases)  # phases that do not fit together are reported before anything is loaded

    from tenfold.llm import training

    result = training.pretrain(
        Recipe(model, train, sources),
        output,
        tokenizer=tokenizer,
        validation=validation or (),
        device=device,
        peak_flops=peak_flops,
    )
    return dataclasses.asdict(result)


def _replaced(config: Config, **changes: object) -> Config:
    """`config` with those changes that are not None. Raises UserError where they do not fit together."""
    import dataclasses

    try:
        return dataclasses.replace(config, **{k: v for k, v in changes.items() if v is not None})  # type: ignore[type-var]
    except ValueError as error:
        raise UserError(f"these settings cannot be used: {error}") from None


VERBS: dict[str, Callable[..., object]] = {
    "pretrain": pretrain,
}
