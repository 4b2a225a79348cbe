"""Pictures: readers, patches, augmentation, what can be wrong with a file; ALBEF and AMC as a
user runs them; every loss on every encoder.
"""

import functools
import json
import math
import shutil
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import losses
import toy
import train
from conftest import (
    QUICK,
    copied,
    ids_of,
    last_line,
    prepare,
    prepared_run,
    read,
    run,
    run_and_stop,
)
from conftest import same
from conftest import weights
from data import Batches, DataError, PatchStore, PictureStore, Record, Vision, WordPiece, make_index
from model import Albef, PatchStem, build, load_pretrained, resize_position

WHITE = (255, 255, 255)


def batches(kind, index, pieces=1, **settings):
    """The batches of a kind, by these settings and the usual ones"""
    cfg = train.Config(**{"augment": "none", **settings})
    return Batches(kind, index, cfg, pieces=pieces)


def log_of(folder, *names):
    """{name: what each line of a run's log.jsonl says}"""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {name: [line[name] for line in lines if name in line] for name in names}


@pytest.fixture(scope="module")
def store(toy_tree):
    return PatchStore(toy_tree, "coco", 64, 16)


@pytest.fixture(scope="module")
def tokenizer(toy_tree):
    return WordPiece(toy_tree / "bert-base-uncased/vocab.txt", True)


# ---------------------------------------------------------------------------------------- patches


def test_what_a_model_is_shown(toy_tree, store, monkeypatch):
    """Patches as regions; or whole pictures, each read once, and which of them a text has."""
    images, decoded, read_picture = np.array([5, 3, 5]), [], data.read_picture
    monkeypatch.setattr(data, "read_picture", lambda *a: decoded.append(a) or read_picture(*a))
    whole = Vision(str(toy_tree), "", 64, 16, whole=True).open("coco")
    shown = whole.input(images)
    assert type(whole) is PictureStore and shown["image_of"].tolist() == [1, 0, 1]
    assert shown["image"].shape == (2, 3, 64, 64) and len(decoded) == 2
    assert type(Vision(str(toy_tree), "", 64, 16).open("coco")) is PatchStore
    patches = store.input(images)
    assert patches["boxes"].shape == (3, 16, 4) and patches["region_mask"].all()
    x = torch.from_numpy(patches["regions"].astype(np.float32))
    corner = shown["image"][shown["image_of"], :, :16, 16:32].permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close(corner, x[:, 1], atol=2e-3, rtol=1e-3)


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
    assert data.read_picture(store.path(3)).size == (240, 180)


def test_patches_have_no_detectors_classes(store, tokenizer):
    """Their features can be learned, and what asks for classes says that there are none."""
    pairs = make_index([Record(i, "a", i) for i in ids_of(store)[:30]], store, tokenizer, 24)
    batch = batches("mrfr", pairs, batch_tokens=1024, mask_rate=0.5)[0]
    assert len(batch["masked_regions"]) > 10 and "hidden_regions" not in batch
    with pytest.raises(DataError, match="has no cls_prob"):
        batches("mrc", pairs)[0]


def test_every_picture_of_the_tree_is_found(toy_tree):
    for name in "coco flickr30k vg gqa winoground nlvr2 cc3m_train cc3m_val sbu".split():
        names = ids_of(data.RegionStore(toy_tree / "regions" / name))
        assert set(names) <= PatchStore(toy_tree, name, 64, 16).numbers().keys(), name
    with pytest.raises(DataError, match="no pictures in .*refclef"):
        PatchStore(toy_tree / "nowhere", "refclef", 64, 16)
    with pytest.raises(DataError, match="multiple of --patch"):
        PatchStore(toy_tree, "coco", 50, 16)


def test_regions_cut_out(toy_tree):
    """A crop's window holds its region; the whole picture and the region alone are the two ends.
    Crops are files, of training's images and of validation's.
    """
    crops, vg = (PatchStore(toy_tree, name, 64, 16) for name in ("crops", "vg"))
    wide, place = [], vg.numbers()
    for image, regions in data.vg_items(toy_tree, "region_descriptions", "regions"):
        for k, r in enumerate(regions):
            window = toy.crop_window(np.random.default_rng([image, k]), r)
            corners = np.array([r["x"], r["y"], r["x"] + r["width"], r["y"] + r["height"]])
            # a region may lie partly outside its picture, a window may not
            held = corners.clip(0, [240, 180, 240, 180])
            assert (np.array(window[:2]) - 1e-6 <= held[:2]).all()
            assert (np.array(window[2:]) + 1e-6 >= held[2:]).all()
            assert min(window) >= -1e-6 and window[2] <= 240 + 1e-6 and window[3] <= 180 + 1e-6
            wide.append((window[2] - window[0]) / 240)
            name = f"{image}_{k:03d}"
            if len(wide) % 50 == 0 and name in crops.numbers():
                picture = data.read_picture(vg.path(place[str(image)]))
                cut = np.asarray(picture.resize((64, 64), Image.BICUBIC, window))
                np.testing.assert_array_equal(crops.load(crops.numbers()[name]), cut)
    assert min(wide) < 0.3 and max(wide) > 0.9
    reader, images = train.CORPORA["crops"].reader, {}
    for split in ("train", "val"):
        texts, described = read(reader, toy_tree, split)[0], {}
        described = {t.id: t.text for t in read(data.vg_descriptions, toy_tree, split)[0]}
        assert texts and all(described[t.id] == t.text for t in texts)
        images[split] = {t.image for t in texts}
        assert images[split] <= crops.numbers().keys()
    assert not images["train"] & images["val"]


