"""The losses that came after the five papers: each against its definition in plain loops, then
padding, precision, edge cases.
"""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import evaluate
import losses
import train
from conftest import QUICK, argv, prepare, read, run, same, weights
from test_losses import prefix_mask, spoil


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


TEXT, REGION = prefix_mask([4, 2, 3]), prefix_mask([3, 5, 1])


def pair_of_states(dtype=torch.float64):
    return draw(3, 4, 6, dtype=dtype), draw(3, 5, 6, seed=1, dtype=dtype), TEXT, REGION


def logits_and_positives(dtype=torch.float64):
    positive = draw(3, 4, 5, seed=3) > 0.3
    return draw(3, 4, 5, seed=2, dtype=dtype), positive, TEXT, REGION


def edited_scores(dtype=torch.float64):
    kind = torch.tensor([0, 2, -1, 0, 2, 2, -1, 0])
    margins = torch.tensor([0.3, 0.5, 1.5], dtype=dtype)
    return draw(8, seed=4, dtype=dtype), draw(8, seed=5, dtype=dtype), kind, margins


def heat_maps(dtype=torch.float64):
    return tuple(draw(3, 4, 4, seed=s, dtype=dtype).sigmoid() for s in (6, 7))


INPUTS = {
    "sparc": pair_of_states,
    "mdetr_align": logits_and_positives,
    "hard_rank": edited_scores,
    "selfeq": heat_maps,
    "eqsim": lambda dtype=torch.float64: (draw(2, 4, 4, seed=8, dtype=dtype),),
}


def eqsim_by_hand(scores):
    text, image = [], []
    for s in scores.tolist():
        for i in range(len(s)):
            for j in range(i + 1, len(s)):
                text.append(((s[i][i] - s[i][j]) - (s[j][j] - s[j][i])) ** 2)
                image.append(((s[i][i] - s[j][i]) - (s[j][j] - s[i][j])) ** 2)
    return sum(text) / len(text) + sum(image) / len(image)


def cross_entropy(row, at):
    return -row[at] + math.log(sum(map(math.exp, row)))


def sparc_by_hand(words, regions, text_mask, region_mask, temperature=0.07):
    dot = lambda a, b: sum(x * y for x, y in zip(a, b))
    unit = lambda a: [x / math.sqrt(dot(a, a)) for x in a]
    pairs = []
    for w, v, n, m in zip(words.tolist(), regions.tolist(), text_mask.sum(1), region_mask.sum(1)):
        w, v, grouped = w[:n], v[:m], []
        for t in w:
            sim = [dot(t, r) for r in v]
            low, high = min(sim), max(sim)
            a = [(x - low) / (high - low) if high > low else 1 for x in sim]
            a = [x if x >= 1 / len(v) else 0 for x in a]
            c = [sum(x * r[d] for x, r in zip(a, v)) / sum(a) for d in range(len(t))]
            grouped.append(unit(c))
        S = [[dot(unit(t), c) / temperature for c in grouped] for t in w]
        rows = [cross_entropy(S[i], i) for i in range(len(S))]
        columns = [cross_entropy([row[i] for row in S], i) for i in range(len(S))]
        pairs.append(sum((a + b) / 2 for a, b in zip(rows, columns)) / len(S))
    return sum(pairs) / len(pairs)


def mdetr_by_hand(A, positive, text_mask, region_mask):
    sides = [[], []]
    for a, p, n, m in zip(A.tolist(), positive.tolist(), text_mask.sum(1), region_mask.sum(1)):
        rows = [r[:m] for r in a[:n]], [r[:m] for r in p[:n]]
        for side, (scores, chosen) in enumerate((rows, [list(zip(*x)) for x in rows])):
            for s, c in zip(scores, chosen):
                if any(c):
                    each = [cross_entropy(s, k) for k in range(len(s)) if c[k]]
                    sides[side].append(sum(each) / len(each))
    return sum(sum(x) / len(x) for x in sides) / 2


def hard_rank_by_hand(matched, edited, kind, margins):
    each = [max(0, float(e - m + margins[k])) for m, e, k in zip(matched, edited, kind) if k >= 0]
    return sum(each) / len(each)


def selfeq_by_hand(A, B, k=0.8):
    A, B = A.flatten().tolist(), B.flatten().tolist()
    R = [float(a + b >= k) for a, b in zip(A, B)]
    smooth = [0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5 for a, b in zip(A, B)]
    total = sum(smooth) / len(smooth)
    for x in (A, B):
        inside = [a * r for a, r in zip(x, R)]
        mean = sum(inside) / len(inside)
        std = math.sqrt(sum((a - mean) ** 2 for a in inside) / (len(inside) - 1))
        total += (std + max(0, k / 2 - sum(inside) / sum(R))) / 2
    return total


