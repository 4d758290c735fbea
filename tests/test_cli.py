"""The command line: what it prints, its exit codes, and that bad input writes nothing."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")
typer_testing = pytest.importorskip("typer.testing")

from tiny_training import make_model, sentences, write_csv  # noqa: E402

from allora_kernels import apply_allora, load_adapter, reference, save_adapter  # noqa: E402
from allora_kernels.tools import cli, doctor  # noqa: E402
from allora_kernels.training import FinetuneConfig  # noqa: E402
from allora_kernels.training import run as finetune_module  # noqa: E402

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models, data, and things that are wrong with either. Read only."""
    root = tmp_path_factory.mktemp("inputs")
    make_model(root / "bert", "Bert")
    make_model(root / "llama", "Llama")
    write_csv(root / "data.csv", sentences(32))
    (root / "empty.csv").write_text("")
    (root / "unlabelled.csv").write_text("text\nw0 w1\n")
    (root / "one_class.csv").write_text("text,label\n" + "w0,a\n" * 10)
    (root / "latin1.csv").write_bytes("text,label\nété,a\n".encode("latin1"))
    (root / "other_labels.csv").write_text("text,label\nw0,c\n")
    (root / "file").write_text("a file, not a folder")
    (root / "no_model").mkdir()
    words = make_model(root / "mismatched", "Bert")
    small = transformers.BertConfig.from_pretrained(words, vocab_size=5)
    transformers.BertModel(small).save_pretrained(words)
    decoder = transformers.BertModel.from_pretrained(root / "bert", is_decoder=True)
    decoder.save_pretrained(make_model(root / "headless", "Bert"))
    make_model(root / "roberta", "Roberta")
    make_model(root / "xlnet", "XLNet")
    words = Path(make_model(root / "padless", "Bert"), "tokenizer_config.json")
    settings = json.loads(words.read_text())
    words.write_text(json.dumps({k: v for k, v in settings.items() if k not in ("pad_token", "eos_token")}))
    for file in Path(make_model(root / "wordless", "Bert")).glob("tokenizer*"):
        file.unlink()
    torn = Path(make_model(root / "torn", "Bert"), "model.safetensors")
    torn.write_bytes(torn.read_bytes()[:1000])
    return root


def allora(*arguments):
    return typer_testing.CliRunner().invoke(cli.app, [str(a) for a in arguments])


def finetune(folder, output, **options):
    """`allora finetune` on the tiny classifier; an option that is None is left out, a list is repeated."""
    settings = {"model": folder / "bert", "data": folder / "data.csv", "output": output, "r": 2, "max_steps": 2}
    arguments = []
    for name, value in (settings | {"max_length": 16} | options).items():
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                arguments += [f"--{name.replace('_', '-')}", *([] if one is True else [one])]
    return allora("finetune", *arguments)


# --- what works -----------------------------------------------------------------------------------------------------


def test_finetune_prints_before_and_after_and_where_the_adapter_is(folder, tmp_path):
    result = finetune(folder, tmp_path / "run", norm="none", target_modules=["query", "value"], head_learning_rate=0.1)
    assert result.exit_code == 0, result.output
    assert "4 layers adapted" in result.output
    assert "accuracy: " in result.output and "after 2 steps" in result.output
    assert str(tmp_path / "run" / "adapter") in result.output
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["config"]["norm"] is None and metrics["config"]["target_modules"] == ["query", "value"]


def test_finetune_a_language_model(folder, tmp_path):
    result = finetune(folder, tmp_path / "run", model=folder / "llama", task="causal-lm", gradient_checkpointing=True)
    assert result.exit_code == 0, result.output
    assert "perplexity: " in result.output


@pytest.mark.parametrize("family, limit", [("roberta", 31), ("xlnet", 32)])
def test_the_longest_texts_that_a_model_takes(folder, tmp_path, family, limit):
    write_csv(tmp_path / "long.csv", [(" ".join([f"w{i % 20}" for i in range(40)]), label) for label in "ab" * 8])
    result = finetune(folder, tmp_path / "run", model=folder / family, data=tmp_path / "long.csv", max_length=None)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["data"]["max_length"] == limit


