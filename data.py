"""Official files in, batches out. One way for every data set:

    file -> reader -> Record -> Index -> Batches -> loader -> training step

Letters: B pairs, N_L words, N_V regions, D_V width of a region feature, C region classes
(background first). A batch is a dict of tensors with fixed names; masks are bool, True = real;
boxes are x1 y1 x2 y2 in [0, 1].

    1. Errors and files     DataError  read_json  read_pickle  write_atomic  memory_mapped
    2. Tokenizers           WordPiece (BERT, cased or uncased)  WordVectors (GloVe, for MAF)
    3. Region stores        RegionStore  JoinedStore  PatchStore  CropStore  NlvrStore
                            StoreWriter  pack (TSV and npz files to a store)
    4. Readers              one generator of Records a data set and nothing else; in this order:
         captions           coco_captions  karpathy_captions  winoground_examples
                            nlvr_presentations
         pre-training       coco_corpus  vg_descriptions  vg_crops  web captions (cc3m, cc12m, sbu)
         downstream         vqa_questions  vcr_choices  nlvr2_pairs  entailment_pairs
                            referring_expressions  gqa_questions
         alignment          joined_descriptions  entity_captions  vg_triplets  referit_expressions
    5. Index                Index  open_index  make_index: records, tokenized, memory-mapped
    6. Batches              Batches: the planner. KINDS: what a batch of each task holds
    7. Loader               MixedBatches  make_loader
    8. Command line         python data.py pack

python data.py pack train2014_obj36.tsv --out DATA/regions/coco
"""

import argparse
import array
import base64
import contextlib
import difflib
import fcntl
import functools
import gzip
import hashlib
import json
import math
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
from itertools import chain, permutations
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageEnhance, ImageOps
from tqdm import tqdm

# 1. Errors and files ----------------------------------------------------------------------------


class DataError(ValueError):
    """Input that cannot be used; the message names the file, what was found, what was wanted and
    what to do.
    """


# {path: (size, time) or None} of every file that a reader has asked for. An index keeps this list
# and is made again once one of them changes, comes or goes.
sources = {}


def exists(path):
    """Is this file there? FILE.gz does as well as FILE. Either is noted as a source."""
    for name in (str(path), f"{path}.gz"):
        sources.setdefault(name, file_stamp(name))
    return Path(path).exists() or Path(f"{path}.gz").exists()


def file_stamp(path):
    """(bytes, time of the last change) of a file, None where there is none."""
    with contextlib.suppress(OSError):
        found = os.stat(path)
        return [found.st_size, found.st_mtime_ns]


def need(path, what, hint):
    """The path, if it exists; else an error that says what was wanted and what to do."""
    exists(path)
    if not Path(path).exists():
        raise DataError(f"{path} is missing\n  Wanted: {what}\n  {hint}")
    return Path(path)


def write_atomic(path, content):
    """Write text or bytes beside the file, then rename: readers see the old file or the new one,
    never half of one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def read_text(
    path, what, hint='Fetch it from its official address into this place (README, "The full data").'
):
    """A UTF-8 text file, whole; FILE.gz does as well as FILE."""
    packed = Path(f"{path}.gz")
    try:
        if exists(path) and not Path(path).exists():
            return gzip.decompress(packed.read_bytes()).decode("utf-8")
        return need(path, what, hint).read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read as text: {error}\n  Wanted: {what}, in UTF-8. Fetch it again."
        ) from None


def read_json(path, what):
    """A JSON file, whole."""
    try:
        return json.loads(read_text(path, what))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} is not whole JSON ({Path(path).stat().st_size:,} bytes): {error}\n"
            "  Most often a download or a copy that stopped half way: fetch it again."
        ) from None


def read_json_lines(path, what):
    """Yields the records of a file of one JSON record a line."""
    for number, line in enumerate(read_text(path, what).splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number}: not whole JSON: {error}\n  Fetch the file again."
            ) from None
        yield need_record(record, f"{path}, line {number}")


class PlainPickle(pickle.Unpickler):
    """Lists, dicts, strings and numbers only: a pickle that names any class or function is
    refused before it can run.
    """

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_pickle(path, what):
    """A Python 2 pickle of plain containers (refs(unc).p); anything else in it is an error."""
    try:
        with open(
            need(path, what, "Fetch it from its official address into this place."), "rb"
        ) as file:
            return PlainPickle(file, encoding="latin1").load()
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        IndexError,
        KeyError,
        AttributeError,
        TypeError,
    ) as error:
        raise DataError(
            f"{path} is no pickle of plain lists, dicts, strings and numbers: {error}\n"
            f"  Wanted: {what}. Fetch it again from its "
            "official address; a pickle can hold code, so any other is refused."
        ) from None


NUMBER = int, float


def field(record, name, where, kind=object):
    """record[name], which must be a kind (str, list, NUMBER), or an error that names the record
    and the nearest name it does have.
    """
    if not isinstance(record, dict) or name not in record:
        have = list(record) if isinstance(record, dict) else [type(record).__name__]
        near = difflib.get_close_matches(name, map(str, have), 1)
        raise DataError(
            f"{where} has no field {name!r}: found {', '.join(map(str, have[:8])) or 'nothing'}"
            + (f"\n  Nearest: {near[0]!r}." if near else "")
            + "\n  Compare with the official format in the README."
        )
    if not isinstance(record[name], kind):
        raise DataError(
            f"{where}: {name} is {record[name]!r:.60}\n"
            f"  Wanted: { {str: 'a text', list: 'a list'}.get(kind, 'a number') }. Fetch the "
            "file again."
        )
    return record[name]


def need_record(record, where):
    """A record, if it is one: names and values; else an error."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: {record!r:.60}\n  Wanted: a record. Fetch the file again.")
    return record


def memory_mapped(folder, key, build):
    """({name: memory-mapped array}, meta) of DATA/index/name, .npy files that all processes share.

    build() -> ({name: array}, meta dict) is called by one process while the others wait, and again
    where `key` (JSON) has changed or a file that build() read has. Delete the folder to force it.
    """
    folder = Path(folder)
    meta = read_fresh_meta(folder, key)
    if meta is None:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = open(f"{folder}.lock", "w")
        except OSError as error:
            raise DataError(
                f"{folder.parent} cannot be written: {error}\n  Wanted: a place for the index of "
                "the data, beside them. Make it a link to a folder that can be written."
            ) from None
        with lock:
            # the system frees this lock when its holder ends, however it ends
            fcntl.flock(lock, fcntl.LOCK_EX)
            meta = read_fresh_meta(folder, key)
            if meta is None:
                meta = write_arrays(folder, key, build)
    return {p.stem: np.load(p, mmap_mode="r") for p in folder.glob("*.npy")}, meta


def read_fresh_meta(folder, key):
    """meta.json of a folder of arrays, None where it is missing, of another key, or out of date."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
    except (OSError, ValueError):
        return None
    # names of files are relative to the data tree, so that a copied or moved tree stays valid
    tree = folder.parent.parent
    fresh = meta["key"] == json.loads(json.dumps(key)) and all(
        file_stamp(tree / name) == stamp for name, stamp in meta["sources"].items()
    )
    return meta if fresh else None


def write_arrays(folder, key, build):
    """Build the arrays beside their place, then rename: a killed process leaves nothing half."""
    sources.clear()
    arrays, meta = build()
    beside = Path(f"{folder}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        for name, values in arrays.items():
            np.save(beside / f"{name}.npy", values)
    except OSError as error:
        raise DataError(f"{beside} cannot be written: {error}\n  Free some space.") from None
    tree = folder.parent.parent
    names = {os.path.relpath(name, tree): stamp for name, stamp in sources.items()}
    meta = meta | {"key": key, "sources": names}
    (beside / "meta.json").write_text(json.dumps(meta))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)
    return meta


# 2. Tokenizers ----------------------------------------------------------------------------------


def is_control(c):
    """As BERT: control characters but tab and line ends"""
    return c not in "\t\n\r" and unicodedata.category(c).startswith("C")


def is_punctuation(c):
    """As BERT: all of ASCII that is no letter or digit, and Unicode\'s P"""
    o = ord(c)
    return (
        33 <= o <= 47
        or 58 <= o <= 64
        or 91 <= o <= 96
        or 123 <= o <= 126
        or unicodedata.category(c).startswith("P")
    )


def is_chinese(c):
    """CJK ideographs, which BERT takes one by one"""
    o = ord(c)
    return (
        0x4E00 <= o <= 0x9FFF
        or 0x3400 <= o <= 0x4DBF
        or 0x20000 <= o <= 0x2A6DF
        or 0x2A700 <= o <= 0x2B73F
        or 0x2B740 <= o <= 0x2B81F
        or 0x2B820 <= o <= 0x2CEAF
        or 0xF900 <= o <= 0xFAFF
        or 0x2F800 <= o <= 0x2FA1F
    )


class WordPiece:
    """BERT's tokenizer: text -> ids of word pieces.

    vocab_file: one piece a line, "##" starts a piece inside a word; lower: lower-case and strip
    accents first. Which of the two a model wants is decided by its recipe, never by the file.
    Words are remembered, so a corpus costs about a look-up a word.
    new_words: words that get ids of their own behind the file's, e.g. VCR's person_0 ... person_80
    """

    SPECIAL = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"

    def __init__(self, vocab_file, lower, new_words=()):
        text = read_text(
            vocab_file,
            "a WordPiece vocabulary, one piece a line",
            "BERT's own vocab.txt fits; `python tests/toy.py` writes a small one.",
        )
        self.pieces = [*(p.rstrip("\r") for p in text.rstrip("\n").split("\n")), *new_words]
        self.lower = lower
        self.new_words = len(new_words)
        self.ids = {p: i for i, p in enumerate(self.pieces)}
        for token in self.SPECIAL:
            if token not in self.ids:
                raise DataError(
                    f"{vocab_file} has no {token} among its {len(self.pieces):,} lines\n"
                    f"  Wanted: a BERT vocabulary with {' '.join(self.SPECIAL)}. Fetch it again."
                )
        self.pad, self.unk, self.cls, self.sep, self.mask = (self.ids[t] for t in self.SPECIAL)
        # never cut into pieces
        self.whole = {word: [self.ids[word]] for word in new_words}
        self.cache = dict(self.whole)
        self.ordinary = np.array(
            [
                i
                for i, p in enumerate(self.pieces)
                if not (p.startswith("[") and p.endswith("]") and len(p) > 2)
            ]
        )

    def __len__(self):
        return len(self.pieces)

    def fingerprint(self):
        """What an index must be made again for"""
        text = f"{self.lower}\n" + "\n".join(self.pieces)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __call__(self, text):
        """ids without [CLS] and [SEP]"""
        if not (text.isascii() and text.isprintable()):
            text = "".join(
                " "
                if c in "\t\n\r" or unicodedata.category(c) == "Zs"
                else f" {c} "
                if is_chinese(c)
                else c
                for c in unicodedata.normalize("NFC", text)
                if c not in "\0\ufffd" and not is_control(c)
            )
        if len(self.cache) > 1_000_000:
            self.cache = dict(self.whole)
        ids = []
        for word in text.split():
            if word not in self.cache:
                self.cache[word] = [i for token in self.split(word) for i in self.greedy(token)]
            ids += self.cache[word]
        return ids

    def split(self, word):
        """Lower-case, strip accents, and cut at punctuation; special tokens stay whole."""
        if "[" in word:
            parts = [p for p in re.split(r"(\[(?:PAD|UNK|CLS|SEP|MASK)\])", word) if p]
            if len(parts) > 1 or word in self.SPECIAL:
                return [
                    token for p in parts for token in ([p] if p in self.SPECIAL else self.split(p))
                ]
        # letter by letter: str.lower() would turn a last sigma into another letter
        if self.lower:
            word = "".join(
                c
                for c in unicodedata.normalize("NFD", "".join(c.lower() for c in word))
                if unicodedata.category(c) != "Mn"
            )
        return "".join(f" {c} " if is_punctuation(c) else c for c in word).split()

    def greedy(self, token):
        """Longest piece first, from the left; a token that does not come out, or has over 100
        letters, is [UNK].
        """
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


def glove_file(data):
    """GloVe's text file in DATA/glove: 6B or 840B, of 300 numbers."""
    for name in ("glove.6B.300d.txt", "glove.840B.300d.txt"):
        path = Path(data) / "glove" / name
        if path.exists():
            return path
    raise DataError(
        f"{Path(data) / 'glove'} holds neither glove.6B.300d.txt nor glove.840B.300d.txt\n"
        "  Fetch one from GloVe's page, nlp.stanford.edu/projects/glove."
    )


def glove(path, words):
    """Vectors of these words: {word: (d,) float32}, in one pass that keeps no other line. Words
    without a vector are absent.

    A token may hold blanks (840B has ". . ."); of a word that comes twice the first counts.
    """
    wanted, found, d = {w.encode(): w for w in words}, {}, None
    with open(
        need(path, "GloVe's vectors", "Fetch them from GloVe's page."), "rb", buffering=1 << 22
    ) as file:
        bar = tqdm(
            total=os.path.getsize(path),
            desc=Path(path).name,
            unit="B",
            unit_scale=True,
            disable=None,
            leave=False,
        )
        for number, line in enumerate(file, 1):
            blanks = line.count(b" ")
            d = d or blanks
            if blanks < d:
                raise DataError(
                    f"{path}, line {number}: {blanks} numbers where the first line has {d}\n"
                    "  Most often a download that stopped half way: fetch it again."
                )
            if number % 50_000 == 0:
                bar.update(file.tell() - bar.n)
            word = wanted.get(line[: line.index(b" ")])
            # more blanks: a token of several words, which nothing looks up
            if word is None or word in found or blanks > d:
                continue
            try:
                found[word] = np.array(line.split()[1:], np.float32)
            except ValueError:
                raise DataError(
                    f"{path}, line {number}: {line[:60]!r}... holds something that is no number\n"
                    "  Fetch the file again."
                ) from None
        bar.close()
    return found


class WordVectors:
    """MAF's tokenizer: words -> rows of a table that begins as their GloVe vectors.

    Row 0 is padding and row 1 unknown, both zero; then the words of `names` that GloVe has. A
    detector's name of several words has the mean of their vectors (the authors look it up whole
    and find nothing).  data: the data tree; without it the names are taken as they are.
    """

    pad = 0

    def __init__(self, names, data=None):
        self.names, self.vectors = list(names), None
        if data:
            vectors = glove(glove_file(data), {w for name in names for w in name.split()})
            self.names = [n for n in names if all(w in vectors for w in n.split())]
            rows = [np.mean([vectors[w] for w in n.split()], axis=0) for n in self.names]
            padding = np.zeros(len(next(iter(vectors.values()))))
            self.vectors = np.stack([padding, padding, *rows]).astype(np.float32)
        self.ids = {name: i + 2 for i, name in enumerate(self.names)}

    def __len__(self):
        return len(self.names) + 2

    def __call__(self, text):
        """ids of the words of a phrase, without punctuation; [unknown] if there is none"""
        words = [strip_punctuation(word) for word in text.split()]
        return [self.ids.get(word, 1) for word in words if word] or [1]

    def fingerprint(self):
        """What an index must be made again for"""
        return hashlib.sha256("\n".join(self.names).encode()).hexdigest()[:16]


def strip_punctuation(word):
    """A word as GloVe knows it: lower case, without the punctuation around it."""
    return word.lower().strip(PUNCTUATION_MARKS)


PUNCTUATION_MARKS = "".join(c for c in map(chr, range(33, 127)) if not c.isalnum())


def detector_names(data, what):
    """Names of the detector's classes ("objects") or attributes; of aliases ("road,street") the
    first.
    """
    path = Path(data) / "vg" / f"{what}_vocab.txt"
    hint = "the detector's names, one a line (bottom-up attention's repository)"
    lines = read_text(path, hint).rstrip("\n").split("\n")
    return [line.split(",")[0].strip() for line in lines]


# 3. Region stores -------------------------------------------------------------------------------

# a store's arrays: dtype and shape of one row (D_V and C from its meta.json)
COLUMNS = {
    "features": ("<f2", ("D_V",)),
    "boxes": ("<f4", (4,)),
    "cls_id": ("<i2", ()),
    "cls_conf": ("<f2", ()),
    "attr_id": ("<i2", ()),
    "attr_conf": ("<f2", ()),
    "cls_prob": ("<f2", ("C",)),
}
PER_IMAGE = {"offsets": "<i8", "wh": "<i4"}


