"""The README's tables over several seeds that redraw everything (world, weights, batches), honest
whichever wins; every command goes on where it stopped and fills tests/results.json and README.md.

python tests/seeds.py --claims                       all claims of tests/claims.json, many hours
python tests/seeds.py --claims Winoground MAF        those whose words have one of these
python tests/seeds.py --seeds 0 1 2 3 4 --losses     every loss on every benchmark, many hours
python tests/seeds.py --seeds 0 1 --losses uniter    of one encoder, two hours
python tests/seeds.py --seeds 0 1 2 --tables amc     another table: align, maf_ablation, amc,
                                                     patches; nlvr, whose folder has to be in each
                                                     seed's tree, data/toy-seed0/nlvr and so on
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS, README = ROOT / "tests/results.json", ROOT / "README.md"
LOCK = threading.Lock()
# of each run
RUNNING = defaultdict(threading.Lock)
CLAIMS = json.loads((ROOT / "tests/claims.json").read_text())
FIRST_ABOVE = "winoground/updates to 50"
# Student's t: what 97.5 % lie below, for 1 to 19 degrees of freedom
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
T_975 += (2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093)


def run(*command, **env):
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **env},
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return done.stdout


def world(seed):
    """The seed's toy tree, made where it is missing or of an older version"""
    data = f"data/toy-seed{seed}"
    with RUNNING["world", seed]:
        run("tests/toy.py", "--if-needed", "--out", data, "--seed", str(seed))
    return data


def numbers_of(script, *args, threads):
    """The JSON object that a run's output ends with"""
    text = run(script, *map(str, args), OMP_NUM_THREADS=str(threads))
    return json.loads(text.strip().splitlines()[-1])


def keep(results, *place, numbers):
    """Put a run's numbers into tests/results.json, whole or not at all; one thread at a time."""
    with LOCK:
        at = results
        for name in place[:-1]:
            at = at.setdefault(name, {})
        at[place[-1]] = numbers
        beside = RESULTS.with_suffix(".tmp")
        beside.write_text(json.dumps(results, indent=0, sort_keys=True) + "\n")
        os.replace(beside, RESULTS)
    print(*place, numbers, flush=True)


def run_arm(name, seed, threads, results, checkpoint=False):
    """One run of an arm of tests/claims.json, after those whose checkpoints it begins from, unless
    its numbers are there, and its checkpoint if that is wanted; returns its folder.
    """
    out = f"out/claims/{re.sub('[^a-z0-9]+', '-', name)}-{seed}"
    # several arms may begin from the same run
    with RUNNING[name, seed]:
        known = str(seed) in results.get("claims", {}).get(name, {})
        # numbers come with the results file, checkpoints do not; last.pt alone may be of half a run
        if known and (not checkpoint or (ROOT / out / "done.json").exists()):
            return out
        command = CLAIMS["arms"][name]
        for other in re.findall(r"{(.*?)}", command):
            start = run_arm(other, seed, threads, results, checkpoint=True)
            command = command.replace(f"{{{other}}}", f"{start}/last.pt")
        how = ["--data", world(seed), "--seed", seed, "--resume", "--out", out]
        numbers = numbers_of("train.py", *command.split(), *how, threads=threads)
        log = [json.loads(line) for line in (ROOT / out / "log.jsonl").read_text().splitlines()]
        keep(results, "claims", name, str(seed), numbers=numbers | curve_numbers(log))
    return out


def benchmarks(arm, seed, threads, results):
    """Every benchmark of the toy tree, of a run of the table of losses"""
    if str(seed) not in results.get("losses", {}).get(arm, {}):
        folder = run_arm(arm, seed, threads, results, checkpoint=True)
        how = "--ckpt", f"{folder}/last.pt", "--data", world(seed)
        numbers = numbers_of("evaluate.py", "--task", "choices", *how, threads=threads)
        keep(results, "losses", arm, str(seed), numbers=numbers)


# the one number of each benchmark that its papers compare
COMPARED = (
    "winoground/group",
    "sugarcrepe/mean",
    "sugarcrepe-pp/mean",
    "valse/mean",
    "aro-relation/mean",
    "aro-attribution/mean",
    "aro-coco-order/accuracy",
    "whatsup-a/accuracy",
    "whatsup-b/accuracy",
    "whatsup-coco-two/accuracy",
    "colorswap/group",
    "bivlc/group",
)


