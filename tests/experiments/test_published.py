"""The published numbers against lines copied from the reports by hand, and against each other."""

import pytest

from experiments.published import REPORTS, TABLES, Table, published, table

# (report, table, column): the cells as the report prints them, from left to right.
PRINTED = {
    ("A", 4, "L1 strength"): "0 5e-8 5e-7 5e-6 5e-5 5e-4 5e-3 5e-2",
    ("A", 4, "accuracy"): "0.9852 0.9781 0.9746 0.9758 0.9766 0.9705 0.9355 0.8678",
    ("A", 4, "top-5 accuracy"): "0.9995 0.9997 0.9996 0.9997 0.9993 0.9992 0.9984 0.9921",
    ("A", 5, "accuracy, %"): "98.52 98.31 98.13 98.02 97.72 96.34 94.03 77.55 58.22 42.81",
    ("A", 6, "accuracy, %"): "98.52 98.17 96.69 95.41 93.02 91.04 87.26 79.34 71.64 37.88",
    ("A", 6, "parameters, M"): "85.81 65.6 50.67 42.54 37.36 30.3 24.77 18.88 9.03 0.24",
    ("A", 7, "accuracy, %"): "98.52 97.55 96.59 95.57 91.64 78.99 69.79 62.99 53.6 46.22",
    ("A", 7, "parameters, M"): "85.81 70.35 56.24 42.6 31.8 21.64 14.28 8.36 3.68 1.06",
    ("A", 8, "accuracy, %"): "98.52 86.57 85.92 85.12 83.51 79.42 71.3 52.13 10.21 10.14",
    ("A", 8, "top-5 accuracy, %"): "99.98 99.5 99.43 99.43 99.2 98.65 96.64 89.86 50.88 50.94",
    ("A", 10, "conv3: accuracy, %"): "96.88 96.88 96.88 96.10 94.90 85.84",
    ("B", 1, "PSNR, dB"): "15.68 22.02 29.06 37.99 55.47",
    ("B", 2, "PSNR after 2000 steps, dB"): "55.47 50.12 44.34 42.96",
    ("B", 3, "test accuracy"): "0.4109 0.4230 0.4413 0.4377 0.4346 0.4376",
    ("B", 4, "test accuracy"): "0.4220 0.4219 0.4354 0.4324 0.4313 0.4307",
    ("B", 5, "train accuracy"): "0.4579 0.5017 0.5331 0.5369 0.5529",
    ("B", 6, "accuracy, %"): "98.1 97.8 97.4 96.2",
    ("B", 7, "accuracy, %"): "98.1 98.2 98.0 97.8",
    ("B", 8, "test accuracy, %"): "98.77 99.02 98.92",
    ("B", 9, "test accuracy, %"): "80.30 80.57 80.66",
    ("B", 10, "accuracy, %"): "98.7 98.68 98.53 97.72 93.42",
    ("B", 11, "accuracy, %"): "89.42 85.59 93.42 98.67 98.05",
    ("B", 12, "accuracy, %"): "80.30 67.52 34.54 14.67 10.36",
    ("B", 13, "accuracy, %"): "10.05 11.52 10.36 58.49 72.38 72.84 80.34 80.32",
}


@pytest.mark.parametrize("where", PRINTED, ids=str)
def test_cells_are_as_printed(where):
    report, number, column = where
    assert table(report, number).column(column) == tuple(float(cell) for cell in PRINTED[where].split())


@pytest.mark.parametrize(
    ("report", "number", "row", "column", "value"),
    [
        ("A", 1, 2, "outer learning rate", 3e-6),
        ("A", 1, 3, "latent", "8x8x16"),
        ("A", 1, 3, "w0", 10),
        ("A", 2, (1, "MNIST"), "PSNR, dB", 21.37),
        ("A", 2, (2, "MNIST"), "PSNR, dB", 19.36),
        ("A", 2, (1, "CIFAR10"), "PSNR, dB", 20.25),
        ("A", 2, (3, "CIFAR10"), "PSNR, dB", 22.42),
        ("A", 3, (1, "MNIST"), "accuracy, %", 96.94),
        ("A", 3, (3, "CIFAR10"), "accuracy, %", 56.24),
        ("A", 9, 30, "learning rate", "0.1**(epoch//20)"),
        ("A", 11, 30, "mu", 20),
        ("B", 8, "DessiLBI", "test accuracy, %", 99.02),
        ("C", "Figure 3", 0.9, "accuracy, %", 77),
        ("C", "Figure 4", 0.95, "accuracy, %", 85.4),
        ("D", "top-5", "Swin-B", "top-5 change, %", -0.07),
        ("D", "top-1", "Swin-T", "pruned accuracy, %", 80.35),
        ("papers", "CIFAR-10", ("COIN++, 3 steps", "512"), "PSNR, dB", 31.7),
        ("papers", "CIFAR-10", ("Spatial Functa", "8x8x16"), "test accuracy, %", 90.3),
    ],
)
def test_single_cells(report, number, row, column, value):
    assert published(report, number, row=row, column=column) == value


