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

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import model as parts
import toy
from conftest import QUICK, ROOT, last_line, run
from data import DataError, RegionStore
from model import CheckpointError, Detector, load_detector

SMALL = dict(stem=8, res2=16, bottleneck=4, blocks=(1, 1, 1, 1), hidden=16, anchors=(24, 48, 96))
SMALL |= dict(classes=7, attributes=6, embedding=8, attr_hidden=16)


@pytest.fixture(scope="module", autouse=True)
def small_detector():
    """evaluate.py's detector is small, as the weights are."""
    patch = pytest.MonkeyPatch()
    patch.setattr(Detector, "SIZES", Detector.SIZES | SMALL)
    yield
    patch.undo()


# what a process of its own needs for the same
SHRINK = f"import model; model.Detector.SIZES |= {SMALL!r}; import evaluate; "


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory, small_detector):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("detector") / "pytorch_model.bin"
    torch.save(Detector().state_dict(), path)
    return path


def arguments(images, detector, out, regions=(4, 12)):
    sides = "--shorter 96 --longer 160".split()
    paths = ["--images", str(images), "--detector", str(detector), "--out", str(out)]
    return ["extract", *paths, *sides, "--regions", *map(str, regions)]


def extract(images, detector, out, fails=False, **how):
    """evaluate.py extract in this process: what is on stderr, or its error."""
    stderr, threads = io.StringIO(), torch.get_num_threads()
    # as the processes of other tests, to the same bytes
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stderr(stderr):
            evaluate.main(arguments(images, detector, out, **how))
        assert not fails
    except SystemExit as stop:
        assert fails, stop.code
        return str(stop.code) + stderr.getvalue()
    finally:
        torch.set_num_threads(threads)
    return stderr.getvalue()


def in_process(code, *argv, start=(sys.executable,), **how):
    """Such code in a process of its own, of which evaluate.py's detector is small."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*start, *(["-c", SHRINK + code] if start[-1] == sys.executable else [code]), *argv]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **how
    )


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


def test_as_many_regions_as_are_confident():
    """UNITER's rule, at least and at most so many: of ten boxes far apart six are above 0.2."""
    x = torch.arange(10.0) * 20
    boxes = torch.stack([x, x, x + 9, x + 9], dim=1)[:, None].expand(-1, 3, -1)
    score = torch.tensor([0.9, 0.1, 0.8, 0.15, 0.7, 0.05, 0.6, 0.12, 0.5, 0.4])
    probs = torch.stack([score, *[(1 - score) / 30] * 2, 0.9 * (1 - score)], dim=1)
    for regions, n in (((1, 10), 6), ((1, 4), 4), ((8, 10), 8)):
        keep, kind = parts.select_boxes(boxes, probs, regions, confidence=0.2)
        assert keep.tolist() == score.argsort(descending=True)[:n].tolist() and not kind.any()


