"""The dense ViT in PyTorch, with its fused attention: a worker of `benchmarks.tokens`, needs nothing of this project.

python -m benchmarks.torch_vit SIZE BATCH
"""

from __future__ import annotations

import sys

from benchmarks.turns import turns

SIZES = {"Ti": (192, 12, 3), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}


def main(size: str, batch: int) -> None:
    """Classify a batch of 224 px images for every tick."""
    import torch
    from torch import nn
    from torch.nn import functional

    width, depth, heads = SIZES[size]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
            self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

        def forward(self, x):
            q, k, v = self.qkv(self.norm1(x)).reshape(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
            y = functional.scaled_dot_product_attention(q, k, v)
            x = x + self.proj(y.transpose(1, 2).reshape(x.shape))
            return x + self.mlp(self.norm2(x))

    class ViT(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Conv2d(3, width, 16, stride=16)
            self.token = nn.Parameter(torch.zeros(1, 1, width))
            self.position = nn.Parameter(torch.zeros(1, 197, width))
            self.blocks = nn.Sequential(*[Block() for _ in range(depth)])
            self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, 1000)

        def forward(self, images):
            x = self.embed(images).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
            return self.head(self.norm(self.blocks(x))[:, 0])

    model, images = ViT().eval(), torch.zeros(batch, 3, 224, 224)
    with torch.inference_mode():
        for _ in turns():
            model(images)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
