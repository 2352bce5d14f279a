"""How many tokens `--prefix_length answers` selects in an estimate: by `--answer_share`, or counted in the data."""

import sys
from dataclasses import replace

from tokentune.data.instruction_data import load_instruction_data
from tokentune.data.prompts import PromptTemplate, ensure_pad_token
from tokentune.data.row_sizes import lengths_of, target_counts_of
from tokentune.errors import UserError
from tokentune.memory.estimated_batch import unknown_answers
from tokentune.memory.presets import Subject
from tokentune.models.pretrained import load_tokenizer
from tokentune.models.tasks import CAUSAL_LM
from tokentune.settings.estimate import EstimateArguments
from tokentune.settings.presets import PRESETS


def with_answers(subject: Subject, arguments: EstimateArguments, *, length_is_given: bool) -> Subject:
    """The subject with the share of its tokens that answers are.

    Counted in data, it is that of the longest answer in the longest row: a micro-batch holds as much as those of its
    rows that need most. Its length is that row's, unless `length_is_given`.

    Raises:
        UserError: the share is not given, or given twice; data that cannot be read.
    """
    asked, data = f"--prefix_length {arguments.selection.prefix_length}", arguments.data
    if subject.head is not CAUSAL_LM:
        raise UserError(f"{asked}: an estimate of {subject.head.description} has one label for all tokens of a row")
    share = arguments.estimation.answer_share
    if share is not None:
        if data.dataset_name_or_path:
            raise UserError("--answer_share and --dataset_name_or_path both say how long answers are: give one of them")
        return replace(subject, answer_share=share)
    if not data.dataset_name_or_path:
        raise unknown_answers(arguments)
    if data.streaming:
        raise UserError("--streaming: rows are counted before an estimate. Give --answer_share instead of the data")
    rows = _rows(arguments, subject)
    lengths, targets = lengths_of(rows), target_counts_of(rows)
    longest, most = int(lengths.max()), int(targets.max())
    length = subject.length if length_is_given else longest
    print(
        f"{len(rows):,} rows of at most {longest:,} tokens, at most {most:,} of them answer "
        f"({targets.sum() / lengths.sum():.1%} of all tokens)",
        file=sys.stderr,
    )
    return replace(subject, length=length, answer_share=min(1.0, most / length))


def _rows(arguments: EstimateArguments, subject: Subject) -> object:
    """The encoded rows; `arguments` are told what stands in front of their answers, with `--lora_on answers`."""
    model = arguments.model
    name = model.model_name_or_path
    if name in PRESETS or name.endswith(".json"):
        raise UserError(
            f"--model_name_or_path {name} has no tokenizer, which counting tokens takes: give a folder or hub id, or "
            "--answer_share instead of the data"
        )
    template = PromptTemplate.load(arguments.data.prompt_template_name_or_path)
    tokenizer = load_tokenizer(name, trust_remote_code=model.trust_remote_code)
    ensure_pad_token(tokenizer, subject.config.get_text_config().vocab_size)
    data = load_instruction_data(arguments, tokenizer, template)
    arguments.set_invocation(data.invocation)
    return data.train
