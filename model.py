"""Encoders for word-region alignment: UNITER's single stream, LXMERT's two, ALBEF's towers, MAF's
embeddings; heads, and official checkpoints.

Letters: B pairs, N_L words, N_V regions, L longest words + regions of the batch, H heads, D
width, D_V width of a region feature, V vocabulary, C region classes, K masked words or regions. A
mask is bool, True = real; real entries come first.

    Attention        softmax(S) V with S = Q K^T / sqrt(d); on a GPU fused, but where the maps S
                     are asked for
    Layer            attention and MLP, each followed by layer norm (BERT)
    CrossLayer       words attend to regions and back, then a Layer each          Kervadec eq. 5-10
    TextEmbedding    word + position + type                                      UNITER sec. 3.1
    RegionEmbedding  feature + box (+ type)                                      UNITER sec. 3.1
    AveragedRegionEmbedding      LXMERT's
    PatchStem        pixels instead of features
    HEADS            one for each downstream task                                UNITER sec. A.2
    AlignmentDecoder which region a word stands for                            Kervadec eq. 11, 12
    Uniter           single stream and heads; forward() returns an Output     UNITER sec. 3.1, 3.2
    Lxmert           two streams and heads; same forward()                       Kervadec sec. 3
    Albef            ViT, text and fusion encoder, momentum copy, queues    AMC sec. 2; Li 2021
    Maf              word vectors and three matrices                             MAF sec. 3.1
    Detector         ResNet-101 Faster R-CNN with attributes: pictures to regions   Anderson 2018
    build            any of them by name and size
    load_pretrained  BERT, UNITER, LXMERT, DeiT, ALBEF, AMC, MAF and our own checkpoints
"""

import copy
import json
import math
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

SIZES = {  # UNITER footnote 12; tiny (to see that something runs) and toy [ours]
    "tiny": dict(width=32, layers=3, heads=2, mlp_dim=64),
    "toy": dict(width=128, layers=4, heads=4, mlp_dim=512),
    "base": dict(width=768, layers=12, heads=12, mlp_dim=3072),
    "large": dict(width=1024, layers=24, heads=16, mlp_dim=4096),
}
# of a two-stream model: language, vision and cross layers [Kervadec sec. 6.3]; toy [ours]
TWO_STREAM_LAYERS = {"tiny": (1, 1, 2), "toy": (2, 1, 2), "base": (9, 5, 5)}
# ALBEF: layers of text and fusion, fusion of them; its ViT; width of the contrastive features
# [ALBEF's code]; toy [ours]
ALBEF_SIZES = {
    "tiny": SIZES["tiny"] | dict(fusion=2, embed=16, vision=SIZES["tiny"]),
    "toy": SIZES["toy"] | dict(fusion=2, embed=64, vision=SIZES["toy"]),
    "base": SIZES["base"] | dict(fusion=6, embed=256, vision=SIZES["base"]),
}
EPS = 1e-12  # layer norm, as BERT


class Maps(NamedTuple):
    """The four blocks of one layer's attention logits: rows attend to columns; undefined where
    either is padding.
    """

    S_LL: torch.Tensor  # (B, H, N_L, N_L)
    S_LV: torch.Tensor  # (B, H, N_L, N_V)
    S_VL: torch.Tensor  # (B, H, N_V, N_L)
    S_VV: torch.Tensor  # (B, H, N_V, N_V)


class Output(NamedTuple):
    """What Uniter.forward and Lxmert.forward return; None for what was not asked for."""

    # (B, N_L, D) last hidden states, undefined in padding
    words: torch.Tensor
    regions: torch.Tensor  # (B, N_V, D)
    maps: tuple = ()  # one Maps for each layer asked for
    word_logits: torch.Tensor = None  # (K, V) of the masked words
    # (K, D_V) what the masked regions' features are predicted to be
    region_features: torch.Tensor = None
    region_logits: torch.Tensor = None  # (K, C) of the masked regions
    # (K, attributes) of the masked regions; two-stream only
    attribute_logits: torch.Tensor = None
    pooled: torch.Tensor = None  # (B, D)
    match: torch.Tensor = None  # (B, 2) logits; column 1 = they match
    rank: torch.Tensor = None  # (B,) how well they match, for ranking
    # what the downstream head says; its shape stands at the head
    scores: torch.Tensor = None
    # (B, N_L, N_V) logits: which region each word stands for; undefined in padding
    alignment: torch.Tensor = None
    # (P, block_of) for Grad-CAM: a layer's attention probabilities, in the graph of all that
    # follows, and block_of(P) (B, H, N_L, N_V), words asking regions, of that or any tensor like
    # it
    gradcam: tuple = ()


class Attention(nn.Module):
    """Queries of one stream attend to keys and values of another.

    x        (B, N, D)  queries
    context  (B, M, D') keys, values; pass x itself for self-attention; D' = context_width, D
             unless given
    mask     (B, M)     True = may be attended to; at least one True in each row
    returns  out (B, N, D), and with gradient S: logits (B, H, N, M) if need_maps, P:
             probabilities if need_probs, else None
    """

    def __init__(self, width, heads, dropout=0.0, context_width=None):
        super().__init__()
        if width % heads:
            near = math.gcd(width, heads)
            raise ValueError(f"width {width} does not divide into {heads} heads; try heads={near}")
        self.heads, self.dropout, from_width = heads, dropout, context_width or width
        self.to_q, self.to_k = nn.Linear(width, width), nn.Linear(from_width, width)
        self.to_v, self.to_out = nn.Linear(from_width, width), nn.Linear(width, width)

    def split(self, z):
        return rearrange(z, "B N (H d) -> B H N d", H=self.heads)

    def forward(self, x, context, mask, need_maps=False, need_probs=False):
        q = self.split(self.to_q(x))
        k = self.split(self.to_k(context))
        v = self.split(self.to_v(context))
        key_mask = mask[:, None, None, :]  # (B, 1, 1, M)
        dropout_p = self.dropout if self.training else 0.0
        # written out: keeps the logits; and a CPU's step is faster, in bf16 several times
        if need_maps or need_probs or q.is_cpu:
            # the logits that the losses align
            S = q @ k.mT / math.sqrt(q.shape[-1])  # (B, H, N, M)
            P = S.masked_fill(~key_mask, float("-inf")).softmax(dim=-1)
            # a loss sees S before dropout
            out = F.dropout(P, dropout_p).to(v.dtype) @ v
        else:  # fused: same numbers, no maps
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask, dropout_p=dropout_p)
        out = self.to_out(rearrange(out, "B H N d -> B N (H d)"))
        return out, P if need_probs else S if need_maps else None


class Layer(nn.Module):
    """x = norm(x + attention(x));  x = norm(x + fc2(gelu(fc1(x)))): norm comes last, as in BERT"""

    def __init__(self, width, heads, mlp_dim, dropout):
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.attention_norm = nn.LayerNorm(width, EPS)
        self.fc1, self.fc2 = nn.Linear(width, mlp_dim), nn.Linear(mlp_dim, width)
        self.mlp_norm, self.dropout = nn.LayerNorm(width, EPS), nn.Dropout(dropout)

    def forward(self, x, mask, need_maps=False, need_probs=False):
        # the maps are a return value: no hook, nothing kept in the module
        attended, S = self.attention(x, x, mask, need_maps, need_probs)
        x = self.attention_norm(x + self.dropout(attended))
        x = self.mlp_norm(x + self.dropout(self.fc2(F.gelu(self.fc1(x)))))
        return x, S


class CrossLayer(nn.Module):
    """Each stream attends to the other, then to itself:

        words, regions = attend(words, regions), attend(regions, words);  then a Layer each

    Both directions share one set of weights and read what the other stream was before [LXMERT's
    code].                                                                   Kervadec eq. (5)-(10)
    returns  words (B, N_L, D), regions (B, N_V, D), and Maps if need_maps, where each block has a
             softmax of its own, or the probabilities of words asking regions (B, H, N_L, N_V) if
             need_probs, or None
    """

    def __init__(self, width, heads, mlp_dim, dropout):
        super().__init__()
        self.cross, self.cross_norm = Attention(width, heads, dropout), nn.LayerNorm(width, EPS)
        self.text = Layer(width, heads, mlp_dim, dropout)
        self.region = Layer(width, heads, mlp_dim, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, words, regions, text_mask, region_mask, need_maps=False, need_probs=False):
        # all that follows the probabilities is written out, for its second derivative
        need_maps |= need_probs
        # both directions before either stream changes
        to_words, S_LV = self.cross(words, regions, region_mask, need_maps, need_probs)
        to_regions, S_VL = self.cross(regions, words, text_mask, need_maps)
        words = self.cross_norm(words + self.dropout(to_words))
        regions = self.cross_norm(regions + self.dropout(to_regions))
        words, S_LL = self.text(words, text_mask, need_maps)
        regions, S_VV = self.region(regions, region_mask, need_maps)
        maps = Maps(S_LL, S_LV, S_VL, S_VV) if need_maps else None
        return words, regions, S_LV if need_probs else maps


class TextEmbedding(nn.Module):
    """norm(word + position + type): (B, N_L) ids -> (B, N_L, D).

    text_type (B, N_L) int64: 0 text, and what a task adds: VCR 2 answer, 3 rationale; type 1
        marks regions. All 0 unless given
    """

    def __init__(self, vocab, width, positions=512, types=2, dropout=0.1):
        super().__init__()
        self.word, self.position = nn.Embedding(vocab, width), nn.Embedding(positions, width)
        self.token_type, self.norm = nn.Embedding(types, width), nn.LayerNorm(width, EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, text, text_type=None):
        if text.shape[1] > self.position.num_embeddings:
            most = self.position.num_embeddings
            raise ValueError(f"a text of {text.shape[1]} tokens; this model has {most} positions")
        # type 0 without looking it up word by word
        kind = self.token_type.weight[0] if text_type is None else self.token_type(text_type)
        x = self.word(text) + self.position.weight[: text.shape[1]] + kind
        return self.dropout(self.norm(x))


