"""The command line: its help, its errors, its exit codes."""

import subprocess
import sys

import jax
import pytest
from processes import ROOT

from experiments import config, execute
from experiments.__main__ import main
from experiments.config import Options, Preset, differences, parse


@pytest.fixture
def command(capsys):
    """command("list") gives exit code and output in this process."""

    def run(*arguments):
        try:
            code = main(list(map(str, arguments)))
        except SystemExit as exit:
            code = exit.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_list_names_every_preset_with_time_and_expectation(command):
    code, out, _ = command("list")
    assert code == 0
    text = " ".join(out.split())
    for name in config.STUDIES:
        assert name in text
        for preset, entry in config.study(name).PRESETS.items():
            assert preset in text
            assert entry.time.split()[0] in text


@pytest.mark.parametrize("arguments", [("run", "--help"), ("run", "functa", "--help"), ("run", "functa", "-h")])
def test_help_before_a_preset_is_chosen_lists_them(command, arguments):
    code, out, err = command(*arguments)
    assert (code, err) == (0, "")
    assert "usage: python -m experiments run STUDY PRESET [--field value ...]" in out
    assert "tiny" in out


@pytest.mark.parametrize("arguments", [("run",), ("run", "functa"), ("run", "functa", "--steps", "3")])
def test_a_missing_preset_is_an_error_that_lists_them(command, arguments):
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert "run STUDY PRESET" in err
    assert "tiny" in err


def test_help_of_a_preset_has_every_field_with_its_docstring(command):
    code, out, _ = command("run", "functa", "tiny", "--help")
    assert code == 0
    text = " ".join(out.replace("│", " ").split())
    preset = config.preset("functa", "tiny")
    for fields in (preset.config, Options()):
        documented = type(fields).__doc__.split("Attributes:")[1]
        for name in vars(fields):
            assert f"--{name.replace('_', '-')}" in text, name
            (line,) = [line for line in documented.splitlines() if line.strip().startswith(f"{name}: ")]
            first_words = " ".join(line.split(": ", 1)[1].split()[:3]).replace("`", "")
            assert first_words in text.replace("`", ""), name
    assert preset.summary in text


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("run", "funta", "tiny"), 1, "unknown study 'funta'; did you mean 'functa'?"),
        (("run", "funta"), 1, "unknown study 'funta'; did you mean 'functa'?"),
        (("run", "funta", "--help"), 1, "unknown study 'funta'; did you mean 'functa'?"),
        (("run", "functa", "tny"), 1, "unknown preset of functa 'tny'; did you mean 'tiny'?"),
        (("run", "functa", "tiny", "--batchsize", "3"), 2, "--batch-size"),
        (("run", "functa", "tiny", "--learnin-rate", "3"), 2, "--learning-rate"),
        (("run", "functa", "tiny", "--steps", "many"), 2, "--steps: invalid literal for int()"),
        (("run", "functa", "tiny", "--modulate", "nothing"), 2, "shift"),
        (("run", "functa", "tiny", "extra"), 2, "extra"),
        (("lst",), 2, "invalid choice: 'lst'"),
        ((), 2, "COMMAND"),
        (("data",), 2, "ACTION"),
    ],
)
def test_a_wrong_word_is_an_error_with_the_right_one(command, arguments, code, message):
    found, out, err = command(*arguments)
    assert found == code
    assert message in " ".join((out + err).replace("│", " ").split())
    assert "Traceback" not in err


@pytest.fixture
def study(monkeypatch):
    """study(function) makes "run functa tiny" call it instead of what is done otherwise; nothing global is changed."""

    def replace(function):
        monkeypatch.setattr(execute, "execute", lambda *arguments: function())

    return replace


def raising(error):
    def act():
        raise error

    return act


def test_what_explains_itself_is_one_message(command, study, tmp_path):
    study(lambda: execute.runs.directory_of("a", "b", 0, Options(run_name="[bold]../x[/]")))
    code, _, err = command("run", "functa", "tiny")
    assert code == 1
    assert err.startswith("error: run name '[bold]../x[/]' must be")
    assert len(err.splitlines()) == 1
    study(lambda: (tmp_path / "missing").read_text())
    assert command("run", "functa", "tiny")[::2] == (
        1, f"error: [Errno 2] No such file or directory: '{tmp_path / 'missing'}'\n",
    )  # fmt: skip


@pytest.mark.parametrize(
    "action",
    [
        raising(KeyError("a")),
        raising(TypeError("b")),
        raising(ZeroDivisionError("c")),
        lambda: int("not ours"),
        lambda: jax.numpy.zeros(3) + jax.numpy.zeros(4),
        lambda: jax.numpy.zeros(3).reshape(5),
    ],
)
def test_a_bug_keeps_its_traceback(command, study, action):
    study(action)
    with pytest.raises((KeyError, TypeError, ZeroDivisionError, ValueError)):
        command("run", "functa", "tiny")


