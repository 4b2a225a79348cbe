"""Benchmarks and figures. Every benchmark returns a flat dict of numbers in the papers' units.

    1. Scoring            score_pairs  score_all  predict: what a checkpoint says of pairs, examples
    2. Choices and retrieval     choice_hits  CHOICES: Winoground and its like  recall
                          CACR tables 2-4; UNITER table 3
    3. Downstream tasks   vqa_scores  vcr_scores  nlvr2_scores  gqa_scores ...   UNITER table 3;
                          Kervadec tables 1, 2; TASKS: the table of all tasks
    4. Word to region     word_to_region  pointing: words that point at regions   Kervadec sec. 7
    5. Phrase grounding   WordVectors  PhraseInput: MAF's input; grounding  MAF tables 1, 2, 5
    6. Heat maps          pointing_games: is a text's heat map inside its box   AMC tables 1-5
    7. Figures            attention_figure  heat_figures  map_figures  grounding_figures
    8. Pictures and features in   pack: official feature files to a region store; extract: pictures;
                          score_photo: one photo and a sentence
    9. Command line       python evaluate.py --task winoground --ckpt out/toy-cacr-seed0/last.pt

python evaluate.py --image photo.jpg --text "a dog left of a person" --ckpt out/.../last.pt \\
    --detector pytorch_model.bin
python evaluate.py extract --images photos --detector pytorch_model.bin --out DATA/regions/photos
python evaluate.py pack train2014_obj36.tsv val2014_obj36.tsv --out DATA/regions/coco
"""

import argparse
import atexit
import base64
import contextlib
import csv
import datetime
import functools
import hashlib
import io
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
import zipfile
from collections import Counter
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # read after init_process_group, its defaults would keep the group
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import losses

# data.py: errors and files, tokenizers, stores, readers, index
from data import AGAIN, CUT_SHORT, DataError, as_tensors, length_mask, need, read_json, write_atomic
from data import WordPiece, check_names, detector_names, kept, normalise_answer, strip_punctuation
from data import COLUMNS, PER_IMAGE, PatchStore, RegionStore, Vision, picture_folders, read_picture
from data import ENTAILMENT, REFER, VCR_WORDS, Record, exists, gqa_records, vg_answer, vg_items
from data import entailment_pairs, entity_captions, gqa_questions, karpathy_captions
from data import karpathy_images, nlvr2_pairs, nlvr_presentations, referit_expressions
from data import referring_expressions, vcr_choices
from data import NUMBER, field, vg_images, vqa_annotations, vqa_questions, winoground_examples
from data import example_batch, make_index, normalize_pixels, open_index, token_batches
from model import SIZES, Albef, CheckpointError, Encoder, Lxmert, Maf, build, load_pretrained
from model import detector_size, load_detector, read_checkpoint, resize_for_detector

# 1. Scoring -------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A trained model and what it was trained with: what every benchmark is given."""

    model: torch.nn.Module
    tokenizer: object
    settings: dict  # train.py's settings
    sizes: dict  # of the model; answer_list: what its answers are called
    vision: Vision  # where it finds what it sees
    autocast: Callable = nullcontext

    @property
    def data(self):
        """The data tree"""
        return self.vision.data

    @property
    def device(self):
        """Where the model is"""
        return next(self.model.parameters()).device

    @property
    def is_albef(self):
        """Does it read whole pictures?"""
        return isinstance(self.model, Albef)

    def index(self, reader, split, store, **options):
        """The Index of a reader's records with this run's tokenizer"""
        # a checkpoint is evaluated on texts cut as in its training
        if isinstance(store, str):
            store = self.vision.open(store)
        how = {"max_words": self.settings.get("max_words", 60)}
        how["skip_missing"] = bool(self.settings.get("skip_missing"))
        return open_index(self.data, reader, split, store, self.tokenizer, **how | options)


def join_processes():
    """The device of this process, which is alone or one of several that torchrun started."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        # a process may make an index for an hour while the others wait
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
        # its threads end before Python does: letting a tensor go after that is an abort
        atexit.register(dist.destroy_process_group)
    return device


def bf16_is_faster():
    """Is bf16 faster on this CPU? On AMD's with AVX512-BF16 a step is 1.3 (toy) to 2 times as fast
    (base); Intel's need AMX and are slower without it [measured]."""
    with contextlib.suppress(OSError):
        cpu = Path("/proc/cpuinfo").read_text()
        return ("avx512_bf16" if "AuthenticAMD" in cpu else "amx_bf16") in cpu
    return False


def autocast_for(device, precision="auto"):
    """What puts a model into bf16 where that is wanted: "auto" where it is faster."""
    faster = device.type == "cpu" and bf16_is_faster()
    if device.type == "cuda":
        faster = torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" or precision == "auto" and faster:
        return functools.partial(torch.autocast, device.type, torch.bfloat16)
    return nullcontext


def need_kind(run, kind, what, recipe):
    """An error where a checkpoint's model cannot do what is asked of it."""
    if not isinstance(run.model, kind):
        hint = f"  Train one that does: python train.py {recipe}"
        raise CheckpointError(f"this checkpoint does not {what}\n{hint}")


def fail(program, message):
    """End with an error, said once. Most errors are met by all processes, and the first says them;
    one that another process has met alone it says itself, unless torchrun has ended it by then.
    """
    if int(os.environ.get("RANK", 0)):
        time.sleep(10)
    sys.exit(f"{program}: error: {message}")


def shared_out(items):
    """This process's share of what all processes evaluate together: every n-th"""
    return items[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else items


def gathered(found):
    """[what each process has found], in all of them"""
    parts = [found]
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, found)
    return parts


def is_main():
    """Does this process write?"""
    return not dist.is_initialized() or dist.get_rank() == 0


def to_device(batch, device):
    """Move every tensor of a nested batch."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {k: to_device(v, device) for k, v in batch.items()}
    return [to_device(v, device) for v in batch] if isinstance(batch, list) else batch


@contextlib.contextmanager
def evaluating(model):
    """The model in eval mode, without gradients; as it was afterwards."""
    # train.py evaluates in the middle of a run
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def pair_scores(out, head):
    """How well pairs match, float32: the ranking score, or the log-odds of matching."""
    return out.rank.float() if head == "rank" else log_odds(out.match)


def log_odds(match):
    """(B, 2) logits -> (B,) how much likelier a match is than none, float32"""
    return (match[:, 1] - match[:, 0]).float()


def score_pairs(
    model, index, rows, images, head="rank", batch_tokens=8192, autocast=nullcontext, progress=None
):
    """How well caption rows[k] fits image images[k]: (K,) float32 numpy; higher is better.

    head  "rank": the ranking score; "match": the log-odds of matching (for models that were not
          fine-tuned by ranking)
    """
    device = next(model.parameters()).device
    rows, images = np.asarray(rows), np.asarray(images)
    order, found, hidden = [], [], None if progress else True
    bar = tqdm(total=len(rows), desc=progress, unit=" pairs", disable=hidden, leave=False)
    with evaluating(model), bar:
        # pairs of similar length together: little padding is computed
        for places, batch in index.in_chunks(rows, images, batch_tokens):
            with autocast():
                out = model(**to_device(batch, device), heads=(head,))
            order.append(places)
            found.append(pair_scores(out, head))
            bar.update(len(places))
        scores = np.empty(len(rows), np.float32)
        # fetched once: nothing waits for the device between batches
        scores[np.concatenate(order)] = torch.cat(found).cpu().numpy()
    return scores


def score_pairs_by_albef(run, index, rows, images, progress=None, batch=64):
    """score_pairs() from pictures: (K,) log-odds of matching, float32 numpy"""
    parts, found = range(0, len(rows), batch), [torch.zeros(0, device=run.device)]
    with evaluating(run.model):
        for at in tqdm(parts, progress, disable=None if progress else True, leave=False):
            x = picture_batch(index, rows[at : at + batch], images[at : at + batch])
            with run.autocast():
                found.append(log_odds(run.model(**to_device(x, run.device))[0]))
    # fetched once: nothing waits for the device between batches
    return torch.cat(found).cpu().numpy()


def picture_batch(index, rows, images):
    """ALBEF's input of texts and their pictures, each of which is read and encoded once"""
    text, mask = (torch.from_numpy(x) for x in index.text(rows))
    shown, of = np.unique(images, return_inverse=True)
    pixels = normalize_pixels(torch.from_numpy(index.store.pixels(shown)))
    return dict(text=text, text_mask=mask, image=pixels, image_of=torch.from_numpy(of))


def score_matrix(path, shape):
    """(T, I) float32 of nan, or what a killed run left in this file, memory-mapped."""
    if path is None:
        return np.full(shape, np.nan, np.float32)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() and is_main():
        # a whole file before the first column
        fresh = np.lib.format.open_memmap(f"{path}.tmp", "w+", np.float32, shape)
        # nan marks what nobody has scored yet
        fresh[:] = np.nan
        fresh.flush()
        os.replace(f"{path}.tmp", path)
    # the others wait for it
    gathered(None)
    scores = np.load(path, mmap_mode="r+")
    if scores.shape != shape:
        (T, I), (wanted_T, wanted_I) = scores.shape, shape
        found = f"{path} holds scores of {T:,} x {I:,}, this is {wanted_T:,} x {wanted_I:,}"
        raise DataError(found, hint="Another split's. Delete it, or choose another file.")
    return scores


def score_all(
    model, index, head="rank", batch_tokens=8192, autocast=nullcontext, keep=None, progress="pairs"
):
    """Every caption with every image: (T, I) float32, images in the order of index.images. Higher
    is better.

    Memory for this one matrix and one batch: an image's features are read once, and go to the
    device once for all captions.
    keep   a file for the matrix, which all processes of a machine write: columns that a killed run
           had finished are not made again; it is left there, whole, at the end
    """
    device, T, I = next(model.parameters()).device, len(index), len(index.images)
    scores, n_words = score_matrix(keep, (T, I)), index.n_words(np.arange(T))
    order = np.argsort(n_words, kind="stable")
    # all captions stay on the device, in order of length
    text, text_mask = (torch.from_numpy(x[order]).to(device) for x in index.text(np.arange(T)))
    n_words = n_words[order]
    # a column is written whole, so a column with a nan has to be made
    own = shared_out(range(I))
    todo = [i for i in own if np.isnan(scores[:, i]).any()]
    title, initial = f"{progress}: {T:,} captions x {I:,} images", len(own) - len(todo)
    bar = tqdm(todo, title, len(own), initial=initial, unit=" images", disable=None, leave=False)
    with evaluating(model):
        for i in bar:
            batch = index.batch(np.array([0]), index.images[i : i + 1])
            image = {k: batch[k].to(device) for k in ("regions", "boxes", "region_mask")}
            n, column = batch["region_mask"].shape[1], []
            for rows in token_batches(n_words + n, batch_tokens):
                longest, part = int(n_words[rows[-1]]), slice(rows[0], rows[-1] + 1)
                # expand() copies nothing: the image is in memory once
                copies = {k: v.expand(len(rows), *v.shape[1:]) for k, v in image.items()}
                words = text[part, :longest], text_mask[part, :longest]
                with autocast():
                    out = model(*words, **copies, heads=(head,), length=longest + n)
                column.append(pair_scores(out, head))
            scores[order, i] = torch.cat(column).cpu().numpy()
    if keep is not None:
        scores.flush()
    for columns in gathered({i: scores[:, i] for i in own if keep is None}):
        for i, column in columns.items():
            scores[:, i] = column
    return scores


class Ensemble(torch.nn.Module):
    """Several models of one task as one: the mean of their heads' scores       UNITER table 9"""

    def __init__(self, models):
        super().__init__()
        self.models = torch.nn.ModuleList(models)

    def forward(self, *args, **kwargs):
        outs = [model(*args, **kwargs) for model in self.models]
        head = "scores" if outs[0].match is None else "match"
        mean = torch.stack([getattr(out, head) for out in outs]).mean(dim=0)
        return outs[0]._replace(**{head: mean})


def ablate_modality(batch, modality):
    """A control: the same batch without its words ("text") or without what the regions show and
    where they are ("regions"). Words: [CLS] [SEP] stay. Regions: one remains, and all of them where
    regions are what is asked for (batch["keep_regions"]).
    """
    x = dict(batch["input"])
    if modality == "text":
        # the last real token is [SEP]
        end = x["text_mask"].sum(dim=1, keepdim=True) - 1
        x["text"] = torch.cat([x["text"][:, :1], x["text"].gather(1, end)], dim=1)
        # None: the model counts again
        x["text_mask"], x["length"] = x["text_mask"][:, :2], None
        x.pop("text_type", None)
    else:
        x |= {name: torch.zeros_like(x[name]) for name in ("regions", "boxes")}
        if not batch.get("keep_regions"):
            columns = [c for c in ("regions", "boxes", "region_mask", "region_type") if c in x]
            x |= {c: x[c][:, :1] for c in columns} | {"length": None}
    return batch | {"input": x}


def predict(run, task, index, batch_tokens=8192, ablate="", whole=False):
    """(E,) the best answer, choice or region of each example by the task's head. All processes call
    it together and share the examples out.

    ablate  "text" or "regions", a control that may not see them
    whole   instead (E, choices), what the head says of each: of all answers to a million questions
            that would be gigabytes
    """
    chunks, found = shared_out(index.example_chunks(batch_tokens)), {}
    total = sum(map(len, chunks))
    bar = tqdm(total=total, desc=index.name, unit=" examples", disable=None, leave=False)
    with evaluating(run.model), bar:
        for examples in chunks:
            batch = example_batch(index, examples) | {"keep_regions": task.keep_regions}
            batch = to_device(ablate_modality(batch, ablate) if ablate else batch, run.device)
            with run.autocast():
                out = run.model(**batch["input"], heads=(task.output,))
            scores = task.scores(out, batch, index.group).float().cpu().numpy()
            found.update(zip(examples.tolist(), scores if whole else scores.argmax(axis=1)))
            bar.update(len(examples))
    found = dict(chain.from_iterable(part.items() for part in gathered(found)))
    return np.stack([found[example] for example in range(len(found))])


# 2. Choices and retrieval -----------------------------------------------------------------------


class Choices(NamedTuple):
    """A benchmark of examples: a few texts that follow each other, and which images they are of."""

    # (data, part, stats) -> Records of one image each; note: {kind: which example}, where those of
    # a kind that have the same `which` are right together or not at all
    reader: Callable
    # of each text of an example: which of its images it is of; -1: of none
    right: tuple
    store: str  # where its images are
    parts: tuple = ("",)  # its files
    means: bool = False  # is the mean over its kinds told?
    least: int = 1  # not over kinds of fewer examples
    apart: tuple = ()  # nor over these


def choice_hits(s, right):
    """{name: (E,) bool} of s (E, T, I), the score of text t with image i, and right (T,), the image
    that a text is of, -1 of none. text: each image prefers its texts to all others; image: each
    text prefers its image; group: both. Of one image: accuracy. A tie is wrong.

    Chance with two texts and two images: 25, 25, 16.67 percent.       Thrush et al. 2022
    """
    right = np.asarray(right)
    own = right[:, None] == np.arange(s.shape[2])
    of, others = np.where(own, s, np.inf), np.where(own, -np.inf, s)
    text = (of.min(axis=1) > others.max(axis=1)).all(axis=1)
    if s.shape[2] == 1:
        return {"accuracy": text}
    image = (of.min(axis=2) > others.max(axis=2))[:, right >= 0].all(axis=1)
    return {"text": text, "image": image, "group": text & image}


def choice_index(run, name):
    """The Index of a benchmark of CHOICES, its examples' texts one after the other, and the note of
    each example. One whose image is missing is an error, or left out and counted.
    """
    need_kind(run, (Encoder, Albef), "score a caption with an image", "--loss cacr")
    row, stats = CHOICES[name], Counter()
    records = [r for part in row.parts for r in row.reader(run.data, part, stats)]
    store, T = run.vision.open(row.store), len(row.right)
    if run.settings.get("skip_missing"):
        found = store.finder()([record.image for record in records]) >= 0
        whole = found.reshape(-1, T).all(axis=1).repeat(T)
        stats["examples without a picture left out"] = (~whole).sum() // T
        records = [record for record, keep in zip(records, whole) if keep]
    for what, n in stats.items():
        if n and is_main():
            print(f"{name}: {n:,} {what}", file=sys.stderr)
    layout = "albef" if run.is_albef else "bert"
    index = make_index(records, store, run.tokenizer, name=name, layout=layout)
    return index, [record.note for record in records[::T]]


def choice_pairs(run, name, head=""):
    """The Index, each example's note, and (E, T, I): the scores of its texts by its images. All
    processes call it together and share the examples out.
    """
    index, notes = choice_index(run, name)
    right = CHOICES[name].right
    # a text of each image
    first = [right.index(i) for i in range(max(right) + 1)]
    texts = np.arange(len(index)).reshape(len(notes), -1, 1)
    rows, images = np.broadcast_arrays(texts, index.image[texts[:, first, 0]][:, None])
    own, s = shared_out(np.arange(len(notes))), np.zeros(rows.shape, np.float32)
    what, how = (index, rows[own].ravel(), images[own].ravel()), {}
    how["progress"] = name if len(notes) > 1000 else None
    if run.is_albef:
        found = score_pairs_by_albef(run, *what, **how)
    else:
        how |= {"head": head or ranking_head(run), "autocast": run.autocast}
        found = score_pairs(run.model, *what, **how)
    for examples, scores in gathered((own, found)):
        s[examples] = scores.reshape(-1, *s.shape[1:])
    return index, notes, s


def choose(run, name, head=""):
    """{name/...: percent right} of a benchmark of CHOICES: choice_hits, each kind of example, and
    the mean over kinds where papers give that.
    """
    row, (_, notes, s) = CHOICES[name], choice_pairs(run, name, head)
    hits, kinds = choice_hits(s, row.right), {}
    whole = "group" if "group" in hits else "accuracy"
    for note, hit in zip(notes, hits[whole]):
        for kind, which in note.items():
            kinds.setdefault(kind, {}).setdefault(which, []).append(hit)
    score = {kind: 100 * np.mean([all(h) for h in of.values()]) for kind, of in kinds.items()}
    numbers = {k: 100 * hit.mean() for k, hit in hits.items()}
    counted = [k for k in kinds if len(kinds[k]) >= row.least and k not in row.apart]
    if row.means and counted:
        numbers["mean"] = np.mean([score[k] for k in counted])
    prefix = "group/" if whole == "group" else ""
    numbers |= {f"{prefix}{kind}": score[kind] for kind in sorted(score)}
    return {f"{name}/{k}": float(v) for k, v in numbers.items()}


