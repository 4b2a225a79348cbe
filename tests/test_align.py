"""Two streams, word-object alignment and MAF: readers, batches, soft targets, evaluation, twenty
steps of everything, and bad input.
"""

import json
from collections import Counter

import numpy as np
import pytest
import torch

import data
import evaluate
import losses
import train
from conftest import (
    QUICK,
    argv,
    copied,
    ROOT,
    inside,
    last_line,
    prepared_run,
    read,
    run,
    run_and_stop,
    same,
    shared,
    weights,
)
from data import DataError, make_index
from model import Lxmert, Maf, Uniter, load_pretrained


def prepared(toy_tree, *args):
    how = "--precision fp32 --init none --workers 0"
    cfg = train.parse(argv(how, "--data", toy_tree, *args))
    runtime, tokenizer = train.setup_runtime(cfg), train.load_tokenizer(cfg)
    return cfg, runtime, tokenizer, train.load_streams(cfg, runtime, prepared_run(cfg, tokenizer))


def built(cfg, runtime, tokenizer, streams):
    """The model of prepared()"""
    answers = prepared_run(cfg, tokenizer).settings["answer_list"]
    sizes = train.model_sizes(cfg, tokenizer, streams, answers)
    return train.build_model(cfg, runtime, tokenizer, sizes)


# ---------------------------------------------------------------------------------------- readers


def test_glove_keeps_the_words_asked_for(tmp_path):
    path = tmp_path / "glove.txt"
    path.write_text(
        "the 1 2 3\n. . . 4 5 6\ncup 0.5 -1 2e-1\ncafé 7 8 9\ncup 9 9 9\n. 1 1 1\n",
        encoding="utf-8",
    )
    found = evaluate.glove(path, ["cup", "café", ".", "absent"])
    assert set(found) == {"cup", "café", "."}
    np.testing.assert_allclose(found["cup"], [0.5, -1, 0.2])  # the first of two
    np.testing.assert_allclose(found["."], [1, 1, 1])  # not the token of three dots


@pytest.mark.parametrize(
    "line, told",
    [
        ("cup 1 2", "line 2: 2 numbers where the first line has 3"),
        ("cup 1 2 x", "line 2: could not convert"),
        ("cup", "line 2: 0 numbers"),
    ],
)
def test_glove_lines_that_cannot_be(tmp_path, line, told):
    (tmp_path / "glove.txt").write_text(f"the 1 2 3\n{line}\n")
    with pytest.raises(DataError, match=told):
        evaluate.glove(tmp_path / "glove.txt", ["cup"])


SENTENCES = (
    "[/EN#1/people A girl] holds [/EN#2/other a kite] near [/EN#0/notvisual the way] to "
    "[/EN#3/scene the beach] .\n[/EN#1/people/animals She] runs .\n"
)
XML = """<annotation><filename>9.jpg</filename>
<size><width>99</width><height>99</height><depth>3</depth></size>
<object><name>1</name><name>2</name>
<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>10</xmax><ymax>20</ymax></bndbox></object>
<object><name>1</name>
<bndbox><xmin>30</xmin><ymin>5</ymin><xmax>40</xmax><ymax>9</ymax></bndbox></object>
<object><name>4</name>
<bndbox><xmin>30</xmin><ymin>5</ymin><xmax>20</xmax><ymax>9</ymax></bndbox></object>
<object><name>3</name><scene>1</scene><nobndbox>0</nobndbox></object></annotation>"""


def entities_tree(folder, sentences=SENTENCES, xml=XML, unrelated=""):
    root = folder / "flickr30k_entities"
    for name in ("Sentences", "Annotations"):
        (root / name).mkdir(parents=True)
    (root / "Sentences/9.txt").write_text(sentences)
    (root / "Annotations/9.xml").write_text(xml)
    (root / "UNRELATED_CAPTIONS").write_text("#image number\n" + unrelated)
    for split in ("train", "test"):
        (root / f"{split}.txt").write_text("9\n")
    return folder


