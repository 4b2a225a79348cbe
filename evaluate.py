"""Benchmarks and figures. Every benchmark is one function that returns a flat dict of numbers in the papers' units.

    score_pairs        a checkpoint's score for any list of (caption, image) pairs
    winoground         text, image, group score                              Thrush et al. 2022; CACR table 2, 3
    retrieval          R@1, 5, 10 in both directions                         UNITER table 3; CACR table 4
    vqa, vcr, nlvr2, ve, re      the other tasks of UNITER's table 3, each with the best guess that sees nothing, and submission files
    gqa                accuracy and GQA's seven other scores                 Kervadec table 1, 2; Hudson and Manning 2019
    pointing           does a word's strongest region lie where it points    Kervadec sec. 7
    pointing_games     does a text's heat map peak inside its box            AMC table 1-5
    grounding          phrases to boxes at IoU 0.5, and all that guess       MAF table 1, 2, 5
    nlvr               accuracy on NLVR v1                                   Suhr et al. 2017
    attention_figure   a word's attention drawn on the boxes                 CACR fig. 4, 5
    heat_figures       phrases' heat maps over the picture                   AMC fig. 2-5
    map_figure         a cross layer's map, words by regions                 Kervadec fig. 4
    grounding_figure   truth, trained and untrained guess of each phrase     MAF fig. 4, 5
    training_curve     the losses of a run

python evaluate.py --task winoground --ckpt out/toy-cacr-seed0/last.pt
python evaluate.py --image photo.jpg --text "a dog left of a person" --ckpt out/.../last.pt --detector pytorch_model.bin
"""
import argparse
import contextlib
import csv
import hashlib
import io
import json
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import losses
from data import (ENTAILMENT, VCR_WORDS, DataError, Pairs, PatchStore, Phrases, RegionStore, Text, WordPiece, Words, answer_list, bare, blind, clean_caption, coco_karpathy, entities,
                  extract, flickr30k, gqa as read_gqa, gqa_answers, gqa_records, gqa_task, iou, names_of, nlvr2_task, nlvr_pairs, normalise_answer, normalised, open_store, re_task,
                  read_json, read_picture, referit, referring as read_referring, regions_of, unit_batches, vcr_store, vcr_task, ve_task, vg_images, vqa_task,
                  winoground as read_winoground, write_atomic)
from model import SIZES, Albef, CheckpointError, Lxmert, Maf, build, load_pretrained, read_checkpoint


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


def winoground_pairs(data, tokenizer, regions):
    """The examples, and their captions and images as Pairs: caption 2e + c belongs to image c of example e."""
    examples = read_winoground(data)
    captions = [Text(e.images[i], e.captions[i], f"{e.id}/{i}") for e in examples for i in (0, 1)]
    return examples, Pairs(captions, open_store(regions, "winoground"), tokenizer, name="Winoground")


def winoground(model, data, tokenizer, regions, **scoring):
    """{"winoground/text": percent, ".../image", ".../group", "winoground/group/<tag>"} over all examples."""
    examples, pairs = winoground_pairs(data, tokenizer, regions)
    c = 2 * np.arange(len(examples))[:, None, None] + np.array([[0, 0], [1, 1]])
    i = pairs.image[2 * np.arange(len(examples))[:, None, None] + np.array([[0, 1], [0, 1]])]
    score, hits = winoground_scores(score_pairs(model, pairs, c.ravel(), i.ravel(), **scoring).reshape(-1, 2, 2))
    tags = np.array([e.tag for e in examples])
    by_tag = {f"group/{t}": 100 * hits[tags == t].mean() for t in np.unique(tags) if t}
    return {f"winoground/{k}": float(v) for k, v in (score | by_tag).items()}


# ------------------------------------------------------------------------------------------------------- retrieval

def recall(scores, image_of_text):
    """R@1, 5, 10 in percent.   scores (T, I): caption t with image i; image_of_text (T,): the column that is right

    text:   an image hits if any of its own captions is among its k best;   image: a caption hits if its image is among its k best
    Ties go to the wrong one, so a constant score gets 0 and only a perfect ranker 100. (UNITER's and IAIS's code also counts row
    numbers as ranks in image retrieval and can pass 100.)
    """
    T, I = scores.shape
    own = scores[np.arange(T), image_of_text]                                                       # (T,)
    rank_image = (scores >= own[:, None]).sum(axis=1) - 1                                           # (T,) wrong images before it
    best = np.full(I, -np.inf)
    np.maximum.at(best, image_of_text, own)                                                         # (I,) an image's best own caption
    wrong = np.where(np.arange(I)[None] == image_of_text[:, None], -np.inf, scores)                 # (T, I) without own captions
    rank_text = (wrong >= best).sum(axis=0)
    return ({f"image/r{k}": float(100 * (rank_image < k).mean()) for k in (1, 5, 10)}
            | {f"text/r{k}": float(100 * (rank_text < k).mean()) for k in (1, 5, 10)})


@torch.inference_mode()
def score_all(model, pairs, head="rank", units=8192, autocast=contextlib.nullcontext, keep=None, progress="all pairs"):
    """Every caption with every image: (T, I) float32, images in the order of pairs.images. Higher is better.

    Memory for this one matrix and one batch: an image's features are read once, and go to the device once for all captions.
    keep   a file for the matrix: columns that a killed run had finished are not made again; it is left there, whole, at the end
    """
    was, device, T, I = model.training, next(model.parameters()).device, len(pairs.texts), len(pairs.images)
    model.eval()
    if keep is None:
        scores = np.full((T, I), np.nan, np.float32)
    else:
        Path(keep).parent.mkdir(parents=True, exist_ok=True)
        if not Path(keep).exists():                 # a whole header before the first column
            fresh = np.lib.format.open_memmap(f"{keep}.tmp", "w+", np.float32, (T, I))
            fresh[:] = np.nan
            fresh.flush()
            Path(f"{keep}.tmp").replace(keep)
        scores = np.load(keep, mmap_mode="r+")
        if scores.shape != (T, I):
            raise DataError(f"{keep} holds scores of {scores.shape[0]:,} x {scores.shape[1]:,}, this is {T:,} x {I:,}\n  Another split's. Delete it, or choose another file.")
    order = np.argsort(pairs.n_words, kind="stable")
    text, text_mask = (torch.from_numpy(x[order]).to(device) for x in pairs.text(np.arange(T)))
    n_words = pairs.n_words[order]
    todo = [i for i in range(I) if np.isnan(scores[:, i]).any()]
    for i in tqdm(todo, initial=I - len(todo), total=I, desc=f"{progress}: {T:,} captions x {I:,} images", unit=" images", disable=None, leave=False):
        one = to({k: v for k, v in pairs.batch(np.array([0]), pairs.images[i:i + 1]).items() if k in ("regions", "boxes", "region_mask")}, device)
        n, column = int(pairs.store.n_regions[pairs.images[i]]), []
        for rows in unit_batches(n_words + n, units):
            longest = int(n_words[rows[-1]])
            part = slice(rows[0], rows[-1] + 1)
            with autocast():
                out = model(text[part, :longest], text_mask[part, :longest], **{k: v.expand(len(rows), *v.shape[1:]) for k, v in one.items()},
                            heads=(head,), length=longest + n)
            column.append(out.rank.float() if head == "rank" else (out.match[:, 1] - out.match[:, 0]).float())
        scores[order, i] = torch.cat(column).cpu().numpy()
    model.train(was)
    if keep is not None:
        scores.flush()
    return scores


def retrieval(model, data, tokenizer, regions, dataset="flickr30k", split="test", **scoring):
    """{"retrieval/image/r1": percent, ...} over all images and captions of Karpathy's split; scoring: see score_all.

    Flickr30k: the 1K protocol. COCO: 5K, and "retrieval/1k/...": the mean over five consecutive folds of 1,000 images.
    """
    captions = {"flickr30k": flickr30k, "coco": coco_karpathy}[dataset](data, split)
    pairs = Pairs(captions, open_store(regions, dataset), tokenizer, name=f"{dataset} {split}")
    I, column = len(pairs.images), np.searchsorted(pairs.images, pairs.image)
    scores = score_all(model, pairs, progress=f"retrieval {dataset} {split}", **scoring)
    found = {f"retrieval/{k}": v for k, v in recall(scores, column).items()} | {"retrieval/images": I, "retrieval/captions": len(captions)}
    if dataset == "coco" and I >= 5000:
        folds = [recall(scores[rows][:, i:i + 1000], column[rows] - i) for i in range(0, 5000, 1000) if (rows := (column >= i) & (column < i + 1000)).any()]
        found |= {f"retrieval/1k/{k}": float(np.mean([f[k] for f in folds])) for k in folds[0]}
    return found