def winoground(run, head=""):
    """Percent of Winoground's examples: text, image, group, and group by tag"""
    return choose(run, "winoground", head)


# ----------------------------------------------- readers of benchmarks that came after Winoground


def entries(path, what):
    """Yields (where, name, record) of a small JSON file: a list, or a record of named ones."""
    found = read_json(path, what)
    if not isinstance(found, (list, dict)):
        raise DataError(f"{path} is {found!r:.60}", f"a list or a record: {what}. {AGAIN}")
    for name, e in found.items() if isinstance(found, dict) else enumerate(found):
        yield f"{path}, entry {name}", str(name), e


@functools.lru_cache(1)
def coco_stems(data):
    """{COCO image id: file stem}; the images of 2017 are those of 2014 by other names"""
    stem = lambda image: Path(field(image, "filename", "Karpathy's COCO", str)).stem
    return {image["cocoid"]: stem(image) for image in karpathy_images(data, "coco")}


def coco_image(data, name, where):
    """The file stem in COCO 2014 of an image that ends in the same number"""
    number = re.search(r"(\d+)(\.jpg)?$", str(name))
    stem = coco_stems(str(data)).get(int(number[1])) if number else None
    if stem is None:
        wanted = "an image of coco/dataset_coco.json: its number, as in 000000085329.jpg"
        raise DataError(f"{where}: image {name!r:.60}", wanted)
    return stem


def sugarcrepe(data, part, stats, folder="sugarcrepe", texts=("caption", "negative_caption")):
    """SugarCrepe (Hsieh et al. 2023), on COCO; with two right captions SugarCrepe++."""
    for where, name, e in entries(Path(data) / folder / f"{part}.json", "SugarCrepe's captions"):
        image = coco_image(data, field(e, "filename", where, str), where)
        for text in texts:
            yield Record(image, field(e, text, where, str), f"{part}/{name}", note={part: name})


def valse(data, part, stats):
    """VALSE (Parcalabescu et al. 2022): captions and foils that two people of three told apart"""
    for where, name, e in entries(Path(data) / "valse" / f"{part}.json", "VALSE's foils"):
        if field(field(e, "mturk", where, dict), "caption", where, NUMBER) < 2:
            stats["foils left out that people did not agree on"] += 1
            continue
        image = Path(field(e, "image_file", where, str)).stem
        for text in ("caption", "foil"):
            yield Record(image, field(e, text, where, str), f"{part}/{name}", note={part: name})


def aro(data, part, stats):
    """ARO's relation or attribution (Yuksekgonul et al. 2023), each image cropped to its box:
    evaluate.py crops
    """
    path = Path(data) / "aro" / f"visual_genome_{part}.json"
    for where, name, e in entries(path, f"ARO's {part}"):
        corner = [field(e, f"bbox_{side}", where, NUMBER) for side in "xywh"]
        image = "_".join(map(str, (Path(field(e, "image_path", where, str)).stem, *corner)))
        if part == "relation":
            kind = field(e, "relation_name", where, str)
        else:
            kind = "_".join(map(str, field(e, "attributes", where, list)))
        for text in ("true_caption", "false_caption"):
            yield Record(image, field(e, text, where, str), name, note={kind: name})


def captions_to_choose(e, where, n):
    """A record's n texts, the right one first"""
    texts = field(e, "caption_options", where, list)
    if len(texts) != n or not all(isinstance(text, str) for text in texts):
        found = f"{where}: caption_options {texts!r:.80}"
        raise DataError(found, f"{n} texts, the right one first")
    return texts


def word_order(data, part, stats):
    """ARO's COCO or Flickr30k order: a caption and four shufflings of it. image: a file's name"""
    for where, name, e in entries(Path(data) / "aro" / f"{part}_order.json", "ARO's order"):
        image = Path(field(e, "image", where, str)).stem
        for text in captions_to_choose(e, where, 5):
            yield Record(image, text, name, note={})


def whatsup(data, part, stats):
    """What'sUp's controlled images (Kamath et al. 2023): four pictures of the same two things, as
    the files' names tell: mug_left_of_table.jpeg
    """
    for where, name, e in entries(Path(data) / "whatsup" / f"{part}.json", "What'sUp's images"):
        image = Path(field(e, "image_path", where, str)).stem
        if image.count("_") < 2:
            raise DataError(f"{where}: image {image}", "a name as mug_left_of_table.jpeg")
        first, how, *_, last = image.split("_")
        beside = how in ("left", "right")
        note = {how: name, "pair": (first, last, beside), "set": (first, last)}
        for text in captions_to_choose(e, where, 4):
            yield Record(image, text, name, note=note)


def whatsup_lists(data, part, stats):
    """What'sUp's questions of COCO and Visual Genome: [image id, right caption, wrong caption]"""
    for where, name, e in entries(Path(data) / "whatsup" / f"{part}.json", "What'sUp's lists"):
        if not isinstance(e, list) or [isinstance(x, str) for x in e[1:]] != [True, True]:
            raise DataError(f"{where}: {e!r:.80}", "[image id, right caption, wrong caption]")
        image = coco_image(data, e[0], where) if part.startswith("coco") else e[0]
        for text in e[1:]:
            yield Record(image, text, name, note={})


def colorswap(data, part, stats):
    """ColorSwap (Burapacheep et al. 2024)"""
    for where, name, e in entries(Path(data) / "colorswap" / "test.json", "ColorSwap's examples"):
        for i in (1, 2):
            image = Path(field(e, f"image_{i}", where, str)).stem
            yield Record(image, field(e, f"caption_{i}", where, str), name, note={})


def bivlc(data, part, stats):
    """BiVLC (Miranda et al. 2024): SugarCrepe's captions with an image for the wrong one too. Its
    rows with their two pictures saved as files and named
    """
    for where, name, e in entries(Path(data) / "bivlc" / "test.json", "BiVLC's rows"):
        note = {field(e, "type", where, str): name}
        for wrong in ("", "negative_"):
            image = Path(field(e, f"{wrong}image", where, str)).stem
            yield Record(image, field(e, f"{wrong}caption", where, str), name, note=note)


def crops(data):
    """Cut ARO's boxes out of the pictures in DATA/aro/images, into DATA/aro/crops."""
    folder, number = Path(data) / "aro", 0
    for part in ("relation", "attribution"):
        path = folder / f"visual_genome_{part}.json"
        for where, _, e in tqdm(entries(path, f"ARO's {part}"), desc=part, disable=None):
            x, y, w, h = (field(e, f"bbox_{side}", where, NUMBER) for side in "xywh")
            picture = folder / "images" / field(e, "image_path", where, str)
            out = folder / "crops" / f"{picture.stem}_{x}_{y}_{w}_{h}.png"
            if not out.exists():
                read_picture(picture).crop((x, y, x + w, y + h)).save(file := io.BytesIO(), "PNG")
                write_atomic(out, file.getvalue())
            number += 1
    return {"crops": number}


# ARO's relations that its mean is not over: few examples, or true both ways [authors' notebook]
NOT_IN_MEAN = """
adjusting, attached to, between, bigger than, biting, boarding, brushing, chewing, cleaning,
climbing, close to, coming from, coming out of, contain, crossing, dragging, draped over,
drinking, drinking from, driving, driving down, driving on, eating from, eating in, enclosing,
exiting, facing, filled with, floating in, floating on, flying, flying above, flying in, flying
over, flying through, full of, going down, going into, going through, grazing in, growing in,
growing on, guiding, hanging from, hanging in, hanging off, hanging over, higher than, holding
onto, hugging, in between, jumping off, jumping on, jumping over, kept in, larger than, leading,
leaning over, leaving, licking, longer than, looking in, looking into, looking out, looking over,
looking through, lying next to, lying on top of, making, mixed with, mounted on, moving, on the
back of, on the edge of, on the front of, on the other side of, opening, painted on, parked at,
parked beside, parked by, parked in, parked in front of, parked near, parked next to, perched on,
petting, piled on, playing, playing in, playing on, playing with, pouring, reaching for, reading,
reflected on, riding on, running in, running on, running through, seen through, sitting behind,
sitting beside, sitting by, sitting in front of, sitting near, sitting next to, sitting under,
skiing down, skiing on, sleeping in, sleeping on, smiling at, sniffing, splashing, sprinkled on,
stacked on, standing against, standing around, standing behind, standing beside, standing in front
of, standing near, standing next to, staring at, stuck in, surrounding, swimming in, swinging,
talking to, topped with, touching, traveling down, traveling on, tying, typing on, underneath,
wading in, waiting for, walking across, walking by, walking down, walking next to, walking
through, working in, working on, worn on, wrapped around, wrapped in, by, of, near, next to, with,
beside, on the side of, around
"""
NOT_IN_MEAN = " ".join(NOT_IN_MEAN.split()).split(", ")
# SugarCrepe's and VALSE's files
SUGARCREPE = "add_att add_obj replace_att replace_obj replace_rel swap_att swap_obj".split()
PHENOMENA = """
existence plurals counting-hard counting-small-quant counting-adversarial relations
action-replacement actant-swap coreference-standard coreference-hard foil-it
""".split()
FOIL, BOTH, OF_FOUR, OF_FIVE = (0, -1), (0, 1), (0, -1, -1, -1), (0, -1, -1, -1, -1)
TWO_RIGHT = "caption", "caption2", "negative_caption"
SUGARCREPE_PP = functools.partial(sugarcrepe, folder="sugarcrepe_pp", texts=TWO_RIGHT)
CHOICES = {
    "winoground": Choices(winoground_examples, BOTH, "winoground"),
    "sugarcrepe": Choices(sugarcrepe, FOIL, "coco", SUGARCREPE, means=True),
    "sugarcrepe-pp": Choices(SUGARCREPE_PP, (0, 0, -1), "coco", SUGARCREPE[2:], means=True),
    "valse": Choices(valse, FOIL, "valse", PHENOMENA, means=True),
    "aro-relation": Choices(aro, FOIL, "aro", ["relation"], means=True, apart=NOT_IN_MEAN),
    "aro-attribution": Choices(aro, FOIL, "aro", ["attribution"], means=True, least=25),
    "aro-coco-order": Choices(word_order, OF_FIVE, "coco", ["coco"]),
    "aro-flickr30k-order": Choices(word_order, OF_FIVE, "flickr30k", ["flickr30k"]),
    "whatsup-a": Choices(whatsup, OF_FOUR, "whatsup", ["controlled_images_dataset"]),
    "whatsup-b": Choices(whatsup, OF_FOUR, "whatsup", ["controlled_clevr_dataset"]),
    "whatsup-coco-one": Choices(whatsup_lists, FOIL, "coco", ["coco_qa_one_obj"]),
    "whatsup-coco-two": Choices(whatsup_lists, FOIL, "coco", ["coco_qa_two_obj"]),
    "whatsup-vg-one": Choices(whatsup_lists, FOIL, "vg", ["vg_qa_one_obj"]),
    "whatsup-vg-two": Choices(whatsup_lists, FOIL, "vg", ["vg_qa_two_obj"]),
    "colorswap": Choices(colorswap, BOTH, "colorswap"),
    "bivlc": Choices(bivlc, BOTH, "bivlc"),
}


def argmax_entropy(run, head=""):
    """Does it help if each word attends most to another region? Shannon entropy, in bits, of the
    regions that a caption's words attend to most, its mean over Winoground, and its correlation
    (Pearson's) with how clearly an example is right: the scores of its two matched pairs less those
    of the mismatched.                                                            CACR sec. 5.2
    """
    index, _, s = choice_pairs(run, "winoground", head)
    entropy = np.zeros(len(index))
    for captions, batch, P in word_to_region(run, index, np.arange(len(index))):
        for c, attention, real in zip(captions, P, batch["text_mask"]):
            # without [CLS] and [SEP]
            _, n = np.unique(attention[1 : real.sum() - 1].argmax(axis=1), return_counts=True)
            entropy[c] = -(n / n.sum() * np.log2(n / n.sum())).sum()
    margin = np.trace(s, axis1=1, axis2=2) - s[:, 0, 1] - s[:, 1, 0]
    r = np.corrcoef(entropy.reshape(-1, 2).mean(axis=1), margin)[0, 1]
    return {"entropy/bits": float(entropy.mean()), "entropy/correlation": float(r)}


def content_words(text_mask):
    """text_mask without [CLS] and [SEP]; a caption with no other word keeps them."""
    last = text_mask.sum(dim=1, keepdim=True) - 1
    place = torch.arange(text_mask.shape[1], device=text_mask.device)
    words = text_mask & (place > 0) & (place < last)
    return torch.where(words.any(dim=1, keepdim=True), words, text_mask)


def congruence(run):
    """Are the maps of a matched pair more congruent than of a mismatched one? CACR's loss of the
    last layer, in nats a pair, of Winoground's captions with either image, and in percent how often
    the own has less: chance 50. CACR sec. 3.1 argues from it. Flat maps fit everything.
    """
    index, _ = choice_index(run, "winoground")
    captions, found = np.arange(len(index)), np.zeros((2, len(index)))
    # pair by pair: cacr is the mean over pairs
    pair = torch.vmap(lambda *one: losses.cacr(*(x[None] for x in one)))
    # 2e + c belongs to image c of example e
    for kind, images in enumerate((index.image, index.image[captions ^ 1])):
        for places, batch in index.in_chunks(captions, images, 8192):
            x = to_device(batch, run.device)
            with evaluating(run.model), run.autocast():
                maps = [S.float().mean(dim=1) for S in run.model(**x, maps=(-1,)).maps[0]]
            nats = pair(*maps, content_words(x["text_mask"]), x["region_mask"])
            found[kind, places] = nats.cpu().numpy()
    matched, mismatched = found.mean(axis=1).tolist()
    numbers = {"congruence/matched": matched, "congruence/mismatched": mismatched}
    return numbers | {"congruence/matched_is_less": float(100 * (found[0] < found[1]).mean())}


def ranking_head(run):
    """Which score a run learned: "rank", or after pre-training alone "match"."""
    return "match" if run.settings.get("task") == "pretrain" else "rank"


def recall(scores, image_of_text):
    """R@1, 5, 10 in percent.

    scores (T, I): caption t with image i; image_of_text (T,): the column that is right
    text     an image hits if any of its own captions is among its k best
    image    a caption hits if its image is among its k best
    Ties go to the wrong one, so a constant score gets 0 and only a perfect ranker 100. (UNITER's
    and IAIS's code also counts row numbers as ranks in image retrieval and can pass 100.)
    """
    T, I = scores.shape
    own = scores[np.arange(T), image_of_text]  # (T,)
    # its own score is among those counted: less one
    rank_image = (scores >= own[:, None]).sum(axis=1) - 1  # (T,) wrong images before it
    best = np.full(I, -np.inf)
    # an unbuffered maximum: several captions write to one image
    np.maximum.at(best, image_of_text, own)  # (I,) an image's best own caption
    # (T, I) without own captions
    wrong = np.where(np.arange(I)[None] == image_of_text[:, None], -np.inf, scores)
    ranks = {"image": rank_image, "text": (wrong >= best).sum(axis=0)}
    return {
        f"{name}/r{k}": float(100 * (rank < k).mean())
        for name, rank in ranks.items()
        for k in (1, 5, 10)
    }


def recall_in_folds(scores, column, size=1000, n=5):
    """recall, mean over n consecutive folds of `size` images, each with its own captions"""
    folds = []
    for i in range(0, n * size, size):
        # a fold's captions compete with this fold's images alone
        rows = (column >= i) & (column < i + size)
        folds.append(recall(scores[rows][:, i : i + size], column[rows] - i))
    return {k: float(np.mean([fold[k] for fold in folds])) for k in folds[0]}


def retrieval(run, split="", dataset="", head="", keep=None, **scoring):
    """{"retrieval/image/r1": percent, ...} over all images and captions of Karpathy's split;
    scoring: see score_all. Flickr30k: the 1K protocol. COCO: 5K, and "retrieval/1k/...": the mean
    over five consecutive folds of 1,000 images.
    """
    split, dataset = split or "test", dataset or run.settings.get("dataset") or "flickr30k"
    need_kind(run, Encoder, "score a caption with an image", "--task retrieval")
    reader = functools.partial(karpathy_captions, dataset=dataset)
    index = run.index(reader, split, dataset, name=f"{dataset} {split}", skip_missing=False)
    I, column = len(index.images), np.searchsorted(index.images, index.image)
    scoring |= {"head": head or ranking_head(run), "autocast": run.autocast, "keep": keep}
    scores = score_all(run.model, index, progress=f"retrieval {dataset} {split}", **scoring)
    metrics = {f"retrieval/{k}": v for k, v in recall(scores, column).items()}
    metrics |= {"retrieval/images": I, "retrieval/captions": len(index)}
    # papers report both protocols
    if dataset == "coco" and I >= 5000:
        folds = recall_in_folds(scores, column)
        metrics |= {f"retrieval/1k/{k}": v for k, v in folds.items()}
    return metrics


# 3. Downstream tasks ----------------------------------------------------------------------------


def official_notes(run, task, split):
    """[(id, what the official evaluation needs to know)] of a split's examples, read again."""
    reader, stats = task.reader(run.settings), Counter()
    # what the official code needs of a question is not in the index: it is read again
    group = task.group(run.settings)
    for part in split.split("+"):
        for number, record in enumerate(reader(run.data, part, stats)):
            if number % group == 0:
                yield record


def evaluate_classes(run, task, split, submit=False, **scoring):
    """Accuracy in percent, the majority class's, and each class's: for tasks of one right class."""
    index = open_task(run, run.settings["task"], split)
    target, name = index.target_numbers(examples_of(index)), run.settings["task"]
    # an example without an answer is wrong, whatever is predicted
    hit = predict(run, task, index, **scoring) == target
    metrics = {"accuracy": 100 * hit.mean()}
    # what a model would get that has learned the labels' frequencies alone
    metrics["majority"] = 100 * np.bincount(target[target >= 0]).max() / len(target)
    for i, label in enumerate(run.sizes["answer_list"]):
        if (target == i).any():
            metrics[label] = 100 * hit[target == i].mean()
    return {f"{name}/{k}": float(v) for k, v in metrics.items()}, None


