"""Metrics against slow loops, perfect and reversed rankers, and the figures."""

import contextlib
import functools
import inspect
import json
import re
import shutil
import weakref
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import losses
from conftest import ROOT, inside


def slow_recall(scores, image_of_text):
    T, I = scores.shape
    found = {}
    for k in (1, 5, 10):
        right = [scores[t][image_of_text[t]] for t in range(T)]
        wrong = lambda t: (i for i in range(I) if i != image_of_text[t])
        hits = [sum(scores[t][i] >= right[t] for i in wrong(t)) < k for t in range(T)]
        found[f"image/r{k}"] = 100 * np.mean(hits)
        hits = []
        for i in range(I):
            best = max(scores[t][i] for t in range(T) if image_of_text[t] == i)
            hits.append(sum(scores[t][i] >= best for t in range(T) if image_of_text[t] != i) < k)
        found[f"text/r{k}"] = 100 * np.mean(hits)
    return found


def test_recall_is_the_slow_loop():
    rng = np.random.default_rng(0)
    for _ in range(5):
        owner = np.sort(np.concatenate([np.arange(7), rng.integers(0, 7, 20)]))
        scores = rng.integers(0, 6, (27, 7)).astype(float)  # many ties
        assert evaluate.recall(scores, owner) == pytest.approx(slow_recall(scores, owner))


def test_perfect_reversed_and_constant_rankers():
    owner = np.repeat(np.arange(30), 5)
    right = (owner[:, None] == np.arange(30)).astype(float)
    assert set(evaluate.recall(right, owner).values()) == {100.0}
    assert set(evaluate.recall(-right, owner).values()) == {0.0}
    assert set(evaluate.recall(np.zeros_like(right), owner).values()) == {0.0}


def test_recall_agrees_with_the_authors_where_theirs_is_right():
    import os

    z = np.load(f"{os.environ.get('GOLDEN_DIR', ROOT / 'tests/golden')}/uniter_heads.npz")
    scores, owner = z["itm_eval/score_matrix"].astype(float), z["itm_eval/gt_img_of_txt"]
    ours = evaluate.recall(scores, owner)
    theirs = dict(zip(z["itm_eval/names"].tolist(), z["itm_eval/official"].tolist()))
    for name, short in (("image", "img"), ("text", "txt")):
        shares = [ours[f"{name}/r{k}"] / 100 for k in (1, 5, 10)]
        np.testing.assert_allclose(shares, z[f"itm_eval/plain_{short}_r1_r5_r10"], atol=1e-9)
    # the official slip
    assert theirs["img_r10"] > ours["image/r10"] / 100


def test_winoground_scores():
    score = lambda s: {k: 100 * v.mean() for k, v in evaluate.choice_hits(s, (0, 1)).items()}
    good, ties, reverse = [[2.0, 1], [0, 3]], [[1.0, 1], [1, 1]], [[0.0, 1], [1, 0]]
    # each satisfies one of the two conditions
    text_only, image_only = [[5.0, 6], [4, 7]], [[5.0, 4], [6, 7]]
    examples = np.array([good, ties, reverse, text_only, image_only])
    assert score(examples) == {"text": 40.0, "image": 40.0, "group": 20.0}
    assert evaluate.choice_hits(examples, (0, 1))["group"].tolist() == [True] + 4 * [False]
    for tied, text, image in (
        ([[2, 1], [2, 3]], 0, 100),
        ([[3, 2], [1, 2]], 0, 100),
        ([[2, 2], [1, 3]], 100, 0),
        ([[3, 1], [2, 2]], 100, 0),
    ):
        # one of the four comparisons is a tie: wrong
        assert score(np.array([tied])) == {"text": text, "image": image, "group": 0}
    chance = score(np.random.default_rng(0).random((200_000, 2, 2)))
    assert chance["text"] == pytest.approx(25, abs=0.5)
    assert chance["group"] == pytest.approx(100 / 6, abs=0.5)


