"""The values the study states, typed once more by the sections of the method: defaults, recipes and views.

Keys on which the sections say nothing, or two things (how DINO's weight decay ends), are left out.
"""

import inspect

import pytest
import torch
from conftest import load_script

STRATEGIES = ["gmml", "sit", "dino", "moco_v3", "simmim", "supervised"]
SCRIPTS = {**{name: load_script(f"pretrain/{name}.py") for name in STRATEGIES},
           "classify": load_script("finetune/classify.py")}
PEAK = dict(lr=1e-4, min_lr=1e-6)                                           # section 1: peak and floor


@pytest.mark.parametrize("section, script, stated", [
    (2, "gmml", dict(
        PEAK, epochs=1000, warmup_epochs=10, wd=0.04, wd_end=0.04, clip=3.0, drop_path=0.1,
        drop=0.75, fill="noise", replace=0.3, align=1)),
    (3, "sit", dict(
        PEAK, epochs=300, wd=0.04, wd_end=0.04, clip=3.0, drop=0.5, fill="zeros", replace=0.3, align=1,
        hidden_dim=4096, out_dim=256, temperature=0.2, recon_weight=5.0, ema=0.996)),
    (4, "dino", dict(
        PEAK, epochs=300, warmup_epochs=10, wd=0.04, clip=3.0, drop_path=0.1, n_local_crops=8,
        out_dim=65536, hidden_dim=2048, bottleneck_dim=256, norm_last_layer=True, freeze_last_layer=1,
        student_temp=0.1, warmup_teacher_temp=0.04, teacher_temp=0.04, centre_momentum=0.9, ema=0.996)),
    (5, "moco_v3", dict(
        lr=5e-4, min_lr=0.0, warmup_epochs=10, wd=0.04, model_args={"num_heads": 12}, stop_grad_conv1=True,
        hidden_dim=4096, out_dim=256, ema=0.99)),
    (6, "simmim", dict(
        lr=2e-4, warmup_lr=1e-6, min_lr=1e-5, schedule="cosine", step_epoch=700, epochs=100,
        warmup_epochs=10, wd=0.05, clip=5.0, drop_path=0.0, mask_unit=32, mask_ratio=0.6)),
    (7, "supervised", dict(PEAK, epochs=1000, warmup_epochs=10, wd=0.04, wd_end=0.04)),
    (8, "classify", dict(epochs=30, batch=64, patience=10)),
])
def test_defaults_are_those_of_the_section(section, script, stated):
    defaults = SCRIPTS[script].DEFAULTS
    assert {key: defaults[key] for key in stated} == stated


@pytest.mark.parametrize("script", SCRIPTS)
def test_shared_defaults_are_those_of_section_1(script):
    module = SCRIPTS[script]
    stated = dict(arch="vit_small_patch16_224", img_size=224, channel_adapt="average")
    stated |= dict(batch=256) if script in STRATEGIES else {}
    assert {key: module.DEFAULTS[key] for key in stated} == stated
    for in_chans, mean, std in ((1, [0.485], [0.229]), (3, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])):
        config = module.fit_to_channels({**module.DEFAULTS, "in_chans": in_chans})
        assert (config["mean"], config["std"]) == (mean, std)


@pytest.mark.parametrize("recipe, stated", [
    ("a", dict(optimizer="adamw", lr=2.5e-6, warmup_epochs=5, warmup_lr=1e-6, min_lr=5e-7, wd=0.05)),
    ("b", dict(optimizer="sgd", lr=0.01, warmup_epochs=0, min_lr=1e-5, wd=0.0)),
    ("deit", dict(optimizer="adamw", lr=6.25e-5, warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5, wd=0.05,
                  drop_path=0.1, select="auc")),
    ("resnet", dict(optimizer="adam", lr=2e-4, schedule="plateau", wd=0.0, crop_pct=1.0)),
])
def test_recipes_are_the_table_of_section_8(recipe, stated):
    stated = dict(schedule="cosine", drop_path=0.0, crop_pct=224 / 256, select="loss") | stated
    row = SCRIPTS["classify"].RECIPES[recipe]
    assert {key: row[key] for key in stated} == stated


# Views of 100 images: flipped, grey and solarised ones are counted, jitter and blur say their p

def spread(*shape):
    """Uniforms whose every column holds the middles of 100 equal steps, shuffled: shares come out exactly."""
    order = torch.rand(*shape[:-1], 100, shape[-1], generator=torch.Generator().manual_seed(0)).argsort(-2)
    return (order + 0.5) / 100


