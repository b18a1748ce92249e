"""Facts about pretrain/gmml.py and the blocks other training scripts copy from it."""

import math
import os
import shutil
import subprocess
import sys
import types

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torchvision.transforms.functional as tv
from conftest import ROOT, assert_user_error, blobs, load_script, log_of, run_here, run_script, write_pack
from PIL import Image, ImageEnhance

gmml = load_script("pretrain/gmml.py")
TINY = ["--model_args", '{"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}',
        "--device", "cpu", "--log-steps", 1, "--warmup_epochs", 1]


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return write_pack(tmp_path_factory.mktemp("pack"), blobs(60))


def config_of(**changes):
    return {**gmml.DEFAULTS, "mean": [0.485], "std": [0.229], "exp": None, **changes}


# Corruption

def masks_by_unions(u, fraction, side, align):
    """The same from the other end: the smallest number of blocks whose union reaches the target."""
    y, x = np.mgrid[:side, :side]
    masks = np.zeros((len(u), side, side), bool)
    for b in range(len(u)):
        first = np.full((side, side), len(u[b]))                        # the earliest block over each pixel
        for k in reversed(range(len(u[b]))):
            top, left = (np.floor(u[b, k, :2].numpy() * np.float32(side - align))).astype(int)
            h, w = align + np.floor(u[b, k, 2:].numpy() * np.float32(int(0.3 * side) - align)).astype(int)
            if align > 1:
                top, left, h, w = (top // align * align, left // align * align,
                                   round(h / align) * align, round(w / align) * align)
            first[(y >= top) & (y < top + h) & (x >= left) & (x < left + w)] = k
        covered = np.cumsum(np.bincount(first.ravel(), minlength=len(u[b]) + 1)[:-1])
        masks[b] = first <= np.argmax(covered >= float(fraction[b]) * side * side)
    return masks


@pytest.mark.parametrize("side, align", [(224, 1), (64, 1), (224, 16), (64, 8)])
def test_block_masks_are_the_shortest_union_that_reaches_the_target(side, align):
    generator = torch.Generator().manual_seed(side + align)
    u = torch.rand(12, gmml.n_blocks_for(0.75), 4, generator=generator)
    fraction = torch.rand(12, generator=generator) * 0.5 + 0.25
    assert (gmml.block_masks(u, fraction, side, align).numpy()
            == masks_by_unions(u, fraction, side, align)).all()


def test_mask_fractions_have_the_stated_distribution():
    n, side = 2000, 224
    generator = torch.Generator().manual_seed(1)
    u, blocks = (torch.rand(n, 2, generator=generator),
                 torch.rand(n, gmml.n_blocks_for(0.75), 4, generator=generator))
    masks, replaced = gmml.draw_masks(u, blocks, side)
    fraction = torch.from_numpy(masks.numpy().mean((1, 2)))
    assert (abs(replaced.double().mean() - 0.5) < 4 * 0.5 / math.sqrt(n)
            and abs(fraction.mean() - 0.475) < 4 * 0.17 / math.sqrt(n))
    top_left, centre = (masks[~replaced, :16, :16].double().mean(),
                        masks[~replaced, 104:120, 104:120].double().mean())
    assert abs(top_left - 0.08) < 0.02 and abs(centre - 0.73) < 0.03    # blocks grow right and down
    # 4 standard errors of the mean with the stated standard deviations
    assert abs(fraction[~replaced].mean() - 0.632) < 4 * 0.072 / math.sqrt(n / 2)
    assert abs(fraction[replaced].mean() - 0.314) < 4 * 0.013 / math.sqrt(n / 2)
    assert 0.060 < fraction[~replaced].std() < 0.084 and 0.009 < fraction[replaced].std() < 0.017
    assert (fraction[replaced] >= 0.3).all() and (fraction[replaced] <= 0.3 + 67 * 67 / side ** 2).all()


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.75, 0.9])
def test_enough_blocks_are_drawn_to_reach_every_target(fraction):
    u = torch.rand(100, gmml.n_blocks_for(fraction), 4, generator=torch.Generator().manual_seed(2))
    reached = gmml.block_masks(u, torch.full((100,), fraction), 64).float().mean((1, 2))
    assert (reached >= fraction).all()