def test_command_line(toy_tree, pretrained, tmp_path):
    ask = lambda *a: inside(
        tmp_path, ["--ckpt", pretrained[0], "--data", toy_tree, *a], evaluate.main
    )
    done = ask("--task winoground")
    numbers = json.loads(done.stdout)
    assert {f"winoground/{n}" for n in ("text", "image", "group")} <= set(numbers)
    saved = json.loads((pretrained[0].parent / "done.json").read_text())
    assert numbers["winoground/group"] == pytest.approx(saved["winoground/group"], abs=0.01)
    recalls = {f"retrieval/{d}/r{k}" for d in ("image", "text") for k in (1, 5, 10)}
    for dataset in ("flickr30k", "coco"):
        done = ask("--task retrieval --dataset", dataset)
        assert recalls <= set(json.loads(done.stdout)), done.stderr
    done, figures = ask("--task figures --out figures"), tmp_path / "figures"
    assert len(list(figures.glob("winoground_*.png"))) == 8, done.stderr
    picture = Image.open(figures / "winoground_0_0.png")
    assert picture.width > 400 and len(picture.convert("RGB").getcolors(1 << 20)) > 20
    bad = inside(tmp_path, ["--task winoground --ckpt no.pt --data", toy_tree], evaluate.main)
    assert bad.returncode == 1 and "No such file" in bad.stderr and "Traceback" not in bad.stderr


def test_recall_in_folds_sees_only_its_fold():
    """Two folds of three images: within the first each caption finds its image, in the second none
    does; an image of another fold is no rival.
    """
    column = np.array([0, 1, 2, 3, 4, 5])
    scores = np.full((6, 6), 9.0)
    scores[:3, :3], scores[3:, 3:] = np.eye(3), 1 - np.eye(3)
    found = evaluate.recall_in_folds(scores, column, size=3, n=2)
    assert found["image/r1"] == 50 and found["text/r1"] == 50 and found["image/r5"] == 100


def test_the_box_with_most_heat_for_its_area():
    """Against its definition: the heat inside each box, by the square root of its area."""
    generator = np.random.default_rng(0)
    answers = set()
    for _ in range(30):
        A = torch.from_numpy(generator.random((40, 60)) ** 4)
        corner = generator.uniform(0, 30, (6, 2))
        boxes = np.concatenate([corner, generator.uniform(2, 40, (6, 2))], axis=1)
        scores = []
        for x, y, w, h in boxes:
            x1, x2 = np.clip([int(x), int(x + w)], 0, 60)
            y1, y2 = np.clip([int(y), int(y + h)], 0, 40)
            scores.append(A[y1:y2, x1:x2].sum().item() / (w * h) ** 0.5)
        assert evaluate.best_box_by_heat(A, boxes) == int(np.argmax(scores))
        answers.add(int(np.argmax(scores)))
    assert len(answers) > 2


def test_entropy_of_what_words_attend_to(toy_tree, pretrained, monkeypatch):
    """Each word another region: log2 of their number. All the same: 0."""
    run = evaluate.load_run(f"{pretrained[0]}", toy_tree)
    index, _ = evaluate.choice_index(run, "winoground")
    n_words = index.arrays["n_words"] - 2
    spread = torch.eye(40)[None, (torch.arange(40) - 1) % 40]
    for P, wanted in ((spread, np.log2(n_words).mean()), (torch.ones(1, 40, 40), 0)):

        def attend(run, index, captions):
            for c in captions:
                yield [c], {"text_mask": torch.ones(1, n_words[c] + 2, dtype=torch.bool)}, P

        monkeypatch.setattr(evaluate, "word_to_region", attend)
        assert evaluate.argmax_entropy(run)["entropy/bits"] == pytest.approx(wanted)


def test_winoground_by_kind_and_by_what_was_said(toy_tree, pretrained):
    """Of either tag, the scores of its values are means that give the whole, weighted by size."""
    run = evaluate.load_run(f"{pretrained[0]}", toy_tree)
    (_, notes), numbers = (
        evaluate.choice_index(run, "winoground"),
        evaluate.choose(run, "winoground"),
    )
    for names in ({"Object", "Relation", "Both"}, {"seen", "held out"}):
        tags = [*({*note} & names for note in notes)]
        assert set().union(*tags) == names and all(len(tag) == 1 for tag in tags)
        n = Counter(tag for (tag,) in tags)
        parts = [numbers[f"winoground/group/{name}"] for name in n]
        whole = np.average(parts, weights=[*n.values()])
        assert whole == pytest.approx(numbers["winoground/group"])


