"""Losses for word-region alignment: pure functions, tensors in, tensor out. Copy any one of them
with wide() and the helpers it names.

Letters: B pairs, N_L words, N_V regions, N and M either of them, H heads, D width, C classes, K
masked words or regions.
S_LV = logits of one attention layer, rows are words, columns regions; P_LV = the same after the
softmax over its columns.
A mask is bool and True means real; each row of a mask has at least one True. Finite values in
padding change nothing.
Everything is computed in float32 (float64 stays), also under autocast.
Read first: cacr_side and cacr, what the other files are for, then soft_relation_alignment, the same
as loops; the helpers as they are called. Skip what you do not train with: no section needs another
one, and the losses after the five papers come last.

    masked modelling       mlm  mrfr  mrc  mrc_kl                               UNITER eq. 1, 4
    matching               itm                                                  UNITER eq. 2
                           ranking                                              UNITER sec. 4.1
    downstream tasks       soft_answers  classify  pick_region                  UNITER sec. A.2
    word-object alignment  box_iou  soft_alignment_target                       Kervadec eq. 15-18
                           word_object_alignment                                Kervadec eq. 11-14
                           detected                      Kervadec sec. 4 (LXMERT's masked objects)
    phrase grounding       word_weights  phrase_embedding                       MAF eq. 2, 3
                           phrase_scores  maf_similarity  maf                   MAF eq. 4, 5, 6
    optimal transport      cosine_cost  ipot  ot_distance  wra           UNITER eq. 3, Algorithm 1
    relation alignment     matrix_kl                                            CACR eq. 4
                           cacr  cacr_side                                      CACR eq. 3, 5, 6
                           soft_relation_alignment                    CACR Algorithm 1, with loops
                           cacr_standard_side                 CACR of maps of one scale (ours)
                           iais_singular  iais_singular_side       IAIS sec. 3.1 (Ren et al. 2021)
                           iais_singular_released          the same, as in the authors' code
                           iais_distributed  iais_distributed_side              IAIS sec. 3.2
    contrast, distillation itc  itc_targets  negative_weights  mlm_distilled AMC eq. 1, 3 (ALBEF)
    heat maps              gradcam  unit_range                                  AMC eq. 4-6
                           amc  amc_mean  amc_max  amc_cosine                   AMC eq. 7-9, Table 3
    after the five papers  eqsim  EqBen 2023;  sparc  Bica et al. 2024;  selfeq  He et al. 2024
                           mdetr_align  MDETR 2021;  hard_rank  edit_gaps  CE-CLIP 2024
    helpers                wide  product  mean_over  masked_softmax  block_softmax  joint_softmax
                           strongest_partner  row_mean_kl  standardise"""

import torch
import torch.nn.functional as F


# ---------------------------------------------------------------------------------------- helpers


def wide(x):
    """At least float32: bf16 and half are widened, float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def product(a, b):
    """a @ b in float32: autocast would multiply in bf16 whatever the arguments' type.

    a (..., N, D), b (..., D, M)
    returns  (..., N, M), float32; float64 stays"""
    with torch.autocast(a.device.type, enabled=False):
        return wide(a) @ wide(b)


def mean_over(x, count):
    """sum(x) / count, and 0 (with a gradient of 0) instead of nan where nothing was counted."""
    return x.sum() / max(count, 1)


def masked_softmax(S, column_mask):
    """softmax over the real columns; padded columns get probability 0.

    S (B, ..., N, M) logits; column_mask (B, M), at least one True in each row
    returns  (B, ..., N, M), float32"""
    pad = ~column_mask.view(len(column_mask), *[1] * (S.dim() - 2), -1)
    return wide(S).masked_fill(pad, float("-inf")).softmax(dim=-1)


def block_softmax(S, column_mask):
    """What IAIS aligns: each head's softmax over the columns of this block alone, the head mean.

    S (B, H, N, M) logits of one block; column_mask (B, M)
    returns  P (B, N, M): rows sum to 1 inside the block
    Source: IAIS code. It is no slice of the layer's own attention, whose rows sum to 1 over both
    modalities.
    Helpers: masked_softmax."""
    return masked_softmax(S, column_mask).mean(dim=1)


def joint_softmax(S_LL, S_LV, S_VL, S_VV, text_mask, region_mask):
    """The layer's own attention, in blocks: a row's softmax is over words and regions together.

    S_LL (B, H, N_L, N_L) ... S_VV (B, H, N_V, N_V) logits
    returns  P_LL, P_LV, P_VL, P_VV; rows of [P_LL P_LV] sum to 1
    Helpers: masked_softmax."""
    N_L, column = len(text_mask[0]), torch.cat([text_mask, region_mask], dim=1)
    P_L = masked_softmax(torch.cat([S_LL, S_LV], dim=-1), column)
    P_V = masked_softmax(torch.cat([S_VL, S_VV], dim=-1), column)
    return P_L[..., :N_L], P_L[..., N_L:], P_V[..., :N_L], P_V[..., N_L:]


# ------------------------------------------------------------------ masked modelling (UNITER 3.2)


def mlm(logits, target):
    """Masked language modelling: name the hidden words.

        loss = -mean_k log softmax(logits_k)[target_k]                              UNITER eq. (1)

    logits (K, V), target (K,) int64: the K masked words of all pairs; K may be 0, then the loss
        is 0
    returns  scalar >= 0, nats per masked word
    Source: UNITER eq. (1). Here: the mean over words, as the authors' code; the equation sums
        over the words of a pair.
    Helpers: mean_over."""
    return mean_over(F.cross_entropy(wide(logits), target, reduction="none"), len(target))


def mrfr(prediction, features):
    """Masked region feature regression.

        loss = mean_k || prediction_k - features_k ||^2                             UNITER eq. (4)

    prediction, features (K, D_V): the K masked regions and what the detector had given for them;
        K may be 0
    returns  scalar >= 0, squared feature units per masked region
    Source: UNITER sec. 3.2, MRM 1). The authors' code also averages over dimensions: divide the
        result by D_V.
    Helpers: mean_over."""
    return mean_over((wide(prediction) - wide(features)).square(), len(features))


def mrc(logits, region_probs):
    """Masked region classification.

        loss = -mean_k log softmax(logits_k)[argmax_{c >= 1} probs_kc]              UNITER eq. (4)

    logits, region_probs (K, C): class 0 is the background, which is never a target; K may be 0
    returns  scalar >= 0, nats per masked region
    Source: UNITER sec. 3.2, MRM 2); leaving out the background is the authors' code, the paper is
        silent.
    Helpers: mean_over, mlm."""
    return mlm(logits, region_probs[:, 1:].argmax(dim=-1) + 1)


def mrc_kl(logits, region_probs):
    """Masked region classification, soft.

        loss = mean_k KL( region_probs_k || softmax(logits_k) )                     UNITER eq. (4)

    logits, region_probs (K, C): the detector's distribution, background included; K may be 0
    returns  scalar >= 0, nats per masked region
    Source: UNITER sec. 3.2, MRM 3). The authors' code averages over the classes too: divide the
        result by C.
    Helpers: mean_over."""
    log_q = wide(logits).log_softmax(dim=-1)
    return mean_over(F.kl_div(log_q, wide(region_probs), reduction="none"), len(logits))


# --------------------------------------------------------------------------------------- matching


def itm(logits, match):
    """Image-text matching.

        loss = -mean_b log softmax(logits_b)[match_b]                               UNITER eq. (2)

    logits (B, 2): column 1 = "they match"; match (B,) bool or int
    returns  scalar >= 0, nats per pair
    Source: UNITER eq. (2), whose s is sigmoid(logits[:, 1] - logits[:, 0]): the same number."""
    return F.cross_entropy(wide(logits), match.long())


def ranking(scores, margin=0.2):
    """Triplet loss on sigmoids.

        loss = mean_{g,k} max(0, margin + sigmoid(scores_gk) - sigmoid(scores_g0))

    scores (G, 1 + K): a group is one matched pair, first, and its K mismatched ones
    returns  scalar in [0, 1 + margin]
    Source: UNITER sec. 4.1 ("triplet loss"); sigmoid and margin are the authors' code."""
    s = wide(scores).sigmoid()
    return (margin + s[:, 1:] - s[:, :1]).clamp(min=0).mean()


