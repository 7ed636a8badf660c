"""The command line of the planner: one thin function per verb; those that search and those that read measurements have
files of their own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from tenfold.core import console
from tenfold.core.console import UserError
from tenfold.planner.config import Cluster
from tenfold.planner.measured_verbs import calibrate, import_hf, placement, profile, reproduce, validate
from tenfold.planner.search_verbs import search, shape
from tenfold.planner.verb_inputs import (
    DEFAULT_HARDWARE,
    DEFAULT_MODEL,
    Dispatch,
    Framework,
    Precision,
    Recompute,
    Schedule,
    estimate_of,
    given,
    inputs,
    plan_of,
    positive,
)

if TYPE_CHECKING:
    pass


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
        imbalance: fullest device over the mean load of experts; 1 forces balance, natural routing by default.
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
    estimate = estimate_of(config, model, hardware, devices, calibration, given(locals()))
    if not estimate.fits and not over_memory:
        from tenfold.planner.predictor import memory_error

        raise memory_error(estimate, Cluster(inputs(model, hardware, devices)[1].hardware, devices))
    from tenfold.planner.answers import show_estimate

    show_estimate(estimate)
    return estimate.summary()


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
    estimates = [estimate_of(path, model, hardware, devices, calibration, {}) for path in plans]
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

    estimate = estimate_of(config, model, hardware, devices, None, given(locals()))
    if microbatches is not None:
        from tenfold.planner.schedules import check_schedule

        positive(microbatches=microbatches)
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
    estimate = estimate_of(config, model, hardware, devices, None, given(locals()))
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

    shape_, cluster = inputs(model, hardware, devices)
    flags = launch_flags(framework, shape_, cluster, plan_of(config, given(locals())))
    console.say(" \\\n  ".join(flags))
    return {"framework": framework, "flags": flags}


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
