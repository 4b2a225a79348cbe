"""Official files in, batches out. One way for every data set:

    file -> reader -> Record -> Index -> Batches -> loader -> training step

Letters: B pairs, N_L words, N_V regions, D_V width of a region feature, C region classes
(background first). A batch is a dict of tensors with fixed names; masks are bool, True = real;
boxes are x1 y1 x2 y2 in [0, 1].

    1. Errors and files     DataError  read_json  read_pickle  write_atomic  memory_mapped
    2. Tokenizers           WordPiece (BERT, cased or uncased)
    3. Region stores        RegionStore  JoinedStore  PatchStore  CropStore
    4. Readers              one generator of Records a data set and nothing else; in this order:
         captions           coco_captions  karpathy_captions  winoground_examples
                            nlvr_presentations
         pre-training       coco_corpus  vg_descriptions  vg_crops  web captions (cc3m, cc12m, sbu)
         downstream         vqa_questions  vcr_choices  nlvr2_pairs  entailment_pairs
                            referring_expressions  gqa_questions
         alignment          joined_descriptions  entity_captions  vg_triplets  referit_expressions
    5. Index                Index  open_index  make_index: records, tokenized, memory-mapped
    6. Batches              Batches: the planner. KINDS: what a batch of each task holds
"""

import array
import contextlib
import copy
import difflib
import fcntl
import functools
import gzip
import hashlib
import json
import math
import mmap
import os
import pickle
import re
import shutil
import string
import unicodedata
import warnings
import xml.etree.ElementTree
import zlib
from collections import Counter
from itertools import chain, islice
from pathlib import Path
from sys import intern
from typing import Callable, NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageEnhance, ImageOps
from tqdm import tqdm

# 1. Errors and files ----------------------------------------------------------------------------

AGAIN = "Fetch the file again."
CUT_SHORT = "Most often a download or a copy that stopped half way: fetch it again."


class DataError(ValueError):
    """Input that cannot be used: which record, what was found, what is wanted, what to do"""

    def __init__(self, found, wanted="", hint=""):
        lines = [found, f"Wanted: {wanted}" if wanted else "", hint]
        super().__init__("\n  ".join(filter(None, lines)))


# {path: (size, time) or None} of every file that a reader has asked for. An index keeps this list
# and is made again once one of them changes, comes or goes.
sources = {}


def exists(path):
    """Is this file there? FILE.gz does as well as FILE. Either is noted as a source."""
    # noted even where it is missing: an index is made again when it comes
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
        raise DataError(f"{path} is missing", what, hint)
    return Path(path)


def write_atomic(path, content):
    """Write text or bytes beside the file, then rename: nobody ever sees half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(beside, path)
    except OSError:
        # a full disk: leave no rubbish on it
        beside.unlink(missing_ok=True)
        raise


OFFICIAL = 'Fetch it from its official address into this place (README, "Full data").'


@contextlib.contextmanager
def open_text(path, what, hint=OFFICIAL):
    """A UTF-8 text file, open; FILE.gz does as well as FILE."""
    zipped = exists(path) and not Path(path).exists()
    opener, path_there = (gzip.open, f"{path}.gz") if zipped else (open, need(path, what, hint))
    try:
        with opener(path_there, "rt", encoding="utf-8") as file:
            yield file
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
        hint = f"{what}, in UTF-8. Fetch it again."
        raise DataError(f"{path} cannot be read as text: {error}", hint) from None


def read_text(path, what, hint=OFFICIAL):
    """A text file, whole: a small one"""
    with open_text(path, what, hint) as file:
        return file.read()


def read_lines(path, what):
    """Yields a text file's lines; the file is never in memory whole."""
    with open_text(path, what) as file:
        for line in file:
            yield line.rstrip("\n")


def read_json(path, what):
    """A JSON file, whole: a small one"""
    try:
        return json.loads(read_text(path, what))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not whole JSON: {error}", hint=CUT_SHORT) from None


# characters read at a time; no text or number in a file is so long
PIECE, LONGEST = 1 << 22, 1 << 18


def json_items(path, what, key="", named=False):
    """Yields the values of a JSON file's list, or of the list `key` of its record; named: (name,
    value) of its record. The file is read a few megabytes at a time.
    """
    # unescaped quotes stand for no other thing, so a key is found without reading what is before it
    bracket, end = (r"\{", "}") if named else (r"\[", "]")
    opening = re.compile((rf'"{key}"\s*:\s*' if key else r"\A\s*") + bracket)
    with open_text(path, what) as file:
        text, passed, comma = file.read(PIECE), 0, None
        while not (start := opening.search(text)):
            piece = file.read(PIECE)
            if not piece:
                # the error that it is: no JSON, no such field, not a list
                whole = read_json(path, what)
                found = field(whole, key, path, list) if key else whole
                wanted = f"{KIND_NAMES[dict if named else list]}. {AGAIN}"
                raise DataError(f"{path} is {found!r:.60}", wanted)
            text = text[-LONGEST:] + piece
        at = start.end()
        while True:
            gap = re.compile(r"\s*(,?)\s*").match(text, at)
            if text[gap.end() : gap.end() + 1] == end:
                return
            try:
                value, stop = json_item(text, gap, comma, named)
            except json.JSONDecodeError as error:
                piece = file.read(PIECE)
                # most often the item goes on in the next piece
                if not piece or error.pos < len(text) - LONGEST:
                    found = f"{path} is not whole JSON at character {passed + error.pos:,}"
                    raise DataError(f"{found}: {error.msg}", hint=CUT_SHORT) from None
                text, at, passed = text[at:] + piece, 0, passed + at
                continue
            yield value
            at, comma = stop, ","


def json_item(text, gap, comma, named):
    """(value or (name, value), where it ends) behind a gap that holds a comma, but for the first"""
    decode, at, name = json.JSONDecoder().raw_decode, gap.end(), None
    if comma and not gap[1]:
        raise json.JSONDecodeError("no comma", text, at)
    if named:
        name, at = decode(text, at)
        colon = re.compile(r"\s*:\s*").match(text, at)
        if not colon:
            raise json.JSONDecodeError("no colon", text, at)
        at = colon.end()
    value, at = decode(text, at)
    if text[at : at + 1] in ("", ".", "e", "E"):
        # a number that goes on
        raise json.JSONDecodeError("it ends here", text, at)
    return ((name, value) if named else value), at


def read_json_lines(path, what):
    """Yields (file and line, record) of a file of one JSON record a line."""
    for number, line in enumerate(read_lines(path, what), 1):
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not whole JSON: {error}", hint=AGAIN) from None
        yield where, need_record(record, where)


class PlainPickle(pickle.Unpickler):
    """Lists, dicts, strings and numbers: one that names a class is refused before it can run."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


# what pickle raises on a file that is none, or is cut
PICKLE_ERRORS = pickle.UnpicklingError, EOFError, LookupError, AttributeError, TypeError, ValueError


def read_pickle(path, what):
    """A Python 2 pickle of plain containers (refs(unc).p); anything else in it is an error."""
    path = need(path, what, "Fetch it from its official address into this place.")
    try:
        with open(path, "rb") as file:
            return PlainPickle(file, encoding="latin1").load()
    except PICKLE_ERRORS as error:
        raise DataError(
            f"{path} is no pickle of plain lists, dicts, strings and numbers: {error}",
            f"{what}. Fetch it again from its official address; a pickle can hold code, so any "
            "other is refused.",
        ) from None


NUMBER, SCALAR, OPTIONAL = (int, float), (int, float, str), (int, type(None))
KIND_NAMES = {str: "a text", list: "a list", dict: "a record", int: "a whole number"}
KIND_NAMES |= {NUMBER: "a number", SCALAR: "a number or a text", OPTIONAL: "a number or null"}


def field(record, name, where, kind=SCALAR):
    """record[name] of this kind; else an error that has the nearest name."""
    if not isinstance(record, dict) or name not in record:
        have = list(map(str, record)) if isinstance(record, dict) else [type(record).__name__]
        near = difflib.get_close_matches(name, have, 1)
        found = f"{where} has no field {name!r}: found {', '.join(have[:8]) or 'nothing'}"
        hint = f"Nearest: {near[0]!r}. " if near else ""
        raise DataError(found, hint=hint + "Compare with the official format in the README.")
    if not isinstance(record[name], kind):
        wanted = f"{KIND_NAMES[kind]}. {AGAIN}"
        raise DataError(f"{where}: {name} is {record[name]!r:.60}", wanted)
    return record[name]


def need_record(record, where):
    """A record, if it is one: names and values; else an error."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: {record!r:.60}", f"a record. {AGAIN}")
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
            # a lock of the folder's name, beside it: the folder itself is renamed away
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = open(f"{folder}.lock", "w")
        except OSError as error:
            wanted = "a folder for the data's index; it may be a link to one that can be written"
            raise DataError(f"{folder.parent} cannot be written: {error}", wanted) from None
        with lock:
            # the system frees this lock when its holder ends, however it ends
            fcntl.flock(lock, fcntl.LOCK_EX)
            # whoever waited here finds what the first has written
            meta = read_fresh_meta(folder, key)
            if meta is None:
                meta = write_arrays(folder, key, build)
    # what is built of these arrays is built of the same files
    sources.update({str(folder.parent.parent / name): s for name, s in meta["sources"].items()})
    return load_arrays(folder), meta


def kept(function):
    """function(data, ...) -> list of texts, read from files of gigabytes: kept in DATA/index."""

    @functools.wraps(function)
    def read(data, *args):
        name = "-".join([function.__name__, *map(str, args)])

        def build():
            texts = (field({"entry": x}, "entry", name, str) for x in function(data, *args))
            return {"texts": np.array([x.encode() for x in texts], "S")}, {}

        arrays, _ = memory_mapped(Path(data) / "index" / name, [INDEX_VERSION], build)
        return [text.decode() for text in arrays["texts"]]

    return read


def load_arrays(folder, hint="Delete this folder: the next run makes it again."):
    """{name: array} of a folder's .npy files, memory-mapped"""
    try:
        return {path.stem: np.load(path, mmap_mode="r") for path in Path(folder).glob("*.npy")}
    except Exception as error:
        # numpy's reader of headers raises whatever a broken header makes of it
        why = str(error) or type(error).__name__
        raise DataError(f"{folder} cannot be read: {why}", hint=hint) from None


def read_fresh_meta(folder, key):
    """meta.json of a folder of arrays, None where it is missing, of another key, or out of date."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
    except (OSError, ValueError):
        return None
    # names of files are relative to the data tree, so that a copied or moved tree stays valid
    tree, stamps = folder.parent.parent, meta["sources"].items()
    same_files = all(file_stamp(tree / name) == stamp for name, stamp in stamps)
    # a key that went through JSON has lists for tuples
    return meta if same_files and meta["key"] == json.loads(json.dumps(key)) else None


def write_arrays(folder, key, build):
    """Build the arrays beside their place, then rename: a killed process leaves nothing half."""
    outer = dict(sources)
    sources.clear()
    arrays, meta = build()
    beside = Path(f"{folder}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        for name, values in arrays.items():
            np.save(beside / f"{name}.npy", values)
    except OSError as error:
        raise DataError(f"{beside} cannot be written: {error}", hint="Free some space.") from None
    tree = folder.parent.parent
    names = {os.path.relpath(name, tree): stamp for name, stamp in sources.items()}
    meta = meta | {"key": key, "sources": names}
    sources.update(outer)
    (beside / "meta.json").write_text(json.dumps(meta))
    shutil.rmtree(folder, ignore_errors=True)
    # what others have mapped stays readable until they let go of it
    os.replace(beside, folder)
    return meta


# 2. Tokenizers ----------------------------------------------------------------------------------

# CJK ideographs, which BERT takes one by one
IDEOGRAPHS = re.compile(
    "([\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
    "\U0002b820-\U0002ceaf\uf900-\ufaff\U0002f800-\U0002fa1f])"
)


def is_punctuation(c):
    """As BERT: all of ASCII that is no letter or digit, and Unicode's P"""
    return c in string.punctuation or unicodedata.category(c).startswith("P")


