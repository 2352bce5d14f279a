"""How a case is measured: exact bytes of one step, the allocator's peak, and seconds of interleaved rounds."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import DeviceType, ProfilerActivity, profile

from steps.cases import DTYPES, METHODS, Case, Variant, build, inner_model, switch
from steps.sequence_chunks import ChunkedStep
from tokentune.core.saved_tensors.saved_bytes import SavedForBackward
from tokentune.sampling.sampler import IGNORED_LABEL, select_positions, selected_count, target_mask


class Bench:
    """A case's model and batch on a device, and what one step of a variant takes there."""

    def __init__(self, case: Case, device: str, seed: int, model: nn.Module | None = None):
        torch.manual_seed(seed)
        self.case, self.device = case, device
        self.model = build(case, device) if model is None else model
        self.ids = torch.randint(0, case.shape.vocabulary, (case.batch, case.length), device=device)  # (B, S)
        self.labels = self.ids.clone()
        if case.answers is not None:
            self.labels[:, : -selected_count(case.answers, case.length)] = IGNORED_LABEL
        proportions = {variant.proportion for variant in case.variants} - {None}
        mask = torch.ones_like(self.ids)
        self.positions: dict[float | None, Tensor] = {
            share: select_positions(mask, share) for share in sorted(proportions)
        }
        targets = target_mask(self.labels, causal=True)
        self.positions[None] = targets.nonzero()[:, 1].view(case.batch, -1)  # the same number in every row
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        # A learning rate of zero: the step does all the work and leaves the weights as they are.
        self.optimizer = None
        if case.optimizer:  # fused, as the Trainer's: no temporary copies of the weights
            self.optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True)

    def forward(self, variant: Variant) -> Tensor | ChunkedStep:
        """The loss, or what else has a `backward`."""
        selects, chunk = METHODS[variant.method].tokentune, METHODS[variant.method].sequence_chunk
        if chunk is not None:
            return ChunkedStep(inner_model(self.model), self.ids, self.labels, chunk)
        given = {"selected_positions": self.positions[variant.proportion]} if selects else {}
        with torch.autocast(self.device.split(":")[0], dtype=DTYPES["bfloat16"], enabled=self.case.autocast):
            return self.model(input_ids=self.ids, labels=self.labels, **given).loss

    def after_forward(self, loss: Tensor | ChunkedStep) -> None:
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def synchronize(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()

    # -- bytes

    def static_bytes(self) -> dict[str, int]:
        """What a step finds or leaves: weights (and buffers), gradients, optimizer states."""
        parameters, states = list(self.model.parameters()), []
        if self.optimizer is not None:
            states = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return {
            "weights_bytes": storage_bytes([*parameters, *self.model.buffers()]),
            "gradients_bytes": storage_bytes([parameter for parameter in parameters if parameter.requires_grad]),
            "optimizer_bytes": storage_bytes(states),
        }

    def saved_bytes(self, variant: Variant) -> int:
        """What autograd, or a cache, keeps for the backward pass, each storage once, parameters excluded."""
        switch(self.model, variant.method)
        with SavedForBackward(self.model) as saved:
            loss = self.forward(variant)
        return loss.kept_bytes if isinstance(loss, ChunkedStep) else saved.bytes

    def step_memory(self, variant: Variant) -> dict[str, int]:
        """`held_bytes` are held more after the forward pass than before it; `peak_bytes` is the step's peak, weights
        and optimizer included. On a GPU also the peak that the allocator reserved."""
        switch(self.model, variant.method)
        self.clear()
        if self.device.startswith("cuda"):
            return self._cuda_step_memory(variant)
        losses: list[Tensor | ChunkedStep] = []
        held, forward_peak = allocations(lambda: losses.append(self.forward(variant)))
        _, backward_peak = allocations(lambda: self.after_forward(losses.pop()))
        static = self.static_bytes()
        self.clear()
        before = static["weights_bytes"] + static["optimizer_bytes"]
        return {"held_bytes": held, "peak_bytes": before + max(forward_peak, held + backward_peak)}

    def _cuda_step_memory(self, variant: Variant) -> dict[str, int]:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = self.forward(variant)
        held = torch.cuda.memory_allocated() - before
        self.after_forward(loss)
        del loss
        self.clear()
        peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"held_bytes": held, "peak_bytes": peaks[0], "peak_reserved_bytes": peaks[1]}

    # -- seconds

    def timed_step(self, variant: Variant) -> tuple[float, float]:
        """Seconds of a whole step, and of its forward pass alone."""
        switch(self.model, variant.method)
        self.synchronize()
        start = time.perf_counter()
        loss = self.forward(variant)
        self.synchronize()
        middle = time.perf_counter()
        self.after_forward(loss)
        self.synchronize()
        end = time.perf_counter()
        self.clear()
        return end - start, middle - start

    def dequantisation(self, variant: Variant) -> dict[str, float]:
        """Seconds of one profiled step, and of the operators (on a GPU: kernels) in it that turn 4-bit weights back.

        bitsandbytes runs these alone, in front of an ordinary matrix product, on CPUs and for more than 1,536 rows on
        GPUs. Its kernels for fewer rows do both at once; their time is counted as `fused_seconds`.
        """
        switch(self.model, variant.method)
        cuda = self.device.startswith("cuda")
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        self.synchronize()
        with profile(activities=activities) as profiler:
            start = time.perf_counter()
            self.after_forward(self.forward(variant))
            self.synchronize()
            whole = time.perf_counter() - start
        self.clear()
        kind = DeviceType.CUDA if cuda else DeviceType.CPU
        events = [event for event in profiler.events() if event.device_type == kind]
        apart = [e for e in events if _dequantises(e) and not (e.cpu_parent and _dequantises(e.cpu_parent))]
        fused = [e for e in events if cuda and "gemm_4bit" in e.name.lower()]
        seconds = {}
        for name, chosen in (("dequantisation_seconds", apart), ("fused_seconds", fused)):
            microseconds = sum(event.device_time_total if cuda else event.cpu_time_total for event in chosen)
            seconds[name] = 1e-6 * microseconds
        return {"step_seconds": whole, **seconds, "calls": len(apart)}


