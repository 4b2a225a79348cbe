"""What things cost, as ratios measured side by side in one run (machines are noisy; ratios less
so).

python tests/bench.py            a quarter of an hour on two cores; the last line is one JSON object
python tests/bench.py retrieval --keep      one part; its figures go to tests/results.json and
                                            tests/COST.md
python tests/bench.py steps --small         the same code at toy size, in seconds: does it run?

small        (e) ipot over its plain form; lines a second through the tokenizer
steps        (a) a UNITER-base training step, 32 pairs of 20 words and 36 regions: attention
             written out, as on a CPU, over fused; (b) with each alignment loss over without; (c)
             its floating-point rate over torch.matmul's at the model's sizes; bf16 over fp32; (d)
             the loader: pairs a second from the store over one npz an image, and over what the
             model consumes
pretraining  (f) mlm on ragged captions and images: share of matmul's rate; pairs a second over a
             padded fp32 VisualBERT that predicts every word, as published code trains it
             (transformers' if it is installed, else our own stand-in)
retrieval    (g) scoring every caption with every image, over the bare forward
align, maf   (h) the two-stream step with alignment decoder and loss over the step without; MAF's
             captions a second, loader included
glove        (h) GloVe: seconds for 2.2 million lines of 300, and the memory that reading adds
pixels       (i) ALBEF-base, 8 pairs at 256 pixels: with AMC over without, in time and in memory
             kept; contrast and momentum over matching and masked words alone; pictures a second
             through decoding and augmentation; the toy loader over the toy model
detector     (j) at its real size on 800 x 1,067 pixels: share of the time in non-maximum
             suppression and region pooling, the convolutions' rate over matmul's
gpu          (k) on a GPU (--small: anywhere): an update of UNITER's pre-training, base and large,
             and of matching with CACR, as written, with several batches a pass, compiled, and
             both: share of the published bf16 peak and of the device's own torch.matmul, waits of
             the host, memory; hours of every recipe on one GPU and on eight, without its loader, by
             --plan's operations at the share of the largest step of its kind
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
import losses
import model as model_parts
import plan
import train
from conftest import batches_of, prepare
from data import PatchStore, Record, RegionStore, WordPiece, make_index
from data import normalize_pixels, token_batches
from evaluate import StoreWriter
from model import SIZES, Uniter, build
from seeds import RESULTS, commit, fill, with_commits
from test_full_size import Waits
from toy import make_toy

PAIRS, WORDS, REGIONS, D_V = 32, 20, 36, 2048
# what --small changes: model size, most rounds, lines of GloVe
SIZE, MOST_ROUNDS, GLOVE_LINES, BACKEND = "base", 100, 2_200_000, "inductor"


def seconds(*jobs, rounds=5, warm=1):
    """Median seconds of each job; jobs take turns, so that a slow moment of the machine hits all
    of them.
    """
    times, rounds = [[] for _ in jobs], min(rounds, MOST_ROUNDS)
    for turn in tqdm(range(warm + rounds), leave=False, disable=None):
        for job, kept in zip(jobs, times):
            start = time.perf_counter()
            job()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warm:
                kept.append(time.perf_counter() - start)
    return [statistics.median(t) for t in times]


def ratio(slow, fast, **kw):
    """Median over rounds of slow / fast, each round measured back to back."""
    found = []
    for _ in range(min(kw.get("rounds", 5), MOST_ROUNDS) + 1):
        a, b = seconds(slow, fast, rounds=1, warm=0)
        found.append(a / b)
    return statistics.median(found[1:])


class Step:
    """A whole training step as train.py makes it: forward, losses, backward, clipping, fused
    AdamW.
    """

    def __init__(self, loss="none", bf16=False, size=None, pairs=None):
        size, self.pairs = size or SIZE, pairs or PAIRS
        self.cfg = train.make_config("flickr30k", loss=loss, size=size, steps=1000, warmup=1)
        self.runtime = train.Runtime(
            DEVICE, 0, 1, evaluate.autocast_for(DEVICE, "bf16" if bf16 else "fp32")
        )
        torch.manual_seed(0)
        self.model = (
            Uniter(28996, D_V, 1601, dropout=self.cfg.dropout, **SIZES[size]).to(DEVICE).train()
        )
        self.optimizers = train.build_optimizers(self.cfg, self.model)
        g = torch.Generator().manual_seed(0)
        corner = torch.rand(self.pairs, REGIONS, 2, generator=g) / 2
        ones = lambda n: torch.ones(self.pairs, n, dtype=torch.bool)
        batch = dict(
            text=torch.randint(1000, 28996, (self.pairs, WORDS), generator=g),
            text_mask=ones(WORDS),
            regions=torch.rand(self.pairs, REGIONS, D_V, generator=g).half(),
            boxes=torch.cat([corner, corner + 0.4], -1),
            region_mask=ones(REGIONS),
        )
        if DEVICE.type == "cuda":  # as the loader does
            batch = {name: x.pin_memory() for name, x in batch.items()}
        batch["length"] = WORDS + REGIONS
        self.batch = {
            "task": "itm",
            "names": ["x"] * self.pairs,
            "input": batch,
            "match": torch.ones(self.pairs, dtype=torch.bool),
            "matched": torch.arange(self.pairs),
        }

    def __call__(self):
        train.train_step(self.cfg, self.runtime, self.model, self.optimizers, 1000, [self.batch])

    def flops(self):
        """Multiply-adds count two; backward costs twice the forward. Matrix products only."""
        D, L, N = self.model.pooler.in_features, len(self.model.layers), WORDS + REGIONS
        tokens = self.pairs * N
        layer = (
            2 * tokens * (4 * D * D + 2 * D * self.model.layers[0].fc1.out_features)
            + 4 * self.pairs * N * N * D
        )
        return 3 * (L * layer + 2 * self.pairs * REGIONS * D_V * D)


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def always_explicit(attention):
    """Attention as if maps were always wanted."""
    plain = attention.forward

    def forward(x, context, mask, need_maps=False):
        return plain(x, context, mask, True)

    attention.forward = forward


def always_fused(attention):
    """Attention by torch's kernel, as on a GPU."""

    def forward(x, context, mask, need_maps=False):
        q, k, v = attention.to_q(x), attention.to_k(context), attention.to_v(context)
        q, k, v = (attention.split(z) for z in (q, k, v))
        p = attention.dropout
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None], dropout_p=p)
        return attention.to_out(out.transpose(1, 2).flatten(2)), None, None

    attention.forward = forward


