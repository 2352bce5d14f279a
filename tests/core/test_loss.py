"""The loss in chunks of rows: the model's own value and gradients, and no logits kept for the backward pass."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from conftest import tiny_bert_config, tiny_llama_config
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertForMaskedLM, Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM, PreTrainedModel

import tokentune.core.loss
from tokentune import UnsupportedModelError, apply_tokentune, remove_tokentune
from tokentune.core.loss import ChunkedLoss, WithheldRows, take_loss_in_chunks
from tokentune.core.saved_tensors.saved_bytes import SavedForBackward
from tokentune.verify.tiny_copy import Float64
from tokentune.verify.verification import verify_chunked_loss

IDS = torch.arange(3, 33).reshape(2, 15)
POSITIONS = torch.tensor([[1, 5, 9, 13], [0, 2, 3, 12]])
LABELS = IDS.clone()
LABELS[0, :7] = -100  # of the eight selected rows six are supervised
LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
THREE_ROWS = 3 * 4 * 96  # bytes of their logits in float32: more than one chunk, and no equal ones


def llama(**changes: object) -> nn.Module:
    torch.manual_seed(1)
    return LlamaForCausalLM(tiny_llama_config(**changes)).double()


def adapted(**options: object) -> nn.Module:
    return get_peft_model(llama(), LoraConfig(**{**LORA, **options})).double()


def soft_capped() -> nn.Module:
    """Scales and bends its logits between the head and the loss."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 96, "head_dim": 8}
    config = Gemma2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, final_logit_softcapping=0.5)
    torch.manual_seed(1)
    return Gemma2ForCausalLM._from_config(config, attn_implementation="eager").double()


def frozen_soft_capped() -> nn.Module:
    return get_peft_model(soft_capped(), LoraConfig(**LORA)).double()


MODELS = {
    "trained": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "frozen": adapted,
    "adapted head": lambda: adapted(target_modules=["q_proj", "lm_head"]),
    "trained copy of the head": lambda: adapted(modules_to_save=["lm_head"]),
    "soft-capped": soft_capped,
    "soft-capped, frozen": frozen_soft_capped,
}


def owner(model: nn.Module) -> PreTrainedModel:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def patched(model: nn.Module, chunked: bool | None, chunk_bytes: int = THREE_ROWS) -> nn.Module:
    apply_tokentune(model.train(), verify=False, chunked_loss=chunked)
    owner(model)._tokentune.chunk_bytes = chunk_bytes
    return model


