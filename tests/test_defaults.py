"""The values the study states, typed once more by the sections of the method: defaults and recipes.

Keys on which the sections say nothing, or two things (how DINO's weight decay ends), are left out.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import load_script

STRATEGIES = ["gmml", "sit", "dino", "moco_v3", "simmim", "supervised"]
SCRIPTS = {**{name: load_script(f"pretrain/{name}.py") for name in STRATEGIES},
           "classify": load_script("finetune/classify.py")}
PEAK = dict(lr=1e-4, min_lr=1e-6)                                           # section 1: peak and floor


@pytest.mark.parametrize("section, script, stated", [
    (2, "gmml", dict(
        PEAK, epochs=1000, warmup_epochs=10, wd=0.04, wd_end=0.04, clip=3.0, drop_path=0.1,
        drop=0.75, replace=0.3, align=1, crop_scale=[0.05, 1.0])),
    (3, "sit", dict(
        PEAK, epochs=300, wd=0.04, wd_end=0.04, clip=3.0, drop=0.5, replace=0.3, align=1,
        crop_scale=[0.2, 1.0], hidden_dim=4096, out_dim=256, temperature=0.2, recon_weight=5.0, ema=0.996)),
    (4, "dino", dict(
        PEAK, epochs=300, warmup_epochs=10, wd=0.04, clip=3.0, drop_path=0.1, n_local_crops=8,
        out_dim=65536, hidden_dim=2048, bottleneck_dim=256, norm_last_layer=True, freeze_last_layer=1,
        global_crop_scale=[0.4, 1.0], local_crop_scale=[0.05, 0.4],
        student_temp=0.1, warmup_teacher_temp=0.04, teacher_temp=0.04, centre_momentum=0.9, ema=0.996)),
    (5, "moco_v3", dict(
        lr=5e-4, min_lr=0.0, warmup_epochs=10, wd=0.04, model_args={"num_heads": 12}, stop_grad_conv1=True,
        hidden_dim=4096, out_dim=256, ema=0.99, crop_scale=[0.08, 1.0])),
    (6, "simmim", dict(
        lr=2e-4, warmup_lr=1e-6, min_lr=1e-5, schedule="cosine", step_epoch=700, epochs=100,
        warmup_epochs=10, wd=0.05, clip=5.0, drop_path=0.0, mask_unit=32, mask_ratio=0.6,
        crop_scale=[0.67, 1.0])),
    (7, "supervised", dict(
        PEAK, epochs=1000, warmup_epochs=10, wd=0.04, wd_end=0.04, crop_scale=[0.08, 1.0], rotation=7.0)),
    (8, "classify", dict(epochs=30, batch=64, patience=10, crop_scale=[0.08, 1.0], rotation=7.0)),
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
        config = module.fill_defaults({**module.DEFAULTS, "in_chans": in_chans})
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
    row = {**SCRIPTS["classify"].DEFAULTS, **SCRIPTS["classify"].RECIPES[recipe]}
    assert {key: row[key] for key in stated} == stated


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_value_that_is_none_of_a_keys_choices_is_refused(name, monkeypatch, capsys):
    """The words that begin a key's comment are its choices; `init` begins with some, but names files too."""
    module = SCRIPTS[name]
    text = Path(module.__file__).read_text()
    keys = {*re.findall(r"^    (\w+)=.*# \w+ \| \w+", text, re.M)} - {"init"}
    assert keys >= {"variant", "device", "in_chans", "channel_adapt"}
    for key in keys:
        monkeypatch.setattr(sys, "argv", [name, f"--{key}", "7"])
        with pytest.raises(SystemExit):
            module.options("pretrain")
        assert f"--{key}: invalid choice" in capsys.readouterr().err


@pytest.mark.parametrize("line, flag", [("new=0.5,", "--new NEW"), ("new=0.5,  # a weight", "a weight [0.5]")])
def test_a_key_added_to_a_copy_of_a_script_is_a_flag_with_or_without_a_comment(line, flag, tmp_path):
    text = Path(SCRIPTS["gmml"].__file__).read_text()
    (tmp_path / "mine.py").write_text(text.replace("    clip=3.0,", f"    {line}\n    clip=3.0,"))
    result = subprocess.run([sys.executable, tmp_path / "mine.py", "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and flag in result.stdout, result.stderr
