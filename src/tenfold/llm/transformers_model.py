"""The decoder as a transformers model, for `generate`, TRL, PEFT, lm-eval and vLLM's transformers backend.

Importing this module registers `tenfold_llm` with AutoConfig, AutoModel and AutoModelForCausalLM:

    import tenfold.llm.transformers_model
    model = AutoModelForCausalLM.from_pretrained(folder)  # a folder that `save_hf` or `tenfold llm convert` wrote

The layers are those of `model.py`. Attention goes through transformers' own interface, with its masks and its caches,
so that left padding, packed rows by `position_ids`, static caches and other attention kernels work as they do there.
What vLLM's backend asks of a model (attention by that interface, keyword arguments handed down to it, a base model with
a tensor-parallel plan) follows its documentation; it has not been run. `vllm_plugin.py` tells vLLM of the class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tenfold.llm.config import ModelConfig
from tenfold.llm.families import config_from_hf, config_to_hf
from tenfold.llm.key_tables import LAYOUTS, to_ours, to_theirs
from tenfold.llm.model import Attention, Decoder, RMSNorm, post_norm_gains, turns_at

# What transformers calls the cache in its outputs and mask functions: `cache` from 5.24 on.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"

# transformers' names of the kinds of layers.
LAYER_TYPES = {"full": "full_attention", "sliding": "sliding_attention"}


class TenfoldConfig(PreTrainedConfig):
    """ModelConfig under transformers' names; what these lack keeps our names. Made by `TenfoldConfig.of`."""

    model_type = "tenfold_llm"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 - transformers wants a list
    base_model_tp_plan = {  # noqa: RUF012 - as above, a dict
        "layers.*.attention.q": "colwise",
        "layers.*.attention.k": "colwise",
        "layers.*.attention.v": "colwise",
        "layers.*.attention.o": "rowwise",
        "layers.*.mlp.gate": "colwise",
        "layers.*.mlp.up": "colwise",
        "layers.*.mlp.down": "rowwise",
    }
    base_model_pp_plan = {  # noqa: RUF012 - as above
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 256
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    intermediate_size: int = 128
    head_dim: int | None = None
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    rope_parameters: dict | None = None
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool = True

    @classmethod
    def of(cls, config: ModelConfig) -> TenfoldConfig:
        """The configuration of a decoder."""
        return cls(**config_to_hf(config))

    def decoder_config(self) -> ModelConfig:
        """The same as ModelConfig."""
        return config_from_hf({**self.to_dict(), "model_type": self.model_type}, type(self).__name__)


@dataclass
class _Context:
    """What attention needs beside queries, keys and values; it travels where `Documents` do in our own model."""

    mask: Any
    arguments: dict[str, Any] = field(default_factory=dict)


class _LayerCache:
    """One layer of a transformers cache, as our attention takes it."""

    def __init__(self, cache: Cache, layer: int) -> None:
        self.cache, self.layer = cache, layer

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add positions (B, G, T, c); return all keys and values that the cache keeps."""
        return self.cache.update(keys, values, self.layer)


def _attend(
    attention: Attention,
    config: TenfoldConfig,
    softcap: float,
    window: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    context: _Context,
) -> Tensor:
    """Attention by the implementation that the configuration names; shapes as in `attention.attend`."""
    named = config._attn_implementation or "eager"
    # Only some of transformers' kernels bound the scores; the plain way always does.
    bounded = not softcap or named.startswith(("flash", "flex"))
    function = ALL_ATTENTION_FUNCTIONS.get_interface(named, eager_attention) if bounded else eager_attention
    extra: dict[str, Any] = {"softcap": softcap} if softcap else {}
    if window:
        extra["sliding_window"] = window
    mixed, _ = function(attention, q, k, v, context.mask, scaling=scale, dropout=0.0, **extra, **context.arguments)
    return mixed.reshape(q.shape[0], q.shape[2], -1, v.shape[-1]).transpose(1, 2)


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, Tensor]:
    """Attention in plain operations, in the form of transformers' interface.

    Args:
        module: unused; part of the interface.
        query: (B, H, T, c).
        key: (B, G, S, c).
        value: (B, G, S, c).
        attention_mask: added to the scores, or boolean with True where a key is seen; None is causal.
        arguments: `scaling`, and `softcap` where scores are bounded.

    Returns:
        (B, T, H, c), and the weights (B, H, T, S).
    """
    groups, length, total = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * arguments["scaling"]
    if softcap := arguments.get("softcap"):
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is None:
        attention_mask = torch.ones(length, total, dtype=torch.bool, device=query.device).tril(total - length)
    if attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class ScaledEmbedding(nn.Embedding):
    """Token embeddings times a constant, inside the module so that `inputs_embeds` mean what they do in Gemma."""

    def __init__(self, vocabulary: int, width: int, scale: float) -> None:
        super().__init__(vocabulary, width)
        self.embed_scale = scale

    def forward(self, input: Tensor) -> Tensor:
        """Ids (B, T) to (B, T, d)."""
        embedded = super().forward(input)
        if self.embed_scale == 1.0:
            return embedded
        return embedded * torch.tensor(self.embed_scale, dtype=embedded.dtype)  # rounded like the weights


class TenfoldPreTrainedModel(PreTrainedModel):
    """What both classes below tell transformers about themselves."""

    config_class = TenfoldConfig
    config: TenfoldConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block", "PostNormBlock"]  # noqa: RUF012 - transformers wants a list
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012 - as above
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw what a checkpoint did not bring. transformers goes through the modules by themselves, without names."""
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, 0.0, module.initial_std)  # type: ignore[arg-type]
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            init.constant_(module.weight, module.initial_gain)  # type: ignore[arg-type]


