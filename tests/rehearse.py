"""The full-size rehearsal: a data tree with the true numbers of images, texts, words a text and
regions an image, in the official formats, on which every full-size recipe is started.

python tests/rehearse.py tree --out DATA --scale 1     once, about 15 minutes and 20 GiB of disk
python tests/rehearse.py run --data DATA               every recipe: 3 updates, a validation, an
                                                       evaluation, each by a model of size tiny
python tests/rehearse.py run --data DATA --recipe vqa  one of them
python tests/rehearse.py run ... --no-evaluation       where the evaluation is another recipe's
python tests/rehearse.py table                         the table of tests/COST.md

Texts are drawn from a list of words with each data set's mean length. Features are files without
content (holes take no disk), pictures one JPEG under many names. What a run needs is measured: its
batches against the recipe's, seconds until the first update, memory, the loader's pace.
"""

import argparse
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import seeds
import train
from data import COLUMNS, PER_IMAGE, REFER, WordPiece

# 1. True numbers --------------------------------------------------------------------------------

# {data set: (what, how many)}, by its authors' page or paper, and UNITER table 1 (regions: means of
# the authors' features; words: means of the annotations)
NUMBERS = {
    "coco train2014": 82_783,
    "coco val2014": 40_504,
    "flickr30k": (29_000, 1_014, 1_000),
    "entities": (29_783, 1_000, 1_000),
    "vg": 108_077,
    "vg in coco": 51_208,
    "vg descriptions an image": 50,
    "vg objects an image": 35,
    "vg questions": 1_445_322,
    "cc3m": 3_318_333,
    "cc3m alive": 3_000_000,
    "cc3m val": 15_840,
    "sbu": 1_000_000,
    "sbu alive": 990_000,
    "cc12m": 12_423_374,
    "cc12m alive": 10_060_000,
    "vqa train2014": 443_757,
    "vqa val2014": 214_354,
    "gqa train_balanced": 943_000,
    "gqa val_balanced": 132_062,
    "gqa testdev_all": 172_174,
    "gqa scenes": (74_942, 10_696),
    "vcr train": 212_923,
    "vcr val": 26_534,
    "vcr images": (80_418, 9_929),
    "nlvr2 train": 86_373,
    "nlvr2 dev": 6_982,
    "ve": (529_527, 17_858, 17_901),
    "refcoco": {"train": 42_404, "val": 3_811, "testA": 1_975, "testB": 1_810},
    "refcoco+": {"train": 42_278, "val": 3_805, "testA": 1_975, "testB": 1_798},
    "refcocog": {"train": 42_226, "val": 2_573, "test": 5_023},
    "refcoco images": 26_000,
    "refclef test": 60_103,
    "refclef images": 10_000,
    "winoground": 400,
    "glove": 400_000,
}
# words a text
WORDS = {
    "coco": 10.5,
    "flickr30k": 12.4,
    "vg": 5.3,
    "cc3m": 10.3,
    "sbu": 14.7,
    "cc12m": 17.2,
    "vqa": 6.2,
    "gqa": 8.0,
    "vcr question": 6.6,
    "vcr answer": 7.7,
    "vcr reason": 16.2,
    "nlvr2": 14.8,
    "ve": 7.5,
    "refcoco": 3.6,
    "refcoco+": 3.5,
    "refcocog": 8.4,
}
# regions an image of UNITER's features: 10 to 100, this mean
REGIONS = 36

# 2. Texts ---------------------------------------------------------------------------------------


class Texts:
    """Texts of a data set: numbers of words as a geometric mixture round its mean, words by Zipf's
    law. A hundred thousand are made and drawn from, since only lengths and the share of words
    matter here."""

    def __init__(self, words, mean, seed, n=100_000):
        rng = np.random.default_rng(seed)
        length = rng.poisson(mean - 1, n) + 1
        p = 1 / np.arange(10, len(words) + 10)
        drawn = rng.choice(len(words), length.sum(), p=p / p.sum())
        picked = np.array(words, object)[drawn].tolist()
        ends = np.cumsum(length).tolist()
        self.pool = [" ".join(picked[a:b]) for a, b in zip([0, *ends], ends)]
        self.random = random.Random(seed)

    def draw(self, n):
        """n texts"""
        return self.random.choices(self.pool, k=n)


def make_words(seed, n=30_000):
    """Words of one to four syllables"""
    rng = random.Random(seed)
    syllables = [c + v + e for c in "bcdfghklmnprstvw" for v in "aeiou" for e in ("", "n", "r")]
    words = {}
    while len(words) < n:
        words["".join(rng.choices(syllables, k=rng.randint(1, 4)))] = None
    return list(words)


# 3. The tree ------------------------------------------------------------------------------------


