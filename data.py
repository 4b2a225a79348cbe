"""Files in, batches out: tokenizer, region features, official caption files, batches, and ShapesWorld, the toy tree.

Letters: B pairs, N_L words, N_V regions, D_V width of a region feature, C region classes (background first).
A batch is a dict of tensors with fixed names; masks are bool, True = real; boxes are x1 y1 x2 y2 in [0, 1].

    1. Errors and files     DataError  write_atomic  read_json  read_pickle
    2. Text                 WordPiece                                           as BERT, cased or uncased
    3. Region features      RegionStore  JoinedStore  PatchStore  CropStore     memory-mapped features; pictures in patches
                            StoreWriter  pack  extract                          from TSV and npz files; from pictures, through a detector
    4. Readers              coco  coco_karpathy  flickr30k  winoground  nlvr                  official files -> Texts
         pre-training       held_out  corpus_coco  corpus_vg  corpus_cc3m  corpus_sbu         without what downstream tasks are judged on
         downstream         vqa  vg_questions  vcr  nlvr2  snli_ve  referring  gqa             with what is right
         alignment          joined_descriptions  gqa  entities  glove                         with boxes that words point at
    5. Pairs                Pairs                                               texts and regions, ready for batches
    6. Batches              unit_batches  PairBatches  RankingBatches  Mix      every batch is a function of (seed, number)
         two streams        Names  TogetherBatches                              all of Kervadec's supervision at once
         phrases            Phrases  PhraseBatches                              MAF
    7. Downstream tasks     Task  TaskBatches  vqa_task  gqa_task  vcr_task  nlvr2_task  ve_task  re_task  blind
    8. ShapesWorld          make_toy  ensure_toy                                a toy world in the official formats
    9. Command line         python data.py toy | pack | extract

python data.py toy --out data/toy --seed 0 --scenes 6000
python data.py pack train2014_obj36.tsv --out DATA/regions/coco
"""
import argparse
import base64
import contextlib
import datetime
import difflib
import functools
import gzip
import hashlib
import json
import os
import pickle
import re
import shutil
import sys
import unicodedata
import warnings
import xml.etree.ElementTree
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from tqdm import tqdm


# 1. Errors and files -----------------------------------------------------------------------------------------------

class DataError(ValueError):
    """Input that cannot be used; the message names the file, what was found, what was wanted and what to do."""


def need(path, what, hint):
    if not Path(path).exists():
        raise DataError(f"{path} is missing\n  Wanted: {what}\n  {hint}")
    return Path(path)


def write_atomic(path, content):
    """Write text or bytes beside the file, then rename: readers see the old file or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def read_text(path, what, hint="Fetch it from its official address into this place (README, \"The full data\")."):
    """A UTF-8 text file, whole; FILE.gz does as well as FILE."""
    packed = Path(f"{path}.gz")
    try:
        if packed.exists() and not Path(path).exists():
            return gzip.decompress(packed.read_bytes()).decode("utf-8")
        return need(path, what, hint).read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read as text: {error}\n  Wanted: {what}, in UTF-8. Fetch it again.") from None


def read_json(path, what):
    """A JSON file, whole."""
    try:
        return json.loads(read_text(path, what))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not whole JSON ({Path(path).stat().st_size:,} bytes): {error}\n"
                        "  Most often a download or a copy that stopped half way: fetch it again.") from None


def read_json_lines(path, what):
    """A file of one JSON record a line."""
    records = []
    for number, line in enumerate(read_text(path, what).splitlines(), 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not whole JSON: {error}\n  Fetch the file again.") from None
    return records


class PlainPickle(pickle.Unpickler):
    """Lists, dicts, strings and numbers only: a pickle that names any class or function is refused before it can run."""
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_pickle(path, what):
    """A Python 2 pickle of plain containers (refs(unc).p); anything else in it is an error."""
    try:
        with open(need(path, what, "Fetch it from its official address into this place."), "rb") as file:
            return PlainPickle(file, encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{path} is no pickle of plain lists, dicts, strings and numbers: {error}\n  Wanted: {what}. Fetch it again from its "
                        "official address; a pickle can hold code, so any other is refused.") from None


NUMBER = int, float


def field(record, name, where, kind=object):
    """record[name], which must be a kind (str, list, NUMBER), or an error that tells the record and the nearest name it does have."""
    if not isinstance(record, dict) or name not in record:
        have = list(record) if isinstance(record, dict) else [type(record).__name__]
        near = difflib.get_close_matches(name, map(str, have), 1)
        raise DataError(f"{where} has no field {name!r}: found {', '.join(map(str, have[:8])) or 'nothing'}"
                        + (f"\n  Nearest: {near[0]!r}." if near else "") + "\n  Compare with the official format in the README.")
    if not isinstance(record[name], kind):
        raise DataError(f"{where}: {name} is {record[name]!r:.60}\n  Wanted: { {str: 'a text', list: 'a list'}.get(kind, 'a number')}. Fetch the file again.")
    return record[name]


# 2. Text -----------------------------------------------------------------------------------------------------------

def is_control(c):
    return c not in "\t\n\r" and unicodedata.category(c).startswith("C")


def is_punctuation(c):
    o = ord(c)
    return 33 <= o <= 47 or 58 <= o <= 64 or 91 <= o <= 96 or 123 <= o <= 126 or unicodedata.category(c).startswith("P")


def is_chinese(c):
    o = ord(c)
    return (0x4E00 <= o <= 0x9FFF or 0x3400 <= o <= 0x4DBF or 0x20000 <= o <= 0x2A6DF or 0x2A700 <= o <= 0x2B73F
            or 0x2B740 <= o <= 0x2B81F or 0x2B820 <= o <= 0x2CEAF or 0xF900 <= o <= 0xFAFF or 0x2F800 <= o <= 0x2FA1F)


class WordPiece:
    """BERT's tokenizer: text -> ids of word pieces.

    vocab_file: one piece a line, "##" starts a piece inside a word; lower: lower-case and strip accents first. Which of the
    two a model wants is decided by its recipe, never by the file. Words are remembered, so a corpus costs about a look-up a word.
    new_words: words that get ids of their own behind the file's, e.g. VCR's person_0 ... person_80
    """
    SPECIAL = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"

    def __init__(self, vocab_file, lower, new_words=()):
        text = read_text(vocab_file, "a WordPiece vocabulary, one piece a line",
                         "BERT's own vocab.txt fits; `python data.py toy --out data/toy` writes a small one.")
        self.pieces, self.lower = [*(p.rstrip("\r") for p in text.rstrip("\n").split("\n")), *new_words], lower
        self.new_words = len(new_words)
        self.ids = {p: i for i, p in enumerate(self.pieces)}
        for token in self.SPECIAL:
            if token not in self.ids:
                raise DataError(f"{vocab_file} has no {token} among its {len(self.pieces):,} lines\n"
                                f"  Wanted: a BERT vocabulary with {' '.join(self.SPECIAL)}. Fetch it again.")
        self.pad, self.unk, self.cls, self.sep, self.mask = (self.ids[t] for t in self.SPECIAL)
        self.whole = {word: [self.ids[word]] for word in new_words}             # never cut into pieces
        self.seen = dict(self.whole)
        self.ordinary = np.array([i for i, p in enumerate(self.pieces) if not (p.startswith("[") and p.endswith("]") and len(p) > 2)])

    def __len__(self):
        return len(self.pieces)

    def __call__(self, text):
        """ids without [CLS] and [SEP]"""
        if not (text.isascii() and text.isprintable()):
            text = "".join(" " if c in "\t\n\r" or unicodedata.category(c) == "Zs" else f" {c} " if is_chinese(c) else c
                           for c in unicodedata.normalize("NFC", text) if c not in "\0\ufffd" and not is_control(c))
        if len(self.seen) > 1_000_000:
            self.seen = dict(self.whole)
        ids = []
        for word in text.split():
            if word not in self.seen:
                self.seen[word] = [i for token in self.split(word) for i in self.greedy(token)]
            ids += self.seen[word]
        return ids

    def split(self, word):
        """Lower-case, strip accents, and cut at punctuation; special tokens stay whole."""
        if "[" in word:
            parts = [p for p in re.split(r"(\[(?:PAD|UNK|CLS|SEP|MASK)\])", word) if p]
            if len(parts) > 1 or word in self.SPECIAL:
                return [token for p in parts for token in ([p] if p in self.SPECIAL else self.split(p))]
        if self.lower:                              # letter by letter: str.lower() would turn a last sigma into another letter
            word = "".join(c for c in unicodedata.normalize("NFD", "".join(c.lower() for c in word)) if unicodedata.category(c) != "Mn")
        return "".join(f" {c} " if is_punctuation(c) else c for c in word).split()

    def greedy(self, token):
        """Longest piece first, from the left; a token that does not come out, or has over 100 letters, is [UNK]."""
        if len(token) > 100:
            return [self.unk]
        ids, start = [], 0
        while start < len(token):
            for end in range(len(token), start, -1):
                piece = ("##" if start else "") + token[start:end]
                if piece in self.ids:
                    break
            else:
                return [self.unk]
            ids.append(self.ids[piece])
            start = end
        return ids


# 3. Region features ------------------------------------------------------------------------------------------------

COLUMNS = {                                         # a store's arrays: dtype and shape of one row (D_V and C from its meta.json)
    "features": ("<f2", ("D_V",)), "boxes": ("<f4", (4,)), "cls_id": ("<i2", ()), "cls_conf": ("<f2", ()),
    "attr_id": ("<i2", ()), "attr_conf": ("<f2", ()), "cls_prob": ("<f2", ("C",)),
}
PER_IMAGE = {"offsets": "<i8", "wh": "<i4"}


class RegionStore:
    """Region features of many images, memory-mapped: nothing is read but the rows asked for.

    folder: features.npy (sum, D_V) float16, boxes.npy (sum, 4) pixels, optional class columns, offsets.npy (N+1), wh.npy (N, 2),
            image_ids.txt, meta.json; see COLUMNS. Image i owns rows offsets[i]:offsets[i+1], by falling confidence.
    """
    named = True                                    # cls_id and attr_id are of a detector's vocabulary

    def __init__(self, folder):
        self.folder = need(folder, "a region store",
                           "Make one: python data.py pack FEATURES.tsv --out " + str(folder))
        meta = read_json(self.folder / "meta.json", "the store's description")
        try:
            self.arrays = {name: np.load(self.folder / f"{name}.npy", mmap_mode="r")
                           for name in list(COLUMNS) + list(PER_IMAGE) if (self.folder / f"{name}.npy").exists()}
            self.features, self.boxes, self.offsets, self.wh = (self.arrays[k] for k in ("features", "boxes", "offsets", "wh"))
        except (ValueError, OSError, KeyError, EOFError) as error:
            raise self.bad(f"cannot be read: {str(error) or type(error).__name__}") from None
        self.image_ids = read_text(self.folder / "image_ids.txt", "the store's image ids, one a line", "Make the store again.").split("\n")[:-1]
        self.index = {name: i for i, name in enumerate(self.image_ids)}
        self.n_regions = np.diff(self.offsets).astype(np.int64)
        self.classes, self.sound = meta.get("classes"), np.zeros(len(self.image_ids), bool)
        self.check()

    def bad(self, what):
        return DataError(f"{self.folder} {what}\n  Most often a copy or a conversion that stopped half way.\n"
                         "  Make the store again: python data.py pack (toy data: delete the toy folder, the next run makes it again).")

    def check(self):
        rows, N = len(self.features), len(self.image_ids)
        if len(self.offsets) != N + 1 or len(self.wh) != N or self.offsets[0] != 0 or self.offsets[-1] != rows or len(self.boxes) != rows:
            raise self.bad(f"does not fit together: {N} image ids, {len(self.offsets)} offsets up to {self.offsets[-1]}, "
                           f"{rows} feature rows, {len(self.boxes)} boxes")
        if N == 0 or (self.n_regions < 1).any():
            raise self.bad("holds an image without regions" if N else "is empty")
        if len(self.index) != N:
            raise self.bad(f"names {N - len(self.index)} images twice")
        wh = np.repeat(self.wh, self.n_regions, axis=0)
        x1, y1, x2, y2 = np.asarray(self.boxes).T
        slack = 1e-3 * wh + 1e-4                    # float32 boxes of float arithmetic elsewhere
        wrong = ~((x1 >= -slack[:, 0]) & (y1 >= -slack[:, 1]) & (x2 <= wh[:, 0] + slack[:, 0]) & (y2 <= wh[:, 1] + slack[:, 1])
                  & (x2 >= x1) & (y2 >= y1))        # nan fails too
        if wrong.any():
            row = int(wrong.argmax())
            i = int(np.searchsorted(self.offsets, row, side="right") - 1)
            raise self.bad(f"has {int(wrong.sum())} bad boxes; the first is region {row - int(self.offsets[i])} of image {self.image_ids[i]}: "
                           f"x1 y1 x2 y2 = {np.asarray(self.boxes[row]).round(1).tolist()} in an image of {self.wh[i].tolist()} pixels")

    def __len__(self):
        return len(self.image_ids)

    def __str__(self):
        return f"{self.folder}: {len(self):,} images, {len(self.features):,} regions, {self.features.nbytes / 2 ** 20:,.0f} MiB memory-mapped"

    def read(self, images, column="features"):
        """Rows of these images side by side: (B, N_V, ...) padded with 0."""
        array, n = self.arrays[column], self.n_regions[images]
        out = np.zeros((len(images), n.max(initial=0), *array.shape[1:]), array.dtype)
        for b, (i, k) in enumerate(zip(images, n)):
            start = self.offsets[i]
            out[b, :k] = array[start:start + k]
        if column == "features" and not self.sound[images].all():     # looked at once an image: nan and inf have an exponent of ones
            odd = ((out.view(np.uint16) & 0x7C00) == 0x7C00).any(axis=(1, 2))
            if odd.any():
                raise self.bad(f"holds nan or inf in the features of image {self.image_ids[images[int(odd.argmax())]]}")
            self.sound[images] = True
        return out

    def one_each(self, images):
        """(B, D_V) the most certain region of each image"""
        return self.features[self.offsets[images]]

    def relative_boxes(self, images):
        """(B, N_V, 4) float32, x1 y1 x2 y2 divided by width and height"""
        wh = np.tile(self.wh[images], 2)[:, None].astype(np.float32)
        return (self.read(images, "boxes") / wh).clip(0, 1)


class JoinedStore(RegionStore):
    """Images put together from images of other stores: VCR's annotated and detected boxes, NLVR2's left and right image.

    names  (N,) ids of the joined images
    parts  [(store, index (N,), type)]: image i shows the regions of image index[i] of each part, one part after the other; type is
           the row of the model's type table that says which image a region is from, one number or (N,) of them
    """
    def __init__(self, names, parts):
        self.image_ids, self.parts = list(names), [(store, np.asarray(index), np.broadcast_to(kind, len(index))) for store, index, kind in parts]
        self.index = {name: i for i, name in enumerate(self.image_ids)}
        self.n_regions = sum(store.n_regions[index] for store, index, _ in self.parts)
        self.classes, self.folder = parts[0][0].classes, " + ".join(dict.fromkeys(str(store.folder) for store, _, _ in parts))

    def __str__(self):
        return f"{self.folder}: {len(self):,} images, joined"

    def join(self, images, pieces):
        """pieces: one array (B, N, ...) a part; the real regions of each side by side"""
        counts = [store.n_regions[index[images]] for store, index, _ in self.parts]
        out = np.zeros((len(images), sum(counts).max(initial=0), *pieces[0].shape[2:]), pieces[0].dtype)
        start = np.zeros(len(images), np.int64)
        for piece, n in zip(pieces, counts):
            place = real_first(n, piece.shape[1])
            row, column = np.nonzero(place)
            out[row, column + start[row]] = piece[place]
            start += n
        return out

    def read(self, images, column="features"):
        return self.join(images, [store.read(index[images], column) for store, index, _ in self.parts])

    def relative_boxes(self, images):
        return self.join(images, [store.relative_boxes(index[images]) for store, index, _ in self.parts])

    def region_types(self, images):
        """(B, N_V) int64, 0 in padding"""
        return self.join(images, [np.repeat(kind[images, None], max(1, store.n_regions[index[images]].max(initial=0)), 1).astype(np.int64)
                                  for store, index, kind in self.parts])


PICTURES = {                                        # folders of each region store's pictures, in the data tree
    "coco": ("coco/train2014", "coco/val2014", "coco/test2015"), "flickr30k": ("flickr30k/flickr30k-images",), "vg": ("vg/VG_100K", "vg/VG_100K_2"),
    "gqa": ("gqa/images",), "winoground": ("winoground/images",), "nlvr2": ("nlvr2/images",), "cc3m_train": ("cc3m/images",), "cc3m_val": ("cc3m/images",),
    "cc12m": ("cc12m/images",), "sbu": ("sbu/images",), "refclef": ("refclef/images",), "nlvr": ("nlvr",),
}
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)      # of red, green, blue [ALBEF's code]


class Patches(NamedTuple):
    """Where regions are looked for by an encoder that reads pixels: stands for the folder of region stores."""
    data: str                                       # the data tree
    resolution: int                                 # pictures are resized to a square of so many pixels
    patch: int                                      # and cut into squares of so many


def open_store(regions, name):
    """The region store of this name: in a folder of stores, or made of the data set's pictures."""
    if name == "vg_crops":
        if not isinstance(regions, Patches):
            raise DataError("--corpora crops is of pictures\n  Wanted: --vision patches")
        return CropStore(regions)
    return PatchStore(regions, name) if isinstance(regions, Patches) else RegionStore(Path(regions) / name)


def regions_of(config):
    """Where a run, its settings as a dict, finds its regions."""
    return Patches(str(config["data"]), config["resolution"], config["patch"]) if config.get("vision") == "patches" else str(config["regions"])


def find_pictures(data, name):
    """{image id: path} of a region store's images, wherever the data set keeps them; folders inside these are looked into."""
    found, folders = {}, [Path(data) / folder for folder in PICTURES.get(name, ())]
    for folder in folders:
        for at, _, files in os.walk(folder):
            for file in files:
                if file.lower().endswith((".jpg", ".jpeg", ".png")):
                    found[file.rsplit(".", 1)[0].removeprefix(f"{name}_")] = Path(at) / file
    if not found:
        raise DataError(f"no pictures of {name} in {', '.join(map(str, folders)) or data}\n  Wanted: .jpg or .png files. Fetch them from the data set's own address.")
    return found


