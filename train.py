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
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import evaluate
import losses
from data import (DataError, Mix, PairBatches, Pairs, RankingBatches, RegionStore, WordPiece, coco, ensure_toy, flickr30k,
                  nlvr_pairs, write_atomic)
from evaluate import to
from model import SIZES, CheckpointError, Uniter, load_pretrained, read_checkpoint

# 1. Recipes --------------------------------------------------------------------------------------------------------
# One dict per experiment: only what differs from the defaults of Config. "init" may name another recipe: it is run first.

RECIPES = {
    # Small batches and much masking: what breaks the plateau before "left" is told from "right" is the number of updates [ours]
    "toy-pretrain": dict(task="pretrain", pretrain="mlm:4+itm:1", size="toy", dropout=0.0, steps=4500, warmup=200, units=1024, lr=5e-4, mask_rate=0.4,
                         clip=5.0, save_every=500, eval_every=500),
    "toy": dict(task="retrieval", size="toy", init="toy-pretrain", dropout=0.0, steps=400, warmup=40, units=1536, lr=3e-4, negatives=3, candidates=24,
                alternate=True, save_every=100, eval_every=100),
    "toy-nlvr": dict(task="nlvr", size="toy", init="toy-pretrain", dropout=0.1, steps=1500, warmup=150, units=2048, lr=2e-4),
    # UNITER's pre-training on COCO [authors' code: config/pretrain-indomain-base-8gpu.json]; BERT-cased start
    "uniter-pretrain": dict(task="pretrain", pretrain="mlm+itm+mrfr+mrckl+wra", size="base", init="{data}/checkpoints/uniter-base-init.pt",
                            steps=200_000, warmup=10_000, units=10240, accumulate=2, lr=5e-5, clip=5.0),
    # CACR and IAIS on Flickr30k [CACR sec. 4; IAIS code: config/train-flickr-base-8gpu-hn.json]; 8 x (1 text + 1 image) anchors a GPU
    "flickr30k": dict(task="retrieval", size="base", init="{data}/checkpoints/uniter-base.pt", steps=5000, warmup=500, units=2048,
                      accumulate=16, lr=5e-5, clip=2.0, negatives=31, candidates=399, alternate=True),
}

# 2. Command line ---------------------------------------------------------------------------------------------------