def nlvr(model, data, tokenizer, split="dev", regions=None, **scoring):
    """Accuracy on NLVR v1 in percent: over all six orders, over presentations as given, and of always answering the majority."""
    pairs, labels = nlvr_pairs(data, split, tokenizer, regions=regions)
    right = (score_pairs(model, pairs, np.arange(len(labels)), pairs.image, head="match", **scoring) > 0) == labels
    return {"nlvr/accuracy": float(100 * right.mean()), "nlvr/accuracy/as_given": float(100 * right[::6].mean()),
            "nlvr/majority": float(100 * max(labels.mean(), 1 - labels.mean()))}


# ------------------------------------------------------------------------------------------------ downstream tasks

@torch.inference_mode()
def predict(model, task, units=8192, autocast=contextlib.nullcontext, hide=""):
    """What the task head says of each example: (E, answers), (E, choices), (E, 2) or (E, most regions), -inf where there is no region.

    hide   "text" or "regions": a control that may not see them
    """
    was, device, found = model.training, next(model.parameters()).device, {}
    model.eval()
    bar = tqdm(total=len(task.target), desc=task.pairs.name, unit=" examples", disable=None, leave=False)
    for examples, batch in task.in_chunks(units):
        batch = to(blind(batch, hide) if hide else batch, device)
        with autocast():
            scores = model(**batch["input"], heads=("task",)).scores.float()
        if task.name == "re":
            scores = scores.masked_fill(~batch["input"]["region_mask"], float("-inf"))
        elif task.name == "vcr":
            scores = scores[:, 1].view(-1, task.group)
        found.update(zip(examples.tolist(), scores.cpu().numpy()))
        bar.update(len(examples))
    bar.close()
    model.train(was)
    out = np.full((len(found), max(map(len, found.values()))), -np.inf, np.float32)
    for e, row in found.items():
        out[e, :len(row)] = row
    return out


def right(scores, target):
    """Which examples are answered right: (E,) bool. An example without an answer is wrong, whatever is said."""
    return scores.argmax(axis=1) == np.array([-1 if t is None else t for t in target])


def vqa_accuracy(answer, said):
    """0 ... 1: over the ten leave-one-out sets of nine people, the mean of min(1, people who said so / 3); official clean-up.

    The clean-up is left out where all ten said the same string, as the official evaluation does.
    """
    said, answer = [x.replace("\n", " ").replace("\t", " ").strip() for x in (*said,)], answer.replace("\n", " ").replace("\t", " ").strip()
    if len(set(said)) > 1:
        said, answer = [normalise_answer(x) for x in said], normalise_answer(answer)
    same = [x == answer for x in said]
    return float(np.mean([min(1.0, (sum(same) - own) / 3) for own in same]))


def vqa_scores(answers, facts):
    """{"vqa/accuracy", "vqa/<answer type>", "vqa/<question type>"} in percent of strings against data.Answers."""
    each = np.array([vqa_accuracy(a, f.said) for a, f in zip(answers, facts)])
    found = {"accuracy": each.mean()}
    for kind in ("answer_type", "question_type"):
        names = np.array([getattr(f, kind) for f in facts])
        found |= {name: each[names == name].mean() for name in np.unique(names) if name}
    return {f"vqa/{k}": float(100 * v) for k, v in found.items()}


def vqa(model, task, names, **scoring):
    """Accuracy of the best answer, and "vqa/majority": of the answer that suits each type of question best. Also returns the answers."""
    answers = [names[i] for i in predict(model, task, **scoring).argmax(axis=1)]
    known = [e for e, f in enumerate(task.facts) if f is not None]
    found = {"vqa/unanswerable": float(len(task.facts) - len(known))}
    if known:
        facts, best = [task.facts[e] for e in known], {}
        for kind in {f.question_type for f in facts}:
            best[kind] = Counter(normalise_answer(a) for f in facts if f.question_type == kind for a in f.said).most_common(1)[0][0]
        found = vqa_scores([answers[e] for e in known], facts) | found
        found["vqa/majority"] = vqa_scores([best[f.question_type] for f in facts], facts)["vqa/accuracy"]
    return found, [{"question_id": int(q), "answer": a} for q, a in zip(task.ids, answers)]


def vcr(model, tasks, **scoring):
    """Q->A, QA->R (given the right answer), Q->AR (both right); tasks: the two of data.vcr_task. Chance 25, 25, 6.25."""
    answer, reason = (right(predict(model, tasks[part], **scoring), tasks[part].target) for part in ("qa", "qar"))
    return {"vcr/q_a": 100 * answer.mean(), "vcr/qa_r": 100 * reason.mean(), "vcr/q_ar": 100 * (answer & reason).mean(), "vcr/chance": 25.0}


def vcr_rows(model, tasks, **scoring):
    """The leaderboard's file: annot_id, four answers, and four reasons given each answer, as probabilities."""
    softmax = lambda x: torch.from_numpy(x).softmax(-1).numpy()
    answers, reasons = softmax(predict(model, tasks["qa"], **scoring)), softmax(predict(model, tasks["all"], **scoring).reshape(-1, 4, 4))
    head = ["annot_id", *(f"answer_{i}" for i in range(4)), *(f"rationale_conditioned_on_a{i}_{j}" for i in range(4) for j in range(4))]
    return [head] + [[name.split("/")[0], *map(float, a), *map(float, r.ravel())] for name, a, r in zip(tasks["qa"].ids, answers, reasons)]


def nlvr2_scores(answers, ids, labels):
    """Accuracy, and consistency: the share of sentences (set, sentence of the identifier) whose pairs are all right; in percent."""
    hit, groups = np.array([a == b for a, b in zip(answers, labels)]), {}
    for name, ok in zip(ids, hit):
        _, number, _, sentence = name.split("-")
        groups.setdefault((number, sentence), []).append(ok)
    return {"nlvr2/accuracy": float(100 * hit.mean()), "nlvr2/consistency": float(100 * np.mean([all(g) for g in groups.values()]))}


def nlvr2(model, task, **scoring):
    """Accuracy, consistency, majority; examples without features count as wrong. Also the rows of the submission file."""
    answers = predict(model, task, **scoring).argmax(axis=1).astype(bool).tolist()
    found = {}
    if None not in task.target:
        found = nlvr2_scores(answers, task.ids, task.target)
        found["nlvr2/accuracy"] *= len(answers) / (len(answers) + task.told["examples left out: an image has no features"])
        found["nlvr2/majority"] = 100 * max(np.mean(task.target), 1 - np.mean(task.target))
    return found, [[name, str(a)] for name, a in zip(task.ids, answers)]


def ve(model, task, **scoring):
    """Accuracy over contradiction, entailment, neutral; the majority's; each label's."""
    scores, target = predict(model, task, **scoring), np.array(task.target)
    hit = right(scores, target)
    return ({"ve/accuracy": 100 * hit.mean(), "ve/majority": 100 * np.bincount(target).max() / len(target)}
            | {f"ve/{name}": 100 * hit[target == i].mean() for i, name in enumerate(ENTAILMENT) if (target == i).any()})


def referring(model, task, **scoring):
    """Accuracy over sentences: the chosen region's box overlaps the truth by more than half; "re/chance": of any region at all."""
    best, store = predict(model, task, **scoring).argmax(axis=1), task.pairs.store
    boxes, n = store.read(task.pairs.image, "boxes"), store.n_regions[task.pairs.image]
    boxes[..., 2:] -= boxes[..., :2]
    overlap = iou(boxes, np.array(task.facts)[:, None]) > 0.5                                       # (E, most regions)
    overlap &= np.arange(boxes.shape[1])[None] < n[:, None]
    return {"re/accuracy": 100 * overlap[np.arange(len(best)), best].mean(), "re/chance": float(100 * (overlap.sum(1) / n).mean())}


