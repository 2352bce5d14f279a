"""What measured rows say: ratios with their interval, exponents of growth, bytes per added layer, bounds and claims."""

import json
import math
import os
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from tokentune.environment import cpu_name, library_versions
from tokentune.errors import UserError

SCHEMA_VERSION = 3
BASES = ("full", "checkpointing", "full_chunked", "checkpointing_chunked")  # what other methods are compared with
Row = dict[str, Any]


def machine(device: str) -> dict[str, Any]:
    """The device and the versions that figures depend on."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else cpu_name()
    threads = torch.get_num_threads()
    return {"device": name, "cores": os.cpu_count(), "threads": threads, "versions": library_versions()}


# ------------------------------------------------------------------------------------------------------------- ratios


def median_with_interval(values: list[float]) -> list[float]:
    """[low, median, high]: order statistics that hold the population's median with at least 95 % confidence.

    Exact, from the binomial distribution. Below six values even the lowest and the highest do not reach 95 %: they are
    given all the same (five: 93.75 %, three: 75 %).
    """
    ordered, n = sorted(values), len(values)
    outside, rank = 0.0, 0  # the chance that the median lies below ordered[rank] or above its mirror image
    while rank < (n - 1) // 2:
        outside += 2 * math.comb(n, rank) / 2**n
        if outside + 2 * math.comb(n, rank + 1) / 2**n > 0.05:
            break
        rank += 1
    return [ordered[rank], statistics.median(ordered), ordered[n - 1 - rank]]


def add_ratios(rows: list[Row]) -> None:
    """To each of a case's rows: speed, and time and bytes against the `BASES` of the same case."""
    bases = {row["method"]: row for row in rows if row["method"] in BASES and "error" not in row}
    for row in rows:
        if "error" in row:
            continue
        if row["seconds"]:
            row["tokens_per_second"] = row["batch"] * row["length"] / statistics.median(row["seconds"])
        for name, base in bases.items():
            row[f"bytes_ratio_to_{name}"] = row["saved_bytes"] / base["saved_bytes"]
            if "peak_bytes" in row:
                row[f"peak_ratio_to_{name}"] = row["peak_bytes"] / base["peak_bytes"]
            if row["seconds"]:
                for kind, key in (("time", "seconds"), ("forward_time", "forward_seconds")):
                    pairs = zip(row[key], base[key], strict=True)
                    row[f"{kind}_ratio_to_{name}"] = median_with_interval([one / other for one, other in pairs])


# ------------------------------------------------------------------------------------------------------------- growth


def fit_power(points: list[tuple[float, float]]) -> dict[str, float]:
    """Least squares of log y = exponent * log x + constant, with the share of the variance that it explains."""
    xs, ys = ([math.log(value) for value in column] for column in zip(*points, strict=True))
    slope, constant = statistics.linear_regression(xs, ys)
    spread = sum((y - statistics.fmean(ys)) ** 2 for y in ys)
    missed = sum((y - slope * x - constant) ** 2 for x, y in zip(xs, ys, strict=True))
    return {"exponent": slope, "r_squared": 1 - missed / spread if spread > 0 else 1.0}


GROWTH = {"length": "length", "depth": "layers", "long": "length", "gpu_length": "length"}  # suite -> what grows in it


def growth(rows: list[Row]) -> list[dict[str, Any]]:
    """Exponents of bytes and time against sequence length and against layers, per method."""
    fits = []
    for suite, x in GROWTH.items():
        for method, chosen in grouped((r for r in rows if r["suite"] == suite and "error" not in r), "method"):
            if len({row[x] for row in chosen}) < 3:
                continue
            quantities = {
                "saved_bytes": lambda row: row["saved_bytes"],
                "step_peak_bytes": lambda row: row["peak_bytes"] - row["weights_bytes"] - row["optimizer_bytes"],
                "seconds": lambda row: statistics.median(row["seconds"]),
            }
            for quantity, value in quantities.items():
                fit = fit_power([(row[x], value(row)) for row in chosen])
                over = [min(row[x] for row in chosen), max(row[x] for row in chosen)]
                fits.append({"suite": suite, "method": method, "quantity": quantity, "against": x, "over": over} | fit)
    return fits


