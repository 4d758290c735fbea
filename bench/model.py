"""The section "model": training steps of a whole Llama, tokens/s and peak memory of each way to adapt it.

The weights are random and shared by all variants, so these stand in memory side by side and are timed in turns. In
every variant the embeddings' output asks for its gradient, so that each layer's dX is computed, as it is for the frozen
model: the floor.
"""

import copy
import gc
import itertools
import warnings
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from allora_kernels import apply_allora
from allora_kernels.tools.timing import interleaved

from .layer import as_row, failure
from .model_judging import gradient_fault
from .runner import Run


@dataclass(frozen=True)
class ModelCase:
    """One comparison: the first `layers` layers of the model, `batch` sequences of `sequence` tokens."""

    layers: int
    checkpointing: bool
    compiled: bool
    batch: int = 4
    sequence: int = 2048
    R: int = 16
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        checkpointing = "with" if self.checkpointing else "without"
        how = "compiled layer by layer" if self.compiled else "eager"
        tokens = f"{self.batch}x{self.sequence} tokens"
        return f"{self.layers} layers, {tokens}, R={self.R}, {self.dtype}, {checkpointing} checkpointing, {how}"


GPU_CASES = [ModelCase(32, *options) for options in [(False, False), (True, False), (False, True), (True, True)]]
CPU_CASES = [ModelCase(2, checkpointing, False, 2, 64, 8, "float32") for checkpointing in (False, True)]

VARIANTS = {
    "frozen": "no adapter; the gradient flows to the embeddings' output",
    "ours": "apply_allora, adapters in the model's dtype",
    "ours-fp32": "apply_allora with its default fp32 adapters",
    "peft": "PEFT LoRA, adapters in the model's dtype",
    "peft-fp32": "PEFT LoRA with its default fp32 adapters",
    "peft-dora": "PEFT DoRA, adapters in the model's dtype",
}
_LEAST_LAYERS = 4