def test_entities_with_every_quirk(tmp_path):
    """Several boxes of a chain, one box of two chains, a scene, no box, two types, a phrase that
    names nothing, 1-based inclusive boxes.
    """
    tree = entities_tree(tmp_path, unrelated="9 2")
    (first, second), stats = read(data.entity_captions, tree, "test")
    text, phrases = first.note
    assert text == "A girl holds a kite near the way to the beach ." and first.id == "9#0"
    assert first.text == ((0, "A girl"), (1, "a kite"), (2, "the beach"))
    assert [(p.words, p.chain) for p in phrases] == [
        ("A girl", "1"),
        ("a kite", "2"),
        ("the beach", "3"),
    ]
    boxes = [[(0, 1, 10, 20), (29, 4, 40, 9)], [(0, 1, 10, 20)], []]
    assert [p.boxes for p in phrases] == boxes
    assert second.note[1][0].kinds == ("people", "animals")
    records, stats = read(data.entity_captions, tmp_path, "train")
    assert len(records) == 1
    assert stats["captions left out: without a phrase, or not of their image"] == 1


@pytest.mark.parametrize("xml", [XML[:200], XML.replace("<xmin>1</xmin>", "")])
def test_entities_that_are_broken(tmp_path, xml):
    tree = entities_tree(tmp_path, xml=xml)
    with pytest.raises(DataError, match="9.xml"):
        list(data.records(data.entity_captions, tree, "test", Counter()))


def test_real_phrases_are_read_by_the_phraseloc_file():
    """The published test phrases: counts, kinds, and the union rule against the annotation's one
    box.
    """
    phrases = json.loads(shared("real/phraseloc/flickr30k/annotation_test.json").read_text())
    assert len(phrases) == 14_481 and len({p["image"] for p in phrases}) == 4_969
    kinds = Counter(k for p in phrases for k in p["categories"])
    assert (
        kinds["people"] == 5656
        and kinds["instruments"] == 162
        and sum(len(p["categories"]) > 1 for p in phrases) == 77
    )
    boxes = torch.tensor(
        [[x, y, x + w, y + h] for x, y, w, h in (p["box"] for p in phrases)], dtype=torch.float32
    )
    assert (
        evaluate.phrase_accuracy(losses.box_iou(boxes, boxes), [p["categories"] for p in phrases])[
            "accuracy"
        ]
        == 100
    )


def test_real_gqa_answers():
    path = shared("real/lxmert_gqa/trainval_label2ans.json")
    assert len(json.loads(path.read_text())) == 1842


def test_gqa_pointers_mean_what_they_name(toy_tree):
    """The words that point at an object of the scene graph are its colour and shape, or ask for
    it.
    """
    texts, told = read(data.gqa_questions, toy_tree, "train_all")
    scenes = json.loads((toy_tree / "gqa/train_sceneGraphs.json").read_text())
    assert not told["pointers left out: no such object, or a box of no area"]
    seen = Counter()
    for t in texts:
        words = t.text.strip("?").split()
        for first, end, box in t.pointers:
            said = words[first:end]
            graph = scenes[t.image]
            things = graph["objects"].values()
            thing = next(o for o in things if data.relative_box(o, graph) == tuple(box))
            assert set(said) <= {thing["name"], thing["attributes"][0], "shape", "thing"}, (
                t.text,
                said,
                thing,
            )
            seen[tuple(w in (thing["name"], thing["attributes"][0]) for w in said)] += 1
    assert seen[True, True] > 100 and seen[(False,)] > 20
    by_id = dict(data.gqa_records(toy_tree, "train_all"))
    balanced = dict(data.gqa_records(toy_tree, "train_balanced"))
    assert 0.4 < len(balanced) / len(by_id) < 0.8 and all(
        q["isBalanced"] for q in balanced.values()
    )
    assert all(e in by_id for q in by_id.values() for e in q["entailed"])


def test_gqa_pointers_that_lead_nowhere_are_counted(toy_tree, tmp_path):
    tree = copied(toy_tree, tmp_path / "tree", "gqa")
    path, graphs = tree / "gqa/train_balanced_questions.json", tree / "gqa/train_sceneGraphs.json"
    questions, scenes = json.loads(path.read_text()), json.loads(graphs.read_text())
    pointed = [k for k, q in questions.items() if q["annotations"]["question"]]
    questions[pointed[0]]["annotations"]["question"] = {"1": "404"}
    q = questions[pointed[1]]
    scenes[q["imageId"]]["objects"][list(q["annotations"]["question"].values())[0]]["w"] = 0
    path.write_text(json.dumps(questions)), graphs.write_text(json.dumps(scenes))
    texts, told = read(data.gqa_questions, tree, "train_balanced")
    what = "pointers left out: no such object, or a box of no area"
    assert told[what] >= 2 and len(texts) == len(questions)
    done = run(
        tmp_path,
        "--loss align",
        "--data",
        tree,
        "--steps 2 --warmup 0 --batch-tokens 512 --out o",
        *QUICK,
    )
    assert f"{told[what]} {what}" in done.stdout


