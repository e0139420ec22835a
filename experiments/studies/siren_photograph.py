"""What a SIREN knows of a photograph besides its pixels: derivatives, what is between them, what is around them."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import functa_jax as fj
from experiments import classical, image_plots, logs
from experiments.models.siren import Fitted
from experiments.pictures import to_bytes

FIGURES = ["derivatives.png", "zoom.png", "extension.png"]

_ZOOM = 4
_LIMIT = 2.0  # half the side of the square that the extension shows; the image has 1


def measure(fitted: Fitted, original: np.ndarray, image: np.ndarray, log: logs.Log) -> dict[str, float]:
    """Measures the first network of a fit, and logs the images of the figures.

    Args:
      fitted: the fit to `image`.
      original: the photograph as it came, uint8 (H, W, C).
      image: resized, uint8 (h, w, C).
      log: of the run.

    Returns:
      metrics: correlation of the network's derivatives with the finite differences of the image, and their size
      relative to those; PSNR of enlargements to the original's size, dB.
    """
    height, width, _ = image.shape
    metrics: dict[str, float] = {}
    unit = image.astype(np.float32) / 255
    params = jax.tree.map(lambda x: x[0], fitted.params)
    grid = fj.coordinate_grid((height, width))
    _, gradient, laplacian = jax.device_get(fj.derivatives(fitted.model.apply, params, grid))
    network = {"gradient": np.linalg.norm(gradient.mean(axis=-2), axis=-1), "laplacian": laplacian.mean(axis=-1)}
    differences = _differences(unit.mean(axis=-1))
    for name, expected in differences.items():
        scale = float(np.quantile(np.abs(expected), 0.99))
        for source, values in (("image", expected), ("network", network[name])):
            centred = 0.5 + 0.5 * values / scale if name == "laplacian" else values / scale
            log.images(0, f"{source}_{name}", to_bytes(centred)[None, ..., None])
        metrics[f"{name}_correlation"] = float(np.corrcoef(expected.ravel(), network[name].ravel())[0, 1])
        metrics[f"{name}_relative_size"] = float(np.sqrt(np.mean(network[name] ** 2) / np.mean(expected**2)))
    log.images(0, "image", image[None])
    log.images(0, "network", to_bytes(fitted.render((height, width))[:1]))

    truth = original.astype(np.float32) / 255
    for name, enlarge in (
        ("siren", lambda shape: fitted.render(shape)[0]),
        ("bicubic", lambda s: classical.bicubic(unit[None], s)[0]),
    ):
        enlarged = np.clip(enlarge(truth.shape[:2]), 0, 1)
        metrics[f"{name}_enlarged_psnr"] = float(fj.psnr(jnp.asarray(enlarged), jnp.asarray(truth)))
        log.images(0, f"{name}_enlarged", to_bytes(enlarge((_ZOOM * height, _ZOOM * width)))[None])
    log.images(0, "original", original[None])
    log.images(0, "extension", to_bytes(fitted.render((2 * height, 2 * width), limit=_LIMIT)[:1]))
    return metrics


def _differences(grey: np.ndarray) -> dict[str, np.ndarray]:
    """Gradient's length and Laplacian of an image (h, w) by central differences, per unit of coordinate."""
    steps = [2 / n for n in grey.shape]
    padded = np.pad(grey, 1, mode="edge")
    second = [np.diff(padded, 2, axis=axis) / step**2 for axis, step in enumerate(steps)]
    return {
        "gradient": np.linalg.norm(np.stack(np.gradient(grey, *steps)), axis=0),
        "laplacian": second[0][:, 1:-1] + second[1][1:-1, :],
    }


def draw(directory: Path, result: dict[str, Any]) -> None:
    """Draws `FIGURES` from the logged images."""
    metrics, name = result["metrics"], result["config"]["source"]
    records = logs.read_lines(directory / "images.jsonl")
    found = {r["name"]: logs.decode_png(r["png"][0]) for r in records if r["name"] != "originals"}
    image_plots.image_rows(
        {
            source: [found[source], found[f"{source}_gradient"], found[f"{source}_laplacian"]]
            for source in ("image", "network")
        },
        directory / FIGURES[0],
        title=f"{name}: the SIREN's derivatives (by jvp) and the image's differences, same scale",
        captions={
            "image": ["resized photograph", "length of the gradient (differences)", "Laplacian (differences)"],
            "network": [
                "SIREN",
                f"length of the gradient: correlation {metrics['gradient_correlation']:.3f}",
                f"Laplacian: correlation {metrics['laplacian_correlation']:.3f}",
            ],
        },
        cell=2.6,
    )
    enlarged = {kind: found[f"{kind}_enlarged"] for kind in ("bicubic", "siren")}
    whole = [enlarged["bicubic"], enlarged["siren"], found["original"]]
    high, wide = found["original"].shape[:2]
    low = found["image"].shape[:2]
    image_plots.image_rows(
        {"whole": whole, "part": [_part(image) for image in whole]},
        directory / FIGURES[1],
        title=f"{name}: {low[0]}x{low[1]} enlarged to {enlarged['siren'].shape[0]}x{enlarged['siren'].shape[1]}; "
        f"PSNR at the original's {high}x{wide}",
        captions={
            "whole": [
                *(f"{kind}: {metrics[f'{kind}_enlarged_psnr']:.2f} dB" for kind in ("bicubic", "siren")),
                f"original, {high}x{wide}",
            ]
        },
        cell=2.6,
    )
    image_plots.image_rows(
        {"": [_framed(found["extension"])]},
        directory / FIGURES[2],
        title=f"{name}: the SIREN on [-{_LIMIT:g}, {_LIMIT:g}], fitted in the frame",
        cell=6.0,
    )


def _part(image: np.ndarray) -> np.ndarray:
    """A third of the height and width at the bottom, where the rocket photograph has lattices and lights."""
    height, width, _ = image.shape
    return image[height * 2 // 3 :, width // 6 : width // 2]


def _framed(image: np.ndarray) -> np.ndarray:
    """Marks the square [-1, 1] of the extension in red."""
    height, width, _ = image.shape
    top, left = round(height * (1 - 1 / _LIMIT) / 2), round(width * (1 - 1 / _LIMIT) / 2)
    framed = np.array(np.broadcast_to(image, (height, width, 3)))
    red = np.array([200, 30, 30], np.uint8)
    framed[[top - 1, height - top], left - 1 : width - left + 1] = red
    framed[top - 1 : height - top + 1, [left - 1, width - left]] = red
    return framed
