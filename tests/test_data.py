"""Readers, store, tokenizer and batches; and every kind of bad file a user may have."""

import base64
import functools
import itertools
import json
import pickle
import re
import shutil
import os
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
from conftest import ROOT, ids_of, read, shared
from data import Batches, DataError, RegionStore, WordPiece, make_index


@pytest.fixture(scope="session")
def toy(toy_tree):
    return toy_tree


@pytest.fixture(scope="session")
def pairs(toy):
    return make_index(
        read(data.coco_captions, toy, "train2014")[0],
        RegionStore(toy / "regions/coco"),
        WordPiece(toy / "bert-base-cased/vocab.txt", lower=False),
    )


def digest(folder):
    import hashlib

    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


# -------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize("name, lower", [("wordpiece", True), ("wordpiece_cased", False)])
def test_tokenizer_is_berts(name, lower):
    """300 strings through HuggingFace's tokenizer with BERT's vocabulary; the strings are hard
    ones.
    """
    tokenizer = WordPiece(shared("real/bert/vocab.txt"), lower)
    golden = json.loads(shared(f"golden/{name}.json").read_text(encoding="utf-8"))
    wrong = [
        s["text"]
        for s in golden["strings"]
        if [tokenizer.cls, *tokenizer(s["text"]), tokenizer.sep] != s["ids"]
    ]
    assert not wrong, wrong[:5]
    assert len(golden["strings"]) >= 300


def test_tokenizer_without_third_party_data(toy):
    t = WordPiece(toy / "bert-base-uncased/vocab.txt", lower=True)
    assert [t.pieces[i] for i in t("A RED circle, [MASK]zq")] == [
        "a",
        "red",
        "circle",
        ",",
        "[MASK]",
        "z",
        "##q",
    ]
    assert t("") == [] and t("北") == [t.unk] and t("x" * 101) == [t.unk]
    cased = WordPiece(toy / "bert-base-cased/vocab.txt", lower=False)
    assert cased("RED") == [cased.unk]


# -------------------------------------------------------------------------------------- toy world


def test_same_seed_same_bytes(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        world.make_toy(tmp_path / name, seed=seed, scenes=60)
    a, b, c = (digest(tmp_path / n) for n in "abc")
    assert a == b
    assert sum(a[k] != c.get(k) for k in a) > len(a) / 2


def test_splits_share_no_scene_and_captions_are_true(toy):
    images = {
        s: {c.image for c in read(data.karpathy_captions, toy, s, dataset="flickr30k")[0]}
        for s in ("train", "val", "test")
    }
    assert (
        not images["train"] & images["val"]
        and not images["val"] & images["test"]
        and all(images.values())
    )
    rng = np.random.default_rng(0)
    for _ in range(200):
        things = world.draw_scene(rng)
        text = world.spoken(world.describe(rng, things))
        for how in world.RELATIONS:
            if f" {how} " in text:
                a, b = (
                    next(t for t in things if f"{t.colour} {t.shape}" in side)
                    for side in text.replace(" to the", "").split(f" {how} ")
                )
                assert world.relation(a, b) == how, text


def test_winoground_pairs_are_swaps(toy):
    records, _ = read(data.winoground_examples, toy, "")
    for a, b in zip(records[::2], records[1::2]):
        assert sorted(a.text.split()) == sorted(b.text.split()) and a.text != b.text


def test_toy_is_left_alone_or_made_again(tmp_path, monkeypatch):
    world.make_toy(tmp_path / "toy", scenes=60)
    before = (tmp_path / "toy/toy.json").stat().st_mtime_ns
    world.ensure_toy(tmp_path / "toy")
    assert (tmp_path / "toy/toy.json").stat().st_mtime_ns == before
    world.draw_nlvr(tmp_path / "toy", pictures=60, sentences=20)
    (tmp_path / "toy/toy.json").write_text(json.dumps({"version": 0, "seed": 4, "scenes": 70}))
    world.ensure_toy(tmp_path / "toy")
    made = json.loads((tmp_path / "toy/toy.json").read_text())
    assert (
        made == {"version": world.TOY_VERSION, "seed": 4, "scenes": 70}
        and (tmp_path / "toy/nlvr").exists()
    )
    assert len(RegionStore(tmp_path / "toy/regions/nlvr")) > 20
    # a store of before there were drawn sentences
    few = functools.partial(world.draw_nlvr, pictures=40, sentences=10)
    monkeypatch.setattr(world, "draw_nlvr", few)
    (tmp_path / "toy/nlvr/drawn/drawn.json").unlink()
    world.ensure_toy(tmp_path / "toy")
    assert 5 < len(RegionStore(tmp_path / "toy/regions/nlvr")) <= 20
    assert [p.name for p in tmp_path.iterdir()] == ["toy"]
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
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == -9
    )
    assert not (tmp_path / "toy").exists()


# --------------------------------------------------------------------------------- store and pack