def opt(default, help, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    """Every setting of a run, its default, and where the default is from."""
    recipe: str = opt("toy", "which experiment: its settings replace the defaults below; what you type replaces both")
    loss: str = opt("none", "alignment losses, joined by +: none, cacr, iais, iais-released, iais-distributed, wra")
    task: str = opt("retrieval", "what to learn", ("retrieval", "pretrain", "nlvr"))
    pretrain: str = opt("mlm+itm", "pre-training tasks, joined by +: mlm, itm, mrfr, mrc, mrckl, wra (goes with itm) [UNITER table 2]; mlm:3 triples a share")
    data: str = opt("data/toy", "the data tree; data/toy is made on first use")
    regions: str = opt("", "folder of the region stores; DATA/regions unless given")
    out: str = opt("", "where the run goes; out/<recipe>-<loss>-seed<seed> unless given")
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
    warmup: int = opt(500, "updates of linear warm-up; then linear to zero")
    weight_decay: float = opt(0.01, "on matrices, not on biases and norms [UNITER sec. A.2]")
    beta2: float = opt(0.98, "AdamW's second beta [authors' code]; the first is 0.9")
    eps: float = opt(1e-6, "AdamW's epsilon [authors' code]")
    clip: float = opt(2.0, "largest gradient norm [authors' code]; 0 turns it off")
    dropout: float = opt(0.1, "on hidden states and attention [BERT]")
    mask_rate: float = opt(0.15, "share of words or regions masked in pre-training [UNITER sec. 3.2]")
    negatives: int = opt(2, "mismatched pairs a matched one in ranking: 2 [UNITER sec. 4.1], 31 [CACR sec. 4]")
    candidates: int = opt(0, "score so many negatives and train on the hardest: 399 [IAIS code]; 0 draws them at random")
    alternate: bool = opt(False, "text anchors and the language side one batch, image anchors and the vision side the next [IAIS code]")
    margin: float = opt(0.2, "of the ranking loss [authors' code]")
    align_weight: float = opt(1.0, "final weight of the alignment losses [ours]; the IAIS code's accumulation makes it 8")
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
    if typed.get("task") == "nlvr":
        typed.setdefault("recipe", "toy-nlvr")
    recipe = typed.pop("recipe", Config.recipe)
    return make_config(recipe, **typed)


def make_config(recipe, **changes):
    cfg = Config(**{**RECIPES[known(recipe, RECIPES, "recipe")], **changes, "recipe": recipe})
    alignment_names(cfg), pretrain_shares(cfg)
    cfg.regions = cfg.regions or f"{cfg.data}/regions"
    cfg.init = "" if cfg.init == "none" else cfg.init.replace("{data}", cfg.data)
    cfg.out = cfg.out or f"out/{recipe}-{cfg.loss}-seed{cfg.seed}"
    for name in ("steps", "units", "accumulate", "negatives", "save_every", "log_every", "eval_every"):
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: wanted at least 1")
    for name, legal, fits in (("seed", "0 or more", cfg.seed >= 0), ("lr", "more than 0", cfg.lr > 0), ("warmup", "0 or more", cfg.warmup >= 0),
                              ("dropout", "0 to below 1", 0 <= cfg.dropout < 1), ("mask_rate", "0 to 1", 0 <= cfg.mask_rate <= 1),
                              ("clip", "0 or more", cfg.clip >= 0), ("candidates", "0 or more", cfg.candidates >= 0)):
        if not fits:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: wanted {legal}")
    if cfg.candidates and cfg.candidates < cfg.negatives:
        raise UserError(f"--candidates {cfg.candidates} cannot hold --negatives {cfg.negatives} hardest ones; 0 draws negatives at random")
    return cfg


def alignment_names(cfg):
    return [known(name, [*ALIGNMENTS, "none"], "--loss") for name in cfg.loss.split("+") if name != "none"]


def pretrain_shares(cfg):
    """{task: share of the steps} from --pretrain; UNITER's own shares are the default."""
    usual, shares = {"mlm": 2, "itm": 2, "mrfr": 1, "mrc": 1, "mrckl": 1, "wra": 0}, {}     # [UNITER's code]
    for part in cfg.pretrain.split("+"):
        name, _, share = part.partition(":")
        known(name, list(usual), "--pretrain")
        try:
            shares[name] = float(share or usual[name])
        except ValueError:
            raise UserError(f"--pretrain {part}: wanted a name, or name:share as in mlm:3") from None
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
    return WordPiece(Path(cfg.data) / ("bert-base-cased" if cfg.cased else "bert-base-uncased") / "vocab.txt", lower=not cfg.cased)


def load_streams(cfg, place, tokenizer):
    """(training streams, their shares, {name: validation stream}, the region store): see data.Mix."""
    share = dict(part=place.rank, parts=place.world)
    units = cfg.units * place.world

    def pairs(captions, store, name):
        place.say(f"  {store}") if not name.endswith(("val", "val2014")) else None
        found = Pairs(captions, store, tokenizer, cfg.max_words, name, cfg.skip_missing)
        place.say(f"  {found}")
        return found

    if cfg.task == "nlvr":
        train, labels = nlvr_pairs(cfg.data, "test", tokenizer)
        val, val_labels = nlvr_pairs(cfg.data, "dev", tokenizer)
        place.say(f"  {train}\n  {val}")
        make = lambda p, y, **k: PairBatches(p, "nlvr", units, cfg.seed, labels=y, **k)
        return [make(train, labels, **share)], [1], {"nlvr": make(val, val_labels)}, train.store
    if cfg.task == "pretrain":
        store = RegionStore(Path(cfg.regions) / "coco")
        train, val = (pairs(coco(cfg.data, s), store, f"COCO {s}") for s in ("train2014", "val2014"))
        shares = pretrain_shares(cfg)
        tasks = [t for t in shares if t != "wra"]
        streams = [PairBatches(train, t, units, cfg.seed, **share, mask_rate=cfg.mask_rate) for t in tasks]
        return streams, [shares[t] for t in tasks], {t: PairBatches(val, t, cfg.units, cfg.seed) for t in tasks}, store
    store = RegionStore(Path(cfg.regions) / "flickr30k")
    train, val = (pairs(flickr30k(cfg.data, s), store, f"Flickr30k {s}") for s in ("train", "val"))
    ranking = dict(negatives=cfg.negatives, candidates=cfg.candidates, alternate=cfg.alternate)
    return ([RankingBatches(train, units, cfg.seed, **share, **ranking)], [1],
            {"rank": RankingBatches(val, cfg.units, cfg.seed, negatives=cfg.negatives)}, store)


def load_batches(cfg, place, streams, shares, start):
    """Iterator over the steps from start on; workers keep ahead of the model if there are any."""
    mix = Mix(streams, shares, cfg.steps, cfg.seed, cfg.accumulate)
    workers = cfg.workers if cfg.workers >= 0 else 2 * (place.device.type == "cuda")
    return iter(torch.utils.data.DataLoader(mix, batch_size=None, sampler=range(start, cfg.steps), num_workers=workers, collate_fn=as_is,
                                            pin_memory=place.device.type == "cuda", persistent_workers=workers > 0))


def as_is(batch):
    """Batches are made whole by data.py: the loader only carries them."""
    return batch


# 5. Model ----------------------------------------------------------------------------------------------------------

def build_model(cfg, place, tokenizer, store):
    """A model of the recipe's size for this vocabulary and these features, filled from --init."""
    torch.manual_seed(cfg.seed)
    model = Uniter(len(tokenizer), store_width(store), store.classes or 1601, dropout=cfg.dropout, **SIZES[cfg.size])
    if cfg.init:
        place.say(f"  {cfg.init}: {load_pretrained(model, cfg.init)}")
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
    "wra": None,                                    # needs hidden states, no maps
}


