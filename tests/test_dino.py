"""Facts about pretrain/dino.py and the views it shares with SiT and MoCo-v3."""

import json
import math

import numpy as np
import pytest
import timm
import torch
import torchvision.transforms.functional as tv
from conftest import blobs, load_script, log_of, run_here, run_script, write_pack
from PIL import Image

dino = load_script("pretrain/dino.py")
HEADS, DEPTH, PATCH = 3, 2, 8
MODEL = {"img_size": 32, "patch_size": PATCH, "embed_dim": 48, "depth": DEPTH, "num_heads": HEADS}
HEAD = dict(out_dim=64, hidden_dim=32, bottleneck_dim=16)
LENGTHS, ROWS = (f"head.last_layer.parametrizations.weight.original{i}" for i in (0, 1))


def words(flags):
    """{key: value} as a command line."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in flags.items()]


TINY = words(dict(HEAD, model_args=MODEL, device="cpu"))


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return write_pack(tmp_path_factory.mktemp("pack"), blobs(40))


def config_of(**changes):
    return {**dino.DEFAULTS, **HEAD, "mean": [0.485], "std": [0.229], "img_size": 32, "exp": None, **changes}


def student_of(seed=0, in_chans=1, **changes):
    """A small student as a run with this seed begins with."""
    torch.manual_seed(seed)
    vit = timm.create_model("vit_small_patch16_224", num_classes=0, in_chans=in_chans, **MODEL)
    return dino.DINO(vit, **HEAD, **changes)


# The view and the method once more, of plain operations

def view_by_pillow(image, u, scale, size, blur, solarise):
    """The strong view of one image uint8 [H, W, C], pixels 0-255 [size, size, C], a step after the other."""
    u, (height, width, channels) = u.tolist(), image.shape
    for area, aspect in zip(u[:10], u[10:20]):
        area = height * width * (scale[0] + area * (scale[1] - scale[0]))
        aspect = math.exp(math.log(3 / 4) + aspect * math.log(16 / 9))         # width / height
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if h <= height and w <= width:
            break
    top, left = math.floor(u[20] * (height - h + 1)), math.floor(u[21] * (width - w + 1))
    box = image[top:top + h, left:left + w].astype(np.float32)
    planes = [np.array(Image.fromarray(plane).resize((size, size), Image.BICUBIC))
              for plane in box.transpose(2, 0, 1)]
    x = np.stack(planes, 2).clip(0, 255)
    x = x[:, ::-1] if u[22] < 0.5 else x
    grey = lambda x: x @ np.array([0.2989, 0.587, 0.114]) if channels == 3 else x[..., 0]    # torchvision's
    if u[23] < 0.8:
        b, c, s, h = ((2 * value - 1) * strength for value, strength in zip(u[24:28], (0.4, 0.4, 0.2, 0.1)))
        x = (x * (1 + b)).clip(0, 255)
        x = (grey(x).mean() + (1 + c) * (x - grey(x).mean())).clip(0, 255)
        if channels == 3:
            x = (grey(x)[..., None] + (1 + s) * (x - grey(x)[..., None])).clip(0, 255)
            turned = tv.adjust_hue(torch.from_numpy(x.transpose(2, 0, 1) / 255), h)
            x = turned.numpy().transpose(1, 2, 0) * 255
    if u[-2] < 0.2:
        x = grey(x)[..., None].repeat(channels, 2)
    if u[28] < blur:
        sigma = 0.1 + 1.9 * u[29]
        place = np.arange(size)
        weights = np.exp(-((place[:, None] - place) / sigma) ** 2 / 2)
        weights /= weights.sum(1, keepdims=True)
        x = np.einsum("ij,jkc,lk->ilc", weights, x, weights)
    return np.where(x >= 128, 255 - x, x) if u[-1] < solarise else x


def bicubic_weights(h, side, scale):
    """[side * side, h * h]: a grid at (i + 0.5) * scale - 0.5 by the cubic of a = -0.75, edges repeated."""
    def kernel(t):
        t = abs(t)
        return ((1.25 * t - 2.25) * t * t + 1 if t < 1 else
                ((-0.75 * t + 3.75) * t - 6) * t + 3 if t < 2 else 0)
    weights = torch.zeros(side, side, h, h, dtype=torch.float64)
    for i in range(side):
        for j in range(side):
            y, x = (i + 0.5) * scale - 0.5, (j + 0.5) * scale - 0.5
            for m in range(math.floor(y) - 1, math.floor(y) + 3):
                for n in range(math.floor(x) - 1, math.floor(x) + 3):
                    row, column = min(max(m, 0), h - 1), min(max(n, 0), h - 1)
                    weights[i, j, row, column] += kernel(y - m) * kernel(x - n)
    return weights.view(side * side, h * h)


def linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def norm(p, name, x):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def vit_features(p, x, paper=False, kept=None):
    """CLS features [B, D] after the last norm, and the last block's attention [B, heads, N + 1, N + 1].

    p: named tensors of a student; kept: factor [B, 2 * DEPTH] of each branch, as stochastic depth has it.
    """
    p = {name.removeprefix("backbone."): value for name, value in p.items()}
    side, dim = x.shape[2] // PATCH, p["cls_token"].shape[2]
    patches = x.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)             # [B, C, side, side, PATCH, PATCH]
    patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(len(x), side * side, -1)
    patches = patches @ p["patch_embed.proj.weight"].flatten(1).T + p["patch_embed.proj.bias"]
    cls, grid = p["cls_token"] + p["pos_embed"][:, :1], p["pos_embed"][:, 1:]
    if side != 4:
        grid = bicubic_weights(4, side, 4 / (side + 0.1 * paper)).to(x.dtype) @ grid
    x = torch.cat([cls.expand(len(x), 1, dim), patches + grid], 1)
    for number in range(DEPTH):
        for half in (0, 1):
            y = norm(p, f"blocks.{number}.norm{1 + half}", x)
            if half == 0:
                q, k, v = linear(p, f"blocks.{number}.attn.qkv", y).chunk(3, 2)
                q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in (q, k, v))
                attention = (q @ k.mT / math.sqrt(dim // HEADS)).exp()
                attention = attention / attention.sum(-1, keepdim=True)
                y = linear(p, f"blocks.{number}.attn.proj", (attention @ v).transpose(1, 2).flatten(2))
            else:
                y = linear(p, f"blocks.{number}.mlp.fc2", gelu(linear(p, f"blocks.{number}.mlp.fc1", y)))
            x = x + y * (1 if kept is None else kept[:, 2 * number + half, None, None])
    return norm(p, "norm", x)[:, 0], attention


def head_logits(p, x):
    x = linear(p, "head.mlp.4", gelu(linear(p, "head.mlp.2", gelu(linear(p, "head.mlp.0", x)))))
    rows = p[LENGTHS] * p[ROWS] / p[ROWS].norm(dim=1, keepdim=True)
    return x / x.norm(dim=1, keepdim=True) @ rows.T


def softmax(x):
    x = (x - x.amax(-1, keepdim=True)).exp()
    return x / x.sum(-1, keepdim=True)


def kept_factors(u, drop_path):
    """[B, 2 * DEPTH] from the uniforms of the blocks after the first, whose probability is 0."""
    probabilities = torch.linspace(0, drop_path, DEPTH).repeat_interleave(2)
    u = torch.cat([torch.ones(len(u), 2), u], 1)
    return (u >= probabilities) / (1 - probabilities)


def train_plainly(student, config, inputs, steps_an_epoch):
    """The training of a student, {name: tensor}, written out.

    inputs: for each step ten crops [b, C, s, s] and uniforms of stochastic depth [10, b, n].
    Returns the named tensors of student and teacher, the centre, and each step's terms for the log.
    """
    teacher = {name: value.clone() for name, value in student.items()}
    trained = {name: value.requires_grad_() for name, value in student.items()
               if name != LENGTHS or not config["norm_last_layer"]}
    decayed = [value for value in trained.values() if value.ndim > 1]
    spared = [value for value in trained.values() if value.ndim == 1]
    optimizer = torch.optim.AdamW([dict(params=decayed), dict(params=spared)])
    n_steps, n_warm = config["epochs"] * steps_an_epoch, config["warmup_epochs"] * steps_an_epoch
    first, last = config["warmup_teacher_temp"], config["teacher_temp"]
    temperatures = [*np.linspace(first, last, config["warmup_teacher_temp_epochs"]), *[last] * 100]
    fall = lambda start, end, share: end + (start - end) * (1 + math.cos(math.pi * share)) / 2
    after = [fall(config["lr"], config["min_lr"], i / (n_steps - n_warm)) for i in range(n_steps - n_warm)]
    rates = [*np.linspace(0, config["lr"], n_warm), *after]
    centre, paper, lines = 0, config["variant"] == "paper", []
    for step, (crops, depth) in enumerate(inputs):
        epoch = step // steps_an_epoch
        with torch.no_grad():
            features = [vit_features(teacher, crop)[0] for crop in crops[:2]]
            answers = [head_logits(teacher, x) for x in features]
        targets = [softmax((answer - centre) / temperatures[epoch]) for answer in answers]
        predictions = []
        for crop, u in zip(crops, depth):
            seen, _ = vit_features(student, crop, paper, kept_factors(u, config["drop_path"]))
            predictions.append(head_logits(student, seen))
        terms = [-(targets[i] * softmax(predictions[j] / config["student_temp"]).log()).sum(1).mean()
                 for i in range(2) for j in range(len(crops)) if i != j]
        loss = sum(terms) / len(terms)
        optimizer.zero_grad()
        loss.backward()
        for name, value in trained.items():
            if epoch < config["freeze_last_layer"] and "last_layer" in name:
                value.grad = None
            else:
                value.grad *= min(1, config["clip"] / (float(value.grad.norm()) + 1e-6))
        lr, wd = rates[step] * config["batch"] / 256, fall(config["wd"], config["wd_end"], step / n_steps)
        for group, decay in zip(optimizer.param_groups, (wd, 0)):
            group.update(lr=lr, weight_decay=decay)
        optimizer.step()
        momentum = fall(config["ema"], 1, step / n_steps)
        for name, value in teacher.items():
            value.copy_(momentum * value + (1 - momentum) * student[name].detach())
        kept = config["centre_momentum"]
        centre = kept * centre + (1 - kept) * torch.cat(answers).mean(0)
        p, unit = torch.cat(targets), features[0] / features[0].norm(dim=1, keepdim=True)
        lines.append(dict(
            epoch=epoch + 1, loss=loss.item(), entropy=-(p * p.log()).sum(1).mean().item(),
            batch_entropy=-(p.mean(0) * p.mean(0).log()).sum().item(),
            feature_std=unit.var(0, unbiased=False).sum().sqrt().item(),
            lr=lr, wd=wd, teacher_temp=temperatures[epoch]))
    return student, teacher, centre, lines


def generator_of(seed, step):
    number = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(number))


def assert_equal_weights(wanted, got, tolerance, but=()):
    for name, value in wanted.items():
        worst = float((got[name].double() - value.detach().double()).abs().max())
        assert worst < tolerance or name.endswith(tuple(but)), (name, worst)


@pytest.fixture
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_eight_steps_are_those_of_the_method_written_out_in_float64(pack, tmp_path, monkeypatch, in_float64):
    """Everything that can be learnt is, the released code's positions, crops of any kind."""
    flags = dict(samples=18, batch=6, epochs=4, warmup_epochs=1, lr=0.05, min_lr=0.01, wd=0.5, wd_end=2.0,
                 clip=0.02, drop_path=0.4, seed=3, variant="paper", norm_last_layer=False, ema=0.9,
                 warmup_teacher_temp=0.03, teacher_temp=0.06, warmup_teacher_temp_epochs=2,
                 student_temp=0.2, centre_momentum=0.8)
    generator = torch.Generator().manual_seed(0)
    crops = [[torch.randn(n, 6, 1, size, size, generator=generator) for n, size in ((2, 32), (8, 16))]
             for _ in range(8)]
    left = iter(crops)
    monkeypatch.setattr(dino, "make_crops", lambda *_: next(left))
    monkeypatch.setattr(dino, "attention_picture", lambda *_: None)         # its crop is float32
    run_here(dino, monkeypatch, "--manifest", pack, "--out", tmp_path, *TINY, *words(flags),
             "--log-steps", 1, "--steps", 8)
    start = student_of(3, norm_last_layer=False).state_dict()
    inputs = []
    for step, (large, small) in enumerate(crops):
        u = torch.rand(10, 6, dino.N_VIEW + 2, generator=generator_of(3, step))
        inputs.append(([*large, *small], u[..., -2:]))
    student, teacher, centre, lines = train_plainly(start, config_of(**flags), inputs, 3)
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    assert_equal_weights(student, last["student"], 1e-9)
    assert_equal_weights(teacher, last["teacher"], 1e-9)
    assert torch.allclose(last["centre"], centre, rtol=0, atol=1e-9)
    for got, wanted in zip(log_of(tmp_path), lines, strict=True):
        assert math.isclose(got["loss"], wanted["loss"], rel_tol=1e-9)
    for name in (LENGTHS, ROWS, "backbone.pos_embed", "backbone.blocks.1.mlp.fc2.weight"):
        assert (last["student"][name] - last["teacher"][name]).abs().max() > 1e-3, name     # has learnt


