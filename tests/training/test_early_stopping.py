"""Early stopping, and the best weights for the last ones: which are kept, what is said, and after an interruption."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_trainer import make_rows, trained_parameters
from transformers import TrainerCallback

from tokentune import finetune
from tokentune.cli.arguments import parse_arguments
from tokentune.errors import UserError
from tokentune.reports.summary import warn_without_gain
from tokentune.training.callbacks import EarlyStopping
from tokentune.training.evaluation import loss_per_token
from tokentune.training.trainer import SelectiveTrainer

Make = Callable[..., SelectiveTrainer]
WORDS = "--global_batch_size 4 --eval_steps 1 --num_epochs 3"


def scripted(trainer: SelectiveTrainer, losses: list[float]) -> None:
    """Gives the validations these losses, the one before training first; weights move as ever."""

    def evaluation(trainer: SelectiveTrainer, loader: Any) -> dict[str, float]:
        return {"loss": losses[trainer.state.global_step]}

    trainer.evaluation = evaluation


class Weights(TrainerCallback):
    """Keeps the weights of every step."""

    def __init__(self) -> None:
        self.of: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.of[state.global_step] = {n: p.detach().clone() for n, p in kwargs["model"].named_parameters()}


def test_it_stops_after_so_many_evaluations_without_a_lower_loss(
    make_trainer: Make,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer = make_trainer(f"{WORDS} --early_stopping_patience 3 --logging_steps 1000", eval_rows=make_rows(3))
    scripted(trainer, [1.0, 3.0, 2.0, 2.5, 1.9, 1.95, 1.9, 2.0, 0.1])
    with caplog.at_level(logging.INFO, logger="tokentune"):
        trainer.train()
    assert trainer.state.global_step == 7 and trainer.state.max_steps == 15
    assert [step for step, _ in trainer.figures.validation_losses] == list(range(8))
    assert "stopped early, after step 7 of 15: 3 evaluations in a row without a lower validation loss than 1.9" in (
        caplog.text
    )
    entries = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    assert entries == [1, 7]  # the last step is logged, so that the summary's figures are of the whole run
    assert trainer.saved_step == 7
    assert not list(Path(trainer.args.output_dir).glob("checkpoint-*"))


@pytest.mark.parametrize("method", ["--learning_rate 1e-2", "--lora --tokentune --learning_rate 1e-2"])
def test_the_best_weights_are_the_result(
    method: str,
    make_trainer: Make,
    caplog: pytest.LogCaptureFixture,
) -> None:
    words = f"{WORDS} --load_best_model_at_end --early_stopping_patience 2 --save_steps 3 {method}"
    trainer = make_trainer(words, eval_rows=make_rows(3))
    scripted(trainer, [1.0, 3.0, 2.0, 2.5, 1.5, 1.9, 1.6])
    weights = Weights()
    trainer.add_callback(weights)
    with caplog.at_level(logging.INFO, logger="tokentune"):
        trainer.train()
    assert trainer.state.global_step == 6 and trainer.saved_step == 4
    assert "the result is that of step 4: validation loss 1.5000, the best" in caplog.text
    now = dict(trainer.model.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in weights.of[4].items())
    assert any(not torch.equal(now[name], tensor) for name, tensor in weights.of[6].items())
    # Each best one so far, and those of --save_steps.
    names = sorted(path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*"))
    assert names == [f"checkpoint-{step}" for step in (1, 2, 3, 4, 6)]


def test_the_best_checkpoint_outlives_the_others(make_trainer: Make) -> None:
    words = f"{WORDS} --load_best_model_at_end --save_steps 1 --save_total_limit 2 --max_steps 6 --lora"
    trainer = make_trainer(words, eval_rows=make_rows(3))
    scripted(trainer, [1.0, 3.0, 1.5, 2.5, 2.5, 2.5, 2.5])
    trainer.train()
    names = sorted(path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*"))
    assert "checkpoint-2" in names and len(names) <= 3
    assert trainer.saved_step == 2


def test_patience_survives_an_interruption(make_trainer: Make) -> None:
    words = f"{WORDS} --load_best_model_at_end --early_stopping_patience 3 --save_steps 1 --learning_rate 1e-2"
    losses = [1.0, 3.0, 2.0, 2.5, 2.6, 2.7, 0.1, 0.1]

    class Killed(Exception):
        pass

    class Kill(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:  # after two evaluations in vain
                raise Killed

    whole = make_trainer(words, eval_rows=make_rows(3))
    scripted(whole, losses)
    whole.train()
    assert whole.state.global_step == 5 and whole.saved_step == 2

    killed = make_trainer(words, eval_rows=make_rows(3))
    scripted(killed, losses)
    killed.add_callback(Kill())
    with pytest.raises(Killed):
        killed.train()
    resumed = make_trainer(words, eval_rows=make_rows(3))
    scripted(resumed, losses)
    resumed.train(resume_from_checkpoint=str(Path(resumed.args.output_dir) / "checkpoint-4"))
    assert resumed.state.global_step == 5 and resumed.saved_step == 2
    assert resumed.figures.validation_losses == whole.figures.validation_losses
    for name, tensor in trained_parameters(whole).items():
        assert torch.equal(trained_parameters(resumed)[name], tensor)


def test_the_command_saves_the_best_weights_and_says_which(
    tiny_llama_dir: Path, alpaca_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {0: 5.0, 1: 4.0, 2: 3.0, 3: 3.5, 4: 3.6}
    saved: dict[int, dict[str, torch.Tensor]] = {}

    def evaluation(trainer: SelectiveTrainer, loader: Any) -> dict[str, float]:
        step = trainer.state.global_step
        saved[step] = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        return loss_per_token(trainer, loader) | {"loss": losses[step]}

    monkeypatch.setattr("tokentune.training.build.loss_per_token", evaluation)
    data, model = ["--dataset_name_or_path", str(alpaca_file)], ["--model_name_or_path", str(tiny_llama_dir)]
    words = "--global_batch_size 4 --num_epochs 3 --warmup_steps 0 --report_to none --eval_steps 1 --skip_verification"
    words += " --load_best_model_at_end --early_stopping_patience 2 --tokentune --data_cache none --save_steps 3"
    words += " --learning_rate 1e-2"
    eval_data = ["--eval_dataset_name_or_path", str(alpaca_file), "--model_save_path", str(tmp_path)]
    finetune.main([*model, *data, *eval_data, *words.split()])
    (summary_file,) = tmp_path.glob("*/training_summary.json")
    summary = json.loads(summary_file.read_text())
    assert (summary["optimizer_steps"], summary["saved_step"], summary["stopped_early"]) == (4, 2, True)
    validation = summary["validation_loss"]
    assert validation["base"] == 5.0 and validation["final"] == 3.0 and validation["best"] == {"step": 2, "loss": 3.0}
    assert summary["tokens"]["supervised"] is not None and summary["micro_batch_size"] == 4
    result = load_file(summary_file.parent / "model.safetensors")
    assert all(torch.equal(tensor, saved[2][name]) for name, tensor in result.items())
    left = [path.name for path in summary_file.parent.glob("checkpoint-*")]
    assert left == ["checkpoint-3"]  # of those that were the best for a while, the result holds the last


@pytest.mark.parametrize("flag", ["--early_stopping_patience 2", "--load_best_model_at_end"])
def test_without_validation_it_is_refused(flag: str) -> None:
    required = "--model_name_or_path owner/model --dataset_name_or_path owner/data --report_to none"
    with pytest.raises(UserError, match="looks at the validation loss: add --eval_steps"):
        parse_arguments(f"{required} {flag}".split())
    with pytest.raises(UserError, match="--early_stopping_patience 0: must be 1 or more"):
        parse_arguments(f"{required} --early_stopping_patience 0".split())


def test_patience_is_the_trainer_s_own() -> None:
    callback = EarlyStopping(2)
    callback.early_stopping_patience_counter = 1
    assert type(callback).from_state(callback.state()).early_stopping_patience_counter == 1


@pytest.mark.parametrize(("final", "warned"), [(2.9, False), (3.0, True), (3.4, True)])
def test_a_run_that_gained_nothing_says_so(final: float, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "tokentune"):
        warn_without_gain({"validation_loss": {"base": 3.0, "final": final}, "saved_step": 7})
    assert ("did not fall: 3.0000 before" in caplog.text) == warned