def test_joined_descriptions_point_at_their_regions(toy_tree):
    texts = list(data.joined_descriptions(toy_tree, Counter()))
    assert Counter(len(t.pointers) for t in texts).keys() == {1, 2, 3}
    images, regions = data.vg_images(toy_tree), {}
    for i in json.loads((toy_tree / "vg/region_descriptions.json").read_text()):
        boxes = [(*data.relative_box(r, images[i["id"]]), r["phrase"]) for r in i["regions"]]
        regions[i["id"]] = {*boxes}
    for t in texts:
        words, at = t.text.split(), 0
        for first, end, box in t.pointers:
            assert first == at and (*box, " ".join(words[first:end])) in regions[int(t.image)]
            at = end + 1
        assert at == len(words) + 1
    assert sum(len(t.pointers) for t in texts) == sum(map(len, regions.values()))
    told = Counter()
    left = list(data.joined_descriptions(toy_tree, told, {texts[0].image}))
    assert (
        texts[0].image not in {t.image for t in left}
        and told["descriptions left out: image held out"]
    )


# ---------------------------------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def together(toy_tree):
    return prepared(toy_tree, "--loss", "align", "--batch-tokens", 700)


def soft_target(batch):
    """(K, N_V) which regions the pointed words of a batch stand for"""
    row, x = batch["aligned_row"], batch["input"]
    similarity = batch["similarity_cls_id"], batch["similarity_attr_id"]
    what = batch["pointer"], x["boxes"][row], *similarity, x["region_mask"][row]
    return losses.soft_alignment_target(*what)


def test_pairs_of_two_images_teach_no_answer_and_no_alignment(together):
    streams = together[3]
    asked = answered = 0
    for stream in streams.train:
        for k in range(6):
            batch = stream[k]
            match = batch["match"].numpy()
            assert match[batch["answered"].numpy()].all() and 0.2 < match.mean() < 0.8
            if "aligned" in batch:
                row, target = batch["aligned_row"], soft_target(batch)
                assert match[row.numpy()].all() and len(batch["aligned"])
                # a word whose object the detector missed, and whose name it does not know, is 0
                x, similar = batch["input"], batch["similarity_cls_id"]
                similar = 0.75 * similar + 0.25 * batch["similarity_attr_id"]
                near = losses.box_iou(batch["pointer"][:, None], x["boxes"][row]) > 0
                possible = ((near | (similar > 1e-6)) & x["region_mask"][row]).any(dim=1)
                assert possible.float().mean() > 0.95
                torch.testing.assert_close(target.sum(-1), possible.float(), atol=1e-3, rtol=0)
                assert not target[~batch["input"]["region_mask"][row]].any()
            asked, answered = asked + match.sum(), answered + len(batch["answered"])
    assert 0.2 < answered / asked < 1


def test_soft_targets_lie_where_the_words_point(together):
    """Mostly on the region that is the thing: its box overlaps the pointer, and its class is the
    word's.
    """
    stream = together[3].train[1]
    right = []
    for k in range(5):
        batch = stream[k]
        row = batch["aligned_row"]
        own, real = batch["input"]["boxes"][row], batch["input"]["region_mask"][row]
        overlap = losses.box_iou(batch["pointer"][:, None], own).masked_fill(~real, 0)
        covered = overlap.amax(dim=1) > 0.5
        same = overlap.argmax(dim=1) == soft_target(batch).argmax(dim=1)
        right.append(same[covered].float().mean().item())
    assert right and np.mean(right) > 0.8


