"""Benchmarks and figures. Every benchmark is one function that returns a flat dict of numbers in the papers' units.

    score_pairs        a checkpoint's score for any list of (caption, image) pairs
    winoground         text, image, group score                              Thrush et al. 2022; CACR table 2, 3
    retrieval          R@1, 5, 10 in both directions                         UNITER table 3; CACR table 4
    nlvr               accuracy on NLVR v1                                   Suhr et al. 2017
    attention_figure   a word's attention drawn on the boxes                 CACR fig. 4, 5
    training_curve     the losses of a run

python evaluate.py --task winoground --ckpt out/toy-cacr-seed0/last.pt
"""
import contextlib
import json

import numpy as np
import torch
from tqdm import tqdm

from data import Caption, Pairs, RegionStore, flickr30k, nlvr_pairs, winoground as read_winoground


def to(batch, device):
    """Move every tensor of a nested batch."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {k: to(v, device) for k, v in batch.items()}
    return [to(v, device) for v in batch] if isinstance(batch, list) else batch


@torch.inference_mode()
def score_pairs(model, pairs, captions, images, head="rank", units=8192, autocast=contextlib.nullcontext, progress=None):
    """How well caption captions[k] fits image images[k]: (K,) float32 numpy; higher is better.

    head  "rank": the ranking score; "match": the log-odds of matching (for models that were not fine-tuned by ranking)
    """
    was, device = model.training, next(model.parameters()).device
    model.eval()
    scores = np.empty(len(captions), np.float32)
    bar = tqdm(total=len(captions), desc=progress, unit=" pairs", disable=None if progress else True, leave=False)
    for places, batch in pairs.in_chunks(np.asarray(captions), np.asarray(images), units):
        with autocast():
            out = model(**to(batch, device), heads=(head,))
        s = out.rank.float() if head == "rank" else (out.match[:, 1] - out.match[:, 0]).float()
        scores[places] = s.cpu().numpy()
        bar.update(len(places))
    bar.close()
    model.train(was)
    return scores


def winoground_scores(s):
    """s (E, 2, 2): score of caption c with image i; returns text, image, group in percent and each example's group hit.

    text: each image prefers its caption; image: each caption prefers its image; group: both. A tie is wrong.
    Chance 25, 25, 16.67.   Thrush et al. 2022
    """
    text = (s[:, 0, 0] > s[:, 1, 0]) & (s[:, 1, 1] > s[:, 0, 1])
    image = (s[:, 0, 0] > s[:, 0, 1]) & (s[:, 1, 1] > s[:, 1, 0])
    return {"text": 100 * text.mean(), "image": 100 * image.mean(), "group": 100 * (text & image).mean()}, text & image


def winoground(model, data, tokenizer, regions, **scoring):
    """{"winoground/text": percent, ".../image", ".../group", "winoground/group/<tag>"} over all examples."""
    examples = read_winoground(data)
    pairs = Pairs([Caption(e.images[i], e.captions[i], f"{e.id}/{i}") for e in examples for i in (0, 1)],
                  RegionStore(regions / "winoground"), tokenizer, name="Winoground")
    c = 2 * np.arange(len(examples))[:, None, None] + np.array([[0, 0], [1, 1]])
    i = pairs.image[2 * np.arange(len(examples))[:, None, None] + np.array([[0, 1], [0, 1]])]
    score, hits = winoground_scores(score_pairs(model, pairs, c.ravel(), i.ravel(), **scoring).reshape(-1, 2, 2))
    tags = np.array([e.tag for e in examples])
    by_tag = {f"winoground/group/{t}": 100 * hits[tags == t].mean() for t in np.unique(tags) if t}
    return {f"winoground/{k}": float(v) for k, v in (score | by_tag).items()}
