"""Readers, store, tokenizer and batches; and every kind of bad file a user may have."""

import base64
import hashlib
import importlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import toy as world
import train
from conftest import ROOT, batches_of, ids_of, inside, read, shared
from data import DataError, RegionStore, WordPiece, make_index


@pytest.fixture(scope="session")
def toy(toy_tree):
    return toy_tree


@pytest.fixture(scope="session")
def words(toy):
    return WordPiece(toy / "bert-base-cased/vocab.txt", lower=False)


@pytest.fixture(scope="session")
def pairs(toy, words):
    captions, _ = read(data.coco_captions, toy, "train2014")
    return make_index(captions, RegionStore(toy / "regions/coco"), words)


def digest(folder):
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def fails(match, f, *args, **kwargs):
    with pytest.raises(DataError, match=match) as error:
        f(*args, **kwargs)
    assert len(str(error.value)) < 1200
    return str(error.value)


# -------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize("name, lower", [("wordpiece", True), ("wordpiece_cased", False)])
def test_tokenizer_is_berts(name, lower):
    """300 strings through HuggingFace's tokenizer with BERT's vocabulary; the strings are hard
    ones.
    """
    tokenizer = WordPiece(shared("real/bert/vocab.txt"), lower)
    golden = json.loads(shared(f"golden/{name}.json").read_text(encoding="utf-8"))["strings"]
    ids = lambda text: [tokenizer.cls, *tokenizer(text), tokenizer.sep]
    wrong = [s["text"] for s in golden if ids(s["text"]) != s["ids"]]
    assert len(golden) >= 300 and not wrong, wrong[:5]


def test_tokenizer_without_third_party_data(toy, words):
    t = WordPiece(toy / "bert-base-uncased/vocab.txt", lower=True)
    assert [
        t.pieces[i] for i in t("A RED circle, [MASK]zq")
    ] == "a red circle , [MASK] z ##q".split()
    assert t("") == [] and t("北") == [t.unk] and t("x" * 101) == [t.unk]
    assert words("RED") == [words.unk]