def test_pointers_land_on_their_words(together):
    """The pieces at a pointer's place are those of the word that the sentence has there, whatever
    was cut.
    """
    for stream in together[3].train:
        if not len(stream.index.arrays["pointed_words"]):
            continue
        pairs, k = stream.index, np.arange(0, len(stream.index), 7)
        place, word, box, row = pairs.pointers(k)
        text, names = (
            pairs.text(k)[0].ravel()[place],
            [w.decode() for w in pairs.arrays["pointed_words"]],
        )
        # the toy's words are one piece each; a word's "?" points with it
        said = [pairs.tokenizer.pieces[i] for i in text]
        assert (
            all(piece in (names[w], "?") for piece, w in zip(said, word))
            and said.count("?") <= len(said) / 5
        )
        read_again = {}
        reader = data.multitask_coco if pairs is together[3].train[0].index else data.multitask_vg
        for record in reader(together[0].data, "train", Counter()):
            read_again.setdefault(record.id, set()).update(tuple(p[2]) for p in record.pointers)
        for one, b in zip(row[:200], box):
            boxes = np.array([*read_again[pairs.row(k[one])["id"]]])
            assert (np.abs(boxes - b).max(axis=1) < 1e-6).any()


def test_answers_count_from_half_way(toy_tree):
    cfg, runtime, tokenizer, streams = prepared(
        toy_tree,
        "--loss align --batch-tokens 512 --steps 10 --warmup 0 --answers-start 0.5",
        "--weight-decay 0",
    )
    model = built(cfg, runtime, tokenizer, streams)
    optimizers, batch = train.build_optimizers(cfg, model), streams.train[1][0]
    before = model.task_head[3].weight.clone()
    for step, moves in ((5, False), (6, True)):
        train.train_step(cfg, runtime, model, optimizers, step, [batch])
        assert torch.equal(before, model.task_head[3].weight) != moves


def test_masked_regions_show_zeros_others_or_their_own(together):
    stream, shown = together[3].train[0], Counter()
    for k in range(12):
        batch = stream[k]
        x = batch["input"]["regions"].flatten(0, 1)[batch["masked_regions"]].float()
        shown["zero"] += int((x == 0).all(-1).sum())
        shown["own"] += int((x == batch["region_features"].float()).all(-1).sum())
        shown["all"] += len(x)
    assert 0.7 < shown["zero"] / shown["all"] < 0.9 and 0.03 < shown["own"] / shown["all"] < 0.2


def test_phrase_batches_hold_the_captions_phrases(toy_tree):
    _, _, words, streams = prepared(toy_tree, "--loss", "maf", "--batch-size", 16)
    stream = streams.train[0]
    batch = stream[0]
    x, word_mask = batch["input"], batch["word_mask"]
    assert len(x["labels"]) == len(x["phrases"]) == 16
    assert torch.equal(word_mask, x["phrases"] > 0)
    assert (word_mask.any(-1) == batch["phrase_mask"]).all()
    name = stream.index.row(stream.whole(0)[0][3])["id"]
    notes = {r.id: r.note for r in read(data.entity_captions, toy_tree, "train")[0]}
    shown = [[words.names[i - 2] for i in row if i > 1] for row in x["phrases"][3].tolist()]
    assert [" ".join(s) for s in shown if s] == [p.words for p in notes[name][1]]


# ----------------------------------------------------------------------------------------- models


def tiny(kind, **more):
    torch.manual_seed(0)
    shape = dict(width=16, heads=2, mlp_dim=32, dropout=0.0, **more)
    return (
        Lxmert(30, 8, 5, 4, layers=(1, 1, 2), **shape)
        if kind == "lxmert"
        else Uniter(30, 8, 6, layers=2, **shape)
    ).eval()


def tiny_batch():
    g = torch.Generator().manual_seed(1)
    mask = lambda *n: torch.arange(max(n))[None] < torch.tensor(n)[:, None]
    return dict(
        text=torch.randint(5, 30, (2, 6), generator=g),
        text_mask=mask(6, 4),
        regions=torch.rand(2, 5, 8, generator=g),
        boxes=torch.rand(2, 5, 4, generator=g).sort(-1).values,
        region_mask=mask(3, 5),
    )