def label_of(arm):
    """What tells an arm from the others of its table"""
    usual = r" --track| --steps \d+| --init {(plain|albef|patches|boxes).*?}"
    command = re.sub(usual, "", CLAIMS["arms"][arm])
    return re.sub(r" --init {(.*?)}", lambda m: f" after {CLAIMS['arms'][m[1]]}", command)


def losses_table(results):
    """Each encoder without a loss; then each loss's difference from it, seed by seed"""
    lines, clear, found = [], [], results.get("losses", {})
    for encoder, (none, *arms) in CLAIMS["losses"].items():
        for arm in (none, *arms):
            seeds = sorted(found.get(none, {}).keys() & found.get(arm, {}).keys())
            if len(seeds) < 3:
                continue
            cells = [f"`{label_of(arm)}`", encoder, str(len(seeds))]
            for name in COMPARED:
                base, own = ([found[a][s][name] for s in seeds] for a in (none, arm))
                plus = "" if arm == none else "+"
                own = [x - y for x, y in zip(own, base)] if plus else own
                middle, half = interval(own)
                clear += [abs(middle) > half] if plus else []
                cells.append(f"{middle:{plus}.1f} ± {half:.1f}")
            lines.append("| " + " | ".join(cells) + " |")
    head = ["`train.py`", "encoder", "seeds", *COMPARED]
    lines[:0] = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    if clear:
        chance = f"by chance {0.05 * len(clear):.0f} do"
        lines += ["", f"*{sum(clear)} of {len(clear)} intervals leave out 0; {chance}.*"]
    return "\n".join(lines) if len(lines) > 2 else "Not run yet."


def curve_numbers(log):
    """Of what was scored at a run's start and at each validation: {name/area: its mean over the
    updates, by trapezoids}, and the first update at which Winoground's group score was above 50.
    """
    scored = {line["step"]: line for line in log if line["step"] == 0}
    if not scored:
        return {}
    scored |= {line["step"]: line for line in log if scored[0].keys() <= line.keys()}
    steps, numbers = sorted(scored), {}
    for name in scored[0].keys() - {"step"}:
        values = [scored[step][name] for step in steps]
        pairs = zip(steps, steps[1:], values, values[1:])
        area = sum((right - left) * (a + b) / 2 for left, right, a, b in pairs)
        numbers[f"{name}/area"] = round(area / (steps[-1] - steps[0]), 3)
    above = [s for s in steps if scored[s].get("winoground/group", 0) > 50]
    return numbers | ({FIRST_ABOVE: above[0]} if above else {})


def differences(claim, results):
    """Of each seed whose runs are all there: the sum of the claim's terms"""
    found, arms = [], results.get("claims", {})
    for seed in map(str, claim["seeds"]):
        terms = claim["terms"]
        if all(len(t) == 1 or seed in arms.get(t[1], {}) for t in terms):
            found.append(sum(t[0] * (arms[t[1]][seed][t[2]] if len(t) > 1 else 1) for t in terms))
    return found


def interval(xs):
    """Mean and half the width of its 95 % interval, by Student's t"""
    half = T_975[len(xs) - 2] * statistics.stdev(xs) / len(xs) ** 0.5
    return statistics.mean(xs), half


def claims_table(results):
    """Each claim: the paper's numbers, ours with their interval, and a verdict by the interval;
    then how many have each verdict
    """
    verdicts = Counter()
    lines = ["| claim | where | paper | ours: difference, 95 % interval | seeds | verdict |"]
    lines.append("|" + "---|" * 6)
    for claim in CLAIMS["claims"]:
        found, ours, verdict = differences(claim, results), "", "not run yet"
        if len(found) > 1:
            middle, half = interval(found)
            low, high = middle - half, middle + half
            ours = f"{middle:+.2f} [{low:+.2f}, {high:+.2f}] {claim['unit']}"
            verdict = "holds" if low > 0 else "the opposite" if high < 0 else "undecided here"
            if len(found) < len(claim["seeds"]):
                verdict = "under way"
        verdicts[verdict] += 1
        told = claim["claim"], claim["source"], claim["paper"], ours, str(len(found)), verdict
        lines.append("| " + " | ".join(told) + " |")
    counted = ", ".join(f"{verdict}: {n}" for verdict, n in verdicts.most_common())
    return "\n".join([*lines, "", f"*{counted}.*"])


