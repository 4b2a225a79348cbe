"""The README's tables over several seeds that redraw everything (world, weights, batches), honest
whichever wins; every command goes on where it stopped and fills tests/results.json and README.md.

python tests/seeds.py --claims                       all claims of tests/claims.json, many hours
python tests/seeds.py --claims Winoground MAF        those whose words have one of these
python tests/seeds.py --seeds 0 1 2 3 4 --losses     every loss on every benchmark, many hours
python tests/seeds.py --seeds 0 1 --losses uniter    of one encoder, two hours
python tests/seeds.py --seeds 0 --nlvr DATA/nlvr     NLVR v1 instead, from each seed's toy
checkpoint and from scratch
python tests/seeds.py --seeds 0 1 2 --align          Kervadec's and MAF's tables instead, an hour
and a half
python tests/seeds.py --seeds 0 1 2 --pixels         AMC's tables instead
python tests/seeds.py --seeds 0 1 2 --patches        CACR and AMC on patches instead, an hour and
a half
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS, README = ROOT / "tests/results.json", ROOT / "README.md"
LOCK = threading.Lock()
CLAIMS = json.loads((ROOT / "tests/claims.json").read_text())
FIRST_ABOVE = "winoground/updates to 50"
# Student's t: what 97.5 % lie below, for 1 to 19 degrees of freedom
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
T_975 += (2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093)
NLVR = {
    "from a toy checkpoint": [],
    "from scratch": ["--init", "none"],
    "its pictures, from a toy checkpoint of patches": ["--vision", "patches"],
}


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


def run_arm(name, seed, threads, results):
    """One run of an arm of tests/claims.json, after those whose checkpoints it begins from, unless
    its numbers are there; returns its folder.
    """
    out = f"out/claims/{re.sub('[^a-z0-9]+', '-', name)}-{seed}"
    if str(seed) in results.get("claims", {}).get(name, {}):
        return out
    command = CLAIMS["arms"][name]
    for other in re.findall(r"{(.*?)}", command):
        command = command.replace(f"{{{other}}}", checkpoint_of(other, seed, threads, results))
    how = ["--data", world(seed), "--seed", seed, "--resume", "--out", out]
    numbers = numbers_of("train.py", *command.split(), *how, threads=threads)
    log = [json.loads(line) for line in (ROOT / out / "log.jsonl").read_text().splitlines()]
    keep(results, "claims", name, str(seed), numbers=numbers | curve_numbers(log))
    return out


def checkpoint_of(name, seed, threads, results):
    """The checkpoint of an arm's run, which is made where it is missing"""
    folder = run_arm(name, seed, threads, results)
    if not (ROOT / folder / "last.pt").exists():
        # its numbers came with the results file, its checkpoint did not
        results["claims"][name].pop(str(seed))
        run_arm(name, seed, threads, results)
    return f"{folder}/last.pt"


def benchmarks(seed, threads, results, encoders):
    """Every benchmark of the toy tree, of the runs that the table of losses is about"""
    for arm in (arm for encoder in encoders for arm in CLAIMS["losses"][encoder]):
        if str(seed) not in results.get("losses", {}).get(arm, {}):
            how = "--ckpt", checkpoint_of(arm, seed, threads, results), "--data", world(seed)
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
    return re.sub(" --(track|steps|init).*", "", CLAIMS["arms"][arm])


def losses_table(results):
    """Each encoder without a loss; then each loss's difference from it, seed by seed"""
    lines, clear, found = [], [], results.get("losses", {})
    for encoder, (none, *arms) in CLAIMS["losses"].items():
        for arm in (none, *arms):
            seeds = sorted(found.get(none, {}).keys() & found.get(arm, {}).keys())
            if len(seeds) < 2:
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
    """Each claim: the paper's numbers, ours with their interval, and a verdict by the interval"""
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
        told = claim["claim"], claim["source"], claim["paper"], ours, str(len(found)), verdict
        lines.append("| " + " | ".join(told) + " |")
    return "\n".join(lines)


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


def nlvr_seed(seed, threads, results, nlvr):
    """NLVR v1 from the seed's toy checkpoint and from scratch"""
    data = world(seed)
    if not (ROOT / data / "nlvr").exists():
        (ROOT / data / "nlvr").symlink_to(Path(nlvr).resolve())
    for name, args in NLVR.items():
        if f"{name}/{seed}" not in results:
            out = f"out/seeds/{name.replace(' ', '-')}-{seed}"
            how = ["--data", data, "--seed", seed, "--out", out, "--resume"]
            numbers = numbers_of("train.py", "--task", "nlvr", *args, *how, threads=threads)
            keep(results, f"{name}/{seed}", numbers=numbers)


