"""Readers: shipped presets, YAML sheets, Hugging Face config.json, published throughput rows. Errors are raised
here."""

from __future__ import annotations

import csv
import dataclasses
import difflib
import json
import math
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from tenfold.core.console import UserError
from tenfold.planner.config import PRECISIONS, Hardware, Model, Plan

_MOST = 1 << 30  # devices, sequences or tokens that a row may state


@lru_cache(maxsize=8)
def _preset_table(name: str) -> dict[str, Any]:
    return json.loads(resources.files("tenfold.planner").joinpath("assets", name).read_text(encoding="utf-8"))


def model_names() -> list[str]:
    """Names of the shipped model shapes."""
    return sorted(_preset_table("models.json"))


def hardware_names() -> list[str]:
    """Names of the shipped hardware sheets."""
    return sorted(_preset_table("hardware.json"))


def _unknown(kind: str, name: str, known: list[str]) -> UserError:
    near = difflib.get_close_matches(name.lower(), known, n=4, cutoff=0.3) or known[:6]
    return UserError(f"{kind}: unknown {name!r}; nearest: {', '.join(near)} (or give a YAML file)")


def model_preset(name: str) -> Model:
    """A shipped model shape by name (case-insensitive). Raises UserError with the nearest names."""
    table = _preset_table("models.json")
    key = next((key for key in table if key.lower() == name.lower()), None)
    if key is None:
        raise _unknown("model", name, sorted(table))
    return Model(name=key, **table[key])


def hardware_preset(name: str) -> Hardware:
    """A shipped hardware sheet by name (case-insensitive). Raises UserError with the nearest names."""
    table = _preset_table("hardware.json")
    key = next((key for key in table if key.lower() == name.lower()), None)
    if key is None:
        raise _unknown("hardware", name, sorted(table))
    return Hardware(name=key, **table[key])


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable text file ({error})") from None
    if path.suffix == ".json":
        try:
            value = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error})") from None
    else:
        import yaml

        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a mapping of fields, found {type(value).__name__}")
    return value


_TYPES = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "float | None": (int, float, type(None)),
}


def build(cls: type, values: dict[str, Any], where: str) -> Any:
    """A flat dataclass from a mapping; unknown, missing and ill-typed fields are named in the error."""
    known = {field.name: field for field in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), list(known), n=3, cutoff=0.4)
            raise UserError(
                f"{where}: unknown field {key!r}"
                + (f"; nearest: {', '.join(near)}" if near else f"; known: {', '.join(known)}")
            )
        kinds = _TYPES.get(str(known[key].type), (str,))
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise UserError(f"{where}: {key} is {value!r}, expected {known[key].type}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}: {key} is {value}, expected a finite number")
    missing = [f.name for f in known.values() if f.default is dataclasses.MISSING and f.name not in values]
    if missing:
        raise UserError(f"{where}: missing {', '.join(missing)}")
    return cls(**values)


def load_model(name_or_path: str) -> Model:
    """A preset's name, a YAML/JSON file of `Model` fields, or a Hugging Face config.json."""
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml", ".json") or path.is_file():
        values = _read_mapping(path)
        if any(key in values for key in ("hidden_size", "n_embd", "d_model", "text_config")):
            model = model_from_hf(values, where=str(path), name=path.parent.name or path.stem)
        else:
            model = build(Model, {"name": path.stem, **values}, str(path))
        check_model(model, str(path))
        return model
    return model_preset(name_or_path)


def load_hardware(name_or_path: str) -> Hardware:
    """A preset's name or a YAML/JSON file of `Hardware` fields."""
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml", ".json") or path.is_file():
        sheet: Hardware = build(Hardware, {"name": path.stem, "fp8": None, **_read_mapping(path)}, str(path))
        for field in ("bf16", "mem_gib", "mem_bw", "intra_gbs", "inter_gbs", "per_node", "host_gbs"):
            if getattr(sheet, field) <= 0:
                raise UserError(f"{path}: {field} is {getattr(sheet, field)}, expected a positive number")
        return sheet
    return hardware_preset(name_or_path)


