"""Train a word-region alignment model. One command, CPU to many GPUs:

    python train.py --loss cacr                                       toy data, two cores, minutes
    torchrun --nproc-per-node 8 train.py --loss cacr --recipe flickr30k --data DATA   the papers'

1 losses   2 command line   3 where it runs   4 data   5 model   6 objectives
7 optimiser and schedule   8 checkpoint   9 the loop   10 the end of a run   11 recipes
"""

import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import functools
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import evaluate
import losses

# data.py: errors and files, readers, batches
from data import INDEX_VERSION, DataError, check_names, detector_names, exists, kept, memory_mapped
from data import cc3m_captions, cc12m_captions, coco_corpus, own_captions, sbu_captions, vg_crops
from data import entity_captions, karpathy_captions, multitask_coco, multitask_vg, vcr_choices
from data import mirrored, vg_descriptions, vg_paraphrases, vg_triplets
from data import HARDEST, Batches, collate_negatives, mismatched_images, normalize_pixels
from data import strip_punctuation, write_atomic
from evaluate import TASKS, PhraseInput, Run, WordVectors, ablate_modality, all_answers
from evaluate import gathered, glove, glove_file, join_processes, load_wordpiece, open_task
from evaluate import autocast_for, content_words, log_odds, pair_scores, to_device, vision_of
from model import ALBEF_SIZES, SIZES, TWO_STREAM_LAYERS, CheckpointError, Maf, build
from model import init_rank_from_match, load_pretrained, read_checkpoint

# 1. Losses --------------------------------------------------------------------------------------
# Whoever has a new loss adds a function to losses.py and a row here.


class Loss(NamedTuple):
    """An alignment loss: a function of losses.py, and what it is given of the matched pairs.

    given   logits        blocks of the last layer's attention logits, mean over heads (B, N, M)
            layer_probs   the same blocks of the layer's own probabilities
            block_probs   each block's softmax over its own columns
            hidden        last hidden states: f(words, regions, text_mask, region_mask)
            heat          heat maps and boxes: f(A, M)
            pointers      f(alignment logits, soft targets, region_mask)
            phrases       f(similarity, own)
            scores        of two pairs with each other's images: f(scores)
            edits         of pairs and of their edited captions: f(matched, edited, kind, margins)
    blocks  of attention, the function's arguments in order; its masks follow.
            "LL LV VL VV": the function sees both sides: f(..., text_mask, region_mask).
            of "own cross back other": it is one side, called for language and for vision with the
            roles exchanged: f(..., own_mask, other_mask)
            pointers, "map": f(alignment logits, positive, text_mask, region_mask) instead
            heat, "paraphrase": f(A, A of the text in other words) instead
    weight  times --align-weight and the schedule
    recipe  what --loss alone runs
    """

    function: Callable
    given: str
    blocks: str = ""
    weight: float = 1.0
    recipe: str = "toy"


LOSSES = {
    # the paper gives no weight; with this 0.03 to 0.43 of the gradient in three toy worlds
    "cacr": Loss(losses.cacr_side, "logits", "own cross other", weight=0.3),
    "cacr-probs": Loss(losses.cacr_side, "layer_probs", "own cross other"),
    "iais": Loss(losses.iais_singular_side, "logits", "own cross other"),
    "iais-released": Loss(losses.iais_singular_released, "block_probs", "own cross other"),
    "iais-distributed": Loss(losses.iais_distributed_side, "block_probs", "own cross back"),
    "wra": Loss(losses.wra, "hidden"),
    "align": Loss(losses.word_object_alignment, "pointers", recipe="toy-align"),
    "maf": Loss(losses.maf, "phrases", recipe="toy-grounding"),
    "amc": Loss(losses.amc, "heat", recipe="toy-amc"),
    "amc-mean": Loss(losses.amc_mean, "heat", recipe="toy-amc"),
    "amc-max": Loss(losses.amc_max, "heat", recipe="toy-amc"),
    "amc-cosine": Loss(losses.amc_cosine, "heat", recipe="toy-amc"),
    # after the five papers
    "eqsim": Loss(losses.eqsim, "scores"),
    "hard-rank": Loss(losses.hard_rank, "edits"),
    "sparc": Loss(losses.sparc, "hidden"),
    "mdetr-align": Loss(losses.mdetr_align, "pointers", "map", recipe="toy-align"),
    "selfeq": Loss(losses.selfeq, "heat", "paraphrase", recipe="toy-amc"),
}
ATTENTION = "logits", "layer_probs", "block_probs"

# Pre-training corpora: whoever has another adds a reader to data.py and a row here.


class Corpus(NamedTuple):
    """A pre-training corpus."""

    reader: Callable
    store: str
    val_store: str = ""  # store, unless it is another one
    skip_missing: bool = False  # many of its pictures cannot be had any more
    task: str = ""  # a second stage: for this task, with its words and types, and alone


VCR_CORPUS = functools.partial(vcr_choices, parts=("qa", "qar"), choices=False)
CORPORA = {
    "coco": Corpus(coco_corpus, "coco"),
    "vg": Corpus(vg_descriptions, "vg"),
    "cc3m": Corpus(cc3m_captions, "cc3m_train", "cc3m_val", skip_missing=True),
    "sbu": Corpus(sbu_captions, "sbu", skip_missing=True),
    "cc12m": Corpus(cc12m_captions, "cc12m", skip_missing=True),
    "crops": Corpus(vg_crops, "vg_crops"),
    "own": Corpus(own_captions, "own"),
    "vcr": Corpus(VCR_CORPUS, "vcr", task="vcr"),
    # texts with boxes [AMC sec. 4.1]; comes alone, by --triplets
    "triplets": Corpus(vg_triplets, "vg"),
}

# 2. Command line --------------------------------------------------------------------------------


def opt(default, help, choices=None, group=""):
    """A setting; group: the heading of --help that it and those after it stand under."""
    return field(default=default, metadata={"help": help, "choices": choices, "group": group})


NLVR2_HEADS = "triplet", "pair", "pair-mlp", "pair-biattn"
ALIGN_SCHEDULES = "exp", "linear", "log", "constant"
SCHEDULES = "linear", "cosine", "linear-from-0", "noam", "steps", "constant"
# help that takes more than a line
PRETRAIN_HELP = (
    "tasks, joined by +: mlm, itm, mrfr, mrc, mrckl, wra (with itm) [UNITER table 2], or multitask "
    "[LXMERT, Kervadec sec. 4]; mlm:3 triples a weight"
)
SCHEDULE_HELP = (
    "linear to zero; cosine to a tenth [ALBEF's code]; linear-from-0 [LXMERT's code]; noam; steps; "
    "constant"
)
OPTIMIZER_HELP = "bertadam: no bias correction, decays all [LXMERT's code]"


@dataclass
class Config:
    """Every setting of a run, its default, and where the default is from."""

    recipe: str = opt("toy", "experiment: its settings replace these defaults", group="experiment")
    loss: str = opt("none", "alignment losses, joined by +: none, " + ", ".join(LOSSES))
    task: str = opt("retrieval", "what to learn; grounding: MAF", TASKS)
    model: str = opt("uniter", "single stream, two streams, ALBEF", ("uniter", "lxmert", "albef"))
    size: str = opt("base", "model size", tuple(SIZES))
    init: str = opt("", "start from checkpoints, joined by +, or a recipe to run first, or none")
    out: str = opt("", "folder of the run; out/ and what was typed unless given")
    seed: int = opt(0, "redraws weights, batches, masks and negatives")

    data: str = opt("data/toy", "the data tree; data/toy is made on first use", group="data")
    regions: str = opt("", "folder of the region stores; DATA/regions unless given")
    vision: str = opt("regions", "a detector's regions, or patches", ("regions", "patches"))
    resolution: int = opt(0, "patches: pixels a side; 0: 64 for tiny, toy, else 256 [AMC 4.1]")
    patch: int = opt(16, "patches: pixels of a patch's side [ALBEF]")
    dataset: str = opt("flickr30k", "retrieval: flickr30k, coco; re: refcoco, refcoco+, refcocog")
    split: str = opt("", "what to learn from, joined by +; vqa: vg adds Visual Genome's questions")
    corpora: str = opt("coco", f"pre-training data, by +: {', '.join(CORPORA)}; vg:3 triples")
    triplets: str = opt("", "texts with boxes instead: box, region, box+region [AMC sec. 4.1]")
    min_box_area: float = opt(0.08, "triplets: least share of the image [AMC sec. 4.1]")
    augment: str = opt("flip+jitter+grey", "albef: of pictures, or none [AMC sec. 4.1]")
    cased: bool = opt(True, "tokenize cased, as UNITER's checkpoints want")
    max_words: int = opt(60, "word pieces a text; the rest is cut [authors' code: left out]")
    skip_missing: bool = opt(False, "leave texts out whose image has no features; else an error")

    dropout: float = opt(0.1, "on hidden states and attention [BERT]", group="model")
    nlvr2_head: str = opt("pair-biattn", "how NLVR2's images meet [UNITER table 5]", NLVR2_HEADS)
    head: str = opt("", "re: of two layers, as released for RefCOCO+", ("", "region-mlp"))
    region_inputs: str = opt("label+feature", "MAF: of label, attribute, feature [MAF table 3]")
    phrase_pooling: str = opt("attention", "MAF [MAF table 3]", ("attention", "average"))
    init_w_f: str = opt("zero", "MAF: how W_f starts [MAF table 4]", ("zero", "xavier"))
    init_w_p: str = opt("identity", "MAF: how W_p starts [MAF table 4]", ("identity", "xavier"))
    momentum: float = opt(0.995, "albef: of the momentum model [ALBEF's code]")
    queue: int = opt(65536, "albef: pairs of the past that serve as negatives [ALBEF's code]")
    ablate: str = opt("", "a control that may not see one modality", ("", "text", "regions"))

    pretrain: str = opt("mlm+itm", PRETRAIN_HELP, group="losses")
    align_weight: float = opt(1.0, "final weight of the alignment losses [ours]; IAIS's code: 8")
    align_schedule: str = opt("exp", "how it comes in [CACR sec. 4, IAIS code]", ALIGN_SCHEDULES)
    align_layer: int = opt(-1, "layer whose attention is aligned: the last [CACR sec. 3.1]")
    wra_weight: float = opt(0.1, "weight of WRA in pre-training [authors' code]")
    task_loss: str = opt("", "ve: bce [authors' code] or ce [UNITER sec. A.2]; re: ce or rank")
    mask_rate: float = opt(0.15, "share of words or regions masked [UNITER sec. 3.2]")
    joint_masking: bool = opt(False, "mask words and regions of a pair at once [UNITER table 2]")
    answers_start: float = opt(0.5, "multitask: answers count after this share [Kervadec 6.3]")
    distill_weight: float = opt(0.4, "albef: of the momentum model's predictions, after warm-up")
    margin: float = opt(0.2, "of the ranking loss [authors' code]")
    negatives: int = opt(2, "mismatched pairs a matched one: 2 [UNITER sec. 4.1], 31 [CACR sec. 4]")
    candidates: int = opt(0, "train on the hardest of so many: 399 [IAIS code]; 0: random ones")
    mine_every: int = opt(0, "mine hard negatives every so many updates [UNITER sec. A.2]")
    mine_pool: int = opt(128, "random images scored for each caption in mining [UNITER sec. A.2]")
    alternate: bool = opt(False, "text anchors one batch, image anchors the next [IAIS code]")
    attend_padding: bool = opt(False, "MAF: padding takes part [authors' code]")

    steps: int = opt(5000, "updates", group="optimisation")
    batch_tokens: int = opt(10240, "words + regions a batch and GPU, padding too [UNITER A.2]")
    batch_size: int = opt(0, "examples a batch and GPU instead; maf, albef: always")
    gpus: int = opt(1, "GPUs that the batch is for; fewer processes take their parts in turn")
    accumulate: int = opt(1, "batches an update")
    lr: float = opt(5e-5, "peak learning rate [authors' code]")
    head_lr: float = opt(1.0, "times lr, of the downstream head [authors' code]")
    warmup: int = opt(500, "updates of linear warm-up; then as --schedule says")
    schedule: str = opt("linear", SCHEDULE_HELP, SCHEDULES)
    optimizer: str = opt("adamw", OPTIMIZER_HELP, ("adamw", "bertadam"))
    weight_decay: float = opt(0.01, "on matrices, not on biases and norms [UNITER sec. A.2]")
    beta2: float = opt(0.98, "AdamW's second beta [authors' code]; the first is 0.9")
    eps: float = opt(1e-6, "AdamW's epsilon [authors' code]")
    clip: float = opt(2.0, "largest gradient norm [authors' code]; 0: off")

    resume: bool = opt(False, "go on from the run in --out, bit for bit on a CPU", group="run")
    precision: str = opt("auto", "auto: bf16 where it is faster", ("auto", "fp32", "bf16"))
    compile: bool = opt(False, "torch.compile the model")
    workers: int = opt(-1, "loader processes; -1: 2 with a GPU, 0 without")
    save_every: int = opt(200, "updates between checkpoints")
    log_every: int = opt(10, "updates between log lines")
    eval_every: int = opt(200, "updates between validations")
    log_shares: bool = opt(False, "log each loss's share of the gradient's norm too")
    track: bool = opt(False, "score what a run ends with at its start and each validation too")
    keep_best: bool = opt(False, "keep the checkpoint of the best validation too, as best.pt")

    @property
    def is_pretraining(self):
        """Several self-supervised tasks instead of one?"""
        return self.task == "pretrain"

    @property
    def is_albef(self):
        """ALBEF's towers and its own objective?"""
        return self.model == "albef"

    @property
    def is_multitask(self):
        """All of LXMERT's and Kervadec's pre-training tasks in each step?"""
        return self.is_pretraining and "multitask" in pretrain_weights(self)


