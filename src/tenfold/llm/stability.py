"""What tells a stable run from an unstable one: loss spikes, gradient norms, gains and activations by layer.

The same quantities as in the paper's Figs. 6, 9 and 10, with definitions where the paper has none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, pstdev
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.core.console import UserError, table, to_jsonable, warn
from tenfold.core.files import disk_error
from tenfold.core.training.guard import SPIKE_WINDOW, spike_bar
from tenfold.llm.model import Decoder, RMSNorm

FILE = "stability.jsonl"  # of a run's folder: one row for each look at the model

# --- Losses and gradients ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spike:
    """A stretch of adjacent steps whose loss stands out.

    Attributes:
        step: where it begins, counted from 1.
        steps: how many steps in a row stand out.
        height: highest loss in it above the running median at its beginning, in nats.
        recovery: steps from its beginning until the loss is back under the bar that it broke and stays there for 10
            steps; None where the run ends first.
    """

    step: int
    steps: int
    height: float
    recovery: int | None


CALM = 10  # steps under the bar after which a spike is over


def find_spikes(losses: Sequence[float], height: float = 0.2) -> list[Spike]:
    """The loss spikes of a run.

    Step t is a spike where loss_t is above the median of the 50 losses before it by more than max(height, 6 sigma),
    sigma being 1.4826 times their median absolute deviation; adjacent steps count once. In the first 50 steps the
    window is what there is; the first 16 are not judged. A loss that is not finite is a spike of infinite height.

    Args:
        losses: of every step, not smoothed, in nats.
        height: smallest height.
    """
    spikes: list[Spike] = []
    finite: list[float] = []
    before, base = False, 0.0
    for index, loss in enumerate(losses):
        bar = spike_bar(finite, height)
        out = not math.isfinite(loss) or (bar is not None and loss > bar)
        if out and before:
            last = spikes[-1]
            spikes[-1] = Spike(last.step, last.steps + 1, max(last.height, loss - base), last.recovery)
        elif out:
            base = median(finite[-SPIKE_WINDOW:]) if finite else 0.0
            spikes.append(Spike(index + 1, 1, loss - base, _recovery(losses, index, math.inf if bar is None else bar)))
        before = out
        if math.isfinite(loss):
            finite.append(loss)
    return spikes


def _recovery(losses: Sequence[float], start: int, bar: float) -> int | None:
    calm = 0
    for index in range(start, len(losses)):
        calm = calm + 1 if losses[index] <= bar else 0
        if calm == CALM:
            return index - CALM + 1 - start
    return None


@dataclass(frozen=True)
class GradientNorms:
    """How steady the gradient norms (before clipping) are after the warm-up.

    Attributes:
        median: of them.
        largest: of them.
        largest_step: where it was, counted from 1.
        spread: standard deviation of log10 of them.
    """

    median: float
    largest: float
    largest_step: int
    spread: float

    @property
    def ratio(self) -> float:
        """Largest over median."""
        return self.largest / self.median if self.median else math.inf


def gradient_norms(norms: Sequence[float], warmup: int = 20) -> GradientNorms | None:
    """Statistics of a run's gradient norms from step `warmup` on; None where no finite one is left."""
    after = [(norm, step) for step, norm in enumerate(norms, 1) if step > warmup and math.isfinite(norm) and norm > 0]
    if not after:
        return None
    largest, step = max(after, key=lambda pair: pair[0])
    values = [norm for norm, _ in after]
    return GradientNorms(median(values), largest, step, pstdev(math.log10(value) for value in values))


# --- Looks at the model -----------------------------------------------------------------------------------------------

GAINS = ("pre_attention_norm", "post_attention_norm", "pre_mlp_norm", "post_mlp_norm")
ACTIVATIONS = {"attention.o": "input of o", "mlp.down": "input of down", "": "output of the layer"}


def gains(model: Decoder) -> dict[str, dict[str, list[float]]]:
    """Mean and standard deviation over channels of each norm's gain, by kind and layer (Fig. 10)."""
    found: dict[str, dict[str, list[float]]] = {}
    for kind in GAINS:
        norms = [getattr(layer, kind, None) for layer in model.layers]
        values = [_whole(norm.weight.detach()).float() + norm.offset for norm in norms if isinstance(norm, RMSNorm)]
        if values:
            means, deviations = [v.mean() for v in values], [v.std(correction=0) for v in values]
            found[kind] = {"mean": torch.stack(means).tolist(), "std": torch.stack(deviations).tolist()}
    return found


