"""How good the selective gradient is, for every strategy and correction, on a small pretrained model and real rows.

    python scripts/bench/gradient_quality.py --output scripts/bench/results/gradient_quality.json
    python scripts/bench/gradient_quality.py --output /tmp/quality.json --parts random --rows 8 --draws 4

Runs `tokentune/diagnose.py` once for each part below, on the same rows, and puts the results into one file: rewritten
after each part, so that what is there is whole; with `--keep` the parts that it holds already are not run again. Every
result says which part it is from, and what its scores do ("draw": proportional, with weights, or top, without). Of
layers and kinds of module the cosine of one draw and the bias are kept; numbers have five digits. All weights are
trained, in float32; model and data stand beside the project.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from steps.report import machine

from tokentune import diagnose
from tokentune.cli.command import run_command
from tokentune.errors import UserError
from tokentune.training.checkpoints.saving import write_whole

ROOT = Path(__file__).resolve().parents[2]
SCHEMA_VERSION = 1
SCORED = ("gradient", "loss", "attention", "tokenseek")
DRAWN = ("supervised", "stratified", "contiguous")


def all_parts() -> dict[str, tuple[str, ...]]:
    """What is measured, the most telling first: flags of diagnose.py by a name."""
    parts = {}
    for proportion in ("0.3", "0.5", "0.1", "0.2", "0.7"):
        at = ("--proportions", proportion)
        parts[f"random {proportion}"] = ("--selections", "random", "--corrections", "0", "1", *at)
        parts[f"drawn {proportion}"] = ("--selections", *DRAWN, *at)
        parts[f"scores {proportion}"] = ("--selections", *SCORED, *at)
        parts[f"top {proportion}"] = ("--selections", *SCORED, "--selection_draw", "top", *at)
        parts[f"half corrected {proportion}"] = ("--selections", "random", "--corrections", "0.5", *at)
        parts[f"LoRA {proportion}"] = ("--lora", "--selections", "random", "--corrections", "0", "1", *at)
    return parts


PARTS = all_parts()


def main() -> None:
    options = parse()
    found = read(options.output) if options.keep else None
    for name in options.parts:
        if found is not None and name in found["parts"]:
            continue
        started = time.perf_counter()
        report = diagnosed(options, PARTS[name])
        seconds = round(time.perf_counter() - started, 1)
        found = found or machine("cpu") | head_of(options, report)
        check_same(found, report, options.output)
        found["parts"][name] = {"flags": list(PARTS[name]), "seconds": seconds}
        found["results"] += [kept(name, result, report["settings"]["selection_draw"]) for result in report["results"]]
        write_whole(options.output, as_text(found))
        print(f"{name}: {seconds:.0f} s", file=sys.stderr)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--keep", action="store_true", help="add to what the file holds")
    parser.add_argument("--model", type=Path, default=ROOT.parent / "shared" / "models" / "llama-tiny")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "alpaca_en.train.jsonl")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--max_length", type=int, default=200, help="tokens per row")
    parser.add_argument("--draws", type=int, default=24)
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


def diagnosed(options: argparse.Namespace, flags: tuple[str, ...]) -> dict[str, Any]:
    """The report of diagnose.py."""
    for path in (options.model, options.data):
        if not path.exists():
            raise UserError(f"{path}: is not there; give --model and --data")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "diagnosis.json"
        given = {"--model_name_or_path": options.model, "--dataset_name_or_path": options.data, "--output": output}
        given |= {f"--{name}": getattr(options, name) for name in ("rows", "max_length", "draws", "seed")}
        diagnose.main([*(str(word) for pair in given.items() for word in pair), *flags])
        return json.loads(output.read_text(encoding="utf-8"))


def head_of(options: argparse.Namespace, report: dict[str, Any]) -> dict[str, Any]:
    """What all parts have in common."""
    asked = {"model": options.model.name, "data": options.data.name}
    asked |= {name: getattr(options, name) for name in ("rows", "max_length", "draws", "seed")}
    return {"schema_version": SCHEMA_VERSION, "asked": asked, "data": report["data"], "parts": {}, "results": []}


def read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def check_same(found: dict[str, Any], report: dict[str, Any], path: Path) -> None:
    if found["data"] != report["data"] or any(
        result["draws"] != found["asked"]["draws"] for result in report["results"]
    ):
        raise UserError(f"--keep: {path} was measured on other rows, or with other draws; leave --keep out")


def kept(part: str, result: dict[str, Any], draw: str) -> dict[str, Any]:
    """A result as the file has it."""

    def cut(figures: dict[str, Any], name: str) -> dict[str, Any]:
        return {name: figures[name], "cosine": figures["cosine"]["mean"], "bias": figures["mean_of_draws"]["bias"]}

    scored = {"draw": draw if result["strategy"] in SCORED else None}
    parts = {f"by_{name}": [cut(figures, name) for figures in result[f"by_{name}"]] for name in ("layer", "kind")}
    return {"part": part} | scored | result | parts


def as_text(found: dict[str, Any]) -> str:
    """JSON with a line for each result."""
    head = {name: value for name, value in found.items() if name != "results"}
    lines = ",\n  ".join(json.dumps(rounded(result)) for result in found["results"])
    return json.dumps(head, indent=1).removesuffix("\n}") + f',\n "results": [\n  {lines}\n ]\n}}\n'


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    run_command(main)