@pytest.mark.parametrize(
    "kind",
    ["grey", "palette", "cmyk", "16 bits", "transparent", "one pixel", "rotated", "grey 16 rgb"],
)
def test_odd_pictures(tmp_path, kind):
    path, left, right = tmp_path / "own/images/p.png", (200, 10, 10), (10, 10, 200)
    path.parent.mkdir(parents=True)
    picture = Image.new("RGB", (40, 20), left)
    picture.paste(right, (20, 0, 40, 20))
    wanted = [left, right]
    if kind == "grey":
        picture.convert("L").save(path)
        wanted = [(67, 67, 67), (32, 32, 32)]
    elif kind == "palette":
        picture.convert("P", palette=Image.ADAPTIVE).save(path)
    elif kind == "cmyk":
        path = path.with_suffix(".jpg")
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
        path = path.with_suffix(".jpg")
        picture.save(path, exif=exif, quality=95)
        wanted = [right, left]
    x = PatchStore(tmp_path, "own", 16, 16).load(0).astype(int)
    assert x.shape == (16, 16, 3)
    for column, colour in zip((2, 13), wanted):
        assert np.abs(x[8, column] - colour).max() < 14, (kind, x[8, column], colour)


def test_a_picture_held_sideways_has_its_own_size(tmp_path):
    (tmp_path / "winoground/images").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "winoground/images/a.jpg", exif=exif)
    store = PatchStore(tmp_path, "winoground", 32, 16)
    assert data.read_picture(store.path(0)).size == (20, 40)


def spoil(path, kind):
    """A picture as bad downloads leave it"""
    if kind == "bomb":
        # a few kilobytes that claim to be a billion pixels
        Image.new("1", (40_000, 5_000)).save(path, "PNG")
    else:
        path.write_bytes({"cut": path.read_bytes()[:900], "empty": b"", "page": b"<html>"}[kind])


@pytest.mark.parametrize("kind", ["cut", "empty", "page", "bomb"])
def test_pictures_that_cannot_be_read(tmp_path, kind):
    (tmp_path / "own/images").mkdir(parents=True)
    for name in "abc":
        Image.effect_noise((200, 200), 50).convert("RGB").save(tmp_path / f"own/images/{name}.jpg")
    spoil(tmp_path / "own/images/b.jpg", kind)
    store = PatchStore(tmp_path, "own", 32, 16)
    with pytest.raises(DataError, match=r"b\.jpg cannot be read as a picture"):
        store.load(1)
    assert store.readable(np.array([[0, 1], [2, 0]])).tolist() == [[True, False], [True, True]]
    assert store.unreadable == {"b"}


@pytest.mark.parametrize("kind", ["albef", "itm"])
def test_another_of_the_batch_stands_in(toy_tree, tokenizer, tmp_path, kind):
    """For a text whose picture cannot be read: text, picture and box of another, never a grey
    picture or another text's; of a batch of bad pictures none.
    """
    shutil.copytree(toy_tree / "vg/VG_100K", tmp_path / "own/images")
    pictures = sorted((tmp_path / "own/images").iterdir())[:24]
    texts = [
        Record(path.stem, f"a {path.stem}", path.stem, boxes=((0, 0, (n + 1) / 32, 1),))
        for n, path in enumerate(pictures)
    ]
    for path in pictures[::5]:
        spoil(path, "cut")
    store = (PictureStore if kind == "albef" else PatchStore)(tmp_path, "own", 32, 16)
    whole = PatchStore(toy_tree, "vg", 32, 16)
    layout, number = {"layout": "albef"} if kind == "albef" else {}, whole.numbers()
    stream = batches(kind, make_index(texts, store, tokenizer, **layout), batch_size=8)
    for k in range(6):
        batch = stream[k]
        pairs = [name.split(" with image ") for name in batch["names"]]
        images = np.array([number[image] for _, image in pairs])
        shown = batch["pixels"] if kind == "albef" else batch["input"]["regions"]
        wanted = whole.pixels(images) if kind == "albef" else whole.read(images)
        np.testing.assert_array_equal(shown, wanted)
        wide = batch["region_target"][:, 0].sum(dim=1).tolist()
        named = [f"a {pairs[row][0]}" for row in batch["boxed"].tolist()]
        assert len(pairs) == 8 and named == [texts[n - 1].text for n in wide]
        assert not {path.stem for path in pictures[::5]} & {image for _, image in pairs}
    assert batch["unreadable"] == [path.stem for path in pictures[::5]]
    # a negative that is drawn anew where its picture cannot be read; else these would be errors
    index = make_index(texts, PatchStore(tmp_path, "own", 32, 16), tokenizer)
    groups = [batches("rank", index, batch_size=8, negatives=6)[k]["pool"] for k in range(3)]
    assert all(pool.rows.shape == (8, 7) for pool in groups)
    for path in pictures:
        spoil(path, "empty")
    index = make_index(texts, PatchStore(tmp_path, "own", 64, 16), tokenizer)
    with pytest.raises(DataError, match="none of the pictures of a batch can be read"):
        batches("mlm", index, batch_size=8)[0]


