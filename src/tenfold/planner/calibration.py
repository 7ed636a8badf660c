"""Coefficients: what each means, its prior, and how published rows move it.

The logarithm of every coefficient is a sum of terms: a base, and terms for the hardware's architecture, the stack's
family and release, the
precision, dense or MoE. No term knows a model's name or a row. Each term has a prior of zero with a width; the fit is a
regularised robust least squares (Student-t weights, Gauss-Newton with Levenberg damping) on log(predicted / reported
tokens per second).
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, fields
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from tenfold.core.console import UserError
from tenfold.core.files import write_json
from tenfold.planner.config import Cluster, Hardware, Model, Plan
from tenfold.planner.data import Row
from tenfold.planner.memory import inferred_recompute
from tenfold.planner.operators import (
    NATURAL_SPREAD,
    Coefficients,
    UnitSeconds,
    hardware_vector,
    plan_vector,
    unit_seconds,
)
from tenfold.planner.pipeline import Stage, partition, stage_times
from tenfold.planner.shapes import shape_vector, stacked
from tenfold.planner.simulation import makespan_slopes


@dataclass(frozen=True)
class Prior:
    """A coefficient before calibration.

    Attributes:
        value: starting value.
        width: standard deviation of the base term's logarithm (0: fixed).
        low, high: physical limits of the resolved value.
        tags: kinds of terms that may move it, each with the width of its logarithm.
        meaning: unit and source.
    """

    value: float
    width: float
    low: float
    high: float
    tags: dict[str, float] = field(default_factory=dict)
    meaning: str = ""


PRIORS: dict[str, Prior] = {
    "gemm_efficiency": Prior(0.68, 0.1, 0.2, 0.95, {"arch": 0.1}, "share of the dense peak of a large matrix product"),
    "fp8_gain": Prior(
        0.9,
        0.1,
        0.5,
        1.05,
        {"arch8": 0.1, "prec": 0.1},
        "fp8 products: share of the doubled peak that is reached besides gemm_efficiency",
    ),
    "gemm_rows": Prior(54, 0.5, 5, 1000, {"arch": 0.5}, "rows at which a product reaches half its speed"),
    "gemm_width": Prior(
        600, 0.4, 50, 3000, {"arch": 0.3}, "inner/outer width at which a product reaches half its speed"
    ),
    "expert_efficiency": Prior(
        0.9,
        0.15,
        0.3,
        1.1,
        {"arch": 0.1, "release": 0.1, "family": 0.05},
        "grouped product over a plain one of equal size",
    ),
    "attention_efficiency": Prior(
        0.75, 0.15, 0.08, 1.3, {"arch": 0.2, "family": 0.4}, "share of the bf16 peak of the attention core"
    ),
    "attention_ramp": Prior(
        700, 0.5, 10, 8000, {}, "sequence length at which the attention core reaches half its speed"
    ),
    "attention_width": Prior(
        64,
        0.3,
        5,
        300,
        {},
        "head width at which the attention core reaches half its speed (its softmax does not shrink with the width)",
    ),
    "attention_backward": Prior(
        3.0,
        0.05,
        2.0,
        4.0,
        {},
        "backward of the fused core over its forward: 2.5 times the FLOPs, at the lower rate seen in the H800 trace",
    ),
    "memory_efficiency": Prior(
        0.8, 0.05, 0.4, 0.95, {}, "share of the memory bandwidth that element-wise kernels reach"
    ),
    "layer_bytes": Prior(
        55,
        0.25,
        20,
        300,
        {"family": 0.25},
        "bytes per hidden element and token, all memory-bound work of a layer, both passes",
    ),
    "activation_bytes": Prior(5, 0.3, 1, 30, {}, "bytes per element of the feed-forward's inner tensors, both passes"),
    "routed_bytes": Prior(
        28,
        0.3,
        5,
        150,
        {"family": 0.2, "release": 0.2},
        "bytes per hidden element and routed copy: permute, unpermute, activation",
    ),
    "cast_bytes": Prior(
        20, 0.4, 2, 150, {"prec": 0.4, "family": 0.2}, "further bytes per hidden element and token of fp8 casts"
    ),
    "logit_bytes": Prior(20, 0.3, 4, 100, {}, "bytes per logit of the loss, both passes"),
    "score_bytes": Prior(13, 0.3, 4, 40, {}, "bytes per attention score and pass where attention is not fused"),
    "host_dense": Prior(
        0.56e-3, 0.3, 1e-5, 5e-3, {"family": 0.4, "release": 0.3}, "seconds: launch time of a dense layer, one pass"
    ),
    "host_moe": Prior(
        1.2e-3,
        0.3,
        1e-4,
        8e-3,
        {"family": 0.3, "release": 0.3, "age": 0.4, "domain": 0.3},
        "seconds: launch time of a MoE layer, one pass",
    ),
    "host_expert": Prior(
        1.5e-4,
        0.4,
        1e-6,
        1e-3,
        {"release": 0.2, "age": 0.3, "domain": 0.3},
        "seconds: launch time of one local expert's products and casts, one pass",
    ),
    "host_backward": Prior(1.7, 0.2, 1.0, 3.0, {}, "launch time of a backward pass over that of a forward"),
    "host_step": Prior(0.02, 0.5, 1e-3, 1.0, {"family": 0.5}, "seconds a step: data, logging, launch"),
    "exposed_tp": Prior(
        0.31, 0.3, 0.02, 1.0, {"family": 0.3, "arch": 0.2}, "share of tensor-parallel communication not hidden"
    ),
    "exposed_cp": Prior(0.15, 0.4, 0.02, 1.0, {"family": 0.4}, "share of ring-attention communication never hidden"),
    "exposed_ep": Prior(
        0.75,
        0.25,
        0.02,
        1.0,
        {"family": 0.3, "release": 0.2},
        "share of the expert all-to-all not hidden without pairing",
    ),
    "exposed_dp": Prior(
        0.35, 0.25, 0.02, 1.0, {"family": 0.15}, "share of gradient and parameter communication not hidden"
    ),
    "exposed_fsdp": Prior(
        0.1,
        0.5,
        0.005,
        1.0,
        {"family": 0.4},
        "share of sharded-parameter communication not hidden when compute is longer",
    ),
    "exposed_paired": Prior(
        0.25,
        0.3,
        0.01,
        1.0,
        {"family": 0.3},
        "share of the all-to-all that stays visible beside another micro-batch, with what its kernels take from "
        "compute",
    ),
    "link_intra": Prior(0.8, 0.15, 0.2, 0.98, {"domain": 0.2}, "share of the in-node link that collectives reach"),
    "link_inter": Prior(0.65, 0.2, 0.15, 0.98, {"arch": 0.15}, "share of the network that collectives reach"),
    "straggler": Prior(0.006, 0.6, 1e-4, 0.05, {"family": 0.5}, "slow-down per doubling of nodes"),
    "load_spread": Prior(
        NATURAL_SPREAD,
        0.2,
        0.02,
        1.5,
        {"family": 0.6},
        "standard deviation over mean of the loads of single experts under natural routing",
    ),
    "selective_share": Prior(
        0.06, 0.4, 0.0, 0.6, {"family": 0.5}, "share of a forward that selective recompute repeats (fused attention)"
    ),
    "fine_share": Prior(0.10, 0.4, 0.0, 0.6, {}, "share of a forward that fine-grained recompute repeats"),
    "unstated_share": Prior(
        0.06, 0.5, 0.0, 1.0, {"kind": 0.5}, "share of a forward that recipes repeat without saying so"
    ),
    "optimizer_bytes": Prior(40, 0.1, 10, 80, {}, "bytes per local parameter of an optimizer step"),
    "software": Prior(
        1.0,
        0.0,
        0.5,
        2.0,
        {"family": 0.08, "release": 0.06, "kindrelease": 0.06, "sheet": 0.05, "age": 0.1, "domain": 0.1},
        "slow-down of a whole layer by the software generation",
    ),
}

# Prior means of terms that are known before the fit, as logarithms. Attention kernels of 2023 (Triton) and of
# torchtitan's long contexts reach
# 0.20 of the peak where others reach 0.47; hosts of rack-scale systems launch faster, and their recipes use partial
# CUDA graphs.
OFFSETS: dict[tuple[str, str], float] = {
    ("attention_efficiency", "family:composer-fsdp"): -0.7,
    ("attention_efficiency", "family:torchtitan"): -0.6,
    # DeepSeek's kernel trace: grouped fp8 products at 0.51 of the fp8 peak, casts per 128 elements are 12.7% of the
    # busy time.
    ("expert_efficiency", "family:hai-llm"): 0.18,
    ("cast_bytes", "family:hai-llm"): 1.0,
    # 0.037 of the all-to-all is visible in DeepSeek's trace; MindSpeed states that a steady pair hides all of it.
    ("exposed_paired", "family:hai-llm"): -1.8,
    ("exposed_paired", "family:mindspeed"): -1.8,
    # Without pairing, Ascend's collectives run on the stream of the layer: the paper's baseline shows the whole
    # all-to-all.
    ("exposed_ep", "family:mindspeed"): 0.3,
    ("host_moe", "domain:moe:blackwell:rack"): -0.3,
    ("host_expert", "domain:moe:blackwell:rack"): -0.3,
}

NOISE = 0.06  # scale of a trustworthy row's logarithmic error

_RELEASE = re.compile(r"^(?P<family>.*?)-?(?P<year>20\d\d|\d\d)(?:[./-](?P<month>\d\d))?")


def stack_release(stack: str) -> tuple[str, float]:
    """Family and year of a stack's name: "megatron-bridge-25.11" -> ("megatron-bridge", 2025.83)."""
    match = _RELEASE.match(stack)
    if not match or not match["family"]:
        return stack or "other", 2024.5
    year = float(match["year"])
    year += 2000.0 if year < 100 else 0.0
    month = float(match["month"]) if match["month"] and 1 <= int(match["month"]) <= 12 else 6.0
    return match["family"].rstrip("-"), year + (month - 1) / 12


