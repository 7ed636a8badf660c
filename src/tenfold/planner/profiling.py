"""Measure operators of the present device: the only file of the room that uses torch, and only inside `profile`."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenfold.core.files import write_bytes


@dataclass(frozen=True)
class Operator:
    """One measured operator: its name, its size in words, what it achieved and the unit."""

    name: str
    size: str
    achieved: float
    unit: str


@dataclass(frozen=True)
class Profile:
    """What was measured: device name, dtype of the products, memory in GiB, peak TFLOP/s and TB/s seen, and every
    operator."""

    device: str
    dtype: str
    memory_gib: float
    tflops: float
    bandwidth_tbs: float
    operators: tuple[Operator, ...]


def _best_seconds(run: Callable[[], Any], wait: Callable[[], None], budget: float) -> float:
    """Shortest time of a call within a budget of seconds, after one call to warm up."""
    run()
    wait()
    best = float("inf")
    stop = time.perf_counter() + budget
    while True:
        start = time.perf_counter()
        run()
        wait()
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() >= stop:
            return best


def profile(device: str, seconds: float) -> Profile:
    """Measure matrix products (three shapes), the attention core and a copy.

    Args:
        device: auto, cpu, cuda, mps or npu.
        seconds: budget over all operators.
    """
    import torch

    from tenfold.core.devices import memory_bytes, resolve_device

    target = resolve_device(device)
    # bf16 products on CPUs run through slow paths; fp32 is what a CPU is for.
    dtype = torch.float32 if target.type == "cpu" else torch.bfloat16
    large = 1024 if target.type == "cpu" else 8192

    def wait() -> None:
        if target.type == "cuda":
            torch.cuda.synchronize()
        elif target.type == "mps":
            torch.mps.synchronize()

    measured: list[Operator] = []
    share = seconds / 5
    rates = []
    with torch.no_grad():
        for rows, inner, outer in ((large, large, large), (large // 8, large, large), (large, large // 8, large)):
            a, b = (torch.randn(shape, device=target, dtype=dtype) for shape in ((rows, inner), (inner, outer)))
            taken = _best_seconds(functools.partial(torch.matmul, a, b), wait, share)
            rates.append(2 * rows * inner * outer / taken / 1e12)
            measured.append(Operator("matrix product", f"{rows}x{inner}x{outer}", rates[-1], "TFLOP/s"))
        heads, length, width = 8, large // 4, 64
        q = torch.randn((1, heads, length, width), device=target, dtype=dtype)
        taken = _best_seconds(
            lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True), wait, share
        )
        measured.append(
            Operator(
                "causal attention",
                f"{heads} heads x {length} x {width}",
                2 * heads * length * length * width / taken / 1e12,
                "TFLOP/s",
            )
        )
        block = torch.empty(large * large, device=target, dtype=dtype)
        other = torch.empty_like(block)
        taken = _best_seconds(lambda: other.copy_(block), wait, share)
        bandwidth = 2 * block.numel() * block.element_size() / taken / 1e12
        measured.append(Operator("copy", f"{block.numel()} elements", bandwidth, "TB/s"))
    total = torch.cuda.get_device_properties(target).total_memory if target.type == "cuda" else memory_bytes()[0]
    name = torch.cuda.get_device_name(target) if target.type == "cuda" else target.type
    return Profile(name, str(dtype).removeprefix("torch."), total / 2**30, max(rates), bandwidth, tuple(measured))


def write_sheet(path: Path, report: Profile) -> None:
    """Write a hardware sheet in YAML that `--hardware` reads; links are placeholders that the user should set."""
    # The calibrated efficiency is a share of a vendor's peak; a measured peak is divided by it so that predictions
    # meet the measurement.
    text = "\n".join(
        [
            f"# measured by `tenfold planner profile` on {report.device} ({report.dtype}); set the links of "
            f"your cluster below",
            f"name: {report.device.replace(' ', '-')}",
            "architecture: measured",
            f"bf16: {report.tflops / 0.68:.6g}",
            f"mem_gib: {report.memory_gib:.4g}",
            f"mem_bw: {report.bandwidth_tbs / 0.8:.6g}",
            "intra_gbs: 25.0",
            "inter_gbs: 12.5",
            "per_node: 8",
            "host_gbs: 25.0",
            "",
        ]
    )
    write_bytes(path, text.encode())
