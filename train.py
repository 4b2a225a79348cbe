"""Train a word-region alignment model. One command, CPU to many GPUs:

    python train.py --loss cacr                                              toy data, two cores, minutes
    torchrun --nproc-per-node 8 train.py --loss cacr --recipe flickr30k --data DATA      the papers' experiment
"""
# Contents: 1 recipes  2 command line  3 where it runs  4 data  5 model  6 objectives  7 optimiser and schedule
#           8 checkpoint  9 the loop  10 last words
import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import difflib
import hashlib
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import evaluate
import losses
from data import (CORPORA, ENTAILMENT, REFER, VCR_WORDS, DataError, Mix, Names, PairBatches, Pairs, PhraseBatches, Phrases, PictureBatches, RankingBatches, RegionStore,
                  TaskBatches, TogetherBatches, WordPiece, Words, all_answers, bare, blind, clean_caption, coco_karpathy, ensure_toy, entities, flickr30k, gqa, gqa_records, held_out,
                  joined_descriptions, names_of, nlvr_pairs, normalised, open_store, regions_of, soft_target, vcr, vcr_store, vg_images, vg_questions, vg_triplets, vqa, write_atomic)
from evaluate import HEAD_OF, TYPES_OF, VALIDATION, answer_list_of, load_task, to
from model import SIZES, STACKS, CheckpointError, Maf, build, load_pretrained, read_checkpoint, start_rank_from_match

# 1. Recipes --------------------------------------------------------------------------------------------------------
# One dict per experiment: only what differs from the defaults of Config. "init" may name another recipe: it is run first.

TOY = dict(size="toy", init="toy-pretrain", dropout=0.0, warmup=50, units=2048, lr=3e-4, clip=2.0)
TOY_PRETRAIN = dict(task="pretrain", pretrain="mlm:4+itm:1", size="toy", dropout=0.0, steps=6000, warmup=200, units=1024, lr=5e-4, mask_rate=0.4, clip=5.0,
                    save_every=500, eval_every=500)
BASE = dict(size="base", init="{data}/checkpoints/uniter-base.pt")
LARGE = dict(size="large", init="{data}/checkpoints/uniter-large.pt")
PRETRAIN = dict(task="pretrain", pretrain="mlm:2+itm:2+mrfr:1+mrckl:1+wra", size="base", init="{data}/checkpoints/uniter-base-init.pt",
                steps=200_000, warmup=10_000, units=10240, lr=5e-5, clip=5.0)
ALL_DATA = PRETRAIN | dict(corpora="coco:2+vg:3+cc3m:3+sbu:2", pretrain="mlm:4+itm:3+mrfr:2+mrckl:2+wra")
# Kervadec et al. sec. 6.3: 512 pairs of 20 + 36 tokens on four GPUs, 20 epochs of 9.18 M pairs; the rest is LXMERT's code
TWO_STREAM = dict(model="lxmert", cased=False, max_words=18, size="base", beta2=0.999, optimizer="bertadam", schedule="linear-from-0")
KERVADEC = TWO_STREAM | dict(task="pretrain", pretrain="together", loss="align", split="train_balanced+val_balanced", align_schedule="constant",
                             steps=358_600, warmup=17_930, units=7168, lr=1e-4, clip=1.0)
MAF = dict(task="grounding", loss="maf", cased=False, units=64, lr=1e-5, eps=1e-8, beta2=0.999, weight_decay=0.0, clip=0.0, schedule="constant", warmup=0)
# ALBEF and AMC [their code: configs/*.yaml]; units are pairs a GPU; 8 GPUs. An epoch of ALBEF's 14 M images is 27,000 updates
PICTURES = dict(model="albef", task="pretrain", vision="patches", cased=False, max_words=24, size="base", units=64, eps=1e-8, beta2=0.999, weight_decay=0.02, clip=0.0,
                schedule="cosine", warmup=2000, align_schedule="constant")
AMC_BASE = PICTURES | dict(loss="amc", triplets="box+region", init="{data}/checkpoints/ALBEF.pth", steps=40_000, lr=1e-5)
TOY_PICTURES = PICTURES | dict(size="toy", patch=8, dropout=0.0, units=48, queue=480, warmup=200, beta2=0.98, weight_decay=0.01, clip=2.0, augment="flip", smallest=0.01, save_every=500, eval_every=500)
RANKING = dict(task="retrieval", steps=5000, warmup=500, units=2048, lr=5e-5, negatives=31, candidates=399, alternate=True)

RECIPES = {
    # Small batches and much masking: what breaks the plateau before "left" is told from "right" is the number of updates [ours]
    "toy-pretrain": TOY_PRETRAIN,
    # Pictures: first what things look like, on regions cut out of them, then where they stand. Without the first, shapes are not learned in time [measured: README]
    "toy-crops": TOY_PRETRAIN | dict(vision="patches", corpora="crops", steps=4000, lr=1e-3),
    "toy-patches": TOY_PRETRAIN | dict(vision="patches", init="toy-crops", steps=11_000),
    "toy": dict(task="retrieval", dataset="coco", size="toy", init="toy-pretrain", dropout=0.0, steps=400, warmup=40, units=1536, lr=3e-4, negatives=3,
                candidates=24, alternate=True, save_every=100, eval_every=100),
    "toy-nlvr": dict(task="nlvr", size="toy", init="toy-pretrain", dropout=0.1, steps=1500, warmup=150, units=2048, lr=2e-4),
    "toy-vqa": TOY | dict(task="vqa", steps=1500, head_lr=3.0),
    "toy-vcr": TOY | dict(task="vcr", steps=800, max_words=220),
    "toy-nlvr2": TOY | dict(task="nlvr2", steps=1000),
    "toy-ve": TOY | dict(task="ve", steps=1200),
    "toy-re": TOY | dict(task="re", dataset="refcoco", steps=500),
    "toy-retrieval": TOY | dict(task="retrieval", steps=300, negatives=3, candidates=24, mine_from=32),
    "toy-align": TWO_STREAM | dict(task="pretrain", pretrain="together", loss="align", align_schedule="constant", size="toy", dropout=0.0, split="train_balanced",
                                   optimizer="adamw", answers_from=0.25, steps=2400, warmup=200, units=1024, lr=1e-3, beta2=0.98, clip=5.0, save_every=500, eval_every=500),
    "toy-gqa": TWO_STREAM | dict(task="gqa", init="toy-align", size="toy", dropout=0.0, optimizer="adamw", steps=800, warmup=50, units=2048, lr=3e-4, beta2=0.98),
    "toy-grounding": MAF | dict(steps=1000, lr=1e-3),
    "toy-albef": TOY_PICTURES | dict(corpora="crops+coco", steps=1000, lr=5e-4),
    "toy-amc-patches": TOY_PRETRAIN | dict(loss="amc", vision="patches", triplets="box+region", smallest=0.01, init="toy-patches", pretrain="mlm:1+itm:2", steps=900,
                                           warmup=60, lr=2e-4, align_schedule="constant"),
    "toy-amc": TOY_PICTURES | dict(loss="amc", init="toy-albef", triplets="box+region", steps=400, lr=2e-4, warmup=40),
    # UNITER [authors' code: config/*.json]; 8 x (1 text + 1 image) anchors a GPU in retrieval. Units are a GPU's; how many GPUs: README
    "uniter-pretrain": PRETRAIN | dict(corpora="coco+vg", accumulate=2),
    "uniter-pretrain-all": ALL_DATA | dict(accumulate=6),
    "uniter-pretrain-all-large": ALL_DATA | dict(size="large", init="{data}/checkpoints/uniter-large-init.pt", steps=500_000, units=6144, accumulate=4),
    "vcr-pretrain": BASE | dict(task="pretrain", corpora="vcr", pretrain="mlm:2+mrfr:1+mrckl:1", steps=45_000, warmup=4500, units=6144, accumulate=4, lr=3e-5, clip=0.0, max_words=220),
    "vqa": BASE | dict(task="vqa", split="train2014+val2014", vg_questions=True, steps=6000, warmup=600, units=5120, accumulate=5, lr=8e-5, head_lr=10.0),
    "vqa-large": LARGE | dict(task="vqa", split="train2014+val2014", vg_questions=True, steps=5000, warmup=500, units=3072, accumulate=4, lr=5e-5, head_lr=10.0),
    "vcr": BASE | dict(task="vcr", init="vcr-pretrain", steps=8000, warmup=800, units=4000, accumulate=5, lr=6e-5, max_words=220),
    "vcr-large": LARGE | dict(task="vcr", steps=8000, warmup=800, units=4000, accumulate=5, lr=6e-5, max_words=220),
    "nlvr2": BASE | dict(task="nlvr2", seed=77, steps=8000, warmup=800, units=10240, lr=3e-5, skip_missing=True),
    "nlvr2-large": LARGE | dict(task="nlvr2", seed=24, steps=5000, warmup=500, units=5120, accumulate=2, lr=2e-5, skip_missing=True),
    "ve": BASE | dict(task="ve", steps=4000, warmup=400, units=4096, accumulate=4, lr=8e-5),
    "ve-large": LARGE | dict(task="ve", steps=4000, warmup=400, units=4096, accumulate=2, lr=3e-5),
    "refcoco": BASE | dict(task="re", dataset="refcoco", seed=24, steps=24_000, warmup=1500, units=4096, lr=1e-4),
    "refcoco+": BASE | dict(task="re", dataset="refcoco+", head="region-mlp", seed=24, steps=10_000, warmup=1000, units=4096, lr=6e-5),
    "refcocog": BASE | dict(task="re", dataset="refcocog", seed=24, steps=24_000, warmup=1500, units=4096, lr=1e-4),
    "retrieval-flickr30k": BASE | dict(task="retrieval", steps=16_000, warmup=1600, units=10240, lr=5e-5, negatives=2, mine_every=2500),      # [UNITER sec. A.2]
    "retrieval-coco": BASE | dict(task="retrieval", dataset="coco", steps=20_000, warmup=2000, units=10240, lr=2e-5, negatives=2, mine_every=4000),
    "kervadec": KERVADEC,
    "kervadec-without": KERVADEC | dict(loss="none"),                   # table 2 and 4: without alignment supervision
    "gqa": TWO_STREAM | dict(task="gqa", init="kervadec", split="train_balanced+val_balanced", steps=134_000, warmup=13_400, units=1792, lr=1e-5, clip=5.0),   # LXMERT's
    "kervadec-nlvr2": TWO_STREAM | dict(task="nlvr2", form="pair-mlp", init="kervadec", steps=10_800, warmup=1080, units=3584, lr=5e-5, clip=5.0, skip_missing=True),
    "albef": PICTURES | dict(corpora="coco+vg+cc3m+sbu+cc12m", init="{data}/checkpoints/deit_base_patch16_224-b5f2ef4d.pth", steps=810_000, lr=1e-4),
    "amc": AMC_BASE,
    "amc-without": AMC_BASE | dict(loss="none"),                        # the same pairs and updates, without the boxes
    "maf": MAF | dict(steps=58_200),                                    # 25 epochs of 148,915 captions [MAF app. A]
    "flickr30k": BASE | RANKING | dict(accumulate=16),              # the hard negatives of UNITER's code; CACR's and IAIS's experiment
    "coco": BASE | RANKING | dict(dataset="coco", accumulate=16),
    "flickr30k-large": LARGE | RANKING | dict(accumulate=16),
    "coco-large": LARGE | RANKING | dict(dataset="coco", accumulate=16, lr=3e-5),
}

