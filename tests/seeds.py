"""The tables of tests/RESULTS.md and README.md's numbers, over seeds that redraw everything (world,
weights, batches), whichever side wins. Each command goes on where it stopped, runs what is missing
or stale of what was asked for, and fills tests/results.json and the pages.

python tests/seeds.py                                only writes the pages again
python tests/seeds.py --claims                       all claims of tests/claims.json, many hours
python tests/seeds.py --claims Winoground MAF        those whose words have one of these
python tests/seeds.py --seeds 0 1 2 3 4 --losses     every loss on every benchmark, many hours
python tests/seeds.py --seeds 0 1 --losses uniter    of one encoder, two hours
python tests/seeds.py --seeds 0 1 2 --tables amc     another table: align, maf_ablation, patches
python tests/seeds.py --figures out/toy-none-seed0/last.pt out/toy-cacr-seed0/last.pt
                                                     tests/winoground.png and tests/objects.png
"""

import argparse
import ast
import dataclasses
import functools
import hashlib
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import evaluate
import losses
import train

RESULTS = ROOT / "tests/results.json"
PAGES = "README.md", "tests/RESULTS.md", "tests/COST.md"
LOCK = threading.Lock()
# of each run
RUNNING = defaultdict(threading.Lock)
# arms: {name: command of train.py}, {name} in it: the checkpoint of another arm
# claims, losses, found, main, tables, maf, compared, tasks, table 2: what the pages tell of them,
# with the papers' numbers; {claim} in found: its difference and interval
CLAIMS = json.loads((ROOT / "tests/claims.json").read_text())
# Student's t: what 97.5 % lie below, for 1 to 19 degrees of freedom
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
T_975 += (2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093)

# 1. What a number comes from ---------------------------------------------------------------------

PROBES = json.loads((ROOT / "tests/digests.json").read_text())["runs"]
# {part of a command: how often its numbers have changed}: raise it by hand where a change of code
# changes numbers of runs with this in their command and no run of tests/digests.json sees it
# patches lost the classes that a detector saw in them, and with them other first weights
REVISIONS = {"patches": 1}


@functools.lru_cache(maxsize=None)
def settings_digest(command):
    """Eight hex digits of what the numbers of `train.py COMMAND` follow from, but for the seed.
    Numbers that carry another digest are stale: the tables say so, and the run is made again when
    it is asked for.

    In it are
    - the settings that are not Config's defaults, without names of recipes and folders and without
      those that change no number: a setting that is removed makes only those runs stale that set
      it, a recipe that changes only its own
    - the weights of the losses in LOSSES
    - the same of the run that this one begins from: {arm} of tests/claims.json, or --init's recipe
    - the version of the readers, the toy world and the code: the gradient norms (two digits) of
      the run of tests/digests.json that goes through the same code, which tests/test_digests.py
      holds; and REVISIONS. What only changes how an index or a store is kept on disk
      (data.INDEX_VERSION, toy.TOY_VERSION) makes no number stale.
    """
    start = re.search(r"{(.*?)}", command)
    try:
        cfg = train.parse(shlex.split(re.sub(r"{.*?}", "none", command)))
    except train.UserError:  # a setting or a loss that is no more
        return "refused"
    revisions = [n for part, n in REVISIONS.items() if part in command]
    return digest_of(cfg, settings_digest(CLAIMS["arms"][start[1]]) if start else "", revisions)


