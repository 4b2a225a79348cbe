"""What would give a wrong number without a word: each case is one error, or is noticed."""

import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import model
import train
from conftest import ROOT
from data import DataError, Record
from model import CheckpointError


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_an_error(value):
    """Recall would count it as the best of all, Winoground as a miss."""
    index = types.SimpleNamespace(name="winoground", id=lambda row: f"example {row}")
    scores = np.array([[1.0, 2.0], [-np.inf, 3.0]])  # -inf: what cannot be chosen
    evaluate.check_scores(index, [4, 7], scores)
    scores[1, 0] = value
    with pytest.raises(CheckpointError, match="winoground: a score of example 7 is (nan|inf)"):
        evaluate.check_scores(index, [4, 7], scores)


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_a_number_of_nothing_is_an_error(value):
    assert evaluate.rounded({"a": 1.234, "n": 3}) == {"a": 1.23, "n": 3}
    with pytest.raises(DataError, match="pointing/accuracy"):
        evaluate.rounded({"a": 1.0, "pointing/accuracy": value})


def test_one_weight_that_is_no_number_is_an_error(toy_tree, pretrained, tmp_path):
    path, _ = pretrained
    saved = torch.load(path, weights_only=True)
    model.read_checkpoint(path)
    for name in [n for n, x in saved["model"].items() if x.is_floating_point()][:3]:
        weights = saved["model"][name].clone()
        weights.view(-1)[-1] = float("nan")
        torch.save(saved | {"model": saved["model"] | {name: weights}}, tmp_path / "bad.pt")
        for read in (model.read_checkpoint, model.read_tensors):
            with pytest.raises(CheckpointError, match=f"{name} holds a weight"):
                read(tmp_path / "bad.pt")


# what a checkpoint depends on, and a change of it that keeps its length
SIZES = {"answer_list": ["no", "yes"], "vocabulary": "ab12", "features": 2048, "classes": 1600}
CHANGED = {"answer_list": ["yes", "no"], "vocabulary": "ab13", "features": 2047, "classes": 1601}


@pytest.mark.parametrize("name", SIZES)
def test_a_run_goes_on_with_what_it_began_with(name):
    train.check_same(SIZES, dict(SIZES), "out/run")
    with pytest.raises(train.UserError, match=f"out/run/last.pt .*{name}"):
        train.check_same(SIZES, SIZES | {name: CHANGED[name]}, "out/run")
    with pytest.raises(train.UserError, match="answer_list .maybe"):
        train.check_same(SIZES, SIZES | {"answer_list": ["no", "maybe"]}, "out/run")


def test_a_vocabulary_of_as_many_pieces_is_another(toy_tree, pretrained, tmp_path):
    words = (toy_tree / "bert-base-cased/vocab.txt").read_text()
    (tmp_path / "bert-base-cased").mkdir()
    (tmp_path / "bert-base-cased/vocab.txt").write_text(words.replace("circle", "cyrcle"))
    evaluate.load_run(pretrained[0], toy_tree)
    with pytest.raises(CheckpointError, match="another vocabulary"):
        evaluate.load_run(pretrained[0], tmp_path)


@pytest.mark.parametrize("weights", ["coco:0", "coco:0+vg:1", "coco:0.0", "coco:1e999"])
def test_a_weight_is_above_0(weights):
    """0 stood for "as often as it has texts": the corpus was drawn all the time."""
    with pytest.raises(train.UserError, match="left out"):
        train.parse(["--recipe", "toy-pretrain", "--corpora", weights, "--init", "none"])


def test_a_time_may_be_a_seed(toy_tree):
    from conftest import prepare

    how = "--recipe toy-pretrain --size tiny --seed 20261130123456 --batch-tokens 256 --steps 2"
    made = prepare(how, "--warmup 1 --data", toy_tree)
    how = made.cfg, made.runtime, made.model, made.optimizers, 1, [made.batch]
    logged, _ = train.train_step(*how, torch.zeros(3))
    assert all(np.isfinite(x.item()) for x in logged.values())


def write_pictures(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (8, 8), "red").save(folder / name)


def test_two_pictures_of_one_name_are_an_error(tmp_path):
    """Folder and ending tell them apart for people, not for the texts about them."""
    write_pictures(tmp_path / "own/images", "a.jpg", "own_1.png", "vg_1.webp", "b.bmp", "c.gif")
    store = data.PatchStore(tmp_path, "own", 8, 8)
    assert sorted(store.numbers()) == ["a", "b", "c", "own_1", "vg_1"]
    assert store.readable(np.arange(5)).all()
    write_pictures(tmp_path / "own/images/album", "a.png")
    with pytest.raises(DataError, match=r"a\.jpg and .*a\.png|a\.png and .*a\.jpg"):
        data.PatchStore(tmp_path, "own", 8, 8)


