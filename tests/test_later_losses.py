"""The losses that came after the five papers: each against its definition in plain loops, then
padding, precision, edge cases.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import losses
from test_losses import prefix_mask, spoil


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


TEXT, REGION = prefix_mask([4, 2, 3]), prefix_mask([3, 5, 1])


def pair_of_states(dtype=torch.float64):
    return draw(3, 4, 6, dtype=dtype), draw(3, 5, 6, seed=1, dtype=dtype), TEXT, REGION


def logits_and_positives(dtype=torch.float64):
    positive = draw(3, 4, 5, seed=3) > 0.3
    return draw(3, 4, 5, seed=2, dtype=dtype), positive, TEXT, REGION


def edited_scores(dtype=torch.float64):
    kind = torch.tensor([0, 2, -1, 0, 2, 2, -1, 0])
    margins = torch.tensor([0.3, 0.5, 1.5], dtype=dtype)
    return draw(8, seed=4, dtype=dtype), draw(8, seed=5, dtype=dtype), kind, margins


def heat_maps(dtype=torch.float64):
    return tuple(draw(3, 4, 4, seed=s, dtype=dtype).sigmoid() for s in (6, 7))


INPUTS = {
    "sparc": pair_of_states,
    "mdetr_align": logits_and_positives,
    "hard_rank": edited_scores,
    "selfeq": heat_maps,
    "eqsim": lambda dtype=torch.float64: (draw(2, 4, 4, seed=8, dtype=dtype),),
}


def eqsim_by_hand(scores):
    text, image = [], []
    for s in scores.tolist():
        for i in range(len(s)):
            for j in range(i + 1, len(s)):
                text.append(((s[i][i] - s[i][j]) - (s[j][j] - s[j][i])) ** 2)
                image.append(((s[i][i] - s[j][i]) - (s[j][j] - s[i][j])) ** 2)
    return sum(text) / len(text) + sum(image) / len(image)


def cross_entropy(row, at):
    return -row[at] + math.log(sum(map(math.exp, row)))


def sparc_by_hand(words, regions, text_mask, region_mask, temperature=0.07):
    dot = lambda a, b: sum(x * y for x, y in zip(a, b))
    unit = lambda a: [x / math.sqrt(dot(a, a)) for x in a]
    pairs = []
    for w, v, n, m in zip(words.tolist(), regions.tolist(), text_mask.sum(1), region_mask.sum(1)):
        w, v, grouped = w[:n], v[:m], []
        for t in w:
            sim = [dot(t, r) for r in v]
            low, high = min(sim), max(sim)
            a = [(x - low) / (high - low) if high > low else 1 for x in sim]
            a = [x if x >= 1 / len(v) else 0 for x in a]
            c = [sum(x * r[d] for x, r in zip(a, v)) / sum(a) for d in range(len(t))]
            grouped.append(unit(c))
        S = [[dot(unit(t), c) / temperature for c in grouped] for t in w]
        rows = [cross_entropy(S[i], i) for i in range(len(S))]
        columns = [cross_entropy([row[i] for row in S], i) for i in range(len(S))]
        pairs.append(sum((a + b) / 2 for a, b in zip(rows, columns)) / len(S))
    return sum(pairs) / len(pairs)


def mdetr_by_hand(A, positive, text_mask, region_mask):
    sides = [[], []]
    for a, p, n, m in zip(A.tolist(), positive.tolist(), text_mask.sum(1), region_mask.sum(1)):
        rows = [r[:m] for r in a[:n]], [r[:m] for r in p[:n]]
        for side, (scores, chosen) in enumerate((rows, [list(zip(*x)) for x in rows])):
            for s, c in zip(scores, chosen):
                if any(c):
                    each = [cross_entropy(s, k) for k in range(len(s)) if c[k]]
                    sides[side].append(sum(each) / len(each))
    return sum(sum(x) / len(x) for x in sides) / 2


def hard_rank_by_hand(matched, edited, kind, margins):
    each = [max(0, float(e - m + margins[k])) for m, e, k in zip(matched, edited, kind) if k >= 0]
    return sum(each) / len(each)


def selfeq_by_hand(A, B, k=0.8):
    A, B = A.flatten().tolist(), B.flatten().tolist()
    R = [float(a + b >= k) for a, b in zip(A, B)]
    smooth = [0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5 for a, b in zip(A, B)]
    total = sum(smooth) / len(smooth)
    for x in (A, B):
        inside = [a * r for a, r in zip(x, R)]
        mean = sum(inside) / len(inside)
        std = math.sqrt(sum((a - mean) ** 2 for a in inside) / (len(inside) - 1))
        total += (std + max(0, k / 2 - sum(inside) / sum(R))) / 2
    return total


@pytest.mark.parametrize(
    "name, by_hand",
    [
        ("eqsim", eqsim_by_hand),
        ("sparc", sparc_by_hand),
        ("mdetr_align", mdetr_by_hand),
        ("hard_rank", hard_rank_by_hand),
        ("selfeq", selfeq_by_hand),
    ],
)
def test_definitions(name, by_hand):
    args = INPUTS[name]()
    plain = [x.detach() for x in args]
    assert getattr(losses, name)(*args).item() == pytest.approx(by_hand(*plain), rel=1e-9)


@pytest.mark.parametrize("name", INPUTS)
def test_precision_and_gradients(name):
    """float32 under autocast, the gradient is that of finite differences"""
    loss, args = getattr(losses, name), INPUTS[name](torch.float32)
    wanted = loss(*args)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss(*args), wanted)
    half = [x.bfloat16() if x.is_floating_point() else x for x in args]
    assert loss(*half).dtype == torch.float32 and loss(*half).isfinite()
    real = [x.detach().requires_grad_(x.is_floating_point()) for x in INPUTS[name]()]
    assert torch.autograd.gradcheck(loss, real)


@pytest.mark.parametrize("name, masked", [("sparc", 2), ("mdetr_align", 1)])
def test_rubbish_in_padding_changes_nothing(name, masked):
    loss, args = getattr(losses, name), [x.detach() for x in INPUTS[name]()]
    masks = {"sparc": (TEXT[..., None], REGION[..., None])}
    if name == "sparc":
        dirty = [torch.where(m, x, 1e4).requires_grad_() for x, m in zip(args, masks[name])]
    else:
        dirty = [spoil(args[0], TEXT, REGION, 300.0)]
        args[1] = args[1] | ~(TEXT[:, :, None] & REGION[:, None])
    a, b = loss(*args), loss(*dirty, *args[masked:])
    torch.testing.assert_close(a, b)
    real = masks.get(name, (TEXT[:, :, None] & REGION[:, None],))
    for gradient, mask in zip(torch.autograd.grad(b, dirty), real):
        assert not gradient.masked_fill(mask, 0).any() and gradient.any()


def test_edges():
    """Nothing to learn from is 0 with a gradient, never nan."""
    one = torch.zeros(3, 1, 1, requires_grad=True)
    assert losses.eqsim(one).item() == 0 and torch.autograd.grad(losses.eqsim(one), one)
    assert losses.eqsim(torch.eye(5)).item() == 0
    assert losses.eqsim(torch.randn(4, 5, 5), margin=1e6).item() == 0
    A, positive, text, region = logits_and_positives()
    none = losses.mdetr_align(A, torch.zeros_like(positive), text, region)
    assert none.item() == 0 and not torch.autograd.grad(none, A)[0].any()
    matched, edited, _, margins = edited_scores()
    none = losses.hard_rank(matched, edited, torch.full((8,), -1), margins)
    assert none.item() == 0 and not torch.autograd.grad(none, matched)[0].any()
    cold = torch.full((2, 4, 4), 0.1, requires_grad=True)
    value = losses.selfeq(cold, cold)
    assert value.item() == pytest.approx(0.4, abs=1e-4)
    assert torch.autograd.grad(value, cold)[0].isfinite().all()
    # words that are alike, regions that are alike
    same = torch.ones(2, 3, 4, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.bool)
    value = losses.sparc(same, same, mask, mask)
    assert value.item() == pytest.approx(math.log(3))
    assert torch.autograd.grad(value, same)[0].isfinite().all()


def test_sparc_finds_each_words_own_region():
    """Words that have a region each: next to nothing, and much once two share one"""
    eye, mask = torch.eye(4)[None], torch.ones(1, 4, dtype=torch.bool)
    assert losses.sparc(eye, eye, mask, mask).item() < 1e-4
    assert losses.sparc(eye, eye[:, [0, 0, 2, 3]], mask, mask).item() > 0.5


def test_margins_of_edits_are_the_mean_gaps_of_the_update_before():
    matched, edited, kind, margins = edited_scores()
    gaps = losses.edit_gaps(matched, edited, kind, margins)
    for k in range(3):
        own = kind == k
        mean = (matched - edited)[own].mean().clamp(0, 10) if own.any() else margins[k]
        assert gaps[k].item() == pytest.approx(mean.item())
    assert not gaps.requires_grad
    assert losses.edit_gaps(matched + 100, edited, kind, margins).tolist() == [10, 0.5, 10]
    assert losses.edit_gaps(matched - 100, edited, kind, margins).tolist() == [0, 0.5, 0]


def test_mdetr_is_the_logits_cross_entropy_where_each_has_one():
    """One word a region and one region a word: the mean of both cross-entropies"""
    A, mask, own = torch.randn(1, 4, 4), torch.ones(1, 4, dtype=torch.bool), torch.arange(4)
    wanted = (F.cross_entropy(A[0], own) + F.cross_entropy(A[0].T, own)) / 2
    found = losses.mdetr_align(A, torch.eye(4, dtype=torch.bool)[None], mask, mask)
    torch.testing.assert_close(found, wanted)