def test_padding_changes_nothing_in_two_streams():
    model, x = tiny("lxmert", align=True), tiny_batch()
    spoiled = {
        **x,
        "text": x["text"].masked_fill(~x["text_mask"], 7),
        "regions": x["regions"].masked_fill(~x["region_mask"][..., None], 9.0),
    }
    a, b = (model(**y, heads=("match", "align"), maps=(-2, -1)) for y in (x, spoiled))
    real = x["text_mask"][:, :, None] & x["region_mask"][:, None]
    torch.testing.assert_close(a.match, b.match)
    torch.testing.assert_close(a.alignment[real], b.alignment[real])
    torch.testing.assert_close(
        a.maps[0].S_LV.transpose(0, 1)[:, real], b.maps[0].S_LV.transpose(0, 1)[:, real]
    )


def test_maps_asked_for_change_no_number_and_both_directions_share_weights():
    model, x = tiny("lxmert"), tiny_batch()
    torch.testing.assert_close(
        model(**x, heads=("match",)).match, model(**x, heads=("match",), maps=(-1,)).match
    )
    layer = model.cross_layers[0]
    words, regions = torch.randn(2, 6, 16), torch.randn(2, 6, 16)
    ones = torch.ones(2, 6, dtype=torch.bool)
    layer.region.load_state_dict(layer.text.state_dict())
    a, b, *_ = layer(words, regions, ones, ones)
    c, d, *_ = layer(regions, words, ones, ones)
    torch.testing.assert_close(a, d), torch.testing.assert_close(b, c)


def test_the_aligner_is_equation_12():
    decoder, words, regions = (
        tiny("uniter", align=True).aligner,
        torch.randn(1, 2, 16),
        torch.randn(1, 3, 16),
    )
    A = decoder(words, regions)
    s = decoder.text_norm(words[0, 1] + decoder.text(words[0, 1]))
    o = decoder.region_norm(regions[0, 2] + decoder.region(regions[0, 2]))
    assert A[0, 1, 2].item() == pytest.approx((s @ o).item() / 4, abs=1e-5)


def test_bert_and_another_models_checkpoint_go_in_with_a_report(tmp_path):
    """BERT fills the language stream; UNITER's own parts are told as unused; a wrong width is one
    clear error.
    """
    model = tiny("lxmert")
    official = {
        f"bert.encoder.layer.0.attention.self.{n}.{w}": torch.ones(16, 16)
        if w == "weight"
        else torch.ones(16)
        for n in ("query", "key", "value")
        for w in ("weight", "bias")
    }
    torch.save(official, tmp_path / "bert.bin")
    report = load_pretrained(model, tmp_path / "bert.bin")
    assert (
        (model.text_layers[0].attention.to_q.weight == 1).all()
        and len(report.loaded) == 6
        and "cross_layers.0.cross.to_q.weight" in report.missing
    )


@pytest.mark.parametrize("start", ["zero", "xavier"])
def test_maf_starts_as_told(start):
    """W_f at zero leaves a region at its label; W_p at the identity leaves a phrase nearly as it
    is.
    """
    model = Maf(10, 6, 4, start=(start, "identity"))
    h, v = model(
        torch.tensor([[[1, 2]]]),
        torch.tensor([[3, 4]]),
        torch.tensor([[5, 6]]),
        torch.rand(1, 2, 4),
    )
    assert torch.equal(v, model.word(torch.tensor([[3, 4]]))) == (start == "zero")
    torch.testing.assert_close(model.project(h), h, atol=1e-3, rtol=0)
    alone = Maf(10, 6, 4, inputs=("attribute",))(
        torch.tensor([[[1, 2]]]),
        torch.tensor([[3, 4]]),
        torch.tensor([[5, 6]]),
        torch.rand(1, 2, 4),
    )[1]
    assert alone.shape == (1, 2, 6) and alone.abs().sum() > 0


# ------------------------------------------------------------------------------------------- runs

SMALL = ["--steps", 8, "--warmup", 2, "--log-every", 1]