def test_corruption_takes_the_fill_in_the_mask_and_nothing_outside():
    generator = torch.Generator().manual_seed(3)
    clean, fill = (torch.randn(8, 3, 64, 64, generator=generator) for _ in range(2))
    u, blocks = torch.rand(8, 2, generator=generator), torch.rand(8, 186, 4, generator=generator)
    masks, replaced = gmml.draw_masks(u, blocks, 64)
    assert torch.equal(replaced, u[:, 0] < 0.5)
    corrupted = gmml.corrupt(clean, fill, masks)
    for i in range(8):
        assert torch.equal(corrupted[i][:, masks[i]], fill[i][:, masks[i]])
        assert torch.equal(corrupted[i][:, ~masks[i]], clean[i][:, ~masks[i]])


def test_masked_l1_equals_a_loop_over_pixels():
    generator = torch.Generator().manual_seed(4)
    recon, clean = (torch.randn(2, 3, 5, 6, generator=generator) for _ in range(2))
    masks = torch.rand(2, 5, 6, generator=generator) < 0.4
    total, n = 0.0, 0
    for b in range(2):
        for c in range(3):
            for y in range(5):
                for x in range(6):
                    if masks[b, y, x]:
                        total, n = total + abs(float(recon[b, c, y, x]) - float(clean[b, c, y, x])), n + 1
    assert n == masks.sum() * 3 and abs(float(gmml.masked_l1(recon, clean, masks)) - total) < 1e-4


@pytest.mark.parametrize("world_size", [1, 3])
def test_replaced_blocks_show_another_images_own_view_and_dropped_ones_noise(world_size):
    """Whichever process holds the donor; what is drawn for the whole batch is computed for one process."""
    config = config_of(batch=6, img_size=40, arch="")
    images = torch.from_numpy(blobs(6))[:, None]
    plan = gmml.plan_step(config, np.arange(6), 0, 0, 1)
    clean, _, _ = gmml.make_views(images[plan[0]], plan, config, 0, 1, torch.device("cpu"))
    generator = gmml.step_generator(0, 0)
    for number in range(2):
        _, _, corruption, _ = (torch.rand(6, *shape, generator=generator)
                               for shape in ([23], [11], [3], [186, 4]))
        noise = torch.randn(6, 1, 40, 40, generator=gmml.step_generator(0, 0, 1 + number))
        own = {}
        for rank in range(world_size):
            plan = gmml.plan_step(config, np.arange(6), 0, rank, world_size)
            parts = [part.chunk(2)[number] for part in
                     gmml.make_views(images[plan[0]], plan, config, rank, world_size, torch.device("cpu"))]
            own.update({i: [part[place] for part in parts]
                        for place, i in enumerate(range(rank, 6, world_size))})
        for i, (view, spoilt, mask) in own.items():
            assert torch.equal(view, clean[6 * number + i])
            fill = clean[6 * number + int(corruption[i, 2] * 6)] if corruption[i, 0] < 0.5 else noise[i]
            assert (torch.equal(spoilt[:, mask], fill[:, mask])
                    and torch.equal(spoilt[:, ~mask], view[:, ~mask]))


# Views

@pytest.mark.parametrize("box", [(0, 0, 100, 80), (10, 7, 61, 40), (3, 50, 20, 28), (40, 5, 33, 70)])
def test_crop_resize_equals_pillows_bicubic_resize_of_the_box(box):
    rng = np.random.default_rng(6)
    noise = Image.fromarray(rng.integers(0, 256, (25, 20), dtype=np.uint8)).resize((80, 100), Image.BILINEAR)
    top, left, h, w = box
    sides, pixels = ([torch.tensor([float(side)]) for side in box],
                     torch.from_numpy(np.array(noise))[None, None])
    for flip in (False, True):
        wanted = noise.crop((left, top, left + w, top + h)).resize((48, 48), Image.BICUBIC)
        wanted = np.array(wanted, np.float32)[:, ::-1] if flip else np.array(wanted, np.float32)
        got = gmml.crop_resize(pixels, sides, torch.tensor([flip]), 48)[0, 0].numpy()
        assert np.abs(got - wanted).max() <= 1 and np.abs(got - wanted).mean() < 0.3
        # as on a GPU; Pillow rounds twice
        got = gmml.crop_by_matrices(pixels.float(), *sides, torch.tensor([flip]), 48)[0, 0].numpy()
        assert np.abs(got - wanted).mean() <= 0.5 and np.abs(got - wanted).max() <= 1.5


