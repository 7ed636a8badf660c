"""What two processes do that share a model in every way there is; for `test_parallel.py` to start.

Each check trains one step on one and the same batch, compares loss and gradients with the model on one process, and
returns the largest differences; the first process writes them down.
"""

from __future__ import annotations

import json
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from tenfold.llm.attention import Documents
from tenfold.llm.config import Layout, ModelConfig, Phase, TrainConfig
from tenfold.llm.context_parallel import apply_context_parallel, share_batch
from tenfold.llm.model import Decoder, initialise
from tenfold.llm.parallel import apply_fsdp, apply_tensor_parallel, prepare
from tenfold.llm.pipeline import pipeline
from tenfold.llm.tokenizer import ByteTokenizer
from tenfold.llm.training import train
from tenfold.llm.windows import Validation

SMALL = ModelConfig(vocabulary=96, width=32, layers=4, heads=4, kv_heads=2, ffn=48, norm="dssn", post_norm_eps=1e-8)
RICH = replace(  # all that a plan of tensor parallelism could forget
    SMALL,
    tied=True,
    attention_bias=True,
    output_bias=True,
    mlp_bias=True,
    qk_norm=True,
    attention_gate=True,
    layer_kinds=("full", "sliding", "sliding", "full"),
    sliding_window=5,
    embedding_scale=32**0.5,
    logit_softcap=20.0,
)
CONFIGS = {"dssn": SMALL, "rich": RICH, "post": replace(SMALL, norm="post"), "pre": replace(SMALL, norm="pre")}
ROWS, LENGTH, STEPS = 4, 24, 4


def make_model(config: ModelConfig) -> Decoder:
    """A decoder whose every parameter matters: gains and biases are not those of the start."""
    model = Decoder(config)
    initialise(model, 3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def make_batch(packed: bool = True) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(1, 96, (ROWS, LENGTH + 1), generator=generator)
    documents = Documents((11, 13, 24, 3, 1, 20, 17, 7)) if packed else None
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "documents": documents}