# 2. Command line ---------------------------------------------------------------------------------------------------


def opt(default, help, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    """Every setting of a run, its default, and where the default is from."""
    recipe: str = opt("toy", "which experiment: its settings replace the defaults below; what you type replaces both")
    loss: str = opt("none", "alignment losses, joined by +: none, cacr, iais, iais-released, iais-distributed, wra; align (Kervadec), maf, and amc, amc-mean, amc-max, amc-cosine bring their own recipes")
    model: str = opt("uniter", "single-stream uniter, two-stream lxmert, or albef with a ViT, text and fusion encoder", ("uniter", "lxmert", "albef"))
    task: str = opt("retrieval", "what to learn; grounding: MAF", ("retrieval", "pretrain", "vqa", "gqa", "vcr", "nlvr2", "ve", "re", "nlvr", "grounding"))
    pretrain: str = opt("mlm+itm", "pre-training tasks, joined by +: mlm, itm, mrfr, mrc, mrckl, wra (goes with itm) [UNITER table 2]; mlm:3 triples a share; "
                        "or together: words, regions, matching, answers in each step [LXMERT, Kervadec sec. 4]")
    joint_masking: bool = opt(False, "mask words and regions of a pair at once [UNITER table 2, line 12]; else one of them, given the other")
    corpora: str = opt("coco", "pre-training data, joined by +: coco, vg, cc3m, sbu, vcr (second stage, alone); vg:3 triples a share [UNITER table 1]")
    dataset: str = opt("flickr30k", "retrieval: flickr30k or coco; re: refcoco, refcoco+ or refcocog")
    split: str = opt("", "what a downstream task learns from; its training split unless given; vqa and gqa join some by +. together: of GQA's questions")
    triplets: str = opt("", "pictures: learn from Visual Genome's texts with a box instead: box (objects, attributes, places), region (descriptions), box+region [AMC sec. 4.1]")
    smallest: float = opt(0.08, "triplets: boxes below this share of the image are left out [AMC sec. 4.1]")
    augment: str = opt("flip+jitter+grey", "albef: what happens to pictures, joined by +, or none: flip (texts and boxes too), jitter, grey [AMC sec. 4.1]")
    distill: float = opt(0.4, "albef: how much the momentum model's guesses count, after the warm-up [ALBEF's code]")
    momentum: float = opt(0.995, "albef: of the momentum model [ALBEF's code]")
    queue: int = opt(65536, "albef: pairs of the past that serve as negatives [ALBEF's code]")
    answers_from: float = opt(0.5, "together: answers count after this share of the run [Kervadec sec. 6.3]")
    use: str = opt("label+feature", "MAF: what makes a region's vector, of label, attribute, feature [MAF table 3]")
    phrases: str = opt("attention", "MAF: a phrase's vector [MAF table 3]", ("attention", "average"))
    start_f: str = opt("zero", "MAF: how W_f starts [MAF table 4]", ("zero", "xavier"))
    start_p: str = opt("identity", "MAF: how W_p starts, identity with small noise or xavier [MAF table 4]", ("identity", "xavier"))
    padding_counts: bool = opt(False, "MAF: padded words, phrases and regions take part [authors' code]")
    form: str = opt("pair-biattn", "how NLVR2's two images meet [UNITER table 5]; pair-mlp is LXMERT's", ("triplet", "pair", "pair-mlp", "pair-biattn"))
    head: str = opt("", "region-mlp gives re a second layer, as the released RefCOCO+ models", ("", "region-mlp"))
    task_loss: str = opt("", "vqa: bce; ve: bce [authors' code] or ce [UNITER sec. A.2]; re: ce, or rank (triplets, a third of them hardest)", ("", "bce", "ce", "rank"))
    vg_questions: bool = opt(False, "add Visual Genome's questions to VQA's [UNITER sec. A.2]")
    hide: str = opt("", "a control that may not see the words or the regions", ("", "text", "regions"))
    data: str = opt("data/toy", "the data tree; data/toy is made on first use")
    regions: str = opt("", "folder of the region stores; DATA/regions unless given")
    vision: str = opt("regions", "what an encoder sees: a detector's regions, or the picture in patches", ("regions", "patches"))
    resolution: int = opt(0, "patches: pictures become squares of so many pixels; 64 for --size toy, else 256 [AMC sec. 4.1]")
    patch: int = opt(16, "patches: of so many pixels [ALBEF]")
    out: str = opt("", "where the run goes; out/<recipe>-<loss>-<what else was typed>-seed<seed> unless given")
    seed: int = opt(0, "redraws weights, batches, masks and negatives")
    size: str = opt("base", "model size", tuple(SIZES))
    init: str = opt("", "start from: a checkpoint file, or a recipe to run first, or none")
    cased: bool = opt(True, "tokenize cased, as UNITER's checkpoints want")
    max_words: int = opt(60, "word pieces a caption; longer ones are cut [authors' code: dropped]")
    skip_missing: bool = opt(False, "train without captions whose image has no features; else they are an error")
    steps: int = opt(5000, "updates")
    units: int = opt(10240, "words + regions a batch on each process, padding counted [UNITER sec. A.2]")
    accumulate: int = opt(1, "batches an update")
    lr: float = opt(5e-5, "peak learning rate of AdamW [authors' code]")
    head_lr: float = opt(1.0, "the downstream head learns so many times faster [authors' code]")
    warmup: int = opt(500, "updates of linear warm-up; then as --schedule says")
    schedule: str = opt("linear", "linear to zero; cosine: to a tenth [ALBEF's code, there by epochs]; linear-from-0: the same counted from 0 [LXMERT's code]; noam; steps: up in quarters, down by fifths; constant",
                        ("linear", "cosine", "linear-from-0", "noam", "steps", "constant"))
    optimizer: str = opt("adamw", "adamw; bertadam has no bias correction and decays every weight [LXMERT's code]", ("adamw", "bertadam"))
    weight_decay: float = opt(0.01, "on matrices, not on biases and norms [UNITER sec. A.2]")
    beta2: float = opt(0.98, "AdamW's second beta [authors' code]; the first is 0.9")
    eps: float = opt(1e-6, "AdamW's epsilon [authors' code]")
    clip: float = opt(2.0, "largest gradient norm [authors' code]; 0 turns it off")
    dropout: float = opt(0.1, "on hidden states and attention [BERT]")
    mask_rate: float = opt(0.15, "share of words or regions masked in pre-training [UNITER sec. 3.2]")
    negatives: int = opt(2, "mismatched pairs a matched one in ranking: 2 [UNITER sec. 4.1], 31 [CACR sec. 4]")
    candidates: int = opt(0, "score so many negatives and train on the hardest: 399 [IAIS code]; 0 draws them at random")
    mine_every: int = opt(0, "mine hard negatives every so many updates; to the random ones one of the 20 hardest each way is added [UNITER sec. A.2]")
    mine_from: int = opt(128, "random images scored for each caption in mining [UNITER sec. A.2]")
    alternate: bool = opt(False, "text anchors and the language side one batch, image anchors and the vision side the next [IAIS code]")
    margin: float = opt(0.2, "of the ranking loss [authors' code]")
    align_weight: float = opt(1.0, "final weight of the alignment losses [ours]; the IAIS code's accumulation makes it 8")
    align_schedule: str = opt("exp", "how that weight comes in: exp [CACR sec. 4, IAIS code], linear, log, or constant", ("exp", "linear", "log", "constant"))
    cacr_on: str = opt("probs", "CACR on attention logits or probabilities [ours, measured: README]", ("logits", "probs"))
    wra_weight: float = opt(0.1, "weight of WRA in pre-training [authors' code]")
    precision: str = opt("auto", "auto: bf16 where the hardware multiplies it natively", ("auto", "fp32", "bf16"))
    compile: bool = opt(False, "torch.compile the model")
    workers: int = opt(-1, "loader processes; -1: 2 with a GPU, 0 without")
    resume: bool = opt(False, "go on from the run in --out, bit for bit on a CPU")
    save_every: int = opt(200, "updates between checkpoints")
    log_every: int = opt(10, "updates between log lines")
    eval_every: int = opt(200, "updates between validations")


PLACE = {"out", "resume", "workers", "save_every", "log_every", "data", "regions"}        # settings that change no number


class UserError(ValueError):
    """Something on the command line that cannot be; the message says what to type."""


def known(name, names, what):
    if name not in names:
        near = difflib.get_close_matches(name, names, 1, 0.4)
        raise UserError(f"{what} {name!r} is not known" + (f"; did you mean {near[0]}?" if near else "") + f"\n  There are: {', '.join(names)}")
    return name


def parse(argv):
    """Defaults, then the recipe, then what was typed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                                     epilog="recipes: " + ", ".join(RECIPES) + "      (the last line of output is one JSON object)")
    for f in dataclasses.fields(Config):
        name, note = "--" + f.name.replace("_", "-"), f"{f.metadata['help']} (default: {f.default if f.default != '' else 'empty'})".replace("%", "%%")
        if f.type in (bool, "bool"):
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=note)
        else:
            parser.add_argument(name, type=type(f.default), choices=f.metadata["choices"], default=argparse.SUPPRESS, help=note,
                                metavar=None if f.metadata["choices"] else f.name.upper())
    typed, unknown = parser.parse_known_args(argv)
    if unknown:
        options = [o for a in parser._actions for o in a.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], options, 1)
        raise UserError(f"{unknown[0]} is not an option" + (f"; did you mean {near[0]}?" if near else "; see --help"))
    typed = vars(typed)
    if "task" in typed:
        typed.setdefault("recipe", f"toy-{typed['task']}")
    if found := set(OWN_RECIPES) & set(typed.get("loss", "").split("+")):
        recipe = OWN_RECIPES[found.pop()]
        typed.setdefault("recipe", "toy-amc-patches" if recipe == "toy-amc" and typed.get("model", "albef") != "albef" else recipe)
    recipe = typed.pop("recipe", Config.recipe)
    return make_config(recipe, **typed)


OWN_RECIPES = {"align": "toy-align", "maf": "toy-grounding", **dict.fromkeys(("amc", "amc-mean", "amc-max", "amc-cosine"), "toy-amc")}


def make_config(recipe, **changes):
    cfg = Config(**{**RECIPES[known(recipe, RECIPES, "recipe")], **changes, "recipe": recipe})
    alignment_names(cfg), pretrain_shares(cfg), corpus_shares(cfg)
    if ("maf" in cfg.loss) != (cfg.task == "grounding") or "+maf" in cfg.loss or "maf+" in cfg.loss:
        raise UserError(f"--loss {cfg.loss} with --task {cfg.task}: maf learns phrases alone\n  Wanted: --loss maf, which chooses --task grounding by itself")
    if "align" in alignment_names(cfg) and (cfg.task, cfg.pretrain) != ("pretrain", "together"):
        raise UserError(f"--loss {cfg.loss} needs texts whose words point at boxes\n  Wanted: --recipe toy-align or kervadec, or --pretrain together")
    if cfg.model == "lxmert" and {"mrc", "mrckl"} & set(pretrain_shares(cfg)) or cfg.model == "uniter" and cfg.pretrain == "together":
        raise UserError(f"--pretrain {cfg.pretrain} is not for --model {cfg.model}\n  The two-stream model names masked regions in --pretrain together, the single stream in mrc, mrckl")
    if cfg.model != "uniter" and cfg.size not in STACKS:
        raise UserError(f"--size {cfg.size} is not for --model {cfg.model}\n  Wanted: {', '.join(STACKS)}")
    if cfg.model == "albef":
        if cfg.vision != "patches" or cfg.task != "pretrain" or set(alignment_names(cfg)) - set(AMC):
            raise UserError(f"--model albef with --vision {cfg.vision}, --task {cfg.task}, --loss {cfg.loss}\n  Wanted: --recipe toy-albef, toy-amc, albef or amc; --loss none, {', '.join(AMC)}")
        for part in cfg.augment.split("+"):
            known(part, ["", "none", "flip", "jitter", "grey"], "--augment")
        if cfg.units < 2:
            raise UserError("--units 1: with a single pair there is no negative\n  Wanted: at least 2")
    for part in cfg.triplets.split("+"):
        known(part, ["", "box", "region"], "--triplets")
    if cfg.triplets and (cfg.task, cfg.vision) != ("pretrain", "patches") or set(alignment_names(cfg)) & set(AMC) and not (cfg.triplets and "itm" in cfg.pretrain):
        raise UserError(f"--loss {cfg.loss} with --triplets {cfg.triplets or 'empty'}, --task {cfg.task}, --vision {cfg.vision}: heat maps are of pictures, and teaching them needs texts with boxes\n"
                        "  Wanted: --recipe toy-amc or amc (ALBEF), toy-amc-patches (--model uniter or lxmert), or --triplets with --task pretrain --vision patches, itm in --pretrain")
    for part in cfg.use.split("+"):
        known(part, ["label", "attribute", "feature"], "--use")
    cfg.regions = cfg.regions or f"{cfg.data}/regions"
    if cfg.vision == "patches":
        cfg.resolution = cfg.resolution or (64 if cfg.size == "toy" else 256)
        cfg.init = "toy-patches" if cfg.init == "toy-pretrain" else cfg.init
        if cfg.task in ("re", "vcr", "grounding"):
            raise UserError(f"--vision patches is not for --task {cfg.task}: it is about a detector's boxes")
    cfg.init = "" if cfg.init == "none" else cfg.init.replace("{data}", cfg.data)
    cfg.dataset = cfg.dataset if cfg.task != "re" or cfg.dataset != "flickr30k" else "refcoco"
    if cfg.task in ("re", "retrieval"):
        known(cfg.dataset, list(REFER) if cfg.task == "re" else ["flickr30k", "coco"], "--dataset")
    if cfg.hide and cfg.task not in VALIDATION:
        raise UserError(f"--hide {cfg.hide} is not for --task {cfg.task}\n  Wanted: {', '.join(VALIDATION)}")
    if cfg.task_loss not in {"vqa": ("", "bce"), "ve": ("", "bce", "ce"), "re": ("", "ce", "rank")}.get(cfg.task, ("",)):
        raise UserError(f"--task-loss {cfg.task_loss} is not for --task {cfg.task}\n  vqa: bce; ve: bce or ce; re: ce or rank")
    own = Config(**RECIPES[recipe])                 # the folder's name tells what is not as in the recipe, so that different runs have different folders
    told = "".join(f"-{name.replace('_', '-')}-{value}" for name, value in sorted(changes.items()) if name not in PLACE | {"loss", "seed"} and value != getattr(own, name))
    cfg.out = cfg.out or f"out/{recipe}-{cfg.loss}{re.sub(r'[^-.:+0-9A-Za-z]+', '_', told)}-seed{cfg.seed}"
    for name in ("steps", "units", "accumulate", "queue", "negatives", "mine_from", "save_every", "log_every", "eval_every"):
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: wanted at least 1")
    for name, legal, fits in (("seed", "0 or more", cfg.seed >= 0), ("answers_from", "0 to 1", 0 <= cfg.answers_from <= 1), ("lr", "more than 0", cfg.lr > 0), ("warmup", "0 or more", cfg.warmup >= 0),
                              ("dropout", "0 to below 1", 0 <= cfg.dropout < 1), ("mask_rate", "0 to 1", 0 <= cfg.mask_rate <= 1),
                              ("clip", "0 or more", cfg.clip >= 0), ("mine_every", "0 or more", cfg.mine_every >= 0), ("head_lr", "more than 0", cfg.head_lr > 0), ("candidates", "0 or more", cfg.candidates >= 0)):
        if not fits:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: wanted {legal}")
    if cfg.candidates and cfg.mine_every:
        raise UserError("--candidates and --mine-every are two ways to find hard negatives: choose one, set the other to 0")
    if cfg.candidates and cfg.candidates < cfg.negatives:
        raise UserError(f"--candidates {cfg.candidates} cannot hold --negatives {cfg.negatives} hardest ones; 0 draws negatives at random")
    return cfg


def alignment_names(cfg):
    return [known(name, [*ALIGNMENTS, "none"], "--loss") for name in cfg.loss.split("+") if name != "none"]


def read_shares(text, usual, option):
    """{name: share} of "a+b:3"; usual = {name: share unless told}."""
    shares = {}
    for part in text.split("+"):
        name, _, share = part.partition(":")
        known(name, list(usual), option)
        try:
            shares[name] = float(share or usual[name])
        except ValueError:
            raise UserError(f"{option} {part}: wanted a name, or name:share as in {name}:3") from None
    return shares


def pretrain_shares(cfg):
    """{task: share of the steps} from --pretrain; UNITER's own shares are the default."""
    return read_shares(cfg.pretrain, {"mlm": 2, "itm": 2, "mrfr": 1, "mrc": 1, "mrckl": 1, "wra": 0, "together": 1}, "--pretrain")     # [UNITER's code]


def corpus_shares(cfg):
    """{corpus: share of the steps} from --corpora, or --triplets alone. VCR has a vocabulary of its own, so it comes alone."""
    if cfg.triplets:
        return {"triplets": 1.0}
    shares = read_shares(cfg.corpora, {name: 1 for name in [*CORPORA, "vcr"]}, "--corpora")
    if "vcr" in shares and len(shares) > 1:
        raise UserError("--corpora vcr is a second stage with a vocabulary of its own\n  Wanted: vcr alone, with --init from the first stage")
    return shares


# 3. Where it runs --------------------------------------------------------------------------------------------------

@dataclass
class Place:
    """Device, process and precision of this run."""
    device: torch.device
    rank: int
    world: int
    bf16: bool

    @property
    def main(self):
        return self.rank == 0

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()

    def say(self, *words):
        if self.main:
            print(*words, flush=True)


def native_bf16():
    """Does this CPU multiply bf16 itself? Others emulate it, slower than float32."""
    with contextlib.suppress(OSError):
        return bool({"avx512_bf16", "amx_bf16"} & set(Path("/proc/cpuinfo").read_text().split()))
    return False


def keep_memory():
    """On a CPU let glibc keep what is freed: by default every large tensor is given back to the system and fetched, page by page and
    cleared, a moment later, which costs a tenth of a UNITER-base step (tests/bench.py). Elsewhere this does nothing."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for what, value in ((-4, 0), (-1, 2 ** 31 - 1), (-8, 1)):   # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX in malloc.h
            libc.mallopt(what, value)


def find_place(cfg):
    """One process, or one of several that torchrun started."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    else:
        device = torch.device("cpu")
        keep_memory()
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=2))
    bf16 = cfg.precision == "bf16" or cfg.precision == "auto" and (torch.cuda.is_bf16_supported() if device.type == "cuda" else native_bf16())
    return Place(device, rank, world, bf16)