# ------------------------------------------------------------------------------- downstream tasks


def soft_answers(scores, target):
    """Visual question answering with soft targets.

        loss = mean_b sum_a BCE( sigmoid(scores_ba), target_ba )                   UNITER sec. A.2

    scores, target (B, A): target in [0, 1] is how right an answer is; several may be right, or
        none
    returns  scalar >= 0, nats per question
    Source: authors' code; it trains visual entailment so too, on one-hot targets, where the paper
        has the cross-entropy (classify)."""
    each = F.binary_cross_entropy_with_logits(wide(scores), wide(target), reduction="none")
    return each.sum(dim=-1).mean()


def classify(logits, target):
    """One of several classes.

        loss = -mean_b log softmax(logits_b)[target_b]                             UNITER sec. A.2

    logits (B, C), target (B,) int64
    NLVR2: false, true. VCR: wrong, right, for each choice by itself. Visual entailment: its three.
    returns  scalar >= 0, nats per row
    Source: UNITER sec. A.2."""
    return F.cross_entropy(wide(logits), target)


def pick_region(scores, region_mask, target):
    """Referring expressions: which region the text refers to.

        loss = -mean_b log softmax(scores_b over real regions)[target_b]                  sec. A.2

    scores, region_mask (B, N_V), target (B,) int64, a real region of each row
    returns  scalar >= 0, nats per expression; the authors' code sums over the batch: multiply the
             result by B
    Source: UNITER sec. A.2."""
    return F.cross_entropy(wide(scores).masked_fill(~region_mask, float("-inf")), target)


# --------------------------------------------------- word-object alignment (Kervadec et al. 2020)


def box_iou(a, b):
    """Overlap over union of boxes x1 y1 x2 y2, (..., 4) each, any unit; 0 where none has an area"""
    area = lambda box: (box[..., 2:] - box[..., :2]).clamp(min=0).prod(dim=-1)
    near, far = a[..., :2].maximum(b[..., :2]), a[..., 2:].minimum(b[..., 2:])
    # boxes apart have far < near, an area of 0
    inter = area(torch.cat([near, far], dim=-1))
    return inter / (area(a) + area(b) - inter).clamp(min=1e-12)


def soft_alignment_target(pointer, boxes, class_similarity, attribute_similarity, region_mask):
    """Which regions a pointed word should choose: where the pointer is, and what the detector
    calls them.

        PA_j = IoU(pointer, box_j),   SA_j = 3/4 S(word, class_j) + 1/4 S(word, attribute_j)
                                                                           Kervadec eq. (15), (16)
        target = ( PA / sum PA + SA / sum SA ) / 2                                  eq. (17), (18)

    pointer (K, 4), boxes (K, N_V, 4): one unit; region_mask (K, N_V)
    class_similarity, attribute_similarity (K, N_V): cosines of GloVe vectors, 0 for a word, class
             or attribute without one
    returns  (K, N_V) >= 0, rows sum to 1; 0 in padding, and in the whole row where the pointer
             touches no region and no name is like it
    Source: Kervadec sec. 5. Here: negative cosines count as 0, else a row could not be normalised;
    of a criterion that is 0 everywhere, the other one stands alone.
    Helpers: box_iou."""
    PA = box_iou(wide(pointer)[:, None], wide(boxes))
    SA = (0.75 * wide(class_similarity) + 0.25 * wide(attribute_similarity)).clamp(min=0)
    # where and what, each normalised by itself, so that neither outweighs the other
    both = torch.stack([PA, SA]).masked_fill(~region_mask, 0)  # (2, K, N_V)
    total = both.sum(dim=-1, keepdim=True)  # (2, K, 1)
    some = (total > 1e-6).to(both.dtype)
    return (some * both / total.clamp(min=1e-6)).sum(dim=0) / some.sum(dim=0).clamp(min=1)


