"""Written-out gradients equal those of the composed operations, and are not kept in more memory than promised."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import decoder

from tenfold.llm.kernels import cross_entropy, rms_norm


def rounded(*shape, seed=0, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).requires_grad_()


@pytest.mark.parametrize("shape", [(2, 5, 12), (7, 12), (1, 2, 3, 12)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_rms_norm_and_its_gradients_equal_the_composed_ones_in_float64(shape, scale):
    x, gain, weights = rounded(*shape, scale=scale), rounded(12, seed=1), rounded(*shape, seed=2).detach()
    eps = 1e-6
    (rms_norm(x, gain, eps) * weights).sum().backward()
    exact_x, exact_gain = (t.detach().double().requires_grad_() for t in (x, gain))
    exact = exact_x / (exact_x.square().mean(-1, keepdim=True) + eps).sqrt() * exact_gain
    (exact * weights.double()).sum().backward()
    torch.testing.assert_close(rms_norm(x, gain, eps).double(), exact, atol=1e-6, rtol=1e-6)
    for found, wanted in ((x.grad, exact_x.grad), (gain.grad, exact_gain.grad)):
        assert (found.double() - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_rms_norm_computes_only_the_gradients_that_are_asked_for():
    x, gain = rounded(3, 8), rounded(8, seed=1)
    [alone] = torch.autograd.grad(rms_norm(x, gain.detach(), 1e-5).sum(), x)
    both = torch.autograd.grad(rms_norm(x, gain, 1e-5).sum(), (x, gain))
    assert torch.equal(alone, both[0])
    [alone] = torch.autograd.grad(rms_norm(x.detach(), gain, 1e-5).sum(), gain)
    assert torch.equal(alone, both[1])


def test_rms_norm_takes_other_precisions():
    x, gain = rounded(3, 8).bfloat16(), rounded(8, seed=1).bfloat16()
    assert torch.equal(rms_norm(x, gain, 1e-5), F.rms_norm(x, (8,), gain, 1e-5))
    assert rms_norm(x.double(), gain.double(), 1e-5).dtype == torch.float64


@pytest.mark.parametrize("shape", [(6, 40), (2, 3, 40)])
def test_cross_entropy_and_its_gradient_equal_the_composed_ones(shape):
    base = rounded(*shape, scale=4.0)
    targets = torch.randint(40, shape[:-1], generator=torch.Generator().manual_seed(3))
    expected = F.cross_entropy(base.flatten(0, -2), targets.flatten())
    [wanted] = torch.autograd.grad(expected, base)
    loss = cross_entropy(base * 1, targets)
    [found] = torch.autograd.grad(2 * loss, base)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found, 2 * wanted, atol=1e-7, rtol=1e-5)


def test_cross_entropy_is_finite_where_a_probability_underflows():
    scores = torch.tensor([[0.0, -500.0, 3.0]], requires_grad=True)
    loss = cross_entropy(scores * 1, torch.tensor([1]))
    loss.backward()
    assert loss.item() == pytest.approx(503.0486, abs=1e-3)
    torch.testing.assert_close(scores.grad, torch.tensor([[0.0474, -1.0, 0.9526]]), atol=1e-3, rtol=0)


def test_the_gradient_takes_the_place_of_the_logits():
    base = rounded(4, 30)
    logits = base * 1
    places = []
    logits.register_hook(lambda grad: places.append(grad.data_ptr()))
    address = logits.data_ptr()
    cross_entropy(logits, torch.tensor([1, 2, 3, 4])).backward()
    assert places == [address]


def test_a_second_backward_pass_is_refused_and_not_wrong():
    base = rounded(4, 30)
    loss = cross_entropy(base * 1, torch.tensor([1, 2, 3, 4]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_without_gradients_the_logits_stay_as_they_are():
    logits = rounded(4, 30).detach()
    before = logits.clone()
    assert cross_entropy(logits, torch.tensor([1, 2, 3, 4])).item() > 0
    assert torch.equal(logits, before)


def test_tied_embeddings_have_the_gradient_of_both_their_uses():
    tied, ids = decoder(tied=True), torch.tensor([[3, 7, 3, 200, 9]])
    targets = torch.tensor([[7, 3, 200, 9, 3]])
    cross_entropy(tied(ids), targets).backward()
    untied = decoder(tied=False)
    untied.load_state_dict(tied.state_dict())
    cross_entropy(untied(ids), targets).backward()
    both = untied.embed.weight.grad + untied.lm_head.weight.grad
    torch.testing.assert_close(tied.embed.weight.grad, both, atol=1e-6, rtol=1e-5)


def test_gradients_of_tied_embeddings_add_up_over_micro_batches():
    model, rows = decoder(tied=True), torch.tensor([[3, 7, 3, 200], [9, 3, 1, 7]])
    (whole,) = torch.autograd.grad(cross_entropy(model(rows[:, :-1]), rows[:, 1:]), model.embed.weight)
    for row in rows:
        (cross_entropy(model(row[None, :-1]), row[None, 1:]) / 2).backward()
    torch.testing.assert_close(model.embed.weight.grad, whole, atol=1e-6, rtol=1e-5)
