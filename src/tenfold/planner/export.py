"""Launch flags of a plan for Megatron-LM, MindSpeed and torchtitan, as lists of arguments.

Flag names: Megatron-LM core_r0.12 arguments.py, MindSpeed feature documents (2025), torchtitan JobConfig (2025). The
plan's layout is what is
exported; data, optimizer and paths are the user's.
"""

from __future__ import annotations

from tenfold.core.console import UserError
from tenfold.planner.config import Cluster, Model, Plan
from tenfold.planner.validity import check_plan

FRAMEWORKS = ("megatron", "mindspeed", "torchtitan")


def megatron_flags(model: Model, plan: Plan) -> list[str]:
    """Arguments of Megatron-LM's pretrain_gpt.py."""
    flags = [
        f"--num-layers {model.layers + (plan.noop_slots or 0)}",
        f"--hidden-size {model.hidden}",
        f"--num-attention-heads {model.heads}",
        f"--seq-length {plan.seq}",
        f"--max-position-embeddings {plan.seq}",
        f"--tensor-model-parallel-size {plan.tp}",
        f"--pipeline-model-parallel-size {plan.pp}",
        f"--context-parallel-size {plan.cp}",
        f"--micro-batch-size {plan.mbs}",
        f"--global-batch-size {plan.gbs}",
    ]
    if model.ffn:
        flags.append(f"--ffn-hidden-size {model.ffn}")
    if model.gated:
        flags.append("--swiglu")
    if not model.tied:
        flags.append("--untie-embeddings-and-output-weights")
    if model.attention == "gqa":
        flags += ["--group-query-attention", f"--num-query-groups {model.kv_heads}"]
    if model.attention == "mla":
        flags += [
            "--multi-latent-attention",
            *([f"--q-lora-rank {model.q_lora}"] if model.q_lora else []),
            f"--kv-lora-rank {model.kv_lora}",
            f"--qk-head-dim {model.qk_nope}",
            f"--qk-pos-emb-head-dim {model.qk_rope}",
            f"--v-head-dim {model.v_head}",
        ]
    if model.experts:
        flags += [
            f"--num-experts {model.experts}",
            f"--moe-router-topk {model.topk}",
            f"--moe-ffn-hidden-size {model.moe_ffn}",
            f"--expert-model-parallel-size {plan.expert_buckets}",
            f"--expert-tensor-parallel-size {plan.etp}",
            "--moe-grouped-gemm",
            f"--moe-token-dispatcher-type {'flex' if plan.dispatch == 'dedup' else 'alltoall'}",
        ]
        if plan.dispatch == "dedup":
            flags.append("--moe-enable-deepep")
        if model.shared_ffn:
            flags.append(f"--moe-shared-expert-intermediate-size {model.shared_ffn}")
        if model.first_dense:
            flags.append(f'--moe-layer-freq "([0]*{model.first_dense}+[1]*{model.layers - model.first_dense})"')
        if plan.ep_overlap or plan.schedule == "adaptive":
            flags.append("--overlap-moe-expert-parallel-comm")
    if model.mtp:
        flags.append(f"--mtp-num-layers {model.mtp}")
    if plan.vpp > 1:
        flags.append(f"--num-virtual-stages-per-pipeline-rank {plan.vpp}")
    if plan.tp > 1 and plan.sequence_parallel:
        flags.append("--sequence-parallel")
    if plan.fsdp == 1:
        flags += ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
    elif plan.fsdp > 1:
        names = {2: "optim_grads", 3: "optim_grads_params"}
        flags += ["--use-megatron-fsdp", f"--data-parallel-sharding-strategy {names[plan.fsdp]}"]
    if plan.recompute == "full":
        flags += ["--recompute-granularity full", "--recompute-method uniform", "--recompute-num-layers 1"]
    elif plan.recompute in ("selective", "fine-grained", "moe"):
        modules = {
            "selective": "core_attn",
            "moe": "layernorm moe",
            "fine-grained": "layernorm moe_act" + (" mla_up_proj" if model.attention == "mla" else ""),
        }
        flags += ["--recompute-granularity selective", f"--recompute-modules {modules[plan.recompute]}"]
    flags.append(
        {
            "bf16": "--bf16",
            "fp16": "--fp16",
            "fp8": "--bf16 --fp8-format hybrid",
            "mxfp8": "--bf16 --fp8-format e4m3 --fp8-recipe mxfp8",
        }[plan.precision]
    )
    return flags


