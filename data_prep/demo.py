"""Draws stand-ins of all eight datasets in their real raw layouts, so that the study runs without a download.

Nothing here is a medical image. The radiographs come from a parametric phantom: a beam crosses a thorax, and
what it meets (tissue, bone, air) gives the grey value. Every finding is a change one can see: water where air
was, a border that moved, a pattern of lines. Patients keep their anatomy from film to film; each site has a
look, a case mix and labelling errors of its own. CT, OCT and natural images are drawn in the same way.

    python data_prep/demo.py --out data/demo/raw                     # half a minute on 2 cores, 65 MB
    python data_prep/demo.py --out /tmp/tiny --scale 0.05 --seed 1   # a twentieth of it, other patients
    python data_prep/demo.py --out raw --keep                        # only of datasets that raw/ does not have

Reads:  nothing.
Writes: <out>/<dataset>/ for nih, mimic_cxr, chexpert, padchest, vindr_cxr, covidx_ct, oct and imagenet, with
        file names, columns and formats of the public downloads, and a README.txt that says what it is;
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
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian

VERSION = 2             # raise when the drawings change: folders made before are then made anew
STAND_IN = "This folder is a STAND-IN, drawn by data_prep/demo.py"

# finding: share of studies; weight of a patient's heart failure, infection, chronic lung disease. The shares
# exceed any hospital's, so that a thousand films teach something; the hidden causes make findings coincide.
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
    ap: float = 0.0                 # share of bedside (AP) films: larger heart, high diaphragm, more devices
    window: tuple = (0.12, 1.05)    # attenuation shown as black and as white
    gamma: float = 1.0              # below 1 lifts the dark parts
    noise: float = 0.008            # grain, in grey values 0–1
    blur: int = 1                   # passes of binomial smoothing
    collimation: float = 0.1        # share of films with a black border
    devices: float = 0.2            # share of bedside films with lines, pacemakers; half of it in others
    error: float = 0.0              # share of positives the labels miss; as many negatives get a label
    share: float = 1.0              # prevalence relative to FINDINGS
    absent: tuple = ()              # findings this site never has
    lateral: float = 0.0            # share of studies with a lateral film beside the frontal one
    studies: float = 0.5            # a patient has 1 / studies of them on average


SITES = {   # labels are mined from reports at NIH, MIMIC and CheXpert, given by physicians at the other two
    "nih": Site(ap=0.4, error=0.08, studies=0.4),
    "mimic_cxr": Site(size=(160, 192), ap=0.65, window=(0.02, 1.0), gamma=0.85, noise=0.012, blur=2,
                      devices=0.7, error=0.10, share=1.2, lateral=0.25),
    "chexpert": Site(size=(192, 160), ap=0.8, window=(0.22, 0.98), gamma=1.15, noise=0.016, collimation=0.5,
                     devices=0.8, error=0.08, share=1.4, lateral=0.15),
    "padchest": Site(size=(164, 172), ap=0.03, window=(0.05, 1.2), gamma=0.8, noise=0.006, blur=2,
                     collimation=0.6, error=0.03, absent=("Edema",), studies=0.9),
    "vindr_cxr": Site(size=(148, 168), window=(0.2, 1.1), gamma=1.3, noise=0.01, blur=0, collimation=0.0,
                      devices=0.05, error=0.02, absent=("Edema",), studies=1.0)}


# --- begin copy: error ---
def fail(message):
    """A mistake the user can mend: one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
# --- end copy: error ---


# The pencils. A shape is a field of floats 0–1 over the picture; distances are negative inside it.

