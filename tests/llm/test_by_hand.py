"""The decoder against a second implementation in this file: any shape, norm placement and packing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.llm.attention import Documents
from tenfold.llm.config import ModelConfig
from tenfold.llm.model import Decoder


def by_hand(weights, config: ModelConfig, ids: list[int]) -> torch.Tensor:
    """Logits (T, V) of one document, head by head and position by position, from the paper's equations alone."""

    def norm(x, name, eps):
        return x / torch.sqrt((x * x).mean() + eps) * weights[f"{name}.weight"]

    def linear(x, name):
        bias = weights.get(f"{name}.bias")
        return weights[f"{name}.weight"] @ x + (0 if bias is None else bias)

    def turned(x, position):
        half, result = len(x) // 2, x.clone()
        for i in range(half):
            angle = torch.tensor(position / config.rope_base ** (2 * i / len(x)), dtype=x.dtype)
            result[i] = x[i] * angle.cos() - x[i + half] * angle.sin()
            result[i + half] = x[i + half] * angle.cos() + x[i] * angle.sin()
        return result

    c, per_key = config.head_dim, config.heads // config.kv_heads
    eps, after = config.norm_eps, config.post_norm_eps or config.norm_eps
    stream = [weights["embed.weight"][token] for token in ids]
    for layer in range(config.layers):
        at = f"layers.{layer}"
        before = config.norm != "post"
        xs = [norm(h, f"{at}.pre_attention_norm", eps) if before else h for h in stream]
        queries, keys, values = ([linear(x, f"{at}.attention.{part}").split(c) for x in xs] for part in "qkv")
        for t in range(len(ids)):
            heads = []
            for head in range(config.heads):
                q = turned(queries[t][head], t)
                scores = torch.stack([q @ turned(keys[s][head // per_key], s) / c**0.5 for s in range(t + 1)])
                shares = scores.exp() / scores.exp().sum()
                heads.append(sum(share * values[s][head // per_key] for s, share in enumerate(shares)))
            out = linear(torch.cat(heads), f"{at}.attention.o")
            if config.norm in ("sandwich", "dssn"):
                out = norm(out, f"{at}.post_attention_norm", after)
            h = stream[t] + out
            if config.norm == "post":
                h = norm(h, f"{at}.post_attention_norm", eps)
            x = norm(h, f"{at}.pre_mlp_norm", eps) if before else h
            gate = linear(x, f"{at}.mlp.gate")
            out = linear(gate / (1 + (-gate).exp()) * linear(x, f"{at}.mlp.up"), f"{at}.mlp.down")
            if config.norm in ("sandwich", "dssn"):
                out = norm(out, f"{at}.post_mlp_norm", after)
            h = h + out
            stream[t] = norm(h, f"{at}.post_mlp_norm", eps) if config.norm == "post" else h
    head = weights["embed.weight" if config.tied else "lm_head.weight"]
    return torch.stack([head @ norm(h, "final_norm", eps) for h in stream])


@given(
    norm=st.sampled_from(["pre", "sandwich", "dssn", "post"]),
    layers=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    half=st.integers(1, 4),
    ffn=st.integers(1, 20),
    base=st.sampled_from([10.0, 1e4, 1.6e7]),
    biases=st.booleans(),
    tied=st.booleans(),
    lengths=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
@settings(max_examples=8, deadline=None)
def test_any_shape_and_packing_equals_an_implementation_by_hand(
    norm, layers, kv_heads, group, half, ffn, base, biases, tied, lengths, seed
):
    config = ModelConfig(
        vocabulary=23,
        width=kv_heads * group * 5,
        layers=layers,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=2 * half,
        ffn=ffn,
        norm=norm,
        rope_base=base,
        attention_bias=biases,
        output_bias=biases,
        tied=tied,
        post_norm_eps=1e-3,
    )
    model = Decoder(config).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)
    weights = {key: value.detach().clone().requires_grad_() for key, value in model.state_dict().items()}
    ids = torch.randint(23, (1, sum(lengths)), generator=generator)
    documents = Documents(tuple(lengths))
    expected = torch.cat([by_hand(weights, config, part.tolist()) for part in ids[0].split(lengths)])
    found = model(ids, documents)[0]
    # Positions run on in our rows; the angles, float32, differ by what that rounds.
    assert (found - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max().item())
    targets = torch.randint(23, (sum(lengths),), generator=generator)
    F.cross_entropy(found, targets).backward()
    F.cross_entropy(expected, targets).backward()
    for key, parameter in model.named_parameters():
        wanted = weights[key].grad
        if wanted is None or wanted.abs().max() < 1e-12:
            assert parameter.grad is None or parameter.grad.abs().max() < 1e-9
        else:
            assert (parameter.grad - wanted).abs().max() <= 1e-5 * wanted.abs().max(), key
