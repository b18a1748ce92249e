"""Facts about pretrain/dino.py and the views it shares with MoCo-v3."""

import copy
import json
import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import blobs, load_script, log_of, run_here, run_script, write_pack
from PIL import Image, ImageOps

dino = load_script("pretrain/dino.py")
MODEL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
HEAD = dict(out_dim=64, hidden_dim=32, bottleneck_dim=16)
TINY = ["--model_args", json.dumps(MODEL), "--device", "cpu", "--log-steps", 1, "--warmup_epochs", 0,
        *(word for key, value in HEAD.items() for word in (f"--{key}", value))]


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return write_pack(tmp_path_factory.mktemp("pack"), blobs(40))


def config_of(**changes):
    return {**dino.DEFAULTS, **HEAD, "mean": [0.485], "std": [0.229], "img_size": 32, "exp": None, **changes}


def vit(seed=0, **changes):
    torch.manual_seed(seed)
    model = timm.create_model("vit_small_patch16_224", num_classes=0, in_chans=1, **{**MODEL, **changes})
    model.patch_embed.strict_img_size = False
    return model


def train_here(monkeypatch, pack, out, *flags):
    """A whole run; returns its log and what last.pt holds."""
    run_here(dino, monkeypatch, "--manifest", pack, "--out", out, *TINY, *flags)
    return log_of(out), torch.load(out / "last.pt", weights_only=True)


# Loss, centre, temperatures

def test_loss_equals_a_loop_over_pairs_of_different_crops():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(10, 3, 7, generator=generator), torch.randn(2, 3, 7, generator=generator)
    centre = torch.randn(7, generator=generator)
    s, t, c = (x.double().numpy() for x in (student, teacher, centre))
    terms = []
    for i in range(2):
        for j in range(10):
            for b in range(3):
                if i != j:
                    p = np.exp((t[i, b] - c) / 0.04)
                    q = np.exp(s[j, b] / 0.1)
                    terms.append(-sum(p / p.sum() * np.log(q / q.sum())))
    assert len(terms) == 18 * 3
    loss = dino.dino_loss(student, dino.teacher_targets(teacher, centre, 0.04), 0.1)
    assert abs(float(loss) - np.mean(terms)) < 1e-4 * np.mean(terms)        # fp32


def test_the_loss_is_least_where_the_student_repeats_the_teacher():
    targets = torch.rand(2, 4, 9).softmax(-1)
    student = 0.1 * targets.log()[0].expand(10, -1, -1)
    targets = targets[:1].expand(2, -1, -1)
    entropy = torch.special.entr(targets).sum(-1).mean()
    assert torch.allclose(dino.dino_loss(student, targets, 0.1), entropy)


@pytest.mark.parametrize("first, last, n", [(0.04, 0.04, 0), (0.04, 0.07, 30), (0.04, 0.07, 1)])
def test_teacher_temperature_is_linear_by_epoch_then_constant(first, last, n):
    config = config_of(warmup_teacher_temp=first, teacher_temp=last, warmup_teacher_temp_epochs=n)
    expected = np.concatenate([np.linspace(first, last, n), np.full(50 - n, last)])
    assert np.allclose([dino.teacher_temperature(config, epoch) for epoch in range(50)], expected)


