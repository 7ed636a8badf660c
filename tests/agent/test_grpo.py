from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tenfold.agent.grpo import completion_log_probs, grpo_loss, token_log_probs
from tenfold.agent.rewards import advantages

DATA = Path(__file__).parents[1] / "data" / "agent"
ABOUT = json.loads((DATA / "grpo_masked.json").read_text())
TYPES = ["grpo", "bnpo", "dr_grpo", "dapo"]


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return load_file(DATA / "grpo_masked.safetensors")


@pytest.fixture(scope="module")
def model(tensors: dict[str, torch.Tensor]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    made = LlamaForCausalLM(LlamaConfig(**ABOUT["config"]))
    state = {name.removeprefix("state."): value for name, value in tensors.items() if name.startswith("state.")}
    missing, unexpected = made.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    made.tie_weights()
    return made.eval()


def log_probs(model: Any, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    ids = torch.cat([tensors["prompt_ids"], tensors["completion_ids"]], 1)
    attention = torch.cat([tensors["prompt_mask"], tensors["completion_mask"]], 1)
    return completion_log_probs(model, ids, attention, tensors["completion_ids"].shape[1], ABOUT["temperature"])


def loss_of(model: Any, tensors: dict[str, torch.Tensor], kind: str, mask: torch.Tensor) -> torch.Tensor:
    return grpo_loss(
        log_probs(model, tensors),
        tensors["old_per_token_logps"],
        tensors["advantages_group_std"],
        mask,
        tensors["ref_per_token_logps"],
        loss_type=kind,  # type: ignore[arg-type]
        beta=ABOUT["beta"],
        epsilon=ABOUT["epsilon"],
    ).loss


def test_log_probabilities_are_those_of_trl(model: Any, tensors: dict[str, torch.Tensor]) -> None:
    wanted = next(value for name, value in tensors.items() if name.startswith("per_token_logps"))
    inside = tensors["completion_mask"].bool()
    with torch.no_grad():
        assert (log_probs(model, tensors) - wanted)[inside].abs().max() < 1e-4


@pytest.mark.parametrize("kind", TYPES)
def test_loss_and_gradient_are_those_of_trl(kind: str, model: Any, tensors: dict[str, torch.Tensor]) -> None:
    wanted = ABOUT["results"][kind]
    model.zero_grad()
    loss = loss_of(model, tensors, kind, tensors["completion_mask"] * tensors["tool_mask"])
    loss.backward()
    norm = torch.stack([value.grad.norm() for value in model.parameters() if value.grad is not None]).norm()
    assert loss.item() == pytest.approx(wanted["loss"], abs=1e-5)
    assert norm.item() == pytest.approx(wanted["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("kind", TYPES)
def test_a_loss_that_ignores_the_mask_of_tools_is_another_one(
    kind: str, model: Any, tensors: dict[str, torch.Tensor]
) -> None:
    wanted = ABOUT["results"][kind]
    with torch.no_grad():
        ignored = loss_of(model, tensors, kind, tensors["completion_mask"]).item()
    assert ignored == pytest.approx(wanted["loss_if_tool_tokens_not_masked"], abs=1e-5)
    assert abs(ignored - wanted["loss"]) > 1e-4


def test_advantages_of_the_batch_come_from_its_rewards(tensors: dict[str, torch.Tensor]) -> None:
    groups = tensors["reward"].view(ABOUT["P"], ABOUT["G"]).tolist()
    ours = [value for group in groups for value in advantages(group)]
    assert ours == pytest.approx(tensors["advantages_group_std"].tolist(), abs=1e-6)


@pytest.mark.parametrize("kind", TYPES)
def test_what_was_given_changes_nothing_whatever_its_numbers(kind: str) -> None:
    torch.manual_seed(0)
    now, old, reference = torch.randn(3, 4, 6).unbind(0)
    mask = (torch.rand(4, 6) > 0.4).float()
    results = []
    for filler in (0.0, float("-inf"), float("nan")):
        now_, old_, reference_ = (torch.where(mask > 0, value, torch.tensor(filler)) for value in (now, old, reference))
        now_.requires_grad_()
        advantage = torch.randn(4, generator=torch.manual_seed(1))
        result = grpo_loss(now_, old_, advantage, mask, reference_, loss_type=kind)  # type: ignore[arg-type]
        result.loss.backward()
        assert now_.grad is not None and now_.grad.isfinite().all()
        assert (now_.grad[mask == 0] == 0).all()
        results.append((result.loss.item(), result.kl, result.clipped, result.tokens))
    assert results[0] == results[1] == results[2]


def test_a_brute_force_twin_agrees() -> None:
    torch.manual_seed(2)
    now, old, reference = (0.3 * torch.randn(3, 3, 5)).unbind(0)
    advantage, mask = torch.randn(3), (torch.rand(3, 5) > 0.3).float()
    rows = []
    for row in range(3):
        total = count = 0.0
        for t in range(5):
            if mask[row, t]:
                ratio = torch.exp(now[row, t] - old[row, t]).item()
                gain = min(ratio * advantage[row].item(), min(max(ratio, 0.8), 1.2) * advantage[row].item())
                d = (reference[row, t] - now[row, t]).item()
                total += -gain + 0.1 * (torch.exp(torch.tensor(d)).item() - d - 1)
                count += 1
        rows.append(total / max(count, 1))
    ours = grpo_loss(now, old, advantage, mask, reference, beta=0.1).loss.item()
    assert ours == pytest.approx(sum(rows) / 3, abs=1e-6)


def test_rows_without_a_chosen_token_give_a_finite_loss() -> None:
    zeros = torch.zeros(2, 3, requires_grad=True)
    for kind in TYPES:
        result = grpo_loss(zeros, zeros.detach(), torch.ones(2), torch.zeros(2, 3), beta=0.0, loss_type=kind)  # type: ignore[arg-type]
        assert result.loss.item() == 0 and result.tokens == 0


def test_a_penalty_without_a_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="reference"):
        grpo_loss(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1), torch.ones(1, 1))


def test_log_probabilities_are_those_of_a_softmax_at_the_temperature() -> None:
    logits, ids = torch.randn(2, 4, 9), torch.randint(0, 9, (2, 4))
    wanted = torch.log_softmax(logits / 0.9, -1).gather(-1, ids[..., None])[..., 0]
    assert torch.allclose(token_log_probs(logits, ids, 0.9), wanted, atol=1e-6)
