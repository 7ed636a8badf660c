"""Pre-training on core's loop: phases, next-token loss, validation, and what a run prints of itself."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tenfold.core.config import near
from tenfold.core.console import UserError, say, table, warn
from tenfold.core.devices import resolve_device
from tenfold.core.training import FitConfig, FitResult, Schedule, fit
from tenfold.core.training.data import Batches
from tenfold.llm import parallel, scale, stability
from tenfold.llm.checkpoint import native_metadata
from tenfold.llm.config import Layout, ModelConfig, Recipe, TrainConfig
from tenfold.llm.data import PackedTokens, TextFiles, open_source
from tenfold.llm.model import Decoder, groups_for_decay, initialise
from tenfold.llm.phases import Timetable
from tenfold.llm.tokenizer import BYTES, ByteTokenizer, Tokenizer
from tenfold.llm.tokenizer import train as train_tokenizer

# Dense bf16 FLOP/s of accelerators, from their makers' data sheets.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}


def next_token_loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy over all positions, in float32, in nats a token.

    Args:
        model: a decoder, possibly wrapped.
        batch: `tokens` and `targets` (B, T), `documents` where attention ends at document ends, and `positions` (T,)
            where they do not count from 0.
    """
    logits = model(batch["tokens"], batch.get("documents"), positions=batch.get("positions"))
    return F.cross_entropy(logits.flatten(0, -2).float(), batch["targets"].flatten()), {}


class PhasedLoss:
    """The next-token loss at the rotary base of the batch's phase.

    Args:
        decoder: the bare model whose base is set.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over the batch."""
        self.decoder.rotary.base = batch["rope_base"]
        return next_token_loss(model, batch)


class PhasedSequences:
    """The sequences of all phases as one sample stream, each phase with its own length.

    Args:
        timetable: of the run.
        phases: sequences of each phase.
    """

    def __init__(self, timetable: Timetable, phases: Sequence[Batches]) -> None:
        self.timetable = timetable
        self.phases = phases

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """`tokens`, `targets` (B, T) and `rope_base` of consecutive sequences of one step."""
        phase, first = self.timetable.phase_of_sequence(indices[0])
        found = self.phases[phase].batch(range(first, first + len(indices)))
        return {**found, "rope_base": self.timetable.phases[phase].rope_base}


class Windows:
    """Windows of one long text at random places; sample i is a pure function of i.

    Args:
        tokens: ids (N,), N > length.
        length: tokens of a window.
        seed: of the places.

    Raises:
        UserError: the text is shorter than one window.
    """

    def __init__(self, tokens: Tensor, length: int, seed: int = 0) -> None:
        if len(tokens) <= length:
            raise UserError(f"the text has {len(tokens)} tokens, fewer than one sequence of {length} and its target")
        self.tokens, self.length, self.seed = tokens, length, seed

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """`tokens` and `targets` (B, T), int64."""
        generator = torch.Generator()
        starts = []
        for index in indices:
            generator.manual_seed(self.seed * 1_000_003 + index)
            starts.append(int(torch.randint(len(self.tokens) - self.length, (), generator=generator)))
        rows = torch.stack([self.tokens[start : start + self.length + 1] for start in starts]).long()
        return {"tokens": rows[:, :-1], "targets": rows[:, 1:]}


