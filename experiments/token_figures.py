"""Figures of a comparison of token methods: what is kept, what attention looks at, accuracy against cost."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat

from experiments import image_plots, logs, pictures, plots
from experiments.runs import Run
from experiments.studies.token_presets import Config
from experiments.token_methods import TITLES, Profile, stages, vit_of
from experiments.trained import Base
from experiments.training import PyTree
from prune_jax.tokens import DynamicViT, TokenMethod

PICTURES = 8  # test images shown
GONE = 221  # grey of patches that are not computed
# keep rates whose decisions are drawn
SHOWN: dict[str, tuple[float, ...]] = {
    "dynamic": (0.8, 0.3),
    "cp": (0.5,),
    "skip": (0.5,),
    "tome": (0.5,),
    "cp-merge": (),
    "dynamic-merge": (),
}
FILES = {"dynamic": "kept.png", "cp": "cascade.png", "skip": "skipped.png", "tome": "merged.png"}


def names(config: Config, rows: Sequence[dict[str, Any]], shown: Sequence[str]) -> list[str]:
    """The figures of a run that have something to show.

    Args:
      config: of the run.
      rows: of its metrics.
      shown: names of the methods whose decisions are drawn, such as "tome-0.5".
    """
    drawn = {name.rsplit("-", 1)[0] for name in shown}
    of_series = [FILES[series] for series in config.series if series in FILES and series in drawn]
    similarity = ["similarity.png"] if "skip" in config.series else []
    timed = ["latency.png"] if any(row.get("latency") for row in rows) else []
    return ["flops.png", *timed, "tokens.png", *of_series, *similarity, "attention.png", "informativeness.png"]


def summary(profile: Profile) -> dict[str, Any]:
    """What of a profile goes into the result: ranges, and how informativeness is spread in each block."""
    scores = profile.patches / np.array([len(h) for h in profile.heads])[None, :, None]
    edges = np.linspace(0, float(np.quantile(scores, 0.995)), 41)
    shares = [np.histogram(scores[:, i], edges)[0] / scores[:, i].size for i in range(scores.shape[1])]
    return {
        "ranges": list(profile.ranges),
        "edges": edges.tolist(),
        "shares": [share.tolist() for share in shares],
        "means": scores.mean(axis=(0, 2)).tolist(),
    }


def keep_pictures(run: Run, base: Base, shown: Sequence[tuple[str, TokenMethod, PyTree]], profile: Profile) -> None:
    """Logs what the figures show of images: decisions of each method on the first test images, attention maps."""
    model = vit_of(base)
    images = base.test.images[:PICTURES]
    log = logs.Log(run.directory, -1, enabled=run.first_process)
    log.images(0, "originals", images)
    inputs = base.prepare(jnp.asarray(images))
    for name, method, params in shown:
        trace = jax.jit(lambda p, x, m=method: m.apply({"params": p}, x, method="trace"))(params, inputs)
        blocks = stages(model) if isinstance(method, DynamicViT) else _some_blocks(model.depth)
        for block in blocks:
            drawn = decided(images, np.asarray(trace.owner[:, block]), model.grid)
            log.images(0, f"{name}-block-{block + 1}", drawn)
    brightest = np.quantile(profile.maps, 0.995, axis=(1, 2), keepdims=True)
    maps = np.clip(profile.maps / brightest, 0, 1)
    log.images(0, "attention", np.rint(255 * maps).astype(np.uint8)[..., None])
    log.close()


def decided(images: np.ndarray, owner: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Images as a block sees them: grey where nobody carries a patch, the mean of all that one token carries.

    Args:
      images: uint8 (B, H, W, C).
      owner: of each patch (B, patches), -1: nobody.
      grid: rows and columns of patches.

    Returns:
      uint8 images.
    """
    rows, columns = grid
    if images.shape[1] % rows or images.shape[2] % columns:
        images = pictures.resize(images, 8 * rows, 8 * columns)
    patches = rearrange(images, "b (i p) (j q) c -> b (i j) p q c", i=rows, j=columns).astype(float)
    together = (owner[:, :, None] == owner[:, None]) & (owner >= 0)[:, :, None]
    members = np.maximum(together.sum(axis=2), 1)[..., None, None, None]
    mean = np.einsum("bnm,bmpqc->bnpqc", together, patches) / members
    mean = np.where((owner >= 0)[..., None, None, None], mean, GONE)
    return rearrange(np.rint(mean).astype(np.uint8), "b (i j) p q c -> b (i p) (j q) c", i=rows)