def arms_table(results):
    """The runs on Winoground: start, mean over the updates, end, the first update above 50"""
    lines = ["| `train.py` | group at the start | mean over the updates | end | held out | seen "]
    lines[0] += "| updates to 50, runs that came there |"
    lines.append("|" + "---|" * 7)
    keys = ("/area", "", "/held out", "/seen")
    for name in ("none", "cacr", "cacr layer 3", "cacr-probs", "iais-released", "iais", "wra"):
        rows = results.get("claims", {}).get(name, {})
        starts = [results["claims"]["plain"][s]["winoground/group"] for s in rows]
        if len(rows) < 2:
            continue
        cells = [mean([r[f"winoground/group{k}"] for r in rows.values()]) for k in keys]
        above = [r[FIRST_ABOVE] for r in rows.values() if FIRST_ABOVE in r]
        reached = f"{len(above)} of {len(rows)}"
        if above:
            reached = f"{statistics.mean(above):.0f}, {reached}"
        cells = f"`{label_of(name)}`", mean(starts), *cells, reached
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# what MAF and the baselines of its table 5 have there
MAF_GUESS = {
    "random": "7.19",
    "center-obj": "18.24",
    "whole image": "21.99",
    "max-obj": "24.51",
    "direct match": "26.42",
    "glove-max": "26.28",
    "glove-avg": "54.51",
    "glove-att": "56.05",
    "accuracy": "61.43",
    "upper bound": "86.29",
}


class Table(NamedTuple):
    """One of the README's tables: runs of tests/claims.json and what they measured"""

    paper: str  # head of the column of the paper's numbers
    columns: dict  # {head: name of a run's number}; a row has those that its run measured
    rows: dict  # {arm: the paper's numbers}


POINTING = {
    "Flickr30k": "pointing/flickr30k",
    "by chance": "pointing/flickr30k/chance",
    "testA": "pointing/refcoco+/testA",
    "testB": "pointing/refcoco+/testB",
    "testA, clean": "pointing/refcoco+/testA/clean",
    "testA, Recall@1": "pointing/refcoco+/testA/boxes",
}
TABLES = {
    "align": Table(
        paper="GQA accuracy, consistency; NLVR2 test-P",
        columns={
            "GQA accuracy": "gqa/accuracy",
            "consistency": "gqa/consistency",
            "words that point to their object": "pointing/accuracy",
            "by chance": "pointing/chance",
            "NLVR2 dev": "nlvr2/accuracy",
        },
        rows={
            "align none": "54.9, 79.5",
            "align": "60.5, 89.7",
            "align none, nlvr2": "74.5",
            "align, nlvr2": "75.5",
        },
    ),
    "maf_ablation": Table(
        paper="tables 3, 4",
        columns={"accuracy": "grounding/accuracy"},
        rows={
            "maf": "61.43",
            "maf average, label": "55.73",
            "maf average, feature": "56.18",
            "maf average": "59.51",
            "maf label": "57.23",
            "maf features": "58.49",
            "maf attribute": "24.08",
            "maf label+attribute": "53.20",
            "maf attribute+feature": "57.98",
            "maf label+attribute+feature": "60.86",
            "maf xavier, xavier": "58.54",
            "maf zero, xavier": "60.05",
            "maf xavier": "59.68",
        },
    ),
    "amc": Table(
        paper="Flickr30k, ReferIt, RefCOCO+ testA, testB",
        columns=POINTING,
        rows={
            "albef": "79.14, 50.69, 69.37, 53.77",
            "amc none": "",
            "amc": "86.59, 64.27, 80.34, 64.55",
            "amc box": "86.49, 62.65, 78.89, 61.16",
            "amc region": "85.14, 59.16, 77.89, 61.26",
            "amc cosine": "84.85, 61.21, 76.41, 60.81",
            "amc mean": "82.83, 57.63, 75.34, 56.90",
            "amc max": "86.56, 62.79, 80.34, 64.47",
        },
    ),
    "patches": Table(
        paper="",
        columns={f"Winoground {n}": f"winoground/{n}" for n in ("group", "text", "image")}
        | {head: POINTING[head] for head in ("Flickr30k", "testA", "testB")},
        rows=dict.fromkeys(
            ("patches rank", "patches cacr", "patches none", "patches amc", "patches amc+cacr"), ""
        ),
    ),
    "nlvr": Table(
        paper="",
        columns={
            "dev, six orders of the boxes": "nlvr/accuracy",
            "as given": "nlvr/accuracy/as_given",
            "always the majority answer": "nlvr/majority",
        },
        rows=dict.fromkeys(("nlvr", "boxes", "nlvr short", "nlvr scratch", "nlvr patches"), ""),
    ),
}


