"""LeNet as report B's Figure 28 has it: three 5x5 convolutions and two dense layers.

Reference: LeCun et al. 1998, "Gradient-based learning applied to document recognition"; report B, Appendix 3.1.
"""

import flax.linen as nn
from jax import Array

from experiments.models.conv import Conv, Method, Padding, max_pool

# PyTorch's default, which the reports had. It matters to DessiLBI: each filter starts at norm 1/sqrt(3), below its
# threshold 1, so that a filter which the loss does not hold never comes alive; He's start at sqrt(2), and all would.
_PYTORCH = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class LeNet(nn.Module):
    """Images of 28x28 to logits; layers `conv1`, `conv2`, `conv3`, `fc1`, `fc2`.

    Attributes:
      classes: number of logits.
      features: output channels of the convolutions.
      hidden: units of `fc1`.
      kernel_size: side of the kernels; the last convolution's covers the whole image that reaches it.
      padding: of the second convolution.
      method: how convolutions are computed, see `convolve`.
    """

    classes: int = 10
    features: tuple[int, int, int] = (6, 16, 120)
    hidden: int = 84
    kernel_size: int = 5
    padding: Padding = "VALID"
    method: Method = "auto"

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """(B, H, W, C) -> (B, classes). `train` changes nothing: there is neither dropout nor normalisation."""

        def conv(x: Array, number: int, size: int, padding: Padding) -> Array:
            layer = Conv(
                self.features[number - 1],
                (size, size),
                padding=padding,
                kernel_init=_PYTORCH,
                method=self.method,
                name=f"conv{number}",
            )
            return nn.relu(layer(x))

        x = max_pool(conv(x, 1, self.kernel_size, "SAME"))
        x = max_pool(conv(x, 2, self.kernel_size, self.padding))
        x = conv(x, 3, x.shape[1], "VALID").reshape(len(x), -1)
        x = nn.relu(nn.Dense(self.hidden, kernel_init=_PYTORCH, name="fc1")(x))
        return nn.Dense(self.classes, kernel_init=_PYTORCH, name="fc2")(x)
