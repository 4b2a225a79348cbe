"""Files of the toy tree changed at random: whatever reads them ends well or with one clear error.

A file is cut, bytes of it are flipped, a field of it is of another kind or gone, an array of it has
another type or shape; read by readers, packed, evaluated at the end of a run, resumed from. 500
cases; a case that ends in a stack trace is named by its seed.
"""

import functools
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import evaluate
import toy
from conftest import QUICK, inside, read
from model import CheckpointError, Detector
from test_data import row as feature_row
from test_detector import SMALL

ANSWERS = ("yes", "no", "red")


def records(reader, *splits):
    """Reads all splits of a data set to the end."""
    return lambda tree: read(reader, tree, "+".join(splits))


def words_of(tree):
    return data.WordPiece(tree / "bert-base-cased/vocab.txt", lower=False)


def index_of(reader, split, store):
    """Reads, tokenizes and batches."""

    def make(tree):
        region_store = data.Vision(str(tree), str(tree / "regions")).open(store)
        index = data.open_index(str(tree), reader, split, region_store, words_of(tree))
        list(index.in_chunks(np.arange(len(index)), np.asarray(index.image), 4096))

    return make


def store_of(name):
    """Opens a region store and reads all of its columns."""

    def make(tree):
        store = data.RegionStore(tree / "regions" / name)
        store.check_classes()
        for column in store.arrays.keys() & data.COLUMNS.keys():
            store.read(np.arange(len(store)), column)
        store.relative_boxes(np.arange(len(store)))

    return make


def phrases(tree):
    """MAF's tokenizer and input"""
    names = data.detector_names(str(tree), "objects") + data.detector_names(str(tree), "attributes")
    words = evaluate.WordVectors(sorted(set(names)), str(tree))
    store = data.RegionStore(tree / "regions/flickr30k")
    index = data.open_index(str(tree), data.entity_captions, "val", store, words, layout="phrases")
    evaluate.PhraseInput(str(tree), index)(np.arange(4), index.image[:4])


def choices_of(name):
    """Reads and indexes a benchmark of choices, and what its examples count for."""

    def make(tree):
        row = evaluate.CHOICES[name]
        data.coco_stems.cache_clear()
        texts, _ = read(row.reader, tree, "+".join(row.parts))
        data.make_index(texts, data.RegionStore(tree / "regions" / row.store), words_of(tree))
        assert all(hash((kind, which)) for r in texts for kind, which in r.note.items())

    return make


def packed(tree):
    """Packs what is in tree/features."""
    evaluate.pack([tree / "features/a.tsv", tree / "features/npz"], tree / "packed")
    store_of("../packed")(tree)


def extracted(tree):
    """Features of the pictures in tree/photos, by a small detector, and packed"""
    folder = tree / "photos"
    sizes = {"shorter": 64, "longer": 96}
    evaluate.extract(folder, folder / "detector.bin", tree / "npz", (2, 6), **sizes)
    evaluate.pack([tree / "npz"], tree / "packed")
    store_of("../packed")(tree)


def trained(*args):
    """The end of a run of no updates, which evaluates, or a run that goes on"""
    options = "--recipe toy-pretrain --init none --warmup 1 --batch-tokens 256 --save-every 1"

    def make(tree):
        done = inside(tree, [*args, options, "--data", tree, "--out run", *QUICK])
        if done.returncode:
            *_, traceback = done.stderr.partition("Traceback")
            raise RuntimeError(traceback[-150:]) if traceback else data.DataError(done.stderr)

    return make