def word_object_alignment(A, target, region_mask, k=3):
    """A pointed word should choose the regions that its soft target names.

        loss = mean_i KL( target_i || softmax(A_i) )                                eq. (13), (14)

    A (K, N_V): AlignmentDecoder's logits, eq. (12), of the K pointed words; K may be 0, then the
             loss is 0
    target, region_mask (K, N_V): a row of zeros, a pointer that matches nothing, is left out of
             the mean
    returns  scalar >= 0, nats per pointed word
    Source: Kervadec sec. 5, no code was released. Eq. (13) gives 0 to all but the k highest A,
    where eq. (14) is infinite. Here: both distributions live on the k highest of A and the k
    highest of the target, the target normalised again over these, so that a region that the model
    overlooks gets a gradient too."""
    # a padded region is never among the k highest of more than k
    A = wide(A).masked_fill(~region_mask, float("-inf"))
    target = wide(target).masked_fill(~region_mask, 0)
    keep = torch.zeros_like(region_mask)
    for values in (A, target):
        highest = values.topk(min(k, A.shape[-1]), dim=-1).indices
        keep = keep.scatter(-1, highest, True)
    # of fewer than k regions padding would be among the highest
    keep = keep & region_mask
    kept = target.masked_fill(~keep, 0)
    known = kept.sum(dim=-1) > 0  # (K,)
    kept = kept / kept.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    log_A = A.masked_fill(~keep, float("-inf")).log_softmax(dim=-1).masked_fill(~keep, 0)
    each = (kept * (kept.clamp(min=1e-12).log() - log_A)).sum(dim=-1)
    return each.masked_fill(~known, 0).sum() / known.sum().clamp(min=1)


def detected(logits, label, confidence=None):
    """Name what the detector saw in a region: its class, or its attribute.

        loss = mean_k confidence_k CE(logits_k, label_k)

    logits (K, C), label (K,) int64, -1: nothing to name; K may be 0
    confidence (K,) in [0, 1], 1 unless given
    returns  scalar >= 0, nats per region
    Source: Kervadec sec. 4, masked regions, all alike. LXMERT's code: all regions of all pairs,
    masked or not, with the detector's confidence, and the mean is divided by 0.15, the share of
    masked ones.
    Helpers: mean_over."""
    # -1 counts 0 in the sum and still in the mean
    each = F.cross_entropy(wide(logits), label, ignore_index=-1, reduction="none")
    return mean_over(each if confidence is None else each * confidence, len(label))


# ------------------------------------------------------------------------- phrase grounding (MAF)


def word_weights(h, v, word_mask, region_mask):
    """How much each word of a phrase counts: as much as it is sure which region it means.

        a_km = softmax_m( h_k . v_m / sqrt(d) ),   alpha_k = max_m a_km,   beta = softmax_k(alpha)
                                                                                  MAF eq. (2), (3)

    h (B, Q, W, d) word vectors, word_mask (B, Q, W)
    v (B, K, d) region vectors of the same pair, region_mask (B, K)
    returns  beta (B, Q, W): sums to 1 over a phrase's words, 0 in a phrase that is all padding
    Source: MAF sec. 3.1. The authors' code lets padded regions and padded words take part in both
    softmaxes: pass masks that are all True.
    Helpers: product, masked_softmax."""
    # (B, Q, W, K)
    S = product(h.flatten(1, 2), v.mT).unflatten(1, h.shape[1:3]) / h.shape[-1] ** 0.5
    alpha = masked_softmax(S, region_mask).amax(dim=-1)  # (B, Q, W)
    return alpha.masked_fill(~word_mask, float("-inf")).softmax(dim=-1).nan_to_num(0)


def phrase_embedding(h, v, word_mask, region_mask):
    """A phrase as the mean of its words, weighted by word_weights.

        p = sum_k beta_k h_k                                                           MAF eq. (3)

    Arguments as word_weights; returns p (B, Q, d); eq. (3)'s e = W_p p is the model's.
    "average" of Table 3 has beta = 1 / words.
    Helpers: product, masked_softmax, word_weights."""
    return (word_weights(h, v, word_mask, region_mask)[..., None] * wide(h)).sum(dim=-2)


def phrase_scores(e, v, region_mask):
    """How well each phrase fits each region of each image.

        A_n,m = e_n . v_m                                                              MAF eq. (6)

    e (T, Q, d) phrases of T captions, v (I, K, d) regions of I images, region_mask (I, K)
    returns  (T, I, Q, K), -inf at padded regions
    Helpers: product."""
    # (T Q, I K), one product for all pairs, then (T, Q, I, K)
    A = product(e.flatten(0, 1), v.flatten(0, 1).mT).view(*e.shape[:2], *v.shape[:2])
    return A.masked_fill(~region_mask, float("-inf")).transpose(1, 2)


def maf_similarity(e, v, phrase_mask, region_mask):
    """How well each caption fits each image.

        sim(I, S) = mean_n max_m A_n,m                                            MAF eq. (5), (6)

    Arguments as phrase_scores, phrase_mask (T, Q); returns (T, I)
    Source: MAF sec. 3.2. The authors' code sums over padded phrases too, lets padded regions win,
    and divides by the real phrases.
    Helpers: product, phrase_scores."""
    best = phrase_scores(e, v, region_mask).amax(dim=-1)  # (T, I, Q)
    total = best.masked_fill(~phrase_mask[:, None], 0).sum(dim=-1)  # (T, I)
    return total / phrase_mask.sum(dim=-1, keepdim=True).clamp(min=1)


