"""Groups against those derived by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph_architectures import ARCHITECTURES, data, weights
from graph_zeroing import check

from prune_jax.graph import UnknownPrimitiveError, dependency_groups, prune

X = data(4, 3)


def units(groups, kind="width"):
    """Every unit as a set of (path, axis, index), index a tuple."""
    found = []
    for group in groups:
        if group.kind == kind:
            for u in range(group.size):
                found.append(
                    frozenset(
                        (m.path, m.axis, tuple(map(int, i))) for m in group.members for i in m.indices[m.units == u]
                    )
                )
    return set(found)


def groups_of(name):
    fn, params, args = ARCHITECTURES[name]()
    return dependency_groups(fn, params, *args)


def test_mlp():
    first = {frozenset({("w0", 1, (k,)), ("b0", 0, (k,)), ("w1", 0, (k,))}) for k in range(8)}
    second = {frozenset({("w1", 1, (k,)), ("b1", 0, (k,)), ("w2", 0, (k,))}) for k in range(6)}
    groups = groups_of("mlp")
    assert units(groups) == first | second
    assert [g.size for g in groups] == [8, 6]
    assert len(groups.ties) == 2


def test_residual_cnn():
    groups = groups_of("resnet")
    assert sorted(g.size for g in groups) == [6, 8, 12]
    (stream,) = (g for g in groups if g.size == 8)
    assert {(m.path, m.axis) for m in stream.members} == {
        ("params/Conv_0/kernel", 3),
        ("params/Conv_0/bias", 0),
        ("params/Conv_1/kernel", 2),
        ("params/Conv_2/kernel", 3),
        ("params/Conv_2/bias", 0),
        ("params/Conv_3/kernel", 2),
        ("params/Conv_4/kernel", 2),
        *((f"{c}/BatchNorm_{i}/{p}", 0) for i in (0, 2) for c, p in (("params", "scale"), ("params", "bias"))),
        *((f"batch_stats/BatchNorm_{i}/{p}", 0) for i in (0, 2) for p in ("mean", "var")),
    }


def test_flatten_takes_every_place_of_a_channel():
    groups = groups_of("densenet")
    (last,) = (
        g
        for g in groups
        if {m.path for m in g.members} == {f"params/{n}" for n in ("Conv_2/kernel", "Conv_2/bias", "Dense_0/kernel")}
    )
    dense = next(m for m in last.members if m.path == "params/Dense_0/kernel")
    # 4x4 places of 14 channels; this layer's four channels are the last
    expected = {(u, (16 * 0 + place) * 14 + 10 + u) for u in range(4) for place in range(16)}
    assert {(int(u), int(i[0])) for u, i in zip(dense.units, dense.indices, strict=True)} == expected


def test_channels_are_found_again_behind_rows_that_cannot_go():
    channels = {frozenset({("a", 1, (k,)), ("bias", 0, (k,)), ("b", 2, (k,))}) for k in range(6)}
    assert units(groups_of("convolution_as_a_product")) == channels | {
        frozenset({("b", 3, (k,)), ("c", 0, (k,))}) for k in range(5)
    }


def test_uneven_chunks():
    bounds = {0: range(0, 4), 1: range(4, 7), 2: range(7, 12)}
    expected = {frozenset({("a", 1, (k,)), ("b", 0, (k,))}) for k in bounds[0]}
    expected |= {frozenset({("a", 1, (k,)), ("d", 0, (k - 4,))}) for k in [*bounds[1], *bounds[2]]}
    expected |= {frozenset({("b", 1, (k,)), ("c", 0, (k,))}) for k in range(5)}
    assert units(groups_of("uneven_chunk")) == expected


def test_attention_with_fused_projection_split_first():
    groups = groups_of("vit_split")
    qk = {frozenset({("qkv", 1, (4 * h + j,)), ("qkv", 1, (8 + 4 * h + j,))}) for h in range(2) for j in range(4)}
    v = {frozenset({("qkv", 1, (16 + 4 * h + j,)), ("proj", 0, (4 * h + j,))}) for h in range(2) for j in range(4)}
    stream = {frozenset({("embed", 1, (k,)), ("qkv", 0, (k,)), ("proj", 1, (k,)), ("head", 0, (k,))}) for k in range(6)}
    assert units(groups) == qk | v | stream
    heads = {
        frozenset(
            {("qkv", 1, (8 * part + 4 * h + j,)) for part in range(3) for j in range(4)}
            | {("proj", 0, (4 * h + j,)) for j in range(4)}
        )
        for h in range(2)
    }
    assert units(groups, "block") == heads
    # two heads tied in q-k, two in v, not with each other
    assert sorted(len(g) for g in groups.ties.values()) == [1, 1, 2, 2]


def test_one_reshape_for_q_k_and_v_ties_all_their_dims():
    assert sorted(len(g) for g in groups_of("vit_fused").ties.values()) == [1, 1, 1, 4]


def test_heads_of_three_dimensional_kernels_choose_their_own_dims():
    groups = groups_of("vit_linen")
    name = "params/MultiHeadDotProductAttention_0"
    qk = {
        frozenset(
            (f"{name}/{p}/{leaf}", 2 if leaf == "kernel" else 1, (h, j))
            for p in ("query", "key")
            for leaf in ("kernel", "bias")
        )
        for h in range(2)
        for j in range(4)
    }
    assert qk <= units(groups)
    assert len(units(groups, "block")) == 2


@pytest.mark.parametrize(
    ("net", "shapes"),
    [
        pytest.param(lambda p, h: h @ jnp.einsum("k,kio->io", p["g"], p["w"]), {"g": (4,), "w": (4, 8, 6)}, id="soup"),
        pytest.param(lambda p, h: h @ p["w"].reshape(8, 6), {"w": (48,)}, id="flat kernel"),
        pytest.param(
            lambda p, h: jnp.einsum("bi,ijk,bj->bk", h, p["w"], jnp.tanh(X @ p["g"])),
            {"g": (3, 5), "w": (8, 5, 6)},
            id="bilinear",
        ),
    ],
)
def test_units_made_one_by_one_are_no_blocks(net, shapes):
    """A layer's units stay single units where the next kernel has them beside another axis, or flat with it."""
    params = weights(e=(3, 8), o=(6, 2), **shapes)

    def whole(p, x):
        return jnp.tanh(net(p, jnp.tanh(x @ p["e"]))) @ p["o"]

    assert {g.kind for g in dependency_groups(whole, params, X)} == {"width"}
    assert check(whole, params, X, ratio=0.5, scope="local").params["e"].shape == (3, 4)


