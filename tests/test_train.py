"""The loop as a user meets it: runs, resumes, several processes, settings, and what goes wrong."""

import contextlib
import json
import os
import resource
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
from conftest import QUICK, ROOT, argv, copied, inside, last_line, prepare, run, run_and_kill, same
from conftest import weights
from model import read_checkpoint
from train import UserError, alignment_weight, lr_at, make_config, parse


def toy_run(toy_tree, pretrained, *more):
    how = "--warmup 2 --batch-tokens 256 --candidates 6"
    return ["--recipe toy --data", toy_tree, "--init", pretrained[0], how, *QUICK, *more]


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_pretraining_runs_every_task(pretrained):
    checkpoint, done = pretrained
    wanted = {f"val/coco/{task}" for task in ("mlm", "itm", "mrc", "mrckl", "mrfr")}
    wanted |= {f"winoground/{side}" for side in ("text", "image", "group")}
    assert wanted <= set(last_line(done))
    assert {"mlm", "itm"} & set().union(*log_of(checkpoint.parent))
    assert (checkpoint.parent / "figures/curve.png").exists()


# the others: test_align.py, test_pixels.py
@pytest.mark.parametrize(
    "loss",
    [*(name for name, row in train.LOSSES.items() if row.recipe == "toy"), "cacr+wra", "none"],
)
def test_eight_steps_of_every_loss(toy_tree, pretrained, tmp_path, loss, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = parse(argv(*toy_run(toy_tree, pretrained, "--loss", loss, "--steps 8 --log-every 1")))
    numbers = train.train(cfg, train.setup_runtime(cfg))
    for name in cfg.losses:
        values = [line[name] for line in log_of(tmp_path / cfg.out) if name in line]
        assert len(values) == 8 and all(np.isfinite(values)) and any(v != 0 for v in values)
    assert 0 <= numbers["winoground/group"] <= 100
    assert (tmp_path / cfg.out / "figures/winoground_0_0.png").exists()


def one_step(toy_tree, step, *more):
    """An update of the toy experiment: (losses, norm of the gradient), and what it was made with"""
    how = "--recipe toy --init none --candidates 0 --batch-tokens 256 --steps 100 --precision fp32"
    made = prepare(how, "--data", toy_tree, *more)
    how = made.cfg, made.runtime, made.model, made.optimizers, step, [made.batch]
    return train.train_step(*how), made


def test_the_weight_schedule_reaches_the_loss(toy_tree):
    """The norm of the update's gradient holds the alignment loss times exp(5 (t/T - 1)): the same
    gradient as with the schedule's value typed as a constant weight, and another at another step.
    """
    norms, cfg = {}, SimpleNamespace(steps=100, align_schedule="exp")
    typed = f"--align-weight {2 * alignment_weight(cfg, 60)} --align-schedule constant"
    for name, step, more in (
        ("exp", 60, "--align-weight 2"),
        ("typed", 60, typed),
        ("late", 100, "--align-weight 2"),
    ):
        (_, norms[name]), _ = one_step(toy_tree, step, "--loss iais", more)
    assert norms["exp"].item() == pytest.approx(norms["typed"].item(), rel=1e-5)
    assert norms["late"].item() != pytest.approx(norms["exp"].item(), rel=1e-2)


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
        rows = {loss: train.LOSSES[loss]}
        cfg, out = SimpleNamespace(losses=rows, model="uniter"), SimpleNamespace(maps=[maps])
        value = train.alignment(cfg, out, {"text_mask": mask, "region_mask": mask})[loss]
        grads = torch.autograd.grad(train.LOSSES[loss].weight * value, maps, allow_unused=True)
        return torch.stack([grad.norm() for grad in grads if grad is not None]).norm()

    assert 0.03 < gradient(loss) < 6 and gradient("cacr-probs") < 0.02


def test_shares_of_the_gradient(toy_tree):
    """Each part's norm, by a backward pass of its own, over the sum of both; nothing else moves."""
    logged, after = {}, {}
    for more in ((), ("--log-shares --log-every 1",)):
        (logged[more], _), made = one_step(toy_tree, 50, "--loss iais", *more)
        after[more] = {k: v.clone() for k, v in made.model.state_dict().items()}
    same(*after.values())
    shares = {k: v.item() for k, v in logged[more].items() if k.startswith("share/")}
    assert set(shares) == {"share/rank", "share/iais"} and sum(shares.values()) == pytest.approx(1)
    norms, cfg = {}, made.cfg
    late = alignment_weight(cfg, 50) * cfg.align_weight * train.LOSSES["iais"].weight
    model = prepare("--recipe toy --init none --candidates 0 --data", toy_tree).model
    for name in ("rank", "iais"):
        torch.manual_seed((cfg.seed * 1_000_003 + 50) * 1009)
        model.zero_grad()
        terms, _ = train.objective_rank(cfg, model, made.batch)
        (terms[name] * (1 if name == "rank" else late)).backward()
        norms[name] = torch.nn.utils.get_total_norm(
            [p.grad for p in model.parameters() if p.grad is not None]
        )
    assert shares["share/iais"] == pytest.approx((norms["iais"] / sum(norms.values())).item())


def test_scores_are_tracked_from_the_start_on(toy_tree, pretrained, tmp_path):
    args = toy_run(toy_tree, pretrained, "--loss none --steps 4 --eval-every 2 --track --out o")
    numbers = last_line(run(tmp_path, *args))
    scored = {line["step"]: line for line in log_of(tmp_path / "o") if "winoground/group" in line}
    assert list(scored) == [0, 2, 4]
    assert scored[4]["winoground/group"] == pytest.approx(numbers["winoground/group"], abs=0.01)


def test_no_update_evaluates_the_weights_it_begins_from(toy_tree, pretrained, tmp_path):
    """--init X --steps 0: the checkpoint is written as it came, and its numbers are printed."""
    args = ["--recipe toy --data", toy_tree, "--init", pretrained[0], "--steps 0 --out o", *QUICK]
    numbers = last_line(run(tmp_path, *args))
    before, after = weights(pretrained[0].parent), weights(tmp_path / "o")
    same({k: v for k, v in before.items() if k in after}, after)
    again = ["--task winoground --ckpt o/last.pt --data", toy_tree]
    again = last_line(inside(tmp_path, again, main=evaluate.main))
    assert again and again == {name: numbers[name] for name in again}


OTHERS = [pytest.param(task, marks=pytest.mark.slow) for task in ("mrfr", "mrc")]


@pytest.mark.parametrize("task", ["mlm", "itm", "mrckl", *OTHERS])
def test_training_lowers_the_loss(toy_tree, task):
    """Twenty updates on one batch: a sign error or a cut gradient would show."""
    how = f"--recipe toy-pretrain --pretrain {task} --steps 20 --warmup 1 --batch-tokens 512"
    rate = "--precision fp32 --lr " + ("1e-4" if task == "itm" else "1e-3")
    made = prepare(how, rate, "--data", toy_tree)
    how = made.cfg, made.runtime, made.model, made.optimizers, 1, [made.batch]
    values = [train.train_step(*how)[0][task].item() for _ in range(20)]
    assert values[-1] < 0.9 * values[0], values


def test_dropout_is_of_seed_step_and_process(monkeypatch):
    """Drawn anew in each, and the same again after a resume."""
    drawn, model = [], torch.nn.Linear(2, 1)

    def objective(cfg, model, batch):
        drawn.append(torch.rand(()).item())
        return {"itm": model.weight.sum()}, None

    monkeypatch.setitem(train.OBJECTIVES, "itm", objective)
    for seed, step, rank in ((0, 1, 0), (0, 2, 0), (0, 1, 1), (1, 1, 0), (0, 1, 0)):
        cfg = train.Config(seed=seed)
        runtime = train.Runtime(torch.device("cpu"), rank, 1, contextlib.nullcontext)
        batch = {"task": "itm", "names": ["a pair"]}
        train.train_step(cfg, runtime, model, train.build_optimizers(cfg, model), step, [batch])
    assert len({*drawn}) == 4 and drawn[0] == drawn[4]


def test_resume_is_bit_for_bit(toy_tree, pretrained, tmp_path):
    """6 steps = 3, kill -9 while the fourth or a later one runs, resume; of both optimisers."""
    how = "--loss cacr --optimizer muon --steps 6 --save-every 3 --dropout 0.1"
    args = toy_run(toy_tree, pretrained, how)
    run(tmp_path, *args, "--out whole")
    run_and_kill(tmp_path, args, "cut")
    run(tmp_path, *args, "--out cut --resume")
    same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    last = [log_of(tmp_path / name)[-2:] for name in ("whole", "cut")]
    assert [[line.keys() for line in lines] for lines in last][0] and last[0][1] == last[1][1]
    assert [lines[0].pop("seconds_left") for lines in last] and last[0] == last[1]
    finished = run(tmp_path, *args, "--out cut --resume")
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
        f"import train; train.RECIPES['toy-short'].update(steps={30 * kills}, warmup=5, "
        "batch_tokens=512, save_every=4, eval_every=30)\n"
        f"train.RECIPES['toy'].update(steps={20 * kills}, warmup=5, batch_tokens=256, "
        "save_every=3, eval_every=20, dropout=0.1)\ntrain.main()"
    )
    more = ["--loss", "cacr+wra", "--data", str(toy_tree), "--resume", *QUICK]
    command = [sys.executable, "-c", code, *more]
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
    num_kills = 0
    for kill in range(kills):
        process = start("cut")
        try:
            process.wait(timeout=max(0.1, ready + share * rng.uniform(-0.5, 1.9)))
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            num_kills += 1
    # on a machine that gets faster meanwhile it may finish before the last kill
    assert num_kills > kills / 2
    assert start("cut").wait() == 0
    runs = [p.parent for p in (tmp_path / "whole/out").glob("*/last.pt")]
    assert len(runs) == 2
    for whole in runs:
        same(weights(whole), weights(tmp_path / "cut/out" / whole.name))


