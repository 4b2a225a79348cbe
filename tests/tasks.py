"""The tables of UNITER's downstream tasks and of its pre-training ablation in tests/RESULTS.md, on
the toy tree, one seed each. Their runs are arms of tests/claims.json.

python tests/tasks.py                    about an hour on two cores; goes on where it stopped;
                                         fills tests/results.json and tests/RESULTS.md
python tests/tasks.py --only vqa ve      some rows;   --ablation: table 2 instead, another hour
"""

import argparse
import json
from typing import NamedTuple

import seeds


class Row(NamedTuple):
    """A downstream task: an arm of tests/claims.json, and what stands beside it"""

    full: str  # the recipe of the full experiment
    where: str  # in UNITER's paper
    paper: str  # UNITER-base there
    keys: tuple  # our numbers for the same thing
    majority: str = ""  # of always the commonest answer: a key, or numbers


RECALL = "retrieval/image/r1", "retrieval/text/r1"
BOXES = "re/gt/accuracy", "re/det/accuracy"
NLVR2 = ("nlvr2/accuracy",), "nlvr2/majority"
VCR = ("vcr/q_a", "vcr/qa_r", "vcr/q_ar"), "25, 25, 6"
ROWS = {
    "vqa": Row("vqa", "table 3, VQA test-dev", "72.70", ("vqa/accuracy",), "vqa/majority"),
    "vcr": Row("vcr", "table 3, VCR Q→A, QA→R, Q→AR (test)", "75.00, 77.20, 58.20", *VCR),
    "nlvr2": Row("nlvr2", "tables 3, 5, NLVR2 dev, pair-biattn", "77.18", *NLVR2),
    "nlvr2-pair": Row("nlvr2", "table 5, dev, pair", "75.85", *NLVR2),
    "nlvr2-triplet": Row("nlvr2", "table 5, dev, triplet", "73.03", *NLVR2),
    "ve": Row("ve", "table 3, SNLI-VE val", "78.59", ("ve/accuracy",), "ve/majority"),
    "re": Row("refcoco", "table 3, RefCOCO val, val^d", "91.64, 81.24", BOXES, "re/gt/chance"),
    "re-plus": Row(
        "refcoco+", "table 3, RefCOCO+ val, val^d", "83.66, 75.31", BOXES, "re/gt/chance"
    ),
    "re-g": Row("refcocog", "table 3, RefCOCOg val, val^d", "86.52, 74.31", BOXES, "re/gt/chance"),
    "retrieval": Row("flickr30k", "table 3, Flickr30k IR, TR R@1", "72.52, 85.90", RECALL, "1, 1"),
    "retrieval-random": Row(
        "retrieval-flickr30k --mine-every 0", "sec. A.2, random negatives alone", "", RECALL, "1, 1"
    ),
    "retrieval-mined": Row("retrieval-flickr30k", "sec. A.2, and mined ones", "", RECALL, "1, 1"),
}
ZERO_SHOT = "--task retrieval --head match"
ZERO_SHOT_ROW = Row("", "table 3, zero-shot IR, TR R@1 (Flickr30k)", "66.16, 80.70", RECALL, "1, 1")
# table 2: UNITER's Meta-Sum, VQA, NLVR2, RefCOCO+; line 2 is BERT's weights, and retrieval is left
# out here
LINES = {
    "1 none": "314.34, 67.03, 51.02, 68.73",
    "3 MRFR": "344.66, 69.02, 52.16, 68.47",
    "4 ITM": "385.29, 70.04, 74.08, 72.33",
    "5 MLM": "386.10, 71.29, 74.79, 72.89",
    "6 MLM + ITM": "393.04, 71.55, 75.98, 72.75",
    "7 MLM + ITM + MRC": "393.97, 71.46, 76.18, 73.49",
    "8 MLM + ITM + MRFR": "396.24, 71.73, 76.21, 74.23",
    "9 MLM + ITM + MRC-kl": "397.09, 71.63, 76.28, 74.51",
    "10 MLM + ITM + MRC-kl + MRFR": "399.97, 71.92, 76.93, 74.52",
    "11 line 10 + WRA": "400.93, 72.47, 76.91, 74.80",
    "12 line 10 without conditional masking": "396.51, 71.68, 76.15, 74.29",
    "13 line 11, out of domain": "396.91, 71.56, 75.66, 72.78",
    "14 line 11, both domains": "405.24, 72.70, 77.18, 75.31",
}
FINE_TUNED = {"vqa": "vqa/accuracy", "nlvr2": "nlvr2/accuracy", "re": "re/gt/accuracy"}