class RegionStore:
    """Region features of many images, memory-mapped: nothing is read but the rows asked for.

    folder: features.npy (sum, D_V) float16, boxes.npy (sum, 4) pixels, optional class columns (see
    COLUMNS), offsets.npy (N+1), wh.npy (N, 2), ids.npy (N,) bytes, meta.json. Image i owns the rows
    offsets[i]:offsets[i+1], by falling confidence. Pickles as the folder's name.
    """

    # cls_id and attr_id are of a detector's vocabulary
    has_names = True

    def __init__(self, folder):
        self.folder = need(
            folder,
            "a region store",
            f"Make one: python data.py pack FEATURES.tsv --out {folder}",
        )
        self.meta = read_json(self.folder / "meta.json", "the store's description")
        self.classes = self.meta.get("classes")
        self.arrays = {}
        try:
            for path in self.folder.glob("*.npy"):
                self.arrays[path.stem] = np.load(path, mmap_mode="r")
            self.ids, self.wh, self.offsets, self.features, self.boxes = (
                self.arrays[name] for name in ("ids", "wh", "offsets", "features", "boxes")
            )
        except KeyError as error:
            raise self.error(f"lacks {error.args[0]}.npy") from None
        except Exception as error:
            # numpy's reader of headers raises whatever a broken header makes of it
            raise self.error(f"cannot be read: {str(error) or type(error).__name__}") from None
        self.checked_features = np.zeros(len(self.ids), bool)
        self.check_columns()

    def __reduce__(self):
        return type(self), (self.folder,)

    def __len__(self):
        return len(self.ids)

    def __str__(self):
        size = self.features.nbytes / 2**20
        return (
            f"{self.folder}: {len(self):,} images, {len(self.features):,} regions, "
            f"{size:,.0f} MiB memory-mapped"
        )

    def error(self, what):
        """A DataError about this store."""
        return DataError(
            f"{self.folder} {what}\n  Most often a copy or a conversion that stopped half way.\n"
            "  Make the store again: python data.py pack (toy data: delete the toy folder, the next"
            " run makes it again)."
        )

    def check_columns(self):
        """Every array has the kind and the shape that COLUMNS and PER_IMAGE say."""
        rows, N = len(self.features), len(self.ids)
        sizes = {"D_V": self.features.shape[-1], "C": self.classes}
        for name, values in self.arrays.items():
            if name in COLUMNS:
                dtype, shape = COLUMNS[name]
                wanted = rows, *(sizes.get(s, s) for s in shape)
            elif name in PER_IMAGE:
                dtype, wanted = PER_IMAGE[name], {"offsets": (N + 1,), "wh": (N, 2)}[name]
            else:
                continue
            if values.shape != wanted or values.dtype.kind != np.dtype(dtype).kind:
                raise self.error(
                    f"does not fit together: {name}.npy is {values.dtype} {values.shape}, "
                    f"wanted {np.dtype(dtype).name} {wanted}"
                )
        if N == 0:
            raise self.error("is empty")
        if self.offsets[0] != 0 or self.offsets[-1] != rows:
            raise self.error(
                f"does not fit together: offsets end at {self.offsets[-1]}, {rows} feature rows"
            )

    def check_rows(self, chunk=1 << 16):
        """Look at every box once; open_index() does it where it makes an index.

        In pieces, so that a store of any size takes the same memory.
        """
        if (np.diff(self.offsets) < 1).any():
            raise self.error("holds an image without regions")
        if len(np.unique(self.ids)) != len(self.ids):
            raise self.error(f"names {len(self.ids) - len(np.unique(self.ids))} images twice")
        for name, most in (("cls_id", self.classes and self.classes - 1), ("attr_id", None)):
            for start in range(0, len(self.arrays.get(name, ())), chunk):
                part = self.arrays[name][start : start + chunk]
                if part.min() < -1 or most and part.max() >= most:
                    raise self.error(f"has a {name} of {part.min()} or {part.max()}, of {most}")
        for start in range(0, len(self.ids), chunk):
            images = np.arange(start, min(start + chunk, len(self.ids)))
            rows = slice(int(self.offsets[start]), int(self.offsets[images[-1] + 1]))
            wh = np.repeat(self.wh[images], self.n_regions(images), axis=0)
            x1, y1, x2, y2 = np.asarray(self.boxes[rows]).T
            # float32 boxes of float arithmetic elsewhere
            slack = 1e-3 * wh + 1e-4
            inside = (x1 >= -slack[:, 0]) & (y1 >= -slack[:, 1])
            inside &= (x2 <= wh[:, 0] + slack[:, 0]) & (y2 <= wh[:, 1] + slack[:, 1])
            # a box with nan in it is wrong too
            wrong = ~(inside & (x2 >= x1) & (y2 >= y1))
            if wrong.any():
                row = rows.start + int(wrong.argmax())
                i = int(np.searchsorted(self.offsets, row, side="right") - 1)
                raise self.error(
                    f"has {int(wrong.sum())} bad boxes; the first is region "
                    f"{row - int(self.offsets[i])} of image {self.image_id(i)}: x1 y1 x2 y2 = "
                    f"{np.asarray(self.boxes[row]).round(1).tolist()} in an image of "
                    f"{self.wh[i].tolist()} pixels"
                )

    def stamps(self):
        """{file: (size, time)} of the store's own files: sources of every index made with it."""
        return {str(p): file_stamp(p) for p in self.folder.iterdir() if p.is_file()}

    def image_id(self, image):
        """The name of an image: what readers call it."""
        return self.ids[image].decode()

    def finder(self):
        """A function from a list of image ids to their numbers (n,), -1 where there is none."""
        order = np.argsort(self.ids, kind="stable")
        ordered = self.ids[order]

        def find(names):
            names = np.array([str(name).encode() for name in names], "S")
            at = np.searchsorted(ordered, names).clip(max=len(ordered) - 1)
            return np.where(ordered[at] == names, order[at], -1)

        return find

    def n_regions(self, images):
        """(B,) how many regions each of these images has"""
        images = np.asarray(images)
        return (self.offsets[images + 1] - self.offsets[images]).astype(np.int64)

    def column(self, name):
        """One of the store's arrays, or an error where a converter had nothing to put there."""
        if name not in self.arrays:
            raise DataError(
                f"{self.folder} has no {name}: {', '.join(sorted(self.arrays))}\n"
                "  Wanted: features of a detector with classes and attributes, such as "
                "LXMERT's 10-column TSV files, or python evaluate.py extract."
            )
        return self.arrays[name]

    def read(self, images, column="features"):
        """Rows of these images side by side: (B, N_V, ...) padded with 0."""
        values, n = self.column(column), self.n_regions(images)
        out = np.zeros((len(n), n.max(initial=0), *values.shape[1:]), values.dtype)
        for b, (start, k) in enumerate(zip(self.offsets[images], n)):
            out[b, :k] = values[start : start + k]
        if column == "features" and not self.checked_features[images].all():
            # looked at once an image: nan and inf have an exponent of ones
            odd = ((out.view(np.uint16) & 0x7C00) == 0x7C00).any(axis=(1, 2))
            if odd.any():
                name = self.image_id(images[int(odd.argmax())])
                raise self.error(f"holds nan or inf in the features of image {name}")
            self.checked_features[images] = True
        return out

    def most_certain(self, images):
        """(B, D_V) the first region of each image"""
        return self.features[self.offsets[images]]

    def relative_boxes(self, images):
        """(B, N_V, 4) float32, x1 y1 x2 y2 divided by width and height"""
        wh = np.tile(self.wh[images], 2)[:, None].astype(np.float32)
        return (self.read(images, "boxes") / wh).clip(0, 1)


class JoinedStore:
    """Images put together from images of other stores: VCR's annotated and detected boxes, NLVR2's
    left and right image.

    parts  [(store, images (N,), type)]: joined image i shows the regions of image images[i] of each
           part, one part after the other; type is the row of the model's type table that says
           which image a region is from, one number or (N,) of them
    """

    def __init__(self, parts):
        self.parts = [(s, np.asarray(i), np.broadcast_to(t, len(i))) for s, i, t in parts]
        self.classes, self.has_names = parts[0][0].classes, parts[0][0].has_names
        self.folder = " + ".join(dict.fromkeys(str(store.folder) for store, _, _ in parts))

    def __len__(self):
        return len(self.parts[0][1])

    def __str__(self):
        return f"{self.folder}: {len(self):,} images, joined"

    def check_rows(self):
        """As RegionStore's"""
        for store in {id(store): store for store, _, _ in self.parts}.values():
            store.check_rows()

    def stamps(self):
        """As RegionStore's"""
        return {k: v for store, _, _ in self.parts for k, v in store.stamps().items()}

    def image_id(self, image):
        """The names of its parts"""
        names = [store.image_id(images[image]) for store, images, _ in self.parts]
        return " ".join(dict.fromkeys(names))

    def finder(self):
        """By the name in the first part"""
        find = self.parts[0][0].finder()
        of_first = np.full(len(self.parts[0][0]), -1)
        of_first[self.parts[0][1]] = np.arange(len(self))
        return lambda names: np.where((at := find(names)) < 0, -1, of_first[at])

    def n_regions(self, images):
        """(B,) how many regions each of these images has"""
        return sum(store.n_regions(own[images]) for store, own, _ in self.parts)

    def join(self, images, pieces):
        """pieces: one array (B, N, ...) a part; the real regions of each side by side"""
        counts = [store.n_regions(own[images]) for store, own, _ in self.parts]
        width = sum(counts).max(initial=0)
        out = np.zeros((len(images), width, *pieces[0].shape[2:]), pieces[0].dtype)
        start = np.zeros(len(images), np.int64)
        for piece, n in zip(pieces, counts):
            real = length_mask(n, piece.shape[1])
            row, column = np.nonzero(real)
            out[row, column + start[row]] = piece[real]
            start += n
        return out

    def read(self, images, column="features"):
        """As RegionStore's"""
        return self.join(images, [s.read(own[images], column) for s, own, _ in self.parts])

    def relative_boxes(self, images):
        """As RegionStore's"""
        return self.join(images, [s.relative_boxes(own[images]) for s, own, _ in self.parts])

    def region_types(self, images):
        """(B, N_V) int64 rows of the type table, 0 in padding"""
        pieces = []
        for store, own, kind in self.parts:
            width = max(1, store.n_regions(own[images]).max(initial=0))
            pieces.append(np.repeat(kind[images, None], width, 1).astype(np.int64))
        return self.join(images, pieces)


# Folders of each region store's pictures, in the data tree.
PICTURES = {
    "coco": ("coco/train2014", "coco/val2014", "coco/test2015"),
    "flickr30k": ("flickr30k/flickr30k-images",),
    "vg": ("vg/VG_100K", "vg/VG_100K_2"),
    "gqa": ("gqa/images",),
    "winoground": ("winoground/images",),
    "nlvr2": ("nlvr2/images",),
    "cc3m_train": ("cc3m/images",),
    "cc3m_val": ("cc3m/images",),
    "cc12m": ("cc12m/images",),
    "sbu": ("sbu/images",),
    "refclef": ("refclef/images",),
    "nlvr": ("nlvr",),
    "own": ("own/images",),
}
# of red, green, blue [ALBEF's code]
PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Vision(NamedTuple):
    """Where an encoder finds what it sees: region stores, or the data sets' own pictures."""

    data: str  # the data tree
    regions: str = ""  # folder of region stores; "": pictures in patches
    resolution: int = 0  # pictures become squares of so many pixels
    patch: int = 0  # cut into patches of so many

    def open(self, name):
        """The store of this name, e.g. "coco"; "vcr" is two of them, joined."""
        if self.regions and name == "vcr":
            return vcr_store(self.regions)
        if self.regions and name == "vg_crops":
            raise DataError("--corpora crops is of pictures\n  Wanted: --vision patches")
        if self.regions:
            return RegionStore(Path(self.regions) / name)
        store = CropStore if name == "vg_crops" else PatchStore
        return store(self.data, name, self.resolution, self.patch)


def vcr_store(regions):
    """VCR's annotated boxes, then the detector's, of the images that both have."""
    annotated, detected = (RegionStore(Path(regions) / name) for name in ("vcr_gt", "vcr_det"))
    at = detected.finder()([name.decode() for name in annotated.ids])
    return JoinedStore([(annotated, np.flatnonzero(at >= 0), 1), (detected, at[at >= 0], 1)])


def walk_pictures(data, name):
    """Yields (image id, path) of a store's pictures, wherever the data set keeps them; folders
    inside these are looked into.
    """
    for folder in (Path(data) / place for place in PICTURES.get(name, ())):
        for at, _, files in os.walk(folder):
            # adding or removing a file changes its folder's time
            sources.setdefault(at, file_stamp(at))
            for file in files:
                if file.lower().endswith((".jpg", ".jpeg", ".png")):
                    yield file.rsplit(".", 1)[0].removeprefix(f"{name}_"), os.path.join(at, file)


def find_picture(data, name, image_id):
    """The path of one picture of a store."""
    folders = [Path(data) / place for place in PICTURES.get(name, ())]
    for folder in folders:
        for suffix in (".jpg", ".png", ".jpeg"):
            if (folder / f"{image_id}{suffix}").exists():
                return folder / f"{image_id}{suffix}"
    raise DataError(
        f"the picture {image_id} is in none of {', '.join(map(str, folders))}\n"
        "  Wanted: a .png or .jpg. Figures need the pictures."
    )