class Validation:
    """Loss on the beginning of a text that is not trained on.

    Args:
        ids: of the text.
        length: tokens of a window; windows do not overlap, and what is left over is dropped.
        tokenizer: counts the bytes that the targets stand for.
        limit: most windows.
        batch: windows at a time.

    Raises:
        UserError: the text is shorter than one window.
    """

    def __init__(self, ids: Sequence[int], length: int, tokenizer: Tokenizer, limit: int = 64, batch: int = 8) -> None:
        count = min(limit, (len(ids) - 1) // length)
        if count < 1:
            raise UserError(f"the validation text has {len(ids)} tokens, fewer than one sequence of {length}")
        rows = torch.tensor(ids[: count * length + 1])
        self.inputs, self.targets = rows[:-1].view(count, length), rows[1:].view(count, length)
        self.batch = batch
        self.bytes = sum(len(tokenizer.token_bytes(token)) for token in rows[1:].tolist())

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """`loss` in nats a token, `nats_per_byte`, `bits_per_byte`."""
        device, total = next(model.parameters()).device, 0.0
        for inputs, targets in zip(self.inputs.split(self.batch), self.targets.split(self.batch), strict=True):
            logits = model(inputs.to(device)).flatten(0, 1).float()
            total += F.cross_entropy(logits, targets.to(device).flatten(), reduction="sum").item()
        nats = total / self.bytes
        return {"loss": total / self.targets.numel(), "nats_per_byte": nats, "bits_per_byte": nats / math.log(2)}


def make_optimizer(config: TrainConfig, learning_rate: float) -> Any:
    """Factory of AdamW as in the paper's section 3.2; weights, gains and moments are float32."""
    return lambda model: torch.optim.AdamW(
        groups_for_decay(model, config.weight_decay, config.decay_norms),
        lr=learning_rate,
        betas=config.betas,
        eps=config.adam_eps,
        fused=True,
    )


def fit_config(config: TrainConfig, timetable: Timetable) -> FitConfig:
    """The recipe as core's loop takes it. The loss and gradient norm of every step are kept."""
    guarded = config.guard != "off"
    return FitConfig(
        steps=timetable.steps,
        batch_size=timetable.stretches[0].sequences,
        seed=config.seed,
        accumulate=config.accumulate,
        clip_norm=config.clip_norm or None,
        precision=config.precision,
        compile=config.compile,
        loss_spike_factor=None,
        loss_spike_height=config.spike_height if guarded else None,
        gradient_spike_factor=(config.gradient_factor or None) if guarded else None,
        on_spike="rollback" if config.guard == "rollback" else "skip",
        evaluate_every=config.evaluate_every,
        checkpoint_every=config.checkpoint_every,
        keep_checkpoints=config.keep_checkpoints,
        log_every=1,
    )


def schedule(timetable: Timetable) -> Schedule:
    """Factor of the highest learning rate by step."""
    return lambda step: timetable.learning_rate(step) / timetable.peak


def metadata(config: ModelConfig, timetable: Timetable) -> Any:
    """Header of weights files by step: the configuration with the rotary base and the context trained so far."""

    def header(step: int) -> dict[str, str]:
        last = timetable.at_step(max(0, step - 1))
        reached = [stretch.length for stretch in timetable.stretches if stretch.step < max(1, step)]
        changed = replace(config, rope_base=last.rope_base, context=max(reached))
        return native_metadata(changed)

    return header


@dataclass(frozen=True)
class PretrainResult:
    """What a run came to.

    Attributes:
        run_dir: the run's folder, which `generate` and the others load.
        weights: file with the final weights.
        parameters: of the model.
        steps: steps done.
        tokens: tokens that they took.
        refused: steps that the guard refused or took back.
        finished: whether all phases were done.
        loss: of the last step, in nats a token.
        bits_per_byte: on the validation text.
        tokens_per_second: wall time in training steps.
        mfu: share of `peak_flops` that the model's own arithmetic took.
        peak_flops: of all devices.
        spikes: loss spikes by the definition in `stability.find_spikes`.
        gradient_ratio: largest gradient norm over the median one, after the warm-up.
        seconds: in training steps.
        cpu_seconds: processor time in training steps.
    """

    run_dir: Path
    weights: Path
    parameters: int
    steps: int
    tokens: int
    refused: int
    finished: bool
    loss: float | None
    bits_per_byte: float | None
    tokens_per_second: float
    mfu: float
    peak_flops: float
    spikes: int
    gradient_ratio: float | None
    seconds: float
    cpu_seconds: float


def train(
    model: Decoder,
    sequences: Batches,
    config: TrainConfig,
    run_dir: Path,
    *,
    validation: Validation | None = None,
    recipe: object = None,
    layout: Layout | None = None,
    device: str = "auto",
    peak_flops: float | None = None,
) -> PretrainResult:
    """Train a decoder through its phases, or go on with the run in `run_dir`.

    Args:
        model: to be trained, in place.
        sequences: sample stream, such as `PhasedSequences`.
        config: phases and the rest.
        run_dir: folder of the run.
        validation: text to score.
        recipe: recorded, and compared when the run goes on.
        layout: how the processes that torchrun started share the work (FSDP2, tensor and context parallelism); None
            gives each process the whole model and rows of its own.
        device: see `core.devices.resolve_device`.
        peak_flops: of one device, FLOP/s; None takes a data sheet's, or measures a matrix product.

    Raises:
        UserError: see `core.training.fit`; a batch that does not divide over processes and micro-batches.
    """
    timetable = Timetable(config.phases)
    layout = layout or parallel.layout_of(int(os.environ.get("WORLD_SIZE", "1")))
    _check_batches(timetable, config.accumulate, layout.data_shares)
    first_tokens = sequences.batch(timetable.sequences(0)[:8])["tokens"]
    run_dir.mkdir(parents=True, exist_ok=True)
    looks = run_dir / stability.FILE
    main = os.environ.get("RANK", "0") == "0"
    if main:
        _report_start(model, first_tokens, looks)

    def evaluate(network: nn.Module, step: int) -> dict[str, float]:
        row = stability.look(network, first_tokens, step)
        if main:
            _append(looks, row)
        return validation(network) if validation else {}

    spread = parallel.prepare(model, layout, config.precision, str(resolve_device(device)), config.seed)
    with spread.active():
        result = fit(
            model,
            sequences,
            spread.loss(PhasedLoss(model)),
            make_optimizer(config, timetable.peak),
            fit_config(config, timetable),
            run_dir,
            schedule=schedule(timetable),
            evaluate=evaluate,
            recipe=recipe,
            metadata=metadata(model.config, timetable),
            samples=timetable.sequences,
            data_share=spread.data_share,
            device=device,
        )
    return _summarise(result, model, timetable, device, peak_flops, config.precision)


def _check_batches(timetable: Timetable, accumulate: int, processes: int) -> None:
    """All at the start, not when a later phase begins."""
    for stretch in timetable.stretches:
        if stretch.sequences % (processes * accumulate):
            raise UserError(
                f"phase {timetable.phases[stretch.phase].name!r}: {stretch.sequences} sequences cannot be shared "
                f"equally by {processes} process(es) x {accumulate} micro-batch(es)"
            )


def _append(path: Path, row: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _report_start(model: Decoder, tokens: Tensor, looks: Path) -> None:
    """Say how large the inputs of norms after sub-layers are beside their epsilon (new runs only)."""
    if looks.exists():
        return
    row = stability.look(model, tokens, 0)
    _append(looks, row)
    if not model.config.has_post_norms:
        return
    squares = {kind: row["activations"][kind]["mean_square"] for kind in ("post_attention_norm", "post_mlp_norm")}
    eps = model.config.post_norm_eps or model.config.norm_eps
    table(
        ["layer", "attention", "feed-forward"],
        [
            [layer, *(f"{values[layer]:.1e}{' < eps' if values[layer] < eps else ''}" for values in squares.values())]
            for layer in range(model.config.layers)
        ],
        title=f"post-norm input mean square vs eps {eps:g}",
    )
    small = stability.below_epsilon(model, row)
    if small:
        warn(
            f"{len(small)} of {2 * model.config.layers} norms after sub-layers start with inputs below their epsilon "
            f"{eps:g} and do not normalise yet: set post_norm_eps to {min(s for _, _, s, _ in small) / 10:.0e} or less"
        )


def _summarise(
    result: FitResult,
    model: Decoder,
    timetable: Timetable,
    device: str,
    peak_flops: float | None,
    precision: str,
) -> PretrainResult:
    tokens = timetable.tokens_before(result.steps)
    flops = 0.0
    for stretch in timetable.stretches:
        steps = min(max(0, result.steps - stretch.step), stretch.steps)
        flops += steps * stretch.sequences * stretch.length * scale.flops_per_token(model.config, stretch.length)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    peak, source = (peak_flops, "as given") if peak_flops else device_peak(device, precision)
    report = stability.summary(stability.read_run(result.run_dir))
    seconds = max(result.seconds, 1e-9)
    mfu = flops / seconds / (peak * processes)
    say(
        f"{tokens:,} tokens in {result.seconds:.1f} s: {tokens / seconds:,.0f} tokens/s; MFU {100 * mfu:.1f} % (6 N + "
        f"attention to visible keys, recomputation not counted; peak {peak / 1e12:.3g} TFLOP/s a device, {source})"
    )
    say(f"{report['spikes']} loss spikes, largest gradient norm {report['gradient_ratio'] or 0:.3g} x the median")
    return PretrainResult(
        run_dir=result.run_dir,
        weights=result.weights,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        steps=result.steps,
        tokens=tokens,
        refused=result.skipped,
        finished=result.finished,
        loss=result.metrics.get("loss"),
        bits_per_byte=result.metrics.get("eval/bits_per_byte"),
        tokens_per_second=tokens / seconds,
        mfu=mfu,
        peak_flops=peak * processes,
        spikes=report["spikes"],
        gradient_ratio=report["gradient_ratio"],
        seconds=result.seconds,
        cpu_seconds=result.cpu_seconds,
    )


def device_peak(device: str, precision: str) -> tuple[float, str]:
    """Peak FLOP/s of one device, and where the figure is from: a data sheet, else the best of some matrix products."""
    place = resolve_device(device)
    if place.type == "cuda":
        name = torch.cuda.get_device_name(place)
        for key, peak in PEAK_FLOPS.items():
            if key in name:
                return peak, "bf16, data sheet"
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    size, best = 512, math.inf
    matrix = torch.randn(size, size, device=place, dtype=dtype)
    for _ in range(10):
        start = time.perf_counter()
        (matrix @ matrix).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best, f"measured on a {size} x {size} matrix product"


def check_vocabulary(model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model's configuration with the tokenizer's end of documents.

    Raises:
        UserError: the tokenizer has ids that the model has no room for.
    """
    if tokenizer.size > model.vocabulary:
        raise UserError(
            f"the tokenizer has {tokenizer.size} ids and the model a vocabulary of {model.vocabulary}: give "
            f"--vocabulary {tokenizer.size}, or another tokenizer"
        )
    return replace(model, eod=tokenizer.eod)


def new_model(config: ModelConfig, seed: int) -> Decoder:
    """A decoder with drawn weights."""
    model = Decoder(config)
    initialise(model, seed)
    return model


def pretrain(
    recipe: Recipe,
    run_dir: Path | str,
    *,
    tokenizer: Path | str | None = None,
    validation: Sequence[Path | str] = (),
    cache: Path | str | None = None,
    layout: Layout | None = None,
    device: str = "auto",
    peak_flops: float | None = None,
) -> PretrainResult:
    """Pre-train a model; the same call again goes on with the run in `run_dir`.

    Args:
        recipe: model, training and data.
        run_dir: folder of the run; afterwards it is a model that `generate` and the others load.
        tokenizer: a `tokenizer.json` or a folder that holds one; None trains one on the texts, of the size of the
            model's vocabulary (the 256 bytes where that is 257).
        validation: texts to score, in bits per byte.
        cache: folder for the tokens of texts; by default in the run's folder.
        layout: see `train`.
        device: see `core.devices.resolve_device`.
        peak_flops: see `train`.

    Raises:
        UserError: see `train`; text that cannot be read or is shorter than one sequence, a tokenizer larger than the
            model's vocabulary, phases with gaps or without data.
    """
    run_dir, seed = Path(run_dir), recipe.train.seed
    timetable = Timetable(recipe.train.phases)
    if not recipe.data:
        raise UserError("no text to train on: give --text FILE")
    words = run_tokenizer(run_dir, [source.path for source in recipe.data], recipe.model.vocabulary, tokenizer)
    config = check_vocabulary(recipe.model, words)
    cache = run_dir / "tokens" if cache is None else Path(cache)
    phases = [phase_rows(recipe, number, timetable, words, cache) for number in range(len(timetable.phases))]
    scored = None
    if validation:
        shard = TextFiles(validation).shard(words, cache)
        scored = Validation(shard.tokens[:].tolist(), recipe.train.phases[0].length, words)
    for number, (phase, rows) in enumerate(zip(timetable.phases, phases, strict=True)):
        parts = rows.statistics(timetable.sequences_of_phase(number))
        mixture = ", ".join(f"{name} {part.share:.0%} ({part.epochs:.3g} epochs)" for name, part in parts.items())
        say(f"phase {phase.name}: {phase.end - phase.start:,.0f} tokens, rows of {phase.length}: {mixture}")
    data = [asdict(source) | {"path": Path(source.path).name} for source in recipe.data]
    return train(
        new_model(config, seed),
        PhasedSequences(timetable, phases),
        recipe.train,
        run_dir,
        validation=scored,
        recipe={"model": asdict(config), "train": asdict(recipe.train), "data": data, "tokenizer": words.digest},
        layout=layout,
        device=device,
        peak_flops=peak_flops,
    )


def phase_rows(recipe: Recipe, number: int, timetable: Timetable, words: Tokenizer, cache: Path) -> PackedTokens:
    """The rows of one phase.

    Raises:
        UserError: no source is for this phase, or one names a phase that is not there; see `PackedTokens`.
    """
    phase = timetable.phases[number]
    known = [phase.name for phase in timetable.phases]
    for source in recipe.data:
        for name in source.phases:
            if name not in known:
                raise UserError(f"data: {source.path} is for the phase {name!r}; {near(name, known)}")
    sources = [
        open_source(
            source.path,
            words,
            cache,
            weight=source.weight,
            quality=source.quality,
            by_difficulty=source.by_difficulty,
        )
        for source in recipe.data
        if not source.phases or phase.name in source.phases
    ]
    if not sources:
        raise UserError(f"data: no source is for the phase {phase.name!r}")
    return PackedTokens(
        sources,
        phase.length,
        recipe.train.seed + number,
        words.eod,
        vocabulary=recipe.model.vocabulary,
        rows=timetable.sequences_of_phase(number),
        reset=recipe.train.reset_at_documents,
    )


def run_tokenizer(run_dir: Path, texts: Sequence[str], size: int, source: Path | str | None) -> Tokenizer:
    """The tokenizer of a run: the one that is in its folder, `source`, or a new one; it is left in the folder.

    Raises:
        UserError: the run was started with another one.
    """
    if (run_dir / "tokenizer.json").is_file():
        own = Tokenizer.load(run_dir)
        if source is not None and Tokenizer.load(source).digest != own.digest:
            raise UserError(f"{run_dir} was started with another tokenizer than {source}: use another folder")
        return own
    if source is not None:
        words = Tokenizer.load(source)
    elif size == BYTES + 1:
        words = ByteTokenizer()
    else:
        lines = (line for piece in TextFiles(texts).pieces() for line in piece.splitlines(keepends=True))
        words = train_tokenizer({"text": lines}, size).tokenizer
    words.save(run_dir)
    return words
