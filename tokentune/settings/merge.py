"""Every flag of `merge.py`.

python ./tokentune/merge.py --help
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from tokentune.settings.flags import REQUIRED, Group, flag


@dataclass
class MergingArguments(Group):
    """What is merged, how, and where it goes."""

    _argument_group_name = "merging"
    base_model_name_or_path: str = flag(REQUIRED, "the unquantised base model: a local folder or a hub id")
    peft_model_path: str = flag(REQUIRED, "the adapter's folder: a run's folder or one checkpoint")
    output_dir: str = flag(REQUIRED, "the merged model's folder; an earlier merge is replaced")
    device: str = flag("auto", "where to compute: auto (a GPU with room, else cpu) or a device")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = flag(
        "auto", "the merged weights' type; auto is the base's own"
    )
    qlora_base: Literal["auto", "16bit", "dequantized"] = flag(
        "auto",
        "what a QLoRA adapter is folded into: the base's own weights (16bit), or the 4-bit ones that it was trained "
        "on, as 16-bit values (dequantized); both are measured against the 4-bit base + adapter. auto is 16bit; "
        "where the adapter's folder does not say how it was trained, naming one says that it is QLoRA's",
    )
    force: bool = flag(False, "merge into a base whose weights are not those that the adapter was trained on")
    max_shard_size: str = flag("5GB", "a larger model is saved in several files", metavar="SIZE")
    push_to_hub: str | None = flag(
        None,
        "upload the result to the hub, into a private repository: owner/name, or by itself the folder's name",
        nargs="?",
        const="",
        metavar="REPOSITORY",
    )
    hub_public: bool = flag(False, "... into a public one, where it is new")
    trust_remote_code: bool = flag(False, "run the Python code that comes with the base")
    allow_pickle: bool = flag(False, "read the base's pytorch_model.bin where it has no safetensors")


@dataclass
class MergeArguments:
    """A whole command line of `merge.py`."""

    prog: ClassVar[str] = "merge.py"
    description: ClassVar[str] = "Fold a trained adapter into its base model and save the full checkpoint."
    epilog: ClassVar[str] = (
        "Memory: one copy of the model in --dtype, a QLoRA adapter's 4-bit base, one layer in float32."
    )
    merging: MergingArguments