class Tree:
    """What is being written: folder, scale, words."""

    def __init__(self, out, scale, seed=0):
        self.out, self.scale, self.seed = Path(out), scale, seed
        self.words = make_words(seed)
        self.rng = np.random.default_rng(seed)
        self.random = random.Random(seed)

    def count(self, name):
        """A true number at this scale"""
        return self.scaled(NUMBERS[name])

    def scaled(self, n):
        """A number at this scale, at least 40"""
        return max(40, round(n * self.scale)) if n >= 40 else n

    def texts(self, name):
        """Texts of a data set"""
        return Texts(self.words, WORDS[name], [*name.encode(), self.seed][0] + self.seed)

    def open(self, path):
        """A new file of the tree, to be written"""
        path = self.out / path
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "w", buffering=1 << 20)

    def dump(self, path, record):
        """A small JSON file"""
        with self.open(path) as file:
            json.dump(record, file)

    def items(self, path, items, total, head="[", tail="]"):
        """A large JSON file, item by item; items are JSON already"""
        bar = tqdm(items, path, total, disable=None, leave=False)
        with self.open(path) as file:
            file.write(head)
            for i, item in enumerate(bar):
                file.write(item if not i else ", " + item)
            file.write(tail)


WIDTH, HEIGHT = 640, 480


def coco_stem(split, number):
    """A COCO picture's name"""
    return f"COCO_{split}_{number:012d}"


