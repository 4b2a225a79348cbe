"""Each loss against its definition, one number at a time; then padding, precision, edge cases,
and life outside this repository.
"""

import ast
import functools
import inspect
import math
import statistics

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
    shapes = (B, N, N), (B, N, M), (B, M, N), (B, M, M)
    blocks = [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]
    return *(x.requires_grad_() for x in blocks), prefix_mask(words), prefix_mask(regions)


def spoil(x, row_mask, column_mask, rubbish):
    """Other rubbish in every padded place: equal rubbish can cancel."""
    noise = rubbish * (1 + torch.arange(x.numel(), dtype=x.dtype).view_as(x) / x.numel())
    real = row_mask[:, :, None] & column_mask[:, None, :]
    return torch.where(real, x.detach(), noise).requires_grad_()


RELATION = {
    "cacr": losses.cacr,
    "cacr_standard": lambda LL, LV, VL, VV, t, r: (
        losses.cacr_standard_side(LL, LV, VV, t, r) + losses.cacr_standard_side(VV, VL, LL, r, t)
    ),
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
    if name not in ("cacr", "cacr_standard", "iais_singular"):
        columns = text, region, text, region
        S = [losses.masked_softmax(s.detach(), m).to(s.dtype) for s, m in zip(S, columns)]
    return [s.requires_grad_() for s in S], text, region


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


def standardised(rows):
    """Each number less the mean of all, by their deviation"""
    all_of_them = [x for row in rows for x in row]
    middle, wide = statistics.mean(all_of_them), statistics.pstdev(all_of_them) or 1
    return [[(x - middle) / wide for x in row] for row in rows]


def cacr_rule(own, cross, other, rows, others, eps, scale=lambda rows: rows):
    pairs = [(r, s) for r in others for s in others]
    seen = [
        [sum(cross[i][r] * other[r][s] * cross[j][s] for r, s in pairs) for j in rows] for i in rows
    ]
    said, loss = [[own[i][j] for j in rows] for i in rows], 0.0
    for p_row, q_row in zip(map(softmax, scale(seen)), map(softmax, scale(said))):
        each = zip(p_row, q_row)
        loss += sum((p - q) * (math.log(p + eps) - math.log(q + eps)) for p, q in each)
    return loss


def iais_rule(own, cross, other, rows, others, eps):
    partner = {i: max(others, key=lambda r: cross[i][r]) for i in rows}
    loss = 0.0
    for i in rows:
        seen = softmax([other[partner[i]][partner[j]] for j in rows])
        said = softmax([own[i][j] for j in rows])
        loss += sum((p - q) * (math.log(p) - math.log(q)) for p, q in zip(seen, said))
    return loss / len(rows)


RULES = {
    "cacr": cacr_rule,
    "cacr_standard": functools.partial(cacr_rule, scale=standardised),
    "iais_singular": iais_rule,
}


@pytest.mark.parametrize("name, rule", RULES.items())
def test_relation_losses_are_their_definitions(name, rule):
    LL, LV, VL, VV, text, region = random_blocks()
    slow = slow_side(LL, LV, VV, text, region, rule) + slow_side(VV, VL, LL, region, text, rule)
    assert RELATION[name](LL, LV, VL, VV, text, region).item() == pytest.approx(slow, rel=1e-9)


def test_cacr_is_soft_relation_alignment():
    """CACR sec. 3.4, the proof as a test: closed form and Algorithm 1 give one number, and one
    gradient.
    """
    blocks = random_blocks(words=(6, 3, 1, 4), regions=(5, 2, 3, 1), seed=3)
    LL, LV, VL, VV, text, region = blocks
    loops = losses.soft_relation_alignment(LL, LV, VV, text, region)
    loops = loops + losses.soft_relation_alignment(VV, VL, LL, region, text)
    closed = losses.cacr(*blocks)
    assert closed.item() == pytest.approx(loops.item(), rel=1e-9)
    for a, b in zip(*(torch.autograd.grad(loss, blocks[:4]) for loss in (closed, loops))):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_flat_maps_are_no_way_out_of_standard_cacr():
    """CACR falls as all maps are made flatter; of maps of one scale it stays as it was."""
    LL, LV, _, VV, text, region = random_blocks(words=(6, 4), regions=(5, 4))
    of = lambda side, c: side(c * LL, LV, c * VV, text, region).item()
    assert of(losses.cacr_side, 0.01) < 0.05 * of(losses.cacr_side, 1)
    standard = of(losses.cacr_standard_side, 1)
    assert standard > 0.1 and of(losses.cacr_standard_side, 0.01) == pytest.approx(standard)
    # one flat map has nothing to say: finite, and so is its gradient
    flat = torch.zeros_like(LL).requires_grad_()
    losses.cacr_standard_side(flat, LV, VV, text, region).backward()
    assert flat.grad.isfinite().all()


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
    cacr = losses.cacr_side(LL, one_hot, VV, text, region).item()
    iais = losses.iais_singular_side(LL, LV, VV, text, region).item()
    assert cacr / 4 == pytest.approx(iais, rel=1e-4)


def test_matrix_kl_by_hand():
    p, q = torch.tensor([[[0.75, 0.25], [0.5, 0.5]]]), torch.tensor([[[0.25, 0.75], [0.5, 0.5]]])
    both = losses.matrix_kl(p, q, torch.tensor([[True, True]]))
    assert both.item() == pytest.approx(math.log(3), rel=1e-4)
    assert losses.matrix_kl(p, q, torch.tensor([[False, True]])).item() == 0


def test_small_losses_by_hand():
    rows = [2.0, 0.0, -1.0], [0.0, 1.0, 0.0]
    logits = torch.tensor(rows)
    nll = lambda b, t: math.log(sum(math.exp(x) for x in rows[b])) - rows[b][t]
    mlm = losses.mlm(logits, torch.tensor([0, 2])).item()
    assert mlm == pytest.approx((nll(0, 0) + nll(1, 2)) / 2, rel=1e-6)
    assert losses.mrfr(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]])).item() == 5
    # background is largest, but no target
    probs = [0.9, 0.04, 0.06], [0.1, 0.8, 0.1]
    mrc = losses.mrc(logits, torch.tensor(probs)).item()
    assert mrc == pytest.approx((nll(0, 2) + nll(1, 1)) / 2, rel=1e-6)
    kl = sum(probs[b][c] * (math.log(probs[b][c]) + nll(b, c)) for b in (0, 1) for c in range(3))
    assert losses.mrc_kl(logits, torch.tensor(probs)).item() == pytest.approx(kl / 2, rel=1e-5)
    itm = losses.itm(torch.tensor([[0.0, 1.0]]), torch.tensor([True])).item()
    assert itm == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-6)
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
    words, regions = (torch.randn(2, n, 6, dtype=torch.float64) for n in (4, 5))
    cost = losses.cosine_cost(words, regions, text, region)
    T = losses.ipot(cost, text, region, iterations=20)
    for b, (n, m) in enumerate(((4, 3), (2, 5))):
        slow = torch.tensor(slow_ipot(cost[b, :n, :m].tolist(), 0.5, 20), dtype=torch.float64)
        torch.testing.assert_close(T[b, :n, :m], slow, rtol=1e-9, atol=1e-12)
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
    wra = losses.wra(x, y, mask, mask, torch.tensor([True, False])).item()
    assert wra == pytest.approx(((d[0] - d[1]) / 2).item(), rel=1e-6)