@pytest.mark.parametrize(
    "recipe",
    ["toy-albef", *(pytest.param(r, marks=pytest.mark.slow) for r in ("toy-vqa", "toy-patches"))],
)
def test_bad_pictures_are_left_out_and_counted(toy_tree, tmp_path, recipe):
    """Nine of three hundred: the run ends, lists them, and resumes to the same bits; a stop in the
    middle forgets nothing."""
    tree = copied(toy_tree, tmp_path / "tree", "coco")
    pictures = sorted((tree / "coco/train2014").iterdir())
    bad = [path.stem for path in pictures[3:120:13]]
    for name, kind in zip(bad, ["cut", "empty", "page", "bomb"] * 3):
        spoil(tree / f"coco/train2014/{name}.jpg", kind)
    argv = ["--recipe", recipe, "--data", tree, "--vision", "patches", "--init", "none", *QUICK]
    argv += ["--steps", 24, "--save-every", 8, "--warmup", 1, "--eval-every", 24, "--patch", 16]
    if recipe != "toy-vqa":
        argv += ["--corpora", "coco"]
    argv += ["--batch-size", 16, "--queue", 32] if recipe == "toy-albef" else []
    whole = run(tmp_path, *argv, "--out", "a")
    left_out = (tmp_path / "a/skipped.txt").read_text().splitlines()
    assert sorted(left_out) == sorted(set(left_out)) and set(left_out) <= set(bad)
    assert len(left_out) >= 6 and f"{len(left_out)} pictures could not be read" in whole.stdout
    # the same, stopped after step 8
    run_and_stop(tmp_path, argv, "b")
    run(tmp_path, *argv, "--out", "b", "--resume")
    same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert set((tmp_path / "b/skipped.txt").read_text().splitlines()) == set(left_out)


def test_distillation_comes_in_over_the_warm_up_and_stays(toy_tree, monkeypatch):
    """0.4 of the momentum model's targets [ALBEF], never more, however long a run is."""
    how = "--recipe toy-albef --init none --warmup 4 --batch-size 4 --queue 8 --data"
    made, seen, whole = prepare(how, toy_tree, *QUICK), [], losses.itc_targets
    targets = lambda s, own, alpha: seen.append(alpha) or whole(s, own, alpha)
    monkeypatch.setattr(losses, "itc_targets", targets)
    for number in (0, 2, 4, 12):
        train.objective_albef(made.cfg, made.model, made.batch | {"number": number})
    assert seen[::2] == pytest.approx([0, 0.2, 0.4, 0.4]) and seen[1::2] == seen[::2]


def test_bad_pictures_alone_stop_a_run_with_a_name(toy_tree, tmp_path):
    tree = copied(toy_tree, tmp_path / "toy", "coco")
    for path in (tree / "coco/train2014").iterdir():
        spoil(path, "cut")
    args = "--recipe toy-pretrain --vision patches --init none --steps 2 --out x"
    error = run(tmp_path, args, "--data", tree, *QUICK, expect=1).stderr
    assert "none of the pictures of a batch can be read" in error and "COCO_train2014_0" in error
    assert "Traceback" not in error


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


def small_vg(tmp_path, objects, coco_id=None, flickr_id=None):
    (tmp_path / "vg").mkdir(), (tmp_path / "coco").mkdir()
    held = {"images": [{"cocoid": 77, "split": "test"}]}
    (tmp_path / "coco/dataset_coco.json").write_text(json.dumps(held))
    image = {"image_id": 1, "url": "x/VG_100K/1.jpg", "width": 90, "height": 90}
    region = lambda n, phrase, *at: (
        {"region_id": n, "phrase": phrase} | dict(zip(("x", "y", "width", "height"), at))
    )
    regions = [region(5, " a dog\n runs", 0, 0, 90, 45), region(6, "far away", 200, 0, 9, 9)]
    for name, record in {
        "image_data": [image | {"coco_id": coco_id, "flickr_id": flickr_id}],
        "attributes": [{"image_id": 1, "attributes": objects}],
        "region_descriptions": [{"id": 1, "regions": [*regions, region(7, "tiny", 0, 0, 9, 9)]}],
    }.items():
        (tmp_path / f"vg/{name}.json").write_text(json.dumps(record))


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
        "boxes left out: too small, or outside their image": 6,
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
    small_vg(tmp_path, [], coco_id=77)
    assert read(data.vg_triplets, tmp_path, "train")[0] == []


def test_flickr30ks_photos_describe_nothing(tmp_path):
    """Visual Genome's descriptions leave them out, AMC's triplets do not [AMC's code]."""
    small_vg(tmp_path, [], flickr_id=99)
    (tmp_path / "flickr30k").mkdir()
    for photo, held in (("99", True), ("98", False)):
        path = tmp_path / "flickr30k/dataset_flickr30k.json"
        path.write_text(json.dumps({"images": [{"filename": f"{photo}.jpg"}]}))
        texts, counts = read(data.vg_descriptions, tmp_path, "train")
        assert (texts == []) == held == counts["images held out"]
        assert [t.text for t in read(data.vg_triplets, tmp_path, "train")[0]] == ["a dog runs"]


