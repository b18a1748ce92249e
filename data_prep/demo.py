"""Draws stand-ins of all eight datasets in their real raw layouts, so that the study runs without a download.

Nothing here is a medical image. A radiograph comes from a parametric phantom: a beam crosses a thorax, and
what it meets (tissue, bone, air) gives the grey value. Every finding moves a border or fills a region with a
pattern of its own, visible at 64 pixels. Patients keep their anatomy from film to film; each site has a look,
a case mix and labelling errors of its own. CT, OCT and natural images are drawn in the same way.

    python data_prep/demo.py --out data/demo/raw                     # a minute on 2 cores, 160 MB
    python data_prep/demo.py --out raw --keep --scale 0.05 --seed 1  # beside real downloads, which stay

Writes: <out>/<dataset>/ for nih, mimic_cxr, chexpert, padchest, vindr_cxr, covidx_ct, oct and imagenet: the
        files and columns of the public downloads that our readers use, and a README.txt that says what it
        is; <out>/demo.json last of all, when everything is complete. Same seed, same bytes.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian

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
    ap: float = 0.0                 # share of bedside (AP) films at mean health: larger heart, high diaphragm
    window: tuple = (0.12, 1.05)    # attenuation shown as black and as white
    gamma: float = 1.0              # below 1 lifts the dark parts
    noise: float = 0.008            # grain, in grey values 0–1
    error: float = 0.0              # share of positives the labels miss; as many negatives get a label
    share: float = 1.0              # prevalence relative to FINDINGS
    absent: tuple = ()              # findings this site never has
    lateral: float = 0.0            # share of studies with a lateral film beside the frontal one
    studies: float = 0.5            # a patient has about 1 / studies of them, 5 at most


SITES = {   # labels are mined from reports at NIH, MIMIC and CheXpert, given by physicians at the other two
    "nih": Site(ap=0.4, error=0.06, studies=0.4),
    "mimic_cxr": Site(size=(160, 192), ap=0.65, window=(0.02, 1.0), gamma=0.85, noise=0.012,
                      error=0.10, share=1.2, lateral=0.15),
    "chexpert": Site(size=(192, 160), ap=0.8, window=(0.22, 0.98), gamma=1.15, noise=0.016,
                     error=0.08, share=1.4, lateral=0.15),
    "padchest": Site(size=(164, 172), ap=0.03, window=(-0.1, 1.4), gamma=0.9, noise=0.006,
                     error=0.03, absent=("Edema",), studies=0.9),
    "vindr_cxr": Site(size=(148, 168), window=(0.2, 1.1), gamma=1.3, noise=0.01,
                      error=0.02, absent=("Edema",), studies=1.0)}


# --- begin copy: error ---
def fail(message):
    """A mistake the user can mend: one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
# --- end copy: error ---


# The pencils. A shape is a field of floats 0–1 over the picture; distances are negative inside it.

def canvas(size, rng, shift=0.03, zoom=0.04):
    """Coordinates x, y float32 [H, W] under a misplaced camera: x about -1 … 1, y down, square pixels."""
    width, height = size
    y, x = np.mgrid[:height, :width].astype(np.float32)
    scale = 2 * float(rng.normal(1, zoom)) / width
    right, down = rng.normal(0, shift, 2).tolist()
    return (x - width / 2) * scale + right, (y - height / 2) * scale + down


def below(distance, soft=0.02):
    """1 where the distance is negative, 0 where it is positive, a ramp of the given width between."""
    return np.clip(0.5 - distance / soft, 0, 1)


def bump(distance, width):
    """A Gaussian ridge, 1 at distance 0."""
    return np.exp(-0.5 * np.square(distance / width))


def waves(distance, period, phase=0.0):
    """Stripes, -1 … 1, `period` apart: a pattern that its surroundings foretell."""
    return np.cos(2 * np.pi * (distance / period + phase))


