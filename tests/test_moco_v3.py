"""Facts about pretrain/moco_v3.py."""

import copy
import json
import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import blobs, load_script, log_of, run_here, run_script, write_pack

moco = load_script("pretrain/moco_v3.py")
MODEL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
TINY = ["--model_args", json.dumps(MODEL), "--device", "cpu", "--log-steps", 1, "--warmup_epochs", 0,
        "--hidden_dim", 64, "--out_dim", 16]


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return write_pack(tmp_path_factory.mktemp("pack"), blobs(40))


def config_of(**changes):
    return {**moco.DEFAULTS, "mean": [0.485], "std": [0.229], "img_size": 32, "exp": None,
            "model_args": MODEL, **changes}


def train_here(monkeypatch, pack, out, *flags):
    """A whole run; returns its log and what last.pt holds."""
    run_here(moco, monkeypatch, "--manifest", pack, "--out", out, *TINY, *flags)
    return log_of(out), torch.load(out / "last.pt", weights_only=True)


def worst_difference(a, b):
    """Largest difference of two state dicts, rounding noise that training blows up set aside.

    The softmax ignores key biases, and batch norm ignores a shift of its input, so the gradients of key
    biases and of the last norm's bias are nothing but rounding, which Adam scales to whole steps.
    """
    worst = 0
    for name in a:
        if name.endswith(("backbone.norm.bias", "projector.1.running_mean", "num_batches_tracked")):
            continue
        difference = (a[name].double() - b[name].double()).abs()
        if name.endswith("qkv.bias"):
            difference = difference.view(3, -1)[::2]
        worst = max(worst, float(difference.max()))
    return worst


# Loss

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


def test_entropy_and_accuracy_equal_loops():
    queries, keys = torch.randn(4, 5), torch.randn(4, 5)
    keys[2] = queries[2]
    entropy, accuracy = moco.retrieval(queries, keys, torch.arange(4), 0.2)
    similarity = torch.nn.functional.cosine_similarity(queries[:, None], keys[None], dim=2) / 0.2
    p = similarity.softmax(1)
    assert torch.allclose(entropy, -(p * p.log()).sum(1).mean(), atol=1e-6)
    assert abs(float(accuracy) - sum(int(row.argmax()) == i for i, row in enumerate(similarity)) / 4) < 1e-7


# Network

def test_parameter_counts_and_heads_at_default_size():
    config = {**moco.DEFAULTS, "in_chans": 3}
    backbone, _ = moco.make_backbone(config)
    model = moco.MoCo(backbone, config["hidden_dim"], config["out_dim"])
    count = lambda module: sum(p.numel() for p in module.parameters())
    assert (count(model.base_encoder), count(model.base_encoder.projector), count(model.predictor)) == \
        (41_080_704, 19_415_040, 2_105_344)
    assert {block.attn.num_heads for block in backbone.blocks} == {12}


def test_patch_projection_is_uniform_and_frozen_and_the_rest_is_trained():
    torch.manual_seed(0)
    vit, note = moco.make_backbone(config_of())
    bound = math.sqrt(6 / (1 * 8 * 8 + 48))
    kernel = vit.patch_embed.proj.weight
    assert note == "random initialisation" and not vit.patch_embed.proj.bias.any()
    assert 0.99 * bound < float(kernel.abs().max()) <= bound
    assert abs(float(kernel.std()) - bound / math.sqrt(3)) < 0.03 * bound
    frozen = {name for name, p in vit.named_parameters() if not p.requires_grad}
    assert frozen == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    vit, _ = moco.make_backbone(config_of(stop_grad_conv1=False))
    assert vit.patch_embed.proj.weight.requires_grad and not vit.pos_embed.requires_grad


def test_q_k_and_v_are_initialised_as_three_layers():
    vit, _ = moco.make_backbone(config_of())
    bound = math.sqrt(6 / (48 + 48))
    assert 0.99 * bound < float(vit.blocks[0].attn.qkv.weight.detach().abs().max()) <= bound


def test_positions_equal_a_loop_over_the_grid():
    rows, columns, dim = 3, 4, 16
    table = moco.sincos_positions(rows, columns, dim)
    assert table.shape == (1, 13, 16) and not table[0, 0].any()
    for r in range(rows):
        for c in range(columns):
            angles = [[place / 10000 ** (i / 4) for i in range(4)] for place in (r, c)]
            expected = [f(a) for half in angles for f in (math.sin, math.cos) for a in half]
            assert np.allclose(table[0, 1 + r * columns + c].numpy(), expected, atol=1e-6)