def test_ctrl_c_says_how_to_go_on(folder, tmp_path, monkeypatch):
    import signal

    class Interrupted(finetune_module.FinetuneTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 1:
                signal.raise_signal(signal.SIGINT)
            return super().training_step(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(finetune_module, "FinetuneTrainer", Interrupted)
        result = finetune(folder, tmp_path / "run", max_steps=5)
    assert result.exit_code == 130 and "Interrupted after step 2" in result.output and "--resume" in result.output
    assert finetune(folder, tmp_path / "run", max_steps=5, resume=True).exit_code == 0


@pytest.mark.parametrize("named", [True, False])
def test_merge_gives_an_ordinary_model_with_the_same_logits(folder, tmp_path, named):
    assert finetune(folder, tmp_path / "run", learning_rate=0.1).exit_code == 0
    base = ["--model", folder / "bert"] if named else []
    result = allora("merge", "--adapter", tmp_path / "run" / "adapter", "--output", tmp_path / "merged", *base)
    assert result.exit_code == 0, result.output
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    adapted = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "bert").eval()
    load_adapter(adapted, tmp_path / "run" / "adapter")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    inputs = tokenizer([text for text, _ in sentences(8)], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(merged(**inputs).logits, adapted(**inputs).logits, atol=1e-5)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert merged.config.id2label == {0: "fresh", 1: "rotten"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged", "run"]


def test_a_merge_into_a_base_with_the_classes_in_another_order_keeps_the_adapters(folder, tmp_path):
    assert finetune(folder, tmp_path / "run").exit_code == 0
    names = {"id2label": {0: "rotten", 1: "fresh"}, "label2id": {"rotten": 0, "fresh": 1}}
    other = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "bert", **names)
    other.save_pretrained(make_model(tmp_path / "other", "Bert"))
    arguments = ("--adapter", tmp_path / "run" / "adapter", "--output", tmp_path / "merged")
    assert allora("merge", *arguments, "--model", tmp_path / "other").exit_code == 0
    merged = transformers.AutoConfig.from_pretrained(tmp_path / "merged")
    assert merged.id2label == {0: "fresh", 1: "rotten"} and merged.label2id == {"fresh": 0, "rotten": 1}


def test_merge_takes_a_classifier_whose_head_peft_does_not_look_for(folder, tmp_path):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ids = {
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
    }
    config = transformers.BartConfig(vocab_size=25, max_position_embeddings=32, **sizes, **heads, **ids)
    base = Path(make_model(tmp_path / "bart", "Bert"))
    transformers.BartModel(config).save_pretrained(base)
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    end = {"id": "[END]", "ids": [2], "tokens": ["[END]"]}
    single = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "[END]", "type_id": 0}}]
    # BART's head reads the end token, which the tokenizer must append.
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {"[END]": end}
    }  # fmt: skip
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    result = finetune(folder, tmp_path / "run", model=base)
    assert result.exit_code == 0, result.output
    result = allora("merge", "--adapter", tmp_path / "run" / "adapter", "--output", tmp_path / "merged")
    assert result.exit_code == 0, result.output
    assert transformers.AutoConfig.from_pretrained(tmp_path / "merged").architectures == [
        "BartForSequenceClassification"
    ]


def test_merge_takes_what_peft_saved(folder, tmp_path):
    peft = pytest.importorskip("peft")
    base = transformers.LlamaForCausalLM.from_pretrained(folder / "llama")
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    model = peft.get_peft_model(base, config)
    model.save_pretrained(tmp_path / "adapter")
    result = allora("merge", "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged")
    assert result.exit_code == 0, result.output
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        plain = transformers.LlamaForCausalLM.from_pretrained(folder / "llama").eval()(ids).logits
        assert torch.allclose(merged(ids).logits, model.eval()(ids).logits, atol=1e-5)
        assert not torch.allclose(merged(ids).logits, plain, atol=1e-2)


