"""Several runs over one base model: each result is the single run's, and each folder is one."""

import io
import json
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")

from safetensors.torch import load_file  # noqa: E402
from tiny_training import make_model, sentences, switch_dropout_off, write_csv  # noqa: E402

from allora_kernels import load_adapter  # noqa: E402
from allora_kernels.models import async_saving  # noqa: E402
from allora_kernels.training import FinetuneConfig, finetune, finetune_together, together  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS = ("classification", "causal-lm")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    models = {task: make_model(folder / task, family) for task, family in zip(TASKS, ("Bert", "Llama"))}
    # Dropout draws from one stream for all runs, and a single run has its own.
    switch_dropout_off(models["classification"])
    rows = sentences(96)
    longer = [(f"{text} w0 w1 w2 w3 w4 w5 w6", label) for text, label in rows[:40]]
    files = {
        "data": rows,
        "longer": longer,
        "short": [("w0 w1 w2 w3 w4 good", "fresh"), ("w5 w6 w7 w8 w9 bad", "rotten")],
    }
    return models, *(write_csv(folder / f"{name}.csv", these) for name, these in files.items())


@pytest.fixture
def configs(inputs, tmp_path):
    def make(task):
        models, data, longer, short = inputs
        common = dict(
            model=models[task], task=task, max_length=16, save_steps=4, batch_size=8, learning_rate=0.02, max_steps=9
        )
        runs = {
            "first": dict(r=4, data=data),
            "accumulating": dict(r=2, data=data, eta=1.0, norm="token", grad_accumulation=2, batch_size=4, max_steps=6),
            "sgd": dict(
                r=3, data=longer, norm=None, optimizer="sgd", learning_rate=0.5, momentum=0.9, schedule="cosine"
            ),
            "seeded": dict(r=4, data=longer, seed=3, epochs=1.5, max_steps=None, warmup_steps=2, weight_decay=0.1),
        }
        if task == "causal-lm":
            # Its blocks are shorter than the others', so that they are padded in the batch.
            runs["short"] = dict(r=2, data=short, max_steps=5)
        return {
            name: FinetuneConfig(output=str(tmp_path / "runs" / name), **(common | own)) for name, own in runs.items()
        }

    return make


def adapter(folder):
    return load_file(Path(folder, "adapter", "adapter_model.safetensors"))


# --- each run is the single one -------------------------------------------------------------------------------------


