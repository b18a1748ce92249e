"""Facts about pretrain/simmim.py."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import timm
import timm.scheduler
import torch
from conftest import load_script, log_of, run_here, run_script, write_pack
from PIL import Image

simmim = load_script("pretrain/simmim.py")
VIT = ["--model_args", '{"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}',
       "--mask_unit", 8]
BEIT = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True,
        "init_values": 0.1, "global_pool": "token"}
SMALL = dict(                       # arch and model_args of small models of the three kinds, 64 pixels
    vit=("vit_small_patch16_224", {"embed_dim": 48, "depth": 2, "num_heads": 3}),
    beit=("beit_base_patch16_224", {"embed_dim": 48, "depth": 2, "num_heads": 3, **BEIT}),
    swin=("swin_base_patch4_window7_224",
          {"window_size": 2, "embed_dim": 12, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 3, 4]}))


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """60 grey 64 x 64 images of slopes, of which a part tells the whole, packed."""
    folder = tmp_path_factory.mktemp("pack")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64] / 64
    slopes = [a * (x - 0.5) + b * (y - 0.5) + c for a, b, c in rng.uniform(-1, 1, (60, 3))]
    return write_pack(folder, (127 + 60 * np.stack(slopes)).astype(np.uint8))


def train_here(monkeypatch, manifest, out, *flags):
    run_here(simmim, monkeypatch, "--manifest", manifest, "--out", out,
             "--device", "cpu", "--log-steps", 1, "--warmup_epochs", 1, *flags)


def small(kind, in_chans=1):
    arch, model_args = SMALL[kind]
    torch.manual_seed(0)
    encoder = timm.create_model(arch, num_classes=0, in_chans=in_chans, img_size=64, drop_path_rate=0,
                                **model_args)
    return simmim.SimMIM(encoder, in_chans, 64)


# Masks and loss

@pytest.mark.parametrize("side, n_hidden", [(224, 30), (192, 22), (64, 3)])
def test_exactly_the_rounded_up_share_of_the_units_is_hidden(side, n_hidden):
    n = side // 32
    u = torch.rand(400, n, n, generator=torch.Generator().manual_seed(side))
    masks = simmim.unit_masks(u, 0.6, 32)
    units = masks[:, ::32, ::32]
    assert masks.shape == (400, side, side) and (units.flatten(1).sum(1) == n_hidden).all()
    assert torch.equal(masks, torch.from_numpy(np.kron(units.numpy(), np.ones((32, 32), bool))))
    share = n_hidden / n ** 2               # every unit is hidden equally often: within 4.5 standard errors
    assert (units.float().mean(0) - share).abs().max() < 4.5 * math.sqrt(share * (1 - share) / 400)
    for row, hidden in zip(u.flatten(1).tolist(), units.flatten(1).tolist()):
        assert ({i for i, is_hidden in enumerate(hidden) if is_hidden}
                == set(sorted(range(n * n), key=row.__getitem__)[:n_hidden]))


def test_masked_l1_equals_a_loop_over_pixels():
    generator = torch.Generator().manual_seed(1)
    recon, clean = (torch.randn(2, 3, 5, 6, generator=generator) for _ in range(2))
    masks = torch.rand(2, 5, 6, generator=generator) < 0.4
    total, n = 0.0, 0
    for b, y, x in masks.nonzero().tolist():
        n += 1
        total += sum(abs(float(recon[b, c, y, x]) - float(clean[b, c, y, x])) for c in range(3))
    assert abs(float(simmim.masked_l1(recon, clean, masks)) - total / (n + 1e-5) / 3) < 1e-5


# Model

@pytest.mark.parametrize("kind, in_chans", [("vit", 1), ("beit", 3), ("swin", 1)])
def test_hidden_pixels_leave_no_trace_and_shown_ones_do(kind, in_chans):
    model = small(kind, in_chans).eval()
    generator = torch.Generator().manual_seed(2)
    x, other = (torch.randn(2, in_chans, 64, 64, generator=generator) for _ in range(2))
    masks = simmim.unit_masks(torch.rand(2, 2, 2, generator=generator), 0.6, 32)
    with torch.no_grad():
        recon = model(x, masks)
        assert (recon.shape == x.shape
                and model.decoder[0].out_channels == recon.shape[1] * (64 // model.grid_size) ** 2)
        assert torch.equal(recon, model(torch.where(masks[:, None], other, x), masks))
        assert not torch.allclose(recon, model(torch.where(masks[:, None], x, other), masks))
        model.mask_token.zero_()
        assert not torch.allclose(recon, model(x, masks))
    assert not model.encoder.patch_embed._forward_hooks                 # the encoder alone is timm's again


def test_the_token_stands_in_for_patch_embeddings_before_positions_and_the_decoder_paints_its_patch():
    model, x = small("vit").eval(), torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(3))
    masks = simmim.unit_masks(torch.rand(2, 2, 2, generator=torch.Generator().manual_seed(4)), 0.6, 32)
    vit, weight, bias = model.encoder, model.decoder[0].weight[:, :, 0, 0], model.decoder[0].bias
    with torch.no_grad():
        tokens = vit.patch_embed(x)
        for b in range(2):
            for place in range(16):                                     # patches of 16 pixels in a 4 x 4 grid
                if masks[b, place // 4 * 16, place % 4 * 16]:
                    tokens[b, place] = model.mask_token[0, 0]
        tokens = torch.cat([vit.cls_token.expand(2, -1, -1), tokens], 1) + vit.pos_embed
        tokens = vit.norm(vit.blocks(tokens))[:, 1:]
        recon = torch.zeros(2, 1, 64, 64)
        for place in range(16):
            top, left = place // 4 * 16, place % 4 * 16
            recon[:, 0, top:top + 16, left:left + 16] = (tokens[:, place] @ weight.T + bias).view(2, 16, 16)
        assert torch.allclose(model(x, masks), recon, atol=1e-5)


@pytest.mark.parametrize("arch, model_args, size, encoder, decoder", [
    ("beit_base_patch16_224", BEIT, 224, 85_666_128, 590_592),
    ("swin_base_patch4_window7_224", {"window_size": 6}, 192, 86_725_304, 3_148_800)])
def test_parameter_counts_at_default_size(arch, model_args, size, encoder, decoder):
    config = {**simmim.DEFAULTS, "arch": arch, "model_args": model_args, "img_size": size, "in_chans": 3}
    model = simmim.SimMIM(simmim.make_model(config, 0, 0.0), 3, size)
    assert sum(p.numel() for p in model.decoder.parameters()) == decoder
    assert sum(p.numel() for p in model.encoder.parameters()) + model.mask_token.numel() == encoder
    assert not any(isinstance(module, timm.layers.DropPath) for module in model.modules())  # 0 means none


def test_published_relative_position_weights_load_to_identical_features(tmp_path):
    model = small("beit").eval()
    index = torch.zeros(17, 17, dtype=torch.long)
    published = {f"encoder.{name}": value for name, value in model.encoder.state_dict().items()}
    published |= {"encoder.mask_token": model.mask_token, "decoder.0.weight": torch.zeros(3, 3),
                  "encoder.rel_pos_bias.relative_position_index": index}
    torch.save({"model": published}, tmp_path / "simmim.pth")
    torch.manual_seed(9)
    fresh = timm.create_model(SMALL["beit"][0], num_classes=0, in_chans=1, img_size=64,
                              **SMALL["beit"][1]).eval()
    simmim.load_backbone(fresh, {**simmim.DEFAULTS, "init": str(tmp_path / "simmim.pth"),
                                 "arch": SMALL["beit"][0]})
    x = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert torch.equal(fresh.forward_features(x), model.encoder.forward_features(x))


# Optimiser

def config_of(**changes):
    return {**simmim.DEFAULTS, "batch": 256, "epochs": 100, "warmup_epochs": 10, **changes}


def test_corrected_cosine_at_hand_worked_points():
    rate = lambda step: simmim.learning_rate(step, config_of(), 10)     # half of the rates: batch 256 of 512
    assert (math.isclose(rate(0), 0.5e-6) and math.isclose(rate(50), (1e-4 + 0.5e-6) / 2)
            and math.isclose(rate(100), 1e-4))
    assert math.isclose(rate(550), (1e-4 + 0.5e-5) / 2) and math.isclose(rate(1000), 0.5e-5)


def test_paper_cosine_equals_timms_scheduler_stepped_after_the_optimiser():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    scheduler = timm.scheduler.CosineLRScheduler(optimizer, t_initial=1000, lr_min=0.5e-5, warmup_t=100,
                                                 warmup_lr_init=0.5e-6, t_in_epochs=False)
    for step in range(1000):
        rate = simmim.learning_rate(step, config_of(variant="paper"), 10)
        assert math.isclose(rate, optimizer.param_groups[0]["lr"], rel_tol=1e-9), step
        scheduler.step_update(step)                         # after the step: its rate comes one late


def test_step_schedule_divides_by_ten_once():
    config = config_of(schedule="step", step_epoch=70, lr=1e-4, warmup_lr=5e-7)
    rate, late = (lambda step, face=face: simmim.learning_rate(step, {**config, "variant": face}, 10)
                  for face in ("corrected", "paper"))
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

def test_processes_and_micro_batches_do_not_change_the_weights(pack, tmp_path, monkeypatch):
    flags = [*VIT, "--batch", 12, "--steps", 5, "--lr", 0.02, "--drop_path", 0.3, "--in_chans", 3]
    train_here(monkeypatch, pack, tmp_path / "one", *flags)
    train_here(monkeypatch, pack, tmp_path / "parts", *flags, "--micro-batch", 5)
    result = run_script("pretrain/simmim.py", "--manifest", pack, "--out", tmp_path / "three",
                        "--device", "cpu", "--log-steps", 1, "--warmup_epochs", 1, *flags, nproc=3)
    assert result.returncode == 0, result.stderr
    one = torch.load(tmp_path / "one/last.pt", weights_only=True)["model"]
    for name in ("parts", "three"):
        other = torch.load(tmp_path / name / "last.pt", weights_only=True)["model"]
        assert max(float((one[key] - other[key]).abs().max()) for key in one) <= 1e-5, name
        for here, there in zip(log_of(tmp_path / "one"), log_of(tmp_path / name), strict=True):
            assert abs(here["loss"] - there["loss"]) < 1e-5


def test_a_run_is_the_definition_written_out(pack, tmp_path, monkeypatch):
    """Warm-up and cosine, mean error where hidden, all gradients clipped together, AdamW: 5 steps by hand.

    The clip takes gradients near Adam's epsilon: there their scale counts, and rounding noise does not.
    """
    seen, make_views = [], simmim.make_views
    monkeypatch.setattr(simmim, "make_views", lambda *args: seen.append(make_views(*args)) or seen[-1])
    train_here(monkeypatch, pack, tmp_path, *VIT, "--in_chans", 3, "--batch", 10, "--samples", 30,
               "--epochs", 3, "--lr", 0.1, "--warmup_lr", 0.02, "--min_lr", 0.01, "--wd", 2, "--clip", 1e-4,
               "--steps", 5)
    torch.manual_seed(0)
    model = simmim.SimMIM(timm.create_model("vit_small_patch16_224", num_classes=0, in_chans=3,
                                            **json.loads(VIT[1])), 3, 32)
    spared = [p for name, p in model.named_parameters()
              if p.ndim == 1 or name in ("encoder.cls_token", "encoder.pos_embed")]
    others = [p for p in model.parameters() if all(p is not other for other in spared)]
    optimizer = torch.optim.AdamW([dict(params=others, weight_decay=2), dict(params=spared, weight_decay=0)])
    rates = [0.02, 0.02 + 0.08 / 3, 0.02 + 0.16 / 3,                        # 3 steps an epoch, 6 of cosine
             *(0.01 + 0.09 * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(6))]
    for (clean, masks), rate, line in zip(seen, rates, log_of(tmp_path)):
        error = (model(clean, masks) - clean).abs() * masks[:, None]
        loss = error.sum() / (masks.sum() + 1e-5) / 3
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
        for parameter in model.parameters():
            parameter.grad *= min(1, 1e-4 / (norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = rate * 10 / 512
        optimizer.step()
        assert abs(line["loss"] - loss.item()) < 1e-5 and abs(line["lr"] - rate * 10 / 512) < 1e-12
    assert len(seen) == 5
    last = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    for name, value in model.state_dict().items():
        assert torch.allclose(last[name], value, rtol=0, atol=1e-6), name


def test_a_run_in_two_pieces_gives_the_same_bytes(pack, tmp_path, monkeypatch):
    flags = [*VIT, "--batch", 10, "--epochs", 3, "--lr", 0.002, "--drop_path", 0.1, "--picture-epochs", 1]
    train_here(monkeypatch, pack, tmp_path / "whole", *flags)
    train_here(monkeypatch, pack, tmp_path / "cut", *flags, "--steps", 8)  # within the second epoch
    (tmp_path / "cut/backbone.pt").unlink()
    train_here(monkeypatch, pack, tmp_path / "cut", *flags)
    for name in ("backbone.pt", "recon_0001.png", "recon_0003.png"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name
    assert ([line["loss"] for line in log_of(tmp_path / "whole")]
            == [line["loss"] for line in log_of(tmp_path / "cut")])
    assert Image.open(tmp_path / "whole/recon_0003.png").size == (8 * 32, 4 * 32)


def test_backbones_load_strictly_into_timm_without_this_project(pack, tmp_path, monkeypatch):
    for kind, (arch, model_args) in SMALL.items():
        train_here(monkeypatch, pack, tmp_path / kind, "--arch", arch, "--model_args", json.dumps(model_args),
                   "--img_size", 64, "--batch", 8, "--steps", 1)
    code = ("import sys, timm, torch\nfor file in sys.argv[1:]:\n c = torch.load(file, weights_only=True)\n"
            " m = timm.create_model(c['arch'], in_chans=1, num_classes=0, img_size=c['img_size'],"
            " **c['model_args'])\n"
            " m.load_state_dict(c['model'], strict=True)\n print(m(torch.zeros(1, 1, 64, 64)).shape[1])")
    files = [str(tmp_path / kind / "backbone.pt") for kind in SMALL]
    result = subprocess.run([sys.executable, "-I", "-c", code, *files],
                            cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.split() == ["48", "48", "96"], result.stderr


def test_the_loss_falls(pack, tmp_path, monkeypatch):
    train_here(monkeypatch, pack, tmp_path, *VIT, "--batch", 20, "--epochs", 60, "--lr", 0.02,
               "--log-steps", 20)
    losses = [line["loss"] for line in log_of(tmp_path)]
    assert losses[-1] < 0.7 * losses[0], losses
