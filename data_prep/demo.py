"""Draws a stand-in for all eight datasets, in their real raw layouts, so that the whole study runs without a download.

Nothing here is a medical image. The radiographs come from a parametric phantom: a beam crosses a thorax, and what it
meets (tissue, bone, air) decides the grey value. Every finding is therefore one of four changes that can be
seen: water where air was (opacities, fluid), a border moved (heart, diaphragm), air where tissue was
(pneumothorax, hernia), or a line added (fibrosis, devices). Patients keep their anatomy over several films, sites have
a look, a case mix and labelling errors of their own. CT slices, OCT scans and natural images are drawn likewise.

    python data_prep/demo.py --out data/demo/raw                       # everything, about half a minute on 2 cores
    python data_prep/demo.py --out /tmp/tiny --scale 0.05 --seed 1     # a twentieth of it, other patients

Reads:  nothing.
Writes: <out>/<dataset>/… for nih, mimic_cxr, chexpert, padchest, vindr_cxr, covidx_ct, oct and imagenet, file names,
        columns and formats as in the public downloads; <out>/<dataset>/README.txt, which says that it is a stand-in;
        <out>/demo.json last of all, once everything is complete. Same seed, same bytes.
"""

import argparse
import csv
import gzip
import hashlib
import io
import json
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

VERSION = 1             # raise when the drawings change: older folders are then made anew
STAND_IN = "This folder is a STAND-IN, drawn by data_prep/demo.py"
FINDINGS = ["Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
            "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia"]

# Share of studies with each finding: higher than in any hospital, so that a thousand films are enough to learn from.
PREVALENCE = dict(zip(FINDINGS, [.20, .20, .25, .15, .09, .11, .09, .11, .16, .14, .10, .10, .10, .05]))
# How much heart failure, infection and chronic lung disease of a patient contribute to each finding.
CAUSES = np.array([(.5, .5, .0), (.9, .0, .2), (.8, .4, .0), (.0, .6, .3), (.0, .0, .5), (.0, .0, .4), (.0, .9, .0),
                   (.0, .0, .4), (.0, .9, .0), (1., .0, .0), (-.3, .0, .9), (.0, .0, .8), (.0, .2, .6), (.2, .0, .0)])


@dataclass
class Site:
    """What makes one hospital's films look, and its labels read, unlike another's."""
    size: tuple = (160, 160)        # width, height of the film in pixels
    ap: float = 0.0                 # share of bedside films taken from the front: larger heart, less air, more devices
    window: tuple = (0.10, 1.02)    # attenuation shown as black and as white
    gamma: float = 1.0              # < 1 lifts the dark parts
    noise: float = 0.02             # quantum noise, in grey values 0–1
    blur: int = 1                   # binomial smoothings
    collimation: float = 0.1        # share of films with a black border
    devices: float = 0.2            # share of bedside films with wires, lines, pacemakers (half of it in others)
    error: float = 0.0              # share of positives the labels miss; as many negatives are called positive
    share: float = 1.0              # prevalence relative to PREVALENCE
    absent: tuple = ()              # findings this site never has
    lateral: float = 0.0            # share of studies with a lateral film beside the frontal one
    films: float = 0.5              # a patient has 1 / films studies on average


SITES = {   # labels: mined from reports at NIH, MIMIC and CheXpert, given by physicians elsewhere
    "nih": Site(ap=0.4, error=0.08, films=0.4),
    "mimic_cxr": Site(size=(160, 192), ap=0.65, window=(0.02, 1.0), gamma=0.85, noise=0.03, blur=2, devices=0.7,
                      error=0.10, share=1.2, lateral=0.25),
    "chexpert": Site(size=(192, 160), ap=0.8, window=(0.2, 0.95), gamma=1.15, noise=0.03, blur=1, collimation=0.5,
                     devices=0.8, error=0.08, share=1.4, lateral=0.15),
    "padchest": Site(size=(168, 176), ap=0.03, window=(0.05, 1.15), gamma=0.8, noise=0.012, blur=2, collimation=0.6,
                     error=0.03, absent=("Edema",), films=0.9),
    "vindr_cxr": Site(size=(160, 184), window=(0.2, 1.05), gamma=1.3, noise=0.015, blur=0, collimation=0.0,
                      devices=0.05, error=0.02, share=0.9, absent=("Edema",), films=1.0),
}


