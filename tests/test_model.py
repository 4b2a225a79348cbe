"""The encoder's promises (fused = written out, padding, tying) and what happens to checkpoints
good and bad.
"""

import json
import os
import pickle
import struct

import pytest
import torch
import torch.nn.functional as F

import losses
import model as parts
from model import (
    SIZES,
    Attention,
    CheckpointError,
    Uniter,
    load_pretrained,
    build,
    gradcam_layer,
    read_checkpoint,
)

TINY = dict(width=32, layers=2, heads=4, mlp_dim=64)


def tiny(**changes):
    torch.manual_seed(0)
    return Uniter(50, 16, 7, **{**TINY, **changes}).eval()


def batch(words=(5, 3, 7), regions=(4, 6, 1), seed=0):
    g = torch.Generator().manual_seed(seed)
    B, N, M = len(words), max(words), max(regions)
    corner = torch.rand(B, M, 2, generator=g) / 2
    return dict(
        text=torch.randint(5, 50, (B, N), generator=g),
        text_mask=torch.arange(N)[None] < torch.tensor(words)[:, None],
        regions=torch.rand(B, M, 16, generator=g),
        boxes=torch.cat([corner, corner + 0.3], -1),
        region_mask=torch.arange(M)[None] < torch.tensor(regions)[:, None],
    )


def test_fused_and_written_out_attention_agree():
    torch.manual_seed(0)
    attention, x, mask = (
        Attention(32, 4),
        torch.randn(3, 9, 32, requires_grad=True),
        torch.arange(9)[None] < torch.tensor([[9], [4], [1]]),
    )
    plain, *none = attention(x, x, mask)
    written, S, P = attention(x, x, mask, need_maps=True)
    assert none == [None, None] and S.shape == (3, 4, 9, 9)
    torch.testing.assert_close(P, losses.masked_softmax(S, mask))
    q, k, v = (attention.split(f(x)) for f in (attention.to_q, attention.to_k, attention.to_v))
    fused = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
    fused = attention.to_out(fused.transpose(1, 2).flatten(2))
    wanted = torch.autograd.grad(fused.square().sum(), x)[0]
    for out in (plain, written):
        torch.testing.assert_close(out, fused)
        grad = torch.autograd.grad(out.square().sum(), x)[0]
        torch.testing.assert_close(grad, wanted, atol=1e-5, rtol=1e-4)


def test_padding_changes_nothing():
    model, b = tiny(), batch()
    wide = {
        k: torch.nn.functional.pad(
            v, (0, 0, 0, 3) if v.dim() == 3 else (0, 3), value=False if v.dtype == torch.bool else 1
        )
        for k, v in b.items()
    }
    one, two = (model(**x, heads=("match",), maps=(-1,)) for x in (b, wide))
    torch.testing.assert_close(one.match, two.match)
    torch.testing.assert_close(one.words[b["text_mask"]], two.words[:, :7][b["text_mask"]])
    torch.testing.assert_close(one.regions[b["region_mask"]], two.regions[:, :6][b["region_mask"]])
    alone = model(
        **{k: v[1:2, :3] if k.startswith("text") else v[1:2] for k, v in b.items()},
        heads=("match",),
    ).match
    torch.testing.assert_close(alone[0], one.match[1])


def test_only_what_is_asked_for_comes_back():
    out = tiny()(**batch())
    assert out.maps == () and all(
        getattr(out, f) is None
        for f in ("word_logits", "region_features", "region_logits", "pooled", "match", "rank")
    )
    out = tiny()(**batch(), heads=("rank",), maps=(0, -1))
    assert out.match is None and out.rank.shape == (3,) and len(out.maps) == 2


def test_maps_carry_gradient_and_are_taken_before_dropout():
    model = tiny(dropout=0.5).train()
    torch.manual_seed(1)
    S = model(**batch(), maps=(0,)).maps[0]
    P = losses.joint_softmax(*S, batch()["text_mask"], batch()["region_mask"])
    torch.testing.assert_close((P[0].sum(-1) + P[1].sum(-1))[0, :, :5], torch.ones(4, 5))
    S.S_VV.sum().backward()
    assert model.layers[0].attention.to_q.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["uniter", "lxmert"])