def test_queries_are_predictor_after_projector_with_statistics_of_one_view():
    torch.manual_seed(1)
    model = moco.MoCo(moco.make_backbone(config_of())[0], 64, 16)
    views = torch.randn(2, 6, 1, 32, 32)
    twin = copy.deepcopy(model)
    expected = torch.stack([twin.predictor(twin.base_encoder.projector(twin.base_encoder.backbone(view)))
                            for view in views])
    queries = model(views)
    assert torch.allclose(queries, expected, atol=1e-5)
    assert torch.allclose(queries.mean(1), torch.zeros(2, 16), atol=1e-5)   # the last norm has no affine part


def test_batch_norm_in_one_process_is_pytorchs():
    torch.manual_seed(0)
    ours, theirs, x = moco.SyncBatchNorm(5), torch.nn.BatchNorm1d(5), torch.randn(7, 5)
    for _ in range(2):
        assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.running_var, theirs.running_var)


def test_batch_norm_over_processes_is_pytorchs_over_the_whole_batch(tmp_path):
    """Outputs, gradients and running statistics, far from mean 0 where E[x^2] - E[x]^2 would lose digits.

    One gloo process takes the distributed way; the equality of 1 and 2 processes is tested
    on whole steps below.
    """
    torch.manual_seed(0)
    x, w = 100 + torch.randn(8, 5), torch.randn(8, 5)
    ours, theirs = moco.SyncBatchNorm(5), torch.nn.BatchNorm1d(5).double()
    mine, whole = x.clone().requires_grad_(), x.double().requires_grad_()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous",
                                         rank=0, world_size=1)
    try:
        y = ours(mine)
        (y * w).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    expected = theirs(whole)
    (expected * w).square().sum().backward()
    for a, b in ((y, expected), (mine.grad, whole.grad), (ours.weight.grad, theirs.weight.grad),
                 (ours.running_mean, theirs.running_mean), (ours.running_var, theirs.running_var)):
        assert torch.allclose(a.double(), b, rtol=1e-4, atol=1e-4)          # fp32 at 100


# Steps

def test_a_step_is_the_definition_written_out(pack, tmp_path, monkeypatch):
    """Queries, then the momentum encoder with weights from before the step, then AdamW: 2 steps by hand."""
    log, last = train_here(monkeypatch, pack, tmp_path, "--batch", 10, "--lr", 0.005, "--steps", 2)
    config, source = config_of(batch=10), np.load(pack.parent / "images.npy")
    torch.manual_seed(0)
    model = moco.MoCo(moco.make_backbone(config)[0], 64, 16)
    average = copy.deepcopy(model.base_encoder)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.04)
    for step in range(2):
        indices, uniforms, _ = moco.plan_step(config, moco.epoch_order(40, 0, 0), step, 0, 1)
        views = moco.make_views(torch.from_numpy(source[indices])[:, None], uniforms, config)
        queries = model(views)
        part = (1 + math.cos(math.pi * step / 1200)) / 2                    # 300 epochs of 4 steps
        momentum = 1 - 0.01 * part
        with torch.no_grad():
            for mean, new in zip(average.parameters(), model.base_encoder.parameters()):
                mean.copy_(momentum * mean + (1 - momentum) * new)
            keys = average(views)[0]
        loss = moco.symmetric_loss(queries, keys, torch.arange(10), 0.2)
        assert (abs(log[step]["loss"] - loss.item()) < 1e-5
                and abs(log[step]["lr"] - 0.005 * 10 / 256 * part) < 1e-12)
        optimizer.param_groups[0]["lr"] = 0.005 * 10 / 256 * part
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert worst_difference(last["model"], model.state_dict()) <= 1e-5
    assert worst_difference(last["momentum_encoder"], average.state_dict()) <= 1e-5
    fresh = moco.make_backbone(config)[0].state_dict()
    assert torch.equal(last["model"]["base_encoder.backbone.pos_embed"], fresh["pos_embed"])


