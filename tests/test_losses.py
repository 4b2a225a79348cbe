"""Each loss against its definition, one number at a time; then padding, precision, edge cases,
and life outside this repository.
"""

import ast
import inspect
import math

import pytest
import torch
import torch.nn.functional as F

import losses

torch.manual_seed(0)


def prefix_mask(lengths):
    return torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]


def random_blocks(words=(5, 3, 1), regions=(4, 2, 3), dtype=torch.float64, seed=0):
    """S_LL, S_LV, S_VL, S_VV and both masks; three pairs of different sizes; leaves that want a
    gradient
    """
    g = torch.Generator().manual_seed(seed)
    B, N, M = len(words), max(words), max(regions)
    make = lambda *shape: (
        torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    )
    return (
        make(B, N, N),
        make(B, N, M),
        make(B, M, N),
        make(B, M, M),
        prefix_mask(words),
        prefix_mask(regions),
    )


def spoil(x, row_mask, column_mask, rubbish):
    """Other rubbish in every padded place: equal rubbish can cancel."""
    noise = rubbish * (1 + torch.arange(x.numel(), dtype=x.dtype).view_as(x) / x.numel())
    return torch.where(
        row_mask[:, :, None] & column_mask[:, None, :], x.detach(), noise
    ).requires_grad_()


RELATION = {
    "cacr": losses.cacr,
    "iais_singular": losses.iais_singular,
    "iais_distributed": losses.iais_distributed,
    "iais_singular_released": lambda LL, LV, VL, VV, t, r: (
        losses.iais_singular_released(LL, LV, VV, t, r)
        + losses.iais_singular_released(VV, VL, LL, r, t)
    ),
}


def as_inputs(name, blocks):
    """Logits, or what the loss wants instead: probabilities within each block."""
    *S, text, region = blocks
    if name in ("cacr", "iais_singular"):
        return S, text, region
    return (
        [
            losses.masked_softmax(s.detach(), m).to(s.dtype).requires_grad_()
            for s, m in zip(S, (text, region, text, region))
        ],
        text,
        region,
    )


# --------------------------------------------------------------------------- definitions, by hand


def softmax(row):
    return [math.exp(x) / sum(math.exp(y) for y in row) for x in row]


def slow_side(own, cross, other, own_mask, other_mask, rule, eps=1e-6):
    """Algorithm 1, IAIS with Python numbers only; rule(relation, own row) -> loss of a pair."""
    total = 0.0
    for b in range(len(own)):
        rows = [i for i, real in enumerate(own_mask[b]) if real]
        others = [r for r, real in enumerate(other_mask[b]) if real]
        total += rule(own[b].tolist(), cross[b].tolist(), other[b].tolist(), rows, others, eps)
    return total / len(own)


def cacr_rule(own, cross, other, rows, others, eps):
    loss = 0.0
    for i in rows:
        seen = softmax(
            [
                sum(cross[i][r] * other[r][s] * cross[j][s] for r in others for s in others)
                for j in rows
            ]
        )
        said = softmax([own[i][j] for j in rows])
        loss += sum((p - q) * (math.log(p + eps) - math.log(q + eps)) for p, q in zip(seen, said))
    return loss


def iais_rule(own, cross, other, rows, others, eps):
    partner = {i: max(others, key=lambda r: cross[i][r]) for i in rows}
    loss = 0.0
    for i in rows:
        seen = softmax([other[partner[i]][partner[j]] for j in rows])
        said = softmax([own[i][j] for j in rows])
        loss += sum((p - q) * (math.log(p) - math.log(q)) for p, q in zip(seen, said))
    return loss / len(rows)


@pytest.mark.parametrize("name, rule", [("cacr", cacr_rule), ("iais_singular", iais_rule)])
def test_relation_losses_are_their_definitions(name, rule):
    LL, LV, VL, VV, text, region = random_blocks()
    slow = slow_side(LL, LV, VV, text, region, rule) + slow_side(VV, VL, LL, region, text, rule)
    assert RELATION[name](LL, LV, VL, VV, text, region).item() == pytest.approx(slow, rel=1e-9)