# --- begin copy: error ---
def fail(message):
    """A mistake the user can mend: one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
# --- end copy: error ---


# The pencils: every shape is a soft-edged field of floats in 0–1 over the film.

def below(distance, soft=0.02):
    """1 where the distance is negative, 0 where it is positive, a straight ramp of the given width between."""
    return np.clip(0.5 - distance / soft, 0, 1)


def bump(distance, width):
    """A Gaussian ridge: 1 at distance 0."""
    return np.exp(-0.5 * (distance / width) ** 2)


def union(first, second):
    """Two overlapping half-transparent shapes."""
    return 1 - (1 - first) * (1 - second)


def clouds(rng, shape, cells):
    """Smooth noise of mean 0 and deviation about 1 with `cells` lumps along the height."""
    coarse = rng.standard_normal((cells, max(2, cells * shape[1] // shape[0]))).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize(shape[::-1], Image.BICUBIC))


def smooth(image, times):
    """Binomial blur (1, 2, 1) along both axes."""
    for _ in range(times):
        image = np.pad(image, 1, mode="edge")
        image = (image[:-2] + 2 * image[1:-1] + image[2:]) / 4
        image = (image[:, :-2] + 2 * image[:, 1:-1] + image[:, 2:]) / 4
    return image


def canvas(size, rng, tilt=0.03, shift=0.04, zoom=0.06):
    """Coordinates x, y float32 [H, W] of a slightly misplaced subject: x in about -1 … 1, square pixels, y down."""
    width, height = size
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x, y = (x - width / 2 + 0.5) / (width / 2), (y - height / 2 + 0.5) / (width / 2)
    angle, scale = tilt * rng.standard_normal(), 1 + zoom * rng.standard_normal()
    x, y = (x * np.cos(angle) - y * np.sin(angle)) * scale, (x * np.sin(angle) + y * np.cos(angle)) * scale
    return x + np.float32(shift * rng.standard_normal()), y + np.float32(shift * rng.standard_normal())


# The chest: x = -1 is the patient's right side (left of the film), one unit is half the film's width.

def person(rng):
    """The anatomy a patient keeps from film to film; lengths in canvas units."""
    female = bool(rng.random() < 0.45)
    return {
        "sex": "F" if female else "M", "age": int(np.clip(rng.normal(52, 17), 8, 94)),
        "width": rng.normal(0.72, 0.03), "apex": rng.normal(-0.80, 0.03), "base": rng.normal(0.38, 0.04),
        "heart": rng.normal(0.45, 0.025),           # cardiothoracic ratio: above 0.5 is cardiomegaly
        "axis": rng.normal(0.5, 0.12), "aorta": rng.uniform(0.04, 0.09), "hilum": rng.uniform(0.7, 1.2),
        "rib_gap": rng.normal(0.145, 0.008), "rib_start": rng.uniform(0, 1), "clavicle": rng.normal(0.10, 0.05),
        "bend": 0.02 * rng.standard_normal(), "fat": rng.uniform(0.8, 1.25), "breast": female * rng.uniform(0.03, 0.12),
        "vessels": rng.uniform(0, 2 * np.pi, 8), "stomach": rng.uniform(0.03, 0.09),
    }


def pneumonic_patch(rng, x, y, side, low):
    """A cloudy focus somewhere in one lung; `low` moves it to the bases."""
    cx, cy = side * rng.uniform(0.32, 0.52), rng.uniform(-0.5 + 0.45 * low, 0.2)
    rx, ry = rng.uniform(0.12, 0.22), rng.uniform(0.12, 0.25)
    return below(np.hypot((x - cx) / rx, (y - cy) / ry) - 1 + 0.3 * clouds(rng, x.shape, 14), 0.7)


def chest(anatomy, severity, ap, devices, rng, size):
    """Attenuation of a frontal film.

    Args: anatomy (from `person`), severity {finding: 0–1}, ap and devices (bool), rng, size (width, height).
    Returns: attenuation float32 [H, W], 0 in free air, about 1 behind the heart; {finding: focus float [H, W]}.
    """
    a, x, y = anatomy, *canvas(size, rng)
    has = {name: severity.get(name, 0.0) for name in FINDINGS}
    sick_side, other_side = rng.permutation([-1, 1])
    x = x - a["bend"] * np.sin(3 * y)                                   # scoliosis bends everything that follows
    wide, left = np.abs(x), x > 0

    # Borders. Bedside films are taken lying down: high diaphragms. Emphysema presses them flat, atelectasis lifts one.
    base = a["base"] - 0.09 * ap + 0.12 * has["Emphysema"]
    base = base + np.where(left, 0.05, 0) - np.where(x * sick_side > 0, 0.12 * has["Atelectasis"], 0)
    dome = base + (0.9 - 0.6 * has["Emphysema"]) * (wide - 0.38) ** 2 * np.where(wide > 0.38, 1.6, 0.6)
    down = np.clip((y - a["apex"]) / (base - a["apex"]), 0, 1)          # 0 at the apex of the lung, 1 at the base
    outer = 0.36 + (a["width"] - 0.36) * (down * (2 - down)) ** 0.45    # chest wall
    inner = 0.36 - 0.24 * np.sqrt(down * (2 - down))                    # mediastinum
    across = np.clip((wide - inner) / np.maximum(outer - inner, 0.01), 0, 1)
    lung = below(wide - outer) * below(inner - wide, 0.06) * below(y - dome, 0.03) * below(a["apex"] - y, 0.06)
    depth = (4 * across * (1 - across) + 0.25) ** 0.3 * np.sqrt(np.clip(down * 3, 0.1, 1))

    # Heart and great vessels: a tilted ellipse reaching further to the patient's left, and a bulge for the aorta.
    ratio = a["heart"] + 0.03 * ap + (0.06 + 0.12 * has["Cardiomegaly"]) * (has["Cardiomegaly"] > 0)
    ratio -= 0.04 * has["Emphysema"]
    half, top = ratio * a["width"], np.mean(base) - 0.04
    hx, hy = x - 0.42 * half, y - (top - 0.24)
    turn = a["axis"]
    hx, hy = hx * np.cos(turn) + hy * np.sin(turn), hy * np.cos(turn) - hx * np.sin(turn)
    inside = np.hypot(hx / half, hy / (0.68 * half + 0.08))
    heart = below(inside - 1, 0.12)
    bulk = np.sqrt(np.clip(1 - inside ** 2, 0, 1))
    heart = union(heart, below(np.hypot(x - 0.09, y + 0.38) - 0.06 - a["aorta"], 0.04))
    heart = union(heart, below(wide - 0.10 + 0.08 * (y < -0.4) * (y + 0.4), 0.05))

    # Focal findings: water where air was. `focus` is kept, since annotations are drawn around it.
    focus = {}
    if has["Effusion"]:                                                 # a meniscus, higher along the chest wall
        level = np.mean(base) + 0.16 - 0.42 * has["Effusion"] - 0.3 * (across ** 3 - 0.3)
        focus["Effusion"] = below(level - y, 0.05) * (x * sick_side > 0)
        if has["Effusion"] > 0.7:
            focus["Effusion"] = union(focus["Effusion"], below(level + 0.2 - y, 0.05) * (x * other_side > 0))
    if has["Consolidation"]:
        focus["Consolidation"] = pneumonic_patch(rng, x, y, other_side, 0.4) * (0.5 + 0.5 * has["Consolidation"])
    if has["Pneumonia"]:
        patch = pneumonic_patch(rng, x, y, sick_side, 1.0) * (0.4 + 0.3 * has["Pneumonia"])
        focus["Pneumonia"] = patch * np.clip(0.8 + 0.4 * clouds(rng, x.shape, 24), 0, 1)
    if has["Infiltration"]:                                             # faint, mottled, wide
        zone = bump(y - rng.uniform(-0.2, 0.1), 0.3) * np.where(x * sick_side > 0, 1, rng.uniform(0, 1))
        focus["Infiltration"] = zone * np.clip(clouds(rng, x.shape, 20), 0, 1) * 0.6 * has["Infiltration"]
    if has["Atelectasis"]:                                              # plate-like bands above the lifted dome
        bands = sum(bump(y - np.mean(base) + height + rng.normal(0, 0.08) * (wide - 0.4), 0.016)
                    for height in (0.15, 0.24, 0.33)[:rng.integers(2, 4)])
        focus["Atelectasis"] = bands * (x * sick_side > 0) * (across > 0.08) * (0.4 + 0.4 * has["Atelectasis"])
    if has["Edema"]:                                                    # butterfly: both hila, fading outwards
        haze = bump(wide - 0.25, 0.2) * bump(y + 0.12, 0.3) * (0.75 + 0.25 * clouds(rng, x.shape, 12))
        focus["Edema"] = np.clip(haze, 0, 1) * (0.35 + 0.45 * has["Edema"])
    for name, small, large in (("Nodule", 0.045, 0.075), ("Mass", 0.11, 0.18)):
        if has[name]:
            cx, cy = other_side * rng.uniform(0.3, 0.55), rng.uniform(-0.5, 0.15)
            edge = np.hypot(x - cx, y - cy) - (small + (large - small) * has[name])
            focus[name] = below(edge + 0.012 * clouds(rng, x.shape, 24), 0.03) * 0.8
    if has["Pleural_Thickening"]:                                       # a rind along the chest wall and the apex
        rind = 0.03 + 0.06 * has["Pleural_Thickening"]
        focus["Pleural_Thickening"] = below(outer - wide - rind, 0.03) * (x * other_side > 0) * (y < 0.35) * 0.8

    # Air: what the lungs hold, minus what lies in front of it. Vessels fan out from the hila.
    hilum_x, hilum_y = wide - 0.16, y + 0.12
    reach, angle = np.hypot(hilum_x, hilum_y), np.arctan2(hilum_y, hilum_x)
    wave = sum(np.cos(k * angle + phase + 2 * np.sin(5 * reach + phase) + left)
               for k, phase in zip((5, 9, 14, 19), a["vessels"]))
    vessels = np.clip(wave - 0.8, 0, 1) * np.exp(-reach / 0.3) * (0.35 + 0.25 * has["Edema"] - 0.2 * has["Emphysema"])
    vessels = union(vessels, 0.5 * a["hilum"] * bump(hilum_x, 0.05) * bump(hilum_y, 0.09))
    if has["Fibrosis"]:                                                 # a net of fine lines in the lower periphery
        net = 1 - np.clip(3 * np.abs(clouds(rng, x.shape, 34)), 0, 1)
        vessels = union(vessels, net * np.clip(down * 1.2 - 0.3, 0, 1) * (0.4 + across) * (0.3 + 0.4 * has["Fibrosis"]))
    collapsed = np.zeros_like(x)
    if has["Pneumothorax"]:                                             # beyond the pleural line nothing but air
        gap = outer - wide - (0.05 + 0.13 * has["Pneumothorax"]) * np.clip(1.3 - 1.2 * down, 0.2, 1.3)
        collapsed = below(gap, 0.02) * (x * sick_side > 0) * lung
        focus["Pneumothorax"] = collapsed
    water = vessels * (1 - collapsed)
    for name, field in focus.items():
        if name != "Pneumothorax":
            water = union(water, np.clip(field, 0, 1))
    air = lung * depth * (1 - heart) * (1 - water)
    air *= 1 - 0.10 * ap + 0.18 * has["Emphysema"] + 0.35 * collapsed
    air += 0.5 * below(np.hypot((x - 0.42) / 0.16, (y - base - 0.10) / a["stomach"]) - 1, 0.3) * (y > dome)
    air += 0.25 * bump(x, 0.035) * (y < -0.35)                          # trachea
    if has["Hernia"]:                                                   # a gas bubble in a sac behind the heart
        radius = 0.10 + 0.08 * has["Hernia"]
        sac = np.hypot(x - 0.06, y - np.mean(base) + 0.08)
        focus["Hernia"] = below(sac - radius, 0.03)
        air += 0.55 * below(sac - 0.8 * radius, 0.04) * (y < np.mean(base) - 0.06) - air * focus["Hernia"]

    # Soft tissue and bone.
    shoulders = below(-0.95 + 0.5 * np.clip(wide - 0.22, 0, 1) - y, 0.03) * below(wide - 1.02, 0.05)
    body = union(shoulders, below(wide - 0.24 - 0.1 * (y > -0.95), 0.05))
    tissue = body * (0.62 + 0.2 * np.sqrt(np.clip(1 - wide ** 2, 0, 1))) * (0.85 + 0.15 * a["fat"])
    tissue += 0.12 * bulk + 0.10 * below(dome - y, 0.1) + 0.08 * below(np.hypot(x, (y - 1.1) / 1.3) - 0.5, 0.6)
    if a["breast"]:
        tissue += a["breast"] * below(np.hypot((wide - 0.42) / 0.3, (y - 0.18) / 0.27) - 1, 0.15)
    cage = below(wide - outer - 0.03, 0.03) * (y > a["apex"] + 0.02) * (y < np.mean(base) + 0.35)
    for slope, strength in ((0.25, 0.075), (-0.45, 0.045)):              # ribs: behind, and fainter in front
        rib = (y - slope * wide ** 1.5) / a["rib_gap"] + a["rib_start"]
        tissue += strength * cage * (1 - 0.6 * heart) * bump(np.abs(rib - np.round(rib)) - 0.14, 0.08)
    tissue += 0.10 * bump(y + 0.68 + a["clavicle"] * wide + 0.12 * (wide - 0.4) ** 2, 0.025) * below(wide - 0.75)
    spine = below(wide - 0.085, 0.03) * (0.8 + 0.2 * np.cos(y * 2 * np.pi / 0.17))
    tissue += 0.10 * spine
    attenuation = tissue - 0.58 * air + 0.06 * bump(collapsed - 0.5, 0.2) * (collapsed > 0)
    if devices:
        attenuation += hardware(rng, x, y)
    return attenuation, {name: field * (lung > 0.5) if name != "Hernia" else field for name, field in focus.items()}


def hardware(rng, x, y):
    """Metal and plastic on the film: a central line, and by chance a pacemaker, a tube, wires on the skin."""
    side = rng.choice([-1, 1])
    line = bump(x - side * 0.5 * np.clip(-0.45 - y, 0, 0.4) - 0.06, 0.012) * (y < rng.uniform(-0.1, 0.05)) * (y > -0.85)
    drawn = 0.22 * line
    if rng.random() < 0.4:
        box = below(np.maximum(np.abs(x - 0.55) / 1.1, np.abs(y + 0.45)) - 0.085, 0.03)
        lead = bump(y - 0.25 + 1.4 * (x - 0.5) ** 2 - 0.5 * (x - 0.5), 0.012) * (x > 0.1) * (x < 0.55) * (y > -0.45)
        drawn = np.maximum(drawn, 0.45 * np.maximum(box, 0.7 * lead))
    if rng.random() < 0.5:
        drawn = np.maximum(drawn, 0.2 * bump(x - 0.02 * np.sin(4 * y), 0.014) * (y < rng.choice([-0.4, 0.8])))
    for _ in range(rng.integers(0, 4)):
        start, bow = rng.uniform(-0.6, 0.6, 2)
        drawn = np.maximum(drawn, 0.18 * bump(y - start - bow * x ** 2 - 0.4 * bow * x, 0.01))
    return drawn


def lateral_chest(anatomy, severity, rng, size):
    """Attenuation of a lateral film (spine at the right), float32 [H, W]; the same findings, seen from the side."""
    a, x, y = anatomy, *canvas(size, rng)
    has = {name: severity.get(name, 0.0) for name in FINDINGS}
    front, back = -0.45 - 0.2 * np.clip(y + 0.6, 0, 0.7), 0.48 - 0.15 * (y - 0.1) ** 2
    dome = a["base"] + 0.1 - 0.25 * bump(x + 0.3, 0.45) + 0.15 * has["Emphysema"]
    lung = below(front - x, 0.05) * below(x - back, 0.05) * below(y - dome, 0.04) * below(a["apex"] - y, 0.1)
    half = (a["heart"] + 0.14 * has["Cardiomegaly"]) * a["width"]
    heart = below(np.hypot((x + 0.28) / half, (y - a["base"] + 0.2) / (0.9 * half)) - 1, 0.2)
    water = 0.5 * union(heart, 0.4 * bump(np.hypot(x + 0.02, y + 0.15), 0.13))
    water = union(water, 0.9 * below(a["base"] + 0.1 - 0.4 * has["Effusion"] * np.clip(x, 0, 1) - y, 0.06) * (x > 0))
    for name in ("Consolidation", "Pneumonia", "Mass", "Nodule"):
        if has[name]:
            radius = {"Mass": 0.15, "Nodule": 0.06}.get(name, 0.2)
            centre = rng.uniform(-0.3, 0.3, 2)
            water = union(water, 0.5 * below(np.hypot(x - centre[0], y - centre[1]) - radius, 0.1))
    haze = 0.3 * has["Edema"] + 0.2 * has["Infiltration"] * np.clip(clouds(rng, x.shape, 18), 0, 1)
    air = lung * (1 - water) * (1 - haze) * (0.8 + 0.05 * clouds(rng, x.shape, 20))
    body = below(np.maximum(front - 0.22 - x, x - back - 0.3), 0.06) * below(-0.95 + 0.2 * np.abs(x) - y, 0.05)
    spine = bump(x - 0.42 + 0.15 * (y - 0.1) ** 2, 0.07) * (0.8 + 0.2 * np.cos(y * 2 * np.pi / 0.17))
    rib = (y - 0.5 * x) / a["rib_gap"] + a["rib_start"]
    bone = 0.12 * spine + 0.04 * lung * bump(np.abs(rib - np.round(rib)) - 0.14, 0.1)
    return body * (0.85 + 0.1 * (y > dome)) + bone - 0.55 * air


def develop(attenuation, site, rng):
    """A film as the site shows it: float [H, W] 0–1 with its window, gamma, grain, border and side marker."""
    black, white = np.add(site.window, 0.04 * rng.standard_normal(2))
    grain = smooth(rng.standard_normal(attenuation.shape), 1) * 2.2
    grey = np.clip((smooth(attenuation, site.blur) - black) / (white - black), 0, None) / 1.04
    grey = 1.04 * grey / (1 + np.clip(grey, 0, None) ** 8) ** 0.125     # a film saturates softly
    grey = np.clip(grey, 0, 1) ** (site.gamma * rng.lognormal(0, 0.1)) + site.noise * grain
    height, width = grey.shape
    row, column = int(height * rng.uniform(0.04, 0.12)), int(width * rng.uniform(0.86, 0.93))
    letter = max(4, height // 26)
    grey[row:row + letter, column:column + 2] = 0.95                    # "L" at the patient's left
    grey[row + letter:row + letter + 2, column:column + letter // 2 + 2] = 0.95
    if rng.random() < site.collimation:
        top, side = int(height * rng.uniform(0, 0.05)), int(width * rng.uniform(0, 0.07))
        grey[:top], grey[height - top:], grey[:, :side], grey[:, width - side:] = 0.02, 0.02, 0.02, 0.02
    return np.clip(grey, 0, 1)


# Chest CT, retina OCT, natural images.

def ct_slice(patient, level, disease, rng):
    """An axial CT slice in a lung window.

    Args: patient (int seed of the anatomy), level 0 (apex) … 1 (base), disease 0 normal, 1 pneumonia, 2 COVID-19.
    Returns: grey float [144, 144] 0–1; box of the body (xmin, ymin, xmax, ymax) in pixels.
    """
    own = np.random.default_rng(patient)
    wide, tall, window = own.uniform(0.80, 0.92), own.uniform(0.58, 0.68), own.uniform(0.9, 1.1)
    x, y = canvas((144, 144), np.random.default_rng(patient), tilt=0.04, shift=0.02)
    body = np.hypot(x / wide, y / tall)
    inside = below(body - 1, 0.03)
    size = np.sin(np.pi * (0.15 + 0.7 * level)) ** 0.5                  # lungs are widest in the middle
    side = np.abs(x) - 0.44 * wide
    lung = np.hypot(side / (0.36 * wide * size), (y + 0.02) / (0.72 * tall * size))
    heart = np.hypot((x - 0.12) / (0.34 * level + 0.10), (y + 0.16) / (0.22 + 0.12 * level))
    spine = np.hypot(x / 0.13, (y - 0.36 * tall / 0.62) / 0.12)
    air = below(lung - 1, 0.08) * below(1 - heart, 0.12) * below(1.25 - spine, 0.2) * below(0.10 - np.abs(x), 0.05)
    tree = np.abs(clouds(rng, x.shape, 22)) < 0.12                      # vessels, thinning towards the wall
    lesion = 0.35 * tree * np.clip(1.3 - lung, 0, 1) + 0.06 * np.clip(y + 0.2, 0, 1)
    ground_glass = clouds(rng, x.shape, 30) * 0.12
    if disease == 1:                                                    # one dense consolidated segment, behind
        cx, cy = own.choice([-1, 1]) * 0.42 * wide, own.uniform(0.05, 0.3)
        lesion += 0.85 * below(np.hypot((x - cx) / 0.24, (y - cy) / 0.2) - 1 + 0.3 * clouds(rng, x.shape, 14), 0.4)
    if disease == 2:                                                    # several faint patches under the pleura, both sides
        for _ in range(own.integers(4, 8)):
            turn, reach = own.uniform(0, 2 * np.pi), own.uniform(0.7, 0.95)
            cx = own.choice([-1, 1]) * 0.44 * wide + reach * 0.36 * wide * size * np.cos(turn)
            cy = reach * 0.72 * tall * size * np.sin(turn)
            patch = below(np.hypot(x - cx, y - cy) - own.uniform(0.1, 0.2) + 0.05 * clouds(rng, x.shape, 16), 0.12)
            lesion = union(np.clip(lesion, 0, 1), patch * np.clip(own.uniform(0.3, 0.5) + ground_glass, 0, 1))
    grey = inside * (0.62 - 0.5 * air * (1 - np.clip(lesion, 0, 1)))
    ribs = bump(body - 0.9, 0.035) * (np.cos(11 * np.arctan2(y, x) + 9 * level) > 0.1)
    grey += inside * (0.3 * ribs + 0.3 * below(spine - 1, 0.2) + 0.10 * below(heart - 1, 0.2))
    grey += 0.25 * bump(y - 0.86 - 0.1 * x ** 2, 0.012)                 # the table
    grey = np.clip(window * (grey + 0.03) + 0.025 * smooth(rng.standard_normal(x.shape), 1), 0, 1)
    rows, columns = np.nonzero(inside > 0.5)
    return grey, (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def oct_scan(patient, disease, rng):
    """A retinal B-scan: layers between two surfaces, speckle; disease is CNV, DME, DRUSEN or NORMAL. Grey [H, W] 0–1."""
    own = np.random.default_rng(patient)
    height, width = 160, int(own.choice([166, 248]))
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x, y = 2 * x / width - 1, y / height
    floor = own.uniform(0.55, 0.7) + rng.uniform(-0.08, 0.08) * x + rng.uniform(-0.1, 0.05) * x ** 2
    thick, fovea = own.uniform(0.24, 0.30), rng.uniform(-0.2, 0.2)
    roof = floor - thick + 0.6 * thick * bump(x - fovea, 0.16) - 0.1 * thick * bump(np.abs(x - fovea) - 0.35, 0.15)
    lifted, bright, dark = 0, 0, 0
    if disease == "DRUSEN":                                             # a row of small bumps under the pigment layer
        for centre in rng.uniform(-0.8, 0.8, rng.integers(3, 9)):
            lifted = np.maximum(lifted, rng.uniform(0.015, 0.045) * bump(x - centre, rng.uniform(0.03, 0.06)))
    if disease == "CNV":                                                # one large lesion with fluid above it
        centre, spread = fovea + rng.uniform(-0.15, 0.15), rng.uniform(0.14, 0.28)
        lifted = rng.uniform(0.07, 0.13) * bump(x - centre, spread) + 0.012 * clouds(rng, x.shape, 8)[:1]
        dark = below(np.hypot((x - centre - 0.1) / spread, (y - floor + lifted + 0.05) / 0.035) - 1, 0.3)
        roof = roof - 0.6 * lifted
    if disease == "DME":                                                # cysts swell the inner layers
        roof = roof - rng.uniform(0.03, 0.08) * bump(x - fovea, 0.3)
        for _ in range(rng.integers(3, 8)):
            cx, cy = fovea + rng.normal(0, 0.2), rng.uniform(0.3, 0.65)
            cyst = np.hypot((x - cx) / rng.uniform(0.04, 0.1), (y - roof - cy * (floor - roof)) / rng.uniform(0.02, 0.05))
            dark = np.maximum(dark, below(cyst - 1, 0.3))
    pigment = floor - lifted
    depth = (y - roof) / (pigment - roof)                               # 0 at the vitreous, 1 at the pigment layer
    layers = np.interp(depth, [-.05, .0, .02, .12, .2, .38, .44, .5, .58, .64, .84, .87, .9, .93, .96, 1.04, 1.08],
                       [.05, .05, .72, .6, .42, .45, .28, .26, .45, .22, .2, .6, .3, .6, .85, .85, .45])
    choroid = 0.45 * np.exp(-np.clip(y - floor, 0, None) / 0.09) * (1 + 0.5 * clouds(rng, x.shape, 20))
    layers = np.where(y > floor + 0.015, choroid, np.where(y > pigment + 0.02, 0.5, layers)) * (1 - 0.85 * dark)
    speckle = smooth(rng.gamma(3, 1 / 3, x.shape), 1)
    grey = np.clip(layers * speckle * own.uniform(0.8, 1.1) + 0.02 * rng.standard_normal(x.shape), 0, 1)
    if own.random() < 0.3:                                              # registered scans have blank white corners
        grey[y < 0.12 * np.abs(x) ** 2 - 0.02 + 0.1 * (x > 0.7) * (x - 0.7)] = 1.0
    return grey


# wnid, name; outline (corners, their depth, length / width), pattern (0 none, 1 stripes, 2 rings, 3 checks),
# hue of object and of scene
CLASSES = [("n01440764", "tench, Tinca tinca", 2, .15, 2.4, 0, .18, .45), ("n02102040", "English springer", 3, .25, 1.2, 3, .06, .30),
           ("n02979186", "cassette player", 4, .20, 1.5, 2, .00, .10), ("n03000684", "chain saw, chainsaw", 7, .20, 2., 1, .05, .25),
           ("n03028079", "church, church building", 3, .35, .6, 1, .11, .58),
           ("n03394916", "French horn, horn", 0, .00, 1., 2, .14, .95), ("n03417042", "garbage truck, dustcart", 4, .12, 1.7, 3, .35, .62),
           ("n03425413", "gas pump, gasoline pump", 4, .15, .5, 0, .98, .56), ("n03445777", "golf ball", 0, .00, 1., 0, .70, .33),
           ("n03888257", "parachute, chute", 5, .10, 1.3, 1, .90, .55)]


def natural_image(number, rng):
    """An object of CLASSES[number] before a scene; returns RGB float [H, W, 3] 0–1 and its box in pixels."""
    _, _, corners, depth, long, pattern, hue, scene = CLASSES[number]
    width, height = ((128, 96), (96, 128), (112, 112))[rng.integers(3)]
    x, y = canvas((width, height), rng, tilt=0.3, shift=0.25, zoom=0.15)
    size = rng.uniform(0.4, 0.65)
    u, v = x / (size * long ** 0.5), y / (size / long ** 0.5)
    outline = 1 + depth * np.cos(corners * np.arctan2(v, u)) + 0.03 * clouds(rng, x.shape, 10)
    inside = below(np.hypot(u, v) - outline, 0.05)
    ripple = (np.zeros_like(u), np.cos(9 * u), np.cos(9 * np.hypot(u, v)), np.cos(8 * u) * np.cos(8 * v))[pattern]
    shade = 0.65 - 0.2 * u - 0.25 * v + 0.25 * ripple + 0.06 * clouds(rng, x.shape, 30)
    fractal = sum(clouds(rng, x.shape, 3 * 2 ** k) / 1.6 ** k for k in range(5))
    ground = 0.55 + 0.12 * fractal - 0.25 * np.tanh(6 * (y - rng.uniform(-0.1, 0.5)))

    def paint(hue, grey, saturation):
        wheel = 0.5 + 0.5 * np.cos(2 * np.pi * (hue + rng.normal(0, 0.03) - np.arange(3) / 3))
        return np.clip(grey, 0, 1)[..., None] * (1 - saturation + saturation * wheel)

    shadow = 1 - 0.4 * below(np.hypot(u - 0.2, (v - 0.9) / 0.4) - 1, 0.8)
    picture = paint(scene, ground * shadow, rng.uniform(0.3, 0.7))
    picture += inside[..., None] * (paint(hue, shade, rng.uniform(0.5, 0.8)) - picture)
    picture += 0.02 * rng.standard_normal(picture.shape)
    rows, columns = np.nonzero(inside > 0.5)
    return np.clip(picture, 0, 1), (columns.min(), rows.min(), columns.max(), rows.max())


# Who is on which film.

@dataclass
class Film:
    """One radiograph still to be drawn: whose, of which study, how taken, what it shows, what its label file says."""
    patient: int            # 0, 1, … within its cohort
    study: int              # 1, 2, … within the patient
    view: str               # PA, AP or LATERAL
    anatomy: dict
    severity: dict          # finding -> 0–1, drawn
    labels: set             # findings claimed: severity's, but for the site's errors
    devices: bool
    site: str
    key: tuple              # of the film's own random generator


def cohort(site_name, key, n_films):
    """`n_films` films of new patients at a site, patient after patient.

    Findings follow a liability model: a study's liability is what its patient's hidden causes give (CAUSES) plus chance, and the
    studies with the largest are affected. So findings come together as they do in wards, and none is without a case.
    """
    site, rng = SITES[site_name], np.random.default_rng(key)
    studies, total = [], 0                                              # (patient, study, anatomy, causes, views)
    patient = -1
    while total < n_films:
        patient, anatomy, causes = patient + 1, person(rng), rng.standard_normal(3)
        for study in range(1, 1 + min(rng.geometric(site.films), 5)):
            frontal = "AP" if rng.random() < site.ap + 0.12 * causes[0] * (0 < site.ap < 1) else "PA"
            views = [frontal] + ["LATERAL"] * (rng.random() < site.lateral)
            if total < n_films:
                studies.append((patient, study, anatomy, causes, views[:n_films - total]))
                total += len(studies[-1][-1])
    n = len(studies)
    liability = np.array([s[3] for s in studies]) @ CAUSES.T + rng.standard_normal((n, len(FINDINGS)))
    severity, labels = np.zeros((n, len(FINDINGS))), np.zeros((n, len(FINDINGS)), bool)
    for j, finding in enumerate(FINDINGS):
        affected = 0 if finding in site.absent else min(n, max(2, round(site.share * PREVALENCE[finding] * n)))
        order = np.argsort(-liability[:, j])
        positive, negative = rng.permutation(order[:affected]), rng.permutation(order[affected:])
        severity[positive, j] = rng.uniform(0.35, 1, affected)
        wrong = int(site.error * affected)
        labels[positive[wrong:], j] = labels[negative[:wrong], j] = True
    films = []
    for i, (patient, study, anatomy, _, views) in enumerate(studies):
        shown = {f: float(s) for f, s in zip(FINDINGS, severity[i]) if s}
        claimed = {f for f, positive in zip(FINDINGS, labels[i]) if positive}
        devices = rng.random() < site.devices * (1 if views[0] == "AP" else 0.5)
        films += [Film(patient, study, view, anatomy, shown, claimed, devices, site_name, (*key, i, k))
                  for k, view in enumerate(views)]
    return films


# Drawing and saving one picture: what the worker processes do.

def radiograph(film):
    """The film's grey values float [H, W] 0–1 and the boxes of its findings {name: (xmin, ymin, xmax, ymax)}."""
    site, rng = SITES[film.site], np.random.default_rng(film.key)
    if film.view == "LATERAL":
        return develop(lateral_chest(film.anatomy, film.severity, rng, site.size), site, rng), {}
    attenuation, focus = chest(film.anatomy, film.severity, film.view == "AP", film.devices, rng, site.size)
    boxes = {}
    for name, field in focus.items():
        rows, columns = np.nonzero(field > 0.3 * field.max())
        if len(rows):
            boxes[name] = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    return develop(attenuation, site, rng), boxes


