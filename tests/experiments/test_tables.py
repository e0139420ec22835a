"""Tables as text, and the report: rendering, several seeds, shortfalls, validation, atomic writing."""

import copy
import os
import random
from pathlib import Path

import pytest
import rich.console

from experiments.tables import check_result, console_table, counted, markdown_table, write_report

RESULT = {
    "schema": 1,
    "study": "functa",
    "preset": "mnist-small",
    "seed": 0,
    "command": "python -m experiments run functa mnist-small",
    "config": {"seed": 0, "width": 96},
    "metrics": {"test_psnr_mean": 23.1},
    "table": {"title": "Functa", "columns": ["quantity", "value"], "rows": [["PSNR, dB", 23.1], ["data set", "MNIST"]]},
    "comparisons": [
        {
            "quantity": "PSNR (mean per image), dB",
            "setting": "MNIST, latent 256",
            "ours": 23.1,
            "report": "A",
            "table": 2,
            "published": 21.37,
            "published_setting": "configuration 1",
            "higher_is_better": True,
            "note": "10,000 test images",
        }
    ],
    "figures": ["functa/mnist-small-0/reconstructions 4x.png"],
    "provenance": {
        "started": "2026-11-20T12:00:00Z",
        "seconds": 70.24,
        "device": "cpu x1 (AMD EPYC, 2 cores)",
        "versions": {"python": "3.11.7", "jax": "0.10.2"},
        "git_commit": "abc123",
        "git_dirty": False,
    },
}


def result(seed: int = 0, ours: float = 23.1, **changes) -> dict:
    """A result with that seed and number; `changes` replace top-level keys."""
    made = copy.deepcopy(RESULT)
    made["seed"] = made["config"]["seed"] = seed
    made["comparisons"][0]["ours"] = ours
    made["table"]["rows"][0][1] = ours
    return made | changes


def report(tmp_path: Path, *results: dict) -> str:
    write_report(list(results), tmp_path / "README.md")
    return (tmp_path / "README.md").read_text(encoding="utf-8")


def test_report_of_one_run(tmp_path):
    lines = report(tmp_path, result()).splitlines()
    assert lines[0] == "# Results"
    assert "## functa" in lines
    start = lines.index("### PSNR (mean per image), dB")
    assert lines[start + 2 : start + 7] == [
        "| preset | setting | published | where | ours | difference | verdict |",
        "| --- | --- | ---: | --- | ---: | ---: | --- |",
        "| mnist-small | MNIST, latent 256 | 21.37 | A Table 2: configuration 1 | 23.1 | +1.73 | reached |",
        "",
        "- mnist-small, MNIST, latent 256 (A Table 2: configuration 1): 10,000 test images",
    ]
    assert lines[lines.index("### mnist-small: Functa") + 4] == "| PSNR, dB | 23.1 |"
    assert (
        "- `python -m experiments run functa mnist-small`: mnist-small, seed 0; cpu x1 (AMD EPYC, 2 cores); 70.2 s; "
        "jax 0.10.2, python 3.11.7; commit abc123; 2026-11-20T12:00:00Z"
    ) in lines
    link = "- [functa/mnist-small-0/reconstructions 4x.png](functa/mnist-small-0/reconstructions%204x.png)"
    assert link in lines
    assert any(line.startswith("- **A**: Mao Keyu") for line in lines)
    assert not any(line.startswith("- **B**") for line in lines)  # not cited


def test_seeds_are_summarised_and_each_run_is_listed(tmp_path):
    text = report(tmp_path, *(result(seed, ours) for seed, ours in enumerate([22.0, 23.0, 24.0])))
    # mean 23, sample variance (1 + 0 + 1) / 2 = 1
    assert "| 21.37 | A Table 2: configuration 1 | 23 ± 1 (n = 3) | +1.63 | reached |" in text
    assert "| PSNR, dB | 23 ± 1 (n = 3) |\n| data set | MNIST |" in text
    assert text.count("- `python -m experiments run") == 3
    assert text.count("10,000 test images") == 1


def test_a_number_compared_with_two_reports_gets_two_rows(tmp_path):
    both = result()
    both["comparisons"].append(both["comparisons"][0] | {"report": "B", "table": "text", "published": 27, "note": ""})
    text = report(tmp_path, both)
    assert "| 27 | B text: configuration 1 | 23.1 | -3.9 | **falls short** |" in text
    assert "- **B**: " in text


@pytest.mark.parametrize(
    ("ours", "published", "higher_is_better", "verdict"),
    [
        (20.0, 21.37, True, "**falls short**"),
        (21.37, 21.37, True, "reached"),
        (0.02, 0.01, False, "**falls short**"),
        (0.01, 0.02, False, "reached"),
        (float("nan"), 0.02, True, "**falls short**"),
        (float("nan"), 0.02, False, "**falls short**"),
        (20.0, None, True, "—"),
    ],
)
def test_verdict(tmp_path, ours, published, higher_is_better, verdict):
    made = result(ours=ours)
    made["comparisons"][0] |= {"published": published, "higher_is_better": higher_is_better}
    row = next(line for line in report(tmp_path, made).splitlines() if line.startswith("| mnist-small |"))
    assert row.endswith(f"| {verdict} |")


