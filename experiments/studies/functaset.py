"""Functaset: a whole data set as latents, fitted by a trained Functa as it was fitted in training.

Reference: Dupont et al. 2022, arXiv:2201.12204, section 3.2.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import functa_jax as fj
from experiments import data, image_plots, logs, plots, runs, trained, training
from experiments.chunks import Fitter
from experiments.classification import PadMode, crop_and_flip
from experiments.config import Preset
from experiments.files import write_atomically
from experiments.models.functa import Functa
from experiments.runs import Run
from functa_jax.functaset import Functaset

SUMMARY = "Turn a whole data set into latents with a trained Functa"

_ON_THE_MAP = 1_000  # latents


@dataclass(frozen=True)
class Config:
    """What decides the result of a run.

    Attributes:
      functa: name of a finished run of the study `functa`; its data set is the one that is fitted.
      seed: of the augmentation.
      splits: which splits to fit, "train" among them; mean and std of all are those of "train".
      steps: gradient steps to fit a latent; None: as in training. Steps beyond those take the last one's rates.
      augmentations: augmented copies of the train split besides itself.
      flip: mirror half of the images of a copy.
      shift: largest shift of the images of a copy, in pixels.
      fill: what moves in at the border of a shifted image: black ("constant") or the mirrored image ("reflect").
      chunk: images between two saves.
    """

    functa: str = "mnist-large-0"
    seed: int = 0
    splits: tuple[Literal["train", "validation", "test"], ...] = ("train", "validation", "test")
    steps: int | None = None
    augmentations: int = 0
    flip: bool = False
    shift: int = 0
    fill: PadMode = "constant"
    chunk: int = 2_000


_CIFAR10 = Config(functa="cifar10-small-0", augmentations=1, flip=True, shift=2, fill="reflect", chunk=1_000)

PRESETS = {
    "digits": Preset(
        Config(functa="digits-0", chunk=1_294),
        "the 8x8 digits, by functa/digits-0",
        "10 s on two CPU cores",
        "24 dB on the test images",
    ),
    "mnist": Preset(
        Config(),
        "MNIST, by functa/mnist-large-0",
        "12 min on one CPU core",
        "30 dB on the test images",
    ),
    "cifar10": Preset(
        _CIFAR10,
        "CIFAR-10 and a mirrored, shifted copy of it as vectors, by functa/cifar10-small-0",
        "20 min on one CPU core",
        "25.3 dB on the test images",
    ),
    "cifar10-spatial": Preset(
        replace(_CIFAR10, functa="cifar10-spatial-small-0"),
        "CIFAR-10 and a mirrored, shifted copy of it as grids, by functa/cifar10-spatial-small-0",
        "20 min on one CPU core",
        "36.9 dB on the test images",
    ),
    "tiny": Preset(
        Config(functa="tiny-0", augmentations=1, shift=1, chunk=300),
        "to try the machinery, by functa/tiny-0",
        "10 s on two CPU cores, most of it compilation",
        "nothing worth a look",
    ),
}


def run(config: Config, run: Run) -> dict[str, Any]:
    """Fits every split and every augmented copy, chunk by chunk, each of which is kept when the run is interrupted.

    Returns:
      metrics, table, comparisons and figures for `result.json`.
    """
    _check(config)
    directory, _ = runs.finished_run(run.options, "functa", config.functa)
    functa, params, of_functa = trained.load_trained(directory, training.data_mesh())
    model = trained.model_checksum(params)
    if config.steps is not None:
        functa, params = functa.with_steps(params, config.steps)
    splits = {name: data.load(of_functa.dataset, name, data_dir=run.options.data_dir) for name in config.splits}
    parts = [(name, 0) for name in sorted(splits, key=lambda name: name != "train")]  # its statistics come first
    parts += [("train", copy) for copy in range(1, config.augmentations + 1)]
    total = sum(len(splits[split].labels) for split, _ in parts)
    sets: dict[str, Functaset] = {}
    with logs.Progress(run.console, total, 0, f"{run.study} {run.preset}", unit="images") as progress:
        fitter = Fitter(
            functa,
            params,
            model,
            config.chunk,
            progress,
            warn=lambda text: run.console.print(text, style="red", markup=False, soft_wrap=True),
            writes=run.first_process,
        )
        for split, copy in parts:
            name = part_name(split, copy)
            recipe = {"dataset": of_functa.dataset, "split": split, "steps": functa.inner_steps, "copy": copy}
            if copy:
                recipe |= {"seed": config.seed, "flip": config.flip, "shift": config.shift, "fill": config.fill}
            sets[name] = fitter.part(
                run.directory / f"{name}.npz",
                partial(_images, config, splits[split].images, copy),
                splits[split].labels,
                recipe,
                sets.get("train"),
            )
    shown = "test" if "test" in splits else config.splits[-1]
    if run.first_process:
        _log(run, of_functa.dataset, functa, params, sets, shown, splits[shown].images)
    return _content(config, functa, model, of_functa.dataset, sets)


def part_name(split: str, copy: int) -> str:
    """Name of a part's file, without ".npz": the split, or an augmented copy of it."""
    return f"{split}-{copy}" if copy else split


def _check(config: Config) -> None:
    if "train" not in config.splits:
        raise ValueError(f"splits={config.splits} must have 'train' among them: its mean and std are those of all")
    for name, least in {"chunk": 1, "augmentations": 0, "shift": 0}.items():
        if getattr(config, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(config, name)}")
    if config.augmentations and not (config.flip or config.shift):
        raise ValueError(f"augmentations={config.augmentations} copies would be equal: set flip or shift")


