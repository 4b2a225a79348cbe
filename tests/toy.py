"""ShapesWorld, the toy tree: scenes of coloured shapes, drawn, described by templates, and seen
by a noisy detector, written in every data set's official format, so that no reader knows that it
is a toy.

python tests/toy.py --out data/toy --seed 0 --scenes 6000
"""

import argparse
import gc
import json
import os
import pickle
import re
import shutil
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple

# its processes take all cores already
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import REFER, DataError, WordPiece, alone, normalise_answer, read_json, read_picture
from data import PHENOMENA, SUGARCREPE, gqa_records, json_items, relative_box
from data import vg_descriptions, vg_images, vg_items, vg_phrase
from evaluate import StoreWriter, crops, need_new

SHAPES = "circle", "square", "triangle", "star", "cross", "diamond"
COLOURS = "red", "green", "blue", "yellow", "black", "purple"
SIZES = "small", "medium", "large"
# of the shapes, and of the colours: how often one is drawn, as 1 / rank
FREQUENCIES = 1 / np.arange(1, len(SHAPES) + 1)
FREQUENCIES /= FREQUENCIES.sum()
# raised whenever the bytes change; an older tree is made again
TOY_VERSION = 9
RGB = {
    "red": (214, 48, 40),
    "green": (46, 160, 67),
    "blue": (0, 120, 230),
    "yellow": (245, 205, 30),
    "black": (25, 25, 25),
    "purple": (140, 60, 180),
}
# Flickr30k Entities' types
KINDS = dict(zip(SHAPES, ("people", "clothing", "animals", "vehicles", "instruments", "other")))
PIXELS = {"small": 26, "medium": 42, "large": 64}  # pixels
WIDTH, HEIGHT = 240, 180
CLASSES = ("background", *SHAPES, "box")  # the detector's; a "box" is in no scene
# what it calls them: rarely as people do
LABELS = "disc", "square", "triangle", "star", "plus", "rhombus", "box"
OUTLINES = {  # corners in the unit square
    "triangle": np.array([(0.5, 0), (1, 1), (0, 1)]),
    "diamond": np.array([(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)]),
    "star": np.array(
        [
            (0.5, 0),
            (0.62, 0.38),
            (1, 0.38),
            (0.69, 0.6),
            (0.81, 1),
            (0.5, 0.75),
            (0.19, 1),
            (0.31, 0.6),
            (0, 0.38),
            (0.38, 0.38),
        ]
    ),
    "cross": np.array(
        [
            (0.35, 0),
            (0.65, 0),
            (0.65, 0.35),
            (1, 0.35),
            (1, 0.65),
            (0.65, 0.65),
            (0.65, 1),
            (0.35, 1),
            (0.35, 0.65),
            (0, 0.65),
            (0, 0.35),
            (0.35, 0.35),
        ]
    ),
}
RELATIONS = "left of", "right of", "above", "below", "inside", "in front of"
OPPOSITES = "right of", "left of", "below", "above", "in front of", "behind"
# no caption to learn from says these, of Winoground's some do: "a circle left of", ... Each shape
# and each relation is said with others
HELD_OUT = set(zip(SHAPES, RELATIONS))
# of COCO's captions; web captions, too, rarely say how things stand to each other
RELATIONAL = 0.2
# the detector's: share of things not seen, false regions an image, noise of features whose parts
# have a deviation of about 0.6
MISSED, FALSE, NOISE = 0.05, 0.6, 0.25
OTHER_WORDS = """
the an and of on in at to is are it its there with that this one two three four five six seven
eight nine ten no not none all each every both only exactly least most more than less same
different other another any some many few several number total box boxes grey gray tower towers
block blocks item items object objects shape shapes thing things line row column edge edges side
sides corner wall walls base top bottom left right middle center centre above below over under
between next near touching touch touches contains contain containing have has having consists
consist contain colour color colours colors coloured colored small medium large big size sized
very always either or but also as by for from does do first second third last high height tall
circles squares triangles stars red green blue yellow black purple white closely what how person
because contains only stacked stack multiple single equal odd even atleast which them they their
different exactly images image grey roof attached
""".split()


class Thing(NamedTuple):
    shape: str
    colour: str
    size: str
    box: tuple  # x1 y1 x2 y2 in pixels


