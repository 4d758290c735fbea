"""`allora finetune --adapters`: several runs from one file, and what is wrong with it is one line and writes nothing."""

import json
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")
typer_testing = pytest.importorskip("typer.testing")

from tiny_training import make_model, sentences, write_csv  # noqa: E402

from allora_kernels.tools import cli  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    make_model(root / "bert", "Bert")
    write_csv(root / "data.csv", sentences(32))
    return root


def common(folder):
    return {
        "model": str(folder / "bert"),
        "data": str(folder / "data.csv"),
        "max_length": 16,
        "max_steps": 3,
        "batch_size": 4,
    }


RUNS = [
    {"name": "small", "r": 2, "learning-rate": 1e-3},
    {"name": "large", "r": 8, "norm": "none", "eta": 1.0, "loraplus-lr-ratio": 4},
]


def allora(tmp_path, settings, *options, name="runs.yaml"):
    file = tmp_path / name
    file.write_text(json.dumps(settings))  # JSON is YAML
    arguments = ["finetune", "--adapters", file, *options]
    return typer_testing.CliRunner().invoke(cli.app, [str(a) for a in arguments])


def test_runs_are_trained_together(folder, tmp_path):
    out = tmp_path / "out"
    result = allora(tmp_path, common(folder) | {"output": str(out), "runs": RUNS})
    assert result.exit_code == 0, result.output
    for text in ("small: loss", "large: accuracy", "after 3 steps", "tokens/s in all", str(out / "large" / "adapter")):
        assert text in result.output
    small, large = (json.loads((out / name / "metrics.json").read_text())["config"] for name in ("small", "large"))
    assert (small["r"], small["norm"], small["eta"], small["learning_rate"]) == (2, "row", 2.0, 1e-3)
    assert (large["r"], large["norm"], large["eta"]) == (8, None, 1.0)
    again = allora(tmp_path, common(folder) | {"output": str(out), "runs": RUNS})
    assert again.exit_code == 2 and "has an earlier run: continue it with --resume" in again.output
    again = allora(tmp_path, common(folder) | {"output": str(out), "runs": RUNS}, "--resume")
    assert again.exit_code == 0 and "small: loss" in again.output


def test_the_command_line_counts_more_than_the_file_and_a_run_more_than_both(folder, tmp_path):
    settings = common(folder) | {"output": "elsewhere", "r": 5, "seed": 7, "runs": [*RUNS, {"name": "plain"}]}
    result = allora(tmp_path, settings, "--output", tmp_path / "out", "--r", 3, "--max-steps", 1)
    assert result.exit_code == 0, result.output
    found = {n: json.loads((tmp_path / "out" / n / "metrics.json").read_text())["config"] for n in ("small", "plain")}
    assert found["small"]["r"] == 2 and found["plain"]["r"] == 3 and found["plain"]["seed"] == 7
    assert found["plain"]["max_steps"] == 1
    config = tmp_path / "common.yaml"
    config.write_text("r: 6\nseed: 2\n")
    del settings["seed"]
    result = allora(tmp_path, settings, "--output", tmp_path / "more", "--config", config, "--max-steps", 1)
    assert result.exit_code == 0, result.output
    plain = json.loads((tmp_path / "more" / "plain" / "metrics.json").read_text())["config"]
    assert plain["r"] == 5 and plain["seed"] == 2


def test_names_with_brackets_are_printed_as_they_are(folder, tmp_path):
    runs = [{"name": "[red]"}, {"name": "a[b]x"}]
    result = allora(tmp_path, common(folder) | {"output": str(tmp_path / "out"), "runs": runs, "max_steps": 1})
    assert result.exit_code == 0, result.output
    for run in runs:
        assert f"\n{run['name']}: loss" in result.output and f"\n{run['name']} ━" in result.output, result.output


