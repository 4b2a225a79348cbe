"""What would give a wrong number without a word: each case is one error, or is noticed."""

import functools
import os
import pickle
import shutil
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
from conftest import QUICK, ROOT, copied, prepare, run
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
    assert not train.differing(SIZES, dict(SIZES))
    told = train.differing(SIZES, SIZES | {name: CHANGED[name]})
    assert told == f"{name} {SIZES[name]!r} there, {CHANGED[name]!r} here"
    # of a long list what follows where they part
    many = [f"answer {i}" for i in range(3000)]
    told = train.differing({name: [*many, "no", "3"]}, {name: [*many, "zebra", "3"]})
    assert "'no', '3'] there" in told and "'zebra', '3'] here" in told and len(told) < 100
    assert train.differing({}, SIZES).count(" there, ") == len(SIZES)


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
    assert "ATTENTION, is this their vocabulary? 2 of 5 word pieces are [UNK]" in made_of(
        "a красный круг"
    )


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


@pytest.mark.slow
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
    "twice as large": (dict(size=(200, 160)), r"\(200, 160\)"),
    "turned": (dict(size=(80, 100)), r"\(80, 100\)"),
    "inside": (dict(boxes=((0, 0, 100, 80.4),)), None),
    "outside": (dict(boxes=((0, 0, 9, 9), (60, 20, 60, 9))), r"\(120, 29\)"),
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
        with pytest.raises(DataError, match=rf"text 7: boxes in {told} .*\(100, 80\)"):
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
    assert "lacks 1 questions: " in capsys.readouterr().err


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
        ("twice", [*lines, other], "twice.tsv, line 5: image img1: comes twice, differs"),
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


# every benchmark, and a file of it that may hold nothing
EMPTY = {
    "winoground": "winoground/examples.jsonl",
    "sugarcrepe": "sugarcrepe/*.json",
    "sugarcrepe-pp": "sugarcrepe_pp/*.json",
    "valse": "valse/*.json",
    "aro-relation": "aro/visual_genome_relation.json",
    "aro-attribution": "aro/visual_genome_attribution.json",
    "aro-coco-order": "aro/coco_order.json",
    "aro-flickr30k-order": "aro/flickr30k_order.json",
    "whatsup-a": "whatsup/controlled_images_dataset.json",
    "whatsup-b": "whatsup/controlled_clevr_dataset.json",
    "whatsup-coco-one": "whatsup/coco_qa_one_obj.json",
    "whatsup-coco-two": "whatsup/coco_qa_two_obj.json",
    "whatsup-vg-one": "whatsup/vg_qa_one_obj.json",
    "whatsup-vg-two": "whatsup/vg_qa_two_obj.json",
    "colorswap": "colorswap/test.json",
    "bivlc": "bivlc/test.json",
    "retrieval": "flickr30k/dataset_flickr30k.json",
    "entropy": "winoground/examples.jsonl",
    "congruence": "winoground/examples.jsonl",
    "pointing": "flickr30k_entities/test.txt",
    "grounding": "flickr30k_entities/test.txt",
    "figures": "winoground/examples.jsonl",
    "page": "winoground/examples.jsonl",
    "vqa": "vqa2/v2_OpenEnded_mscoco_val2014_questions.json",
    "gqa": "gqa/testdev_all_questions.json",
    "vcr": "vcr1/val.jsonl",
    "nlvr2": "nlvr2/dev.json",
    "ve": "snli_ve/snli_ve_dev.jsonl",
    "re": "refer/refcoco/refs(unc).p",
}
NOTHING = {"retrieval": '{"images": []}', "vqa": '{"questions": []}', "gqa": "{}"}


@pytest.fixture(scope="module")
def made_for(toy_tree):
    """(benchmark) -> a Run of random weights that can do it"""
    recipes = {"pointing": "--recipe toy-albef", "grounding": "--loss maf"}
    recipes |= {name: f"--task {name}" for name in evaluate.TASKS if evaluate.TASKS[name].losses}
    made = {}

    def run_of(name):
        how = recipes.get(name, "--recipe toy-pretrain")
        if how not in made:
            new = prepare(how, "--init none --data", toy_tree, *QUICK)
            made[how] = new.run._replace(model=new.model)
        return made[how]

    return run_of