class PatchStore:
    """Pictures as regions: each is resized to a square and cut into a grid of patches, row by row.
    Nothing is read but what is asked for.

    features  (3 p p,) a patch's pixels, less the mean, by the deviation: what a matrix makes of
              them is a ViT's patch embedding
    boxes     the grid's cells
    cls_prob  (513,) which colours the patch has, a share of each: red, green and blue in eight
              steps [as ViT's self-supervision, Dosovitskiy et al. 2021 sec. 4.6]; class 0, the
              background, is never there. cls_id, cls_conf: the commonest; no attributes

    Small pictures stay in memory once read.
    """

    # bytes of pictures that are kept
    KEPT, has_names = 2**30, False

    def __init__(self, data, name, resolution, patch):
        self.args = data, name, resolution, patch
        self.folder = f"{data}, pictures of {name}"
        place = Path(data) / "index" / f"pictures-{name}"
        arrays, self.meta = memory_mapped(place, [type(self).__name__, 1], self.list_pictures)
        self.set_pictures(arrays, resolution, patch)

    def __reduce__(self):
        return type(self), self.args

    def list_pictures(self):
        """Arrays of the pictures' names and paths, and what was counted."""
        data, name = self.args[:2]
        found = dict(walk_pictures(data, name))
        if not found:
            raise DataError(
                f"no pictures of {name} in {', '.join(PICTURES.get(name, ())) or data} of {data}\n"
                "  Wanted: .jpg or .png files. Fetch them from the data set's own address."
            )
        names = sorted(found)
        paths = [os.path.relpath(found[i], data).encode() for i in names]
        return {"ids": np.array([i.encode() for i in names]), "paths": np.array(paths)}, {}

    def set_pictures(self, arrays, resolution, patch):
        """Sizes and the grid of cells."""
        if patch < 1 or resolution % patch:
            raise DataError(
                f"pictures of {resolution} pixels do not divide into patches of {patch}\n"
                "  Wanted: --resolution a multiple of --patch"
            )
        self.ids, self.arrays = arrays["ids"], arrays
        self.resolution, self.patch, self.classes = resolution, patch, 1 + 8**3
        y, x = np.mgrid[0:resolution:patch, 0:resolution:patch].reshape(2, -1)
        corners = np.stack([x, y, x + patch, y + patch], axis=1)
        self.cells = corners.astype(np.float32) / resolution
        shape = len(self.ids), resolution, resolution, 3
        self.kept = np.zeros(shape, np.uint8) if math.prod(shape) <= self.KEPT else None
        self.known = np.zeros(len(self.ids), bool)

    def __len__(self):
        return len(self.ids)

    def __str__(self):
        return (
            f"{self.folder}: {len(self):,} of {self.resolution} x {self.resolution} "
            f"in patches of {self.patch}"
        )

    image_id, finder = RegionStore.image_id, RegionStore.finder

    def check_rows(self):
        """Pictures are looked at when they are read."""

    def stamps(self):
        """The folders that were looked into"""
        tree = Path(self.args[0])
        return {str(tree / name): stamp for name, stamp in self.meta["sources"].items()}

    def path(self, image):
        """Where the picture is"""
        return Path(self.args[0]) / self.arrays["paths"][image].decode()

    def n_regions(self, images):
        """(B,) the same for all"""
        return np.full(len(images), len(self.cells))

    @functools.cached_property
    def wh(self):
        """(N, 2) width and height of the pictures themselves; needed where boxes in pixels are"""
        bar = tqdm(range(len(self)), desc=f"sizes of {self.folder}", disable=None, leave=False)
        return np.array([self.size(i) for i in bar], np.int32)

    def relative_boxes(self, images):
        """(B, N_V, 4) the cells"""
        return np.repeat(self.cells[None], len(images), 0)

    def size(self, image):
        """(width, height) of the picture itself"""
        with Image.open(self.path(image)) as picture:
            turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return picture.size[::-1] if turned else picture.size

    def pixels(self, images):
        """(B, R, R, 3) uint8"""
        if self.kept is None:
            return np.stack([self.load(i) for i in images])
        for i in images[~self.known[images]]:
            self.kept[i] = self.load(i)
            self.known[i] = True
        return self.kept[images]

    def load(self, image):
        """(R, R, 3) uint8 of one picture"""
        return open_picture(self.path(image), self.resolution)

    def most_certain(self, images):
        """(B, D_V) the patch in the middle"""
        if not len(images):
            return np.zeros((0, 3 * self.patch**2), np.float16)
        return self.read(images)[:, len(self.cells) // 2]

    def read(self, images, column="features"):
        """As RegionStore's"""
        images = np.asarray(images)
        if column == "boxes":
            return self.cells * np.tile(self.wh[images], 2)[:, None].astype(np.float32)
        if column in ("attr_id", "attr_conf"):
            unknown = -1 if column == "attr_id" else 0
            return np.full((len(images), len(self.cells)), unknown, np.int64)
        pattern = "B (h p) (w q) c -> B (h w) (p q) c"
        x = rearrange(self.pixels(images), pattern, p=self.patch, q=self.patch)
        if column == "features":
            x = (x / np.float32(255) - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)
            return x.astype(np.float16).reshape(*x.shape[:2], -1)
        share = self.colour_shares(x)
        if column == "cls_prob":
            return share.astype(np.float16)
        return share.argmax(-1) - 1 if column == "cls_id" else share.max(-1)

    def colour_shares(self, x):
        """(B, N, 513) of the pixels x (B, N, p p, 3) of patches"""
        code = 1 + (x >> 5) @ np.array([64, 8, 1])  # (B, N, p p)
        patch_number = np.arange(code.shape[0] * code.shape[1]).reshape(*code.shape[:2], 1)
        bins = (patch_number * self.classes + code).ravel()
        count = np.bincount(bins, minlength=patch_number.size * self.classes)
        return count.reshape(*code.shape[:2], -1) / code.shape[2]


class CropStore(PatchStore):
    """Visual Genome's regions as pictures of their own, with some of what is around them: anything
    from the region alone to the whole.

    Image id = image/number of the region, as vg_crops has it; how much is around it is a function
    of that.
    """

    def list_pictures(self):
        data = self.args[0]
        pictures, images = dict(walk_pictures(data, "vg")), vg_images(data)
        ids, paths, windows = [], [], []
        for name, region, box in vg_regions(data):
            record = images.get(int(name))
            if name in pictures and record and clip_box(*box, record):
                rng = np.random.default_rng([int(name), region])
                ids.append(f"{name}/{region}".encode())
                paths.append(os.path.relpath(pictures[name], data).encode())
                windows.append(crop_window(rng, box, record))
        if not ids:
            raise DataError(f"no pictures of Visual Genome's regions in {data}/vg")
        return {"ids": np.array(ids), "paths": np.array(paths), "windows": np.array(windows)}, {}

    def load(self, image):
        window = tuple(self.arrays["windows"][image].tolist())
        return open_picture(self.path(image), self.resolution, window)


def crop_window(rng, box, record):
    """A window of the picture (left, top, right, bottom) round a box x y w h, its sides between the
    box's and the picture's, as likely each time as large.
    """
    spans = []
    for at, length, whole in (
        (box[0], box[2], record["width"]),
        (box[1], box[3], record["height"]),
    ):
        length = min(max(length, 1), whole)
        wide = length * (whole / length) ** rng.random()
        lowest, highest = max(0, at + length - wide), min(max(0, at), whole - wide)
        start = rng.uniform(lowest, highest) if wide < whole else 0
        spans.append((start, start + wide))
    (left, right), (top, bottom) = spans
    return left, top, right, bottom


def open_picture(path, resolution, window=None):
    """A picture, or a window of it, as (R, R, 3) uint8, resized whatever its shape."""
    # decoded at a half, a quarter if that is almost enough
    picture = read_picture(path, None if window else resolution * 7 // 8)
    return np.asarray(picture.resize((resolution, resolution), Image.BICUBIC, window))


def read_picture(path, enough=None):
    """A picture, upright and in colour; enough: a JPEG may be decoded at a fraction of its size
    that is not below this.

    One that cannot be read or is too large to be real (a decompression bomb) is a DataError.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                if enough:
                    picture.draft("RGB", (enough, enough))
                picture.load()
                return upright(picture)
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        raise DataError(
            f"{path} cannot be read as a picture: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}\n"
            "  Most often a download that stopped half way, or an error page saved as a picture. "
            "Fetch it again, or remove it."
        ) from None


def upright(picture):
    """As a camera held it (EXIF), and red, green, blue of 8 bits, whatever it was: grey, palette,
    CMYK, 16 bits, transparent on white.
    """
    if picture.getexif().get(0x0112, 1) != 1:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    # 16 bits a pixel or more: Pillow would cut them off
    if picture.mode.startswith(("I", "F")):
        x = np.asarray(picture, np.float64)
        picture = Image.fromarray(
            (x / (65535 if x.max() > 255 else 255) * 255).clip(0, 255).astype(np.uint8)
        )
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


# NLVR's structured representations name shapes, colours and sizes. Features of such regions are
# sums of one random vector for each; tests/toy.py draws its world with the same ones.
SHAPES = "circle", "square", "triangle", "star", "cross", "diamond"
COLOURS = "red", "green", "blue", "yellow", "black", "purple"
SIZES = "small", "medium", "large"


def appearance(width=2048):
    """Features of all things: (shapes + box, colours + grey, sizes, width), cut at zero as
    mean-pooled ReLU features are; no position. The same in every tree, as one detector serves
    every data set.
    """
    rng = np.random.default_rng(2048)
    numbers = len(SHAPES) + 1, len(COLOURS) + 1, len(SIZES)
    s, c, z = (rng.standard_normal((n, width)).astype(np.float32) for n in numbers)
    return (0.6 * s[:, None, None] + 0.6 * c[None, :, None] + 0.3 * z[None, None, :]).clip(0)


class NlvrStore(RegionStore):
    """NLVR's structured representations as regions: the three grey boxes and their items, in each
    of the six orders of the boxes.

    Image id = identifier-k, the k-th order, as the official picture's name.
    """

    def __init__(self, data, split):
        looks = appearance()
        self.args, self.folder = (data, split), f"{data}/nlvr/{split}, structured_rep"
        self.table = looks.reshape(-1, looks.shape[-1]).astype(np.float16)
        grey = np.ravel_multi_index((len(SHAPES), len(COLOURS), 2), looks.shape[:3])
        kinds, boxes, counts, ids = [], [], [], []
        for record in nlvr_presentations(data, split, Counter(), orders=1):
            for k, order in enumerate(permutations(range(3))):
                before = len(kinds)
                for at, b in enumerate(order):
                    kinds.append(int(grey))
                    boxes.append((150 * at, 0, 150 * at + 100, 100))
                    for shape, colour, size, x, y in record.note[b]:
                        place = SHAPES.index(shape), COLOURS.index(colour), size // 10 - 1
                        kinds.append(int(np.ravel_multi_index(place, looks.shape[:3])))
                        right, low = min(x + size, 100), min(y + size, 100)
                        boxes.append((150 * at + x, y, 150 * at + right, low))
                counts.append(len(kinds) - before)
                ids.append(f"{record.id[:-2]}-{k}".encode())
        self.ids, self.offsets = np.array(ids), np.cumsum([0, *counts])
        self.features, self.boxes = np.array(kinds), np.array(boxes, np.float32)
        self.arrays = {"kind": self.features, "boxes": self.boxes}
        self.wh = np.tile(np.array([[400, 100]], np.int32), (len(ids), 1))
        self.classes, self.checked_features = 2 + len(SHAPES), np.zeros(len(ids), bool)

    def __reduce__(self):
        return type(self), self.args

    def stamps(self):
        path = Path(self.args[0]) / "nlvr" / self.args[1] / f"{self.args[1]}.json"
        return {str(path): file_stamp(path)}

    def read(self, images, column="features"):
        if column == "features":
            return self.table[super().read(images, "kind")]
        return super().read(images, column)

    def most_certain(self, images):
        return self.table[self.features[self.offsets[images]]]


class StoreWriter:
    """Writes a store image by image, beside its place; commit() puts it there whole.

    Restartable: every `every` images the files are flushed and what is done is noted in
    progress.json; names, sizes and counts go to rows.jsonl, a line an image, so that an image
    costs the same however many came before. A writer opened on the same place later cuts what
    lies behind the note, and `done` says how many images to skip.
    """

    def __init__(self, folder, columns, meta, every=256):
        self.folder, self.tmp = Path(folder), Path(f"{folder}.tmp")
        self.meta, self.every = meta, every
        if self.folder.exists():
            raise DataError(
                f"{folder} exists already\n"
                "  Wanted: a new place. Choose another --out, or delete it first."
            )
        self.tmp.mkdir(parents=True, exist_ok=True)
        sizes = {"D_V": meta["features"], "C": meta.get("classes")}
        self.spec = {}
        for name in columns:
            dtype, shape = COLUMNS[name]
            self.spec[name] = np.dtype(dtype), tuple(sizes.get(s, s) for s in shape)
        note = self.tmp / "progress.json"
        state = json.loads(note.read_text()) if note.exists() else {}
        if state and (state["meta"] != meta or state["columns"] != list(columns)):
            raise DataError(
                f"{self.tmp} was begun from something else: {state['meta']}\n"
                f"  Wanted: {meta}\n  Delete {self.tmp} to start again."
            )
        self.done, self.rows = state.get("images", 0), state.get("rows", 0)
        self.files = {}
        mode = "r+b" if state else "w+b"
        for name, (dtype, shape) in self.spec.items():
            self.files[name] = open(self.tmp / f"{name}.npy", mode)
            self.write_header(name)
            self.files[name].seek(128 + self.rows * dtype.itemsize * math.prod(shape))
            self.files[name].truncate()
        self.list = open(self.tmp / "rows.jsonl", mode)
        self.list.seek(state.get("list_bytes", 0))
        self.list.truncate()

    def write_header(self, name):
        """npy version 1.0 in 128 bytes, so that the row count can be filled in later without
        moving the rows.
        """
        dtype, shape = self.spec[name]
        header = {"descr": dtype.str, "fortran_order": False, "shape": (self.rows, *shape)}
        text = repr(header).ljust(117) + "\n"
        self.files[name].seek(0)
        self.files[name].write(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little"))
        self.files[name].write(text.encode())

    def add(self, image_id, wh, **columns):
        """columns: one array (n, ...) for each column of the store"""
        n = len(columns["boxes"])
        for name, (dtype, shape) in self.spec.items():
            values = np.asarray(columns[name])
            if values.shape != (n, *shape):
                wanted = (n, *shape)
                raise DataError(f"image {image_id}: {name} is {values.shape}, wanted {wanted}")
            self.files[name].write(np.ascontiguousarray(values, dtype).tobytes())
        line = json.dumps([str(image_id), n, *(int(x) for x in wh)])
        self.list.write(line.encode() + b"\n")
        self.rows, self.done = self.rows + n, self.done + 1
        if self.done % self.every == 0:
            self.flush()

    def flush(self):
        """What was added so far survives a kill."""
        for file in (*self.files.values(), self.list):
            file.flush()
            os.fsync(file.fileno())
        state = {"meta": self.meta, "columns": list(self.spec), "images": self.done}
        state |= {"rows": self.rows, "list_bytes": self.list.tell()}
        write_atomic(self.tmp / "progress.json", json.dumps(state))

    def commit(self):
        """Fill in the row counts, write the small files with a checksum of each array, rename."""
        for name, file in self.files.items():
            self.write_header(name)
            file.close()
        self.list.seek(0)
        listed = [json.loads(line) for line in self.list]
        self.list.close()
        counts = np.array([n for _, n, _, _ in listed], np.int64)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(PER_IMAGE["offsets"])
        np.save(self.tmp / "offsets.npy", offsets)
        wh = np.array([row[2:] for row in listed], PER_IMAGE["wh"]).reshape(-1, 2)
        np.save(self.tmp / "wh.npy", wh)
        np.save(self.tmp / "ids.npy", np.array([row[0].encode() for row in listed]))
        sums = {}
        for file in sorted(self.tmp.glob("*.npy")):
            with open(file, "rb") as handle:
                sums[file.name] = hashlib.file_digest(handle, "sha256").hexdigest()
        meta = {**self.meta, "images": self.done, "regions": self.rows, "sha256": sums}
        write_atomic(self.tmp / "meta.json", json.dumps(meta, indent=1))
        (self.tmp / "progress.json").unlink(missing_ok=True)
        (self.tmp / "rows.jsonl").unlink()
        os.replace(self.tmp, self.folder)


def decode(text, dtype, shape, where):
    """One base64 column of a TSV row."""
    try:
        array = np.frombuffer(base64.b64decode(text, validate=True), dtype)
        return array.reshape(shape)
    except ValueError as error:
        raise DataError(
            f"{where}: expected {np.dtype(dtype).name} {tuple(shape)}: {error}\n"
            "  Fetch the file again."
        ) from None


def tsv_rows(path, skip=0):
    """Yields rows of an LXMERT (10 columns) or BUTD (6 columns) feature file: (image id, (w, h),
    columns); None for the first `skip`.
    """
    with open(path, encoding="ascii", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if number <= skip:
                yield None
                continue
            cells, where = line.rstrip("\n").split("\t"), f"{path}, line {number}"
            if len(cells) not in (6, 10):
                raise DataError(
                    f"{where} has {len(cells)} columns: wanted 10 (LXMERT) or 6 (bottom-up "
                    "attention)\n"
                    "  Most often a download that stopped half way: fetch the file again."
                )
            try:
                h, w, n = (int(cells[i]) for i in ((1, 2, 7) if len(cells) == 10 else (2, 1, 3)))
            except ValueError:
                raise DataError(
                    f"{where}: image size or box count is no whole number: {cells[1:4]}"
                ) from None
            features = base64.b64decode(cells[-1]) if len(cells[-1]) % 4 == 0 else b""
            if n < 1 or not features or len(features) % (4 * n):
                raise DataError(
                    f"{where} (image {cells[0]}): {len(features):,} bytes of features for {n} "
                    "boxes\n  Fetch the file again."
                )
            columns = {
                "boxes": decode(cells[-2], "<f4", (n, 4), where).copy(),
                "features": np.frombuffer(features, "<f4").reshape(n, -1),
            }
            if len(cells) == 10:
                for name, i, dtype in (
                    ("cls_id", 3, "<i8"),
                    ("cls_conf", 4, "<f4"),
                    ("attr_id", 5, "<i8"),
                    ("attr_conf", 6, "<f4"),
                ):
                    columns[name] = decode(cells[i], dtype, (n,), where)
            yield cells[0], (w, h), columns


def npz_rows(folder, sizes, skip=0):
    """Yields UNITER's npz files in order of name, as tsv_rows. They do not hold the image size:
    sizes = {image id: (w, h)}, else the unit square.
    """
    for number, path in enumerate(sorted(Path(folder).glob("*.npz"))):
        if number < skip:
            yield None
            continue
        try:
            z = np.load(path, allow_pickle=False)
            features, boxes = z["features"], z["norm_bb"][:, :4]
            conf, probs = z["conf"].ravel(), z["soft_labels"]
        except (ValueError, OSError, KeyError, zipfile.BadZipFile, EOFError) as error:
            raise DataError(
                f"{path} cannot be read ({path.stat().st_size:,} bytes): {error}\n"
                "  Wanted: UNITER's npz with features, norm_bb, "
                "conf, soft_labels.\n  Most often a download or a copy that stopped half way: "
                "fetch it again."
            ) from None
        # UNITER's rule [authors' code]
        n = int(np.clip((conf > 0.2).sum(), 10, 100))
        name = uniter_image_id(path.stem)
        w, h = sizes.get(name, (1, 1))
        columns = {
            "features": features[:n],
            "boxes": (boxes[:n] * [w, h, w, h]).astype("<f4"),
            "cls_prob": probs[:n],
            "cls_conf": conf[:n],
            "cls_id": probs[:n, 1:].argmax(axis=1),
        }
        yield name, (w, h), columns


def uniter_image_id(stem):
    """coco_train2014_000000000042, visual_grounding_coco_gt_000000000042 ->
    COCO_train2014_000000000042; flickr30k_000001000092795 -> 1000092795;
    nlvr2_dev-850-0-img0 -> dev-850-0-img0; vcr_gt_val_1001_Film_00.11@3 -> 1001_Film_00.11@3"""
    if stem.startswith("coco_"):
        return "COCO_" + stem[5:]
    if stem.startswith("visual_grounding_"):  # RefCOCO's images are all of train2014
        return "COCO_train2014_" + stem[-12:]
    if found := re.match(r"nlvr2_|vcr_(?:gt_)?(?:train|val|test)_", stem):
        return stem[found.end() :]
    head, _, tail = stem.rpartition("_")
    return str(int(tail)) if head and tail.isdigit() else stem


def pack(sources, out, images=None):
    """Convert LXMERT's or BUTD's TSV files, or folders of UNITER's npz files, into one region
    store. Streams; may be killed and restarted.

    images: folder of the pictures, to read their sizes from (npz only; without it boxes stay
    relative and wh is 1 x 1)
    """
    paths = [need(s, "a .tsv file or a folder of .npz files", "Check the path.") for s in sources]
    sizes = picture_sizes(images) if images and any(p.is_dir() for p in paths) else {}
    first = next(source_rows(paths, sizes), None)
    if first is None:
        raise DataError(
            f"{paths[0]} holds no {'npz files' if paths[0].is_dir() else 'rows'}\n"
            "  Wanted: features to convert. Check the path."
        )
    columns = [name for name in COLUMNS if name in first[2]]
    meta = {
        "source": " ".join(map(str, paths)),
        "features": first[2]["features"].shape[1],
        "classes": first[2]["cls_prob"].shape[1] if "cls_prob" in columns else None,
    }
    writer, num_clipped = StoreWriter(out, columns, meta), 0
    bar = tqdm(initial=writer.done, desc=f"pack {out}", unit=" images", disable=None)
    for packed in source_rows(paths, sizes, writer.done):
        if packed is None:
            continue
        image_id, (w, h), row = packed
        inside, where = row["boxes"].clip(0, [w, h, w, h]), f"{meta['source']}, image {image_id}"
        if not np.isfinite(row["boxes"]).all() or not np.isfinite(row["features"]).all():
            raise DataError(f"{where}: nan or inf in boxes or features\n  Fetch the file again.")
        moved = np.abs(inside - row["boxes"])
        if (inside[:, 2:] < inside[:, :2]).any() or moved.max() > max(w, h):
            raise DataError(
                f"{where}: a box with x2 < x1 or far outside its {w} x {h} image: "
                f"{row['boxes'].tolist()[0]}"
            )
        num_clipped += int((moved > 0).any(axis=1).sum())
        writer.add(image_id, (w, h), **row | {"boxes": inside})
        bar.update()
    bar.close()
    writer.commit()
    print(
        f"{out}: {writer.done:,} images, {writer.rows:,} regions of width "
        f"{meta['features']}, {num_clipped} boxes clipped to their image"
    )


def source_rows(paths, sizes, skip=0):
    """Rows of all files to pack, one after the other; None for the first `skip`."""
    for path in paths:
        rows = npz_rows(path, sizes, skip) if path.is_dir() else tsv_rows(path, skip)
        number = 0
        for number, row in enumerate(rows, 1):
            yield row
        skip = max(0, skip - number)


def picture_sizes(folder):
    """{file stem: (width, height)} of the pictures in a folder"""
    sizes = {}
    for path in tqdm(sorted(Path(folder).rglob("*.*")), desc="image sizes", disable=None):
        with contextlib.suppress(OSError), Image.open(path) as picture:
            sizes[path.stem] = picture.size
    return sizes


# 4. Readers -------------------------------------------------------------------------------------
# A reader is a generator of Records over official files: reader(data tree, split, stats, ...). It
# keeps nothing; what it leaves out it counts in stats, a Counter, which the start banner shows.


class Record(NamedTuple):
    """A text about an image, as the model reads them together."""

    # the image's id in the region store; a pair of ids where a text is about two images
    image: object
    # the text, or its segments: ((row of the type table, text), ...)
    text: object
    # for messages and result files
    id: str
    # what is right: a number, {number: score in [0, 1]}, or None where nobody knows
    target: object = None
    # boxes that the text describes
    boxes: tuple = ()
    # ((first word, end word, box), ...): blank-separated words that mean this box, x1 y1 x2 y2
    # pixels
    pointers: tuple = ()
    # what the official evaluation needs to know besides; never in the index
    note: object = None


def caption_images(path):
    """A captions file in COCO's format, and {image id: its record, with "stem" added}."""
    whole, images = read_json(path, "caption annotations in COCO's format"), {}
    for record in field(whole, "images", path, list):
        stem = Path(field(record, "file_name", f"{path}, images[]", str)).stem
        images[field(record, "id", f"{path}, images[]")] = {**record, "stem": stem}
    return whole, images


def read_captions(path):
    """Yields the Records of a captions file in COCO's format. Image id = file stem."""
    whole, images = caption_images(path)
    for a in field(whole, "annotations", path, list):
        where = f"{path}, annotation {a.get('id') if isinstance(a, dict) else a}"
        image = field(a, "image_id", where)
        if image not in images:
            raise DataError(
                f"{where} is about image {image}, which is not in the file's images list\n"
                "  Fetch the file again."
            )
        yield Record(images[image]["stem"], field(a, "caption", where, str), str(a.get("id")))


def caption_file(data, split):
    """COCO 2014's caption file. split: train2014, val2014"""
    return Path(data) / "coco" / "annotations" / f"captions_{split}.json"


def coco_captions(data, split, stats):
    """COCO 2014 captions. split: train2014, val2014."""
    return read_captions(caption_file(data, split))


def own_captions(data, split, stats):
    """Your own: DATA/own/captions.json in COCO's format, pictures in DATA/own/images. The last
    tenth is for validation.
    """
    return split_off(read_captions(Path(data) / "own" / "captions.json"), split, 10)


def karpathy_images(data, dataset):
    """Karpathy's records of a data set's images, and the file's path."""
    path = Path(data) / dataset / f"dataset_{dataset}.json"
    return field(read_json(path, f"Karpathy's split of {dataset}"), "images", path, list), path


def karpathy_captions(data, split, stats, dataset="coco"):
    """COCO or Flickr30k captions in Karpathy's split: train (COCO: with restval, as every paper),
    val, test. Of COCO the first five captions of an image. Image id = file stem.
    """
    images, path = karpathy_images(data, dataset)
    wanted = ("train", "restval") if split == "train" else (split,)
    for image in images:
        if field(image, "split", path) in wanted:
            stem = Path(field(image, "filename", path)).stem
            sentences = field(image, "sentences", path, list)
            for s in sentences[:5] if dataset == "coco" else sentences:
                yield Record(stem, field(s, "raw", path, str), str(s.get("sentid")))


def winoground_examples(data, split, stats):
    """Winoground's 400 examples (the toy tree: fewer); two Records each, caption i with image i.
    note = the tag.
    """
    path = Path(data) / "winoground" / "examples.jsonl"
    for e in read_json_lines(path, "Winoground's examples"):
        for i in (0, 1):
            image, text = field(e, f"image_{i}", path), field(e, f"caption_{i}", path, str)
            name = f"{field(e, 'id', path)}/{i}"
            yield Record(image, text, name, note=e.get("collapsed_tag", ""))


def read_label(record, where):
    """The label of NLVR and NLVR2, a string in capitals or not; None where a test set has none."""
    label = str(record.get("label", "")).lower()
    if label not in ("true", "false", ""):
        raise DataError(f"{where}: label {record['label']!r}, wanted true or false")
    return {"true": 1, "false": 0, "": None}[label]


def nlvr_presentations(data, split, stats, orders=6):
    """NLVR v1: sentences about three boxes of shapes, true or false; target = 1 or 0.

    A Record each of the first so many orders of the boxes; note = the three boxes' items as their
    structured_rep has them: (shape, colour, size in pixels, x, y).
    """
    path = Path(data) / "nlvr" / split / f"{split}.json"
    colours = {"yellow": "yellow", "black": "black", "#0099ff": "blue"}
    for e in read_json_lines(path, "NLVR v1: clone lil-lab/nlvr, folder nlvr"):
        where = f"{path}, {e.get('identifier')}"
        try:
            boxes = [
                [
                    (i["type"], colours[i["color"].lower()], i["size"], i["x_loc"], i["y_loc"])
                    for i in box
                ]
                for box in field(e, "structured_rep", where)
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{where}: an item of structured_rep lacks or has an unknown {error}"
            ) from None
        field(e, "label", where)
        name, text = f"{split}-{field(e, 'identifier', where)}", field(e, "sentence", where, str)
        for k in range(orders):
            yield Record(f"{name}-{k}", text, f"{name}-{k}", read_label(e, where), note=boxes)


# ------------------------------------------------------- pre-training corpora (UNITER table 1)


def flickr_photo(url):
    """The photo's number in a Flickr address, which Flickr30k's file names are; "" elsewhere."""
    pattern = r"flickr\.com/.*?/(\d+)_[0-9a-zA-Z]+(?:_[a-z0-9])?\.(?:jpg|png|gif)"
    found = re.search(pattern, str(url or ""))
    return found[1] if found else ""


class HeldOut(NamedTuple):
    """Images that pre-training may not see: a downstream task is evaluated on them.

    UNITER sec. A.1
    """

    coco: set  # COCO image ids
    photos: set  # Flickr photo numbers of Flickr30k
    counts: dict  # {which list: how many images}


def held_out(data):
    """Read the lists from whatever of these files is there: Karpathy's val and test, RefCOCO/+/g's
    val and test, Flickr30k's photos.
    """
    data, coco_ids, counts = Path(data), set(), {}
    karpathy = karpathy_images(data, "coco")[0]
    for split in ("val", "test"):
        ids = {i["cocoid"] for i in karpathy if i["split"] == split}
        counts[f"Karpathy {split}"], coco_ids = len(ids), coco_ids | ids
    for name in REFER:
        if exists(data / "refer" / name / f"refs({REFER[name]}).p"):
            ids = {ref["image_id"] for ref in read_refs(data, name) if ref["split"] != "train"}
            counts[f"{name} val, test"], coco_ids = len(ids), coco_ids | ids
        else:
            counts[f"{name} (not there)"] = 0
    photos = set()
    if exists(data / "flickr30k" / "dataset_flickr30k.json"):
        photos = {Path(i["filename"]).stem for i in karpathy_images(data, "flickr30k")[0]}
    tokens = data / "flickr30k" / "results_20130124.token"
    if exists(tokens):
        lines = read_text(tokens, "Flickr30k's captions").splitlines()
        photos |= {line.split(".jpg#")[0] for line in lines}
    return HeldOut(coco_ids, photos, counts)


def coco_corpus(data, split, stats):
    """UNITER's COCO: train2014 and val2014 together without what is held out; validation is
    Karpathy's val.
    """
    if split == "val":
        yield from karpathy_captions(data, "val", stats)
        return
    out = held_out(data)
    stats.update({f"images held out, {name}": n for name, n in out.counts.items()})
    for part in ("train2014", "val2014"):
        images = {}
        for number, record in caption_images(caption_file(data, part))[1].items():
            also = number not in out.coco and flickr_photo(record.get("flickr_url")) in out.photos
            stats["images held out, also in Flickr30k"] += also
            images[record["stem"]] = number not in out.coco and not also
        yield from (r for r in coco_captions(data, part, stats) if images[r.image])


def vg_images(data):
    """Visual Genome's {image id: record}."""
    path = Path(data) / "vg" / "image_data.json"
    records = read_json(path, "Visual Genome's image_data.json")
    images = {field(i, "image_id", path): i for i in records}
    for number, record in images.items():
        for side in ("width", "height"):
            field(record, side, f"{path}, image {number}", NUMBER)
    return images


def vg_items(data, name, key):
    """Yields (image, its records, where that is) of one of Visual Genome's files."""
    path = Path(data) / "vg" / f"{name}.json"
    records = read_json(path, f"Visual Genome's {name}")
    for item in tqdm(records, desc=f"Visual Genome's {name}", disable=None, leave=False):
        image = field(item, "id" if "id" in (item or ()) else "image_id", path)
        where = f"{path}, image {image}"
        yield image, field(item, key, where, list), where


def vg_box(record, where, names=("x", "y", "width", "height")):
    """[x, y, w, h] of one of Visual Genome's records"""
    return [field(record, name, where, NUMBER) for name in names]


def clip_box(x, y, w, h, image):
    """x y w h of a box -> x1 y1 x2 y2 inside its image, None if nothing is left of it."""
    x1, y1, x2, y2 = max(0, x), max(0, y), min(x + w, image["width"]), min(y + h, image["height"])
    return (x1, y1, x2, y2) if x2 > x1 and y2 > y1 else None


def vg_split(data, split, stats):
    """Visual Genome's images of a split, {id: record}: val are those in Karpathy's COCO val."""
    images = vg_images(data)
    if split == "val":
        validation = {i["cocoid"] for i in karpathy_images(data, "coco")[0] if i["split"] == "val"}
        return {n: i for n, i in images.items() if i.get("coco_id") in validation}
    out = held_out(data)
    kept = {}
    for number, record in images.items():
        if record.get("coco_id") not in out.coco and str(record.get("flickr_id")) not in out.photos:
            kept[number] = record
    stats["images held out"] += len(images) - len(kept)
    return kept


def vg_descriptions(data, split, stats):
    """Visual Genome's region descriptions."""
    images = vg_split(data, split, stats)
    for image, regions, where in vg_items(data, "region_descriptions", "regions"):
        for r in regions if image in images else ():
            text = " ".join(field(r, "phrase", where, str).split())
            yield Record(str(image), text, str(r.get("region_id")))


def vg_regions(data):
    """Yields (image, number, box x y w h) of Visual Genome's region descriptions, numbered within
    their image.
    """
    for image, regions, where in vg_items(data, "region_descriptions", "regions"):
        for k, r in enumerate(regions):
            yield str(image), k, tuple(vg_box(r, where))


def vg_crops(data, split, stats):
    """Visual Genome's regions, cut out, with their descriptions: things before scenes."""
    images = vg_split(data, split, stats)
    for image, regions, where in vg_items(data, "region_descriptions", "regions"):
        for k, r in enumerate(regions if image in images else ()):
            if clip_box(*vg_box(r, where), images[image]):
                text = " ".join(field(r, "phrase", where, str).split())
                yield Record(f"{image}/{k}", text, str(r.get("region_id")))
            else:
                stats["regions left out: a box of no area"] += 1


def web_captions(path, columns, stats, out):
    """Yields Records of a file of captions and addresses; columns: their order. Image id = line
    number from 0.
    """
    text = read_text(path, f"web captions, {' and '.join(columns)} a line")
    caption = columns.index("caption")
    for number, line in enumerate(line for line in text.split("\n") if line):
        row = line.split("\t")
        if len(row) != 2:
            raise DataError(
                f"{path}, line {number + 1} has {len(row)} columns: wanted 2, "
                f"{' and '.join(columns)}\n  Fetch the file again."
            )
        if flickr_photo(row[1 - caption]) in out.photos:
            stats["images held out, also in Flickr30k"] += 1
        else:
            yield Record(str(number), row[caption], str(number))


def split_off(records, split, part=100):
    """Of a corpus without a validation split the last hundredth, or another part, or all before."""
    records = list(records)
    cut = len(records) - max(1, len(records) // part)
    return records[:cut] if split == "train" else records[cut:]


def cc3m_captions(data, split, stats):
    """Conceptual Captions: caption, address; UNITER's numbering. Many addresses are dead."""
    name = {"train": "Train_GCC-training", "val": "Validation_GCC-1.1.0-Validation"}[split]
    path = Path(data) / "cc3m" / f"{name}.tsv"
    return web_captions(path, ("caption", "address"), stats, held_out(data))


def cc12m_captions(data, split, stats):
    """Conceptual 12M: address, caption, the other way round."""
    path = Path(data) / "cc12m" / "cc12m.tsv"
    records = web_captions(path, ("address", "caption"), stats, held_out(data))
    return split_off(records, split)


def sbu_captions(data, split, stats):
    """SBU Captions: two files, line by line, or one JSON file. Image id = line number from 0; the
    last hundredth is for validation.
    """
    folder, out = Path(data) / "sbu", held_out(data)
    whole = folder / "sbu-captions-all.json"
    if exists(whole):
        record = read_json(whole, "SBU Captions")
        urls, captions = field(record, "image_urls", whole), field(record, "captions", whole)
    else:
        urls, captions = (
            read_text(
                folder / f"SBU_captioned_photo_dataset_{name}.txt", "SBU Captions, one a line"
            )
            .rstrip("\n")
            .split("\n")
            for name in ("urls", "captions")
        )
    if len(urls) != len(captions):
        raise DataError(
            f"{folder}: {len(urls):,} addresses and {len(captions):,} captions\n"
            "  Wanted: as many of either. Fetch both files again."
        )
    cut = len(urls) - max(10, len(urls) // 100)
    for i in range(cut) if split == "train" else range(cut, len(urls)):
        if flickr_photo(urls[i]) in out.photos:
            stats["images held out, also in Flickr30k"] += 1
        else:
            yield Record(str(i), captions[i].strip(), str(i))


# -------------------------------------------------------------------- downstream (UNITER table 3)


def normalise_answer(text):
    """The official VQA evaluation's clean-up: punctuation, lower case, numbers, articles,
    contractions; its slips are kept.
    """
    out, comma = text, re.search(r"[0-9],[0-9]", text)
    for p in PUNCTUATION:
        out = out.replace(p, "" if f"{p} " in text or f" {p}" in text or comma else " ")
    # the official flag sits where the count belongs: 32
    out = re.sub(r"\.(?![0-9])", "", out, count=32)
    words = [NUMBERS.get(w, w) for w in out.lower().split()]
    return " ".join(RESTORE.get(w, w) for w in words if w not in ("a", "an", "the"))


class Answers(NamedTuple):
    """What ten people answered to one of VQA's questions."""

    given: list  # as they wrote them
    question_type: str
    answer_type: str


def vqa_questions(data, split, stats, answers=()):
    """VQA v2 questions; target = {number in answers: score}, note = Answers.

    split: train2014, val2014, test-dev2015, test2015 (no answers); vg: Visual Genome's questions
    about COCO images, VQA's augmentation.                                       UNITER sec. A.2
    """
    numbers = {answer: i for i, answer in enumerate(answers)}
    if split == "vg":
        yield from vg_questions(data, stats, numbers)
        return
    folder, known = Path(data) / "vqa2", {}
    path = folder / f"v2_OpenEnded_mscoco_{split}_questions.json"
    if not split.startswith("test"):
        notes = folder / f"v2_mscoco_{split}_annotations.json"
        for a in field(read_json(notes, "VQA v2's answers"), "annotations", notes, list):
            given = [field(x, "answer", notes, str) for x in field(a, "answers", notes, list)]
            kinds = a.get("question_type", ""), a.get("answer_type", "")
            known[field(a, "question_id", notes)] = Answers(given, *kinds)
    images = split.replace("test-dev", "test")
    for q in field(read_json(path, "VQA v2's questions"), "questions", path, list):
        note = known.get(field(q, "question_id", path))
        target = None if note is None else soft_target(note.given, numbers)
        stats["questions without annotations"] += bool(known) and note is None
        stats["questions none of whose answers is in the list, kept with an all-zero target"] += (
            target == {}
        )
        image = f"COCO_{images}_{field(q, 'image_id', path, int):012d}"
        text = field(q, "question", path, str)
        yield Record(image, text, str(q["question_id"]), target, note=note)


def answer_list(data, minimum=9):
    """The answers that a VQA model predicts: trainval_label2ans.json if it is there, else by
    the published rule: the normalised most common answers of at least 9 questions of train2014
    and val2014, sorted (3,129 in VQA v2).
    """
    path = Path(data) / "vqa2" / "trainval_label2ans.json"
    if exists(path):
        return read_json(path, "the list of answers")
    count = Counter()
    for split in ("train2014", "val2014"):
        notes = Path(data) / "vqa2" / f"v2_mscoco_{split}_annotations.json"
        for a in field(read_json(notes, "VQA v2's answers"), "annotations", notes, list):
            count[normalise_answer(field(a, "multiple_choice_answer", notes, str))] += 1
    return sorted(answer for answer, n in count.items() if n >= minimum)


def soft_target(given, numbers):
    """{number: score} of ten answers: 0.3, 0.6, 0.9, 1 for one, two, three, more people."""
    count = Counter(normalise_answer(a) for a in given)
    return {numbers[a]: min(1.0, 0.3 * n) for a, n in count.items() if a in numbers}


def vg_answer(question):
    """The answer to one of Visual Genome's questions, as VQA writes answers"""
    return normalise_answer(question["answer"].rstrip("."))


def vg_questions(data, stats, numbers, own_images=False, out=()):
    """Yields Visual Genome's questions whose answer is in the list; target = {its number: 1}.

    About COCO images, by COCO's names; own_images: about all images but those in `out`, by Visual
    Genome's ids.
    """
    images, stems = vg_images(data), {}
    if not own_images:
        for record in karpathy_images(data, "coco")[0]:
            stems[record["cocoid"]] = Path(record["filename"]).stem
    left = "Visual Genome questions left out: image not in COCO, or held out, or answer not in the"
    for number, questions, where in vg_items(data, "question_answers", "qas"):
        image = "" if str(number) in out else str(number)
        if not own_images:
            image = stems.get(images.get(number, {}).get("coco_id"))
        for q in questions:
            field(q, "answer", where, str)
            answer = vg_answer(q)
            if image and answer in numbers:
                text = field(q, "question", where, str)
                yield Record(image, text, f"vg{q.get('qa_id')}", {numbers[answer]: 1.0})
            else:
                stats[f"{left} list"] += 1


# words of their own behind the vocabulary [authors' code]
VCR_WORDS = [f"person_{i}" for i in range(81)]


def vcr_choices(data, split, stats, parts=("qa",), choices=True):
    """VCR's questions; a text is one choice, four of a question follow each other; target = the
    right one's number, None in test.

    parts    one after the other: "qa": question, answer choice; "qar": question, right answer,
             rationale choice; "all": with each of the four answers, 16 texts
    choices  False: only the right one (second-stage pre-training)
    Segments have types 0 question, 2 answer, 3 rationale; a tag becomes person_<number of the
    detection> or its class [authors' code].
    """
    path = Path(data) / "vcr1" / f"{split}.jsonl"
    for part in parts:
        for record in read_json_lines(path, "VCR's annotations"):
            where = f"{path}, {record.get('annot_id')}"
            image = Path(field(record, "img_fn", where, str)).stem
            rows, target = vcr_rows(record, part, where, stats)
            for j, row in enumerate(rows if choices else [rows[target]]):
                yield Record(image, row, f"{record.get('annot_id')}/{part}/{j}", target)


def vcr_rows(record, part, where, stats):
    """Segments of a question's choices, and the right one's number."""
    objects = field(record, "objects", where, list)

    def words(tokens):
        return " ".join(word for token in tokens for word in tag_words(token, objects, stats))

    def segments(name, kind):
        return [(kind, words(choice)) for choice in field(record, name, where, list)]

    question = (0, words(field(record, "question", where, list)))
    answers, right = segments("answer_choices", 2), record.get("answer_label")
    if part == "qa":
        return [(question, answer) for answer in answers], right
    if part == "qar" and right is None:
        raise DataError(
            f"{where}: no answer_label\n"
            "  Wanted: train or val; the test set's rationales are scored for all four answers."
        )
    reasons, rows = segments("rationale_choices", 3), []
    for answer in answers if part == "all" else [answers[right]]:
        rows += [(question, answer, reason) for reason in reasons]
    return rows, record.get("rationale_label")


def tag_words(token, objects, stats):
    """Words of one of VCR's tokens: a word, or a list of numbers of detections."""
    if not isinstance(token, list):
        return [token]
    words = []
    for tag in token:
        if not 0 <= tag < len(objects):
            stats["tags that point past the boxes, read as [UNK]"] += 1
            words.append("[UNK]")
        elif objects[tag] != "person":
            words.append(objects[tag])
        else:
            words.append(VCR_WORDS[tag] if tag < len(VCR_WORDS) else "person")
    return words


def nlvr2_pairs(data, split, stats, rows="pair"):
    """NLVR2: train, dev, test1, test2, or balanced/balanced_dev, unbalanced/unbalanced_test1 and
    so on; target = 1 (true), 0 or, in a test set, None.

    rows  "triplet": a Record has both images; else two Records, the sentence with either image
    """
    path = Path(data) / "nlvr2" / f"{split}.json"
    for e in read_json_lines(path, "NLVR2: clone lil-lab/nlvr, folder nlvr2/data"):
        name = field(e, "identifier", path, str)
        if name.count("-") != 3:
            raise DataError(
                f"{path}: identifier {name!r}, wanted split-set-pair-sentence\n"
                "  Fetch the file again."
            )
        text, label = field(e, "sentence", path, str), read_label(e, f"{path}, {name}")
        left, right = (f"{name.rpartition('-')[0]}-img{side}" for side in (0, 1))
        for image in [(left, right)] if rows == "triplet" else (left, right):
            yield Record(image, text, name, label)


# UNITER's order
ENTAILMENT = "contradiction", "entailment", "neutral"


def entailment_pairs(data, split, stats):
    """SNLI-VE: image and hypothesis; target = number in ENTAILMENT. split: train, dev, test."""
    path = Path(data) / "snli_ve" / f"snli_ve_{split}.jsonl"
    for e in read_json_lines(path, "SNLI-VE's pairs"):
        # the official file spells it so
        name = "Flikr30kID" if isinstance(e, dict) and "Flikr30kID" in e else "Flickr30K_ID"
        image = str(field(e, name, path)).removesuffix(".jpg")
        label = field(e, "gold_label", path)
        if label == "-":
            stats["pairs left out: label '-', the annotators disagree"] += 1
            continue
        if label not in ENTAILMENT:
            raise DataError(
                f"{path}, {e.get('pairID')}: label {label!r}, wanted one of "
                f"{', '.join(ENTAILMENT)} or -"
            )
        text = field(e, "sentence2", path, str)
        yield Record(image, text, str(e.get("pairID")), ENTAILMENT.index(label))


# whose split
REFER = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd"}


def read_refs(data, name):
    """The expressions of RefCOCO, RefCOCO+ or RefCOCOg as published."""
    path = Path(data) / "refer" / name / f"refs({REFER[name]}).p"
    return read_pickle(path, f"{name}'s expressions")


def referring_expressions(data, split, stats, dataset="refcoco"):
    """RefCOCO, RefCOCO+, RefCOCOg; a Record is one sentence; boxes = the one that it means, x y w h
    in pixels.

    split: train, val, testA, testB (refcocog: test). Reads refs(...).p and instances.json; where
    they are not, phraseloceval's annotation_<split>.json, which holds the same sentences and boxes.
    """
    folder = Path(data) / "refer" / dataset
    phrases = folder / f"annotation_{split}.json"
    if exists(phrases) and not exists(folder / f"refs({REFER[dataset]}).p"):
        for e in read_json(phrases, "phraseloceval's annotations"):
            stem, text = Path(field(e, "imageName", phrases)).stem, field(e, "phrase", phrases)
            box = tuple(field(e, "box", phrases))
            yield Record(stem, " ".join(text), str(e.get("phraseId")), boxes=(box,))
        return
    path, boxes = folder / "instances.json", {}
    for a in field(read_json(path, "COCO's instances"), "annotations", path, list):
        boxes[field(a, "id", path)] = tuple(field(a, "bbox", path, list))
    for ref in read_refs(data, dataset):
        if field(ref, "split", folder) != split:
            continue
        sentences = field(ref, "sentences", folder, list)
        box = boxes.get(ref["ann_id"])
        if box is None:
            stats["expressions whose object is not in instances.json"] += len(sentences)
            continue
        for s in sentences:
            image = f"COCO_train2014_{ref['image_id']:012d}"
            yield Record(image, s["sent"], str(s["sent_id"]), boxes=(box,))


def box_overlap(a, b):
    """Overlap over union of boxes x y w h, (..., 4) each.

    Right edge x + w - 1, an overlap of one pixel counts as none, areas are w h: UNITER's and
    ALBEF's evaluation code.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    corner = np.maximum(a[..., :2], b[..., :2])
    far = np.minimum(a[..., :2] + a[..., 2:] - 1, b[..., :2] + b[..., 2:] - 1)
    inter = np.where((far > corner).all(-1), (far - corner + 1).prod(-1), 0.0)
    return inter / (a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - inter)


def matching_region(record, store, image):
    """The target of a referring expression: the region that overlaps the truth most, if by more
    than half; else -1.
    """
    boxes = store.read(np.array([image]), "boxes")[0]
    boxes[:, 2:] -= boxes[:, :2]
    overlap = box_overlap(boxes, record.boxes[0])
    return int(overlap.argmax()) if overlap.max() > 0.5 else -1


# ------------------------------------------ words that point at boxes (Kervadec et al., MAF)


def gqa_records(data, split):
    """GQA's {question id: record} as published; "train_all" is a folder of ten files."""
    folder = Path(data) / "gqa"
    paths = [folder / f"{split}_questions.json"]
    if split == "train_all" and not exists(paths[0]):
        names = (f"train_all_questions_{i}.json" for i in range(10))
        paths = [folder / "train_all_questions" / name for name in names]
    records = {}
    for path in paths:
        for name, question in need_record(read_json(path, "GQA's questions"), path).items():
            records[name] = need_record(question, f"{path}, question {name}")
    return records


def gqa_questions(data, split, stats, answers=(), pointers=True):
    """GQA's questions; target = {the answer's number: 1}, None in test. split: train_balanced,
    val_all, testdev_all, ...

    Where the split has scene graphs, the question's words point at the boxes of the objects that
    they mean; pointers=False: they do not.
    """
    numbers, scenes = {answer: i for i, answer in enumerate(answers)}, None
    path = Path(data) / "gqa" / f"{split}_questions.json"
    graphs = Path(data) / "gqa" / f"{split.split('_')[0]}_sceneGraphs.json"
    if pointers and exists(graphs):
        scenes = read_json(graphs, "GQA's scene graphs")
    unknown = "questions whose answer is not in the list, kept with an all-zero target"
    for name, q in gqa_records(data, split).items():
        where, spans, target = f"{path}, question {name}", [], None
        image, text = field(q, "imageId", where, str), field(q, "question", where, str)
        if scenes is not None:
            words = q.get("annotations", {}).get("question", {})
            spans = pointed_spans(words, scenes.get(image, {"objects": {}}), stats)
        if "answer" in q:
            target = {numbers[q["answer"]]: 1.0} if q["answer"] in numbers else {}
            stats[unknown] += bool(numbers) and not target
        yield Record(image, text, name, target, pointers=tuple(spans))


def pointed_spans(words, graph, stats):
    """[(first word, end word, box)] of {"first:end": object} and a scene graph."""
    spans = []
    for span, name in words.items():
        thing = graph["objects"].get(name)
        box = thing and clip_box(thing["x"], thing["y"], thing["w"], thing["h"], graph)
        first, _, end = span.partition(":")
        stats["pointers left out: object not in the scene graph"] += thing is None
        stats["pointers left out: a box of no area"] += thing is not None and box is None
        spans += [(int(first), int(end or int(first) + 1), box)] if box else []
    return spans


def gqa_answers(data):
    """GQA's answers: trainval_label2ans.json if it is there, else every answer of the balanced
    train and val questions (1,842).
    """
    path = Path(data) / "gqa" / "trainval_label2ans.json"
    if exists(path):
        return read_json(path, "the list of answers")
    splits = [gqa_records(data, split) for split in ("train_balanced", "val_balanced")]
    return sorted({q["answer"] for records in splits for q in records.values()})


def all_answers(data, minimum=9):
    """The answers of two-stream pre-training: lxmert/all_ans.json if it is there (9,500), else
    VQA's list, GQA's, and what Visual Genome's questions are answered with at least `minimum`
    times.
    """
    path = Path(data) / "lxmert" / "all_ans.json"
    if exists(path):
        return [a["ans"] for a in read_json(path, "LXMERT's answers")]
    count = Counter()
    for _, questions, where in vg_items(data, "question_answers", "qas"):
        for q in questions:
            field(q, "answer", where, str)
            count[vg_answer(q)] += 1
    frequent = (answer for answer, n in count.items() if n >= minimum)
    return sorted({*answer_list(data), *gqa_answers(data), *frequent})


def joined_descriptions(data, stats, out=()):
    """Yields Visual Genome's region descriptions in sentences of one, two or three, joined by
    "and", with their boxes.                                                  Kervadec sec. 6.1

    Which are joined is a function of the image's id. out: ids of images left out
    """
    images = vg_images(data)
    for image, regions, where in vg_items(data, "region_descriptions", "regions"):
        if image not in images or str(image) in out:
            stats["descriptions left out: image held out"] += len(regions)
            continue
        rng, described = np.random.default_rng(int(image)), []
        for r in regions:
            box = clip_box(*vg_box(r, where), images[image])
            words = field(r, "phrase", where, str).strip(" .\n").split()
            stats["pointers left out: a box of no area"] += box is None
            if words:
                described.append((words, box))
        rng.shuffle(described)
        number = 0
        while described:
            n = int(rng.integers(1, 4))
            group, described = described[:n], described[n:]
            words, pointers = [], []
            for phrase, box in group:
                words += ["and"] if words else []
                pointers += [(len(words), len(words) + len(phrase), box)] if box else []
                words += phrase
            name = f"vg{image}/{number}"
            yield Record(str(image), " ".join(words), name, pointers=tuple(pointers))
            number += 1


def multitask_coco(data, split, stats, answers=()):
    """LXMERT's and Kervadec's COCO part: captions of Karpathy's train, and VQA's questions about
    its images.
    """
    images = set()
    for record in karpathy_captions(data, "train", stats):
        images.add(record.image)
        yield record
    for part in ("train2014", "val2014"):
        for record in vqa_questions(data, part, stats, answers):
            if record.image in images and record.target is not None:
                yield record


def multitask_vg(data, split, stats, answers=(), gqa_split="train_balanced"):
    """Their Visual Genome part: joined descriptions, its questions, and GQA's of these splits
    (joined by +). GQA's val images are left out where it is not learned from.
    """
    numbers, out = {answer: i for i, answer in enumerate(answers)}, set()
    if "val" not in gqa_split:
        out = {q["imageId"] for q in gqa_records(data, "val_balanced").values()}
    yield from joined_descriptions(data, stats, out)
    yield from vg_questions(data, stats, numbers, True, out)
    for part in gqa_split.split("+"):
        yield from gqa_questions(data, part, stats, answers)


class Phrase(NamedTuple):
    """A phrase of a caption of Flickr30k Entities."""

    words: str
    chain: str  # which thing it names; the same in all captions of an image
    kinds: tuple  # people, clothing, ...
    boxes: list  # of the chain: x1 y1 x2 y2 pixels, counted from 0; [] if it has none


def entity_captions(data, split, stats):
    """Flickr30k Entities: captions as phrases: segments ((phrase's number, its words), ...); note =
    (caption, [Phrase, ...]). split: train, val, test (the data set's own lists).

    Left out and counted: phrases that name nothing (EN#0), boxes of no area, captions without a
    phrase, and in training the captions listed as unrelated. A phrase of a scene, or without a
    box, stays.
    """
    root = Path(data) / "flickr30k_entities"
    lines = read_text(root / "UNRELATED_CAPTIONS", "Flickr30k Entities").splitlines()
    unrelated = {tuple(line.split()[:2]) for line in lines if line and line[0] != "#"}
    names = read_text(root / f"{split}.txt", "Flickr30k Entities' list of images").split()
    for image in tqdm(names, desc=f"entities {split}", disable=None, leave=False):
        boxes = entity_boxes(root / "Annotations" / f"{image}.xml", stats)
        path = root / "Sentences" / f"{image}.txt"
        for k, line in enumerate(read_text(path, "Flickr30k Entities' sentences").splitlines()):
            if split == "train" and (image, str(k + 1)) in unrelated:
                stats["captions left out: they do not belong to their image"] += 1
                continue
            words, phrases = entity_phrases(line, boxes, f"{path}, line {k + 1}", stats)
            if not phrases:
                stats["captions left out: they have no phrase"] += 1
                continue
            segments = tuple((number, phrase.words) for number, phrase in enumerate(phrases))
            yield Record(image, segments, f"{image}#{k}", note=(" ".join(words), phrases))


def entity_phrases(line, boxes, where, stats):
    """Words of a line of Flickr30k Entities, and its Phrases."""
    words, phrases = [], []
    for part in re.split(r"(\[/EN#[^\]\[]*\])", line):
        mark = re.fullmatch(r"\[/EN#(\d+)/(\S+) ([^\]]*)\]", part)
        if not mark and ("[/EN" in part or "]" in part and "[" not in part):
            raise DataError(
                f"{where}: brackets that do not close: {line[:90]!r}\n"
                "  Wanted: [/EN#chain/type words]. Fetch the file again."
            )
        words += (mark[3] if mark else part).split()
        if mark and mark[1] == "0":
            stats["phrases that name nothing (EN#0)"] += 1
        elif mark:
            found = boxes.get(mark[1], [])
            stats["phrases without a box"] += not found
            phrases.append(Phrase(mark[3], mark[1], tuple(mark[2].split("/")), found))
    return words, phrases


def entity_boxes(path, stats):
    """{chain: boxes} of one annotation file; its boxes are inclusive and counted from 1."""
    corners, boxes = ("xmin", "ymin", "xmax", "ymax"), {}
    try:
        text = read_text(path, "Flickr30k Entities' boxes")
        for thing in xml.etree.ElementTree.fromstring(text).iter("object"):
            box = thing.find("bndbox")
            if box is None:  # a scene, or not to be boxed
                continue
            x1, y1, x2, y2 = (int(box.find(name).text) for name in corners)
            if x2 < x1 or y2 < y1:
                stats["boxes of no area"] += 1
                continue
            for name in thing.iter("name"):
                boxes.setdefault(name.text, []).append((x1 - 1, y1 - 1, x2, y2))
        return boxes
    except (xml.etree.ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} is no annotation of Flickr30k Entities: {error}\n  Fetch the file again."
        ) from None


# ------------------------------------------------- pictures and boxes, without a detector (AMC)


def clean_caption(text, words=30):
    """As ALBEF and AMC clean captions: lower case, no punctuation, hyphens and slashes opened, so
    many words.
    """
    text = re.sub(r"[,.'!?\"()*#:;~]", "", text.lower())
    text = text.replace("-", " ").replace("/", " ").replace("<person>", "person")
    return " ".join(text.split()[:words])


def vg_triplets(data, split, stats, kinds=("box", "region"), min_area=0.08):
    """Visual Genome as (image, text, box): boxes = the one, in [0, 1].                AMC sec. 4.1

    region    region descriptions
    box       objects with their attributes, "brown dog", and prompts of place (places_of)
    min_area  boxes below this share of their image are left out and counted
    Validation: Visual Genome's descriptions, without boxes. Images in Karpathy's and RefCOCO's val
    and test are left out.
    """
    if split == "val":
        yield from vg_descriptions(data, split, stats)
        return
    images, out = vg_images(data), held_out(data).coco
    images = {number: i for number, i in images.items() if i.get("coco_id") not in out}
    number = 0
    for kind, image, text, corners in vg_boxed_texts(data, images, kinds):
        record = images[image]
        box, area = clip_box(*corners, record), record["width"] * record["height"]
        if box is None:
            stats["boxes left out: outside their image, or of no area"] += 1
        elif (box[2] - box[0]) * (box[3] - box[1]) < min_area * area:
            stats["boxes left out: too small"] += 1
        else:
            stats[f"texts: {kind}"] += 1
            sides = record["width"], record["height"]
            box = tuple(v / side for v, side in zip(box, sides * 2))
            yield Record(str(image), text, f"vg{image}/{kind}/{number}", boxes=(box,))
            number += 1


def vg_boxed_texts(data, images, kinds):
    """Yields (kind, image, text, box x y w h)."""
    if "region" in kinds:
        for image, regions, where in vg_items(data, "region_descriptions", "regions"):
            for r in regions if image in images else ():
                text = " ".join(field(r, "phrase", where, str).split())
                yield "region descriptions", image, text, vg_box(r, where)
    if "box" in kinds:
        for image, objects, where in vg_items(data, "attributes", "attributes"):
            named = {}
            for o in objects if image in images else ():
                name = str((field(o, "names", where, list) or [""])[0])
                corners = vg_box(o, where, "xywh")
                named.setdefault(name, []).append(corners)
                for attribute in o.get("attributes") or [""]:
                    kind = "objects with attributes" if attribute else "objects"
                    yield kind, image, f"{attribute} {name}".strip(), corners
            for name, boxes in named.items():
                for text, corners in places_of(name, boxes, images[image]):
                    yield "prompts of place", image, text, corners


def places_of(name, boxes, image):
    """Prompts of place for several boxes x y w h of one name: [(text, box)].

    The leftmost is "dog on the left", then the rightmost, "top dog", "bottom dog"; in a corner of
    the image (both coordinates of its middle in the outer thirds) "dog at the top left", ...
    """
    if len(boxes) < 2:
        return []
    sides = [image["width"], image["height"]]
    middle = np.array([(x + w / 2, y + h / 2) for x, y, w, h in boxes]) / sides
    (left, top), (right, bottom) = middle.argmin(axis=0), middle.argmax(axis=0)
    prompts = [(f"{name} on the left", left), (f"{name} on the right", right)]
    prompts += [(f"top {name}", top), (f"bottom {name}", bottom)]
    for i, (x, y) in enumerate(middle):
        row = "top" if y < 1 / 3 else "bottom" if y > 2 / 3 else ""
        column = "left" if x < 1 / 3 else "right" if x > 2 / 3 else ""
        prompts += [(f"{name} at the {row} {column}", i)] if row and column else []
    return [(text, boxes[i]) for text, i in prompts]


def referit_expressions(data, split, stats):
    """RefCLEF ("ReferIt") as AMC prepared it: refclef_<split>_unique.json of {image, text,
    bbox: x y w h}; val_1k, test_10k. boxes = its box, x y w h pixels.

    Where the two corners are given instead is not known of the file: a box that leaves its image
    is an error of evaluate.py.
    """
    path = Path(data) / "refclef" / f"refclef_{split}_unique.json"
    for i, r in enumerate(read_json(path, "RefCLEF as AMC prepared it")):
        text, box = field(r, "text", path, str), tuple(field(r, "bbox", path, list))
        yield Record(Path(field(r, "image", path)).stem, text, str(i), boxes=(box,))


class Corpus(NamedTuple):
    """A pre-training corpus."""

    reader: Callable
    store: str
    val_store: str = ""  # store, unless it is another one
    skip_missing: bool = False  # many of its pictures cannot be had any more
    task: str = ""  # a second stage: for this task, with its words and types, and alone


CORPORA = {
    "coco": Corpus(coco_corpus, "coco"),
    "vg": Corpus(vg_descriptions, "vg"),
    "cc3m": Corpus(cc3m_captions, "cc3m_train", "cc3m_val", skip_missing=True),
    "sbu": Corpus(sbu_captions, "sbu", skip_missing=True),
    "cc12m": Corpus(cc12m_captions, "cc12m", skip_missing=True),
    "crops": Corpus(vg_crops, "vg_crops"),
    "own": Corpus(own_captions, "own"),
    "vcr": Corpus(
        functools.partial(vcr_choices, parts=("qa", "qar"), choices=False), "vcr", task="vcr"
    ),
    # texts with boxes [AMC sec. 4.1]; comes alone, by --triplets
    "triplets": Corpus(vg_triplets, "vg"),
}

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = dict(
    zip(
        "none zero one two three four five six seven eight nine ten".split(),
        "0 0 1 2 3 4 5 6 7 8 9 10".split(),
    )
)
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
""".split()


# without its apostrophe -> with it
RESTORE = {}
for contraction in CONTRACTIONS:
    for position, letter in enumerate(contraction):
        if letter == "'":
            RESTORE[contraction[:position] + contraction[position + 1 :]] = contraction
RESTORE["somebody'd"] = "somebodyd"


# 5. Index ---------------------------------------------------------------------------------------
# What a reader says, tokenized, as flat arrays in DATA/index: written once by one process, then
# memory-mapped by all processes and loader workers. No Python object exists per text.

# raised whenever what a reader or the index writes changes
INDEX_VERSION = 1
# how a text becomes ids: [CLS] text [SEP], [CLS] text, or phrases side by side [MAF's code: of at
# most so many words, so many a caption]
LAYOUTS = "bert", "albef", "phrases"
MAX_PHRASES, MAX_PHRASE_WORDS = 32, 12


class IndexWriter:
    """Collects the arrays of an Index, text by text; see Index for what they are."""

    def __init__(self, tokenizer, max_words, layout):
        self.tokenizer, self.max_words, self.layout = tokenizer, max_words, layout
        self.tokens, self.starts = array.array("i"), array.array("q", [0])
        self.types, self.images = array.array("b"), []
        self.id_bytes, self.id_starts = bytearray(), array.array("q", [0])
        self.answered, self.target_starts = array.array("b"), array.array("q", [0])
        self.target, self.score = array.array("i"), array.array("d")
        self.box_starts, self.boxes = array.array("q", [0]), array.array("d")
        self.pointed, self.pointed_box = array.array("q"), array.array("f")
        self.pointed_words = {}
        self.counts = Counter()

    def add(self, record, images, target):
        """One text, the numbers of its images in the store, and what is right."""
        ids, types = self.tokenize(record)
        self.counts["truncated"] += len(ids) > self.max_words
        self.counts["empty"] += not ids
        if self.layout == "phrases":
            self.tokens.extend(ids)
        else:
            self.tokens.append(self.tokenizer.cls)
            self.tokens.extend(ids[: self.max_words])
            self.tokens.extend([self.tokenizer.sep] * (self.layout == "bert"))
        self.types.extend(types)
        self.starts.append(len(self.tokens))
        self.images.append(images)
        self.id_bytes.extend(record.id.encode())
        self.id_starts.append(len(self.id_bytes))
        self.answered.append(target is not None)
        self.counts["without a matching region"] += target == -1
        scores = target if isinstance(target, dict) else {} if target is None else {target: 1.0}
        self.target.extend(scores)
        self.score.extend(scores.values())
        self.target_starts.append(len(self.target))
        for box in record.boxes:
            self.boxes.extend(box)
        self.box_starts.append(len(self.boxes) // 4)

    def tokenize(self, record):
        """ids of a text without [CLS] and the last [SEP], and, for segments, rows of the type table
        for all of it: a [SEP] opens the next segment and has its type [authors' code].
        """
        if self.layout == "phrases":
            return self.tokenize_phrases(record.text)
        if record.pointers:
            return self.tokenize_pointed(record), []
        if isinstance(record.text, str):
            text = clean_caption(record.text) if self.layout == "albef" else record.text
            return self.tokenizer(text), []
        ids, types = [], [0]
        for kind, words in record.text:
            new = ([self.tokenizer.sep] if ids else []) + self.tokenizer(words)
            ids += new
            types += [kind] * len(new)
        last = types[min(len(ids), self.max_words)]
        return ids, [*types[: self.max_words + 1], last]

    def tokenize_phrases(self, phrases):
        """ids of phrases side by side; the type is the phrase's number."""
        ids, types = [], []
        for number, words in phrases[:MAX_PHRASES]:
            new = self.tokenizer(words)[:MAX_PHRASE_WORDS]
            ids += new
            types += [number] * len(new)
        return ids, types

    def tokenize_pointed(self, record):
        """ids of a text with pointers, word by word; every piece of a pointed word becomes a row:
        its place in tokens, the word's number, the box.
        """
        ids = []
        for i, word in enumerate(record.text.split()):
            pieces = self.tokenizer(word)
            boxes = [box for first, end, box in record.pointers if first <= i < end]
            if boxes:
                known = self.pointed_words
                number = known.setdefault(strip_punctuation(word), len(known))
            for j in range(len(pieces) if boxes else 0):
                place = len(ids) + j
                for box in boxes if place < self.max_words else ():
                    self.pointed.extend((len(self.tokens) + 1 + place, number))
                    self.pointed_box.extend(box)
            ids += pieces
        return ids

    def finish(self):
        """{name: array}"""
        image = np.array(self.images, np.int32)
        image = image[:, 0] if image.shape[1] == 1 else image
        out = {
            "tokens": np.frombuffer(self.tokens, np.int32),
            "starts": np.frombuffer(self.starts, np.int64),
            "image": image,
            "id_bytes": np.frombuffer(self.id_bytes, np.uint8),
            "id_starts": np.frombuffer(self.id_starts, np.int64),
            "answered": np.frombuffer(self.answered, np.int8),
            "target_starts": np.frombuffer(self.target_starts, np.int64),
            "target": np.array(self.target, np.int32),
            "score": np.array(self.score, np.float64),
            "box_starts": np.frombuffer(self.box_starts, np.int64),
            "boxes": np.array(self.boxes, np.float64).reshape(-1, 4),
        }
        if image.ndim == 1:
            # texts by their image: mismatched pairs are drawn with these
            by_image = np.argsort(image, kind="stable")
            images, first = np.unique(image[by_image], return_index=True)
            out |= {"images": images, "by_image": by_image.astype(np.int32)}
            out["image_starts"] = np.append(first, len(image))
        if self.types:
            out["types"] = np.frombuffer(self.types, np.int8)
        if self.pointed:
            words = [word.encode() for word in self.pointed_words]
            out["pointed"] = np.array(self.pointed, np.int64).reshape(-1, 2)
            out["pointed_box"] = np.array(self.pointed_box, np.float32).reshape(-1, 4)
            out["pointed_words"] = np.array(words)
        return out


def build_index(records, store, tokenizer, name, max_words, layout, skip_missing, group, label):
    """Arrays and meta of an Index; see open_index."""
    writer, missing, total, first = IndexWriter(tokenizer, max_words, layout), 0, 0, ""
    store.check_rows()
    find = store.finder()
    for chunk in chunks(
        tqdm(records, desc=f"index {name}", disable=None, leave=False), 4096 * group
    ):
        names = [r.image if isinstance(r.image, tuple) else (r.image,) for r in chunk]
        images = find([one for each in names for one in each]).reshape(len(chunk), -1)
        known = (images >= 0).all(axis=1).reshape(-1, group).all(axis=1).repeat(group)
        if not known.all():
            row, column = np.argwhere(images < 0)[0]
            first = first or names[row][column]
        missing, total = missing + int((~known).sum()), total + len(chunk)
        for record, row, keep in zip(chunk, images.tolist(), known):
            if keep:
                target = label(record, store, row[0]) if label else record.target
                writer.add(record, row, target)
    if missing and not skip_missing:
        raise DataError(
            f"{name}: image {first} has captions but no features in {store.folder} "
            f"({missing:,} of {total:,} captions)\n"
            "  Wanted: features of every image that has captions.\n"
            "  Pack the missing features, or go on without these captions: --skip-missing"
        )
    if missing == total:
        raise DataError(
            f"{name}: no captions left that have features in {store.folder}\n"
            "  Check --data and the split's name."
        )
    counts = {"missing": missing, **writer.counts}
    return writer.finish(), {"counts": counts}


def chunks(items, size):
    """Lists of `size` items, the last one shorter."""
    chunk = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def make_index(
    records,
    store,
    tokenizer,
    max_words=60,
    name="",
    skip_missing=False,
    layout="bert",
    group=1,
    label=None,
):
    """An Index of these records that lives in memory only: for a few texts."""
    how = name, max_words, layout, skip_missing, group, label
    arrays, meta = build_index(records, store, tokenizer, *how)
    return Index(arrays, meta, store, tokenizer, name, group=group)


def open_index(
    data,
    reader,
    split,
    store,
    tokenizer,
    max_words=60,
    name="",
    skip_missing=False,
    layout="bert",
    group=1,
    label=None,
):
    """The Index of a reader's records, made on first use in DATA/index and again once a file that
    the reader has read, the store, the tokenizer or one of these settings changes.

    reader        a generator function (data, split, stats), or a functools.partial of one; splits
                  joined by + are read one after the other
    max_words     word pieces a text; longer ones are truncated [authors' code: left out]
    skip_missing  leave texts out whose image has no features, and count them; else an error
    group         so many texts that follow each other are one example
    label         (record, store, image) -> target, where it depends on the store
    """
    function = getattr(reader, "func", reader)
    options = getattr(reader, "keywords", {}) | {"args": getattr(reader, "args", ())}
    how = [str(Path(store.folder)), tokenizer.fingerprint(), max_words, layout, skip_missing, group]
    described = repr((sorted(options.items()), how, label and label.__name__))
    digest = hashlib.sha256(described.encode()).hexdigest()[:8]
    key = [INDEX_VERSION, function.__module__, function.__name__, split, digest]
    name = name or f"{function.__name__} {split}"
    folder = Path(data) / "index" / f"{function.__name__}-{split.replace('/', '_')}-{digest}"

    def build():
        stats = Counter()
        records = chain.from_iterable(reader(data, part, stats) for part in split.split("+"))
        settings = name, max_words, layout, skip_missing, group, label
        arrays, meta = build_index(records, store, tokenizer, *settings)
        sources.update(store.stamps())
        return arrays, meta | {"stats": stats}

    arrays, meta = memory_mapped(folder, key, build)
    return Index(arrays, meta, store, tokenizer, name, folder, group)


def load_index(folder, store, tokenizer, name, group):
    """An Index that exists: how loader workers get theirs."""
    arrays = {p.stem: np.load(p, mmap_mode="r") for p in folder.glob("*.npy")}
    meta = json.loads((folder / "meta.json").read_text())
    return Index(arrays, meta, store, tokenizer, name, folder, group, joined=True)


class Index:
    """Texts as ids, their images' regions, and which belongs to which.

    tokens    int32, all texts one after the other; text i is tokens[starts[i]:starts[i+1]]
    types     the same for rows of the type table, or for the phrase's number; absent if all are 0
    image     (N,) number of each text's image in the store; images: those that have texts, sorted;
              by_image, image_starts: the texts of images[p] are by_image[image_starts[p]:...[p+1]]
    ids       id_bytes, id_starts: what each text is called in messages and result files
    targets   answered (N,); text i's are target (number) and score from target_starts[i] on
    boxes     (., 4) float64, of text i from box_starts[i] on
    pointed   (., 2) place in tokens and number in pointed_words; pointed_box (., 4) pixels
    group     so many texts that follow each other are one example

    The two images of a text (NLVR2), or the sides of a group of two, become a JoinedStore.
    """

    def __init__(self, arrays, meta, store, tokenizer, name, folder=None, group=1, joined=False):
        self.arrays, self.meta, self.store, self.tokenizer = arrays, meta, store, tokenizer
        self.name, self.folder, self.group = name, folder, group
        self.tokens = arrays["tokens"]
        self.starts = arrays["starts"]
        self.types = arrays.get("types")
        self.image, self.images = arrays["image"], arrays.get("images")
        if not joined and self.image.ndim == 2:
            self.store = JoinedStore([(store, self.image[:, j], j + 1) for j in (0, 1)])
        elif not joined and group == 2:
            self.store = JoinedStore([(store, self.image, np.tile([1, 2], len(self) // 2))])
        if isinstance(self.store, JoinedStore) and (self.image.ndim == 2 or group == 2):
            self.image = np.arange(len(self))

    def __reduce__(self):
        if self.folder:
            return load_index, (self.folder, self.store, self.tokenizer, self.name, self.group)
        args = self.arrays, self.meta, self.store, self.tokenizer, self.name, None, self.group, True
        return type(self), args

    def __len__(self):
        return len(self.starts) - 1

    def __str__(self):
        counts, notes = self.meta["counts"], ""
        if counts["missing"]:
            kind = "examples" if self.group > 1 else "texts"
            notes += f", {counts['missing'] // self.group:,} {kind} left out: no features"
        for name in ("truncated", "empty", "without a matching region"):
            notes += f", {counts[name]:,} texts {name}" if counts.get(name) else ""
        examples = f"; {len(self) // self.group:,} examples" if self.group > 1 else ""
        images = len(self.store if self.images is None else self.images)
        return f"{self.name}: {len(self):,} texts, {images:,} images{notes}{examples}"

    def id(self, row):
        """What a text is called"""
        start, end = self.arrays["id_starts"][row : row + 2]
        return self.arrays["id_bytes"][start:end].tobytes().decode()

    def names(self, rows, images):
        """What to call these pairs in messages"""
        pairs = zip(rows, images)
        return [f"caption {self.id(r)} with image {self.store.image_id(i)}" for r, i in pairs]

    def decode(self, row):
        """A text as its word pieces say it"""
        tokenizer = self.tokenizer
        skip = {tokenizer.cls, tokenizer.sep}
        ids = self.tokens[self.starts[row] : self.starts[row + 1]]
        pieces = [tokenizer.pieces[i] for i in ids if i not in skip]
        return " ".join(pieces).replace(" ##", "")

    def n_words(self, rows):
        """(B,) length of each text, [CLS] and [SEP] included"""
        rows = np.asarray(rows)
        return self.starts[rows + 1] - self.starts[rows]

    def length(self, rows, images):
        """(B,) words + regions of these pairs"""
        return self.n_words(rows) + self.store.n_regions(images)

    def text(self, rows, column="tokens"):
        """(B, N_L) int64 ids (or types) and the mask"""
        n, values = self.n_words(rows), self.arrays[column]
        mask = length_mask(n)
        padding = self.tokenizer.pad if column == "tokens" else 0
        out = np.full(mask.shape, padding, np.int64)
        if len(n):
            pieces = [values[start : start + k] for start, k in zip(self.starts[rows], n)]
            out[mask] = np.concatenate(pieces)
        return out, mask

    def batch(self, rows, images, text=None):
        """The model's input for these pairs (two arrays of equal length); text = ids to use
        instead, e.g. masked ones.
        """
        ids, text_mask = self.text(rows)
        as_tensor = torch.from_numpy
        batch = {
            "text": as_tensor(ids if text is None else text),
            "text_mask": as_tensor(text_mask),
            "regions": as_tensor(self.store.read(images)),
            "boxes": as_tensor(self.store.relative_boxes(images)),
            "region_mask": as_tensor(length_mask(self.store.n_regions(images))),
            "length": int(self.length(rows, images).max()),
        }
        if self.types is not None:
            batch["text_type"] = as_tensor(self.text(rows, "types")[0])
        if isinstance(self.store, JoinedStore):
            batch["region_type"] = as_tensor(self.store.region_types(images))
        return batch

    def boxes_of(self, row):
        """(n, 4) boxes that a text describes"""
        start, end = self.arrays["box_starts"][row : row + 2]
        return self.arrays["boxes"][start:end]

    def target_of(self, row):
        """(numbers, scores) of what is right; none where nothing is, or nobody knows"""
        start, end = self.arrays["target_starts"][row : row + 2]
        return self.arrays["target"][start:end], self.arrays["score"][start:end]

    def target_numbers(self, examples):
        """(B,) int64 the number of what is right, -1 where nothing is, or nobody knows"""
        starts = self.arrays["target_starts"]
        start, end = starts[examples * self.group], starts[examples * self.group + 1]
        target = np.append(self.arrays["target"], -1)
        return target[np.where(start < end, start, -1)].astype(np.int64)

    def target_scores(self, examples, answers):
        """(B, answers) float32 scores of all answers"""
        out = np.zeros((len(examples), answers), np.float32)
        for b, example in enumerate(examples):
            numbers, scores = self.target_of(example * self.group)
            out[b, numbers] = scores
        return out

    def pointers(self, rows):
        """Pointed words of these texts: places in B*N_L (K,), numbers of the words (K,), boxes
        (K, 4), rows (K,)
        """
        place, n = self.arrays["pointed"][:, 0], self.n_words(rows)
        first = np.searchsorted(place, self.starts[rows])
        end = np.searchsorted(place, self.starts[rows] + n)
        row = np.repeat(np.arange(len(n)), end - first)
        # the k-th pointed word of its text is number first + k
        which = np.arange(len(row)) + np.repeat(
            first - np.cumsum(end - first) + (end - first), end - first
        )
        pointed = self.arrays["pointed"][which]
        place = row * n.max(initial=0) + pointed[:, 0] - self.starts[rows][row]
        return place, pointed[:, 1], self.arrays["pointed_box"][which], row

    def in_chunks(self, rows, images, batch_tokens):
        """Batches of similar length for scoring many pairs: yields (places in the list, batch)."""
        length = self.length(rows, images)
        order = np.argsort(length, kind="stable")
        for chunk in token_batches(length[order], batch_tokens):
            yield order[chunk], self.batch(rows[order[chunk]], images[order[chunk]])

    def examples_in_chunks(self, batch_tokens, answers=0):
        """All examples in batches of similar length: yields (examples, batch)."""
        length = example_length(self, np.arange(len(self) // self.group))
        order = np.argsort(length, kind="stable")
        for chunk in token_batches(length[order] * self.group, batch_tokens):
            yield order[chunk], example_batch(self, order[chunk], answers)


# 6. Batches -------------------------------------------------------------------------------------

# mined negatives kept of each caption and image [UNITER sec. A.2]
HARDEST = 20
# pairs sorted by length together [UNITER's code]
BUCKET = 8192


def token_batches(lengths, batch_tokens):
    """Cut a run of rising lengths into batches of at most `batch_tokens` words and regions, padding
    counted: index arrays.
    """
    batches, start = [], 0
    while start < len(lengths):
        most = max(1, int(batch_tokens // lengths[start]))
        ahead = lengths[start : start + most]
        padded = ahead * np.arange(1, len(ahead) + 1)
        n = max(1, int((padded <= batch_tokens).sum()))
        batches.append(np.arange(start, start + n))
        start += n
    return batches


class Batches:
    """Batches of one task on one data set. Batch k is a function of (seed, k) alone, so any process
    can make any batch: an epoch's order, pairs of similar length together, the batches in random
    order.

    task              a name of KINDS, which says what is drawn and what a batch holds
    size              words + regions of a batch over all processes, padding counted; examples
                      where the kind says so
    rank, world_size  this process takes every world_size-th example of a batch
    corpus            number of the data set in the mix, so that each has random numbers of its own
    options           of the kind: see BATCH_OPTIONS
    [k]               dict: "input" for the model, what the task predicts, "names" of the samples
                      (none: nothing of the batch is this process's), "counts": over how many
                      things the mean of each loss runs, "" of those not named
    """

    def __init__(self, task, index, size, seed, rank=0, world_size=1, corpus=0, **options):
        self.task, self.index, self.size, self.seed = task, index, size, seed
        self.rank, self.world_size, self.corpus = rank, world_size, corpus
        self.kind = KINDS[task]
        unknown = set(options) - set(BATCH_OPTIONS)
        if unknown:
            raise TypeError(f"{', '.join(unknown)}: no option of batches")
        self.options = {**BATCH_OPTIONS, **options}
        # the epoch at hand and its first batch's number
        self.epoch, self.first, self.columns, self.batches = -1, 0, (), []
        if self.kind.check:
            self.kind.check(self)

    def __getattr__(self, name):
        # options read as attributes
        options = self.__dict__.get("options", {})
        if name not in options:
            raise AttributeError(name)
        return options[name]

    def rng(self, *numbers):
        """Random numbers that belong to these numbers, this task and this data set alone."""
        stream = self.stream or self.kind.stream
        return np.random.default_rng([self.seed, stream + 100 * self.corpus, *numbers])

    def plan(self, epoch):
        """Draw an epoch: (columns, [rows of the columns that are a batch])."""
        rng = self.rng(epoch)
        columns = self.kind.draw(self, rng)
        if self.kind.by_example:
            # the last ones of an epoch wait for the next
            cut = len(columns[0]) // self.size * self.size or len(columns[0])
            return columns, np.split(np.arange(cut), range(self.size, cut, self.size))
        batches = []
        for start in range(0, len(columns[0]), BUCKET):
            part = [column[start : start + BUCKET] for column in columns]
            cost = self.kind.cost(self, *part)
            order = np.lexsort([self.index.n_words(part[0]), cost])
            for batch in token_batches(cost[order], self.size):
                batches.append((start + order[batch]).astype(np.int32))
        return columns, [batches[i] for i in rng.permutation(len(batches))]

    def whole(self, k):
        """The columns of batch k before it is shared out among the processes."""
        if k < self.first:
            self.epoch, self.first, self.batches = -1, 0, []
        while k >= self.first + len(self.batches):
            self.first += len(self.batches)
            self.epoch += 1
            self.columns, self.batches = self.plan(self.epoch)
        rows = self.batches[k - self.first]
        return tuple(column[rows] for column in self.columns)

    def __getitem__(self, k):
        return self.kind.collate(self, self.rng(k, 1), k, *self.whole(k))

    def __getstate__(self):
        # a worker draws the epoch itself
        return {**self.__dict__, "epoch": -1, "first": 0, "columns": (), "batches": []}

    def __setstate__(self, state):
        self.__dict__.update(state)

    @property
    def share(self):
        """This process's part of a batch"""
        return slice(self.rank, None, self.world_size)


BATCH_OPTIONS = {
    "stream": 0,  # number of the task's random numbers, where it is not the kind's own
    "mask_rate": 0.15,  # share of words or regions that are masked
    "joint": False,  # mask words and regions of a pair at once; else one, the other is whole
    "negatives": 2,  # mismatched pairs of each group that are trained on
    "candidates": 0,  # so many are drawn to be scored by the model; 0: negatives are random
    "mined": False,  # besides the random negatives one hard image and one hard caption
    "alternate": False,  # even batches: captions with other images; odd: images with other captions
    "augment": (),  # of pictures: flip, jitter, grey
    "answers": 0,  # how many the task's head predicts, where several may be right
    "similarity": None,  # WordSimilarity of the pointed words
    "soft_target": None,  # losses.soft_alignment_target
}


def length_mask(lengths, width=None):
    """(B, N) bool, True in the first lengths[b] places of row b."""
    lengths = np.asarray(lengths)
    return np.arange(lengths.max(initial=0) if width is None else width)[None] < lengths[:, None]


# Masks are drawn for all processes at once, so that any number of them sees the same.


def draw_mask(rng, maskable, rate):
    """Which of the places that may be masked are: (B, N) bool, at least one in each row that has
    any.
    """
    u = np.where(maskable, rng.random(maskable.shape), 2.0)
    return (u < rate) | ((u == u.min(axis=1, keepdims=True)) & maskable)


def mask_words(batches, rng, rows):
    """Which words to mask (B, N_L) bool, and what stands there instead, an id or -1 for the word
    itself.

    Of the masked words 80 % become [MASK], 10 % another word, 10 % stay; [CLS] and [SEP] are never
    masked.                                                                        UNITER fn. 7
    """
    index, tokenizer = batches.index, batches.index.tokenizer
    text, maskable = index.text(rows)
    maskable &= text != tokenizer.sep
    maskable[:, 0] = False
    masked, how = draw_mask(rng, maskable, batches.mask_rate), rng.random(maskable.shape)
    ordinary = tokenizer.ordinary
    random_word = ordinary[rng.integers(len(ordinary), size=maskable.shape)]
    new = np.where(how < 0.8, tokenizer.mask, np.where(how < 0.9, random_word, -1))
    return masked, new


# so many are drawn at a time: the same numbers as all at once, without their temporary arrays
DRAWN_AT_ONCE = 1 << 17


def draw_in_pieces(draw, of):
    """draw(piece) of each piece of an array, joined"""
    pieces = range(0, len(of), DRAWN_AT_ONCE)
    return np.concatenate([draw(of[i : i + DRAWN_AT_ONCE]) for i in pieces])


def mismatched_images(rng, images, avoid):
    """One random member of images (sorted, unique) for each entry of avoid, never that entry."""
    if len(avoid) > DRAWN_AT_ONCE:
        return draw_in_pieces(lambda part: mismatched_images(rng, images, part), avoid)
    if len(images) < 2:
        raise DataError(
            "mismatched pairs need at least two images with captions; this split has one"
        )
    here = np.searchsorted(images, avoid).clip(max=len(images) - 1)
    inside = images[here] == avoid
    u = rng.integers(len(images) - inside)
    u += inside & (u >= here)
    return images[u]


def mismatched_captions(rng, index, images):
    """One random caption for each of these images that belongs to another image."""
    if len(images) > DRAWN_AT_ONCE:
        return draw_in_pieces(lambda part: mismatched_captions(rng, index, part), images)
    starts = index.arrays["image_starts"]
    here = np.searchsorted(index.images, images)
    first, own = starts[here], starts[here + 1] - starts[here]
    u = rng.integers(len(index) - own)
    return index.arrays["by_image"][u + own * (u >= first)]


# What is drawn: the columns of an epoch, the first of them rows of the index ...


def draw_matched(batches, rng):
    """Every text with its image: (rows, images, match)"""
    # int32: of ten million pairs a column takes 40 MB in each process
    rows = rng.permutation(len(batches.index)).astype(np.int32)
    return rows, np.asarray(batches.index.image[rows], np.int32), np.ones(len(rows), bool)


def draw_matching(batches, rng):
    """Half of the pairs with another image or another caption: (rows, images, match)"""
    rows, images, _ = draw_matched(batches, rng)
    match = rng.random(len(rows)) < 0.5
    new_image = rng.random(len(rows)) < 0.5
    other = mismatched_images(rng, batches.index.images, images)
    images = np.where(match | ~new_image, images, other)
    other = mismatched_captions(rng, batches.index, images)
    return np.where(match | new_image, rows, other), images, match


def draw_replaced_images(batches, rng):
    """Half of the texts with another image [LXMERT]: (rows, images, match)"""
    rows, images, _ = draw_matched(batches, rng)
    match = rng.random(len(rows)) < 0.5
    other = mismatched_images(rng, batches.index.images, images)
    return rows, np.where(match, images, other), match


def draw_texts(batches, rng):
    """Every text: (rows,)"""
    return (rng.permutation(len(batches.index)),)


def draw_examples(batches, rng):
    """Every example that has an answer: (first rows, examples)"""
    index = batches.index
    examples = rng.permutation(answered_examples(index))
    return examples * index.group, examples


def answered_examples(index):
    """Examples that somebody has answered, and of which something is right"""
    answered = index.arrays["answered"][:: index.group] > 0
    return np.flatnonzero(answered & ~unmatched(index))


def unmatched(index):
    """(examples,) bool: the answer is known to be none of the choices"""
    starts = index.arrays["target_starts"][:: index.group]
    target = np.append(index.arrays["target"], 0)
    return target[starts[: len(index) // index.group]] == -1


# ... what it costs, in words and regions ...


def pair_cost(batches, rows, images, match):
    """Words + regions of each pair"""
    return batches.index.length(rows, images)


def group_cost(batches, rows, images, match):
    """Of all pairs of a ranking group"""
    return batches.index.length(rows, images) * (1 + batches.negatives + 2 * batches.mined)


def example_cost(batches, rows, examples):
    """Of all texts of an example, at the length of the longest"""
    return example_length(batches.index, examples) * batches.index.group


def example_length(index, examples):
    """(B,) words + regions of the longest text of each example"""
    rows = (np.asarray(examples, np.int64)[:, None] * index.group + np.arange(index.group)).ravel()
    return index.length(rows, index.image[rows]).reshape(-1, index.group).max(axis=1)


# ... and what a batch holds.


def empty_batch(batches):
    """Of a batch with fewer examples than processes one of them has nothing."""
    return {"task": batches.task, "names": [], "counts": {"": 0}}


def collate_pairs(batches, rng, k, rows, images, match):
    """Masked words (mlm), masked regions (mrfr, mrc, mrckl), or matching (itm).

    masked_words, word_targets (K,), masked_regions (K,), region_probs (K, C), match (B,); itm, of
    pictures whose texts have boxes: "boxed" (M,) matched rows, "region_target" (M, R, R) bool, the
    pixels that the text describes
    """
    index, task, share = batches.index, batches.task, batches.share
    masks_regions, boxed = task in ("mrfr", "mrc", "mrckl"), has_boxed_pictures(batches)
    masked_words = masked_regions = u = None
    if task == "mlm" or batches.joint and masks_regions:
        masked_words = mask_words(batches, rng, rows)
    if masks_regions or batches.joint and task == "mlm":
        real = length_mask(index.store.n_regions(images))
        masked_regions = draw_mask(rng, real, batches.mask_rate)
    if boxed:
        u = rng.random(len(rows))[share]
    rows, images, match = rows[share], images[share], match[share]
    if not len(rows):
        return empty_batch(batches)
    batch = {"task": task, "names": index.names(rows, images), "counts": {"": len(rows)}}
    batch["match"], text = torch.from_numpy(match), None
    if masked_words is not None:
        text, real = index.text(rows)
        masked, new = (m[share, : text.shape[1]] for m in masked_words)
        masked = masked & real
        if task == "mlm":
            batch["masked_words"] = torch.from_numpy(np.flatnonzero(masked))
            batch["word_targets"] = torch.from_numpy(text[masked])
            batch["counts"] = dict.fromkeys(("", "mlm"), len(batch["masked_words"]))
        text = np.where(masked & (new >= 0), new, text)
    batch["input"] = index.batch(rows, images, text)
    if masked_regions is not None:
        masked = masked_regions[share, : batch["input"]["regions"].shape[1]]
        places = torch.from_numpy(np.flatnonzero(masked))
        batch["masked_regions" if masks_regions else "hidden_regions"] = places
        if masks_regions:
            batch["counts"][""] = len(places)
        if task in ("mrc", "mrckl"):
            probs = index.store.read(images, "cls_prob")[masked]
            batch["region_probs"] = torch.from_numpy(probs)
    return batch if u is None else add_boxed(batches, batch, rows, np.flatnonzero(match), u)


def has_boxed_pictures(batches):
    """Do the texts describe boxes of pictures?"""
    pictures = isinstance(batches.index.store, PatchStore)
    return pictures and batches.task in ("itm", "albef") and len(batches.index.arrays["boxes"]) > 0


def add_boxed(batches, batch, rows, candidates, u, flip=()):
    """Of the candidate rows of a batch those whose text has boxes, and one box of each, which
    u (B,) in [0, 1) chooses; flip (B,): in a mirrored picture.
    """
    index, R = batches.index, batches.index.store.resolution
    boxed = [b for b in candidates if len(index.boxes_of(rows[b]))]
    masks = np.zeros((len(boxed), R, R), bool)
    for m, b in enumerate(boxed):
        boxes = index.boxes_of(rows[b])
        masks[m] = box_mask(boxes[int(u[b] * len(boxes))], R, bool(len(flip)) and flip[b])
    batch["counts"]["heat"] = len(boxed)
    batch["boxed"] = torch.tensor(boxed, dtype=torch.int64)
    return batch | {"region_target": torch.from_numpy(masks)}


def box_mask(box, R, flip):
    """(R, R) bool: the pixels of a box in [0, 1], at least one."""
    x1, y1, x2, y2 = box
    x1, x2 = (1 - x2, 1 - x1) if flip else (x1, x2)
    mask, spans = np.zeros((R, R), bool), []
    for low, high in ((y1, y2), (x1, x2)):
        first = min(round(low * R), R - 1)
        spans.append(slice(first, max(round(high * R), first + 1)))
    mask[tuple(spans)] = True
    return mask


def collate_ranking(batches, rng, k, rows, images, match):
    """Groups of one matched pair and its mismatched ones, for the ranking loss.

    "positive": batch of the G matched pairs; "negatives": list of batches of similar length;
    "order": (G, K) their places in the list of all negatives. Where the model chooses: "candidates"
    = (rows, images), both (G, candidates), or "random", from which add_mined() goes on.
    """
    index, share, K = batches.index, batches.share, batches.candidates or batches.negatives
    with_images = (k % 2 == 0) * K if batches.alternate else (K + 1) // 2
    wrong_rows, wrong_images = (np.repeat(x[:, None], K, 1) for x in (rows, images))
    for j in range(K):
        if j < with_images:
            wrong_images[:, j] = mismatched_images(rng, index.images, images)
        else:
            wrong_rows[:, j] = mismatched_captions(rng, index, images)
    pick = rng.integers(HARDEST, size=(2, len(rows)))[:, share]
    rows, images = rows[share], images[share]
    wrong_rows, wrong_images = wrong_rows[share], wrong_images[share]
    if not len(rows):
        return empty_batch(batches)
    batch = {"task": "rank", "names": index.names(rows, images), "counts": {"": len(rows)}}
    batch["anchor"] = ("text", "image")[k % 2] if batches.alternate else "both"
    batch["positive"] = index.batch(rows, images)
    if batches.candidates:
        return batch | {"candidates": (wrong_rows, wrong_images)}
    if batches.mined:
        # the tables are with the model: add_mined() goes on there
        return batch | {"random": (rows, images, wrong_rows, wrong_images, pick)}
    return batch | collate_negatives(index, wrong_rows, wrong_images)


def collate_negatives(index, rows, images):
    """Batches of these negatives, (G, K) rows and images, shortest first, cut where padding would
    pass 3 %.
    """
    length = index.length(rows.ravel(), images.ravel())
    order = np.argsort(length, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    cuts, start, rising = [], 0, length[order]
    for i in range(len(order)):
        padded = rising[i] * (i + 1 - start)
        if i - start >= 4 and rising[start : i + 1].sum() < 0.97 * padded:
            cuts.append(i)
            start = i
    parts = np.split(order, cuts)
    negatives = [index.batch(rows.ravel()[part], images.ravel()[part]) for part in parts]
    return {"negatives": negatives, "order": torch.from_numpy(place.reshape(rows.shape))}


class HardNegatives(NamedTuple):
    """What mining found: the hardest images of each caption, captions of each image (-1: none)."""

    images: np.ndarray  # (texts, HARDEST)
    captions: np.ndarray  # (images of the store, HARDEST)


def mining_candidates(index, rng, n):
    """Captions and images to score: n random other images for each caption, (T, n) twice.

    UNITER sec. A.2
    """
    captions = np.repeat(np.arange(len(index))[:, None], n, 1)
    images = mismatched_images(rng, index.images, index.image[captions.ravel()])
    return captions, images.reshape(captions.shape)


def hardest_of(index, captions, images, scores):
    """The HARDEST highest-scored images of each caption, and captions of each image."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, np.arange(HARDEST) % scores.shape[1]]
    order = np.lexsort([-scores.ravel(), images.ravel()])
    owner, first, n = np.unique(images.ravel()[order], return_index=True, return_counts=True)
    by_image = np.full((len(index.store), HARDEST), -1)
    ranked = order[first[:, None] + np.arange(HARDEST) % n[:, None]]
    by_image[owner] = captions.ravel()[ranked]
    return HardNegatives(np.take_along_axis(images, best, 1), by_image)


def add_mined(index, hard, batch):
    """A batch's random negatives, and one of the hardest each way."""
    rows, images, wrong_rows, wrong_images, pick = batch.pop("random")
    caption = hard.captions[images, pick[0]]
    caption = np.where(caption < 0, wrong_rows[:, -1], caption)
    all_rows = np.column_stack([wrong_rows, rows, caption])
    all_images = np.column_stack([wrong_images, hard.images[rows, pick[1]], images])
    return batch | collate_negatives(index, all_rows, all_images)


class WordSimilarity:
    """What the detector calls regions, compared with words: cosines of GloVe vectors, made once
    beside the data; 0 where either has no vector.

    words: (W,) bytes; a name of several words ("traffic light") has the mean of their vectors
    """

    def __init__(self, data, words):
        self.data, self.words = data, words
        key = [INDEX_VERSION, hashlib.sha256(b"\n".join(words.tolist())).hexdigest()]
        place = Path(data) / "index" / f"similarity-{key[1][:8]}"
        self.tables, meta = memory_mapped(place, key, self.compare)
        self.num_unknown = meta["unknown"]

    def __reduce__(self):
        return type(self), (self.data, np.array(self.words))

    def compare(self):
        """{cls_id, attr_id: (words, names) float16}"""
        words = [word.decode() for word in self.words]
        names = {"cls_id": "objects", "attr_id": "attributes"}
        names = {k: [n.split() for n in detector_names(self.data, v)] for k, v in names.items()}
        wanted = {*words, *(w for parts in names.values() for name in parts for w in name)}
        exists(glove_file(self.data))
        vectors = glove(glove_file(self.data), wanted)
        zero = np.zeros(len(next(iter(vectors.values()), np.zeros(1))), np.float32)

        def unit_means(phrases):
            rows = np.stack([np.mean([vectors.get(w, zero) for w in p], axis=0) for p in phrases])
            return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)

        rows, tables = unit_means([[w] for w in words]), {}
        for column, parts in names.items():
            tables[column] = (rows @ unit_means(parts).T).astype(np.float16)
        return tables, {"unknown": sum(w not in vectors for w in words)}

    def __call__(self, words, ids, column):
        """(K, N_V) float32 of words (K,) and the regions' ids (K, N_V), -1 unknown; column: cls_id
        or attr_id
        """
        table = self.tables[column]
        if ids.max(initial=-1) >= table.shape[1]:
            raise DataError(
                f"a region of {column} {ids.max()}, but only {table.shape[1]} names\n"
                "  Wanted: the vocabulary files of the detector that made the features."
            )
        similarity = table[words[:, None], ids.clip(min=0)]
        return np.where(ids < 0, 0, similarity).astype(np.float32)


def collate_multitask(batches, rng, k, rows, images, match):
    """All of Kervadec's supervision in one batch, as LXMERT: masked words and regions, replaced
    images, answers, and pointers.

    besides "input": masked_words, word_targets; masked_regions with region_features, region_class,
    region_attribute; match; answered, answer (K,): rows asked about their own image, and the
    answer; aligned (K,) places in B*N_L of pointed words, alignment (K, N_V) soft targets,
    aligned_row (K,).
    Of the masked regions 80 % show zeros, 10 % another region's feature, 10 % their own [LXMERT's
    code].
    """
    index, share, store = batches.index, batches.share, batches.index.store
    as_tensor = torch.from_numpy
    masked_words, new = mask_words(batches, rng, rows)
    real = length_mask(store.n_regions(images))
    masked, how = draw_mask(rng, real, batches.mask_rate), rng.random(real.shape)
    donor = images[rng.integers(len(images), size=masked.shape)]
    u = rng.random(len(rows))[share]
    rows, images, match = rows[share], images[share], match[share]
    if not len(rows):
        return empty_batch(batches)
    text, real = index.text(rows)
    masked_words, new = masked_words[share, : text.shape[1]] & real, new[share, : text.shape[1]]
    x = index.batch(rows, images, np.where(masked_words & (new >= 0), new, text))
    regions = x["regions"]
    masked, how, donor = (m[share, : regions.shape[1]] for m in (masked, how, donor))
    places = np.nonzero(masked)
    batch = {
        "task": batches.task,
        "names": index.names(rows, images),
        "match": as_tensor(match),
        "input": x,
        "masked_words": as_tensor(np.flatnonzero(masked_words)),
        "word_targets": as_tensor(text[masked_words]),
        "masked_regions": as_tensor(np.flatnonzero(masked)),
        "hidden_regions": torch.zeros(0, dtype=torch.int64),
        "region_features": regions[places],
    }
    for name, column in (("region_class", "cls_id"), ("region_attribute", "attr_id")):
        batch[name] = as_tensor(store.read(images, column)[masked].astype(np.int64))
    regions[places] = torch.where(as_tensor(how[places] < 0.8)[:, None], 0, regions[places])
    swapped = np.nonzero(masked & (how >= 0.8) & (how < 0.9))
    regions[swapped] = as_tensor(store.most_certain(donor[swapped]))
    answer = [draw_answer(index, r, v) if m else -1 for r, m, v in zip(rows, match, u)]
    answer = np.array(answer)
    batch |= {"answered": as_tensor(np.flatnonzero(answer >= 0))}
    batch |= {"answer": as_tensor(answer[answer >= 0])}
    if batches.soft_target:
        batch |= aligned_words(batches, rows, images, match)
    counts = {"": len(rows), "mlm": len(batch["masked_words"]), "answers": len(batch["answered"])}
    counts["align"] = len(batch.get("aligned", ()))
    counts |= dict.fromkeys(("class", "attribute", "feature"), len(batch["masked_regions"]))
    return batch | {"counts": counts}


def draw_answer(index, row, u):
    """One answer, as likely as its score; -1 where there is none."""
    numbers, scores = index.target_of(row)
    if not len(numbers):
        return -1
    total = np.cumsum(scores)
    return int(numbers[np.searchsorted(total / total[-1], u)])


def aligned_words(batches, rows, images, match):
    """Pointed words of the matched pairs and their soft targets; see collate_multitask."""
    store, as_tensor = batches.index.store, torch.from_numpy
    place, word, box, row = batches.index.pointers(rows)
    keep = match[row]
    place, word, box, row = place[keep], word[keep], box[keep], row[keep]
    mask, similar = length_mask(store.n_regions(images))[row], []
    for column in ("cls_id", "attr_id"):
        # colours of patches are no names
        ids = store.read(images, column)[row] if store.has_names else np.full(mask.shape, -1)
        similar.append(as_tensor(batches.similarity(word, ids, column)))
    boxes = as_tensor(store.read(images, "boxes")[row])
    target = batches.soft_target(as_tensor(box), boxes, *similar, as_tensor(mask))
    # a pointer that matches nothing is none
    keep = target.sum(dim=-1) > 0
    aligned = {"aligned": as_tensor(place)[keep], "aligned_row": as_tensor(row)[keep]}
    return aligned | {"alignment": target[keep]}


class PhraseInput:
    """MAF's input: captions as phrases, and what the detector says of regions.

    At most the 100 most certain regions of an image [authors' code].
    """

    MAX_REGIONS = 100

    def __init__(self, data, index):
        self.index, names = index, {}
        for what in ("objects", "attributes"):
            rows = [index.tokenizer.ids.get(name, 1) for name in detector_names(data, what)]
            # an id of -1, unknown, finds the last
            names[what] = np.array([*rows, 1])
        self.label_words, self.attribute_words = names["objects"], names["attributes"]

    def __call__(self, rows, images):
        """The model's input for these captions' phrases (b, Q, W) and these images' regions
        (B, K), and the masks of both.
        """
        index, store, as_tensor = self.index, self.index.store, torch.from_numpy
        tokens, real = index.text(rows)
        number = index.text(rows, "types")[0]  # (b, N) of phrase
        place = np.arange(real.shape[1]) - np.argmax(number[:, :, None] == number[:, None], axis=2)
        row = np.repeat(np.arange(len(rows)), real.sum(axis=1))
        shape = len(rows), number.max(initial=0) + 1, place[real].max(initial=0) + 1
        phrases = np.zeros(shape, np.int64)
        phrases[row, number[real], place[real]] = tokens[real]
        region_mask = length_mask(store.n_regions(images))[:, : self.MAX_REGIONS]
        most, names = region_mask.shape[1], {}
        for name, column, words in (
            ("labels", "cls_id", self.label_words),
            ("attributes", "attr_id", self.attribute_words),
        ):
            known = words[store.read(images, column)[:, :most]]
            names[name] = as_tensor(np.where(region_mask, known, 0))
        features = as_tensor(store.read(images)[:, :most][region_mask])
        return {
            "input": {
                "phrases": as_tensor(phrases),
                **names,
                "features": features,
                "place": as_tensor(np.flatnonzero(region_mask)),
            },
            "word_mask": as_tensor(phrases > 0),
            "phrase_mask": as_tensor((phrases > 0).any(axis=2)),
            "region_mask": as_tensor(region_mask),
        }


def collate_phrases(batches, rng, k, rows):
    """Captions' phrases and all images of the batch. Each process has its share of the captions and
    all of the images, so that any number of them has the same negatives. "own" (b,): which of the
    images each caption belongs to.
    """
    own = np.arange(len(rows))[batches.share]
    if not len(own):
        return empty_batch(batches)
    names = [batches.index.id(row) for row in rows[own]]
    batch = {"task": batches.task, "names": names, "own": torch.from_numpy(own)}
    batch["counts"] = {"": len(own)}
    return batch | batches.phrase_input(rows[own], batches.index.image[rows])


def collate_pictures(batches, rng, k, rows):
    """Captions with their pictures, for ALBEF and AMC.

    text, masked_text (b, N_L), text_mask; masked_words (K,) places in b*N_L, word_targets (K,);
    pixels (b, R, R, 3) uint8; boxed, region_target as collate_pairs; own (b,): which of the whole
    batch; u (2, B) in [0, 1): chooses the negatives, the same for all processes; number k
    augment: flip (mirrors boxes too, and swaps left and right in the text), jitter (half of them:
    brightness, contrast and colour by up to 0.4), grey (a fifth of them) [AMC's code, which leaves
    the text as it is]
    """
    index, B = batches.index, len(rows)
    mine = np.arange(batches.rank, B, batches.world_size)
    masked, new = mask_words(batches, rng, rows)
    u, factors = rng.random((4, B)), rng.uniform(0.6, 1.4, (B, 3))
    negatives = rng.random((2, B))
    chances = {"flip": 0.5, "jitter": 0.5, "grey": 0.2}
    flip, jitter, grey = (
        (name in batches.augment) & (u[i] < p) for i, (name, p) in enumerate(chances.items())
    )
    # as wide on all processes
    text, real = (x[mine] for x in index.text(rows))
    left, right = (index.tokenizer(side) for side in ("left", "right"))
    if len(left) == len(right) == 1:
        mirrored = np.where(text == left[0], right[0], np.where(text == right[0], left[0], text))
        text = np.where(flip[mine, None], mirrored, text)
    masked, new = masked[mine] & real, new[mine]
    images = index.image[rows[mine]]
    pixels = []
    for x, i in zip(index.store.pixels(images), mine):
        pixels.append(augment_picture(x, flip[i], factors[i] if jitter[i] else None, grey[i]))
    as_tensor = torch.from_numpy
    batch = {
        "task": batches.task,
        "names": index.names(rows[mine], images),
        "number": k,
        "own": as_tensor(mine),
        "u": as_tensor(negatives).float(),
        "text": as_tensor(text),
        "masked_text": as_tensor(np.where(masked & (new >= 0), new, text)),
        "text_mask": as_tensor(real),
        "pixels": as_tensor(np.stack(pixels)),
        "masked_words": as_tensor(np.flatnonzero(masked)),
        "word_targets": as_tensor(text[masked]),
        "counts": {"": len(mine), "mlm": int(masked.sum())},
    }
    return add_boxed(batches, batch, rows[mine], range(len(mine)), u[3, mine], flip[mine])


def check_batch_fits(batches):
    """Contrast needs whole batches."""
    if batches.size > len(batches.index):
        raise DataError(
            f"{batches.index.name}: {len(batches.index):,} texts for batches of {batches.size}\n"
            "  Wanted: at least one batch. Lower --batch-size."
        )


def augment_picture(pixels, flip, factors, grey):
    """One picture (R, R, 3) uint8, mirrored, with other brightness, contrast and colour, or
    grey.
    """
    picture = Image.fromarray(pixels[:, ::-1] if flip else pixels)
    if factors is not None:
        enhancers = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
        for enhance, factor in zip(enhancers, factors):
            picture = enhance(picture).enhance(factor)
    return np.asarray(picture.convert("L").convert("RGB") if grey else picture)


def normalize_pixels(pixels):
    """(B, R, R, 3) uint8, on any device -> (B, 3, R, R) float32, less the mean, by the deviation"""
    mean, std = (
        torch.tensor(x, device=pixels.device).view(3, 1, 1) * 255 for x in (PIXEL_MEAN, PIXEL_STD)
    )
    return (pixels.permute(0, 3, 1, 2).float() - mean) / std


def collate_examples(batches, rng, k, rows, examples):
    """Examples of a downstream task, and "target": (B,) the number of what is right, or (B,
    answers) how right each answer is.
    """
    examples = examples[batches.share]
    if not len(examples):
        return empty_batch(batches)
    return {"task": batches.task} | example_batch(batches.index, examples, batches.answers)


def example_batch(index, examples, answers=0):
    """The texts of these examples, one after the other, and their targets."""
    examples = np.asarray(examples, np.int64)
    rows = (examples[:, None] * index.group + np.arange(index.group)).ravel()
    numbers = index.target_scores(examples, answers) if answers else index.target_numbers(examples)
    return {
        "names": [index.id(row) for row in rows[:: index.group]],
        "input": index.batch(rows, index.image[rows]),
        "target": torch.from_numpy(numbers),
        "counts": {"": len(examples)},
    }


def check_answered(batches):
    """A task needs examples to learn from."""
    if not len(answered_examples(batches.index)):
        raise DataError(
            f"{batches.index.name}: no example with an answer to learn from\n"
            "  Choose a split that has answers."
        )


def ablate_modality(batch, modality):
    """A control: the same batch without its words ("text") or without what the regions show and
    where they are ("regions").

    Words: [CLS] [SEP] stay. Regions: one remains, and all of them where regions are what is asked
    for (batch["keep_regions"]).
    """
    x = dict(batch["input"])
    if modality == "text":
        end = x["text_mask"].sum(dim=1, keepdim=True) - 1
        x["text"] = torch.cat([x["text"][:, :1], x["text"].gather(1, end)], dim=1)
        x["text_mask"], x["length"] = x["text_mask"][:, :2], None
        x.pop("text_type", None)
    else:
        x |= {name: torch.zeros_like(x[name]) for name in ("regions", "boxes")}
        if not batch.get("keep_regions"):
            columns = [c for c in ("regions", "boxes", "region_mask", "region_type") if c in x]
            x |= {c: x[c][:, :1] for c in columns} | {"length": None}
    return batch | {"input": x}


class Kind(NamedTuple):
    """What the batches of a task are."""

    stream: int  # number of its random numbers
    draw: Callable  # (batches, rng) -> columns of an epoch
    collate: Callable  # (batches, rng, k, *columns of a batch) -> dict
    cost: Callable = pair_cost  # (batches, *columns) -> words + regions of each
    by_example: bool = False  # size counts examples, not words and regions
    check: Callable = None  # (batches): an error where they cannot be made


KINDS = {
    "mlm": Kind(1, draw_matched, collate_pairs),
    "mrfr": Kind(2, draw_matched, collate_pairs),
    "mrc": Kind(3, draw_matched, collate_pairs),
    "mrckl": Kind(4, draw_matched, collate_pairs),
    "itm": Kind(5, draw_matching, collate_pairs),
    "rank": Kind(6, draw_matched, collate_ranking, group_cost),
    "multitask": Kind(15, draw_replaced_images, collate_multitask),
    "maf": Kind(16, draw_texts, collate_phrases, by_example=True),
    "albef": Kind(17, draw_texts, collate_pictures, by_example=True, check=check_batch_fits),
    "examples": Kind(20, draw_examples, collate_examples, example_cost, check=check_answered),
}
BATCH_OPTIONS["phrase_input"] = None  # PhraseInput of the captions

# 7. Loader --------------------------------------------------------------------------------------


class MixedBatches(torch.utils.data.Dataset):
    """Training step -> its batches. One stream is drawn for each step by its weight, the same on
    all processes.

    streams           list of Batches
    sampling_weights  how often each is drawn
    accumulate        batches of a step, all of its stream
    """

    def __init__(self, streams, sampling_weights, steps, seed, accumulate=1):
        p = np.array(sampling_weights, float)
        self.streams, self.steps, self.accumulate = streams, steps, accumulate
        rng = np.random.default_rng([seed, 0])
        self.choice = rng.choice(len(streams), size=steps, p=p / p.sum())
        # how often the step's stream was drawn before
        self.number = np.zeros(steps, np.int64)
        for s in range(len(streams)):
            self.number[self.choice == s] = np.arange((self.choice == s).sum())

    def __len__(self):
        return self.steps

    def __getitem__(self, step):
        stream, k = self.streams[self.choice[step]], self.number[step] * self.accumulate
        return [stream[int(k) + a] for a in range(self.accumulate)]


def make_loader(mixed, start, workers, pin_memory):
    """Iterator over the steps from `start` on; workers keep ahead of the model if there are any."""
    loader = torch.utils.data.DataLoader(
        mixed,
        batch_size=None,
        sampler=range(start, len(mixed)),
        num_workers=workers,
        collate_fn=keep_batch,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
    )
    return iter(loader)


def keep_batch(batch):
    """Batches are whole already: the loader only carries them."""
    return batch


# 8. Command line --------------------------------------------------------------------------------


def make_parser():
    """The command line of this file"""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(
        description="Convert region features. Pictures: python evaluate.py extract",
        formatter_class=formatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", description=pack.__doc__, formatter_class=formatter)
    packing.add_argument(
        "source",
        nargs="+",
        help="LXMERT's or bottom-up attention's .tsv files, or folders of UNITER's .npz files",
    )
    packing.add_argument("--out", required=True, help="a new folder, e.g. DATA/regions/coco")
    packing.add_argument(
        "--images",
        help="folder of the pictures, to read their sizes from (.npz does not hold them)",
    )
    return parser


def main(argv=None):
    """python data.py pack"""
    args = make_parser().parse_args(argv)
    try:
        pack(args.source, args.out, args.images)
    except (DataError, OSError) as error:
        sys.exit(f"data.py: error: {error}")


if __name__ == "__main__":
    main()
