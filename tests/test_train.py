"""The loop as a user meets it: runs, resumes, several processes, settings, and what goes wrong."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
import train
from conftest import QUICK, ROOT, argv, inside, last_line, prepared_run, run, run_and_kill, same
from conftest import weights
from model import read_checkpoint
from train import UserError, alignment_weight, lr_at, make_config, parse


def toy_run(toy_tree, pretrained, *more):
    return [
        "--recipe toy",
        "--data",
        toy_tree,
        "--init",
        pretrained[0],
        "--warmup 2 --batch-tokens 256 --candidates 6",
        *QUICK,
        *more,
    ]


def test_pretraining_runs_every_task(pretrained):
    checkpoint, done = pretrained
    numbers = last_line(done)
    assert {
        "val/mlm",
        "val/itm",
        "val/mrc",
        "val/mrckl",
        "val/mrfr",
        "winoground/text",
        "winoground/image",
        "winoground/group",
    } <= set(numbers)
    log = [json.loads(line) for line in (checkpoint.parent / "log.jsonl").read_text().splitlines()]
    assert {"mlm", "itm"} & set().union(*log) and (checkpoint.parent / "figures/curve.png").exists()


# the others: test_align.py, test_pixels.py
@pytest.mark.parametrize(
    "loss",
    [*(name for name, row in train.LOSSES.items() if row.recipe == "toy"), "cacr+wra", "none"],
)
def test_twenty_steps_of_every_loss(toy_tree, pretrained, tmp_path, loss, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = parse(argv(*toy_run(toy_tree, pretrained, "--loss", loss, "--steps 20 --log-every 1")))
    runtime = train.setup_runtime(cfg)
    numbers = train.train(cfg, runtime)
    log = [json.loads(line) for line in (tmp_path / cfg.out / "log.jsonl").read_text().splitlines()]
    for name in loss.split("+"):
        if name != "none":
            values = [r[name] for r in log if name in r]
            assert len(values) == 20 and all(np.isfinite(values)) and any(v != 0 for v in values)
    assert (
        0 <= numbers["winoground/group"] <= 100
        and len(list((tmp_path / cfg.out / "figures").glob("winoground_*.png"))) == 8
    )


def one_step(toy_tree, *more):
    """A config, and what train_step needs for a first update of the toy experiment"""
    how = "--recipe toy --init none --candidates 0 --batch-tokens 256 --steps 100 --precision fp32"
    cfg = parse(argv(how, "--data", toy_tree, *more))
    runtime, tokenizer = train.setup_runtime(cfg), train.load_tokenizer(cfg)
    streams = train.load_streams(cfg, runtime, prepared_run(cfg, tokenizer))
    model = train.build_model(cfg, runtime, tokenizer, streams)
    optimizer, batch = train.build_optimizer(cfg, model), streams.train[0][0]
    return cfg, runtime, model, optimizer, batch


def test_the_weight_schedule_reaches_the_loss(toy_tree):
    """The norm of the update's gradient holds the alignment loss times exp(5 (t/T - 1)): the same
    gradient as with the schedule's value typed as a constant weight, and another at another step.
    """
    norms = {}
    for name, step, more in (
        ("exp", 60, "--align-weight 2"),
        ("typed", 60, f"--align-weight {2 * alignment_weight(60, 100)} --align-schedule constant"),
        ("late", 100, "--align-weight 2"),
    ):
        cfg, runtime, model, optimizer, batch = one_step(toy_tree, "--loss iais", more)
        how = cfg, runtime, model, optimizer, [], step, [batch]
        norms[name] = train.train_step(*how)[1].item()
    assert norms["exp"] == pytest.approx(norms["typed"], rel=1e-5)
    assert norms["late"] != pytest.approx(norms["exp"], rel=1e-2)


@pytest.mark.parametrize("loss", ["cacr", "iais", "iais-released", "iais-distributed"])
@pytest.mark.parametrize("deviation", [1, 2, 4])
def test_default_weights_act_on_maps_of_any_sharpness(loss, deviation):
    """With its weight a loss on attention maps has a gradient that neither vanishes while maps are
    flat nor grows without bound while they get sharp; CACR on probabilities has next to none.
    """
    mask = torch.arange(8) < torch.tensor([[8], [6], [7], [5]])

    def gradient(loss):
        generator = torch.Generator().manual_seed(0)
        maps = deviation * torch.randn(4, 4, 3, 8, 8, generator=generator)
        maps = [block.requires_grad_() for block in maps]
        cfg, out = SimpleNamespace(loss=loss, model="uniter"), SimpleNamespace(maps=[maps])
        value = train.alignment(cfg, out, {"text_mask": mask, "region_mask": mask})[loss]
        grads = torch.autograd.grad(train.LOSSES[loss].weight * value, maps, allow_unused=True)
        return torch.stack([grad.norm() for grad in grads if grad is not None]).norm()

    assert 0.03 < gradient(loss) < 6 and gradient("cacr-probs") < 0.02


def test_shares_of_the_gradient(toy_tree):
    """Each part's norm, by a backward pass of its own, over the sum of both; nothing else moves."""
    logged, after = {}, {}
    for more in ((), ("--log-shares --log-every 1",)):
        cfg, runtime, model, optimizer, batch = one_step(toy_tree, "--loss iais", *more)
        logged[more] = train.train_step(cfg, runtime, model, optimizer, [], 50, [batch])[0]
        after[more] = {k: v.clone() for k, v in model.state_dict().items()}
    same(*after.values())
    shares = {k: v.item() for k, v in logged[more].items() if k.startswith("share/")}
    assert set(shares) == {"share/rank", "share/iais"} and sum(shares.values()) == pytest.approx(1)
    norms = {}
    for name in ("rank", "iais"):
        cfg, runtime, model, _, batch = one_step(toy_tree, "--loss iais")
        torch.manual_seed((cfg.seed * 1_000_003 + 50) * 1009)
        batch = train.prepare_batch(cfg, runtime, batch)
        value = train.objective_rank(cfg, model, batch)[name]
        late = alignment_weight(50, 100) * cfg.align_weight * train.LOSSES["iais"].weight
        (value * (1 if name == "rank" else late)).backward()
        norms[name] = torch.stack(
            [p.grad.norm() for p in model.parameters() if p.grad is not None]
        ).norm()
    assert shares["share/iais"] == pytest.approx((norms["iais"] / sum(norms.values())).item())