def test_bench_measures_a_layer_here():
    result = allora("bench", "--rows", 4, "--rows", 6, "--out-features", 24, "--in-features", 16, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    rows = [line.split("│")[1:-1] for line in result.output.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row[:5]] for row in rows] == [
        [m, "24", "16", "16", step] for m in "46" for step in ("forward", "forward + backward")
    ]
    for row in rows:
        frozen, ours, ratio = map(float, row[5:])
        assert ratio == pytest.approx(ours / frozen, rel=0.02)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--dtype", "int8"], "dtype must be one of bfloat16, float16, float32, got 'int8'"),
        (["--adapter-dtype", "int8"], "dtype must be one of bfloat16, float16, float32, got 'int8'"),
        (["--rows", "0"], "--rows must be at least 1, got 0"),
        (["--rows", "4", "--rows", "-1"], "--rows must be at least 1, got -1"),
        (["--out-features", "0"], "--out-features must be at least 1, got 0"),
        (["--in-features", "0"], "--in-features must be at least 1, got 0"),
        (["--r", "500"], "r must be between 1 and 256, got 500"),
        pytest.param(["--rows", "4", "--tune"], "--tune needs a GPU", marks=NO_GPU),
    ],
)
def test_bench_says_what_is_wrong(arguments, words, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    result = allora("bench", *arguments)
    assert result.exit_code == 2 and words in result.stderr and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_doctor_passes_on_this_machine():
    result = allora("doctor")
    assert result.exit_code == 0, result.output
    assert (
        torch.__version__.partition("+")[0] in result.output
        and "self-check of the eager backend: passed" in result.output
    )
    for norm in reference.NORMS:
        assert str(norm) in result.output


def test_doctor_finds_a_wrong_gradient(monkeypatch):
    right = reference.adapter_grads

    def a_thousandth_off(*arguments):
        ds, da, db = right(*arguments)
        return ds, da * (1.001 if arguments[6] == "token" else 1), db

    monkeypatch.setattr(reference, "adapter_grads", a_thousandth_off)
    result = allora("doctor")
    assert result.exit_code == 1 and result.output.count("WRONG") == 1 and "FAILED" in result.output


def test_doctor_reports_a_kernel_that_raises(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("out of registers\nand a long dump")

    monkeypatch.setattr(reference, "adapter_grads", broken)
    checks = doctor.self_check(torch.device("cpu"))
    assert not any(check.passed for check in checks)
    assert checks[0].failure == "RuntimeError: out of registers and a long dump"


def test_every_setting_has_help_and_its_default_in_the_help():
    result = subprocess.run(
        [sys.executable, "-m", "allora_kernels.tools.cli", "finetune", "--help"],
        capture_output=True, text=True, env={"COLUMNS": "300", "PATH": ""},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for words in (
        "--head-learning-rate",
        "--no-bf16",
        "--target-modules",
        "ALLoRA's rule: row, matrix",
        "[default: row]",
    ):
        assert words in result.stdout, words


@pytest.mark.parametrize("options", [{}, {"optimizer": "sgd", "grad_accumulation": 3, "epochs": 1.5, "batch_size": 4}])
def test_a_dry_run_tells_what_the_run_then_does(folder, tmp_path, options):
    options = {"max_steps": None, "epochs": 1.0} | options
    looked = finetune(folder, tmp_path / "run", dry_run=True, **options)
    assert looked.exit_code == 0, looked.output
    assert not list(tmp_path.iterdir()) and "nothing was written" in looked.output
    assert "adapted layers fused" in looked.output and "memory, computed: " in looked.output
    assert finetune(folder, tmp_path / "run", **options).exit_code == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    data, trained = metrics["data"], metrics["parameters"]["trainable"]
    assert f"{metrics['steps']} steps\n" in looked.output
    assert f"data: {data['train_rows']} rows to train on" in looked.output
    assert f"{data['eval_rows']} to evaluate on" in looked.output
    moments = 0 if options.get("optimizer") == "sgd" else 2
    mib = 4 * trained / 2**20
    assert f"{mib:,.1f} MiB trained, {mib:,.1f} MiB gradients, {moments * mib:,.1f} MiB optimizer" in looked.output


def test_experts_are_adapted_trained_and_saved_where_they_are_asked_for(folder, tmp_path):
    mixture = make_model(tmp_path / "mixtral", "Mixtral")
    options = {
        "model": mixture,
        "task": "causal-lm",
        "target_modules": ["q_proj"],
        "experts": True,
        "eval_fraction": 0.3,
    }
    looked = finetune(folder, tmp_path / "run", dry_run=True, **options)
    assert looked.exit_code == 0, looked.output
    assert "2 x model.layers.*.mlp.experts.down_proj 3 experts of [16, 32], r=2" in looked.output
    assert not (tmp_path / "run").exists()
    result = finetune(folder, tmp_path / "run", **options)
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert len(config["target_parameters"]) == 4 and len(config["target_modules"]) == 2
    model = transformers.MixtralForCausalLM.from_pretrained(mixture)
    report = load_adapter(model, tmp_path / "run" / "adapter")
    assert len(report.experts) == 4
    assert any(p.any() for name, p in model.named_parameters() if name.endswith("allora.down_proj.lora_B"))
    shown = allora("explain", mixture, "--experts", "--r", 2)
    assert shown.exit_code == 0 and "3 experts of [16, 32], r=2" in shown.output
    refused = finetune(folder, tmp_path / "other", experts=True)
    assert refused.exit_code != 0 and "no experts in 3-D parameters" in refused.output
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("kind", ["yaml", "toml"])
def test_settings_from_a_file_and_what_the_command_line_says_counts_more(folder, tmp_path, kind):
    settings = {
        "model": str(folder / "bert"),
        "data": str(folder / "data.csv"),
        "output": str(tmp_path / "run"),
        "target-modules": ["query", "value"],
        "max_steps": 2,
        "max_length": 16,
        "learning_rate": 5e-3,
        "norm": "none",
        "r": 3,
    }
    colon = ": " if kind == "yaml" else " = "
    file = tmp_path / f"settings.{kind}"
    lines = [f"{name}{colon}{json.dumps(value)}" for name, value in settings.items()]
    file.write_text("\n".join(lines).replace("0.005", "5e-3"), encoding="utf-8-sig")
    result = allora("finetune", "--config", file, "--r", 2, "--batch-size", 4)
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "run" / "metrics.json").read_text())["config"]
    given = {"r": 2, "batch_size": 4, "learning_rate": 5e-3, "norm": None, "target_modules": ["query", "value"]}
    assert {name: config[name] for name in given} == given


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "./nowhere"}, "no such model folder: ./nowhere"),
        ({"model": "{folder}/no_model"}, "must be a folder with a config.json"),
        ({"model": "{folder}/mismatched"}, "the tokenizer has 25 tokens but the model only 5"),
        ({"model": "nobody/nothing"}, "nobody/nothing cannot be loaded for classification"),
        (
            {"model": "{folder}/headless", "task": "causal-lm"},
            "the checkpoint lacks 6 of the model's weights, first cls.",
        ),
        ({"model": "{folder}/bert", "task": "causal-lm"}, "it is a masked language model"),
        ({"model": "{folder}/roberta", "max_length": 32}, "max_length must be <= 31, where"),
        ({"model": "{folder}/roberta", "task": "causal-lm"}, "it is a masked language model"),
        ({"model": "{folder}/torn"}, "torn cannot be loaded for classification"),
        ({"model": "{folder}/padless"}, "its tokenizer has neither a padding nor an end token"),
        ({"model": "{folder}/wordless"}, "wordless has no tokenizer for the training data, of which it knows 0 tokens"),
        ({"data": "{folder}/missing.csv"}, "no such data file"),
        ({"data": "{folder}/empty.csv"}, "its first line must name the columns"),
        ({"data": "{folder}/unlabelled.csv"}, "has no column 'label'; it has ['text']"),
        ({"data": "{folder}/one_class.csv"}, "at least two labels"),
        ({"data": "{folder}/latin1.csv"}, "is not UTF-8 (byte 0xe9"),
        ({"data": "{folder}/bert"}, "is a folder"),
        ({"eval_data": "{folder}/other_labels.csv"}, "the training data does not have: ['c']"),
        ({"eval_fraction": 1.5}, "eval_fraction must be > 0 and < 1, got 1.5"),
        ({"text_column": "body"}, "has no column 'body'; it has ['text', 'label']"),
        ({"output": "{folder}/file"}, "output must be a folder that can be written"),
        ({"data": "{folder}/missing.csv", "dry_run": True}, "no such data file"),
        ({"output": "{folder}/file", "dry_run": True}, "output must be a folder that can be written"),
        ({"output": "{folder}/file/below"}, "is a file"),
        ({"resume": True}, "there is nothing to resume"),
        ({"r": 0}, "r must be between 1 and 256, got 0"),
        ({"r": 257}, "r must be between 1 and 256, got 257"),
        ({"eta": -1.0}, "eta must be finite and > 0 (from 1e-18 to 1e+18), got -1.0"),
        ({"norm": "column"}, "norm must be one of row, matrix, factor, entry, token, none, got 'column'"),
        ({"optimizer": "adam"}, "optimizer must be one of adamw, sgd; got 'adam'"),
        ({"schedule": "step"}, "schedule must be one of linear, cosine, constant; got 'step'"),
        ({"task": "regression"}, "task must be one of classification, causal-lm; got 'regression'"),
        ({"target_modules": "nothing"}, "nothing"),
        ({"target_modules": ["all-linear", "query"]}, "or all-linear alone"),
        ({"max_length": 33}, "max_length must be <= 32, where"),
        ({"max_length": 1}, "max_length must be >= 2, got 1"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"grad_accumulation": 0}, "grad_accumulation must be >= 1, got 0"),
        ({"max_steps": 0}, "max_steps must be >= 1, got 0"),
        ({"epochs": 0.0}, "epochs must be finite and > 0, got 0.0"),
        ({"learning_rate": "nan"}, "learning_rate must be finite and > 0, got nan"),
        ({"warmup_steps": -1}, "warmup_steps must be >= 0, got -1"),
        ({"momentum": 0.9}, "momentum is for optimizer='sgd'"),
        ({"head_learning_rate": 0.1, "task": "causal-lm", "model": "{folder}/llama"}, "head_learning_rate is for"),
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(folder, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options = {k: v.format(folder=folder) if isinstance(v, str) else v for k, v in options.items()}
    output = options.pop("output", tmp_path / "runs" / "run")
    kept = sorted(folder.rglob("*"))
    result = finetune(folder, output, **options)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("allora: ") and result.stderr.count("\n") == 1, result.stderr
    assert message in result.stderr
    assert sorted(folder.rglob("*")) == kept and not list(tmp_path.iterdir())


def test_an_output_folder_that_is_read_only(folder, tmp_path, monkeypatch):
    # Root may write anywhere, so the answer of the system is replaced rather than the folder's mode.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    result = finetune(folder, tmp_path / "run")
    assert result.exit_code == 2 and "read-only" in result.stderr and not list(tmp_path.iterdir())


def test_what_the_system_refuses_is_said(folder, tmp_path, monkeypatch):
    read, make = Path.read_text, os.makedirs

    def broken_disk(path, encoding=None, **options):
        if path.name == "data.csv":
            raise OSError(errno.EIO, "Input/output error")
        return read(path, encoding=encoding, **options)

    def full_disk(path, *arguments, **options):
        if Path(path) == tmp_path / "run":
            raise OSError(errno.ENOSPC, "No space left on device")
        return make(path, *arguments, **options)

    for target, method, function, code, words in (
        (Path, "read_text", broken_disk, 2, "data.csv cannot be read: Input/output error"),
        (os, "makedirs", full_disk, 1, "No space left on device"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, method, function)
            result = finetune(folder, tmp_path / "run")
        assert result.exit_code == code and words in result.stderr, result.output
        assert result.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_an_output_folder_with_a_run_is_not_written_over(folder, tmp_path):
    assert finetune(folder, tmp_path / "run").exit_code == 0
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    again = finetune(folder, tmp_path / "run")
    assert again.exit_code == 2 and "has an earlier run" in again.stderr
    other = finetune(folder, tmp_path / "run", resume=True, r=3, eta=1.5)
    assert other.exit_code == 2 and "r was 2; eta was 2.0" in other.stderr
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_other_data_cannot_be_resumed(folder, tmp_path):
    data = tmp_path / "data.csv"
    write_csv(data, sentences(32))
    assert finetune(folder, tmp_path / "run", data=data).exit_code == 0
    metrics = tmp_path / "run" / "metrics.json"
    metrics.write_text(metrics.read_text().replace('"finished"', '"interrupted"'))
    write_csv(data, sentences(33))
    result = finetune(folder, tmp_path / "run", data=data, resume=True)
    assert result.exit_code == 2 and "cannot resume: ['data']" in result.stderr


@pytest.mark.parametrize("lacking", [None, "status", "config", "before", "data", "parameters", "processes"])
def test_a_broken_metrics_file_cannot_be_resumed(folder, tmp_path, lacking):
    config = FinetuneConfig(model=str(folder / "bert"), data=str(folder / "data.csv"), output=str(tmp_path))
    whole = {
        "status": "running",
        "config": config.as_json(),
        "before": {},
        "data": {},
        "parameters": {},
        "processes": 1,
    }
    broken = json.dumps({key: value for key, value in whole.items() if key != lacking}) if lacking else "{"
    (tmp_path / "metrics.json").write_text(broken)
    result = finetune(folder, tmp_path, resume=True, r=None, max_steps=None, max_length=None)
    assert result.exit_code == 2 and "cannot be resumed" in result.stderr


def test_a_file_where_the_adapter_goes_is_said_before_training(folder, tmp_path):
    (tmp_path / "adapter").write_text("mine")
    result = finetune(folder, tmp_path)
    assert result.exit_code == 2 and "adapter is a file: remove it" in result.stderr, result.output
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("name", ["lr[lr=1e-3]", "a[/b]"])
def test_names_with_brackets_are_printed_as_they_are(folder, tmp_path, name):
    result = finetune(folder, tmp_path / name)
    assert result.exit_code == 0 and str(tmp_path / name / "adapter") in result.output, result.output
    merged = tmp_path / "merged" / name
    result = allora("merge", "--adapter", tmp_path / name / "adapter", "--output", merged)
    assert result.exit_code == 0 and f"merged into {merged}" in result.output, result.output


def test_a_model_that_training_leaves_without_numbers_is_not_saved(folder, tmp_path):
    options = {"optimizer": "sgd", "learning_rate": 1e38, "max_grad_norm": 0.0, "max_steps": 1}
    result = finetune(folder, tmp_path / "run", **options)
    assert result.exit_code == 1 and "the loss on the evaluation data is" in result.stderr, result.output
    assert "after 1 steps: lower the learning rate" in result.stderr and not (tmp_path / "run" / "adapter").exists()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert metrics["status"] == "running"
    assert finetune(folder, tmp_path / "run", resume=True, **options).exit_code == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("absent.yaml", None, "no such settings file"),
        ("settings.json", "{}", "must end in .yaml, .yml or .toml"),
        ("settings.yaml", "r: [", "is not YAML"),
        ("settings.toml", "r: 2", "is not TOML"),
        ("settings.yaml", "- r", "must have one setting a line"),
        ("settings.yaml", "", "must have one setting a line"),
        ("settings.yaml", b"text_column: \xe9", "is not UTF-8 (byte 0xe9"),
        ("settings.yaml", "learning_rat: 0.1", "no setting 'learning_rat'; did you mean 'learning_rate'?"),
        ("settings.yaml", "max_steps: 2\nmax-steps: 3", "has 'max_steps' twice"),
        ("settings.yaml", "config: other.yaml", "there is no setting 'config'"),
        ("settings.yaml", "r: 1e999", "r must be an int, got float"),
        ("settings.yaml", "bf16: 'false'", "bf16 must be a bool (true or false), got 'false' (str)"),
        ("settings.yaml", "r: 8\nr: 4", "has 'r' twice"),
        ("settings.yaml", "eta: fast", "eta must be a float, got str"),
    ],
)
def test_a_bad_settings_file_is_one_line_and_nothing_written(folder, tmp_path, name, text, message):
    file = tmp_path / name
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = list(tmp_path.iterdir())
    result = finetune(folder, tmp_path / "run", config=file, r=None, max_steps=None)
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1, result.output
    assert list(tmp_path.iterdir()) == before