def digest_of(cfg, start="", revisions=()):
    """settings_digest of settings; start: the digest of the run that it begins from"""
    if cfg.init in train.RECIPES:
        start = digest_of(train.first_config(cfg))
    apart = train.NO_NUMBERS | {"recipe", "seed", "init"}
    settings = {
        f.name: getattr(cfg, f.name)
        for f in dataclasses.fields(cfg)
        if f.name not in apart and getattr(cfg, f.name) != f.default
    }
    weights = {name: train.LOSSES[name].weight for name in cfg.loss.split("+") if name != "none"}
    norms = [f"{x:.1e}" for name in probes(cfg) for x in PROBES[name]["norms"] if x is not None]
    content = [settings, weights, start or cfg.init, norms, list(revisions)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def probes(cfg):
    """The runs of tests/digests.json that go through the code of this run"""
    if cfg.is_albef:
        return ["toy-albef"]
    by_task = {"pretrain": "toy-pretrain", "retrieval": "toy", "grounding": "toy-grounding"}
    name = "toy-align" if cfg.is_multitask else by_task.get(cfg.task, "toy-vqa")
    return [name, "toy-albef"] if cfg.vision == "patches" else [name]


def is_fresh(arm, numbers):
    """Are these numbers of an arm those that its command would give today?"""
    return numbers.get("settings") == settings_digest(CLAIMS["arms"][arm])


def stale_mark(*runs):
    """A table's mark where any of the runs ((arm, numbers) each) is no longer what its command
    gives
    """
    return "" if all(is_fresh(arm, numbers) for arm, numbers in runs) else " (stale)"


def with_note(lines):
    """A table, and under it what "stale" means where a row is"""
    if any("(stale)" in line for line in lines):
        lines = [*lines, "", "*stale: the settings, the toy world or the code have changed since.*"]
    return "\n".join(lines)


def commit():
    """Of the code that runs, for what follows from all of it: seconds, memory"""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip() or "no commit"


def with_commits(commits):
    """A line below a table of costs; commits: {row: commit whose code was measured}"""
    rows = defaultdict(list)
    for row, at in commits.items():
        rows[at].append(row)
    if len(rows) == 1:
        return f"*Measured with the code of commit {next(iter(rows))}.*"
    told = "; ".join(f"{at}: {', '.join(names)}" for at, names in rows.items())
    return f"*Measured with the code of these commits: {told}.*"


# 2. Runs -----------------------------------------------------------------------------------------


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
    """The JSON object that a run's output ends with, and how many minutes it took"""
    began = time.time()
    text = run(script, *map(str, args), OMP_NUM_THREADS=str(threads))
    minutes = round((time.time() - began) / 60, 2)
    return json.loads(text.strip().splitlines()[-1]) | {"minutes": minutes}


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
    its numbers are there and fresh, and its checkpoint if that is wanted; returns its folder.
    """
    command = CLAIMS["arms"][name]
    digest = settings_digest(command)
    out = f"out/runs/{re.sub('[^a-z0-9]+', '-', name)}-{digest}-{seed}"
    # several arms may begin from the same run
    with RUNNING[name, seed]:
        known = is_fresh(name, results.get("runs", {}).get(name, {}).get(str(seed), {}))
        # numbers come with the results file, checkpoints do not; last.pt alone may be of half a run
        if known and (not checkpoint or (ROOT / out / "done.json").exists()):
            return out
        for other in re.findall(r"{(.*?)}", command):
            start = run_arm(other, seed, threads, results, checkpoint=True)
            command = command.replace(f"{{{other}}}", f"{start}/last.pt")
        how = ["--data", world(seed), "--seed", seed, "--resume", "--out", out]
        numbers = numbers_of("train.py", *command.split(), *how, threads=threads)
        log = [json.loads(line) for line in (ROOT / out / "log.jsonl").read_text().splitlines()]
        numbers |= curve_numbers(log) | {"settings": digest}
        keep(results, "runs", name, str(seed), numbers=numbers)
    return out


def run_benchmarks(arm, seed, threads, results):
    """Every benchmark of the toy tree, of a run of the table of losses"""
    if not is_fresh(arm, results.get("losses", {}).get(arm, {}).get(str(seed), {})):
        folder = run_arm(arm, seed, threads, results, checkpoint=True)
        how = "--ckpt", f"{folder}/last.pt", "--data", world(seed)
        numbers = numbers_of("evaluate.py", "--task", "choices", *how, threads=threads)
        numbers |= {"settings": settings_digest(CLAIMS["arms"][arm])}
        keep(results, "losses", arm, str(seed), numbers=numbers)


def curve_numbers(log):
    """Of what was scored at a run's start and at each validation: {name/area: its mean over the
    updates, by trapezoids}
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
    return numbers


# 3. Claims ---------------------------------------------------------------------------------------


def mean(xs):
    if len(xs) < 2:
        return "".join(f"{x:.1f}" for x in xs)
    return f"{statistics.mean(xs):.1f} ± {statistics.stdev(xs):.1f}"


def interval(xs):
    """Mean and half the width of its 95 % interval, by Student's t"""
    half = T_975[len(xs) - 2] * statistics.stdev(xs) / len(xs) ** 0.5
    return statistics.mean(xs), half