class PatchStem(nn.Module):
    """Patches (B, N, 3 p p), pixel by pixel, of a square picture, row by row -> (B, N, D): a few
    small convolutions over the whole picture. A single matrix, as a ViT has, learns shapes far
    slower from few pictures (README); convolutions: Xiao et al. 2021.
    """

    def __init__(self, patch, width):
        super().__init__()
        # one convolution for each prime factor of the patch, so that together they cut it out
        self.patch, strides = patch, []
        for factor in (2, 3, 5, 7):
            while patch % factor == 0:
                strides.append(factor)
                patch //= factor
        strides += [patch] if patch > 1 else []
        channels, layers = 3, []
        for i, stride in enumerate(strides):
            out = max(16, width >> (len(strides) - 1 - i))
            layers.append(nn.Conv2d(channels, out, max(3, stride), stride, int(stride <= 3)))
            layers += [nn.GroupNorm(8, out), nn.GELU()]
            channels = out
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, width, 1))

    def forward(self, x):
        pattern, side = "B (h w) (p q c) -> B c (h p) (w q)", math.isqrt(x.shape[1])
        # back to a picture, so that convolutions see across patches
        x = rearrange(x, pattern, h=side, p=self.patch, q=self.patch)
        return rearrange(self.layers(x), "B D h w -> B (h w) D")


class RegionEmbedding(nn.Module):
    """norm( norm(W feature) + norm(W box) + type ): UNITER's embedding of a region; for patches of
    pixels, W is a PatchStem                                                       UNITER sec. 3.1

    regions (B, N_V, D_V), boxes (B, N_V, 4) = x1 y1 x2 y2 in [0, 1], seven numbers of them enter
        (footnote 3)
    hidden  (K,) int64 places in B*N_V of masked regions: feature zeroed, then a learned vector
            added; the box stays
    type    (D,), or (B, N_V, D) where regions of two images meet: the text table's row 1
            (authors' code; the paper only says "a special modality embedding"); NLVR2 has row 2
            for the right image
    returns (B, N_V, D)
    """

    def __init__(self, features, width, dropout=0.1, patch=0):
        super().__init__()
        self.feature = PatchStem(patch, width) if patch else nn.Linear(features, width)
        self.feature_norm = nn.LayerNorm(width, EPS)
        self.box, self.box_norm = nn.Linear(7, width), nn.LayerNorm(width, EPS)
        # the feature that stands for a masked region; BERT has [MASK] for that
        self.mask, self.norm = nn.Parameter(torch.zeros(features)), nn.LayerNorm(width, EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, regions, boxes, type, hidden=None):
        regions = regions.to(self.feature_norm.weight.dtype)
        if hidden is not None:
            mask = self.mask.expand(len(hidden), -1)
            # by place: a boolean index would make a GPU be waited for
            regions = regions.flatten(0, 1).index_copy(0, hidden, mask).view(regions.shape)
        wh = boxes[..., 2:] - boxes[..., :2]  # (B, N_V, 2)
        # x1 y1 x2 y2 w h and the area
        where = torch.cat([boxes, wh, wh.prod(dim=-1, keepdim=True)], dim=-1)  # (B, N_V, 7)
        x = self.feature_norm(self.feature(regions)) + self.box_norm(self.box(where)) + type
        return self.dropout(self.norm(x))


class AveragedRegionEmbedding(nn.Module):
    """( norm(W feature) + norm(W box) ) / 2: LXMERT's embedding of a region; four numbers of the
    box, no type, no last norm [LXMERT's code]

    Arguments and result as RegionEmbedding; a hidden region's feature is zeroed
    """

    def __init__(self, features, width, dropout=0.1, patch=0):
        super().__init__()
        self.feature = PatchStem(patch, width) if patch else nn.Linear(features, width)
        self.feature_norm = nn.LayerNorm(width, EPS)
        self.box, self.box_norm = nn.Linear(4, width), nn.LayerNorm(width, EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, regions, boxes, hidden=None):
        regions = regions.to(self.feature_norm.weight.dtype)
        if hidden is not None:
            regions = regions.flatten(0, 1).index_fill(0, hidden, 0).view(regions.shape)
        x = self.feature_norm(self.feature(regions)) + self.box_norm(self.box(boxes))
        return self.dropout(x / 2)


class AlignmentDecoder(nn.Module):
    """Which region a word stands for:

        A_ij = s_i . o_j / sqrt(d),  s = norm(S' + FF(S')),  o = norm(O' + FF(O'))
                                                                           Kervadec eq. (11), (12)

    words (B, N_L, D), regions (B, N_V, D): the encoder's last states
    returns A (B, N_L, N_V), undefined in padding
    Here: FF is linear, GELU, linear of the model's width; the paper says "a feed-forward layer
    with layer normalization and residual".
    """

    def __init__(self, width):
        super().__init__()
        layers = lambda: (nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.text, self.region = nn.Sequential(*layers()), nn.Sequential(*layers())
        self.text_norm, self.region_norm = nn.LayerNorm(width, EPS), nn.LayerNorm(width, EPS)

    def forward(self, words, regions):
        s = self.text_norm(words + self.text(words))
        o = self.region_norm(regions + self.region(regions))
        # every word with every region of its own image
        return s @ o.mT / math.sqrt(s.shape[-1])


class Transform(nn.Sequential):
    """linear, GELU, norm: the first half of each prediction head."""

    def __init__(self, width, out=None):
        super().__init__(nn.Linear(width, out or width), nn.GELU(), nn.LayerNorm(out or width, EPS))


# Downstream heads. Each reads what it needs of (x, mask, pooled, regions) = the last layer's
# sequence (B, L, D) and its mask, the pooled first token (B, D), the regions (B, N_V, D), and
# returns scores. Names and order of the parts are the official checkpoints'.


class PooledHead(nn.Sequential):
    """Reads the pooled first token."""

    def forward(self, x, mask, pooled, regions):
        return super().forward(pooled)


class RegionsHead(nn.Sequential):
    """One score for each region."""

    def forward(self, x, mask, pooled, regions):
        return super().forward(regions)[..., 0]


class PairedPooledHead(nn.Sequential):
    """Reads the pooled first tokens of two rows side by side."""

    def forward(self, x, mask, pooled, regions):
        return super().forward(rearrange(pooled, "(P two) D -> P (two D)", two=2))


class PairAttentionHead(nn.Module):
    """NLVR2's rows 2i, 2i + 1: either row first attends to the other, and attention pools it.
                                                                                   UNITER sec. 4.3

    a = relu(W [other seen from here ; own]),   pooled = sum_n softmax_n(relu(w a_n)) a_n
    """

    def __init__(self, width, heads, dropout, **_):
        super().__init__()
        self.left_asks = Attention(width, heads, dropout)
        self.right_asks = Attention(width, heads, dropout)
        self.merge = nn.Linear(2 * width, width)
        self.pool = nn.Linear(width, 1)
        self.out = nn.Linear(2 * width, 2)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask, pooled, regions):
        sides = []
        for ask, own, other in ((self.left_asks, 0, 1), (self.right_asks, 1, 0)):
            # rows alternate: even ones have the left image, odd ones the right
            seen, _ = ask(x[own::2], x[other::2], mask[other::2])  # (B/2, L, D)
            a = self.dropout(self.merge(torch.cat([seen, x[own::2]], dim=-1)).relu())
            weight = self.pool(a)[..., 0].relu().masked_fill(~mask[own::2], float("-inf"))
            # attention pools each side into one vector
            weight = weight.softmax(dim=-1)
            sides.append(torch.einsum("PL, PLD -> PD", self.dropout(weight).to(a.dtype), a))
        return self.out(torch.cat(sides, dim=-1))


# of a width D: the order in which their parts are made decides their first weights
HEADS = {
    # VQA, GQA, visual entailment: (B, A) logits, one for each answer
    "answers": lambda D, answers, **_: PooledHead(*Transform(D, 2 * D), nn.Linear(2 * D, answers)),
    # VCR: (B, 2) logits, wrong and right, of one choice; ReLU, not GELU [authors' code]
    "choice": lambda D, **_: PooledHead(
        nn.Linear(D, 2 * D), nn.ReLU(), nn.LayerNorm(2 * D, EPS), nn.Linear(2 * D, 2)
    ),
    # referring expressions: (B, N_V) scores, undefined in padding; as released for RefCOCO+
    "region": lambda D, **_: RegionsHead(nn.Linear(D, 1)),
    "region-mlp": lambda D, **_: RegionsHead(*Transform(D), nn.Linear(D, 1)),
    # NLVR2: (B, 2) logits, false and true, of both images in one sequence
    "triplet": lambda D, **_: PooledHead(OrderedDict(out=nn.Linear(D, 2))),
    # ... of rows 2i, 2i + 1, the sentence with either image: (B/2, 2); with a hidden layer, as
    # LXMERT and Kervadec et al. (sec. 6.2); where either row first attends to the other
    "pair": lambda D, **_: PairedPooledHead(OrderedDict(out=nn.Linear(2 * D, 2))),
    "pair-mlp": lambda D, **_: PairedPooledHead(*Transform(2 * D), nn.Linear(2 * D, 2)),
    "pair-biattn": PairAttentionHead,
}