def test_pictures_in_a_linked_folder_are_found(tmp_path):
    write_pictures(tmp_path / "elsewhere", "a.jpg")
    (tmp_path / "own/images").mkdir(parents=True)
    (tmp_path / "own/images/more").symlink_to(tmp_path / "elsewhere")
    assert len(data.PatchStore(tmp_path, "own", 8, 8)) == 1


def index_of(toy_tree, reader, tokenizer=None):
    store = data.RegionStore(toy_tree / "regions/coco")
    words = toy_tree / "bert-base-cased/vocab.txt"
    return data.open_index(
        toy_tree, reader, "train", store, tokenizer or data.WordPiece(words, False)
    )


@pytest.mark.parametrize("how", ["open", "numpy", "gzip"])
def test_a_file_that_a_readers_own_code_opens_is_a_source_of_its_index(toy_tree, tmp_path, how):
    import gzip
    import os

    path, image = tmp_path / "mine", data.RegionStore(toy_tree / "regions/coco").image_id(0)
    write = {"open": lambda t: path.write_text(t), "numpy": lambda t: np.save(path, np.array(t))}
    write["gzip"] = lambda t: path.write_bytes(gzip.compress(t.encode(), mtime=0))
    place = tmp_path / "mine.npy" if how == "numpy" else path
    load = {"open": lambda: open(place).read(), "numpy": lambda: str(np.load(place))}
    load["gzip"] = lambda: gzip.open(place, "rt").read()

    def reader(data, split, stats):
        for i, text in enumerate(load[how]().split("\n")):
            yield Record(image, text, str(i))

    reader.__name__ = f"mine_{how}"
    texts = []
    for number, text in enumerate(
        ("a red circle\na circle", "a red square\na circle", "a red square")
    ):
        write[how](text)
        # a clock may be too coarse to tell two writes apart
        os.utime(place, ns=(number * 10**9, number * 10**9))
        index = index_of(toy_tree, reader)
        texts.append([index.decode(i) for i in range(len(index))])
    assert texts == [["a red circle", "a circle"], ["a red square", "a circle"], ["a red square"]]


@pytest.mark.parametrize("line", ["caption\turl", "a red circle", ""])
def test_a_line_that_is_no_caption_and_address_is_an_error(toy_tree, tmp_path, line):
    """A line of headings, or an empty one, would shift the captions of all pictures after it."""
    good = "a red circle\thttp://a.b/1.jpg\n"
    for name in ("coco", "flickr30k"):
        (tmp_path / name).symlink_to(toy_tree / name)
    (tmp_path / "cc3m").mkdir()
    path = tmp_path / "cc3m/Train_GCC-training.tsv"
    path.write_text(good * 3)
    assert len([*data.records(data.cc3m_captions, tmp_path, "train", Counter())]) == 3
    path.write_text(f"{line}\n{good * 2}")
    with pytest.raises(DataError, match="Train_GCC-training.tsv, line 1"):
        list(data.records(data.cc3m_captions, tmp_path, "train", Counter()))


def test_words_that_the_vocabulary_does_not_know_are_counted(toy_tree):
    image = data.RegionStore(toy_tree / "regions/coco").image_id(0)

    def made_of(text):
        def unknown(data, split, stats):
            yield Record(image, text, "0")

        unknown.__name__ = f"unknown_{len(text)}"
        return str(index_of(toy_tree, unknown))

    assert "UNK" not in made_of("a red circle")
    assert "ATTENTION: 2 of 5 word pieces are [UNK]" in made_of("a красный круг")


def test_one_process_works_in_a_folder_at_a_time(tmp_path):
    """The second waits, says for what, and goes on when the first ends, however it ends."""
    code = (
        "import sys, time, data\n"
        f"with data.alone({str(tmp_path / 'run')!r}):\n"
        "    print('in', flush=True); time.sleep(float(sys.argv[1])); print('out', flush=True)\n"
    )
    begin = lambda seconds: subprocess.Popen(
        [sys.executable, "-c", code, seconds],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    first = begin("60")
    assert first.stdout.readline() == "in\n"
    second = begin("0")
    assert "waiting" in second.stderr.readline()
    first.kill()
    assert second.communicate(timeout=30)[0] == "in\nout\n"
    first.communicate()


def test_both_first_commands_at_once_share_one_pre_training(toy_tree, tmp_path):
    """Two processes begin from one recipe: it is run once, and both end."""
    quick = "steps=3, warmup=1, batch_tokens=256, save_every=1, eval_every=3"
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        f"import train; train.RECIPES['toy-short'].update({quick})\n"
        f"train.RECIPES['toy'].update({quick})\ntrain.main()"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, "--loss", loss, "--size", "tiny", "--data", str(toy_tree)],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for loss in ("none", "cacr")
    ]
    ends = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], ends
    (log,) = Path(tmp_path, "out").glob("toy-short*/log.jsonl")
    assert log.read_text().count('"step": 3,') == 2  # the losses, and the validation