def test_scores_are_tracked_from_the_start_on(toy_tree, pretrained, tmp_path):
    args = toy_run(toy_tree, pretrained, "--loss none --steps 4 --eval-every 2 --track --out o")
    numbers = last_line(run(tmp_path, *args))
    log = [json.loads(line) for line in (tmp_path / "o/log.jsonl").read_text().splitlines()]
    scored = {line["step"]: line for line in log if "winoground/group" in line}
    assert list(scored) == [0, 2, 4]
    assert scored[4]["winoground/group"] == pytest.approx(numbers["winoground/group"], abs=0.01)


def test_the_last_line_says_what_the_score_is_without_the_loss(tmp_path, monkeypatch):
    """From the folder of the same run with --loss none; of the first command from the results."""
    monkeypatch.chdir(tmp_path)
    without = lambda *args: train.without_loss(parse(argv(*args)))
    assert without("--loss cacr --seed 3") == {}
    folder = tmp_path / "out/toy-none-seed3"
    folder.mkdir(parents=True)
    (folder / "done.json").write_text('{"winoground/group": 12.0, "val/rank": 50.0}')
    assert without("--loss cacr --seed 3") == {"without_loss/winoground/group": 12.0}
    assert without("--loss none --seed 3") == without("--loss cacr --seed 3 --lr 1e-4") == {}
    # where the recipe is called as its loss; and a file that was cut
    (tmp_path / "out/toy-amc-none-seed3").mkdir()
    (tmp_path / "out/toy-amc-none-seed3/done.json").write_text('{"winoground/text": 7.0}')
    assert without("--loss amc --seed 3") == {"without_loss/winoground/text": 7.0}
    (folder / "done.json").write_text('{"winoground/gro')
    assert without("--loss cacr --seed 3") == {}
    known = json.loads((ROOT / "tests/results.json").read_text())["claims"]["first none"]["0"]
    assert without("--loss cacr")["without_loss/winoground/group"] == known["winoground/group"]


def test_layers_to_align_are_those_there_are(toy_tree):
    assert parse(argv("--loss cacr --align-layer -4")).align_layer == -4
    with pytest.raises(UserError, match="-4 .first. to -1"):
        parse(argv("--loss cacr --align-layer -5"))