def _note_starts(root: nn.Module, config: ModelConfig) -> None:
    """Write on every module how it starts, as `model.initialise` draws it."""
    tiny, small = math.sqrt(1 / (2 * config.width * config.layers)), math.sqrt(2 / (5 * config.width))
    inner, outer = (tiny, tiny) if config.init == "tiny" else (small, small / math.sqrt(config.layers))
    attention_gain, mlp_gain = post_norm_gains(config) if config.has_post_norms else (1.0, 1.0)
    for name, module in root.named_modules():
        if isinstance(module, nn.Embedding):
            module.initial_std = config.embedding_std  # type: ignore[assignment]
        elif isinstance(module, nn.Linear):
            module.initial_std = outer if name.endswith((".o", ".down")) else inner  # type: ignore[assignment]
        elif isinstance(module, RMSNorm):
            after = {"post_attention_norm": attention_gain, "post_mlp_norm": mlp_gain}
            gain = after.get(name.rpartition(".")[2], 1.0)
            module.initial_gain = gain - module.offset  # type: ignore[assignment]


class TenfoldModel(TenfoldPreTrainedModel):
    """The decoder without its output matrix.

    Args:
        config: as `TenfoldConfig.of` makes it.
    """

    def __init__(self, config: TenfoldConfig) -> None:
        super().__init__(config)
        self.architecture = config.decoder_config()
        decoder = Decoder(self.architecture)
        self.embed_tokens = ScaledEmbedding(config.vocab_size, config.hidden_size, self.architecture.embedding_scale)
        self.layers, self.norm = decoder.layers, decoder.final_norm
        self.rotary, self.local_rotary = decoder.rotary, decoder.local_rotary
        for number, layer in enumerate(self.layers):
            self._dispatch_attention(number, layer.attention)  # type: ignore[arg-type]
        self.gradient_checkpointing = False
        _note_starts(self, self.architecture)
        self.post_init()

    def _dispatch_attention(self, number: int, attention: Attention) -> None:
        """Send a layer's attention through transformers' interface, which reads these attributes of the module."""
        described = self.architecture
        window = described.sliding_window if described.kind(number) == "sliding" else 0
        attention.layer_idx = number  # type: ignore[assignment]
        attention.is_causal = True  # type: ignore[assignment]
        attention.scaling = attention.scale  # type: ignore[assignment]
        attention.num_key_value_groups = described.heads // described.kv_heads  # type: ignore[assignment]
        attention.attend = partial(_attend, attention, self.config, described.attention_softcap, window)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Normalised output of the last layer, in the form of transformers' decoders.

        Args:
            input_ids: (B, T); either these or `inputs_embeds`.
            attention_mask: (B, S) with 0 where a token is padding, or a mask that transformers prepared.
            position_ids: (B, T); rows that start again at 0 are packed documents, which do not see each other.
            past_key_values: a transformers cache, which the tokens go on from and join.
            inputs_embeds: (B, T, d).
            use_cache: make a cache where none is given.
            output_hidden_states: also give the input of every layer and the normalised output of the last.
            return_dict: False gives a tuple.
            cache: newer name of `past_key_values`.
            kwargs: handed down to the attention.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        h = inputs_embeds if inputs_embeds is not None else self.embed_tokens(input_ids)
        checkpointing = self.gradient_checkpointing and self.training
        use_cache = (self.config.use_cache if use_cache is None else use_cache) and not checkpointing
        cache = cache if cache is not None else past_key_values
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        cache = cache if not checkpointing else None  # a layer that is computed again would join it again
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(past, past + h.shape[1], device=h.device)[None]
        turns = turns_at(self.architecture, self.rotary, self.local_rotary, position_ids[:, None])
        masks = self._masks(h, attention_mask, cache, position_ids)
        states = [h]
        for number, layer in enumerate(self.layers):
            kind = self.architecture.kind(number)
            context = _Context(masks[LAYER_TYPES[kind]], kwargs)
            one = _LayerCache(cache, number) if cache is not None else None
            if checkpointing:
                h = self._gradient_checkpointing_func(layer.__call__, h, turns[kind], context, one)
            else:
                h = layer(h, turns[kind], context, one)
            states.append(h)
        h = states[-1] = self.norm(h)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = BaseModelOutputWithPast(
            last_hidden_state=h,
            hidden_states=tuple(states) if wanted else None,
            **{CACHE: cache},  # type: ignore[arg-type]
        )
        return output if _as_dict(self.config, return_dict) else output.to_tuple()

    def _masks(self, h: Tensor, attention_mask: Any, cache: Cache | None, position_ids: Tensor) -> dict[str, Any]:
        """The mask of each kind of layer, as the attention implementation wants it."""
        if isinstance(attention_mask, dict):  # `generate` has prepared them
            return attention_mask
        arguments = {
            "config": self.config,
            "inputs_embeds": h,
            "attention_mask": attention_mask,
            CACHE: cache,
            "position_ids": position_ids,
        }
        masks = {"full_attention": create_causal_mask(**arguments)}
        if "sliding" in self.architecture.layer_kinds:
            masks["sliding_attention"] = create_sliding_window_causal_mask(**arguments)
        return masks


