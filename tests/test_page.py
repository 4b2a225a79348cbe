"""The attention page: its numbers are the model's, and a word lights what it attends to."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

import evaluate
from conftest import inside

BROWSER = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)


def data_of(text):
    """What the page's JSON script holds"""
    return json.loads(re.search(r'type="application/json" id="data">(.*?)</script>', text)[1])


@pytest.fixture(scope="module")
def page(toy_tree, pretrained, tmp_path_factory):
    """The page of two checkpoints, as the command line writes it"""
    folder = tmp_path_factory.mktemp("page")
    for name in ("one", "two"):
        (folder / name).mkdir()
        shutil.copy(pretrained[0], folder / name / "last.pt")
    how = ["--task page --ckpt one/last.pt two/last.pt --out figures --data", toy_tree]
    inside(folder, how, main=evaluate.main)
    return folder / "figures/attention.html"


def weights_of(toy_tree, pretrained, example, layer):
    """(H, words, regions) and (H, regions, words) of a caption of Winoground, by the model"""
    run = evaluate.load_run(str(pretrained[0]), toy_tree)
    index, _ = evaluate.choice_index(run, "winoground")
    batch = evaluate.to_device(index.batch(np.array([example]), index.image[[example]]))
    with evaluate.evaluating(run.model):
        maps = run.model(**batch, maps=(layer,)).maps[0]
    return maps.S_LV.softmax(dim=-1)[0], maps.S_VL.softmax(dim=-1)[0], batch


def test_the_page_holds_the_models_weights(page, toy_tree, pretrained):
    """Of every layer and head; nothing is loaded from elsewhere."""
    text = page.read_text()
    assert not re.search(r"https?:|src=.//|<link|<iframe|@import|url[(]", text)
    assert len(text) < 3e6
    data = data_of(text)
    assert len(data) == 12 and all(set(e["runs"]) == {"one", "two"} for e in data)
    for example in (0, 5):
        one = data[example]["runs"]["one"]
        assert one == data[example]["runs"]["two"]
        for layer in range(len(one["S_LV"])):
            lv, vl, batch = weights_of(toy_tree, pretrained, example, layer)
            for shown, wanted in ((one["S_LV"], lv), (one["S_VL"], vl)):
                shown = torch.tensor(shown[layer]) / 1000
                torch.testing.assert_close(shown, wanted, atol=6e-4, rtol=0)
        assert torch.tensor(one["boxes"]).shape == batch["boxes"][0].shape
        assert len(one["words"]) == batch["text"].shape[1] and one["words"][0] == "[CLS]"


def test_awkward_words_and_large_models(toy_tree, pretrained, tmp_path):
    """A word that ends a script does not end it; as many captions as fit, at least one."""
    run, sizes = evaluate.load_run(str(pretrained[0]), toy_tree), []
    for i in range(5, len(run.tokenizer.pieces)):
        run.tokenizer.pieces[i] = "</script><b>"
    for most in (10**7, 30_000, 10):
        text = open(evaluate.attention_page({"one": run}, tmp_path, most=most)["page"]).read()
        sizes.append((len(data_of(text)), len(text)))
        assert data_of(text)[0]["runs"]["one"]["words"][1] == "</script><b>"
    (whole, _), (part, letters), (least, _) = sizes
    assert whole == 12 > part > 1 == least and letters < 30_000 + len(evaluate.PAGE)


PROBE = """<script>
const out = [], seen = () => [...document.querySelectorAll(".run")].map(panel =>
  [...panel.querySelectorAll(".box, .word")].map(x => x.dataset.weight || ""));
const move = (x, how) => x.dispatchEvent(new MouseEvent("mouse" + how));
const point = x => { move(x, "enter"); out.push(seen()); move(x, "leave"); out.push(seen()); };
el("layer").value = 1; el("head").value = 2; draw();
point(document.querySelectorAll(".word")[2]);
point(document.querySelectorAll(".box")[1]);
el("head").value = 0; draw();
point(document.querySelectorAll(".word")[2]);
document.body.appendChild(document.createElement("pre")).textContent = JSON.stringify(out);
</script>"""


@pytest.mark.skipif(not BROWSER, reason="needs Chromium on the path")
def test_pointing_at_words_and_regions(page, toy_tree, pretrained):
    """It shows the model's weights in both runs, and clears them again."""
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text() + PROBE)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", str(probed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "<pre>" in done.stdout, done.stderr
    shown = json.loads(re.search(r"<pre>(.*?)</pre>", done.stdout)[1])
    word, clear, box, cleared, mean, _ = shown
    lv, vl, batch = weights_of(toy_tree, pretrained, 0, 0)
    for panel in range(2):
        numbers = lambda row: [float(x) for x in row if x]
        assert numbers(word[panel]) == pytest.approx(lv[1, 2].tolist(), abs=1e-3)
        assert numbers(box[panel]) == pytest.approx(vl[1, 1].tolist(), abs=1e-3)
        assert numbers(mean[panel]) == pytest.approx(lv[:, 2].mean(dim=0).tolist(), abs=1e-3)
        assert not any(clear[panel]) and not any(cleared[panel])
        assert len(word[panel]) == batch["text"].shape[1] + batch["boxes"].shape[1]