def write_coco(tree):
    """Captions, Karpathy's split; returns {split: image numbers}"""
    texts, numbers, start = tree.texts("coco"), {}, 1
    for split in ("train2014", "val2014"):
        n = tree.count(f"coco {split}")
        numbers[split] = range(start, start + n)
        start += n
        images = [
            {
                "id": i,
                "file_name": f"{coco_stem(split, i)}.jpg",
                "width": WIDTH,
                "height": HEIGHT,
                "flickr_url": f"http://farm1.staticflickr.com/1/{10**9 + i}_0a1b2c3d4e_z.jpg",
            }
            for i in numbers[split]
        ]
        captions = iter(texts.draw(5 * n))
        annotations = [
            {"image_id": i, "id": 10 * i + k, "caption": next(captions)}
            for i in numbers[split]
            for k in range(5)
        ]
        record = {"images": images, "annotations": annotations}
        tree.dump(f"coco/annotations/captions_{split}.json", record)
    karpathy = []
    val = numbers["val2014"]
    held = min(5000, len(val) // 3)
    for split, some in numbers.items():
        for k, i in enumerate(some):
            part = "train" if split == "train2014" else "restval"
            if split == "val2014" and k < 2 * held:
                part = "val" if k < held else "test"
            name = f"{coco_stem(split, i)}.jpg"
            record = {"filepath": split, "filename": name, "cocoid": i, "split": part}
            karpathy.append(record | {"imgid": len(karpathy), "sentences": sentences(texts, i)})
    tree.dump("coco/dataset_coco.json", {"images": karpathy, "dataset": "coco"})
    return numbers


def sentences(texts, i):
    """Five of Karpathy's sentences"""
    said = [(5 * i + k, text) for k, text in enumerate(texts.draw(5))]
    return [{"sentid": k, "raw": t, "tokens": t.split(), "imgid": i} for k, t in said]


def write_flickr30k(tree):
    """Karpathy's split, the token file, Entities; returns names"""
    texts, images, parts = tree.texts("flickr30k"), [], {}
    names = [str(10**9 + 7 * i) for i in range(sum(map(tree.scaled, NUMBERS["entities"])))]
    counts = dict(zip(("train", "val", "test"), map(tree.scaled, NUMBERS["flickr30k"])))
    splits = [split for split, n in counts.items() for _ in range(n)]
    for i, (name, split) in enumerate(zip(names, splits)):
        record = {"filename": f"{name}.jpg", "split": split, "imgid": i}
        images.append(record | {"sentences": sentences(texts, i)})
    tree.dump("flickr30k/dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})
    with tree.open("flickr30k/results_20130124.token") as file:
        for name in names:
            lines = (f"{name}.jpg#{k}\t{text}\n" for k, text in enumerate(texts.draw(5)))
            file.write("".join(lines))
    start, root = 0, "flickr30k_entities"
    for split, n in zip(("train", "val", "test"), map(tree.scaled, NUMBERS["entities"])):
        parts[split], start = names[start : start + n], start + n
        with tree.open(f"{root}/{split}.txt") as file:
            file.write("\n".join(parts[split]) + "\n")
    with tree.open(f"{root}/UNRELATED_CAPTIONS") as file:
        file.write("# none\n")
    for name in tqdm(names, "entities", disable=None, leave=False):
        with tree.open(f"{root}/Sentences/{name}.txt") as file:
            file.write("\n".join(tagged(tree, text) for text in texts.draw(5)) + "\n")
        with tree.open(f"{root}/Annotations/{name}.xml") as file:
            file.write(ENTITIES_XML)
    return names


def tagged(tree, text):
    """A caption with three of its word pairs named"""
    words = text.split()
    for k, kind in zip(range(0, min(len(words), 9) - 1, 3), ("people", "clothing", "other")):
        words[k : k + 2] = [f"[/EN#{k + 1}/{kind} {words[k]}", f"{words[k + 1]}]"]
    return " ".join(words)


BOXES = [(10, 10, 300, 300), (200, 100, 600, 460), (50, 200, 350, 470)]
ENTITIES_XML = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
ENTITIES_XML += "".join(
    f"<object><name>{3 * k + 1}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax>"
    f"<ymax>{d}</ymax></bndbox></object>"
    for k, (a, b, c, d) in enumerate(BOXES)
)
ENTITIES_XML = f"<annotation>{ENTITIES_XML}</annotation>\n"


def draw_boxes(tree, n):
    """(n, 4) int x y w h inside a picture; sides are a tenth to nine tenths of it"""
    w, h = (tree.rng.integers(side // 10, side * 9 // 10, n) for side in (WIDTH, HEIGHT))
    x = (tree.rng.random(n) * (WIDTH - w)).astype(int)
    y = (tree.rng.random(n) * (HEIGHT - h)).astype(int)
    return np.stack([x, y, w, h], axis=1)


def write_vg(tree, coco):
    """Visual Genome; returns its image numbers"""
    n, in_coco = tree.count("vg"), tree.count("vg in coco")
    numbers, texts = range(2_000_000, 2_000_000 + n), tree.texts("vg")
    both = [*coco["val2014"][: in_coco // 3], *coco["train2014"]][:in_coco]
    both += [None] * (n - len(both))
    images = (
        json.dumps({"image_id": i, "width": WIDTH, "height": HEIGHT, "coco_id": c, "flickr_id": i})
        for i, c in zip(numbers, both)
    )
    tree.items("vg/image_data.json", images, n)
    each = NUMBERS["vg descriptions an image"]
    tree.items("vg/region_descriptions.json", vg_lines(tree, texts, numbers, each), n)
    objects = vg_objects(tree, texts, numbers, NUMBERS["vg objects an image"])
    tree.items("vg/attributes.json", objects, n)
    questions = tree.texts("vqa")
    each = max(1, tree.count("vg questions") // n)

    def asked():
        for i in numbers:
            qas = [
                f'{{"qa_id": {i}{k:02d}, "image_id": {i}, "question": "{q}?", "answer": "{a}."}}'
                for k, (q, a) in enumerate(zip(questions.draw(each), answers(tree, each)))
            ]
            yield f'{{"id": {i}, "qas": [{", ".join(qas)}]}}'

    tree.items("vg/question_answers.json", asked(), n)
    return numbers


def vg_lines(tree, texts, numbers, each):
    """Items of region_descriptions.json"""
    for i in numbers:
        rows = zip(texts.draw(each), draw_boxes(tree, each).tolist())
        regions = [
            f'{{"region_id": {i}{k:03d}, "width": {w}, "height": {h}, "image_id": {i}, '
            f'"phrase": "{text}", "y": {y}, "x": {x}}}'
            for k, (text, (x, y, w, h)) in enumerate(rows)
        ]
        yield f'{{"regions": [{", ".join(regions)}], "id": {i}}}'


def vg_objects(tree, texts, numbers, each):
    """Items of attributes.json"""
    for i in numbers:
        names = tree.random.choices(tree.words[:2000], k=2 * each)
        rows = zip(names, names[each:], draw_boxes(tree, each).tolist())
        objects = [
            f'{{"synsets": ["{name}.n.01"], "h": {h}, "object_id": {i}{k:03d}, "names": '
            f'["{name}"], "w": {w}, "attributes": ["{other}"], "y": {y}, "x": {x}}}'
            for k, (name, other, (x, y, w, h)) in enumerate(rows)
        ]
        yield f'{{"image_id": {i}, "attributes": [{", ".join(objects)}]}}'


def answers(tree, n):
    """n answers: yes or no, or one of three thousand words"""
    return tree.random.choices(["yes", "no"] * 1500 + tree.words[:3000], k=n)


def write_web(tree):
    """Conceptual Captions, SBU, Conceptual 12M"""
    for name, path in (
        ("cc3m", "cc3m/Train_GCC-training.tsv"),
        ("cc3m val", "cc3m/Validation_GCC-1.1.0-Validation.tsv"),
        ("cc12m", "cc12m/cc12m.tsv"),
    ):
        texts, n = tree.texts(name.split()[0]), tree.count(name)
        with tree.open(path) as file:
            for start in tqdm(range(0, n, 10_000), path, disable=None, leave=False):
                some = enumerate(texts.draw(min(10_000, n - start)), start)
                rows = ((text, f"http://pictures.example.org/{i}.jpg") for i, text in some)
                if name == "cc12m":
                    rows = (row[::-1] for row in rows)
                file.write("".join(f"{a}\t{b}\n" for a, b in rows))
    n, texts = tree.count("sbu"), tree.texts("sbu")
    with tree.open("sbu/SBU_captioned_photo_dataset_urls.txt") as file:
        for i in range(n):
            file.write(f"http://static.flickr.com/2723/{4 * 10**9 + i}_b2f8ad1b07.jpg\n")
    with tree.open("sbu/SBU_captioned_photo_dataset_captions.txt") as file:
        for text in texts.draw(n):
            file.write(text + "\n")


def write_vqa(tree, coco):
    """VQA v2's questions and answers"""
    texts = tree.texts("vqa")
    for split in ("train2014", "val2014"):
        n, images = tree.count(f"vqa {split}"), coco[split]
        numbers = [(images[i % len(images)], i // len(images)) for i in range(n)]
        ids = [(image, 1000 * image + k) for image, k in numbers]
        said = iter(texts.draw(n))
        questions = (
            f'{{"image_id": {i}, "question": "{next(said)}?", "question_id": {q}}}' for i, q in ids
        )
        head = '{"info": {}, "data_type": "mscoco", "questions": ['
        path = f"vqa2/v2_OpenEnded_mscoco_{split}_questions.json"
        tree.items(path, questions, n, head, "]}")
        path = f"vqa2/v2_mscoco_{split}_annotations.json"
        tree.items(path, vqa_answers(tree, ids), n, '{"annotations": [', "]}")


def vqa_answers(tree, ids):
    """Items of an answer file"""
    for image, question in ids:
        first, second = answers(tree, 2)
        ten = [first] * 7 + [second] * 3
        said = ", ".join(
            f'{{"answer": "{a}", "answer_confidence": "yes", "answer_id": {k}}}'
            for k, a in enumerate(ten, 1)
        )
        yield (
            f'{{"question_type": "what is", "multiple_choice_answer": "{first}", "answers": '
            f'[{said}], "image_id": {image}, "answer_type": "other", "question_id": {question}}}'
        )


def write_answers(tree):
    """The official lists of answers, as long as they are"""
    names = ["yes", "no", *tree.words]
    for path, n in (("vqa2", 3129), ("gqa", 1842)):
        with tree.open(f"{path}/trainval_label2ans.json") as file:
            json.dump(names[:n], file)
    with tree.open("lxmert/all_ans.json") as file:
        json.dump([{"ans": name} for name in names[:9500]], file)


def write_gqa(tree, vg):
    """GQA's questions and scene graphs; returns testdev's image names"""
    train_n, val_n = map(tree.scaled, NUMBERS["gqa scenes"])
    images = {"train_balanced": vg[:train_n], "val_balanced": vg[train_n : train_n + val_n]}
    images["testdev_all"] = [f"n{100_000 + i}" for i in range(398)]
    # no two questions of any split have one id
    for number, (split, some) in enumerate(images.items()):
        path, n = f"gqa/{split}_questions.json", tree.count(f"gqa {split}")
        tree.items(path, gqa_lines(tree, some, n, 10_000_000 * number), n, "{", "}")
    for split in ("train", "val"):
        some = images[f"{split}_balanced"]
        tree.items(f"gqa/{split}_sceneGraphs.json", gqa_scenes(tree, some), len(some), "{", "}")
    return images["testdev_all"]


def gqa_lines(tree, images, n, first):
    """Items of a file of questions, with what makes the real ones long"""
    texts = tree.texts("gqa")
    names = tree.random.choices(tree.words[:1800], k=n)
    for i, (text, answer) in enumerate(zip(texts.draw(n), names), first):
        image = images[(i - first) % len(images)]
        things = f'{{"1": "{image}0", "3:5": "{image}1"}}'
        yield (
            f'"{i:08d}": {{"semantic": [{{"operation": "select", "dependencies": [], "argument": '
            f'"{answer} ({image}0)"}}, {{"operation": "relate", "dependencies": [0], "argument": '
            f'"{answer},to the left of,s ({image}1)"}}, {{"operation": "query", "dependencies": '
            f'[1], "argument": "name"}}], "entailed": ["{i:08d}"], "equivalent": ["{i:08d}"], '
            f'"question": "{text}?", "imageId": "{image}", "isBalanced": true, "groups": '
            f'{{"global": "{answer[:2]}", "local": "06-{answer}"}}, "answer": "{answer}", '
            f'"semanticStr": "select: {answer} ({image}0)->relate: {answer},to the left of,s '
            f'({image}1) [0]->query: name [1]", "annotations": {{"answer": {{"0": "{image}1"}}, '
            f'"question": {things}, "fullAnswer": {{"1": "{image}1"}}}}, "types": {{"detailed": '
            f'"relS", "semantic": "rel", "structural": "query"}}, "fullAnswer": "It is {answer}."}}'
        )


def gqa_scenes(tree, images, each=16):
    """Items of a file of scene graphs"""
    for image in images:
        objects = ", ".join(
            f'"{image}{k}": {{"name": "thing", "x": {x}, "y": {y}, "w": {w}, "h": {h}, '
            f'"attributes": ["red"], "relations": [{{"name": "near", "object": "{image}0"}}]}}'
            for k, (x, y, w, h) in enumerate(draw_boxes(tree, each).tolist())
        )
        yield f'"{image}": {{"width": {WIDTH}, "height": {HEIGHT}, "objects": {{{objects}}}}}'


def write_vcr(tree):
    """VCR; returns image names"""
    texts = {part: tree.texts(f"vcr {part}") for part in ("question", "answer", "reason")}
    names = []
    for split, images in zip(("train", "val"), map(tree.scaled, NUMBERS["vcr images"])):
        own = [f"{split}_{i:06d}_Film_00.00.{i % 60:02d}@0" for i in range(images)]
        names += own
        with tree.open(f"vcr1/{split}.jsonl") as file:
            for k in range(tree.count(f"vcr {split}")):
                spoken = {part: [t.split() for t in texts[part].draw(4)] for part in texts}
                for choice in spoken["answer"] + spoken["reason"]:
                    choice[0] = [k % 3]
                stem = f"movie/{own[k % len(own)]}"
                record = {
                    "objects": ["person", "person", "person", "chair"],
                    "img_fn": f"{stem}.jpg",
                    "metadata_fn": f"{stem}.json",
                    "question": [*spoken["question"][0], [0], "?"],
                    "answer_choices": spoken["answer"],
                    "answer_label": k % 4,
                    "rationale_choices": spoken["reason"],
                    "rationale_label": k // 4 % 4,
                    "annot_id": f"{split}-{k}",
                }
                file.write(json.dumps(record) + "\n")
    return names


def write_nlvr2(tree):
    """NLVR2; returns image names"""
    texts, names = tree.texts("nlvr2"), {}
    for split in ("train", "dev"):
        n = tree.count(f"nlvr2 {split}")
        with tree.open(f"nlvr2/{split}.json") as file:
            for k, text in enumerate(texts.draw(n)):
                # a sentence about three or four pairs of images
                pair, sentence = divmod(k, 2)
                name = f"{split}-{pair}-0-{sentence}"
                names.update(dict.fromkeys(f"{split}-{pair}-0-img{side}" for side in (0, 1)))
                record = {"identifier": name, "sentence": text, "label": str(k % 3 == 0)}
                file.write(json.dumps(record) + "\n")
    return list(names)


def write_ve(tree, names):
    """SNLI-VE, about Flickr30k's pictures"""
    labels, start, texts = ("entailment", "neutral", "contradiction"), 0, tree.texts("ve")
    parts = zip(("train", "dev", "test"), NUMBERS["ve"], map(tree.scaled, NUMBERS["entities"]))
    for split, n, images in parts:
        own, start = names[start : start + images], start + images
        with tree.open(f"snli_ve/snli_ve_{split}.jsonl") as file:
            for k, text in enumerate(texts.draw(tree.scaled(n))):
                image = own[k % len(own)]
                record = {"gold_label": labels[k % 3], "Flikr30kID": image, "pairID": f"{k}r1n"}
                record |= {"sentence1": text, "sentence2": text, "captionID": f"{image}.jpg#0"}
                file.write(json.dumps(record) + "\n")


def write_refer(tree, coco):
    """RefCOCO, RefCOCO+, RefCOCOg, ReferIt; returns image names and {image: boxes}"""
    images = coco["train2014"][: tree.count("refcoco images")]
    boxes = draw_boxes(tree, 8 * len(images)).reshape(-1, 8, 4).tolist()
    for name, splits in REFER.items():
        texts, refs, annotations, number = tree.texts(name), [], [], 0
        for split, n in NUMBERS[name].items():
            for _ in range(tree.scaled(n)):
                at, which = number % len(images), number // len(images) % 8
                said = texts.draw(3 if name != "refcocog" else 2)
                some = [
                    {"sent_id": 3 * number + j, "sent": t, "raw": t, "tokens": t.split()}
                    for j, t in enumerate(said)
                ]
                ref = {"ref_id": number, "ann_id": number, "image_id": images[at], "split": split}
                refs.append(ref | {"sentences": some, "category_id": 1, "file_name": "x.jpg"})
                box = [float(v) for v in boxes[at][which]]
                annotations.append({"id": number, "image_id": images[at], "bbox": box})
                number += 1
        folder = tree.out / "refer" / name
        folder.mkdir(parents=True)
        (folder / f"refs({splits}).p").write_bytes(pickle.dumps(refs, protocol=2))
        sizes = [{"id": i, "width": WIDTH, "height": HEIGHT} for i in images]
        tree.dump(f"refer/{name}/instances.json", {"images": sizes, "annotations": annotations})
    texts, own = tree.texts("refcoco"), tree.count("refclef images")
    rows = zip(texts.draw(tree.count("refclef test")), draw_boxes(tree, 1000).tolist() * 100)
    records = [
        {"image": f"saiapr_tc-12/{i % own}.jpg", "text": text, "bbox": box}
        for i, (text, box) in enumerate(rows)
    ]
    tree.dump("refclef/refclef_test_10k_unique.json", records)
    return [coco_stem("train2014", i) for i in images], boxes


def write_winoground(tree):
    """Winoground; returns image names"""
    names, texts = [], tree.texts("coco")
    with tree.open("winoground/examples.jsonl") as file:
        for e in range(NUMBERS["winoground"]):
            names += [f"ex_{e}_img_{i}" for i in (0, 1)]
            captions = dict(zip(("caption_0", "caption_1"), texts.draw(2)))
            record = {"id": e, "image_0": names[-2], "image_1": names[-1], **captions}
            file.write(json.dumps(record | {"tag": "", "collapsed_tag": "Relation"}) + "\n")
    return names


def write_words(tree):
    """Vocabularies of true size, GloVe, the detector's names"""
    letters = [chr(c) for c in range(33, 127)]
    pieces = [*WordPiece.SPECIAL, *letters, *("##" + c for c in letters if c.isalnum())]
    for name, size in (("bert-base-cased", 28_996), ("bert-base-uncased", 30_522)):
        with tree.open(f"{name}/vocab.txt") as file:
            # rare words are of several pieces
            whole = [w for w in tree.words if len(w) > 1][: size - len(pieces)]
            file.write("\n".join([*pieces, *whole]) + "\n")
    for what, n in (("objects", 1600), ("attributes", 400)):
        with tree.open(f"vg/{what}_vocab.txt") as file:
            file.write("\n".join(tree.words[:n]) + "\n")
    vectors = [" ".join(f"{v:.5f}" for v in tree.rng.normal(size=300)) for _ in range(500)]
    with tree.open("glove/glove.6B.300d.txt") as file:
        for i in tqdm(range(tree.count("glove")), "glove", disable=None, leave=False):
            word = tree.words[i] if i < len(tree.words) else f"word{i}"
            file.write(f"{word} {vectors[i % 500]}\n")


def write_store(tree, name, ids, fixed=0, true_boxes=None, boxes=True, mean=REGIONS):
    """A region store whose features are holes in files; fixed: so many regions each"""
    folder, n = tree.out / "regions" / name, len(ids)
    folder.mkdir(parents=True)
    counts = np.full(n, fixed) if fixed else tree.rng.poisson(mean, n).clip(10, 100)
    if true_boxes is not None:
        counts[:] = len(true_boxes[0])
    offsets = np.cumsum([0, *counts], dtype=PER_IMAGE["offsets"])
    rows = int(offsets[-1])
    shapes = {c: tuple({"D_V": 2048, "C": 1601}.get(s, s) for s in COLUMNS[c][1]) for c in COLUMNS}
    for column, shape in shapes.items():
        with open(folder / f"{column}.npy", "wb") as file:
            dtype = np.dtype(COLUMNS[column][0])
            header = {"descr": dtype.str, "fortran_order": False, "shape": (rows, *shape)}
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + rows * dtype.itemsize * int(np.prod(shape, dtype=np.int64)))
    if boxes:
        drawn = np.load(folder / "boxes.npy", mmap_mode="r+")
        for start in range(0, rows, 1 << 20):
            size = min(1 << 20, rows - start)
            part = draw_boxes(tree, size)
            if true_boxes is not None:
                part = np.reshape(true_boxes, (-1, 4))[start : start + size]
            part = np.array(part, "<f4")
            part[:, 2:] += part[:, :2]
            drawn[start : start + size] = part
    np.save(folder / "offsets.npy", offsets)
    np.save(folder / "wh.npy", np.tile(np.array([[WIDTH, HEIGHT]], PER_IMAGE["wh"]), (n, 1)))
    np.save(folder / "ids.npy", np.array([str(i).encode() for i in ids]))
    meta = {"source": "rehearsal", "features": 2048, "classes": 1601}
    (folder / "meta.json").write_text(json.dumps(meta))


def write_pictures(tree, folder, names):
    """One JPEG under many names: as many links as the file system allows to one file"""
    place = tree.out / folder
    place.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8))
    picture = small.resize((WIDTH, HEIGHT), Image.BICUBIC)
    for i, name in enumerate(tqdm(names, f"pictures, {folder}", disable=None, leave=False)):
        if i % 60_000 == 0:
            first = place / f"{name}.jpg"
            picture.save(first, quality=85)
        else:
            os.link(first, place / f"{name}.jpg")


def alive(tree, name):
    """Numbers of the pictures of a web corpus that can still be had"""
    n, left = tree.count(name), tree.count(f"{name} alive")
    return np.sort(np.random.default_rng(0).choice(n, left, replace=False)).tolist()


def write_tree(out, scale=1.0, seed=0, pictures=True):
    """All of it"""
    tree, began = Tree(out, scale, seed), time.time()
    tree.out.mkdir(parents=True)
    coco = write_coco(tree)
    flickr = write_flickr30k(tree)
    vg = write_vg(tree, coco)
    write_web(tree), write_vqa(tree, coco)
    testdev = write_gqa(tree, vg)
    vcr, nlvr2 = write_vcr(tree), write_nlvr2(tree)
    write_ve(tree, flickr)
    refer, boxes = write_refer(tree, coco)
    winoground = write_winoground(tree)
    write_words(tree), write_answers(tree)
    stems = [coco_stem(split, i) for split, some in coco.items() for i in some]
    web = {name: alive(tree, name) for name in ("cc3m", "sbu", "cc12m")}
    for name, ids in {
        "coco": stems,
        "flickr30k": flickr,
        "vg": vg,
        "gqa": testdev,
        "nlvr2": nlvr2,
        "winoground": winoground,
        "refcoco_det": refer,
        "cc3m_val": range(tree.count("cc3m val")),
    }.items():
        write_store(tree, name, ids)
    both = [*vcr, *(f"det/{image}" for image in vcr)]
    write_store(tree, "vcr", both, mean=np.repeat([10, REGIONS], len(vcr)))
    write_store(tree, "refcoco_gt", refer, true_boxes=boxes)
    write_store(tree, "cc3m_train", web["cc3m"], boxes=False)
    write_store(tree, "sbu", web["sbu"], boxes=False)
    for folder, names in {
        "coco/train2014": stems[: len(coco["train2014"])],
        "coco/val2014": stems[len(coco["train2014"]) :],
        "flickr30k/flickr30k-images": flickr,
        "vg/VG_100K": vg,
        "winoground/images": winoground,
        "refclef/images": range(tree.count("refclef images")),
        "cc3m/images": [
            *(f"cc3m_train_{i}" for i in web["cc3m"]),
            *(f"cc3m_val_{i}" for i in range(tree.count("cc3m val"))),
        ],
        "sbu/images": web["sbu"],
        "cc12m/images": web["cc12m"],
    }.items():
        write_pictures(tree, folder, names if pictures else names[:1])
    used = subprocess.run(["du", "-sk", tree.out], capture_output=True, text=True).stdout.split()[0]
    print(f"{out}: {int(used) / 2**20:.1f} GiB of disk, {time.time() - began:.0f} s")


# 4. A recipe ------------------------------------------------------------------------------------

# epochs in the paper, where it says so
EPOCHS = {"kervadec": 20, "gqa": 4, "kervadec-nlvr2": 4, "albef": 30, "amc": 20, "maf": 25}
# a run of three updates: their length, and how often others are scored, is not what is rehearsed
SHORT = "--size tiny --steps 3 --warmup 1 --eval-every 3 --save-every 3 --log-every 1 --init none"
SHORT += " --precision fp32 --workers 1 --mine-pool 2"


def memory(pid="self"):
    """(private, PSS) MiB of a process: PSS has its share of what it maps with others"""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in rollup.splitlines()[1:]}
    return (kib["Private_Clean"] + kib["Private_Dirty"]) / 1024, kib["Pss"] / 1024


def workers_of(pid):
    """The processes that a process has started"""
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


class Watch:
    """Measures one run of train.py from inside: puts itself round the functions of its loop."""

    def __init__(self):
        self.began, self.real, self.padded = time.time(), 0, 0
        self.found = {"imports_mib": memory()[0]}
        self.step, self.validate, self.finalize = train.train_step, train.validate, train.finalize
        self.load, train.load_streams = train.load_streams, self.watch_streams
        train.train_step, train.validate = self.watch_step, self.watch_validation
        train.finalize = self.watch_end

    def watch_streams(self, cfg, runtime, run):
        """Keeps the streams and the settings"""
        self.streams, self.cfg = self.load(cfg, runtime, run), cfg
        self.found["ready_s"] = time.time() - self.began
        return self.streams

    def watch_step(self, cfg, runtime, model, optimizers, step, batches, *more):
        """Counts a step's words and regions; notes when the first is done"""
        self.found.setdefault("loaded_mib", memory()[0])
        for batch in batches:
            x = batch.get("input", {})
            if "length" in x:
                real = x["text_mask"].sum() + x["region_mask"].sum()
                self.real, self.padded = (
                    self.real + int(real),
                    self.padded + x["length"] * len(x["text_mask"]),
                )
        result = self.step(cfg, runtime, model, optimizers, step, batches, *more)
        self.found.setdefault("first_s", time.time() - self.began)
        return result

    def watch_validation(self, cfg, runtime, model, streams, **how):
        """After the updates: memory of this process and of its workers, and a worker's pace"""
        private, pss = memory()
        workers = [memory(pid)[0] for pid in workers_of(os.getpid())]
        self.found |= {
            "private_mib": private,
            "pss_mib": pss,
            "worker_mib": max(workers, default=0),
        }
        began = time.time()
        accuracy = self.validate(cfg, runtime, model, streams, **how)
        self.found["validation_s"] = time.time() - began
        self.found["pairs_per_s"] = self.pace()
        return accuracy

    def pace(self, seconds=4):
        """Rows a second that one worker makes, of the corpora in turn, once an epoch is drawn"""
        rows = k = spent = 0
        # one stream of each corpus: drawing all epochs would take minutes
        self.drawn = list({id(s.index): s for s in reversed(self.streams.train)}.values())
        for stream in self.drawn:
            stream.whole(0)
        while spent < seconds:
            stream = self.drawn[k % len(self.drawn)]
            began = time.time()
            batch = stream[k]
            spent, k = spent + time.time() - began, k + 1
            x = batch.get("input", batch)
            rows += len(x["text_mask"]) if "text_mask" in x else len(batch["names"])
        return rows / max(spent, 1e-9)

    def watch_end(self, cfg, runtime, run, numbers):
        """The evaluation, timed; none in a second run, or where it is not asked for"""
        if os.environ["REHEARSE_EVALUATE"] == "no":
            return {"val/none": 0.0}
        began = time.time()
        numbers = self.finalize(cfg, runtime, run, numbers)
        self.found["evaluation_s"] = time.time() - began
        return numbers

    def batches(self):
        """What an update and an epoch hold, counted from the epochs that were drawn"""
        of_corpus = {id(s.index): np.mean([len(b) for b in s.batches]) for s in self.drawn}
        examples = sum(len(s.index) // s.index.group for s in self.drawn)
        mean = [of_corpus[id(s.index)] for s in self.streams.train]
        pieces = self.streams.train[0].helpers["pieces"]
        update = float(np.average(mean, weights=self.streams.weights)) * pieces
        return {
            "examples": update,
            "updates_an_epoch": examples / update,
            "texts": examples,
            "padding": 1 - self.real / self.padded if self.padded else 0.0,
            "tokens": self.padded / self.cfg.steps,
        }


def watched(argv):
    """In a process of its own: train.py, watched; what was found goes to $REHEARSE_TO."""
    watch = Watch()
    try:
        train.main(argv)
    finally:
        if int(os.environ.get("RANK", 0)) == 0 and hasattr(watch, "streams"):
            Path(os.environ["REHEARSE_TO"]).write_text(json.dumps(watch.found | watch.batches()))


def rehearse(recipe, data, folder, evaluated=True, most=2):
    """Cold (its index is made) and warm; returns what was found, or an error's last lines."""
    cfg = train.make_config(recipe)
    processes, found = min(cfg.gpus, most), {}
    for warm in (False, True):
        out, to = Path(folder) / f"{recipe}-{int(warm)}", Path(folder) / "found.json"
        to.unlink(missing_ok=True)
        start = [sys.executable]
        if processes > 1:
            several = f"-m torch.distributed.run --standalone --nproc-per-node {processes}"
            start += several.split()
        command = [*start, __file__, "watched", "--recipe", recipe, "--data", data, "--out", out]
        command += SHORT.split() + (["--resolution", "256"] if cfg.vision == "patches" else [])
        env = os.environ | {"REHEARSE_TO": str(to), "OMP_NUM_THREADS": str(2 // processes)}
        env["REHEARSE_EVALUATE"] = "yes" if evaluated and not warm else "no"
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env)
        shutil.rmtree(out, ignore_errors=True)
        if done.returncode or not to.exists():
            lines = done.stderr.strip().splitlines()
            raise SystemExit("\n".join([x for x in lines if "rror" in x][:2] or lines[-3:]))
        one = json.loads(to.read_text())
        if warm:
            one |= {"first_warm_s": one["first_s"], "first_s": found["first_s"]}
            one |= {k: found[k] for k in ("evaluation_s",) if k in found}
        found = one
    return found | {"processes": processes}


def run_all(data, recipes, evaluated=True):
    """Each recipe in turn; what was found is kept after each"""
    folder = Path(data) / "rehearsal"
    folder.mkdir(exist_ok=True)
    for recipe in tqdm(recipes, "recipes"):
        found = {k: round(v, 3) for k, v in rehearse(recipe, data, folder, evaluated).items()}
        print(recipe, json.dumps(found), flush=True)
        settings = seeds.digest_of(train.make_config(recipe))
        found |= {"settings": settings, "commit": seeds.commit()}
        results = json.loads(seeds.RESULTS.read_text())
        results.setdefault("rehearsal", {})[recipe] = found
        seeds.RESULTS.write_text(json.dumps(results, indent=0, sort_keys=True) + "\n")


def table(results):
    """The rehearsal: recipe, paper and ours, and what a user has to plan for"""
    lines = [
        "| recipe | batch, recipe | ours an update | updates an epoch | epochs, paper | ours "
        "| padding | first update s, cold | warm | GiB, all processes | rows a second |",
        "|" + "---|" * 11,
    ]
    commits = {}
    for recipe in [r for r in full_size() if r in results.get("rehearsal", {})]:
        found, cfg = results["rehearsal"][recipe], train.make_config(recipe)
        unit = "examples" if cfg.batch_size else "tokens"
        size = (cfg.batch_size or cfg.batch_tokens) * cfg.accumulate * cfg.gpus
        ours = found["examples"]
        if not cfg.batch_size:
            ours = f"{found['tokens'] * found['processes']:,.0f} tokens, {ours:,.0f}"
        else:
            ours = f"{ours:,.0f}"
        # a process that stands for several GPUs holds all of their batches
        held = found["processes"] * (found["private_mib"] - found["imports_mib"])
        gib = (held + cfg.gpus * (found["imports_mib"] + 2 * found["worker_mib"])) / 1024
        epochs = cfg.steps / found["updates_an_epoch"]
        commits[recipe] = found.get("commit")
        mark = "" if found.get("settings") == seeds.digest_of(cfg) else " (stale)"
        lines.append(
            f"| `{recipe}`{mark} | {size:,} {unit} | {ours} examples "
            f"| {found['updates_an_epoch']:,.0f} | {EPOCHS.get(recipe, '')} | {epochs:.1f} "
            f"| {100 * found['padding']:.1f} % "
            f"| {found['first_s']:.0f} | {found['first_warm_s']:.0f} | {gib:.1f} "
            f"| {found['pairs_per_s']:,.0f} |"
        )
    return "\n".join([seeds.with_note(lines), "", seeds.with_commits(commits)])


def main(argv=None):
    """Write the tree, or run recipes on it"""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["watched"]:
        watched(argv[1:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("tree").add_argument
    add("--out", required=True, help="a new folder")
    add("--scale", type=float, default=1.0, help="of all true numbers (default: 1)")
    add("--seed", type=int, default=0)
    add = commands.add_parser("run").add_argument
    add("--data", required=True, help="the tree")
    add("--recipe", nargs="+", default=full_size(), choices=full_size(), metavar="RECIPE")
    add("--no-evaluation", action="store_true", help="where it is the same as another recipe's")
    commands.add_parser("table")
    args = parser.parse_args(argv)
    if args.command == "table":
        seeds.fill(rehearsal=table(json.loads(seeds.RESULTS.read_text())))
    elif args.command == "tree":
        write_tree(args.out, args.scale, args.seed)
    else:
        run_all(args.data, args.recipe, not args.no_evaluation)


def full_size():
    """The recipes of the papers"""
    return [name for name in train.RECIPES if not name.startswith("toy")]


if __name__ == "__main__":
    main()