def runs_of(arm, results):
    """({seed: what the arm's run measured}, where): of today's ShapesWorld, or of an older one,
    which stands until today's seeds are three
    """
    if arm in results:
        return {"0": results[arm]}, ""
    today, older = (results.get(part, {}).get(arm, {}) for part in ("claims", "ShapesWorld 5"))
    return (today, "") if len(today) >= 3 or not older else (older, ", ShapesWorld 5")


def table(mark, results):
    """Mean and deviation over an arm's runs; the last column has each run's first number"""
    paper, columns, rows = TABLES[mark]
    told = [f"paper: {paper}"] if paper else []
    head = ["`train.py`", *told, *columns, "seed by seed"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for arm, there in rows.items():
        found, where = runs_of(arm, results)
        runs = [found[seed] for seed in sorted(found, key=int)]
        have = [key for key in columns.values() if runs and key in runs[0]]
        cells = [
            mean([run[key] for run in runs]) if key in have else "" for key in columns.values()
        ]
        each = " ".join(f"{run[have[0]]:.1f}" for run in runs) + where if runs else "not run yet"
        told = [there] if paper else []
        lines.append("| " + " | ".join([f"`{label_of(arm)}`", *told, *cells, each]) + " |")
    return "\n".join(lines)


class Compared(NamedTuple):
    """A row of the README's first table"""

    paper: str  # which of its tables
    command: str
    there: str  # the paper's numbers
    ours: tuple  # (arm of tests/claims.json or run of tests/tasks.py, name of a number) each


REPRODUCED = (
    Compared(
        "CACR 3, Winoground group: none, CACR",
        "`tests/seeds.py --claims Winoground`",
        "8.50, 14.25",
        (("none", "winoground/group"), ("cacr", "winoground/group")),
    ),
    Compared("UNITER 3, VQA", "`train.py --task vqa`", "72.70", (("tasks/vqa", "vqa/accuracy"),)),
    Compared("UNITER 3, VCR Q→AR", "`train.py --task vcr`", "58.20", (("tasks/vcr", "vcr/q_ar"),)),
    Compared(
        "UNITER 3, 5, NLVR2",
        "`train.py --task nlvr2`",
        "77.18",
        (("tasks/nlvr2", "nlvr2/accuracy"),),
    ),
    Compared("UNITER 3, SNLI-VE", "`train.py --task ve`", "78.59", (("tasks/ve", "ve/accuracy"),)),
    Compared(
        "UNITER 3, RefCOCO val, val^d",
        "`train.py --task re`",
        "91.64, 81.24",
        (("tasks/re", "re/gt/accuracy"), ("tasks/re", "re/det/accuracy")),
    ),
    Compared(
        "UNITER 3, Flickr30k IR, TR R@1",
        "`train.py --task retrieval`",
        "72.52, 85.90",
        (("tasks/retrieval", "retrieval/image/r1"), ("tasks/retrieval", "retrieval/text/r1")),
    ),
    Compared(
        "Kervadec 2, GQA: without, with alignment",
        "`train.py --recipe toy-align --loss none`, `--loss align`",
        "54.9, 60.5",
        (("align none", "gqa/accuracy"), ("align", "gqa/accuracy")),
    ),
    Compared(
        "MAF 2, 5, Flickr30k Entities: unsupervised, trained",
        "`train.py --loss maf`",
        "56.05, 61.43",
        (("maf", "grounding/glove-att"), ("maf", "grounding/accuracy")),
    ),
    Compared(
        "AMC 1, Flickr30k pointing: without, with",
        "`train.py --recipe toy-amc --loss none`, `--loss amc`",
        "79.14, 86.59",
        (("amc none", "pointing/flickr30k"), ("amc", "pointing/flickr30k")),
    ),
)


def front_table(results):
    """The papers' main numbers beside ours; where several seeds have two, their difference with its
    95 % interval
    """
    lines = ["| paper's table | command | paper | toy |", "|---|---|---|---|"]
    for row in REPRODUCED:
        found = [(runs_of(arm, results)[0], key) for arm, key in row.ours]
        cell = ", ".join(mean([run[key] for run in runs.values()]) for runs, key in found)
        seeds = set.intersection(*(set(runs) for runs, _ in found))
        if len(found) == 2 and len(seeds) > 1:
            (first, a), (second, b) = found
            middle, half = interval([second[s][b] - first[s][a] for s in seeds])
            cell += f": {middle:+.1f} [{middle - half:+.1f}, {middle + half:+.1f}]"
        lines.append("| " + " | ".join([*row[:3], cell]) + " |")
    return "\n".join(lines)


def maf_table(results):
    """MAF and the baselines of its table 5, of the claims' runs"""
    rows = results.get("claims", {}).get("maf", {}).values()
    lines = ["| Flickr30k Entities, IoU 0.5 | paper (tables 1, 2, 5) | toy |", "|---|---|---|"]
    names = {"accuracy": "MAF, weakly supervised"}
    names |= {"glove-att": "glove-att: MAF's unsupervised rule"}
    for measure, paper in MAF_GUESS.items() if rows else ():
        found = mean([row[f"grounding/{measure}"] for row in rows])
        lines.append(f"| {names.get(measure, measure)} | {paper} | {found} |")
    return "\n".join(lines) if rows else ""


def mean(xs):
    if len(xs) < 2:
        return "".join(f"{x:.1f}" for x in xs)
    return f"{statistics.mean(xs):.1f} ± {statistics.stdev(xs):.1f}"


def fill(**tables):
    """Put each table between its marks in the README."""
    text = README.read_text()
    for mark, rows in tables.items():
        text = re.sub(
            rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)",
            lambda m: m[1] + rows + "\n" + m[2],
            text,
            flags=re.S,
        )
        print(rows)
    README.write_text(text)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--claims",
        nargs="*",
        metavar="WORD",
        help="tests/claims.json: run what is missing of all claims, or of those with such a word",
    )
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--jobs", type=int, default=2, help="seeds at a time, each with its share of the cores"
    )
    parser.add_argument(
        "--tables", nargs="*", default=[], choices=list(TABLES), help="the runs of these tables"
    )
    every = "every loss on every benchmark instead, of all encoders or of these"
    parser.add_argument("--losses", nargs="*", choices=list(CLAIMS["losses"]), help=every)
    args = parser.parse_args(argv)
    for word in args.claims or ():
        if not any(word in claim["claim"] for claim in CLAIMS["claims"]):
            parser.error(f"--claims {word}: no claim of tests/claims.json has this word")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    threads = max(1, os.cpu_count() // args.jobs)

    with ThreadPoolExecutor(args.jobs) as pool:
        # arm by arm, so that rows are whole one after the other
        def each(run, arms, seeds):
            work = [(arm, seed) for arm in arms for seed in seeds]
            list(pool.map(lambda job: run(*job, threads, results), work))

        each(run_arm, (arm for name in args.tables for arm in TABLES[name].rows), args.seeds)
        encoders = [] if args.losses is None else args.losses or CLAIMS["losses"]
        each(benchmarks, (arm for name in encoders for arm in CLAIMS["losses"][name]), args.seeds)
        for claim in CLAIMS["claims"] if args.claims is not None else ():
            if not args.claims or any(word in claim["claim"] for word in args.claims):
                each(run_arm, [term[1] for term in claim["terms"] if len(term) > 1], claim["seeds"])
    fill(
        claims=claims_table(results),
        arms=arms_table(results),
        losses=losses_table(results),
        maf=maf_table(results),
        front=front_table(results),
        **{mark: table(mark, results) for mark in TABLES},
    )


if __name__ == "__main__":
    main()
