"""The runs of `selection_quality.py`: what they have in common, what is compared, and in which order.

Everything is the same within an arm, seeds, data and learning rate included; runs differ in how tokens are selected. A
baseline's proportion names the selective run that it keeps the bytes of, or takes the time of.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROWS = 384  # of the training file, its first ones
COMMON = {
    "max_length": "192",
    "add_eos_token": "",
    "bf16": "",
    "base_dtype": "float32",
    "warmup_steps": "4",
    "logging_steps": "1000",
    "report_to": "none",
    "skip_memory_probe": "",
}
TRAINED = {
    # The best of 1e-4, 3e-4, 5e-4 and 1e-3 for full training, on rows of the training file that no run here sees.
    "full": {"learning_rate": "3e-4"},
    "lora": {
        "lora": "",
        "lora_target_modules": "all-linear",
        "lora_r": "8",
        "lora_dropout": "0.0",
        "learning_rate": "2e-3",
    },
}
ARMS = {
    "one epoch": {"global_batch_size": "16", "num_epochs": "1"},
    "four epochs": {"global_batch_size": "16", "num_epochs": "4"},
    "batch of 64": {"global_batch_size": "64", "gradient_accumulation_steps": "4", "num_epochs": "4"},
    "half the rate": {"global_batch_size": "16", "num_epochs": "1", "learning_rate": "1.5e-4"},  # of all weights
    "quarter of the rate": {"global_batch_size": "16", "num_epochs": "1", "learning_rate": "7.5e-5"},
}
STEPS = {arm: int(flags["num_epochs"]) * ROWS // int(flags["global_batch_size"]) for arm, flags in ARMS.items()}
MICRO_BATCHES = {0.1: 2, 0.3: 4, 0.5: 8}  # sequences of full training that keep no more than 16 selective ones


@dataclass(frozen=True)
class Method:
    """One way to choose tokens.

    Attributes:
        flags: of finetune.py, beside `--tokentune --prefix_length`.
        look: how many of the model's layers a first pass over all tokens runs through, as a share; 0: there is none.
            The pass's keys and values serve the selected tokens, where it runs through all layers.
        reference: whether another model of the same size looks, too.
    """

    flags: dict[str, str] = field(default_factory=dict)
    look: float = 0.0
    reference: bool = False


def by_scores(strategy: str, draw: str = "proportional") -> Method:
    return Method({"selection": strategy, "selection_draw": draw}, look=1.0)


def by_excess(draw: str) -> Method:
    """Against the model as it was before training."""
    flags = {"selection": "excess_loss", "selection_draw": draw, "selection_reference_model": MODEL}
    return Method(flags, look=1.0, reference=True)


def corrected(strategy: str, power: str) -> Method:
    return Method({"selection": strategy, "gradient_correction": power})


MODEL = "MODEL"  # stands for the path of the model that is trained, which results do not name
METHODS = {
    "random": Method({"selection": "random"}),
    "supervised": Method({"selection": "supervised"}),
    "stratified": Method({"selection": "stratified"}),
    "contiguous": Method({"selection": "contiguous"}),
    "answer window": Method({"selection": "answer_window.py:answer_window"}),
    "random, selection pass": Method({"selection": "random", "selection_pass": ""}, look=1.0),
    "loss": by_scores("loss"),
    "loss, top": by_scores("loss", "top"),
    "excess_loss": by_excess("proportional"),
    "excess_loss, top": by_excess("top"),
    "gradient": by_scores("gradient"),
    "gradient, top": by_scores("gradient", "top"),
    "attention": by_scores("attention"),
    "attention, top": by_scores("attention", "top"),
    "tokenseek": by_scores("tokenseek"),
    "tokenseek, top": by_scores("tokenseek", "top"),
    "random, correction 0.5": corrected("random", "0.5"),
    "random, correction 1": corrected("random", "1"),
}
DRAWN = ("supervised", "stratified", "contiguous")
FIRST_SCORED = ("gradient", "loss", "gradient, top", "tokenseek", "attention", "excess_loss", "loss, top")
LATER_SCORED = tuple(name for name, method in METHODS.items() if method.look and name not in FIRST_SCORED)
CORRECTED = tuple(name for name in METHODS if "correction" in name)
EQUAL_BYTES, CHECKPOINTING, EQUAL_TIME = "full, smaller micro-batch", "full, checkpointing", "full, equal time"
EQUAL_BOTH = "full, equal bytes and time"
BASELINES = ("full", EQUAL_BYTES, CHECKPOINTING, EQUAL_TIME, EQUAL_BOTH)
AT_OTHER_RATES = ("random", "supervised", "answer window", "gradient", EQUAL_TIME)
TimeRatios = dict[tuple[str, str, float], float]  # (trained, baseline, proportion) -> random tokens' step over its step


@dataclass(frozen=True)
class Experiment:
    """One run of finetune.py. `proportion`: of a baseline, the selective run's it is to be compared with."""

    arm: str
    trained: str
    method: str
    proportion: float | None
    seed: int

    def __str__(self) -> str:
        proportion = "" if self.proportion is None else f" {self.proportion}"
        return f"{self.arm}, {self.trained}: {self.method}{proportion}, seed {self.seed}"

    def settings(self, time_ratios: TimeRatios) -> dict[str, str] | None:
        """Flags and their words, without paths and the seed; None where a time has to be measured first."""
        settings = COMMON | TRAINED[self.trained] | ARMS[self.arm]
        if self.method == "full":
            return settings
        if self.method == CHECKPOINTING:
            return settings | {"gradient_checkpointing": ""}
        if self.method in (EQUAL_BYTES, EQUAL_BOTH):
            accumulation = int(settings["global_batch_size"]) // MICRO_BATCHES[self.proportion]
            settings |= {"gradient_accumulation_steps": str(accumulation)}
        if self.method in (EQUAL_TIME, EQUAL_BOTH):
            base = "full" if self.method == EQUAL_TIME else EQUAL_BYTES
            ratio = time_ratios.get((self.trained, base, self.proportion))
            return ratio and settings | {"max_steps": str(max(1, round(STEPS[self.arm] * ratio)))}
        if self.method == EQUAL_BYTES:
            return settings
        selective = {"tokentune": "", "prefix_length": str(self.proportion), "skip_verification": ""}
        return settings | selective | METHODS[self.method].flags