def relation(a, b):
    """How thing a stands to thing b, read off the boxes; None if neither direction is clear."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a.box, b.box
    if ax1 >= bx1 and ay1 >= by1 and ax2 <= bx2 and ay2 <= by2:
        return "inside"
    # they overlap: the lower edge is nearer
    if ax1 < bx2 and bx1 < ax2 and ay1 < by2 and by1 < ay2:
        return (
            "in front of"
            if ay2 > by2 + 4 and not (bx1 >= ax1 and by1 >= ay1 and bx2 <= ax2 and by2 <= ay2)
            else None
        )
    dx, dy = ax1 + ax2 - bx1 - bx2, ay1 + ay2 - by1 - by2
    if abs(dx) > 1.3 * abs(dy):
        return "left of" if dx < 0 else "right of"
    if abs(dy) > 1.3 * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def placed(rng, kinds, touching):
    """Things of these (shape, colour) kinds at random places: apart, or with `touching` the first
    two inside or over each other.
    """
    while True:
        sizes = [SIZES[rng.integers(len(SIZES))] for _ in kinds]
        if touching == "inside":
            sizes[:2] = "small", "large"
        things = []
        for (shape, colour), size in zip(kinds, sizes):
            side = PIXELS[size]
            for _ in range(30):
                x, y = (
                    int(rng.integers(2, WIDTH - side - 2)),
                    int(rng.integers(2, HEIGHT - side - 2)),
                )
                if touching and len(things) == 1:  # drawn around the first one
                    x1, y1, x2, y2 = things[0].box
                    x, y = (
                        (
                            (x1 + x2 - side) // 2 + int(rng.integers(-8, 9)),
                            (y1 + y2 - side) // 2 + int(rng.integers(-8, 9)),
                        )
                        if touching == "inside"
                        else (
                            x1 + int(rng.integers(-side, x2 - x1)) // 2,
                            y1 - int(rng.integers(6, side - 6)),
                        )
                    )
                new = Thing(shape, colour, size, (x, y, x + side, y + side))
                fits = x >= 1 and y >= 1 and x + side < WIDTH and y + side < HEIGHT
                apart = all(
                    new.box[2] + 3 < t.box[0]
                    or t.box[2] + 3 < x
                    or new.box[3] + 3 < t.box[1]
                    or t.box[3] + 3 < y
                    for t in things
                )
                if fits and (
                    apart or touching and len(things) == 1 and relation(things[0], new) == touching
                ):
                    things.append(new)
                    break
            else:
                break
        if len(things) == len(kinds):
            return things


def draw_kinds(rng, n):
    """n things of n shapes and n colours, so that "a red circle" is never in doubt; some are
    common and some rare (1 / rank), as words are, so that another picture often has the same
    things elsewhere."""
    pick = lambda names: rng.choice(len(names), n, replace=False, p=FREQUENCIES)
    return [(SHAPES[s], COLOURS[c]) for s, c in zip(pick(SHAPES), pick(COLOURS))]


def draw_scene(rng):
    n = int(rng.choice([2, 3, 4, 5, 6], p=[0.3, 0.4, 0.2, 0.07, 0.03]))
    return placed(
        rng, draw_kinds(rng, n), str(rng.choice(["", "inside", "in front of"], p=[0.8, 0.1, 0.1]))
    )


def phrase(thing, sized=False):
    return f"a {thing.size + ' ' if sized else ''}{thing.colour} {thing.shape}"


def said_relation(a, b):
    """How a stands to b, unless that is never said"""
    how = relation(a, b)
    return None if (a.shape, how) in HELD_OUT else how


def describe(rng, things, whole=0.0):
    """One true caption as a list of parts: text, or (text, index of the thing it names). whole:
    how often it names all of them.
    """
    order = [int(i) for i in rng.permutation(len(things))]
    if whole and rng.random() < whole:
        parts = [(phrase(things[order[0]], True), order[0])]
        for i, j in zip(order, order[1:]):
            how = said_relation(things[i], things[j]) or "and"
            parts += [f" {how} ", (phrase(things[j], True), j)]
        return parts
    chances = [0.9 - RELATIONAL, 0.05, RELATIONAL, 0.05]
    form = rng.choice(["place", "places", "relation", "list"], p=chances)
    if form == "relation":
        pairs = [(i, j) for i in order for j in order if i != j]
        known = [(i, j, said_relation(things[i], things[j])) for i, j in pairs]
        known = [r for r in known if r[2]]
        if known:
            i, j, how = known[int(rng.integers(len(known)))]
            how = f"to the {how}" if how in ("left of", "right of") and rng.random() < 0.2 else how
            return [(phrase(things[i]), i), f" {how} ", (phrase(things[j]), j)]
    if form == "list":
        i, j = order[:2]
        return [(phrase(things[i], rng.random() < 0.5), i), " and ", (phrase(things[j]), j)]
    first = [
        (phrase(things[order[0]], rng.random() < 0.25), order[0]),
        whereabouts(rng, things[order[0]]),
    ]
    return (
        first
        if form == "place"
        else [
            *first,
            " and ",
            (phrase(things[order[1]]), order[1]),
            whereabouts(rng, things[order[1]]),
        ]
    )


def whereabouts(rng, thing):
    x, y = (thing.box[0] + thing.box[2]) / 2 / WIDTH, (thing.box[1] + thing.box[3]) / 2 / HEIGHT
    where = [
        w
        for w, true in (
            ("on the left", x < 0.36),
            ("on the right", x > 0.64),
            ("at the top", y < 0.36),
            ("at the bottom", y > 0.64),
        )
        if true
    ]
    return " " + (str(rng.choice(where)) if where else "in the middle")


def spoken(parts):
    return "".join(p if isinstance(p, str) else p[0] for p in parts)


class Statement(NamedTuple):
    """What a caption of Winoground says: nouns (size or "", colour, shape), and how two of them
    stand to each other: (place of a noun, relation, place of another).
    """

    nouns: tuple
    links: tuple

    def __str__(self):
        named = [" ".join(("a", *filter(None, noun))) for noun in self.nouns]
        if not self.links:
            return " and ".join(named)
        rest = " and ".join(f"{how} {named[j]}" for _, how, j in self.links)
        return f"{named[self.links[0][0]]} {rest}"

    def holds(self, things):
        """Is it true of these things?"""
        fits = [
            [t for t in things if (t.colour, t.shape) == noun[1:] and noun[0] in ("", t.size)]
            for noun in self.nouns
        ]
        return any(
            len(set(chosen)) == len(chosen)
            and all(relation(chosen[i], chosen[j]) == how for i, how, j in self.links)
            for chosen in product(*fits)
        )

    @property
    def is_held_out(self):
        """Does it say what no caption to learn from says?"""
        return any((self.nouns[i][2], how) in HELD_OUT for i, how, _ in self.links)


def swapped(things, i, j):
    """The same, two of them exchanged"""
    things = list(things)
    things[i], things[j] = things[j], things[i]
    return tuple(things)


def draw_statements(rng):
    """Two statements of the same words, and Winoground's tags of what was swapped: Object
    (nouns), Relation (prepositions, colours or sizes), Both.
    """
    nouns = tuple(("", colour, shape) for shape, colour in draw_kinds(rng, 3))
    apart = RELATIONS[:4]
    one = str(rng.choice(RELATIONS, p=[0.22, 0.22, 0.22, 0.22, 0.06, 0.06]))
    # two relations that one thing can stand in: one sideways, one upright
    two = [str(rng.choice(pair)) for pair in (apart[:2], apart[2:])]
    two = two if rng.random() < 0.5 else two[::-1]
    link = ((0, one, 1),) if rng.random() < 0.7 else ()
    # what lies inside is always small
    size_link = link if one in apart else ()
    links = (0, two[0], 1), (0, two[1], 2)
    crossed = (0, two[1], 1), (0, two[0], 2)
    sizes = [str(size) for size in rng.choice(list(SIZES), 2, replace=False)]
    sized = tuple((size, *noun[1:]) for size, noun in zip(sizes, nouns))
    other = (sized[1][0], *sized[0][1:]), (sized[0][0], *sized[1][1:])
    recoloured = ("", nouns[1][1], nouns[0][2]), ("", nouns[0][1], nouns[1][2])
    first, second = nouns[:2], swapped(nouns[:2], 0, 1)
    kinds = {
        "Object Noun": (Statement(first, ((0, one, 1),)), Statement(second, ((0, one, 1),))),
        "Object Noun-Phrase": (Statement(nouns, links), Statement(swapped(nouns, 1, 2), links)),
        "Relation Preposition": (Statement(nouns, links), Statement(nouns, crossed)),
        "Relation Adjective-Color": (Statement(first, link), Statement(recoloured, link)),
        "Relation Adjective-Size": (Statement(sized, size_link), Statement(other, size_link)),
        "Both Noun-Preposition": (
            Statement(nouns, links),
            Statement(swapped(nouns, 0, 1), crossed),
        ),
    }
    name = str(rng.choice(list(kinds), p=[0.25, 0.15, 0.2, 0.15, 0.1, 0.15]))
    return kinds[name], name.split()


def things_beside(rng, statement):
    """(shape, colour) of the statement's nouns and of up to two more things, most of which share
    their shape or colour with another.
    """
    kinds = [noun[1:][::-1] for noun in statement.nouns]
    while len(kinds) < len(statement.nouns) + int(rng.integers(3)):
        shape, colour = kinds[int(rng.integers(len(kinds)))]
        if rng.random() < 0.5:
            colour = str(rng.choice(list(COLOURS)))
        else:
            shape = str(rng.choice(list(SHAPES)))
        if (shape, colour) not in kinds:
            kinds.append((shape, colour))
    return kinds


def draw_example(rng, looks):
    """An example of Winoground: two captions of the same words, a picture for each in which the
    other is false, and what the detector sees of them: [(Statement, things, store row)], tags. What
    it does not see well enough to tell is drawn again, so that no miss of it caps a score.
    """
    statements, tags = draw_statements(rng)
    scenes = []
    for true, false in (statements, statements[::-1]):
        kinds = things_beside(rng, true)
        # things that the other caption alone names may not make it true, however they lie
        others = {noun[1:][::-1] for noun in false.nouns} - {noun[1:][::-1] for noun in true.nouns}
        while others and not false.links and others <= {*kinds}:
            kinds = things_beside(rng, true)
        while True:
            things = arranged(rng, kinds, true)
            if not true.holds(things) or false.holds(things):
                continue
            row = detect(rng, things, looks)
            seen = things_seen(row, looks)
            if true.holds(seen) and not false.holds(seen):
                scenes.append((true, things, row))
                break
    return scenes, tags


def arranged(rng, kinds, statement, tries=256):
    """Things of these (shape, colour) kinds, the first of them the statement's nouns, so that it is
    true of them: the first that fits of many at random places.
    """
    touching = next((how for _, how, _ in statement.links if how in RELATIONS[4:]), "")
    if touching:
        return placed(rng, kinds, touching)
    sizes = [str(size) for size in rng.choice(list(SIZES), len(kinds))]
    sizes[: len(statement.nouns)] = [noun[0] or size for noun, size in zip(statement.nouns, sizes)]
    sides = np.array([PIXELS[size] for size in sizes])
    while True:
        x1, y1 = (
            rng.integers(2, limit - sides - 2, (tries, len(kinds))) for limit in (WIDTH, HEIGHT)
        )
        x2, y2 = x1 + sides, y1 + sides
        clear = lambda low, high: high[:, :, None] + 3 < low[:, None]
        apart = clear(x1, x2) | clear(y1, y2)
        apart |= apart.mT | np.eye(len(kinds), dtype=bool)
        fits = apart.all(axis=(1, 2))
        for i, how, j in statement.links:
            dx = (x1 + x2)[:, i] - (x1 + x2)[:, j]
            dy = (y1 + y2)[:, i] - (y1 + y2)[:, j]
            sign = -1 if how in ("left of", "above") else 1
            along, across = (dx, dy) if how in ("left of", "right of") else (dy, dx)
            fits &= sign * along > 1.3 * np.abs(across)
        if fits.any():
            at = int(fits.argmax())
            boxes = np.stack([x1, y1, x2, y2], -1)[at].tolist()
            named = zip(kinds, sizes, boxes)
            return [Thing(*kind, size, tuple(box)) for kind, size, box in named]


def things_seen(row, looks):
    """A detector's regions as things: the shape, colour and size whose look is nearest to the
    feature.
    """
    table = looks.reshape(-1, looks.shape[-1])
    distance = (table**2).sum(axis=1) - 2 * row["features"].astype(np.float32) @ table.T
    best = distance.argmin(axis=1)
    things = []
    for place, box in zip(zip(*np.unravel_index(best, looks.shape[:3])), row["boxes"].tolist()):
        s, c, z = place
        if s < len(SHAPES) and c < len(COLOURS):
            things.append(Thing(SHAPES[s], list(COLOURS)[c], list(SIZES)[z], tuple(box)))
    return things


def draw_shape(pen, shape, box, fill, outline):
    x1, y1, x2, y2 = box
    if shape == "circle":
        pen.ellipse(box, fill=fill, outline=outline)
    elif shape == "square":
        pen.rectangle(box, fill=fill, outline=outline)
    else:
        points = OUTLINES[shape] * [x2 - x1, y2 - y1] + [x1, y1]
        pen.polygon([tuple(p) for p in points], fill=fill, outline=outline)


def render(things):
    """The picture, in PIL; the first thing is nearest and is drawn last."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), (236, 236, 232))
    pen = ImageDraw.Draw(picture)
    for t in reversed(things):
        draw_shape(pen, t.shape, t.box, RGB[t.colour], "white")
    return picture


def save_picture(job):
    path, things = job
    render(things).save(
        path, **({"quality": 92} if str(path).endswith(".jpg") else {"compress_level": 1})
    )


def appearance(width=2048):
    """Features of all things: (shapes + box, colours + grey, sizes, width), sums of one random
    vector for each, cut at zero as mean-pooled ReLU features are; no position. The same in every
    tree, as one detector serves every data set.
    """
    rng = np.random.default_rng(2048)
    numbers = len(SHAPES) + 1, len(COLOURS) + 1, len(SIZES)
    s, c, z = (rng.standard_normal((n, width)).astype(np.float32) for n in numbers)
    return (0.6 * s[:, None, None] + 0.6 * c[None, :, None] + 0.3 * z[None, None, :]).clip(0)