def test_web_captions(tmp_path):
    (tmp_path / "cc12m").mkdir(), (tmp_path / "coco").mkdir(), (tmp_path / "flickr30k").mkdir()
    (tmp_path / "coco/dataset_coco.json").write_text('{"images": []}')
    (tmp_path / "flickr30k/dataset_flickr30k.json").write_text(
        '{"images": [{"filename": "77.jpg"}]}'
    )
    rows = ["http://farm1.staticflickr.com/1/77_0a1b2c3d4e_z.jpg\tz\n"]
    rows += [f"http://x.org/{i}.jpg\ta {i}\n" for i in range(102)]
    (tmp_path / "cc12m/cc12m.tsv").write_text("".join(rows))
    (train_texts, told), (val, _) = (
        read(data.cc12m_captions, tmp_path, s) for s in ("train", "val")
    )
    # every hundredth image is for validation, two at least
    assert [t.text for t in val] == ["a 0", "a 1", "a 100"]
    assert [t.text for t in train_texts] == [f"a {i}" for i in range(2, 102) if i != 100]
    assert list(told.values()) == [1]
    (tmp_path / "cc12m/cc12m.tsv").write_text("one column\n")
    with pytest.raises(DataError, match=r"cc12m\.tsv, line 1"):
        list(data.records(data.cc12m_captions, tmp_path, "train", Counter()))


def pictured(store, tokenizer, texts, boxes=()):
    """An Index of ALBEF's of these texts, one for each of the store's first pictures"""
    pairs = zip(ids_of(store), texts)
    found = [Record(image, text, image, boxes=boxes) for image, text in pairs]
    return make_index(found, store, tokenizer, 24, layout="albef")


def test_flip_mirrors_the_box_and_the_words(toy_tree, tokenizer):
    store = PatchStore(toy_tree, "vg", 64, 16)
    box, text = (0.0, 0.25, 0.25, 0.5), "a red circle on the left"
    pairs = pictured(store, tokenizer, [text] * 40, (box,))
    assert pairs.text(np.array([0]))[0][0, -1] == tokenizer("left")[0]
    batch = batches("albef", pairs, batch_size=40, augment="flip")[0]
    plain = batches("albef", pairs, batch_size=40)[0]
    left, right = tokenizer("left")[0], tokenizer("right")[0]
    both = np.array([tokenizer("left of the right")])
    assert data.mirrored(tokenizer, both)[0].tolist() == tokenizer("right of the left")
    flipped = (batch["text"] == right).any(1)
    assert 8 < flipped.sum() < 32 and torch.equal(flipped, batch["flip"])
    assert not (batch["text"][flipped] == left).any() and (plain["text"] == left).any(1).all()
    # what is asked for a masked word is what the mirrored picture shows
    asked = batch["text"].flatten()[batch["masked_words"]]
    assert torch.equal(asked, batch["word_targets"]) and (asked == right).any()
    seen = batch["masked_text"] != batch["text"]
    assert not (seen.flatten().nonzero()[:, 0][:, None] == batch["masked_words"]).sum(1).eq(0).any()
    for row in range(40):
        image, mask = plain["pixels"][row], plain["region_target"][row]
        assert mask.sum() == 16 * 16 and mask[16:32, :16].all()
        image, mask = (image.flip(1), mask.flip(-1)) if flipped[row] else (image, mask)
        assert torch.equal(batch["pixels"][row], image)
        assert torch.equal(batch["region_target"][row], mask)
    # at least one pixel, and all of them
    for box, flip, pixels in (((0.999, 0.999, 1, 1), False, 1), ((0, 0, 1, 1), True, 64 * 64)):
        index = pictured(store, tokenizer, ["a"], (box,))
        covered = data.boxed(index, np.zeros(1, int), [0], np.array([flip]))["region_target"]
        assert covered.sum() == pixels


def test_colours_change_only_where_asked(tokenizer, store):
    pairs = pictured(store, tokenizer, ["a"] * 30)
    plain, grey, jitter = (
        batches("albef", pairs, batch_size=30, augment=names)[0]["pixels"]
        for names in ("none", "grey", "jitter")
    )
    colourful = lambda x: x.float().std(dim=3).amax((1, 2)) > 5
    assert colourful(plain).all() and 1 <= (~colourful(grey)).sum() <= 14
    changed = (jitter != plain).flatten(1).any(1)
    assert 5 <= changed.sum() <= 25