def default_stack(hardware: Hardware) -> str:
    """The stack that `auto` means on a kind of hardware."""
    return "mindspeed-2025" if hardware.architecture == "ascend" else "megatron-core-2025"


def attention_unfused(stack: str) -> bool:
    """Whether the stack's attention writes its scores to memory (Megatron before flash attention)."""
    family, year = stack_release(stack)
    return family == "megatron" and year < 2023


def tag_values(coefficient: str, hardware: Hardware, model: Model, plan: Plan) -> dict[str, float]:
    """Terms of one coefficient that apply to a run, with the factor each is multiplied by."""
    family, year = stack_release(plan.stack)
    kinds = PRIORS[coefficient].tags
    terms = {"base": 1.0}
    names = {
        "arch": f"arch:{hardware.architecture}",
        "sheet": f"sheet:{hardware.name}",
        "family": f"family:{family}",
        "release": f"release:{plan.stack}",
        "kind": f"kind:{model.family}",
        "domain": f"domain:{model.family}:{hardware.architecture}:{'rack' if hardware.per_node > 16 else 'node'}",
        "kindrelease": f"kindrelease:{model.family}:{plan.stack}",
    }
    for kind in kinds:
        if kind in names:
            terms[names[kind]] = 1.0
    if "arch8" in kinds and plan.precision.endswith("fp8"):
        terms[f"arch8:{hardware.architecture}"] = 1.0
    if "prec" in kinds and plan.precision.endswith("fp8"):
        terms[f"prec:{plan.precision}"] = 1.0
    # Years since the middle of 2025 in Megatron-Bridge, whose releases follow each other every few months.
    if "age" in kinds and family == "megatron-bridge":
        terms[f"age:{family}:{model.family}"] = min(max(year - 2025.75, -1.0), 1.2)
    return terms


