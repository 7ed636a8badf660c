"""The verbs of the command line that search: layouts, and model shapes; `cli.py` lists all verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tenfold.core import console
from tenfold.core.console import UserError
from tenfold.planner.config import Plan
from tenfold.planner.verb_inputs import DEFAULT_HARDWARE, DEFAULT_MODEL, Precision, inputs, positive


def search(
    model: str = DEFAULT_MODEL,
    hardware: str = DEFAULT_HARDWARE,
    devices: int = 6144,
    gbs: int = 6144,
    seq: int = 8192,
    precision: Precision = "bf16",
    stack: str | None = None,
    memory_limit_gib: float | None = None,
    top: int = 10,
    simulate_best: int = 120,
    processes: int | None = None,
    backend: Literal["processes", "ray"] = "processes",
    rejected: Path | None = None,
    calibration: Path | None = None,
) -> object:
    """Find the fastest layouts that fit the memory, with a reason for every plan that is left out.

    Args:
        model: preset, YAML file of a shape, or a Hugging Face config.json.
        hardware: preset or YAML sheet.
        devices: devices of the cluster.
        gbs: sequences of a step.
        seq: tokens of a sequence.
        precision: dtype of matrix products.
        stack: software generation.
        memory_limit_gib: usable memory of a device.
        top: plans to show.
        simulate_best: plans to event-simulate after scoring.
        processes: worker processes; all usable cores by default.
        backend: where the simulations run.
        rejected: CSV file for every rejected plan with its reason and the smallest change that helps (at most 20000).
        calibration: calibration file.

    Returns:
        The best plans and the counts.

    Example:
        tenfold planner search --model llama3-70b --hardware h100 --devices 512 --gbs 1024 --seq 8192 --top 5
    """
    from tenfold.planner import answers, layout_search, scoring
    from tenfold.planner.coefficients import load_calibration

    positive(top=top, simulate_best=simulate_best, gbs=gbs, seq=seq, devices=devices, processes=processes)
    shape, cluster = inputs(model, hardware, devices)
    base = Plan(gbs=gbs, seq=seq, precision=precision, stack=stack or "auto")
    total = scoring.space_for(shape, cluster, base).size
    with console.progress("scoring", total) as bar:
        done = [0]

        def advance(count: int) -> None:
            bar.advance(count - done[0])
            done[0] = count

        found = layout_search.search(
            shape,
            cluster,
            base,
            top,
            simulate_best,
            None,
            load_calibration(calibration),
            memory_limit_gib,
            processes,
            backend,
            advance,
        )
    console.say(
        f"{found.candidates} plans scored in {found.score_seconds:.1f} s ({found.plans_per_second:.0f}/s), "
        f"{found.feasible} can run; "
        f"{found.simulated_from} simulated in {found.simulate_seconds:.1f} s"
    )
    rows = [
        (
            e.plan.describe(),
            f"{e.tokens_per_s_per_device:.1f}",
            f"{e.low:.0f}-{e.high:.0f}",
            f"{100 * e.mfu:.1f}%",
            f"{e.peak_memory_gib:.0f}",
            f"{100 * e.bubble:.1f}%",
        )
        for e in found.best
    ]
    console.table(["plan", "tokens/s/device", "80% interval", "MFU", "GiB", "bubble"], rows)
    if len(found.best) > 1:
        console.say(answers.explain(found.best[0], found.best[1]))
    for reason, count in found.reasons.items():
        console.say(f"  left out {count}: {reason}")
    if rejected is not None:
        from tenfold.core.files import write_bytes

        lines = ["plan,reason,smallest change"] + [
            f'"{r.plan.describe()}","{r.reason}","{r.change}"' for r in found.rejected(20000)
        ]
        write_bytes(rejected, ("\n".join(lines) + "\n").encode())
    return {
        "best": [e.summary() for e in found.best],
        "candidates": found.candidates,
        "feasible": found.feasible,
        "reasons": found.reasons,
        "score_seconds": found.score_seconds,
        "simulate_seconds": found.simulate_seconds,
        "plans_per_second": found.plans_per_second,
    }


def shape(
    model: str = DEFAULT_MODEL,
    hardware: str = DEFAULT_HARDWARE,
    devices: int = 6144,
    gbs: int = 6144,
    seq: int = 8192,
    precision: Precision = "bf16",
    hidden: tuple[int, ...] = (),
    layers: tuple[int, ...] = (),
    experts: tuple[int, ...] = (),
    topk: tuple[int, ...] = (),
    tolerance: float = 0.03,
    top: int = 10,
    processes: int | None = None,
) -> object:
    """Search model shapes with the total and active parameters of a model, each with its best layout.

    Args:
        model: the shape that fixes total and active parameters.
        hardware: preset or YAML sheet.
        devices: devices of the cluster.
        gbs: sequences of a step.
        seq: tokens of a sequence.
        precision: dtype of matrix products.
        hidden: widths to try; some around the model's by default.
        layers: depths to try.
        experts: expert counts to try.
        topk: experts per token to try.
        tolerance: relative deviation of the parameters that is allowed.
        top: shapes to show.
        processes: worker processes.

    Returns:
        The fastest shapes.

    Example:
        tenfold planner shape --layers 58 61 66 --hidden 7680 --experts 256 --topk 8 --top 3
    """
    from tenfold.planner import scoring, shape_search
    from tenfold.planner.shapes import flops_per_token

    positive(top=top, gbs=gbs, seq=seq, devices=devices, processes=processes)
    positive(
        **{
            f"{name}[{i}]": v
            for name, vs in (("hidden", hidden), ("layers", layers), ("experts", experts), ("topk", topk))
            for i, v in enumerate(vs)
        }
    )
    if not 0 < tolerance < 1:
        raise UserError(f"tolerance: found {tolerance}, expected a share between 0 and 1")
    base, cluster = inputs(model, hardware, devices)
    shapes = shape_search.shape_candidates(base, tolerance, hidden, layers, experts, topk)
    if not shapes:
        raise UserError(
            f"layers: no shape keeps the parameters of {base.name} within {tolerance:.0%}: raise --tolerance, "
            f"or try other widths and depths"
        )
    plan = Plan(gbs=gbs, seq=seq, precision=precision)
    found = shape_search.search_shapes(
        shapes, cluster, plan, top, scoring.narrow_space(base, cluster, plan), processes=processes
    )
    rows = [
        (
            c.model.name,
            f"{c.parameters / 1e9:.1f}",
            f"{c.active_parameters / 1e9:.1f}",
            f"{flops_per_token(c.model, seq) / 1e9:.0f}",
            f"{c.estimate.tokens_per_s_per_device:.1f}",
            f"{100 * c.estimate.mfu:.1f}%",
            c.estimate.plan.describe(),
        )
        for c in found
    ]
    console.table(["shape", "B params", "B active", "GF/token", "tokens/s/device", "MFU", "plan"], rows)
    return {"tried": len(shapes), "best": [{"shape": c.model, **c.estimate.summary()} for c in found]}