class WordPiece:
    """BERT's tokenizer: text -> ids of word pieces.

    vocab_file: one piece a line, "##" starts a piece inside a word; lower: lower-case and strip
    accents first. Which of the two a model wants is decided by its recipe, never by the file.
    new_words: words that get ids of their own behind the file's, e.g. VCR's person_0 ... person_80
    """

    SPECIAL = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"

    def __init__(self, vocab_file, lower, new_words=()):
        hint = "BERT's own vocab.txt fits; `python tests/toy.py` writes a small one."
        text = read_text(vocab_file, "a WordPiece vocabulary, one piece a line", hint)
        self.pieces = [*(p.rstrip("\r") for p in text.rstrip("\n").split("\n")), *new_words]
        self.lower, self.new_words = lower, len(new_words)
        self.ids = {p: i for i, p in enumerate(self.pieces)}
        for token in self.SPECIAL:
            if token not in self.ids:
                found = f"{vocab_file} has no {token} among its {len(self.pieces):,} lines"
                wanted = f"a BERT vocabulary with {' '.join(self.SPECIAL)}. Fetch it again."
                raise DataError(found, wanted)
        self.pad, self.unk, self.cls, self.sep, self.mask = (self.ids[t] for t in self.SPECIAL)
        # never cut into pieces
        self.whole = {word: [self.ids[word]] for word in new_words}
        # words are remembered, so that a corpus costs a look-up a word
        self.cache = dict(self.whole)
        # what may stand for a masked word: all but [PAD], [unused1] and their like
        special = re.compile(r"\[.+\]")
        ordinary = [i for i, p in enumerate(self.pieces) if not special.fullmatch(p)]
        self.ordinary = np.array(ordinary)

    def __len__(self):
        return len(self.pieces)

    def fingerprint(self):
        """What an index must be made again for"""
        text = f"{self.lower}\n" + "\n".join(self.pieces)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __call__(self, text):
        """ids without [CLS] and [SEP]"""
        # most captions: nothing to clean
        if not (text.isascii() and text.isprintable()):
            text = self.clean(text)
        # a web corpus has more words than memory
        if len(self.cache) > 1_000_000:
            self.cache = dict(self.whole)
        ids = []
        for word in text.split():
            if word not in self.cache:
                self.cache[word] = [i for token in self.split(word) for i in self.greedy(token)]
            ids += self.cache[word]
        return ids

    def clean(self, text):
        """One Unicode form, no control characters, every blank a space, ideographs apart"""
        letters = []
        for c in unicodedata.normalize("NFC", text):
            if c in "\t\n\r" or unicodedata.category(c) == "Zs":
                letters.append(" ")
            elif c != "\ufffd" and not unicodedata.category(c).startswith("C"):
                letters.append(c)
        return IDEOGRAPHS.sub(r" \1 ", "".join(letters))

    def split(self, word):
        """Lower-case, strip accents, and cut at punctuation; special tokens stay whole."""
        if "[" in word:
            parts = [p for p in re.split(r"(\[(?:PAD|UNK|CLS|SEP|MASK)\])", word) if p]
            if len(parts) > 1 or word in self.SPECIAL:
                split = ([p] if p in self.SPECIAL else self.split(p) for p in parts)
                return list(chain.from_iterable(split))
        if self.lower:
            # letter by letter: str.lower() would turn a last sigma into another letter
            letters = unicodedata.normalize("NFD", "".join(c.lower() for c in word))
            word = "".join(c for c in letters if unicodedata.category(c) != "Mn")
        return "".join(f" {c} " if is_punctuation(c) else c for c in word).split()

    def greedy(self, token):
        """Longest piece first; a token that does not come out, or of over 100 letters, is [UNK]."""
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


def strip_punctuation(word):
    """A word as GloVe knows it: lower case, without the punctuation around it."""
    return word.lower().strip(string.punctuation)


def detector_names(data, what):
    """Names of the detector's "objects" or "attributes"; of aliases ("road,street") the first."""
    path = Path(data) / "vg" / f"{what}_vocab.txt"
    hint = "the detector's names, one a line (bottom-up attention's repository)"
    names = [line.split(",")[0].strip() for line in read_text(path, hint).rstrip("\n").split("\n")]
    if "" in names:
        raise DataError(f"{path}, line {1 + names.index('')}: no name", f"one a line. {AGAIN}")
    return names


def check_names(ids, count, column):
    """Ids of a store's column are of the detector whose names the vocabulary files hold."""
    if ids.max(initial=-1) >= count:
        found = f"a region of {column} {ids.max()}, but only {count} names"
        raise DataError(found, "the vocabulary files of the detector that made the features.")


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
    broken = (
        "Most often a copy or a conversion that stopped half way.\n  Make the store again: "
        "evaluate.py pack (toy data: delete the toy folder, the next run makes it again)."
    )

    def __init__(self, folder):
        hint = f"Make one: python evaluate.py pack FEATURES.tsv --out {folder}"
        self.folder = need(folder, "a region store", hint)
        note = self.folder / "meta.json"
        self.meta = need_record(read_json(note, "the store's description"), note)
        self.classes = self.meta.get("classes")
        self.arrays = load_arrays(self.folder, self.broken)
        needed = "ids", "wh", "offsets", "features", "boxes"
        if missing := [name for name in needed if name not in self.arrays]:
            raise self.error(f"lacks {missing[0]}.npy")
        self.ids, self.wh, self.offsets, self.features, self.boxes = map(self.arrays.get, needed)
        self.checked_features, self.files = np.zeros(len(self.ids), bool), {}
        self.check_columns()
        for name in {"features", "cls_prob"} & self.arrays.keys():
            # single rows are wanted, not the megabytes round them
            self.arrays[name].base.madvise(mmap.MADV_RANDOM)

    def __reduce__(self):
        return type(self), (self.folder,)

    def __len__(self):
        return len(self.ids)

    def __str__(self):
        counts = f"{len(self):,} images, {len(self.features):,} regions"
        return f"{self.folder}: {counts}, {self.features.nbytes / 2**20:,.0f} MiB memory-mapped"

    def error(self, what):
        """A DataError about this store."""
        return DataError(f"{self.folder} {what}", hint=self.broken)

    def check_columns(self):
        """Every array has the kind and the shape that COLUMNS and PER_IMAGE say."""
        rows, N = len(self.features), len(self.ids)
        sizes = {"D_V": self.features.shape[-1], "C": self.classes}
        # sizes of other arrays follow from the features' and the ids'
        wanted = {"offsets": (PER_IMAGE["offsets"], (N + 1,)), "wh": (PER_IMAGE["wh"], (N, 2))}
        wanted["ids"] = "S", (N,)
        for name, (dtype, shape) in COLUMNS.items():
            wanted[name] = dtype, (rows, *(sizes.get(s, s) for s in shape))
        for name in wanted.keys() & self.arrays.keys():
            values, (dtype, shape) = self.arrays[name], wanted[name]
            if values.shape != shape or values.dtype.kind != np.dtype(dtype).kind:
                found = f"{name}.npy is {values.dtype} {values.shape}"
                wish = f"{np.dtype(dtype).name} {shape}"
                raise self.error(f"does not fit together: {found}, wanted {wish}")
        if N == 0:
            raise self.error("is empty")
        if self.offsets[0] != 0 or self.offsets[-1] != rows:
            raise self.error(f"does not fit together: {self.offsets[-1]} offsets, {rows} rows")

    def check_rows(self, chunk=1 << 16):
        """Look at every row once, in pieces, so that any store takes the same memory."""
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
            self.check_boxes(np.arange(start, min(start + chunk, len(self.ids))))

    def check_boxes(self, images):
        """Boxes of consecutive images lie inside them."""
        first = int(self.offsets[images[0]])
        boxes = np.asarray(self.boxes[first : self.offsets[images[-1] + 1]])
        wh = np.repeat(self.wh[images], self.n_regions(images), axis=0)
        # float32 boxes of float arithmetic elsewhere
        slack = 1e-3 * wh + 1e-4
        inside = (boxes[:, :2] >= -slack) & (boxes[:, 2:] <= wh + slack)
        # a box with nan in it is wrong too
        wrong = ~(inside & (boxes[:, 2:] >= boxes[:, :2])).all(axis=1)
        if wrong.any():
            row = first + int(wrong.argmax())
            i = int(np.searchsorted(self.offsets, row, side="right") - 1)
            corners = np.asarray(self.boxes[row]).round(1).tolist()
            raise self.error(
                f"has {int(wrong.sum())} bad boxes; the first is region {row - self.offsets[i]} of "
                f"image {self.image_id(i)}: x1 y1 x2 y2 = {corners} in an image of "
                f"{self.wh[i].tolist()} pixels"
            )

    def stamps(self):
        """{file: (size, time)} of the store's own files: sources of every index made with it."""
        return {str(p): file_stamp(p) for p in self.folder.iterdir() if p.is_file()}

    def image_id(self, image):
        """The name of an image: what readers call it"""
        return self.ids[image].decode()

    def finder(self):
        """A function from a list of image ids to their numbers (n,), -1 where there is none."""
        # sorted once: a dictionary of millions of names is a gigabyte of Python objects
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

    def readable(self, images):
        """(B,) bool: which images can be read; of features all"""
        return np.ones(len(images), bool)

    def column(self, name):
        """One of the store's arrays, or an error where a converter had nothing to put there."""
        if name not in self.arrays:
            wanted = "classes and attributes: evaluate.py extract, or LXMERT's TSV files"
            have = ", ".join(sorted(self.arrays))
            raise DataError(f"{self.folder} has no {name}: {have}", wanted)
        return self.arrays[name]

    def read(self, images, column="features"):
        """Rows of these images side by side: (B, N_V, ...) padded with 0."""
        values, n = self.column(column), self.n_regions(images)
        out = np.empty((len(n), n.max(initial=0), *values.shape[1:]), values.dtype)
        real = np.arange(out.shape[1]) < n[:, None]
        out[~real] = 0
        if column not in self.files:
            self.files[column] = open(values.filename, "rb", buffering=0)
        file, row = self.files[column].fileno(), values.strides[0]
        if os.fstat(file).st_size < values.offset + values.nbytes:
            raise self.error(f"has lost rows of {column}.npy since it was opened")
        if row < 1024:  # boxes: many images lie on a page
            out[real] = self.read_at(images, real, column)
            return out
        # rows of an image lie side by side: one read each; a mapped file comes page by page, 14 to
        # 50 times slower where nothing is in memory yet [measured on files of holes]
        for b, (start, k) in enumerate(zip(self.offsets[images].tolist(), n)):
            os.preadv(file, [out[b, :k]], values.offset + start * row)
        if column == "features" and not self.checked_features[images].all():
            # looked at once an image: nan and inf have an exponent of ones
            odd = ((out.view(np.uint16) & 0x7C00) == 0x7C00).any(axis=(1, 2))
            if odd.any():
                name = self.image_id(images[int(odd.argmax())])
                raise self.error(f"holds nan or inf in the features of image {name}")
            self.checked_features[images] = True
        return out

    def read_at(self, images, mask, column):
        """(K, ...) the regions of these images at mask (B, N_V), and no others"""
        row, region = np.nonzero(mask)
        return self.column(column)[self.offsets[images][row] + region]

    def most_certain(self, images):
        """(B, D_V) the first region of each image"""
        return self.features[self.offsets[images]]

    def relative_boxes(self, images):
        """(B, N_V, 4) float32, x1 y1 x2 y2 divided by width and height"""
        wh = np.tile(self.wh[images], 2)[:, None].astype(np.float32)
        return (self.read(images, "boxes") / wh).clip(0, 1)


class JoinedStore(RegionStore):
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
        for store in {id(store): store for store, _, _ in self.parts}.values():
            store.check_rows()

    def stamps(self):
        return {k: v for store, _, _ in self.parts for k, v in store.stamps().items()}

    def image_id(self, image):
        names = [store.image_id(images[image]) for store, images, _ in self.parts]
        return " ".join(dict.fromkeys(names))

    def finder(self):
        find = self.parts[0][0].finder()
        of_first = np.full(len(self.parts[0][0]), -1)
        of_first[self.parts[0][1]] = np.arange(len(self))
        return lambda names: np.where((at := find(names)) < 0, -1, of_first[at])

    def n_regions(self, images):
        return sum(store.n_regions(own[images]) for store, own, _ in self.parts)

    def readable(self, images):
        return np.all([store.readable(own[images]) for store, own, _ in self.parts], axis=0)

    def join(self, images, pieces):
        """pieces: one array (B, N, ...) a part; the real regions of each side by side"""
        counts = [store.n_regions(own[images]) for store, own, _ in self.parts]
        width = sum(counts).max(initial=0)
        out = np.zeros((len(images), width, *pieces[0].shape[2:]), pieces[0].dtype)
        # where in each row the next part begins
        start = np.zeros(len(images), np.int64)
        for piece, n in zip(pieces, counts):
            real = length_mask(n, piece.shape[1])
            row, column = np.nonzero(real)
            out[row, column + start[row]] = piece[real]
            start += n
        return out

    def read(self, images, column="features"):
        return self.join(images, [s.read(own[images], column) for s, own, _ in self.parts])

    def read_at(self, images, mask, column):
        return self.read(images, column)[mask]

    def relative_boxes(self, images):
        return self.join(images, [s.relative_boxes(own[images]) for s, own, _ in self.parts])

    def region_types(self, images):
        """(B, N_V) int64 rows of the type table, 0 in padding"""
        pieces = []
        for store, own, kind in self.parts:
            width = max(1, store.n_regions(own[images]).max(initial=0))
            pieces.append(np.repeat(kind[images, None], width, 1).astype(np.int64))
        return self.join(images, pieces)