def test_maps_and_gradcam_of_one_layer(kind):
    """Its logits and its probabilities, which belong together, without dropout, and are in the
    graph of the score.
    """
    torch.manual_seed(0)
    model = build(kind, "tiny", vocab=50, features=16, classes=7, dropout=0.5).train()
    b, layers = batch(), model.layers if kind == "uniter" else model.cross_layers
    out = model(**b, heads=("match",), maps=(gradcam_layer(layers), -1), need_gradcam=True)
    S, (P, block_of) = out.maps[0], out.gradcam
    wanted = losses.masked_softmax(S.S_LV, b["region_mask"])
    if kind == "uniter":
        wanted = losses.joint_softmax(*S, b["text_mask"], b["region_mask"])[1]
    real = b["text_mask"][:, None, :, None] & b["region_mask"][:, None, None]
    torch.testing.assert_close(block_of(P) * real, wanted * real)
    assert torch.autograd.grad(out.match.sum(), P)[0].abs().sum() > 0


def test_masked_regions_hide_their_feature_but_not_their_box():
    model, b = tiny(), batch()
    predict = lambda: model(**b, masked_regions=torch.tensor([1]), heads=("features",))
    before = predict().region_features
    b["regions"][0, 1] += 5
    torch.testing.assert_close(predict().region_features, before)
    b["boxes"][0, 1] = torch.tensor([0.9, 0.9, 1.0, 1.0])
    assert not torch.allclose(predict().region_features, before)


def test_sizes_are_the_papers():
    count = lambda m: sum(
        p.numel()
        for n, p in m.named_parameters()
        if "text_embedding.word" not in n
        and not n.startswith(("word_", "feature_", "class", "match", "rank"))
    )
    with torch.device("meta"):
        # UNITER footnote 12
        assert count(Uniter(28996, **SIZES["base"])) / 1e6 == pytest.approx(86, rel=0.03)
        assert count(Uniter(28996, **SIZES["large"])) / 1e6 == pytest.approx(303, rel=0.03)


@pytest.mark.parametrize("kind", ["uniter", "lxmert"])
def test_boxes_enter_around_their_middle(kind):
    box = build(kind, "tiny", vocab=50, features=16, classes=7).region_embedding.box
    middle = torch.tensor([0.4, 0.4, 0.6, 0.6, 0.2, 0.2, 0.04])[: box.in_features]
    torch.testing.assert_close(box(middle), torch.zeros(32))
    assert box(middle + 0.1).abs().max() > 1e-3


def test_width_that_heads_do_not_divide():
    with pytest.raises(ValueError, match="does not divide into 5 heads"):
        Attention(32, 5)


# ------------------------------------------------------------------------------------ checkpoints


def as_bert(model, gamma=True):
    """Our text part under BERT's names, gamma and beta as in the first files."""
    official = {
        "text_embedding.word.weight": "bert.embeddings.word_embeddings.weight",
        "text_embedding.position.weight": "bert.embeddings.position_embeddings.weight",
        "text_embedding.token_type.weight": "bert.embeddings.token_type_embeddings.weight",
        "pooler.weight": "bert.pooler.dense.weight",
        "pooler.bias": "bert.pooler.dense.bias",
    }
    out = {}
    for name, tensor in model.state_dict().items():
        if name in official:
            out[official[name]] = tensor
        elif name.startswith("layers."):
            _, i, rest = name.split(".", 2)
            for ours, theirs in (
                ("attention.to_q", "attention.self.query"),
                ("attention.to_k", "attention.self.key"),
                ("attention.to_v", "attention.self.value"),
                ("attention.to_out", "attention.output.dense"),
                ("attention_norm", "attention.output.LayerNorm"),
                ("fc1", "intermediate.dense"),
                ("fc2", "output.dense"),
                ("mlp_norm", "output.LayerNorm"),
            ):
                if rest.startswith(ours + "."):
                    rest = rest.replace(ours, theirs, 1)
                    break
            if gamma and "LayerNorm" in rest:
                rest = rest.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                    "LayerNorm.bias", "LayerNorm.beta"
                )
            out[f"bert.encoder.layer.{i}.{rest}"] = tensor
    return {**out, "cls.seq_relationship.weight": torch.zeros(2, 32)}


