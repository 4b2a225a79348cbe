"""The README's table: each alignment loss over several seeds that redraw everything (world, weights, batches), honest whichever wins.

python tests/seeds.py --seeds 0 1 2 3 4 --jobs 2       40 minutes on two cores; goes on where it stopped; fills tests/results.json and README.md
python tests/seeds.py --seeds 0 --nlvr DATA/nlvr     NLVR v1 instead, from each seed's toy checkpoint and from scratch
"""
import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS, README = ROOT / "tests/results.json", ROOT / "README.md"
VARIANTS = {"none": [], "iais": ["--loss", "iais"], "iais-distributed": ["--loss", "iais-distributed"],
            "cacr on probabilities": ["--loss", "cacr", "--cacr-on", "probs"], "cacr on logits": ["--loss", "cacr", "--cacr-on", "logits"]}


NLVR = {"from a toy checkpoint": [], "from scratch": ["--init", "none"]}


def run(*command, **env):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **env})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return done.stdout


def one_seed(seed, threads, results, nlvr):
    data = f"data/toy-seed{seed}"
    if not (ROOT / data).exists():
        run("data.py", "toy", "--out", data, "--seed", str(seed))
    if nlvr and not (ROOT / data / "nlvr").exists():
        (ROOT / data / "nlvr").symlink_to(Path(nlvr).resolve())
    for name, args in ({n: ["--task", "nlvr", *a] for n, a in NLVR.items()} if nlvr else VARIANTS).items():
        if f"{name}/{seed}" not in results:
            out = f"out/seeds/{name.replace(' ', '-')}-{seed}"
            text = run("train.py", *args, "--data", data, "--seed", str(seed), "--out", out, "--resume", OMP_NUM_THREADS=str(threads))
            results[f"{name}/{seed}"] = json.loads(text.strip().splitlines()[-1])
            RESULTS.write_text(json.dumps(results, indent=0, sort_keys=True) + "\n")
            print(name, seed, results[f"{name}/{seed}"], flush=True)


def mean(xs):
    return f"{statistics.mean(xs):.1f} ± {statistics.stdev(xs):.1f}" if len(xs) > 1 else f"{xs[0]:.1f}"


def nlvr_table(results):
    lines = ["| NLVR v1 dev, percent right | six orders of the boxes | as given | seed by seed |", "|---|---|---|---|"]
    for name in NLVR:
        rows = [r for k, r in sorted(results.items()) if k.startswith(name + "/")]
        if rows:
            right = [r["nlvr/accuracy"] for r in rows]
            lines.append(f"| {name} | {mean(right)} | {mean([r['nlvr/accuracy/as_given'] for r in rows])} | " + " ".join(f"{x:.1f}" for x in right) + " |")
            majority = rows[0]["nlvr/majority"]
    return "\n".join([*lines, f"| always the majority answer | {majority:.1f} | {majority:.1f} | |"]) if len(lines) > 2 else ""


def table(results):
    seeds = sorted({int(k.split("/")[1]) for k in results if k.split("/")[0] in VARIANTS})
    lines = ["| loss | text | image | group | group, seed by seed | group minus none, seed by seed |", "|---|---|---|---|---|---|"]
    for name in VARIANTS:
        have = [s for s in seeds if f"{name}/{s}" in results]
        rows = [results[f"{name}/{s}"] for s in have]
        if not rows:
            continue
        group = [r["winoground/group"] for r in rows]
        pairs = [r["winoground/group"] - results[f"none/{s}"]["winoground/group"] for s, r in zip(have, rows)]
        lines.append(f"| {name} | {mean([r['winoground/text'] for r in rows])} | {mean([r['winoground/image'] for r in rows])} | {mean(group)} | "
                     + " ".join(f"{g:.0f}" for g in group) + " | " + ("" if name == "none" else f"{mean(pairs)}: " + " ".join(f"{p:+.0f}" for p in pairs)) + " |")
    return "\n".join(lines)


def fill(**tables):
    """Put each table between its marks in the README."""
    text = README.read_text()
    for mark, rows in tables.items():
        text = re.sub(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", lambda m: m[1] + rows + "\n" + m[2], text, flags=re.S)
        print(rows)
    README.write_text(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time, each with its share of the cores")
    parser.add_argument("--nlvr", help="folder of NLVR v1 (dev/, test/): run that instead")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda s: one_seed(s, max(1, os.cpu_count() // args.jobs), results, args.nlvr), args.seeds))
    fill(seeds=table(results), nlvr=nlvr_table(results))


if __name__ == "__main__":
    main()