class TenfoldForCausalLM(TenfoldPreTrainedModel, GenerationMixin):
    """The decoder with its output matrix.

    Args:
        config: as `TenfoldConfig.of` makes it.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - transformers wants a dict
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012 - as above
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]  # noqa: RUF012 - as above

    def __init__(self, config: TenfoldConfig) -> None:
        super().__init__(config)
        self.model = TenfoldModel(config)
        self.architecture = self.model.architecture
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        _note_starts(self, self.architecture)
        self.post_init()

    @classmethod
    def from_decoder(cls, decoder: Decoder) -> TenfoldForCausalLM:
        """The same model for transformers' tools; the two share their parameters."""
        with torch.device("meta"):
            model = cls(TenfoldConfig.of(decoder.config))
        parameters = to_theirs(LAYOUTS["tenfold"], decoder.state_dict(keep_vars=True))
        model.load_state_dict(parameters, assign=True)
        if decoder.config.tied:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model.train(decoder.training)

    def to_decoder(self) -> Decoder:
        """The same model as a decoder of its own; the two share their parameters."""
        with torch.device("meta"):
            decoder = Decoder(self.architecture)
        decoder.load_state_dict(to_ours(LAYOUTS["tenfold"], self.state_dict(keep_vars=True)), assign=True)
        if self.architecture.tied:
            decoder.lm_head.weight = decoder.embed.weight
        return decoder.train(self.training)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Scores of the next token, in the form of transformers' decoders.

        Args:
            input_ids: as in `TenfoldModel`, like all that is not named here.
            attention_mask: as there.
            position_ids: as there.
            past_key_values: as there.
            inputs_embeds: as there.
            labels: (B, T), -100 where there is no loss; they are shifted here.
            use_cache: as there.
            output_hidden_states: as there.
            return_dict: as there.
            logits_to_keep: how many of the last positions get scores (0: all), or which ones.
            cache: as there.
            kwargs: handed down to the attention and the loss.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])  # slice(-0, None) keeps all
        if cap := self.architecture.logit_softcap:
            logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            **{CACHE: output.get(CACHE)},
        )
        return result if _as_dict(self.config, return_dict) else result.to_tuple()


def _as_dict(config: TenfoldConfig, asked: bool | None) -> bool:
    return bool(config.return_dict if asked is None else asked)


def register() -> None:
    """Make `tenfold_llm` known to transformers' Auto classes; importing this module does so."""
    AutoConfig.register(TenfoldConfig.model_type, TenfoldConfig, exist_ok=True)
    AutoModel.register(TenfoldConfig, TenfoldModel, exist_ok=True)
    AutoModelForCausalLM.register(TenfoldConfig, TenfoldForCausalLM, exist_ok=True)


register()