@pytest.mark.parametrize(
    "argv, told",
    [
        (["--loss", "align"], "align"),
        (["--recipe", "toy-align", "--loss", "none"], "answers"),
        (["--recipe", "toy-align", "--loss", "cacr+align"], "cacr"),
        (["--loss", "maf"], "maf"),
        (
            [
                "--loss maf --region-inputs label+attribute+feature --phrase-pooling average",
            ],
            "maf",
        ),
        (
            ["--loss maf --region-inputs feature --init-w-f xavier --init-w-p xavier"],
            "maf",
        ),
    ],
)
def test_eight_steps(toy_tree, tmp_path, argv, told):
    done = run(
        tmp_path,
        *argv,
        "--data",
        toy_tree,
        "--out o",
        *SMALL,
        *QUICK,
        *(["--batch-size", 32] if told == "maf" else ["--batch-tokens", 512]),
        "--answers-start 0",
    )
    log = [json.loads(line) for line in (tmp_path / "o/log.jsonl").read_text().splitlines()]
    assert all(np.isfinite(list(r.values())).all() for r in log) and any(told in r for r in log), (
        log[-1]
    )
    numbers = last_line(done)
    assert (
        "grounding/upper bound" in numbers
        if told == "maf"
        else "pointing/accuracy" in numbers and "gqa/consistency" in numbers
    )
    assert list((tmp_path / "o/figures").glob("*.png"))


def test_ranking_with_an_alignment_loss_on_two_streams(toy_tree, tmp_path):
    args = "--model lxmert --loss cacr --init none --candidates 8 --batch-tokens 512 --out o"
    done = run(tmp_path, args, "--data", toy_tree, *SMALL, *QUICK)
    log = [json.loads(line) for line in (tmp_path / "o/log.jsonl").read_text().splitlines()]
    values = [line["cacr"] for line in log if "cacr" in line]
    assert values and np.isfinite(values).all() and "winoground/group" in last_line(done)


@pytest.mark.parametrize(
    "loss", ["cacr", "cacr-probs", "iais", "iais-released", "iais-distributed", "wra"]
)
def test_every_alignment_loss_reaches_two_streams(toy_tree, loss):
    """Its gradient reaches the attention of the last cross layer"""
    cfg, runtime, tokenizer, streams = prepared(
        toy_tree, "--model", "lxmert", "--loss", loss, "--batch-tokens", 256, "--candidates", 0
    )
    model = built(cfg, runtime, tokenizer, streams)
    batch = evaluate.to_device(streams.train[0][0], runtime.device)
    terms, _ = train.objective_rank(cfg, model, batch)
    assert terms[loss].isfinite()
    terms[loss].backward()
    layer = model.cross_layers[-1]
    used = (
        layer.cross.to_q.weight.grad
        if loss != "iais" and loss != "iais-released"
        else layer.region.attention.to_q.weight.grad
    )
    assert used is not None and used.abs().sum() > 0