# settings that change no number
NO_NUMBERS = set("out resume workers save_every log_every log_shares track".split())
NO_NUMBERS |= set("data regions keep_best".split())


class UserError(DataError):
    """Something on the command line that cannot be: what was typed, what is wanted, what to do."""


def known(name, names, what):
    """The name, if it is one of these; else an error with the nearest."""
    if name not in names:
        # most often a typing error
        near = difflib.get_close_matches(name, names, 1, 0.4)
        guess = f"; did you mean {near[0]}?" if near else ""
        there_are = f"There are: {', '.join(names)}"
        raise UserError(f"{what} {name!r} is not known{guess}", hint=there_are)
    return name


def make_parser():
    """--help: all settings in groups"""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="recipes: " + ", ".join(RECIPES) + "\n(the last line of output is one JSON object)",
    )
    group = parser
    for f in dataclasses.fields(Config):
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        default = f.default if f.default != "" else "empty"
        text = f"{f.metadata['help']} (default: {default})".replace("%", "%%")
        how = {"default": argparse.SUPPRESS, "help": text}
        if f.type in (bool, "bool"):
            how["action"] = argparse.BooleanOptionalAction
        else:
            choices = f.metadata["choices"]
            how |= {"type": type(f.default), "choices": choices and list(choices)}
            how["metavar"] = None if choices else f.name.upper()
        group.add_argument("--" + f.name.replace("_", "-"), **how)
    return parser


def parse(argv):
    """Defaults, then the recipe, then what was typed."""
    parser = make_parser()
    typed, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        options = [o for action in parser._actions for o in action.option_strings]
        near = difflib.get_close_matches(name, options, 1)
        guess = f"; did you mean {near[0]}?" if near else "; see --help"
        raise UserError(f"{unknown[0]} is not an option{guess}")
    # from here on only what was typed: a recipe's settings give way to it
    typed = vars(typed)
    if "task" in typed:
        typed.setdefault("recipe", f"toy-{typed['task']}")
    for name in typed.get("loss", "").split("+"):
        row = LOSSES.get(name)
        if row and row.recipe != "toy":
            on_encoder = row.given == "heat" and typed.get("model", "albef") != "albef"
            typed.setdefault("recipe", "toy-amc-patches" if on_encoder else row.recipe)
    recipe = typed.pop("recipe", Config.recipe)
    return make_config(recipe, **typed)


def make_config(recipe, **changes):
    """The settings of a run: a recipe, changed, checked and completed."""
    own = RECIPES[known(recipe, RECIPES, "recipe")]
    cfg = Config(**{**own, **changes, "recipe": recipe})
    # settings that depend on others are filled in here, so that a checkpoint has them all
    cfg.regions = cfg.regions or f"{cfg.data}/regions"
    if cfg.vision == "patches":
        cfg.resolution = cfg.resolution or (64 if cfg.size in ("tiny", "toy") else 256)
        if cfg.init in ("toy-pretrain", "toy-short", "toy-boxes") and not cfg.is_pretraining:
            cfg.init = "toy-patches"
    cfg.init = "" if cfg.init == "none" else cfg.init.replace("{data}", cfg.data)
    if cfg.dataset == Config.dataset:
        cfg.dataset = TASKS[cfg.task].datasets[0]
    check_numbers(cfg)
    check_losses(cfg)
    check_model(cfg)
    # the folder's name says what is not as in the recipe, so that different runs differ
    usual, typed = Config(**own), ""
    for name, value in sorted(changes.items()):
        if name not in NO_NUMBERS | {"loss", "seed"} and value != getattr(usual, name):
            typed += f"-{name.replace('_', '-')}-{value}"
    typed = re.sub(r"[^-.:+0-9A-Za-z]+", "_", typed)
    cfg.out = cfg.out or f"out/{recipe}-{cfg.loss}{typed}-seed{cfg.seed}"
    return cfg


COUNTS = "steps batch_tokens gpus accumulate queue negatives mine_pool save_every log_every"
AMOUNTS = "seed batch_size warmup clip mine_every candidates resolution weight_decay align_weight"
RANGES = {
    "at least 1": (1, math.inf, COUNTS + " eval_every patch max_words"),
    "0 or more": (0, math.inf, AMOUNTS + " wra_weight distill_weight margin"),
    "more than 0": (1e-300, math.inf, "lr head_lr eps"),
    "0 to 1": (0, 1, "mask_rate answers_start momentum min_box_area"),
    "0 to below 1": (0, 1 - 1e-9, "dropout beta2"),
}


def check_numbers(cfg):
    """Numbers in their ranges"""
    for wanted, (low, high, names) in RANGES.items():
        for name in names.split():
            if not low <= getattr(cfg, name) <= high:
                raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: wanted {wanted}")
    if cfg.candidates and cfg.mine_every:
        both = "--candidates and --mine-every are two ways to find hard negatives"
        raise UserError(f"{both}: choose one, set the other to 0")
    if cfg.candidates and cfg.candidates < cfg.negatives:
        few = f"--candidates {cfg.candidates} cannot hold --negatives {cfg.negatives} hardest ones"
        raise UserError(f"{few}; 0 draws negatives at random")


def check_losses(cfg):
    """--loss, --pretrain, --triplets, --task-loss fit together."""
    given, tasks = given_to(cfg), pretrain_weights(cfg)
    corpus_weights(cfg)
    for part in cfg.triplets.split("+"):
        known(part, ["", "box", "region"], "--triplets")
    for part in cfg.region_inputs.split("+"):
        known(part, ["label", "attribute", "feature"], "--region-inputs")
    row = TASKS[cfg.task]
    # phrases are lists of words about boxes, without [CLS]: no other loss can read them
    where = f"--loss {cfg.loss} with --task {cfg.task}"
    if ("phrases" in given) != row.learns_phrases or "phrases" in given and len(given) > 1:
        wanted = "--loss maf, which chooses --task grounding by itself"
        raise UserError(f"{where}: maf learns phrases alone", wanted)
    if "pointers" in given and not cfg.is_multitask:
        wanted = "--recipe toy-align or kervadec, or --pretrain multitask"
        raise UserError(f"--loss {cfg.loss} needs texts whose words point at boxes", wanted)
    learned = {cfg.task, *(tasks if cfg.is_pretraining else ())}
    if {"scores", "edits"} & {*given} and not {"itm", "retrieval"} & learned:
        wanted = "--task retrieval, or itm in --pretrain"
        raise UserError(f"{where} has no score of whole pairs", wanted)
    pictures, heat = cfg.is_pretraining and cfg.vision == "patches", "heat" in given
    if cfg.triplets and not pictures or heat and not (cfg.triplets and "itm" in tasks):
        raise UserError(
            f"{where}, --triplets {cfg.triplets or 'empty'}, --vision {cfg.vision}: heat maps are "
            "of pictures, and teaching them needs texts with boxes",
            "--recipe toy-amc or amc (ALBEF), toy-amc-patches (--model uniter or lxmert), or "
            "--triplets with --task pretrain --vision patches, itm in --pretrain",
        )
    if cfg.task_loss not in ("", *row.losses):
        wanted = ", ".join(row.losses) or "none"
        raise UserError(f"--task-loss {cfg.task_loss} is not for --task {cfg.task}", wanted)
    if cfg.ablate and not row.reader:
        wanted = ", ".join(name for name, task in TASKS.items() if task.reader)
        raise UserError(f"--ablate {cfg.ablate} is not for --task {cfg.task}", wanted)


# of each encoder: sizes, pre-training tasks, what an alignment loss can be given
ON_STATES = *ATTENTION, "hidden", "heat", "scores", "edits"
ENCODERS = {
    "uniter": (SIZES, "mlm itm mrfr mrc mrckl wra", (*ON_STATES, "phrases")),
    "lxmert": (TWO_STREAM_LAYERS, "mlm itm mrfr wra multitask", (*ON_STATES, "pointers")),
    "albef": (ALBEF_SIZES, "mlm itm", ("hidden", "heat", "scores", "edits")),
}


def check_model(cfg):
    """The encoder takes this task, these losses and this size."""
    sizes, tasks, inputs = ENCODERS[cfg.model]
    known(cfg.size, list(sizes), f"--model {cfg.model} --size")
    for task in pretrain_weights(cfg):
        if task not in tasks.split():
            raise UserError(f"--pretrain {cfg.pretrain} is not for --model {cfg.model}", tasks)
    fits = not cfg.is_albef or cfg.vision == "patches" and cfg.is_pretraining
    if not fits or set(given_to(cfg)) - set(inputs):
        able = ", ".join(name for name, row in LOSSES.items() if row.given in inputs)
        typed = f"--vision {cfg.vision}, --task {cfg.task}, --loss {cfg.loss}"
        wanted = f"--loss none, {able}; albef: a recipe toy-albef, toy-amc, albef, amc"
        raise UserError(f"--model {cfg.model} with {typed}", wanted)
    for part in cfg.augment.split("+"):
        known(part, ["", "none", "flip", "jitter", "grey"], "--augment")
    if cfg.is_albef and cfg.batch_size * cfg.gpus < 2:
        raise UserError(f"--batch-size {cfg.batch_size}: one pair has no negative", "at least 2")
    if cfg.compile and (cfg.is_albef or "heat" in given_to(cfg)):
        raise UserError("--compile: heat maps need second derivatives, which compiled code lacks")
    # of two streams the cross layers
    layers = sizes[cfg.size][-1] if sizes is TWO_STREAM_LAYERS else sizes[cfg.size]["layers"]
    if not -layers <= cfg.align_layer <= -1:
        raise UserError(f"--align-layer {cfg.align_layer}: wanted -{layers} (first) to -1 (last)")
    row = TASKS[cfg.task]
    if cfg.vision == "patches" and row.needs_boxes:
        why = "it is about a detector's boxes"
        raise UserError(f"--vision patches is not for --task {cfg.task}: {why}")
    known(cfg.dataset, row.datasets, "--dataset")


def loss_names(cfg):
    """The losses of --loss"""
    names = [name for name in cfg.loss.split("+") if name != "none"]
    return [known(name, [*LOSSES, "none"], "--loss") for name in names]


def given_to(cfg):
    """What each loss of --loss is given"""
    return [LOSSES[name].given for name in loss_names(cfg)]


def read_weights(text, usual, option):
    """{name: weight} of "a+b:3"; usual = {name: weight where none is given}."""
    weights = {}
    for part in text.split("+"):
        name, _, weight = part.partition(":")
        known(name, list(usual), option)
        if not re.fullmatch(r"|(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", weight):
            wanted = f"wanted a name, or name:weight as in {name}:3"
            raise UserError(f"{option} {part}: {wanted}")
        weights[name] = float(weight or usual[name])
    return weights


def pretrain_weights(cfg):
    """{task: how often} from --pretrain; UNITER's own weights are the default [UNITER's code]."""
    usual = {"mlm": 2, "itm": 2, "mrfr": 1, "mrc": 1, "mrckl": 1, "wra": 0, "multitask": 1}
    return read_weights(cfg.pretrain, usual, "--pretrain")


def corpus_weights(cfg):
    """{corpus: how often} from --corpora, or --triplets alone."""
    if cfg.triplets:
        return {"triplets": 1.0}
    # ALBEF draws a corpus as often as it is large, unless a weight is given: 0 here
    weights = read_weights(cfg.corpora, dict.fromkeys(CORPORA, not cfg.is_albef), "--corpora")
    for name in weights:
        if CORPORA[name].task and len(weights) > 1:
            found = f"--corpora {name} is a second stage with a vocabulary of its own"
            raise UserError(found, f"{name} alone, with --init from the first stage")
    return weights


# 3. Where it runs -------------------------------------------------------------------------------


@dataclass
class Runtime:
    """Device, process and precision of this run."""

    device: torch.device
    rank: int
    world_size: int
    autocast: Callable  # bf16 where it is wanted

    @property
    def is_main(self):
        """Does this process print and write?"""
        return self.rank == 0

    def print_rank0(self, *words):
        """Print from one process"""
        if self.is_main:
            print(*words, flush=True)

    def barrier(self):
        """Wait for the other processes"""
        if self.world_size > 1:
            dist.barrier()


def keep_memory():
    """On a CPU let glibc keep what is freed: by default every large tensor is given back to the
    system and fetched, page by page and cleared, a moment later, a tenth of a UNITER-base step
    (tests/bench.py). And let oneDNN keep its kernels for more shapes. Elsewhere nothing happens."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX in malloc.h
        for what, value in ((-4, 0), (-1, 2**31 - 1), (-8, 1)):
            libc.mallopt(what, value)


def setup_runtime(cfg):
    """One process, or one of several that torchrun started."""
    device = join_processes()
    if device.type == "cuda":
        # TF32 for what stays in float32
        torch.set_float32_matmul_precision("high")
    else:
        keep_memory()
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return Runtime(device, rank, world_size, autocast_for(device, cfg.precision))


# 4. Data ----------------------------------------------------------------------------------------


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
            # a word without a vector is zero, similar to nothing
            rows = np.stack([np.mean([vectors.get(w, zero) for w in p], axis=0) for p in phrases])
            return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)

        rows, tables = unit_means([[w] for w in words]), {}
        for column, parts in names.items():
            tables[column] = (rows @ unit_means(parts).T).astype(np.float16)
        return tables, {"unknown": sum(w not in vectors for w in words)}

    def __call__(self, words, ids, column):
        """(K, N_V) float32 of words (K,) and ids (K, N_V) of cls_id or attr_id, -1 unknown"""
        table = self.tables[column]
        check_names(ids, table.shape[1], column)
        similarity = table[words[:, None], ids.clip(min=0)]
        return np.where(ids < 0, 0, similarity).astype(np.float32)


class Streams(NamedTuple):
    """What a run learns from: see MixedBatches."""

    train: list
    weights: list
    val: dict  # {name: Batches}
    store: object  # of the first, for model sizes
    answer_list: list = []  # what a task head's outputs are called


def load_tokenizer(cfg):
    """BERT's word pieces; MAF: words of the phrases and of the detector that GloVe knows"""
    if "phrases" not in given_to(cfg):
        return load_wordpiece(cfg.data, cfg.cased, TASKS[vocabulary_task(cfg)].words)
    return WordVectors(phrase_words(cfg.data), cfg.data)


