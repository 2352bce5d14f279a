"""Which model families are served, how exactly, and what they save: the list in docs/measurements.md.

    python scripts/bench/families.py --output scripts/bench/results/families.json

The families and the way they are measured are those of `tests/core/test_families.py`: tiny random models in float64
against the definition of the method, and bytes saved for backward with 30 % of 2 x 64 tokens selected, in float32.
"""

import argparse
import json
import platform
import sys
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from families import FAMILIES
from family_check import BATCH, LENGTH, SELECTED, TOLERANCE, measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    output = parser.parse_args().output
    rows = []
    for family in FAMILIES:
        rows.append(measure(family))
        print(json.dumps(rows[-1]), flush=True)
    report = {
        "schema_version": 1,
        "setting": {
            "exactness": f"{BATCH} x {LENGTH} tokens, {SELECTED} selected, left and right padding, float64",
            "required_difference": TOLERANCE,
            "bytes": "2 x 64 tokens or image patches, 30 % selected, float32",
            "seed": 0,
        },
        "machine": {
            "device": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "rows": rows,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written: {output}")


if __name__ == "__main__":
    main()
