"""Winoground and the benchmarks after it: what counts as right, the official files, bad ones."""

import gzip
import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch

import data
import evaluate
from conftest import copied, inside, read, shared
from data import DataError
from evaluate import CHOICES

TWO = [name for name, row in CHOICES.items() if max(row.image_of) == 1]


def by_hand(s, right):
    """choice_hits of one example, comparison by comparison"""
    T, I = s.shape
    text = all(
        s[t, i] > s[o, i]
        for i in range(I)
        for t in range(T)
        for o in range(T)
        if right[t] == i and right[o] != i
    )
    image = all(
        s[t, right[t]] > s[t, i] for t in range(T) for i in range(I) if right[t] not in (-1, i)
    )
    return text, image


@pytest.mark.parametrize("right", [(0, -1), (0, 0, -1), (0, -1, -1, -1), (0, 1), (1, 0), (0, 1, 1)])
def test_right_is_what_every_comparison_says(right):
    """On scores of few values, so that ties are common"""
    rng = np.random.default_rng(0)
    s = rng.integers(0, 4, (500, len(right), max(right) + 1)).astype(float)
    hits = evaluate.choice_hits(s, right)
    wanted = np.array([by_hand(one, right) for one in s])
    if max(right) == 0:
        assert set(hits) == {"accuracy"} and (hits["accuracy"] == wanted[:, 0]).all()
        assert 0 < wanted[:, 0].mean() < 1
        return
    assert (hits["text"] == wanted[:, 0]).all() and (hits["image"] == wanted[:, 1]).all()
    assert (hits["group"] == wanted.all(axis=1)).all() and wanted.all(axis=1).any()