def write_safetensors(tensors, path):
    header, blobs, at = {"__metadata__": {"format": "pt"}}, [], 0
    for name, t in tensors.items():
        blob = t.contiguous().numpy().tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(t.shape),
            "data_offsets": [at, at + len(blob)],
        }
        blobs.append(blob)
        at += len(blob)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


@pytest.mark.parametrize("name, gamma", [("pytorch_model.bin", True), ("model.safetensors", False)])
def test_bert_checkpoints(tmp_path, name, gamma):
    source, target = tiny(), Uniter(50, 16, 7, **TINY)
    weights = as_bert(source, gamma)
    (write_safetensors if name.endswith("safetensors") else torch.save)(weights, tmp_path / name)
    report = load_pretrained(target, tmp_path / name)
    assert (
        report.unused == ["cls.seq_relationship.weight"]
        and "region_embedding.feature.weight" in report.missing
    )
    assert set(report.loaded) == {
        n
        for n in source.state_dict()
        if n.startswith(("layers", "pooler")) or n.startswith("text_embedding") and "norm" not in n
    }
    for n in report.loaded:
        torch.testing.assert_close(target.state_dict()[n], source.state_dict()[n])
    assert "missing" in str(report) and "unused: cls.seq_relationship.weight" in str(report)


def test_rank_head_starts_from_the_match_head_and_is_a_copy(tmp_path):
    weights = {k: v for k, v in tiny().state_dict().items() if not k.startswith("rank")}
    weights["match.weight"] = torch.arange(64.0).view(2, 32)
    torch.save(weights, tmp_path / "x.pt")
    model = tiny()
    load_pretrained(model, tmp_path / "x.pt")
    torch.testing.assert_close(model.rank.weight[0], torch.arange(32.0, 64.0))
    assert model.rank.weight.data_ptr() != model.match.weight[1:].data_ptr()


CUTS = "half", "less"


class Bomb:
    def __reduce__(self):
        return os.system, ("touch /tmp/nanoalign_bomb_went_off",)