def maf(similarity, own=None):
    """A caption should fit its own image best.

        loss = -mean_t log softmax_i( sim(i, t) )[own_t]                               MAF eq. (4)

    similarity (T, I); own (T,) int64: the image of each caption, its own number unless given
    returns  scalar >= 0, nats per caption
    Source: MAF sec. 3.2; one way only and without temperature, as in the authors' code."""
    if own is None:
        own = torch.arange(len(similarity), device=similarity.device)
    return F.cross_entropy(wide(similarity), own)


# ------------------------------------------------------------------------ optimal transport (WRA)


def cosine_cost(words, regions, text_mask, region_mask):
    """c_ij = 1 - cos(w_i, v_j), 0 where either is padding.

    words (B, N_L, D), regions (B, N_V, D); returns (B, N_L, N_V) in [0, 2]
    Source: UNITER sec. 3.2. Norms count as at least 1e-5 (authors' code), so a zero vector has
        cost 1 to everything.
    Helpers: product."""
    w, v = (F.normalize(wide(x), dim=-1, eps=1e-5) for x in (words, regions))
    cost = 1 - product(w, v.mT)  # (B, N_L, N_V)
    return cost.masked_fill(~(text_mask[:, :, None] & region_mask[:, None, :]), 0)


@torch.no_grad()
def ipot(cost, text_mask, region_mask, beta=0.5, iterations=50, inner=1):
    """Inexact proximal point method: the plan T that carries words to regions cheaply.

        Q = exp(-cost / beta) * T
        delta = 1 / (m Q^T sigma),   sigma = 1 / (n Q delta)          `inner` times
        T = diag(sigma) Q diag(delta)                                 `iterations` times all three

    cost (B, N_L, N_V); text_mask (B, N_L), region_mask (B, N_V)
    returns  T (B, N_L, N_V) >= 0 without gradient: sums to 1, rows to 1/n exactly, columns to 1/m
             in the limit; n and m count the real words and regions, [CLS] and [SEP] included; 0 in
             padding
    Source: UNITER Algorithm 1, with its defaults. The authors' code fails for inner > 1."""
    with torch.autocast(cost.device.type, enabled=False):
        real = text_mask[:, :, None] & region_mask[:, None, :]
        A = (-wide(cost) / beta).exp().masked_fill(~real, 0)
        n, m = text_mask.sum(dim=1)[:, None, None], region_mask.sum(dim=1)[:, None, None]
        word_pad, region_pad = ~text_mask[:, :, None], ~region_mask[:, None, :]
        # (B, N_L, 1)
        sigma = (1 / n).to(A.dtype).expand(-1, cost.shape[1], 1).masked_fill(word_pad, 0)
        # A * (T = all ones)
        T = A.clone()
        for step in range(iterations):
            if step:
                # Q, in T's memory
                T *= A
            for _ in range(inner):
                delta = (1 / (m * (sigma.mT @ T))).masked_fill_(region_pad, 0)  # (B, 1, N_V)
                sigma = (1 / (n * (T @ delta.mT))).masked_fill_(word_pad, 0)  # (B, N_L, 1)
            T *= sigma
            T *= delta
    return T


def ot_distance(words, regions, text_mask, region_mask, beta=0.5, iterations=50):
    """What it costs to turn the words into the regions.

        distance_b = min_T sum_ij T_ij c(w_i, v_j)                                  UNITER eq. (3)

    words (B, N_L, D), regions (B, N_V, D): last hidden states
    returns  (B,) in [0, 2], cosine distance; gradient through the cost, none through the plan
    Helpers: product, cosine_cost, ipot."""
    cost = cosine_cost(words, regions, text_mask, region_mask)
    return (ipot(cost, text_mask, region_mask, beta, iterations) * cost).sum(dim=(1, 2))


def wra(words, regions, text_mask, region_mask, match=None, beta=0.5, iterations=50):
    """Word-region alignment: words and regions of a matched pair should lie close.

        loss = mean_b distance_b                                                    UNITER eq. (3)
        loss = mean_b (distance_b if match_b else -distance_b)       with match: the authors' code

    words (B, N_L, D), regions (B, N_V, D), text_mask, region_mask; match (B,) bool
    returns  scalar in [0, 2], with match in [-2, 2]; cosine distance per pair
    Source: UNITER eq. (3). The paper does not say that the released code pushes mismatched pairs
    apart; it weighs this loss by 0.1.
    Helpers: product, cosine_cost, ipot, ot_distance."""
    distance = ot_distance(words, regions, text_mask, region_mask, beta, iterations)
    return (distance if match is None else torch.where(match.bool(), distance, -distance)).mean()


# ---------------------------------------------------------------------- relation alignment (CACR)


def matrix_kl(p, q, row_mask, eps=1e-6):
    """How far two attention maps are apart, row by row.

        sum_i KL(p_i || q_i) + KL(q_i || p_i)                                         CACR eq. (4)

    p, q (B, N, M): rows are distributions, 0 in padded columns; row_mask (B, N)
    returns  scalar >= 0 in nats: sum over the real rows of a pair, mean over pairs
    Source: CACR eq. (4). Here: eps keeps log(0) finite. IAIS takes row means: row_mean_kl."""
    p, q = wide(p), wide(q)
    # (B, N), both KLs in one product
    rows = ((p - q) * ((p + eps).log() - (q + eps).log())).sum(dim=-1)
    return rows.masked_fill(~row_mask, 0).sum(dim=-1).mean()


