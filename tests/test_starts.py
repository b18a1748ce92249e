"""Starting weights of all makers: a run with --init and rate 0 writes a backbone.pt of the same features.

A file of each layout is made from a small network by its maker's names.
"""

import argparse
import json
import re
import sys
import types

import huggingface_hub
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import assert_user_error, blobs, fork_script, load_script, run_here, write_pack
from safetensors.torch import save_file

MODEL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
SCALED = {**MODEL, "init_values": 1.0}                  # layer scale, as DINOv2
VIT, SWIN, BEIT = "vit_small_patch16_224", "swin_tiny_patch4_window7_224", "beit_base_patch16_224"
SWIN_MODEL = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": [1, 1, 2],
              "num_heads": [1, 2, 3]}
BEIT_MODEL = {**MODEL, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "init_values": 0.1,
              "global_pool": "token"}
RESNET_MODEL = {"layers": [1, 1, 1, 1], "channels": [16, 16, 32, 32]}
GMML, SIMMIM, SUPERVISED = "pretrain/gmml.py", "pretrain/simmim.py", "pretrain/supervised.py"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_pack(tmp_path_factory.mktemp("pack"), blobs(8), A=[0, 1] * 4)


def network(arch=VIT, model_args=MODEL, in_chans=3, seed=0):
    """A timm network none of whose tensors is special: not zero, not one, no two alike."""
    torch.manual_seed(seed)
    model = timm.create_model(arch, num_classes=0, in_chans=in_chans, **model_args).eval()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            noise = 0.1 * torch.randn_like(value)
            value.add_(noise.abs() if name.endswith("running_var") else noise)
    return model


def start(script, manifest, cwd, init, arch=VIT, model_args=MODEL, in_chans=3, flags=(), steps=1):
    """Run a script from `init` for a step of rate 0 in the folder cwd: its CompletedProcess."""
    own = {SIMMIM: ["--warmup_lr", 0, "--mask_unit", 8]}.get(script, [])
    return fork_script(script, "--manifest", manifest, "--out", cwd / "run", "--arch", arch, "--model_args",
                       json.dumps(model_args), "--in_chans", in_chans, "--init", init, "--steps", steps,
                       "--lr", 0, "--min_lr", 0, "--wd", 0, "--batch", 4, "--device", "cpu", *own, *flags,
                       cwd=cwd)


def backbone(cwd):
    """The network of backbone.pt."""
    card = torch.load(cwd / "run/backbone.pt", weights_only=True)
    model = timm.create_model(card["arch"], num_classes=0, in_chans=card["in_chans"], **card["model_args"])
    model.load_state_dict(card["model"])
    return model.eval()


