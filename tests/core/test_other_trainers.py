"""Used from outside with one added line: TRL's trainer, transformers' Trainer, accelerate, a kernel's own forward."""

import copy
import importlib
from types import MethodType

import oracle
import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.state import AcceleratorState
from conftest import tiny_llama_config
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

import tokentune.core.model_sampling
from tokentune import apply_tokentune
from tokentune.core.saved_tensors.saved_bytes import SavedForBackward
from tokentune.sampling.sampler import Selection

trl = pytest.importorskip("trl")
WEIGHS = "draws its own selection for a mean over tokens, not for a loss that weighs"
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"], task_type="CAUSAL_LM")
IDS, POSITIONS = torch.arange(3, 33).reshape(2, 15), torch.tensor([[1, 5, 9, 13], [0, 2, 3, 12]])


def new_model(**changes: object) -> nn.Module:
    torch.manual_seed(1)
    return LlamaForCausalLM(tiny_llama_config(**changes))


class Recorder(TrainerCallback):
    """What one optimizer step of a run consisted of: draws, batches, saved bytes, and the gradients at its end."""

    def __init__(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch):
        self.draws, self.batches, self.saved, self.gradients = [], [], [], {}
        select = tokentune.core.model_sampling.select_tokens

        def record(*args: object, **options: object) -> Selection:
            selection = select(*args, **options)
            self.draws.append(selection.positions)
            return selection

        def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.batches.append(dict(kwargs))

        monkeypatch.setattr(tokentune.core.model_sampling, "select_tokens", record)
        model.register_forward_pre_hook(keep, with_kwargs=True, prepend=True)

    def on_pre_optimizer_step(self, args: object, state: object, control: object, model: nn.Module, **_) -> None:
        # peft's names for the same parameter: base_model.model.<name>, with the adapters' and base layers' parts
        self.gradients = {
            name.removeprefix("base_model.model."): p.grad.clone()
            for name, p in model.named_parameters()
            if p.grad is not None
        }


def measured(cls: type, recorder: Recorder) -> type:
    """The trainer with a look at what autograd keeps; what it computes stays as it is."""

    class Measured(cls):
        def compute_loss(self, *args: object, **kwargs: object) -> object:
            with SavedForBackward(self.model) as saved:
                result = super().compute_loss(*args, **kwargs)
            recorder.saved.append(saved.bytes)
            return result

    return Measured


def words_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {f"w{i}": i for i in range(90)} | {"<pad>": 90, "</s>": 91, "<unk>": 92}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def prompts_and_completions() -> Dataset:
    """Four records of 20 to 70 tokens, half of each a prompt without loss."""

    def words(start: int, count: int) -> str:
        return " ".join(f"w{(start + 7 * i) % 90}" for i in range(count))

    return Dataset.from_list(
        [{"prompt": words(n, 8 + 9 * n), "completion": " " + words(5 * n + 1, 11 + 8 * n)} for n in range(4)]
    )


def run_sft(model: nn.Module, recorder: Recorder, tmp_path, **settings: object) -> list[dict]:
    """One optimizer step over four records in two micro-batches; returns the trainer's log."""
    peft_config = settings.pop("peft_config", None)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1, "bf16": False}
    options |= {"gradient_checkpointing": False, "max_grad_norm": 0.0, "use_cpu": True, "report_to": "none"}
    options |= {"logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    trainer = measured(trl.SFTTrainer, recorder)(
        model=model,
        args=trl.SFTConfig(str(tmp_path), **{**options, **settings}),
        train_dataset=prompts_and_completions(),
        processing_class=words_tokenizer(),
        peft_config=peft_config,
        callbacks=[recorder],
    )
    trainer.train()
    return trainer.state.log_history