SLOW = ("pretrain, four", "rank", "few", "vcr", "nlvr2")
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW]


@pytest.mark.parametrize("kind", ["pretrain", *SLOW])
def test_any_number_of_processes_has_the_same_batches(toy_tree, pretrained, tmp_path, kind):
    """Four batches an update: one process that takes them in turn, two, and four."""
    args = toy_run(toy_tree, pretrained, "--loss cacr+wra --steps 6 --dropout 0")
    if kind.startswith("pretrain"):
        how = "--pretrain mlm+itm+mrfr+mrckl+wra --loss cacr --steps 6 --warmup 2"
        args = ["--recipe toy-pretrain --data", toy_tree, how, *QUICK]
    if kind in ("vcr", "nlvr2"):  # several rows an example
        args = [f"--task {kind} --data", toy_tree, "--init", pretrained[0], "--steps 6 --warmup 2"]
        args += QUICK
    # few: one group at a time
    tokens = 30 if kind == "few" else 256
    args += [f"--batch-tokens {tokens} --gpus 2 --accumulate 2"]
    for n in (1, 4 if "four" in kind else 2):
        run(tmp_path, *args, "--out", n, processes=n)
        same(weights(tmp_path / "1"), weights(tmp_path / str(n)), rtol=0, atol=1e-5)


