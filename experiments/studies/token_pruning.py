"""Fewer tokens in a trained ViT: DynamicViT, CP-ViT, patch skipping and merging, side by side.

References: report A, section 2.5 and Table 8; report B, section 2.3 and Tables 6-7; report C.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments import data, finetuning, token_figures, token_methods, token_skipping, token_training, training
from experiments.classification import percent
from experiments.finetuning import FineTuning
from experiments.parts import part, recorded
from experiments.runs import Run
from experiments.studies.token_presets import PRESETS as PRESETS
from experiments.studies.token_presets import Config
from experiments.token_methods import Profile, Series
from experiments.token_tables import comparisons, table
from experiments.trained import Base, load_base
from experiments.training import PyTree
from prune_jax import flops, speed_up
from prune_jax.models import ViT
from prune_jax.tokens import (
    CPViT,
    PatchSkip,
    TokenMethod,
    cut_heads,
    layer_ratios,
    least_heads,
    token_costs,
)

SUMMARY = "Drop, skip or merge the tokens of a trained ViT: accuracy, FLOPs and latency of five methods"
Row = dict[str, Any]


def run(config: Config, run: Run) -> dict[str, Any]:
    """Trains what each method learns and measures all; returns metrics, table, comparisons, figures."""
    check(config)
    base = load_base(run.options, config.base, training.data_mesh())
    check_reach(config, token_methods.vit_of(base))
    finetuning.check(_plan(config, config.epochs, config.learning_rate), len(base.train.labels))
    study = _Study(config, base, run)
    rows = study.untrained() + study.trained()
    thresholds = study.thresholds()
    study.add_latencies(rows, thresholds)
    metrics = {
        "dataset": base.config.dataset,
        "dense": study.dense(),
        "rows": rows,
        "thresholds": thresholds,
        "heads": study.heads(),
        "profile": token_figures.summary(study.profile),
        "similarity": study.similarity(),
    }
    shown = study.shown()
    token_figures.keep_pictures(run, base, shown, study.profile)
    return {
        "metrics": metrics,
        "table": table(config.base, metrics),
        "comparisons": comparisons(config, metrics),
        "figures": token_figures.names(config, rows, [name for name, _, _ in shown]),
    }


def check(config: Config) -> None:
    """Refuses, before anything is loaded, numbers that make no sense.

    Raises:
      ValueError: names the field, its value and what would be right.
    """
    if unknown := [name for name in config.series if name not in token_methods.TITLES]:
        raise ValueError(f"series must be among {', '.join(token_methods.TITLES)}, got {unknown}")
    for name in ("keep_rates", "classifier", "joint", "finetuned", "others_finetuned"):
        if bad := [rate for rate in getattr(config, name) if not 0 < rate <= 1]:
            raise ValueError(f"{name} must be above 0 and at most 1, got {bad}")
    if not 0 < config.predictor_keep <= 1:
        raise ValueError(f"predictor_keep must be above 0 and at most 1, got {config.predictor_keep}")
    if bad := [t for t in config.cosine_thresholds if not 0 < t < 1]:
        raise ValueError(f"cosine_thresholds must be between 0 and 1, got {bad}")
    if not config.cosine_thresholds or not config.keep_rates or not config.series:
        raise ValueError("cosine_thresholds, keep_rates and series need at least one entry each")
    lowest = min(*config.keep_rates, *config.finetuned, *config.others_finetuned, 1.0)
    if {"cp", "cp-merge"} & set(config.series) and lowest < 0.05:
        raise ValueError(f"CP-ViT keeps at least 0.05 of the patches, got a keep rate of {lowest}")
    if bad := [rate for rate in config.timed if rate not in config.keep_rates]:
        raise ValueError(f"timed must be among the keep_rates {config.keep_rates}, got {bad}")
    for name in ("calibration_images", "scorer_images", "scorer_steps", "batch_size", "repeats"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    if config.test_images is not None and config.test_images < 1:
        raise ValueError(f"test_images must be at least 1, or None for all, got {config.test_images}")
    if bad := [batch for batch in config.batches if batch < 1]:
        raise ValueError(f"batches must be at least 1, got {bad}")
    rates = ("learning_rate", "joint_learning_rate", "own_learning_rate", "scorer_learning_rate")
    for name in ("sharpness", "learn_epochs", "joint_epochs", "epochs", *rates):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be above 0 and finite, got {getattr(config, name)}")


def check_reach(config: Config, model: ViT) -> None:
    """Refuses, before anything is trained or measured, keep rates that no method reaches on this model.

    A rate that only some methods reach is measured of those.

    Raises:
      ValueError: no method reaches any of `keep_rates`, or one of `timed`.
    """
    reached = [k for k in config.keep_rates if any(token_methods.reaches(s, k, model) for s in config.series)]
    least = f"on this base ToMe keeps at least {token_methods.least_merged(model):.3g} of the patches"
    if not reached:
        raise ValueError(f"keep_rates must have one that a method reaches: {least}, got {config.keep_rates}")
    if bad := [rate for rate in config.timed if rate not in reached]:
        raise ValueError(f"timed must be reached by a method: {least}, got {bad}")


def draw(directory: Path, result: dict[str, Any]) -> None:
    """Draws the figures of a finished run from its logs and result."""
    token_figures.draw(directory, result)


def _plan(config: Config, epochs: float, rate: float) -> FineTuning:
    return FineTuning(epochs, config.batch_size, rate)


class _Study:
    """What the parts of one run share: the base, what was learned beside it, and the numbers of the calibration."""

    def __init__(self, config: Config, base: Base, run: Run):
        self.config, self.base, self.run = config, base, run
        self.model = token_methods.vit_of(base)
        self.test = data.Split(base.test.images[: config.test_images], base.test.labels[: config.test_images])
        self.profile: Profile = token_methods.profile(base, config.calibration_images)
        self.ratios = partial(layer_ratios, self.profile.ranges, sharpness=config.sharpness)
        self.inputs = token_methods.calibration(base, config.calibration_images)
        scorers = token_methods.scorers_of(self.model)
        self._watch = jax.jit(lambda params, x: scorers.apply({"params": params}, x, method="watch"))
        last = config.cosine_thresholds[-1]
        self.predictors = self._learn_predictors() if self._has("dynamic", "dynamic-merge") else {}
        self.scorers = self._learn_scorers() if self._has("skip") else {}
        self.seen = jax.device_get(self._watch(self.scorers[last], self.inputs)) if self.scorers else None

    def _has(self, *series: str) -> bool:
        return any(name in self.config.series for name in series)

    def build(self, series: Series, keep: float) -> TokenMethod:
        scores = self.seen.scores if self.seen is not None else np.zeros((1, 1, 1))
        return token_methods.build(series, keep, self.model, self.ratios, scores)

    def params(self, series: Series) -> PyTree:
        """The base's parameters with what the method has learned beside it."""
        if series in ("dynamic", "dynamic-merge"):
            return self.predictors
        return self.scorers[self.config.cosine_thresholds[-1]] if series == "skip" else {"model": self.base.params}

    def dense(self) -> Row:
        def make(own: Run) -> Row:
            del own
            measured = self.base.measure(self.base.params, self.test)
            return {
                **percent(measured),
                "flops": self._flops(self.model, self.base.params),
                "images": len(self.test.labels),
            }

        return recorded(self.run, "dense", make)

    def untrained(self) -> list[Row]:
        """Every method at every keep rate it reaches, the ViT as it is."""
        pairs = [(s, k) for s in self.config.series for k in self.config.keep_rates]
        return [
            self._row(f"{s}-{k:g}", s, k, "none", partial(self._as_it_is, s))
            for s, k in pairs
            if token_methods.reaches(s, k, self.model)
        ]

    def trained(self) -> list[Row]:
        """The methods after training of the classifier, of everything, or of the ViT."""
        config = self.config
        rows = []
        if "dynamic" in config.series:
            for keep in config.classifier:
                make = partial(self._finetune, "dynamic", keep, token_training.classifier)
                rows.append(self._row(f"classifier-{keep:g}", "dynamic", keep, "classifier", make))
            for keep in sorted(config.joint, reverse=True):
                make = partial(self._joint, keep)
                rows.append(self._row(f"joint-{keep:g}", "dynamic", keep, "joint", make))
        others = ("tome", "cp-merge", "dynamic-merge", "skip")
        wanted = {"cp": config.finetuned, **dict.fromkeys(others, config.others_finetuned)}
        for series in [s for s in config.series if s in wanted]:
            for keep in [k for k in wanted[series] if token_methods.reaches(series, k, self.model)]:
                make = partial(self._finetune, series, keep, token_training.of_the_vit)
                rows.append(self._row(f"{series}-{keep:g}-trained", series, keep, "ViT", make))
        return rows

    def thresholds(self) -> list[Row]:
        """Patch skipping as reported, by threshold, and in the form that truly computes less, as much in the mean."""
        rows = []
        for t in self.scorers:
            for attend in ("kept", "all"):
                name = f"threshold-{t:g}-{attend}"
                by_threshold = recorded(self.run, name, partial(self._threshold, t, attend))
                fixed = partial(self._capacity, t, attend, by_threshold["kept"])
                rows += [by_threshold, recorded(self.run, f"{name}-capacity", fixed)]
        return rows

    def add_latencies(self, rows: list[Row], thresholds: list[Row]) -> None:
        """Adds the latency to untrained rows at the keep rates that are timed, and to those of fixed capacity.

        A part of its own, measured after all training: where the machine was busy, this part alone can be made again.
        """
        methods = {
            f"{row['series']}-{row['keep']:g}": (
                row,
                self.build(row["series"], row["keep"]),
                self.params(row["series"]),
            )
            for row in rows
            if row["trained"] == "none" and row["keep"] in self.config.timed
        }
        for row in thresholds:
            if row["form"] == "capacity":
                t, attend = row["cosine_threshold"], row["attend"]
                methods[f"threshold-{t:g}-{attend}"] = row, self._of_capacity(attend, row["kept"]), self.scorers[t]

        def make(own: Run) -> Row:
            del own
            return {name: self._latency(method, params) for name, (_, method, params) in methods.items()}

        for name, times in recorded(self.run, "latency", make).items():
            methods[name][0]["latency"] = times

    def heads(self) -> Row | None:
        """CP-ViT's cascade of heads, alone and with a fifth of the patches merged."""
        if "cp" not in self.config.series or len({len(h) for h in self.profile.heads}) > 1:
            return None

        def make(own: Run) -> Row:
            del own
            number = len(self.profile.heads[0])
            ratios = self.ratios(min(1.2 / number, 0.5))  # one or two heads gone by the end
            kept = least_heads([jnp.asarray(h) for h in self.profile.heads], ratios)
            model, cut = cut_heads(self.model, {"params": self.base.params}, kept)
            method = CPViT(model, self.ratios(0.2), merge=True)
            params = {"model": cut["params"]}
            row = {"kept": [list(h) for h in kept], "patch_ratio": 0.2}
            return {**row, **self._measured(method, params), "alone": self._measured(CPViT(model), params)}

        return recorded(self.run, "heads", make)

    def similarity(self) -> dict[str, Any] | None:
        """How similar each block leaves the patches of test images; how right the scorers of each threshold are."""
        if not self.scorers:
            return None
        inputs = self.base.prepare(jnp.asarray(self.test.images[: self.config.calibration_images]))
        said = {t: self._watch(params, inputs) for t, params in self.scorers.items()}
        mean = np.asarray(next(iter(said.values())).similarity).mean(axis=(0, 2))
        return {"mean": mean.tolist(), "scorers": {f"{t:g}": token_skipping.quality(s, t) for t, s in said.items()}}

    def shown(self) -> list[tuple[str, TokenMethod, PyTree]]:
        """The methods whose decisions are drawn."""
        shown: list[tuple[str, TokenMethod, PyTree]] = []
        for series in self.config.series:
            for keep in token_figures.SHOWN[series]:
                if token_methods.reaches(series, keep, self.model):
                    shown.append((f"{series}-{keep:g}", self.build(series, keep), self.params(series)))
        return shown

    def _row(self, name: str, series: Series, keep: float, trained: str, make: Callable[[Run], PyTree]) -> Row:
        def record(own: Run) -> Row:
            method, params = self.build(series, keep), make(own)
            return {"series": series, "keep": keep, "trained": trained, **self._measured(method, params)}

        return recorded(self.run, name, record)

    def _measured(self, method: TokenMethod, params: PyTree) -> Row:
        return {
            **percent(self.base.measure(params, self.test, model=method)),
            "flops": self._flops(method, params),
            "tokens": list(method.tokens),
        }

    def _latency(self, method: TokenMethod, params: PyTree) -> dict[str, Row]:
        config = self.config
        costs = token_costs(method, {"params": params}, batches=config.batches, repeats=config.repeats)
        return {
            str(batch): {
                "seconds": times.median,
                "dense_seconds": costs.dense_latency[batch].median,
                "speed_up": speed_up(costs.dense_latency[batch], times),
            }
            for batch, times in costs.latency.items()
        }

    def _as_it_is(self, series: Series, own: Run) -> PyTree:
        del own
        return self.params(series)

    def _learn_predictors(self) -> PyTree:
        config = self.config
        method = token_methods.predictors_of(self.model, config.predictor_keep)
        start = token_methods.begin(method, self.base, config.seed)
        plan = _plan(config, config.learn_epochs, config.own_learning_rate)
        loss = token_training.dynamic_loss(method, self.base)
        own = part(self.run, "predictors")
        return token_training.train(own, self.base, start, loss, plan, token_training.of_the_method, seed=config.seed)

    def _learn_scorers(self) -> dict[float, PyTree]:
        config, base = self.config, self.base
        method = token_methods.scorers_of(self.model)
        start = token_methods.begin(method, base, config.seed)
        seen = token_skipping.observe(method, base, config.scorer_images, config.seed)
        images = min(config.batch_size, len(seen["means"]))
        plan = token_skipping.Plan(config.scorer_steps, images, config.scorer_learning_rate)
        learned = {}
        for t in config.cosine_thresholds:
            own = part(self.run, f"scorers-{t:g}")
            learned[t] = token_skipping.learn(own, base, method, start, seen, t, plan, seed=config.seed)
        return learned

    def _joint(self, keep: float, own: Run) -> PyTree:
        """Predictors and ViT trained together, on from those of the next larger keep rate."""
        config = self.config
        larger = min((k for k in config.joint if k > keep), default=None)
        start = self._joint(larger, part(self.run, f"joint-{larger:g}")) if larger else self.predictors
        method = token_methods.predictors_of(self.model, keep)
        plan = _plan(config, config.joint_epochs, config.joint_learning_rate)
        loss = token_training.dynamic_loss(method, self.base)
        return token_training.train(own, self.base, start, loss, plan, token_training.everything, seed=config.seed)

    def _finetune(self, series: Series, keep: float, trained: Callable[[str], bool], own: Run) -> PyTree:
        config, params = self.config, self.params(series)
        plan = _plan(config, config.epochs, config.learning_rate)
        wrap = token_training.only(trained, params)
        method = self.build(series, keep)
        return finetuning.finetune(
            own, self.base, params, plan, seed=config.seed, model=method, wrap=wrap, validate=False
        )

    def _threshold(self, cosine_threshold: float, attend: str, own: Run) -> Row:
        del own
        params = self.scorers[cosine_threshold]
        method = PatchSkip(self.model, attend=cast(Any, attend))
        trace = jax.jit(lambda p, x: method.apply({"params": p}, x, method="trace"))(params, self.inputs)
        kept = np.asarray(trace.kept).mean(axis=(0, 2))
        return {
            "form": "threshold",
            "cosine_threshold": cosine_threshold,
            "attend": attend,
            **self._measured(method, params),
            "patches": trace.kept.shape[-1],
            "patches_skipped": float((1 - kept).mean() * trace.kept.shape[-1]),
            "kept": kept.tolist(),
        }

    def _capacity(self, cosine_threshold: float, attend: str, kept: list[float], own: Run) -> Row:
        """Each block computes for every image as many patches as the threshold gives it in the mean."""
        del own
        params, patches = self.scorers[cosine_threshold], self.model.grid[0] * self.model.grid[1]
        method = self._of_capacity(attend, kept)
        return {
            "form": "capacity",
            "cosine_threshold": cosine_threshold,
            "attend": attend,
            **self._measured(method, params),
            "patches": patches,
            "patches_skipped": patches - float(np.mean(method.counts)),
            "kept": kept,
        }

    def _of_capacity(self, attend: str, kept: list[float]) -> PatchSkip:
        patches = self.model.grid[0] * self.model.grid[1]
        return PatchSkip(self.model, tuple(max(share, 1 / patches) for share in kept), attend=cast(Any, attend))

    def _flops(self, method: nn.Module, params: PyTree) -> int:
        """Of one image."""
        return flops(method.apply, {"params": params}, self.inputs[:1])