def per_added_layer(rows: list[Row]) -> list[dict[str, Any]]:
    """Bytes that each layer adds between the shallowest and the deepest model, and their ratio to checkpointing's."""
    result = []
    of_layers = [row for row in rows if row["suite"] == "layers" and "error" not in row]
    for (train, heads), chosen in grouped(of_layers, "train", "key_value_heads"):
        added = {}
        for method, pair in grouped(chosen, "method"):
            shallow, *_, deep = sorted(pair, key=lambda row: row["layers"]) if len(pair) > 1 else (None, None)
            if deep is not None:
                more = deep["layers"] - shallow["layers"]
                added[method] = (deep["saved_bytes"] - shallow["saved_bytes"]) / more
        base = added.get("checkpointing_chunked")  # the loss adds nothing per layer: checkpointing alone is the same
        for method, size in added.items():
            result.append(
                {
                    "train": train,
                    "key_value_heads": heads,
                    "method": method,
                    "bytes_per_added_layer": size,
                    "ratio_to_checkpointing_chunked": size / base if base else None,
                }
            )
    return result


def grouped(rows: Iterable[Row], *keys: str) -> list[tuple[Any, list[Row]]]:
    """Rows by the values of these keys, in order of appearance; the group's name is one value, or a tuple of them."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        name = tuple(row[key] for key in keys)
        groups.setdefault(name if len(keys) > 1 else name[0], []).append(row)
    return list(groups.items())


# ---------------------------------------------------------------------------------------------------- bounds and claims

# What the method is held to: (what, rows that it is about, figure, bound for all weights, bound for LoRA).
BOUNDS = (
    ("time / plain", {"suite": "table", "method": "tokentune", "dtype": "float32"}, "time_ratio_to_full", 0.52, 0.61),
    ("time / plain", {"suite": "table", "method": "tokentune", "dtype": "bfloat16"}, "time_ratio_to_full", 0.56, 0.64),
    ("bytes / plain", {"suite": "table", "method": "tokentune"}, "bytes_ratio_to_full", 0.38, 0.38),
    (
        "checkpointed: time / checkpointing, chunked loss",
        {"suite": "table", "method": "tokentune_checkpointing", "dtype": "float32"},
        "time_ratio_to_checkpointing_chunked",
        0.48,
        0.54,
    ),
    (
        "checkpointed: bytes / checkpointing, chunked loss, 6 layers",
        {"suite": "layers", "method": "tokentune_checkpointing", "layers": 6, "key_value_heads": 4},
        "bytes_ratio_to_checkpointing_chunked",
        0.52,
        0.55,
    ),
    (
        "checkpointed: bytes / checkpointing, chunked loss, 6 layers",
        {"suite": "layers", "method": "tokentune_checkpointing", "layers": 6, "key_value_heads": 16},
        "bytes_ratio_to_checkpointing_chunked",
        0.90,
        0.90,
    ),
    (
        "lowest: bytes / checkpointing, chunked loss, 24 layers",
        {"suite": "lowest", "method": "tokentune_segments", "key_value_heads": 4},
        "bytes_ratio_to_checkpointing_chunked",
        0.45,
        0.45,
    ),
    (
        "lowest: time / checkpointing, chunked loss, 24 layers",
        {"suite": "lowest", "method": "tokentune_segments", "key_value_heads": 4},
        "time_ratio_to_checkpointing_chunked",
        0.75,
        0.75,
    ),
    (
        "answers of 5 %: time / plain",
        {"suite": "answers", "method": "tokentune", "layers": 6},
        "time_ratio_to_full",
        0.33,
        0.45,
    ),
    ("answers of 5 %: bytes / plain", {"suite": "answers", "method": "tokentune"}, "bytes_ratio_to_full", 0.08, 0.08),
    (
        "answers of 5 %, checkpointed: time / checkpointing, chunked loss, 6 layers",
        {"suite": "answers", "method": "tokentune_checkpointing", "layers": 6},
        "time_ratio_to_checkpointing_chunked",
        0.34,
        0.36,
    ),
    (
        "answers of 5 %, checkpointed: bytes / checkpointing, chunked loss, 6 layers",
        {"suite": "answers", "method": "tokentune_checkpointing", "layers": 6},
        "bytes_ratio_to_checkpointing_chunked",
        0.35,
        0.35,
    ),
    (
        "answers of 5 %, lowest: bytes / checkpointing, chunked loss, 24 layers",
        {"suite": "answers", "method": "tokentune_segments", "layers": 24},
        "bytes_ratio_to_checkpointing_chunked",
        0.20,
        0.20,
    ),
    (
        "answers of 5 %, lowest: time / checkpointing, chunked loss, 24 layers",
        {"suite": "answers", "method": "tokentune_segments", "layers": 24},
        "time_ratio_to_checkpointing_chunked",
        0.60,
        0.75,
    ),
    ("all tokens: time / plain", {"suite": "overhead", "method": "tokentune"}, "time_ratio_to_full", 1.03, 1.03),
    ("all tokens: bytes / plain", {"suite": "overhead", "method": "tokentune"}, "bytes_ratio_to_full", 1.001, 1.001),
)
PER_ADDED_LAYER = {4: 0.66, 16: 1.02}  # key-value heads -> bound, between 6 and 32 layers
LABELS = ("train", "key_value_heads", "dtype")


def bounds(rows: list[Row], added: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each bound beside what was measured. A time's bound holds when its interval reaches it."""
    result = []
    for what, about, figure, full, lora in BOUNDS:
        for row in rows:
            if figure in row and all(row[key] == value for key, value in about.items()):
                bound = {"full": full, "lora": lora}.get(row["train"])
                if bound is not None:
                    result.append(compared(what, row, row[figure], bound))
    for entry in added:
        if entry["method"] == "tokentune_checkpointing" and entry["ratio_to_checkpointing_chunked"] is not None:
            row = entry | {"dtype": "float32"}
            if row["key_value_heads"] in PER_ADDED_LAYER:
                bound = PER_ADDED_LAYER[row["key_value_heads"]]
                what = "checkpointed: bytes per added layer / checkpointing"
                result.append(compared(what, row, row["ratio_to_checkpointing_chunked"], bound))
    return result