def test_a_dry_run_prints_the_plan_and_writes_nothing(folder, tmp_path):
    result = allora(tmp_path, common(folder) | {"output": str(tmp_path / "out"), "runs": RUNS}, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "2 runs over one base model" in result.output and "nothing was written" in result.output
    assert "large: r=8, eta=1, norm=None, adamw, learning rate 0.001 (of lora_B 0.004), seed 0" in result.output
    assert "4 rows a step, 3 steps" in result.output
    assert [p.name for p in tmp_path.iterdir()] == ["runs.yaml"]


def test_a_run_that_diverges_is_said_and_the_exit_code_is_1(folder, tmp_path):
    mad = {"name": "mad", "learning_rate": 1e30, "optimizer": "sgd", "max_grad_norm": 0.0}
    result = allora(tmp_path, common(folder) | {"output": str(tmp_path / "out"), "runs": [*RUNS, mad]})
    assert result.exit_code == 1 and "became nan or infinite: mad at step" in result.output
    assert json.loads((tmp_path / "out" / "mad" / "metrics.json").read_text())["status"] == "diverged"
    assert (tmp_path / "out" / "small" / "adapter" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rusn": []}, "there is no setting 'rusn'; did you mean 'runs'"),
        ({"runs": None}, "must have a list of runs"),
        ({"runs": []}, "must have a list of runs"),
        ({"runs": {"small": {}}}, "must have a list of runs"),
        ({"runs": [{"r": 2}]}, "run 1 must have a name"),
        ({"runs": ["small"]}, "run 1 must have one setting a line"),
        ({"runs": [{"name": 3}]}, "run 1 must have a name, such as 'name: small', got 3"),
        ({"runs": [RUNS[0], RUNS[0]]}, "run 2: there is a run 'small' already"),
        ({"runs": [{"name": "a", "leaning_rate": 1}]}, "setting 'leaning_rate'; did you mean 'learning_rate'"),
        ({"runs": [{"name": "a", "output": "b"}]}, "run 1: there is no setting 'output'"),
        ({"runs": [{"name": "a", "resume": True}]}, "run 1: there is no setting 'resume'"),
        ({"runs": [{"name": "../a"}]}, "cannot be the name of a folder"),
        ({"runs": [{"name": "a.b"}]}, "must not be empty or contain a dot"),
        ({"runs": [{"name": "a", "r": 0}]}, "run 1 (a): r must be between 1 and 256"),
        ({"runs": [{"name": "a", "r": "four"}]}, "run 1 (a): r must be an int"),
        ({"runs": [*RUNS, {"name": "a", "max_length": 8}]}, "which must be equal"),
        ({"runs": [*RUNS, {"name": "a", "data": "nowhere.csv"}]}, "run 'a': no such data file: nowhere.csv"),
        ({"runs": [{"name": "a", "shuffle": "false"}]}, "run 1 (a): shuffle must be a bool (true or false), got 'false'"),
        ({"resume": True}, "there is nothing to resume in"),
        ({"model": None}, "run 1 has no model"),
        ({"model": "./nowhere"}, "no such model folder"),
        ({"output": None}, "run 1 has no output"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_a_line_and_nothing_is_written(changes, message, folder, tmp_path):
    settings = common(folder) | {"output": str(tmp_path / "out"), "runs": RUNS} | changes
    for options in ((), ("--dry-run",)):
        result = allora(tmp_path, {k: v for k, v in settings.items() if v is not None or k == "runs"}, *options)
        assert result.exit_code == 2, result.output
        assert message in result.output and len(result.output.strip().splitlines()) == 1, result.output
    assert [p.name for p in tmp_path.iterdir()] == ["runs.yaml"]


def test_files_that_cannot_be_read(folder, tmp_path):
    result = typer_testing.CliRunner().invoke(cli.app, ["finetune", "--adapters", str(tmp_path / "none.yaml")])
    assert result.exit_code == 2 and "no such settings file" in result.output
    assert allora(tmp_path, {"runs": RUNS}, name="runs.json").exit_code == 2
    assert not Path("out").exists()
