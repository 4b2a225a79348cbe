"""The tables of UNITER's downstream tasks and of its pre-training ablation in tests/RESULTS.md, on
the toy tree, one seed each. Their runs are arms of tests/claims.json.

python tests/tasks.py                    about an hour on two cores; goes on where it stopped;
                                         fills tests/results.json and tests/RESULTS.md
python tests/tasks.py --only vqa ve      some rows;   --ablation: table 2 instead, another hour
"""

import argparse
import json

import seeds

# what the table tells of each arm, with UNITER-base's numbers: "full": the recipe at full size,
# "keys": our numbers for the same thing, "majority": of always the commonest answer
ROWS = seeds.CLAIMS["tasks"]
TRAINED = [arm for arm in ROWS if arm != "zero-shot"]
# table 2: UNITER's Meta-Sum, VQA, NLVR2, RefCOCO+; line 2 is BERT's weights, and retrieval is left
# out here
LINES = seeds.CLAIMS["table 2"]
ZERO_SHOT = "--task retrieval --head match"
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
    for name, row in ROWS.items():
        if not (run := only(results, name)):
            continue
        hidden = [only(results, f"{name}, no {what}") for what in ("text", "regions")]
        majority = row["majority"]
        majority = f"{run[majority]:.1f}" if majority in run else majority
        command = f"evaluate.py {ZERO_SHOT}"
        command = f"train.py {seeds.label_of(name)}" if name in TRAINED else command
        # zero-shot retrieval is of the run that all tasks begin from
        mark = seeds.stale_mark((name if name in TRAINED else "toy-pretrain", run))
        cells = [f"`{command}`{mark}", row["full"] and f"`{row['full']}`"]
        cells += [row["where"], row["paper"]]
        cells += [numbers(x, row["keys"]) for x in (run, *hidden)]
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
    parser.add_argument("--only", nargs="*", default=TRAINED, choices=TRAINED)
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