def test_all_tables_of_a_and_b_are_there():
    for report, count in (("A", 11), ("B", 13)):
        numbers = [t.number for t in TABLES if t.report == report and isinstance(t.number, int)]
        assert numbers == list(range(1, count + 1))
    assert {t.report for t in TABLES} == set(REPORTS)
    assert len({(t.report, t.number) for t in TABLES}) == len(TABLES)


@pytest.mark.parametrize("number", [6, 7])
def test_parameters_fall_with_sparsity(number):
    parameters = table("A", number).column("parameters, M")
    assert list(parameters) == sorted(parameters, reverse=True)
    assert len(set(parameters)) == 10


def test_the_dense_vit_is_the_same_in_all_of_a():
    for number in (5, 6, 7, 8):
        assert published("A", number, row="base", column="accuracy, %") == 98.52
        assert table("A", number).column("sparsity") == ("base", 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    assert published("A", 4, row=0, column="accuracy") == 0.9852


@pytest.mark.parametrize("t", TABLES, ids=lambda t: t.name)
def test_accuracies_are_possible_and_top_5_is_never_below_top_1(t):
    for column in t.columns:
        if "accuracy" in column:
            limit = 100 if "%" in column else 1
            assert all(0 < value <= limit for value in t.column(column) if value is not None)
    for unit in ("", ", %"):
        if f"top-5 accuracy{unit}" in t.columns:
            pairs = zip(t.column(f"accuracy{unit}"), t.column(f"top-5 accuracy{unit}"), strict=True)
            assert all(top_1 <= top_5 for top_1, top_5 in pairs)


def test_tables_agree_where_they_print_the_same_run():
    assert published("B", 1, row=800, column="PSNR, dB") == table("B", 2).cell(32, "PSNR after 800 steps, dB")
    assert published("B", 1, row=2000, column="PSNR, dB") == table("B", 2).cell(32, "PSNR after 2000 steps, dB")
    assert published("B", 10, row=80, column="accuracy, %") == published("B", 11, row="conv3", column="accuracy, %")
    assert published("B", 12, row=80, column="accuracy, %") == published("B", 13, row="conv3", column="accuracy, %")
    papers = table("papers", "CIFAR-10")
    for name, latent, configuration in (("Functa", "256", 1), ("Spatial Functa", "8x8x16", 3)):
        key = (configuration, "CIFAR10")
        assert papers.cell((f"report A, {name}", latent), "PSNR, dB") == table("A", 2).cell(key, "PSNR, dB")
        assert papers.cell((f"report A, {name}", latent), "test accuracy, %") == table("A", 3).cell(key, "accuracy, %")


def test_known_quirks_are_noted_and_real():
    a10 = table("A", 10)
    assert a10.column("conv3: accuracy, %") == a10.column("conv3 + fc1: accuracy, %")
    assert "same numbers" in a10.note
    accuracy = dict(zip(table("B", 3).column("epoch"), table("B", 3).column("test accuracy"), strict=True))
    assert accuracy[400] == 0.4377
    assert max(accuracy, key=accuracy.get) == 300
    assert "44.13" in table("B", 3).note
    assert "removed" in table("A", 5).note
    local, global_ = table("A", 7), table("A", 6)
    wins = [s for s in local.column("sparsity") if local.cell(s, "accuracy, %") > global_.cell(s, "accuracy, %")]
    assert wins == [0.3, 0.9]
    assert table("B", 12).cell(0, "accuracy, %") == table("B", 9).cell("Adam", "test accuracy, %")


@pytest.mark.parametrize(
    ("call", "nearest"),
    [
        (lambda: table("a", 2), "'A'"),
        (lambda: table("A", 12), "11"),
        (lambda: table("C", "figure 3"), "'Figure 3'"),
        (lambda: published("A", 5, row=0.52, column="accuracy, %"), "0.5"),
        (lambda: published("A", 5, row="Base", column="accuracy, %"), "'base'"),
        (lambda: published("A", 2, row=(1, "mnist"), column="PSNR, dB"), r"\(1, 'MNIST'\)"),
        (lambda: published("A", 5, row=0.5, column="acuracy"), "'accuracy, %'"),
    ],
)
def test_unknown_names_get_the_nearest(call, nearest):
    with pytest.raises(ValueError, match=f"is unknown; nearest: {nearest};"):
        call()


def test_ragged_and_ambiguous_tables_are_refused():
    with pytest.raises(ValueError, match="has 1 cells, expected 2"):
        Table("A", 99, "", ("a", "b"), ((1,),))
    with pytest.raises(ValueError, match="two rows have the same first 1 cells"):
        Table("A", 99, "", ("a", "b"), ((1, 2), (1, 3)))