def matmul_rate(dtype=torch.float32):
    """Floating-point operations a second of torch.matmul over a layer's shapes, each in its share
    of the work.
    """
    D, inner = SIZES[SIZE]["width"], SIZES[SIZE]["mlp_dim"]
    tokens = PAIRS * (WORDS + REGIONS)
    shapes = [(tokens, D, D)] * 4 + [(tokens, D, inner), (tokens, inner, D)]
    work = [
        (
            torch.randn(n, k, device=DEVICE, dtype=dtype),
            torch.randn(k, m, device=DEVICE, dtype=dtype),
        )
        for n, k, m in shapes
    ]
    return (lambda: [a @ b for a, b in work]), sum(2 * n * k * m for n, k, m in shapes)


def bench_steps(found, folder):
    step, written, fused = Step(), Step(), Step()
    for a, b in zip(written.model.layers, fused.model.layers):
        always_explicit(a.attention), always_fused(b.attention)
    found["fused_vs_written"] = ratio(written, fused)
    del written, fused
    for name in ("cacr", "iais", "iais-distributed", "wra"):
        plain, other = step.cfg, train.make_config("flickr30k", loss=name, steps=1000, warmup=1)

        def with_loss():
            step.cfg = other
            step()
            step.cfg = plain

        found[name.replace("-", "_")] = ratio(with_loss, step, rounds=7)
    product, flops = matmul_rate()
    many = lambda: [product() for _ in range(12)]
    found["matmul_share"] = (step.flops() / (12 * flops)) * ratio(many, step)
    half = Step(bf16=True)
    found["bf16_vs_fp32"] = ratio(step, half)
    best = half if evaluate.bf16_is_faster() or DEVICE.type == "cuda" else step
    found["pairs_per_s"] = PAIRS / seconds(best, rounds=3)[0]
    bench_loader(found, folder)


def plain_ipot(cost, beta=0.5, iterations=50):
    """Algorithm 1 line by line, without masks and without reusing memory."""
    n, m = cost.shape[1:]
    A, T, sigma = (
        (-cost / beta).exp(),
        torch.ones_like(cost),
        torch.full((len(cost), n, 1), 1 / n, device=cost.device),
    )
    for _ in range(iterations):
        Q = A * T
        delta = 1 / (m * (Q.mT @ sigma))
        sigma = 1 / (n * (Q @ delta))
        T = sigma * Q * delta.mT
    return T


def bench_loader(found, folder):
    """The store against the same regions as one npz an image, both as batches for the model."""
    rng, images = np.random.default_rng(0), 512
    writer = StoreWriter(folder / "store", source="bench")
    for i in range(images):
        features, corner = (
            rng.random((REGIONS, D_V), dtype=np.float32).astype(np.float16),
            rng.random((REGIONS, 2)) * 200,
        )
        boxes = np.concatenate([corner, corner + 100], 1)
        writer.add(f"{i}", (400, 400), features=features, boxes=boxes)
        np.savez(folder / f"{i}.npz", features=features, norm_bb=boxes / 400)
    writer.commit()
    (folder / "vocab.txt").write_text("\n".join([*WordPiece.SPECIAL, "word"]))
    store = RegionStore(folder / "store")
    pairs = make_index(
        [Record(f"{i % images}", "word " * (WORDS - 2), str(i)) for i in range(4 * images)],
        store,
        WordPiece(folder / "vocab.txt", True),
    )
    stream = batches_of("mlm", pairs, PAIRS * (WORDS + REGIONS))

    def from_npz(ids):
        out = np.zeros((len(ids), REGIONS, D_V), np.float16)
        for b, i in enumerate(ids):
            with np.load(folder / f"{store.image_id(i)}.npz") as z:
                out[b] = z["features"]
        return torch.from_numpy(out)

    stream[0]
    count = [0]

    def read_store():
        for _ in range(8):
            stream.index.batch(*stream.whole(count[0])[:2])
            count[0] += 1

    def read_npz():
        for k in range(8):
            captions, ids, _ = stream.whole(k)
            stream.index.text(captions), from_npz(ids)

    found["store_vs_npz"] = ratio(read_npz, read_store)

    def whole_batches():
        for _ in range(8):
            stream[count[0]]
            count[0] += 1

    found["loader_pairs_per_s"] = 8 * PAIRS / seconds(whole_batches, rounds=7)[0]
    found["store_vs_model"] = found["loader_pairs_per_s"] / found["pairs_per_s"]