ALIGN = {
    "none": (["--recipe", "toy-align", "--loss", "none"], "54.9, 79.5", "74.5 (73.1, 76.0)"),
    "align": (["--loss", "align"], "60.5, 89.7", "75.5 (74.5, 77.2)"),
    **{
        f"{loss}, {steps} steps": ([*how, "--steps", str(steps)], "", "")
        for steps in (1500, 3600)
        for loss, how in (
            ("none", ["--recipe", "toy-align", "--loss", "none"]),
            ("align", ["--loss", "align"]),
        )
    },
}
MAF_USE = {
    ("attention", "label+feature"): "61.43",
    ("average", "label"): "55.73",
    ("average", "feature"): "56.18",
    ("average", "label+feature"): "59.51",
    ("attention", "label"): "57.23",
    ("attention", "feature"): "58.49",
    ("attention", "attribute"): "24.08",
    ("attention", "label+attribute"): "53.20",
    ("attention", "attribute+feature"): "57.98",
    ("attention", "label+attribute+feature"): "60.86",
}
# W_f, W_p; the paper's columns in their order
MAF_START = {
    ("xavier", "xavier"): "58.54",
    ("zero", "xavier"): "60.05",
    ("xavier", "identity"): "59.68",
    ("zero", "identity"): "61.28",
}
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


def align_seed(seed, threads, results):
    """Kervadec's table 2 and 4, MAF's 3, 4 and 5, on one seed's world."""
    data = world(seed)

    def measure(name, script, *args):
        if name not in results:
            numbers = numbers_of(script, *args, "--data", data, threads=threads)
            keep(results, name, numbers=numbers)

    common = ["--seed", str(seed), "--resume"]
    for name, (args, _, _) in ALIGN.items():
        out = f"out/seeds/align-{name.replace(' ', '-')}-{seed}"
        measure(f"align/{name}/{seed}", "train.py", *args, *common, "--out", out)
        measure(
            f"align/{name}/nlvr2/{seed}",
            "train.py",
            "--task",
            "nlvr2",
            "--model",
            "lxmert",
            "--nlvr2-head",
            "pair-mlp",
            "--no-cased",
            "--steps",
            "500",
            "--init",
            f"{out}/last.pt",
            *common,
            "--out",
            f"{out}-nlvr2",
        )
        for part in ("balanced", "unbalanced"):
            measure(
                f"align/{name}/{part}/{seed}",
                "evaluate.py",
                "--task",
                "nlvr2",
                "--split",
                f"{part}/{part}_dev",
                "--ckpt",
                f"{out}-nlvr2/last.pt",
            )
    for phrases, use in MAF_USE:
        measure(
            f"maf/{phrases}/{use}/{seed}",
            "train.py",
            "--loss",
            "maf",
            "--phrase-pooling",
            phrases,
            "--region-inputs",
            use,
            *common,
            "--out",
            f"out/seeds/maf-{phrases}-{use}-{seed}",
        )
    for f, p in MAF_START:
        measure(
            f"maf/start/{f}/{p}/{seed}",
            "train.py",
            "--loss",
            "maf",
            "--init-w-f",
            f,
            "--init-w-p",
            p,
            *common,
            "--out",
            f"out/seeds/maf-{f}-{p}-{seed}",
        )


# what is typed: paper's Flickr30k, ReferIt, RefCOCO+ testA, testB (tables 1, 3, 4)
AMC = {
    "--recipe toy-amc --loss none": "",
    "--loss amc": "86.59, 64.27, 80.34, 64.55",
    "--loss amc --triplets box": "86.49, 62.65, 78.89, 61.16",
    "--loss amc --triplets region": "85.14, 59.16, 77.89, 61.26",
    "--loss amc-cosine": "84.85, 61.21, 76.41, 60.81",
    "--loss amc-mean": "82.83, 57.63, 75.34, 56.90",
    "--loss amc-max": "86.56, 62.79, 80.34, 64.47",
}