def gqa_scores(questions, predictions, choices=None, scenes=None, attentions=None):
    """GQA's official scores in percent, over balanced questions; questions: {id: published record}, predictions: {id: answer}.

        accuracy; open (structural type query), binary (all others)                         exact strings
        validity, plausibility    the answer is among choices[id]                           if choices are given
        consistency               of each right question: which of what it entails is right too; the mean of these
        distribution              chi-square of the answers said against the true ones, by global group; less is better
        grounding                 attention on the boxes of the objects that question and answer mention     if attentions are given
        structural, semantic, length, steps   accuracy of each kind, and its count

    attentions  {id: m x m map}, first index along x; it is summed over the boxes, so it can pass 100 [official]
    Entailed questions need predictions too, balanced or not.
    """
    asked = {k: q for k, q in questions.items() if q["isBalanced"]}
    lacking = next((k for q in asked.values() for k in (*q["entailed"],) if k in questions and k not in predictions), next((k for k in asked if k not in predictions), None))
    if lacking:
        raise DataError(f"GQA: question {lacking} has no prediction\n  Wanted: all of the split's questions, those that others entail included")
    hit = {k: predictions[k] == questions[k]["answer"] for k in predictions if k in questions}
    percent = lambda values: 100 * sum(values) / len(values) if len(values) else 0.0
    found = {"accuracy": percent([hit[k] for k in asked])}
    for name, query in (("binary", False), ("open", True)):
        found[name] = percent([hit[k] for k, q in asked.items() if (q["types"]["structural"] == "query") == query])
    if choices is not None:
        for name, key in (("validity", "valid"), ("plausibility", "plausible")):
            found[name] = percent([predictions[k] in (("color", "material", "shape") if "Common" in (q["types"]["detailed"] or "") else choices[k][key])
                                   for k, q in asked.items()])
    entailed = {k: [e for e in q["entailed"] if e != k and e in hit] for k, q in asked.items() if hit[k]}
    found["consistency"] = percent([sum(hit[e] for e in some) / len(some) for some in entailed.values() if some])
    groups = {}
    for k, q in asked.items():
        if group := q["groups"]["global"]:
            gold, said = groups.setdefault(group, (Counter(), Counter()))
            gold[q["answer"]] += 1
            said[predictions[k]] += 1
    weights = [sum(gold.values()) for gold, _ in groups.values()]
    chi = [sum((said[a] - n) ** 2 / n for a, n in gold.items()) for gold, said in groups.values()]
    found["distribution"] = sum(w * c for w, c in zip(weights, chi)) / max(sum(weights), 1) / 100
    if attentions is not None and scenes is not None:
        found["grounding"] = percent([grounded(q, attentions[k], scenes.get(q["imageId"])) for k, q in asked.items() if k in attentions])
    steps = lambda q: sum(not any(x in f"{o['operation']}: {o['argument']}" for x in ("exist", "query: name", "choose name")) for o in q["semantic"])
    for part, of in (("structural", lambda q: q["types"]["structural"]), ("semantic", lambda q: q["types"]["semantic"]), ("length", lambda q: len(q["question"].split())),
                     ("steps", steps)):
        for kind in sorted({of(q) for q in asked.values()}, key=str):
            some = [hit[k] for k, q in asked.items() if of(q) == kind]
            found |= {f"{part}/{kind}": percent(some), f"{part}/{kind}/count": len(some)}
    return {f"gqa/{k}": v for k, v in found.items()}


def grounded(question, attention, scene):
    """Attention (m, m), first index along x, on the boxes of the objects in question and full answer, summed over the boxes."""
    things = [*question["annotations"].get("question", {}).values(), *question["annotations"].get("fullAnswer", {}).values()]
    total, m = 0.0, len(attention)
    for o in things:                                # one that both mention counts twice [official]
        if scene and (b := scene["objects"].get(o)):
            x, y = ((b[a] / scene[side], (b[a] + b[length]) / scene[side]) for a, length, side in (("x", "w", "width"), ("y", "h", "height")))
            share = [np.clip(np.minimum(end, np.arange(1, m + 1) / m) - np.maximum(start, np.arange(m) / m), 0, None) * m for start, end in (x, y)]
            total += float((np.asarray(attention) * np.outer(*share)).sum())
    return total


def gqa(model, task, names, data, split, autocast=contextlib.nullcontext, **scoring):
    """gqa_scores of a model over all questions of a split, and the rows of the submission file. grounding: where the split has scene graphs,
    of the [CLS] token's attention to the regions, shared out among the cells that each box covers."""
    answers = [names[i] for i in predict(model, task, autocast=autocast, **scoring).argmax(axis=1)]
    predictions = dict(zip(task.facts, answers))
    rows = [{"questionId": k, "prediction": a} for k, a in predictions.items()]
    if None in task.target:
        return {"gqa/unanswerable": float(task.target.count(None))}, rows
    folder, tier = Path(data) / "gqa", split.split("_")[0]
    questions = {k: q for part in split.split("+") for k, q in gqa_records(data, part).items() if k in predictions}
    choices, scenes = (read_json(path, "GQA") if path.exists() else None for path in (folder / f"eval/{tier}_choices.json", folder / f"{tier}_sceneGraphs.json"))
    attentions = None
    if scenes is not None:
        attentions = {}
        for examples, batch, P in word_to_region(model, task.pairs, [e for e, k in enumerate(task.facts) if questions[k]["isBalanced"]], autocast):
            for e, row, boxes in zip(examples, P[:, 0], batch["boxes"]):
                attentions[task.facts[e]] = cell_map(row, boxes)
    found = gqa_scores(questions, predictions, choices, scenes, attentions)
    return {k: v for k, v in found.items() if k.count("/") == 1 or k.startswith("gqa/structural") and not k.endswith("/count")}, rows


def cell_map(weights, boxes, m=7):
    """(m, m), first index along x: each region's weight spread evenly over its box, x1 y1 x2 y2 in [0, 1]."""
    edges = np.arange(m + 1) / m
    along = lambda a, b: np.clip(np.minimum(b[:, None], edges[1:]) - np.maximum(a[:, None], edges[:-1]), 0, None)      # (N_V, m)
    x, y = along(boxes[:, 0], boxes[:, 2]), along(boxes[:, 1], boxes[:, 3])
    area = np.maximum(x.sum(1) * y.sum(1), 1e-9)
    return np.einsum("n, nx, ny -> xy", weights / area, x, y)


@torch.inference_mode()
def word_to_region(model, pairs, captions, autocast=contextlib.nullcontext, units=8192):
    """What each word looks at among the regions, of many captions with their own images: yields (captions, batch as numpy, P).

    P (B, N_L, N_V): the softmax over regions summed over heads; two streams: of the last cross layer but one, the fourth of five
    (Kervadec sec. 7); single stream: of the last layer
    """
    was, device, layer = model.training, next(model.parameters()).device, -2 if isinstance(model, Lxmert) and len(model.cross_layers) > 1 else -1
    model.eval()
    captions = np.asarray(captions)
    for places, batch in pairs.in_chunks(captions, pairs.image[captions], units):
        with autocast():
            maps = model(**to(batch, device), maps=(layer,)).maps[0]
        P = losses.masked_softmax(maps.S_LV, batch["region_mask"].to(device)).sum(dim=1)
        yield captions[places], {k: v.numpy() for k, v in batch.items() if isinstance(v, torch.Tensor)}, P.cpu().numpy()
    model.train(was)


def pointing(model, pairs, autocast=contextlib.nullcontext):
    """Does the region that a pointed word looks at most lie where the word points (IoU 0.5; a patch: its middle inside the box)? In percent of
    the words for which some region does; "pointing/chance": of any region at all."""
    hits, chance = [], []
    for captions, batch, P in word_to_region(model, pairs, np.arange(len(pairs.texts)), autocast):
        place, _, box, row = pairs.pointers(captions)
        wh = np.tile(pairs.store.wh[pairs.image[captions]], 2)[row].astype(np.float32)
        box, regions = (box / wh)[:, None], batch["boxes"][row]                                     # (K, 1, 4), (K, N_V, 4)
        middle = (regions[..., :2] + regions[..., 2:]) / 2
        right = (losses.box_iou(torch.from_numpy(box), torch.from_numpy(regions)).numpy() >= 0.5 if pairs.store.named
                 else ((middle > box[..., :2]) & (middle < box[..., 2:])).all(-1))                  # (K, N_V)
        right &= batch["region_mask"][row]
        strongest = P.reshape(-1, P.shape[-1])[place].argmax(axis=1)
        some = right.any(axis=1)
        hits.append(right[np.arange(len(row)), strongest][some])
        chance.append((right.sum(1) / batch["region_mask"][row].sum(1))[some])
    return {"pointing/accuracy": float(100 * np.concatenate(hits).mean()), "pointing/chance": float(100 * np.concatenate(chance).mean())}


def after_together(model, config, sizes, tokenizer, **scoring):
    """GQA without fine-tuning, as Kervadec sec. 6.2, and pointing on GQA's validation questions, which have scene graphs."""
    config = config | {"task": "gqa"}
    found = downstream(model, config, sizes, tokenizer, **scoring)
    if (Path(config["data"]) / "gqa" / "val_sceneGraphs.json").exists():
        texts = [t for t in read_gqa(config["data"], "val_balanced")[0] if t.pointers]
        found |= pointing(model, Pairs(texts, open_store(regions_of(config), "vg"), tokenizer, config["max_words"], "GQA val", config["skip_missing"]), **scoring)
    return found