@dataclass(frozen=True)
class Calibration:
    """Fitted terms.

    Attributes:
        terms: coefficient -> term -> value (logarithms; `base` relative to the prior's value).
        spread: log-standard-deviation-like half widths for the 80% interval, by situation (see `interval`).
        origin: the command and rows that made it.
    """

    terms: dict[str, dict[str, float]]
    spread: dict[str, float]
    origin: dict[str, Any] = field(default_factory=dict)

    def resolve(self, hardware: Hardware, model: Model, plan: Plan) -> Coefficients:
        """Coefficients of one run."""
        values = {}
        for name, prior in PRIORS.items():
            terms = self.terms.get(name, {})
            tags = tag_values(name, hardware, model, plan)
            shift = sum(terms.get(tag, OFFSETS.get((name, tag), 0.0)) * factor for tag, factor in tags.items())
            values[name] = min(max(prior.value * math.exp(shift), prior.low), prior.high)
        return Coefficients(**values)

    def interval(self, hardware: Hardware, model: Model, plan: Plan) -> float:
        """Half width of the 80% interval as a logarithm, wider for an architecture or a stack without rows."""
        family, _ = stack_release(plan.stack)
        width = self.spread.get(model.family, 0.2)
        if family not in self.origin.get("families", []):
            width = math.hypot(width, self.spread.get("new_family", 0.15))
        if hardware.architecture not in self.origin.get("architectures", []):
            width = math.hypot(width, self.spread.get("new_architecture", 0.2))
        return width

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        write_json(path, self)


