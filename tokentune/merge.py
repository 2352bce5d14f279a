"""Command: fold a trained adapter into its base model and save the full checkpoint.

    python tokentune/merge.py --base_model_name_or_path meta-llama/Llama-2-7b-hf \
        --peft_model_path models/my-run --output_dir models/my-run/merged

The result is written beside `--output_dir`, read back, compared with base + adapter on fixed inputs, and only then
moved into place: a failure leaves nothing behind. Language models and classifiers (`classify.py --lora`) alike;
embeddings are resized and untied as training did it.

A base whose weights are not those that the adapter was trained on is refused (`--force` merges all the same), if the
adapter's folder has their fingerprint, as a run's has. The last lines say what the differences mean.

A QLoRA adapter goes into the base's own 16-bit weights, or with `--qlora_base dequantized` into the 4-bit ones that it
was trained on, as 16-bit values. How far each is from what was trained is measured and printed either way.

Memory, on the CPU: one copy of the model in `--dtype`, for a QLoRA adapter the 4-bit one besides, and one layer in
float32; a 7B model in 16 bits takes about 13.5 + 4 + 0.5 GB (measured on a model of 1.4 GiB: 1.2 GiB with LoRA, 2.0 GiB
with QLoRA). Pages of the base's files come on top only where there is room for them.

`merge_summary.json` in the result, schema version 2 (a difference: {largest, relative, rms, relative_rms}, the relative
ones over the standard deviation of the logits):

    base_model_name_or_path, peft_model_path, dtype, device
    base_is_same        whether the base's weights are those that the adapter was trained on; null: not known
    task_type           what is classified: text, token or image; null for a language model
    vocabulary          rows of the embedding {base, merged}, and whether the output head shares them {tied}; or null
    logit_difference    of the model read back from base + adapter: computed {in_dtype, in_float32}
    verdict             {kind: fine, noticeable or too large; adapter_effect: difference of the base alone from base +
                        adapter, computed in float32}
    qlora               null for an adapter that was not trained over 4 bits, as far as is known; else {base: 16bit or
                        dequantized, recorded: whether the run's folder says so or the flag alone, from_training:
                        {16bit, dequantized}, differences from the 4-bit base + adapter, computed in float32}
    versions            of the libraries
"""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from tokentune.cli.start import start

    start("merge")  # before the imports below, which take seconds

import torch
from transformers import GenerationConfig

from tokentune.card_file import own_card
from tokentune.cli.arguments import arguments_of, flags_given
from tokentune.cli.command import log_to_stderr, run_command
from tokentune.data.chat.templates import stop_at_end
from tokentune.errors import UserError
from tokentune.file_names import TOKENIZER_FILES
from tokentune.models.merging.folding import (
    BaseKind,
    Plan,
    fold_all,
    out_of_memory_refused,
    plan_fold,
    write_errors_refused,
)
from tokentune.models.merging.logit_difference import logit_difference
from tokentune.models.merging.merge_result import SUMMARY, check_output_folder, merge_summary, replacing_folder, report
from tokentune.models.merging.trained_adapter import ADAPTER_FLAG, BASE_FLAG, OUTPUT_FLAG, QLORA_FLAG, Adapter
from tokentune.models.merging.verdict import verdict_of
from tokentune.models.pretrained import load_base_model, load_tokenizer
from tokentune.models.tasks import CAUSAL_LM, IMAGE
from tokentune.reports.hub_upload import check_push, push_folder
from tokentune.reports.model_card import model_name, write_merged_card
from tokentune.settings.flags import require
from tokentune.settings.merge import MergeArguments

# Relative to the logits' standard deviation. A float32 fold is exact up to rounding (measured: 5e-6): more is a defect.
LARGEST_FLOAT32_DIFFERENCE = 1e-3