# ---------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RELATION)
def test_rubbish_in_padding_changes_nothing(name, dtype):
    (LL, LV, VL, VV), text, region = as_inputs(name, random_blocks(dtype=dtype))
    clean = LL, LV, VL, VV
    masks = (text, text), (text, region), (region, text), (region, region)
    rubbish = 7.0, 5.0, -4.0, 300.0
    dirty = [spoil(x, *mask, r) for x, mask, r in zip(clean, masks, rubbish)]
    a, b = RELATION[name](*clean, text, region), RELATION[name](*dirty, text, region)
    torch.testing.assert_close(a, b)
    gradients = [
        torch.autograd.grad(loss, x, allow_unused=True) for loss, x in ((a, clean), (b, dirty))
    ]
    for x, y, (rows, columns) in zip(*gradients, masks):
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
        n, m, one = int(text[b].sum()), int(region[b].sum()), slice(b, b + 1)
        blocks = LL[one, :n, :n], LV[one, :n, :m], VL[one, :m, :n], VV[one, :m, :m]
        alone.append(RELATION[name](*blocks, text[one, :n], region[one, :m]).item())
    assert whole == pytest.approx(sum(alone) / len(alone), rel=1e-9)


def test_holes_in_a_mask_are_padding_too():
    """[CLS] and [SEP] are left out by a mask that starts with False."""
    LL, LV, VL, VV, text, region = random_blocks(words=(5, 5), regions=(4, 4))
    holes = text.clone()
    holes[:, 0] = holes[:, 4] = False
    cut = [LL[:, 1:4, 1:4], LV[:, 1:4], VL[:, :, 1:4], VV]
    wanted = losses.cacr(*cut, text[:, 1:4], region).item()
    assert losses.cacr(LL, LV, VL, VV, holes, region).item() == pytest.approx(wanted, rel=1e-9)