def test_vocabulary_without_mask(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nred\n")
    fails(r"vocab.txt: no field '\[MASK\]'", WordPiece, tmp_path / "vocab.txt", True)


# -------------------------------------------------------------------------------------- toy world


def test_same_seed_same_bytes(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        world.make_toy(tmp_path / name, seed=seed, scenes=60)
    a, b, c = (digest(tmp_path / n) for n in "abc")
    assert a == b
    assert sum(a[k] != c.get(k) for k in a) > len(a) / 2


def test_splits_share_no_scene_and_captions_are_true(toy):
    splits = [read(data.karpathy_captions, toy, s, dataset="flickr30k")[0] for s in SPLITS]
    train, val, test = ({c.image for c in captions} for captions in splits)
    assert train and val and test and not train & val and not val & test and not train & test
    rng = np.random.default_rng(0)
    for _ in range(200):
        things = world.draw_scene(rng)
        text = world.spoken(world.describe(rng, things)).replace(" to the", "")
        for name in world.RELATIONS:
            if f" {name} " in text:
                sides = text.split(f" {name} ")
                a, b = (next(t for t in things if f"{t.colour} {t.shape}" in s) for s in sides)
                assert world.relation(a, b) == name, text


SPLITS = "train", "val", "test"


def test_winoground_pairs_are_swaps(toy):
    records, _ = read(data.winoground_examples, toy, "")
    for a, b in zip(records[::2], records[1::2]):
        assert sorted(a.text.split()) == sorted(b.text.split()) and a.text != b.text


def test_toy_is_left_alone_or_made_again(tmp_path):
    world.make_toy(tmp_path / "toy", scenes=60)
    before = (tmp_path / "toy/toy.json").stat().st_mtime_ns
    world.ensure_toy(tmp_path / "toy")
    assert (tmp_path / "toy/toy.json").stat().st_mtime_ns == before
    (tmp_path / "toy/own").mkdir()
    (tmp_path / "toy/toy.json").write_text(json.dumps({"version": 0, "seed": 4, "scenes": 70}))
    world.ensure_toy(tmp_path / "toy")
    made = json.loads((tmp_path / "toy/toy.json").read_text())
    assert made == {"version": world.TOY_VERSION, "seed": 4, "scenes": 70}
    # what a user has put there stays
    assert (tmp_path / "toy/own").exists() and [p.name for p in tmp_path.iterdir()] == ["toy"]
    mine = tmp_path / "mine"
    mine.mkdir()
    world.ensure_toy(mine)
    assert list(mine.iterdir()) == []
    with pytest.raises(DataError, match="exists already"):
        world.make_toy(mine)


def test_killed_toy_leaves_nothing(tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'tests')\nimport toy, os\n"
        "toy.toy_vg = lambda *a: os.kill(os.getpid(), 9)\n"
        f"toy.make_toy({str(tmp_path / 'toy')!r}, scenes=60)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == -9 and not (tmp_path / "toy").exists()


def test_crops_show_what_they_are_about(toy):
    """Each is of one picture, round the region that its description is of."""
    store = data.PatchStore(str(toy), "crops", world.CROP, 16)
    options = {"name": "crops"}
    train, val = (read(data.own_captions, toy, split, **options)[0] for split in ("train", "val"))
    regions = {
        str(r["region_id"]): r["phrase"]
        for _, rs in data.vg_items(toy, "region_descriptions", "regions")
        for r in rs
    }
    assert len(train) > 100 and val and {r.image for r in train + val} == set(ids_of(store))
    assert all(regions[r.id] == r.text for r in train + val)
    assert not {r.image[:7] for r in train} & {r.image[:7] for r in val}
    rng, region = np.random.default_rng(0), dict(x=50, y=60, width=40, height=30)
    for _ in range(50):
        left, top, right, bottom = world.crop_window(rng, region)
        assert 0 <= left <= 50 and 90 <= right <= world.WIDTH and 0 <= top <= 60 and bottom >= 90


def parsed(caption):
    """A caption of the toy Winoground as a Statement"""
    noun = rf"a (?:({'|'.join(world.SIZES)}) )?({'|'.join(world.COLOURS)}) (\w+)"
    nouns = list(re.finditer(noun, caption))
    links = []
    for k, (left, right) in enumerate(itertools.pairwise(nouns)):
        between = caption[left.end() : right.start()].strip().removeprefix("and").strip()
        links += [(0, between, k + 1)] if between else []
    statement = world.Statement(tuple((m[1] or "", m[2], m[3]) for m in nouns), tuple(links))
    assert str(statement) == caption
    return statement


def test_winoground_can_be_solved_from_its_regions(toy):
    """An oracle that reads the detector's regions: every caption is true of its own image alone."""
    store, looks = RegionStore(toy / "regions/winoground"), world.appearance()
    records, _ = read(data.winoground_examples, toy, "")
    statements, seen = [parsed(r.text) for r in records], []
    places = store.numbers()
    for record in records:
        one = np.array([places[record.image]])
        row = {"features": store.read(one)[0], "boxes": store.read(one, "boxes")[0]}
        seen.append(world.things_seen(row, looks))
    pairs = list(itertools.product((0, 1), repeat=2))
    right = [
        all(statements[e + c].holds(seen[e + i]) == (c == i) for c, i in pairs)
        for e in range(0, len(records), 2)
    ]
    assert np.mean(right) >= 0.98


def test_other_things_never_make_both_captions_true_for_good():
    """Seeds 8 and 9 draw a blue circle and a red square beside "a red circle and a blue square"."""
    looks = world.appearance()
    for seed in (8, 9):
        rng = np.random.default_rng([seed, 3])
        assert all(len(world.draw_example(rng, looks)[0]) == 2 for _ in range(400))


def test_held_out_combinations_are_never_said(toy):
    """Each of the six is in some caption of Winoground, and in none to learn from; each shape and
    each relation is said with others.
    """
    learned = [r.text for r in read(data.coco_captions, toy, "train2014")[0]]
    learned += [r.text for r in read(data.karpathy_captions, toy, "train", dataset="flickr30k")[0]]
    learned += [r.text for r in read(data.vg_descriptions, toy, "train")[0]]
    text = "\n".join(learned).replace("to the ", "")
    for shape, relation in world.HELD_OUT:
        assert f"{shape} {relation} a" not in text
        assert all(f"{shape} {r} a" in text for r in world.RELATIONS[:4] if r != relation), shape


# --------------------------------------------------------------------------------- store and pack


def row(image, n=36, width=8, w=640, h=480, kind="lxmert", seed=0):
    """A line of LXMERT's or bottom-up attention's TSV files, its boxes and features"""
    rng = np.random.default_rng(seed)
    corner = rng.random((n, 2)) * [w / 2, h / 2]
    boxes = np.concatenate([corner, corner + rng.random((n, 2)) * [w / 2, h / 2]], 1).astype("<f4")
    features = rng.random((n, width)).astype("<f4")
    b = lambda x, t: base64.b64encode(np.ascontiguousarray(x, t).tobytes()).decode()
    ids, conf = rng.integers(0, 1600, n), rng.random(n)
    arrays = b(boxes, "<f4"), b(features, "<f4")
    cells = [image, w, h, n, *arrays]
    if kind == "lxmert":
        attributes = b(ids % 400, "<i8"), b(conf, "<f4")
        cells = [image, h, w, b(ids, "<i8"), b(conf, "<f4"), *attributes, n, *arrays]
    return "\t".join(map(str, cells)), boxes, features


@pytest.mark.parametrize("kind", ["lxmert", "butd"])
def test_pack_tsv(tmp_path, kind):
    n = lambda i: 36 if kind == "lxmert" else 10 + i
    rows = [row(f"img{i}", n(i), kind=kind, seed=i) for i in range(5)]
    (tmp_path / "f.tsv").write_text("\n".join(r[0] for r in rows) + "\n")
    evaluate.pack([tmp_path / "f.tsv"], tmp_path / "store")
    store = RegionStore(tmp_path / "store")
    assert ids_of(store) == [f"img{i}" for i in range(5)] and store.wh.tolist() == [[640, 480]] * 5
    features = store.read(np.array([3, 1]))
    boxes = store.relative_boxes(np.array([3, 1])) * [640, 480, 640, 480]
    for b, i in enumerate((3, 1)):
        _, wanted, wanted_features = rows[i]
        np.testing.assert_array_equal(features[b, : n(i)], wanted_features.astype(np.float16))
        np.testing.assert_allclose(boxes[b, : n(i)], wanted, rtol=1e-5, atol=1e-3)
    assert ("cls_id" in store.arrays) == (kind == "lxmert")


def test_pack_uniter_npz(tmp_path):
    (tmp_path / "npz").mkdir(), (tmp_path / "jpg").mkdir()
    Image.new("RGB", (200, 100)).save(tmp_path / "jpg/COCO_train2014_000000000007.jpg")
    boxes = np.tile(np.array([0.1, 0.2, 0.5, 0.6, 0.4, 0.4], np.float16), (20, 1))
    probs = np.random.default_rng(0).dirichlet(np.ones(6), 20).astype(np.float16)
    arrays = {"features": np.ones((20, 8), np.float16), "norm_bb": boxes, "soft_labels": probs}
    arrays["conf"] = np.array([0.9] * 12 + [0.1] * 8, np.float32)
    for name in ("coco_train2014_000000000007", "flickr30k_000000001234"):
        np.savez(tmp_path / f"npz/{name}.npz", **arrays)
    evaluate.pack([tmp_path / "npz"], tmp_path / "store", tmp_path / "jpg")
    store = RegionStore(tmp_path / "store")
    assert ids_of(store) == ["COCO_train2014_000000000007", "1234"]
    assert store.wh.tolist() == [[200, 100], [1, 1]]
    # those above 0.2, at least 10
    assert store.n_regions(np.arange(len(store))).tolist() == [12, 12] and store.classes == 6
    np.testing.assert_allclose(store.arrays["boxes"][0], [20, 20, 100, 60], rtol=1e-2)


def test_vcrs_two_kinds_of_boxes_are_one_store(tmp_path, toy):
    """UNITER's names of annotated and of detected boxes; a text shows both, side by side."""
    arrays = {"norm_bb": np.tile([[0, 0, 0.5, 0.5]], (10, 1)), "soft_labels": np.ones((10, 3))}
    arrays |= {"conf": np.ones(10), "features": np.zeros((10, 4)), "wh": (8, 8)}
    (tmp_path / "npz").mkdir()
    for name in ("vcr_gt_val_a@0", "vcr_val_a@0"):
        del arrays["wh"]
        np.savez(tmp_path / f"npz/{name}.npz", **arrays)
        arrays["wh"] = (8, 8)
    Image.new("RGB", (8, 8)).save(tmp_path / "a@0.png")
    evaluate.pack([tmp_path / "npz"], tmp_path / "vcr", tmp_path)
    assert set(ids_of(RegionStore(tmp_path / "vcr"))) == {"a@0", "det/a@0"}
    words = WordPiece(toy / "bert-base-cased/vocab.txt", False, data.VCR_WORDS)
    store, records = RegionStore(toy / "regions/vcr"), read(data.vcr_choices, toy, "val")[0][:8]
    index = make_index(records, store, words, group=4, image_types=(1, 1))
    batch, (given, detected) = index.batch(np.arange(8), index.image), index.image.T
    for b in range(8):
        parts = [store.read(one[[b]])[0] for one in (given, detected)]
        n = sum(map(len, parts))
        assert batch["region_mask"][b].sum() == n and (batch["region_type"][b, :n] == 1).all()
        np.testing.assert_array_equal(batch["regions"][b, :n], np.concatenate(parts))


@pytest.mark.parametrize(
    "npz, image",
    [
        ("coco_train2014_000000000042", "COCO_train2014_000000000042"),
        ("flickr30k_000001000092795", "1000092795"),
        ("vg_000000002354", "2354"),
        ("gcc_train_000000000042", "42"),
        ("nlvr2_dev-850-0-img0", "dev-850-0-img0"),
        ("nlvr2_train-10171-0-img1", "train-10171-0-img1"),
        ("vcr_gt_val_1001_Some_Film_00.11@3", "1001_Some_Film_00.11@3"),
        ("vcr_train_1001_Some_Film_00.11@3", "det/1001_Some_Film_00.11@3"),
        ("visual_grounding_coco_gt_000000581857", "COCO_train2014_000000581857"),
        ("visual_grounding_det_coco_000000581857", "COCO_train2014_000000581857"),
    ],
)
def test_names_of_uniters_feature_files(npz, image):
    """They become the ids that the readers of the same data set use."""
    assert evaluate.uniter_image_id(npz) == image


def test_relative_boxes_stay_in_the_unit_square(tmp_path):
    """Rounding elsewhere may leave a box a hair outside its image, which a store bears."""
    writer = evaluate.StoreWriter(tmp_path / "s", source="test")
    boxes = np.array([[-0.05, 0, 50, 40], [10, 10, 100.08, 80.06]], np.float32)
    writer.add("a", (100, 80), features=np.ones((2, 4)), boxes=boxes)
    writer.commit()
    boxes = RegionStore(tmp_path / "s").relative_boxes(np.array([0]))
    assert boxes.min() == 0 and boxes.max() == 1


# ---------------------------------------------------------------------------------------- batches


def test_little_is_padding(pairs):
    """At most 5 %."""
    for kind in ("mlm", "itm"):
        stream, total, paid = batches_of(kind, pairs), 0, 0
        for k in range(20):
            x = stream[k]["input"]
            real = x["text_mask"].sum(1) + x["region_mask"].sum(1)
            assert x["length"] == int(real.max())
            total, paid = total + int(real.sum()), paid + len(real) * x["length"]
        assert total / paid >= 0.95, f"{kind}: {100 - 100 * total / paid:.1f} % padding"


def test_a_batch_is_a_function_of_seed_and_number(pairs):
    """Of the data set's place and of the task, too."""
    a, b = batches_of("mlm", pairs, 512, seed=3), batches_of("mlm", pairs, 512, seed=3)
    others = [batches_of("mlm", pairs, 512), batches_of("mlm", pairs, 512, seed=3, place=1)]
    others.append(batches_of("mrfr", pairs, 512, seed=3))
    a[0], a[100]
    assert torch.equal(a[5]["input"]["text"], b[5]["input"]["text"])
    assert not [other for other in others if a[5]["names"] == other[5]["names"]]
    named = [batches_of("examples", pairs, name=name).rng(0).random() for name in ("vqa", "ve", "")]
    assert len(set(named)) == 3


@pytest.mark.parametrize("settings", [{}, {"batch_size": 24}])
def test_an_epoch_holds_every_caption_once(pairs, settings):
    stream = batches_of("mlm", pairs, 512, **settings)
    stream.plan(0)
    rows = np.concatenate([stream.columns[0][batch] for batch in stream.batches])
    assert sorted(rows) == list(range(len(pairs)))
    odd = [n for n in map(len, stream.batches) if n != 24]
    assert not settings or len(odd) <= 1


def test_an_epochs_batches_come_in_random_order(pairs):
    """Not by the length that they were sorted by; in another order in the next epoch."""
    stream, orders = batches_of("mlm", pairs, 512), []
    for epoch in (0, 1):
        stream.plan(epoch)
        longest = [pairs.arrays["n_words"][stream.columns[0][b]].max() for b in stream.batches]
        orders.append(longest)
        assert len(longest) > 10 and longest != sorted(longest)
    assert orders[0] != orders[1]


def test_contrast_shares_out_whole_updates(pairs):
    """Any number of processes has the same pairs in an update; what is too few for one waits."""
    one, two = (batches_of("maf", pairs, batch_size=24 // n, helpers={"pieces": n}) for n in (1, 2))
    for k in range(2 * len(pairs) // 24):
        pieces = np.concatenate([two.whole(2 * k + i)[0] for i in (0, 1)])
        assert np.array_equal(one.whole(k)[0], pieces)
    small = batches_of("maf", pairs, batch_size=len(pairs) + 1)
    fails("examples to learn from", small.whole, 0)


def test_mlm_masks_as_bert(pairs):
    stream, tok = batches_of("mlm", pairs, 4096), pairs.tokenizer
    masked = kept = total = 0
    for k in range(10):
        b = stream[k]
        ids, places = b["input"]["text"].flatten(), b["masked_words"]
        assert not torch.isin(b["word_targets"], torch.tensor([tok.cls, tok.sep, tok.pad])).any()
        rows = torch.unique(places // b["input"]["text"].shape[1])
        assert len(rows) == len(b["input"]["text"]), "at least one word of each caption"
        masked += int((ids[places] == tok.mask).sum())
        kept += int((ids[places] == b["word_targets"]).sum())
        total += len(places)
    assert masked / total == pytest.approx(0.8, abs=0.04)
    assert kept / total == pytest.approx(0.1, abs=0.03)


def test_joint_masking_masks_both_and_asks_for_one(pairs):
    """Conditional masking leaves the other modality whole [UNITER sec. 3.2]."""
    for kind, masked in (("mlm", "words"), ("mrfr", "regions")):
        both, one = (batches_of(kind, pairs, joint_masking=joint)[3] for joint in (True, False))
        assert f"masked_{masked}" in both and "hidden_regions" not in one
        assert ("hidden_regions" in both) == (kind == "mlm")
        changed = both["input"]["text"] != one["input"]["text"]
        assert changed.any() == (kind == "mrfr")


def test_negatives_are_mismatched(pairs):
    for k in range(5):
        b = batches_of("itm", pairs)[k]
        assert 0.2 < b["match"].float().mean() < 0.8
    rows, images, _ = batches_of("rank", pairs, 2048, negatives=4).whole(0)
    assert np.array_equal(pairs.image[rows], images)
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert (data.mismatched_images(rng, pairs.images, images) != images).all()
        assert (pairs.image[data.mismatched_captions(rng, pairs, images)] != images).all()


def test_candidates_are_of_the_anchor(pairs):
    """A caption with other images, then an image with other captions, each there once"""
    for k, shared_side in ((0, "rows"), (1, "images")):
        pool = batches_of("rank", pairs, 512, candidates=9, alternate=True)[k]["pool"]
        assert pool.rows.shape[1] == 10
        assert (np.ptp(getattr(pool, shared_side), axis=1) == 0).all()
        n = len(np.unique(pool.rows)), len(np.unique(pool.images))
        assert n == (len(pool.text_input["text"]), len(pool.region_input["regions"]))


@pytest.mark.parametrize("store", ["regions", "patches", "pictures"])
def test_a_pool_makes_the_batches_of_its_index(pairs, toy, store):
    """Bit for bit, though each text and image is in it once, and each picture is encoded once."""
    if store != "regions":
        vision = data.Vision(str(toy), "", 64, 16, whole=store == "pictures")
        captions, _ = read(data.coco_captions, toy, "val2014")
        pairs = make_index(captions, vision.open("coco"), pairs.tokenizer)
    rng = np.random.default_rng(0)
    rows = rng.integers(len(pairs), size=(16, 40))
    images = rng.choice(pairs.images, size=(16, 40))
    rows[1], images[2] = rows[1, 0], images[2, 0]
    pool = data.Pool(pairs, rows, images).apply(torch.clone)
    assert len(pool.text_input["text"]) == len(np.unique(rows))
    ours = list(pool.in_chunks(pool.rows.ravel(), pool.images.ravel(), 4096))
    wanted = list(pairs.in_chunks(rows.ravel(), images.ravel(), 4096))
    assert len(ours) == len(wanted) > 1
    for (places, made), (wanted_places, batch) in zip(ours, wanted):
        assert np.array_equal(places, wanted_places) and made.keys() == batch.keys()
        assert made["length"] == batch["length"]
        for name in made.keys() - {"length"}:
            assert torch.equal(made[name], batch[name]), name
        if store == "pictures":
            assert len(made["image"]) == len(np.unique(images.ravel()[places]))


def test_pairs_that_are_asked_for_again_cost_no_reading(pairs, monkeypatch):
    pool = data.Pool(pairs, np.arange(6)[:, None], pairs.image[:6, None])
    monkeypatch.setattr(os, "preadv", None)
    monkeypatch.setattr(pairs, "row", None)
    assert len(pool.batch(pool.rows.ravel(), pool.images.ravel())["regions"]) == 6


def test_empty_and_endless_captions_are_kept_and_counted(pairs):
    """A text of exactly so many words is whole."""
    texts = "", "red " * 10_000, "a red circle", "red " * 60
    image = ids_of(pairs.store)[0]
    odd = [data.Record(image, text, str(i)) for i, text in enumerate(texts)]
    index = make_index(odd, pairs.store, pairs.tokenizer)
    assert (index.meta["counts"]["empty"], index.meta["counts"]["truncated"]) == (1, 1)
    assert index.arrays["n_words"].tolist() == [2, 62, 5, 62]
    assert "1 texts truncated" in str(index) and "1 texts empty" in str(index)


def test_what_a_control_may_not_see(toy, pairs):
    """--ablate: [CLS] [SEP] of a text; one region that shows nothing, but all where one of them is
    asked for; a copy of the index, so that others' sees all.
    """
    rows, label = np.arange(4), lambda record, store, image: 0
    captions, _ = read(data.coco_captions, toy, "val2014")
    for options in ({}, {"label": label}):
        index = make_index(captions, pairs.store, pairs.tokenizer, **options)
        whole = index.batch(rows, index.image[rows])
        index.ablate = "text"
        x = index.batch(rows, index.image[rows])
        assert x["text"].tolist() == [[pairs.tokenizer.cls, pairs.tokenizer.sep]] * 4
        assert x["text_mask"].all() and np.array_equal(x["regions"], whole["regions"])
        index.ablate = "regions"
        x = index.batch(rows, index.image[rows])
        width = whole["regions"].shape[1] if options else 1
        assert x["regions"].shape[1] == width and not x["regions"].any() and not x["boxes"].any()
        assert np.array_equal(x["region_mask"], whole["region_mask"][:, :width])
        assert np.array_equal(x["text"], whole["text"]) and x["length"] is None


def test_batches_are_filled_to_the_last_token():
    """Rising lengths are cut greedily: no batch passes the size, and none has room for one more."""
    assert [b.tolist() for b in data.token_batches(np.full(4, 4), 8)] == [[0, 1], [2, 3]]
    lengths = np.sort(np.random.default_rng(0).integers(3, 40, 200))
    batches = data.token_batches(lengths, 128)
    assert np.concatenate(batches).tolist() == list(range(200))
    for batch in batches:
        assert lengths[batch[-1]] * len(batch) <= 128
        after = batch[-1] + 1
        assert after == 200 or lengths[after] * (len(batch) + 1) > 128
    # longer than a batch: alone
    assert [b.tolist() for b in data.token_batches(np.array([3, 50, 60]), 10)] == [[0], [1], [2]]


def test_loader_workers_make_the_same_batches(pairs, toy):
    index = data.open_index(toy, data.coco_captions, "val2014", pairs.store, pairs.tokenizer)
    streams = [batches_of(kind, index, 300) for kind in ("mlm", "itm")]
    mixed, alone = train.MixedBatches(streams, [1, 1], 4, 0, 2), Alone()
    ours, theirs = (list(train.make_loader(mixed, 0, 4, alone, n)) for n in (0, 1))
    for a, b in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
        assert a["names"] == b["names"] and torch.equal(a["input"]["text"], b["input"]["text"])


class Alone:
    """A train.Runtime of one process, or of several"""

    device = torch.device("cpu")

    def __init__(self, rank=0, world_size=1):
        self.rank, self.world_size = rank, world_size


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_step_is_whole_batches_shared_out(pairs, processes):
    """Whatever the number of processes, also from the middle of a run on"""
    streams = [batches_of(kind, pairs, 400) for kind in ("mlm", "itm")]
    mixed = train.MixedBatches(streams, [1, 2], 5, 0, 4)
    names = lambda steps: [[b["names"] for b in step] for step in steps]
    runtimes = [Alone(rank, processes) for rank in range(processes)]
    steps = [names(train.make_loader(mixed, 0, 5, runtime, 0)) for runtime in runtimes]
    assert [list(map(len, process)) for process in steps] == [[4 // processes] * 5] * processes
    later = [names(train.make_loader(mixed, 3, 5, runtime, 0)) for runtime in runtimes]
    assert later == [process[3:] for process in steps]
    for stream in (0, 1):
        first = mixed.choice.tolist().index(stream)
        wanted = [streams[stream][k]["names"] for k in range(4)]
        # piece k is process k mod processes's
        assert [steps[k % processes][first][k // processes] for k in range(4)] == wanted


# ------------------------------------------------------------------------- files and what is kept


def write_captions(tree, toy):
    shutil.copytree(toy / "coco/annotations", tree / "coco/annotations")
    return tree / "coco/annotations/captions_val2014.json"


def test_an_index_is_made_again_when_a_source_changes(toy, tmp_path, words):
    """A captions file, or the store, whose numbers of images it holds."""
    tree = tmp_path / "tree"
    path = write_captions(tree, toy)
    shutil.copytree(toy / "regions/coco", tree / "coco-store")
    store = lambda: RegionStore(tree / "coco-store")
    made = lambda: data.open_index(tree, data.coco_captions, "val2014", store(), words)
    stamp = lambda: [p.stat().st_mtime_ns for p in (tree / "index").glob("*/meta.json")]
    first, written = made(), stamp()
    assert made().row(3) == first.row(3) and stamp() == written
    record = json.loads(path.read_text())
    del record["annotations"][0]
    path.write_text(json.dumps(record))
    again, written = made(), stamp()
    assert len(again) == len(first) - 1
    assert again.row(0)["id"] == str(record["annotations"][0]["id"])
    os.utime(tree / "coco-store/ids.npy")
    made()
    assert stamp() != written


def test_an_index_is_made_again_when_a_students_reader_changes(toy, tmp_path, words, pairs):
    """Its file is a source too."""
    image = ids_of(pairs.store)[0]
    for text in ("a red circle", "a blue circle"):
        code = "from data import Record\n\ndef mine(data, split, stats):\n"
        (tmp_path / "mine.py").write_text(f"{code}    yield Record({image!r}, {text!r}, '1')\n")
        script = importlib.util.spec_from_file_location("mine", tmp_path / "mine.py")
        module = importlib.util.module_from_spec(script)
        script.loader.exec_module(module)
        index = data.open_index(tmp_path / "tree", module.mine, "train", pairs.store, words)
        assert index.decode(0) == text


def test_what_is_made_of_kept_arrays_is_made_again_with_them(tmp_path):
    """An index that reads a list kept beside the data: the list's files are its sources too, and
    the files that it read before the list was made.
    """
    (tmp_path / "own.txt").write_text("a")
    (tmp_path / "list.txt").write_text("red blue")

    def words():
        texts = data.read_text(tmp_path / "list.txt").split()
        return {"words": np.array(texts)}, {}

    def build():
        first = data.read_text(tmp_path / "own.txt")
        kept = data.cached(tmp_path / "index/words", [1], words)[0]["words"]
        return {"x": np.array([first, *kept])}, {}

    made = lambda: data.cached(tmp_path / "index/outer", [1], build)[0]["x"].tolist()
    for _ in range(2):
        assert made() == ["a", "red", "blue"]
    for name, text, wanted in (("list.txt", "green", ["a", "green"]), ("own.txt", "b", None)):
        (tmp_path / name).write_text(text)
        assert made() == (wanted or ["b", "green"])
    # the list is fresh now, the outer one is not: its sources still count
    shutil.rmtree(tmp_path / "index/outer")
    assert made() == ["b", "green"]
    (tmp_path / "list.txt").write_text("black")
    assert made() == ["b", "black"]


def test_a_broken_index_is_one_clear_error_or_made_again(tmp_path):
    make = lambda: data.cached(tmp_path / "index/x", [1], lambda: ({"x": np.arange(99)}, {}))
    assert make()[0]["x"].tolist() == list(range(99))
    os.truncate(tmp_path / "index/x/x.npy", 200)
    with pytest.raises(DataError, match=r"index/x cannot be read: .*\n.*Delete this folder"):
        make()
    (tmp_path / "index/x/meta.json").write_text("{")
    assert make()[0]["x"].tolist() == list(range(99))


# a comma, a brace and escaped quotes inside texts
RECORDS = [{"a": 'x, "}] y', "b": [1.5e3, None, True]}, 12345, "é\\u00e9", [], {}, -0.25, "z"]


@pytest.mark.parametrize("indent", [None, 1])
def test_json_item_by_item_is_json(tmp_path, indent):
    path = tmp_path / "a.json"
    named = {f"key {i}": value for i, value in enumerate(RECORDS)}
    whole = {"info": {"year": 1}, "images": [3, 4], "annotations": RECORDS, "end": 1}
    items = lambda value, **how: (
        path.write_text(json.dumps(value, indent=indent)) and list(data.json_items(path, **how))
    )
    assert items(RECORDS) == RECORDS and dict(items(named, named=True)) == named
    assert items(whole, key="annotations") == RECORDS and items(whole, key="images") == [3, 4]
    assert items([]) == items({}, named=True) == []
    # a record a line, blank lines too
    path.write_text("\n" + "\n\n".join(map(json.dumps, RECORDS)) + "\n")
    assert list(data.json_items(path)) == RECORDS


@pytest.mark.parametrize(
    "text, key, match",
    [
        (
            "[1, 2",
            "",
            r"a.json, item 1: Expecting value.*\n.*\n.*reader\(\), test_data.py line \d+",
        ),
        ('[{"a": 1, "b": }]', "", "Expecting value: line 1 column 16"),
        ("<html>", "", "Expecting value"),
        ('{"image": [], "info": 1}', "images", "holds no images"),
        ('{"images": 3}', "images", "holds no images"),
        ("3", "named", "holds no record"),
    ],
)
def test_broken_json_says_what_is_wrong(tmp_path, text, key, match):
    (tmp_path / "a.json").write_text(text)
    options = {"named": True} if key == "named" else {"key": key}

    def reader(tree, split, stats):
        for item in data.json_items(tmp_path / "a.json", **options):
            yield data.Record("x", str(item), "1")

    fails(match, read, reader, tmp_path, "")


def test_a_readers_slip_is_one_error_that_names_its_line(tmp_path):
    """Also of a student's own reader, and of what it yields."""
    (tmp_path / "a.json").write_text('[{"image": 1, "text": "red"}]')
    items = lambda: data.json_items(tmp_path / "a.json")

    def reader(tree, split, stats):
        for item in items():
            yield data.Record("x", item["caption"], "1")

    lines = fails("a.json, item 0: no field 'caption'", read, reader, tmp_path, "").split("\n")
    assert re.match(r"  reader\(\), test_data.py line \d+: {'image': 1", lines[-1])
    good = data.Record("x", "red", "1")
    for odd, match in (
        ({"text": 3}, "a text was wanted.*\n.*\n.*text=3"),
        ({"id": 3}, "a text was wanted"),
        ({"text": ((0, 1),)}, "a text was wanted"),
        ({"target": "yes"}, "an answer 'yes'"),
        ({"boxes": ((1, 2, 3),)}, "a box was wanted"),
        ({"boxes": ((0, 0, 1, float("nan")),)}, "a box was wanted"),
        ({"pointers": ((0, 1, None),)}, "a box was wanted"),
    ):
        fails(match, read, lambda *_: [good._replace(**odd)], tmp_path, "")
    assert read(lambda *_: [good], tmp_path, "a+b")[0] == [good, good]


# -------------------------------------------------------------------------------------- bad input


def test_bad_stores(toy, tmp_path):
    fails("is missing", RegionStore, tmp_path / "nothing")
    folder = shutil.copytree(toy / "regions/coco", tmp_path / "coco")
    whole = (folder / "features.npy").read_bytes()
    (folder / "features.npy").write_bytes(whole[: len(whole) // 2])
    fails("cannot be read", RegionStore, folder)
    (folder / "features.npy").write_bytes(whole)
    np.save(folder / "offsets.npy", np.load(folder / "offsets.npy")[::-1])
    fails("offsets do not fit", RegionStore, folder)
    np.save(folder / "offsets.npy", np.arange(3))
    fails(r"offsets.npy is int64 \(3,\)", RegionStore, folder)


def test_a_store_that_shrinks_is_an_error(toy, tmp_path):
    """Rows that are gone are no zeros."""
    shutil.copytree(toy / "regions/winoground", tmp_path / "store")
    store = RegionStore(tmp_path / "store")
    os.truncate(tmp_path / "store/features.npy", 200)
    with pytest.raises(DataError, match="has lost rows of features.npy"):
        store.read(np.array([len(store) - 1]))


def test_bad_tsv(tmp_path):
    line = row("img0")[0]
    cells = line.split("\t")
    half = base64.b64encode(base64.b64decode(cells[-1])[:100]).decode()
    other = row("b", width=6)[0]
    for bad, match in (
        (line[:1000] + "\n", "line 1: 8 columns|line 1: . columns"),
        ("\t".join(cells[:-1] + [half]), "line 1: cannot reshape"),
        ("\t".join(cells[:8] + [cells[8][:40]] + cells[9:]), "line 1: .*multiple of element size"),
        ("\t".join([cells[0], "x"] + cells[2:]), "line 1: invalid literal for int"),
        (f"{line}\n{other}\n", r"image b: features is \(36, 6\)"),
        ("", ""),
    ):
        (tmp_path / "f.tsv").write_text(bad)
        fails(match, evaluate.pack, [tmp_path / "f.tsv"], tmp_path / "store")
        assert not (tmp_path / "store").exists()


def test_bad_npz(tmp_path):
    (tmp_path / "npz").mkdir()
    (tmp_path / "npz/a.npz").write_bytes(b"PK half a file")
    fails("a.npz: ", evaluate.pack, [tmp_path / "npz"], tmp_path / "store")


def test_bad_captions(toy, tmp_path, pairs):
    path = write_captions(tmp_path, toy)
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    fails("Unterminated string|Expecting|delimiter", read, data.coco_captions, tmp_path, "val2014")
    path.write_text(text.replace('"caption"', '"captoin"'))
    message = fails("no field 'caption'", read, data.coco_captions, tmp_path, "val2014")
    assert "captoin" in message and "item 0" in message and "read_captions(), data.py" in message
    fails("is missing", read, data.coco_captions, tmp_path / "nowhere", "train2014")
    captions, _ = read(data.coco_captions, toy, "train2014")
    stray = [*captions, data.Record("COCO_train2014_999999999999", "a cat", "9")]
    message = fails("has texts but no features", make_index, stray, pairs.store, pairs.tokenizer)
    assert "--skip-missing" in message
    kept = make_index(stray, pairs.store, pairs.tokenizer, skip_missing=True)
    assert kept.meta["counts"]["without features"] == 1 and "1 texts without features" in str(kept)


@pytest.mark.parametrize(
    "script, argv, match",
    [
        (
            evaluate,
            ["pack", "nothing.tsv", "--out", "x"],
            "is missing|No such file",
        ),
        (world, ["--out", "README.md"], "exists already"),
        (world, ["--out", "x", "--scenes", "3"], "at least 60"),
        (world, ["--out", "x", "--seed", "-2"], "--seed -2"),
    ],
)
def test_command_line_errors_are_one_message(script, argv, match):
    done = inside(ROOT, argv, script.main)
    assert done.returncode == 1 and re.search(match, done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "box, clipped",
    [
        ((10, 20, 30, 40), (10, 20, 40, 60)),
        ((-5, 20, 30, 40), (0, 20, 25, 60)),
        ((10, -7, 30, 40), (10, 0, 40, 33)),
        ((90, 20, 30, 40), (90, 20, 100, 60)),
        ((10, 70, 30, 40), (10, 70, 40, 80)),
        ((100, 20, 30, 40), None),
        ((10, 20, 0, 40), None),
        ((10, -50, 30, 40), None),
    ],
)
def test_boxes_are_cut_to_their_image(box, clipped):
    """Shares of the image, of records with either of Visual Genome's names of the sides"""
    wanted = clipped and pytest.approx([v / side for v, side in zip(clipped, (100, 80, 100, 80))])
    image = {"width": 100, "height": 80}
    for names in ("xywh", ("x", "y", "width", "height")):
        assert data.relative_box(dict(zip(names, box)), image) == wanted


# ----------------------------------------------------------------------------------------- memory


def private_memory():
    """MiB that this process shares with no other and has written to"""
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(l.split()[1]) for l in lines if l.startswith("Private_Dirty")) / 1024


def write_many_captions(tree, toy, captions, images):
    """A captions file and a store whose features are a sparse file."""
    rng, words = np.random.default_rng(0), ["red", "blue", "circle", "square", "left", "of", "a"]
    (tree / "coco/annotations").mkdir(parents=True)
    (tree / "bert-base-cased").symlink_to(toy / "bert-base-cased")
    stems = [f"COCO_train2014_{i:012d}" for i in range(images)]
    files = [{"id": i, "file_name": f"{stem}.jpg"} for i, stem in enumerate(stems)]
    with open(tree / "coco/annotations/captions_train2014.json", "w") as file:
        file.write(f'{{"images": {json.dumps(files)}, "annotations": [')
        for k in range(captions):
            text = " ".join(rng.choice(words, 10)) if k < 100 else "a red circle left of a square"
            row = {"image_id": k % images, "id": k, "caption": text}
            file.write(("," if k else "") + json.dumps(row))
        file.write("]}")
    store = tree / "regions/coco"
    store.mkdir(parents=True)
    shapes = {"features": ("<f2", (4 * images, 2048)), "boxes": ("<f4", (4 * images, 4))}
    for name, (dtype, shape) in shapes.items():
        np.lib.format.open_memmap(store / f"{name}.npy", "w+", dtype, shape).flush()
    np.save(store / "offsets.npy", np.arange(images + 1) * 4)
    np.save(store / "wh.npy", np.tile(np.array([[640, 480]], np.int32), (images, 1)))
    np.save(store / "ids.npy", np.array([stem.encode() for stem in stems]))
    (store / "meta.json").write_text(json.dumps({"features": 2048, "classes": None}))


OPEN = """
import sys, time, json
sys.path[:0] = [{root!r}, {tests!r}]
import data, train
from conftest import batches_of
from test_data import private_memory
before, start = private_memory(), time.time()
tokenizer = data.WordPiece({tree!r} + "/bert-base-cased/vocab.txt", False)
store = data.Vision({tree!r}, {tree!r} + "/regions").open("coco")
index = data.open_index({tree!r}, data.coco_captions, "train2014", store, tokenizer)
seconds = time.time() - start
streams = [batches_of(kind, index, 10240) for kind in ("mlm", "itm")]
[stream[0] for stream in streams]
print(json.dumps([len(index), seconds, private_memory() - before]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux's /proc")
def test_many_captions_cost_no_memory(toy, tmp_path):
    """300,000 captions: the index is made once, then opened at once; what a process keeps is the
    epochs' order.
    """
    write_many_captions(tmp_path / "tree", toy, 300_000, 60_000)
    names = {"root": str(ROOT), "tests": str(ROOT / "tests"), "tree": str(tmp_path / "tree")}
    results = []
    for _ in range(2):
        code = OPEN.format(**names)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        results.append(json.loads(done.stdout.splitlines()[-1]))
    (n, made, _), (_, opened, memory) = results
    assert n == 300_000 and made < 60 and opened < 2 and memory < 120, results


def test_the_last_word_that_fits_may_point():
    """Of a text of just so many pieces the last one points too; what is cut away does not."""
    tokenizer = lambda word: [0] * len(word)  # a piece a letter
    record = data.Record("1", "a bb cc", "0", pointers=((1, 3, (0, 0, 1, 1)),))
    places = lambda most: [p for p, *_ in data.pointed_pieces(record, tokenizer, {}, most)]
    assert places(5) == [2, 3, 4, 5] and places(4) == [2, 3, 4] and places(1) == []
