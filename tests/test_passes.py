"""Passes as large as the memory bears, compiled layers, and what an update sends to a device.

No GPU is needed: a limit on tokens stands for a full memory, the meta device, which mixes with no
other, for a GPU, and a backend that counts for the compiler.
"""

import contextlib
import copy
import os
import subprocess
import sys

import pytest
import torch

import data
import model
import train
from conftest import QUICK, ROOT, prepare, run, same, weights
from train import UserError, parse

# of each kind of batch that may share a pass; a batch holds several pairs
SMALL = "--init none --dropout 0 --warmup 1 --steps 20 --gpus 2 --accumulate 3 --batch-tokens "
KINDS = {
    "mlm": "--recipe toy-pretrain --pretrain mlm --joint-masking",
    "itm": "--recipe toy-pretrain --pretrain itm+wra --loss cacr+iais+sparc",
    "mrfr": "--recipe toy-pretrain --pretrain mrfr",
    "mrckl": "--recipe toy-pretrain --pretrain mrckl",
    "patches": "--recipe toy-patches --pretrain mlm+itm --corpora coco",
    "multitask": "--recipe toy-align --loss none",
    "two streams": "--recipe toy-align --pretrain itm --loss iais-distributed",
    "vqa": "--recipe toy-vqa --loss cacr",
    "nlvr2": "--recipe toy-nlvr2",
    "nlvr2, one row": "--recipe toy-nlvr2 --nlvr2-head triplet",
    "ve": "--recipe toy-ve",
    "re": "--recipe toy-re",
    "vcr": "--recipe toy-vcr",
    "gqa": "--recipe toy-gqa",
    "rank": "--recipe toy --loss cacr+wra --candidates 6",
    "rank, any": "--recipe toy --loss iais --candidates 0 --no-alternate",
}
LONG = "vcr", "nlvr2", "nlvr2, one row"
QUICK_KINDS = "mlm", "itm", "multitask", "nlvr2", "rank"


def made_of(kind, tree, *more):
    """A run of this kind in float64, before its first update"""
    tokens = 300 if kind in LONG else 64
    made = prepare(f"{KINDS[kind]} {SMALL}{tokens}", "--data", tree, *QUICK, *more)
    made.model.double()
    return made


def doubled(batch):
    """A nested batch in float64"""
    if isinstance(batch, torch.Tensor):
        return batch.double() if batch.is_floating_point() else batch
    if isinstance(batch, data.Pool):
        return batch.apply(doubled)
    return {k: doubled(v) for k, v in batch.items()} if isinstance(batch, dict) else batch


def trained(made, passes, steps, rank=0, world_size=1, stream=0):
    """Weights and losses after so many updates of six batches, which start where the run does"""
    runtime, model = made.runtime._replace(rank=rank, world_size=world_size), made.model
    optimizers, logged = train.build_optimizers(made.cfg, model), {}
    for step in range(1, steps + 1):
        pieces = [made.streams.train[stream][6 * step + k] for k in range(rank, 6, world_size)]
        batches = list(map(doubled, pieces))
        logged, _ = train.train_step(
            made.cfg, runtime, model, optimizers, step, batches, None, passes
        )
    return {k: v.clone() for k, v in model.state_dict().items()}, logged


def check_passes(kind, tree, steps):
    made = made_of(kind, tree)
    start, found = {k: v.clone() for k, v in made.model.state_dict().items()}, []
    for stream in range(len(made.streams.train)):
        for tokens in (0, 700 if kind in LONG else 150, 10**6):
            made.model.load_state_dict(start)
            found.append(trained(made, train.Passes(tokens), steps, stream=stream))
        (each, losses), *others = found[-3:]
        assert max((each[name] - start[name]).abs().max() for name in start) > 5e-4
        for all_weights, logged in others:
            same(all_weights, each, rtol=0, atol=1e-6)
            same(logged, losses, rtol=0, atol=1e-6)
    return made


def sizes(made, tokens):
    """How many batches a pass of the first update has"""
    batches = [made.streams.train[0][k] for k in range(6)]
    return [len(group) for group in train.Passes(tokens).groups(made.cfg, batches)]