def benchmark(name, run, out):
    """Its numbers as they are printed"""
    function = evaluate.BENCHMARKS[name]
    takes = evaluate.inspect.signature(function).parameters
    options = {"out": out} if "out" in takes else {}
    numbers = function({"a run": run} if "runs" in takes else run, **options)
    return evaluate.rounded(numbers or {})


def poisoned(value):
    """The same output with one nan in each of its tensors, its last number"""
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
        nan = torch.ones_like(value)
        nan[(-1,) * value.dim()] = float("nan")
        return value * nan
    if hasattr(value, "gradcam"):
        named = {k: poisoned(v) for k, v in value._asdict().items() if k != "gradcam"}
        return value._replace(**named)
    if isinstance(value, tuple):
        parts = list(map(poisoned, value))
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def test_every_benchmark_has_a_row_here():
    assert EMPTY.keys() | {"choices"} == evaluate.BENCHMARKS.keys()


@pytest.mark.parametrize("name", sorted(EMPTY.keys() - {"figures", "page"}))
def test_one_nan_among_the_scores_is_an_error(name, made_for, tmp_path):
    run = made_for(name)
    benchmark(name, run, tmp_path)
    hook = run.model.register_forward_hook(lambda module, args, out: poisoned(out))
    try:
        with pytest.raises((DataError, CheckpointError), match="nan"):
            benchmark(name, run, tmp_path)
    finally:
        hook.remove()


def tree_with(toy_tree, folder, file, change):
    """The tree as links, one file of it a changed copy; change: (bytes) -> bytes"""
    shutil.rmtree(folder, ignore_errors=True)
    first, *rest = Path(file).parts
    found = list((copied(toy_tree, folder, first) / first).glob(str(Path(*rest))))
    assert found
    for path in found:
        path.write_bytes(change(path.read_bytes()))
    return folder


@pytest.mark.parametrize("name", sorted(EMPTY))
def test_a_part_that_is_empty_makes_no_number(name, made_for, toy_tree, tmp_path):
    nothing = NOTHING.get(name, "[]" if EMPTY[name].endswith("json") else "").encode()
    nothing = pickle.dumps([]) if EMPTY[name].endswith(".p") else nothing
    tree = tree_with(toy_tree, tmp_path / "toy", EMPTY[name], lambda content: nothing)
    data.coco_stems.cache_clear()
    run = made_for(name)
    run = run._replace(vision=run.vision._replace(data=str(tree)))
    with pytest.raises((DataError, CheckpointError)):
        print(benchmark(name, run, tmp_path / "out"))