def merge(
    base_model_name_or_path: str,
    peft_model_path: str,
    output_dir: str,
    *,
    device: str = "auto",
    dtype: str | None = None,
    qlora_base: str = "auto",
    force: bool = False,
    max_shard_size: str = "5GB",
    push_to_hub: str | None = None,
    hub_public: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> float:
    """Folds an adapter into its base and saves a full checkpoint with its tokenizer; see the module's docstring.

    Args:
        base_model_name_or_path: the unquantised base, local folder or hub id.
        peft_model_path: the adapter's folder, or that of one checkpoint.
        output_dir: may lie inside the adapter's folder. An earlier merge there is replaced.
        device: "auto" or a torch device.
        dtype: "float32", "float16", "bfloat16", or None (or "auto") for the base's own.
        qlora_base: what a QLoRA adapter is folded into: "16bit", "dequantized", or "auto", today the former.
        force: merge, with a warning, into a base whose weights are not those that the adapter was trained on.
        max_shard_size: of one weight file; a larger model gets several, and an index.
        push_to_hub: repository to upload to, "" for the folder's name; None: none.
        hub_public: a new repository is public.
        trust_remote_code: run the Python code that comes with the base.
        allow_pickle: where the base has no safetensors, read the tensors (and nothing else) of pytorch_model.bin.

    Returns:
        The largest logit difference between base + adapter and the merged model as read back, both in `dtype`.

    Raises:
        UserError: anything that the caller can cure; nothing is written then (but for a failed upload).
    """
    output = Path(output_dir)
    check_push(push_to_hub, output)
    check_shard_size(max_shard_size)
    trust = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    plan = plan_fold(base_model_name_or_path, peft_model_path, dtype=dtype, device=device, trust=trust, force=force)
    check_output_folder(output, [base_model_name_or_path, peft_model_path])
    processing = _processing(plan)
    kinds, recorded = _kinds(plan.adapter, qlora_base)
    earlier_card = own_card(output)

    with replacing_folder(output) as partial, out_of_memory_refused(device, plan.place):
        reference, trained, others = fold_all(plan, kinds, partial, max_shard_size=max_shard_size)
        with write_errors_refused():
            processing.save_pretrained(partial)
            if plan.head is CAUSAL_LM:
                generation = GenerationConfig.from_pretrained(partial)
                stop_at_end(generation, processing)
                generation.save_pretrained(partial)
        options = {"dtype": plan.dtype, "quantize_4bit": False, "trust_remote_code": trust_remote_code}
        merged = load_base_model(str(partial), flag=OUTPUT_FLAG, head=plan.head, **options).to(plan.place)
        same = logit_difference(reference.in_dtype, plan.logits(merged, in_float32=False))
        in_float32 = plan.logits(merged, in_float32=True)
        exact = logit_difference(reference.in_float32, in_float32)
        if plan.dtype is torch.float32 and not exact.relative <= LARGEST_FLOAT32_DIFFERENCE:
            raise RuntimeError(f"the merged model's logits differ from base + adapter by {exact}; nothing was written")
        verdict = verdict_of(str(plan.dtype).removeprefix("torch."), exact, reference.effect)
        summary = merge_summary(plan, merged, peft_model_path, same, exact)
        summary["verdict"] = {"kind": verdict.kind, "adapter_effect": asdict(reference.effect)}
        if trained is not None:
            differences = {**others, kinds[0]: logit_difference(trained, in_float32)}
            summary["qlora"] = {
                "base": kinds[0],
                "recorded": recorded,
                "from_training": {kind: asdict(differences[kind]) for kind in get_args(BaseKind)},
            }
        with write_errors_refused():
            (partial / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
            write_merged_card(summary, plan.adapter.summary, partial, name=model_name(output), own=earlier_card)

    report(summary, same, exact, verdict)
    print(f"saved {output}")
    if push_to_hub is not None:
        print(f"uploaded to {push_folder(output, push_to_hub, public=hub_public)}")
    return same.largest


def check_shard_size(size: str) -> None:
    """Refuses what is no size of a file."""
    if not re.fullmatch(r"[1-9][0-9]*(\.[0-9]+)?[KMGT]?B", size, re.IGNORECASE):
        raise UserError(f"--max_shard_size {size}: give a number with its unit, such as 5GB or 500MB.")


def _processing(plan: Plan) -> Any:
    """The merged model's tokenizer or image processor: the adapter's own where it has one, else the base's."""
    folder = plan.adapter.folder
    if plan.head is IMAGE:
        from tokentune.data.labelled.images import load_image_processor  # its packages take a second to import

        own = (folder / "preprocessor_config.json").is_file()
        return load_image_processor(str(folder) if own else plan.base, plan.config, from_scratch=False)
    own = any((folder / name).is_file() for name in TOKENIZER_FILES)
    source, flag = (str(folder), ADAPTER_FLAG) if own else (plan.base, BASE_FLAG)
    trusted = {"trust_remote_code": plan.trust["trust_remote_code"]}
    tokenizer = load_tokenizer(source, flag=flag, **trusted)
    # a base whose own tokenizer gives ids without a row is as it was published
    if own and (highest := max(tokenizer.get_vocab().values())) >= plan.rows:
        of_base = load_tokenizer(plan.base, flag=BASE_FLAG, **trusted)
        require(
            max(of_base.get_vocab().values()) >= highest,
            f"{ADAPTER_FLAG} {folder}: its tokenizer has {highest + 1} tokens, but {BASE_FLAG} has embeddings for "
            f"{plan.rows}, and the adapter's file holds none for the others.\nGive the resized base that it was "
            "trained on.",
        )
    text = plan.config.get_text_config()
    if plan.head.is_new and text.pad_token_id is None:
        text.pad_token_id = tokenizer.pad_token_id  # a decoder's head looks for the last token in front of padding
    return tokenizer


def _kinds(adapter: Adapter, flag: str) -> tuple[list[BaseKind], bool | None]:
    """The bases that the adapter is folded into, the one that is saved first, and what its record says of 4 bits.

    Raises:
        UserError: the flag asks for a base that the adapter was not trained on.
    """
    known, start = adapter.qlora, adapter.start_in_base
    if start is not None and (known or flag != "auto"):
        raise UserError(
            f"{QLORA_FLAG} {flag}: the start of {adapter.folder} ({start}) changed the base's weights, which is found "
            "again over the unquantised base alone. "
            + ("Trained over 4 bits, it cannot be merged." if known else "Leave the flag out.")
        )
    if known is False and flag == "dequantized":
        raise UserError(
            f"{QLORA_FLAG} dequantized: {adapter.folder} was trained on an unquantised base, as its record says, and "
            "4 bits would only take it away from that. Leave the flag out."
        )
    if (not known and flag == "auto") or known is False:
        if start is not None:
            print(
                f"note: the start of {adapter.folder} ({start}) changed the base's weights; that was computed again "
                f"from {BASE_FLAG}, which must be, bit for bit, what it was trained on.",
                file=sys.stderr,
            )
        elif known is None:
            print(
                f"note: {adapter.folder} does not tell whether it was trained over a 4-bit base. If it was, "
                f"{QLORA_FLAG} 16bit or dequantized measures how far each is from that.",
                file=sys.stderr,
            )
        return ["16bit"], known
    chosen: BaseKind = "dequantized" if flag == "dequantized" else "16bit"
    return [chosen, *(kind for kind in get_args(BaseKind) if kind != chosen)], known


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command. `argv`: the words after it; None means the process's own. Raises UserError on bad input."""
    log_to_stderr()
    merge(**vars(arguments_of(flags_given(argv, MergeArguments), MergeArguments).merging))


if __name__ == "__main__":
    run_command(main)