def row(image, n=36, width=8, w=640, h=480, kind="lxmert", seed=0):
    rng = np.random.default_rng(seed)
    corner = rng.random((n, 2)) * [w / 2, h / 2]
    boxes = np.concatenate([corner, corner + rng.random((n, 2)) * [w / 2, h / 2]], 1).astype("<f4")
    features = rng.random((n, width)).astype("<f4")
    b = lambda x, t: base64.b64encode(np.ascontiguousarray(x, t).tobytes()).decode()
    ids, conf = rng.integers(0, 1600, n), rng.random(n)
    cells = (
        [
            image,
            h,
            w,
            b(ids, "<i8"),
            b(conf, "<f4"),
            b(ids % 400, "<i8"),
            b(conf, "<f4"),
            n,
            b(boxes, "<f4"),
            b(features, "<f4"),
        ]
        if kind == "lxmert"
        else [image, w, h, n, b(boxes, "<f4"), b(features, "<f4")]
    )
    return "\t".join(map(str, cells)), boxes, features


@pytest.mark.parametrize("kind", ["lxmert", "butd"])
def test_pack_tsv(tmp_path, kind):
    rows = [
        row(f"img{i}", n=36 if kind == "lxmert" else 10 + i, kind=kind, seed=i) for i in range(5)
    ]
    (tmp_path / "f.tsv").write_text("\n".join(r[0] for r in rows) + "\n")
    evaluate.pack([tmp_path / "f.tsv"], tmp_path / "store")
    store = RegionStore(tmp_path / "store")
    assert ids_of(store) == [f"img{i}" for i in range(5)] and store.wh.tolist() == [[640, 480]] * 5
    got = store.read(np.array([3, 1]))
    for b, i in enumerate((3, 1)):
        np.testing.assert_array_equal(got[b, : len(rows[i][2])], rows[i][2].astype(np.float16))
        np.testing.assert_allclose(
            store.relative_boxes(np.array([i]))[0] * [640, 480, 640, 480],
            rows[i][1],
            rtol=1e-5,
            atol=1e-3,
        )
    assert ("cls_id" in store.arrays) == (kind == "lxmert")


def test_pack_uniter_npz(tmp_path):
    (tmp_path / "npz").mkdir(), (tmp_path / "jpg").mkdir()
    Image.new("RGB", (200, 100)).save(tmp_path / "jpg/COCO_train2014_000000000007.jpg")
    conf = np.array([0.9] * 12 + [0.1] * 8, np.float32)
    boxes = np.tile(np.array([0.1, 0.2, 0.5, 0.6, 0.4, 0.4], np.float16), (20, 1))
    probs = np.random.default_rng(0).dirichlet(np.ones(6), 20).astype(np.float16)
    for name in ("coco_train2014_000000000007", "flickr30k_000000001234"):
        np.savez(
            tmp_path / f"npz/{name}.npz",
            features=np.ones((20, 8), np.float16),
            norm_bb=boxes,
            conf=conf,
            soft_labels=probs,
        )
    evaluate.pack([tmp_path / "npz"], tmp_path / "store", tmp_path / "jpg")
    store = RegionStore(tmp_path / "store")
    assert ids_of(store) == ["COCO_train2014_000000000007", "1234"] and store.wh.tolist() == [
        [200, 100],
        [1, 1],
    ]
    # those above 0.2, at least 10
    assert store.n_regions(np.arange(len(store))).tolist() == [12, 12] and store.classes == 6
    np.testing.assert_allclose(store.boxes[0], [20, 20, 100, 60], rtol=1e-2)


def test_pack_killed_and_restarted_gives_the_same_bytes(tmp_path, monkeypatch):
    (tmp_path / "f.tsv").write_text("\n".join(row(f"img{i}", seed=i)[0] for i in range(40)) + "\n")
    evaluate.pack([tmp_path / "f.tsv"], tmp_path / "whole")
    writer = evaluate.StoreWriter
    monkeypatch.setattr(evaluate, "StoreWriter", lambda *a: writer(*a, every=7))
    add, count = writer.add, [0]

    def dying(self, *a, **k):
        count[0] += 1
        if count[0] in (17, 30):
            raise KeyboardInterrupt
        add(self, *a, **k)

    monkeypatch.setattr(writer, "add", dying)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            evaluate.pack([tmp_path / "f.tsv"], tmp_path / "pieces")
    evaluate.pack([tmp_path / "f.tsv"], tmp_path / "pieces")
    assert count[0] > 40 and digest(tmp_path / "whole") == digest(tmp_path / "pieces")


# ---------------------------------------------------------------------------------------- batches