def test_cacr_is_soft_relation_alignment():
    """CACR sec. 3.4, the proof as a test: closed form and Algorithm 1 give one number, and one
    gradient.
    """
    LL, LV, VL, VV, text, region = blocks = random_blocks(
        words=(6, 3, 1, 4), regions=(5, 2, 3, 1), seed=3
    )
    loops = losses.soft_relation_alignment(
        LL, LV, VV, text, region
    ) + losses.soft_relation_alignment(VV, VL, LL, region, text)
    closed = losses.cacr(*blocks)
    assert closed.item() == pytest.approx(loops.item(), rel=1e-9)
    for a, b in zip(
        torch.autograd.grad(closed, blocks[:4]), torch.autograd.grad(loops, blocks[:4])
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_cacr_follows_the_equations_index_order():
    """The last line of sec. 3.4 prints the transpose of S_LL; eq. (5) is S_VL S_LL S_VL^T."""
    LL, LV, VL, VV, text, region = random_blocks()
    asymmetric = losses.cacr_side(VV, VL, LL, region, text)
    assert abs((losses.cacr_side(VV, VL, LL.mT, region, text) - asymmetric).item()) > 1e-3


def test_iais_is_cacr_with_a_one_hot_cross_block():
    """CACR sec. 3.3: forcing the cross attention to be one-hot makes CACR the singular IAIS, but
    for the mean over rows.
    """
    LL, LV, _, VV, text, region = random_blocks(words=(4, 4), regions=(5, 5))
    one_hot = F.one_hot(LV.argmax(-1), LV.shape[-1]).double()
    assert losses.cacr_side(LL, one_hot, VV, text, region).item() / 4 == pytest.approx(
        losses.iais_singular_side(LL, LV, VV, text, region).item(), rel=1e-4
    )


def test_matrix_kl_by_hand():
    p, q = torch.tensor([[[0.75, 0.25], [0.5, 0.5]]]), torch.tensor([[[0.25, 0.75], [0.5, 0.5]]])
    assert losses.matrix_kl(p, q, torch.tensor([[True, True]])).item() == pytest.approx(
        math.log(3), rel=1e-4
    )
    assert losses.matrix_kl(p, q, torch.tensor([[False, True]])).item() == 0


def test_small_losses_by_hand():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
    nll = lambda row, t: math.log(sum(math.exp(x) for x in row)) - row[t]
    assert losses.mlm(logits, torch.tensor([0, 2])).item() == pytest.approx(
        (nll([2, 0, -1], 0) + nll([0, 1, 0], 2)) / 2, rel=1e-6
    )
    assert losses.mrfr(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]])).item() == 5
    # background is largest, but no target
    probs = torch.tensor([[0.9, 0.04, 0.06], [0.1, 0.8, 0.1]])
    assert losses.mrc(logits, probs).item() == pytest.approx(
        (nll([2, 0, -1], 2) + nll([0, 1, 0], 1)) / 2, rel=1e-6
    )
    kl = sum(
        p * (math.log(p) + nll(row, c))
        for row, ps in zip(logits.tolist(), probs.tolist())
        for c, p in enumerate(ps)
    )
    assert losses.mrc_kl(logits, probs).item() == pytest.approx(kl / 2, rel=1e-5)
    assert losses.itm(torch.tensor([[0.0, 1.0]]), torch.tensor([True])).item() == pytest.approx(
        math.log(1 + math.exp(-1)), rel=1e-6
    )
    s = lambda x: 1 / (1 + math.exp(-x))
    scores = torch.tensor([[0.3, 0.5, -2.0]])
    assert losses.ranking(scores).item() == pytest.approx((0.2 + s(0.5) - s(0.3)) / 2, rel=1e-5)


@pytest.mark.parametrize("loss", [losses.mlm, losses.mrfr, losses.mrc, losses.mrc_kl])
def test_nothing_masked_is_zero_with_a_gradient(loss):
    x = torch.zeros(0, 4, requires_grad=True)
    value = loss(x, torch.zeros(0, dtype=torch.long) if loss is losses.mlm else torch.zeros(0, 4))
    value.backward()
    assert value.item() == 0


def slow_ipot(C, beta, iterations):
    """UNITER Algorithm 1 with lists, for one pair without padding: plan word x region."""
    n, m = len(C), len(C[0])
    T, sigma = [[1.0] * m for _ in range(n)], [1 / n] * n
    for _ in range(iterations):
        Q = [[math.exp(-C[i][j] / beta) * T[i][j] for j in range(m)] for i in range(n)]
        delta = [1 / (m * sum(Q[i][j] * sigma[i] for i in range(n))) for j in range(m)]
        sigma = [1 / (n * sum(Q[i][j] * delta[j] for j in range(m))) for i in range(n)]
        T = [[sigma[i] * Q[i][j] * delta[j] for j in range(m)] for i in range(n)]
    return T