def test_crop_boxes_follow_torchvisions_algorithm():
    u = torch.rand(400, 23, generator=torch.Generator().manual_seed(7))
    for height, width, scale in ((64, 64, (0.05, 1.0)), (50, 90, (0.4, 1.0)), (20, 90, (0.9, 1.0))):
        tops, lefts, hs, ws = gmml.crop_boxes(u, height, width, scale)
        for row, top, left, h, w in zip(u.tolist(), tops, lefts, hs, ws):
            for attempt in range(10):
                area = height * width * (scale[0] + row[attempt] * (scale[1] - scale[0]))
                aspect = math.exp(math.log(3 / 4) + row[10 + attempt] * (math.log(4 / 3) - math.log(3 / 4)))
                bw, bh = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                if 0 < bw <= width and 0 < bh <= height:
                    assert abs(bh - h) <= 1 and abs(bw - w) <= 1        # float32 rounding at .5
                    assert 0 <= top <= height - h and 0 <= left <= width - w
                    assert abs(top - math.floor(row[20] * (height - bh + 1))) <= 1
                    break
            else:                                                       # torchvision's fallback
                assert (h, w) == ((height, round(height * 4 / 3)) if width / height > 4 / 3
                                  else (height, width))
                assert abs(left - (width - w) // 2) <= 1


@pytest.mark.parametrize("op, enhance", [
    (0, ImageEnhance.Brightness), (1, ImageEnhance.Contrast), (2, ImageEnhance.Color)])
def test_jitter_equals_pillows_enhancers(op, enhance):
    rgb = np.random.default_rng(8).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    u = torch.full((1, 11), 0.5)
    u[0, 0], u[0, 1 + op] = 0.0, 0.9
    strength = [0.0] * 4
    strength[op] = 0.4
    got = gmml.colour_jitter(torch.from_numpy(rgb).permute(2, 0, 1)[None].float(), u, strength, p=1)
    wanted = np.array(enhance(Image.fromarray(rgb)).enhance(1 + 0.8 * 0.4), np.float32)
    assert np.abs(got[0].permute(1, 2, 0).numpy() - wanted).max() <= 1.5  # Pillow works in integers


def test_hue_shift_equals_torchvisions():
    rgb = torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(9))
    for turn in (-0.3, 0.01, 0.2):
        got = gmml.shift_hue(rgb, torch.full((2, 1, 1), turn))
        assert torch.allclose(got, tv.adjust_hue(rgb, turn), atol=1e-4)


def test_jitter_leaves_out_images_and_keeps_grey_grey():
    x = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(10)) * 255
    u = torch.rand(40, 11, generator=torch.Generator().manual_seed(11))
    changed = (gmml.colour_jitter(x.clone(), u, (0.4, 0.4, 0.4, 0.1), p=0.3) != x).flatten(1).any(1)
    assert torch.equal(changed, u[:, 0] < 0.3)


def test_blur_equals_a_gaussian_filter():
    from scipy.ndimage import gaussian_filter
    x = torch.rand(2, 1, 40, 40, dtype=torch.float32, generator=torch.Generator().manual_seed(12)) * 255
    u = torch.tensor([[0.0, 0.5], [0.9, 0.5]])
    got = gmml.gaussian_blur(x.clone(), u, p=0.5)
    wanted = gaussian_filter(x[0, 0].double().numpy(), 0.1 + 0.5 * 1.9, radius=8, mode="nearest")
    assert np.abs(got[0, 0].numpy() - wanted).max() < 1e-3 and torch.equal(got[1], x[1])


# Network, schedule, optimiser

@pytest.mark.parametrize("in_chans, total, backbone, head", [
    (3, 22_404_099, 21_665_664, 738_435), (1, 22_010_881, 21_469_056, 541_825)])
