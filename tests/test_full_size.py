"""What the papers' recipes need beyond the toy world: their batches, features, checkpoints."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import model as parts
import rehearse
import train
from conftest import QUICK, ROOT, inside, last_line, prepare, read, run, same, weights

# [UNITER's, IAIS's, LXMERT's, ALBEF's, MAF's code; the papers]: a GPU's batch, times, GPUs
BATCHES = {
    "uniter-pretrain": (10_240, "tokens", 2, 8),
    "uniter-pretrain-all": (10_240, "tokens", 6, 8),
    "uniter-pretrain-all-large": (6144, "tokens", 4, 16),
    "vcr-pretrain": (6144, "tokens", 4, 4),
    "vcr-pretrain-large": (6144, "tokens", 4, 4),
    "vqa": (5120, "tokens", 5, 4),
    "vqa-large": (3072, "tokens", 4, 8),
    "vcr": (4000, "tokens", 5, 4),
    "vcr-large": (4000, "tokens", 5, 4),
    "ve": (4096, "tokens", 4, 2),
    "ve-large": (4096, "tokens", 2, 4),
    "nlvr2": (10_240, "tokens", 1, 1),
    "nlvr2-large": (5120, "tokens", 2, 2),
    "refcoco": (128, "examples", 1, 1),
    "refcoco+": (128, "examples", 1, 1),
    "refcocog": (128, "examples", 1, 1),
    "retrieval-flickr30k": (120, "examples", 1, 1),
    "retrieval-coco": (60, "examples", 1, 1),
    "flickr30k": (1, "examples", 16, 8),
    "coco": (1, "examples", 16, 8),
    "kervadec": (128, "examples", 1, 4),
    "gqa": (32, "examples", 1, 1),
    "kervadec-nlvr2": (32, "examples", 1, 1),
    "albef": (64, "examples", 1, 8),
    "amc": (64, "examples", 1, 8),
    "maf": (64, "examples", 1, 1),
}


@pytest.mark.parametrize("recipe", BATCHES)
def test_recipes_give_the_papers_batch(recipe):
    cfg = train.make_config(recipe)
    size, unit, accumulate, gpus = BATCHES[recipe]
    assert (cfg.batch_size > 0) == (unit == "examples")
    contrast = recipe in ("albef", "amc", "maf")
    for processes in (1, 2, gpus, 2 * gpus * accumulate):
        pieces, each = train.batch_of(cfg, processes)
        # as many examples an update, whatever the machine
        total = size * gpus * accumulate
        assert pieces * each == total or each == 1 and processes > total
        # for contrast a process's examples are one batch
        assert pieces == (processes if contrast else max(processes, gpus * accumulate))
    # hours between two checkpoints would be lost, minutes are not
    assert recipe == "maf" or cfg.save_every >= 1000


def write_npz(path, conf):
    n = len(conf)
    corners = np.tile(np.array([0.1, 0.1, 0.5, 0.5, 0.4, 0.4], np.float16), (n, 1))
    probs = np.full((n, 5), 0.2, np.float16)
    features = np.ones((n, 8), np.float16)
    np.savez(path, features=features, norm_bb=corners, conf=conf, soft_labels=probs)


def test_annotated_boxes_are_all_kept(tmp_path):
    """The rule of confidence is of detected boxes; sizes are needed where pixels are compared."""
    for folder in ("gt", "det", "jpg"):
        (tmp_path / folder).mkdir()
    conf = np.array([0.9] * 12 + [0.0] * 13, np.float16)
    write_npz(tmp_path / "gt/visual_grounding_coco_gt_000000000042.npz", conf)
    write_npz(tmp_path / "det/coco_train2014_000000000042.npz", conf)
    with pytest.raises(data.DataError, match="size is unknown\n  Wanted: --images"):
        evaluate.pack([tmp_path / "gt"], tmp_path / "none")
    Image.new("RGB", (200, 100)).save(tmp_path / "jpg/COCO_train2014_000000000042.jpg")
    for folder, n in (("gt", 25), ("det", 12)):
        evaluate.pack([tmp_path / folder], tmp_path / f"store-{folder}", tmp_path / "jpg")
        store = data.RegionStore(tmp_path / f"store-{folder}")
        assert store.n_regions(np.array([0])).tolist() == [n] and store.wh[0].tolist() == [200, 100]


@pytest.mark.parametrize("confident, least, most, wanted", [(15, 10, 100, 15), (3, 10, 100, 10)])
def test_ten_to_a_hundred_boxes(confident, least, most, wanted):
    """Those over 0.2, within these bounds [UNITER]; a fixed number takes what there is."""
    corner = torch.arange(40.0)[:, None] * 20
    boxes = torch.cat([corner, corner, corner + 10, corner + 10], dim=1)[:, None].expand(-1, 3, -1)
    probs = torch.full((40, 4), 0.1)
    probs[:confident, 0] = 0.7
    keep, _ = parts.select_boxes(boxes, probs, (least, most), 0.2, (0.5,))
    assert len(keep) == wanted
    assert len(parts.select_boxes(boxes, probs, (36, 36), thresholds=(0.5,))[0]) == 36


def test_pictures_are_not_decoded_below_the_wanted_size(tmp_path):
    Image.new("RGB", (640, 480)).save(tmp_path / "a.jpg")
    assert min(data.read_picture(tmp_path / "a.jpg", (256, 256)).size) >= 256
    assert data.read_picture(tmp_path / "a.jpg", (200, 200)).size == (320, 240)


def test_missing_lists_of_test_images_are_said(toy_tree, tmp_path):
    """Without RefCOCO's files its test images would be trained on in silence."""
    for folder in ("coco", "flickr30k"):
        (tmp_path / folder).symlink_to(toy_tree / folder)
    _, stats = read(data.coco_corpus, tmp_path, "train")
    assert sum("NONE OF refcoco" in name for name, n in stats.items() if n) == 3