class Encoder(nn.Module):
    """What single and two streams share: embeddings, what forward() takes, heads on what comes out.

    vocab, features (D_V), and in subclasses classes: sizes of the data
    width ... mlp_dim  SIZES["base"]
    types              rows of the type table: 2; NLVR2 3, VCR 4
    head               the downstream task's, a name of HEADS, or ""; answers: how many it predicts
    align              with an AlignmentDecoder
    patch              regions are patches of so many pixels a side; 0: they are not
    A subclass has encode() -> (Output, x, mask): the whole sequence (B, L, D), whose first token
    is pooled, and its mask; and predict_regions(h, heads) -> {name in Output: (K, ...)}.
    """

    def __init__(
        self,
        vocab,
        features,
        embedding,
        *,
        width,
        heads,
        mlp_dim,
        positions=512,
        types=2,
        dropout=0.1,
        head="",
        answers=0,
        align=False,
        patch=0,
    ):
        super().__init__()
        self.text_embedding = TextEmbedding(vocab, width, positions, types, dropout)
        self.region_embedding = embedding(features, width, dropout, patch)
        self.sizes, self.head = (width, heads, mlp_dim, dropout), (head, answers, align)

    def add_heads(self):
        """Matching, ranking, the downstream task's head, the alignment decoder; and their start."""
        (width, heads, _, dropout), (head, answers, align) = self.sizes, self.head
        self.match, self.rank = nn.Linear(width, 2), nn.Linear(width, 1)
        how = {"heads": heads, "dropout": dropout, "answers": answers}
        self.task_head = HEADS[head](width, **how) if head else None
        self.aligner = AlignmentDecoder(width) if align else None
        init_model(self, width)

    def forward(
        self,
        text,
        text_mask,
        regions,
        boxes,
        region_mask,
        *,
        text_type=None,
        region_type=None,
        masked_words=None,
        masked_regions=None,
        hidden_regions=None,
        heads=(),
        maps=(),
        need_gradcam=False,
        length=None,
    ):
        """
        text (B, N_L) int64, text_mask (B, N_L); regions (B, N_V, D_V), boxes (B, N_V, 4) in [0, 1],
            region_mask (B, N_V)
        text_type, region_type  (B, N_L), (B, N_V) int64, rows of the type table; 0 and 1 unless
                                given
        masked_words    (K,) int64, places in B*N_L whose word to predict: word_logits are made
                        there and only there
        masked_regions  (K,) int64, places in B*N_V whose feature and class to predict
        hidden_regions  (K,) int64, places in B*N_V that the model may not see (masked_regions
                        unless given)
        heads           of "features", "classes", "attributes" (for masked_regions), "pooled",
                        "match", "rank", "task", "align"
        maps            layers whose attention logits to return, e.g. (-1,); of two streams the
                        cross layers: -2 is the fourth of five. On a GPU the others run fused
        need_gradcam    return what Grad-CAM needs of gradcam_layer(), which is none of maps; from
                        there on nothing runs fused
        length          L of a single stream, if known: without it a GPU has to be waited for
        """
        # multi-task batches overwrite features themselves and hide nothing here
        hidden = masked_regions if hidden_regions is None else hidden_regions
        # two bundles, which encode() opens
        words = text, text_mask, text_type
        seen = regions, boxes, region_mask, region_type, hidden
        out, x, mask = self.encode(words, seen, maps, need_gradcam, length)
        made = {}
        if masked_regions is not None:
            made = self.predict_regions(out.regions.flatten(0, 1)[masked_regions], heads)
        if masked_words is not None:
            # the vocabulary's matrix meets masked words alone, a sixth of them
            h = self.word_head(out.words.flatten(0, 1)[masked_words])  # (K, D)
            # the matrix is the word embedding itself
            made["word_logits"] = F.linear(h, self.text_embedding.word.weight, self.word_bias)
        if "align" in heads:
            made["alignment"] = self.aligner(out.words, out.regions)  # (B, N_L, N_V)
        # all whole-pair heads read the pooled [CLS] state
        if {"pooled", "match", "rank", "task"} & set(heads):
            made["pooled"] = pooled = self.pooler(x[:, 0]).tanh()  # (B, D)
            # scores in float32: those of bf16 tie, and a tie is wrong
            with torch.autocast(x.device.type, enabled=False):
                pooled = pooled.to(self.match.weight.dtype)
                if "match" in heads:
                    made["match"] = self.match(pooled)
                if "rank" in heads:
                    made["rank"] = self.rank(pooled)[:, 0]
                if "task" in heads:
                    states = x.to(pooled), mask, pooled, out.regions.to(pooled)
                    made["scores"] = self.task_head(*states)
        # not _replace(): torch.compile of 2.11 does not follow it
        return Output(out.words, out.regions, out.maps, gradcam=out.gradcam, **made)


class Uniter(Encoder):
    """Single-stream encoder: words and regions in one sequence, every token attends to every
    other.                                                                    UNITER sec. 3.1, 3.2

    classes (C) include the background; all else as Encoder
    """

    def __init__(self, vocab, features=2048, classes=1601, *, layers, width, patch=0, **sizes):
        super().__init__(vocab, features, RegionEmbedding, width=width, patch=patch, **sizes)
        self.layers = nn.ModuleList([Layer(*self.sizes) for _ in range(layers)])
        self.pooler = nn.Linear(width, width)
        self.word_head, self.word_bias = Transform(width), nn.Parameter(torch.zeros(vocab))
        self.feature_head, self.feature_bias = Transform(width), nn.Parameter(torch.zeros(features))
        # tied to their embedding, but a stem of convolutions has no transpose
        self.feature_out = nn.Linear(width, features, bias=False) if patch else None
        self.class_head, self.classifier = Transform(width), nn.Linear(width, classes)
        self.add_heads()

    def encode(self, words, seen, maps, need_gradcam, length):
        """Words and regions in one sequence; see forward."""
        text, text_mask, text_type = words
        regions, boxes, region_mask, region_type, hidden = seen
        N_L, N_V = text.shape[1], regions.shape[1]
        n_words = text_mask.sum(dim=1, keepdim=True)  # (B, 1)
        n_regions = region_mask.sum(dim=1, keepdim=True)
        length = int((n_words + n_regions).max()) if length is None else length
        # a text may be padded beyond every row's words and regions
        length = max(length, N_L)
        types = self.text_embedding.token_type
        kind = types.weight[1] if region_type is None else types(region_type)
        seen = self.region_embedding(regions, boxes, kind, hidden)
        x = torch.cat([self.text_embedding(text, text_type), seen], dim=1)

        # Compact: row b becomes its words, then its regions, then padding, so that no layer pays
        # for two paddings.
        slot = torch.arange(length, device=text.device)[None]  # (1, L)
        source = torch.where(slot < n_words, slot, slot - n_words + N_L)  # (B, L)
        source = source.clamp(max=N_L + N_V - 1)
        mask = slot < n_words + n_regions
        x = x.gather(1, source[..., None].expand(-1, -1, x.shape[-1]))  # (B, L, D)

        # on a GPU only these layers write their attention out
        wanted, logits = {i % len(self.layers) for i in maps}, {}
        cam = gradcam_layer(self.layers, need_gradcam, wanted)
        for i, layer in enumerate(self.layers):
            x, S = layer(x, mask, i in wanted or i > cam, i == cam)
            if i in wanted or i == cam:
                logits[i] = S

        # where each region went, to put states and maps back into (B, N_V)
        place = n_words + torch.arange(N_V, device=text.device)  # (B, N_V)
        place = place.clamp(max=length - 1)
        out = Output(
            words=x[:, :N_L],
            regions=x.gather(1, place[..., None].expand(-1, -1, x.shape[-1])),
            maps=tuple(blocks(logits[i % len(self.layers)], N_L, place) for i in maps),
            gradcam=(logits[cam], lambda P: blocks(P, N_L, place).S_LV) if need_gradcam else (),
        )
        return out, x, mask

    def predict_regions(self, h, heads):
        """Features, with the region embedding's own matrix, and classes of regions h (K, D)"""
        made = {}
        if "features" in heads:
            out = self.feature_out
            back = out.weight if out else self.region_embedding.feature.weight.mT
            made["region_features"] = F.linear(self.feature_head(h), back, self.feature_bias)
        if "classes" in heads:
            made["region_logits"] = self.classifier(self.class_head(h))
        return made


class Lxmert(Encoder):
    """Two-stream encoder: words among themselves, regions among themselves, then each attends to
    the other.                                                           Kervadec sec. 3.2; LXMERT

    classes (background not included) and attributes: sizes of the data
    layers   language, vision and cross layers
    answers  also makes the pre-training's answer head, which is the same one
    """

    def __init__(self, vocab, features=2048, classes=1600, attributes=400, *, layers, width, **how):
        super().__init__(vocab, features, AveragedRegionEmbedding, width=width, **how)
        (language, vision, cross), sizes = layers, self.sizes
        self.text_layers = nn.ModuleList([Layer(*sizes) for _ in range(language)])
        self.region_layers = nn.ModuleList([Layer(*sizes) for _ in range(vision)])
        self.cross_layers = nn.ModuleList([CrossLayer(*sizes) for _ in range(cross)])
        self.pooler = nn.Linear(width, width)
        self.word_head, self.word_bias = Transform(width), nn.Parameter(torch.zeros(vocab))
        self.object_head = Transform(width)  # one for the three that follow
        self.classifier = nn.Linear(width, classes)
        self.attribute_classifier = nn.Linear(width, attributes)
        self.feature_out = nn.Linear(width, features)
        self.add_heads()

    def encode(self, words, seen, maps, need_gradcam, length):
        """Words, then regions, then both. Of region_type and length two streams have no use:
        images are told apart by their rows, and nothing is put into one sequence.
        """
        (text, text_mask, text_type), (regions, boxes, region_mask, _, hidden) = words, seen
        words = self.text_embedding(text, text_type)
        regions = self.region_embedding(regions, boxes, hidden)
        for layer in self.text_layers:
            words, _ = layer(words, text_mask)
        for layer in self.region_layers:
            regions, _ = layer(regions, region_mask)
        wanted, found = {i % len(self.cross_layers) for i in maps}, {}
        cam = gradcam_layer(self.cross_layers, need_gradcam, wanted)
        for i, layer in enumerate(self.cross_layers):
            # beyond that layer all is written out: the fused kernel has no second derivative
            how = i in wanted or i > cam, i == cam
            words, regions, S = layer(words, regions, text_mask, region_mask, *how)
            if i in wanted or i == cam:
                found[i] = S
        out = Output(
            words=words,
            regions=regions,
            maps=tuple(found[i % len(self.cross_layers)] for i in maps),
            gradcam=(found[cam], lambda P: P) if need_gradcam else (),
        )
        x, mask = torch.cat([words, regions], dim=1), torch.cat([text_mask, region_mask], dim=1)
        return out, x, mask

    def predict_regions(self, h, heads):
        """Features, classes and attributes of regions h (K, D)"""
        if not {"features", "classes", "attributes"} & set(heads):
            return {}
        # one transformation for all three predictions
        h = self.object_head(h)
        made = {"region_features": self.feature_out(h), "region_logits": self.classifier(h)}
        return made | {"attribute_logits": self.attribute_classifier(h)}