def compared(what: str, row: Row, measured: float | list[float], bound: float) -> dict[str, Any]:
    low, middle, _ = measured if isinstance(measured, list) else [measured] * 3
    entry = {"what": what, **{key: row[key] for key in LABELS}, "bound": bound, "measured": middle}
    if isinstance(measured, list):
        entry["interval"] = [measured[0], measured[2]]
    return entry | {"holds": low <= bound}


# The paper's statements on Llama-2-7B: peak memory as a share of full fine-tuning's.
CLAIMS = (
    ("TokenTune: up to 28 % less than full fine-tuning", 0.72, "full", "tokentune"),
    ("QLoRA: 37 % of full fine-tuning", 0.37, "qlora", "full"),
    ("QLoRA + TokenTune: 21 % of full fine-tuning", 0.21, "qlora", "tokentune"),
)


def claims(rows: list[Row]) -> list[dict[str, Any]]:
    """The paper's claims beside what was measured, at one sequence and at four."""
    result = []
    for suite in ("gpu_7b", "gpu_batch"):
        peaks = {(r["train"], r["method"]): r["peak_bytes"] for r in rows if r["suite"] == suite and "error" not in r}
        for claim, paper, train, method in CLAIMS:
            if ("full", "full") in peaks and (train, method) in peaks:
                measured = peaks[train, method] / peaks["full", "full"]
                result.append({"claim": claim, "suite": suite, "paper": paper, "measured": measured})
    return result


# ------------------------------------------------------------------------------------------------------------- the file


def read_rows(path: Path, here: dict[str, Any], seed: int) -> list[Row]:
    """The rows that an earlier call left, to go on from.

    Raises:
        UserError: they are another machine's, another seed's or another format's.
    """
    if not path.exists():
        return []
    report = json.loads(path.read_text(encoding="utf-8"))
    fresh = "Give --fresh to measure everything anew, or another --output."
    if report.get("schema_version") != SCHEMA_VERSION:
        raise UserError(f"--output {path}: was written by another version of this script. {fresh}")
    changed = [name for name, value in here.items() if report["machine"].get(name) != value]
    if changed:
        raise UserError(f"--output {path}: was measured on another machine ({', '.join(changed)}). {fresh}")
    if report["seed"] != seed:
        raise UserError(f"--output {path}: was measured with --seed {report['seed']}. {fresh}")
    return report["rows"]


def write(path: Path, here: dict[str, Any], seed: int, rows: list[Row]) -> None:
    """Replaces the file as a whole: a call that is cut short leaves the last complete one."""
    added = per_added_layer(rows)
    report = {
        "schema_version": SCHEMA_VERSION,
        "seed": seed,
        "machine": here,
        "bounds": bounds(rows, added),
        "claims": claims(rows),
        "growth": growth(rows),
        "per_added_layer": added,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