def test_a_model_whose_text_config_is_within_another_is_trained(configs, tmp_path):
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    text = dict(vocab_size=25, intermediate_size=32, max_position_embeddings=32, **sizes)
    vision = dict(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=8, patch_size=4
    )
    ids = dict(
        pad_token_id=0, bos_token_id=1, eos_token_id=2, image_token_index=24, boi_token_index=22, eoi_token_index=23
    )
    config = transformers.Gemma3Config(text_config=text | ids, vision_config=vision, mm_tokens_per_image=4, **ids)
    folder = make_model(tmp_path / "gemma3", "Llama")
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    runs = {name: replace(configs("causal-lm")[name], model=folder, max_steps=2) for name in ("first", "accumulating")}
    for name, metrics in finetune_together(runs).items():
        single = finetune(replace(runs[name], output=str(tmp_path / "single" / name)))
        assert metrics["after"]["loss"] == pytest.approx(single["after"]["loss"], rel=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_each_result_is_the_single_runs(task, configs, tmp_path):
    runs = configs(task)
    found = finetune_together(runs)
    steps = set()
    for name, config in runs.items():
        single = finetune(replace(config, output=str(tmp_path / "single" / name)))
        mine = found[name]
        steps.add(mine["steps"])
        assert mine["status"] == single["status"] == "finished"
        for key in ("data", "parameters", "device", "steps", "tokens", "versions", "processes"):
            assert mine[key] == single[key], key
        for when in ("before", "after"):
            for measure, value in single[when].items():
                assert mine[when][measure] == pytest.approx(value, rel=1e-5, abs=1e-5), (name, when, measure)
        for (i, a), (j, b) in zip(mine["loss_history"], single["loss_history"], strict=True):
            assert i == j and a == pytest.approx(b, rel=1e-5, abs=1e-5), (name, i)
        want, got = adapter(tmp_path / "single" / name), adapter(config.output)
        assert want.keys() == got.keys()
        for key in want:
            torch.testing.assert_close(
                got[key], want[key], rtol=1e-4, atol=1e-5, msg=lambda m, k=key, n=name: f"{n} {k}: {m}"
            )
        single_config, own_config = (
            json.loads(Path(folder, "adapter", "adapter_config.json").read_text())
            for folder in (tmp_path / "single" / name, config.output)
        )
        assert own_config == single_config
    assert len(steps) > 1, "runs of different lengths"


def test_the_folders_are_those_of_single_runs(configs, tmp_path):
    runs = configs("classification")
    metrics = finetune_together(runs)
    single = finetune(replace(runs["first"], output=str(tmp_path / "single"), save_steps=100))
    for name, config in runs.items():
        files = {str(p.relative_to(config.output)) for p in Path(config.output).rglob("*") if p.is_file()}
        wanted = {str(p.relative_to(tmp_path / "single")) for p in (tmp_path / "single").rglob("*") if p.is_file()}
        assert {f for f in files if not f.startswith("checkpoint-")} == {
            f for f in wanted if not f.startswith("checkpoint-")
        }
        assert {p.name for p in Path(config.output).glob("checkpoint-*")} == {
            f"checkpoint-{step}" for step in [*range(4, metrics[name]["steps"], 4), metrics[name]["steps"]][-2:]
        }
        written = json.loads(Path(config.output, "metrics.json").read_text())
        assert written == json.loads(json.dumps(metrics[name]))
        assert written.keys() == single.keys() | {"beside"}
        assert sorted(written["beside"]) == sorted(runs.keys() - {name})
        model = transformers.AutoModelForSequenceClassification.from_pretrained(config.model)
        load_adapter(model, Path(config.output, "adapter"))


# --- what ends early ------------------------------------------------------------------------------------------------


def test_ctrl_c_ends_all_after_the_step_and_saves_them(configs, monkeypatch):
    runs, step = configs("causal-lm"), together._mixed_step

    def interrupted(model, active):
        if active[0].done == 2:
            signal.raise_signal(signal.SIGINT)
        return step(model, active)

    monkeypatch.setattr(together, "_mixed_step", interrupted)
    found = finetune_together(runs)
    assert {m["status"] for m in found.values()} == {"interrupted"} and {m["steps"] for m in found.values()} == {3}
    assert all(m["after"] is None for m in found.values())
    for config in runs.values():
        assert len(adapter(config.output)) and Path(config.output, "loss.png").exists()


def test_a_run_that_diverges_ends_and_the_others_are_what_they_would_have_been(configs, tmp_path):
    runs = configs("causal-lm")
    healthy = finetune_together(
        {n: replace(c, output=str(tmp_path / "healthy" / n)) for n, c in runs.items() if n != "sgd"}
    )
    mad = {n: replace(c, learning_rate=1e30, max_grad_norm=0.0) if n == "sgd" else c for n, c in runs.items()}
    found = finetune_together(mad)
    assert found["sgd"]["status"] == "diverged" and found["sgd"]["after"] is None and found["sgd"]["steps"] < 9
    assert not Path(runs["sgd"].output, "adapter").exists()
    json.loads(Path(runs["sgd"].output, "metrics.json").read_text(), parse_constant=pytest.fail)
    for name, metrics in healthy.items():
        assert found[name]["status"] == "finished"
        for (_, a), (_, b) in zip(found[name]["loss_history"], metrics["loss_history"], strict=True):
            assert a == pytest.approx(b, rel=2e-3)


def test_a_run_whose_last_step_leaves_no_numbers_has_diverged(configs):
    runs = {name: config for name, config in configs("causal-lm").items() if name in ("first", "sgd")}
    runs["sgd"] = replace(runs["sgd"], learning_rate=1e30, max_grad_norm=0.0, max_steps=1)
    found = finetune_together(runs)
    assert {name: m["status"] for name, m in found.items()} == {"first": "finished", "sgd": "diverged"}
    assert found["sgd"]["after"] is None and not Path(runs["sgd"].output, "adapter").exists()


def test_a_callers_console_shows_names_with_brackets_as_they_are(configs):
    rich = pytest.importorskip("rich.console")
    console, config = rich.Console(file=io.StringIO()), configs("causal-lm")["first"]
    runs = {name: replace(config, output=f"{config.output}-{name}", max_steps=1) for name in ("[red]", "b")}
    finetune_together(runs, console=console)
    assert "adapter [red] is active, beside b" in console.file.getvalue()


# --- going on -------------------------------------------------------------------------------------------------------


def stop_at(step, raising=None):
    """`_mixed_step` that is interrupted, or fails, in this step."""
    plain = together._mixed_step

    def stopped(model, active):
        if max(run.done for run in active) == step - 1:
            if raising is not None:
                raise raising
            signal.raise_signal(signal.SIGINT)
        return plain(model, active)

    return stopped


def resumed(configs):
    return {name: replace(config, resume=True) for name, config in configs.items()}


def elsewhere(configs, folder):
    return {name: replace(config, output=str(folder / name)) for name, config in configs.items()}


TIMES = {"seconds", "tokens_per_second", "peak_memory_bytes", "config"}


def assert_same_runs(found, want, configs, whole):
    for name, config in configs.items():
        assert {k: v for k, v in found[name].items() if k not in TIMES} == {
            k: v for k, v in want[name].items() if k not in TIMES
        }
        mine, other = adapter(config.output), adapter(whole[name].output)
        assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine), name


