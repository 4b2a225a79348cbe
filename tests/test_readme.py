"""The front page keeps its word: its commands run, its tables are the results file's, its functions
and settings exist; so do those of tests/RESULTS.md and tests/COST.md.
"""

import ast
import functools
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

import bench
import data
import evaluate
import losses
import model
import photos
import rehearse
import seeds
import tasks
import toy
import train
from conftest import ROOT, inside

README, RESULTS, COST = ((ROOT / page).read_text() for page in seeds.PAGES)
PAGES = README + RESULTS + COST
FRONT = re.sub(r"<details>.*?</details>", "", README, flags=re.S)
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGES, re.S)
# what needs files that a toy tree has not
NEEDS_DATA = "DATA", "pytorch_model.bin", "train2014_obj36.tsv"


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


def test_it_is_one_page():
    """300 lines, 20 kB, and one fold: the files of the full data."""
    assert len(README.splitlines()) <= 300 and len(README.encode()) <= 20_000
    assert re.findall("<summary>(.*?)</summary>", README) == ["Files of the full data"]


def test_commands_parse(monkeypatch):
    seen, outs = set(), {}
    for name, function in evaluate.COMMANDS.items():
        # of the same options, and does nothing
        stub = functools.wraps(function)(lambda **options: None)
        monkeypatch.setitem(evaluate.COMMANDS, name, stub)
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
        elif script == "evaluate.py" and args[0] in evaluate.COMMANDS:
            evaluate.main(args)
        elif script == "evaluate.py":
            evaluate.make_parser().parse_args(args)
        else:
            assert (ROOT / script).exists()
    outs |= {train.parse(shlex.split(seeds.label_of(arm))).out: arm for arm in tasks.TRAINED}
    for checkpoint in re.findall(r"(out/\S+)/last\.pt", PAGES):
        assert checkpoint in outs, f"no command makes {checkpoint}"
    scripts = {"train.py", "evaluate.py", "tests/rehearse.py", "tests/seeds.py", "tests/toy.py"}
    assert scripts <= seen


def test_set_up_commands_are_there_and_ci_runs_one():
    for command in ("torchrun train.py --loss cacr", "python -m pytest"):
        assert f"pip install -r requirements.txt && {command}" in README.split("## Read it")[0]
    ci = (ROOT / ".ci/run").read_text()
    assert "pip install -r requirements.txt && python -m pytest" in ci


def test_the_first_screen():
    """A picture of 900 pixels or more, the code as it is, a last line that is one JSON object."""
    assert Image.open(ROOT / "tests/winoground.png").width >= 900
    source = ast.parse(inspect.getsource(losses.cacr_side)).body[0]
    lines = inspect.getsource(losses.cacr_side).splitlines()
    del lines[source.body[0].lineno - 1 : source.body[0].end_lineno]  # the docstring
    assert re.search(r"```python\n(.*?)\n```", README, re.S)[1] == "\n".join(lines)
    last = json.loads(re.search(r"```text\n(.*?)```", README, re.S)[1])
    assert 0 < last["winoground/group"] < last["winoground/text"] <= 100


def test_papers_are_links_that_agree_with_their_text():
    links = re.findall(r"\[arXiv (\d{4}\.\d{5})\]\(https://arxiv.org/abs/(.*?)\)", README)
    assert len(links) == 6 and all(text == link for text, link in links)


TABLES = {
    "sizes": seeds.sizes_table,
    "found": seeds.found_paragraph,
    "claims": seeds.claims_table,
    "arms": seeds.arms_table,
    "losses": seeds.losses_table,
    "tasks": tasks.table,
    "ablation": tasks.ablation,
    "bench": bench.table,
    "main": seeds.main_table,
    "maf": seeds.maf_table,
    **{mark: functools.partial(seeds.table, mark) for mark in seeds.CLAIMS["tables"]},
    "rehearsal": rehearse.table,
    **{mark: lambda results, mark=mark: photos.tables(results)[mark] for mark in photos.tables({})},
}


@pytest.mark.parametrize("mark", TABLES)
def test_tables_are_the_results_file(mark):
    """Written again by: python tests/seeds.py; tasks.py; bench.py; rehearse.py, photos.py table."""
    results = json.loads((ROOT / "tests/results.json").read_text())
    written = re.search(rf"<!-- {mark} -->\n(.*?)\n?<!-- /{mark} -->", PAGES, re.S)[1]
    assert written == TABLES[mark](results)