def examples_of(index):
    """All examples of an index"""
    return np.arange(len(index) // index.group)


def evaluate_nlvr(run, task, split, submit=False, **scoring):
    """NLVR v1, percent: all six orders of the boxes; as given; the majority's answer"""
    index = open_task(run, run.settings["task"], split)
    labels = index.target_numbers(examples_of(index))
    right = predict(run, task, index, **scoring) == labels
    majority = 100 * max(labels.mean(), 1 - labels.mean())
    # the first of six orders is the presentation as given
    metrics = {"accuracy": 100 * right.mean(), "accuracy/as_given": 100 * right[::6].mean()}
    return {f"nlvr/{k}": float(v) for k, v in (metrics | {"majority": majority}).items()}, None


def vqa_accuracy(answer, said):
    """0 ... 1: over the ten leave-one-out sets of nine people, the mean of min(1, people who said
    so / 3); official clean-up. The clean-up is left out where all ten said the same string, as the
    official evaluation does.
    """
    said = [x.replace("\n", " ").replace("\t", " ").strip() for x in (*said,)]
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    # the official code cleans up only where the ten do not agree
    if len(set(said)) > 1:
        said, answer = [normalise_answer(x) for x in said], normalise_answer(answer)
    # each person is left out once: min(1, others who said so / 3)
    same = [x == answer for x in said]
    return float(np.mean([min(1.0, (sum(same) - own) / 3) for own in same]))


def vqa_scores(answers, facts):
    """Percent of strings against data.Answers: all, by answer type, by question type"""
    each = np.array([vqa_accuracy(a, f.given) for a, f in zip(answers, facts)])
    metrics = {"accuracy": each.mean()}
    for kind in ("answer_type", "question_type"):
        names = np.array([getattr(f, kind) for f in facts])
        metrics |= {name: each[names == name].mean() for name in np.unique(names) if name}
    return {f"vqa/{k}": float(100 * v) for k, v in metrics.items()}


def evaluate_vqa(run, task, split, submit=False, **scoring):
    """Accuracy of the best answer, and "vqa/majority": of the answer that suits each type of
    question best. Also the rows of the submission file.
    """
    index = open_task(run, run.settings["task"], split)
    best = predict(run, task, index, **scoring)
    answers = {index.id(e): run.sizes["answer_list"][i] for e, i in enumerate(best)}
    rows = [{"question_id": int(q), "answer": a} for q, a in answers.items()]
    notes = [r for r in official_notes(run, task, split) if r.note and r.id in answers]
    metrics = {"vqa/unanswerable": float(len(answers) - len(notes))}
    if notes:
        facts, frequent = [r.note for r in notes], {}
        for fact in facts:
            given = frequent.setdefault(fact.question_type, Counter())
            given.update(normalise_answer(a) for a in fact.given)
        # the best answer that needs no image
        majority = {kind: given.most_common(1)[0][0] for kind, given in frequent.items()}
        metrics = vqa_scores([answers[r.id] for r in notes], facts) | metrics
        by_type = vqa_scores([majority[f.question_type] for f in facts], facts)
        metrics["vqa/majority"] = by_type["vqa/accuracy"]
    return metrics, rows


def evaluate_vcr(run, task, split, submit=False, **scoring):
    """Q->A, QA->R (given the right answer), Q->AR (both right); chance 25, 25, 6.25. For the
    leaderboard: annot_id, four answers, and four reasons given each answer, as probabilities.
    """
    # the server wants a rationale for each of the four answers, right or not
    parts, scores, hits = ("qa", "all" if submit else "qar"), {}, []
    for part in parts:
        group = 16 if part == "all" else 4
        reader = functools.partial(vcr_choices, parts=(part,))
        one = run.index(reader, split, task.store, group=group, name=f"VCR {split} {part}")
        scores[part] = predict(run, task, one, whole=True, **scoring)
        hits.append(scores[part].argmax(axis=1) == one.target_numbers(examples_of(one)))
        names = [one.id(row) for row in range(0, len(one), group)]
    if submit:
        head = ["annot_id", *(f"answer_{i}" for i in range(4))]
        head += [f"rationale_conditioned_on_a{i}_{j}" for i in range(4) for j in range(4)]
        answers = torch.from_numpy(scores["qa"]).softmax(-1).numpy()
        reasons = torch.from_numpy(scores["all"].reshape(-1, 4, 4)).softmax(-1).numpy()
        rows = [head]
        for name, a, r in zip(names, answers, reasons):
            rows.append([name.split("/")[0], *map(float, a), *map(float, r.ravel())])
        return {}, rows
    # Q->AR asks for both, the rationale given the right answer
    answer, reason = hits
    metrics = {"q_a": answer, "qa_r": reason, "q_ar": answer & reason}
    return {f"vcr/{k}": 100 * v.mean() for k, v in metrics.items()} | {"vcr/chance": 25.0}, None


def nlvr2_scores(answers, ids, labels):
    """Percent right, and consistency: of sentences whose pairs of images are all right"""
    # one sentence is asked about several pairs of images
    hit, groups = np.array([a == b for a, b in zip(answers, labels)]), {}
    for name, ok in zip(ids, hit):
        # split-set-pair-sentence: a sentence about several pairs of a set
        _, number, _, sentence = name.split("-")
        groups.setdefault((number, sentence), []).append(ok)
    return {
        "nlvr2/accuracy": float(100 * hit.mean()),
        "nlvr2/consistency": float(100 * np.mean([all(g) for g in groups.values()])),
    }


def evaluate_nlvr2(run, task, split, submit=False, **scoring):
    """Accuracy, consistency, majority; an example without features counts as wrong"""
    index = open_task(run, run.settings["task"], split)
    answers = predict(run, task, index, **scoring)
    ids = [index.id(row) for row in range(0, len(index), index.group)]
    target, metrics = index.target_numbers(examples_of(index)), {}
    if (target >= 0).all():
        metrics = nlvr2_scores(answers, ids, target)
        # an example without features is answered wrong, not left out
        missing = index.meta["counts"]["missing"] // index.group
        metrics["nlvr2/accuracy"] *= len(answers) / (len(answers) + missing)
        metrics["nlvr2/majority"] = float(100 * max(target.mean(), 1 - target.mean()))
    return metrics, [[name, str(bool(a))] for name, a in zip(ids, answers)]


def evaluate_referring(run, task, split, submit=False, **scoring):
    """Accuracy over sentences: the chosen region's box overlaps the truth by more than half;
    ".../chance": of any region at all. Of annotated ("gt") and detected ("det") regions.
    """
    metrics = {}
    for kind in ("gt", "det"):
        if not (Path(run.vision.regions) / f"refcoco_{kind}").exists():
            continue
        reader = task.reader(run.settings)
        index = run.index(reader, split, f"refcoco_{kind}", label=matching_region)
        best, store = predict(run, task, index, **scoring), index.store
        boxes, n = store.read(index.image, "boxes"), store.n_regions(index.image)
        boxes[..., 2:] -= boxes[..., :2]
        # any region that overlaps enough counts, not only the one trained on
        truth = np.asarray(index.arrays["boxes"])[:, None]
        overlap = box_overlap(boxes, truth) > 0.5  # (E, most regions)
        # boxes of zeros in padding
        overlap &= np.arange(boxes.shape[1])[None] < n[:, None]
        target = index.target_numbers(examples_of(index))
        metrics[f"re/{kind}/accuracy"] = 100 * overlap[np.arange(len(best)), best].mean()
        metrics[f"re/{kind}/chance"] = float(100 * (overlap.sum(1) / n).mean())
        metrics[f"re/{kind}/without_region"] = float((target == -1).sum())
    return metrics, None


def gqa_scores(questions, predictions, choices=None, scenes=None, attentions=None):
    """GQA's official scores in percent, over balanced questions; questions: {id: published
    record}, predictions: {id: answer}.

    accuracy                 exact strings; open (structural type query), binary (all others)
    validity, plausibility   the answer is among choices[id], if choices are given
    consistency              of each right question: which of what it entails is right too; the
                             mean of these
    distribution             chi-square of the predicted answers against the true ones, by global
                             group; less is better
    grounding                attention on the boxes of the objects that question and answer mention,
                             if attentions are given: {id: m x m map}, first index along x; summed
                             over the boxes, so it can pass 100 [official]
    structural, semantic, length, steps   accuracy of each kind, and its count
    Entailed questions need predictions too, balanced or not.
    """
    # the unbalanced ones serve consistency alone
    asked = {k: q for k, q in questions.items() if q["isBalanced"]}
    entailed = {e for q in asked.values() for e in q["entailed"] if e in questions}
    lacking = sorted((entailed | set(asked)) - set(predictions))
    if lacking:
        wanted = "all of the split's questions, those that others entail included"
        raise DataError(f"GQA: question {lacking[0]} has no prediction", wanted)
    hit = {k: predictions[k] == questions[k]["answer"] for k in predictions if k in questions}
    scores = {"accuracy": percent(hit[k] for k in asked)}
    for name, is_open in (("binary", False), ("open", True)):
        of = [k for k, q in asked.items() if (q["types"]["structural"] == "query") == is_open]
        scores[name] = percent(hit[k] for k in of)
    for name, key in (("validity", "valid"), ("plausibility", "plausible")) if choices else ():
        # what makes sense of such a question, right or not
        fits = (predictions[k] in choices_of(q, choices[k][key]) for k, q in asked.items())
        scores[name] = percent(fits)
    shares = []
    for k, q in asked.items():
        # only of questions that were answered right, and never of themselves
        follow = [hit[e] for e in q["entailed"] if e != k and e in hit]
        shares += [sum(follow) / len(follow)] if hit[k] and follow else []
    scores["consistency"] = percent(shares)
    scores["distribution"] = gqa_distribution(asked, predictions)
    if attentions is not None and scenes is not None:
        seen = [k for k in asked if k in attentions]
        scenes_of = {k: scenes.get(asked[k]["imageId"]) for k in seen}
        scores["grounding"] = percent(grounded(asked[k], attentions[k], scenes_of[k]) for k in seen)
    kinds = {
        "structural": lambda q: q["types"]["structural"],
        "semantic": lambda q: q["types"]["semantic"],
        "length": lambda q: len(q["question"].split()),
        "steps": gqa_steps,
    }
    for part, kind_of in kinds.items():
        for kind in sorted({kind_of(q) for q in asked.values()}, key=str):
            of = [hit[k] for k, q in asked.items() if kind_of(q) == kind]
            scores |= {f"{part}/{kind}": percent(of), f"{part}/{kind}/count": len(of)}
    return {f"gqa/{k}": v for k, v in scores.items()}


def percent(values):
    """100 times the mean, 0 of nothing"""
    values = list(values)
    return 100 * sum(values) / len(values) if values else 0.0


def choices_of(question, choices):
    """Answers that fit a question; of a common property these three [official]"""
    common = "Common" in (question["types"]["detailed"] or "")
    return ("color", "material", "shape") if common else choices


def gqa_steps(question):
    """How many steps of reasoning GQA counts"""
    skipped = "exist", "query: name", "choose name"
    steps = [f"{o['operation']}: {o['argument']}" for o in question["semantic"]]
    return sum(not any(x in step for x in skipped) for step in steps)


def gqa_distribution(asked, predictions):
    """Chi-square of predicted against true answers, mean over global groups by size, / 100"""
    groups = {}
    for k, q in asked.items():
        if q["groups"]["global"]:
            # a group: questions whose answers compete, such as all about a thing's colour
            gold, said = groups.setdefault(q["groups"]["global"], (Counter(), Counter()))
            gold[q["answer"]] += 1
            said[predictions[k]] += 1
    # large groups count more
    weights = [sum(gold.values()) for gold, _ in groups.values()]
    chi = [sum((said[a] - n) ** 2 / n for a, n in gold.items()) for gold, said in groups.values()]
    return sum(w * c for w, c in zip(weights, chi)) / max(sum(weights), 1) / 100


def grounded(question, attention, scene):
    """Attention (m, m), first index along x, on the boxes of the objects in question and full
    answer, summed over the boxes.
    """
    mentioned = [question["annotations"].get(part, {}) for part in ("question", "fullAnswer")]
    total, m = 0.0, len(attention)
    # a thing that both mention counts twice [official]
    for thing in (name for part in mentioned for name in part.values()):
        if scene and (b := scene["objects"].get(thing)):
            x = cell_overlap(b["x"] / scene["width"], (b["x"] + b["w"]) / scene["width"], m)
            y = cell_overlap(b["y"] / scene["height"], (b["y"] + b["h"]) / scene["height"], m)
            total += float((np.asarray(attention) * np.outer(x * m, y * m)).sum())
    return total


def cell_overlap(start, end, m):
    """(..., m) how much of each of m equal parts of [0, 1] lies between start and end (...)"""
    edges, start, end = np.arange(m + 1) / m, np.asarray(start)[..., None], np.asarray(end)
    return (np.minimum(end[..., None], edges[1:]) - np.maximum(start, edges[:-1])).clip(min=0)


def evaluate_gqa(run, task, split, submit=False, **scoring):
    """gqa_scores of a model over all questions of a split, and the rows of the submission file.
    grounding: where the split has scene graphs, of the [CLS] token's attention to the regions,
    shared out among the cells that each box covers.
    """
    index = open_task(run, run.settings["task"], split)
    # exact strings count in GQA, so the number becomes its answer at once
    best, names = predict(run, task, index, **scoring), run.sizes["answer_list"]
    predictions = {index.id(e): names[i] for e, i in enumerate(best)}
    rows = [{"questionId": k, "prediction": a} for k, a in predictions.items()]
    # a test split: only the server knows
    unanswered = int((index.arrays["answered"] == 0).sum())
    if unanswered:
        return {"gqa/unanswerable": float(unanswered)}, rows
    folder, tier, questions = Path(run.data) / "gqa", split.split("_")[0], {}
    for part in split.split("+"):
        questions |= {k: q for k, q in gqa_records(run.data, part) if k in predictions}
    paths = folder / f"eval/{tier}_choices.json", folder / f"{tier}_sceneGraphs.json"
    choices, scenes = (read_json(path, "GQA") if path.exists() else None for path in paths)
    attentions = None
    if scenes is not None:
        # maps are explicit attention: made only for the questions that are scored
        balanced = [e for e in range(len(index)) if questions[index.id(e)]["isBalanced"]]
        attentions = {}
        for examples, batch, P in word_to_region(run, index, shared_out(balanced)):
            for e, row, boxes in zip(examples, P[:, 0], batch["boxes"]):
                attentions[index.id(e)] = cell_map(row, boxes)
        attentions = dict(chain.from_iterable(part.items() for part in gathered(attentions)))
    metrics = gqa_scores(questions, predictions, choices, scenes, attentions)
    kept = {}
    for k, v in metrics.items():
        of_kind = k.startswith("gqa/structural") and not k.endswith("/count")
        if k.count("/") == 1 or of_kind:
            kept[k] = v
    return kept, rows


def cell_map(weights, boxes, m=7):
    """(m, m), first index along x: each region's weight spread evenly over its box in [0, 1]"""
    x, y = (cell_overlap(boxes[:, i], boxes[:, i + 2], m) for i in (0, 1))  # (N_V, m)
    # a region that covers many cells gives each of them less
    area = np.maximum(x.sum(1) * y.sum(1), 1e-9)
    return np.einsum("n, nx, ny -> xy", weights / area, x, y)


class Task(NamedTuple):
    """Everything that is said about one task, in one place."""

    reader: Callable = None  # (settings) -> reader of its records
    # region store, or (split) -> its name
    store: object = "coco"
    train: str = "train"
    validation: str = "val"
    # (settings) -> so many texts that follow each other are one example; do all of them count in
    # the batch's size
    group: Callable = lambda settings: 1
    count_choices: bool = True
    # (record, store, image) -> target, where it depends on the store
    label: Callable = None
    # number of its random numbers
    stream: int = 0
    # (settings) -> name in model.HEADS; which of the model's heads is asked; rows of the type table
    head: Callable = lambda settings: ""
    output: str = "task"
    type_rows: int = 2
    # (data) -> what its outputs are called, in order
    answers: Callable = lambda data: []
    # several answers may be right, each to a degree
    soft: bool = False
    # {name: (output, batch, margin) -> loss}; the first is the default
    losses: dict = {}
    # (output, batch, group) -> (E, choices): the highest is the prediction
    scores: Callable = lambda out, batch, group: out.scores
    # (run, task, split, submit, **scoring) -> (numbers, rows of the submission file or None)
    evaluate: Callable = evaluate_classes
    # file name ending of the test server's file
    submission: str = ""
    # a control without regions keeps their number: they are what is asked for
    keep_regions: bool = False
    # needs a detector's boxes; is of phrases instead of whole texts
    needs_boxes: bool = False
    learns_phrases: bool = False
    # new words behind the vocabulary; word pieces of an official checkpoint's texts
    words: list = []
    max_words: int = 60
    # data sets to choose from; the first is the default
    datasets: tuple = ("flickr30k", "coco")


@kept
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
        for a, where in vqa_annotations(data, split):
            count[normalise_answer(field(a, "multiple_choice_answer", where, str))] += 1
    return sorted(answer for answer, n in count.items() if n >= minimum)


@kept
def gqa_answers(data):
    """GQA's answers: trainval_label2ans.json if it is there, else every answer of the balanced
    train and val questions (1,842).
    """
    path = Path(data) / "gqa" / "trainval_label2ans.json"
    if exists(path):
        return read_json(path, "the list of answers")
    splits = (gqa_records(data, split) for split in ("train_balanced", "val_balanced"))
    return sorted({q["answer"] for records in splits for _, q in records})


@kept
def all_answers(data, minimum=9):
    """The answers of two-stream pre-training: lxmert/all_ans.json if it is there (9,500), else
    VQA's list, GQA's, and what Visual Genome's questions are answered with at least `minimum`
    times.
    """
    path = Path(data) / "lxmert" / "all_ans.json"
    if exists(path):
        return [field(a, "ans", path, str) for a in read_json(path, "LXMERT's answers")]
    count = Counter()
    for _, questions, where in vg_items(data, "question_answers", "qas"):
        count.update(vg_answer(q, where) for q in questions)
    frequent = (answer for answer, n in count.items() if n >= minimum)
    return sorted({*answer_list(data), *gqa_answers(data), *frequent})


def box_overlap(a, b):
    """Overlap over union of boxes x y w h, (..., 4) each. Right edge x + w - 1, an overlap of one
    pixel counts as none, areas are w h: UNITER's and ALBEF's evaluation code.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    corner = np.maximum(a[..., :2], b[..., :2])
    far = np.minimum(a[..., :2] + a[..., 2:] - 1, b[..., :2] + b[..., 2:] - 1)
    inter = np.where((far > corner).all(-1), (far - corner + 1).prod(-1), 0.0)
    return inter / (a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - inter)


def matching_region(record, store, image):
    """The region that overlaps the expression's box most, if by more than half; else -1"""
    boxes = store.read(np.array([image]), "boxes")[0]
    boxes[:, 2:] -= boxes[:, :2]
    overlap = box_overlap(boxes, record.boxes[0])
    return int(overlap.argmax()) if overlap.max() > 0.5 else -1


def soft_loss(out, batch, margin):
    """Each answer right or wrong by itself."""
    return losses.soft_answers(out.scores, batch["target"])


def class_loss(out, batch, margin):
    """One class is right."""
    return losses.classify(out.scores, batch["target"])


def entailment_loss(out, batch, margin):
    """BCE against one-hot targets [authors' code]; the paper has the cross-entropy."""
    # the target of the authors' code, where any label may be right by itself
    target = torch.nn.functional.one_hot(batch["target"], out.scores.shape[1]).float()
    return losses.soft_answers(out.scores, target)


def choice_loss(out, batch, margin):
    """VCR: four choices an example, each right or wrong by itself."""
    target = batch["target"]
    # one row a choice: wrong or right
    right = torch.arange(4, device=target.device) == target[:, None]
    return losses.classify(out.scores, right.flatten().long())


def region_scores(out, batch, group):
    """Referring expressions: (E, N_V), -inf at padded regions"""
    return out.scores.masked_fill(~batch["input"]["region_mask"], float("-inf"))


def region_loss(out, batch, margin):
    """Cross-entropy over the regions."""
    mask = batch["input"]["region_mask"]
    return losses.pick_region(out.scores, mask, batch["target"])


def region_rank_loss(out, batch, margin):
    """The right region above another one."""
    target = batch["target"]
    other = wrong_region(out.scores, batch["input"]["region_mask"], target)
    scores = [out.scores.gather(1, i[:, None])[:, 0] for i in (target, other)]
    return losses.ranking(torch.stack(scores, dim=1), margin)


def wrong_region(scores, region_mask, target, hard=0.3):
    """Another region of each row: the highest scored, or, 1 - hard, any [authors' code]"""
    scores = scores.detach().float()
    others = region_mask.scatter(1, target[:, None], False)
    # one region alone is its own rival
    others |= ~others.any(dim=1, keepdim=True) & region_mask
    is_hard = torch.rand(len(scores), 1, device=scores.device) < hard
    # a random number for each region: its argmax is a uniform draw
    u = torch.where(is_hard, scores, torch.rand_like(scores))
    return u.masked_fill(~others, float("-inf")).argmax(dim=1)


def nlvr2_rows(settings):
    """How NLVR2's two images meet: in one sequence, or as two rows."""
    return "triplet" if settings["nlvr2_head"] == "triplet" else "pair"


TASKS = {
    # what the loss, the batches and the benchmarks of these three are: train.py
    "retrieval": Task(),
    "pretrain": Task(type_rows=2),
    "grounding": Task(needs_boxes=True, learns_phrases=True),
    "vqa": Task(
        reader=lambda s: functools.partial(vqa_questions, answers=s["answer_list"]),
        train="train2014",
        validation="val2014",
        stream=8,
        head=lambda s: "answers",
        answers=answer_list,
        soft=True,
        losses={"bce": soft_loss},
        evaluate=evaluate_vqa,
        submission="json",
    ),
    "gqa": Task(
        reader=lambda s: functools.partial(gqa_questions, answers=s["answer_list"], pointers=False),
        # GQA's train and val images are Visual Genome's
        store=lambda split: "vg" if split.startswith(("train", "val")) else "gqa",
        train="train_balanced",
        validation="testdev_all",
        stream=14,
        head=lambda s: "answers",
        answers=gqa_answers,
        soft=True,
        losses={"bce": soft_loss},
        evaluate=evaluate_gqa,
        submission="json",
    ),
    "vcr": Task(
        reader=lambda s: functools.partial(vcr_choices, parts=("qa", "qar")),
        store="vcr",
        group=lambda s: 4,
        count_choices=False,
        stream=9,
        head=lambda s: "choice",
        type_rows=4,
        losses={"bce": choice_loss},
        scores=lambda out, batch, group: out.scores[:, 1].view(-1, group),
        evaluate=evaluate_vcr,
        submission="csv",
        needs_boxes=True,
        words=VCR_WORDS,
        max_words=220,
    ),
    "nlvr2": Task(
        reader=lambda s: functools.partial(nlvr2_pairs, rows=nlvr2_rows(s)),
        store="nlvr2",
        validation="dev",
        group=lambda s: 1 if nlvr2_rows(s) == "triplet" else 2,
        stream=10,
        head=lambda s: s["nlvr2_head"],
        type_rows=3,
        losses={"ce": class_loss},
        evaluate=evaluate_nlvr2,
        submission="csv",
    ),
    "ve": Task(
        reader=lambda s: entailment_pairs,
        store="flickr30k",
        validation="dev",
        stream=11,
        head=lambda s: "answers",
        answers=lambda data: list(ENTAILMENT),
        losses={"bce": entailment_loss, "ce": class_loss},
    ),
    "re": Task(
        reader=lambda s: functools.partial(referring_expressions, dataset=s["dataset"]),
        store="refcoco_gt",
        label=matching_region,
        stream=12,
        head=lambda s: s.get("head") or "region",
        losses={"ce": region_loss, "rank": region_rank_loss},
        scores=region_scores,
        evaluate=evaluate_referring,
        keep_regions=True,
        needs_boxes=True,
        datasets=tuple(REFER),
    ),
    "nlvr": Task(
        reader=lambda s: nlvr_presentations,
        store="nlvr",
        train="test",
        validation="dev",
        stream=7,
        output="match",
        losses={"ce": lambda out, batch, margin: losses.itm(out.match, batch["target"])},
        scores=lambda out, batch, group: out.match,
        evaluate=evaluate_nlvr,
    ),
}


# whose questions multi-task pre-training answers without fine-tuning [Kervadec sec. 6.2]
MULTITASK_ANSWERS = "gqa"


def open_task(run, name, split, **options):
    """The Index of a task's split."""
    task = TASKS[name]
    store = task.store(split) if callable(task.store) else task.store
    how = {"group": task.group(run.settings), "label": task.label, "name": f"{name} {split}"}
    return run.index(task.reader(run.settings), split, store, **how | options)


def downstream(run, split="", submit="", ablate=""):
    """The numbers of a fine-tuned model on a split of its own task (its validation split unless
    given); submit: file to write.
    """
    name = run.settings["task"]
    task = TASKS[name]
    split = split or task.validation
    numbers, rows = task.evaluate(run, task, split, bool(submit), ablate=ablate)
    numbers = {f"{k}{trained_note(run, split)}": v for k, v in numbers.items()}
    if submit and not task.submission:
        raise DataError(f"--submit: {name} has no test server's file")
    if submit:
        text = io.StringIO()
        if task.submission == "csv":
            csv.writer(text, lineterminator="\n").writerows(rows)
        else:
            json.dump(rows, text)
        if is_main():
            write_atomic(submit, text.getvalue())
        numbers["submission"] = submit
    return numbers


def trained_note(run, split):
    """How numbers are called whose examples were trained on (GQA's val_all holds val_balanced)"""
    trained_on = {part.split("_")[0] for part in (run.settings.get("split") or "").split("+")}
    return "_on_questions_trained_on" if split.split("_")[0] in trained_on else ""


# 4. Word to region ------------------------------------------------------------------------------


def word_to_region(run, index, captions, batch_tokens=8192):
    """What each word attends to among the regions, of many captions with their own images: yields
    (captions, batch as numpy, P).

    P (B, N_L, N_V): the softmax over regions summed over heads; two streams: of the last cross
    layer but one, the fourth of five (Kervadec sec. 7); single stream: of the last layer
    """
    # Kervadec et al. look at the fourth of five cross layers
    two_stream = isinstance(run.model, Lxmert) and len(run.model.cross_layers) > 1
    captions = np.asarray(captions)
    for places, batch in index.in_chunks(captions, index.image[captions], batch_tokens):
        x = to_device(batch, run.device)
        with evaluating(run.model), run.autocast():
            maps = run.model(**x, maps=(-2 if two_stream else -1,)).maps[0]
            # each block has a softmax of its own in two streams; in one stream it is taken here
            P = losses.masked_softmax(maps.S_LV, x["region_mask"]).sum(dim=1)
        arrays = {k: v.numpy() for k, v in batch.items() if isinstance(v, torch.Tensor)}
        yield captions[places], arrays, P.cpu().numpy()


def pointing(run, split=""):
    """Does the region that a pointed word attends to most lie where the word points (IoU 0.5; a
    patch: its middle inside the box)? In percent of the words for which some region does;
    "pointing/chance": of any region at all.
    """
    return pointing_scores(run, pointed_questions(run, split or "val_balanced"))


def pointing_scores(run, index):
    """pointing of these texts"""
    found = []
    pointed = shared_out(np.unique(pointed_captions(index)))
    for captions, batch, P in word_to_region(run, index, pointed):
        place, row, right = pointed_regions(index, captions, batch)
        strongest = P.reshape(-1, P.shape[-1])[place].argmax(axis=1)
        # words whose box no region covers tell nothing about attention
        possible = right.any(axis=1)
        chance = right.sum(1) / batch["region_mask"][row].sum(1)
        hit = right[np.arange(len(row)), strongest]
        found.append(np.stack([hit, chance])[:, possible])
    hits, chance = np.concatenate(list(chain.from_iterable(gathered(found))), axis=1)
    return {
        "pointing/accuracy": float(100 * hits.mean()),
        "pointing/chance": float(100 * chance.mean()),
    }


def pointed_captions(index):
    """(P,) the text of each pointed word"""
    return np.searchsorted(index.starts, index.arrays["pointed"][:, 0], side="right") - 1


def pointed_regions(index, captions, batch):
    """Of K pointed words: places in B*N_L, rows of the batch, (K, N_V) which regions are meant"""
    place, _, box, row = index.pointers(captions)
    # pointers are in pixels, regions in [0, 1]
    wh = np.tile(index.store.wh[index.image[captions]], 2)[row].astype(np.float32)
    box, regions = (box / wh)[:, None], np.asarray(batch["boxes"])[row]  # (K, 1, 4), (K, N_V, 4)
    # a patch is smaller than most boxes and would never reach an overlap of a half
    if index.store.has_names:
        iou = losses.box_iou(torch.from_numpy(box), torch.from_numpy(regions)).numpy()
        right = iou >= 0.5
    else:
        middle = (regions[..., :2] + regions[..., 2:]) / 2
        right = ((middle > box[..., :2]) & (middle < box[..., 2:])).all(-1)
    return place, row, right & np.asarray(batch["region_mask"])[row]


def object_weights(run, index, most=5000):
    """Of a pointed word's attention to regions, its object's share in percent: (layers,), mean over
    words and heads; and that of a word that attends to all alike. Words whose object no region
    covers do not count; most: of the first so many texts.
    """
    layers = getattr(run.model, "cross_layers", None) or run.model.layers
    captions, found = np.unique(pointed_captions(index))[:most], []
    for places, batch in index.in_chunks(captions, index.image[captions], 8192):
        place, row, right = pointed_regions(index, captions[places], batch)
        x = to_device(batch, run.device)
        with evaluating(run.model), run.autocast():
            maps = run.model(**x, maps=tuple(range(len(layers)))).maps
        shares = [right.sum(axis=1) / np.asarray(batch["region_mask"])[row].sum(axis=1)]
        for S in maps:
            P = losses.masked_softmax(S.S_LV, x["region_mask"]).mean(dim=1).flatten(0, 1)
            shares.append((P[place].float().cpu().numpy() * right).sum(axis=1))
        found.append(np.stack(shares)[:, right.any(axis=1)])
    alike, *by_layer = 100 * np.concatenate(found, axis=1).mean(axis=1)
    return np.array(by_layer), float(alike)


def pointed_questions(run, split):
    """GQA's questions of a split with scene graphs"""
    return run.index(gqa_questions, split, "vg", name=f"GQA {split}")


def multitask_benchmarks(run):
    """GQA without fine-tuning [Kervadec sec. 6.2], and what its words point at"""
    settings = run.settings | {"task": MULTITASK_ANSWERS, "answer_list": run.sizes["answer_list"]}
    metrics = downstream(run._replace(settings=settings))
    # test-dev has no scene graphs, so what words point at is known of val alone
    if (Path(run.data) / "gqa" / "val_sceneGraphs.json").exists():
        note = trained_note(run, "val_balanced")
        metrics |= {f"{name}{note}": value for name, value in pointing(run).items()}
    return metrics


# 5. Phrase grounding ----------------------------------------------------------------------------


def glove_file(data):
    """GloVe's text file in DATA/glove: 6B or 840B, of 300 numbers."""
    folder, names = Path(data) / "glove", ("glove.6B.300d.txt", "glove.840B.300d.txt")
    for name in names:
        if (folder / name).exists():
            return folder / name
    hint = "Fetch one from GloVe's page, nlp.stanford.edu/projects/glove."
    raise DataError(f"{folder} holds neither {' nor '.join(names)}", hint=hint)


def glove(path, words):
    """{word: (d,) float32} of those words that have a vector; of one that comes twice the first."""
    # one pass that keeps no other line: the file has gigabytes
    # bytes are compared, so that only lines that count are decoded
    wanted, found, d = {w.encode(): w for w in words}, {}, None
    path = need(path, "GloVe's vectors", "Fetch them from GloVe's page.")
    how = {"unit": "B", "unit_scale": True, "disable": None, "leave": False}
    with (
        open(path, "rb", buffering=1 << 22) as file,
        tqdm(total=path.stat().st_size, desc=path.name, **how) as bar,
    ):
        for number, line in enumerate(file, 1):
            blanks = line.count(b" ")
            d = d or blanks
            where = f"{path}, line {number}"
            if blanks < d:
                numbers = f"{blanks} numbers where the first line has {d}"
                raise DataError(f"{where}: {numbers}", hint=CUT_SHORT)
            if number % 50_000 == 0:
                bar.update(file.tell() - bar.n)
            word = wanted.get(line[: line.index(b" ")])
            # more blanks: a token of several words (840B has ". . ."), which nothing looks up
            if word is None or word in found or blanks > d:
                continue
            try:
                found[word] = np.array(line.split()[1:], np.float32)
            except ValueError:
                odd = f"{where}: {line[:60]!r}... holds something that is no number"
                raise DataError(odd, hint=AGAIN) from None
    return found


def glove_words(path):
    """All words of GloVe's file, in its order"""
    with open(path, "rb") as file:
        return [line.split(b" ", 1)[0].decode(errors="replace") for line in file]


class WordVectors:
    """MAF's tokenizer: words -> rows of a table that begins as their GloVe vectors.

    Row 0 is padding and row 1 unknown, both zero; then the words of `names` that GloVe has.
    data: the data tree; without it the names are taken as they are.
    """

    pad = 0

    def __init__(self, names, data=None):
        self.names, self.vectors = list(names), None
        if data:
            vectors = glove(glove_file(data), {w for name in names for w in name.split()})
            # a detector's name may be several words: the authors look it up whole and find nothing
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


class PhraseInput:
    """MAF's input: captions as phrases, and what the detector says of regions"""

    # the most certain of an image [authors' code]
    MAX_REGIONS = 100

    def __init__(self, data, index):
        self.index, self.words = index, {}
        for column, what in (("cls_id", "objects"), ("attr_id", "attributes")):
            rows = [index.tokenizer.ids.get(name, 1) for name in detector_names(data, what)]
            # an id of -1, unknown, finds the last
            self.words[column] = np.array([*rows, 1])

    def __call__(self, rows, images):
        """Input for the phrases (b, Q, W) of texts and the regions (B, K) of images, and masks."""
        index, store = self.index, self.index.store
        tokens, real = index.text(rows)
        number = index.text(rows, "types")[0]  # (b, N) of phrase
        # a word's place in its phrase: its own less that of the phrase's first word
        place = np.arange(real.shape[1]) - np.argmax(number[:, :, None] == number[:, None], axis=2)
        row = np.repeat(np.arange(len(rows)), real.sum(axis=1))
        shape = len(rows), number.max(initial=0) + 1, place[real].max(initial=0) + 1
        phrases = np.zeros(shape, np.int64)
        phrases[row, number[real], place[real]] = tokens[real]
        region_mask = length_mask(store.n_regions(images))[:, : self.MAX_REGIONS]
        most = region_mask.shape[1]
        x = {"phrases": phrases, "place": np.flatnonzero(region_mask)}
        x["features"] = store.read(images)[:, :most][region_mask]
        for name, column in (("labels", "cls_id"), ("attributes", "attr_id")):
            ids = store.read(images, column)[:, :most]
            check_names(ids, len(self.words[column]) - 1, column)
            x[name] = np.where(region_mask, self.words[column][ids], 0)
        masks = {"word_mask": phrases > 0, "phrase_mask": (phrases > 0).any(axis=2)}
        return as_tensors(masks | {"region_mask": region_mask}) | {"input": as_tensors(x)}


def best_box(scores, boxes):
    """The region of each phrase: the highest score; of equal ones the largest, then the first.
    scores (..., Q, K), boxes (..., K, 4) -> (..., Q)
    """
    # equal scores come from regions of one name: the largest is most often meant
    area = (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)[..., None, :].expand(scores.shape)
    return torch.where(scores == scores.amax(dim=-1, keepdim=True), area, -1.0).argmax(dim=-1)


def phrase_accuracy(overlap, kinds, threshold=0.5):
    """Percent of phrases whose box overlaps the truth by the threshold or more, overall and by
    kind; a phrase of two kinds counts in both.
    """
    hit = np.asarray(overlap) >= threshold
    metrics = {"accuracy": float(100 * hit.mean())}
    for kind in sorted({k for some in kinds for k in some}):
        metrics[f"accuracy/{kind}"] = float(100 * hit[[kind in some for some in kinds]].mean())
    return metrics


def table_5(phrase, labels, boxes, wh, vectors, rng):
    """What MAF's table 5 compares with, for one phrase: {method: box}.

    phrase list of words, labels: the regions' names, boxes (K, 4) pixels, wh of the image; vectors
    {word or name: (d,)}. Of equally good regions the largest is taken.
    """
    boxes = np.asarray(boxes, np.float32)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    # distance of a box's middle from the image's
    off = np.abs((boxes[:, :2] + boxes[:, 2:]) / 2 - np.asarray(wh) / 2).sum(axis=1)
    zero = np.zeros(len(next(iter(vectors.values()))))
    # a word without a vector is like nothing
    h = np.stack([vectors.get(w, zero) for w in phrase])
    l = np.stack([vectors.get(n, zero) for n in labels])

    def best(score):
        return boxes[np.lexsort([-area, -np.asarray(score, float)])[0]]

    def unit(x):
        return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-9)

    return {
        "random": boxes[rng.integers(len(boxes))],
        "center-obj": best(-off),
        "max-obj": best(area),
        "whole image": np.array([0, 0, *wh], np.float32),
        "direct match": best([n in phrase for n in labels]),
        "glove-max": best((unit(h) @ unit(l).T).max(axis=0)),
        "glove-avg": best(unit(h.mean(axis=0)) @ unit(l).T),
    }