vqa = functools.partial(data.vqa_questions, answers=ANSWERS)
gqa = functools.partial(data.gqa_questions, answers=ANSWERS)
refer = functools.partial(data.referring_expressions, dataset="refcoco")
vcr = functools.partial(data.vcr_choices, parts=("qa", "qar", "all"))
READS = {
    "coco/annotations/captions_val2014.json": index_of(data.coco_captions, "val2014", "coco"),
    "coco/dataset_coco.json": index_of(data.karpathy_captions, "val", "coco"),
    "winoground/examples.jsonl": records(data.winoground_examples, ""),
    "sugarcrepe/swap_att.json": choices_of("sugarcrepe"),
    "sugarcrepe_pp/swap_att.json": choices_of("sugarcrepe-pp"),
    "valse/plurals.json": choices_of("valse"),
    "aro/visual_genome_relation.json": choices_of("aro-relation"),
    "aro/visual_genome_attribution.json": choices_of("aro-attribution"),
    "aro/coco_order.json": choices_of("aro-coco-order"),
    "whatsup/controlled_clevr_dataset.json": choices_of("whatsup-b"),
    "whatsup/coco_qa_two_obj.json": choices_of("whatsup-coco-two"),
    "colorswap/test.json": choices_of("colorswap"),
    "bivlc/test.json": choices_of("bivlc"),
    "vg/paraphrases.json": records(data.vg_paraphrases, "train"),
    "vg/image_data.json": records(data.vg_descriptions, "train"),
    "vg/region_descriptions.json": records(data.vg_descriptions, "train"),
    "vg/attributes.json": records(data.vg_triplets, "train"),
    "vg/question_answers.json": records(vqa, "vg"),
    "vg/objects_vocab.txt": phrases,
    "vg/attributes_vocab.txt": phrases,
    "cc3m/Validation_GCC-1.1.0-Validation.tsv": records(data.cc3m_captions, "val"),
    "sbu/SBU_captioned_photo_dataset_captions.txt": records(data.sbu_captions, "train"),
    "vqa2/v2_OpenEnded_mscoco_val2014_questions.json": records(vqa, "val2014"),
    "vqa2/v2_mscoco_val2014_annotations.json": records(vqa, "val2014"),
    "vcr1/val.jsonl": records(vcr, "val"),
    "nlvr2/dev.json": records(data.nlvr2_pairs, "dev"),
    "snli_ve/snli_ve_dev.jsonl": records(data.entailment_pairs, "dev"),
    "refer/refcoco/refs(unc).p": records(refer, "val"),
    "refer/refcoco/instances.json": records(refer, "val"),
    "gqa/val_balanced_questions.json": records(gqa, "val_balanced"),
    "gqa/val_sceneGraphs.json": records(gqa, "val_balanced"),
    "flickr30k_entities/val.txt": records(data.entity_captions, "val"),
    "glove/glove.6B.300d.txt": phrases,
    "bert-base-cased/vocab.txt": index_of(data.coco_captions, "val2014", "coco"),
    "regions/flickr30k": phrases,
    "regions/coco": store_of("coco"),
    "regions/vg": store_of("vg"),
    "crops/captions_val.json": records(functools.partial(data.own_captions, name="crops"), "val"),
    "vqa2/trainval_label2ans.json": evaluate.TASKS["vqa"].answers,
    "lxmert/all_ans.json": evaluate.all_answers,
    "features/a.tsv": packed,
    "features/npz/b.npz": packed,
    "photos/a.jpg": extracted,
    "photos/detector.bin": extracted,
    "winoground/new_tag_assignments.json": trained("--steps 0"),
    "run/last.pt": trained("--steps 2 --resume"),
    "run/log.jsonl": trained("--steps 2 --resume"),
}


@pytest.fixture(scope="module")
def small_detector():
    """evaluate.py's detector is small, as the weights are."""
    patch = pytest.MonkeyPatch()
    patch.setattr(Detector, "SIZES", Detector.SIZES | SMALL)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def tree(tmp_path_factory, small_detector):
    folder = tmp_path_factory.mktemp("mutations") / "toy"
    toy.make_toy(folder, scenes=100)
    for name in ("features/npz", "index", "photos"):
        (folder / name).mkdir(parents=True)
    lines, boxes = (
        [feature_row(f"img{i}", n=10)[0] for i in range(3)],
        np.tile(np.eye(4)[3], (10, 1)),
    )
    (folder / "features/a.tsv").write_text("\n".join(lines))
    arrays = {"features": np.ones((10, 8)), "norm_bb": boxes, "soft_labels": np.eye(10, 6)}
    np.savez(folder / "features/npz/b.npz", **arrays, conf=np.ones(10), wh=(8, 8))
    tags = {str(e): ["NonMinimal"] for e in range(6)}
    (folder / "winoground/new_tag_assignments.json").write_text(json.dumps(tags))
    for name, path in zip("ab", sorted((folder / "vg/VG_100K").iterdir())):
        shutil.copy(path, folder / f"photos/{name}{path.suffix}")
    torch.save(Detector().state_dict(), folder / "photos/detector.bin")
    trained("--steps 2")(folder)
    # as if it had been killed half way
    saved = torch.load(folder / "run/last.pt", weights_only=True)
    torch.save(saved | {"step": 1}, folder / "run/last.pt")
    (folder / "run/done.json").unlink()
    return folder


def nodes(value, path=()):
    """All places in a JSON value."""
    yield path
    children = enumerate(value) if isinstance(value, list) else ()
    for key, child in value.items() if isinstance(value, dict) else children:
        yield from nodes(child, (*path, key))


def change_json(rng, value):
    """One place of another kind, or gone."""
    places = list(nodes(value))[1:]
    if not places:
        return "unchanged", ()
    path = places[int(rng.integers(len(places)))]
    owner = functools.reduce(lambda v, key: v[key], path[:-1], value)
    if rng.random() < 0.25:
        del owner[path[-1]]
        return "gone", path
    kinds = [None, "text", "", 7, -1, 2.5, [], ["a"], {}, {"a": 1}, True]
    owner[path[-1]] = kinds[int(rng.integers(len(kinds)))]
    return repr(owner[path[-1]]), path