def test_little_is_padding(toy, pairs):
    """At most 5 %; of ranking's negatives 256 tokens a pass."""
    flickr = make_index(
        read(data.karpathy_captions, toy, "train", dataset="flickr30k")[0],
        RegionStore(toy / "regions/flickr30k"),
        pairs.tokenizer,
    )
    for stream in (
        Batches("mlm", pairs, 1024, 0),
        Batches("itm", pairs, 1024, 0),
        Batches("rank", flickr, 1536, 0),
    ):
        total = paid = 0
        for k in range(20):
            batch = stream[k]
            first = batch.get("input", batch.get("positive"))
            for b in (first, *batch.get("negatives", ())):
                real = b["text_mask"].sum(1) + b["region_mask"].sum(1)
                assert b["length"] == int(real.max())
                if b is first:
                    total, paid = total + int(real.sum()), paid + len(real) * b["length"]
                else:
                    assert (b["length"] - real).sum() <= 256
        assert total / paid >= 0.95, f"{stream.task}: {100 - 100 * total / paid:.1f} % padding"


def test_a_batch_is_a_function_of_seed_and_number(pairs):
    a, b, other = (
        Batches("mlm", pairs, 512, 3),
        Batches("mlm", pairs, 512, 3),
        Batches("mlm", pairs, 512, 4),
    )
    a[0], a[100]
    assert (
        torch.equal(a[5]["input"]["text"], b[5]["input"]["text"])
        and a[5]["names"] != other[5]["names"]
    )


@pytest.mark.parametrize("task", ["mlm", "itm", "mrckl"])
def test_parts_make_up_the_whole_batch(pairs, task):
    whole = Batches(task, pairs, 512, 0)[7]
    parts = [Batches(task, pairs, 512, 0, part, 2)[7] for part in (0, 1)]
    assert sorted(whole["names"]) == sorted(parts[0]["names"] + parts[1]["names"])
    for key, of in (("word_targets", "mlm"), ("region_probs", "mrckl")):
        if task == of:
            assert sum(len(p[key]) for p in parts) == len(whole[key])
            assert sum(p[key].double().sum() for p in parts) == pytest.approx(
                whole[key].double().sum().item()
            )


def test_an_epoch_holds_every_caption_once(pairs):
    columns, batches = Batches("mlm", pairs, 512, 0).plan(0)
    seen = np.concatenate([captions for captions in (columns[0][rows] for rows in batches)])
    assert sorted(seen) == list(range(len(pairs)))


def test_mlm_masks_as_bert(pairs):
    stream, tok = Batches("mlm", pairs, 4096, 0), pairs.tokenizer
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
    assert masked / total == pytest.approx(0.8, abs=0.04) and kept / total == pytest.approx(
        0.1, abs=0.03
    )


def test_negatives_are_mismatched(pairs):
    for k in range(5):
        b = Batches("itm", pairs, 1024, 0)[k]
        assert 0.2 < b["match"].float().mean() < 0.8
    stream = Batches("rank", pairs, 2048, 0, negatives=4)
    captions, images, _ = stream.whole(0)
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert (data.mismatched_images(rng, pairs.images, images) != images).all()
        assert (pairs.image[data.mismatched_captions(rng, pairs, images)] != images).all()


def test_negatives_drawn_in_pieces_are_the_same(pairs, monkeypatch):
    def drawn():
        images = np.tile(pairs.image, 3)
        one = data.mismatched_images(np.random.default_rng(1), pairs.images, images)
        return one, data.mismatched_captions(np.random.default_rng(2), pairs, images)

    whole = drawn()
    monkeypatch.setattr(data, "DRAWN_AT_ONCE", 100)
    for a, b in zip(whole, drawn()):
        assert np.array_equal(a, b)


def test_hardest_negatives_come_from_the_candidates(pairs):
    # a caption with other images, then an image with other captions
    for k, same in ((0, "captions"), (1, "images")):
        stream = Batches("rank", pairs, 512, 0, negatives=2, candidates=9, alternate=True)
        pool = stream[k]["candidates"]
        captions, images = pool.rows, pool.images
        assert captions.shape[1] == 9
        assert (np.ptp(captions if same == "captions" else images, axis=1) == 0).all()
        # what they share is there once
        n = len(np.unique(captions)), len(np.unique(images))
        assert n == (len(pool.text_input["text"]), len(pool.region_input["regions"]))
        assert n[0 if same == "captions" else 1] <= len(captions)


def test_a_pool_makes_the_batches_of_its_index(pairs):
    """Bit for bit, though each text and image is in it once."""
    rng = np.random.default_rng(0)
    rows = rng.integers(len(pairs), size=(16, 40))
    images = rng.choice(pairs.images, size=(16, 40))
    rows[1], images[2] = rows[1, 0], images[2, 0]
    pool = pickle.loads(pickle.dumps(data.Pool(pairs, rows, images)))
    assert len(pool.text_input["text"]) == len(np.unique(rows))
    assert len(pool.region_input["regions"]) == len(np.unique(images))
    ours = data.collate_negatives(pool, pool.rows, pool.images)
    read = data.collate_negatives(pairs, rows, images)
    assert torch.equal(ours["order"], read["order"])
    assert len(ours["negatives"]) == len(read["negatives"]) > 1
    for made, wanted in zip(ours["negatives"], read["negatives"]):
        assert made.keys() == wanted.keys() and made["length"] == wanted["length"]
        for name in made.keys() - {"length"}:
            assert torch.equal(made[name], wanted[name]), name
    # as many in each as fit with 256 tokens of padding: not one more
    parts = [(x["text_mask"].sum(1) + x["region_mask"].sum(1)).tolist() for x in ours["negatives"]]
    padding = lambda part: len(part) * max(part) - sum(part)
    assert all(padding(part) <= 256 for part in parts)
    assert all(padding([*a, min(b)]) > 256 for a, b in zip(parts, parts[1:]))


