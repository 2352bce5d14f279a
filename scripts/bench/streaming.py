"""Memory over time of a run that streams data larger than a disk: 20 GB of rows, made by a generator when asked for.

    python scripts/bench/streaming.py --model ../shared/models/llama-tiny --output scripts/bench/results/streaming.json

`finetune.py --streaming` itself, in this process; only the hub's answer is a stand-in, an endless iterable data set of
seeded random rows. Resident memory is looked at ten times a second and noted as the highest value of every
tenth of the run. The first tenth fills the shuffle buffer; after it the memory must not grow.
"""

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from datasets import IterableDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from steps.report import machine

from tokentune import finetune
from tokentune.data.formats import records

TOTAL_BYTES = 20 * 10**9
WORDS_PER_ANSWER = 400


class RowsMade:
    """An iterable data set that counts what was asked of it."""

    def __init__(self, seed: int) -> None:
        self.seed, self.bytes, self.rows = seed, 0, 0

    def __call__(self) -> Iterator[dict[str, str]]:
        drawn = random.Random(self.seed)
        words = ["".join(drawn.choices("aeioulnrst", k=drawn.randint(2, 8))) for _ in range(5000)]
        made = 0
        while made < TOTAL_BYTES:
            row = {"prompt": f"Say {self.rows}. ", "completion": " ".join(drawn.choices(words, k=WORDS_PER_ANSWER))}
            made += sum(map(len, row.values()))
            self.rows, self.bytes = self.rows + 1, self.bytes + sum(map(len, row.values()))
            yield row


class ResidentMemory:
    """(seconds since the start, bytes) of this process, sampled in a thread of its own."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, int]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "ResidentMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        process, started = psutil.Process(), time.perf_counter()
        while not self._ended.wait(0.1):
            self.samples.append((time.perf_counter() - started, process.memory_info().rss))

    def highest_of_tenths(self) -> list[int]:
        length = self.samples[-1][0]
        tenths = [[size for at, size in self.samples if int(10 * at / length) in (n, n + (n == 9))] for n in range(10)]
        return [max(tenth) for tenth in tenths]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--model", required=True, help="folder of a small causal language model")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of 32 rows of 256 tokens")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    made = RowsMade(options.seed)
    records.load_dataset = lambda name, split, streaming: IterableDataset.from_generator(made)
    words = (
        "--dataset_name_or_path generated/20-gb --streaming --lora --tokentune --prefix_length 0.1 --max_length 256 "
    )
    words += "--global_batch_size 32 --warmup_steps 1 --report_to none --logging_steps 50 "
    words += f"--model_name_or_path {options.model} --max_steps {options.steps} --seed {options.seed}"
    with tempfile.TemporaryDirectory() as folder, ResidentMemory() as memory:
        finetune.main([*words.split(), "--model_save_path", folder])
        (summary_file,) = Path(folder).glob("*/training_summary.json")
        summary = json.loads(summary_file.read_text(encoding="utf-8"))
    tenths = memory.highest_of_tenths()
    report = machine("cpu") | {
        "seed": options.seed,
        "data_bytes": TOTAL_BYTES,
        "read_bytes": made.bytes,
        "read_rows": made.rows,
        "optimizer_steps": summary["optimizer_steps"],
        "processed_tokens": summary["tokens"]["processed"],
        "seconds": round(memory.samples[-1][0], 1),
        "highest_resident_bytes_of_each_tenth": tenths,
        "growth_after_half": tenths[-1] / tenths[4] - 1,
    }
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
