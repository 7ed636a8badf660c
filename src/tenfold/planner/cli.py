"""The command line of the planner: one thin function per verb."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from tenfold.core import console
from tenfold.core.console import UserError
from tenfold.planner.config import Cluster, Model, Plan

if TYPE_CHECKING:
    from tenfold.planner.predictor import Estimate

Schedule = Literal[
    "auto",
    "none",
    "gpipe",
    "1f1b",
    "interleaved",
    "zb-h1",
    "interleaved-zb",
    "zb-v",
    "dualpipe",
    "dualpipev",
    "adaptive",
]
Recompute = Literal["none", "selective", "fine-grained", "moe", "full"]
Dispatch = Literal["flat", "dedup", "hierarchical"]
Precision = Literal["bf16", "fp16", "fp8", "mxfp8"]
Framework = Literal["megatron", "mindspeed", "torchtitan"]

DEFAULT_MODEL, DEFAULT_HARDWARE = "pangu-ultra-moe", "ascend-800t-a2"


def _plan(config: Path | None, changed: dict[str, Any]) -> Plan:
    """The plan of a YAML file, or the default one, with the options that were given."""
    from tenfold.planner.data import load_plan

    given = {name: value for name, value in changed.items() if value is not None}
    if config is None:
        return Plan(**given)
    return load_plan(str(config)).replace(**given)


def _inputs(model: str, hardware: str, devices: int) -> tuple[Model, Cluster]:
    from tenfold.planner.data import load_hardware, load_model

    return load_model(model), Cluster(load_hardware(hardware), devices)


def _show(estimate: Estimate) -> None:
    e = estimate
    console.say(
        f"{e.model.name} ({e.parameters / 1e9:.1f}B, {e.active_parameters / 1e9:.1f}B active) on {e.devices} x "
        f"{e.hardware}"
    )
    console.say(
        f"  {e.plan.describe()}, {e.microbatches} micro-batches, seq {e.plan.seq}, {e.plan.precision}, stack "
        f"{e.plan.stack}"
    )
    console.say(
        f"  {e.tokens_per_s_per_device:.1f} tokens/s/device (80% interval {e.low:.1f} to {e.high:.1f}), "
        f"{e.tokens_per_s_per_device * e.devices / 1e6:.3f}M tokens/s"
    )
    console.say(
        f"  step {e.step_seconds:.3f} s, MFU {100 * e.mfu:.1f}% ({e.mfu_convention}), bubble {100 * e.bubble:.1f}%"
    )
    noop = e.plan.noop_slots or 0
    if noop:
        console.say(
            f"  {e.model.layers} layers in {e.model.layers + noop} slots: {noop} empty slots beside head and MTP"
        )
    console.say(
        f"  memory {e.peak_memory_gib:.1f} GiB of {e.memory_limit_gib:.1f} GiB usable "
        f"({'fits' if e.fits else 'does not fit'})"
    )
    rows = [(name, f"{seconds:.3f}", f"{100 * seconds / e.step_seconds:.1f}%") for name, seconds in e.breakdown.items()]
    console.table(["seconds of a step, mean over ranks", "s", "share"], rows)


def simulate(
    config: Path | None = None,
    model: str = DEFAULT_MODEL,
    hardware: str = DEFAULT_HARDWARE,
    devices: int = 6144,
    tp: int | None = None,
    cp: int | None = None,
    pp: int | None = None,
    vpp: int | None = None,
    ep: int | None = None,
    etp: int | None = None,
    tp_extend_ep: bool | None = None,
    mbs: int | None = None,
    gbs: int | None = None,
    seq: int | None = None,
    precision: Precision | None = None,
    schedule: Schedule | None = None,
    recompute: Recompute | None = None,
    swap: bool | None = None,
    dispatch: Dispatch | None = None,
    fsdp: int | None = None,
    imbalance: float | None = None,
    noop_slots: int | None = None,
    stack: str | None = None,
    memory_limit_gib: float | None = None,
    over_memory: bool = False,
    calibration: Path | None = None,
) -> object:
    """Predict step time, MFU, memory and bubble of one plan.

    Args:
        config: YAML or JSON file of plan fields; options given beside it win.
        model: preset, YAML file of a shape, or a Hugging Face config.json.
        hardware: preset or YAML sheet.
        devices: devices of the cluster.
        tp: tensor parallelism.
        cp: context parallelism.
        pp: pipeline stages.
        vpp: chunks per stage.
        ep: expert parallelism.
        etp: tensor parallelism inside an expert.
        tp_extend_ep: tensor ranks hold whole experts.
        mbs: sequences of a micro-batch.
        gbs: sequences of a step.
        seq: tokens of a sequence.
        precision: dtype of matrix products.
        schedule: pipeline schedule.
        recompute: what the backward computes again.
        swap: let items move to the host.
        dispatch: form of the expert all-to-all.
        fsdp: ZeRO stage.
        imbalance: fullest device over the mean load of experts; 1 is balanced.
        noop_slots: empty layer slots.
        stack: software generation, such as megatron-bridge-25.11.
        memory_limit_gib: usable memory of a device.
        over_memory: answer also where the plan does not fit.
        calibration: calibration file; the shipped one by default.

    Returns:
        The estimate.

    Example:
        tenfold planner simulate --tp 8 --pp 16 --vpp 2 --ep 4 --tp-extend-ep --mbs 2 --gbs 6144 --seq 8192
        --recompute fine-grained
    """
    estimate = _estimate(config, model, hardware, devices, calibration, _given(locals()))
    if not estimate.fits and not over_memory:
        from tenfold.planner.predictor import memory_error

        raise memory_error(estimate, Cluster(_inputs(model, hardware, devices)[1].hardware, devices))
    _show(estimate)
    return estimate.summary()


_PLAN_FIELDS = (
    *("tp", "cp", "pp", "vpp", "ep", "etp", "tp_extend_ep", "mbs", "gbs", "seq", "precision", "schedule", "recompute"),
    *("swap", "dispatch", "fsdp", "imbalance", "noop_slots", "stack", "memory_limit_gib"),
)


def _given(scope: dict[str, Any]) -> dict[str, Any]:
    """The plan's fields among a verb's arguments."""
    return {name: scope[name] for name in _PLAN_FIELDS if name in scope}


def _estimate(
    config: Path | None, model: str, hardware: str, devices: int, calibration: Path | None, changed: dict[str, Any]
) -> Estimate:
    from tenfold.planner.calibration import load_calibration
    from tenfold.planner.predictor import simulate as run

    shape, cluster = _inputs(model, hardware, devices)
    return run(shape, cluster, _plan(config, changed), load_calibration(calibration))


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
    from tenfold.planner import layout_search
    from tenfold.planner.calibration import load_calibration

    _positive(top=top, simulate_best=simulate_best, gbs=gbs, seq=seq, devices=devices, processes=processes)
    shape, cluster = _inputs(model, hardware, devices)
    base = Plan(gbs=gbs, seq=seq, precision=precision, stack=stack or "auto")
    total = layout_search.space_for(shape, cluster, base).size
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
        console.say(_explain(found.best[0], found.best[1]))
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


def _explain(first: Estimate, second: Estimate) -> str:
    """Why the first plan beats the second: the cause whose seconds differ most."""
    names = set(first.breakdown) | set(second.breakdown)
    gaps = {name: second.breakdown.get(name, 0.0) - first.breakdown.get(name, 0.0) for name in names}
    name, gap = max(gaps.items(), key=lambda pair: pair[1])
    return f"the first beats the second mostly by {name}: {gap:.2f} s less of a step"


def _positive(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and not 1 <= value <= 1 << 24:
            raise UserError(f"{name}: found {value}, expected 1 to {1 << 24}")


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
    from tenfold.planner import layout_search
    from tenfold.planner.shapes import flops_per_token

    _positive(top=top, gbs=gbs, seq=seq, devices=devices, processes=processes)
    _positive(
        **{
            f"{name}[{i}]": v
            for name, vs in (("hidden", hidden), ("layers", layers), ("experts", experts), ("topk", topk))
            for i, v in enumerate(vs)
        }
    )
    if not 0 < tolerance < 1:
        raise UserError(f"tolerance: found {tolerance}, expected a share between 0 and 1")
    base, cluster = _inputs(model, hardware, devices)
    shapes = layout_search.shape_candidates(base, tolerance, hidden, layers, experts, topk)
    if not shapes:
        raise UserError(
            f"layers: no shape keeps the parameters of {base.name} within {tolerance:.0%}: raise --tolerance, "
            f"or try other widths and depths"
        )
    plan = Plan(gbs=gbs, seq=seq, precision=precision)
    found = layout_search.search_shapes(
        shapes, cluster, plan, top, layout_search.narrow_space(base, cluster, plan), processes=processes
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


def compare(
    plans: Positional[tuple[Path, ...]],
    model: str = DEFAULT_MODEL,
    hardware: str = DEFAULT_HARDWARE,
    devices: int = 6144,
    calibration: Path | None = None,
) -> object:
    """Simulate several plans side by side.

    Args:
        plans: YAML or JSON files of plan fields.
        model: preset or file.
        hardware: preset or file.
        devices: devices of the cluster.
        calibration: calibration file.

    Returns:
        One estimate per plan.

    Example:
        tenfold planner compare baseline.yaml optimised.yaml --devices 6144
    """
    estimates = [_estimate(path, model, hardware, devices, calibration, {}) for path in plans]
    if not estimates:
        raise UserError("plans: name at least one YAML or JSON file of plan fields")
    first = estimates[0].tokens_per_s_per_device
    rows = [
        (
            path.stem,
            e.plan.describe(),
            f"{e.tokens_per_s_per_device:.1f}",
            f"{e.tokens_per_s_per_device / first:.2f}x",
            f"{100 * e.mfu:.1f}%",
            f"{e.peak_memory_gib:.0f}",
        )
        for path, e in zip(plans, estimates, strict=True)
    ]
    console.table(["file", "plan", "tokens/s/device", "against first", "MFU", "GiB"], rows)
    return [e.summary() for e in estimates]


def trace(
    output: Path,
    config: Path | None = None,
    model: str = DEFAULT_MODEL,
    hardware: str = DEFAULT_HARDWARE,
    devices: int = 6144,
    microbatches: int | None = None,
    tp: int | None = None,
    pp: int | None = None,
    vpp: int | None = None,
    ep: int | None = None,
    tp_extend_ep: bool | None = None,
    mbs: int | None = None,
    gbs: int | None = None,
    seq: int | None = None,
    schedule: Schedule | None = None,
    recompute: Recompute | None = None,
    stack: str | None = None,
) -> object:
    """Write the timeline of a step: .json (Chrome), .pftrace (Perfetto), .png, .svg, or a report as .html.

    Args:
        output: file to write; its suffix chooses the form.
        config: YAML or JSON file of plan fields.
        model: preset or file.
        hardware: preset or file.
        devices: devices of the cluster.
        microbatches: draw only so many micro-batches.
        tp: tensor parallelism.
        pp: pipeline stages.
        vpp: chunks per stage.
        ep: expert parallelism.
        tp_extend_ep: tensor ranks hold whole experts.
        mbs: sequences of a micro-batch.
        gbs: sequences of a step.
        seq: tokens of a sequence.
        schedule: pipeline schedule.
        recompute: what the backward computes again.
        stack: software generation.

    Returns:
        What was written, and the check of the trace.

    Example:
        tenfold planner trace --output step.json --model llama3-8b --hardware h100 --devices 16 --pp 4 --gbs 32 --seq
        8192
    """
    from tenfold.planner import simulation
    from tenfold.planner import trace as traces

    estimate = _estimate(config, model, hardware, devices, None, _given(locals()))
    if microbatches is not None:
        from tenfold.planner.schedules import check_schedule

        _positive(microbatches=microbatches)
        check_schedule(estimate.plan.schedule, estimate.plan.pp, estimate.plan.vpp, microbatches)
    bars = estimate.timeline(microbatches)
    check = traces.check_chrome_trace(traces.chrome_trace(bars))
    if output.suffix in (".png", ".svg"):
        from tenfold.planner import plots

        plots.save_figure(plots.timeline_figure([(estimate.plan.describe(), bars)]), str(output))
    elif output.suffix == ".html":
        from tenfold.core.files import write_bytes
        from tenfold.core.report import render_page
        from tenfold.planner.tour import report_station

        write_bytes(output, render_page("Training plan", [report_station(estimate, microbatches)]).encode())
    else:
        traces.write_trace(output, bars, f"{estimate.model.name} {estimate.plan.describe()}")
    count = microbatches or estimate.microbatches
    busy = simulation.busy_seconds(estimate.plan.schedule, estimate.plan.pp, estimate.plan.vpp, count, estimate.times)
    console.say(
        f"{output}: {check.slices} bars on {check.tracks} ranks, {check.overlaps} overlaps, rank 0 busy {busy[0]:.3f} s"
    )
    return {
        "path": output,
        "slices": check.slices,
        "tracks": check.tracks,
        "overlaps": check.overlaps,
        "busy_seconds": busy,
    }


def memory(
    config: Path | None = None,
    model: str = DEFAULT_MODEL,
    hardware: str = DEFAULT_HARDWARE,
    devices: int = 6144,
    output: Path | None = None,
    tp: int | None = None,
    cp: int | None = None,
    pp: int | None = None,
    vpp: int | None = None,
    ep: int | None = None,
    tp_extend_ep: bool | None = None,
    mbs: int | None = None,
    gbs: int | None = None,
    seq: int | None = None,
    schedule: Schedule | None = None,
    recompute: Recompute | None = None,
    swap: bool | None = None,
    fsdp: int | None = None,
    memory_limit_gib: float | None = None,
) -> object:
    """Itemise the memory of every pipeline rank, with what is recomputed or swapped to fit.

    Args:
        config: YAML or JSON file of plan fields.
        model: preset or file.
        hardware: preset or file.
        devices: devices of the cluster.
        output: picture to write (.png or .svg).
        tp: tensor parallelism.
        cp: context parallelism.
        pp: pipeline stages.
        vpp: chunks per stage.
        ep: expert parallelism.
        tp_extend_ep: tensor ranks hold whole experts.
        mbs: sequences of a micro-batch.
        gbs: sequences of a step.
        seq: tokens of a sequence.
        schedule: pipeline schedule.
        recompute: what the backward computes again; fine-grained lets the knapsack choose.
        swap: let items move to the host.
        fsdp: ZeRO stage.
        memory_limit_gib: usable memory of a device.

    Returns:
        Memory of every rank.

    Example:
        tenfold planner memory --tp 8 --pp 16 --vpp 2 --ep 4 --tp-extend-ep --mbs 2 --gbs 6144 --seq 8192 --recompute
        fine-grained
    """
    estimate = _estimate(config, model, hardware, devices, None, _given(locals()))
    names = list(estimate.memory[0].items())
    rows = [
        (
            rank.rank,
            *(f"{rank.items()[name]:.1f}" for name in names),
            f"{rank.total:.1f}",
            rank.in_flight,
            f"{rank.saved:.1f}",
            ", ".join(
                f"{item} x{count}"
                for item, count in {**rank.recomputed, **{f"swap {k}": v for k, v in rank.swapped.items()}}.items()
            ),
        )
        for rank in estimate.memory
    ]
    console.table(["rank", *names, "total GiB", "in flight", "saved", "recomputed or swapped"], rows)
    console.say(f"usable {estimate.memory_limit_gib:.1f} GiB: {'fits' if estimate.fits else 'does not fit'}")
    if output is not None:
        from tenfold.planner import plots

        plots.save_figure(plots.memory_figure(estimate.memory, estimate.memory_limit_gib), str(output))
    return {
        "memory": estimate.memory,
        "limit_gib": estimate.memory_limit_gib,
        "fits": estimate.fits,
        "totals": [m.total for m in estimate.memory],
    }


def calibrate(
    rows: Positional[Path],
    output: Path = Path("calibration.json"),
    cross_validation: bool = False,
    base: Path | None = None,
) -> object:
    """Fit the coefficients to published or own throughput rows.

    Args:
        rows: CSV with the columns of the validation table (model, hardware, devices, tp, pp, ...,
            tokens_per_s_per_device).
        output: calibration file to write.
        cross_validation: also leave every (model, hardware) cluster out in turn; sets the intervals by it (some
            minutes).
        base: calibration to adapt to the rows instead of starting from the priors; `shipped` names the built-in one.

    Returns:
        Errors after the fit.

    Example:
        tenfold planner calibrate validation_public.csv --output calibration.json
    """
    from tenfold.planner import evaluation
    from tenfold.planner.calibration import load_calibration

    start = None if base is None else load_calibration(None if str(base) == "shipped" else base)
    calibration, report = evaluation.calibrate(rows, cross_validation, start)
    calibration.save(output)
    _show_validation(report)
    console.say(f"wrote {output}")
    return report


def _show_validation(report: dict[str, Any]) -> None:
    rows = [
        (
            name,
            g["rows"],
            f"{100 * g['median']:.1f}%",
            f"{100 * g['mean']:.1f}%",
            f"{100 * g['p90']:.1f}%",
            f"{100 * g['bias']:+.1f}%",
            f"{100 * g['covered']:.0f}%",
        )
        for name, g in report["groups"].items()
    ]
    console.table(["rows", "n", "median |e|", "mean |e|", "p90 |e|", "bias", "in 80% interval"], rows)
    if report.get("kendall_tau") is not None:
        console.say(f"ranking inside clusters: Kendall tau {report['kendall_tau']:.2f}")
    if report.get("cross_validation"):
        c = report["cross_validation"]
        console.say(f"leave-one-cluster-out: median {100 * c['median']:.1f}%, p90 {100 * c['p90']:.1f}%")


def validate(rows: Positional[Path], calibration: Path | None = None, worst: int = 10) -> object:
    """Compare predictions with throughput rows: error by family and stack, bias, coverage of the 80% intervals.

    Args:
        rows: CSV with the columns of the validation table.
        calibration: calibration file; the shipped one by default.
        worst: rows to list, worst first.

    Returns:
        Errors by group and by row.

    Example:
        tenfold planner validate validation_public.csv
    """
    from tenfold.planner import evaluation
    from tenfold.planner.calibration import load_calibration

    report = evaluation.validate(rows, load_calibration(calibration))
    _show_validation(report)
    ordered = sorted(report["rows"], key=lambda row: -abs(row["error"]))
    lines = [
        (
            r["id"],
            f"{r['reported']:.1f}",
            f"{r['predicted']:.1f}",
            f"{r['low']:.1f}-{r['high']:.1f}",
            f"{100 * r['error']:+.1f}%",
        )
        for r in ordered[: max(0, worst)]
    ]
    console.table(["worst rows", "reported", "predicted tokens/s/device", "80% interval", "error"], lines)
    return report


def placement(
    loads: Positional[Path],
    devices: int = 8,
    key: str = "loads",
    decay: float = 0.9,
    period: int = 50,
    threshold: float = 0.08,
    replicas: int | None = None,
    groups: int = 1,
    nodes: int = 1,
) -> object:
    """Plan where experts live from recorded loads: greedy with a moving average, or with replicas.

    Args:
        loads: .npy or .npz of tokens: [steps, layers, experts], [steps, layers, ranks, experts], [layers, experts] or
            [experts].
        devices: devices that share the experts of a layer.
        key: array of an .npz.
        decay: weight of the past in the moving average.
        period: steps between checks.
        threshold: smallest fall of the coefficient of variation that is worth moving.
        replicas: slots in all; replicates hot experts instead of moving (uses the mean load).
        groups: expert groups of the router (replication).
        nodes: nodes of the expert-parallel group (replication).

    Returns:
        Balance before and after, and the placement.

    Example:
        tenfold planner placement tinymoe_loads_ep.npz --devices 8
    """
    from tenfold.planner import evaluation

    _positive(devices=devices, period=period, groups=groups, nodes=nodes, replicas=replicas)
    report = evaluation.plan_placement(loads, key, devices, decay, period, threshold, replicas, groups, nodes)
    console.say(
        f"fullest device over the mean: {report['before']:.3f} -> {report['after']:.3f}; {report['migrations']} "
        f"layer migrations"
    )
    return report


def profile(
    output: Path = Path("profile.yaml"),
    device: Literal["auto", "cpu", "cuda", "mps", "npu"] = "auto",
    seconds: float = 5.0,
) -> object:
    """Measure matrix products, attention and memory of the present device and write a hardware sheet.

    Args:
        output: YAML sheet to write, for --hardware.
        device: device to measure.
        seconds: time to spend, about.

    Returns:
        The measured sheet and the efficiency of every operator.

    Example:
        tenfold planner profile --device cpu --seconds 2 --output here.yaml
    """
    from tenfold.planner import profiling

    if not 0.1 <= seconds <= 3600:
        raise UserError(f"seconds: found {seconds}, expected 0.1 to 3600")
    report = profiling.profile(device, seconds)
    profiling.write_sheet(output, report)
    console.table(
        ["operator", "size", "achieved", "unit"],
        [(o.name, o.size, f"{o.achieved:.3g}", o.unit) for o in report.operators],
    )
    console.say(f"wrote {output}: tenfold planner simulate --hardware {output}")
    return report


def import_hf(config: Positional[Path], output: Path | None = None, seq: int = 4096) -> object:
    """Read a Hugging Face config.json: shape, parameters, FLOPs per token.

    Args:
        config: config.json of a model.
        output: YAML file of the shape to write, for --model.
        seq: sequence length for the FLOPs.

    Returns:
        The shape with its counts.

    Example:
        tenfold planner import-hf config.json --output shape.yaml
    """
    from tenfold.planner.data import load_model
    from tenfold.planner.shapes import flops_per_token, parameters

    _positive(seq=seq)
    model = load_model(str(config))
    total, active = parameters(model), parameters(model, active=True)
    causal, full = flops_per_token(model, seq), flops_per_token(model, seq, "noncausal")
    console.say(f"{model.name}: {total / 1e9:.3f}B parameters, {active / 1e9:.3f}B active")
    console.say(
        f"FLOPs per token at {seq}: {causal / 1e9:.2f} GF causal, {full / 1e9:.2f} GF non-causal (forward and backward)"
    )
    if output is not None:
        from tenfold.core.config import save_yaml

        save_yaml(output, model)
        console.say(f"wrote {output}")
    return {
        "model": model,
        "parameters": total,
        "active_parameters": active,
        "flops_per_token": causal,
        "flops_per_token_noncausal": full,
    }


def export(
    framework: Positional[Framework],
    config: Path | None = None,
    model: str = DEFAULT_MODEL,
    hardware: str = DEFAULT_HARDWARE,
    devices: int = 6144,
    tp: int | None = None,
    cp: int | None = None,
    pp: int | None = None,
    vpp: int | None = None,
    ep: int | None = None,
    etp: int | None = None,
    tp_extend_ep: bool | None = None,
    mbs: int | None = None,
    gbs: int | None = None,
    seq: int | None = None,
    precision: Precision | None = None,
    schedule: Schedule | None = None,
    recompute: Recompute | None = None,
    swap: bool | None = None,
    dispatch: Dispatch | None = None,
    fsdp: int | None = None,
    noop_slots: int | None = None,
) -> object:
    """Print the launch flags of a plan for a training framework.

    Args:
        framework: whose flags.
        config: YAML or JSON file of plan fields.
        model: preset or file.
        hardware: preset or file.
        devices: devices of the cluster.
        tp: tensor parallelism.
        cp: context parallelism.
        pp: pipeline stages.
        vpp: chunks per stage.
        ep: expert parallelism.
        etp: tensor parallelism inside an expert.
        tp_extend_ep: tensor ranks hold whole experts.
        mbs: sequences of a micro-batch.
        gbs: sequences of a step.
        seq: tokens of a sequence.
        precision: dtype of matrix products.
        schedule: pipeline schedule.
        recompute: what the backward computes again.
        swap: let items move to the host.
        dispatch: form of the expert all-to-all.
        fsdp: ZeRO stage.
        noop_slots: empty layer slots.

    Returns:
        The flags.

    Example:
        tenfold planner export megatron --model llama3-70b --hardware h100 --devices 64 --tp 8 --pp 4 --vpp 5 --gbs
        128 --seq 8192
    """
    from tenfold.planner.export import launch_flags

    shape_, cluster = _inputs(model, hardware, devices)
    flags = launch_flags(framework, shape_, cluster, _plan(config, _given(locals())))
    console.say(" \\\n  ".join(flags))
    return {"framework": framework, "flags": flags}


def reproduce(output: Path = Path("results/reproduce/planner.json"), rows: Path | None = None) -> object:
    """Predict the published Pangu Ultra MoE runs, the 61 + 3 slot choice and the search, beside the paper's figures.

    Args:
        output: result file to write.
        rows: validation CSV; with it the file also holds the error on published rows.

    Returns:
        The result.

    Example:
        tenfold planner reproduce --output planner.json
    """
    from tenfold.planner.reproduce import run

    return run(output, rows)


VERBS = {
    "simulate": simulate,
    "search": search,
    "shape": shape,
    "compare": compare,
    "trace": trace,
    "memory": memory,
    "calibrate": calibrate,
    "validate": validate,
    "placement": placement,
    "profile": profile,
    "import-hf": import_hf,
    "export": export,
    "reproduce": reproduce,
}