def draw(directory: Path, result: dict[str, Any]) -> None:
    """Draws the figures of a finished run from its logs and result."""
    metrics, wanted = result["metrics"], set(result["figures"])
    on = f"{result['config']['base']} on {metrics['dataset']}"
    _draw_flops(directory, metrics, result["config"], on)
    if "latency.png" in wanted:
        _draw_latency(directory, metrics, on)
    _draw_tokens(directory, metrics, on)
    for series, file in FILES.items():
        if file in wanted:
            _draw_decisions(directory, series, on)
    if "similarity.png" in wanted:
        _draw_similarity(directory, metrics, on)
    ranges = metrics["profile"]["ranges"]
    maps = logs.read_images(directory / "images.jsonl", "attention")[0]
    scale = max(1, round(96 / maps.shape[1]))
    image_plots.image_rows(
        {"a query a row,\na key a column": repeat(maps, "n h w c -> n (h a) (w b) c", a=scale, b=scale)},
        directory / "attention.png",
        title=f"{on}: attention among patches, mean over heads",
        cell=1.5,
        captions={
            "a query a row,\na key a column": [f"block {i}: range {r:.2f}" for i, r in enumerate(ranges, start=1)]
        },
    )
    profile = metrics["profile"]
    plots.histogram(
        profile["edges"],
        {f"block {i}": shares for i, shares in enumerate(profile["shares"], start=1)},
        directory / "informativeness.png",
        title=f"{on}: how informative the patches are",
        x_label="largest attention probability a patch receives, mean over heads (99.5 % of them)",
        y_label="share of patches",
        means={f"block {i}": mean for i, mean in enumerate(profile["means"], start=1)},
    )


def _some_blocks(depth: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, depth - 1, min(depth, 6))})


def _line(rows: Sequence[dict[str, Any]], x: Sequence[float]) -> tuple[list[float], list[float]]:
    """Points of a line, by x."""
    points = sorted(zip(x, [row["accuracy"] for row in rows], strict=True))
    return [p[0] for p in points], [p[1] for p in points]


def _draw_flops(directory: Path, metrics: dict[str, Any], config: dict[str, Any], on: str) -> None:
    """Only lines of the ViT as it is start at the dense one: where training went on, no dense one had the same."""
    dense = metrics["dense"]
    as_it_is, after = "the ViT as it is", f"trained on, {config['epochs']:g} epochs"
    jointly = f"{{}}, jointly, {config['joint_epochs']:g} epochs\nat each rate from the largest down"
    titles = {"none": "{}", "ViT": "{}", "classifier": "{}, classifier alone", "joint": jointly}
    panels: dict[str, dict[str, Any]] = {as_it_is: {}, after: {}}
    for how, title in titles.items():
        for series in TITLES:
            rows = [r for r in metrics["rows"] if r["series"] == series and r["trained"] == how]
            if rows and how == "none":
                rows = [*rows, dense]
            if rows:
                shares = [100 * row["flops"] / dense["flops"] for row in rows]
                panels[as_it_is if how == "none" else after][title.format(TITLES[series])] = _line(rows, shares)
    variants = {titles[how].format(name): name for how in ("classifier", "joint") for name in TITLES.values()}
    plots.panels(
        {name: lines for name, lines in panels.items() if lines},
        directory / "flops.png",
        title=f"{on}: accuracy against FLOPs",
        x_label="FLOPs, % of the dense model",
        y_label="accuracy on test, %",
        variants=variants,
    )