VIEWS = dict(                           # module, images, config -> the views, each [100, 3, S, S]
    gmml=lambda m, x, c: [m.augment(x, spread(m.N_CROP), spread(m.N_COLOUR), c)],
    sit=lambda m, x, c: [m.augment(x, spread(m.N_CROP), spread(m.N_COLOUR), c)],
    dino=lambda m, x, c: [crop for crops in m.make_crops(x, spread(10, m.N_VIEW), 32, c) for crop in crops],
    moco_v3=lambda m, x, c: [*m.make_views(x, spread(2, m.N_VIEW), c)],
    simmim=lambda m, x, c: [m.make_views(x, spread(m.N_CROP + 4), c)[0]],
    supervised=lambda m, x, c: [m.augment(x, spread(m.N_CROP + 1), c)],
    classify=lambda m, x, c: [m.augment(x, spread(m.N_CROP + 1), c)])
LIGHT = dict(crop=(0.05, 1.0), cubic=True, jitter=((0.1, 0.1, 0.1, 0.01), 0.3), blur=0.1)
STRONG = dict(jitter=((0.4, 0.4, 0.2, 0.1), 0.8), grey=20)
GLOBAL, LOCAL = dict(STRONG, crop=(0.4, 1.0), cubic=True), dict(STRONG, crop=(0.05, 0.4), cubic=True)
MOCO = dict(STRONG, crop=(0.08, 1.0))
TUNING = dict(crop=(0.08, 1.0), cubic=False, rotation=7.0)


@pytest.mark.parametrize("section, script, stated", [
    (2, "gmml", [LIGHT]),
    (3, "sit", [LIGHT]),
    (4, "dino", [dict(GLOBAL, blur=1.0), dict(GLOBAL, blur=0.1, solarise=20), *[dict(LOCAL, blur=0.5)] * 8]),
    (5, "moco_v3", [dict(MOCO, blur=1.0), dict(MOCO, blur=0.1, solarise=20)]),
    (6, "simmim", [dict(crop=(0.67, 1.0))]),
    (7, "supervised", [TUNING]),
    (8, "classify", [TUNING]),
])
def test_views_are_those_of_the_section(section, script, stated, monkeypatch):
    """What the script's own view function asks of the augmentations, and what becomes of a bright colour."""
    module, done = SCRIPTS[script], []

    def watch(name, note):
        """Add note(arguments), from now on, of every call to what is done to the view of the last crop."""
        if not hasattr(module, name):
            return
        function = getattr(module, name)
        signature = inspect.signature(function)

        def watched(*args, **kwargs):
            call = signature.bind(*args, **kwargs)
            call.apply_defaults()
            done.extend([{}] if name == "crop_boxes" else [])
            done[-1].update(note(call.arguments))
            return args[0] if name == "colour_jitter" else function(*args, **kwargs)    # the colour is kept

        monkeypatch.setattr(module, name, watched)

    watch("crop_boxes", lambda a: dict(crop=tuple(a["scale"]), aspect=a["ratio"]))
    watch("crop_resize", lambda a: dict(flip=int(a["flip"].sum()), cubic=a["cubic"]))
    watch("colour_jitter", lambda a: dict(jitter=(a["strength"], a["p"])))
    watch("gaussian_blur", lambda a: dict(blur=a["p"], sigma=a["sigma"]))
    watch("rotate", lambda a: dict(rotation=a["degrees"]))
    config = {**module.DEFAULTS, "img_size": 64, "in_chans": 3, "mean": [0.0] * 3, "std": [1 / 255] * 3}
    images = torch.tensor([240, 200, 160], dtype=torch.uint8).view(1, 3, 1, 1).expand(100, -1, 64, 64)
    views = VIEWS[script](module, images, config)
    assert len(views) == len(done) == len(stated)
    for view, got, wanted in zip(views, done, stated):
        red, _, blue = view[:, :, view.shape[2] // 2, view.shape[3] // 2].T
        got.update(grey=int((red == blue).sum()), solarise=int((red < 128).sum()))
        wanted = dict(aspect=(3 / 4, 4 / 3), flip=50, grey=0, solarise=0) | wanted
        wanted |= dict(sigma=(0.1, 2.0)) if "blur" in wanted else {}
        wanted.setdefault("cubic", got["cubic"])                            # sections 5 and 6 do not say
        assert got == wanted
