"""The detector's parts against slow loops; extraction as a user runs it: killed, restarted,
shared out, with bad pictures; photos to training.
"""

import contextlib
import ctypes
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import model as parts
import toy
from conftest import QUICK, ROOT, ids_of, last_line, run
from data import DataError, RegionStore
from model import CheckpointError, Detector, load_detector

SMALL = dict(
    stem=8,
    res2=16,
    bottleneck=4,
    blocks=(1, 1, 1, 1),
    hidden=16,
    anchors=(24, 48, 96),
    ratios=(0.5, 1.0, 2.0),
    classes=7,
    attributes=6,
    embedding=8,
    attr_hidden=16,
)


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("detector") / "pytorch_model.bin"
    torch.save(Detector(**SMALL).state_dict(), path)
    return path


def arguments(images, detector, out, *more):
    return [
        "extract",
        "--images",
        str(images),
        "--detector",
        str(detector),
        "--out",
        str(out),
        "--regions",
        "4-12",
        "--shorter",
        "96",
        "--longer",
        "160",
        "--shard",
        "16",
        *map(str, more),
    ]


def extract(images, detector, out, *more, fails=False):
    """evaluate.py extract in this process: what it printed, or the error it ended with."""
    said, threads = io.StringIO(), torch.get_num_threads()
    # as the processes of other tests, to the same bytes
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
            evaluate.main(arguments(images, detector, out, *more))
        assert not fails
    except SystemExit as stop:
        assert fails, stop.code
        return str(stop.code)
    finally:
        torch.set_num_threads(threads)
    return said.getvalue()


# --------------------------------------------------------------------------------------- in loops


def slow_nms(boxes, scores, overlap):
    order, keep = sorted(range(len(boxes)), key=lambda i: (-scores[i], i)), []
    for i in order:

        def iou(j):
            (a, b, c, d), (e, f, g, h) = boxes[i], boxes[j]
            inter = max(0.0, min(c, g) - max(a, e)) * max(0.0, min(d, h) - max(b, f))
            union = (c - a) * (d - b) + (g - e) * (h - f) - inter
            # a float32 against the threshold itself
            return float(np.float32(inter) / np.float32(union)) if union else math.nan

        if not any(iou(j) > overlap for j in keep):
            keep.append(i)
    return keep


@pytest.mark.parametrize("kind", ["random", "tied", "chains", "degenerate", "empty"])
def test_nms_is_the_loop(kind):
    g = torch.Generator().manual_seed(4)
    n = {"empty": 0, "chains": 60}.get(kind, 150)
    corner, wh = (
        torch.randint(0, 40, (n, 2), generator=g).double(),
        torch.randint(1, 30, (n, 2), generator=g).double(),
    )
    scores = torch.rand(n, generator=g)
    if kind == "tied":
        scores = torch.randint(0, 4, (n,), generator=g).float()
    if kind == "degenerate":
        wh[::3] = 0
    if kind == "chains":  # each overlaps the next: every second one stays
        corner, wh, scores = (
            torch.stack([torch.arange(n) * 4.0, torch.zeros(n)], 1).double(),
            torch.full((n, 2), 10.0, dtype=torch.float64),
            torch.linspace(1, 0, n),
        )
    boxes = torch.cat([corner, corner + wh], 1)
    for overlap in (0.25, 0.4, 0.7):
        assert parts.nms(boxes.float(), scores, overlap).tolist() == slow_nms(
            boxes.tolist(), scores.tolist(), overlap
        )


def slow_roi_pool(x, rois, size, scale):
    B, C, H, W = x.shape
    away = lambda v: math.copysign(math.floor(abs(v) + 0.5), v)
    out = torch.zeros(len(rois), C, size, size)
    f = np.float32
    for r, (b, *box) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (away(f(v) * f(scale)) for v in box)
        w, h = f(max(x2 - x1 + 1, 1)) / f(size), f(max(y2 - y1 + 1, 1)) / f(size)
        for i in range(size):
            for j in range(size):
                top, bottom = (
                    int(min(max(v + y1, 0), H)) for v in (np.floor(f(i) * h), np.ceil(f(i + 1) * h))
                )
                left, right = (
                    int(min(max(v + x1, 0), W)) for v in (np.floor(f(j) * w), np.ceil(f(j + 1) * w))
                )
                if bottom > top and right > left:
                    out[r, :, i, j] = x[int(b), :, top:bottom, left:right].amax((1, 2))
    return out


