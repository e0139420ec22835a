"""ToMe against a loop over pairs, and proportional attention against tokens written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from token_models import IMAGES, MODEL, VARIABLES, run

from prune_jax.tokens import ToMe, merge_counts
from prune_jax.tokens.merging import match_and_merge
from prune_jax.tokens.state import Tokens, cosines

WRAPPED = {"params": {"model": VARIABLES["params"]}}


def loop(x, size, metric, r):
    """Bipartite soft matching of one image's patch tokens, pair by pair: lists of (members, value)."""
    unit = metric / np.linalg.norm(metric, axis=1, keepdims=True)
    a, b = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    best = {i: max(b, key=lambda j, i=i: unit[i] @ unit[j]) for i in a}
    gone = sorted(a, key=lambda i: -(unit[i] @ unit[best[i]]))[:r]
    members = {i: [i] for i in [*[i for i in a if i not in gone], *b]}
    for i in gone:
        members[best[i]].append(i)
    return [(m, np.average(x[m], axis=0, weights=size[m]), size[m].sum()) for m in members.values()]


def test_matching_is_the_loop_over_pairs():
    rng = np.random.default_rng(0)
    x, metric = rng.standard_normal((2, 2, 12, 5)).astype(np.float32)
    size = rng.integers(1, 5, (2, 11)).astype(np.float32)
    patch = np.arange(11)[None].repeat(2, 0)
    merged = match_and_merge(Tokens(x, patch, patch, size), metric, 4)
    assert merged.x.shape == (2, 8, 5)
    np.testing.assert_array_equal(merged.x[:, 0], x[:, 0])  # the class token
    for image in range(2):
        expected = loop(x[image, 1:], size[image], metric[image, 1:], 4)
        assert [m[0] for m, _, _ in expected] == merged.patch[image].tolist()
        np.testing.assert_allclose(merged.x[image, 1:], [v for _, v, _ in expected], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(merged.size[image], [s for _, _, s in expected])
        for members, _, _ in expected:
            assert set(merged.owner[image][np.array(members)].tolist()) == {members[0]}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_partners_in_half_precision_are_those_of_the_same_keys_in_float64(dtype, jit):
    rng = np.random.default_rng(0)
    keys = jnp.asarray(rng.standard_normal(64) + 0.2 * rng.standard_normal((4, 100, 64)), dtype)
    a, b = (np.asarray(part).astype(float) for part in (keys[:, ::2], keys[:, 1::2]))
    a, b = (part / np.linalg.norm(part, axis=-1, keepdims=True) for part in (a, b))
    found = (jax.jit(cosines) if jit else cosines)(keys[:, ::2], keys[:, 1::2])
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, a @ b.swapaxes(1, 2), atol=1e-5)
    np.testing.assert_array_equal(found.argmax(-1), (a @ b.swapaxes(1, 2)).argmax(-1))


def test_the_cosines_of_large_tokens_do_not_overflow():
    large = jnp.full((1, 2, 768), 20.0, jnp.float16)
    np.testing.assert_allclose(cosines(large, large), np.ones((1, 2, 2)), rtol=1e-5)


def test_proportional_attention_counts_a_token_once_for_each_patch():
    method = ToMe(MODEL, (8, 0, 0))
    trace = run(method, WRAPPED, IMAGES, method="trace")
    sizes = (trace.owner[:, 0, :, None] == jnp.arange(16)[None, None]).sum(1)
    assert (sizes.sum(-1) == 16).all()

    def written_out(module, images):
        """The same with every merged token repeated for each patch it stands for."""
        model = module.model
        block, x = model.blocks[0], model.embed(images)
        q, k, v = block.attention.project(block.norm1(x))
        x = block.add(x, block.attention.combine(block.attention.exponentials(q, k), v))
        tokens = match_and_merge(Tokens(x, *[jnp.broadcast_to(jnp.arange(16)[None], (2, 16))] * 2), k.mean(1), 8)
        place = jnp.argmax(tokens.patch[:, None] == tokens.owner[..., None], axis=-1)
        patches = jnp.take_along_axis(tokens.x[:, 1:], place[..., None], axis=1)
        x = block.feed_forward(jnp.concatenate([x[:, :1], patches], axis=1))
        for block in model.blocks[1:]:
            x = block(x)
        return model.head(x)

    np.testing.assert_allclose(trace.logits, run(method, WRAPPED, IMAGES, method=written_out), atol=1e-5)
    plain = run(method.clone(proportional=False), WRAPPED, IMAGES)
    assert np.abs(plain - trace.logits).max() > 1e-3


@pytest.mark.parametrize("keep", [1.0, 0.8, 0.5, 0.3])
def test_merge_counts_keep_the_fraction(keep):
    r = merge_counts(64, 6, keep)
    left = 64 - np.cumsum(r)
    assert left.mean() / 64 == pytest.approx(keep, abs=0.02)
    assert ToMe(MODEL.clone(image_size=32, depth=6), r).tokens == tuple((1 + left).tolist())
    for name, arguments in {"patches": (0, 6, 0.5), "depth": (64, 0, 0.5)}.items():
        with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got 0"):
            merge_counts(*arguments)
    with pytest.raises(ValueError, match=r"keep must be from 0.16 to 1 with 6 blocks, got 0.1"):
        merge_counts(64, 6, 0.1)
