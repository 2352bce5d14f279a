"""The weights of a checkpoint, read into the model that is trained.

Whole models are read by their own class: the Trainer goes by the names in the file, where several families (ViT) have
other ones than in memory, and leaves what it does not find as it was. FSDP and DeepSpeed read their own.
"""

import logging
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel, Trainer

logger = logging.getLogger(__name__)


def reads_weights(trainer: Trainer) -> bool:
    """Whether they are read here, and not by the engine that splits them."""
    return not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Reads a whole model's weights, or its adapter's."""
    if isinstance(model, PreTrainedModel):
        saved = type(model).from_pretrained(checkpoint, local_files_only=True, use_safetensors=True)
        model.load_state_dict(saved.state_dict())
    else:
        model.load_adapter(str(checkpoint), model.active_adapters[0], is_trainable=True)


def load_best_weights(trainer: Trainer) -> None:
    """Reads those of the best checkpoint so far, at the end of training."""
    state = trainer.state
    if reads_weights(trainer):
        load_weights(trainer.model, Path(state.best_model_checkpoint))
    else:
        trainer._load_best_model()
    metric = trainer.args.metric_for_best_model.removeprefix("eval_")
    step, best = state.best_global_step, state.best_metric
    logger.info("the result is that of step %d: validation %s %.4f, the best", step, metric, best)