def loss_of(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    logits = model(batch["tokens"], batch["documents"], positions=batch.get("positions"))
    return F.cross_entropy(logits.flatten(0, -2).float(), batch["targets"].flatten())


def alone(config: ModelConfig, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    model = make_model(config)
    loss = loss_of(model, batch)
    loss.backward()
    return loss.item(), gradients(model)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
    return found


def differences(
    loss: float,
    found: dict[str, torch.Tensor],
    config: ModelConfig,
    batch: dict[str, Any],
    whole: bool = True,
) -> dict[str, Any]:
    """Largest difference of the loss, and of gradients relative to each tensor's largest entry."""
    expected_loss, expected = alone(config, batch)
    assert not whole or found.keys() == expected.keys()
    relative = {
        name: ((gradient - expected[name]).abs().max() / expected[name].abs().max()).item()
        for name, gradient in found.items()
    }
    worst = max(relative, key=relative.__getitem__)
    return {"loss": abs(loss - expected_loss), "gradient": relative[worst], "worst": worst, "tensors": len(found)}


def half(batch: dict[str, Any]) -> dict[str, Any]:
    """The rows of this process."""
    first = dist.get_rank() == 0
    lengths = batch["documents"].lengths
    rows = slice(0, 2) if first else slice(2, 4)
    documents = Documents(lengths[:3] if first else lengths[3:])
    return {"tokens": batch["tokens"][rows], "targets": batch["targets"][rows], "documents": documents}


def mean(loss: torch.Tensor) -> float:
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    return loss.item() / dist.get_world_size()


def fsdp(name: str) -> dict[str, Any]:
    batch, model = make_batch(), make_model(CONFIGS[name])
    apply_fsdp(model, init_device_mesh("cpu", (2,)))
    loss = loss_of(model, half(batch))
    loss.backward()
    return differences(mean(loss), gradients(model), CONFIGS[name], batch)


def tensor(name: str) -> dict[str, Any]:
    batch, model = make_batch(), make_model(CONFIGS[name])
    apply_tensor_parallel(model, init_device_mesh("cpu", (2,)))
    loss = loss_of(model, batch)
    loss.backward()
    held = sum(parameter.to_local().numel() for parameter in model.parameters())  # type: ignore[attr-defined]
    share = held / sum(parameter.numel() for parameter in model.parameters())
    return {**differences(loss.item(), gradients(model), CONFIGS[name], batch), "share": share}


def context(name: str) -> dict[str, Any]:
    batch, model = make_batch(), make_model(CONFIGS[name])
    mesh = init_device_mesh("cpu", (2,))
    apply_context_parallel(model, mesh)
    own = share_batch(batch, mesh)
    loss = loss_of(model, own)
    loss.backward()
    found = gradients(model)
    for gradient in found.values():
        dist.all_reduce(gradient)
        gradient /= 2
    with torch.no_grad():
        unshared = loss_of(model, batch).item()  # a batch that is not shared goes on as before
    answer = differences(mean(loss), found, CONFIGS[name], batch)
    return {**answer, "tokens": own["tokens"].numel(), "unshared": abs(unshared - alone(CONFIGS[name], batch)[0])}


def pipe(name: str, chunks: int = 1, packed: bool = True) -> dict[str, Any]:
    batch, model = make_batch(packed), make_model(CONFIGS[name])
    pipe = pipeline(model, init_device_mesh("cpu", (2,)), micro_batches=4, chunks=chunks)
    loss = pipe.step(batch["tokens"], batch["targets"], batch["documents"])
    found: dict[str, torch.Tensor] = {}
    for part in pipe.parts:
        found |= gradients(part)
    shared: list[Any] = [None, None]
    dist.all_gather_object(shared, found)
    assert not shared[0].keys() & shared[1].keys(), "both processes hold the same weights"
    answer = differences(loss.item(), shared[0] | shared[1], CONFIGS[name], batch)
    state = pipe.state_dict()
    if state is not None:
        expected = make_model(CONFIGS[name]).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected)
    return answer


def spread(name: str, **layout: int) -> dict[str, Any]:
    """`prepare`, as `pretrain` calls it: sharded over context, vocabulary in parts; made on the meta device."""
    batch = make_batch()
    with torch.device("meta"):
        model = Decoder(CONFIGS[name])
    spread = prepare(model, Layout(**layout), seed=3)
    reference = Decoder(CONFIGS[name])
    initialise(reference, 3)
    for (key, one), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(one.full_tensor(), other), key  # type: ignore[attr-defined]
    expected = loss_of(reference, batch)
    expected.backward()
    loss = spread.loss(lambda model, batch: (loss_of(model, batch), {}))
    assert spread.data_share is not None
    index, count = spread.data_share
    own = half(batch) if count == 2 else batch
    assert count == 1 or index == dist.get_rank()
    with spread.active():
        value, _ = loss(model, own)
        value.backward()
    found, target = gradients(model), gradients(reference)
    relative = max(((found[key] - target[key]).abs().max() / target[key].abs().max()).item() for key in target)
    return {"loss": abs(mean(value) - expected.item()), "gradient": relative, "tensors": len(found)}


class Rows:
    """A stream of packed rows, each a pure function of its number; document ends are where token 0 is."""

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        rows = []
        for index in indices:
            generator = torch.Generator().manual_seed(1000 + index)
            rows.append(torch.randint(0, 12, (LENGTH + 1,), generator=generator).cumsum(0) % 31)
        tokens = torch.stack(rows)
        inputs = tokens[:, :-1].contiguous()
        documents = Documents.of(inputs, eod=0)
        return {"tokens": inputs, "targets": tokens[:, 1:], "documents": documents, "rope_base": 1e4}


def run(folder: Path, layout: Layout | None = None) -> list[float]:
    """Train a few steps through the entry that `pretrain` uses; return the losses."""
    phase = Phase("only", 0, STEPS * ROWS * LENGTH, LENGTH, 1e4, ((0, ROWS),), 3e-3, warmup_steps=2)
    config = TrainConfig((phase,), evaluate_every=0, checkpoint_every=STEPS // 2, spike_height=10.0)
    model = make_model(SMALL)
    validation = Validation(Rows().batch(range(40, 44))["tokens"].flatten().tolist(), LENGTH, ByteTokenizer())
    train(model, Rows(), config, folder, validation=validation, layout=layout, device="cpu", peak_flops=1e12)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row] + [rows[-1]["eval/loss"]]


def spread_run(folder: Path, **layout: int) -> dict[str, Any]:
    return {"losses": run(folder, Layout(**layout))}


def resumed_run(folder: Path, source: Path, **layout: int) -> dict[str, Any]:
    """Go on, on another layout, from the checkpoint in the middle of `source`."""
    if dist.get_rank() == 0:
        shutil.copytree(source, folder)
        shutil.rmtree(folder / "checkpoints" / f"step-{STEPS:08d}")
        (folder / "model.safetensors").unlink()
    dist.barrier()
    return spread_run(folder, **layout)


CHECKS: dict[str, Callable[[], dict[str, Any]]] = {
    **{f"fsdp {name}": partial(fsdp, name) for name in ("dssn", "rich")},
    **{f"tensor {name}": partial(tensor, name) for name in CONFIGS},
    **{f"context {name}": partial(context, name) for name in ("dssn", "rich")},
    **{f"pipeline {name}": partial(pipe, name) for name in ("dssn", "post")},
    "pipeline whole rows": partial(pipe, "dssn", packed=False),
    "pipeline interleaved": partial(pipe, "dssn", chunks=2),
    "prepare fsdp": partial(spread, "dssn", fsdp=2),
    "prepare tensor": partial(spread, "rich", tp=2),
    "prepare context": partial(spread, "dssn", cp=2),
}


def runs(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """Whole trainings, whose folders the test looks into."""
    return {
        "run copies": partial(spread_run, folder / "copies", dp=2),
        "run fsdp": partial(spread_run, folder / "fsdp", fsdp=2),
        "run tensor": partial(spread_run, folder / "tensor", tp=2),
        "run context": partial(spread_run, folder / "context", cp=2),
        "run resumed": partial(resumed_run, folder / "resumed", folder / "tensor", cp=2),
    }


def main(output: Path, names: list[str]) -> None:
    from accelerate.state import PartialState

    torch.set_num_threads(1)
    PartialState(cpu=True)  # the group that `fit` and `prepare` use
    answers = {}
    checks = CHECKS | runs(output.parent)
    for name in names or checks:
        try:
            answers[name] = checks[name]()
        except Exception:
            answers[name] = {"error": traceback.format_exc()}
            print(answers[name]["error"], file=sys.stderr, flush=True)
    if dist.get_rank() == 0:
        output.write_text(json.dumps(answers, indent=1))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