def slow_roi_pool(x, boxes, size):
    C, H, W = x.shape
    out = torch.zeros(len(boxes), C, size, size)
    for r, box in enumerate(boxes.tolist()):
        x1, y1, x2, y2 = (math.floor(v + 0.5) for v in box)
        w, h = max(x2 - x1 + 1, 1), max(y2 - y1 + 1, 1)
        for i in range(size):
            for j in range(size):
                # of whole numbers: floor and ceiling without any rounding
                top, bottom = (min(v + y1, H) for v in (i * h // size, -(-(i + 1) * h // size)))
                left, right = (min(v + x1, W) for v in (j * w // size, -(-(j + 1) * w // size)))
                if bottom > top and right > left:
                    out[r, :, i, j] = x[:, top:bottom, left:right].amax((1, 2))
    return out


@pytest.mark.parametrize("kind", ["random", "one pixel", "none"])
def test_roi_pool_is_the_loop(kind):
    g = torch.Generator().manual_seed(5)
    x, n = torch.randn(3, 23, 31, generator=g), 0 if kind == "none" else 25
    corner = torch.rand(n, 2, generator=g) * torch.tensor([31.0, 23.0])
    far = corner + torch.rand(n, 2, generator=g) * (0.2 if kind == "one pixel" else 31)
    # as proposals are clipped: they may end at the picture's edge, one cell behind the map
    boxes = torch.cat([corner, far], 1).minimum(torch.tensor([31.0, 23.0, 31.0, 23.0]))
    for size in (7, 14):
        assert torch.equal(parts.roi_pool(x, boxes, size), slow_roi_pool(x, boxes, size))


def test_detector_stays_as_it_was_trained():
    torch.manual_seed(0)
    model = Detector().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    seen = model(torch.randn(3, 96, 128) * 50, regions=(4, 12))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert 4 <= len(seen["boxes"]) <= 12 and (seen["features"] >= 0).all()
    torch.testing.assert_close(seen["cls_prob"].sum(1), torch.ones(len(seen["boxes"])))
    assert torch.equal(seen["cls_prob"][:, 1:].argmax(1), seen["cls_id"])
    assert (seen["cls_conf"][1:] <= seen["cls_conf"][:-1]).all()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda d: {"bert.embeddings.word_embeddings.weight": torch.zeros(3, 3)}, "does not fit"),
        (
            lambda d: {k: v for k, v in d.items() if "attr_score" not in k},
            "not all of this detector: no roi_heads.box_predictor.attr_score.bias",
        ),
        (
            lambda d: d | {"roi_heads.box_predictor.bbox_pred.weight": torch.zeros(8, 128)},
            "1 tensors of another size",
        ),
        (
            lambda d: {k: v for k, v in d.items() if "res3.0.conv2.norm.running_mean" not in k},
            "no backbone.res3.0.conv2.norm.running_mean",
        ),
    ],
)
def test_weights_of_something_else(tmp_path, weights_file, spoil, message):
    torch.save(spoil(torch.load(weights_file)), tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=message):
        load_detector(tmp_path / "x.bin")


def test_counters_of_any_shape_load(tmp_path, weights_file):
    counter = lambda name: name.endswith("num_batches_tracked")
    state = {k: v.view(1) if counter(k) else v for k, v in torch.load(weights_file).items()}
    torch.save({"module." + k: v for k, v in state.items()}, tmp_path / "x.bin")
    assert load_detector(tmp_path / "x.bin").backbone["stem"]["conv1"].out_channels == 8
    report = parts.load_pretrained(Detector(), tmp_path / "x.bin")
    assert not report.missing and not report.unused


# ------------------------------------------------------------------------------------- extraction


PHOTOS = 20


@pytest.fixture(scope="module")
def photos(toy_tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for path in sorted((toy_tree / "coco/train2014").iterdir())[:PHOTOS]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def extracted(photos, weights_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("extracted") / "coco"
    assert "left out" not in extract(photos, weights_file, out)
    return out


def files(folder):
    """{picture: its arrays' bytes}; an npz holds the time of writing too"""
    assert not list(folder.glob("*.tmp"))
    return {p.stem: {k: v.tobytes() for k, v in np.load(p).items()} for p in folder.glob("*.npz")}


def test_extraction_makes_a_store(extracted, photos, weights_file, tmp_path, capsys):
    evaluate.main(["pack", str(extracted), "--out", str(tmp_path / "coco")])
    assert f"{PHOTOS} images" in capsys.readouterr().out
    store = RegionStore(tmp_path / "coco")
    regions = np.diff(store.offsets)
    assert len(store) == PHOTOS and store.classes == 8 and 4 <= regions.min() <= regions.max() <= 12
    path = sorted(photos.iterdir())[7]
    pixels = torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy())
    picture = parts.resize_for_detector(pixels, 96, 160)
    seen = load_detector(weights_file)(picture, (4, 12), confidence=0.2)
    back = torch.tensor([240 / picture.shape[2], 180 / picture.shape[1]] * 2)
    i = np.array([store.numbers()[path.stem]])
    read = lambda column="features": store.read(i, column)[0]
    np.testing.assert_allclose(read("boxes"), seen["boxes"] * back, atol=2e-3)
    np.testing.assert_allclose(read(), seen["features"], atol=2e-3, rtol=1e-3)
    for name in ("cls_conf", "attr_conf", "cls_prob"):
        np.testing.assert_allclose(read(name), seen[name], atol=2e-3)
    for name in ("cls_id", "attr_id"):
        assert (read(name) == seen[name].numpy()).all()
    assert store.wh[i[0]].tolist() == [240, 180]
    with pytest.raises(SystemExit, match="exists already"):
        evaluate.main(["pack", str(extracted), "--out", str(tmp_path / "coco")])


@pytest.mark.slow
def test_killed_anywhere_the_files_are_the_same(extracted, photos, weights_file, tmp_path):
    out, rng = (
        tmp_path / "cut",
        np.random.default_rng(int(os.environ.get("NANOALIGN_KILL_SEED", 0))),
    )
    for kill in range(int(os.environ.get("NANOALIGN_KILLS", 3))):
        command = arguments(photos, weights_file, out)
        process = in_process(f"evaluate.main({command!r})")
        began, wanted = time.time(), rng.integers(0, PHOTOS)
        while process.poll() is None and len(list(out.glob("*.npz"))) < wanted:
            assert time.time() - began < 60
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    extract(photos, weights_file, out)
    for beside in out.glob("*.tmp"):
        beside.unlink()
    assert files(out) == files(extracted)


@pytest.mark.slow
def test_several_processes_make_the_same_files(extracted, photos, weights_file, tmp_path):
    command = arguments(photos, weights_file, tmp_path / "two")
    (tmp_path / "script.py").write_text(f"{SHRINK}evaluate.main({command!r})")
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    process = in_process(str(tmp_path / "script.py"), start=(sys.executable, *torchrun))
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    assert files(tmp_path / "two") == files(extracted)


def test_bad_pictures_are_left_out_and_listed(toy_tree, weights_file, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    good = Image.open(next((toy_tree / "coco/val2014").iterdir())).convert("RGB")
    good.save(folder / "a.jpg")
    good.convert("L").save(folder / "grey.png")
    good.convert("CMYK").save(folder / "cmyk.jpg")
    good.convert("P").save(folder / "palette.png")
    Image.fromarray(np.full((90, 120), 30_000, np.uint16)).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    good.save(folder / "turned.jpg", exif=exif)
    Image.new("RGB", (1, 1)).save(folder / "pixel.png")
    Image.new("RGB", (4000, 9)).save(folder / "narrow.png")
    Image.new("1", (40_000, 5_000)).save(folder / "huge.png")
    (folder / "cut.jpg").write_bytes((folder / "a.jpg").read_bytes()[:900])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "page.jpg").write_bytes(b"<html>")
    lines = extract(folder, weights_file, out).splitlines()
    wh = {path.stem: np.load(path)["wh"].tolist() for path in out.iterdir()}
    assert set(wh) == {"a", "grey", "cmyk", "palette", "deep", "turned", "pixel"}
    assert wh["turned"] == [180, 240] and wh["a"] == [240, 180]
    for name in ("narrow", "huge", "cut", "empty", "page"):
        assert sum("left out" in line and f"/{name}." in line for line in lines) == 1, lines


@pytest.mark.parametrize(
    "kind, message",
    [
        ("no folder", "no pictures in"),
        ("no pictures", "no pictures in"),
        ("twice", "have one name"),
        ("weights", "does not fit"),
        ("no weights", "No such file"),
        ("regions", "invalid int value: 'many'"),
    ],
)
def test_what_extraction_refuses(kind, message, weights_file, tmp_path):
    images, detector, how = tmp_path / "in", weights_file, {}
    (images / "b").mkdir(parents=True)
    Image.new("RGB", (60, 50)).save(images / "a.png")
    if kind == "no folder":
        images = tmp_path / "nowhere"
    elif kind == "no pictures":
        (images / "a.png").unlink()
    elif kind == "twice":
        Image.new("RGB", (60, 50)).save(images / "b/a.png")
    elif kind == "weights":
        detector = tmp_path / "w.bin"
        torch.save({"x": torch.zeros(1)}, detector)
    elif kind == "no weights":
        detector = tmp_path / "nowhere.bin"
    else:
        how = {"regions": ("many", 3)}
    assert message in extract(images, detector, tmp_path / "out", fails=True, **how)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_full_disk_keeps_the_finished_files(photos, weights_file, extracted, tmp_path):
    """A file-size limit stands for the full disk."""
    out, sizes = tmp_path / "out", sorted(path.stat().st_size for path in extracted.iterdir())
    limit = sizes[len(sizes) // 2] - 1
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
    process = in_process(code + f"evaluate.main({arguments(photos, weights_file, out)!r})")
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 1 and "File too large" in stderr and "Traceback" not in stderr
    extract(photos, weights_file, out)
    assert files(out) == files(extracted)


@pytest.mark.slow
def test_memory_does_not_grow(toy_tree, weights_file, tmp_path):
    """What a process has allocated after each picture: no more after the last than half way.
    glibc's own count, since what the process holds of the system (RSS) also tells of holes, and
    jumps by tens of MiB from machine to machine."""
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("needs glibc 2.33 or later, which counts what is allocated")
    code = (
        "import ctypes, sys; write, used = evaluate.write_atomic, []\n"
        "class Info(ctypes.Structure): _fields_ = [(n, ctypes.c_size_t) for n in 'arena ordblks "
        "smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost'.split()]\n"
        "mallinfo2 = ctypes.CDLL(None).mallinfo2; mallinfo2.restype = Info\n"
        "def save(*args): write(*args); info = mallinfo2(); used.append((info.uordblks + "
        "info.hblkhd) / 2 ** 20)\n"
        "evaluate.write_atomic = save; evaluate.main(sys.argv[1:]); print(used[len(used) // 2], "
        "used[-1])"
    )
    command = arguments(toy_tree / "coco/train2014", weights_file, tmp_path / "out")
    process = in_process(code, *command)
    stdout, stderr = process.communicate(timeout=500)
    assert process.returncode == 0, stderr
    half, whole = map(float, stdout.split()[-2:])
    assert whole < half + 4, (half, whole)


# ------------------------------------------------------------- from photos to training, one photo


@pytest.mark.slow
def test_photos_to_training_to_evaluation(weights_file, tmp_path):
    """Nothing but pictures, captions and a detector."""
    tree, pictures = tmp_path / "tree", {"coco": "coco", "winoground": "winoground/images"}
    toy.make_toy(tree, scenes=100)
    shutil.rmtree(tree / "regions")
    for name, folder in pictures.items():
        extract(tree / folder, weights_file, tmp_path / name)
        evaluate.pack([tmp_path / name], tree / "regions" / name)
    done = run(
        tmp_path,
        "--recipe toy-pretrain --pretrain mlm+itm+mrckl --steps 8 --warmup 2 --batch-tokens 512",
        "--out x --data",
        tree,
        *QUICK,
    )
    assert "winoground/group" in last_line(done)
    photo = next((tree / "coco/val2014").iterdir())
    ask = (str(tmp_path / "x/last.pt"), str(photo), "a red circle on the left")
    where = dict(data=str(tree), out=str(tmp_path / "figures"))
    seen = evaluate.photo(*ask, str(weights_file), **where)
    assert 0 < seen["match"] < 1 and Image.open(seen["figure"]).width > 200
    with pytest.raises((CheckpointError, DataError), match="detector"):
        evaluate.photo(*ask, **where)


@pytest.mark.parametrize("recipe", ["toy-pretrain", "toy-albef"])
def test_one_photo_without_a_detector(toy_tree, tmp_path, recipe, capsys):
    args = {
        "toy-pretrain": "--vision patches --resolution 32 --batch-tokens 256",
        "toy-albef": "--queue 8 --batch-tokens 4 --corpora coco:1",
    }[recipe]
    args += " --steps 3 --warmup 1 --out x --data"
    run(tmp_path, "--recipe", recipe, args, toy_tree, *QUICK)
    photo = next((toy_tree / "coco/val2014").iterdir())
    capsys.readouterr()
    command = ["photo", "--ckpt", tmp_path / "x/last.pt", "--image", photo, "--data", toy_tree]
    command += ["--out", tmp_path / "figures", "--text", "a red circle"]
    evaluate.main([*map(str, command)])
    seen = json.loads(capsys.readouterr().out)
    assert 0 <= seen["match"] <= 1 and Image.open(seen["figure"]).width > 200
    with pytest.raises(SystemExit):
        evaluate.main([*map(str, command[:-2])])
    assert "required: --text" in capsys.readouterr().err