def test_parameter_counts_at_default_size(in_chans, total, backbone, head):
    vit = timm.create_model("vit_small_patch16_224", num_classes=0, in_chans=in_chans)
    model = gmml.GMML(vit, in_chans)
    counts = [sum(p.numel() for p in module.parameters())
              for module in (model, model.backbone, model.rec_head)]
    assert counts == [total, backbone, head]
    assert [block + 1 for block in model.recon_blocks] == [6, 8, 10, 12]


def test_reconstruction_reads_the_block_mean_before_the_norm():
    torch.manual_seed(0)
    vit = timm.create_model("vit_small_patch16_224", num_classes=0, in_chans=1, img_size=32, patch_size=8,
                            embed_dim=48, depth=4, num_heads=3).eval()
    model = gmml.GMML(vit, 1, [1, 3]).eval()
    outputs = {}
    for number in (0, 2):
        vit.blocks[number].register_forward_hook(
            lambda _, __, output, number=number: outputs.update({number: output}))
    x = torch.randn(2, 1, 32, 32)
    got = model(x)
    tokens = vit.norm((outputs[0] + outputs[2]) / 2)[:, 1:]
    patches = model.rec_head.mlp(tokens) @ model.rec_head.convTrans.weight.flatten(1)       # [B, 16, 64]
    wanted = (patches.view(2, 4, 4, 8, 8).permute(0, 1, 3, 2, 4).reshape(2, 1, 32, 32)
              + model.rec_head.convTrans.bias)
    assert torch.allclose(got, wanted, atol=1e-5)


def test_schedule_at_its_corner_points():
    lr = [gmml.cosine(step, 100, 1e-4, 1e-6, 10) for step in range(100)]
    assert lr[0] == 0 and lr[9] == lr[10] == 1e-4
    assert np.allclose(lr[:10], np.linspace(0, 1e-4, 10))
    assert math.isclose(lr[55], (1e-4 + 1e-6) / 2) and lr[99] > 1e-6
    assert math.isclose(lr[99], 1e-6 + (1e-4 - 1e-6) * (1 + math.cos(math.pi * 89 / 90)) / 2)
    assert np.allclose([gmml.cosine(step, 100, 0.04, 0.4) for step in (0, 50)], [0.04, 0.22])


def test_clipping_is_per_tensor_as_in_a_loop():
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), (2, 2))]
    for parameter, size in zip(parameters, (10.0, 0.1, 3.5)):
        parameter.grad = torch.randn_like(parameter) * size
    wanted = [p.grad * min(1.0, 3.0 / (float(p.grad.norm()) + 1e-6)) for p in parameters]
    gmml.clip_each(parameters, 3.0)
    assert all(torch.allclose(p.grad, w) for p, w in zip(parameters, wanted))


def test_decay_spares_vectors_only():
    vit = timm.create_model("vit_small_patch16_224", num_classes=0, img_size=32, patch_size=8,
                            embed_dim=48, depth=1, num_heads=3)
    decayed, spared = ({id(p) for p in group["params"]} for group in gmml.decay_groups(vit))
    for name, parameter in vit.named_parameters():
        assert (id(parameter) in decayed) == (parameter.ndim > 1) != (id(parameter) in spared), name


# Weights of other makers

def vit(in_chans=3, img_size=32, **changes):
    args = dict(img_size=img_size, patch_size=8, embed_dim=48, depth=2, num_heads=3) | changes
    return timm.create_model("vit_small_patch16_224", num_classes=0, in_chans=in_chans, **args)


@pytest.mark.parametrize("container, prefix, key", [
    ("model", "", None), ("state_dict", "module.", None), ("teacher", "module.backbone.", None),
    ("student", "backbone.", "student"), ("state_dict", "module.base_encoder.", None),
    ("model", "encoder.", None), ("SiT_model", "module.backbone.", None)])
def test_every_key_style_loads_to_identical_features(tmp_path, container, prefix, key):
    torch.manual_seed(1)
    source, target = vit().eval(), vit().eval()
    state = {prefix + name: value for name, value in source.state_dict().items()}
    wrapper = "module." if prefix.startswith("module.") else ""
    state |= {wrapper + "rec_head.mlp.0.weight": torch.zeros(2),
              wrapper + "momentum_encoder.norm.weight": torch.ones(48)}
    torch.save({container: state, "epoch": 3, "args": __import__("argparse").Namespace(lr=1)},
               tmp_path / "other.pth")
    gmml.load_backbone(target, config_of(init=str(tmp_path / "other.pth"), init_key=key))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(source(x), target(x))