def downstream(model, config, sizes, tokenizer, split="", submit="", **scoring):
    """The numbers of a fine-tuned model on a split of its own task (its validation split unless given); submit: file to write."""
    name, load = config["task"], lambda split, **more: load_task(config, tokenizer, split, sizes["answer_list"], **more)
    split = split or VALIDATION[name]
    if name == "vcr":
        tasks = {part: load(split, part=part) for part in (("qa", "all") if submit else ("qa", "qar"))}
        if submit:
            write_csv(submit, vcr_rows(model, tasks, **scoring))
            return {"submission": submit}
        return vcr(model, tasks, **scoring)
    if name == "re":
        found = {}
        for kind in ("gt", "det"):
            if (Path(config["regions"]) / f"refcoco_{kind}").exists():
                task = load(split, boxes=kind)
                found |= {k.replace("re/", f"re/{kind}/"): v for k, v in referring(model, task, **scoring).items()}
                found[f"re/{kind}/without_region"] = float(task.target.count(-1))
        return found
    task = load(split)
    if name == "ve":
        return ve(model, task, **scoring)
    if name == "gqa":
        found, rows = gqa(model, task, sizes["answer_list"], config["data"], split, **scoring)
    else:
        found, rows = vqa(model, task, sizes["answer_list"], **scoring) if name == "vqa" else nlvr2(model, task, **scoring)
    if submit:
        write_csv(submit, rows) if name == "nlvr2" else write_atomic(submit, json.dumps(rows))
        found["submission"] = submit
    return found


