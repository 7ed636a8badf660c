"""Coefficients: what each means, its prior, its limits, and how they come together for one run.

The logarithm of every coefficient is a sum of terms: a base, and terms for the hardware's architecture, the stack's
family and release, the precision, dense or MoE. No term knows a model's name or a row.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from tenfold.core.console import UserError
from tenfold.core.files import write_json
from tenfold.planner.config import Hardware, Model, Plan
from tenfold.planner.operators import NATURAL_SPREAD, Coefficients


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
