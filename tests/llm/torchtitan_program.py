"""What two processes do that spread a model as torchtitan's trainer would; for `test_parallel.py` to start.

The trainer itself needs accelerators. Its parts that take the model run here on the CPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch._utils
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.state import PartialState
from parallel_program import SMALL, Decoder, gradients, half, initialise, loss_of, make_batch
from torch.distributed.fsdp import FSDPModule

torch._utils._get_available_device_type = lambda: "cpu"  # torchtitan takes CUDA for granted where it finds no other

from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig  # noqa: E402
from torchtitan.distributed import ParallelDims  # noqa: E402
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC  # noqa: E402

from tenfold.llm import torchtitan_spec as spec  # noqa: E402


def spread(policy: Any, shares_rows: bool, **degrees: int) -> dict[str, float]:
    parallelism = ParallelismConfig(spmd_backend="partial_dtensor", **degrees)
    dims = ParallelDims.from_config(parallelism, 2)
    dims.build_mesh()
    with torch.device("meta"):
        model: Any = spec.TitanDecoder.Config(decoder=SMALL, seed=3).build()
    model.verify_module_protocol()
    model = spec.parallelize(
        model,
        parallel_dims=dims,
        training=TrainingConfig(mixed_precision_param="float32"),
        parallelism=parallelism,
        compile_config=CompileConfig(),
        ac_config=policy,
        dump_folder="",
    )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no sum of multiples
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.init_weights(buffer_device=None)
    batch, whole = make_batch(), Decoder(SMALL)
    initialise(whole, 3)
    expected = loss_of(whole, batch)
    expected.backward()
    own = half(batch) if shares_rows else batch
    positions = torch.cat([torch.arange(length) for length in own["documents"].lengths]).view_as(own["tokens"])
    logits = model(own["tokens"], positions=positions)
    loss = F.cross_entropy(logits.flatten(0, 1), own["targets"].flatten(), reduction="sum") / batch["targets"].numel()
    loss.backward()
    total = loss.detach().clone()
    if shares_rows:
        dist.all_reduce(total)
    target = gradients(whole)
    found = {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in gradients(model).items()}
    relative = [((found[name] - value).abs().max() / value.abs().max()).item() for name, value in target.items()]
    return {"loss": abs(total - expected).item(), "gradient": max(relative)}


def main(output: Path) -> None:
    torch.set_num_threads(1)
    PartialState(cpu=True)
    settings = spec.smollm2_135m()
    adapter = spec.KeyAdapter(spec.TitanDecoder.Config(decoder=SMALL), None)
    state = Decoder(SMALL).state_dict()
    answers: dict[str, Any] = {
        "tensor": spread(SelectiveAC.Config(), False, tensor_parallel_degree=2),
        "fsdp": spread(FullAC.Config(), True, data_parallel_shard_degree=2),
        "keys": adapter.from_hf(adapter.to_hf(state)).keys() == state.keys(),
        "parameters": spec.TitanDecoder.Config(decoder=SMALL).get_nparams_and_flops(Decoder(SMALL), 24)[0],
        "flavor": settings.model_spec.flavor,
    }
    if dist.get_rank() == 0:
        output.write_text(json.dumps(answers))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
