"""DeepSpeed's ZeRO in two processes trains what one process does; `make test-deepspeed` runs this, beside the pinned rest."""

import functools
import importlib
import importlib.util
import os
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run_checks
from safetensors.torch import load_file

pytest.importorskip("transformers")
if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed: make test-deepspeed installs it for itself", allow_module_level=True)

from tiny_models import VOCAB, transformer

from allora_kernels import (
    adapter_layers,
    adapter_parameters,
    adapter_rows,
    add_adapter,
    apply_allora,
    explain,
    load_adapter,
    merge_adapter,
    per_sample,
    save_adapter,
    set_adapter,
)

ROOT = Path(__file__).parents[1]
# The engine clips gradients by default. With these thresholds it lets go of every parameter as soon as its layer has run.
CONFIG = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.0}
CONFIG |= {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
LETS_GO = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
MODELS = {
    "Llama": functools.partial(transformer, "Llama", "ForCausalLM"),
    "GPT2": functools.partial(transformer, "GPT2", "LMHeadModel"),
    "Qwen3Moe": functools.partial(transformer, "Qwen3Moe", "ForCausalLM"),
    "Bert": functools.partial(transformer, "Bert", "ForSequenceClassification", num_labels=VOCAB),
}
BATCHES = torch.randint(VOCAB, (3, 4, 7), generator=torch.Generator().manual_seed(1))


def loss_of(model, ids):
    classifies = hasattr(getattr(model, "module", model), "classifier")
    return model(input_ids=ids, labels=ids[:, 0] if classifies else ids).loss


def adapt(model, **options):
    torch.manual_seed(2)
    report = apply_allora(model, r=3, **options)
    with torch.no_grad():
        for p in adapter_parameters(model):
            p.normal_(std=0.1)
    return report


def library():
    """deepspeed, without the collectives of its own for one machine, which take a minute to compile: gloo has them."""
    import deepspeed

    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    return deepspeed


def cut_up(model):
    """Leave `model` as `from_pretrained` does while DeepSpeed's ZeRO-3 is on."""
    library().zero.Init(module=model, config_dict_or_path=config(3))


def config(stage):
    return CONFIG | {"zero_optimization": {"stage": stage, **(LETS_GO if stage == 3 else {})}}


def engine_of(model, stage):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    return library().initialize(model=model, model_parameters=trained, optimizer=optimizer, config=config(stage))[0]


def train(engine):
    for ids in BATCHES:
        engine.backward(loss_of(engine, ids.chunk(2)[dist.get_rank()]))
        engine.step()


def train_alone(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for ids in BATCHES:
        optimizer.zero_grad()
        loss_of(model, ids).backward()
        optimizer.step()


def saved(model, folder):
    save_adapter(model, folder)
    dist.barrier()
    return load_file(folder / "adapter_model.safetensors")


def trains_what_one_process_does(name, stage, options, from_the_start, folder):
    """`from_the_start`: the adapters are put on a model that is cut up already."""
    alone, model = MODELS[name](), MODELS[name]()
    expected = adapt(alone, **options)
    if from_the_start:
        cut_up(model)
        assert not any(p.numel() for p in model.parameters())
    assert adapt(model, **options) == expected
    before = [p.detach().clone() for p in adapter_parameters(alone)]
    train_alone(alone)
    assert all(not torch.equal(p, old) for p, old in zip(adapter_parameters(alone), before))
    engine = engine_of(model, stage)
    train(engine)
    folders = [folder / f"{name}-{stage}-{from_the_start}-{kind}" for kind in ("engine", "alone")]
    if dist.get_rank() == 0:
        save_adapter(alone, folders[1])
    found, wanted = saved(engine.module, folders[0]), load_file(folders[1] / "adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    for key, t in wanted.items():
        torch.testing.assert_close(found[key], t, rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


def loads_into_an_engine(stage, folder):
    source, model = (MODELS["Bert"]() for _ in range(2))
    for m in (source, model):
        adapt(m, modules_to_save=["classifier"])
    with torch.no_grad():
        for p in source.parameters():
            p.add_(0.5)
    if dist.get_rank() == 0:
        save_adapter(source, folder / f"source-{stage}")
    dist.barrier()
    engine = engine_of(model, stage)
    load_adapter(engine.module, folder / f"source-{stage}")
    found = saved(engine.module, folder / f"loaded-{stage}")
    wanted = load_file(folder / f"source-{stage}" / "adapter_model.safetensors")
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], t) for key, t in wanted.items())


def says_what_zero_cannot_do(folder):
    model = MODELS["Llama"]()
    adapt(model, adapter_name="one")
    add_adapter(model, "two", r=2)
    engine = engine_of(model, 3)
    train(engine)
    layer = next(iter(adapter_layers(model).values()))
    with pytest.raises(ValueError, match="cut up by DeepSpeed's ZeRO-3: save_adapter"):
        merge_adapter(model, keep=True)
    with pytest.raises(ValueError, match="cut up by DeepSpeed's ZeRO-3"):
        layer.merge()
    for change in (lambda: set_adapter(model, "two"), lambda: adapter_rows(model, ["one", "two"]).__enter__()):
        with pytest.raises(ValueError, match="is sharded"):
            change()
    assert "r=3" in repr(layer) and layer.adapter("two").r == 2
    assert explain(model).layers["model.layers.0.self_attn.q_proj"].shape[-2:] == (16, 16)
    train(engine)


def per_sample_norms_are_right_and_are_not_clipped(stage, folder):
    alone, model = MODELS["Llama"](), MODELS["Llama"]()
    for m in (alone, model):
        adapt(m)
    ids = BATCHES[0].chunk(2)[dist.get_rank()]
    with per_sample.record(alone):
        loss_of(alone, ids).backward()
    engine = engine_of(model, stage)
    with per_sample.record(model):
        engine.backward(loss_of(engine, ids))
    torch.testing.assert_close(per_sample.norms(model), per_sample.norms(alone))
    with pytest.raises(RuntimeError, match="ZeRO has taken the gradients"):
        per_sample.clip_(model, 0.01)
    per_sample.clip_(alone, 0.01)


def the_page_trains_resumes_and_saves(folder):
    (snippet,) = re.findall(
        r"^```py\n(.*?)^```$", (ROOT / "docs" / "distributed.md").read_text(), re.DOTALL | re.MULTILINE
    )
    if dist.get_rank() == 0:
        MODELS["Llama"]().save_pretrained(folder / "base")
    dist.barrier()
    library().init_distributed(dist_backend="gloo")
    data = [{"input_ids": ids, "labels": ids} for ids in BATCHES.flatten(0, 1)]
    names = {"apply_allora": apply_allora, "save_adapter": save_adapter, "data": data}
    os.chdir(folder)
    exec(compile(snippet, "distributed.md", "exec"), names)
    dist.barrier()
    whole, losses = load_file("zero-adapter/adapter_model.safetensors"), losses_of(names["trainer"])
    assert len(losses) == 4 and any(t.any() for key, t in whole.items() if "lora_B" in key)
    resumed = snippet.replace(".train()", '.train(resume_from_checkpoint="run/checkpoint-2")')
    exec(compile(resumed, "distributed.md", "exec"), names)
    assert losses_of(names["trainer"])[2:] == losses[2:]
    for key, t in saved(names["model"], Path("again")).items():
        assert torch.equal(t, whole[key]), key


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


CASES = [("Llama", stage, {}, stage == 3) for stage in (1, 2, 3)]
CASES += [
    ("GPT2", 3, {}, True),
    ("Qwen3Moe", 2, {"experts": True}, False),
    ("Bert", 3, {"modules_to_save": ["classifier"]}, False),
]
CASES += [("Qwen3Moe", 3, {"experts": True}, begins) for begins in (False, True)]
CHECKS = {str(case): functools.partial(trains_what_one_process_does, *case) for case in CASES}
CHECKS |= {f"load {stage}": functools.partial(loads_into_an_engine, stage) for stage in (2, 3)}
CHECKS |= {
    f"clip {stage}": functools.partial(per_sample_norms_are_right_and_are_not_clipped, stage) for stage in (1, 3)
}
CHECKS |= {"says": says_what_zero_cannot_do, "page": the_page_trains_resumes_and_saves}


def test_two_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")
    run_checks(2, CHECKS, tmp_path)