def test_a_step_is_the_definition_written_out(pack, tmp_path, monkeypatch):
    """Loss with the old centre, teacher and centre averaged afterwards, last layer still: 2 steps by hand."""
    flags = ["--batch", 10, "--drop_path", 0, "--lr", 0.05, "--clip", 0.01]
    log, last = train_here(monkeypatch, pack, tmp_path, *flags, "--steps", 2)
    config = config_of(batch=10)
    student = dino.DINO(vit(), **HEAD)
    teacher, centre, source = copy.deepcopy(student), torch.zeros(64), np.load(pack.parent / "images.npy")
    optimizer = torch.optim.AdamW(dino.decay_groups(student), lr=0.05 * 10 / 256)
    for step in range(2):
        indices, uniforms, _ = dino.plan_step(config, dino.epoch_order(40, 0, 0), step, 0, 1)
        images = torch.from_numpy(source[indices])[:, None]
        large, small = dino.make_crops(images, uniforms, 16, config)
        with torch.no_grad():
            teacher_logits = teacher([large])[0]
        loss = dino.dino_loss(student([large, small])[0],
                              dino.teacher_targets(teacher_logits, centre, 0.04), 0.1)
        assert abs(log[step]["loss"] - loss.item()) < 1e-5 * log[step]["loss"]
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in student.named_parameters():
            if "last_layer" in name:
                parameter.grad = None
            else:
                parameter.grad *= min(1, 0.01 / (float(parameter.grad.norm()) + 1e-6))
        for group in optimizer.param_groups:
            progress = step / 1200                                          # 300 epochs of 4 steps
            group["lr"] = (1e-6 + (0.05 - 1e-6) * (1 + math.cos(math.pi * progress)) / 2) * 10 / 256
        optimizer.param_groups[0]["weight_decay"] = (
            0.4 + (0.04 - 0.4) * (1 + math.cos(math.pi * progress)) / 2)
        optimizer.param_groups[1]["weight_decay"] = 0
        optimizer.step()
        momentum = 1 - 0.004 * (1 + math.cos(math.pi * progress)) / 2
        for mean, new in zip(teacher.parameters(), student.parameters()):
            mean.data = momentum * mean.data + (1 - momentum) * new.data
        centre = 0.9 * centre + 0.1 * teacher_logits.flatten(0, 1).mean(0)
    assert torch.allclose(last["centre"], centre, atol=1e-7) and float(centre.abs().max()) > 1e-3
    for whose, model in (("student", student), ("teacher", teacher)):
        for name, value in model.state_dict().items():
            # a key bias has no gradient but rounding, which Adam turns into whole steps
            kept = slice(None, 48) if name.endswith("qkv.bias") else slice(None)
            assert torch.allclose(last[whose][name][kept], value[kept], atol=1e-5), (whose, name)


def test_last_layer_is_still_in_the_first_epoch_and_its_lengths_are_one(pack, tmp_path, monkeypatch):
    names = [f"head.last_layer.parametrizations.weight.original{i}" for i in (0, 1)]
    fresh = dino.DINO(vit(), **HEAD).state_dict()
    flags = ["--batch", 10, "--lr", 0.05]
    first = train_here(monkeypatch, pack, tmp_path / "a", *flags, "--steps", 4)[1]["student"]
    assert all(torch.equal(first[name], fresh[name]) for name in names)
    assert not torch.equal(first["head.mlp.0.weight"], fresh["head.mlp.0.weight"])
    second = train_here(monkeypatch, pack, tmp_path / "a", *flags, "--steps", 5)[1]["student"]
    assert (torch.equal(second[names[0]], torch.ones(64, 1))
            and not torch.equal(second[names[1]], fresh[names[1]]))
    free = train_here(monkeypatch, pack, tmp_path / "b", *flags, "--steps", 5,
                      "--norm_last_layer", "false")[1]["student"]
    assert not torch.equal(free[names[0]], torch.ones(64, 1))


def test_momentum_goes_from_its_start_to_one():
    values = [dino.cosine(step, 100, 0.996, 1.0) for step in (0, 50, 100)]
    assert np.allclose(values, [0.996, 0.998, 1.0], rtol=0, atol=1e-12)
    teacher, student = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    kept = copy.deepcopy(teacher)
    dino.update_teacher(teacher, student, 1.0)
    assert torch.equal(teacher.weight, kept.weight)
    dino.update_teacher(teacher, student, 0.75)
    assert torch.allclose(teacher.bias, 0.75 * kept.bias + 0.25 * student.bias)


# Network

def test_parameter_counts_at_default_size():
    backbone = timm.create_model("vit_small_patch16_224", num_classes=0)
    keys = ("out_dim", "hidden_dim", "bottleneck_dim", "norm_last_layer")
    student = dino.DINO(backbone, **{key: dino.DEFAULTS[key] for key in keys})
    count = lambda model: sum(p.numel() for p in model.parameters())
    assert (count(student), count(student.head)) == (44_017_792, 22_352_128)
    assert sum(p.numel() for p in student.parameters() if not p.requires_grad) == 65_536