def test_ipot_is_algorithm_1():
    text, region = prefix_mask([4, 2]), prefix_mask([3, 5])
    words, regions = (
        torch.randn(2, 4, 6, dtype=torch.float64),
        torch.randn(2, 5, 6, dtype=torch.float64),
    )
    cost = losses.cosine_cost(words, regions, text, region)
    T = losses.ipot(cost, text, region, iterations=20)
    for b, (n, m) in enumerate(((4, 3), (2, 5))):
        torch.testing.assert_close(
            T[b, :n, :m],
            torch.tensor(slow_ipot(cost[b, :n, :m].tolist(), 0.5, 20), dtype=torch.float64),
            rtol=1e-9,
            atol=1e-12,
        )
        assert T[b].sum().item() == pytest.approx(1, abs=1e-9)
        torch.testing.assert_close(T[b, :n].sum(1), torch.full((n,), 1 / n, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(20))
def test_ipot_with_inner_steps_still_transports(seed):
    """The authors' code stops with a shape error for inner > 1. What is transported costs the
    same; the plan itself is compared where no other is almost as cheap (seed 4), since between
    such plans the iteration takes long to decide."""
    cost = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(seed))
    full = torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)
    T, U = losses.ipot(cost, *full, inner=3), losses.ipot(cost, *full, iterations=200)
    torch.testing.assert_close(T.sum(1), torch.full((2, 5), 1 / 5), atol=1e-3, rtol=0)
    torch.testing.assert_close((cost * T).sum((1, 2)), (cost * U).sum((1, 2)), atol=1e-3, rtol=0)
    if seed == 4:
        torch.testing.assert_close(T, U, atol=0.02, rtol=0)


def test_wra_of_identical_sets_is_zero_and_sign_follows_match():
    x, mask = torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.bool)
    assert losses.wra(x, x, mask, mask).item() < 0.02
    y = torch.randn(2, 3, 8)
    d = losses.ot_distance(x, y, mask, mask)
    assert losses.wra(x, y, mask, mask, torch.tensor([True, False])).item() == pytest.approx(
        ((d[0] - d[1]) / 2).item(), rel=1e-6
    )


# ---------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RELATION)
def test_rubbish_in_padding_changes_nothing(name, dtype):
    (LL, LV, VL, VV), text, region = as_inputs(name, random_blocks(dtype=dtype))
    clean = LL, LV, VL, VV
    dirty = (
        spoil(LL, text, text, 7.0),
        spoil(LV, text, region, 5.0),
        spoil(VL, region, text, -4.0),
        spoil(VV, region, region, 300.0),
    )
    a, b = RELATION[name](*clean, text, region), RELATION[name](*dirty, text, region)
    torch.testing.assert_close(a, b)
    masks = (text, text), (text, region), (region, text), (region, region)
    for x, y, (rows, columns) in zip(
        torch.autograd.grad(a, clean, allow_unused=True),
        torch.autograd.grad(b, dirty, allow_unused=True),
        masks,
    ):
        if x is not None:
            inside = rows[:, :, None] & columns[:, None, :]
            torch.testing.assert_close(x[inside], y[inside])
            assert not y[~inside].any(), "padding gets no gradient"


@pytest.mark.parametrize("name", RELATION)
def test_every_pair_counts_alike_whatever_the_batch(name):
    (LL, LV, VL, VV), text, region = as_inputs(name, random_blocks())
    whole = RELATION[name](LL, LV, VL, VV, text, region).item()
    alone = []
    for b in range(len(text)):
        n, m = int(text[b].sum()), int(region[b].sum())
        alone.append(
            RELATION[name](
                LL[b : b + 1, :n, :n],
                LV[b : b + 1, :n, :m],
                VL[b : b + 1, :m, :n],
                VV[b : b + 1, :m, :m],
                text[b : b + 1, :n],
                region[b : b + 1, :m],
            ).item()
        )
    assert whole == pytest.approx(sum(alone) / len(alone), rel=1e-9)


def test_holes_in_a_mask_are_padding_too():
    """[CLS] and [SEP] are left out by a mask that starts with False."""
    LL, LV, VL, VV, text, region = random_blocks(words=(5, 5), regions=(4, 4))
    holes = text.clone()
    holes[:, 0] = holes[:, 4] = False
    cut = [LL[:, 1:4, 1:4], LV[:, 1:4], VL[:, :, 1:4], VV]
    assert losses.cacr(LL, LV, VL, VV, holes, region).item() == pytest.approx(
        losses.cacr(*cut, text[:, 1:4], region).item(), rel=1e-9
    )