def gradcam_layer(layers, need_gradcam=True, wanted=()):
    """The layer whose map Grad-CAM explains, the last of the lower half: ALBEF's third of six
    [AMC's code]; beyond the last if none is asked for.
    """
    # beyond the last: no layer's number is above it
    cam = (len(layers) - 1) // 2 if need_gradcam else len(layers)
    if cam in wanted:
        both = f"of layer {cam} both the logits (maps) and the probabilities (need_gradcam)"
        raise ValueError(f"{both} are wanted; {len(layers)} layers are too few for that")
    return cam


def blocks(S, N_L, place):
    """Cut compacted logits S (B, H, L, L) into Maps; place (B, N_V) is each region's row."""
    B, H, L, _ = S.shape
    N_V = place.shape[1]
    # a view for the words, a gather for the regions, whose place differs from row to row
    rows_V = S.gather(2, place[:, None, :, None].expand(B, H, N_V, L))
    return Maps(
        S_LL=S[:, :, :N_L, :N_L],
        S_LV=S[:, :, :N_L].gather(3, place[:, None, None].expand(B, H, N_L, N_V)),
        S_VL=rows_V[..., :N_L],
        S_VV=rows_V.gather(3, place[:, None, None].expand(B, H, N_V, N_V)),
    )


def init_weights(module, std=0.02):
    """BERT's start: normal(0, 0.02) matrices at width 768 (wider for narrower models, so that all
    start alike), zero biases, unit norms.
    """
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


@torch.no_grad()
def init_model(model, width):
    """BERT's start for every part; boxes enter around their middle, else the mean box drowns the
    differences between boxes.
    """
    model.apply(lambda module: init_weights(module, std=0.02 * math.sqrt(768 / width)))
    box = model.region_embedding.box
    # a box in the middle of the image, of a fifth of its sides
    middle = torch.tensor([0.4, 0.4, 0.6, 0.6, 0.2, 0.2, 0.04])
    box.bias.copy_(-box.weight @ middle[: box.in_features])
    init_rank_from_match(model)


@torch.no_grad()
def init_rank_from_match(model):
    """The ranking score starts as the matching head's column 1: a copy (the authors' code shares
    the storage).
    """
    model.rank.weight.copy_(model.match.weight[1:])
    model.rank.bias.copy_(model.match.bias[1:])


# ---------------------------------------- pixels: ALBEF (Li et al. 2021), as AMC sec. 2.1 uses it


class PreNormLayer(nn.Module):
    """x = x + attention(norm(x));  x = x + fc2(gelu(fc1(norm(x)))): a ViT's layer, norm comes
    first; no dropout
    """

    def __init__(self, width, heads, mlp_dim):
        super().__init__()
        self.attention, self.attention_norm = Attention(width, heads), nn.LayerNorm(width, 1e-6)
        self.fc1, self.fc2 = nn.Linear(width, mlp_dim), nn.Linear(mlp_dim, width)
        self.mlp_norm = nn.LayerNorm(width, 1e-6)

    def forward(self, x, mask):
        h = self.attention_norm(x)
        x = x + self.attention(h, h, mask)[0]
        return x + self.fc2(F.gelu(self.fc1(self.mlp_norm(x))))


