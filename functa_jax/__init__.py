"""Images as functions: networks whose small latent, fitted in a few gradient steps, is the image."""

from functa_jax.coords import coordinate_grid, subsample
from functa_jax.derivatives import Derivatives, derivatives
from functa_jax.functaset import Functaset, FunctasetError, fit_images, make_functaset
from functa_jax.heads import ConvHead, MLPHead, ResidualHead
from functa_jax.inner_loop import curvature, fit_latents
from functa_jax.meta import MetaParams, MetaState, init_meta, meta_loss, meta_step
from functa_jax.metrics import psnr, psnr_from_mse
from functa_jax.modulation import ModulatedSiren
from functa_jax.relative_adam import relative_adam
from functa_jax.rendering import render
from functa_jax.restoration import continued_rates, denoise, inpaint, pixel_average, super_resolve
from functa_jax.siren import Siren, sine
from functa_jax.spatial import SpatialModulatedSiren

__all__ = [
    "ConvHead",
    "Derivatives",
    "Functaset",
    "FunctasetError",
    "MLPHead",
    "MetaParams",
    "MetaState",
    "ModulatedSiren",
    "ResidualHead",
    "Siren",
    "SpatialModulatedSiren",
    "continued_rates",
    "coordinate_grid",
    "curvature",
    "denoise",
    "derivatives",
    "fit_images",
    "fit_latents",
    "init_meta",
    "inpaint",
    "make_functaset",
    "meta_loss",
    "meta_step",
    "pixel_average",
    "psnr",
    "psnr_from_mse",
    "relative_adam",
    "render",
    "sine",
    "subsample",
    "super_resolve",
]
