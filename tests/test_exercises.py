"""The README's exercises 7 and 8: skipped until losses.py has the function."""

import pytest
import torch

import losses


def needed(name):
    """The student's function, or a skip."""
    if not hasattr(losses, name):
        pytest.skip(f"exercise: write losses.{name} (README)")
    return getattr(losses, name)


def test_gradient_of_eq_4():
    """By p, of loss = mean_b sum_i sum_j (p - q) log((p + eps) / (q + eps)), as autograd has it."""
    gradient, g = needed("matrix_kl_gradient"), torch.Generator().manual_seed(0)
    p, q = (torch.rand(3, 4, 5, generator=g).double().softmax(-1) for _ in "pq")
    row_mask = torch.tensor([[True] * 4, [True] * 3 + [False], [True, False, False, False]])
    p.requires_grad_()
    (wanted,) = torch.autograd.grad(losses.matrix_kl(p, q, row_mask), p)
    torch.testing.assert_close(gradient(p.detach(), q, row_mask, 1e-6), wanted)


def test_half_the_iterations():
    """ipot_fast(cost, text_mask, region_mask, iterations=25): rows and columns sum as the plan's
    must, and it costs no more than ipot's after 50.
    """
    fast, g = needed("ipot_fast"), torch.Generator().manual_seed(0)
    cost = torch.rand(8, 9, 12, generator=g).double() * 2
    text_mask = torch.arange(9)[None] < torch.randint(3, 10, (8, 1), generator=g)
    region_mask = torch.arange(12)[None] < torch.randint(4, 13, (8, 1), generator=g)
    T, slow = (
        fast(cost, text_mask, region_mask, iterations=25),
        losses.ipot(cost, text_mask, region_mask, iterations=50),
    )
    n, m = text_mask.sum(1), region_mask.sum(1)
    torch.testing.assert_close(T.sum(2), text_mask / n[:, None].double(), atol=1e-6, rtol=0)
    miss = lambda plan: (plan.sum(1) - region_mask / m[:, None].double()).abs().max()
    assert (T >= 0).all() and miss(T) <= 1.05 * miss(slow)
    assert ((T - slow) * cost).sum() <= 1e-3
