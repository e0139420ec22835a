"""SIREN: one small network for one image, by image size, network size and number of steps.

Reference: Sitzmann et al. 2020, arXiv:2006.09661; report A, Figures 2 and 3; report B, Tables 1 and 2.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax

import functa_jax as fj
from experiments import data, image_plots, logs, plots
from experiments.config import Preset
from experiments.models.siren import Recipe, fit
from experiments.pictures import resize
from experiments.published import published, table
from experiments.runs import Run
from experiments.studies import siren_photograph

SUMMARY = "Fit SIRENs to single images: how well by steps, image and network size; derivatives, zoom and extension"


@dataclass(frozen=True)
class Config:
    """What decides the result of a run: one fit for each size and network, of all images together.

    Attributes:
      source: name of a photograph, or of a data set, whose first test images are taken.
      images: how many images of a data set.
      seed: of initialisation and of the order of the pixels.
      sizes: heights that the images are resized to (bicubic); the ratio of the sides is kept.
      nets: networks, each (units a hidden layer, hidden layers).
      w0: frequency factor of the sines.
      steps: of Adam.
      marks: steps after which PSNR is measured; the last is `steps`.
      points: random pixels a step; None: all of them.
      learning_rate: of Adam.
      schedule: of the learning rate.
      analyse: after the fit of a photograph, look at the network's derivatives, zoom in, and look beyond the image.
      steps_per_call: steps in one call of the compiled loop.
      checkpoint_every: steps between checkpoints.
    """

    source: str = "cifar10"
    images: int = 1
    seed: int = 0
    sizes: tuple[int, ...] = (32,)
    nets: tuple[tuple[int, int], ...] = ((256, 3),)
    w0: float = 30.0
    steps: int = 2_000
    marks: tuple[int, ...] = (2_000,)
    points: int | None = None
    learning_rate: float = 1e-4
    schedule: Literal["constant", "cosine"] = "constant"
    analyse: bool = False
    steps_per_call: int = 50
    checkpoint_every: int = 200


_ROCKET = Config(
    source="rocket",
    sizes=(128,),
    steps=1_000,
    marks=(100, 200, 500, 1_000),
    points=8_192,
    learning_rate=5e-4,
    schedule="cosine",
    analyse=True,
    steps_per_call=20,
)

PRESETS = {
    "rocket": Preset(
        _ROCKET,
        "the rocket photograph at height 128 (report A, Figure 2): derivatives, zoom, extension",
        "3 min on one CPU core",
        "42.5 dB; enlarged to the original's size 27.6 dB, as bicubic (27.7); edges of the Laplacian found again",
    ),
    "complexity": Preset(
        Config(
            source="astronaut",
            sizes=(50, 100, 200, 500),
            nets=((20, 2), (50, 2), (100, 2), (100, 3), (200, 3), (200, 4)),
            steps=1_000,
            marks=(1_000,),
            points=2_500,
            learning_rate=1e-3,
            schedule="cosine",
        ),
        "four image sizes by six networks (report A, Figure 3); 2,500 random pixels a step",
        "5 min on one CPU core",
        "from 20.6 dB (50 pixels high, 20x2) to 149 (200x3); 500 pixels high from 17.1 (20x2) to 30.6 (200x4)",
    ),
    "steps": Preset(
        Config(images=8, marks=(100, 200, 400, 800, 2_000)),
        "CIFAR-10 images at 32x32 by number of steps, as report B's Table 1: Adam 1e-4, all pixels",
        "5 min on one CPU core",
        "52 dB after 100 steps (report B: 15.68), 114 dB after 800 (report B: 37.99), as exact as float32 after 2000",
    ),
    "sizes": Preset(
        Config(sizes=(32, 64, 96, 128), marks=(800, 2_000), points=4_096),
        "a CIFAR-10 image resized to 32, 64, 96, 128, as report B's Table 2: Adam 1e-4, up to 4,096 pixels a step",
        "4 min on one CPU core",
        "53 dB and more at every size (report B after 2000 steps: 55.47, 50.12, 44.34, 42.96)",
    ),
    "tiny": Preset(
        Config(
            source="rocket",
            sizes=(12, 16),
            nets=((12, 1), (16, 2)),
            steps=40,
            marks=(20, 40),
            points=128,
            learning_rate=1e-3,
            schedule="cosine",
            analyse=True,
            steps_per_call=10,
            checkpoint_every=20,
        ),
        "to try the machinery: all it does, on nets too small to be of use",
        "20 s on two CPU cores, most of it compilation",
        "nothing worth a look",
    ),
}


def run(config: Config, run: Run) -> dict[str, Any]:
    """Fits each network to each size of the images, part by part, and measures.

    Returns:
      metrics, table, comparisons and figures for `result.json`.

    Raises:
      ValueError: `analyse` of a data set.
    """
    photograph = config.source in data.PHOTOGRAPHS
    if config.analyse and not photograph:
        raise ValueError(f"analyse needs a photograph as source ({', '.join(data.PHOTOGRAPHS)}), got {config.source!r}")
    if photograph:
        originals = data.photograph(config.source)[None]
    else:
        originals = data.load(config.source, "test", data_dir=run.options.data_dir).images[: config.images]
    recipe = Recipe(
        config.steps,
        config.marks,
        config.points,
        config.learning_rate,
        config.schedule,
        config.steps_per_call,
        config.checkpoint_every,
    )
    log = logs.Log(run.directory, -1, enabled=run.first_process)  # written anew; the parts are what is resumed
    rows: list[list[Any]] = []
    metrics: dict[str, Any] = {"train_seconds": 0.0}
    for size, (width, layers), part in _parts(config, run.directory):
        images = resize(originals, size)
        model = fj.Siren(width, layers + 1, images.shape[-1], config.w0, offset=0.5)
        fitted = fit(replace(run, directory=part), recipe, model, images, seed=config.seed)
        log.images(size, "originals", images[:8])
        pixels = images.shape[1] * images.shape[2]
        parameters = sum(leaf[0].size for leaf in jax.tree.leaves(fitted.params))
        rate = len(images) / fitted.train_seconds
        rows.append(
            [size, f"{width}x{layers}", pixels, parameters, *(fitted.psnr[mark] for mark in config.marks), rate]
        )
        metrics |= {f"psnr_{size}_{width}x{layers}_{mark}": fitted.psnr[mark] for mark in config.marks}
        metrics[f"images_per_second_{size}_{width}x{layers}"] = rate
        metrics["train_seconds"] += fitted.train_seconds
    figures = ["reconstructions.png", "psnr.png"]
    if config.analyse:  # of the largest size and the last network
        metrics |= siren_photograph.measure(fitted, originals[0], images[0], log)
        figures += siren_photograph.FIGURES
    log.close()
    number = f"{len(originals)} test images of {config.source}" if not photograph else config.source
    return {
        "metrics": metrics,
        "table": {
            "title": f"{number}: PSNR on [0, 1] at the pixels fitted, mean of per-image, dB",
            "columns": [
                "height",
                "units x hidden layers",
                "pixels",
                "parameters",
                *(f"{mark} steps" for mark in config.marks),
                "images/s",
            ],
            "rows": rows,
        },
        "comparisons": _comparisons(config, metrics),
        "figures": figures,
    }


def draw(directory: Path, result: dict[str, Any]) -> None:
    """Draws the figures of a finished run from its logs and result."""
    config = Config(**result["config"])
    if len(config.nets) > 1:
        _draw_networks(config, directory, result["metrics"])
    else:
        _draw_steps(config, directory, result["metrics"])
    if config.analyse:
        siren_photograph.draw(directory, result)


def _draw_networks(config: Config, directory: Path, metrics: dict[str, Any]) -> None:
    """A grid of reconstructions, networks by sizes, and PSNR by size."""
    originals = logs.read_images(directory / "images.jsonl", "originals")
    rows: dict[str, Any] = {f"{width}x{layers}": [] for width, layers in config.nets}
    for _, (width, layers), part in _parts(config, directory):
        images = logs.read_images(part / "images.jsonl", "reconstructions")[config.steps]
        rows[f"{width}x{layers}"].append(images[0])
    psnr = {net: [metrics[f"psnr_{size}_{net}_{config.steps}"] for size in config.sizes] for net in rows}
    captions = {net: [f"{value:.2f} dB" for value in values] for net, values in psnr.items()}
    captions["original"] = [f"height {size}" for size in config.sizes]
    rows["original"] = [originals[size][0] for size in config.sizes]
    image_plots.image_rows(
        rows,
        directory / "reconstructions.png",
        title=f"{config.source}: SIRENs of units x hidden layers, {config.steps} steps",
        captions=captions,
        cell=1.7,
    )
    plots.curves(
        {net: (config.sizes, values) for net, values in psnr.items()},
        directory / "psnr.png",
        title=f"{config.source}: larger images call for larger networks ({config.steps} steps)",
        x_label="height of the image, pixels",
        y_label="PSNR, dB",
    )


def _draw_steps(config: Config, directory: Path, metrics: dict[str, Any]) -> None:
    """The images after each number of steps, and PSNR by steps, with report B's beside it."""
    originals = logs.read_images(directory / "images.jsonl", "originals")
    ((width, layers),) = config.nets
    rows: dict[str, Any] = {}
    captions: dict[str, list[str]] = {}
    series: dict[str, Any] = {}
    for size, _, part in _parts(config, directory):
        images = logs.read_images(part / "images.jsonl", "reconstructions")
        psnr = {mark: f"{metrics[f'psnr_{size}_{width}x{layers}_{mark}']:.2f} dB" for mark in config.marks}
        if len(originals[size]) == 1:  # one row a size, from the first steps to the original
            rows[f"{size} px"] = [*(images[mark][0] for mark in config.marks), originals[size][0]]
            captions[f"{size} px"] = [*(f"{mark} steps: {text}" for mark, text in psnr.items()), "original"]
        else:
            rows |= {f"{size} px, {mark} steps": images[mark] for mark in config.marks}
            rows[f"{size} px, original"] = originals[size]
            captions |= {f"{size} px, {mark} steps": [f"mean {text}"] for mark, text in psnr.items()}
        series[f"{size} px"] = logs.curve(logs.read_lines(part / "metrics.jsonl"), "psnr")
    x_label = "steps"
    if len(config.sizes) > 1:
        x_label = "height of the image, pixels"
        by_size = {
            mark: [metrics[f"psnr_{size}_{width}x{layers}_{mark}"] for size in config.sizes] for mark in config.marks
        }
        series = {f"{mark} steps": (config.sizes, psnr) for mark, psnr in by_size.items()}
    if config.source == "cifar10":
        series |= _of_report_b(config)
    image_plots.image_rows(
        rows,
        directory / "reconstructions.png",
        title=f"{config.source}: SIREN of {layers} hidden layers of {width} units",
        captions=captions,
        cell=1.1 if config.images > 1 else 1.9,
    )
    plots.curves(
        series,
        directory / "psnr.png",
        title=f"{config.source}: SIREN of {layers} hidden layers of {width} units",
        x_label=x_label,
        y_label="PSNR, mean of per-image, dB",
    )


