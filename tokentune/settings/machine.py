"""What the flags' checks ask of this machine and of the installed libraries.

The imports stand inside of the functions: `--help` and a misspelt flag need none of these libraries, which take seconds
to import. No other file of the settings imports them.
"""

from typing import TYPE_CHECKING

from tokentune.errors import UserError

if TYPE_CHECKING:
    from tokentune.sampling.schedule import Schedule, Size
    from tokentune.sampling.strategies import Registered


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
    from transformers.training_args import OptimizerNames

    return [name.value for name in OptimizerNames]


def trackers() -> tuple[list[str], list[str]]:
    """Where the Trainer can report to; and where with the packages that are installed."""
    from transformers.integrations import integration_utils

    return list(integration_utils.INTEGRATION_TO_CALLBACK), integration_utils.get_available_reporting_integrations()


def why_not_independent(strategy: str, size: "Size | Schedule") -> str | None:
    """Why a strategy cannot draw each token on its own, as `--gradient_correction` needs; None where it can."""
    from tokentune.sampling.independent import why_not_independent

    return why_not_independent(strategy, size)


def strategy_of(name: str) -> "Registered":
    """The strategy of `--selection`; a file of the user's is run. Raises UserError where there is none."""
    from tokentune.sampling.resolver import find_strategy

    try:
        return find_strategy(name)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"--selection {error}") from None