def test_a_digest_tells_what_numbers_follow_from(monkeypatch):
    """A setting, a recipe's, a loss's weight, the run that it begins from, the code: each changes
    it; where files are, how often is saved, and what stands at its default do not.
    """
    digest = seeds.settings_digest.__wrapped__
    before = digest("--loss cacr"), digest("--loss none --init {plain}"), digest("--task vqa")
    assert digest("--loss cacr --save-every 7 --seed 5 --out x") == before[0]
    assert digest("--loss cacr --mask-rate 0.15") == before[0] != digest("--loss cacr --lr 2e-3")
    assert digest("--loss cacr-probs") != before[0] and digest("--loss nothing") == "refused"
    seeds.settings_digest.cache_clear()
    with monkeypatch.context() as m:
        m.setitem(train.LOSSES, "cacr", train.LOSSES["cacr"]._replace(weight=0.5))
        assert digest("--loss cacr") != before[0] and digest("--task vqa") == before[2]
    with monkeypatch.context() as m:
        # --task vqa begins from toy-pretrain
        m.setitem(train.RECIPES, "toy-pretrain", train.RECIPES["toy-pretrain"] | {"steps": 7})
        assert digest("--task vqa") != before[2] and digest("--loss cacr") == before[0]
    with monkeypatch.context() as m:
        m.setitem(seeds.CLAIMS["arms"], "plain", "--recipe toy-short --steps 2999")
        assert digest("--loss none --init {plain}") != before[1]
    seeds.settings_digest.cache_clear()
    with monkeypatch.context() as m:
        norms = [2 * norm for norm in seeds.PROBES["toy-vqa"]["norms"]]
        m.setitem(seeds.PROBES, "toy-vqa", {"norms": norms})
        assert digest("--task vqa") != before[2] and digest("--loss cacr") == before[0]
    with monkeypatch.context() as m:
        m.setitem(seeds.REVISIONS, "--loss cacr", 1)
        assert digest("--loss cacr") != before[0] and digest("--task vqa") == before[2]
    seeds.settings_digest.cache_clear()


def test_what_is_stale_is_marked_and_run_again(tmp_path, monkeypatch):
    command = seeds.CLAIMS["arms"]["maf"]
    results = {"runs": {"maf": {"0": {"grounding/accuracy": 1.0, "settings": "00000000"}}}}
    assert "`--loss maf` (stale)" in seeds.table("maf_ablation", results)
    (tmp_path / "done.json").touch()
    ran = []
    monkeypatch.setattr(seeds, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(seeds, "world", lambda seed: "data/toy")
    monkeypatch.setattr(seeds, "curve_numbers", lambda log: {})

    def numbers_of(script, *args, threads):
        ran.append(args)
        folder = tmp_path / args[args.index("--out") + 1]
        folder.mkdir(parents=True)
        (folder / "log.jsonl").write_text("")
        return {"grounding/accuracy": 2.0}

    monkeypatch.setattr(seeds, "ROOT", tmp_path)
    monkeypatch.setattr(seeds, "numbers_of", numbers_of)
    for _ in range(2):  # once; then it is fresh
        seeds.run_arm("maf", 0, 1, results)
    assert len(ran) == 1 and ran[0][:2] == ("--loss", "maf")
    kept = {"grounding/accuracy": 2.0, "settings": seeds.settings_digest(command)}
    assert results["runs"]["maf"]["0"] == kept
    assert "(stale)" not in seeds.table("maf_ablation", results)


def test_claims_are_decided_by_their_intervals():
    """Three made-up seeds: a difference of 2 +- 1 holds, of 0 +- 1 is undecided, of -2 +- 1 is the
    opposite; a claim about a difference of differences; the constant of chance.
    """
    at = {"a": (5.0, 6, 7), "b": (3.0, 4, 5), "c": (5.5, 6, 6.5), "d": (7.0, 8.5, 8.5)}
    results = {"runs": {n: {str(s): {"x": x} for s, x in enumerate(v)} for n, v in at.items()}}
    of = lambda *terms: seeds.differences({"terms": terms, "seeds": [0, 1, 2]}, results)
    assert of([1, "a", "x"], [-1, "b", "x"]) == [2, 2, 2]
    assert of([16.0], [-1, "a", "x"]) == [11, 10, 9]
    assert of([1, "a", "x"], [-1, "b", "x"], [-1, "c", "x"], [1, "d", "x"]) == [3.5, 4.5, 4]
    middle, half = seeds.interval([1.0, 2.0, 3.0])
    assert middle == 2 and half == pytest.approx(4.303 / 3**0.5)
    # a seed that is missing does not count
    del results["runs"]["a"]["1"]
    assert of([1, "a", "x"], [-1, "b", "x"]) == [2, 2]


def test_a_table_tells_what_is_missing():
    """A row has what it measured."""
    run = lambda x: {"gqa/accuracy": x, "gqa/consistency": 2 * x}
    runs = lambda *xs: {str(seed): run(x) for seed, x in enumerate(xs)}
    results = {"runs": {"align": runs(50.0, 51.0, 52.0), "align none": runs(40.0, 41.0, 42.0)}}
    rows = seeds.table("align", results).splitlines()[2:]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows if row[:1] == "|"]
    assert cells[1][2:] == ["51.0 ± 1.0", "102.0 ± 2.0", "", "", "", "50.0 51.0 52.0"]
    assert cells[2][2:] == ["", "", "", "", "", "not run yet"]
    table = seeds.main_table(results)
    assert "| 41.0 ± 1.0, 51.0 ± 1.0: +10.0 [+10.0, +10.0] (stale) |" in table


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
    named = [arm for table in seeds.CLAIMS["tables"].values() for arm in table["rows"]]
    named += [arm for losses_of in seeds.CLAIMS["losses"].values() for arm in losses_of]
    named += [*tasks.TRAINED, *(arm for name in tasks.TRAINED for arm in tasks.controls(name))]
    named += [f"table 2, {line.split()[0]}, {t}" for line in tasks.LINES for t in tasks.FINE_TUNED]
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