def _of_report_b(config: Config) -> dict[str, Any]:
    """Report B's curves: by steps for its one size, or by size after the same numbers of steps."""
    if len(config.sizes) == 1:
        return {"report B, 32 px": (table("B", 1).column("steps"), table("B", 1).column("PSNR, dB"))}
    by_size = table("B", 2)
    columns = {mark: f"PSNR after {mark} steps, dB" for mark in config.marks}
    return {
        f"report B, {mark} steps": (by_size.column("size, pixels"), by_size.column(column))
        for mark, column in columns.items()
        if column in by_size.columns
    }


def _parts(config: Config, directory: Path) -> Iterator[tuple[int, tuple[int, int], Path]]:
    """Size, network and folder of each fit."""
    for size in config.sizes:
        for width, layers in config.nets:
            yield size, (width, layers), directory / "parts" / f"{size}-{width}x{layers}"


def _comparisons(config: Config, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    if config.source != "cifar10" or config.nets != ((256, 3),):
        return []
    cells: list[tuple[int, int, int, Any, str]] = []  # size, steps, number of the table, its row, its column
    for size in config.sizes:
        for mark in config.marks:
            if config.sizes == (32,) and mark in table("B", 1).column("steps"):
                cells.append((size, mark, 1, mark, "PSNR, dB"))
            if len(config.sizes) > 1 and size in table("B", 2).column("size, pixels") and mark in (800, 2_000):
                cells.append((size, mark, 2, size, f"PSNR after {mark} steps, dB"))
    return [
        {
            "quantity": "PSNR of a SIREN fitted to one image, dB",
            "setting": f"{size}x{size}, {mark} steps",
            "ours": metrics[f"psnr_{size}_256x3_{mark}"],
            "report": "B",
            "table": number,
            "published": published("B", number, row=row, column=column),
            "published_setting": f"{size}x{size}, {mark} steps",
            "higher_is_better": True,
            "note": f"Ours: mean of the first {config.images} test images, on [0, 1], Adam {config.learning_rate:g}"
            + (f", {config.points} random pixels a step" if config.points and size**2 > config.points else "")
            + "; the report names neither its images nor their number.",
        }
        for size, mark, number, row, column in cells
    ]
