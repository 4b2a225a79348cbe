"""The attention page: its numbers are the model's, and a word lights what it attends to."""

import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

import evaluate
from conftest import QUICK, inside, run

BROWSER = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)


class Page(html.parser.HTMLParser):
    """Tags of a page, and the text of its JSON script"""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.json, self.inside = [], [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.inside = ("type", "application/json") in attrs

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, text):
        self.json += text if self.inside else ""


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
    batch = index.batch(np.array([example]), index.image[[example]])
    with evaluate.evaluating(run.model):
        maps = run.model(**batch, maps=(layer,)).maps[0]
    return maps.S_LV.softmax(dim=-1)[0], maps.S_VL.softmax(dim=-1)[0], batch


def test_the_page_holds_the_models_weights(page, toy_tree, pretrained):
    text = page.read_text()
    parsed = Page(text)
    assert not re.search(r"https?:|src=.//|<link|<iframe|@import|url[(]", text)
    assert {"img", "canvas"} & {*parsed.tags} == set() and parsed.tags.count("script") == 2
    assert len(text) < 3e6
    data = json.loads(parsed.json)
    assert len(data) == 12 and all(set(e["runs"]) == {"one", "two"} for e in data)
    for example in (0, 5):
        one = data[example]["runs"]["one"]
        assert one == data[example]["runs"]["two"] and one["heat"] is None
        for layer in range(len(one["S_LV"])):
            lv, vl, batch = weights_of(toy_tree, pretrained, example, layer)
            for ours, theirs in ((one["S_LV"], lv), (one["S_VL"], vl)):
                found = torch.tensor(ours[layer]) / 1000
                torch.testing.assert_close(found, theirs, atol=6e-4, rtol=0)
        assert torch.tensor(one["boxes"]).shape == batch["boxes"][0, :, :4].shape
        assert len(one["words"]) == batch["text"].shape[1] and one["words"][0] == "[CLS]"


def test_heat_maps_and_awkward_texts(toy_tree, tmp_path, monkeypatch):
    """A model of heat maps has one a caption; a caption that ends a script does not end it."""
    run(
        tmp_path,
        "--loss amc --model uniter --init none --steps 2 --out o",
        *QUICK,
        "--data",
        toy_tree,
    )
    real = evaluate.winoground_examples

    def awkward(*args):
        yield from (r._replace(text="</script><b>" + r.text) for r in real(*args))

    monkeypatch.setattr(evaluate, "winoground_examples", awkward)
    heated = evaluate.load_run(str(tmp_path / "o/last.pt"), toy_tree)
    (path,) = evaluate.attention_page({"amc": heated}, tmp_path, n=2)
    parsed = Page(path.read_text())
    data = json.loads(parsed.json)
    assert "b" not in parsed.tags and data[0]["text"].startswith("</script>")
    heat = np.array(data[0]["runs"]["amc"]["heat"])
    assert heat.shape == (32, 32) and 0 <= heat.min() and 900 <= heat.max() <= 1000


def test_the_page_of_a_large_model_is_small(toy_tree, pretrained, tmp_path):
    """As many captions as fit, at least one"""
    one = evaluate.load_run(str(pretrained[0]), toy_tree)
    sizes = []
    for most in (10**7, 30_000, 10):
        (path,) = evaluate.attention_page({"one": one}, tmp_path, most=most)
        sizes.append((len(json.loads(Page(path.read_text()).json)), path.stat().st_size))
    (whole, _), (some, letters), (least, _) = sizes
    assert whole == 12 > some > 1 == least and letters < 30_000 + len(evaluate.PAGE)


def test_a_model_without_maps_has_no_page(toy_tree, tmp_path):
    run(tmp_path, "--loss maf --steps 2 --out o --workers 0", "--data", toy_tree)
    phrases = evaluate.load_run(str(tmp_path / "o/last.pt"), toy_tree)
    with pytest.raises(evaluate.CheckpointError, match="does not have attention"):
        evaluate.attention_page({"maf": phrases}, tmp_path)


PROBE = """<script>
const out = [], seen = () => [...document.querySelectorAll(".run")].map(panel =>
  [...panel.querySelectorAll(".box, .word")].map(x => x.dataset.weight || ""));
const move = (x, how) => x.dispatchEvent(new MouseEvent("mouse" + how));
const point = x => { move(x, "enter"); out.push(seen()); move(x, "leave"); out.push(seen()); };
const start = performance.now();
draw();
out.push(performance.now() - start);
el("layer").value = 0; el("head").value = 2; draw();
point(document.querySelectorAll(".word")[2]);
point(document.querySelectorAll(".box")[1]);
el("head").value = 0; draw();
point(document.querySelectorAll(".word")[2]);
document.title = "done";
document.body.appendChild(document.createElement("pre")).textContent = JSON.stringify(out);
</script>"""


# what of a browser the page asks for, so that its script runs in Node too
DOCUMENT = """
class Element {
  constructor(tag) {
    Object.assign(this, { tag, children: [], style: {}, dataset: {}, className: "", value: "0" });
    this.textContent = "";
    this.classList = { add: () => {}, remove: () => {} };
  }
  appendChild(x) { this.children.push(x); return x; }
  replaceChildren() { this.children = []; }
  all() { return this.children.flatMap(x => [x, ...x.all()]); }
  querySelectorAll(names) {
    const wanted = names.split(", ").map(name => name.slice(1));
    return this.all().filter(x => wanted.includes(x.className));
  }
  dispatchEvent(event) { this["on" + event.type](); }
  getContext() { return { fillRect: () => {} }; }
}
class MouseEvent { constructor(type) { this.type = type; } }
const named = {}, body = new Element("body"), document = {
  body,
  getElementById: id => named[id] = named[id] || body.appendChild(new Element(id)),
  createElement: tag => new Element(tag),
  querySelectorAll: names => body.querySelectorAll(names),
};
"""


@pytest.mark.parametrize("program", ["browser", "node"])
def test_pointing_at_words_and_regions(page, toy_tree, pretrained, program):
    """It shows the model's weights, and clears them again."""
    probed, text = page.with_name("probed.html"), page.read_text() + PROBE
    if program == "browser":
        if not BROWSER:
            pytest.skip("needs Chromium on the path")
        probed.write_text(text)
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        command.append(str(probed))
    else:
        if not shutil.which("node"):
            pytest.skip("needs Node on the path")
        scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
        given = f"document.getElementById('data').textContent = {json.dumps(Page(text).json)};"
        said = "console.log('<pre>' + body.children.at(-1).textContent + '</pre>')"
        probed = page.with_name("probed.js")
        probed.write_text("\n".join([DOCUMENT, given, *scripts, said]))
        command = ["node", str(probed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "<pre>" in done.stdout, done.stderr
    found = json.loads(re.search(r"<pre>(.*?)</pre>", done.stdout)[1])
    milliseconds, word, clear, box, cleared, mean, _ = found
    assert milliseconds < 1000
    lv, vl, batch = weights_of(toy_tree, pretrained, 0, 0)
    n_words = batch["text"].shape[1]
    for panel in range(2):
        numbers = lambda row: [float(x) for x in row if x]
        assert numbers(word[panel]) == pytest.approx(lv[1, 2].tolist(), abs=1e-3)
        assert numbers(box[panel]) == pytest.approx(vl[1, 1].tolist(), abs=1e-3)
        assert numbers(mean[panel]) == pytest.approx(lv[:, 2].mean(dim=0).tolist(), abs=1e-3)
        assert not any(clear[panel]) and not any(cleared[panel]) and len(word[panel]) > n_words