def differences(claim, results):
    """Of each seed whose runs are all there: the sum of the claim's terms"""
    sums, arms = [], results.get("runs", {})
    for seed in map(str, claim["seeds"]):
        terms = claim["terms"]
        if all(len(t) == 1 or seed in arms.get(t[1], {}) for t in terms):
            sums.append(sum(t[0] * (arms[t[1]][seed][t[2]] if len(t) > 1 else 1) for t in terms))
    return sums


def verdict_of(claim, results):
    """(verdict by the interval, mean, half the interval's width)"""
    sums = differences(claim, results)
    if len(sums) < 2:
        return "not run yet", 0, 0
    middle, half = interval(sums)
    if len(sums) < len(claim["seeds"]):
        return "under way", middle, half
    if abs(middle) <= half:
        return "undecided here", middle, half
    return "holds" if middle > 0 else "the opposite", middle, half


def claim_runs(claim, results):
    """(arm, numbers) of each run that a claim is about"""
    arms = {term[1] for term in claim["terms"] if len(term) > 1}
    seeds = [str(seed) for seed in claim["seeds"]]
    runs = results.get("runs", {})
    return [(arm, runs[arm][seed]) for arm in arms for seed in seeds if seed in runs.get(arm, {})]


def claims_table(results):
    """Each claim: the paper's numbers, ours with their interval, and a verdict by the interval;
    then how many have each verdict
    """
    verdicts = Counter()
    lines = ["| claim | where | paper | ours: difference, 95 % interval | seeds | verdict |"]
    lines.append("|" + "---|" * 6)
    for claim in CLAIMS["claims"]:
        verdict, middle, half = verdict_of(claim, results)
        low, high = middle - half, middle + half
        ours = f"{middle:+.2f} [{low:+.2f}, {high:+.2f}] {claim['unit']}"
        ours = "" if verdict == "not run yet" else ours
        verdicts[verdict] += 1
        cells = claim["claim"], claim["source"], claim["paper"], ours
        seeds = str(len(differences(claim, results)))
        mark = stale_mark(*claim_runs(claim, results))
        lines.append("| " + " | ".join([*cells, seeds, verdict + mark]) + " |")
    counted = ", ".join(f"{verdict}: {n}" for verdict, n in verdicts.most_common())
    n = len(CLAIMS["claims"])
    chance = f"Nothing is corrected for {n} comparisons: by chance {0.05 * n:.1f} would be decided."
    return with_note([*lines, "", textwrap.fill(f"*{counted}. {chance}*", 100)])


VERDICTS = {
    "holds": "{} of {} claims hold here",
    "the opposite": "for {} the opposite holds",
    "undecided here": "{} are undecided",
}


def found_paragraph(results):
    """What was found, in words, with the numbers of today's tests/results.json"""
    claims = {claim["claim"]: claim for claim in CLAIMS["claims"]}
    decided = {name: verdict_of(claim, results) for name, claim in claims.items()}
    counts = Counter(verdict for verdict, *_ in decided.values())

    def number(match, verdict):
        now, middle, half = decided[match[1]]
        mark = stale_mark(*claim_runs(claims[match[1]], results))
        mark = mark.replace(" (stale)", ", stale") if now == verdict else f", now {now}"
        return f"{middle:+.1f} [{middle - half:+.1f}, {middle + half:+.1f}]{mark}"

    lines = []
    for verdict, text in CLAIMS["found"].items():
        text = re.sub(r"{(.*?)}", functools.partial(number, verdict=verdict), text)
        told = VERDICTS[verdict].format(counts[verdict], len(claims))
        lines.append(f"**{told[0].upper()}{told[1:]}.** {text}")
    return textwrap.fill(" ".join(lines), 100, break_on_hyphens=False)


# the order to read the files in
FILES = {
    "losses": "each loss of the papers: start with `cacr_side`",
    "model": "attention, UNITER, LXMERT, ALBEF, MAF, heads; the detector may be skipped",
    "data": "readers of 20 data sets, tokenizer, batches; how things are kept on disk comes last",
    "train": "settings, objectives, the loop; recipes are the last page",
    "evaluate": "a benchmark is a row and a function; read what you need",
}


def code_lines(path):
    """Lines of code: without docstrings, comments and blank lines"""
    source = path.read_text()
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node):
            text = node.body[0]
            lines[text.lineno - 1 : text.end_lineno] = [""] * (text.end_lineno - text.lineno + 1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)