def cacr_side(S_own, S_cross, S_other, own_mask, other_mask):
    """One side of CACR: one modality should attend as the other does, seen through cross-attention.

        language:  m-KL( softmax(S_LV S_VV S_LV^T), softmax(S_LL) )                   CACR eq. (3)
                   = cacr_side(S_LL, S_LV, S_VV, text_mask, region_mask)
        vision:    m-KL( softmax(S_VL S_LL S_VL^T), softmax(S_VV) )                   CACR eq. (5)
                   = cacr_side(S_VV, S_VL, S_LL, region_mask, text_mask)

    S_own (B, N, N), S_cross (B, N, M), S_other (B, M, M): blocks of one layer, mean over heads
    own_mask (B, N), other_mask (B, M)
    returns  scalar >= 0 in nats per pair (rows summed); gradient to all three blocks
    Source: CACR sec. 3.2. Here: the equations' index order; the last line of sec. 3.4 prints the
    transpose.
    Helpers: masked_softmax, matrix_kl."""
    with torch.autocast(S_own.device.type, enabled=False):
        # padding stands for nothing; a softmax comes only after the product, so 0 and not -inf
        S_cross = wide(S_cross).masked_fill(~other_mask[:, None, :], 0)
        # a change of basis: what i stands for, times how those relate, times what j stands for
        seen = S_cross @ wide(S_other) @ S_cross.mT  # (B, N, N)
    return matrix_kl(masked_softmax(seen, own_mask), masked_softmax(S_own, own_mask), own_mask)


def cacr(S_LL, S_LV, S_VL, S_VV, text_mask, region_mask):
    """Cross-modal attention congruence regularisation.

        loss = language side + vision side                                            CACR eq. (6)

    S_LL (B, N_L, N_L), S_LV (B, N_L, N_V), S_VL (B, N_V, N_L), S_VV (B, N_V, N_V): blocks of the
             last layer, mean over heads: logits as eq. (1) writes them (here scaled by 1/sqrt(d),
             as the layer uses them), or probabilities, which the text of sec. 3.1 describes ("a
             distribution over columns")
    text_mask (B, N_L), region_mask (B, N_V): the words and regions that take part
    returns  scalar >= 0 in nats per pair (rows summed); gradient to all four blocks
    Source: CACR sec. 3.2; no code was released. Here: mean over heads; the paper names none.
    Helpers: masked_softmax, matrix_kl, cacr_side."""
    language = cacr_side(S_LL, S_LV, S_VV, text_mask, region_mask)
    return language + cacr_side(S_VV, S_VL, S_LL, region_mask, text_mask)


def standardise(S, mask):
    """(S - mean) / deviation, both over the real entries of each map; 0 in padding.

    S (B, N, N), mask (B, N); returns (B, N, N), float32"""
    real = mask[:, :, None] & mask[:, None, :]
    S, n = wide(S).masked_fill(~real, 0), real.sum(dim=(1, 2), keepdim=True)
    S = (S - S.sum(dim=(1, 2), keepdim=True) / n).masked_fill(~real, 0)
    # the clamp: a flat map has no deviation and stays flat
    return S / (S.square().sum(dim=(1, 2), keepdim=True) / n).clamp(min=1e-8).sqrt()


def cacr_standard_side(S_own, S_cross, S_other, own_mask, other_mask):
    """cacr_side of maps of one scale, so that flat maps, congruent with every map, are no way out:

        m-KL( softmax(Z(S_cross S_other S_cross^T)), softmax(Z(S_own)) ),  Z(S) = (S - mean) / std

    Arguments and return value as cacr_side.
    Source: ours; of four changes to CACR tried on three toy worlds the best (tests/RESULTS.md).
    Helpers: masked_softmax, matrix_kl, standardise."""
    with torch.autocast(S_own.device.type, enabled=False):
        S_cross = wide(S_cross).masked_fill(~other_mask[:, None, :], 0)
        seen = standardise(S_cross @ wide(S_other) @ S_cross.mT, own_mask)
        own = standardise(S_own, own_mask)
    return matrix_kl(masked_softmax(seen, own_mask), masked_softmax(own, own_mask), own_mask)


def soft_relation_alignment(S_own, S_cross, S_other, own_mask, other_mask):
    """cacr_side with Algorithm 1's loops, for reading and for the proof: the same number.

        a*_ij = sum_kp S_cross[i,k] S_cross[j,p] S_other[k,p]                     CACR Algorithm 1
        loss  = m-KL( softmax(a*), softmax(S_own) )

    Arguments as cacr_side; returns the same scalar; one pair at a time, one relation i -> j at a
    time: hundreds of times slower.
    Source: CACR sec. 3.3, Algorithm 1, which writes a mean for a* and adds the m-KL of two scalars
    at each i, j, without a softmax. Here: a sum, then softmaxes of rows and one m-KL, as eq. (3),
    (4) and sec. 3.4 have it.
    Helpers: matrix_kl."""
    losses = []
    for b in range(len(S_own)):
        own, other = own_mask[b].nonzero()[:, 0].tolist(), other_mask[b].nonzero()[:, 0]
        # (M', M') real ones only
        relations = wide(S_other)[b][other][:, other]
        seen = []
        for i in own:
            for j in own:
                # soft weighting
                W = torch.outer(wide(S_cross)[b, i, other], wide(S_cross)[b, j, other])
                seen.append((W * relations).sum())
        seen = torch.stack(seen).view(1, len(own), len(own)).softmax(dim=-1)
        said = wide(S_own)[b][own][:, own][None].softmax(dim=-1)
        losses.append(matrix_kl(seen, said, own_mask[b, own][None]))
    return torch.stack(losses).mean()


# ---------------------------------------------------------------------- relation alignment (IAIS)


def strongest_partner(cross, other, other_mask):
    """IAIS's hard change of basis: G_ij = other[c(i), c(j)] with c(i) = argmax of row i of cross;
    the first of a tie.

    cross (B, N, M), other (B, M, M), other_mask (B, M)
    returns  G (B, N, N); gradient to other, none to cross"""
    # one token each: a hard choice, which no gradient passes
    partner = cross.masked_fill(~other_mask[:, None, :], float("-inf")).argmax(dim=-1)  # (B, N)
    pair = torch.arange(len(cross), device=cross.device)[:, None, None]
    return other[pair, partner[:, :, None], partner[:, None, :]]


