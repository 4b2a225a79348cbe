"""The front page keeps its word: its commands parse, its table is the results file's, its
functions exist.
"""

import json
import re
import shlex

import bench
import data
import evaluate
import losses
import seeds
import tasks
import train
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def commands():
    for block in re.findall(r"```bash\n(.*?)```", README, re.S):
        for line in block.splitlines():
            yield shlex.split(line, comments=True)


def test_commands_parse():
    seen, outs = set(), {}
    for words in commands():
        script = next((w for w in words if w.endswith(".py")), None)
        if script is None or "--help" in words:
            continue
        args = words[words.index(script) + 1 :]
        seen.add(script)
        if script == "train.py":
            cfg = train.parse(args)
            run = train.dataclasses.asdict(cfg) | {"save_every": 0, "resume": False, "out": ""}
            assert outs.setdefault(cfg.out, run) == run, f"two different runs would go to {cfg.out}"
        elif script == "evaluate.py":
            evaluate.make_parser().parse_args(args)
        elif script == "data.py":
            data.make_parser().parse_args(args)
        else:
            assert (ROOT / script).exists()
    outs |= {train.parse(shlex.split(row.command)).out: row for row in tasks.ROWS.values()}
    for checkpoint in re.findall(r"(out/\S+)/last\.pt", README):
        assert checkpoint in outs, f"no command of the README makes {checkpoint}"
    assert {"train.py", "evaluate.py", "data.py", "tests/bench.py", "tests/seeds.py"} <= seen


def test_set_up_commands_are_there_and_ci_runs_one():
    first = README.split("\n")[:40]
    assert any(
        "pip install -r requirements.txt && torchrun train.py --loss cacr" in line for line in first
    )
    assert any("pip install -r requirements.txt && python -m pytest" in line for line in first)
    assert "pip install -r requirements.txt && python -m pytest" in (ROOT / ".ci/run").read_text()


def test_seed_table_is_the_results_file():
    results = json.loads((ROOT / "tests/results.json").read_text())
    for mark, table in (
        ("seeds", seeds.table),
        ("nlvr", seeds.nlvr_table),
        ("tasks", tasks.table),
        ("ablation", tasks.ablation),
        ("bench", bench.table),
        ("align", seeds.align_table),
        ("maf", seeds.maf_table),
        ("maf_ablation", seeds.maf_ablation),
        ("amc", seeds.amc_table),
        ("patches", seeds.patches_table),
    ):
        assert re.search(rf"<!-- {mark} -->\n(.*?)\n?<!-- /{mark} -->", README, re.S)[1] == table(
            results
        ), mark


def test_functions_named_exist():
    table = README.split("| idea | equation | function in losses.py |")[1].split("\n\n")[0]
    for name in re.findall(r"`(\w+)`", table):
        assert hasattr(losses, name), name


def test_commands_of_the_task_table_parse():
    for row in [*tasks.ROWS.values()]:
        cfg = train.parse(shlex.split(row.command))
        assert train.parse(["--recipe", *shlex.split(row.full)]).task == cfg.task
    evaluate.make_parser().parse_args([*shlex.split(tasks.ZERO_SHOT.command), "--ckpt", "x"])
    for tasks_of_line, _ in tasks.LINES.values():
        train.parse(
            [
                "--recipe",
                "toy-pretrain",
                *(["--pretrain", *tasks_of_line.split()] if tasks_of_line else []),
            ]
        )


def test_settings_named_exist():
    fields = {f.name for f in train.dataclasses.fields(train.Config)}
    for name in re.findall(r"`--([a-z-]+)", README):
        # batch: data.py extract
        told = {
            o.lstrip("-").replace("-", "_")
            for a in evaluate.make_parser()._actions
            for o in a.option_strings
        } | {"batch"}
        assert name.replace("-", "_") in fields | told | {"nnodes", "node_rank", "rdzv_endpoint"}, (
            name
        )