@pytest.mark.parametrize("tag", [None, 3, ["a", "b"]])
def test_a_winoground_tag_of_another_kind_is_its_text(toy_tree, tmp_path, tag):
    lines = (toy_tree / "winoground/examples.jsonl").read_text().splitlines()
    odd = json.loads(lines[0]) | {"secondary_tag": tag}
    (tmp_path / "winoground").mkdir()
    text = "\n".join([json.dumps(odd), *lines[1:]])
    (tmp_path / "winoground/examples.jsonl").write_text(text)
    notes = [r.note for r in data.winoground_examples(tmp_path, "", Counter())]
    second = [] if tag is None else [str(tag)]
    assert [*notes[0]] == [odd["collapsed_tag"], *second] and notes[0] == notes[1]


def test_congruence_of_matched_and_mismatched_pairs(toy_tree, pretrained):
    """The loss of each pair by itself, one after the other, is what is averaged and compared."""
    run, found = evaluate.load_run(f"{pretrained[0]}", toy_tree), []
    index, _ = evaluate.choice_index(run, "winoground")
    for c in range(len(index)):
        own, other = index.image[[c]], index.image[[c + 1 if c % 2 == 0 else c - 1]]
        for image in (own, other):
            batch = data.to_device(index.batch(np.array([c]), image))
            with torch.no_grad():
                maps = run.model.eval()(**batch, maps=(-1,)).maps[0]
            words = batch["text_mask"].clone()
            words[:, [0, -1]] = False
            blocks = [S.mean(dim=1) for S in maps]
            found.append(losses.cacr(*blocks, words, batch["region_mask"]).item())
    matched, mismatched = np.array(found[::2]), np.array(found[1::2])
    numbers = evaluate.congruence(run)
    assert numbers["congruence/matched"] == pytest.approx(matched.mean(), rel=1e-3)
    assert numbers["congruence/mismatched"] == pytest.approx(mismatched.mean(), rel=1e-3)
    less = 100 * (matched < mismatched).mean()
    assert numbers["congruence/matched_is_less"] == pytest.approx(less, abs=3)


def test_an_ensemble_is_the_mean_of_its_scores(toy_tree, pretrained, monkeypatch):
    """Two of the same are one; of two that differ the mean chooses."""
    run = evaluate.load_run(f"{pretrained[0]}", toy_tree)
    run = run._replace(settings=run.settings | {"task": "ve", "answer_list": [*data.ENTAILMENT]})
    monkeypatch.setitem(evaluate.TASKS, "ve", evaluate.TASKS["ve"]._replace(output="match"))
    index = evaluate.open_task(run, "ve", "dev")
    target, scores = index.targets(np.arange(len(index))), iter([])

    def predict(one, task, index, whole=False):
        return next(scores) if whole else next(scores).argmax(axis=1)

    monkeypatch.setattr(evaluate, "predict", predict)
    right, wrong = np.eye(3)[target], np.eye(3)[(target + 1) % 3]
    for given, wanted in (([right], 100), ([right, right], 100), ([wrong, 2 * right], 100)):
        scores = iter(given)
        assert evaluate.downstream(run, others=[run] * (len(given) - 1))["ve/accuracy"] == wanted
    scores = iter([2 * wrong, right])
    assert evaluate.downstream(run, others=[run])["ve/accuracy"] == 0


def test_head_figures(toy_tree, pretrained, tmp_path):
    """A figure has a row for each layer, a panel for each head."""
    run = evaluate.load_run(f"{pretrained[0]}", toy_tree)
    (path,) = evaluate.head_figures({"a run": run}, tmp_path)
    layers, heads = len(run.model.layers), run.model.layers[0].attention.heads
    index, _ = evaluate.choice_index(run, "winoground")
    tokens = int(index.length(np.zeros(1, int), index.image[:1])[0])
    cell = 96 // tokens + 1
    size = heads * (tokens * cell + 6), layers * (tokens * cell + evaluate.TITLE + 24)
    assert Image.open(path).size == size