@contextmanager
def watch(model: Decoder) -> Iterator[dict[str, dict[str, list[float]]]]:
    """Within the context, forward passes note the activations of each layer (Fig. 9).

    Yields:
        Kind -> `mean`, `std` and `top` (largest magnitude) by layer: of what goes into the projections o and down, and
        of the layers' outputs; of what goes into norms after sub-layers the mean square (`post_attention_norm`,
        `post_mlp_norm`), which should be well above the norm's epsilon. The last forward pass counts.
    """
    found: dict[str, dict[str, list[float]]] = {}
    handles = []

    def note(kind: str, layer: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            found.setdefault(kind, {}).setdefault(name, [math.nan] * len(model.layers))[layer] = value

    def input_hook(kind: str, layer: int) -> Callable[..., None]:
        return lambda _module, inputs, _output: note(kind, layer, _moments(inputs[0]))

    def output_hook(kind: str, layer: int) -> Callable[..., None]:
        return lambda _module, _inputs, output: note(kind, layer, _moments(output))

    def square_hook(kind: str, layer: int) -> Callable[..., None]:
        return lambda _module, inputs, _output: note(
            kind, layer, {"mean_square": inputs[0].detach().float().square().mean().item()}
        )

    for number, layer in enumerate(model.layers):
        for name, kind in ACTIVATIONS.items():
            module = layer.get_submodule(name)
            handles.append(module.register_forward_hook((input_hook if name else output_hook)(kind, number)))
        for kind in ("post_attention_norm", "post_mlp_norm"):
            module = getattr(layer, kind)
            if isinstance(module, RMSNorm):
                handles.append(module.register_forward_hook(square_hook(kind, number)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _moments(x: Tensor) -> dict[str, float]:
    x = x.detach().float()
    return {"mean": x.mean().item(), "std": x.std(correction=0).item(), "top": x.abs().max().item()}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def look(model: nn.Module, tokens: Tensor, step: int) -> dict[str, Any]:
    """One row of the stability file: gains of `model`, and its activations on `tokens` (B, T)."""
    decoder = model if isinstance(model, Decoder) else next(m for m in model.modules() if isinstance(m, Decoder))
    with watch(decoder) as activations:
        model(tokens.to(next(model.parameters()).device))
    return {"step": step, "gains": gains(decoder), "activations": activations}


def below_epsilon(model: Decoder, row: Mapping[str, Any]) -> list[tuple[int, str, float, float]]:
    """Norms after sub-layers whose input is too small for them to normalise.

    Returns:
        (layer, kind, mean square of the input, epsilon) where the epsilon is larger than the mean square.
    """
    found = []
    for kind in ("post_attention_norm", "post_mlp_norm"):
        for layer, value in enumerate(row["activations"].get(kind, {}).get("mean_square", [])):
            eps = getattr(model.layers[layer], kind).eps
            if value < eps and model.config.has_post_norms:
                found.append((layer, kind, value, eps))
    return found


def report_start(model: Decoder, tokens: Tensor, path: Path) -> None:
    """Say how large the inputs of norms after sub-layers are beside their epsilon, once in a run.

    Args:
        model: with its first weights.
        tokens: (B, T) to look at it with.
        path: the run's stability file, which gets the first row.
    """
    if path.exists():
        return
    row = look(model, tokens, 0)
    append_row(path, row)
    config = model.config
    if not config.has_post_norms:
        return
    squares = [row["activations"][kind]["mean_square"] for kind in ("post_attention_norm", "post_mlp_norm")]
    eps = config.post_norm_eps or config.norm_eps
    rows = [
        [layer, *(f"{values[layer]:.1e}{' < eps' if values[layer] < eps else ''}" for values in squares)]
        for layer in range(config.layers)
    ]
    table(["layer", "attention", "feed-forward"], rows, title=f"post-norm input mean square vs eps {eps:g}")
    small = below_epsilon(model, row)
    if small:
        warn(
            f"{len(small)} of {2 * config.layers} norms after sub-layers start with inputs below their epsilon {eps:g} "
            f"and do not normalise yet: set post_norm_eps to {min(s for _, _, s, _ in small) / 10:.0e} or less"
        )


# --- Files of a run ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunLog:
    """What a run's folder says of it.

    Attributes:
        steps: numbers of the steps, from 1.
        losses: of each step in nats a token; those of refused steps too.
        norms: gradient norm of each step, before clipping.
        rates: learning rate of each step.
        refused: steps that the guard refused.
        validation: step -> validated metrics.
        looks: rows of the stability file, in order of their steps.
    """

    steps: list[int]
    losses: list[float]
    norms: list[float]
    rates: list[float]
    refused: list[int]
    validation: dict[int, dict[str, float]]
    looks: list[dict[str, Any]]


def read_run(run_dir: Path | str) -> RunLog:
    """Read `metrics.jsonl` and the stability file of a run.

    Raises:
        UserError: the folder holds no run.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "metrics.jsonl").is_file():
        raise UserError(f"{run_dir}: holds no run (metrics.jsonl is not there)")
    log = RunLog([], [], [], [], [], {}, [])
    for row in read_rows(run_dir / "metrics.jsonl"):
        evaluated = {name[5:]: value for name, value in row.items() if name.startswith("eval/")}
        if evaluated:
            log.validation[row["step"]] = evaluated
        if "lr" not in row:
            continue
        refused = row.get("loss") is None
        prefix = "refused_" if refused else ""
        loss, norm = row.get(prefix + "loss"), row.get(prefix + "grad_norm")
        log.steps.append(row["step"])
        log.losses.append(math.nan if loss is None else loss)
        log.norms.append(math.nan if norm is None else norm)
        log.rates.append(row["lr"])
        if refused:
            log.refused.append(row["step"])
    # A run that was resumed writes the rows after its checkpoint once more: the last one of a step counts.
    by_step = {row["step"]: row for row in read_rows(run_dir / FILE)} if (run_dir / FILE).is_file() else {}
    log.looks.extend(by_step[step] for step in sorted(by_step))
    return log


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row to a JSON-lines file."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(to_jsonable(row)) + "\n")
    except OSError as error:
        raise disk_error(path, error) from error


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON-lines file; a torn last one is left out."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def summary(log: RunLog, warmup: int = 20, height: float = 0.2) -> dict[str, Any]:
    """Spikes and gradient norms of a run as plain values."""
    spikes = find_spikes(log.losses, height)
    norms = gradient_norms(log.norms, warmup)
    return {
        "steps": len(log.steps),
        "loss": log.losses[-1] if log.losses else None,
        "spikes": len(spikes),
        "largest_spike": max((spike.height for spike in spikes), default=0.0),
        "spike_list": spikes,
        "gradient_norm": norms,
        "gradient_ratio": norms.ratio if norms else None,
        "refused": log.refused,
        "validation": log.validation,
    }