@kept
def phrase_words(data):
    """Words of Flickr30k Entities' phrases and the detector's names, sorted"""
    words = {*detector_names(data, "objects"), *detector_names(data, "attributes")}
    # words of all splits: their vectors are GloVe's, and no label is read here
    for split in ("train", "val", "test"):
        for record in entity_captions(data, split, Counter()):
            for phrase in record.note[1]:
                words |= {strip_punctuation(word) for word in phrase.words.split()}
    return sorted(words - {""})


def vocabulary_task(cfg):
    """The task whose words and types a run has: its own, or that of a second pre-training stage."""
    corpora = corpus_weights(cfg) if cfg.is_pretraining else ()
    stages = [CORPORA[name].task for name in corpora]
    return next(filter(None, stages), cfg.task)


def print_index(runtime, index):
    """What was read, and what was left out"""
    runtime.print_rank0(f"  {index.store}\n  {index}")
    for what, n in index.meta.get("stats", {}).items():
        if n:
            runtime.print_rank0(f"    {n:,} {what}")


def batch_size_of(cfg):
    """The batch over all processes, as Batches wants it: {"size", "by_example"}"""
    size = cfg.batch_size or cfg.batch_tokens
    return {"size": size * cfg.gpus, "by_example": cfg.batch_size > 0, "seed": cfg.seed}