@pytest.mark.parametrize("kind", ["random", "outside", "one pixel", "none"])
def test_roi_pool_is_the_loop(kind):
    g = torch.Generator().manual_seed(5)
    x, n = torch.randn(2, 3, 23, 31, generator=g), 0 if kind == "none" else 25
    corner = torch.rand(n, 2, generator=g) * torch.tensor([480.0, 350.0]) - (
        150 if kind == "outside" else 0
    )
    far = corner + torch.rand(n, 2, generator=g) * (2 if kind == "one pixel" else 500)
    rois = torch.cat([torch.randint(0, 2, (n, 1), generator=g).float(), corner, far], 1)
    for size in (7, 14):
        assert torch.equal(
            parts.roi_pool(x, rois, size, 1 / 16), slow_roi_pool(x, rois, size, 1 / 16)
        )


def test_detector_stays_as_it_was_trained():
    torch.manual_seed(0)
    model = Detector(**SMALL).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = model(torch.randn(1, 3, 96, 128) * 50, torch.tensor([[96, 128]]), regions=(4, 12))[0]
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert 4 <= len(found.boxes) <= 12 and torch.allclose(
        found.cls_prob.sum(1), torch.ones(len(found.boxes)), atol=1e-5
    )
    assert (
        torch.equal(found.cls_prob[:, 1:].argmax(1), found.cls_id)
        and (found.cls_conf[1:] <= found.cls_conf[:-1]).all()
        and (found.features >= 0).all()
    )


@pytest.mark.parametrize(
    "spoil, told",
    [
        (
            lambda d: {"bert.embeddings.word_embeddings.weight": torch.zeros(3, 3)},
            "is not of this detector",
        ),
        (
            lambda d: {k: v for k, v in d.items() if "attr_score" not in k},
            "no roi_heads.box_predictor.attr_score.weight",
        ),
        (
            lambda d: d | {"roi_heads.box_predictor.bbox_pred.weight": torch.zeros(8, 128)},
            "1 tensors of another size",
        ),
        (
            lambda d: {
                k: v for k, v in d.items() if k != "backbone.res3.0.conv2.norm.running_mean"
            },
            "1 tensors are missing",
        ),
    ],
)
def test_weights_of_something_else(tmp_path, weights_file, spoil, told):
    torch.save(spoil(torch.load(weights_file)), tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=told):
        load_detector(tmp_path / "x.bin")


def test_counters_of_any_shape_load(tmp_path, weights_file):
    state = {
        k: v.view(1) if k.endswith("num_batches_tracked") else v
        for k, v in torch.load(weights_file).items()
    }
    torch.save({"module." + k: v for k, v in state.items()}, tmp_path / "x.bin")
    assert load_detector(tmp_path / "x.bin").backbone["stem"]["conv1"].out_channels == 8
    report = parts.load_pretrained(Detector(**SMALL), tmp_path / "x.bin")
    assert not report.missing and not report.unused


# ------------------------------------------------------------------------------------- extraction


@pytest.fixture(scope="module")
def photos(toy_tree, tmp_path_factory):
    """50 pictures: four shards."""
    folder = tmp_path_factory.mktemp("photos")
    for path in sorted((toy_tree / "coco/train2014").iterdir())[:50]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def extracted(photos, weights_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("extracted") / "coco"
    return out, extract(photos, weights_file, out)


def files(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def test_extraction_makes_a_store(extracted, photos, weights_file):
    out, done = extracted
    store = RegionStore(out)
    assert (
        len(store) == 50
        and store.classes == 8
        and "50 images" in done
        and not Path(f"{out}.parts").exists()
        and (4 <= np.diff(store.offsets)).all()
        and (np.diff(store.offsets) <= 12).all()
    )
    path = sorted(photos.iterdir())[7]
    pixels = torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy())
    x = parts.resize_for_detector(pixels, 96, 160)
    seen = load_detector(weights_file)(
        x[None],
        torch.tensor([x.shape[1:]]),
        torch.tensor([[180 / x.shape[1], 240 / x.shape[2]]]),
        (4, 12),
    )[0]
    i = np.array([store.finder()([path.stem])[0]])
    np.testing.assert_allclose(store.read(i, "boxes")[0], seen.boxes.clamp(min=0), atol=2e-3)
    np.testing.assert_allclose(store.read(i)[0], seen.features, atol=2e-3, rtol=1e-3)
    assert (
        store.wh[i[0]].tolist() == [240, 180]
        and (store.read(i, "cls_id")[0] == seen.cls_id.numpy()).all()
    )


@pytest.mark.slow
def test_killed_anywhere_the_store_is_the_same(extracted, photos, weights_file, tmp_path):
    out, rng = (
        tmp_path / "cut",
        np.random.default_rng(int(os.environ.get("NANOALIGN_KILL_SEED", 0))),
    )
    for kill in range(int(os.environ.get("NANOALIGN_KILLS", 3))):
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "evaluate.py"), *arguments(photos, weights_file, out)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        began, wanted = time.time(), rng.integers(0, 4)
        while (
            process.poll() is None
            and len(list(Path(f"{out}.parts").glob("*.npz"))) < wanted
            and time.time() - began < 60
        ):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
    if not out.exists():
        extract(photos, weights_file, out)
    assert files(out) == files(extracted[0])


