"""The exported file: the same network after loading, on every platform, and damage is found."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph_architectures import ARCHITECTURES, data

from prune_jax.graph import apply_plan, load_exported, prune, save_exported


@pytest.fixture(scope="module")
def small():
    fn, params, args = ARCHITECTURES["vit_linen"]()
    return fn, params, args, prune(fn, params, *args, ratio=0.5)


@pytest.fixture(scope="module")
def file(small, tmp_path_factory):
    *_, args, pruned = small
    path = tmp_path_factory.mktemp("exported") / "new" / "vit.jaxnet"
    save_exported(path, pruned, *args)
    return path


def test_the_loaded_network_is_the_same_at_any_batch_size(small, file):
    _, params, _, pruned = small
    loaded = load_exported(file)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, pruned.params)
    for batch in (1, 5):
        x = data(batch, 4, 4, 3, seed=batch)
        expected = jax.jit(pruned.fn)(pruned.params, x)
        np.testing.assert_allclose(jax.jit(loaded.fn)(loaded.params, x), expected, atol=1e-5)
    assert loaded.plan == json.loads(json.dumps(pruned.plan))
    jax.tree.map(np.testing.assert_array_equal, apply_plan(loaded.plan, params), pruned.params)
    assert [p.name for p in file.parent.iterdir()] == ["vit.jaxnet"]
    assert b"pickle" not in file.read_bytes()


def test_the_program_holds_all_platforms(small, file):
    import zipfile

    from jax import export

    with zipfile.ZipFile(file) as archive:  # a zip may have something before it
        program = export.deserialize(bytearray(archive.read("program")))
    assert program.platforms == ("cpu", "cuda", "tpu")


def test_other_trees_types_and_fixed_shapes(tmp_path):
    params = [jnp.ones((3, 8), jnp.bfloat16), jnp.ones((8, 2), jnp.bfloat16)]

    def net(p, x, scale):
        return jnp.tanh(x @ p[0]) @ p[1] * scale

    args = data(2, 3).astype(jnp.bfloat16), jnp.ones((), jnp.bfloat16)
    pruned = prune(net, params, *args, ratio=0.5)
    with pytest.raises(ValueError, match="an argument without axes has no batch axis"):
        save_exported(tmp_path / "net", pruned, *args)
    save_exported(tmp_path / "net", pruned, *args, free_batch=False, platforms=["cpu"])
    loaded = load_exported(tmp_path / "net")
    assert {n: (p.dtype, p.shape) for n, p in loaded.params.items()} == {
        "0": (jnp.bfloat16, (3, 4)),
        "1": (jnp.bfloat16, (4, 2)),
    }
    np.testing.assert_array_equal(loaded.fn(loaded.params, *args), jax.jit(pruned.fn)(pruned.params, *args))
    with pytest.raises(ValueError, match=r"parameters must have the leaves \['0', '1'\], got \['0'\]"):
        loaded.fn({"0": loaded.params["0"]}, *args)
    keyed = prune(
        lambda p, x: x @ p["a"] @ p["b"],
        {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2)), "k": jax.random.key(0)},
        data(2, 3),
        ratio=0.5,
    )
    with pytest.raises(ValueError, match="parameter 'k' is of type key<fry>"):
        save_exported(tmp_path / "net", keyed, data(2, 3))


def flattened(p, x):
    h = jnp.tanh(x @ p["a"])
    return jnp.sin(h.reshape(-1)).reshape(h.shape) @ p["b"]


def centred(p, x):
    h = jnp.tanh(x @ p["a"])
    return (h - h.mean()) @ p["b"]


@pytest.mark.parametrize("net", [flattened, centred])
def test_a_width_merged_with_a_free_batch(net, tmp_path):
    pruned = prune(net, {"a": data(3, 8), "b": data(8, 2)}, data(4, 3), ratio=0.5)
    where = r"plan cuts 'a' axis 1, .* \(.* at .*test_graph_exported.*\)"
    with pytest.raises(ValueError, match=where + r", .* is a symbol: .* free_batch=False"):
        save_exported(tmp_path / "net", pruned, data(4, 3), platforms=["cpu"])
    save_exported(tmp_path / "net", pruned, data(4, 3), platforms=["cpu"], free_batch=False)
    loaded = load_exported(tmp_path / "net")
    np.testing.assert_allclose(
        loaded.fn(loaded.params, data(4, 3)), pruned.fn(pruned.params, data(4, 3)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("at", [0, 24, 30, 60, 2000, -1])
def test_damage_is_found(file, tmp_path, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    bad = tmp_path / "bad"
    bad.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad (is damaged|is no network|has version)"):
        load_exported(bad)


def test_a_file_cut_short_or_of_another_kind(file, tmp_path):
    bad = tmp_path / "bad"
    bad.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"is damaged: its .* bytes do not match their checksum"):
        load_exported(bad)
    bad.write_bytes(b"")
    with pytest.raises(ValueError, match="is no network written by save_exported"):
        load_exported(bad)
    with pytest.raises(FileNotFoundError):
        load_exported(tmp_path / "none")


def test_a_failed_write_leaves_the_old_file(small, tmp_path, monkeypatch):
    *_, args, pruned = small
    path = tmp_path / "net"
    path.write_bytes(b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_exported(path, pruned, *args, platforms=["cpu"])
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("platforms", ["cpu", (), ("cpu", "gpu")])
def test_unknown_platforms_are_named(platforms, tmp_path):
    pruned = prune(centred, {"a": data(3, 8), "b": data(8, 2)}, data(4, 3), ratio=0.5)
    with pytest.raises(ValueError, match="platforms must be some of cpu, cuda, tpu, rocm, got"):
        save_exported(tmp_path / "net", pruned, data(4, 3), platforms=platforms)
