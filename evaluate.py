"""Benchmarks and figures. Every benchmark is one function that returns a flat dict of numbers in the papers' units.

    score_pairs        a checkpoint's score for any list of (caption, image) pairs
    winoground         text, image, group score                              Thrush et al. 2022; CACR table 2, 3
    retrieval          R@1, 5, 10 in both directions                         UNITER table 3; CACR table 4
    nlvr               accuracy on NLVR v1                                   Suhr et al. 2017
    attention_figure   a word's attention drawn on the boxes                 CACR fig. 4, 5
    training_curve     the losses of a run

python evaluate.py --task winoground --ckpt out/toy-cacr-seed0/last.pt
"""
import argparse
import contextlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import losses
from data import (Caption, DataError, Pairs, RegionStore, WordPiece, coco_karpathy, flickr30k, nlvr_pairs, write_atomic,
                  winoground as read_winoground)
from model import SIZES, CheckpointError, Uniter, load_pretrained, read_checkpoint


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
    captions = [Caption(e.images[i], e.captions[i], f"{e.id}/{i}") for e in examples for i in (0, 1)]
    return examples, Pairs(captions, RegionStore(Path(regions) / "winoground"), tokenizer, name="Winoground")


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


def retrieval(model, data, tokenizer, regions, dataset="flickr30k", split="test", **scoring):
    """{"retrieval/image/r1": percent, ...} over all images and captions of Karpathy's split.

    Flickr30k: the 1K protocol. COCO: 5K, and "retrieval/1k/...": the mean over five consecutive folds of 1,000 images.
    """
    captions = {"flickr30k": flickr30k, "coco": coco_karpathy}[dataset](data, split)
    pairs = Pairs(captions, RegionStore(Path(regions) / dataset), tokenizer, name=f"{dataset} {split}")
    T, I = len(pairs.captions), len(pairs.images)
    column = np.searchsorted(pairs.images, pairs.image)
    scores = np.empty((T, I), np.float32)
    for start in tqdm(range(0, T, 64), desc=f"retrieval {dataset} {split}: {T:,} captions x {I:,} images", disable=None, leave=False):
        rows = np.arange(start, min(start + 64, T))
        scores[rows] = score_pairs(model, pairs, np.repeat(rows, I), np.tile(pairs.images, len(rows)), **scoring).reshape(len(rows), I)
    found = {f"retrieval/{k}": v for k, v in recall(scores, column).items()}
    if dataset == "coco" and I >= 5000:
        folds = [recall(scores[rows][:, i:i + 1000], column[rows] - i) for i in range(0, 5000, 1000) if (rows := (column >= i) & (column < i + 1000)).any()]
        found |= {f"retrieval/1k/{k}": float(np.mean([f[k] for f in folds])) for k in folds[0]}
    return found


def nlvr(model, data, tokenizer, split="dev", **scoring):
    """Accuracy on NLVR v1 in percent: over all six orders, over presentations as given, and of always answering the majority."""
    pairs, labels = nlvr_pairs(data, split, tokenizer)
    right = (score_pairs(model, pairs, np.arange(len(labels)), pairs.image, head="match", **scoring) > 0) == labels
    return {"nlvr/accuracy": float(100 * right.mean()), "nlvr/accuracy/as_given": float(100 * right[::6].mean()),
            "nlvr/majority": float(100 * max(labels.mean(), 1 - labels.mean()))}


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


def attention_figure(models, data, pairs, caption, words=None, directions=("S_LV", "S_VL")):
    """Rows of panels, one for each model and direction; a panel shows a word's attention over the boxes of the caption's own image.

    models  {name: model};   words: which (all content words unless given)
    """
    image = int(pairs.image[caption])
    stem, boxes = pairs.store.image_ids[image], pairs.store.read(np.array([image]), "boxes")[0]
    picture = Image.open(find_picture(data, stem)).convert("RGB")
    boxes = boxes / np.tile(pairs.store.wh[image], 2) * np.tile(picture.size, 2)            # also where the store has the unit square
    rows, titles = [], []
    for name, model in models.items():
        pieces, P_LV, P_VL = word_attention(model, pairs, caption, image)
        show = [i for i, w in enumerate(pieces) if (w in words if words else w not in ("a", "the", "of", "to", "is", "and", "."))][:6]
        for direction in directions:
            P, what = {"S_LV": (P_LV, "what the word looks at"), "S_VL": (P_VL, "what looks at the word")}[direction]
            rows.append([draw_attention(picture, boxes, P[i], pieces[i]) for i in show])
            titles.append(f"{name}: {pairs.captions[caption].text!r}, {what} ({direction}), percent")
    return grid(rows, titles)


