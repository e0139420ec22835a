"""Image restoration without learning, from scikit-image, for the studies to compare with."""

import jax
import numpy as np
import skimage  # loads its parts when they are first used; naming them here would slow every command's start

# Denoisers: name -> candidates; each number is in units of the noise's standard deviation.
DENOISERS = {
    "total variation": (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0),
    "non-local means": (0.4, 0.6, 0.8, 1.0),
}


def bicubic(images: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Images (N, h, w, C), float, enlarged to (N, *shape, C) by bicubic interpolation (Keys, a = -1/2)."""
    return np.asarray(jax.image.resize(images, (len(images), *shape, images.shape[-1]), "cubic"))


def block_means(images: np.ndarray, factor: int) -> np.ndarray:
    """Images (N, H, W, C), float, shrunk by averaging blocks of factor x factor pixels.

    Raises:
      ValueError: sides that are not multiples of the factor.
    """
    count, height, width, channels = images.shape
    if height % factor or width % factor:
        raise ValueError(f"factor={factor} does not divide the sides of images of {height}x{width}")
    return images.reshape(count, height // factor, factor, width // factor, factor, channels).mean(axis=(2, 4))


def denoise(images: np.ndarray, method: str, strength: float, sigma: float) -> np.ndarray:
    """Denoises images (N, H, W, C), float on [0, 1].

    Args:
      images: with Gaussian noise.
      method: one of `DENOISERS`: total variation (Chambolle 2004) or non-local means (Buades 2005, 5x5 patches).
      strength: weight of total variation, or filter width of non-local means, in units of sigma.
      sigma: standard deviation of the noise.
    """
    if method == "total variation":
        return np.stack(
            [
                skimage.restoration.denoise_tv_chambolle(image, weight=strength * sigma, channel_axis=-1)
                for image in images
            ]
        )
    filtered = [
        skimage.restoration.denoise_nl_means(
            image, 5, 6, strength * sigma, sigma=sigma, fast_mode=True, channel_axis=-1
        )
        for image in images
    ]
    return np.stack(filtered).reshape(images.shape)  # of grey images it drops the axis of channels


def inpaint(images: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Fills images (N, H, W, C), float, where the mask `known` (N, H, W) is False, by the biharmonic equation."""
    pairs = zip(images, known, strict=True)
    return np.stack(
        [skimage.restoration.inpaint_biharmonic(np.where(k[..., None], x, 0), ~k, channel_axis=-1) for x, k in pairs]
    )


def ssim(prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Structural similarity of each image (Wang et al. 2004, 7x7 windows), images (N, H, W, C) on [0, 1] -> (N,)."""
    pairs = zip(prediction, target, strict=True)
    return np.array([skimage.metrics.structural_similarity(p, t, data_range=1.0, channel_axis=-1) for p, t in pairs])