@pytest.mark.parametrize(
    "name, by_hand",
    [
        ("eqsim", eqsim_by_hand),
        ("sparc", sparc_by_hand),
        ("mdetr_align", mdetr_by_hand),
        ("hard_rank", hard_rank_by_hand),
        ("selfeq", selfeq_by_hand),
    ],
)
def test_definitions(name, by_hand):
    args = INPUTS[name]()
    plain = [x.detach() for x in args]
    assert getattr(losses, name)(*args).item() == pytest.approx(by_hand(*plain), rel=1e-9)


@pytest.mark.parametrize("name", INPUTS)
def test_precision_and_gradients(name):
    """float32 under autocast, the gradient is that of finite differences"""
    loss, args = getattr(losses, name), INPUTS[name](torch.float32)
    wanted = loss(*args)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss(*args), wanted)
    half = [x.bfloat16() if x.is_floating_point() else x for x in args]
    assert loss(*half).dtype == torch.float32 and loss(*half).isfinite()
    real = [x.detach().requires_grad_(x.is_floating_point()) for x in INPUTS[name]()]
    assert torch.autograd.gradcheck(loss, real)


@pytest.mark.parametrize("name, masked", [("sparc", 2), ("mdetr_align", 1)])
def test_rubbish_in_padding_changes_nothing(name, masked):
    loss, args = getattr(losses, name), [x.detach() for x in INPUTS[name]()]
    masks = {"sparc": (TEXT[..., None], REGION[..., None])}
    if name == "sparc":
        dirty = [torch.where(m, x, 1e4).requires_grad_() for x, m in zip(args, masks[name])]
    else:
        dirty = [spoil(args[0], TEXT, REGION, 300.0)]
        args[1] = args[1] | ~(TEXT[:, :, None] & REGION[:, None])
    a, b = loss(*args), loss(*dirty, *args[masked:])
    torch.testing.assert_close(a, b)
    real = masks.get(name, (TEXT[:, :, None] & REGION[:, None],))
    for gradient, mask in zip(torch.autograd.grad(b, dirty), real):
        assert not gradient.masked_fill(mask, 0).any() and gradient.any()


def test_edges():
    """Nothing to learn from is 0 with a gradient, never nan."""
    one = torch.zeros(3, 1, 1, requires_grad=True)
    assert losses.eqsim(one).item() == 0 and torch.autograd.grad(losses.eqsim(one), one)
    assert losses.eqsim(torch.eye(5)).item() == 0
    assert losses.eqsim(torch.randn(4, 5, 5), margin=1e6).item() == 0
    A, positive, text, region = logits_and_positives()
    none = losses.mdetr_align(A, torch.zeros_like(positive), text, region)
    assert none.item() == 0 and not torch.autograd.grad(none, A)[0].any()
    matched, edited, _, margins = edited_scores()
    none = losses.hard_rank(matched, edited, torch.full((8,), -1), margins)
    assert none.item() == 0 and not torch.autograd.grad(none, matched)[0].any()
    cold = torch.full((2, 4, 4), 0.1, requires_grad=True)
    value = losses.selfeq(cold, cold)
    assert value.item() == pytest.approx(0.4, abs=1e-4)
    assert torch.autograd.grad(value, cold)[0].isfinite().all()
    # words that are alike, regions that are alike
    same = torch.ones(2, 3, 4, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.bool)
    value = losses.sparc(same, same, mask, mask)
    assert value.item() == pytest.approx(math.log(3))
    assert torch.autograd.grad(value, same)[0].isfinite().all()


def test_sparc_finds_each_words_own_region():
    """Words that have a region each: next to nothing, and much once two share one"""
    eye, mask = torch.eye(4)[None], torch.ones(1, 4, dtype=torch.bool)
    assert losses.sparc(eye, eye, mask, mask).item() < 1e-4
    assert losses.sparc(eye, eye[:, [0, 0, 2, 3]], mask, mask).item() > 0.5