def load_streams(cfg, runtime, run):
    """Training and validation batches of a task."""
    # contrast needs all of a process's examples at once; all else may be made in parts, so that
    # any number of processes trains on the same batches
    parts = 1 if cfg.is_albef else -(-cfg.gpus // runtime.world_size)
    share = {"rank": runtime.rank, "world_size": runtime.world_size, "parts": parts}
    load = STREAMS.get(cfg.task, task_streams) if not cfg.is_multitask else multitask_streams
    return load(cfg, runtime, run, share)


def task_streams(cfg, runtime, run, share):
    """A downstream task's examples."""
    task, batches = TASKS[cfg.task], []
    answers = run.settings["answer_list"]
    how = {"stream": task.stream, "answers": len(answers) if task.soft else 0}
    how["count_choices"] = task.count_choices
    # each process validates on the same batches, so that all agree without a message
    whole = {"size": cfg.batch_tokens, "seed": cfg.seed}
    for split, own in (
        (cfg.split or task.train, share | batch_size_of(cfg)),
        (task.validation, whole),
    ):
        index = open_task(run, cfg.task, split)
        print_index(runtime, index)
        batches.append(Batches("examples", index, **own, **how))
    train, val = batches
    return Streams([train], [1], {cfg.task: val}, train.index.store, answers)


def retrieval_streams(cfg, runtime, run, share):
    """Groups of a matched pair and its mismatched ones."""
    reader, indexes = functools.partial(karpathy_captions, dataset=cfg.dataset), []
    for split in ("train", "val"):
        name = f"{cfg.dataset} {split}"
        indexes.append(run.index(reader, split, cfg.dataset, name=name))
        print_index(runtime, indexes[-1])
    ranking = {"negatives": cfg.negatives, "candidates": cfg.candidates}
    ranking |= {"alternate": cfg.alternate, "mined": cfg.mine_every > 0}
    if "edits" in given_to(cfg):
        ranking["other_texts"] = [EditedCaptions(cfg.data, indexes[0])]
    train = Batches("rank", indexes[0], **batch_size_of(cfg), **share, **ranking)
    val = Batches("rank", indexes[1], cfg.batch_tokens, cfg.seed, negatives=cfg.negatives)
    return Streams([train], [1], {"rank": val}, indexes[0].store)


def pretrain_streams(cfg, runtime, run, share):
    """One stream for each pre-training task of each corpus; ALBEF's tasks are one."""
    corpora, weights = corpus_weights(cfg), pretrain_weights(cfg)
    tasks = {task: weight for task, weight in weights.items() if task != "wra"}
    how = {"mask_rate": cfg.mask_rate, "joint": cfg.joint_masking}
    size, layout = cfg.batch_tokens, "bert"
    if cfg.is_albef:
        tasks, layout, size = {"albef": 1}, "albef", cfg.batch_size
        how = {"mask_rate": cfg.mask_rate, "augment": tuple(cfg.augment.split("+"))}
    streams, sampling_weights, val = [], [], {}
    for number, (corpus, weight) in enumerate(corpora.items()):
        row, indexes = CORPORA[corpus], []
        for split, store in (("train", row.store), ("val", row.val_store or row.store)):
            # many web pictures are gone: such a corpus goes on without them
            skip = cfg.skip_missing or row.skip_missing or layout == "albef"
            reader = row.reader
            if cfg.triplets:
                kinds = tuple(cfg.triplets.split("+"))
                reader = functools.partial(reader, kinds=kinds, min_area=cfg.min_box_area)
            name = f"{corpus} {split}"
            index = run.index(reader, split, store, name=name, skip_missing=skip, layout=layout)
            print_index(runtime, index)
            indexes.append(index)
        how["other_texts"] = []
        if "edits" in given_to(cfg):
            how["other_texts"].append(EditedCaptions(cfg.data, indexes[0]))
        if "paraphrase" in [LOSSES[name].blocks for name in loss_names(cfg)]:
            options = {"skip_missing": skip, "layout": layout, "name": "their paraphrases"}
            same = functools.partial(vg_paraphrases, kinds=kinds, min_area=cfg.min_box_area)
            same = run.index(same, "train", row.store, **options)
            print_index(runtime, same)
            how["other_texts"].append(Paraphrases(same))
        for task, task_weight in tasks.items():
            own = dict(corpus=number, **share, **how, **batch_size_of(cfg))
            # masked words and regions have texts enough
            own["other_texts"] = how["other_texts"] if task in ("itm", "albef") else ()
            streams.append(Batches(task, indexes[0], **own))
            sampling_weights.append((weight or len(indexes[0])) * task_weight)
            # of ALBEF its contrast is validated
            name = task if task != "albef" else "itc"
            held = min(size, len(indexes[1])) if task == "albef" else size
            val[name if number == 0 else f"{corpus}/{name}"] = Batches(
                task, indexes[1], held, cfg.seed, corpus=number
            )
    return Streams(streams, sampling_weights, val, streams[0].index.store)


def multitask_streams(cfg, runtime, run, share):
    """LXMERT's and Kervadec's data: COCO's captions and VQA's questions; Visual Genome's joined
    descriptions, its questions, and GQA's. Each of the two region stores is a stream, drawn as
    often as it has texts. Left out: Karpathy's val and test, and GQA's val where it is not learned
    from.
    """
    answers, streams = run.settings["answer_list"], []
    gqa_name, gqa = evaluate.MULTITASK_ANSWERS, TASKS[evaluate.MULTITASK_ANSWERS]
    gqa_split = cfg.split or gqa.train
    readers = {
        "coco": functools.partial(multitask_coco, answers=answers),
        "vg": functools.partial(multitask_vg, answers=answers, gqa_split=gqa_split),
    }
    how = {"mask_rate": cfg.mask_rate, **share}
    for number, (store, reader) in enumerate(readers.items()):
        index, own = run.index(reader, "train", store, name=f"{store} train"), {}
        print_index(runtime, index)
        if "pointers" in given_to(cfg) and "pointed" in index.arrays:
            similarity = WordSimilarity(cfg.data, index.arrays["pointed_words"])
            own = {"similarity": similarity, "soft_target": losses.soft_alignment_target}
            runtime.print_rank0(f"    {len(index.arrays['pointed']):,} word pieces point at boxes")
            unknown = f"{similarity.num_unknown:,} of {len(similarity.words):,} pointed words"
            runtime.print_rank0(f"    {unknown} have no GloVe vector: only their place counts")
        own |= {"corpus": number, **how, **batch_size_of(cfg)}
        streams.append(Batches("multitask", index, **own))
    captions = run.index(karpathy_captions, "val", "coco", name="coco val")
    questions = open_task(run, gqa_name, gqa.validation)
    val = {task: Batches(task, captions, cfg.batch_tokens, cfg.seed) for task in ("mlm", "itm")}
    how = {"stream": gqa.stream, "answers": len(answers)}
    val[gqa_name] = Batches("examples", questions, cfg.batch_tokens, cfg.seed, **how)
    # as if both stores were one data set
    weights = [len(stream.index) for stream in streams]
    return Streams(streams, weights, val, streams[0].index.store, answers)


def phrase_streams(cfg, runtime, run, share):
    """MAF's data: Flickr30k Entities' phrases; their boxes only serve evaluation."""
    batches = []
    whole = {"size": cfg.batch_size, "seed": cfg.seed}
    for split, own in (("train", share | batch_size_of(cfg)), ("val", whole)):
        name = f"Flickr30k Entities {split}"
        index = run.index(entity_captions, split, "flickr30k", layout="phrases", name=name)
        print_index(runtime, index)
        how = own | {"phrase_input": PhraseInput(cfg.data, index)}
        batches.append(Batches("maf", index, **how))
    return Streams(batches[:1], [1], {"maf": batches[1]}, batches[0].index.store)


STREAMS = {
    "pretrain": pretrain_streams,
    "retrieval": retrieval_streams,
    "grounding": phrase_streams,
}


# of each kind of edit that hard_rank tells apart: what its words are
EDITS = "object", "attribute", "relation"
OPPOSITES = "left right above below over under top bottom inside outside front back".split()


class EditedCaptions:
    """Captions with one word exchanged, as Batches.other_texts: a detector's class or attribute
    with another of the caption's, where it has one, else with any that captions say; a word of
    OPPOSITES with its opposite. The same for the same seed.                      CE-CLIP sec. 3.1
    """

    def __init__(self, data, index):
        one_piece = lambda words: [ids[0] for w in words if len(ids := index.tokenizer(w)) == 1]
        said = np.zeros(len(index.tokenizer), bool)
        for start in range(0, len(index.tokens), 1 << 22):
            said[index.tokens[start : start + (1 << 22)]] = True
        # of each word piece: its kind, and what alone it is exchanged with
        self.kind, self.opposite = np.full((2, len(said)), -1)
        for number, names in enumerate(("objects", "attributes")):
            self.kind[one_piece(detector_names(data, names))] = number
        for a, b in zip(OPPOSITES[::2], OPPOSITES[1::2]):
            pair = one_piece((a, b))
            if len(pair) == 2:
                self.kind[pair], self.opposite[pair] = EDITS.index("relation"), pair[::-1]
        self.words = [np.flatnonzero((self.kind == k) & said) for k in range(len(EDITS))]

    def __call__(self, batches, rng, rows, share, batch):
        u = rng.random((len(rows), 3))[share]
        # ALBEF mirrors texts with their pictures
        text = batch["text"].numpy() if "text" in batch else batches.index.text(rows[share])[0]
        text = text.copy()
        kinds = [self.edit(ids, where) for ids, where in zip(text, u)]
        return {"edited": torch.from_numpy(text), "edit_kind": torch.tensor(kinds)}

    def edit(self, ids, u):
        """Exchange a word of ids in place; the kind of the edit, -1 where no word has one"""
        kinds = np.unique(self.kind[ids])
        kinds = kinds[kinds >= 0]
        if not len(kinds):
            return -1
        kind = int(kinds[int(u[0] * len(kinds))])
        places = np.flatnonzero(self.kind[ids] == kind)
        at = places[int(u[1] * len(places))]
        others, words = places[ids[places] != ids[at]], self.words[kind]
        words = words[words != ids[at]]
        if self.opposite[ids[at]] >= 0:
            ids[at] = self.opposite[ids[at]]
        elif len(others):
            other = others[int(u[2] * len(others))]
            ids[[at, other]] = ids[[other, at]]
        elif len(words):
            ids[at] = words[int(u[2] * len(words))]
        else:
            return -1
        return kind


class Paraphrases:
    """The same texts in other words, as Batches.other_texts; index: of these, row by row."""

    def __init__(self, index):
        self.index = index

    def __call__(self, batches, rng, rows, share, batch):
        text, mask = self.index.text(rows[share])
        if "flip" in batch:
            flip = batch["flip"].numpy()[:, None]
            text = np.where(flip, mirrored(self.index.tokenizer, text), text)
        words = {"text": text, "text_mask": mask}
        return {"paraphrase": {k: torch.from_numpy(v) for k, v in words.items()}}


class MixedBatches(torch.utils.data.Dataset):
    """Item -> a batch. One stream is drawn for each step by its weight, the same on all processes.

    streams           list of Batches, of one number of parts
    sampling_weights  how often each is drawn
    accumulate        batches of a step, all of its stream, each in the stream's parts
    items             of a step; step n is items n * items to (n + 1) * items - 1
    """

    def __init__(self, streams, sampling_weights, steps, seed, accumulate=1):
        p = np.array(sampling_weights, float)
        self.streams, self.steps, self.accumulate = streams, steps, accumulate
        self.items = accumulate * streams[0].parts
        rng = np.random.default_rng([seed, 0])
        # drawn ahead for all steps, so that a resumed run goes on with the same
        self.choice = rng.choice(len(streams), size=steps, p=p / p.sum())
        # how often the step's stream was drawn before
        self.number = np.zeros(steps, np.int64)
        for s in range(len(streams)):
            self.number[self.choice == s] = np.arange((self.choice == s).sum())

    def __len__(self):
        return self.steps * self.items

    def __getitem__(self, item):
        step, place = divmod(item, self.items)
        stream = self.streams[self.choice[step]]
        k, part = divmod(place, stream.parts)
        return stream.part(int(self.number[step]) * self.accumulate + k, part)


def make_loader(mixed, start, end, workers, pin_memory):
    """Iterator over the steps from start to end, each a list of batches; workers keep ahead of the
    model if there are any.
    """
    loader = torch.utils.data.DataLoader(
        mixed,
        # an item is one batch: a whole step would be hundreds of megabytes on their way at once
        batch_size=None,
        sampler=range(start * mixed.items, end * mixed.items),
        num_workers=workers,
        collate_fn=keep_batch,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
    )
    batches = iter(loader)
    return iter(lambda: list(islice(batches, mixed.items)), [])


def keep_batch(batch):
    """Batches are whole already: the loader only carries them."""
    return batch


def load_batches(cfg, runtime, model, streams, start):
    """Yields each step's batches from start on, of mined negatives those that the model finds hard
    every --mine-every steps.
    """
    on_gpu = runtime.device.type == "cuda"
    mixed = MixedBatches(streams.train, streams.weights, cfg.steps, cfg.seed, cfg.accumulate)
    # without a GPU loader processes would take the model's cores
    workers = cfg.workers if cfg.workers >= 0 else 2 * on_gpu
    every = cfg.mine_every or cfg.steps
    while start < cfg.steps:
        since = start // every * every
        if cfg.mine_every:
            # a resumed run reads the table that it had mined
            hard = mine_negatives(cfg, runtime, model, streams.train[0].index, since)
            streams.train[0].hard = hard
        end = min(since + every, cfg.steps)
        yield from make_loader(mixed, start, end, workers, on_gpu)
        start = end


# 5. Model ---------------------------------------------------------------------------------------


def model_sizes(cfg, tokenizer, streams):
    """What the data and the task ask of the model; kept in the checkpoint."""
    features = streams.store.read(np.array([0])).shape[-1]
    if "phrases" in given_to(cfg):
        inputs, width = cfg.region_inputs.split("+"), tokenizer.vectors.shape[1]
        sizes = {"model": "maf", "words": tokenizer.names, "width": width}
        return sizes | {"features": features, "inputs": inputs}
    sizes = {"model": cfg.model, "vocab": len(tokenizer)}
    if cfg.is_albef:
        return sizes | {"queue": cfg.queue, "resolution": cfg.resolution, "patch": cfg.patch}
    two_stream = cfg.model == "lxmert"
    task = TASKS[vocabulary_task(cfg)]
    head = TASKS[cfg.task].head(dataclasses.asdict(cfg))
    sizes |= {
        "features": features,
        "classes": (streams.store.classes or 1601) - two_stream,
        "types": task.type_rows,
        "head": head or ("answers" if streams.answer_list else ""),
        "answers": len(streams.answer_list),
        "align": "pointers" in given_to(cfg),
    }
    if two_stream:
        sizes["attributes"] = len(detector_names(cfg.data, "attributes"))
    return sizes | ({"patch": cfg.patch} if cfg.vision == "patches" else {})


def build_model(cfg, runtime, tokenizer, streams):
    """A model for this vocabulary, these features and this task, filled from --init"""
    # the same weights on all processes, whatever was drawn before
    torch.manual_seed(cfg.seed)
    sizes = model_sizes(cfg, tokenizer, streams)
    kind = sizes.pop("model")
    if kind == "maf":
        start = cfg.init_w_f, cfg.init_w_p
        model = Maf(len(tokenizer), sizes["width"], sizes["features"], sizes["inputs"], start)
        with torch.no_grad():
            model.word.weight.copy_(torch.from_numpy(tokenizer.vectors))
    else:
        model = build(kind, cfg.size, **sizes, dropout=cfg.dropout)
    # a run's own folder may have a + in its name
    paths = [cfg.init] if Path(cfg.init).exists() else cfg.init.split("+")
    for path in paths if cfg.init else ():
        if not Path(path).exists():
            raise UserError(f"{path} is not there", FROM_BERT)
        report = load_pretrained(model, path, getattr(tokenizer, "new_words", 0))
        runtime.print_rank0(f"  {path}: {report}")
    return model.to(runtime.device)


# UNITER's own checkpoints can no longer be had
FROM_BERT = (
    "a checkpoint. Without UNITER's own, begin from BERT's, which is public:\n"
    "    python train.py --recipe uniter-pretrain --data DATA "
    "--init DATA/bert-base-cased/pytorch_model.bin --out out/pretrain\n"
    '  and go on from there with --init out/pretrain/last.pt (README, "Full data")'
)


# 6. Objectives ----------------------------------------------------------------------------------
# Each takes the settings, the model and a batch and returns {name: loss}; a loss is a mean over
# count_of(batch, name) things.


def attention_blocks(given, two_stream, maps, text_mask, region_mask):
    """{"LL", "LV", "VL", "VV": (B, N, M)} as a loss wants them: mean over heads."""
    # mean over heads; padding stays undefined, since each loss masks it
    if given == "logits":
        blocks = [S.float().mean(dim=1) for S in maps]
    elif given == "layer_probs" and not two_stream:
        joint = losses.joint_softmax(*maps, text_mask, region_mask)
        blocks = [P.mean(dim=1) for P in joint]
    else:
        # two streams: each block has a softmax of its own
        # IAIS leaves [CLS] and [SEP] out before its softmax; the layer's own softmax has them
        words = text_mask if given == "layer_probs" else content_words(text_mask)
        masks = words, region_mask, words, region_mask
        blocks = [losses.block_softmax(S, mask) for S, mask in zip(maps, masks)]
    return dict(zip(("LL", "LV", "VL", "VV"), blocks))


# whose block a side calls what
LANGUAGE_SIDE = {"own": "LL", "cross": "LV", "back": "VL", "other": "VV"}
VISION_SIDE = {"own": "VV", "cross": "VL", "back": "LV", "other": "LL"}


def alignment(cfg, out, batch, anchor="both"):
    """{name: loss} of --loss on matched pairs; anchor "text" gives the language side, "image" the
    vision side, else their sum.
    """
    text_mask, region_mask = batch["text_mask"], batch["region_mask"]
    word_mask, terms = content_words(text_mask), {}
    for name in loss_names(cfg):
        row = LOSSES[name]
        if row.given == "hidden":
            terms[name] = row.function(out.words, out.regions, text_mask, region_mask)
        if row.given not in ATTENTION:
            continue
        two_stream = cfg.model == "lxmert"
        # each loss gets its own view of the same logits
        maps = attention_blocks(row.given, two_stream, out.maps[0], text_mask, region_mask)
        names = row.blocks.split()
        if "own" not in names:
            terms[name] = row.function(*(maps[b] for b in names), word_mask, region_mask)
            continue
        terms[name] = 0
        if anchor != "image":
            side = [maps[LANGUAGE_SIDE[b]] for b in names]
            terms[name] = terms[name] + row.function(*side, word_mask, region_mask)
        if anchor != "text":
            side = [maps[VISION_SIDE[b]] for b in names]
            terms[name] = terms[name] + row.function(*side, region_mask, word_mask)
    return terms


def maps_needed(cfg):
    """Layers whose attention maps the losses of --loss need"""
    return (cfg.align_layer,) if set(given_to(cfg)) & set(ATTENTION) else ()


def objective_mlm(cfg, model, batch):
    """Masked words, in sight of the regions"""
    # regions that the model may not see while it reads the words (joint masking)
    hidden = batch.get("hidden_regions")
    out = model(**batch["input"], masked_words=batch["masked_words"], hidden_regions=hidden)
    return {"mlm": losses.mlm(out.word_logits, batch["word_targets"])}


def objective_regions(cfg, model, batch):
    """MRFR, MRC or MRC-kl; scaled as the authors' code does, whose means run over dimensions and
    classes too.
    """
    masked, task = batch["masked_regions"], batch["task"]
    heads = ("features",) if task == "mrfr" else ("classes",)
    hidden = batch.get("hidden_regions")
    out = model(**batch["input"], masked_regions=masked, hidden_regions=hidden, heads=heads)
    if task == "mrfr":
        target = batch["input"]["regions"].flatten(0, 1)[masked]
        return {"mrfr": losses.mrfr(out.region_features, target) / target.shape[-1]}
    probs = batch["region_probs"].float()
    if task == "mrc":
        return {"mrc": losses.mrc(out.region_logits, probs)}
    return {"mrckl": losses.mrc_kl(out.region_logits, probs) / probs.shape[-1]}


def objective_itm(cfg, model, batch):
    """Matching; with wra in --pretrain UNITER's alignment term, with --loss the others, on the
    matched pairs of the batch; AMC's on those with a box.
    """
    heat = "heat" in given_to(cfg) and len(batch.get("boxed", ())) > 0
    if heat:
        # torch.compile has no second derivatives
        model = getattr(model, "_orig_mod", model)
    out = model(**batch["input"], heads=("match",), maps=maps_needed(cfg), need_gradcam=heat)
    masks = batch["input"]["text_mask"], batch["input"]["region_mask"]
    terms = {batch["task"]: losses.itm(out.match, batch["match"])}
    if cfg.is_pretraining and "wra" in pretrain_weights(cfg):
        terms["wra/pretrain"] = losses.wra(out.words, out.regions, *masks, match=batch["match"])
    if heat:
        # the matched logit is explained, of the pairs whose text has a box
        boxed = batch["boxed"]
        A = heat_of(out, masks[0], boxed)[boxed]
        terms |= heat_losses(cfg, A, batch["region_target"])
        if "paraphrase" in batch:
            x = rows_of(batch["input"] | batch["paraphrase"], boxed)
            x["length"] = x["text"].shape[1] + x["regions"].shape[1]
            other = model(**x, heads=("match",), need_gradcam=True)
            terms |= paraphrase_losses(cfg, A, heat_of(other, x["text_mask"]))
    matched = batch["matched"]
    if {"scores", "edits"} & {*given_to(cfg)} and len(matched):
        own = pair_scores(out, "match")[matched]
        batch |= rows_of({k: batch[k] for k in ("edited", "edit_kind") if k in batch}, matched)
        x = rows_of(batch["input"], matched)
        terms |= score_losses(cfg, batch, own, functools.partial(score_again, model, x, "match"))
    return terms | matched_alignment(cfg, out, batch)


def rows_of(x, rows):
    """These rows of each tensor of a model's input"""
    return {k: v[rows] if isinstance(v, torch.Tensor) else v for k, v in x.items()}


def heat_of(out, text_mask, rows=slice(None)):
    """(B, patches) heat maps of a single or double stream's matched logit of these rows"""
    P, block_of = out.gradcam
    return losses.gradcam(P, out.match[rows, 1], text_mask, block_of=block_of)


def score_losses(cfg, batch, own, score):
    """{name: loss} of losses on scores of whole pairs. own (G,): of the matched ones; score(n,
    images, text) (n,): of the first n, with these images (rows), or with these texts
    """
    terms, n = {}, len(own) // 2 * 2
    for name in loss_names(cfg):
        row = LOSSES[name]
        if row.given == "scores" and n:
            # pairs 2p and 2p + 1 exchange their images
            s = score(n, images=torch.arange(n, device=own.device) ^ 1)
            # (P, image, caption); s[2p] is of caption 2p with image 2p + 1
            s = torch.stack([own[:n:2], s[1::2], s[::2], own[1:n:2]], dim=-1).view(-1, 2, 2)
            terms[name] = row.function(s)
        if row.given == "edits":
            edited = score(len(own), text=batch["edited"])
            how = own, edited, batch["edit_kind"], batch["edit_margins"]
            terms[name] = row.function(*how)
            batch["edit_gaps"] = losses.edit_gaps(*how)
    return terms


def score_again(model, x, head, n, images=None, text=None):
    """score of score_losses(), by a single or double stream; x: its input of matched pairs"""
    changed, seen = rows_of(x, slice(n)), ("regions", "boxes", "region_mask", "region_type")
    if images is not None:
        changed |= rows_of({k: x[k] for k in seen if k in x}, images)
        changed["length"] = x["text"].shape[1] + x["regions"].shape[1]
    changed |= {} if text is None else {"text": text}
    return pair_scores(model(**changed, heads=(head,)), head)


def matched_alignment(cfg, out, batch):
    """alignment() of the matched pairs of a batch, as a mean over all of its pairs"""
    wanted = set(given_to(cfg)) & {*ATTENTION, "hidden", "heat"}
    rows = batch["matched"] if wanted else ()
    if not len(rows):
        return {}
    maps = tuple(type(m)(*(S[rows] for S in m)) for m in out.maps)
    matched = out._replace(words=out.words[rows], regions=out.regions[rows], maps=maps)
    masks = {name: batch["input"][name][rows] for name in ("text_mask", "region_mask")}
    # the mean over matched pairs, times their share: the sum over pairs by all pairs
    share = len(rows), len(batch["match"])
    terms = alignment(cfg, matched, masks)
    return {name: value * share[0] / share[1] for name, value in terms.items()}


def objective_multitask(cfg, model, batch):
    """Every signal of Kervadec sec. 4 and 5 in one pass: words, masked regions (class, attribute,
    feature), matching, answers, pointers.
    """
    pointed = "aligned" in batch
    places = {k: batch[k] for k in ("masked_words", "masked_regions", "hidden_regions")}
    heads = ("classes", "match", "task", *(("align",) if pointed else ()))
    out = model(**batch["input"], **places, heads=heads, maps=maps_needed(cfg))
    features = batch["region_features"]
    terms = {
        "mlm": losses.mlm(out.word_logits, batch["word_targets"]),
        "itm": losses.itm(out.match, batch["match"]),
        "class": losses.detected(out.region_logits, batch["region_class"]),
        "attribute": losses.detected(out.attribute_logits, batch["region_attribute"]),
        "feature": losses.mrfr(out.region_features, features) / features.shape[-1],
        "answers": losses.mlm(out.scores[batch["answered"]], batch["answer"]),
    }
    if pointed:
        A = out.alignment.flatten(0, 1)[batch["aligned"]]  # (K, N_V)
        region_mask = batch["input"]["region_mask"][batch["aligned_row"]]
        for name in loss_names(cfg):
            row = LOSSES[name]
            if row.blocks == "map":
                overlap = losses.box_iou(batch["pointer"], batch["pointer_boxes"]) >= 0.5
                positive = torch.zeros_like(out.alignment).flatten(0, 1)
                # a word may point at several boxes
                positive = positive.index_add(0, batch["aligned"], overlap.to(positive))
                positive = positive.view_as(out.alignment) > 0
                masks = batch["input"]["text_mask"], batch["input"]["region_mask"]
                terms[name] = row.function(out.alignment, positive, *masks)
            elif row.given == "pointers":
                terms[name] = row.function(A, batch["alignment"], region_mask)
    return terms | matched_alignment(cfg, out, batch)


def phrase_vectors(cfg, model, batch):
    """e (b, Q, d) of phrases, v (B, K, d) of regions, MAF eq. (1)-(3), and the masks that count"""
    masks = [batch[name] for name in ("word_mask", "phrase_mask", "region_mask")]
    masks = [torch.ones_like(m) if cfg.attend_padding else m for m in masks]
    h, v = model(**batch["input"])
    # one process: all of them, in order
    own = slice(None) if len(batch["own"]) == len(v) else batch["own"]
    if cfg.phrase_pooling == "average":
        count = masks[0].sum(dim=-1, keepdim=True).clamp(min=1)
        p = (h * masks[0][..., None]).sum(dim=-2) / count
    else:
        p = losses.phrase_embedding(h, v[own], masks[0], masks[2][own])
    return model.project(p), v, masks


def objective_maf(cfg, model, batch):
    """A caption's phrases should find their regions in its own image, not in others."""
    e, v, (_, phrase_mask, region_mask) = phrase_vectors(cfg, model, batch)
    similarity = losses.maf_similarity(e, v, phrase_mask, region_mask)
    if cfg.attend_padding:
        # sums over padded phrases, divided by the real ones [authors' code]
        phrases = batch["phrase_mask"].sum(dim=1, keepdim=True)
        similarity = similarity * phrase_mask.shape[1] / phrases
    return {name: LOSSES[name].function(similarity, batch["own"]) for name in loss_names(cfg)}


def objective_albef(cfg, model, batch):
    """ALBEF's three losses (Li et al. 2021), and those of --loss on its matched pairs.

    itc   against the momentum model's features of all processes' pairs and of the queue, targets
          softened by its own similarities
    itm   positives; each text with another image and each image with another text of all
          processes' pairs, the likelier the more similar
    mlm   in sight of the image, with the momentum model's predictions mixed in
    """
    student, teacher, text_mask = model.student, model.teacher, batch["text_mask"]
    own = batch["own"]
    progress = batch["number"] / cfg.accumulate / max(1, cfg.warmup)
    alpha = cfg.distill_weight * min(1.0, progress)
    with torch.no_grad():
        # it is learned, and without bounds it runs away [ALBEF's code]
        model.temperature.clamp_(0.001, 0.5)
        # before the step, as ALBEF: its features are of the newest copy
        model.update_teacher(cfg.momentum)
        pixels = normalize_pixels(batch["pixels"])
        image_m = teacher.vision(pixels)
        features_m = teacher.features(image_m, teacher.read(batch["text"], text_mask))
        # (B, E), B = pairs of all processes
        image_all, text_all = (all_gather_with_grad(f.float()) for f in features_m)
        past = (text_all, model.text_queue.T), (image_all, model.image_queue.T)
        candidates = [torch.cat(parts) for parts in past]
    image, words = student.vision(pixels), student.read(batch["text"], text_mask)

    # contrast: image with texts, text with images
    T = model.temperature
    features = student.features(image, words)
    similarity = [losses.product(f, c.T) / T for f, c in zip(features, candidates)]
    with torch.no_grad():
        similarity_m = [losses.product(f, c.T) / T for f, c in zip(features_m, candidates)]
        target = [losses.itc_targets(s, own, alpha) for s in similarity_m]
        other = []
        for s, u in zip(similarity, batch["u"]):
            # the more similar, the likelier; u is the same on all processes
            weights = losses.negative_weights(s[:, : len(image_all)], own)
            other.append(sample_rows(weights, u[own]))
        # only now: the similarities above are with the queue as it was
        model.enqueue(image_all, text_all)
    terms = {"itc": sum(losses.itc(s, t) for s, t in zip(similarity, target)) / 2}

    # matching, with one hard negative each way
    heat = "heat" in given_to(cfg) and len(batch["boxed"]) > 0
    states, P = student.fuse(words, text_mask, image, need_gradcam=heat)
    # first each text with another image, then each image with another text
    other_text, other_image = other
    wrong_words = torch.cat([words, all_gather_with_grad(words)[other_text]])
    wrong_mask = torch.cat([text_mask, all_gather_with_grad(text_mask)[other_text]])
    wrong_image = torch.cat([all_gather_with_grad(image)[other_image], image])
    wrong, _ = student.fuse(wrong_words, wrong_mask, wrong_image)
    match = model.score(torch.cat([states[:, :1], wrong[:, :1]]))  # (3b, 2)
    is_match = torch.arange(len(match), device=own.device) < len(own)
    terms["itm"] = losses.itm(match, is_match)

    # masked words, in sight of the image
    seen, _ = student.fuse(student.read(batch["masked_text"], text_mask), text_mask, image)
    logits = student.word_logits_at(seen, batch["masked_words"])
    with torch.no_grad():
        masked_m = teacher.read(batch["masked_text"], text_mask)
        seen_m, _ = teacher.fuse(masked_m, text_mask, image_m)
        logits_m = teacher.word_logits_at(seen_m, batch["masked_words"])
    terms["mlm"] = losses.mlm_distilled(logits, batch["word_targets"], logits_m, alpha)

    return terms | albef_alignment(cfg, model, batch, words, image, match[: len(own)], P)


def albef_alignment(cfg, model, batch, words, image, match, P):
    """{name: loss} of --loss on a process's matched pairs. words, image: before they are fused;
    match (b, 2) logits; P: the fusion's map that explains them, None if no text has a box
    """
    student, text_mask, terms = model.student, batch["text_mask"], {}
    for name in loss_names(cfg):
        if LOSSES[name].given == "hidden":
            # in the space where they are contrasted
            x, y = student.text_proj(words), student.vision_proj(image[:, 1:])
            whole = torch.ones_like(y[..., 0], dtype=torch.bool)
            terms[name] = LOSSES[name].function(x, y, text_mask, whole)

    def score(n, images=slice(None), text=None):
        read = words if text is None else student.read(text, text_mask)
        return log_odds(model.score(student.fuse(read[:n], text_mask[:n], image[images][:n])[0]))

    terms |= score_losses(cfg, batch, log_odds(match), score)
    if P is not None:
        boxed = batch["boxed"]
        A = losses.gradcam(P, match[:, 1], text_mask)[boxed]
        terms |= heat_losses(cfg, A, batch["region_target"])
        if "paraphrase" in batch:
            text, mask = (x[boxed] for x in batch["paraphrase"].values())
            other = student.read(text, mask)
            states, P = student.fuse(other, mask, image[boxed], need_gradcam=True)
            A_paraphrase = losses.gradcam(P, model.score(states[:, :1])[:, 1], mask)
            terms |= paraphrase_losses(cfg, A, A_paraphrase)
    return terms


def heat_losses(cfg, A, region):
    """{name: loss} of AMC's losses, of heat maps A (M, patches) and targets (M, R, R)"""
    heat = resize_heat(A, region.shape[-1])
    rows = {name: LOSSES[name] for name in loss_names(cfg)}
    named = {n: row for n, row in rows.items() if (row.given, row.blocks) == ("heat", "")}
    return {name: row.function(heat, region.float()) for name, row in named.items()}


def paraphrase_losses(cfg, A, A_paraphrase):
    """{name: loss} of losses on the heat maps (M, patches) of texts and of their paraphrases"""
    maps = [losses.unit_range(x.float()) for x in (A, A_paraphrase)]
    rows = {name: LOSSES[name] for name in loss_names(cfg)}
    return {n: row.function(*maps) for n, row in rows.items() if row.blocks == "paraphrase"}


def resize_heat(A, size):
    """(b, patches) -> (b, size, size) in [0, 1]                                     AMC's code"""
    A = losses.unit_range(A.float())
    side = math.isqrt(A.shape[1])
    A, how = A.view(-1, 1, side, side), {"mode": "bilinear", "align_corners": False}
    return torch.nn.functional.interpolate(A, (size, size), **how)[:, 0]


def sample_rows(weights, u):
    """One column of each row (b, B), as likely as its weight; u (b,) in [0, 1) decides. Where all
    weights vanish, any that is not 0 by rule.
    """
    share = (weights + 1e-9 * (weights > 0)).double().cumsum(dim=1)
    return (share > u[:, None] * share[:, -1:]).int().argmax(dim=1)


class AllGatherWithGrad(torch.autograd.Function):
    """Rows of all processes in a batch's order; gradients go back to where each came from."""

    @staticmethod
    def forward(ctx, x):
        """(b, ...) of each process -> (B, ...)"""
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.stack(parts, dim=1).flatten(0, 1)

    @staticmethod
    def backward(ctx, gradient):
        """The sum of all processes' gradients, of this process's rows"""
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank() :: dist.get_world_size()]