def attention_blocks(cfg, name, maps, text_mask, region_mask):
    """Blocks LL, LV, VL, VV as a loss wants them, (B, N, M): mean over heads of logits, or of probabilities."""
    if name == "iais" or name == "cacr" and cfg.cacr_on == "logits":
        return [S.float().mean(dim=1) for S in maps]
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
            continue
        LL, LV, VL, VV = attention_blocks(cfg, name, out.maps[0], text_mask, region_mask)
        side, found[name] = ALIGNMENTS[name], 0
        if anchor != "image":
            found[name] = found[name] + side(LL, LV, VL, VV, word_mask, region_mask)
        if anchor != "text":
            found[name] = found[name] + side(VV, VL, LV, LL, region_mask, word_mask)
    return found


def maps_wanted(cfg):
    return (-1,) if set(alignment_names(cfg)) - {"wra"} else ()


def objective_mlm(cfg, model, batch):
    out = model(**batch["input"], masked_words=batch["masked_words"])
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
    """Matching; with wra in --pretrain UNITER's alignment term, with --loss the others, on the matched pairs of the batch."""
    out = model(**batch["input"], heads=("match",), maps=maps_wanted(cfg))
    masks = batch["input"]["text_mask"], batch["input"]["region_mask"]
    found = {batch["task"]: losses.itm(out.match, batch["match"])}
    if cfg.task == "pretrain" and "wra" in pretrain_shares(cfg):
        found["wra/pretrain"] = losses.wra(out.words, out.regions, *masks, match=batch["match"])
    if alignment_names(cfg):
        rows = batch["match"].nonzero()[:, 0]
        if len(rows):
            some = out._replace(words=out.words[rows], regions=out.regions[rows], maps=tuple(type(m)(*(S[rows] for S in m)) for m in out.maps))
            inputs = {"text_mask": masks[0][rows], "region_mask": masks[1][rows]}
            found |= {k: v * len(rows) / len(batch["match"]) for k, v in alignment(cfg, some, inputs).items()}
    return found