@pytest.mark.parametrize("task", ["mlm", "itm", "mrfr", "mrc", "mrckl"])
def test_training_lowers_the_loss(toy_tree, task, tmp_path, monkeypatch):
    """Twenty updates on one batch: a sign error or a cut gradient would show."""
    monkeypatch.chdir(tmp_path)
    cfg = make_config(
        "toy-pretrain",
        data=str(toy_tree),
        pretrain=task,
        steps=20,
        warmup=1,
        lr=1e-4 if task == "itm" else 1e-3,
        batch_tokens=512,
        precision="fp32",
    )
    runtime, tokenizer = train.setup_runtime(cfg), train.load_tokenizer(cfg)
    loaded = train.load_streams(cfg, runtime, prepared_run(cfg, tokenizer))
    model, streams = train.build_model(cfg, runtime, tokenizer, loaded), loaded.train
    optimizer, batch = train.build_optimizer(cfg, model), streams[0][0]
    values = [
        train.train_step(cfg, runtime, model, optimizer, streams, 1, [batch])[0][task].item()
        for _ in range(40)
    ]
    assert values[-1] < 0.9 * values[0], values


def test_resume_is_bit_for_bit(toy_tree, pretrained, tmp_path):
    """6 steps = 3, kill -9 while the fourth or a later one runs, resume."""
    args = toy_run(
        toy_tree, pretrained, "--loss", "cacr", "--steps", 6, "--save-every", 3, "--dropout", 0.1
    )
    run(tmp_path, *args, "--out", "whole")
    run_and_kill(tmp_path, args, "cut")
    run(tmp_path, *args, "--out", "cut", "--resume")
    same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    strip = lambda p: [
        {k: v for k, v in json.loads(l).items() if k not in ("pairs_per_s", "seconds_left")}
        for l in (p / "log.jsonl").read_text().splitlines()
    ]
    assert strip(tmp_path / "whole")[-1] == strip(tmp_path / "cut")[-1]
    finished = run(tmp_path, *args, "--out", "cut", "--resume")
    assert "winoground/group" in last_line(finished)


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed(toy_tree, tmp_path):
    """The first run of a recipe makes its pre-training too; kill -9 hits either, anywhere.
    NANOALIGN_KILLS=20 kills twenty times.
    """
    kills, rng = (
        int(os.environ.get("NANOALIGN_KILLS", 2)),
        np.random.default_rng(int(os.environ.get("NANOALIGN_KILL_SEED", 0))),
    )
    code = (
        f"import train; train.RECIPES['toy-pretrain'].update(steps={30 * kills}, warmup=5, "
        "batch_tokens=512, save_every=4, eval_every=30)\n"
        f"train.RECIPES['toy'].update(steps={20 * kills}, warmup=5, batch_tokens=256, "
        "save_every=3, eval_every=20, dropout=0.1)\ntrain.main()"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "--loss",
        "cacr+wra",
        "--data",
        str(toy_tree),
        "--resume",
        *QUICK,
    ]
    (tmp_path / "whole").mkdir(), (tmp_path / "cut").mkdir()
    start = lambda folder: subprocess.Popen(
        command,
        cwd=tmp_path / folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    began, process = time.time(), start("whole")
    while not list((tmp_path / "whole").glob("out/*/log.jsonl")) and process.poll() is None:
        time.sleep(0.01)
    ready = time.time() - began  # imports, data and model
    assert process.wait() == 0
    share = (time.time() - began - ready) / (kills + 1)
    for kill in range(kills):
        process = start("cut")
        # it may not finish before the last kill
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=max(0.1, ready + share * rng.uniform(-0.5, 1.9)))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start("cut").wait() == 0
    runs = [p.parent for p in (tmp_path / "whole/out").glob("*/last.pt")]
    assert len(runs) == 2
    for whole in runs:
        same(weights(whole), weights(tmp_path / "cut/out" / whole.name))


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("rank", "few", "vcr", "nlvr2")]