def all_gather_with_grad(x):
    """Rows of all processes; of one process x itself"""
    several = dist.is_initialized() and dist.get_world_size() > 1
    return AllGatherWithGrad.apply(x) if several else x


def objective_rank(cfg, model, batch):
    """Each matched pair against its negatives; alignment on the matched, alone with maps"""
    out = model(**batch["positive"], heads=("rank",), maps=maps_needed(cfg))
    wrong = torch.cat([model(**b, heads=("rank",)).rank for b in batch["negatives"]])
    scores = torch.cat([out.rank[:, None], wrong[batch["order"]]], dim=1)  # (G, 1 + K)
    terms = {"rank": losses.ranking(scores, cfg.margin)}
    score = functools.partial(score_again, model, batch["positive"], "rank")
    terms |= score_losses(cfg, batch, pair_scores(out, "rank"), score)
    return terms | alignment(cfg, out, batch["positive"], batch["anchor"])


def objective_task(cfg, model, batch):
    """A downstream task; with --loss also the alignment of its texts and images."""
    task = TASKS[cfg.task]
    out = model(**batch["input"], heads=(task.output,), maps=maps_needed(cfg))
    loss = task.losses[cfg.task_loss or next(iter(task.losses))]
    return {cfg.task: loss(out, batch, cfg.margin), **alignment(cfg, out, batch["input"])}


# what losses of one batch may be means over, besides "", its samples
COUNTED = "", "mlm", "class", "attribute", "feature", "answers", "align", "heat"


def counted_as(name):
    """What a loss is a mean over: a name of COUNTED"""
    name = "heat" if name in LOSSES and LOSSES[name].given == "heat" else name
    return name if name in COUNTED else ""


def count_of(batch, name):
    """How many things a loss of a batch is a mean over"""
    return batch["counts"].get(counted_as(name), batch["counts"][""])


class HardNegatives(NamedTuple):
    """What mining found: the hardest images of each caption, captions of each image (-1: none)."""

    images: np.ndarray  # (texts, HARDEST)
    captions: np.ndarray  # (images of the store, HARDEST)


def mining_candidates(index, rng, n):
    """(T, n) captions and random other images to score for each          UNITER sec. A.2"""
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


@torch.no_grad()
def hardest_candidates(cfg, runtime, model, batch):
    """Score the candidates of each group and keep the highest-scored [IAIS's code]. Waits for the
    device once: which they are decides the shapes.
    """
    # without gradient, so that many more pairs fit at once than in training
    pool = batch.pop("candidates").apply(lambda part: to_device(part, runtime.device))
    captions, images = pool.rows, pool.images
    how = {"batch_tokens": max(cfg.batch_tokens, 8192), "autocast": runtime.autocast}
    scores = evaluate.score_pairs(model, pool, captions.ravel(), images.ravel(), **how)
    order = np.argsort(-scores.reshape(captions.shape), axis=1, kind="stable")
    rows, hardest = np.arange(len(captions))[:, None], order[:, : cfg.negatives]
    return batch | collate_negatives(pool, captions[rows, hardest], images[rows, hardest])