def test_what_a_store_may_not_hold(tmp_path):
    """Two images of one name, none of a region, nan, boxes outside or the wrong way round"""
    good, x = [[0.0, 0, 40, 30], [10, 5, 20, 9]], np.zeros((2, 8))

    def store(name, wh=(40, 30), boxes=good, features=x, before=()):
        shutil.rmtree(tmp_path / "s", ignore_errors=True)
        writer = evaluate.StoreWriter(tmp_path / "s")
        for other in before:
            writer.add(other, (40, 30), boxes=good, features=x)
        writer.add(name, wh, boxes=np.reshape(boxes, (-1, 4)), features=features)
        writer.commit()
        return data.RegionStore(tmp_path / "s")

    assert len(store("a", before=["b"])) == 2
    assert len(store("a", before=["b", "a"])) == 2  # the same once more
    # a hair outside is float arithmetic
    assert len(store("a", boxes=[[0, 0, 40.01, 30], [-0.01, 0, 1, 1]])) == 1
    for told, bad in (
        ("image a: comes twice, differs", dict(before=["a"], features=x + 1)),
        ("image a: comes twice, differs", dict(before=["a"], wh=(41, 30))),
        ("a box x1 y1 x2 y2 = none", dict(boxes=[], features=x[:0])),
        ("nan or inf", dict(features=x + [np.nan, *range(7)])),
        ("nan or inf", dict(features=x + 1e6)),
        ("inside the image", dict(boxes=[[0, 0, 41, 30], [0, 0, 1, 1]])),
        ("inside the image", dict(boxes=[[0, -1, 40, 30], [0, 0, 1, 1]])),
        ("inside the image", dict(boxes=[[0, 0, 40, 30], [9, 0, 8, 1]])),
        ("inside the image", dict(boxes=[[0, 0, 40, 30], [0, 0, np.nan, 1]])),
        ("40 x 20 pixels", dict(wh=(40, 20))),
        ("as before", dict(before=["b"], features=np.zeros((2, 9)))),
        ("as before", dict(features=x[:1])),
    ):
        with pytest.raises(data.DataError, match=told), np.errstate(over="ignore"):
            store("a", **bad)
    with pytest.raises(data.DataError, match="no image to write"):
        evaluate.StoreWriter(tmp_path / "none").commit()
    with pytest.raises(data.DataError, match="exists already"):
        evaluate.StoreWriter(tmp_path)


def test_pack_cuts_boxes_to_their_image_unless_they_are_far_outside(tmp_path, monkeypatch):
    def row(line):
        boxes = np.array([[-2.0, 3, 20, 31], [0, 0, far, 30]], np.float32)
        return "a", (40, 30), {"boxes": boxes, "features": np.zeros((2, 8))}

    monkeypatch.setattr(evaluate, "tsv_row", row)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.tsv").write_text("a line\n")
    far = 80
    evaluate.pack(["f.tsv"], tmp_path / "s")
    boxes = data.RegionStore(tmp_path / "s").read(np.zeros(1, int), "boxes")[0]
    assert boxes.tolist() == [[0, 3, 20, 30], [0, 0, 40, 30]]
    far = 81
    with pytest.raises(data.DataError, match="inside the image"):
        evaluate.pack(["f.tsv"], tmp_path / "t")


@pytest.mark.parametrize(
    "cpu, faster",
    [
        ("GenuineIntel avx512f avx512_bf16", False),
        ("GenuineIntel avx512f avx512_bf16 amx_bf16", True),
        ("AuthenticAMD avx512f avx512_bf16", True),
        ("AuthenticAMD avx2", False),
        (None, False),
    ],
)
def test_bf16_by_the_maker_of_the_cpu(monkeypatch, cpu, faster):
    def read_text(path):
        if cpu is None:
            raise FileNotFoundError(path)
        return cpu

    monkeypatch.setattr(evaluate.Path, "read_text", read_text)
    assert evaluate.bf16_is_faster() == faster


@pytest.mark.parametrize("emulated", [True, False])
def test_bf16_where_the_hardware_has_it(monkeypatch, emulated):
    """A GPU that emulates bf16 (V100, T4) says that it supports it, unless asked for more."""
    plain = contextlib.nullcontext
    supported = lambda including_emulation=True: including_emulation or not emulated
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(evaluate, "bf16_is_faster", lambda: not emulated)
    for kind in ("cuda", "cpu"):
        of = functools.partial(evaluate.autocast_for, torch.device(kind))
        assert (of("auto") is plain) == emulated
        assert of("fp32") is plain and of("bf16") is not plain


def test_the_best_answers_alone_are_kept(toy_tree, pretrained):
    """Of a thousand answers to each question, as of GQA's: what a batch's scores were is gone."""
    run, alive, most = evaluate.load_run(str(pretrained[0]), toy_tree), [], 0
    index = evaluate.open_task(run, "ve", "dev")

    def scores(out, batch, group):
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        made = torch.arange(1000.0).repeat(len(out.match), 1)
        alive.append(weakref.ref(made))
        return made

    task = evaluate.TASKS["ve"]._replace(output="match", scores=scores)
    best = evaluate.predict(run, task, index, batch_tokens=512)
    assert len(alive) > 3 and most <= 1 and best.shape == (len(index),) and (best == 999).all()
    whole = evaluate.predict(run, task, index, batch_tokens=512, whole=True)
    assert whole.shape == (len(index), 1000)