# 4. Data -----------------------------------------------------------------------------------------------------------

def load_tokenizer(cfg):
    if cfg.task == "grounding":                     # MAF: every word of the phrases and every name of the detector that GloVe knows
        phrases = {bare(w) for split in ("train", "val", "test") for g in entities(cfg.data, split)[0] for p in g.phrases for w in p.words.split()}
        return Words(sorted({*phrases, *names_of(cfg.data, "objects"), *names_of(cfg.data, "attributes")} - {""}), cfg.data)
    new_words = VCR_WORDS if cfg.task == "vcr" or cfg.task == "pretrain" and cfg.corpora.startswith("vcr") else ()
    return WordPiece(Path(cfg.data) / ("bert-base-cased" if cfg.cased else "bert-base-uncased") / "vocab.txt", not cfg.cased, new_words)


class Streams(NamedTuple):
    """What a run learns from: see data.Mix."""
    train: list
    shares: list
    val: dict                                       # {name: validation stream}
    store: RegionStore                              # of the first, for the model's sizes
    answer_list: list = []                          # what a task head's outputs are called


def load_streams(cfg, place, tokenizer):
    share, units = dict(part=place.rank, parts=place.world), cfg.units * place.world

    def pairs(texts, store, name, told=None):
        found = Pairs(texts, store, tokenizer, cfg.max_words, name, cfg.skip_missing or name.startswith("cc3m"))       # many addresses are dead
        place.say(f"  {store}\n  {found}")
        tell(place, told or {})
        return found

    if cfg.task == "nlvr":
        (train, labels), (val, val_labels) = (nlvr_pairs(cfg.data, split, tokenizer, regions=regions_of(vars(cfg))) for split in ("test", "dev"))
        place.say(f"  {train}\n  {val}")
        make = lambda p, y, **k: PairBatches(p, "nlvr", units, cfg.seed, labels=y, **k)
        return Streams([make(train, labels, **share)], [1], {"nlvr": make(val, val_labels)}, train.store)
    if cfg.task == "grounding":
        return phrase_streams(cfg, place, tokenizer, share, units)
    if cfg.model == "albef":
        return picture_streams(cfg, place, tokenizer, share, units)
    if cfg.task == "pretrain" and cfg.pretrain == "together":
        return together_streams(cfg, place, pairs, share, units)
    if cfg.task == "pretrain":
        return pretraining_streams(cfg, place, pairs, share, units)
    if cfg.task == "retrieval":
        store = open_store(regions_of(vars(cfg)), cfg.dataset)
        train, val = (pairs({"coco": coco_karpathy, "flickr30k": flickr30k}[cfg.dataset](cfg.data, s), store, f"{cfg.dataset} {s}") for s in ("train", "val"))
        ranking = dict(negatives=cfg.negatives, candidates=cfg.candidates, alternate=cfg.alternate, mined=cfg.mine_every > 0)
        return Streams([RankingBatches(train, units, cfg.seed, **share, **ranking)], [1],
                       {"rank": RankingBatches(val, cfg.units, cfg.seed, negatives=cfg.negatives)}, store)
    names, told = answer_list_of(cfg.task, cfg.data), {"vqa": "train2014", "gqa": "train_balanced"}.get(cfg.task, "train")
    tasks = [load_task(dataclasses.asdict(cfg), tokenizer, split, names) for split in (cfg.split or told, VALIDATION[cfg.task])]
    for task in tasks:
        place.say(f"  {task.pairs.store}\n  {task.pairs}; {len(task.target):,} examples")
        tell(place, task.told)
    train, val = tasks
    return Streams([TaskBatches(train, units, cfg.seed, **share)], [1], {cfg.task: TaskBatches(val, cfg.units, cfg.seed)}, train.pairs.store, names)


