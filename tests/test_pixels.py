"""Pictures: readers, patches, augmentation, what can be wrong with a file; ALBEF and AMC as a
user runs them; every loss on every encoder.
"""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import losses
import train
from conftest import (
    QUICK,
    ids_of,
    last_line,
    prepared_run,
    read,
    run,
    same,
    weights,
    write_nlvr,
)
from data import Batches, DataError, PatchStore, Record, Vision, WordPiece, make_index, open_picture
from model import Albef, PatchStem, build, load_pretrained, resize_position

WHITE = (255, 255, 255)


@pytest.fixture(scope="module")
def store(toy_tree):
    return PatchStore(toy_tree, "coco", 64, 16)


@pytest.fixture(scope="module")
def tokenizer(toy_tree):
    return WordPiece(toy_tree / "bert-base-uncased/vocab.txt", True)


# ---------------------------------------------------------------------------------------- patches


def test_normalised_pixels_are_the_patches(store):
    pixels = store.pixels(np.array([5]))
    x, patches = (
        data.normalize_pixels(torch.from_numpy(pixels)),
        torch.from_numpy(store.read(np.array([5])).astype(np.float32)),
    )
    torch.testing.assert_close(
        x[0, :, :16, 16:32].permute(1, 2, 0).flatten(), patches[0, 1], atol=2e-3, rtol=1e-3
    )