def units(experiment: Experiment) -> float:
    """Work per token and step by count of matrix products: a token's forward pass is 2, its backward pass 4.

    2 of the latter belong to the weights' gradients, which frozen weights have not. Full training: 6, with LoRA 4.
    """
    backward = 4.0 if experiment.trained == "full" else 2.0
    if experiment.method in BASELINES:
        return 2 + backward + (2 if experiment.method == CHECKPOINTING else 0)
    # Without the correction: results hold corrected draws that are refused today, of as much work.
    share, method = experiment.proportion, METHODS[experiment.method.partition(", correction ")[0]]
    rest = 0 if method.look == 1 else 2 * (1 - share)
    return 2 * method.look + rest + (2 + backward) * share + (2 if method.reference else 0)


def experiments() -> list[Experiment]:
    """All of them, what matters most first: an interrupted measurement has then the main rows."""
    correction = ("random", "random, correction 1")
    lora = ("supervised", "contiguous", "answer window", "gradient", "random, correction 1")
    listed = [
        *runs("full", ("full",), (None,), range(1, 6)),
        *runs("full", ("random",), (0.3,), range(1, 6)),
        *runs("full", DRAWN, (0.3,), range(1, 4)),
        *runs("full", ("answer window",), (0.3,), range(1, 4)),
        *runs("full", FIRST_SCORED, (0.3,), range(1, 4)),
        *runs("full", CORRECTED, (0.3,), range(1, 4)),
        *runs("full", (EQUAL_TIME, EQUAL_BOTH), (0.3,), range(1, 4)),
        *runs("full", (EQUAL_BYTES, CHECKPOINTING), (0.3,), (1,)),
        *runs("lora", ("full",), (None,), range(1, 4)),
        *runs("lora", ("random", *lora), (0.3,), range(1, 4)),
        *runs("lora", (EQUAL_TIME, EQUAL_BOTH), (0.3,), range(1, 4)),
        *runs("full", ("random", "supervised", EQUAL_TIME), (0.1, 0.5), range(1, 4)),
        *runs("full", (EQUAL_TIME, "supervised", "gradient", "answer window"), (0.3,), (4, 5)),
        *runs("full", ("full",), (None,), (1,), "batch of 64"),
        *runs("full", correction, (0.3,), (1, 2), "batch of 64"),
        *runs("full", ("full",), (None,), (1, 2, 3), "half the rate"),
        *runs("full", AT_OTHER_RATES, (0.3,), (1, 2, 3), "half the rate"),
        *runs("full", ("full",), (None,), (1,), "four epochs"),
        *runs("full", correction, (0.3,), (1, 2), "four epochs"),
        *runs("full", ("full",), (None,), (1, 2), "quarter of the rate"),
        *runs("full", AT_OTHER_RATES, (0.3,), (1, 2), "quarter of the rate"),
        *runs("full", LATER_SCORED, (0.3,), range(1, 4)),
        *runs("full", ("gradient", "answer window", "random, correction 1"), (0.1, 0.5), range(1, 4)),
        *runs("lora", ("stratified", "loss", "gradient, top"), (0.3,), range(1, 4)),
        *runs("lora", ("random", "supervised"), (0.1, 0.5), range(1, 4)),
        *runs("lora", (EQUAL_BYTES, CHECKPOINTING), (0.3,), (1,)),
        *runs("lora", ("full",), (None,), (4, 5)),
        *runs("lora", ("random",), (0.3,), (4, 5)),
    ]
    return list(dict.fromkeys(listed))


def runs(
    trained: str,
    methods: Sequence[str],
    proportions: Sequence[float | None],
    seeds: Iterable[int],
    arm: str = "one epoch",
) -> Iterator[Experiment]:
    """Seed by seed, so that what is there at any time can be compared."""
    for seed in seeds:
        for proportion in proportions:
            for method in methods:
                yield Experiment(arm, trained, method, proportion, seed)


# ------------------------------------------------------------------------------------------------------ command lines


@dataclass(frozen=True)
class Workplace:
    """Paths: the model, the rows to learn from (a copy of the first ones), to evaluate on, and a folder for runs."""

    model: Path
    train: Path
    validation: Path
    folder: Path


def workplace(model: Path, data: Path, folder: Path) -> Workplace:
    rows = (data / "alpaca_en.train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:ROWS]
    train = folder / "train.jsonl"
    train.write_text("".join(rows), encoding="utf-8")
    return Workplace(model, train, data / "alpaca_en.validation.jsonl", folder)


def words(place: Workplace, experiment: Experiment, settings: dict[str, str]) -> list[str]:
    """What stands behind `finetune.py`, but for where results go."""
    paths = {
        "model_name_or_path": place.model,
        "dataset_name_or_path": place.train,
        "eval_dataset_name_or_path": place.validation,
        "seed": experiment.seed,
    }
    flags = {flag: str(place.model) if word == MODEL else word for flag, word in settings.items()}
    if ".py:" in flags.get("selection", ""):
        flags["selection"] = str(Path(__file__).with_name(flags["selection"]))
    return [word for flag, value in (paths | flags).items() for word in (f"--{flag}", *str(value).split())]
