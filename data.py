"""Files in, batches out: tokenizer, region features, official caption files, batches, and ShapesWorld, the toy tree.

Letters: B pairs, N_L words, N_V regions, D_V width of a region feature, C region classes (background first).
A batch is a dict of tensors with fixed names; masks are bool, True = real; boxes are x1 y1 x2 y2 in [0, 1].

    1. Errors and files     DataError  write_atomic  read_json
    2. Text                 WordPiece                                           as BERT, cased or uncased
    3. Region features      RegionStore  StoreWriter  pack                      memory-mapped; from TSV and npz files
    4. Readers              coco  coco_karpathy  flickr30k  winoground  nlvr                  official files -> records
    5. Pairs                Pairs  load_pairs                                   captions and regions, ready for batches
    6. Batches              unit_batches  PairBatches  RankingBatches  Mix      every batch is a function of (seed, number)
    7. ShapesWorld          make_toy  ensure_toy                                a toy world in the official formats
    8. Command line         python data.py toy | pack

python data.py toy --out data/toy --seed 0 --scenes 6000
python data.py pack train2014_obj36.tsv --out DATA/regions/coco
"""
import argparse
import base64
import contextlib
import difflib
import hashlib
import json
import os
import re
import shutil
import sys
import unicodedata
import zipfile
from concurrent.futures import ProcessPoolExecutor
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
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
    """A UTF-8 text file, whole."""
    try:
        return need(path, what, hint).read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
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


def field(record, name, where):
    """record[name], or an error that tells the record and the nearest name it does have."""
    if not isinstance(record, dict) or name not in record:
        have = list(record) if isinstance(record, dict) else [type(record).__name__]
        near = difflib.get_close_matches(name, map(str, have), 1)
        raise DataError(f"{where} has no field {name!r}: found {', '.join(map(str, have[:8])) or 'nothing'}"
                        + (f"\n  Nearest: {near[0]!r}." if near else "") + "\n  Compare with the official format in the README.")
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
    """
    SPECIAL = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"

    def __init__(self, vocab_file, lower):
        text = read_text(vocab_file, "a WordPiece vocabulary, one piece a line",
                         "BERT's own vocab.txt fits; `python data.py toy --out data/toy` writes a small one.")
        self.pieces, self.lower, self.seen = [p.rstrip("\r") for p in text.rstrip("\n").split("\n")], lower, {}
        self.ids = {p: i for i, p in enumerate(self.pieces)}
        for token in self.SPECIAL:
            if token not in self.ids:
                raise DataError(f"{vocab_file} has no {token} among its {len(self.pieces):,} lines\n"
                                f"  Wanted: a BERT vocabulary with {' '.join(self.SPECIAL)}. Fetch it again.")
        self.pad, self.unk, self.cls, self.sep, self.mask = (self.ids[t] for t in self.SPECIAL)
        self.ordinary = np.array([i for i, p in enumerate(self.pieces) if not (p.startswith("[") and p.endswith("]") and len(p) > 2)])

    def __len__(self):
        return len(self.pieces)

    def __call__(self, text):
        """ids without [CLS] and [SEP]"""
        if not (text.isascii() and text.isprintable()):
            text = "".join(" " if c in "\t\n\r" or unicodedata.category(c) == "Zs" else f" {c} " if is_chinese(c) else c
                           for c in unicodedata.normalize("NFC", text) if c not in "\0\ufffd" and not is_control(c))
        if len(self.seen) > 1_000_000:
            self.seen.clear()
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

    def relative_boxes(self, images):
        """(B, N_V, 4) float32, x1 y1 x2 y2 divided by width and height"""
        wh = np.tile(self.wh[images], 2)[:, None].astype(np.float32)
        return (self.read(images, "boxes") / wh).clip(0, 1)


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
    """coco_train2014_000000000042 -> COCO_train2014_000000000042; flickr30k_000001000092795 -> 1000092795"""
    if stem.startswith("coco_"):
        return "COCO_" + stem[5:]
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


# 4. Readers --------------------------------------------------------------------------------------------------------

class Caption(NamedTuple):
    image: str                                      # the image's id in the region store
    text: str
    id: str                                         # for messages and result files


def coco(data, split):
    """COCO 2014 captions. split: train2014, val2014. Image id = file stem, as in the feature files."""
    path = Path(data) / "coco" / "annotations" / f"captions_{split}.json"
    whole = read_json(path, "COCO's caption annotations")
    stem = {field(i, "id", f"{path}, images[]"): Path(field(i, "file_name", f"{path}, images[]")).stem for i in field(whole, "images", path)}
    out = []
    for a in field(whole, "annotations", path):
        where = f"{path}, annotation {a.get('id')}"
        image = field(a, "image_id", where)
        if image not in stem:
            raise DataError(f"{where} is about image {image}, which is not in the file's images list\n  Fetch the file again.")
        out.append(Caption(stem[image], field(a, "caption", where), str(a.get("id"))))
    return out


def coco_karpathy(data, split):
    """COCO captions in Karpathy's split: train (with restval, as every paper), val, test; the first five captions of an image."""
    path = Path(data) / "coco" / "dataset_coco.json"
    images = field(read_json(path, "Karpathy's split of COCO"), "images", path)
    wanted = ("train", "restval") if split == "train" else (split,)
    return [Caption(Path(field(i, "filename", path)).stem, field(s, "raw", path), str(s.get("sentid")))
            for i in images if field(i, "split", path) in wanted for s in field(i, "sentences", path)[:5]]


