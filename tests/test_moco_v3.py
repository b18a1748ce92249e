"""Facts about pretrain/moco_v3.py (its crops: test_gmml.py; its views but for their shares: test_sit.py)."""

import json
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from conftest import blobs, load_script, log_of, run_here, write_pack
from torch.nn.functional import normalize

moco = load_script("pretrain/moco_v3.py")
VIT = dict(img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3)


@pytest.fixture
def double(monkeypatch):
    """Everything in float64, also what the script asks to be float."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def config_of(**changes):
    return {**moco.DEFAULTS, "mean": [0.485], "std": [0.229], "img_size": 32, "model_args": VIT, **changes}


# Loss and schedule

@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_loss_equals_a_loop_over_queries_both_ways(temperature):
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 3, 5, generator=generator), torch.randn(2, 6, 5, generator=generator)
    own = torch.tensor([1, 3, 5])
    q, k = queries.double().numpy(), keys.double().numpy()
    cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    total = 0
    for mine, other in ((0, 1), (1, 0)):
        terms = []
        for i in range(3):
            scores = [math.exp(cosine(q[mine, i], key) / temperature) for key in k[other]]
            terms.append(-math.log(scores[own[i]] / sum(scores)))
        total += 2 * temperature * np.mean(terms)
    assert abs(float(moco.symmetric_loss(queries, keys, own, temperature)) - total) < 1e-6


def test_of_three_views_each_is_compared_with_another_never_with_itself():
    generator = torch.Generator().manual_seed(1)
    queries, keys = torch.randn(3, 4, 5, generator=generator), torch.randn(3, 4, 5, generator=generator)
    own = torch.arange(4)
    total = sum(float(moco.info_nce(queries[view], keys[other], own, 0.2)) for view, other in ((0, 2), (1, 0), (2, 1)))
    assert abs(float(moco.symmetric_loss(queries, keys, own, 0.2)) - total) < 1e-6


def test_a_third_view_in_a_copy_of_the_script_is_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(moco, "VIEWS", [*moco.VIEWS, (0.5, 0.0)])
    seen, loss = [], moco.symmetric_loss
    monkeypatch.setattr(moco, "symmetric_loss", lambda *args: seen.append(args[0].shape[:2]) or loss(*args))
    run_here(moco, monkeypatch, "--manifest", write_pack(tmp_path, blobs(8)), "--out", tmp_path, "--device", "cpu",
             "--model_args", json.dumps(VIT), "--hidden_dim", 64, "--out_dim", 16, "--batch", 8, "--epochs", 1)
    assert seen == [(3, 8)]


def test_the_rate_rises_in_equal_steps_that_begin_at_zero_and_then_falls():
    rates = [moco.learning_rate(step, 12, 1.0, 0.2, 4) for step in range(13)]
    assert np.allclose(rates[:5], [0, 0.25, 0.5, 0.75, 1], rtol=0, atol=1e-15)
    assert abs(rates[8] - 0.6) < 1e-12 and abs(rates[12] - 0.2) < 1e-12     # middle and end of the cosine
    assert moco.learning_rate(0, 12, 1.0, 0.2, 0) == 1


# Network

def test_parameter_counts_and_heads_at_default_size():
    config = {**moco.DEFAULTS, "in_chans": 3}
    backbone, _ = moco.make_backbone(config)
    model = moco.MoCo(backbone, config["hidden_dim"], config["out_dim"])
    count = lambda module: sum(p.numel() for p in module.parameters())
    assert count(model.base_encoder) == 41_080_704
    assert count(model.base_encoder.projector) == 19_415_040 and count(model.predictor) == 2_105_344
    assert {block.attn.num_heads for block in backbone.blocks} == {12}


@pytest.mark.parametrize("in_chans", [1, 3])
def test_the_patch_projection_is_uniform_within_0_0722_whatever_the_channels(in_chans):
    vit, note = moco.make_backbone({**moco.DEFAULTS, "in_chans": in_chans})
    kernel = vit.patch_embed.proj.weight.abs()
    assert 0.0721 < float(kernel.max()) < 0.0722 and abs(float(kernel.mean()) - 0.0361) < 0.001
    assert note == "random initialisation" and not vit.patch_embed.proj.bias.any()


def test_projection_and_positions_are_frozen_and_the_rest_is_trained():
    vit, _ = moco.make_backbone(config_of())
    frozen = {name for name, p in vit.named_parameters() if not p.requires_grad}
    assert frozen == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    vit, _ = moco.make_backbone(config_of(stop_grad_conv1=False))
    assert vit.patch_embed.proj.weight.requires_grad and not vit.pos_embed.requires_grad


def test_a_patch_projection_without_bias_is_taken_too():
    vit, _ = moco.make_backbone(config_of(arch="vit_base_patch16_clip_224"))
    assert vit.patch_embed.proj.bias is None and vit.norm_pre.weight.requires_grad


def test_q_k_and_v_are_initialised_as_three_layers():
    vit, _ = moco.make_backbone(config_of())
    bound = math.sqrt(6 / (48 + 48))
    assert 0.99 * bound < float(vit.blocks[0].attn.qkv.weight.detach().abs().max()) <= bound


def test_positions_equal_a_loop_over_the_grid():
    rows, columns, dim = 3, 4, VIT["embed_dim"]
    vit, _ = moco.make_backbone(config_of(model_args={**VIT, "img_size": [24, 32]}))
    table = vit.pos_embed
    assert table.shape == (1, 13, dim) and not table[0, 0].any()
    for r in range(rows):
        for c in range(columns):
            angles = [[place / 10000 ** (4 * i / dim) for i in range(dim // 4)] for place in (r, c)]
            expected = [f(a) for half in angles for f in (math.sin, math.cos) for a in half]
            assert np.allclose(table[0, 1 + r * columns + c].numpy(), expected, atol=1e-6)


# Training

def plain_mlp(*sizes):
    """Linear layers without bias and batch norm of PyTorch's own, ReLU between; the last norm: no affine."""
    layers = []
    for n_in, n_out in zip(sizes[:-2], sizes[1:-1]):
        layers += [nn.Linear(n_in, n_out, bias=False), nn.BatchNorm1d(n_out), nn.ReLU()]
    layers += [nn.Linear(sizes[-2], sizes[-1], bias=False), nn.BatchNorm1d(sizes[-1], affine=False)]
    return nn.Sequential(*layers)