def test_margins_of_edits_are_the_mean_gaps_of_the_update_before():
    matched, edited, kind, margins = edited_scores()
    gaps = losses.edit_gaps(matched, edited, kind, margins)
    for k in range(3):
        own = kind == k
        mean = (matched - edited)[own].mean().clamp(0, 10) if own.any() else margins[k]
        assert gaps[k].item() == pytest.approx(mean.item())
    assert not gaps.requires_grad
    assert losses.edit_gaps(matched + 100, edited, kind, margins).tolist() == [10, 0.5, 10]
    assert losses.edit_gaps(matched - 100, edited, kind, margins).tolist() == [0, 0.5, 0]


def test_mdetr_is_the_logits_cross_entropy_where_each_has_one():
    """One word a region and one region a word: the mean of both cross-entropies"""
    A, mask, own = torch.randn(1, 4, 4), torch.ones(1, 4, dtype=torch.bool), torch.arange(4)
    wanted = (F.cross_entropy(A[0], own) + F.cross_entropy(A[0].T, own)) / 2
    found = losses.mdetr_align(A, torch.eye(4, dtype=torch.bool)[None], mask, mask)
    torch.testing.assert_close(found, wanted)


# --------------------------------------------------------------------------- in training


def prepared(toy_tree, how, *more):
    """What train.train() has before its first update, ready to be evaluated"""
    made = prepare(how, "--init none --data", toy_tree, *more, *QUICK)
    made.model.eval()
    return made


MARGINS = torch.tensor([0.3, 0.2, 0.1])


