"""Pre-training on core's loop: phases, next-token loss, validation, and what a run prints of itself."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.core.config import near
from tenfold.core.console import UserError, say
from tenfold.core.devices import resolve_device
from tenfold.core.training import FitConfig, FitResult, Schedule, fit
from tenfold.core.training.data import Batches
from tenfold.llm import parallel, scale, stability
from tenfold.llm.checkpoint import native_metadata
from tenfold.llm.config import Layout, ModelConfig, Recipe, TrainConfig
from tenfold.llm.data import PackedTokens, TextFiles, open_source
from tenfold.llm.kernels import cross_entropy
from tenfold.llm.model import Decoder, groups_for_decay, initialise
from tenfold.llm.phases import Timetable
from tenfold.llm.tokenizer import BYTES, ByteTokenizer, Tokenizer
from tenfold.llm.tokenizer import train as train_tokenizer
from tenfold.llm.windows import Validation

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
    return cross_entropy(logits, batch["targets"]), {}


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
        stability.report_start(model, first_tokens, looks)

    def evaluate(network: nn.Module, step: int) -> dict[str, float]:
        row = stability.look(network, first_tokens, step)
        if main:
            stability.append_row(looks, row)
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
    ratio = report["gradient_ratio"]
    norms = "" if ratio is None else f", largest gradient norm {ratio:.3g} x the median"
    say(f"{report['spikes']} loss spikes{norms}")
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
    cache = run_dir / "tokens" if cache is None else Path(cache)
    with parallel.first_process_first(str(resolve_device(device))):
        # The first process trains the tokenizer and splits the texts; the others then find both on the disk.
        words = run_tokenizer(run_dir, [source.path for source in recipe.data], recipe.model.vocabulary, tokenizer)
        config = check_vocabulary(recipe.model, words)
        phases = [phase_rows(recipe, number, timetable, words, cache) for number in range(len(timetable.phases))]
        shard = TextFiles(validation).shard(words, cache) if validation else None
    scored = Validation(shard.tokens[:].tolist(), recipe.train.phases[0].length, words) if shard else None
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
    """The tokenizer of a run: the one that it began with, `source`, or a new one; it is left in the folder.

    Raises:
        UserError: the run was started with another one.
    """
    # What a command left that was refused before its first checkpoint binds nobody; processes beside the first one take
    # what that has just written.
    begun = any((run_dir / "checkpoints").glob("step-*")) or os.environ.get("RANK", "0") != "0"
    if begun and (run_dir / "tokenizer.json").is_file():
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