def step(model: nn.Module, **inputs: object) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss, gradients and logits, all in float64, where transformers casts to float32."""
    model.zero_grad()
    with Float64():
        given = {"input_ids": IDS, "labels": LABELS, "selected_positions": POSITIONS, **inputs}
        output = model(**{name: value for name, value in given.items() if value is not None})
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.loss.detach(), gradients, output.logits


def assert_same_step(found: tuple, expected: tuple) -> None:
    assert (found[0] - expected[0]).abs() <= 1e-13 * expected[0].abs()
    assert found[1].keys() == expected[1].keys()
    scale = max(gradient.abs().max() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).abs().max() <= 1e-12 * max(gradient.abs().max(), 1e-3 * scale), name


@pytest.mark.parametrize("items", [None, 20, torch.tensor(20)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_loss_of_whole_logits(name: str, items: object) -> None:
    model = MODELS[name]()
    expected = step(patched(copy.deepcopy(model), False), num_items_in_batch=items)
    found = step(patched(model, True), num_items_in_batch=items)
    assert expected[2].shape == (2, 4, 96) and found[2].shape == (2, 0, 96)
    assert_same_step(found, expected)


@pytest.mark.parametrize("name", ["trained", "frozen"])
def test_follows_the_factor_in_front_of_the_loss(name: str) -> None:
    """Gradient accumulation and loss scaling multiply the loss before they call backward."""
    gradients = []
    for chunked in (False, True):
        model = patched(MODELS[name](), chunked)
        with Float64():
            loss = model(input_ids=IDS, labels=LABELS, selected_positions=POSITIONS).loss
        (loss * 0.125).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    zero = torch.zeros(())
    assert_same_step((zero, gradients[1]), (zero, gradients[0]))


def rows_of_head(model: nn.Module, **inputs: object) -> list[int]:
    """How many rows each call of the output head got."""
    seen: list[int] = []
    handle = (
        owner(model)
        .get_output_embeddings()
        .register_forward_hook(lambda head, args, output: seen.append(output[..., 0].numel()))
    )
    with torch.random.fork_rng():
        step(model, **inputs)
    handle.remove()
    return seen


def test_head_sees_supervised_rows_alone_in_chunks() -> None:
    seen = rows_of_head(patched(adapted(), True))
    assert seen == [0, 3, 3]  # none for the model's own code, then six of eight
    assert rows_of_head(patched(adapted(), True, chunk_bytes=1)) == [0, 1, 1, 1, 1, 1, 1]
    assert rows_of_head(patched(adapted(), True, chunk_bytes=2**20)) == [0, 6]


def test_trained_head_runs_twice_per_chunk_and_frozen_once() -> None:
    assert rows_of_head(patched(llama(), True)) == [0, 3, 3, 3, 3]
    assert rows_of_head(patched(adapted(), True)) == [0, 3, 3]


def test_given_count_of_supervised_rows_is_used_where_they_cannot_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = step(patched(llama(), False))
    monkeypatch.setattr(tokentune.core.loss, "is_fake", lambda tensor: True)  # as on an accelerator: nothing is read
    model = patched(llama(), True)
    assert rows_of_head(model)[:4] == [0, 3, 3, 2]  # all eight
    assert rows_of_head(model, num_supervised=6)[:3] == [0, 3, 3]
    assert_same_step(step(model), expected)
    assert_same_step(step(model, num_supervised=6), expected)


@pytest.mark.parametrize("name", ["trained", "frozen"])
def test_batch_without_targets_has_zero_gradients(name: str) -> None:
    """One process of several may have such a batch: every weight needs a gradient all the same."""
    nothing = {"labels": torch.full_like(IDS, -100), "num_items_in_batch": 20}
    expected = step(patched(MODELS[name](), False), **nothing)
    found = step(patched(MODELS[name](), True), **nothing)
    assert found[0] == 0 and found[1].keys() == expected[1].keys()
    assert not any(gradient.any() for gradient in found[1].values())


# --- when it is on ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_ordinary_training_takes_its_loss_in_chunks(name: str) -> None:
    """All tokens keep their gradients: those of the model without hooks, which it is again in evaluation."""
    ordinary = {"selected_positions": None, "num_items_in_batch": 20}
    model = MODELS[name]().train()
    expected = step(model, **ordinary)
    remove = take_loss_in_chunks(owner(model), THREE_ROWS)
    found = step(model, **ordinary)
    assert expected[2].shape == (2, 15, 96) and found[2].shape == (2, 0, 96)
    assert_same_step(found, expected)
    assert "_loss_function" not in vars(owner(model))
    assert step(model.eval(), **ordinary)[2].shape == expected[2].shape
    for hook in remove:
        hook()
    assert step(model.train(), **ordinary)[2].shape == expected[2].shape


def test_a_forward_that_fails_leaves_no_loss_of_ours() -> None:
    model = llama().train()
    take_loss_in_chunks(model)
    with pytest.raises(IndexError):
        model(input_ids=IDS + 1000, labels=LABELS)
    assert "_loss_function" not in vars(model) and not model.lm_head._forward_pre_hooks
    assert step(model, selected_positions=None)[2].shape[1] == 0


def is_chunked(model: nn.Module, **inputs: object) -> bool:
    logits = model(**{"input_ids": IDS, "labels": LABELS, "selected_positions": POSITIONS, **inputs}).logits
    return logits.shape[1] == 0


def test_on_by_itself_where_it_costs_nothing_or_memory_matters() -> None:
    assert is_chunked(patched(adapted(), None)) and not is_chunked(patched(adapted(), False))
    assert not is_chunked(patched(adapted(), None).eval()) and is_chunked(patched(adapted(), True).eval())
    full = patched(llama(), None)
    assert not is_chunked(full)
    full.gradient_checkpointing_enable()
    assert is_chunked(full)
    assert not is_chunked(full.eval())  # nothing is checkpointed in evaluation


def test_off_without_gradients_labels_or_selection() -> None:
    model = patched(adapted(), True)
    with torch.no_grad():
        assert model(input_ids=IDS, labels=LABELS, selected_positions=POSITIONS).logits.shape[1] == 4
    assert model(input_ids=IDS, selected_positions=POSITIONS).logits.shape[1] == 4
    assert model(input_ids=IDS, labels=LABELS).logits.shape[1] == 15
    assert model(input_ids=IDS, num_supervised=3).logits.shape[1] == 15  # an argument of ours, never the model's


def test_selection_that_the_model_draws_itself() -> None:
    losses = []
    for chunked in (False, True):
        model = apply_tokentune(llama().train(), 0.4, verify=False, chunked_loss=chunked)
        torch.manual_seed(5)
        losses.append(model(input_ids=IDS, labels=LABELS, num_items_in_batch=20).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedModelError, match="BertForMaskedLM is no language model with an output head"):
        apply_tokentune(BertForMaskedLM(tiny_bert_config()), verify=False, chunked_loss=True)
    model = llama()
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum()
    with pytest.raises(UnsupportedModelError, match="a loss function of its own"):
        apply_tokentune(model, verify=False, chunked_loss=True)
    assert not is_chunked(apply_tokentune(model, verify=False))


class WholeHead(LlamaForCausalLM):
    """Its code behind the head looks at all rows at once, and cannot run on none."""

    def forward(self, *args: object, labels: Tensor | None = None, **kwargs: object) -> object:
        output = super().forward(*args, **{k: v for k, v in kwargs.items() if k != "num_items_in_batch"})
        output.logits = output.logits * output.logits.detach().amax().clamp(1, 1)
        if labels is not None:
            output.loss = self.loss_function(output.logits, labels, self.config.vocab_size, **kwargs)
        return output


def test_verification_finds_code_behind_the_head_that_needs_all_rows() -> None:
    model = apply_tokentune(WholeHead(tiny_llama_config()))
    assert "differs in chunks" in model._tokentune.profile.whole_logits
    model.gradient_checkpointing_enable()
    assert not is_chunked(model.train())
    remove_tokentune(model)
    with pytest.raises(UnsupportedModelError, match="chunked_loss: the loss of WholeHead differs in chunks"):
        apply_tokentune(model, chunked_loss=True)


@pytest.mark.parametrize("build", [llama, soft_capped], ids=["plain", "soft-capped"])
def test_verification_finds_that_chunks_are_exact(build: object) -> None:
    assert apply_tokentune(build().float())._tokentune.profile.whole_logits is None


def test_error_in_the_middle_leaves_nothing_behind() -> None:
    model = patched(llama(), True)
    broken = model.register_forward_hook(lambda *call: None)
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda *call: (_ for _ in ()).throw(RuntimeError("in the head")))
    with pytest.raises(RuntimeError, match="in the head"):
        step(model)
    handle.remove(), broken.remove()
    assert not head._forward_pre_hooks and not head._forward_hooks and "_loss_function" not in vars(model)
    assert not torch.overrides._get_current_function_mode_stack()
    assert_same_step(step(model), step(patched(llama(), False)))


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["trained", "frozen"])
@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
def test_sixteen_bits_follow_the_whole_loss(name: str, precision: str) -> None:
    """The head's product in 16 bits, the cross-entropy in float32; sums of chunks round otherwise than one sum."""
    steps = []
    for chunked in (False, True):
        model = patched(MODELS[name](), chunked).to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            loss = model(input_ids=IDS, labels=LABELS, selected_positions=POSITIONS).loss
        assert loss.dtype == torch.float32
        loss.backward()
        steps.append((loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert steps[1][0] == pytest.approx(steps[0][0], rel=1e-6)
    for gradient_name, gradient in steps[0][1].items():
        error = (steps[1][1][gradient_name].float() - gradient.float()).norm() / gradient.float().norm()
        assert error < 0.02, gradient_name


def test_float16_keeps_gradients_of_rare_words() -> None:
    """Probabilities of 2.5e-8, zero in float16, under the loss scaling that is there to keep them."""
    hidden = torch.zeros(1, 4, 8, dtype=torch.float16, requires_grad=True)
    head = nn.Linear(8, 96, dtype=torch.float16).requires_grad_(False)
    head.bias.copy_(torch.cat([torch.zeros(1), torch.full((95,), -17.5)]))
    wide = copy.deepcopy(head).float()
    gradients = []
    for module in (head, wide):
        rows = hidden.detach().to(module.weight.dtype).requires_grad_()
        loss = ChunkedLoss(WithheldRows(module), torch.arange(4)[None])
        with ExitStack() as undo:
            loss.rows.install(undo)
            empty = module(rows)
            value = loss(empty, None, 96, shift_labels=torch.zeros(1, 4, dtype=torch.int64))
        (value * 2.0**16).backward()
        gradients.append(rows.grad.float())
    assert (gradients[0] - gradients[1]).norm() < 0.05 * gradients[1].norm()


# --- memory -----------------------------------------------------------------------------------------------------------


@contextmanager
def saved_shapes() -> Iterator[list[tuple]]:
    shapes: list[tuple] = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield shapes


@pytest.mark.parametrize("name", ["trained", "frozen"])
def test_logits_of_a_large_vocabulary_are_never_kept(name: str) -> None:
    """Bytes kept: the whole logits' float32 softmax (and their upcast's source) against the hidden rows."""
    vocabulary, kept = 128256, {}
    for chunked in (False, True):
        model = LlamaForCausalLM(tiny_llama_config(vocab_size=vocabulary))
        if name == "frozen":
            model = get_peft_model(model, LoraConfig(**LORA))
        patched(model, chunked, tokentune.core.loss.CHUNK_BYTES)
        with SavedForBackward(model) as saved:
            model(input_ids=IDS, labels=IDS, selected_positions=POSITIONS).loss.backward()
        with saved_shapes() as shapes:
            model(input_ids=IDS, labels=IDS, selected_positions=POSITIONS)
        kept[chunked] = saved.bytes
        weights = {tuple(parameter.shape) for parameter in model.parameters()}
        weights |= {shape[::-1] for shape in weights}
        assert any(vocabulary in shape and shape not in weights and 0 not in shape for shape in shapes) is not chunked
    assert kept[False] - kept[True] > 0.95 * 8 * vocabulary * 4  # 8 rows
    assert kept[True] < 200_000


def test_ordinary_training_is_verified_too() -> None:
    verify_chunked_loss(llama())
    verify_chunked_loss(soft_capped())
    with pytest.raises(UnsupportedModelError, match="no language model"):
        verify_chunked_loss(BertForMaskedLM(tiny_bert_config()))
    other = llama()
    other.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum()
    with pytest.raises(UnsupportedModelError, match="loss function of its own"):
        verify_chunked_loss(other)