def test_albef_draws_a_corpus_as_often_as_it_is_large(toy_tree):
    for corpora, by_size in (("coco+vg", True), ("coco:1+vg:1", False)):
        streams = prepare(
            "--recipe toy-albef --corpora", corpora, "--data", toy_tree, *QUICK
        ).streams
        sizes = [len(stream.index) for stream in streams.train]
        assert streams.weights == (sizes if by_size else [1, 1]) and sizes[0] != sizes[1]


def test_a_run_that_was_typed_is_found_by_the_next(toy_tree, tmp_path, monkeypatch):
    """The README's pre-training command, then the recipe that begins from it: no second one."""
    monkeypatch.chdir(tmp_path)
    quick = {"steps": 4, "warmup": 1, "batch_tokens": 256}
    monkeypatch.setitem(train.RECIPES, "toy-pretrain", train.RECIPES["toy-pretrain"] | quick)
    common = ["--data", toy_tree, "--workers", 0, "--precision", "fp32"]
    run(tmp_path, "--recipe", "toy-pretrain", *common)
    argv = ["--task", "ve", "--steps", 2, "--warmup", 1, "--batch-tokens", 256, *common]
    run(tmp_path, *argv, "--out", "x")
    assert len(list((tmp_path / "out").iterdir())) == 1
    # another one does not serve: its numbers differ
    run(tmp_path, *argv, "--seed", 1, "--out", "y")
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_several_files_to_begin_from(toy_tree, tmp_path):
    """ALBEF from one file of pictures and one of words; a missing one says how to do without."""
    run(tmp_path, "--recipe", "toy-albef", "--data", toy_tree, "--steps", 1, "--queue", 96, *QUICK)
    (saved,) = tmp_path.glob("out/*/last.pt")
    state = weights(saved.parent)
    pieces = {"vision": {}, "words": {}}
    for name, tensor in state.items():
        if name.startswith("student."):
            pieces["vision" if ".vision." in name else "words"][name] = torch.rand_like(tensor)
    for name, piece in pieces.items():
        torch.save(piece, tmp_path / f"{name}.pt")
    argv = ["--recipe", "toy-albef", "--data", str(toy_tree), "--queue", "96", *QUICK]
    model = prepare(*argv, "--init", f"{tmp_path}/vision.pt+{tmp_path}/words.pt").model
    same({**pieces["vision"], **pieces["words"]}, model.state_dict())
    teacher = {k.replace("student.", "teacher."): v for k, v in pieces["vision"].items()}
    same(teacher, model.state_dict())
    done = run(tmp_path, *argv, "--init", "nothing.pt", "--out", "z", expect=1)
    assert "nothing.pt is not there" in done.stderr and "--recipe uniter-pretrain" in done.stderr