def bicubic_by_a_loop(grid, side, scale):
    """grid [h, h, D] at points (i + 0.5) * scale - 0.5 with the cubic of a = -0.75, edges repeated."""
    def kernel(t):
        t = abs(t)
        return ((1.25 * t - 2.25) * t * t + 1 if t < 1 else
                ((-0.75 * t + 3.75) * t - 6) * t + 3 if t < 2 else 0)
    h, result = len(grid), np.zeros((side, side, grid.shape[2]))
    for i in range(side):
        for j in range(side):
            y, x = (i + 0.5) * scale - 0.5, (j + 0.5) * scale - 0.5
            for m in range(math.floor(y) - 1, math.floor(y) + 3):
                for n in range(math.floor(x) - 1, math.floor(x) + 3):
                    result[i, j] += (kernel(y - m) * kernel(x - n)
                                     * grid[min(max(m, 0), h - 1), min(max(n, 0), h - 1)])
    return result


@pytest.mark.parametrize("h, side", [(14, 6), (8, 3), (4, 7)])
@pytest.mark.parametrize("by_scale", [False, True])
def test_positions_are_bicubic_without_antialias_by_size_or_by_scale(h, side, by_scale):
    table = torch.randn(1, 1 + h * h, 5, generator=torch.Generator().manual_seed(h))
    fitted = dino.fit_to_grid(table, side, by_scale)
    scale = h / (side + 0.1) if by_scale else h / side
    expected = bicubic_by_a_loop(table[0, 1:].view(h, h, 5).double().numpy(), side, scale)
    assert torch.equal(fitted[:, 0], table[:, 0])
    assert np.allclose(fitted[0, 1:].view(side, side, 5).numpy(), expected, atol=1e-5)
    assert dino.fit_to_grid(table, h, by_scale) is table


def test_student_features_are_timms_and_each_crop_size_is_one_pass():
    model = dino.DINO(vit(), **HEAD)
    torch.nn.init.normal_(model.backbone.cls_token)
    large, small = torch.randn(2, 3, 1, 32, 32), torch.randn(8, 3, 1, 16, 16)
    passes = []
    model.backbone.patch_embed.register_forward_hook(lambda module, args, output: passes.append(len(output)))
    logits, features = model([large, small])
    assert passes == [6, 24] and logits.shape == (10, 3, 64)
    assert torch.allclose(features[:2].flatten(0, 1), model.backbone(large.flatten(0, 1)), atol=1e-5)
    # a local crop alone, through timm's model of that size with the fitted positions
    local = vit(img_size=16)
    state = model.backbone.state_dict()
    state["pos_embed"] = dino.fit_to_grid(state["pos_embed"], 2)
    local.load_state_dict(state)
    assert torch.allclose(features[5], local(small[3]), atol=1e-5)


def test_logits_are_cosines_in_the_bottleneck():
    head = dino.DINOHead(48, 64, 32, 16, norm_last_layer=True)
    x = torch.randn(5, 48)
    rows = head.last_layer.parametrizations.weight.original1
    expected = torch.nn.functional.cosine_similarity(head.mlp(x)[:, None], rows[None], dim=2)
    assert torch.allclose(head(x), expected, atol=1e-6)


def test_attention_equals_timms_own():
    model = vit().eval()
    torch.nn.init.normal_(model.pos_embed)
    seen, attention = [], model.blocks[-1].attn
    attention.fused_attn = False
    attention.attn_drop.register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.randn(2, 1, 32, 32)
    model(x)
    assert torch.allclose(dino.cls_attention(model, x).flatten(2), seen[0][:, :, 0, 1:], atol=1e-6)


def test_feature_std_is_the_root_of_the_summed_variances():
    features = torch.randn(50, 8) + torch.arange(8)
    unit = features / features.norm(dim=1, keepdim=True)
    assert torch.allclose(dino.feature_std(features), unit.var(0, unbiased=False).sum().sqrt(), atol=1e-5)
    assert float(dino.feature_std(torch.ones(9, 4))) < 1e-3                 # root of the rounding of 1


# Views