@pytest.mark.parametrize(
    "argv",
    [
        ["--loss", "align"],
        pytest.param(["--loss", "maf"], marks=pytest.mark.slow),
        pytest.param(
            ["--recipe", "toy", "--init", "none", "--loss", "eqsim+hard-rank", "--candidates", 0],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_stopped_and_resumed_is_the_same(toy_tree, tmp_path, argv):
    args = [
        *argv,
        "--data",
        toy_tree,
        "--steps",
        8,
        "--warmup",
        2,
        "--save-every",
        2,
        *(["--batch-size", 64] if "maf" in argv else ["--batch-tokens", 512]),
        *QUICK,
    ]
    run(tmp_path, *args, "--out", "whole")
    run_and_stop(tmp_path, args, "cut")
    run(tmp_path, *args, "--out", "cut", "--resume")
    same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


@pytest.fixture(scope="module")
def aligned(toy_tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("aligned")
    run(
        folder,
        "--loss align",
        "--data",
        toy_tree,
        "--steps 20 --warmup 2 --batch-tokens 512 --out run",
        *QUICK,
    )
    return folder / "run/last.pt"


@pytest.mark.parametrize(
    "argv",
    [
        ["--task", "gqa"],
        ["--task", "nlvr2", "--model", "lxmert", "--nlvr2-head", "pair-mlp", "--no-cased"],
        ["--task", "vqa", "--model", "lxmert", "--no-cased"],
    ],
)
def test_fine_tuning_from_two_streams(toy_tree, tmp_path, aligned, argv):
    done = run(
        tmp_path,
        *argv,
        "--init",
        aligned,
        "--data",
        toy_tree,
        "--out o",
        *SMALL,
        "--batch-tokens 512",
        *QUICK,
    )
    assert f"{argv[1]}/accuracy" in last_line(done)
    assert "text_layers" not in done.stdout.split("missing")[1].splitlines()[0]


def evaluated(tmp_path, *argv, expect=0):
    done = inside(tmp_path, argv, evaluate.main)
    assert done.returncode == expect, done.stderr[-2000:]
    return done


def test_evaluation_of_checkpoints(toy_tree, tmp_path, aligned):
    """GQA without fine-tuning, its submission, pointing, and figures of two models beside each
    other.
    """
    ask = lambda task, *more: evaluated(tmp_path, f"--task {task} --data", toy_tree, *more)
    numbers = lambda done: json.loads(done.stdout.splitlines()[-1])
    rows = ask("gqa", "--submit s.json --ckpt", aligned)
    sent = json.loads((tmp_path / "s.json").read_text())
    assert {r["questionId"] for r in sent} == {*dict(data.gqa_records(toy_tree, "testdev_all"))}
    assert "gqa/accuracy" in rows.stdout
    assert "pointing/accuracy" in ask("pointing", "--ckpt", aligned).stdout
    val = numbers(ask("gqa", "--split val_all --ckpt", aligned))
    assert val["gqa/consistency"] >= 0 and val["gqa/validity"] > 0
    ask("figures", "--out f --ckpt", aligned, aligned)
    assert len(list((tmp_path / "f").glob("map_*.png"))) == 4
    run(tmp_path, "--loss maf", "--data", toy_tree, "--steps 5 --batch-size 32 --out m", *QUICK)
    phrases = numbers(ask("grounding", "--ckpt m/last.pt"))
    assert phrases["grounding/accuracy"] <= phrases["grounding/upper bound"] <= 100
    assert phrases["grounding/whole image"] < 10
    how = "--task grounding --data", toy_tree, "--ckpt", aligned
    told = evaluated(tmp_path, *how, expect=1).stderr
    assert "grounding needs phrases, this model gives attention" in told


# ------------------------------------------------------------------------------------- evaluation


def test_baselines_by_hand():
    """Two discs and a square; the larger disc is chosen among equals."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [40, 40, 60, 60], [45, 45, 55, 55]])
    vectors = {"red": [0.0, 1], "disc": [1.0, 0], "square": [0.6, 0.8], "circle": [0.95, 0.3]}
    vectors = {word: torch.tensor(vector) for word, vector in vectors.items()}

    def chosen(phrase):
        labels, rng = ["disc", "disc", "square"], np.random.default_rng(0)
        scores = evaluate.baselines(phrase, labels, boxes, (100, 100), vectors, rng)
        return {m: int(evaluate.best_box(s[None], boxes)[0]) for m, s in scores.items()}

    boxes_of = chosen(["red", "circle"])
    assert boxes_of["center-obj"] == boxes_of["max-obj"] == boxes_of["glove-max"] == 1
    # nothing matches: the largest of all
    assert boxes_of["direct match"] == 1 and boxes_of["glove-avg"] == 2
    assert chosen(["square"])["direct match"] == 2
    # a word without a vector is like nothing
    assert chosen(["blue"])["glove-max"] == 1


def test_pointing_of_a_perfect_and_of_a_blind_attention(toy_tree, monkeypatch):
    _, _, tokenizer, _ = prepared(toy_tree, "--loss", "align", "--batch-tokens", 512)
    texts = [t for t in read(data.gqa_questions, toy_tree, "val_balanced")[0] if t.pointers]
    pairs = make_index(texts, data.RegionStore(toy_tree / "regions/vg"), tokenizer)

    def attention(perfect):
        def fake(run, pairs, captions):
            for c in captions:
                one = np.array([c])
                batch = data.to_device(pairs.batch(one, pairs.image[one]))
                place, _, box, _ = pairs.pointers(one)
                P = torch.zeros(1, batch["text"].shape[1], batch["boxes"].shape[1])
                for p, b in zip(place, box):
                    overlap = losses.box_iou(torch.from_numpy(b), batch["boxes"][0])
                    P[0, p] = overlap if perfect else -overlap
                yield one, batch, P

        return fake

    monkeypatch.setattr(evaluate, "word_to_region", attention(True))
    found = evaluate.pointing(None, pairs)
    # two pointers of one word may differ
    assert found["pointing/accuracy"] > 99 and 15 < found["pointing/chance"] < 60
    monkeypatch.setattr(evaluate, "word_to_region", attention(False))
    assert evaluate.pointing(None, pairs)["pointing/accuracy"] < 12


def test_a_word_points_right_from_half_an_overlap_on(toy_tree, monkeypatch):
    """IoU 0.6 with the pointer counts, 0.4 does not; a word without a right region is left out."""
    box = 0, 0, 100 / 240, 100 / 180
    records = [data.Record("2000003", "red circle", "a", pointers=((0, 1, box),))]
    _, _, tokenizer, _ = prepared(toy_tree, "--loss", "align", "--batch-tokens", 512)
    index = make_index(records, data.RegionStore(toy_tree / "regions/vg"), tokenizer)
    boxes = torch.tensor([[[0, 0, 100, 60], [0, 0, 100, 40], [200, 100, 210, 110]]]) / torch.tensor(
        [240.0, 180, 240, 180]
    )

    def looks_at(region):
        def fake(run, index, captions):
            P = torch.zeros(1, 4, 3)
            P[0, :, region] = 1
            mask = torch.ones(1, 3, dtype=torch.bool)
            yield np.array([0]), {"boxes": boxes, "region_mask": mask}, P

        monkeypatch.setattr(evaluate, "word_to_region", fake)
        return evaluate.pointing(None, index)

    assert [looks_at(region)["pointing/accuracy"] for region in range(3)] == [100, 0, 0]
    assert looks_at(0)["pointing/chance"] == pytest.approx(100 / 3)


def test_gqa_needs_the_entailed_predictions():
    z = json.loads((ROOT / "tests/golden/gqa_metrics.json").read_text())
    said = {k: v for k, v in z["predictions"].items() if k != "q9"}
    with pytest.raises(DataError, match="q9 has no prediction"):
        evaluate.gqa_scores(z["questions"], said)


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "argv, told",
    [
        (["--loss", "aling"], "did you mean align?"),
        (["--loss", "align", "--recipe", "toy"], "words point at boxes"),
        (["--loss", "maf", "--recipe", "toy"], "--loss maf, which chooses"),
        (["--recipe", "toy-align", "--model", "uniter"], "--model uniter with --vision regions"),
        (
            ["--recipe", "toy-pretrain", "--model", "lxmert", "--pretrain", "mlm+mrckl"],
            "Wanted: mlm itm mrfr wra multitask",
        ),
        (["--model", "lxmert", "--size", "large"], "There are: tiny, toy, base"),
        (["--loss", "maf", "--region-inputs", "label+colour"], "'colour' is not known"),
        (["--loss", "align", "--answers-start", "2"], "0 to 1"),
    ],
)
def test_settings_that_cannot_be(toy_tree, tmp_path, argv, told):
    done = run(tmp_path, *argv, "--data", toy_tree, expect=1)
    assert told in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "broken, told",
    [
        ("glove/glove.6B.300d.txt", "glove.6B.300d.txt, line"),
        ("gqa/train_sceneGraphs.json", "train_sceneGraphs.json"),
        ("gqa/train_balanced_questions.json", "train_balanced_questions.json"),
    ],
)
def test_cut_files_are_told(toy_tree, tmp_path, broken, told):
    tree = copied(toy_tree, tmp_path / "tree", broken.split("/")[0])
    path = tree / broken
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    done = run(tmp_path, "--loss", "align", "--data", tree, *QUICK, expect=1)
    assert (
        told in done.stderr
        and "Traceback" not in done.stderr
        and not (tmp_path / "out").exists()
        or not list((tmp_path / "out").rglob("last.pt"))
    )


def test_a_detector_of_other_names_is_told(toy_tree, tmp_path):
    tree = copied(toy_tree, tmp_path / "tree", "vg")
    (tree / "vg/objects_vocab.txt").write_text("disc\nsquare\n")
    done = run(
        tmp_path, "--loss align", "--data", tree, "--steps 5 --batch-tokens 512", *QUICK, expect=1
    )
    assert "only 2 names" in done.stderr and "Traceback" not in done.stderr