def test_wra_ignores_padding():
    text, region = prefix_mask([4, 2]), prefix_mask([3, 5])
    w, v = torch.randn(2, 4, 6), torch.randn(2, 5, 6)
    w2, v2 = (
        torch.where(text[..., None], w, 50.0).requires_grad_(),
        torch.where(region[..., None], v, -9.0).requires_grad_(),
    )
    loss = losses.wra(w2, v2, text, region)
    torch.testing.assert_close(loss, losses.wra(w, v, text, region))
    loss.backward()
    assert not w2.grad[~text].any() and not v2.grad[~region].any() and w2.grad[text].any()


# ---------------------------------------------------------------------------- precision and edges


@pytest.mark.parametrize("name", RELATION)
def test_losses_compute_in_float32_under_autocast(name):
    (LL, LV, VL, VV), text, region = as_inputs(name, random_blocks(dtype=torch.float32))
    plain = RELATION[name](LL, LV, VL, VV, text, region)
    with torch.autocast("cpu", torch.bfloat16):
        cast = RELATION[name](LL, LV, VL, VV, text, region)
        half = RELATION[name](*(x.bfloat16() for x in (LL, LV, VL, VV)), text, region)
    assert cast.dtype == half.dtype == torch.float32
    torch.testing.assert_close(cast, plain)
    assert torch.isfinite(half)


def test_wra_computes_in_float32_under_autocast():
    mask, w, v = torch.ones(2, 3, dtype=torch.bool), torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            losses.wra(w, v, mask, mask), losses.ot_distance(w, v, mask, mask).mean()
        )
        cast = losses.wra(w, v, mask, mask)
    torch.testing.assert_close(cast, losses.wra(w, v, mask, mask))


@pytest.mark.parametrize("name", RELATION)
def test_huge_logits_stay_finite(name):
    (LL, LV, VL, VV), text, region = as_inputs(
        name,
        [
            x if x.dtype == torch.bool else (50 * x).detach().requires_grad_()
            for x in random_blocks(dtype=torch.float32)
        ],
    )
    loss = RELATION[name](LL, LV, VL, VV, text, region)
    loss.backward()
    assert torch.isfinite(loss) and all(
        x.grad is None or torch.isfinite(x.grad).all() for x in (LL, LV, VL, VV)
    )


def test_joint_softmax_rows_sum_to_one_over_both_modalities():
    LL, LV, VL, VV, text, region = random_blocks()
    P = losses.joint_softmax(*(x[:, None] for x in (LL, LV, VL, VV)), text, region)
    torch.testing.assert_close(
        P[0].sum(-1) + P[1].sum(-1), torch.ones(3, 1, 5, dtype=torch.float64)
    )
    torch.testing.assert_close(
        P[2].sum(-1) + P[3].sum(-1), torch.ones(3, 1, 4, dtype=torch.float64)
    )


# -------------------------------------------------------- word-object alignment, phrase grounding