def load_calibration(path: str | Path | None = None) -> Calibration:
    """The shipped calibration, or one from a file. Raises UserError for a broken file."""
    if path is None:
        return _shipped()
    from tenfold.core.files import read_json

    value = read_json(path)
    if not {"terms", "spread"} <= set(value):
        raise UserError(
            f"{path}: not a calibration (needs terms and spread); make one with `tenfold planner calibrate "
            f"rows.csv -o {path}`"
        )
    unknown = set(value["terms"]) - set(PRIORS)
    if unknown:
        raise UserError(f"{path}: unknown coefficient {sorted(unknown)[0]!r}; known: {', '.join(PRIORS)}")
    return Calibration(value["terms"], value["spread"], value.get("origin", {}))


@lru_cache(maxsize=1)
def _shipped() -> Calibration:
    path = resources.files("tenfold.planner").joinpath("assets", "calibration.json")
    if not path.is_file():
        return Calibration({}, {})
    value = json.loads(path.read_text(encoding="utf-8"))
    return Calibration(value["terms"], value["spread"], value["origin"])


# Fitting -------------------------------------------------------------------------------------------------------------

_BLOCKS = ("dense", "moe", "moe_pair", "head", "embed", "mtp")
_SCALARS = (*(f"{block}_{way}" for block in _BLOCKS for way in ("forward", "backward")), "send")


class _Table:
    """Rows laid out as arrays, with the pipeline's dependence on the building blocks linearised row by row."""

    def __init__(
        self, rows: list[Row], base: dict[str, dict[str, float]] | None = None, tightness: float = 1.0
    ) -> None:
        """Args: rows; terms to start from and to stay near (None: the priors); factor on the widths of the priors."""
        self.rows = rows
        self.shape = stacked([shape_vector(r.model) for r in rows])
        self.hardware = stacked([hardware_vector(r.hardware, r.plan.precision) for r in rows])
        plans = [plan_vector(r.plan, r.devices, attention_unfused(r.plan.stack)) for r in rows]
        self.inferred = [0.0] * len(rows)
        for index, (row, vector) in enumerate(zip(rows, plans, strict=True)):
            if row.plan.recompute == "unstated":
                self.inferred[index] = inferred_recompute(
                    row.model, Cluster(row.hardware, row.devices), row.plan, vector
                )
                vector.inferred = self.inferred[index]
        self.plan = stacked(plans)
        self.target = np.log(np.array([r.tokens_per_s for r in rows], dtype=float))
        self.tokens = np.array([r.plan.gbs * r.plan.seq / r.devices for r in rows], dtype=float)
        self.stages = [partition(r.model, r.plan) for r in rows]
        self.linear = np.zeros((len(rows), len(_SCALARS)))
        self.basis = [_basis(r, stages) for r, stages in zip(rows, self.stages, strict=True)]
        self.names: list[tuple[str, str]] = []
        columns: dict[tuple[str, str], np.ndarray] = {}
        for index, row in enumerate(rows):
            for name in PRIORS:
                for tag, factor in tag_values(name, row.hardware, row.model, row.plan).items():
                    columns.setdefault((name, tag), np.zeros(len(rows)))[index] = factor
        for key, column in columns.items():
            prior = PRIORS[key[0]]
            width = prior.width if key[1] == "base" else prior.tags[key[1].split(":")[0]]
            if width > 0:
                self.names.append(key)
                del column
        self.columns = {key: columns[key] for key in self.names}
        known = base or {}
        self.offset = np.array(
            [known.get(name, {}).get(tag, OFFSETS.get((name, tag), 0.0)) for name, tag in self.names]
        )
        self.width = np.array(
            [PRIORS[n].width if t == "base" else PRIORS[n].tags[t.split(":")[0]] for n, t in self.names]
        )
        self.width = self.width * tightness

    def coefficients(self, theta: np.ndarray) -> Coefficients:
        shift = {name: np.zeros(len(self.rows)) for name in PRIORS}
        for value, (name, tag) in zip(theta + self.offset, self.names, strict=True):
            shift[name] = shift[name] + value * self.columns[(name, tag)]
        return Coefficients(
            **{n: np.clip(PRIORS[n].value * np.exp(s), PRIORS[n].low, PRIORS[n].high) for n, s in shift.items()}
        )

    def units(self, theta: np.ndarray, nudged: tuple[str, ...] = ()) -> UnitSeconds:
        """Unit seconds of every row; with `nudged`, [coefficients, rows]: each line has one coefficient moved by 1e-4."""
        coefficients = self.coefficients(theta)
        for line, name in enumerate(nudged):
            prior = PRIORS[name]
            value = getattr(coefficients, name)
            lines = np.repeat(value[None], len(nudged), axis=0)
            lines[line] = np.clip(value * np.exp(1e-4), prior.low, prior.high)
            setattr(coefficients, name, lines)
        return unit_seconds(self.shape, self.hardware, self.plan, coefficients)

    def jacobian(self, theta: np.ndarray, current: np.ndarray) -> np.ndarray:
        """Derivative of `predict` [rows, terms]: a term moves its coefficient by its column, row by row."""
        names = tuple(sorted({name for name, _ in self.names}))
        slopes = dict(zip(names, (self.predict(theta, names) - current) / 1e-4, strict=True))
        return np.stack([slopes[name] * self.columns[(name, tag)] for name, tag in self.names], axis=1)

    def linearise(self, theta: np.ndarray) -> None:
        """Seconds of the pipeline per second of each block: the makespan is homogeneous and piecewise linear in the
        blocks."""
        u = self.units(theta)
        for index, row in enumerate(self.rows):
            scalars = {
                name: float(np.broadcast_to(getattr(u, name), len(self.rows))[index])
                for name in (f.name for f in fields(u))
                if name != "parts"
            }
            self.linear[index] = _row_slopes(row, self.stages[index], self.basis[index], scalars)

    def predict(self, theta: np.ndarray, nudged: tuple[str, ...] = ()) -> np.ndarray:
        """log tokens/s/device [rows]; with `nudged` [coefficients, rows]."""
        u = self.units(theta, nudged)
        seconds = sum(self.linear[:, i] * getattr(u, name) for i, name in enumerate(_SCALARS))
        return np.log(self.tokens / ((seconds + u.step) * u.factor))