def controls(name):
    """The arms of a row that may not see one modality, where there are any"""
    return [arm for what in ("text", "regions") if (arm := f"{name}, no {what}") in arms()]


def arms():
    return seeds.CLAIMS["arms"]


def only(results, arm):
    """The numbers of an arm's one seed, or {}"""
    return results.get("runs", {}).get(arm, {}).get("0", {})


def numbers(run, keys):
    return ", ".join(f"{run[k]:.1f}" for k in keys if k in run)


def table(results):
    head = ["toy command", "recipe at full size", "in the paper", "paper, base", "toy"]
    head += ["words hidden", "regions hidden", "majority", "minutes"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, row in [*ROWS.items(), ("zero-shot", ZERO_SHOT_ROW)]:
        if not (run := only(results, name)):
            continue
        hidden = [only(results, f"{name}, no {what}") for what in ("text", "regions")]
        majority = f"{run[row.majority]:.1f}" if row.majority in run else row.majority
        command = f"evaluate.py {ZERO_SHOT}"
        command = f"train.py {seeds.label_of(name)}" if name in ROWS else command
        # zero-shot retrieval is of the run that all tasks begin from
        mark = seeds.stale_mark((name if name in ROWS else "toy-pretrain", run))
        cells = [f"`{command}`{mark}", row.full and f"`{row.full}`", row.where, row.paper]
        cells += [numbers(x, row.keys) for x in (run, *hidden)]
        lines.append("| " + " | ".join([*cells, majority, f"{run['minutes']:.1f}"]) + " |")
    return seeds.with_note(lines)


def ablation(results):
    head = ["table 2, line", "`--pretrain`", "paper: Meta-Sum, VQA, NLVR2, RefCOCO+"]
    head += ["toy: VQA", "NLVR2", "RefCOCO+", "minutes"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line, paper in LINES.items():
        arm = f"table 2, {line.split()[0]}"
        runs = {f"{arm}, {task}": only(results, f"{arm}, {task}") for task in FINE_TUNED}
        if not all(runs.values()):
            continue
        pretrain = arms().get(arm, "").partition("--pretrain ")[2]
        minutes = sum(run.get("minutes", 0) for run in (*runs.values(), only(results, arm)))
        cells = [line + seeds.stale_mark(*runs.items()), pretrain and f"`{pretrain}`", paper]
        cells += [f"{run[key]:.1f}" for run, key in zip(runs.values(), FINE_TUNED.values())]
        lines.append("| " + " | ".join([*cells, f"{minutes:.1f}"]) + " |")
    return seeds.with_note(lines)


def zero_shot(results, threads):
    """Retrieval by the matching head of the run that all tasks begin from"""
    if not seeds.is_fresh("toy-pretrain", only(results, "zero-shot")):
        start = seeds.run_arm("toy-pretrain", 0, threads, results, checkpoint=True)
        how = ZERO_SHOT.split(), ["--ckpt", f"{start}/last.pt", "--data", seeds.world(0)]
        run = seeds.numbers_of("evaluate.py", *how[0], *how[1], threads=threads)
        run |= {"settings": seeds.settings_digest(arms()["toy-pretrain"])}
        seeds.keep(results, "runs", "zero-shot", "0", numbers=run)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--ablation", action="store_true")
    args = parser.parse_args(argv)
    results = json.loads(seeds.RESULTS.read_text()) if seeds.RESULTS.exists() else {}
    if args.ablation:
        wanted = [f"table 2, {line.split()[0]}, {task}" for line in LINES for task in FINE_TUNED]
        seeds.run_all(seeds.run_arm, wanted, [0], 2, results)
    else:
        # first, so that no row pays for it
        zero_shot(results, 2)
        wanted = [arm for name in args.only for arm in (name, *controls(name))]
        seeds.run_all(seeds.run_arm, wanted, [0], 1, results)
    seeds.fill(tasks=table(results), ablation=ablation(results))


if __name__ == "__main__":
    main()