def check_scores(cfg, model, batch, score, rows, kind):
    """eqsim and hard-rank of an objective are those of pairs that are scored one by one. score
    (caption, image, edited) -> its score; rows: which are matched; kind: of their edits
    """
    torch.manual_seed(0)
    batch["margins"] = MARGINS
    with torch.no_grad():
        terms, _ = train.OBJECTIVES[batch["task"]](cfg, model, batch)
        matched = torch.tensor([score(r, r) for r in rows])
        pairs = [(rows[p], rows[p + 1]) for p in range(0, len(rows) // 2 * 2, 2)]
        s = torch.tensor([[[score(c, i) for c in pair] for i in pair] for pair in pairs])
        edited = torch.tensor([score(r, r, True) for r in rows])
    assert len(pairs) > 2 and (kind >= 0).any()
    torch.testing.assert_close(terms["eqsim"], losses.eqsim(s), rtol=1e-3, atol=1e-7)
    gaps = matched, edited, kind, MARGINS
    torch.testing.assert_close(terms["hard-rank"], losses.hard_rank(*gaps))
    wanted = losses.edit_gaps(*gaps)
    torch.testing.assert_close(batch["edit_gaps"], wanted, rtol=1e-3, atol=1e-6)
    return terms


@pytest.mark.parametrize("model", ["uniter", "lxmert"])
@pytest.mark.parametrize("head", ["rank", "match"])
def test_scores_of_exchanged_captions_and_of_edits(toy_tree, model, head):
    """Each pair scored by itself gives the two losses"""
    how = {"rank": "--recipe toy --candidates 0", "match": "--recipe toy-pretrain --pretrain itm"}
    more = f"--loss eqsim+hard-rank --batch-tokens 400 --model {model}"
    made = prepared(toy_tree, how[head], more)
    batch, pool = made.batch, made.batch.get("pool")
    x = pool.batch(pool.rows[:, 0], pool.images[:, 0]) if pool else batch["input"]
    rows = range(len(x["text"])) if pool else batch["matched"].tolist()

    def score(caption, image, edited=False):
        one = {k: x[k][[caption]] for k in ("text", "text_mask")}
        one |= {k: x[k][[image]] for k in ("regions", "boxes", "region_mask")}
        one |= {"text": batch["edited"][[caption]]} if edited else {}
        return evaluate.pair_scores(made.model(**one, heads=(head,)), head).item()

    check_scores(made.cfg, made.model, batch, score, rows, batch["edit_kind"][list(rows)])


def test_albef_takes_losses_on_scores_and_on_states(toy_tree):
    """Pairs scored by forward() one by one; words and patches by the projections"""
    how = "--loss eqsim+hard-rank+sparc+wra --batch-size 7 --queue 20"
    made = prepared(toy_tree, "--recipe toy-albef", how)
    model = made.model
    for stream in made.streams.train:
        batch = next(b for b in map(stream.__getitem__, range(20)) if b["flip"].any())
        text, mask, edited, kind = (batch[k] for k in ("text", "text_mask", "edited", "edit_kind"))
        changed = (text != edited).sum(dim=1)
        assert ((changed > 0) == (kind >= 0)).all() and (changed <= 2).all() and changed.any()
        pixels, alone = data.normalize_pixels(batch["pixels"]), torch.zeros(1, dtype=torch.int64)

        def score(caption, image, use_edited=False):
            words = (edited if use_edited else text)[[caption]]
            match = model(words, mask[[caption]], pixels[[image]], alone).match
            return (match[0, 1] - match[0, 0]).item()

        terms = check_scores(made.cfg, model, batch, score, range(7), kind)
        words = model.student.text_proj(model.student.read(text, mask))
        patches = model.student.vision_proj(model.student.vision(pixels)[:, 1:])
        whole = torch.ones(patches.shape[:2], dtype=torch.bool)
        for name in ("sparc", "wra"):
            wanted = train.LOSSES[name].function(words, patches, mask, whole)
            torch.testing.assert_close(terms[name], wanted)


def test_edited_captions(toy_tree):
    """One word exchanged with one of its kind, the same each time; opposites for relations."""
    made = prepared(toy_tree, "--recipe toy --candidates 0 --loss hard-rank")
    batch, (stream,), pool = made.batch, made.streams.train, made.batch["pool"]
    (edits,), tokenizer = stream.helpers["other_texts"], stream.index.tokenizer
    assert (stream[0]["edited"] == batch["edited"]).all()
    text, kinds = (
        pool.batch(pool.rows[:, 0], pool.images[:, 0])["text"],
        batch["edit_kind"].tolist(),
    )
    assert set(kinds) >= {0, 1}
    for before, after, kind in zip(text.numpy(), batch["edited"].numpy(), kinds):
        at = np.flatnonzero(before != after)
        assert len(at) == 0 if kind < 0 else 1 <= len(at) <= 2
        assert (edits.kind[before[at]] == kind).all() and (edits.kind[after[at]] == kind).all()
        if len(at) == 2:
            assert sorted(before[at]) == sorted(after[at])
    decode = lambda ids: " ".join(tokenizer.pieces[i] for i in ids)
    shapes, places = "a red square left of a blue star", "a red star right of a blue square"
    wanted = (shapes,), ("a blue star left of a red square",), (places,)
    for u in np.random.default_rng(0).random((200, 3)):
        ids = np.array(tokenizer("a red star left of a blue square"))
        kind = edits.edit(ids, u)
        assert decode(ids) in wanted[kind]
    ids = np.array(tokenizer("a a a"))
    assert edits.edit(ids, (0.5, 0.5, 0.5)) == -1 and decode(ids) == "a a a"


def test_margins_are_the_runs(toy_tree, tmp_path):
    """In the checkpoint are the gaps of the last update; the next one has them for margins."""
    args = "--recipe toy --init none --loss hard-rank --candidates 0 --batch-tokens 400 --steps 4"
    run(tmp_path, args, "--data", toy_tree, "--save-every 2 --out o", *QUICK)
    margins = torch.load(tmp_path / "o/last.pt", weights_only=True)["margins"]
    assert margins.shape == (3,) and (margins > 0).any() and (margins <= 10).all()
    gaps = [torch.tensor([1.0, 2, 3]), torch.tensor([3.0, 2, 1])]
    alone = train.Runtime(torch.device("cpu"), 0, 1, None)
    assert train.next_margins(alone, gaps, margins).tolist() == [2, 2, 2]
    assert torch.equal(train.next_margins(alone, [], margins), margins)


@pytest.mark.slow
def test_two_processes_have_the_same_pairs_and_margins(toy_tree, tmp_path):
    """Of the same batch, which is made in as many parts"""
    args = (
        "--recipe toy --init none --loss eqsim+hard-rank --candidates 0 --batch-tokens 300 --gpus 2"
    )
    args += " --steps 4 --warmup 1 --dropout 0 --align-schedule constant"
    for name, processes in (("one", 1), ("two", 2)):
        run(tmp_path, args, "--data", toy_tree, "--out", name, *QUICK, processes=processes)
    same(weights(tmp_path / "one"), weights(tmp_path / "two"), rtol=0, atol=1e-5)
    first, second = (torch.load(tmp_path / name / "last.pt")["margins"] for name in ("one", "two"))
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("how", ["--loss selfeq", "--loss selfeq --model uniter"])
def test_paraphrases(toy_tree, tmp_path, how):
    """Each text in other words, mirrored with its picture; of the same words the maps agree."""
    size = "--batch-size 24 --queue 48" if "uniter" not in how else "--batch-tokens 1024"
    made = prepared(toy_tree, how, size)
    others = json.loads((toy_tree / "vg/paraphrases.json").read_text())
    assert all(" in " in other and other != text for text, other in others.items())
    stream = next(s for s in made.streams.train if s.kind in ("itm", "albef"))
    index, batch, (add,) = stream.index, stream[0], stream.helpers["other_texts"]
    paraphrases = add.args[0]
    assert len(index) == len(paraphrases)
    strip = lambda text: text.replace("[CLS] ", "").replace(" [SEP]", "")
    texts = [[strip(x.decode(r)) for x in (index, paraphrases)] for r in range(0, len(index), 37)]
    assert sum(a != b for a, b in texts) > len(texts) / 3
    assert all(others.get(a, a) == b for a, b in texts)
    flip = batch.get("flip")
    assert flip is None or flip.any() and not flip.all()
    # heat maps of the text itself
    x = batch if "text" in batch else batch["input"]
    assert batch["paraphrase"]["text"].shape[0] == len(x["text"])
    batch["paraphrase"] = {name: x[name] for name in ("text", "text_mask")}
    terms, _ = train.OBJECTIVES[batch["task"]](made.cfg, made.model, batch)
    same_maps = train.heat_losses(made.cfg, A := torch.rand(5, 16), None, A)["selfeq"]
    assert same_maps.item() == pytest.approx(losses.selfeq(*2 * [losses.unit_range(A)]).item())
    assert terms["selfeq"].isfinite() and terms["selfeq"].item() < 1


def test_a_text_without_a_paraphrase_is_its_own(toy_tree, tmp_path):
    """It is counted; a file for other texts is an error."""
    for path in toy_tree.iterdir():
        if path.name != "vg":
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(toy_tree / "vg", tmp_path / "vg", ignore=shutil.ignore_patterns("VG_*"))
    texts = [r.text for r in read(data.vg_triplets, tmp_path, "train")[0]]
    path = tmp_path / "vg/paraphrases.json"
    path.write_text(json.dumps({texts[0]: "in other words"}))
    found, counted = read(data.vg_paraphrases, tmp_path, "train")
    others = [text if text != texts[0] else "in other words" for text in texts]
    assert [r.text for r in found] == others
    own = texts.count(texts[0])
    assert counted["texts without a paraphrase, which are their own"] == len(texts) - own
    path.write_text(json.dumps({"of another": "data set"}))
    with pytest.raises(data.DataError, match="none of the texts"):
        read(data.vg_paraphrases, tmp_path, "train")


@pytest.mark.parametrize(
    "how, wanted",
    [
        ("--loss eqsim --task vqa", "--task retrieval, or itm"),
        ("--loss hard-rank --recipe toy-align", "--task retrieval, or itm"),
        ("--loss mdetr-align --recipe toy", "multitask"),
        ("--loss selfeq --recipe toy", "texts with boxes"),
        ("--loss cacr --recipe toy-albef", "--model albef"),
    ],
)
def test_losses_say_what_they_need(toy_tree, how, wanted):
    with pytest.raises(train.UserError, match=wanted):
        train.parse(argv(how, "--data", toy_tree))


def test_a_region_is_positive_if_it_overlaps_the_pointer_by_a_half(monkeypatch):
    """Not if it merely touches it; a word that points twice has both. Masks are handed on."""
    boxes = torch.tensor(
        [[[0, 0, 0.5, 0.5], [0.2, 0.2, 0.7, 0.7], [0, 0, 0.5, 0.26], [0, 0, 1, 1]]]
    )
    x = {"boxes": boxes, "text_mask": torch.ones(1, 3, dtype=torch.bool)}
    x["region_mask"] = torch.tensor([[True, True, True, False]])
    batch = {
        "input": x,
        "aligned": torch.tensor([1, 1, 2]),
        "aligned_row": torch.zeros(3, dtype=int),
    }
    batch["pointer"] = torch.tensor([[0, 0, 0.5, 0.5], [0.2, 0.2, 0.7, 0.7], [0.9, 0.9, 1, 1]])
    seen = []
    row = train.LOSSES["mdetr-align"]
    take = lambda *args: seen.append(args) or torch.tensor(0.0)
    monkeypatch.setitem(train.LOSSES, "mdetr-align", row._replace(function=take))
    cfg = train.parse(["--recipe", "toy-align", "--loss", "mdetr-align", "--init", "none"])
    train.pointer_losses(cfg, torch.zeros(1, 3, 4), batch)
    ((_, positive, text_mask, region_mask),) = seen
    wanted = [[0, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert positive[0].int().tolist() == wanted
    assert text_mask is x["text_mask"] and region_mask is x["region_mask"]