def _basis(row: Row, stages: list[Stage]) -> np.ndarray:
    """Stage times per second of each block [scalars, columns of `StageTimes`, stages]: they are linear in the blocks."""
    zero = {field.name: 0.0 for field in fields(UnitSeconds) if field.name != "parts"}
    columns = []
    for name in _SCALARS:
        times = stage_times(stages, UnitSeconds(**{**zero, name: 1.0}, parts={}), row.plan)
        columns.append([times.forward, times.backward, times.weight, times.pair_forward, times.pair_backward])
    return np.array(columns, dtype=float)


def _row_slopes(row: Row, stages: list[Stage], basis: np.ndarray, scalars: dict[str, float]) -> np.ndarray:
    """Derivatives of a row's pipeline seconds by the seconds of each block [scalars]."""
    times = stage_times(stages, UnitSeconds(**scalars, parts={}), row.plan)
    count = row.plan.microbatches(row.devices) or 1
    pp, vpp = row.plan.pp, row.plan.vpp
    # Some rows give a batch that does not fill the last round; time grows by rounds, so they are measured in whole
    # ones.
    whole = count if vpp == 1 or count % pp == 0 else -(-count // pp) * pp
    schedule = row.plan.resolved_schedule()
    if schedule in ("adaptive", "dualpipe", "dualpipev") and whole < 2 * pp:
        schedule = "interleaved" if vpp > 1 else "1f1b"  # too few micro-batches to join any
    slopes = makespan_slopes(schedule, pp, vpp, whole, times)
    path = np.array([slopes.forward, slopes.backward, slopes.weight, slopes.pair_forward, slopes.pair_backward])
    answer = np.tensordot(basis, path, axes=2)
    answer[-1] += slopes.send
    return answer * count / whole


def usable(rows: list[Row]) -> list[Row]:
    """Rows that the metric counts: throughput reported, batch known."""
    return [row for row in rows if row.tokens_per_s and "gbs" not in row.assumed]


def _weights(rows: list[Row]) -> np.ndarray:
    """Rows of one cluster repeat nearly the same run: a cluster of n rows counts like sqrt(n)."""
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[row.cluster] = sizes.get(row.cluster, 0) + 1
    return np.array([sizes[row.cluster] ** -0.5 for row in rows])


def _solve(table: _Table, theta: np.ndarray, weight: np.ndarray, noise: np.ndarray, steps: int) -> np.ndarray:
    """Gauss-Newton with Levenberg damping on Student-t errors (4 degrees of freedom) and normal priors."""

    def cost(th: np.ndarray, predicted: np.ndarray) -> float:
        return float(
            (weight * 2.5 * np.log1p(((predicted - table.target) / noise) ** 2 / 4)).sum()
            + 0.5 * ((th / table.width) ** 2).sum()
        )

    damping = 1e-2
    current = table.predict(theta)
    for _ in range(steps):
        error = current - table.target
        scaled = weight * 5.0 / (4.0 + (error / noise) ** 2) / noise**2
        jacobian = table.jacobian(theta, current)
        normal = jacobian.T @ (scaled[:, None] * jacobian) + np.diag(1 / table.width**2)
        gradient = jacobian.T @ (scaled * error) + theta / table.width**2
        before = cost(theta, current)
        after = before
        for _ in range(6):
            trial = theta - np.linalg.solve(normal + damping * np.diag(np.diag(normal)), gradient)
            predicted = table.predict(trial)
            after = cost(trial, predicted)
            if after < before:
                theta, current, damping = trial, predicted, max(damping / 4, 1e-6)
                break
            damping *= 5
        if before - after < 1e-3:
            break
    return theta


def _noise(rows: list[Row]) -> np.ndarray:
    return np.array([2.0 if row.recalled else 1.0 for row in rows]) * NOISE


def _terms(table: _Table, theta: np.ndarray) -> dict[str, dict[str, float]]:
    terms: dict[str, dict[str, float]] = {}
    for value, (name, tag) in zip(theta + table.offset, table.names, strict=True):
        if abs(value) > 5e-4:
            terms.setdefault(name, {})[tag] = round(float(value), 4)
    return terms


def fit(
    rows: list[Row], outer: int = 3, inner: int = 10, base: dict[str, dict[str, float]] | None = None
) -> tuple[dict[str, dict[str, float]], np.ndarray]:
    """Fit the terms on rows.

    Args:
        rows: from `read_rows`; unusable ones are dropped.
        outer: times the pipeline is linearised anew.
        inner: Gauss-Newton steps in between.
        base: terms of another calibration to adapt: priors are centred on it at half their width, and rows are
            trusted to 2%.

    Returns:
        Terms, and log(predicted/reported) of the usable rows.
    """
    rows = usable(rows)
    table = _Table(rows, base, 0.5 if base else 1.0)
    noise = _noise(rows) * (0.02 / NOISE if base else 1.0)
    theta = np.zeros(len(table.names))
    for _ in range(outer):
        table.linearise(theta)
        theta = _solve(table, theta, _weights(rows), noise, inner)
    table.linearise(theta)
    terms = _terms(table, theta)
    if base:
        terms = {name: {**base.get(name, {}), **terms.get(name, {})} for name in {**base, **terms}}
    return terms, table.predict(theta) - table.target


def cross_validate(rows: list[Row], inner: int = 6, family: str = "") -> np.ndarray:
    """log(predicted/reported) of every usable row by a fit that never saw its cluster (same model and hardware).

    Every fold starts from the fit on all rows but with the left-out rows at weight zero; terms that only they support
    fall back to their prior.
    """
    rows = usable(rows)
    table = _Table(rows)
    theta = np.zeros(len(table.names))
    for _ in range(2):
        table.linearise(theta)
        theta = _solve(table, theta, _weights(rows), _noise(rows), 10)
    table.linearise(theta)
    support = np.stack([table.columns[key] != 0 for key in table.names])
    error = np.empty(len(rows))
    for cluster in sorted({row.cluster for row in rows}):
        out = np.array([row.cluster == cluster for row in rows])
        start = np.where((support & ~out).any(axis=1), theta, 0.0)
        fold = _solve(table, start, _weights(rows) * ~out, _noise(rows), inner)
        error[out] = (table.predict(fold) - table.target)[out]
    return error


def predict_rows(rows: list[Row], terms: dict[str, dict[str, float]]) -> np.ndarray:
    """log(predicted/reported) of usable rows under given terms (terms of unknown tags are left out)."""
    table = _Table(usable(rows))
    theta = (
        np.array([terms.get(name, {}).get(tag, OFFSETS.get((name, tag), 0.0)) for name, tag in table.names])
        - table.offset
    )
    table.linearise(theta)
    return table.predict(theta) - table.target