class PatchStore(RegionStore):
    """Pictures as regions: each is resized to a square and cut into a grid of patches, row by row. Nothing is read but what is asked for.

    features  (3 p p,) a patch's pixels, less the mean, by the deviation: what a matrix makes of them is a ViT's patch embedding
    boxes     the grid's cells
    cls_prob  (513,) which colours the patch has, a share of each: red, green and blue in eight steps [as ViT's self-supervision, Dosovitskiy
              et al. 2021 sec. 4.6]; class 0, background, is never there. cls_id, cls_conf: the commonest; attributes are not known
    Small pictures stay in memory once read.
    """
    KEPT, named = 2 ** 30, False                    # bytes

    def __init__(self, patches, name):
        paths = find_pictures(patches.data, name)
        self.hold(patches, sorted(paths), [paths[i] for i in sorted(paths)], f"{patches.data}, pictures of {name}")

    def hold(self, patches, ids, paths, folder):
        self.patches, self.image_ids, self.paths, self.folder = patches, ids, paths, folder
        R, p = patches.resolution, patches.patch
        if p < 1 or R % p:
            raise DataError(f"pictures of {R} pixels do not divide into patches of {p}\n  Wanted: --resolution a multiple of --patch")
        self.index, self.classes = {name: i for i, name in enumerate(ids)}, 1 + 8 ** 3
        self.n_regions, self.offsets = np.full(len(ids), (R // p) ** 2), np.arange(len(ids) + 1) * (R // p) ** 2
        y, x = np.mgrid[0:R:p, 0:R:p].reshape(2, -1)
        self.cells = np.stack([x, y, x + p, y + p], axis=1).astype(np.float32) / R
        keep = len(ids) * 3 * R * R <= self.KEPT
        self.kept, self.known = (np.zeros((len(ids), R, R, 3), np.uint8), np.zeros(len(ids), bool)) if keep else (None, None)

    def __str__(self):
        return f"{self.folder}: {len(self):,} of {self.patches.resolution} x {self.patches.resolution} in patches of {self.patches.patch}"

    @functools.cached_property
    def wh(self):
        """(N, 2) width and height of the pictures themselves; needed only where boxes in pixels are"""
        return np.array([self.size(i) for i in tqdm(range(len(self)), desc=f"sizes of {self.folder}", disable=None, leave=False)], np.int32)

    def relative_boxes(self, images):
        return np.repeat(self.cells[None], len(images), 0)

    def size(self, image):
        """(width, height) of the picture itself"""
        with Image.open(self.paths[image]) as picture:
            turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return picture.size[::-1] if turned else picture.size

    def pixels(self, images):
        """(B, R, R, 3) uint8"""
        if self.kept is None:
            return np.stack([self.one(i) for i in images])
        for i in images[~self.known[images]]:
            self.kept[i] = self.one(i)
            self.known[i] = True
        return self.kept[images]

    def one(self, image):
        return open_picture(self.paths[image], self.patches.resolution)

    def one_each(self, images):
        """(B, D_V) the patch in the middle"""
        return self.read(images)[:, len(self.cells) // 2] if len(images) else np.zeros((0, 3 * self.patches.patch ** 2), np.float16)

    def read(self, images, column="features"):
        images = np.asarray(images)
        if column == "boxes":
            return self.cells * np.tile(self.wh[images], 2)[:, None].astype(np.float32)
        if column in ("attr_id", "attr_conf"):
            return np.full((len(images), len(self.cells)), -1 if column == "attr_id" else 0, np.int64)
        p = self.patches.patch
        x = rearrange(self.pixels(images), "B (h p) (w q) c -> B (h w) (p q) c", p=p, q=p)
        if column == "features":
            return ((x / np.float32(255) - np.float32(MEAN)) / np.float32(DEVIATION)).astype(np.float16).reshape(*x.shape[:2], -1)
        code = 1 + (x >> 5) @ np.array([64, 8, 1])                                              # (B, N, p p)
        place = np.arange(code.shape[0] * code.shape[1]).reshape(*code.shape[:2], 1)
        share = np.bincount((place * self.classes + code).ravel(), minlength=place.size * self.classes).reshape(*code.shape[:2], -1) / code.shape[2]
        return {"cls_prob": lambda: share.astype(np.float16), "cls_id": lambda: share.argmax(-1) - 1, "cls_conf": lambda: share.max(-1)}[column]()


class CropStore(PatchStore):
    """Visual Genome's regions as pictures of their own, with some of what is around them: anything from the region alone to the whole.

    Image id = image/number of the region, as corpus_crops has it; how much is around it is a function of that.
    """
    def __init__(self, patches):
        paths, images, self.windows, ids = find_pictures(patches.data, "vg"), vg_images(patches.data), [], []
        for name, region, box in vg_regions(patches.data):
            record = images.get(int(name))
            if name in paths and record and clipped(*box, record):
                ids.append(f"{name}/{region}"), self.windows.append(around(np.random.default_rng([int(name), region]), box, record))
        self.hold(patches, ids, [paths[i.split("/")[0]] for i in ids], f"{patches.data}, regions of vg")

    def one(self, image):
        return open_picture(self.paths[image], self.patches.resolution, self.windows[image])


def around(rng, box, record):
    """A window of the picture (left, top, right, bottom) round a box x y w h, its sides between the box's and the picture's, as likely each time as large."""
    window = []
    for at, length, whole in ((box[0], box[2], record["width"]), (box[1], box[3], record["height"])):
        length = min(max(length, 1), whole)
        wide = length * (whole / length) ** rng.random()
        start = rng.uniform(max(0, at + length - wide), min(max(0, at), whole - wide)) if wide < whole else 0
        window.append((start, start + wide))
    (left, right), (top, bottom) = window
    return left, top, right, bottom


def open_picture(path, resolution, window=None):
    """A picture, or a window of it, as (R, R, 3) uint8, resized whatever its shape."""
    picture = read_picture(path, None if window else resolution * 7 // 8)                       # decoded at a half, a quarter if that is almost enough
    return np.asarray(picture.resize((resolution, resolution), Image.BICUBIC, window))


def read_picture(path, enough=None):
    """A picture, upright and in colour; enough: a JPEG may be decoded at a fraction of its size that is not below this.

    One that cannot be read or is too large to be meant (a decompression bomb) is a DataError.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                if enough:
                    picture.draft("RGB", (enough, enough))
                picture.load()
                return upright(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{path} cannot be read as a picture: {str(error).splitlines()[0] if str(error) else type(error).__name__}\n"
                        "  Most often a download that stopped half way, or an error page saved as a picture. Fetch it again, or remove it.") from None


def upright(picture):
    """As a camera held it (EXIF), and red, green, blue of 8 bits, whatever it was: grey, palette, CMYK, 16 bits, transparent on white."""
    if picture.getexif().get(0x0112, 1) != 1:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith(("I", "F")):         # 16 bits a pixel or more: Pillow would cut them off
        x = np.asarray(picture, np.float64)
        picture = Image.fromarray((x / (65535 if x.max() > 255 else 255) * 255).clip(0, 255).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


class StoreWriter:
    """Writes a store image by image in constant memory, beside its place; commit() puts it there whole.

    Restartable: every `every` images the files are flushed and counted in progress.json; a writer opened on the same place later
    cuts what lies behind the count, and `done` tells how many images to skip.
    """
    def __init__(self, folder, columns, meta, every=256):
        self.folder, self.tmp, self.meta, self.every = Path(folder), Path(str(folder) + ".tmp"), meta, every
        if self.folder.exists():
            raise DataError(f"{folder} exists already\n  Wanted: a new place. Choose another --out, or delete it first.")
        self.tmp.mkdir(parents=True, exist_ok=True)
        sizes = {"D_V": meta["features"], "C": meta.get("classes")}
        self.spec = {name: (np.dtype(COLUMNS[name][0]), tuple(sizes.get(s, s) for s in COLUMNS[name][1])) for name in columns}
        progress = self.tmp / "progress.json"
        state = json.loads(progress.read_text()) if progress.exists() else {}
        if state and (state["meta"] != meta or state["columns"] != list(columns)):
            raise DataError(f"{self.tmp} was begun from something else: {state['meta']}\n  Wanted: {meta}\n  Delete {self.tmp} to start again.")
        self.offsets, self.wh, self.ids = state.get("offsets", [0]), state.get("wh", []), state.get("ids", [])
        self.files = {}
        for name, (dtype, shape) in self.spec.items():
            self.files[name] = open(self.tmp / f"{name}.npy", "r+b" if state else "w+b")
            self.header(name)
            self.files[name].seek(128 + self.offsets[-1] * dtype.itemsize * int(np.prod(shape)))
            self.files[name].truncate()

    @property
    def done(self):
        return len(self.ids)

    def header(self, name):
        """npy version 1.0 in 128 bytes, so that the row count can be filled in later without moving the rows."""
        dtype, shape = self.spec[name]
        text = repr({"descr": dtype.str, "fortran_order": False, "shape": (self.offsets[-1], *shape)}).ljust(117) + "\n"
        self.files[name].seek(0)
        self.files[name].write(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode())

    def add(self, image_id, wh, **columns):
        """columns: one array (n, ...) for each column of the store"""
        n = len(columns["boxes"])
        for name, (dtype, shape) in self.spec.items():
            array = np.asarray(columns[name])
            if array.shape != (n, *shape):
                raise DataError(f"image {image_id}: {name} is {array.shape}, wanted {(n, *shape)}")
            self.files[name].write(np.ascontiguousarray(array, dtype).tobytes())
        self.offsets.append(self.offsets[-1] + n)
        self.wh.append([int(x) for x in wh])
        self.ids.append(str(image_id))
        if len(self.ids) % self.every == 0:
            self.flush()

    def flush(self):
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        write_atomic(self.tmp / "progress.json", json.dumps({"meta": self.meta, "columns": list(self.spec), "offsets": self.offsets,
                                                             "wh": self.wh, "ids": self.ids}))

    def commit(self):
        """Fill in the row counts, write the small files with a checksum of each array, and rename."""
        sums = {}
        for name, file in self.files.items():
            self.header(name)
            file.close()
        np.save(self.tmp / "offsets.npy", np.array(self.offsets, PER_IMAGE["offsets"]))
        np.save(self.tmp / "wh.npy", np.array(self.wh, PER_IMAGE["wh"]).reshape(-1, 2))
        write_atomic(self.tmp / "image_ids.txt", "".join(i + "\n" for i in self.ids))
        for file in sorted(self.tmp.glob("*.npy")):
            with open(file, "rb") as handle:
                sums[file.name] = hashlib.file_digest(handle, "sha256").hexdigest()
        write_atomic(self.tmp / "meta.json", json.dumps({**self.meta, "images": len(self.ids), "regions": self.offsets[-1], "sha256": sums}, indent=1))
        (self.tmp / "progress.json").unlink(missing_ok=True)
        os.replace(self.tmp, self.folder)


def decode(text, dtype, shape, where):
    """One base64 column of a TSV row."""
    try:
        array = np.frombuffer(base64.b64decode(text, validate=True), dtype)
        return array.reshape(shape)
    except ValueError as error:
        raise DataError(f"{where}: expected {np.dtype(dtype).name} {tuple(shape)}: {error}\n  Fetch the file again.") from None


def tsv_rows(path, skip=0):
    """Rows of an LXMERT (10 columns) or BUTD (6 columns) feature file, one at a time: (image_id, (w, h), columns)."""
    with open(path, encoding="ascii", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if number <= skip:
                continue
            cells, where = line.rstrip("\n").split("\t"), f"{path}, line {number}"
            if len(cells) not in (6, 10):
                raise DataError(f"{where} has {len(cells)} columns: wanted 10 (LXMERT) or 6 (bottom-up attention)\n"
                                "  Most often a download that stopped half way: fetch the file again.")
            try:
                h, w, n = (int(cells[i]) for i in ((1, 2, 7) if len(cells) == 10 else (2, 1, 3)))
            except ValueError:
                raise DataError(f"{where}: image size or box count is no whole number: {cells[1:4]}") from None
            features = base64.b64decode(cells[-1]) if len(cells[-1]) % 4 == 0 else b""
            if n < 1 or not features or len(features) % (4 * n):
                raise DataError(f"{where} (image {cells[0]}): {len(features):,} bytes of features for {n} boxes\n  Fetch the file again.")
            columns = {"boxes": decode(cells[-2], "<f4", (n, 4), where).copy(),
                       "features": np.frombuffer(features, "<f4").reshape(n, -1)}
            if len(cells) == 10:
                for name, i, dtype in (("cls_id", 3, "<i8"), ("cls_conf", 4, "<f4"), ("attr_id", 5, "<i8"), ("attr_conf", 6, "<f4")):
                    columns[name] = decode(cells[i], dtype, (n,), where)
            yield cells[0], (w, h), columns


def npz_rows(folder, sizes, skip=0):
    """UNITER's npz files in order of name. They do not hold the image size: sizes = {image id: (w, h)}, else the unit square."""
    for path in sorted(Path(folder).glob("*.npz"))[skip:]:
        try:
            z = np.load(path, allow_pickle=False)
            features, boxes, conf, probs = z["features"], z["norm_bb"][:, :4], z["conf"].ravel(), z["soft_labels"]
        except (ValueError, OSError, KeyError, zipfile.BadZipFile, EOFError) as error:
            raise DataError(f"{path} cannot be read ({path.stat().st_size:,} bytes): {error}\n  Wanted: UNITER's npz with features, norm_bb, "
                            "conf, soft_labels.\n  Most often a download or a copy that stopped half way: fetch it again.") from None
        n = int(np.clip((conf > 0.2).sum(), 10, 100))                       # UNITER's rule [authors' code]
        name = uniter_image_id(path.stem)
        w, h = sizes.get(name, (1, 1))
        order = slice(0, min(n, len(features)))
        yield name, (w, h), {"features": features[order], "boxes": (boxes[order] * [w, h, w, h]).astype("<f4"),
                             "cls_prob": probs[order], "cls_conf": conf[order], "cls_id": probs[order, 1:].argmax(axis=1)}


def uniter_image_id(stem):
    """coco_train2014_000000000042, visual_grounding_coco_gt_000000000042 -> COCO_train2014_000000000042; flickr30k_000001000092795 -> 1000092795;
    nlvr2_dev-850-0-img0 -> dev-850-0-img0; vcr_gt_val_1001_Film_00.11@3 -> 1001_Film_00.11@3"""
    if stem.startswith("coco_"):
        return "COCO_" + stem[5:]
    if stem.startswith("visual_grounding_"):        # RefCOCO's images are all of train2014
        return "COCO_train2014_" + stem[-12:]
    if found := re.match(r"nlvr2_|vcr_(?:gt_)?(?:train|val|test)_", stem):
        return stem[found.end():]
    head, _, tail = stem.rpartition("_")
    return str(int(tail)) if head and tail.isdigit() else stem


def pack(source, out, images=None):
    """Convert an LXMERT or BUTD TSV file, or a folder of UNITER npz files, into a region store. Streams; may be killed and restarted.

    images: folder of the pictures, to read their sizes from (npz only; without it boxes stay relative and wh is 1 x 1)
    """
    source = need(source, "a .tsv file or a folder of .npz files", "Check the path.")
    folder = source.is_dir()
    sizes = {}
    for path in tqdm(sorted(Path(images).rglob("*.*")) if images and folder else [], desc="image sizes", disable=None):
        with contextlib.suppress(OSError), Image.open(path) as picture:
            sizes[path.stem] = picture.size
    make = (lambda skip: npz_rows(source, sizes, skip)) if folder else (lambda skip: tsv_rows(source, skip))
    total = len(list(source.glob("*.npz"))) if folder else None
    first = next(make(0), None)
    if first is None:
        raise DataError(f"{source} holds no {'npz files' if folder else 'rows'}\n  Wanted: features to convert. Check the path.")
    columns = [name for name in COLUMNS if name in first[2]]
    meta = {"source": str(source), "features": first[2]["features"].shape[1],
            "classes": first[2]["cls_prob"].shape[1] if "cls_prob" in columns else None}
    writer, clipped = StoreWriter(out, columns, meta), 0
    bar = tqdm(total=total, initial=writer.done, desc=f"pack {source.name}", unit=" images", disable=None)
    for image_id, (w, h), row in make(writer.done):
        inside = row["boxes"].clip(0, [w, h, w, h])
        if not np.isfinite(row["boxes"]).all() or not np.isfinite(row["features"]).all():
            raise DataError(f"{source}, image {image_id}: nan or inf in boxes or features\n  Fetch the file again.")
        if (inside[:, 2:] < inside[:, :2]).any() or np.abs(inside - row["boxes"]).max() > max(w, h):
            raise DataError(f"{source}, image {image_id}: a box with x2 < x1 or far outside its {w} x {h} image: {row['boxes'].tolist()[0]}")
        clipped += int((inside != row["boxes"]).any(axis=1).sum())
        row["boxes"] = inside
        writer.add(image_id, (w, h), **row)
        bar.update()
    bar.close()
    writer.commit()
    print(f"{out}: {writer.done:,} images, {writer.offsets[-1]:,} regions of width {meta['features']}, {clipped} boxes clipped to their image")


def extract(images, detector, out, regions=(36, 36), shorter=800, longer=1333, batch=1, shard=64):
    """Pictures of a folder to a region store, through the bottom-up-attention detector (model.Detector). May be killed and restarted, with
    any number of processes (torchrun): what is finished, in shards of `shard` pictures, stays in OUT.parts, and the store is the same to the byte.

    detector: its weights; regions: at least and at most so many; shorter, longer: sides that pictures are resized to; batch: pictures of one
    size at a time (1: the same numbers on every machine's batch size). A picture that cannot be read is left out, counted, and listed in OUT/skipped.txt.
    """
    from model import load_detector, resized_picture, resized_size      # here alone data needs a model: it makes the data
    folder, parts, rank, world = need(images, "a folder of pictures", "Check the path."), Path(f"{out}.parts"), int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if Path(out).exists():
        raise DataError(f"{out} exists already\n  Wanted: a new place. Choose another --out, or delete it first.")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if twice := [name for name, n in Counter(p.stem for p in paths).items() if n > 1]:
        raise DataError(f"{folder}: {len(twice):,} names stand for several pictures, the first {twice[0]}\n  Wanted: one picture a name. Extract their folders one by one.")
    if not paths:
        raise DataError(f"{folder} holds no .jpg or .png\n  Check the path.")
    model = load_detector(detector)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    model.to(device)
    settings = {"detector": hashlib.sha256(Path(detector).read_bytes()).hexdigest()[:16], "regions": list(regions), "sides": [shorter, longer], "shard": shard, "batch": batch, "pictures": len(paths)}
    parts.mkdir(parents=True, exist_ok=True)
    if (parts / "settings.json").exists() and read_json(parts / "settings.json", "what the extraction was begun with") != settings:
        raise DataError(f"{parts} was begun with other settings or pictures\n  Delete it to start again, or repeat the first command.")
    if rank == 0:                                   # one writer; the others' settings are of the same command line
        write_atomic(parts / "settings.json", json.dumps(settings))
    shards = [paths[i:i + shard] for i in range(0, len(paths), shard)]
    todo = [k for k in range(rank, len(shards), world) if not (parts / f"{k:06d}.npz").exists()]
    bar = tqdm(total=sum(len(shards[k]) for k in range(rank, len(shards), world)), initial=sum(len(shards[k]) for k in range(rank, len(shards), world) if k not in set(todo)),
               desc=f"extract {folder.name}", unit=" images", disable=None if rank == 0 else True)
    for k in todo:
        save_shard(parts / f"{k:06d}.npz", look_at(model, shards[k], device, regions, shorter, longer, batch, bar, resized_picture, resized_size))
    bar.close()
    if world > 1:
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if rank == 0:
        merge_shards(parts, len(shards), out, {"source": f"detector {settings['detector']}, {regions[0]} to {regions[1]} regions, sides {shorter}, {longer}"})


def look_at(model, paths, device, regions, shorter, longer, batch, bar, resized_picture, resized_size):
    """One shard: {column: rows of all its pictures, "n": regions of each, "wh", "ids", "skipped": why not}"""
    pictures, skipped, found = {}, [], {}
    for path in paths:
        try:
            pixels = torch.from_numpy(np.array(read_picture(path)))
            if min(size := resized_size(*pixels.shape[:2], shorter, longer)) < 32:
                raise DataError(f"{path}: {pixels.shape[1]} x {pixels.shape[0]} pixels become {size[1]} x {size[0]}, too narrow to see anything")
            pictures.setdefault(size, []).append((path.stem, pixels))
        except DataError as error:
            skipped.append(str(error).splitlines()[0])
            bar.update()
    for (h, w), some in pictures.items():
        for start in range(0, len(some), batch):
            part = some[start:start + batch]
            x = torch.stack([resized_picture(pixels.to(device), shorter, longer) for _, pixels in part])
            raw = torch.tensor([pixels.shape[:2] for _, pixels in part], dtype=torch.float32, device=device)
            sizes = torch.tensor([[h, w]] * len(part), device=device)
            for (name, pixels), seen in zip(part, model(x, sizes, raw / sizes, regions)):
                found[name] = (pixels.shape[1], pixels.shape[0]), {c: getattr(seen, c).cpu().numpy() for c in COLUMNS}, seen.threshold
                if not len(seen.boxes):
                    skipped.append(f"{name}: nothing was seen")
                    del found[name]
            bar.update(len(part))
    ids = [p.stem for p in paths if p.stem in found]
    rows = {c: np.concatenate([found[i][1][c].astype(COLUMNS[c][0]) for i in ids]) for c in COLUMNS} if ids else {}
    return rows | {"n": np.array([len(found[i][1]["boxes"]) for i in ids], np.int64), "wh": np.array([found[i][0] for i in ids], np.int64).reshape(-1, 2), "ids": np.array(ids, str),
                   "skipped": np.array(skipped, str), "few": np.array(sum(found[i][2] < 0 for i in ids))}


def save_shard(path, arrays):
    beside = path.with_suffix(".tmp")
    try:
        with open(beside, "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise DataError(f"{path} could not be written: {error}\n  Free some space and start the same command again: finished shards are kept.") from None


def merge_shards(parts, count, out, meta):
    """All shards, in order, into one store; then they are deleted."""
    writer, at, skipped, few = None, 0, [], 0
    for k in tqdm(range(count), desc=f"write {out}", disable=None):
        with np.load(parts / f"{k:06d}.npz", allow_pickle=False) as z:
            skipped, few, ids, ends = skipped + z["skipped"].tolist(), few + int(z["few"]), z["ids"].tolist(), np.cumsum(z["n"])
            rows = {c: z[c] for c in COLUMNS} if ids else {}
            for i, name in enumerate(ids):
                writer = writer or StoreWriter(out, list(COLUMNS), meta | {"features": rows["features"].shape[1], "classes": rows["cls_prob"].shape[1]})
                if at >= writer.done:
                    part = slice(ends[i] - z["n"][i], ends[i])
                    w, h = z["wh"][i]
                    writer.add(name, (w, h), **{c: x[part].clip(0, [w, h, w, h]) if c == "boxes" else x[part] for c, x in rows.items()})
                at += 1
    if writer is None:
        raise DataError(f"none of the pictures could be read, for example {skipped[0]}\n  {parts} holds the list.")
    write_atomic(writer.tmp / "skipped.txt", "".join(f"{line}\n" for line in skipped))
    writer.commit()
    shutil.rmtree(parts)
    print(f"{out}: {writer.done:,} images, {writer.offsets[-1]:,} regions; {len(skipped):,} pictures left out (skipped.txt); {few:,} with fewer regions than asked for")


# 4. Readers --------------------------------------------------------------------------------------------------------
# Official files in, Texts out. A reader takes the data tree and a split; downstream readers also tell what they had to count:
# (texts, told) with told = {what: how many}.

class Text(NamedTuple):
    """A text about an image, as the model reads them together."""
    image: str                                      # the image's id in the region store
    text: str                                       # or segments: ((type, text), ...)
    id: str                                         # for messages and result files
    target: object = None                           # what a downstream reader says is right
    pointers: tuple = ()                            # ((first word, end word, box), ...): blank-separated words that mean this box, x1 y1 x2 y2 pixels


def coco_images(data, split):
    """{image id: its record, with "stem" added} of COCO 2014's caption file."""
    path = Path(data) / "coco" / "annotations" / f"captions_{split}.json"
    whole = read_json(path, "COCO's caption annotations")
    return whole, {field(i, "id", f"{path}, images[]"): {**i, "stem": Path(field(i, "file_name", f"{path}, images[]")).stem}
                   for i in field(whole, "images", path)}


def coco(data, split):
    """COCO 2014 captions. split: train2014, val2014. Image id = file stem, as in the feature files."""
    path = Path(data) / "coco" / "annotations" / f"captions_{split}.json"
    whole, images = coco_images(data, split)
    out = []
    for a in field(whole, "annotations", path):
        where = f"{path}, annotation {a.get('id')}"
        image = field(a, "image_id", where)
        if image not in images:
            raise DataError(f"{where} is about image {image}, which is not in the file's images list\n  Fetch the file again.")
        out.append(Text(images[image]["stem"], field(a, "caption", where, str), str(a.get("id"))))
    return out


def karpathy_images(data, dataset):
    path = Path(data) / dataset / f"dataset_{dataset}.json"
    return field(read_json(path, f"Karpathy's split of {dataset}"), "images", path), path


def coco_karpathy(data, split):
    """COCO captions in Karpathy's split: train (with restval, as every paper), val, test; the first five captions of an image."""
    images, path = karpathy_images(data, "coco")
    wanted = ("train", "restval") if split == "train" else (split,)
    return [Text(Path(field(i, "filename", path)).stem, field(s, "raw", path, str), str(s.get("sentid")))
            for i in images if field(i, "split", path) in wanted for s in field(i, "sentences", path)[:5]]


def flickr30k(data, split):
    """Flickr30k in Karpathy's split: train, val, test. Image id = file stem."""
    images, path = karpathy_images(data, "flickr30k")
    return [Text(Path(field(i, "filename", path)).stem, field(s, "raw", path, str), str(s.get("sentid")))
            for i in images if field(i, "split", path) == split for s in field(i, "sentences", path)]


class WinogroundExample(NamedTuple):
    id: str
    images: tuple                                   # two image ids; caption i belongs to image i
    captions: tuple
    tag: str


def winoground(data):
    """Winoground's 400 examples (the toy tree: fewer)."""
    path = Path(data) / "winoground" / "examples.jsonl"
    return [WinogroundExample(str(field(e, "id", path)), (field(e, "image_0", path), field(e, "image_1", path)),
                              (field(e, "caption_0", path), field(e, "caption_1", path)), e.get("collapsed_tag", ""))
            for e in read_json_lines(path, "Winoground's examples")]


class NlvrExample(NamedTuple):
    id: str                                         # sentence - presentation
    text: str
    label: bool
    boxes: list                                     # three lists of items: (shape, colour, size in pixels, x, y)


def truth(record, where):
    """The label of NLVR and NLVR2, a string in capitals or not; None where a test set has none."""
    label = str(record.get("label", "")).lower()
    if label not in ("true", "false", ""):
        raise DataError(f"{where}: label {record['label']!r}, wanted true or false")
    return {"true": True, "false": False, "": None}[label]


def nlvr(data, split):
    """NLVR v1: sentences about three boxes of shapes, true or false. One example a presentation, as its structured_rep tells it."""
    path = Path(data) / "nlvr" / split / f"{split}.json"
    colours = {"yellow": "yellow", "black": "black", "#0099ff": "blue"}
    out = []
    for e in read_json_lines(path, "NLVR v1: clone lil-lab/nlvr, folder nlvr"):
        where = f"{path}, {e.get('identifier')}"
        try:
            boxes = [[(i["type"], colours[i["color"].lower()], i["size"], i["x_loc"], i["y_loc"]) for i in box] for box in field(e, "structured_rep", where)]
        except (KeyError, TypeError) as error:
            raise DataError(f"{where}: an item of structured_rep lacks or has an unknown {error}") from None
        field(e, "label", where)
        out.append(NlvrExample(f"{split}-{field(e, 'identifier', where)}", field(e, "sentence", where, str), truth(e, where), boxes))
    return out


# ------------------------------------------------------------------------------- pre-training corpora (UNITER table 1)

def photo_id(url):
    """The photo's number in a Flickr address, which Flickr30k's file names are; "" elsewhere."""
    found = re.search(r"flickr\.com/.*?/(\d+)_[0-9a-zA-Z]+(?:_[a-z0-9])?\.(?:jpg|png|gif)", str(url or ""))
    return found[1] if found else ""


class HeldOut(NamedTuple):
    """Images that pre-training may not see, since a downstream task is judged on them.                          UNITER sec. A.1"""
    coco: set                                       # COCO image ids
    photos: set                                     # Flickr photo numbers of Flickr30k
    told: dict                                      # {which list: how many images}


def held_out(data):
    """Read the lists from whatever of these files is there: Karpathy's val and test, RefCOCO/+/g's val and test, Flickr30k's photos."""
    data, coco_ids, told = Path(data), set(), {}
    for split in ("val", "test"):
        found = {i["cocoid"] for i in karpathy_images(data, "coco")[0] if i["split"] == split}
        told[f"Karpathy {split}"], coco_ids = len(found), coco_ids | found
    for name in REFER:
        if (data / "refer" / name).exists():
            found = {ref["image_id"] for ref in refs(data, name) if ref["split"] != "train"}
            told[f"{name} val, test"], coco_ids = len(found), coco_ids | found
        else:
            told[f"{name} (not there)"] = 0
    photos = set()
    if (data / "flickr30k" / "dataset_flickr30k.json").exists():
        photos = {Path(i["filename"]).stem for i in karpathy_images(data, "flickr30k")[0]}
    if (tokens := data / "flickr30k" / "results_20130124.token").exists():
        photos |= {line.split(".jpg#")[0] for line in read_text(tokens, "Flickr30k's captions").splitlines()}
    return HeldOut(coco_ids, photos, told)


def corpus_coco(data, split, out):
    """UNITER's COCO: train2014 and val2014 together without what is held out; validation is Karpathy's val."""
    if split == "val":
        return coco_karpathy(data, "val"), {}
    texts, both, told = [], {}, {**out.told, "also in Flickr30k": 0}
    for part in ("train2014", "val2014"):
        both |= coco_images(data, part)[1]
        texts += coco(data, part)
    stems = {i["stem"] for n, i in both.items() if n not in out.coco}
    twice = {i["stem"] for i in both.values() if photo_id(i.get("flickr_url")) in out.photos}
    told["also in Flickr30k"] = len(twice & stems)
    return [t for t in texts if t.image in stems - twice], {f"images held out, {k}": v for k, v in told.items()}


def vg_images(data):
    """Visual Genome's {image id: record}."""
    path = Path(data) / "vg" / "image_data.json"
    images = {field(i, "image_id", path): i for i in read_json(path, "Visual Genome's image_data.json")}
    for number, record in images.items():
        field(record, "width", f"{path}, image {number}", NUMBER), field(record, "height", f"{path}, image {number}", NUMBER)
    return images


def vg_items(data, name, key):
    """Yields (image, its records, where that is) of one of Visual Genome's files."""
    path = Path(data) / "vg" / f"{name}.json"
    for item in tqdm(read_json(path, f"Visual Genome's {name}"), desc=f"Visual Genome's {name}", disable=None, leave=False):
        image = field(item, "id" if "id" in (item or ()) else "image_id", path)
        yield image, field(item, key, f"{path}, image {image}", list), f"{path}, image {image}"


def vg_box(record, where, names=("x", "y", "width", "height")):
    return [field(record, name, where, NUMBER) for name in names]


def corpus_vg(data, split, out):
    """Visual Genome's region descriptions; validation: the images that are in Karpathy's COCO val."""
    images = vg_images(data)
    judged = {i["cocoid"] for i in karpathy_images(data, "coco")[0] if i["split"] == "val"}
    also = {n for n, i in images.items() if i.get("coco_id") in out.coco or str(i.get("flickr_id")) in out.photos}
    wanted = {n for n, i in images.items() if i.get("coco_id") in judged} if split == "val" else set(images) - also
    texts = [Text(str(image), " ".join(field(r, "phrase", where, str).split()), str(r.get("region_id")))
             for image, regions, where in vg_items(data, "region_descriptions", "regions") if image in wanted for r in regions]
    return texts, {} if split == "val" else {"images held out": len(also)}


def corpus_cc3m(data, split, out):
    """Conceptual Captions: caption, address. Image id = line number from 0, as UNITER's; many addresses are dead."""
    path = Path(data) / "cc3m" / {"train": "Train_GCC-training.tsv", "val": "Validation_GCC-1.1.0-Validation.tsv"}[split]
    return web_captions(path, "caption and address", 0, out)


def corpus_cc12m(data, split, out):
    """Conceptual 12M: address, caption, the other way round. Image id = line number from 0; the last hundredth is for validation."""
    texts, told = web_captions(Path(data) / "cc12m" / "cc12m.tsv", "address and caption", 1, out)
    cut = len(texts) - max(1, len(texts) // 100)
    return (texts[:cut] if split == "train" else texts[cut:]), told


def vg_regions(data):
    """Yields (image, number, box x y w h) of Visual Genome's region descriptions, numbered within their image."""
    for image, regions, where in vg_items(data, "region_descriptions", "regions"):
        for k, r in enumerate(regions):
            yield str(image), k, tuple(vg_box(r, where))


def corpus_crops(data, split, out):
    """Visual Genome's regions, cut out, with their descriptions: things before scenes. Held out as corpus_vg."""
    texts, told = corpus_vg(data, split, out)
    number, numbered = Counter(), []
    for t in texts:
        numbered.append(t._replace(image=f"{t.image}/{number[t.image]}"))
        number[t.image] += 1
    images = vg_images(data)
    sound = {f"{name}/{k}" for name, k, box in vg_regions(data) if int(name) in images and clipped(*box, images[int(name)])}
    kept = [t for t in numbered if t.image in sound]
    return kept, told | {"regions left out: a box of no area": len(numbered) - len(kept)}


def web_captions(path, what, caption, out):
    rows = [line.split("\t") for line in read_text(path, f"web captions, {what} a line").split("\n") if line]
    bad = next((i for i, row in enumerate(rows) if len(row) != 2), None)
    if bad is not None:
        raise DataError(f"{path}, line {bad + 1} has {len(rows[bad])} columns: wanted 2, {what}\n  Fetch the file again.")
    twice = [photo_id(row[1 - caption]) in out.photos for row in rows]
    return [Text(str(i), row[caption], str(i)) for i, row in enumerate(rows) if not twice[i]], {"images held out, also in Flickr30k": sum(twice)}


def corpus_sbu(data, split, out):
    """SBU Captions: two files, line by line, or one JSON file. Image id = line number from 0; the last hundredth is for validation."""
    folder = Path(data) / "sbu"
    whole = folder / "sbu-captions-all.json"
    if whole.exists():
        record = read_json(whole, "SBU Captions")
        urls, said = field(record, "image_urls", whole), field(record, "captions", whole)
    else:
        urls, said = (read_text(folder / f"SBU_captioned_photo_dataset_{n}.txt", "SBU Captions, one a line").rstrip("\n").split("\n") for n in ("urls", "captions"))
    if len(urls) != len(said):
        raise DataError(f"{folder}: {len(urls):,} addresses and {len(said):,} captions\n  Wanted: as many of either. Fetch both files again.")
    cut = len(urls) - max(10, len(urls) // 100)
    wanted = range(cut) if split == "train" else range(cut, len(urls))
    twice = {i for i in wanted if photo_id(urls[i]) in out.photos}
    return [Text(str(i), said[i].strip(), str(i)) for i in wanted if i not in twice], {"images held out, also in Flickr30k": len(twice)}


CORPORA = {                                         # reader, region store of train and of val
    "coco": (corpus_coco, "coco", "coco"), "vg": (corpus_vg, "vg", "vg"), "cc3m": (corpus_cc3m, "cc3m_train", "cc3m_val"), "sbu": (corpus_sbu, "sbu", "sbu"),
    "cc12m": (corpus_cc12m, "cc12m", "cc12m"), "crops": (corpus_crops, "vg_crops", "vg_crops"),
}

# -------------------------------------------------------------------------------------- downstream (UNITER table 3)

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = dict(zip("none zero one two three four five six seven eight nine ten".split(), "0 0 1 2 3 4 5 6 7 8 9 10".split()))
CONTRACTIONS = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd
how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've
should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
y'all'll y'all'd've you'd you'd've you'll you're you've""".split()
RESTORE = {c[:i] + c[i + 1:]: c for c in CONTRACTIONS for i, letter in enumerate(c) if letter == "'"} | {"somebody'd": "somebodyd"}


def normalise_answer(text):
    """The official VQA evaluation's clean-up: punctuation, lower case, numbers, articles, contractions; its slips are kept."""
    out, comma = text, re.search(r"[0-9],[0-9]", text)
    for p in PUNCTUATION:
        out = out.replace(p, "" if f"{p} " in text or f" {p}" in text or comma else " ")
    out = re.sub(r"\.(?![0-9])", "", out, count=32)                 # the official flag sits where the count belongs: 32
    words = [NUMBERS.get(w, w) for w in out.lower().split()]
    return " ".join(RESTORE.get(w, w) for w in words if w not in ("a", "an", "the"))


class Answers(NamedTuple):
    said: list                                      # ten people's answers, as they wrote them
    question_type: str
    answer_type: str


def vqa(data, split):
    """VQA v2 questions; target = Answers. split: train2014, val2014, test-dev2015, test2015 (no answers)."""
    folder, images = Path(data) / "vqa2", split.replace("test-dev", "test")
    path, known = folder / f"v2_OpenEnded_mscoco_{split}_questions.json", {}
    if not split.startswith("test"):
        notes = folder / f"v2_mscoco_{split}_annotations.json"
        for a in field(read_json(notes, "VQA v2's answers"), "annotations", notes):
            known[field(a, "question_id", notes)] = Answers([field(x, "answer", notes) for x in field(a, "answers", notes)], a.get("question_type", ""), a.get("answer_type", ""))
    texts = [Text(f"COCO_{images}_{field(q, 'image_id', path, int):012d}", field(q, "question", path, str), str(field(q, "question_id", path)), known.get(q["question_id"]))
             for q in field(read_json(path, "VQA v2's questions"), "questions", path)]
    return texts, {"questions without annotations": sum(t.target is None for t in texts)} if known else {}


def answer_list(data, minimum=9):
    """The answers that a VQA model tells apart: trainval_label2ans.json if it is there, else by the published rule: the normalised
    most common answers of at least 9 questions of train2014 and val2014, sorted (3,129 in VQA v2)."""
    path = Path(data) / "vqa2" / "trainval_label2ans.json"
    if path.exists() or Path(f"{path}.gz").exists():
        return read_json(path, "the list of answers")
    count = Counter()
    for split in ("train2014", "val2014"):
        notes = Path(data) / "vqa2" / f"v2_mscoco_{split}_annotations.json"
        count.update(normalise_answer(field(a, "multiple_choice_answer", notes)) for a in field(read_json(notes, "VQA v2's answers"), "annotations", notes))
    return sorted(answer for answer, n in count.items() if n >= minimum)


def soft_target(said, index):
    """{answer's number: score} of ten answers: 0.3, 0.6, 0.9, 1 for one, two, three, more people."""
    count = Counter(normalise_answer(a) for a in said)
    return {index[a]: min(1.0, 0.3 * n) for a, n in count.items() if a in index}


def vg_questions(data, index, own=False, out=()):
    """Visual Genome's questions whose answer is in the list; target = {answer's number: 1}.

    VQA's augmentation: about COCO images, by COCO's names. own: about all images but those in `out`, by Visual Genome's ids
    """
    images = vg_images(data)
    stem = {} if own else {i["cocoid"]: Path(i["filename"]).stem for i in karpathy_images(data, "coco")[0]}
    texts, every = [], 0
    for number, questions, where in vg_items(data, "question_answers", "qas"):
        image = str(number) * (str(number) not in out) if own else stem.get(images[number].get("coco_id"))
        for q in questions:
            every += 1
            field(q, "answer", where, str)
            if image and (answer := vg_answer(q)) in index:
                texts.append(Text(image, field(q, "question", where, str), f"vg{q.get('qa_id')}", {index[answer]: 1.0}))
    return texts, {"Visual Genome questions left out: image not in COCO, or held out, or answer not in the list": every - len(texts)}


VCR_WORDS = [f"person_{i}" for i in range(81)]      # words of their own behind the vocabulary [authors' code]


def vcr(data, split, part="qa", choices=True):
    """VCR's questions; a text is one choice, four of a question follow each other; target = the right one's number, None in test.

    part     "qa": question, answer choice; "qar": question, right answer, rationale choice; "all": with each of the four answers, 16 texts
    choices  False: only the right one (second-stage pre-training)
    segments have types 0 question, 2 answer, 3 rationale; a tag becomes person_<number of the detection> or its class [authors' code]
    """
    path, texts, told = Path(data) / "vcr1" / f"{split}.jsonl", [], {"tags that point past the boxes, read as [UNK]": 0}
    for record in read_json_lines(path, "VCR's annotations"):
        where = f"{path}, {record.get('annot_id')}"
        objects, image = field(record, "objects", where), Path(field(record, "img_fn", where)).stem

        def spoken(tokens):
            words = []
            for token in tokens:
                for tag in token if isinstance(token, list) else ():
                    past = not 0 <= tag < len(objects)
                    told["tags that point past the boxes, read as [UNK]"] += past
                    words.append("[UNK]" if past else objects[tag] if objects[tag] != "person" else VCR_WORDS[tag] if tag <= 80 else "person")
                words += [] if isinstance(token, list) else [token]
            return " ".join(words)

        question = (0, spoken(field(record, "question", where)))
        answers = [(2, spoken(a)) for a in field(record, "answer_choices", where)]
        right = record.get("answer_label")
        if part == "qa":
            rows, target = [(question, a) for a in answers], right
        else:
            reasons, target = [(3, spoken(r)) for r in field(record, "rationale_choices", where)], record.get("rationale_label")
            if part == "qar" and right is None:
                raise DataError(f"{where}: no answer_label\n  Wanted: train or val; the test set's rationales are scored for all four answers.")
            rows = [(question, a, r) for a in (answers if part == "all" else [answers[right]]) for r in reasons]
        if not choices:
            rows = [rows[target]]
        texts += [Text(image, row, f"{record.get('annot_id')}/{part}/{j}", target) for j, row in enumerate(rows)]
    return texts, told


class Nlvr2Example(NamedTuple):
    id: str                                         # split-set-pair-sentence
    text: str
    left: str
    right: str
    label: bool                                     # None where a test set has none


def nlvr2(data, split):
    """NLVR2: train, dev, test1, test2, or balanced/balanced_dev, unbalanced/unbalanced_test1 and so on."""
    path = Path(data) / "nlvr2" / f"{split}.json"
    out = []
    for e in read_json_lines(path, "NLVR2: clone lil-lab/nlvr, folder nlvr2/data"):
        name = field(e, "identifier", path)
        if name.count("-") != 3:
            raise DataError(f"{path}: identifier {name!r}, wanted split-set-pair-sentence\n  Fetch the file again.")
        images = name.rpartition("-")[0]
        out.append(Nlvr2Example(name, field(e, "sentence", path, str), f"{images}-img0", f"{images}-img1", truth(e, f"{path}, {name}")))
    return out


ENTAILMENT = "contradiction", "entailment", "neutral"               # UNITER's order


def snli_ve(data, split):
    """SNLI-VE: image and hypothesis; target = number in ENTAILMENT. split: train, dev, test."""
    path, texts, odd = Path(data) / "snli_ve" / f"snli_ve_{split}.jsonl", [], 0
    for e in read_json_lines(path, "SNLI-VE's pairs"):
        image = str(e["Flikr30kID"] if "Flikr30kID" in e else field(e, "Flickr30K_ID", path)).removesuffix(".jpg")
        label = field(e, "gold_label", path)
        if label not in (*ENTAILMENT, "-"):
            raise DataError(f"{path}, {e.get('pairID')}: label {label!r}, wanted one of {', '.join(ENTAILMENT)} or -")
        odd += label == "-"
        if label != "-":
            texts.append(Text(image, field(e, "sentence2", path, str), str(e.get("pairID")), ENTAILMENT.index(label)))
    return texts, {"pairs left out: label '-', the annotators disagree": odd}


REFER = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd"}    # whose split


def refs(data, name):
    path = Path(data) / "refer" / name / f"refs({REFER[name]}).p"
    return read_pickle(path, f"{name}'s expressions")


def referring(data, name, split):
    """RefCOCO, RefCOCO+, RefCOCOg; a text is one sentence; target = the box of what it means, x y w h in pixels.

    split: train, val, testA, testB (refcocog: test). Reads refs(...).p and instances.json; where they are not, phraseloceval's
    annotation_<split>.json, which holds the same sentences and boxes.
    """
    folder = Path(data) / "refer" / name
    phrases = folder / f"annotation_{split}.json"
    if phrases.exists() and not (folder / f"refs({REFER[name]}).p").exists():
        return [Text(Path(field(e, "imageName", phrases)).stem, " ".join(field(e, "phrase", phrases)), str(e.get("phraseId")), tuple(field(e, "box", phrases)))
                for e in read_json(phrases, "phraseloceval's annotations")], {}
    path = folder / "instances.json"
    boxes = {field(a, "id", path): tuple(field(a, "bbox", path)) for a in field(read_json(path, "COCO's instances"), "annotations", path)}
    texts, lost = [], 0
    for ref in refs(data, name):
        if field(ref, "split", folder) != split:
            continue
        if ref["ann_id"] not in boxes:
            lost += len(ref["sentences"])
            continue
        texts += [Text(f"COCO_train2014_{ref['image_id']:012d}", s["sent"], str(s["sent_id"]), boxes[ref["ann_id"]]) for s in ref["sentences"]]
    return texts, {"expressions whose object is not in instances.json": lost}


def iou(a, b):
    """Overlap over union of boxes x y w h, (..., 4) each.

    Right edge x + w - 1, an overlap of one pixel counts as none, areas are w h: UNITER's and ALBEF's evaluation code.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    corner = np.maximum(a[..., :2], b[..., :2])
    far = np.minimum(a[..., :2] + a[..., 2:] - 1, b[..., :2] + b[..., 2:] - 1)
    inter = np.where((far > corner).all(-1), (far - corner + 1).prod(-1), 0.0)
    return inter / (a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - inter)


# ----------------------------------------------------------------- words that point at boxes (Kervadec et al., MAF)

def joined_descriptions(data, out=()):
    """Visual Genome's region descriptions in sentences of one, two or three, joined by "and", with their boxes.      Kervadec sec. 6.1

    Which are joined is a function of the image's id. out: ids of images left out
    """
    images, texts, told = vg_images(data), [], Counter()
    for image, regions, where in vg_items(data, "region_descriptions", "regions"):
        if image not in images or str(image) in out:
            told["descriptions left out: image held out"] += len(regions)
            continue
        rng, said = np.random.default_rng(int(image)), []
        for r in regions:
            box, words = clipped(*vg_box(r, where), images[image]), field(r, "phrase", where, str).strip(" .\n").split()
            told["pointers left out: a box of no area"] += box is None
            if words:
                said.append((words, box))
        rng.shuffle(said)
        while said:
            some, said = said[:(n := int(rng.integers(1, 4)))], said[n:]
            words, pointers = [], []
            for one, box in some:
                words += (["and"] if words else [])
                pointers += [(len(words), len(words) + len(one), box)] if box else []
                words += one
            texts.append(Text(str(image), " ".join(words), f"vg{image}/{len(texts)}", None, tuple(pointers)))
    return texts, told


def clipped(x, y, w, h, image):
    """x y w h of a box -> x1 y1 x2 y2 inside its image, None if nothing is left of it."""
    x1, y1, x2, y2 = max(0, x), max(0, y), min(x + w, image["width"]), min(y + h, image["height"])
    return (x1, y1, x2, y2) if x2 > x1 and y2 > y1 else None


def gqa_records(data, split):
    """GQA's {question id: record} as published; "train_all" is a folder of ten files."""
    folder = Path(data) / "gqa"
    path = folder / f"{split}_questions.json"
    chunks = [folder / "train_all_questions" / f"train_all_questions_{i}.json" for i in range(10)] if split == "train_all" and not path.exists() else [path]
    found = {}
    for chunk in chunks:
        found |= read_json(chunk, "GQA's questions")
    return found


def gqa(data, split):
    """GQA's questions; target = the answer, None in test. split: train_balanced, val_all, testdev_all, ...

    Where the split has scene graphs, the question's words point at the boxes of the objects they mean.
    """
    path, texts, told = Path(data) / "gqa" / f"{split}_questions.json", [], Counter()
    graphs = Path(data) / "gqa" / f"{split.split('_')[0]}_sceneGraphs.json"
    scenes = read_json(graphs, "GQA's scene graphs") if graphs.exists() or Path(f"{graphs}.gz").exists() else None
    for name, q in gqa_records(data, split).items():
        where, pointers = f"{path}, question {name}", []
        image, text = field(q, "imageId", where), field(q, "question", where, str)
        for span, thing in q.get("annotations", {}).get("question", {}).items() if scenes is not None else ():
            graph = scenes.get(image, {"objects": {}})
            o = graph["objects"].get(thing)
            box = o and clipped(o["x"], o["y"], o["w"], o["h"], graph)
            first, _, end = span.partition(":")
            told["pointers left out: object not in the scene graph"] += o is None
            told["pointers left out: a box of no area"] += o is not None and box is None
            pointers += [(int(first), int(end or int(first) + 1), box)] if box else []
        texts.append(Text(image, text, name, q.get("answer"), tuple(pointers)))
    return texts, told


def gqa_answers(data):
    """GQA's answers: trainval_label2ans.json if it is there, else every answer of the balanced train and val questions (1,842)."""
    path = Path(data) / "gqa" / "trainval_label2ans.json"
    if path.exists():
        return read_json(path, "the list of answers")
    return sorted({q["answer"] for split in ("train_balanced", "val_balanced") for q in gqa_records(data, split).values()})


def all_answers(data, minimum=9):
    """The answers of two-stream pre-training: lxmert/all_ans.json if it is there (9,500), else VQA's list, GQA's, and what Visual Genome's
    questions are answered with at least `minimum` times."""
    path = Path(data) / "lxmert" / "all_ans.json"
    if path.exists():
        return [a["ans"] for a in read_json(path, "LXMERT's answers")]
    count = Counter(vg_answer(q) for item in read_json(Path(data) / "vg" / "question_answers.json", "Visual Genome's questions") for q in item["qas"])
    return sorted({*answer_list(data), *gqa_answers(data), *(a for a, n in count.items() if n >= minimum)})


def vg_answer(q):
    return normalise_answer(q["answer"].rstrip("."))


class Phrase(NamedTuple):
    words: str
    chain: str                                      # which thing it names; the same in all captions of an image
    kinds: tuple                                    # people, clothing, ...
    first: int                                      # number of its first word in the caption


class Grounding(NamedTuple):
    image: str
    text: str                                       # the caption without its marks
    id: str                                         # image#number, from 0
    phrases: list
    boxes: dict                                     # {chain: [box, ...]}, x1 y1 x2 y2 pixels, counted from 0


def entities(data, split):
    """Flickr30k Entities: captions with phrases, and the boxes of what they name. split: train, val, test (the data set's own lists).

    Left out and counted: phrases that name nothing (EN#0), boxes of no area, and in training the captions listed as unrelated.
    A phrase of a scene, or without a box, stays; its chain has no boxes.
    """
    root, told, out = Path(data) / "flickr30k_entities", Counter(), []
    unrelated = {tuple(line.split()[:2]) for line in read_text(root / "UNRELATED_CAPTIONS", "Flickr30k Entities").splitlines() if line and line[0] != "#"}
    for image in tqdm(read_text(root / f"{split}.txt", "Flickr30k Entities' list of images").split(), desc=f"entities {split}", disable=None, leave=False):
        boxes = entity_boxes(root / "Annotations" / f"{image}.xml", told)
        path = root / "Sentences" / f"{image}.txt"
        for k, line in enumerate(read_text(path, "Flickr30k Entities' sentences").splitlines()):
            if split == "train" and (image, str(k + 1)) in unrelated:
                told["captions left out: they do not belong to their image"] += 1
                continue
            words, phrases = [], []
            for part in re.split(r"(\[/EN#[^\]\[]*\])", line):
                mark = re.fullmatch(r"\[/EN#(\d+)/(\S+) ([^\]]*)\]", part)
                if not mark and ("[/EN" in part or "]" in part and "[" not in part):
                    raise DataError(f"{path}, line {k + 1}: brackets that do not close: {line[:90]!r}\n  Wanted: [/EN#chain/type words]. Fetch the file again.")
                if mark and mark[1] != "0":
                    phrases.append(Phrase(mark[3], mark[1], tuple(mark[2].split("/")), len(words)))
                told["phrases that name nothing (EN#0)"] += bool(mark and mark[1] == "0")
                words += (mark[3] if mark else part).split()
            told["phrases without a box"] += sum(p.chain not in boxes for p in phrases)
            out.append(Grounding(image, " ".join(words), f"{image}#{k}", phrases, boxes))
    return out, told


def entity_boxes(path, told):
    """{chain: boxes} of one annotation file; its boxes are inclusive and counted from 1."""
    try:
        tree = xml.etree.ElementTree.fromstring(read_text(path, "Flickr30k Entities' boxes"))
        boxes = {}
        for thing in tree.iter("object"):
            box = thing.find("bndbox")
            if box is None:                         # a scene, or not to be boxed
                continue
            x1, y1, x2, y2 = (int(box.find(name).text) for name in ("xmin", "ymin", "xmax", "ymax"))
            if x2 < x1 or y2 < y1:
                told["boxes of no area"] += 1
                continue
            for name in thing.iter("name"):
                boxes.setdefault(name.text, []).append((x1 - 1, y1 - 1, x2, y2))
        return boxes
    except (xml.etree.ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{path} is no annotation of Flickr30k Entities: {error}\n  Fetch the file again.") from None


def glove_file(data):
    """GloVe's text file in DATA/glove: 6B or 840B, of 300 numbers."""
    for name in ("glove.6B.300d.txt", "glove.840B.300d.txt"):
        if (path := Path(data) / "glove" / name).exists():
            return path
    raise DataError(f"{Path(data) / 'glove'} holds neither glove.6B.300d.txt nor glove.840B.300d.txt\n  Fetch one from GloVe's page, nlp.stanford.edu/projects/glove.")


def glove(path, words):
    """Vectors of these words: {word: (d,) float32}, in one pass that keeps no other line. Words without a vector are absent.

    A token may hold blanks (840B has ". . ."); of a word that comes twice the first counts.
    """
    wanted, found, d = {w.encode(): w for w in words}, {}, None
    with open(need(path, "GloVe's vectors", "Fetch them from GloVe's page."), "rb", buffering=1 << 22) as file:
        bar = tqdm(total=os.path.getsize(path), desc=Path(path).name, unit="B", unit_scale=True, disable=None, leave=False)
        for number, line in enumerate(file, 1):
            blanks = line.count(b" ")
            d = d or blanks
            if blanks < d:
                raise DataError(f"{path}, line {number}: {blanks} numbers where the first line has {d}\n  Most often a download that stopped half way: fetch it again.")
            if number % 50_000 == 0:
                bar.update(file.tell() - bar.n)
            word = wanted.get(line[:line.index(b" ")])
            if word is None or word in found or blanks > d:        # more blanks: a token of several words, which nobody asks for
                continue
            try:
                found[word] = np.array(line.split()[1:], np.float32)
            except ValueError:
                raise DataError(f"{path}, line {number}: {line[:60]!r}... holds something that is no number\n  Fetch the file again.") from None
        bar.close()
    return found


def names_of(data, what):
    """Class or attribute names of the detector: objects_vocab.txt, attributes_vocab.txt; of aliases ("road,street") the first."""
    path = Path(data) / "vg" / f"{what}_vocab.txt"
    return [line.split(",")[0].strip() for line in read_text(path, "the detector's names, one a line (bottom-up attention's repository)").rstrip("\n").split("\n")]


def bare(word):
    """A word as GloVe knows it: lower case, without the punctuation around it."""
    return word.lower().strip("".join(c for c in map(chr, range(33, 127)) if not c.isalnum()))


# --------------------------------------------------------------------------------- pictures and boxes, without a detector (AMC)

def clean_caption(text, words=30):
    """As ALBEF and AMC clean captions: lower case, no punctuation, hyphens and slashes opened, so many words."""
    text = re.sub(r"[,.'!?\"()*#:;~]", "", text.lower()).replace("-", " ").replace("/", " ").replace("<person>", "person")
    return " ".join(text.split()[:words])


def vg_triplets(data, kinds=("box", "region"), smallest=0.08, out=()):
    """Visual Genome as (image, text, box), the target of each Text being its boxes.                                    AMC sec. 4.1

    region   region descriptions
    box      objects with their attributes, "brown dog", and prompts of place where several objects of an image have one name: the leftmost
             "dog on the left", the rightmost, "top dog", "bottom dog"; in a corner of the image (both coordinates of its middle in
             the outer thirds) "dog at the top left", ...
    smallest boxes below this share of their image are dropped and counted;  out: ids of images left out
    """
    images, told, texts = vg_images(data), Counter(), []

    def add(image, text, corners, kind):
        record, box = images[image], clipped(*corners, images[image])
        if box is None or (box[2] - box[0]) * (box[3] - box[1]) < smallest * record["width"] * record["height"]:
            told["boxes left out: " + ("outside their image, or of no area" if box is None else "too small")] += 1
            return
        told[f"texts: {kind}"] += 1
        texts.append(Text(str(image), text, f"vg{image}/{kind}/{len(texts)}", (tuple(v / record[side] for v, side in zip(box, ("width", "height") * 2)),)))

    def items(name, key):
        return (item for item in vg_items(data, name, key) if item[0] in images and str(item[0]) not in out)
    if "region" in kinds:
        for image, regions, where in items("region_descriptions", "regions"):
            for r in regions:
                add(image, " ".join(field(r, "phrase", where, str).split()), vg_box(r, where), "region descriptions")
    if "box" in kinds:
        for image, objects, where in items("attributes", "attributes"):
            named = {}
            for o in objects:
                name, corners = field(o, "names", where, list)[0], vg_box(o, where, "xywh")
                named.setdefault(name, []).append(corners)
                for attribute in o.get("attributes") or [""]:
                    add(image, f"{attribute} {name}".strip(), corners, "objects with attributes" if attribute else "objects")
            for name, found in named.items():
                if len(found) > 1:
                    for text, corners in places(name, found, images[image]):
                        add(image, text, corners, "prompts of place")
    return texts, dict(told)


def places(name, found, image):
    """Prompts of place for boxes x y w h of one name: [(text, box)]"""
    middle = np.array([(x + w / 2, y + h / 2) for x, y, w, h in found]) / [image["width"], image["height"]]
    (left, top), (right, bottom) = middle.argmin(axis=0), middle.argmax(axis=0)
    said = [(f"{name} on the left", left), (f"{name} on the right", right), (f"top {name}", top), (f"bottom {name}", bottom)]
    for i, (x, y) in enumerate(middle):
        row, column = "top" if y < 1 / 3 else "bottom" if y > 2 / 3 else "", "left" if x < 1 / 3 else "right" if x > 2 / 3 else ""
        said += [(f"{name} at the {row} {column}", i)] if row and column else []
    return [(text, found[i]) for text, i in said]


def referit(data, split="test_10k"):
    """RefCLEF ("ReferIt") as AMC prepared it: refclef_<split>_unique.json of {image, text, bbox: x y w h}; val_1k, test_10k.

    Target = its box, x y w h pixels. Where the two corners are given instead is not known of the file: a box that leaves its image is an error
    of evaluate.py.
    """
    path = Path(data) / "refclef" / f"refclef_{split}_unique.json"
    return [Text(Path(field(r, "image", path)).stem, field(r, "text", path), str(i), tuple(field(r, "bbox", path)))
            for i, r in enumerate(read_json(path, "RefCLEF as AMC prepared it"))], {}


# 5. Pairs ----------------------------------------------------------------------------------------------------------

class Pairs:
    """Texts as ids, their images' regions, and which belongs to which.

    tokens   int32, all texts one after the other, each [CLS] ... [SEP]; text i is tokens[starts[i]:starts[i+1]]
    types    the same for rows of the type table, None if all are 0; where a text comes in segments (VCR), each [SEP] but the last
             opens the next segment and has its type [authors' code]
    image    (texts,) index of each text's image in the store
    images   the images that have texts here: negatives are drawn among them
    skip_missing   leave texts out whose image has no features, and count them; else they are an error
    ends     each text closes with [SEP]; ALBEF's do not
    """
    def __init__(self, texts, store, tokenizer, max_words=60, name="", skip_missing=False, ends=True):
        self.store, self.tokenizer, self.name, self.ends = store, tokenizer, name, ends
        missing = [c for c in texts if c.image not in store.index]
        if missing and not skip_missing:
            raise DataError(f"{name}: image {missing[0].image} has captions but no features in {store.folder} "
                            f"({len(missing):,} of {len(texts):,} captions)\n  Wanted: features of every image that has captions.\n"
                            "  Pack the missing features, or go on without these captions: --skip-missing")
        texts = [c for c in texts if c.image in store.index] if missing else texts
        if not texts:
            raise DataError(f"{name}: no captions left that have features in {store.folder}\n  Check --data and the split's name.")
        self.texts, flat, types, starts, points, self.pointed_words = texts, [], [], [0], [], {}
        self.dropped, self.cut, self.empty = len(missing), 0, 0
        for c in tqdm(texts, desc=f"tokenize {name}", disable=None if len(texts) > 50_000 else True, leave=False):
            if c.pointers:
                ids = self.point(c, tokenizer, max_words, len(flat), points)
            elif isinstance(c.text, str):
                ids = tokenizer(c.text)
            else:
                ids, kinds = [], [0]
                for kind, words in c.text:
                    new = ([tokenizer.sep] if ids else []) + tokenizer(words)
                    ids += new
                    kinds += [kind] * len(new)
                types += [*kinds[:max_words + 1], kinds[min(len(ids), max_words)]]
            self.cut += len(ids) > max_words
            self.empty += not ids
            flat += [tokenizer.cls, *ids[:max_words], *([tokenizer.sep] if ends else [])]
            starts.append(len(flat))
        self.tokens, self.starts, self.types = np.array(flat, np.int32), np.array(starts), np.array(types, np.int8) if types else None
        self.n_words = np.diff(self.starts)
        self.pointed = np.array([p[:2] for p in points], np.int64).reshape(-1, 2)       # place in tokens, number of the word
        self.pointed_box = np.array([p[2] for p in points], np.float32).reshape(-1, 4)
        self.image = np.array([store.index[c.image] for c in texts])
        self.images = np.unique(self.image)

    def point(self, text, tokenizer, max_words, start, points):
        """Ids of a text with pointers, word by word; every piece of a pointed word becomes a row of points: place, word, box."""
        ids, words = [], text.text.split()
        spans = [[(box, first <= i < end) for first, end, box in text.pointers] for i in range(len(words))]
        for word, boxes in zip(words, spans):
            pieces = tokenizer(word)
            number = self.pointed_words.setdefault(bare(word), len(self.pointed_words)) if any(here for _, here in boxes) else -1
            points += [(start + 1 + len(ids) + j, number, box) for j in range(len(pieces)) if len(ids) + j < max_words for box, here in boxes if here]
            ids += pieces
        return ids

    def pointers(self, captions):
        """Pointed words of these captions: places in B*N_L (K,), numbers of the words (K,), boxes (K, 4), rows (K,)"""
        first, end = np.searchsorted(self.pointed[:, 0], self.starts[captions]), np.searchsorted(self.pointed[:, 0], self.starts[captions] + self.n_words[captions])
        row = np.repeat(np.arange(len(captions)), end - first)
        which = np.concatenate([np.arange(a, b) for a, b in zip(first, end)]) if len(row) else np.zeros(0, np.int64)
        place = row * self.n_words[captions].max(initial=0) + self.pointed[which, 0] - self.starts[captions][row]
        return place, self.pointed[which, 1], self.pointed_box[which], row

    def __str__(self):
        notes = [f"{n:,} texts {what}" for n, what in ((self.dropped, "left out: no features"), (self.cut, "cut: too long"),
                                                          (self.empty, "empty")) if n]
        return f"{self.name}: {len(self.texts):,} texts, {len(self.images):,} images" + "".join(f", {n}" for n in notes)

    def text(self, captions, column="tokens"):
        """(B, N_L) int64 ids (or types) and the mask"""
        n, source = self.n_words[captions], getattr(self, column)
        mask = real_first(n, n.max(initial=0))
        out = np.full(mask.shape, self.tokenizer.pad if column == "tokens" else 0, np.int64)
        out[mask] = np.concatenate([source[self.starts[c]:self.starts[c] + k] for c, k in zip(captions, n)])
        return out, mask

    def length(self, captions, images):
        return self.n_words[captions] + self.store.n_regions[images]

    def batch(self, captions, images, text=None):
        """The model's input for these pairs (two index arrays of equal length); text = ids to use instead, e.g. masked ones."""
        ids, text_mask = self.text(captions)
        n = self.store.n_regions[images]
        t = torch.from_numpy
        batch = {"text": t(ids if text is None else text), "text_mask": t(text_mask), "regions": t(self.store.read(images)),
                 "boxes": t(self.store.relative_boxes(images)), "region_mask": t(real_first(n)),
                 "length": int(self.length(captions, images).max())}
        if self.types is not None:
            batch["text_type"] = t(self.text(captions, "types")[0])
        if isinstance(self.store, JoinedStore):
            batch["region_type"] = t(self.store.region_types(images))
        return batch

    def names(self, captions, images):
        return [f"caption {self.texts[c].id} with image {self.store.image_ids[i]}" for c, i in zip(captions, images)]

    def in_chunks(self, captions, images, units):
        """Batches of similar length for scoring many pairs: yields (places in the list, batch)."""
        length = self.length(captions, images)
        order = np.argsort(length, kind="stable")
        for chunk in unit_batches(length[order], units):
            yield order[chunk], self.batch(captions[order[chunk]], images[order[chunk]])


# 6. Batches --------------------------------------------------------------------------------------------------------

def unit_batches(lengths, units):
    """Cut a run of rising lengths into batches of at most `units` positions, padding counted: index arrays."""
    batches, start = [], 0
    while start < len(lengths):
        most = max(1, int(units // lengths[start]))
        ahead = lengths[start:start + most]
        n = max(1, int((ahead * np.arange(1, len(ahead) + 1) <= units).sum()))
        batches.append(np.arange(start, start + n))
        start += n
    return batches


HARDEST = 20                                        # mined negatives kept of each caption and image [UNITER sec. A.2]
BUCKET = 8192                                       # pairs sorted by length together [UNITER's code]
STREAMS = {"mlm": 1, "mrfr": 2, "mrc": 3, "mrckl": 4, "itm": 5, "rank": 6, "nlvr": 7, "vqa": 8, "vcr": 9, "nlvr2": 10, "ve": 11, "re": 12, "gqa": 14,
           "together": 15, "maf": 16, "albef": 17}


class PairBatches:
    """Batches of one pre-training task on one data set. Batch k is a function of (seed, k) alone: any process can make any batch.

    units        positions (words + regions, padding counted) of a batch over all processes
    part, parts  this process takes every parts-th pair of it
    labels       of the captions, for tasks that have them (NLVR): they take the place of "match"
    joint        mask words and regions of a pair at once; else one of them, the other is whole              UNITER sec. 3.1, A.3
    corpus       number of the data set in the mix, so that each has random numbers of its own
    [k]          "input" for the model, what the task predicts, and "names" of the samples (none: nothing of it is this process's);
                 itm, of pictures whose texts have boxes: "boxed" (M,) matched rows, "region" (M, R, R) bool, what the text describes
    """
    def __init__(self, pairs, task, units, seed, part=0, parts=1, mask_rate=0.15, labels=None, joint=False, corpus=0):
        self.pairs, self.task, self.units, self.seed = pairs, task, units, seed
        self.part, self.parts, self.mask_rate, self.labels, self.joint, self.corpus = part, parts, mask_rate, labels, joint, corpus
        self.epoch, self.first, self.batches = -1, 0, []            # the epoch at hand and its first batch's number
        self.boxes = [t.target for t in pairs.texts] if task in ("itm", "albef") and isinstance(pairs.store, PatchStore) else []
        self.boxed = any(self.boxes)

    def rng(self, *numbers):
        return np.random.default_rng([self.seed, STREAMS[self.task] + 100 * self.corpus, *numbers])

    def items(self, rng):
        """One epoch's pairs: (captions, images, match)."""
        captions = rng.permutation(len(self.pairs.texts))
        images, match = self.pairs.image[captions], np.ones(len(captions), bool) if self.labels is None else self.labels[captions]
        if self.task == "itm":                                      # half of them: another image or another caption
            match = rng.random(len(captions)) < 0.5
            swap_image = rng.random(len(captions)) < 0.5
            images = np.where(match | ~swap_image, images, other(rng, self.pairs.images, images))
            captions = np.where(match | swap_image, captions, other_caption(rng, self.pairs, images))
        return captions, images, match

    def cost(self, captions, images):
        return self.pairs.length(captions, images)

    def plan(self, epoch):
        """All batches of an epoch: pairs of similar length together, batches in random order."""
        rng = self.rng(epoch)
        items = self.items(rng)
        batches, cost = [], self.cost(*items[:2])
        for start in range(0, len(cost), BUCKET):
            some = slice(start, start + BUCKET)
            order = start + np.lexsort([self.pairs.n_words[items[0][some]], cost[some]])
            batches += [order[b] for b in unit_batches(cost[order], self.units)]
        return [tuple(column[batches[i]] for column in items) for i in rng.permutation(len(batches))]

    def whole(self, k):
        """Batch k before it is shared out among the processes."""
        if k < self.first:
            self.epoch, self.first, self.batches = -1, 0, []
        while k >= self.first + len(self.batches):
            self.first += len(self.batches)
            self.epoch += 1
            self.batches = self.plan(self.epoch)
        return self.batches[k - self.first]

    def __getitem__(self, k):
        captions, images, match = self.whole(k)
        rng, mine, regions = self.rng(k, 1), slice(self.part, None, self.parts), self.task in ("mrfr", "mrc", "mrckl")
        hidden_words = self.hide_words(rng, captions) if self.task == "mlm" or self.joint and regions else None
        hidden_regions = self.hide(rng, real_first(self.pairs.store.n_regions[images])) if regions or self.joint and self.task == "mlm" else None
        luck = rng.random(len(captions))[mine] if self.boxed else None
        captions, images = captions[mine], images[mine]
        batch = {"task": self.task, "names": self.pairs.names(captions, images), "match": torch.from_numpy(match[mine])}
        if not len(captions):                       # a batch of fewer pairs than processes
            return batch
        text = None
        if hidden_words is not None:
            text, real = self.pairs.text(captions)
            hidden, new = (m[mine, :text.shape[1]] for m in hidden_words)
            hidden = hidden & real
            if self.task == "mlm":
                batch["masked_words"] = torch.from_numpy(np.flatnonzero(hidden))
                batch["word_targets"] = torch.from_numpy(text[hidden])
            text = np.where(hidden & (new >= 0), new, text)
        batch["input"] = self.pairs.batch(captions, images, text)
        if hidden_regions is not None:
            hidden = hidden_regions[mine, :batch["input"]["regions"].shape[1]]
            batch["masked_regions" if regions else "hidden_regions"] = torch.from_numpy(np.flatnonzero(hidden))
            if self.task in ("mrc", "mrckl"):
                batch["region_probs"] = torch.from_numpy(self.pairs.store.read(images, "cls_prob")[hidden])
        return batch if luck is None else batch | self.described(captions, np.flatnonzero(match[mine]), luck)

    def described(self, captions, rows, luck, flip=()):
        """Of these rows, those whose text has boxes, and one box of each, which luck (B,) chooses; flip (B,): in a mirrored picture."""
        R, rows = self.pairs.store.patches.resolution, [r for r in rows if self.boxes[captions[r]]]
        masks = [box_mask(boxes[int(luck[r] * len(boxes))], R, bool(len(flip)) and flip[r]) for r in rows for boxes in [self.boxes[captions[r]]]]
        return {"boxed": torch.tensor(rows, dtype=torch.int64), "region": torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, R, R, dtype=torch.bool)}

    # Masks are drawn for all processes at once, so that any number of them sees the same.

    def hide(self, rng, may):
        """Which of the places that may be hidden are: (B, N) bool, at least one in each row that has any."""
        draw = np.where(may, rng.random(may.shape), 2.0)
        return (draw < self.mask_rate) | ((draw == draw.min(axis=1, keepdims=True)) & may)

    def hide_words(self, rng, captions):
        """Which words to hide (B, N) bool, and what stands there instead, an id or -1 for the word itself.

        Of the hidden words 80 % become [MASK], 10 % another word, 10 % stay; [CLS] and [SEP] are never hidden.  UNITER fn. 7
        """
        n, ids = self.pairs.n_words[captions], self.pairs.tokenizer
        may = real_first(n - self.pairs.ends, n.max())
        may[:, 0] = False
        if self.pairs.types is not None:            # segments: a [SEP] inside
            may &= self.pairs.text(captions)[0] != ids.sep
        hidden, how = self.hide(rng, may), rng.random(may.shape)
        random_word = ids.ordinary[rng.integers(len(ids.ordinary), size=may.shape)]
        return hidden, np.where(how < 0.8, ids.mask, np.where(how < 0.9, random_word, -1))


def real_first(n, width=None):
    """(B, N) bool, True in the first n[b] places of row b."""
    return np.arange(max(n) if width is None else width)[None] < n[:, None]


def other(rng, pool, avoid):
    """One random member of pool (sorted, unique) for each entry of avoid, never that entry itself."""
    if len(pool) < 2:
        raise DataError("mismatched pairs need at least two images with captions; this split has one")
    here = np.searchsorted(pool, avoid).clip(max=len(pool) - 1)
    inside = pool[here] == avoid
    draw = rng.integers(len(pool) - inside)
    return pool[draw + (inside & (draw >= here))]


def other_caption(rng, pairs, images):
    """One random caption for each of these images that belongs to another image."""
    by_image = np.argsort(pairs.image, kind="stable")
    first = np.searchsorted(pairs.image[by_image], images)
    own = np.searchsorted(pairs.image[by_image], images, side="right") - first
    draw = rng.integers(len(by_image) - own)
    return by_image[draw + own * (draw >= first)]


class RankingBatches(PairBatches):
    """Groups of one matched pair and its mismatched ones, for the ranking loss.

    negatives   how many of each group are trained on
    candidates  0: the negatives are drawn at random. Else so many are drawn, to be scored by the model; the hardest are trained on
    mined       besides the random negatives one hard image and one hard caption, from the tables that remember() keeps
    alternate   even batches: a caption with other images; odd ones: an image with other captions (IAIS). Else half and half (UNITER)
    [k]         "positive": batch of the G matched pairs; "negatives": list of batches of similar length; "order": (G, K) their places
                in the list of all negatives; or "candidates" = (captions, images), both (G, candidates), from which choose() goes on
    """
    def __init__(self, pairs, units, seed, part=0, parts=1, negatives=2, candidates=0, alternate=False, mined=False):
        super().__init__(pairs, "rank", units, seed, part, parts)
        self.negatives, self.candidates, self.alternate, self.mined = negatives, candidates, alternate, mined

    def cost(self, captions, images):
        return self.pairs.length(captions, images) * (1 + self.negatives + 2 * self.mined)

    def __getitem__(self, k):
        captions, images, _ = self.whole(k)
        rng, mine = self.rng(k, 1), slice(self.part, None, self.parts)
        K = self.candidates or self.negatives
        with_images = (k % 2 == 0) * K if self.alternate else (K + 1) // 2
        wrong_captions = np.repeat(captions[:, None], K, 1)
        wrong_images = np.repeat(images[:, None], K, 1)
        for j in range(K):
            if j < with_images:
                wrong_images[:, j] = other(rng, self.pairs.images, images)
            else:
                wrong_captions[:, j] = other_caption(rng, self.pairs, images)
        pick = rng.integers(HARDEST, size=(2, len(captions)))[:, mine]
        captions, images, wrong_captions, wrong_images = (x[mine] for x in (captions, images, wrong_captions, wrong_images))
        batch = {"task": "rank", "names": self.pairs.names(captions, images), "anchor": ("text", "image")[k % 2] if self.alternate else "both",
                 "positive": self.pairs.batch(captions, images) if len(captions) else None}
        if not len(captions):
            return batch
        if self.candidates:
            return batch | {"candidates": (wrong_captions, wrong_images)}
        if self.mined:                              # the tables are with the model: with_hard() goes on there
            return batch | {"random": (captions, images, wrong_captions, wrong_images, pick)}
        return batch | self.choose(wrong_captions, wrong_images)

    def drawn(self, rng, n):
        """Captions and images to score in mining: n random other images for each caption, (T, n) twice.           UNITER sec. A.2"""
        captions = np.repeat(np.arange(len(self.pairs.texts))[:, None], n, 1)
        return captions, other(rng, self.pairs.images, self.pairs.image[captions.ravel()]).reshape(captions.shape)

    def remember(self, captions, images, scores):
        """Keep the HARDEST highest-scored images of each caption, and captions of each image (-1: none was drawn)."""
        self.hard_images = np.take_along_axis(images, np.argsort(-scores, axis=1, kind="stable")[:, np.arange(HARDEST) % scores.shape[1]], 1)
        order = np.lexsort([-scores.ravel(), images.ravel()])
        owner, first, n = np.unique(images.ravel()[order], return_index=True, return_counts=True)
        self.hard_captions = np.full((len(self.pairs.store.n_regions), HARDEST), -1)
        self.hard_captions[owner] = captions.ravel()[order][first[:, None] + np.arange(HARDEST) % n[:, None]]

    def with_hard(self, batch):
        captions, images, wrong_captions, wrong_images, pick = batch.pop("random")
        hard_caption = self.hard_captions[images, pick[0]]
        hard_caption = np.where(hard_caption < 0, wrong_captions[:, -1], hard_caption)
        return batch | self.choose(np.column_stack([wrong_captions, captions, hard_caption]),
                                   np.column_stack([wrong_images, self.hard_images[captions, pick[1]], images]))

    def choose(self, captions, images):
        """Batches of these negatives, (G, K) captions and images, shortest first, cut where padding would pass 3 %."""
        length = self.pairs.length(captions.ravel(), images.ravel())
        order = np.argsort(length, kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        cuts, start, rising = [], 0, length[order]
        for i in range(len(order)):
            if i - start >= 4 and rising[start:i + 1].sum() < 0.97 * rising[i] * (i + 1 - start):
                cuts.append(i)
                start = i
        return {"negatives": [self.pairs.batch(captions.ravel()[p], images.ravel()[p]) for p in np.split(order, cuts)],
                "order": torch.from_numpy(place.reshape(captions.shape))}


class Names:
    """What the detector calls regions, compared with words: cosines of GloVe vectors, made once; 0 where either has no vector.

    words  {word: number};   a name of several words ("traffic light") has the mean of their vectors
    """
    def __init__(self, words, data):
        classes, attributes = ([n.split() for n in names_of(data, what)] for what in ("objects", "attributes"))
        vectors = glove(glove_file(data), {*words, *(w for n in classes + attributes for w in n)})
        zero = np.zeros(len(next(iter(vectors.values()), np.zeros(1))), np.float32)
        mean = lambda parts: np.mean([vectors.get(w, zero) for w in parts], axis=0)
        unit = lambda rows: (x := np.stack(rows)) / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6)
        rows = unit([mean([w]) for w in words])
        self.tables = {"cls_id": (rows @ unit([mean(n) for n in classes]).T).astype(np.float16),
                       "attr_id": (rows @ unit([mean(n) for n in attributes]).T).astype(np.float16)}
        self.without = sum(w not in vectors for w in words)

    def similarity(self, words, ids, what):
        """(K, N_V) float32 of words (K,) and the regions' ids (K, N_V), -1 unknown; what: cls_id or attr_id"""
        table = self.tables[what]
        if ids.max(initial=-1) >= table.shape[1]:
            raise DataError(f"a region of {what} {ids.max()}, but only {table.shape[1]} names\n  Wanted: the vocabulary files of the detector that made the features.")
        return np.where(ids < 0, 0, table[words[:, None], ids.clip(min=0)]).astype(np.float32)


class TogetherBatches(PairBatches):
    """All of Kervadec's supervision in one batch, as LXMERT: masked words and regions, replaced images, answers, and pointers.

    answers    of each text {number: score}, or None where nobody asks
    names      Names for pairs.pointed_words;  align: losses.soft_alignment_target; both None: pointers are left alone
    [k]        besides "input": masked_words, word_targets; masked_regions with region_features, region_class, region_attribute;
               match; answered, answer (K,): rows asked about their own image, and the answer; aligned (K,) places in B*N_L of pointed words,
               alignment (K, N_V) soft targets, aligned_row (K,); "counts": over how many things the mean of each loss runs
    Of the masked regions 80 % show zeros, 10 % another region's feature, 10 % their own [LXMERT's code].
    """
    def __init__(self, pairs, units, seed, part=0, parts=1, mask_rate=0.15, corpus=0, answers=None, names=None, align=None):
        super().__init__(pairs, "together", units, seed, part, parts, mask_rate, corpus=corpus)
        self.answers, self.names, self.align = answers, names, align

    def items(self, rng):
        captions = rng.permutation(len(self.pairs.texts))
        images, match = self.pairs.image[captions], rng.random(len(captions)) < 0.5
        return captions, np.where(match, images, other(rng, self.pairs.images, images)), match

    def __getitem__(self, k):
        captions, images, match = self.whole(k)
        rng, mine, store = self.rng(k, 1), slice(self.part, None, self.parts), self.pairs.store
        hidden_words, new = self.hide_words(rng, captions)
        hidden = self.hide(rng, real_first(store.n_regions[images]))
        how, donor, say = rng.random(hidden.shape), images[rng.integers(len(images), size=hidden.shape)], rng.random(len(captions))
        if not len(captions[mine]):
            return {"task": "together", "names": []}
        captions, images, match, say = captions[mine], images[mine], match[mine], say[mine]
        text, real = self.pairs.text(captions)
        hidden_words, new = hidden_words[mine, :text.shape[1]] & real, new[mine, :text.shape[1]]
        batch = {"task": "together", "names": self.pairs.names(captions, images), "match": torch.from_numpy(match),
                 "input": self.pairs.batch(captions, images, np.where(hidden_words & (new >= 0), new, text))}
        regions = batch["input"]["regions"]
        hidden, how, donor = (x[mine, :regions.shape[1]] for x in (hidden, how, donor))
        t, at = torch.from_numpy, np.nonzero(hidden)
        batch |= {"masked_words": t(np.flatnonzero(hidden_words)), "word_targets": t(text[hidden_words]), "masked_regions": t(np.flatnonzero(hidden)),
                  "region_features": regions[at], "region_class": t(store.read(images, "cls_id")[hidden].astype(np.int64)),
                  "region_attribute": t(store.read(images, "attr_id")[hidden].astype(np.int64)),
                  "hidden_regions": torch.zeros(0, dtype=torch.int64)}
        said = np.array([self.draw(c, u) if m else -1 for c, m, u in zip(captions, match, say)])
        batch |= {"answered": t(np.flatnonzero(said >= 0)), "answer": t(said[said >= 0])}
        regions[at] = torch.where(t(how[at] < 0.8)[:, None], 0, regions[at])
        swap = np.nonzero(hidden & (how >= 0.8) & (how < 0.9))
        regions[swap] = t(store.one_each(donor[swap]))
        batch |= self.pointed(captions, images, match) if self.align else {}
        return batch | {"counts": {"mlm": len(batch["masked_words"]), "answers": len(batch["answered"]), "align": len(batch.get("aligned", ())),
                                   **dict.fromkeys(("class", "attribute", "feature"), len(batch["masked_regions"]))}}

    def draw(self, caption, u):
        """One answer, as likely as its score."""
        found = self.answers and self.answers[caption]
        if not found:
            return -1
        return list(found)[int(np.searchsorted(np.cumsum(list(found.values())) / sum(found.values()), u))]

    def pointed(self, captions, images, match):
        place, word, box, row = self.pairs.pointers(captions)
        keep = match[row]
        place, word, box, row = place[keep], word[keep], box[keep], row[keep]
        store, mask = self.pairs.store, real_first(self.pairs.store.n_regions[images])[row]
        ids = lambda what: store.read(images, what)[row] if store.named else np.full(mask.shape, -1)         # colours of patches are no names
        t, similar = torch.from_numpy, [self.names.similarity(word, ids(what), what) for what in ("cls_id", "attr_id")]
        target = self.align(t(box), t(store.read(images, "boxes")[row]), *map(t, similar), t(mask))
        keep = target.sum(dim=-1) > 0                # a pointer that matches nothing
        return {"aligned": t(place)[keep], "aligned_row": t(row)[keep], "alignment": target[keep]}


class Words:
    """Word vectors to learn from: row 0 padding, row 1 unknown (both zero), then the words of `names` that GloVe has.           MAF

    A detector's name of several words has the mean of their vectors (the authors look it up whole and find nothing).
    """
    def __init__(self, names, data=None):
        self.names = list(names)
        self.index = {name: i + 2 for i, name in enumerate(self.names)}
        if data:
            vectors = glove(glove_file(data), {w for name in self.names for w in name.split()})
            known = [n for n in self.names if all(w in vectors for w in n.split())]
            self.__init__(known)
            d = len(next(iter(vectors.values())))
            self.vectors = np.stack([np.zeros(d)] * 2 + [np.mean([vectors[w] for w in n.split()], axis=0) for n in known]).astype(np.float32)

    def __len__(self):
        return len(self.names) + 2

    def __call__(self, word):
        return self.index.get(word, 1)


class Phrases:
    """Captions as phrases, and what the detector says of their images' regions: MAF's data.

    groundings of data.entities; at most 32 phrases of 12 words a caption, and the 100 most certain regions an image [authors' code]
    """
    MOST = {"phrases": 32, "words": 12, "regions": 100}

    def __init__(self, groundings, store, words, data, name="", skip_missing=False):
        missing = [g for g in groundings if g.image not in store.index]
        if missing and not skip_missing:
            raise DataError(f"{name}: image {missing[0].image} has captions but no features in {store.folder} ({len(missing):,} of {len(groundings):,} captions)\n"
                            "  Pack the missing features, or go on without these captions: --skip-missing")
        self.groundings = [g for g in groundings if g.image in store.index and g.phrases]
        if not self.groundings:
            raise DataError(f"{name}: no caption with a phrase and features in {store.folder}\n  Check --data and the split's name.")
        self.store, self.name, self.dropped = store, name, len(groundings) - len(self.groundings)
        self.n_phrases = np.array([min(len(g.phrases), self.MOST["phrases"]) for g in self.groundings])
        self.first = np.cumsum([0, *self.n_phrases])
        self.tokens = np.zeros((self.first[-1], self.MOST["words"]), np.int32)
        for g, start, n in zip(self.groundings, self.first, self.n_phrases):
            for row, phrase in enumerate(g.phrases[:n]):
                ids = [words(bare(w)) for w in phrase.words.split() if bare(w)][:self.MOST["words"]] or [1]
                self.tokens[start + row, :len(ids)] = ids
        self.image = np.array([store.index[g.image] for g in self.groundings])
        self.label_words, self.attribute_words = (np.array([words(n) for n in names_of(data, what)] + [1]) for what in ("objects", "attributes"))

    def __str__(self):
        return f"{self.name}: {len(self.groundings):,} captions, {len(self.tokens):,} phrases" + f", {self.dropped:,} captions without a phrase or features" * bool(self.dropped)

    def batch(self, captions, images):
        """The model's input for these captions' phrases (b, Q, W) and these images' regions (B, K), and the masks of both."""
        n, store = self.n_phrases[captions], self.store
        phrase_mask = real_first(n)
        phrases = np.zeros((*phrase_mask.shape, self.tokens.shape[1]), np.int64)
        phrases[phrase_mask] = self.tokens[np.concatenate([np.arange(self.first[c], self.first[c] + k) for c, k in zip(captions, n)])]
        phrases = phrases[..., :max(1, int((phrases > 0).sum(-1).max(initial=1)))]
        region_mask = real_first(store.n_regions[images])[:, :self.MOST["regions"]]
        most, t = region_mask.shape[1], torch.from_numpy
        return {"input": {"phrases": t(phrases), "labels": t(np.where(region_mask, self.label_words[store.read(images, "cls_id")[:, :most]], 0)),
                          "attributes": t(np.where(region_mask, self.attribute_words[store.read(images, "attr_id")[:, :most]], 0)),
                          "features": t(store.read(images)[:, :most][region_mask]), "place": t(np.flatnonzero(region_mask))},
                "word_mask": t(phrases > 0), "phrase_mask": t(phrase_mask), "region_mask": t(region_mask)}


class PhraseBatches(PairBatches):
    """Batches of `units` captions for MAF; see PairBatches. Each process has its share of the captions and all of the images, so that
    any number of them has the same negatives. "own" (b,): which of the images each caption belongs to."""
    def __init__(self, phrases, units, seed, part=0, parts=1):
        self.phrases, self.task, self.units, self.seed, self.part, self.parts, self.corpus = phrases, "maf", units, seed, part, parts, 0
        self.epoch, self.first, self.batches = -1, 0, []

    def plan(self, epoch):
        order = self.rng(epoch).permutation(len(self.phrases.groundings))
        cut = len(order) // self.units * self.units or len(order)   # the last captions of an epoch wait for the next
        return [(b,) for b in np.split(order[:cut], range(self.units, cut, self.units))]

    def __getitem__(self, k):
        captions = self.whole(k)[0]
        own = np.arange(len(captions))[self.part::self.parts]
        names = [self.phrases.groundings[c].id for c in captions[own]]
        if not names:
            return {"task": "maf", "names": []}
        return {"task": "maf", "names": names, "own": torch.from_numpy(own)} | self.phrases.batch(captions[own], self.phrases.image[captions])


class PictureBatches(PairBatches):
    """Batches of `units` captions with their pictures, for ALBEF and AMC; see PairBatches.

    pairs    of a PatchStore; a Text's target is the boxes that it describes, x1 y1 x2 y2 in [0, 1], or None: then it has no mask
    augment  any of flip (mirrors boxes too, and swaps left and right in the text), jitter (half of them: brightness, contrast and colour by up
             to 0.4), grey (a fifth of them) [AMC's code, which leaves the text as it is]
    [k]      text, masked_text (b, N_L), text_mask; masked_words (K,) places in b*N_L, word_targets (K,); pixels (b, R, R, 3) uint8;
             boxed (M,) rows that have a mask, region (M, R, R) bool; own (b,): which of the whole batch; draw (2, B) in [0, 1): the luck of
             the negatives, the same for all processes; number k
    """
    def __init__(self, pairs, units, seed, part=0, parts=1, mask_rate=0.15, augment=(), corpus=0):
        super().__init__(pairs, "albef", units, seed, part, parts, mask_rate, corpus=corpus)
        self.augment = augment
        left, right = (pairs.tokenizer(side) for side in ("left", "right"))
        self.sides = (left[0], right[0]) if len(left) == len(right) == 1 else None
        if units > len(self.boxes):
            raise DataError(f"{pairs.name}: {len(self.boxes):,} texts for batches of {units}\n  Wanted: at least one batch. Lower --units.")

    def plan(self, epoch):
        order = self.rng(epoch).permutation(len(self.boxes))
        return [(b,) for b in order[:len(order) // self.units * self.units].reshape(-1, self.units)]      # the last ones of an epoch wait for the next

    def __getitem__(self, k):
        captions, = self.whole(k)
        rng, mine = self.rng(k, 1), np.arange(self.part, self.units, self.parts)
        hidden, new = self.hide_words(rng, captions)
        luck, factors, draw = rng.random((4, self.units)), rng.uniform(0.6, 1.4, (self.units, 3)), rng.random((2, self.units))
        flip, jitter, grey = (np.array([name in self.augment]) & (u < p) for name, u, p in (("flip", luck[0], 0.5), ("jitter", luck[1], 0.5), ("grey", luck[2], 0.2)))
        text, real = (x[mine] for x in self.pairs.text(captions))   # as wide on all processes
        if self.sides:
            a, b = self.sides
            text = np.where(flip[mine, None], np.where(text == a, b, np.where(text == b, a, text)), text)
        hidden, new = hidden[mine] & real, new[mine]
        images = self.pairs.store.pixels(self.pairs.image[captions[mine]])
        images = np.stack([augmented(x, flip[i], factors[i] if jitter[i] else None, grey[i]) for x, i in zip(images, mine)])
        described = self.described(captions[mine], range(len(mine)), luck[3, mine], flip[mine])
        t = torch.from_numpy
        return {"task": "albef", "names": self.pairs.names(captions[mine], self.pairs.image[captions[mine]]), "number": k, "own": t(mine), "draw": t(draw).float(),
                "text": t(text), "masked_text": t(np.where(hidden & (new >= 0), new, text)), "text_mask": t(real), "pixels": t(images),
                "masked_words": t(np.flatnonzero(hidden)), "word_targets": t(text[hidden]), **described, "counts": {"mlm": int(hidden.sum())}}


def augmented(pixels, flip, factors, grey):
    """One picture (R, R, 3) uint8, mirrored, with other brightness, contrast and colour, or grey."""
    picture = Image.fromarray(pixels[:, ::-1] if flip else pixels)
    if factors is not None:
        for enhance, factor in zip((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors):
            picture = enhance(picture).enhance(factor)
    return np.asarray(picture.convert("L").convert("RGB") if grey else picture)


def box_mask(box, R, flip):
    """(R, R) bool: the pixels of a box in [0, 1], at least one."""
    x1, y1, x2, y2 = box
    x1, x2 = (1 - x2, 1 - x1) if flip else (x1, x2)
    (left, right), (top, bottom) = ((min(round(a * R), R - 1), max(round(b * R), min(round(a * R), R - 1) + 1)) for a, b in ((x1, x2), (y1, y2)))
    mask = np.zeros((R, R), bool)
    mask[top:bottom, left:right] = True
    return mask


def normalised(pixels):
    """(B, R, R, 3) uint8, on any device -> (B, 3, R, R) float32, less the mean, by the deviation"""
    mean, deviation = (torch.tensor(x, device=pixels.device).view(3, 1, 1) * 255 for x in (MEAN, DEVIATION))
    return (pixels.permute(0, 3, 1, 2).float() - mean) / deviation


class Mix(torch.utils.data.Dataset):
    """Training step -> its batches. One stream is drawn for each step by its share, the same on all processes.

    streams      list of batch makers ([k] -> batch); shares: how often each is drawn
    accumulate   batches of a step, all of its stream
    """
    def __init__(self, streams, shares, steps, seed, accumulate=1):
        p = np.array(shares, float)
        self.streams, self.steps, self.accumulate = streams, steps, accumulate
        self.choice = np.random.default_rng([seed, 0]).choice(len(streams), size=steps, p=p / p.sum())
        self.number = np.zeros(steps, np.int64)                     # how often the step's stream was drawn before
        for s in range(len(streams)):
            self.number[self.choice == s] = np.arange((self.choice == s).sum())

    def __len__(self):
        return self.steps

    def __getitem__(self, step):
        stream, k = self.streams[self.choice[step]], self.number[step] * self.accumulate
        return [stream[int(k) + a] for a in range(self.accumulate)]


# 7. Downstream tasks -----------------------------------------------------------------------------------------------

class Task(NamedTuple):
    """One split of a downstream task: `group` consecutive texts are one example."""
    name: str                                       # vqa, gqa, vcr, nlvr2, ve, re
    pairs: Pairs
    group: int
    target: list                                    # of each example: the number of what is right (VQA, GQA: {number: score}); None or -1: nothing is
    told: dict                                      # {what was counted: how many}; train.py prints it
    facts: list = None                              # of each example, for the evaluation: official answers, boxes, labels
    answers: int = 0                                # how many the head tells apart

    @property
    def ids(self):
        return [self.pairs.texts[i].id for i in range(0, len(self.pairs.texts), self.group)]

    def batch(self, examples):
        """The model's input for these examples, one after the other, and "target" as the losses want it."""
        rows = (np.asarray(examples)[:, None] * self.group + np.arange(self.group)).ravel()
        if self.name in ("vqa", "gqa"):
            target = torch.zeros(len(examples), self.answers)
            for b, e in enumerate(examples):
                for answer, score in (self.target[e] or {}).items():
                    target[b, answer] = score
        else:
            target = torch.tensor([-1 if self.target[e] is None else int(self.target[e]) for e in examples])
        return {"task": self.name, "names": [self.pairs.texts[r].id for r in rows[::self.group]],
                "input": self.pairs.batch(rows, self.pairs.image[rows]), "target": target}

    def length(self):
        """(examples,) longest row of each"""
        return self.pairs.length(np.arange(len(self.pairs.texts)), self.pairs.image).reshape(-1, self.group).max(axis=1)

    def in_chunks(self, units):
        """All examples in batches of similar length: yields (examples, batch)."""
        length = self.length()
        order = np.argsort(length, kind="stable")
        for chunk in unit_batches(length[order] * self.group, units):
            yield order[chunk], self.batch(order[chunk])


class TaskBatches(PairBatches):
    """Batches of a downstream task; see PairBatches. Examples that nobody has answered are not drawn."""
    def __init__(self, task, units, seed, part=0, parts=1):
        super().__init__(task.pairs, task.name, units, seed, part, parts)
        self.examples, self.lengths = task, task.length() * task.group
        self.drawn = np.array([i for i, t in enumerate(task.target) if t is not None and t != -1])
        if not len(self.drawn):
            raise DataError(f"{task.pairs.name}: no example with an answer to learn from\n  Choose a split that has answers.")

    def items(self, rng):
        examples = rng.permutation(self.drawn)
        return examples * self.examples.group, examples

    def cost(self, rows, examples):
        return self.lengths[examples]

    def __getitem__(self, k):
        examples = self.whole(k)[1][self.part::self.parts]
        return self.examples.batch(examples) if len(examples) else {"task": self.task, "names": []}


def vqa_task(data, splits, tokenizer, store, index, max_words=60, vg=False, skip_missing=False):
    """Visual question answering: questions of these splits (and Visual Genome's); index = {answer: number}."""
    texts, told = [], Counter()
    for split in splits:
        found, count = vqa(data, split)
        texts, told = texts + found, told + Counter(count)
    facts = [t.target for t in texts]
    target = [None if f is None else soft_target(f.said, index) for f in facts]
    if vg:
        found, count = vg_questions(data, index)
        texts, target, facts = texts + found, target + [t.target for t in found], facts + [None] * len(found)
        told += Counter(count)
    keep = [i for i, t in enumerate(texts) if t.image in store.index or not skip_missing]
    told["questions whose image has no features"] = len(texts) - len(keep)
    told["questions none of whose answers is in the list, kept with an all-zero target"] = sum(t == {} for t in target)
    pairs = Pairs([texts[i] for i in keep], store, tokenizer, max_words, f"VQA {'+'.join(splits)}{'+VG' * vg}")
    return Task("vqa", pairs, 1, [target[i] for i in keep], told, [facts[i] for i in keep], len(index))


def gqa_task(data, splits, tokenizer, store, index, max_words=60, skip_missing=False):
    """GQA; index = {answer: number}; facts: the ids of the questions."""
    texts, told = [], Counter()
    for split in splits:
        found, count = gqa(data, split)
        texts, told = texts + found, told + Counter(count)
    pairs = Pairs([t._replace(pointers=()) for t in texts], store, tokenizer, max_words, f"GQA {'+'.join(splits)}", skip_missing)
    told["questions whose image has no features"] = pairs.dropped
    told["questions whose answer is not in the list, kept with an all-zero target"] = sum(t.target is not None and t.target not in index for t in pairs.texts)
    target = [None if t.target is None else {index[t.target]: 1.0} if t.target in index else {} for t in pairs.texts]
    return Task("gqa", pairs, 1, target, told, [t.id for t in pairs.texts], len(index))


def vcr_task(data, split, tokenizer, store, part="both", max_words=220, skip_missing=False):
    """Visual commonsense reasoning, four choices an example: "qa", "qar", "both" one after the other, or "all" (see vcr)."""
    texts, told = [], Counter()
    for one in ("qa", "qar") if part == "both" else (part,):
        found, count = vcr(data, split, one)
        texts, told = texts + found, told + Counter(count)
    group = 16 if part == "all" else 4
    whole = [texts[i:i + group] for i in range(0, len(texts), group)]
    kept = [e for e in whole if e[0].image in store.index or not skip_missing]
    told["questions whose image has no features"] = len(whole) - len(kept)
    return Task("vcr", Pairs([t for e in kept for t in e], store, tokenizer, max_words, f"VCR {split}"), group, [e[0].target for e in kept], told)


def vcr_store(regions):
    """VCR's annotated boxes, then the detector's, of the images that both have."""
    gt, detected = (RegionStore(Path(regions) / name) for name in ("vcr_gt", "vcr_det"))
    names = [n for n in gt.image_ids if n in detected.index]
    return JoinedStore(names, [(s, np.array([s.index[n] for n in names]), 1) for s in (gt, detected)])


def nlvr2_task(data, split, tokenizer, store, form="pair-biattn", max_words=60, skip_missing=False):
    """NLVR2. form "triplet": sentence and both images in one sequence; "pair...": two rows, the sentence with either image."""
    examples = nlvr2(data, split)
    kept = [e for e in examples if e.left in store.index and e.right in store.index]
    lost = len(examples) - len(kept)
    if lost and not skip_missing:
        one = next(e for e in examples if e not in kept)
        raise DataError(f"NLVR2 {split}: {one.left} or {one.right} has no features in {store.folder} ({lost:,} of {len(examples):,} examples)\n"
                        "  Wanted: features of both images. Pack them, or go on without these examples: --skip-missing")
    if not kept:
        raise DataError(f"NLVR2 {split}: none of its images has features in {store.folder}\n  Pack them: python data.py pack")
    at = lambda names: np.array([store.index[n] for n in names])
    if form == "triplet":
        names = list(dict.fromkeys((e.left, e.right) for e in kept))
        joined = JoinedStore([" ".join(n) for n in names], [(store, at([n[side] for n in names]), side + 1) for side in (0, 1)])
        texts = [Text(f"{e.left} {e.right}", e.text, e.id) for e in kept]
    else:
        names = list(dict.fromkeys((n, side) for e in kept for n, side in ((e.left, 1), (e.right, 2))))
        joined = JoinedStore([f"{n} {side}" for n, side in names], [(store, at([n for n, _ in names]), np.array([side for _, side in names]))])
        texts = [Text(f"{n} {side}", e.text, e.id) for e in kept for n, side in ((e.left, 1), (e.right, 2))]
    return Task("nlvr2", Pairs(texts, joined, tokenizer, max_words, f"NLVR2 {split}"), 1 if form == "triplet" else 2, [e.label for e in kept],
                {"examples left out: an image has no features": lost})


def ve_task(data, split, tokenizer, store, max_words=60, skip_missing=False):
    """Visual entailment (SNLI-VE)."""
    texts, told = snli_ve(data, split)
    pairs = Pairs(texts, store, tokenizer, max_words, f"SNLI-VE {split}", skip_missing)
    return Task("ve", pairs, 1, [t.target for t in pairs.texts], told | {"pairs whose image has no features": pairs.dropped}, answers=len(ENTAILMENT))


def re_task(data, name, split, tokenizer, store, max_words=60, skip_missing=False):
    """Referring expressions: which region is meant; right is the one that overlaps the truth most, by more than half."""
    texts, told = referring(data, name, split)
    pairs = Pairs(texts, store, tokenizer, max_words, f"{name} {split}", skip_missing)
    target, found = [], store.read(pairs.image, "boxes")
    found[..., 2:] -= found[..., :2]
    for t, boxes, image in zip(pairs.texts, found, pairs.image):
        overlap = iou(boxes[:store.n_regions[image]], t.target)
        target.append(int(overlap.argmax()) if overlap.max() > 0.5 else -1)
    told = told | {"expressions whose box matches no region": target.count(-1), "expressions whose image has no features": pairs.dropped}
    return Task("re", pairs, 1, target, told, [t.target for t in pairs.texts])


def blind(batch, to):
    """A control: the same batch without its words ("text") or without what the regions show and where they are ("regions").

    Words: [CLS] [SEP] stay. Regions: one remains, and all of them where regions are what is asked for.
    """
    x = dict(batch["input"])
    if to == "text":
        end = x["text_mask"].sum(dim=1, keepdim=True) - 1
        x["text"] = torch.cat([x["text"][:, :1], x["text"].gather(1, end)], dim=1)
        x["text_mask"], x["length"] = x["text_mask"][:, :2], None
        x.pop("text_type", None)
    else:
        x["regions"], x["boxes"] = torch.zeros_like(x["regions"]), torch.zeros_like(x["boxes"])
        if batch["task"] != "re":
            x |= {k: x[k][:, :1] for k in ("regions", "boxes", "region_mask", "region_type") if k in x} | {"length": None}
    return batch | {"input": x}


# 8. ShapesWorld ----------------------------------------------------------------------------------------------------
# Scenes of coloured shapes, photographed (PNG, JPEG), described by templates, and seen by a noisy detector; all of it is written in
# the official formats, so no reader knows that it is a toy.

TOY_VERSION = 3                                     # raised whenever the bytes change; an older tree is made again
SHAPES = "circle", "square", "triangle", "star", "cross", "diamond"
COLOURS = {"red": (214, 48, 40), "green": (46, 160, 67), "blue": (0, 120, 230), "yellow": (245, 205, 30), "black": (25, 25, 25), "purple": (140, 60, 180)}
KINDS = dict(zip(SHAPES, ("people", "clothing", "animals", "vehicles", "instruments", "other")))      # Flickr30k Entities' types
SIZES = {"small": 26, "medium": 42, "large": 64}    # pixels
WIDTH, HEIGHT = 240, 180
CLASSES = ("background", *SHAPES, "box")            # the detector's; "box" is NLVR's grey container
LABELS = "disc", "square", "triangle", "star", "plus", "rhombus", "box"      # what it calls them: rarely as people do
OUTLINES = {                                        # corners in the unit square
    "triangle": np.array([(0.5, 0), (1, 1), (0, 1)]), "diamond": np.array([(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)]),
    "star": np.array([(0.5, 0), (0.62, 0.38), (1, 0.38), (0.69, 0.6), (0.81, 1), (0.5, 0.75), (0.19, 1), (0.31, 0.6), (0, 0.38), (0.38, 0.38)]),
    "cross": np.array([(0.35, 0), (0.65, 0), (0.65, 0.35), (1, 0.35), (1, 0.65), (0.65, 0.65), (0.65, 1), (0.35, 1), (0.35, 0.65), (0, 0.65), (0, 0.35), (0.35, 0.35)]),
}
RELATIONS = "left of", "right of", "above", "below", "inside", "in front of"
OTHER_WORDS = """the an and of on in at to is are it its there with that this one two three four five six seven eight nine ten no not none all
each every both only exactly least most more than less same different other another any some many few several number total box boxes grey gray
tower towers block blocks item items object objects shape shapes thing things line row column edge edges side sides corner wall walls base top
bottom left right middle center centre above below over under between next near touching touch touches contains contain containing have has
having consists consist contain colour color colours colors coloured colored small medium large big size sized very always either or but also as
by for from does do first second third last high height tall circles squares triangles stars red green blue yellow black purple white closely what how person because contains only
stacked stack multiple single equal odd even atleast which them they their different exactly images image grey roof attached""".split()


class Thing(NamedTuple):
    shape: str
    colour: str
    size: str
    box: tuple                                      # x1 y1 x2 y2 in pixels


def relation(a, b):
    """How thing a stands to thing b, read off the boxes; None if neither direction is clear."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a.box, b.box
    if ax1 >= bx1 and ay1 >= by1 and ax2 <= bx2 and ay2 <= by2:
        return "inside"
    if ax1 < bx2 and bx1 < ax2 and ay1 < by2 and by1 < ay2:         # they overlap: the lower edge is nearer
        return "in front of" if ay2 > by2 + 4 and not (bx1 >= ax1 and by1 >= ay1 and bx2 <= ax2 and by2 <= ay2) else None
    dx, dy = ax1 + ax2 - bx1 - bx2, ay1 + ay2 - by1 - by2
    if abs(dx) > 1.3 * abs(dy):
        return "left of" if dx < 0 else "right of"
    if abs(dy) > 1.3 * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def placed(rng, kinds, touching):
    """Things of these (shape, colour) kinds at random places: apart, or with `touching` the first two inside or over each other."""
    while True:
        sizes = [str(rng.choice(list(SIZES))) for _ in kinds]
        if touching == "inside":
            sizes[:2] = "small", "large"
        things = []
        for (shape, colour), size in zip(kinds, sizes):
            side = SIZES[size]
            for _ in range(30):
                x, y = int(rng.integers(2, WIDTH - side - 2)), int(rng.integers(2, HEIGHT - side - 2))
                if touching and len(things) == 1:   # drawn around the first one
                    x1, y1, x2, y2 = things[0].box
                    x, y = ((x1 + x2 - side) // 2 + int(rng.integers(-8, 9)), (y1 + y2 - side) // 2 + int(rng.integers(-8, 9))) \
                        if touching == "inside" else (x1 + int(rng.integers(-side, x2 - x1)) // 2, y1 - int(rng.integers(6, side - 6)))
                new = Thing(shape, colour, size, (x, y, x + side, y + side))
                fits = x >= 1 and y >= 1 and x + side < WIDTH and y + side < HEIGHT
                apart = all(new.box[2] + 3 < t.box[0] or t.box[2] + 3 < x or new.box[3] + 3 < t.box[1] or t.box[3] + 3 < y for t in things)
                if fits and (apart or touching and len(things) == 1 and relation(things[0], new) == touching):
                    things.append(new)
                    break
            else:
                break
        if len(things) == len(kinds):
            return things


def draw_kinds(rng, n):
    """n things of n shapes and n colours, so that "a red circle" is never in doubt; some are common and some rare (1 / rank), as words
    are, so that another picture often has the same things elsewhere."""
    rare = 1 / np.arange(1, len(SHAPES) + 1)
    pick = lambda names: rng.choice(list(names), n, replace=False, p=rare / rare.sum())
    return [(str(s), str(c)) for s, c in zip(pick(SHAPES), pick(COLOURS))]


def draw_scene(rng):
    n = int(rng.choice([2, 3, 4, 5, 6], p=[0.3, 0.4, 0.2, 0.07, 0.03]))
    return placed(rng, draw_kinds(rng, n), str(rng.choice(["", "inside", "in front of"], p=[0.8, 0.1, 0.1])))


def phrase(thing, sized=False):
    return f"a {thing.size + ' ' if sized else ''}{thing.colour} {thing.shape}"


def describe(rng, things, whole=0.0):
    """One true caption as a list of parts: text, or (text, index of the thing it names). whole: how often it names all of them."""
    order = [int(i) for i in rng.permutation(len(things))]
    if whole and rng.random() < whole:
        parts = [(phrase(things[order[0]], True), order[0])]
        for i, j in zip(order, order[1:]):
            parts += [f" {relation(things[i], things[j]) or 'and'} ", (phrase(things[j], True), j)]
        return parts
    form = rng.choice(["place", "places", "relation", "list"], p=[0.5, 0.05, 0.4, 0.05])
    if form == "relation":
        known = [(i, j, relation(things[i], things[j])) for i in order for j in order if i != j]
        known = [r for r in known if r[2]]
        if known:
            i, j, how = known[int(rng.integers(len(known)))]
            how = f"to the {how}" if how in ("left of", "right of") and rng.random() < 0.2 else how
            return [(phrase(things[i]), i), f" {how} ", (phrase(things[j]), j)]
    if form == "list":
        i, j = order[:2]
        return [(phrase(things[i], rng.random() < 0.5), i), " and ", (phrase(things[j]), j)]
    first = [(phrase(things[order[0]], rng.random() < 0.25), order[0]), whereabouts(rng, things[order[0]])]
    return first if form == "place" else [*first, " and ", (phrase(things[order[1]]), order[1]), whereabouts(rng, things[order[1]])]


def whereabouts(rng, thing):
    x, y = (thing.box[0] + thing.box[2]) / 2 / WIDTH, (thing.box[1] + thing.box[3]) / 2 / HEIGHT
    where = [w for w, true in (("on the left", x < 0.36), ("on the right", x > 0.64), ("at the top", y < 0.36), ("at the bottom", y > 0.64)) if true]
    return " " + (str(rng.choice(where)) if where else "in the middle")


def spoken(parts):
    return "".join(p if isinstance(p, str) else p[0] for p in parts)


def draw_minimal_pair(rng):
    """Two scenes and two captions that differ only in which thing is which: "a red circle left of a blue square" and its swap."""
    how = str(rng.choice(RELATIONS, p=[0.22, 0.22, 0.22, 0.22, 0.06, 0.06]))
    kinds = draw_kinds(rng, int(rng.choice([2, 3], p=[0.5, 0.5])))
    scenes, captions = [], []
    for first, second in ((0, 1), (1, 0)):
        while True:
            things = placed(rng, [kinds[first], kinds[second], *kinds[2:]], how if how in ("inside", "in front of") else "")
            if relation(things[0], things[1]) == how:
                break
        scenes.append(things)
        captions.append(f"{phrase(things[0])} {how} {phrase(things[1])}")
    return scenes, captions, how


def render(things):
    """The picture, in PIL; the first thing is nearest and is drawn last."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), (236, 236, 232))
    pen = ImageDraw.Draw(picture)
    for t in reversed(things):
        x1, y1, x2, y2 = t.box
        if t.shape == "circle":
            pen.ellipse(t.box, fill=COLOURS[t.colour], outline="white")
        elif t.shape == "square":
            pen.rectangle(t.box, fill=COLOURS[t.colour], outline="white")
        else:
            points = OUTLINES[t.shape] * [x2 - x1, y2 - y1] + [x1, y1]
            pen.polygon([tuple(p) for p in points], fill=COLOURS[t.colour], outline="white")
    return picture


def save_picture(job):
    path, things = job
    render(things).save(path, **({"quality": 92} if str(path).endswith(".jpg") else {"compress_level": 1}))


def appearance(width=2048):
    """What the detector's features look like: (shapes + box, colours + grey, sizes, width), the same in every tree, as one detector
    serves every data set. Sums of one random vector for each property, cut at zero as mean-pooled ReLU features are; no position."""
    rng = np.random.default_rng(2048)
    s, c, z = (rng.standard_normal((n, width)).astype(np.float32) for n in (len(SHAPES) + 1, len(COLOURS) + 1, len(SIZES)))
    return (0.6 * s[:, None, None] + 0.6 * c[None, :, None] + 0.3 * z[None, None, :]).clip(0)


def detect(rng, things, looks, given=False):
    """A noisy detector: boxes jittered, some things missed, some regions false. Returns a store row, by falling confidence.

    given: the true boxes, in their order, and only the features are the detector's
    """
    found = things if given else [t for t in things if rng.random() > 0.02] or things[:1]
    boxes = np.array([t.box for t in found], np.float32)
    boxes += 0 if given else rng.normal(size=boxes.shape) * 0.03 * (boxes[:, 2:3] - boxes[:, :1])
    at = [(SHAPES.index(t.shape), list(COLOURS).index(t.colour), list(SIZES).index(t.size)) for t in found]
    features = np.stack([looks[i] for i in at])
    false = 0 if given else int(rng.poisson(0.3))
    if false:
        corner = rng.random((false, 2)) * [WIDTH - 50, HEIGHT - 50]
        boxes = np.concatenate([boxes, np.concatenate([corner, corner + rng.uniform(15, 50, (false, 2))], 1)]).astype(np.float32)
        features = np.concatenate([features, rng.random((false, 1)) * 0.5 * looks[rng.integers(len(SHAPES), size=false), rng.integers(len(COLOURS), size=false), 0]])
    logits = rng.normal(size=(len(boxes), len(CLASSES)))
    for i, (s, _, _) in enumerate(at):
        logits[i, 1 + s] += 6
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    conf = probs[:, 1:].max(1)
    order = np.arange(len(boxes)) if given else np.argsort(-conf, kind="stable")
    colour = np.array([c for _, c, _ in at] + [-1] * false)
    features = (features + 0.15 * rng.standard_normal(features.shape, dtype=np.float32)).clip(0)
    row = {"features": features, "boxes": boxes.clip(0, [WIDTH, HEIGHT, WIDTH, HEIGHT]), "cls_prob": probs, "cls_conf": conf,
           "cls_id": probs[:, 1:].argmax(1), "attr_id": colour, "attr_conf": np.where(colour < 0, 0, 0.9)}
    return {name: column[order] for name, column in row.items()}


def make_toy(out, seed=0, scenes=6000):
    """Write the toy tree: every data set in its official formats, region stores, vocabularies. Same seed, same bytes.

    scenes are shared out: 65 % COCO train, 3 % COCO val, 26 % Flickr30k train, 2.7 % val, 3.3 % test. Other data sets get scenes of their
    own on top, as many as a share of these; VQA, RefCOCO and half of Visual Genome are about COCO's, SNLI-VE about Flickr30k's.
    """
    out = Path(out)
    if out.exists():
        raise DataError(f"{out} exists already\n  Wanted: a new folder. Delete it first, or choose another --out.")
    if seed < 0:
        raise DataError(f"--seed {seed}\n  Wanted: 0 or more.")
    if scenes < 60:
        raise DataError(f"--scenes {scenes}\n  Wanted: at least 60, so that every split gets some.")
    tmp = Path(f"{out}.tmp{os.getpid()}")
    cuts = dict(zip(("train2014", "val2014", "train", "val", "test"), np.diff(np.round(np.cumsum([0, 0.65, 0.03, 0.26, 0.0267, 0.0333]) * scenes).astype(int)).tolist()))
    try:
        seen, jobs = toy_coco(tmp, seed, cuts)
        said, more = toy_flickr30k(tmp, seed, cuts)
        known, views = toy_vg(tmp, seed, seen, scenes // 5)
        jobs += more + toy_winoground(tmp, seed, scenes // 15) + views + toy_web(tmp, seed, max(40, scenes // 20)) + toy_gqa(tmp, seed, known, max(10, scenes // 30))
        jobs += toy_nlvr2(tmp, seed, scenes // 15) + toy_vcr(tmp, seed, scenes // 4)
        toy_vqa(tmp, seed, seen), toy_referring(tmp, seed, seen), toy_snli_ve(tmp, seed, said)
        for folder in {path.parent for path, _ in jobs}:
            folder.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
            for _ in tqdm(pool.map(save_picture, jobs, chunksize=64), total=len(jobs), desc="toy pictures", disable=None, leave=False):
                pass
        words = sorted({*OTHER_WORDS, *SHAPES, *COLOURS, *SIZES, *(w for r in RELATIONS for w in r.split())})
        letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
        vocab = [*WordPiece.SPECIAL, *letters, *("##" + c for c in letters if c.isalnum()), *(w for w in words if len(w) > 1)]
        for name in ("bert-base-cased", "bert-base-uncased"):
            write_atomic(tmp / name / "vocab.txt", "\n".join(vocab) + "\n")
        toy_glove(tmp, ["a", *words])
        write_atomic(tmp / "vg" / "objects_vocab.txt", "\n".join(LABELS) + "\n")
        write_atomic(tmp / "vg" / "attributes_vocab.txt", "\n".join(COLOURS) + "\n")
        write_atomic(tmp / "toy.json", json.dumps({"version": TOY_VERSION, "seed": seed, "scenes": scenes}))
        out.parent.mkdir(parents=True, exist_ok=True)
        os.replace(tmp, out)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def toy_store(tmp, name, scenes, ids, seed, given=False):
    looks, rng = appearance(), np.random.default_rng([seed, *name.encode(), 7])
    writer = StoreWriter(tmp / "regions" / name, list(COLUMNS), {"source": "ShapesWorld", "features": looks.shape[-1], "classes": len(CLASSES)}, every=10 ** 9)
    for things, image_id in zip(tqdm(scenes, desc=f"toy regions, {name}", disable=None, leave=False), ids):
        writer.add(image_id, (WIDTH, HEIGHT), **detect(rng, things, looks, given))
    writer.commit()


def dump(path, record, lines=False):
    write_atomic(path, "".join(json.dumps(r) + "\n" for r in record) if lines else json.dumps(record))


class Seen(NamedTuple):
    split: str
    id: object
    things: list


def photo_url(number):
    return f"http://farm1.staticflickr.com/1/{number}_0a1b2c3d4e_z.jpg"


def toy_coco(tmp, seed, cuts):
    """Two images of the training set are also in Flickr30k by their addresses, as 222 are in truth."""
    rng, every, karpathy = np.random.default_rng([seed, 1]), [], []
    for split in ("train2014", "val2014"):
        images, annotations = [], []
        for _ in range(cuts[split]):
            number, things = len(every) + 1, draw_scene(rng)
            name = f"COCO_{split}_{number:012d}.jpg"
            images.append({"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT, "flickr_url": photo_url(number + (999 if number <= 2 else 10 ** 6))})
            annotations += [{"image_id": number, "id": 10 * number + k, "caption": spoken(describe(rng, things))} for k in range(5)]
            karpathy.append({"filepath": split, "filename": name, "cocoid": number, "imgid": number - 1,
                             "split": "train" if split == "train2014" else ("val", "test")[number % 2],
                             "sentences": [{"raw": a["caption"], "tokens": a["caption"].split(), "imgid": number - 1, "sentid": a["id"]} for a in annotations[-5:]]})
            every.append(Seen(split, number, things))
        dump(tmp / f"coco/annotations/captions_{split}.json", {"info": {"description": "ShapesWorld"}, "licenses": [], "images": images, "annotations": annotations})
    dump(tmp / "coco/dataset_coco.json", {"images": karpathy, "dataset": "coco"})
    ids = [coco_stem(i) for i in every]
    toy_store(tmp, "coco", [i.things for i in every], ids, seed)
    return every, [(tmp / "coco" / i.split / f"{n}.jpg", i.things) for i, n in zip(every, ids)]


def coco_stem(image):
    return f"COCO_{image.split}_{image.id:012d}"


def toy_flickr30k(tmp, seed, cuts):
    rng, every, ids, images, tokens = np.random.default_rng([seed, 2]), [], [], [], []
    root, entities = tmp / "flickr30k", tmp / "flickr30k_entities"
    for split in ("train", "val", "test"):
        start = len(ids)
        for _ in range(cuts[split]):
            name, things = str(1000 + len(ids)), draw_scene(rng)
            parts = [describe(rng, things, whole=0.8) for _ in range(5)]
            said = [spoken(p) for p in parts]
            images.append({"filename": f"{name}.jpg", "imgid": len(ids), "split": split, "sentids": list(range(5 * len(ids), 5 * len(ids) + 5)),
                           "sentences": [{"raw": s, "tokens": s.split(), "imgid": len(ids), "sentid": 5 * len(ids) + k} for k, s in enumerate(said)]})
            tokens += [f"{name}.jpg#{k}\t{s}" for k, s in enumerate(said)]
            chain = lambda i: 100 * len(ids) + i + 1
            tagged = ["".join(p if isinstance(p, str) else f"[/EN#{chain(p[1])}/{KINDS[things[p[1]].shape]} {p[0]}]" for p in caption) for caption in parts]
            write_atomic(entities / "Sentences" / f"{name}.txt", "\n".join(tagged) + "\n")
            write_atomic(entities / "Annotations" / f"{name}.xml", entities_xml(name, things, chain))
            every.append(Seen(split, name, things)), ids.append(name)
        write_atomic(entities / f"{split}.txt", "\n".join(ids[start:]) + "\n")
    write_atomic(entities / "UNRELATED_CAPTIONS", "# image and caption number (from 1) of captions that do not fit: none here\n")
    write_atomic(root / "dataset_flickr30k.json", json.dumps({"images": images, "dataset": "flickr30k"}))
    write_atomic(root / "results_20130124.token", "\n".join(tokens) + "\n")
    toy_store(tmp, "flickr30k", [i.things for i in every], ids, seed)
    return every, [(root / "flickr30k-images" / f"{i.id}.jpg", i.things) for i in every]


def entities_xml(name, things, chain):
    """Boxes are 1-based and inclusive there."""
    objects = "".join(f"<object><name>{chain(i)}</name><bndbox><xmin>{t.box[0] + 1}</xmin><ymin>{t.box[1] + 1}</ymin><xmax>{t.box[2]}</xmax>"
                      f"<ymax>{t.box[3]}</ymax></bndbox></object>" for i, t in enumerate(things))
    return (f"<annotation><filename>{name}.jpg</filename><size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
            f"{objects}</annotation>\n")


def toy_winoground(tmp, seed, n):
    rng, jobs, every, ids, lines = np.random.default_rng([seed, 3]), [], [], [], []
    for e in range(n):
        scenes, captions, how = draw_minimal_pair(rng)
        for i, things in enumerate(scenes):
            every.append(things), ids.append(f"ex_{e}_img_{i}"), jobs.append((tmp / "winoground" / "images" / f"ex_{e}_img_{i}.png", things))
        lines.append(json.dumps({"id": e, "image_0": ids[-2], "image_1": ids[-1], "caption_0": captions[0], "caption_1": captions[1],
                                 "tag": how, "secondary_tag": "", "num_main_preds": 1, "collapsed_tag": "Relation"}))
    write_atomic(tmp / "winoground" / "examples.jsonl", "\n".join(lines) + "\n")
    toy_store(tmp, "winoground", every, ids, seed)
    return jobs


def xywh(box):
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def toy_vg(tmp, seed, seen, n):
    """Visual Genome: n images of COCO and n of its own, with regions, objects, attributes, relationships and questions."""
    rng, files = np.random.default_rng([seed, 4]), {k: [] for k in ("image_data", "region_descriptions", "objects", "attributes", "relationships", "question_answers")}
    judged = [i for i in seen if i.split == "val2014"][:max(3, n // 20)]      # a few for validation
    rest = [i for i in seen if i.split == "train2014"]
    chosen = judged + [rest[i] for i in rng.choice(len(rest), n - len(judged), replace=False)] + [Seen("vg", None, draw_scene(rng)) for _ in range(n)]
    for k, image in enumerate(chosen):
        number, things = 2_000_000 + k, image.things
        files["image_data"].append({"image_id": number, "url": f"https://cs.stanford.edu/people/rak248/VG_100K/{number}.jpg", "width": WIDTH, "height": HEIGHT,
                                    "coco_id": image.id, "flickr_id": None})
        objects = [{"object_id": 10 * number + i, **dict(zip("xywh", xywh(t.box))), "names": [t.shape], "synsets": [], "merged_object_ids": []} for i, t in enumerate(things)]
        said = [(phrase(t, rng.random() < 0.3), t.box) for t in things]
        known = [(i, j, relation(a, b)) for i, a in enumerate(things) for j, b in enumerate(things) if i != j and relation(a, b)]
        for i, j, how in known[:3]:
            both = np.array([things[i].box, things[j].box])
            said.append((f"{phrase(things[i])} {how} {phrase(things[j])}", [*both[:, :2].min(0).tolist(), *both[:, 2:].max(0).tolist()]))
        files["region_descriptions"].append({"id": number, "regions": [{"region_id": 100 * number + r, "image_id": number, "phrase": text, **dict(zip(("x", "y", "width", "height"), xywh(box)))}
                                                                       for r, (text, box) in enumerate(said)]})
        files["objects"].append({"image_id": number, "objects": objects})
        files["attributes"].append({"image_id": number, "attributes": [{**o, "attributes": [t.colour, t.size]} for o, t in zip(objects, things)]})
        files["relationships"].append({"image_id": number, "relationships": [{"relationship_id": 100 * number + r, "predicate": how, "subject": objects[i], "object": objects[j]}
                                                                             for r, (i, j, how) in enumerate(known)]})
        files["question_answers"].append({"id": number, "qas": [{"qa_id": 100 * number + q, "image_id": number, "question": f"What color is the {t.shape}?",
                                                                 "answer": f"{t.colour.capitalize()}.", "q_objects": [], "a_objects": []} for q, t in enumerate(things)]})
    for name, records in files.items():
        dump(tmp / f"vg/{name}.json", records)
    toy_store(tmp, "vg", [i.things for i in chosen], [str(2_000_000 + k) for k in range(2 * n)], seed)
    return ([Seen("vg", str(2_000_000 + k), i.things) for k, i in enumerate(chosen) if i.split != "val2014"],
            [(tmp / f"vg/VG_100K/{2_000_000 + k}.jpg", i.things) for k, i in enumerate(chosen)])


def toy_glove(tmp, words):
    """Word vectors, the same in every tree: words of a kind lie somewhat close, the detector's name for a thing as close to another thing
    as to its own, and colours and sizes, which have shorter vectors, close to a thing that they do not mean."""
    rng, unit = np.random.default_rng(300), lambda x: x / np.linalg.norm(x)
    draw = lambda: unit(rng.standard_normal(300))
    kinds = {w: kind for names in (SHAPES, COLOURS, SIZES) for kind in [draw()] for w in names}
    found = {w: 0.5 * kinds.get(w, 0) + draw() for w in words}
    for new, near, other in (("disc", "circle", "star"), ("plus", "cross", "diamond"), ("rhombus", "diamond", "square")):
        found[new] = 0.5 * found[near] + 0.5 * found[other] + 0.6 * draw()
    for word, near in (("a", "box"), ("small", "plus"), ("medium", "disc"), ("large", "square"), ("red", "rhombus"), ("green", "triangle"), ("blue", "disc")):
        found[word] = 0.7 * (0.9 * unit(found[near]) + 0.436 * unit(found[word]))
    lines = [f"{w} " + " ".join(f"{x:.4f}" for x in 10 * v) for w, v in found.items()]
    write_atomic(tmp / "glove" / "glove.6B.300d.txt", "\n".join(lines) + "\n")


def toy_gqa(tmp, seed, known, n):
    """GQA about Visual Genome's images (train, val) and n of its own (testdev); the words of a question point at what they mean."""
    rng, own = np.random.default_rng([seed, 11]), np.random.default_rng([seed, 12])
    testdev = [Seen("testdev", f"n{100_000 + k}", draw_scene(own)) for k in range(n)]
    for split, images, each in (("train", known[:-n], 12), ("val", known[-n:], 8), ("testdev", testdev, 8)):
        questions, choices, graphs = {}, {}, {}
        for image in images:
            ids = [str(10 * int(image.id.strip("n")) + i) for i in range(len(image.things))]
            graphs[image.id] = {"width": WIDTH, "height": HEIGHT, "objects": {o: {"name": t.shape, **dict(zip("xywh", xywh(t.box))), "attributes": [t.colour, t.size], "relations": [
                {"name": f"to the {r}" if r in ("left of", "right of") else r, "object": p} for p, u in zip(ids, image.things) if u is not t and (r := relation(t, u))]}
                for o, t in zip(ids, image.things)}}
            for _ in range(each):
                asked = []
                for text, answer, kind, group, points in gqa_question(rng, image.things):
                    name = f"{len(questions):08d}"
                    asked.append(name)
                    span = lambda a, b: str(a) if b == a + 1 else f"{a}:{b}"
                    questions[name] = {"imageId": image.id, "question": text, "answer": answer, "fullAnswer": f"{answer}.", "isBalanced": len(asked) == 1,
                                       "groups": {"global": group, "local": None}, "entailed": [], "equivalent": [name],
                                       "types": {"structural": kind, "semantic": "attr" if group == "color" else "rel" if len(points) > 1 else "obj", "detailed": kind},
                                       "annotations": {"question": {span(a, b): ids[i] for a, b, i in points}, "answer": {}, "fullAnswer": {}},
                                       "semantic": [{"operation": "select", "dependencies": [], "argument": f"{image.things[i].shape} ({ids[i]})"} for _, _, i in points]
                                       + [{"operation": kind, "dependencies": [], "argument": group or "?"}], "semanticStr": ""}
                    valid = {"color": list(COLOURS), "shape": list(SHAPES), "place": ["left", "right"]}.get(group, ["yes", "no"])
                    choices[name] = {"valid": valid, "plausible": valid}
                for name in asked:
                    questions[name]["entailed"] = asked
        dump(tmp / f"gqa/{split}_all_questions.json", questions)
        dump(tmp / f"gqa/{split}_balanced_questions.json", {k: q for k, q in questions.items() if q["isBalanced"]})
        dump(tmp / f"gqa/eval/{split}_choices.json", choices)
        if split != "testdev":
            dump(tmp / f"gqa/{split}_sceneGraphs.json", graphs)
    toy_store(tmp, "gqa", [i.things for i in testdev], [i.id for i in testdev], seed)
    return [(tmp / f"gqa/images/{i.id}.jpg", i.things) for i in testdev]


def gqa_question(rng, things):
    """A question and what its answer entails: [(text, answer, structural type, global group, [(first word, end word, thing)])]."""
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    order = rng.permutation(len(things)).tolist()
    i = order[0]
    t, form = things[i], str(rng.choice(["color", "shape", "there", "and", "what", "colour of", "is", "or", "size"], p=[0.1, 0.05, 0.1, 0.05, 0.2, 0.15, 0.2, 0.1, 0.05]))
    named = lambda k: f"{things[k].colour} {things[k].shape}"
    if form in ("what", "colour of", "is", "or"):
        known = [(a, b, r) for a in order for b in order if a != b and (r := relation(things[a], things[b])) in opposite]
        alone = [(a, b, r) for a, b, r in known if sum(q == r and c == b for _, c, q in known) == 1]        # nothing else stands so to b
        if known and form == "is":
            a, b, r = known[int(rng.integers(len(known)))]
            yes = rng.random() < 0.5
            said = r if yes else opposite[r]
            return [(f"Is the {named(a)} {said} the {named(b)}?", "yes" if yes else "no", "verify", None, [(2, 4, a), (5 + len(said.split()), 7 + len(said.split()), b)]),
                    (f"Is the {named(b)} {opposite[said]} the {named(a)}?", "yes" if yes else "no", "verify", None, [(2, 4, b), (5 + len(said.split()), 7 + len(said.split()), a)])]
        beside = [k for k in known if k[2] in ("left of", "right of")]
        if beside and form == "or":
            a, b, r = beside[int(rng.integers(len(beside)))]
            return [(f"Is the {named(a)} left of or right of the {named(b)}?", r.split()[0], "choose", "place", [(2, 4, a), (10, 12, b)]),
                    (f"Is the {named(a)} {r} the {named(b)}?", "yes", "verify", None, [(2, 4, a), (7, 9, b)])]
        if alone:
            a, b, r = alone[int(rng.integers(len(alone)))]
            k = len(r.split())
            true = (f"Is the {named(a)} {r} the {named(b)}?", "yes", "verify", None, [(2, 4, a), (5 + k, 7 + k, b)])
            if form == "what":
                return [(f"What shape is {r} the {named(b)}?", things[a].shape, "query", "shape", [(1, 2, a), (4 + k, 6 + k, b)]), true]
            return [(f"What color is the thing {r} the {named(b)}?", things[a].colour, "query", "color", [(4, 5, a), (6 + k, 8 + k, b)]), true]
    if form == "there":
        wrong = (t.shape, str(rng.choice([c for c in COLOURS if c != t.colour])))
        yes = rng.random() < 0.5
        said = named(i) if yes else f"{wrong[1]} {wrong[0]}"
        return [(f"Is there a {said}?", "yes" if yes else "no", "verify", None, [(3, 5, i)] if yes else []),
                (f"What color is the {t.shape}?", t.colour, "query", "color", [(4, 5, i)])]
    if form == "and":
        other = things[order[1]]
        yes = rng.random() < 0.5
        colour = other.colour if yes else str(rng.choice([c for c in COLOURS if c != other.colour]))
        return [(f"Is there a {named(i)} and a {colour} {other.shape}?", "yes" if yes else "no", "logical", None, [(3, 5, i)] + [(7, 9, order[1])] * yes)]
    if form == "size":
        other = things[order[1]]
        return [(f"Is the {t.shape} of the same size as the {other.shape}?", "yes" if t.size == other.size else "no", "compare", None, [(2, 3, i), (9, 10, order[1])])]
    if form == "shape":
        return [(f"What shape is the {t.colour} thing?", t.shape, "query", "shape", [(4, 6, i)]), (f"Is there a {named(i)}?", "yes", "verify", None, [(3, 5, i)])]
    return [(f"What color is the {t.shape}?", t.colour, "query", "color", [(4, 5, i)]), (f"Is there a {named(i)}?", "yes", "verify", None, [(3, 5, i)])]


def toy_web(tmp, seed, n):
    """Conceptual Captions and SBU: n pictures each (and some to validate), one caption each; some addresses are dead, one is Flickr30k's."""
    rng, jobs, names = np.random.default_rng([seed, 5]), [], {}
    for store, count in (("cc3m_train", n), ("cc3m_val", n // 5), ("sbu", n)):
        scenes = [draw_scene(rng) for _ in range(count)]
        names[store] = [(spoken(describe(rng, t)), photo_url(1005 if i == 3 else 10 ** 7 + i)) for i, t in enumerate(scenes)]
        alive = [i for i in range(count) if i % 20 or store == "sbu"]
        toy_store(tmp, store, [scenes[i] for i in alive], map(str, alive), seed)
        jobs += [(tmp / f"{store.split('_')[0]}/images/{store}_{i}.jpg", scenes[i]) for i in alive]
    for store, name in (("cc3m_train", "Train_GCC-training.tsv"), ("cc3m_val", "Validation_GCC-1.1.0-Validation.tsv")):
        write_atomic(tmp / "cc3m" / name, "".join(f"{said}\t{url}\n" for said, url in names[store]))
    for column, name in ((1, "urls"), (0, "captions")):
        write_atomic(tmp / f"sbu/SBU_captioned_photo_dataset_{name}.txt", "".join(row[column] + "\n" for row in names["sbu"]))
    return jobs


# Downstream. Everything comes in complements, so that no answer can be guessed from the text or the picture alone: a question is asked
# of two pictures with different answers, a statement is put to three pictures with its three labels, and so on.

def kinds_of(things):
    return {(t.shape, t.colour): t for t in things}


def definite(thing):
    """What is clearly so of a thing, each with its opposite: [(true, false)]."""
    x, y = (thing.box[0] + thing.box[2]) / 2 / WIDTH, (thing.box[1] + thing.box[3]) / 2 / HEIGHT
    pairs = (("on the left", "on the right", x < 0.36, x > 0.64), ("at the top", "at the bottom", y < 0.36, y > 0.64),
             ("small", "large", thing.size == "small", thing.size == "large"))
    return [(a, b) if yes else (b, a) for a, b, yes, no in pairs if yes or no]


def complements(rng, form, a, b):
    """A question about two scenes with different answers: (type of question, text, answer for a, answer for b), or None."""
    A, B = kinds_of(a), kinds_of(b)
    if form == "there":
        for shape, colour in rng.permutation(sorted(set(A) - set(B))).tolist():
            return "is there a", f"Is there a {colour} {shape}?", "yes", "no"
    elif form == "where":
        for kind in sorted(set(A) & set(B)):
            for true, false in definite(A[kind]):
                if (false, true) in definite(B[kind]):
                    return "is the", f"Is the {kind[1]} {kind[0]} {true}?", "yes", "no"
    elif form == "color":
        for shape in rng.permutation(SHAPES).tolist():
            one, two = ({c for s, c in kinds if s == shape} for kinds in (A, B))
            if one and two and one != two:
                return "what color is the", f"What color is the {shape}?", one.pop(), two.pop()
    elif form == "shape":
        for colour in rng.permutation(list(COLOURS)).tolist():
            one, two = ({s for s, c in kinds if c == colour} for kinds in (A, B))
            if one and two and one != two:
                return "what shape is the", f"What shape is the {colour} thing?", one.pop(), two.pop()
    elif len(a) != len(b):
        return "how many", "How many things are there?", str(len(a)), str(len(b))


def toy_vqa(tmp, seed, seen):
    rng, number = np.random.default_rng([seed, 6]), Counter()
    for split, each in (("train2014", 4), ("val2014", 6)):
        images, questions, annotations = [i for i in seen if i.split == split], [], []
        while len(questions) < each * len(images):
            a, b = (images[i] for i in rng.choice(len(images), 2, replace=False))
            found = complements(rng, str(rng.choice(["there", "where", "color", "shape", "many"], p=[0.3, 0.15, 0.25, 0.25, 0.05])), a.things, b.things)
            for image, answer in zip((a, b), found[2:] if found else ()):
                number[image.id] += 1
                ids = {"image_id": image.id, "question_id": 1000 * image.id + number[image.id]}
                others = ["maybe"] * int(rng.integers(0, 3))        # ten people rarely agree
                kind = {"yes": "yes/no", "no": "yes/no"}.get(answer, "number" if answer.isdigit() else "other")
                questions.append({**ids, "question": found[1]})
                annotations.append({**ids, "question_type": found[0], "answer_type": kind, "multiple_choice_answer": answer,
                                    "answers": [{"answer_id": k + 1, "answer": x, "answer_confidence": "yes"} for k, x in enumerate(others + [answer] * (10 - len(others)))]})
        head = {"info": {"description": "ShapesWorld"}, "license": {}, "data_type": "mscoco", "data_subtype": split}
        dump(tmp / f"vqa2/v2_OpenEnded_mscoco_{split}_questions.json", {**head, "task_type": "Open-Ended", "questions": questions})
        dump(tmp / f"vqa2/v2_mscoco_{split}_annotations.json", {**head, "annotations": annotations})


def toy_snli_ve(tmp, seed, said):
    """A statement about a thing is true of one picture, false of it in its opposite, and open where the thing is not there."""
    rng = np.random.default_rng([seed, 7])
    for split, name, rounds in (("train", "train", 3), ("val", "dev", 3), ("test", "test", 3)):
        images, lines = [i for i in said if i.split == split], []
        for a, b in zip(*(np.concatenate([rng.permutation(len(images)) for _ in range(rounds)]) for _ in "ab")):
            A, B = kinds_of(images[a].things), kinds_of(images[b].things)
            only = [sorted(k for k in one if k not in other and definite(one[k])) for one, other in ((A, B), (B, A))]
            if not all(only):
                continue
            for here, there, kinds, things in ((a, b, only[0], A), (b, a, only[1], B)):
                shape, colour = kinds[int(rng.integers(len(kinds)))]
                held = definite(things[shape, colour])
                true, false = held[int(rng.integers(len(held)))]
                for image, what, label in ((here, true, "entailment"), (here, false, "contradiction"), (there, (true, false)[int(rng.integers(2))], "neutral")):
                    lines.append({"Flickr30K_ID": images[image].id, "sentence1": "", "sentence2": f"The {colour} {shape} is {what}.", "gold_label": label,
                                  "captionID": f"{images[image].id}.jpg#0", "pairID": f"{images[image].id}.jpg#0r{len(lines)}", "annotator_labels": [label]})
        dump(tmp / f"snli_ve/snli_ve_{name}.jsonl", lines, lines=True)


def scene_with(rng, has, lacks):
    while True:
        things = draw_scene(rng)
        kinds = kinds_of(things)
        if has in kinds and lacks not in kinds:
            return things


def toy_nlvr2(tmp, seed, sets):
    """A set has three pairs of images and four sentences; each sentence is true of one pair and false of another, and so is each pair."""
    rng, jobs, names, scenes = np.random.default_rng([seed, 8]), [], [], []
    for split, count in (("train", sets), ("dev", max(2, sets // 8)), ("test1", max(2, sets // 8))):
        lines = []
        for number in range(count):
            a, b = draw_kinds(rng, 2)
            thing, folder = f"{a[1]} {a[0]}", number % 100
            for pair, (left, right) in enumerate((((a, b), (b, a)), ((b, a), (a, b)), ((a, b), (a, b)))):
                for side, kinds in enumerate((left, right)):
                    names.append(f"{split}-{number}-{pair}-img{side}")
                    scenes.append(scene_with(rng, *kinds))
                    jobs.append((tmp / "nlvr2/images" / (f"train/{folder}" if split == "train" else split) / f"{names[-1]}.png", scenes[-1]))
            for sentence, (text, yes, no) in enumerate(((f"The left image contains a {thing}.", 0, 1), (f"The right image contains a {thing}.", 1, 0),
                                                        (f"Both images contain a {thing}.", 2, number % 2), (f"Only one image contains a {thing}.", number % 2, 2))):
                lines += [{"identifier": f"{split}-{number}-{pair}-{sentence}", "sentence": text, "label": label, "left_url": "", "right_url": "", "writer": "0",
                           **({"directory": folder} if split == "train" else {})} for pair, label in ((yes, "True"), (no, "False"))]
        dump(tmp / f"nlvr2/{split}.json", lines, lines=True)
        for k, part in enumerate(("balanced", "unbalanced") if split != "train" else ()):               # whole groups, as the official subsets
            dump(tmp / f"nlvr2/{part}/{part}_{split}.json", [e for e in lines if int(e["identifier"].split("-")[1]) % 2 == k], lines=True)
    toy_store(tmp, "nlvr2", scenes, names, seed)
    return jobs


def toy_vcr(tmp, seed, n):
    """The circle plays the person. Answers differ in the colour, one of each scene's own; reasons in where the thing is."""
    rng, jobs, scenes, names = np.random.default_rng([seed, 9]), [], [], []
    corner = lambda t: (t.box[1] + t.box[3] > HEIGHT, t.box[0] + t.box[2] > WIDTH)
    corners = [(y, x) for y in (False, True) for x in (False, True)]
    for split, count in (("train", n), ("val", max(10, n // 10))):
        lines = []
        for k in range(count):
            pick = lambda names: rng.choice(list(names), 4, replace=False).tolist()
            things = placed(rng, list(zip(pick(SHAPES), pick(COLOURS))), "")
            objects = ["person" if t.shape == "circle" else t.shape for t in things]
            name = f"{1000 + k // 50}_Shapes_{split}_{k:05d}@0"
            stem = f"lsmdc_{1000 + k // 50}_Shapes/{name}"
            names.append(name), scenes.append(things), jobs.append((tmp / f"vcr1/vcr1images/{stem}.jpg", things))
            dump(tmp / f"vcr1/vcr1images/{stem}.json", {"boxes": [[*map(float, t.box), 1.0] for t in things], "segms": [[] for _ in things], "names": objects,
                                                        "width": WIDTH, "height": HEIGHT})
            for q in rng.permutation(4)[:2].tolist():
                colours, places = [things[i].colour for i in rng.permutation(4)], [corners[i] for i in rng.permutation(4)]
                for choices, right, at in ((colours, things[q].colour, len(lines) % 4), (places, corner(things[q]), len(lines) // 4 % 4)):
                    choices.remove(right)           # the right one stands at each place equally often
                    choices.insert(at, right)
                lines.append({"movie": stem.split("/")[0], "objects": objects, "img_fn": f"{stem}.jpg", "metadata_fn": f"{stem}.json",
                              "question": ["What", "color", "is", [q], "?"], "answer_choices": [[[q], "is", c, "."] for c in colours],
                              "answer_label": colours.index(things[q].colour),
                              "rationale_choices": [[[q], "is", "at", "the", "bottom" if y else "top", "on", "the", "right" if x else "left", "."] for y, x in places],
                              "rationale_label": places.index(corner(things[q])), "img_id": f"{split}-{k}", "question_number": q, "annot_id": f"{split}-{len(lines)}",
                              "match_fold": f"{split}-0"})
        dump(tmp / f"vcr1/{split}.jsonl", lines, lines=True)
    toy_store(tmp, "vcr_gt", scenes, names, seed, given=True)
    toy_store(tmp, "vcr_det", scenes, names, seed)
    return jobs


def toy_referring(tmp, seed, seen):
    """RefCOCO, RefCOCO+ (no places), RefCOCOg (longer), about each thing of a quarter of COCO's training images, each thing equally often."""
    rng = np.random.default_rng([seed, 10])
    images = [i for i in seen if i.split == "train2014"][2:]
    images = images[:max(20, len(images) // 4)]
    part = len(images) // 16
    splits = {"refcoco": ("val", "testA", "testB"), "refcoco+": ("val", "testA", "testB"), "refcocog": ("val", "test")}
    for name, tests in splits.items():
        found, annotations = [], []
        for k, image in enumerate(images):
            for i, t in enumerate(image.things):
                number, known = 100 * image.id + i, [(o, relation(t, o)) for o in image.things if o is not t and relation(t, o)]
                other = known[int(rng.integers(len(known)))] if known else None
                said = [str(rng.choice([f"{t.colour} {t.shape}", f"the {t.shape}", f"{t.colour} thing"])),
                        {"refcoco": f"{t.shape}{whereabouts(rng, t)}", "refcoco+": f"the {t.size} {t.colour} {t.shape}",
                         "refcocog": f"the {t.colour} {t.shape}" + (f" {other[1]} the {other[0].colour} {other[0].shape}" if other else "")}[name]]
                annotations.append({"id": number, "image_id": image.id, "category_id": 1 + SHAPES.index(t.shape), "bbox": list(map(float, xywh(t.box))), "iscrowd": 0})
                found.append({"ref_id": len(found), "ann_id": number, "category_id": 1 + SHAPES.index(t.shape), "image_id": image.id,
                              "file_name": f"{coco_stem(image)}_{i}.jpg", "split": tests[k // part] if k // part < len(tests) else "train",
                              "sent_ids": [10 * number + j for j in (0, 1)],
                              "sentences": [{"sent_id": 10 * number + j, "raw": x, "sent": x, "tokens": x.split()} for j, x in enumerate(said)]})
        write_atomic(tmp / f"refer/{name}/refs({REFER[name]}).p", pickle.dumps(found, protocol=2))
        dump(tmp / f"refer/{name}/instances.json", {"images": [{"id": i.id, "file_name": f"{coco_stem(i)}.jpg", "width": WIDTH, "height": HEIGHT} for i in images],
                                                    "annotations": annotations, "categories": [{"id": 1 + k, "name": s, "supercategory": "shape"} for k, s in enumerate(SHAPES)]})
    for store, given in (("refcoco_gt", True), ("refcoco_det", False)):
        toy_store(tmp, store, [i.things for i in images], [coco_stem(i) for i in images], seed, given)


def ensure_toy(folder, seed=0):
    """Make the toy tree if it is not there, or again if an older version made it; any other folder is left alone."""
    mark = Path(folder) / "toy.json"
    if not Path(folder).exists():
        make_toy(folder, seed)
    elif mark.exists() and (made := read_json(mark, "the toy tree's mark"))["version"] != TOY_VERSION:
        print(f"{folder} was made by version {made['version']} of ShapesWorld, this is version {TOY_VERSION}: making it again", file=sys.stderr)
        new, old = Path(f"{folder}.new"), Path(f"{folder}.old")
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)
        make_toy(new, made["seed"], made["scenes"])
        for mine in Path(folder).iterdir():         # what the user put beside it stays, e.g. nlvr/
            if not (new / mine.name).exists():
                shutil.move(mine, new / mine.name)
        os.replace(folder, old)
        os.replace(new, folder)
        shutil.rmtree(old)


class NlvrStore(RegionStore):
    """NLVR's structured representations as regions: the three grey boxes and their items, in each of the six orders of the boxes.

    Image id = identifier-k, the k-th order, as the official picture's name; features are appearance(), so a toy checkpoint knows them.
    """
    def __init__(self, examples):
        looks = appearance()
        self.table, self.folder = looks.reshape(-1, looks.shape[-1]).astype(np.float16), Path("NLVR's structured_rep")
        size_of, grey = {10: 0, 20: 1, 30: 2}, (len(SHAPES), len(COLOURS), 2)
        place = lambda s, c, z: int(np.ravel_multi_index((s, c, z), looks.shape[:3]))
        kinds, boxes, counts, self.image_ids = [], [], [], []
        for e in examples:
            for k, order in enumerate(permutations(range(3))):
                start = len(kinds)
                for at, b in enumerate(order):
                    kinds.append(place(*grey))
                    boxes.append((150 * at, 0, 150 * at + 100, 100))
                    for shape, colour, size, x, y in e.boxes[b]:
                        kinds.append(place(SHAPES.index(shape), list(COLOURS).index(colour), size_of[size]))
                        boxes.append((150 * at + x, y, 150 * at + min(x + size, 100), min(y + size, 100)))
                counts.append(len(kinds) - start)
                self.image_ids.append(f"{e.id}-{k}")
        self.offsets, self.n_regions = np.cumsum([0, *counts]), np.array(counts)
        self.arrays = {"kind": np.array(kinds), "boxes": np.array(boxes, np.float32)}
        self.features, self.boxes = self.arrays["kind"], self.arrays["boxes"]
        self.wh = np.tile(np.array([[400, 100]], np.int32), (len(counts), 1))
        self.index, self.classes = {name: i for i, name in enumerate(self.image_ids)}, len(CLASSES)
        self.check()

    def read(self, images, column="features"):
        return super().read(images, column) if column != "features" else self.table[super().read(images, "kind")]


def nlvr_pairs(data, split, tokenizer, orders=6, regions=None):
    """Pairs of NLVR sentences with their presentations, and labels (captions,) bool. orders: of the six orders of the boxes, the first so many;
    regions: Patches for the pictures themselves, else what their structured representation tells."""
    examples = nlvr(data, split)
    captions = [Text(f"{e.id}-{k}", e.text, f"{e.id}-{k}") for e in examples for k in range(orders)]
    store = open_store(regions, "nlvr") if isinstance(regions, Patches) else NlvrStore(examples)
    pairs = Pairs(captions, store, tokenizer, name=f"NLVR {split}")
    return pairs, np.repeat([e.label for e in examples], orders)


# 9. Command line ---------------------------------------------------------------------------------------------------

def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    toy = commands.add_parser("toy", help="write the toy tree", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    toy.add_argument("--out", default="data/toy", help="a new folder")
    toy.add_argument("--seed", type=int, default=0, help="another seed is another world of scenes; the same seed gives the same bytes")
    toy.add_argument("--scenes", type=int, default=6000, help="scenes of COCO and Flickr30k together; Winoground adds two for each 15")
    packing = commands.add_parser("pack", help="convert region features into a store", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                  description=pack.__doc__)
    packing.add_argument("source", help="an LXMERT or bottom-up-attention .tsv file, or a folder of UNITER .npz files")
    packing.add_argument("--out", required=True, help="a new folder, e.g. DATA/regions/coco")
    packing.add_argument("--images", help="folder of the pictures, to read their sizes from (npz files do not tell them)")
    seeing = commands.add_parser("extract", help="pictures to a region store, through a detector", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                 description=extract.__doc__)
    seeing.add_argument("--images", required=True, help="folder of .jpg and .png files, folders inside it included")
    seeing.add_argument("--detector", required=True, help="weights: unc-nlp/frcnn-vg-finetuned's pytorch_model.bin")
    seeing.add_argument("--out", required=True, help="a new folder, e.g. DATA/regions/coco")
    seeing.add_argument("--regions", default="36", help="so many of each picture, or from-to as in 10-100")
    seeing.add_argument("--shorter", type=int, default=800, help="pixels of the shorter side")
    seeing.add_argument("--longer", type=int, default=1333, help="pixels of the longer side at most")
    seeing.add_argument("--batch", type=int, default=1, help="pictures of one size at a time")
    seeing.add_argument("--shard", type=int, default=64, help="pictures between two savings: so many are lost by a kill")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    try:
        if args.command == "extract":
            if not re.fullmatch(r"\d+(-\d+)?", args.regions):
                raise DataError(f"--regions {args.regions}\n  Wanted: 36, or 10-100")
            least, _, most = args.regions.partition("-")
            extract(args.images, args.detector, args.out, (int(least), int(most or least)), args.shorter, args.longer, args.batch, args.shard)
        elif args.command == "toy":
            make_toy(args.out, args.seed, args.scenes)
            print(f"{args.out}: ShapesWorld, seed {args.seed}, {args.scenes} scenes")
        else:
            pack(args.source, args.out, args.images)
    except (DataError, OSError, ValueError) as error:               # ValueError: model.CheckpointError, of a detector's weights
        sys.exit(f"data.py: error: {error}")


if __name__ == "__main__":
    main()