def definition(model: nn.Module, recorder: Recorder) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the recorded step: per micro-batch the mean over the drawn targets, weighed by targets."""
    total = sum((batch["labels"][:, 1:] != -100).sum() for batch in recorder.batches)
    loss = torch.zeros(())
    for batch, positions in zip(recorder.batches, recorder.draws, strict=True):
        with oracle.constants_outside(model, positions, oracle.LLAMA):
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        mean = oracle.next_token_loss(logits, batch["labels"], positions)
        loss = loss + mean * (batch["labels"][:, 1:] != -100).sum() / total
    return loss.detach(), oracle.gradients(model, loss)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    scale = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        error = (found[name] - gradient).abs().max() / max(gradient.abs().max(), 1e-2 * scale)
        assert error < tolerance, f"{name}: {error:.1e}"


# --- TRL --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("adapters", ["none", "peft_config", "before", "after"])
def test_sft_trainer_follows_the_definition(adapters: str, checkpointing: bool, monkeypatch, tmp_path) -> None:
    """Gradients and logged loss of one step with accumulation, for the selections that the model drew."""
    model = new_model()
    if adapters == "before":
        model = get_peft_model(model, LORA)
        apply_tokentune(model, 0.3)
    else:
        apply_tokentune(model, 0.3)
        model = get_peft_model(model, LORA) if adapters == "after" else model
    owner = model.get_base_model() if adapters in ("before", "after") else model
    recorder = Recorder(owner, monkeypatch)
    kwargs = {"peft_config": copy.deepcopy(LORA)} if adapters == "peft_config" else {}
    kwargs["gradient_checkpointing"] = checkpointing
    log = run_sft(model, recorder, tmp_path, seed=3, learning_rate=0.0, **kwargs)

    assert len(recorder.draws) == len(recorder.batches) == 2
    assert all(draw.shape[1] < 0.35 * batch["labels"].shape[1] for draw, batch in _pairs(recorder))
    reference = copy.deepcopy(owner)  # nothing moved: the learning rate is zero
    tokentune.remove_tokentune(reference)
    reference.activation_checkpointing_disable()
    reference.__dict__.pop("forward", None)  # TRL's
    reference._forward_pre_hooks.clear()  # the recorder's
    loss, expected = definition(reference, recorder)
    assert_same(recorder.gradients, expected)
    assert log[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert log[0]["entropy"] == pytest.approx(torch.tensor(96.0).log().item(), rel=0.05)


def _pairs(recorder: Recorder) -> list[tuple[Tensor, dict]]:
    return list(zip(recorder.draws, recorder.batches, strict=True))


def test_sft_trainer_with_packing(monkeypatch, tmp_path) -> None:
    """Documents in one row, told apart by position ids that restart: the gradients of the documents one by one."""
    model = apply_tokentune(new_model(), 0.3)
    recorder = Recorder(model, monkeypatch)
    settings = {"packing": True, "max_length": 160, "learning_rate": 0.0, "per_device_train_batch_size": 1}
    run_sft(model, recorder, tmp_path, gradient_accumulation_steps=1, **settings)
    ((positions, inputs),) = _pairs(recorder)
    starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) > 2 and "attention_mask" not in inputs
    losses, supervised = torch.zeros(()), 0
    reference = new_model()
    for start, end in zip(starts, [*starts[1:], inputs["input_ids"].shape[1]], strict=True):
        inside = positions[(positions >= start) & (positions < end)][None] - start
        ids, labels = inputs["input_ids"][:, start:end], inputs["labels"][:, start:end]
        targets = [t for t in inside[0].tolist() if t + 1 < end - start and labels[0, t + 1] != -100]
        with oracle.constants_outside(reference, inside, oracle.LLAMA):
            logits = reference(ids).logits
        if targets:
            losses = losses + len(targets) * oracle.next_token_loss(logits, labels, inside)
        supervised += len(targets)
    assert_same(recorder.gradients, oracle.gradients(reference, losses / supervised))


@pytest.mark.parametrize("adapters", [False, True])
def test_sft_trainer_saves_memory(adapters: bool, monkeypatch, tmp_path) -> None:
    saved = {}
    for selective in (False, True):
        model = new_model(hidden_size=64, intermediate_size=160, num_hidden_layers=4)
        if selective:
            apply_tokentune(model, 0.3)
        recorder = Recorder(model, monkeypatch)
        run_sft(model, recorder, tmp_path, peft_config=copy.deepcopy(LORA) if adapters else None)
        saved[selective] = sum(recorder.saved)
        assert len(recorder.draws) == 2 * selective
    assert saved[True] < 0.55 * saved[False], saved[True] / saved[False]


def test_sft_trainer_refuses_what_it_cannot_do(monkeypatch, tmp_path) -> None:
    model = apply_tokentune(new_model(), 0.3)
    with pytest.raises(ValueError, match="weighs"):
        run_sft(model, Recorder(model, monkeypatch), tmp_path, loss_type="dft")


@pytest.mark.parametrize("name", ["DPO", "KTO", "GRPO", "RLOO"])
def test_trainers_by_preferences_and_rewards_are_refused(name: str, tmp_path) -> None:
    prompts, answers = [f"w{n} w{n + 9} w{n + 30}" for n in range(4)], [f" w{n + 7} w{n + 50}" for n in range(4)]
    rows = [{"prompt": prompt} for prompt in prompts]
    options, more = {}, {}
    if name == "DPO":
        rows = [row | {"chosen": answer, "rejected": answer * 2} for row, answer in zip(rows, answers, strict=True)]
    elif name == "KTO":
        rows = [row | {"completion": answers[n], "label": n % 2 == 0} for n, row in enumerate(rows)]
    else:
        more = {"reward_funcs": lambda completions, **_: [float(n) for n in range(len(completions))]}
        options = {"num_generations": 2, "max_completion_length": 4}
    options |= {"per_device_train_batch_size": 2, "max_steps": 1, "bf16": False, "use_cpu": True, "report_to": "none"}
    trainer = getattr(trl, f"{name}Trainer")(
        model=apply_tokentune(new_model(), 0.3),
        args=getattr(trl, f"{name}Config")(str(tmp_path), save_strategy="no", disable_tqdm=True, **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=words_tokenizer(),
        peft_config=copy.deepcopy(LORA),
        **more,
    )
    with pytest.raises(ValueError, match=WEIGHS):
        trainer.train()


@pytest.mark.parametrize("name", ["ORPO", "CPO", "TPO", "Reward", "Distillation"])
def test_trainers_that_call_the_model_without_labels_are_refused(name: str, tmp_path) -> None:
    """They take a loss of their own from the outputs, or from the backbone's."""
    home = importlib.import_module(f"trl.experimental.{name.lower()}") if name in ("ORPO", "CPO", "TPO") else trl
    row = {"prompt": "w1 w10 w31", "chosen": " w7 w50", "rejected": " w8 w51 w60", "reference": " w7 w50 w2"}
    kept = {"Distillation": ["prompt", "completion"], "TPO": list(row)}.get(name, ["prompt", "chosen", "rejected"])
    model, peft_config = new_model(), copy.deepcopy(LORA)
    if name == "Reward":
        model = LlamaForSequenceClassification(tiny_llama_config(num_labels=1, pad_token_id=90))
        peft_config.task_type = "SEQ_CLS"
    options = {"per_device_train_batch_size": 2, "max_steps": 1, "bf16": False, "use_cpu": True, "report_to": "none"}
    more = {"teacher_model": new_model()} if name == "Distillation" else {}
    options |= {"max_completion_length": 4} if name == "Distillation" else {}
    trainer = getattr(home, f"{name}Trainer")(
        model=apply_tokentune(model, 0.3),
        args=getattr(home, f"{name}Config")(str(tmp_path), save_strategy="no", disable_tqdm=True, **options),
        train_dataset=Dataset.from_list([{key: row[key] for key in kept if key in row}] * 4),
        processing_class=words_tokenizer(),
        peft_config=peft_config,
        **more,
    )
    with pytest.raises(ValueError, match=f"without labels: .*{WEIGHS}"):
        trainer.train()


