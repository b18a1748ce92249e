"""Facts about pretrain/sit.py (its masks, views and blocks shared with GMML: test_gmml.py)."""

import math
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from conftest import blobs, load_script, log_of, run_here, run_script, write_pack

sit = load_script("pretrain/sit.py")
TINY = ["--model_args", '{"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}',
        "--hidden_dim", 64, "--out_dim", 16, "--device", "cpu", "--log-steps", 1, "--warmup_epochs", 1]


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return write_pack(tmp_path_factory.mktemp("pack"), blobs(60))


def train_here(monkeypatch, manifest, out, *flags):
    run_here(sit, monkeypatch, "--manifest", manifest, "--out", out, *TINY, *flags)


def tiny(seed=0, in_chans=1):
    torch.manual_seed(seed)
    vit = timm.create_model("vit_small_patch16_224", num_classes=0, in_chans=in_chans, img_size=32,
                            patch_size=8, embed_dim=48, depth=4, num_heads=3)
    return sit.SiT(vit, in_chans, 64, 16)


# Model

@pytest.mark.parametrize("in_chans, total", [(3, 41_827_587), (1, 41_434_369)])
def test_parameter_counts_at_default_size(in_chans, total):
    config = {**sit.DEFAULTS, "in_chans": in_chans}
    student = sit.SiT(sit.make_model(config, 0, 0.1), in_chans, config["hidden_dim"], config["out_dim"])
    assert sum(p.numel() for p in student.parameters()) == total
    assert sum(p.numel() for p in student.cls_head.parameters()) == 19_423_488


def test_contrastive_head_has_the_stated_layers():
    kinds = [(nn.Linear, 384, 4096), (nn.BatchNorm1d, 4096), (nn.GELU,),
             (nn.Linear, 4096, 4096), (nn.BatchNorm1d, 4096), (nn.GELU,),
             (nn.Linear, 4096, 256), (nn.BatchNorm1d, 256)]
    head = sit.ContrastiveHead(384)
    assert len(head) == len(kinds)
    for layer, (kind, *sizes) in zip(head, kinds):
        assert isinstance(layer, kind)
        if kind is nn.Linear:
            assert [layer.in_features, layer.out_features] == sizes and layer.bias is not None
        if kind is nn.BatchNorm1d:
            assert [layer.num_features] == sizes
    assert [layer.affine for layer in head if isinstance(layer, nn.BatchNorm1d)] == [True, True, False]


def test_heads_read_cls_and_patch_tokens_after_the_final_norm():
    model, x = tiny().eval(), torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    vit = model.backbone
    with torch.no_grad():
        embedding, recon = model(x)
        tokens = torch.cat([vit.cls_token.expand(3, -1, -1), vit.patch_embed(x)], 1) + vit.pos_embed
        tokens = vit.norm(vit.blocks(tokens))
        assert torch.allclose(embedding, model.cls_head(tokens[:, 0]), atol=1e-6)
        features = model.rec_head.mlp(tokens[:, 1:])
        weight, bias = model.rec_head.convTrans.weight, model.rec_head.convTrans.bias       # [D, C, 8, 8]
        for place in range(16):                                         # a 4 x 4 grid of patches
            top, left = place // 4 * 8, place % 4 * 8
            patch = torch.einsum("bd,dchw->bchw", features[:, place], weight) + bias[:, None, None]
            assert torch.allclose(recon[:, :, top:top + 8, left:left + 8], patch, atol=1e-5)


# Loss

def test_contrast_equals_a_loop_over_images():
    generator = torch.Generator().manual_seed(2)
    student, keys = torch.randn(10, 7, generator=generator), torch.randn(2, 5, 7, generator=generator)
    unit = lambda v: [x / math.sqrt(sum(y * y for y in v)) for x in v]
    total = 0.0
    for view in range(2):
        targets = [unit(key) for key in keys[1 - view].tolist()]
        for i in range(5):
            query = unit(student[5 * view + i].tolist())
            scores = [math.exp(sum(a * b for a, b in zip(query, key)) / 0.2) for key in targets]
            total -= math.log(scores[i] / sum(scores)) / 5
    loss = sit.contrast(student, list(keys), torch.arange(5), 0.2)
    assert abs(float(loss) - 2 * 0.2 * total) < 1e-5


def test_contrast_of_shares_averages_to_that_of_the_batch():
    generator = torch.Generator().manual_seed(3)
    student, keys = torch.randn(2, 6, 7, generator=generator), list(torch.randn(2, 6, 7, generator=generator))
    whole = sit.contrast(student.flatten(0, 1), keys, torch.arange(6), 0.2)
    shares = [sit.contrast(student[:, own].flatten(0, 1), keys, own, 0.2)
              for own in (torch.tensor([0, 2, 4]), torch.tensor([1, 3, 5]))]
    assert torch.allclose(whole, (shares[0] + shares[1]) / 2, atol=1e-6)