def test_processes_share_out_the_same_pairs(tokenizer, store):
    """An update is a batch of each process: the same pairs for one, two or four, in every epoch;
    masks, augmentation and drawn negatives are others.
    """
    pairs = pictured(store, tokenizer, [f"a red circle {'left ' * (n % 3)}" for n in range(30)])
    updates = {}
    for processes in (1, 2, 4):
        cfg = train.Config(batch_size=8, gpus=1, model="albef", augment="flip")
        pieces, size = train.batch_of(cfg, processes)
        assert (pieces, size) == (processes, 8 // processes)
        stream = Batches("albef", pairs, cfg, size=size, pieces=pieces)
        mixed = train.MixedBatches([stream], [1], 7, 0, pieces)
        updates[processes] = [[mixed[step, piece] for piece in range(pieces)] for step in range(7)]
    named = {n: [[x for b in u for x in b["names"]] for u in us] for n, us in updates.items()}
    assert named[1] == named[2] == named[4] and len({*sum(named[1][:3], [])}) == 24
    assert updates[2][0][0]["masked_words"].tolist() != updates[1][0][0]["masked_words"].tolist()
    with pytest.raises(DataError, match="30 examples to learn from\n  Wanted: 31 for a batch"):
        batches("albef", pairs, batch_size=31)[0]


# ---------------------------------------------------------------------------------- ALBEF and AMC


def test_albef_runs_and_points(albef):
    numbers = last_line(albef[1])
    flickr, refcoco = "pointing/flickr30k", "pointing/refcoco+/test"
    wanted = {"val/crops/albef", "val/coco/albef", flickr, f"{flickr}/people", f"{flickr}/chance"}
    wanted |= {f"{refcoco}A", f"{refcoco}A/clean", f"{refcoco}B/boxes"}
    assert wanted <= numbers.keys() and all(0 <= v <= 100 for v in numbers.values())
    figures = [path.name for path in (albef[0].parent / "figures").iterdir()]
    assert {name.split("_")[1] for name in figures if name.startswith("heat")} >= {"flickr30k"}
    assert any(name.startswith("heat_refcoco+-testA_COCO") for name in figures), figures


@pytest.mark.parametrize("loss", ["none", "amc", "amc-mean", "amc-max", "amc-cosine"])
def test_eight_steps_of_amc(toy_tree, albef, tmp_path, loss, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "benchmarks_of", lambda settings: ([], []))
    args = "--queue 20 --steps 8 --warmup 2 --batch-size 8 --log-every 1 --out x"
    run(
        tmp_path,
        f"--recipe toy-amc --loss {loss}",
        "--data",
        toy_tree,
        "--init",
        albef[0],
        args,
        *QUICK,
    )
    for name, values in log_of(tmp_path / "x", *({"itc", "itm", "mlm", loss} - {"none"})).items():
        assert len(values) == 8 and np.isfinite(values).all() and any(values), name


def test_amc_lowers_itself(toy_tree, albef, tmp_path, monkeypatch):
    """Thirty updates on one batch: through the second derivative the heat moves into the boxes."""
    monkeypatch.chdir(tmp_path)
    changes = dict(size="tiny", data=str(toy_tree), init=str(albef[0]), queue=20, batch_size=8)
    changes |= dict(steps=40, warmup=1, lr=1e-3, precision="fp32")
    cfg = train.make_config("toy-amc", **changes)
    runtime, tokenizer = train.setup_runtime(cfg), train.load_tokenizer(cfg)
    streams = train.load_streams(cfg, runtime, prepared_run(cfg, tokenizer))
    sizes = train.model_sizes(cfg, tokenizer, streams, [])
    model, batch = train.build_model(cfg, runtime, tokenizer, sizes), streams.train[0][0]
    (optimizer,) = train.build_optimizers(cfg, model)
    assert all(p.requires_grad for g in optimizer.param_groups for p in g["params"])
    values = [
        train.train_step(cfg, runtime, model, [optimizer], step, [batch])[0]["amc"].item()
        for step in range(1, 31)
    ]
    assert np.mean(values[-3:]) < 0.7 * np.mean(values[:3]), values


def test_resume_is_bit_for_bit(toy_tree, albef, tmp_path):
    args = ["--loss amc", "--data", toy_tree, "--init", albef[0], "--queue 20 --steps 6 --warmup 2"]
    args += ["--batch-size 8 --save-every 3 --dropout 0.1", *QUICK]
    run(tmp_path, *args, "--out", "whole")
    run_and_stop(tmp_path, args, "cut")
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
    assert model.image_queue.shape == (64, 5)
    model.enqueue(torch.full((3, 64), 1.0), torch.full((3, 64), 2.0))
    model.enqueue(torch.full((3, 64), 3.0), torch.full((3, 64), 4.0))
    assert model.queue_ptr.item() == 1
    assert model.image_queue[0].tolist() == [3, 1, 1, 3, 3]
    assert model.text_queue[5].tolist() == [4, 2, 2, 4, 4]


DEIT = {"cls_token": (1, 1, 24), "pos_embed": (1, 5, 24), "norm.weight": (24,)}
DEIT |= {"patch_embed.proj.weight": (24, 3, 16, 16), "patch_embed.proj.bias": (24,)}
DEIT |= {"blocks.1.attn.qkv.weight": (72, 24), "blocks.1.attn.qkv.bias": (72,)}
DEIT |= {"blocks.0.mlp.fc1.weight": (48, 24), "head.weight": (10, 24), "head.bias": (10,)}
BERT = {
    "bert.embeddings.word_embeddings.weight": (40, 16),
    "bert.embeddings.LayerNorm.gamma": (16,),
    "bert.encoder.layer.1.attention.self.query.weight": (16, 16),
    "bert.encoder.layer.3.attention.self.value.bias": (16,),
    "bert.encoder.layer.3.output.dense.weight": (16, 32),
    "cls.predictions.transform.dense.weight": (16, 16),
    "cls.predictions.bias": (40,),
    "bert.pooler.dense.weight": (16, 16),
    "cls.seq_relationship.weight": (2, 16),
}


@pytest.mark.parametrize("kind", ["deit", "bert", "albef at another resolution"])
def test_official_checkpoints(tmp_path, kind):
    """By their published names: DeiT fills the ViT, BERT text and fusion, and the momentum copy
    starts from them; ALBEF's positions are resized.
    """
    torch.manual_seed(0)
    sizes = {"vocab": 40, "width": 16, "layers": 4, "fusion": 2, "heads": 2, "mlp_dim": 32}
    sizes |= {"vision": {"width": 24, "layers": 2, "heads": 2, "mlp_dim": 48}}
    sizes |= {"embed": 8, "queue": 6, "positions": 20, "patch": 16}
    model, path = Albef(**sizes, resolution=64), tmp_path / "x.pt"
    student, teacher = model.student, model.teacher
    if kind == "albef at another resolution":
        other = Albef(**sizes | {"queue": 12}, resolution=96)
        torch.save(other.state_dict(), path)
        filled = [(student.vision.position, resize_position(other.student.vision.position, 16))]
        unused = ["image_queue", "text_queue"]
    else:
        shapes = DEIT if kind == "deit" else BERT
        file = {name: torch.randn(shape) for name, shape in shapes.items()}
        torch.save({"model": file} if kind == "deit" else file, path)
    report = load_pretrained(model, path)
    if kind == "deit":
        unused = ["head.bias", "head.weight"]
        qkv = file["blocks.1.attn.qkv.weight"]
        filled = [(student.vision.layers[1].attention.to_k.weight, qkv[24:48])]
        filled += [(teacher.vision.position, resize_position(file["pos_embed"], 16))]
    elif kind == "bert":
        unused = ["bert.pooler.dense.weight", "cls.seq_relationship.weight"]
        layer = "bert.encoder.layer.{}.attention.self.{}".format
        fused, read = student.fusion_layers[1].attention, teacher.text_layers[1].attention
        filled = [(fused.to_v.bias, file[layer(3, "value.bias")])]
        filled += [(read.to_q.weight, file[layer(1, "query.weight")])]
    assert sorted(report.unused) == unused, report
    for parameter, wanted in filled:
        torch.testing.assert_close(parameter, wanted)


def pointed(toy_tree, tokenizer, monkeypatch, heat, dataset="", **settings):
    """Pointing games of a model whose heat map of a record is heat(record, (width, height))"""

    def heat_maps_of(run, texts, store, **how):
        numbers = store.numbers()
        for record in texts:
            picture = data.read_picture(store.path(numbers[record.image]))
            yield record, heat(record, picture.size)

    monkeypatch.setattr(evaluate, "heat_maps_of", heat_maps_of)
    settings |= {"data": str(toy_tree), "regions": str(toy_tree / "regions"), "vision": "patches"}
    settings |= {"resolution": 64, "patch": 16, "max_words": 24}
    run = evaluate.Run(None, tokenizer, settings, {}, evaluate.vision_of(settings))
    return evaluate.pointing_games(run, dataset)


def test_pointing_by_hand(toy_tree, tokenizer, monkeypatch):
    """A model whose heat is the truth hits everything; one that looks at a corner, nothing;
    strictly inside counts.
    """

    def points_to(place):
        def heat(record, size):
            A, (x, y) = torch.zeros(size[::-1]), place(*record.boxes[0])
            A[int(y), int(x)] = 1
            return A

        numbers = pointed(toy_tree, tokenizer, monkeypatch, heat)
        return {name.removeprefix("pointing/"): n for name, n in numbers.items()}

    middle = points_to(lambda x, y, w, h: (x + w / 2, y + h / 2))
    corner = points_to(lambda x, y, w, h: (0, 0))
    edges = [
        points_to(lambda x, y, w, h: (x, y + h / 2)),
        points_to(lambda x, y, w, h: (x + w / 2, y)),
    ]
    for name in ("flickr30k", "flickr30k/people", "refcoco+/testA", "refcoco+/testB/clean"):
        assert middle[name] == 100 and [n[name] for n in (corner, *edges)] == [0, 0, 0], name
    assert middle["refcoco+/testA/boxes"] > 80 > corner["refcoco+/testA/boxes"]
    assert 1 < middle["flickr30k/chance"] < 15


def test_what_patches_allow(toy_tree, tokenizer, monkeypatch):
    """A map of 4 x 4 patches, each with its share of the boxes, points right about half the time
    (tests/RESULTS.md).
    """

    def perfect(record, size):
        inside = torch.zeros(1, *size[::-1])
        for x, y, w, h in np.array(record.boxes).astype(int):
            inside[:, y : y + h, x : x + w] = 1
        A = torch.nn.functional.adaptive_avg_pool2d(inside, (4, 4)).flatten(1)
        return evaluate.at_size(A, size)[0]

    found = pointed(toy_tree, tokenizer, monkeypatch, perfect, "flickr30k")
    assert 35 < found["pointing/flickr30k"] < 55


def test_referit(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "refclef/images").mkdir(parents=True)
    Image.new("RGB", (100, 50)).save(tmp_path / "refclef/images/12.jpg")
    record = {"image": "images/12.jpg", "text": "tree on left", "bbox": [0, 0, 40, 50]}
    path = tmp_path / "refclef/refclef_test_10k_unique.json"
    path.write_text(json.dumps([record | {"split": "test"}]))
    texts, _ = read(data.referit_expressions, tmp_path, "test_10k")
    assert [t._replace(boxes=tuple(map(tuple, t.boxes))) for t in texts] == [
        Record("12", "tree on left", "0", boxes=((0, 0, 40, 50),))
    ]
    # the right upper quarter
    quarter = lambda model, batch: torch.eye(4)[[1]].repeat(len(batch["text"]), 1)
    monkeypatch.setattr(evaluate, "heat_map", quarter)
    model = build("albef", "toy", vocab=len(tokenizer), queue=4, resolution=32, patch=16)
    config = dict(data=str(tmp_path), regions=str(tmp_path / "regions"), vision="patches")
    config |= dict(resolution=32, patch=16, max_words=24, model="albef")
    run = evaluate.Run(model, tokenizer, config, {}, evaluate.vision_of(config))
    wanted = {"pointing/referit": 0.0, "pointing/referit/chance": 40.0}
    assert evaluate.pointing_games(run) == wanted
    with pytest.raises(DataError, match="nothing to point at\n  Wanted: flickr30k_entities"):
        evaluate.pointing_sets(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "typed, told",
    [
        ("--loss amc --recipe toy", "heat maps need texts with boxes\n  Wanted: --recipe toy-amc"),
        ("--recipe toy-albef --loss cacr", "--model albef"),
        ("--recipe toy-albef --batch-size 1", "no negative"),
        ("--recipe toy-albef --augment flop", "did you mean flip"),
        ("--recipe toy-amc --triplets boxes", "did you mean box"),
        ("--vision patches --task re", "not for --task re"),
        ("--loss amc --model uniter --vision regions", "--vision patches"),
        ("--recipe toy-patches --loss amc", "--triplets"),
        ("--recipe toy-patches --corpora crops:-1+coco", "crops:-1"),
        ("--loss amc --model uniter --pretrain mlm", "--triplets with --pretrain itm"),
        ("--recipe toy --vision patches --loss cacr+amc", "--triplets"),
        ("--recipe toy-patches --pretrain mlm+mrc", "patches have no classes"),
        ("--recipe toy-align --vision patches", "patches have no classes"),
    ],
)
def test_what_cannot_be(typed, told):
    with pytest.raises(train.UserError, match=told):
        train.parse(typed.split())


def test_cosine_schedule():
    cfg = train.Config(lr=1e-4, warmup=10, steps=110, schedule="cosine")
    rates = [train.lr_at(cfg, step) for step in (5, 10, 60, 110)]
    assert rates == pytest.approx([5e-5, 1e-4, 5.5e-5, 1e-5])
    wanted = 1e-5 + 9e-5 * (1 + math.cos(math.pi / 4)) / 2
    assert train.lr_at(cfg, 35) == pytest.approx(wanted)


# -------------------------------------------------------------------- every loss on every encoder


SMALL = "--vision patches --resolution 32"


@pytest.fixture(scope="module")
def patched(toy_tree, tmp_path_factory):
    """Barely trained single- and two-stream models of patches."""
    folder, found = tmp_path_factory.mktemp("patched"), {}
    for model, tasks in (("uniter", "mlm+itm+mrfr+wra"), ("lxmert", "mlm+itm+mrfr")):
        args = f"--recipe toy-pretrain {SMALL} --model {model} --init none --pretrain {tasks}"
        args += f" --steps 20 --warmup 5 --batch-tokens 256 --out {model}"
        done = run(folder, args, "--data", toy_tree, *QUICK)
        assert "winoground/group" in last_line(done)
        found[model] = folder / model / "last.pt"
    return found


def few_updates(*words, n=3):
    """{loss: its values} of the first updates of a run"""
    made, values = prepare(*words), defaultdict(list)
    for step in range(1, n + 1):
        how = made.cfg, made.runtime, made.model, made.optimizers, step
        for name, value in train.train_step(*how, [made.streams.train[0][step]])[0].items():
            values[name].append(value.item())
    return values


@pytest.mark.parametrize("model", ["uniter", "lxmert"])
@pytest.mark.parametrize(
    "loss", ["cacr", "cacr-probs", "iais", "iais-released", "iais-distributed", "wra"]
)
def test_alignment_losses_on_patches(toy_tree, patched, model, loss):
    args = f"--recipe toy {SMALL} --model {model} --loss {loss} --steps 8 --warmup 2"
    args += " --batch-tokens 256 --candidates 6"
    values = few_updates(args, "--init", patched[model], "--data", toy_tree, *QUICK)[loss]
    assert np.isfinite(values).all() and any(values)


def test_pictures_begin_from_the_run_on_regions(tmp_path, monkeypatch):
    """--vision patches ends in the very run that the same command on regions begins from."""
    monkeypatch.chdir(tmp_path)
    _, words = train.first_run(train.parse(["--loss", "cacr"]))
    eyes = ["--vision", "patches", "--patch", "8"]
    for typed in (["--loss", "cacr", *eyes], ["--task", "vqa", *eyes], ["--task", "ve", *eyes]):
        _, seen = train.first_run(train.parse(typed))
        assert (seen.recipe, seen.vision, seen.patch) == ("toy-patches", "patches", 8)
        _, first = train.first_run(seen)
        assert first == words and (first.recipe, first.vision) == ("toy-short", "regions")


@pytest.mark.parametrize("task", ["vqa", "ve", "nlvr2"])
def test_downstream_tasks_on_patches(toy_tree, patched, tmp_path, task):
    args = f"--task {task} {SMALL} --steps 4 --warmup 1 --batch-tokens 512 --out x"
    done = run(tmp_path, args, "--init", patched["uniter"], "--data", toy_tree, *QUICK)
    args = ["--task", task, "--ckpt", str(tmp_path / "x/last.pt"), "--data", str(toy_tree)]
    numbers = evaluate.run_benchmark(evaluate.make_parser().parse_args(args))
    name = f"{task}/accuracy"
    assert numbers[name] == pytest.approx(last_line(done)[name], abs=0.01)


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
    # logits and probabilities of one layer
    both, layer = (
        model(**batch, heads=("match",), maps=(0,), need_gradcam=True),
        model(**batch, maps=(0,)),
    )
    assert all(map(torch.equal, both.maps[0], layer.maps[0])) and torch.equal(both.gradcam[0], P)


def test_boxes_of_matched_texts(toy_tree):
    """Which rows of a matching batch have a region, and what it covers: a text's first box."""
    texts = [
        t._replace(boxes=(*t.boxes, (0.0, 0.0, 1.0, 1.0)))
        for t in read(data.vg_triplets, toy_tree, "train", min_area=0.01)[0]
    ]
    tokenizer = WordPiece(toy_tree / "bert-base-cased/vocab.txt", lower=False)
    pairs = make_index(texts, PatchStore(toy_tree, "vg", 32, 16), tokenizer)
    batch, by_name = batches("itm", pairs, batch_tokens=700, seed=5)[3], {t.id: t for t in texts}
    assert batch["boxed"].tolist() == batch["match"].nonzero()[:, 0].tolist()
    assert 5 < len(batch["boxed"]) < len(batch["match"])
    assert train.count_of(batch, "amc") == len(batch["boxed"])
    for row, region in zip(batch["boxed"].tolist(), batch["region_target"].numpy()):
        text = by_name[batch["names"][row].rsplit(" with image ", 1)[0]]
        x1, y1, x2, y2 = (np.array(text.boxes[0]) * 32).round().astype(int)
        assert region[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)].all()
        assert region.sum() == max(y2 - y1, 1) * max(x2 - x1, 1)
    assert "boxed" not in batches("mlm", pairs, batch_tokens=700, seed=5)[0]