# --- other owners of the forward --------------------------------------------------------------------------------------


def expected_gradients(model: nn.Module, labels: Tensor, positions: Tensor = POSITIONS) -> dict[str, Tensor]:
    with oracle.constants_outside(model, positions, oracle.LLAMA):
        logits = model(IDS).logits
    return oracle.gradients(model, oracle.next_token_loss(logits, labels, positions))


def fused_forward(self: nn.Module, input_ids: Tensor, labels: Tensor, num_items_in_batch=None, **kwargs) -> object:
    """As Liger's: the backbone's states and the labels go into one kernel, and no logits come out."""
    hidden = self.model(input_ids, **kwargs).last_hidden_state
    reduction = "mean" if num_items_in_batch is None else "sum"
    logits = self.lm_head(hidden[:, :-1]).flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction=reduction)
    return CausalLMOutputWithPast(loss=loss if num_items_in_batch is None else loss / num_items_in_batch)


def test_a_fused_loss_on_the_instance_follows_the_definition() -> None:
    model = new_model()
    labels = IDS.masked_fill(torch.arange(15) < 6, -100)
    expected = expected_gradients(model, labels)
    apply_tokentune(model)
    model.forward = MethodType(fused_forward, model)
    loss = model(input_ids=IDS, labels=labels, selected_positions=POSITIONS).loss
    assert_same(oracle.gradients(model, loss), expected)


