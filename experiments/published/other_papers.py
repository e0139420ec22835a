"""What other papers and public re-runs reach: Functa on CIFAR-10 and MNIST, DessiLBI on MNIST."""

from experiments.published._table import Table

TABLES = (
    Table(
        "papers",
        "CIFAR-10",
        "Reconstruction and classification from latents on CIFAR-10",
        ("method", "latent", "PSNR, dB", "test accuracy, %", "from"),
        (
            ("report A, Functa", "256", 20.25, 51.56, "A Tables 2-3"),
            ("report A, Spatial Functa", "8x8x16", 22.42, 56.24, "A Tables 2-3"),
            ("report B, Functa", "512", 27, 43.77, "B text"),
            ("COIN++, 3 steps", "256", 27.5, None, "its result files"),
            ("COIN++, 3 steps", "512", 31.7, None, "its result files"),
            ("COIN++, 3 steps", "1024", 37.0, None, "its result files"),
            ("Functa, 50 augmentations", "256", 27.16, 65.9, "a public re-run"),
            ("Functa, 50 augmentations", "512", 31.62, 67.2, "a public re-run"),
            ("Functa, 50 augmentations", "1024", 38.19, 66.6, "a public re-run"),
            ("Functa", "1024", 38.1, 68.3, "as quoted by LH-NeF"),
            ("Spatial Functa", "8x8x16", 39.0, 90.3, "as quoted by LH-NeF"),
            ("Spatial Functa, CNN, lowest", "8x8x16", None, 71.7, "an independent re-run"),
            ("Spatial Functa, CNN, highest", "8x8x16", None, 76.9, "an independent re-run"),
            ("Spatial Functa, flat MLP", "8x8x16", None, 49, "an independent re-run"),
            ("ENF", None, 42.2, 82.1, "its paper"),
            ("LH-NeF", None, 44.4, 91.2, "its paper"),
            ("MetaLF", None, 47.7, 83.3, "its paper"),
        ),
        note="Report B's PSNR is approximate and after 5000 inner steps (not 3); the flat MLP's accuracy is rounded. "
        "The methods differ in augmentation and in which PSNR they mean.",
        keys=2,
    ),
    Table(
        "papers",
        "MNIST",
        "Reconstruction and classification from latents on MNIST",
        ("method", "PSNR, dB", "test accuracy, %", "from"),
        (
            ("report A, Functa", 21.37, 96.94, "A Tables 2-3"),
            ("MWT", None, 98.80, "CVPR 2025"),
        ),
    ),
    Table(
        "papers",
        "DessiLBI",
        "Accuracy of a network that DessiLBI cut",
        ("network", "parameters removed, %", "accuracy, %", "from"),
        (("LeNet on MNIST", 82.5, 98.47, "Fu et al. 2020, arXiv:2007.02010"),),
    ),
)