def sizes_table(results):
    """README.md: the files in the order to read them, with their sizes to the next fifty lines"""
    lines = ["| read | lines of code | |", "|---|---|---|"]
    for name, what in FILES.items():
        size = 50 * round(code_lines(ROOT / f"{name}.py") / 50)
        lines.append(f"| `{name}.py` | {size:,} | {what} |")
    return "\n".join(lines)


# 4. Tables ---------------------------------------------------------------------------------------


def label_of(arm):
    """What tells an arm from the others of its table"""
    weak = " --lr 3e-4 --candidates 8 --eval-every 50"  # what the older start's runs had
    usual = rf"{weak}| --track| --steps \d+"
    usual += r"| --init {(plain|first plain|albef|patches|toy-pretrain).*?}"
    command = re.sub(usual, "", CLAIMS["arms"][arm])
    return re.sub(r" --init {(.*?)}", lambda m: f" after {CLAIMS['arms'][m[1]]}", command)


def losses_table(results):
    """Each encoder without a loss; then each loss's difference from it, seed by seed"""
    lines, clear, scores = [], [], results.get("losses", {})
    for encoder, (none, *arms) in CLAIMS["losses"].items():
        for arm in (none, *arms):
            seeds = sorted(scores.get(none, {}).keys() & scores.get(arm, {}).keys())
            if len(seeds) < 3:
                continue
            mark = stale_mark(*((a, scores[a][s]) for a in (none, arm) for s in seeds))
            cells = [f"`{label_of(arm)}`{mark}", encoder, str(len(seeds))]
            for name in CLAIMS["compared"]:
                base, with_loss = ([scores[a][s][name] for s in seeds] for a in (none, arm))
                plus = "" if arm == none else "+"
                values = [x - y for x, y in zip(with_loss, base)] if plus else base
                middle, half = interval(values)
                clear += [abs(middle) > half] if plus else []
                cells.append(f"{middle:{plus}.1f} ± {half:.1f}")
            lines.append("| " + " | ".join(cells) + " |")
    head = ["`train.py`", "encoder", "seeds", *CLAIMS["compared"]]
    lines[:0] = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    if clear:
        chance = f"by chance {0.05 * len(clear):.0f} do"
        lines += ["", f"*{sum(clear)} of {len(clear)} intervals leave out 0; {chance}.*"]
    return with_note(lines) if len(lines) > 2 else "Not run yet."


def arms_table(results):
    """The runs on Winoground: start, mean over the updates, end"""
    head = "group at the start | mean over the updates | end | held out | seen | worlds"
    lines = [f"| `train.py` | {head} |", "|" + "---|" * 7]
    keys, runs = ("/area", "", "/held out", "/seen"), results.get("runs", {})
    for name in [
        arm for arm in CLAIMS["arms"] if arm.startswith("first ") and arm != "first plain"
    ]:
        rows = {s: r for s, r in runs.get(name, {}).items() if "winoground/group/area" in r}
        starts = [runs["first plain"][s]["winoground/group"] for s in rows]
        if len(rows) < 2:
            continue
        cells = [mean([r[f"winoground/group{k}"] for r in rows.values()]) for k in keys]
        mark = stale_mark(*((name, r) for r in rows.values()))
        # worlds differ more than losses do: only rows of the same ones can be compared
        cells = f"`{label_of(name)}`{mark}", mean(starts), *cells, ", ".join(sorted(rows, key=int))
        lines.append("| " + " | ".join(cells) + " |")
    return with_note(lines)