def write_csv(path, rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_atomic(path, text.getvalue())


# ------------------------------------------------------------------------------------------------- phrase grounding

def best_box(scores, boxes):
    """The region of each phrase: the highest score; of equal ones the largest, then the first.     scores (..., Q, K), boxes (..., K, 4) -> (..., Q)"""
    area = (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)[..., None, :].expand(scores.shape)
    return torch.where(scores == scores.amax(dim=-1, keepdim=True), area, -1.0).argmax(dim=-1)


def phrase_accuracy(overlap, kinds, threshold=0.5):
    """Percent of phrases whose box overlaps the truth by the threshold or more, overall and by kind; a phrase of two kinds counts in both."""
    hit = np.asarray(overlap) >= threshold
    found = {"accuracy": float(100 * hit.mean())}
    for kind in sorted({k for some in kinds for k in some}):
        found[f"accuracy/{kind}"] = float(100 * hit[[kind in some for some in kinds]].mean())
    return found


def guesses(phrase, labels, boxes, wh, vectors, rng):
    """What MAF's table 5 compares with, for one phrase: {method: box}.

    phrase list of words, labels: the regions' names, boxes (K, 4) pixels, wh of the image; vectors {word or name: (d,)}. Of equally good
    regions the largest is taken.
    """
    boxes, area = np.asarray(boxes, np.float32), (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    best = lambda score: boxes[np.lexsort([-area, -np.asarray(score, float)])[0]]
    off = np.abs((boxes[:, :2] + boxes[:, 2:]) / 2 - np.asarray(wh) / 2).sum(axis=1)
    zero = np.zeros(len(next(iter(vectors.values()))))
    h, l = np.stack([vectors.get(w, zero) for w in phrase]), np.stack([vectors.get(n, zero) for n in labels])
    unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-9)
    cosine = lambda a, b: unit(a) @ unit(b).T
    return {"random": boxes[rng.integers(len(boxes))], "center-obj": best(-off), "max-obj": best(area), "whole image": np.array([0, 0, *wh], np.float32),
            "direct match": best([n in phrase for n in labels]), "glove-max": best(cosine(h, l).max(axis=0)), "glove-avg": best(cosine(h.mean(axis=0), l))}


def grounded_phrases(model, phrases, words, data, config, guess=True, seed=0):
    """Every phrase that has a box: yields (Grounding, Phrase, truth (4,), {method: box (4,)}), pixels.

    maf: the trained model, MAF eq. (7); glove-att: its unsupervised rule, eq. (8), labels alone and GloVe as it was (of a checkpoint: as
    it is now); upper bound: the region nearest to the truth, the union of the phrase's boxes; guess: also all others of table 5
    """
    store, device, rng = phrases.store, next(model.parameters()).device, np.random.default_rng(seed)
    names, fixed = [*names_of(data, "objects"), ""], getattr(words, "vectors", model.word.weight.detach().cpu().numpy())
    vectors, frozen = {name: fixed[i] for name, i in words.index.items()}, torch.as_tensor(fixed, device=device)
    for start in tqdm(range(0, len(phrases.groundings), 64), desc=phrases.name, disable=None, leave=False):
        captions = np.arange(start, min(start + 64, len(phrases.groundings)))
        batch = to(phrases.batch(captions, phrases.image[captions]), device)
        boxes = torch.from_numpy(store.read(phrases.image[captions], "boxes")[:, :batch["region_mask"].shape[1]])
        word_mask, region_mask, picked = batch["word_mask"], batch["region_mask"], {}
        with torch.inference_mode():
            h, v = model(**batch["input"])
            p = losses.phrase_embedding(h, v, word_mask, region_mask)
            if config["phrases"] == "average":
                p = (h * word_mask[..., None]).sum(-2) / word_mask.sum(-1, keepdim=True).clamp(min=1)
            h, l = frozen[batch["input"]["phrases"]], frozen[batch["input"]["labels"]]
            for method, e, r in (("maf", model.project(p), v), ("glove-att", losses.phrase_embedding(h, l, word_mask, region_mask), l)):
                A = torch.einsum("bQd, bKd -> bQK", e, r).masked_fill(~region_mask[:, None], float("-inf"))
                picked[method] = best_box(A.cpu(), boxes)
        for b, c in enumerate(captions):
            g, n = phrases.groundings[c], int(region_mask[b].sum())
            labels = [names[i] for i in store.read(phrases.image[c:c + 1], "cls_id")[0, :n]]
            for q, phrase in enumerate(g.phrases[:phrases.n_phrases[c]]):
                if phrase.chain not in g.boxes:
                    continue
                truth, own = torch.tensor(g.boxes[phrase.chain], dtype=torch.float32), boxes[b, :n]
                truth = torch.cat([truth[:, :2].amin(0), truth[:, 2:].amax(0)])
                found = {m: own[i[b, q]] for m, i in picked.items()} | {"upper bound": own[losses.box_iou(own, truth).argmax()]}
                if guess:
                    said = [w for x in phrase.words.split() if (w := bare(x))] or [""]
                    found |= {m: torch.from_numpy(x) for m, x in guesses(said, labels, own.numpy(), store.wh[phrases.image[c]], vectors, rng).items()}
                yield g, phrase, truth, found


def grounding(model, data, words, regions, config, split="test"):
    """Flickr30k Entities: accuracy at IoU 0.5, overall and by kind, of the trained model; overall of its unsupervised rule, of every guess
    of MAF's table 5, and of the best that the regions allow; in percent of the phrases that have a box."""
    phrases = Phrases(entities(data, split)[0], open_store(regions, "flickr30k"), words, data, f"Flickr30k Entities {split}", config["skip_missing"])
    rows, kinds = [], []
    for _, phrase, truth, found in grounded_phrases(model, phrases, words, data, config):
        rows.append({m: losses.box_iou(box, truth).item() for m, box in found.items()})
        kinds.append(phrase.kinds)
    if not rows:
        raise DataError(f"Flickr30k Entities {split}: no phrase has a box\n  Check flickr30k_entities/Annotations.")
    out = {f"grounding/{k}": v for k, v in phrase_accuracy([r["maf"] for r in rows], kinds).items()} | {"grounding/phrases": len(rows)}
    return out | {f"grounding/{m}": phrase_accuracy([r[m] for r in rows], kinds)["accuracy"] for m in rows[0] if m != "maf"}


def grounding_figures(model, data, words, regions, config, out, split="test", n=4):
    """MAF fig. 4, 5: a panel for each phrase of the first n captions: truth, trained and unsupervised guess; returns the paths."""
    phrases = Phrases(entities(data, split)[0][:n], open_store(regions, "flickr30k"), words, data, f"Flickr30k Entities {split}", True)
    panels, paths = {}, []
    for g, phrase, truth, found in grounded_phrases(model, phrases, words, data, config, guess=False):
        picture = Image.open(find_picture(data, g.image)).convert("RGB")
        pen = ImageDraw.Draw(picture)
        for box, colour, grow in ((truth, OTHERS, 3), (found["glove-att"], (240, 228, 66), 0), (found["maf"], (0, 114, 178), -3)):
            x1, y1, x2, y2 = box.tolist()
            pen.rectangle([x1 - grow, y1 - grow, max(x1 - grow, x2 + grow), max(y1 - grow, y2 + grow)], outline=colour, width=3)
        panels.setdefault((g.id, g.text), []).append(titled(picture.resize((240, max(1, round(picture.height * 240 / picture.width)))), phrase.words))
    for i, ((_, text), row) in enumerate(panels.items()):
        paths.append(Path(out) / f"grounding_{i}.png")
        save_png(grid([row], [f"{text!r}: truth red, trained blue, unsupervised yellow"]), paths[-1])
    return paths


# ------------------------------------------------------------------------------------- where a text is, without boxes (AMC)

def heat(model, batch):
    """Grad-CAM of the matching score: (b, patches) >= 0, no gradient; batch: text, text_mask and image for ALBEF, else Pairs.batch()."""
    with torch.enable_grad():
        if isinstance(model, Albef):
            match, P = model(**batch, explain=True)
            how = {}
        else:
            out = model(**batch, heads=("match",), explain=True)
            match, P, how = out.match, out.explained[0], {"cut": out.explained[1]}
        return losses.gradcam(P, match[:, 1].float(), batch["text_mask"], create_graph=False, **how).float().detach()


def at_size(A, size):
    """Heat maps (b, patches) of one size of picture (width, height): (b, height, width), bicubic [AMC's code]"""
    side = int(A.shape[1] ** 0.5)
    return torch.nn.functional.interpolate(A.view(-1, 1, side, side), size[::-1], mode="bicubic", align_corners=False)[:, 0]


def hottest(A):
    """(x, y) of a map's first maximum, row by row"""
    y, x = divmod(int(A.argmax()), A.shape[1])
    return x, y


def best_box_by_heat(A, boxes):
    """The box, x y w h, that holds most heat for the square root of its area; corners are cut to whole pixels [AMC's code]."""
    total = torch.nn.functional.pad(A.double().cumsum(0).cumsum(1), (1, 0, 1, 0)).cpu().numpy()
    h, w = A.shape
    x1, y1, x2, y2 = (np.clip(c.astype(int), 0, top) for c, top in zip((boxes[:, 0], boxes[:, 1], boxes[:, 0] + boxes[:, 2], boxes[:, 1] + boxes[:, 3]), (w, h, w, h)))
    return int(((total[y2, x2] - total[y1, x2] - total[y2, x1] + total[y1, x1]) / np.sqrt(np.maximum(boxes[:, 2] * boxes[:, 3], 1e-9))).argmax())


def explained(model, texts, store, tokenizer, max_words, batch_size=64, autocast=contextlib.nullcontext, name="pointing"):
    """Yields (text, its picture's index, heat map at the picture's size) of each Text; texts of one size of picture go together."""
    albef = isinstance(model, Albef)
    pairs = Pairs([t._replace(text=clean_caption(t.text)) for t in texts] if albef else texts, store, tokenizer, max_words, name, ends=not albef)
    was, device = model.training, next(model.parameters()).device
    model.eval()
    sizes = {i: store.size(i) for i in pairs.images.tolist()}
    order = sorted(range(len(texts)), key=lambda c: (sizes[int(pairs.image[c])], pairs.n_words[c]))
    bar = tqdm(total=len(order), desc=name, unit=" texts", disable=None, leave=False)
    while order:
        size = sizes[int(pairs.image[order[0]])]
        some = np.array([c for c in order[:batch_size] if sizes[int(pairs.image[c])] == size])
        order = order[len(some):]
        if albef:
            text, mask = (torch.from_numpy(x) for x in pairs.text(some))
            batch = {"image": normalised(torch.from_numpy(store.pixels(pairs.image[some]))), "text": text, "text_mask": mask}
        else:
            batch = pairs.batch(some, pairs.image[some])
        with autocast():
            A = heat(model, to(batch, device))
        for c, full in zip(some, at_size(A, size)):
            yield texts[c], int(pairs.image[c]), full
        bar.update(len(some))
    bar.close()
    model.train(was)


def boxes_of_phrases(data, split):
    """Flickr30k Entities' phrases that have boxes: Texts with target = boxes x y w h, and the kinds of each."""
    found = [(Text(g.image, p.words, f"{g.id}/{p.chain}", [(x1, y1, x2 - x1, y2 - y1) for x1, y1, x2, y2 in g.boxes[p.chain]]), p.kinds)
             for g in entities(data, split)[0] for p in g.phrases if p.chain in g.boxes]
    return [t for t, _ in found], [k for _, k in found]


def pointing_games(model, data, tokenizer, config, sets=("flickr30k", "refcoco+", "referit"), **how):
    """{"pointing/flickr30k": percent, ...}: is the hottest place strictly inside a box of what the text means?               AMC sec. 4.2, 4.3

    flickr30k    phrases of Entities' test split; .../people and so on: the eight kinds
    refcoco+     testA, testB; .../clean: images that Visual Genome does not share (AMC Table 4); .../boxes: Recall@1, the detector's box that
                 holds most heat, IoU >= 0.5 with the truth (Table 5)
    referit      RefCLEF's test expressions
    .../chance   the share of the picture that the boxes cover
    A data set that is not in the tree is left out.
    """
    data, found, where = Path(data), {}, regions_of(config)
    asked = {}
    if "flickr30k" in sets and (data / "flickr30k_entities").exists():
        asked["flickr30k"] = "flickr30k", *boxes_of_phrases(data, "test")
    for split in ("testA", "testB") if "refcoco+" in sets and (data / "refer" / "refcoco+").exists() else ():
        texts = [t._replace(target=[t.target]) for t in read_referring(data, "refcoco+", split)[0]]
        asked[f"refcoco+/{split}"] = "coco", texts, [()] * len(texts)
    if "referit" in sets and (data / "refclef").exists():
        texts = [t._replace(target=[t.target]) for t in referit(data)[0]]
        asked["referit"] = "refclef", texts, [()] * len(texts)
    if not asked:
        raise DataError(f"{data} has none of flickr30k_entities, refer/refcoco+, refclef\n  Wanted: at least one, to point at something.")
    shared = {i.get("coco_id") for i in vg_images(data).values()} if (data / "vg/image_data.json").exists() else set()
    detected = RegionStore(Path(config["regions"]) / "refcoco_det") if (Path(config["regions"]) / "refcoco_det").exists() else None
    for name, (store, texts, kinds) in asked.items():
        kind_of = dict(zip((t.id for t in texts), kinds))
        store, hits = open_store(where, store), {}
        for text, image, A in explained(model, texts, store, tokenizer, config["max_words"], name=f"pointing, {name}", **how):
            x, y = hottest(A)
            boxes = np.array(text.target, float)
            hit = bool(((boxes[:, 0] < x) & (x < boxes[:, 0] + boxes[:, 2]) & (boxes[:, 1] < y) & (y < boxes[:, 1] + boxes[:, 3])).any())
            covered = np.zeros(A.shape, bool)
            for bx, by, bw, bh in boxes.astype(int):
                covered[by:by + bh, bx:bx + bw] = True
            for key, value in (("", hit), *(("/" + k, hit) for k in kind_of[text.id]), ("/chance", covered.mean())):
                hits.setdefault(key, []).append(value)
            if name.startswith("refcoco+"):
                if int(text.image.split("_")[-1]) not in shared:
                    hits.setdefault("/clean", []).append(hit)
                if detected is not None and text.image in detected.index:
                    proposals = detected.read(np.array([detected.index[text.image]]), "boxes")[0].astype(float)
                    proposals[:, 2:] -= proposals[:, :2]
                    hits.setdefault("/boxes", []).append(iou(proposals[best_box_by_heat(A, proposals)], boxes[0]) >= 0.5)
        found |= {f"pointing/{name}{key}": float(100 * np.mean(values)) for key, values in hits.items()}
    return found


CIVIDIS = np.array([(0, 32, 77), (49, 68, 107), (102, 105, 112), (149, 143, 120), (202, 185, 105), (255, 234, 70)], float)       # reads the same to all eyes


def draw_heat(picture, A, boxes, title):
    """One panel: the picture under its heat map, the true boxes red, the hottest place a white ring."""
    A = A.clamp(min=0).cpu().numpy()
    level = (A / max(A.max(), 1e-9)) * (len(CIVIDIS) - 1)
    low = level.astype(int).clip(max=len(CIVIDIS) - 2)
    colour = CIVIDIS[low] + (level - low)[..., None] * (CIVIDIS[low + 1] - CIVIDIS[low])
    panel = Image.blend(picture, Image.fromarray(colour.astype(np.uint8)), 0.55)
    pen, (x, y) = ImageDraw.Draw(panel), hottest(torch.from_numpy(A))
    for bx, by, bw, bh in boxes:
        pen.rectangle([bx, by, bx + bw, by + bh], outline=OTHERS, width=max(2, panel.width // 120))
    r = max(4, panel.width // 60)
    pen.ellipse([x - r, y - r, x + r, y + r], outline="white", width=max(2, r // 3))
    return titled(panel.resize((240, max(1, round(panel.height * 240 / panel.width)))), title)


def heat_figures(models, data, tokenizer, config, out, n=6):
    """AMC fig. 2-5: a picture of phrases with boxes, a row for each model, the first n captions of Flickr30k Entities' test split, and
    as many expressions of RefCOCO+'s; returns the paths."""
    texts, where, paths = {}, regions_of(config), []
    if (Path(data) / "flickr30k_entities").exists():
        for t in boxes_of_phrases(data, "test")[0]:
            if t.id.split("#")[1].startswith("0/"):
                texts.setdefault(("flickr30k", t.image), []).append(t)
        texts = dict(list(texts.items())[:n])
    if (Path(data) / "refer" / "refcoco+").exists():
        some = {}
        for t in read_referring(data, "refcoco+", "testA")[0]:
            some.setdefault(("coco", t.image), []).append(t._replace(target=[t.target]))
        texts |= dict(list(some.items())[:n])
    for (name, image), said in texts.items():
        store, rows = open_store(where, name), []
        for model in models.values():
            panels = {}
            for t, at, A in explained(model, said[:5], store, tokenizer, config["max_words"]):
                panels[t.id] = draw_heat(read_picture(store.paths[at]), A, t.target, t.text)
            rows.append([panels[t.id] for t in said[:5]])
        paths.append(Path(out) / f"heat_{name}_{image}.png")
        save_png(grid(rows, list(models)), paths[-1])
    return paths


# ------------------------------------------------------------------------------------------------------------- data

VALIDATION = {"vqa": "val2014", "gqa": "testdev_all", "vcr": "val", "nlvr2": "dev", "ve": "dev", "re": "val"}


def load_task(config, tokenizer, split, names=(), part="both", boxes="gt"):
    """The data of config["task"] (train.py's settings as a dict) as data.Task; split names may be joined by + (VQA)."""
    name, data, regions = config["task"], config["data"], regions_of(config)
    how = dict(max_words=config["max_words"], skip_missing=config["skip_missing"])
    if name == "vcr":
        return vcr_task(data, split, tokenizer, vcr_store(regions), part, **how)
    own = "vg" if split.startswith(("train", "val")) else "gqa"     # GQA's train and val images are Visual Genome's
    store = open_store(regions, {"vqa": "coco", "gqa": own, "nlvr2": "nlvr2", "ve": "flickr30k", "re": f"refcoco_{boxes}"}[name])
    if name == "gqa":
        return gqa_task(data, split.split("+"), tokenizer, store, {a: i for i, a in enumerate(names)}, **how)
    if name == "vqa":
        vg = config["vg_questions"] and split != VALIDATION["vqa"] and not split.startswith("test")
        return vqa_task(data, split.split("+"), tokenizer, store, {a: i for i, a in enumerate(names)}, vg=vg, **how)
    if name == "nlvr2":
        return nlvr2_task(data, split, tokenizer, store, config["form"], **how)
    return ve_task(data, split, tokenizer, store, **how) if name == "ve" else re_task(data, config["dataset"], split, tokenizer, store, **how)


# --------------------------------------------------------------------------------------------------------- figures

INK, STRONGEST, OTHERS = (40, 40, 40), (0, 158, 115), (213, 94, 0)          # Okabe and Ito's colours, told apart by all eyes


@torch.inference_mode()
def word_attention(model, pairs, caption, image):
    """What the last layer's words look at, and what looks at them.

    returns  words (list of str), P_LV (words, N_V): a word's attention shared out among the boxes, P_VL (words, N_V): among which
             boxes the attention that a word gets is shared; mean over heads, rows sum to 1
    """
    batch = to(pairs.batch(np.array([caption]), np.array([image])), next(model.parameters()).device)
    was = model.training
    maps = model.eval()(**batch, maps=(-1,)).maps[0]
    model.train(was)
    P_LV = losses.block_softmax(maps.S_LV, batch["region_mask"])[0]
    if isinstance(model, Lxmert):                   # each block has a softmax of its own
        P_VL = losses.block_softmax(maps.S_VL, batch["text_mask"])[0].T
    else:
        P_VL = losses.joint_softmax(*maps, batch["text_mask"], batch["region_mask"])[2].mean(dim=1)[0].T
    pieces = [pairs.tokenizer.pieces[i] for i in batch["text"][0].tolist()]
    return pieces[1:-1], P_LV[1:-1].cpu().numpy(), (P_VL / P_VL.sum(dim=1, keepdim=True))[1:-1].cpu().numpy()


def draw_attention(picture, boxes, weights, title):
    """One panel: the picture paled, each box framed with a strength of its weight, the strongest in green (CACR fig. 4, 5)."""
    panel = Image.blend(picture.convert("RGB"), Image.new("RGB", picture.size, "white"), 0.35)
    scale = 240 / panel.width
    panel = panel.resize((240, max(1, round(panel.height * scale))))
    pen = ImageDraw.Draw(panel, "RGBA")
    for i in np.argsort(weights):
        colour, box = STRONGEST if i == weights.argmax() else OTHERS, [float(x) * scale for x in boxes[i]]
        alpha = int(40 + 215 * weights[i] / max(weights.max(), 1e-9))
        pen.rectangle(box, outline=(*colour, alpha), width=3)
        pen.text((box[0] + 4, box[1] + 2), f"{100 * weights[i]:.0f}", fill=(*colour, alpha), font=ImageFont.load_default(11))
    return titled(panel, title)


def titled(panel, title):
    out = Image.new("RGB", (panel.width, panel.height + 18), "white")
    out.paste(panel, (0, 18))
    ImageDraw.Draw(out).text((4, 2), title, fill=INK, font=ImageFont.load_default(12))
    return out


def grid(rows, titles):
    """Panels in rows, each row under its title."""
    heights = [max(p.height for p in row) + 24 for row in rows]
    out = Image.new("RGB", (max(sum(p.width + 6 for p in row) for row in rows), sum(heights)), "white")
    y = 0
    for row, title, height in zip(rows, titles, heights):
        ImageDraw.Draw(out).text((4, y + 4), title, fill=INK, font=ImageFont.load_default(14))
        for i, p in enumerate(row):
            out.paste(p, (sum(q.width + 6 for q in row[:i]), y + 22))
        y += height
    return out


def attention_figure(models, data, pairs, caption, words=None, directions=("S_LV", "S_VL"), picture=None):
    """Rows of panels, one for each model and direction; a panel shows a word's attention over the boxes of the caption's own image.

    models  {name: model};   words: which (all content words unless given);   picture: looked for in the data tree unless given
    """
    image = int(pairs.image[caption])
    stem, boxes = pairs.store.image_ids[image], pairs.store.read(np.array([image]), "boxes")[0]
    picture = picture or read_picture(find_picture(data, stem))
    boxes = boxes / np.tile(pairs.store.wh[image], 2) * np.tile(picture.size, 2)            # also where the store has the unit square
    rows, titles = [], []
    for name, model in models.items():
        pieces, P_LV, P_VL = word_attention(model, pairs, caption, image)
        show = [i for i, w in enumerate(pieces) if (w in words if words else w not in ("a", "the", "of", "to", "is", "and", "."))][:6]
        for direction in directions:
            P, what = {"S_LV": (P_LV, "what the word looks at"), "S_VL": (P_VL, "what looks at the word")}[direction]
            rows.append([draw_attention(picture, boxes, P[i], pieces[i]) for i in show])
            titles.append(f"{name}: {pairs.texts[caption].text!r}, {what} ({direction}), percent")
    return grid(rows, titles)


def one_photo(model, tokenizer, config, photo, text, out, detector="", regions=(36, 36), sides=(800, 1333)):
    """How well a sentence fits a photo, where each of its words looks, and the figure: {"match", "rank" or nothing, "words": {word: [x1 y1 x2 y2]}, "figure"}.

    A model of regions needs a detector's weights; one of patches, and ALBEF, only the photo.
    """
    photo, figure = Path(photo), Path(out) / f"{Path(photo).stem}.png"
    picture, max_words = read_picture(photo), config.get("max_words", 60)
    if isinstance(model, Maf):
        raise CheckpointError("MAF compares captions and does not score a single one\n  Wanted: a checkpoint of uniter, lxmert or albef")
    with tempfile.TemporaryDirectory() as folder:
        if config.get("vision") == "patches":
            store = PatchStore.__new__(PatchStore)
            store.hold(regions_of(config), [photo.stem], [photo], str(photo))
        elif not detector:
            raise CheckpointError("this model reads a detector's regions\n  Wanted: --detector pytorch_model.bin of unc-nlp/frcnn-vg-finetuned; or a checkpoint trained with --vision patches")
        else:
            (Path(folder) / "in").mkdir()
            shutil.copy(photo, Path(folder) / "in" / photo.name)
            with contextlib.redirect_stdout(sys.stderr):
                extract(Path(folder) / "in", detector, Path(folder) / "store", regions, *sides)
            store = RegionStore(Path(folder) / "store")
        if isinstance(model, Albef):
            (_, _, A), = explained(model, [Text(photo.stem, text, "photo")], store, tokenizer, max_words)
            pairs = Pairs([Text(photo.stem, clean_caption(text), "photo")], store, tokenizer, max_words, ends=False)
            ids, mask = (torch.from_numpy(x) for x in pairs.text(np.array([0])))
            with torch.inference_mode():
                match, _ = model.eval()(*to([ids, mask, normalised(torch.from_numpy(store.pixels(np.array([0]))))], next(model.parameters()).device))
            save_png(draw_heat(picture, A, [], text), figure)
            return {"match": float(match.softmax(-1)[0, 1]), "hottest": list(hottest(A)), "figure": str(figure)}
        pairs = Pairs([Text(photo.stem, text, "photo")], store, tokenizer, max_words)
        one = np.zeros(1, np.int64)
        found = {head: float(score_pairs(model, pairs, one, pairs.image, head)[0]) for head in ("match", "rank")}
        pieces, P, _ = word_attention(model, pairs, 0, 0)
        boxes = store.relative_boxes(one)[0] * np.tile(picture.size, 2)
        save_png(attention_figure({"": model}, None, pairs, 0, directions=("S_LV",), picture=picture), figure)
        return {"match": 1 / (1 + float(np.exp(-found["match"]))), "rank": found["rank"], "figure": str(figure),
                "words": {f"{i} {w}": boxes[row.argmax()].round().tolist() for i, (w, row) in enumerate(zip(pieces, P))}}


def find_picture(data, stem):
    """The picture of a region store's image id, wherever its data set keeps it."""
    data = Path(data)
    folders = [data / "winoground/images", data / "flickr30k/flickr30k-images", data / "coco" / "".join(stem.split("_")[1:2]), data / "gqa/images",
               data / "vg/VG_100K", data / "vg/VG_100K_2"]
    for folder in folders:
        for suffix in (".png", ".jpg", ".jpeg"):
            if (folder / (stem + suffix)).exists():
                return folder / (stem + suffix)
    raise DataError(f"the picture {stem} is in none of {', '.join(map(str, folders))}\n  Wanted: a .png or .jpg. Figures need the pictures.")


def training_curve(log, out):
    """One panel for each number in a run's log.jsonl, over steps; the last value beside its name."""
    series = {}
    for line in Path(log).read_text().splitlines():
        record = json.loads(line)
        for name, value in record.items():
            if name not in ("step", "seconds_left", "pairs_per_s"):
                series.setdefault(name, []).append((record["step"], value))
    panels = []
    for name, points in series.items():
        panel = Image.new("RGB", (300, 170), "white")
        pen, (x, y) = ImageDraw.Draw(panel), np.array(points, float).T
        low, high = float(y.min()), float(y.max())
        px = 40 + 250 * (x - x[0]) / max(x[-1] - x[0], 1)
        py = 150 - 115 * (y - low) / max(high - low, 1e-12)
        pen.line([(40, 30), (40, 150), (290, 150)], fill=INK)
        pen.line(list(zip(px, py)), fill=(0, 114, 178), width=2)
        small = ImageFont.load_default(10)
        pen.text((2, 30), f"{high:.3g}", fill=INK, font=small), pen.text((2, 140), f"{low:.3g}", fill=INK, font=small)
        pen.text((240, 153), f"step {int(x[-1])}", fill=INK, font=small), pen.text((44, 8), f"{name}   {y[-1]:.4g}", fill=INK, font=ImageFont.load_default(13))
        panels.append(panel)
    save_png(grid([panels[i:i + 3] for i in range(0, len(panels), 3)], [""] * len(panels)), out)


def save_png(picture, path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, optimize=True)


def figures(models, data, tokenizer, regions, out, n=4):
    """Attention figures of the first n Winoground examples, both captions each; returns the paths."""
    examples, pairs = winoground_pairs(data, tokenizer, regions)
    paths = [Path(out) / f"winoground_{e}_{c}.png" for e in range(min(n, len(examples))) for c in (0, 1)]
    for k, path in enumerate(paths):
        save_png(attention_figure(models, data, pairs, k), path)
    return paths


def map_figures(models, data, tokenizer, regions, out, n=4):
    """Kervadec fig. 4: for GQA validation questions and each model the cross layer's map, words by regions, its answer, and for each pointed
    word the picture with the boxes, the strongest in green; returns the paths."""
    pairs = Pairs([t for t in read_gqa(data, "val_balanced")[0] if len(t.pointers) > 1][:n], open_store(regions, "vg"), tokenizer, name="GQA val")
    paths = []
    for caption, text in enumerate(pairs.texts):
        image, rows, titles = pairs.image[caption], [], []
        picture = Image.open(find_picture(data, pairs.store.image_ids[image])).convert("RGB")
        boxes = pairs.store.read(np.array([image]), "boxes")[0] / np.tile(pairs.store.wh[image], 2) * np.tile(picture.size, 2)
        place, _, _, _ = pairs.pointers(np.array([caption]))
        for name, (model, answers) in models.items():
            _, batch, P = next(word_to_region(model, pairs, [caption]))
            pieces = [tokenizer.pieces[i] for i in batch["text"][0]]
            one = to({k: torch.from_numpy(v) for k, v in batch.items()}, next(model.parameters()).device)
            with torch.inference_mode():
                answer = answers[int(model(**one, heads=("task",)).scores.argmax())] if answers else ""
            rows.append([map_panel(P[0], pieces)] + [draw_attention(picture, boxes, P[0, i] / P[0, i].sum(), pieces[i]) for i in place[:4]])
            titles.append(f"{name}: {text.text!r} {answer}")
        paths.append(Path(out) / f"map_{caption}.png")
        save_png(grid(rows, titles), paths[-1])
    return paths


def map_panel(P, words, cell=18):
    """The map as shades of blue: rows are words, columns regions by falling confidence."""
    panel = Image.new("RGB", (90 + cell * P.shape[1], cell * len(words)), "white")
    pen = ImageDraw.Draw(panel)
    for i, word in enumerate(words):
        pen.text((2, cell * i + 3), word, fill=INK, font=ImageFont.load_default(11))
        for j, weight in enumerate(P[i] / P.max()):
            pen.rectangle([90 + cell * j, cell * i, 88 + cell * (j + 1), cell * (i + 1) - 2], fill=tuple(int(255 + weight * (c - 255)) for c in (0, 80, 150)))
    return titled(panel, "regions")


# ---------------------------------------------------------------------------------------------------- command line

HEAD_OF = {"vqa": "answers", "gqa": "answers", "ve": "answers", "vcr": "choice", "re": "region"}      # NLVR2's is its form
TYPES_OF = {"nlvr2": 3, "vcr": 4}                   # rows of the type table; 2 elsewhere


def load_model(path, data, size=None, config=None):
    """(model, tokenizer, config, sizes) of one of our training files, or of an official checkpoint of this size.

    config  for an official one: the task it was fine-tuned for and what else train.py's settings say about it
    """
    saved, config = None if size else read_checkpoint(path), config or {}
    if saved and saved.sizes.get("model") == "maf":
        words = Words(saved.sizes["words"])
        model = Maf(len(words), saved.sizes["width"], saved.sizes["features"], saved.sizes["use"])
        model.load_state_dict(saved.model)
        return model, words, saved.config, saved.sizes
    config = saved.config if saved else {"cased": True, "task": "retrieval", **config}
    task = config["task"]
    new_words = VCR_WORDS if task == "vcr" and not saved else VCR_WORDS[:saved.sizes["new_words"]] if saved else ()
    tokenizer = WordPiece(Path(data) / ("bert-base-cased" if config["cased"] else "bert-base-uncased") / "vocab.txt", not config["cased"], new_words)
    if not saved:
        names = answer_list_of(task, data)
        sizes = dict(vocab=len(tokenizer), types=TYPES_OF.get(task, 2), head=config.get("form", "") if task == "nlvr2" else config.get("head") or HEAD_OF.get(task, ""),
                     answers=len(names))
        sizes |= {"classes": 1600} if config.get("model") == "lxmert" else {}
        model = build(config.get("model", "uniter"), size, **sizes)
        print(f"{path}: {load_pretrained(model, path, len(new_words))}", file=sys.stderr)
        return model, tokenizer, config, sizes | {"answer_list": names}
    if saved.sizes["vocab"] != len(tokenizer):
        raise CheckpointError(f"{path} was trained with {saved.sizes['vocab']:,} word pieces, the vocabulary in {data} has {len(tokenizer):,}\n"
                              "  Choose the --data tree it was trained on.")
    made = ("vocab", "features", "classes", "attributes", "types", "head", "answers", "align", "queue", "resolution", "patch")
    model = build(saved.sizes.get("model", "uniter"), saved.sizes["size"], **{k: saved.sizes[k] for k in made if k in saved.sizes})
    model.load_state_dict(saved.model)
    return model, tokenizer, config, saved.sizes


def answer_list_of(task, data):
    """What the answers of a VQA or entailment head are called, in the order of its outputs."""
    return answer_list(data) if task == "vqa" else gqa_answers(data) if task == "gqa" else list(ENTAILMENT) if task == "ve" else []


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", help="one photo: how well --text fits it, and where its words look; no --task")
    parser.add_argument("--text", default="", help="the sentence for --image")
    parser.add_argument("--detector", default="", help="weights for --image with a model of regions: unc-nlp/frcnn-vg-finetuned's pytorch_model.bin")
    parser.add_argument("--sides", type=int, nargs=2, default=(800, 1333), help="what --detector resizes the shorter and at most the longer side to (default: 800 1333)")
    parser.add_argument("--task", choices=("winoground", "retrieval", *VALIDATION, "nlvr", "pointing", "grounding", "figures"),
                        help="pointing: do words look where GQA's annotation points; grounding: MAF; figures: attention over boxes, grounded phrases, and the training curve")
    parser.add_argument("--ckpt", required=True, nargs="+", help="a last.pt of train.py, or an official checkpoint with --size; figures compares several")
    parser.add_argument("--data", default="data/toy", help="the data tree (default: data/toy)")
    parser.add_argument("--regions", help="folder of the region stores (default: DATA/regions)")
    parser.add_argument("--dataset", help="retrieval: flickr30k or coco (default: flickr30k); re: refcoco, refcoco+ or refcocog (default: the run's)")
    parser.add_argument("--split", default="", help="default: test for retrieval, else the one with public answers: " + ", ".join(f"{k} {v}" for k, v in VALIDATION.items()))
    parser.add_argument("--size", choices=tuple(SIZES), help="size of an official checkpoint")
    parser.add_argument("--model", default="uniter", choices=("uniter", "lxmert"), help="what an official checkpoint is of (default: uniter)")
    parser.add_argument("--form", default="pair-biattn", choices=("triplet", "pair", "pair-mlp", "pair-biattn"), help="NLVR2 model of an official checkpoint (default: pair-biattn)")
    parser.add_argument("--mlp", action="store_true", help="an official RefCOCO+ checkpoint, whose head has two layers")
    parser.add_argument("--head", choices=("rank", "match"), help="which score retrieval uses: match is zero-shot (default: rank if the run trained it)")
    parser.add_argument("--hide", default="", choices=("", "text", "regions"), help="a control: the model may not see them")
    parser.add_argument("--submit", default="", help="write the test server's file here: vqa and gqa .json, vcr and nlvr2 .csv")
    parser.add_argument("--skip-missing", action="store_true", help="go on without examples whose image has no features; they are counted")
    parser.add_argument("--scores", help="retrieval's score matrix, to go on after a kill (default: beside the checkpoint)")
    parser.add_argument("--out", default="out/figures", help="where figures go (default: out/figures)")
    return parser


def main():
    args = make_parser().parse_args()
    try:
        numbers = run_task(args)
    except (DataError, CheckpointError) as error:
        sys.exit(f"evaluate.py: error: {error}")
    print(json.dumps({k: round(v, 4 if args.image else 2) if isinstance(v, float) else v for k, v in numbers.items()}))


def run_task(args):
    official = dict(model=args.model, cased=args.model == "uniter", task=args.task, form=args.form, head="region-mlp" if args.mlp else "", max_words=220 if args.task == "vcr" else 60, vg_questions=False,
                    dataset=args.dataset or "refcoco")
    loaded = {Path(p).parent.name or p: load_model(p, args.data, args.size, official) for p in args.ckpt}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer, config, sizes = next(iter(loaded.values()))
    model.to(device)
    if args.image:
        if not args.text.strip():
            raise DataError("--image without --text\n  Wanted: a sentence, as in --text \"a dog left of a person\"")
        return one_photo(model, tokenizer, config, args.image, args.text, args.out, args.detector, sides=args.sides)
    if not args.task:
        raise DataError("neither --task nor --image\n  Wanted: a benchmark, or a photo and a sentence")
    folder = args.regions or f"{args.data}/regions"
    regions, head = regions_of(config | {"data": args.data, "regions": folder}), args.head or ("match" if config.get("task") == "pretrain" else "rank")
    if args.task == "winoground":
        return winoground(model, args.data, tokenizer, regions, head=head)
    if args.task == "retrieval":
        dataset, split = args.dataset or "flickr30k", args.split or "test"
        mark = hashlib.sha256(f"{Path(args.ckpt[0]).resolve()} {Path(args.ckpt[0]).stat().st_mtime_ns} {args.data} {head}".encode()).hexdigest()[:8]
        keep = args.scores or Path(args.ckpt[0]).parent / f"scores-{dataset}-{split}-{mark}.npy"
        return retrieval(model, args.data, tokenizer, regions, dataset, split, head=head, keep=keep)
    if args.task == "nlvr":
        return nlvr(model, args.data, tokenizer, args.split or "dev", regions)
    if args.task == "grounding":
        if not isinstance(model, Maf):
            raise CheckpointError(f"{args.ckpt[0]} does not ground phrases\n  Train that first: python train.py --loss maf")
        return grounding(model, args.data, tokenizer, regions, config | {"skip_missing": args.skip_missing}, args.split or "test")
    if args.task == "pointing" and (isinstance(model, Albef) or config.get("triplets")):
        return pointing_games(model, args.data, tokenizer, config | {"data": args.data, "regions": folder}, [args.dataset] if args.dataset else ("flickr30k", "refcoco+", "referit"))
    if args.task == "pointing":
        texts = [t for t in read_gqa(args.data, args.split or "val_balanced")[0] if t.pointers]
        return pointing(model, Pairs(texts, open_store(regions, "vg"), tokenizer, config["max_words"], "GQA", args.skip_missing))
    if args.task in VALIDATION:
        together = config["task"] == "pretrain" and config.get("pretrain") == "together" and args.task == "gqa"     # GQA without fine-tuning
        config = config | {"task": "gqa"} if together else config
        if config["task"] != args.task:
            raise CheckpointError(f"{args.ckpt[0]} was trained for {config['task']}, not for {args.task}\n  Train that first: python train.py --task {args.task}")
        config = config | {"data": args.data, "regions": folder, "skip_missing": args.skip_missing} | ({"dataset": args.dataset} if args.dataset else {})
        return downstream(model, config, sizes, tokenizer, args.split, args.submit, hide=args.hide)
    models = {name: found[0].to(device) for name, found in loaded.items()}
    if isinstance(model, Maf):
        paths = grounding_figures(model, args.data, tokenizer, regions, config, args.out)
    elif isinstance(model, Albef) or config.get("triplets"):
        paths = heat_figures(models, args.data, tokenizer, config | {"data": args.data, "regions": folder}, args.out)
    elif isinstance(model, Lxmert) and config.get("pretrain") == "together":
        paths = map_figures({name: (m, loaded[name][3].get("answer_list")) for name, m in models.items()}, args.data, tokenizer, regions, args.out)
    else:
        paths = figures(models, args.data, tokenizer, regions, args.out)
    for path in args.ckpt:
        if (log := Path(path).parent / "log.jsonl").exists():
            training_curve(log, Path(args.out) / f"curve_{Path(path).parent.name}.png")
    return {"figures": args.out, "count": len(paths)}


if __name__ == "__main__":
    main()
