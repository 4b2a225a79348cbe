"""The same seed gives the same weights as before the house was rebuilt: 30 updates of six recipes.

tests/digests.json was written down before the first change. The digest of a checkpoint is that of
its tensors' bytes, whatever they are called; rounding differs between processors, so on another one
than the file names the norms of the gradients are compared instead.
"""

import hashlib
import json

import pytest
import torch

import evaluate
import toy
from conftest import ROOT, run

BEFORE = json.loads((ROOT / "tests/digests.json").read_text())


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digests") / "toy"
    toy.make_toy(folder, seed=0, scenes=BEFORE["scenes"])
    return folder


def digest(model):
    """Of all tensors' shapes and bytes, in an order that their names do not decide."""
    each = []
    for tensor in model.values():
        content = str(tuple(tensor.shape)).encode() + tensor.contiguous().view(-1).numpy().tobytes()
        each.append(hashlib.sha256(content).hexdigest())
    return hashlib.sha256("".join(sorted(each)).encode()).hexdigest()


def is_same_processor():
    try:
        native = "avx512_bf16" in (open("/proc/cpuinfo").read())
    except OSError:
        return False
    made_on, capability = BEFORE["made_on"], torch.backends.cpu.get_cpu_capability()
    return native and (torch.__version__, capability) == (made_on["torch"], made_on["capability"])


@pytest.mark.parametrize("name", BEFORE["runs"])
def test_same_seed_same_weights_as_before(tree, tmp_path, monkeypatch, name):
    # the weights are what counts here: no benchmark, no figure
    monkeypatch.setattr(evaluate, "benchmarks_of", lambda settings: ([], []))
    monkeypatch.setattr(evaluate, "downstream", lambda run, **how: {})
    before = BEFORE["runs"][name]
    argv = [*before["argv"].split(), "--steps", 30, "--precision", "fp32", "--data", tree]
    run(tmp_path, *argv, "--out", "run", "--workers", 0, "--log-every", 1)
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    norms = [line["norm"] for line in log if "norm" in line]
    assert norms == pytest.approx([n for n in before["norms"] if n is not None], rel=0.02)
    if is_same_processor():
        saved = torch.load(tmp_path / "run/last.pt", weights_only=True)
        assert digest(saved["model"]) == before["sha256"]