def table(name, results):
    """Mean and deviation over an arm's runs; the last column has each run's first number"""
    paper, columns, rows = (CLAIMS["tables"][name][part] for part in ("paper", "columns", "rows"))
    papers = [f"paper: {paper}"] if paper else []
    head = ["`train.py`", *papers, *columns, "seed by seed"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for arm, there in rows.items():
        by_seed = results.get("runs", {}).get(arm, {})
        runs = [by_seed[seed] for seed in sorted(by_seed, key=int)]
        have = [key for key in columns.values() if runs and key in runs[0]]
        cells = [
            mean([run[key] for run in runs]) if key in have else "" for key in columns.values()
        ]
        each = " ".join(f"{run[have[0]]:.1f}" for run in runs) if runs else "not run yet"
        mark = stale_mark(*((arm, run) for run in runs))
        label = [f"`{label_of(arm)}`{mark}", *([there] if paper else [])]
        lines.append("| " + " | ".join([*label, *cells, each]) + " |")
    return with_note(lines)


def main_table(results):
    """The papers' main numbers beside ours; where several seeds have two, their difference with its
    95 % interval
    """
    lines = ["| paper's table | `train.py` | paper | toy |", "|---|---|---|---|"]
    for paper, there, ours in CLAIMS["main"]:
        runs = [(results.get("runs", {}).get(arm, {}), key) for arm, key in ours]
        cell = ", ".join(mean([run[key] for run in by_seed.values()]) for by_seed, key in runs)
        seeds = set.intersection(*(set(by_seed) for by_seed, _ in runs))
        if len(runs) == 2 and len(seeds) > 1:
            (first, a), (second, b) = runs
            middle, half = interval([second[s][b] - first[s][a] for s in seeds])
            cell += f": {middle:+.1f} [{middle - half:+.1f}, {middle + half:+.1f}]"
        arms = dict.fromkeys(arm for arm, _ in ours)
        commands = ", ".join(f"`{label_of(arm)}`" for arm in arms)
        by_arm = results.get("runs", {})
        mark = stale_mark(*((arm, run) for arm in arms for run in by_arm.get(arm, {}).values()))
        lines.append(f"| {paper} | {commands} | {there} | {cell}{mark} |")
    return with_note(lines)


def maf_table(results):
    """MAF and the baselines of its table 5, of the claims' runs"""
    rows = results.get("runs", {}).get("maf", {}).values()
    mark = stale_mark(*(("maf", row) for row in rows))
    lines = ["| Flickr30k Entities, IoU 0.5 | paper (tables 1, 2, 5) | toy |", "|---|---|---|"]
    names = {"accuracy": "MAF, weakly supervised"}
    names |= {"glove-att": "glove-att: MAF's unsupervised rule"}
    for measure, paper in CLAIMS["maf"].items() if rows else ():
        ours = mean([row[f"grounding/{measure}"] for row in rows])
        lines.append(f"| {names.get(measure, measure)} | {paper} | {ours}{mark} |")
    return with_note(lines) if rows else ""


def fill(**tables):
    """Put each table between its marks, on the page that has them."""
    for page in PAGES:
        text = (ROOT / page).read_text()
        for mark, rows in tables.items():
            pattern = rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)"
            text = re.sub(pattern, lambda m: m[1] + rows + "\n" + m[2], text, flags=re.S)
        (ROOT / page).write_text(text)


# 5. Figures --------------------------------------------------------------------------------------

INK, GREY, LINES = "#282828", "#9a9a9a", ("#0072b2", "#d55e00", "#009e73")
# a word's attention over the picture: from white to this
ORANGE = np.array([230.0, 97, 0])
NAMES_NOTHING = "[CLS] [SEP] a the of to is and".split()


def object_weights(run, index, most=5000):
    """Of a pointed word's attention to regions, its object's share in percent: (layers,), mean over
    words and heads; and that of a word that attends to all alike. Words whose object no region
    covers do not count; most: of the first so many texts.
    """
    layers = tuple(range(len(getattr(run.model, "cross_layers", None) or run.model.layers)))
    captions, shares = evaluate.pointed_captions(index)[:most], []
    images = index.image[captions]
    for places, x, maps in evaluate.attention_maps(run, index, captions, images, layers):
        place, row, right = evaluate.pointed_regions(index, captions[places], x)
        alike = right.sum(axis=1) / x["region_mask"].cpu().numpy()[row].sum(axis=1)
        P = [losses.block_softmax(S.S_LV, x["region_mask"]).flatten(0, 1)[place] for S in maps]
        by_layer = [(p.float().cpu().numpy() * right).sum(axis=1) for p in P]
        shares.append(np.stack([alike, *by_layer])[:, right.any(axis=1)])
    alike, *by_layer = 100 * np.concatenate(shares, axis=1).mean(axis=1)
    return np.array(by_layer), float(alike)