def test_solarised_and_grey_views_equal_pillows():
    config = dict(mean=[0.0] * 3, std=[1 / 255] * 3, in_chans=3)            # normalise() gives pixels back
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(1))
    u = torch.full((4, dino.N_VIEW), 0.99)                                  # no jitter, no blur, no flip
    u[:, -1] = 0
    u[2:, -2] = 0.1
    u[:, 10:20] = 0.5                                                       # aspect 1: the whole image
    views = dino.strong_view(images, u, (1.0, 1.0), 32, 0.5, 0.5, config)
    for image, view, grey in zip(images, views, (False, False, True, True)):
        pixels = image.permute(1, 2, 0).numpy()
        if grey:
            pixels = np.repeat((pixels @ np.array([0.299, 0.587, 0.114]))[..., None], 3, 2)
            expected = np.where(pixels >= 128, 255 - pixels, pixels)
        else:
            expected = np.array(ImageOps.solarize(Image.fromarray(pixels), 128))
        assert np.allclose(view.permute(1, 2, 0).numpy(), expected, atol=1e-2)


def test_greyscale_does_nothing_to_grey_images():
    config, images = config_of(), torch.randint(0, 256, (6, 1, 40, 40), dtype=torch.uint8)
    u = torch.rand(6, dino.N_VIEW)
    other = u.clone()
    other[:, -2] = 1 - u[:, -2]
    views = [dino.strong_view(images, rows, (0.4, 1.0), 32, 0.5, 0.2, config) for rows in (u, other)]
    assert torch.equal(*views)


def test_crops_have_their_sizes_and_their_shares_of_blur_and_solarisation():
    config = config_of(batch=400)
    images = torch.randint(0, 256, (400, 1, 32, 32), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(2))
    _, uniforms, _ = dino.plan_step(config, np.arange(400), 3, 0, 1)
    uniforms[:, :, dino.N_CROP] = 1                                         # no jitter
    uniforms[:, :, dino.N_CROP + 10] = 0.5                                  # blur wide enough to be seen
    large, small = dino.make_crops(images, uniforms, 16, config)
    assert large.shape == (2, 400, 1, 32, 32) and small.shape == (8, 400, 1, 16, 16)

    def changed(view, crops, scale, blur, solarise):
        """Share of the crops that the augmentation beyond cropping changed."""
        plain = dino.random_resized_crop(images, uniforms[view], scale, crops.shape[-1])
        return (dino.normalise(plain, config)
                != crops[view if view < 2 else view - 2]).flatten(1).any(1).float().mean()

    sd = lambda p: math.sqrt(p * (1 - p) / 400)
    assert changed(0, large, (0.4, 1.0), 1.0, 0.0) == 1
    assert abs(changed(1, large, (0.4, 1.0), 0.1, 0.2) - 0.28) < 4 * sd(0.28)          # 1 - 0.9 * 0.8
    for view in range(2, 10):
        assert abs(changed(view, small, (0.05, 0.4), 0.5, 0.0) - 0.5) < 4 * sd(0.5)


@pytest.mark.parametrize("size, patch, expected", [
    (224, 16, 96), (64, 8, 24), (32, 8, 16), (64, 16, 32), (16, 16, 16)])
def test_local_crops_are_in_proportion_and_whole_patches(size, patch, expected):
    assert dino.local_crop_size(config_of(img_size=size), patch) == expected


# Running

def test_processes_and_micro_batches_do_not_change_the_weights(pack, tmp_path, monkeypatch):
    flags = ["--batch", 12, "--steps", 5, "--epochs", 4, "--lr", 0.002, "--drop_path", 0.3, "--in_chans", 3]
    log, one = train_here(monkeypatch, pack, tmp_path / "one", *flags)
    train_here(monkeypatch, pack, tmp_path / "micro", *flags, "--micro-batch", 5)
    result = run_script("pretrain/dino.py", "--manifest", pack, "--out", tmp_path / "three",
                        *TINY, *flags, nproc=3)
    assert result.returncode == 0, result.stderr
    for name in ("micro", "three"):
        other = torch.load(tmp_path / name / "last.pt", weights_only=True)
        assert torch.allclose(one["centre"], other["centre"], rtol=0, atol=1e-6), name
        for whose in ("student", "teacher"):
            worst = max(float((one[whose][key] - other[whose][key]).abs().max()) for key in one[whose])
            assert worst <= 1e-5, (name, whose)
        lines = log_of(tmp_path / name)
        for key in ("loss", "entropy", "batch_entropy", "feature_std"):
            assert np.allclose([a[key] for a in log], [b[key] for b in lines], rtol=1e-4), (name, key)