# Folders of a region store's pictures in the data tree, where it is not NAME/images.
PICTURES = {
    "coco": ("coco/train2014", "coco/val2014", "coco/test2015"),
    "flickr30k": ("flickr30k/flickr30k-images",),
    "vg": ("vg/VG_100K", "vg/VG_100K_2"),
    "cc3m_train": ("cc3m/images",),
    "cc3m_val": ("cc3m/images",),
    "nlvr": ("nlvr",),
    "aro": ("aro/crops",),
    "whatsup": ("whatsup/controlled_images", "whatsup/controlled_clevr"),
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
        crops = name == "vg_crops"
        if self.regions and crops:
            raise DataError("--corpora crops is of pictures", "--vision patches")
        if not self.regions:
            kind = CropStore if crops else PatchStore
            return kind(self.data, name, self.resolution, self.patch)
        if name != "vcr":
            return RegionStore(Path(self.regions) / name)
        # annotated boxes, then the detector's, of the images that both have
        given, detected = (RegionStore(Path(self.regions) / n) for n in ("vcr_gt", "vcr_det"))
        at = detected.finder()([name.decode() for name in given.ids])
        return JoinedStore([(given, np.flatnonzero(at >= 0), 1), (detected, at[at >= 0], 1)])


def picture_folders(data, name):
    """Where a store's pictures are"""
    return [Path(data) / place for place in PICTURES.get(name, (f"{name}/images",))]


def walk_pictures(data, name):
    """Yields (image id, path in the tree) of a store's pictures, those in inner folders too."""
    folders = [str(folder) for folder in picture_folders(data, name) if folder.is_dir()]
    while folders:
        folder = folders.pop()
        # adding or removing a file changes its folder's time
        sources.setdefault(folder, file_stamp(folder))
        below = os.path.relpath(folder, data)
        # entry by entry: a folder may hold ten million
        with os.scandir(folder) as entries:
            for entry in entries:
                stem, end = os.path.splitext(entry.name)
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif end.lower() in (".jpg", ".jpeg", ".png"):
                    yield stem.removeprefix(f"{name}_"), f"{below}/{entry.name}"


class PatchStore(RegionStore):
    """Pictures as regions: each is resized to a square and cut into a grid of patches, row by row.
    Nothing is read but what is asked for.

    features  (3 p p,) a patch's pixels, less the mean, by the deviation: what a matrix makes of
              them is a ViT's patch embedding
    boxes     the grid's cells
    cls_prob  (C + attributes,) what a detector sees in a patch [ours]: classes and attributes, half
              each, of its regions of the picture, DATA/regions/NAME, each by how much of the patch
              it covers; the rest is background. cls_id: the likeliest class, -1 for none
    """

    # bytes of pictures that are kept
    KEPT, has_names = 2**30, False

    def __init__(self, data, name, resolution, patch):
        self.args = data, name, resolution, patch
        self.folder = f"{data}, pictures of {name}"
        place = Path(data) / "index" / f"pictures-{name}"
        self.arrays, self.meta = memory_mapped(place, [type(self).__name__, 2], self.list_pictures)
        if patch < 1 or resolution % patch:
            found = f"pictures of {resolution} pixels do not divide into patches of {patch}"
            raise DataError(found, "--resolution a multiple of --patch")
        self.ids, self.resolution, self.patch = self.arrays["ids"], resolution, patch
        # a detector's classes are the same for all pictures of a tree
        kinds = ("objects", "attributes") if (Path(data) / "vg/objects_vocab.txt").exists() else ()
        self.names = [len(detector_names(data, kind)) for kind in kinds]
        self.classes = 1 + sum(self.names) if kinds else None
        y, x = np.mgrid[0:resolution:patch, 0:resolution:patch].reshape(2, -1)
        self.cells = np.stack([x, y, x + patch, y + patch], axis=1).astype(np.float32) / resolution
        # small pictures stay in memory once read
        shape = len(self.ids), resolution, resolution, 3
        self.kept = np.zeros(shape, np.uint8) if math.prod(shape) <= self.KEPT else None
        self.known = np.zeros(len(self.ids), bool)
        # pixels of the batch at hand; pictures that cannot be read
        self.recent, self.broken = {}, set()

    def __reduce__(self):
        return type(self), self.args

    def list_pictures(self):
        """Arrays of the pictures' names and paths, and what was counted."""
        data, name = self.args[:2]
        walk, pieces = walk_pictures(data, name), []
        # in pieces: Python objects for ten million names would take gigabytes
        while piece := list(islice(walk, 100_000)):
            pieces.append([np.array([x.encode() for x in column]) for column in zip(*piece)])
        if not pieces:
            places = ", ".join(map(str, picture_folders(data, name)))
            wanted = ".jpg or .png files. Fetch them from the data set's own address."
            raise DataError(f"no pictures of {name} in {places}", wanted)
        ids, paths = (np.concatenate(column) for column in zip(*pieces))
        # by name and path: of a name that comes twice, which no data set has, the last stays
        order = np.lexsort([paths, ids])
        order = order[np.append(ids[order[1:]] != ids[order[:-1]], True)]
        return {"ids": ids[order], "paths": paths[order]}, {}

    def __str__(self):
        size = f"{self.resolution} x {self.resolution} in patches of {self.patch}"
        return f"{self.folder}: {len(self):,} of {size}"

    def check_rows(self):
        pass  # pictures are looked at when they are read

    def stamps(self):
        tree = Path(self.args[0])
        return {str(tree / name): stamp for name, stamp in self.meta["sources"].items()}

    def path(self, image):
        """Where the picture is"""
        return Path(self.args[0]) / self.arrays["paths"][image].decode()

    def n_regions(self, images):
        return np.full(len(images), len(self.cells))

    @functools.cached_property
    def wh(self):
        """(N, 2) width and height of the pictures themselves; needed where boxes in pixels are"""
        bar = tqdm(range(len(self)), desc=f"sizes of {self.folder}", disable=None, leave=False)
        return np.array([self.size(i) for i in bar], np.int32)

    def relative_boxes(self, images):
        return np.repeat(self.cells[None], len(images), 0)

    def size(self, image):
        """(width, height) of the picture itself"""
        with Image.open(self.path(image)) as picture:
            turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return picture.size[::-1] if turned else picture.size

    def readable(self, images):
        """(B,) bool: which pictures can be read; what was read is kept for the next pixels()."""
        self.recent, before = {}, self.recent
        for i in set(np.asarray(images).tolist()) - self.broken:
            try:
                self.recent[i] = before[i] if i in before else self.pixels([i])[0]
            except DataError:
                # one of millions may not end a run
                self.broken.add(i)
        return np.array([i not in self.broken for i in images], bool)

    def pixels(self, images):
        """(B, R, R, 3) uint8"""
        found = []
        for i in np.asarray(images).tolist():
            x = self.kept[i] if self.known[i] else self.recent.get(i)
            x = self.load(i) if x is None else x
            if self.kept is not None:
                self.kept[i], self.known[i] = x, True
            found.append(x)
        return np.array(found, np.uint8).reshape(-1, self.resolution, self.resolution, 3)

    def load(self, image):
        """(R, R, 3) uint8 of one picture"""
        return open_picture(self.path(image), self.resolution)

    def most_certain(self, images):
        """(B, D_V) the patch in the middle"""
        return self.read(images)[:, len(self.cells) // 2]

    def read(self, images, column="features"):
        images = np.asarray(images)
        if column == "boxes":
            return self.cells * np.tile(self.wh[images], 2)[:, None].astype(np.float32)
        if column != "features":
            mask = np.ones((len(images), len(self.cells)), bool)
            return np.array(np.split(self.read_at(images, mask, column), len(images)))
        x = (self.pixels(images) / np.float32(255) - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)
        pattern, p = "B (h p) (w q) c -> B (h w) (p q c)", self.patch
        return rearrange(x.astype(np.float16), pattern, p=p, q=p)

    @functools.cached_property
    def detector(self):
        """What a detector saw in these pictures, and where each is there; None without classes"""
        folder = Path(self.args[0]) / "regions" / self.args[1]
        store = RegionStore(folder) if self.classes and folder.exists() else None
        return (store, store.finder()) if store and store.classes == 1 + self.names[0] else None

    def read_at(self, images, mask, column):
        """(K, ...) cls_prob, cls_id or attr_id of the patches at mask (B, patches)"""
        names = [self.image_id(i) for i in images]
        at = self.detector[1](names) if self.detector else np.full(len(names), -1)
        if column == "cls_prob" and (at < 0).any():
            found = f"{self.args[0]}/regions: no classes of {self.args[1]}'s {names[at.argmin()]}"
            names = f"the {sum(self.names[:1])} names in {self.args[0]}/vg/objects_vocab.txt"
            raise DataError(found, f"for mrc, mrckl: probabilities of {names}, for each picture")
        if column == "attr_id" or not self.detector:
            return np.full(mask.sum(), -1)
        store, known, at = self.detector[0], (at >= 0)[:, None, None], at.clip(0)
        # (B, patches, N_V) the share of a patch that a region covers; padding has no area
        boxes, cells = store.relative_boxes(at)[:, None], self.cells[:, None]
        wh = np.minimum(boxes[..., 2:], cells[..., 2:]) - np.maximum(boxes[..., :2], cells[..., :2])
        share = known * wh.clip(0).prod(-1) / (self.patch / self.resolution) ** 2
        share /= share.sum(-1, keepdims=True).clip(1)
        probs = store.read(at, "cls_prob").astype(np.float32)
        has = "attr_id" in store.arrays
        ids = store.read(at, "attr_id") if has else np.full((len(at), 1), -1)
        # an attribute has half of its region; -1 is none
        attribute = np.arange(self.classes - store.classes) == ids[..., None]
        probs[..., 1:] *= 1 - attribute.any(-1, keepdims=True) / 2
        probs = np.concatenate([probs, attribute * (1 - probs[..., :1]) / 2], axis=-1)
        # picture by picture: of the masked patches alone
        seen = np.concatenate([s[m] @ p for s, m, p in zip(share, mask, probs)])
        seen[:, 0] += (1 - seen.sum(-1)).clip(0)
        classes = seen[:, 1 : store.classes]
        likeliest = np.where(classes.any(-1), classes.argmax(-1), -1)
        return seen.astype(np.float16) if column == "cls_prob" else likeliest


class CropStore(PatchStore):
    """Visual Genome's regions as pictures of their own, with some of what is around them, which is
    a function of the image id: image/number of the region, as vg_crops has it.
    """

    def list_pictures(self):
        data = self.args[0]
        pictures, images = dict(walk_pictures(data, "vg")), vg_images(data)
        ids, paths, windows = [], [], []
        for name, number, region, where in vg_regions(data):
            record, box = images.get(name), vg_box(region, where)
            if str(name) in pictures and record and clip_box(*box, record):
                rng = np.random.default_rng([int(name), number])
                ids.append(f"{name}/{number}".encode())
                paths.append(pictures[str(name)].encode())
                windows.append(crop_window(rng, box, record))
        if not ids:
            raise DataError(f"no pictures of Visual Genome's regions in {data}/vg")
        return {"ids": np.array(ids), "paths": np.array(paths), "windows": np.array(windows)}, {}

    def load(self, image):
        window = tuple(self.arrays["windows"][image].tolist())
        return open_picture(self.path(image), self.resolution, window)


def crop_window(rng, box, record):
    """(left, top, right, bottom) round a box x y w h: anything from the box to the picture"""
    x, y, w, h = box
    spans = []
    for at, length, whole in ((x, w, record["width"]), (y, h, record["height"])):
        length = min(max(length, 1), whole)
        # uniform in the logarithm
        wide = length * (whole / length) ** rng.random()
        lowest, highest = max(0, at + length - wide), min(max(0, at), whole - wide)
        start = rng.uniform(lowest, highest) if wide < whole else 0
        spans.append((start, start + wide))
    (left, right), (top, bottom) = spans
    return left, top, right, bottom


def open_picture(path, resolution, window=None):
    """A picture, or a window of it, as (R, R, 3) uint8, resized whatever its shape."""
    # decoded at a half or a quarter where that is enough
    picture = read_picture(path, None if window else resolution)
    return np.asarray(picture.resize((resolution, resolution), Image.BICUBIC, window))


# what Pillow raises on a file that is no picture, is cut, or is a decompression bomb
BOMBS = Image.DecompressionBombError, Image.DecompressionBombWarning
PICTURE_ERRORS = OSError, ValueError, SyntaxError, *BOMBS


def read_picture(path, enough=None):
    """A picture, upright and in colour; enough: a JPEG may be decoded at a fraction of its size
    that is not below this. One that cannot be read, or a decompression bomb, is a DataError.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                if enough:
                    # JPEGs decode at a fraction for a fraction of the cost
                    picture.draft("RGB", (enough, enough))
                picture.load()
                return upright(picture)
    except PICTURE_ERRORS as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        hint = "Most often a download cut short, or an error page. Fetch it again, or remove it."
        raise DataError(f"{path} cannot be read as a picture: {why}", hint=hint) from None


def upright(picture):
    """As a camera held it (EXIF), in red, green, blue of 8 bits, whatever it was"""
    if picture.getexif().get(0x0112, 1) != 1:
        picture = ImageOps.exif_transpose(picture)
    transparent = "transparency" in picture.info
    if picture.mode == "RGB" and not transparent:
        return picture
    if picture.mode.startswith(("I", "F")):
        # 16 bits a pixel or more: Pillow would cut them off
        x = np.asarray(picture, np.float64)
        x = x / (65535 if x.max() > 255 else 255) * 255
        picture = Image.fromarray(x.clip(0, 255).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or transparent:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


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


COCO_FORMAT = "caption annotations in COCO's format"


def caption_images(path):
    """{image id: (file stem, Flickr address)} of a captions file in COCO's format."""
    where, images = f"{path}, images[]", {}
    for record in json_items(path, COCO_FORMAT, "images"):
        stem = Path(field(record, "file_name", where, str)).stem
        images[field(record, "id", where)] = stem, record.get("flickr_url")
    return images


def read_captions(path):
    """Yields the Records of a captions file in COCO's format. Image id = file stem."""
    images = caption_images(path)
    for a in json_items(path, COCO_FORMAT, "annotations"):
        where = f"{path}, annotation {a.get('id') if isinstance(a, dict) else a}"
        image = field(a, "image_id", where)
        if image not in images:
            found = f"{where} is about image {image}, which is not in the file's images list"
            raise DataError(found, hint=AGAIN)
        yield Record(images[image][0], field(a, "caption", where, str), str(a.get("id")))


def caption_file(data, split):
    """COCO 2014's caption file. split: train2014, val2014"""
    return Path(data) / "coco" / "annotations" / f"captions_{split}.json"


def coco_captions(data, split, stats):
    """COCO 2014 captions; split: train2014, val2014"""
    return read_captions(caption_file(data, split))


def own_captions(data, split, stats):
    """DATA/own/captions.json, in COCO's format; the last tenth is for validation."""
    path = Path(data) / "own" / "captions.json"
    return split_off(lambda stats: read_captions(path), split, stats, 10)


def karpathy_images(data, dataset, *splits):
    """Yields Karpathy's records of a data set's images, of these splits or of all."""
    path = Path(data) / dataset / f"dataset_{dataset}.json"
    for image in json_items(path, f"Karpathy's split of {dataset}", "images"):
        field(image, "cocoid" if dataset == "coco" else "filename", path)
        if not splits or field(image, "split", path) in splits:
            yield image


def karpathy_captions(data, split, stats, dataset="coco"):
    """COCO or Flickr30k captions in Karpathy's split: train (COCO: with restval, as every paper),
    val, test. Of COCO the first five captions of an image. Image id = file stem.
    """
    for image in karpathy_images(data, dataset, split, *["restval"] * (split == "train")):
        stem = Path(field(image, "filename", f"Karpathy's {dataset}", str)).stem
        sentences = field(image, "sentences", f"{dataset}, {stem}", list)
        for s in sentences[:5] if dataset == "coco" else sentences:
            text = field(s, "raw", f"{dataset}, {stem}", str)
            yield Record(stem, text, str(s.get("sentid")))


def winoground_examples(data, split, stats):
    """Winoground's 400 examples; two Records each, caption i with image i; note = {tag: example},
    with those of Diwan et al. 2022 where their file is there.
    """
    path, more = Path(data) / "winoground" / "examples.jsonl", {}
    new = path.with_name("new_tag_assignments.json")
    if exists(new):
        more = need_record(read_json(new, "Diwan et al.'s tags of Winoground"), new)
    for where, e in read_json_lines(path, "Winoground's examples"):
        name = field(e, "id", where)
        tags = [e.get("collapsed_tag"), e.get("secondary_tag")]
        tags += field(more, str(name), new, list) if more else []
        for i in (0, 1):
            image, text = field(e, f"image_{i}", where), field(e, f"caption_{i}", where, str)
            yield Record(image, text, f"{name}/{i}", note={str(tag): name for tag in tags if tag})


def read_label(record, where):
    """The label of NLVR and NLVR2, a string in capitals or not; None where a test set has none."""
    label = str(record.get("label", "")).lower()
    if label not in ("true", "false", ""):
        raise DataError(f"{where}: label {record['label']!r}, wanted true or false")
    return {"true": 1, "false": 0, "": None}[label]


def nlvr_presentations(data, split, stats):
    """NLVR v1: sentences about three boxes of shapes, true or false; target = 1 or 0.

    A Record each of the six orders of the boxes; note = structured_rep, the three boxes' items.
    Image id = split-identifier-k, the k-th order, as the official picture's name, or what "picture"
    says [ours: several sentences about one picture].
    """
    path = Path(data) / "nlvr" / split / f"{split}.json"
    for where, e in read_json_lines(path, "NLVR v1: clone lil-lab/nlvr, folder nlvr"):
        field(e, "label", where)
        name, text = f"{split}-{field(e, 'identifier', where)}", field(e, "sentence", where, str)
        boxes = field(e, "structured_rep", where, list)
        for image in [str(e["picture"])] if "picture" in e else [f"{name}-{k}" for k in range(6)]:
            yield Record(image, text, name, read_label(e, where), note=boxes)


# ------------------------------------------------------- pre-training corpora (UNITER table 1)


def flickr_photo(url):
    """The photo's number in a Flickr address, which Flickr30k's file names are; "" elsewhere."""
    pattern = r"flickr\.com/.*?/(\d+)_[0-9a-zA-Z]+(?:_[a-z0-9])?\.(?:jpg|png|gif)"
    found = re.search(pattern, str(url or ""))
    return found[1] if found else ""


class HeldOut(NamedTuple):
    """Images of downstream evaluation, which pre-training may not see         UNITER sec. A.1"""

    coco: set  # COCO image ids
    photos: set  # Flickr photo numbers of Flickr30k
    counts: dict  # {which list: how many images}


# benchmarks of COCO's images of 2017: their files, and what a number looks like in them
BENCHMARK_IMAGES = {
    "SugarCrepe": ("sugarcrepe/*", r"(\d{12})\.jpg"),
    "SugarCrepe++": ("sugarcrepe_pp/*", r"(\d{12})\.jpg"),
    "VALSE": ("valse/*", r"(\d{12})\.jpg"),
    "What'sUp": ("whatsup/coco_qa_*", r"\[\s*(\d+)"),
}


def held_out(data):
    """Of the files that are there: Karpathy's, RefCOCO's val and test, Flickr30k's photos, and the
    images of BENCHMARK_IMAGES.
    """
    data, coco_ids, counts = Path(data), set(), {}
    for split in ("val", "test"):
        ids = {i["cocoid"] for i in karpathy_images(data, "coco", split)}
        counts[f"Karpathy {split}"], coco_ids = len(ids), coco_ids | ids
    for name in REFER:
        if exists(data / "refer" / name / f"refs({REFER[name]}).p"):
            ids = {ref["image_id"] for ref in read_refs(data, name) if ref["split"] != "train"}
            counts[f"{name} val, test"], coco_ids = len(ids), coco_ids | ids
        else:
            counts[f"NONE OF {name}: its files are missing, so its test images are trained on"] = 1
    for name, (files, number) in BENCHMARK_IMAGES.items():
        # noted, so that an index is made again when files come into it
        exists((data / files).parent)
        found = data.glob(f"{files}.json*")
        texts = [read_text(str(path).removesuffix(".gz"), name) for path in sorted(found)]
        ids = {int(n) for text in texts for n in re.findall(number, text)}
        counts[name], coco_ids = len(ids), coco_ids | ids
    photos = set()
    if exists(data / "flickr30k" / "dataset_flickr30k.json"):
        photos = {Path(i["filename"]).stem for i in karpathy_images(data, "flickr30k")}
    tokens = data / "flickr30k" / "results_20130124.token"
    if exists(tokens):
        photos |= {line.split(".jpg#")[0] for line in read_lines(tokens, "Flickr30k's captions")}
    return HeldOut(coco_ids, photos, counts)


def coco_corpus(data, split, stats):
    """UNITER's COCO: train2014 and val2014 without what is held out; val: Karpathy's."""
    if split == "val":
        yield from karpathy_captions(data, "val", stats)
        return
    out = held_out(data)
    stats.update({f"images held out, {name}": n for name, n in out.counts.items()})
    for part in ("train2014", "val2014"):
        images = {}
        for number, (stem, url) in caption_images(caption_file(data, part)).items():
            # COCO's images are Flickr's: some are Flickr30k's too
            also = number not in out.coco and flickr_photo(url) in out.photos
            stats["images held out, also in Flickr30k"] += also
            images[stem] = number not in out.coco and not also
        yield from (r for r in coco_captions(data, part, stats) if images[r.image])


def vg_images(data):
    """Visual Genome's {image id: {width, height, coco_id, flickr_id}}."""
    path, images = Path(data) / "vg" / "image_data.json", {}
    for record in json_items(path, "Visual Genome's image_data.json"):
        where = f"{path}, image {field(record, 'image_id', path)}"
        # most images are not COCO's
        kept = {"coco_id": None, "flickr_id": None, **record}
        field(kept, "coco_id", where, OPTIONAL)
        vg_box(record, where, ("width", "height"))
        names = "width", "height", "coco_id", "flickr_id"
        images[record["image_id"]] = {name: kept[name] for name in names}
    return images


def vg_items(data, name, key):
    """Yields (image, its records, where that is) of one of Visual Genome's files."""
    path = Path(data) / "vg" / f"{name}.json"
    records = json_items(path, f"Visual Genome's {name}")
    for item in tqdm(records, desc=f"Visual Genome's {name}", disable=None, leave=False):
        item = need_record(item, path)
        image = field(item, "id" if "id" in item else "image_id", path)
        where = f"{path}, image {image}"
        yield image, field(item, key, where, list), where


def vg_box(record, where, names=("x", "y", "width", "height")):
    """[x, y, w, h] of a record of Visual Genome"""
    return [field(record, name, where, NUMBER) for name in names]


def clip_box(x, y, w, h, image):
    """x y w h of a box -> x1 y1 x2 y2 inside its image, None if nothing is left of it."""
    x1, y1, x2, y2 = max(0, x), max(0, y), min(x + w, image["width"]), min(y + h, image["height"])
    return (x1, y1, x2, y2) if x2 > x1 and y2 > y1 else None


def vg_split(data, split, stats):
    """Visual Genome's images of a split, {id: record}: val are those in Karpathy's COCO val."""
    images = vg_images(data)
    if split == "val":
        validation = {i["cocoid"] for i in karpathy_images(data, "coco", "val")}
        return {n: i for n, i in images.items() if i.get("coco_id") in validation}
    out, kept = held_out(data), {}
    for number, record in images.items():
        if record.get("coco_id") not in out.coco and str(record.get("flickr_id")) not in out.photos:
            kept[number] = record
    stats["images held out"] += len(images) - len(kept)
    return kept


def vg_regions(data):
    """Yields (image, number within it, record, where) of Visual Genome's region descriptions."""
    for image, regions, where in vg_items(data, "region_descriptions", "regions"):
        for number, region in enumerate(regions):
            yield image, number, region, where


def vg_phrase(region, where):
    """A region's description, without line ends"""
    return " ".join(field(region, "phrase", where, str).split())


def vg_descriptions(data, split, stats):
    """Visual Genome's region descriptions."""
    images = vg_split(data, split, stats)
    for image, _, region, where in vg_regions(data):
        if image in images:
            yield Record(str(image), vg_phrase(region, where), str(region.get("region_id")))


def vg_crops(data, split, stats):
    """Visual Genome's regions, cut out, with their descriptions: things before scenes."""
    images = vg_split(data, split, stats)
    for image, number, region, where in vg_regions(data):
        if image not in images:
            continue
        if clip_box(*vg_box(region, where), images[image]):
            text, name = vg_phrase(region, where), str(region.get("region_id"))
            yield Record(f"{image}/{number}", text, name)
        else:
            stats["regions left out: a box of no area"] += 1


def web_captions(path, columns, stats, out):
    """Records of a file of captions and addresses, columns in this order; image id = line from 0"""
    names = " and ".join(columns)
    # a broken line would shift the numbers of all images after it, so it is an error
    lines, caption = read_lines(path, f"web captions, {names} a line"), columns.index("caption")
    for number, line in enumerate(filter(None, lines)):
        row = line.split("\t")
        if len(row) != 2:
            found = f"{path}, line {number + 1} has {len(row)} columns: wanted 2, {names}"
            raise DataError(found, hint=AGAIN)
        if flickr_photo(row[1 - caption]) in out.photos:
            stats["images held out, also in Flickr30k"] += 1
        else:
            yield Record(str(number), row[caption], str(number))


def split_off(read, split, stats, part=100):
    """Of a corpus without a validation split the last hundredth, or another part, or all before;
    read(stats) yields its records.
    """
    total = sum(1 for _ in read(Counter()))
    cut = total - max(1, total // part)
    return islice(read(stats), cut) if split == "train" else islice(read(stats), cut, None)


def cc3m_captions(data, split, stats):
    """Conceptual Captions: caption, address; UNITER's numbering. Many addresses are dead."""
    name = {"train": "Train_GCC-training", "val": "Validation_GCC-1.1.0-Validation"}[split]
    path = Path(data) / "cc3m" / f"{name}.tsv"
    return web_captions(path, ("caption", "address"), stats, held_out(data))


def cc12m_captions(data, split, stats):
    """Conceptual 12M: address, caption, the other way round."""
    path, out = Path(data) / "cc12m" / "cc12m.tsv", held_out(data)
    columns = "address", "caption"
    return split_off(lambda stats: web_captions(path, columns, stats, out), split, stats)


def sbu_captions(data, split, stats):
    """SBU: two files, line by line, or one of JSON; image id = line from 0; val: last hundredth"""
    folder, out = Path(data) / "sbu", held_out(data)
    whole = folder / "sbu-captions-all.json"
    if exists(whole):
        record = read_json(whole, "SBU Captions")
        urls, captions = (field(record, n, whole, list) for n in ("image_urls", "captions"))
    else:
        paths = (folder / f"SBU_captioned_photo_dataset_{n}.txt" for n in ("urls", "captions"))
        urls, captions = (list(read_lines(path, "SBU Captions, one a line")) for path in paths)
    if len(urls) != len(captions):
        found = f"{folder}: {len(urls):,} addresses and {len(captions):,} captions"
        raise DataError(found, "as many of either. Fetch both files again.")
    # the same for any process: the last ones in the file's order
    cut = len(urls) - max(10, len(urls) // 100)
    for i in range(cut) if split == "train" else range(cut, len(urls)):
        if flickr_photo(urls[i]) in out.photos:
            stats["images held out, also in Flickr30k"] += 1
        else:
            yield Record(str(i), captions[i].strip(), str(i))


# -------------------------------------------------------------------- downstream (UNITER table 3)


def normalise_answer(text):
    """The official VQA evaluation's clean-up of an answer, its slips included"""
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


def vqa_annotations(data, split):
    """Yields (record, path) of one of VQA v2's answer files."""
    path = Path(data) / "vqa2" / f"v2_mscoco_{split}_annotations.json"
    for a in json_items(path, "VQA v2's answers", "annotations"):
        yield a, path


def vqa_questions(data, split, stats, answers=()):
    """VQA v2 questions; target = {number in answers: score}, note = Answers.

    split: train2014, val2014, test-dev2015, test2015 (no answers); vg: Visual Genome's questions
    about COCO images, VQA's augmentation.                                       UNITER sec. A.2
    """
    numbers = {answer: i for i, answer in enumerate(answers)}
    if split == "vg":
        yield from vg_questions(data, stats, numbers)
        return
    path, known = Path(data) / "vqa2" / f"v2_OpenEnded_mscoco_{split}_questions.json", {}
    for a, where in () if split.startswith("test") else vqa_annotations(data, split):
        # millions of answers are a few thousand words
        given = [intern(field(x, "answer", where, str)) for x in field(a, "answers", where, list)]
        kinds = a.get("question_type", ""), a.get("answer_type", "")
        known[field(a, "question_id", where)] = Answers(given, *kinds)
    # test-dev's questions are about test2015's images
    images = split.replace("test-dev", "test")
    for q in json_items(path, "VQA v2's questions", "questions"):
        note = known.get(field(q, "question_id", path))
        target = None if note is None else soft_target(note.given, numbers)
        stats["questions without annotations"] += bool(known) and note is None
        unknown = "questions none of whose answers is in the list, kept with an all-zero target"
        stats[unknown] += target == {}
        image = f"COCO_{images}_{field(q, 'image_id', path, int):012d}"
        text = field(q, "question", path, str)
        yield Record(image, text, str(q["question_id"]), target, note=note)


def soft_target(given, numbers):
    """{number: score} of ten answers: 0.3, 0.6, 0.9, 1 for one, two, three, more people."""
    count = Counter(normalise_answer(a) for a in given)
    return {numbers[a]: min(1.0, 0.3 * n) for a, n in count.items() if a in numbers}


def vg_answer(question, where):
    """The answer to one of Visual Genome's questions, as VQA writes answers"""
    return normalise_answer(field(question, "answer", where, str).rstrip("."))


def vg_questions(data, stats, numbers, own_images=False, out=()):
    """Yields Visual Genome's questions whose answer is in the list; target = {its number: 1}. About
    COCO images, by COCO's names; own_images: about all images but those in `out`, by Visual
    Genome's ids.
    """
    images, stems = vg_images(data), {}
    if not own_images:
        for record in karpathy_images(data, "coco"):
            stems[record["cocoid"]] = Path(field(record, "filename", "Karpathy's coco", str)).stem
    left = "Visual Genome questions left out: image not in COCO, or held out, or answer not in the"
    for number, questions, where in vg_items(data, "question_answers", "qas"):
        image = "" if str(number) in out else str(number)
        if not own_images:
            image = stems.get(images.get(number, {}).get("coco_id"))
        for q in questions:
            answer = vg_answer(q, where)
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
        for line, record in read_json_lines(path, "VCR's annotations"):
            where = f"{line}, {record.get('annot_id')}"
            image = Path(field(record, "img_fn", where, str)).stem
            rows, target = vcr_rows(record, part, where, stats)
            for j, row in enumerate(rows if choices else [rows[target]]):
                yield Record(image, row, f"{record.get('annot_id')}/{part}/{j}", target)


def vcr_rows(record, part, where, stats):
    """Segments of a question's choices, and the right one's number."""
    objects = field(record, "objects", where, list)

    def words(tokens):
        return " ".join(w for token in tokens for w in tag_words(token, objects, where, stats))

    def segments(name, kind):
        return [(kind, words(choice)) for choice in field(record, name, where, list)]

    question = (0, words(field(record, "question", where, list)))
    answers, right = segments("answer_choices", 2), record.get("answer_label")
    if part == "qa":
        return [(question, answer) for answer in answers], right
    if part == "qar" and right is None:
        wanted = "train or val; the test set's rationales are scored for all four answers."
        raise DataError(f"{where}: no answer_label", wanted)
    reasons, rows = segments("rationale_choices", 3), []
    # the server asks for all four answers' rationales
    for answer in answers if part == "all" else [answers[right]]:
        rows += [(question, answer, reason) for reason in reasons]
    return rows, record.get("rationale_label")


def tag_words(token, objects, where, stats):
    """Words of one of VCR's tokens: a word, or a list of numbers of detections."""
    if isinstance(token, str):
        return [token]
    if not isinstance(token, list) or not all(isinstance(tag, int) for tag in token):
        raise DataError(f"{where}: {token!r:.60}", f"a word, or a list of numbers. {AGAIN}")
    words = []
    for tag in token:
        if not 0 <= tag < len(objects):
            stats["tags that point past the boxes, read as [UNK]"] += 1
            words.append("[UNK]")
        elif objects[tag] != "person":
            words.append(objects[tag])
        else:
            # people are told apart by their number, things by their class
            words.append(VCR_WORDS[tag] if tag < len(VCR_WORDS) else "person")
    return words


def nlvr2_pairs(data, split, stats, rows="pair"):
    """NLVR2: train, dev, test1, test2, or balanced/balanced_dev, unbalanced/unbalanced_test1 and
    so on; target = 1 (true), 0 or, in a test set, None.

    rows  "triplet": a Record has both images; else two Records, the sentence with either image
    """
    path = Path(data) / "nlvr2" / f"{split}.json"
    for where, e in read_json_lines(path, "NLVR2: clone lil-lab/nlvr, folder nlvr2/data"):
        name = field(e, "identifier", where, str)
        if name.count("-") != 3:
            found = f"{where}: identifier {name!r}, wanted split-set-pair-sentence"
            raise DataError(found, hint=AGAIN)
        text, label = field(e, "sentence", where, str), read_label(e, f"{where}, {name}")
        # an identifier ends in the sentence's number, which the images do not have
        left, right = (f"{name.rpartition('-')[0]}-img{side}" for side in (0, 1))
        for image in [(left, right)] if rows == "triplet" else (left, right):
            yield Record(image, text, name, label)


# UNITER's order
ENTAILMENT = "contradiction", "entailment", "neutral"


def entailment_pairs(data, split, stats):
    """SNLI-VE: image and hypothesis; target = number in ENTAILMENT. split: train, dev, test."""
    path = Path(data) / "snli_ve" / f"snli_ve_{split}.jsonl"
    for where, e in read_json_lines(path, "SNLI-VE's pairs"):
        # the official file spells it so
        name = "Flikr30kID" if "Flikr30kID" in e else "Flickr30K_ID"
        image = str(field(e, name, where)).removesuffix(".jpg")
        label = field(e, "gold_label", where)
        if label == "-":
            stats["pairs left out: label '-', the annotators disagree"] += 1
            continue
        if label not in ENTAILMENT:
            wanted = f"wanted one of {', '.join(ENTAILMENT)} or -"
            raise DataError(f"{where}, {e.get('pairID')}: label {label!r}, {wanted}")
        text = field(e, "sentence2", where, str)
        yield Record(image, text, str(e.get("pairID")), ENTAILMENT.index(label))


# whose split
REFER = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd"}


def read_refs(data, name):
    """The expressions of RefCOCO, RefCOCO+ or RefCOCOg as published."""
    path = Path(data) / "refer" / name / f"refs({REFER[name]}).p"
    return read_pickle(path, f"{name}'s expressions")


def referring_expressions(data, split, stats, dataset="refcoco"):
    """RefCOCO, RefCOCO+, RefCOCOg; a Record is one sentence; boxes = the one that it means, x y w h
    in pixels. split: train, val, testA, testB (refcocog: test).
    """
    folder = Path(data) / "refer" / dataset
    phrases = folder / f"annotation_{split}.json"
    # phraseloceval's files hold the same sentences and boxes, and can still be fetched
    if exists(phrases) and not exists(folder / f"refs({REFER[dataset]}).p"):
        for e in read_json(phrases, "phraseloceval's annotations"):
            stem, text = (
                Path(field(e, "imageName", phrases, str)).stem,
                field(e, "phrase", phrases, list),
            )
            box = tuple(field(e, "box", phrases, list))
            yield Record(stem, " ".join(text), str(e.get("phraseId")), boxes=(box,))
        return
    path, boxes = folder / "instances.json", {}
    for a in json_items(path, "COCO's instances", "annotations"):
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


# ------------------------------------------ words that point at boxes (Kervadec et al., MAF)


def gqa_records(data, split):
    """Yields GQA's (question id, record) as published; "train_all" is a folder of ten files."""
    folder = Path(data) / "gqa"
    paths = [folder / f"{split}_questions.json"]
    if split == "train_all" and not exists(paths[0]):
        names = (f"train_all_questions_{i}.json" for i in range(10))
        paths = [folder / "train_all_questions" / name for name in names]
    for path in paths:
        for name, question in json_items(path, "GQA's questions", named=True):
            yield name, need_record(question, f"{path}, question {name}")


def gqa_questions(data, split, stats, answers=(), pointers=True):
    """GQA's questions; target = {the answer's number: 1}, None in test. split: train_balanced,
    val_all, testdev_all, ... Where the split has scene graphs, the question's words point at the
    boxes of the objects that they mean; pointers=False: they do not.
    """
    numbers, scenes = {answer: i for i, answer in enumerate(answers)}, None
    path = Path(data) / "gqa" / f"{split}_questions.json"
    graphs = Path(data) / "gqa" / f"{split.split('_')[0]}_sceneGraphs.json"
    if pointers and exists(graphs):
        # boxes alone: names and relations of all objects would take gigabytes
        items = json_items(graphs, "GQA's scene graphs", named=True)
        scenes = {name: scene_boxes(graph, graphs) for name, graph in items}
    unknown = "questions whose answer is not in the list, kept with an all-zero target"
    for name, q in gqa_records(data, split):
        where, spans, target = f"{path}, question {name}", [], None
        image, text = field(q, "imageId", where, str), field(q, "question", where, str)
        if scenes is not None:
            notes = need_record(q.get("annotations", {}), where)
            words = need_record(notes.get("question", {}), where)
            spans = pointed_spans(words, scenes.get(image, {}), where, stats)
        if "answer" in q:
            answer = field(q, "answer", where, str)
            target = {numbers[answer]: 1.0} if answer in numbers else {}
            stats[unknown] += bool(numbers) and not target
        yield Record(image, text, name, target, pointers=tuple(spans))


def scene_boxes(graph, where):
    """{object: its box inside the image, None if nothing is left of it} of a scene graph"""
    vg_box(graph, where, ("width", "height"))
    things = need_record(field(graph, "objects", where, dict), where).items()
    return {o: clip_box(*vg_box(t, f"{where}, object {o}", "xywh"), graph) for o, t in things}


def pointed_spans(words, boxes, where, stats):
    """[(first word, end word, box)] of {"first:end": object} and scene_boxes."""
    spans = []
    for span in words:
        name, (first, _, end) = field(words, span, where, str), span.partition(":")
        if not re.fullmatch(r"\d+(:\d*)?", span):
            raise DataError(f"{where}: words {span!r}", f"first:end, numbers of words. {AGAIN}")
        stats["pointers left out: object not in the scene graph"] += name not in boxes
        stats["pointers left out: a box of no area"] += boxes.get(name, ()) is None
        box = boxes.get(name)
        spans += [(int(first), int(end or int(first) + 1), box)] if box else []
    return spans


def joined_descriptions(data, stats, out=()):
    """Yields Visual Genome's region descriptions in sentences of one, two or three, joined by
    "and", with their boxes [Kervadec sec. 6.1]; out: ids of images left out
    """
    images = vg_images(data)
    for image, regions, where in vg_items(data, "region_descriptions", "regions"):
        if image not in images or str(image) in out:
            stats["descriptions left out: image held out"] += len(regions)
            continue
        # which are joined is a function of the image's id, the same in every run
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
    """LXMERT's COCO part: captions of Karpathy's train, and VQA's questions about its images."""
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
    # no image of the questions that are validated on
    if "val" not in gqa_split:
        out = {q["imageId"] for _, q in gqa_records(data, "val_balanced")}
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
    """
    root = Path(data) / "flickr30k_entities"
    lines = read_text(root / "UNRELATED_CAPTIONS", "Flickr30k Entities").splitlines()
    unrelated = {tuple(line.split()[:2]) for line in lines if line and line[0] != "#"}
    names = read_text(root / f"{split}.txt", "Flickr30k Entities' list of images").split()
    for image in tqdm(names, desc=f"entities {split}", disable=None, leave=False):
        boxes = entity_boxes(root / "Annotations" / f"{image}.xml", stats)
        path = root / "Sentences" / f"{image}.txt"
        for k, line in enumerate(read_text(path, "Flickr30k Entities' sentences").splitlines()):
            # evaluation keeps them
            if split == "train" and (image, str(k + 1)) in unrelated:
                stats["captions left out: they do not belong to their image"] += 1
                continue
            words, phrases = entity_phrases(line, boxes, f"{path}, line {k + 1}", stats)
            if not phrases:
                stats["captions left out: they have no phrase"] += 1
                continue
            # a phrase of a scene, or without a box, stays
            segments = tuple((number, phrase.words) for number, phrase in enumerate(phrases))
            yield Record(image, segments, f"{image}#{k}", note=(" ".join(words), phrases))


def entity_phrases(line, boxes, where, stats):
    """Words of a line of Flickr30k Entities, and its Phrases."""
    words, phrases = [], []
    for part in re.split(r"(\[/EN#[^\]\[]*\])", line):
        mark = re.fullmatch(r"\[/EN#(\d+)/(\S+) ([^\]]*)\]", part)
        if not mark and ("[/EN" in part or "]" in part and "[" not in part):
            found = f"{where}: brackets that do not close: {line[:90]!r}"
            raise DataError(found, f"[/EN#chain/type words]. {AGAIN}")
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
    text, boxes = read_text(path, "Flickr30k Entities' boxes"), {}
    try:
        for thing in xml.etree.ElementTree.fromstring(text).iter("object"):
            box = thing.find("bndbox")
            if box is None:  # a scene, or not to be boxed
                continue
            corners = (int(box.find(name).text) for name in ("xmin", "ymin", "xmax", "ymax"))
            x1, y1, x2, y2 = corners
            if x2 < x1 or y2 < y1:
                stats["boxes of no area"] += 1
                continue
            for name in thing.iter("name"):
                # from inclusive corners, counted from 1
                boxes.setdefault(name.text, []).append((x1 - 1, y1 - 1, x2, y2))
        return boxes
    except (xml.etree.ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
        found = f"{path} is no annotation of Flickr30k Entities: {error}"
        raise DataError(found, hint=AGAIN) from None


# ------------------------------------------------- pictures and boxes, without a detector (AMC)


def clean_caption(text, words=30):
    """As ALBEF and AMC: lower case, no punctuation, hyphens and slashes opened, so many words"""
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
    # Flickr30k's photos are not left out
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


def vg_paraphrases(data, split, stats, **how):
    """vg_triplets, each text as vg/paraphrases.json says it in other words, or as it was: {text:
    paraphrase} of a language model, as He et al. 2024 made them
    """
    path = Path(data) / "vg" / "paraphrases.json"
    said, found = need_record(read_json(path, "paraphrases, {text: paraphrase}"), path), False
    for record in vg_triplets(data, split, stats, **how):
        known = record.text in said
        stats["texts without a paraphrase, which are their own"] += not known
        yield record._replace(text=field(said, record.text, path, str) if known else record.text)
        found |= known
    if not found:
        raise DataError(f"{path} has none of the texts", "{text of a region: paraphrase}")


def vg_boxed_texts(data, images, kinds):
    """Yields (kind, image, text, box x y w h)."""
    for image, _, r, where in vg_regions(data) if "region" in kinds else ():
        if image in images:
            yield "region descriptions", image, vg_phrase(r, where), vg_box(r, where)
    items = vg_items(data, "attributes", "attributes") if "box" in kinds else ()
    for image, objects, where in items:
        named = {}
        for o in objects if image in images else ():
            name = str((field(o, "names", where, list) or [""])[0])
            corners = vg_box(o, where, "xywh")
            named.setdefault(name, []).append(corners)
            # one text per attribute, or the name
            for attribute in o.get("attributes") or [""]:
                kind = "objects with attributes" if attribute else "objects"
                yield kind, image, f"{attribute} {name}".strip(), corners
        for name, boxes in named.items():
            for text, corners in places_of(name, boxes, images[image]):
                yield "prompts of place", image, text, corners


def places_of(name, boxes, image):
    """Prompts of place for several boxes x y w h of one name: [(text, box)]. The leftmost is "dog
    on the left", then the rightmost, "top dog", "bottom dog"; in a corner of the image (both
    coordinates of its middle in the outer thirds) "dog at the top left", ...
    """
    if len(boxes) < 2:
        return []
    sides = [image["width"], image["height"]]
    middle = np.array([(x + w / 2, y + h / 2) for x, y, w, h in boxes]) / sides
    (left, top), (right, bottom) = middle.argmin(axis=0), middle.argmax(axis=0)
    # told apart by place, so only where there are several of a name
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
    """
    path = Path(data) / "refclef" / f"refclef_{split}_unique.json"
    for i, r in enumerate(read_json(path, "RefCLEF as AMC prepared it")):
        text, box = field(r, "text", path, str), tuple(field(r, "bbox", path, list))
        yield Record(Path(field(r, "image", path, str)).stem, text, str(i), boxes=(box,))


PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = "none zero one two three four five six seven eight nine ten".split()
NUMBERS = dict(zip(NUMBERS, "0 0 1 2 3 4 5 6 7 8 9 10".split()))
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
# without its apostrophe, or one of them -> with it
RESTORE = {}
for contraction in CONTRACTIONS:
    for position, letter in enumerate(contraction):
        if letter == "'":
            RESTORE[contraction[:position] + contraction[position + 1 :]] = contraction
# as the official table has it
RESTORE["somebody'd"] = "somebodyd"


# 5. Index ---------------------------------------------------------------------------------------
# What a reader says, tokenized, as flat arrays in DATA/index: written once by one process, then
# memory-mapped by all processes and loader workers. No Python object exists per text.

# raised whenever what a reader or the index writes changes
INDEX_VERSION = 2
# MAF's code: phrases of a caption, words of a phrase at most
MAX_PHRASES, MAX_PHRASE_WORDS = 32, 12


class IndexOptions(NamedTuple):
    """How records become an Index."""

    max_words: int = 60  # word pieces a text; longer ones are truncated [authors' code: left out]
    # leave texts out whose image has no features, and count them; else that is an error
    skip_missing: bool = False
    # how a text becomes ids. bert: [CLS] text [SEP]; albef: [CLS] text; phrases: side by side
    layout: str = "bert"
    group: int = 1  # so many texts that follow each other are one example
    # (record, store, image) -> target, where it depends on the store
    label: Callable = None


# {array: type code, numbers a row} of an Index, which says what they are
INDEX_ARRAYS = {
    "tokens": ("i", 1),
    "starts": ("q", 1),
    "types": ("b", 1),
    "image": ("i", 1),
    "id_bytes": ("B", 1),
    "id_starts": ("q", 1),
    "answered": ("b", 1),
    "target": ("i", 1),
    "score": ("d", 1),
    "target_starts": ("q", 1),
    "boxes": ("d", 4),
    "box_starts": ("q", 1),
    "pointed": ("q", 2),
    "pointed_box": ("f", 4),
}


class IndexWriter:
    """Collects the arrays of an Index, text by text"""

    def __init__(self, tokenizer, max_words, layout):
        self.tokenizer, self.max_words, self.layout = tokenizer, max_words, layout
        # arrays of numbers: lists of Python objects would take ten times the memory
        self.arrays = {
            name: array.array(code, [0] if name.endswith("starts") else [])
            for name, (code, _) in INDEX_ARRAYS.items()
        }
        self.images_a_text, self.pointed_words, self.counts = 1, {}, Counter()

    def add(self, record, images, target):
        """One text, the numbers of its images in the store, and what is right."""
        ids, types = self.tokenize(record)
        self.counts["truncated"] += len(ids) > self.max_words
        self.counts["empty"] += not ids
        self.counts["without a matching region"] += target == -1
        if self.layout != "phrases":
            end = [self.tokenizer.sep] * (self.layout == "bert")
            ids = [self.tokenizer.cls, *ids[: self.max_words], *end]
        # one right answer is a dictionary of one
        scores = target if isinstance(target, dict) else {} if target is None else {target: 1.0}
        self.images_a_text, a = len(images), self.arrays
        for name, values in {
            "tokens": ids,
            "types": types,
            "image": images,
            "id_bytes": record.id.encode(),
            "answered": [target is not None],
            "target": scores,
            "score": scores.values(),
            "boxes": chain.from_iterable(record.boxes),
        }.items():
            a[name].extend(values)
        for starts, name in (("starts", "tokens"), ("id_starts", "id_bytes")):
            a[starts].append(len(a[name]))
        a["target_starts"].append(len(a["target"]))
        a["box_starts"].append(len(a["boxes"]) // 4)

    def tokenize(self, record):
        """ids without [CLS] and the last [SEP]; of segments also rows of the type table"""
        if self.layout == "phrases":
            parts = [(n, self.tokenizer(words)) for n, words in record.text[:MAX_PHRASES]]
            # the type is the phrase's number
            parts = [(n, i) for n, ids in parts for i in ids[:MAX_PHRASE_WORDS]]
            return [i for _, i in parts], [n for n, _ in parts]
        if record.pointers:
            return self.tokenize_pointed(record), []
        if isinstance(record.text, str):
            text = clean_caption(record.text) if self.layout == "albef" else record.text
            return self.tokenizer(text), []
        ids, types = [], [0]
        for kind, words in record.text:
            # a [SEP] opens the next segment and has its type [authors' code]
            new = ([self.tokenizer.sep] if ids else []) + self.tokenizer(words)
            ids += new
            types += [kind] * len(new)
        # the last [SEP] has the type of what it ends
        last = types[min(len(ids), self.max_words)]
        return ids, [*types[: self.max_words + 1], last]

    def tokenize_pointed(self, record):
        """ids, word by word; each piece of a pointed word is a row: place, word's number, box"""
        ids, first_place = [], len(self.arrays["tokens"]) + 1
        for i, word in enumerate(record.text.split()):
            # word by word, since pointers count blank-separated words
            pieces = self.tokenizer(word)
            boxes = [box for first, end, box in record.pointers if first <= i < end]
            if boxes:
                known = self.pointed_words
                number = known.setdefault(strip_punctuation(word), len(known))
            for place in range(len(ids), len(ids) + len(pieces)) if boxes else ():
                for box in boxes if place < self.max_words else ():
                    self.arrays["pointed"].extend((first_place + place, number))
                    self.arrays["pointed_box"].extend(box)
            ids += pieces
        return ids

    def finish(self):
        """{name: array}"""
        out = {}
        for name, (_, width) in INDEX_ARRAYS.items():
            # shares the memory of what was collected
            values = np.asarray(self.arrays[name])
            out[name] = values.reshape(-1, width) if width > 1 else values
        for name in ("types", "pointed", "pointed_box"):
            if not len(out[name]):
                del out[name]
        if self.images_a_text > 1:
            out["image"] = out["image"].reshape(-1, self.images_a_text)
        else:
            # texts by their image: mismatched pairs are drawn with these
            by_image = np.argsort(out["image"], kind="stable")
            images, first = np.unique(out["image"][by_image], return_index=True)
            out |= {"images": images, "by_image": by_image.astype(np.int32)}
            out["image_starts"] = np.append(first, len(by_image))
        if "pointed" in out:
            out["pointed_words"] = np.array([word.encode() for word in self.pointed_words])
        return out


def build_index(records, store, tokenizer, name, how):
    """Arrays and meta of an Index; how: IndexOptions"""
    writer, missing, total, first = IndexWriter(tokenizer, how.max_words, how.layout), 0, 0, ""
    store.check_rows()
    # once for all texts: the names are sorted for it
    find = store.finder()
    bar = iter(tqdm(records, desc=f"index {name}", disable=None, leave=False))
    # images are looked up many at a time, whole examples together
    for chunk in iter(lambda: list(islice(bar, 4096 * how.group)), []):
        names = [r.image if isinstance(r.image, tuple) else (r.image,) for r in chunk]
        images = find(list(chain.from_iterable(names))).reshape(len(chunk), -1)
        known = (images >= 0).all(axis=1).reshape(-1, how.group).all(axis=1).repeat(how.group)
        if not known.all():
            row, column = np.argwhere(images < 0)[0]
            first = first or names[row][column]
        missing, total = missing + int((~known).sum()), total + len(chunk)
        for record, row, keep in zip(chunk, images.tolist(), known):
            if keep:
                target = how.label(record, store, row[0]) if how.label else record.target
                writer.add(record, row, target)
    if missing and not how.skip_missing:
        where = f"{store.folder} ({missing:,} of {total:,} captions)"
        raise DataError(
            f"{name}: image {first} has captions but no features in {where}",
            "features of every image that has captions.",
            "Pack the missing features, or go on without these captions: --skip-missing",
        )
    if missing == total:
        found = f"{name}: no captions left that have features in {store.folder}"
        raise DataError(found, hint="Check --data and the split's name.")
    return writer.finish(), {"counts": {"missing": missing, **writer.counts}}


def make_index(records, store, tokenizer, max_words=60, name="", **options):
    """An Index in memory only, for a few texts; options: IndexOptions"""
    how = IndexOptions(max_words, **options)
    arrays, meta = build_index(records, store, tokenizer, name, how)
    return Index(arrays, meta, store, tokenizer, name, group=how.group)


def open_index(data, reader, split, store, tokenizer, name="", **options):
    """The Index of a reader's records, made on first use in DATA/index and again once a file that
    the reader has read, the store, the tokenizer or an option changes.

    reader   a generator function (data, split, stats), or a functools.partial of one; splits
             joined by + are read one after the other
    options  IndexOptions
    """
    how, function = IndexOptions(**options), getattr(reader, "func", reader)
    given = sorted(getattr(reader, "keywords", {}).items()), getattr(reader, "args", ())
    settings = how._replace(label=how.label and how.label.__name__)
    # whatever changes the arrays is in the folder's name
    described = repr((given, str(Path(store.folder)), tokenizer.fingerprint(), settings))
    digest = hashlib.sha256(described.encode()).hexdigest()[:8]
    key = [INDEX_VERSION, function.__module__, function.__name__, split, digest]
    name = name or f"{function.__name__} {split}"
    folder = Path(data) / "index" / f"{function.__name__}-{split.replace('/', '_')}-{digest}"

    def build():
        stats = Counter()
        records = chain.from_iterable(reader(data, part, stats) for part in split.split("+"))
        arrays, meta = build_index(records, store, tokenizer, name, how)
        sources.update(store.stamps())
        return arrays, meta | {"stats": stats}

    arrays, meta = memory_mapped(folder, key, build)
    return Index(arrays, meta, store, tokenizer, name, folder, how.group)


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

    def __init__(self, arrays, meta, store, tokenizer, name, folder=None, group=1):
        # of a pickle that is on its way to a loader worker: it maps the files itself
        arrays = load_arrays(folder) if arrays is None else arrays
        # np.memmap itself indexes ten times as slowly
        arrays = {name: np.asarray(values) for name, values in arrays.items()}
        self.arrays, self.meta, self.tokenizer = arrays, meta, tokenizer
        self.name, self.folder, self.group = name, folder, group
        self.tokens, self.starts, self.types = map(arrays.get, ("tokens", "starts", "types"))
        self.image, self.images = arrays["image"], arrays.get("images")
        self.store = self.own_store = store
        if self.image.ndim == 2:
            self.store = JoinedStore([(store, self.image[:, j], j + 1) for j in (0, 1)])
        elif group == 2:
            self.store = JoinedStore([(store, self.image, np.tile([1, 2], len(self) // 2))])
        # a joined store has an image of its own for each text
        if self.store is not store:
            self.image = np.arange(len(self))

    def __reduce__(self):
        arrays = None if self.folder else self.arrays
        args = self.meta, self.own_store, self.tokenizer, self.name, self.folder, self.group
        return type(self), (arrays, *args)

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
        tokenizer, ids = self.tokenizer, self.tokens[self.starts[row] : self.starts[row + 1]]
        pieces = [tokenizer.pieces[i] for i in ids if i not in (tokenizer.cls, tokenizer.sep)]
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
        mask = length_mask(self.n_words(rows))
        out = np.full(mask.shape, self.tokenizer.pad if column == "tokens" else 0, np.int64)
        at = self.starts[rows][:, None] + np.arange(mask.shape[1])
        out[mask] = self.arrays[column][at[mask]]
        return out, mask

    def text_input(self, rows):
        """The texts' share of the model's input"""
        text, text_mask = self.text(rows)
        x = {"text": text, "text_mask": text_mask}
        if self.types is not None:
            x["text_type"] = self.text(rows, "types")[0]
        return as_tensors(x)

    def region_input(self, images):
        """The images' share of the model's input"""
        x = {"regions": self.store.read(images), "boxes": self.store.relative_boxes(images)}
        x["region_mask"] = length_mask(self.store.n_regions(images))
        if isinstance(self.store, JoinedStore):
            x["region_type"] = self.store.region_types(images)
        return as_tensors(x)

    def batch(self, rows, images, text=None):
        """The model's input for these pairs; text = ids to use instead, e.g. masked ones."""
        batch = self.text_input(rows) | self.region_input(images)
        if text is not None:
            batch["text"] = torch.from_numpy(text)
        # counted here: a GPU would have to be waited for
        return batch | {"length": int(self.length(rows, images).max())}

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
        """Pointed words of texts: places in B*N_L, words' numbers, rows (K,) and boxes (K, 4)"""
        place, n = self.arrays["pointed"][:, 0], self.n_words(rows)
        first = np.searchsorted(place, self.starts[rows])
        count = np.searchsorted(place, self.starts[rows] + n) - first
        row = np.repeat(np.arange(len(n)), count)
        # the k-th pointed word of its text is number first + k
        which = np.arange(len(row)) + np.repeat(first - np.cumsum(count) + count, count)
        pointed = self.arrays["pointed"][which]
        place = row * n.max(initial=0) + pointed[:, 0] - self.starts[rows][row]
        return place, pointed[:, 1], self.arrays["pointed_box"][which], row

    def in_chunks(self, rows, images, batch_tokens):
        """Batches of similar length for scoring many pairs: yields (places in the list, batch)."""
        length = self.length(rows, images)
        order = np.argsort(length, kind="stable")
        for chunk in token_batches(length[order], batch_tokens):
            yield order[chunk], self.batch(rows[order[chunk]], images[order[chunk]])

    def example_chunks(self, batch_tokens):
        """[numbers of examples]: all of them in batches of similar length"""
        length = example_length(self, np.arange(len(self) // self.group))
        order = np.argsort(length, kind="stable")
        return [order[chunk] for chunk in token_batches(length[order] * self.group, batch_tokens)]


def as_tensors(arrays):
    """{name: tensor} that shares the arrays' memory"""
    return {name: torch.from_numpy(values) for name, values in arrays.items()}


class Pool:
    """The texts and images of pairs of an Index, each once: batches of the pairs are put together
    where the tensors are, so that nothing is read, or sent to a device, twice.

    rows, images  (G, K) the pairs, as numbers of the pool's own texts and images
    """

    in_chunks = Index.in_chunks

    def __init__(self, index, rows, images):
        texts, self.rows = np.unique(rows, return_inverse=True)
        shown, self.images = np.unique(images, return_inverse=True)
        self.rows, self.images = self.rows.reshape(rows.shape), self.images.reshape(rows.shape)
        self.text_input, self.region_input = index.text_input(texts), index.region_input(shown)
        self.n_words, self.n_regions = index.n_words(texts), index.store.n_regions(shown)

    def apply(self, function):
        """The same pool, its tensors as the function leaves them."""
        new = copy.copy(self)
        new.text_input, new.region_input = map(function, (self.text_input, self.region_input))
        return new

    def pin_memory(self):
        """Asked for by the loader"""
        return self.apply(lambda part: {name: x.pin_memory() for name, x in part.items()})

    def length(self, rows, images):
        """(B,) words + regions of these pairs"""
        return self.n_words[rows] + self.n_regions[images]

    def batch(self, rows, images):
        """The model's input for these pairs, as wide as the longest of them"""
        batch = {"length": int(self.length(rows, images).max())}
        for part, which, lengths in (
            (self.text_input, rows, self.n_words),
            (self.region_input, images, self.n_regions),
        ):
            at = torch.from_numpy(which).to(next(iter(part.values())).device, non_blocking=True)
            # cut first, so that no padding is copied
            batch |= {name: x[:, : lengths[which].max()][at] for name, x in part.items()}
        return batch


# 6. Batches -------------------------------------------------------------------------------------

# mined negatives kept of each caption and image [UNITER sec. A.2]
HARDEST = 20
# pairs sorted by length together [UNITER's code]
BUCKET = 8192


def token_batches(lengths, batch_tokens):
    """Index arrays that cut rising lengths into batches of at most so many, padding counted."""
    batches, start = [], 0
    while start < len(lengths):
        # no more than fit at the shortest length need to be looked at
        most = max(1, int(batch_tokens // lengths[start]))
        ahead = lengths[start : start + most]
        padded = ahead * np.arange(1, len(ahead) + 1)
        # a text that is too long by itself is a batch of its own
        n = max(1, int((padded <= batch_tokens).sum()))
        batches.append(np.arange(start, start + n))
        start += n
    return batches


class BatchOptions(NamedTuple):
    """What the kinds of batches can be asked for."""

    by_example: bool = False  # size counts examples, not words and regions
    parts: int = 1  # a process makes its share of a batch in so many parts, one after the other
    stream: int = 0  # number of the task's random numbers, where it is not the kind's own
    mask_rate: float = 0.15  # share of words or regions that are masked
    joint: bool = False  # mask words and regions of a pair at once; else one, the other is whole
    negatives: int = 2  # mismatched pairs of each group that are trained on
    candidates: int = 0  # so many are drawn to be scored by the model; 0: negatives are random
    # besides the random negatives one hard image and one hard caption, of hard: HardNegatives
    mined: bool = False
    hard: object = None
    # even batches: captions with other images; odd ones: images with other captions
    alternate: bool = False
    augment: tuple = ()  # of pictures: flip, jitter, grey
    # all texts of an example count in size, or, as VCR's authors count, one of its choices
    count_choices: bool = True
    answers: int = 0  # how many the task's head predicts, where several may be right
    similarity: object = None  # train.WordSimilarity of the pointed words
    soft_target: Callable = None  # losses.soft_alignment_target
    phrase_input: Callable = None  # evaluate.PhraseInput of the captions
    # each (batches, rng, rows, share, batch) -> what else a batch holds: other texts of its images
    other_texts: tuple = ()


class Batches:
    """Batches of one task on one data set. Batch k is a function of (seed, k) alone, so any process
    can make any batch: an epoch's order, pairs of similar length together, the batches in random
    order.

    task              a name of KINDS, which says what is drawn and what a batch holds
    size              words + regions of a batch over all processes, padding counted; or examples
    rank, world_size  this process takes every world_size-th example of a batch
    corpus            number of the data set in the mix, so that each has random numbers of its own
    options           BatchOptions, which are attributes too
    part(k, j)        dict: "input" for the model, what the task predicts, "names" of the samples
                      (none: nothing of the batch is this process's), "counts": over how many
                      things the mean of each loss runs, "" of those not named
    """

    def __init__(self, task, index, size, seed, rank=0, world_size=1, corpus=0, **options):
        self.task, self.index, self.size, self.seed = task, index, size, seed
        self.rank, self.world_size, self.corpus = rank, world_size, corpus
        self.kind = KINDS[task]
        vars(self).update(BatchOptions(**options)._asdict())
        # the epoch at hand and its first batch's number
        self.epoch, self.first, self.columns, self.batches = -1, 0, (), []
        if task == "albef" and size > len(index):
            # contrast needs whole batches
            found = f"{index.name}: {len(index):,} texts for batches of {size}"
            raise DataError(found, "at least one batch. Lower --batch-size.")
        if task == "examples" and not len(answered_examples(index)):
            found = f"{index.name}: no example with an answer to learn from"
            raise DataError(found, hint="Choose a split that has answers.")

    def rng(self, *numbers):
        """Random numbers that belong to these numbers, this task and this data set alone."""
        stream = self.stream or self.kind.stream
        return np.random.default_rng([self.seed, stream + 100 * self.corpus, *numbers])

    def plan(self, epoch):
        """Draw an epoch: (columns, [rows of the columns that are a batch])."""
        rng = self.rng(epoch)
        columns = self.kind.draw(self, rng)
        if self.kind.unsorted:
            # the last ones of an epoch wait for the next
            cut = len(columns[0]) // self.size * self.size or len(columns[0])
            return columns, np.split(np.arange(cut), range(self.size, cut, self.size))
        # an epoch is sorted in buckets, so that batches of one length are not all alike; larger
        # ones for larger batches, which otherwise end in remainders of many lengths
        batches, bucket = [], BUCKET * max(1, self.size // 10_240)
        if self.by_example:
            bucket = max(1, BUCKET // self.size) * self.size
        for start in range(0, len(columns[0]), bucket):
            part = [column[start : start + bucket] for column in columns]
            cost = self.kind.cost(self, *part)
            order = np.lexsort([self.index.n_words(part[0]), cost])
            if self.by_example:
                cuts = np.split(np.arange(len(order)), range(self.size, len(order), self.size))
            else:
                cuts = token_batches(cost[order], self.size)
            batches += [(start + order[cut]).astype(np.int32) for cut in cuts]
        return columns, [batches[i] for i in rng.permutation(len(batches))]

    def whole(self, k):
        """The columns of batch k before it is shared out among the processes."""
        # an earlier epoch is asked for: start again
        if k < self.first:
            self.epoch, self.first, self.batches = -1, 0, []
        while k >= self.first + len(self.batches):
            self.first += len(self.batches)
            self.epoch += 1
            self.columns, self.batches = self.plan(self.epoch)
        rows = self.batches[k - self.first]
        return tuple(column[rows] for column in self.columns)

    def part(self, k, j):
        """Part j of this process's share of batch k: the same examples whatever the processes"""
        columns, index = list(self.whole(k)), self.index
        first, step = self.rank + self.world_size * j, self.world_size * self.parts
        share = np.arange(first, len(columns[0]), step)
        # what each example shows: its own column, or an image for each of its texts
        if len(columns) == 3:
            images = columns[1][share, None]
        else:
            images = index.image[example_rows(index, columns[-1][share])]
        ok = index.store.readable(images.ravel()).reshape(images.shape)
        unreadable = sorted({index.store.image_id(i) for i in images[~ok]})
        good = share[ok.all(axis=1)]
        if not len(good) and len(share) == len(columns[0]):
            found = f"none of the pictures of a batch can be read, for example {unreadable[0]}"
            raise DataError(f"{index.store.folder}: {found}", hint=CUT_SHORT)
        # others of the share stand in, since for contrast all processes need as many
        for c, column in enumerate(columns if 0 < len(good) < len(share) else ()):
            columns[c] = column.copy()
            columns[c][share] = column[np.resize(good, len(share))]
        share = share if len(good) else good
        batch = self.kind.collate(self, self.rng(k, 1), k, share, *columns)
        for other in self.other_texts if batch["names"] else ():
            batch |= other(self, self.rng(k, 2), columns[0], share, batch)
        return batch | {"unreadable": unreadable}

    def __getitem__(self, k):
        return self.part(k, 0)

    def __getstate__(self):
        # a worker draws the epoch itself
        return {**vars(self), "epoch": -1, "first": 0, "columns": (), "batches": []}


def length_mask(lengths, width=None):
    """(B, N) bool, True in the first lengths[b] places of row b."""
    lengths = np.asarray(lengths)
    return np.arange(lengths.max(initial=0) if width is None else width)[None] < lengths[:, None]


# Masks are drawn for all processes at once, so that any number of them sees the same.


def draw_mask(rng, maskable, rate):
    """Which maskable places are masked: (B, N) bool, at least one in each row that has any"""
    # 2: never the smallest
    u = np.where(maskable, rng.random(maskable.shape), 2.0)
    return (u < rate) | ((u == u.min(axis=1, keepdims=True)) & maskable)


def mask_words(batches, rng, rows):
    """Which words to mask (B, N_L) bool, and what stands there instead, an id or -1 for the word
    itself: 80 % become [MASK], 10 % another word, 10 % stay; never [CLS], [SEP].  UNITER fn. 7
    """
    index, tokenizer = batches.index, batches.index.tokenizer
    text, maskable = index.text(rows)
    # [CLS] is the first; [SEP] also stands between segments
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
        raise DataError("mismatched pairs need two images with captions; this split has one")
    here = np.searchsorted(images, avoid).clip(max=len(images) - 1)
    inside = images[here] == avoid
    u = rng.integers(len(images) - inside)
    # those behind the one to avoid move up by one
    u += inside & (u >= here)
    return images[u]


def mismatched_captions(rng, index, images):
    """One random caption for each of these images that belongs to another image."""
    if len(images) > DRAWN_AT_ONCE:
        return draw_in_pieces(lambda part: mismatched_captions(rng, index, part), images)
    starts = index.arrays["image_starts"]
    here = np.searchsorted(index.images, images)
    first, own = starts[here], starts[here + 1] - starts[here]
    # drawn among all captions but the image's own, then moved past those
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
    """Examples that somebody has answered, but those whose answer is none of the choices (-1)"""
    answered = index.arrays["answered"][:: index.group] > 0
    starts = index.arrays["target_starts"][:: index.group][: len(answered)]
    # (an empty target reads its neighbour's: tasks that have -1 have no empty ones)
    target = np.append(index.arrays["target"], 0)[starts]
    return np.flatnonzero(answered & (target != -1))


# ... what it costs, in words and regions ...


def pair_cost(batches, rows, images, match):
    """Words + regions of each pair"""
    return batches.index.length(rows, images)


def group_cost(batches, rows, images, match):
    """Of all pairs of a ranking group"""
    return batches.index.length(rows, images) * (1 + batches.negatives + 2 * batches.mined)


def example_cost(batches, rows, examples):
    """Of all texts of an example, or of one, at the length of the longest"""
    length = example_length(batches.index, examples)
    return length * batches.index.group if batches.count_choices else length


def example_rows(index, examples):
    """(B, group) rows of the index"""
    return np.asarray(examples, np.int64)[:, None] * index.group + np.arange(index.group)


def example_length(index, examples):
    """(B,) words + regions of the longest text of each example"""
    rows = example_rows(index, examples)
    return index.length(rows.ravel(), index.image[rows.ravel()]).reshape(rows.shape).max(axis=1)


# ... and what a batch holds.


def empty_batch(batches):
    """Of a batch with fewer examples than processes one of them has nothing."""
    return {"task": batches.task, "names": [], "counts": {"": 0}}


def collate_pairs(batches, rng, k, share, rows, images, match):
    """Masked words (mlm), masked regions (mrfr, mrc, mrckl), or matching (itm).

    masked_words, word_targets (K,), masked_regions (K,), region_probs (K, C), match (B,); itm, of
    pictures whose texts have boxes: "boxed" (M,) matched rows, "region_target" (M, R, R) bool, the
    pixels that the text describes
    """
    index, task, pictures = batches.index, batches.task, isinstance(batches.index.store, PatchStore)
    masks_regions = task in ("mrfr", "mrc", "mrckl")
    boxed = pictures and task == "itm" and len(index.arrays["boxes"]) > 0
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
    # counted here, where nobody waits for a GPU
    batch |= as_tensors({"match": match, "matched": np.flatnonzero(match)})
    text = None
    if masked_words is not None:
        text, real = index.text(rows)
        # this process's longest text may be shorter than the whole batch's
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
        if task in ("mrc", "mrckl"):
            probs = torch.from_numpy(index.store.read_at(images, masked, "cls_prob"))
            if pictures and task == "mrc":
                # the target is one class: no attributes, and no patches without a class
                probs[:, index.store.detector[0].classes :] = 0
                shown = probs[:, 1:].any(-1)
                places, probs = places[shown], probs[shown]
            batch["region_probs"] = probs
            if pictures:
                # in sight: seeing is what has to be learned [ours]
                batch["hidden_regions"] = places[:0]
        batch["masked_regions" if masks_regions else "hidden_regions"] = places
        if masks_regions:
            batch["counts"][""] = len(places)
    return batch if u is None else add_boxed(batches, batch, rows, np.flatnonzero(match), u)


def add_boxed(batches, batch, rows, candidates, u, flip=()):
    """Of those whose text has boxes one box each, chosen by u (B,); flip (B,): mirrored pictures"""
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


def collate_ranking(batches, rng, k, share, rows, images, match):
    """Groups of one matched pair and its mismatched ones, for the ranking loss.

    "positive": batch of the G matched pairs; "negatives": list of batches of similar length;
    "order": (G, K) their places in the list of all negatives. Where the model chooses instead:
    "candidates", a Pool of (G, candidates).
    """
    index, K = batches.index, batches.candidates or batches.negatives
    with_images = (k % 2 == 0) * K if batches.alternate else (K + 1) // 2
    wrong_rows, wrong_images = (np.repeat(x[:, None], K, 1) for x in (rows, images))
    for j in range(K):
        if j < with_images:
            wrong_images[:, j] = mismatched_images(rng, index.images, images)
        else:
            wrong_rows[:, j] = mismatched_captions(rng, index, images)
    # drawn whether it is needed or not, so that the numbers after it are the same
    pick = rng.integers(HARDEST, size=(2, len(rows)))[:, share]
    rows, images = rows[share], images[share]
    wrong_rows, wrong_images = wrong_rows[share], wrong_images[share]
    if not len(rows):
        return empty_batch(batches)
    batch = {"task": "rank", "names": index.names(rows, images), "counts": {"": len(rows)}}
    batch["anchor"] = ("text", "image")[k % 2] if batches.alternate else "both"
    batch["positive"] = index.batch(rows, images)
    if batches.candidates:
        return batch | {"candidates": Pool(index, wrong_rows, wrong_images)}
    if batches.hard:
        caption = batches.hard.captions[images, pick[0]]
        # no caption was scored with this image: a random one stays
        caption = np.where(caption < 0, wrong_rows[:, -1], caption)
        wrong_rows = np.column_stack([wrong_rows, rows, caption])
        wrong_images = np.column_stack([wrong_images, batches.hard.images[rows, pick[1]], images])
    return batch | collate_negatives(index, wrong_rows, wrong_images)


def collate_negatives(index, rows, images):
    """Batches of (G, K) rows and images, shortest first, cut where padding would pass 256 tokens,
    about what another pass of the model costs [measured]."""
    length = index.length(rows.ravel(), images.ravel())
    order = np.argsort(length, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    cuts, start, rising = [], 0, length[order]
    for i in range(len(order)):
        if rising[i] * (i + 1 - start) - rising[start : i + 1].sum() > 256:
            cuts.append(i)
            start = i
    parts = np.split(order, cuts)
    negatives = [index.batch(rows.ravel()[part], images.ravel()[part]) for part in parts]
    return {"negatives": negatives, "order": torch.from_numpy(place.reshape(rows.shape))}


def collate_multitask(batches, rng, k, share, rows, images, match):
    """All of Kervadec's supervision in one batch, as LXMERT: masked words and regions, replaced
    images, answers, and pointers.

    besides "input": masked_words, word_targets; masked_regions with region_features, region_class,
    region_attribute; match; answered, answer (K,): rows asked about their own image, and the
    answer; aligned (K,) places in B*N_L of pointed words, alignment (K, N_V) soft targets,
    aligned_row (K,).
    """
    index, store = batches.index, batches.index.store
    masked_words, new = mask_words(batches, rng, rows)
    real = length_mask(store.n_regions(images))
    masked, how = draw_mask(rng, real, batches.mask_rate), rng.random(real.shape)
    # whose region is shown instead
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
    # only those asked about their own image have an answer
    answer = [draw_answer(index, r, v) if m else -1 for r, m, v in zip(rows, match, u)]
    answer = np.array(answer)
    batch = as_tensors(
        {
            "match": match,
            "matched": np.flatnonzero(match),
            "masked_words": np.flatnonzero(masked_words),
            "word_targets": text[masked_words],
            "masked_regions": np.flatnonzero(masked),
            "hidden_regions": np.zeros(0, np.int64),
            "region_class": store.read_at(images, masked, "cls_id").astype(np.int64),
            "region_attribute": store.read_at(images, masked, "attr_id").astype(np.int64),
            "answered": np.flatnonzero(answer >= 0),
            "answer": answer[answer >= 0],
        }
    )
    batch |= {"task": batches.task, "names": index.names(rows, images), "input": x}
    # what the regions were, before some of them are overwritten
    batch["region_features"] = regions[places]
    # of the masked ones 80 % show zeros, 10 % another region's feature, 10 % their own [LXMERT's
    # code]
    hidden = torch.from_numpy(how[places] < 0.8)[:, None]
    regions[places] = torch.where(hidden, 0, regions[places])
    swapped = np.nonzero(masked & (how >= 0.8) & (how < 0.9))
    regions[swapped] = torch.from_numpy(store.most_certain(donor[swapped]))
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
    # an exchanged image does not show what the words point at
    keep = match[row]
    place, word, box, row = place[keep], word[keep], box[keep], row[keep]
    mask, similar = length_mask(store.n_regions(images))[row], []
    for column in ("cls_id", "attr_id"):
        # patches have a place alone
        ids = store.read(images, column)[row] if store.has_names else np.full(mask.shape, -1)
        similar.append(as_tensor(batches.similarity(word, ids, column)))
    boxes, box = as_tensor(store.read(images, "boxes")[row]), as_tensor(box)
    target = batches.soft_target(box, boxes, *similar, as_tensor(mask))
    # a pointer that matches nothing is none
    keep = target.sum(dim=-1) > 0
    aligned = {"aligned": as_tensor(place), "aligned_row": as_tensor(row), "alignment": target}
    aligned |= {"pointer": box[:, None], "pointer_boxes": boxes}
    return {name: values[keep] for name, values in aligned.items()}


def collate_phrases(batches, rng, k, share, rows):
    """A share of the captions' phrases, all images of the batch; "own" (b,): each caption's own"""
    # all of the images, so that any number of processes has the same negatives
    own = np.arange(len(rows))[share]
    if not len(own):
        return empty_batch(batches)
    names = [batches.index.id(row) for row in rows[own]]
    batch = {"task": batches.task, "names": names, "own": torch.from_numpy(own)}
    batch["counts"] = {"": len(own)}
    return batch | batches.phrase_input(rows[own], batches.index.image[rows])


def collate_pictures(batches, rng, k, share, rows):
    """Captions with their pictures, for ALBEF and AMC.

    text, masked_text (b, N_L), text_mask; masked_words (K,) places in b*N_L, word_targets (K,);
    pixels (b, R, R, 3) uint8; boxed, region_target as collate_pairs; own (b,): which of the whole
    batch; u (2, B) in [0, 1): chooses the negatives, the same for all processes; number k
    augment: flip, jitter (brightness, contrast and colour by up to 0.4), grey [AMC's code]
    """
    index, B = batches.index, len(rows)
    own = np.arange(B)[share]
    masked, new = mask_words(batches, rng, rows)
    u, factors = rng.random((4, B)), rng.uniform(0.6, 1.4, (B, 3))
    negatives = rng.random((2, B))
    chances = {"flip": 0.5, "jitter": 0.5, "grey": 0.2}
    # all random numbers are drawn for the whole batch, whatever is asked for
    flip, jitter, grey = (
        (name in batches.augment) & (u[i] < p) for i, (name, p) in enumerate(chances.items())
    )
    # as wide on all processes
    text, real = (x[own] for x in index.text(rows))
    text = np.where(flip[own, None], mirrored(index.tokenizer, text), text)
    masked, new = masked[own] & real, new[own]
    images = index.image[rows[own]]
    pixels = []
    for x, i in zip(index.store.pixels(images), own):
        pixels.append(augment_picture(x, flip[i], factors[i] if jitter[i] else None, grey[i]))
    batch = as_tensors(
        {
            "own": own,
            "flip": flip[own],
            "u": negatives.astype(np.float32),
            "text": text,
            "masked_text": np.where(masked & (new >= 0), new, text),
            "text_mask": real,
            "pixels": np.stack(pixels),
            "masked_words": np.flatnonzero(masked),
            "word_targets": text[masked],
        }
    )
    batch |= {"task": batches.task, "names": index.names(rows[own], images), "number": k}
    batch["counts"] = {"": len(own), "mlm": int(masked.sum())}
    return add_boxed(batches, batch, rows[own], range(len(own)), u[3, own], flip[own])


def mirrored(tokenizer, text):
    """Texts of mirrored pictures, where left is right; AMC's code leaves them as they are."""
    left, right = (tokenizer(side) for side in ("left", "right"))
    if not len(left) == len(right) == 1:
        return text
    return np.where(text == left[0], right[0], np.where(text == right[0], left[0], text))


def augment_picture(pixels, flip, factors, grey):
    """(R, R, 3) uint8, mirrored, with other brightness, contrast and colour, or grey"""
    picture = Image.fromarray(pixels[:, ::-1] if flip else pixels)
    if factors is not None:
        enhancers = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
        for enhance, factor in zip(enhancers, factors):
            picture = enhance(picture).enhance(factor)
    return np.asarray(picture.convert("L").convert("RGB") if grey else picture)


def normalize_pixels(pixels):
    """(B, R, R, 3) uint8, on any device -> (B, 3, R, R) float32, less the mean, by the deviation"""
    numbers = torch.tensor([PIXEL_MEAN, PIXEL_STD], device=pixels.device) * 255
    mean, std = numbers.view(2, 3, 1, 1)
    return (pixels.permute(0, 3, 1, 2).float() - mean) / std


def collate_examples(batches, rng, k, share, rows, examples):
    """Examples of a task; "target": (B,) what is right, or (B, answers) how right each answer is"""
    examples = examples[share]
    if not len(examples):
        return empty_batch(batches)
    return {"task": batches.task} | example_batch(batches.index, examples, batches.answers)


def example_batch(index, examples, answers=0):
    """The texts of these examples, one after the other, and their targets."""
    examples = np.asarray(examples, np.int64)
    rows = example_rows(index, examples).ravel()
    numbers = index.target_scores(examples, answers) if answers else index.target_numbers(examples)
    return {
        "names": [index.id(row) for row in rows[:: index.group]],
        "input": index.batch(rows, index.image[rows]),
        "target": torch.from_numpy(numbers),
        "counts": {"": len(examples)},
    }


class Kind(NamedTuple):
    """What the batches of a task are."""

    stream: int  # number of its random numbers
    draw: Callable  # (batches, rng) -> columns of an epoch
    collate: Callable  # (batches, rng, k, share of this part, *columns of a batch) -> dict
    cost: Callable = pair_cost  # (batches, *columns) -> words + regions of each
    unsorted: bool = False  # examples as they come, so many a batch: contrast among any lengths


KINDS = {
    "mlm": Kind(1, draw_matched, collate_pairs),
    "mrfr": Kind(2, draw_matched, collate_pairs),
    "mrc": Kind(3, draw_matched, collate_pairs),
    "mrckl": Kind(4, draw_matched, collate_pairs),
    "itm": Kind(5, draw_matching, collate_pairs),
    "rank": Kind(6, draw_matched, collate_ranking, group_cost),
    "multitask": Kind(15, draw_replaced_images, collate_multitask),
    "maf": Kind(16, draw_texts, collate_phrases, unsorted=True),
    "albef": Kind(17, draw_texts, collate_pictures, unsorted=True),
    "examples": Kind(20, draw_examples, collate_examples, example_cost),
}