@torch.no_grad()
def mine_negatives(cfg, runtime, model, index, step):
    """Hard negatives for the next --mine-every updates: score random images for each caption, keep
    the hardest each way.

    The scores go to --out, so that a resumed run has the same; every process scores its share.
                                                                                  UNITER sec. A.2
    """
    path, rng = Path(cfg.out) / f"hard-{step}.npy", np.random.default_rng([cfg.seed, 13, step])
    captions, images = mining_candidates(index, rng, cfg.mine_pool)
    if not path.exists():
        runtime.print_rank0(f"  mining hard negatives at step {step}: {captions.size:,} pairs")
        # each process scores its share of the captions
        own = np.arange(runtime.rank, len(captions), runtime.world_size)
        how = {"batch_tokens": max(cfg.batch_tokens, 8192), "autocast": runtime.autocast}
        pairs = captions[own].ravel(), images[own].ravel()
        scores = evaluate.score_pairs(model, index, *pairs, **how, progress="mining")
        whole = np.empty(captions.shape, np.float32)
        for rank, part in enumerate(gathered(scores.reshape(len(own), -1))):
            whole[rank :: runtime.world_size] = part
        if runtime.is_main:
            with open(f"{path}.tmp", "wb") as file:
                np.save(file, whole)
            os.replace(f"{path}.tmp", path)
        runtime.barrier()
    return hardest_of(index, captions, images, np.load(path))


# 7. Optimiser and schedule ----------------------------------------------------------------------


def build_optimizer(cfg, model):
    """AdamW; matrices decay, biases and norms do not (the authors' code also decays four norms of
    the region embedding and heads).
    """
    groups, decay_all = [], cfg.optimizer == "bertadam"
    for is_head in (False, True):
        # a fresh head may learn faster than what was pre-trained
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        params = [p for name, p in named if name.startswith("task_head.") == is_head]
        for is_matrix in (True, False):
            group = {"params": [p for p in params if (p.dim() >= 2) == is_matrix]}
            group["weight_decay"] = cfg.weight_decay * (is_matrix or decay_all)
            group["scale"] = cfg.head_lr if is_head else 1.0
            groups += [group] if group["params"] else []
    settings = {"lr": cfg.lr, "betas": (0.9, cfg.beta2), "eps": cfg.eps}
    if decay_all:
        optimizer = BertAdam(groups, settings)
    else:
        optimizer = torch.optim.AdamW(groups, **settings, fused=True)
    if "edits" in given_to(cfg):
        # saved and loaded with the optimiser
        optimizer.param_groups[0]["edit_margins"] = torch.zeros(len(EDITS))
    return optimizer