PATCHES = (
    "--loss cacr --vision patches",
    "--recipe toy-amc-patches --loss none",
    "--loss amc --model uniter",
    "--loss amc+cacr --model uniter",
)


def pixel_seed(seed, threads, results, only, patches):
    """AMC's tables on one seed's world: ALBEF first, then each loss from it; or the rows of
    PATCHES. only: how many of the rows.
    """
    data = world(seed)

    def measure(name, *args):
        out = f"out/seeds/{name.replace('/', '-').replace(' ', '')}"
        if name not in results:
            how = ["--data", data, "--seed", seed, "--resume", "--out", out]
            keep(results, name, numbers=numbers_of("train.py", *args, *how, threads=threads))
        return f"{out}/last.pt"

    if patches:
        for typed in PATCHES:
            measure(f"patches/{typed}/{seed}", *typed.split())
        return
    start = measure(f"amc/--recipe toy-albef/{seed}", "--recipe", "toy-albef")
    for typed in list(AMC)[:only]:
        measure(f"amc/{typed}/{seed}", *typed.split(), "--init", start)


def amc_table(results):
    keys = (
        "flickr30k",
        "flickr30k/chance",
        "refcoco+/testA",
        "refcoco+/testB",
        "refcoco+/testA/clean",
        "refcoco+/testA/boxes",
    )
    lines = [
        "| `train.py` | paper: Flickr30k, ReferIt, RefCOCO+ testA, testB | toy: Flickr30k "
        "| by chance | "
        "testA | testB | testA, clean | testA, Recall@1 | Flickr30k, seed by seed |",
        "|" + "---|" * 9,
    ]
    for typed, paper in ({"--recipe toy-albef": "79.14, 50.69, 69.37, 53.77"} | AMC).items():
        if rows := several(results, f"amc/{typed}/{{}}"):
            lines.append(
                f"| `{typed}` | {paper} | "
                + " | ".join(mean([r[f"pointing/{k}"] for r in rows]) for k in keys)
                + " | "
                + " ".join(f"{r['pointing/flickr30k']:.1f}" for r in rows)
                + " |"
            )
    return "\n".join(lines) if len(lines) > 2 else ""


def patches_table(results):
    keys = (
        "winoground/text",
        "winoground/image",
        "winoground/group",
        "pointing/flickr30k",
        "pointing/refcoco+/testA",
        "pointing/refcoco+/testB",
    )
    lines = [
        "| `train.py`, single stream on 4 x 4 patches | Winoground text | image | group | "
        "pointing, Flickr30k | RefCOCO+ testA | testB | seed by seed |",
        "|" + "---|" * 8,
    ]
    for typed in PATCHES:
        if rows := several(results, f"patches/{typed}/{{}}"):
            have = [k if k in rows[0] else None for k in keys]
            lines.append(
                f"| `{typed}` | "
                + " | ".join(mean([r[k] for r in rows]) if k else "" for k in have)
                + " | "
                + " ".join(f"{r[next(k for k in (keys[2], keys[3]) if k in r)]:.1f}" for r in rows)
                + " |"
            )
    return "\n".join(lines) if len(lines) > 2 else ""


def several(results, pattern):
    """[results of each seed] whose name is the pattern with a number for {}."""
    first, _, last = pattern.partition("{}")
    return [
        results[k]
        for k in sorted(results)
        if k.startswith(first) and k.endswith(last) and k[len(first) : len(k) - len(last)].isdigit()
    ]


def align_table(results):
    lines = [
        "| two-stream, toy | paper: GQA accuracy, consistency | GQA accuracy | consistency | "
        "words that point to their object | accuracy, seed by seed | paper: NLVR2 test-P "
        "(balanced, "
        "unbalanced) | NLVR2 dev | balanced | unbalanced |",
        "|" + "---|" * 10,
    ]
    for name, (args, gqa, pair) in ALIGN.items():
        rows, fine, parts = (
            several(results, f"align/{name}/{{}}"),
            several(results, f"align/{name}/nlvr2/{{}}"),
            [several(results, f"align/{name}/{p}/{{}}") for p in ("balanced", "unbalanced")],
        )
        if rows and fine and all(parts):
            of = lambda rows, key: mean([r[key] for r in rows])
            lines.append(
                f"| `train.py {' '.join(args)}` | {gqa} | {of(rows, 'gqa/accuracy')} | "
                f"{of(rows, 'gqa/consistency')} | {of(rows, 'pointing/accuracy')} | "
                + " ".join(f"{r['gqa/accuracy']:.1f}" for r in rows)
                + f" | {pair} | "
                + " | ".join(of(rows, "nlvr2/accuracy") for rows in (fine, *parts))
                + " |"
            )
            chance = of(rows, "pointing/chance")
    return (
        "\n".join([*lines, f"| any region | | | | {chance} | | | | | |"]) if len(lines) > 2 else ""
    )


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


