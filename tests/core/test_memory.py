"""Byte counts that can be worked out by hand."""

import torch
from torch import nn

from tokentune.core.saved_tensors.saved_bytes import SavedForBackward, gib
from tokentune.environment import memory_usage, reset_peak


def test_counts_each_storage_once_and_no_parameters() -> None:
    linear = nn.Linear(8, 8, bias=False)
    x = torch.randn(5, 8, requires_grad=True)
    with SavedForBackward(linear) as saved:
        y = linear(x) * linear(x[:2].repeat(3, 1)[:5])  # keeps x, the repeated rows, and both factors
    assert saved.bytes == (5 + 6 + 5 + 5) * 8 * 4
    y.sum().backward()
    assert saved.bytes == (5 + 6 + 5 + 5) * 8 * 4  # stays readable


def test_counts_nothing_without_gradients() -> None:
    linear = nn.Linear(8, 8)
    with SavedForBackward(linear) as saved, torch.no_grad():
        linear(torch.randn(5, 8))
    assert saved.bytes == 0


def test_views_count_their_storage_once() -> None:
    model = nn.Identity()
    x = torch.randn(10, 4, requires_grad=True)
    with SavedForBackward(model) as saved:
        (x[:5] * x[5:]).sum()
    assert saved.bytes == 10 * 4 * 4


def test_usage_of_this_process() -> None:
    reset_peak("cpu")
    usage = memory_usage("cpu")
    assert usage.keys() == {"allocated_bytes", "reserved_bytes", "peak_bytes"}
    assert usage["peak_bytes"] >= usage["allocated_bytes"] > 10 * 1024**2


def test_bytes_for_people() -> None:
    assert gib(int(1.5 * 1024**3)) == "1.50 GiB"
    assert gib(3 * 1024**2) == "3.0 MiB"
