"""Makes the files in `fixtures/`: tiny models with random weights in published formats, and the logits they give.

The weights and logits come from independent implementations, each run once:

- `python make_fixtures.py torch PATH` writes the timm and original-Swin files with timm 1.0.31 and torch 2.13.0
  (CPU); PATH is a checkout of github.com/microsoft/Swin-Transformer at f82860b.
- `python make_fixtures.py google PATH` writes Google's with flax 0.12.8; PATH is a checkout of
  github.com/google-research/vision_transformer at c6de1e5.

Neither torch nor timm is needed to run the tests.
"""

import importlib.machinery
import sys
import types
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent / "fixtures"


def images(size: int) -> np.ndarray:
    return np.random.default_rng(size).standard_normal((2, size, size, 3)).astype(np.float32)


class Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


class NoTorchvision:
    """timm imports torchvision for its data pipelines, which are not used here: any name in it is an empty class."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: getattr(Anything("torchvision", (), {}), name)
        return module

    def exec_module(self, module):
        module.__path__ = []


def make_torch(swin_checkout: str) -> None:
    sys.meta_path.insert(0, NoTorchvision())
    sys.path.insert(0, swin_checkout)
    import torch
    from models.swin_transformer import SwinTransformer as OriginalSwin
    from safetensors.torch import save_file
    from timm.layers import resample_abs_pos_embed
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)

    def scramble(model):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        return model.eval()

    def logits(model, size):
        with torch.no_grad():
            return model(torch.from_numpy(images(size)).permute(0, 3, 1, 2)).numpy()

    def save(name, model, size):
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, HERE / f"{name}.safetensors")
        np.save(HERE / f"{name}.npy", logits(model, size))

    tiny = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3, "num_classes": 5}
    vit = scramble(VisionTransformer(**tiny))
    save("timm_vit", vit, 16)
    larger = VisionTransformer(**(tiny | {"img_size": 24}))
    table = resample_abs_pos_embed(vit.pos_embed, (6, 6), num_prefix_tokens=1)
    larger.load_state_dict(vit.state_dict() | {"pos_embed": table})
    np.save(HERE / "timm_vit_24.npy", logits(larger.eval(), 24))
    save("timm_deit", scramble(VisionTransformerDistilled(**tiny)), 16)
    save("timm_registers", scramble(VisionTransformer(**tiny, reg_tokens=2)), 16)
    save("timm_registers_no_embed", scramble(VisionTransformer(**tiny, reg_tokens=2, no_embed_class=True)), 16)

    small = {"img_size": 32, "patch_size": 2, "embed_dim": 6, "depths": (2, 2), "num_heads": (1, 2), "num_classes": 5}
    save("timm_swin", scramble(SwinTransformer(**small, window_size=4)), 32)
    save("original_swin", scramble(OriginalSwin(**small, window_size=4)), 32)


def make_google(checkout: str) -> None:
    sys.path.insert(0, checkout)
    import flax
    import jax
    from vit_jax.models_vit import VisionTransformer

    model = VisionTransformer(
        num_classes=5,
        patches=types.SimpleNamespace(size=(4, 4)),
        transformer={"num_layers": 2, "mlp_dim": 20, "num_heads": 3},
        hidden_size=12,
        representation_size=7,
    )
    variables = model.init(jax.random.key(0), images(16), train=False)
    leaves, tree = jax.tree.flatten(variables["params"])
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    params = jax.tree.unflatten(tree, leaves)
    np.savez(HERE / "google_vit.npz", **flax.traverse_util.flatten_dict(params, sep="/"))
    np.save(HERE / "google_vit.npy", model.apply({"params": params}, images(16), train=False))


if __name__ == "__main__":
    {"torch": make_torch, "google": make_google}[sys.argv[1]](sys.argv[2])