def grounding_scores(run, batch, frozen):
    """{method: (b, Q, K)}: how well each phrase fits each region of its own image.

    maf: the trained model, MAF eq. (7); glove-att: its unsupervised rule, eq. (8), labels alone and
    GloVe as it was (frozen)
    """
    word_mask, region_mask = batch["word_mask"], batch["region_mask"]
    h, v = run.model(**batch["input"])
    p = losses.phrase_embedding(h, v, word_mask, region_mask)
    if run.settings["phrase_pooling"] == "average":
        p = (h * word_mask[..., None]).sum(-2) / word_mask.sum(-1, keepdim=True).clamp(min=1)
    # the rule learns nothing: GloVe's vectors as they came
    h, l = frozen[batch["input"]["phrases"]], frozen[batch["input"]["labels"]]
    embedded = {
        "maf": (run.model.project(p), v),
        "glove-att": (losses.phrase_embedding(h, l, word_mask, region_mask), l),
    }
    # -inf: padding is never the best region
    padding = ~region_mask[:, None]
    return {
        method: torch.einsum("bQd, bKd -> bQK", e, r).masked_fill(padding, float("-inf"))
        for method, (e, r) in embedded.items()
    }


def grounded_phrases(run, split, most=None, baselines=True, seed=0):
    """Every phrase that has a box: yields (caption's id and text, Phrase, truth (4,), {method: box
    (4,)}), pixels; most: of the first so many captions.

    methods of grounding_scores; upper bound: the region nearest to the truth, the union of the
    phrase's boxes; baselines: also all others of table 5
    """
    reader, words = entity_captions, run.tokenizer
    index = run.index(reader, split, "flickr30k", layout="phrases", name=f"Entities {split}")
    # images without features are left out of the index
    # boxes and kinds are not in the index, since training may not see them
    notes = {r.id: r.note for r in reader(run.data, split, Counter())}
    phrase_input = PhraseInput(run.data, index)
    store = index.store
    rng = np.random.default_rng(seed)
    names = [*detector_names(run.data, "objects"), ""]
    # of a checkpoint GloVe as it is now
    fixed = words.vectors
    fixed = run.model.word.weight.detach().cpu().numpy() if fixed is None else fixed
    vectors = {name: fixed[i] for name, i in words.ids.items()}
    frozen = torch.as_tensor(fixed, device=run.device)
    total = min(len(index), most or len(index))
    for start in tqdm(range(0, total, 64), desc=index.name, disable=None, leave=False):
        captions = np.arange(start, min(start + 64, total))
        images = index.image[captions]
        batch = to_device(phrase_input(captions, images), run.device)
        boxes = torch.from_numpy(store.read(images, "boxes")[:, : batch["region_mask"].shape[1]])
        with torch.inference_mode():
            scores = grounding_scores(run, batch, frozen)
        chosen = {method: best_box(A.cpu(), boxes) for method, A in scores.items()}
        for b, c in enumerate(captions):
            n = int(batch["region_mask"][b].sum())
            labels = [names[i] for i in store.read(images[b : b + 1], "cls_id")[0, :n]]
            text, phrases = notes[index.id(c)]
            for q in range(min(len(phrases), int(batch["phrase_mask"][b].sum()))):
                if not phrases[q].boxes:
                    continue
                truth, own = torch.tensor(phrases[q].boxes, dtype=torch.float32), boxes[b, :n]
                # several boxes of a phrase count as the box around all of them
                truth = torch.cat([truth[:, :2].amin(0), truth[:, 2:].amax(0)])
                boxes_by_method = {method: own[i[b, q]] for method, i in chosen.items()}
                boxes_by_method["upper bound"] = own[losses.box_iou(own, truth).argmax()]
                if baselines:
                    said = [w for x in phrases[q].words.split() if (w := strip_punctuation(x))]
                    how = said or [""], labels, own.numpy(), store.wh[images[b]], vectors, rng
                    boxes_by_method |= {m: torch.from_numpy(x) for m, x in table_5(*how).items()}
                yield (index.id(c), text), phrases[q], truth, boxes_by_method


