"""DistributedDataParallel, FSDP2 and accelerate in several processes train what one process trains."""

import os
import socket
from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from allora_kernels import apply_allora, load_adapter, reference, save_adapter

dist = pytest.importorskip("torch.distributed")
if not dist.is_available():
    pytest.skip("this torch has no distributed package", allow_module_level=True)

import two_layers  # noqa: E402
from processes import run_checks  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # noqa: E402
from torch.distributed.pipelining import PipelineStage  # noqa: E402
from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from two_layers import HIDDEN, ROWS, K, N, R, batch, make_model, train  # noqa: E402

WORLD = 2
assert_same = partial(two_layers.assert_same, rtol=1e-4, atol=1e-5, check_dtype=False)


# --- what the processes check; each takes a folder they share --------------------------------------------------------


def check_ddp(backend, norm, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "0")
        alone = make_model(norm)
        expected = train(alone, batch())
        patch.setenv("TRITON_INTERPRET", str(int(backend == "triton")))
        ddp = DistributedDataParallel(make_model(norm))
        assert ddp.module[0].explain().backend == backend
        assert_same(train(ddp, batch(dist.get_rank())), expected)
    if dist.get_rank() == 0:
        save_adapter(alone, folder / "alone")
        save_adapter(ddp, folder / "together")
        files = [load_file(folder / name / "adapter_model.safetensors") for name in ("together", "alone")]
        assert_same(*files)
        load_adapter(make_model(norm), folder / "together")


def check_ddp_with_checkpointing(use_reentrant, _):
    class Checkpointed(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return checkpoint(self.model, x.requires_grad_(), use_reentrant=use_reentrant)

    model = make_model()
    ddp = DistributedDataParallel(Checkpointed(model))
    expected = train(make_model(), batch())
    found = train(ddp, batch(dist.get_rank()))
    assert_same({name.replace("model.", ""): t for name, t in found.items()}, expected)


def check_accumulation_without_synchronization(_):
    ddp, alone = DistributedDataParallel(make_model()), make_model()
    for x in batch(dist.get_rank()).split(1)[:-1]:
        with ddp.no_sync():
            ddp(x).square().mean().backward()
    ddp(batch(dist.get_rank())[-1:]).square().mean().backward()
    for x in batch().split(1):
        (alone(x).square().mean() / WORLD).backward()
    for ours, expected in zip(ddp.parameters(), alone.parameters()):
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-5)


def check_what_ddp_sends(_):
    """The formula of docs/distributed.md."""
    ddp, sent = DistributedDataParallel(make_model()), []

    def hook(_, bucket):
        sent.append(bucket.buffer().numel() * bucket.buffer().element_size())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    ddp.register_comm_hook(None, hook)
    ddp(batch()).sum().backward()
    assert sum(sent) == 4 * (R * (K + HIDDEN) + R * (HIDDEN + N))


def check_fsdp(backend, norm, policy, base, _):
    exact = policy.param_dtype is None and base == torch.float32
    steps = 2 if exact else 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "0")
        expected = train(make_model(norm, base), batch().to(base), steps)
        patch.setenv("TRITON_INTERPRET", str(int(backend == "triton")))
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        model = make_model(norm, base)
        assert model[0].explain().backend == backend
        for module in (model[0], model[2], model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        found = train(model, batch(dist.get_rank()).to(base), steps)
    if exact:
        return assert_same(found, expected)
    # AdamW's first step is a sign; the gradients say how near the two are.
    for name, t in expected.items():
        assert found[name].dtype == t.dtype == torch.float32
        if name.startswith("d"):
            assert (found[name] - t).norm() < 0.1 * t.norm(), name


def check_what_fsdp_sends(_):
    """As docs/distributed.md has it; sizes that two processes share evenly, and biases come to the weights."""
    k, n, r = 12, 20, 4
    model = nn.Sequential(nn.Linear(k, n), nn.Linear(n, k))
    apply_allora(model, r=r)
    for module in (*model, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (WORLD,)))
    sent = Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "c10d":
                sent[func._opname] += max(t.numel() for t in args if isinstance(t, torch.Tensor))
            return func(*args, **(kwargs or {}))

    with Counting():
        model(torch.ones(4, k)).sum().backward()
    adapters = 2 * r * (n + k)
    assert sent == {"_reduce_scatter_base_": adapters, "_allgather_base_": 2 * (2 * n * k + n + k + adapters)}, sent


def check_accelerate(_):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    assert accelerator.num_processes == WORLD
    model = accelerator.prepare(make_model())
    assert isinstance(model, DistributedDataParallel)
    found = train(model, batch(dist.get_rank()), backward=accelerator.backward, prepare=accelerator.prepare)
    assert_same(found, train(make_model(), batch()))


class Squares(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = make_model()

    def forward(self, x, labels=None):
        y = self.model(x)
        return {"loss": y.square().mean(), "logits": y}


def adapter_trainer(folder, rows, cls=None):
    import transformers

    from allora_kernels.training import AdapterTrainer

    settings = dict(
        per_device_train_batch_size=ROWS // WORLD, max_steps=1, learning_rate=0.1, optim="sgd", max_grad_norm=1e9,
        train_sampling_strategy="sequential", use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
        dataloader_pin_memory=False,
    )  # fmt: skip
    return (cls or AdapterTrainer)(
        model=Squares(), args=transformers.TrainingArguments(str(folder / "trainer"), **settings), train_dataset=rows,
        eval_dataset=rows, data_collator=transformers.default_data_collator,
    )  # fmt: skip


def check_a_trainer_that_evaluates_first(folder):
    """One step of two processes on half a batch each is that of one on the whole batch."""
    pytest.importorskip("transformers")
    alone = make_model()
    alone(batch()).square().mean().backward()
    trainer = adapter_trainer(folder, [{"x": row} for row in batch()])
    assert trainer.args.world_size == WORLD
    trainer.evaluate()
    trainer.train()
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    for ours, before in zip(trainer.model.model.parameters(), alone.parameters()):
        step = 0.1 * before.grad if before.requires_grad else 0
        torch.testing.assert_close(ours, before - step, rtol=1e-4, atol=1e-5)
    trainer.evaluate()
    trainer.train()
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)


