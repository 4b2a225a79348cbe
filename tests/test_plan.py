"""train.py --plan: its operations are those that torch counts in a real step."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import plan
import train
from conftest import argv, prepare

SMALL = "--size tiny --init none --precision fp32 --data"
QUICK = "toy-pretrain", "toy-re", "toy-grounding"
# a large model's is the base model's at toy size
RECIPES = [name for name in train.RECIPES if not name.endswith("-large")]
RECIPES = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in RECIPES]


def facts(made, batch):
    """What plan.PLANNED supposes, as it is in this batch, padding counted"""
    store, cfg = made.streams.train[0].index.store, made.cfg
    answers = len(made.run.settings["answer_list"])
    known = {"answers": answers, "classes": store.classes or 1601, "features": 2048}
    if cfg.is_multitask:
        known["classes"] -= 1
    x, pool = batch.get("input", batch), batch.get("pool")
    if "phrases" in cfg.given:
        return known | {"phrases": x["phrases"].shape[1:], "regions": x["labels"].shape[1]}
    known["vocab"] = len(made.run.tokenizer)
    if pool:
        # the mean of what the matched pairs and the chunks of the others are padded to
        rows, images = pool.rows[:, 1:].ravel(), pool.images[:, 1:].ravel()
        most = max(cfg.batch_tokens, int(pool.length(rows, images).sum()) // 4)
        parts = [pool.batch(pool.rows[:, 0], pool.images[:, 0])]
        parts += [x for _, x in pool.in_chunks(rows, images, most)]
        mean = lambda size: round(sum(size(x) * len(x["text"]) for x in parts) / pool.rows.size)
        regions = mean(lambda x: x["regions"].shape[1])
        return known | {"regions": regions, "words": mean(lambda x: x["length"]) - regions}
    words, regions = x["text"].shape[1], x["regions"].shape[1] if "regions" in x else 0
    # of one sequence its compact length
    words = x["length"] - regions if regions and cfg.model == "uniter" else words
    return known | {"words": words, "regions": regions}


@pytest.mark.parametrize("recipe", RECIPES)
def test_operations_of_a_plan_are_those_of_a_step(toy_tree, recipe):
    """Of each kind of batch, per pair, at toy size: within 10 % of torch's own count."""
    few = "" if "maf" in recipe or "grounding" in recipe else "--batch-tokens 512 "
    few += "--batch-size 6 " if train.make_config(recipe).batch_size > 6 else ""
    # the toy tree has no CC12M
    few += "--corpora coco+vg " if recipe == "albef" else ""
    # torch's counter does not follow what is scored without gradient
    few += "--candidates 0 " if train.make_config(recipe).candidates else ""
    made = prepare("--recipe", recipe, f"{few}{SMALL}", toy_tree)
    for kind, stream in {s.kind: s for s in made.streams.train}.items():
        batch = stream[0]
        with FlopCounterMode(display=False) as counter:
            total, margins = train.total_counts([batch]), torch.zeros(3)
            how = made.cfg, made.runtime, made.model, made.cfg.steps
            train.add_gradients(*how, [[batch]], total, margins)
        pairs = len(batch["pool"].rows) if "pool" in batch else len(batch["names"])
        if kind == "examples":
            pairs = len(batch["input"]["text"])
        _, found = plan.planned(made.cfg, **facts(made, batch))
        _, planned_pairs, flops, _ = found[kind]
        wanted = counter.get_total_flops() / pairs
        assert flops / planned_pairs == pytest.approx(wanted, rel=0.1), kind


def test_a_plan_is_printed(capsys):
    """Without data; hours follow from the operations and the share of the peak."""
    plan.print_plan(train.parse(argv("--recipe vqa --size tiny --data nowhere --plan 0.5")))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("vqa: ") and any("stores: coco" in line for line in lines)
    assert sum("at 0.50 of its peak" in line for line in lines) == 4 and len(lines) < 20
    assert train.parse(argv("--plan --recipe vqa")).plan == 0.4


@pytest.mark.parametrize("share", ["0", "-0.5", "1.5", "nan"])
def test_a_share_of_the_peak_that_cannot_be(share):
    """0 is not "no plan": training would begin."""
    with pytest.raises(train.UserError, match="--plan .*: wanted 0.01 to 1"):
        train.parse(argv(f"--plan {share} --recipe vqa"))


def test_hours_of_the_recipes_reach_the_page(monkeypatch):
    """From shares that a GPU would have had: every recipe of the papers, on one and on eight."""
    shares = {f"gpu_share/both/{recipe}": 0.5 for recipe in bench.GPU_STEPS}
    monkeypatch.setattr(plan, "planned", lambda cfg: (0, {"mlm": (1, 9, 3.6e15, 0)}))
    found = dict(shares)
    bench.recipe_hours(found, 1e15)
    cfg = train.make_config("uniter-pretrain")
    wanted = 3.6e15 * 16 * cfg.steps / 0.5e15 / 3600
    assert found["gpu_one/uniter-pretrain"] == pytest.approx(wanted)
    papers = [name for name in train.RECIPES if not name.startswith("toy")]
    assert len(found) == len(shares) + 2 * len(papers)
    table = bench.table({"bench": found, "bench_commits": dict.fromkeys(found, "abc")})
    assert f"| (k) hours of uniter-pretrain on one GPU | {wanted:,.2f} |" in table
    assert table.count("on eight") == len(papers) and "both: share of the published" in table