AMC_STEPS = "--resolution 32 --pretrain itm --steps 8 --warmup 2 --batch-tokens 256"


@pytest.mark.parametrize("loss", ["amc-mean", "amc-max", "amc-cosine", "amc+cacr"])
@pytest.mark.parametrize("model", ["uniter", "lxmert"])
def test_amc_on_patches(toy_tree, patched, model, loss):
    args = f"--loss {loss} --model {model} {AMC_STEPS}"
    found = few_updates(args, "--init", patched[model], "--data", toy_tree, *QUICK)
    for name in loss.split("+"):
        assert np.isfinite(found[name]).all() and any(found[name]), name


@pytest.mark.parametrize("model", ["uniter", "lxmert"])
def test_a_run_of_amc_on_patches(toy_tree, patched, tmp_path, model):
    args = f"--loss amc --model {model} {AMC_STEPS} --log-every 1 --eval-every 8 --out x"
    done = run(tmp_path, args, "--init", patched[model], "--data", toy_tree, *QUICK)
    values = log_of(tmp_path / "x", "amc")["amc"]
    assert len(values) == 8 and np.isfinite(values).all() and any(values)
    found, name = last_line(done), "pointing/flickr30k"
    assert 0 <= found[name] <= 100 and "pointing/refcoco+/testA" in found
    assert list((tmp_path / "x/figures").glob("heat_*.png"))
    args = "--task pointing --dataset flickr30k --ckpt".split()
    args += [str(tmp_path / "x/last.pt"), "--data", str(toy_tree)]
    again = evaluate.run_benchmark(evaluate.make_parser().parse_args(args))
    assert again[name] == pytest.approx(found[name], abs=0.01)


