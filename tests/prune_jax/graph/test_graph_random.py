"""Networks drawn at random: cutting is zeroing, whatever is wired to whatever."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph_zeroing import check, size

from prune_jax.graph import dependency_groups, prune

OPERATIONS = (
    "dense",
    "dense",
    "add",
    "concat",
    "split",
    "swap",
    "heads",
    "gate",
    "reverse",
    "scale",
    "pool",
    "grouped",
)


def random_network(seed):
    """A random program over a few features of shape (batch, tokens, width); every activation maps 0 to 0."""
    rng = np.random.default_rng(seed)
    params, program, widths = {}, [], [3]

    def weight(*shape):
        name = f"w{len(params)}"
        params[name] = jnp.asarray(rng.normal(0, 0.6, shape), jnp.float32)
        return name

    program.append(("dense", 0, weight(3, 8), weight(8)))
    widths.append(8)
    for _ in range(int(rng.integers(4, 9))):
        op = OPERATIONS[rng.integers(len(OPERATIONS))]
        i, j = (int(rng.integers(1, len(widths))) for _ in range(2))
        n, m = widths[i], widths[j]
        if op == "add":
            program.append((op, i, j, weight(m, n)))
            widths.append(n)
        elif op == "concat":
            program.append((op, i, j))
            widths.append(n + m)
        elif op == "split" and n >= 4:
            at = int(rng.integers(2, n - 1))
            program.append((op, i, at))
            widths += [at, n - at]
        elif op in ("swap", "heads", "gate", "grouped") and n % 2 == 0 and n >= 4:
            program.append((op, i, *((weight(n // 2, n),) if op == "grouped" else ())))
            widths.append(n // 2 if op == "gate" else n)
        elif op in ("reverse", "pool"):
            program.append((op, i))
            widths.append(n)
        elif op == "scale":
            program.append((op, i, weight(n)))
            widths.append(n)
        else:
            m = int(rng.integers(2, 5)) * 2
            program.append(("dense", i, weight(n, m), weight(m)))
            widths.append(m)
    head = weight(sum(widths[-2:]), 2)

    def net(p, x):
        features = [x]
        for op, i, *rest in program:
            h = features[i]
            b, t, n = h.shape
            if op == "dense":
                features.append(jnp.tanh(h @ p[rest[0]] + p[rest[1]][None, None]))
            elif op == "add":
                features.append(h + features[rest[0]] @ p[rest[1]])
            elif op == "concat":
                features.append(jnp.concatenate([h, features[rest[0]]], -1))
            elif op == "split":
                features += jnp.split(h, [rest[0]], -1)
            elif op == "swap":
                features.append(h.reshape(b, t, 2, n // 2).transpose(0, 1, 3, 2).reshape(b, t, n))
            elif op == "heads":
                q = h.reshape(b, t, 2, n // 2)
                a = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, q), -1)
                features.append(jnp.einsum("bhts,bshd->bthd", a, q).reshape(b, t, n))
            elif op == "gate":
                u, v = jnp.split(h, 2, -1)
                features.append(u * jax.nn.sigmoid(v))
            elif op == "reverse":
                features.append(jnp.roll(h[..., ::-1], 1, 1))
            elif op == "scale":
                features.append(jax.nn.relu(h * p[rest[0]][None, None]))
            elif op == "pool":
                features.append(h + h.mean(1, keepdims=True))
            elif op == "grouped":
                features.append(
                    jax.lax.conv_general_dilated(
                        h,
                        p[rest[0]][None],
                        (1,),
                        "VALID",
                        dimension_numbers=("NHC", "HIO", "NHC"),
                        feature_group_count=2,
                    )
                )
        return jnp.concatenate(features[-2:], -1) @ p[head]

    return net, params, jnp.asarray(rng.normal(size=(2, 3, 3)), jnp.float32)


def must_lose(net, params, x, *, ratio, scope, kinds=("width",)):
    """Whether so much is asked for that something has to go: half of the step that takes a unit of each tied group."""
    groups = dependency_groups(net, params, x)
    ties = [t for t in groups.ties.values() if t[0].kind in kinds and min(g.size for g in t) > 1]
    asked = [ratio * len(t) * min(g.size for g in t) for t in ties]
    if scope == "global":
        return bool(ties) and all(sum(asked) >= len(t) / 2 for t in ties)
    return any(units >= len(t) / 2 for units, t in zip(asked, ties, strict=True))


def check_random(seed, **options):
    net, params, x = random_network(seed)
    kinds = options.get("kinds", ("width",))
    if not any(group.kind in kinds for group in dependency_groups(net, params, x)):
        with pytest.raises(ValueError, match="to cut"):
            prune(net, params, x, **options)
        return
    pruned = check(net, params, x, **options)
    assert size(pruned.params) < size(params) or not must_lose(net, params, x, **options)


def test_hardly_a_draw_leaves_nothing_to_cut():
    assert sum(must_lose(*random_network(seed), ratio=0.5, scope="local") for seed in range(6)) == 6


@pytest.mark.parametrize("seed", range(6))
def test_cut_equals_zeroed(seed):
    check_random(seed, ratio=0.5, scope="local")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6, 46))
def test_cut_equals_zeroed_for_more(seed):
    ratio = (0.1, 0.3, 0.5, 0.7, 0.9)[seed % 5]
    check_random(seed, ratio=ratio, scope=("local", "global")[seed % 2], kinds=("width", "block"))