def flickr30k(data, split):
    """Flickr30k in Karpathy's split: train, val, test. Image id = file stem."""
    path = Path(data) / "flickr30k" / "dataset_flickr30k.json"
    images = field(read_json(path, "Karpathy's split of Flickr30k"), "images", path)
    return [Caption(Path(field(i, "filename", path)).stem, field(s, "raw", path), str(s.get("sentid")))
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
        label = str(field(e, "label", where)).lower()
        if label not in ("true", "false"):
            raise DataError(f"{where}: label {e['label']!r}, wanted true or false")
        out.append(NlvrExample(field(e, "identifier", where), field(e, "sentence", where), label == "true", boxes))
    return out


# 5. Pairs ----------------------------------------------------------------------------------------------------------

class Pairs:
    """Captions as ids, their images' regions, and which belongs to which.

    tokens   int32, all captions one after the other, each [CLS] ... [SEP]; caption i is tokens[starts[i]:starts[i+1]]
    image    (captions,) index of each caption's image in the store
    images   the images that have captions here: negatives are drawn among them
    """
    def __init__(self, captions, store, tokenizer, max_words=60, name="", skip_missing=False):
        self.store, self.tokenizer, self.name = store, tokenizer, name
        missing = [c for c in captions if c.image not in store.index]
        if missing and not skip_missing:
            raise DataError(f"{name}: image {missing[0].image} has captions but no features in {store.folder} "
                            f"({len(missing):,} of {len(captions):,} captions)\n  Wanted: features of every image that has captions.\n"
                            "  Pack the missing features, or train without these captions: --skip-missing")
        captions = [c for c in captions if c.image in store.index] if missing else captions
        if not captions:
            raise DataError(f"{name}: no captions left that have features in {store.folder}\n  Check --data and the split's name.")
        self.captions, flat, starts = captions, [], [0]
        self.dropped, self.cut, self.empty = len(missing), 0, 0
        for c in tqdm(captions, desc=f"tokenize {name}", disable=None if len(captions) > 50_000 else True, leave=False):
            ids = tokenizer(c.text)
            self.cut += len(ids) > max_words
            self.empty += not ids
            flat += [tokenizer.cls, *ids[:max_words], tokenizer.sep]
            starts.append(len(flat))
        self.tokens, self.starts = np.array(flat, np.int32), np.array(starts)
        self.n_words = np.diff(self.starts)
        self.image = np.array([store.index[c.image] for c in captions])
        self.images = np.unique(self.image)

    def __str__(self):
        notes = [f"{n:,} captions {what}" for n, what in ((self.dropped, "left out: no features"), (self.cut, "cut: too long"),
                                                          (self.empty, "empty")) if n]
        return f"{self.name}: {len(self.captions):,} captions, {len(self.images):,} images" + "".join(f", {n}" for n in notes)

    def text(self, captions):
        """(B, N_L) int64 ids and the mask"""
        n = self.n_words[captions]
        mask = np.arange(n.max(initial=0))[None] < n[:, None]
        out = np.full(mask.shape, self.tokenizer.pad, np.int64)
        out[mask] = np.concatenate([self.tokens[self.starts[c]:self.starts[c] + k] for c, k in zip(captions, n)])
        return out, mask

    def length(self, captions, images):
        return self.n_words[captions] + self.store.n_regions[images]

    def batch(self, captions, images, text=None):
        """The model's input for these pairs (two index arrays of equal length); text = ids to use instead, e.g. masked ones."""
        ids, text_mask = self.text(captions)
        n = self.store.n_regions[images]
        t = torch.from_numpy
        return {"text": t(ids if text is None else text), "text_mask": t(text_mask), "regions": t(self.store.read(images)),
                "boxes": t(self.store.relative_boxes(images)), "region_mask": t(np.arange(n.max())[None] < n[:, None]),
                "length": int(self.length(captions, images).max())}

    def names(self, captions, images):
        return [f"caption {self.captions[c].id} with image {self.store.image_ids[i]}" for c, i in zip(captions, images)]

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


BUCKET = 8192                                       # pairs sorted by length together [UNITER's code]
STREAMS = {"mlm": 1, "mrfr": 2, "mrc": 3, "mrckl": 4, "itm": 5, "rank": 6, "nlvr": 7}          # seeds of their own


class PairBatches:
    """Batches of one pre-training task on one data set. Batch k is a function of (seed, k) alone: any process can make any batch.

    units        positions (words + regions, padding counted) of a batch over all processes
    part, parts  this process takes every parts-th pair of it
    labels       of the captions, for tasks that have them (NLVR): they take the place of "match"
    [k]          "input" for the model, what the task predicts, and "names" of the samples (none: nothing of it is this process's)
    """
    def __init__(self, pairs, task, units, seed, part=0, parts=1, mask_rate=0.15, labels=None):
        self.pairs, self.task, self.units, self.seed = pairs, task, units, seed
        self.part, self.parts, self.mask_rate, self.labels = part, parts, mask_rate, labels
        self.epoch, self.first, self.batches = -1, 0, []            # the epoch at hand and its first batch's number

    def rng(self, *numbers):
        return np.random.default_rng([self.seed, STREAMS[self.task], *numbers])

    def items(self, rng):
        """One epoch's pairs: (captions, images, match)."""
        captions = rng.permutation(len(self.pairs.captions))
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
        rng, mine = self.rng(k, 1), slice(self.part, None, self.parts)
        mask = self.draw_mask(rng, captions, images)
        captions, images = captions[mine], images[mine]
        batch = {"task": self.task, "names": self.pairs.names(captions, images), "match": torch.from_numpy(match[mine])}
        if not len(captions):                       # a batch of fewer pairs than processes
            return batch
        if mask is None:
            return batch | {"input": self.pairs.batch(captions, images)}
        hidden, replace = (m[mine] for m in mask)
        if self.task == "mlm":
            text, real = self.pairs.text(captions)
            hidden = hidden[:, :text.shape[1]] & real
            batch["masked_words"] = torch.from_numpy(np.flatnonzero(hidden))
            batch["word_targets"] = torch.from_numpy(text[hidden])
            replaced = np.where(hidden, np.where(replace[:, :text.shape[1]] < 0, text, replace[:, :text.shape[1]]), text)
            return batch | {"input": self.pairs.batch(captions, images, replaced)}
        batch["input"] = self.pairs.batch(captions, images)
        hidden = hidden[:, :batch["input"]["regions"].shape[1]]
        batch["masked_regions"] = torch.from_numpy(np.flatnonzero(hidden))
        if self.task in ("mrc", "mrckl"):
            probs = self.pairs.store.read(images, "cls_prob")
            batch["region_probs"] = torch.from_numpy(probs[hidden])
        return batch

    def draw_mask(self, rng, captions, images):
        """Which words or regions to predict, drawn for all processes at once: hidden (B, N) bool, replace (B, N) ids (-1 = keep).

        Of the masked words 80 % become [MASK], 10 % another word, 10 % stay; at least one each, [CLS] and [SEP] never.  UNITER fn. 7
        """
        if self.task in ("itm", "nlvr"):
            return None
        words = self.task == "mlm"
        n = self.pairs.n_words[captions] if words else self.pairs.store.n_regions[images]
        place = np.arange(n.max())[None]
        may = (place >= 1) & (place < n[:, None] - 1) if words else place < n[:, None]
        draw = np.where(may, rng.random(may.shape), 2.0)
        hidden = (draw < self.mask_rate) | ((draw == draw.min(axis=1, keepdims=True)) & may)
        ids, how = self.pairs.tokenizer, rng.random(may.shape)
        random_word = ids.ordinary[rng.integers(len(ids.ordinary), size=may.shape)]
        return hidden, np.where(how < 0.8, ids.mask, np.where(how < 0.9, random_word, -1))


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
    alternate   even batches: a caption with other images; odd ones: an image with other captions (IAIS). Else half and half (UNITER)
    [k]         "positive": batch of the G matched pairs; "negatives": list of batches of similar length; "order": (G, K) their places
                in the list of all negatives; or "candidates" = (captions, images), both (G, candidates), from which choose() goes on
    """
    def __init__(self, pairs, units, seed, part=0, parts=1, negatives=2, candidates=0, alternate=False):
        super().__init__(pairs, "rank", units, seed, part, parts)
        self.negatives, self.candidates, self.alternate = negatives, candidates, alternate

    def cost(self, captions, images):
        return self.pairs.length(captions, images) * (1 + self.negatives)

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
        captions, images, wrong_captions, wrong_images = (x[mine] for x in (captions, images, wrong_captions, wrong_images))
        batch = {"task": "rank", "names": self.pairs.names(captions, images), "anchor": ("text", "image")[k % 2] if self.alternate else "both",
                 "positive": self.pairs.batch(captions, images) if len(captions) else None}
        if not len(captions):
            return batch
        if self.candidates:
            return batch | {"candidates": (wrong_captions, wrong_images)}
        return batch | self.choose(wrong_captions, wrong_images)

    def choose(self, captions, images):
        """Batches of these negatives, (G, K) captions and images, shortest first, cut where padding would pass 4 %."""
        length = self.pairs.length(captions.ravel(), images.ravel())
        order = np.argsort(length, kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        cuts, start, rising = [], 0, length[order]
        for i in range(len(order)):
            if i - start >= 8 and rising[start:i + 1].sum() < 0.96 * rising[i] * (i + 1 - start):
                cuts.append(i)
                start = i
        return {"negatives": [self.pairs.batch(captions.ravel()[p], images.ravel()[p]) for p in np.split(order, cuts)],
                "order": torch.from_numpy(place.reshape(captions.shape))}


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


# 7. ShapesWorld ----------------------------------------------------------------------------------------------------
# Scenes of coloured shapes, photographed (PNG, JPEG), described by templates, and seen by a noisy detector; all of it is written in
# the official formats, so no reader knows that it is a toy.

TOY_VERSION = 1                                     # raised whenever the bytes change; an older tree is made again
SHAPES = "circle", "square", "triangle", "star", "cross", "diamond"
COLOURS = {"red": (214, 48, 40), "green": (46, 160, 67), "blue": (0, 120, 230), "yellow": (245, 205, 30), "black": (25, 25, 25), "purple": (140, 60, 180)}
SIZES = {"small": 26, "medium": 42, "large": 64}    # pixels
WIDTH, HEIGHT = 240, 180
CLASSES = ("background", *SHAPES, "box")            # the detector's; "box" is NLVR's grey container
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
by for from does do first second third last high height tall circles squares triangles stars red green blue yellow black purple white closely
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


def describe(rng, things):
    """One true caption as a list of parts: text, or (text, index of the thing it names)."""
    order = [int(i) for i in rng.permutation(len(things))]
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


def detect(rng, things, looks):
    """A noisy detector: boxes jittered, some things missed, some regions false. Returns a store row, by falling confidence."""
    found = [t for t in things if rng.random() > 0.02] or things[:1]
    boxes = np.array([t.box for t in found], np.float32)
    boxes += rng.normal(size=boxes.shape) * 0.03 * (boxes[:, 2:3] - boxes[:, :1])
    at = [(SHAPES.index(t.shape), list(COLOURS).index(t.colour), list(SIZES).index(t.size)) for t in found]
    features = np.stack([looks[i] for i in at])
    false = int(rng.poisson(0.3))
    if false:
        corner = rng.random((false, 2)) * [WIDTH - 50, HEIGHT - 50]
        boxes = np.concatenate([boxes, np.concatenate([corner, corner + rng.uniform(15, 50, (false, 2))], 1)]).astype(np.float32)
        features = np.concatenate([features, rng.random((false, 1)) * 0.5 * looks[rng.integers(len(SHAPES), size=false), rng.integers(len(COLOURS), size=false), 0]])
    logits = rng.normal(size=(len(boxes), len(CLASSES)))
    for i, (s, _, _) in enumerate(at):
        logits[i, 1 + s] += 6
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    conf = probs[:, 1:].max(1)
    order = np.argsort(-conf, kind="stable")
    colour = np.array([c for _, c, _ in at] + [-1] * false)
    features = (features + 0.15 * rng.standard_normal(features.shape, dtype=np.float32)).clip(0)
    row = {"features": features, "boxes": boxes.clip(0, [WIDTH, HEIGHT, WIDTH, HEIGHT]), "cls_prob": probs, "cls_conf": conf,
           "cls_id": probs[:, 1:].argmax(1), "attr_id": colour, "attr_conf": np.where(colour < 0, 0, 0.9)}
    return {name: column[order] for name, column in row.items()}


def make_toy(out, seed=0, scenes=6000):
    """Write the toy tree: COCO, Flickr30k with Entities, Winoground, region stores, vocabularies. Same seed, same bytes.

    scenes are shared out: 65 % COCO train, 3 % COCO val, 26 % Flickr30k train, 3 % val, 3 % test; Winoground gets a fifteenth as many
    examples, of scenes of its own.
    """
    out = Path(out)
    if out.exists():
        raise DataError(f"{out} exists already\n  Wanted: a new folder. Delete it first, or choose another --out.")
    if seed < 0:
        raise DataError(f"--seed {seed}\n  Wanted: 0 or more.")
    if scenes < 40:
        raise DataError(f"--scenes {scenes}\n  Wanted: at least 40, so that every split gets some.")
    tmp = Path(f"{out}.tmp{os.getpid()}")
    cuts = dict(zip(("train2014", "val2014", "train", "val", "test"), np.diff(np.round(np.cumsum([0, 0.65, 0.03, 0.26, 0.03, 0.03]) * scenes).astype(int))))
    try:
        jobs = toy_coco(tmp, seed, cuts) + toy_flickr30k(tmp, seed, cuts) + toy_winoground(tmp, seed, scenes // 15)
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
        write_atomic(tmp / "vg" / "objects_vocab.txt", "\n".join(CLASSES[1:]) + "\n")
        write_atomic(tmp / "vg" / "attributes_vocab.txt", "\n".join(COLOURS) + "\n")
        write_atomic(tmp / "toy.json", json.dumps({"version": TOY_VERSION, "seed": seed, "scenes": scenes}))
        out.parent.mkdir(parents=True, exist_ok=True)
        os.replace(tmp, out)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def toy_store(tmp, name, scenes, ids, seed):
    looks, rng = appearance(), np.random.default_rng([seed, len(name), 7])
    writer = StoreWriter(tmp / "regions" / name, list(COLUMNS), {"source": "ShapesWorld", "features": looks.shape[-1], "classes": len(CLASSES)}, every=10 ** 9)
    for things, image_id in zip(tqdm(scenes, desc=f"toy regions, {name}", disable=None, leave=False), ids):
        writer.add(image_id, (WIDTH, HEIGHT), **detect(rng, things, looks))
    writer.commit()


def toy_coco(tmp, seed, cuts):
    rng, jobs, every, ids, karpathy = np.random.default_rng([seed, 1]), [], [], [], []
    for split in ("train2014", "val2014"):
        images, annotations = [], []
        for _ in range(cuts[split]):
            number, things = len(every) + 1, draw_scene(rng)
            name = f"COCO_{split}_{number:012d}.jpg"
            images.append({"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT})
            annotations += [{"image_id": number, "id": 10 * number + k, "caption": spoken(describe(rng, things))} for k in range(5)]
            karpathy.append({"filepath": split, "filename": name, "cocoid": number, "imgid": number - 1,
                             "split": "train" if split == "train2014" else ("val", "test")[number % 2],
                             "sentences": [{"raw": a["caption"], "tokens": a["caption"].split(), "imgid": number - 1, "sentid": a["id"]} for a in annotations[-5:]]})
            every.append(things), ids.append(name[:-4]), jobs.append((tmp / "coco" / split / name, things))
        write_atomic(tmp / "coco" / "annotations" / f"captions_{split}.json",
                     json.dumps({"info": {"description": "ShapesWorld"}, "licenses": [], "images": images, "annotations": annotations}))
    write_atomic(tmp / "coco" / "dataset_coco.json", json.dumps({"images": karpathy, "dataset": "coco"}))
    toy_store(tmp, "coco", every, ids, seed)
    return jobs


def toy_flickr30k(tmp, seed, cuts):
    rng, jobs, every, ids, images, tokens = np.random.default_rng([seed, 2]), [], [], [], [], []
    root, entities = tmp / "flickr30k", tmp / "flickr30k_entities"
    for split in ("train", "val", "test"):
        start = len(ids)
        for _ in range(cuts[split]):
            name, things = str(1000 + len(ids)), draw_scene(rng)
            parts = [describe(rng, things) for _ in range(5)]
            said = [spoken(p) for p in parts]
            images.append({"filename": f"{name}.jpg", "imgid": len(ids), "split": split, "sentids": list(range(5 * len(ids), 5 * len(ids) + 5)),
                           "sentences": [{"raw": s, "tokens": s.split(), "imgid": len(ids), "sentid": 5 * len(ids) + k} for k, s in enumerate(said)]})
            tokens += [f"{name}.jpg#{k}\t{s}" for k, s in enumerate(said)]
            chain = lambda i: 100 * len(ids) + i + 1
            tagged = ["".join(p if isinstance(p, str) else f"[/EN#{chain(p[1])}/other {p[0]}]" for p in caption) for caption in parts]
            write_atomic(entities / "Sentences" / f"{name}.txt", "\n".join(tagged) + "\n")
            write_atomic(entities / "Annotations" / f"{name}.xml", entities_xml(name, things, chain))
            every.append(things), ids.append(name), jobs.append((root / "flickr30k-images" / f"{name}.jpg", things))
        write_atomic(entities / f"{split}.txt", "\n".join(ids[start:]) + "\n")
    write_atomic(entities / "UNRELATED_CAPTIONS", "# image and caption number (from 1) of captions that do not fit: none here\n")
    write_atomic(root / "dataset_flickr30k.json", json.dumps({"images": images, "dataset": "flickr30k"}))
    write_atomic(root / "results_20130124.token", "\n".join(tokens) + "\n")
    toy_store(tmp, "flickr30k", every, ids, seed)
    return jobs


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


def nlvr_pairs(data, split, tokenizer, orders=6):
    """Pairs of NLVR sentences with their presentations, and labels (captions,) bool. orders: of the six orders of the boxes, the first so many."""
    examples = nlvr(data, split)
    captions = [Caption(f"{e.id}-{k}", e.text, f"{e.id}-{k}") for e in examples for k in range(orders)]
    pairs = Pairs(captions, NlvrStore(examples), tokenizer, name=f"NLVR {split}")
    return pairs, np.repeat([e.label for e in examples], orders)


# 8. Command line ---------------------------------------------------------------------------------------------------

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
    return parser


def main():
    args = make_parser().parse_args()
    try:
        if args.command == "toy":
            make_toy(args.out, args.seed, args.scenes)
            print(f"{args.out}: ShapesWorld, seed {args.seed}, {args.scenes} scenes")
        else:
            pack(args.source, args.out, args.images)
    except (DataError, OSError) as error:
        sys.exit(f"data.py: error: {error}")


if __name__ == "__main__":
    main()