def test_patches_are_the_picture_cut_up(toy_tree, store):
    with Image.open(store.path(3)) as picture:
        whole = np.asarray(picture.convert("RGB").resize((64, 64), Image.BICUBIC), float)
    features = store.read(np.array([3, 4]))
    assert (
        features.shape == (2, 16, 3 * 16 * 16)
        and features.dtype == np.float16
        and store.n_regions([3]).tolist() == [16]
    )
    boxes = store.relative_boxes(np.array([3]))[0]
    pixels = (
        features[0].astype(float).reshape(16, 16, 16, 3) * data.PIXEL_STD + data.PIXEL_MEAN
    ) * 255
    for n, (x1, y1, x2, y2) in enumerate((boxes * 64).astype(int)):
        assert (x2 - x1, y2 - y1) == (16, 16) and (x1, y1) == (16 * (n % 4), 16 * (n // 4))
        # JPEG decode_boxes at a smaller size, half precision
        assert np.abs(pixels[n] - whole[y1:y2, x1:x2]).mean() < 6
    assert store.size(3) == (240, 180)


def test_what_a_detector_sees_in_each_patch(toy_tree, store):
    """Its regions' classes and attributes, by how much of the patch each covers, point by point."""
    seen = data.RegionStore(toy_tree / "regions/coco")
    # those whose regions lie over each other most, too
    every = np.arange(len(store))
    boxes = seen.relative_boxes(seen.finder()([store.image_id(i) for i in every]))
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1).sum(-1)
    low, high = boxes[:, :, None, :2], boxes[:, :, None, 2:]
    common = np.minimum(high, high.swapaxes(1, 2)) - np.maximum(low, low.swapaxes(1, 2))
    common = common.clip(0).prod(-1).sum((1, 2)) - area
    images = np.concatenate([every[:20], common.argsort()[-8:]])
    found = store.read_at(images, np.ones((28, 16), bool), "cls_prob").reshape(28, 16, -1)
    names = data.detector_names(toy_tree, "attributes")
    assert store.classes == found.shape[-1] == seen.classes + len(names)
    at = seen.finder()([store.image_id(i) for i in images])
    boxes, classes = seen.relative_boxes(at), seen.read(at, "cls_prob").astype(float)
    probs, overlap = np.zeros((28, classes.shape[1], store.classes)), 0
    probs[..., :8] = classes
    for b, region in np.argwhere(seen.read(at, "attr_id") >= 0):
        attribute = seen.read(at, "attr_id")[b, region]
        probs[b, region, 1:8] /= 2
        probs[b, region, 8 + attribute] = (1 - classes[b, region, 0]) / 2
    for b, k in enumerate(seen.n_regions(at)):
        for n in range(16):
            # a patch in points
            y, x = np.mgrid[0.5:200, 0.5:200] / 800 + np.array([n // 4, n % 4])[:, None, None] / 4
            inside = [((x > l) & (x < r) & (y > t) & (y < d)).mean() for l, t, r, d in boxes[b, :k]]
            overlap = max(overlap, sum(inside))
            wanted = np.array(inside) / max(1, sum(inside)) @ probs[b, :k]
            wanted[0] += 1 - wanted.sum()
            np.testing.assert_allclose(found[b, n], wanted, atol=0.01)
    assert overlap > 1.2
    mask = np.random.default_rng(0).random((28, 16)) < 0.3
    part = store.read_at(images, mask, "cls_prob")
    np.testing.assert_array_equal(part, found[mask])
    kinds, ids = part[:, 1:8].astype(np.float32), store.read_at(images, mask, "cls_id")
    np.testing.assert_array_equal(ids, np.where(kinds.any(-1), kinds.argmax(-1), -1))
    assert (ids == -1).any() and (ids >= 0).any()

    assert (part >= 0).all() and part[:, 1:].any()
    assert (store.read_at(images, mask, "attr_id") == -1).all()


def test_pictures_without_a_detector(toy_tree, tmp_path):
    """Words and matching need none; what asks for classes says what is missing."""
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/train2014").symlink_to(toy_tree / "coco/train2014")
    mask = np.ones((1, 16), bool)
    bare = PatchStore(tmp_path, "coco", 64, 16)
    assert bare.classes is None and bare.read(np.array([0])).shape == (1, 16, 768)
    assert (bare.read_at(np.array([0]), mask, "cls_id") == -1).all()
    with pytest.raises(DataError, match="no classes of coco's"):
        bare.read_at(np.array([0]), mask, "cls_prob")
    # a store without attributes, as UNITER's files make it; one without classes
    shutil.copytree(toy_tree / "regions/coco", tmp_path / "regions/coco")
    (tmp_path / "vg").mkdir()
    for name in ("objects", "attributes"):
        shutil.copy(toy_tree / f"vg/{name}_vocab.txt", tmp_path / "vg")
    for name in ("attr_id", "attr_conf"):
        (tmp_path / f"regions/coco/{name}.npy").unlink()
    plain = PatchStore(tmp_path, "coco", 64, 16)
    found = plain.read_at(np.array([0]), mask, "cls_prob").astype(float)
    assert found.shape == (16, plain.classes) and not found[:, plain.detector[0].classes :].any()
    np.testing.assert_allclose(found.sum(-1), 1, atol=2e-3)
    (tmp_path / "regions/coco/cls_prob.npy").unlink()
    meta = json.loads((tmp_path / "regions/coco/meta.json").read_text())
    (tmp_path / "regions/coco/meta.json").write_text(json.dumps(meta | {"classes": None}))
    unnamed = PatchStore(tmp_path, "coco", 64, 16)
    assert (unnamed.read_at(np.array([0]), mask, "cls_id") == -1).all()
    with pytest.raises(DataError, match="no classes of coco's"):
        unnamed.read_at(np.array([0]), mask, "cls_prob")
    # of a broken store nothing is read where nobody asks for classes
    (tmp_path / "regions/coco/meta.json").write_text("{")
    assert PatchStore(tmp_path, "coco", 64, 16).read(np.array([0])).shape == (1, 16, 768)
    crops = PatchStore(toy_tree, "coco", 64, 16)
    crops.ids = np.array([b"somewhere else"])
    with pytest.raises(DataError, match="no classes of coco's somewhere else"):
        crops.read_at(np.array([0]), mask, "cls_prob")
    assert (crops.read_at(np.array([0]), mask, "cls_id") == -1).all()


@pytest.mark.parametrize("task", ["mrc", "mrckl", "mrfr"])
def test_patches_whose_class_is_learned_stay_in_sight(toy_tree, tokenizer, store, task):
    pairs = make_index([Record(i, "a", i) for i in ids_of(store)[:30]], store, tokenizer, 24)
    batch = Batches(task, pairs, 1024, 0, mask_rate=0.5)[0]
    assert len(batch["masked_regions"]) > 10
    assert ("hidden_regions" in batch) == (task != "mrfr")
    if task == "mrfr":
        return
    told, K = {}, len(batch["masked_regions"])

    def model(**how):
        told.update(how)
        return SimpleNamespace(region_logits=torch.zeros(K, store.classes))

    train.objective_regions(None, model, batch)
    assert len(told.pop("hidden_regions")) == 0 and len(told["masked_regions"]) == K
    hits = train.hits_classes(None, model, batch)
    assert len(told["hidden_regions"]) == 0
    # of patches that show nothing mrc learns nothing, mrckl that they are background
    assert len(hits) == K if task == "mrc" else 0 < len(hits) < K
    if task == "mrc":
        images = store.finder()([name.split()[-1] for name in batch["names"]])
        whole = store.read(images, "cls_prob").reshape(-1, store.classes)
        C, at = store.detector[0].classes, batch["masked_regions"]
        probs = batch["region_probs"].numpy()
        np.testing.assert_array_equal(probs[:, :C], whole[at, :C])
        assert probs[:, 1:C].any(-1).all() and not probs[:, C:].any() and whole[at, C:].any()
        assert batch["counts"][""] == K and not whole[:, 1:C].any(-1).all()


def test_every_picture_of_the_tree_is_found(toy_tree):
    for name in (
        "coco",
        "flickr30k",
        "vg",
        "gqa",
        "winoground",
        "nlvr2",
        "cc3m_train",
        "cc3m_val",
        "sbu",
    ):
        stored = data.RegionStore(toy_tree / "regions" / name)
        assert set(ids_of(stored)) <= set(dict(data.walk_pictures(toy_tree, name))), name
    with pytest.raises(DataError, match="no pictures of refclef"):
        PatchStore(toy_tree / "nowhere", "refclef", 64, 16)


def test_a_store_too_large_to_keep_reads_the_same(toy_tree, store, monkeypatch):
    monkeypatch.setattr(PatchStore, "KEPT", 0)
    again = PatchStore(*store.args)
    assert again.kept is None and (again.read(np.arange(5)) == store.read(np.arange(5))).all()


def test_regions_cut_out(toy_tree):
    """A crop's window holds its region; the whole picture and the region alone are the two ends."""
    crops = data.CropStore(toy_tree, "vg_crops", 64, 16)
    boxes = {f"{i}/{k}": data.vg_box(*at) for i, k, *at in data.vg_regions(toy_tree)}
    wide = []
    for name, (left, top, right, bottom) in zip(ids_of(crops), crops.arrays["windows"]):
        x, y, w, h = boxes[name]
        assert (
            -1e-6 <= left <= x + 1e-6
            and right + 1e-6 >= x + w
            and -1e-6 <= top <= y + 1e-6
            and bottom + 1e-6 >= y + h
            and right <= 240 + 1e-6
            and bottom <= 180 + 1e-6
        )
        wide.append((right - left) / 240)
    assert min(wide) < 0.3 and max(wide) > 0.9
    texts, _ = read(data.vg_crops, toy_tree, "train")
    assert (crops.finder()([t.image for t in texts]) >= 0).all()
    with pytest.raises(DataError, match="--vision patches"):
        Vision(toy_tree, toy_tree / "regions").open("vg_crops")


@pytest.mark.parametrize(
    "kind",
    ["grey", "palette", "cmyk", "16 bits", "transparent", "one pixel", "rotated", "grey 16 rgb"],
)
def test_odd_pictures(tmp_path, kind):
    path, left, right = tmp_path / "p.png", (200, 10, 10), (10, 10, 200)
    picture = Image.new("RGB", (40, 20), left)
    picture.paste(right, (20, 0, 40, 20))
    wanted = [left, right]
    if kind == "grey":
        picture.convert("L").save(path)
        wanted = [(67, 67, 67), (32, 32, 32)]
    elif kind == "palette":
        picture.convert("P", palette=Image.ADAPTIVE).save(path)
    elif kind == "cmyk":
        path = tmp_path / "p.jpg"
        picture.convert("CMYK").save(path, quality=95)
    elif kind in ("16 bits", "grey 16 rgb"):
        grey = np.full((20, 40), 20 * 257, np.uint16)
        grey[:, 20:] = 220 * 257
        Image.fromarray(grey).save(path)
        wanted = [(20,) * 3, (220,) * 3]
    elif kind == "transparent":
        picture.putalpha(0)
        picture.save(path)
        wanted = [WHITE, WHITE]
    elif kind == "one pixel":
        Image.new("RGB", (1, 1), left).save(path)
        wanted = [left, left]
    else:  # the camera was held upside down
        exif = Image.Exif()
        exif[0x0112] = 3
        path = tmp_path / "p.jpg"
        picture.save(path, exif=exif, quality=95)
        wanted = [right, left]
    x = open_picture(path, 16).astype(int)
    assert x.shape == (16, 16, 3)
    for column, colour in zip((2, 13), wanted):
        assert np.abs(x[8, column] - colour).max() < 14, (kind, x[8, column], colour)


def test_a_picture_held_sideways_has_its_own_size(tmp_path):
    (tmp_path / "winoground/images").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "winoground/images/a.jpg", exif=exif)
    assert PatchStore(tmp_path, "winoground", 32, 16).size(0) == (20, 40)


@pytest.mark.parametrize("kind", ["truncated", "empty", "page", "bomb"])
def test_pictures_that_cannot_be_read(tmp_path, kind):
    path = tmp_path / ("p.png" if kind == "bomb" else "p.jpg")
    if kind == "bomb":
        Image.new("1", (40_000, 5_000)).save(path)
    else:
        Image.effect_noise((200, 200), 50).save(path)
        content = {
            "truncated": path.read_bytes()[:2000],
            "empty": b"",
            "page": b"<html>404</html>",
        }[kind]
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"p\.(jpg|png) cannot be read as a picture"):
        open_picture(path, 32)


def test_a_bad_picture_stops_a_run_with_its_name(toy_tree, tmp_path):
    tree = tmp_path / "toy"
    shutil.copytree(toy_tree, tree)
    for path in (tree / "coco/train2014").iterdir():
        path.write_bytes(path.read_bytes()[:700])
    done = run(
        tmp_path,
        "--recipe toy-pretrain --vision patches --init none",
        "--data",
        tree,
        "--steps 2 --out x",
        *QUICK,
        expect=1,
    )
    assert (
        "cannot be read as a picture" in done.stderr
        and ".jpg" in done.stderr
        and "Traceback" not in done.stderr
    )
    with pytest.raises(DataError, match="multiple of --patch"):
        PatchStore(toy_tree, "coco", 50, 16)


def test_stem_sees_what_a_patch_shows():
    """Hiding a far patch leaves a token alone; the order of pixels is the store's."""
    torch.manual_seed(0)
    for patch in (8, 12, 16):
        stem = PatchStem(patch, 32).eval()
        assert stem.patch == patch
        x = torch.randn(1, 25, 3 * patch * patch)
        y, changed = stem(x), x.clone()
        changed[0, 24] += 1
        moved = (stem(changed) - y).abs().sum(-1)[0] > 1e-4
        assert y.shape == (1, 25, 32) and moved[24]
        # norms see the whole picture, so compare with the convolutions alone
        picture = torch.arange(25 * 3 * patch * patch).view(1, 25, -1).float()
        from einops import rearrange

        image = rearrange(picture, "B (h w) (p q c) -> B c (h p) (w q)", h=5, p=patch, q=patch)
        assert image[0, 2, 1, 2] == picture[0, 0, (patch + 2) * 3 + 2]


# ---------------------------------------------------------------------------------------- readers


def small_vg(tmp_path, objects):
    (tmp_path / "vg").mkdir(), (tmp_path / "coco").mkdir()
    (tmp_path / "coco/dataset_coco.json").write_text(
        '{"images": [{"cocoid": 77, "split": "test"}]}'
    )
    dump = lambda name, record: (tmp_path / f"vg/{name}.json").write_text(json.dumps(record))
    dump(
        "image_data",
        [
            {
                "image_id": 1,
                "url": "x/VG_100K/1.jpg",
                "width": 90,
                "height": 90,
                "coco_id": None,
                "flickr_id": None,
            }
        ],
    )
    dump("attributes", [{"image_id": 1, "attributes": objects}])
    dump(
        "region_descriptions",
        [
            {
                "id": 1,
                "regions": [
                    {
                        "region_id": 5,
                        "phrase": " a dog\n runs",
                        "x": 0,
                        "y": 0,
                        "width": 90,
                        "height": 45,
                    },
                    {
                        "region_id": 6,
                        "phrase": "far away",
                        "x": 200,
                        "y": 0,
                        "width": 9,
                        "height": 9,
                    },
                    {"region_id": 7, "phrase": "tiny", "x": 0, "y": 0, "width": 9, "height": 9},
                ],
            }
        ],
    )


def test_triplets(tmp_path):
    dog = lambda x, y, **more: {"names": ["dog"], "x": x, "y": y, "w": 30, "h": 30, **more}
    small_vg(
        tmp_path,
        [
            dog(0, 0, attributes=["brown", "wet"]),
            dog(55, 30),
            {"names": ["cat"], "x": 30, "y": 55, "w": 30, "h": 30},
            dog(0, 0) | {"w": 5, "h": 5},
        ],
    )
    texts, told = read(data.vg_triplets, tmp_path, "train")
    found = [(t.text, tuple(round(90 * v) for v in t.boxes[0])) for t in texts]
    first, second = (0, 0, 30, 30), (55, 30, 85, 60)
    assert found == [
        ("a dog runs", (0, 0, 90, 45)),
        ("brown dog", first),
        ("wet dog", first),
        ("dog", second),
        ("cat", (30, 55, 60, 85)),
        ("dog on the right", second),
        ("bottom dog", second),
        ("dog at the top left", first),
    ]
    assert told == {
        "texts: region descriptions": 1,
        "boxes left out: outside their image, or of no area": 1,
        "boxes left out: too small": 5,
        "texts: objects with attributes": 2,
        "texts: objects": 2,
        "texts: prompts of place": 3,
    }
    assert [t.text for t in read(data.vg_triplets, tmp_path, "train", kinds=("region",))[0]] == [
        "a dog runs"
    ]
    everything, _ = read(data.vg_triplets, tmp_path, "train", kinds=("box",), min_area=0)
    assert {"dog on the left", "top dog"} <= {
        t.text for t in everything if t.boxes[0] == pytest.approx((0, 0, 5 / 90, 5 / 90))
    }


def test_captions_are_cleaned_as_albef_does():
    assert (
        data.clean_caption('A man -- (smiling), "happy"/sad: <person>!')
        == "a man smiling happy sad person"
    )
    assert (
        data.clean_caption("Ein Bär; собака 犬") == "ein bär собака 犬"
        and len(data.clean_caption("w " * 90).split()) == 30
    )


def test_images_of_a_test_set_teach_no_box(tmp_path):
    small_vg(tmp_path, [])
    path = tmp_path / "vg/image_data.json"
    path.write_text(path.read_text().replace('"coco_id": null', '"coco_id": 77'))
    assert read(data.vg_triplets, tmp_path, "train")[0] == []


def test_web_captions(tmp_path):
    (tmp_path / "cc12m").mkdir(), (tmp_path / "coco").mkdir(), (tmp_path / "flickr30k").mkdir()
    (tmp_path / "coco/dataset_coco.json").write_text('{"images": []}')
    (tmp_path / "flickr30k/dataset_flickr30k.json").write_text(
        '{"images": [{"filename": "77.jpg"}]}'
    )
    rows = ["http://farm1.staticflickr.com/1/77_0a1b2c3d4e_z.jpg\tz\n"]
    rows += [f"http://x.org/{i}.jpg\ta {i}\n" for i in range(4)]
    (tmp_path / "cc12m/cc12m.tsv").write_text("".join(rows))
    (train_texts, told), (val, _) = (
        read(data.cc12m_captions, tmp_path, s) for s in ("train", "val")
    )
    assert [t.text for t in train_texts + val] == ["a 0", "a 1", "a 2", "a 3"]
    assert len(val) == 1 and list(told.values()) == [1]
    (tmp_path / "cc12m/cc12m.tsv").write_text("one column\n")
    with pytest.raises(DataError, match=r"cc12m\.tsv, line 1 has 1 columns"):
        read(data.cc12m_captions, tmp_path, "train")


def test_flip_mirrors_the_box_and_the_words(toy_tree, tokenizer):
    texts = [
        Record(i, "a red circle on the left", i, boxes=((0.0, 0.25, 0.25, 0.5),))
        for i in ids_of(PatchStore(toy_tree, "vg", 64, 16))[:40]
    ]
    pairs = make_index(texts, PatchStore(toy_tree, "vg", 64, 16), tokenizer, 24, layout="albef")
    assert pairs.text(np.array([0]))[0][0, -1] == tokenizer("left")[0]
    batch = Batches("albef", pairs, 40, 0, augment=("flip",))[0]
    plain = Batches("albef", pairs, 40, 0)[0]
    left, right = tokenizer("left")[0], tokenizer("right")[0]
    flipped = (batch["text"] == right).any(1)
    assert (
        8 < flipped.sum() < 32
        and not (batch["text"][flipped] == left).any()
        and (plain["text"] == left).any(1).all()
    )
    for row in range(40):
        image, mask = plain["pixels"][row], plain["region_target"][row]
        assert mask.sum() == 16 * 16 and mask[16:32, :16].all()
        assert torch.equal(
            batch["pixels"][row], image.flip(1) if flipped[row] else image
        ) and torch.equal(batch["region_target"][row], mask.flip(-1) if flipped[row] else mask)
    assert (
        data.box_mask((0.999, 0.999, 1, 1), 8, False).sum() == 1
        and data.box_mask((0, 0, 1, 1), 8, True).all()
    )


def test_colours_change_only_where_asked(toy_tree, tokenizer, store):
    texts = [Record(i, "a", i) for i in ids_of(store)[:30]]
    pairs = make_index(texts, store, tokenizer, 24, layout="albef")
    plain, grey, jitter = (
        Batches("albef", pairs, 30, 0, augment=a)[0]["pixels"] for a in ((), ("grey",), ("jitter",))
    )
    colourful = lambda x: x.float().std(dim=3).amax((1, 2)) > 5
    assert colourful(plain).all() and 1 <= (~colourful(grey)).sum() <= 14
    changed = (jitter != plain).flatten(1).any(1)
    assert 5 <= changed.sum() <= 25


def test_picture_batches_are_the_same_however_shared(toy_tree, tokenizer, store):
    pairs = make_index(
        [
            Record(
                i,
                f"a red circle {'on the left ' * (n % 3)}",
                i,
                boxes=((0, 0, 0.5, 0.5),) if n % 2 else (),
            )
            for n, i in enumerate(ids_of(store)[:24])
        ],
        store,
        tokenizer,
        24,
        layout="albef",
    )
    how = dict(augment=("flip", "jitter", "grey"))
    whole = Batches("albef", pairs, 12, 3, **how)[1]
    for part in range(2):
        mine = Batches("albef", pairs, 12, 3, part, 2, **how)[1]
        for name in ("text", "masked_text", "text_mask", "pixels", "own"):
            assert torch.equal(mine[name], whole[name][part::2]), name
        assert torch.equal(mine["u"], whole["u"]) and mine["names"] == whole["names"][part::2]
        N_L = whole["text"].shape[1]
        places = [(p // N_L * 2 + part) * N_L + p % N_L for p in mine["masked_words"].tolist()]
        assert set(places) <= set(whole["masked_words"].tolist())
        assert [2 * b + part for b in mine["boxed"].tolist()] == [
            b for b in whole["boxed"].tolist() if b % 2 == part
        ]
    with pytest.raises(DataError, match="24 texts for batches of 25"):
        Batches("albef", pairs, 25, 0)


# ---------------------------------------------------------------------------------- ALBEF and AMC


def test_albef_runs_and_points(albef):
    numbers = last_line(albef[1])
    assert {
        "val/itc",
        "pointing/flickr30k",
        "pointing/flickr30k/people",
        "pointing/flickr30k/chance",
        "pointing/refcoco+/testA",
        "pointing/refcoco+/testA/clean",
        "pointing/refcoco+/testB/boxes",
    } <= set(numbers) and all(0 <= v <= 100 for v in numbers.values())
    assert list((albef[0].parent / "figures").glob("heat_flickr30k_*.png")) and list(
        (albef[0].parent / "figures").glob("heat_coco_*.png")
    )


@pytest.mark.parametrize("loss", ["none", "amc", "amc-mean", "amc-max", "amc-cosine"])
def test_twenty_steps_of_amc(toy_tree, albef, tmp_path, loss, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "benchmarks_of", lambda settings: ([], []))
    run(
        tmp_path,
        "--recipe toy-amc",
        "--loss",
        loss,
        "--data",
        toy_tree,
        "--init",
        albef[0],
        "--queue 20 --steps 20 --warmup 2 --batch-size 8 --log-every 1 --out x",
        *QUICK,
    )
    log = [json.loads(line) for line in (tmp_path / "x/log.jsonl").read_text().splitlines()]
    for name in {"itc", "itm", "mlm", loss} - {"none"}:
        values = [r[name] for r in log if name in r]
        assert len(values) == 20 and np.isfinite(values).all() and any(values), name


def test_amc_lowers_itself(toy_tree, albef, tmp_path, monkeypatch):
    """Thirty updates on one batch: through the second derivative the heat moves into the boxes."""
    monkeypatch.chdir(tmp_path)
    cfg = train.make_config(
        "toy-amc",
        size="tiny",
        data=str(toy_tree),
        init=str(albef[0]),
        queue=20,
        batch_size=8,
        steps=40,
        warmup=1,
        lr=1e-3,
        precision="fp32",
    )
    runtime, tokenizer = train.setup_runtime(cfg), train.load_tokenizer(cfg)
    loaded = train.load_streams(cfg, runtime, prepared_run(cfg, tokenizer))
    model, batch = train.build_model(cfg, runtime, tokenizer, loaded), loaded.train[0][0]
    optimizer = train.build_optimizer(cfg, model)
    assert all(p.requires_grad for g in optimizer.param_groups for p in g["params"])
    values = [
        train.train_step(cfg, runtime, model, optimizer, loaded.train, step, [batch])[0][
            "amc"
        ].item()
        for step in range(1, 31)
    ]
    assert np.mean(values[-3:]) < 0.7 * np.mean(values[:3]), values


@pytest.mark.slow
def test_two_processes_are_one(toy_tree, albef, tmp_path):
    """Queue, negatives, contrast, matching and words: to the last digits the same weights,
    teacher and queue. (AMC's mean pools over a process's pairs.)
    """
    args = [
        "--recipe toy-amc --loss amc-max",
        "--data",
        toy_tree,
        "--init",
        albef[0],
        "--queue 20 --steps 4 --warmup 1",
        *QUICK,
    ]
    run(tmp_path, *args, "--batch-size", 12, "--out", "one")
    run(tmp_path, *args, "--batch-size", 6, "--gpus", 2, "--out", "two", processes=2)
    # a key's bias moves all scores of a row alike: its gradient is rounding, which Adam makes large
    one, two = (
        {k: v for k, v in weights(tmp_path / name).items() if not k.endswith("to_k.bias")}
        for name in ("one", "two")
    )
    same(one, two, rtol=0, atol=2e-5)
    assert (
        one["queue_ptr"].item() == 6 * 12 % 20 or one["queue_ptr"].item() == (6 * 8 + 4 * 12) % 20
    )


def test_resume_is_bit_for_bit(toy_tree, albef, tmp_path):
    args = [
        "--loss amc",
        "--data",
        toy_tree,
        "--init",
        albef[0],
        "--queue 20 --steps 6 --warmup 2 --batch-size 8 --save-every 3 --dropout 0.1",
        *QUICK,
    ]
    run(tmp_path, *args, "--out", "whole")
    run(tmp_path, *args, "--out", "cut", expect=None)
    shutil.rmtree(tmp_path / "cut")
    from conftest import run_and_kill

    run_and_kill(tmp_path, args, "cut")
    run(tmp_path, *args, "--out", "cut", "--resume")
    same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_drawing_follows_the_weights():
    w = torch.tensor([[0.0, 0.3, 0.1], [0.2, 0.0, 0.0], [0.0, 0.0, 1e-30]])
    luck = torch.linspace(0, 0.9999, 4001)
    picked = train.sample_rows(w[:1].expand(4001, 3), luck)
    assert (picked == 1).float().mean().item() == pytest.approx(0.75, abs=1e-3) and not (
        picked == 0
    ).any()
    assert train.sample_rows(w, torch.tensor([0.5, 0.99, 0.0])).tolist() == [1, 0, 2]


def test_momentum_and_queue_by_hand():
    torch.manual_seed(0)
    model = build("albef", "toy", vocab=30, queue=5, resolution=32, patch=16)
    start, now = [p.clone() for p in model.teacher.parameters()], list(model.student.parameters())
    with torch.no_grad():
        for p in now:
            p.add_(1.0)
    model.update_teacher(0.9)
    for old, new, student in zip(start, model.teacher.parameters(), now):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * student)
    before = model.image_queue.clone()
    model.enqueue(torch.full((3, 64), 1.0), torch.full((3, 64), 2.0))
    model.enqueue(torch.full((3, 64), 3.0), torch.full((3, 64), 4.0))
    assert (
        model.queue_ptr.item() == 1
        and model.image_queue[0].tolist() == [3, 1, 1, 3, 3]
        and model.text_queue[5].tolist() == [4, 2, 2, 4, 4]
        and before.shape == (64, 5)
    )


@pytest.mark.parametrize("kind", ["deit", "bert", "albef at another resolution"])
def test_official_checkpoints(tmp_path, kind):
    """By their published names: DeiT fills the ViT, BERT text and fusion, and the momentum copy
    starts from them; ALBEF's positions are resized.
    """
    torch.manual_seed(0)
    tiny = dict(
        vocab=40,
        width=16,
        layers=4,
        fusion=2,
        heads=2,
        mlp_dim=32,
        embed=8,
        vision=dict(width=24, layers=2, heads=2, mlp_dim=48),
        queue=6,
        positions=20,
    )
    model = Albef(**tiny, resolution=64, patch=16)
    if kind == "deit":
        file = {
            "cls_token": torch.randn(1, 1, 24),
            "pos_embed": torch.randn(1, 5, 24),
            "patch_embed.proj.weight": torch.randn(24, 3, 16, 16),
            "patch_embed.proj.bias": torch.randn(24),
            "blocks.1.attn.qkv.weight": torch.randn(72, 24),
            "blocks.1.attn.qkv.bias": torch.randn(72),
            "blocks.0.mlp.fc1.weight": torch.randn(48, 24),
            "norm.weight": torch.randn(24),
            "head.weight": torch.randn(10, 24),
            "head.bias": torch.randn(10),
        }
        torch.save({"model": file}, tmp_path / "x.pth")
        report = load_pretrained(model, tmp_path / "x.pth")
        assert sorted(report.unused) == ["head.bias", "head.weight"], report
        torch.testing.assert_close(
            model.student.vision.layers[1].attention.to_k.weight,
            file["blocks.1.attn.qkv.weight"][24:48],
        )
        torch.testing.assert_close(
            model.teacher.vision.position, resize_position(file["pos_embed"], 16)
        )
    elif kind == "bert":
        file = {
            "bert.embeddings.word_embeddings.weight": torch.randn(40, 16),
            "bert.embeddings.LayerNorm.gamma": torch.randn(16),
            "bert.encoder.layer.1.attention.self.query.weight": torch.randn(16, 16),
            "bert.encoder.layer.3.attention.self.value.bias": torch.randn(16),
            "bert.encoder.layer.3.output.dense.weight": torch.randn(16, 32),
            "cls.predictions.transform.dense.weight": torch.randn(16, 16),
            "cls.predictions.bias": torch.randn(40),
            "bert.pooler.dense.weight": torch.randn(16, 16),
            "cls.seq_relationship.weight": torch.randn(2, 16),
        }
        torch.save(file, tmp_path / "x.bin")
        report = load_pretrained(model, tmp_path / "x.bin")
        assert sorted(report.unused) == [
            "bert.pooler.dense.weight",
            "cls.seq_relationship.weight",
        ], report
        torch.testing.assert_close(
            model.student.fusion_layers[1].attention.to_v.bias,
            file["bert.encoder.layer.3.attention.self.value.bias"],
        )
        torch.testing.assert_close(
            model.teacher.text_layers[1].attention.to_q.weight,
            file["bert.encoder.layer.1.attention.self.query.weight"],
        )
    else:
        from model import read_checkpoint  # noqa: F401

        other = Albef(**tiny | {"queue": 12}, resolution=96, patch=16)
        torch.save(other.state_dict(), tmp_path / "x.pt")
        report = load_pretrained(model, tmp_path / "x.pt")
        assert set(report.unused) == {"image_queue", "text_queue"}
        torch.testing.assert_close(
            model.student.vision.position, resize_position(other.student.vision.position, 16)
        )


def test_pointing_by_hand(toy_tree, tokenizer, tmp_path, monkeypatch):
    """A model whose heat is the truth hits everything; one that looks at a corner, nothing;
    strictly inside counts.
    """
    config = dict(
        data=str(toy_tree),
        regions=str(toy_tree / "regions"),
        vision="patches",
        resolution=64,
        patch=8,
        max_words=24,
    )

    def told(place):
        def heat_maps_of(run, records, store, **how):
            for record in records:
                A = torch.zeros(180, 240)
                x, y = place(record.boxes[0])
                A[int(y), int(x)] = 1
                yield record, store.finder()([record.image])[0], A

        monkeypatch.setattr(evaluate, "heat_maps_of", heat_maps_of)
        run = evaluate.Run(None, tokenizer, config, {}, evaluate.vision_of(config))
        return evaluate.pointing_games(run)

    middle, corner, left, top = (
        told(lambda b: (b[0] + b[2] / 2, b[1] + b[3] / 2)),
        told(lambda b: (0, 0)),
        told(lambda b: (b[0], b[1] + b[3] / 2)),
        told(lambda b: (b[0] + b[2] / 2, b[1])),
    )
    for name in ("flickr30k", "flickr30k/people", "refcoco+/testA", "refcoco+/testB/clean"):
        assert (
            middle[f"pointing/{name}"] == 100
            and corner[f"pointing/{name}"] == 0
            and left[f"pointing/{name}"] == 0
            and top[f"pointing/{name}"] == 0
        ), name
    assert (
        middle["pointing/refcoco+/testA/boxes"] > 80 > corner["pointing/refcoco+/testA/boxes"]
        and 1 < middle["pointing/flickr30k/chance"] < 15
    )


def test_what_patches_allow(toy_tree, tokenizer, monkeypatch):
    """README: a map of 4 x 4 patches, each with its share of the boxes, points right about half
    the time.
    """
    config = dict(data=str(toy_tree), regions=str(toy_tree / "regions"), vision="patches")
    config |= dict(resolution=64, patch=16)

    def perfect(run, records, store, **how):
        for record in records:
            image = store.finder()([record.image])[0]
            width, height = store.size(image)
            inside = torch.zeros(1, height, width)
            for x, y, w, h in np.array(record.boxes).astype(int):
                inside[:, y : y + h, x : x + w] = 1
            A = torch.nn.functional.adaptive_avg_pool2d(inside, (4, 4)).flatten(1)
            yield record, image, evaluate.at_size(A, (width, height))[0]

    monkeypatch.setattr(evaluate, "heat_maps_of", perfect)
    run = evaluate.Run(None, tokenizer, config, {}, evaluate.vision_of(config))
    found = evaluate.pointing_games(run, ["flickr30k"])
    assert 35 < found["pointing/flickr30k"] < 55


def test_referit(tmp_path, toy_tree, tokenizer, monkeypatch):
    (tmp_path / "refclef/images").mkdir(parents=True)
    Image.new("RGB", (100, 50)).save(tmp_path / "refclef/images/12.jpg")
    (tmp_path / "refclef/refclef_test_10k_unique.json").write_text(
        json.dumps(
            [
                {
                    "image": "images/12.jpg",
                    "text": "tree on left",
                    "bbox": [0, 0, 40, 50],
                    "split": "test",
                }
            ]
        )
    )
    texts, _ = read(data.referit_expressions, tmp_path, "test_10k")
    assert texts == [Record("12", "tree on left", "0", boxes=((0, 0, 40, 50),))]
    # the right upper quarter
    monkeypatch.setattr(
        evaluate, "heat_map", lambda model, batch: torch.eye(4)[[1]].repeat(len(batch["text"]), 1)
    )
    model = build("albef", "toy", vocab=len(tokenizer), queue=4, resolution=32, patch=16)
    config = dict(
        data=str(tmp_path),
        regions=str(tmp_path / "regions"),
        vision="patches",
        resolution=32,
        patch=16,
        max_words=24,
    )
    assert evaluate.pointing_games(
        evaluate.Run(model, tokenizer, config, {}, evaluate.vision_of(config))
    ) == {"pointing/referit": 0.0, "pointing/referit/chance": 40.0}
    with pytest.raises(DataError, match="has none of flickr30k_entities"):
        evaluate.pointing_sets(tmp_path / "nowhere", evaluate.POINTING_SETS)


@pytest.mark.parametrize(
    "typed, told",
    [
        (["--loss", "amc", "--recipe", "toy"], "needs texts with boxes"),
        (["--recipe", "toy-albef", "--loss", "cacr"], "--model albef"),
        (["--recipe", "toy-albef", "--batch-size", "1"], "no negative"),
        (["--recipe", "toy-amc", "--triplets", "boxes"], "did you mean box"),
        (["--vision", "patches", "--task", "re"], "not for --task re"),
    ],
)
def test_what_cannot_be(typed, told):
    with pytest.raises(train.UserError, match=told):
        train.parse(typed)


def test_cosine_schedule():
    rate = lambda step: train.lr_at(step, 1e-4, 10, 110, "cosine")
    assert (
        rate(5) == pytest.approx(5e-5)
        and rate(10) == pytest.approx(1e-4)
        and rate(60) == pytest.approx(5.5e-5)
        and rate(110) == pytest.approx(1e-5)
    )
    assert rate(35) == pytest.approx(1e-5 + 9e-5 * (1 + math.cos(math.pi / 4)) / 2)


# -------------------------------------------------------------------- every loss on every encoder


@pytest.fixture(scope="module")
def patched(toy_tree, tmp_path_factory):
    """Barely trained single- and two-stream models of patches."""
    folder, found = tmp_path_factory.mktemp("patched"), {}
    for model, tasks in (("uniter", "mlm+itm+mrfr+mrc+mrckl+wra"), ("lxmert", "mlm+itm+mrfr")):
        done = run(
            folder,
            "--recipe toy-pretrain --vision patches --resolution 32",
            "--model",
            model,
            "--init none",
            "--pretrain",
            tasks,
            "--data",
            toy_tree,
            "--steps 20 --warmup 5 --batch-tokens 256",
            "--out",
            model,
            *QUICK,
        )
        assert "winoground/group" in last_line(done)
        found[model] = folder / model / "last.pt"
    return found


@pytest.mark.parametrize("model", ["uniter", "lxmert"])
@pytest.mark.parametrize(
    "loss", ["cacr", "cacr-probs", "iais", "iais-released", "iais-distributed", "wra"]
)
def test_alignment_losses_on_patches(toy_tree, patched, tmp_path, model, loss):
    run(
        tmp_path,
        "--recipe toy --vision patches --resolution 32",
        "--model",
        model,
        "--init",
        patched[model],
        "--data",
        toy_tree,
        "--loss",
        loss,
        "--steps 20 --warmup 2 --batch-tokens 256 --candidates 6 --log-every 1 --out x",
        *QUICK,
    )
    log = [json.loads(line) for line in (tmp_path / "x/log.jsonl").read_text().splitlines()]
    values = [r[loss] for r in log if loss in r]
    assert len(values) == 20 and np.isfinite(values).all() and any(values)


@pytest.mark.parametrize("loss", ["none", "align"])
def test_all_of_kervadecs_supervision_on_patches(toy_tree, tmp_path, loss):
    """A patch has a detector's class to learn; a pointer's target is its box alone."""
    done = run(
        tmp_path,
        "--recipe toy-align",
        "--loss",
        loss,
        "--vision patches --resolution 32",
        "--data",
        toy_tree,
        "--steps 20 --warmup 5 --batch-tokens 512 --log-every 1 --out x",
        *QUICK,
    )
    log = [json.loads(line) for line in (tmp_path / "x/log.jsonl").read_text().splitlines()]
    for name in {"class", "feature", "answers", loss} - {"none"}:
        assert (
            any(r.get(name, 0) for r in log)
            and np.isfinite([r[name] for r in log if name in r]).all()
        ), name
    assert "gqa/accuracy" in last_line(done)


def test_pictures_begin_from_the_run_on_regions(tmp_path, monkeypatch):
    """--vision patches ends in the very run that the same command on regions begins from."""
    monkeypatch.chdir(tmp_path)
    _, words = train.first_run(train.parse(["--loss", "cacr"]))
    eyes = ["--vision", "patches", "--patch", "8"]
    for typed in (["--loss", "cacr", *eyes], ["--task", "vqa", *eyes], ["--task", "nlvr", *eyes]):
        _, seen = train.first_run(train.parse(typed))
        assert (seen.recipe, seen.vision, seen.patch) == ("toy-patches", "patches", 8)
        _, first = train.first_run(seen)
        assert first == words and (first.recipe, first.vision) == ("toy-short", "regions")
    # a task's own pre-training reads pictures too
    _, aligned = train.first_run(train.parse(["--task", "gqa", *eyes]))
    assert (aligned.recipe, aligned.vision, aligned.patch) == ("toy-align", "patches", 8)


def test_nlvr_as_pictures(toy_tree, patched, tmp_path):
    """The official folders, drawn small here: dev/images/<number>/dev-<identifier>-<order>.png."""
    tree = tmp_path / "toy"
    shutil.copytree(toy_tree, tree)
    write_nlvr(tree)
    done = run(
        tmp_path,
        "--task nlvr --vision patches --resolution 32",
        "--init",
        patched["uniter"],
        "--data",
        tree,
        "--steps 3 --warmup 1 --batch-tokens 256 --out x",
        *QUICK,
    )
    assert last_line(done)["nlvr/majority"] == 50.0


@pytest.mark.parametrize("task", ["vqa", "ve", "nlvr2"])
def test_downstream_tasks_on_patches(toy_tree, patched, tmp_path, task):
    done = run(
        tmp_path,
        "--task",
        task,
        "--vision patches --resolution 32",
        "--init",
        patched["uniter"],
        "--data",
        toy_tree,
        "--steps 4 --warmup 1 --batch-tokens 512 --out x",
        *QUICK,
    )
    assert any(k.startswith(f"{task}/accuracy") for k in last_line(done))
    from evaluate import main  # noqa: F401

    numbers = evaluate.run_benchmark(
        evaluate.make_parser().parse_args(
            ["--task", task, "--ckpt", str(tmp_path / "x/last.pt"), "--data", str(toy_tree)]
        )
    )
    assert numbers[f"{task}/accuracy"] == pytest.approx(
        last_line(done)[f"{task}/accuracy"], abs=0.01
    )


# --------------------------------------------------------------------- AMC on one and two streams


@pytest.mark.parametrize("kind", ["uniter", "lxmert"])
def test_gradcam_of_one_and_two_streams(kind, monkeypatch):
    """Its definition, with loops; the derivative by one probability against a difference."""
    torch.manual_seed(0)
    model = (
        build(kind, "toy", vocab=40, features=48, classes=9, dropout=0.0, patch=4).double().eval()
    )
    B, N_L, N_V = 2, 5, 4
    text_mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    batch = {
        "text": torch.randint(1, 40, (B, N_L)),
        "text_mask": text_mask,
        "regions": torch.randn(B, N_V, 48).double(),
        "boxes": torch.rand(B, N_V, 4).double(),
        "region_mask": torch.ones(B, N_V, dtype=torch.bool),
    }
    out = model(**batch, heads=("match",), need_gradcam=True)
    assert torch.allclose(out.match, model(**batch, heads=("match",)).match, atol=1e-9)
    P, block_of = out.gradcam
    A, G = (
        losses.gradcam(P, out.match[:, 1], text_mask, block_of=block_of),
        torch.autograd.grad(out.match[:, 1].sum(), P, retain_graph=True)[0],
    )
    # column of the first patch
    expected, first = torch.zeros(B, N_V).double(), [0, 0] if kind == "lxmert" else [5, 3]
    for b in range(B):
        for h in range(4):
            for i in range(int(text_mask[b].sum())):
                for j in range(N_V):
                    expected[b, j] += P[b, h, i, first[b] + j] * max(G[b, h, i, first[b] + j], 0)
    assert torch.allclose(A, expected / (4 * N_L), atol=1e-12) and A.sum() > 0

    softmax, at, scores = torch.Tensor.softmax, (1, 2, 0, first[1] + 2), []
    for nudge in (1e-4, -1e-4):

        def nudged(S, dim):
            found = softmax(S, dim=dim)
            # of this layer alone: any other has other probabilities
            if found.shape == P.shape and torch.equal(found, P):
                found[at] += nudge
            return found

        monkeypatch.setattr(torch.Tensor, "softmax", nudged)
        with torch.no_grad():
            scores.append(
                model(**batch, heads=("match",), need_gradcam=True).match[:, 1].sum().item()
            )
    monkeypatch.undo()
    assert (scores[0] - scores[1]) / 2e-4 == pytest.approx(G[at].item(), rel=1e-4)

    # through the gradient too
    losses.amc(
        A.view(B, 2, 2) / A.max(), torch.tensor([[[1.0, 0], [0, 0]]] * B).double()
    ).backward()
    assert all(
        p.grad.isfinite().all() and p.grad.abs().sum() > 0
        for name, p in model.named_parameters()
        if ("to_v" in name or "to_q" in name)
        and f"layers.{0 if kind == 'lxmert' else 1}" in name
        and not (
            kind == "lxmert"
            and (not name.startswith("cross_layers") or ".text." in name or ".region." in name)
        )
    )
    if kind == "uniter":
        with pytest.raises(ValueError, match="too few"):
            model(**batch, maps=(1,), need_gradcam=True)


def test_boxes_of_matched_texts(toy_tree):
    """Which rows of a matching batch have a region, and what it covers; the same for any number
    of processes.
    """
    # two boxes: one is drawn
    texts = [
        t._replace(boxes=(*t.boxes, (0.0, 0.0, 1.0, 1.0)))
        for t in read(data.vg_triplets, toy_tree, "train", min_area=0.01)[0]
    ]
    pairs = make_index(
        texts,
        PatchStore(toy_tree, "vg", 32, 16),
        WordPiece(toy_tree / "bert-base-cased/vocab.txt", lower=False),
    )
    whole, halves = (
        Batches("itm", pairs, 700, 5),
        [Batches("itm", pairs, 700, 5, part, 2) for part in (0, 1)],
    )
    batch, parts = whole[3], [h[3] for h in halves]
    assert (
        batch["boxed"].tolist() == batch["match"].nonzero()[:, 0].tolist()
        and 5 < len(batch["boxed"]) < len(batch["match"])
        and train.count_of(batch, "amc") == len(batch["boxed"])
    )
    by_name = {t.id: t for t in texts}
    for row, region in zip(batch["boxed"].tolist(), batch["region_target"].numpy()):
        text = by_name[batch["names"][row].removeprefix("caption ").rsplit(" with image ", 1)[0]]
        x1, y1, x2, y2 = (np.array(text.boxes[0]) * 32).round().astype(int)
        assert region[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)].all() and region.sum() in (
            max(y2 - y1, 1) * max(x2 - x1, 1),
            32 * 32,
        )
    assert 0 < (batch["region_target"].sum((1, 2)) == 32 * 32).sum() < len(batch["region_target"])
    for k, part in enumerate(parts):
        mine = [i for i, row in enumerate(batch["boxed"].tolist()) if row % 2 == k]
        assert torch.equal(part["region_target"], batch["region_target"][mine])
    assert "boxed" not in Batches("mlm", pairs, 700, 5)[0]


@pytest.mark.parametrize("loss", ["amc", "amc-mean", "amc-max", "amc-cosine", "amc+cacr"])
@pytest.mark.parametrize("model", ["uniter", "lxmert"])
def test_amc_on_patches(toy_tree, patched, tmp_path, model, loss):
    done = run(
        tmp_path,
        "--loss",
        loss,
        "--model",
        model,
        "--resolution 32",
        "--init",
        patched[model],
        "--data",
        toy_tree,
        "--pretrain itm --steps 20 --warmup 2 --batch-tokens 256 --log-every 1",
        "--eval-every 20 --out x",
        *QUICK,
    )
    log = [json.loads(line) for line in (tmp_path / "x/log.jsonl").read_text().splitlines()]
    for name in loss.split("+"):
        values = [r[name] for r in log if name in r]
        assert len(values) == 20 and np.isfinite(values).all() and any(values), name
    found = last_line(done)
    assert (
        0 <= found["pointing/flickr30k"] <= 100
        and "pointing/refcoco+/testA" in found
        and list((tmp_path / "x/figures").glob("heat_*.png"))
    )
    if loss == "amc":
        again = evaluate.run_benchmark(
            evaluate.make_parser().parse_args(
                [
                    *"--task pointing --dataset flickr30k".split(),
                    "--ckpt",
                    str(tmp_path / "x/last.pt"),
                    "--data",
                    str(toy_tree),
                ]
            )
        )
        assert again["pointing/flickr30k"] == pytest.approx(found["pointing/flickr30k"], abs=0.01)


@pytest.mark.parametrize(
    "argv, told",
    [
        (
            ["--loss", "amc", "--model", "uniter", "--vision", "regions"],
            "heat maps are of pictures",
        ),
        (["--recipe", "toy-patches", "--loss", "amc"], "heat maps are of pictures"),
        (["--recipe", "toy-patches", "--corpora", "crops:-1+coco"], "crops:-1: wanted a name, or"),
        (["--loss", "amc", "--model", "uniter", "--pretrain", "mlm"], "itm in --pretrain"),
        (["--recipe", "toy", "--vision", "patches", "--loss", "cacr+amc"], "--triplets"),
        (["--loss", "amc", "--model", "uniter", "--triplets", "boxes"], "--triplets"),
    ],
)
def test_amc_without_what_it_needs(tmp_path, argv, told):
    assert told in run(tmp_path, *argv, expect=1).stderr


@pytest.mark.parametrize(
    "file, spoil, told",
    [
        (
            "region_descriptions",
            lambda d: d[4]["regions"][0].update(phrase=None),
            "image 2000004: phrase is None",
        ),
        (
            "region_descriptions",
            lambda d: d[3]["regions"][0].update(x="left"),
            "image 2000003: x is 'left'",
        ),
        (
            "region_descriptions",
            lambda d: d[2].update(regions=None),
            "image 2000002: regions is None",
        ),
        ("image_data", lambda d: d[5].update(width=None), "image 2000005: width is None"),
        (
            "attributes",
            lambda d: d[4]["attributes"][0].update(names="dog"),
            "image 2000004: names is 'dog'",
        ),
    ],
)
def test_visual_genome_with_something_else_in_a_field(toy_tree, tmp_path, file, spoil, told):
    shutil.copytree(toy_tree / "vg", tmp_path / "vg", ignore=shutil.ignore_patterns("VG_100K"))
    shutil.copytree(toy_tree / "coco", tmp_path / "coco", ignore=shutil.ignore_patterns("*2014"))
    records = json.loads((tmp_path / f"vg/{file}.json").read_text())
    spoil(records)
    (tmp_path / f"vg/{file}.json").write_text(json.dumps(records))
    with pytest.raises(DataError, match="Wanted: a ") as error:
        read(data.vg_triplets, tmp_path, "train", min_area=0.01)
    assert f"{file}.json, {told}" in str(error.value)


def test_pictures_are_listed_in_order_of_their_names(tmp_path):
    """In folders inside others too; of a name that comes twice the last path stays."""
    for path in ("b/2.jpg", "b/10.PNG", "a/x/2.jpg", "a/1.jpeg", "a/note.txt"):
        place = tmp_path / "flickr/images" / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    store = PatchStore(tmp_path, "flickr", 32, 8)
    assert [store.image_id(i) for i in range(len(store))] == ["1", "10", "2"]
    names = [str(store.path(i).relative_to(tmp_path / "flickr/images")) for i in range(3)]
    assert names == ["a/1.jpeg", "b/10.PNG", "b/2.jpg"]
    # a file more, and the list is made again
    (tmp_path / "flickr/images/a/x/3.jpg").touch()
    assert len(PatchStore(tmp_path, "flickr", 32, 8)) == 4