def row_mean_kl(p, q, row_mask, eps=0.0):
    """IAIS's m-KL, the mean over rows:

        mean_b mean_i sum_j p_ij (log p_ij - log(q_ij + eps)) + q_ij (log q_ij - log(p_ij + eps))

    p, q (B, N, M), rows are distributions; row_mask (B, N); returns a scalar in nats per row.
    Here: the authors' code gives inf or nan where a probability is exactly 0; log never sees less
    than 1e-30, so value and gradient stay finite."""
    p, q = wide(p), wide(q)
    # 0 log 0 is 0: the clamp keeps it from being 0 times -inf
    log = lambda x: x.clamp(min=1e-30).log()
    rows = (p * (log(p) - log(q + eps)) + q * (log(q) - log(p + eps))).sum(dim=-1)  # (B, N)
    return (rows.masked_fill(~row_mask, 0).sum(dim=-1) / row_mask.sum(dim=-1)).mean()


def iais_singular_side(S_own, S_cross, S_other, own_mask, other_mask):
    """One side of IAIS: CACR with one hard counterpart for each token, and the mean over rows.

        m-KL( softmax(S_other[c, c]), softmax(S_own) ),   c(i) = argmax of row i of S_cross
                                                                                     IAIS sec. 3.1

    Arguments and the roles of language and vision as cacr_side
    returns  scalar >= 0 in nats per row; gradient to S_own and S_other, none to S_cross
    Source: Ren et al. 2021, sec. 3.1, from logits. The authors' code: iais_singular_released.
    Helpers: masked_softmax, strongest_partner, row_mean_kl."""
    seen = masked_softmax(strongest_partner(S_cross, S_other, other_mask), own_mask)
    return row_mean_kl(seen, masked_softmax(S_own, own_mask), own_mask)


def iais_singular(S_LL, S_LV, S_VL, S_VV, text_mask, region_mask):
    """Intra-modal self-attention alignment, singular: language side + vision side.
                                                                                     IAIS sec. 3.1

    Arguments as cacr, logits; the authors leave [CLS] and [SEP] out of text_mask.
    returns  scalar >= 0, nats per row
    Helpers: masked_softmax, strongest_partner, row_mean_kl, iais_singular_side."""
    language = iais_singular_side(S_LL, S_LV, S_VV, text_mask, region_mask)
    return language + iais_singular_side(S_VV, S_VL, S_LL, region_mask, text_mask)


def iais_singular_released(P_own, P_cross, P_other, own_mask, other_mask):
    """iais_singular_side as the authors' code: from probabilities, one side with a second softmax.

        m-KL( softmax(P_other[c, c]), P_own ),   so that the left side is close to uniform

    P_* (B, N, .): block_softmax of each block; the rest as iais_singular_side
    returns  scalar >= 0 in nats per row
    Source: IAIS code. Here: finite where a probability is 0 (row_mean_kl).
    Helpers: masked_softmax, strongest_partner, row_mean_kl."""
    seen = masked_softmax(strongest_partner(P_cross, P_other, other_mask), own_mask)
    return row_mean_kl(seen, wide(P_own).masked_fill(~own_mask[:, None, :], 0), own_mask)


def iais_distributed_side(P_own, P_cross, P_back, own_mask, other_mask, eps=1e-6):
    """One side of distributed IAIS: attention to the other modality and back is the own attention.

        m-KL( P_cross P_back, P_own )    language: (P_LL, P_LV, P_VL), vision: (P_VV, P_VL, P_LV)
                                                                                     IAIS sec. 3.2

    P_own (B, N, N), P_cross (B, N, M), P_back (B, M, N): block_softmax of each block
    own_mask (B, N), other_mask (B, M)
    returns  scalar in nats per row, >= -2e-6 N: eps stands in the second logarithm of each KL only
             (authors' code)
    Source: Ren et al. 2021, sec. 3.2, and the IAIS code. Here: finite where a probability is 0
    (row_mean_kl).
    Helpers: product, row_mean_kl."""
    own, other = own_mask[:, None, :], other_mask[:, None, :]
    seen = product(P_cross.masked_fill(~other, 0), P_back.masked_fill(~own, 0))  # (B, N, N)
    return row_mean_kl(seen, wide(P_own).masked_fill(~own, 0), own_mask, eps)


def iais_distributed(P_LL, P_LV, P_VL, P_VV, text_mask, region_mask):
    """Intra-modal self-attention alignment, distributed: language side + vision side.
                                                                                     IAIS sec. 3.2

    P_LL ... P_VV: block_softmax of each block; masks without [CLS] and [SEP]
    returns  scalar in nats per row
    Helpers: product, row_mean_kl, iais_distributed_side."""
    language = iais_distributed_side(P_LL, P_LV, P_VL, text_mask, region_mask)
    return language + iais_distributed_side(P_VV, P_VL, P_LV, region_mask, text_mask)


# ----------------------------------------------------- pixels: ALBEF's and AMC's (He et al. 2022)


def itc_targets(similarity_m, own, alpha):
    """What the contrastive loss should find: the own partner, softened by the momentum model.

        alpha softmax(s_m) + (1 - alpha) onehot

    similarity_m (b, M): the momentum model's similarities divided by the temperature, no gradient
    own (b,): the column of each row's partner
    returns  (b, M), rows sum to 1
    Source: ALBEF's code, AMC sec. 2.1."""
    s = wide(similarity_m)
    one_hot = torch.zeros_like(s).scatter(1, own[:, None], 1)
    return alpha * s.softmax(dim=-1) + (1 - alpha) * one_hot


def itc(similarity, target):
    """Image-text contrastive loss, one direction.

        loss = -mean_b sum_m target_bm log softmax(similarity_b)_m                     AMC eq. (3)

    similarity (b, M): an image with M texts or the reverse, divided by the temperature: the
             momentum model's features of the batch, then of the queue; target (b, M) of itc_targets
    returns  scalar >= 0, nats per pair; ALBEF takes the mean of both directions
    Source: ALBEF's code. Here: the cross-entropy; ALBEF's paper writes a KL divergence, which has
    the same gradient."""
    return -(wide(similarity).log_softmax(dim=-1) * target).sum(dim=-1).mean()