def test_the_same_results_give_the_same_file_in_any_order(tmp_path):
    results = [result(seed, 20.0 + seed, preset=preset) for seed in range(3) for preset in ("small", "medium")]
    results += [result(study="digits")]
    first = report(tmp_path, *results)
    random.Random(0).shuffle(results)
    assert report(tmp_path, *results) == first
    assert first.index("## digits") < first.index("## functa")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_runs_with_other_settings_are_not_averaged(tmp_path):
    wide = result(1, 25.0)
    wide["config"]["width"] = 256
    text = report(tmp_path, result(0, 23.0), wide)
    assert "| mnist-small (width=96) | MNIST, latent 256 | 21.37 | A Table 2: configuration 1 | 23 |" in text
    assert "| mnist-small (width=256) | MNIST, latent 256 | 21.37 | A Table 2: configuration 1 | 25 |" in text
    assert "±" not in text.split("## functa")[1]


def test_tables_of_another_form_are_shown_for_each_seed(tmp_path):
    other = result(1)
    other["table"]["rows"].append(["extra", 1])
    text = report(tmp_path, result(0), other)
    assert "### mnist-small, seed 0: Functa" in text
    assert "### mnist-small, seed 1: Functa" in text


def test_a_run_without_comparison_or_commit(tmp_path):
    origin = RESULT["provenance"] | {"git_commit": None, "git_dirty": True}
    text = report(tmp_path, result(comparisons=[], figures=[], provenance=origin))
    assert "### mnist-small: Functa" in text
    assert "no git commit with uncommitted changes" in text
    assert "### Figures" not in text


def test_two_results_of_one_run_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two results for functa mnist-small seed 0"):
        report(tmp_path, result(), result())


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_report(tmp_path, monkeypatch, step):
    before = report(tmp_path, result())

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os if step == "fsync" else Path, step, full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_report([result(1)], tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == before
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def without(made: dict, *keys: str) -> dict:
    """The result with the value at that path removed."""
    part = made
    for key in keys[:-1]:
        part = part[key]
    del part[keys[-1]]
    return made


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (result(schema=2), "here: schema is 2, expected 1"),
        (without(result(), "schema"), "here: schema is None"),
        (without(result(), "seed"), "here: result lacks seed"),
        (without(result(), "comparisons"), "here: result lacks comparisons"),
        (without(result(), "table", "rows"), "here: table lacks rows"),
        (without(result(), "provenance", "device"), "here: provenance lacks device"),
        (result(comparisons=[{"quantity": "x"}]), "here: comparison lacks setting, ours, report"),
        (result(ours=None), "here: ours is None, expected a number"),
        (result(figures=["/tmp/a.png"]), "here: figure /tmp/a.png must be a path relative"),
        (result(figures=["../a.png"]), "here: figure ../a.png must be a path relative"),
        (
            result(comparisons=[RESULT["comparisons"][0] | {"table": 12}]),
            "here: report A: table 12 is unknown; nearest: 11",
        ),
        (result(table={"title": "", "columns": ["a"], "rows": [[1, 2]]}), "here: table row .* has not as many cells"),
    ],
)
def test_a_malformed_result_is_named(made, message):
    with pytest.raises(ValueError, match=message):
        check_result(made, "here")


def test_no_results():
    with pytest.raises(ValueError, match="results is empty"):
        write_report([], Path("unused"))


def test_markdown_table_aligns_escapes_and_marks_missing():
    text = markdown_table(["a|b", "n", "text"], [["x|y\nz", 0.98765, "3"], ["w", None, "8x8"]])
    assert text.splitlines() == [
        r"| a\|b | n | text |",
        "| --- | ---: | --- |",
        r"| x\|y z | 0.9877 | 3 |",
        "| w | — | 8x8 |",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(3e-5, "3e-05"), (21.37, "21.37"), (12345.6, "12346"), (4000, "4000"), (float("nan"), "nan"), (True, "True")],
)
def test_number_format(value, text):
    assert markdown_table(["v"], [[value]]).splitlines()[-1] == f"| {text} |"


def test_console_table_is_aligned_and_takes_brackets_literally():
    console = rich.console.Console(width=60, force_terminal=False)
    with console.capture() as capture:
        console.print(console_table(["quantity", "value"], [["PSNR [bold]", 23.1], ["steps", None]], title="Done"))
    lines = [line.rstrip() for line in capture.get().splitlines()]
    assert lines[0].strip() == "Done"
    assert any("PSNR [bold]" in line and line.endswith("23.1") for line in lines)
    ends = {len(line) for line in lines if line.endswith(("value", "23.1", "—"))}
    assert len(ends) == 1  # the numbers' right edges meet


@pytest.mark.parametrize("make", [console_table, markdown_table])
def test_a_row_of_another_length_is_refused(make):
    with pytest.raises(ValueError, match=r"row \[1\] has 1 cells, expected 2: a, b"):
        make(["a", "b"], [[1, 2], [1]])


def test_counted_things():
    assert [counted(n, "epoch") for n in (0, 0.25, 1, 1.0, 2)] == [
        "0 epochs",
        "0.25 epochs",
        "1 epoch",
        "1 epoch",
        "2 epochs",
    ]