def _dequantises(event: Any) -> bool:
    return "dequantize" in event.name.lower()


def storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the tensors' storages, each once; a 4-bit weight's scales, which belong to no module, included."""
    sizes = {}
    for tensor in tensors:
        state = getattr(tensor, "quant_state", None)
        parts = [] if state is None else [state.absmax, *([state.state2.absmax] if state.nested else [])]
        for part in (tensor, *parts):
            sizes[part.device, part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    return sum(sizes.values())


def allocations(work: Callable[[], Any]) -> tuple[int, int]:
    """(bytes that `work` allocated and left allocated, the highest that this was on the way), of CPU tensors.

    From the allocator's own events, which the profiler records: exact, unlike the process's resident set.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [(e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        held += size
        peak = max(peak, held)
    return held, peak


@contextmanager
def out_of_memory_noted(row: dict[str, Any]) -> Iterator[None]:
    """A step that does not fit leaves `error` in its row instead of ending the run."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        row["error"] = "out of memory"


def measure(bench: Bench) -> list[dict[str, Any]]:
    """One row per variant: bytes, then seconds of every round. A variant that did not fit has `error` instead."""
    case = bench.case
    rows = {variant: case.settings(variant) for variant in case.variants}
    for variant, row in rows.items():
        with out_of_memory_noted(row):
            if case.rounds > 0:
                bench.timed_step(variant)  # warm-up: allocator, thread pools, optimizer states
                row |= bench.step_memory(variant)
            row["saved_bytes"] = bench.saved_bytes(variant)
            if case.train == "qlora" and case.rounds > 0:
                row["dequantisation"] = bench.dequantisation(variant)
            row |= bench.static_bytes() | {"seconds": [], "forward_seconds": []}
        if "error" in row:
            bench.clear()
            if bench.optimizer is not None:
                bench.optimizer.state.clear()  # what the failed step made of it
            gc.collect()
            if bench.device.startswith("cuda"):
                torch.cuda.empty_cache()
    fitting = [variant for variant, row in rows.items() if "error" not in row]
    for _ in range(case.rounds):
        for variant in fitting:
            whole, forward = bench.timed_step(variant)
            rows[variant]["seconds"].append(round(whole, 6))
            rows[variant]["forward_seconds"].append(round(forward, 6))
    return list(rows.values())