def grounding(run, split=""):
    """Flickr30k Entities: accuracy at IoU 0.5, overall and by kind, of the trained model; overall
    of its unsupervised rule, of every baseline of MAF's table 5, and of the best that the regions
    allow; in percent of the phrases that have a box.
    """
    need_kind(run, Maf, "ground phrases", "--loss maf")
    rows, kinds = [], []
    for _, phrase, truth, boxes in grounded_phrases(run, split or "test"):
        rows.append({m: losses.box_iou(box, truth).item() for m, box in boxes.items()})
        kinds.append(phrase.kinds)
    if not rows:
        found = f"Flickr30k Entities {split}: no phrase has a box"
        raise DataError(found, hint="Check flickr30k_entities/Annotations.")
    metrics = phrase_accuracy([row["maf"] for row in rows], kinds) | {"phrases": len(rows)}
    for method in rows[0].keys() - {"maf"}:
        metrics[method] = phrase_accuracy([row[method] for row in rows], kinds)["accuracy"]
    return {f"grounding/{k}": v for k, v in metrics.items()}


# 6. Heat maps: where a text is, without boxes (AMC) ---------------------------------------------


def heat_map(model, batch):
    """Grad-CAM of matching, (b, patches) >= 0, no gradient, of picture_batch() or Index.batch()"""
    how = {}
    # Grad-CAM is a derivative, in evaluation too
    with torch.enable_grad():
        if isinstance(model, Albef):
            match, P = model(**batch, need_gradcam=True)
        else:
            out = model(**batch, heads=("match",), need_gradcam=True)
            match, (P, how["block_of"]) = out.match, out.gradcam
        score = match[:, 1].float()
        A = losses.gradcam(P, score, batch["text_mask"], create_graph=False, **how)
        return A.float().detach()


def at_size(A, size):
    """Heat maps (b, patches) at a picture's size: (b, height, width), bicubic [AMC's code]"""
    A, how = rearrange(A, "b (h w) -> b 1 h w", h=math.isqrt(A.shape[1])), {"mode": "bicubic"}
    return torch.nn.functional.interpolate(A, size[::-1], **how, align_corners=False)[:, 0]


def hottest(A):
    """(x, y) of a map's first maximum, row by row"""
    # argmax counts row by row
    y, x = divmod(int(A.argmax()), A.shape[1])
    return x, y


def best_box_by_heat(A, boxes):
    """The box, x y w h, that holds most heat for the square root of its area; corners are cut to
    whole pixels [AMC's code].
    """
    # heat left of and above each corner: a box's is a sum of four
    total = torch.nn.functional.pad(A.double().cumsum(0).cumsum(1), (1, 0, 1, 0)).cpu().numpy()
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1).astype(int)
    h, w = A.shape
    x1, y1, x2, y2 = corners.clip(0, [w, h, w, h]).T
    inside = total[y2, x2] - total[y1, x2] - total[y2, x1] + total[y1, x1]
    return int((inside / np.sqrt(np.maximum(boxes[:, 2] * boxes[:, 3], 1e-9))).argmax())


def heat_maps_of(run, records, store, batch_size=64, name="pointing"):
    """Yields (record, its picture's number, heat map at the picture's size) of each Record; texts
    of one size of picture go together.
    """
    model, how = run.model, {"layout": "albef" if run.is_albef else "bert", "name": name}
    index = make_index(records, store, run.tokenizer, run.settings.get("max_words", 60), **how)
    read = functools.partial(picture_batch, index) if run.is_albef else index.batch
    # maps are compared with boxes in pixels of the picture itself
    sizes = {i: store.size(i) for i in index.images.tolist()}
    n_words = index.n_words(np.arange(len(index)))
    # texts of one size of picture follow each other, since their maps are resized at once, and of
    # one picture, since it is read once
    key = lambda c: (sizes[int(index.image[c])], index.image[c], n_words[c])
    order = sorted(range(len(records)), key=key)
    was_training = model.training
    model.eval()
    bar = tqdm(total=len(order), desc=name, unit=" texts", disable=None, leave=False)
    while order:
        size = sizes[int(index.image[order[0]])]
        rows = np.array([c for c in order[:batch_size] if sizes[int(index.image[c])] == size])
        order = order[len(rows) :]
        batch = read(rows, index.image[rows])
        with run.autocast():
            A = heat_map(model, to_device(batch, run.device))
        for c, full in zip(rows, at_size(A, size)):
            yield records[c], int(index.image[c]), full
        bar.update(len(rows))
    bar.close()
    model.train(was_training)


def boxed_phrases(data, split):
    """Flickr30k Entities' phrases that have boxes: Records with boxes x y w h; note = the kinds."""
    for record in entity_captions(data, split, Counter()):
        for phrase in record.note[1]:
            if phrase.boxes:
                boxes = [(x1, y1, x2 - x1, y2 - y1) for x1, y1, x2, y2 in phrase.boxes]
                name = f"{record.id}/{phrase.chain}"
                yield Record(record.image, phrase.words, name, boxes=boxes, note=phrase.kinds)


POINTING_SETS = "flickr30k", "refcoco+", "referit"


def pointing_sets(data, sets):
    """{name: (region store, Records with boxes)} of those data sets that are in the tree."""
    data, records_by_set, stats = Path(data), {}, Counter()
    if "flickr30k" in sets and (data / "flickr30k_entities").exists():
        records_by_set["flickr30k"] = "flickr30k", list(boxed_phrases(data, "test"))
    if "refcoco+" in sets and (data / "refer" / "refcoco+").exists():
        for split in ("testA", "testB"):
            records = referring_expressions(data, split, stats, dataset="refcoco+")
            records_by_set[f"refcoco+/{split}"] = "coco", list(records)
    if "referit" in sets and (data / "refclef").exists():
        records_by_set["referit"] = "refclef", list(referit_expressions(data, "test_10k", stats))
    if not records_by_set:
        none = f"{data} has none of flickr30k_entities, refer/refcoco+, refclef"
        raise DataError(none, "at least one, to point at something.")
    return records_by_set


def pointing_games(run, sets=POINTING_SETS):
    """{"pointing/flickr30k": percent, ...}: is the hottest place strictly inside a box of what the
    text means?                                                                 AMC sec. 4.2, 4.3

    flickr30k   phrases of Entities' test split; .../people and so on: the eight kinds
    refcoco+    testA, testB; .../clean: images that Visual Genome does not share (AMC Table 4);
                .../boxes: Recall@1, the detector's box that holds most heat, IoU >= 0.5 with the
                truth (Table 5)
    referit     RefCLEF's test expressions
    .../chance  the share of the picture that the boxes cover
    """
    metrics, data = {}, Path(run.data)
    records = vg_images(data).values() if (data / "vg/image_data.json").exists() else ()
    shared = {image.get("coco_id") for image in records}
    folder = Path(run.settings["regions"]) / "refcoco_det"
    detected = RegionStore(folder) if folder.exists() else None
    find = detected.finder() if detected else None
    for name, (store, records) in pointing_sets(data, sets).items():
        hits, own = {}, shared_out(records)
        maps = heat_maps_of(run, own, run.vision.open(store), name=f"pointing, {name}")
        for record, image, A in maps:
            x, y = hottest(A)
            boxes = np.array(record.boxes, float)
            # strictly inside, as AMC's code has it
            in_x = (boxes[:, 0] < x) & (x < boxes[:, 0] + boxes[:, 2])
            in_y = (boxes[:, 1] < y) & (y < boxes[:, 1] + boxes[:, 3])
            hit, covered = bool((in_x & in_y).any()), np.zeros(A.shape, bool)
            # boxes may overlap: pixels are counted once
            for bx, by, bw, bh in boxes.astype(int):
                covered[by : by + bh, bx : bx + bw] = True
            scored = {"": hit, "/chance": covered.mean()}
            scored |= {f"/{kind}": hit for kind in record.note or ()}
            if name.startswith("refcoco+"):
                # photos that Visual Genome has too may have been trained on
                if int(record.image.split("_")[-1]) not in shared:
                    scored["/clean"] = hit
                at = find([record.image]) if detected else np.array([-1])
                if at[0] >= 0:
                    proposals = detected.read(at, "boxes")[0].astype(float)
                    proposals[:, 2:] -= proposals[:, :2]
                    # RefCOCO+'s own task: choose one of the detector's boxes
                    best = proposals[best_box_by_heat(A, proposals)]
                    scored["/boxes"] = box_overlap(best, boxes[0]) >= 0.5
            for key, value in scored.items():
                hits.setdefault(key, []).append(value)
        parts = gathered(hits)
        for key in chain.from_iterable(parts):
            values = list(chain.from_iterable(part.get(key, ()) for part in parts))
            metrics[f"pointing/{name}{key}"] = float(100 * np.mean(values))
    return metrics


# 7. Figures -------------------------------------------------------------------------------------

# Okabe and Ito's colours, distinct to all eyes
INK, STRONGEST, OTHERS = (40, 40, 40), (0, 158, 115), (213, 94, 0)
BLUE, YELLOW = (0, 114, 178), (240, 228, 66)
# cividis reads the same to all eyes
HEAT = [(0, 32, 77), (49, 68, 107), (102, 105, 112), (149, 143, 120), (202, 185, 105)]
HEAT = np.array([*HEAT, (255, 234, 70)], float)
PANEL = 240  # pixels of a panel's width


def find_picture(data, name, image_id):
    """The path of one picture of a store."""
    folders = picture_folders(data, name)
    for folder in folders:
        for suffix in (".jpg", ".png", ".jpeg"):
            if (folder / f"{image_id}{suffix}").exists():
                return folder / f"{image_id}{suffix}"
    found = f"the picture {image_id} is in none of {', '.join(map(str, folders))}"
    raise DataError(found, "a .png or .jpg. Figures need the pictures.")


def panel_of(picture):
    """A picture at a panel's width"""
    return picture.resize((PANEL, max(1, round(picture.height * PANEL / picture.width))))


def titled(panel, title):
    """A panel under its title"""
    out = Image.new("RGB", (panel.width, panel.height + 18), "white")
    out.paste(panel, (0, 18))
    ImageDraw.Draw(out).text((4, 2), title, fill=INK, font=ImageFont.load_default(12))
    return out


def grid(rows, titles):
    """Panels in rows, each row under its title."""
    heights = [max(p.height for p in row) + 24 for row in rows]
    width, y = max(sum(p.width + 6 for p in row) for row in rows), 0
    out = Image.new("RGB", (width, sum(heights)), "white")
    for row, title, height in zip(rows, titles, heights):
        ImageDraw.Draw(out).text((4, y + 4), title, fill=INK, font=ImageFont.load_default(14))
        for i, p in enumerate(row):
            out.paste(p, (sum(q.width + 6 for q in row[:i]), y + 22))
        y += height
    return out


def save_png(picture, path):
    """Write a picture, its folder too"""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def chart(title, series, low=None):
    """A panel of lines, {name: [(x, y)]}; of several, the last value beside each name"""
    panel = Image.new("RGB", (300, 170), "white")
    pen, (xs, ys) = ImageDraw.Draw(panel), np.array(sum(series.values(), []), float).T
    low, high = float(ys.min()) if low is None else low, float(ys.max())
    pen.line([(40, 30), (40, 150), (290, 150)], fill=INK)
    for k, (name, points) in enumerate(series.items()):
        x, y = np.array(points, float).T
        # a margin for the numbers at the left and below
        px = 40 + 250 * (x - xs.min()) / max(np.ptp(xs), 1)
        py = 150 - 115 * (y - low) / max(high - low, 1e-12)
        colour = (BLUE, OTHERS, STRONGEST, INK)[k % 4]
        pen.line(list(zip(px, py)), fill=colour, width=2)
        if len(series) > 1:
            place, text = (48, 148 - 12 * (len(series) - k)), f"{name}   {y[-1]:.3g}"
            pen.text(place, text, fill=colour, font=ImageFont.load_default(10))
    labels = ((2, 30), f"{high:.3g}", 10), ((2, 140), f"{low:.3g}", 10), ((44, 8), title, 13)
    for place, text, size in (*labels, ((270, 153), f"{int(xs.max())}", 10)):
        pen.text(place, text, fill=INK, font=ImageFont.load_default(size))
    return panel


def training_curve(log, out):
    """A panel for each number in a run's log.jsonl, over steps; the last value beside its name."""
    series = {}
    for line in Path(log).read_text().splitlines():
        record = json.loads(line)
        for name, value in record.items():
            if name not in ("step", "seconds_left", "pairs_per_s"):
                series.setdefault(name, []).append((record["step"], value))
    panels = [chart(f"{name}   {xy[-1][1]:.4g}", {name: xy}) for name, xy in series.items()]
    save_png(grid([panels[i : i + 3] for i in range(0, len(panels), 3)], [""] * len(panels)), out)