def objective_rank(cfg, model, batch):
    """Ranking of each matched pair against its negatives; alignment on the matched pairs, which alone run with maps."""
    out = model(**batch["positive"], heads=("rank",), maps=maps_wanted(cfg))
    wrong = torch.cat([model(**b, heads=("rank",)).rank for b in batch["negatives"]])
    scores = torch.cat([out.rank[:, None], wrong[batch["order"]]], dim=1)                               # (G, 1 + K)
    return {"rank": losses.ranking(scores, cfg.margin), **alignment(cfg, out, batch["positive"], batch["anchor"])}


OBJECTIVES = {"mlm": objective_mlm, "itm": objective_itm, "nlvr": objective_itm, "rank": objective_rank,
              "mrfr": objective_regions, "mrc": objective_regions, "mrckl": objective_regions}


def count(batch):
    """How many things a batch's losses are means over: masked words, masked regions, pairs or groups."""
    for name in ("masked_words", "masked_regions"):
        if name in batch:
            return len(batch[name])
    return len(batch["names"])


@torch.no_grad()
def mine_hardest(cfg, place, model, stream, batch):
    """Score the candidates and keep the hardest: the highest-scored mismatched pairs of each group.  IAIS code"""
    captions, images = batch.pop("candidates")
    scores = evaluate.score_pairs(model, stream.pairs, captions.ravel(), images.ravel(), units=max(cfg.units, 8192), autocast=place.autocast)
    hardest = np.argsort(-scores.reshape(captions.shape), axis=1, kind="stable")[:, :cfg.negatives]
    rows = np.arange(len(captions))[:, None]
    return batch | stream.choose(captions[rows, hardest], images[rows, hardest])


# 7. Optimiser and schedule -----------------------------------------------------------------------------------------

def make_optimizer(cfg, model):
    """AdamW; matrices decay, biases and norms do not (the authors' code also decays four norms of the region embedding and heads)."""
    groups = [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": cfg.weight_decay},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, cfg.beta2), eps=cfg.eps, fused=True)


def lr_at(step, peak, warmup, steps):
    """Rate of update `step` (the first is 1): linear up to the peak, then linear to 0, never below 1e-8.    UNITER's code"""
    factor = step / warmup if step < warmup else max(0.0, (steps - step) / max(1, steps - warmup))
    return max(peak * factor, 1e-8)


def alignment_weight(step, steps):
    """exp(5 (t/T - 1)): the alignment losses come in late.     "exponential warm-up schedule", CACR sec. 4; IAIS code"""
    return math.exp(5 * (step / steps - 1))


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
    total = torch.tensor(float(sum(count(b) for b in batches)), device=place.device)
    if place.world > 1:
        dist.all_reduce(total)
    late, logged, mine = alignment_weight(step, cfg.steps), {}, [b for b in batches if b["names"]]
    for batch in mine:
        if "candidates" in batch:
            batch = mine_hardest(cfg, place, model, streams[0], batch)
        batch = to(batch, place.device)
        with place.autocast():
            found = OBJECTIVES[batch["task"]](cfg, model, batch)
        weight = {name: cfg.align_weight * late for name in ALIGNMENTS} | {"wra/pretrain": cfg.wra_weight}
        loss = sum(value * weight.get(name, 1.0) for name, value in found.items())
        if not torch.isfinite(loss):
            bad = [f"{name} = {value.item()}" for name, value in found.items() if not torch.isfinite(value)]
            raise NonFinite(f"step {step}: {', '.join(bad)}\n  Samples: {few(batch['names'])}")
        (loss * count(batch) / total).backward()    # so that any split over batches and processes gives the same sum
        for name, value in found.items():
            logged[name] = logged.get(name, 0) + value.detach() * count(batch) / sum(map(count, mine))
    add_gradients(place, model)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or float("inf"))
    if not torch.isfinite(norm):
        raise NonFinite(f"step {step}: the gradient's norm is {norm.item()}, of {', '.join(logged)}\n  Samples: {few([n for b in mine for n in b['names']])}")
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step, cfg.lr, cfg.warmup, cfg.steps)
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
                hits = right_answers(name, model, to(stream[k], place.device))
            right, n, k = right + hits.float().sum(), n + len(hits), k + 1
        found[f"val/{name}"] = 100 * right.item() / n
    model.train()
    return found