def plain_network():
    """timm's transformer, projector and predictor, from the weights that seed 11 gives."""
    torch.manual_seed(11)
    weights = moco.MoCo(moco.make_backbone(config_of())[0], 64, 16).state_dict()
    vit = timm.create_model("vit_small_patch16_224", in_chans=1, num_classes=0, **VIT)
    encoder = nn.ModuleDict(dict(backbone=vit, projector=plain_mlp(48, 64, 64, 16)))
    network = nn.ModuleDict(dict(base_encoder=encoder, predictor=plain_mlp(16, 64, 16)))
    network.load_state_dict(weights)
    return network


def written_out(images, config, temperature):
    """8 steps in two epochs: trained network, momentum encoder, lines of the log."""
    network, average, lines, sums = plain_network(), plain_network()["base_encoder"], [], []
    vit = network["base_encoder"]["backbone"]
    for frozen in (vit.pos_embed, vit.patch_embed.proj.weight, vit.patch_embed.proj.bias):
        frozen.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], weight_decay=4)
    falling = lambda start, end, n: end + (start - end) * (1 + np.cos(np.pi * np.arange(n) / n)) / 2
    rates = np.concatenate([np.array([0, 0.25, 0.5, 0.75]) * 0.05, falling(0.05, 0.01, 4)]) * 10 / 256
    for step, (rate, momentum) in enumerate(zip(rates, falling(0.5, 1, 8))):
        order = np.random.default_rng([11, step // 4]).permutation(43)[step % 4 * 10:][:10]
        u = torch.rand(2, 10, moco.N_VIEW, generator=torch.Generator().manual_seed(moco.step_seed(11, step)))
        view = lambda image, row, *shares: moco.strong_view(
            image[None, None], row[None], (0.08, 1.0), 32, *shares, config, cubic=False)
        views = [torch.cat([view(*pair, 1.0, 0.0) for pair in zip(images[order], u[0])]),
                 torch.cat([view(*pair, 0.1, 0.2) for pair in zip(images[order], u[1])])]
        encoder = network["base_encoder"]
        queries = [network["predictor"](encoder["projector"](encoder["backbone"](view))) for view in views]
        with torch.no_grad():
            for mean, new in zip(average.parameters(), encoder.parameters()):
                mean.copy_(momentum * mean + (1 - momentum) * new)
            features = [average["backbone"](view) for view in views]
            keys = [average["projector"](feature) for feature in features]
        scores = [normalize(queries[mine]) @ normalize(keys[1 - mine]).T / temperature for mine in (0, 1)]
        loss = -2 * temperature * sum(matrix.log_softmax(1).diagonal().mean() for matrix in scores)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        p = scores[0].softmax(1)
        hits = [int(row.argmax()) == i for i, row in enumerate(p)]
        spread = (1 - normalize(features[0]).mean(0).square().sum()).sqrt()
        sums.append([loss.item(), -(p * p.log()).sum(1).mean().item(), sum(hits) / 10, spread.item()])
        if step in (2, 5, 7):
            terms = dict(zip(("loss", "entropy", "accuracy", "feature_std"), np.mean(sums, 0)))
            lines.append(dict(step=step + 1, epoch=1 + step // 4, **terms, lr=rate, ema=momentum))
            sums = []
    return network, average, lines


@pytest.mark.parametrize("micro, face, temperature", [
    (0, [], 0.2), (4, ["--variant", "paper"], 1.0), (1, ["--variant", "paper", "--temperature", 0.3], 0.3)])
def test_a_run_is_the_definition_written_out(tmp_path, monkeypatch, double, micro, face, temperature):
    """Order, views, queries, keys of the average before the step, loss, AdamW, log, weights of 8 steps."""
    images = blobs(43)
    manifest = write_pack(tmp_path, images)
    run_here(moco, monkeypatch, "--manifest", manifest, "--out", tmp_path, "--model_args", json.dumps(VIT),
             "--device", "cpu", "--hidden_dim", 64, "--out_dim", 16, "--batch", 10, "--epochs", 2,
             "--warmup_epochs", 1, "--lr", 0.05, "--min_lr", 0.01, "--wd", 4, "--ema", 0.5, "--seed", 11,
             "--log_steps", 3, "--micro_batch", micro, *face)
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    network, average, lines = written_out(torch.from_numpy(images), last["config"], temperature)
    for whose, plain in (("model", network), ("momentum_encoder", average)):
        for name, value in plain.state_dict().items():
            assert (last[whose][name] - value).abs().max() < 1e-9, (whose, name)
    exported = torch.load(tmp_path / "backbone.pt", weights_only=True)["model"]
    assert exported.keys() == network["base_encoder"]["backbone"].state_dict().keys()
    assert all(torch.equal(value, last["model"][f"base_encoder.backbone.{name}"])
               for name, value in exported.items())
    for line, wanted in zip(log_of(tmp_path), lines, strict=True):
        assert set(line) == {*wanted, "img_per_s", "time"}
        assert all(abs(line[key] - value) < 1e-9 for key, value in wanted.items()), (line, wanted)


@pytest.mark.parametrize("flags, fragments", [
    (["--arch", "resnet18", "--model_args", "{}"], ["resnet18", "class token"]),
    (["--arch", "swin_tiny_patch4_window7_224", "--model_args", "{}"], ["swin_tiny", "class token"]),
    (["--model_args", json.dumps({**VIT, "embed_dim": 42})], ["vit_small", "divisible by 4"]),
    (["--batch", 1], ["--batch 1", "2 to the 4 images"]),
])
def test_what_the_method_cannot_use_is_refused(tmp_path, monkeypatch, capsys, flags, fragments):
    manifest = write_pack(tmp_path, blobs(4))
    with pytest.raises(SystemExit) as stop:
        run_here(moco, monkeypatch, "--manifest", manifest, "--out", tmp_path / "run", "--device", "cpu",
                 "--batch", 4, "--model_args", json.dumps(VIT), "--hidden_dim", 64, "--out_dim", 16, *flags)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and line.startswith("error: "), line
    assert all(text in line for text in fragments), line