def objects_figure(runs, path):
    """object_weights of GQA's validation questions by layer: a line for each of {name: Run}"""
    scale, (width, height) = 2, (960, 460)  # drawn at twice its size
    lines = {}
    for name, run in runs.items():
        weights, alike = object_weights(run, evaluate.pointed_questions(run, "val_balanced"))
        lines[name] = weights
    lines["all regions alike"] = np.full(len(weights), alike)
    top = max(values.max() for values in lines.values())
    out = Image.new("RGB", (width * scale, height * scale), "white")
    pen = ImageDraw.Draw(out)
    at = lambda x, y: (
        scale * (90 + 560 * x / max(1, len(weights) - 1)),
        scale * (height - 70 - (height - 140) * y / top),
    )
    text = lambda place, words, colour=INK, size=24: pen.text(
        tuple(place), words, colour, evaluate.font(size * scale)
    )
    pen.line([at(0, top), at(0, 0), at(len(weights) - 1, 0)], fill=INK, width=2 * scale)
    for value in (0, round(top)):
        text(np.subtract(at(0, value), (50 * scale, 14 * scale)), f"{value}")
    for i in range(len(weights)):
        text(np.add(at(i, 0), (-8 * scale, 8 * scale)), f"{i + 1}")
    text((90 * scale, 12 * scale), "a word's attention to the object that it names, percent")
    text((620 * scale, (height - 36) * scale), "layer")
    ends = sorted(lines, key=lambda name: lines[name][-1])
    low = -1e9
    for name, colour in zip(lines, (*LINES[: len(runs)], GREY)):
        points = [at(i, y) for i, y in enumerate(lines[name])]
        pen.line(points, fill=colour, width=4 * scale, joint="curve")
    for name in ends:  # names beside the lines' ends, apart from each other
        low = max(low + 30, lines[name][-1] * (height - 140) / top)
        colour = dict(zip(lines, (*LINES[: len(runs)], GREY)))[name]
        place = scale * 670, scale * (height - 84 - low)
        text(place, f"{name}  {lines[name][-1]:.0f}", colour)
    out.resize((width, height), Image.LANCZOS).save(path)