# Corruption and teacher

def test_dropped_blocks_are_zero_and_fractions_are_those_of_the_released_code():
    config = {**sit.DEFAULTS, "batch": 100, "img_size": 224, "mean": [0.485], "std": [0.229]}
    images = torch.randint(0, 256, (100, 1, 64, 64), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(4))
    plan = sit.plan_step(config, np.arange(100), 0, 0, 1)
    clean, corrupted, masks = sit.make_views(images[plan[0]], plan, config, 0, 1, torch.device("cpu"))
    replaced = torch.zeros(200, dtype=torch.bool)
    replaced[torch.cat([plan[1][0]["replaced"], 100 + plan[1][1]["replaced"]])] = True
    share = masks.double().mean((1, 2))                                     # within some 4 standard errors
    assert abs(share[~replaced].mean() - 0.511) < 0.004 and abs(share[replaced].mean() - 0.313) < 0.004
    for i in (~replaced).nonzero()[:, 0].tolist():
        assert (corrupted[i, 0][masks[i]] == 0).all()
        assert torch.equal(corrupted[i, 0][~masks[i]], clean[i, 0][~masks[i]])


def test_teacher_is_the_moving_average_of_the_student(pack, tmp_path, monkeypatch):
    flags, states = ["--batch", 10, "--epochs", 2, "--lr", 0.02, "--ema", 0.5], []
    for steps in (5, 6, 7):
        train_here(monkeypatch, pack, tmp_path, *flags, "--steps", steps)
        states.append(torch.load(tmp_path / "last.pt", weights_only=True))
    for before, after, step in zip(states, states[1:], (5, 6)):
        m = 1 - 0.5 * (1 + math.cos(math.pi * step / 12)) / 2               # 2 epochs of 6 steps
        for name, _ in tiny().named_parameters():
            wanted = m * before["teacher"][name] + (1 - m) * after["student"][name]
            assert torch.allclose(after["teacher"][name], wanted, atol=1e-6), name


def test_ema_runs_from_its_start_to_one():
    assert sit.cosine(0, 1000, 0.996, 1.0) == pytest.approx(0.996, abs=1e-12)
    assert sit.cosine(500, 1000, 0.996, 1.0) == pytest.approx(0.998, abs=1e-12)
    assert 1 - 1e-7 < sit.cosine(999, 1000, 0.996, 1.0) < 1
    teacher, student = tiny(1), tiny(2)
    before = [p.clone() for p in teacher.parameters()]
    sit.update_teacher(teacher, student, 0.9)
    for old, new, other in zip(before, teacher.parameters(), student.parameters()):
        assert torch.allclose(new, 0.9 * old + 0.1 * other, atol=1e-6)


# Whole runs

def test_a_run_is_the_definition_written_out(pack, tmp_path, monkeypatch):
    """Both losses, their sum with lambda, each gradient clipped, AdamW, then the teacher: 5 steps by hand.

    The clip takes gradients near Adam's epsilon: there their scale counts, and rounding noise does not.
    """
    seen, make_views = [], sit.make_views
    monkeypatch.setattr(sit, "make_views", lambda *args: seen.append([*make_views(*args)]) or seen[-1])
    train_here(monkeypatch, pack, tmp_path, "--batch", 10, "--samples", 30, "--epochs", 3, "--lr", 0.01,
               "--min_lr", 0.002, "--wd", 10, "--wd_end", 25, "--clip", 1e-5, "--drop_path", 0, "--ema", 0.5,
               "--steps", 5)
    student, teacher = tiny(), tiny()
    groups = [[p for p in student.parameters() if (p.ndim > 1) == decayed] for decayed in (True, False)]
    optimizer = torch.optim.AdamW([dict(params=group) for group in groups])
    falling = lambda start, end, n: end + (start - end) * (1 + np.cos(np.pi * np.arange(n) / n)) / 2
    rates = np.concatenate([np.linspace(0, 0.01, 3), falling(0.01, 0.002, 6)]) * 10 / 256   # 3 an epoch
    steps = zip(seen, rates, falling(10, 25, 9), falling(0.5, 1, 9), log_of(tmp_path))
    for (clean, corrupted, masks), rate, decay, momentum, line in steps:
        embedding, recon = student(corrupted)
        with torch.no_grad():
            keys = nn.functional.normalize(teacher(clean)[0])
        similarity = nn.functional.normalize(embedding) @ keys.T / 0.2                      # [20, 20]
        contrast = -sum(2 * 0.2 * block.log_softmax(1).diagonal().mean()
                        for block in (similarity[:10, 10:], similarity[10:, :10]))
        loss = contrast + 5 * (recon - clean).abs()[masks[:, None]].mean()
        optimizer.zero_grad()
        loss.backward()
        for parameter in student.parameters():
            parameter.grad *= min(1, 1e-5 / (float(parameter.grad.norm()) + 1e-6))
        for group, wd in zip(optimizer.param_groups, (decay, 0)):
            group.update(lr=rate, weight_decay=wd)
        optimizer.step()
        for mean, new in zip(teacher.parameters(), student.parameters()):
            mean.data = momentum * mean.data + (1 - momentum) * new.data
        assert abs(line["contrast"] - contrast.item()) < 2e-5 and abs(line["loss"] - loss.item()) < 2e-5
    assert len(seen) == 5
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    for whose, model in (("student", student), ("teacher", teacher)):
        for name, value in model.state_dict().items():
            # batch norm takes up a shift of its input: the gradients of biases before it are but rounding
            if not name.endswith(("running_mean", "cls_head.0.bias", "cls_head.3.bias", "cls_head.6.bias")):
                assert torch.allclose(last[whose][name], value, rtol=0, atol=2e-6), (whose, name)