def find_picture(data, stem):
    """The picture of a region store's image id, wherever its data set keeps it."""
    data = Path(data)
    folders = [data / "winoground/images", data / "flickr30k/flickr30k-images", data / "coco" / "".join(stem.split("_")[1:2])]
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


# ---------------------------------------------------------------------------------------------------- command line

def load_model(path, data, size=None, cased=True):
    """(model, tokenizer, config) of one of our training files, or of an official checkpoint of this size."""
    saved = None if size else read_checkpoint(path)
    cased = saved.config["cased"] if saved else cased
    tokenizer = WordPiece(Path(data) / ("bert-base-cased" if cased else "bert-base-uncased") / "vocab.txt", lower=not cased)
    if not saved:
        model = Uniter(len(tokenizer), **SIZES[size])
        print(f"{path}: {load_pretrained(model, path)}", file=sys.stderr)
        return model, tokenizer, {}
    if saved.sizes["vocab"] != len(tokenizer):
        raise CheckpointError(f"{path} was trained with {saved.sizes['vocab']:,} word pieces, the vocabulary in {data} has {len(tokenizer):,}\n"
                              "  Choose the --data tree it was trained on.")
    model = Uniter(saved.sizes["vocab"], saved.sizes["features"], saved.sizes["classes"], **SIZES[saved.sizes["size"]])
    model.load_state_dict(saved.model)
    return model, tokenizer, saved.config


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=("winoground", "retrieval", "nlvr", "figures"), help="figures: attention over boxes, and the training curve")
    parser.add_argument("--ckpt", required=True, nargs="+", help="a last.pt of train.py, or an official checkpoint with --size; figures compares several")
    parser.add_argument("--data", default="data/toy", help="the data tree (default: data/toy)")
    parser.add_argument("--regions", help="folder of the region stores (default: DATA/regions)")
    parser.add_argument("--dataset", default="flickr30k", choices=("flickr30k", "coco"), help="for retrieval (default: flickr30k)")
    parser.add_argument("--split", help="for retrieval and nlvr (default: test, dev)")
    parser.add_argument("--size", choices=tuple(SIZES), help="size of an official checkpoint")
    parser.add_argument("--head", choices=("rank", "match"), help="which score (default: rank if the run trained it)")
    parser.add_argument("--out", default="out/figures", help="where figures go (default: out/figures)")
    return parser


def main():
    args = make_parser().parse_args()
    try:
        numbers = run_task(args)
    except (DataError, CheckpointError) as error:
        sys.exit(f"evaluate.py: error: {error}")
    print(json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in numbers.items()}))


def run_task(args):
    loaded = {Path(p).parent.name or p: load_model(p, args.data, args.size) for p in args.ckpt}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer, config = next(iter(loaded.values()))
    model.to(device)
    regions, head = args.regions or f"{args.data}/regions", args.head or ("match" if config.get("task") == "pretrain" else "rank")
    if args.task == "winoground":
        return winoground(model, args.data, tokenizer, regions, head=head)
    if args.task == "retrieval":
        return retrieval(model, args.data, tokenizer, regions, args.dataset, args.split or "test", head=head)
    if args.task == "nlvr":
        return nlvr(model, args.data, tokenizer, args.split or "dev")
    paths = figures({name: m.to(device) for name, (m, _, _) in loaded.items()}, args.data, tokenizer, regions, args.out)
    for path in args.ckpt:
        if (log := Path(path).parent / "log.jsonl").exists():
            training_curve(log, Path(args.out) / f"curve_{Path(path).parent.name}.png")
    return {"figures": args.out, "count": len(paths)}


if __name__ == "__main__":
    main()