@pytest.mark.parametrize("nproc, micro", [(1, 4), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_a_run_is_the_definition_written_out(tmp_path, monkeypatch, nproc, micro):
    """Two epochs of some images, unequal parts, a line every third step; one process is stopped between."""
    flags = dict(samples=27, split="a,c", batch=6, epochs=2, warmup_epochs=1, lr=0.02, seed=11, drop_path=0.3,
                 in_chans=3, ema=0.9, warmup_teacher_temp=0.03, warmup_teacher_temp_epochs=2)
    splits = np.random.default_rng(0).choice(["a", "b", "c"], 60)
    pack = write_pack(tmp_path, blobs(60), split=splits)
    command = ["--manifest", pack, "--out", tmp_path, *TINY, *words(flags),
               "--log-steps", 3, "--micro-batch", micro]
    if nproc == 1:
        answers = iter([False, False, False, True])                         # to stop is asked for in step 4
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="75"):
            patch.setattr(dino, "catch_sigterm", lambda: lambda: next(answers))
            run_here(dino, patch, *command)
        run_here(dino, monkeypatch, *command)
    else:
        result = run_script("pretrain/dino.py", *command, nproc=nproc)
        assert result.returncode == 0, result.stderr

    images, inputs = np.load(tmp_path / "images.npy")[splits != "b"][:27, ..., None], []
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (
        [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    for step in range(8):                                                   # 4 an epoch, 3 images left over
        order = np.random.default_rng([11, step // 4]).permutation(27)
        chosen = images[order[step % 4 * 6:][:6]]
        u = torch.rand(10, 6, dino.N_VIEW + 2, generator=generator_of(11, step))
        kinds = [((0.4, 1.0), 32, 1.0, 0.0), ((0.4, 1.0), 32, 0.1, 0.2)] + [((0.05, 0.4), 16, 0.5, 0.0)] * 8
        views = [[view_by_pillow(*image_and_u, *kind) for image_and_u in zip(chosen, rows[:, :-2])]
                 for rows, kind in zip(u, kinds)]
        crops = [(torch.from_numpy(np.stack(view)).permute(0, 3, 1, 2) / 255 - mean) / std for view in views]
        inputs.append((crops, u[..., -2:]))
    start = {name: value.double() for name, value in student_of(11, in_chans=3).state_dict().items()}
    student, teacher, centre, lines = train_plainly(start, config_of(**flags), inputs, 4)

    last = torch.load(tmp_path / "last.pt", weights_only=True)
    no_gradient = ["attn.qkv.bias"]     # of the keys: there Adam makes steps of rounding noise
    assert_equal_weights(student, last["student"], 1e-6, no_gradient)
    assert_equal_weights(teacher, last["teacher"], 1e-6, no_gradient)
    assert torch.allclose(last["centre"].double(), centre, rtol=0, atol=1e-6)
    log = log_of(tmp_path)
    assert [line["step"] for line in log] == [3, 6, 8]
    for line, steps in zip(log, (lines[:3], lines[3:6], lines[6:])):
        assert [*line] == ["step", "epoch", "loss", "entropy", "batch_entropy", "feature_std", "lr", "wd",
                           "teacher_temp", "img_per_s", "time"]
        for name in ("loss", "entropy", "batch_entropy", "feature_std"):
            assert abs(line[name] - np.mean([step[name] for step in steps])) < 1e-5, name
        for name in ("epoch", "lr", "wd", "teacher_temp"):
            assert math.isclose(line[name], steps[-1][name], rel_tol=1e-9), name

    exported = torch.load(tmp_path / "backbone.pt", weights_only=True)
    vit = timm.create_model(exported["arch"], in_chans=exported["in_chans"], num_classes=0,
                            **exported["model_args"])
    vit.load_state_dict(exported["model"], strict=True)
    crop = inputs[0][0][0].float()
    assert torch.allclose(vit(crop), vit_features(last["teacher"], crop)[0], atol=1e-5)

    with Image.open(tmp_path / "attention_0002.png") as picture:            # by the trained teacher
        got = np.array(picture).reshape(8, 32, 1 + HEADS, 32).transpose(0, 2, 1, 3)
    for image, row in zip(images[:8], got):
        whole = Image.fromarray(image[..., 0].astype(np.float32)).resize((32, 32), Image.BICUBIC)
        whole = np.array(whole).clip(0, 255)
        assert np.abs(row[0] - whole).max() < 0.51                          # rounded
        x = (torch.from_numpy(whole) / 255 - mean) / std
        maps = vit_features(last["teacher"], x[None].float())[1][0, :, 0, 1:].reshape(HEADS, 4, 4).numpy()
        maps = (maps / maps.max((1, 2), keepdims=True)).repeat(8, 1).repeat(8, 2) * 255
        assert np.abs(row[1:] - maps).max() < 0.51


# Loss, temperatures, collapse

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
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):     # bf16: of the logits alone
        targets = dino.teacher_targets(teacher.to(dtype), centre, 0.04)
        loss = dino.dino_loss(student.to(dtype), targets, 0.1)
        assert targets.dtype == loss.dtype == torch.float32
        assert abs(float(loss) - np.mean(terms)) < tolerance * np.mean(terms)


@pytest.mark.parametrize("first, last, n", [(0.04, 0.04, 0), (0.04, 0.07, 30), (0.04, 0.07, 1)])
def test_teacher_temperature_is_linear_by_epoch_then_constant(first, last, n):
    config = config_of(warmup_teacher_temp=first, teacher_temp=last, warmup_teacher_temp_epochs=n)
    expected = np.concatenate([np.linspace(first, last, n), np.full(50 - n, last)])
    assert np.allclose([dino.teacher_temperature(config, epoch) for epoch in range(50)], expected)


def test_feature_std_is_the_root_of_the_summed_variances():
    features = torch.randn(50, 8) + torch.arange(8)
    unit = features / features.norm(dim=1, keepdim=True)
    assert torch.allclose(dino.feature_std(features, 1), unit.var(0, unbiased=False).sum().sqrt(), atol=1e-5)
    assert float(dino.feature_std(torch.ones(9, 4), 1)) < 1e-3                 # root of the rounding of 1


# Network

def test_parameter_counts_at_default_size():
    backbone = timm.create_model("vit_small_patch16_224", num_classes=0)
    keys = ("out_dim", "hidden_dim", "bottleneck_dim", "norm_last_layer")
    student = dino.DINO(backbone, **{key: dino.DEFAULTS[key] for key in keys})
    count = lambda model: sum(p.numel() for p in model.parameters())
    assert (count(student), count(student.head)) == (44_017_792, 22_352_128)
    assert sum(p.numel() for p in student.parameters() if not p.requires_grad) == 65_536


def test_the_head_begins_with_truncated_normals_and_rows_of_length_one():
    torch.manual_seed(0)
    state = dino.DINOHead(48, 64, 200, 100, norm_last_layer=True).state_dict()
    for layer in (0, 2, 4):
        weight = state[f"mlp.{layer}.weight"]
        # the sample's sd within 5 standard errors; PyTorch's default would have more than 0.04
        assert abs(weight.std() / 0.02 - 1) < 5 / math.sqrt(2 * weight.numel()) and abs(weight).max() < 2
        assert state[f"mlp.{layer}.bias"].eq(0).all()
    assert state[LENGTHS.removeprefix("head.")].eq(1).all()


@pytest.mark.parametrize("h, side", [(14, 6), (8, 3), (4, 7)])
@pytest.mark.parametrize("by_scale", [False, True])
def test_positions_are_bicubic_without_antialias_by_size_or_by_scale(h, side, by_scale):
    table = torch.randn(1, 1 + h * h, 5, generator=torch.Generator().manual_seed(h))
    fitted = dino.fit_to_grid(table, side, by_scale)
    expected = bicubic_weights(h, side, h / (side + 0.1) if by_scale else h / side) @ table[0, 1:].double()
    assert torch.equal(fitted[:, 0], table[:, 0])
    assert torch.allclose(fitted[0, 1:].double(), expected, atol=1e-5)
    assert dino.fit_to_grid(table, h, by_scale) is table


def test_crops_of_a_size_are_one_pass():
    model, passes = student_of(), []
    model.backbone.patch_embed.register_forward_hook(lambda module, args, output: passes.append(len(output)))
    logits, features = model([torch.randn(2, 3, 1, 32, 32), torch.randn(8, 3, 1, 16, 16)])
    assert passes == [6, 24] and logits.shape == (10, 3, 64) and features.shape == (10, 3, 48)


def test_dropout_of_positions_and_of_patches_acts_in_training_alone():
    crops = [torch.randn(2, 3, 1, 32, 32)]
    for args in (dict(pos_drop_rate=0.5), dict(patch_drop_rate=0.5)):
        torch.manual_seed(0)
        vit = timm.create_model("vit_small_patch16_224", num_classes=0, in_chans=1, **MODEL, **args)
        model = dino.DINO(vit, **HEAD)
        assert not torch.equal(model(crops)[1], student_of()(crops)[1])
        assert torch.equal(model.eval()(crops)[1], student_of()(crops)[1])


def test_the_picture_of_attention_shows_whole_images_of_any_shape(tmp_path):
    images = [torch.from_numpy(blobs(3)[i][None, :side]) for i, side in enumerate([40, 25, 13])]
    dino.attention_picture(student_of().eval().backbone, images, config_of(), tmp_path / "a.png")
    picture = np.array(Image.open(tmp_path / "a.png"), float).reshape(3, 32, 1 + HEADS, 32)
    for image, got in zip(images, picture[:, :, 0]):
        whole = Image.fromarray(image[0].numpy().astype(np.float32)).resize((32, 32), Image.BICUBIC)
        assert np.abs(got - np.array(whole).clip(0, 255)).max() < 0.51


def test_timms_dynamic_image_size_changes_nothing():
    crops = [torch.randn(2, 3, 1, 32, 32), torch.randn(4, 3, 1, 16, 16)]
    torch.manual_seed(0)
    vit = timm.create_model("vit_small_patch16_224", num_classes=0, in_chans=1, dynamic_img_size=True, **MODEL)
    assert torch.equal(dino.DINO(vit, **HEAD)(crops)[0], student_of()(crops)[0])


@pytest.mark.parametrize("flags", [
    dict(arch="resnet10t", model_args={}),
    dict(model_args={**MODEL, "class_token": False, "global_pool": "avg"})])
def test_networks_without_cls_token_are_refused(pack, tmp_path, monkeypatch, capsys, flags):
    with pytest.raises(SystemExit) as ended:
        run_here(dino, monkeypatch, "--manifest", pack, "--out", tmp_path / "run", "--batch", 8, *TINY,
                 *words(flags))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("error: cannot use ") and error.count("\n") == 1
    assert "class token" in error and not (tmp_path / "run").exists()


# Views

@pytest.mark.parametrize("channels", [1, 3])
def test_strong_views_are_pillows_a_step_after_the_other(channels):
    """Shares of a half: every other view is blurred, every other solarised."""
    images = np.stack([blobs(40 * channels)[c::channels] for c in range(channels)], 3)[:, :36]
    u = torch.rand(40, dino.N_VIEW, generator=torch.Generator().manual_seed(channels))
    config = config_of(in_chans=channels, mean=[0.0] * channels, std=[1 / 255] * channels)  # pixels again
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    views = dino.strong_view(pixels, u, (0.05, 0.4), 24, 0.5, 0.5, config)
    for image, row, view in zip(images, u, views.permute(0, 2, 3, 1).numpy()):
        assert np.abs(view - view_by_pillow(image, row, (0.05, 0.4), 24, 0.5, 0.5)).max() < 2e-3


@pytest.mark.parametrize("size, patch, expected", [
    (224, 16, 96), (64, 8, 24), (32, 8, 16), (64, 16, 32), (16, 16, 16)])
def test_local_crops_are_in_proportion_and_whole_patches(size, patch, expected):
    images, config = torch.zeros(1, 1, 40, 40, dtype=torch.uint8), config_of(img_size=size, n_local_crops=1)
    crops = dino.make_crops(images, torch.zeros(3, 1, dino.N_VIEW), patch, config)
    assert [tuple(views.shape) for views in crops] == [(2, 1, 1, size, size), (1, 1, 1, expected, expected)]
    with pytest.raises(ValueError):                     # numbers drawn for a crop that nothing makes
        dino.make_crops(images, torch.zeros(4, 1, dino.N_VIEW), patch, config)


# Learning

@pytest.mark.slow
def test_the_student_learns_to_predict_the_teacher_without_collapse(tmp_path, monkeypatch):
    """40 stripes told apart by brightness, period and contrast, all in each batch."""
    y, x = np.mgrid[:40, :40]
    images = [level + amplitude * np.sin(2 * np.pi / period * (x * np.cos(level) + y * np.sin(level)))
              for level in (30, 80, 130, 180, 225) for period in (5, 9, 16, 30) for amplitude in (15, 60)]
    pack = write_pack(tmp_path, np.clip(images, 0, 255).astype(np.uint8))
    flags = dict(batch=40, epochs=100, lr=0.003, warmup_epochs=20, freeze_last_layer=10, n_local_crops=2,
                 drop_path=0, ema=0.99, wd_end=0.04, out_dim=256, hidden_dim=128, bottleneck_dim=64, seed=4)
    run_here(dino, monkeypatch, "--manifest", pack, "--out", tmp_path, *TINY, *words(flags), "--log-steps", 1)
    log = log_of(tmp_path)
    first, last = ({key: np.mean([line[key] for line in lines]) for key in log[0]}
                   for lines in (log[:10], log[-10:]))
    # knowing nothing of the image, the student could at best reach the entropy of the mean target
    assert (first["loss"] > first["batch_entropy"]
            and last["loss"] < last["batch_entropy"] - 0.15), (first, last)
    assert last["loss"] - last["entropy"] < 0.6 * (first["loss"] - first["entropy"]), (first, last)
    # collapse to one output: batch_entropy 0; to the uniform one: entropy log(out_dim)
    assert last["batch_entropy"] > 0.5 * math.log(256) and last["entropy"] < 0.9 * math.log(256), last
    assert last["feature_std"] > 0.4, last