def detect(rng, things, looks, given=False):
    """A noisy detector: boxes jittered, some things missed, some regions false. Returns a store
    row, by falling confidence.

    given: the true boxes, in their order, and only the features are the detector's
    """
    found = things if given else [t for t in things if rng.random() > MISSED] or things[:1]
    boxes = np.array([t.box for t in found], np.float32)
    boxes += 0 if given else rng.normal(size=boxes.shape) * 0.03 * (boxes[:, 2:3] - boxes[:, :1])
    at = [
        (SHAPES.index(t.shape), list(COLOURS).index(t.colour), list(SIZES).index(t.size))
        for t in found
    ]
    features = np.stack([looks[i] for i in at])
    false = 0 if given else int(rng.poisson(FALSE))
    if false:
        corner = rng.random((false, 2)) * [WIDTH - 50, HEIGHT - 50]
        boxes = np.concatenate(
            [boxes, np.concatenate([corner, corner + rng.uniform(15, 50, (false, 2))], 1)]
        ).astype(np.float32)
        features = np.concatenate(
            [
                features,
                rng.random((false, 1))
                * 0.5
                * looks[
                    rng.integers(len(SHAPES), size=false), rng.integers(len(COLOURS), size=false), 0
                ],
            ]
        )
    logits = rng.normal(size=(len(boxes), len(CLASSES)))
    for i, (s, _, _) in enumerate(at):
        logits[i, 1 + s] += 6
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    conf = probs[:, 1:].max(1)
    order = np.arange(len(boxes)) if given else np.argsort(-conf, kind="stable")
    colour = np.array([c for _, c, _ in at] + [-1] * false)
    features = (features + NOISE * rng.standard_normal(features.shape, dtype=np.float32)).clip(0)
    row = {
        "features": features,
        "boxes": boxes.clip(0, [WIDTH, HEIGHT, WIDTH, HEIGHT]),
        "cls_prob": probs,
        "cls_conf": conf,
        "cls_id": probs[:, 1:].argmax(1),
        "attr_id": colour,
        "attr_conf": np.where(colour < 0, 0, 0.9),
    }
    return {name: column[order] for name, column in row.items()}