def assert_same_features(one, two, side=32):
    norms = [module for module in one.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    if norms:                                           # the step has moved the running statistics
        for model in (one, two):
            model.train()
    x = torch.randn(8, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, got = one.forward_features(x), two.forward_features(x)
    assert wanted.std() > 0.01 and (wanted - got).abs().max() <= 1e-5


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def renamed(state, *pairs):
    """The names after re.sub of each (pattern, replacement) in turn."""
    for pattern, new in pairs:
        state = {re.sub(pattern, new, name): value for name, value in state.items()}
    return state


def worse(state):
    """Another network of the same names: raw where the average is wanted, student for teacher."""
    return {name: value + 1 if value.is_floating_point() else value for name, value in state.items()}


def head(prefix=""):
    return {f"{prefix}head.weight": torch.ones(5, 48), f"{prefix}head.bias": torch.ones(5)}


def hugging_face(state):
    """Names of transformers' ViTModel: queries, keys and values apart."""
    apart = {}
    for name, value in state.items():
        if "attn.qkv" in name:
            for part, third in zip(("query", "key", "value"), value.chunk(3)):
                apart[name.replace("attn.qkv", f"attention.attention.{part}")] = third
        else:
            apart[name] = value
    return renamed(apart, (r"^(cls_token|mask_token)", r"embeddings.\1"),
                   ("^pos_embed", "embeddings.position_embeddings"),
                   (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
                   (r"^blocks\.", "encoder.layer."), (r"attn\.proj", "attention.output.dense"),
                   (r"^norm\.", "layernorm."))


def chunked(state):
    """DINOv2's training in chunks of blocks: the chunk's number in front of the block's own."""
    return {re.sub(r"blocks\.(\d+)", lambda block: f"blocks.{int(block[1]) // 2}.{block[1]}", name): value
            for name, value in state.items()}


def simmim(state):
    """SimMIM's own ViT has biases of queries and values only; its encoder stands beside a decoder."""
    own = {}
    for name, value in state.items():
        if name.endswith("qkv.bias"):
            q, k, v = value.chunk(3)
            k.zero_()                                   # in the source too: the layout has no other
            own |= {name.replace("qkv.bias", "q_bias"): q, name.replace("qkv.bias", "v_bias"): v}
        else:
            own[name] = value
    return under("encoder.", own) | {"encoder.mask_token": torch.ones(1, 1, 48),
                                     "decoder.0.weight": torch.ones(192, 48, 1, 1),
                                     "decoder.0.bias": torch.ones(192)}


def simmim_config():
    """The configuration in SimMIM's files, of a class of a package that is not installed here."""
    package = types.ModuleType("yacs.config")
    package.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    sys.modules["yacs"], sys.modules["yacs.config"] = types.ModuleType("yacs"), package
    config = package.CfgNode(MODEL=package.CfgNode(TYPE="vit", DEPTH=12), AMP="O1")
    config.frozen = True
    return config


def microsoft_swin(state):
    """Swin's release: a stage ends, not begins, with the downsampling; masks and indices are stored."""
    def earlier(match):
        return f"layers.{int(match[1]) - 1}.downsample"
    own = {re.sub(r"layers\.(\d)\.downsample", earlier, name): value for name, value in state.items()}
    for name in [name for name in own if name.endswith("bias_table")]:
        own[name.replace("bias_table", "index")] = torch.zeros(16, 16, dtype=torch.int64)
    return own | {"layers.0.blocks.1.attn_mask": torch.zeros(4, 16, 16)}


def sequential(state):
    """A ResNet's children in a torch.nn.Sequential, numbered in the order of torchvision."""
    order = ["conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3", "layer4"]
    return {f"{order.index(name.split('.')[0])}.{name.partition('.')[2]}": value for name, value in state.items()}


def mae(state):
    decoder = {"decoder_pos_embed": torch.ones(1, 17, 48), "decoder_embed.weight": torch.ones(48, 48),
               "decoder_embed.bias": torch.ones(48), "decoder_pred.weight": torch.ones(192, 48)}
    blocks = {f"decoder_{name}": value for name, value in worse(state).items()
              if name.startswith(("blocks", "norm"))}
    return state | decoder | blocks | {"mask_token": torch.ones(1, 1, 48)}


ARGS = argparse.Namespace(lr=1e-3, arch="vit_small")
VIT_LAYOUTS = {                     # state dict of the network -> content of the file
    "timm": lambda s: s | head(),
    "DeiT": lambda s: {"model": s | head(), "epoch": 3, "args": ARGS},
    "ours": lambda s: {"model": s, "arch": VIT, "model_args": MODEL, "in_chans": 3, "epoch": 3, "exp": None},
    "DINO teacher": lambda s: {
        "student": under("module.backbone.", worse(s)) | {"module.head.mlp.0.weight": torch.ones(3, 48)},
        "teacher": under("backbone.", s) | {"head.mlp.0.weight": torch.ones(3, 48)},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}, "epoch": 3, "args": ARGS,
        "fp16_scaler": None, "dino_loss": {"center": torch.zeros(1, 3)}},
    "MAE": lambda s: {"model": mae(s), "optimizer": {}, "epoch": 799, "scaler": {}, "args": ARGS},
    "MoCo-v3": lambda s: {"epoch": 300, "arch": "vit_small", "state_dict":
                          under("module.momentum_encoder.", worse(s)) | under("module.base_encoder.", s)
                          | {"module.base_encoder.head.0.weight": torch.ones(9, 48),
                             "module.predictor.0.weight": torch.ones(9, 9)}},
    "MoCo encoder_q": lambda s: {"state_dict": under("module.encoder_k.", worse(s))
                                 | under("module.encoder_q.", s) | {"module.queue": torch.ones(128, 9)}},
    "SimMIM": lambda s: {"model": simmim(s), "config": simmim_config(), "epoch": 799},
    "SiT": lambda s: {"student": under("module.backbone.", worse(s))
                      | {"module.rec_head.mlp.0.weight": torch.ones(2)},
                      "teacher": under("module.backbone.", s), "epoch": 3, "args": ARGS},
    "SiT, first release": lambda s: {"model": worse(s), "model_ema": s, "lr_scheduler": {}, "args": ARGS},
    "GMML": lambda s: {"SiT_model": under("module.backbone.", s)
                       | {"module.head_recons.mlp.0.weight": torch.ones(48, 48)}, "epoch": 3, "args": ARGS},
    "lightly": lambda s: {"state_dict": under("student_backbone.vit.", s), "hyper_parameters": {}},
    "lightly DINO": lambda s: {"state_dict": under("student_backbone.", worse(s))
                               | under("teacher_backbone.", s)
                               | {"student_head.layers.0.weight": torch.ones(3, 48)}},
    "torch.compile": lambda s: {"model": under("_orig_mod.", s)},
    "compiled and parallel": lambda s: under("module._orig_mod.", s),
    "model.": lambda s: under("model.", s),
    "Lightning": lambda s: {"epoch": 1, "global_step": 10, "pytorch-lightning_version": "2.5",
                            "state_dict": under("model.", s) | {"loss.weight": torch.ones(2)}},
    "I-JEPA": lambda s: {"encoder": under("module.", worse(s)), "target_encoder": under("module.", s)},
    "SWA": lambda s: {"model": worse(s), "swa_model": under("module.", s)},
    "timm's training": lambda s: {"epoch": 1, "arch": VIT, "state_dict": worse(s), "state_dict_ema": s},
    "model_ema": lambda s: {"model": worse(s),
                            "model_ema": under("module.", s) | {"n_averaged": torch.tensor(3)}},
    "net, backbone": lambda s: {"net": under("backbone.encoder.", s)},
    "Hugging Face ViT": lambda s: renamed(
        under("vit.", hugging_face(s)), ("norm1", "layernorm_before"), ("norm2", "layernorm_after"),
        (r"mlp\.fc1", "intermediate.dense"), (r"mlp\.fc2", "output.dense")) | {
            "classifier.weight": torch.ones(5, 48), "vit.pooler.dense.weight": torch.ones(48, 48)},
    "named parameters": lambda s: {"model": {name: torch.nn.Parameter(value) for name, value in s.items()}},
}
SCALED_LAYOUTS = {
    "DINOv2": lambda s: s | {"mask_token": torch.ones(1, 48)},
    "DINOv2 teacher": lambda s: {"teacher": under("backbone.", chunked(s)) | {
        "backbone.mask_token": torch.ones(1, 48), "dino_head.mlp.0.weight": torch.ones(3, 48)}},
    "DINOv2 student and teacher": lambda s: {
        "iteration": 9,
        "model": under("student.backbone.", worse(chunked(s))) | under("teacher.backbone.", chunked(s))},
    "Hugging Face DINOv2": lambda s: renamed(hugging_face(s | {"mask_token": torch.ones(1, 48)}),
                                             (r"ls(\d)\.gamma", r"layer_scale\1.lambda1")),
}
LAYOUTS = [*((GMML, VIT, MODEL, name, layout) for name, layout in VIT_LAYOUTS.items()),
           *((GMML, VIT, SCALED, name, layout) for name, layout in SCALED_LAYOUTS.items()),
           (SIMMIM, BEIT, BEIT_MODEL, "SimMIM BEiT", lambda s: {"model": under("encoder.", s) | {
               "encoder.mask_token": torch.ones(1, 1, 48), "encoder.rel_pos_bias.relative_position_index":
               torch.zeros(17, 17, dtype=torch.int64)}, "config": simmim_config()}),
           (SIMMIM, SWIN, SWIN_MODEL, "Swin", lambda s: {"model": microsoft_swin(s) | head()}),
           (SIMMIM, SWIN, SWIN_MODEL, "SimMIM Swin", lambda s: {
               "model": under("encoder.", microsoft_swin(s)) | {
                   "encoder.mask_token": torch.ones(1, 1, 12), "decoder.0.bias": torch.ones(48)}}),
           (SIMMIM, VIT, MODEL, "SimMIM ViT", lambda s: {"model": simmim(s)}),
           (SUPERVISED, VIT, MODEL, "DINO", VIT_LAYOUTS["DINO teacher"]),
           (SUPERVISED, VIT, SCALED, "DINOv2 teacher", SCALED_LAYOUTS["DINOv2 teacher"]),
           (SUPERVISED, "resnet18", RESNET_MODEL, "torchvision ResNet",
            lambda s: s | {"fc.weight": torch.ones(5, 32)}),
           (SUPERVISED, "resnet18", RESNET_MODEL, "MoCo ResNet", lambda s: {"arch": "resnet18", "state_dict":
               under("module.encoder_q.", s) | under("module.encoder_k.", worse(s))
               | {"module.encoder_q.fc.0.weight": torch.ones(9, 32), "module.queue": torch.ones(128, 9)}}),
           (SUPERVISED, "resnet18", RESNET_MODEL, "RadImageNet ResNet", lambda s: under("backbone.", sequential(s))),
           (SUPERVISED, "resnet18", RESNET_MODEL, "lightly ResNet", lambda s: {"state_dict": under(
               "backbone.", sequential(s)) | under("backbone_momentum.", worse(sequential(s))) | {
                   "projection_head.layers.0.weight": torch.ones(9, 32)}}),
           (SUPERVISED, "resnet18", RESNET_MODEL, "Lightning ResNet",
            lambda s: {"state_dict": under("model.", s)})]


@pytest.mark.parametrize("script, arch, model_args, name, layout", LAYOUTS, ids=[row[3] for row in LAYOUTS])
def test_every_makers_file_gives_the_features_of_its_network(
        script, arch, model_args, name, layout, manifest, tmp_path):
    source = network(arch, model_args)
    torch.save(layout(source.state_dict()), tmp_path / "w.pth")
    result = start(script, manifest, tmp_path, "w.pth", arch, model_args)
    assert result.returncode == 0, result.stderr
    assert_same_features(source, backbone(tmp_path))
    assert re.search(r"\b\d+ tensors of w\.pth", result.stdout), result.stdout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_safetensors_of_any_precision(dtype, manifest, tmp_path):
    source = network()
    state = {name: value.to(dtype) for name, value in source.state_dict().items()}
    save_file(under("backbone.", state), tmp_path / "w.safetensors")
    result = start(GMML, manifest, tmp_path, "w.safetensors")
    assert result.returncode == 0, result.stderr
    source.load_state_dict({name: value.float() for name, value in state.items()})
    assert_same_features(source, backbone(tmp_path))


def test_the_students_weights_are_taken_where_they_are_asked_for(manifest, tmp_path):
    source = network()
    content = VIT_LAYOUTS["DINO teacher"](source.state_dict())
    content["student"], content["teacher"] = content["teacher"], content["student"]
    torch.save(content, tmp_path / "w.pth")
    result = start(GMML, manifest, tmp_path, "w.pth", flags=["--init_key", "student"])
    assert result.returncode == 0, result.stderr
    assert_same_features(source, backbone(tmp_path))


@pytest.mark.parametrize("script", [GMML, SUPERVISED])
def test_what_was_taken_left_out_and_differs_is_said_in_a_line(script, manifest, tmp_path):
    wide = {**MODEL, "embed_dim": 384, "depth": 2}
    twelve = network(VIT, {**wide, "num_heads": 12}).state_dict()
    files = {"moco": VIT_LAYOUTS["MoCo-v3"](twelve), "ours": {
        "model": twelve, "model_args": {**wide, "num_heads": 12}, "mean": [0.5] * 3, "std": [0.25] * 3}}
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pth")
        for n_heads in (12, 6):
            result = start(script, manifest, tmp_path, f"{name}.pth",
                           model_args={**wide, "num_heads": n_heads}, flags=["--resume", "never"])
            assert result.returncode == 0, result.stderr
            line = next(line for line in result.stdout.splitlines() if f"tensors of {name}.pth" in line)
            assert ("heads 12" in line and "6" in line) == (n_heads == 6), line
            assert ("mean [0.5" in line and "std [0.25" in line) == (name == "ours"), line
            assert ("base_encoder" in line and re.search("left out: head.0.weight", line) is not None) == (name == "moco"), line


# Channels and positions

@pytest.mark.parametrize("script, arch, model_args", [
    (GMML, VIT, MODEL), (SUPERVISED, "resnet18", RESNET_MODEL)])
@pytest.mark.parametrize("before, after, how, factor", [
    (3, 1, "average", 1 / 3), (3, 1, "sum", 1),
    (1, 3, "duplicate", 3), (1, 3, "duplicate_mean", 1), (1, 3, "average", 3)])
def test_the_first_layer_answers_to_grey_input_as_stated(
        script, arch, model_args, before, after, how, factor, manifest, tmp_path):
    source = network(arch, model_args, before)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    result = start(script, manifest, tmp_path, "w.pth", arch, model_args, after, ["--channel_adapt", how])
    assert result.returncode == 0, result.stderr
    assert re.search(r"(conv1|patch_embed\.proj)\.weight", result.stdout)
    target = backbone(tmp_path)
    x = torch.randn(2, 1, 32, 32)
    layers = [model.conv1 if arch == "resnet18" else model.patch_embed.proj for model in (source, target)]
    answers = [F.conv2d(x.expand(-1, n, -1, -1), layer.weight, stride=8)
               for layer, n in zip(layers, (before, after))]
    assert torch.allclose(answers[1], factor * answers[0], atol=1e-5) and answers[0].std() > 0.1


@pytest.mark.parametrize("script", [GMML, SUPERVISED])
@pytest.mark.parametrize("args, n_other", [({}, 1), ({"no_embed_class": True}, 0), ({"reg_tokens": 2}, 3)])
def test_positions_on_another_grid_are_timms_and_the_other_tokens_rows_stay(script, args, n_other, manifest, tmp_path):
    source = network(VIT, {**MODEL, **args})
    torch.save(source.state_dict(), tmp_path / "w.pth")
    result = start(script, manifest, tmp_path, "w.pth", model_args={**MODEL, **args, "img_size": 48})
    assert result.returncode == 0 and "pos_embed" in result.stdout, result.stderr
    got, old = backbone(tmp_path).pos_embed, source.pos_embed
    wanted = timm.layers.resample_abs_pos_embed(
        old, [6, 6], num_prefix_tokens=n_other, interpolation="bicubic", antialias=False)
    by_hand = F.interpolate(old[:, n_other:].mT.unflatten(2, (4, 4)), (6, 6), mode="bicubic").flatten(2).mT
    assert torch.equal(got[:, :n_other], old[:, :n_other]) and torch.allclose(got, wanted, atol=1e-6)
    assert torch.allclose(got[:, n_other:], by_hand, atol=1e-6)


def test_bias_tables_on_another_grid_are_bicubic_and_beits_cls_biases_stay(manifest, tmp_path):
    def table(old, rows, side):
        grid = old[:rows].T.view(1, -1, round(rows ** 0.5), round(rows ** 0.5))
        return torch.cat([F.interpolate(grid, (side, side), mode="bicubic")[0].flatten(1).T, old[rows:]])
    for arch, args, other, name, rows, side in [
            (SWIN, SWIN_MODEL, {"img_size": 64, "window_size": 8},
             "layers.0.blocks.0.attn.relative_position_bias_table", 49, 15),
            (BEIT, BEIT_MODEL, {"img_size": 48}, "rel_pos_bias.relative_position_bias_table", 49, 11)]:
        source = network(arch, args)
        torch.save(source.state_dict(), tmp_path / f"{arch}.pth")
        result = start(SIMMIM, manifest, tmp_path, f"{arch}.pth", arch, {**args, **other},
                       flags=["--resume", "never"])
        assert result.returncode == 0 and "bias_table" in result.stdout, result.stderr
        got, old = backbone(tmp_path).state_dict()[name], source.state_dict()[name]
        assert torch.allclose(got, table(old, rows, side), atol=1e-5), arch


# Names that stand for files

@pytest.mark.parametrize("init, script, arch, model_args", [
    ("timm", GMML, VIT, MODEL), (f"timm:{VIT}", SUPERVISED, VIT, MODEL),
    ("torchvision", SUPERVISED, "resnet18", RESNET_MODEL), ("exp:9.9", GMML, VIT, MODEL)])
def test_a_name_stands_for_exactly_its_file(init, script, arch, model_args, manifest, tmp_path):
    source = network(arch, model_args)
    folder = tmp_path / ("runs/9.9/pretrain" if init.startswith("exp") else "weights")
    folder.mkdir(parents=True)
    file = folder / ("backbone.pt" if init.startswith("exp") else f"{arch}.pth")
    torch.save({"model": source.state_dict()}, file)
    for other in (f"{arch}.dino.safetensors", f"{arch}.augreg.safetensors"):
        save_file(worse(source.state_dict()), folder / other)
    for other in (f"{arch}_in21k.pth", f"{arch}.ema.pth"):
        torch.save(worse(source.state_dict()), folder / other)
    result = start(script, manifest, tmp_path, init, arch, model_args)
    assert result.returncode == 0, result.stderr
    assert_same_features(source, backbone(tmp_path))
    assert ("made with mean [0.5, 0.5, 0.5]" in result.stdout) == init.startswith("timm")
    torch.save({"model": worse(source.state_dict())}, file)                 # replaced between two runs
    again = start(script, manifest, tmp_path, init, arch, model_args, steps=2)
    assert_user_error(again, "run/last.pt", "start")


def test_weights_that_are_not_there_and_cannot_be_fetched_name_the_file_to_provide(
        manifest, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for init, name in (("timm", VIT), ("timm:vit_tiny_patch16_224", "vit_tiny_patch16_224")):
        with pytest.raises(SystemExit) as stop:
            run_here(load_script(GMML), monkeypatch, "--manifest", manifest, "--out", tmp_path / "run",
                     "--init", init, "--batch", 4, "--device", "cpu")
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and error.startswith("error: ") and f"weights/{name}.pth" in error


# Files that do not fill the network

@pytest.mark.parametrize("script", [GMML, SIMMIM, SUPERVISED])
@pytest.mark.parametrize("content, says", [
    (lambda s: {"net": network("resnet18", RESNET_MODEL).state_dict()},
     ["net.conv1.weight", "net.bn1.weight", "net.bn1.bias"]),
    (lambda s: {name: value for name, value in s.items() if "blocks.3" not in name},
     ["cls_token", "pos_embed", "patch_embed.proj.weight"]),
    (lambda s: s | {"blocks.0.attn.qkv.weight": torch.zeros(144, 47)}, ["blocks.0.attn.qkv.weight", "47"]),
    (lambda s: renamed(s, ("cls_token", "class_token")), ["class_token"]),
    (lambda s: s | {"pos_embed": torch.zeros(1, 12, 48)}, ["pos_embed"])])
def test_a_file_that_does_not_fill_the_network_is_refused_by_names_it_has(
        script, content, says, manifest, tmp_path):
    torch.save(content(network().state_dict()), tmp_path / "w.pth")
    result = start(script, manifest, tmp_path, "w.pth")
    assert_user_error(result, "w.pth", *says)
    assert not list(tmp_path.glob("run/*"))


@pytest.mark.parametrize("script", [GMML, SUPERVISED])
def test_a_layer_scale_that_the_network_lacks_is_refused(script, manifest, tmp_path):
    torch.save(network(VIT, SCALED).state_dict(), tmp_path / "w.pth")
    assert_user_error(start(script, manifest, tmp_path, "w.pth"), "w.pth", "blocks.0.ls1.gamma")


@pytest.mark.parametrize("script", [GMML, SUPERVISED])
def test_a_network_with_more_blocks_is_refused(script, manifest, tmp_path):
    torch.save(network(VIT, {**MODEL, "depth": MODEL["depth"] + 1}).state_dict(), tmp_path / "w.pth")
    assert_user_error(start(script, manifest, tmp_path, "w.pth"), "w.pth", "blocks.4.norm1.weight")


@pytest.mark.parametrize("script", [GMML, SUPERVISED])
@pytest.mark.parametrize("theirs, ours, name", [
    ({"qk_norm": True}, {}, "q_norm.weight"), ({}, {"qkv_bias": False}, "qkv.bias"), ({"reg_tokens": 2}, {}, "reg_token")])
def test_what_makes_another_network_is_refused_not_left_out(script, theirs, ours, name, manifest, tmp_path):
    torch.save(network(VIT, {**MODEL, **theirs}).state_dict(), tmp_path / "w.pth")
    assert_user_error(start(script, manifest, tmp_path, "w.pth", model_args={**MODEL, **ours}), "w.pth", name)


@pytest.mark.parametrize("script, arch, args, name", [
    *((script, VIT, MODEL, name) for script in (GMML, SUPERVISED) for name in (
        "blocks.0.attn.qkv.lora_A.weight", "blocks.1.mlp.fc3.bias", "patch_embed.norm.weight", "norm_pre.weight",
        "dist_token", "absolute_pos_embed")),
    *((script, VIT, MODEL, name) for script in (GMML, SUPERVISED) for name in (
        "embeddings.register_tokens", "rel_pos_bias.relative_position_bias_table", "norm.gamma")),
    (SUPERVISED, "resnet18", RESNET_MODEL, "layer1.0.se.fc1.weight"),
    (SUPERVISED, "resnet18", RESNET_MODEL, "layer5.0.bn1.weight"),
    (SUPERVISED, SWIN, SWIN_MODEL, "absolute_pos_embed")])
def test_a_network_with_more_in_its_parts_is_refused(script, arch, args, name, manifest, tmp_path):
    torch.save(network(arch, args).state_dict() | {name: torch.ones(1, 3, 48)}, tmp_path / "w.pth")
    assert_user_error(start(script, manifest, tmp_path, "w.pth", arch, args), "w.pth", name)


def test_positions_of_no_square_grid_are_refused(manifest, tmp_path):
    wide = network(VIT, {**MODEL, "img_size": [32, 64]})            # 33 rows: 5 * 5 and 8 more, not 4 * 8 and 1
    torch.save(wide.state_dict(), tmp_path / "w.pth")
    for script in (GMML, SUPERVISED):
        assert_user_error(start(script, manifest, tmp_path, "w.pth"), "w.pth")


@pytest.mark.parametrize("script", [GMML, SUPERVISED])
def test_quantised_weights_are_refused(script, manifest, tmp_path):
    state = network().state_dict()
    state["blocks.0.mlp.fc1.weight"] = (100 * state["blocks.0.mlp.fc1.weight"]).to(torch.int8)
    torch.save(state, tmp_path / "w.pth")
    assert_user_error(start(script, manifest, tmp_path, "w.pth"), "w.pth", "blocks.0.mlp.fc1.weight")


def test_ema_in_the_middle_of_a_name_is_no_average(manifest, tmp_path):
    first, second = network(), network(seed=1)
    named = lambda model, prefix: {f"{prefix}.{name}": value for name, value in model.state_dict().items()}
    torch.save(named(first, "model") | named(second, "schema_net"), tmp_path / "w.pth")
    assert start(GMML, manifest, tmp_path, "w.pth").returncode == 0
    assert_same_features(first, backbone(tmp_path))


@pytest.mark.parametrize("args", [{"no_embed_class": True}, {"reg_tokens": 2}, {"pos_embed": "none"}])
def test_tokens_without_positions_and_no_positions_at_all(args, manifest, tmp_path):
    source = network(VIT, {**MODEL, **args})
    torch.save(source.state_dict(), tmp_path / "w.pth")
    result = start(GMML, manifest, tmp_path, "w.pth", model_args={**MODEL, **args})
    assert result.returncode == 0, result.stderr
    assert_same_features(source, backbone(tmp_path))


def convnext_release(state):
    """timm's names of a ConvNeXt as in its authors' release."""
    for old, new in ((r"^stem\.", "downsample_layers.0."), (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
                     (r"^stages\.(\d)\.blocks\.", r"stages.\1."), (r"conv_dw\.", "dwconv."),
                     (r"mlp\.fc(\d)", r"pwconv\1"), (r"^head\.norm\.", "norm.")):
        state = {re.sub(old, new, name): value for name, value in state.items()}
    return state


@pytest.mark.parametrize("wrap", [
    lambda raw, ema: {"model": raw, "model_ema": ema},
    lambda raw, ema: {"state_dict": {f"model.{name}": value for name, value in ema.items()}}])
def test_convnexts_release_below_a_prefix_and_its_average(wrap, manifest, tmp_path):
    arch, args = "convnext_tiny", {"depths": [1, 1, 1, 1], "dims": [8, 16, 16, 24]}
    raw, ema = (network(arch, args, seed=seed) for seed in (0, 1))
    torch.save(wrap(*(convnext_release(model.state_dict()) for model in (raw, ema))), tmp_path / "w.pth")
    result = start(SUPERVISED, manifest, tmp_path, "w.pth", arch, args)
    assert result.returncode == 0, result.stderr
    assert_same_features(ema, backbone(tmp_path))


@pytest.mark.parametrize("arch, args", [        # without drop path, with patches that overlap
    ("densenet121", {"drop_path_rate": None, "block_config": [1, 1], "growth_rate": 4}),
    ("pvt_v2_b0", {"depths": [1, 1, 1, 1]})])
def test_networks_of_other_kinds_start(arch, args, manifest, tmp_path):
    source = network(arch, args)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    result = start(SUPERVISED, manifest, tmp_path, "w.pth", arch, args, flags=["--img_size", 32])
    assert result.returncode == 0, result.stderr
    assert_same_features(source, backbone(tmp_path))


def test_weights_in_the_run_folder_are_not_overwritten(manifest, tmp_path):
    (tmp_path / "run").mkdir()
    torch.save(network().state_dict(), tmp_path / "run/backbone.pt")
    before = (tmp_path / "run/backbone.pt").read_bytes()
    assert_user_error(start(GMML, manifest, tmp_path, "run/backbone.pt"), "run/backbone.pt", "--out")
    assert (tmp_path / "run/backbone.pt").read_bytes() == before


def test_model_args_of_another_kind_do_no_harm(manifest, tmp_path):
    source = network()
    torch.save({"model": source.state_dict(), "model_args": ["vit", 2]}, tmp_path / "w.pth")
    result = start(GMML, manifest, tmp_path, "w.pth")
    assert result.returncode == 0, result.stderr
    assert_same_features(source, backbone(tmp_path))


def test_a_buffer_named_mean_in_the_weights_does_no_harm(manifest, tmp_path):
    source = network()
    buffers = {"mean": torch.zeros(1, 3, 1, 1), "std": torch.ones(1, 3, 1, 1)}
    torch.save(source.state_dict() | buffers, tmp_path / "w.pth")
    result = start(GMML, manifest, tmp_path, "w.pth")
    assert result.returncode == 0, result.stderr
    assert_same_features(source, backbone(tmp_path))
