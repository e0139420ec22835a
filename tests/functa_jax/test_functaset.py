"""Functasets: fitted as single images are, kept in files that are whole, checked and of one model."""

import dataclasses
import pickle
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import functa_jax as fj
from functa_jax import functaset


def network(latent):
    model = fj.ModulatedSiren(width=8, depth=2, out_features=1, w0=10.0)
    coords = fj.coordinate_grid((4, 4)).reshape(-1, 2)
    return model, model.init(jax.random.key(0), coords, jnp.zeros(latent)), coords


def example(count=7, shape=(2, 3), model="abc", **changes):
    rng = np.random.default_rng(0)
    return functaset.make_functaset(
        rng.normal(3, 2, (count, *shape)),
        labels=rng.integers(0, 10, count),
        psnr=rng.uniform(20, 30, count),
        model=model,
        metadata={"steps": 3, "name": "é"},
        **changes,
    )


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4)])
def test_statistics_are_of_each_dimension(shape):
    made = example(50, shape)
    np.testing.assert_allclose(made.mean, made.latents.mean(0), rtol=1e-5)
    np.testing.assert_allclose(made.normalised.mean(0), np.zeros(shape), atol=1e-5)
    np.testing.assert_allclose(made.normalised.std(0), np.ones(shape), rtol=1e-5)
    np.testing.assert_allclose(made.denormalise(made.normalised), made.latents, rtol=1e-5, atol=1e-5)
    assert made.normalised.dtype == np.float32
    other = example(3, shape).with_statistics_of(made)
    np.testing.assert_array_equal(other.mean, made.mean)
    with pytest.raises(ValueError, match="different models: 'x' and 'abc'"):
        example(3, shape, model="x").with_statistics_of(made)


def test_bad_arrays_are_refused():
    with pytest.raises(ValueError, match=r"labels has shape \(6,\); latents \(7, 2, 3\) need \(7,\)"):
        dataclasses.replace(example(), labels=np.zeros(6, np.int32))
    with pytest.raises(ValueError, match="latents is empty"):
        functaset.make_functaset(np.zeros((0, 2)), labels=[], psnr=[], model="a")
    with pytest.raises(ValueError, match="of 1 images are NaN or infinite, the first of image 1"):
        functaset.make_functaset(np.array([[0.0], [np.nan]]), labels=[0, 1], psnr=[1, 2], model="a")


def test_parts_join_in_order():
    whole = example()
    parts = [
        functaset.make_functaset(whole.latents[i:j], labels=whole.labels[i:j], psnr=whole.psnr[i:j], model="abc")
        for i, j in ((0, 3), (3, 7))
    ]
    joined = functaset.join(parts, whole.metadata)
    for name in ("latents", "labels", "psnr", "mean", "std"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))
    with pytest.raises(ValueError, match="of one model"):
        functaset.join([*parts, example(model="x")])


def test_round_trip_without_pickle(tmp_path):
    made, path = example(), tmp_path / "new" / "set.npz"
    functaset.save(made, path)
    assert [p.name for p in path.parent.iterdir()] == ["set.npz"]
    found = functaset.load(path, model="abc")
    for field in dataclasses.fields(made):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(made, field.name))
    assert found.latents.dtype == np.float32
    with pytest.raises(functaset.FunctasetError, match=r"set.npz was made by the model abc, not by def"):
        functaset.load(path, model="def")
    with pytest.raises(FileNotFoundError):
        functaset.load(tmp_path / "none.npz")


def test_every_damage_is_found_and_named(tmp_path):
    path = tmp_path / "set.npz"
    functaset.save(example(), path)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    same = functaset.load(path)
    found = 0
    for place in [0, *rng.integers(0, len(content), 60)]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            np.testing.assert_array_equal(functaset.load(path).latents, same.latents)  # of no effect, as in a date
        except functaset.FunctasetError as error:
            found += 1
            assert "set.npz is damaged" in str(error)  # noqa: PT017
    assert found > 20
    for size in (0, 10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(functaset.FunctasetError, match="is damaged"):
            functaset.load(path)
    for other in (pickle.dumps({}), b"PK\x03\x04"):
        path.write_bytes(other)
        with pytest.raises(functaset.FunctasetError, match="is damaged"):
            functaset.load(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x.txt", "y")
    with pytest.raises(functaset.FunctasetError, match="is damaged"):
        functaset.load(path)


def test_a_changed_content_with_a_right_zip_is_found(tmp_path):
    path = tmp_path / "set.npz"
    functaset.save(example(), path)
    with np.load(path) as file:
        arrays = dict(file)
    arrays["latents"][0, 0, 0] += 1
    np.savez(path, **arrays)
    with pytest.raises(functaset.FunctasetError, match="checksum does not match"):
        functaset.load(path)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_fit_images_is_fit_latents_of_each(dtype):
    """Whatever the block, padding included, each image gets the latent it gets alone."""
    model, variables, coords = network(6)
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 1)).astype(np.uint8)
    given = images if dtype == np.uint8 else (images / 255).astype(np.float32)
    rates = jnp.linspace(0.5, 1.5, 18).reshape(3, 6)
    options = {"steps": 3, "learning_rate": rates, "rates_per_step": True}
    expected, losses = fj.fit_latents(
        model.apply, variables, coords, jnp.asarray(images / 255).reshape(5, 16, 1), jnp.zeros(6), **options
    )
    for block in (1, 2, 8):
        latents, errors = fj.fit_images(
            model.apply, variables, coords, jnp.asarray(given), jnp.zeros(6), block=block, **options
        )
        np.testing.assert_allclose(latents, expected, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(errors, losses[:, -1], rtol=1e-3)


def test_four_devices_give_the_same_latents():
    model, variables, coords = network(6)
    images = jnp.asarray(np.random.default_rng(1).integers(0, 256, (21, 4, 4, 1)).astype(np.uint8))

    def fit(mesh):
        return fj.fit_images(
            model.apply, variables, coords, images, jnp.zeros(6), steps=2, learning_rate=0.7, block=2, mesh=mesh
        )

    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    alone, shared = fit(None), fit(mesh)
    assert shared[0].sharding.device_set == set(jax.devices())
    for one, other in zip(alone, shared, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_fit_images_refuses_nothing_and_no_block():
    model, variables, coords = network(6)
    options = {"steps": 1, "learning_rate": 1.0}
    with pytest.raises(ValueError, match="images is empty"):
        fj.fit_images(model.apply, variables, coords, jnp.zeros((0, 4, 4, 1)), jnp.zeros(6), **options)
    with pytest.raises(ValueError, match="block must be at least 1, got 0"):
        fj.fit_images(model.apply, variables, coords, jnp.zeros((1, 4, 4, 1)), jnp.zeros(6), block=0, **options)
