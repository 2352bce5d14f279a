"""What is read before any weight, and `--preview`, which shows it. Imports no modelling code, which takes seconds."""

from typing import NamedTuple

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from tokentune.data.inspection.preview import show_preview
from tokentune.data.instruction_data import load_instruction_data
from tokentune.data.prompts import PromptTemplate, ensure_pad_token
from tokentune.models.pretrained import (
    NO_WEIGHTS,
    check_quantization,
    check_weights,
    load_config,
    load_tokenizer,
    warn_of_length,
)
from tokentune.settings.finetune import FinetuneArguments


class Inputs(NamedTuple):
    """Of a causal language model's training, besides weights and data."""

    template: PromptTemplate
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase  # with a pad token

    @property
    def vocab_size(self) -> int:
        """Rows of the model's embedding."""
        return self.config.get_text_config().vocab_size


def read_inputs(arguments: FinetuneArguments) -> Inputs:
    """Reads prompt template, config and tokenizer. Raises UserError: one cannot be read, or there are no weights."""
    model = arguments.model
    name, trusted = model.model_name_or_path, model.trust_remote_code
    template = PromptTemplate.load(arguments.data.prompt_template_name_or_path)
    config = load_config(name, trust_remote_code=trusted)
    check_quantization(config, name, qlora=arguments.adapters.qlora)
    inputs = Inputs(template, config, load_tokenizer(name, trust_remote_code=trusted))
    ensure_pad_token(inputs.tokenizer, inputs.vocab_size)
    check_weights(name, hint=NO_WEIGHTS, allow_pickle=model.allow_pickle)
    return inputs


def preview(arguments: FinetuneArguments) -> None:
    """Prints what `--preview` asks for. Raises UserError as `read_inputs`, and where training would refuse the data."""
    inputs = read_inputs(arguments)
    warn_of_length(inputs.config, arguments.model.model_name_or_path, arguments.data.max_length)
    data = load_instruction_data(arguments, inputs.tokenizer, inputs.template)
    arguments.set_invocation(data.invocation)
    show_preview(data, inputs.tokenizer, arguments, inputs.vocab_size)