def test_tracebacks_on_request(command, study, monkeypatch):
    monkeypatch.setenv("COMPACT_JAX_TRACEBACK", "1")
    study(lambda: config.preset("functa", "tny"))
    with pytest.raises(ValueError, match="did you mean 'tiny'"):
        command("run", "functa", "tiny")


def test_ctrl_c_outside_of_training_is_quiet(command, study):
    study(raising(KeyboardInterrupt()))
    code, _, err = command("run", "functa", "tiny")
    assert code == 130
    assert "the same command goes on" in err


def test_data_list_and_report_of_nothing(command, tmp_path):
    code, out, _ = command("data", "list", "--data-dir", tmp_path)
    assert code == 0
    for word in ("mnist", "cifar100", "digits", str(tmp_path).split("/")[1]):
        assert word in out
    code, _, err = command("report", "--runs-dir", tmp_path / "runs", "--results-dir", tmp_path / "results")
    assert (code, err.splitlines()) == (
        1,
        ["error: " + "results is empty: run a study first (python -m experiments list)"],
    )


def test_fields_are_overridden_with_their_types():
    base = config.preset("functa", "tiny").config
    text = "--hidden 3 4 --steps 7 --inner-rate 0.5 --no-meta-sgd --runs-dir a/b --tensorboard"
    asked, options = parse(base, text.split(), prog="p", description="d")
    assert (asked.hidden, asked.steps, asked.inner_rate, asked.meta_sgd) == ((3, 4), 7, 0.5, False)
    assert (str(options.runs_dir), options.tensorboard, options.run_name) == ("a/b", True, None)
    assert asked.width == base.width
    assert parse(base, [], prog="p", description="d") == (base, Options())


def test_differences_name_the_fields():
    assert differences({"a": 1, "b": [2]}, {"a": 1, "b": [3], "c": None}) == [
        "b: the run has [3], asked for [2]",
        "c: the run has None, asked for '(not there)'",
    ]


def test_presets_have_all_that_is_printed():
    for name in config.STUDIES:
        study = config.study(name)
        assert study.SUMMARY
        for entry in study.PRESETS.values():
            assert isinstance(entry, Preset)
            assert all((entry.summary, entry.time, entry.expect))
            assert isinstance(entry.config.seed, int)
            hash(entry.config)


def test_compiled_programs_are_kept_in_the_users_cache_directory(environment, tmp_path):
    script = "from experiments.execute import use_compilation_cache as use; import jax; use(); print(jax.config.jax_compilation_cache_dir)"  # noqa: E501
    env = {name: value for name, value in environment.items() if name != "COMPACT_JAX_CACHE"}

    def where(**more):
        done = subprocess.run([sys.executable, "-c", script], env={**env, **more}, capture_output=True, text=True)
        return done.stdout.strip()

    assert where(HOME=str(tmp_path), XDG_CACHE_HOME="") == str(tmp_path / ".cache" / "compact-jax" / "compiled")
    assert where(COMPACT_JAX_CACHE=str(tmp_path / "c")) == str(tmp_path / "c" / "compiled")
    assert where(COMPACT_JAX_CACHE="x", JAX_COMPILATION_CACHE_DIR="/y") == "/y"


@pytest.mark.slow
def test_functa_from_the_command_line(environment, tmp_path):
    """The real thing once, as a person would: result, figures, event files, and the second time it does nothing."""
    asked = [sys.executable, "-m", "experiments", "run", "functa", "tiny", "--runs-dir", str(tmp_path), "--tensorboard"]
    done = subprocess.run(asked, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    directory = tmp_path / "functa" / "tiny-0"
    for name in ("reconstructions.png", "psnr.png", "phases.png", "result.json"):
        assert (directory / name).stat().st_size > 500
        assert str(directory / name) in done.stdout
    assert list((directory / "tensorboard").iterdir())
    assert "Warning" not in done.stderr

    def written():
        return {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.name != "lock"}

    before = written()
    again = subprocess.run(asked, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "already done" in again.stdout
    assert written() == before


@pytest.mark.parametrize("arguments", [["list"], ["run", "functa", "tiny", "--help"]])
def test_list_and_help_wait_for_nothing_that_they_do_not_need(environment, arguments):
    """No data set, no file format, no device: the platform named here does not exist, so that using it would fail."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "experiments", *arguments],
        env={**environment, "JAX_PLATFORMS": "none_at_all"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    slow = {"flax.nnx", "pyarrow", "sklearn", "tensorboardX", "tensorflow_datasets"}
    assert {"jax", "experiments.config"} <= imported
    assert not slow & imported