def test_a_broken_index_is_one_clear_error(tmp_path):
    make = lambda: data.memory_mapped(tmp_path / "index/x", [1], lambda: ({"x": np.arange(99)}, {}))
    assert make()[0]["x"].tolist() == list(range(99))
    os.truncate(tmp_path / "index/x/x.npy", 200)
    with pytest.raises(DataError, match=r"index/x cannot be read: .*\n.*Delete this folder"):
        make()


# -------------------------------------------------------------------------------------- real NLVR


def test_real_nlvr(tmp_path_factory, toy):
    import tarfile

    folder = tmp_path_factory.mktemp("real")
    with tarfile.open(shared("real/nlvr.tar.gz")) as tar:
        tar.extractall(
            folder,
            filter="data",
            members=[m for m in tar if m.name.endswith(".json") or "/dev/images/1/" in m.name],
        )
    dev, test = (read(data.nlvr_presentations, folder, split)[0][::6] for split in ("dev", "test"))
    assert (len(dev), sum(e.target for e in dev), len(test), sum(e.target for e in test)) == (
        989,
        547,
        990,
        556,
    )
    records, _ = read(data.nlvr_presentations, folder, "dev")
    tokenizer = WordPiece(toy / "bert-base-cased/vocab.txt", lower=False)
    world.draw_nlvr(folder, pictures=60, sentences=20)
    world.make_nlvr_store(folder)
    pairs = make_index(records, RegionStore(folder / "regions/nlvr"), tokenizer)
    assert len(pairs) == 5934 and pairs.store.image_id(3) == f"{dev[0].id}-3"
    boxes = pairs.store.relative_boxes(np.array([0, 3])) * [400, 100, 400, 100]
    first, k3 = boxes
    # box 0 shows the first item at 80, 80
    assert first[1].round().tolist() == [80, 80, 100, 100]
    n = [len(b) for b in dev[0].note]
    # order 3 shows boxes 1, 2, 0
    assert k3[1].round()[0] == dev[0].note[1][0]["x_loc"] and sum(n) + 3 == len(first)
    pictures = {i: folder / path for i, path in data.walk_pictures(folder, "nlvr")}
    colours = {"yellow": (255, 255, 0), "black": (0, 0, 0), "#0099ff": (0, 153, 255)}
    shown = [e for e in dev if e.image in pictures][:10]
    # the pictures themselves, in each order, have every item's colour where its middle is said to
    # be
    for e in shown:
        for k, order in enumerate(itertools.permutations(e.note)):
            pixels = np.array(Image.open(pictures[f"{e.id}-{k}"]).convert("RGB")).astype(int)
            # and ours look like them
            assert np.abs(np.array(world.render_nlvr(order)) - pixels).mean() < 3
            for at, items in enumerate(order):
                for item in items:
                    x, y = (item[a] + item["size"] // 2 for a in ("x_loc", "y_loc"))
                    seen = pixels[min(y + 2, 99), 150 * at + min(x, 99)]
                    off = np.abs(seen - colours[item["color"].lower()]).sum()
                    assert off < 60, (e.id, k)
    assert len(shown) == 10


# -------------------------------------------------------------------------------------- bad input


def copy_store(toy, tmp_path):
    import shutil

    return shutil.copytree(toy / "regions/coco", tmp_path / "coco")


def fails(match, f, *args, **kwargs):
    with pytest.raises(DataError, match=match) as error:
        f(*args, **kwargs)
    assert len(str(error.value)) < 1200
    return str(error.value)


def test_bad_stores(toy, tmp_path):
    fails("is missing", RegionStore, tmp_path / "nothing")
    folder = copy_store(toy, tmp_path)
    whole = (folder / "features.npy").read_bytes()
    (folder / "features.npy").write_bytes(whole[: len(whole) // 2])
    fails("cannot be read", RegionStore, folder)
    (folder / "features.npy").write_bytes(whole)
    broken = np.lib.format.open_memmap(folder / "features.npy", mode="r+")
    broken[3, 5] = np.nan
    broken.flush()
    store = RegionStore(folder)
    image = int(np.searchsorted(store.offsets, 3, side="right") - 1)
    assert ids_of(store)[image] in fails("nan or inf", store.read, np.array([image]))


@pytest.mark.parametrize(
    "box", [(100, 10, 50, 40), (10, 10, 900, 40), (-30, 10, 50, 40), (float("nan"), 1, 2, 3)]
)
def test_bad_boxes(toy, tmp_path, box):
    folder = copy_store(toy, tmp_path)
    boxes = np.lib.format.open_memmap(folder / "boxes.npy", mode="r+")
    boxes[2] = box
    boxes.flush()
    fails("bad boxes", RegionStore(folder).check_rows)


def test_bad_tsv(tmp_path):
    line = row("img0")[0]
    cells = line.split("\t")
    half = base64.b64encode(base64.b64decode(cells[-1])[:100]).decode()
    for bad, match in (
        (line[:1000] + "\n", "columns"),
        ("\t".join(cells[:-1] + [half]), "bytes of features"),
        ("\t".join(cells[:8] + [cells[8][:40]] + cells[9:]), "expected"),
        ("\t".join([cells[0], "x"] + cells[2:]), "whole number"),
        ("", "holds no"),
    ):
        (tmp_path / "f.tsv").write_text(bad)
        fails(match, evaluate.pack, [tmp_path / "f.tsv"], tmp_path / "store")
        assert not (tmp_path / "store").exists()


def test_tsv_rows_of_another_width(tmp_path):
    (tmp_path / "f.tsv").write_text(row("a", width=8)[0] + "\n" + row("b", width=6)[0] + "\n")
    assert "b" in fails("features is", evaluate.pack, [tmp_path / "f.tsv"], tmp_path / "store")


def test_bad_npz(tmp_path):
    (tmp_path / "npz").mkdir()
    (tmp_path / "npz/a.npz").write_bytes(b"PK half a file")
    fails("cannot be read", evaluate.pack, [tmp_path / "npz"], tmp_path / "store")


def test_bad_captions(toy, tmp_path, pairs):
    from shutil import copytree

    tree = copytree(toy / "coco/annotations", tmp_path / "coco/annotations").parent.parent
    path = tree / "coco/annotations/captions_train2014.json"
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    fails("not whole JSON", read, data.coco_captions, tree, "train2014")
    path.write_text(text.replace('"caption"', '"captoin"'))
    assert "captoin" in fails("no field 'caption'", read, data.coco_captions, tree, "train2014")
    fails("is missing", read, data.coco_captions, tmp_path / "nowhere", "train2014")
    captions, _ = read(data.coco_captions, toy, "train2014")
    stray = [*captions, data.Record("COCO_train2014_999999999999", "a cat", "9")]
    assert "--skip-missing" in fails(
        "has captions but no features", make_index, stray, pairs.store, pairs.tokenizer
    )
    kept = make_index(stray, pairs.store, pairs.tokenizer, skip_missing=True)
    assert kept.meta["counts"]["missing"] == 1 and "left out" in str(kept)


def test_empty_and_endless_captions_are_kept_and_counted(pairs):
    odd = [
        data.Record(ids_of(pairs.store)[0], text, str(i))
        for i, text in enumerate(("", "red " * 10_000, "a red circle"))
    ]
    p = make_index(odd, pairs.store, pairs.tokenizer)
    assert (p.meta["counts"]["empty"], p.meta["counts"]["truncated"]) == (1, 1)
    assert p.n_words(np.arange(3)).tolist() == [2, 62, 5]
    assert "1 texts truncated" in str(p) and "1 texts empty" in str(p)


def test_vocabulary_without_mask(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nred\n")
    fails(r"has no \[MASK\]", WordPiece, tmp_path / "vocab.txt", True)


@pytest.mark.parametrize(
    "script, argv, match",
    [
        ("evaluate.py", ["pack", "nothing.tsv", "--out", "x"], "is missing"),
        ("tests/toy.py", ["--out", "README.md"], "exists already"),
        ("tests/toy.py", ["--out", "x", "--scenes", "3"], "at least 60"),
        ("tests/toy.py", ["--out", "x", "--seed", "-2"], "--seed -2"),
    ],
)
def test_command_line_errors_are_one_message(script, argv, match):
    run = subprocess.run(
        [sys.executable, script, *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ},
    )
    assert run.returncode == 1 and match in run.stderr and "Traceback" not in run.stderr


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
        ("vcr_train_1001_Some_Film_00.11@3", "1001_Some_Film_00.11@3"),
        ("visual_grounding_coco_gt_000000581857", "COCO_train2014_000000581857"),
        ("visual_grounding_det_coco_000000581857", "COCO_train2014_000000581857"),
    ],
)
def test_names_of_uniters_feature_files(npz, image):
    """They become the ids that the readers of the same data set use."""
    assert evaluate.uniter_image_id(npz) == image


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
    said = [{"id": i, "file_name": f"{stem}.jpg"} for i, stem in enumerate(stems)]
    with open(tree / "coco/annotations/captions_train2014.json", "w") as file:
        file.write(f'{{"images": {json.dumps(said)}, "annotations": [')
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
from test_data import private_memory
train.keep_memory()
before, start = private_memory(), time.time()
tokenizer = data.WordPiece({tree!r} + "/bert-base-cased/vocab.txt", False)
store = data.Vision({tree!r}, {tree!r} + "/regions").open("coco")
index = data.open_index({tree!r}, data.coco_captions, "train2014", store, tokenizer)
seconds = time.time() - start
streams = [data.Batches(task, index, 10240, 0) for task in ("mlm", "itm")]
[stream[0] for stream in streams]
print(json.dumps([len(index), seconds, private_memory() - before]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux's /proc")
def test_many_captions_cost_no_memory(toy, tmp_path):
    """300,000 captions: the index is made once, then opened at once; what a process keeps is the
    epochs' order. (3,000,000: made in 34 s on one core, opened in 0.003 s, 127 MiB.)
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


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_workers_make_the_same_batches(pairs, toy, method):
    """Stores and indexes pickle as paths, so that workers may be started either way."""
    index = data.open_index(toy, data.coco_captions, "val2014", pairs.store, pairs.tokenizer)
    mixed = train.MixedBatches(
        [Batches("mlm", index, 300, 0), Batches("itm", index, 300, 0)], [1, 1], 6, 0
    )
    loader = torch.utils.data.DataLoader(
        mixed,
        batch_size=None,
        num_workers=1,
        collate_fn=train.keep_batch,
        multiprocessing_context=method,
    )
    for ours, theirs in zip((mixed[i] for i in range(6)), loader, strict=True):
        assert ours["names"] == theirs["names"]
        assert torch.equal(ours["input"]["text"], theirs["input"]["text"])


def test_a_step_is_a_list_of_batches(pairs):
    """All of its accumulated batches in all of their parts, also from the middle of a run on."""
    streams = [Batches(task, pairs, 400, 0, parts=3) for task in ("mlm", "itm")]
    mixed = train.MixedBatches(streams, [1, 2], 5, 0, accumulate=2)
    steps = [[b["names"] for b in step] for step in train.make_loader(mixed, 0, 5, 0, False)]
    later = [[b["names"] for b in step] for step in train.make_loader(mixed, 3, 5, 0, False)]
    assert len(mixed) == 30 and list(map(len, steps)) == [6] * 5 and later == steps[3:]
    for stream, number in ((0, 0), (1, 0)):
        first = mixed.choice.tolist().index(stream)
        whole = streams[stream].index.names(*streams[stream].whole(0)[:2])
        assert sorted(name for part in steps[first][:3] for name in part) == sorted(whole)


def test_single_regions_are_those_of_whole_images(toy):
    """read_at() of each kind of store is read() where the mask is."""
    store, images = RegionStore(toy / "regions/coco"), np.array([5, 0, 7])
    joined = data.JoinedStore([(store, np.arange(9), 1), (store, np.arange(9)[::-1], 2)])
    patches = data.PatchStore(toy, "coco", 64, 16)
    for one in (store, joined, patches):
        whole = one.read(images, "cls_prob")
        mask = data.length_mask(one.n_regions(images)) & (np.arange(whole.shape[1]) % 3 == 1)
        np.testing.assert_array_equal(one.read_at(images, mask, "cls_prob"), whole[mask])


def test_an_index_is_made_again_when_a_source_changes(toy, tmp_path):
    from shutil import copytree

    tree = tmp_path / "tree"
    copytree(toy / "coco/annotations", tree / "coco/annotations")
    store = RegionStore(toy / "regions/coco")
    tokenizer = WordPiece(toy / "bert-base-cased/vocab.txt", lower=False)
    made = lambda: data.open_index(tree, data.coco_captions, "val2014", store, tokenizer)
    first = made()
    stamp = (first.folder / "meta.json").stat().st_mtime_ns
    assert made().id(3) == first.id(3) and (first.folder / "meta.json").stat().st_mtime_ns == stamp
    path = tree / "coco/annotations/captions_val2014.json"
    record = json.loads(path.read_text())
    del record["annotations"][0]
    path.write_text(json.dumps(record))
    again = made()
    assert len(again) == len(first) - 1 and again.id(0) == str(record["annotations"][0]["id"])
    with pytest.raises(DataError, match="cannot be written"):
        (tmp_path / "file").write_text("")
        data.memory_mapped(tmp_path / "file/index/x", [], dict)


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
    assert data.clip_box(*box, {"width": 100, "height": 80}) == clipped


@pytest.mark.parametrize("size, by_example", [(2048, False), (24, True)])
def test_processes_and_parts_share_a_batch(pairs, size, by_example):
    """At 1, 2 and 4 processes, each in 1 to 4 parts, the same examples and the same masks."""
    how = {"size": size, "seed": 0, "by_example": by_example}
    whole = Batches("mlm", pairs, **how)
    for k in (0, 5):
        names, words = sorted(whole[k]["names"]), sorted(whole[k]["word_targets"].tolist())
        assert not by_example or len(names) == size
        for processes, parts in ((2, 1), (4, 1), (1, 4), (2, 2), (2, 3)):
            pieces = []
            for rank in range(processes):
                own = Batches("mlm", pairs, **how, rank=rank, world_size=processes, parts=parts)
                pieces += [own.part(k, j) for j in range(parts)]
            assert sorted(n for piece in pieces for n in piece["names"]) == names
            targets = [t for p in pieces for t in p.get("word_targets", torch.zeros(0)).tolist()]
            assert sorted(targets) == words


def test_sixteen_processes_pad_no_more_than_one():
    """Share of real words and regions in what a process computes, of UNITER's batch a GPU."""

    class Lengths:
        """Stands for an Index: 200,000 pairs of 10 to 110 words and regions"""

        def __init__(self):
            self.n = np.random.default_rng(0).integers(10, 110, 200_000)
            self.image, self.images = np.arange(len(self.n)), np.arange(len(self.n))

        def __len__(self):
            return len(self.n)

        def length(self, rows, images):
            return self.n[rows]

        def n_words(self, rows):
            return self.n[rows]

    index, fills = Lengths(), []
    for processes in (1, 16):
        batches = Batches("mlm", index, 10_240 * processes, 0)
        real = padded = 0
        for k in range(20):
            lengths = index.n[batches.whole(k)[0]]
            for rank in range(processes):
                own = lengths[rank::processes]
                real, padded = real + own.sum(), padded + own.max() * len(own)
        fills.append(real / padded)
    assert fills[0] > 0.95 and fills[1] >= 0.95 * fills[0], fills


def test_relative_boxes_stay_in_the_unit_square(tmp_path):
    """Rounding elsewhere may leave a box a hair outside its image, which a store bears."""
    how = {"source": "test", "features": 4}
    writer = evaluate.StoreWriter(tmp_path / "s", ["features", "boxes"], how)
    boxes = np.array([[-0.05, 0, 50, 40], [10, 10, 100.08, 80.06]], np.float32)
    writer.add("a", (100, 80), features=np.ones((2, 4)), boxes=boxes)
    writer.commit()
    store = RegionStore(tmp_path / "s")
    store.check_rows()
    seen = store.relative_boxes(np.array([0]))
    assert seen.min() == 0 and seen.max() == 1


# a comma, a brace and escaped quotes inside texts; numbers and words that a piece's end may cut
RECORDS = [{"a": 'x, "}] y', "b": [1.5e3, None, True]}, 12345, "é\\u00e9", [], {}, -0.25, "z"]


@pytest.mark.parametrize("piece", [16, 17, 23, 64, 1 << 20])
def test_json_in_pieces_is_json(tmp_path, monkeypatch, piece):
    """The same values whatever the size of what is read at a time."""
    monkeypatch.setattr(data, "PIECE", piece)
    path = tmp_path / "a.json"
    named = {f"key {i}": value for i, value in enumerate(RECORDS)}
    for blanks in (None, 1):
        path.write_text(json.dumps(RECORDS, indent=blanks))
        assert list(data.json_items(path, "x")) == RECORDS
        path.write_text(json.dumps(named, indent=blanks))
        assert dict(data.json_items(path, "x", named=True)) == named
        whole = {"info": {"year": 1}, "images": [3, 4], "annotations": RECORDS, "end": 1}
        path.write_text(json.dumps(whole, indent=blanks))
        assert list(data.json_items(path, "x", "annotations")) == RECORDS
        assert list(data.json_items(path, "x", "images")) == [3, 4]
    for empty in ("[]", " [ \n]", "{}"):
        path.write_text(empty)
        assert not list(data.json_items(path, "x", named=empty == "{}"))


@pytest.mark.parametrize(
    "text, key, match",
    [
        ("[1, 2", "", "not whole JSON at character 5"),
        ("[1 2]", "", "no comma"),
        ("[1,, 2]", "", "not whole JSON at character 3"),
        ('{"a" 1}', "", "no colon"),
        ('[{"a": 1, "b": }]', "", "not whole JSON at character 15"),
        ("<html>", "", "not whole JSON"),
        ("3", "", "a list"),
        ('{"image": [], "info": 1}', "images", "no field 'images'.*\n.*Nearest: 'image'"),
        ('{"images": 3}', "images", "images is 3"),
    ],
)
def test_json_in_pieces_says_what_is_wrong(tmp_path, text, key, match):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(data.DataError, match=match):
        list(data.json_items(path, "x", key, named=text[:4] == '{"a"'))


def test_a_broken_item_is_found_before_the_rest_is_read(tmp_path, monkeypatch):
    """A file of gigabytes would else be read to its end, into memory."""
    monkeypatch.setattr(data, "PIECE", 1 << 10)
    monkeypatch.setattr(data, "LONGEST", 1 << 8)
    (tmp_path / "a.json").write_text('[{"a": oh}, ' + "1, " * 100_000 + "1]")
    seen, item = [], data.json_item
    monkeypatch.setattr(data, "json_item", lambda *args: seen.append(len(args[0])) or item(*args))
    with pytest.raises(data.DataError, match="at character 7"):
        list(data.json_items(tmp_path / "a.json", "x"))
    assert max(seen) <= 1 << 10


def test_what_is_made_of_kept_arrays_is_made_again_with_them(tmp_path):
    """An index that reads a list kept beside the data: the list's files are its sources too, and
    the files that it read before the list was made."""
    (tmp_path / "own.txt").write_text("a")
    (tmp_path / "list.txt").write_text("red blue")

    @data.kept
    def words(tree):
        return data.read_text(tree / "list.txt", "words").split()

    def build():
        first = data.read_text(tmp_path / "own.txt", "a text")
        return {"x": np.array([first, *words(tmp_path)])}, {}

    made = lambda: data.memory_mapped(tmp_path / "index/outer", [1], build)[0]["x"].tolist()
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


def test_a_store_that_shrinks_is_an_error(toy, tmp_path):
    """Rows that are gone are no zeros."""
    shutil.copytree(toy / "regions/winoground", tmp_path / "store")
    store = RegionStore(tmp_path / "store")
    os.truncate(tmp_path / "store/boxes.npy", 200)
    with pytest.raises(DataError, match="has lost rows of boxes.npy"):
        store.read(np.array([len(store) - 1]), "boxes")


def test_a_list_of_answers_that_holds_numbers_is_one_clear_error(tmp_path):
    (tmp_path / "vqa2").mkdir()
    (tmp_path / "vqa2/trainval_label2ans.json").write_text('["yes", 3]')
    with pytest.raises(DataError, match="entry is 3\n  Wanted: a text"):
        evaluate.answer_list(tmp_path)


def parsed(caption):
    """A caption of the toy Winoground as a Statement"""
    noun = rf"a (?:({'|'.join(world.SIZES)}) )?({'|'.join(world.COLOURS)}) (\w+)"
    found = list(re.finditer(noun, caption))
    links = []
    for k, (left, right) in enumerate(itertools.pairwise(found)):
        between = caption[left.end() : right.start()].strip().removeprefix("and").strip()
        links += [(0, between, k + 1)] if between else []
    statement = world.Statement(tuple((m[1] or "", m[2], m[3]) for m in found), tuple(links))
    assert str(statement) == caption
    return statement


def test_winoground_can_be_solved_from_its_regions(toy):
    """An oracle that reads the detector's regions: every caption is true of its own image alone."""
    store, looks = RegionStore(toy / "regions/winoground"), world.appearance()
    records, _ = read(data.winoground_examples, toy, "")
    statements, seen = [parsed(r.text) for r in records], []
    places = {name: i for i, name in enumerate(ids_of(store))}
    for record in records:
        one = np.array([places[record.image]])
        row = {"features": store.read(one)[0], "boxes": store.read(one, "boxes")[0]}
        seen.append(world.things_seen(row, looks))
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1)]
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


def test_sentences_in_the_words_of_nlvr(tmp_path, toy):
    """Each is true of one picture and false of another; every word is in the toy vocabulary; the
    same bytes again; one order of the boxes.
    """
    for name in ("a", "b"):
        world.draw_nlvr(tmp_path / name, pictures=300, sentences=200)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    words = WordPiece(toy / "bert-base-cased/vocab.txt", lower=True)
    records, _ = read(data.nlvr_presentations, tmp_path / "a", "drawn")
    pieces = {words.pieces[i] for r in records for i in words(r.text)}
    assert len(records) == 400 and not [p for p in pieces if p.startswith(("##", "[UNK"))]
    for one, other in zip(records[::2], records[1::2]):
        assert one.text == other.text and {one.target, other.target} == {0, 1}
    based = 0
    for r in records:
        if said := re.fullmatch(r"there is a tower with a (\w+) block at the base\.?", r.text):
            shown = {world.NLVR_COLOURS[box[0]["color"]] for box in r.note}
            assert r.target == (said[1] in shown)
            based += 1
    assert based
    world.make_nlvr_store(tmp_path / "a")
    assert set(ids_of(RegionStore(tmp_path / "a/regions/nlvr"))) == {r.image for r in records}
    assert {r.image for r in records} <= dict(data.walk_pictures(tmp_path / "a", "nlvr")).keys()


def test_held_out_combinations_are_never_said(toy):
    """Each of the six is in some caption of Winoground, and in none to learn from; each shape and
    each relation is said with others.
    """
    said = {f"{shape} {how} a" for shape, how in world.HELD_OUT}
    learned = [r.text for r in read(data.coco_captions, toy, "train2014")[0]]
    learned += [r.text for r in read(data.karpathy_captions, toy, "train", dataset="flickr30k")[0]]
    learned += [r.text for r in read(data.vg_descriptions, toy, "train")[0]]
    text = "\n".join(learned).replace("to the ", "")
    assert not [words for words in said if words in text]
    for shape, how in world.HELD_OUT:
        others = [f"{shape} {other} a" in text for other in world.RELATIONS[:4] if other != how]
        assert all(others), shape