def _draw_latency(directory: Path, metrics: dict[str, Any], on: str) -> None:
    panels: dict[str, dict[str, Any]] = {}
    timed = [row for row in metrics["rows"] if "latency" in row]
    for batch in timed[0]["latency"]:
        lines = {}
        for series in TITLES:
            rows = [row for row in timed if row["series"] == series]
            if rows:
                shares = [100 / row["latency"][batch]["speed_up"] for row in rows]
                lines[TITLES[series]] = _line([*rows, metrics["dense"]], [*shares, 100.0])
        panels[f"batch {batch}"] = lines
    plots.panels(
        panels,
        directory / "latency.png",
        title=f"{on}: accuracy against measured time, the ViT as it is",
        x_label="time, % of the dense model",
        y_label="accuracy on test, %",
    )


def _draw_tokens(directory: Path, metrics: dict[str, Any], on: str) -> None:
    untrained = [row for row in metrics["rows"] if row["trained"] == "none"]
    rates = sorted({row["keep"] for row in untrained}, key=lambda keep: abs(keep - 0.5))
    rows = [row for row in untrained if row["keep"] == rates[0]]
    alike: dict[tuple[int, ...], list[str]] = {}
    for row in rows:
        alike.setdefault(tuple(row["tokens"]), []).append(TITLES[row["series"]])
    of_stages = "; DynamicViT's rate is that of each stage" if any("dynamic" in r["series"] for r in rows) else ""
    plots.curves(
        {"\n".join(names): (range(1, len(tokens) + 1), tokens) for tokens, names in alike.items()},
        directory / "tokens.png",
        title=f"{on}: tokens that each block computes, keep rate {rates[0]:g}",
        x_label=f"block{of_stages}",
        y_label="tokens",
        bottom=0,
    )


def _draw_decisions(directory: Path, series: str, on: str) -> None:
    """Test images, a row for each drawn block."""
    path = directory / "images.jsonl"
    logged = {line["name"] for line in logs.read_lines(path)}
    rows = {"test images": logs.read_images(path, "originals")[0]}
    for keep in SHOWN[series]:
        blocks = sorted(int(name.rsplit("-", 1)[1]) for name in logged if name.startswith(f"{series}-{keep:g}-block-"))
        for block in blocks:
            rate = f"keep rate {keep:g}, " if len(SHOWN[series]) > 1 else ""
            rows[f"{rate}block {block}"] = logs.read_images(path, f"{series}-{keep:g}-block-{block}")[0]
    said = {
        "dynamic": "patches that DynamicViT keeps",
        "cp": "CP-ViT's cascade, keep rate 0.5",
        "skip": "patches that each block computes, keep rate 0.5",
        "tome": "patches that ToMe has merged, as their mean; keep rate 0.5",
    }
    image_plots.image_rows(rows, directory / FILES[series], title=f"{on}: {said[series]}", cell=0.9)


def _draw_similarity(directory: Path, metrics: dict[str, Any], on: str) -> None:
    mean, scorers = metrics["similarity"]["mean"], metrics["similarity"]["scorers"]
    blocks = range(1, len(mean) + 1)

    def lines(number: str, name: str) -> dict[str, Any]:
        return {name.format(t): (blocks, scorer[number]) for t, scorer in scorers.items()}

    threshold = "cosine threshold {}"
    plots.panels(
        {
            "scaled cosine before and after": {"mean over patches": (blocks, mean)},
            "share to be kept": lines("keep_share", threshold),
            "share that the MLP tells right": {
                **lines("accuracy", threshold),
                **lines("commoner", "the commoner answer, {}"),
            },
            "mean of both kinds' shares told right": {
                **lines("balanced_accuracy", threshold),
                "one answer for all": (blocks, [0.5] * len(mean)),
            },
        },
        directory / "similarity.png",
        title=f"{on}: how little each block changes a patch",
        x_label="block",
        y_label="",
        y_limits=(0, 1.05),
    )
