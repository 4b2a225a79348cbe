"""The front page keeps its word: its commands run, its tables are the results file's, its functions
and settings exist.
"""

import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

import bench
import data
import evaluate
import losses
import model
import rehearse
import seeds
import tasks
import toy
import train
from conftest import ROOT, inside, write_nlvr

README = (ROOT / "README.md").read_text()
FRONT = re.sub(r"<details>.*?</details>", "", README, flags=re.S)
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
# what needs files that a toy tree has not
NEEDS_DATA = "DATA", "pytorch_model.bin", "photo.jpg"


def commands(blocks=BLOCKS):
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.split("&&"):
                if words := shlex.split(command, comments=True):
                    yield words


def script_of(words):
    """(script, its arguments) of a command that runs one of ours, else (None, [])"""
    script = next((w for w in words if w.endswith(".py")), None)
    return script, words[words.index(script) + 1 :] if script else []


def test_commands_parse():
    seen, outs = set(), {}
    for words in commands():
        script, args = script_of(words)
        if script is None or "--help" in words:
            continue
        seen.add(script)
        if script == "train.py":
            cfg = train.parse(args)
            run = train.dataclasses.asdict(cfg) | {"save_every": 0, "resume": False, "out": ""}
            same = outs.setdefault(cfg.out, run)
            assert same == run, f"two different runs would go to {cfg.out}"
        elif script == "evaluate.py" and args[0] == "extract":
            evaluate.make_extract_parser().parse_args(args[1:])
        elif script == "evaluate.py" and args[0] == "crops":
            assert args[1] == "--data"
        elif script == "evaluate.py" and args[0] == "pack":
            evaluate.make_pack_parser().parse_args(args[1:])
        elif script == "evaluate.py":
            evaluate.make_parser().parse_args(args)
        else:
            assert (ROOT / script).exists()
    outs |= {train.parse(shlex.split(row.command)).out: row for row in tasks.ROWS.values()}
    for checkpoint in re.findall(r"(out/\S+)/last\.pt", README):
        assert checkpoint in outs, f"no command of the README makes {checkpoint}"
    scripts = {"train.py", "evaluate.py", "tests/bench.py", "tests/seeds.py"}
    assert scripts <= seen


def test_set_up_commands_are_there_and_ci_runs_one():
    first = README.split("\n")[:40]
    for command in ("torchrun train.py --loss cacr", "python -m pytest"):
        assert any(f"pip install -r requirements.txt && {command}" in line for line in first)
    ci = (ROOT / ".ci/run").read_text()
    assert "pip install -r requirements.txt && python -m pytest" in ci


TABLES = {
    "claims": seeds.claims_table,
    "arms": seeds.arms_table,
    "losses": seeds.losses_table,
    "tasks": tasks.table,
    "ablation": tasks.ablation,
    "bench": bench.table,
    "front": seeds.front_table,
    "maf": seeds.maf_table,
    **{mark: functools.partial(seeds.table, mark) for mark in seeds.TABLES},
    "rehearsal": rehearse.table,
}


@pytest.mark.parametrize("mark", TABLES)
def test_tables_are_the_results_file(mark):
    results = json.loads((ROOT / "tests/results.json").read_text())
    found = re.search(rf"<!-- {mark} -->\n(.*?)\n?<!-- /{mark} -->", README, re.S)[1]
    assert found == TABLES[mark](results)


def test_claims_are_decided_by_their_intervals():
    """Three made-up seeds: a difference of 2 +- 1 holds, of 0 +- 1 is undecided, of -2 +- 1 is the
    opposite; a claim about a difference of differences; the constant of chance.
    """
    at = {"a": (5.0, 6, 7), "b": (3.0, 4, 5), "c": (5.5, 6, 6.5), "d": (7.0, 8.5, 8.5)}
    results = {"claims": {n: {str(s): {"x": x} for s, x in enumerate(v)} for n, v in at.items()}}
    of = lambda *terms: seeds.differences({"terms": terms, "seeds": [0, 1, 2]}, results)
    assert of([1, "a", "x"], [-1, "b", "x"]) == [2, 2, 2]
    assert of([16.0], [-1, "a", "x"]) == [11, 10, 9]
    assert of([1, "a", "x"], [-1, "b", "x"], [-1, "c", "x"], [1, "d", "x"]) == [3.5, 4.5, 4]
    middle, half = seeds.interval([1.0, 2.0, 3.0])
    assert middle == 2 and half == pytest.approx(4.303 / 3**0.5)
    # a seed that is missing does not count
    del results["claims"]["a"]["1"]
    assert of([1, "a", "x"], [-1, "b", "x"]) == [2, 2]


