"""Parallelism, applied to a decoder from outside: tensor and sequence parallelism, FSDP2, and both with context
parallelism behind one call, `prepare`.

The model's code knows of none of it. The order is: split matrices (DTensors over `tp`), let attention reach over `cp`,
then cut what is left into shards (over data shares and `cp`). Pipelines are in `pipeline.py`: they need a step of their
own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from tenfold.core.console import UserError
from tenfold.llm.config import Layout, ModelConfig
from tenfold.llm.context_parallel import apply_context_parallel, share_batch
from tenfold.llm.model import Decoder, initialise

Loss = Callable[[Any, Any], tuple[Tensor, Mapping[str, Tensor | float]]]


# --- Tensor parallelism -----------------------------------------------------------------------------------------------


def apply_tensor_parallel(model: nn.Module, mesh: DeviceMesh, split_logits: bool = False) -> None:
    """Share every matrix over the devices of `mesh`, and the positions between matrices (sequence parallelism).

    q, k, v, gate and up are cut by their outputs, o and down by their inputs, embedding and output matrix by the
    vocabulary; norms see a part of the positions, those of heads a part of the heads. Tied weights stay tied. Lengths
    of sequences must be multiples of the number of devices.

    Args:
        model: a decoder, or a piece of one (`pipeline.Piece`).
        mesh: one-dimensional.
        split_logits: leave logits in parts of the vocabulary, for `loss_parallel`; else every device gets all.

    Raises:
        UserError: heads or the feed-forward width cannot be shared equally.
    """
    config: ModelConfig = model.config  # type: ignore[assignment]
    _check(Layout(tp=mesh.size()), config)
    for block in blocks(model):
        parallelize_module(block, mesh, _block_plan(block))
    whole = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "final_norm": SequenceParallel(),
        "lm_head": ColwiseParallel(
            input_layouts=Shard(1),
            output_layouts=Shard(-1) if split_logits else Replicate(),
            use_local_output=not split_logits,
        ),
    }
    parallelize_module(model, mesh, {name: style for name, style in whole.items() if hasattr(model, name)})
    if config.tied:
        model.lm_head.weight = model.embed.weight  # type: ignore[union-attr] # each was cut on its own, alike


def _block_plan(block: nn.Module) -> dict[str, ParallelStyle]:
    """How each module of a block is cut."""
    plan: dict[str, ParallelStyle] = {
        # Positions of all devices meet before the matrices, once for all that read them.
        "attention": PrepareModuleInput(
            input_layouts=(Shard(1), None, None, None), desired_input_layouts=(Replicate(), None, None, None)
        ),
        "attention.q": ColwiseParallel(),
        "attention.k": ColwiseParallel(),
        "attention.v": ColwiseParallel(),
        "attention.gate": ColwiseParallel(),
        "attention.o": RowwiseParallel(output_layouts=Shard(1)),
        "attention.q_norm": SequenceParallel(use_local_output=True),  # axis 1 is that of heads there
        "attention.k_norm": SequenceParallel(use_local_output=True),
        "pre_attention_norm": SequenceParallel(),
        "post_attention_norm": SequenceParallel(use_local_output=True),
        "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "mlp.gate": ColwiseParallel(),
        "mlp.up": ColwiseParallel(),
        "mlp.down": RowwiseParallel(output_layouts=Shard(1)),
        "pre_mlp_norm": SequenceParallel(),
        "post_mlp_norm": SequenceParallel(use_local_output=True),
    }
    present = {name for name, module in block.named_modules() if not isinstance(module, nn.Identity)}
    return {name: style for name, style in plan.items() if name in present}


def blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of a decoder or of a piece of one."""
    return list(model.layers.children())  # type: ignore[union-attr]


# --- FSDP2 ------------------------------------------------------------------------------------------------------------