def tell(place, told):
    """What was counted while reading."""
    for what, n in told.items():
        if n:
            place.say(f"    {n:,} {what}")


def pretraining_streams(cfg, place, pairs, share, units):
    """One stream for each pre-training task of each corpus."""
    shares, corpora = pretrain_shares(cfg), corpus_shares(cfg)
    tasks, streams, weights, val = [t for t in shares if t != "wra"], [], [], {}
    out = held_out(cfg.data) if set(corpora) - {"vcr"} else None
    for number, (corpus, weight) in enumerate(corpora.items()):
        found = {}
        for split in ("train", "val"):
            if corpus == "vcr":                     # second stage: question and answer, and with the reason, the right ones
                parts = [vcr(cfg.data, split, part, choices=False) for part in ("qa", "qar")]
                texts, told, store = [t for p in parts for t in p[0]], parts[0][1], vcr_store(cfg.regions)
            else:
                texts, told, store = corpus_texts(cfg, corpus, split, out)
            found[split] = pairs(texts, store, f"{corpus} {split}", told)
        for task in tasks:
            how = dict(mask_rate=cfg.mask_rate, joint=cfg.joint_masking, corpus=number)
            streams.append(PairBatches(found["train"], task, units, cfg.seed, **share, **how))
            weights.append(weight * shares[task])
            val[task if number == 0 else f"{corpus}/{task}"] = PairBatches(found["val"], task, cfg.units, cfg.seed, corpus=number)
    return Streams(streams, weights, val, streams[0].pairs.store)


def corpus_texts(cfg, corpus, split, out):
    """Texts of a corpus, what was counted, and its region store; "triplets": Visual Genome's texts with boxes, its descriptions to validate."""
    reader, *stores = CORPORA["vg" if corpus == "triplets" else corpus]
    if corpus == "triplets" and split == "train":
        texts, told = vg_triplets(cfg.data, cfg.triplets.split("+"), cfg.smallest, {str(i) for i, v in vg_images(cfg.data).items() if v.get("coco_id") in out.coco})
    else:
        texts, told = reader(cfg.data, split, out)
    return texts, told, open_store(regions_of(vars(cfg)), stores[split == "val"])


def together_streams(cfg, place, pairs, share, units):
    """LXMERT's and Kervadec's data: COCO's captions and VQA's questions; Visual Genome's joined descriptions, its questions, and GQA's.

    Each of the two region stores is a stream, drawn as often as it has texts. Left out: Karpathy's val and test, and GQA's val where it is
    not learned from.
    """
    names = all_answers(cfg.data)
    index, own = {a: i for i, a in enumerate(names)}, {t.image for t in coco_karpathy(cfg.data, "train")}
    judged = set() if "val" in cfg.split else {q["imageId"] for q in gqa_records(cfg.data, "val_balanced").values()}
    texts, told = {"coco": [t for t in coco_karpathy(cfg.data, "train")]}, {"coco": {}}
    for split in ("train2014", "val2014"):
        asked, count = vqa(cfg.data, split)
        texts["coco"] += [t._replace(target=soft_target(t.target.said, index)) for t in asked if t.image in own and t.target]
        told["coco"] |= count
    found = [joined_descriptions(cfg.data, judged), vg_questions(cfg.data, index, own=True, out=judged), *(gqa(cfg.data, s) for s in cfg.split.split("+"))]
    texts["vg"] = [t if not isinstance(t.target, str) else t._replace(target={index[t.target]: 1.0} if t.target in index else None) for part, _ in found for t in part]
    told["vg"] = {k: v for _, count in found for k, v in count.items()}
    streams = []
    for number, name in enumerate(texts):
        some = pairs(texts[name], open_store(regions_of(vars(cfg)), name), f"{name} train", told[name])
        meant = Names(some.pointed_words, cfg.data) if "align" in alignment_names(cfg) and len(some.pointed) else None
        place.say(f"    {len(np.unique(np.searchsorted(some.starts, some.pointed[:, 0], side='right'))):,} of them point at boxes, by {len(some.pointed):,} word pieces")
        if meant and meant.without:
            place.say(f"    {meant.without:,} of {len(some.pointed_words):,} pointed words have no GloVe vector: only their place counts")
        streams.append(TogetherBatches(some, units, cfg.seed, **share, mask_rate=cfg.mask_rate, corpus=number, answers=[t.target for t in some.texts], names=meant,
                                       align=losses.soft_alignment_target if meant else None))
    val = pairs(coco_karpathy(cfg.data, "val"), streams[0].pairs.store, "coco val")
    asked = load_task(dataclasses.asdict(cfg) | {"task": "gqa"}, streams[0].pairs.tokenizer, VALIDATION["gqa"], names)
    held = {task: PairBatches(val, task, cfg.units, cfg.seed) for task in ("mlm", "itm")} | {"gqa": TaskBatches(asked, cfg.units, cfg.seed)}
    return Streams(streams, [len(s.pairs.texts) for s in streams], held, streams[0].pairs.store, names)


def picture_streams(cfg, place, tokenizer, share, units):
    """ALBEF's corpora, or Visual Genome's texts with boxes (AMC), as pixels. Images that a task is judged on are left out, as UNITER sec. A.1."""
    out, streams, weights, val = held_out(cfg.data), [], [], {}
    augment = tuple(cfg.augment.split("+"))
    for number, (corpus, weight) in enumerate(corpus_shares(cfg).items()):
        for split in ("train", "val"):
            texts, told, store = corpus_texts(cfg, corpus, split, out)
            texts = [t._replace(text=clean_caption(t.text)) for t in texts]
            pairs = Pairs(texts, store, tokenizer, cfg.max_words, f"{corpus} {split}", True, ends=False)
            place.say(f"  {pairs.store}\n  {pairs}")
            tell(place, told)
            if split == "train":
                streams.append(PictureBatches(pairs, units, cfg.seed, **share, mask_rate=cfg.mask_rate, augment=augment, corpus=number))
                weights.append(weight)
            else:
                val["itc" if number == 0 else f"{corpus}/itc"] = PictureBatches(pairs, min(cfg.units, len(pairs.texts)), cfg.seed, corpus=number)
    return Streams(streams, weights, val, streams[0].pairs.store)


def phrase_streams(cfg, place, words, share, units):
    """MAF's data: Flickr30k Entities' phrases; their boxes only serve to judge."""
    streams, store = [], open_store(cfg.regions, "flickr30k")
    for split in ("train", "val"):
        found, told = entities(cfg.data, split)
        streams.append(PhraseBatches(Phrases(found, store, words, cfg.data, f"Flickr30k Entities {split}", cfg.skip_missing), units, cfg.seed, **(share if split == "train" else {})))
        place.say(f"  {store}\n  {streams[-1].phrases}")
        tell(place, told)
    return Streams(streams[:1], [1], {"maf": streams[1]}, store)