def load_plan(path: str, **overrides: Any) -> Plan:
    """A plan from a YAML/JSON file of `Plan` fields."""
    return build(Plan, {**_read_mapping(Path(path)), **overrides}, path)


def check_model(model: Model, where: str = "model") -> None:
    """Refuse shapes that no transformer has. Raises UserError naming the field, the value and what fits."""
    for field in ("layers", "hidden", "heads", "kv_heads", "head_dim", "vocab"):
        value = getattr(model, field)
        if value < 1 or value > 10_000_000:
            raise UserError(f"{where}: {field} is {value}, expected 1 to 10000000")
    for field in ("ffn", "experts", "topk", "moe_ffn", "shared_ffn", "first_dense", "mtp", "window"):
        if getattr(model, field) < 0:
            raise UserError(f"{where}: {field} is {getattr(model, field)}, expected 0 or more")
    if model.experts:
        if not 1 <= model.topk <= model.experts:
            raise UserError(f"{where}: topk is {model.topk} with {model.experts} experts: choose 1 to {model.experts}")
        if model.expert_groups and (model.topk % model.expert_groups or model.experts % model.expert_groups):
            near = [n for n in range(1, model.topk + 1) if model.topk % n == 0 and model.experts % n == 0]
            raise UserError(
                f"{where}: expert_groups is {model.expert_groups}, expected a divisor of topk {model.topk} and "
                f"experts {model.experts}: {near}"
            )
        if model.moe_ffn < 1:
            raise UserError(f"{where}: moe_ffn is {model.moe_ffn}, expected 1 or more with {model.experts} experts")
        if model.first_dense > model.layers:
            raise UserError(f"{where}: first_dense is {model.first_dense}, expected at most layers = {model.layers}")
    if (not model.experts or model.first_dense) and model.ffn < 1:
        raise UserError(f"{where}: ffn is {model.ffn}, expected 1 or more where a layer is dense")
    if model.heads % model.kv_heads:
        raise UserError(f"{where}: kv_heads is {model.kv_heads}, expected a divisor of heads = {model.heads}")


def _pick(values: dict[str, Any], *names: str, default: Any = None) -> Any:
    return next((values[name] for name in names if values.get(name) is not None), default)


# What the configuration classes of these families leave unsaid.
_UNGATED = (
    *("gpt2", "gpt_neo", "gpt_neox", "gptj", "codegen", "gpt_bigcode", "starcoder2", "mpt", "opt", "bloom", "falcon"),
    *("nemotron", "phi", "persimmon"),
)
_TIED = (
    *("gpt2", "gpt_neo", "gpt_bigcode", "starcoder2", "mpt", "opt", "bloom", "falcon", "gemma", "gemma2", "gemma3"),
    *("gemma3_text", "cohere", "cohere2"),
)
_SANDWICH = ("gemma2", "gemma3", "gemma3_text")


