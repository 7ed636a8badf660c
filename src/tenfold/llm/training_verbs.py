"""The verbs that train: a vocabulary, a model, a model further, and the comparison of the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from tenfold.core import console
from tenfold.core.console import UserError
from tenfold.core.devices import DeviceName
from tenfold.llm.verb_inputs import OutputFile, OutputFolder, by_name, number, replaced


def tokenizer(
    action: Positional[Literal["train", "inspect"]],
    path: Positional[Path | None] = None,
    *,
    domain: Annotated[tuple[str, ...], UseAppendAction] = (),
    weight: Annotated[tuple[str, ...], UseAppendAction] = (),
    size: int = 4096,
    output: Annotated[Path | None, arg(aliases=["-o"])] = None,
) -> object:
    """Train a byte-level BPE vocabulary domain by domain, or see how one fits texts.

    A vocabulary is trained for each domain; tokens are merged by the best rank that a domain gives them. Id 0 ends a
    document.

    Args:
        action: train, or inspect a vocabulary that exists.
        path: inspect: a tokenizer.json, or a folder in Hugging Face layout.
        domain: NAME=FILE, a text (.txt, .jsonl) or a folder of such; once for each domain and file.
        weight: NAME=NUMBER: ranks of a domain are divided by it, so that it gets more of the vocabulary; 1 by default.
        size: train: number of token ids.
        output: train: the tokenizer.json to write, or a folder.

    Example:
        tenfold llm tokenizer train --domain en=novels.txt --domain code=src.jsonl --size 4096 -o tokenizer.json
        tenfold llm tokenizer inspect tokenizer.json --domain en=novels.txt
    """
    texts = by_name(domain, "--domain")
    if action == "train" and (output is None or not texts or path is not None):
        raise UserError("tokenizer train: give --domain NAME=FILE and -o FILE, and no other file")
    if action == "inspect" and path is None:
        raise UserError("tokenizer inspect: give the tokenizer.json or its folder")
    if action == "inspect" and (weight or output is not None):
        raise UserError("tokenizer inspect: --weight and --output are for train")

    from tenfold.llm import tokenizer as vocabularies
    from tenfold.llm.data import TextFiles

    files = {name: TextFiles(paths) for name, paths in texts.items()}
    report: dict[str, object] = {}
    if action == "train":
        weights = {name: number(values[-1], "--weight") for name, values in by_name(weight, "--weight").items()}
        trained = vocabularies.train({name: found.pieces() for name, found in files.items()}, size, weights)
        words = trained.tokenizer
        words.save(output)  # type: ignore[arg-type]
        report = {"output": output, "shares": trained.shares, "shared": trained.shared}
        report["unreachable"] = trained.unreachable
        console.table(
            ("domain", "tokens", "share"),
            [(name, count, f"{count / words.size:.1%}") for name, count in trained.shares.items()],
            f"{output}: {words.size} ids; {trained.shared} tokens were found by several domains",
        )
    else:
        words = vocabularies.Tokenizer.load(path)  # type: ignore[arg-type]
    scripts = vocabularies.scripts(words)
    fits = {name: vocabularies.measure(words, found.pieces()) for name, found in files.items()}
    console.table(
        ("tokens of", "tokens", "share"),
        [(name, count, f"{count / words.size:.1%}") for name, count in scripts.items()],
    )
    if fits:
        console.table(
            ("text", "bytes", "tokens", "bytes a token", "of the vocabulary used"),
            [(n, f.bytes, f.tokens, f"{f.bytes_per_token:.3f}", f"{f.used:.1%}") for n, f in fits.items()],
        )
    end = words.token_bytes(words.eod).decode(errors="replace")
    console.say(f"{words.size} ids; {words.eod} ({end}) ends a document")
    return {**report, "size": words.size, "eod": words.eod, "scripts": scripts, "domains": fits}


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
    decay_norms: bool = True,
    evaluate_every: int | None = None,
    checkpoint_every: int | None = None,
    fsdp: bool = False,
    tp: int = 1,
    cp: int = 1,
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
        decay_norms: weight decay acts on the gains of norms and other vectors too, as in the paper.
        evaluate_every: steps between two validations.
        checkpoint_every: steps between two checkpoints.
        fsdp: under torchrun: share weights, gradients and optimiser state among the processes (FSDP2).
        tp: under torchrun: processes that share every matrix (tensor and sequence parallelism).
        cp: under torchrun: processes that share the tokens of every document (context parallelism).
        peak_flops: of one device, for the utilisation that is printed; by default known or measured.
        seed: of weights and data order.
        device: where to train.

    Example:
        tenfold llm pretrain --text book.txt -o runs/book --norm dssn --layers 48 --steps 500
        torchrun --nproc-per-node 8 -m tenfold llm pretrain recipe.yaml -o runs/large --fsdp --tp 2
    """
    import dataclasses
    import os

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
    model = replaced(
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
    if peak_flops is not None and not peak_flops > 0:
        raise UserError(f"--peak-flops {peak_flops}: give a positive number")
    train = replaced(
        chosen.train,
        precision=precision,
        accumulate=accumulate,
        guard=guard,
        decay_norms=None if decay_norms else False,
        evaluate_every=evaluate_every,
        checkpoint_every=checkpoint_every,
        seed=seed,
    )
    sources = tuple(DataSource(str(path)) for path in text) if text else chosen.data
    Timetable(train.phases)  # phases that do not fit together are reported before anything is loaded

    from tenfold.llm import training
    from tenfold.llm.parallel import layout_of

    result = training.pretrain(
        Recipe(model, train, sources),
        output,
        tokenizer=tokenizer,
        validation=validation or (),
        layout=layout_of(int(os.environ.get("WORLD_SIZE", "1")), fsdp, tp, cp),
        device=device,
        peak_flops=peak_flops,
    )
    return dataclasses.asdict(result)


def post_train(
    model: Positional[str],
    data: Positional[Path],
    output: OutputFolder,
    *,
    steps: int,
    stage: Literal["sft", "grpo"] = "sft",
    reward: Annotated[tuple[str, ...], UseAppendAction] = (),
    batch_size: int = 8,
    accumulate: int = 1,
    learning_rate: float | None = None,
    length: int = 1024,
    completion: int = 256,
    group: int = 8,
    temperature: float = 1.0,
    checkpoint_every: int = 0,
    seed: int = 0,
    device: DeviceName = "auto",
) -> object:
    """Fine-tune a model on examples (sft), or train it on answers that can be checked (grpo), with TRL.

    DATA are JSON lines. sft: {"prompt": ..., "completion": ...} (loss on the completion), {"messages": [...]} (needs a
    chat template) or {"text": ...}. grpo: {"prompt": ..., "answer": ...}. OUTPUT is a folder in Hugging Face layout.

    Args:
        model: name, folder, file or Hub id.
        data: file of JSON lines.
        output: folder for the result.
        steps: optimiser steps.
        stage: sft or grpo.
        reward: grpo: exact, numeric (the last number counts), regex:PATTERN, or module:function of your own; values of
            several are added.
        batch_size: sequences (grpo: completions) of a forward pass and process.
        accumulate: forward passes of a step.
        learning_rate: the highest; by default 2e-5 for sft and 1e-6 for grpo.
        length: sft: longest sequence in tokens.
        completion: grpo: longest completion in tokens.
        group: grpo: completions of a prompt that are compared.
        temperature: grpo: of sampling.
        checkpoint_every: steps between checkpoints, from which the same command goes on; 0 writes none.
        seed: of order and sampling.
        device: where to compute.

    Example:
        tenfold llm post-train smollm2-135m chat.jsonl -o sft --steps 500
        tenfold llm post-train sft sums.jsonl -o rl --stage grpo --reward numeric --steps 200
    """
    from tenfold.core.devices import set_threads
    from tenfold.llm import post_training

    set_threads()
    settings = post_training.PostTraining(
        stage=stage,
        steps=steps,
        batch=batch_size,
        accumulate=accumulate,
        learning_rate=learning_rate,
        length=length,
        completion=completion,
        group=group,
        temperature=temperature,
        checkpoint_every=checkpoint_every,
        seed=seed,
    )
    result = post_training.post_train(model, data, output, settings, reward, device)
    shown = ("loss", "mean_token_accuracy", "reward", "completions/mean_length")
    console.table(
        ("", "first step", "last step"),
        [(name, f"{result.first[name]:.4g}", f"{result.last[name]:.4g}") for name in shown if name in result.last],
    )
    console.say(f"{result.folder}: {result.steps} steps on {result.examples} examples")
    return result


def reproduce(
    output: OutputFile = Path("results/reproduce/llm.json"),
    runs: Path = Path("runs/llm-reproduce"),
    quick: bool = False,
    parts: list[Literal["norms", "init", "map"]] | None = None,
    text: Path | None = None,
    processes: int = 2,
    steps: int | None = None,
    layers: int | None = None,
    width: int | None = None,
    learning_rate: float | None = None,
    seeds: list[int] | None = None,
) -> object:
    """Reproduce the headline: depth-scaled sandwich norm stays stable where other placements do not.

    Trains networks of 48 layers on the bytes of a real text at an aggressive rate: four norm placements with and
    without clipping, initialisations, and a map of where spikes appear. Runs that are done are not done again, so the
    same command goes on after an interruption.

    Args:
        output: result file; plots go beside it.
        runs: folder of the runs.
        quick: one seed, fewer steps and no map: within five minutes.
        parts: of norms, init and map; all by default.
        text: a UTF-8 text; by default the built-in plays of Shakespeare.
        processes: runs at a time, each with one thread.
        steps: of every run; 200 by default.
        layers: of the networks.
        width: of the networks.
        learning_rate: the highest.
        seeds: 0, 1 and 2 by default.

    Example:
        tenfold llm reproduce --quick
        tenfold llm reproduce --parts norms init --processes 2
    """
    from tenfold.llm import reproduce as work

    scale = replaced(
        work.QUICK if quick else work.Scale(),
        steps=steps,
        layers=layers,
        width=width,
        rate=learning_rate,
        seeds=tuple(seeds) if seeds else None,
    )
    if processes < 1:
        raise UserError(f"--processes {processes}: give 1 or more")
    chosen = parts or (["norms", "init"] if quick else list(work.PARTS))
    return work.reproduce(output, runs, scale, chosen, processes, text)