@pytest.mark.parametrize("kind", QUICK_KINDS)
def test_any_size_of_a_pass_makes_the_same_update(toy_tree, kind):
    """One batch a pass, some, and all of an update: the same weights, in float64."""
    made = check_passes(kind, toy_tree, 3)
    assert sizes(made, 0) == [1] * 6
    # text and image anchors apart
    assert sizes(made, 10**6) == ([3, 3] if kind == "rank" else [6])
    some = sizes(made, 700 if kind in LONG else 150)
    assert sum(some) == 6 and 1 < len(some) < 6


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - set(QUICK_KINDS)))
def test_the_same_of_every_other_kind(toy_tree, kind):
    check_passes(kind, toy_tree, 4)


@pytest.mark.slow
def test_passes_on_two_processes(toy_tree, tmp_path):
    """Each puts its own batches together: the same weights as one process."""
    for n, tokens in ((1, 0), (2, 0), (2, 10**6)):
        start = "-m torch.distributed.run --standalone --nproc-per-node".split()
        command = [sys.executable, *start, str(n), __file__, str(toy_tree), str(tokens)]
        out = tmp_path / f"{n}-{tokens}.pt"
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run([*command, str(out)], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    one, *two = (torch.load(path, weights_only=True) for path in sorted(tmp_path.glob("*.pt")))
    assert one.keys() == KINDS.keys()
    for kind in KINDS:
        for other in two:
            same(other[kind], one[kind], rtol=0, atol=1e-6)


def limited(model, most, at=None):
    """The model in a memory of so many words + regions a pass; at: only in that forward pass"""
    forward, calls = model.forward, []

    def limited_forward(text, *args, **more):
        calls.append(len(text) * more["length"])
        if calls[-1] > most and at in (None, len(calls)):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(text, *args, **more)

    model.forward = limited_forward
    return calls


def test_a_pass_that_does_not_fit_is_halved(toy_tree, capsys):
    made = made_of("mlm", toy_tree)
    start = {k: v.clone() for k, v in made.model.state_dict().items()}
    wanted, _ = trained(made, train.Passes(), 2)
    made.model.load_state_dict(start)
    calls, passes = limited(made.model, 200), train.Passes(10**6)
    found, _ = trained(made, passes, 2)
    same(found, wanted, rtol=0, atol=1e-6)
    # 6 batches, then half of them or less; the second update begins with what fits
    told = [line for line in capsys.readouterr().out.splitlines() if "do not fit" in line]
    assert len(told) == sum(n > 200 for n in calls) and f"at most {passes.tokens:,}" in told[-1]
    assert passes.tokens <= calls[0] // 2 and passes.tokens < 10**6


def test_gradients_of_passes_before_one_that_does_not_fit_count_once(toy_tree):
    made = made_of("mlm", toy_tree)
    start = {k: v.clone() for k, v in made.model.state_dict().items()}
    wanted, _ = trained(made, train.Passes(), 1)
    made.model.load_state_dict(start)
    calls = limited(made.model, 0, at=2)
    found, _ = trained(made, train.Passes(150), 1)
    assert len(calls) > 4
    same(found, wanted, rtol=0, atol=1e-6)


def test_a_batch_that_does_not_fit_is_one_message(toy_tree):
    made = made_of("mlm", toy_tree)
    limited(made.model, 20)
    with pytest.raises(UserError, match="--batch-tokens 64.* does not fit into memory\n.*accumul"):
        trained(made, train.Passes(10**6), 1)


@pytest.mark.parametrize(
    "argv",
    [
        "--recipe flickr30k --gpus 1 --accumulate 1",
        "--recipe uniter-pretrain --pass-tokens 20000",
        "--recipe kervadec",
        "--recipe albef",
        "--recipe maf",
    ],
)
def test_pass_tokens_that_would_do_nothing_are_refused(argv):
    more = argv if "--pass-tokens" in argv else f"{argv} --pass-tokens 100000"
    with pytest.raises(
        UserError, match="--pass-tokens [0-9]+: an update is one batch, or compares"
    ):
        parse(more.split())


def test_what_a_gpu_bears_is_measured(toy_tree, monkeypatch, capsys):
    """So many bytes a token of the kind that takes most, in four fifths of what will be free."""
    made, peak = made_of("itm", toy_tree, "--pretrain mlm+itm"), {"mlm": 3 << 20, "itm": 5 << 20}
    kinds, parameters = [], sum(p.numel() for p in made.model.parameters())
    gpu = {
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 7 << 20,
        "memory_reserved": lambda: 9 << 20,
        "max_memory_allocated": lambda: (7 << 20) + peak[kinds[-1]],
        "mem_get_info": lambda: (100 << 20, 200 << 20),
    }
    for name, function in gpu.items():
        monkeypatch.setattr(torch.cuda, name, function)
    pass_of = lambda *how: kinds.append(how[4][0][0]["task"])
    monkeypatch.setattr(train, "add_gradients", pass_of)
    runtime = made.runtime._replace(device=torch.device("cuda"))
    found = train.choose_pass_tokens(made.cfg, runtime, made.model, made.streams)
    assert sorted(kinds) == ["itm", "itm", "mlm", "mlm"]
    first = {stream.kind: train.pass_size(made.cfg, [stream[0]]) for stream in made.streams.train}
    free = 0.8 * ((102 << 20) - 16 * parameters)
    assert found == int(free / max(peak[kind] / n for kind, n in first.items())) > 0
    assert f"up to {found:,} words + regions a pass" in capsys.readouterr().out
    choose = lambda cfg, device: train.choose_pass_tokens(
        cfg, made.runtime._replace(device=torch.device(device)), made.model, made.streams
    )
    # without a GPU, and of one batch an update, nothing is measured
    assert choose(made.cfg, "cpu") == 0 and len(kinds) == 4
    alone = train.dataclasses.replace(made.cfg, gpus=1, accumulate=1)
    assert choose(alone, "cuda") == 0 and len(kinds) == 4
    asked = train.dataclasses.replace(made.cfg, pass_tokens=123_456)
    assert choose(asked, "cuda") == 123_456 and len(kinds) == 4

    def too_large(*how):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "add_gradients", too_large)
    # the first update says it
    assert choose(made.cfg, "cuda") == 0 and not capsys.readouterr().out