def test_all_trained_parameters_decay_and_frozen_ones_do_not(pack, tmp_path, monkeypatch):
    _, last = train_here(monkeypatch, pack, tmp_path, "--batch", 10, "--steps", 1, "--lr", 0.02)
    torch.manual_seed(0)
    model = moco.MoCo(moco.make_backbone(config_of())[0], 64, 16)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    groups = last["optimizer"]["param_groups"]
    assert len(groups) == 1 and groups[0]["weight_decay"] == 0.04 and len(groups[0]["params"]) == len(trained)
    kernel = "base_encoder.backbone.patch_embed.proj.weight"
    assert torch.equal(last["model"][kernel], model.state_dict()[kernel])


def test_momentum_goes_from_its_start_to_one():
    values = [moco.cosine(step, 100, 0.99, 1.0) for step in (0, 50, 100)]
    assert np.allclose(values, [0.99, 0.995, 1.0], rtol=0, atol=1e-12)


def test_the_paper_face_has_temperature_one(pack, tmp_path, monkeypatch):
    losses = {}
    for name, flags in dict(paper=["--variant", "paper"], one=["--temperature", 1], default=[],
                            published=["--temperature", 0.2]).items():
        losses[name] = train_here(monkeypatch, pack, tmp_path / name, "--batch", 10, "--steps", 1,
                                  *flags)[0][0]["loss"]
    assert losses["paper"] == losses["one"] and losses["default"] == losses["published"] != losses["paper"]


def test_views_have_their_shares_of_blur_and_solarisation():
    config = config_of(batch=400)
    images = torch.randint(0, 256, (400, 1, 32, 32), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(2))
    _, uniforms, _ = moco.plan_step(config, np.arange(400), 3, 0, 1)
    uniforms[:, :, moco.N_CROP] = 1                                         # no jitter
    uniforms[:, :, moco.N_CROP + 10] = 0.5                                  # blur wide enough to be seen
    views = moco.make_views(images, uniforms, config)
    for view, u, least, most in zip(views, uniforms, (1, 0.20), (1, 0.36)):  # 1 - 0.9 * 0.8 = 0.28, 4 sd 0.09
        plain = moco.normalise(moco.random_resized_crop(images, u, (0.08, 1.0), 32, cubic=False), config)
        assert least <= (plain != view).flatten(1).any(1).float().mean() <= most


# Running

@pytest.mark.slow
def test_processes_do_not_change_the_weights(pack, tmp_path, monkeypatch):
    flags = ["--batch", 12, "--steps", 5, "--epochs", 4, "--lr", 0.01, "--in_chans", 3]
    log, one = train_here(monkeypatch, pack, tmp_path / "one", *flags)
    result = run_script("pretrain/moco_v3.py", "--manifest", pack, "--out", tmp_path / "three",
                        *TINY, *flags, nproc=3)
    assert result.returncode == 0, result.stderr
    three = torch.load(tmp_path / "three/last.pt", weights_only=True)
    for whose in ("model", "momentum_encoder"):
        assert worst_difference(one[whose], three[whose]) <= 1e-5, whose
    lines = log_of(tmp_path / "three")
    for key in ("loss", "entropy", "accuracy", "feature_std"):
        assert np.allclose([a[key] for a in log], [b[key] for b in lines], rtol=1e-4), key


def test_micro_batches_meet_the_keys_of_the_whole_batch(pack, tmp_path, monkeypatch):
    flags = ["--batch", 12, "--steps", 1, "--temperature", 1]
    whole = train_here(monkeypatch, pack, tmp_path / "whole", *flags)[0][0]
    parts = train_here(monkeypatch, pack, tmp_path / "parts", *flags, "--micro-batch", 4)[0][0]
    # among 4 keys alone the entropy could not exceed log 4; the norms see 4 images in place of 12
    assert (math.log(4) < parts["entropy"] <= math.log(12)
            and abs(parts["loss"] - whole["loss"]) < 0.1 * whole["loss"])