def test_a_configuration_beside_the_weights_does_no_harm(tmp_path, monkeypatch):
    """SimMIM's files hold a configuration of a class of another package, which need not be installed."""
    package = types.ModuleType("yacs.config")
    package.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", package)
        config = package.CfgNode(MODEL=package.CfgNode(TYPE="vit", DEPTH=12), AMP="O1")
        config.frozen = True                            # CfgNode keeps its state beside the items
        state = {f"encoder.{name}": value for name, value in vit().state_dict().items()}
        torch.save({"model": state, "config": config, "epoch": 799}, tmp_path / "w.pth")
    assert "loaded 30 tensors" in gmml.load_backbone(vit(), config_of(init=str(tmp_path / "w.pth")))


@pytest.mark.parametrize("file, heads", [("moco", 12), ("ours", 3)])
def test_weights_of_another_number_of_heads_are_pointed_out(tmp_path, file, heads):
    wide = dict(embed_dim=384, num_heads=heads)
    state = vit(**wide).state_dict()
    torch.save({"state_dict": {f"module.base_encoder.{name}": value for name, value in state.items()}},
               tmp_path / "moco.pth")
    torch.save({"model": state, "model_args": wide}, tmp_path / "ours.pth")
    torch.save({"model": state, "model_args": ["of", "others"]}, tmp_path / "other.pth")
    assert "heads" not in gmml.load_backbone(vit(**wide), config_of(init=str(tmp_path / "other.pth")))
    config = config_of(init=str(tmp_path / f"{file}.pth"))
    assert "heads" not in gmml.load_backbone(vit(**wide), config)
    other = gmml.load_backbone(vit(**wide | {"num_heads": 6}), config)
    assert f"made with {heads} heads, used with 6" in other


@pytest.mark.parametrize("adapt, factor", [("sum", 1.0), ("average", 1 / 3)])
def test_channel_adaptation_3_to_1_on_grey_input(tmp_path, adapt, factor):
    source = vit(3)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    target = vit(1)
    gmml.load_backbone(target, config_of(init=str(tmp_path / "w.pth"), channel_adapt=adapt))
    grey = torch.randn(2, 1, 32, 32)
    bias = source.patch_embed.proj.bias[:, None, None]
    wanted = source.patch_embed.proj(grey.expand(-1, 3, -1, -1)) - bias
    assert torch.allclose(target.patch_embed.proj(grey) - bias, wanted * factor, atol=1e-5)


@pytest.mark.parametrize("adapt, factor", [("duplicate_mean", 1.0), ("duplicate", 3.0), ("average", 3.0)])
def test_channel_adaptation_1_to_3_on_grey_input(tmp_path, adapt, factor):
    source = vit(1)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    target = vit(3)
    gmml.load_backbone(target, config_of(init=str(tmp_path / "w.pth"), channel_adapt=adapt))
    grey = torch.randn(2, 1, 32, 32)
    bias = source.patch_embed.proj.bias[:, None, None]
    assert torch.allclose(target.patch_embed.proj(grey.expand(-1, 3, -1, -1)) - bias,
                          (source.patch_embed.proj(grey) - bias) * factor, atol=1e-5)


def test_position_embeddings_are_resampled_bicubically_and_cls_is_kept(tmp_path):
    source, target = vit(img_size=32), vit(img_size=48)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    assert "pos_embed" in gmml.load_backbone(target, config_of(init=str(tmp_path / "w.pth")))
    wanted = timm.layers.resample_abs_pos_embed(source.pos_embed, [6, 6],
                                                interpolation="bicubic", antialias=False)
    assert torch.allclose(target.pos_embed, wanted, atol=1e-6)
    assert torch.equal(target.pos_embed[:, 0], source.pos_embed[:, 0])