def test_a_run_with_passes(toy_tree, pretrained, tmp_path):
    """The option reaches the loop, and changes nothing that is kept: a run may go on without it."""
    args = ["--recipe toy --data", toy_tree, "--init", pretrained[0], "--candidates 0 --gpus 2"]
    args += ["--steps 4 --warmup 1 --batch-tokens 256 --dropout 0 --save-every 2", *QUICK]
    run(tmp_path, *args, "--out each")
    run(tmp_path, *args, "--accumulate 1 --pass-tokens 4096 --out joined")
    same(weights(tmp_path / "each"), weights(tmp_path / "joined"), rtol=0, atol=1e-5)
    run(tmp_path, *args, "--out joined --resume")


# ------------------------------------------------------------------------------ the meta device


ON_DEVICE = {kind: KINDS[kind] for kind in QUICK_KINDS if kind != "rank"} | {
    "rank": "--recipe toy --loss cacr+wra --candidates 0",
    "rank, edits": "--recipe toy --loss eqsim+hard-rank --candidates 0",
    "align": "--recipe toy-align",
    "maf": "--recipe toy-grounding",
    "amc": "--recipe toy-amc --batch-size 8",
}


@pytest.mark.parametrize("kind", ON_DEVICE)
def test_an_update_leaves_nothing_on_the_host(toy_tree, kind, monkeypatch):
    """A batch that stayed behind, or was fetched back, would be an error on a GPU. Features are
    widened there: until then they are float16."""
    # which the meta device does not know
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())
    small = [] if kind == "maf" else QUICK
    made = prepare(ON_DEVICE[kind], "--init none --batch-tokens 256 --data", toy_tree, *small)
    for stream in made.streams.train:
        batches = [stream[k] for k in range(2)]
        for batch in batches:
            x = batch["pool"].region_input if "pool" in batch else batch.get("input", {})
            wide = [name for name in ("regions", "features") if name in x]
            assert all(x[name].dtype == torch.float16 for name in wide)
        runtime = made.runtime._replace(device=torch.device("meta"))
        margins = torch.zeros(len(data.EDITS), device="meta")
        model, merged = made.model.to("meta"), made.cfg.can_merge
        groups = [batches] if merged else [[batch] for batch in batches]
        how = made.cfg, runtime, model, 1, groups, train.total_counts(batches), margins
        logged, gaps = train.add_gradients(*how)
        on_device = [
            *logged.values(),
            *gaps,
            *(p.grad for p in model.parameters() if p.requires_grad),
        ]
        assert all(x.device.type == "meta" for x in on_device if x is not None) and logged


