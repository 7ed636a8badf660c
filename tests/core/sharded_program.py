"""What processes do that hold one model in FSDP2 shards; for tests to start.

accelerate shards on accelerators only, so the parts of the loop that know of shards are called directly, on the CPU.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training_program import Teacher, adam, make_model, quiet_loss

from tenfold.core.training.ema import Ema
from tenfold.core.training.loop import gradient_norm
from tenfold.core.training.snapshot import Progress, Snapshots

STEPS = 6


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema, span: range) -> list[float]:
    """Train on the same samples in every process, so that its mean gradient is that of one; return gradient norms."""
    norms = []
    for step in span:
        samples = [Teacher().sample(index) for index in range(step * 8, step * 8 + 8)]
        optimizer.zero_grad()
        quiet_loss(model, {name: torch.stack([sample[name] for sample in samples]) for name in ("x", "y")})[
            0
        ].backward()
        norm = gradient_norm(list(model.parameters()))
        norms.append(norm.item())
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), 0.5, norm)
        optimizer.step()
        ema.update()
    return norms


def build(sharded: bool) -> tuple[nn.Module, torch.optim.Optimizer, Ema]:
    model = make_model(dropout=0)
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, adam(model), Ema(model, 0.8)


def train_and_save(folder: Path) -> None:
    """Train a whole and a sharded twin; leave checkpoints.

    Number 1 is of the shards half-way, 2 of them at the end, 3 of shards that went on from 1, 4 of the whole twin.
    """
    dist.init_process_group("gloo")
    snapshots = Snapshots(folder, 9, {})

    def save(step: int, model: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema, writes: bool) -> None:
        snapshots.save(Progress(step=step), {}, model, ema, optimizer, None, [], writes)

    first = dist.get_rank() == 0
    whole, shards = build(sharded=False), build(sharded=True)
    expected, found = steps(*whole, range(STEPS)), steps(*shards, range(STEPS))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    save(1, *shards, writes=first)
    dist.barrier()
    other = build(sharded=True)
    steps(*other, range(2))  # to be overwritten
    snapshots.load(folder / "step-00000001", other[0], other[2], other[1], None)
    more = range(STEPS, 2 * STEPS)
    assert steps(*other, more) == steps(*shards, more)
    steps(*whole, more)
    save(2, *shards, writes=first)
    save(3, *other, writes=first)
    if first:
        save(4, *whole, writes=True)
    dist.barrier()
    dist.destroy_process_group()
