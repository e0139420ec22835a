"""Adapters for the published torch code of PX, which also has SNIP and GraSP: one scoring of ResNet-20 a tick."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.turns import Setting


def score(clock: Iterator[None], peers: Path, s: Setting, criterion: str) -> None:
    """`Pruner.score` of a criterion, on a ResNet-20 in training mode, with its own data loader."""
    import torch

    if importlib.util.find_spec("tqdm") is None:  # which only draws a bar
        import types

        sys.modules["tqdm"] = types.ModuleType("tqdm")
        sys.modules["tqdm"].tqdm = lambda batches: batches  # type: ignore[attr-defined]
    sys.path.insert(0, str(peers / "px-ntk-pruning"))
    from globals import CONFIG
    from lib import pruners
    from lib.generator import masked_parameters
    from lib.models.lottery_resnet import resnet20
    from torch.utils.data import DataLoader, TensorDataset

    CONFIG.update(dataset="CIFAR10", batch_size=s.batch)
    CONFIG.experiment_args = {"batch_limit": 1, "examples_per_class": s.batch}
    images = TensorDataset(torch.randn(s.batch, s.channels, s.size, s.size), torch.arange(s.batch) % 10)
    images.targets = [0] * s.batch  # one class to draw all examples from, whatever their labels
    model = resnet20(10).train()
    pruner = getattr(pruners, criterion)(masked_parameters(model))
    loader = DataLoader(images, batch_size=s.batch)
    for _ in clock:
        pruner.score(model, torch.nn.CrossEntropyLoss(), loader, "cpu")
