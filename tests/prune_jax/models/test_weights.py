"""Published files give the logits that the published code gives, and wrong files give one clear error."""

from pathlib import Path

import jax
import numpy as np
import pytest
from make_fixtures import images
from safetensors.numpy import load_file, save_file

from prune_jax.models import Swin, ViT, load_weights

FIXTURES = Path(__file__).parent / "fixtures"
TINY = ViT(num_classes=5, image_size=16, patch=4, width=12, depth=2, heads=3)
SWIN = Swin(num_classes=5, patch=2, window=4, width=6, depths=(2, 2), heads=(1, 2))
GOOGLE = TINY.clone(mlp_hidden=20, pre_logits=7, gelu="tanh")

FILES = {
    "timm_vit.safetensors": TINY,
    "timm_deit.safetensors": TINY.clone(distilled=True),
    "timm_registers.safetensors": TINY.clone(registers=2),
    "timm_registers_no_embed.safetensors": TINY.clone(registers=2),
    "google_vit.npz": GOOGLE,
    "timm_swin.safetensors": SWIN,
    "original_swin.safetensors": SWIN,
}


def logits(model, path, size):
    return jax.jit(model.apply)(load_weights(model, path), images(size))


@pytest.mark.parametrize("name", FILES)
def test_logits_are_those_of_the_published_code(name):
    path = FIXTURES / name
    ours = logits(FILES[name], path, 32 if "swin" in name else 16)
    np.testing.assert_allclose(ours, np.load(path.with_suffix(".npy")), atol=1e-4)


def test_logits_with_an_interpolated_position_embedding_are_timms():
    ours = logits(TINY.clone(image_size=24), FIXTURES / "timm_vit.safetensors", 24)
    np.testing.assert_allclose(ours, np.load(FIXTURES / "timm_vit_24.npy"), atol=1e-4)


def ramps(lead, rows, columns):
    """Positions whose channels are 100 for tokens before the patches, then the row, the column, and zeros."""
    grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(1, -1, 2)
    before = np.full((1, lead, 2), 100)
    return np.pad(np.concatenate([before, grid], 1), ((0, 0), (0, 0), (0, 10))).astype(np.float32)


def positions(tmp_path, model, table, **options):
    """What the model gets of the table: its position embedding and the registers' share."""
    registers = {"reg_token": np.zeros((1, model.registers, 12), np.float32)} if model.registers else {}
    path = edited(tmp_path, lambda a: a.update(pos_embed=table, **registers))
    params = load_weights(model, path, **options)["params"]
    return params["position_embedding"], params.get("register_tokens")


@pytest.mark.parametrize(("lead", "registers"), [(0, 0), (1, 0), (0, 3), (1, 3), (4, 3)])
def test_positions_are_resampled_where_the_grid_is_another(tmp_path, lead, registers):
    """Ramps stay ramps: resampling moves a position's row and column in proportion. 12 x 12 to 9 x 16, as many."""
    model = TINY.clone(image_size=(36, 64), registers=registers)
    found, of_registers = positions(tmp_path, model, ramps(lead, 12, 12))
    patches = np.asarray(found[0, 1:, :2]).reshape(9, 16, 2)
    rows, columns = (np.arange(9) + 0.5) * 12 / 9 - 0.5, (np.arange(16) + 0.5) * 12 / 16 - 0.5
    inner = patches[2:-2, 3:-3]  # at the border the kernel is cut
    np.testing.assert_allclose(inner[..., 0], np.broadcast_to(rows[2:-2, None], (5, 10)), atol=0.05)
    np.testing.assert_allclose(inner[..., 1], np.broadcast_to(columns[3:-3], (5, 10)), atol=0.05)
    np.testing.assert_array_equal(found[0, 0, :2], 100.0 * (lead > 0))
    if registers:
        np.testing.assert_array_equal(of_registers[0, :, :2], 100.0 * (lead > 1))


@pytest.mark.parametrize(
    ("image_size", "table", "options"),
    [
        ((16, 16), ramps(1, 4, 4), {}),
        ((12, 16), ramps(1, 3, 4), {}),  # no square
        ((8, 32), ramps(1, 2, 8), {"position_grid": (2, 8)}),  # as many as 4 x 4
    ],
)
def test_positions_of_the_models_grid_are_left_alone(tmp_path, image_size, table, options):
    np.testing.assert_array_equal(positions(tmp_path, TINY.clone(image_size=image_size), table, **options)[0], table)