def test_pointing_says_what_was_trained_on(monkeypatch, toy_tree):
    """Of questions that the two-stream recipe was trained on no number stands as if it were not."""
    monkeypatch.setattr(evaluate, "downstream", lambda run: {})
    monkeypatch.setattr(evaluate, "pointed_questions", lambda run, split: None)
    monkeypatch.setattr(evaluate, "pointing", lambda run, index: {"pointing/accuracy": 1.0})
    vision = data.Vision(str(toy_tree))
    for split, name in (("train_balanced", ""), ("train_balanced+val_balanced", "_on_questions")):
        one = evaluate.Run(None, None, {"split": split}, {"answer_list": []}, vision)
        (key,) = evaluate.multitask_benchmarks(one)
        assert key.startswith(f"pointing/accuracy{name}") and (name or key == "pointing/accuracy")


def test_vcr_counts_one_of_its_choices(toy_tree):
    """UNITER's batch of 4,000 has four times as many rows: a question costs as one of them."""
    made = prepare("--task vcr --data", toy_tree, "--init none", *QUICK)
    (stream,) = made.streams.train
    assert stream.index.group == 4 and stream.size == 512
    rows = data.Batches("examples", stream.index, made.cfg, "vcr", 2048)
    for k in range(3):
        assert [x.tolist() for x in stream.whole(k)] == [x.tolist() for x in rows.whole(k)]
        assert len(stream[k]["input"]["text"]) == 4 * len(stream[k]["names"])