def _images(config: Config, images: np.ndarray, copy: int, start: int, stop: int) -> np.ndarray:
    """A chunk of a split, or of an augmented copy of it."""
    if not copy:
        return images[start:stop]
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), copy), start)
    chunk = jnp.asarray(images[start:stop])
    return np.asarray(crop_and_flip(key, chunk, pad=config.shift, flip=config.flip, mode=config.fill))


def _log(
    run: Run,
    dataset: str,
    functa: Functa,
    params: fj.MetaParams,
    sets: Mapping[str, Functaset],
    shown: str,
    images: np.ndarray,
) -> None:
    """What the figures show: one image of each class, the mean latent of each, all errors, a map of the latents."""
    found, train = sets[shown], sets["train"]
    classes = np.unique(train.labels)
    first = np.array([np.argmax(found.labels == label) for label in classes])
    means = np.stack([train.latents[train.labels == label].mean(axis=0) for label in classes])
    log = logs.Log(run.directory, 0)
    log.images(0, "originals", images[first])
    log.images(0, "reconstructions", functa.render(params, found.latents[first]))
    log.images(0, "class_means", functa.render(params, means))
    log.close()
    kinds = {name: [name] for name in ("train", "validation", "test") if name in sets}
    kinds |= {"copies of train": copies} if (copies := [name for name in sets if name not in kinds]) else {}
    psnr = {kind: np.concatenate([sets[name].psnr for name in names]) for kind, names in kinds.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(psnr.values())), bins=50)
    # The plane of the normalised latents in which the class means of the train split differ most.
    _, _, axes = np.linalg.svd((train.normalise(means) - train.normalise(means.mean(axis=0))).reshape(len(means), -1))
    flat = found.normalised[:_ON_THE_MAP].reshape(-1, axes.shape[1])
    record = {
        "edges": edges.tolist(),
        "shares": {kind: (np.histogram(v, edges)[0] / len(v)).tolist() for kind, v in psnr.items()},
        "means": {kind: float(np.mean(v, dtype=np.float64)) for kind, v in psnr.items()},
        "map": (flat @ axes[:2].T).round(3).tolist(),
        "map_labels": found.labels[: len(flat)].tolist(),
        "class_names": [data.class_name(dataset, int(label)) for label in classes],
        "shown": shown,
    }
    write_atomically(run.directory / "statistics.jsonl", json.dumps(record) + "\n")


def _content(config: Config, functa: Functa, model: str, dataset: str, sets: Mapping[str, Functaset]) -> dict[str, Any]:
    timed = [part.metadata for part in sets.values() if part.metadata["timed_images"]]
    seconds = sum(part["seconds"] for part in timed)
    speed = sum(part["timed_images"] for part in timed) / seconds if seconds else None
    latent_shape = list(sets["train"].latents.shape[1:])
    mean_psnr = {name: float(np.mean(part.psnr, dtype=np.float64)) for name, part in sets.items()}
    metrics = {
        **{f"{name}_psnr": value for name, value in mean_psnr.items()},
        **{f"{name}_images": len(part) for name, part in sets.items()},
        "images_per_second": speed,
        "latent_shape": latent_shape,
        "values_per_image": int(np.prod(functa.image_shape)),
        "inner_steps": functa.inner_steps,
        "dataset": dataset,
        "model": model,
    }
    rows = [
        [name, len(part), mean_psnr[name], *np.percentile(part.psnr, [5, 50, 95]).round(2).tolist()]
        for name, part in sets.items()
    ]
    size = " x ".join(map(str, latent_shape))
    pace = f", {speed:.0f} images/s" if speed else ""
    return {
        "metrics": metrics,
        "table": {
            "title": f"{dataset} as latents of {size} values, fitted in {functa.inner_steps} steps{pace}",
            "columns": ["part", "images", "PSNR, mean, dB", "lowest 5 % below", "median", "highest 5 % above"],
            "rows": rows,
        },
        "comparisons": [],
        "figures": ["reconstructions.png", "psnr.png", "latents.png"],
    }


def draw(directory: Path, result: dict[str, Any]) -> None:
    """Draws the figures of a finished run from its logs and result."""
    images = directory / "images.jsonl"
    (record,) = logs.read_lines(directory / "statistics.jsonl")
    metrics, shown = result["metrics"], record["shown"]
    size = " x ".join(map(str, metrics["latent_shape"]))
    image_plots.image_rows(
        {
            "original": logs.read_images(images, "originals")[0],
            "its latent": logs.read_images(images, "reconstructions")[0],
            "mean latent\nof the class": logs.read_images(images, "class_means")[0],
        },
        directory / "reconstructions.png",
        title=f"{metrics['dataset']}, {shown} images from the stored latents of {size} values",
    )
    plots.histogram(
        record["edges"],
        record["shares"],
        directory / "psnr.png",
        title=f"{metrics['dataset']}: how well each image is fitted in {metrics['inner_steps']} steps",
        x_label="PSNR of one image, dB",
        y_label="share of the images",
        means=record["means"],
    )
    plots.scatter(
        np.array(record["map"]),
        np.array(record["map_labels"]),
        record["class_names"],
        directory / "latents.png",
        title=f"{metrics['dataset']}: {len(record['map'])} {shown} latents, normalised,\n"
        "on the plane in which the class means of the train split differ most",
    )
