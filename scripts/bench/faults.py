"""Runs that are killed at random moments, the writing of checkpoints included, and resumed until they are finished.

    python scripts/bench/faults.py --output scripts/bench/results/faults.json
    python scripts/bench/faults.py --output /tmp/faults.json --kills 3 --methods lora

`tokentune/finetune.py` as users run it, in a process of its own, on a tiny Llama and rows that are made here; each
method (adapters, all weights with data loader workers, 4-bit base) runs once in peace and then with a SIGKILL again and
again. Every second kill waits for a checkpoint that is being written, the others for a random moment of training. A run
is lost when it cannot go on, or when its last weights differ in a single bit from those of the run in peace. Most of
the time goes into imports, some seconds for each start.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from steps.report import machine

PROJECT = Path(__file__).resolve().parents[2]
METHODS = {
    "lora": "--lora --tokentune --prefix_length 0.3",
    "full": "--tokentune --prefix_length 0.3 --num_workers 2",
    "qlora": "--qlora --tokentune --prefix_length 0.3 --bf16",
}
COMMON = (
    "--global_batch_size 6 --gradient_accumulation_steps 3 --num_epochs 12 --warmup_steps 10 --learning_rate 2e-3 "
    "--max_length 128 --report_to none --logging_steps 7 --save_steps 2 --save_total_limit 2 --eval_steps 20 "
    "--data_cache none --skip_verification --skip_memory_probe"
)
ROWS = 64  # 11 steps in an epoch, the last of them smaller


def main() -> None:
    options = parse()
    generator = random.Random(options.seed)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        workplace = Workplace(Path(folder))
        for number, name in enumerate(options.methods):
            share = len(range(number, options.kills, len(options.methods)))
            results.append({"method": name} | try_method(workplace, name, share, generator))
            print(results[-1], file=sys.stderr)
    killed = [kill for result in results for kill in result["killed"]]
    report = machine("cpu") | {
        "seed": options.seed,
        "settings": COMMON,
        "kills": len(killed),
        "kills_during": dict(Counter(kill["during"] for kill in killed)),
        "runs": sum(result["runs"] for result in results),
        "runs_lost": sum(result["runs"] - result["equal"] for result in results),
        "methods": results,
    }
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{report['kills']} kills {report['kills_during']}, {report['runs']} runs, {report['runs_lost']} lost")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


@dataclass
class Workplace:
    """A folder with a model and data, and the command that trains on them."""

    folder: Path

    def __post_init__(self) -> None:
        make_model(self.folder / "tiny")
        make_data(self.folder / "rows.jsonl")

    def start(self, method: str, models_folder: Path) -> subprocess.Popen:
        """The command, for the first time or once more: the same words do both."""
        data = self.folder / "rows.jsonl"
        names = f"--model_name_or_path {self.folder / 'tiny'} --dataset_name_or_path {data} "
        names += f"--eval_dataset_name_or_path {data} --model_save_path {models_folder} --resume_from_checkpoint last"
        words = f"{PROJECT / 'tokentune' / 'finetune.py'} {names} {COMMON} {METHODS[method]}".split()
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        return subprocess.Popen(
            [sys.executable, "-u", *words],
            stdout=subprocess.PIPE,
            stderr=(self.folder / "stderr.txt").open("w"),
            text=True,
            env={**os.environ, **quiet},
        )

    def finish(self, method: str, models_folder: Path) -> float:
        """Lets it run to its end. Returns the seconds since its first line of progress."""
        process = self.start(method, models_folder)
        process.stdout.readline()
        began = time.perf_counter()
        process.communicate()
        if process.returncode != 0:
            raise SystemExit((self.folder / "stderr.txt").read_text(encoding="utf-8"))
        return time.perf_counter() - began


def try_method(workplace: Workplace, method: str, kills: int, generator: random.Random) -> dict[str, Any]:
    """`kills` kills over as many runs as it takes: how each was hit, and how many runs ended as they should."""
    peaceful = workplace.folder / f"{method}-in-peace"
    seconds = workplace.finish(method, peaceful)
    expected = digest(peaceful)
    killed: list[dict[str, Any]] = []
    runs = equal = 0
    while len(killed) < kills:
        models_folder = workplace.folder / f"{method}-{runs}"
        while len(killed) < kills and not is_finished(models_folder):
            kill = kill_once(workplace, method, models_folder, seconds / 4, len(killed) % 2 == 1, generator)
            if kill is not None:
                killed.append({"run": runs} | kill)
                print(method, killed[-1], file=sys.stderr)
        if not is_finished(models_folder):
            workplace.finish(method, models_folder)
        runs, equal = runs + 1, equal + (digest(models_folder) == expected)
        shutil.rmtree(models_folder)
    return {"runs": runs, "equal": equal, "seconds_in_peace": seconds, "weights_blake2b": expected, "killed": killed}


def kill_once(
    workplace: Workplace, method: str, models_folder: Path, seconds: float, writing: bool, generator: random.Random
) -> dict[str, Any] | None:
    """Starts a run and kills it: at a random moment of `seconds`, then, where `writing`, at the next checkpoint.

    Returns:
        `during` what it was killed ("checkpoint": one was being written), and the `step` of the newest whole
        checkpoint; None: it was finished before that.
    """
    process = workplace.start(method, models_folder)
    process.stdout.readline()  # its first line of progress
    end = time.perf_counter() + generator.uniform(0, seconds)
    files = generator.randrange(12)
    wait(process, lambda: time.perf_counter() > end)
    if writing:
        wait(process, lambda: any(len(os.listdir(path)) >= files for path in models_folder.glob("*/.*.partial")))
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    if process.wait() != -signal.SIGKILL:
        return None
    during = "checkpoint" if any(models_folder.glob("*/.checkpoint-*")) else "training"
    steps = [int(path.name.removeprefix("checkpoint-")) for path in models_folder.glob("*/checkpoint-*")]
    return {"during": during, "step": max(steps, default=0)}


def wait(process: subprocess.Popen, condition: Callable[[], bool]) -> None:
    while process.poll() is None:
        try:
            if condition():
                return
        except FileNotFoundError:  # the folder got its name while we looked
            continue
        time.sleep(0.0005)


def is_finished(models_folder: Path) -> bool:
    return any(models_folder.glob("*/training_summary.json"))


def digest(models_folder: Path) -> str:
    """Of the weights that a run has saved."""
    (weights,) = models_folder.glob("*/*model.safetensors")
    return hashlib.blake2b(weights.read_bytes(), digest_size=16).hexdigest()


# ------------------------------------------------------------------------------------------------------- model and data


def make_model(folder: Path) -> None:
    """A Llama of two layers with random weights, and a tokenizer of bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    prompts = json.loads((PROJECT / "tokentune" / "alpaca_template.json").read_text(encoding="utf-8")).values()
    tokenizer.train_from_iterator(prompts, trainers.BpeTrainer(vocab_size=400, **options))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": len(fast)}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(folder)


def make_data(path: Path) -> None:
    rows = [{"instruction": f"Repeat {row}.", "input": "", "output": f"{row} {row * row}"} for row in range(ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
