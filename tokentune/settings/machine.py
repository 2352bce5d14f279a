"""What the flags' checks ask of this machine and of the installed libraries.

The imports stand inside of the functions: `--help`, a misspelt flag and a wrong value need none of these libraries,
which take seconds to import. No other file of the settings imports them.
"""

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from tokentune.errors import UserError
from tokentune.sampling.meanings import NEEDS

if TYPE_CHECKING:
    from tokentune.sampling.schedule import Schedule, Size


def gpu_count() -> int:
    """CUDA or ROCm devices that are visible."""
    import torch

    return torch.cuda.device_count()


def has_gpu() -> bool:
    """Whether torch computes on a CUDA or ROCm device."""
    import torch

    return torch.cuda.is_available()


def has_accelerator() -> bool:
    """Whether torch computes on anything but the CPU."""
    import torch

    return torch.accelerator.is_available()


def masked_kernels() -> tuple[str, ...]:
    """The attention kernels that take a mask."""
    from tokentune.core.attention.kernels import IMPLEMENTATIONS

    return IMPLEMENTATIONS


def gpu_lacks_bfloat16() -> bool:
    """Whether there is a GPU without bfloat16 of its own, which it could only emulate."""
    import torch

    return torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)


def has_liger() -> bool:
    """Whether the Liger kernels are installed."""
    from transformers.utils import is_liger_kernel_available

    return is_liger_kernel_available()


def optimizer_names() -> list[str]:
    """What the Trainer's `optim` may be."""
    source = _source("training_args")
    (names,) = (node for node in source if isinstance(node, ast.ClassDef) and node.name == "OptimizerNames")
    return [ast.literal_eval(line.value) for line in names.body if isinstance(line, ast.Assign)]


def tracker_names() -> list[str]:
    """Where the Trainer can report to."""
    tables = (node for node in _source("integrations.integration_utils") if isinstance(node, ast.Assign))
    (table,) = (node.value for node in tables if ast.unparse(node.targets[0]) == "INTEGRATION_TO_CALLBACK")
    return [ast.literal_eval(key) for key in table.keys]


def installed_trackers() -> list[str]:
    """Where it can with the packages that are installed."""
    from transformers.integrations import integration_utils

    return integration_utils.get_available_reporting_integrations()


def _source(module: str) -> list[ast.stmt]:
    """The statements of a module of transformers, read and not run: its import would take seconds."""
    path = Path(find_spec("transformers").origin).parent.joinpath(*module.split(".")).with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8")).body


def why_not_independent(strategy: str, size: "Size | Schedule") -> str | None:
    """Why a strategy cannot draw each token on its own, as `--gradient_correction` needs; None where it can."""
    from tokentune.sampling.independent import why_not_independent

    return why_not_independent(strategy, size)


def needs_of(name: str) -> tuple[str, ...]:
    """The scores that a `--selection` needs; a file of the user's is run. Raises UserError where there is none."""
    if name in NEEDS:
        return NEEDS[name]
    from tokentune.sampling.resolver import find_strategy

    try:
        return find_strategy(name).needs
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"--selection {error}") from None