def test_the_attention_picture_has_a_row_an_image_and_a_column_a_head(pack, tmp_path, monkeypatch):
    train_here(monkeypatch, pack, tmp_path, "--batch", 10, "--steps", 1)
    with Image.open(tmp_path / "attention_0001.png") as picture:
        assert picture.size == (4 * 32, 8 * 32)                             # image and 3 heads, 8 images


def test_backbone_is_the_teachers_or_the_students_and_loads_strictly_without_this_project(
        pack, tmp_path, monkeypatch):
    code = ("import sys, timm, torch; c = torch.load(sys.argv[1], weights_only=True); "
            "m = timm.create_model(c['arch'], in_chans=c['in_chans'], num_classes=0, **c['model_args']); "
            "m.load_state_dict(c['model'], strict=True); print(m(torch.zeros(1, 1, 32, 32)).shape[1])")
    for whose in ("teacher", "student"):
        _, last = train_here(monkeypatch, pack, tmp_path / whose, "--batch", 20, "--epochs", 1,
                             "--lr", 0.05, "--export", whose)
        exported = torch.load(tmp_path / whose / "backbone.pt", weights_only=True)["model"]
        assert all(torch.equal(value, last[whose][f"backbone.{name}"]) for name, value in exported.items())
    assert not torch.equal(last["student"]["backbone.cls_token"], last["teacher"]["backbone.cls_token"])
    result = subprocess.run([sys.executable, "-I", "-c", code, str(tmp_path / "teacher/backbone.pt")],
                            cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.strip() == "48", result.stderr


def test_the_paper_face_is_positions_by_scale(pack, tmp_path, monkeypatch):
    first = {name: train_here(monkeypatch, pack, tmp_path / name, "--batch", 20, "--steps", 1,
                              "--variant", name)[0][0]["loss"]
             for name in ("paper", "corrected")}
    assert first["paper"] != first["corrected"] and math.isclose(*first.values(), rel_tol=0.05)


@pytest.mark.slow
def test_the_student_learns_to_predict_the_teacher_without_collapse(tmp_path, monkeypatch):
    """40 stripes told apart by brightness, period and contrast, all in each batch."""
    y, x = np.mgrid[:40, :40]
    images = [level + amplitude * np.sin(2 * np.pi / period * (x * np.cos(level) + y * np.sin(level)))
              for level in (30, 80, 130, 180, 225) for period in (5, 9, 16, 30) for amplitude in (15, 60)]
    np.save(tmp_path / "images.npy", np.clip(images, 0, 255).astype(np.uint8))
    pd.DataFrame({"path": [f"{i}.png" for i in range(40)]}).to_csv(tmp_path / "manifest.csv", index=False)
    log, _ = train_here(monkeypatch, tmp_path / "manifest.csv", tmp_path / "run",
                        "--batch", 40, "--epochs", 100, "--lr", 0.003, "--warmup_epochs", 20,
                        "--freeze_last_layer", 10, "--n_local_crops", 2, "--drop_path", 0, "--ema", 0.99,
                        "--wd_end", 0.04, "--out_dim", 256, "--hidden_dim", 128, "--bottleneck_dim", 64)
    first, last = ({key: np.mean([line[key] for line in lines]) for key in log[0]}
                   for lines in (log[:10], log[-10:]))
    # knowing nothing of the image, the student could at best reach the entropy of the mean target
    assert (first["loss"] > first["batch_entropy"]
            and last["loss"] < last["batch_entropy"] - 0.15), (first, last)
    assert last["loss"] - last["entropy"] < 0.6 * (first["loss"] - first["entropy"]), (first, last)
    # collapse to one output: batch_entropy 0; to the uniform one: entropy log(out_dim)
    assert last["batch_entropy"] > 0.5 * math.log(256) and last["entropy"] < 0.9 * math.log(256), last
    assert last["feature_std"] > 0.4, last