def ranked(monkeypatch, toy_tree, pretrained, name, score):
    """The benchmark's numbers where an example's texts have score(right) (T, I)"""
    run, right = evaluate.load_run(str(pretrained[0]), toy_tree), CHOICES[name].image_of
    s = score(np.array(right)[:, None] == np.arange(max(right) + 1)).astype(np.float32)
    monkeypatch.setattr(
        evaluate,
        "score_pairs",
        lambda model, index, rows, *more, **how: np.tile(s.ravel(), len(rows) // s.size),
    )
    return evaluate.choose(run, name)


@pytest.mark.parametrize("name", CHOICES)
def test_a_perfect_ranker_a_reversed_and_a_constant_one(monkeypatch, toy_tree, pretrained, name):
    for score, wanted in ((lambda x: x, 100), (lambda x: ~x, 0), (np.zeros_like, 0)):
        numbers = ranked(monkeypatch, toy_tree, pretrained, name, score)
        assert set(numbers.values()) == {wanted}, numbers
    row = CHOICES[name]
    if row.has_mean and name != "aro-attribution":  # a test's tree has not 25 of a kind
        assert f"{name}/mean" in numbers


def test_numbers_are_the_models(toy_tree, pretrained):
    """Every pair scored by itself, one after the other, gives the same"""
    run = evaluate.load_run(str(pretrained[0]), toy_tree)
    for name in ("sugarcrepe-pp", "colorswap"):
        index, notes, s = evaluate.choice_scores(run, name)
        right, n = CHOICES[name].image_of, len(notes)
        T = len(right)
        assert s.shape == (n, T, max(right) + 1) and len(index) == n * T
        for e in (0, n - 1):
            for t in range(T):
                for i in range(s.shape[2]):
                    image = index.image[e * T + right.index(i)]
                    one = evaluate.score_pairs(run.model, index, [e * T + t], [image], "match")
                    assert s[e, t, i] == pytest.approx(one[0], abs=1e-4)


def test_numbers_are_albefs(toy_tree, albef):
    """From pictures, by the head of matching, whatever the batch"""
    run = evaluate.load_run(str(albef[0]), toy_tree)
    for name in ("valse", "bivlc", "aro-relation"):
        index, notes, s = evaluate.choice_scores(run, name)
        right, e, odds = CHOICES[name].image_of, len(notes) - 1, []
        rows = e * len(right) + np.arange(len(right))
        for i in range(s.shape[2]):
            pixels = index.store.pixels(index.image[[rows[right.index(i)]] * len(rows)])
            text, mask = (torch.from_numpy(x) for x in index.text(rows))
            pictures = data.normalize_pixels(torch.tensor(pixels))
            image_of = torch.arange(len(rows))
            with torch.no_grad():
                match = run.model.eval()(text, mask, pictures, image_of, heads=("match",)).match
            odds.append((match[:, 1] - match[:, 0]).numpy())
        np.testing.assert_allclose(s[e].T, odds, atol=1e-4)
        assert len(np.unique(s)) > len(notes) and set(evaluate.choose(run, name))
    none = evaluate.score_pairs(run.model, index, np.zeros(0, int), np.zeros(0, int), "match")
    assert none.shape == (0,)


def noted(monkeypatch, row, notes, hits):
    """choose() of examples with these notes and hits"""
    s = np.stack([np.array([[float(hit)], [0.5]]) for hit in hits])
    monkeypatch.setitem(CHOICES, "made-up", row)
    monkeypatch.setattr(evaluate, "choice_scores", lambda *how: (None, notes, s))
    return {k.removeprefix("made-up/"): v for k, v in evaluate.choose(None, "made-up").items()}


def test_kinds_their_mean_and_sets(monkeypatch):
    """Several with one key are right together; the mean leaves small and named kinds out."""
    row = evaluate.Choices(None, (0, -1), "", has_mean=True, min_count=2, excluded=("near",))
    notes = [{"on": k} for k in range(4)] + [{"near": 4}, {"near": 5}, {"rare": 6}]
    found = noted(monkeypatch, row, notes, [1, 1, 1, 0, 0, 0, 0])
    assert found == {"accuracy": pytest.approx(300 / 7), "mean": 75, "on": 75, "near": 0, "rare": 0}
    notes = [{"set": "a"}, {"set": "a"}, {"set": "b"}, {"set": "b"}]
    row = row._replace(has_mean=False)
    assert noted(monkeypatch, row, notes, [1, 1, 1, 0]) == {"accuracy": 75, "set": 50}


def test_whats_up_pairs_and_sets_are_the_authors(toy_tree, monkeypatch):
    """Their counting over file names: left with right, on with under (in front with behind)"""
    for name, ends in (("whatsup-a", ("on", "under")), ("whatsup-b", ("in-front", "behind"))):
        row = CHOICES[name]
        records, _ = read(row.reader, toy_tree, row.parts[0])
        notes, images = [r.note for r in records[::4]], [r.image for r in records[::4]]
        rng = np.random.default_rng(0)
        hits = rng.random(len(notes)) < 0.8
        found = noted(monkeypatch, row._replace(image_of=(0, -1)), notes, hits)
        right = {}
        for image, hit in zip(images, hits):
            first, how, *_, last = image.split("_")
            right.setdefault((first, last), {})[how] = hit
        assert all(len(of) == 4 for of in right.values())
        pairs = sum(of["left"] and of["right"] for of in right.values())
        pairs += sum(all(of[end] for end in ends) for of in right.values())
        assert found["pair"] == pytest.approx(100 * pairs / (len(notes) / 2))
        sets = sum(all(of.values()) for of in right.values())
        assert found["set"] == pytest.approx(100 * sets / (len(notes) / 4)), name
        assert found["accuracy"] == pytest.approx(100 * hits.mean())


def with_coco(tree, names):
    """A tree whose COCO holds the images of these names"""
    numbers = sorted({int(name[-16:-4]) for name in names})
    images = [
        {"cocoid": n, "filename": f"COCO_val2014_{n:012d}.jpg", "split": "val"} for n in numbers
    ]
    (tree / "coco").mkdir(exist_ok=True)
    (tree / "coco/dataset_coco.json").write_text(json.dumps({"images": images}))
    data.coco_stems.cache_clear()


def test_sugarcrepes_real_files(tmp_path):
    held_out_ids = set()
    for name, total in (("sugarcrepe", 7511), ("sugarcrepe-pp", 4757)):
        folder, counts = name.replace("-", "_"), {}
        shutil.copytree(shared(f"real/{folder}"), tmp_path / folder)
        row, texts = CHOICES[name], len(CHOICES[name].image_of)
        lines = []
        for kind in row.parts:
            with gzip.open(tmp_path / folder / f"{kind}.json.gz", "rt") as file:
                found = json.load(file)
            lines += [e["filename"] for e in (found.values() if name == "sugarcrepe" else found)]
        with_coco(tmp_path, lines)
        for kind in row.parts:
            records, _ = read(row.reader, tmp_path, kind)
            counts[kind] = len(records) // texts
            assert all(r.image.startswith("COCO_val2014_") for r in records)
        wanted = dict(zip(evaluate.SUGARCREPE, (692, 2062, 788, 1652, 1406, 666, 245)))
        assert counts == {kind: wanted[kind] for kind in row.parts}
        assert sum(counts.values()) == total == len(lines)
        held_out_ids |= {int(line[:12]) for line in lines}
        ids, _, stats = data.held_out(tmp_path)
        assert stats["images held out, SugarCrepe"] == len(held_out_ids) == 1560
        assert held_out_ids <= ids
        # files that come later make an index again
        assert {str(tmp_path / folder) for folder in ("sugarcrepe", "valse")} <= {*data.sources}


def test_valses_real_files(tmp_path):
    shutil.copytree(shared("real/valse"), tmp_path / "valse")
    stats, kept = Counter(), 0
    for part in CHOICES["valse"].parts:
        kept += len(list(data.valse(tmp_path, part, stats))) // 2
    assert kept == 7702 and sum(stats.values()) == 8782 - 7702
    assert {path.name[:-8] for path in (tmp_path / "valse").iterdir()} == {*evaluate.PHENOMENA}


def test_winogrounds_new_tags(toy_tree, tmp_path):
    """All 400 ids of the real file, 172 of them without a tag; each tag is a kind"""
    path = shared("real/winoground/new_tag_assignments.json")
    tags = json.loads(path.read_text())
    lines = (toy_tree / "winoground/examples.jsonl").read_text().splitlines()
    example = json.loads(lines[0])
    (tmp_path / "winoground").mkdir()
    every = [json.dumps(example | {"id": k}) for k in range(400)]
    (tmp_path / "winoground/examples.jsonl").write_text("\n".join(every))
    shutil.copy(path, tmp_path / "winoground")
    records, _ = read(data.winoground_examples, tmp_path, "")
    own = {example["collapsed_tag"], example["secondary_tag"]}
    new = [{*r.note} - own for r in records[::2]]
    assert len(new) == 400 and sum(not found for found in new) == 172
    assert all(found == set(tags[str(k)]) for k, found in enumerate(new))


def test_toy_captions_say_what_the_file_says(toy_tree):
    """Of every benchmark of the toy tree: the texts of an example are all different"""
    for name, row in CHOICES.items():
        for part in row.parts:
            records, _ = read(row.reader, toy_tree, part)
            T = len(row.image_of)
            for at in range(0, len(records), T):
                texts = [r.text for r in records[at : at + T]]
                assert len({*texts}) == T or "order" in name, (name, texts)


def broken(toy_tree, tmp_path, path, change):
    """A tree in which one file has been changed"""
    tree = copied(toy_tree, tmp_path / "tree", path.split("/")[0])
    file = tree / path
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    return tree


@pytest.mark.parametrize(
    "name, path, change, said",
    [
        ("sugarcrepe", "sugarcrepe/swap_att.json", lambda x: "none", "swap_att.json, entry 0"),
        ("sugarcrepe", "sugarcrepe/swap_att.json", lambda x: [{"file": 1}], "no field 'filename'"),
        (
            "sugarcrepe",
            "sugarcrepe/swap_att.json",
            lambda x: {"0": x["0"] | {"filename": "000000999999.jpg"}},
            "is no image of coco/dataset_coco.json",
        ),
        ("valse", "valse/plurals.json", lambda x: {"a": {"mturk": 3}}, "plurals.json, entry a"),
        (
            "aro-relation",
            "aro/visual_genome_relation.json",
            lambda x: [x[0] | {"bbox_x": "a"}],
            "_a_",
        ),
        (
            "aro-coco-order",
            "aro/coco_order.json",
            lambda x: [x[0] | {"caption_options": ["a"]}],
            "coco_order.json, entry 0",
        ),
        (
            "whatsup-a",
            "whatsup/controlled_images_dataset.json",
            lambda x: [x[0] | {"caption_options": x[0]["caption_options"][:3]}],
            "controlled_images_dataset.json, entry 0",
        ),
        (
            "whatsup-coco-one",
            "whatsup/coco_qa_one_obj.json",
            lambda x: [[1, "a"]],
            "coco_qa_one_obj.json, entry 0",
        ),
        ("colorswap", "colorswap/test.json", lambda x: [{"id": 0}], "no field 'image_1'"),
        (
            "bivlc",
            "bivlc/test.json",
            lambda x: [x[0] | {"image": "images/none.jpg"}],
            "no features",
        ),
    ],
)
def test_bad_files(toy_tree, pretrained, tmp_path, name, path, change, said):
    """One clear error that names the file or the image"""
    tree = broken(toy_tree, tmp_path, path, change)
    data.coco_stems.cache_clear()
    with pytest.raises(DataError) as error:
        evaluate.choose(evaluate.load_run(str(pretrained[0]), tree), name)
    assert said in str(error.value), error.value
    data.coco_stems.cache_clear()


def test_crops_are_cut_where_the_boxes_are(toy_tree, tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(toy_tree / "aro", tree / "aro")
    shutil.rmtree(tree / "aro/crops")
    text = inside(tmp_path, ["crops", "--data", "tree"], main=evaluate.main)
    records = json.loads((tree / "aro/visual_genome_relation.json").read_text())
    assert json.loads(str(text.stdout).strip())["crops"] == 2 * len(records)
    for e in records:
        x, y, w, h = (e[f"bbox_{side}"] for side in "xywh")
        name = f"{e['image_path'].split('.')[0]}_{x}_{y}_{w}_{h}.png"
        crop = np.array(data.read_picture(tree / "aro/crops" / name))
        whole = np.array(data.read_picture(tree / "aro/images" / e["image_path"]))
        assert (crop == whole[y : y + h, x : x + w]).all()


def test_all_benchmarks_whose_files_are_there(toy_tree, pretrained, tmp_path, capsys):
    """The others are said; none at all is an error."""
    tree = copied(toy_tree, tmp_path / "tree")
    for folder in ("valse", "aro", "whatsup", "sugarcrepe", "sugarcrepe_pp", "bivlc"):
        (tree / folder).unlink()
    how = ["--task choices --ckpt", pretrained[0], "--data", tree]
    done = inside(tmp_path, how, main=evaluate.main)
    found = json.loads(str(done.stdout).strip().splitlines()[-1])
    assert {name.split("/")[0] for name in found} == {"winoground", "colorswap"}
    assert "valse left out" in done.stderr and "aro-coco-order left out" in done.stderr
    for folder in ("winoground", "colorswap"):
        (tree / folder).unlink()
    done = inside(tmp_path, how, main=evaluate.main)
    assert done.returncode and "no benchmark could be read" in done.stderr