def test_a_table_tells_what_is_missing_and_what_is_old():
    """An older world's runs stand until today's are three; a row has what it measured."""
    run = lambda x: {"gqa/accuracy": x, "gqa/consistency": 2 * x}
    runs = lambda *xs: {str(seed): run(x) for seed, x in enumerate(xs)}
    results = {"claims": {"align": runs(50.0, 51.0, 52.0), "align none": runs(1.0, 2.0)}}
    old = {"align": runs(1.0, 2.0, 3.0, 4.0), "align none": runs(40.0, 41.0, 42.0)}
    results["ShapesWorld 5"] = old
    rows = seeds.table("align", results).splitlines()[2:]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert cells[1][2:] == ["51.0 ± 1.0", "102.0 ± 2.0", "", "", "", "50.0 51.0 52.0"]
    assert cells[0][2:4] == ["41.0 ± 1.0", "82.0 ± 2.0"]
    assert cells[0][-1] == "40.0 41.0 42.0, ShapesWorld 5"
    assert cells[2][2:] == ["", "", "", "", "", "not run yet"]
    assert "| 41.0 ± 1.0, 51.0 ± 1.0: +10.0 [+10.0, +10.0] |" in seeds.front_table(results)


def test_claims_name_arms_that_parse():
    """Every arm is a command of train.py; every claim names arms and says its seeds."""
    arms = seeds.CLAIMS["arms"]
    for command in arms.values():
        for other in re.findall(r"{(.*?)}", command):
            assert other in arms
        train.parse(shlex.split(re.sub(r"{.*?}", "none", command)))
    for claim in seeds.CLAIMS["claims"]:
        assert {t[1] for t in claim["terms"] if len(t) > 1} <= set(arms)
        assert 5 <= len(claim["seeds"]) <= len(seeds.T_975) + 1
        assert claim["paper"] and claim["source"]
    named = [arm for table in seeds.TABLES.values() for arm in table.rows]
    named += [arm for found in seeds.CLAIMS["losses"].values() for arm in found]
    assert set(named) <= set(arms)


def test_a_word_that_no_claim_has_is_an_error(capsys):
    with pytest.raises(SystemExit):
        seeds.main(["--seeds", "--claims", "Winogrand"])
    assert "--claims Winogrand: no claim" in capsys.readouterr().err


def test_functions_named_exist():
    table = README.split("| idea | equation | function in losses.py |")[1].split("\n\n")[0]
    for name in re.findall(r"`(\w+)`", table):
        assert hasattr(losses, name), name
    modules = {"losses": losses, "model": model, "data": data, "evaluate": evaluate, "train": train}
    exercises = {"matrix_kl_gradient", "ipot_fast"}
    for module, name in re.findall(r"`?\b(losses|model|data|evaluate|train)\.(\w+)", FRONT):
        if name not in exercises | {"py"}:
            assert hasattr(modules[module], name), f"{module}.{name}"


def test_commands_of_the_task_table_parse():
    for row in [*tasks.ROWS.values()]:
        cfg = train.parse(shlex.split(row.command))
        assert train.parse(["--recipe", *shlex.split(row.full)]).task == cfg.task
    evaluate.make_parser().parse_args([*shlex.split(tasks.ZERO_SHOT.command), "--ckpt", "x"])
    for pretrain, _ in tasks.LINES.values():
        how = ["--pretrain", *pretrain.split()] if pretrain else []
        train.parse(["--recipe", "toy-pretrain", *how])


def test_settings_named_exist():
    parsers = evaluate.make_parser(), evaluate.make_extract_parser(), train.make_parser()
    options = {option for p in parsers for a in p._actions for option in a.option_strings}
    options |= {"--nnodes", "--node-rank", "--rdzv-endpoint", "--slow", "--small", "--readme"}
    for name in re.findall(r"`(--[a-z0-9-]+)", README):
        assert name in options, name


# ------------------------------------------------------------------------- every command is run


def shrunk(recipe):
    """A recipe's settings with a few updates"""
    steps = {"steps": 2, "warmup": 1, "save_every": 2, "eval_every": 2, "log_every": 1}
    steps |= {"candidates": 6} if recipe.get("candidates") else {}
    steps |= {"batch_size": 8} if recipe.get("batch_size") else {}
    return recipe | steps | {"batch_tokens": 256, "gpus": 1, "queue": 20, "workers": 0}


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """A folder with data/toy in it, where every recipe has two updates."""
    toy.make_toy(tmp_path / "data/toy", scenes=600)
    write_nlvr(tmp_path / "data/toy")
    toy.make_nlvr_store(tmp_path / "data/toy")
    monkeypatch.chdir(tmp_path)
    for name, recipe in train.RECIPES.items():
        monkeypatch.setitem(train.RECIPES, name, shrunk(recipe))
    monkeypatch.setattr(train, "make_toy_tree", lambda folder: None)
    return tmp_path


