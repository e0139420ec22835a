"""The figures of coupled layers come from a plain table."""

import json

import jax.numpy as jnp

from experiments.dependency_figures import dependency_graph, dependency_matrix
from prune_jax.graph import dependency_groups


def test_both_are_drawn(tmp_path):
    params = {"a": jnp.ones((3, 8)), "c": jnp.ones(8), "b": jnp.ones((8, 2))}
    groups = dependency_groups(lambda p, x: jnp.tanh(x @ p["a"] + p["c"][None]) @ p["b"], params, jnp.ones((1, 3)))
    table = json.loads(json.dumps(groups.table()))
    dependency_graph(table, tmp_path / "graph.png", title="a network")
    dependency_matrix(table, tmp_path / "matrix.png", title="a network")
    assert all((tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG" for name in ("graph", "matrix"))
