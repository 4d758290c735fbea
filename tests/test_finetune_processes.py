"""`finetune` in two processes trains as one does on the same batches, stops and resumes together, and writes once."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")
if not torch.distributed.is_available():
    pytest.skip("this torch has no distributed package", allow_module_level=True)

from processes import spawn  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tiny_training import At, make_model, sentences, write_csv  # noqa: E402

from allora_kernels.training import progress  # noqa: E402
from allora_kernels.training.config import FinetuneConfig  # noqa: E402
from allora_kernels.training.run import finetune  # noqa: E402

ROOT = Path(__file__).parents[1]
TASKS = {"classification": "Bert", "causal-lm": "Llama"}
STOPPED = 4


class Quiet:
    """A console that keeps what is printed."""

    def __init__(self):
        self.lines = []

    def print(self, *args, **kwargs):
        self.lines.append(args)


def twice_ctrl_c():
    """As a terminal and torchrun each send it."""
    for _ in range(2):
        signal.raise_signal(signal.SIGINT)


def settings(folder, task="classification", **changes):
    short = dict(model=str(folder / task), data=str(folder / "data.csv"), output=str(folder / task / "run"), task=task)
    # Within the first epoch, whose last batch two processes would fill up with rows taken twice.
    steps = 7 if task == "classification" else 4
    short |= dict(r=4, learning_rate=0.1, optimizer="sgd", batch_size=8, max_length=16, max_steps=steps, save_steps=3)
    return FinetuneConfig(**(short | changes))


def work(rank, folder, port):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    os.environ["MASTER_PORT"] = str(port)
    for task in TASKS:
        finetune(settings(folder, task, batch_size=4, output=str(folder / task / "two")))
    stopped = settings(folder, batch_size=4, output=str(folder / "stopped"))
    seen = finetune(stopped, callbacks=[At(STOPPED, twice_ctrl_c)] if rank == 1 else [])
    assert (seen["status"], seen["steps"], seen["after"]) == ("interrupted", STOPPED, None)
    torch.distributed.barrier()
    console = Quiet()
    resumed = finetune(replace(stopped, resume=True), console=console if rank == 1 else None)
    assert resumed["status"] == "finished" and not console.lines
    # Dropout draws other numbers in each process.
    drawn = [None, None]
    torch.distributed.all_gather_object(drawn, torch.load(last_random_state(folder, rank), weights_only=False)["cpu"])
    assert not torch.equal(*drawn)
    torch.distributed.destroy_process_group()


def last_random_state(folder, rank):
    return folder / "stopped" / "checkpoint-7" / f"rng_state_{rank}.pth"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    for task, family in TASKS.items():
        make_model(folder / task, family)
    model = transformers.BertModel.from_pretrained(folder / "classification")
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
    model.save_pretrained(folder / "classification")
    write_csv(folder / "data.csv", sentences())
    return folder


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def read(output):
    return json.loads((output / "metrics.json").read_text()), load_file(
        output / "adapter" / "adapter_model.safetensors"
    )


def test_two_processes_train_as_one_and_stop_and_resume_together(folder):
    spawn(work, folder, free_port(), nprocs=2)
    for task in TASKS:
        alone = finetune(settings(folder, task))
        _, weights = read(folder / task / "run")
        together, of_two = read(folder / task / "two")
        assert together["processes"] == 2 and alone["processes"] == 1
        # Ten texts are left for evaluation: the last batches of the two processes are not alike.
        for when in ("before", "after"):
            assert together[when] == pytest.approx(alone[when], rel=1e-4)
        assert together["loss_history"] == [pytest.approx(entry, rel=1e-4) for entry in alone["loss_history"]]
        assert together["tokens"] == alone["tokens"]
        assert together["tokens_per_second"] == pytest.approx(together["tokens"] / together["seconds"])
        assert of_two.keys() == weights.keys()
        for name, t in weights.items():
            torch.testing.assert_close(of_two[name], t, rtol=1e-3, atol=1e-5)

    whole, weights = read(folder / "classification" / "two")
    resumed, after_resuming = read(folder / "stopped")
    assert resumed["loss_history"] == whole["loss_history"] and resumed["after"] == whole["after"]
    assert all(torch.equal(t, weights[name]) for name, t in after_resuming.items())
    with pytest.raises(ValueError, match=r"\['processes'\] in .* are not those of this run"):
        stop = json.loads((folder / "stopped" / "metrics.json").read_text()) | {"status": "interrupted"}
        (folder / "stopped" / "metrics.json").write_text(json.dumps(stop))
        finetune(settings(folder, batch_size=4, output=str(folder / "stopped"), resume=True))


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "--"],
    # Without a GPU it starts these processes on the CPU.
    "accelerate launch": [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no",
        "--dynamo_backend=no", "--main_process_port=0", "-m",
    ],
}  # fmt: skip


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_takes_the_command_line(folder, tmp_path, launcher):
    if launcher != "torchrun" and torch.cuda.is_available() and torch.cuda.device_count() < 2:
        pytest.skip("accelerate would start two processes on one GPU")
    config = settings(folder, batch_size=4, max_steps=2, output=str(tmp_path / "run"))
    options = [
        f"--{name.replace('_', '-')}={getattr(config, name)}" for name in ("model", "data", "output", "max_steps", "r")
    ]
    launch = ["-m", *LAUNCHERS[launcher], "allora_kernels.tools.cli"]
    done = subprocess.run(
        [sys.executable, *launch, "finetune", *options], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("layers adapted:") == done.stdout.count("adapter: ") == 1
    assert read(tmp_path / "run")[0]["processes"] == 2
    assert "destroy_process_group" not in done.stderr and "Traceback" not in done.stderr


def test_one_process_is_stopped_by_a_second_ctrl_c_at_once():
    stop = progress.StopOnInterrupt()
    stop._interrupt(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        stop._interrupt(signal.SIGINT, None)