def test_wra_ignores_padding():
    text, region = prefix_mask([4, 2]), prefix_mask([3, 5])
    w, v = torch.randn(2, 4, 6), torch.randn(2, 5, 6)
    w2 = torch.where(text[..., None], w, 50.0).requires_grad_()
    v2 = torch.where(region[..., None], v, -9.0).requires_grad_()
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
    plain = losses.wra(w, v, mask, mask)
    torch.testing.assert_close(plain, losses.ot_distance(w, v, mask, mask).mean())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(losses.wra(w, v, mask, mask), plain)


@pytest.mark.parametrize("name", RELATION)
def test_huge_logits_stay_finite(name):
    *blocks, text, region = random_blocks(dtype=torch.float32)
    blocks = [(50 * x).detach().requires_grad_() for x in blocks]
    S, text, region = as_inputs(name, (*blocks, text, region))
    loss = RELATION[name](*S, text, region)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(x.grad is None or torch.isfinite(x.grad).all() for x in S)


def test_joint_softmax_rows_sum_to_one_over_both_modalities():
    LL, LV, VL, VV, text, region = random_blocks()
    P = losses.joint_softmax(*(x[:, None] for x in (LL, LV, VL, VV)), text, region)
    for one, two, n in ((P[0], P[1], 5), (P[2], P[3], 4)):
        ones = torch.ones(3, 1, n, dtype=torch.float64)
        torch.testing.assert_close(one.sum(-1) + two.sum(-1), ones)


# -------------------------------------------------------- word-object alignment, phrase grounding