class BertAdam(torch.optim.Optimizer):
    """w -= lr (m / (sqrt(v) + eps) + decay w):  Adam without bias correction, as BERT and LXMERT
    were trained.
                                                                                     LXMERT's code
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"m": torch.zeros_like(p), "v": torch.zeros_like(p)}
            grads = [p.grad for p in params]
            m = [self.state[p]["m"] for p in params]
            v = [self.state[p]["v"] for p in params]
            beta1, beta2 = group["betas"]
            torch._foreach_lerp_(m, grads, 1 - beta1)
            torch._foreach_mul_(v, beta2)
            torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
            change = torch._foreach_div(m, torch._foreach_add(torch._foreach_sqrt(v), group["eps"]))
            torch._foreach_add_(change, params, alpha=group["weight_decay"])
            torch._foreach_add_(params, change, alpha=-group["lr"])


def lr_at(step, peak, warmup, steps, schedule="linear", decay=None):
    """Rate of update `step` (the first is 1): linear up to the peak, then linear to 0, never below
    1e-8.                                                                          UNITER's code

    linear-from-0: the first update counts as 0 and has rate 0 [LXMERT's code]; cosine: to a tenth;
    noam: 1 / sqrt(step) after the peak; constant: stays there; steps: 1/4, 2/4, 3/4 of the peak
    for a third of the warm-up each, later multiplied by decay = (from step, every, rate)
    [UNITER's code]
    """
    if schedule == "linear-from-0":
        step -= 1
    # share of the run after the warm-up
    late = (step - warmup) / max(1, steps - warmup)
    if schedule == "steps":
        start, every, rate = decay or (0.6 * steps, 0.1 * steps, 0.2)
        falls = max(0, math.ceil((step - start) / every))
        # whole steps of a quarter
        factor = min(1, (1 + 3 * step // max(1, warmup)) / 4) * rate**falls
    elif step < warmup:
        factor = step / warmup
    elif schedule == "cosine":
        factor = 0.55 + 0.45 * math.cos(math.pi * min(1, late))
    elif schedule == "noam":
        factor = math.sqrt(max(1, warmup) / max(1, step))
    elif schedule == "constant":
        factor = 1.0
    else:
        factor = max(0.0, (steps - step) / max(1, steps - warmup))
    return peak * factor if schedule == "linear-from-0" else max(peak * factor, 1e-8)


def alignment_weight(step, steps, schedule="exp"):
    """exp(5 (t/T - 1)): the alignment losses come in late ("exponential warm-up schedule", CACR
    sec. 4); IAIS's code has the others
    """
    t = step / steps
    if schedule == "exp":
        return math.exp(5 * (t - 1))
    if schedule == "log":
        return 1 - math.exp(-5 * step / steps)
    return t if schedule == "linear" else 1.0


# 8. Checkpoint ----------------------------------------------------------------------------------


def save_checkpoint(path, cfg, model, optimizer, step, sizes):
    """Everything a run needs to go on; batches, masks and dropout are functions of (seed, step),
    so there is no random state to keep.
    """
    path, beside = Path(path), Path(f"{path}.tmp")
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "config": dataclasses.asdict(cfg),
        "sizes": sizes,
    }
    try:
        with open(beside, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:
        beside.unlink(missing_ok=True)
        whole = f"the checkpoint of an earlier step is still whole: {path}"
        raise UserError(
            f"{path} could not be saved at step {step}: {error}",
            hint=(whole if path.exists() else "there is no earlier one")
            + "\n  Free some space, then go on with --resume",
        ) from None


# 9. The loop ------------------------------------------------------------------------------------


class NonFinite(ArithmeticError):
    """A loss or gradient that is nan or infinite; the message names step, loss and samples."""


def train_step(cfg, runtime, model, optimizer, streams, step, batches):
    """One update from the batches of one step; returns the mean of each loss before weighting over
    this process's part, the gradient's norm, and the names of the samples. Waits for no GPU.
    """
    # dropout, the same after a resume
    torch.manual_seed((cfg.seed * 1_000_003 + step) * 1009 + runtime.rank)
    total = total_counts(runtime, batches)
    # alignment comes in late: the maps of a fresh model say nothing yet
    late = alignment_weight(step, cfg.steps, cfg.align_schedule)
    weight = {name: cfg.align_weight * late * row.weight for name, row in LOSSES.items()}
    weight |= {"maf": 1.0, "wra/pretrain": cfg.wra_weight}
    # what is in the image comes before questions about it [Kervadec sec. 6.3]
    weight["answers"] = float(step > cfg.answers_start * cfg.steps)
    # of a batch with fewer samples than processes some have none
    logged, own = {}, [b for b in batches if b["names"]]
    state, gaps = optimizer.param_groups[0], []
    for number, batch in enumerate(own):
        if "candidates" in batch:
            batch = hardest_candidates(cfg, runtime, model, batch)
        batch = prepare_batch(cfg, runtime, batch)
        if "edit_margins" in state:
            batch["edit_margins"] = state["edit_margins"].to(runtime.device)
        with runtime.autocast():
            terms = OBJECTIVES[batch["task"]][0](cfg, model, batch)
        gaps += [batch["edit_gaps"]] if "edit_gaps" in batch else []
        # so that any split over batches and processes gives the same sum
        parts = {
            name: value * weight.get(name, 1.0) * (count_of(batch, name) / total[counted_as(name)])
            for name, value in terms.items()
        }
        if cfg.log_shares and step % cfg.log_every == 0 and number == 0:
            logged |= gradient_shares(model, parts)
        sum(parts.values()).backward()
        for name, value in terms.items():
            n = sum(count_of(b, name) for b in batches)
            part = value.detach() * count_of(batch, name) / max(1, n)
            logged[name] = logged.get(name, 0) + part
    if "edit_margins" in state:
        state["edit_margins"] = next_margins(runtime, gaps, state["edit_margins"])
    all_reduce_gradients(runtime, model)
    # of the sum over all processes, so that all clip alike
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or float("inf"))
    lr = lr_at(step, cfg.lr, cfg.warmup, cfg.steps, cfg.schedule)
    for group in optimizer.param_groups:
        group["lr"] = group.get("scale", 1.0) * lr
    optimizer.step()
    # None instead of 0: the optimiser skips a head that the next step does not train
    optimizer.zero_grad(set_to_none=True)
    return logged, norm, [name for b in own for name in b["names"]]


def next_margins(runtime, gaps, margins):
    """hard_rank's margins of the next update: the mean of all processes' gaps, or as they were"""
    margins = margins.to(runtime.device)
    count = margins.new_tensor([len(gaps)])
    total = torch.cat([sum(gaps, torch.zeros_like(margins)), count])
    if runtime.world_size > 1:
        dist.all_reduce(total)
    return torch.where(total[-1] > 0, total[:-1] / total[-1].clamp(min=1), margins)


def gradient_shares(model, parts):
    """{share/name: |gradient of this part of the loss| / sum of all parts' norms}, in 0 to 1: of a
    process's first batch, one more backward pass for each part. It changes no number.
    """
    params, norms = [p for p in model.parameters() if p.requires_grad], {}
    for name, part in parts.items():
        found = torch.autograd.grad(part, params, retain_graph=True, allow_unused=True)
        norms[name] = torch.nn.utils.get_total_norm([g for g in found if g is not None])
    total = sum(norms.values()).clamp(min=1e-30)
    return {f"share/{name}": norm / total for name, norm in norms.items()}


def check_finite(step, logged, norm, names):
    """Losses and gradient of an update were finite. A GPU has to be waited for, so this is done
    after the next update was begun, and before a checkpoint is written.
    """
    values = logged | {"the gradient's norm": norm}
    if not torch.stack([value.float() for value in values.values()]).isfinite().all():
        bad = (f"{name} = {v.item()}" for name, v in values.items() if not v.isfinite())
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        samples = f"{'; '.join(names[:8])}{more}"
        raise NonFinite(f"step {step}: {', '.join(bad)}\n  Samples: {samples}")


def total_counts(runtime, batches):
    """{name of COUNTED: how many there are in all batches of all processes}"""
    counts = [sum(count_of(b, name) for b in batches) for name in COUNTED]
    total = torch.tensor(counts, dtype=torch.float32, device=runtime.device)
    if runtime.world_size > 1:
        dist.all_reduce(total)
    # what nobody counted divides nothing
    return dict(zip(COUNTED, total.clamp(min=1)))


def prepare_batch(cfg, runtime, batch):
    """To the device, without what --ablate takes away."""
    if cfg.ablate:
        batch |= {"keep_regions": TASKS[cfg.task].keep_regions}
        batch = ablate_modality(batch, cfg.ablate)
    return to_device(batch, runtime.device)


def all_reduce_gradients(runtime, model):
    """Sum the gradients of all processes, in one message. A head that no process trained in this
    step stays without one, so that the optimiser leaves it alone, as on one process.
    """
    if runtime.world_size == 1:
        return
    params = list(model.parameters())
    trained = [p.grad is not None for p in params]
    trained = torch.tensor(trained, dtype=torch.int32, device=runtime.device)
    dist.all_reduce(trained, dist.ReduceOp.MAX)
    params = [p for p, has_grad in zip(params, trained.tolist()) if has_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    # hundreds of small messages would wait for each other
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    for p, part in zip(params, flat.split([p.numel() for p in params])):
        p.grad = part.view_as(p)


@torch.inference_mode()
def validate(cfg, runtime, model, streams, samples=300):
    """Accuracy in percent of each task over so many predictions, of at most so many batches"""
    accuracy = {}
    model.eval()
    for name, stream in streams.items():
        right, n, k = 0.0, 0, 0
        # of patches in which a detector sees nothing there is no prediction to count
        while max(n, k) < samples:
            batch = prepare_batch(cfg, runtime, stream[k])
            # multitask pre-training validates GQA's questions too
            task = name if name in TASKS else cfg.task
            with runtime.autocast():
                hits = OBJECTIVES[batch["task"]][1](cfg, model, batch | {"of": task})
            right, n, k = right + hits.float().sum(), n + len(hits), k + 1
        accuracy[f"val/{name}"] = 100 * right.item() / max(n, 1)
    model.train()
    return accuracy


# Which predictions of a validation batch are right: (B,) or (K,).


def hits_words(cfg, model, batch):
    """Masked words"""
    out = model(**batch["input"], masked_words=batch["masked_words"])
    return out.word_logits.argmax(-1) == batch["word_targets"]


def hits_classes(cfg, model, batch):
    """Masked regions' classes; of patches those that show anything"""
    places = {k: batch[k] for k in ("masked_regions", "hidden_regions") if k in batch}
    out = model(**batch["input"], **places, heads=("classes",))
    found, probs = out.region_logits[:, 1:], batch["region_probs"][:, 1:]
    return (found.argmax(-1) == probs.argmax(-1))[probs.any(-1) | ("hidden_regions" not in batch)]


def hits_features(cfg, model, batch):
    """Masked regions' features: nearer to the region's own than to the batch's mean feature"""
    masked = batch["masked_regions"]
    out = model(**batch["input"], masked_regions=masked, heads=("features",))
    own = batch["input"]["regions"].flatten(0, 1)[masked].float()
    error = (out.region_features - own).square().sum(-1)
    return error < (own.mean(0) - own).square().sum(-1)


def hits_matching(cfg, model, batch):
    """Matched or not"""
    return model(**batch["input"], heads=("match",)).match.argmax(-1) == batch["match"].long()


def hits_ranking(cfg, model, batch):
    """The matched pair outscores all of its group"""
    wrong = torch.cat([model(**b, heads=("rank",)).rank for b in batch["negatives"]])
    best = wrong[batch["order"]].max(dim=1).values
    return model(**batch["positive"], heads=("rank",)).rank > best


def hits_phrases(cfg, model, batch):
    """MAF: the own image before all others of the batch"""
    e, v, masks = phrase_vectors(cfg, model, batch)
    return losses.maf_similarity(e, v, *masks[1:]).argmax(dim=1) == batch["own"]


def hits_contrast(cfg, model, batch):
    """ALBEF: the own image before all others of the batch"""
    student = model.student
    image = student.vision(normalize_pixels(batch["pixels"]))
    words = student.read(batch["text"], batch["text_mask"])
    image, words = student.features(image, words)
    return (words @ image.T).argmax(dim=1) == batch["own"]


def hits_task(cfg, model, batch):
    """A downstream task: the highest score, or how right it is"""
    task = TASKS[batch["of"]]
    out = model(**batch["input"], heads=(task.output,))
    best = task.scores(out, batch, task.group(dataclasses.asdict(cfg))).argmax(dim=1)
    if task.soft:
        return batch["target"].gather(1, best[:, None])[:, 0]
    return best == batch["target"]


# of each kind of batch: what is trained on it, what is validated
OBJECTIVES = {
    "mlm": (objective_mlm, hits_words),
    "itm": (objective_itm, hits_matching),
    "rank": (objective_rank, hits_ranking),
    "mrfr": (objective_regions, hits_features),
    "mrc": (objective_regions, hits_classes),
    "mrckl": (objective_regions, hits_classes),
    "multitask": (objective_multitask, None),
    "maf": (objective_maf, hits_phrases),
    "albef": (objective_albef, hits_contrast),
    "examples": (objective_task, hits_task),
}


def prepare_out(cfg, runtime):
    """Where to start: None in a new folder, or the checkpoint of the same configuration."""
    out = Path(cfg.out)
    mark = out / "seen-by-all"
    if runtime.is_main:
        out.mkdir(parents=True, exist_ok=True)
        mark.touch()
    runtime.barrier()
    if not all(gathered(mark.exists())):
        found = f"--out {out} is not one folder for all {runtime.world_size} processes"
        hint = "Checkpoints and mined negatives go there: choose a folder that all machines share."
        raise UserError(found, hint=hint)
    if runtime.is_main:
        mark.unlink()
    if not (out / "last.pt").exists():
        if runtime.is_main:
            # of a run that never saved
            for left in out.glob("hard-*.npy"):
                left.unlink()
        return None
    saved = read_checkpoint(out / "last.pt")
    # where things are and how often they are saved may change, numbers may not
    was, now, different = saved.config, dataclasses.asdict(cfg), []
    for name in now.keys() - NO_NUMBERS:
        if was.get(name) != now[name]:
            there = was.get(name, "nothing")
            different.append(f"--{name.replace('_', '-')} {there} there, {now[name]} here")
    if different:
        found = f"{out} holds a run of another configuration: {'; '.join(sorted(different))}"
        raise UserError(found, hint="Choose another --out, or delete that folder.")
    if not cfg.resume:
        state = "finished" if saved.step == cfg.steps else f"at step {saved.step} of {cfg.steps}"
        hint = "Go on with --resume (a finished run prints its numbers again), or choose another"
        raise UserError(f"{out} holds this run already, {state}", hint=f"{hint} --out.")
    return saved


def train(cfg, runtime):
    """One run from start (or checkpoint) to end; returns its final numbers."""
    cfg, first = first_run(cfg)
    precision = "fp32" if runtime.autocast is contextlib.nullcontext else "bf16"
    runtime.print_rank0(
        f"{cfg.recipe}: {cfg.task}, loss {cfg.loss}, seed {cfg.seed}, "
        f"{runtime.world_size} x {runtime.device.type}, {precision}"
    )
    saved = prepare_out(cfg, runtime)
    runtime.barrier()
    tokenizer, settings = load_tokenizer(cfg), dataclasses.asdict(cfg)
    list_answers = all_answers if cfg.is_multitask else TASKS[cfg.task].answers
    settings["answer_list"] = list_answers(cfg.data)
    run = Run(None, tokenizer, settings, {}, vision_of(settings), runtime.autocast)
    streams = load_streams(cfg, runtime, run)
    if first:
        # only now: if this run's own data were missing, the error came before hours of training
        train(first, runtime)
    model = build_model(cfg, runtime, tokenizer, streams)
    optimizer, start = build_optimizer(cfg, model), 0
    # what evaluate.py needs to build the same model
    sizes = model_sizes(cfg, tokenizer, streams) | {"size": cfg.size}
    sizes |= {"new_words": getattr(tokenizer, "new_words", 0), "answer_list": streams.answer_list}
    if saved:
        model.load_state_dict(saved.model)
        optimizer.load_state_dict(saved.optimizer)
        start = saved.step
        runtime.print_rank0(f"  going on after step {start}")
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    runtime.print_rank0(f"  {parameters:.1f} M parameters, {cfg.steps} steps -> {cfg.out}")
    log = Log(cfg, runtime, start)
    run = run._replace(model=model, sizes=sizes)
    run_loop(cfg, runtime, run, optimizer, streams, start, log)
    return finalize(cfg, runtime, run, log)


def run_loop(cfg, runtime, run, optimizer, streams, start, log):
    """The updates from start on: step, log, validate, save."""
    compiled = model = run.model
    if cfg.compile:
        # a graph for each set of heads and maps, in training and in validation, of all shapes
        torch._dynamo.config.recompile_limit = 64
        # the parts of a loss go back through one graph, each once
        torch._functorch.config.donated_buffer = not cfg.log_shares
        compiled = torch.compile(model, dynamic=True)
    began, num_pairs, unchecked = time.time(), 0, None
    title, hidden = f"{cfg.recipe} {cfg.loss}", None if runtime.is_main else True
    bar = tqdm(range(start + 1, cfg.steps + 1), title, cfg.steps, initial=start, disable=hidden)
    tracked = benchmarks_of(cfg, run)[0] if cfg.track else ()
    if start == 0 and tracked:
        log.write({"step": 0, **measured(tracked, run)})
    model.train()
    for step, batches in zip(bar, load_batches(cfg, runtime, compiled, streams, start)):
        how = cfg, runtime, compiled, optimizer, streams.train, step, batches
        logged, norm, names = train_step(*how)
        if unchecked:
            check_finite(*unchecked)
        unchecked = step, logged, norm, names
        num_pairs += runtime.world_size * sum(len(b["names"]) for b in batches)
        note_unreadable(cfg, batches)
        is_last = step == cfg.steps
        if step % cfg.save_every == 0 or is_last:
            check_finite(*unchecked)
        if step % cfg.log_every == 0 or is_last:
            line, seconds = {k: round(v.item(), 5) for k, v in logged.items()}, time.time() - began
            bar.set_postfix(line)
            line |= {"norm": round(norm.item(), 4), "lr": optimizer.param_groups[0]["lr"]}
            line["pairs_per_s"] = round(num_pairs / seconds, 1)
            line["seconds_left"] = round(seconds / (step - start) * (cfg.steps - step), 1)
            log.write({"step": step, **line})
        if step % cfg.eval_every == 0 or is_last:
            accuracy = validate(cfg, runtime, compiled, streams.val)
            accuracy |= measured(tracked, run)
            if log.write({"step": step, **accuracy}) and cfg.keep_best and runtime.is_main:
                check_finite(*unchecked)
                save_checkpoint(Path(cfg.out) / "best.pt", cfg, model, optimizer, step, run.sizes)
        if (step % cfg.save_every == 0 or is_last) and runtime.is_main:
            if cfg.is_pretraining and hasattr(model, "rank"):
                # untrained so far: a fine-tuning run finds it started as it should be
                init_rank_from_match(model)
            save_checkpoint(Path(cfg.out) / "last.pt", cfg, model, optimizer, step, run.sizes)


def note_unreadable(cfg, batches):
    """Names of pictures that were left out, each once, to out/skipped.txt"""
    path, names = Path(cfg.out) / "skipped.txt", {n for b in batches for n in b["unreadable"]}
    known = set(path.read_text().split("\n")[:-1]) if names and path.exists() else set()
    if names - known:
        # one write: several processes may add to it
        with open(path, "a") as file:
            file.write("".join(f"{name}\n" for name in sorted(names - known)))


class Log:
    """out/log.jsonl, one JSON object a line; after a resume up to the checkpoint alone"""

    def __init__(self, cfg, runtime, start):
        self.path, self.on, self.last = Path(cfg.out) / "log.jsonl", runtime.is_main, {}
        self.best = -math.inf
        if not self.on:
            return
        old = self.path.read_text().splitlines() if start and self.path.exists() else []
        # a kill may have cut the last line
        whole = [line for line in old if line.endswith("}")]
        kept = [line for line in whole if json.loads(line)["step"] <= start]
        write_atomic(self.path, "".join(line + "\n" for line in kept))
        for line in kept:
            self.note(json.loads(line))

    def note(self, record):
        """Keep a line's numbers; is its mean validation above all before?"""
        self.last |= record
        values = [value for name, value in record.items() if name.startswith("val/")]
        mean = sum(values) / len(values) if values else -math.inf
        was, self.best = self.best, max(self.best, mean)
        return mean > was

    def write(self, record):
        """Append a line; as note()"""
        if self.on:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
        return self.note(record)


def first_run(cfg):
    """(cfg with a checkpoint in place of --init's recipe, settings of the run that makes it); None
    instead of these where --init names no recipe, or that run is finished.
    """
    if cfg.init not in RECIPES:
        return cfg, None
    # data, seed, size and machine are this run's, all else is that recipe's
    shared = "data regions seed size precision compile workers".split()
    # pre-training on patches may begin from regions
    if not cfg.is_pretraining or "vision" in RECIPES[cfg.init]:
        shared += ["vision", "resolution", "patch"]
    changes = {name: getattr(cfg, name) for name in shared} | {"resume": True}
    if cfg.model != RECIPES[cfg.init].get("model", "uniter"):
        changes["model"] = cfg.model
    first = make_config(cfg.init, **changes)
    settings = dataclasses.asdict(first).items()
    numbers = {k: v for k, v in settings if k not in NO_NUMBERS - {"data"}}
    # other settings, another folder: two different runs never meet
    digest = hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()[:8]
    typed, first.out = first.out, f"out/{cfg.init}-seed{cfg.seed}-{digest}"
    if (Path(typed) / "done.json").exists():
        # the recipe was typed by itself: its folder serves if all of its numbers are these
        was = read_checkpoint(f"{typed}/last.pt").config
        if all(was.get(name) == value for name, value in numbers.items()):
            first.out = typed
    done = (Path(first.out) / "done.json").exists()
    return dataclasses.replace(cfg, init=f"{first.out}/last.pt"), None if done else first


# 10. The end of a run ---------------------------------------------------------------------------


def benchmarks_of(cfg, run):
    """What a run is measured on and drawn as: ([benchmark], [figure function])."""
    task = TASKS[cfg.task]
    if task.reader:
        return [functools.partial(evaluate.downstream, ablate=cfg.ablate)], []
    if not (Path(cfg.data) / "winoground").exists() or vocabulary_task(cfg) != cfg.task:
        return [], []
    benchmarks, draw = evaluate.benchmarks_of(run.settings)
    # at full size retrieval takes hours: evaluate.py --task retrieval
    return benchmarks + [evaluate.retrieval] * (cfg.recipe == "toy-retrieval"), draw


def measured(benchmarks, run):
    """The numbers of all of them"""
    return {k: v for benchmark in benchmarks for k, v in benchmark(run).items()}


def without_loss(cfg):
    """{without_loss/name: number} of the same run with --loss none, where that can be read"""
    out, numbers = cfg.out.replace(f"{cfg.recipe}-{cfg.loss}", f"{cfg.recipe}-none"), {}
    done, results = Path(out) / "done.json", Path(__file__).resolve().parent / "tests/results.json"
    with contextlib.suppress(OSError, ValueError, KeyError):
        if out != cfg.out and done.exists():
            numbers = json.loads(done.read_text())
        elif out != cfg.out and out == "out/toy-none-seed0":
            numbers = json.loads(results.read_text())["claims"]["first none"]["0"]
    wanted = "winoground/text", "winoground/image", "winoground/group"
    return {f"without_loss/{name}": numbers[name] for name in wanted if name in numbers}


def finalize(cfg, runtime, run, log):
    """Final benchmarks and figures, and where everything is; the numbers go to done.json too."""
    numbers = {k: v for k, v in log.last.items() if k.startswith("val/")}
    benchmarks, draw = benchmarks_of(cfg, run)
    figures = Path(cfg.out) / "figures"
    # all processes: they share the examples out
    numbers |= measured(benchmarks, run) | without_loss(cfg)
    if runtime.is_main:
        # first of all: a figure may lack a picture
        write_atomic(Path(cfg.out) / "done.json", json.dumps(numbers, indent=1))
        runs = {f"{cfg.recipe} {cfg.loss}": run}
        if draw and (Path(cfg.init).parent / "done.json").exists():
            # one of ours: figures show what fine-tuning has changed
            start = evaluate.load_run(cfg.init, cfg.data, cfg.regions)
            start = start._replace(model=start.model.to(runtime.device), autocast=runtime.autocast)
            runs = {"before": start} | runs
        for figure in draw:
            figure(runs, figures)
        evaluate.training_curve(log.path, figures / "curve.png")
        runtime.print_rank0(f"  {cfg.out}: last.pt, log.jsonl, done.json, figures/")
        skipped = Path(cfg.out) / "skipped.txt"
        if skipped.exists():
            names = set(skipped.read_text().split("\n")[:-1])
            runtime.print_rank0(f"  {len(names):,} pictures could not be read: {skipped}")
    runtime.barrier()
    return numbers


def make_toy_tree(folder):
    """The default data tree, where it is missing or of an older version."""
    # in a process of its own: the generator is test data, which nothing here imports
    script = Path(__file__).resolve().parent / "tests" / "toy.py"
    command = [sys.executable, str(script), "--if-needed", "--out", str(folder)]
    if subprocess.run(command).returncode:
        hint = f"Try it alone: python tests/toy.py --out {folder}"
        raise UserError(f"{folder} could not be made", hint=hint)


def main(argv=None):
    """Parse, set up, train, print the numbers"""
    try:
        cfg = parse(argv)
        runtime = setup_runtime(cfg)
        if runtime.is_main and cfg.data == Config.data:
            make_toy_tree(cfg.data)
        runtime.barrier()
        numbers = train(cfg, runtime)
        runtime.print_rank0(json.dumps({k: round(v, 2) for k, v in numbers.items()}))
    except NonFinite as error:
        # only the process that met it knows its samples
        sys.exit(f"train.py: error: {error}")
    except (DataError, CheckpointError, OSError) as error:
        # a loader process wraps its error into a stack trace
        evaluate.fail("train.py", str(error).split("DataError: ")[-1].strip())
    except KeyboardInterrupt:
        sys.exit("train.py: stopped; go on with --resume")


# 11. Recipes ------------------------------------------------------------------------------------
# One dict per experiment: only what differs from the defaults of Config. "init" may name another
# recipe: it is run first.

# of runs of hours: a checkpoint takes seconds and gigabytes
RARELY = dict(save_every=1000, eval_every=1000)
CHECKPOINTS, BERT = "{data}/checkpoints/", "{data}/bert-base-uncased/pytorch_model.bin"
TOY = dict(size="toy", init="toy-pretrain", dropout=0.0)
TOY |= dict(warmup=50, batch_tokens=2048, lr=3e-4, clip=2.0)
# with a rate of 7e-4 nothing was learned [ours]
TOY_NLVR = TOY | dict(task="nlvr", cased=False, batch_tokens=1024, lr=5e-4)
# Small batches and much masking: what breaks the plateau before "left" is distinguished from
# "right" is the number of updates [ours]
TOY_PRETRAIN = dict(task="pretrain", pretrain="mlm:4+itm:1", size="toy", dropout=0.0, steps=6000)
TOY_PRETRAIN |= dict(warmup=200, batch_tokens=1024, lr=5e-4, mask_rate=0.4, clip=5.0)
TOY_PRETRAIN |= dict(save_every=500, eval_every=500)
TOY_PATCHES = TOY_PRETRAIN | dict(vision="patches")
BASE = RARELY | dict(size="base", init=CHECKPOINTS + "uniter-base.pt")
LARGE = RARELY | dict(size="large", init=CHECKPOINTS + "uniter-large.pt")
# UNITER [authors' code: config/*.json]: batch_tokens x accumulate x gpus
PRETRAIN = RARELY | dict(task="pretrain", pretrain="mlm:2+itm:2+mrfr:1+mrckl:1+wra", size="base")
PRETRAIN |= dict(init=CHECKPOINTS + "uniter-base-init.pt", steps=200_000, warmup=10_000)
PRETRAIN |= dict(batch_tokens=10240, gpus=8, lr=5e-5, clip=5.0)
ALL_DATA = PRETRAIN | dict(corpora="coco:2+vg:3+cc3m:3+sbu:2")
ALL_DATA |= dict(pretrain="mlm:4+itm:3+mrfr:2+mrckl:2+wra")
# Kervadec et al. sec. 6.3: 512 pairs of 20 + 36 tokens on four GPUs, 20 epochs of 9.18 M pairs; the
# rest is LXMERT's code
TWO_STREAM = RARELY | dict(model="lxmert", cased=False, max_words=18, size="base", beta2=0.999)
TWO_STREAM |= dict(optimizer="bertadam", schedule="linear-from-0")
KERVADEC = TWO_STREAM | dict(task="pretrain", pretrain="multitask", loss="align")
KERVADEC |= dict(split="train_balanced+val_balanced", align_schedule="constant", steps=358_600)
KERVADEC |= dict(warmup=17_930, batch_size=128, gpus=4, lr=1e-4, clip=1.0)
MAF = dict(task="grounding", loss="maf", cased=False, batch_size=64, lr=1e-5, eps=1e-8)
MAF |= dict(beta2=0.999, weight_decay=0.0, clip=0.0, schedule="constant", warmup=0)
# ALBEF and AMC [their code: configs/*.yaml]. An epoch of ALBEF's 14 M images is 27,000
# updates
PICTURES = RARELY | dict(model="albef", task="pretrain", vision="patches", size="base")
PICTURES |= dict(cased=False, max_words=24, batch_size=64, gpus=8, clip=0.0)
PICTURES |= dict(eps=1e-8, beta2=0.999, weight_decay=0.02)
PICTURES |= dict(schedule="cosine", warmup=2000, align_schedule="constant")
AMC_BASE = PICTURES | dict(loss="amc", triplets="box+region", steps=40_000, lr=1e-5)
AMC_BASE |= dict(init=CHECKPOINTS + "ALBEF.pth")
TOY_PICTURES = PICTURES | dict(size="toy", gpus=1, patch=8, dropout=0.0, batch_size=48, queue=480)
TOY_PICTURES |= dict(warmup=200, beta2=0.98, weight_decay=0.01, clip=2.0, augment="flip")
TOY_PICTURES |= dict(min_box_area=0.01, save_every=500, eval_every=500)
# the hard negatives of UNITER's code; CACR's and IAIS's experiment
# 8 text and 8 image anchors a GPU
RANKING = dict(task="retrieval", steps=5000, warmup=500, lr=5e-5, batch_size=1, accumulate=16)
RANKING |= dict(gpus=8, negatives=31, candidates=399, alternate=True)
# [UNITER sec. A.2]
MINED = BASE | dict(task="retrieval", negatives=2)
VCR_STAGE = dict(task="pretrain", corpora="vcr", steps=45_000, warmup=4500, max_words=220)
VCR_STAGE |= dict(batch_tokens=6144, accumulate=4, gpus=4, lr=3e-5, clip=0.0)
VCR = dict(task="vcr", steps=8000, warmup=800, batch_tokens=4000, accumulate=5, gpus=4)
VCR |= dict(lr=6e-5, max_words=220)
RE = BASE | dict(task="re", keep_best=True, seed=24, batch_size=128)
RE |= dict(steps=24_000, warmup=1500, lr=1e-4)
VQA_ALL = dict(task="vqa", split="train2014+val2014+vg", head_lr=10.0)

RECIPES = {
    # toy experiments, minutes on two cores [ours]
    "toy-pretrain": TOY_PRETRAIN,
    "toy-short": TOY_PRETRAIN | dict(steps=2500, lr=7e-4),
    # Pictures: what words mean is learned from regions, then how things look [README]
    "toy-patches": TOY_PATCHES
    | dict(init="toy-short", corpora="crops:1+coco:3", steps=6500, lr=7e-4),
    "toy": TOY
    | dict(task="retrieval", dataset="coco", steps=180, warmup=40, batch_tokens=1536)
    | dict(negatives=3, candidates=8, alternate=True, save_every=100, eval_every=50)
    | dict(init="toy-short"),
    # towers, counts, walls, negation: drawn sentences, then NLVR's own among them
    "toy-boxes": TOY_NLVR | dict(split="drawn", init="toy-short", steps=6000, warmup=150),
    "toy-nlvr": TOY_NLVR | dict(split="test+drawn", init="toy-boxes", steps=4000),
    "toy-vqa": TOY | dict(task="vqa", steps=1500, head_lr=3.0),
    "toy-vcr": TOY | dict(task="vcr", steps=800, batch_tokens=512, max_words=220),
    "toy-nlvr2": TOY | dict(task="nlvr2", steps=1000),
    "toy-ve": TOY | dict(task="ve", steps=1200),
    "toy-re": TOY | dict(task="re", dataset="refcoco", steps=500),
    "toy-retrieval": TOY
    | dict(task="retrieval", steps=300, negatives=3, candidates=24, mine_pool=32),
    "toy-align": TWO_STREAM
    | dict(task="pretrain", pretrain="multitask", loss="align", align_schedule="constant")
    | dict(size="toy", dropout=0.0, split="train_balanced", optimizer="adamw", beta2=0.98)
    | dict(answers_start=0.25, steps=2400, warmup=200, batch_tokens=1024, lr=1e-3, clip=5.0)
    | dict(save_every=500, eval_every=500),
    "toy-gqa": TWO_STREAM
    | dict(task="gqa", init="toy-align", size="toy", dropout=0.0, optimizer="adamw", steps=800)
    | dict(warmup=50, batch_tokens=2048, lr=3e-4, beta2=0.98, save_every=200, eval_every=200),
    "toy-grounding": MAF | dict(steps=1000, lr=1e-3),
    "toy-albef": TOY_PICTURES | dict(corpora="crops:1+coco:1", steps=1000, lr=5e-4),
    "toy-amc-patches": TOY_PATCHES
    | dict(loss="amc", triplets="box+region", min_box_area=0.01, align_schedule="constant")
    | dict(init="toy-patches", pretrain="mlm:1+itm:2", steps=900, warmup=60, lr=2e-4),
    "toy-amc": TOY_PICTURES
    | dict(loss="amc", init="toy-albef", triplets="box+region", steps=400, lr=2e-4, warmup=40),
    # UNITER
    "uniter-pretrain": PRETRAIN | dict(corpora="coco+vg", accumulate=2),
    "uniter-pretrain-all": ALL_DATA | dict(accumulate=6),
    "uniter-pretrain-all-large": ALL_DATA
    | dict(size="large", init=CHECKPOINTS + "uniter-large-init.pt", steps=500_000)
    | dict(batch_tokens=6144, accumulate=4, gpus=16),
    "vcr-pretrain": BASE | VCR_STAGE | dict(pretrain="mlm:2+mrfr:1+mrckl:1"),
    "vcr-pretrain-large": LARGE | VCR_STAGE | dict(pretrain="mlm:10+mrfr:1+mrckl:1"),
    "vqa": BASE
    | VQA_ALL
    | dict(steps=6000, warmup=600, batch_tokens=5120, accumulate=5, gpus=4, lr=8e-5),
    "vqa-large": LARGE
    | VQA_ALL
    | dict(steps=5000, warmup=500, batch_tokens=3072, accumulate=4, gpus=8, lr=5e-5),
    "vcr": BASE | VCR | dict(init="vcr-pretrain"),
    "vcr-large": LARGE | VCR | dict(init="vcr-pretrain-large"),
    "nlvr2": BASE
    | dict(task="nlvr2", seed=77, steps=8000, warmup=800, batch_tokens=10240, lr=3e-5)
    | dict(skip_missing=True),
    "nlvr2-large": LARGE
    | dict(task="nlvr2", seed=24, steps=5000, warmup=500, batch_tokens=5120, accumulate=2)
    | dict(gpus=2, lr=2e-5, skip_missing=True),
    "ve": BASE
    | dict(task="ve", steps=4000, warmup=400, batch_tokens=4096, accumulate=4, gpus=2, lr=8e-5),
    "ve-large": LARGE
    | dict(task="ve", steps=4000, warmup=400, batch_tokens=4096, accumulate=2, gpus=4, lr=3e-5),
    "refcoco": RE | dict(dataset="refcoco"),
    "refcoco+": RE
    | dict(dataset="refcoco+", head="region-mlp", steps=10_000, warmup=1000, lr=6e-5),
    "refcocog": RE | dict(dataset="refcocog"),
    "retrieval-flickr30k": MINED
    | dict(batch_size=120, steps=16_000, warmup=1600, lr=5e-5, mine_every=2500),
    "retrieval-coco": MINED
    | dict(dataset="coco", batch_size=60, steps=20_000, warmup=2000, lr=2e-5, mine_every=4000),
    # Kervadec et al.; table 2 and 4: without alignment supervision; GQA is LXMERT's
    "kervadec": KERVADEC,
    "kervadec-without": KERVADEC | dict(loss="none"),
    "gqa": TWO_STREAM
    | dict(task="gqa", init="kervadec", split="train_balanced+val_balanced", steps=134_000)
    | dict(warmup=13_400, batch_size=32, lr=1e-5, clip=5.0),
    "kervadec-nlvr2": TWO_STREAM
    | dict(task="nlvr2", nlvr2_head="pair-mlp", init="kervadec", steps=10_800, warmup=1080)
    | dict(batch_size=32, lr=5e-5, clip=5.0, skip_missing=True),
    # ALBEF, and AMC with and without the boxes
    "albef": PICTURES
    | dict(corpora="coco+vg+cc3m+sbu+cc12m", steps=810_000, lr=1e-4)
    | dict(init=CHECKPOINTS + "deit_base_patch16_224-b5f2ef4d.pth+" + BERT),
    "amc": AMC_BASE,
    "amc-without": AMC_BASE | dict(loss="none"),
    # 25 epochs of 148,915 captions [MAF app. A]
    "maf": MAF | dict(steps=58_200),
    # CACR and IAIS
    "flickr30k": BASE | RANKING,
    "coco": BASE | RANKING | dict(dataset="coco"),
    "flickr30k-large": LARGE | RANKING,
    "coco-large": LARGE | RANKING | dict(dataset="coco", lr=3e-5),
}


if __name__ == "__main__":
    main()
