"""Task heads: outputs, loss and gradients by the definition, for the selections that the model draws."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import oracle
import pytest
import torch
from conftest import tiny_bert_config, tiny_llama_config
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    MixtralConfig,
    MixtralForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

import tokentune.core.model_sampling
from tokentune import apply_tokentune
from tokentune.core.patched import profile_of
from tokentune.core.profile import Pooling
from tokentune.core.saved_tensors.saved_bytes import SavedForBackward
from tokentune.sampling.sampler import Selection

BATCH, LENGTH, PROPORTION = 3, 17, 0.4
SEPARATE = ("q_proj", "k_proj", "v_proj")
MASK = torch.ones(BATCH, LENGTH, dtype=torch.long)
MASK[1, -5:] = 0
MASK[2, -9:] = 0
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
IMAGE = {"image_size": 16, "patch_size": 4, "num_labels": 3}  # 16 patches and the class token: LENGTH as well


def vit_config() -> ViTConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return ViTConfig(**sizes, **IMAGE, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def modern_bert() -> nn.Module:
    """Global and local layers, and a head that averages over all tokens."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    tokens = {f"{name}_token_id": n for n, name in enumerate(("pad", "bos", "eos", "cls", "sep"))}
    head = {"classifier_pooling": "mean", "num_labels": 3}
    return ModernBertForSequenceClassification(
        ModernBertConfig(**sizes, **tokens, **head, vocab_size=96, local_attention=6)
    )


def per_token(logits: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
    """Mean cross-entropy over the selected positions that have a label: logits (B, S, C), labels (B, S)."""
    chosen = oracle.chosen_mask(positions, labels.shape[1])
    return cross_entropy(logits[chosen], labels[chosen])


@dataclass
class Head:
    """A model with a head, what its labels look like, and its loss from the logits (B, S, C) or (B, C)."""

    build: Callable[[], nn.Module]
    family: tuple[str, tuple[str, ...]]
    labels: Callable[[Tensor], Tensor]  # of the token ids (B, S)
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]  # (logits, labels, positions)
    all_rows: bool = False  # the head looks at every token: those of the rest are constants to it


def bert(cls: type, **changes: object) -> Callable[[], nn.Module]:
    return lambda: cls(tiny_bert_config(**changes))


def llama(cls: type, **changes: object) -> Callable[[], nn.Module]:
    return lambda: cls(tiny_llama_config(pad_token_id=0, **changes))


def classes(ids: Tensor) -> Tensor:
    return torch.arange(BATCH) % 3


def classes_in_a_column(ids: Tensor) -> Tensor:
    return classes(ids)[:, None]


def words(ids: Tensor) -> Tensor:
    return ids.masked_fill((ids % 3 == 0) | (MASK == 0), -100)


def tags(ids: Tensor) -> Tensor:
    return (ids % 5).masked_fill((ids % 3 == 0) | (MASK == 0), -100)


def of_classes(logits: Tensor, labels: Tensor, _: Tensor) -> Tensor:
    return cross_entropy(logits, labels.flatten())


HEADS = {
    "causal-lm": Head(llama(LlamaForCausalLM), oracle.LLAMA, words, oracle.next_token_loss),
    "masked-lm": Head(bert(BertForMaskedLM), oracle.BERT, words, per_token),
    "tokens": Head(bert(BertForTokenClassification, num_labels=5), oracle.BERT, tags, per_token),
    "tokens-decoder": Head(
        llama(LlamaForTokenClassification, num_labels=5, classifier_dropout=0.0), oracle.LLAMA, tags, per_token
    ),
    "sequence": Head(bert(BertForSequenceClassification, num_labels=3), oracle.BERT, classes, of_classes),
    "sequence-several": Head(
        bert(BertForSequenceClassification, num_labels=3),
        oracle.BERT,
        lambda ids: (ids[:, :3] % 2).float(),
        lambda logits, labels, _: binary_cross_entropy_with_logits(logits, labels),
    ),
    "sequence-number": Head(
        bert(BertForSequenceClassification, num_labels=1),
        oracle.BERT,
        lambda ids: ids[:, 0] / 50,
        lambda logits, labels, _: mse_loss(logits.squeeze(), labels),
    ),
    "sequence-last-token": Head(llama(LlamaForSequenceClassification, num_labels=3), oracle.LLAMA, classes, of_classes),
    "sequence-column": Head(
        bert(BertForSequenceClassification, num_labels=3), oracle.BERT, classes_in_a_column, of_classes
    ),
    "sequence-last-token-column": Head(
        llama(LlamaForSequenceClassification, num_labels=3), oracle.LLAMA, classes_in_a_column, of_classes
    ),
    "sequence-mean": Head(modern_bert, ("layers", ("Wqkv",)), classes, of_classes, all_rows=True),
    "image": Head(lambda: ViTForImageClassification(vit_config()), ("layers", SEPARATE), classes, of_classes),
    "image-column": Head(
        lambda: ViTForImageClassification(vit_config()), ("layers", SEPARATE), classes_in_a_column, of_classes
    ),
}


