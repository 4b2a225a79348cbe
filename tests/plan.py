"""What a run takes, without data and without a GPU: train.py --recipe NAME --plan [SHARE OF PEAK]

Parameters and their memory, operations of an update and of the run, what a pass keeps for its way
back, disk of the region stores, and hours on four GPUs. Operations are torch's own count, of
matrix products and convolutions, for a batch of the right shapes with nothing in it.
"""

import functools
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from data import EDITS
from evaluate import TASKS
from model import build

# dense bf16 operations a second, by their makers' data sheets
GPUS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
# images of the larger stores
IMAGES = {"coco": 123_287, "vg": 108_077, "cc3m_train": 3_318_333, "sbu": 1_000_000}
IMAGES |= {"flickr30k": 31_783, "nlvr2": 127_502, "vcr": 110_000}
# what a plan supposes of data that it does not see; words, regions: of a pair; phrases: of a
# caption, and words of each
PLANNED = dict(vocab=28_996, features=2048, classes=1601, answers=3129, words=14, regions=36)
PLANNED |= dict(phrases=(4, 3))


def planned_batch(cfg, kind, n):
    """A GPU's batch of a kind, with the shapes of n (PLANNED) and nothing in it"""
    task, L, N = TASKS[cfg.task], n.words, n.regions
    rows = task.group(vars(cfg)) if kind == "examples" else 1
    each = (L + N) * (rows if task.count_choices else 1)
    each *= 1 + cfg.negatives if kind == "rank" else 1
    B, side = (cfg.batch_size or max(1, cfg.batch_tokens // each)) * rows, (cfg.resolution,) * 2
    ints = lambda *shape: torch.zeros(shape, dtype=torch.int64)
    some = lambda *shape: torch.ones(shape, dtype=torch.bool)
    text, K, R = ints(B, L), int(B * (L - 2) * cfg.mask_rate), int(B * N * cfg.mask_rate)
    x = {"text": text, "text_mask": some(B, L), "regions": torch.zeros(B, N, n.features)}
    batch = x | {"masked_text": text, "number": 0, "u": torch.zeros(2, B), "match": some(B)}
    x |= {"boxes": torch.zeros(B, N, 4), "region_mask": some(B, N), "length": L + N}
    if kind == "maf":
        (Q, W), ids = n.phrases, ints(B, N)
        batch |= {"word_mask": some(B, Q, W), "phrase_mask": some(B, Q)}
        batch["region_mask"], labels = x["region_mask"], {"labels": ids, "attributes": ids}
        x = {"phrases": ints(B, Q, W), "features": x["regions"]} | labels
    batch |= {"task": "itm" if kind == "rank" else kind, "names": [""] * (B // rows), "input": x}
    batch |= {"matched": ints(B // 2), "answered": ints(B // 2), "answer": ints(B // 2)}
    batch |= {"masked_words": ints(K), "word_targets": ints(K), "masked_regions": ints(R)}
    batch |= {"region_class": ints(R), "region_attribute": ints(R)}
    batch |= {"region_probs": torch.zeros(R, n.classes)}
    batch |= {"region_features": torch.zeros(R, n.features)}
    batch |= {"target": torch.zeros(B, n.answers) if task.soft else ints(B // rows)}
    batch |= {"hidden_regions": ints(0)} if kind == "multitask" else {}
    batch |= {"pixels": torch.zeros(B, *side, 3)} if cfg.is_albef else {}
    return batch | (
        {"boxed": ints(B), "region_target": some(B, *side)} if "heat" in cfg.given else {}
    )


def planned_sizes(cfg, n):
    """As model_sizes(), of n (PLANNED)"""
    sizes = {"model": cfg.model, "vocab": n.vocab, "size": cfg.size}
    if "phrases" in cfg.given:
        inputs = cfg.region_inputs.split("+")
        return {"model": "maf", "vocab": n.vocab, "features": n.features, "inputs": inputs}
    if cfg.is_albef:
        return sizes | {"queue": cfg.queue, "resolution": cfg.resolution, "patch": cfg.patch}
    head = TASKS[cfg.task].head(vars(cfg)) or "answers" * cfg.is_multitask
    sizes |= {"features": n.features, "classes": n.classes, "types": 4, "head": head}
    sizes |= {"answers": n.answers, "align": "pointers" in cfg.given}
    return sizes | ({"patch": cfg.patch} if cfg.vision == "patches" else {})


def planned(cfg, **known):
    """What a GPU's batch takes, of tensors that hold nothing: (parameters, {kind: (how often,
    pairs, floating-point operations of an update's part, bytes kept for the backward pass)});
    known: instead of PLANNED. Pointers' losses, which take next to nothing, are left out."""
    n, found, one = SimpleNamespace(**PLANNED | known), {}, defaultdict(lambda: torch.ones(()))
    if cfg.vision == "patches":
        n.regions, n.features = (cfg.resolution // cfg.patch) ** 2, 3 * cfg.patch**2
    settings = SimpleNamespace(settings=vars(cfg) | {"answer_list": ()})
    kinds = Counter()
    for row, often in train.corpora_of(cfg, settings).values():
        kinds.update({kind: k * (often or 1) for kind, k in row.kinds.items() if row.train})
    half = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    runtime = train.Runtime(torch.device("cpu"), 0, 1, half)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("meta"):
            model = build(**planned_sizes(cfg, n))
        weights = {k: torch.zeros_like(v, device="cpu") for k, v in model.state_dict().items()}
        model.load_state_dict(weights, assign=True)
        for kind, often in kinds.items():
            kept, batch = {}, planned_batch(cfg, kind, n)
            keep = lambda x: (kept.update({x.untyped_storage()._cdata: x.untyped_storage()}), x)[1]
            with FlopCounterMode(display=False) as count, saved_tensors_hooks(keep, lambda x: x):
                how = cfg, runtime, model, cfg.steps, [[batch]], one, torch.zeros(len(EDITS))
                train.add_gradients(*how)
            # negatives are trained on as the matched pairs are, candidates are scored
            more = 1 + cfg.negatives + cfg.candidates / 3 if kind == "rank" else 1
            size = sum(storage.nbytes() for storage in kept.values())
            pairs = len(batch["match"])
            found[kind] = often, pairs, count.get_total_flops() * more, size
    return sum(p.numel() for p in model.parameters() if p.requires_grad), found


def stores_of(cfg):
    """{region store that is trained on}"""
    rows = train.corpora_of(cfg, SimpleNamespace(settings=vars(cfg) | {"answer_list": ()})).values()
    trained_on = [row for row, _ in rows if row.train]
    return {row.store(row.train) if callable(row.store) else row.store for row in trained_on}


def print_plan(cfg, **known):
    """The lines of --plan"""
    parameters, kinds = planned(cfg, **known)
    n, batches = SimpleNamespace(**PLANNED | known), cfg.gpus * cfg.accumulate
    gib = lambda size: f"{size / 2**30:,.1f} GiB"
    often = sum(row[0] for row in kinds.values())
    work = batches * sum(row[0] * row[2] for row in kinds.values()) / often
    print(f"{cfg.recipe}: {parameters / 1e6:,.1f} M parameters that are trained")
    print(f"  weights and gradients {gib(8 * parameters)}, optimiser {gib(8 * parameters)}")
    for kind, (_, pairs, flops, size) in kinds.items():
        print(f"  {kind}: {pairs:,} pairs a batch, {flops:.3g} operations, activations {gib(size)}")
    length = 1 + cfg.negatives if "rank" in kinds else 1
    tokens = [row[1] * length * (n.words + n.regions) for row in kinds.values()]
    each = max(row[3] / (row[1] * (n.words + n.regions)) for row in kinds.values())
    size = cfg.pass_tokens or 100_000
    print(f"  a pass of {size:,} words + regions keeps {gib(each * size)}, of bf16")
    print(f"  an update: {batches} batches, {batches * max(tokens):,} words + regions, {work:.3g}")
    print(f"  supposed of each text {n.words} words, of each image {n.regions} regions")
    print(f"  {cfg.steps:,} updates: {work * cfg.steps:.3g} operations")
    if cfg.vision == "regions":
        # float16 features and class probabilities, and a box
        region = 2 * (n.features + n.classes) + 16
        sizes = {s: IMAGES[s] * n.regions * region for s in sorted(stores_of(cfg)) if s in IMAGES}
        print(f"  stores: {', '.join(f'{s} {gib(size)}' for s, size in sizes.items()) or 'small'}")
    for gpu, peak in GPUS.items():
        hours = work * cfg.steps / (cfg.plan * peak) / 3600
        print(f"  {gpu} at {cfg.plan:.2f} of its peak: {hours:.3g} hours, {hours / 8:.3g} on eight")


if __name__ == "__main__":
    print_plan(train.parse(sys.argv[1:]))