def object_figures(runs, out):
    """object_weights of GQA's validation questions, a line for each run; returns the paths."""
    run, series = next(iter(runs.values())), {}
    if not (Path(run.data) / "gqa").exists():
        return []
    index, path = pointed_questions(run, "val_balanced"), Path(out) / "objects.png"
    for name, one in runs.items():
        weights, alike = object_weights(one, index)
        series[name] = list(enumerate(weights, 1))
    series["all regions alike"] = [(1, alike), (len(weights), alike)]
    save_png(chart("a word's attention to its object, %", series, low=0.0), path)
    return [path]


def word_attention(run, index, caption, image):
    """What the last layer's words attend to, and what attends to them.

    returns  words (list of str), P_LV (words, N_V): a word's attention shared out among the boxes,
             P_VL (words, N_V): among which boxes the attention that a word gets is shared; mean
             over heads, rows sum to 1
    """
    batch = to_device(index.batch(np.array([caption]), np.array([image])), run.device)
    text_mask, region_mask = batch["text_mask"], batch["region_mask"]
    with evaluating(run.model):
        maps = run.model(**batch, maps=(-1,)).maps[0]
        P_LV = losses.block_softmax(maps.S_LV, region_mask)[0]
        if isinstance(run.model, Lxmert):
            # each block has a softmax of its own
            P_VL = losses.block_softmax(maps.S_VL, text_mask)[0].T
        else:
            P_VL = losses.joint_softmax(*maps, text_mask, region_mask)[2].mean(dim=1)[0].T
    pieces = [run.tokenizer.pieces[i] for i in batch["text"][0].tolist()]
    P_VL = P_VL / P_VL.sum(dim=1, keepdim=True)
    return pieces[1:-1], P_LV[1:-1].cpu().numpy(), P_VL[1:-1].cpu().numpy()


def draw_attention(picture, boxes, weights, title):
    """One panel: the picture paled, each box framed with a strength of its weight, the strongest in
    green (CACR fig. 4, 5).
    """
    # coloured boxes are lost on a picture of full contrast
    pale = Image.new("RGB", picture.size, "white")
    panel = panel_of(Image.blend(picture.convert("RGB"), pale, 0.35))
    pen, scale = ImageDraw.Draw(panel, "RGBA"), PANEL / picture.width
    # the strongest last, above the others
    for i in np.argsort(weights):
        colour = STRONGEST if i == weights.argmax() else OTHERS
        box = [float(x) * scale for x in boxes[i]]
        alpha = int(40 + 215 * weights[i] / max(weights.max(), 1e-9))
        pen.rectangle(box, outline=(*colour, alpha), width=3)
        number, corner = f"{100 * weights[i]:.0f}", (box[0] + 4, box[1] + 2)
        pen.text(corner, number, fill=(*colour, alpha), font=ImageFont.load_default(11))
    return titled(panel, title)


def pixel_boxes(store, image, picture):
    """(N_V, 4) of an image in pixels of this picture, also where the store has the unit square"""
    boxes = store.read(np.array([image]), "boxes")[0]
    return boxes / np.tile(store.wh[image], 2) * np.tile(picture.size, 2)


def attention_figure(runs, index, caption, picture, directions=("S_LV", "S_VL")):
    """Rows of panels, one for each run ({name: Run}) and direction; a panel shows a word's
    attention over the boxes of the caption's own image.
    """
    image, rows, titles = int(index.image[caption]), [], []
    boxes = pixel_boxes(index.store, image, picture)
    # words that name nothing
    skip = ("a", "the", "of", "to", "is", "and", ".")
    what = {"S_LV": "what the word attends to", "S_VL": "what attends to the word"}
    for name, run in runs.items():
        pieces, *maps = word_attention(run, index, caption, image)
        show = [i for i, word in enumerate(pieces) if word not in skip][:6]
        for direction, P in zip(("S_LV", "S_VL"), maps):
            if direction in directions:
                rows.append([draw_attention(picture, boxes, P[i], pieces[i]) for i in show])
                text = f"{index.decode(caption)!r}, {what[direction]}"
                titles.append(f"{name}: {text} ({direction}), percent")
    return grid(rows, titles)


def attention_figures(runs, out, n=8):
    """Attention figures of the first n captions of Winoground; returns the paths."""
    run = next(iter(runs.values()))
    index, _ = choice_index(run, "winoground")
    paths = []
    for c in range(min(n, len(index))):
        image_id = index.store.image_id(int(index.image[c]))
        picture = read_picture(find_picture(run.data, "winoground", image_id))
        paths.append(Path(out) / f"winoground_{c // 2}_{c % 2}.png")
        save_png(attention_figure(runs, index, c, picture), paths[-1])
    return paths


def head_figures(runs, out):
    """UNITER fig. 2: the attention of every head (columns) of every layer (rows) over the words and
    regions of Winoground's first caption, black where it is strongest; returns the paths.
    """
    paths = []
    for name, run in runs.items():
        index, _ = choice_index(run, "winoground")
        batch = to_device(index.batch(np.array([0]), index.image[:1]), run.device)
        layers, rows = range(len(getattr(run.model, "layers", ()))), []
        with evaluating(run.model):
            maps = run.model(**batch, maps=tuple(layers)).maps
        for S in maps:
            P = losses.joint_softmax(*S, batch["text_mask"], batch["region_mask"])
            whole = torch.cat([torch.cat(P[:2], dim=-1), torch.cat(P[2:], dim=-1)], dim=-2)[0]
            shade = 255 - 255 * whole / whole.amax(dim=(1, 2), keepdim=True)
            panels = [Image.fromarray(x) for x in shade.byte().cpu().numpy()]
            rows.append([panel.resize((96, 96), Image.NEAREST) for panel in panels])
        if rows:
            paths.append(Path(out) / f"heads_{name.replace(' ', '_')}.png")
            save_png(grid(rows, [f"{name}, layer {i + 1}" for i in layers]), paths[-1])
    return paths


