"""Downstream tasks: readers, the toy tree's balance, batches, twenty steps of each, evaluation,
submission files, and bad input.
"""

import csv
import dataclasses
import functools
import json
import os
import pickle
import re
import shutil
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

import data
import evaluate
import toy as toy_world
import train
from conftest import (
    QUICK,
    argv,
    copied,
    inside,
    prepared_run,
    read,
    run,
    run_and_stop,
    same,
    shared,
    weights,
)
from data import Batches, DataError, RegionStore, make_index
from model import read_checkpoint

TASKS = [
    ("vqa",),
    ("vcr",),
    ("nlvr2",),
    ("nlvr2", "--nlvr2-head", "pair"),
    ("nlvr2", "--nlvr2-head", "triplet"),
    ("ve",),
    ("ve", "--task-loss", "ce"),
    ("re",),
    ("re", "--dataset", "refcoco+", "--head", "region-mlp"),
    ("re", "--dataset", "refcocog"),
    ("retrieval",),
    ("retrieval", "--candidates", 0, "--mine-every", 8, "--mine-pool", 6),
    ("retrieval", "--dataset", "coco"),
]


def configured(toy_tree, *args):
    how = "--precision fp32 --init none --size tiny --workers 0"
    cfg = train.parse(argv(how, "--data", toy_tree, *args))
    return cfg, train.setup_runtime(cfg), train.load_tokenizer(cfg)


def built(toy_tree, *args):
    """Settings, runtime, streams and model, as train.train() has them"""
    cfg, runtime, tokenizer = configured(toy_tree, *args)
    run = prepared_run(cfg, tokenizer)
    streams = train.load_streams(cfg, runtime, run)
    sizes = train.model_sizes(cfg, tokenizer, streams, run.settings["answer_list"])
    return cfg, runtime, streams, train.build_model(cfg, runtime, tokenizer, sizes)


def load(toy_tree, name, split, **more):
    cfg, _, tokenizer = configured(toy_tree, "--task", name, *more.pop("argv", ()))
    return evaluate.open_task(prepared_run(cfg, tokenizer), name, split, **more)


def load_vcr(toy_tree, split, part):
    """VCR's questions of one part, four choices (all: sixteen) an example."""
    cfg, _, tokenizer = configured(toy_tree, "--task", "vcr")
    reader = functools.partial(data.vcr_choices, parts=(part,))
    return prepared_run(cfg, tokenizer).index(
        reader, split, "vcr", group=16 if part == "all" else 4
    )