def pointed(K=4, N=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(K, N, 2, generator=g, dtype=torch.float64) * 60
    boxes = torch.cat(
        [corner, corner + 10 + torch.rand(K, N, 2, generator=g, dtype=torch.float64) * 40], -1
    )
    pointer = boxes[:, 1] + 4
    # touches nothing
    pointer[-1] = torch.tensor([900, 900, 950, 950.0])
    similar = torch.rand(2, K, N, generator=g, dtype=torch.float64) * 2 - 1
    mask = prefix_mask([5, 3, 4, 5])
    return pointer, boxes, similar[0], similar[1], mask


def test_soft_alignment_target_is_equations_15_to_18():
    pointer, boxes, by_class, by_attribute, mask = pointed()
    ours = losses.soft_alignment_target(pointer, boxes, by_class, by_attribute, mask)
    for k in range(len(pointer)):
        n = int(mask[k].sum())
        x1, y1, x2, y2 = pointer[k].tolist()
        PA = []
        for a1, b1, a2, b2 in boxes[k, :n].tolist():
            inter = max(0, min(x2, a2) - max(x1, a1)) * max(0, min(y2, b2) - max(y1, b1))
            PA.append(inter / ((x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - inter))
        SA = [
            max(0, 0.75 * c + 0.25 * a)
            for c, a in zip(by_class[k, :n].tolist(), by_attribute[k, :n].tolist())
        ]
        rows = [[x / sum(some) for x in some] for some in (PA, SA) if sum(some) > 0]
        wanted = [sum(column) / len(rows) for column in zip(*rows)]
        assert ours[k, :n].tolist() == pytest.approx(wanted, abs=1e-6) and not ours[k, n:].any()
        assert ours[k].sum().item() == pytest.approx(1, abs=1e-6)
    # matches nothing
    assert not losses.soft_alignment_target(
        pointer[-1:], boxes[-1:], -by_class[-1:].abs(), -by_attribute[-1:].abs(), mask[-1:]
    ).any()


def test_word_object_alignment_by_hand():
    """Scores 3 2 1 0 and a target on the last region: with k = 1 the first and the last region
    take part.
    """
    A, target = torch.tensor([[3.0, 2, 1, 0, 9]]), torch.tensor([[0.25, 0, 0, 0.75, 0]])
    mask = torch.tensor([[True] * 4 + [False]])
    log_q = torch.tensor([3.0, 0]).log_softmax(-1)
    loss = losses.word_object_alignment(A, target, mask, k=1)
    kept = torch.tensor([0.25, 0.75])
    assert loss.item() == pytest.approx((kept * (kept.log() - log_q)).sum().item(), abs=1e-6)


def test_word_object_alignment_teaches_what_the_model_overlooks_and_skips_what_matches_nothing():
    A = torch.tensor([[5.0, 4, 3, -9], [1.0, 2, 3, 4]], requires_grad=True)
    target, mask = (
        torch.tensor([[0.0, 0, 0, 1], [0.0, 0, 0, 0]]),
        torch.ones(2, 4, dtype=torch.bool),
    )
    loss = losses.word_object_alignment(A, target, mask)
    loss.backward()
    assert A.grad[0, 3] < -0.5 and not A.grad[1].any()
    torch.testing.assert_close(
        loss.detach(), losses.word_object_alignment(A.detach()[:1], target[:1], mask[:1])
    )
    assert losses.word_object_alignment(A[:0], target[:0], mask[:0]) == 0


def test_topk_softmax_keeps_k():
    P = losses.topk_softmax(
        torch.tensor([[1.0, 3, 2, 0], [1.0, 3, 2, 0]]),
        torch.tensor([[True] * 4, [True, False, False, True]]),
        k=3,
    )
    torch.testing.assert_close(P[0], torch.tensor([1.0, 3, 2, float("-inf")]).softmax(-1))
    torch.testing.assert_close(
        P[1], torch.tensor([1.0, float("-inf"), float("-inf"), 0]).softmax(-1)
    )


def phrases(seed=0):
    g = torch.Generator().manual_seed(seed)
    h, v = (
        torch.randn(3, 4, 5, 8, generator=g, dtype=torch.float64),
        torch.randn(3, 6, 8, generator=g, dtype=torch.float64),
    )
    words = torch.tensor([[5, 2, 1, 3], [4, 1, 0, 0], [2, 2, 3, 0]])
    return h, v, torch.arange(5) < words[..., None], words > 0, prefix_mask([6, 2, 4])


def test_maf_is_equations_2_to_6_with_loops():
    h, v, word_mask, phrase_mask, region_mask = phrases()
    p = losses.phrase_embedding(h, v, word_mask, region_mask)
    for b in range(3):
        seen = v[b, region_mask[b]]
        for q in range(int(phrase_mask[b].sum())):
            said = h[b, q, word_mask[b, q]]
            alpha = [max((w @ seen.T / math.sqrt(8)).softmax(-1).tolist()) for w in said]
            beta = [math.exp(a) / sum(map(math.exp, alpha)) for a in alpha]
            torch.testing.assert_close(p[b, q], sum(w * x for w, x in zip(beta, said)))
    sim = losses.maf_similarity(p, v, phrase_mask, region_mask)
    for t in range(3):
        for i in range(3):
            best = [
                max((p[t, q] @ r).item() for r in v[i, region_mask[i]])
                for q in range(int(phrase_mask[t].sum()))
            ]
            assert sim[t, i].item() == pytest.approx(sum(best) / len(best), abs=1e-9)
    wanted = -sum(sim[t].log_softmax(-1)[t] for t in range(3)) / 3
    torch.testing.assert_close(losses.maf(sim), wanted)
    # W_p's bias makes something of nothing
    spoiled = p.masked_fill(~phrase_mask[..., None], 9.0)
    torch.testing.assert_close(losses.maf_similarity(spoiled, v, phrase_mask, region_mask), sim)
    torch.testing.assert_close(
        losses.maf(sim[1:], torch.tensor([1, 2])),
        -(sim[1].log_softmax(-1)[1] + sim[2].log_softmax(-1)[2]) / 2,
    )


def test_maf_ignores_padding_and_its_gradients_are_finite():
    h, v, word_mask, phrase_mask, region_mask = phrases()
    clean = losses.maf_similarity(
        losses.phrase_embedding(h, v, word_mask, region_mask), v, phrase_mask, region_mask
    )
    h2, v2 = (
        h.masked_fill(~word_mask[..., None], 7.0).requires_grad_(),
        v.masked_fill(~region_mask[..., None], -3.0).requires_grad_(),
    )
    sim = losses.maf_similarity(
        losses.phrase_embedding(h2, v2, word_mask, region_mask), v2, phrase_mask, region_mask
    )
    torch.testing.assert_close(sim, clean)
    losses.maf(sim).backward()
    for x, mask in ((h2, word_mask), (v2, region_mask)):
        assert torch.isfinite(x.grad).all() and not x.grad[~mask].any() and x.grad[mask].any()


def test_products_are_float32_under_autocast():
    """MAF's scores, and the logits of contrast, which a small temperature makes large."""
    torch.manual_seed(0)
    h, v = torch.randn(2, 3, 4, 64), torch.randn(2, 5, 64)
    words, regions = torch.ones(2, 3, 4, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)
    e = losses.phrase_embedding(h, v, words, regions)
    scores, a = losses.phrase_scores(e, v, regions), F.normalize(h[0, 0], dim=-1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(losses.phrase_embedding(h, v, words, regions), e)
        torch.testing.assert_close(losses.phrase_scores(e, v, regions), scores)
        logits = losses.product(a, a.T) / 0.01
        assert (logits - losses.product(a.double(), a.double().T) / 0.01).abs().max() < 1e-3
        assert losses.product(a.bfloat16(), a.T).dtype == torch.float32


def test_amc_mean_is_finite_where_a_mask_is_empty_or_full():
    A = torch.rand(2, 4, 4)
    for M, wanted in ((torch.ones_like(A), 0.1 - A.mean()), (torch.zeros_like(A), 0.1 + A.mean())):
        torch.testing.assert_close(losses.amc_mean(A, M), wanted.clamp(min=0))


def test_alignment_losses_are_the_same_under_autocast():
    pointer, boxes, by_class, by_attribute, mask = pointed()
    target, A = (
        losses.soft_alignment_target(
            pointer.float(), boxes.float(), by_class.float(), by_attribute.float(), mask
        ),
        torch.randn(4, 5),
    )
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            losses.word_object_alignment(A, target, mask),
            losses.word_object_alignment(A.float(), target, mask),
        )
    spoiled = A.masked_fill(~mask, 50.0)
    torch.testing.assert_close(
        losses.word_object_alignment(spoiled, target, mask),
        losses.word_object_alignment(A, target, mask),
    )


# ----------------------------------------------------------------------------------------- pixels


def test_contrast_and_its_targets_by_hand():
    s, own = torch.tensor([[2.0, 0.0, 1.0], [0.5, -1.0, 3.0]]), torch.tensor([2, 0])
    target = losses.itc_targets(s, own, 0.25)
    wanted = 0.0
    for row, o, t in zip(s.tolist(), own.tolist(), target.tolist()):
        p = softmax(row)
        assert t == pytest.approx([0.25 * p[m] + 0.75 * (m == o) for m in range(3)])
        wanted -= sum(t[m] * math.log(p[m]) for m in range(3)) / 2
    assert losses.itc(s, target).item() == pytest.approx(wanted)
    weights = losses.negative_weights(s, own)
    for row, o, w in zip(s.tolist(), own.tolist(), weights.tolist()):
        assert w == pytest.approx([0 if m == o else p for m, p in enumerate(softmax(row))])
    logits, teacher, words = torch.randn(2, 4), torch.randn(2, 4), torch.tensor([1, 3])
    soft = (
        -sum(
            q * math.log(p)
            for a, b in zip(logits.tolist(), teacher.tolist())
            for p, q in zip(softmax(a), softmax(b))
        )
        / 2
    )
    assert losses.mlm_distilled(logits, words, teacher, 0.4).item() == pytest.approx(
        0.6 * losses.mlm(logits, words).item() + 0.4 * soft, rel=1e-5
    )
    assert losses.mlm_distilled(logits[:0], words[:0], teacher[:0], 0.4).item() == 0


def test_gradcam_and_amc_by_hand():
    """A score that is linear in P has the gradient that it was made with; padded words give
    nothing.
    """
    torch.manual_seed(3)
    P, G, mask = (
        torch.rand(2, 2, 3, 5, dtype=torch.float64),
        torch.randn(2, 2, 3, 5, dtype=torch.float64),
        prefix_mask([3, 2]),
    )
    P.requires_grad_()
    A = losses.gradcam(P, (P * G).sum((1, 2, 3)), mask)
    for b in range(2):
        for v in range(4):
            wanted = (
                sum(
                    P[b, h, n, v + 1].item() * max(0.0, G[b, h, n, v + 1].item())
                    for h in range(2)
                    for n in range(3)
                    if mask[b, n]
                )
                / 6
            )
            assert A[b, v].item() == pytest.approx(wanted)
    heat, M = torch.rand(2, 3, 3, dtype=torch.float64), torch.zeros(2, 3, 3, dtype=torch.float64)
    M[0, :2, :2], M[1, 2, 2] = 1, 1
    cells = [(b, i, j) for b in range(2) for i in range(3) for j in range(3)]
    inside, outside = (
        [heat[c].item() for c in cells if (M[c] == 1) == where] for where in (True, False)
    )
    assert losses.amc_mean(heat, M, 0.9).item() == pytest.approx(
        max(0, sum(outside) / len(outside) - sum(inside) / len(inside) + 0.9)
    )
    tops = [
        (
            max(heat[c].item() for c in cells if c[0] == b and M[c] == 0),
            max(heat[c].item() for c in cells if c[0] == b and M[c] == 1),
        )
        for b in range(2)
    ]
    assert losses.amc_max(heat, M).item() == pytest.approx(
        sum(max(0, o - i + 0.5) for o, i in tops) / 2
    )
    assert losses.amc(heat, M).item() == pytest.approx(
        0.2 * losses.amc_mean(heat, M).item() + 0.8 * losses.amc_max(heat, M).item()
    )
    cosine = [
        sum(heat[c].item() for c in cells if c[0] == b and M[c] == 1)
        / math.sqrt(sum(heat[c].item() ** 2 for c in cells if c[0] == b) * M[b].sum().item())
        for b in range(2)
    ]
    assert losses.amc_cosine(heat, M).item() == pytest.approx(1 - sum(cosine) / 2)
    unit = losses.unit_range(heat)
    assert (
        unit.amin().item() == 0
        and 0.999 < unit[0].max().item() <= 1
        and losses.amc_cosine(M, M).item() == pytest.approx(0)
    )


def test_pixel_losses_are_the_same_under_autocast():
    s, own, heat, M = (
        torch.randn(3, 5),
        torch.tensor([1, 0, 2]),
        torch.rand(2, 4, 4),
        (torch.rand(2, 4, 4) > 0.6).float(),
    )
    for loss in (
        lambda: losses.itc(s, losses.itc_targets(s, own, 0.4)),
        lambda: losses.amc(heat, M),
        lambda: losses.amc_cosine(heat, M),
        lambda: losses.mlm_distilled(s, own, s, 0.4),
    ):
        wanted = loss()
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(loss(), wanted)


# ------------------------------------------------------------------------------ copyable and told

PUBLIC = [name for name, f in vars(losses).items() if inspect.isfunction(f)]


@pytest.mark.parametrize("name", PUBLIC)
def test_each_function_runs_when_copied_with_the_helpers_its_docstring_names(name):
    tree, source = ast.parse(inspect.getsource(losses)), inspect.getsource(losses)
    parts = {
        n.name: ast.get_source_segment(source, n)
        for n in tree.body
        if isinstance(n, ast.FunctionDef)
    }
    decorators = {
        n.name: ["@" + ast.get_source_segment(source, d) for d in n.decorator_list]
        for n in tree.body
        if isinstance(n, ast.FunctionDef)
    }
    doc = getattr(losses, name).__doc__
    named = (
        [h.strip(" .\n") for h in doc.split("Helpers:")[1].split(",")] if "Helpers:" in doc else []
    )
    space = {"torch": torch, "F": F}
    for part in [*named, name]:
        assert part in parts, f"{name} names a helper {part} that is not there"
        exec("\n".join([*decorators[part], parts[part]]), space)
    text, region = prefix_mask([3, 2]), prefix_mask([4, 1])
    x = dict(
        a=torch.randn(2, 3, 8),
        b=torch.randn(2, 8, 4),
        words=torch.randn(2, 3, 8),
        regions=torch.randn(2, 4, 8),
        text_mask=text,
        region_mask=region,
        logits=torch.randn(5, 2),
        target=torch.ones(5).long(),
        prediction=torch.randn(5, 2),
        features=torch.randn(5, 2),
        region_probs=torch.rand(5, 2),
        match=torch.tensor([True, False, True, True, False]),
        scores=torch.randn(2, 3),
        cost=torch.rand(2, 3, 4),
        S_LL=torch.randn(2, 3, 3),
        S_LV=torch.randn(2, 3, 4),
        S_VL=torch.randn(2, 4, 3),
        S_VV=torch.randn(2, 4, 4),
        x=torch.randn(4).bfloat16(),
        count=4,
        S=torch.randn(2, 1, 3, 4),
        column_mask=region,
        own_mask=text,
        other_mask=region,
        row_mask=text,
    )
    x |= dict(
        S_own=x["S_LL"], S_cross=x["S_LV"], S_other=x["S_VV"], cross=x["S_LV"], other=x["S_VV"]
    )
    x |= {k.replace("S_", "P_"): v.softmax(-1) for k, v in x.items() if k.startswith("S_")} | dict(
        P_back=x["S_VL"].softmax(-1), p=x["S_LL"].softmax(-1), q=x["S_LL"].mT.softmax(-1)
    )
    if name == "soft_answers":
        x |= dict(target=torch.rand(2, 3))
    # K = 2 pointed words, 4 regions
    if name in ("soft_alignment_target", "topk_softmax", "word_object_alignment", "box_iou"):
        boxes = torch.tensor([[0, 0, 2, 2], [1, 1, 3, 3], [2, 0, 4, 2], [0, 0, 1, 1.0]]).expand(
            2, 4, 4
        )
        x |= dict(
            a=boxes,
            b=boxes.flip(1),
            pointer=boxes[:, 0],
            boxes=boxes,
            class_similarity=torch.rand(2, 4),
            attribute_similarity=torch.rand(2, 4),
            A=torch.randn(2, 4),
            target=torch.rand(2, 4).softmax(-1),
        )
    if name in ("word_weights", "phrase_embedding", "phrase_scores", "maf_similarity"):
        x |= dict(
            h=torch.randn(2, 2, 3, 5),
            v=torch.randn(2, 4, 5),
            word_mask=torch.ones(2, 2, 3, dtype=torch.bool),
            e=torch.randn(2, 2, 5),
            phrase_mask=prefix_mask([2, 1]),
        )
    x |= dict(similarity=torch.randn(3, 3), label=torch.tensor([1, 0, -1, 1, 0]))
    if name == "pick_region":
        x |= dict(scores=torch.randn(2, 4), target=torch.tensor([3, 0]))
    if name in ("itc", "itc_targets", "negative_weights", "mlm_distilled"):
        x |= dict(
            similarity_m=torch.randn(3, 5),
            own=torch.tensor([0, 2, 1]),
            alpha=0.4,
            target=torch.tensor([0, 2, 1]) if name == "mlm_distilled" else torch.rand(3, 3),
            logits=torch.randn(3, 5),
            teacher_logits=torch.randn(3, 5),
        )
    if name == "gradcam":
        P = torch.rand(2, 2, 3, 5, requires_grad=True)
        x |= dict(P=P, score=(P * torch.randn(2, 2, 3, 5)).sum((1, 2, 3)))
    if name in ("unit_range", "amc_mean", "amc_max", "amc", "amc_cosine"):
        x |= dict(A=torch.rand(2, 4, 4), M=(torch.rand(2, 4, 4) > 0.5).float())
    if name in ("eqsim", "mdetr_align", "selfeq"):
        A = torch.rand(2, 3, 4)
        x |= dict(scores=torch.randn(2, 5, 5), A=A, A_paraphrase=A.flip(0), positive=A > 0.5)
    if name in ("hard_rank", "edit_gaps"):
        x |= dict(matched=torch.randn(4), edited=torch.randn(4), margins=torch.rand(3))
        x |= dict(kind=torch.tensor([0, -1, 2, 0]))
    needed = [
        p.name
        for p in inspect.signature(getattr(losses, name)).parameters.values()
        if p.default is p.empty
    ]
    if name == "joint_softmax":
        x |= {k: v[:, None] for k, v in x.items() if k in ("S_LL", "S_LV", "S_VL", "S_VV")}
    space[name](*(x[k] for k in needed))


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_tell_what_a_reader_needs(name):
    doc = getattr(losses, name).__doc__
    assert doc and len(doc) > 50
    if name not in (
        "wide",
        "product",
        "mean_over",
        "masked_softmax",
        "block_softmax",
        "joint_softmax",
        "strongest_partner",
        "row_mean_kl",
        "box_iou",
    ):
        assert "return" in doc.lower() and any(
            paper in doc
            for paper in ("UNITER", "CACR", "IAIS", "Kervadec", "MAF", "AMC", "ALBEF", "eq. (13)")
            + ("EqBen", "Bica", "Kamath", "CE-CLIP")
        ), name


def test_mrc_names_the_likeliest_class_but_the_background():
    """By hand: background 0.5, class 1 0.2, class 2 0.3: the target is class 2."""
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    wanted = -logits.log_softmax(-1)[0, 2]
    torch.testing.assert_close(losses.mrc(logits, torch.tensor([[0.5, 0.2, 0.3]])), wanted)