def test_recipes_of_the_task_table_are_of_the_same_task():
    for arm in tasks.TRAINED:
        cfg = train.parse(shlex.split(seeds.label_of(arm)))
        assert train.parse(["--recipe", *shlex.split(tasks.ROWS[arm]["full"])]).task == cfg.task
    evaluate.make_parser().parse_args([*shlex.split(tasks.ZERO_SHOT), "--ckpt", "x"])


def test_settings_named_exist():
    parsers = evaluate.make_parser(), train.make_parser()
    options = {option for p in parsers for a in p._actions for option in a.option_strings}
    commands = evaluate.COMMANDS.values()
    options |= {f"--{name}" for f in commands for name in inspect.signature(f).parameters}
    options |= {"--slow", "--small", "--keep", "--claims", "--losses", "--tables"}
    for name in re.findall(r"`(--[a-z0-9-]+)", PAGES):
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
    """An empty folder, where every recipe has two updates and the toy world is small."""
    monkeypatch.chdir(tmp_path)
    for name, recipe in train.RECIPES.items():
        monkeypatch.setitem(train.RECIPES, name, shrunk(recipe))
    monkeypatch.setattr(train, "make_toy_tree", lambda folder: small_world())
    seeds.settings_digest.cache_clear()
    yield tmp_path
    seeds.settings_digest.cache_clear()


def small_world(folder="data/toy", scenes=600):
    """data/toy, where it is not there yet"""
    if not Path(folder).exists():
        toy.make_toy(folder, scenes=scenes)


# they take hours
SCRIPTS = tuple(f"tests/{name}.py" for name in ("seeds", "tasks", "bench", "rehearse", "photos"))


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
        if "--help" in words or script in SCRIPTS:
            continue
        count += 1
        if script == "tests/toy.py":
            small_world(scenes=150)
            continue
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
        made_by = [shlex.split(seeds.label_of(arm)) for arm in tasks.TRAINED]
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
def test_every_command_of_the_pages_runs(quick, monkeypatch):
    small_world()
    assert run_commands(quick, BLOCKS) > 40
    (quick / "tests").mkdir()
    monkeypatch.setattr(seeds, "ROOT", quick)
    seeds.main(["--figures", "out/toy-none-seed0/last.pt", "out/toy-cacr-seed0/last.pt"])
    assert Image.open(quick / "tests/winoground.png").size > (900, 600)
    assert (quick / "tests/objects.png").exists()


def test_your_own_captions_and_photos(quick):
    """As they are typed, in a folder that has nothing"""
    change_it = FRONT.split("## Change it")[1].split("\n## ")[0]
    (block,) = re.findall(r"```bash\n(.*?)```", change_it, re.S)
    assert run_commands(quick, [block]) == 7
    assert list((quick / "out").rglob("*.png"))


@pytest.mark.slow
@pytest.mark.parametrize("part", bench.PARTS)
def test_every_part_of_the_bench_runs(part):
    command = [sys.executable, "tests/bench.py", part, "--small"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "script", [train, evaluate, toy, bench, rehearse], ids=lambda script: script.__name__
)
def test_help(script):
    done = inside(ROOT, ["--help"], script.main)
    assert done.returncode == 0 and "--" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, argv",
    [
        (seeds, ["--seeds", "--claims", "helps on Winoground", "RefCOCO+"]),
        (seeds, ["--seeds", "0", "--losses"]),
        (seeds, ["--seeds", "0", "--tables", "align"]),
        (seeds, ["--seeds", "0", "--tables", "amc", "maf_ablation"]),
        (seeds, ["--seeds", "0", "--tables", "patches"]),
        (tasks, []),
        (tasks, ["--ablation"]),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else x.__name__,
)
def test_the_scripts_of_the_tables_run(quick, script, argv, monkeypatch):
    """On a copy of the results and the pages, with two updates a run."""
    (quick / "results.json").write_text("{}")
    (quick / "tests").mkdir()
    for page in seeds.PAGES:
        shutil.copy(ROOT / page, quick / page)
    small_world()
    monkeypatch.setattr(seeds, "ROOT", quick)
    monkeypatch.setattr(seeds, "RESULTS", quick / "results.json")

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

    # one at a time: all of them change this process's folder
    monkeypatch.setattr(seeds, "ThreadPoolExecutor", lambda n: ThreadPoolExecutor(1))
    once = [claim | {"seeds": [0]} for claim in seeds.CLAIMS["claims"]]
    two = {"uniter": ["none", "eqsim"], "lxmert": ["none, lxmert", "hard-rank, lxmert"]}
    changed = {"claims": once, "losses": two, "found": {}}
    monkeypatch.setattr(seeds, "CLAIMS", seeds.CLAIMS | changed)
    monkeypatch.setattr(seeds, "sizes_table", lambda results: "")
    monkeypatch.setattr(seeds, "run", run)
    script.main(argv)
    assert json.loads((quick / "results.json").read_text())