def test_backbone_is_the_trained_encoders_and_loads_strictly_without_this_project(
        pack, tmp_path, monkeypatch):
    _, last = train_here(monkeypatch, pack, tmp_path, "--batch", 20, "--epochs", 1, "--lr", 0.01)
    checkpoint = torch.load(tmp_path / "backbone.pt", weights_only=True)
    assert checkpoint["model_args"]["num_heads"] == 3
    assert all(torch.equal(value, last["model"][f"base_encoder.backbone.{name}"])
               for name, value in checkpoint["model"].items())
    code = ("import sys, timm, torch; c = torch.load(sys.argv[1], weights_only=True); "
            "m = timm.create_model(c['arch'], in_chans=c['in_chans'], num_classes=0, **c['model_args']); "
            "m.load_state_dict(c['model'], strict=True); print(m(torch.zeros(1, 1, 32, 32)).shape[1])")
    result = subprocess.run([sys.executable, "-I", "-c", code, str(tmp_path / "backbone.pt")], cwd=tmp_path,
                            capture_output=True, text=True)
    assert result.stdout.strip() == "48", result.stderr


def test_weights_of_a_run_are_a_start_for_the_next(pack, tmp_path, monkeypatch):
    _, last = train_here(monkeypatch, pack, tmp_path / "a", "--batch", 20, "--steps", 2, "--lr", 0.01)
    vit, note = moco.make_backbone(config_of(init=str(tmp_path / "a/last.pt")))
    assert "loaded" in note
    for name, value in vit.state_dict().items():
        assert torch.equal(value, last["model"][f"base_encoder.backbone.{name}"]), name


@pytest.mark.parametrize("flags, fragments", [
    (["--arch", "resnet18", "--model_args", "{}"], ["resnet18", "CLS token"]),
    (["--arch", "swin_tiny_patch4_window7_224", "--model_args", "{}"], ["swin_tiny", "CLS token"]),
    (["--model_args", json.dumps({**MODEL, "num_heads": 5})], ["timm cannot make", "num_heads"]),
    (["--model_args", json.dumps({**MODEL, "embed_dim": 42})], ["42 channels", "multiple of 4"]),
    (["--batch", 12, "--micro-batch", 5], ["--micro-batch 5", "12 images", "equal size"]),
    (["--batch", 4, "--micro-batch", 1], ["--micro-batch 1", "more than one image"]),
    (["--exp", "1"], ["row of sit", "pretrain/sit.py"]),
    (["--exp", "2"], ["unknown key 'temperatur'", "temperature"]),
])
def test_user_mistakes_get_one_sentence(pack, tmp_path, monkeypatch, capsys, flags, fragments):
    rows = tmp_path / "rows.yaml"
    rows.write_text('"1": {pretrain: {strategy: sit}}\n"2": {pretrain: {temperatur: 1}}\n')
    monkeypatch.setattr(sys, "argv", ["moco_v3.py", *map(str, [
        "--manifest", pack, "--out", tmp_path / "run", *TINY, "--experiments", rows, *flags])])
    with pytest.raises(SystemExit) as stop:
        moco.main()
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert (stop.value.code == 2 and line.startswith("error: ")
            and all(text in line for text in fragments)), line


@pytest.mark.slow
def test_the_loss_falls_and_queries_find_their_keys_without_collapse(tmp_path, monkeypatch):
    """40 stripes told apart by direction and period; the embeddings of a batch of 20 must tell them apart."""
    y, x = np.mgrid[:40, :40]
    images = [127.5 + 110 * np.sin(2 * np.pi / period * (x * np.cos(a) + y * np.sin(a)))
              for period in (3, 4.5, 7, 11, 18) for a in np.linspace(0, np.pi / 2, 8)]
    np.save(tmp_path / "images.npy", np.array(images).astype(np.uint8))
    pd.DataFrame({"path": [f"{i}.png" for i in range(40)]}).to_csv(tmp_path / "manifest.csv", index=False)
    log, _ = train_here(monkeypatch, tmp_path / "manifest.csv", tmp_path / "run",
                        "--batch", 20, "--epochs", 60, "--lr", 0.05, "--warmup_epochs", 2,
                        "--out_dim", 32, "--crop_scale", "[0.5, 1]")
    chance = 4 * 0.2 * math.log(20)                                     # two directions, times 2 temperature
    last = {key: np.mean([line[key] for line in log[-20:]]) for key in ("loss", "accuracy", "feature_std")}
    assert last["loss"] < 0.9 * chance and last["loss"] < 0.9 * log[0]["loss"], (chance, log[0], last)
    assert last["accuracy"] > 2 / 20 and last["feature_std"] > 0.4, last
