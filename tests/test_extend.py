"""The README's "Change it": each of its scripts is run as it stands, for 20 updates."""

import json
import re
import sys
import types
from unittest.mock import patch

import numpy as np
import pytest

import evaluate
import train
from conftest import QUICK, ROOT, same, weights

CHANGE_IT = (ROOT / "README.md").read_text().split("## Change it")[1].split("\n## ")[0]
SCRIPTS = re.findall(r"```python\n(.*?)```", CHANGE_IT, re.S)


@pytest.fixture
def tables():
    """The three tables, put back afterwards."""
    with patch.dict(train.LOSSES), patch.dict(evaluate.TASKS), patch.dict(train.RECIPES):
        yield


def write_labels(tree):
    """data/toy/mine: is a red thing in the caption? Each answer equally often."""
    captions = json.loads((tree / "coco/annotations/captions_val2014.json").read_text())
    stems = {i["id"]: i["file_name"][:-4] for i in captions["images"]}
    items = []
    for a in captions["annotations"]:
        label = int("red" in a["caption"])
        items.append({"image": stems[a["image_id"]], "text": a["caption"], "label": label})
    (tree / "mine").mkdir(exist_ok=True)
    for split in ("train", "val"):
        (tree / f"mine/{split}.json").write_text(json.dumps(items))


@pytest.mark.parametrize("number", range(len(SCRIPTS)))
def test_readme_change_it(toy_tree, tmp_path, monkeypatch, tables, number):
    monkeypatch.chdir(tmp_path)
    write_labels(toy_tree)
    real, small = train.main, ["--steps", "20", "--warmup", "2", "--batch-tokens", "256"]
    small += ["--log-every", "1", "--data", str(toy_tree), "--init", "none", "--out", "run", *QUICK]

    def main(argv):
        typed = train.parse(argv)
        more = ["--candidates", "6"] if typed.candidates else []
        real([*argv, *small, *more])

    monkeypatch.setattr(train, "main", main)
    script = types.ModuleType("script")
    monkeypatch.setitem(sys.modules, "script", script)
    exec(compile(SCRIPTS[number], "README.md", "exec"), script.__dict__)
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    name = ("sharpness", "center", "mine")[number]
    values = [line[name] for line in log if name in line]
    assert len(values) == 20 and np.isfinite(values).all() and any(values)
    numbers = json.loads((tmp_path / "run/done.json").read_text())
    assert ("mine/accuracy" if name == "mine" else "winoground/group") in numbers


def test_a_loss_is_given_what_its_row_says(toy_tree, tmp_path, monkeypatch, tables):
    """Both sides at once are called once; one side is called for each; masks follow the blocks."""
    calls = []

    def both(LL, LV, VL, VV, text_mask, region_mask):
        calls.append(("both", LV.shape[1:] == (text_mask.shape[1], region_mask.shape[1])))
        return LL.sum() * 0 + VV.sum() * 0

    def side(own, cross, own_mask, other_mask):
        calls.append(("side", cross.shape[1:] == (own_mask.shape[1], other_mask.shape[1])))
        return own.sum() * 0

    train.LOSSES["both"] = train.Loss(both, "logits", "LL LV VL VV")
    train.LOSSES["side"] = train.Loss(side, "block_probs", "own cross")
    monkeypatch.chdir(tmp_path)
    argv = ["--loss", "both+side", "--steps", "1", "--warmup", "1", "--data", str(toy_tree)]
    argv += ["--init", "none", "--batch-tokens", "256", "--candidates", "6", "--no-alternate"]
    train.main([*argv, "--out", "run", *QUICK])
    assert calls == [("both", True), ("side", True), ("side", True)]


def test_a_losss_weight_is_its_rows(toy_tree, tmp_path, monkeypatch, tables):
    """Weight 0 trains as no loss does, another weight does not."""

    def center(words, regions, text_mask, region_mask):
        return (words.mean(dim=1) - regions.mean(dim=1)).square().mean()

    monkeypatch.chdir(tmp_path)
    train.LOSSES["off"] = train.Loss(center, "hidden", weight=0.0)
    train.LOSSES["on"] = train.Loss(center, "hidden", weight=3.0)
    monkeypatch.setattr(evaluate, "benchmarks_of", lambda settings: ([], []))
    for name in ("none", "off", "on"):
        argv = ["--loss", name, "--steps", "2", "--warmup", "0", "--align-schedule", "constant"]
        argv += ["--data", str(toy_tree), "--init", "none", "--batch-tokens", "256"]
        train.main([*argv, "--candidates", "6", "--out", name, *QUICK])
    none, off, on = (weights(tmp_path / name) for name in ("none", "off", "on"))
    same(none, off, rtol=0, atol=1e-7)
    assert any((none[name] - on[name]).abs().max() > 1e-4 for name in none)
