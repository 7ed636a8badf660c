"""The room's tab on the local web page: describe a plan, see its speed, its memory and its timeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tenfold.core.console import UserError
from tenfold.core.web import readable_errors
from tenfold.planner.config import DISPATCH, RECOMPUTE, SCHEDULES, Cluster, Hardware, Model, Plan
from tenfold.planner.data import hardware_names, model_names
from tenfold.planner.reproduce import DEVICES, PUBLISHED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A visitor waits, and a picture of more bars cannot be read.
_MAX_DRAWN = 64
_MAX_DEVICES = 1 << 17


def tab() -> None:
    """Build the tab, filled with the published plan of Pangu Ultra MoE; to be called inside a `gradio.Blocks`."""
    import gradio

    with gradio.Row():
        with gradio.Column(scale=1, min_width=280):
            model = gradio.Dropdown(model_names(), value="pangu-ultra-moe", label="Model")
            hardware = gradio.Dropdown(hardware_names(), value="Ascend-800T-A2", label="Hardware")
            devices = gradio.Number(DEVICES, label="Devices", precision=0)
            with gradio.Row():
                counts = [
                    gradio.Number(getattr(PUBLISHED, name), label=label, precision=0, min_width=90)
                    for name, label in _COUNTS.items()
                ]
            extend = gradio.Checkbox(PUBLISHED.tp_extend_ep, label="Whole experts on tensor ranks")
            schedule = gradio.Dropdown(["auto", *SCHEDULES], value=PUBLISHED.schedule, label="Schedule")
            recompute = gradio.Dropdown(list(RECOMPUTE), value=PUBLISHED.recompute, label="Recompute")
            swap = gradio.Checkbox(PUBLISHED.swap, label="Swap to the host")
            dispatch = gradio.Dropdown(list(DISPATCH), value=PUBLISHED.dispatch, label="Expert all-to-all")
            start = gradio.Button("Simulate", variant="primary")
        with gradio.Column(scale=3, min_width=300):
            summary = gradio.Markdown()
            timeline = gradio.Plot(label="Timeline")
            breakdown = gradio.Plot(label="Where a step's time goes")
            memory = gradio.Plot(label="Memory")
    inputs = [model, hardware, devices, extend, schedule, recompute, swap, dispatch, *counts]
    start.click(
        readable_errors(simulate_plan),
        inputs=inputs,
        outputs=[summary, timeline, breakdown, memory],
        api_name="planner",
    )


_COUNTS = {
    "tp": "TP",
    "pp": "PP",
    "vpp": "VPP",
    "cp": "CP",
    "ep": "EP",
    "mbs": "Micro-batch",
    "gbs": "Global batch",
    "seq": "Sequence",
}


def simulate_plan(
    model: str,
    hardware: str,
    devices: float | None,
    tp_extend_ep: bool,
    schedule: str,
    recompute: str,
    swap: bool,
    dispatch: str,
    *counts: float | None,
) -> tuple[str, Figure, Figure, Figure]:
    """Simulate what the page describes.

    Args:
        model, hardware: names of presets.
        devices: devices of the cluster.
        tp_extend_ep, schedule, recompute, swap, dispatch: as in `Plan`.
        counts: the whole numbers of `_COUNTS`, in order.

    Returns:
        A summary in Markdown, and pictures of the timeline, the step's time and the memory.

    Raises:
        UserError: a field that is empty, or a plan that cannot run.
    """
    from tenfold.planner import plots
    from tenfold.planner.predictor import simulate

    for label, value in (("Devices", devices), *zip(_COUNTS.values(), counts, strict=True)):
        if value is None:
            raise UserError(f"{label}: give a whole number.")
    if not 1 <= int(devices or 0) <= _MAX_DEVICES:
        raise UserError(f"Devices: found {devices:.0f}, expected 1 to {_MAX_DEVICES}.")
    numbers: dict[str, Any] = {name: int(value or 0) for name, value in zip(_COUNTS, counts, strict=True)}
    plan = Plan(
        **numbers,
        tp_extend_ep=tp_extend_ep,
        schedule=schedule,
        recompute=recompute,
        swap=swap,
        dispatch=dispatch,
    )
    e = simulate(Model.preset(model), Cluster(Hardware.preset(hardware), int(devices or 0)), plan)
    fits = "fits" if e.fits else "**does not fit**"
    summary = (
        f"**{e.tokens_per_s_per_device:.0f} tokens/s/device** (80% interval {e.low:.0f} to {e.high:.0f}), "
        f"step {e.step_seconds:.2f} s, MFU {100 * e.mfu:.1f}% ({e.mfu_convention}), bubble {100 * e.bubble:.1f}%, "
        f"memory {e.peak_memory_gib:.1f} GiB of {e.memory_limit_gib:.1f} GiB usable ({fits})"
    )
    shown = e.microbatches
    if shown > _MAX_DRAWN:
        shown = max(_MAX_DRAWN // e.plan.pp, 3) * e.plan.pp if e.plan.pp <= _MAX_DRAWN else e.microbatches
    bars = e.timeline(min(shown, e.microbatches))
    title = f"{e.plan.describe()}, {min(shown, e.microbatches)} of {e.microbatches} micro-batches"
    return (
        summary,
        plots.timeline_figure([(title, bars)]),
        plots.breakdown_figure([("step", e.breakdown)]),
        plots.memory_figure(e.memory, e.memory_limit_gib),
    )