def test_heads_with_a_gate_of_their_own_are_blocks():
    def net(p, x):
        h = jnp.einsum("bc,chd->bhd", x, p["v"]) * jax.nn.sigmoid(x @ p["gate"])[:, :, None]
        return jnp.einsum("bhd,hdo->bo", h, p["o"])

    groups = dependency_groups(net, weights(v=(3, 4, 5), gate=(3, 4), o=(4, 5, 2)), X)
    assert sorted((g.kind, g.size) for g in groups) == [("block", 4), *[("width", 5)] * 4]


def test_grouped_query_attention():
    groups = groups_of("gqa")
    qk = {
        frozenset({("k", 1, (4 * h + j,)), ("q", 1, (8 * h + j,)), ("q", 1, (8 * h + 4 + j,))})
        for h in range(2)
        for j in range(4)
    }
    assert qk <= units(groups)
    one_query_head = {
        frozenset({(p, a, (4 * i + j,)) for p, a in (("q", 1), ("proj", 0)) for j in range(4)}) for i in range(4)
    }
    assert one_query_head <= units(groups, "block")
    assert len(units(groups, "block")) == 4 + 2  # query heads, and key-value heads with their two query heads


def test_scan_cuts_all_layers_alike():
    expected = {frozenset({("w1", 2, (k,)), ("w2", 1, (k,))}) for k in range(8)}
    assert expected < units(groups_of("scan_over_layers"))


def test_patch_merging_takes_four_copies():
    (stream,) = (g for g in groups_of("swin") if "embed" in {m.path for m in g.members})
    merge = next(m for m in stream.members if m.path == "merge")
    assert merge.each == 4
    np.testing.assert_array_equal(np.unique(merge.indices[merge.units == 2, 0]), [2, 8, 14, 20])


def test_tokens_of_a_mixer_do_not_change_but_its_hidden_tokens_do():
    sizes = {g.size: {m.path for m in g.members} for g in groups_of("mixer")}
    assert sizes[7] == {"t1", "t2"}
    assert 5 not in sizes


def test_pins_inputs_outputs_and_unused_parameters_stay():
    fn, params, args = ARCHITECTURES["mlp"]()
    params["unused"] = data(8, 8)
    groups = dependency_groups(fn, params, *args, pin=lambda path: path == "b0")
    assert {m.path for g in groups for m in g.members} == {"w1", "b1", "w2"}


@pytest.mark.parametrize("axis", [1, -1, (1,), [0, -1]])
def test_a_pinned_axis_stays_and_the_leaf_s_others_go(axis):
    fn, params, args = ARCHITECTURES["mlp"]()
    groups = dependency_groups(fn, params, *args, pin={"w1": axis})
    found = {(m.path, m.axis) for g in groups for m in g.members}
    first = {("w0", 1), ("b0", 0), ("w1", 0)}
    assert found == (set() if axis == [0, -1] else first)
    if found:
        small = prune(fn, params, *args, ratio=0.5, scope="local", pin={"w1": axis}).params
        assert small["w1"].shape == (4, 6)