def with_dropout(model, folder):
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text()) | {"hidden_dropout_prob": 0.2}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("end", ["ctrl-c", "killed"])
def test_runs_go_on_to_the_same_bits(task, end, configs, tmp_path, monkeypatch):
    """Also those of other lengths, and with what dropout draws. Step 7 is after a checkpoint and, of "short", after the end."""
    runs = configs(task)
    if task == "classification":
        folder = with_dropout(runs["first"].model, tmp_path / "with-dropout")
        runs = {name: replace(config, model=folder) for name, config in runs.items()}
    whole = elsewhere(runs, tmp_path / "whole")
    want = finetune_together(whole)
    with monkeypatch.context() as patched:
        patched.setattr(together, "_mixed_step", stop_at(7, None if end == "ctrl-c" else MemoryError))
        if end == "ctrl-c":
            found = finetune_together(runs)
            assert {m["steps"] for m in found.values()} - {5, 6} == {7}
        else:
            with pytest.raises(MemoryError):
                finetune_together(runs)
    steps = []
    with monkeypatch.context() as patched:
        plain = together._mixed_step
        patched.setattr(together, "_mixed_step", lambda *args: steps.append(1) or plain(*args))
        found = finetune_together(resumed(runs))
    assert len(steps) == max(m["steps"] for m in want.values()) - (7 if end == "ctrl-c" else 4)
    assert_same_runs(found, want, runs, whole)
    assert finetune_together(resumed(runs)) == json.loads(json.dumps(found))


def test_a_checkpoint_that_is_not_whole_is_passed_by_and_two_are_kept(configs, tmp_path, monkeypatch):
    runs = {name: replace(config, save_steps=2) for name, config in configs("causal-lm").items() if name != "short"}
    whole = elsewhere(runs, tmp_path / "whole")
    want = finetune_together(whole)
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(together, "_mixed_step", stop_at(8, MemoryError))
        # What is being written when training fails is written to its end.
        write = async_saving.write_adapter
        patched.setattr(async_saving, "write_adapter", lambda *args: time.sleep(0.1) or write(*args))
        finetune_together(runs)
    first = Path(runs["first"].output)
    assert {p.name for p in first.glob("checkpoint-*")} >= {"checkpoint-4", "checkpoint-6"}
    (first / "checkpoint-6" / "adapter_model.safetensors").unlink()
    assert_same_runs(finetune_together(resumed(runs)), want, runs, whole)
    last = want["first"]["steps"]
    assert {p.name for p in first.glob("checkpoint-*")} == {f"checkpoint-{last - 1}", f"checkpoint-{last}"}


@pytest.mark.parametrize("stop, torn, again", [(3, 2, 0), (4, 3, 2), (8, None, 6), (8, 6, 4)])
def test_runs_that_drop_out_go_on_from_a_step_that_all_have(stop, torn, again, configs, inputs, tmp_path, monkeypatch):
    """Killed after another run has ended or diverged, or before the first run was saved at a step where the others were."""
    folder = with_dropout(inputs[0]["classification"], tmp_path / "with-dropout")
    made = configs("classification")
    changes = {"first": dict(save_steps=3), "accumulating": dict(max_steps=5, save_steps=2)}
    changes["sgd"] = dict(learning_rate=1e30, max_grad_norm=0.0, save_steps=100)
    runs = {name: replace(made[name], model=folder, **own) for name, own in changes.items()}
    whole = elsewhere(runs, tmp_path / "whole")
    want = finetune_together(whole)
    assert want["sgd"]["status"] == "diverged" and want["sgd"]["steps"] < 3
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(together, "_mixed_step", stop_at(stop, MemoryError))
        finetune_together(runs)
    if torn is not None:
        Path(runs["first"].output, f"checkpoint-{torn}", "adapter_config.json").unlink()
    taken, plain = [], together._mixed_step
    with monkeypatch.context() as patched:
        patched.setattr(together, "_mixed_step", lambda *args: taken.append(args[1][0].done) or plain(*args))
        found = finetune_together(resumed(runs))
    assert taken == [*range(again, 9)]
    left = {name: config for name, config in runs.items() if name != "sgd"}
    assert_same_runs({name: found[name] for name in left}, want, left, whole)
    assert found["sgd"]["status"] == "diverged" and found["sgd"]["loss_history"] == want["sgd"]["loss_history"]


