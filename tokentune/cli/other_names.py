"""Other names of flags: those with the same meaning are understood; for others, the error says what to give instead.

They are names of TRL and the Hugging Face Trainer, LLaMA-Factory, Axolotl and Unsloth. A name leads only to flags that
the command has: `--output_dir` is a flag of `merge.py` itself, and answered in `finetune.py`.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches

SECOND = {"prefix_length": "selected_tokens"}  # which says what it is; nothing to tell
FORMER = {"selections": "strategies"}
SAME = {  # the flag: what others call it, with the same values
    "model_name_or_path": "model model_name model_id model_path base_model base_model_name_or_path "
    "pretrained_model_name_or_path",
    "dataset_name_or_path": "dataset dataset_name dataset_path data data_path data_file data_files train_file "
    "train_data train_dataset",
    "eval_dataset_name_or_path": "eval_dataset eval_data eval_file validation_file validation_data val_file "
    "val_dataset",
    "test_dataset_name_or_path": "test_file test_dataset test_data",
    "dataset_split": "dataset_train_split train_split",
    "dataset_config": "dataset_config_name",
    "prompt_template_name_or_path": "prompt_template",
    "max_length": "cutoff_len max_seq_length max_seq_len sequence_len sequence_length model_max_length block_size",
    "packing": "sample_packing neat_packing",
    "streaming": "dataset_streaming",
    "num_workers": "dataloader_num_workers",
    "tokenize_workers": "preprocessing_num_workers dataset_num_proc dataset_processes",
    "max_train_rows": "max_train_samples max_samples",
    "text_columns": "text_column_names text_column_name",
    "label_column": "label_column_name",
    "selection": "strategy",
    "gradient_checkpointing": "activation_checkpointing",
    "use_liger_kernel": "enable_liger_kernel",
    "lora": "use_lora use_peft",
    "qlora": "use_qlora load_in_4bit",  # elsewhere too, a 4-bit base is trained with adapters alone
    "lora_r": "lora_rank rank r",
    "lora_target_modules": "target_modules",
    "global_batch_size": "total_batch_size effective_batch_size",
    "micro_batch_size": "per_device_train_batch_size batch_size",
    "gradient_accumulation_steps": "grad_accum_steps accumulation_steps",
    "num_epochs": "num_train_epochs epochs n_epochs",
    "max_steps": "max_train_steps",
    "learning_rate": "lr",
    "lr_scheduler_type": "lr_scheduler lr_schedule",
    "warmup_steps": "num_warmup_steps lr_warmup_steps warmup_ratio",  # below 1, it is a share
    "optim": "optimizer",
    "max_grad_norm": "gradient_clipping grad_clip",
    "seed": "random_state random_seed",
    "resume_from_checkpoint": "resume",
    "num_processes": "num_gpus gpus",
    # of merge.py
    "base_model_name_or_path": "base_model base_model_name base_model_path",
    "peft_model_path": "adapter adapter_path adapter_name_or_path adapter_model_name peft_model lora_path "
    "lora_model_dir",
    "output_dir": "output output_path output_name out_dir export_dir save_path save_dir",
    "dtype": "torch_dtype base_dtype",
}
# Names, and what to give instead, in parts: each is said where its flags are known.
ANSWERS = [
    (
        "output_dir output output_path output_folder out_dir save_path save_dir",
        "the run's folder is made in --model_save_path, and named after model, data and method",
        "--run_name gives it another name",
    ),
    ("model model_name_or_path", "give --base_model_name_or_path, and the adapter with --peft_model_path"),
    (
        "per_device_train_batch_size per_device_batch_size micro_batch_size batch_size train_batch_size",
        "give --global_batch_size, the sequences of one optimizer step over all devices: those of a device at a time x "
        "--gradient_accumulation_steps x devices (4 x 8 x 1 = 32)",
    ),
    (
        "per_device_eval_batch_size eval_batch_size",
        "leave it out: evaluation takes the micro-batch of training (--global_batch_size / "
        "--gradient_accumulation_steps / devices)",
    ),
    ("max_samples max_train_samples", "--max_steps N ends the run after N optimizer steps"),
    ("load_in_8bit", "weights are held in 16 or 32 bits (--base_dtype), or in 4 (--qlora)"),
    ("quantization_bit", "--qlora holds the base in 4 bits, beside 16-bit adapters"),
    ("finetuning_type adapter", "--lora or --qlora trains adapters; without them all weights are trained"),
    ("lora_target", "--lora_target_modules takes names with spaces between them, or all-linear"),
    ("lora_target_linear", "give --lora_target_modules all-linear"),
    ("torch_dtype dtype", "--base_dtype says how the base is held, and --bf16 or --fp16 what is computed in"),
    ("mixed_precision precision", "give --bf16 or --fp16"),
    ("pure_bf16", "give --bf16 --base_dtype bfloat16"),
    (
        "flash_attn flash_attention use_flash_attention_2 sdp_attention",
        "--attn_implementation names the kernels; most models take sdpa, which is fused, by default",
    ),
    ("use_gradient_checkpointing disable_gradient_checkpointing", "--gradient_checkpointing turns it on; it is off"),
    ("template chat_template_path", "give --chat_template, or nothing for the tokenizer's own template"),
    (
        "datasets dataset_dir",
        "--dataset_name_or_path takes a file, a folder or a hub id",
        "--data_format says what the columns are",
    ),
    (
        "val_size val_set_size validation_split validation_split_percentage",
        "--eval_fraction splits a share of the training rows off (0.05)",
        "--eval_dataset_name_or_path names other data",
    ),
    ("dataset_test_split", "give --eval_dataset_name_or_path, and --eval_dataset_split for its split"),
    (
        "eval_strategy evaluation_strategy evals_per_epoch do_eval",
        "--eval_steps N evaluates every N optimizer steps",
    ),
    ("save_strategy saves_per_epoch", "--save_steps N saves a checkpoint every N optimizer steps"),
    ("logging_strategy", "--logging_steps N logs every N optimizer steps"),
    ("do_predict", "--test_dataset_name_or_path names the data to predict"),
    ("do_train stage", "leave it out"),
    (
        "train_on_inputs train_on_prompt completion_only_loss assistant_only_loss",
        "leave it out: answers have a loss, prompts have none",
    ),
    ("hub_model_id", "give it with --push_to_hub: --push_to_hub owner/name"),
    ("hub_token hf_token", "set HF_TOKEN in the environment"),
    ("wandb_project", "give --report_to wandb, and set WANDB_PROJECT in the environment"),
    ("deepspeed fsdp", "the launcher chooses the engine: docs/multi-gpu.md"),
    ("overwrite_cache", "--data_cache none tokenizes anew"),
    ("device_map", "--model_parallel spreads the base over the visible GPUs"),
]
NEVER_GUESSED = ("overwrite_output_dir", "push_to_hub", "hub_public", "force")  # they delete, publish or override


def synonyms(flags: Collection[str]) -> dict[str, str]:
    """Flags of a command by their other names; where a table has a name twice, its later flag."""
    return {
        name: flag
        for table in (SECOND, FORMER, SAME)
        for flag, names in table.items()
        if flag in flags
        for name in names.split()
        if name not in flags
    }


def note(name: str, flag: str) -> str | None:
    """What the user is told of an other name that was given."""
    if name in SECOND.values():
        return None
    return f"--{name} is called --{flag} now" if name in FORMER.values() else f"--{name} is read as --{flag}"


def what_instead(name: str, flags: Collection[str], other: Mapping[str, str]) -> str | None:
    """What to give instead of an unknown name, in words; None where nothing is like it. `other`: its `synonyms`."""
    answers = {known: said for names, *parts in ANSWERS if (said := _known(parts, flags)) for known in names.split()}
    if name in answers:
        return answers[name]
    near = next(iter(get_close_matches(name, [*flags, *other, *answers], n=1, cutoff=0.7)), None)
    if near in answers and near not in flags:
        return f"if you mean --{near}: {answers[near]}"
    if near is None or near in NEVER_GUESSED:
        return None
    return f"did you mean --{other.get(near, near)}?"


def _known(parts: Sequence[str], flags: Collection[str]) -> str:
    return "; ".join(part for part in parts if set(re.findall(r"--(\w+)", part)) <= set(flags))