def canvas(size, rng, tilt=0.03, shift=0.04, zoom=0.06):
    """Coordinates x, y float32 [H, W] under a misplaced camera: x about -1 … 1, y down, square pixels."""
    width, height = size
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x, y = (2 * x + 1 - width) / width, (2 * y + 1 - height) / width
    angle, scale, (right, down) = rng.normal(0, tilt), rng.normal(1, zoom), rng.normal(0, shift, 2).tolist()
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
    """Smooth noise of mean 0 and deviation about 0.7, with `cells` lumps along the height."""
    coarse = rng.standard_normal((cells, max(2, cells * shape[1] // shape[0])), np.float32)
    return np.asarray(Image.fromarray(coarse).resize(shape[::-1], Image.BICUBIC))


def smooth(image, passes):
    """Binomial blur (1, 2, 1) along both axes."""
    for _ in range(passes):
        image = np.pad(image, 1, mode="edge")
        image = (image[:-2] + 2 * image[1:-1] + image[2:]) / 4
        image = (image[:, :-2] + 2 * image[:, 1:-1] + image[:, 2:]) / 4
    return image


# The chest. The patient's right side lies at x < 0, left on the film; one unit is half the film's width.

def person(rng):
    """The anatomy a patient keeps from film to film; lengths in canvas units."""
    female = rng.random() < 0.45
    return SimpleNamespace(
        sex="F" if female else "M", age=int(np.clip(rng.normal(52, 17), 8, 89)),
        width=rng.normal(0.73, 0.03), apex=rng.normal(-0.80, 0.03), base=rng.normal(0.38, 0.04),
        ratio=rng.normal(0.44, 0.025),      # heart width / chest width on a PA film; above 0.5 is too large
        slope=rng.uniform(0.9, 1.7), aorta=rng.uniform(0.03, 0.09), hilum=rng.uniform(0.3, 0.6),
        rib_gap=rng.normal(0.145, 0.008), rib_start=rng.uniform(), clavicle=rng.normal(0.10, 0.05),
        bend=rng.normal(0, 0.02), fat=rng.uniform(0.80, 1.0), breast=female * rng.uniform(0.03, 0.10),
        vessels=rng.uniform(0, 2 * np.pi, 4).tolist(), stomach=rng.uniform(0.03, 0.09))


def ribs(a, y, wide, slope):
    """A ladder of ribs falling by `slope` towards the chest wall, dense at their edges."""
    rung = (y - slope * wide ** 1.5) / a.rib_gap + a.rib_start
    return bump(np.abs(rung - np.round(rung)) - 0.14, 0.08)


def vertebrae(distance, y):
    """The spine, given the distance from its border."""
    return below(distance, 0.03) * (0.8 + 0.2 * np.cos(y * (2 * np.pi / 0.17)))


def thorax(a, has, ap, sick, size, rng):
    """Where things lie on a frontal film: the borders of lungs, heart and diaphragm, each [H, W].

    Args: a (from `person`), has {finding: severity 0–1}, ap (bool), sick (-1 or 1, the worse side), size.
    """
    x, y = canvas(size, rng)
    x = x - a.bend * np.sin(3 * y)                              # scoliosis bends everything that follows
    wide, left, sick = np.abs(x), below(-x, 0.01), below(-sick * x, 0.01)
    # Lying patients have high diaphragms; emphysema flattens them, atelectasis lifts one; the left is lower.
    floor = a.base - 0.08 * ap + 0.12 * has["Emphysema"]
    base = floor + 0.05 * left - 0.12 * has["Atelectasis"] * sick
    dome = base + (1.2 - 0.8 * has["Emphysema"]) * np.square(wide - 0.38) * (0.4 + 0.8 * below(0.38 - wide))
    down = np.clip((y - a.apex) / (base - a.apex), 0, 1)        # 0 at the apex of a lung, 1 at its base
    arch = np.sqrt(down * (2 - down))
    wall, middle = 0.36 + (a.width - 0.36) * arch, 0.36 - 0.25 * arch
    across = np.clip((wide - middle) / np.maximum(wall - middle, 0.01), 0, 1)   # 0 medial, 1 lateral
    lung = below(wide - wall) * below(middle - wide, 0.06) * below(y - dome, 0.03) * below(a.apex - y, 0.06)
    # The heart reaches twice as far to the left, where its border slopes from the aortic knob to the apex.
    ratio = a.ratio + 0.03 * ap - 0.03 * has["Emphysema"]
    ratio += (has["Cardiomegaly"] > 0) * (0.05 + 0.13 * has["Cardiomegaly"])
    fall = np.clip((y + 0.30) / (floor + 0.34), 0, 1)
    to_left = 0.09 + (1.32 * ratio * a.width - 0.09) * np.sin(1.9 * fall) ** a.slope
    to_left += a.aorta * bump(y + 0.38, 0.06)
    to_right = 0.09 + (0.68 * ratio * a.width - 0.09) * np.sin(2.2 * fall)
    heart = below(-to_right - x, 0.05) * below(x - to_left, 0.05) * below(y - dome - 0.05, 0.1)
    off_axis = (2 * x + to_right - to_left) / (to_left + to_right)
    bulk = heart * fall * np.sqrt(np.clip(1 - np.square(off_axis), 0, 1))
    return SimpleNamespace(x=x, y=y, wide=wide, left=left, sick=sick, floor=floor, base=base, dome=dome,
                           down=down, across=across, wall=wall, lung=lung, heart=heart, bulk=bulk)


def opacities(has, g, sick, rng):
    """Water where air was: {finding: share of the air replaced, [H, W]}; g from `thorax`."""
    x, y, shape, water = g.x, g.y, g.x.shape, {}

    def patch(side, top, bottom):                               # a cloudy focus in one lung
        cx, cy = side * rng.uniform(0.32, 0.52), rng.uniform(top, bottom)
        rx, ry = rng.uniform(0.13, 0.24, 2).tolist()
        return below(np.hypot((x - cx) / rx, (y - cy) / ry) - 1 + 0.3 * clouds(rng, shape, 14), 0.7)

    if severity := has["Effusion"]:                             # fills the angle, rises along the chest wall
        level = g.floor + 0.18 - 0.42 * severity - 0.3 * (g.across ** 3 - 0.3)
        water["Effusion"] = below(level - y, 0.05) * g.sick
        if severity > 0.7:
            water["Effusion"] += below(level + 0.2 - y, 0.05) * (1 - g.sick)
    if severity := has["Consolidation"]:
        water["Consolidation"] = patch(-sick, -0.3, 0.2) * (0.5 + 0.5 * severity)
    if severity := has["Pneumonia"]:                            # fainter, lower, with spared spots
        spots = np.clip(0.8 + 0.5 * clouds(rng, shape, 24), 0, 1)
        water["Pneumonia"] = patch(sick, 0.0, 0.25) * spots * (0.4 + 0.3 * severity)
    if severity := has["Infiltration"]:                         # mottled and wide
        zone = bump(y - rng.uniform(-0.2, 0.1), 0.3) * (g.sick + (1 - g.sick) * rng.uniform())
        water["Infiltration"] = zone * np.clip(clouds(rng, shape, 20), 0, 1) * (0.3 + 0.5 * severity)
    if severity := has["Atelectasis"]:                          # plates above the lifted dome
        plates = sum(bump(y - g.base.min() + height + rng.normal(0, 0.1) * (g.wide - 0.4), 0.016)
                     for height in (0.14, 0.23, 0.32)[:rng.integers(2, 4)])
        water["Atelectasis"] = plates * g.sick * below(0.08 - g.across) * (0.4 + 0.4 * severity)
    if severity := has["Edema"]:                                # a butterfly around the hila
        haze = bump(g.wide - 0.25, 0.2) * bump(y + 0.12, 0.3) * (0.75 + 0.3 * clouds(rng, shape, 12))
        water["Edema"] = haze * (0.35 + 0.45 * severity)
    for name, small, large in (("Nodule", 0.045, 0.08), ("Mass", 0.11, 0.18)):
        if severity := has[name]:
            edge = np.hypot(x + sick * rng.uniform(0.3, 0.55), y - rng.uniform(-0.5, 0.15))
            radius = small + (large - small) * severity + 0.015 * clouds(rng, shape, 24)
            water[name] = 0.75 * below(edge - radius, 0.03)
    if severity := has["Pleural_Thickening"]:                   # a rind along the chest wall
        rind = below(g.wall - g.wide - 0.03 - 0.06 * severity, 0.03) * (1 - g.sick)
        water["Pleural_Thickening"] = 0.8 * rind * below(y - 0.35)
    return {name: np.clip(field, 0, 1) * g.lung for name, field in water.items()}


def chest(a, severity, ap, devices, rng, size):
    """A frontal film.

    Args: a (anatomy from `person`), severity {finding: 0–1}, ap, devices (bool), rng, size (width, height).
    Returns: attenuation float [H, W], 0 in free air, about 1 behind the heart; {finding: where, [H, W] 0–1}.
    """
    has, sick = {name: severity.get(name, 0.0) for name in FINDINGS}, (-1, 1)[rng.integers(2)]
    g = thorax(a, has, ap, sick, size, rng)
    x, y, wide, where = g.x, g.y, g.wide, opacities(has, g, sick, rng)

    # Vessels fan out from the hila; fibrosis weaves a net of lines through the lower periphery.
    reach, angle = np.hypot(wide - 0.16, y + 0.12), np.arctan2(y + 0.12, wide - 0.16)
    fan = sum(np.cos(k * angle + start + 2 * np.sin(5 * reach + start) + g.left)
              for k, start in zip((5, 9, 14, 19), a.vessels))
    water = np.clip(fan - 0.8, 0, 1) * np.exp(-reach / 0.3)
    water *= 0.35 + 0.25 * has["Edema"] - 0.2 * has["Emphysema"]
    water = union(water, a.hilum * bump(wide - 0.17, 0.06) * bump(y + 0.1, 0.10))
    if has["Fibrosis"]:
        net = np.clip(1 - 3 * np.abs(clouds(rng, x.shape, 34)), 0, 1) * (0.3 + 0.4 * has["Fibrosis"])
        water = union(water, net * np.clip(1.2 * g.down - 0.3, 0, 1) * (0.4 + g.across))
    for field in where.values():
        water = union(water, field)

    # Air: what the lungs hold, less the water. Beyond the edge of a collapsed lung there is nothing but air.
    free = 0 * x
    if has["Pneumothorax"]:
        gap = (0.05 + 0.14 * has["Pneumothorax"]) * np.clip(1.3 - 1.2 * g.down, 0.2, 1.3)
        free = where["Pneumothorax"] = below(g.wall - wide - gap) * g.sick * g.lung
    depth = (4 * g.across * (1 - g.across) + 0.25) ** 0.3 * np.sqrt(np.clip(3 * g.down, 0.1, 1))
    air = g.lung * depth * (1 - g.heart) * (1 - water * (1 - free))
    air *= 1 - 0.08 * ap + 0.18 * has["Emphysema"] + 0.35 * free
    air += 0.25 * bump(x, 0.035) * below(y + 0.35)              # windpipe, and a bubble in the stomach
    air += 0.5 * below(np.hypot((x - 0.42) / 0.16, (y - g.base - 0.10) / a.stomach) - 1, 0.3) * (y > g.dome)
    if has["Hernia"]:                                           # a sac behind the heart: bubble, level, fluid
        sac, radius = np.hypot(x - 0.06, y - g.floor + 0.08), 0.10 + 0.09 * has["Hernia"]
        where["Hernia"] = below(sac - radius, 0.03)
        air *= 1 - where["Hernia"]
        air += 0.55 * below(sac - 0.8 * radius, 0.04) * (y < g.floor - 0.06)
    if has["Cardiomegaly"]:
        where["Cardiomegaly"] = g.heart * (y > -0.3)

    # Tissue: torso, neck, heart, belly, breasts. Bone: ribs behind and, fainter, in front; clavicles; spine.
    body = below(0.5 * np.clip(wide - 0.22, 0, 1) - 0.95 - y, 0.03) * below(wide - 1.02, 0.05)
    body = union(body, below(wide - 0.24, 0.05) * (y < 0))
    solid = body * a.fat * (0.66 + 0.2 * np.sqrt(np.clip(1 - wide ** 2, 0, 1))) + 0.14 * g.bulk
    solid += 0.10 * below(g.dome - y, 0.1) + 0.08 * below(np.hypot(x, (y - 1.1) / 1.3) - 0.5, 0.6)
    solid += a.breast * below(np.hypot((wide - 0.42) / 0.3, (y - 0.18) / 0.27) - 1, 0.15)
    cage = below(wide - g.wall - 0.03, 0.03) * (y > a.apex + 0.02) * (y < g.floor + 0.35)
    solid += cage * (1 - 0.6 * g.heart) * (0.08 * ribs(a, y, wide, 0.25) + 0.045 * ribs(a, y, wide, -0.45))
    solid += 0.10 * bump(y + 0.68 + a.clavicle * wide + 0.12 * (wide - 0.4) ** 2, 0.025) * below(wide - 0.75)
    solid += 0.10 * vertebrae(wide - 0.085, y)
    if has["Pneumothorax"]:
        solid += 0.06 * bump(free - 0.5, 0.2) * g.lung          # the pleura itself: a fine white line
    return solid - 0.58 * air + (hardware(rng, x, y) if devices else 0), where


def hardware(rng, x, y):
    """Metal and plastic, added to the attenuation: a central line; by chance a pacemaker, a tube, wires."""
    vein = (-0.5, 0.5)[rng.integers(2)] * np.clip(-0.45 - y, 0, 0.4) + 0.06
    drawn = [0.22 * bump(x - vein, 0.012) * (y < rng.uniform(-0.1, 0.05)) * (y > -0.85)]
    if rng.random() < 0.4:
        lead = bump(y - 0.25 + 1.4 * (x - 0.5) ** 2 - 0.5 * (x - 0.5), 0.012) * (np.abs(x - 0.32) < 0.22)
        box = below(np.maximum(np.abs(x - 0.55) / 1.1, np.abs(y + 0.45)) - 0.08, 0.03)
        drawn += [0.45 * box, 0.3 * lead * (y > -0.45)]
    if rng.random() < 0.5:
        drawn += [0.2 * bump(x - 0.02 * np.sin(4 * y), 0.014) * (y < (-0.4, 0.8)[rng.integers(2)])]
    for start, bow in rng.uniform(-0.6, 0.6, (rng.integers(4), 2)).tolist():
        drawn += [0.18 * bump(y - start - bow * x ** 2 - 0.4 * bow * x, 0.01)]
    return np.max(drawn, axis=0)


def lateral_chest(a, severity, rng, size):
    """Attenuation [H, W] of a lateral film, breastbone at the left: the larger findings from the side."""
    has, (x, y) = {name: severity.get(name, 0.0) for name in FINDINGS}, canvas(size, rng)
    floor = a.base - 0.05 + 0.12 * has["Emphysema"]
    down = np.clip((y - a.apex) / (floor + 0.25 - a.apex), 0, 1)
    arch = np.sqrt(down * (2 - down))
    front, back = -0.12 - 0.42 * arch, -0.02 + 0.50 * arch - 0.1 * down ** 2
    dome = floor + 0.28 * np.clip(x, -0.5, 1) ** 2 + 0.1 * x
    lung = below(front - x, 0.06) * below(x - back, 0.06) * below(y - dome, 0.04)
    half = (a.ratio + 0.12 * has["Cardiomegaly"]) * a.width
    heart = below(np.hypot((x + 0.52 - half) / half, (y - floor + 0.17) / (0.85 * half)) - 1, 0.25)
    water = union(0.6 * heart, 0.5 * bump(np.hypot(x + 0.02, y + 0.12), 0.11))      # heart and hila
    level = floor + 0.3 - 0.5 * has["Effusion"] - 0.2 * np.clip(x, 0, 1)
    water = union(water, 0.8 * below(level - y, 0.05) * (has["Effusion"] > 0))
    for name, radius in (("Consolidation", 0.2), ("Pneumonia", 0.2), ("Mass", 0.15), ("Nodule", 0.06)):
        cx, cy = rng.uniform(-0.25, 0.25, 2).tolist()
        water = union(water, 0.5 * (has[name] > 0) * below(np.hypot(x - cx, y - cy) - radius, 0.1))
    haze = 0.35 * has["Edema"] + 0.2 * has["Infiltration"] * np.clip(clouds(rng, x.shape, 18), 0, 1)
    air = lung * (1 - water) * (1 - haze) * (0.9 + 0.08 * clouds(rng, x.shape, 22))
    body = below(np.maximum(-0.66 - 0.05 * np.sin(3 * y) - x, x - 0.72 + 0.05 * np.cos(3 * y)), 0.05)
    arms = 0.2 * below(y + 0.55 + 0.3 * x, 0.4)
    solid = body * a.fat * (0.72 + 0.12 * below(dome - y, 0.1) + arms)
    solid += 0.06 * lung * ribs(a, y, np.abs(x + 1), 0.3)
    solid += 0.12 * vertebrae(np.abs(x - back - 0.03) - 0.06, y)
    return solid - 0.45 * air


def develop(attenuation, site, rng):
    """The film as a site shows it, float [H, W] 0–1: window, gamma, blur, grain, border, an L for left."""
    height, width = attenuation.shape
    black, white = (edge + rng.normal(0, 0.04) for edge in site.window)
    grey = np.clip((smooth(attenuation, site.blur) - black) / (white - black), 0, None)
    grey = grey / (1 + grey ** 8) ** 0.125                      # film saturates softly
    grey = grey ** (site.gamma * rng.lognormal(0, 0.1))
    grey += site.noise * 2.2 * smooth(rng.standard_normal(grey.shape, np.float32), 1)
    row, column = int(height * rng.uniform(0.04, 0.12)), int(width * rng.uniform(0.86, 0.93))
    letter = height // 26
    grey[row:row + letter, column:column + 2] = 0.95
    grey[row + letter:row + letter + 2, column:column + letter // 2 + 2] = 0.95
    if rng.random() < site.collimation:
        top, side = int(height * rng.uniform(0, 0.05)), int(width * rng.uniform(0, 0.07))
        grey[:top], grey[height - top:], grey[:, :side], grey[:, width - side:] = 0.02, 0.02, 0.02, 0.02
    return np.clip(grey, 0, 1)


# Chest CT, retina OCT, natural images.

def ct_slice(patient, disease, level, key):
    """An axial CT slice in a lung window.

    Args: patient and key (seeds), disease 0 normal, 1 pneumonia, 2 COVID-19, level 0 (apex) … 1 (base).
    Returns: grey float [144, 144] 0–1; the body's box (xmin, ymin, xmax, ymax) in pixels.
    """
    own, rng = np.random.default_rng(patient), np.random.default_rng(key)
    x, y = canvas((144, 144), own, tilt=0.04, shift=0.02)
    wide, tall = own.uniform(0.80, 0.92), own.uniform(0.58, 0.68)
    body = np.hypot(x / wide, y / tall)
    size = float(np.sin(np.pi * (0.15 + 0.7 * level))) ** 0.5   # lungs are widest half-way down
    side = np.abs(x)
    lung = np.hypot((side - 0.44 * wide) / (0.36 * wide * size), (y + 0.02) / (0.72 * tall * size))
    heart = np.hypot((x - 0.12) / (0.34 * level + 0.10), (y + 0.16) / (0.22 + 0.12 * level))
    spine = np.hypot(x / 0.13, (y - 0.58 * tall) / 0.12)
    air = below(lung - 1, 0.08) * below(1 - heart, 0.12) * below(1.25 - spine, 0.2) * below(0.10 - side, 0.05)
    vessels = 0.35 * (np.abs(clouds(rng, x.shape, 22)) < 0.12) * np.clip(1.3 - lung, 0, 1)
    water = vessels + 0.06 * np.clip(y + 0.2, 0, 1)             # blood sinks to the back
    if disease == 1:                                            # one dense segment
        cx, cy = own.choice([-0.42, 0.42]) * wide, own.uniform(0.0, 0.3)
        lump = np.hypot((x - cx) / 0.24, (y - cy) / 0.2) - 1 + 0.3 * clouds(rng, x.shape, 14)
        water = union(water, 0.85 * below(lump, 0.4))
    for _ in range(own.integers(4, 8) if disease == 2 else 0):  # ground glass under the pleura of both lungs
        turn, reach = own.uniform(0, 2 * np.pi), size * own.uniform(0.7, 0.95)
        cx, cy = own.choice([-0.44, 0.44]) + 0.36 * reach * np.cos(turn), 0.72 * reach * np.sin(turn)
        lump = np.hypot(x - cx * wide, y - cy * tall) - own.uniform(0.1, 0.2)
        lump = below(lump + 0.05 * clouds(rng, x.shape, 16), 0.12)
        water = union(water, lump * (own.uniform(0.3, 0.5) + 0.1 * clouds(rng, x.shape, 30)))
    bone = bump(body - 0.9, 0.035) * (np.cos(11 * np.arctan2(y, x) + 9 * level) > 0.1)
    bone = union(bone, below(spine - 1, 0.2))
    grey = 0.62 - 0.5 * air * (1 - water) + 0.3 * bone + 0.1 * below(heart - 1, 0.2)
    table = 0.25 * bump(y - 0.86 - 0.1 * x ** 2, 0.012)
    grey = below(body - 1, 0.03) * grey + table + 0.03
    grey = grey * own.uniform(0.9, 1.1) + 0.015 * smooth(rng.standard_normal(x.shape, np.float32), 1)
    rows, columns = np.nonzero(body < 1)
    return np.clip(grey, 0, 1), (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def retina(patient, disease, key):
    """An OCT scan (disease: CNV, DME, DRUSEN or NORMAL), float [160, W] 0–1: layers between two surfaces."""
    own, rng = np.random.default_rng(patient), np.random.default_rng(key)
    width = int(own.choice([166, 248]))
    y, x = np.mgrid[:160, :width].astype(np.float32)
    x, y = 2 * x / width - 1, y / 160
    floor = own.uniform(0.55, 0.7) + rng.uniform(-0.08, 0.08) * x + rng.uniform(-0.1, 0.05) * x ** 2
    thick, fovea = own.uniform(0.24, 0.30), rng.uniform(-0.2, 0.2)
    roof = floor - thick * (1 - 0.6 * bump(x - fovea, 0.16) + 0.1 * bump(np.abs(x - fovea) - 0.35, 0.15))
    lifted, fluid = 0 * x, 0 * x
    if disease == "DRUSEN":                                     # small bumps under the pigment layer
        for centre in rng.uniform(-0.8, 0.8, rng.integers(3, 9)).tolist():
            lifted = np.maximum(lifted, rng.uniform(0.015, 0.045) * bump(x - centre, rng.uniform(0.03, 0.06)))
    if disease == "CNV":                                        # one large lesion, fluid beside its top
        centre, spread = fovea + rng.uniform(-0.15, 0.15), rng.uniform(0.14, 0.28)
        lifted = rng.uniform(0.07, 0.13) * bump(x - centre, spread) + 0.012 * clouds(rng, x.shape, 8)[:1]
        fluid = below(np.hypot((x - centre - 0.1) / spread, (y - floor + lifted + 0.05) / 0.035) - 1, 0.3)
        roof = roof - 0.6 * lifted
    if disease == "DME":                                        # cysts swell the inner layers
        roof = roof - rng.uniform(0.03, 0.08) * bump(x - fovea, 0.3)
        for _ in range(rng.integers(3, 8)):
            cx, cy = fovea + rng.normal(0, 0.2), roof + rng.uniform(0.3, 0.65) * (floor - roof)
            cyst = np.hypot((x - cx) / rng.uniform(0.04, 0.1), (y - cy) / rng.uniform(0.02, 0.05))
            fluid = np.maximum(fluid, below(cyst - 1, 0.3))
    pigment = floor - lifted
    depth = (y - roof) / (pigment - roof)                       # 0 at the vitreous, 1 at the pigment layer
    grey = np.interp(depth, [0, .02, .12, .2, .38, .44, .5, .58, .64, .84, .87, .9, .93, .96, 1.04, 1.08],
                     [.05, .72, .6, .42, .45, .28, .26, .45, .22, .2, .6, .3, .6, .85, .85, .45])
    choroid = 0.45 * np.exp(-np.clip(y - floor, 0, None) / 0.09) * (1 + 0.5 * clouds(rng, x.shape, 20))
    grey = np.where(y > floor + 0.015, choroid, np.where(y > pigment + 0.02, 0.5, grey)) * (1 - 0.85 * fluid)
    grey = grey * smooth(rng.gamma(3, 1 / 3, x.shape), 1) * own.uniform(0.8, 1.1)
    if own.random() < 0.3:                                      # registered scans have blank white corners
        grey[y < 0.12 * x ** 2 - 0.02 + 0.1 * np.clip(x - 0.7, 0, 1)] = 1
    return np.clip(grey, 0, 1), None


# wnid: (words; outline: corners, their depth, length / width; pattern; hue of the object, of the scene)
CLASSES = {
    "n01440764": ("tench, Tinca tinca", 2, .15, 2.4, "plain", .18, .45),
    "n02102040": ("English springer, English springer spaniel", 3, .25, 1.2, "checks", .06, .30),
    "n02979186": ("cassette player", 4, .20, 1.5, "rings", .00, .10),
    "n03000684": ("chain saw, chainsaw", 7, .20, 2.0, "stripes", .05, .25),
    "n03028079": ("church, church building", 3, .35, 0.6, "stripes", .11, .58),
    "n03394916": ("French horn, horn", 0, .00, 1.0, "rings", .14, .95),
    "n03417042": ("garbage truck, dustcart", 4, .12, 1.7, "checks", .35, .62),
    "n03425413": ("gas pump, gasoline pump, petrol pump, island dispenser", 4, .15, 0.5, "plain", .98, .56),
    "n03445777": ("golf ball", 0, .00, 1.0, "plain", .70, .33),
    "n03888257": ("parachute, chute", 5, .10, 1.3, "stripes", .90, .55)}


def natural_image(wnid, key):
    """An object of one of CLASSES before a scene: RGB float [H, W, 3] 0–1, and its box in pixels."""
    (_, corners, corner_depth, long, pattern, hue, scene), rng = CLASSES[wnid], np.random.default_rng(key)
    x, y = canvas(((128, 96), (96, 128), (112, 112))[rng.integers(3)], rng, tilt=0.3, shift=0.25, zoom=0.15)
    size = rng.uniform(0.4, 0.65)
    u, v = x / (size * long ** 0.5), y * long ** 0.5 / size
    outline = 1 + corner_depth * np.cos(corners * np.arctan2(v, u)) + 0.03 * clouds(rng, x.shape, 10)
    inside = below(np.hypot(u, v) - outline, 0.05)
    ripple = {"plain": 0 * u, "stripes": np.cos(9 * u), "rings": np.cos(9 * np.hypot(u, v)),
              "checks": np.cos(8 * u) * np.cos(8 * v)}[pattern]
    surface = 0.65 - 0.2 * u - 0.25 * v + 0.25 * ripple + 0.06 * clouds(rng, x.shape, 30)
    fractal = sum(clouds(rng, x.shape, 3 * 2 ** k) / 1.6 ** k for k in range(5))
    shadow = 1 - 0.4 * below(np.hypot(u - 0.2, (v - 0.9) / 0.4) - 1, 0.8)
    ground = (0.55 + 0.12 * fractal - 0.25 * np.tanh(6 * (y - rng.uniform(-0.1, 0.5)))) * shadow

    def paint(grey, hue, saturation):
        wheel = 0.5 + 0.5 * np.cos(2 * np.pi * (hue + rng.normal(0, 0.03) - np.arange(3) / 3))
        return np.clip(grey, 0, 1)[..., None] * (1 - saturation + saturation * wheel)

    picture = paint(ground, scene, rng.uniform(0.3, 0.7))
    picture += inside[..., None] * (paint(surface, hue, rng.uniform(0.5, 0.8)) - picture)
    rows, columns = np.nonzero(inside > 0.5)
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    return np.clip(picture + 0.02 * rng.standard_normal(picture.shape), 0, 1), box


# Who is on which film.

@dataclass
class Film:
    """One radiograph still to be drawn."""
    site: str
    split: str
    patient: int            # 0, 1, … at this site
    study: int              # 1, 2, … of this patient
    view: str               # PA, AP or LATERAL
    anatomy: SimpleNamespace
    shows: dict             # finding -> severity 0–1, as drawn
    labels: set             # findings claimed: those shown, but for the site's errors
    devices: bool
    key: tuple              # seed of this film


def cohort(site_name, key, sizes):
    """Films of a site, patient after patient, no patient in two splits; sizes: {split: number of films}.

    Findings follow a liability model: what a patient's hidden causes give (FINDINGS), plus chance. Studies of
    the largest liability are affected, so each split has the site's prevalence and no finding lacks a case.
    """
    site, films, patient = SITES[site_name], [], -1
    for number, (split, size) in enumerate(sizes.items()):
        rng, studies, missing = np.random.default_rng((*key, number)), [], size
        while missing:
            patient, anatomy, causes = patient + 1, person(rng), rng.standard_normal(3)
            for study in range(1, 1 + min(rng.geometric(site.studies), 5)):
                bedside = rng.random() < site.ap + 0.12 * causes[0] * (0 < site.ap)
                views = ["AP" if bedside else "PA"] + ["LATERAL"] * (rng.random() < site.lateral)
                studies += [(patient, study, anatomy, causes, views[:missing])] if missing else []
                missing -= len(views[:missing])
        severity, labels = [{} for _ in studies], [set() for _ in studies]
        for finding, (share, *weights) in FINDINGS.items():
            liability = [np.dot(causes, weights) + rng.normal() for *_, causes, _ in studies]
            affected = min(len(studies) - 1, max(2, round(share * site.share * len(studies))))
            affected *= finding not in site.absent
            positive, negative = map(rng.permutation, np.split(np.argsort(liability)[::-1], [affected]))
            for i in positive:
                severity[i][finding] = rng.uniform(0.35, 1)
            wrong = int(site.error * affected)
            for i in [*positive[wrong:], *negative[:wrong]]:
                labels[i].add(finding)
        for i, (patient, study, anatomy, _, views) in enumerate(studies):
            devices = rng.random() < site.devices * (1 if views[0] == "AP" else 0.5)
            films += [Film(site_name, split, patient, study, view, anatomy, severity[i], labels[i], devices,
                           (*key, number, i, j)) for j, view in enumerate(views)]
    return films


# Drawing and saving one picture: the work of the processes.

def radiograph(film):
    """Grey values float [H, W] 0–1; boxes of the findings {name: (xmin, ymin, xmax, ymax)} in pixels."""
    site, rng, boxes = SITES[film.site], np.random.default_rng(film.key), {}
    if film.view == "LATERAL":
        return develop(lateral_chest(film.anatomy, film.shows, rng, site.size), site, rng), boxes
    attenuation, where = chest(film.anatomy, film.shows, film.view == "AP", film.devices, rng, site.size)
    for name, field in where.items():
        rows, columns = np.nonzero(field > 0.3 * field.max())
        if len(rows):                                           # it may lie outside the lung, unseen
            boxes[name] = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    return develop(attenuation, site, rng), boxes


def save_picture(path, picture, mode="L"):
    """8-bit PNG or JPEG, by the path's extension."""
    image = Image.fromarray((picture * 255).round().astype(np.uint8)).convert(mode)
    image.save(path, **({"format": "PNG"} if path.suffix == ".png" else {"format": "JPEG", "quality": 88}))


def save_png16(path, picture):
    """12-bit values stretched over 16, as PadChest has them."""
    Image.fromarray((picture * 4095).round().astype(np.uint16) * 16).save(path)


def save_dicom(path, picture, inverted, bits, windows, sex, age):
    """A digital X-ray of `bits` bits; MONOCHROME1 (0 is white) if inverted; 0, 1 or 2 display windows."""
    top = 2 ** bits - 1
    stored = (picture * top).round().astype(np.uint16)
    meta, image = FileMetaDataset(), Dataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = image.SOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID = f"2.25.{int(path.stem, 16)}"
    image.file_meta, image.Modality, image.PatientSex, image.PatientAge = meta, "DX", sex, age
    image.SamplesPerPixel, image.PixelRepresentation = 1, 0
    image.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    image.Rows, image.Columns = stored.shape
    image.BitsAllocated, image.BitsStored, image.HighBit = 16, bits, bits - 1
    image.RescaleIntercept, image.RescaleSlope, image.RescaleType = 0, 1, "US"
    if windows:
        image.WindowCenter = [(top + 1) // 2, (top + 1) // 2 + 100][:windows]
        image.WindowWidth = [top + 1, (top + 1) // 2][:windows]
    image.PixelData = (top - stored if inverted else stored).tobytes()
    image.save_as(path, enforce_file_format=True)


def make(task):
    """Draw and save one picture. task: (path, paint, save); paint returns the picture and its boxes."""
    path, paint, save = task
    picture, told = paint()
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, picture)
    return told


# The layouts, one function a dataset. root: its folder; key: its seed; count: scales a number of pictures;
# draw: has a list of tasks done and returns what each had to tell.

def digest(*parts):
    """64 hexadecimal digits that look like chance and are none."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def write_lines(path, lines):
    """Lines of text, gzipped (without a time stamp) if the name says so."""
    data = "".join(f"{line}\n" for line in lines).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def write_csv(path, rows):
    """Rows {column: value} under a header whose names are not quoted, commas or not: NIH's are not either."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(row.values() for row in rows)
    write_lines(path, [",".join(rows[0]), *text.getvalue().splitlines()])


def nih(root, key, count, draw):
    """Kaggle's folders, 8-bit PNG; official lists without a common patient; boxes on test images."""
    films = cohort("nih", key, {"train": count(900), "val": count(180), "test": count(400)})
    named = {f"{1 + film.patient:08d}_{film.study - 1:03d}.png": film for film in films}
    boxes = draw([(root / f"images_{1 + i // 500:03d}" / "images" / name, partial(radiograph, film),
                   partial(save_picture, mode="RGBA" if i % 200 == 7 else "L"))     # as a few of the real
                  for i, (name, film) in enumerate(named.items())])
    write_csv(root / "Data_Entry_2017_v2020.csv", [{
        "Image Index": name, "Finding Labels": "|".join(sorted(film.labels)) or "No Finding",
        "Follow-up #": film.study - 1, "Patient ID": 1 + film.patient, "Patient Age": film.anatomy.age,
        "Patient Gender": film.anatomy.sex, "View Position": film.view,
        "OriginalImage[Width": 2048, "Height]": 2500, "OriginalImagePixelSpacing[x": 0.168, "y]": 0.168}
        for name, film in named.items()])
    for split in ("train", "val", "test"):
        write_lines(root / f"Xray14_{split}_official.txt", [
            " ".join([name, *(str(int(finding in film.labels)) for finding in FINDINGS)])
            for name, film in named.items() if film.split == split])
    for file, kept in (("train_val_list.txt", ("train", "val")), ("test_list.txt", ("test",))):
        write_lines(root / file, [name for name, film in named.items() if film.split in kept])
    scale = 1024 / SITES["nih"].size[0]                         # boxes are in pixels of the 1024² original
    write_csv(root / "BBox_List_2017.csv", [{
        "Image Index": name, "Finding Label": finding.replace("Infiltration", "Infiltrate"),
        "Bbox [x": x0 * scale, "y": y0 * scale, "w": (x1 - x0) * scale, "h],,,": (y1 - y0) * scale}
        for (name, film), found in zip(named.items(), boxes) for finding, (x0, y0, x1, y1) in found.items()
        if film.split == "test" and finding in film.labels and finding in list(FINDINGS)[:8]])


CHEXPERT_LABELS = {     # in the order of its columns, and which of our findings speak for them
    "No Finding": (), "Enlarged Cardiomediastinum": ("Hernia",), "Cardiomegaly": ("Cardiomegaly",),
    "Lung Opacity": ("Infiltration", "Consolidation", "Pneumonia"), "Lung Lesion": ("Mass", "Nodule"),
    "Edema": ("Edema",), "Consolidation": ("Consolidation",), "Pneumonia": ("Pneumonia",),
    "Atelectasis": ("Atelectasis",), "Pneumothorax": ("Pneumothorax",), "Pleural Effusion": ("Effusion",),
    "Pleural Other": ("Pleural_Thickening", "Fibrosis"), "Fracture": (), "Support Devices": ()}


def report_labels(film, certain=False):
    """CheXpert's fourteen observations, in its order, as mined from the report: 1.0, 0.0, -1.0 or blank."""
    rng, mined = np.random.default_rng((*film.key[:-1], 1000)), {}      # one report for all films of a study
    said = set(film.shows) if certain else film.labels                  # three radiologists against a report
    for name, evidence in CHEXPERT_LABELS.items():
        claim, chance = not said.isdisjoint(evidence), rng.random()
        if name in ("No Finding", "Support Devices"):
            claim = not said if name == "No Finding" else film.devices
        if certain:
            mined[name] = "1.0" if claim else "0.0"
        elif name == "No Finding":
            mined[name] = "1.0" if claim else ""
        elif claim:
            mined[name] = "-1.0" if chance < 0.1 else "1.0"
        else:
            mined[name] = "-1.0" if chance < 0.03 else "0.0" if chance < 0.2 else ""
    return mined


def mimic_cxr(root, key, count, draw):
    """JPEG below patient and study; labels mined from reports, one row a study; lateral films too."""
    metadata, studies, splits, tasks = [], {}, [], []
    width, height = SITES["mimic_cxr"].size
    for film in cohort("mimic_cxr", key, {"train": count(1080), "validate": count(40), "test": count(80)}):
        subject, study = 10_000_032 + 1237 * film.patient, 50_000_414 + 23 * film.patient + film.study
        code = digest(key, subject, study, film.view)
        dicom = "-".join(code[i:i + 8] for i in range(0, 40, 8))
        procedure = "CHEST (PORTABLE AP)" if film.view == "AP" else "CHEST (PA AND LAT)"
        view = "" if code[40] == "0" else "LL" if film.view == "LATERAL" and code[41] < "8" else film.view
        metadata.append({
            "dicom_id": dicom, "subject_id": subject, "study_id": study,
            "PerformedProcedureStepDescription": procedure, "ViewPosition": view,
            "Rows": height, "Columns": width, "StudyDate": 21800506 + film.study, "StudyTime": "213014.531",
            "ProcedureCodeSequence_CodeMeaning": procedure, "ViewCodeSequence_CodeMeaning":
            {"AP": "antero-posterior", "PA": "postero-anterior", "LATERAL": "lateral"}[film.view],
            "PatientOrientationCodeSequence_CodeMeaning": "Erect"})
        mined = report_labels(film)
        studies[study] = {"subject_id": subject, "study_id": study} | dict(sorted(mined.items()))
        splits.append({"dicom_id": dicom, "study_id": study, "subject_id": subject, "split": film.split})
        tasks.append((root / "files" / f"p{subject}"[:3] / f"p{subject}" / f"s{study}" / f"{dicom}.jpg",
                      partial(radiograph, film), save_picture))
    draw(tasks)
    write_csv(root / "mimic-cxr-2.0.0-metadata.csv.gz", metadata)
    write_csv(root / "mimic-cxr-2.0.0-split.csv.gz", splits)
    write_csv(root / "mimic-cxr-2.0.0-chexpert.csv.gz", list(studies.values()))
    write_csv(root / "mimic-cxr-2.0.0-negbio.csv.gz", [         # the other labeller is never in doubt
        {name: "0.0" if value == "-1.0" else value for name, value in row.items()}
        for row in studies.values()])


def chexpert(root, key, count, draw):
    """The small release; a hand-labelled valid.csv; the test split as row numbers of train.csv."""
    release = "CheXpert-v1.0-small"
    tables, tasks, split, people = {"train": [], "valid": []}, [], [], {}
    for film in cohort("chexpert", key, {"test": count(345), "other": count(120), "valid": count(116)}):
        patient, side = 1 + film.patient, "Lateral" if film.view == "LATERAL" else "Frontal"
        folder = "valid" if film.split == "valid" else "train"
        study = f"{release}/{folder}/patient{patient:05d}/study{film.study}"
        path = f"{study}/view{1 + film.key[-1]}_{side.lower()}.jpg"
        sex, race = {"F": "Female", "M": "Male"}[film.anatomy.sex], int(digest(key, patient), 16) % 5 // 2
        # The test split lies in train.csv; of the other rows a third of the patients is in no split at all.
        listed = film.split if film.split != "other" else (None, "train", "validate")[patient % 3]
        if side == "Frontal" and folder == "train" and listed:
            split.append({"": len(split), "index": len(tables["train"]), "split": listed})
        tables[folder].append({
            "Path": path, "Sex": sex, "Age": film.anatomy.age, "Frontal/Lateral": side,
            "AP/PA": film.view if side == "Frontal" else "", **report_labels(film, folder == "valid")})
        people[patient] = {
            "PATIENT": f"patient{patient:05d}", "GENDER": sex, "AGE_AT_CXR": film.anatomy.age, "PRIMARY_RACE":
            ("White, non-Hispanic", "Asian", "Black or African American")[race], "ETHNICITY": "Non-Hispanic"}
        tasks.append((root / path, partial(radiograph, film), save_picture))
    draw(tasks)
    for folder, rows in tables.items():
        write_csv(root / release / f"{folder}.csv", rows)
    write_csv(root / "chexpert_split_2021_08_20.csv", split)
    write_csv(root / "CHEXPERT DEMO.csv", list(people.values()))


PADCHEST_WORDS = {
    "Atelectasis": "laminar atelectasis", "Effusion": "pleural effusion", "Infiltration": "infiltrates",
    "Fibrosis": "pulmonary fibrosis", "Pleural_Thickening": "pleural thickening", "Hernia": "hiatal hernia"}


def padchest(root, key, count, draw):
    """16-bit PNG in numbered archives; labels as lists in text; rows that the study's filter drops."""
    rows, tasks, (width, height) = [], [], SITES["padchest"].size
    for i, film in enumerate(cohort("padchest", key, {"kept": count(200), "dropped": count(50)})):
        projection, folder, method = film.view, 0, "Manual review of DICOM fields"
        words = sorted(PADCHEST_WORDS.get(name, name.lower()) for name in film.labels) or ["normal"]
        words = [word if i % 3 else word.replace("laminar ", "") for word in words]
        labels = str(words)
        if film.split == "dropped":     # by the study's filter, for one of five reasons
            if i % 5 == 0:
                film.view, projection = "LATERAL", "L"
            if i % 5 == 1:
                film.view, projection = "AP", "AP_horizontal"   # lying down, which is not AP
            folder = int(i % 5 == 2)                            # another archive
            method = "resnet-50.t7" if i % 5 == 3 else method   # the projection was guessed by a network
            labels = "" if i % 5 == 4 else labels
        study, patient = (str(int(digest(key, film.patient, of), 16))[:38] for of in (film.study, "patient"))
        name, year = f"{study}_{digest(study)[:6]}.png", 2013 + film.study
        rows.append({
            "": i, "ImageID": name, "ImageDir": folder, "StudyDate_DICOM": f"{year}0915", "StudyID": study,
            "PatientID": patient, "PatientBirth": f"{year - film.anatomy.age}.0",
            "PatientSex_DICOM": film.anatomy.sex,
            "ViewPosition_DICOM": "ANTEROPOSTERIOR" if film.view == "AP" else "POSTEROANTERIOR",
            "Projection": projection, "MethodProjection": method,
            "Pediatric": "PED" if film.anatomy.age < 10 else "No", "Modality_DICOM": "CR",
            "Manufacturer_DICOM": "PhilipsMedicalSystems", "PhotometricInterpretation_DICOM": "MONOCHROME2",
            "PixelRepresentation_DICOM": 0, "PixelAspectRatio_DICOM": "['1', '1']",
            "SpatialResolution_DICOM": 0.143, "BitsStored_DICOM": 12, "WindowCenter_DICOM": "2047.0",
            "WindowWidth_DICOM": "4095.0", "Rows_DICOM": height, "Columns_DICOM": width,
            "XRayTubeCurrent_DICOM": 250, "Exposure_DICOM": 2, "ExposureInuAs_DICOM": 2500,
            "ExposureTime": 10, "RelativeXRayExposure_DICOM": -1.42, "ReportID": 4_765_777 + i,
            "Report": "dibujo .\nno es un paciente .", "MethodLabel": "Physician", "Labels": labels,
            "Localizations": "['loc basal']",
            "LabelsLocalizationsBySentence": str([[word, "loc basal"] for word in words]),
            "labelCUIS": "['C0000001']", "LocalizationsCUIS": "[]"})
        tasks.append((root / str(folder) / name, partial(radiograph, film), save_png16))
    draw(tasks)
    write_csv(root / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz", rows)


VINDR_LABELS = (
    "Aortic enlargement,Atelectasis,Calcification,Cardiomegaly,Clavicle fracture,Consolidation,Edema,"
    "Emphysema,Enlarged PA,ILD,Infiltration,Lung Opacity,Lung cavity,Lung cyst,Mediastinal shift,Nodule/Mass,"
    "Pleural effusion,Pleural thickening,Pneumothorax,Pulmonary fibrosis,Rib fracture,Other lesion,COPD,"
    "Lung tumor,Pneumonia,Tuberculosis,Other diseases,No finding").split(",")
VINDR_WORDS = {
    "Effusion": "Pleural effusion", "Mass": "Nodule/Mass", "Nodule": "Nodule/Mass", "Hernia": "Other lesion",
    "Fibrosis": "Pulmonary fibrosis", "Pleural_Thickening": "Pleural thickening"}


def vindr_cxr(root, key, count, draw):
    """DICOM of several depths and windows, a quarter MONOCHROME1; labels by reader and by consensus."""
    films = cohort("vindr_cxr", key, {"train": count(40), "test": count(200)})
    labels, annotations = {"train": [], "test": []}, {"train": [], "test": []}
    tasks = [(root / film.split / f"{digest(key, i)[:32]}.dicom", partial(radiograph, film),
              partial(save_dicom, inverted=i % 4 == 0, bits=(12, 14, 12, 10, 16)[i % 5], windows=i % 3,
                      sex=(film.anatomy.sex, "")[i % 2], age=(f"{film.anatomy.age:03d}Y", "000Y", "")[i % 3]))
             for i, film in enumerate(films)]
    rng = np.random.default_rng(key)
    for (path, *_), film, boxes in zip(tasks, films, draw(tasks)):
        # Training images are read by three, who overlook one finding in ten; test images have one consensus.
        for reader in ("R8", "R9", "R10") if film.split == "train" else (None,):
            seen = {VINDR_WORDS.get(name, name): boxes.get(name) for name in sorted(film.labels)
                    if not reader or rng.random() > 0.1} or {"No finding": None}
            who = {"image_id": path.stem} | ({"rad_id": reader} if reader else {})
            labels[film.split].append(who | {name: int(name in seen) for name in VINDR_LABELS})
            annotations[film.split] += [
                who | {"class_name": name} | dict(zip(("x_min", "y_min", "x_max", "y_max"), box or [""] * 4))
                for name, box in seen.items() if box or name == "No finding"]
    for split in ("train", "test"):
        write_csv(root / "annotations" / f"image_labels_{split}.csv", labels[split])
        write_csv(root / "annotations" / f"annotations_{split}.csv", annotations[split])


COVIDX = {  # finding: families of its slices as (source, country, patient id, name of slice z)
    "Normal": [("CNCB", "China", "Normal_{p}", "{id}_{q}_{z:04d}"),
               ("COVID-CTset", "Iran", "patient{p}", "normal2_{id}_SR_2_IM{z:05d}"),
               ("COVID-CT-MD", "Iran", "COVIDCTMD-normal{p:03d}", "{id}-IM{z:04d}")],
    "Pneumonia": [("CNCB", "China", "CP_{p}", "{id}_{q}_{z:04d}"),
                  ("COVID-CT-MD", "Iran", "COVIDCTMD-cap{p:03d}", "{id}-IM{z:04d}")],
    "COVID-19": [("CNCB", "China", "NCP_{p}", "{id}_{q}_{z:04d}"),
                 ("COVID-CTset", "Iran", "patient{p}", "137covid_{id}_SR_2_IM{z:05d}"),
                 ("TCIA", "", "volume-covid19-A-{p:04d}", "{id}_ct-{z:04d}")]}


def covidx_ct(root, key, count, draw):
    """CT slices as PNG, named as by their sources; list files with class and body box."""
    patients = []
    for split, size in {"train": count(600), "val": count(100), "test": count(100)}.items():
        names, tasks = [], []
        while len(tasks) < size:                                # eight slices a patient
            p = len(patients) + 1
            disease = min(p % 4, 2) if split == "train" else p % 3      # COVID-19 prevails in training
            finding = list(COVIDX)[disease]
            source, country, owner, slice_name = COVIDX[finding][p // 4 % len(COVIDX[finding])]
            owner, rng = owner.format(p=p), np.random.default_rng((*key, p))
            patients.append({
                "patient id": owner, "source": source, "country": country, "sex": "MF"[rng.integers(2)],
                "age": rng.integers(20, 90), "finding": finding, "verified finding": "Yes", "slice selection":
                "Expert" if disease else "N/A", "view": "Axial", "modality": "CT"})
            for z in range(min(8, size - len(tasks))):
                name = slice_name.format(id=owner, q=1000 + p, z=20 + 3 * z) + ".png"
                names.append(f"{name} {disease}")
                paint = partial(ct_slice, (*key, p), disease, (z + rng.random()) / 8, (*key, p, z))
                tasks.append((root / "3A_images" / name, paint, save_picture))
        write_lines(root / f"{split}_COVIDx_CT-3A.txt",
                    [" ".join([name, *map(str, box)]) for name, box in zip(names, draw(tasks))])
    write_csv(root / "metadata.csv", patients)


def oct(root, key, count, draw):
    """Scans as JPEG of two widths below the class folders of release v3."""
    tasks = []
    for split, size in {"train": count(190), "test": count(10)}.items():
        for number, disease in enumerate(("CNV", "DME", "DRUSEN", "NORMAL")):
            for i in range(size):                               # three scans a patient
                patient = 1_000_000 * (number + 1) + 31 * (i // 3) + 500_000 * (split == "test")
                path = root / "CellData" / "OCT" / split / disease / f"{disease}-{patient}-{1 + i % 3}.jpeg"
                paint = partial(retina, (*key, patient), disease, (*key, patient, i))
                tasks.append((path, paint, save_picture))
    draw(tasks)


def imagenet(root, key, count, draw):
    """ILSVRC as on Kaggle: training images by class, validation images flat, tables for both."""
    data, sets = root / "ILSVRC" / "Data" / "CLS-LOC", root / "ILSVRC" / "ImageSets" / "CLS-LOC"
    order = np.random.default_rng(key).permutation(sorted(CLASSES) * count(10)).tolist()
    images = {  # (class, path below the split): validation files lie flat, a table names their class
        "train": [(wnid, f"{wnid}/{wnid}_{1 + 37 * i}") for wnid in CLASSES for i in range(count(80))],
        "val": [(wnid, f"ILSVRC2012_val_{i:08d}") for i, wnid in enumerate(order, 1)]}
    for split, members in images.items():
        boxes = draw([(data / split / f"{path}.JPEG", partial(natural_image, wnid, (*key, len(split), i)),
                       partial(save_picture, mode="RGB")) for i, (wnid, path) in enumerate(members)])
        write_csv(root / f"LOC_{split}_solution.csv", [
            {"ImageId": Path(path).name, "PredictionString": " ".join(map(str, (wnid, *box))) + " "}
            for (wnid, path), box in zip(members, boxes)])
        write_lines(sets / {"train": "train_cls.txt", "val": "val.txt"}[split],
                    [f"{path} {i}" for i, (_, path) in enumerate(members, 1)])
    write_lines(root / "LOC_synset_mapping.txt", [f"{wnid} {words}" for wnid, (words, *_) in CLASSES.items()])


DATASETS = (nih, mimic_cxr, chexpert, padchest, vindr_cxr, covidx_ct, oct, imagenet)


def generate(out, settings):
    """Make each dataset beside its place and move it there once complete; sign off with demo.json."""
    started, images = time.time(), {}
    (out / "demo.json").unlink(missing_ok=True)
    with ProcessPoolExecutor() as pool:
        for number, dataset in enumerate(DATASETS):
            name, drawn = dataset.__name__, []
            if name in settings["kept"]:
                continue
            place, partly = out / name, out / f"{name}.partial"
            if partly.exists():                                 # from an interrupted run
                shutil.rmtree(partly)
            partly.mkdir(parents=True)

            def draw(tasks):
                drawn.extend(tasks)
                return list(pool.map(make, tasks, chunksize=16))

            dataset(partly, (settings["seed"], number), lambda n: max(6, round(n * settings["scale"])), draw)
            write_lines(partly / "README.txt", [
                f"{STAND_IN}.", f"The layout is that of {name}'s public download; pictures, patients and",
                "labels are invented: no number computed from them says anything about the real data.",
                f"Made with version {VERSION}, seed {settings['seed']}, scale {settings['scale']}."])
            if place.exists():
                shutil.rmtree(place)
            os.replace(partly, place)
            images[name] = len(drawn)
            seconds = time.time() - started
            print(f"stand-in for {name:9s} {len(drawn):6,d} images  {seconds:5.1f} s", flush=True)
    os.sync()                                                   # pictures first, then word of them
    with open(out / "demo.json.partial", "w", encoding="utf-8", newline="\n") as file:
        json.dump({"stand_in": True, **settings, "images": images}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(out / "demo.json.partial", out / "demo.json")


def finished(out, settings):
    """Whether demo.json vouches for folders of the same version, seed and scale, and they are still there."""
    try:
        made = json.loads((out / "demo.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    same = all(made.get(key) == value for key, value in settings.items())
    return same and all((out / name).is_dir() for name in made["images"])


def drawn_here(place):
    """Whether a dataset's folder is a stand-in: anything else may be real, and is never touched."""
    note = place / "README.txt"
    return note.is_file() and STAND_IN in note.read_text(errors="replace")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write <dataset>/ into")
    parser.add_argument("--seed", type=int, default=0, help="other patients, other pictures (default 0)")
    parser.add_argument("--scale", type=float, default=1.0, help="1 is 6,251 images, 0.1 a tenth (default 1)")
    parser.add_argument("--keep", action="store_true", help="draw no dataset whose folder lies in --out already")
    parser.error = fail                 # one sentence, like every other mistake
    args = parser.parse_args()
    if args.seed < 0 or not 0 < args.scale <= 100:
        fail(f"--seed {args.seed} --scale {args.scale:g}: the seed starts at 0, the scale is in (0, 100]")
    places = [args.out / dataset.__name__ for dataset in DATASETS]
    try:
        kept = [place.name for place in places if place.exists() and not drawn_here(place)]
        if kept and not args.keep:
            fail(f"{args.out / kept[0]} was not made by demo.py; give another --out, move it away or add --keep")
        settings = {"version": VERSION, "seed": args.seed, "scale": args.scale, "kept": kept}
        if finished(args.out, settings):
            print(f"the stand-ins in {args.out} are complete (seed {args.seed}, scale {args.scale:g})")
            return
        for name in kept:
            print(f"kept as it is: {args.out / name}")
        generate(args.out, settings)
    except OSError as error:
        fail(f"{error.filename or args.out}: {error.strerror}; choose a writable --out with room for 65 MB")


if __name__ == "__main__":
    main()