def run_model(run: Run) -> None:
    """Every case; where a variant runs out of memory, once more with half the layers, so that all can be compared."""
    waiting = list(GPU_CASES if run.on_gpu else CPU_CASES)
    most = max(case.layers for case in waiting)
    base = None
    while waiting:
        if run.time_is_up():
            run.leave("model", [(asdict(case), _names(run)) for case in waiting])
            return
        case = waiting.pop(0)
        names = _names(run)
        if run.only_missing and run.results.has("model", asdict(case), names):
            continue
        base = base if base is not None else llama(most, run.device, case.dtype, tiny=not run.on_gpu)
        rows = _measure(run, base, case, names)
        run.record("model", str(case), asdict(case), rows)
        if len(rows) < len(names):
            waiting.insert(0, case)
            continue
        out_of_memory = any(row.get("reason") == "out of memory" for row in rows.values())
        if out_of_memory and case.layers // 2 >= _LEAST_LAYERS:
            waiting.insert(0, ModelCase(**{**asdict(case), "layers": case.layers // 2}))
    run.leave("model", [])


def _names(run: Run) -> list[str]:
    return [name for name in VARIANTS if run.providers is None or name == "frozen" or name in run.providers]


def llama(layers: int, device: torch.device, dtype: str, tiny: bool = False) -> nn.Module:
    """A frozen causal language model of Llama-3.1-8B's shape (tiny: a toy's) with random weights, made on `device`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    sizes = (512, 128, 384, 4, 2) if tiny else (128256, 4096, 14336, 32, 8)
    config = LlamaConfig(
        num_hidden_layers=layers, max_position_embeddings=131072, use_cache=False, **dict(zip(names, sizes))
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    return model.requires_grad_(False).train()


def adapted(base: nn.Module, case: ModelCase, variant: str) -> nn.Module:
    """A model of `case` with `base`'s own weights and the variant's adapters on all its linear layers but the head."""
    shared = {id(t): t for t in itertools.chain(base.parameters(), base.buffers())}
    model = copy.deepcopy(base, shared)
    model.model.layers = model.model.layers[: case.layers]
    layers = model.model.layers
    model.config.num_hidden_layers = case.layers
    model.enable_input_require_grads()
    with warnings.catch_warnings():
        # Checkpointing has a new name, which not every transformers that is supported knows, nor PEFT.
        warnings.simplefilter("ignore", FutureWarning)
        if case.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model = _with_adapters(model, case, variant)
    if case.compiled:
        for layer in layers:
            layer.compile()
    return model.train()


def _with_adapters(model: nn.Module, case: ModelCase, variant: str) -> nn.Module:
    if variant.startswith("ours"):
        apply_allora(model, r=case.R, autocast_adapter_dtype=variant == "ours-fp32")
    elif variant.startswith("peft"):
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=case.R,
            lora_alpha=case.R,
            lora_dropout=0.0,
            target_modules="all-linear",
            use_dora=variant == "peft-dora",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, config, autocast_adapter_dtype=variant == "peft-fp32")
    return model


class Step:
    """A training step as a call: forward, backward, AdamW on the adapters. Returns the loss."""

    def __init__(self, model: nn.Module, tokens: Tensor) -> None:
        self.model, self.tokens = model, tokens
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4) if self.parameters else None

    def backward(self) -> Tensor:
        """Forward and backward, by fresh gradients."""
        for p in self.parameters:
            p.grad = None
        loss = self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss
        loss.backward()
        return loss

    def __call__(self) -> Tensor:
        loss = self.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        return loss.detach()


def _measure(run: Run, base: nn.Module, case: ModelCase, names: list[str]) -> dict[str, dict]:
    """A row for each variant that there was time to build, and compile."""
    tokens = torch.randint(base.config.vocab_size, (case.batch, case.sequence), device=run.device)
    rows: dict[str, dict] = {}
    steps: dict[str, Step] = {}
    frozen_loss = None
    weights = _allocated(run)
    # The variants' layers are one function to torch.compile, and each needs its own code.
    with torch._dynamo.config.patch(recompile_limit=64, accumulated_recompile_limit=1024):
        for name in names:
            if run.time_is_up():
                break
            step = None
            _release(run)
            others = _allocated(run) - weights
            try:
                step = Step(adapted(base, case, name), tokens)
                loss, peak = _first_steps(run, step)
                frozen_loss = loss if name == "frozen" else frozen_loss
                fault = _fault(step, loss, frozen_loss) or gradient_fault(step, name, case.compiled)
            except Exception as error:
                rows[name] = failure(error)
                continue
            rows[name] = {"status": "ok"} if fault is None else {"status": "wrong", "reason": fault}
            rows[name]["layers"] = case.layers
            if fault is None:
                steps[name] = step
                rows[name]["peak_bytes"] = None if peak is None else peak - others
        step = None
        _release(run)
        budget_s = min(60.0, max(10.0, run.seconds_left()))
        try:
            timings = interleaved(steps, rounds=7 if run.on_gpu else 10, warmup=1, device=run.device, budget_s=budget_s)
        except Exception as error:
            return rows | {name: failure(error) for name in steps}
    for name, timing in timings.items():
        rows[name]["step"] = as_row(timing)
        rows[name]["tokens_per_s"] = 1e3 * tokens.numel() / timing.median_ms
    return rows


def _allocated(run: Run) -> int:
    return torch.cuda.memory_allocated(run.device) if run.on_gpu else 0


def _release(run: Run) -> None:
    """Give back what a variant that failed half way held."""
    gc.collect()
    if run.on_gpu:
        torch.cuda.empty_cache()


def _first_steps(run: Run, step: Step) -> tuple[float, int | None]:
    """(the loss before any update, the most memory of the second step); the first compiles and makes AdamW's state."""
    loss = step().item()
    if not run.on_gpu:
        step()
        return loss, None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(run.device)
    step()
    torch.cuda.synchronize(run.device)
    return loss, torch.cuda.max_memory_allocated(run.device)


def _fault(step: Step, loss: float, frozen_loss: float | None) -> str | None:
    """What is wrong with a variant: a fresh adapter changes nothing, and every adapter gets a gradient."""
    if frozen_loss is not None and not abs(loss - frozen_loss) <= 0.01 * abs(frozen_loss):
        return f"the loss of a fresh adapter is {loss:.4f}, the frozen model's is {frozen_loss:.4f}"
    missing = [p for p in step.parameters if p.grad is None]
    if missing:
        return f"{len(missing)} of {len(step.parameters)} parameters have no gradient"
    if step.parameters and not torch.stack([p.grad.float().square().sum() for p in step.parameters]).sum().isfinite():
        return "the gradients are not finite"
    return None
