"""The README's table: each alignment loss over several seeds that redraw everything (world, weights, batches), honest whichever wins.

python tests/seeds.py --seeds 0 1 2 3 4 5 --jobs 2       an hour on two cores; goes on where it stopped; fills tests/results.json and README.md
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


def run(*command, **env):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **env})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return done.stdout


def one_seed(seed, threads, results):
    data = f"data/toy-seed{seed}"
    if not (ROOT / data).exists():
        run("data.py", "toy", "--out", data, "--seed", str(seed))
    for name, args in VARIANTS.items():
        if f"{name}/{seed}" not in results:
            out = f"out/seeds/{name.replace(' ', '-')}-{seed}"
            text = run("train.py", *args, "--data", data, "--seed", str(seed), "--out", out, "--resume", OMP_NUM_THREADS=str(threads))
            results[f"{name}/{seed}"] = json.loads(text.strip().splitlines()[-1])
            RESULTS.write_text(json.dumps(results, indent=0, sort_keys=True) + "\n")
            print(name, seed, {k: v for k, v in results[f"{name}/{seed}"].items() if k in ("winoground/text", "winoground/image", "winoground/group")}, flush=True)


def table(results):
    seeds = sorted({int(k.split("/")[1]) for k in results})
    mean = lambda xs: f"{statistics.mean(xs):.1f} ± {statistics.stdev(xs):.1f}" if len(xs) > 1 else f"{xs[0]:.1f}"
    lines = ["| loss | text | image | group | group, seed by seed | group minus none, seed by seed |", "|---|---|---|---|---|---|"]
    for name in VARIANTS:
        rows = [results[f"{name}/{s}"] for s in seeds if f"{name}/{s}" in results]
        if not rows:
            continue
        group = [r["winoground/group"] for r in rows]
        pairs = [r["winoground/group"] - results[f"none/{s}"]["winoground/group"] for s, r in zip(seeds, rows)]
        lines.append(f"| {name} | {mean([r['winoground/text'] for r in rows])} | {mean([r['winoground/image'] for r in rows])} | {mean(group)} | "
                     + " ".join(f"{g:.0f}" for g in group) + " | " + ("" if name == "none" else f"{mean(pairs)}: " + " ".join(f"{p:+.0f}" for p in pairs)) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3, 4, 5])
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time, each with its share of the cores")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda s: one_seed(s, max(1, os.cpu_count() // args.jobs), results), args.seeds))
    text = README.read_text()
    README.write_text(re.sub(r"(<!-- seeds -->\n).*?(\n<!-- /seeds -->)", lambda m: m[1] + table(results) + m[2], text, flags=re.S))
    print(table(results))


if __name__ == "__main__":
    main()