def load_batches(cfg, place, streams, start):
    """Iterator over the steps from start on; workers keep ahead of the model if there are any."""
    mix = Mix(streams.train, streams.shares, cfg.steps, cfg.seed, cfg.accumulate)
    workers = cfg.workers if cfg.workers >= 0 else 2 * (place.device.type == "cuda")
    return iter(torch.utils.data.DataLoader(mix, batch_size=None, sampler=range(start, cfg.steps), num_workers=workers, collate_fn=as_is,
                                            pin_memory=place.device.type == "cuda", persistent_workers=workers > 0))


def as_is(batch):
    """Batches are made whole by data.py: the loader only carries them."""
    return batch


# 5. Model ----------------------------------------------------------------------------------------------------------

def model_sizes(cfg, tokenizer, streams):
    """What the data and the task ask of the model; kept in the checkpoint."""
    if cfg.task == "grounding":
        return dict(model="maf", words=tokenizer.names, width=tokenizer.vectors.shape[1], features=store_width(streams.store), use=cfg.use.split("+"))
    if cfg.model == "albef":
        return dict(model="albef", vocab=len(tokenizer), queue=cfg.queue, resolution=cfg.resolution, patch=cfg.patch)
    vcr_words, two = "vcr" if tokenizer.new_words else cfg.task, cfg.model == "lxmert"
    head = cfg.form if cfg.task == "nlvr2" else cfg.head or HEAD_OF.get(cfg.task, "answers" if streams.answer_list else "")
    sizes = dict(model=cfg.model, vocab=len(tokenizer), features=store_width(streams.store), classes=(streams.store.classes or 1601) - two, types=TYPES_OF.get(vcr_words, 2),
                 head=head, answers=len(streams.answer_list), align="align" in alignment_names(cfg))
    return sizes | ({"attributes": len(names_of(cfg.data, "attributes"))} if two else {}) | ({"patch": cfg.patch} if cfg.vision == "patches" else {})


def build_model(cfg, place, tokenizer, streams):
    """A model of the recipe's size for this vocabulary, these features and this task, filled from --init."""
    torch.manual_seed(cfg.seed)
    sizes = model_sizes(cfg, tokenizer, streams)
    if cfg.task == "grounding":
        model = Maf(len(tokenizer), sizes["width"], sizes["features"], sizes["use"], (cfg.start_f, cfg.start_p))
        with torch.no_grad():
            model.word.weight.copy_(torch.from_numpy(tokenizer.vectors))
    else:
        model = build(sizes.pop("model"), cfg.size, **sizes, dropout=cfg.dropout)
    if cfg.init:
        place.say(f"  {cfg.init}: {load_pretrained(model, cfg.init, getattr(tokenizer, 'new_words', 0))}")
    return model.to(place.device)


def store_width(store):
    return store.read(np.array([0])).shape[-1]


# 6. Objectives -----------------------------------------------------------------------------------------------------
# Each takes the model and a batch and returns {name: loss}; a loss is a mean over count(batch) things.

# One side of each alignment loss: what the own modality's block should look like, given the other blocks. The language side
# gets (LL, LV, VL, VV, text, region), the vision side (VV, VL, LV, LL, region, text). attention_blocks says what they hold.
ALIGNMENTS = {
    "cacr": lambda own, cross, back, other, mask, other_mask: losses.cacr_side(own, cross, other, mask, other_mask),
    "iais": lambda own, cross, back, other, mask, other_mask: losses.iais_singular_side(own, cross, other, mask, other_mask),
    "iais-released": lambda own, cross, back, other, mask, other_mask: losses.iais_singular_released(own, cross, other, mask, other_mask),
    "iais-distributed": lambda own, cross, back, other, mask, other_mask: losses.iais_distributed_side(own, cross, back, mask, other_mask),
    "wra": None, "align": None, "maf": None,        # need no maps: hidden states, pointers, phrases
    "amc": None, "amc-mean": None, "amc-max": None, "amc-cosine": None,        # heat maps
}
NO_MAPS = {name for name, side in ALIGNMENTS.items() if side is None}


def attention_blocks(cfg, name, maps, text_mask, region_mask):
    """Blocks LL, LV, VL, VV as a loss wants them, (B, N, M): mean over heads of logits, or of probabilities."""
    if name == "iais" or name == "cacr" and cfg.cacr_on == "logits":
        return [S.float().mean(dim=1) for S in maps]
    if name == "cacr" and cfg.model == "lxmert":    # two streams: each block has a softmax of its own
        return [losses.block_softmax(S, mask) for S, mask in zip(maps, (text_mask, region_mask, text_mask, region_mask))]
    if name == "cacr":
        return [P.mean(dim=1) for P in losses.joint_softmax(*maps, text_mask, region_mask)]
    word_mask = content_words(text_mask)
    return [losses.block_softmax(S, mask) for S, mask in zip(maps, (word_mask, region_mask, word_mask, region_mask))]


def content_words(text_mask):
    """text_mask without [CLS] and [SEP]; a caption with no other word keeps them."""
    last = text_mask.sum(dim=1, keepdim=True) - 1
    place = torch.arange(text_mask.shape[1], device=text_mask.device)
    words = text_mask & (place > 0) & (place < last)
    return torch.where(words.any(dim=1, keepdim=True), words, text_mask)


def alignment(cfg, out, batch, anchor="both"):
    """{name: loss} of --loss on matched pairs; anchor "text" gives the language side, "image" the vision side, else their sum."""
    text_mask, region_mask = batch["text_mask"], batch["region_mask"]
    word_mask, found = content_words(text_mask), {}
    for name in alignment_names(cfg):
        if name == "wra":
            found[name] = losses.wra(out.words, out.regions, text_mask, region_mask)
        if name in NO_MAPS:
            continue
        LL, LV, VL, VV = attention_blocks(cfg, name, out.maps[0], text_mask, region_mask)
        side, found[name] = ALIGNMENTS[name], 0
        if anchor != "image":
            found[name] = found[name] + side(LL, LV, VL, VV, word_mask, region_mask)
        if anchor != "text":
            found[name] = found[name] + side(VV, VL, LV, LL, region_mask, word_mask)
    return found


def maps_wanted(cfg):
    return (-1,) if set(alignment_names(cfg)) - NO_MAPS else ()


def objective_mlm(cfg, model, batch):
    out = model(**batch["input"], masked_words=batch["masked_words"], hidden_regions=batch.get("hidden_regions"))
    return {"mlm": losses.mlm(out.word_logits, batch["word_targets"])}


def objective_regions(cfg, model, batch):
    """MRFR, MRC or MRC-kl; scaled as the authors' code does, whose means run over dimensions and classes too."""
    masked, task = batch["masked_regions"], batch["task"]
    out = model(**batch["input"], masked_regions=masked, heads=("features",) if task == "mrfr" else ("classes",))
    if task == "mrfr":
        target = batch["input"]["regions"].flatten(0, 1)[masked]
        return {"mrfr": losses.mrfr(out.region_features, target) / target.shape[-1]}
    probs = batch["region_probs"].float()
    return {task: losses.mrc(out.region_logits, probs) if task == "mrc" else losses.mrc_kl(out.region_logits, probs) / probs.shape[-1]}


def objective_itm(cfg, model, batch):
    """Matching; with wra in --pretrain UNITER's alignment term, with --loss the others, on the matched pairs of the batch; AMC's on those with a box."""
    heat = bool(set(AMC) & set(alignment_names(cfg)) and len(batch.get("boxed", ())))
    if heat:
        model = getattr(model, "_orig_mod", model)  # torch.compile has no second derivatives
    out = model(**batch["input"], heads=("match",), maps=maps_wanted(cfg), explain=heat)
    masks = batch["input"]["text_mask"], batch["input"]["region_mask"]
    found = {batch["task"]: losses.itm(out.match, batch["match"])}
    if cfg.task == "pretrain" and "wra" in pretrain_shares(cfg):
        found["wra/pretrain"] = losses.wra(out.words, out.regions, *masks, match=batch["match"])
    if heat:
        P, cut = out.explained
        found |= heat_losses(cfg, losses.gradcam(P, out.match[batch["boxed"], 1], masks[0], cut=cut)[batch["boxed"]], batch["region"])
    return found | matched_alignment(cfg, out, batch)


def matched_alignment(cfg, out, batch):
    """alignment() of the matched pairs of a batch that also has mismatched ones; a mean over all pairs, as the matching loss is."""
    rows = batch["match"].nonzero()[:, 0] if set(alignment_names(cfg)) - {"align"} else ()
    if not len(rows):
        return {}
    some = out._replace(words=out.words[rows], regions=out.regions[rows], maps=tuple(type(m)(*(S[rows] for S in m)) for m in out.maps))
    inputs = {"text_mask": batch["input"]["text_mask"][rows], "region_mask": batch["input"]["region_mask"][rows]}
    return {k: v * len(rows) / len(batch["match"]) for k, v in alignment(cfg, some, inputs).items()}


def objective_together(cfg, model, batch):
    """Every signal of Kervadec sec. 4 and 5 in one pass: words, masked regions (class, attribute, feature), matching, answers, pointers."""
    pointed = "aligned" in batch
    out = model(**batch["input"], masked_words=batch["masked_words"], masked_regions=batch["masked_regions"], hidden_regions=batch["hidden_regions"],
                heads=("classes", "match", "task", *(("align",) if pointed else ())), maps=maps_wanted(cfg))
    features = batch["region_features"]
    found = {"mlm": losses.mlm(out.word_logits, batch["word_targets"]), "itm": losses.itm(out.match, batch["match"]),
             "class": losses.detected(out.region_logits, batch["region_class"]), "attribute": losses.detected(out.attribute_logits, batch["region_attribute"]),
             "feature": losses.mrfr(out.region_features, features) / features.shape[-1],
             "answers": losses.mlm(out.scores[batch["answered"]], batch["answer"])}
    if pointed:
        A = out.alignment.flatten(0, 1)[batch["aligned"]]                                                 # (K, N_V)
        found["align"] = losses.word_object_alignment(A, batch["alignment"], batch["input"]["region_mask"][batch["aligned_row"]])
    return found | matched_alignment(cfg, out, batch)


