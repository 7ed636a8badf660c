"""The decoder as a model of torchtitan, for runs on its engine. Needs torchtitan 0.3, in an environment of its own: it
wants an older `datasets` than the rest of this room.

torchtitan's trainer takes models from outside by module path:

    torchrun --nproc-per-node 8 -m torchtitan.train --module tenfold.llm.torchtitan_spec \
        --config openpangu_embedded_7b --parallelism.tensor_parallel_degree 2

It then drives data, optimiser, checkpoints and logging on accelerators; `parallel` shards and splits the model on its
meshes. Its context and pipeline parallelism are not taken: it shares out sequences, not documents, and cuts decoders
of its own kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor.experimental import implicit_replication
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
from torchtitan.protocols import BaseModel
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.protocols.state_dict_adapter import StateDictAdapter
from torchtitan.trainer import Trainer

from tenfold.llm import scale
from tenfold.llm.attention import Documents
from tenfold.llm.config import PRESETS, ModelConfig
from tenfold.llm.key_tables import LAYOUTS, to_ours, to_theirs
from tenfold.llm.model import Decoder, initialise
from tenfold.llm.parallel import apply_fsdp, apply_tensor_parallel


class TitanDecoder(Decoder, BaseModel):
    """The decoder with the methods that torchtitan calls."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseModel.Config):
        """What torchtitan builds the model from.

        Args:
            decoder: sizes and the rest.
            seed: of the weights.
        """

        decoder: ModelConfig
        seed: int = 0

        def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
            """Nothing of the model follows from the run's settings."""

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
            """Parameters, and FLOPs of a token by the conventions of `scale`."""
            return scale.parameters(self.decoder), int(scale.flops_per_token(self.decoder, seq_len))

    def __init__(self, config: Config) -> None:
        Decoder.__init__(self, config.decoder)
        self.seed = config.seed

    def verify_module_protocol(self) -> None:
        """Its modules are PyTorch's own, which torchtitan's protocol knows no configuration of."""

    def init_states(self, *, buffer_device: torch.device | None = None) -> None:
        """Draw the weights, each process its shards of the same whole."""
        with implicit_replication():
            initialise(self, self.seed)

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Logits (B, T, V) of tokens (B, T); `positions` (B, T) start from 0 with each document."""
        if positions is None:
            return Decoder.forward(self, tokens)
        ends = torch.ones_like(positions, dtype=torch.bool)
        ends[:, :-1] = positions[:, 1:] == 0
        return Decoder.forward(self, tokens, Documents.of(ends.long(), 1))


def parallelize(
    model: TitanDecoder,
    *,
    parallel_dims: Any,
    training: TrainingConfig,
    parallelism: Any,
    compile_config: Any,
    ac_config: Any,
    dump_folder: str,
) -> TitanDecoder:
    """Spread the model over torchtitan's meshes.

    Raises:
        ValueError: the run asks for what is not taken over.
    """
    if parallel_dims.cp_enabled or compile_config.enable or parallelism.spmd_backend != "partial_dtensor":
        raise ValueError(
            "tenfold's decoder takes neither context parallelism nor compilation from torchtitan, and of its back ends "
            "partial_dtensor: give --parallelism.spmd_backend partial_dtensor"
        )
    if parallel_dims.tp_enabled:
        apply_tensor_parallel(model, parallel_dims.get_mesh("tp"))
    if ac_config is not None:
        ac_config.build(dump_folder=dump_folder).apply(model)
    names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
    apply_fsdp(model, parallel_dims.get_mesh(names), "bf16" if training.mixed_precision_param == "bfloat16" else "no")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # torchtitan's loss is a sum over processes already
    return model


class KeyAdapter(StateDictAdapter):
    """Between our keys and those of Hugging Face checkpoints, by `key_tables`."""

    def _layout(self) -> Any:
        return LAYOUTS["pangu" if self.model_config.decoder.has_post_norms else "llama"]

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Our tensors under their names."""
        return to_theirs(self._layout(), state_dict)

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        """Their tensors under our names."""
        return to_ours(self._layout(), hf_state_dict)


def model_registry(flavor: str) -> ModelSpec:
    """A named size as torchtitan's bundle of model and functions."""
    return ModelSpec(
        name="tenfold",
        flavor=flavor,
        model=TitanDecoder.Config(decoder=PRESETS[flavor]),
        parallelize_fn=parallelize,
        pipelining_fn=None,
        post_optimizer_build_fn=None,
        state_dict_adapter=KeyAdapter,
    )


def _run(flavor: str) -> Callable[[], Trainer.Config]:
    """A run's settings (paper section 3.2); all of them can be changed on torchtitan's command line."""

    def settings() -> Trainer.Config:
        return Trainer.Config(
            model_spec=model_registry(flavor),
            loss=CrossEntropyLoss.Config(global_vocab_size=PRESETS[flavor].vocabulary),
            optimizer=default_adamw(lr=1e-4),
            lr_scheduler=LRSchedulersContainer.Config(warmup_steps=4000, decay_type="cosine", min_lr_factor=0.1),
            parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
            training=TrainingConfig(local_batch_size=1, seq_len=4096, max_norm=1.0),
            dataloader=HuggingFaceTextDataLoader.Config(dataset="c4"),
        )

    return settings


pangu_ultra_135b = _run("pangu-ultra-135b")
openpangu_embedded_7b = _run("openpangu-embedded-7b")
smollm2_135m = _run("smollm2-135m")
tenfold_tiny = _run("tenfold-tiny")