def maf_ablation(results):
    lines = [
        "| phrases, regions (table 3); start of W_f, W_p (table 4) | paper | toy |",
        "|---|---|---|",
    ]
    for (a, b), paper, name in [
        *((k, v, f"maf/{k[0]}/{k[1]}/{{}}") for k, v in MAF_USE.items()),
        *((k, v, f"maf/start/{k[0]}/{k[1]}/{{}}") for k, v in MAF_START.items()),
    ]:
        if rows := several(results, name):
            flag = (
                f"--phrase-pooling {a} --region-inputs {b}"
                if "start" not in name
                else f"--init-w-f {a} --init-w-p {b}"
            )
            lines.append(
                f"| `{flag}` | {paper} | {mean([r['grounding/accuracy'] for r in rows])} |"
            )
    return "\n".join(lines) if len(lines) > 2 else ""


def mean(xs):
    if len(xs) == 1:
        return f"{xs[0]:.1f}"
    return f"{statistics.mean(xs):.1f} ± {statistics.stdev(xs):.1f}"


def nlvr_table(results):
    lines = [
        "| NLVR v1 dev, percent right | six orders of the boxes | as given | seed by seed |",
        "|---|---|---|---|",
    ]
    for name in NLVR:
        rows = [r for k, r in sorted(results.items()) if k.startswith(name + "/")]
        if rows:
            right = [r["nlvr/accuracy"] for r in rows]
            lines.append(
                f"| {name} | {mean(right)} | {mean([r['nlvr/accuracy/as_given'] for r in rows])} | "
                + " ".join(f"{x:.1f}" for x in right)
                + " |"
            )
            majority = rows[0]["nlvr/majority"]
    return (
        "\n".join([*lines, f"| always the majority answer | {majority:.1f} | {majority:.1f} | |"])
        if len(lines) > 2
        else ""
    )


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
    parser.add_argument("--nlvr", help="folder of NLVR v1 (dev/, test/): run that instead")
    parser.add_argument("--align", action="store_true", help="Kervadec's and MAF's tables instead")
    parser.add_argument(
        "--pixels",
        type=int,
        nargs="?",
        const=len(AMC),
        default=0,
        help="AMC's tables instead; a number: only its first so many rows",
    )
    parser.add_argument("--patches", action="store_true", help="CACR and AMC on patches instead")
    every = "every loss on every benchmark instead, of all encoders or of these"
    parser.add_argument("--losses", nargs="*", choices=list(CLAIMS["losses"]), help=every)
    args = parser.parse_args(argv)
    for word in args.claims or ():
        if not any(word in claim["claim"] for claim in CLAIMS["claims"]):
            parser.error(f"--claims {word}: no claim of tests/claims.json has this word")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    threads = max(1, os.cpu_count() // args.jobs)

    def one(seed):
        if args.pixels or args.patches:
            pixel_seed(seed, threads, results, args.pixels, args.patches)
        elif args.losses is not None:
            benchmarks(seed, threads, results, args.losses or CLAIMS["losses"])
        elif args.align:
            align_seed(seed, threads, results)
        elif args.nlvr:
            nlvr_seed(seed, threads, results, args.nlvr)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, args.seeds))
        for claim in CLAIMS["claims"] if args.claims is not None else ():
            if not args.claims or any(word in claim["claim"] for word in args.claims):
                arms = {term[1]: None for term in claim["terms"] if len(term) > 1}
                run_all = lambda seed: [run_arm(arm, seed, threads, results) for arm in arms]
                list(pool.map(run_all, claim["seeds"]))
    fill(
        claims=claims_table(results),
        arms=arms_table(results),
        losses=losses_table(results),
        nlvr=nlvr_table(results),
        align=align_table(results),
        maf=maf_table(results),
        maf_ablation=maf_ablation(results),
        amc=amc_table(results),
        patches=patches_table(results),
    )


if __name__ == "__main__":
    main()