def phrase_vectors(cfg, model, batch):
    """e (b, Q, d) of the phrases and v (B, K, d) of the regions, MAF eq. (1)-(3), and the masks that count."""
    masks = [torch.ones_like(batch[m]) if cfg.padding_counts else batch[m] for m in ("word_mask", "phrase_mask", "region_mask")]
    h, v = model(**batch["input"])
    own = slice(None) if len(batch["own"]) == len(v) else batch["own"]             # one process: all of them, in order
    if cfg.phrases == "average":
        p = (h * masks[0][..., None]).sum(dim=-2) / masks[0].sum(dim=-1, keepdim=True).clamp(min=1)
    else:
        p = losses.phrase_embedding(h, v[own], masks[0], masks[2][own])
    return model.project(p), v, masks


def objective_maf(cfg, model, batch):
    """A caption's phrases should find their regions in its own image rather than in the batch's others."""
    e, v, (_, phrase_mask, region_mask) = phrase_vectors(cfg, model, batch)
    similarity = losses.maf_similarity(e, v, phrase_mask, region_mask)
    if cfg.padding_counts:                          # sums over padded phrases, divided by the real ones [authors' code]
        similarity = similarity * phrase_mask.shape[1] / batch["phrase_mask"].sum(dim=1, keepdim=True)
    return {"maf": losses.maf(similarity, batch["own"])}


def objective_albef(cfg, model, batch):
    """ALBEF's three losses (Li et al. 2021), and AMC's on the pairs whose text describes a box.

    itc   against the momentum model's features of all processes' pairs and of the queue, targets softened by its own similarities
    itm   positives; each text with another image and each image with another text of all processes' pairs, the likelier the more similar
    mlm   in sight of the image, with the momentum model's guesses mixed in
    """
    student, teacher, text_mask, own = model.student, model.teacher, batch["text_mask"], batch["own"]
    alpha = cfg.distill * min(1.0, batch["number"] / cfg.accumulate / max(1, cfg.warmup))
    with torch.no_grad():
        model.temperature.clamp_(0.001, 0.5)
        model.follow(cfg.momentum)
        image_m = teacher.vision(pixels := normalised(batch["pixels"]))
        features_m = teacher.features(image_m, teacher.read(batch["text"], text_mask))
        image_known, text_known = (everyone(f.float()) for f in features_m)                         # (B, E), B = pairs of all processes
        candidates = [torch.cat([known, queue.T]) for known, queue in ((text_known, model.text_queue), (image_known, model.image_queue))]
    image, words = student.vision(pixels), student.read(batch["text"], text_mask)
    similarity = [f.float() @ c.T / model.temperature for f, c in zip(student.features(image, words), candidates)]        # image with texts, text with images
    with torch.no_grad():
        target = [losses.itc_targets(f.float() @ c.T / model.temperature, own, alpha) for f, c in zip(features_m, candidates)]
        other_text, other_image = (drawn(losses.negative_weights(s[:, :len(image_known)], own), u[own]) for s, u in zip(similarity, batch["draw"]))
        model.enqueue(image_known, text_known)
    found = {"itc": sum(losses.itc(s, t) for s, t in zip(similarity, target)) / 2}

    maps = set(AMC) & set(alignment_names(cfg)) and len(batch["boxed"])
    states, P = student.fuse(words, text_mask, image, explain=bool(maps))
    every_image, every_text, every_mask = everyone(image), everyone(words), everyone(text_mask)
    wrong, _ = student.fuse(torch.cat([words, every_text[other_text]]), torch.cat([text_mask, every_mask[other_text]]), torch.cat([every_image[other_image], image]))
    match = model.match(torch.cat([states[:, 0], wrong[:, 0]]))                                     # (3b, 2)
    found["itm"] = losses.itm(match, torch.arange(len(match), device=own.device) < len(own))

    seen, _ = student.fuse(student.read(batch["masked_text"], text_mask), text_mask, image)
    with torch.no_grad():
        seen_m, _ = teacher.fuse(teacher.read(batch["masked_text"], text_mask), text_mask, image_m)
        guess_m = teacher.name_words(seen_m, batch["masked_words"])
    found["mlm"] = losses.mlm_distilled(student.name_words(seen, batch["masked_words"]), batch["word_targets"], guess_m, alpha)
    if maps:
        found |= heat_losses(cfg, losses.gradcam(P, match[:len(own), 1], text_mask)[batch["boxed"]], batch["region"])
    return found


AMC = {"amc": losses.amc, "amc-mean": losses.amc_mean, "amc-max": losses.amc_max, "amc-cosine": losses.amc_cosine}


def heat_losses(cfg, A, region):
    """{name: loss} of AMC's losses: heat maps (M, patches) and what their texts describe (M, R, R)"""
    heat = heat_maps(A, region.shape[-1])
    return {name: AMC[name](heat, region.float()) for name in alignment_names(cfg) if name in AMC}


def heat_maps(A, size):
    """(b, patches) -> (b, size, size) in [0, 1]     AMC's code"""
    A = losses.unit_range(A.float())
    side = math.isqrt(A.shape[1])
    return torch.nn.functional.interpolate(A.view(-1, 1, side, side), (size, size), mode="bilinear", align_corners=False)[:, 0]


def drawn(weights, luck):
    """One column of each row (b, B), as likely as its weight; luck (b,) in [0, 1) decides. Where all weights vanish, any that is not 0 by rule."""
    share = (weights + 1e-9 * (weights > 0)).double().cumsum(dim=1)
    return (share > luck[:, None] * share[:, -1:]).int().argmax(dim=1)


class Gather(torch.autograd.Function):
    """Rows of all processes in the order of one process's batch; the gradient goes back to where each came from."""
    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.stack(parts, dim=1).flatten(0, 1)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank()::dist.get_world_size()]


def everyone(x):
    return Gather.apply(x) if dist.is_initialized() and dist.get_world_size() > 1 else x


def objective_rank(cfg, model, batch):
    """Ranking of each matched pair against its negatives; alignment on the matched pairs, which alone run with maps."""
    out = model(**batch["positive"], heads=("rank",), maps=maps_wanted(cfg))
    wrong = torch.cat([model(**b, heads=("rank",)).rank for b in batch["negatives"]])
    scores = torch.cat([out.rank[:, None], wrong[batch["order"]]], dim=1)                               # (G, 1 + K)
    return {"rank": losses.ranking(scores, cfg.margin), **alignment(cfg, out, batch["positive"], batch["anchor"])}


def objective_task(cfg, model, batch):
    """A downstream task; with --loss also the alignment of its texts and images."""
    x, task, target = batch["input"], batch["task"], batch["target"]
    out = model(**x, heads=("task",), maps=maps_wanted(cfg))
    if task in ("vqa", "gqa"):
        loss = losses.soft_answers(out.scores, target)
    elif task == "ve" and cfg.task_loss != "ce":
        loss = losses.soft_answers(out.scores, torch.nn.functional.one_hot(target, out.scores.shape[1]).float())
    elif task == "vcr":                             # four choices an example, each right or wrong by itself
        loss = losses.classify(out.scores, (torch.arange(4, device=target.device) == target[:, None]).flatten().long())
    elif task == "re" and cfg.task_loss == "rank":
        loss = losses.ranking(torch.stack([out.scores.gather(1, i[:, None])[:, 0] for i in (target, wrong_region(out.scores, x["region_mask"], target))], dim=1), cfg.margin)
    elif task == "re":
        loss = losses.pick_region(out.scores, x["region_mask"], target)
    else:
        loss = losses.classify(out.scores, target)
    return {task: loss, **alignment(cfg, out, x)}


def wrong_region(scores, region_mask, target, hard=0.3):
    """Another region of each row: the highest scored, or with probability 1 - hard any [authors' code]."""
    scores, may = scores.detach().float(), region_mask.scatter(1, target[:, None], False)
    may |= ~may.any(dim=1, keepdim=True) & region_mask              # one region alone is its own rival
    draw = torch.where(torch.rand(len(scores), 1, device=scores.device) < hard, scores, torch.rand_like(scores))
    return draw.masked_fill(~may, float("-inf")).argmax(dim=1)


OBJECTIVES = {**{task: objective_task for task in VALIDATION}, "mlm": objective_mlm, "itm": objective_itm, "nlvr": objective_itm, "rank": objective_rank,
              "mrfr": objective_regions, "mrc": objective_regions, "mrckl": objective_regions, "together": objective_together, "maf": objective_maf, "albef": objective_albef}
COUNTED = "mlm", "class", "attribute", "feature", "answers", "align", *AMC        # losses of one batch that are means over different things


def counts(batch):
    """How many things each loss of a batch is a mean over; "": those not named here. Masked words, masked regions, pairs, groups, texts with boxes."""
    alone = [len(batch[name]) for name in ("masked_words", "masked_regions") if name in batch and "counts" not in batch]
    usual = (alone or [len(batch["names"])])[0]
    named = dict.fromkeys(COUNTED, usual) if "counts" not in batch else dict.fromkeys(COUNTED, 0) | batch["counts"]
    return {"": usual, **named, **dict.fromkeys(AMC, len(batch.get("boxed", ())))}


@torch.no_grad()
def mine_hardest(cfg, place, model, stream, batch):
    """Score the candidates and keep the hardest: the highest-scored mismatched pairs of each group.  IAIS code"""
    captions, images = batch.pop("candidates")
    scores = evaluate.score_pairs(model, stream.pairs, captions.ravel(), images.ravel(), units=max(cfg.units, 8192), autocast=place.autocast)
    hardest = np.argsort(-scores.reshape(captions.shape), axis=1, kind="stable")[:, :cfg.negatives]
    rows = np.arange(len(captions))[:, None]
    return batch | stream.choose(captions[rows, hardest], images[rows, hardest])


