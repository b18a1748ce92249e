"""Draws stand-ins of all eight datasets, in their real raw layouts, so that the whole study runs without a download.

Nothing here is a medical image. The radiographs come from a parametric phantom: a beam crosses a thorax, and what it
meets (tissue, bone, air) gives the grey value. Every finding is a change one can see: water where air was (opacities,
fluid), a border that moved (heart, diaphragm, lung edge) or a pattern of lines. Patients keep their anatomy from film to
film; each site has a look, a case mix and labelling errors of its own. CT, OCT and natural images are drawn likewise.

    python data_prep/demo.py --out data/demo/raw                       # everything: half a minute on 2 cores, 60 MB
    python data_prep/demo.py --out /tmp/tiny --scale 0.05 --seed 1     # a twentieth of it, other patients

Reads:  nothing.
Writes: <out>/<dataset>/… for nih, mimic_cxr, chexpert, padchest, vindr_cxr, covidx_ct, oct and imagenet, with file names,
        columns and formats of the public downloads; <out>/<dataset>/README.txt, which says that it is a stand-in;
        <out>/demo.json last of all, when everything is complete. Same seed, same bytes.
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
from types import SimpleNamespace

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

VERSION = 1             # raise when the drawings change: folders made before are then made anew
STAND_IN = "This folder is a STAND-IN, drawn by data_prep/demo.py"

# finding: (share of studies, weight of a patient's heart failure, infection, chronic lung disease). Shares are higher than
# in any hospital, so that a thousand films are enough to learn from; the hidden causes make findings come together.
FINDINGS = {
    "Atelectasis": (.20, .5, .5, .0), "Cardiomegaly": (.20, .9, .0, .2), "Effusion": (.25, .8, .4, .0),
    "Infiltration": (.15, .0, .6, .3), "Mass": (.09, .0, .0, .5), "Nodule": (.11, .0, .0, .4),
    "Pneumonia": (.09, .0, .9, .0), "Pneumothorax": (.11, .0, .0, .4), "Consolidation": (.16, .0, .9, .0),
    "Edema": (.14, 1., .0, .0), "Emphysema": (.10, -.3, .0, .9), "Fibrosis": (.10, .0, .0, .8),
    "Pleural_Thickening": (.10, .0, .2, .6), "Hernia": (.06, .2, .0, .0)}


@dataclass
class Site:
    """What makes one hospital's films look, and its labels read, unlike another's."""
    size: tuple = (160, 160)        # width, height of the film in pixels
    ap: float = 0.0                 # share of bedside (AP) films: larger heart, higher diaphragm, more devices
    window: tuple = (0.12, 1.05)    # attenuation shown as black and as white
    gamma: float = 1.0              # below 1 lifts the dark parts
    noise: float = 0.012            # grain, in grey values 0–1
    blur: int = 1                   # passes of binomial smoothing
    collimation: float = 0.1        # share of films with a black border
    devices: float = 0.2            # share of bedside films with lines, tubes, pacemakers; half of it in others
    error: float = 0.0              # share of positives that the labels miss; as many negatives are called positive
    share: float = 1.0              # prevalence relative to FINDINGS
    absent: tuple = ()              # findings this site never has
    lateral: float = 0.0            # share of studies with a lateral film beside the frontal one
    studies: float = 0.5            # a patient has 1 / studies of them on average


SITES = {   # labels are mined from reports at NIH, MIMIC and CheXpert, given by physicians at the other two
    "nih": Site(ap=0.4, error=0.08, studies=0.4),
    "mimic_cxr": Site(size=(160, 192), ap=0.65, window=(0.02, 1.0), gamma=0.85, noise=0.016, blur=2, devices=0.7,
                      error=0.10, share=1.2, lateral=0.25),
    "chexpert": Site(size=(192, 160), ap=0.8, window=(0.22, 0.98), gamma=1.15, noise=0.02, collimation=0.5,
                     devices=0.8, error=0.08, share=1.4, lateral=0.15),
    "padchest": Site(size=(164, 172), ap=0.03, window=(0.05, 1.2), gamma=0.8, noise=0.006, blur=2, collimation=0.6,
                     error=0.03, absent=("Edema",), studies=0.9),
    "vindr_cxr": Site(size=(148, 168), window=(0.2, 1.1), gamma=1.3, noise=0.01, blur=0, collimation=0.0, devices=0.05,
                      error=0.02, absent=("Edema",), studies=1.0)}


# --- begin copy: error ---
def fail(message):
    """A mistake the user can mend: one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
