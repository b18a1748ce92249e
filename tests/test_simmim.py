"""Facts about pretrain/simmim.py, and its starts: SimMIM's published layouts."""

import json
import math
import re

import numpy as np
import pytest
import timm
import timm.scheduler
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as tv
from conftest import blobs, load_script, log_of, run_here, write_pack
from PIL import Image

simmim = load_script("pretrain/simmim.py")
VIT = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3)
BEIT = dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=True, init_values=0.1, global_pool="token")
SMALL = dict(                       # arch and model_args of small models of the three kinds, 64 pixels
    vit=("vit_small_patch16_224", dict(embed_dim=48, depth=2, num_heads=3)),
    beit=("beit_base_patch16_224", dict(embed_dim=48, depth=2, num_heads=3, **BEIT)),
    swin=("swin_base_patch4_window7_224",
          dict(window_size=2, embed_dim=12, depths=[1, 1, 2, 1], num_heads=[1, 2, 3, 4])))


def config_of(**changes):
    return {**simmim.DEFAULTS, "mean": [0.485], "std": [0.229], "exp": None, **changes}


def uniform(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def encoder_of(kind, in_chans=1, **changes):
    arch, model_args = SMALL[kind]
    kwargs = {"img_size": 64, **model_args, **changes}
    return timm.create_model(arch, num_classes=0, in_chans=in_chans, **kwargs)


def small(kind, in_chans=1):
    torch.manual_seed(0)
    return simmim.SimMIM(encoder_of(kind, in_chans), in_chans, 64)


# Masks, views and loss

@pytest.mark.parametrize("side, n_hidden", [(224, 30), (192, 22), (64, 3)])
def test_exactly_the_rounded_up_share_of_the_units_is_hidden(side, n_hidden):
    n = side // 32
    u = uniform(side, 400, n, n)
    masks = simmim.unit_masks(u, 0.6, 32)
    units = masks[:, ::32, ::32]
    assert masks.shape == (400, side, side) and (units.flatten(1).sum(1) == n_hidden).all()
    assert torch.equal(masks, torch.from_numpy(np.kron(units.numpy(), np.ones((32, 32), bool))))
    share = n_hidden / n ** 2               # every unit is hidden equally often: within 4.5 standard errors
    assert (units.float().mean(0) - share).abs().max() < 4.5 * math.sqrt(share * (1 - share) / 400)
    for row, hidden in zip(u.flatten(1).tolist(), units.flatten(1)):
        least = sorted(range(n * n), key=row.__getitem__)[:n_hidden]
        assert set(hidden.nonzero()[:, 0].tolist()) == set(least)


def test_masked_l1_equals_a_loop_over_pixels():
    recon, clean, masks = uniform(1, 2, 3, 5, 6), uniform(2, 2, 3, 5, 6), uniform(3, 2, 5, 6) < 0.4
    differences = []
    for b, y, x in masks.nonzero().tolist():
        differences += [abs(float(recon[b, c, y, x]) - float(clean[b, c, y, x])) for c in range(3)]
    wanted = sum(differences) / (len(differences) / 3 + 1e-5) / 3
    assert abs(float(simmim.masked_l1(recon, clean, masks)) - wanted) < 1e-6


def test_views_are_torchvisions_bilinear_crops_of_two_thirds_and_more():
    images, u = torch.from_numpy(blobs(12))[:, None], uniform(4, 12, simmim.N_CROP + 16)
    config = config_of(img_size=32, mask_unit=8, in_chans=3, mean=[0.5, 0.4, 0.3], std=[0.2, 0.2, 0.1])
    views, masks = simmim.make_views(images, u, config)
    begin, length = map(torch.stack, zip(*simmim.crop_boxes(u, 40, 40, (0.67, 1.0))))
    for i, (top, left, h, w) in enumerate(torch.cat([begin, length]).T.int().tolist()):
        assert h * w > 0.6 * 40 * 40                                    # 0.67, and sides are rounded
        crop = tv.resized_crop(images[i].float(), top, left, h, w, [32, 32])
        crop = crop.flip(2) if u[i, 22] < 0.5 else crop
        wanted = tv.normalize(crop.expand(3, -1, -1) / 255, config["mean"], config["std"])
        assert torch.allclose(views[i], wanted, atol=1e-4)
        units = u[i, 23:].tolist()
        hidden = [value <= sorted(units)[9] for value in units]         # 10 of 16
        assert masks[i, ::8, ::8].flatten().tolist() == hidden


# Model

@pytest.mark.parametrize("kind, in_chans", [("vit", 1), ("beit", 3), ("swin", 1)])
def test_hidden_pixels_leave_no_trace_and_shown_ones_do(kind, in_chans):
    model = small(kind, in_chans).eval()
    x, other = uniform(5, 2, in_chans, 64, 64), uniform(6, 2, in_chans, 64, 64)
    masks = simmim.unit_masks(uniform(7, 2, 2, 2), 0.6, 32)
    with torch.no_grad():
        recon = model(x, masks)
        assert recon.shape == x.shape
        assert torch.equal(recon, model(torch.where(masks[:, None], other, x), masks))
        assert not torch.allclose(recon, model(torch.where(masks[:, None], x, other), masks))
        model.mask_token.zero_()
        assert not torch.allclose(recon, model(x, masks))
    assert not model.encoder.patch_embed._forward_hooks                 # the encoder alone is timm's again


@pytest.mark.parametrize("arch, model_args, size, encoder, decoder", [
    ("beit_base_patch16_224", BEIT, 224, 85_666_128, 590_592),
    ("swin_base_patch4_window7_224", {"window_size": 6}, 192, 86_725_304, 3_148_800)])
def test_parameter_counts_at_default_size(arch, model_args, size, encoder, decoder):
    with torch.device("meta"):
        facts = config_of(arch=arch, model_args=model_args, img_size=size, in_chans=3)
        model = simmim.SimMIM(simmim.make_model(facts, 0), 3, size)
    assert sum(p.numel() for p in model.decoder.parameters()) == decoder
    assert sum(p.numel() for p in model.encoder.parameters()) + model.mask_token.numel() == encoder
    assert not any(isinstance(module, timm.layers.DropPath) for module in model.modules())  # 0 means none


# Starts

def published(encoder):
    """A checkpoint as SimMIM's release writes that of a BEiT, ViT or Swin of timm: names and layout."""
    state = {}
    for name, value in encoder.state_dict().items():
        name = re.sub(r"ls(\d)\.gamma", r"gamma_\1", name)
        if re.match(r"blocks.*qkv\.bias", name):                        # of a plain ViT
            q, _, v = value.chunk(3)
            state |= {name.replace("qkv.bias", "q_bias"): q, name.replace("qkv.bias", "v_bias"): v}
        elif stage := re.match(r"layers\.(\d)\.downsample", name):      # of Swin
            state[name.replace(stage[1], str(int(stage[1]) - 1), 1)] = value
        else:
            state[name] = value
    others = {"encoder.mask_token": torch.zeros(1, 1, 48), "decoder.0.weight": torch.zeros(3, 3),
              "encoder.rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.long)}
    return {"model": {f"encoder.{name}": value for name, value in state.items()} | others, "epoch": 799}


def random_encoder(kind, **changes):
    """With every tensor random, and biases of keys 0, as SimMIM's ViT has none."""
    encoder = encoder_of(kind, **changes).eval()
    for number, (name, value) in enumerate(encoder.named_parameters()):
        value.data.copy_(uniform(number, *value.shape) * 0.2 - 0.1)
        if re.match(r"blocks.*qkv\.bias", name):
            value.data[48:96] = 0
    return encoder


def load(kind, content, tmp_path, changes):
    """A fresh model filled from the file, and the line that says so."""
    torch.save(content, tmp_path / "simmim.pth")
    fresh = encoder_of(kind, **changes).eval()
    arch, model_args = SMALL[kind]
    config = config_of(arch=arch, model_args=model_args, init=str(tmp_path / "simmim.pth"))
    return fresh, simmim.load_backbone(fresh, config)


@pytest.mark.parametrize("kind, changes", [
    ("beit", {}), ("vit", {}), ("vit", {"init_values": 0.1}), ("swin", {})])
def test_published_weights_load_to_identical_features(kind, changes, tmp_path):
    encoder = random_encoder(kind, **changes)
    fresh, note = load(kind, published(encoder), tmp_path, changes)
    x = uniform(8, 2, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(fresh.forward_features(x), encoder.forward_features(x))
    for name, value in encoder.state_dict().items():                    # a bias of keys changes no feature
        assert torch.equal(fresh.state_dict()[name], value), name
    assert note.startswith(f"{len(encoder.state_dict())} tensors of") and "ATTENTION" not in note


def test_the_shared_position_bias_becomes_that_of_every_block_and_the_norm_that_of_pooled_tokens(tmp_path):
    encoder = random_encoder("beit")
    apart = dict(use_rel_pos_bias=True, use_shared_rel_pos_bias=False, global_pool="avg")
    fresh, _ = load("beit", published(encoder), tmp_path, apart)
    x = uniform(9, 2, 1, 64, 64)
    with torch.no_grad():
        encoder.norm, norm = torch.nn.Identity(), encoder.norm
        tokens = encoder.forward_features(x)
        assert torch.allclose(fresh.forward_features(x), tokens, atol=1e-6)
        assert torch.allclose(fresh(x), norm(tokens[:, 1:].mean(1)), atol=1e-6)


@pytest.mark.parametrize("kind, extra", [("swin", 0), ("beit", 3)])
def test_bias_tables_for_larger_windows_are_those_of_timm(kind, extra, tmp_path):
    encoder = random_encoder(kind)
    changes = {"swin": {"img_size": 96, "window_size": 3}, "beit": {"img_size": 96}}[kind]
    fresh, note = load(kind, published(encoder), tmp_path, changes)
    old, n_tables = encoder.state_dict(), 0
    for name, value in fresh.state_dict().items():
        if not name.endswith("bias_table") or name.startswith("layers.3"):
            continue
        window = [(math.isqrt(len(value) - extra) + 1) // 2] * 2
        wanted = timm.layers.resize_rel_pos_bias_table_simple(old[name], window, value.shape)
        assert value.shape != old[name].shape and torch.allclose(value, wanted, atol=1e-6)
        n_tables += 1
    assert n_tables == {"swin": 4, "beit": 1}[kind] and "bias_table" in note


def test_position_embeddings_for_larger_images_are_those_of_timm(tmp_path):
    encoder = random_encoder("vit")
    fresh, note = load("vit", published(encoder), tmp_path, {"img_size": 96})
    wanted = timm.layers.resample_abs_pos_embed(encoder.pos_embed, [6, 6], antialias=False)
    assert torch.allclose(fresh.pos_embed, wanted, atol=1e-6)
    assert "1 adapted: pos_embed" in note


@pytest.mark.parametrize("kind, changes, word", [
    ("vit", {"init_values": 0.1}, "gamma_1"),                           # layer scale, into a ViT without
    ("beit", {}, "pos_embed")])                                         # no absolute positions
def test_weights_that_a_plain_vit_has_no_place_for_are_refused(kind, changes, word, tmp_path, capsys):
    with pytest.raises(SystemExit) as leaving:
        load("vit", published(random_encoder(kind, **changes)), tmp_path, {})
    assert leaving.value.code == 2 and word in capsys.readouterr().err


# Optimiser

def rate_of(**changes):
    """The rate of a step with 10 steps an epoch, batch 256: half of the rates of the row."""
    config = config_of(batch=256, epochs=100, warmup_epochs=10, **changes)
    return lambda step: simmim.learning_rate(step, config, 10)


def test_corrected_cosine_at_hand_worked_points():
    rate = rate_of()
    assert math.isclose(rate(0), 0.5e-6) and math.isclose(rate(50), (1e-4 + 0.5e-6) / 2)
    assert math.isclose(rate(100), 1e-4)
    assert math.isclose(rate(550), (1e-4 + 0.5e-5) / 2) and math.isclose(rate(1000), 0.5e-5)


def test_paper_cosine_equals_timms_scheduler_stepped_after_the_optimiser():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    scheduler = timm.scheduler.CosineLRScheduler(optimizer, t_initial=1000, lr_min=0.5e-5, warmup_t=100,
                                                 warmup_lr_init=0.5e-6, t_in_epochs=False)
    rate = rate_of(variant="paper")
    for step in range(1000):
        assert math.isclose(rate(step), optimizer.param_groups[0]["lr"], rel_tol=1e-9), step
        scheduler.step_update(step)                         # after the step: its rate comes one late


def test_step_schedule_divides_by_ten_once():
    step_schedule = dict(schedule="step", step_epoch=70, lr=1e-4, warmup_lr=5e-7)
    rate, late = rate_of(**step_schedule), rate_of(**step_schedule, variant="paper")
    assert math.isclose(rate(0), 2.5e-7) and math.isclose(rate(100), 5e-5)
    assert math.isclose(rate(699), 5e-5) and math.isclose(rate(700), 5e-6) and math.isclose(rate(999), 5e-6)
    assert math.isclose(late(700), 5e-5) and math.isclose(late(701), 5e-6)


@pytest.mark.parametrize("variant", ["paper", "corrected"])
def test_decay_spares_vectors_positions_and_only_when_corrected_bias_tables(variant):
    for kind in SMALL:
        model = small(kind)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        decayed, free = ({names[id(p)] for p in group["params"]}
                         for group in simmim.decay_groups(model, variant))
        tables = {name for name in names.values() if "bias_table" in name}
        vectors = {name for name, p in model.named_parameters() if p.ndim == 1}
        spared = ("cls_token", "pos_embed") + (("mask_token",) if kind == "swin" else ())
        special = {name for name in names.values() if name.split(".")[-1] in spared}
        assert free == vectors | special | (tables if variant == "corrected" else set())
        assert decayed == set(names.values()) - free and bool(tables) == (kind != "vit")


# Whole runs

def reconstruction(w, x, masks):
    """SimMIM of a ViT with weights w, written out: x [B, 1, 32, 32], masks [B, 32, 32], patches of 8."""
    patches = x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    t = patches @ w["encoder.patch_embed.proj.weight"].flatten(1).T + w["encoder.patch_embed.proj.bias"]
    hidden = masks.unfold(1, 8, 8).unfold(2, 8, 8).flatten(3).all(3).flatten(1)
    rows = [w["mask_token"][0, 0] if is_hidden else row
            for image, flags in zip(t, hidden.tolist()) for row, is_hidden in zip(image, flags)]
    t = torch.stack(rows).view_as(t)
    t = torch.cat([w["encoder.cls_token"].expand(len(x), -1, -1), t], 1) + w["encoder.pos_embed"]
    norm = lambda t, name: F.layer_norm(t, t.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)
    linear = lambda t, name: t @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    for n in range(VIT["depth"]):
        block = f"encoder.blocks.{n}"
        qkv = linear(norm(t, f"{block}.norm1"), f"{block}.attn.qkv")
        q, k, v = qkv.view(*t.shape[:2], 3, 3, 16).unbind(2)
        attention = (torch.einsum("bnhd,bmhd->bhnm", q, k) / 4).softmax(-1)
        t = t + linear(torch.einsum("bhnm,bmhd->bnhd", attention, v).flatten(2), f"{block}.attn.proj")
        t = t + linear(F.gelu(linear(norm(t, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    pixels = norm(t, "encoder.norm")[:, 1:] @ w["decoder.0.weight"][:, :, 0, 0].T + w["decoder.0.bias"]
    return pixels.view(-1, 4, 4, 8, 8).permute(0, 1, 3, 2, 4).reshape(-1, 1, 32, 32)


def test_eight_steps_are_those_of_a_loop_of_its_own():
    """Network, loss, schedule, clipping and AdamW in float64, from plain operators: weights agree to 1e-9."""
    torch.manual_seed(3)
    encoder = timm.create_model("vit_small_patch16_224", num_classes=0, in_chans=1, **VIT)
    model = simmim.SimMIM(encoder, 1, 32).double()
    w = {name: value.detach().clone().requires_grad_() for name, value in model.state_dict().items()}
    spared = [value for name, value in w.items()
              if value.ndim == 1 or name in ("encoder.cls_token", "encoder.pos_embed")]
    decayed = [value for value in w.values() if all(value is not other for other in spared)]
    loop = torch.optim.AdamW([dict(params=decayed), dict(params=spared, weight_decay=0.0)], weight_decay=0.05)
    ours = torch.optim.AdamW(simmim.decay_groups(model, "corrected"), weight_decay=0.05)
    config = config_of(batch=512, epochs=4, warmup_epochs=1, lr=0.02, warmup_lr=0.004, min_lr=0.002)
    rates = [0.004, 0.012, *(0.002 + 0.018 * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(6))]
    for step in range(8):
        clean = uniform(step, 6, 1, 32, 32).double()
        masks = simmim.unit_masks(uniform(20 + step, 6, 4, 4), 0.6, 8)
        ours.param_groups[0]["lr"] = ours.param_groups[1]["lr"] = simmim.learning_rate(step, config, 2)
        loss = simmim.masked_l1(model(clean, masks), clean, masks)
        ours.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        ours.step()

        wanted = (reconstruction(w, clean, masks) - clean)[masks[:, None]].abs().mean()
        assert abs(wanted.item() - loss.item()) < 1e-9
        loop.zero_grad()
        wanted.backward()
        norm = math.sqrt(sum(float(value.grad.square().sum()) for value in w.values()))
        for value in w.values():
            value.grad *= min(1.0, 0.1 / (norm + 1e-6))
        loop.param_groups[0]["lr"] = loop.param_groups[1]["lr"] = rates[step]
        loop.step()
    for name, value in model.state_dict().items():
        assert torch.allclose(w[name], value, rtol=0, atol=1e-9), name


def test_a_run_is_the_definition_written_out(tmp_path, monkeypatch):
    """Two epochs from the command line, seed 11, a line every third step, odd micro-batches, against a loop.

    The clip takes gradients near Adam's epsilon: there their scale counts, and rounding noise does not.
    """
    pack, seen, make_views = write_pack(tmp_path, blobs(50)), [], simmim.make_views
    monkeypatch.setattr(simmim, "make_views", lambda images, u, config: seen.append(
        (images, u, *make_views(images, u, config))) or seen[-1][2:])
    run_here(simmim, monkeypatch, "--manifest", pack, "--out", tmp_path / "run", "--device", "cpu",
             "--model_args", json.dumps(VIT), "--mask_unit", 8, "--in_chans", 3, "--batch", 10, "--samples", 42,
             "--epochs", 2, "--warmup_epochs", 1, "--lr", 0.1, "--warmup_lr", 0.02, "--min_lr", 0.01, "--wd", 2,
             "--clip", 1e-4, "--seed", 11, "--log-steps", 3, "--micro-batch", 3, "--picture-epochs", 1)
    torch.manual_seed(11)
    model = simmim.SimMIM(timm.create_model("vit_small_patch16_224", num_classes=0, in_chans=3, **VIT), 3, 32)
    spared = [p for name, p in model.named_parameters()
              if p.ndim == 1 or name in ("encoder.cls_token", "encoder.pos_embed")]
    others = [p for p in model.parameters() if all(p is not other for other in spared)]
    optimizer = torch.optim.AdamW([dict(params=others, weight_decay=2), dict(params=spared, weight_decay=0)])
    rates = [0.02 + 0.08 * i / 4 for i in range(4)]                     # 4 steps an epoch
    rates += [0.01 + 0.09 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]
    rates = np.array(rates) * 10 / 512
    losses = []
    for (_, _, clean, masks), rate in zip(seen, rates):
        inside = masks[:, None].expand_as(clean)
        loss = (model(clean, masks) - clean).abs()[inside].mean()
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
        for parameter in model.parameters():
            parameter.grad *= min(1, 1e-4 / (norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        losses.append(loss.item())
    log = log_of(tmp_path / "run")
    assert [(line["step"], line["epoch"]) for line in log] == [(3, 1), (6, 2), (8, 2)] and len(losses) == 8
    wanted = [np.mean(losses[:3]), np.mean(losses[3:6]), np.mean(losses[6:])]
    assert np.allclose([line["loss"] for line in log], wanted, rtol=0, atol=1e-5)
    assert np.allclose([line["lr"] for line in log], rates[[2, 5, 7]], rtol=0, atol=1e-12)
    assert {line["wd"] for line in log} == {2.0}
    last = torch.load(tmp_path / "run/last.pt", weights_only=True)["model"]
    for name, value in model.state_dict().items():
        assert torch.allclose(last[name], value, rtol=0, atol=1e-6), name
    content = torch.load(tmp_path / "run/backbone.pt", weights_only=True)
    timm.create_model(content["arch"], in_chans=3, num_classes=0, **VIT).load_state_dict(content["model"])

    # the images of an epoch are 40 different ones of the first 42, in another order each time and by the seed
    def order(steps):
        images = [image[0].numpy() for step in steps for image in step[0]]
        return [int(np.flatnonzero((blobs(50) == image).all((1, 2)))[0]) for image in images]
    first, second = order(seen[:4]), order(seen[4:])
    assert len(set(first)) == len(set(second)) == 40 and max(first + second) < 42 and first != second
    assert first == list(np.random.default_rng([11, 0]).permutation(42)[:40])
    for step, (_, u, _, _) in enumerate(seen):
        assert torch.equal(u, uniform(simmim.step_seed(11, step), 10, 23 + 16))

    picture = np.array(Image.open(tmp_path / "run/recon_0002.png").convert("RGB")).astype(float)
    _, _, clean, masks = (part[:8] for part in seen[-1])
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    with torch.no_grad():
        recon = model.eval()(clean, masks)
    masks = masks[:, None]
    for row, shown in enumerate((clean, clean * ~masks, recon, torch.where(masks, recon, clean))):
        pixels = ((shown * std + mean) * 255).clamp(0, 255).permute(2, 0, 3, 1).flatten(1, 2).numpy()
        assert np.abs(picture[32 * row:32 * row + 32] - pixels).max() <= 1.01


@pytest.mark.parametrize("flags, words", [
    (["--arch", "resnet10t"], ["resnet10t", "ViT, Swin or BEiT"]),
    (["--arch", "beit_base_patch16_224"], ["global_pool"]),
    (["--model_args", '{"global_pool": "avg"}'], ["fc_norm false"]),
    (["--img_size", 48], ["48", "32"]),
    (["--img_size", 48, "--mask_unit", 16, "--arch", SMALL["swin"][0], "--model_args", json.dumps(SMALL["swin"][1])],
     ["48", "16", "of 32"]),
    (["--schedule", "linear"], ["schedule", "linear"])])
def test_what_cannot_be_masked_is_refused(flags, words, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as leaving:
        run_here(simmim, monkeypatch, "--manifest", write_pack(tmp_path, blobs(4)), "--out", tmp_path / "run",
                 "--device", "cpu", "--batch", 4, *flags)
    said = capsys.readouterr().err
    assert leaving.value.code == 2 and all(word in said for word in words), said


def test_the_loss_falls(tmp_path, monkeypatch):
    y, x = np.mgrid[:64, :64] / 64
    plane = np.random.default_rng(0).uniform(-1, 1, (60, 3))
    slopes = [a * (x - 0.5) + b * (y - 0.5) + c for a, b, c in plane]
    pack = write_pack(tmp_path, (127 + 60 * np.stack(slopes)).astype(np.uint8))     # a part tells the whole
    run_here(simmim, monkeypatch, "--manifest", pack, "--out", tmp_path / "run", "--device", "cpu",
             "--model_args", json.dumps(VIT), "--mask_unit", 8, "--batch", 20, "--epochs", 30, "--warmup_epochs", 1, "--lr", 0.04,
             "--log-steps", 15)
    losses = [line["loss"] for line in log_of(tmp_path / "run")]
    assert losses[-1] < 0.6 * losses[0], losses         # seeds 0 to 3: 0.47, 0.44, 0.39, 0.42