class Vit(nn.Module):
    """Vision transformer: an image (B, 3, R, R) in patches -> (B, 1 + (R / patch)^2, D), [CLS]
    first, then row by row.
    """

    def __init__(self, width, layers, heads, mlp_dim, resolution=256, patch=16):
        super().__init__()
        self.patch = nn.Conv2d(3, width, patch, patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, 1 + (resolution // patch) ** 2, width))
        self.layers = nn.ModuleList([PreNormLayer(width, heads, mlp_dim) for _ in range(layers)])
        self.norm = nn.LayerNorm(width, 1e-6)

    def forward(self, image):
        x = rearrange(self.patch(image), "B D h w -> B (h w) D")
        # the same weights read pictures of another resolution
        position = resize_position(self.position, x.shape[1])
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + position
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)


def resize_position(position, patches):
    """A ViT's positions (1, 1 + P, D) for a square grid of another number of patches: [CLS]'s
    stays, the grid is resized, bicubic.
    """
    if position.shape[1] == 1 + patches:
        return position
    old, new = math.isqrt(position.shape[1] - 1), math.isqrt(patches)
    grid = rearrange(position[:, 1:], "1 (h w) D -> 1 D h w", h=old)
    grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
    return torch.cat([position[:, :1], rearrange(grid, "1 D h w -> 1 (h w) D")], dim=1)


class FusionLayer(Layer):
    """A BERT layer with attention from words to the image between self-attention and the MLP."""

    def __init__(self, width, heads, mlp_dim, dropout, image_width):
        super().__init__(width, heads, mlp_dim, dropout)
        self.cross = Attention(width, heads, dropout, image_width)
        self.cross_norm = nn.LayerNorm(width, EPS)

    def forward(self, x, mask, image, image_mask, written_out=False, need_probs=False):
        # words among themselves, then words to image, then the MLP
        x = self.attention_norm(x + self.dropout(self.attention(x, x, mask, written_out)[0]))
        seen, P = self.cross(x, image, image_mask, written_out, need_probs)
        x = self.cross_norm(x + self.dropout(seen))
        return self.mlp_norm(x + self.dropout(self.fc2(F.gelu(self.fc1(x))))), P


class AlbefTowers(nn.Module):
    """Image, text and fusion encoder, language head and projections: what ALBEF trains, and of
    what it keeps a momentum copy. Arguments as Albef
    """

    def __init__(
        self, vocab, *, width, layers, fusion, heads, mlp_dim, embed, vision, dropout=0.1, **how
    ):
        super().__init__()
        sizes, positions = (width, heads, mlp_dim, dropout), how.pop("positions", 512)
        # what is left of how: resolution, patch
        self.vision = Vit(**vision, **how)
        self.text_embedding = TextEmbedding(vocab, width, positions, dropout=dropout)
        self.text_layers = nn.ModuleList([Layer(*sizes) for _ in range(layers - fusion)])
        fused = [FusionLayer(*sizes, vision["width"]) for _ in range(fusion)]
        self.fusion_layers = nn.ModuleList(fused)
        self.word_head, self.word_bias = Transform(width), nn.Parameter(torch.zeros(vocab))
        self.vision_proj = nn.Linear(vision["width"], embed)
        self.text_proj = nn.Linear(width, embed)

    def read(self, text, text_mask):
        """(B, N_L) ids -> (B, N_L, D), before any image is seen"""
        x = self.text_embedding(text)
        for layer in self.text_layers:
            x, _ = layer(x, text_mask)
        return x

    def fuse(self, words, text_mask, image, need_gradcam=False):
        """words (B, N_L, D) of read(), image (B, 1 + P, D_V) of vision() -> (B, N_L, D); with
        need_gradcam, P of the gradcam_layer() (B, H, N_L, 1 + P).

        From that layer on attention is written out, so that the map has a gradient, and that
        gradient another one (Grad-CAM in training).
        """
        image_mask = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
        P = None
        cam = gradcam_layer(self.fusion_layers, need_gradcam)
        for i, layer in enumerate(self.fusion_layers):
            words, found = layer(words, text_mask, image, image_mask, i >= cam, i == cam)
            P = found if i == cam else P
        return words, P

    def word_logits_at(self, states, places):
        """(K, V) logits at these places in B*N_L"""
        h = self.word_head(states.flatten(0, 1)[places])
        return F.linear(h, self.text_embedding.word.weight, self.word_bias)

    def features(self, image, words):
        """Unit vectors of the [CLS] states: (B, E) twice"""
        vectors = self.vision_proj(image[:, 0]), self.text_proj(words[:, 0])
        return tuple(F.normalize(x, dim=-1) for x in vectors)


class Albef(nn.Module):
    """Image encoder, text encoder, fusion encoder; a momentum copy (teacher) and queues of its
    features.                                                               ALBEF; AMC sec. 2, 2.1

    vision          width, layers, heads, mlp_dim of the ViT
    layers, fusion  text layers in all, and the last of them, which see the image
    embed           E, width of the contrastive features
    queue           how many of the teacher's features are kept as further negatives
    """

    def __init__(self, vocab, *, width, embed, queue=65536, temperature=0.07, **sizes):
        super().__init__()
        self.student = AlbefTowers(vocab, width=width, embed=embed, **sizes)
        # narrow models start wider, as in init_model()
        self.student.apply(lambda module: init_weights(module, std=0.02 * math.sqrt(768 / width)))
        for parameter in (self.student.vision.cls, self.student.vision.position):
            nn.init.trunc_normal_(parameter, std=0.02)
        self.match, self.temperature = nn.Linear(width, 2), nn.Parameter(torch.tensor(temperature))
        # a moving average of the student; it gets no gradient
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        # buffers: they are in the checkpoint, so that a resumed run has the same negatives
        for name in ("image_queue", "text_queue"):
            self.register_buffer(name, F.normalize(torch.randn(embed, queue), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))

    @torch.no_grad()
    def update_teacher(self, momentum):
        """teacher = momentum * teacher + (1 - momentum) * student: before each step [ALBEF]"""
        teacher, student = list(self.teacher.parameters()), list(self.student.parameters())
        # one kernel for hundreds of tensors
        torch._foreach_lerp_(teacher, student, 1 - momentum)

    @torch.no_grad()
    def enqueue(self, image, text):
        """Put the teacher's features (B, E) of all processes into the queues, over the oldest;
        they wrap at any place.
        """
        places = self.queue_ptr + torch.arange(len(image), device=image.device)
        at = places % self.image_queue.shape[1]
        self.image_queue[:, at] = image.T.to(self.image_queue.dtype)
        self.text_queue[:, at] = text.T.to(self.text_queue.dtype)
        self.queue_ptr.copy_((self.queue_ptr + len(image)) % self.image_queue.shape[1])

    def forward(self, text, text_mask, image, image_of=slice(None), need_gradcam=False):
        """match (B, 2) logits, column 1 = they match; and P (B, H, N_L, 1 + patches) of
        gradcam_layer(), if the score is to be explained, else None. image_of (B,): the image of
        each text, where several have one.
        """
        words, image = self.student.read(text, text_mask), self.student.vision(image)[image_of]
        states, P = self.student.fuse(words, text_mask, image, need_gradcam)
        return self.score(states), P

    def score(self, states):
        """(B, 2) logits of matching, float32 also under autocast"""
        with torch.autocast(states.device.type, enabled=False):
            return self.match(states[:, 0].to(self.match.weight.dtype))


class Maf(nn.Module):
    """What MAF learns: word vectors (from GloVe) and the matrices of eq. (1), (3); losses.py has
    the equations.                                                                    MAF sec. 3.1

    words     rows of the table; width d; features D_V: 2048 (ResNet), 4096 (VGG)
    inputs    which of a region's label, attribute and feature make its vector (Table 3)
    start     of W_f and of W_p: "zero", "xavier", "identity"; Table 4 finds ("zero", "identity")
              best
    mini      the authors' "identity and noise" is learned: W_p p + 1e-5 W_mini p
    """

    START = "zero", "identity"

    def __init__(self, words, width=300, features=2048, inputs=("label", "feature"), start=START):
        super().__init__()
        self.word, self.inputs = nn.Embedding(words, width), tuple(inputs)
        self.phrase, self.mini, self.attribute = (nn.Linear(width, width) for _ in range(3))
        self.feature = nn.Linear(features, width)
        fill = {"zero": nn.init.zeros_, "xavier": nn.init.xavier_uniform_}
        fill["identity"] = nn.init.eye_
        # attributes start silent beside labels; alone they start as what they are
        names = *start, "zero" if "label" in inputs else "identity"
        for linear, name in zip((self.feature, self.phrase, self.attribute), names):
            fill[name](linear.weight)
            nn.init.zeros_(linear.bias)
        # else nothing would be there to start from
        if "label" not in inputs and start[0] == "zero":
            nn.init.xavier_uniform_(self.feature.weight)

    def forward(self, phrases, labels, attributes, features, place=None):
        """
        phrases (B, Q, W) int64 words of each phrase; labels, attributes (B, K) int64 words of
            each region
        features (B, K, D_V); or (R, D_V) of the real regions alone and place (R,) int64, where in
            B*K they are: the rest counts as 0
        returns  h (B, Q, W, d) word vectors, v (B, K, d) region vectors, eq. (1)
        """

        def seen():
            # padding is not multiplied: only rows of real regions arrive here
            f = self.feature(features.to(self.feature.weight.dtype))
            if place is None:
                return f
            # W_f 0 + b where there is no region
            whole = self.feature.bias.to(f.dtype).expand(labels.numel(), -1)
            return whole.index_copy(0, place, f).view(*labels.shape, -1)

        parts = {
            "label": lambda: self.word(labels),
            "attribute": lambda: self.attribute(self.word(attributes)),
            "feature": seen,
        }
        return self.word(phrases), sum(parts[name]() for name in self.inputs)

    def project(self, p):
        """W_p of eq. (3): (..., d) phrase means -> phrase vectors."""
        return self.phrase(p) + 1e-5 * self.mini(p)


# ------------ the bottom-up-attention detector (Anderson et al. 2018), to look with, not to train

BGR_MEAN = 102.9801, 115.9465, 122.7717  # of 0 ... 255
CLAMP = math.log(1000 / 16)  # of a box's growth


class ConvNorm(nn.Conv2d):
    """Convolution without bias, and the batch norm that was trained with it."""

    def __init__(self, a, b, kernel, stride=1, padding=0, dilation=1):
        super().__init__(a, b, kernel, stride, padding, dilation, bias=False)
        self.norm = nn.BatchNorm2d(b)

    def forward(self, x):
        return self.norm(super().forward(x))


class Bottleneck(nn.Module):
    """x = relu(shortcut(x) + conv3(relu(conv2(relu(conv1(x))))));  the stride sits in conv1."""

    def __init__(self, a, middle, b, stride=1, dilation=1, first=False):
        super().__init__()
        self.shortcut = ConvNorm(a, b, 1, stride) if first else None
        self.conv1, self.conv3 = ConvNorm(a, middle, 1, stride), ConvNorm(middle, b, 1)
        self.conv2 = ConvNorm(middle, middle, 3, 1, dilation, dilation)

    def forward(self, x):
        out = self.conv3(self.conv2(self.conv1(x).relu_()).relu_())
        return out.add_(x if self.shortcut is None else self.shortcut(x)).relu_()


def stage(blocks, a, middle, b, stride=1, dilation=1):
    """One stage of the ResNet: `blocks` Bottlenecks, the first with the stride"""
    rest = [Bottleneck(b, middle, b, 1, dilation) for _ in range(blocks - 1)]
    return nn.Sequential(Bottleneck(a, middle, b, stride, dilation, first=True), *rest)


class Detections(NamedTuple):
    """What a detector sees in one image, by falling confidence; K regions."""

    # (K, 4) x1 y1 x2 y2, pixels of the picture as it came in
    boxes: torch.Tensor
    features: torch.Tensor  # (K, 2048) >= 0
    cls_prob: torch.Tensor  # (K, 1 + classes), background first
    cls_id: torch.Tensor  # (K,) of the classes without background
    cls_conf: torch.Tensor
    attr_id: torch.Tensor  # (K,) of the attributes
    attr_conf: torch.Tensor
    keep: torch.Tensor  # (K,) which proposals
    # the overlap that was allowed; -1: none of them left enough regions
    threshold: float


class Detector(nn.Module):
    """Faster R-CNN on a ResNet-101's fourth stage, with attributes: the published weights' names
    and shapes.                                                               Anderson et al. 2018

    Sizes are the published ones:
    stem, res2, bottleneck  widths, the last two doubled from stage to stage
    blocks                  of res2 ... res5
    hidden                  of the proposal network
    It only looks: always in eval mode, batch norms as trained. Feed BGR, resize_for_detector()'s;
    one image a batch gives the same numbers whatever comes with it (padding is seen).
    """

    def __init__(
        self,
        *,
        stem=64,
        res2=256,
        bottleneck=64,
        blocks=(3, 4, 23, 3),
        hidden=512,
        anchors=(64, 128, 256, 512),
        ratios=(0.5, 1.0, 2.0),
        classes=1600,
        attributes=400,
        embedding=256,
        attr_hidden=512,
    ):
        super().__init__()
        self.backbone = nn.ModuleDict(
            {
                "stem": nn.ModuleDict({"conv1": ConvNorm(3, stem, 7, 2, 3)}),
                "res2": stage(blocks[0], stem, bottleneck, res2),
                "res3": stage(blocks[1], res2, 2 * bottleneck, 2 * res2, 2),
                "res4": stage(blocks[2], 2 * res2, 4 * bottleneck, 4 * res2, 2),
            }
        )
        table, A, width = nn.ModuleDict, len(anchors) * len(ratios), 8 * res2
        rpn_head = {
            "conv": nn.Conv2d(4 * res2, hidden, 3, padding=1),
            "objectness_logits": nn.Conv2d(hidden, A, 1),
            "anchor_deltas": nn.Conv2d(hidden, 4 * A, 1),
        }
        cells = nn.ParameterList([nn.Parameter(cell_anchors(anchors, ratios))])
        anchor_generator = table({"cell_anchors": cells})
        self.proposal_generator = table(
            {"rpn_head": table(rpn_head), "anchor_generator": anchor_generator}
        )
        res5 = stage(blocks[3], 4 * res2, 8 * bottleneck, width, 1, 2)
        box_predictor = {
            "cls_score": nn.Linear(width, classes + 1),
            "bbox_pred": nn.Linear(width, 4 * classes),
            "cls_embedding": nn.Embedding(classes + 1, embedding),
            "fc_attr": nn.Linear(width + embedding, attr_hidden),
            "attr_score": nn.Linear(attr_hidden, attributes + 1),
        }
        self.roi_heads = table({"res5": res5, "box_predictor": table(box_predictor)})
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        return super().train(False)

    def backbone_features(self, images):
        """(B, 3, H, W) -> (B, 1024, H/16, W/16)"""
        # ceil_mode, as in the Caffe model whose weights these are
        x = F.max_pool2d(self.backbone["stem"]["conv1"](images).relu_(), 3, 2, ceil_mode=True)
        return self.backbone["res4"](self.backbone["res3"](self.backbone["res2"](x)))

    def score_anchors(self, x):
        """Objectness (B, h w A), boxes (B, h w A, 4) before clipping, and deltas (B, h w A, 4);
        anchor (y w + x) A + a.
        """
        head = self.proposal_generator["rpn_head"]
        h = head["conv"](x).relu_()
        logits, deltas = head["objectness_logits"](h), head["anchor_deltas"](h)
        cells = self.proposal_generator["anchor_generator"]["cell_anchors"][0]
        deltas = rearrange(deltas, "B (A four) h w -> B (h w A) four", four=4)
        boxes = decode_boxes(grid_anchors(cells, *x.shape[-2:]), deltas, (1.0, 1.0, 1.0, 1.0))
        return rearrange(logits, "B A h w -> B (h w A)"), boxes, deltas

    def propose(self, x, sizes, before=6000, after=300, overlap=0.7):
        """Of each image the boxes that may hold something: [(n, 4)], by falling score; sizes (B,
        2): height and width without padding.
        """
        logits, boxes, _ = self.score_anchors(x)
        found = []
        for score, box, size in zip(logits, boxes, sizes.tolist()):
            score, order = score.topk(min(before, len(score)))
            # sizes without padding: a proposal in the black border is no region
            box = clip_boxes(box[order], size)
            # what lay outside the picture has no area left
            whole = ((box[:, 2:] - box[:, :2]) > 0).all(dim=1)
            box, score = box[whole], score[whole]
            found.append(box[nms(box, score, overlap)[:after]])
        return found

    def describe_regions(self, x, proposals):
        """Features (R, 2048), logits of classes (R, classes + 1) and attributes (R, attributes +
        1), deltas (R, 4 classes) of all proposals.
        """
        counts = torch.tensor([len(p) for p in proposals], device=x.device)
        image = torch.arange(len(proposals), device=x.device).repeat_interleave(counts)
        rois = torch.cat([image[:, None].to(proposals[0].dtype), torch.cat(proposals)], dim=1)
        pooled = roi_pool(x, rois, 14, 1 / 16)
        # a hundred at a time: 300 regions of 14 x 14 x 1024 numbers are large
        parts = [self.roi_heads["res5"](part).mean(dim=(2, 3)) for part in pooled.split(100)]
        features, head = torch.cat(parts), self.roi_heads["box_predictor"]
        logits = head["cls_score"](features)
        kind = head["cls_embedding"](logits.argmax(dim=1))  # of all classes, background too
        hidden = head["fc_attr"](torch.cat([features, kind], dim=1)).relu_()
        return features, logits, head["attr_score"](hidden), head["bbox_pred"](features)

    @torch.inference_mode()
    def forward(self, images, sizes, scales=None, regions=(36, 36), proposing=None, **selecting):
        """[Detections] of images (B, 3, H, W) of heights and widths sizes (B, 2), padded right
        and below with 0.

        scales (B, 2): the picture's own height and width by these; regions: at least and at most
            so many; proposing: options of propose(); selecting: of select_boxes()
        """
        x = self.backbone_features(images)
        proposals = self.propose(x, sizes, **proposing or {})
        counts = [len(p) for p in proposals]
        columns = [column.split(counts) for column in self.describe_regions(x, proposals)]
        found = []
        for i, (boxes, features, logits, attributes, deltas) in enumerate(zip(proposals, *columns)):
            # background is the last class here, and the first in every region store
            probs = logits.softmax(dim=1)
            deltas = deltas.view(len(boxes), -1, 4)
            boxes = decode_boxes(boxes[:, None], deltas, (10.0, 10.0, 5.0, 5.0))
            boxes = clip_boxes(boxes, sizes[i].tolist())
            keep, classes, threshold = select_boxes(boxes, probs, regions, **selecting)
            conf, attr = attributes[keep, :-1].softmax(dim=1).max(dim=1)
            own = boxes[keep, classes] * (scales[i].flip(0).repeat(2) if scales is not None else 1)
            kinds = probs[keep].roll(1, dims=1), classes, probs[keep, classes], attr, conf
            found.append(Detections(own, features[keep], *kinds, keep, threshold))
        return found


def select_boxes(boxes, probs, regions, thresholds=(0.5, 0.6, 0.7), confidence=0.0):
    """Which proposals (K,), their classes (K,), and the overlap allowed: each offers its best
    class's box; non-maximum suppression across classes with the first threshold that leaves
    enough, cut to the most. Where none does, the last one's boxes, with threshold -1.

    boxes (R, classes, 4), probs (R, classes + 1), background last; regions: least and most
    """
    score, kind = probs[:, :-1].max(dim=1)
    own = boxes[torch.arange(len(boxes), device=boxes.device), kind]
    keep, used = kind[:0], -1.0
    for threshold in thresholds:
        keep = nms(own, score, threshold)[: regions[1]]
        # as many as are confident, within these bounds [UNITER's rule]
        keep = keep[: max(regions[0], int((score[keep] > confidence).sum()))]
        if len(keep) >= regions[0]:
            used = threshold
            break
    return keep, kind[keep], used


def cell_anchors(sizes, ratios):
    """(A, 4) boxes around 0 of these sizes (outer loop) and ratios, height by width (inner)"""
    w = [math.sqrt(s * s / r) for s in sizes for r in ratios]
    w = torch.tensor(w, dtype=torch.float64)
    h = w * torch.tensor(ratios, dtype=torch.float64).repeat(len(sizes))
    return (torch.stack([-w, -h, w, h], dim=1) / 2).float()


def grid_anchors(cells, h, w, stride=16):
    """(h w A, 4): the cells' anchors around each place of the map, the first at 0"""
    rows, columns = (torch.arange(n, device=cells.device) * stride for n in (h, w))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return (torch.stack([x, y, x, y], dim=-1).view(-1, 1, 4) + cells).view(-1, 4)


def decode_boxes(boxes, deltas, weights):
    """Boxes (..., 4) moved and grown by deltas (..., 4); growth is clamped from above after
    division by the weights.
    """
    wh = boxes[..., 2:] - boxes[..., :2]
    middle = boxes[..., :2] + 0.5 * wh
    # the growth is clamped, else one bad number makes a box of infinite size
    d = deltas / torch.tensor(weights, device=deltas.device)
    middle, wh = d[..., :2] * wh + middle, d[..., 2:].clamp(max=CLAMP).exp() * wh
    return torch.cat([middle - 0.5 * wh, middle + 0.5 * wh], dim=-1)


def clip_boxes(boxes, size):
    """Boxes (..., 4) inside a picture of this (height, width)"""
    h, w = size
    most = torch.tensor([w, h, w, h], dtype=boxes.dtype, device=boxes.device)
    return boxes.clamp(min=0).minimum(most)


def nms(boxes, scores, overlap):
    """Non-maximum suppression: which boxes to keep, by falling score: (n,) int64.

    One is dropped if it overlaps (IoU strictly above) an earlier one that is kept. That is a fixed
    point of keep = not (earlier and kept and overlapping).any(), which is unique; iterating from
    "all" gets there in as many rounds as the longest chain of boxes that drop each other.
    Ties: the lower index first; a box of no area drops none.
    """
    order = scores.argsort(descending=True, stable=True)
    x1, y1, x2, y2 = boxes[order].unbind(dim=1)
    area = (x2 - x1) * (y2 - y1)
    width = (torch.minimum(x2[:, None], x2) - torch.maximum(x1[:, None], x1)).clamp_(min=0)
    height = (torch.minimum(y2[:, None], y2) - torch.maximum(y1[:, None], y1)).clamp_(min=0)
    shared = width.mul_(height)
    iou = shared / (area[:, None] + area - shared)
    # float32 against the threshold itself, not against its float32, as the CPU kernels of others do
    limit = torch.tensor(overlap, dtype=torch.float32)
    above = iou >= limit if limit.double().item() > overlap else iou > limit
    # row drops column
    drops = above.triu_(diagonal=1).to(boxes.dtype)
    keep = torch.ones(len(boxes), dtype=boxes.dtype, device=boxes.device)
    while True:
        again = (keep @ drops == 0).to(boxes.dtype)
        if torch.equal(again, keep):
            return order[keep.bool()]
        keep = again


def doubled_window(x, dim, level):
    """x holds the maxima of windows of 2^(level - 1) along a dimension: those of 2^level."""
    step, n = 2 ** (level - 1), x.shape[dim]
    out = x.clone()
    if step < n:
        ahead, here = x.narrow(dim, step, n - step), out.narrow(dim, 0, n - step)
        torch.maximum(here, ahead, out=here)
    return out


def roi_pool(x, rois, size, scale):
    """The maximum of each of size x size bins of each region: (R, C, size, size); an empty bin is
    0.

    x (B, C, H, W); rois (R, 5): number of the image, x1 y1 x2 y2; corners times scale are rounded
    half away from zero and both count; bins overlap. A bin's maximum is that of at most four
    windows whose sides are powers of two, so windows are made once for all regions.
    """
    B, C, H, W = x.shape
    if not len(rois):
        return x.new_zeros(0, C, size, size)
    corner = rois[:, 1:] * scale
    # torch.round() would round halves to even
    corner = corner.sign() * (corner.abs() + 0.5).floor()  # (R, 4)
    step = (corner[:, 2:] - corner[:, :2] + 1).clamp(min=1) / size  # (R, 2) width, height of a bin
    p = torch.arange(size, device=x.device, dtype=step.dtype)
    spans = []
    for start, bin, most in ((corner[:, 1], step[:, 1], H), (corner[:, 0], step[:, 0], W)):
        low = ((p * bin[:, None]).floor() + start[:, None]).clamp(0, most).long()  # (R, size)
        high = (((p + 1) * bin[:, None]).ceil() + start[:, None]).clamp(0, most).long()
        level = (high - low).clamp(min=1).float().log2().floor().long()
        first, last = low.clamp(max=most - 1), (high - 2**level).clamp(0, most - 1)
        spans.append((first, last, level, high <= low))
    (top, bottom, tall, no_rows), (left, right, wide, no_columns) = spans
    # channels last: a gather moves whole rows
    windows, rows = [], x.permute(0, 2, 3, 1)
    for a in range(int(tall.max()) + 1):
        rows = doubled_window(rows, 1, a) if a else rows
        columns = rows
        for b in range(int(wide.max()) + 1):
            columns = doubled_window(columns, 2, b) if b else columns
            windows.append(columns)
    windows, levels = torch.stack(windows).reshape(-1, C), int(wide.max()) + 1
    # (R, size, size)
    table = (tall[:, :, None] * levels + wide[:, None, :]) * B + rois[:, 0].long()[:, None, None]
    out = None
    for y in (top, bottom):
        for column in (left, right):
            part = windows[((table * H + y[:, :, None]) * W + column[:, None, :]).flatten()]
            out = part if out is None else torch.maximum(out, part, out=out)
    out = rearrange(out, "(R h w) C -> R C h w", h=size, w=size)
    return out.masked_fill((no_rows[:, :, None] | no_columns[:, None, :])[:, None], 0)


def detector_size(h, w, shorter=800, longer=1333):
    """(height, width) with the shorter side as given, unless the longer one would pass its own
    bound; halves go up
    """
    # the shorter side decides, unless the longer one then is too long
    scale = shorter / min(h, w)
    h, w = (shorter, scale * w) if h < w else (scale * h, shorter)
    if max(h, w) > longer:
        h, w = h * longer / max(h, w), w * longer / max(h, w)
    return max(1, int(h + 0.5)), max(1, int(w + 0.5))


def resize_for_detector(pixels, shorter=800, longer=1333):
    """(H, W, 3) uint8, red first -> (3, h, w) float32, blue first, less the mean: what the
    detector was trained on. No antialiasing [authors' code]
    """
    size = detector_size(*pixels.shape[:2], shorter, longer)
    x = pixels.permute(2, 0, 1)[None].float()
    x = F.interpolate(x, size, mode="bilinear", align_corners=False)[0].flip(0)
    return x - torch.tensor(BGR_MEAN, device=x.device).view(3, 1, 1)


def load_detector(path):
    """A Detector of a weights file's own sizes, filled from it. A file of another architecture,
    or one that lacks something, is a CheckpointError.
    """
    found = {re.sub(r"^module\.", "", name): tensor for name, tensor in read_tensors(path).items()}

    wanted = "  Wanted: unc-nlp/frcnn-vg-finetuned, pytorch_model.bin."

    def shape(name):
        if name not in found:
            have = f"{len(found):,} tensors, the first: {', '.join(list(found)[:2])}"
            raise CheckpointError(f"{path} is not of this detector: no {name} ({have})\n{wanted}")
        return found[name].shape

    def count_blocks(place):
        matches = (re.match(rf"{place}\.(\d+)\.conv1\.weight", name) for name in found)
        return len({match[1] for match in matches if match})

    stages = r"backbone\.res2", r"backbone\.res3", r"backbone\.res4", r"roi_heads\.res5"
    anchors = shape("proposal_generator.anchor_generator.cell_anchors.0")[0]
    head = "roi_heads.box_predictor"
    model = Detector(
        stem=shape("backbone.stem.conv1.weight")[0],
        res2=shape("backbone.res2.0.conv3.weight")[0],
        bottleneck=shape("backbone.res2.0.conv1.weight")[0],
        blocks=[count_blocks(place) for place in stages],
        hidden=shape("proposal_generator.rpn_head.conv.weight")[0],
        anchors=[1.0] * anchors,
        ratios=[1.0],
        classes=shape(f"{head}.cls_score.weight")[0] - 1,
        attributes=shape(f"{head}.attr_score.weight")[0] - 1,
        embedding=shape(f"{head}.cls_embedding.weight")[1],
        attr_hidden=shape(f"{head}.fc_attr.weight")[0],
    )
    report = load_pretrained(model, path)
    if lacks := [name for name in report.missing if not name.endswith("num_batches_tracked")]:
        first = f"  {', '.join(lacks[:4])}"
        found = f"{path} is not all of this detector: {len(lacks)} tensors are missing"
        raise CheckpointError(f"{found}\n{first}\n{wanted}")
    return model


def build(kind, size, **sizes):
    """A model by name (uniter, lxmert, albef) and size (a key of SIZES); sizes: what the data and
    the task ask of it.
    """
    if kind == "albef":
        names = ("vocab", "queue", "resolution", "patch", "dropout")
        return Albef(**ALBEF_SIZES[size] | {k: sizes[k] for k in names if k in sizes})
    sizes = {k: v for k, v in sizes.items() if k != "attributes" or kind == "lxmert"}
    shape = SIZES[size] | ({"layers": TWO_STREAM_LAYERS[size]} if kind == "lxmert" else {})
    return {"uniter": Uniter, "lxmert": Lxmert}[kind](**sizes, **shape)


# --------------------------------------------------------------------------- official checkpoints


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit; the message says what to do."""


# official name -> ours, tried in this order, each where it matches
RENAMES = [
    (r"^module\.", ""),  # saved from DataParallel
    (r"^(bert|uniter)\.", ""),
    (r"(^|\.)embeddings\.(word|position|token_type)_embeddings", r"\1text_embedding.\2"),
    (r"(^|\.)embeddings\.LayerNorm", r"\1text_embedding.norm"),
    (r"^img_embeddings\.img_linear", "region_embedding.feature"),
    (r"^img_embeddings\.img_layer_norm", "region_embedding.feature_norm"),
    (r"^img_embeddings\.pos_linear", "region_embedding.box"),
    (r"^img_embeddings\.pos_layer_norm", "region_embedding.box_norm"),
    (r"^img_embeddings\.mask_embedding\.weight", "region_embedding.mask"),
    (r"^img_embeddings\.LayerNorm", "region_embedding.norm"),
    (r"^encoder\.layer\.", "layers."),
    (r"attention\.self\.(q|k|v)(uery|ey|alue)", r"attention.to_\1"),
    (r"attention\.output\.dense", "attention.to_out"),
    (r"attention\.output\.LayerNorm", "attention_norm"),
    (r"intermediate\.dense", "fc1"),
    (r"(layers?\.\d+(\.text|\.region)?)\.output\.dense", r"\1.fc2"),
    (r"(layers?\.\d+(\.text|\.region)?)\.output\.LayerNorm", r"\1.mlp_norm"),
    (r"^pooler\.dense", "pooler"),
    (r"(^|\.)cls\.predictions\.transform\.dense", r"\1word_head.0"),
    (r"(^|\.)cls\.predictions\.transform\.LayerNorm", r"\1word_head.2"),
    (r"(^|\.)cls\.predictions\.bias", r"\1word_bias"),
    (r"^feat_regress\.net\.", "feature_head."),
    (r"^feat_regress\.bias", "feature_bias"),
    (r"^region_classifier\.net\.3", "classifier"),
    (r"^region_classifier\.net\.", "class_head."),
    (r"^itm_output", "match"),
    (r"^rank_output", "rank"),
    (r"^(vqa|vcr)_output\.", "task_head."),
    (r"^re_output\.(?=weight|bias)", "task_head.0."),
    (r"^re_output\.", "task_head."),
    (r"^nlvr2_output", "task_head.out"),
    (r"^fc\.0", "task_head.merge"),
    (r"^attn_pool\.fc\.0", "task_head.pool"),
    (r"^attn1\.", "task_head.left_asks."),
    (r"^attn2\.", "task_head.right_asks."),
    (r"^(task_head\..*)\.out_proj", r"\1.to_out"),
]
# tried first where the model has two streams; HuggingFace's files say lxmert. for bert.
LXMERT_RENAMES = [
    (r"^(module\.)?(lxrt_encoder\.model\.)?(bert|lxmert)\.", ""),
    (r"^(module\.)?(answer_head\.)?logit_fc\.", "task_head."),
    (r"^encoder\.visn_fc\.visn_fc", "region_embedding.feature"),
    (r"^encoder\.visn_fc\.visn_layer_norm", "region_embedding.feature_norm"),
    (r"^encoder\.visn_fc\.box_fc", "region_embedding.box"),
    (r"^encoder\.visn_fc\.box_layer_norm", "region_embedding.box_norm"),
    (r"^encoder\.layer\.", "text_layers."),
    (r"^encoder\.r_layers\.", "region_layers."),
    (r"^encoder\.x_layers\.", "cross_layers."),
    (r"visual_attention\.att\.(q|k|v)(uery|ey|alue)", r"cross.to_\1"),
    (r"visual_attention\.output\.LayerNorm", "cross_norm"),
    (r"visual_attention\.output\.dense", "cross.to_out"),
    (r"lang_self_att\.", "text.attention."),
    (r"visn_self_att\.", "region.attention."),
    (r"lang_inter\.dense", "text.fc1"),
    (r"visn_inter\.dense", "region.fc1"),
    (r"lang_output\.", "text.output."),
    (r"visn_output\.", "region.output."),
    (r"^(module\.)?cls\.seq_relationship", "match"),
    (r"^(module\.)?obj_predict_head\.transform\.dense", "object_head.0"),
    (r"^(module\.)?obj_predict_head\.transform\.LayerNorm", "object_head.2"),
    (r"^(module\.)?obj_predict_head\.decoder_dict\.obj", "classifier"),
    (r"^(module\.)?obj_predict_head\.decoder_dict\.attr", "attribute_classifier"),
    (r"^(module\.)?obj_predict_head\.decoder_dict\.feat", "feature_out"),
]
# also AMC's, DeiT's (into the ViT) and BERT's; *_m is the momentum copy
ALBEF_RENAMES = [
    (r"^(visual_encoder|text_encoder|vision_proj|text_proj)_m\.", r"teacher.\1."),
    (r"^(visual_encoder|text_encoder|vision_proj|text_proj)\.", r"student.\1."),
    (r"visual_encoder\.", "vision."),
    (r"text_encoder\.(bert\.)?", ""),
    (r"^itm_head", "match"),
    (r"^temp$", "temperature"),
    (r"^queue_ptr_(img|txt)$", "queue_ptr"),
    (r"^(?=cls_token|pos_embed|patch_embed|blocks|norm\.)", "student.vision."),
    (r"^bert\.", "student."),
    (r"^(?=embeddings\.|encoder\.|cls\.)", "student."),
    (r"vision\.cls_token", "vision.cls"),
    (r"vision\.pos_embed", "vision.position"),
    (r"vision\.patch_embed\.proj", "vision.patch"),
    (r"vision\.blocks\.", "vision.layers."),
    (r"(vision\.layers\.\d+)\.norm1", r"\1.attention_norm"),
    (r"(vision\.layers\.\d+)\.norm2", r"\1.mlp_norm"),
    (r"(vision\.layers\.\d+)\.attn\.proj", r"\1.attention.to_out"),
    (r"(vision\.layers\.\d+)\.attn\.", r"\1.attention."),
    (r"(vision\.layers\.\d+)\.mlp\.", r"\1."),
    (r"crossattention\.self\.(q|k|v)(uery|ey|alue)", r"cross.to_\1"),
    (r"crossattention\.output\.dense", "cross.to_out"),
    (r"crossattention\.output\.LayerNorm", "cross_norm"),
]
MAF_RENAMES = [
    (r"^wv\.", "word."),
    (r"^linear_p\.", "phrase."),
    (r"^linear_mini\.", "mini."),
    (r"^linear_a\.", "attribute."),
    (r"^linear_f\.", "feature."),
]
# of a detector's features; a model of patches has its own
ABOUT_FEATURES = "region_embedding.mask", "feature_bias", "feature_out.", "classifier."
TIED = {
    "cls.predictions.decoder.weight": "text_embedding.word",
    "cls.predictions.decoder.bias": "word_bias",
    # second names of a tensor that we hold once
    "feat_regress.weight": "region_embedding.feature",
}


class LoadReport(NamedTuple):
    """What load_pretrained did: names of our parameters loaded or missing, names in the file
    renamed, tied or unused.
    """

    loaded: list
    renamed: list
    tied: list
    missing: list
    unused: list

    def __str__(self):
        def some(names):
            more = f" and {len(names) - 6} more" if len(names) > 6 else ""
            return ", ".join(names[:6]) + more or "none"

        how = f"{len(self.renamed)} renamed, {len(self.tied)} tied copies"
        missing = f"  missing, left at their start: {some(self.missing)}"
        unused = f"  in the file but unused: {some(self.unused)}"
        return f"loaded {len(self.loaded)} tensors ({how})\n{missing}\n{unused}"


def translate_name(name, model=None):
    """What we call an official parameter; model: which has it, as different models' files use
    some names for different things.
    """
    # BERT's first files
    name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
    # a model's own names first, then what all of them share with BERT
    own = {Lxmert: LXMERT_RENAMES, Maf: MAF_RENAMES, Albef: ALBEF_RENAMES}.get(type(model), [])
    for pattern, new in own + RENAMES:
        name = re.sub(pattern, new, name)
    # one numbering there, two stacks here
    if isinstance(model, Albef) and (found := re.search(r"encoder\.layer\.(\d+)\.", name)):
        i, text = int(found[1]), len(model.student.text_layers)
        ours = f"text_layers.{i}." if i < text else f"fusion_layers.{i - text}."
        name = name.replace(found[0], ours)
    return name


def read_checkpoint_file(path):
    """What a .safetensors, .pt, .pth or .bin file holds. Code in a pickle is never run."""
    path = Path(path)
    if not path.exists():
        wanted = "  Wanted: a checkpoint (BERT, UNITER, LXMERT or one of ours). Check the path."
        raise CheckpointError(f"{path} is not there\n{wanted}")
    if path.is_dir():
        wanted = f"  Wanted: the checkpoint file inside it, e.g. {path}/last.pt"
        raise CheckpointError(f"{path} is a folder\n{wanted}")
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and is refused: loading it could run code in it\n"
            f"  {first_error_line(error)}\n"
            "  Fetch it from its official address, or save its state_dict() alone with torch.save."
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({path.stat().st_size:,} bytes): {first_error_line(error)}\n"
            "  Most often a download or a copy that stopped half way: fetch it again."
        ) from None


def read_tensors(path):
    """{name: tensor} of a checkpoint; of a training file, its "model"."""
    found = read_checkpoint_file(path)
    if isinstance(found, dict) and isinstance(found.get("model"), dict):
        found = found["model"]
    joined = re.compile(r"\.in_proj_|\.attn\.qkv\.")
    for name in list(filter(joined.search, found)) if isinstance(found, dict) else ():
        # torch's own attention and ViTs keep the three matrices as one
        for part, piece in zip("qkv", found.pop(name).chunk(3)):
            found[re.sub(r"in_proj_|(?<=attn\.)qkv\.", f"to_{part}.", name)] = piece
    if not isinstance(found, dict) or not all(isinstance(v, torch.Tensor) for v in found.values()):
        raise CheckpointError(
            f"{path} holds {type(found).__name__} and not a table of named tensors\n"
            '  Wanted: a state_dict, or a training file with one under "model".'
        )
    return found


class Checkpoint(NamedTuple):
    """A training file of ours: train.py writes it, everything in it is plain."""

    model: dict
    optimizer: dict
    step: int
    config: dict  # the run's settings
    # vocab, features, classes, types, head, answers; size: a key of SIZES
    sizes: dict


def read_checkpoint(path):
    """One of our own training files; anything else is a CheckpointError."""
    found = read_checkpoint_file(path)
    have = found if isinstance(found, dict) else ()
    lacks = [name for name in Checkpoint._fields if name not in have]
    if lacks:
        raise CheckpointError(
            f"{path} is not a training file of ours: it lacks {', '.join(lacks)}\n"
            "  Wanted: a last.pt that train.py wrote. Official checkpoints: --init to train from "
            "one, --size to evaluate one."
        )
    return Checkpoint(*(found[name] for name in Checkpoint._fields))


def first_error_line(error):
    """The first line of an error's text, or its type"""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def read_safetensors(path):
    """The format in four lines: 8 bytes header length, JSON header, then raw little-endian
    numbers at the header's offsets.
    """
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16}
    dtypes |= {"BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32}
    dtypes |= {"U8": torch.uint8, "BOOL": torch.bool}
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    # checked before use: a cut file would otherwise end deep inside numpy
    start = 8 + int(raw[:8].view("<u8")[0])
    if start > len(raw):
        raise ValueError(f"the header should end at byte {start:,}")
    tensors = {}
    for name, entry in json.loads(raw[8:start].tobytes()).items():
        if name == "__metadata__":
            continue
        a, b = entry["data_offsets"]
        if start + b > len(raw):
            raise ValueError(f"{name} should end at byte {start + b:,}")
        numbers = torch.from_numpy(np.array(raw[start + a : start + b]))
        tensors[name] = numbers.view(dtypes[entry["dtype"]]).view(entry["shape"])
    return tensors


@torch.no_grad()
def load_pretrained(model, path, new_words=0):
    """Fill a model from a BERT, UNITER, LXMERT, MAF or own checkpoint; returns a LoadReport
    (print it: it says what was left out).

    Names are translated (RENAMES), numbers cast to the model's type, and the ranking head started
    from the matching head where the file has none. A tensor of another shape is an error, and so is
    a file of another kind of model, most of it unknown here; but the type table and, by `new_words`
    rows, the word table may grow, and a downstream head of another task stays at its start. So does
    what a model of patches sees by, if the file is of regions.
    """
    # state_dict() shares memory with the parameters: copying into it fills the model
    own, report, wrong = model.state_dict(), LoadReport([], [], [], [], []), []
    for name, tensor in read_tensors(path).items():
        if re.sub(r"^(module|text_encoder(_m)?)\.", "", name) in TIED:
            report.tied.append(name)
            continue
        ours = translate_name(name, model)
        tensor = fit_tensor(ours, tensor, own, new_words) if ours in own else None
        if tensor is None:
            report.unused.append(name)
        elif tensor.shape != own[ours].shape:
            shapes = tuple(tensor.shape), tuple(own[ours].shape)
            wrong.append(f"{name}: {shapes[0]} in the file, {shapes[1]} in the model")
        else:
            own[ours].copy_(tensor)
            report.loaded.append(ours)
            report.renamed.extend([name] if ours != name else [])
    report.missing.extend(sorted(set(own) - set(report.loaded)))
    # BERT's words alone fit any kind of model
    if wrong or len(report.loaded) <= len(report.unused):
        raise CheckpointError(
            f"{path} does not fit this model: {len(wrong)} tensors of another size, "
            f"{len(report.unused)} unknown, {len(report.loaded)} that fit\n  "
            + "\n  ".join(wrong[:4] or report.unused[:4])
            + "\n  Another --model, --size, vocabulary or width of region features: compare with "
            "the file's own recipe."
        )
    if isinstance(model, Albef):
        report.tied.extend(n for n in report.unused if n.endswith("embeddings.position_ids"))
        report.unused[:] = [n for n in report.unused if not n.endswith("embeddings.position_ids")]
        # BERT, DeiT: the momentum copy starts from them too
        if not any(n.startswith("teacher.") for n in report.loaded):
            model.teacher.load_state_dict(model.student.state_dict())
    # a pre-trained model ranks by how well it matches
    if "rank.weight" in report.missing and "match.weight" in report.loaded:
        init_rank_from_match(model)
    return report


def fit_tensor(name, tensor, own, new_words):
    """A file's tensor as the model's parameter of this name wants it; None for a head of another
    task, queues of another length or, in a model of patches, what is about a detector's features.
    """
    may_stay = "task_head.", "image_queue", "text_queue"
    if "region_embedding.feature.weight" not in own:
        may_stay += ABOUT_FEATURES
    own = own[name]
    if tensor.shape != own.shape and name.startswith(may_stay):
        return None
    if name == "region_embedding.mask" and tensor.dim() == 2:
        return tensor[1]  # row 0 stands for "not masked" and is always zero
    if tensor.numel() == own.numel() == 1:
        return tensor.view(own.shape)  # counters come as [] and as [1]
    more = len(own) - len(tensor) if tensor.dim() else 0
    if name == "text_embedding.token_type.weight" and more > 0:
        # VCR's answer and rationale start as text, NLVR2's right image as an image [authors' code]
        start = tensor[1 if len(own) == 3 else 0]
        return torch.cat([tensor, start.expand(more, -1)])
    if name in ("text_embedding.word.weight", "word_bias") and more == new_words > 0:
        # the new words' rows stay as they were drawn
        return torch.cat([tensor, own[-more:].to(tensor.dtype)])
    if name.endswith("vision.position"):
        return resize_position(tensor.float(), own.shape[1] - 1)
    return tensor