def change_bytes(rng, content):
    """Cut, or a few bytes flipped, or a line blank or doubled."""
    how = int(rng.integers(4))
    if how == 0:
        return "cut", content[: int(rng.integers(len(content)))]
    if how == 1:
        flipped = bytearray(content)
        for at in rng.integers(len(flipped), size=3):
            flipped[at] ^= int(rng.integers(1, 256))
        return "flipped", bytes(flipped)
    lines = content.split(b"\n")
    at = int(rng.integers(len(lines)))
    lines[at : at + 1] = [b""] if how == 2 else [lines[at], lines[at]]
    return ("blank line", "line twice")[how - 2], b"\n".join(lines)


def change_array(rng, folder):
    """A column gone, of another type or shape, or its file broken."""
    path = sorted(folder.glob("*.npy"))[int(rng.integers(len(list(folder.glob("*.npy")))))]
    how = int(rng.integers(5))
    values = np.load(path)
    if how == 0:
        path.unlink()
    elif how == 1:
        text = values.dtype.kind == "S"
        np.save(path, values.astype(np.int64 if not text else "U8") if not text else values[:-1])
    elif how == 2:
        np.save(path, values[:-1])
    elif how == 3:
        np.save(path, values[..., None])
    else:
        path.write_bytes(change_bytes(rng, path.read_bytes())[1])
    return f"{path.name}, {('gone', 'type', 'shorter', 'shape', 'bytes')[how]}"


def change_npz(rng, path):
    """An array gone, shorter, of another type or shape, or not a number"""
    arrays = dict(np.load(path))
    name, kind = sorted(arrays)[int(rng.integers(len(arrays)))], int(rng.integers(5))
    values = arrays.pop(name)
    changed = values[:-1], values.astype("U8"), values[None], np.full(values.shape, np.nan)
    arrays |= {name: changed[kind]} if kind < 4 else {}
    np.savez(path, **arrays)
    return f"{name}, {('shorter', 'type', 'shape', 'nan', 'gone')[kind]}"


def mutate(rng, path):
    """Changes a file, or a region store's folder; returns what was done."""
    if path.is_dir():
        return change_array(rng, path)
    content = path.read_bytes()
    if path.suffix == ".npz" and rng.random() < 0.7:
        return change_npz(rng, path)
    if path.suffix in (".json", ".jsonl") and rng.random() < 0.7:
        is_lines = path.suffix == ".jsonl" or path.parent.name == "nlvr2"
        lines = content.decode().splitlines() if is_lines else [content.decode()]
        at = int(rng.integers(len(lines)))
        value = json.loads(lines[at])
        what = change_json(rng, value)
        lines[at] = json.dumps(value)
        path.write_text("\n".join(lines))
        return str(what)
    what, content = change_bytes(rng, content)
    path.write_bytes(content)
    return what


def copy_of(tree, name, folder):
    """The tree as links, the one file or store that will be changed as a copy."""
    target = folder / name
    for path in tree.iterdir():
        if path.name not in (Path(name).parts[0], "index"):
            (folder / path.name).symlink_to(path)
    at, source = folder, tree
    for part in Path(name).parts[:-1]:
        at, source = at / part, source / part
        at.mkdir(exist_ok=True)
        for path in source.iterdir():
            if path.name not in Path(name).parts:
                # a run writes into its folder
                (shutil.copy if path.is_file() and at.name == "run" else os.symlink)(
                    path, at / path.name
                )
    (shutil.copytree if (tree / name).is_dir() else shutil.copy)(tree / name, target)
    return target


@pytest.mark.slow
@pytest.mark.parametrize("name", READS)
def test_a_changed_file_ends_well_or_with_one_clear_error(tree, tmp_path, name):
    bad, ended = [], Counter()
    for seed in range(-(-500 // len(READS))):
        rng, folder = np.random.default_rng([seed, *name.encode()]), tmp_path / str(seed)
        folder.mkdir()
        what = mutate(rng, copy_of(tree, name, folder))
        try:
            READS[name](folder)
            ended["well"] += 1
        except (data.DataError, CheckpointError) as error:
            ended["error"] += 1
            assert "Traceback" not in str(error) and len(str(error)) < 2000
        except Exception as error:
            bad.append(f"seed {seed}, {what}: {type(error).__name__}: {error}"[:200])
        shutil.rmtree(folder)
    assert not bad, "\n".join(bad)
    assert sum(ended.values()) == -(-500 // len(READS))