def right_answers(task, model, batch):
    """Which guesses are right: masked words, region classes, matching, or that the matched pair outscores all of its group."""
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
        return None
    saved = read_checkpoint(out / "last.pt")
    was, now = saved.config, dataclasses.asdict(cfg)
    other = [f"--{k.replace('_', '-')} {was[k]} there, {now[k]} here" for k in now if k not in PLACE and was.get(k) != now[k]]
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
    streams, shares, val_streams, store = load_streams(cfg, place, tokenizer)
    model = build_model(cfg, place, tokenizer, store)
    optimizer, start = make_optimizer(cfg, model), 0
    sizes = {"vocab": len(tokenizer), "features": store_width(store), "classes": store.classes or 1601, "size": cfg.size}
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
    for step, batches in zip(bar, load_batches(cfg, place, streams, shares, start)):
        found, norm = update(cfg, place, compiled, optimizer, streams, step, batches)
        pairs += place.world * sum(len(b["names"]) for b in batches)
        if step % cfg.log_every == 0 or step == cfg.steps:
            line = {k: round(v.item(), 5) for k, v in found.items()}
            bar.set_postfix(line)
            seconds = time.time() - began
            log.write({"step": step, **line, "norm": round(norm.item(), 4), "lr": optimizer.param_groups[0]["lr"], "pairs_per_s": round(pairs / seconds, 1),
                       "seconds_left": round(seconds / (step - start) * (cfg.steps - step), 1)})
        if step % cfg.eval_every == 0 or step == cfg.steps:
            log.write({"step": step, **validate(cfg, place, compiled, val_streams)})
        if (step % cfg.save_every == 0 or step == cfg.steps) and place.main:
            if cfg.task == "pretrain":              # untrained so far: a fine-tuning run finds it started as it should be
                model.start_rank_from_match()
            save_checkpoint(Path(cfg.out) / "last.pt", cfg, model, optimizer, step, sizes)
    return last_words(cfg, place, model, tokenizer, log)


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
    first = make_config(cfg.init, data=cfg.data, regions=cfg.regions, seed=cfg.seed, precision=cfg.precision, compile=cfg.compile,
                        workers=cfg.workers, resume=True)
    numbers = {k: v for k, v in dataclasses.asdict(first).items() if k not in PLACE - {"data"}}
    first.out = f"out/{cfg.init}-seed{cfg.seed}-{hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()[:8]}"
    if not ((Path(first.out) / "done.json").exists()):
        train(first, place)
    return f"{first.out}/last.pt"


# 10. Last words ----------------------------------------------------------------------------------------------------

def last_words(cfg, place, model, tokenizer, log):
    """Final benchmarks and where everything is; the numbers go to done.json too."""
    numbers = {k: v for k, v in log.last.items() if k.startswith("val/")}
    if place.main:
        if (Path(cfg.data) / "winoground").exists() and cfg.task != "nlvr":
            numbers |= evaluate.winoground(model, cfg.data, tokenizer, cfg.regions, autocast=place.autocast,
                                           head="rank" if cfg.task == "retrieval" else "match")
            if cfg.task == "retrieval":
                evaluate.figures({f"{cfg.recipe} {cfg.loss}": model}, cfg.data, tokenizer, cfg.regions, Path(cfg.out) / "figures")
        if cfg.task == "nlvr":
            numbers |= evaluate.nlvr(model, cfg.data, tokenizer, autocast=place.autocast)
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
