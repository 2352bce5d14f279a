"""The model that is to be estimated: a preset, a configuration file, a folder or a hub id."""

import difflib
import os
from dataclasses import dataclass

from transformers import AutoConfig, PreTrainedConfig

from tokentune.errors import UserError
from tokentune.models.pretrained import LOADING_ERRORS, load_config
from tokentune.models.tasks import CAUSAL_LM, TEXT, Head
from tokentune.settings.presets import PRESETS
from tokentune.sources import hub_error, is_local_path


@dataclass(frozen=True)
class Subject:
    """What is to be estimated: a configuration, the head that it is trained with, and how large its batches are."""

    config: PreTrainedConfig
    head: Head
    sequences: int
    length: int
    answer_share: float | None = None  # of a row's tokens: the positions that have a loss; None: not known


def load_subject(name: str, *, trust_remote_code: bool = False) -> Subject:
    """The model behind a preset's name, a configuration file, a local folder or a hub id.

    A model that can generate is a causal language model (1 x 2,048 tokens); an encoder classifies texts (32 x 128).

    Raises:
        UserError: no such file, folder, preset or model on the hub; for a misspelt preset with the nearest name.
    """
    if name in PRESETS:
        config = AutoConfig.for_model(**PRESETS[name])
    elif name.endswith(".json"):
        if not os.path.isfile(name):
            raise UserError(f"--model_name_or_path {name}: no such file.")
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        except LOADING_ERRORS as error:
            raise hub_error(name, error, "--model_name_or_path") from error
    elif "/" not in name and not is_local_path(name) and not os.path.exists(name):
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"--model_name_or_path {name}: no preset of that name. {hint}Presets: {', '.join(PRESETS)}; "
            "otherwise a hub id (owner/name), a folder or a config.json"
        )
    else:
        try:
            config = load_config(name, trust_remote_code=trust_remote_code)
        except UserError as error:
            if "is not a" not in str(error):
                raise
            config = load_config(name, head=TEXT, trust_remote_code=trust_remote_code)
    own_code = (getattr(config, "auto_map", None) or {}) if trust_remote_code else {}
    causal = _serves(config, CAUSAL_LM, own_code) and not _is_encoder(config)
    if not causal and not _serves(config, TEXT, own_code):
        raise UserError(
            f"--model_name_or_path {name}: a {config.model_type} model is neither {CAUSAL_LM.description} nor an "
            "encoder that classifies texts"
        )
    return Subject(config, CAUSAL_LM, 1, 2048) if causal else Subject(config, TEXT, 32, 128)


def _serves(config: PreTrainedConfig, head: Head, own_code: dict[str, str]) -> bool:
    return type(config) in head.models or head.auto_class.__name__ in own_code


def _is_encoder(config: PreTrainedConfig) -> bool:
    """Whether it is to classify: encoders have causal variants too, as decoders of sequence-to-sequence models."""
    if config.architectures:
        generative = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
        return not any(name.endswith(generative) for name in config.architectures)
    return hasattr(config, "is_decoder") and hasattr(config, "type_vocab_size") and not config.is_decoder