@pytest.mark.slow
def test_several_processes_make_the_same_store(extracted, photos, weights_file, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(ROOT / "evaluate.py"),
            *arguments(photos, weights_file, tmp_path / "two"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "two") == files(extracted[0])


def test_batches_of_one_size_see_the_same(photos, weights_file, extracted, tmp_path):
    extract(photos, weights_file, tmp_path / "four", "--batch", 4)
    one, four = RegionStore(extracted[0]), RegionStore(tmp_path / "four")
    assert (
        ids_of(one) == ids_of(four)
        and (np.diff(one.offsets) == np.diff(four.offsets)).mean() > 0.95
    )
    np.testing.assert_allclose(one.read(np.array([5]))[0], four.read(np.array([5]))[0], atol=2e-2)


def test_bad_pictures_are_left_out_and_listed(toy_tree, weights_file, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    good = Image.open(next((toy_tree / "coco/val2014").iterdir())).convert("RGB")
    good.save(folder / "a.jpg")
    (
        good.convert("L").save(folder / "grey.png"),
        good.convert("CMYK").save(folder / "cmyk.jpg"),
        good.convert("P").save(folder / "palette.png"),
    )
    Image.fromarray(np.full((90, 120), 30_000, np.uint16)).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    good.save(folder / "turned.jpg", exif=exif)
    (
        Image.new("RGB", (1, 1)).save(folder / "pixel.png"),
        Image.new("RGB", (4000, 9)).save(folder / "fc2.png"),
        Image.new("1", (40_000, 5_000)).save(folder / "huge.png"),
    )
    (
        (folder / "cut.jpg").write_bytes((folder / "a.jpg").read_bytes()[:900]),
        (folder / "empty.jpg").write_bytes(b""),
        (folder / "page.jpg").write_bytes(b"<html>"),
    )
    done = extract(folder, weights_file, tmp_path / "out")
    store, skipped = (
        RegionStore(tmp_path / "out"),
        (tmp_path / "out/skipped.txt").read_text().splitlines(),
    )
    assert (
        set(ids_of(store)) == {"a", "grey", "cmyk", "palette", "deep", "turned", "pixel"}
        and "5 pictures left out" in done
    )
    assert store.wh[store.finder()(["turned"])[0]].tolist() == [180, 240] and store.wh[
        store.finder()(["a"])[0]
    ].tolist() == [240, 180]
    for name in ("fc2", "huge", "cut", "empty", "page"):
        assert sum(name in line for line in skipped) == 1, skipped


@pytest.mark.parametrize(
    "kind",
    [
        "there",
        "no folder",
        "no pictures",
        "nothing readable",
        "twice",
        "other settings",
        "weights",
        "regions",
    ],
)
def test_what_extraction_refuses(kind, photos, weights_file, tmp_path):
    out, images, detector, more = tmp_path / "out", tmp_path / "in", weights_file, []
    images.mkdir()
    Image.new("RGB", (60, 50)).save(images / "a.png")
    if kind == "there":
        out.mkdir()
    elif kind == "no folder":
        images = tmp_path / "nowhere"
    elif kind == "no pictures":
        (images / "a.png").unlink()
    elif kind == "nothing readable":
        (images / "a.png").write_bytes(b"x")
    elif kind == "twice":
        (images / "b").mkdir(), Image.new("RGB", (60, 50)).save(images / "b/a.png")
    elif kind == "other settings":
        Path(f"{out}.parts").mkdir(), (tmp_path / "out.parts/settings.json").write_text("{}")
    elif kind == "weights":
        detector = tmp_path / "w.bin"
        torch.save({"x": torch.zeros(1)}, detector)
    else:
        more = ["--regions", "many"]
    done = extract(images, detector, out, *more, fails=True)
    told = {
        "there": "exists already",
        "no folder": "Check the path",
        "no pictures": "holds no .jpg or .png",
        "nothing readable": "none of the pictures could be read",
        "twice": "stand for several pictures",
        "other settings": "begun with other settings",
        "weights": "is not of this detector",
        "regions": "Wanted: 36, or 10-100",
    }[kind]
    assert told in done and (kind == "there" or not out.exists())


def test_a_full_disk_keeps_the_finished_shards(photos, weights_file, extracted, tmp_path):
    """A file-size limit stands for the full disk."""
    out = tmp_path / "out"
    code = (
        "import resource, evaluate; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)); "
        f"evaluate.main({arguments(photos, weights_file, out)!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert (
        done.returncode == 1
        and "could not be written" in done.stderr
        and not out.exists()
        and not list(Path(f"{out}.parts").glob("*.tmp"))
    ), done.stderr
    extract(photos, weights_file, out)
    assert files(out) == files(extracted[0])


@pytest.mark.slow
def test_memory_does_not_grow(toy_tree, weights_file, tmp_path):
    """What a process has allocated after each shard: no more after the last than half way.
    glibc's own count, since what the process holds of the system (RSS) also tells of holes, and
    jumps by tens of MiB from machine to machine."""
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("needs glibc 2.33 or later, which counts what is allocated")
    code = (
        "import ctypes, sys, evaluate; saved, used = evaluate.save_shard, []\n"
        "class Info(ctypes.Structure): _fields_ = [(n, ctypes.c_size_t) for n in 'arena ordblks "
        "smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost'.split()]\n"
        "mallinfo2 = ctypes.CDLL(None).mallinfo2; mallinfo2.restype = Info\n"
        "def save(*args): saved(*args); info = mallinfo2(); used.append((info.uordblks + "
        "info.hblkhd) / 2 ** 20)\n"
        "evaluate.save_shard = save; evaluate.main(sys.argv[1:]); print(used[len(used) // 2], "
        "used[-1])"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            *arguments(toy_tree / "coco/train2014", weights_file, tmp_path / "out", "--shard", 8),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    half, whole = map(float, done.stdout.split()[-2:])
    assert whole < half + 4, (half, whole)


# ------------------------------------------------------------- from photos to training, one photo


def test_photos_to_training_to_evaluation(weights_file, tmp_path):
    """Nothing but pictures, captions and a detector."""
    tree, pictures = tmp_path / "tree", {"coco": "coco", "winoground": "winoground/images"}
    toy.make_toy(tree, scenes=100)
    shutil.rmtree(tree / "regions")
    for name, folder in pictures.items():
        extract(tree / folder, weights_file, tree / "regions" / name)
    done = run(
        tmp_path,
        "--recipe toy-pretrain",
        "--data",
        tree,
        "--pretrain mlm+itm+mrckl --steps 8 --warmup 2 --batch-tokens 512 --out x",
        *QUICK,
    )
    assert "winoground/group" in last_line(done)
    photo = next((tree / "coco/val2014").iterdir())
    look = lambda *more: evaluate.run_benchmark(
        evaluate.make_parser().parse_args(
            [
                "--image",
                str(photo),
                "--text",
                "a red circle on the left",
                "--ckpt",
                str(tmp_path / "x/last.pt"),
                "--data",
                str(tree),
                "--out",
                str(tmp_path / "figures"),
                *more,
            ]
        )
    )
    seen = look("--detector", str(weights_file), "--sides", "96", "160")
    assert (
        0 < seen["match"] < 1
        and list(seen["words"])[:3] == ["0 a", "1 red", "2 circle"]
        and Image.open(seen["figure"]).width > 200
    )
    assert all(
        0 <= x1 <= x2 <= 240 and 0 <= y1 <= y2 <= 180 for x1, y1, x2, y2 in seen["words"].values()
    )
    with pytest.raises(CheckpointError, match="--detector"):
        look()


@pytest.mark.parametrize("recipe", ["toy-pretrain", "toy-albef"])
def test_one_photo_without_a_detector(toy_tree, tmp_path, recipe):
    args = (
        ["--vision", "patches", "--resolution", 32] if recipe == "toy-pretrain" else ["--queue", 8]
    )
    run(
        tmp_path,
        "--recipe",
        recipe,
        "--data",
        toy_tree,
        "--steps 3 --warmup 1",
        "--batch-tokens",
        256 if recipe == "toy-pretrain" else 4,
        *args,
        "--out x",
        *QUICK,
    )
    photo = next((toy_tree / "coco/val2014").iterdir())
    how = [
        "--image",
        str(photo),
        "--ckpt",
        str(tmp_path / "x/last.pt"),
        "--data",
        str(toy_tree),
        "--out",
        str(tmp_path / "figures"),
    ]
    seen = evaluate.run_benchmark(
        evaluate.make_parser().parse_args([*how, "--text", "a red circle"])
    )
    assert 0 < seen["match"] < 1 and Path(seen["figure"]).exists() and json.dumps(seen)
    with pytest.raises(DataError, match="without --text"):
        evaluate.run_benchmark(evaluate.make_parser().parse_args(how))
    with pytest.raises(DataError, match="neither --task nor --image"):
        evaluate.run_benchmark(evaluate.make_parser().parse_args(how[2:]))