def enlarged(picture, width):
    """A drawn picture, larger: its few colours stay flat, its edges become smooth"""
    few = picture.quantize(16)
    large = picture.resize((4 * width, 4 * width * picture.height // picture.width))
    # the steps of its pixels are gone before its colours are flat again
    large = large.filter(ImageFilter.GaussianBlur(2 * width / picture.width))
    flat = large.quantize(palette=few, dither=Image.Dither.NONE).convert("RGB")
    return flat.resize((width, width * picture.height // picture.width), Image.LANCZOS)


def winoground_figure(runs, path, example=1, word=1, width=340):
    """A Winoground pair: for each caption its picture with the detector's boxes, and for each of
    {name: Run} how the attention of one word is shared out among the boxes, in the last layer, mean
    over heads (S_LV after its softmax).

    word: which of the caption's words that name something, from 0
    """
    first, margin, line = next(iter(runs.values())), 16, 46
    index, _ = evaluate.choice_index(first, "winoground")
    height = width * 3 // 4
    columns = 1 + len(runs)
    out = Image.new(
        "RGB",
        (columns * (width + margin) + margin, 2 * (height + 2 * line + margin)),
        "white",
    )
    pen, y = ImageDraw.Draw(out), 0
    for caption in (2 * example, 2 * example + 1):
        image = int(index.image[caption])
        picture = evaluate.picture_of(first.data, "winoground", index.store.image_id(image))
        boxes = index.store.relative_boxes(np.array([image]))[0] * [width, height, width, height]
        words, _ = evaluate.attention(first, index, caption)
        place = [i for i, w in enumerate(words) if w not in NAMES_NOTHING][word]
        x = margin
        for i, piece in enumerate(words[1:-1], 1):
            colour = "#c25000" if i == place else INK
            pen.text((x, y + 4), piece, colour, evaluate.font(36))
            x += pen.textlength(piece + " ", evaluate.font(36))
        big = enlarged(picture, width)
        panels = {"regions": attention_picture(big, boxes, None)}
        for name, run in runs.items():
            P = evaluate.attention(run, index, caption)[1]["S_LV"][place]
            panels[f'"{words[place]}" {name}'] = attention_picture(big, boxes, P)
        for column, (title, panel) in enumerate(panels.items()):
            x = margin + column * (width + margin)
            pen.text((x, y + line), title, "#5a5a5a", evaluate.font(29))
            out.paste(panel, (x, y + 2 * line))
        y += height + 2 * line + margin
    out.save(path)


def attention_picture(picture, boxes, weights):
    """A picture with its boxes; with weights (N_V,) each box is filled by its share, in percent"""
    scale = 3  # drawn at so many times its size
    size = picture.width * scale, picture.height * scale
    if weights is not None:
        picture = Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.55)
    out = picture.resize(size, Image.LANCZOS)
    layer = Image.new("RGBA", size)
    pen = ImageDraw.Draw(layer)
    for i in range(len(boxes)) if weights is None else np.argsort(weights):
        corners = [float(v) * scale for v in boxes[i]]
        if weights is None:
            pen.rectangle(corners, outline="#505050", width=2 * scale)
            continue
        alpha = int(225 * weights[i])
        pen.rectangle(corners, fill=(*ORANGE.astype(int), alpha), outline="#505050", width=scale)
    out = Image.alpha_composite(out.convert("RGBA"), layer)
    pen = ImageDraw.Draw(out)
    for i in range(len(boxes)) if weights is not None else ():
        x, above, below = (scale * float(v) for v in (boxes[i][::2].mean(), *boxes[i][1::2]))
        # under its box, or over it where there is no room
        is_low = below + 36 * scale > size[1]
        y, anchor = (above - 4, "mb") if is_low else (below + 4, "mt")
        style = {"anchor": anchor, "stroke_width": 2 * scale, "stroke_fill": "white"}
        pen.text((x, y), f"{100 * weights[i]:.0f}", INK, evaluate.font(30 * scale), **style)
    return out.convert("RGB").resize(picture.size, Image.LANCZOS)


def draw_figures(checkpoints, data="data/toy"):
    """tests/winoground.png and tests/objects.png of a run without and a run with the loss"""
    names = "without loss", "with CACR"
    runs = {name: evaluate.load_run(path, data) for name, path in zip(names, checkpoints)}
    winoground_figure(runs, ROOT / "tests/winoground.png")
    objects_figure(runs, ROOT / "tests/objects.png")


# 6. Command line ---------------------------------------------------------------------------------


def write_pages(results):
    """All tables of all pages"""
    # they use this file
    import bench
    import photos
    import rehearse
    import tasks

    fill(
        bench=bench.table(results),
        rehearsal=rehearse.table(results),
        tasks=tasks.table(results),
        ablation=tasks.ablation(results),
        sizes=sizes_table(results),
        found=found_paragraph(results),
        claims=claims_table(results),
        arms=arms_table(results),
        losses=losses_table(results),
        maf=maf_table(results),
        main=main_table(results),
        **photos.tables(results),
        **{name: table(name, results) for name in CLAIMS["tables"]},
    )


def run_all(run, arms, seeds, jobs, results):
    """Arm by arm, so that rows are whole one after the other; so many seeds at a time"""
    threads = max(1, os.cpu_count() // jobs)
    work = [(arm, seed, threads, results) for arm in arms for seed in seeds]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda job: run(*job), work))


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
        "--tables",
        nargs="*",
        default=[],
        choices=list(CLAIMS["tables"]),
        help="the runs of these tables",
    )
    help_losses = "every loss on every benchmark instead, of all encoders or of these"
    parser.add_argument("--losses", nargs="*", choices=list(CLAIMS["losses"]), help=help_losses)
    parser.add_argument("--figures", nargs=2, metavar="CKPT", help="draw: without, with CACR")
    args = parser.parse_args(argv)
    for word in args.claims or ():
        if not any(word in claim["claim"] for claim in CLAIMS["claims"]):
            parser.error(f"--claims {word}: no claim of tests/claims.json has this word")
    if args.figures:
        return draw_figures(args.figures)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    arms = [arm for name in args.tables for arm in CLAIMS["tables"][name]["rows"]]
    run_all(run_arm, arms, args.seeds, args.jobs, results)
    encoders = [] if args.losses is None else args.losses or CLAIMS["losses"]
    arms = [arm for name in encoders for arm in CLAIMS["losses"][name]]
    run_all(run_benchmarks, arms, args.seeds, args.jobs, results)
    for claim in CLAIMS["claims"] if args.claims is not None else ():
        if not args.claims or any(word in claim["claim"] for word in args.claims):
            arms = [term[1] for term in claim["terms"] if len(term) > 1]
            run_all(run_arm, arms, claim["seeds"], args.jobs, results)
    write_pages(results)


if __name__ == "__main__":
    main()