@pytest.mark.parametrize(
    ("pin", "message"),
    [
        ({"w9": 0}, "pin names 'w9', which is no parameter; parameters are b0, b1, w0, w1, w2"),
        ({"w1": 2}, r"pin names axis 2 of 'w1', which has shape \(8, 6\)"),
        ({"w1": (0, -3)}, r"pin names axis -3 of 'w1'"),
    ],
)
def test_a_pin_of_what_is_not_there(pin, message):
    fn, params, args = ARCHITECTURES["mlp"]()
    with pytest.raises(ValueError, match=message):
        dependency_groups(fn, params, *args, pin=pin)


@pytest.mark.parametrize("axis", [1, 2])
def test_pinned_heads_still_lose_dims_and_pinned_dims_heads(axis):
    fn, params, args = ARCHITECTURES["vit_linen"]()
    name = "params/MultiHeadDotProductAttention_0/query/kernel"
    pruned = check(fn, params, *args, ratio=0.5, scope="local", kinds=("width", "block"), pin={name: axis})
    shape = pruned.params["params"]["MultiHeadDotProductAttention_0"]["query"]["kernel"].shape
    assert shape[1:] == ((2, 2) if axis == 1 else (1, 4))


def test_group_norm_ties_its_groups():
    model = nn.Sequential([nn.Dense(8), nn.GroupNorm(2), nn.Dense(2)])
    x = data(3, 4)
    variables = model.init(jax.random.key(0), x)
    groups = dependency_groups(model.apply, variables, x)
    assert [(g.kind, g.size, g.tie) for g in groups] == [("width", 4, 0), ("block", 2, 1), ("width", 4, 0)]


def test_rows_that_cannot_lose_alike_are_held():
    # one row of the reshape meets an output, which must not change: the others must then stay as long
    def net(p, x):
        h = (x @ p["a"]).reshape(-1, 2, 4)
        return h[:, 0], h[:, 1] @ p["b"]

    groups = dependency_groups(net, weights(a=(3, 8), b=(4, 2)), data(5, 3))
    assert len(groups) == 0
    assert len(groups.held) == 1
    assert "held" in str(groups)


def test_an_axis_split_in_two_ways_keeps_rows_of_both_equally_long():
    def net(p, x):
        h = jnp.tanh(x @ p["a"])
        return jnp.einsum("brs,rso->bo", h.reshape(-1, 2, 4), p["b"]) + jnp.einsum(
            "brs,rso->bo", h.reshape(-1, 4, 2), p["c"]
        )

    params, x = weights(a=(3, 8), b=(2, 4, 2), c=(4, 2, 2)), data(5, 3)
    (cells,) = {tie: t for tie, t in dependency_groups(net, params, x).ties.items() if t[0].kind == "width"}.values()
    assert [[int(i[0]) for m in g.members if m.path == "a" for i in m.indices] for g in cells] == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
    ]
    assert check(net, params, x, ratio=0.5, scope="local").params["a"].shape == (3, 4)


def test_shuffled_channels_go_with_their_like_of_every_group():
    pairs = {
        frozenset({("a", 1, (k,)), ("a", 1, (4 + k,))} | {(n, 0, (2 * k + i,)) for n in "bc" for i in range(2)})
        for k in range(4)
    }
    assert pairs <= units(groups_of("channel_shuffle"))


def test_constant_tables_follow():
    def net(p, x):
        return (jnp.tanh(x @ p["a"]) * jnp.arange(1.0, 9.0)[None]) @ p["b"]

    assert len(units(dependency_groups(net, weights(a=(3, 8), b=(8, 2)), data(5, 3)))) == 8


def test_unknown_primitive_is_named_with_line_and_parameter():
    def net(p, x):
        return jnp.linalg.cholesky(p["a"].T @ p["a"]) @ p["b"]

    with pytest.raises(UnknownPrimitiveError, match=r"'cholesky' at .*test_graph_groups.py:\d+.*parameter 'a' axis 1"):
        dependency_groups(net, weights(a=(9, 8), b=(8, 2)), data(5, 3))
    pinned = dependency_groups(net, weights(a=(9, 8), b=(8, 2)), data(5, 3), pin=lambda path: path == "a")
    assert len(pinned) == 0