def golden(name):
    folder = os.environ.get("GOLDEN_DIR", ROOT / "tests/golden")
    return np.load(f"{folder}/{name}.npz")


def test_schedules_are_the_authors():
    z = golden("schedules")
    p = json.loads(str(z["uniter_lr/params"]))
    cfg = SimpleNamespace(lr=p["learning_rate"], warmup=p["warmup_steps"], schedule="linear")
    cfg.steps = p["num_train_steps"]
    ours = [lr_at(cfg, int(step)) for step in z["steps"]]
    np.testing.assert_allclose(ours, z["uniter_lr/get_lr_sched"], rtol=1e-9)
    cfg.lr = 1.0
    wanted = np.maximum(z["uniter_lr/warmup_linear_factor"], 1e-8)
    np.testing.assert_allclose([lr_at(cfg, int(step)) for step in z["steps"]], wanted, rtol=1e-9)
    q = json.loads(str(z["lxmert_lr/params"]))
    cfg = SimpleNamespace(lr=q["lr"], steps=q["t_total"], schedule="constant")
    cfg.warmup = q["warmup"] * q["t_total"]
    wanted = np.maximum(z["lxmert_lr/warmup_constant"], 1e-8)
    np.testing.assert_allclose([lr_at(cfg, int(step)) for step in z["steps"]], wanted, rtol=1e-9)
    cfg.steps, cfg.align_schedule = json.loads(str(z["iais_tsa/params"]))["num_train_steps"], "exp"
    ours = [alignment_weight(cfg, int(step)) for step in z["steps"]]
    # float32 there
    np.testing.assert_allclose(ours, z["iais_tsa/exp_schedule"], rtol=1e-6, atol=6e-8)