# --- end copy: error ---


# Pencils. A shape is a field of floats 0–1 over the picture; distances are in canvas units, negative inside.

def canvas(size, rng, tilt=0.03, shift=0.04, zoom=0.06):
    """Coordinates x, y float32 [H, W] seen by a slightly misplaced camera: x about -1 … 1, y downwards, square pixels."""
    width, height = size
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x, y = (2 * x + 1 - width) / width, (2 * y + 1 - height) / width
    angle, scale, (right, down) = tilt * rng.normal(), 1 + zoom * rng.normal(), shift * rng.standard_normal(2, np.float32)
    cos, sin = float(np.cos(angle)) * scale, float(np.sin(angle)) * scale
    return x * cos - y * sin + right, x * sin + y * cos + down


def below(distance, soft=0.02):
    """1 where the distance is negative, 0 where it is positive, a ramp of the given width between."""
    return np.clip(0.5 - distance / soft, 0, 1)


def bump(distance, width):
    """A Gaussian ridge, 1 at distance 0."""
    return np.exp(-0.5 * np.square(distance / width))


def union(first, second):
    """Two half-transparent shapes, one before the other."""
    return 1 - (1 - first) * (1 - second)


def clouds(rng, shape, cells):
    """Smooth noise of mean 0 and deviation about 0.7 with `cells` lumps along the height."""
    coarse = rng.standard_normal((cells, max(2, cells * shape[1] // shape[0])), np.float32)
    return np.asarray(Image.fromarray(coarse).resize(shape[::-1], Image.BICUBIC))


def smooth(image, passes):
    """Binomial blur (1, 2, 1) along both axes."""
    for _ in range(passes):
        image = np.pad(image, 1, mode="edge")
        image = (image[:-2] + 2 * image[1:-1] + image[2:]) / 4
        image = (image[:, :-2] + 2 * image[:, 1:-1] + image[:, 2:]) / 4
    return image


# The chest. The patient's right side is on the left, x < 0; one unit is half the film's width.

def person(rng):
    """The anatomy a patient keeps from film to film; lengths in canvas units."""
    female = rng.random() < 0.45
    return SimpleNamespace(
        sex="F" if female else "M", age=int(np.clip(rng.normal(52, 17), 8, 89)),
        width=rng.normal(0.73, 0.03), apex=rng.normal(-0.80, 0.03), base=rng.normal(0.38, 0.04),    # of the lungs
        ratio=rng.normal(0.44, 0.025),          # heart width / chest width on a PA film: above 0.5 is cardiomegaly
        slope=rng.uniform(0.9, 1.7), aorta=rng.uniform(0.03, 0.09), hilum=rng.uniform(0.3, 0.6),
        rib_gap=rng.normal(0.145, 0.008), rib_start=rng.uniform(), clavicle=rng.normal(0.10, 0.05),
        bend=rng.normal(0, 0.02), fat=rng.uniform(0.80, 1.0), breast=female * rng.uniform(0.03, 0.10),
        vessels=rng.uniform(0, 2 * np.pi, 4).tolist(), stomach=rng.uniform(0.03, 0.09))


def thorax(a, has, ap, sick, size, rng):
    """Where things lie on a frontal film: the borders of lungs, heart and diaphragm, all [H, W].

    Args: a (from `person`), has {finding: severity 0–1}, ap (bool), sick (-1 or 1, the side worse off), size, rng.
    """
    x, y = canvas(size, rng)
    x = x - a.bend * np.sin(3 * y)                                      # scoliosis bends everything that follows
    wide, left = np.abs(x), x > 0
    # Lying patients have high diaphragms, emphysema presses them flat, atelectasis lifts one, the left is lower.
    floor = a.base - 0.08 * ap + 0.12 * has["Emphysema"]
    base = floor + 0.05 * left - 0.12 * has["Atelectasis"] * (x * sick > 0)
    dome = base + (1.2 - 0.8 * has["Emphysema"]) * np.square(wide - 0.38) * np.where(wide > 0.38, 1.2, 0.4)
    down = np.clip((y - a.apex) / (base - a.apex), 0, 1)                # 0 at the apex of a lung, 1 at its base
    arch = np.sqrt(down * (2 - down))
    wall, middle = 0.36 + (a.width - 0.36) * arch ** 0.9, 0.36 - 0.25 * arch
    across = np.clip((wide - middle) / np.maximum(wall - middle, 0.01), 0, 1)   # 0 at the mediastinum, 1 at the ribs
    lung = below(wide - wall) * below(middle - wide, 0.06) * below(y - dome, 0.03) * below(a.apex - y, 0.06)
    # The heart's shadow reaches about twice as far to the left; its border slopes from the aortic knob to the apex.
    ratio = a.ratio + 0.03 * ap - 0.03 * has["Emphysema"] + (has["Cardiomegaly"] > 0) * (0.05 + 0.13 * has["Cardiomegaly"])
    fall = np.clip((y + 0.30) / (floor + 0.34), 0, 1)
    to_left = 0.09 + a.aorta * bump(y + 0.38, 0.06) + (1.32 * ratio * a.width - 0.09) * np.sin(1.9 * fall) ** a.slope
    to_right = 0.09 + (0.68 * ratio * a.width - 0.09) * np.sin(2.2 * fall)
    heart = below(-to_right - x, 0.05) * below(x - to_left, 0.05) * below(y - dome - 0.05, 0.1)
    bulk = heart * fall * np.sqrt(np.clip(1 - np.square((2 * x + to_right - to_left) / (to_left + to_right)), 0, 1))
    return SimpleNamespace(x=x, y=y, wide=wide, left=left, sick=x * sick > 0, floor=floor, base=base, dome=dome, down=down,
                           wall=wall, across=across, lung=lung, heart=heart, bulk=bulk)


def opacities(has, g, sick, rng):
    """Water where air was: {finding: share of the air replaced, [H, W]}; g from `thorax`."""
    x, y, shape, water = g.x, g.y, g.x.shape, {}

    def patch(side, top, bottom):                                       # a cloudy focus in one lung
        cx, cy, rx, ry = side * rng.uniform(0.32, 0.52), rng.uniform(top, bottom), *rng.uniform(0.13, 0.24, 2).tolist()
        return below(np.hypot((x - cx) / rx, (y - cy) / ry) - 1 + 0.3 * clouds(rng, shape, 14), 0.7)

    if severity := has["Effusion"]:                                     # a level rising along the chest wall
        level = g.floor + 0.18 - 0.42 * severity - 0.3 * (g.across ** 3 - 0.3)
        water["Effusion"] = below(level - y, 0.05) * g.sick
        if severity > 0.7:
            water["Effusion"] += below(level + 0.2 - y, 0.05) * ~g.sick
    if severity := has["Consolidation"]:
        water["Consolidation"] = patch(-sick, -0.3, 0.2) * (0.5 + 0.5 * severity)
    if severity := has["Pneumonia"]:                                    # fainter, lower, with spared spots
        water["Pneumonia"] = patch(sick, 0.0, 0.25) * (0.4 + 0.3 * severity) * np.clip(0.8 + clouds(rng, shape, 24) / 2, 0, 1)
    if severity := has["Infiltration"]:                                 # mottled and wide
        zone = bump(y - rng.uniform(-0.2, 0.1), 0.3) * np.where(g.sick, 1, rng.uniform(0, 1))
        water["Infiltration"] = zone * np.clip(clouds(rng, shape, 20), 0, 1) * (0.3 + 0.5 * severity)
    if severity := has["Atelectasis"]:                                  # plates above the lifted dome
        heights = np.array([0.14, 0.23, 0.32])[:rng.integers(2, 4)]
        plates = sum(bump(y - g.base.min() + up + rng.normal(0, 0.1) * (g.wide - 0.4), 0.016) for up in heights.tolist())
        water["Atelectasis"] = plates * g.sick * (g.across > 0.08) * (0.4 + 0.4 * severity)
    if severity := has["Edema"]:                                        # a butterfly around the hila
        haze = bump(g.wide - 0.25, 0.2) * bump(y + 0.12, 0.3) * (0.75 + 0.3 * clouds(rng, shape, 12))
        water["Edema"] = np.clip(haze, 0, 1) * (0.35 + 0.45 * severity)
    for name, small, large in (("Nodule", 0.045, 0.08), ("Mass", 0.11, 0.18)):
        if severity := has[name]:
            edge = np.hypot(x + sick * rng.uniform(0.3, 0.55), y - rng.uniform(-0.5, 0.15)) + 0.015 * clouds(rng, shape, 24)
            water[name] = below(edge - small - (large - small) * severity, 0.03) * 0.75
    if severity := has["Pleural_Thickening"]:                           # a rind along wall and apex
        water["Pleural_Thickening"] = 0.8 * below(g.wall - g.wide - 0.03 - 0.06 * severity, 0.03) * ~g.sick * (y < 0.35)
    return {name: np.clip(field, 0, 1) * g.lung for name, field in water.items()}


def chest(a, severity, ap, devices, rng, size):
    """A frontal film.

    Args: a (anatomy from `person`), severity {finding: 0–1}, ap and devices (bool), rng, size (width, height).
    Returns: attenuation float [H, W], 0 in free air and about 1 behind the heart; {finding: where, [H, W] 0–1}.
    """
    has, sick = {name: severity.get(name, 0.0) for name in FINDINGS}, int(rng.choice([-1, 1]))
    g = thorax(a, has, ap, sick, size, rng)
    x, y, wide = g.x, g.y, g.wide
    where = opacities(has, g, sick, rng)

    # Vessels fan out from the hila; fibrosis weaves a net of lines through the lower periphery.
    reach, angle = np.hypot(wide - 0.16, y + 0.12), np.arctan2(y + 0.12, wide - 0.16)
    wave = sum(np.cos(k * angle + phase + 2 * np.sin(5 * reach + phase) + g.left) for k, phase in zip((5, 9, 14, 19), a.vessels))
    lines = np.clip(wave - 0.8, 0, 1) * np.exp(-reach / 0.3) * (0.35 + 0.25 * has["Edema"] - 0.2 * has["Emphysema"])
    lines = union(lines, a.hilum * bump(wide - 0.17, 0.06) * bump(y + 0.1, 0.10))
    if has["Fibrosis"]:
        net = 1 - np.clip(3 * np.abs(clouds(rng, x.shape, 34)), 0, 1)
        lines = union(lines, net * np.clip(1.2 * g.down - 0.3, 0, 1) * (0.4 + g.across) * (0.3 + 0.4 * has["Fibrosis"]))

    # Air: what the lungs hold, less the water. Beyond the edge of a collapsed lung there is nothing but air.
    water = lines
    for field in where.values():
        water = union(water, field)
    free = np.zeros_like(x)
    if has["Pneumothorax"]:
        gap = (0.05 + 0.14 * has["Pneumothorax"]) * np.clip(1.3 - 1.2 * g.down, 0.2, 1.3)
        free = where["Pneumothorax"] = below(g.wall - wide - gap) * g.sick * g.lung
    depth = (4 * g.across * (1 - g.across) + 0.25) ** 0.3 * np.sqrt(np.clip(3 * g.down, 0.1, 1))
    air = g.lung * depth * (1 - g.heart) * (1 - water * (1 - free))
    air = air * (1 - 0.08 * ap + 0.18 * has["Emphysema"] + 0.35 * free)
    air += 0.25 * bump(x, 0.035) * (y < -0.35)                          # windpipe
    air += 0.5 * below(np.hypot((x - 0.42) / 0.16, (y - g.base - 0.10) / a.stomach) - 1, 0.3) * (y > g.dome)
    if has["Hernia"]:                                                   # a sac behind the heart, with a bubble and a level
        sac, radius = np.hypot(x - 0.06, y - g.floor + 0.08), 0.10 + 0.09 * has["Hernia"]
        where["Hernia"] = below(sac - radius, 0.03)
        air = air * (1 - where["Hernia"]) + 0.55 * below(sac - 0.8 * radius, 0.04) * (y < g.floor - 0.06)
    if has["Cardiomegaly"]:
        where["Cardiomegaly"] = g.heart * (y > -0.3)

    # Tissue and bone: torso, neck, breasts, the belly below the diaphragm; ribs behind and, fainter, in front.
    body = below(0.5 * np.clip(wide - 0.22, 0, 1) - 0.95 - y, 0.03) * below(wide - 1.02, 0.05)
    body = union(body, below(wide - 0.24, 0.05) * (y < 0))
    solid = body * a.fat * (0.66 + 0.2 * np.sqrt(np.clip(1 - wide ** 2, 0, 1)))
    solid += 0.14 * g.bulk + 0.10 * below(g.dome - y, 0.1) + 0.08 * below(np.hypot(x, (y - 1.1) / 1.3) - 0.5, 0.6)
    solid += a.breast * below(np.hypot((wide - 0.42) / 0.3, (y - 0.18) / 0.27) - 1, 0.15)
    cage = below(wide - g.wall - 0.03, 0.03) * (y > a.apex + 0.02) * (y < g.floor + 0.35) * (1 - 0.6 * g.heart)
    for slope, strength in ((0.25, 0.08), (-0.45, 0.045)):
        rib = (y - slope * wide ** 1.5) / a.rib_gap + a.rib_start
        solid += strength * cage * bump(np.abs(rib - np.round(rib)) - 0.14, 0.08)
    solid += 0.10 * bump(y + 0.68 + a.clavicle * wide + 0.12 * (wide - 0.4) ** 2, 0.025) * below(wide - 0.75)
    solid += 0.10 * below(wide - 0.085, 0.03) * (0.8 + 0.2 * np.cos(y * 2 * np.pi / 0.17))      # spine
    solid += 0.06 * bump(free - 0.5, 0.2) * g.lung if has["Pneumothorax"] else 0
    return solid - 0.58 * air + (hardware(rng, x, y) if devices else 0), where


def hardware(rng, x, y):
    """Metal and plastic, added to the attenuation: a central line and, by chance, a pacemaker, a tube, wires on the skin."""
    line = x - rng.choice([-0.5, 0.5]) * np.clip(-0.45 - y, 0, 0.4) - 0.06
    drawn = 0.22 * bump(line, 0.012) * (y < rng.uniform(-0.1, 0.05)) * (y > -0.85)
    if rng.random() < 0.4:
        box = below(np.maximum(np.abs(x - 0.55) / 1.1, np.abs(y + 0.45)) - 0.08, 0.03)
        lead = bump(y - 0.25 + 1.4 * (x - 0.5) ** 2 - 0.5 * (x - 0.5), 0.012) * (x > 0.1) * (x < 0.55) * (y > -0.45)
        drawn = np.maximum(drawn, 0.45 * np.maximum(box, 0.7 * lead))
    if rng.random() < 0.5:
        drawn = np.maximum(drawn, 0.2 * bump(x - 0.02 * np.sin(4 * y), 0.014) * (y < rng.choice([-0.4, 0.8])))
    for _ in range(rng.integers(0, 4)):
        start, bow = rng.uniform(-0.6, 0.6, 2).tolist()
        drawn = np.maximum(drawn, 0.18 * bump(y - start - bow * x ** 2 - 0.4 * bow * x, 0.01))
    return drawn


def lateral_chest(a, severity, rng, size):
    """Attenuation [H, W] of a lateral film, breastbone at the left; the larger findings, seen from the side."""
    x, y = canvas(size, rng)
    has = {name: severity.get(name, 0.0) for name in FINDINGS}
    floor = a.base - 0.05 + 0.12 * has["Emphysema"]
    down = np.clip((y - a.apex) / (floor + 0.25 - a.apex), 0, 1)
    arch = np.sqrt(down * (2 - down))
    front, back = -0.12 - 0.42 * arch, -0.02 + 0.50 * arch - 0.1 * down ** 2
    dome = floor + 0.28 * np.clip(x, -0.5, 1) ** 2 + 0.1 * x
    lung = below(front - x, 0.06) * below(x - back, 0.06) * below(y - dome, 0.04)
    half = (a.ratio + 0.12 * has["Cardiomegaly"]) * a.width
    heart = below(np.hypot((x + 0.52 - half) / half, (y - floor + 0.17) / (0.85 * half)) - 1, 0.25)
    water = union(0.6 * heart, 0.5 * bump(np.hypot(x + 0.02, y + 0.12), 0.11))
    for name, radius in (("Consolidation", 0.2), ("Pneumonia", 0.2), ("Mass", 0.15), ("Nodule", 0.06)):
        cx, cy = rng.uniform(-0.25, 0.25, 2).tolist()
        water = union(water, 0.5 * (has[name] > 0) * below(np.hypot(x - cx, y - cy) - radius, 0.1))
    level = floor + 0.3 - 0.5 * has["Effusion"] - 0.2 * np.clip(x, 0, 1)
    water = union(water, 0.8 * below(level - y, 0.05) * (has["Effusion"] > 0))
    haze = 0.35 * has["Edema"] + 0.2 * has["Infiltration"] * np.clip(clouds(rng, x.shape, 18), 0, 1)
    air = lung * (1 - water) * (1 - haze) * (0.9 + 0.08 * clouds(rng, x.shape, 22))
    body = below(np.maximum(-0.66 - 0.05 * np.sin(3 * y) - x, x - 0.72 + 0.05 * np.cos(3 * y)), 0.05)
    rib = (y - 0.5 * x) / a.rib_gap + a.rib_start
    bone = 0.06 * lung * bump(np.abs(rib - np.round(rib)) - 0.14, 0.08)
    bone += 0.12 * bump(x - back - 0.03, 0.06) * (0.8 + 0.2 * np.cos(y * 2 * np.pi / 0.17))
    arms = 0.2 * below(y + 0.55 + 0.3 * x, 0.4)
    return body * a.fat * (0.72 + 0.12 * below(dome - y, 0.1) + arms) + bone - 0.45 * air


def develop(attenuation, site, rng):
    """The film as a site shows it, float [H, W] 0–1: its window, gamma, blur, grain, border, and an L at the patient's left."""
    height, width = attenuation.shape
    black, white = (edge + rng.normal(0, 0.04) for edge in site.window)
    grey = np.clip((smooth(attenuation, site.blur) - black) / (white - black), 0, None)
    grey = grey / (1 + grey ** 8) ** 0.125                              # film saturates softly
    grey = grey ** (site.gamma * rng.lognormal(0, 0.1))
    grey += site.noise * 2.2 * smooth(rng.standard_normal(grey.shape, np.float32), 1)
    row, column, letter = int(height * rng.uniform(0.04, 0.12)), int(width * rng.uniform(0.86, 0.93)), max(4, height // 26)
    grey[row:row + letter, column:column + 2] = 0.95
    grey[row + letter:row + letter + 2, column:column + letter // 2 + 2] = 0.95
    if rng.random() < site.collimation:
        top, side = int(height * rng.uniform(0, 0.05)), int(width * rng.uniform(0, 0.07))
        grey[:top], grey[height - top:], grey[:, :side], grey[:, width - side:] = 0.02, 0.02, 0.02, 0.02
    return np.clip(grey, 0, 1)