def test_bad_checkpoints(tmp_path):
    model = tiny()
    for name, content in (
        ("a.pt", b""),
        ("b.pt", b"PK\x03\x04 half"),
        ("c.safetensors", b"\xff" * 20),
        ("d.safetensors", struct.pack("<Q", 2) + b"[]"),
        ("d.pt", pickle.dumps(Bomb())),
    ):
        (tmp_path / name).write_bytes(content)
    torch.save({"model": Bomb()}, tmp_path / "e.pt")
    torch.save([1, 2], tmp_path / "f.pt")
    torch.save({"model": [1]}, tmp_path / "i.pt")
    # one that fits and one that does not
    torch.save({"x": torch.zeros(2), "word_bias": torch.zeros(50)}, tmp_path / "g.pt")
    torch.save(tiny(width=64).state_dict(), tmp_path / "h.pt")
    write_safetensors(as_bert(model, False), tmp_path / "cut.safetensors")
    for name in ("h.pt", "cut.safetensors"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / f"half {name}").write_bytes(whole[: len(whole) // 2])
        (tmp_path / f"less {name}").write_bytes(whole[:-10])
    for name, match in (
        *((name, "cannot be read") for name in ("a.pt", "b.pt", "c.safetensors", "d.safetensors")),
        *((f"{cut} cut.safetensors", "cannot be read.*\n.*stopped half way") for cut in CUTS),
        *((f"{cut} h.pt", "cannot be read.*\n.*stopped half way") for cut in CUTS),
        ("d.pt", "refused"),
        ("e.pt", "refused"),
        ("missing.pt", "No such file"),
        ("", "Is a directory"),
        ("f.pt", "not a table"),
        ("i.pt", "not a table"),
        ("g.pt", "does not fit"),
        ("h.pt", r"\(50, 64\) in the file, \(50, 32\)"),
    ):
        with pytest.raises(CheckpointError, match=match):
            load_pretrained(model, tmp_path / name)
    assert not os.path.exists("/tmp/nanoalign_bomb_went_off")
    plain = dict(model={}, optimizers=[], step=3, config={}, sizes={"size": "tiny"})
    plain["margins"] = torch.zeros(3)
    torch.save(plain, tmp_path / "own.pt")
    assert read_checkpoint(tmp_path / "own.pt").sizes == {"size": "tiny"}
    for change in ({"step": "3"}, {"config": None}, {"sizes": [1]}, {"margins": {}}):
        torch.save(plain | change, tmp_path / "own.pt")
        with pytest.raises(CheckpointError, match="not a training file"):
            read_checkpoint(tmp_path / "own.pt")
    with pytest.raises(CheckpointError, match="not a training file"):
        read_checkpoint(tmp_path / "g.pt")


@pytest.mark.parametrize("kind", ["uniter", "lxmert"])
def test_patches_begin_from_regions(tmp_path, kind):
    """All but what sees: the stem, and what stands for a patch or is predicted of it"""
    torch.manual_seed(0)
    regions = build(kind, "toy", vocab=40, features=16, classes=9)
    patches = build(kind, "toy", vocab=40, features=48, classes=12, patch=4)
    start = {name: tensor.clone() for name, tensor in patches.state_dict().items()}
    file = dict(regions.state_dict())
    if kind == "uniter":
        # as in UNITER's own files: one row for regions that are not masked
        rows = file.pop("region_embedding.mask").expand(2, -1)
        file["uniter.img_embeddings.mask_embedding.weight"] = rows
    torch.save(file, tmp_path / "regions.pt")
    report = load_pretrained(patches, tmp_path / "regions.pt")
    sees = "region_embedding.feature.", *parts.ABOUT_FEATURES
    for name, tensor in patches.state_dict().items():
        of_regions = regions.state_dict().get(name)
        wanted = start[name] if name.startswith(sees) else of_regions
        assert torch.equal(tensor, wanted), name
        assert (name in report.missing) == name.startswith(sees)
    # but a detector's features of another width are an error, and so is the way back
    torch.save(start, tmp_path / "patches.pt")
    with pytest.raises(CheckpointError, match="does not fit"):
        load_pretrained(regions, tmp_path / "patches.pt")
    wider = build(kind, "toy", vocab=40, features=20, classes=9)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_pretrained(wider, tmp_path / "regions.pt")


@pytest.mark.parametrize("kinds", [("uniter", "albef"), ("albef", "lxmert")])
def test_another_kind_of_model_is_refused(tmp_path, kinds):
    """BERT's words and their norm are in all of them, and fit: a start from these alone is an
    error, not a run of days from nothing."""
    saved, model = (build(kind, "toy", vocab=40, patch=8) for kind in kinds)
    torch.save(saved.state_dict(), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"does not fit.* unknown, \d+ fit"):
        load_pretrained(model, tmp_path / "x.pt")


@pytest.mark.parametrize("kind", ["uniter", "lxmert"])
def test_scores_are_float32_under_autocast(kind):
    """bf16 knows 1/64 between 2 and 4: scores of it tie, and a tie is wrong."""
    torch.manual_seed(0)
    model = build(kind, "tiny", vocab=30, features=16, classes=7, head="answers", answers=3).eval()
    mask = torch.ones(4, 6, dtype=torch.bool)
    x = torch.randint(30, (4, 6)), mask, torch.randn(4, 6, 16), torch.rand(4, 6, 4), mask
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model(*x, heads=("match", "rank", "task"))
    for score in (out.match, out.rank, out.scores):
        assert score.dtype == torch.float32
        # more than bf16 can say
        assert (score != score.bfloat16().float()).any()


def test_embeddings_drop_out_after_their_norm():
    """What is dropped is exactly 0 in the next layer's input, and what stays is scaled [BERT]."""
    torch.manual_seed(0)
    words = parts.TextEmbedding(9, 64, dropout=0.5)
    text = torch.arange(9)[None]
    whole, x = words.eval()(text), words.train()(text)
    dropped = x == 0
    assert 0.3 < dropped.float().mean() < 0.7
    torch.testing.assert_close(x[~dropped], 2 * whole[~dropped])