def test_processes_do_not_change_the_weights(pack, tmp_path, monkeypatch):
    flags = ["--batch", 12, "--steps", 5, "--lr", 0.01, "--drop_path", 0.3, "--in_chans", 3]
    train_here(monkeypatch, pack, tmp_path / "one", *flags)
    result = run_script("pretrain/sit.py", "--manifest", pack, "--out", tmp_path / "three",
                        *TINY, *flags, nproc=3)
    assert result.returncode == 0, result.stderr
    one, three = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("one", "three"))
    for part in ("student", "teacher"):
        for key, value in one[part].items():
            # a bias before batch norm (whose mean takes it up) and that of attention's keys have no effect,
            # hence no gradient but rounding, of which AdamW makes whole steps
            if key in ("cls_head.0.bias", "cls_head.3.bias", "cls_head.6.bias") or "running_mean" in key:
                continue
            gap = (value - three[part][key]).abs()
            if key.endswith("qkv.bias"):
                gap = gap[[*range(48), *range(96, 144)]]
            assert gap.max() <= 1e-5, (part, key)
    for here, there in zip(log_of(tmp_path / "one"), log_of(tmp_path / "three"), strict=True):
        assert all(abs(here[term] - there[term]) < 2e-5
                   for term in ("loss", "contrast", "recon", "feature_std"))


def test_a_run_in_two_pieces_gives_the_same_bytes(pack, tmp_path, monkeypatch):
    flags = ["--batch", 10, "--epochs", 3, "--lr", 0.002, "--picture-epochs", 1, "--micro-batch", 5]
    train_here(monkeypatch, pack, tmp_path / "whole", *flags)
    train_here(monkeypatch, pack, tmp_path / "cut", *flags, "--steps", 8)  # within the second epoch
    (tmp_path / "cut/backbone.pt").unlink()
    train_here(monkeypatch, pack, tmp_path / "cut", *flags)
    for name in ("backbone.pt", "recon_0001.png", "recon_0003.png"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name
    assert ([line["loss"] for line in log_of(tmp_path / "whole")]
            == [line["loss"] for line in log_of(tmp_path / "cut")])


@pytest.mark.parametrize("export", ["teacher", "student"])
def test_the_chosen_backbone_loads_strictly_into_timm_without_this_project(
        pack, tmp_path, monkeypatch, export):
    train_here(monkeypatch, pack, tmp_path, "--batch", 10, "--steps", 3, "--lr", 0.02, "--export", export)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    exported = torch.load(tmp_path / "backbone.pt", weights_only=True)["model"]
    assert all(torch.equal(value, state[export][f"backbone.{name}"]) for name, value in exported.items())
    code = ("import sys, timm, torch; c = torch.load(sys.argv[1], weights_only=True); "
            "m = timm.create_model(c['arch'], in_chans=c['in_chans'], num_classes=0, **c['model_args']); "
            "m.load_state_dict(c['model'], strict=True); print(m(torch.zeros(1, 1, 32, 32)).shape[1])")
    if export == "teacher":
        result = subprocess.run([sys.executable, "-I", "-c", code, str(tmp_path / "backbone.pt")],
                                cwd=tmp_path, capture_output=True, text=True)
        assert result.stdout.strip() == "48", result.stderr


def test_both_losses_fall_and_features_do_not_collapse(pack, tmp_path, monkeypatch):
    train_here(monkeypatch, pack, tmp_path, "--batch", 20, "--epochs", 50, "--lr", 0.02,
               "--log-steps", 15, "--crop_scale", "[0.5, 1.0]")
    first, *_, last = log_of(tmp_path)
    assert (last["recon"] < 0.85 * first["recon"]
            and last["contrast"] < 0.85 * first["contrast"]), (first, last)
    assert last["feature_std"] > 0.1