def negative_weights(similarity, own):
    """How likely each other partner is drawn as mismatched: the more similar, the more     ALBEF's

    similarity (b, B): with the B partners of the batch; own (b,): the column of each row's true one
    returns  (b, B), 0 in that column; rows sum to less than 1"""
    return wide(similarity).softmax(dim=-1).scatter(1, own[:, None], 0.0)


def mlm_distilled(logits, target, teacher_logits, alpha):
    """Masked language modelling with a momentum teacher.

        loss = (1 - alpha) mlm - alpha mean_k sum_v softmax(teacher)_kv log softmax(logits)_kv

    logits, teacher_logits (K, V), target (K,): the K masked words; K may be 0
    returns  scalar >= 0, nats per masked word
    Source: ALBEF's code, AMC eq. (1). AMC's code takes the teacher's softmax over token positions
    instead of words, a slip.
    Helpers: mean_over, mlm."""
    # the cross-entropy against what the teacher believes
    soft = -(wide(logits).log_softmax(dim=-1) * wide(teacher_logits).softmax(dim=-1)).sum(dim=-1)
    return (1 - alpha) * mlm(logits, target) + alpha * mean_over(soft, len(target))


def gradcam(P, score, text_mask, create_graph=True, block_of=lambda P: P[..., 1:]):
    """Where the image supports a score.

        A = mean over heads and words of  P * ReLU(d score / d P),   patches only  AMC eq. (4)-(6)

    P (B, H, N_L, 1 + patches): cross-attention probabilities in the graph of score, image [CLS]
             first
    score (B,), or a scalar
    text_mask (B, N_L): padded words give nothing, but count in the mean [authors' code]
    block_of  for a P of another form, such as a single stream's: P -> its part (B, H, N_L,
             patches), words asking patches
    returns  A (B, patches) >= 0; with create_graph a loss on A reaches every weight, through the
             gradient too
    Source: AMC's code. It differentiates the matched logit of matched pairs; eq. (5) writes the
    cross-entropy, whose sign is opposite (pass it as score to have that)."""
    # ReLU before the product equals eq. (6), since P >= 0
    (gradient,) = torch.autograd.grad(score.sum(), P, create_graph=create_graph)
    words = text_mask[:, None, :, None]
    return (block_of(P * gradient.clamp(min=0)) * words).mean(dim=(1, 2))


def unit_range(A, eps=1e-7):
    """Each heat map to [0, 1]:  (A - min) / (max - min + eps)

    A (B, ...); returns the same shape. Source: AMC's code; not in the paper."""
    rest = tuple(range(1, A.dim()))
    low, high = A.amin(rest, keepdim=True), A.amax(rest, keepdim=True)
    return (A - low) / (high - low + eps)


def amc_mean(A, M, margin=0.1):
    """The mean heat inside the region should exceed the mean heat outside by a margin.

        max(0, out - in + margin)                                                      AMC eq. (7)
        in = sum A M / sum M,   out = sum A (1 - M) / sum (1 - M)     sums over all pairs of a batch

    0 where nothing is in, or nothing out (the authors' code: nan).

    A, M (b, h, w): heat maps in [0, 1] and region masks in [0, 1]
    returns  scalar in [0, 1 + margin]
    Source: AMC's code. Eq. (7) has one hinge a pair, then the mean: the mean of
    amc_mean(A[i:i+1], M[i:i+1])."""
    A, M = wide(A), wide(M)
    inside = (A * M).sum() / M.sum().clamp(min=1e-9)
    outside = (A * (1 - M)).sum() / (1 - M).sum().clamp(min=1e-9)
    return (outside - inside + margin).clamp(min=0)


def amc_max(A, M, margin=0.5):
    """The hottest place should lie inside the region, by a margin.

        mean_i max(0, max(A (1 - M)) - max(A M) + margin)                              AMC eq. (8)

    A, M (b, h, w) as amc_mean; returns a scalar in [0, 1 + margin]
    Source: AMC sec. 2.2; the code agrees."""
    A, M = wide(A).flatten(1), wide(M).flatten(1)
    inside, outside = (x.max(dim=1).values for x in (A * M, A * (1 - M)))  # (b,)
    return (outside - inside + margin).clamp(min=0).mean()


def amc(A, M):
    """Attention mask consistency.

        loss = 0.2 amc_mean + 0.8 amc_max    A, M (b, h, w); returns a scalar          AMC eq. (9)

    Helpers: amc_mean, amc_max."""
    return 0.2 * amc_mean(A, M) + 0.8 * amc_max(A, M)


def amc_cosine(A, M):
    """The ablation: heat map and mask should point the same way.

        mean_i 1 - cos(A_i, M_i);   A, M (b, h, w); returns a scalar in [0, 1]

    Source: AMC sec. 4.5, Table 3b, "cosine distance between M and A"; not in the code."""
    return (1 - F.cosine_similarity(wide(A).flatten(1), wide(M).flatten(1), dim=1)).mean()


# ------------------------------------------------------------------ losses after the five papers


def eqsim(scores, margin=0.0, weights=(1.0, 1.0)):
    """Equivariant similarity: a score changes as much from whichever matched pair.

        text side  = max(0, mean_{i<j} ((s_ii - s_ij) - (s_jj - s_ji))^2 - margin)
        image side = max(0, mean_{i<j} ((s_ii - s_ji) - (s_jj - s_ij))^2 - margin)
        loss = w_text text side + w_image image side

    scores (..., B, B): s_ij of image i with caption j, the matched ones on the diagonal; leading
             dimensions are taken together. 0 for B = 1
    returns  scalar >= 0, squared scores
    Source: Wang et al., ICCV 2023, and EqBen's code, whose runs have weights of 0.2 or 0.5."""
    s = wide(scores)
    i, j = torch.triu_indices(*s.shape[-2:], offset=1, device=s.device)
    if not len(i):
        return s.sum() * 0
    ii, jj, ij, ji = s[..., i, i], s[..., j, j], s[..., i, j], s[..., j, i]
    text = ((ii - ij) - (jj - ji)).square().mean()
    image = ((ii - ji) - (jj - ij)).square().mean()
    sides = [(side - margin).clamp(min=0) for side in (text, image)]
    return weights[0] * sides[0] + weights[1] * sides[1]