def test_each_process_has_its_share(monkeypatch):
    """Of seven things three processes have three, two and two."""
    monkeypatch.setattr(evaluate.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(evaluate.dist, "get_world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(evaluate.dist, "get_rank", lambda: rank)
        shares.append(list(evaluate.my_share(range(7))))
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]


def test_an_ensemble_is_of_one_kind_of_model(toy_tree, pretrained, tmp_path):
    """The mean of scores of other answers would say nothing."""
    for name, answers in (("a", ["no", "yes"]), ("b", ["yes", "no"])):
        saved = torch.load(pretrained[0], weights_only=True)
        saved["config"]["task"], saved["sizes"]["answer_list"] = "ve", answers
        (tmp_path / name).mkdir()
        torch.save(saved, tmp_path / name / "last.pt")
    args = ["--task ve --ckpt a/last.pt b/last.pt --data", toy_tree]
    done = inside(tmp_path, args, main=evaluate.main)
    assert done.returncode == 1 and "on one data tree" in done.stderr, done.stderr


@pytest.mark.parametrize(
    "args, told",
    [
        ("--task winoground --submit x.json", "--task winoground does not take --submit"),
        ("--task congruence --head rank", "does not take --head"),
        ("--task entropy --dataset coco", "does not take --dataset"),
        ("--task vqa --head match", "does not take --head"),
        ("--task winoground --ckpt CKPT", "does not take several --ckpt"),
        ("--task grounding", "grounding needs phrases, this model gives attention"),
        ("--task vqa", "was trained for pretrain, not for vqa"),
        ("--task winogroud", "invalid choice: 'winogroud'"),
    ],
)
def test_combinations_that_cannot_be(toy_tree, pretrained, tmp_path, args, told):
    args = args.replace("CKPT", f"{pretrained[0]} {pretrained[0]}")
    args = args if "--ckpt" in args else f"{args} --ckpt {pretrained[0]}"
    done = inside(tmp_path, [args, "--data", toy_tree], main=evaluate.main)
    assert done.returncode and told in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_help_names_every_benchmark_and_command(tmp_path):
    """With what it says, and of a command what its options are"""
    text = inside(tmp_path, ["--help"], main=evaluate.main).stdout
    for name in (*evaluate.BENCHMARKS, *evaluate.COMMANDS):
        assert re.search(rf"\b{re.escape(name)}\b", text), name
    for name, function in evaluate.COMMANDS.items():
        text = inside(tmp_path, [name, "--help"], main=evaluate.main).stdout
        for option in inspect.signature(function).parameters:
            assert re.search(rf"^ *{option} {{2,}}\w", text, re.M), (name, option)


def test_an_error_of_one_process_is_said(monkeypatch):
    """The first says it at once; another only if it has not been ended by then."""
    waited = []
    monkeypatch.setattr(evaluate.time, "sleep", waited.append)
    for rank in ("0", "3"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit, match="train.py: error: a broken file"):
            evaluate.fail("train.py", "a broken file")
    assert waited == [10]


def test_gqas_distribution_by_hand():
    """Chi-square of a group: sum over its true answers of (predicted - true)^2 / true."""
    groups = {"colour": ["red", "red", "red", "blue"], "animal": ["cat"], "": ["yes"]}
    asked = [{"answer": a, "groups": {"global": g}} for g, true in groups.items() for a in true]
    predicted = ["red", "red", "red", "red", "dog", "no"]
    # of four (4 - 3)^2 / 3 + (0 - 1)^2 / 1, of one 1; no group, no chi-square
    wanted = (4 * (1 / 3 + 1) + 1 * 1) / 5 / 100
    found = evaluate.gqa_distribution(dict(enumerate(asked)), predicted)
    assert found == pytest.approx(wanted)


def test_which_layers_words_are_looked_at():
    """The fourth of five cross layers, as Kervadec et al.; else the last."""
    layers = {"five": {"cross_layers": range(5)}, "one": {"cross_layers": [0]}, "uniter": {}}
    found = {n: evaluate.word_layer(SimpleNamespace(**kind)) for n, kind in layers.items()}
    assert found == {"five": -2, "one": -1, "uniter": -1}