def model_from_hf(values: dict[str, Any], where: str = "config.json", name: str = "imported") -> Model:
    """A `Model` from a Hugging Face config.json (Llama, Qwen, Mixtral, DeepSeek, Kimi, GLM, openPangu, GPT-OSS, OLMoE,
    DBRX, Gemma, Falcon, StarCoder, GPT-2/J/NeoX, OPT, BLOOM, MPT; of a model for pictures its text part).

    MoE layers that alternate with dense ones are counted exactly, but laid out as if the dense ones came first. Learned
    positions and biases are not counted.

    Raises:
        UserError: a needed key is missing.
    """
    parts = [values.get(key) for key in ("text_config", "attn_config", "ffn_config")]
    for part in parts:
        values = {**values, **part} if isinstance(part, dict) else values
    hidden = _pick(values, "hidden_size", "n_embd", "d_model")
    heads = _pick(values, "num_attention_heads", "n_head", "n_heads")
    layers = _pick(values, "num_hidden_layers", "n_layer", "n_layers")
    vocab = values.get("vocab_size")
    named = (
        ("hidden_size", hidden),
        ("num_attention_heads", heads),
        ("num_hidden_layers", layers),
        ("vocab_size", vocab),
    )
    for label, value in named:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{where}: {label} is {value!r}, expected a positive whole number")

    def count(*names: str, default: int = 0) -> int:
        """The first of the keys that is there, a whole number."""
        for label in names:
            value = values.get(label)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise UserError(f"{where}: {label} is {value!r}, expected a whole number of 0 or more")
            return value
        return default

    mla = bool(values.get("kv_lora_rank") or values.get("attention_kv_lora_dim"))
    nope, rope = count("qk_nope_head_dim", "attention_qk_dim"), count("qk_rope_head_dim", "attention_qk_rope_dim")
    kind = str(values.get("model_type", ""))
    ratio = values.get("expansion_ratio", 4)
    if not isinstance(ratio, (int, float)) or isinstance(ratio, bool) or not 0 < ratio < 1000:
        raise UserError(f"{where}: expansion_ratio is {ratio!r}, expected a positive number")
    routed = ("n_routed_experts", "num_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
    experts = count(*routed)
    width = count("intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim", default=int(hidden * ratio))
    ffn = count("intermediate_size_mlp", default=width)
    topk = count("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk") if experts else 0
    moe_ffn = count("moe_intermediate_size", "expert_intermediate_size", default=width) if experts else 0
    shared = count("n_shared_experts", "num_shared_experts", default=int("llama4" in kind)) if experts else 0
    shared_ffn = count("shared_expert_intermediate_size", default=shared * moe_ffn) if experts else 0
    first_dense = count("first_k_dense_replace", "num_dense_layers") if experts else 0
    pattern = values.get("moe_layer_freq")  # of some families a list with a 1 for every MoE layer
    if isinstance(pattern, list):
        values = {**values, "moe_layer_freq": None}
    every = count("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_freq", default=1) or 1
    if experts and isinstance(pattern, list):
        first_dense = sum(not one for one in pattern[:layers])
    elif experts and every > 1:
        first_dense = layers - max(layers // every - first_dense // every, 0)
    layer_types = values.get("layer_types") or []
    windowed = sum(kind_ == "sliding_attention" for kind_ in layer_types)
    window = count("sliding_window") if windowed else 0
    one = bool(values.get("multi_query")) and not values.get("new_decoder_architecture")
    kv_heads = heads if mla else count("num_key_value_heads", "num_kv_heads", "kv_n_heads", default=1 if one else heads)
    model = Model(
        name=str(_pick(values, "_name_or_path", default="") or name).rstrip("/").rsplit("/", 1)[-1] or name,
        layers=layers,
        hidden=hidden,
        ffn=ffn if not experts or first_dense else 0,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=nope + rope if mla else count("head_dim", default=hidden // heads),
        vocab=int(vocab or 0),
        gated=kind not in _UNGATED,
        tied=bool(values.get("tie_word_embeddings", kind in _TIED)),
        attention="mla" if mla else ("mha" if kv_heads == heads else "gqa"),
        experts=experts,
        topk=topk,
        moe_ffn=moe_ffn,
        shared_experts=shared or (1 if shared_ffn else 0),
        shared_ffn=shared_ffn,
        first_dense=first_dense,
        mtp=count("num_nextn_predict_layers", "num_mtp_layers"),
        q_lora=count("q_lora_rank", "attention_q_lora_dim") if mla else 0,
        kv_lora=count("kv_lora_rank", "attention_kv_lora_dim") if mla else 0,
        qk_nope=nope if mla else 0,
        qk_rope=rope if mla else 0,
        v_head=count("v_head_dim", "attention_v_dim") if mla else 0,
        window=window,
        window_every=max(1, round(layers / windowed)) if windowed else 0,
        sandwich_norm=bool(values.get("sandwich_norm", kind in _SANDWICH)),
        source=where,
    )
    check_model(model, where)
    return model


@dataclass(frozen=True)
class Row:
    """One published run.

    Attributes:
        identity: the row's id, for messages; no equation looks at it.
        model: shape.
        hardware: sheet.
        devices: number of devices.
        plan: layout; its stack is the row's.
        tokens_per_s: reported tokens/s/device, None where not published.
        tflops: reported model TFLOP/s per device, None where not published.
        memory_gib: reported memory, None where not published.
        recalled: figures from memory of a paper, or a layout that is assumed or not verified: weighed low.
        family: dense or moe.
        assumed: fields that the row leaves out and we had to fill in.
    """

    identity: str
    model: Model
    hardware: Hardware
    devices: int
    plan: Plan
    tokens_per_s: float | None
    tflops: float | None
    memory_gib: float | None
    recalled: bool
    family: str
    assumed: tuple[str, ...] = ()

    @property
    def cluster(self) -> str:
        """Rows of one cluster are left out together in cross-validation."""
        return f"{self.model.name}@{self.hardware.name}"


def _number(row: dict[str, str], key: str, where: str) -> float | None:
    text = (row.get(key) or "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"{where}: {key} is {text!r}, expected a number") from None
    if not math.isfinite(value) or value < 0:
        raise UserError(f"{where}: {key} is {text}, expected a finite number of 0 or more")
    return value


def _schedule_of(text: str, pp: int, vpp: int) -> str:
    text = text.lower()
    if pp == 1:
        return "none"
    if "dualpipe" in text:
        return "dualpipev"
    if "overlap" in text or "adaptive" in text:
        return "adaptive"
    return "interleaved" if vpp > 1 else "1f1b"


def recompute_of(text: str) -> str:
    """Our policy name for the words of a row: none, selective, fine-grained, moe, full or unstated."""
    text = text.lower().strip()
    if "full" in text:
        return "full"
    if "unstated" in text:
        return "unstated"
    if "moe" in text:
        return "moe"
    if "fine" in text or "swap" in text or "," in text or text == "norm" or "layernorm" in text:
        return "fine-grained"
    return "selective" if "selective" in text else "none"


def read_rows(path: str | Path) -> list[Row]:
    """Published throughput rows of a CSV with the columns of the validation table.

    Raises:
        UserError: a missing file or column, a number that is none, an unknown model or hardware.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            records = list(csv.DictReader(file))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a readable CSV ({error})") from None
    if not records:
        raise UserError(f"{path}: no rows")
    for column in ("model", "hardware", "devices", "tp", "pp", "gbs", "seq", "tokens_per_s_per_device"):
        if column not in records[0]:
            raise UserError(f"{path}: column {column!r} is missing; found {', '.join(k for k in records[0] if k)}")
    return [_row(record, f"{path} row {index + 2}", path.parent) for index, record in enumerate(records)]


def _dispatch_of(notes: str, stack: str, schedule: str) -> str:
    """Dispatch of a row: stated, or what the stack's recipes use (Megatron-Bridge: DeepEP or HybridEP where experts
    leave the node)."""
    if "hierarchical" in notes:
        return "hierarchical"
    return "dedup" if "deepep" in notes or "dualpipe" in schedule or stack.startswith("megatron-bridge") else "flat"


def _overlap_of(words: str, stack: str, leaves_node: bool) -> bool:
    """Whether the all-to-all runs beside another micro-batch: stated, or Megatron-Bridge's habit where experts leave
    the node (it needs chunks)."""
    return "overlap" in words or "dualpipe" in words or (stack.startswith("megatron-bridge") and leaves_node)


def _sharding_of(stated: int, stack: str) -> int:
    """ZeRO stage of a row: tables say 0 for "no FSDP", and every Megatron-like stack after 2022 shards its
    optimizer."""
    return stated if stated or stack.startswith("megatron-2021") else 1


def _beside(name: str | None, folder: Path) -> str:
    """A name of a row; a file is looked for beside the table first."""
    text = (name or "").strip()
    file = folder / text
    return str(file) if Path(text).suffix in (".json", ".yaml", ".yml") and file.is_file() else text


def _row(record: dict[str, str], where: str, folder: Path) -> Row:
    try:
        model = load_model(_beside(record["model"], folder))
        hardware = load_hardware(_beside(record["hardware"], folder))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None

    def count(key: str) -> int | None:
        value = _number(record, key, where)
        if value is not None and (value != int(value) or value > _MOST):
            raise UserError(f"{where}: {key} is {record[key]}, expected a whole number up to {_MOST}")
        return None if value is None else int(value)

    def whole(key: str, default: int) -> int:
        return count(key) or default  # tables write 0 for what is not used

    devices, tp, cp, pp, vpp = (whole(key, 1) for key in ("devices", "tp", "cp", "pp", "vpp"))
    vpp = vpp if pp > 1 else 1
    precision = (record.get("precision") or "").strip().lower() or "bf16"
    if precision not in PRECISIONS:
        raise UserError(f"{where}: precision is {precision!r}, choose one of {', '.join(PRECISIONS)}")
    notes = (record.get("notes") or "").lower()
    # "FP8-CS (FP8-MX)" names two recipes in one column of the source; the first is the one measured.
    if precision == "fp8" and "mx" in notes.split("(")[0] and "recipe" in notes:
        precision = "mxfp8"
    peak = _number(record, "peak_tflops", where)
    if peak:
        quoted_fp8 = precision.endswith("fp8")
        hardware = dataclasses.replace(hardware, fp8=peak) if quoted_fp8 else dataclasses.replace(hardware, bf16=peak)
    gbs, seq, mbs = count("gbs"), count("seq"), count("mbs")
    assumed = tuple(name for name, value in (("gbs", gbs), ("seq", seq), ("mbs", mbs)) if not value)
    dp = max(1, devices // (tp * cp * pp))
    micro = mbs or guess_micro_batch(model, hardware, tp, pp, dp, gbs or 0)
    batch = gbs or dp * micro * 4 * pp
    text = (record.get("recompute") or "") + " "
    balance = (record.get("force_balance") or "").strip()
    plan = Plan(
        tp=tp,
        cp=cp,
        pp=pp,
        vpp=vpp,
        ep=whole("ep", 1),
        tp_extend_ep="extend-ep" in notes,
        mbs=micro,
        gbs=batch,
        seq=seq or 4096,
        precision=precision,
        schedule=_schedule_of(record.get("schedule") or "", pp, vpp),
        recompute=recompute_of(text),
        swap="swap" in text.lower(),
        dispatch=_dispatch_of(notes, record.get("stack") or "", record.get("schedule") or ""),
        fsdp=_sharding_of(int(_number(record, "fsdp", where) or 0), record.get("stack") or ""),
        gradient_bytes=2 if (record.get("stack") or "").startswith("megatron-bridge") else 4,
        sequence_parallel="without sequence parallel" not in notes,
        ep_overlap=_overlap_of(
            notes + (record.get("schedule") or "").lower(),
            record.get("stack") or "",
            whole("ep", 1) > hardware.per_node and vpp > 1,
        ),
        imbalance=None if balance in ("0", "0.0") and model.experts else 1.0,
        stack=(record.get("stack") or "other").strip(),
        noop_slots=-model.layers % (pp * vpp),
    )
    return Row(
        identity=record.get("id") or where,
        model=model,
        hardware=hardware,
        devices=devices,
        plan=plan,
        tokens_per_s=_number(record, "tokens_per_s_per_device", where),
        tflops=_number(record, "model_tflops_per_device", where),
        memory_gib=_number(record, "mem_gib", where),
        recalled=(record.get("checked") or "").startswith(("recalled", "notes"))
        or "assumed" in notes
        or "not verified" in notes,
        family=model.family,
        assumed=assumed,
    )


def guess_micro_batch(model: Model, hardware: Hardware, tp: int, pp: int, dp: int, gbs: int) -> int:
    """A micro-batch size where a row states none: larger for small models without a pipeline, and one that divides
    the batch."""
    if pp > 1:
        return 1
    share = gbs // dp if gbs else 4
    for size in (16, 8, 4, 2):
        if model.hidden * size <= 24576 and share % size == 0:
            return size
    return 1