class Waits(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts operations for which a GPU has to be waited for: a number that Python reads, a shape
    that depends on values."""

    NAMES = "_local_scalar_dense nonzero masked_select is_nonzero _unique2 item equal".split()

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = [a for a in args[1] if a is not None] if name in ("index", "index_put_") else []
        if name in self.NAMES or any(a.dtype == torch.bool for a in masks):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "argv",
    [
        ["--recipe", "toy-pretrain", "--pretrain", "mlm+itm+mrfr+mrc+mrckl+wra", "--loss", "cacr"],
        ["--recipe", "toy-pretrain", "--pretrain", "mlm+itm", "--loss", "iais+wra"],
        ["--recipe", "toy", "--loss", "cacr+iais-distributed", "--candidates", 0],
        ["--recipe", "toy-align"],
        ["--recipe", "toy-vqa", "--loss", "cacr"],
        ["--recipe", "toy-nlvr2"],
        ["--recipe", "toy-re"],
        ["--recipe", "toy-grounding"],
        ["--recipe", "toy-amc", "--init", "none", "--batch-size", 8],
        ["--recipe", "toy-amc-patches"],
        ["--recipe", "toy", "--loss", "eqsim+hard-rank+sparc", "--candidates", 0],
        ["--recipe", "toy-pretrain", "--pretrain", "mlm+itm", "--loss", "eqsim+hard-rank"],
        ["--recipe", "toy-albef", "--loss", "eqsim+hard-rank+sparc"],
        ["--recipe", "toy-align", "--loss", "mdetr-align"],
        ["--recipe", "toy-amc", "--loss", "selfeq", "--init", "none", "--batch-size", 8],
        ["--recipe", "toy-amc-patches", "--loss", "selfeq"],
    ],
    ids=lambda argv: "-".join(map(str, argv[1:4])),
)
def test_an_update_waits_for_no_gpu(toy_tree, argv):
    """But for check_finite(), one update late."""
    more = ["--data", toy_tree, "--batch-tokens", 512, *QUICK]
    more += [] if "--init" in argv else ["--init", "none"]
    made = prepare(*argv, *more, *(["--size", "toy"] if "maf" in argv else []))
    for stream in made.streams.train:
        how, margins = (made.cfg, made.runtime, made.model, made.optimizers), torch.zeros(3)
        # the optimiser's first update sets up its state
        first, second = [stream[0]], [stream[1]]
        train.train_step(*how, 1, first, margins)
        with Waits() as waits:
            logged, norm = train.train_step(*how, 2, second, margins)
        assert not waits.found, f"{stream.kind}: {waits.found}"
        with Waits() as waits:
            train.check_finite(2, logged, norm, second)
        assert len(waits.found) == 1


def test_the_best_validation_is_kept(toy_tree, tmp_path, monkeypatch):
    """best.pt is of the highest mean accuracy so far, also after a resume."""
    values = iter([10.0, 30.0, 20.0, 25.0, 40.0])
    monkeypatch.setattr(train, "validate", lambda *args: {"val/ve": next(values)})
    argv = ["--task", "ve", "--data", toy_tree, "--init", "none", "--warmup", 1, "--keep-best"]
    argv += ["--batch-tokens", 256, "--eval-every", 2, "--save-every", 2, "--out", "x", *QUICK]
    save, kept = train.save_checkpoint, []

    def saved(path, cfg, model, optimizers, margins, step, sizes):
        kept.append((path.name, step))
        if ("last.pt", 6) in kept[:-1]:
            raise KeyboardInterrupt
        save(path, cfg, model, optimizers, margins, step, sizes)

    monkeypatch.setattr(train, "save_checkpoint", saved)
    run(tmp_path, *argv, "--steps", 10, expect=1)
    assert [step for name, step in kept if name == "best.pt"] == [2, 4]
    kept.clear()
    monkeypatch.setattr(train, "save_checkpoint", lambda *a: kept.append((a[0].name, a[5])))
    values = iter([25.0, 40.0])
    run(tmp_path, *argv, "--steps", 10, "--resume")
    assert [step for name, step in kept if name == "best.pt"] == [10]


def test_numbers_of_what_was_trained_on_are_called_so(monkeypatch):
    """The vqa recipe learns from val2014 too, as the authors: its number there is of no test."""
    task = evaluate.TASKS["vqa"]._replace(parts=lambda *_: [], numbers=lambda *_: {"accuracy": 1.0})
    monkeypatch.setitem(evaluate.TASKS, "vqa", task)
    for split, note in (("train2014", ""), ("train2014+val2014+vg", "_on_questions_trained_on")):
        one = evaluate.Run(None, None, {"task": "vqa", "split": split}, {}, None)
        assert evaluate.downstream(one) == {f"vqa/accuracy{note}": 1.0}
    # val_all holds the questions of val_balanced
    one = evaluate.Run(None, None, {"split": "train_all+val_all"}, {}, None)
    assert evaluate.trained_note(one, "val_balanced") and not evaluate.trained_note(one, "testdev")


@pytest.mark.slow
def test_the_rehearsal_runs(tmp_path, monkeypatch):
    """On a tree of a five hundredth of the true size: pre-training, phrases, two streams."""
    rehearse.write_tree(tmp_path / "tree", scale=0.002)
    (tmp_path / "results.json").write_text("{}")
    monkeypatch.setattr(rehearse.seeds, "RESULTS", tmp_path / "results.json")
    recipes = ["uniter-pretrain-all", "maf", "kervadec"]
    rehearse.run_all(tmp_path / "tree", recipes)
    found = json.loads((tmp_path / "results.json").read_text())
    assert set(found["rehearsal"]) == set(recipes)
    assert found["rehearsal"]["maf"]["examples"] == 64
    told = rehearse.table(found).splitlines()
    assert sum(line.startswith("| `") for line in told) == len(recipes)
    assert "stale" not in " ".join(told)


# gradients that are rounding alone, which Adam makes as large as any: a key's bias moves all scores
# of a row alike, MAF's a phrase's scores
NOISE = ("to_k.bias", "feature.bias")

# a process group's thread that is still there when Python ends can abort the process
THREADS_AT_THE_END = """
import atexit, pathlib, sys

@atexit.register
def last():
    names = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
    print("threads at the end:", names, file=sys.stderr)
"""


# of ALBEF each process draws for the whole update and takes its rows: masks, augmentation and
# negatives are else a process's own
SHARED_DRAWS = """
sys.path.insert(0, {root!r})
import data

def share(self, k):
    pieces, b = self.helpers.get("pieces", 1), self.size
    whole = data.Batches(self.kind, self.index, self.cfg, self.name, b * pieces, self.place)
    batch, start = getitem(whole, k // pieces), k % pieces * b
    N_L = batch["text"].shape[1]
    for name, width in (("masked_words", N_L), ("boxed", 1)):
        places = batch.get(name, batch["masked_words"][:0])
        own = (places // width >= start) & (places // width < start + b)
        batch[name], other = places[own] - start * width, {{"boxed": "region_target"}}
        other = other.get(name, "word_targets")
        batch |= {{other: batch[other][own]}} if other in batch else {{}}
    rows = slice(start, start + b)
    names = "names flip text masked_text text_mask pixels".split()
    own = {{n: batch[n][rows] for n in names}}
    return batch | own | {{"u": batch["u"][:, rows], "number": k}}

getitem, data.Batches.__getitem__ = data.Batches.__getitem__, share
"""


# Python and torch start once for all recipes
ALL_RUNS = """
import json, sys
sys.path.insert(0, {root!r})
import train
for argv in json.loads(sys.argv[1]):
    train.main(argv)
"""


def small_run(recipe, data, out):
    """Arguments of three updates of a recipe that any number of processes makes alike"""
    cfg = train.make_config(recipe)
    args = f"--recipe {recipe} --data {data} --init none --steps 3 --warmup 1 --lr 0.0001"
    args += f" --dropout 0 --eval-every 3 --mine-pool 4 --gpus 4 --out {out}"
    # MAF's 1e-8 is below the rounding of its gradients: where one is nearly 0, only its sign counts
    args += " --eps 1e-6" * (cfg.eps < 1e-6) + " --candidates 6" * bool(cfg.candidates)
    # AMC's mean pools over a process's pairs
    args += " --loss amc-max" * (cfg.loss == "amc")
    args += " --batch-size 3 --queue 20" if cfg.batch_size else " --batch-tokens 256"
    return [*args.split(), *QUICK]


@pytest.mark.slow
@pytest.mark.parametrize("is_albef", [False, True])
def test_processes_are_one(toy_tree, tmp_path, is_albef):
    """One, two and four: the weights of every recipe; which numbers there are at the end."""
    recipes = [name for name in train.RECIPES if name.startswith("toy")]
    recipes = [name for name in recipes if train.make_config(name).is_albef == is_albef]
    draws = SHARED_DRAWS.format(root=str(ROOT)) if is_albef else ""
    (tmp_path / "sitecustomize.py").write_text(THREADS_AT_THE_END + draws)
    (tmp_path / "runs.py").write_text(ALL_RUNS.format(root=str(ROOT)))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    for n in (1, 2, 4):
        several = f"-m torch.distributed.run --standalone --nproc-per-node {n}".split() * (n > 1)
        runs = [small_run(recipe, toy_tree, f"{recipe}-{n}") for recipe in recipes]
        command = [sys.executable, *several, "runs.py", json.dumps(runs)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "threads at the end" in done.stderr and "gloo" not in done.stderr
    for recipe in recipes:
        weights_of, names_of = {}, {}
        for n in (1, 2, 4):
            all_weights = weights(tmp_path / f"{recipe}-{n}").items()
            weights_of[n] = {k: v for k, v in all_weights if not k.endswith(NOISE)}
            names_of[n] = json.loads((tmp_path / f"{recipe}-{n}/done.json").read_text()).keys()
        for n in (2, 4):
            same(weights_of[1], weights_of[n], rtol=0, atol=1e-5)
            assert names_of[1] == names_of[n] and len(names_of[1]) > 1, recipe


@pytest.mark.slow
def test_shares_of_a_compiled_model(toy_tree, tmp_path, monkeypatch):
    """Each part goes back through the compiled graph once more, which torch forbids by default."""
    compile_it = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compile_it(*a, **k, backend="aot_eager"))
    args = "--pretrain itm --loss cacr --steps 2 --warmup 1 --batch-tokens 256 --compile --out o"
    how = args, "--log-shares --log-every 1", *QUICK
    run(tmp_path, "--recipe toy-pretrain", "--data", toy_tree, *how)
    log = [json.loads(line) for line in (tmp_path / "o/log.jsonl").read_text().splitlines()]
    shares = [line["share/itm"] + line["share/cacr"] for line in log if "share/itm" in line]
    assert shares == pytest.approx([1, 1], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe, task",
    [
        ("toy-vqa", "vqa"),
        ("toy-gqa", "gqa"),
        ("toy-retrieval", "retrieval"),
        ("toy-align", "pointing"),
        ("toy-amc", "pointing"),
    ],
)
def test_evaluation_is_shared_out(toy_tree, tmp_path, recipe, task):
    """Three processes of evaluate.py say what one says, and say it once."""
    how = "--init none --steps 1 --warmup 1 --batch-tokens 512 --batch-size 6 --candidates 0"
    cfg = train.make_config(recipe)
    how = how if cfg.batch_size else how.replace("--batch-size 6", "")
    run(tmp_path, "--recipe", recipe, "--data", toy_tree, how, "--mine-pool 4 --out o", *QUICK)
    args = ["--task", task, "--data", str(toy_tree), "--ckpt"]
    one = inside(tmp_path, [*args, "o/last.pt"], main=evaluate.main)
    # a checkpoint of its own, so that retrieval finds no matrix
    shutil.copy(tmp_path / "o/last.pt", tmp_path / "last.pt")
    start = "-m torch.distributed.run --standalone --nproc-per-node 3".split()
    command = [sys.executable, *start, str(ROOT / "evaluate.py"), *args, "last.pt"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    several = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert one.returncode == several.returncode == 0, several.stderr[-3000:]
    one, several = last_line(one), last_line(several)
    assert one.keys() == several.keys() and len(one) > 1
    assert all(abs(one[name] - several[name]) < 0.011 for name in one), (one, several)


@pytest.mark.slow
def test_official_weights_of_pictures(toy_tree, tmp_path):
    """--init X --steps 0 evaluates weights alone, as the authors publish them."""
    torch.manual_seed(0)
    words = evaluate.load_wordpiece(toy_tree, cased=False)
    sizes = {"vocab": len(words), "resolution": 64, "patch": 16, "queue": 8}
    albef = parts.build("albef", "tiny", **sizes)
    torch.save({"model": albef.state_dict()}, tmp_path / "ALBEF.pth")
    args = ["--recipe amc-without --init ALBEF.pth --steps 0 --queue 8 --data", toy_tree, *QUICK]
    found = last_line(run(tmp_path, *args, "--batch-size 2 --out o"))
    settings = {"cased": False, "vision": "patches", "resolution": 64, "patch": 16, "regions": ""}
    settings["model"] = "albef"
    vision = evaluate.vision_of(settings | {"data": toy_tree})
    one = evaluate.Run(albef, words, settings, {}, vision)
    ours = evaluate.pointing_games(one, "flickr30k")
    assert ours and {name: round(value, 2) for name, value in ours.items()}.items() <= found.items()