def check_a_trainer_without_ddp_does_not_train(folder):
    pytest.importorskip("transformers")
    from allora_kernels.training import AdapterTrainer

    class Forgets(AdapterTrainer):
        def create_optimizer(self, model=None):
            self.model._is_accelerate_prepared = True
            return super().create_optimizer()

    trainer = adapter_trainer(folder, [{"x": row} for row in batch()], Forgets)
    with pytest.raises(RuntimeError, match="2 processes would each train a model of their own: it is a Squares"):
        trainer.train()
    assert_same(dict(trainer.model.model.named_parameters()), dict(make_model().named_parameters()), rtol=0, atol=0)


def check_what_counts_as_one_model(_):
    pytest.importorskip("transformers")
    from types import SimpleNamespace

    from allora_kernels.training.parallel import RequireParallel

    ddp, sharded = DistributedDataParallel(make_model()), make_model()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (WORLD,)))
    for model in (ddp, sharded, torch.compile(ddp, backend="eager")):
        guard = RequireParallel(SimpleNamespace(model_wrapped=model))
        guard.on_train_begin(SimpleNamespace(world_size=WORLD), None, None)
    guard = RequireParallel(SimpleNamespace(model_wrapped=torch.compile(make_model(), backend="eager")))
    guard.on_train_begin(SimpleNamespace(world_size=1), None, None)
    with pytest.raises(RuntimeError, match="it is a Sequential"):
        guard.on_train_begin(SimpleNamespace(world_size=WORLD), None, None)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(K, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, K))

    def forward(self, x):
        return x + self.inner(x)


def make_stages():
    torch.manual_seed(0)
    model = nn.Sequential(*(Residual() for _ in range(2 * WORLD)))
    apply_allora(model, r=R)
    for stage in model:
        nn.init.normal_(stage.inner[0].lora_B)
    return model


def check_pipeline(folder):
    x, target = torch.randn(2, ROWS, 2, K, generator=torch.Generator().manual_seed(1))
    alone, model, rank = make_stages(), make_stages(), dist.get_rank()
    nn.functional.mse_loss(alone(x), target).backward()
    for schedule in (ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble):
        model.zero_grad()
        numbers = range(rank, len(model), WORLD)
        stages = [PipelineStage(model[i], i, len(model), torch.device("cpu")) for i in numbers]
        run = schedule(stages, n_microbatches=4, loss_fn=nn.functional.mse_loss)
        run.step(*([x] if rank == 0 else []), **({"target": target} if rank == WORLD - 1 else {}))
        for i in numbers:
            for (name, p), want in zip(model[i].named_parameters(), alone[i].parameters(), strict=True):
                assert (p.grad is None) != p.requires_grad, name
                if p.requires_grad:
                    torch.testing.assert_close(p.grad, want.grad)


def in_environment(check, port, folder):
    """As a launcher leaves it: accelerate looks there for the group."""
    os.environ |= {"RANK": str(dist.get_rank()), "LOCAL_RANK": str(dist.get_rank()), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    check(folder)


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


KERNELS = ("row", "entry")
EXACT = MixedPrecisionPolicy()
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
CHECKS = {
    **{f"ddp, eager, {n}": partial(check_ddp, "eager", n) for n in reference.NORMS},
    **{f"ddp, triton, {n}": partial(check_ddp, "triton", n) for n in KERNELS},
    **{f"ddp, reentrant={r}": partial(check_ddp_with_checkpointing, r) for r in (False, True)},
    "accumulation": check_accumulation_without_synchronization,
    "bytes": check_what_ddp_sends,
    "bytes, fsdp": check_what_fsdp_sends,
    **{f"fsdp, eager, {n}": partial(check_fsdp, "eager", n, EXACT, torch.float32) for n in reference.NORMS},
    **{f"fsdp, triton, {n}": partial(check_fsdp, "triton", n, EXACT, torch.float32) for n in KERNELS},
    "fsdp, computing in bfloat16": partial(check_fsdp, "eager", "row", BF16, torch.float32),
    "fsdp, a bfloat16 base": partial(check_fsdp, "eager", "row", EXACT, torch.bfloat16),
    "pipeline": check_pipeline,
    "one model": check_what_counts_as_one_model,
    "fsdp, both": partial(check_fsdp, "eager", "row", BF16, torch.bfloat16),
}


def test_four_processes_train_what_one_does(tmp_path):
    checks = {name: check for name, check in CHECKS.items() if name.endswith(", row")}
    assert len(checks) == 4
    run_checks(4, checks, tmp_path)


def test_two_processes_train_what_one_does(tmp_path):
    launched = {
        "accelerate": check_accelerate,
        "a trainer that evaluates first": check_a_trainer_that_evaluates_first,
        "a trainer without ddp": check_a_trainer_without_ddp_does_not_train,
    }
    checks = CHECKS | {name: partial(in_environment, check, free_port()) for name, check in launched.items()}
    run_checks(WORLD, checks, tmp_path)