def ragged_store(folder, images=400):
    """Captions of 9 to 24 words and images of 10 to 100 regions, as COCO's are."""
    rng = np.random.default_rng(0)
    writer = StoreWriter(folder / "ragged", source="bench")
    for i in range(images):
        n = int(min(100, max(10, rng.gamma(4, 9))))
        corner = rng.random((n, 2)) * 200
        writer.add(
            f"{i}",
            (400, 400),
            features=rng.random((n, D_V), dtype=np.float32),
            boxes=np.concatenate([corner, corner + 100], 1),
        )
    writer.commit()
    (folder / "words.txt").write_text(
        "\n".join([*WordPiece.SPECIAL, *(f"word{i}" for i in range(28_991))])
    )
    texts = [
        Record(
            f"{i % images}",
            " ".join(f"word{w}" for w in rng.integers(28_991, size=int(rng.integers(7, 23)))),
            str(i),
        )
        for i in range(5 * images)
    ]
    return make_index(texts, RegionStore(folder / "ragged"), WordPiece(folder / "words.txt", False))


class VisualBert(torch.nn.Module):
    """What stands in for transformers' VisualBERT where it is not installed: written-out
    attention, words at every place.
    """

    def __init__(self):
        super().__init__()
        self.encoder = Uniter(28996, D_V, 1601, **SIZES[SIZE])
        for layer in self.encoder.layers:
            always_explicit(layer.attention)

    def forward(self, text, text_mask, regions, boxes, region_mask):
        every = torch.arange(text.numel(), device=text.device)
        return self.encoder(
            text, text_mask, regions, boxes, region_mask, masked_words=every
        ).word_logits


def visual_bert():
    """(name, a training step's forward and loss on our batch, parameters)"""
    try:
        from transformers import VisualBertConfig, VisualBertForPreTraining
    except ImportError:
        model = VisualBert().to(DEVICE).train()
        return (
            "our stand-in",
            lambda x, labels: torch.nn.functional.cross_entropy(
                model(**x), labels.flatten(), ignore_index=-100
            ),
            model.parameters(),
        )
    model = (
        VisualBertForPreTraining(VisualBertConfig(vocab_size=28996, visual_embedding_dim=D_V))
        .to(DEVICE)
        .train()
    )

    def loss(x, labels):
        every = torch.cat(
            [labels, torch.full(x["region_mask"].shape, -100, device=labels.device)], 1
        )
        return model(
            input_ids=x["text"],
            attention_mask=x["text_mask"].long(),
            visual_embeds=x["regions"].float(),
            labels=every,
            visual_attention_mask=x["region_mask"].long(),
        ).loss

    return "transformers", loss, model.parameters()


