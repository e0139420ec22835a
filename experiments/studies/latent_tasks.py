"""What latents are good for: images restored from poor ones, images of another kind, and images in between.

Reference: report A, section 1.5.2 and Figure 23 (images of another kind).
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import functa_jax as fj
from experiments import classical, data, image_plots, logs, pictures, runs, training
from experiments.config import Preset
from experiments.files import write_atomically
from experiments.models.functa import Functa
from experiments.models.restorer import Restorer
from experiments.pictures import to_bytes
from experiments.published import published
from experiments.runs import Run
from experiments.studies import functa as functa_study
from experiments.studies import latent_problems
from experiments.studies.latent_problems import SHOWN, Problem, solve
from experiments.trained import load_trained

SUMMARY = "Use a trained Functa: super-resolution, denoising, inpainting, images of another kind, interpolation"


@dataclass(frozen=True)
class Config:
    """What decides the result of a run.

    Attributes:
      functa: folder name of a finished run of the study functa.
      stranger: folder name of the run that is to fit images of another kind; None: the same.
      seed: of noise and of missing pixels.
      images: number of test images of each problem.
      validation_images: held-out images on which the efforts, and the parameters of classical filters, are chosen.
      factors: of super-resolution.
      noise: standard deviations, of images on [0, 1].
      known: fractions of the pixels.
      steps: numbers of gradient steps to choose from, see `models.restorer.Effort` for these three.
      rates: factors on the learned rates to choose from, together with the steps.
      penalties: weights of the latent's norm to choose from after that.
      others: data sets, or "photographs", to be fitted as images of another kind.
    """

    functa: str = "mnist-large-0"
    stranger: str | None = None
    seed: int = 0
    images: int = 128
    validation_images: int = 32
    factors: tuple[int, ...] = (2, 4)
    noise: tuple[float, ...] = (0.1, 0.2, 0.4)
    known: tuple[float, ...] = (0.1, 0.25, 0.5)
    steps: tuple[int, ...] = (3, 10, 30)
    rates: tuple[float, ...] = (1.0, 0.3, 0.1)
    penalties: tuple[float, ...] = (0.0, 0.03, 0.1, 0.3)
    others: tuple[str, ...] = ("digits", "photographs")


PRESETS = {
    "mnist": Preset(
        Config(stranger="mnist-half-0"),
        "on the runs functa mnist-large and mnist-half",
        "5 min on one CPU core",
        "super-resolution 2x 23.1 dB (bicubic 20.0); denoising and inpainting within 1.1 dB of the best classical way; "
        "other digits 26.3 dB and digits of another set 19.0 (report A: 18.97)",
    ),
    "cifar10": Preset(
        Config(functa="cifar10-small-0"),
        "on the run functa cifar10-small",
        "5 min on one CPU core",
        "better than non-local means from sigma 0.2 on; 1.4 dB below bicubic at 2x, 2 to 4 below biharmonic inpainting",
    ),
    "cifar10-spatial": Preset(
        Config(functa="cifar10-spatial-small-0"),
        "on the run functa cifar10-spatial-small",
        "5 min on one CPU core",
        "fits any image (36.8 dB), and so restores none well: its cells know nothing of each other",
    ),
    "digits": Preset(
        Config(functa="digits-0", factors=(2,)),
        "on the run functa digits; needs no download",
        "2 min on two CPU cores",
        "better than classical methods on images this small",
    ),
    "tiny": Preset(
        Config(
            functa="tiny-0",
            images=8,
            validation_images=8,
            factors=(2,),
            noise=(0.2,),
            known=(0.5,),
            steps=(2, 4),
            rates=(1.0, 0.3),
            penalties=(0.0, 0.1),
            others=("photographs",),
        ),
        "to try the machinery, on the run functa tiny",
        "30 s on two CPU cores",
        "nothing worth a look",
    ),
}

COLUMNS = [
    "task",
    "setting",
    "as seen",
    "classical method",
    "classical",
    "functa",
    "classical SSIM",
    "functa SSIM",
    "steps",
    "rate",
    "penalty",
]
_PAIRS = ((0, 1), (2, 3), (4, 5))  # classes to interpolate between
_STRIP = 9  # images of an interpolation, both ends included


def run(config: Config, run: Run) -> dict[str, Any]:
    """Loads the trained runs and works through the problems; each finished one is kept.

    Returns:
      metrics, table, comparisons and figures for `result.json`.
    """
    mesh = training.data_mesh()
    functa, params, trained = _load(run, config.functa, mesh)
    stranger = _load(run, config.stranger or config.functa, mesh)
    kinds = _kinds(config, run, stranger[0].image_shape, stranger[2])
    validation = data.load(trained.dataset, "validation", data_dir=run.options.data_dir).images
    test = data.load(trained.dataset, "test", data_dir=run.options.data_dir)
    problems = _problems(config, functa.image_shape[:2])
    restorer = Restorer.of(functa, params, validation[: config.validation_images])
    clean = (validation[: config.validation_images], test.images[: config.images])

    efforts = (config.steps, config.rates, config.penalties)
    jobs: list[tuple[str, str, Callable[[logs.Log], list[Any]]]] = [
        (problem.task, problem.setting, partial(solve, problem, restorer, efforts, clean, (config.seed, index)))
        for index, problem in enumerate(problems)
    ]
    jobs += [("fitting", kind, partial(_fit, stranger, kind, images)) for kind, images in kinds.items()]
    rows = []
    with logs.Progress(run.console, len(jobs), 0, f"{run.study} {run.preset}") as progress:
        for number, (task, setting, job) in enumerate(jobs, start=1):
            rows.append(_kept(run, task, setting, job))
            progress.update(number, {f"{task} {setting} PSNR": rows[-1][5]})
    log = logs.Log(run.directory, -1, enabled=run.first_process)
    _interpolate(functa, params, test, log)
    log.close()
    return {
        "metrics": {
            f"{name}_{task}_{setting}": value
            for task, setting, _, _, *values in rows
            for name, value in zip(
                ("classical_psnr", "functa_psnr", "classical_ssim", "functa_ssim"), values, strict=False
            )
            if value is not None
        },
        "table": {
            "title": f"{trained.dataset}, {len(clean[1])} test images; PSNR in dB on [0, 1], SSIM: means over images",
            "columns": COLUMNS,
            "rows": rows,
        },
        "comparisons": _comparisons(stranger[2], rows),
        "figures": [f"{task}.png" for task in dict.fromkeys(row[0] for row in rows)] + ["interpolation.png"],
    }


def _load(run: Run, name: str, mesh: jax.sharding.Mesh) -> tuple[Functa, fj.MetaParams, functa_study.Config]:
    directory, _ = runs.finished_run(run.options, "functa", name)
    return load_trained(directory, mesh)


def _problems(config: Config, shape: tuple[int, int]) -> list[Problem]:
    return [
        *(latent_problems.super_resolution(factor, shape) for factor in config.factors),
        *(latent_problems.denoising(sigma) for sigma in config.noise),
        *(latent_problems.inpainting(fraction) for fraction in config.known),
    ]


def _kept(run: Run, task: str, setting: str, job: Callable[[logs.Log], list[Any]]) -> list[Any]:
    """The row of a finished part, or of the job, done now."""
    path = _part(run.directory, task, setting) / "row.json"
    if path.exists():
        return list(json.loads(path.read_text(encoding="utf-8")))
    path.parent.mkdir(parents=True, exist_ok=True)
    log = logs.Log(path.parent, -1, enabled=run.first_process)
    row = [task, setting, *job(log)]
    log.close()
    if run.first_process:
        write_atomically(path, json.dumps(row) + "\n")
    return row


def _part(directory: Path, task: str, setting: str) -> Path:
    return directory / "parts" / task / re.sub(r"[^\w.]+", "-", setting)


def _kinds(
    config: Config, run: Run, shape: tuple[int, int, int], trained: functa_study.Config
) -> dict[str, np.ndarray]:
    """Images to be fitted, by kind: those the network was made for first."""
    load = partial(data.load, data_dir=run.options.data_dir)
    kinds = {"test images": load(trained.dataset, "test").images}
    if trained.train_images is not None:
        kinds["unused training images"] = load(trained.dataset, "train").images[trained.train_images :]
    for name in config.others:
        kinds[name] = (
            pictures.photograph_tiles(shape)
            if name == "photographs"
            else pictures.adapt(load(name, "test").images, shape)
        )
    return {name: images[: config.images] for name, images in kinds.items()}


def _fit(
    trained: tuple[Functa, fj.MetaParams, functa_study.Config], kind: str, images: np.ndarray, log: logs.Log
) -> list[Any]:
    """Fits images with the steps and rates of training."""
    functa, params, _ = trained
    latents, errors = functa.fit(params, images)
    rendered = functa.render(params, latents)
    log.images(0, "original", images[:SHOWN])
    log.images(0, "functa", rendered[:SHOWN])
    psnr = float(np.mean(fj.psnr_from_mse(errors)))
    similarity = float(np.mean(classical.ssim(rendered / 255.0, images / 255.0)))
    return [None, None, None, psnr, None, similarity, functa.inner_steps, 1.0, 0.0]


def _interpolate(functa: Functa, params: fj.MetaParams, test: data.Split, log: logs.Log) -> None:
    """Strips between the first test images of two classes: by latents and by pixels."""
    weights = np.linspace(0, 1, _STRIP, dtype=np.float32)
    for pair in _PAIRS:
        ends = np.stack([test.images[np.flatnonzero(test.labels == label)[0]] for label in pair])
        (first, last), _ = functa.fit(params, ends)
        log.images(
            0, _strip(pair, "latents"), functa.render(params, np.stack([(1 - w) * first + w * last for w in weights]))
        )
        log.images(
            0, _strip(pair, "pixels"), np.stack([to_bytes(((1 - w) * ends[0] + w * ends[1]) / 255) for w in weights])
        )


def _strip(pair: tuple[int, int], space: str) -> str:
    return f"{pair[0]} to {pair[1]}, {space}"


def _comparisons(trained: functa_study.Config, rows: list[list[Any]]) -> list[dict[str, Any]]:
    if trained.dataset != "mnist":
        return []
    quantity = "PSNR on images of another data set, MNIST configuration 1, dB"
    return [
        {
            "quantity": "PSNR on images of another kind, dB",
            "setting": f"{row[1]}, network of {trained.train_images or 'all'} MNIST images, latent {trained.latent}",
            "ours": row[5],
            "report": "A",
            "table": "text",
            "published": published("A", "text", row=quantity, column="value"),
            "published_setting": "out-of-domain images, not named",
            "higher_is_better": True,
            "note": "The report trained on half of MNIST and does not say which images it calls out-of-domain: the "
            "other half, or another set.",
        }
        for row in rows
        if row[0] == "fitting" and row[1] != "test images"
    ]


def draw(directory: Path, result: dict[str, Any]) -> None:
    """Draws the figures of a finished run from its logs and result."""
    rows = result["table"]["rows"]
    for task in dict.fromkeys(row[0] for row in rows):
        _draw_task(directory, result["config"], task, [row for row in rows if row[0] == task])
    names = [_strip(pair, space) for pair in _PAIRS for space in ("latents", "pixels")]
    image_plots.image_rows(
        {name: logs.read_images(directory / "images.jsonl", name)[0] for name in names},
        directory / "interpolation.png",
        title=f"{result['config']['functa']}: from one test image to another, through latents and through pixels",
    )


def _draw_task(directory: Path, config: dict[str, Any], task: str, rows: list[list[Any]]) -> None:
    """Each setting as seen, by a classical method and by the Functa, and the originals."""
    shown: dict[str, Any] = {}
    captions: dict[str, list[str]] = {}
    originals = None
    for _, setting, seen, method, by_classical, by_functa, *_ in rows:
        log = _part(directory, task, setting) / "images.jsonl"
        found = {name: logs.read_images(log, name).get(0) for name in ("original", "seen", "classical", "functa")}
        originals = found["original"]
        numbers = {"seen": seen, "classical": by_classical, "functa": by_functa}
        labels = {"seen": "as seen", "classical": (method or "").partition(",")[0], "functa": "functa"}
        if task == "fitting":
            labels = {"original": "original", "functa": "functa"}
        for source, label in labels.items():
            name = f"{label}\n{setting}"
            shown[name] = found[source]
            number = numbers.get(source)
            captions[name] = [] if number is None else [f"mean {number:.2f} dB"]
    if task != "fitting":
        shown["original"] = originals
    run = (config["stranger"] or config["functa"]) if task == "fitting" else config["functa"]
    title = f"{run}: " + (
        "images of its own kind and of others, fitted" if task == "fitting" else f"{task}, test images"
    )
    image_plots.image_rows(shown, directory / f"{task}.png", title=title, captions=captions)
