"""Time and memory of one training step: plain, with gradient checkpointing, and with TokenTune, side by side.

    python scripts/bench/step.py --output step.json --train full lora --proportions 0.1 0.3 --lengths 512 2048
    python scripts/bench/step.py --output scripts/bench/results/step_cpu.json --suites table lowest

A Llama with random weights takes steps on random tokens, the methods in turn within every round, so that whatever else
the machine does hits all alike. Time ratios are medians over rounds of the ratio within a round, with the interval that
holds the median with 95 % confidence. Bytes are exact: `saved_bytes` is what autograd keeps for the backward pass, each
storage once, parameters excluded; `held_bytes` what the allocator holds more after the forward pass than before it;
`peak_bytes` its peak during the step, weights included. A step is forward and backward pass, and AdamW in the suites
for GPUs.

The file is written after every model. Called again with the same --output, it goes on where it stopped; what did not
fit in memory is noted as such. `--suites` names prepared sets (`cpu.sh` and `gpu.sh` run them all); without it, every
combination of the other flags is measured.
"""

import argparse
import gc
import itertools
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from steps import report
from steps.cases import DTYPES, METHODS, TRAIN, Case, Shape, shrunk, variants
from steps.measure import Bench, measure
from steps.suites import SUITES, cases_of

from tokentune.core.saved_tensors.saved_bytes import gib
from tokentune.errors import UserError


def main() -> None:
    options = parse()
    try:
        run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write, or to go on with")
    parser.add_argument("--suites", nargs="+", choices=["cpu", "gpu", *SUITES], help="prepared sets of models")
    parser.add_argument("--small", action="store_true", help="tiny models and two rounds, to try the code path out")
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    parser.add_argument("--minutes", type=float, help="start no further model after this time (call again to go on)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    own = parser.add_argument_group("without --suites: every combination of these")
    own.add_argument("--train", nargs="+", choices=TRAIN, default=["full", "lora"])
    own.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS)[:6])
    own.add_argument("--proportions", type=float, nargs="+", default=[0.3], help="selected tokens, of the sequence")
    own.add_argument("--lengths", type=int, nargs="+", default=[512], help="tokens per sequence")
    own.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"], help="of the weights")
    own.add_argument("--layers", type=int, nargs="+", default=[6])
    own.add_argument("--key_value_heads", type=int, nargs="+", default=[16, 4])
    own.add_argument("--heads", type=int, default=16)
    own.add_argument("--hidden_size", type=int, default=1024)
    own.add_argument("--intermediate_size", type=int, default=2816)
    own.add_argument("--vocabulary", type=int, default=32000)
    own.add_argument("--batch", type=int, default=2, help="sequences per step")
    own.add_argument("--rounds", type=int, default=9, help="timed steps per method; 0: bytes alone")
    own.add_argument("--optimizer", action="store_true", help="AdamW is part of the step")
    own.add_argument("--autocast", action="store_true", help="forward passes under bfloat16 autocast")
    return parser.parse_args()


def run(options: argparse.Namespace) -> None:
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device")
    cases = cases_of(options.suites) if options.suites else combinations(options)
    if options.small:
        cases = [shrunk(case) for case in cases]
    here = report.machine(options.device)
    rows = [] if options.fresh else report.read_rows(options.output, here, options.seed)
    left = [case for case in cases if not is_measured(case, rows)]
    print(f"{len(cases) - len(left)} of {len(cases)} models measured already", flush=True)
    started, model, model_key = time.perf_counter(), None, None
    for done, case in enumerate(left):
        if options.minutes is not None and time.perf_counter() - started > 60 * options.minutes:
            print(f"{len(left) - done} models left after {options.minutes:g} minutes: call again to go on")
            return
        begun = time.perf_counter()
        if model_key != case.model_key():
            model = None  # the old one's memory first
            free(options.device)
        rows_of_case, model = measured(case, options, model)
        model_key = case.model_key()
        report.add_ratios(rows_of_case)
        settings = [case.settings(variant) for variant in case.variants]
        rows = [row for row in rows if not any(matches(row, setting) for setting in settings)] + rows_of_case
        report.write(options.output, here, options.seed, rows)
        show(rows_of_case, time.perf_counter() - begun)
    print(f"written: {options.output}")


def combinations(options: argparse.Namespace) -> list[Case]:
    """The cases that the flags ask for, one per model and batch."""
    axes = (options.train, options.dtypes, options.key_value_heads, options.layers, options.lengths)
    cases = []
    for train, dtype, heads, layers, length in itertools.product(*axes):
        if options.heads % heads:
            raise UserError(f"--key_value_heads {heads}: --heads {options.heads} is no multiple of it")
        sizes = options.hidden_size, options.intermediate_size, layers, options.heads, heads, options.vocabulary
        cases.append(
            Case(
                "custom",
                Shape(f"llama-{options.hidden_size}", *sizes),
                variants(tuple(options.methods), tuple(options.proportions)),
                train=train,
                dtype=dtype,
                batch=options.batch,
                length=length,
                rounds=options.rounds,
                optimizer=options.optimizer,
                autocast=options.autocast,
            )
        )
    return cases


def is_measured(case: Case, rows: list[report.Row]) -> bool:
    return all(any(matches(row, case.settings(variant)) for row in rows) for variant in case.variants)


def matches(row: report.Row, settings: dict) -> bool:
    return all(row.get(key) == value for key, value in settings.items())


def measured(case: Case, options: argparse.Namespace, model: torch.nn.Module | None) -> tuple[list, object]:
    """The case's rows, and its model for a next case that has the same."""
    try:
        bench = Bench(case, options.device, options.seed, model)
    except torch.OutOfMemoryError:
        return [case.settings(variant) | {"error": "out of memory"} for variant in case.variants], None
    return measure(bench), bench.model


def free(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def show(rows: list[report.Row], seconds: float) -> None:
    """One line per row."""
    first = rows[0]
    print(
        f"{first['suite']}: {first['name']}, {first['layers']} layers, {first['key_value_heads']} key-value heads, "
        f"{first['train']}, {first['dtype']}, {first['batch']} x {first['length']} tokens ({seconds:.0f} s)"
    )
    for row in rows:
        name = row["method"] + ("" if row["proportion"] is None else f" {row['proportion']:g}")
        if "error" in row:
            print(f"  {name:28s} {row['error']}", flush=True)
            continue
        line = f"  {name:28s} saved {gib(row['saved_bytes']):>10s}"
        if "bytes_ratio_to_full" in row:
            line += f" ({row['bytes_ratio_to_full']:.3f} of plain)"
        if row["seconds"]:
            line += f"  peak {gib(row['peak_bytes']):>10s}  step {statistics.median(row['seconds']):.3f} s"
        for base in ("full", "checkpointing_chunked"):
            if f"time_ratio_to_{base}" in row:
                low, middle, high = row[f"time_ratio_to_{base}"]
                line += f"  {middle:.3f} of {base} ({low:.3f} to {high:.3f})"
        print(line, flush=True)


if __name__ == "__main__":
    main()
