"""The verbs that use a trained model: write, score, stretch, look at, convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from tenfold.core import console
from tenfold.core.console import UserError
from tenfold.core.devices import DeviceName
from tenfold.llm.config import Layout
from tenfold.llm.verb_inputs import OutputFile, OutputFolder, number, read_text


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
    if skip < 0 or last_words < 0:
        raise UserError(f"--skip {skip}, --last-words {last_words}: give numbers from 0 on")
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

    numbers = [number(part, "--bases") for part in bases.split(",")]
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
            layout, micro_batches = PANGU_ULTRA_LAYOUT, 16 if micro_batches is None else micro_batches
        micro_batches = 1 if micro_batches is None else micro_batches
        if length < 1 or micro_batches < 1:
            raise UserError(f"--length {length}, --micro-batches {micro_batches}: give numbers from 1 on")
        try:
            size = scale.report(PRESETS[target], layout, length, micro_batches=micro_batches)
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
            without this library, and so does `glm4`, which holds sandwich norms with one epsilon for all norms.
        dtype: type of the weights; keep changes nothing.
        shard_gb: largest weights file, in gigabytes.

    Example:
        tenfold llm convert smollm2-135m -o smollm2/ --to llama
        tenfold llm convert runs/tiny -o tiny-hf/ --dtype bf16
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