# ------------------------------------------------------------------------------------- compiled


@pytest.fixture
def graphs(monkeypatch):
    """[operations] of each graph that torch.compile hands on during a test"""
    graphs, compile_it = [], torch.compile

    def backend(graph, examples):
        graphs.append(len(graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compile_it(*a, **k, backend=backend))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield graphs


def test_layers_are_compiled_once_for_all_lengths(graphs):
    """One graph for all layers and sizes; a layer whose maps are asked for stays as written."""
    torch.manual_seed(0)
    net = model.build("uniter", vocab=50, features=6, classes=5, size="tiny", dropout=0.0).train()
    plain, names = copy.deepcopy(net), list(net.state_dict())
    model.compile_layers(net)
    for pairs, words, regions in ((3, 5, 7), (4, 6, 9), (5, 5, 4), (2, 9, 3)):
        x = {
            "text": torch.randint(50, (pairs, words)),
            "text_mask": torch.ones(pairs, words, dtype=torch.bool),
            "regions": torch.rand(pairs, regions, 6),
            "boxes": torch.rand(pairs, regions, 4),
            "region_mask": torch.ones(pairs, regions, dtype=torch.bool),
        }
        how = {"heads": ("match",), "maps": (-1,), "length": words + regions}
        found, wanted = (one(**x, **how) for one in (net, plain))
        torch.testing.assert_close(found.match, wanted.match)
        torch.testing.assert_close(found.maps[0].S_LV, wanted.maps[0].S_LV)
        gradient = torch.autograd.grad(found.match.sum(), net.layers[0].fc1.weight)
        wanted = torch.autograd.grad(wanted.match.sum(), plain.layers[0].fc1.weight)
        torch.testing.assert_close(gradient, wanted)
    assert len(graphs) == 1 and graphs[0] > 10 and list(net.state_dict()) == names


@pytest.mark.slow
@pytest.mark.parametrize(
    "argv",
    [
        "--recipe toy-pretrain --pretrain mlm+itm+mrfr+mrc+mrckl+wra --loss cacr --joint-masking",
        "--recipe toy-align",
        "--recipe toy-albef --batch-size 8",
    ],
)
def test_compiled_graphs_are_few(toy_tree, tmp_path, graphs, argv):
    """At most twelve over a whole run, from its first update to its last benchmark."""
    more = "--init none --steps 16 --warmup 1 --eval-every 8 --compile --gpus 2 --out o"
    more += "" if "albef" in argv else " --batch-tokens 256"
    run(tmp_path, argv, "--data", toy_tree, more, *QUICK)
    assert 1 <= len(graphs) <= 12, len(graphs)


def test_compiling_is_for_gpus(toy_tree, tmp_path, monkeypatch):
    """Off on a CPU unless asked for, and nowhere for what is given heat maps."""
    with pytest.raises(UserError, match="second derivatives"):
        parse("--recipe toy-amc --compile".split())
    with pytest.raises(UserError, match="MAF has no layers"):
        parse("--recipe maf --compile".split())
    compiled = []
    monkeypatch.setattr(train, "compile_layers", compiled.append)
    how = "--recipe toy-pretrain --steps 0 --init none --data"
    run(tmp_path, how, toy_tree, "--out plain", *QUICK)
    assert not compiled
    run(tmp_path, how, toy_tree, "--out compiled --compile", *QUICK)
    assert len(compiled) == 1


if __name__ == "__main__":
    tree, tokens, out = sys.argv[1:]
    found = {}
    for kind in KINDS:
        made = made_of(kind, tree)
        size, rank = made.runtime.world_size, made.runtime.rank
        found[kind], _ = trained(made, train.Passes(int(tokens)), 4, rank, size)
    if rank == 0:
        torch.save(found, out)