@pytest.mark.parametrize("missing", ["model", "data", "output"])
def test_what_has_no_default_has_to_be_given(folder, tmp_path, missing):
    result = finetune(folder, **({"output": tmp_path / "run"} | {missing: None}))
    assert result.exit_code == 2 and f"--{missing} is missing" in result.stderr, result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": "{folder}/no_model"}, "no adapter at"),
        ({"output": "{folder}/bert"}, "output must be a new folder"),
        ({"model": "{folder}/no_model"}, "must be a folder with a config.json"),
        ({"model": "{folder}/llama"}, "does not fit the model"),
        ({"model": "{folder}/torn"}, "torn cannot be loaded for classification"),
    ],
)
def test_merge_refuses_what_does_not_work(folder, tmp_path, options, message):
    assert finetune(folder, tmp_path / "run").exit_code == 0
    settings = {"adapter": tmp_path / "run" / "adapter", "output": tmp_path / "merged"}
    settings |= {k: v.format(folder=folder) for k, v in options.items()}
    result = allora("merge", *(word for k, v in settings.items() for word in (f"--{k}", v)))
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1, result.output
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["query"], "task_type": "SEQ_CLS"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "adapter_config.json is not valid JSON"),
        ([], "must hold a JSON object, got list"),
        (ADAPTER | {"peft_type": "IA3"}, "peft_type must be 'LORA', got 'IA3'"),
        (ADAPTER | {"task_type": None}, "task_type must be one of "),
        (ADAPTER | {"task_type": "SEQ_2_SEQ_LM"}, "got 'SEQ_2_SEQ_LM'"),
        (ADAPTER, "names no base model: name it with --model"),
        (ADAPTER | {"base_model_name_or_path": "{folder}/bert"}, "['classifier'] would be at random values"),
    ],
)
def test_merge_refuses_an_adapter_that_says_too_little(folder, tmp_path, config, message):
    model = transformers.BertForSequenceClassification.from_pretrained(folder / "bert")
    apply_allora(model, r=2, target_modules=["query"])
    save_adapter(model, tmp_path / "adapter")
    text = config if isinstance(config, str) else json.dumps(config).replace("{folder}", str(folder))
    (tmp_path / "adapter" / "adapter_config.json").write_text(text)
    result = allora("merge", "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged")
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1, result.output
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_a_merge_that_cannot_be_written_leaves_nothing(folder, tmp_path, monkeypatch):
    def full_disk(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    assert finetune(folder, tmp_path / "run").exit_code == 0
    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", full_disk)
    result = allora("merge", "--adapter", tmp_path / "run" / "adapter", "--output", tmp_path / "merged")
    assert result.exit_code == 1 and "No space left on device" in result.stderr and result.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("missing", ["typer", "transformers"])
def test_without_the_packages_one_line_says_how_to_get_them(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; from allora_kernels.tools.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    assert result.stderr.count("\n") == 1 and "pip install '.[train]' in a checkout" in result.stderr


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model": 3}, "model must be a str, got 3 (int)"),
        ({"eval_data": 5}, "eval_data must be a str, got 5 (int)"),
        ({"batch_size": True}, "batch_size must be an int, got True (bool)"),
        ({"seed": 1.5}, "seed must be an int, got 1.5 (float)"),
        ({"learning_rate": "0.1"}, "learning_rate must be a number, got '0.1' (str)"),
        ({"eta": "2"}, "eta must be a float, got str"),
        ({"bf16": "false"}, "bf16 must be a bool (true or false), got 'false' (str)"),
        ({"shuffle": None}, "shuffle must be a bool (true or false), got None (NoneType)"),
        ({"experts": 1}, "experts must be a bool (true or false), got 1 (int)"),
        ({"gradient_checkpointing": "no"}, "gradient_checkpointing must be a bool"),
        ({"resume": "no"}, "resume must be a bool"),
        ({"target_modules": None}, "target_modules must be a str or a list of them, got None (NoneType)"),
        ({"target_modules": ["query", 3]}, "target_modules must be a str or a list of them, got ['query', 3] (list)"),
        ({"optimizer": ["sgd"]}, "optimizer must be one of adamw, sgd; got ['sgd']"),
        ({"model": ""}, "model must not be empty"),
    ],
)  # fmt: skip
def test_the_settings_are_checked_for_their_types(wrong, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        FinetuneConfig(**({"model": "m", "data": "d", "output": "o"} | wrong))
