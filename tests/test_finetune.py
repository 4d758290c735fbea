"""`finetune`: it learns, it measures, it resumes to the same bits, and bad input writes nothing."""

import json
import signal

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from tests.tiny_training import RUN, Tiny, make_tiny  # noqa: E402

from allora_kernels.finetune import FinetuneConfig, finetune  # noqa: E402
from allora_kernels.finetune_config import TASKS  # noqa: E402


class At(transformers.TrainerCallback):
    """Calls `action` at the end of optimizer step `step`."""

    def __init__(self, step: int, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()