def save_picture(path, picture, mode="L", **options):
    """8-bit PNG or JPEG, by the path's extension; `mode` RGBA wraps grey in colour channels."""
    image = Image.fromarray((picture * 255).round().astype(np.uint8)).convert(mode)
    image.save(path, "PNG" if path.suffix == ".png" else "JPEG", **options)


def save_png16(path, picture):
    """12-bit values stretched over 16, as PadChest has them."""
    Image.fromarray((picture * 4095).round().astype(np.uint16) * 16).save(path)


def save_dicom(path, picture, inverted, bits, windows, sex, age):
    """A digital X-ray of `bits` stored bits; MONOCHROME1 (white is 0) if inverted; `windows` VOI windows, none if 0."""
    top = 2 ** bits - 1
    stored = (picture * top).round().astype(np.uint16)
    uid = "2.25." + str(int(path.stem, 16))
    meta, ds = FileMetaDataset(), Dataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPInstanceUID = ExplicitVRLittleEndian, uid
    meta.MediaStorageSOPClassUID = ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"   # digital X-ray, for presentation
    ds.SOPInstanceUID, ds.PatientSex, ds.PatientAge, ds.Modality = uid, sex, age, "DX"
    ds.file_meta, ds.Rows, ds.Columns = meta, *picture.shape
    ds.SamplesPerPixel, ds.PixelRepresentation = 1, 0
    ds.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, bits, bits - 1
    ds.RescaleIntercept, ds.RescaleSlope = 0, 1
    if windows:
        ds.WindowCenter = [(top + 1) // 2, (top + 1) // 2 + 100][:windows]
        ds.WindowWidth = [top + 1, (top + 1) // 2][:windows]
    ds.PixelData = (top - stored if inverted else stored).tobytes()
    ds.save_as(path, enforce_file_format=True)


def make(task):
    """Draw and save one picture: task is (path, paint, save); paint returns the picture and what to tell the layout."""
    path, paint, save = task
    picture, told = paint()
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, picture)
    return told


# The layouts: one function a dataset. `key` seeds, `count` scales a number of pictures, `draw` makes a list of tasks.

def write_lines(path, lines):
    """Text lines, gzipped (without a time stamp) if the name says so."""
    data = "".join(line + "\n" for line in lines).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def write_csv(path, header, rows):
    """The header as it stands (some sources leave their commas unquoted), then the rows with CSV's quoting."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_lines(path, [header, text.getvalue()[:-1]] if rows else [header])


def digest(*parts):
    """A long hexadecimal id that looks like chance and is none."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def nih(root, key, count, draw):
    rows, tasks, lists, first, followed = [], [], {}, 1, {}
    for i, (split, n) in enumerate({"train": 900, "val": 180, "test": 400}.items()):
        lists[split] = []
        for film in cohort("nih", (*key, i), count(n)):
            patient = first + film.patient
            name = f"{patient:08d}_{film.study - 1:03d}.png"
            lists[split].append((name, film))
            rows.append([name, "|".join(sorted(film.labels)) or "No Finding", film.study - 1, patient,
                         film.anatomy["age"] + film.study - 1, film.anatomy["sex"], film.view, 2048, 2500, 0.168, 0.168])
            save = partial(save_picture, mode="RGBA" if len(rows) % 200 == 7 else "L")      # the download has some
            tasks.append((root / f"images_{1 + len(tasks) // 500:03d}" / "images" / name, partial(radiograph, film), save))
        first = patient + 1
    boxes = dict(zip((row[0] for row in rows), draw(tasks)))
    write_csv(root / "Data_Entry_2017_v2020.csv", "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,"
              "Patient Gender,View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]", rows)
    write_lines(root / "train_val_list.txt", [name for s in ("train", "val") for name, _ in lists[s]])
    write_lines(root / "test_list.txt", [name for name, _ in lists["test"]])
    for split, members in lists.items():
        write_lines(root / f"Xray14_{split}_official.txt",
                    [" ".join([name, *(str(int(f in film.labels)) for f in FINDINGS)]) for name, film in members])
    scale = 1024 / SITES["nih"].size[0]                                 # boxes are in pixels of the 1024² original
    boxed = [[name, f.replace("Infiltration", "Infiltrate"), *np.multiply((x0, y0, x1 - x0, y1 - y0), scale).tolist(),]
             for name, film in lists["test"][::2] for f, (x0, y0, x1, y1) in boxes[name].items()
             if f in film.labels and f in FINDINGS[:8]]                 # the eight findings that were boxed
    write_csv(root / "BBox_List_2017.csv", "Image Index,Finding Label,Bbox [x,y,w,h],,,", boxed)


def report_labels(film, certain=False):
    """CheXpert's fourteen observations {name: "1.0", "0.0", "-1.0" or ""} as mined from the study's report."""
    has, rng = film.labels, np.random.default_rng((*film.key[:-1], 1000))
    claims = {
        "No Finding": not has, "Enlarged Cardiomediastinum": "Cardiomegaly" in has and rng.random() < 0.4,
        "Cardiomegaly": "Cardiomegaly" in has, "Lung Opacity": has & {"Infiltration", "Consolidation", "Pneumonia"},
        "Lung Lesion": has & {"Mass", "Nodule"}, "Edema": "Edema" in has, "Consolidation": "Consolidation" in has,
        "Pneumonia": "Pneumonia" in has, "Atelectasis": "Atelectasis" in has, "Pneumothorax": "Pneumothorax" in has,
        "Pleural Effusion": "Effusion" in has, "Pleural Other": has & {"Pleural_Thickening", "Fibrosis"},
        "Fracture": False, "Support Devices": film.devices}
    values = {}
    for name, claim in claims.items():
        chance = rng.random()
        if certain:
            values[name] = "1.0" if claim else "0.0"
        elif claim:
            values[name] = "-1.0" if chance < 0.1 and name != "No Finding" else "1.0"
        else:
            values[name] = "" if name == "No Finding" or chance > 0.2 else "-1.0" if chance < 0.04 else "0.0"
    return values


def mimic_cxr(root, key, count, draw):
    metadata, labels, splits, tasks, first = [], {}, [], [], 0
    for i, (split, n) in enumerate({"train": 1080, "validate": 40, "test": 80}.items()):
        for film in cohort("mimic_cxr", (*key, i), count(n)):
            serial = first + film.patient
            subject, study = 10_000_032 + 1237 * serial, 50_000_414 + 23 * serial + film.study
            code = digest(key, subject, study, film.view)
            dicom = "-".join(code[j:j + 8] for j in range(0, 40, 8))
            view = "" if int(code[40:42], 16) < 12 else "LL" if film.view == "LATERAL" and code[42] < "8" else film.view
            width, height = SITES["mimic_cxr"].size
            metadata.append([dicom, subject, study, "CHEST (PORTABLE AP)" if film.view == "AP" else "CHEST (PA AND LAT)",
                             view, height, width, 21800506 + film.study, "213014.531",
                             "CHEST (PORTABLE AP)" if film.view == "AP" else "CHEST (PA AND LAT)",
                             {"AP": "antero-posterior", "PA": "postero-anterior", "LATERAL": "lateral"}[film.view], "Erect"])
            labels[subject, study] = report_labels(film)
            splits.append([dicom, study, subject, split])
            path = root / "files" / f"p{str(subject)[:2]}" / f"p{subject}" / f"s{study}" / f"{dicom}.jpg"
            tasks.append((path, partial(radiograph, film), partial(save_picture, quality=90)))
        first = serial + 1
    draw(tasks)
    write_csv(root / "mimic-cxr-2.0.0-metadata.csv.gz", "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,"
              "ViewPosition,Rows,Columns,StudyDate,StudyTime,ProcedureCodeSequence_CodeMeaning,"
              "ViewCodeSequence_CodeMeaning,PatientOrientationCodeSequence_CodeMeaning", metadata)
    names = sorted(labels[subject, study])
    mined = [[*study, *(values[name] for name in names)] for study, values in labels.items()]
    for labeller in ("chexpert", "negbio"):
        write_csv(root / f"mimic-cxr-2.0.0-{labeller}.csv.gz", ",".join(["subject_id", "study_id", *names]), mined)
    write_csv(root / "mimic-cxr-2.0.0-split.csv.gz", "dicom_id,study_id,subject_id,split", splits)


def chexpert(root, key, count, draw):
    release = "CheXpert-v1.0-small"
    tables, tasks, split, people, first = {"train": [], "valid": []}, [], [], {}, 1
    for i, (part, n) in enumerate({"test": 345, "other": 120, "valid": 116}.items()):
        table = tables["valid" if part == "valid" else "train"]
        for film in cohort("chexpert", (*key, i), count(n)):
            patient, side = first + film.patient, "Lateral" if film.view == "LATERAL" else "Frontal"
            path = (f"{release}/{'valid' if part == 'valid' else 'train'}/patient{patient:05d}/study{film.study}/"
                    f"view{film.key[-1] + 1}_{side.lower()}.jpg")
            sex = "Female" if film.anatomy["sex"] == "F" else "Male"
            race = ("White, non-Hispanic", "Black or African American", "Asian")[int(digest(key, patient), 16) % 5 // 2]
            if part != "valid" and side == "Frontal" and (part == "test" or patient % 3):   # a third is not listed
                listed = part if part == "test" else "train" if patient % 3 == 1 else "validate"
                split.append([len(split), len(table), listed])
            table.append([path, sex, film.anatomy["age"], side, film.view if side == "Frontal" else "",
                          *report_labels(film, certain=part == "valid").values()])
            tasks.append((root / path, partial(radiograph, film), partial(save_picture, quality=90)))
            people[patient] = [f"patient{patient:05d}", sex, film.anatomy["age"], race, "Non-Hispanic/Non-Latino"]
        first = patient + 1
    draw(tasks)
    for name, rows in tables.items():
        write_csv(root / release / f"{name}.csv", "Path,Sex,Age,Frontal/Lateral,AP/PA,"
                  + ",".join(report_labels(film)), rows)
    write_csv(root / "chexpert_split_2021_08_20.csv", ",index,split", split)
    write_csv(root / "CHEXPERT DEMO.csv", "PATIENT,GENDER,AGE_AT_CXR,PRIMARY_RACE,ETHNICITY", people.values())


PADCHEST_WORDS = {      # a finding of ours in PadChest's words, by turns
    "Atelectasis": ["laminar atelectasis", "atelectasis", "laminar atelectasis", "lobar atelectasis"],
    "Cardiomegaly": ["cardiomegaly"], "Effusion": ["pleural effusion"], "Infiltration": ["infiltrates"],
    "Mass": ["mass"], "Nodule": ["nodule"], "Pneumonia": ["pneumonia"], "Pneumothorax": ["pneumothorax"],
    "Consolidation": ["consolidation"], "Emphysema": ["emphysema"], "Fibrosis": ["pulmonary fibrosis"],
    "Pleural_Thickening": ["pleural thickening", "apical pleural thickening"], "Hernia": ["hiatal hernia"]}


def padchest(root, key, count, draw):
    rows, tasks, first = [], [], 0
    for i, (kept, n) in enumerate({True: 200, False: 50}.items()):     # the study's filter drops the second part:
        for j, film in enumerate(cohort("padchest", (*key, i), count(n))):
            patient, folder, projection, method = first + film.patient, 0, film.view, "Manual review of DICOM fields"
            labels = sorted(PADCHEST_WORDS[f][j % len(PADCHEST_WORDS[f])] for f in film.labels) or ["normal"]
            if not kept and j % 4 == 0:                                 # lateral films,
                film.view, projection = "LATERAL", "L"
            elif not kept and j % 4 == 1:                               # bedside films,
                film.view, projection = "AP", "AP_horizontal"
            elif not kept and j % 4 == 2:                               # other archives,
                folder = 1
            elif not kept:                                              # projections guessed by a network
                method = "resnet-50.t7"
            person_id, study_id = (str(int(digest(key, patient, k), 16))[:38] for k in ("", film.study))
            year, width, height = 2013 + film.study, *SITES["padchest"].size
            name = f"{study_id}_{digest(study_id)[:6]}.png"
            rows.append([len(rows), name, folder, f"{year}0915", study_id, person_id,
                         float(year - film.anatomy["age"]), film.anatomy["sex"],
                         "ANTEROPOSTERIOR" if film.view == "AP" else "POSTEROANTERIOR", projection, method,
                         "PED" if film.anatomy["age"] < 15 else "No", "CR", "PhilipsMedicalSystems", "MONOCHROME2", 0,
                         "['1', '1']", 0.143, 12, 2047.0, 4095.0, height, width, 250, 2, 2500, 10, -1.42, 4765777 + len(rows),
                         "texto inventado .\ndibujo " + " ".join(labels) + " .", "Physician",
                         "" if not kept and j % 16 == 7 else str(labels), "['loc basal']",
                         str([[label, "loc basal"] for label in labels]), "['C0000001']", "[]"])
            tasks.append((root / str(folder) / name, partial(radiograph, film), save_png16))
        first = patient + 1
    draw(tasks)
    write_csv(root / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz",
              ",ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,PatientSex_DICOM,ViewPosition_DICOM,Projection,"
              "MethodProjection,Pediatric,Modality_DICOM,Manufacturer_DICOM,PhotometricInterpretation_DICOM,"
              "PixelRepresentation_DICOM,PixelAspectRatio_DICOM,SpatialResolution_DICOM,BitsStored_DICOM,WindowCenter_DICOM,"
              "WindowWidth_DICOM,Rows_DICOM,Columns_DICOM,XRayTubeCurrent_DICOM,Exposure_DICOM,ExposureInuAs_DICOM,ExposureTime,"
              "RelativeXRayExposure_DICOM,ReportID,Report,MethodLabel,Labels,Localizations,LabelsLocalizationsBySentence,"
              "labelCUIS,LocalizationsCUIS", rows)


VINDR_LABELS = ("Aortic enlargement,Atelectasis,Calcification,Cardiomegaly,Clavicle fracture,Consolidation,Edema,Emphysema,"
                "Enlarged PA,ILD,Infiltration,Lung Opacity,Lung cavity,Lung cyst,Mediastinal shift,Nodule/Mass,Pleural effusion,"
                "Pleural thickening,Pneumothorax,Pulmonary fibrosis,Rib fracture,Other lesion,COPD,Lung tumor,Pneumonia,"
                "Tuberculosis,Other diseases,No finding").split(",")
VINDR_WORDS = {"Effusion": "Pleural effusion", "Mass": "Nodule/Mass", "Nodule": "Nodule/Mass", "Hernia": "Other lesion",
               "Fibrosis": "Pulmonary fibrosis", "Pleural_Thickening": "Pleural thickening"}


def vindr_cxr(root, key, count, draw):
    for i, (split, n) in enumerate({"train": 40, "test": 200}.items()):
        films = cohort("vindr_cxr", (*key, i), count(n))
        ids = [digest(key, split, j)[:32] for j in range(len(films))]
        tasks = [(root / split / f"{name}.dicom", partial(radiograph, film),
                  partial(save_dicom, inverted=j % 4 == 0, bits=(12, 14, 12, 10, 14)[j % 5], windows=j % 3,
                          sex=(film.anatomy["sex"], "")[j % 2], age=(f"{film.anatomy['age']:03d}Y", "000Y", "")[j % 3]))
                 for j, (name, film) in enumerate(zip(ids, films))]
        rng, label_rows, box_rows = np.random.default_rng((*key, i, 1)), [], []
        for name, film, boxes in zip(ids, films, draw(tasks)):
            found = {VINDR_WORDS.get(f, f) for f in film.labels}
            drawn = [(VINDR_WORDS.get(f, f), box) for f, box in boxes.items() if f in film.labels]
            for reader in (["R8"], ["R9"], ["R10"]) if split == "train" else ([],):
                said = {f for f in found if not (reader and rng.random() < 0.1)}    # three readers, now and then blind
                label_rows.append([name, *reader, *(int(f in said or f == "No finding" and not said) for f in VINDR_LABELS)])
                box_rows += [[name, *reader, f, *box] for f, box in drawn if f in said]
                box_rows += [] if said else [[name, *reader, "No finding", "", "", "", ""]]
        reader = "rad_id," if split == "train" else ""
        write_csv(root / "annotations" / f"image_labels_{split}.csv", f"image_id,{reader}" + ",".join(VINDR_LABELS), label_rows)
        write_csv(root / "annotations" / f"annotations_{split}.csv", f"image_id,{reader}class_name,x_min,y_min,x_max,y_max",
                  box_rows)


COVIDX_FAMILIES = [     # per class: source, country, metadata id and slice name of patient p
    [("CNCB", "China", "Normal_{p}", "Normal_{p}_{q}_{z:04d}"), ("COVID-CTset", "Iran", "patient{p}", "normal2_patient{p}_SR_2_IM{z:05d}"),
     ("COVID-CT-MD", "Iran", "COVIDCTMD-normal{p:03d}", "COVIDCTMD-normal{p:03d}-IM{z:04d}")],
    [("CNCB", "China", "CP_{p}", "CP_{p}_{q}_{z:04d}"), ("COVID-CT-MD", "Iran", "COVIDCTMD-cap{p:03d}", "COVIDCTMD-cap{p:03d}-IM{z:04d}")],
    [("CNCB", "China", "NCP_{p}", "NCP_{p}_{q}_{z:04d}"), ("TCIA", "", "volume-covid19-A-{p:04d}", "volume-covid19-A-{p:04d}_ct-{z:04d}"),
     ("COVID-CTset", "Iran", "patient{p}", "137covid_patient{p}_SR_2_IM{z:05d}"), ("COVID-CT-MD", "Iran", "COVIDCTMD-P{p:03d}", "COVIDCTMD-P{p:03d}-IM{z:04d}")]]


def covidx_ct(root, key, count, draw):
    patients, number = [], 0
    for split, n in {"train": 600, "val": 100, "test": 100}.items():
        names, tasks = [], []
        while len(tasks) < count(n):                                    # eight slices a patient
            number += 1
            disease = (0, 1, 2, 2)[number % 4] if split == "train" else number % 3
            source, country, owner, slice_name = COVIDX_FAMILIES[disease][number // 4 % len(COVIDX_FAMILIES[disease])]
            rng = np.random.default_rng((*key, number))
            patients.append([owner.format(p=number), source, country, rng.choice(["M", "F"]), rng.integers(20, 90),
                             ("Normal", "Pneumonia", "COVID-19")[disease], "Yes", "Expert", "Axial", "CT"])
            for z in range(8)[:count(n) - len(tasks)]:
                names.append((slice_name.format(p=number, q=1000 + number, z=20 + 3 * z), disease))
                paint = partial(ct_slice, (*key, number), (z + rng.random()) / 8, disease, np.random.default_rng((*key, number, z)))
                tasks.append((root / "3A_images" / f"{names[-1][0]}.png", paint, save_picture))
        write_lines(root / f"{split}_COVIDx_CT-3A.txt", [" ".join(map(str, (f"{name}.png", disease, *box)))
                                                        for (name, disease), box in zip(names, draw(tasks))])
    write_csv(root / "metadata.csv", "patient id,source,country,sex,age,finding,verified finding,slice selection,view,modality",
              patients)


def oct(root, key, count, draw):
    tasks = []
    for split, n in {"train": 190, "test": 10}.items():
        for c, disease in enumerate(("CNV", "DME", "DRUSEN", "NORMAL")):
            for j in range(count(n)):
                patient = 100_000 * (c + 1) + 31 * (j // 3) + 7_000 * (split == "test")     # three scans a patient
                path = root / "CellData" / "OCT" / split / disease / f"{disease}-{patient}-{j % 3 + 1}.jpeg"
                paint = partial(retina, (*key, patient), disease, np.random.default_rng((*key, patient, j)))
                tasks.append((path, paint, partial(save_picture, quality=90)))
    draw(tasks)


def retina(patient, disease, rng):
    return oct_scan(patient, disease, rng), None


def imagenet(root, key, count, draw):
    data, tasks, train, val = root / "ILSVRC" / "Data" / "CLS-LOC", [], [], []
    for c, (wnid, *_) in enumerate(CLASSES):
        for j in range(count(80)):
            train.append((f"{wnid}_{(j + 1) * 37 + c}", wnid))
            tasks.append((data / "train" / wnid / f"{train[-1][0]}.JPEG", c, (*key, 0, c, j)))
    for j, c in enumerate(np.random.default_rng(key).permutation(np.repeat(range(len(CLASSES)), count(10)))):
        val.append((f"ILSVRC2012_val_{j + 1:08d}", CLASSES[c][0]))      # validation files lie flat: the table names the class
        tasks.append((data / "val" / f"{val[-1][0]}.JPEG", int(c), (*key, 1, j)))
    boxes = draw([(path, partial(natural_image, c, np.random.default_rng(seed)), partial(save_picture, mode="RGB", quality=85))
                  for path, c, seed in tasks])
    for split, images, found in (("train", train, boxes[:len(train)]), ("val", val, boxes[len(train):])):
        write_csv(root / f"LOC_{split}_solution.csv", "ImageId,PredictionString",
                  [[name, " ".join(map(str, (wnid, *box))) + " "] for (name, wnid), box in zip(images, found)])
    sets = root / "ILSVRC" / "ImageSets" / "CLS-LOC"
    write_lines(sets / "train_cls.txt", [f"{wnid}/{name} {i}" for i, (name, wnid) in enumerate(train, 1)])
    write_lines(sets / "val.txt", [f"{name} {i}" for i, (name, _) in enumerate(val, 1)])
    write_lines(root / "LOC_synset_mapping.txt", [f"{wnid} {words}" for wnid, words, *_ in CLASSES])


DATASETS = [nih, mimic_cxr, chexpert, padchest, vindr_cxr, covidx_ct, oct, imagenet]


def generate(out, settings):
    """Make every dataset in a folder of its own beside its place, move it there when complete, sign off with demo.json."""
    started, counts = time.time(), {}
    (out / "demo.json").unlink(missing_ok=True)
    with ProcessPoolExecutor() as pool:
        for number, dataset in enumerate(DATASETS):
            place, partly = out / dataset.__name__, out / f"{dataset.__name__}.partial"
            shutil.rmtree(partly, ignore_errors=True)
            partly.mkdir(parents=True)
            done = []

            def draw(tasks):
                done.extend(tasks)
                return list(pool.map(make, tasks, chunksize=16))

            dataset(partly, (settings["seed"], number), lambda n: max(4, round(n * settings["scale"])), draw)
            write_lines(partly / "README.txt", [f"{STAND_IN}.", "", f"It has the layout of {dataset.__name__}'s public download, but "
                        "every picture, patient and label in it is invented.", "No number computed from it says anything about the real "
                        "data.", f"Made with {settings}."])
            if place.exists():
                shutil.rmtree(place)
            os.replace(partly, place)
            counts[dataset.__name__] = len(done)
            print(f"stand-in {dataset.__name__:10s} {len(done):6,d} images  {time.time() - started:5.1f} s", flush=True)
    os.sync()                                                           # the pictures are on disk before demo.json says so
    text = json.dumps({"stand_in": True, **settings, "images": counts}, indent=1)
    with open(out / "demo.json.partial", "w", encoding="utf-8", newline="\n") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(out / "demo.json.partial", out / "demo.json")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write <dataset>/ into")
    parser.add_argument("--seed", type=int, default=0, help="other patients, other pictures (default 0)")
    parser.add_argument("--scale", type=float, default=1.0, help="1.0 is about 6,200 images; 0.05 a twentieth (default 1.0)")
    args = parser.parse_args()
    if args.seed < 0 or not 0 < args.scale <= 100:
        fail(f"--seed {args.seed} --scale {args.scale:g}: the seed must not be negative, the scale above 0 and at most 100")
    settings, marker = {"version": VERSION, "seed": args.seed, "scale": args.scale}, args.out / "demo.json"
    try:
        if marker.is_file() and settings.items() <= json.loads(marker.read_text(encoding="utf-8")).items():
            print(f"stand-ins in {args.out} are complete: seed {args.seed}, scale {args.scale:g}")
            return
        for dataset in DATASETS:                                        # never touch what this script did not make
            place = args.out / dataset.__name__
            readme = place / "README.txt"
            if place.exists() and not (readme.is_file() and STAND_IN in readme.read_text(encoding="utf-8", errors="replace")):
                fail(f"{place} exists and is no stand-in of this script's; give another --out")
        generate(args.out, settings)
    except OSError as error:
        fail(f"{error.filename or args.out}: {error.strerror}; the stand-ins need a writable --out and about 60 MB of space")


if __name__ == "__main__":
    main()
