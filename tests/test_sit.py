"""Facts about pretrain/sit.py (masks, crops and what else it shares with GMML: test_gmml.py)."""

import json
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torchvision.transforms.functional as tv
from conftest import blobs, load_script, log_of, run_here, write_pack
from PIL import Image
from torch.nn.functional import normalize

sit = load_script("pretrain/sit.py")
VIT = dict(img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3)


@pytest.fixture
def double(monkeypatch):
    """Everything in float64, also what the script asks to be float."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# Networks

@pytest.mark.parametrize("in_chans, total", [(3, 41_827_587), (1, 41_434_369)])
def test_parameters_at_default_size_and_the_start_of_both_heads(in_chans, total):
    config = {**sit.DEFAULTS, "in_chans": in_chans}
    torch.manual_seed(0)
    student = sit.SiT(sit.make_model(config, 0), in_chans, config["hidden_dim"], config["out_dim"])
    assert sum(p.numel() for p in student.parameters()) == total
    assert sum(p.numel() for p in student.cls_head.parameters()) == 19_423_488
    for head in (student.cls_head, student.rec_head.mlp):
        layers = [layer for layer in head if isinstance(layer, nn.Linear)]
        assert len(layers) == 3
        for layer in layers:
            assert not layer.bias.any() and abs(layer.weight.std() - 0.02) < 0.0002     # 0.01 is 5 sd


def test_contrast_equals_a_loop_over_images():
    generator = torch.Generator().manual_seed(2)
    student, keys = torch.randn(6, 7, generator=generator), torch.randn(2, 5, 7, generator=generator)
    own, total = [4, 0, 2], 0.0
    unit = lambda v: [x / math.sqrt(sum(y * y for y in v)) for x in v]
    for view in range(2):
        targets = [unit(key) for key in keys[1 - view].tolist()]
        for i in range(3):
            query = unit(student[3 * view + i].tolist())
            scores = [math.exp(sum(a * b for a, b in zip(query, key)) / 0.2) for key in targets]
            total -= math.log(scores[own[i]] / sum(scores)) / 3
    assert abs(float(sit.contrast(student, keys, torch.tensor(own), 0.2)) - 2 * 0.2 * total) < 1e-5


# Views

def blur(x, width):
    """x [C, S, S] by a Gaussian of this width, its weights normalised at the borders."""
    places = np.arange(x.shape[1])
    weights = np.exp(-((places - places[:, None]) / width) ** 2 / 2)
    weights /= weights.sum(1, keepdims=True)
    return torch.from_numpy(np.einsum("ij,cjk,lk->cil", weights, x.numpy(), weights))


@pytest.mark.parametrize("channels, cubic", [(1, True), (3, False)])
def test_the_strong_view_is_torchvisions(double, channels, cubic):
    n = 60
    generator = torch.Generator().manual_seed(5)
    images = torch.from_numpy(blobs(n * channels)).unflatten(0, (n, channels))
    u = torch.rand(n, sit.N_VIEW, generator=generator)
    config = dict(in_chans=channels, mean=[0.485] * channels, std=[0.229] * channels)
    got = sit.strong_view(images, u, (0.2, 1.0), 32, 0.4, 0.6, config, cubic)
    got = (got * 0.229 + 0.485) * 255
    (top, tall), (left, wide) = sit.crop_boxes(u, 40, 40, (0.2, 1.0))
    boxes = torch.stack([top, left, tall, wide], 1).int().tolist()
    interpolation = tv.InterpolationMode.BICUBIC if cubic else tv.InterpolationMode.BILINEAR
    for image, row, box, view in zip(images.double(), u.tolist(), boxes, got):
        flip, jitter, *strengths, blurred, width, grey, solarised = row[22:]
        x = tv.resized_crop(image, *box, [32, 32], interpolation).clamp(0, 255) / 255
        x = tv.hflip(x) if flip < 0.5 else x
        if jitter < 0.8:
            brightness, contrast, saturation, hue = (2 * np.array(strengths) - 1) * (0.4, 0.4, 0.2, 0.1)
            x = tv.adjust_contrast(tv.adjust_brightness(x, 1 + brightness), 1 + contrast)
            x = tv.adjust_hue(tv.adjust_saturation(x, 1 + saturation), hue)
        x = tv.rgb_to_grayscale(x, channels) if grey < 0.2 else x
        x = blur(x, 0.1 + 1.9 * width) if blurred < 0.4 else x
        sure = (x - 128 / 255).abs() > 0.001                            # of the side of the threshold
        x = tv.solarize(x, 128 / 255) if solarised < 0.6 else x
        assert (view - 255 * x).abs()[sure].max() < 0.1                 # torchvision rounds 0.299 to 0.2989


def test_fractions_of_the_corruption_are_those_of_the_released_code():
    config = {**sit.DEFAULTS, "batch": 100}
    uniforms, _, masks, replaced = sit.draw_step(config, 3, torch.arange(101) % 100, 0, torch.device("cpu"))
    share = masks.double().mean((1, 2))                                 # within some 4 standard errors
    assert abs(share[~replaced].mean() - 0.511) < 0.004 and abs(share[replaced].mean() - 0.313) < 0.004
    assert uniforms.shape == (2, 101, sit.N_VIEW) and len(share) == 200 and 70 < replaced.sum() < 130


# Training

def plain_network(seed):
    """timm's transformer and both heads of PyTorch's own layers, from the weights that the seed gives."""
    torch.manual_seed(seed)
    vit = timm.create_model("vit_small_patch16_224", in_chans=1, num_classes=0, **VIT)
    weights = sit.SiT(vit, 1, 64, 16).state_dict()
    cls_head = nn.Sequential(
        nn.Linear(48, 64), nn.BatchNorm1d(64), nn.ReLU(),
        nn.Linear(64, 64), nn.BatchNorm1d(64), nn.GELU(),
        nn.Linear(64, 16), nn.BatchNorm1d(16, affine=False))
    mlp = nn.Sequential(
        nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 48), nn.GELU())
    rec_head = nn.ModuleDict(dict(mlp=mlp, convTrans=nn.ConvTranspose2d(48, 1, 8, 8)))
    network = nn.ModuleDict(dict(backbone=vit, cls_head=cls_head, rec_head=rec_head))
    network.load_state_dict(weights)
    return network


def forward(network, x, scales):
    """CLS features, embeddings and reconstructions of images x; scales [depth, 2, B] of the branches."""
    vit = network["backbone"]
    tokens = torch.cat([vit.cls_token.expand(len(x), -1, -1), vit.patch_embed(x)], 1) + vit.pos_embed
    for block, (first, second) in zip(vit.blocks, scales):
        tokens = tokens + block.attn(block.norm1(tokens)) * first[:, None, None]
        tokens = tokens + block.mlp(block.norm2(tokens)) * second[:, None, None]
    tokens = vit.norm(tokens)
    grid = network["rec_head"]["mlp"](tokens[:, 1:]).transpose(1, 2).reshape(-1, 48, 4, 4)
    return tokens[:, 0], network["cls_head"](tokens[:, 0]), network["rec_head"]["convTrans"](grid)


def written_out_views(images, generator, config):
    """Clean and corrupted views, masks and scales of stochastic depth of a batch, an image at a time."""
    sizes = [sit.N_VIEW, 6, 2, 4 * sit.N_BLOCKS]
    u, depth, corruption, blocks = torch.rand(2, 10, sum(sizes), generator=generator).split(sizes, 2)
    blocks = blocks.unflatten(2, (-1, 4))
    clean = torch.stack([torch.cat([
        sit.strong_view(image[None, None], row[None], (0.2, 1.0), 32, *shares, config)
        for image, row in zip(images, rows)]) for rows, shares in zip(u, [(1.0, 0.0), (0.1, 0.2)])])
    corrupted, masks = clean.clone(), []
    for view in range(2):
        drawn, replaced = sit.draw_masks(corruption[view], blocks[view], 32, 0.5, 0.3, 1)
        masks.append(drawn)
        for i in range(10):
            spoilt = clean[view, (i + 1) % 10] if replaced[i] else torch.zeros(1, 32, 32)
            corrupted[view, i][:, drawn[i]] = spoilt[:, drawn[i]]
    scales = torch.ones(4, 2, 2, 10)                                    # block, branch, view, image
    for number in (1, 2, 3):                                            # the first block always stays
        for branch in range(2):
            skipped = depth[:, :, 2 * number - 2 + branch] < 0.1 * number
            scales[number, branch] = torch.where(skipped, 0, 1 / (1 - 0.1 * number))
    return clean, corrupted, torch.stack(masks), scales


def written_out(images, config):
    """8 steps in two epochs: student, teacher, lines of the log, rows of the last picture."""
    student, teacher, lines, sums = plain_network(11), plain_network(11), [], []
    groups = [[p for p in student.parameters() if (p.ndim > 1) == decayed] for decayed in (True, False)]
    optimizer = torch.optim.AdamW([dict(params=group) for group in groups])
    falling = lambda start, end, n: end + (start - end) * (1 + np.cos(np.pi * np.arange(n) / n)) / 2
    rates = np.concatenate([np.linspace(0, 0.05, 4), falling(0.05, 0.01, 4)]) * 10 / 256
    for step, (rate, decay, momentum) in enumerate(zip(rates, falling(4, 20, 8), falling(0.5, 1, 8))):
        order = np.random.default_rng([11, step // 4]).permutation(43)[step % 4 * 10:][:10]
        generator = torch.Generator().manual_seed(sit.step_seed(11, step))
        clean, corrupted, masks, scales = written_out_views(images[order], generator, config)
        with torch.no_grad():
            features, keys, _ = forward(teacher, clean.flatten(0, 1), torch.ones(4, 2, 20))
        _, queries, recon = forward(student, corrupted.flatten(0, 1), scales.flatten(2))
        keys, queries = normalize(keys).view(2, 10, 16), normalize(queries).view(2, 10, 16)
        scores = [queries[0] @ keys[1].T / 0.3, queries[1] @ keys[0].T / 0.3]
        contrast = -2 * 0.3 * sum(matrix.log_softmax(1).diagonal().mean() for matrix in scores)
        recon_loss = (recon - clean.flatten(0, 1)).abs()[masks.flatten(0, 1)[:, None]].mean()
        loss = contrast + 3 * recon_loss
        optimizer.zero_grad()
        loss.backward()
        for parameter in student.parameters():
            parameter.grad *= min(1, 0.05 / (float(parameter.grad.norm()) + 1e-6))
        optimizer.param_groups[0].update(lr=rate, weight_decay=decay)
        optimizer.param_groups[1].update(lr=rate, weight_decay=0)
        optimizer.step()
        for mean, new in zip(teacher.parameters(), student.parameters()):
            mean.data = momentum * mean.data + (1 - momentum) * new.data
        spread = (1 - normalize(features).mean(0).square().sum()).sqrt()
        sums.append([term.item() for term in (loss, contrast, recon_loss, spread)])
        if step in (2, 5, 7):
            terms = dict(zip(("loss", "contrast", "recon", "feature_std"), np.mean(sums, 0)))
            lines.append(dict(step=step + 1, epoch=1 + step // 4, **terms, lr=rate, wd=decay))
            sums = []
    with torch.no_grad():
        recon = forward(student.eval(), corrupted[0, :8], torch.ones(4, 2, 8))[2]
    restored = torch.where(masks[0, :8, None], recon, clean[0, :8])
    return student, teacher, lines, [clean[0, :8], corrupted[0, :8], recon, restored]


@pytest.mark.parametrize("micro", [0, 4])
def test_a_run_is_the_definition_written_out(tmp_path, monkeypatch, double, micro):
    """Order, views, masks, depth, both losses, clip, AdamW, teacher, log, picture, weights of 8 steps."""
    images = blobs(43)
    manifest = write_pack(tmp_path, images)
    run_here(sit, monkeypatch, "--manifest", manifest, "--out", tmp_path, "--model_args", json.dumps(VIT),
             "--device", "cpu", "--hidden_dim", 64, "--out_dim", 16, "--batch", 10, "--epochs", 2,
             "--warmup_epochs", 1, "--lr", 0.05, "--min_lr", 0.01, "--wd", 4, "--wd_end", 20, "--clip", 0.05,
             "--drop_path", 0.3, "--ema", 0.5, "--temperature", 0.3, "--recon_weight", 3, "--seed", 11,
             "--log_steps", 3, "--micro_batch", micro)
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    student, teacher, lines, rows = written_out(torch.from_numpy(images), last["config"])
    for whose, network in (("student", student), ("teacher", teacher)):
        for name, value in network.state_dict().items():
            assert (last[whose][name] - value).abs().max() < 1e-9, (whose, name)
    exported = torch.load(tmp_path / "backbone.pt", weights_only=True)["model"]
    assert all(torch.equal(value, last["teacher"][f"backbone.{name}"]) for name, value in exported.items())
    assert len(exported) == len(student["backbone"].state_dict())
    for line, wanted in zip(log_of(tmp_path), lines, strict=True):
        assert set(line) == {*wanted, "img_per_s", "time"}
        assert all(abs(line[key] - value) < 1e-9 for key, value in wanted.items()), (line, wanted)
    pixels = (torch.cat(rows) * 0.229 + 0.485).clamp(0, 1) * 255
    wanted = pixels.view(4, 8, 32, 32).transpose(1, 2).reshape(128, 256)
    picture = np.array(Image.open(tmp_path / "recon_0002.png").convert("L"), float)
    assert np.abs(picture - wanted.numpy()).max() <= 1


@pytest.mark.parametrize("arch, args", [("resnet18", "{}"), ("vit_medium_patch16_gap_256", '{"depth": 1}')])
def test_a_network_without_a_class_token_is_refused(tmp_path, monkeypatch, capsys, arch, args):
    manifest = write_pack(tmp_path, blobs(4))
    with pytest.raises(SystemExit) as stop:
        run_here(sit, monkeypatch, "--manifest", manifest, "--out", tmp_path / "run", "--device", "cpu",
                 "--batch", 4, "--arch", arch, "--model_args", args)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and line.startswith("error: ") and arch in line and "class token" in line