def test_unknown_primitive_on_inputs_only_is_no_matter():
    def net(p, x):
        y = jax.scipy.linalg.solve_triangular(x, jnp.eye(3), lower=True)
        return jnp.linalg.cholesky(x) @ y @ p["a"] @ p["b"]

    assert len(dependency_groups(net, weights(a=(3, 8), b=(8, 2)), jnp.eye(3))) == 1


def test_text_and_matrix():
    groups = groups_of("vit_split")
    text = str(groups)
    assert "[2] width: 4 units in each of 2 groups, equally many lost in each" in text
    assert "made by qkv axis 1, 2 places a unit" in text
    assert "read by proj axis 0\n" in text
    assert "joined by dot_general at graph_architectures.py" in text  # queries and keys
    names, matrix = groups.matrix()
    assert (matrix == matrix.T).all()
    at = {n: i for i, n in enumerate(names)}
    assert matrix[at["embed:1"], at["head:0"]] == 1
    assert matrix[at["embed:1"], at["proj:0"]] == 0
    assert matrix[at["embed:0"]].sum() == 0


def test_the_text_says_what_makes_reads_and_joins_a_width():
    text = str(groups_of("resnet")).split("\n[")[0].splitlines()
    assert text[0] == "[0] width: 8 units"
    assert "    made by params/Conv_{0,2}/kernel axis 3" in text  # layers that differ in a number share a line
    assert "    read by params/Conv_{1,3,4}/kernel axis 2" in text
    assert "    along params/BatchNorm_{0,2}/scale axis 0" in text
    assert text[-1].startswith("    joined by add at graph_architectures.py:")  # the residual, and nothing else
    assert sum("joined" in line for line in text) == 1


def test_table_is_in_program_order():
    rows = groups_of("scan_over_layers").table()
    roles = {(row["path"], row["axis"]): (row["role"], row["tie"]) for row in rows}
    assert roles == {
        ("embed", 1): ("made by", 0),
        ("w1", 1): ("read by", 0),
        ("w1", 2): ("made by", 1),
        ("w2", 1): ("read by", 1),
        ("w2", 2): ("made by", 0),
        ("head", 0): ("read by", 0),
    }
    assert [row["path"] for row in rows] == ["embed", "w1", "w1", "w2", "w2", "head"]


def test_shapes_suffice():
    fn, params, args = ARCHITECTURES["mlp"]()
    shapes = jax.eval_shape(lambda x: x, (params, args))
    assert units(dependency_groups(fn, shapes[0], *shapes[1])) == units(dependency_groups(fn, params, *args))


@pytest.mark.slow
def test_vit_base():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(12)(h, h)
            return x + nn.Dense(768)(nn.gelu(nn.Dense(3072)(nn.LayerNorm()(x))))

    class ViT(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(768, (16, 16), (16, 16))(x).reshape(x.shape[0], -1, 768)
            token = self.param("cls", nn.initializers.zeros, (1, 1, 768))
            x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], 1)
            x = x + self.param("pos", nn.initializers.zeros, (1, 197, 768))
            for _ in range(12):
                x = Block()(x)
            return nn.Dense(1000)(nn.LayerNorm()(x)[:, 0])

    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    shapes = jax.eval_shape(ViT().init, jax.random.key(0), image)
    groups = dependency_groups(ViT().apply, shapes, image)
    # the stream; then in each of 12 blocks one hidden layer, its heads, and 12 heads' q-k dims and v dims
    assert len(groups.ties) == 1 + 12 * 4
    assert len(groups) == 1 + 12 * (1 + 1 + 12 + 12)
    assert sum(g.size for g in groups if g.kind == "width") == 768 + 12 * (3072 + 768 + 768)

    # at half of every width it has exactly ViT-S's parameters
    zeros = jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), shapes)
    half = prune(
        ViT().apply, zeros, image, ratio=0.5, scope="local", importance=lambda p: jax.tree.map(lambda _: None, p)
    )
    assert sum(x.size for x in jax.tree.leaves(half.params)) == 22_050_664


def test_roles_survive_a_reshaped_kernel():
    def net(p, x):  # a convolution as a product of patches, inside a residual branch
        h = x @ p["in"]
        patches = jnp.concatenate([h[:, i : i + 3] for i in range(3)], axis=-1)  # (batch, 3, 3 * 8)
        h = h[:, 1:4] + jax.nn.relu(patches @ p["conv"].reshape(24, 8))
        return h.sum(1) @ p["out"]

    params = {"in": jnp.ones((4, 8)), "conv": jnp.ones((3, 8, 8)), "out": jnp.ones((8, 2))}
    lines = str(dependency_groups(net, params, jnp.ones((2, 5, 4)))).splitlines()
    assert lines[1:5] == [
        "    made by conv axis 2",
        "    made by in axis 1",
        "    read by conv axis 1",
        "    read by out axis 0",
    ]