def test_runs_with_no_step_in_common_go_on_from_their_own(configs, monkeypatch):
    runs = {name: config for name, config in configs("causal-lm").items() if name in ("first", "sgd")}
    for (name, config), step in zip(runs.items(), (3, 7)):
        with monkeypatch.context() as patched:
            patched.setattr(together, "_mixed_step", stop_at(step))
            finetune_together({name: replace(config, save_steps=100)})
    taken, plain = [], together._mixed_step
    monkeypatch.setattr(together, "_mixed_step", lambda *args: taken.append([r.done for r in args[1]]) or plain(*args))
    found = finetune_together(resumed(runs))
    assert taken[0] == [3, 7] and {m["status"] for m in found.values()} == {"finished"}


def test_what_was_trained_in_the_other_way_is_not_resumed(configs):
    runs = configs("causal-lm")
    two = {name: runs[name] for name in ("first", "short")}
    finetune_together(two)
    with pytest.raises(ValueError, match="was trained together with others, by --adapters"):
        finetune(replace(runs["first"], resume=True))
    finetune(runs["sgd"])
    with pytest.raises(ValueError, match="was trained by itself, without --adapters"):
        finetune_together(resumed(two | {"sgd": runs["sgd"]}))
    with pytest.raises(ValueError, match=r"cannot resume .* with other settings: r was 4"):
        finetune_together(resumed(two | {"first": replace(runs["first"], r=3)}))
    with pytest.raises(ValueError, match="has an earlier run: continue it with --resume"):
        finetune_together(two)


# --- what does not fit together -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, match",
    [
        (dict(max_length=8), "'first' and 'sgd' have max_length 16 and 8, which must be equal"),
        (dict(target_modules=["query"]), "have target_modules .* must be equal"),
        (dict(model="elsewhere"), "have model .* must be equal"),
        (dict(gradient_checkpointing=True), "have gradient_checkpointing False and True"),
        (dict(experts=True), "have experts False and True, which must be equal"),
        (dict(resume=True), "there is nothing to resume in .*sgd: it has no metrics.json"),
        (dict(data="nowhere.csv"), "run 'sgd': no such data file: nowhere.csv"),
        (dict(text_column="words"), "run 'sgd': .*has no column 'words'"),
    ],
)
def test_runs_that_do_not_fit_together_write_nothing(changes, match, configs, tmp_path):
    runs = configs("classification")
    runs["sgd"] = replace(runs["sgd"], **changes)
    with pytest.raises(ValueError, match=match):
        finetune_together(runs)
    assert not (tmp_path / "runs").exists()


def test_mixtures_that_runs_cannot_share(configs, tmp_path):
    runs = configs("causal-lm")
    both = {name: replace(config, experts=True) for name, config in runs.items()}
    with pytest.raises(ValueError, match="runs 'first' and 'accumulating' have experts, whose rows are routed"):
        finetune_together(both)
    folder = Path(make_model(tmp_path / "mixtral", "Mixtral"))
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"output_router_logits": True}))
    with pytest.raises(ValueError, match="mixtral adds a loss of its router"):
        finetune_together({name: replace(config, model=str(folder)) for name, config in runs.items()})
    assert not (tmp_path / "runs").exists()
    # By itself it is trained, and evaluated by its logits.
    metrics = finetune(replace(runs["first"], model=str(folder), max_steps=2, output=str(tmp_path / "single")))
    assert metrics["after"]["perplexity"] == pytest.approx(torch.tensor(metrics["after"]["loss"]).exp().item())


def test_outputs_names_classes_and_processes(configs, tmp_path, monkeypatch):
    runs = configs("classification")
    with pytest.raises(ValueError, match="have one output"):
        finetune_together(runs | {"sgd": replace(runs["sgd"], output=runs["first"].output + "/.")})
    with pytest.raises(ValueError, match="no runs"):
        finetune_together({})
    with pytest.raises(ValueError, match="contain a dot"):
        finetune_together({"a.b": runs["first"]})
    other = write_csv(tmp_path / "other.csv", [("w0 w1", "sweet"), ("w2", "sour")] * 20)
    with pytest.raises(ValueError, match=r"classes \['fresh', 'rotten'\] and \['sour', 'sweet'\]"):
        finetune_together(runs | {"sgd": replace(runs["sgd"], data=other)})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="take one process"):
        finetune_together(runs)
    assert not (tmp_path / "runs").exists()