@pytest.mark.parametrize(
    "file, item, spoil",
    [
        ("region_descriptions", 4, lambda d: d["regions"][0].update(phrase=None)),
        ("region_descriptions", 3, lambda d: d["regions"][0].update(x="left")),
        ("region_descriptions", 6, lambda d: d.update(regions=None)),
        ("image_data", 5, lambda d: d.update(width=None)),
        ("attributes", 4, lambda d: d["attributes"][0].update(x=None)),
    ],
)
def test_visual_genome_with_something_else_in_a_field(toy_tree, tmp_path, file, item, spoil):
    """The error names the file and the item, and shows it."""
    shutil.copytree(toy_tree / "vg", tmp_path / "vg", ignore=shutil.ignore_patterns("VG_100K"))
    shutil.copytree(toy_tree / "coco", tmp_path / "coco", ignore=shutil.ignore_patterns("*2014"))
    path = tmp_path / f"vg/{file}.json"
    items = json.loads(path.read_text())
    spoil(items[item])
    path.write_text(json.dumps(items))
    reader = functools.partial(data.vg_triplets, min_area=0.01)
    with pytest.raises(DataError, match="Wanted: the official format") as error:
        list(data.records(reader, tmp_path, "train", Counter()))
    assert f"{file}.json, item {item}" in str(error.value), error.value
    assert str(items[item])[:40] in str(error.value)


def test_pictures_are_listed_in_order_of_their_names(tmp_path):
    """In folders inside others too."""
    for path in ("b/2.jpg", "b/10.PNG", "a/x/4.jpg", "a/1.jpeg", "a/note.txt"):
        place = tmp_path / "flickr/images" / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    store = PatchStore(tmp_path, "flickr", 32, 8)
    assert [store.image_id(i) for i in range(len(store))] == ["1", "10", "2", "4"]
    names = [str(store.path(i).relative_to(tmp_path / "flickr/images")) for i in range(4)]
    assert names == ["a/1.jpeg", "b/10.PNG", "b/2.jpg", "a/x/4.jpg"]
    # a file more, and the list is made again
    (tmp_path / "flickr/images/a/x/3.jpg").touch()
    assert len(PatchStore(tmp_path, "flickr", 32, 8)) == 5