def follow(w, steps, update):
    """[w before and after each update] of the golden quadratic"""
    z = golden("schedules")
    A, b, path = torch.tensor(z["opt/A"]), torch.tensor(z["opt/b"]), [w.detach().numpy().copy()]
    for step in range(1, steps):
        w.grad = None
        v = w.view(1, -1)
        (0.5 * v @ A @ v.mT - v @ b).sum().backward()
        update(step)
        path.append(w.detach().numpy().copy())
    return np.array(path).reshape(steps, -1)


def test_matrices_decay_biases_and_norms_do_not():
    """And a task's fresh head learns at its own rate."""
    model = torch.nn.ModuleDict({"body": torch.nn.Linear(3, 2), "norm": torch.nn.LayerNorm(2)})
    model["task_head"] = torch.nn.Linear(2, 1)
    names = {p: name for name, p in model.named_parameters()}
    (optimizer,) = train.build_optimizers(train.Config(weight_decay=0.03, head_lr=10.0), model)
    found = {
        names[p]: (group["scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    plain = dict.fromkeys(("body.bias", "norm.weight", "norm.bias"), (1, 0))
    heads = {"task_head.weight": (10, 0.03), "task_head.bias": (10, 0)}
    assert found == plain | heads | {"body.weight": (1, 0.03)}


@pytest.mark.parametrize("recipe", ["toy-pretrain", "toy-align", "toy-albef"])
def test_muon_moves_the_matrices_of_layers_and_adamw_the_rest(recipe, toy_tree):
    """Each parameter once; Muon's step is near an orthogonal matrix, however small the gradient."""
    how = "--optimizer muon --steps 2 --warmup 1 --lr 1e-3 --weight-decay 0 --batch-tokens 256"
    made = prepare("--recipe", recipe, how, "--precision fp32 --data", toy_tree)
    adamw, muon = made.optimizers
    of = [{p for group in o.param_groups for p in group["params"]} for o in (adamw, muon)]
    names = {p: name for name, p in made.model.named_parameters() if p.requires_grad}
    assert of[0] | of[1] == {*names} and not of[0] & of[1]
    wanted = {p for p, name in names.items() if "layers." in name and p.dim() == 2}
    assert of[1] == wanted and len(wanted) > 10
    before = {p: p.detach().clone() for p in of[1]}
    how = made.cfg, made.runtime, made.model, made.optimizers
    train.train_step(*how, 1, [made.batch], torch.zeros(3))
    for p in (p for p in wanted if not torch.equal(p, before[p])):
        size = torch.linalg.matrix_norm((p - before[p]).detach(), 2) / (1e-3 * train.MUON_RATE)
        # of AdamW's size; torch's five Newton-Schulz steps leave singular values of 0.7 to 1.2
        assert 0.65 < size / (0.2 * max(p.shape) ** 0.5) < 1.25, (names[p], size)


@pytest.mark.parametrize("bf16", [False, True])
def test_muon_is_torchs_within_its_rounding(bf16, monkeypatch):
    """Matrices of one shape or of several, one without a gradient, momentum, decay; torch's is
    bf16.
    """
    monkeypatch.setattr(evaluate, "bf16_is_faster", lambda: bf16)
    generator = torch.Generator().manual_seed(0)
    shapes = (6, 4), (4, 6), (6, 4), (5, 5), (6, 4)
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(4)]
    moved = []
    for kind in (torch.optim.Muon, train.Muon):
        matrices = [torch.nn.Parameter(x.clone()) for x in start]
        how = {"lr": 0.01, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
        optimizer = kind(matrices, **how)
        for step in grads:
            for number, (p, grad) in enumerate(zip(matrices, step)):
                p.grad = None if number == 4 else grad
            optimizer.step()
        moved.append([(p - x).detach() for p, x in zip(matrices, start)])
    for theirs, ours in zip(*moved):
        assert (ours - theirs).norm() <= 0.02 * theirs.norm()
    assert not moved[1][4].any() and moved[1][0].norm() > 0.01


def test_adamw_is_torchs_and_differs_from_the_authors_only_as_told():
    """UNITER's AdamW adds eps before the bias correction and decays after the update; without
    both they agree.
    """
    z, module = golden("schedules"), torch.nn.Module()
    p, wanted = json.loads(str(z["opt/params"])), z["opt/torch_adamw_same_settings"]
    module.w = torch.nn.Parameter(torch.tensor(z["opt/w0"])[None])
    how = {"lr": p["lr"], "eps": p["eps"], "weight_decay": p["weight_decay"]}
    cfg = make_config("toy", beta2=p["betas"][1], **how)
    (optimizer,) = train.build_optimizers(cfg, module)
    path = follow(module.w, len(wanted), lambda step: optimizer.step())
    np.testing.assert_allclose(path, wanted, rtol=1e-9)
    assert 1e-5 < np.abs(path - z["opt/uniter_adamw"]).max() < 1e-3


@pytest.mark.parametrize("decay", [True, False])
def test_the_two_differences_make_the_authors_adamw(decay):
    """torch's Adam with eps * sqrt(1 - beta2^t), then w *= 1 - lr * decay, is UNITER's trajectory
    to the last digits.
    """
    z = golden("schedules")
    p, w = json.loads(str(z["opt/params"])), torch.nn.Parameter(torch.tensor(z["opt/w0"]))
    wanted = z["opt/uniter_adamw" if decay else "opt/uniter_adamw_nodecay"]
    optimizer = torch.optim.Adam([w], lr=p["lr"], betas=p["betas"], eps=p["eps"])

    def update(step):
        optimizer.param_groups[0]["eps"] = p["eps"] / (1 - p["betas"][1] ** step) ** 0.5
        optimizer.step()
        with torch.no_grad():
            w.mul_(1 - p["lr"] * p["weight_decay"] * decay)

    np.testing.assert_allclose(follow(w, len(wanted), update), wanted, rtol=1e-9)


def test_accumulation_is_the_larger_batch_in_pieces(toy_tree):
    """The gradient of two batches accumulated is the gradient of a mean over both."""
    how = "--recipe toy-pretrain --pretrain mlm --batch-tokens 256 --steps 2 --warmup 1 --clip 0"
    made, grads = prepare(how, "--precision fp32 --data", toy_tree), []
    batches = [made.streams.train[0][k] for k in (0, 1)]

    class Peek(torch.optim.SGD):
        def step(self):
            named = made.model.named_parameters()
            grads.append({n: q.grad.clone() for n, q in named if q.grad is not None})

    optimizer = Peek([{"params": list(made.model.parameters()), "scale": 1.0}], lr=0.0)
    for part in (batches, batches[:1], batches[1:]):
        train.train_step(made.cfg, made.runtime, made.model, [optimizer], 1, part)
    n, (both, *each) = [len(b["masked_words"]) for b in batches], grads
    for name in both:
        mean = (n[0] * each[0][name] + n[1] * each[1][name]) / sum(n)
        torch.testing.assert_close(both[name], mean, atol=1e-6, rtol=1e-4)


# --------------------------------------------------------------------------------------- settings


def test_recipe_then_typed_settings():
    cfg = parse(argv("--loss cacr+wra --lr 1e-3"))
    assert (cfg.recipe, cfg.size, cfg.lr, cfg.loss) == ("toy", "toy", 1e-3, "cacr+wra")
    paper = parse(argv("--recipe flickr30k --data /full"))
    assert (paper.lr, paper.negatives, paper.candidates, paper.alternate) == (5e-5, 31, 399, True)
    assert (paper.size, paper.init) == ("base", "/full/checkpoints/uniter-base.pt")
    assert parse(["--task", "vqa"]).recipe == "toy-vqa" and parse(["--recipe", "vqa"]).task == "vqa"
    for recipe in train.RECIPES:
        make_config(recipe)
    assert parse(["--no-alternate"]).alternate is False
    names = {f.name for f in train.dataclasses.fields(train.Config)}
    assert set().union(*train.RECIPES.values()) <= names


def test_the_run_before_is_of_this_runs_data_and_size():
    """A recipe that another begins from is run in a folder of its own for each data tree."""
    name = lambda *words: train.first_run(parse(argv(*words)))[1].out
    assert (
        name("--loss cacr --seed 3") == name("--loss none --seed 3") == "out/toy-short-none-seed3"
    )
    assert name("--size tiny") == "out/toy-short-none-size-tiny-seed0"
    assert name("--data a/b") == "out/toy-short-none-data-a_b-seed0"
    # on patches what was pre-trained on them; that itself begins from regions
    assert parse(argv("--loss cacr --vision patches")).init == "toy-patches"
    first = train.first_run(parse(argv("--recipe toy-patches")))[1]
    assert (first.recipe, first.vision) == ("toy-short", "regions")


@pytest.mark.parametrize(
    "argv, match",
    [
        (["--loss", "carc"], "did you mean cacr"),
        (["--loss", "cacr+war"], "did you mean wra"),
        (["--cacr-wieght", "2"], "is not an option"),
        (["--recipe", "flicker30k"], "did you mean flickr30k"),
        (["--align-wieght", "2"], "did you mean --align-weight"),
        (["--steps", "-1"], "--steps -1: wanted at least 0"),
        (["--pretrain", "mlm+imt"], "did you mean itm"),
        (["--task", "pretrain", "--pretrain", "wra"], "nothing is drawn"),
        (["--task", "pretrain", "--pretrain", "mlm:x"], "name:weight as in mlm:3"),
        (["--loss", "cacr:2"], "did you mean cacr"),
        (["--negatives", "9", "--candidates", "3"], "cannot hold"),
        (["--seed", "-1"], "--seed -1: wanted at least 0"),
        (["--dropout", "1"], "--dropout 1.0: wanted 0 to 0.99"),
        (["--lr", "nan"], "--lr nan: wanted more than 0"),
        (["--beta2", "1"], "--beta2 1.0: wanted 0 to 0.9999"),
        (["--eps", "-1"], "--eps -1.0: wanted more than 0"),
        (["--max-words", "-3"], "--max-words -3: wanted at least 1"),
        (["--align-weight", "nan"], "--align-weight nan: wanted at least 0"),
        (["--align-layer", "-5"], "-4 .first. to -1"),
    ],
)
def test_wrong_settings_are_answered(argv, match):
    with pytest.raises(UserError, match=match):
        parse(argv)


def test_help_teaches():
    fields = train.dataclasses.fields(train.Config)
    text = train.make_parser().format_help()
    assert all(f"--{f.name.replace('_', '-')}" in text for f in fields)
    assert text.count("default:") == len(fields) and "flickr30k" in text and "Read first" in text


# -------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    "more, match",
    [
        ("--loss carc --init x", "did you mean cacr"),
        ("--data nowhere --init x", "is missing"),
        ("--init nothing.pt", "is not there"),
    ],
)
def test_errors_are_one_message(toy_tree, tmp_path, more, match):
    done = run(tmp_path, "--data", toy_tree, more, expect=1)
    assert match in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("workers", [0, 1])
def test_nan_in_the_features_met_while_training(toy_tree, pretrained, tmp_path, workers):
    tree = copied(toy_tree, tmp_path / "toy", "regions")
    features = np.lib.format.open_memmap(tree / "regions/coco/features.npy", mode="r+")
    features[:] = np.nan
    features.flush()
    args = ["--recipe toy --data", tree, "--init", pretrained[0], "--steps 2 --warmup 1"]
    done = run(tmp_path, *args, "--size tiny --workers", workers, expect=1)
    assert "nan" in done.stderr and "Samples: " in done.stderr and "Traceback" not in done.stderr


def test_missing_data_are_met_before_the_run_before(toy_tree, tmp_path, monkeypatch):
    # else hours of pre-training come before the message
    def run_loop(*_):
        raise RuntimeError("trained")

    monkeypatch.setattr(train, "run_loop", run_loop)
    tree = copied(toy_tree, tmp_path / "tree", "regions")
    (tree / "nlvr2").unlink()
    shutil.rmtree(tree / "regions/nlvr2")
    done = run(tmp_path, "--task nlvr2 --data", tree, *QUICK, expect=1)
    assert f"{tree}/" in done.stderr and "nlvr2" in done.stderr, done.stderr
    assert "trained" not in done.stderr and not list((tmp_path / "out").glob("toy-pretrain*"))
    done = run(tmp_path, "--loss none", "--data", toy_tree, *QUICK, expect=1)
    assert "trained" in done.stderr and list((tmp_path / "out").glob("toy-short*/"))


def test_validation_ends_where_nothing_counts(monkeypatch):
    hits = {"mlm": torch.tensor([True, False] * 5), "itm": torch.zeros(0, dtype=torch.bool)}
    for task in hits:
        monkeypatch.setitem(train.OBJECTIVES, task, lambda *_, task=task: ({}, hits[task]))
    streams = {task: [{"task": task}] * 20 for task in hits}
    runtime = SimpleNamespace(autocast=contextlib.nullcontext, device="cpu")
    model = SimpleNamespace(eval=lambda: None, train=lambda: None)
    found = train.validate(make_config("toy"), runtime, model, streams, samples=20)
    assert found == {"val/mlm": 50, "val/itm": 0}


def test_validation_draws_the_same_however_a_run_trains():
    """As many masks, negatives at random, whole pictures: two recipes can be compared."""
    usual = train.Config()
    for recipe, size in (("toy-pretrain", 0), ("toy", 0), ("flickr30k", 0), ("toy-albef", 48)):
        plain = train.for_validation(make_config(recipe, loss="none"))
        assert (plain.mask_rate, plain.candidates) == (usual.mask_rate, 0) and not plain.alternate
        assert plain.augment == "none" and plain.batch_size == size
    assert train.for_validation(make_config("toy", loss="cacr")).loss == "none"
    assert train.for_validation(make_config("toy-grounding")).loss == "maf"


def test_out_of_another_configuration_is_refused_and_kept(toy_tree, pretrained, tmp_path):
    args = toy_run(toy_tree, pretrained, "--steps", 2, "--out", "run")
    run(tmp_path, *args)
    before = (tmp_path / "run/last.pt").read_bytes()
    again = run(tmp_path, *args, expect=1)
    assert "holds this run already, finished" in again.stderr and "--resume" in again.stderr
    other = run(tmp_path, *args, "--lr", "3e-4", "--resume", expect=1)
    assert "lr 0.001 there, 0.0003 here" in other.stderr and "Traceback" not in other.stderr
    assert (tmp_path / "run/last.pt").read_bytes() == before


def test_checkpoint_of_another_size(toy_tree, pretrained, tmp_path):
    done = run(tmp_path, *toy_run(toy_tree, pretrained, "--size", "base", "--steps", 2), expect=1)
    assert "does not fit" in done.stderr and "--size" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(
    toy_tree, pretrained, tmp_path, monkeypatch, poison
):
    monkeypatch.chdir(tmp_path)
    args = toy_run(toy_tree, pretrained, "--loss cacr --steps 6 --save-every 2 --out run")
    cfg = parse(argv(*args))
    calls, real = [0], train.losses.ranking
    factor = (lambda x: float("nan")) if poison == "loss" else (lambda x: 1 + (x.sum() * 0).sqrt())

    def ranking(scores, margin):
        calls[0] += scores.requires_grad
        value = real(scores, margin)
        return value if calls[0] < 5 else value * factor(scores)

    monkeypatch.setattr(train.losses, "ranking", ranking)
    with pytest.raises(train.NonFinite, match="step 5") as error:
        train.train(cfg, train.setup_runtime(cfg))
    assert "Samples: " in str(error.value) and " with image COCO" in str(error.value)
    saved = read_checkpoint(tmp_path / "run/last.pt")
    assert saved.step == 4 and all(torch.isfinite(v).all() for v in saved.model.values())


def test_full_disk_keeps_the_old_checkpoint(toy_tree, pretrained, tmp_path, monkeypatch):
    """A limit on file size stands for the full disk: the write fails half way."""
    args = toy_run(toy_tree, pretrained, "--steps", 4, "--save-every", 2, "--out", "run")
    save, (soft, hard) = train.save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(path, cfg, model, optimizers, margins, step, sizes):
        at_most = 1_000_000 if step == 4 else soft
        resource.setrlimit(resource.RLIMIT_FSIZE, (at_most, hard))
        save(path, cfg, model, optimizers, margins, step, sizes)

    monkeypatch.setattr(train, "save_checkpoint", full)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        done = run(tmp_path, *args, expect=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert "Traceback" not in done.stderr
    assert "could not be saved at step 4" in done.stderr and "still whole" in done.stderr
    assert read_checkpoint(tmp_path / "run/last.pt").step == 2
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_broken_checkpoint_in_out(toy_tree, pretrained, tmp_path):
    args = toy_run(toy_tree, pretrained, "--steps", 2, "--out", "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/last.pt").write_bytes(pretrained[0].read_bytes()[:5000])
    done = run(tmp_path, *args, "--resume", expect=1)
    assert "cannot be read" in done.stderr and "Traceback" not in done.stderr


def test_a_checkpoint_that_lacks_something_is_one_message(toy_tree, pretrained, tmp_path):
    """Weights or an optimiser of another model, or none at all"""
    args = toy_run(toy_tree, pretrained, "--steps 2 --out run")
    run(tmp_path, *args)
    path, whole = tmp_path / "run/last.pt", torch.load(tmp_path / "run/last.pt", weights_only=True)
    name = next(iter(whole["model"]))
    lacking = {k: v for k, v in whole["model"].items() if k != name}
    for changed in (
        {"model": lacking},
        {"model": whole["model"] | {name: torch.zeros(3)}},
        {"optimizers": []},
        {"optimizers": [whole["optimizers"][0] | {"param_groups": []}]},
        {"margins": None},
        {"margins": torch.zeros(7)},
        {"step": "2"},
        {"config": {}},
    ):
        torch.save(whole | changed, path)
        done = run(tmp_path, *args, "--resume", expect=1)
        assert "run" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_alignment_of_a_batch_is_a_mean_over_all_of_its_pairs(toy_tree):
    """The sum over its matched pairs by the number of all: parts of a batch then add up to it."""
    how = "--recipe toy-pretrain --pretrain itm --loss cacr+wra --init none --batch-tokens 512"
    made = prepare(how, "--data", toy_tree, *QUICK)
    cfg, model, batch = made.cfg, made.model.eval(), made.batch
    terms, _ = train.objective_itm(cfg, model, batch)
    out, total = model(**batch["input"], maps=(-1,)), {"cacr": 0.0, "wra": 0.0}
    masks = {name: batch["input"][name] for name in ("text_mask", "region_mask")}
    for b in batch["match"].nonzero()[:, 0].tolist():
        one = slice(b, b + 1)
        maps = tuple(type(m)(*(S[one] for S in m)) for m in out.maps)
        alone = out._replace(words=out.words[one], regions=out.regions[one], maps=maps)
        for name, value in train.alignment(
            cfg, alone, {k: v[one] for k, v in masks.items()}
        ).items():
            total[name] += value.item()
    assert 0 < batch["match"].sum() < len(batch["match"])
    for name, value in total.items():
        assert terms[name].item() == pytest.approx(value / len(batch["match"]), rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_evaluate_says_what_train_said(toy_tree, pretrained, tmp_path, monkeypatch, precision):
    """One way of judging: in the precision of the training."""
    judged, judge = [], evaluate.choice_scores
    monkeypatch.setattr(
        evaluate, "choice_scores", lambda *a, **how: (judged.append(a[0]), judge(*a, **how))[1]
    )
    args = [*toy_run(toy_tree, pretrained, "--steps", 3), "--precision", precision, "--out", "o"]
    said = last_line(run(tmp_path, *args))
    again = ["--task winoground --ckpt o/last.pt --data", toy_tree]
    again = last_line(inside(tmp_path, again, main=evaluate.main))
    assert again == {name: said[name] for name in again}
    halves = {run.autocast is not contextlib.nullcontext for run in judged}
    assert len(judged) >= 2 and halves == {precision == "bf16"}