@torch.no_grad()
def mine(cfg, place, model, stream, step):
    """Hard negatives for the next --mine-every updates: score random images for each caption, keep the hardest each way.

    The scores go to --out, so that a resumed run has the same; every process scores its share.                  UNITER sec. A.2
    """
    path = Path(cfg.out) / f"hard-{step}.npy"
    captions, images = stream.drawn(np.random.default_rng([cfg.seed, 13, step]), cfg.mine_from)
    if not path.exists():
        place.say(f"  mining hard negatives at step {step}: {captions.size:,} pairs")
        mine = np.arange(place.rank, len(captions), place.world)
        scores = evaluate.score_pairs(model, stream.pairs, captions[mine].ravel(), images[mine].ravel(), units=max(cfg.units, 8192),
                                      autocast=place.autocast, progress="mining").reshape(len(mine), -1)
        shares = [scores]
        if place.world > 1:
            shares = [None] * place.world
            dist.all_gather_object(shares, scores)
        whole = np.empty(captions.shape, np.float32)
        for rank, part in enumerate(shares):
            whole[rank::place.world] = part
        if place.main:
            with open(f"{path}.tmp", "wb") as file:
                np.save(file, whole)
            os.replace(f"{path}.tmp", path)
        if place.world > 1:
            dist.barrier()
    stream.remember(captions, images, np.load(path))


# 7. Optimiser and schedule -----------------------------------------------------------------------------------------

def make_optimizer(cfg, model):
    """AdamW; matrices decay, biases and norms do not (the authors' code also decays four norms of the region embedding and heads)."""
    groups, every = [], cfg.optimizer == "bertadam"
    for head in (False, True):
        some = [p for name, p in model.named_parameters() if p.requires_grad and name.startswith("task_head.") == head]
        groups += [{"params": [p for p in some if (p.dim() >= 2) == matrix], "weight_decay": cfg.weight_decay * (matrix or every), "scale": cfg.head_lr if head else 1.0}
                   for matrix in (True, False)]
    groups = [g for g in groups if g["params"]]
    settings = dict(lr=cfg.lr, betas=(0.9, cfg.beta2), eps=cfg.eps)
    return BertAdam(groups, settings) if every else torch.optim.AdamW(groups, **settings, fused=True)


class BertAdam(torch.optim.Optimizer):
    """w -= lr (m / (sqrt(v) + eps) + decay w):  Adam without bias correction, as BERT and LXMERT were trained.     LXMERT's code"""
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"m": torch.zeros_like(p), "v": torch.zeros_like(p)}
            grads, m, v = [p.grad for p in params], [self.state[p]["m"] for p in params], [self.state[p]["v"] for p in params]
            beta1, beta2 = group["betas"]
            torch._foreach_lerp_(m, grads, 1 - beta1)
            torch._foreach_mul_(v, beta2)
            torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
            change = torch._foreach_div(m, torch._foreach_add(torch._foreach_sqrt(v), group["eps"]))
            torch._foreach_add_(change, params, alpha=group["weight_decay"])
            torch._foreach_add_(params, change, alpha=-group["lr"])


def lr_at(step, peak, warmup, steps, schedule="linear", decay=None):
    """Rate of update `step` (the first is 1): linear up to the peak, then linear to 0, never below 1e-8.    UNITER's code

    linear-from-0: the first update counts as 0 and has rate 0 [LXMERT's code]; noam: 1 / sqrt(step) after the peak; constant: stays there;
    steps: 1/4, 2/4, 3/4 of the peak for a third of the warm-up each, later multiplied by decay = (from step, every, rate) [UNITER's code]
    """
    if schedule == "linear-from-0":
        step -= 1
    if schedule == "steps":
        start, every, rate = decay or (0.6 * steps, 0.1 * steps, 0.2)
        factor = min(1, (1 + 3 * step // max(1, warmup)) / 4) * rate ** max(0, math.ceil((step - start) / every))
    elif step < warmup:
        factor = step / warmup
    else:
        factor = {"cosine": 0.55 + 0.45 * math.cos(math.pi * min(1, (step - warmup) / max(1, steps - warmup))), "noam": math.sqrt(max(1, warmup) / max(1, step)), "constant": 1.0}.get(schedule, max(0.0, (steps - step) / max(1, steps - warmup)))
    return peak * factor if schedule == "linear-from-0" else max(peak * factor, 1e-8)


def alignment_weight(step, steps, schedule="exp"):
    """exp(5 (t/T - 1)): the alignment losses come in late.     "exponential warm-up schedule", CACR sec. 4; IAIS code, which has the others"""
    return {"exp": math.exp(5 * (step / steps - 1)), "linear": step / steps, "log": 1 - math.exp(-5 * step / steps), "constant": 1.0}[schedule]


# 8. Checkpoint -----------------------------------------------------------------------------------------------------

def save_checkpoint(path, cfg, model, optimizer, step, sizes):
    """Everything a run needs to go on; batches, masks and dropout are functions of (seed, step), so there is no random state to keep."""
    path, beside = Path(path), Path(f"{path}.tmp")
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "config": dataclasses.asdict(cfg), "sizes": sizes}
    try:
        with open(beside, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:
        beside.unlink(missing_ok=True)
        kept = f"the checkpoint of an earlier step is still whole: {path}" if path.exists() else "there is no earlier one"
        raise UserError(f"{path} could not be saved at step {step}: {error}\n  {kept}\n  Free some space, then go on with --resume") from None


# 9. The loop -------------------------------------------------------------------------------------------------------

class NonFinite(ArithmeticError):
    """A loss or gradient that is no number; the message names step, loss and samples."""


def update(cfg, place, model, optimizer, streams, step, batches):
    """One update from the batches of one step; returns the mean of each loss before weighting over this process's part, and the norm."""
    torch.manual_seed((cfg.seed * 1_000_003 + step) * 1009 + place.rank)            # dropout, the same after a resume
    sizes = [counts(b) for b in batches]
    total = torch.tensor([sum(n[name] for n in sizes) for name in ("", *COUNTED)], dtype=torch.float32, device=place.device)
    if place.world > 1:
        dist.all_reduce(total)
    total = dict(zip(("", *COUNTED), total.clamp(min=1)))
    late, logged, mine = alignment_weight(step, cfg.steps, cfg.align_schedule), {}, [b for b in batches if b["names"]]
    for batch in mine:
        if "candidates" in batch:
            batch = mine_hardest(cfg, place, model, streams[0], batch)
        if "random" in batch:
            batch = streams[0].with_hard(batch)
        batch = to(blind(batch, cfg.hide) if cfg.hide else batch, place.device)
        with place.autocast():
            found = OBJECTIVES[batch["task"]](cfg, model, batch)
        weight = {name: cfg.align_weight * late for name in ALIGNMENTS if name != "maf"} | {"wra/pretrain": cfg.wra_weight, "answers": float(step > cfg.answers_from * cfg.steps)}
        n = counts(batch)
        share = {name: n.get(name, n[""]) / total.get(name, total[""]) for name in found}       # so that any split over batches and processes gives the same sum
        loss = sum(value * weight.get(name, 1.0) * share[name] for name, value in found.items())
        if not torch.isfinite(loss):
            bad = [f"{name} = {value.item()}" for name, value in found.items() if not torch.isfinite(value)]
            raise NonFinite(f"step {step}: {', '.join(bad)}\n  Samples: {few(batch['names'])}")
        loss.backward()
        for name, value in found.items():
            logged[name] = logged.get(name, 0) + value.detach() * n.get(name, n[""]) / max(1, sum(o.get(name, o[""]) for o in sizes))
    add_gradients(place, model)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or float("inf"))
    if not torch.isfinite(norm):
        raise NonFinite(f"step {step}: the gradient's norm is {norm.item()}, of {', '.join(logged)}\n  Samples: {few([n for b in mine for n in b['names']])}")
    for group in optimizer.param_groups:
        group["lr"] = group.get("scale", 1.0) * lr_at(step, cfg.lr, cfg.warmup, cfg.steps, cfg.schedule)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return logged, norm


def few(names, n=8):
    return "; ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def add_gradients(place, model):
    """Sum the gradients of all processes, in one message. A head that no process trained in this step stays without one, so that
    the optimiser leaves it alone, as on one process."""
    if place.world == 1:
        return
    params = list(model.parameters())
    has = torch.tensor([p.grad is not None for p in params], dtype=torch.int32, device=place.device)
    dist.all_reduce(has, dist.ReduceOp.MAX)
    params = [p for p, some in zip(params, has.tolist()) if some]
    flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in params])
    dist.all_reduce(flat)
    for p, part in zip(params, flat.split([p.numel() for p in params])):
        p.grad = part.view_as(p)


@torch.inference_mode()
def validate(cfg, place, model, streams, samples=300):
    """Accuracy in percent of each task, over the first batches of its validation stream that hold so many samples."""
    found = {}
    model.eval()
    for name, stream in streams.items():
        right, n, k = 0.0, 0, 0
        while n < samples:
            with place.autocast():
                hits = right_answers(cfg, model, to(blind(stream[k], cfg.hide) if cfg.hide else stream[k], place.device))
            right, n, k = right + hits.float().sum(), n + len(hits), k + 1
        found[f"val/{name}"] = 100 * right.item() / n
    model.train()
    return found


def right_answers(cfg, model, batch):
    """Which guesses are right: masked words, region classes, matching, that the matched pair outscores all of its group, or the task's."""
    task = batch["task"]
    if task == "maf":                               # the own image before all others of the batch
        e, v, masks = phrase_vectors(cfg, model, batch)
        return losses.maf_similarity(e, v, *masks[1:]).argmax(dim=1) == batch["own"]
    if task == "albef":                             # the own image before all others of the batch
        image, words = model.student.vision(normalised(batch["pixels"])), model.student.read(batch["text"], batch["text_mask"])
        image, words = model.student.features(image, words)
        return (words @ image.T).argmax(dim=1) == batch["own"]
    if task in VALIDATION:
        scores, target = model(**batch["input"], heads=("task",)).scores, batch["target"]
        if task in ("vqa", "gqa"):                  # how right
            return target.gather(1, scores.argmax(dim=1, keepdim=True))[:, 0]
        if task == "re":
            scores = scores.masked_fill(~batch["input"]["region_mask"], float("-inf"))
        return (scores[:, 1].view(-1, 4) if task == "vcr" else scores).argmax(dim=1) == target
    if task == "mlm":
        return model(**batch["input"], masked_words=batch["masked_words"]).word_logits.argmax(-1) == batch["word_targets"]
    if task in ("mrc", "mrckl"):
        guess = model(**batch["input"], masked_regions=batch["masked_regions"], heads=("classes",)).region_logits
        return guess[:, 1:].argmax(-1) == batch["region_probs"][:, 1:].argmax(-1)
    if task == "mrfr":                              # nearer to its own feature than to the batch's mean feature
        guess = model(**batch["input"], masked_regions=batch["masked_regions"], heads=("features",)).region_features
        own = batch["input"]["regions"].flatten(0, 1)[batch["masked_regions"]].float()
        return (guess - own).square().sum(-1) < (own.mean(0) - own).square().sum(-1)
    if task == "rank":
        wrong = torch.cat([model(**b, heads=("rank",)).rank for b in batch["negatives"]])[batch["order"]]
        return model(**batch["positive"], heads=("rank",)).rank > wrong.max(dim=1).values
    return model(**batch["input"], heads=("match",)).match.argmax(-1) == batch["match"].long()