def examples(index):
    return np.arange(len(index) // index.group)


# ------------------------------------------------------------------------- the toy tree's balance


def test_nothing_to_guess_from_the_text_or_the_picture_alone(toy_tree):
    """Each statement has its labels equally often, and so has each picture."""
    statements, pictures = defaultdict(Counter), defaultdict(Counter)
    for e in read(data.nlvr2_pairs, toy_tree, "train", rows="triplet")[0]:
        statements[e.id.split("-")[1], e.text][e.target] += 1
        pictures[e.image[0]][e.target] += 1
    assert all(c[True] == c[False] for c in [*statements.values(), *pictures.values()])
    texts, _ = read(data.entailment_pairs, toy_tree, "train")
    kinds, pictures = defaultdict(Counter), defaultdict(Counter)
    for t in texts:
        kinds[t.text.split(" is ")[0]][t.target] += 1
        pictures[t.image][t.target] += 1
    assert all(len(set(c[i] for i in range(3))) == 1 for c in [*kinds.values(), *pictures.values()])
    places = Counter((t.text.split(" is ")[1], t.target) for t in texts)
    for what in {p for p, _ in places}:
        assert max(places[what, i] for i in range(3)) < 1.4 * min(places[what, i] for i in range(3))
    texts, _ = read(data.vcr_choices, toy_tree, "train", parts=("qa",))
    choices = [texts[i : i + 4] for i in range(0, len(texts), 4)]
    assert all(len({t.text for t in c}) == 4 for c in choices)
    for part in (
        choices,
        [
            t[:1]
            for t in zip(*[iter(read(data.vcr_choices, toy_tree, "train", parts=("qar",))[0])] * 4)
        ],
    ):
        assert max(n := Counter(c[0].target for c in part).values()) - min(n) <= 4
    colours = Counter(c[c[0].target].text[1][1].split()[-2] for c in choices)
    offered = Counter(t.text[1][1].split()[-2] for t in texts)
    assert all(abs(colours[c] / offered[c] - 0.25) < 0.1 for c in offered)


def test_vqa_questions_come_in_complements(toy_tree):
    texts, stats = read(data.vqa_questions, toy_tree, "train2014")
    assert all(t.note for t in texts) and len(texts) % 2 == 0
    for a, b in zip(texts[::2], texts[1::2]):
        assert a.text == b.text and a.image != b.image and a.note.given[-1] != b.note.given[-1]


def test_toy_labels_are_true(toy_tree):
    """Labels against the scenes as the annotated boxes tell them: referring expressions name one
    thing of the right shape.
    """
    store = RegionStore(toy_tree / "regions/refcoco_gt")
    texts, _ = read(data.referring_expressions, toy_tree, "train", dataset="refcoco")
    for t in texts[:200]:
        image = np.array([store.numbers()[t.image]])
        boxes, row = store.read(image, "boxes")[0], store.read(image, "cls_id")[0]
        x, y, w, h = t.boxes[0]
        i = int(np.abs(boxes - [x, y, x + w, y + h]).sum(1).argmin())
        named = [s for s in toy_world.SHAPES if s in t.text]
        colour = [c for c in toy_world.COLOURS if c in t.text]
        assert not named or toy_world.SHAPES[row[i]] == named[0]
        seen = toy_world.COLOURS[store.read(image, "attr_id")[0][i]]
        assert not colour or seen == colour[0]


# --------------------------------------------------------------------------------- official files


def test_real_nlvr2(tmp_path):
    """Counts as published; consistency groups come from the identifier, not from the sentence."""
    (tmp_path / "nlvr2").mkdir()
    for split, n, true, groups in (("dev", 6982, 3551, 2018), ("test1", 6967, 3558, 1995)):
        shutil.copy(shared(f"real/nlvr2/{split}.json.gz"), tmp_path / "nlvr2")
        examples, _ = read(data.nlvr2_pairs, tmp_path, split, rows="triplet")
        assert (len(examples), sum(e.target for e in examples)) == (n, true)
        assert len({tuple(np.array(e.id.split("-"))[[1, 3]]) for e in examples}) == groups
    assert len({e.text for e in read(data.nlvr2_pairs, tmp_path, "dev", rows="triplet")[0]}) == 2004
    (tmp_path / "nlvr2/balanced").mkdir()
    shutil.copy(shared("real/nlvr2/balanced_dev.json.gz"), tmp_path / "nlvr2/balanced")
    assert len(read(data.nlvr2_pairs, tmp_path, "balanced/balanced_dev", rows="triplet")[0]) == 2300


def test_real_refcoco_plus_boxes_and_answer_list(tmp_path):
    (tmp_path / "refer/refcoco+").mkdir(parents=True), (tmp_path / "vqa2").mkdir()
    for split, sentences in (("testA", 5726), ("testB", 4889)):
        shutil.copy(
            shared(f"real/phraseloc/refcoco+/annotation_{split}.json"), tmp_path / "refer/refcoco+"
        )
        texts, _ = read(data.referring_expressions, tmp_path, split, dataset="refcoco+")
        assert (
            len(texts) == sentences
            and len({t.image for t in texts}) == 750
            and all(len(t.boxes[0]) == 4 and min(t.boxes[0][2:]) > 0 for t in texts)
        )
        assert all(t.image.startswith("COCO_train2014_") for t in texts)
    shutil.copy(shared("real/lxmert_vqa/trainval_label2ans.json"), tmp_path / "vqa2")
    answers = evaluate.TASKS["vqa"].answers(tmp_path)
    assert len(answers) == len(set(answers)) == 3129


def test_soft_targets():
    given = ["yes"] * 7 + ["no"] * 2 + ["Maybe"]
    assert data.soft_target(given, {"yes": 0, "no": 1}) == {0: 1.0, 1: 0.6}


def test_pretraining_sees_no_evaluation_image(toy_tree):
    ids, _, counts = data.held_out(toy_tree)
    judged = {i["cocoid"] for i in data.karpathy_images(toy_tree, "coco") if i["split"] != "train"}
    judged |= {
        int(t.image[-12:])
        for name in data.REFER
        for split in ("val", "testA", "testB", "test")
        for t in read(data.referring_expressions, toy_tree, split, dataset=name)[0]
    }
    assert judged == ids
    for name in ("Karpathy val", "refcocog val, test"):
        assert counts[f"images held out, {name}"] > 0
    also = "images held out, also in Flickr30k"
    coco, stats = read(data.coco_corpus, toy_tree, "train")
    assert not {int(t.image[-12:]) for t in coco} & judged and stats[also] == 2
    images_of = lambda reader: {t.image for t in read(reader, toy_tree, "val")[0]}
    assert images_of(data.coco_corpus) == images_of(data.karpathy_captions)
    images = data.vg_images(toy_tree)
    for text in read(data.vg_descriptions, toy_tree, "train")[0]:
        assert images[int(text.image)]["coco_id"] not in judged
    for corpus in (data.cc3m_captions, data.sbu_captions):
        texts, stats = read(corpus, toy_tree, "train")
        assert stats == {also: 1} and len(texts) > 5 and "3" not in {t.id for t in texts}


def test_karpathys_training_has_restval(tmp_path):
    """Of COCO, as every paper; of its images the first five captions, of Flickr30k's all."""
    splits = "train", "restval", "val", "test"
    sentences = lambda split: [{"raw": f"{split} {i}", "sentid": i} for i in range(6)]
    images = [{"filename": f"{s}.jpg", "split": s, "sentences": sentences(s)} for s in splits]
    for name in ("coco", "flickr30k"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}/dataset_{name}.json").write_text(json.dumps({"images": images}))
    for dataset, n in (("coco", 5), ("flickr30k", 6)):
        for split, parts in (("train", splits[:2]), ("val", ["val"]), ("test", ["test"])):
            texts, _ = read(data.karpathy_captions, tmp_path, split, dataset=dataset)
            assert [t.text for t in texts] == [f"{part} {i}" for part in parts for i in range(n)]
            assert {t.image for t in texts} == {*parts}


def test_photo_numbers():
    for url, number in (
        ("http://farm3.staticflickr.com/2567/3907012345_abc0_z.jpg", "3907012345"),
        ("http://static.flickr.com/2723/4385058960_b0f291553e.jpg", "4385058960"),
        ("http://example.org/1/4385058960_b0f291553e.jpg", ""),
        (None, ""),
    ):
        assert data.flickr_photo(url) == number


def test_vcr_texts_have_their_types_and_tags(toy_tree):
    index = load_vcr(toy_tree, "val", "qar")
    ids, mask = index.text(np.arange(4))
    types, tokenizer = index.text(np.arange(4), "types")[0], index.tokenizer
    seps = [np.flatnonzero(row == tokenizer.sep) for row in ids]
    for row, kind, where, real in zip(ids, types, seps, mask):
        assert len(where) == 3 and where[-1] == real.sum() - 1
        assert (kind[: where[0]] == 0).all() and (kind[where[0] : where[1]] == 2).all()
        assert (kind[where[1] : where[2] + 1] == 3).all()
    records, _ = read(data.vcr_choices, toy_tree, "val", parts=("qar",))
    assert any("person_" in r.text[0][1] for r in records)
    assert all(tokenizer(f"person_{i}") == [len(tokenizer) - 81 + i] for i in (0, 80))
    cut = make_index(records[:4], index.store, tokenizer, max_words=5, group=4)
    assert (cut.arrays["n_words"] == 7).all()
    assert cut.text(np.arange(4))[0].shape == cut.text(np.arange(4), "types")[0].shape == (4, 7)
    assert cut.meta["counts"]["truncated"] == 4
    assert len(examples(index)) * 4 == len(index) == len(records)
    assert len(examples(load_vcr(toy_tree, "val", "all"))) == len(examples(index))


def test_images_of_a_text_stand_side_by_side(toy_tree):
    """VCR's annotated and detected boxes: rows, boxes and types of both images, then padding"""
    index = load_vcr(toy_tree, "val", "qa")
    store, rows = index.store, np.array([0, 8, 4])
    pairs, n = index.image[rows], index.store.counts(index.image[rows])
    assert pairs.shape == (3, 2) and (store.n_regions(pairs) == n.sum(axis=1)).all()
    for column in ("features", "boxes", "cls_id"):
        for row, (left, right), (a, b) in zip(store.read(pairs, column), pairs, n):
            assert np.array_equal(row[:a], store.read(np.array([left]), column)[0])
            assert np.array_equal(row[a : a + b], store.read(np.array([right]), column)[0])
            assert not row[a + b :].any()
    two = data.make_index(
        read(data.nlvr2_pairs, toy_tree, "dev", rows="triplet")[0],
        RegionStore(toy_tree / "regions/nlvr2"),
        index.tokenizer,
        image_types=(1, 2),
    )
    types = two.region_input(two.image[:3], np.arange(3))["region_type"]
    for row, (a, b) in zip(types, two.store.counts(two.image[:3])):
        assert row.tolist() == [1] * a + [2] * b + [0] * (len(row) - a - b)
    assert store.relative_boxes(pairs).max() <= 1


# ---------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("task", ["mlm", "mrfr"])
def test_conditional_and_joint_masking(toy_tree, task):
    """Conditional masking leaves the other modality whole; joint masking hides both and still
    asks for one.
    """
    cfg, runtime, tokenizer = configured(toy_tree, "--recipe", "toy-pretrain")
    pairs = make_index(
        read(data.coco_captions, toy_tree, "val2014")[0],
        RegionStore(toy_tree / "regions/coco"),
        tokenizer,
    )
    cfg = dataclasses.replace(cfg, batch_tokens=512, batch_size=0, mask_rate=0.4)
    one, both = (
        Batches(task, pairs, dataclasses.replace(cfg, joint_masking=joint))
        for joint in (False, True)
    )
    captions, images, _ = one.whole(0)
    assert np.array_equal(both.whole(0)[0], captions)
    truth = torch.from_numpy(pairs.text(captions)[0])
    assert ("hidden_regions" in one[0]) is False and (task == "mlm") == (
        not torch.equal(one[0]["input"]["text"], truth)
    )
    batch = both[0]
    assert not torch.equal(batch["input"]["text"], truth)
    assert len(batch["hidden_regions" if task == "mlm" else "masked_regions"]) >= len(captions)
    assert ("masked_words" in batch) == (task == "mlm") and ("masked_regions" in batch) == (
        task == "mrfr"
    )


def test_masking_leaves_every_separator(toy_tree):
    cfg, runtime, tokenizer = configured(toy_tree, "--recipe", "vcr-pretrain", "--mask-rate", "1.0")
    streams = train.load_streams(cfg, runtime, prepared_run(cfg, tokenizer))
    batch = streams.train[0][0]
    text = batch["input"]["text"].flatten()
    assert not (batch["word_targets"] == tokenizer.sep).any() and (
        text == tokenizer.sep
    ).sum() >= 2 * len(batch["names"])


def test_task_batches_are_the_examples_once_an_epoch(toy_tree):
    task = load(toy_tree, "nlvr2", "dev")
    cfg, _, _ = configured(toy_tree, "--task nlvr2 --batch-tokens 600")
    batches, names, k = Batches("examples", task, cfg), [], 0
    while len(names) < len(examples(task)):
        names += batches[k]["names"]
        x = batches[k]["input"]
        assert len(x["text"]) == 2 * len(batches[k]["names"])
        assert x["region_type"][::2].max() == 1
        k += 1
    assert sorted(names) == sorted(task.row(i)["id"] for i in range(0, len(task), 2))
    x = batches[0]["input"]
    assert torch.equal(x["text"][::2], x["text"][1::2])
    assert {*x["region_type"][1::2].unique().tolist()} <= {0, 2}


@pytest.mark.parametrize("name", ["vqa", "vcr", "nlvr2", "ve", "re"])
def test_ablated_is_ablated(toy_tree, name):
    """A control's output does not move when what it may not see does."""
    cfg, runtime, streams, model = built(toy_tree, "--task", name)
    index = streams.train[0].index
    rows = data.example_rows(index, np.arange(6)).ravel()
    images, model = index.image[rows], model.eval()

    def scores(rows, images):
        x = evaluate.to_device(data.to_device(index.batch(rows, images)), runtime.device)
        with torch.no_grad():
            return model(**x, heads=("task",)).scores

    shown = scores(rows, images)
    other_rows, other_images = np.roll(rows, 2 * index.group), np.roll(images, 2 * index.group, 0)
    same_regions = index.store.n_regions(other_images) == index.store.n_regions(images)
    for what, given in (("text", (other_rows, images)), ("regions", (rows, other_images))):
        # referring expressions: a region is what is asked for, so as many stay
        if what == "regions" and name == "re":
            continue
        index.ablate = what
        torch.testing.assert_close(scores(*given), scores(rows, images))
        index.ablate = ""
        assert not torch.equal(scores(*given), shown)
    assert len(same_regions) == len(rows)


# --------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("argv", TASKS, ids=lambda a: "-".join(map(str, a)))
def test_eight_steps(toy_tree, pretrained, tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    cfg, runtime, _ = configured(
        toy_tree,
        "--task",
        *argv,
        "--init",
        pretrained[0],
        "--steps 8 --warmup 2 --batch-tokens 256 --log-every 1",
    )
    numbers = train.train(cfg, runtime)
    log = [json.loads(line) for line in (tmp_path / cfg.out / "log.jsonl").read_text().splitlines()]
    values = [r[cfg.task if cfg.task != "retrieval" else "rank"] for r in log if "norm" in r]
    assert len(values) == 8 and all(np.isfinite(values))
    wanted = {
        "vqa": ["vqa/accuracy", "vqa/majority"],
        "vcr": ["vcr/q_a", "vcr/qa_r", "vcr/q_ar"],
        "nlvr2": ["nlvr2/accuracy", "nlvr2/consistency"],
        "ve": ["ve/accuracy"],
        "re": ["re/gt/accuracy", "re/det/accuracy", "re/gt/chance"],
        "retrieval": ["winoground/group"],
    }[cfg.task]
    assert all(0 <= numbers[name] <= 100 for name in wanted)
    how = ["--dataset", cfg.dataset] if cfg.task == "retrieval" else []
    how += [f"--task {cfg.task} --ckpt {cfg.out}/last.pt --data", toy_tree]
    done = inside(tmp_path, how, evaluate.main)
    assert done.returncode == 0, done.stderr[-2000:]
    again = json.loads(done.stdout)
    assert all(
        again[name] == pytest.approx(numbers[name], abs=0.01) for name in wanted if name in again
    )


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("vcr", "ve")]


@pytest.mark.parametrize("name", ["vqa", "nlvr2", "re", *OTHERS])
def test_training_lowers_the_loss_of_each_task(toy_tree, name):
    cfg, runtime, streams, model = built(
        toy_tree,
        "--task",
        name,
        "--steps 200 --warmup 1 --lr 0.001 --batch-tokens 256 --head-lr 1",
    )
    optimizers, batch = train.build_optimizers(cfg, model), streams.train[0][0]
    values = [
        train.train_step(cfg, runtime, model, optimizers, 1, [batch])[0][name].item()
        for _ in range(60)
    ]
    assert values[-1] < 0.7 * values[0], values[::10]
    batch = evaluate.to_device(batch, runtime.device)
    assert train.objective_task(cfg, model.eval(), batch)[1].float().mean() > 0.6


def test_alignment_losses_run_on_downstream_tasks(toy_tree, pretrained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg, runtime, _ = configured(
        toy_tree,
        "--task vqa --loss cacr+wra",
        "--init",
        pretrained[0],
        "--steps 3 --warmup 1 --batch-tokens 256 --log-every 1",
    )
    train.train(cfg, runtime)
    log = [json.loads(line) for line in (tmp_path / cfg.out / "log.jsonl").read_text().splitlines()]
    assert all(np.isfinite(r["cacr"]) and np.isfinite(r["wra"]) for r in log if "norm" in r)


def test_second_stage_and_all_corpora_then_vcr(toy_tree, pretrained, tmp_path, monkeypatch):
    """Four corpora, then VCR's second stage from that, then VCR itself: vocabulary and types grow
    on the way and stay.
    """
    monkeypatch.chdir(tmp_path)
    short = ("--steps", 4, "--warmup", 1, "--batch-tokens", 256, "--accumulate", 1)
    short = ("--size", "tiny", *short)
    cfg, runtime, _ = configured(
        toy_tree, "--recipe", "uniter-pretrain-all", *short, "--out", "first"
    )
    numbers = train.train(cfg, runtime)
    assert {"val/coco/mlm", "val/vg/mlm", "val/cc3m/itm", "val/sbu/mrckl"} <= set(numbers)
    cfg, runtime, _ = configured(
        toy_tree, "--recipe", "vcr-pretrain", *short, "--init", "first/last.pt", "--out", "second"
    )
    train.train(cfg, runtime)
    second = read_checkpoint("second/last.pt")
    assert (
        second.sizes["types"] == 4
        and second.sizes["vocab"] == read_checkpoint("first/last.pt").sizes["vocab"] + 81
    )
    cfg, runtime, _ = configured(
        toy_tree, "--task", "vcr", *short, "--init", "second/last.pt", "--out", "third"
    )
    assert "vcr/q_ar" in train.train(cfg, runtime)


def test_heads_learn_faster_when_asked(toy_tree):
    cfg, runtime, streams, model = built(toy_tree, "--task", "vqa", "--head-lr", 10)
    (optimizer,) = train.build_optimizers(cfg, model)
    train.train_step(cfg, runtime, model, [optimizer], cfg.warmup, [streams.train[0][0]])
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert all(
        rates[id(p)] == pytest.approx(cfg.lr * (10 if name.startswith("task_head") else 1))
        for name, p in model.named_parameters()
    )
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


def test_head_of_another_task_stays_at_its_start(toy_tree, pretrained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ("--steps", 2, "--warmup", 1, "--batch-tokens", 256)
    cfg, runtime, _ = configured(toy_tree, "--task", "vqa", *short, "--init", pretrained[0])
    train.train(cfg, runtime)
    start = f"{cfg.out}/last.pt"
    cfg, runtime, _ = configured(toy_tree, "--task ve --out o --init", start, *short)
    assert "ve/accuracy" in train.train(cfg, runtime)


# ----------------------------------------------------------------------- retrieval and its mining


def test_all_pairs_are_the_pairs_one_by_one_and_features_are_read_once(
    toy_tree, tmp_path, monkeypatch
):
    cfg, runtime, streams, model = built(toy_tree, "--task", "retrieval")
    records, _ = read(data.karpathy_captions, toy_tree, "test", dataset="flickr30k")
    pairs = make_index(records, streams.train[0].index.store, streams.train[0].index.tokenizer)
    run = evaluate.Run(model.eval(), None, {}, {}, None)
    T, I = len(pairs), len(pairs.images)
    rows, images = np.repeat(np.arange(T), I), np.tile(pairs.images, T)
    slow = evaluate.score_pairs(model, pairs, rows, images).reshape(T, I)
    counts, whole = [], RegionStore.read

    def counted(self, images, column="features"):
        counts.append(len(images) * (column == "features"))
        return whole(self, images, column)

    monkeypatch.setattr(RegionStore, "read", counted)
    for at_once in (1, 3, 32):
        counts.clear()
        scores = evaluate.score_all(run, pairs, "rank", images_at_once=at_once)
        np.testing.assert_allclose(scores, slow, atol=2e-5)
        assert sum(counts) == I


def test_mining_keeps_the_hardest(toy_tree):
    cfg, runtime, tokenizer = configured(
        toy_tree, "--task retrieval --candidates 0 --negatives 2 --mine-every 8 --batch-tokens 600"
    )
    stream = train.load_streams(cfg, runtime, prepared_run(cfg, tokenizer)).train[0]
    index, rng = stream.index, np.random.default_rng(1)
    own = np.repeat(index.image[:, None], 128, axis=1)
    images = data.mismatched_images(rng, index.images, own.ravel()).reshape(own.shape)
    scores = rng.random(images.shape, np.float32)
    hard = train.hardest_of(index, images, scores)
    best = scores.argmax(axis=1)
    assert np.array_equal(hard.images[:, 0], images[np.arange(len(images)), best])
    one = int(images[0, 0])
    at = np.argwhere(images == one)
    top = at[np.argsort(-scores[at[:, 0], at[:, 1]], kind="stable")][:, 0][: data.HARDEST]
    assert hard.captions[one].tolist() == [int(top[i % len(top)]) for i in range(data.HARDEST)]
    stream.helpers["hard"] = hard
    batch = stream[0]
    G = len(batch["names"])
    # one matched, two random ones, and a mined one each way
    assert batch["pool"].rows.shape == batch["pool"].images.shape == (G, 5)
    known = hard.captions >= 0
    image_of_row = np.repeat(np.arange(len(hard.captions)), known.sum(axis=1))
    assert (index.image[hard.captions[known]] != image_of_row).all()


def test_each_mining_scores_other_images(toy_tree, tmp_path, monkeypatch):
    """Else a caption would meet the same few images all through the run."""
    how = "--task retrieval --candidates 0 --mine-every 2 --mine-pool 4 --batch-tokens 256"
    cfg, runtime, tokenizer = configured(toy_tree, how)
    index = train.load_streams(cfg, runtime, prepared_run(cfg, tokenizer)).train[0].index
    cfg.out, seen = str(tmp_path), []

    def score(model, index, rows, images, **_):
        seen.append(images.copy())
        return np.zeros(len(rows), np.float32)

    monkeypatch.setattr(train.evaluate, "score_pairs", score)
    for step in (0, 2):
        train.mine_negatives(cfg, runtime, None, index, step)
    assert seen[0].shape == seen[1].shape and (seen[0] != seen[1]).mean() > 0.5


def test_mining_resumes_to_the_same_bits(toy_tree, pretrained, tmp_path):
    args = [
        "--task retrieval",
        "--data",
        toy_tree,
        "--init",
        pretrained[0],
        "--candidates 0 --mine-every 4 --mine-pool 6 --negatives 2 --steps 8 --warmup 2",
        "--batch-tokens 256 --save-every 3",
        *QUICK,
    ]
    run(tmp_path, *args, "--out", "whole")
    run_and_stop(tmp_path, args, "cut")
    run(tmp_path, *args, "--out", "cut", "--resume")
    same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


# ------------------------------------------------------------------------------ evaluation, files


def test_nlvr2_metrics_against_the_official_script(monkeypatch):
    """Accuracy and consistency, overall and on the balanced and unbalanced subsets."""
    z = np.load(shared("golden/metrics_nlvr2.npz"))
    ids, labels = z["identifiers"], z["labels"].astype(int)

    class Index:
        meta, group = {"counts": {}}, 1

    monkeypatch.setattr(evaluate.Predictions, "ids", property(lambda p: p.index.ids))
    monkeypatch.setattr(evaluate.Predictions, "target", property(lambda p: p.index.labels))
    run = evaluate.Run(None, None, {"answer_list": []}, {}, None)
    for name in ("random", "acc70", "bysentence", "all_true"):
        for subset in ("dev", "balanced", "unbalanced"):
            part = np.ones(len(ids), bool) if subset == "dev" else z[f"subset/{subset}"]
            index = Index()
            index.ids, index.labels = ids[part].tolist(), labels[part]
            answers = evaluate.Predictions("", index, z[f"pred/{name}"][part].astype(int))
            ours = evaluate.nlvr2_numbers(run, "dev", answers)
            accuracy, consistency = 100 * z[f"official/{name}/{subset}"]
            assert ours["accuracy"] == pytest.approx(accuracy, abs=1e-10)
            assert ours["consistency"] == pytest.approx(consistency, abs=1e-10)
            filtered = float(z[f"official_filtered_percent/{name}/{subset}"])
            assert ours["accuracy"] == pytest.approx(filtered, abs=1e-9)


@pytest.mark.parametrize("name", ["vqa", "vcr", "nlvr2"])
def test_submission_files(toy_tree, pretrained, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    cfg, runtime, _ = configured(
        toy_tree, "--task", name, "--init", pretrained[0], "--steps 2 --warmup 1 --batch-tokens 256"
    )
    train.train(cfg, runtime)
    file = tmp_path / f"submit.{'json' if name == 'vqa' else 'csv'}"
    split = {"vqa": "val2014", "vcr": "val", "nlvr2": "test1"}[name]
    how = [f"--task {name} --split {split} --ckpt {cfg.out}/last.pt --submit", file]
    done = inside(tmp_path, [*how, "--data", toy_tree], evaluate.main)
    assert done.returncode == 0, done.stderr[-2000:]
    if name == "vqa":
        rows = json.loads(file.read_text())
        asked = {int(t.id) for t in read(data.vqa_questions, toy_tree, split)[0]}
        assert {r["question_id"] for r in rows} == asked
        assert all(isinstance(r["answer"], str) for r in rows)
    else:
        rows = list(csv.reader(file.open()))
        if name == "nlvr2":
            asked = read(data.nlvr2_pairs, toy_tree, split, rows="triplet")[0]
            assert [r[0] for r in rows] == [e.id for e in asked]
            assert {r[1] for r in rows} <= {"True", "False"}
        else:
            assert len(rows[0]) == 21 and rows[0][:2] == ["annot_id", "answer_0"]
            assert rows[0][-1] == "rationale_conditioned_on_a3_3"
            values = np.array([r[1:] for r in rows[1:]], float).reshape(len(rows) - 1, 5, 4)
            np.testing.assert_allclose(values.sum(-1), 1, atol=1e-5)


def test_a_test_set_without_labels_can_be_answered(toy_tree, pretrained, tmp_path, monkeypatch):
    """VQA's test2015 has no annotations file, VCR's and NLVR2's test records lack the labels."""
    monkeypatch.chdir(tmp_path)
    tree = shutil.copytree(toy_tree, tmp_path / "toy")
    questions = json.loads((tree / "vqa2/v2_OpenEnded_mscoco_val2014_questions.json").read_text())
    store = tree / "regions/coco"
    ids = [
        name.replace(b"COCO_val2014", b"COCO_test2015")
        for name in np.load(store / "ids.npy").tolist()
    ]
    np.save(store / "ids.npy", np.array(ids))
    (tree / "vqa2/v2_OpenEnded_mscoco_test-dev2015_questions.json").write_text(
        json.dumps(questions)
    )
    task = load(tree, "vqa", "test-dev2015")
    assert not task.arrays["answered"].any() and len(task) == len(questions["questions"])
    cfg, _, _ = configured(tree, "--task vqa --batch-tokens 256")
    with pytest.raises(DataError, match="0 examples to learn from"):
        Batches("examples", task, cfg)[0]
    records = [json.loads(line) for line in (tree / "vcr1/val.jsonl").read_text().splitlines()]
    for r in records:
        del r["answer_label"], r["rationale_label"]
    (tree / "vcr1/test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    unknown = load_vcr(tree, "test", "all")
    assert not unknown.arrays["answered"].any() and len(examples(unknown)) == len(records)
    with pytest.raises(DataError, match="no field 'answer_label'"):
        load_vcr(tree, "test", "qar")


# -------------------------------------------------------------------------------------- bad input


def edited(toy_tree, tmp_path, file, change, lines=False):
    """A copy of the tree with one file changed."""
    tree = copied(toy_tree, tmp_path / "toy", file.split("/")[0])
    path = tree / file
    text = path.read_text()
    record = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    record = change(record) or record
    path.write_text("".join(json.dumps(r) + "\n" for r in record) if lines else json.dumps(record))
    return tree


def banner(tree, pretrained, tmp_path, *argv, expect=0):
    return run(
        tmp_path,
        "--data",
        tree,
        "--init",
        pretrained[0],
        "--steps 1 --warmup 1 --batch-tokens 256",
        *QUICK,
        "--task",
        *argv,
        expect=expect,
    )


def test_vqa_questions_without_annotations_have_no_answer(toy_tree, tmp_path):
    lose = lambda r: r["annotations"].__delitem__(slice(0, 7))
    tree = edited(toy_tree, tmp_path, "vqa2/v2_mscoco_train2014_annotations.json", lose)
    index = load(tree, "vqa", "train2014")
    assert (index.arrays["answered"] == 0).sum() == 7


def test_nlvr2_missing_image_is_counted_or_an_error(toy_tree, pretrained, tmp_path):
    def lose(records):
        records[0]["identifier"] = "train-9999-0-0"

    tree = edited(toy_tree, tmp_path, "nlvr2/train.json", lose, lines=True)
    stopped = banner(tree, pretrained, tmp_path, "nlvr2", expect=1)
    assert (
        "train-9999-0-img0" in stopped.stderr
        and "--skip-missing" in stopped.stderr
        and "Traceback" not in stopped.stderr
    )
    assert (
        "2 texts without features"
        in banner(tree, pretrained, tmp_path, "nlvr2", "--skip-missing").stdout
    )


def test_nlvr2_missing_image_counts_as_wrong_in_evaluation(toy_tree):
    index = load(toy_tree, "nlvr2", "dev")
    right = evaluate.Predictions("", index, index.targets(examples(index)))
    run = evaluate.Run(None, None, {"answer_list": []}, {}, None)
    assert evaluate.nlvr2_numbers(run, "dev", right)["accuracy"] == 100
    index.meta["counts"]["without features"] = len(index)
    assert evaluate.nlvr2_numbers(run, "dev", right)["accuracy"] == 50


def test_an_example_with_one_missing_image_is_left_out_whole(toy_tree):
    """NLVR2's two rows stay together, so that the rows after them keep their partners."""
    records, _ = read(data.nlvr2_pairs, toy_tree, "dev")
    broken = [records[0], records[1]._replace(image="nowhere"), *records[2:]]
    store = RegionStore(toy_tree / "regions/nlvr2")
    tokenizer = evaluate.load_wordpiece(toy_tree, True)
    with pytest.raises(DataError, match="image nowhere has texts but no features"):
        make_index(broken, store, tokenizer, group=2)
    index = make_index(broken, store, tokenizer, group=2, skip_missing=True)
    assert len(index) == len(records) - 2 and index.meta["counts"]["without features"] == 2
    assert [index.row(i)["id"] for i in range(len(index))] == [r.id for r in records[2:]]
    assert "2 texts without features" in str(index)


def test_vcr_tag_past_the_boxes_is_counted(toy_tree, pretrained, tmp_path):
    tree = edited(
        toy_tree,
        tmp_path,
        "vcr1/train.jsonl",
        lambda r: r[0]["question"].__setitem__(3, [17]),
        lines=True,
    )
    # once for answers, once for reasons
    assert (
        "2 tags that point past the boxes, read as [UNK]"
        in banner(tree, pretrained, tmp_path, "vcr").stdout
    )
    texts, _ = read(data.vcr_choices, tree, "train", parts=("qa",))
    assert texts[0].text[0] == (0, "What color is [UNK] ?")


def test_snli_ve_without_a_gold_label_is_counted(toy_tree, pretrained, tmp_path):
    tree = edited(
        toy_tree,
        tmp_path,
        "snli_ve/snli_ve_train.jsonl",
        lambda r: [{**x, "gold_label": "-"} if i < 3 else x for i, x in enumerate(r)],
        lines=True,
    )
    assert "3 pairs left out: label '-'" in banner(tree, pretrained, tmp_path, "ve").stdout
    tree = edited(
        tree,
        tmp_path,
        "snli_ve/snli_ve_train.jsonl",
        lambda r: [{**x, "gold_label": "perhaps"} for x in r],
        lines=True,
    )
    with pytest.raises(DataError, match="'perhaps'"):
        list(data.records(data.entailment_pairs, tree, "train", Counter()))


def test_snli_ve_image_names_old_and_new(toy_tree, tmp_path):
    old = lambda records: [{"Flikr30kID": r.pop("Flickr30K_ID") + ".jpg", **r} for r in records]
    tree = edited(toy_tree, tmp_path, "snli_ve/snli_ve_dev.jsonl", old, lines=True)
    assert [t.image for t in read(data.entailment_pairs, tree, "dev")[0]] == [
        t.image for t in read(data.entailment_pairs, toy_tree, "dev")[0]
    ]


def test_expression_that_matches_no_region_is_counted_and_wrong(toy_tree, pretrained, tmp_path):
    def move(record):
        for a in record["annotations"][-5:]:
            a["bbox"] = [0.0, 0.0, 2.0, 2.0]

    tree = edited(toy_tree, tmp_path, "refer/refcoco/instances.json", move)
    assert "10 texts without a matching region" in banner(tree, pretrained, tmp_path, "re").stdout
    task = load(tree, "re", "train")
    wrong = task.targets(examples(task)) == -1
    assert wrong.sum() == 10 and not task.arrays["answered"][wrong].any()


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/nanoalign_was_here",)


@pytest.mark.parametrize(
    "content",
    [pickle.dumps([Evil()]), b"\x80\x02]q", b"no pickle at all", pickle.dumps(np.arange(3))],
    ids=["code", "cut", "text", "array"],
)
def test_pickles_with_more_than_plain_containers_are_refused(toy_tree, tmp_path, content):
    tree = copied(toy_tree, tmp_path / "toy", "refer")
    (tree / "refer/refcoco/refs(unc).p").write_bytes(content)
    with pytest.raises(DataError, match=r"refs\(unc\).p"), data.reading():
        data.read_refs(tree, "refcoco")
    assert not os.path.exists("/tmp/nanoalign_was_here")


def test_python2_pickles_are_read(tmp_path):
    """Protocol 0 and 2, byte strings, as the official files."""
    folder = tmp_path / "refer/refcoco"
    folder.mkdir(parents=True)
    record = [{"ref_id": 5, "sent": "caf\xe9"}]
    for protocol in (0, 2):
        (folder / "refs(unc).p").write_bytes(pickle.dumps(record, protocol=protocol))
        assert data.read_refs(tmp_path, "refcoco") == record
    (folder / "refs(unc).p").write_bytes(b"(lp0\n(dp1\nS'sent'\np2\nS'a cup'\np3\nsa.")
    assert data.read_refs(tmp_path, "refcoco") == [{"sent": "a cup"}]


@pytest.mark.parametrize(
    "task, file",
    [
        ("vqa", "vqa2/v2_OpenEnded_mscoco_train2014_questions.json"),
        ("vqa", "vqa2/v2_mscoco_train2014_annotations.json"),
        ("vcr", "vcr1/train.jsonl"),
        ("nlvr2", "nlvr2/train.json"),
        ("ve", "snli_ve/snli_ve_train.jsonl"),
        ("re", "refer/refcoco/instances.json"),
    ],
)
@pytest.mark.parametrize("how", ["cut", "missing", "another"])
def test_malformed_files_are_one_clear_error(toy_tree, tmp_path, task, file, how):
    tree = copied(toy_tree, tmp_path / "toy", file.split("/")[0])
    path = tree / file
    text = path.read_text()
    if how == "missing":
        path.unlink()
    else:
        path.write_text(
            text[: len(text) // 2]
            if how == "cut"
            else re.sub(
                r'"(question_id|question|sentence|sentence2|annotations)":', r'"x_\1":', text
            )
        )
    with pytest.raises(DataError) as error:
        load(tree, task, {"vqa": "train2014"}.get(task, "train"))
    assert path.name in str(error.value) and "\n" in str(error.value)


@pytest.mark.parametrize(
    "argv, match",
    [
        (["--task", "re", "--dataset", "refcocoo"], "did you mean refcoco"),
        (["--task", "vqa", "--task-loss", "rank"], "not for --task vqa"),
        (["--corpora", "coco+vgg"], "did you mean vg"),
        (["--corpora", "coco+vcr"], "vcr alone"),
        (["--mine-every", "5"], "choose one"),
        (["--ablate", "text"], "not for --task retrieval"),
        (["--head-lr", "0"], "more than 0"),
    ],
)
def test_wrong_settings(argv, match):
    with pytest.raises(train.UserError, match=match):
        train.parse(argv)


def test_an_official_fine_tuned_checkpoint_is_evaluated_as_it_comes(
    toy_tree, pretrained, tmp_path, monkeypatch
):
    """Weights alone, under the authors' names: a run of no updates."""
    monkeypatch.chdir(tmp_path)
    cfg, runtime, _ = configured(
        toy_tree, "--task vqa --init", pretrained[0], "--steps 3 --warmup 1 --batch-tokens 256"
    )
    numbers = train.train(cfg, runtime)
    names = {
        "text_embedding.word": "uniter.embeddings.word_embeddings",
        "task_head": "vqa_output",
        "pooler": "uniter.pooler.dense",
    }
    official = {}
    for name, tensor in read_checkpoint(f"{cfg.out}/last.pt").model.items():
        if not name.startswith("classifier"):  # the toy's detector knows other classes
            ours = next((k for k in names if name.startswith(k)), "")
            official[names.get(ours, "") + name[len(ours) :]] = tensor
    torch.save(official, "vqa.pt")
    cfg, runtime, _ = configured(toy_tree, "--task vqa --steps 0 --out o --init vqa.pt")
    again = train.train(cfg, runtime)
    assert again["vqa/accuracy"] == pytest.approx(numbers["vqa/accuracy"], abs=0.3)
    how = ["--task vqa --ckpt o/last.pt --data", toy_tree]
    done = inside(tmp_path, how, evaluate.main)
    shown = json.loads(done.stdout)["vqa/accuracy"]
    assert shown == pytest.approx(again["vqa/accuracy"], abs=0.01), done.stderr


def test_a_record_that_is_none_is_one_clear_error(toy_tree, tmp_path):
    """A list where VCR's file has a record, a text where GQA's has a question."""
    (tmp_path / "vcr1").mkdir(), (tmp_path / "gqa").mkdir()
    (tmp_path / "vcr1/train.jsonl").write_text('["not a record"]\n')
    (tmp_path / "gqa/train_balanced_questions.json").write_text('{"07": "a text"}')
    with pytest.raises(DataError, match="train.jsonl, item 0: .*\\n  Wanted: the official format"):
        list(data.records(data.vcr_choices, tmp_path, "train", Counter()))
    with pytest.raises(DataError, match="train_balanced_questions.json, item 0: "):
        list(data.records(data.gqa_questions, tmp_path, "train_balanced", Counter()))
