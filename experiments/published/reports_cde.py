"""Reports C (patch skipping), D (DIMAP) and E (PX): the numbers that their texts state."""

from experiments.published._table import Table

TABLES = (
    Table(
        "C",
        "Figure 3",
        "ViT on CIFAR-100, patches skipped by a small MLP",
        ("cosine threshold", "epochs", "patches skipped", "FLOPs saved, %", "accuracy, %"),
        (
            (0.95, 10, 40, 20, 85.2),
            (0.9, 10, 68, 35, 77),
        ),
        note="FLOPs are approximate in the report; patches are averages. The dense model has 89.8 %.",
        source="section 5.4",
    ),
    Table(
        "C",
        "Figure 4",
        "The same with kept patches attending to all patches",
        ("cosine threshold", "epochs", "patches skipped", "FLOPs saved, %", "accuracy, %"),
        ((0.95, 10, 40, 16, 85.4),),
        note="FLOPs are approximate in the report; patches are averages. The dense model has 89.8 %.",
        source="section 5.4",
    ),
    Table(
        "C",
        "text",
        "Numbers given outside the figures",
        ("quantity", "value"),
        (
            ("accuracy without skipping, %", 89.8),
            ("predictor layers", "768x64x1"),
        ),
        source="section 5.4",
    ),
    Table(
        "D",
        "top-5",
        "DIMAP on ImageNet, change of top-5 accuracy",
        ("model", "FLOPs removed, %", "parameters removed, %", "top-5 change, %"),
        (
            ("Swin-B", 52.5, 52.7, -0.07),
            ("Swin-S", 33.2, 33.2, 0.8),
        ),
        note="The report calls Swin-S's 0.8 % a relative accuracy above the original's; the top-5 accuracies "
        "themselves are not stated.",
        source="Key Results",
    ),
    Table(
        "D",
        "top-1",
        "DIMAP on ImageNet, top-1 accuracy after 30 epochs of fine-tuning",
        ("model", "FLOPs removed, %", "dense accuracy, %", "pruned accuracy, %"),
        (
            ("Swin-B", 52.7, 83.48, 83.28),
            ("Swin-T", 50.8, 81.16, 80.35),
        ),
        note="From the paper, not from the report. For Swin-B the report has 52.7 % as parameters and 52.5 % as FLOPs.",
        source="arXiv 2404.13648",
    ),
    Table(
        "E",
        "text",
        "What PX is said to compute",
        ("quantity", "definition"),
        (
            ("trace of the NTK", "sum of its eigenvalues"),
            ("score of a weight, eq. 9", "dR/d(theta^2) * theta^2"),
        ),
        note="The discussion states no measurement: there is nothing to compare an accuracy with.",
        source="thread 5",
    ),
)