def test_positions_of_two_readings_are_asked_for(tmp_path):
    """197 are 1 + 14 x 14 or, with four registers, 5 + 12 x 16."""
    model = TINY.clone(image_size=(48, 64), registers=4)
    with pytest.raises(ValueError, match=r"197 positions may be 5 \+ 12 x 16 or 1 \+ 14 x 14.*position_grid"):
        positions(tmp_path, model, ramps(1, 14, 14))
    table = ramps(5, 12, 16)
    found, of_registers = positions(tmp_path, model, table, position_grid=(12, 16))
    np.testing.assert_array_equal(found, table[:, 4:])
    np.testing.assert_array_equal(of_registers, table[:, 1:5])
    found, of_registers = positions(tmp_path, model, ramps(1, 14, 14), position_grid=(14, 14))
    assert found.shape == (1, 193, 12)
    np.testing.assert_array_equal(found[0, 0, :2], 100)
    assert not of_registers.any()
    with pytest.raises(ValueError, match=r"197 positions are no grid \(13, 14\)"):
        positions(tmp_path, model, table, position_grid=(13, 14))
    with pytest.raises(ValueError, match="position_grid must be None for a Swin"):
        load_weights(SWIN, FIXTURES / "timm_swin.safetensors", position_grid=(4, 4))


def test_google_positions_are_resampled(tmp_path):
    arrays = dict(np.load(FIXTURES / "google_vit.npz"))
    key = "Transformer/posembed_input/pos_embedding"
    np.savez(tmp_path / "ramps.npz", **arrays | {key: ramps(1, 4, 4)})
    found = load_weights(GOOGLE.clone(image_size=(8, 32)), tmp_path / "ramps.npz")["params"]["position_embedding"]
    patches = np.asarray(found[0, 1:]).reshape(2, 8, 12)
    np.testing.assert_allclose(patches[..., 0], patches[:, :1, 0].repeat(8, 1), atol=1e-5)  # the row is
    np.testing.assert_allclose(patches[..., 1], patches[:1, :, 1].repeat(2, 0), atol=1e-5)  # the same all along
    assert (np.diff(patches[0, :, 1]) > 0).all()
    assert patches[1, 0, 0] > patches[0, 0, 0]


def test_both_numberings_of_google_files(tmp_path):
    renamed = {"LayerNorm_1": "LayerNorm_2", "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1"}
    renamed["MlpBlock_0"] = "MlpBlock_3"
    arrays = dict(np.load(FIXTURES / "google_vit.npz"))
    older = {"/".join(renamed.get(part, part) for part in key.split("/")): x for key, x in arrays.items()}
    assert set(older).isdisjoint(key for key in arrays if "LayerNorm_1" in key)
    np.savez(tmp_path / "older.npz", **older)
    jax.tree.map(
        np.testing.assert_array_equal,
        load_weights(GOOGLE, tmp_path / "older.npz"),
        load_weights(GOOGLE, FIXTURES / "google_vit.npz"),
    )


def test_variables_are_those_of_init():
    for name, model in FILES.items():
        variables = load_weights(model, FIXTURES / name)
        shapes = jax.eval_shape(model.init, jax.random.key(0), images(16))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), variables) == jax.tree.map(
            lambda x: (x.shape, x.dtype), shapes
        )


def test_a_new_head_is_asked_for():
    for name, model in (("timm_vit.safetensors", TINY), ("google_vit.npz", GOOGLE), ("timm_swin.safetensors", SWIN)):
        wider = model.clone(num_classes=9)
        with pytest.raises(ValueError, match=r"class_head.*head='zeros'"):
            load_weights(wider, FIXTURES / name)
        fresh = load_weights(wider, FIXTURES / name, head="zeros")["params"]
        assert fresh["class_head"]["kernel"].shape[1] == 9
        assert not fresh["class_head"]["kernel"].any()
        old = load_weights(model, FIXTURES / name)["params"]
        jax.tree.map(
            np.testing.assert_array_equal, old | {"class_head": 0}, fresh | {"class_head": 0}
        )  # nothing else changes


def test_pre_logits_go_with_the_head():
    plain = GOOGLE.clone(pre_logits=None, num_classes=3)
    with pytest.raises(ValueError, match="unexpected 'pre_logits/bias', 'pre_logits/kernel'"):
        load_weights(plain, FIXTURES / "google_vit.npz")
    assert "pre_logits_dense" not in load_weights(plain, FIXTURES / "google_vit.npz", head="zeros")["params"]


def test_a_smaller_window_gets_resampled_biases():
    smaller = load_weights(SWIN.clone(window=3), FIXTURES / "timm_swin.safetensors")["params"]
    assert smaller["blocks_1_0"]["relative_position_bias"].shape == (25, 2)