def run_commands(folder, blocks):
    """Each command of the blocks, in order, small; returns how many ran."""
    count, done_before = 0, set()
    for words in commands(blocks):
        if tuple(words) in done_before:
            continue
        done_before.add(tuple(words))
        script, args = script_of(words)
        if any(w.startswith(NEEDS_DATA) for w in words) or "pip" in words or "pytest" in words:
            continue
        if "--help" in words or script and script.startswith("tests/"):
            continue
        count += 1
        if script == "train.py":
            done = inside(folder, args)
        elif script == "evaluate.py":
            make_checkpoints(folder, args)
            done = inside(folder, small_picture(folder, args), evaluate.main)
        else:
            done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stderr[-2000:]}"
    return count


def make_checkpoints(folder, args):
    """Those that a command of the table of tasks makes."""
    for path in (a for a in args if a.endswith("last.pt") and not (folder / a).exists()):
        made_by = [shlex.split(row.command) for row in tasks.ROWS.values()]
        for command in (c for c in made_by if f"{train.parse(c).out}/last.pt" == path):
            assert inside(folder, command).returncode == 0


def small_picture(folder, args):
    """The README's picture is of the tree of 6,000 scenes; this one has other numbers."""
    if "--image" in args:
        picture = folder / args[args.index("--image") + 1]
        if not picture.exists():
            args = list(args)
            args[args.index("--image") + 1] = str(next(picture.parent.glob("*.jpg")))
    return args


@pytest.mark.slow
def test_every_command_of_the_readme_runs(quick):
    assert run_commands(quick, BLOCKS) > 40


def test_the_commands_of_change_it_run(quick):
    change_it = FRONT.split("## Change it")[1].split("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", change_it, re.S)
    assert run_commands(quick, blocks) == 6
    assert list((quick / "out").rglob("*.png"))


@pytest.mark.slow
@pytest.mark.parametrize("part", bench.PARTS)
def test_every_part_of_the_bench_runs(part):
    command = [sys.executable, "tests/bench.py", part, "--small"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "script", ["train", "evaluate", "tests/toy", "tests/bench", "tests/rehearse"]
)
def test_help(script):
    command = [sys.executable, f"{script}.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, argv",
    [
        ("seeds", ["--seeds", "--claims", "helps on Winoground", "RefCOCO+"]),
        ("seeds", ["--seeds", "0", "--losses"]),
        ("seeds", ["--seeds", "0", "--tables", "align"]),
        ("seeds", ["--seeds", "0", "--tables", "amc", "maf_ablation"]),
        ("seeds", ["--seeds", "0", "--tables", "patches"]),
        ("tasks", []),
        ("tasks", ["--ablation"]),
    ],
)
def test_the_scripts_of_the_tables_run(quick, script, argv, monkeypatch):
    """On a copy of the results and the README, with two updates a run."""
    owner = {"seeds": seeds, "tasks": tasks}[script]
    for name in ("results.json",):
        (quick / name).write_text("{}")
    shutil.copy(ROOT / "README.md", quick)
    for module in (seeds, tasks):
        monkeypatch.setattr(module, "ROOT", quick)
        monkeypatch.setattr(module, "RESULTS", quick / "results.json")
    monkeypatch.setattr(seeds, "README", quick / "README.md")

    def run(*command, **env):
        path, *args = map(str, command)
        if path == "tests/toy.py":
            if not (quick / args[args.index("--out") + 1]).exists():
                (quick / args[args.index("--out") + 1]).symlink_to(quick / "data/toy")
            return ""
        mains = {"train.py": train.main, "evaluate.py": evaluate.main}
        if path == "train.py":
            args += ["--steps", "2", "--candidates", "0"]
        done = inside(quick, args, mains[path])
        assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stderr[-2000:]}"
        return done.stdout

    def run_and_time(*command, **env):
        return json.loads(run(*command).strip().splitlines()[-1]) | {"minutes": 0.1}

    # one at a time: all of them change this process's folder
    for module in (seeds, tasks):
        monkeypatch.setattr(module, "ThreadPoolExecutor", lambda n: ThreadPoolExecutor(1))
    once = [claim | {"seeds": [0]} for claim in seeds.CLAIMS["claims"]]
    few = {"uniter": ["none", "eqsim"], "lxmert": ["none, lxmert", "hard-rank, lxmert"]}
    monkeypatch.setattr(seeds, "CLAIMS", seeds.CLAIMS | {"claims": once, "losses": few})
    monkeypatch.setattr(seeds, "run", run)
    monkeypatch.setattr(tasks, "run", run_and_time)
    owner.main(argv)
    assert json.loads((quick / "results.json").read_text())