@pytest.mark.parametrize("kind", ["pretrain", *SLOW])
def test_any_number_of_processes_has_the_same_batches(toy_tree, pretrained, tmp_path, kind):
    """One process with the whole batch, one that takes two GPUs' parts in turn, and two."""
    args = toy_run(toy_tree, pretrained, "--loss", "cacr+wra", "--steps", 6, "--dropout", 0)
    if kind == "pretrain":
        args = [
            "--recipe toy-pretrain",
            "--data",
            toy_tree,
            "--pretrain mlm+itm+mrfr+mrckl+wra --loss cacr --steps 12 --warmup 2",
            *QUICK,
        ]
    if kind in ("vcr", "nlvr2"):  # several rows an example
        args = [
            "--task",
            kind,
            "--data",
            toy_tree,
            "--init",
            pretrained[0],
            "--steps 6 --warmup 2",
            *QUICK,
        ]
    # few: one group at a time, so the second process has nothing to do
    tokens = 30 if kind == "few" else 256
    run(tmp_path, *args, "--batch-tokens", 2 * tokens, "--out", "one")
    args += ["--batch-tokens", tokens, "--gpus", 2]
    run(tmp_path, *args, "--out", "parts")
    run(tmp_path, *args, "--out", "two", processes=2)
    for name in ("parts", "two"):
        same(weights(tmp_path / "one"), weights(tmp_path / name), rtol=0, atol=1e-5)


def test_schedules_are_the_authors():
    folder = os.environ.get("GOLDEN_DIR", ROOT / "tests/golden")
    z = np.load(f"{folder}/schedules.npz")
    p = json.loads(str(z["uniter_lr/params"]))
    ours = [
        lr_at(int(s), p["learning_rate"], p["warmup_steps"], p["num_train_steps"])
        for s in z["steps"]
    ]
    np.testing.assert_allclose(ours, z["uniter_lr/get_lr_sched"], rtol=1e-9)
    q = json.loads(str(z["uniter_lr/params"]))
    np.testing.assert_allclose(
        [max(lr_at(int(s), 1.0, q["warmup_steps"], q["num_train_steps"]), 0) for s in z["steps"]],
        np.maximum(z["uniter_lr/warmup_linear_factor"], 1e-8),
        rtol=1e-9,
    )
    q = json.loads(str(z["lxmert_lr/params"]))  # the same ramp, counted from 0
    for ours, theirs in (("linear-from-0", "warmup_linear"), ("constant", "warmup_constant")):
        ramp = [
            lr_at(
                int(s) + (ours != "constant"),
                q["lr"],
                q["warmup"] * q["t_total"],
                q["t_total"],
                ours,
            )
            for s in z["steps"]
        ]
        np.testing.assert_allclose(
            ramp, np.maximum(z[f"lxmert_lr/{theirs}"], 0 if ours != "constant" else 1e-8), rtol=1e-9
        )
    halved = [lr_at(int(s) + 1, q["lr"] / 2, 0, q["t_total"], "linear-from-0") for s in z["steps"]]
    # "no warm-up" there halves the rate
    np.testing.assert_allclose(halved, z["lxmert_lr/warmup_linear_warmup_minus1"], rtol=1e-9)
    w = json.loads(str(z["noam/params"]))["warmup_step"]
    np.testing.assert_allclose(
        [lr_at(int(s), 1.0, w, 1000, "noam") for s in z["steps"]],
        np.maximum(z["noam/factor"], 1e-8),
        rtol=1e-9,
    )
    v = json.loads(str(z["vqa/params"]))
    ours = [
        lr_at(
            int(s),
            1.0,
            3 * v["warmup_interval"],
            1000,
            "steps",
            (v["decay_start"], v["decay_interval"], v["decay_rate"]),
        )
        for s in z["steps"]
    ]
    np.testing.assert_allclose(ours, np.maximum(z["vqa/factor"], 1e-8), rtol=1e-9)
    T = json.loads(str(z["iais_tsa/params"]))["num_train_steps"]
    for how in ("exp", "linear", "log"):
        # float32 there: 1 - exp(...)
        np.testing.assert_allclose(
            [alignment_weight(int(s), T, how) for s in z["steps"]],
            z[f"iais_tsa/{how}_schedule"],
            rtol=1e-6,
            atol=6e-8,
        )