def bench_pretraining(found, folder):
    pairs = ragged_store(folder)
    faster = evaluate.bf16_is_faster() or DEVICE.type == "cuda"
    stream = batches_of("mlm", pairs, 10_240)
    stream.whole(0)
    step = Step()
    sizes = sorted(range(len(stream.batches)), key=lambda k: len(stream.batches[k]))
    middle = stream[sizes[len(sizes) // 2]]
    x, L = middle["input"], SIZES[SIZE]
    tokens, N = len(x["text"]) * x["length"], x["length"]
    D, inner = L["width"], L["mlp_dim"]
    work = 3 * (
        L["layers"] * (2 * tokens * (4 * D * D + 2 * D * inner) + 4 * tokens * N * D)
        + 2 * x["regions"].shape[0] * x["regions"].shape[1] * D_V * D
        + 2 * len(middle["masked_words"]) * D * (D + 28996)
    )
    product, flops = matmul_rate()
    many = lambda: [product() for _ in range(12)]
    update = lambda one, batch: train.train_step(
        one.cfg, one.runtime, one.model, one.optimizers, 1000, [batch]
    )
    found["pretrain_matmul_share"] = (work / (12 * flops)) * ratio(
        many, lambda: update(step, middle), rounds=2
    )
    some = [stream[k] for k in range(2)]
    ours = sum(len(b["names"]) for b in some)
    if faster:
        step = Step(bf16=True)
    fast = seconds(lambda: [update(step, b) for b in some], rounds=2)[0]
    del step
    name, loss, parameters = visual_bert()
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    # padded: to the longest of 32 pairs as they come
    n = 32
    batches = []
    for start in range(0, 2 * n, n):
        rows = np.random.default_rng(start).integers(len(pairs), size=n)
        batch = train.to_device(pairs.batch(rows, pairs.image[rows]))
        batch.pop("length")
        batches.append(
            (
                train.to_device(batch, DEVICE),
                torch.where(torch.rand(batch["text"].shape) < 0.15, batch["text"], -100).to(DEVICE),
            )
        )

    def padded():
        for x, labels in batches:
            loss(x, labels).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 5.0)
            optimizer.step()
            optimizer.zero_grad()

    slow = seconds(padded, rounds=1)[0]
    found["pretrain_pairs_per_s"], found["visual_bert_pairs_per_s"] = ours / fast, 2 * n / slow
    found["pretrain_vs_visual_bert"] = (
        found["pretrain_pairs_per_s"] / found["visual_bert_pairs_per_s"]
    )
    print(f"(f) against {name}")


def bench_retrieval(found, folder):
    """A part of 1,000 x 5,000: all captions with a few images, against the forward alone on
    batches of the same sizes.
    """
    pairs = ragged_store(folder)
    runtime = train.Runtime(DEVICE, 0, 1, evaluate.autocast_for(DEVICE))
    model = Uniter(28996, D_V, 1601, **SIZES[SIZE]).to(DEVICE).eval()
    run = evaluate.Run(model, pairs.tokenizer, {}, {}, None, runtime.autocast)
    captions = make_index(
        [Record("0", pairs.decode(i), str(i)) for i in range(600)], pairs.store, pairs.tokenizer
    )
    ready = []
    n_words = captions.arrays["n_words"]
    order = np.argsort(n_words, kind="stable")
    for rows in token_batches(n_words[order] + pairs.store.n_regions(np.array([0])), 8192):
        batch = captions.batch(order[rows], captions.image[order[rows]])
        ready.append(train.to_device(batch, DEVICE))

    @torch.inference_mode()
    def forward():
        for x in ready:
            with runtime.autocast():
                model(**x, heads=("rank",)).rank.float().cpu()

    found["retrieval_vs_forward"] = ratio(
        forward,
        lambda: evaluate.score_all(run, captions, "rank"),
        rounds=3,
    )


def bench_align(found, folder):
    """All of Kervadec's supervision on pairs of 18 + 36, 20 % of the words pointing; with and
    without alignment.
    """
    cfg = train.make_config("kervadec", loss="none")
    runtime, other = (
        train.Runtime(DEVICE, 0, 1, evaluate.autocast_for(DEVICE)),
        train.make_config("kervadec"),
    )
    model = (
        build("lxmert", SIZE, vocab=30_522, features=D_V, head="answers", answers=9500, align=True)
        .to(DEVICE)
        .train()
    )
    optimizers, g, W = train.build_optimizers(cfg, model), torch.Generator().manual_seed(0), 18
    corner, K = torch.rand(PAIRS, REGIONS, 2, generator=g) / 2, int(0.15 * PAIRS * REGIONS)
    mask = lambda n: torch.ones(PAIRS, n, dtype=torch.bool)
    places = lambda n, k: torch.randperm(n, generator=g)[:k]
    x = dict(
        text=torch.randint(1000, 30_000, (PAIRS, W), generator=g),
        text_mask=mask(W),
        regions=torch.rand(PAIRS, REGIONS, D_V, generator=g).half(),
        boxes=torch.cat([corner, corner + 0.4], -1),
        region_mask=mask(REGIONS),
        length=W + REGIONS,
    )
    pointed, words = places(PAIRS * W, PAIRS * W // 5), places(PAIRS * W, PAIRS * W // 7)
    batch = {
        "task": "multitask",
        "names": ["x"] * PAIRS,
        "input": x,
        "match": torch.arange(PAIRS) % 2 == 0,
        "matched": torch.arange(0, PAIRS, 2),
        "hidden_regions": torch.zeros(0, dtype=torch.int64),
        "masked_words": words,
        "word_targets": torch.randint(1000, 30_000, (len(words),), generator=g),
        "masked_regions": places(PAIRS * REGIONS, K),
        "region_features": torch.rand(K, D_V, generator=g).half(),
        "region_class": torch.randint(1600, (K,), generator=g),
        "region_attribute": torch.randint(400, (K,), generator=g),
        "answered": torch.arange(0, PAIRS, 2),
        "answer": torch.randint(9500, (PAIRS // 2,), generator=g),
    }
    aligned = {
        "aligned": pointed,
        "aligned_row": pointed // W,
        "pointer": torch.cat([corner, corner + 0.4], -1)[pointed // W, 0],
        "similarity_cls_id": torch.rand(len(pointed), REGIONS, generator=g),
        "similarity_attr_id": torch.rand(len(pointed), REGIONS, generator=g),
    }

    def step(cfg, more):
        how = cfg, runtime, model, optimizers, cfg.steps
        return lambda: train.train_step(*how, [batch | more])

    found["align"] = ratio(step(other, aligned), step(cfg, {}), rounds=9)


def bench_maf(found, folder):
    tree = folder / "toy"
    make_toy(tree, scenes=2000)
    made, count = prepare("--recipe toy-grounding --data", tree), [0]

    def train_maf():
        for _ in range(50):
            batch = made.streams.train[0][count[0]]
            train.train_step(made.cfg, made.runtime, made.model, made.optimizers, 1, [batch])
            count[0] += 1

    captions = 50 * made.cfg.batch_size
    found["maf_captions_per_s"] = captions / seconds(train_maf, rounds=7)[0]


def albef_step(loss, n=8):
    """A training step of the amc recipe on n pairs of random pixels, a batch of them, and the
    model.
    """
    cfg = train.make_config("amc", loss=loss, init="none")
    runtime = train.Runtime(DEVICE, 0, 1, evaluate.autocast_for(DEVICE))
    torch.manual_seed(0)
    model, W = (
        build("albef", SIZE, vocab=30_522, queue=65_536, resolution=256, patch=16, dropout=0.1)
        .to(DEVICE)
        .train(),
        24,
    )
    optimizers, words, region = (
        train.build_optimizers(cfg, model),
        torch.arange(0, n * W, 7),
        torch.zeros(n, 256, 256, dtype=torch.bool),
    )
    region[:, 40:120, 60:160] = True
    text = torch.randint(1000, 30_000, (n, W))
    batch = {
        "task": "albef",
        "names": ["x"] * n,
        "number": 10**6,
        "u": torch.rand(2, n),
        "text": text,
        "masked_text": text,
        "text_mask": torch.ones(n, W, dtype=torch.bool),
        "pixels": torch.randint(256, (n, 256, 256, 3), dtype=torch.uint8),
        "masked_words": words,
        "word_targets": text.flatten()[words],
        "boxed": torch.arange(n),
        "region_target": region,
    }
    return (
        lambda: train.train_step(cfg, runtime, model, optimizers, cfg.steps, [batch]),
        batch,
        model,
        runtime,
        cfg,
        optimizers,
    )


def peak(loss):
    """MiB that a step's activations add at most: highest use while it runs, less that before."""
    step, _, model, *_ = albef_step(loss, 4)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    torch.randn(10**6)
    if DEVICE.type == "cuda":
        step(), torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    from torch.autograd.graph import saved_tensors_hooks

    kept, sizes = 0, set()

    # on a CPU: what autograd keeps for the backward passes, each storage once
    def pack(x):
        nonlocal kept
        if (key := x.untyped_storage().data_ptr()) not in sizes:
            sizes.add(key)
            kept += x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        step()
    return (
        kept
        - sum(
            p.untyped_storage().nbytes()
            for p in model.parameters()
            if p.untyped_storage().data_ptr() in sizes
        )
    ) / 2**20


def bench_pixels(found, folder):
    with_amc, batch, model, runtime, cfg, optimizers = albef_step("amc")
    without = train.make_config("amc", loss="none", init="none")
    none = lambda: train.train_step(without, runtime, model, optimizers, cfg.steps, [batch])
    found["amc_step"] = ratio(with_amc, none, rounds=5)

    def plain():
        """Matching and masked words alone, no momentum model, no queue."""
        student, mask, n = model.student, batch["text_mask"], len(batch["text"])
        with runtime.autocast():
            image, words = (
                student.vision(normalize_pixels(batch["pixels"].to(DEVICE))),
                student.read(batch["text"].to(DEVICE), mask.to(DEVICE)),
            )
            states, _ = student.fuse(
                words.repeat(3, 1, 1),
                mask.repeat(3, 1).to(DEVICE),
                torch.cat([image, image.roll(1, 0), image]),
            )
            seen, _ = student.fuse(
                student.read(batch["masked_text"].to(DEVICE), mask.to(DEVICE)),
                mask.to(DEVICE),
                image,
            )
            loss = losses.itm(
                model.match(states[:, 0]), torch.arange(3 * n, device=DEVICE) < n
            ) + losses.mlm(
                student.word_logits_at(seen, batch["masked_words"].to(DEVICE)),
                batch["word_targets"].to(DEVICE),
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
        optimizers[0].step()
        optimizers[0].zero_grad(set_to_none=True)

    found["itc_momentum"] = ratio(none, plain, rounds=5)
    del with_amc, none, plain, model, optimizers
    found["amc_memory"] = peak("amc") / peak("none")

    (folder / "winoground/images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(48):  # photographs: smooth, with some grain
        smooth = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize(
            (640, 480), Image.BICUBIC
        )
        Image.fromarray(
            (np.asarray(smooth, int) + rng.integers(-8, 9, (480, 640, 1)))
            .clip(0, 255)
            .astype(np.uint8)
        ).save(folder / f"winoground/images/{i}.jpg", quality=90)
    (folder / "vocab.txt").write_text("\n".join([*WordPiece.SPECIAL, "word", "left", "right"]))
    store = PatchStore(folder, "winoground", 256, 16)
    # as of a data set that is larger than what is kept decoded
    store.load = getattr(store.load, "__wrapped__", store.load)
    pairs = make_index(
        [Record(str(i), "word " * 10, str(i), boxes=((0.1, 0.1, 0.5, 0.5),)) for i in range(48)],
        store,
        WordPiece(folder / "vocab.txt", True),
        24,
        layout="albef",
    )
    how = {"augment": "flip+jitter+grey", "batch_size": 16, "max_words": 24}
    stream, threads = batches_of("albef", pairs, **how), torch.get_num_threads()
    torch.set_num_threads(1)
    found["pictures_per_s"] = 48 / seconds(lambda: [stream[k] for k in range(3)], rounds=7)[0]
    torch.set_num_threads(threads)

    tree = folder / "toy"
    make_toy(tree, scenes=600)
    made, count = prepare("--recipe toy-albef --init none --data", tree), [0]
    how = made.cfg, made.runtime, made.model, made.optimizers, 1, [made.batch]

    def load():
        for _ in range(4):
            made.streams.train[0][count[0]]
            count[0] += 1

    load()
    four = lambda: [train.train_step(*how) for _ in range(4)]
    found["toy_pictures_vs_model"] = ratio(four, load, rounds=5)


def detector_sizes():
    """The real detector's; --small: a narrow one"""
    narrow = dict(stem=8, res2=16, bottleneck=8, blocks=(1, 1, 1, 1), hidden=16, classes=10)
    narrow |= dict(attributes=5, embedding=8, attr_hidden=8)
    return narrow if SIZE == "toy" else {}


def picture_size():
    """Height and width of the detector's picture"""
    return [96, 128] if SIZE == "toy" else [800, 1067]


def bench_detector(found, folder):
    torch.manual_seed(0)
    detector, picture = (
        model_parts.Detector(**detector_sizes()).to(DEVICE),
        torch.randn(3, *picture_size(), device=DEVICE) * 50,
    )
    spent, work = [0.0], [0]

    def timed(job):
        def wrapped(*args):
            start = time.perf_counter()
            out = job(*args)
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            spent[0] += time.perf_counter() - start
            return out

        return wrapped

    def count(module, args, out):
        work[0] += 2 * out.numel() * module.weight[0].numel()

    for module in detector.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(count)
    plain = model_parts.nms, model_parts.roi_pool
    model_parts.nms, model_parts.roi_pool = map(timed, plain)
    detector(picture)
    runs, spent[0], work[0] = 3, 0.0, 0
    start = time.perf_counter()
    for _ in range(runs):
        detector(picture)
    whole = time.perf_counter() - start
    model_parts.nms, model_parts.roi_pool = plain
    product, flops = matmul_rate()
    found["detector_pooling_share"], found["detector_pictures_per_s"] = (
        spent[0] / whole,
        runs / whole,
    )
    found["detector_conv_share"] = (
        work[0] / (whole - spent[0]) / (flops / seconds(product, rounds=9)[0])
    )


def bench_glove(found, folder):
    rng, lines = np.random.default_rng(0), GLOVE_LINES
    numbers = [" ".join(f"{x:.5f}" for x in rng.standard_normal(300)) for _ in range(200)]
    with open(folder / "glove.txt", "w", buffering=1 << 22) as file:
        for i in tqdm(range(lines), desc="writing", leave=False, disable=None):
            file.write(f"word{i} {numbers[i % 200]}\n")
    wanted = [f"word{i}" for i in range(0, lines, 100)]
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    assert len(evaluate.glove(folder / "glove.txt", wanted)) == len(wanted)
    found["glove_seconds"], found["glove_mib"] = (
        time.perf_counter() - start,
        (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    )


def bench_small(found, folder):
    full = (
        torch.ones(PAIRS, WORDS, dtype=torch.bool, device=DEVICE),
        torch.ones(PAIRS, REGIONS, dtype=torch.bool, device=DEVICE),
    )
    cost = torch.rand(PAIRS, WORDS, REGIONS, device=DEVICE)
    found["ipot"] = ratio(
        lambda: [losses.ipot(cost, *full) for _ in range(5)],
        lambda: [plain_ipot(cost) for _ in range(5)],
        rounds=9,
    )
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), rng.integers(2, 9))) for _ in range(3000)]
    lines = [" ".join(rng.choice(words, 11)).capitalize() + "." for _ in range(20_000)]
    (folder / "letters.txt").write_text(
        "\n".join(
            [
                *WordPiece.SPECIAL,
                *(a + c for c in "abcdefghijklmnopqrstuvwxyz." for a in ("", "##")),
                *words[:1500],
            ]
        )
    )
    tokenizer = WordPiece(folder / "letters.txt", lower=True)
    found["tokenizer_lines_per_s"] = (
        len(lines) / seconds(lambda: [tokenizer(line) for line in lines], rounds=3)[0]
    )


# one GPU's batch of a recipe, and the loss on its matched pairs
GPU_STEPS = {
    "uniter-pretrain-all": "wra",
    "uniter-pretrain-all-large": "wra",
    "flickr30k": "cacr",
}


# (name, batches in a pass, compiled)
WAYS = ("plain", 1, False), ("passes", 8, False), ("compiled", 1, True), ("both", 8, True)


def bench_gpu(found, folder):
    """Steps at the recipes' sizes; a CPU is measured against its own torch.matmul"""
    on_gpu = DEVICE.type == "cuda"
    if not on_gpu and SIZE != "toy":
        print("gpu: there is none; gpu --small runs the same code on the CPU")
        return
    job, work = matmul_rate(torch.bfloat16 if on_gpu else torch.float32)
    rate = work / seconds(job)[0]
    name = torch.cuda.get_device_name() if on_gpu else ""
    peak = next((peak for gpu, peak in plan.GPUS.items() if gpu in name), rate)
    for recipe, loss in GPU_STEPS.items():
        cfg = train.make_config(recipe)
        pairs = cfg.batch_tokens // (WORDS + REGIONS) if on_gpu else 4
        for way, batches, is_compiled in WAYS:
            step = Step(loss, on_gpu, None if SIZE == "toy" else cfg.size, pairs * batches)
            if is_compiled:
                compile_step(step)
            share = gpu_step(found, step, f"{way}/{recipe}", on_gpu) / peak
            found[f"gpu_share/{way}/{recipe}"] = share
            found[f"gpu_matmul_share/{way}/{recipe}"] = share * peak / rate
    recipe_hours(found, peak)


def compile_step(step):
    """As train.py --compile does; --small: by a backend that takes no time"""
    compile_it = torch.compile
    torch.compile = lambda *a, **k: compile_it(*a, **k, backend=BACKEND)
    model_parts.compile_layers(step.model)
    torch.compile = compile_it


def gpu_step(found, step, name, on_gpu):
    """Operations a second of a step, whose waits and memory go to found"""
    step()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with Waits() as waits:
        step()
    found[f"gpu_waits/{name}"] = float(len(waits.found))
    found[f"gpu_gib/{name}"] = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    return step.flops() / seconds(step, rounds=20, warm=3)[0]


def recipe_hours(found, peak):
    """Hours of every recipe of the papers, at the share of the measured step that is like it: of
    the large model, of ranking, else of base"""
    large, ranking = "uniter-pretrain-all-large", "flickr30k"
    for recipe in () if SIZE == "toy" else (n for n in train.RECIPES if not n.startswith("toy")):
        cfg = train.make_config(recipe)
        like = ranking if cfg.task == "retrieval" else "uniter-pretrain-all"
        share = found[f"gpu_share/both/{large if cfg.size == 'large' else like}"]
        _, kinds = plan.planned(cfg)
        often = sum(row[0] for row in kinds.values())
        work = sum(row[0] * row[2] for row in kinds.values()) / often * cfg.gpus * cfg.accumulate
        found[f"gpu_one/{recipe}"] = work * cfg.steps / (share * peak) / 3600
        found[f"gpu_eight/{recipe}"] = found[f"gpu_one/{recipe}"] / 8


MEANING = {
    "fused_vs_written": ("(a) written-out / fused step", "<= 1.03; GPU: >= 0.97"),
    "cacr": ("(b) step with cacr / without", "<= 1.03"),
    "iais": ("(b) step with iais / without", "<= 1.05"),
    "iais_distributed": ("(b) step with iais-distributed / without", "<= 1.05"),
    "wra": ("(b) step with wra / without", "<= 1.05"),
    "matmul_share": ("(c) fp32 step's rate / matmul's", ">= 0.85"),
    "bf16_vs_fp32": ("(c) fp32 step / bf16 step", ">= 2.5 with AMX"),
    "pairs_per_s": ("    the model's pairs a second", ""),
    "store_vs_npz": ("(d) npz time / store time", ">= 5"),
    "loader_pairs_per_s": ("    the loader's pairs a second", ""),
    "store_vs_model": ("(d) loader / model", ">= 10"),
    "ipot": ("(e) ipot / its plain form", "<= 1"),
    "tokenizer_lines_per_s": ("(e) tokenizer lines a second", ""),
    "pretrain_matmul_share": ("(f) ragged pre-training step's rate / matmul's, fp32", ">= 0.8"),
    "pretrain_pairs_per_s": ("    pre-training's pairs a second", ""),
    "visual_bert_pairs_per_s": ("    padded fp32 VisualBERT's", ""),
    "pretrain_vs_visual_bert": ("(f) pre-training / VisualBERT", ">= 3"),
    "retrieval_vs_forward": ("(g) all-pairs scoring / the bare forward", ">= 0.95"),
    "align": ("(h) two-stream step with align / without", "<= 1.05"),
    "maf_captions_per_s": ("(h) MAF, captions a second", ">= 5,000"),
    "glove_seconds": ("(h) GloVe, 2.2 M lines of 300, seconds", "< 60"),
    "glove_mib": ("    memory it adds, MiB", "< 1,024"),
    "amc_step": ("(i) ALBEF-base step with AMC / without", "<= 1.45"),
    "amc_memory": ("(i) activations kept with AMC / without", "<= 1.5"),
    "itc_momentum": ("(i) ALBEF step / matching and masked words alone", "<= 1.35"),
    "pictures_per_s": (
        "(i) 640 x 480 JPEG, decoded and augmented, a second, one core",
        ">= 250",
    ),
    "toy_pictures_vs_model": ("(i) toy loader / toy ALBEF", ">= 1"),
    "detector_pooling_share": ("(j) detector: share of suppression and region pooling", "< 0.15"),
    "detector_conv_share": ("(j) the rest of the detector's rate / matmul's", ""),
    "detector_pictures_per_s": ("    its pictures a second", ""),
}
# measured before several batches shared a pass; a GPU's next run replaces them by what follows
for recipe in GPU_STEPS:
    MEANING |= {
        f"gpu_peak_share/{recipe}": (f"(k) {recipe}: share of the bf16 peak, as written", ""),
        f"gpu_waits/{recipe}": ("    waits of the host in an update", "0"),
        f"gpu_gib/{recipe}": ("    memory, GiB", ""),
        f"gpu_hours/{recipe}": ("    hours of the recipe as written, without its loader", ""),
    }
for recipe in GPU_STEPS:
    for way, *_ in WAYS:
        name = f"{way}/{recipe}"
        MEANING |= {
            f"gpu_share/{name}": (f"(k) {recipe}, {way}: share of the published bf16 peak", ""),
            f"gpu_matmul_share/{name}": ("    of the device's own matmul", ""),
            f"gpu_waits/{name}": ("    waits of the host in an update", "0"),
            f"gpu_gib/{name}": ("    memory, GiB", ""),
        }
    wanted = ">= 0.6" if "large" in recipe else ">= 0.5"
    MEANING[f"gpu_share/both/{recipe}"] = MEANING[f"gpu_share/both/{recipe}"][0], wanted
for recipe in train.RECIPES:
    MEANING[f"gpu_one/{recipe}"] = (f"(k) hours of {recipe} on one GPU", "")
    MEANING[f"gpu_eight/{recipe}"] = ("    on eight", "")


PARTS = {
    "small": bench_small,
    "steps": bench_steps,
    "pretraining": bench_pretraining,
    "retrieval": bench_retrieval,
    "align": bench_align,
    "maf": bench_maf,
    "glove": bench_glove,
    "pixels": bench_pixels,
    "detector": bench_detector,
    "gpu": bench_gpu,
}


def table(results):
    """What was measured, and with which commit's code"""
    measured = results.get("bench", {})
    rows = ((*MEANING[k], k) for k in MEANING if k in measured)
    lines = [f"| {what} | {measured[k]:,.2f} | {wanted} |" for what, wanted, k in rows]
    commits = {name: results["bench_commits"].get(name) for name in MEANING if name in measured}
    head = ["| | measured | wanted |", "|---|---|---|"]
    return "\n".join([*head, *lines, "", with_commits(commits)])


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help="which (default: all): " + ", ".join(PARTS))
    parser.add_argument("--small", action="store_true", help="at toy size, one round: does it run?")
    parser.add_argument(
        "--keep",
        action="store_true",
        help="keep the figures in tests/results.json and put the table into tests/COST.md",
    )
    args = parser.parse_args(argv)
    global SIZE, MOST_ROUNDS, GLOVE_LINES, BACKEND
    if args.small:
        SIZE, MOST_ROUNDS, GLOVE_LINES, BACKEND = "toy", 1, 2000, "eager"
    unknown = set(args.parts) - set(PARTS)
    if unknown or args.small and args.keep:
        parser.error(f"parts are {', '.join(PARTS)}; --small measures nothing to keep")
    results, found = json.loads(RESULTS.read_text()), {}
    for part in args.parts or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[part](found, Path(folder))
        if args.keep:
            results["bench"] = results.get("bench", {}) | {k: round(v, 4) for k, v in found.items()}
            commits = results.setdefault("bench_commits", {})
            commits |= dict.fromkeys(found, commit())
            RESULTS.write_text(json.dumps(results, indent=0, sort_keys=True) + "\n")
    print(
        f"UNITER-{SIZE}, 32 pairs of 20 + 36; {DEVICE.type}, {torch.get_num_threads()} threads"
        "   measured   wanted"
    )
    for name, value in found.items():
        print(f"{MEANING[name][0]:60} {value:10.3f}   {MEANING[name][1]}")
    if args.keep:
        fill(bench=table(results))
    print(json.dumps({k: round(v, 4) for k, v in found.items()}))


if __name__ == "__main__":
    main()