def other_letter(content):
    """One letter in the middle of a line in the middle is another; as many bytes"""
    lines = content.split(b"\n")
    line = lines[len(lines) // 2]
    place = next(i for i in range(len(line) // 2, len(line)) if line[i : i + 1].isalpha())
    new = b"q" if line[place : place + 1] != b"q" else b"x"
    lines[len(lines) // 2] = line[:place] + new + line[place + 1 :]
    return b"\n".join(lines)


def other_answer(content):
    """Two answers have changed places."""
    first, second, *rest = evaluate.json.loads(content)
    return evaluate.json.dumps([second, first, *rest]).encode()


# a run, and the files that its checkpoint means something by: (change, is evaluation refused too?)
VOCABULARY, NAMES = "bert-base-cased/vocab.txt", "vg/{}_vocab.txt"
DEPENDS = {
    "--task vqa --batch-tokens 256": {
        VOCABULARY: (other_letter, True),
        "vqa2/trainval_label2ans.json": (other_answer, False),  # the checkpoint has its own
    },
    "--loss maf --batch-size 8": {
        NAMES.format("objects"): (other_letter, True),
        NAMES.format("attributes"): (other_letter, True),
    },
    "--recipe toy-align --size tiny --batch-tokens 256": {
        "bert-base-uncased/vocab.txt": (other_letter, True),
        NAMES.format("objects"): (other_letter, False),  # of its training alone
        NAMES.format("attributes"): (other_letter, False),
        "lxmert/all_ans.json": (other_answer, False),
    },
}


@pytest.mark.parametrize("how", DEPENDS)
def test_what_a_checkpoint_depends_on_is_known_by_its_content(how, toy_tree, tmp_path):
    quick = "--workers 0 --precision fp32 --warmup 1 --save-every 1 --out run"
    quick = f"{how} --init none {quick}" + " --size tiny" * ("vqa" in how)
    run(tmp_path, f"{quick} --steps 1 --data", toy_tree)
    evaluate.load_run(tmp_path / "run/last.pt", toy_tree)
    for file, (change, refused) in DEPENDS[how].items():
        tree = tree_with(toy_tree, tmp_path / "toy", file, change)
        assert (tree / file).stat().st_size == (toy_tree / file).stat().st_size
        before = (tmp_path / "run/last.pt").read_bytes()
        done = run(tmp_path, f"{quick} --steps 1 --resume --data", tree, expect=None)
        assert done.returncode == 1, file
        assert "was trained with other data" in done.stderr, (file, done.stderr)
        assert (tmp_path / "run/last.pt").read_bytes() == before
        if refused:
            with pytest.raises(CheckpointError, match="choose"):
                evaluate.load_run(tmp_path / "run/last.pt", tree)
    run(tmp_path, f"{quick} --steps 1 --resume --data", toy_tree)


GQA = functools.partial(data.gqa_questions, answers=("yes", "no"))
INDEXED = {
    "coco": (data.coco_corpus, "train", "coco"),
    "vg": (data.vg_descriptions, "train", "vg"),
    "winoground": (data.winoground_examples, "", "winoground"),
    "vqa": (functools.partial(data.vqa_questions, answers=("yes",)), "train2014+val2014", "coco"),
    "gqa": (GQA, "val_balanced", "vg"),
    "refcoco": (data.referring_expressions, "val", "refcoco_gt"),
    "own": (functools.partial(data.own_captions, name="crops"), "val", "pictures"),
    "joined": (functools.partial(data.multitask_vg, answers=("yes",)), "train", "vg"),
}


@pytest.fixture(scope="module")
def whole_copy(toy_tree, tmp_path_factory):
    """The tree, times of files too"""
    place = tmp_path_factory.mktemp("copy") / "toy"
    return shutil.copytree(toy_tree, place, ignore=shutil.ignore_patterns("index"))


@pytest.mark.parametrize("name", INDEXED)
def test_an_index_is_known_by_all_that_its_reader_read(name, whole_copy):
    """Every file that was opened, each array of the store: one byte of it is another."""
    (reader, split, store), tree = INDEXED[name], whole_copy
    words, opened = data.WordPiece(tree / "bert-base-cased/vocab.txt", False), set()
    shutil.rmtree(tree / "index", ignore_errors=True)
    if store == "pictures":
        found = data.PatchStore(tree, "crops", 64, 16)
    else:
        found = data.RegionStore(tree / "regions" / store)
    if name == "joined":  # the last: a file that is not there is a source too
        shutil.rmtree(tree / "flickr30k")
    data.coco_stems.cache_clear()
    listening.append(opened)
    index = data.open_index(tree, reader, split, found, words, skip_missing=True)
    listening.remove(opened)
    (folder,) = (f for f in (tree / "index").iterdir() if f.is_dir() and "pictures" not in f.name)
    sources, key = index.meta["sources"], index.meta["key"]
    read = {str(p.relative_to(tree)) for p in opened if "index" not in p.parts}
    assert {p for p in read if not p.endswith(".npy")} <= sources.keys() and read
    # what is kept is valid wherever the tree is
    moved = tree.rename(tree.with_name("elsewhere")) / "index" / folder.name
    assert data.fresh_meta(moved, key)
    moved.parent.parent.rename(tree)
    assert data.fresh_meta(folder, key)
    for source in sources:
        path = tree / source
        if path.is_dir() or not path.exists():
            path = path / "new" if path.is_dir() else path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("something")
            assert data.fresh_meta(folder, key) is None, source
            path.unlink()
        else:
            whole, times = path.read_bytes(), path.stat()
            changed = bytearray(whole)
            changed[len(whole) // 2] ^= 1
            path.write_bytes(changed)
            assert data.fresh_meta(folder, key) is None, source
            path.write_bytes(whole)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    if not any((tree / source).is_dir() for source in sources):
        assert data.fresh_meta(folder, key)  # all is as it was


# sets of paths that are filled while they are in here
listening = []


def hear(event, args):
    if event == "open" and listening and isinstance(args[0], str) and "/toy/" in args[0]:
        for heard in listening:
            heard.add(Path(args[0]))


sys.addaudithook(hear)


@pytest.mark.parametrize("group", [1, 2])
def test_an_example_that_comes_twice(toy_tree, group):
    """The very same is left out and counted, another of the same id is an error."""
    image = data.RegionStore(toy_tree / "regions/coco").image_id(0)

    def made_of(name, *texts):
        def reader(data, split, stats):
            for number, text in texts:
                for choice in range(group):
                    yield Record(image, f"{text} {choice}", str(number), 1)

        reader.__name__ = f"{name}_{group}"
        store = data.RegionStore(toy_tree / "regions/coco")
        words = data.WordPiece(toy_tree / "bert-base-cased/vocab.txt", False)
        return data.open_index(toy_tree, reader, "train", store, words, group=group)

    index = made_of("same", (1, "a circle"), (2, "a square"), (1, "a circle"), (3, "a circle"))
    assert len(index) == 3 * group and "left out that came twice" in str(index)
    with pytest.raises(DataError, match="other_.*: 2 was example 1, and differs"):
        made_of("other", (1, "a circle"), (2, "a circle"), (2, "a square"))


@pytest.mark.parametrize(
    "settings, head",
    [
        ({"task": "retrieval", "init": "", "pretrain": "mlm"}, "rank"),
        ({"task": "retrieval", "init": "pretrained.pt", "pretrain": "mlm"}, "rank"),
        ({"task": "pretrain", "init": "", "pretrain": "mlm:4+itm:1"}, "match"),
        ({"task": "pretrain", "init": "", "pretrain": "multitask"}, "match"),
        ({"task": "pretrain", "init": "bert.bin", "pretrain": "mlm+mrfr"}, None),
        ({"task": "vqa", "init": "pretrained.pt", "pretrain": "mlm"}, "match"),
        ({"task": "vqa", "init": "", "pretrain": "mlm+itm"}, None),
    ],
)
def test_a_head_that_no_run_has_trained_is_not_asked(settings, head):
    run = types.SimpleNamespace(settings=settings)
    asked = {"rank", "match"} - {head}
    if settings["task"] == "retrieval" and settings["init"]:
        assert evaluate.ranking_head(run, asked.pop()) == "match"
    for other in asked:
        with pytest.raises(CheckpointError, match=f"trained no score {other}"):
            evaluate.ranking_head(run, other)
    if head:
        assert evaluate.ranking_head(run) == evaluate.ranking_head(run, head) == head
    else:
        with pytest.raises(CheckpointError, match="trained no score"):
            evaluate.ranking_head(run)


def test_one_id_for_two_pictures_is_an_error(tmp_path):
    """The captions of one would be learned with the other."""
    (tmp_path / "own").mkdir()
    images = [{"id": 1, "file_name": name} for name in ("a.jpg", "a.jpg", "b.jpg")]
    notes = [{"id": 5, "image_id": 1, "caption": "a circle"}]
    for few, told in ((images[:2], None), (images, "item 2: image 1 was a before, is b")):
        whole = evaluate.json.dumps({"images": few, "annotations": notes})
        (tmp_path / "own/captions_train.json").write_text(whole)
        made = lambda: list(data.records(data.own_captions, tmp_path, "train", Counter()))
        if told:
            with pytest.raises(DataError, match=told):
                made()
        else:
            assert [r.image for r in made()] == ["a"]
