"""That several processes train one model and not each its own."""

from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback

from ..layer.sharding import is_sharded


def prepare_anew(trainer: Trainer) -> None:
    """Let accelerate prepare the model for training where it has prepared it for evaluation only: it takes the one for the
    other, and would leave the model without DistributedDataParallel."""
    if trainer.args.world_size > 1 and trainer.model_wrapped is trainer.model:
        trainer.model.__dict__.pop("_is_accelerate_prepared", None)


class RequireParallel(TrainerCallback):
    """Raises RuntimeError before the first step where several processes would each train a model of their own: it is neither
    in DistributedDataParallel nor sharded."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        # torch.compile wraps last.
        model = getattr(self.trainer.model_wrapped, "_orig_mod", self.trainer.model_wrapped)
        if (
            args.world_size == 1
            or isinstance(model, DistributedDataParallel)
            or any(map(is_sharded, model.parameters()))
        ):
            return
        raise RuntimeError(
            f"{args.world_size} processes would each train a model of their own: it is a {type(model).__name__}, and not in "
            "DistributedDataParallel. Start the script by torchrun, or by accelerate launch --multi_gpu"
        )