def test_adamw_is_torchs_and_differs_from_the_authors_only_as_told():
    """UNITER's AdamW adds eps before the bias correction and decays after the update; without
    both they agree.
    """
    folder = os.environ.get("GOLDEN_DIR", ROOT / "tests/golden")
    z = np.load(f"{folder}/schedules.npz")
    p, A, b = json.loads(str(z["opt/params"])), torch.tensor(z["opt/A"]), torch.tensor(z["opt/b"])
    w = torch.nn.Parameter(torch.tensor(z["opt/w0"])[None])
    module = torch.nn.Module()
    module.w = w
    cfg = make_config(
        "toy", lr=p["lr"], beta2=p["betas"][1], eps=p["eps"], weight_decay=p["weight_decay"]
    )
    optimizer, path = train.build_optimizer(cfg, module), [w.detach()[0].numpy().copy()]
    for _ in range(len(z["opt/torch_adamw_same_settings"]) - 1):
        optimizer.zero_grad()
        (0.5 * w @ A @ w.mT - w @ b).sum().backward()
        optimizer.step()
        path.append(w.detach()[0].numpy().copy())
    np.testing.assert_allclose(path, z["opt/torch_adamw_same_settings"], rtol=1e-9)
    assert 1e-5 < np.abs(np.array(path) - z["opt/uniter_adamw"]).max() < 1e-3


@pytest.mark.parametrize("scheduled", [True, False])
def test_bertadam_is_the_authors(scheduled):
    folder = os.environ.get("GOLDEN_DIR", ROOT / "tests/golden")
    z = np.load(f"{folder}/schedules.npz")
    p, A, b = (
        json.loads(str(z["opt/bertadam_params"])),
        torch.tensor(z["opt/A"]),
        torch.tensor(z["opt/b"]),
    )
    wanted, module = (
        z["opt/bertadam_scheduled" if scheduled else "opt/bertadam_constant_lr"],
        torch.nn.Module(),
    )
    # a vector: LXMERT decays those too
    module.w = torch.nn.Parameter(torch.tensor(z["opt/w0"]))
    cfg = make_config(
        "toy",
        lr=p["lr"],
        beta2=p["b2"],
        eps=p["e"],
        weight_decay=p["weight_decay"],
        optimizer="bertadam",
    )
    optimizer, path = train.build_optimizer(cfg, module), [module.w.detach().numpy().copy()]
    for step in range(1, len(wanted)):
        optimizer.zero_grad()
        (0.5 * module.w @ A @ module.w - module.w @ b).backward()
        for group in optimizer.param_groups:
            group["lr"] = (
                lr_at(step, p["lr"], p["warmup"] * p["t_total"], p["t_total"], "linear-from-0")
                if scheduled
                else p["lr"]
            )
        optimizer.step()
        path.append(module.w.detach().numpy().copy())
    np.testing.assert_allclose(path, wanted, rtol=1e-9)


@pytest.mark.parametrize("decay", [True, False])
def test_the_two_differences_make_the_authors_adamw(decay):
    """torch's Adam with eps * sqrt(1 - beta2^t), then w *= 1 - lr * decay, is UNITER's trajectory
    to the last digits.
    """
    folder = os.environ.get("GOLDEN_DIR", ROOT / "tests/golden")
    z = np.load(f"{folder}/schedules.npz")
    p, A, b = json.loads(str(z["opt/params"])), torch.tensor(z["opt/A"]), torch.tensor(z["opt/b"])
    w, wanted = (
        torch.nn.Parameter(torch.tensor(z["opt/w0"])),
        z["opt/uniter_adamw" if decay else "opt/uniter_adamw_nodecay"],
    )
    optimizer, path = (
        torch.optim.Adam([w], lr=p["lr"], betas=p["betas"], eps=p["eps"]),
        [w.detach().numpy().copy()],
    )
    for step in range(1, len(wanted)):
        optimizer.zero_grad()
        (0.5 * w @ A @ w - w @ b).backward()
        optimizer.param_groups[0]["eps"] = p["eps"] / (1 - p["betas"][1] ** step) ** 0.5
        optimizer.step()
        with torch.no_grad():
            w *= 1 - p["lr"] * p["weight_decay"] * decay
        path.append(w.detach().numpy().copy())
    np.testing.assert_allclose(path, wanted, rtol=1e-9)


