"""The README's tables of UNITER's downstream tasks and of its pre-training ablation, on the toy
tree, one seed each.

python tests/tasks.py                    about an hour on two cores; goes on where it stopped;
                                         fills tests/results.json and README.md
python tests/tasks.py --only vqa ve      some rows;   --ablation: table 2 instead, another hour
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from seeds import RESULTS, ROOT, fill


class Row(NamedTuple):
    command: str  # train.py's
    full: str  # the recipe of the full experiment
    where: str  # in UNITER's paper
    paper: str  # UNITER-base there
    keys: tuple  # our numbers for the same thing
    guess: str = ""  # what a guess gets: a key, or a number
    blind: bool = True  # run the controls


ROWS = {
    "vqa": Row(
        "--task vqa", "vqa", "table 3, VQA test-dev", "72.70", ("vqa/accuracy",), "vqa/majority"
    ),
    "vcr": Row(
        "--task vcr",
        "vcr",
        "table 3, VCR Q→A, QA→R, Q→AR (test)",
        "75.00, 77.20, 58.20",
        ("vcr/q_a", "vcr/qa_r", "vcr/q_ar"),
        "25, 25, 6",
    ),
    "nlvr2": Row(
        "--task nlvr2",
        "nlvr2",
        "tables 3, 5, NLVR2 dev, pair-biattn",
        "77.18",
        ("nlvr2/accuracy",),
        "nlvr2/majority",
    ),
    "nlvr2-pair": Row(
        "--task nlvr2 --nlvr2-head pair",
        "nlvr2",
        "table 5, dev, pair",
        "75.85",
        ("nlvr2/accuracy",),
        "nlvr2/majority",
        False,
    ),
    "nlvr2-triplet": Row(
        "--task nlvr2 --nlvr2-head triplet",
        "nlvr2",
        "table 5, dev, triplet",
        "73.03",
        ("nlvr2/accuracy",),
        "nlvr2/majority",
        False,
    ),
    "ve": Row("--task ve", "ve", "table 3, SNLI-VE val", "78.59", ("ve/accuracy",), "ve/majority"),
    "re": Row(
        "--task re",
        "refcoco",
        "table 3, RefCOCO val, val^d",
        "91.64, 81.24",
        ("re/gt/accuracy", "re/det/accuracy"),
        "re/gt/chance",
    ),
    "re-plus": Row(
        "--task re --dataset refcoco+ --head region-mlp",
        "refcoco+",
        "table 3, RefCOCO+ val, val^d",
        "83.66, 75.31",
        ("re/gt/accuracy", "re/det/accuracy"),
        "re/gt/chance",
        False,
    ),
    "re-g": Row(
        "--task re --dataset refcocog",
        "refcocog",
        "table 3, RefCOCOg val, val^d",
        "86.52, 74.31",
        ("re/gt/accuracy", "re/det/accuracy"),
        "re/gt/chance",
        False,
    ),
    "retrieval": Row(
        "--task retrieval",
        "flickr30k",
        "table 3, Flickr30k IR, TR R@1",
        "72.52, 85.90",
        ("retrieval/image/r1", "retrieval/text/r1"),
        "1, 1",
        False,
    ),
    "retrieval-random": Row(
        "--task retrieval --candidates 0 --negatives 2",
        "retrieval-flickr30k --mine-every 0",
        "sec. A.2, random negatives alone",
        "",
        ("retrieval/image/r1", "retrieval/text/r1"),
        "1, 1",
        False,
    ),
    "retrieval-mined": Row(
        "--task retrieval --candidates 0 --negatives 2 --mine-every 200",
        "retrieval-flickr30k",
        "sec. A.2, and mined ones",
        "",
        ("retrieval/image/r1", "retrieval/text/r1"),
        "1, 1",
        False,
    ),
}
ZERO_SHOT = Row(
    "--task retrieval --head match",
    "",
    "table 3, zero-shot IR, TR R@1 (Flickr30k)",
    "66.16, 80.70",
    ("retrieval/image/r1", "retrieval/text/r1"),
    "1, 1",
    False,
)
ALL = "mlm:4+itm:1+mrckl:1+mrfr:1+wra"
# table 2: paper's Meta-Sum, VQA, NLVR2, RefCOCO+; line 2 is BERT's weights, and retrieval is left
# out here
LINES = {
    "1 none": ("", "314.34, 67.03, 51.02, 68.73"),
    "3 MRFR": ("mrfr", "344.66, 69.02, 52.16, 68.47"),
    "4 ITM": ("itm", "385.29, 70.04, 74.08, 72.33"),
    "5 MLM": ("mlm", "386.10, 71.29, 74.79, 72.89"),
    "6 MLM + ITM": ("mlm:4+itm:1", "393.04, 71.55, 75.98, 72.75"),
    "7 MLM + ITM + MRC": ("mlm:4+itm:1+mrc:1", "393.97, 71.46, 76.18, 73.49"),
    "8 MLM + ITM + MRFR": ("mlm:4+itm:1+mrfr:1", "396.24, 71.73, 76.21, 74.23"),
    "9 MLM + ITM + MRC-kl": ("mlm:4+itm:1+mrckl:1", "397.09, 71.63, 76.28, 74.51"),
    "10 MLM + ITM + MRC-kl + MRFR": ("mlm:4+itm:1+mrckl:1+mrfr:1", "399.97, 71.92, 76.93, 74.52"),
    "11 line 10 + WRA": (ALL, "400.93, 72.47, 76.91, 74.80"),
    "12 line 10 without conditional masking": (
        "mlm:4+itm:1+mrckl:1+mrfr:1 --joint-masking",
        "396.51, 71.68, 76.15, 74.29",
    ),
    "13 line 11, out of domain": (f"{ALL} --corpora cc3m+sbu", "396.91, 71.56, 75.66, 72.78"),
    "14 line 11, both domains": (
        f"{ALL} --corpora coco:2+vg:3+cc3m:3+sbu:2",
        "405.24, 72.70, 77.18, 75.31",
    ),
}


def run(*command, **env):
    began = time.time()
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **env},
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1]) | {
        "minutes": round((time.time() - began) / 60, 2)
    }


def remember(results, name, *command, **env):
    if name not in results:
        results[name] = run(*command, **env)
        RESULTS.write_text(json.dumps(results, indent=0, sort_keys=True) + "\n")
        print(name, results[name], flush=True)
    return results[name]


def numbers(found, keys):
    return ", ".join(f"{found[k]:.1f}" for k in keys)


def table_row(row, results, name):
    found = results.get(f"tasks/{name}")
    if not found:
        return None
    hidden = [results.get(f"tasks/{name}/{what}") for what in ("text", "regions")]
    hidden = [numbers(h, row.keys) if h else "" for h in hidden]
    guess = f"{found[row.guess]:.1f}" if row.guess in found else row.guess
    script = "evaluate.py" if row is ZERO_SHOT else "train.py"
    return (
        f"| `{script} {row.command}` | {'`' + row.full + '`' if row.full else ''} | {row.where} "
        f"| {row.paper} | {numbers(found, row.keys)} | {hidden[0]} | {hidden[1]} | {guess} | "
        f"{found['minutes']:.1f} |"
    )


def table(results):
    lines = [
        "| toy command | recipe at full size | in the paper | paper, base | toy | words hidden | "
        "regions hidden | majority | minutes |",
        "|" + "---|" * 9,
    ]
    return "\n".join(
        lines
        + [
            line
            for name, row in [*ROWS.items(), ("zero-shot", ZERO_SHOT)]
            if (line := table_row(row, results, name))
        ]
    )


def ablation(results):
    lines = [
        "| table 2, line | `--pretrain` | paper: Meta-Sum, VQA, NLVR2, RefCOCO+ | toy: VQA | "
        "NLVR2 | RefCOCO+ | minutes |",
        "|" + "---|" * 7,
    ]
    for line, (tasks, paper) in LINES.items():
        found = [results.get(f"ablation/{line}/{task}") for task in ("vqa", "nlvr2", "re")]
        if all(found):
            values = [
                f[k] for f, k in zip(found, ("vqa/accuracy", "nlvr2/accuracy", "re/gt/accuracy"))
            ]
            minutes = (
                sum(f["minutes"] for f in found)
                + results.get(f"ablation/{line}", {"minutes": 0})["minutes"]
            )
            lines.append(
                f"| {line} | {tasks and '`' + tasks + '`'} | {paper} | "
                + " | ".join(f"{v:.1f}" for v in values)
                + f" | {minutes:.1f} |"
            )
    return "\n".join(lines)


def one_line(line, results):
    """Pre-train as a line of table 2 says, then fine-tune on three tasks for so few steps that
    the start shows.
    """
    how, out, one = (
        LINES[line][0],
        f"out/tasks/ablation-{line.split()[0]}",
        {"OMP_NUM_THREADS": "1"},
    )
    if how:
        remember(
            results,
            f"ablation/{line}",
            "train.py",
            "--recipe",
            "toy-pretrain",
            "--corpora",
            "coco+vg",
            "--out",
            out,
            "--resume",
            "--pretrain",
            *how.split(),
            **one,
        )
    for task, more in (
        ("vqa", ["--steps", 200]),
        ("nlvr2", ["--steps", 200]),
        ("re", ["--dataset", "refcoco+", "--steps", 40]),
    ):
        remember(
            results,
            f"ablation/{line}/{task}",
            "train.py",
            "--task",
            task,
            *more,
            "--warmup",
            20,
            "--out",
            f"{out}-{task}",
            "--resume",
            "--init",
            f"{out}/last.pt" if how else "none",
            **one,
        )


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=list(ROWS))
    parser.add_argument("--ablation", action="store_true")
    args = parser.parse_args(argv)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if args.ablation:
        # the first by itself, since it draws the toy world
        one_line(next(iter(LINES)), results)
        with ThreadPoolExecutor(2) as pool:  # then two lines at a time, each on one core
            list(pool.map(lambda line: one_line(line, results), LINES))
    else:
        # so that no row pays for it
        remember(
            results,
            "tasks/pretraining",
            "train.py",
            "--task",
            "re",
            "--steps",
            1,
            "--warmup",
            0,
            "--out",
            "out/tasks/first",
            "--resume",
        )
        for name in args.only:
            row = ROWS[name]
            remember(
                results,
                f"tasks/{name}",
                "train.py",
                *row.command.split(),
                "--out",
                f"out/tasks/{name}",
                "--resume",
            )
            for what in ("text", "regions") if row.blind else ():
                remember(
                    results,
                    f"tasks/{name}/{what}",
                    "train.py",
                    *row.command.split(),
                    "--ablate",
                    what,
                    "--out",
                    f"out/tasks/{name}-{what}",
                    "--resume",
                )
        start = next((ROOT / "out").glob("toy-pretrain-seed0-*")) / "last.pt"
        remember(
            results, "tasks/zero-shot", "evaluate.py", *ZERO_SHOT.command.split(), "--ckpt", start
        )
    fill(tasks=table(results), ablation=ablation(results))


if __name__ == "__main__":
    main()