def clouds(rng, shape, cells):
    """Smooth noise of mean 0 and deviation about 0.8, with `cells` lumps along the height."""
    coarse = rng.standard_normal((cells, max(2, cells * shape[1] // shape[0])), np.float32)
    return np.asarray(Image.fromarray(coarse).resize(shape[::-1], Image.BICUBIC))


# The chest. The patient's right side lies at x < 0, left on the film; one unit is half the film's width.
APEX = -0.80            # y of the lungs' tips


def person(rng):
    """The anatomy a patient keeps from film to film; lengths in canvas units."""
    return SimpleNamespace(
        sex="FM"[rng.integers(2)],
        age=int(np.clip(rng.normal(52, 17), 8, 89)),
        width=rng.normal(0.74, 0.025),                      # of half the chest
        base=rng.normal(0.38, 0.03),                        # y of the diaphragm
        heart=rng.normal(0.32, 0.02),                       # half the width of the heart on a PA film
        rib_gap=rng.normal(0.15, 0.008), fat=rng.uniform(0.85, 1.0), vessels=rng.uniform())


def thorax(a, has, view, sick, size, rng):
    """Where things lie on a film: the borders of lungs, heart and diaphragm, each [H, W].

    Args: a (from `person`), has {finding: severity 0–1}, view, sick (-1 or 1, the worse side), size.
    """
    x, y = canvas(size, rng)
    if view == "LATERAL":                                   # a shortcut: half a chest, one lung and the heart
        x = 0.6 * x + 0.3
    ap = view == "AP"
    wide, ill = np.abs(x), below(-sick * x, 0.01)
    # Lying patients have high diaphragms; emphysema lowers and flattens them, atelectasis lifts one.
    floor = a.base - 0.06 * ap + 0.14 * has["Emphysema"]
    base = floor - 0.18 * has["Atelectasis"] * ill
    dome = base + (1.2 - 1.0 * has["Emphysema"]) * np.square(wide - 0.38)
    down = np.clip((y - APEX) / (base - APEX), 0, 1)        # 0 at the apex of a lung, 1 at its base
    wall = 0.36 + (a.width - 0.36) * np.sqrt(down * (2 - down))
    across = np.clip((wide - 0.12) / (wall - 0.12), 0, 1)   # 0 medial, 1 lateral
    lung = below(wide - wall) * below(0.12 - wide, 0.06) * below(y - dome, 0.03) * below(APEX - y, 0.06)
    half = a.heart + 0.03 * ap - 0.05 * has["Emphysema"] + 0.18 * has["Cardiomegaly"]
    off = np.hypot((x - 0.12) / half, (y - floor + 0.20) / (0.12 + 0.8 * half))
    heart = below(off - 1, 0.15) * below(y - dome - 0.05, 0.1)
    return SimpleNamespace(x=x, y=y, wide=wide, ill=ill, sick=sick, floor=floor, base=base, dome=dome,
                           down=down, across=across, wall=wall, lung=lung, heart=heart)


def opacities(has, g, rng):
    """Water where air was, for each finding present: shares of the air [H, W]; g from `thorax`."""
    x, y, wide, well = g.x, g.y, g.wide, 1 - g.ill
    phase = rng.uniform()

    def focus(side, top, bottom):                           # a lobe of one lung
        cx, cy = 0.42 * side, rng.uniform(top, bottom)
        return below(np.hypot((x - cx) / 0.26, (y - cy) / 0.22) - 1, 0.5)

    if severity := has["Effusion"]:                         # fills the angle, rises along the chest wall
        level = g.floor + 0.10 - 0.36 * severity - 0.3 * (g.across ** 3 - 0.3)
        yield below(level - y, 0.05) * (g.ill + well * (severity > 0.9))
    if severity := has["Consolidation"]:                    # dense, in the upper half
        yield focus(-g.sick, -0.45, -0.25) * (0.5 + 0.5 * severity)
    if severity := has["Pneumonia"]:                        # in the lower half, with bronchi full of air
        bronchi = 0.6 + 0.4 * waves(wide + y, 0.14, phase)
        yield focus(g.sick, 0.0, 0.15) * bronchi * (0.4 + 0.6 * severity)
    if severity := has["Infiltration"]:                     # mottled, over the middle of both lungs
        mottle = np.clip(waves(x, 0.15, phase) * waves(y, 0.15, phase), 0, 1)
        yield mottle * bump(y + 0.15, 0.25) * (0.5 + 0.5 * severity)
    if severity := has["Atelectasis"]:                      # plates above the lifted dome
        plates = bump(waves(y - g.dome, 0.13) - 1, 0.5) * below(y - g.dome + 0.03) * below(g.dome - 0.36 - y)
        yield plates * g.ill * (0.4 + 0.5 * severity)
    if severity := has["Edema"]:                            # a butterfly around the hila
        wings = bump(wide - 0.28, 0.17) * bump(y + 0.12, 0.28)
        yield wings * (0.45 + 0.45 * severity)
    if severity := has["Fibrosis"]:                         # a net through the lower periphery of both lungs
        net = np.maximum(waves(wide + y, 0.16, phase), waves(wide - y, 0.16, phase))
        yield np.clip(2 * net - 0.8, 0, 1) * np.clip(1.5 * g.down - 0.5, 0, 1) * (0.3 + 0.5 * severity)
    if severity := has["Pleural_Thickening"]:               # a rind along the chest wall
        yield 0.9 * well * below(g.wall - wide - 0.06 - 0.06 * severity, 0.03)
    for name, small in (("Nodule", 0.06), ("Mass", 0.14)):
        if severity := has[name]:
            cx, cy = -g.sick * rng.uniform(0.32, 0.5), rng.uniform(-0.5, 0.1)
            yield 0.9 * below(np.hypot(x - cx, y - cy) - small * (1 + 0.4 * severity), 0.03)


def chest(a, severity, view, rng, size):
    """A film of the attenuation, float [H, W], 0 in free air, about 1 behind the heart.

    Args: a (from `person`), severity {finding: 0–1}, view (PA, AP, LATERAL), rng, size (width, height).
    """
    has = dict.fromkeys(FINDINGS, 0.0) | severity
    g = thorax(a, has, view, rng.choice((-1, 1)), size, rng)
    x, y, wide = g.x, g.y, g.wide
    # Air is what the lungs hold, less the water; vessels leave the hila.
    reach, angle = np.hypot(wide - 0.16, y + 0.12), np.arctan2(y + 0.12, wide - 0.16)
    fan = np.clip(waves(angle + 0.3 * np.sin(5 * reach), 0.6, a.vessels), 0, 1)
    water = fan * np.exp(-reach / 0.25) * (0.4 - 0.2 * has["Emphysema"])
    for field in opacities(has, g, rng):
        water = np.maximum(water, field)
    depth = (4 * g.across * (1 - g.across) + 0.25) ** 0.3 * np.sqrt(np.clip(3 * g.down, 0.1, 1))
    air = g.lung * depth * (1 - g.heart) * (1 - water) * (1 + 0.25 * has["Emphysema"])
    if severity := has["Pneumothorax"]:                     # beyond the collapsed lung nothing but air
        gap = (0.08 + 0.14 * severity) * np.clip(1.4 - 1.2 * g.down, 0.2, 1.4)
        free = below(g.wall - wide - gap) * g.ill * g.lung
        air = np.maximum(air, 1.25 * free)
    if severity := has["Hernia"]:                           # a sac before the heart: bubble, level, fluid
        radius = 0.12 + 0.08 * severity
        sac = np.hypot(x - 0.06, y - g.floor + 0.08)
        air = air * below(radius - sac) + 0.8 * below(sac - 0.85 * radius, 0.04) * (y < g.floor - 0.06)
    air += 0.25 * bump(x, 0.035) * below(y + 0.35)          # windpipe
    body = below(0.5 * np.clip(wide - 0.22, 0, 1) - 0.95 - y, 0.03) * below(wide - 1.02, 0.05)
    solid = body * a.fat * (0.66 + 0.2 * np.sqrt(np.clip(1 - wide ** 2, 0, 1)))
    solid += 0.14 * g.heart + 0.10 * below(g.dome - y, 0.1)
    cage = below(wide - g.wall - 0.03, 0.03) * (y > APEX) * (y < g.floor + 0.35)
    ribs = bump(waves(y - 0.25 * wide ** 1.5, a.rib_gap) - 1, 0.6)
    solid += 0.06 * cage * (1 - 0.6 * g.heart) * ribs
    solid += 0.10 * below(wide - 0.085, 0.03) * (0.8 + 0.2 * waves(y, 0.17))
    return solid - 0.58 * air


def radiograph(film):
    """The film (from `cohort`) as its site shows it, float [H, W] 0–1: window, gamma, grain."""
    site, rng = SITES[film.site], np.random.default_rng(film.key)
    attenuation = chest(film.anatomy, film.shows, film.view, rng, site.size)
    black, white = (edge + rng.normal(0, 0.03) for edge in site.window)
    grey = np.clip((attenuation - black) / (white - black), 0, None)
    grey = grey / (1 + grey ** 8) ** 0.125                  # film saturates softly
    grey = grey ** (site.gamma * rng.lognormal(0, 0.08))
    return np.clip(grey + site.noise * rng.standard_normal(grey.shape), 0, 1)


def ct_slice(patient, disease, level, key):
    """An axial CT slice, float [144, 144] 0–1; disease: 0, 1 pneumonia, 2 COVID-19; level: 0 (apex) … 1."""
    own, rng = np.random.default_rng(patient), np.random.default_rng(key)
    x, y = canvas((144, 144), own)
    wide, tall, turn = own.uniform(0.80, 0.92), own.uniform(0.58, 0.68), own.uniform(0, 6)
    body = np.hypot(x / wide, y / tall)
    size = float(np.sin(np.pi * (0.15 + 0.7 * level))) ** 0.5   # lungs are widest half-way down
    lung = np.hypot((np.abs(x) - 0.44 * wide) / (0.36 * wide * size), (y + 0.02) / (0.72 * tall * size))
    heart = np.hypot((x - 0.12) / (0.34 * level + 0.10), (y + 0.16) / (0.22 + 0.12 * level))
    air = below(lung - 1, 0.08) * below(1 - heart, 0.12)
    water = 0.35 * (np.abs(clouds(rng, x.shape, 22)) < 0.12) * np.clip(1.3 - lung, 0, 1)      # vessels
    if disease == 1:                                            # one dense segment
        cx = own.choice((-0.42, 0.42)) * wide
        water = np.maximum(water, 0.85 * below(np.hypot((x - cx) / 0.24, (y - 0.15) / 0.2) - 1, 0.4))
    for i in range(6 if disease == 2 else 0):                   # ground glass under the pleura of both lungs
        cx = (-0.44, 0.44)[i % 2] * wide + 0.28 * size * np.cos(turn + i)
        lump = np.hypot(x - cx, y - 0.45 * size * np.sin(turn + i)) - 0.16
        water = np.maximum(water, below(lump, 0.12) * (0.45 + 0.15 * waves(x + y, 0.1)))
    spine = below(np.hypot(x / 0.13, (y - 0.58 * tall) / 0.12) - 1, 0.2)
    grey = 0.62 - 0.5 * air * (1 - water) * (1 - spine) + 0.3 * np.maximum(spine, bump(body - 0.9, 0.035))
    return np.clip(below(body - 1, 0.03) * grey + 0.01 * rng.standard_normal(x.shape), 0, 1)


def retina(patient, disease, key):
    """An OCT scan (disease: CNV, DME, DRUSEN, NORMAL), float [160, W] 0–1: layers between two surfaces."""
    own, rng = np.random.default_rng(patient), np.random.default_rng(key)
    width = int(own.choice((166, 248)))
    y, x = np.mgrid[:160, :width].astype(np.float32)
    x, y = 2 * x / width - 1, y / 160
    floor = own.uniform(0.55, 0.7) + rng.uniform(-0.08, 0.08) * x + rng.uniform(-0.1, 0.05) * x ** 2
    thick, fovea = own.uniform(0.24, 0.30), rng.uniform(-0.2, 0.2)
    roof = floor - thick * (1 - 0.6 * bump(x - fovea, 0.16))
    lifted, fluid = 0 * x, 0 * x
    if disease == "DRUSEN":                                     # small bumps under the pigment layer
        lifted = rng.uniform(0.02, 0.045) * np.clip(waves(x, 0.2, rng.uniform()), 0, 1)
    if disease == "CNV":                                        # one large lesion
        lifted = rng.uniform(0.07, 0.13) * bump(x - fovea - rng.uniform(-0.15, 0.15), 0.2)
    if disease == "DME":                                        # cysts in the inner layers
        cysts = waves(x - fovea, 0.2) * bump(x - fovea, 0.3) * bump(y - floor + 0.12, 0.05)
        fluid = below(0.3 - cysts, 0.2)
    depth = (y - roof + lifted) / (floor - roof)                # 0 at the vitreous, 1 at the pigment layer
    stops = [0, .02, .2, .4, .5, .58, .64, .84, .93, 1.04, 1.08]
    tones = [.05, .7, .45, .45, .26, .45, .22, .2, .8, .85, .45]
    choroid = 0.45 * np.exp(-np.clip(y - floor, 0, None) / 0.09)
    layers = np.interp(depth, stops, tones)
    grey = np.where(y > floor + 0.015, choroid, layers) * (1 - 0.85 * fluid)
    return np.clip(grey * rng.gamma(9, 1 / 9, x.shape), 0, 1)       # with speckle


# wnid: corners of the outline, their depth, length / width, stripes, hue of the object, hue of the scene
CLASSES = {
    "n01440764": (2, .15, 2.4, 0, .18, .45), "n02102040": (3, .25, 1.2, 6, .06, .30),
    "n02979186": (4, .20, 1.5, 0, .00, .10), "n03000684": (7, .20, 2.0, 9, .05, .25),
    "n03028079": (3, .35, 0.6, 9, .11, .58), "n03394916": (0, .00, 1.0, 6, .14, .95),
    "n03417042": (4, .12, 1.7, 6, .35, .62), "n03425413": (4, .15, 0.5, 0, .98, .56),
    "n03445777": (0, .00, 1.0, 0, .70, .33), "n03888257": (5, .10, 1.3, 9, .90, .55)}


def natural_image(wnid, key):
    """An object of one of CLASSES before a scene: RGB float [H, W, 3] 0–1."""
    corners, corner_depth, long, stripes, hue, scene = CLASSES[wnid]
    rng = np.random.default_rng(key)
    size = ((128, 96), (96, 128), (112, 112))[rng.integers(3)]
    x, y = canvas(size, rng, shift=0.25, zoom=0.15)
    scale = rng.uniform(0.4, 0.65)
    u, v = x / (scale * long ** 0.5), y * long ** 0.5 / scale
    inside = below(np.hypot(u, v) - 1 - corner_depth * np.cos(corners * np.arctan2(v, u)), 0.05)[..., None]
    surface = 0.65 - 0.2 * u - 0.25 * v + 0.25 * np.cos(stripes * u)
    fractal = sum(clouds(rng, x.shape, 3 * 2 ** k) / 1.6 ** k for k in range(5))
    ground = 0.55 + 0.12 * fractal - 0.25 * np.tanh(6 * (y - rng.uniform(-0.1, 0.5)))
    hues = rng.normal((hue, scene), 0.03)
    saturation = rng.uniform(0.3, 0.8, (2, 1))
    wheel = 0.5 + 0.5 * np.cos(2 * np.pi * (hues[:, None] - np.arange(3) / 3))
    light = 1 - saturation + saturation * wheel
    picture = inside * surface[..., None] * light[0] + (1 - inside) * ground[..., None] * light[1]
    return np.clip(picture + 0.02 * rng.standard_normal(picture.shape), 0, 1)


def cohort(site_name, key, sizes):
    """Films still to be drawn, no patient in two splits; sizes: {split: number of films}.

    A film has site, split, patient and study (1, 2, …), view, anatomy, causes (heart failure, infection, lung
    disease), key (its seed); all films of a study show {finding: severity 0–1} and have labels {finding}, as
    claimed. The studies most liable, by causes (FINDINGS) and chance, are affected, as many as the site has.
    """
    site, everybody, patient = SITES[site_name], [], 0
    for number, (split, size) in enumerate(sizes.items()):
        rng, films = np.random.default_rng((*key, number)), []
        while len(films) < size:
            anatomy, causes, patient = person(rng), rng.standard_normal(3), patient + 1
            for study in range(1, 1 + min(rng.geometric(site.studies), 5)):
                bedside = rng.random() < site.ap + 0.12 * causes[0] * (site.ap > 0)
                views = ["AP" if bedside else "PA"] + ["LATERAL"] * (rng.random() < site.lateral)
                common = dict(site=site_name, split=split, patient=patient, study=study, anatomy=anatomy,
                              causes=causes, shows={}, labels=set())
                films += [SimpleNamespace(**common, view=view, key=(*key, patient, study, i))
                          for i, view in enumerate(views)]
        films = films[:size]
        studies = [film for film in films if film.view != "LATERAL"]
        for finding, (share, *weights) in FINDINGS.items():
            liability = [np.dot(film.causes, weights) + rng.normal() for film in studies]
            affected = min(len(studies) - 1, max(2, round(share * site.share * len(studies))))
            affected *= finding not in site.absent
            order = np.argsort(liability)[::-1]
            positive = rng.permutation(order[:affected])
            negative = rng.permutation(order[affected:])
            for i in positive:
                studies[i].shows[finding] = rng.uniform(0.4, 1)
            wrong = int(site.error * affected)
            for i in [*positive[wrong:], *negative[:wrong]]:
                studies[i].labels.add(finding)
        everybody += films
    return everybody


def save_picture(path, picture, mode="L"):
    """PNG or JPEG, by the path's extension; mode I;16 has 12-bit values stretched over 16, as PadChest."""
    image = Image.fromarray((picture * 255).round().astype(np.uint8))
    if mode == "I;16":
        image = Image.fromarray((picture * 4095).round().astype(np.uint16) * 16)
    image.convert(mode).save(path, "PNG" if path.suffix == ".png" else "JPEG", quality=88)


def save_dicom(path, picture, inverted, bits, window, sex, age):
    """A digital X-ray of `bits` bits; MONOCHROME1 (0 is white) if inverted."""
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
    if window:
        image.WindowCenter, image.WindowWidth = (top + 1) // 2, top + 1
    image.PixelData = (top - stored if inverted else stored).tobytes()
    image.save_as(path, enforce_file_format=True)


def make(task):
    """Draw and save one picture. task: (path, drawing without arguments, save)."""
    path, drawing, save = task
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, drawing())


# The layouts: each writes its tables into `root`, returns the tasks of its pictures; `count` scales numbers.

NIH_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]")
CHEXPERT_LABELS = {     # in the order of its columns, and which of our findings speak for them
    "No Finding": (), "Enlarged Cardiomediastinum": ("Hernia",), "Cardiomegaly": ("Cardiomegaly",),
    "Lung Opacity": ("Infiltration", "Consolidation", "Pneumonia"), "Lung Lesion": ("Mass", "Nodule"),
    "Edema": ("Edema",), "Consolidation": ("Consolidation",), "Pneumonia": ("Pneumonia",),
    "Atelectasis": ("Atelectasis",), "Pneumothorax": ("Pneumothorax",), "Pleural Effusion": ("Effusion",),
    "Pleural Other": ("Pleural_Thickening", "Fibrosis"), "Fracture": (), "Support Devices": ()}
MIMIC_METADATA = (
    "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,StudyDate,"
    "StudyTime,ProcedureCodeSequence_CodeMeaning,ViewCodeSequence_CodeMeaning,"
    "PatientOrientationCodeSequence_CodeMeaning")
RACES = ("White, non-Hispanic", "White, non-Hispanic", "Asian", "Asian", "Black or African American")
PADCHEST_WORDS = {
    "Atelectasis": "laminar atelectasis", "Effusion": "pleural effusion", "Infiltration": "infiltrates",
    "Fibrosis": "pulmonary fibrosis", "Pleural_Thickening": "pleural thickening", "Hernia": "hiatal hernia"}
PADCHEST_HEADER = (
    ",ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,PatientSex_DICOM,ViewPosition_DICOM,"
    "Projection,MethodProjection,Pediatric,Modality_DICOM,Manufacturer_DICOM,PhotometricInterpretation_DICOM,"
    "PixelRepresentation_DICOM,PixelAspectRatio_DICOM,SpatialResolution_DICOM,BitsStored_DICOM,"
    "WindowCenter_DICOM,WindowWidth_DICOM,Rows_DICOM,Columns_DICOM,XRayTubeCurrent_DICOM,Exposure_DICOM,"
    "ExposureInuAs_DICOM,ExposureTime,RelativeXRayExposure_DICOM,ReportID,Report,MethodLabel,Labels,"
    "Localizations,LabelsLocalizationsBySentence,labelCUIS,LocalizationsCUIS")
VINDR_LABELS = (
    "Aortic enlargement,Atelectasis,Calcification,Cardiomegaly,Clavicle fracture,Consolidation,Edema,"
    "Emphysema,Enlarged PA,ILD,Infiltration,Lung Opacity,Lung cavity,Lung cyst,Mediastinal shift,Nodule/Mass,"
    "Pleural effusion,Pleural thickening,Pneumothorax,Pulmonary fibrosis,Rib fracture,Other lesion,COPD,"
    "Lung tumor,Pneumonia,Tuberculosis,Other diseases,No finding")
VINDR_WORDS = {
    "Effusion": "Pleural effusion", "Mass": "Nodule/Mass", "Nodule": "Nodule/Mass", "Hernia": "Other lesion",
    "Fibrosis": "Pulmonary fibrosis", "Pleural_Thickening": "Pleural thickening"}
COVIDX = {              # finding: source, patient id, name of slice z
    "Normal": ("COVID-CTset", "patient{p}", "normal2_{id}_SR_2_IM{z:05d}"),
    "Pneumonia": ("COVID-CT-MD", "COVIDCTMD-cap{p:03d}", "{id}-IM{z:04d}"),
    "COVID-19": ("CNCB", "NCP_{p}", "{id}_{q}_{z:04d}")}
COVIDX_HEADER = "patient id,source,country,sex,age,finding,verified finding,slice selection,view,modality"


def digest(*parts):
    """64 hexadecimal digits that look like chance and are none."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def write_lines(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def write_csv(path, header, rows):
    """Rows {column: value}, blank where one is missing; gzipped, without the time, if the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    packing = {"method": "gzip", "mtime": 1} if path.suffix == ".gz" else None
    table = pd.DataFrame(list(rows), columns=header.split(","), dtype=object)
    table.to_csv(path, index=False, lineterminator="\n", compression=packing)


def contents(folder):
    """A digest of what lies below a folder, but for its README.txt: names, and sizes of files."""
    paths = sorted(path for path in folder.rglob("*") if path != folder / "README.txt")
    sizes = [path.is_file() and path.stat().st_size for path in paths]
    return digest([path.relative_to(folder).as_posix() for path in paths], sizes)


def is_drawn(folder):
    """Whether a folder is as demo.py left it: its README.txt ends with the digest of what lies there."""
    note = folder / "README.txt"
    text = note.read_text(errors="replace") if note.is_file() else ""
    return STAND_IN in text and text.endswith(f" {contents(folder)}.\n")


def nih(root, key, count):
    """Kaggle's folders, 8-bit PNG; official lists without a common patient."""
    rows, tasks, lists = [], [], {"train": [], "val": [], "test": []}
    sizes = {"train": count(300), "val": count(100), "test": count(1000)}
    for i, film in enumerate(cohort("nih", key, sizes)):
        name = f"{film.patient:08d}_{film.study - 1:03d}.png"
        rows.append({
            "Image Index": name, "Finding Labels": "|".join(sorted(film.labels)) or "No Finding",
            "Follow-up #": film.study - 1, "Patient ID": film.patient,
            "Patient Age": film.anatomy.age, "Patient Gender": film.anatomy.sex, "View Position": film.view})
        marks = ["1" if finding in film.labels else "0" for finding in FINDINGS]
        lists[film.split].append(" ".join([name, *marks]))
        path = root / f"images_{1 + i // 500:03d}" / "images" / name
        mode = "RGBA" if i % 200 == 7 else "L"                  # as a few of the real ones
        tasks.append((path, partial(radiograph, film), partial(save_picture, mode=mode)))
    write_csv(root / "Data_Entry_2017_v2020.csv", NIH_HEADER, rows)
    names = {split: [line.split(" ")[0] for line in lines] for split, lines in lists.items()}
    write_lines(root / "train_val_list.txt", names["train"] + names["val"])
    write_lines(root / "test_list.txt", names["test"])
    for split, lines in lists.items():
        write_lines(root / f"Xray14_{split}_official.txt", lines)
    return tasks


def report_labels(film, certain=False):
    """CheXpert's fourteen observations as mined from the report: 1.0, 0.0, -1.0 or blank."""
    rng = np.random.default_rng((*film.key[:-1], 1000))         # one report for all films of a study
    said = set(film.shows) if certain else film.labels          # three radiologists against a report
    mined = {}
    for name, evidence in CHEXPERT_LABELS.items():
        claim, chance = not said.isdisjoint(evidence), rng.random()
        if name == "No Finding":
            claim = not said
        if certain:
            mined[name] = "1.0" if claim else "0.0"
        elif claim:
            mined[name] = "-1.0" if chance < 0.1 and name != "No Finding" else "1.0"
        elif name != "No Finding" and chance < 0.2:
            mined[name] = "-1.0" if chance < 0.03 else "0.0"
    return mined


def mimic_cxr(root, key, count):
    """JPEG below patient and study; labels mined from reports, one row a study; lateral films too."""
    metadata, studies, splits, tasks = [], {}, [], []
    sizes = {"train": count(3000), "validate": count(40), "test": count(80)}
    for film in cohort("mimic_cxr", key, sizes):
        subject = 10_000_032 + 1237 * film.patient
        study = 50_000_414 + 23 * film.patient + film.study
        code = digest(key, subject, study, film.view)
        dicom = "-".join(code[i:i + 8] for i in range(0, 40, 8))
        ids = {"dicom_id": dicom, "study_id": study, "subject_id": subject}
        view = "LL" if film.view == "LATERAL" and code[41] < "8" else film.view
        metadata.append(ids | {
            "ViewPosition": "" if code[40] == "0" else view, "StudyDate": 21800506 + film.study})
        studies[study] = report_labels(film) | {"subject_id": subject, "study_id": study}
        splits.append(ids | {"split": film.split})
        folder = root / "files" / f"p{subject}"[:3] / f"p{subject}" / f"s{study}"
        tasks.append((folder / f"{dicom}.jpg", partial(radiograph, film), save_picture))
    labels = ",".join(["subject_id,study_id", *sorted(CHEXPERT_LABELS)])
    write_csv(root / "mimic-cxr-2.0.0-metadata.csv.gz", MIMIC_METADATA, metadata)
    write_csv(root / "mimic-cxr-2.0.0-split.csv.gz", "dicom_id,study_id,subject_id,split", splits)
    write_csv(root / "mimic-cxr-2.0.0-chexpert.csv.gz", labels, studies.values())
    return tasks


def chexpert(root, key, count):
    """The small release; a hand-labelled valid.csv; the test split as row numbers of train.csv."""
    release, tables, tasks, split, people = "CheXpert-v1.0-small", {"train": [], "valid": []}, [], [], {}
    for film in cohort("chexpert", key, {"test": count(345), "other": count(120), "valid": count(116)}):
        side = "Lateral" if film.view == "LATERAL" else "Frontal"
        folder = "valid" if film.split == "valid" else "train"
        study = f"{release}/{folder}/patient{film.patient:05d}/study{film.study}"
        path = f"{study}/view{1 + film.key[-1]}_{side.lower()}.jpg"
        # The test split lies in train.csv; of the other rows a third of the patients is in no split at all.
        listed = film.split if film.split != "other" else (None, "train", "validate")[film.patient % 3]
        if side == "Frontal" and folder == "train" and listed:
            split.append({"": len(split), "index": len(tables["train"]), "split": listed})
        tables[folder].append(report_labels(film, folder == "valid") | {
            "Path": path, "Sex": {"F": "Female", "M": "Male"}[film.anatomy.sex], "Age": film.anatomy.age,
            "Frontal/Lateral": side, "AP/PA": film.view if side == "Frontal" else ""})
        race = RACES[int(digest(key, film.patient), 16) % 5]
        people[film.patient] = {"PATIENT": f"patient{film.patient:05d}", "PRIMARY_RACE": race}
        tasks.append((root / path, partial(radiograph, film), save_picture))
    header = ",".join(["Path,Sex,Age,Frontal/Lateral,AP/PA", *CHEXPERT_LABELS])
    for folder, rows in tables.items():
        write_csv(root / release / f"{folder}.csv", header, rows)
    write_csv(root / "chexpert_split_2021_08_20.csv", ",index,split", split)
    write_csv(root / "CHEXPERT DEMO.csv", "PATIENT,GENDER,AGE_AT_CXR,PRIMARY_RACE,ETHNICITY", people.values())
    return tasks


def padchest(root, key, count):
    """16-bit PNG in numbered archives; labels as lists in text; rows that the study's filter drops."""
    rows, tasks = [], []
    for i, film in enumerate(cohort("padchest", key, {"kept": count(200), "dropped": count(50)})):
        study, patient = (str(int(digest(key, film.patient, of), 16))[:38] for of in (film.study, "patient"))
        words = sorted(PADCHEST_WORDS.get(name, name.lower()) for name in film.labels) or ["normal"]
        name, year = f"{study}_{digest(study)[:6]}.png", 2013 + film.study
        row = {
            "": i, "ImageID": name, "ImageDir": 0, "StudyDate_DICOM": f"{year}0915", "StudyID": study,
            "PatientID": patient, "PatientBirth": f"{year - film.anatomy.age}.0",
            "PatientSex_DICOM": film.anatomy.sex, "Projection": film.view,
            "MethodProjection": "Manual review of DICOM fields", "Report": "dibujo .\nno es un paciente .",
            "MethodLabel": "Physician", "Labels": str(words)}
        if film.split == "dropped":     # view, lying down, archive, projection guessed by a network, blank
            row |= ({"Projection": "L"}, {"Projection": "AP_horizontal"}, {"ImageDir": 1},
                    {"MethodProjection": "resnet-50.t7"}, {"Labels": ""})[i % 5]
        rows.append(row)
        path = root / str(row["ImageDir"]) / name
        tasks.append((path, partial(radiograph, film), partial(save_picture, mode="I;16")))
    write_csv(root / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz", PADCHEST_HEADER, rows)
    return tasks


def vindr_cxr(root, key, count):
    """DICOM of several depths and windows, a quarter MONOCHROME1; labels by reader and by consensus."""
    rng, tasks, labels = np.random.default_rng(key), [], {"train": [], "test": []}
    for i, film in enumerate(cohort("vindr_cxr", key, {"train": count(40), "test": count(200)})):
        image = digest(key, i)[:32]
        sex, age = (film.anatomy.sex, "")[i % 2], (f"{film.anatomy.age:03d}Y", "000Y", "")[i % 3]
        bits = (12, 14, 12, 10, 16)[i % 5]
        save = partial(save_dicom, inverted=i % 4 == 0, bits=bits, window=i % 3 > 0, sex=sex, age=age)
        tasks.append((root / film.split / f"{image}.dicom", partial(radiograph, film), save))
        # Training images are read by three, who overlook one finding in ten; test images have one consensus.
        for reader in ("R8", "R9", "R10") if film.split == "train" else (None,):
            seen = {VINDR_WORDS.get(name, name) for name in sorted(film.labels)
                    if not reader or rng.random() > 0.1} or {"No finding"}
            row = {name: int(name in seen) for name in VINDR_LABELS.split(",")}
            labels[film.split].append(row | {"image_id": image, "rad_id": reader})
    for split, ids in {"train": "image_id,rad_id", "test": "image_id"}.items():
        write_csv(root / "annotations" / f"image_labels_{split}.csv", f"{ids},{VINDR_LABELS}", labels[split])
    return tasks


def covidx_ct(root, key, count):
    """CT slices as PNG, named as by their sources; list files with class and body box."""
    patients, tasks = [], []
    for split, size in {"train": count(600), "val": count(100), "test": count(100)}.items():
        lines = []
        while len(lines) < size:                                # eight slices a patient
            p = len(patients) + 1
            disease = min(p % 4, 2) if split == "train" else p % 3      # COVID-19 prevails in training
            finding = list(COVIDX)[disease]
            source, owner, slice_name = COVIDX[finding]
            owner, rng = owner.format(p=p), np.random.default_rng((*key, p))
            patients.append({
                "patient id": owner, "source": source, "sex": "MF"[rng.integers(2)],
                "age": rng.integers(20, 90), "finding": finding, "view": "Axial"})
            for z in range(min(8, size - len(lines))):
                name = slice_name.format(id=owner, q=1000 + p, z=20 + 3 * z) + ".png"
                lines.append(f"{name} {disease} 2 15 142 129")  # a box that holds most bodies
                slice_ = partial(ct_slice, (*key, p), disease, (z + rng.random()) / 8, (*key, p, z))
                tasks.append((root / "3A_images" / name, slice_, save_picture))
        write_lines(root / f"{split}_COVIDx_CT-3A.txt", lines)
    write_csv(root / "metadata.csv", COVIDX_HEADER, patients)
    return tasks


def oct(root, key, count):
    """Scans as JPEG of two widths below the class folders of release v3."""
    tasks = []
    for split, size in {"train": count(750), "test": count(10)}.items():
        for number, disease in enumerate(("CNV", "DME", "DRUSEN", "NORMAL")):
            for i in range(size):                               # three scans a patient
                patient = 1_000_000 * (number + 1) + 31 * (i // 3) + 500_000 * (split == "test")
                path = root / "CellData" / "OCT" / split / disease / f"{disease}-{patient}-{1 + i % 3}.jpeg"
                scan = partial(retina, (*key, patient), disease, (*key, patient, i))
                tasks.append((path, scan, save_picture))
    return tasks


def imagenet(root, key, count):
    """ILSVRC as on Kaggle: training images by class, validation images flat, a table names their classes."""
    data, save = root / "ILSVRC" / "Data" / "CLS-LOC", partial(save_picture, mode="RGB")
    order = np.random.default_rng(key).permutation(sorted(CLASSES) * count(10)).tolist()
    paths = [(wnid, f"train/{wnid}/{wnid}_{1 + 37 * i}.JPEG") for wnid in CLASSES for i in range(count(300))]
    paths += [(wnid, f"val/ILSVRC2012_val_{i:08d}.JPEG") for i, wnid in enumerate(order, 1)]
    write_csv(root / "LOC_val_solution.csv", "ImageId,PredictionString", [
        {"ImageId": Path(path).stem, "PredictionString": f"{wnid} 20 20 80 80 "}
        for wnid, path in paths if path.startswith("val")])
    return [(data / path, partial(natural_image, wnid, (*key, i)), save)
            for i, (wnid, path) in enumerate(paths)]


DATASETS = (nih, mimic_cxr, chexpert, padchest, vindr_cxr, covidx_ct, oct, imagenet)


def generate(out, settings):
    """Make each dataset beside its place and move it there once complete; sign off with demo.json."""
    images, scale = {}, settings["scale"]
    (out / "demo.json").unlink(missing_ok=True)
    with ProcessPoolExecutor() as pool:
        for number, dataset in enumerate(DATASETS):
            name = dataset.__name__
            if name in settings["kept"]:
                continue
            place, partly = out / name, out / f"{name}.partial"
            shutil.rmtree(partly, ignore_errors=True)           # from an interrupted run
            if place.exists():
                place.rename(partly)                            # half of it would seem a download
                shutil.rmtree(partly)
            partly.mkdir(parents=True)
            tasks = dataset(partly, (settings["seed"], number), lambda n: max(6, round(n * scale)))
            list(pool.map(make, tasks, chunksize=16))
            write_lines(partly / "README.txt", [
                f"{STAND_IN}.", f"The layout is that of {name}'s public download; pictures, patients and",
                "labels are invented: no number computed from them says anything about the real data.",
                f"Made with seed {settings['seed']}, scale {scale}.",
                f"Digest of the files' names and sizes: {contents(partly)}."])
            os.replace(partly, place)
            images[name] = len(tasks)
            print(f"stand-in for {name:9s} {len(tasks):6,d} images", flush=True)
    text = json.dumps({"stand_in": True, **settings, "images": images}, indent=1)
    (out / "demo.json.partial").write_text(text, encoding="utf-8", newline="\n")
    os.sync()                                                   # pictures first, then word of them
    os.replace(out / "demo.json.partial", out / "demo.json")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write <dataset>/ into")
    parser.add_argument("--seed", type=int, default=0, help="other patients, other pictures (0)")
    parser.add_argument("--scale", type=float, default=1.0, help="1 is 12,531 images, 0.1 a tenth (1)")
    parser.add_argument("--keep", action="store_true", help="leave folders that hold anything but drawings, "
                        "instead of refusing; folders of drawings alone are always drawn anew")
    parser.error = fail                 # one sentence, like every other mistake
    args = parser.parse_args()
    if args.seed < 0 or not 0 < args.scale <= 100:
        fail(f"--seed {args.seed} --scale {args.scale:g}: the seed starts at 0, the scale is in (0, 100]")
    places = [args.out / dataset.__name__ for dataset in DATASETS]
    try:
        kept = [place.name for place in places if place.exists() and not is_drawn(place)]   # never touched
        if kept and not args.keep:
            fail(f"{args.out / kept[0]} holds what demo.py did not draw; move it away or add --keep")
        settings = {"seed": args.seed, "scale": args.scale, "kept": kept}
        print(f"kept as they are: {', '.join(kept) or 'no folders'}")
        generate(args.out, settings)
    except OSError as error:
        fail(f"{error.filename or args.out}: {error.strerror}; choose a writable --out with room for 160 MB")


if __name__ == "__main__":
    main()