def pointed(K=4, N=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    corner, wh = (torch.rand(K, N, 2, generator=g, dtype=torch.float64) for _ in range(2))
    boxes = torch.cat([corner * 60, corner * 60 + 10 + wh * 40], dim=-1)
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
    target, mask = torch.tensor([[0.0, 0, 0, 1], [0.0, 0, 0, 0]]), torch.ones(2, 4).bool()
    loss = losses.word_object_alignment(A, target, mask)
    loss.backward()
    assert A.grad[0, 3] < -0.5 and not A.grad[1].any()
    first = losses.word_object_alignment(A.detach()[:1], target[:1], mask[:1])
    torch.testing.assert_close(loss.detach(), first)
    assert losses.word_object_alignment(A[:0], target[:0], mask[:0]) == 0


def phrases(seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)
    h, v = draw(3, 4, 5, 8), draw(3, 6, 8)
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
            real = v[i, region_mask[i]]
            best = [max((p[t, q] @ r).item() for r in real) for q in range(phrase_mask[t].sum())]
            assert sim[t, i].item() == pytest.approx(sum(best) / len(best), abs=1e-9)
    wanted = -sum(sim[t].log_softmax(-1)[t] for t in range(3)) / 3
    torch.testing.assert_close(losses.maf(sim), wanted)
    # W_p's bias makes something of nothing
    spoiled = p.masked_fill(~phrase_mask[..., None], 9.0)
    torch.testing.assert_close(losses.maf_similarity(spoiled, v, phrase_mask, region_mask), sim)
    two = -(sim[1].log_softmax(-1)[1] + sim[2].log_softmax(-1)[2]) / 2
    torch.testing.assert_close(losses.maf(sim[1:], torch.tensor([1, 2])), two)


def test_maf_ignores_padding_and_its_gradients_are_finite():
    h, v, word_mask, phrase_mask, region_mask = phrases()
    similarity = lambda h, v: losses.maf_similarity(
        losses.phrase_embedding(h, v, word_mask, region_mask), v, phrase_mask, region_mask
    )
    clean = similarity(h, v)
    h2 = h.masked_fill(~word_mask[..., None], 7.0).requires_grad_()
    v2 = v.masked_fill(~region_mask[..., None], -3.0).requires_grad_()
    sim = similarity(h2, v2)
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
    floats = [x.float() for x in (pointer, boxes, by_class, by_attribute)]
    target, A = losses.soft_alignment_target(*floats, mask), torch.randn(4, 5)
    plain = losses.word_object_alignment(A, target, mask)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(losses.word_object_alignment(A, target, mask), plain)
        torch.testing.assert_close(losses.soft_alignment_target(*floats, mask), target)
    spoiled = A.masked_fill(~mask, 50.0)
    torch.testing.assert_close(losses.word_object_alignment(spoiled, target, mask), plain)


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
    rows = [(softmax(a), softmax(b)) for a, b in zip(logits.tolist(), teacher.tolist())]
    soft = -sum(q * math.log(p) for ps, qs in rows for p, q in zip(ps, qs)) / 2
    wanted = 0.6 * losses.mlm(logits, words).item() + 0.4 * soft
    ours = losses.mlm_distilled(logits, words, teacher, 0.4).item()
    assert ours == pytest.approx(wanted, rel=1e-5)
    assert losses.mlm_distilled(logits[:0], words[:0], teacher[:0], 0.4).item() == 0


def test_gradcam_and_amc_by_hand():
    """A score that is linear in P has the gradient that it was made with; padded words give
    nothing.
    """
    torch.manual_seed(3)
    draw = lambda f, *shape: f(shape, dtype=torch.float64)
    P, G = draw(torch.rand, 2, 2, 3, 5), draw(torch.randn, 2, 2, 3, 5)
    P.requires_grad_()
    A = losses.gradcam(P, (P * G).sum((1, 2, 3)), prefix_mask([3, 2]))
    for b, n_words in enumerate((3, 2)):
        for v in range(4):
            at = [(b, h, n, v + 1) for h in range(2) for n in range(n_words)]
            wanted = sum(P[i].item() * max(0.0, G[i].item()) for i in at) / 6
            assert A[b, v].item() == pytest.approx(wanted)
    heat, M = draw(torch.rand, 2, 3, 3), draw(torch.zeros, 2, 3, 3)
    M[0, :2, :2], M[1, 2, 2] = 1, 1
    mean = lambda x: sum(x) / len(x)
    cells = [(b, i, j) for b in range(2) for i in range(3) for j in range(3)]
    # of each picture
    inside, outside = (
        [[heat[c].item() for c in cells if c[0] == b and M[c] == value] for b in range(2)]
        for value in (1, 0)
    )
    hinge = max(0, mean(sum(outside, [])) - mean(sum(inside, [])) + 0.9)
    assert losses.amc_mean(heat, M, 0.9).item() == pytest.approx(hinge)
    tops = [max(0, max(o) - max(i) + 0.5) for i, o in zip(inside, outside)]
    assert losses.amc_max(heat, M).item() == pytest.approx(mean(tops))
    both = 0.2 * losses.amc_mean(heat, M).item() + 0.8 * losses.amc_max(heat, M).item()
    assert losses.amc(heat, M).item() == pytest.approx(both)
    squares = [sum(x * x for x in i + o) for i, o in zip(inside, outside)]
    cosine = [sum(i) / math.sqrt(s * len(i)) for i, s in zip(inside, squares)]
    assert losses.amc_cosine(heat, M).item() == pytest.approx(1 - mean(cosine))
    assert losses.amc_cosine(M, M).item() == pytest.approx(0)
    unit = losses.unit_range(heat)
    assert unit.amin().item() == 0 and 0.999 < unit[0].max().item() <= 1


def test_pixel_losses_are_the_same_under_autocast():
    s, own = torch.randn(3, 5), torch.tensor([1, 0, 2])
    heat, M = torch.rand(2, 4, 4), (torch.rand(2, 4, 4) > 0.6).float()
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


def some_arguments():
    """{argument: a value} for two pairs of 3 words and 4 regions, two pointed words, two phrases,
    three images; and {functions: the values that they take instead}.
    """
    draw, text, region = torch.randn, prefix_mask([3, 2]), prefix_mask([4, 1])
    x = dict(words=draw(2, 3, 8), regions=draw(2, 4, 8), text_mask=text, region_mask=region)
    x |= dict(a=draw(2, 3, 8), b=draw(2, 8, 4), x=draw(4).bfloat16(), count=4)
    x |= dict(logits=draw(5, 2), target=torch.ones(5).long(), match=torch.ones(5).bool())
    x |= dict(prediction=draw(5, 2), features=draw(5, 2), region_probs=torch.rand(5, 2))
    x |= dict(label=torch.tensor([1, 0, -1, 1, 0]), scores=draw(2, 3), cost=torch.rand(2, 3, 4))
    x |= dict(S_LL=draw(2, 3, 3), S_LV=draw(2, 3, 4), S_VL=draw(2, 4, 3), S_VV=draw(2, 4, 4))
    x |= dict(S_own=x["S_LL"], S_cross=x["S_LV"], S_other=x["S_VV"], S_back=x["S_VL"])
    x |= {k.replace("S_", "P_"): v.softmax(-1) for k, v in x.items() if k.startswith("S_")}
    x |= dict(cross=x["S_LV"], other=x["S_VV"], p=x["P_LL"], q=x["S_LL"].mT.softmax(-1))
    x |= dict(S=draw(2, 1, 3, 4), column_mask=region, row_mask=text)
    x |= dict(own_mask=text, other_mask=region, similarity=draw(3, 3))
    x |= dict(h=draw(2, 2, 3, 5), v=draw(2, 4, 5), e=draw(2, 2, 5), phrase_mask=prefix_mask([2, 1]))
    x["word_mask"] = torch.ones(2, 2, 3, dtype=torch.bool)
    x |= dict(similarity_m=draw(3, 5), own=torch.tensor([0, 2, 1]), alpha=0.4)
    x |= dict(teacher_logits=draw(3, 5), A=torch.rand(2, 4, 4), M=torch.eye(4).expand(2, 4, 4))
    x |= dict(
        matched=draw(4), edited=draw(4), margins=torch.rand(3), kind=torch.tensor([0, -1, 2, 0])
    )
    boxes = torch.tensor([[0, 0, 2, 2], [1, 1, 3, 3], [2, 0, 4, 2], [0, 0, 1, 1.0]]).expand(2, 4, 4)
    x |= dict(pointer=boxes[:, 0], boxes=boxes, class_similarity=torch.rand(2, 4))
    x |= dict(attribute_similarity=torch.rand(2, 4), A_paraphrase=torch.rand(2, 4, 4))
    P, map_of_pairs = torch.rand(2, 2, 3, 5, requires_grad=True), torch.rand(2, 3, 4)
    return x, {
        "soft_answers": dict(target=torch.rand(2, 3)),
        "box_iou": dict(a=boxes, b=boxes.flip(1)),
        "word_object_alignment": dict(A=draw(2, 4), target=torch.rand(2, 4)),
        "pick_region": dict(scores=draw(2, 4), target=torch.tensor([3, 0])),
        "itc": dict(target=torch.rand(3, 3)),
        "mlm_distilled": dict(target=torch.tensor([0, 2, 1]), logits=draw(3, 5)),
        "gradcam": dict(P=P, score=(P * draw(P.shape)).sum((1, 2, 3))),
        "eqsim": dict(scores=draw(2, 5, 5)),
        "mdetr_align": dict(A=map_of_pairs, positive=map_of_pairs > 0.5),
        "standardise": dict(S=x["S_LL"], mask=text),
        "joint_softmax": {k: v[:, None] for k, v in x.items() if k.startswith("S_")},
    }


@pytest.mark.parametrize("name", PUBLIC)
def test_each_function_runs_when_copied_with_wide_and_the_helpers_it_names(name):
    source, function = inspect.getsource(losses), getattr(losses, name)
    nodes = {n.name: n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)}
    helpers = function.__doc__.partition("Helpers:")[2].split(",")
    space = {"torch": torch, "F": F}
    for part in ["wide", *(h.strip(" .\n") for h in helpers if h.strip()), name]:
        assert part in nodes, f"{name} names a helper {part} that is not there"
        lines = ["@" + ast.get_source_segment(source, d) for d in nodes[part].decorator_list]
        exec("\n".join([*lines, ast.get_source_segment(source, nodes[part])]), space)
    x, differing = some_arguments()
    for names, changes in differing.items():
        x |= changes if name in names.split() else {}
    parameters = inspect.signature(function).parameters.values()
    space[name](*(x[p.name] for p in parameters if p.default is p.empty))


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
        "standardise",
        "box_iou",
    ):
        assert "return" in doc.lower() and any(
            paper in doc
            for paper in ("UNITER", "CACR", "IAIS", "Kervadec", "MAF", "AMC", "ALBEF", "eq. (13)")
            + ("EqBen", "Bica", "Kamath", "CE-CLIP")
        ), name