@contextmanager
def definition(head: Head, model: nn.Module, positions: Tensor) -> Iterator[None]:
    """The oracle's, and for a head that looks at all rows those of the rest are constants behind the last layer too."""
    last = next(m for n, m in model.named_modules() if n.endswith(head.family[0]) and isinstance(m, nn.ModuleList))[-1]

    def keep(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return torch.where(oracle.chosen_mask(positions, LENGTH)[..., None], output, output.detach())

    with oracle.constants_outside(model, positions, head.family):
        handle = last.register_forward_hook(keep) if head.all_rows else None
        yield
        if handle is not None:
            handle.remove()


def inputs_of(name: str) -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (BATCH, LENGTH)).masked_fill(MASK == 0, 0)
    if name.startswith("image"):
        return {"pixel_values": torch.randn(BATCH, 3, 16, 16), "labels": HEADS[name].labels(ids)}
    return {"input_ids": ids, "attention_mask": MASK, "labels": HEADS[name].labels(ids)}


def recorded_draws(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    drawn, select = [], tokentune.core.model_sampling.select_tokens

    def record(*args: object, **options: object) -> Selection:
        selection = select(*args, **options)
        drawn.append(selection.positions)
        return selection

    monkeypatch.setattr(tokentune.core.model_sampling, "select_tokens", record)
    return drawn


def same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    scale = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        error = (found[name] - gradient).abs().max() / max(gradient.abs().max(), 1e-2 * scale)
        assert error < 1e-4, f"{name}: {error:.1e}"


@pytest.mark.parametrize("name", HEADS)
def test_a_drawn_selection_follows_the_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, gradients and output of a step whose selection the model draws, for the positions that it drew."""
    head, inputs, drawn = HEADS[name], inputs_of(name), recorded_draws(monkeypatch)
    model = apply_tokentune(head.build().train(), PROPORTION)
    for _ in range(3):
        drawn.clear()
        out = model(**inputs)
        (positions,) = drawn
        assert positions.shape == (BATCH, 7)  # round(0.4 x 17)
        found = oracle.gradients(model, out.loss)
        unlabelled = {key: value for key, value in inputs.items() if key != "labels"}
        with definition(head, model, positions):
            logits = model(**unlabelled).logits
        expected = head.loss(logits, inputs["labels"], positions)
        assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
        same_gradients(found, oracle.gradients(model, expected))
        if logits.ndim == 2:
            assert (out.logits - logits).abs().max() < 1e-5  # of every sequence, as ever
        else:
            real = MASK.gather(1, positions).bool()
            chosen = logits.gather(1, positions[..., None].expand(-1, -1, logits.shape[2]))
            assert (out.logits - chosen)[real].abs().max() < 1e-5


@pytest.mark.parametrize("name", ["causal-lm", "masked-lm", "tokens", "tokens-decoder"])
def test_every_row_with_a_label_keeps_one(name: str) -> None:
    """One supervised token per row, and one selected token per row: the draw has to be that one, or the loss is NaN."""
    inputs = inputs_of(name)
    only = torch.tensor([9, 4, 6])[:, None]
    inputs["labels"] = torch.full((BATCH, LENGTH), -100).scatter(1, only, 2)
    model = apply_tokentune(HEADS[name].build().train(), 1)
    for _ in range(5):
        assert model(**inputs).loss.isfinite()


@pytest.mark.parametrize("name", ["sequence", "image", "sequence-last-token"])
def test_the_pooled_token_is_always_drawn(name: str) -> None:
    """With a single selected token: the pooled one, so that the head and the layers below it have gradients."""
    model = apply_tokentune(HEADS[name].build().train(), 1)
    model(**inputs_of(name)).loss.backward()
    layer = next(m for n, m in model.named_modules() if n.endswith(HEADS[name].family[0] + ".0"))
    gradients = {n: p.grad for n, p in layer.named_parameters() if n.split(".")[-2] not in ("key", "k_proj")}
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())


DECODERS = {
    "llama": (llama(LlamaForSequenceClassification, num_labels=3), oracle.LLAMA),
    "gpt2": (
        lambda: GPT2ForSequenceClassification(
            GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, num_labels=3, pad_token_id=0, **NO_DROPOUT)
        ),
        ("h", ("c_attn",)),
    ),
}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_pool_the_last_token_that_has_not_the_pad_tokens_id(
    name: str, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the pad token ends texts too, real tokens have its id: at the end, in the middle, before one another."""
    build, family = DECODERS[name]
    drawn = recorded_draws(monkeypatch)
    model = apply_tokentune(build().double().train(), 1)
    assert profile_of(model).pooling is Pooling.LAST_NON_PAD
    mask = MASK if side == "right" else MASK.flip(1)
    ids = torch.randint(3, 90, mask.shape).masked_fill(mask == 0, 0)
    last = LENGTH - 1 - mask.flip(1).argmax(1)
    for row, endings in enumerate((1, 3, 0)):  # real tokens at the end with the pad token's id
        ids[row, last[row] + 1 - endings : last[row] + 1] = 0
    ids[2, last[2] - 2] = 0
    out = model(input_ids=ids, attention_mask=mask, labels=torch.arange(BATCH))
    (positions,) = drawn
    assert positions.flatten().tolist() == [last[0] - 1, last[1] - 3, last[2]]
    found = oracle.gradients(model, out.loss)
    with oracle.constants_outside(model, positions, family):
        logits = model(input_ids=ids, attention_mask=mask).logits
    expected = cross_entropy(logits, torch.arange(BATCH))
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    same_gradients(found, oracle.gradients(model, expected))
    with pytest.raises(ValueError, match="pools the last token that has not the pad token's id"):
        model(input_ids=ids, attention_mask=mask, labels=torch.arange(BATCH), selected_positions=last[:, None])


def test_the_last_place_is_pooled_where_there_are_no_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = recorded_draws(monkeypatch)
    model = apply_tokentune(DECODERS["llama"][0]().train(), 1)
    model(inputs_embeds=torch.randn(2, 9, 32), labels=torch.arange(2))
    assert drawn[0].tolist() == [[8], [8]]


@pytest.mark.parametrize("name", ["sequence", "sequence-last-token"])
def test_a_head_that_pools_padding_is_refused(name: str) -> None:
    """On the left of an encoder's texts, or with another id than the head looks for: no token would be trained."""
    model, inputs = apply_tokentune(HEADS[name].build().train(), 2), inputs_of(name)
    if name == "sequence":
        inputs |= {key: inputs[key].flip(1) for key in ("input_ids", "attention_mask")}
    else:
        inputs["input_ids"] = inputs["input_ids"].masked_fill(MASK == 0, 1)
    with pytest.raises(ValueError, match="pools a padding token"):
        model(**inputs)


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_question_answering_draws_both_ends_of_the_answer(shape: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss compares all tokens of a row: those of the rest take part as constants."""
    drawn = recorded_draws(monkeypatch)
    model = apply_tokentune(BertForQuestionAnswering(tiny_bert_config()).train(), PROPORTION)
    ids = inputs_of("masked-lm")["input_ids"]
    start, end = torch.tensor([3, 9, 0]), torch.tensor([5, 11, 200])  # the last one lies outside: ignored
    answers = {"start_positions": start.view(shape), "end_positions": end.view(shape)}
    out = model(input_ids=ids, attention_mask=MASK, **answers)
    (positions,) = drawn
    assert (positions == start[:, None]).any(1).all() and (positions == end[:, None]).any(1).tolist() == [
        True,
        True,
        False,
    ]
    found = oracle.gradients(model, out.loss)
    head = Head(lambda: model, oracle.BERT, classes, of_classes, all_rows=True)
    with definition(head, model, positions):
        logits = model(input_ids=ids, attention_mask=MASK)
    expected = cross_entropy(logits.start_logits, start) + cross_entropy(logits.end_logits[:2], end[:2])
    assert out.loss.item() == pytest.approx(expected.item() / 2, rel=1e-5)
    same_gradients(found, oracle.gradients(model, expected / 2))
    with SavedForBackward(model) as saved:
        model(input_ids=ids, attention_mask=MASK, start_positions=start, end_positions=end)
    with SavedForBackward(model) as saved_full:
        model(input_ids=ids, attention_mask=MASK)
    assert saved.bytes < 0.7 * saved_full.bytes


def test_the_routers_auxiliary_loss_is_refused() -> None:
    """It is recorded by hooks, once per group: two entries per layer where the loss expects one."""
    config = {**tiny_llama_config().to_dict(), "model_type": "mixtral", "num_local_experts": 4}
    model = apply_tokentune(MixtralForCausalLM(MixtralConfig(**config)).train(), 0.3)
    ids = torch.randint(3, 90, (2, 9))
    with pytest.raises(ValueError, match="output_router_logits"):
        model(input_ids=ids, labels=ids, output_router_logits=True)
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits"):
        model(input_ids=ids, labels=ids)
    assert model.eval()(input_ids=ids, labels=ids).aux_loss is not None