def test_beit_bias_tables_are_resampled_and_their_cls_biases_kept(tmp_path):
    def beit(size):
        return timm.create_model("beit_base_patch16_224", num_classes=0, img_size=size, patch_size=8,
                                 embed_dim=48, depth=1, num_heads=3,
                                 use_rel_pos_bias=False, use_shared_rel_pos_bias=True)
    source, target = beit(32), beit(48)
    table = source.rel_pos_bias.relative_position_bias_table
    torch.nn.init.normal_(table)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    gmml.load_backbone(target, config_of(init=str(tmp_path / "w.pth"), arch="beit_base_patch16_224"))
    got = target.rel_pos_bias.relative_position_bias_table
    wanted = torch.nn.functional.interpolate(table[:49].T.view(1, 3, 7, 7), (11, 11),
                                             mode="bicubic")[0].flatten(1).T
    assert torch.equal(got[-3:], table[-3:]) and torch.allclose(got[:-3], wanted, atol=1e-5)


def test_timm_weights_without_a_network_name_the_file_to_provide(tmp_path, capsys, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")
    monkeypatch.setattr(gmml.timm, "create_model", offline)
    with pytest.raises(SystemExit):
        gmml.load_backbone(None, config_of(init="timm"), weights_dir=tmp_path)
    assert f"{tmp_path}/vit_small_patch16_224.pth" in capsys.readouterr().err


# Whole runs

def start(pack, out, *flags):
    return run_script("pretrain/gmml.py", "--manifest", pack, "--out", out, *TINY, *flags)


def weights(file):
    return torch.load(file, weights_only=True)["model"]


def test_a_run_is_the_definition_written_out(pack, tmp_path, monkeypatch):
    """Warm-up and cosines, mean error in the masks, each gradient clipped, AdamW: 5 steps by hand.

    The clip takes gradients near Adam's epsilon: there their scale counts, and rounding noise does not.
    """
    seen, make_views = [], gmml.make_views
    monkeypatch.setattr(gmml, "make_views", lambda *args: seen.append([*make_views(*args)]) or seen[-1])
    flags = ["--in_chans", 3, "--batch", 10, "--samples", 30, "--epochs", 3, "--lr", 0.05, "--min_lr", 0.01,
             "--wd", 2, "--wd_end", 5, "--clip", 1e-5, "--drop_path", 0, "--steps", 5]
    run_here(gmml, monkeypatch, "--manifest", pack, "--out", tmp_path, *TINY, *flags)
    torch.manual_seed(0)
    model = gmml.GMML(vit(3, depth=4), 3)
    groups = [[p for p in model.parameters() if (p.ndim > 1) == decayed] for decayed in (True, False)]
    optimizer = torch.optim.AdamW([dict(params=group) for group in groups])
    falling = lambda start, end, n: end + (start - end) * (1 + np.cos(np.pi * np.arange(n) / n)) / 2
    rates = np.concatenate([np.linspace(0, 0.05, 3), falling(0.05, 0.01, 6)]) * 10 / 256    # 3 steps an epoch
    for (clean, corrupted, masks), rate, decay, line in zip(seen, rates, falling(2, 5, 9), log_of(tmp_path)):
        loss = (model(corrupted) - clean).abs()[masks[:, None].expand_as(clean)].mean()
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            parameter.grad *= min(1, 1e-5 / (float(parameter.grad.norm()) + 1e-6))
        for group, wd in zip(optimizer.param_groups, (decay, 0)):
            group.update(lr=rate, weight_decay=wd)
        optimizer.step()
        assert abs(line["loss"] - loss.item()) < 1e-5 and abs(line["lr"] - rate) < 1e-12
    assert len(seen) == 5
    last = weights(tmp_path / "last.pt")
    for name, value in model.state_dict().items():
        assert torch.allclose(last[name], value, rtol=0, atol=1e-6), name


def test_blocks_that_nothing_is_decoded_from_stay_as_they_are(pack, tmp_path):
    flags = ["--batch", 12, "--steps", 3, "--lr", 0.02, "--recon_blocks", "[1, 2]"]
    for nproc in (1, 2):
        out = tmp_path / str(nproc)
        result = run_script("pretrain/gmml.py", "--manifest", pack, "--out", out, *TINY, *flags, nproc=nproc)
        assert result.returncode == 0, result.stderr
    one, two = (weights(tmp_path / f"{nproc}/backbone.pt") for nproc in (1, 2))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5
    torch.manual_seed(0)
    begun = vit(1, depth=4).state_dict()
    still = {name for name in one if torch.equal(one[name], begun[name])}
    assert any(name.startswith("blocks.2.mlp") for name in still)
    assert not any(name.startswith(("blocks.0.mlp", "blocks.1.mlp")) for name in still)


def test_processes_and_micro_batches_do_not_change_the_weights(pack, tmp_path):
    flags = ["--batch", 12, "--steps", 5, "--epochs", 4, "--lr", 0.02, "--drop_path", 0.3, "--in_chans", 3]
    runs = dict(one=[], micro=["--micro-batch", 5])
    for name, more in runs.items():
        assert start(pack, tmp_path / name, *flags, *more).returncode == 0
    for nproc in (2, 3):
        result = run_script("pretrain/gmml.py", "--manifest", pack, "--out", tmp_path / f"{nproc}",
                            *TINY, *flags, nproc=nproc)
        assert result.returncode == 0, result.stderr
    one = weights(tmp_path / "one/last.pt")
    assert max(float(v.abs().max()) for v in one.values()) > 0.02
    for name in ("micro", "2", "3"):
        other = weights(tmp_path / name / "last.pt")
        assert max(float((one[key] - other[key]).abs().max()) for key in one) <= 1e-5, name
        logs = [[line["loss"] for line in log_of(tmp_path / run)] for run in ("one", name)]
        assert np.allclose(*logs, rtol=1e-5), name


def test_stochastic_depth_leaves_out_the_images_it_is_told_to():
    model = timm.create_model("vit_small_patch16_224", num_classes=0, drop_path_rate=0.5,
                              img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3).train()
    x, u = torch.randn(5, 3, 32, 32), torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    modules = gmml.take_drop_path(model)
    assert [module.drop_prob for module in modules] == [0.25, 0.25, 0.5, 0.5]  # the first block: none
    gmml.set_drop_path(modules, u)
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for number, block in enumerate(model.blocks):
        for half, branch in enumerate((lambda t: block.attn(block.norm1(t)),
                                       lambda t: block.mlp(block.norm2(t)))):
            p, column = 0.25 * number, 2 * number - 2 + half
            for i in range(5):
                if number == 0 or u[i, column] >= p:
                    tokens[i] = tokens[i] + branch(tokens[i:i + 1])[0] / (1 - p)
    assert torch.allclose(model.forward_features(x), model.norm(tokens), atol=1e-5)
    assert torch.equal(model.eval()(x), model(x))


def test_last_pt_is_written_when_nothing_else_is_left_to_write(pack, tmp_path, monkeypatch):
    """Killed between the two files, the same command has to find its work not done."""
    written, save = [], gmml.save_atomic
    monkeypatch.setattr(gmml, "save_atomic",
                        lambda value, path: (written.append(path.name), save(value, path)))
    run_here(gmml, monkeypatch, "--manifest", pack, "--out", tmp_path, *TINY, "--batch", 12, "--epochs", 1)
    assert written == ["backbone.pt", "last.pt"]


def test_backbone_loads_strictly_into_timm_without_this_project(pack, tmp_path):
    assert start(pack, tmp_path / "run", "--batch", 20, "--steps", 1).returncode == 0
    code = ("import sys, timm, torch; c = torch.load(sys.argv[1], weights_only=True); "
            "m = timm.create_model(c['arch'], in_chans=c['in_chans'], num_classes=0, **c['model_args']); "
            "m.load_state_dict(c['model'], strict=True); print(m(torch.zeros(1, 1, 32, 32)).shape[1])")
    result = subprocess.run([sys.executable, "-I", "-c", code, str(tmp_path / "run/backbone.pt")],
                            cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.strip() == "48", result.stderr


def test_the_copied_file_alone_trains_on_image_files_of_any_size(tmp_path):
    shutil.copy(ROOT / "pretrain/gmml.py", tmp_path / "gmml.py")
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate([(50, 40), (33, 70), (64, 64), (40, 41)]):
        Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    Image.fromarray(rng.integers(0, 65536, (40, 40)).astype(np.uint16)).save(tmp_path / "4.png")
    pd.DataFrame({"path": [f"{i}.png" for i in range(5)]}).to_csv(tmp_path / "manifest.csv", index=False)
    result = subprocess.run([sys.executable, "gmml.py", "--manifest", "manifest.csv", "--out", "run",
                             "--batch", "5", "--epochs", "2", *map(str, TINY)],
                            cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and (tmp_path / "run/backbone.pt").exists(), result.stderr


def test_16_bit_files_are_scaled_not_clipped(tmp_path):
    values = np.array([[0, 100, 300, 30000, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    (tmp_path / "manifest.csv").write_text("path\nx.png\n")
    rows = gmml.read_manifest(tmp_path / "manifest.csv", "pretrain")
    source = gmml.ImageSource(tmp_path / "manifest.csv", rows, 1, torch.device("cpu"))
    assert source.batch(np.array([0]))[0].flatten().tolist() == np.round(values[0] / 65535 * 255).tolist()


def test_samples_are_the_first_rows_of_the_split(tmp_path):
    (tmp_path / "manifest.csv").write_text("path,split\na,train\nb,pretrain\nc,pretrain\nd,pretrain\n")
    rows = gmml.read_manifest(tmp_path / "manifest.csv", "pretrain", 2)
    assert rows["path"].tolist() == ["b", "c"] and rows.index.tolist() == [1, 2]


def test_two_runs_never_share_a_folder_and_processes_divide_the_batch(pack, tmp_path):
    result = run_script("pretrain/gmml.py", "--manifest", pack, "--out", tmp_path,
                        *TINY, "--batch", 9, nproc=2)
    assert result.returncode != 0 and "2 processes do not divide the global batch of 9" in result.stderr
    import fcntl
    lock = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert_user_error(start(pack, tmp_path, "--batch", 10), "in use by another run")
    os.close(lock)


@pytest.mark.slow
def test_a_mistake_that_one_process_finds_ends_the_job_with_its_sentence(tmp_path):
    names = [f"{i}.png" for i in range(8)]
    for name, image in zip(names, blobs(8)):
        Image.fromarray(image).save(tmp_path / name)
    (tmp_path / "5.png").write_text("no picture")
    pd.DataFrame({"path": names, "split": "pretrain"}).to_csv(tmp_path / "manifest.csv", index=False)
    result = run_script("pretrain/gmml.py", "--manifest", tmp_path / "manifest.csv", "--out", tmp_path,
                        *TINY, "--batch", 8, nproc=2, timeout=60)
    assert result.returncode != 0 and "5.png cannot be read as an image" in result.stderr
    assert "[rank" not in result.stderr


def test_another_configuration_is_not_resumed(pack, tmp_path):
    assert start(pack, tmp_path, "--batch", 10, "--steps", 1).returncode == 0
    assert_user_error(start(pack, tmp_path, "--batch", 10, "--steps", 2, "--lr", "2e-4"),
                      "lr=0.0001, now it is 0.0002")


def test_the_loss_falls(pack, tmp_path):
    assert start(pack, tmp_path, "--batch", 20, "--epochs", 40, "--lr", "1e-2",
                 "--log-steps", 3).returncode == 0
    losses = [line["loss"] for line in log_of(tmp_path)]
    # predicting the mean grey of every image costs about the first value; half of that needs the neighbours
    assert losses[-1] < 0.75 * losses[0], losses


def test_a_run_goes_on_where_a_loss_scaler_is_needed_that_the_checkpoint_does_not_know(tmp_path):
    layer, scaler = torch.nn.Linear(2, 1), torch.amp.GradScaler("cpu")
    unused = torch.amp.GradScaler(enabled=False)
    state = dict(model=torch.nn.Linear(2, 1).state_dict(), scaler=unused.state_dict())
    gmml.restore(state, tmp_path, model=layer, scaler=scaler)
    assert torch.equal(layer.weight, state["model"]["weight"]) and scaler.get_scale() == 2 ** 16
    with pytest.raises(SystemExit):
        gmml.restore(dict(model={}), tmp_path, model=layer)