def sparc(words, regions, text_mask, region_mask, temperature=0.07):
    """Each word should be told from the others of its sentence by the regions that it finds.

        a_l = sim(t_l, .) to [0, 1], below 1 / N_V to 0, over its sum;   c_l = sum_p a_lp v_p
        loss = mean_l of the cross-entropies of t_l against all c_k, and of c_l against all t_k,
               over 2; cosines over the temperature

    words (B, N_L, D), regions (B, N_V, D), text_mask (B, N_L), region_mask (B, N_V)
    returns  scalar >= 0, nats per word: a mean over pairs of means over their words
    Source: Bica et al., ICML 2024 (no code). Here the temperature is fixed, theirs is learned; a
    word that likes all regions the same takes all.
    Helpers: product."""
    t, v, region = wide(words), wide(regions), region_mask[:, None]
    sim = product(t, v.mT)  # (B, N_L, N_V)
    low = sim.masked_fill(~region, float("inf")).amin(dim=-1, keepdim=True)
    span = sim.masked_fill(~region, float("-inf")).amax(dim=-1, keepdim=True) - low
    a = torch.where(span > 1e-7, (sim - low) / span.clamp(min=1e-7), torch.ones_like(sim))
    sparse = region & (a >= 1 / region.sum(dim=-1, keepdim=True))
    a = a.masked_fill(~sparse, 0)
    c = product(a / a.sum(dim=-1, keepdim=True), v.masked_fill(~region_mask[..., None], 0))
    # (B, N_L, N_L), rows are words
    logits = product(F.normalize(t, dim=-1), F.normalize(c, dim=-1).mT) / temperature
    nats = 0
    for S in (logits, logits.mT):
        S = S.masked_fill(~text_mask[:, None], float("-inf"))
        nats = nats - S.log_softmax(dim=-1).diagonal(dim1=-2, dim2=-1) / 2
    nats = nats.masked_fill(~text_mask, 0).sum(dim=-1)
    return (nats / text_mask.sum(dim=-1)).mean()


def mdetr_align(A, positive, text_mask, region_mask):
    """Regions choose the words that stand for them, and words the regions.

        mean over regions with a word of  -mean_{l positive} log softmax over words (A)_lj
        and the same from words to regions; their mean

    A (B, N_L, N_V): logits; positive (B, N_L, N_V) bool: word l stands for region j
    returns  scalar >= 0, nats; 0 where nothing is positive
    Source: Kamath et al., ICCV 2021, loss_contrastive_align, where A are cosines of projected
    states over 0.07 both sums are divided by the number of boxes. Here: AlignmentDecoder's A."""
    A, total = wide(A), 0
    positive = positive & text_mask[:, :, None] & region_mask[:, None]
    for S, chosen, mask in ((A, positive, region_mask), (A.mT, positive.mT, text_mask)):
        log_p = S.masked_fill(~mask[:, None], float("-inf")).log_softmax(dim=-1)
        n = chosen.sum(dim=-1)
        nats = -log_p.masked_fill(~chosen, 0).sum(dim=-1) / n.clamp(min=1)
        total = total + nats.sum() / (n > 0).sum().clamp(min=1) / 2
    return total


def hard_rank(matched, edited, kind, margins):
    """A caption outscores itself with a word exchanged, by a margin that grows with the model.

        loss = mean_i max(0, s(I_i, edited_i) - s(I_i, T_i) + margin_kind(i))

    matched, edited (G,): scores; kind (G,) int64: which kind of edit, -1: none, left out
    margins (K,): edit_gaps of the update before
    returns  scalar >= 0, in scores
    Source: CE-CLIP, Zhang et al., CVPR 2024. Not its other loss, whose targets are all column 0."""
    real = kind >= 0
    hinge = (wide(edited) - wide(matched) + wide(margins)[kind.clamp(min=0)]).clamp(min=0)
    return hinge.masked_fill(~real, 0).sum() / real.sum().clamp(min=1)


def edit_gaps(matched, edited, kind, margins, most=10.0):
    """The next margins of hard_rank: by how much a caption outscores its edit, a mean for each
    kind, between 0 and `most`; where a kind did not occur, as before.

    matched, edited, kind (G,), margins (K,) as hard_rank; returns (K,), without gradient
    Source: CE-CLIP's code."""
    of_kind = kind[:, None] == torch.arange(len(margins), device=kind.device)
    gap, n = (wide(matched) - wide(edited)).detach()[:, None] * of_kind, of_kind.sum(dim=0)
    mean = gap.sum(dim=0) / n.clamp(min=1)
    return torch.where(n > 0, mean.clamp(0, most).to(margins.dtype), margins)


def selfeq(A, A_paraphrase, k=0.8):
    """Heat maps of a text and of its paraphrase should agree, without any box.

        R = [A + A' >= k];  loss = smooth_l1(A', A) + ( std(A R) + std(A' R)
              + max(0, k/2 - sum(A R) / sum R) + max(0, k/2 - sum(A' R) / sum R) ) / 2

    A, A_paraphrase (B, ...): heat maps in [0, 1]; std over all entries of the batch; the gradient
             goes to both
    returns  scalar >= 0; where no place passes k, smooth_l1 + k / 2 (the authors' code: nan)
    Source: He et al., CVPR 2024 (AMC's successor), and its code."""
    A, B = wide(A), wide(A_paraphrase)
    R = (A + B >= k).to(A.dtype)
    consistency = 0
    for x in (A, B):
        inside = (x * R).sum() / R.sum().clamp(min=1)
        # a standard deviation of 0 has no gradient
        std = (x * R).var().clamp(min=1e-12).sqrt()
        consistency = consistency + std + (k / 2 - inside).clamp(min=0)
    return F.smooth_l1_loss(B, A) + consistency / 2