def test_a_fused_loss_gets_its_share_of_num_items_in_batch(monkeypatch) -> None:
    model = apply_tokentune(new_model(), 0.3)
    model.forward = MethodType(fused_forward, model)
    recorder = Recorder(model, monkeypatch)
    labels = IDS.masked_fill(torch.arange(15) < 6, -100)
    items = 40  # 18 of them here, the others in other micro-batches
    loss = model(input_ids=IDS, labels=labels, num_items_in_batch=torch.tensor(items)).loss
    logits = tokentune.remove_tokentune(model) and LlamaForCausalLM.forward(model, IDS).logits
    mean = oracle.next_token_loss(logits, labels, recorder.draws[0])
    assert loss.item() == pytest.approx(mean.item() * 18 / items, rel=1e-5)


def _mixed_precision(model: nn.Module) -> nn.Module:
    AcceleratorState._reset_state(True)  # one per process, which another test's trainer has set up already
    return Accelerator(cpu=True, mixed_precision="bf16").prepare(model)


def _dispatch_hook(model: nn.Module) -> nn.Module:
    return add_hook_to_module(model, ModelHook())


@pytest.mark.parametrize("wrap", [_mixed_precision, _dispatch_hook])
@pytest.mark.parametrize("first", ["wrapper", "tokentune"])
def test_accelerates_wrappers_are_the_models_own_forward(wrap, first: str) -> None:
    """K rows come back, and the gradients are right: a wrapper that passes everything on owns no loss."""
    model = new_model()
    expected = expected_gradients(model, IDS)
    model = apply_tokentune(wrap(model)) if first == "wrapper" else wrap(apply_tokentune(model))
    assert "forward" in vars(model)
    out = model(input_ids=IDS, labels=IDS, selected_positions=POSITIONS)
    assert out.logits.shape[1] == POSITIONS.shape[1]
    assert_same(oracle.gradients(model, out.loss), expected, 0.1 if wrap is _mixed_precision else 1e-4)


@pytest.mark.parametrize("bf16", [False, True])
def test_transformers_trainer_with_one_added_line(bf16: bool, monkeypatch, tmp_path) -> None:
    model = apply_tokentune(new_model(), 0.3)
    recorder = Recorder(model, monkeypatch)
    rows = [{"input_ids": (torch.arange(24) + n) % 90, "labels": (torch.arange(24) + n) % 90} for n in range(8)]
    rows = [row | {"attention_mask": torch.ones(24, dtype=torch.long)} for row in rows]
    for n, row in enumerate(rows):
        row["labels"] = row["labels"].masked_fill(torch.arange(24) < 4 + 2 * n, -100)
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=1,
        max_grad_norm=0.0,
        learning_rate=0.0,
        bf16=bf16,
        use_cpu=True,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[recorder])
    trainer.train()
    assert len(recorder.draws) == 4
    reference = new_model()
    loss, expected = definition(reference, recorder)
    assert_same(recorder.gradients, expected, 0.2 if bf16 else 1e-4)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-2 if bf16 else 1e-4)


def test_a_trainer_that_keeps_the_labels_to_itself_is_told(monkeypatch, tmp_path) -> None:
    """With label smoothing the Trainer takes the loss itself: no labels, no draw, ordinary training, and a warning."""
    model, told = apply_tokentune(new_model(), 0.3), []
    monkeypatch.setattr(tokentune.core.patching.logger, "warning_once", told.append)
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 2
    settings = {"label_smoothing_factor": 0.1, "max_steps": 1, "use_cpu": True, "report_to": "none"}
    Trainer(model, TrainingArguments(str(tmp_path), **settings), train_dataset=rows).train()
    assert len(told) == 1 and "without labels" in told[0]
    model.eval()(input_ids=IDS)
    with torch.no_grad():
        model.train()(input_ids=IDS)
    assert len(told) == 1


def test_sft_trainer_with_label_smoothing_is_told(monkeypatch, tmp_path) -> None:
    model, told = apply_tokentune(new_model(), 0.3), []
    monkeypatch.setattr(tokentune.core.patching.logger, "warning_once", told.append)
    run_sft(model, Recorder(model, monkeypatch), tmp_path, label_smoothing_factor=0.1)
    assert told and all("without labels" in text for text in told)


def test_a_plain_training_loop() -> None:
    """As the README shows it: one line before the loop; the loss of all tokens falls, a third of them trained on."""
    model = new_model()
    ids = torch.randint(3, 90, (4, 24))
    full = [model(input_ids=ids, labels=ids).loss.item()]
    apply_tokentune(model, prefix_length=0.3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    full.append(model.eval()(input_ids=ids, labels=ids).loss.item())
    assert full[1] < 0.5 * full[0], full