def test_accumulation_is_the_larger_batch_in_pieces(toy_tree, tmp_path, monkeypatch):
    """The gradient of two batches accumulated is the gradient of a mean over both."""
    monkeypatch.chdir(tmp_path)
    cfg = make_config(
        "toy-pretrain",
        data=str(toy_tree),
        pretrain="mlm",
        batch_tokens=256,
        steps=2,
        warmup=1,
        precision="fp32",
        clip=0,
    )
    runtime, tokenizer = train.setup_runtime(cfg), train.load_tokenizer(cfg)
    loaded = train.load_streams(cfg, runtime, prepared_run(cfg, tokenizer))
    model, streams = train.build_model(cfg, runtime, tokenizer, loaded), loaded.train
    batches, grads = [streams[0][0], streams[0][1]], []
    for some in (batches, batches[:1], batches[1:]):
        seen = {}
        keep = lambda m: seen.update(
            {n: q.grad.clone() for n, q in m.named_parameters() if q.grad is not None}
        )

        class Peek(torch.optim.SGD):
            def step(self):
                keep(model)

        train.train_step(cfg, runtime, model, Peek(model.parameters(), lr=0.0), streams, 1, some)
        grads.append(seen)
    n = [b["counts"][""] for b in batches]
    for name in grads[0]:
        torch.testing.assert_close(
            grads[0][name],
            (n[0] * grads[1][name] + n[1] * grads[2][name]) / sum(n),
            atol=1e-6,
            rtol=1e-4,
        )


# --------------------------------------------------------------------------------------- settings


def test_recipe_then_typed_settings():
    cfg = parse(["--loss", "cacr+wra", "--lr", "1e-3"])
    assert (cfg.recipe, cfg.size, cfg.lr, cfg.loss) == ("toy", "toy", 1e-3, "cacr+wra")
    paper = parse(["--recipe", "flickr30k", "--data", "/full"])
    assert (
        paper.lr,
        paper.negatives,
        paper.candidates,
        paper.alternate,
        paper.size,
        paper.init,
    ) == (5e-5, 31, 399, True, "base", "/full/checkpoints/uniter-base.pt")
    assert parse(["--task", "vqa"]).recipe == "toy-vqa" and parse(["--recipe", "vqa"]).task == "vqa"
    for recipe in train.RECIPES:
        make_config(recipe)
    assert parse(["--no-alternate"]).alternate is False
    assert set().union(*train.RECIPES.values()) <= {
        f.name for f in train.dataclasses.fields(train.Config)
    }


@pytest.mark.parametrize(
    "argv, match",
    [
        (["--loss", "carc"], "did you mean cacr"),
        (["--loss", "cacr+war"], "did you mean wra"),
        (["--cacr-wieght", "2"], "is not an option"),
        (["--recipe", "flicker30k"], "did you mean flickr30k"),
        (["--align-wieght", "2"], "did you mean --align-weight"),
        (["--steps", "0"], "at least 1"),
        (["--pretrain", "mlm+imt"], "did you mean itm"),
        (["--negatives", "9", "--candidates", "3"], "cannot hold"),
        (["--seed", "-1"], "--seed -1: wanted 0 or more"),
        (["--dropout", "1"], "--dropout 1.0: wanted"),
        (["--lr", "nan"], "--lr nan: wanted"),
        (["--beta2", "1"], "--beta2 1.0: wanted 0 to below 1"),
        (["--eps", "-1"], "--eps -1.0: wanted more than 0"),
        (["--max-words", "-3"], "--max-words -3: wanted at least 1"),
        (["--align-weight", "nan"], "--align-weight nan: wanted 0 or more"),
    ],
)
def test_wrong_settings_are_answered(argv, match):
    with pytest.raises(UserError, match=match):
        parse(argv)


