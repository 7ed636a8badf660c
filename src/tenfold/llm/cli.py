"""The room's verbs. What computes is imported inside them, so that help is quick."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from tyro.conf import Positional, UseAppendAction, arg

from tenfold.core import console
from tenfold.core.console import UserError
from tenfold.core.devices import DeviceName
from tenfold.llm.config import Layout

OutputFolder = Annotated[Path, arg(aliases=["-o"])]
OutputFile = OutputFolder
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


def inspect(
    target: Positional[str],
    output: Annotated[Path | None, arg(aliases=["-o"])] = None,
    text: Path | None = None,
    layout: Layout = Layout(),  # noqa: B008
    length: int = 4096,
    micro_batches: int | None = None,
    device: DeviceName = "cpu",
) -> object:
    """Draw what tells a stable run from an unstable one: one HTML page, and its figures as JSON beside it.

    Of a run: loss with spikes marked, gradient norm, gains and activations by layer, first and last. Of any other
    model: gains, and activations on a text. Of a named size, without an output: parameters, FLOPs of a token, memory of
    a device on a layout, and the conventions of these figures.

    Args:
        target: folder of a run of `pretrain`, a model's name or path, or a named size such as pangu-ultra-135b.
        output: the page, a .html file.
        text: what a model's activations are taken on; by default a built-in excerpt.
        layout: devices that a named size is spread over; by default one, for pangu-ultra-135b the paper's 8,192.
        length: tokens of a sequence, of a named size.
        micro_batches: of a step, of a named size; by default one, on the paper's layout its 16.
        device: where a model runs.

    Example:
        tenfold llm inspect runs/book -o book.html
        tenfold llm inspect tenfold-tiny -o tiny.html
        tenfold llm inspect openpangu-embedded-7b --layout.fsdp 8 --layout.tp 2
    """
    from tenfold.llm.config import PANGU_ULTRA_LAYOUT, PRESETS

    if output is None and target in PRESETS:
        from tenfold.llm import scale

        if target == "pangu-ultra-135b" and layout == Layout():
            layout, micro_batches = PANGU_ULTRA_LAYOUT, micro_batches or 16
        try:
            size = scale.report(PRESETS[target], layout, length, micro_batches=micro_batches or 1)
        except ValueError as error:
            raise UserError(f"layout: {error}") from error
        scale.show(size)
        return size
    if output is None:
        raise UserError(f"inspect: give -o PAGE.html, or a named size instead of {target}: {', '.join(PRESETS)}")
    if output.suffix.lower() != ".html":
        raise UserError(f"-o {output}: name a file that ends in .html")

    from tenfold.core import console
    from tenfold.llm import inspection

    found = inspection.inspect(target, output, text, device)
    if "spikes" in found:
        ratio = found["gradient_ratio"]
        console.say(
            f"{found['steps']} steps, {found['spikes']} loss spikes (largest {found['largest_spike']:.3g} nat), "
            f"gradient norm max/median {'-' if ratio is None else format(ratio, '.3g')}"
        )
    console.say(f"{output} and {output.with_suffix('.json').name} are written")
    return found


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

    scale = _replaced(
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


def _replaced(config: Config, **changes: object) -> Config:
    """`config` with those changes that are not None. Raises UserError where they do not fit together."""
    import dataclasses

    try:
        return dataclasses.replace(config, **{k: v for k, v in changes.items() if v is not None})  # type: ignore[type-var]
    except ValueError as error:
        raise UserError(f"these settings cannot be used: {error}") from None


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
    texts = _by_name(domain, "--domain")
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
        weights = {name: _number(values[-1], "--weight") for name, values in _by_name(weight, "--weight").items()}
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


def _by_name(entries: tuple[str, ...], option: str) -> dict[str, list[str]]:
    """`NAME=VALUE` entries by name."""
    found: dict[str, list[str]] = {}
    for entry in entries:
        name, sign, value = entry.partition("=")
        if not (name and sign and value):
            raise UserError(f"{option} {entry}: expected NAME=VALUE")
        found.setdefault(name, []).append(value)
    return found


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{option}: {text!r} is not a number") from None


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


def convert(
    source: Positional[str],
    output: OutputFolder,
    to: str = "tenfold",
    dtype: Literal["keep", "fp32", "bf16", "fp16"] = "keep",
    shard_gb: float = 5.0,
) -> object:
    """Write a checkpoint as a Hugging Face folder in another family's layout, tokenizer included.

    Read are folders and files of Llama, Mistral, Qwen 2 and 3, openPangu-Embedded and Pangu's sandwich, GLM-4-0414,
    Gemma 2 and 3, dense AFMoE, of this library, and GGUF files of these. A layout that cannot hold the model is
    refused. With the same type, converting there and back gives the same bits.

    Args:
        source: name, folder, .safetensors or .gguf file, or Hub id.
        output: folder to write; not the source's own.
        to: tenfold, llama, mistral, qwen2, qwen3, pangu, glm4, gemma2, gemma3 or afmoe. `llama` loads in transformers
            without this library, and so does `glm4`, which holds sandwich norms.
        dtype: type of the weights; keep changes nothing.
        shard_gb: largest weights file, in gigabytes.

    Example:
        tenfold llm convert smollm2-135m -o smollm2/ --to llama
        tenfold llm convert runs/tiny -o tiny-glm4/ --to glm4 --dtype bf16
    """
    if not shard_gb > 0:
        raise UserError(f"--shard-gb {shard_gb}: give a positive number")

    import torch

    from tenfold.llm.checkpoint import convert as write

    types = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    result = write(source, output, to, types[dtype], int(shard_gb * 1e9))
    console.say(
        f"{result.path}: {result.parameters / 1e6:.2f} M parameters ({', '.join(result.dtypes)}), "
        f"{result.family[0]} to {result.family[1]}, {result.bytes / 1e6:.1f} MB in {', '.join(result.files)}"
    )
    return result


def export(model: Positional[str], output: OutputFile) -> object:
    """Write a model as an ONNX file for rows of any number and length, checked against PyTorch.

    Input `tokens`: rows x length, int64. Output `logits`: rows x length x vocabulary, float32. The graph has no cache:
    it scores texts, and generation with it computes all tokens anew each time.

    Args:
        model: name, folder, .safetensors or .gguf file, or Hub id; at most 2 GB of weights.
        output: the .onnx file.

    Example:
        tenfold llm export tenfold-tiny -o tenfold-tiny.onnx
    """
    if output.suffix.lower() != ".onnx":
        raise UserError(f"-o {output}: name a file that ends in .onnx")

    import torch

    from tenfold.core.devices import set_threads
    from tenfold.llm import onnx_file
    from tenfold.llm.checkpoint import load_model

    set_threads()
    loaded = load_model(model, dtype=torch.float32)
    result = onnx_file.write(loaded.model, output, {"origin": loaded.origin})
    console.table(
        ("rows x tokens", "largest difference"),
        [(f"{rows} x {tokens}", f"{difference:.1e}") for rows, tokens, difference in result.checked],
        title=f"{output}: {result.bytes / 1e6:.2f} MB; logits up to {result.largest_logit:.1f}",
    )
    return result


def generate(
    prompt: Positional[str],
    *,
    model: str = "tenfold-tiny",
    max_new_tokens: int = 128,
    temperature: float = 0.7,
    top_p: float = 0.95,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    stop: list[str] | None = None,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    seed: int = 0,
    device: DeviceName = "auto",
) -> object:
    """Write a text on; it is shown as it comes.

    Args:
        prompt: the beginning of the text, or - to read it from standard input.
        model: a name of `tenfold models`, a folder or file of weights, a run of pretrain, or a hub id.
        max_new_tokens: most tokens that are written.
        temperature: below 1 likelier words are preferred; 0 takes the likeliest token every time.
        top_p: draw from the likeliest tokens that together have this probability.
        top_k: draw from so many likeliest tokens; 0 from all.
        repetition_penalty: above 1 makes tokens that the text has already less likely.
        stop: strings that end the text.
        precision: of weights and arithmetic; bf16 and fp16 are for GPUs.
        seed: the same seed writes the same text.
        device: where to compute.

    Example:
        tenfold llm generate "It was a dark night, and" --max-new-tokens 60
        tenfold llm generate "The capital of France is" --model smollm2-135m --temperature 0 --max-new-tokens 8
    """
    import sys

    from tenfold.core.devices import set_threads
    from tenfold.llm.generation import LanguageModel

    set_threads()
    text = sys.stdin.read() if prompt == "-" else prompt
    language_model = LanguageModel.from_pretrained(model, device, precision)

    console.say(text, end="")
    result = language_model.generate(
        text,
        max_new_tokens,
        temperature,
        top_p,
        top_k,
        repetition_penalty,
        seed,
        stop or (),
        on_text=lambda piece: console.say(piece, end=""),
    )
    console.say("")
    return result


def evaluate(
    model: Positional[str],
    *,
    text: Path | None = None,
    tasks: str | None = None,
    context: int | None = None,
    stride: int | None = None,
    skip: int = 0,
    limit: int | None = None,
    last_words: int = 0,
    shots: int | None = None,
    batch: int = 8,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    seed: int = 0,
    device: DeviceName = "auto",
) -> object:
    """Score a model: bits per byte and perplexity of a text, its last words, or tasks of lm-evaluation-harness.

    A window of CONTEXT tokens begins at every multiple of STRIDE; each token is scored once, in the first window that
    has it, save the first of a window that nothing stands before. With a stride as long as the window that is one
    token of each window, with a shorter one only the text's first.

    Args:
        model: a name of `tenfold models`, a folder or file of weights, a run of pretrain, or a hub id.
        text: a UTF-8 text to predict.
        tasks: names of tasks with commas between, or YAML files of tasks (needs lm_eval).
        context: tokens of a window; by default the model's own, at most 2048.
        stride: tokens between windows; by default half a window.
        skip: characters of the text to leave out at its beginning.
        limit: most tokens of the text, or most examples of a task.
        last_words: also predict the last word of so many passages of the text, as in LAMBADA.
        shots: worked examples before each question of a task; by default the task's own number.
        batch: windows or questions at a time.
        precision: of weights and arithmetic; bf16 and fp16 are for GPUs.
        seed: of the choice of worked examples.
        device: where to compute.

    Example:
        tenfold llm evaluate tenfold-tiny --text book.txt
        tenfold llm evaluate smollm2-135m --text book.txt --context 256 --stride 256 --limit 4096 --last-words 100
        tenfold llm evaluate smollm2-135m --tasks lambada_openai,arc_easy --limit 100
    """
    from importlib.util import find_spec

    from tenfold.core.devices import set_threads

    if (text is None) == (tasks is None):
        raise UserError("give either --text FILE or --tasks NAMES")
    if tasks is not None and find_spec("lm_eval") is None:
        raise UserError("--tasks needs lm-evaluation-harness: pip install 'tenfold[llm-eval]'")
    content = read_text(text)[skip:] if text is not None else ""

    from tenfold.llm import evaluation
    from tenfold.llm.generation import LanguageModel

    set_threads()
    language_model = LanguageModel.from_pretrained(model, device, precision)
    if tasks is not None:
        from tenfold.llm.harness import run_tasks

        names = [name for part in tasks.split(",") if (name := part.strip())]
        found = run_tasks(language_model, names, limit, shots, batch, seed)
        scores = [(task, metric, f"{value:.4f}") for task, row in found.items() for metric, value in row.items()]
        console.table(("task", "metric", "value"), scores, title=language_model.origin)
        return found
    score = evaluation.score_text(language_model, content, context, stride, limit, batch)
    words = evaluation.last_words(language_model, content, last_words, batch=batch) if last_words else None
    rows = [
        ("bits per byte", f"{score.bits_per_byte:.4f}"),
        ("perplexity", f"{score.perplexity:.3f}"),
        ("tokens scored", f"{score.tokens}"),
        *([("last words", f"{words.accuracy:.3f} of {words.passages}")] if words else []),
    ]
    title = f"{language_model.origin}, {text}: windows of {score.context} tokens, {score.stride} apart"
    console.table(("measure", "value"), rows, title=title)
    return {"text": score, "last_words": words}


def read_text(path: Path) -> str:
    """A text file. Raises UserError: no such file, or no UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def extend_context(
    model: Positional[str],
    *,
    target: int,
    bases: str,
    text: Path | None = None,
    output: Annotated[Path | None, arg(aliases=["-o"])] = None,
    depths: int = 5,
    needles: int = 2,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    seed: int = 0,
    device: DeviceName = "auto",
) -> object:
    """Choose the rotary base for a longer context, by needles in haystacks.

    The model is run untrained at the target length with each base, and asked for numbers that stand somewhere in the
    text. The base that finds most is taken; of equals, the one with the lowest loss on the text. With -o a copy that
    has this base and context is written, to go on training from.

    Args:
        model: a name of `tenfold models`, a folder or file of weights, a run of pretrain, or a hub id.
        target: context length to reach, in tokens.
        bases: rotary bases to try, with commas between.
        text: a UTF-8 text around the needles, longer than the target; by default Shakespeare's plays.
        output: folder for the copy.
        depths: places of the needle, evenly from the beginning to the end.
        needles: at each depth.
        precision: of weights and arithmetic; bf16 and fp16 are for GPUs.
        seed: of needles and texts.
        device: where to compute.

    Example:
        tenfold llm extend-context smollm2-135m --target 4096 --bases 1e5,4e5,1.6e6 -o smollm2-4k
    """
    from tenfold.core.devices import set_threads
    from tenfold.llm import context
    from tenfold.llm.generation import LanguageModel

    numbers = [_number(part, "--bases") for part in bases.split(",")]
    hay = read_text(text) if text is not None else context.built_in_text()
    set_threads()
    language_model = LanguageModel.from_pretrained(model, device, precision)
    result = context.sweep(language_model, hay, target, numbers, depths, needles, seed)
    columns = ("base", "found", *(f"at {depth:.0%}" for depth in result.depths), "answer nats", "loss")
    rows = [
        (
            f"{score.rope_base:g}" + (" *" if score.rope_base == result.best else ""),
            f"{score.found:.0%}",
            *(f"{share:.0%}" for share in score.by_depth),
            f"{score.answer_nats:.3f}",
            f"{score.loss:.3f}",
        )
        for score in result.scores
    ]
    title = (
        f"{language_model.origin}: trained with base {result.trained_base:g} to {result.trained_context} tokens, "
        f"run at {target}; answer tokens found by depth, nats a token; * is taken"
    )
    console.table(columns, rows, title=title)
    if output is not None:
        context.extend(language_model, result.best, target, output)
        console.say(f"wrote {output}: base {result.best:g}, context {target}")
    return result


VERBS: dict[str, Callable[..., object]] = {
    "pretrain": pretrain,
    "generate": generate,
    "evaluate": evaluate,
    "extend-context": extend_context,
    "inspect": inspect,
    "reproduce": reproduce,
    "tokenizer": tokenizer,
    "convert": convert,
    "export": export,
    "post-train": post_train,
}