def mindspeed_flags(model: Model, plan: Plan) -> list[str]:
    """Megatron's arguments with MindSpeed's switches for the features it adds."""
    flags = [
        flag
        for flag in megatron_flags(model, plan)
        if not flag.startswith(("--moe-enable-deepep", "--overlap-moe-expert", "--expert-model-parallel-size"))
    ]
    if model.experts:
        flags.append(f"--expert-model-parallel-size {plan.ep}")
        flags = [
            "--moe-token-dispatcher-type alltoall_seq"
            if f.startswith("--moe-token-dispatcher-type") and plan.tp_extend_ep
            else f
            for f in flags
        ]
        if plan.tp_extend_ep:
            flags.append("--moe-tp-extend-ep")
        if plan.dispatch == "hierarchical":
            flags.append("--moe-hierarchical-alltoallv")
        if plan.schedule == "adaptive" or plan.ep_overlap:
            flags.append("--moe-fb-overlap")
        if plan.recompute == "fine-grained":
            flags.append("--moe-zero-memory level0")
    if plan.schedule == "dualpipev":
        flags = [flag for flag in flags if not flag.startswith("--num-virtual-stages")] + [
            "--schedules-method dualpipev"
        ]
    if plan.noop_slots:
        first = model.layers
        flags.append("--noop-layers " + ",".join(str(first + i) for i in range(plan.noop_slots)))
    if plan.swap:
        flags.append("--swap-attention")
    return flags


def torchtitan_flags(model: Model, plan: Plan) -> list[str]:
    """torchtitan's command-line options (`--parallelism.*`, `--training.*`)."""
    shards = "-1"
    flags = [
        f"--parallelism.tensor_parallel_degree {plan.tp}",
        f"--parallelism.context_parallel_degree {plan.cp}",
        f"--parallelism.pipeline_parallel_degree {plan.pp}",
        f"--parallelism.data_parallel_shard_degree {shards}",
        f"--training.local_batch_size {plan.mbs * (plan.gbs and 1)}",
        f"--training.global_batch_size {plan.gbs}",
        f"--training.seq_len {plan.seq}",
    ]
    if plan.pp > 1:
        names = {
            "gpipe": "GPipe",
            "1f1b": "1F1B",
            "interleaved": "Interleaved1F1B",
            "interleaved-zb": "InterleavedZeroBubble",
            "zb-v": "ZBVZeroBubble",
            "dualpipev": "DualPipeV",
        }
        if plan.schedule not in names:
            raise UserError(f"schedule: torchtitan has no {plan.schedule!r}: choose one of {', '.join(names)}")
        flags.append(f"--parallelism.pipeline_parallel_schedule {names[plan.schedule]}")
        flags.append(f"--parallelism.pipeline_parallel_microbatch_size {plan.mbs}")
        flags.append(f"--parallelism.pipeline_parallel_layers_per_stage {-(-model.layers // (plan.pp * plan.vpp))}")
    if model.experts:
        flags.append(f"--parallelism.expert_parallel_degree {plan.expert_buckets}")
        flags.append(f"--parallelism.expert_tensor_parallel_degree {plan.etp}")
    flags.append("--activation_checkpoint.mode " + {"none": "none", "full": "full"}.get(plan.recompute, "selective"))
    if plan.precision.endswith("fp8"):
        flags.append("--model.converters float8" if plan.precision == "fp8" else "--model.converters mx")
    return flags


def launch_flags(framework: str, model: Model, cluster: Cluster, plan: Plan) -> list[str]:
    """The flags of a valid plan for a framework. Raises UserError for an unknown framework or a plan that cannot
    run."""
    plan = check_plan(model, cluster, plan)
    makers = {"megatron": megatron_flags, "mindspeed": mindspeed_flags, "torchtitan": torchtitan_flags}
    if framework not in makers:
        raise UserError(f"framework: unknown {framework!r}: choose one of {', '.join(FRAMEWORKS)}")
    return makers[framework](model, plan)