def edited(tmp_path, change):
    arrays = load_file(FIXTURES / "timm_vit.safetensors")
    change(arrays)
    save_file(arrays, tmp_path / "edited.safetensors")
    return tmp_path / "edited.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("blocks.1.mlp.fc1.bias"), "missing 'blocks.1.mlp.fc1.bias'$"),
        (lambda a: a.update(dist_token=a["cls_token"]), "unexpected 'dist_token'$"),
        (lambda a: (a.pop("norm.bias"), a.update(x=a["cls_token"])), "missing 'norm.bias'; unexpected 'x'$"),
        (lambda a: a.update({"norm.weight": np.full(12, np.nan, np.float32)}), "'norm.weight'.* not finite"),
        (lambda a: a.update({"norm.weight": np.ones(12, np.int32)}), "floating point, which 'norm.weight'"),
        (lambda a: a.update({"norm.weight": np.ones(13, np.float32)}), r"'norm.weight'.*\(13,\).*\(12,\)"),
        (lambda a: a.update({"blocks.0.attn.qkv.weight": np.ones((35, 12), np.float32)}), "attn.qkv.weight"),
        (lambda a: a.update({"patch_embed.proj.weight": np.ones((12, 3, 8, 8), np.float32)}), "patch_embed.proj"),
        (lambda a: a.update({"patch_embed.proj.weight": np.ones(12, np.float32)}), "patch_embed.proj"),
        (lambda a: a.update({"pos_embed": np.ones((1, 16, 12), np.float32)}), None),  # patches alone
        (lambda a: a.update({"pos_embed": np.ones((1, 22, 12), np.float32)}), "'pos_embed'.*square grid"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, message):
    path = edited(tmp_path, change)
    if message is None:
        load_weights(TINY, path)
    else:
        with pytest.raises(ValueError, match=message):
            load_weights(TINY, path)


def test_another_depth_or_model_is_an_error():
    with pytest.raises(ValueError, match=r"unexpected 'blocks\.1\."):
        load_weights(TINY.clone(depth=1), FIXTURES / "timm_vit.safetensors")
    with pytest.raises(ValueError, match=r"missing .* and \d+ more; unexpected 'blocks"):
        load_weights(SWIN, FIXTURES / "timm_vit.safetensors")
    with pytest.raises(ValueError, match="Google's ViT"):
        load_weights(SWIN, FIXTURES / "google_vit.npz")
    with pytest.raises(ValueError, match="head must be"):
        load_weights(TINY, FIXTURES / "timm_vit.safetensors", head="new")


@pytest.mark.parametrize("head", ["load", "zeros"])
@pytest.mark.parametrize(
    ("change", "absent"),
    [
        ({"registers": 2}, "'register_tokens'"),
        ({"distilled": True}, "'distillation_head/bias', 'distillation_head/kernel', 'distillation_token'"),
    ],
)
def test_parameters_that_google_files_never_hold_are_an_error(change, absent, head):
    with pytest.raises(ValueError, match=f"files of this layout never hold {absent}$"):
        load_weights(GOOGLE.clone(**change), FIXTURES / "google_vit.npz", head=head)


@pytest.mark.parametrize("name", ["timm_vit.safetensors", "google_vit.npz"])
def test_damaged_files_are_one_clear_error(tmp_path, name):
    whole = (FIXTURES / name).read_bytes()
    path = tmp_path / name
    middle = bytearray(whole)
    middle[4 : len(whole) // 2] = bytes(len(whole) // 2 - 4)
    for damaged in (b"", whole[:4], whole[: len(whole) // 2], whole[:-10], b"not weights at all", bytes(middle)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            load_weights(FILES[name], path)


def test_no_pickle_and_no_missing_file(tmp_path):
    np.savez(tmp_path / "objects.npz", cls=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"objects\.npz is damaged"):
        load_weights(GOOGLE, tmp_path / "objects.npz")
    (tmp_path / "model.pth").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"must be a \.npz or \.safetensors file"):
        load_weights(TINY, tmp_path / "model.pth")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_weights(TINY, tmp_path / "none.npz")


def test_half_precision_files(tmp_path):
    arrays = load_file(FIXTURES / "timm_vit.safetensors")
    for dtype in (np.float16, jax.numpy.bfloat16):
        save_file({k: x.astype(dtype) for k, x in arrays.items()}, tmp_path / "half.safetensors")
        leaf = load_weights(TINY, tmp_path / "half.safetensors")["params"]["norm"]["scale"]
        np.testing.assert_array_equal(leaf, arrays["norm.weight"].astype(dtype).astype(np.float32))