# what a record says of its picture, 100 x 80 in the store; None: it fits
FRAMES = {
    "same": (dict(size=(100, 80), boxes=((0, 0, 9, 9),)), None),
    "rounded": (dict(size=(101, 79)), None),
    "twice as large": (dict(size=(200, 160)), "a picture 200 x 160"),
    "turned": (dict(size=(80, 100)), "a picture 80 x 100"),
    "inside": (dict(boxes=((0, 0, 100, 80.4),)), None),
    "outside": (dict(boxes=((0, 0, 9, 9), (60, 20, 60, 9))), "at least 120 x 29"),
    "shares of it": (dict(boxes=((0.1, 0.2, 1.0, 1.0),)), None),
}


@pytest.mark.parametrize("kind", ["regions", "pictures"])
@pytest.mark.parametrize("name", FRAMES)
def test_boxes_are_in_the_frame_of_their_picture(toy_tree, tmp_path, name, kind):
    """Pictures kept at half their size would leave every box elsewhere, without a word."""
    fields, told = FRAMES[name]
    if kind == "regions":
        writer = evaluate.StoreWriter(tmp_path / "s")
        writer.add("a", (100, 80), boxes=[[0, 0, 9, 9]], features=np.ones((1, 4)))
        writer.commit()
        store = data.RegionStore(tmp_path / "s")
    else:
        write_pictures(tmp_path / "own/images", "a.png")
        Image.new("RGB", (100, 80)).save(tmp_path / "own/images/a.png")
        store = data.PatchStore(tmp_path, "own", 8, 8)
    words = data.WordPiece(toy_tree / "bert-base-cased/vocab.txt", False)
    make = lambda: data.make_index([Record("a", "a circle", "text 7", **fields)], store, words)
    if told:
        with pytest.raises(DataError, match=f"text 7: boxes of {told} pixels, .* 100 x 80"):
            make()
    else:
        assert len(make()) == 1


@pytest.mark.parametrize(
    "reader, split, store",
    [
        (data.entity_captions, "test", "flickr30k"),
        (evaluate.boxed_phrases, "test", "flickr30k"),
        (data.referring_expressions, "val", "refcoco_gt"),
    ],
)
def test_readers_of_boxes_in_pixels_say_of_which_picture(toy_tree, reader, split, store):
    found = data.RegionStore(toy_tree / "regions" / store)
    numbers = found.numbers()
    for record in data.records(reader, toy_tree, split, Counter()):
        assert record.size == found.size(numbers[record.image])


def test_choices_of_other_questions_make_no_number(toy_tree, monkeypatch, capsys):
    published = dict(data.gqa_records(toy_tree, "testdev_all"))
    answers = {name: q["answer"] for name, q in published.items()}
    index = types.SimpleNamespace(arrays={"answered": np.ones(len(answers))})
    said = types.SimpleNamespace(answers=lambda run: answers, index=index)
    run = types.SimpleNamespace(data=toy_tree)
    numbers = evaluate.gqa_numbers(run, "testdev_all", said)
    assert numbers["accuracy"] == 100 and "validity" in numbers and not capsys.readouterr().err
    read_json = evaluate.read_json
    first = next(name for name, q in published.items() if q["isBalanced"])

    def without_one(path):
        return {k: v for k, v in read_json(path).items() if k != first}

    monkeypatch.setattr(evaluate, "read_json", without_one)
    fewer = evaluate.gqa_numbers(run, "testdev_all", said)
    assert fewer == {k: v for k, v in numbers.items() if k not in ("validity", "plausibility")}
    assert f"lacks 1 questions, {first}" in capsys.readouterr().err


def test_damaged_and_repeated_rows_of_a_feature_file(tmp_path, monkeypatch, capsys):
    """One error that names file, line and image; the damaged are left out on request, equal rows
    are kept once, both counted."""
    from test_data import row

    monkeypatch.chdir(tmp_path)
    lines = [row(f"img{i}", n=10, seed=i)[0] for i in range(4)]
    stray = "\t".join(lines[2].split("\t")[:-1] + [lines[2].split("\t")[-1][:20] + "*AAA"])
    other = row("img1", n=10, seed=9)[0]
    for name, rows, told in (
        ("stray", [*lines[:2], stray, lines[3]], "stray.tsv, line 3: .*\n.*\n.*img2"),
        ("twice", [*lines, other], "twice.tsv, line 5: image img1: comes twice and differs, first "),
        ("again", [*lines, lines[1]], None),
    ):
        Path(f"{name}.tsv").write_text("\n".join(rows) + "\n")
        if told:
            with pytest.raises(DataError, match=told):
                evaluate.pack([f"{name}.tsv"], f"{name} all")
        evaluate.main(["pack", f"{name}.tsv", "--out", name, *["--skip-damaged"] * bool(told)])
        ids = data.RegionStore(name).numbers()
        assert list(ids) == [f"img{i}" for i in range(4) if name != "stray" or i != 2]
        said = capsys.readouterr()
        assert ("left out: " in said.err) == bool(told)
        kind = "rows left out: 1" if told else "rows that came twice: 1"
        assert said.out.strip().endswith(kind)
