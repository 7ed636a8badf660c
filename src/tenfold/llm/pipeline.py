"""Pipeline parallelism: a decoder cut into pieces that lie on different devices, with torch's 1F1B schedules.

A pipeline does forward and backward passes of all micro-batches in one call, so it has a step of its own and does not
go through `pretrain`:

    pipe = pipeline(model, mesh["pipe"], micro_batches=8)
    optimizer = torch.optim.AdamW(pipe.parameters())
    loss = pipe.step(tokens, targets, documents)
    optimizer.step()
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from tenfold.core.console import UserError
from tenfold.llm.attention import Documents
from tenfold.llm.config import Layout
from tenfold.llm.model import Decoder
from tenfold.llm.scale import pieces


class Piece(nn.Module):
    """Consecutive layers of a decoder; the first piece has the embedding too, the last one norm and output matrix.

    Keys of weights are those of the whole decoder. FSDP and tensor parallelism can be applied to it as to a decoder.

    Args:
        model: the decoder, whose modules the piece takes.
        layers: numbers of its layers.
    """

    def __init__(self, model: Decoder, layers: range) -> None:
        super().__init__()
        self.config = model.config
        self.turns = model.turns
        if layers.start == 0:
            self.embed = model.embed
        self.layers = nn.ModuleDict({str(layer): model.layers[layer] for layer in layers})
        self.last = layers.stop == self.config.layers
        if self.last:
            self.final_norm, self.lm_head = model.final_norm, model.lm_head
        self.scores = model.logits

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Pass a micro-batch on.

        Args:
            x: token ids (B, T) for the first piece, else hidden states (B, T, d).
            ends: bool (B, T), whether a token is the last of its document; this shape tells T, since hidden states may
                be a part of the positions.

        Returns:
            Hidden states, or the logits (B, T, V) of the last piece.
        """
        documents = Documents.of(ends.long(), 1)
        turns = self.turns(torch.arange(ends.shape[1], device=ends.device))
        if hasattr(self, "embed"):
            x = self.embed(x)
            if self.config.embedding_scale != 1.0:
                x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype)
        for number, layer in self.layers.items():
            x = layer(x, turns[self.config.kind(int(number))], documents, None)
        return self.scores(self.final_norm(x)) if self.last else x


class Pipeline:
    """The pieces of this device and the schedule that drives them. Made by `pipeline`."""

    def __init__(
        self, parts: list[Piece], schedule: Schedule1F1B | ScheduleInterleaved1F1B, mesh: DeviceMesh, last: bool
    ) -> None:
        self.parts = parts
        self.schedule = schedule
        self.mesh = mesh
        self.first = mesh.get_local_rank() == 0
        self.last = last

    def parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the pieces here."""
        for part in self.parts:
            yield from part.parameters()

    def step(self, tokens: Tensor, targets: Tensor, documents: Documents | None = None) -> Tensor:
        """Forward and backward passes of a batch; gradients are added to those that are there.

        Args:
            tokens: (B, T), the same on every device of the pipeline; B is a multiple of the micro-batches.
            targets: (B, T).
            documents: of the rows; None takes each row as one.

        Returns:
            The mean loss of the batch, on every device.
        """
        ends = torch.zeros_like(tokens, dtype=torch.bool)
        ends[:, -1] = True
        if documents is not None:
            ends.view(-1)[torch.tensor(documents.offsets[1:], device=tokens.device) - 1] = True
        losses: list[Tensor] = []
        inputs = (tokens,) if self.first else ()
        target = targets if self.last else None
        self.schedule.step(*inputs, target=target, losses=losses if self.last else None, ends=ends)
        mean = torch.stack(losses).mean().detach() if self.last else torch.zeros((), device=tokens.device)
        group = self.mesh.get_group()
        dist.broadcast(mean, dist.get_global_rank(group, self.mesh.size() - 1), group=group)
        return mean

    def state_dict(self) -> dict[str, Tensor] | None:
        """The weights of the whole decoder, on the CPU of the pipeline's first device; None on the others."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True)
        own: dict[str, Any] = {}
        for part in self.parts:
            own |= get_model_state_dict(part, options=options)
        own = {name: tensor.cpu() for name, tensor in own.items()}
        group = self.mesh.get_group()
        gathered: list[dict[str, Tensor]] | None = [{}] * self.mesh.size() if self.first else None
        dist.gather_object(own, gathered, dist.get_global_rank(group, 0), group=group)
        return {name: tensor for part in gathered for name, tensor in part.items()} if gathered else None


def pipeline(model: Decoder, mesh: DeviceMesh, micro_batches: int, chunks: int = 1) -> Pipeline:
    """Cut a decoder into pieces, of which this device keeps its own.

    Args:
        model: initialised or loaded, the same on every device.
        mesh: the devices of the pipeline, one-dimensional.
        micro_batches: of a step; a multiple of the devices keeps the interleaved schedule regular.
        chunks: pieces of a device; above 1 the schedule is the interleaved one (paper section 4.2).

    Raises:
        UserError: there are fewer layers than pieces, or the embeddings are tied.
    """
    layout = Layout(pp=mesh.size(), chunks=chunks)
    try:
        layout.check(model.config)
    except ValueError as error:
        raise UserError(f"layout: {error}") from error
    cuts = pieces(model.config.layers, layout.pp * chunks)
    own = range(mesh.get_local_rank(), len(cuts), layout.pp)
    parts = [Piece(model, cuts[number]) for number in own]
    device = next(parts[0].parameters()).device
    stages: list[Any] = [
        PipelineStage(part, number, len(cuts), device, group=mesh.get_group())
        for part, number in zip(parts, own, strict=True)
    ]
    schedule: Schedule1F1B | ScheduleInterleaved1F1B
    if chunks == 1:
        schedule = Schedule1F1B(stages[0], micro_batches, loss_fn=_mean_loss)
    else:
        schedule = ScheduleInterleaved1F1B(stages, micro_batches, loss_fn=_mean_loss)
    return Pipeline(parts, schedule, mesh, last=own[-1] == len(cuts) - 1)


def _mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