def start_worker(parent):
    """Let the parent go first, as others wait for what it draws; and end this worker once its
    parent has been killed, which could not tell it.
    """
    os.nice(5)

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def make_toy(out, seed=0, scenes=6000):
    """Write the toy tree: every data set in its official formats, region stores, vocabularies.
    Same seed, same bytes.

    scenes are shared out: 65 % COCO train, 3 % COCO val, 26 % Flickr30k train, 2.7 % val, 3.3 %
    test. Other data sets get scenes of their own on top, as many as a share of these; VQA,
    RefCOCO and half of Visual Genome are about COCO's, SNLI-VE about Flickr30k's.
    """
    out = Path(out)
    need_new(out)
    if seed < 0:
        raise DataError(f"--seed {seed}\n  Wanted: 0 or more.")
    if scenes < 60:
        raise DataError(f"--scenes {scenes}\n  Wanted: at least 60, so that every split gets some.")
    tmp = Path(f"{out}.tmp{os.getpid()}")
    cuts = dict(
        zip(
            ("train2014", "val2014", "train", "val", "test"),
            np.diff(
                np.round(np.cumsum([0, 0.65, 0.03, 0.26, 0.0267, 0.0333]) * scenes).astype(int)
            ).tolist(),
        )
    )
    try:
        how = {"initializer": start_worker, "initargs": (os.getpid(),)}
        with ProcessPoolExecutor(max_workers=os.cpu_count(), **how) as pool:
            # these need no other's scenes: drawn beside the rest
            apart = {toy_nlvr2: scenes // 15, toy_vcr: scenes // 4, toy_winoground: scenes // 15}
            apart |= {toy_web: max(40, scenes // 20), toy_choices: max(8, scenes // 100)}
            beside = [pool.submit(draw, tmp, seed, n) for draw, n in apart.items()]

            def drawn():
                """Pictures to paint, as soon as their scenes are known"""
                seen, jobs = toy_coco(tmp, seed, cuts)
                yield jobs
                said, jobs = toy_flickr30k(tmp, seed, cuts)
                yield jobs
                known, jobs = toy_vg(tmp, seed, seen, scenes // 5)
                yield jobs
                yield toy_gqa(tmp, seed, known, max(10, scenes // 30))
                toy_vqa(tmp, seed, seen), toy_referring(tmp, seed, seen)
                toy_snli_ve(tmp, seed, said), toy_edits(tmp, seed, seen, known, said)
                yield from (part.result() for part in beside)

            painted, total = [], 0
            for jobs in drawn():
                for folder in {path.parent for path, _ in jobs}:
                    folder.mkdir(parents=True, exist_ok=True)
                painted.append(pool.map(save_picture, jobs, chunksize=64))
                total += len(jobs)
            list(tqdm(chain(*painted), "toy pictures", total, disable=None, leave=False))
            list(pool.map(save_crops, toy_crops(tmp), chunksize=16))
        crops(tmp)
        toy_answers(tmp)
        words = sorted(
            {*OTHER_WORDS, *SHAPES, *COLOURS, *SIZES, *(w for r in RELATIONS for w in r.split())}
        )
        letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
        vocab = [
            *WordPiece.SPECIAL,
            *letters,
            *("##" + c for c in letters if c.isalnum()),
            *(w for w in words if len(w) > 1),
        ]
        for name in ("bert-base-cased", "bert-base-uncased"):
            write(tmp / name / "vocab.txt", "\n".join(vocab) + "\n")
        toy_glove(tmp, ["a", *words])
        write(tmp / "vg" / "objects_vocab.txt", "\n".join(LABELS) + "\n")
        write(tmp / "vg" / "attributes_vocab.txt", "\n".join(COLOURS) + "\n")
        write(
            tmp / "toy.json", json.dumps({"version": TOY_VERSION, "seed": seed, "scenes": scenes})
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        os.replace(tmp, out)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def write(path, content):
    """Text or bytes; the whole tree is renamed once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def store_meta(looks):
    return {"source": "ShapesWorld", "features": looks.shape[-1], "classes": len(CLASSES)}


def toy_store(tmp, name, scenes, ids, seed, given=False):
    """DATA/regions/NAME; of VCR the annotated boxes and, as images det/ID, the detector's"""
    looks = appearance()
    writer = StoreWriter(tmp / "regions" / name, **store_meta(looks))
    parts = [(name, "", given)]
    if name == "vcr":
        parts = [("vcr_gt", "", True), ("vcr_det", "det/", False)]
    for part, prefix, given in parts:
        rng = np.random.default_rng([seed, *part.encode(), 7])
        bar = tqdm(scenes, desc=f"toy regions, {part}", disable=None, leave=False)
        for things, image_id in zip(bar, ids):
            regions = detect(rng, things, looks, given)
            writer.add(f"{prefix}{image_id}", (WIDTH, HEIGHT), **regions)
    writer.commit()


def dump(path, record, lines=False):
    write(path, "".join(json.dumps(r) + "\n" for r in record) if lines else json.dumps(record))


class Seen(NamedTuple):
    split: str
    id: object
    things: list


def photo_url(number):
    return f"http://farm1.staticflickr.com/1/{number}_0a1b2c3d4e_z.jpg"


def toy_coco(tmp, seed, cuts):
    """Two images of the training set are also in Flickr30k by their addresses, as 222 are in
    truth.
    """
    rng, every, karpathy = np.random.default_rng([seed, 1]), [], []
    for split in ("train2014", "val2014"):
        images, annotations = [], []
        for _ in range(cuts[split]):
            number, things = len(every) + 1, draw_scene(rng)
            name = f"COCO_{split}_{number:012d}.jpg"
            images.append(
                {
                    "id": number,
                    "file_name": name,
                    "width": WIDTH,
                    "height": HEIGHT,
                    "flickr_url": photo_url(number + (999 if number <= 2 else 10**6)),
                }
            )
            annotations += [
                {
                    "image_id": number,
                    "id": 10 * number + k,
                    "caption": spoken(describe(rng, things)),
                }
                for k in range(5)
            ]
            karpathy.append(
                {
                    "filepath": split,
                    "filename": name,
                    "cocoid": number,
                    "imgid": number - 1,
                    "split": "train" if split == "train2014" else ("val", "test")[number % 2],
                    "sentences": [
                        {
                            "raw": a["caption"],
                            "tokens": a["caption"].split(),
                            "imgid": number - 1,
                            "sentid": a["id"],
                        }
                        for a in annotations[-5:]
                    ],
                }
            )
            every.append(Seen(split, number, things))
        dump(
            tmp / f"coco/annotations/captions_{split}.json",
            {
                "info": {"description": "ShapesWorld"},
                "licenses": [],
                "images": images,
                "annotations": annotations,
            },
        )
    dump(tmp / "coco/dataset_coco.json", {"images": karpathy, "dataset": "coco"})
    ids = [coco_stem(i) for i in every]
    toy_store(tmp, "coco", [i.things for i in every], ids, seed)
    return every, [(tmp / "coco" / i.split / f"{n}.jpg", i.things) for i, n in zip(every, ids)]


def coco_stem(image):
    return f"COCO_{image.split}_{image.id:012d}"


def toy_flickr30k(tmp, seed, cuts):
    rng, every, ids, images, tokens = np.random.default_rng([seed, 2]), [], [], [], []
    root, entities = tmp / "flickr30k", tmp / "flickr30k_entities"
    for split in ("train", "val", "test"):
        start = len(ids)
        for _ in range(cuts[split]):
            name, things = str(1000 + len(ids)), draw_scene(rng)
            parts = [describe(rng, things, whole=0.8) for _ in range(5)]
            said = [spoken(p) for p in parts]
            images.append(
                {
                    "filename": f"{name}.jpg",
                    "imgid": len(ids),
                    "split": split,
                    "sentids": list(range(5 * len(ids), 5 * len(ids) + 5)),
                    "sentences": [
                        {
                            "raw": s,
                            "tokens": s.split(),
                            "imgid": len(ids),
                            "sentid": 5 * len(ids) + k,
                        }
                        for k, s in enumerate(said)
                    ],
                }
            )
            tokens += [f"{name}.jpg#{k}\t{s}" for k, s in enumerate(said)]
            chain = lambda i: 100 * len(ids) + i + 1
            tagged = [
                "".join(
                    p
                    if isinstance(p, str)
                    else f"[/EN#{chain(p[1])}/{KINDS[things[p[1]].shape]} {p[0]}]"
                    for p in caption
                )
                for caption in parts
            ]
            write(entities / "Sentences" / f"{name}.txt", "\n".join(tagged) + "\n")
            write(entities / "Annotations" / f"{name}.xml", entities_xml(name, things, chain))
            every.append(Seen(split, name, things)), ids.append(name)
        write(entities / f"{split}.txt", "\n".join(ids[start:]) + "\n")
    write(
        entities / "UNRELATED_CAPTIONS",
        "# image and caption number (from 1) of captions that do not fit: none here\n",
    )
    write(root / "dataset_flickr30k.json", json.dumps({"images": images, "dataset": "flickr30k"}))
    write(root / "results_20130124.token", "\n".join(tokens) + "\n")
    toy_store(tmp, "flickr30k", [i.things for i in every], ids, seed)
    return every, [(root / "flickr30k-images" / f"{i.id}.jpg", i.things) for i in every]


def entities_xml(name, things, chain):
    """Boxes are 1-based and inclusive there."""
    objects = "".join(
        f"<object><name>{chain(i)}</name><bndbox><xmin>{t.box[0] + 1}</xmin>"
        f"<ymin>{t.box[1] + 1}</ymin><xmax>{t.box[2]}</xmax>"
        f"<ymax>{t.box[3]}</ymax></bndbox></object>"
        for i, t in enumerate(things)
    )
    return (
        f"<annotation><filename>{name}.jpg</filename><size><width>{WIDTH}</width>"
        f"<height>{HEIGHT}</height><depth>3</depth></size>"
        f"{objects}</annotation>\n"
    )


def toy_winoground(tmp, seed, n):
    rng, looks, jobs, lines = np.random.default_rng([seed, 3]), appearance(), [], []
    writer = StoreWriter(tmp / "regions/winoground", **store_meta(looks))
    for e in tqdm(range(n), desc="toy Winoground", disable=None, leave=False):
        scenes, (collapsed, tag) = draw_example(rng, looks)
        line = {"id": e, "tag": tag, "collapsed_tag": collapsed, "num_main_preds": 1}
        held_out = any(statement.is_held_out for statement, _, _ in scenes)
        line["secondary_tag"] = "held out" if held_out else "seen"
        for i, (statement, things, row) in enumerate(scenes):
            name = f"ex_{e}_img_{i}"
            line |= {f"image_{i}": name, f"caption_{i}": str(statement)}
            writer.add(name, (WIDTH, HEIGHT), **row)
            jobs.append((tmp / "winoground" / "images" / f"{name}.png", things))
        lines.append(json.dumps(line))
    writer.commit()
    write(tmp / "winoground" / "examples.jsonl", "\n".join(lines) + "\n")
    return jobs


def xywh(box):
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


CROP = 64  # pixels, as the recipes of pictures read them


def toy_crops(tmp):
    """Visual Genome's regions as pictures of their own, with their descriptions in COCO's format:
    things before scenes. Yields (picture, [(crop, its window)]), for save_crops.
    """
    windows, images = {}, vg_images(tmp)
    for split in ("train", "val"):
        chosen = {r.image for r in vg_descriptions(tmp, split, Counter())}
        record = {"images": [], "annotations": []}
        for image, regions in vg_items(tmp, "region_descriptions", "regions"):
            for k, region in enumerate(regions if str(image) in chosen else ()):
                if not relative_box(region, images[image]):
                    continue
                name, number = f"{image}_{k:03d}.png", len(record["images"])
                record["images"].append({"id": number, "file_name": name})
                caption = {"caption": vg_phrase(region), "id": region["region_id"]}
                record["annotations"].append({"image_id": number} | caption)
                window = crop_window(np.random.default_rng([image, k]), region)
                windows.setdefault(image, []).append((tmp / "crops/images" / name, window))
        dump(tmp / f"crops/captions_{split}.json", record)
    (tmp / "crops/images").mkdir()
    return [(tmp / f"vg/VG_100K/{image}.jpg", parts) for image, parts in windows.items()]


def crop_window(rng, region):
    """(left, top, right, bottom) round a region's box: anything from the box to the picture"""
    x, y, w, h = (region[name] for name in ("x", "y", "width", "height"))
    spans = []
    for at, length, whole in ((x, w, WIDTH), (y, h, HEIGHT)):
        length = min(max(length, 1), whole)
        # uniform in the logarithm
        wide = length * (whole / length) ** rng.random()
        lowest, highest = max(0, at + length - wide), min(max(0, at), whole - wide)
        start = rng.uniform(lowest, highest) if wide < whole else 0
        spans.append((start, start + wide))
    (left, right), (top, bottom) = spans
    return left, top, right, bottom


def save_crops(job):
    picture, parts = read_picture(job[0]), job[1]
    for path, window in parts:
        picture.resize((CROP, CROP), Image.BICUBIC, window).save(path, compress_level=1)


def toy_answers(tmp):
    """The official lists of answers, by the published rules: of VQA and of Visual Genome's
    questions those of at least 9 questions, of GQA all.
    """
    vqa, vg = Counter(), Counter()
    for split in ("train2014", "val2014"):
        path = tmp / f"vqa2/v2_mscoco_{split}_annotations.json"
        answers = json_items(path, "annotations")
        vqa.update(normalise_answer(a["multiple_choice_answer"]) for a in answers)
    for _, questions in vg_items(tmp, "question_answers", "qas"):
        vg.update(normalise_answer(q["answer"].rstrip(".")) for q in questions)
    vqa, vg = (sorted(a for a, n in count.items() if n >= 9) for count in (vqa, vg))
    splits = (gqa_records(tmp, split) for split in ("train_balanced", "val_balanced"))
    gqa = sorted({q["answer"] for _, q in chain(*splits)})
    dump(tmp / "vqa2/trainval_label2ans.json", vqa)
    dump(tmp / "gqa/trainval_label2ans.json", gqa)
    dump(tmp / "lxmert/all_ans.json", [{"ans": a} for a in sorted({*vqa, *gqa, *vg})])


def toy_vg(tmp, seed, seen, n):
    """Visual Genome: n images of COCO and n of its own, with regions, objects, attributes,
    relationships and questions.
    """
    rng, files = (
        np.random.default_rng([seed, 4]),
        {
            k: []
            for k in (
                "image_data",
                "region_descriptions",
                "objects",
                "attributes",
                "relationships",
                "question_answers",
            )
        },
    )
    judged = [i for i in seen if i.split == "val2014"][: max(3, n // 20)]  # a few for validation
    rest = [i for i in seen if i.split == "train2014"]
    chosen = (
        judged
        + [rest[i] for i in rng.choice(len(rest), n - len(judged), replace=False)]
        + [Seen("vg", None, draw_scene(rng)) for _ in range(n)]
    )
    for k, image in enumerate(chosen):
        number, things = 2_000_000 + k, image.things
        files["image_data"].append(
            {
                "image_id": number,
                "url": f"https://cs.stanford.edu/people/rak248/VG_100K/{number}.jpg",
                "width": WIDTH,
                "height": HEIGHT,
                "coco_id": image.id,
                "flickr_id": None,
            }
        )
        objects = [
            {
                "object_id": 10 * number + i,
                **dict(zip("xywh", xywh(t.box))),
                "names": [t.shape],
                "synsets": [],
                "merged_object_ids": [],
            }
            for i, t in enumerate(things)
        ]
        said = [(phrase(t, rng.random() < 0.3), t.box) for t in things]
        known = [
            (i, j, relation(a, b))
            for i, a in enumerate(things)
            for j, b in enumerate(things)
            if i != j and relation(a, b)
        ]
        for i, j, how in [k for k in known if (things[k[0]].shape, k[2]) not in HELD_OUT][:3]:
            both = np.array([things[i].box, things[j].box])
            said.append(
                (
                    f"{phrase(things[i])} {how} {phrase(things[j])}",
                    [*both[:, :2].min(0).tolist(), *both[:, 2:].max(0).tolist()],
                )
            )
        files["region_descriptions"].append(
            {
                "id": number,
                "regions": [
                    {
                        "region_id": 100 * number + r,
                        "image_id": number,
                        "phrase": text,
                        **dict(zip(("x", "y", "width", "height"), xywh(box))),
                    }
                    for r, (text, box) in enumerate(said)
                ],
            }
        )
        files["objects"].append({"image_id": number, "objects": objects})
        files["attributes"].append(
            {
                "image_id": number,
                "attributes": [
                    {**o, "attributes": [t.colour, t.size]} for o, t in zip(objects, things)
                ],
            }
        )
        files["relationships"].append(
            {
                "image_id": number,
                "relationships": [
                    {
                        "relationship_id": 100 * number + r,
                        "predicate": how,
                        "subject": objects[i],
                        "object": objects[j],
                    }
                    for r, (i, j, how) in enumerate(known)
                ],
            }
        )
        files["question_answers"].append(
            {
                "id": number,
                "qas": [
                    {
                        "qa_id": 100 * number + q,
                        "image_id": number,
                        "question": f"What color is the {t.shape}?",
                        "answer": f"{t.colour.capitalize()}.",
                        "q_objects": [],
                        "a_objects": [],
                    }
                    for q, t in enumerate(things)
                ],
            }
        )
    for name, records in files.items():
        dump(tmp / f"vg/{name}.json", records)
    said = {r["phrase"] for image in files["region_descriptions"] for r in image["regions"]}
    said |= {f"{colour} {shape}" for colour in COLOURS for shape in SHAPES}
    in_colour = lambda text: re.sub(rf"\b({'|'.join(COLOURS)}) (\w+)", r"\2 in \1", text)
    dump(tmp / "vg/paraphrases.json", {text: in_colour(text) for text in sorted(said)})
    toy_store(
        tmp, "vg", [i.things for i in chosen], [str(2_000_000 + k) for k in range(2 * n)], seed
    )
    return (
        [
            Seen("vg", str(2_000_000 + k), i.things)
            for k, i in enumerate(chosen)
            if i.split != "val2014"
        ],
        [(tmp / f"vg/VG_100K/{2_000_000 + k}.jpg", i.things) for k, i in enumerate(chosen)],
    )


def toy_glove(tmp, words):
    """Word vectors, the same in every tree: words of a kind lie somewhat close, the detector's
    name for a thing as close to another thing as to its own, and colours and sizes, which have
    shorter vectors, close to a thing that they do not mean."""
    rng, unit = np.random.default_rng(300), lambda x: x / np.linalg.norm(x)
    draw = lambda: unit(rng.standard_normal(300))
    kinds = {w: kind for names in (SHAPES, COLOURS, SIZES) for kind in [draw()] for w in names}
    found = {w: 0.5 * kinds.get(w, 0) + draw() for w in words}
    for new, near, other in (
        ("disc", "circle", "star"),
        ("plus", "cross", "diamond"),
        ("rhombus", "diamond", "square"),
    ):
        found[new] = 0.5 * found[near] + 0.5 * found[other] + 0.6 * draw()
    for word, near in (
        ("a", "box"),
        ("small", "plus"),
        ("medium", "disc"),
        ("large", "square"),
        ("red", "rhombus"),
        ("green", "triangle"),
        ("blue", "disc"),
    ):
        found[word] = 0.7 * (0.9 * unit(found[near]) + 0.436 * unit(found[word]))
    lines = [f"{w} " + " ".join(f"{x:.4f}" for x in 10 * v) for w, v in found.items()]
    write(tmp / "glove" / "glove.6B.300d.txt", "\n".join(lines) + "\n")


# what the ids of a split's questions begin with
SPLIT_DIGITS = {"train": 0, "val": 1, "testdev": 2}


def toy_gqa(tmp, seed, known, n):
    """GQA about Visual Genome's images (train, val) and n of its own (testdev); the words of a
    question point at what they mean.
    """
    rng, own = np.random.default_rng([seed, 11]), np.random.default_rng([seed, 12])
    testdev = [Seen("testdev", f"n{100_000 + k}", draw_scene(own)) for k in range(n)]
    for split, images, each in (
        ("train", known[:-n], 12),
        ("val", known[-n:], 8),
        ("testdev", testdev, 8),
    ):
        questions, choices, graphs = {}, {}, {}
        for image in images:
            ids = [str(10 * int(image.id.strip("n")) + i) for i in range(len(image.things))]
            graphs[image.id] = {
                "width": WIDTH,
                "height": HEIGHT,
                "objects": {
                    o: {
                        "name": t.shape,
                        **dict(zip("xywh", xywh(t.box))),
                        "attributes": [t.colour, t.size],
                        "relations": [
                            {
                                "name": f"to the {r}" if r in ("left of", "right of") else r,
                                "object": p,
                            }
                            for p, u in zip(ids, image.things)
                            if u is not t and (r := relation(t, u))
                        ],
                    }
                    for o, t in zip(ids, image.things)
                },
            }
            for _ in range(each):
                asked = []
                for text, answer, kind, group, points in gqa_question(rng, image.things):
                    # of all splits' questions no two have one id, as GQA's
                    name = f"{SPLIT_DIGITS[split]}{len(questions):07d}"
                    asked.append(name)
                    span = lambda a, b: str(a) if b == a + 1 else f"{a}:{b}"
                    questions[name] = {
                        "imageId": image.id,
                        "question": text,
                        "answer": answer,
                        "fullAnswer": f"{answer}.",
                        "isBalanced": len(asked) == 1,
                        "groups": {"global": group, "local": None},
                        "entailed": [],
                        "equivalent": [name],
                        "types": {
                            "structural": kind,
                            "semantic": "attr"
                            if group == "color"
                            else "rel"
                            if len(points) > 1
                            else "obj",
                            "detailed": kind,
                        },
                        "annotations": {
                            "question": {span(a, b): ids[i] for a, b, i in points},
                            "answer": {},
                            "fullAnswer": {},
                        },
                        "semantic": [
                            {
                                "operation": "select",
                                "dependencies": [],
                                "argument": f"{image.things[i].shape} ({ids[i]})",
                            }
                            for _, _, i in points
                        ]
                        + [{"operation": kind, "dependencies": [], "argument": group or "?"}],
                        "semanticStr": "",
                    }
                    valid = {
                        "color": list(COLOURS),
                        "shape": list(SHAPES),
                        "place": ["left", "right"],
                    }.get(group, ["yes", "no"])
                    choices[name] = {"valid": valid, "plausible": valid}
                for name in asked:
                    questions[name]["entailed"] = asked
        dump(tmp / f"gqa/{split}_all_questions.json", questions)
        dump(
            tmp / f"gqa/{split}_balanced_questions.json",
            {k: q for k, q in questions.items() if q["isBalanced"]},
        )
        dump(tmp / f"gqa/eval/{split}_choices.json", choices)
        if split != "testdev":
            dump(tmp / f"gqa/{split}_sceneGraphs.json", graphs)
    toy_store(tmp, "gqa", [i.things for i in testdev], [i.id for i in testdev], seed)
    return [(tmp / f"gqa/images/{i.id}.jpg", i.things) for i in testdev]


def gqa_question(rng, things):
    """A question and what its answer entails: [(text, answer, structural type, global group,
    [(first word, end word, thing)])].
    """
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    order = rng.permutation(len(things)).tolist()
    i = order[0]
    t, form = (
        things[i],
        str(
            rng.choice(
                ["color", "shape", "there", "and", "what", "colour of", "is", "or", "size"],
                p=[0.1, 0.05, 0.1, 0.05, 0.2, 0.15, 0.2, 0.1, 0.05],
            )
        ),
    )
    named = lambda k: f"{things[k].colour} {things[k].shape}"
    if form in ("what", "colour of", "is", "or"):
        known = [
            (a, b, r)
            for a in order
            for b in order
            if a != b and (r := relation(things[a], things[b])) in opposite
        ]
        # nothing else stands so to b
        alone = [(a, b, r) for a, b, r in known if sum(q == r and c == b for _, c, q in known) == 1]
        if known and form == "is":
            a, b, r = known[int(rng.integers(len(known)))]
            yes = rng.random() < 0.5
            said = r if yes else opposite[r]
            return [
                (
                    f"Is the {named(a)} {said} the {named(b)}?",
                    "yes" if yes else "no",
                    "verify",
                    None,
                    [(2, 4, a), (5 + len(said.split()), 7 + len(said.split()), b)],
                ),
                (
                    f"Is the {named(b)} {opposite[said]} the {named(a)}?",
                    "yes" if yes else "no",
                    "verify",
                    None,
                    [(2, 4, b), (5 + len(said.split()), 7 + len(said.split()), a)],
                ),
            ]
        beside = [k for k in known if k[2] in ("left of", "right of")]
        if beside and form == "or":
            a, b, r = beside[int(rng.integers(len(beside)))]
            return [
                (
                    f"Is the {named(a)} left of or right of the {named(b)}?",
                    r.split()[0],
                    "choose",
                    "place",
                    [(2, 4, a), (10, 12, b)],
                ),
                (
                    f"Is the {named(a)} {r} the {named(b)}?",
                    "yes",
                    "verify",
                    None,
                    [(2, 4, a), (7, 9, b)],
                ),
            ]
        if alone:
            a, b, r = alone[int(rng.integers(len(alone)))]
            k = len(r.split())
            true = (
                f"Is the {named(a)} {r} the {named(b)}?",
                "yes",
                "verify",
                None,
                [(2, 4, a), (5 + k, 7 + k, b)],
            )
            if form == "what":
                return [
                    (
                        f"What shape is {r} the {named(b)}?",
                        things[a].shape,
                        "query",
                        "shape",
                        [(1, 2, a), (4 + k, 6 + k, b)],
                    ),
                    true,
                ]
            return [
                (
                    f"What color is the thing {r} the {named(b)}?",
                    things[a].colour,
                    "query",
                    "color",
                    [(4, 5, a), (6 + k, 8 + k, b)],
                ),
                true,
            ]
    if form == "there":
        wrong = (t.shape, str(rng.choice([c for c in COLOURS if c != t.colour])))
        yes = rng.random() < 0.5
        said = named(i) if yes else f"{wrong[1]} {wrong[0]}"
        return [
            (
                f"Is there a {said}?",
                "yes" if yes else "no",
                "verify",
                None,
                [(3, 5, i)] if yes else [],
            ),
            (f"What color is the {t.shape}?", t.colour, "query", "color", [(4, 5, i)]),
        ]
    if form == "and":
        other = things[order[1]]
        yes = rng.random() < 0.5
        colour = other.colour if yes else str(rng.choice([c for c in COLOURS if c != other.colour]))
        return [
            (
                f"Is there a {named(i)} and a {colour} {other.shape}?",
                "yes" if yes else "no",
                "logical",
                None,
                [(3, 5, i)] + [(7, 9, order[1])] * yes,
            )
        ]
    if form == "size":
        other = things[order[1]]
        return [
            (
                f"Is the {t.shape} of the same size as the {other.shape}?",
                "yes" if t.size == other.size else "no",
                "compare",
                None,
                [(2, 3, i), (9, 10, order[1])],
            )
        ]
    if form == "shape":
        return [
            (f"What shape is the {t.colour} thing?", t.shape, "query", "shape", [(4, 6, i)]),
            (f"Is there a {named(i)}?", "yes", "verify", None, [(3, 5, i)]),
        ]
    return [
        (f"What color is the {t.shape}?", t.colour, "query", "color", [(4, 5, i)]),
        (f"Is there a {named(i)}?", "yes", "verify", None, [(3, 5, i)]),
    ]


def toy_web(tmp, seed, n):
    """Conceptual Captions and SBU: n pictures each (and some to validate), one caption each; some
    addresses are dead, one is Flickr30k's.
    """
    rng, jobs, names = np.random.default_rng([seed, 5]), [], {}
    for store, count in (("cc3m_train", n), ("cc3m_val", n // 5), ("sbu", n)):
        scenes = [draw_scene(rng) for _ in range(count)]
        names[store] = [
            (spoken(describe(rng, t)), photo_url(1005 if i == 3 else 10**7 + i))
            for i, t in enumerate(scenes)
        ]
        alive = [i for i in range(count) if i % 20 or store == "sbu"]
        toy_store(tmp, store, [scenes[i] for i in alive], map(str, alive), seed)
        jobs += [(tmp / f"{store.split('_')[0]}/images/{store}_{i}.jpg", scenes[i]) for i in alive]
    for store, name in (
        ("cc3m_train", "Train_GCC-training.tsv"),
        ("cc3m_val", "Validation_GCC-1.1.0-Validation.tsv"),
    ):
        write(tmp / "cc3m" / name, "".join(f"{said}\t{url}\n" for said, url in names[store]))
    for column, name in ((1, "urls"), (0, "captions")):
        write(
            tmp / f"sbu/SBU_captioned_photo_dataset_{name}.txt",
            "".join(row[column] + "\n" for row in names["sbu"]),
        )
    return jobs


# Benchmarks of choices: a caption against an edited one. Small: they show that files are read.


def edits(rng, things):
    """{SugarCrepe's kind: (true caption, another true one, false one)} of a scene"""
    a, b = (things[int(i)] for i in rng.permutation(len(things))[:2])
    # no two things share a shape or a colour: with another one it is nowhere
    another = lambda names, own: str(rng.choice([name for name in names if name != own]))
    colour, shape = another(COLOURS, a.colour), another(SHAPES, a.shape)
    size = another(SIZES, a.size)
    where, one, two = whereabouts(rng, a), phrase(a), phrase(b)
    other, opposite = phrase(a._replace(shape=shape)), dict(zip(RELATIONS, OPPOSITES))
    kinds = {
        "add_att": (one, one + where, f"a {size} {a.colour} {a.shape}"),
        "add_obj": (one, one + where, f"{one} and {other}"),
        "replace_att": (one, one + where, phrase(a._replace(colour=colour))),
        "replace_obj": (one, one + where, other),
        "swap_att": (
            f"{one} and {two}",
            f"{two} and {one}",
            f"a {b.colour} {a.shape} and a {a.colour} {b.shape}",
        ),
    }
    if (how := relation(a, b)) in RELATIONS[:4]:
        back, true = opposite[how], f"{one} {how} {two}"
        kinds["replace_rel"] = true, f"{two} {back} {one}", f"{one} {back} {two}"
        kinds["swap_obj"] = true, f"{two} {back} {one}", f"{two} {how} {one}"
    return kinds


def toy_edits(tmp, seed, seen, known, said):
    """SugarCrepe, SugarCrepe++, What'sUp's questions and ARO's word order, of pictures that others
    have: COCO's and Flickr30k's that nothing learns from, and Visual Genome's
    """
    rng = np.random.default_rng([seed, 20])
    judged = [image for image in seen if image.split == "val2014"]
    found, asked = edited(rng, judged), edited(rng, known[: len(judged)])
    columns = "filename", "caption", "caption2", "negative_caption"
    for kind, rows in found.items():
        records = [dict(zip(columns, (f"{n:012d}.jpg", *captions))) for n, *captions in rows]
        plain = [{k: v for k, v in r.items() if k != "caption2"} for r in records]
        dump(tmp / f"sugarcrepe/{kind}.json", {str(k): r for k, r in enumerate(plain)})
        if not kind.startswith("add"):
            dump(tmp / f"sugarcrepe_pp/{kind}.json", [{"id": k} | r for k, r in enumerate(records)])
    for part, kind in (("one", "replace_att"), ("two", "replace_rel")):
        for name, rows in (("coco", found[kind]), ("vg", asked[kind])):
            lists = [[n, true, false] for n, true, _, false in rows]
            dump(tmp / f"whatsup/{name}_qa_{part}_obj.json", lists)
    photos = [(f"flickr30k-images/{i.id}.jpg", i.things) for i in said if i.split == "test"]
    coco = [(f"val2014/{coco_stem(i)}.jpg", i.things) for i in judged]
    for name, images in (("coco", coco), ("flickr30k", photos)):
        order = []
        for path, things in images:
            words = spoken(describe(rng, things)).split()
            options = [words, *(rng.permutation(words) for _ in range(4))]
            order.append({"image": path, "caption_options": list(map(" ".join, options))})
        dump(tmp / f"aro/{name}_order.json", order)


def edited(rng, images):
    """{SugarCrepe's kind: [(image id, true caption, another true one, false one)]}; of a small
    tree's few images several times
    """
    found = {kind: [] for kind in SUGARCREPE}
    for image in images * -(-60 // len(images)):
        for kind, captions in edits(rng, image.things).items():
            found[kind].append((image.id, *captions))
    return found


def toy_choices(tmp, seed, n):
    """VALSE, ARO, What'sUp's controlled images, ColorSwap, BiVLC: n scenes each, with their own
    pictures and regions
    """
    rng, jobs = np.random.default_rng([seed, 21]), []

    def drawn(store, folder, names, scenes, end="jpg"):
        toy_store(tmp, store, scenes, names, seed)
        jobs.extend((tmp / folder / f"{k}.{end}", things) for k, things in zip(names, scenes))

    # VALSE: a phenomenon is one of the edits
    names, scenes = [f"v7w_{k}" for k in range(n)], [draw_scene(rng) for _ in range(n)]
    drawn("valse", "valse/images", names, scenes)
    for k, phenomenon in enumerate(PHENOMENA):
        records = {}
        for name, things in zip(names, scenes):
            kinds = list(edits(rng, things).values())
            true, _, false = kinds[k % len(kinds)]
            records[f"{phenomenon}_{name}"] = {
                "dataset": "visual7w",
                "image_file": f"{name}.jpg",
                "linguistic_phenomena": phenomenon,
                "caption": true,
                "foil": false,
                "mturk": {"foil": 0, "caption": 1 + len(records) % 3, "other": 0},
            }
        dump(tmp / f"valse/{phenomenon}.json", records)
    # ARO: a red and a blue thing each, and the box that holds both
    names, scenes, lists = [], [], {"relation": [], "attribution": []}
    while len(names) < n:
        shapes = rng.choice(list(SHAPES), 2, replace=False)
        a, b = things = placed(rng, [(str(k), c) for k, c in zip(shapes, COLOURS)], "")
        if (how := relation(a, b)) in RELATIONS[:4]:
            corners = np.array([a.box, b.box])
            x1, y1 = corners[:, :2].min(axis=0).tolist()
            x2, y2 = corners[:, 2:].max(axis=0).tolist()
            image, box = f"{len(names)}.jpg", {"bbox_x": x1, "bbox_y": y1}
            box |= {"image_path": image, "bbox_w": x2 - x1, "bbox_h": y2 - y1}
            jobs.append((tmp / "aro/images" / image, things))
            names.append(f"{len(names)}_{x1}_{y1}_{x2 - x1}_{y2 - y1}")
            moved = [np.array(t.box) - [x1, y1, x1, y1] for t in things]
            scenes.append([t._replace(box=tuple(c.tolist())) for t, c in zip(things, moved)])
            one, two = phrase(a), phrase(b)
            captions = f"{one} {how} {two}", f"{two} {how} {one}"
            told = dict(zip(("true_caption", "false_caption"), captions))
            lists["relation"].append(box | told | {"relation_name": how})
            crossed = f"a {b.colour} {a.shape} and a {a.colour} {b.shape}"
            told = {"true_caption": f"{one} and {two}", "false_caption": crossed}
            lists["attribution"].append(box | told | {"attributes": [a.colour, b.colour]})
    toy_store(tmp, "aro", scenes, names, seed)
    for part, records in lists.items():
        dump(tmp / f"aro/visual_genome_{part}.json", records)
    # What'sUp: two things in each of four ways
    taken = []
    for part, pairs in (("images", OPPOSITES[:4]), ("clevr", (*OPPOSITES[:2], *OPPOSITES[4:]))):
        names, scenes, records = [], [], []
        for k in range(max(2, n // 4)):
            kinds = draw_kinds(rng, 2)
            # both parts' pictures lie in one store, by name
            while (k, kinds) in taken:
                kinds = draw_kinds(rng, 2)
            taken.append((k, kinds))
            a, b = (f"a {colour} {shape}" for shape, colour in kinds)
            options = [f"{a} {how} {b}" for how in pairs]
            for right, how in zip(options, pairs):
                order = kinds[::-1] if how == "behind" else kinds
                wanted = "in front of" if how == "behind" else how
                while True:
                    # the nearer thing is drawn first
                    things = placed(rng, order, wanted if wanted == "in front of" else "")
                    if relation(*things) == wanted:
                        break
                said = {"above": "on", "below": "under", "in front of": "in-front_of"}.get(how, how)
                ends = [f"{colour}-{shape}" for shape, colour in kinds]
                names.append(f"{ends[0]}{k}_{said.replace(' ', '_')}_{ends[1]}{k}")
                scenes.append(things)
                path = f"data/controlled_{part}/{names[-1]}.jpeg"
                rest = [option for option in options if option != right]
                records.append({"image_path": path, "caption_options": [right, *rest]})
        stored = names, scenes
        jobs += [(tmp / f"whatsup/controlled_{part}" / f"{k}.jpeg", t) for k, t in zip(*stored)]
        dump(tmp / f"whatsup/controlled_{part}_dataset.json", records)
        lists[part] = stored
    names, scenes = ([*lists["images"][i], *lists["clevr"][i]] for i in (0, 1))
    toy_store(tmp, "whatsup", scenes, names, seed)
    # ColorSwap and BiVLC: the false caption has a picture too
    for store in ("colorswap", "bivlc"):
        names, scenes, records = [], [], []
        for k in range(n):
            (s, c), (t, d) = draw_kinds(rng, 2)
            pair = [placed(rng, [(s, c), (t, d)], ""), placed(rng, [(s, d), (t, c)], "")]
            texts = [" and ".join(map(phrase, things)) for things in pair]
            files = [f"images/img_{k}_{i}.jpg" for i in (1, 2)]
            if store == "colorswap":
                told = {f"caption_{i}": text for i, text in zip((1, 2), texts)}
                records.append({"id": k} | told | {f"image_{i}": f for i, f in zip((1, 2), files)})
            else:
                told = dict(zip(("caption", "negative_caption"), texts))
                told |= dict(zip(("image", "negative_image"), files))
                records.append(told | {"type": "swap", "subtype": "att"})
            names += [Path(f).stem for f in files]
            scenes += pair
        drawn(store, f"{store}/images", names, scenes)
        dump(tmp / store / "test.json", records)
    return jobs


# Downstream. Everything comes in complements, so that no answer can be guessed from the text or
# the picture alone: a question is asked of two pictures with different answers, a statement is
# put to three pictures with its three labels, and so on.


def kinds_of(things):
    return {(t.shape, t.colour): t for t in things}


def definite(thing):
    """What is clearly so of a thing, each with its opposite: [(true, false)]."""
    x, y = (thing.box[0] + thing.box[2]) / 2 / WIDTH, (thing.box[1] + thing.box[3]) / 2 / HEIGHT
    pairs = (
        ("on the left", "on the right", x < 0.36, x > 0.64),
        ("at the top", "at the bottom", y < 0.36, y > 0.64),
        ("small", "large", thing.size == "small", thing.size == "large"),
    )
    return [(a, b) if yes else (b, a) for a, b, yes, no in pairs if yes or no]


def complements(rng, form, a, b):
    """A question about two scenes with different answers: (type of question, text, answer for a,
    answer for b), or None.
    """
    A, B = kinds_of(a), kinds_of(b)
    if form == "there":
        for shape, colour in rng.permutation(sorted(set(A) - set(B))).tolist():
            return "is there a", f"Is there a {colour} {shape}?", "yes", "no"
    elif form == "where":
        for kind in sorted(set(A) & set(B)):
            for true, false in definite(A[kind]):
                if (false, true) in definite(B[kind]):
                    return "is the", f"Is the {kind[1]} {kind[0]} {true}?", "yes", "no"
    elif form == "color":
        for shape in rng.permutation(SHAPES).tolist():
            one, two = ({c for s, c in kinds if s == shape} for kinds in (A, B))
            if one and two and one != two:
                return "what color is the", f"What color is the {shape}?", one.pop(), two.pop()
    elif form == "shape":
        for colour in rng.permutation(list(COLOURS)).tolist():
            one, two = ({s for s, c in kinds if c == colour} for kinds in (A, B))
            if one and two and one != two:
                return (
                    "what shape is the",
                    f"What shape is the {colour} thing?",
                    one.pop(),
                    two.pop(),
                )
    elif len(a) != len(b):
        return "how many", "How many things are there?", str(len(a)), str(len(b))


def toy_vqa(tmp, seed, seen):
    rng, number = np.random.default_rng([seed, 6]), Counter()
    for split, each in (("train2014", 4), ("val2014", 6)):
        images, questions, annotations = [i for i in seen if i.split == split], [], []
        while len(questions) < each * len(images):
            a, b = (images[i] for i in rng.choice(len(images), 2, replace=False))
            found = complements(
                rng,
                str(
                    rng.choice(
                        ["there", "where", "color", "shape", "many"],
                        p=[0.3, 0.15, 0.25, 0.25, 0.05],
                    )
                ),
                a.things,
                b.things,
            )
            for image, answer in zip((a, b), found[2:] if found else ()):
                number[image.id] += 1
                ids = {"image_id": image.id, "question_id": 1000 * image.id + number[image.id]}
                others = ["maybe"] * int(rng.integers(0, 3))  # ten people rarely agree
                kind = {"yes": "yes/no", "no": "yes/no"}.get(
                    answer, "number" if answer.isdigit() else "other"
                )
                questions.append({**ids, "question": found[1]})
                annotations.append(
                    {
                        **ids,
                        "question_type": found[0],
                        "answer_type": kind,
                        "multiple_choice_answer": answer,
                        "answers": [
                            {"answer_id": k + 1, "answer": x, "answer_confidence": "yes"}
                            for k, x in enumerate(others + [answer] * (10 - len(others)))
                        ],
                    }
                )
        head = {
            "info": {"description": "ShapesWorld"},
            "license": {},
            "data_type": "mscoco",
            "data_subtype": split,
        }
        dump(
            tmp / f"vqa2/v2_OpenEnded_mscoco_{split}_questions.json",
            {**head, "task_type": "Open-Ended", "questions": questions},
        )
        dump(tmp / f"vqa2/v2_mscoco_{split}_annotations.json", {**head, "annotations": annotations})


def toy_snli_ve(tmp, seed, said):
    """A statement about a thing is true of one picture, false of it in its opposite, and open
    where the thing is not there.
    """
    rng = np.random.default_rng([seed, 7])
    for split, name, rounds in (("train", "train", 3), ("val", "dev", 3), ("test", "test", 3)):
        images, lines = [i for i in said if i.split == split], []
        for a, b in zip(
            *(np.concatenate([rng.permutation(len(images)) for _ in range(rounds)]) for _ in "ab")
        ):
            A, B = kinds_of(images[a].things), kinds_of(images[b].things)
            only = [
                sorted(k for k in one if k not in other and definite(one[k]))
                for one, other in ((A, B), (B, A))
            ]
            if not all(only):
                continue
            for here, there, kinds, things in ((a, b, only[0], A), (b, a, only[1], B)):
                shape, colour = kinds[int(rng.integers(len(kinds)))]
                held = definite(things[shape, colour])
                true, false = held[int(rng.integers(len(held)))]
                for image, what, label in (
                    (here, true, "entailment"),
                    (here, false, "contradiction"),
                    (there, (true, false)[int(rng.integers(2))], "neutral"),
                ):
                    lines.append(
                        {
                            "Flickr30K_ID": images[image].id,
                            "sentence1": "",
                            "sentence2": f"The {colour} {shape} is {what}.",
                            "gold_label": label,
                            "captionID": f"{images[image].id}.jpg#0",
                            "pairID": f"{images[image].id}.jpg#0r{len(lines)}",
                            "annotator_labels": [label],
                        }
                    )
        dump(tmp / f"snli_ve/snli_ve_{name}.jsonl", lines, lines=True)


def scene_with(rng, has, lacks):
    while True:
        things = draw_scene(rng)
        kinds = kinds_of(things)
        if has in kinds and lacks not in kinds:
            return things


def toy_nlvr2(tmp, seed, sets):
    """A set has three pairs of images and four sentences; each sentence is true of one pair and
    false of another, and so is each pair.
    """
    rng, jobs, names, scenes = np.random.default_rng([seed, 8]), [], [], []
    for split, count in (("train", sets), ("dev", max(2, sets // 8)), ("test1", max(2, sets // 8))):
        lines = []
        for number in range(count):
            a, b = draw_kinds(rng, 2)
            thing, folder = f"{a[1]} {a[0]}", number % 100
            for pair, (left, right) in enumerate(
                (((a, b), (b, a)), ((b, a), (a, b)), ((a, b), (a, b)))
            ):
                for side, kinds in enumerate((left, right)):
                    names.append(f"{split}-{number}-{pair}-img{side}")
                    scenes.append(scene_with(rng, *kinds))
                    jobs.append(
                        (
                            tmp
                            / "nlvr2/images"
                            / (f"train/{folder}" if split == "train" else split)
                            / f"{names[-1]}.png",
                            scenes[-1],
                        )
                    )
            for sentence, (text, yes, no) in enumerate(
                (
                    (f"The left image contains a {thing}.", 0, 1),
                    (f"The right image contains a {thing}.", 1, 0),
                    (f"Both images contain a {thing}.", 2, number % 2),
                    (f"Only one image contains a {thing}.", number % 2, 2),
                )
            ):
                lines += [
                    {
                        "identifier": f"{split}-{number}-{pair}-{sentence}",
                        "sentence": text,
                        "label": label,
                        "left_url": "",
                        "right_url": "",
                        "writer": "0",
                        **({"directory": folder} if split == "train" else {}),
                    }
                    for pair, label in ((yes, "True"), (no, "False"))
                ]
        dump(tmp / f"nlvr2/{split}.json", lines, lines=True)
        # whole groups, as the official subsets
        for k, part in enumerate(("balanced", "unbalanced") if split != "train" else ()):
            dump(
                tmp / f"nlvr2/{part}/{part}_{split}.json",
                [e for e in lines if int(e["identifier"].split("-")[1]) % 2 == k],
                lines=True,
            )
    toy_store(tmp, "nlvr2", scenes, names, seed)
    return jobs


def toy_vcr(tmp, seed, n):
    """The circle plays the person. Answers differ in the colour, one of each scene's own; reasons
    in where the thing is.
    """
    rng, jobs, scenes, names = np.random.default_rng([seed, 9]), [], [], []
    corner = lambda t: (t.box[1] + t.box[3] > HEIGHT, t.box[0] + t.box[2] > WIDTH)
    corners = [(y, x) for y in (False, True) for x in (False, True)]
    for split, count in (("train", n), ("val", max(10, n // 10))):
        lines = []
        for k in range(count):
            pick = lambda names: rng.choice(list(names), 4, replace=False).tolist()
            things = placed(rng, list(zip(pick(SHAPES), pick(COLOURS))), "")
            objects = ["person" if t.shape == "circle" else t.shape for t in things]
            name = f"{1000 + k // 50}_Shapes_{split}_{k:05d}@0"
            stem = f"lsmdc_{1000 + k // 50}_Shapes/{name}"
            (
                names.append(name),
                scenes.append(things),
                jobs.append((tmp / f"vcr1/vcr1images/{stem}.jpg", things)),
            )
            dump(
                tmp / f"vcr1/vcr1images/{stem}.json",
                {
                    "boxes": [[*map(float, t.box), 1.0] for t in things],
                    "segms": [[] for _ in things],
                    "names": objects,
                    "width": WIDTH,
                    "height": HEIGHT,
                },
            )
            for q in rng.permutation(4)[:2].tolist():
                colours, places = (
                    [things[i].colour for i in rng.permutation(4)],
                    [corners[i] for i in rng.permutation(4)],
                )
                for choices, right, at in (
                    (colours, things[q].colour, len(lines) % 4),
                    (places, corner(things[q]), len(lines) // 4 % 4),
                ):
                    # the right one stands at each place equally often
                    choices.remove(right)
                    choices.insert(at, right)
                lines.append(
                    {
                        "movie": stem.split("/")[0],
                        "objects": objects,
                        "img_fn": f"{stem}.jpg",
                        "metadata_fn": f"{stem}.json",
                        "question": ["What", "color", "is", [q], "?"],
                        "answer_choices": [[[q], "is", c, "."] for c in colours],
                        "answer_label": colours.index(things[q].colour),
                        "rationale_choices": [
                            [
                                [q],
                                "is",
                                "at",
                                "the",
                                "bottom" if y else "top",
                                "on",
                                "the",
                                "right" if x else "left",
                                ".",
                            ]
                            for y, x in places
                        ],
                        "rationale_label": places.index(corner(things[q])),
                        "img_id": f"{split}-{k}",
                        "question_number": q,
                        "annot_id": f"{split}-{len(lines)}",
                        "match_fold": f"{split}-0",
                    }
                )
        dump(tmp / f"vcr1/{split}.jsonl", lines, lines=True)
    toy_store(tmp, "vcr", scenes, names, seed)
    return jobs


def toy_referring(tmp, seed, seen):
    """RefCOCO, RefCOCO+ (no places), RefCOCOg (longer), about each thing of a quarter of COCO's
    training images, each thing equally often.
    """
    rng = np.random.default_rng([seed, 10])
    images = [i for i in seen if i.split == "train2014"][2:]
    images = images[: max(20, len(images) // 4)]
    part = len(images) // 16
    splits = {
        "refcoco": ("val", "testA", "testB"),
        "refcoco+": ("val", "testA", "testB"),
        "refcocog": ("val", "test"),
    }
    for name, tests in splits.items():
        found, annotations = [], []
        for k, image in enumerate(images):
            for i, t in enumerate(image.things):
                number, known = (
                    100 * image.id + i,
                    [(o, relation(t, o)) for o in image.things if o is not t and relation(t, o)],
                )
                other = known[int(rng.integers(len(known)))] if known else None
                said = [
                    str(
                        rng.choice([f"{t.colour} {t.shape}", f"the {t.shape}", f"{t.colour} thing"])
                    ),
                    {
                        "refcoco": f"{t.shape}{whereabouts(rng, t)}",
                        "refcoco+": f"the {t.size} {t.colour} {t.shape}",
                        "refcocog": f"the {t.colour} {t.shape}"
                        + (f" {other[1]} the {other[0].colour} {other[0].shape}" if other else ""),
                    }[name],
                ]
                annotations.append(
                    {
                        "id": number,
                        "image_id": image.id,
                        "category_id": 1 + SHAPES.index(t.shape),
                        "bbox": list(map(float, xywh(t.box))),
                        "iscrowd": 0,
                    }
                )
                found.append(
                    {
                        "ref_id": len(found),
                        "ann_id": number,
                        "category_id": 1 + SHAPES.index(t.shape),
                        "image_id": image.id,
                        "file_name": f"{coco_stem(image)}_{i}.jpg",
                        "split": tests[k // part] if k // part < len(tests) else "train",
                        "sent_ids": [10 * number + j for j in (0, 1)],
                        "sentences": [
                            {"sent_id": 10 * number + j, "raw": x, "sent": x, "tokens": x.split()}
                            for j, x in enumerate(said)
                        ],
                    }
                )
        write(tmp / f"refer/{name}/refs({REFER[name]}).p", pickle.dumps(found, protocol=2))
        dump(
            tmp / f"refer/{name}/instances.json",
            {
                "images": [
                    {
                        "id": i.id,
                        "file_name": f"{coco_stem(i)}.jpg",
                        "width": WIDTH,
                        "height": HEIGHT,
                    }
                    for i in images
                ],
                "annotations": annotations,
                "categories": [
                    {"id": 1 + k, "name": s, "supercategory": "shape"} for k, s in enumerate(SHAPES)
                ],
            },
        )
    for store, given in (("refcoco_gt", True), ("refcoco_det", False)):
        toy_store(
            tmp, store, [i.things for i in images], [coco_stem(i) for i in images], seed, given
        )


def ensure_toy(folder, seed=0, scenes=6000):
    """Make the toy tree if it is not there, or again if an older version made it; any other
    folder is left alone.
    """
    mark = Path(folder) / "toy.json"
    if not Path(folder).exists():
        make_toy(folder, seed, scenes)
    elif mark.exists() and (made := read_json(mark))["version"] != TOY_VERSION:
        print(
            f"{folder} was made by version {made['version']} of ShapesWorld, this is version "
            f"{TOY_VERSION}: making it again",
            file=sys.stderr,
        )
        new, old = Path(f"{folder}.new"), Path(f"{folder}.old")
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)
        make_toy(new, made["seed"], made["scenes"])
        for mine in Path(folder).iterdir():  # what the user put beside it stays
            if not (new / mine.name).exists():
                shutil.move(mine, new / mine.name)
        os.replace(folder, old)
        os.replace(new, folder)
        shutil.rmtree(old)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", default="data/toy", help="a new folder")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="another seed is another world of scenes; the same seed gives the same bytes",
    )
    parser.add_argument(
        "--scenes",
        type=int,
        default=6000,
        help="scenes of COCO and Flickr30k together; Winoground adds two for each 15",
    )
    parser.add_argument(
        "--if-needed",
        action="store_true",
        help="do nothing where the folder holds this version of the toy tree already",
    )
    args = parser.parse_args(argv)
    try:
        if args.if_needed:
            with alone(args.out):
                ensure_toy(args.out, args.seed, args.scenes)
        else:
            make_toy(args.out, args.seed, args.scenes)
            print(f"{args.out}: ShapesWorld, seed {args.seed}, {args.scenes} scenes")
    except (DataError, OSError) as error:
        sys.exit(f"toy.py: error: {error}")


if __name__ == "__main__":
    # a tenth of the time: a hundred thousand objects live to the end, and none is in a cycle
    gc.disable()
    main()
