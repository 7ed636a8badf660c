"""The verbs of the command line that read measurements or other people's files; `cli.py` lists all verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from tenfold.core import console
from tenfold.core.console import UserError
from tenfold.planner.verb_inputs import positive


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
    from tenfold.planner import answers, evaluation
    from tenfold.planner.coefficients import load_calibration

    start = None if base is None else load_calibration(None if str(base) == "shipped" else base)
    calibration, report = evaluation.calibrate(rows, cross_validation, start)
    calibration.save(output)
    answers.show_validation(report)
    console.say(f"wrote {output}")
    return report


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
    from tenfold.planner import answers, evaluation
    from tenfold.planner.coefficients import load_calibration

    report = evaluation.validate(rows, load_calibration(calibration))
    answers.show_validation(report)
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

    positive(devices=devices, period=period, groups=groups, nodes=nodes, replicas=replicas)
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

    positive(seq=seq)
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