def apply_fsdp(model: nn.Module, mesh: DeviceMesh, precision: Literal["no", "bf16"] = "no") -> None:
    """Cut weights, gradients and optimiser state into shards, block by block; a block is whole while it works.

    Args:
        model: a decoder, or a piece of one, after `apply_tensor_parallel` where both are wanted.
        mesh: one-dimensional, or two-dimensional: copies, and shards of each copy.
        precision: in which blocks compute; weights and sums of gradients stay float32.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None,
        reduce_dtype=torch.float32 if precision == "bf16" else None,
        cast_forward_inputs=False,  # the angles of far positions would lose their digits
    )
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


# --- All of it, for `pretrain` ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """How a model lies over the processes of a run: what the loop around it has to know.

    Args:
        layout: of the processes.
        data_share: which share of the samples this process takes, and of how many; None is its own.
        context: processes that share the tokens of a batch; None without context parallelism.
    """

    layout: Layout
    data_share: tuple[int, int] | None = None
    context: DeviceMesh | None = None

    def loss(self, loss: Loss) -> Loss:
        """A loss over the part of a batch that this process has; its mean over processes is the loss of the batch."""

        def local(model: Any, batch: Any) -> tuple[Tensor, Mapping[str, Tensor | float]]:
            if self.context is not None and model.training:
                batch = share_batch(batch, self.context)
            value, further = loss(model, batch)
            return _whole(value), {name: _whole(one) for name, one in further.items()}

        return local if self.layout.tp > 1 or self.context is not None else loss

    @contextmanager
    def active(self) -> Iterator[None]:
        """To be entered around training: the softmax over a vocabulary that lies in parts needs it, backward too."""
        if self.layout.tp > 1:
            with loss_parallel():
                yield
        else:
            yield


def layout_of(processes: int, fsdp: bool = False, tp: int = 1, cp: int = 1) -> Layout:
    """The layout that has `tp` and `cp` and takes different rows on what is left, in shards where `fsdp` is set.

    Raises:
        UserError: the processes cannot be shared out like this.
    """
    data, rest = divmod(processes, tp * cp) if tp > 0 and cp > 0 else (0, 1)
    if rest or not data:
        raise UserError(
            f"pretrain: {processes} process(es) cannot be shared out by tp {tp} x cp {cp}: start a multiple of "
            f"{max(tp, 1) * max(cp, 1)} processes with torchrun --nproc-per-node, or take other numbers"
        )
    return Layout(dp=1 if fsdp else data, fsdp=data if fsdp else 1, tp=tp, cp=cp)


def prepare(
    model: Decoder,
    layout: Layout,
    precision: Literal["no", "bf16", "fp16"] = "no",
    device: str = "cpu",
    seed: int = 0,
) -> Spread:
    """Spread a decoder over the processes that torchrun or `accelerate launch` started; in place.

    A layout of `dp` alone leaves the model as it is: `fit` copies it. A model on the meta device is made shard by shard
    and initialised, and needs no more memory than its shards and one matrix; the numbers are those of
    `initialise(model, seed)` on one device.

    Args:
        model: the decoder, the same on every process, or on the meta device.
        layout: without a pipeline; its devices are the processes.
        precision: of the run.
        device: of this process.
        seed: for a model on the meta device.

    Raises:
        UserError: the layout is not one of these processes, of this model or of this precision.
    """
    _check(layout, model.config)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if layout.devices != processes:
        raise UserError(
            f"pretrain: the layout is one of {layout.devices} devices and {processes} process(es) were started: start "
            f"it with torchrun --nproc-per-node {layout.devices}"
        )
    if layout.pp > 1:
        raise UserError("pretrain: it takes no pipeline, which needs a step of its own: see tenfold.llm.pipeline")
    on_meta = next(model.parameters()).is_meta
    if layout.fsdp * layout.tp * layout.cp == 1:
        if on_meta:
            model.to_empty(device=device)
            initialise(model, seed)
        return Spread(layout)
    if precision == "fp16":
        raise UserError("pretrain: fp16 is not for sharded models: take precision bf16 or no")
    _form_group(device)
    kind = torch.device(device).type
    if not on_meta:
        model.to(device)
    # One mesh for all that DTensors know of, since shards of parts must have one parent; a second, of the same order,
    # tells which of the processes that hold different shards share tokens.
    mesh = init_device_mesh(
        kind, (layout.dp, layout.fsdp * layout.cp, layout.tp), mesh_dim_names=("copy", "shard", "tensor")
    )
    context = None
    if layout.tp > 1:
        apply_tensor_parallel(model, mesh["tensor"], split_logits=True)
    if layout.cp > 1:
        sizes = (layout.dp, layout.fsdp, layout.cp, layout.tp)
        names = ("copy", "data", "context", "tensor")
        context = init_device_mesh(kind, sizes, mesh_dim_names=names)["context"]
        apply_context_parallel(model, context)
    if layout.dp > 1:
        apply_fsdp(model, mesh["copy", "shard"], "bf16" if precision == "bf16" else "no")
    elif layout.fsdp * layout.cp > 1:
        apply_fsdp(model, mesh["shard"], "bf16" if precision == "bf16" else "no")
    if on_meta:
        model.to_empty(device=device)
        with implicit_replication():  # every process draws the same whole matrix and keeps its shard
            initialise(model, seed)
    data = dist.get_rank() // (layout.cp * layout.tp)
    return Spread(layout, (data, layout.data_shares), context)


@contextmanager
def first_process_first(device: str) -> Iterator[None]:
    """Let the first process do what is inside before the others do it: they find on the disk what it made.

    Where the first one fails, the others fail with it instead of waiting.

    Args:
        device: of this process.

    Raises:
        UserError: in the other processes, when the first one failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    _form_group(device)
    failed = [False]
    if dist.get_rank() == 0:
        try:
            yield
        except BaseException:
            failed[0] = True
            raise
        finally:
            dist.broadcast_object_list(failed, 0)
    else:
        dist.broadcast_object_list(failed, 0)
        if failed[0]:
            raise UserError("pretrain: the first process has failed, see its message")
        yield


def _check(layout: Layout, config: ModelConfig) -> None:
    try:
        layout.check(config)
    except ValueError as error:
        raise UserError(f"layout: {error}") from error


def _form_group(device: str) -> None:
    """The group of processes, through accelerate, which the training loop asks as well."""
    from accelerate.state import PartialState

    PartialState(cpu=torch.device(device).type == "cpu")


def _whole(value: Tensor | float) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value