def prepare_out(cfg, place):
    """Where to start: step 0 in a new folder, or the checkpoint of the same configuration."""
    out = Path(cfg.out)
    if not (out / "last.pt").exists():
        if place.main:
            out.mkdir(parents=True, exist_ok=True)
            for left in out.glob("hard-*.npy"):     # of a run that never saved
                left.unlink()
        return None
    saved = read_checkpoint(out / "last.pt")
    was, now = saved.config, dataclasses.asdict(cfg)
    other = [f"--{k.replace('_', '-')} {was.get(k, 'nothing')} there, {now[k]} here" for k in now if k not in PLACE and was.get(k) != now[k]]
    if other:
        raise UserError(f"{out} holds a run of another configuration: {'; '.join(other)}\n  Choose another --out, or delete that folder.")
    if not cfg.resume:
        raise UserError(f"{out} holds this run already, {'finished' if saved.step == cfg.steps else f'at step {saved.step} of {cfg.steps}'}\n"
                        "  Go on with --resume (a finished run tells its numbers again), or choose another --out.")
    return saved


def train(cfg, place):
    """One run from start (or checkpoint) to end; returns its final numbers."""
    if cfg.init in RECIPES:
        cfg = dataclasses.replace(cfg, init=run_first(cfg, place))
    place.say(f"{cfg.recipe}: {cfg.task}, loss {cfg.loss}, seed {cfg.seed}, {place.world} x {place.device.type}, {'bf16' if place.bf16 else 'fp32'}")
    saved = prepare_out(cfg, place)
    if place.world > 1:
        dist.barrier()
    tokenizer = load_tokenizer(cfg)
    streams = load_streams(cfg, place, tokenizer)
    model = build_model(cfg, place, tokenizer, streams)
    optimizer, start = make_optimizer(cfg, model), 0
    sizes = model_sizes(cfg, tokenizer, streams) | {"size": cfg.size, "new_words": getattr(tokenizer, "new_words", 0), "answer_list": streams.answer_list}
    if saved:
        model.load_state_dict(saved.model)
        optimizer.load_state_dict(saved.optimizer)
        start = saved.step
        place.say(f"  going on after step {start}")
    place.say(f"  {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {cfg.steps} steps -> {cfg.out}")
    compiled = torch.compile(model, dynamic=True) if cfg.compile else model
    log, began, pairs = Log(cfg, place, start), time.time(), 0
    bar = tqdm(range(start + 1, cfg.steps + 1), initial=start, total=cfg.steps, desc=f"{cfg.recipe} {cfg.loss}", disable=None if place.main else True)
    model.train()
    for step, batches in zip(bar, load_batches(cfg, place, streams, start)):
        if cfg.mine_every and ((step - 1) % cfg.mine_every == 0 or step == start + 1):
            mine(cfg, place, model, streams.train[0], (step - 1) // cfg.mine_every * cfg.mine_every)
        found, norm = update(cfg, place, compiled, optimizer, streams.train, step, batches)
        pairs += place.world * sum(len(b["names"]) for b in batches)
        if step % cfg.log_every == 0 or step == cfg.steps:
            line = {k: round(v.item(), 5) for k, v in found.items()}
            bar.set_postfix(line)
            seconds = time.time() - began
            log.write({"step": step, **line, "norm": round(norm.item(), 4), "lr": optimizer.param_groups[0]["lr"], "pairs_per_s": round(pairs / seconds, 1),
                       "seconds_left": round(seconds / (step - start) * (cfg.steps - step), 1)})
        if step % cfg.eval_every == 0 or step == cfg.steps:
            log.write({"step": step, **validate(cfg, place, compiled, streams.val)})
        if (step % cfg.save_every == 0 or step == cfg.steps) and place.main:
            if cfg.task == "pretrain" and cfg.model != "albef":                         # untrained so far: a fine-tuning run finds it started as it should be
                start_rank_from_match(model)
            save_checkpoint(Path(cfg.out) / "last.pt", cfg, model, optimizer, step, sizes)
    return last_words(cfg, place, model, tokenizer, log, sizes)


class Log:
    """out/log.jsonl, one JSON object a line; after a resume the lines beyond the checkpoint are dropped first."""
    def __init__(self, cfg, place, start):
        self.path, self.on, self.last = Path(cfg.out) / "log.jsonl", place.main, {}
        if not self.on:
            return
        old = self.path.read_text().splitlines() if start and self.path.exists() else []
        kept = [line for line in old if line.endswith("}") and json.loads(line)["step"] <= start]
        write_atomic(self.path, "".join(line + "\n" for line in kept))
        for line in kept:
            self.last |= json.loads(line)

    def write(self, record):
        self.last |= record
        if self.on:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")


def run_first(cfg, place):
    """Run the recipe named by --init for this data and seed, unless that is done; returns its checkpoint. Killed, it goes on by itself."""
    same = {} if cfg.model == RECIPES[cfg.init].get("model", "uniter") else {"model": cfg.model}
    first = make_config(cfg.init, data=cfg.data, regions=cfg.regions, seed=cfg.seed, precision=cfg.precision, compile=cfg.compile,
                        workers=cfg.workers, resume=True, vision=cfg.vision, resolution=cfg.resolution, patch=cfg.patch, **same)
    numbers = {k: v for k, v in dataclasses.asdict(first).items() if k not in PLACE - {"data"}}
    first.out = f"out/{cfg.init}-seed{cfg.seed}-{hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()[:8]}"
    if not ((Path(first.out) / "done.json").exists()):
        train(first, place)
    return f"{first.out}/last.pt"


# 10. Last words ----------------------------------------------------------------------------------------------------

def last_words(cfg, place, model, tokenizer, log, sizes):
    """Final benchmarks and where everything is; the numbers go to done.json too."""
    numbers, seen = {k: v for k, v in log.last.items() if k.startswith("val/")}, regions_of(vars(cfg))
    if place.main:
        if cfg.task == "grounding":
            numbers |= evaluate.grounding(model, cfg.data, tokenizer, seen, dataclasses.asdict(cfg))
            evaluate.grounding_figures(model, cfg.data, tokenizer, seen, dataclasses.asdict(cfg), Path(cfg.out) / "figures")
        if cfg.model == "albef" or cfg.triplets:
            numbers |= evaluate.pointing_games(model, cfg.data, tokenizer, dataclasses.asdict(cfg), autocast=place.autocast)
            evaluate.heat_figures({f"{cfg.recipe} {cfg.loss}": model}, cfg.data, tokenizer, dataclasses.asdict(cfg), Path(cfg.out) / "figures")
        elif cfg.pretrain == "together" and cfg.task == "pretrain":
            numbers |= evaluate.after_together(model, dataclasses.asdict(cfg), sizes, tokenizer, autocast=place.autocast)
            evaluate.map_figures({f"{cfg.recipe} {cfg.loss}": (model, sizes["answer_list"])}, cfg.data, tokenizer, seen, Path(cfg.out) / "figures")
        elif (Path(cfg.data) / "winoground").exists() and cfg.task in ("pretrain", "retrieval") and "vcr" not in cfg.corpora:
            numbers |= evaluate.winoground(model, cfg.data, tokenizer, seen, autocast=place.autocast,
                                           head="rank" if cfg.task == "retrieval" else "match")
            if cfg.task == "retrieval":
                evaluate.figures({f"{cfg.recipe} {cfg.loss}": model}, cfg.data, tokenizer, seen, Path(cfg.out) / "figures")
        if cfg.recipe == "toy-retrieval":           # at full size this takes hours: evaluate.py --task retrieval
            numbers |= evaluate.retrieval(model, cfg.data, tokenizer, seen, cfg.dataset, autocast=place.autocast)
        if cfg.task in VALIDATION:
            numbers |= evaluate.downstream(model, dataclasses.asdict(cfg), sizes, tokenizer, hide=cfg.hide, autocast=place.autocast)
        if cfg.task == "nlvr":
            numbers |= evaluate.nlvr(model, cfg.data, tokenizer, regions=seen, autocast=place.autocast)
        evaluate.training_curve(log.path, Path(cfg.out) / "figures" / "curve.png")
        write_atomic(Path(cfg.out) / "done.json", json.dumps(numbers, indent=1))
        place.say(f"  {cfg.out}: last.pt, log.jsonl, done.json, figures/")
    if place.world > 1:
        dist.barrier()
    return numbers


def main(argv=None):
    rank = int(os.environ.get("RANK", 0))
    try:
        cfg = parse(argv)
        place = find_place(cfg)
        if place.main and cfg.data == Config.data:
            ensure_toy(cfg.data)
        if place.world > 1:
            dist.barrier()
        numbers = train(cfg, place)
        place.say(json.dumps({k: round(v, 2) for k, v in numbers.items()}))
    except NonFinite as error:                      # only the process that met it knows its samples
        sys.exit(f"train.py: error: {error}")
    except (UserError, DataError, CheckpointError, OSError) as error:
        told = str(error).split("DataError: ")[-1].strip()          # a loader process wraps its error into a stack trace
        sys.exit(f"train.py: error: {told}" if rank == 0 else 1)
    except KeyboardInterrupt:
        sys.exit("train.py: stopped; go on with --resume")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
