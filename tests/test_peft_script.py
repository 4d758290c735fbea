"""As a new user would: a script written for PEFT, one line of it changed, and a script of plain PEFT that loads the result."""

import difflib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("peft")
pytest.importorskip("transformers")

from tiny_training import make_model

ROOT = Path(__file__).parents[1]
TRAINS = """\
import torch
from peft import LoraConfig, TaskType
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

tokenizer = AutoTokenizer.from_pretrained("base")
base = AutoModelForCausalLM.from_pretrained("base")
config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type=TaskType.CAUSAL_LM)
torch.manual_seed(0)
model = get_peft_model(base, config)
model.print_trainable_parameters()

ids = tokenizer(["w1 w2 w3 good", "w4 w5 w6 bad"] * 8, return_tensors="pt").input_ids
data = [{"input_ids": row, "labels": row} for row in ids]
arguments = TrainingArguments(
    output_dir="runs",
    per_device_train_batch_size=8,
    max_steps=6,
    learning_rate=0.05,
    logging_steps=1,
    report_to="none",
    use_cpu=True,
)
trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=default_data_collator)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
assert losses[-1] < losses[0], losses
model.save_pretrained("adapter")
torch.save(model.eval()(ids).logits.detach(), "logits.pt")
"""
BEFORE = "from peft import get_peft_model"
AFTER = "from allora_kernels.integrations.peft import get_allora_model as get_peft_model"
LOADS = """\
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("../base")
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("../base"), "adapter").eval()
ids = tokenizer(["w1 w2 w3 good", "w4 w5 w6 bad"] * 8, return_tensors="pt").input_ids
with torch.no_grad():
    torch.testing.assert_close(model(ids).logits, torch.load("logits.pt"), rtol=1e-4, atol=1e-4)
assert not any(name.startswith(("allora", "csrc_triton")) for name in sys.modules)
"""


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}


def run(script, folder):
    (folder / "script.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=folder, capture_output=True, text=True,
        env=os.environ | ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_script_has_30_lines_and_one_changes():
    lines = [line for line in TRAINS.splitlines() if line]
    changed = [
        d for d in difflib.ndiff(TRAINS.splitlines(), TRAINS.replace(BEFORE, AFTER).splitlines()) if d[0] in "+-"
    ]
    assert len(lines) <= 30 and len(changed) == 2


def trained(root):
    """What the script as it was and the changed one left, each in a folder beside the base model's."""
    make_model(root / "base", "Llama")
    made = {}
    for name, script in (("peft", TRAINS), ("ours", TRAINS.replace(BEFORE, AFTER))):
        made[name] = root / name
        made[name].mkdir()
        script = script.replace('"base"', '"../base"')
        assert "trainable params" in run(script, made[name])
    return made


def test_it_trains_by_the_rule_and_plain_peft_loads_what_it_saves(tmp_path):
    # In one, as both scripts start slowly.
    folders = trained(tmp_path)
    assert {p.name for p in (folders["ours"] / "adapter").iterdir()} == {
        p.name for p in (folders["peft"] / "adapter").iterdir()
    }
    ours, theirs = (load_file(folders[name] / "adapter" / "adapter_model.safetensors") for name in ("ours", "peft"))
    assert ours.keys() == theirs.keys() and len(ours) == 12
    assert all(not torch.equal(ours[name], theirs[name]) for name in ours if "lora_B" in name)
    run(LOADS, folders["ours"])