def test_help_teaches():
    text = subprocess.run(
        [sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    for f in train.dataclasses.fields(train.Config):
        assert f"--{f.name.replace('_', '-')}" in text
    assert (
        text.count("default:") == len(train.dataclasses.fields(train.Config))
        and "flickr30k" in text
    )


# -------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    "argv, match",
    [
        (["--loss", "carc"], "did you mean cacr"),
        (["--data", "nowhere"], "is missing"),
        (["--init", "nothing.pt"], "is not there"),
    ],
)
def test_errors_are_one_message(toy_tree, tmp_path, argv, match):
    done = run(
        tmp_path,
        *(argv if "--data" in argv else ["--data", toy_tree, *argv]),
        "--init",
        *(["x"] if "--init" not in argv else argv[argv.index("--init") + 1 :]),
        expect=1,
    )
    assert match in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("workers", [0, 1])
def test_nan_in_the_features_met_while_training(toy_tree, pretrained, tmp_path, workers):
    tree = shutil.copytree(toy_tree, tmp_path / "toy")
    features = np.lib.format.open_memmap(tree / "regions/coco/features.npy", mode="r+")
    features[:] = np.nan
    features.flush()
    done = run(
        tmp_path,
        "--recipe toy",
        "--data",
        tree,
        "--init",
        pretrained[0],
        "--steps 2 --warmup 1",
        "--workers",
        workers,
        expect=1,
    )
    assert (
        "holds nan or inf in the features of image" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_missing_data_are_met_before_the_run_before(toy_tree, tmp_path, monkeypatch):
    # else hours of pre-training come before the message
    def run_loop(*_):
        raise RuntimeError("trained")

    monkeypatch.setattr(train, "run_loop", run_loop)
    tree = tmp_path / "tree"
    shutil.copytree(toy_tree, tree, ignore=shutil.ignore_patterns("nlvr*", "pictures", "index"))
    for task in ("nlvr", "nlvr2"):
        done = run(tmp_path, f"--task {task}", "--data", tree, *QUICK, expect=1)
        assert f"{tree}/" in done.stderr and task in done.stderr, done.stderr
        assert "trained" not in done.stderr and not list((tmp_path / "out").glob("toy-pretrain*"))
    done = run(tmp_path, "--loss none", "--data", toy_tree, *QUICK, expect=1)
    assert "trained" in done.stderr and list((tmp_path / "out").glob("toy-short*/"))


def test_validation_ends_where_nothing_counts(monkeypatch):
    # patches in which the detector shows nothing
    hits = {"mlm": torch.tensor([True, False] * 5), "itm": torch.zeros(0, dtype=torch.bool)}
    for task in hits:
        monkeypatch.setitem(train.OBJECTIVES, task, (None, lambda *_, task=task: hits[task]))
    streams = {task: [{"task": task}] * 20 for task in hits}
    monkeypatch.setattr(train, "prepare_batch", lambda cfg, runtime, batch: batch)
    runtime = SimpleNamespace(autocast=contextlib.nullcontext)
    model = SimpleNamespace(eval=lambda: None, train=lambda: None)
    found = train.validate(SimpleNamespace(task="pretrain"), runtime, model, streams, samples=20)
    assert found == {"val/mlm": 50, "val/itm": 0}


def test_out_of_another_configuration_is_refused_and_kept(toy_tree, pretrained, tmp_path):
    args = toy_run(toy_tree, pretrained, "--steps", 2, "--out", "run")
    run(tmp_path, *args)
    before = (tmp_path / "run/last.pt").read_bytes()
    again = run(tmp_path, *args, expect=1)
    assert "holds this run already, finished" in again.stderr and "--resume" in again.stderr
    other = run(tmp_path, *args, "--lr", "1e-3", "--resume", expect=1)
    assert "--lr 0.0003 there, 0.001 here" in other.stderr and "Traceback" not in other.stderr
    assert (tmp_path / "run/last.pt").read_bytes() == before


def test_checkpoint_of_another_size(toy_tree, pretrained, tmp_path):
    done = run(tmp_path, *toy_run(toy_tree, pretrained, "--size", "base", "--steps", 2), expect=1)
    assert (
        "does not fit" in done.stderr and "--size" in done.stderr and "Traceback" not in done.stderr
    )


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(
    toy_tree, pretrained, tmp_path, monkeypatch, poison
):
    monkeypatch.chdir(tmp_path)
    args = toy_run(toy_tree, pretrained, "--loss cacr --steps 6 --save-every 2 --out run")
    cfg = parse(argv(*args))
    calls, real = [0], train.losses.ranking

    def ranking(scores, margin):
        calls[0] += 1
        if calls[0] < 5:
            return real(scores, margin)
        return (
            real(scores, margin) * float("nan")
            if poison == "loss"
            else real(scores, margin) + (scores.sum() * 0).sqrt()
        )

    monkeypatch.setattr(train.losses, "ranking", ranking)
    with pytest.raises(train.NonFinite, match="step 5") as error:
        train.train(cfg, train.setup_runtime(cfg))
    assert "caption" in str(error.value) and "image" in str(error.value)
    saved = read_checkpoint(tmp_path / "run/last.pt")
    assert saved.step == 4 and all(torch.isfinite(v).all() for v in saved.model.values())


def test_full_disk_keeps_the_old_checkpoint(toy_tree, pretrained, tmp_path):
    """A limit on file size stands for the full disk: the write fails half way."""
    args = toy_run(toy_tree, pretrained, "--steps", 4, "--save-every", 2, "--out", "run")
    code = (
        "import sys, resource, signal; sys.argv = sys.argv[1:]; import train; real = "
        "train.save_checkpoint; calls = []\n"
        "def save(*a):\n    calls.append(1)\n    if len(calls) == 2:\n"
        "        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "    real(*a)\ntrain.save_checkpoint = save\ntrain.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train.py", *argv(*args)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert (
        done.returncode == 1
        and "could not be saved at step 4" in done.stderr
        and "still whole" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert read_checkpoint(tmp_path / "run/last.pt").step == 2 and not list(
        (tmp_path / "run").glob("*.tmp")
    )


def test_broken_checkpoint_in_out(toy_tree, pretrained, tmp_path):
    args = toy_run(toy_tree, pretrained, "--steps", 2, "--out", "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/last.pt").write_bytes(pretrained[0].read_bytes()[:5000])
    done = run(tmp_path, *args, "--resume", expect=1)
    assert "cannot be read" in done.stderr and "Traceback" not in done.stderr


def test_alignment_of_a_batch_is_a_mean_over_all_of_its_pairs(toy_tree):
    """The sum over its matched pairs by the number of all: parts of a batch then add up to it."""
    argv = ["--recipe", "toy-pretrain", "--pretrain", "itm", "--loss", "cacr+wra", "--init", "none"]
    cfg = train.parse([*argv, "--data", str(toy_tree), "--batch-tokens", "512", *QUICK])
    runtime, tokenizer = train.setup_runtime(cfg), train.load_tokenizer(cfg)
    streams = train.load_streams(cfg, runtime, prepared_run(cfg, tokenizer))
    model = train.build_model(cfg, runtime, tokenizer, streams).eval()
    batch = streams.train[0][0]
    terms = train.objective_itm(cfg, model, batch)
    out = model(**batch["input"], maps=(-1,))
    masks = {name: batch["input"][name] for name in ("text_mask", "region_mask")}
    total = {"cacr": 0.0, "wra": 0.0}
    for b in batch["match"].nonzero()[:, 0].tolist():
        one = out._replace(
            words=out.words[b : b + 1],
            regions=out.regions[b : b + 1],
            maps=tuple(type(m)(*(S[b : b + 1] for S in m)) for m in out.maps),
        )
        alone = train.alignment(cfg, one, {k: v[b : b + 1] for k, v in masks.items()})
        for name, value in alone.items():
            total[name] += value.item()
    assert 0 < batch["match"].sum() < len(batch["match"])
    for name, value in total.items():
        assert terms[name].item() == pytest.approx(value / len(batch["match"]), rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_evaluate_says_what_train_said(toy_tree, pretrained, tmp_path, monkeypatch, precision):
    """One way of judging: in the precision of the training."""
    judged, judge = [], evaluate.choose
    monkeypatch.setattr(evaluate, "choose", lambda *a: (judged.append(a[0]), judge(*a))[1])
    args = [*toy_run(toy_tree, pretrained, "--steps", 3), "--precision", precision, "--out", "o"]
    said = last_line(run(tmp_path, *args))
    again = ["--task winoground --ckpt o/last.pt --data", toy_tree]
    again = last_line(inside(tmp_path, again, main=evaluate.main))
    assert again == {name: said[name] for name in again}
    halves = [run.autocast is not contextlib.nullcontext for run in judged]
    assert halves == [precision == "bf16"] * 2


def test_processes_need_a_common_folder(toy_tree, pretrained, tmp_path, monkeypatch):
    """A second machine that does not see what the first one has put into --out."""
    monkeypatch.setattr(train, "all_gather_objects", lambda found: [found, False])
    done = run(tmp_path, *toy_run(toy_tree, pretrained), "--out", "o", expect=1)
    assert "not one folder for all" in done.stderr and "share" in done.stderr