def draw_heat(picture, A, boxes, title):
    """A panel: picture under its heat map, true boxes red, the hottest place a white ring"""
    A = A.clamp(min=0).cpu().numpy()
    # linear between the colours of the table
    level = (A / max(A.max(), 1e-9)) * (len(HEAT) - 1)
    low = level.astype(int).clip(max=len(HEAT) - 2)
    colour = HEAT[low] + (level - low)[..., None] * (HEAT[low + 1] - HEAT[low])
    panel = Image.blend(picture, Image.fromarray(colour.astype(np.uint8)), 0.55)
    pen, (x, y) = ImageDraw.Draw(panel), hottest(torch.from_numpy(A))
    for bx, by, bw, bh in boxes:
        corners = [bx, by, bx + bw, by + bh]
        pen.rectangle(corners, outline=OTHERS, width=max(2, panel.width // 120))
    r = max(4, panel.width // 60)
    pen.ellipse([x - r, y - r, x + r, y + r], outline="white", width=max(2, r // 3))
    return titled(panel_of(panel), title)


def heat_figures(runs, out, n=6):
    """AMC fig. 2-5: a picture of phrases with boxes, a row for each run, the first n captions of
    Flickr30k Entities' test split, and as many expressions of RefCOCO+'s; returns the paths.
    """
    data, chosen, paths = next(iter(runs.values())).data, {}, []
    for name, (store, records) in pointing_sets(data, ("flickr30k", "refcoco+")).items():
        by_image = {}
        for record in records if name != "refcoco+/testB" else ():
            if name != "flickr30k" or record.id.split("#")[1].startswith("0/"):
                by_image.setdefault((store, record.image), []).append(record)
        chosen |= dict(list(by_image.items())[:n])
    for (name, image), records in chosen.items():
        rows = []
        for run in runs.values():
            store, panels = run.vision.open(name), {}
            for record, at, A in heat_maps_of(run, records[:5], store):
                picture = read_picture(store.path(at))
                panels[record.id] = draw_heat(picture, A, record.boxes, record.text)
            rows.append([panels[record.id] for record in records[:5]])
        paths.append(Path(out) / f"heat_{name}_{image}.png")
        save_png(grid(rows, list(runs)), paths[-1])
    return paths


def map_figures(runs, out, n=4):
    """Kervadec fig. 4: for GQA validation questions and each run the cross layer's map, words by
    regions, its answer, and for each pointed word the picture with the boxes, the strongest in
    green; returns the paths.
    """
    run = next(iter(runs.values()))
    index, paths = pointed_questions(run, "val_balanced"), []
    rows_with_two, counts = np.unique(pointed_captions(index), return_counts=True)
    for number, caption in enumerate(rows_with_two[counts > 1][:n]):
        image, rows, titles = int(index.image[caption]), [], []
        picture = read_picture(find_picture(run.data, "vg", index.store.image_id(image)))
        boxes = pixel_boxes(index.store, image, picture)
        words = np.unique(index.pointers(np.array([caption]))[0])[:4]
        for name, one in runs.items():
            ((_, batch, P),) = word_to_region(one, index, [caption])
            pieces = [run.tokenizer.pieces[i] for i in batch["text"][0]]
            x = {k: torch.from_numpy(v).to(one.device) for k, v in batch.items()}
            answers, answer = one.sizes.get("answer_list"), ""
            if answers:
                with evaluating(one.model):
                    answer = answers[int(one.model(**x, heads=("task",)).scores.argmax())]
            panels = [map_panel(P[0], pieces)]
            for i in words:
                share = P[0, i] / P[0, i].sum()
                panels.append(draw_attention(picture, boxes, share, pieces[i]))
            rows.append(panels)
            titles.append(f"{name}: {index.decode(caption)!r} {answer}")
        paths.append(Path(out) / f"map_{number}.png")
        save_png(grid(rows, titles), paths[-1])
    return paths


def map_panel(P, words, cell=18):
    """The map as shades of blue: rows are words, columns regions by falling confidence."""
    panel = Image.new("RGB", (90 + cell * P.shape[1], cell * len(words)), "white")
    pen = ImageDraw.Draw(panel)
    for i, word in enumerate(words):
        pen.text((2, cell * i + 3), word, fill=INK, font=ImageFont.load_default(11))
        for j, weight in enumerate(P[i] / P.max()):
            corners = [90 + cell * j, cell * i, 88 + cell * (j + 1), cell * (i + 1) - 2]
            blue = tuple(int(255 + weight * (c - 255)) for c in (0, 80, 150))
            pen.rectangle(corners, fill=blue)
    return titled(panel, "regions")


def grounding_figures(runs, out, split="test", n=4):
    """MAF fig. 4, 5: a panel for each phrase of the first n captions: truth, trained and
    unsupervised prediction; returns the paths.
    """
    panels, paths, run = {}, [], next(iter(runs.values()))
    for caption, phrase, truth, boxes in grounded_phrases(run, split, n, baselines=False):
        picture = read_picture(find_picture(run.data, "flickr30k", caption[0].split("#")[0]))
        pen = ImageDraw.Draw(picture)
        trained, rule = boxes["maf"], boxes["glove-att"]
        drawn = (truth, OTHERS, 3), (rule, YELLOW, 0), (trained, BLUE, -3)
        for box, colour, grow in drawn:
            x1, y1, x2, y2 = box.tolist()
            left, top = x1 - grow, y1 - grow
            corners = [left, top, max(left, x2 + grow), max(top, y2 + grow)]
            pen.rectangle(corners, outline=colour, width=3)
        panels.setdefault(caption, []).append(titled(panel_of(picture), phrase.words))
    for i, ((_, text), row) in enumerate(panels.items()):
        paths.append(Path(out) / f"grounding_{i}.png")
        title = f"{text!r}: truth red, trained blue, unsupervised yellow"
        save_png(grid([row], [title]), paths[-1])
    return paths


PAGE = """<!doctype html>
<meta charset="utf-8">
<title>Attention, word by word</title>
<style>
body { font: 15px sans-serif; margin: 1.5em; color: #222 }
.runs { display: flex; gap: 2em }
.run { flex: 1; max-width: 480px }
.picture { position: relative }
.picture img, .picture canvas { width: 100%; display: block }
.picture canvas { position: absolute; inset: 0; height: 100%; opacity: 0.55 }
.box { position: absolute; box-sizing: border-box; border: 1px solid #888 }
.share { background: #fff; font-size: 12px; padding: 0 2px }
.word { display: inline-block; padding: 3px 4px; border-radius: 3px; cursor: default }
.on { outline: 3px solid #06c }
label { margin-right: 1.5em }
</style>
<h1>What words attend to, and regions</h1>
<p>Point at a word: the boxes show how its attention is shared out among the regions, in percent. At
a box: the words show how the region's attention is shared out among them.</p>
<p><button id="back">&larr;</button> <button id="next">&rarr;</button> <span id="number"></span>
<label>layer <input id="layer" type="range" min="0"> <span id="layer-says"></span></label>
<label>head <input id="head" type="range" min="0" value="0"> <span id="head-says"></span></label>
<label><input id="heat" type="checkbox"> heat map</label></p>
<div class="runs" id="runs"></div>
<script type="application/json" id="data">DATA</script>
<script>
const data = JSON.parse(document.getElementById("data").textContent);
const el = id => document.getElementById(id);
let at = 0;

// mean over heads for head 0, as the losses take it; else one head
function weights(run, direction, from) {
  const heads = run[direction][+el("layer").value], head = +el("head").value;
  const chosen = head ? [heads[head - 1]] : heads;
  return chosen[0][from].map((_, to) =>
    chosen.reduce((sum, map) => sum + map[from][to], 0) / chosen.length / 1000);
}

function clear() {
  document.querySelectorAll(".box, .word").forEach(x => {
    x.classList.remove("on");
    x.style.boxShadow = "";
    delete x.dataset.weight;
    if (x.className == "box") x.replaceChildren();
  });
}

// the i-th word or box of every run
function light(kind, i) {
  clear();
  const [direction, targets] = kind == ".word" ? ["S_LV", ".box"] : ["S_VL", ".word"];
  document.querySelectorAll(".run").forEach(panel => {
    const from = panel.querySelectorAll(kind)[i];
    if (!from) return;
    from.classList.add("on");
    const found = weights(panel.run, direction, i);
    panel.querySelectorAll(targets).forEach((x, i) => {
      x.dataset.weight = found[i];
      // a frame, as wide as the weight says: the picture keeps its colours
      x.style.boxShadow = `inset 0 0 0 ${16 * found[i]}px #ff8c00`;
      if (targets == ".box") add(x, "span", "share").textContent = Math.round(100 * found[i]);
    });
  });
}

function add(parent, tag, name) {
  const x = parent.appendChild(document.createElement(tag));
  x.className = name;
  return x;
}

function draw_heat(picture, heat) {
  const canvas = picture.appendChild(document.createElement("canvas"));
  canvas.width = heat[0].length;
  canvas.height = heat.length;
  const pen = canvas.getContext("2d");
  heat.forEach((row, y) => row.forEach((x, column) => {
    pen.fillStyle = `rgb(${255 * x / 1000}, ${200 * (x / 1000) ** 2}, ${90 * (1 - x / 1000)})`;
    pen.fillRect(column, y, 1, 1);
  }));
}

function draw_run(name, run, example) {
  const panel = add(el("runs"), "div", "run");
  panel.run = run;
  add(panel, "h3", "name").textContent = name;
  const words = add(panel, "p", "words"), picture = add(panel, "div", "picture");
  add(picture, "img", "photo").src = example.picture;
  if (run.heat && el("heat").checked) draw_heat(picture, run.heat);
  run.words.forEach((word, i) => {
    const x = add(words, "span", "word");
    x.textContent = word;
    x.onmouseenter = () => light(".word", i);
    x.onmouseleave = clear;
  });
  if (!run.words.length) words.textContent = example.text;
  run.boxes.forEach((box, i) => {
    const x = add(picture, "div", "box"), [x1, y1, x2, y2] = box.map(v => 100 * v);
    Object.assign(x.style, { left: x1 + "%", top: y1 + "%" });
    Object.assign(x.style, { width: x2 - x1 + "%", height: y2 - y1 + "%" });
    // a small box before the large one that it lies in
    x.style.zIndex = Math.round(10000 - (x2 - x1) * (y2 - y1));
    x.onmouseenter = () => light(".box", i);
    x.onmouseleave = clear;
  });
}

function draw() {
  const example = data[at], runs = Object.entries(example.runs);
  const most = of => Math.max(1, ...runs.map(([, run]) => of(run)));
  const layers = most(run => run.S_LV.length), heads = most(run => (run.S_LV[0] || []).length);
  el("layer").max = layers - 1;
  el("head").max = heads;
  el("number").textContent = `${at + 1} of ${data.length}`;
  el("layer-says").textContent = `${+el("layer").value + 1} of ${layers}`;
  el("head-says").textContent = +el("head").value ? `${el("head").value} of ${heads}` : "mean";
  el("runs").replaceChildren();
  runs.forEach(([name, run]) => draw_run(name, run, example));
}

el("back").onclick = () => { at = (at + data.length - 1) % data.length; draw(); };
el("next").onclick = () => { at = (at + 1) % data.length; draw(); };
for (const id of ["layer", "head", "heat"]) el(id).oninput = draw;
draw();
el("layer").value = el("layer").max;
draw();
</script>
"""


def thousandths(x):
    """Nested lists of whole numbers: a tensor in [0, 1] in a fifth of the letters"""
    return (1000 * x).round().int().tolist()


def page_of_run(run, store, record):
    """What PAGE shows of a run and one caption: words, boxes as shares of the picture, attention of
    every layer and head from words to regions and back, each shared out within its block; a heat
    map where the model learned them
    """
    found = {"words": [], "boxes": [], "heat": None, "S_LV": [], "S_VL": []}
    if run.is_albef or run.settings.get("triplets"):
        ((_, _, A),) = heat_maps_of(run, [record], store)
        A = torch.as_tensor(A)[None, None].float()
        A = torch.nn.functional.adaptive_avg_pool2d(losses.unit_range(A), 32)
        found["heat"] = thousandths(A[0, 0])
    if not run.is_albef:
        need_kind(run, Encoder, "have attention or heat maps of a caption", "--loss cacr")
        index = make_index([record], store, run.tokenizer, name="page")
        batch = to_device(index.batch(np.array([0]), index.image), run.device)
        blocks = getattr(run.model, "cross_layers", None) or run.model.layers
        with evaluating(run.model):
            maps = run.model(**batch, maps=tuple(range(len(blocks)))).maps
        found["words"] = [run.tokenizer.pieces[i] for i in batch["text"][0].tolist()]
        found["boxes"] = batch["boxes"][0, :, :4].cpu().double().numpy().round(4).tolist()
        for name, mask in (("S_LV", "region_mask"), ("S_VL", "text_mask")):
            found[name] = [
                thousandths(losses.masked_softmax(getattr(S, name), batch[mask])[0]) for S in maps
            ]
    return found


def attention_page(runs, out, n=12, most=2_500_000):
    """Write OUT/attention.html: the first n captions of Winoground, or as many as `most` letters
    hold, where pointing at a word lights the regions that it attends to, and pointing at a region
    the words; runs side by side. Without any outside address. Returns [its path].
    """
    run, examples, size = next(iter(runs.values())), [], 0
    stores = {name: each.vision.open("winoground") for name, each in runs.items()}
    for record in list(winoground_examples(run.data, "", Counter()))[:n]:
        picture = read_picture(find_picture(run.data, "winoground", record.image))
        picture.thumbnail((480, 480))
        picture.save(file := io.BytesIO(), "JPEG", quality=85)
        source = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
        example = {"text": record.text, "picture": source}
        shown = {name: page_of_run(each, stores[name], record) for name, each in runs.items()}
        # a text may hold what ends a script
        text = json.dumps(example | {"runs": shown}, separators=(",", ":"))
        examples.append(text.replace("<", "\\u003c"))
        size += len(text)
        # of a base model a caption is half a megabyte
        if size * (1 + 1 / len(examples)) > most:
            break
    path = Path(out) / "attention.html"
    write_atomic(path, PAGE.replace("DATA", f"[{','.join(examples)}]"))
    return [path]


def benchmarks_of(settings):
    """What a finished run is measured on and drawn as: ([benchmark], [figure function])."""
    if settings["loss"] == "maf":
        return [grounding], [grounding_figures]
    if settings["model"] == "albef" or settings["triplets"]:
        return [pointing_games], [heat_figures]
    if settings["pretrain"] == "multitask":
        return [multitask_benchmarks], [map_figures]
    ranked = settings["task"] == "retrieval"
    figures = [attention_figures, head_figures, object_figures]
    return [winoground] + [congruence] * ranked, figures * ranked


# 8. Pictures and features in ----------------------------------------------------------------------


class StoreWriter:
    """Writes a store image by image, beside its place; commit() puts it there whole.

    Restartable: every `every` images the files are flushed and what is done is noted in
    progress.json; names, sizes and counts go to rows.jsonl, a line an image, so that an image
    costs the same however many came before. A writer opened on the same place later cuts what
    lies behind the note, and `done` says how many images to skip.
    """

    def __init__(self, folder, columns, meta, every=256):
        self.folder, self.tmp = Path(folder), Path(f"{folder}.tmp")
        self.meta, self.every, self.files = meta, every, {}
        need_new(folder)
        self.tmp.mkdir(parents=True, exist_ok=True)
        sizes, self.spec = {"D_V": meta["features"], "C": meta.get("classes")}, {}
        for name in columns:
            dtype, shape = COLUMNS[name]
            self.spec[name] = np.dtype(dtype), tuple(sizes.get(s, s) for s in shape)
        note = self.tmp / "progress.json"
        state = json.loads(note.read_text()) if note.exists() else {}
        if state and (state["meta"] != meta or state["columns"] != list(columns)):
            found = f"{self.tmp} was begun from something else: {state['meta']}"
            raise DataError(found, str(meta), f"Delete {self.tmp} to start again.")
        self.done, self.rows = state.get("images", 0), state.get("rows", 0)
        mode = "r+b" if state else "w+b"
        for name, (dtype, shape) in self.spec.items():
            self.files[name] = open(self.tmp / f"{name}.npy", mode)
            start = self.write_header(name)
            self.files[name].seek(start + self.rows * dtype.itemsize * math.prod(shape))
            self.files[name].truncate()
        self.list = open(self.tmp / "rows.jsonl", mode)
        self.list.seek(state.get("list_bytes", 0))
        self.list.truncate()

    def write_header(self, name):
        """numpy's header, which leaves room for any number of rows, so that it can be written again
        at the end without moving them; returns where they begin.
        """
        (dtype, shape), file = self.spec[name], self.files[name]
        header = {"descr": dtype.str, "fortran_order": False, "shape": (self.rows, *shape)}
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header)
        return file.tell()

    def add(self, image_id, wh, **columns):
        """columns: one array (n, ...) for each column of the store"""
        n = len(columns["boxes"])
        for name, (dtype, shape) in self.spec.items():
            values, wanted = np.asarray(columns[name]), (n, *shape)
            if values.shape != wanted:
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
        ids, counts, *wh = zip(*map(json.loads, self.list)) if self.done else ((), (), (), ())
        self.list.close()
        offsets = np.cumsum([0, *counts], dtype=PER_IMAGE["offsets"])
        np.save(self.tmp / "offsets.npy", offsets)
        np.save(self.tmp / "wh.npy", np.array(wh, PER_IMAGE["wh"]).T)
        np.save(self.tmp / "ids.npy", np.array([name.encode() for name in ids], "S"))
        sums = {}
        for path in sorted(self.tmp.glob("*.npy")):
            with open(path, "rb") as file:
                sums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        meta = {**self.meta, "images": self.done, "regions": self.rows, "sha256": sums}
        write_atomic(self.tmp / "meta.json", json.dumps(meta, indent=1))
        (self.tmp / "progress.json").unlink(missing_ok=True)
        (self.tmp / "rows.jsonl").unlink()
        os.replace(self.tmp, self.folder)


def need_new(folder):
    """Nothing is written over."""
    if Path(folder).exists():
        hint = "a new place. Choose another --out, or delete it first."
        raise DataError(f"{folder} exists already", hint)


def decode(text, dtype, shape, where):
    """One base64 column of a TSV row."""
    try:
        array = np.frombuffer(base64.b64decode(text, validate=True), dtype)
        return array.reshape(shape)
    except ValueError as error:
        found = f"{where}: expected {np.dtype(dtype).name} {tuple(shape)}: {error}"
        raise DataError(found, hint=AGAIN) from None


def tsv_rows(path, skip=0):
    """Yields rows of an LXMERT (10 columns) or BUTD (6 columns) feature file: (image id, (w, h),
    columns); None for the first `skip`.
    """
    with open(path, encoding="ascii", errors="replace") as file:
        for number, line in enumerate(file, 1):
            row = line.rstrip("\n").split("\t")
            yield None if number <= skip else tsv_row(row, f"{path}, line {number}")


def tsv_row(cells, where):
    """One of tsv_rows"""
    if len(cells) not in (6, 10):
        found = f"{where} has {len(cells)} columns: wanted 10 (LXMERT) or 6 (bottom-up attention)"
        raise DataError(found, hint=CUT_SHORT)
    is_lxmert = len(cells) == 10
    try:
        h, w, n = (int(cells[i]) for i in ((1, 2, 7) if is_lxmert else (2, 1, 3)))
    except ValueError:
        found = f"image size or box count is no whole number: {cells[1:4]}"
        raise DataError(f"{where}: {found}", hint=AGAIN) from None
    # their width is whatever the file has: 2,048 of a ResNet, 4,096 of a VGG
    features = base64.b64decode(cells[-1]) if len(cells[-1]) % 4 == 0 else b""
    if n < 1 or not features or len(features) % (4 * n):
        found = f"{len(features):,} bytes of features for {n} boxes"
        raise DataError(f"{where} (image {cells[0]}): {found}", hint=AGAIN)
    columns = {"boxes": decode(cells[-2], "<f4", (n, 4), where).copy()}
    columns["features"] = np.frombuffer(features, "<f4").reshape(n, -1)
    names = ("cls_id", "cls_conf", "attr_id", "attr_conf") if is_lxmert else ()
    for i, name in enumerate(names, 3):
        columns[name] = decode(cells[i], "<i8" if name.endswith("id") else "<f4", (n,), where)
    return cells[0], (w, h), columns


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
            found = f"{path} cannot be read ({path.stat().st_size:,} bytes): {error}"
            wanted = "UNITER's npz with features, norm_bb, conf, soft_labels."
            raise DataError(found, wanted, CUT_SHORT) from None
        # given boxes are all kept, of detected ones the confident [authors' code]
        given = path.stem.startswith(("visual_grounding_", "vcr_gt_"))
        n = 100 if given else int(np.clip((conf > 0.2).sum(), 10, 100))
        name = uniter_image_id(path.stem)
        if given and name not in sizes:
            found = f"{path}: annotated boxes are compared with pixels; {name}'s size is unknown"
            raise DataError(found, "--images, the folder of the pictures")
        # unknown sizes: the boxes stay in the unit square
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
    store. Streams; may be killed and restarted. images: folder of the pictures, to read their sizes
    from (npz only; without it boxes stay relative and wh is 1 x 1)
    """
    paths = [need(s, "a .tsv file or a folder of .npz files", "Check the path.") for s in sources]
    sizes = picture_sizes(images) if images and any(p.is_dir() for p in paths) else {}
    first = next(source_rows(paths, sizes), None)
    if first is None:
        found = f"{paths[0]} holds no {'npz files' if paths[0].is_dir() else 'rows'}"
        raise DataError(found, "features to convert. Check the path.")
    columns = [name for name in COLUMNS if name in first[2]]
    meta = {"source": " ".join(map(str, paths)), "features": first[2]["features"].shape[1]}
    meta["classes"] = first[2]["cls_prob"].shape[1] if "cls_prob" in columns else None
    writer, num_clipped = StoreWriter(out, columns, meta), 0
    bar = tqdm(initial=writer.done, desc=f"pack {out}", unit=" images", disable=None)
    for packed in source_rows(paths, sizes, writer.done):
        if packed is None:
            continue
        image_id, (w, h), row = packed
        # float32 boxes of float arithmetic elsewhere may leave their image by a hair
        inside, where = row["boxes"].clip(0, [w, h, w, h]), f"{meta['source']}, image {image_id}"
        if not np.isfinite(row["boxes"]).all() or not np.isfinite(row["features"]).all():
            raise DataError(f"{where}: nan or inf in boxes or features", hint=AGAIN)
        moved = np.abs(inside - row["boxes"])
        if (inside[:, 2:] < inside[:, :2]).any() or moved.max() > max(w, h):
            box = f"{row['boxes'].tolist()[0]}"
            raise DataError(f"{where}: box with x2 < x1 or far outside its {w} x {h} image: {box}")
        num_clipped += int((moved > 0).any(axis=1).sum())
        writer.add(image_id, (w, h), **row | {"boxes": inside})
        bar.update()
    bar.close()
    writer.commit()
    regions = f"{writer.rows:,} regions of width {meta['features']}"
    print(f"{out}: {writer.done:,} images, {regions}, {num_clipped} boxes clipped to their image")


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


def score_photo(run, photo, text, out, detector="", regions=(36, 36), sides=(800, 1333)):
    """How well a sentence fits a photo, where each of its words attends to, and the figure:
    {"match", "rank" or nothing, "words": {word: [x1 y1 x2 y2]}, "figure"}. A model of regions needs
    a detector's weights; one of patches, and ALBEF, only the photo.
    """
    if isinstance(run.model, Maf):
        wanted = "  Wanted: a checkpoint of uniter, lxmert or albef"
        raise CheckpointError(f"MAF compares captions and does not score a single one\n{wanted}")
    if run.vision.regions and not detector:
        wanted = "--detector pytorch_model.bin of unc-nlp/frcnn-vg-finetuned; or a checkpoint"
        wanted = f"  Wanted: {wanted} trained with --vision patches"
        raise CheckpointError(f"this model reads a detector's regions\n{wanted}")
    photo, record = Path(photo), Record(Path(photo).stem, text, "photo")
    picture, figure = read_picture(photo), Path(out) / f"{photo.stem}.png"
    with tempfile.TemporaryDirectory() as folder:
        # a data tree of one picture
        # so that stores and readers are those of every other evaluation
        place = Path(folder) / "vg" / "VG_100K"
        place.mkdir(parents=True)
        shutil.copy(photo, place / photo.name)
        store = Path(folder) / "store"
        if run.vision.regions:
            # the last line of standard output is the result alone
            with contextlib.redirect_stdout(sys.stderr):
                extract(place, detector, store, regions, *sides)
            store = RegionStore(store)
        else:
            store = PatchStore(folder, "vg", run.vision.resolution, run.vision.patch)
        if run.is_albef:
            return score_photo_by_albef(run, record, store, picture, figure)
        index = make_index([record], store, run.tokenizer, run.settings.get("max_words", 60))
        one, scores = np.zeros(1, np.int64), {}
        for head in ("match", "rank"):
            scores[head] = float(score_pairs(run.model, index, one, index.image, head)[0])
        pieces, P, _ = word_attention(run, index, 0, 0)
        boxes = store.relative_boxes(one)[0] * np.tile(picture.size, 2)
        save_png(attention_figure({"": run}, index, 0, picture, ("S_LV",)), figure)
    words = {}
    for i, (word, row) in enumerate(zip(pieces, P)):
        words[f"{i} {word}"] = boxes[row.argmax()].round().tolist()
    match = 1 / (1 + float(np.exp(-scores["match"])))
    return {"match": match, "rank": scores["rank"], "figure": str(figure), "words": words}


def score_photo_by_albef(run, record, store, picture, figure):
    """score_photo of a model with heat maps: {"match", "hottest", "figure"}"""
    ((_, _, A),) = heat_maps_of(run, [record], store)
    index, one = make_index([record], store, run.tokenizer, layout="albef"), np.zeros(1, np.int64)
    odds = float(score_pairs_by_albef(run, index, one, one)[0])
    save_png(draw_heat(picture, A, [], record.text), figure)
    return {"match": 1 / (1 + math.exp(-odds)), "hottest": list(hottest(A)), "figure": str(figure)}


def list_pictures(folder):
    """The pictures of a folder and the folders inside it, one a name."""
    folder = need(folder, "a folder of pictures", "Check the path.")
    suffixes = (".jpg", ".jpeg", ".png")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes)
    twice = [name for name, n in Counter(p.stem for p in paths).items() if n > 1]
    if twice:
        found = f"{folder}: {len(twice):,} names stand for several pictures, the first {twice[0]}"
        raise DataError(found, "one picture a name. Extract their folders one by one.")
    if not paths:
        raise DataError(f"{folder} holds no .jpg or .png", hint="Check the path.")
    return paths


def extract(images, detector, out, regions=(36, 36), shorter=800, longer=1333, batch=1, shard=64):
    """Pictures of a folder to a region store, through the bottom-up-attention detector
    (model.Detector). May be killed and restarted, with any number of processes (torchrun): what is
    finished, in shards of `shard` pictures, stays in OUT.parts, and the store is the same to the
    byte.

    detector: its weights; regions: at least and at most so many; shorter, longer: sides that
    pictures are resized to; batch: pictures of one size at a time (1: the same numbers on every
    machine). A picture that cannot be read is left out, counted, and listed in OUT/skipped.txt.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    # shards are dealt out by number, so any number of processes makes the same ones
    parts, paths = Path(f"{out}.parts"), list_pictures(images)
    need_new(out)
    # a place that is taken is told before the weights are read
    model = load_detector(detector)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    model.to(device)
    settings = {
        "detector": hashlib.sha256(Path(detector).read_bytes()).hexdigest()[:16],
        "regions": list(regions),
        "sides": [shorter, longer],
        "shard": shard,
        "batch": batch,
        "pictures": len(paths),
    }
    note, what = parts / "settings.json", "what the extraction was begun with"
    parts.mkdir(parents=True, exist_ok=True)
    if note.exists() and read_json(note, what) != settings:
        hint = "Delete it to start again, or repeat the first command."
        raise DataError(f"{parts} was begun with other settings or pictures", hint=hint)
    if rank == 0:  # one writer; the others' settings are of the same command line
        write_atomic(note, json.dumps(settings))
    shards = [paths[i : i + shard] for i in range(0, len(paths), shard)]
    # every process has its own shards and waits for nobody until the end
    own = range(rank, len(shards), world_size)
    todo = [k for k in own if not (parts / f"{k:06d}.npz").exists()]
    total, left = (sum(len(shards[k]) for k in some) for some in (own, todo))
    hidden = None if rank == 0 else True
    title = f"extract {Path(images).name}"
    with tqdm(total=total, initial=total - left, desc=title, unit=" images", disable=hidden) as bar:
        for k in todo:
            how = device, regions, shorter, longer, batch, bar
            save_shard(parts / f"{k:06d}.npz", extract_shard(model, shards[k], *how))
    if world_size > 1:
        # one waits for the slowest, for days where there are millions of pictures
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if rank == 0:
        # which detector made a store is part of it for good
        source = f"detector {settings['detector']}, {regions[0]} to {regions[1]} regions, "
        source += f"sides {shorter}, {longer}"
        merge_shards(parts, len(shards), out, {"source": source})


def read_by_size(paths, shorter, longer, bar):
    """{size for the detector: [(name, pixels)]} of pictures, and why others are left out."""
    pictures, skipped = {}, []
    for path in paths:
        try:
            pixels = torch.from_numpy(np.array(read_picture(path)))
            size = detector_size(*pixels.shape[:2], shorter, longer)
            if min(size) < 32:
                became = (
                    f"{pixels.shape[1]} x {pixels.shape[0]} pixels become {size[1]} x {size[0]}"
                )
                raise DataError(f"{path}: {became}, too narrow for the detector")
            # only pictures of one size can be in one batch
            pictures.setdefault(size, []).append((path.stem, pixels))
        except DataError as error:
            skipped.append(str(error).splitlines()[0])
            bar.update()
    return pictures, skipped


def extract_shard(model, paths, device, regions, shorter, longer, batch, bar):
    """One shard: {column: rows of all its pictures, "n": regions of each, "wh", "ids", "skipped":
    why not, "num_below": how many have fewer regions than asked for}
    """
    detected = {}
    pictures, skipped = read_by_size(paths, shorter, longer, bar)
    for (h, w), same_size in pictures.items():
        for start in range(0, len(same_size), batch):
            part = same_size[start : start + batch]
            resized = [resize_for_detector(x.to(device), shorter, longer) for _, x in part]
            raw = torch.tensor([x.shape[:2] for _, x in part], dtype=torch.float32, device=device)
            sizes = torch.tensor([[h, w]] * len(part), device=device)
            # a range of numbers: those that are confident [UNITER's rule]
            confidence = 0.2 if regions[0] < regions[1] else 0.0
            how = {"regions": regions, "confidence": confidence}
            detections = model(torch.stack(resized), sizes, raw / sizes, **how)
            for (name, pixels), seen in zip(part, detections):
                if not len(seen.boxes):
                    skipped.append(f"{name}: the detector found nothing")
                    continue
                # to the host at once: a shard's features would fill a GPU
                columns = {c: getattr(seen, c).cpu().numpy() for c in COLUMNS}
                detected[name] = (pixels.shape[1], pixels.shape[0]), columns, seen.threshold
            bar.update(len(part))
    # in the order of the files, whatever the order of sizes was
    ids, rows = [p.stem for p in paths if p.stem in detected], {}
    for c in COLUMNS if ids else ():
        rows[c] = np.concatenate([detected[i][1][c].astype(COLUMNS[c][0]) for i in ids])
    return rows | {
        "n": np.array([len(detected[i][1]["boxes"]) for i in ids], np.int64),
        "wh": np.array([detected[i][0] for i in ids], np.int64).reshape(-1, 2),
        "ids": np.array(ids, str),
        "skipped": np.array(skipped, str),
        "num_below": np.array(sum(detected[i][2] < 0 for i in ids)),
    }


def save_shard(path, arrays):
    """Write one shard beside its place, then rename"""
    beside = path.with_suffix(".tmp")
    try:
        with open(beside, "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        hint = "Free some space and start the same command again: finished shards are kept."
        raise DataError(f"{path} could not be written: {error}", hint=hint) from None


def merge_shards(parts, count, out, meta):
    """All shards, in order, into one store; then they are deleted."""
    writer, number, skipped, num_below = None, 0, [], 0
    for k in tqdm(range(count), desc=f"write {out}", disable=None):
        with np.load(parts / f"{k:06d}.npz", allow_pickle=False) as z:
            shard = {name: z[name] for name in z.files}
        skipped = skipped + shard["skipped"].tolist()
        num_below = num_below + int(shard["num_below"])
        ends = np.cumsum(shard["n"])
        for i, name in enumerate(shard["ids"].tolist()):
            if writer is None:
                sizes = {"features": shard["features"].shape[1]}
                sizes["classes"] = shard["cls_prob"].shape[1]
                writer = StoreWriter(out, list(COLUMNS), meta | sizes)
            # an earlier run may have been killed in the middle of writing
            if number >= writer.done:
                part, (w, h) = slice(ends[i] - shard["n"][i], ends[i]), shard["wh"][i]
                columns = {c: shard[c][part] for c in COLUMNS}
                # scaled back to the picture's own pixels a box may leave it by a rounding
                columns["boxes"] = columns["boxes"].clip(0, [w, h, w, h])
                writer.add(name, (w, h), **columns)
            number += 1
    if writer is None:
        found = f"none of the pictures could be read, for example {skipped[0]}"
        raise DataError(found, hint=f"{parts} holds the list.")
    write_atomic(writer.tmp / "skipped.txt", "".join(f"{line}\n" for line in skipped))
    writer.commit()
    shutil.rmtree(parts)
    print(
        f"{out}: {writer.done:,} images, {writer.rows:,} regions; {len(skipped):,} pictures left "
        f"out (skipped.txt); {num_below:,} with fewer regions than asked for"
    )


# 9. Command line --------------------------------------------------------------------------------


def load_run(path, data, regions="", size=None, official=None):
    """A Run of one of our training files, or of an official checkpoint of this size.

    official  the task it was fine-tuned for and what else train.py's settings say about it
    """
    # --size says that the file is not one of ours
    saved = None if size else read_checkpoint(path)
    settings = dict(saved.config) if saved else {"cased": True, **official}
    settings |= {"data": str(data), "regions": str(regions or Path(data) / "regions")}
    vision = vision_of(settings)
    sizes = saved.sizes if saved else settings
    # MAF's, whose official table has all of GloVe, in the file's order
    if "inputs" in sizes:
        words = WordVectors(sizes["words"] if saved else glove_words(glove_file(data)))
        shape = sizes.get("width", 300), sizes.get("features", 2048)
        model = Maf(len(words), *shape, sizes["inputs"])
        if saved:
            model.load_state_dict(saved.model)
        else:
            print(f"{path}: {load_pretrained(model, path)}", file=sys.stderr)
        return Run(model, words, settings, sizes, vision)
    task = TASKS[settings["task"]]
    # words that this model was given beyond the vocabulary file
    new_words = VCR_WORDS[: saved.sizes["new_words"]] if saved else task.words
    tokenizer = load_wordpiece(data, settings["cased"], new_words)
    if saved is None:
        answers = task.answers(data)
        sizes = {"vocab": len(tokenizer), "types": task.type_rows, "head": task.head(settings)}
        sizes |= {"answers": len(answers)}
        sizes |= {
            name: settings[name] for name in ("classes", "resolution", "patch") if name in settings
        }
        model = build(settings["model"], size, **sizes)
        print(f"{path}: {load_pretrained(model, path, len(new_words))}", file=sys.stderr)
        settings["answer_list"] = answers
        return Run(model, tokenizer, settings, sizes | {"answer_list": answers}, vision)
    if saved.sizes["vocab"] != len(tokenizer):
        trained = f"{path} was trained with {saved.sizes['vocab']:,} word pieces"
        here = f"the vocabulary in {data} has {len(tokenizer):,}"
        hint = "  Choose the --data tree it was trained on."
        raise CheckpointError(f"{trained}, {here}\n{hint}")
    sizes = {k: v for k, v in saved.sizes.items() if k not in ("model", "size", "new_words")}
    answers = sizes.pop("answer_list", [])
    model = build(saved.sizes["model"], saved.sizes["size"], **sizes)
    model.load_state_dict(saved.model)
    settings["answer_list"] = answers
    return Run(model, tokenizer, settings, saved.sizes, vision)


def load_wordpiece(data, cased, new_words=()):
    """BERT's tokenizer with the tree's vocabulary"""
    folder = "bert-base-cased" if cased else "bert-base-uncased"
    return WordPiece(Path(data) / folder / "vocab.txt", not cased, new_words)


def vision_of(settings):
    """Where a run of these settings finds what it sees."""
    if settings.get("vision") == "patches":
        return Vision(str(settings["data"]), "", settings["resolution"], settings["patch"])
    return Vision(str(settings["data"]), str(settings["regions"]))


def make_parser():
    """The command line"""
    tasks = [name for name, task in TASKS.items() if task.reader]
    splits = ", ".join(f"{name} {TASKS[name].validation}" for name in tasks)
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--task", choices=(*BENCHMARKS, *tasks), help=TASK_HELP)
    add("--ckpt", required=True, nargs="+", help=CKPT_HELP)
    add("--data", default="data/toy", help="the data tree (default: data/toy)")
    add("--regions", default="", help="folder of the region stores (default: DATA/regions)")
    add("--dataset", default="", help=DATASET_HELP)
    add("--split", default="", help=f"default: test for retrieval, else with answers: {splits}")
    add("--head", choices=("rank", "match"), help="which score: match is zero-shot retrieval")
    ablate = "a control: the model may not see them"
    add("--ablate", default="", choices=("", "text", "regions"), help=ablate)
    add("--submit", default="", help="write the test server's file here: .json or .csv")
    skip = "go on without examples whose image has no features; they are counted"
    add("--skip-missing", action="store_true", help=skip)
    add("--scores", help="retrieval's score matrix, to go on after a kill")
    add("--out", default="out/figures", help="where figures go (default: out/figures)")
    add = parser.add_argument_group("one photo").add_argument
    add("--image", help="how well --text fits it, and where its words attend to")
    add("--text", default="", help="the sentence")
    weights = "weights, with a model of regions: unc-nlp/frcnn-vg-finetuned's pytorch_model.bin"
    add("--detector", default="", help=weights)
    sides = "the shorter side, and the longer at most, are resized to these (default: 800 1333)"
    add("--sides", type=int, nargs=2, default=(800, 1333), help=sides)
    add = parser.add_argument_group("official checkpoints").add_argument
    add("--size", choices=tuple(SIZES), help="its size (UNITER: base or large; others: base)")
    add("--model", default="uniter", choices=tuple(OFFICIAL), help="albef: AMC's too")
    pairs = "triplet", "pair", "pair-mlp", "pair-biattn"
    add("--nlvr2-head", default="pair-biattn", choices=pairs)
    add("--mlp", action="store_true", help="RefCOCO+, whose head has two layers")
    return parser


TASK_HELP = (
    "choices: all of winoground to bivlc; pointing: do words attend where GQA's annotation "
    "points, or heat maps lie inside boxes; entropy: do words attend to different regions "
    "[CACR sec. 5.2]; grounding: MAF; figures: attention, heat maps or grounded phrases, training "
    "curve; page: attention to explore in a browser"
)
CKPT_HELP = (
    "a last.pt of train.py, or an official checkpoint (see below); several: figures compares them, "
    "a downstream task is judged by the mean of their scores"
)
DATASET_HELP = (
    "retrieval: flickr30k or coco; re: refcoco, refcoco+ or refcocog; pointing: flickr30k, "
    "refcoco+ or referit (default: the run's, or all)"
)


def command_parser(function):
    """The command line of a function of this file"""
    how = {"description": function.__doc__, "prog": f"evaluate.py {function.__name__}"}
    return argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter, **how)


def make_extract_parser():
    """The command line of evaluate.py extract"""
    parser = command_parser(extract)
    add = parser.add_argument
    add("--images", required=True, help="folder of .jpg and .png files, those inside it included")
    add("--detector", required=True, help="weights: unc-nlp/frcnn-vg-finetuned's pytorch_model.bin")
    add("--out", required=True, help="a new folder, e.g. DATA/regions/coco")
    add("--regions", default="36", help="so many of each picture, or from-to as in 10-100")
    add("--shorter", type=int, default=800, help="pixels of the shorter side")
    add("--longer", type=int, default=1333, help="pixels of the longer side at most")
    add("--batch", type=int, default=1, help="pictures of one size at a time")
    add("--shard", type=int, default=64, help="pictures between two savings: a kill loses so many")
    return parser


def make_pack_parser():
    """The command line of evaluate.py pack"""
    parser = command_parser(pack)
    files = "LXMERT's or bottom-up attention's .tsv files, or folders of UNITER's .npz files"
    parser.add_argument("source", nargs="+", help=files)
    parser.add_argument("--out", required=True, help="a new folder, e.g. DATA/regions/coco")
    sizes = "folder of the pictures, to read their sizes from (.npz does not hold them)"
    parser.add_argument("--images", help=sizes)
    return parser


def main(argv=None):
    """A benchmark, a photo, figures; or what they need made: pack, extract, crops"""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["extract"]:
            run_extract(make_extract_parser().parse_args(argv[1:]))
            return
        if argv[:1] == ["pack"]:
            args = make_pack_parser().parse_args(argv[1:])
            pack(args.source, args.out, args.images)
            return
        if argv[:1] == ["crops"]:
            parser = command_parser(crops)
            parser.add_argument("--data", default="data/toy", help="the data tree")
            print(json.dumps(crops(parser.parse_args(argv[1:]).data)))
            return
        args = make_parser().parse_args(argv)
        numbers = run_benchmark(args)
    except (DataError, CheckpointError, OSError) as error:
        fail("evaluate.py", error)
    digits = 4 if args.image else 2
    rounded = {k: round(v, digits) if isinstance(v, float) else v for k, v in numbers.items()}
    if is_main():
        print(json.dumps(rounded))


def run_extract(args):
    """evaluate.py extract"""
    if not re.fullmatch(r"\d+(-\d+)?", args.regions):
        raise DataError(f"--regions {args.regions}", "36, or 10-100")
    least, _, most = args.regions.partition("-")
    how = (int(least), int(most or least)), args.shorter, args.longer, args.batch, args.shard
    extract(args.images, args.detector, args.out, *how)


def run_benchmark(args):
    """The numbers of --task or --image"""
    name = args.task
    name = name if name in TASKS else "retrieval"
    official = {
        "model": args.model,
        "task": name,
        "nlvr2_head": args.nlvr2_head,
        "head": "region-mlp" if args.mlp else "",
        "max_words": TASKS[name].max_words,
        "dataset": args.dataset or TASKS[name].datasets[0],
        **OFFICIAL[args.model],
    }
    device, runs = join_processes(), {}
    for path in args.ckpt:
        run = load_run(path, args.data, args.regions, args.size or official.get("size"), official)
        run.settings["skip_missing"] = args.skip_missing
        # a run is called by its folder in figures
        called = Path(path).parent.name
        called = path if called in ("", *runs) else called
        # as train.py judges it
        autocast = autocast_for(device, run.settings.get("precision", "auto"))
        runs[called] = run._replace(model=run.model.to(device), autocast=autocast)
    run = next(iter(runs.values()))
    if args.image:
        if not args.text.strip():
            wanted = 'a sentence, as in --text "a dog left of a person"'
            raise DataError("--image without --text", wanted)
        how = args.image, args.text, args.out, args.detector
        return score_photo(run, *how, sides=args.sides)
    if not args.task:
        raise DataError("neither --task nor --image", "a benchmark, or a photo and a sentence")
    return BENCHMARKS.get(args.task, run_task)(runs, args)


def run_choices(name, runs, args):
    """A benchmark of CHOICES"""
    return choose(next(iter(runs.values())), name, args.head)


def run_all_choices(runs, args):
    """Every benchmark of CHOICES whose files are there; what is wrong with the others is said."""
    found = {}
    for name in CHOICES:
        try:
            found |= run_choices(name, runs, args)
        except DataError as error:
            if is_main():
                print(f"{name} left out: {error}", file=sys.stderr)
    if not found:
        raise DataError("no benchmark could be read", f"the files of one of {', '.join(CHOICES)}")
    return found


def run_pointing(runs, args):
    """Of heat maps, or of words"""
    run = next(iter(runs.values()))
    if run.is_albef or run.settings.get("triplets"):
        return pointing_games(run, [args.dataset] if args.dataset else POINTING_SETS)
    return pointing(run, args.split)


def run_retrieval(runs, args):
    """Retrieval, with its matrix beside the checkpoint"""
    run = next(iter(runs.values()))
    dataset, split = args.dataset or "flickr30k", args.split or "test"
    # another checkpoint, data tree or head has another matrix
    path, head = Path(args.ckpt[0]), args.head or ranking_head(run)
    mark = f"{path.resolve()} {path.stat().st_mtime_ns} {args.data} {head}"
    mark = hashlib.sha256(mark.encode()).hexdigest()[:8]
    keep = args.scores or path.parent / f"scores-{dataset}-{split}-{mark}.npy"
    return retrieval(run, split, dataset, head, keep)


def run_task(runs, args):
    """A downstream task of a checkpoint that was trained for it, or GQA right after pre-training;
    several checkpoints are an ensemble
    """
    run = next(iter(runs.values()))
    kinds = [(each.settings["task"], each.sizes) for each in runs.values()]
    if any(kind != kinds[0] for kind in kinds):
        # of other words or answers: their mean would say nothing
        hint = "  An ensemble is of one task, one data tree and one size."
        raise CheckpointError(f"{' '.join(args.ckpt)} are not models of one kind\n{hint}")
    if len(runs) > 1:
        run = run._replace(model=Ensemble([each.model for each in runs.values()]))
    trained = run.settings["task"]
    if trained == "pretrain" and run.settings.get("pretrain") == "multitask":
        trained = MULTITASK_ANSWERS
    if trained != args.task:
        found = f"{args.ckpt[0]} was trained for {run.settings['task']}, not for {args.task}"
        hint = f"  Train that first: python train.py --task {args.task}"
        raise CheckpointError(f"{found}\n{hint}")
    settings = run.settings | {"task": args.task}
    # RefCOCO+ of a model trained on RefCOCO, for example
    settings |= {"dataset": args.dataset} if args.dataset else {}
    return downstream(run._replace(settings=settings), args.split, args.submit, args.ablate)


def draw_figures(runs, args):
    """The figures of a run, and its training curve"""
    settings = {"loss": "", "model": "", "triplets": "", "pretrain": "", "task": "retrieval"}
    settings |= next(iter(runs.values())).settings
    _, draw = benchmarks_of(settings)
    draw = draw or [attention_figures, head_figures]
    paths = [p for figure in draw for p in figure(runs, args.out)]
    for path in args.ckpt:
        log = Path(path).parent / "log.jsonl"
        if log.exists():
            training_curve(log, Path(args.out) / f"curve_{Path(path).parent.name}.png")
    return {"figures": args.out, "count": len(paths)}


# --task: (runs, args) -> numbers; all other names are downstream tasks
BENCHMARKS = {
    **{name: functools.partial(run_choices, name) for name in CHOICES},
    "choices": run_all_choices,
    "entropy": lambda runs, args: argmax_entropy(next(iter(runs.values())), args.head),
    "congruence": lambda runs, args: congruence(next(iter(runs.values()))),
    "retrieval": run_retrieval,
    "pointing": run_pointing,
    "grounding": lambda runs, args: grounding(next(iter(runs.values())), args.split),
    "figures": draw_figures,
    "page": lambda runs, args: {"page": str(attention_page(runs, args.out)[0])},
}
# what official checkpoints are like, with their size where there is one; classes that LXMERT's
# detector knows come without the background
OFFICIAL = {
    "uniter": {"cased": True},
    "lxmert": {"size": "base", "cased": False, "classes": 1600},
    "albef": {"size": "base", "cased": False, "vision": "patches", "resolution": 256, "patch": 16},
    "maf": {"size": "base", "phrase_pooling": "attention", "inputs": ("label", "feature")},
}

if __name__ == "__main__":
    main()
