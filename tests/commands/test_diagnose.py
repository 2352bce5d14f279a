"""How good a gradient is: statistics against brute force, unbiased estimates, the command's report and refusals."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_input import check_sentence, refusal
from conftest import tiny_llama_config
from matplotlib import pyplot
from torch import Tensor
from transformers import LlamaForCausalLM

from tokentune import apply_tokentune, diagnose
from tokentune.data.collators import CausalCollator, SeededRows
from tokentune.gradients import progress
from tokentune.gradients.draw_statistics import DrawStatistics, RowVariance
from tokentune.gradients.figures import by_part, by_proportion
from tokentune.gradients.measuring import micro_batches, supervised_items, take_gradient, without_dropout
from tokentune.gradients.parts import Part, parts_of
from tokentune.gradients.report import failure_signs
from tokentune.models.adapters import add_adapters

PARTS = {"a": Part(0, "mlp"), "b": Part(0, "norms"), "c": Part(1, "mlp"), "d": Part(None, "head")}
SHAPES = {"a": (3, 4), "b": (5,), "c": (2, 7), "d": (6,)}
FIGURES = {"full_norm", "cosine", "relative_error", "variance", "mean_of_draws"}
OF_MEAN = {
    *("cosine", "cosine_corrected", "relative_norm", "relative_norm_corrected"),
    *("bias_raw", "bias", "bias_squared"),
}


def random_gradient(scale: float = 1.0) -> dict[str, Tensor]:
    return {name: scale * torch.randn(shape, dtype=torch.float64) for name, shape in SHAPES.items()}


def flat(gradient: dict[str, Tensor], names: str = "abcd") -> np.ndarray:
    return np.concatenate([gradient[name].numpy().ravel() for name in names])


# --- statistics -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn() -> tuple[dict[str, Tensor], list[dict[str, Tensor]], dict]:
    torch.manual_seed(1)
    full, draws = random_gradient(), [random_gradient() for _ in range(5)]
    statistics = DrawStatistics(full, PARTS)
    for draw in draws:
        statistics.add(dict(reversed(draw.items())))
    return full, draws, statistics.result(row_variance=7.0, rows=3)


@pytest.mark.parametrize(
    ("names", "find"),
    [
        ("abcd", lambda result: result["whole"]),
        ("ab", lambda result: result["by_layer"][0]),
        ("c", lambda result: result["by_layer"][1]),
        ("ac", lambda result: next(part for part in result["by_kind"] if part["kind"] == "mlp")),
        ("d", lambda result: next(part for part in result["by_kind"] if part["kind"] == "head")),
    ],
)
def test_figures_are_those_of_whole_vectors(names: str, find: Callable, drawn: tuple) -> None:
    full, draws, result = drawn
    g, x = flat(full, names), np.stack([flat(draw, names) for draw in draws])
    norm, mean, held = np.linalg.norm(g), x.mean(0), x.var(0, ddof=1).sum() / len(x)
    cosines = x @ g / np.linalg.norm(x, axis=1) / norm
    errors = np.linalg.norm(x - g, axis=1) / norm
    found = find(result)
    assert found["full_norm"] == pytest.approx(norm)
    for name, values in (("cosine", cosines), ("relative_error", errors)):
        assert found[name]["mean"] == pytest.approx(values.mean())
        assert found[name]["standard_error"] == pytest.approx(values.std(ddof=1) / math.sqrt(len(x)))
    assert found["variance"] == pytest.approx(held * len(x) / norm**2)
    of_mean, bias = found["mean_of_draws"], np.linalg.norm(mean - g)
    assert of_mean["cosine"] == pytest.approx(mean @ g / np.linalg.norm(mean) / norm)
    assert of_mean["relative_norm"] == pytest.approx(np.linalg.norm(mean) / norm)
    assert of_mean["bias_raw"] == pytest.approx(bias / norm)
    assert of_mean["bias_squared"] == pytest.approx((bias**2 - held) / norm**2)
    assert of_mean["bias"] == pytest.approx(math.sqrt(max(bias**2 - held, 0)) / norm)
    assert of_mean["relative_norm_corrected"] == pytest.approx(math.sqrt(max(mean @ mean - held, 0)) / norm)


def test_the_effective_batch_compares_noise_at_equal_signal(drawn: tuple) -> None:
    full, draws, result = drawn
    g, x = flat(full), np.stack([flat(draw) for draw in draws])
    share_of_signal = x.mean(0) @ g / (g @ g)
    added = 3 * x.var(0, ddof=1).sum() / share_of_signal**2
    assert result["whole"]["effective_batch"] == pytest.approx(7.0 / (7.0 + added))


def test_corrected_estimates_are_unbiased() -> None:
    """Draws of known mean and variance, few at a time: the squared bias is right on average, the raw one is not."""
    torch.manual_seed(2)
    full = random_gradient()
    expected = {name: 0.8 * tensor + 0.1 for name, tensor in full.items()}
    truth = np.sum((flat(expected) - flat(full)) ** 2) / np.sum(flat(full) ** 2)
    corrected, raw = [], []
    for _ in range(400):
        statistics = DrawStatistics(full, PARTS)
        for _ in range(3):
            noise = random_gradient(0.7)
            statistics.add({name: tensor + noise[name] for name, tensor in expected.items()})
        of_mean = statistics.result()["whole"]["mean_of_draws"]
        corrected.append(of_mean["bias_squared"])
        raw.append(of_mean["bias_raw"] ** 2)
    error = np.std(corrected, ddof=1) / math.sqrt(len(corrected))
    assert abs(np.mean(corrected) - truth) < 4 * error
    assert np.mean(raw) - truth > 10 * error


def test_variance_between_rows() -> None:
    shares = [random_gradient() for _ in range(6)]
    between = RowVariance()
    for share in shares:
        between.add(share)
    x = np.stack([flat(share) for share in shares])
    assert between.result(float(np.sum(x.sum(0) ** 2))) == pytest.approx((6 * x).var(0, ddof=1).sum())


def test_where_the_full_gradient_is_zero_nothing_is_said() -> None:
    full = random_gradient() | {"d": torch.zeros(SHAPES["d"], dtype=torch.float64)}
    statistics = DrawStatistics(full, PARTS)
    for _ in range(2):
        statistics.add(random_gradient())
    result = statistics.result()
    head = next(part for part in result["by_kind"] if part["kind"] == "head")
    assert head["cosine"] == {"mean": None, "standard_error": None}
    assert head["variance"] is None
    assert result["whole"]["cosine"]["mean"] is not None


# --- parts and gradients of a model -----------------------------------------------------------------------------------


def test_parts_of_a_model_and_of_its_adapters() -> None:
    parts = parts_of(LlamaForCausalLM(tiny_llama_config()))
    assert parts["model.embed_tokens.weight"] == (None, "embeddings")
    assert parts["model.layers.1.self_attn.k_proj.weight"] == (1, "attention k")
    assert parts["model.layers.0.mlp.up_proj.weight"] == (0, "mlp")
    assert parts["model.layers.1.input_layernorm.weight"] == (1, "norms")
    assert parts["model.norm.weight"] == (None, "norms")
    assert parts["lm_head.weight"] == (None, "head")
    tied = parts_of(LlamaForCausalLM(tiny_llama_config(tie_word_embeddings=True)))
    assert set(tied) == set(parts) - {"lm_head.weight"}
    model = LlamaForCausalLM(tiny_llama_config())
    adapted = parts_of(
        add_adapters(model, r=2, alpha=4, dropout=0.0, target_modules=["q_proj", "up_proj"], quantized=False)
    )
    assert {part.kind for part in adapted.values()} == {"adapter of q_proj", "adapter of up_proj"}
    assert {part.layer for part in adapted.values()} == {0, 1}


@pytest.fixture
def rows() -> SeededRows:
    ids = [torch.randint(3, 90, (length,)).tolist() for length in (12, 20, 7, 16, 9)]
    return SeededRows([{"input_ids": row, "labels": [-100] * 3 + row[3:]} for row in ids], seed=5)


def gradient_of(model: LlamaForCausalLM, rows: SeededRows, sequences: int, **options: object) -> dict[str, Tensor]:
    batches = list(micro_batches(rows, CausalCollator(pad_token_id=0, **options), sequences))
    return take_gradient(model, batches, items=supervised_items(batches), bf16=False).gradient


def test_the_full_gradient_is_that_of_the_mean_over_supervised_tokens(rows: SeededRows) -> None:
    plain = LlamaForCausalLM(tiny_llama_config()).double().train()
    losses = []
    for row in rows.rows:
        labels = torch.tensor(row["labels"])
        logits = plain(torch.tensor([row["input_ids"]])).logits[0, :-1].float()  # as transformers' loss has them
        losses.append(torch.nn.functional.cross_entropy(logits, labels[1:], reduction="none")[labels[1:] != -100])
    torch.cat(losses).mean().backward()
    expected = {name: weight.grad.clone() for name, weight in plain.named_parameters()}
    patched = apply_tokentune(plain, verify=False)
    for sequences in (1, 2, 5):
        found = gradient_of(patched, rows, sequences)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7)


def test_all_tokens_selected_are_the_full_gradient_and_micro_batches_change_nothing(rows: SeededRows) -> None:
    model = apply_tokentune(LlamaForCausalLM(tiny_llama_config()).double().train(), verify=False)
    full = gradient_of(model, rows, 2)
    statistics = DrawStatistics(full, parts_of(model))
    for draw in range(2):
        rows.set_epoch(draw)
        statistics.add(gradient_of(model, rows, 2, prefix_length=1.0))
    whole = statistics.result()["whole"]
    assert whole["cosine"]["mean"] == pytest.approx(1.0, abs=1e-12)
    assert whole["relative_error"]["mean"] < 1e-9
    assert whole["mean_of_draws"]["bias"] < 1e-9
    one, three = (gradient_of(model, rows, sequences, prefix_length=0.4) for sequences in (1, 3))
    for name, tensor in one.items():
        torch.testing.assert_close(three[name], tensor, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(one["lm_head.weight"], full["lm_head.weight"])


def test_dropout_is_off_and_comes_back() -> None:
    model = LlamaForCausalLM(tiny_llama_config(attention_dropout=0.5))
    model = add_adapters(model, r=2, alpha=4, dropout=0.5, target_modules=["q_proj"], quantized=False).eval()
    ids = torch.randint(3, 90, (2, 12))
    with without_dropout(model):
        assert model.training
        first, second = (model(ids).logits for _ in range(2))
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert not model.training
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tiny_llama_dir: Path, alpaca_file: Path, tmp_path: Path) -> Callable[..., dict]:
    """Runs diagnose.py on the tiny model; returns its JSON without what differs from run to run."""

    def run(*words: object) -> dict:
        output = tmp_path / "diagnosis.json"
        model = ["--model_name_or_path", tiny_llama_dir, "--dataset_name_or_path", alpaca_file, "--data_cache", "none"]
        sizes = ["--rows", 5, "--draws", 3, "--micro_batch_size", 2, "--max_length", 64, "--skip_verification"]
        given = [*model, *sizes, "--output", output, *words]
        diagnose.main(list(map(str, given)))
        report = json.loads(output.read_text(encoding="utf-8"))
        for times in (report, report["full"], *report["results"]):
            for name in ("finished", "seconds"):
                times.pop(name, None)
        return report

    return run


def test_the_report_is_complete_and_the_same_under_the_seed(
    command: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ("--proportions", 0.2, 1.0, "--selections", "random", "--corrections", 0, 1)
    words += ("--figure", tmp_path / "figures", "--full")
    report = command(*words)
    assert report["schema_version"] == 1
    assert set(report) == {
        *("schema_version", "settings", "model", "data", "full", "results", "recommendation", "warnings", "device"),
        "versions",
    }
    assert set(report["data"]) == {"rows", "row_numbers", "tokens", "supervised_tokens", "micro_batch_size"}
    assert len(set(report["data"]["row_numbers"])) == report["data"]["rows"] == 5
    assert set(report["full"]) == {"loss", "norm", "saved_bytes", "row_variance", "noise_scale"}
    settings = [(result["strategy"], result["correction"], result["proportion"]) for result in report["results"]]
    assert settings == [("random", correction, proportion) for correction in (0, 1) for proportion in (0.2, 1.0)]
    for result in report["results"]:
        assert set(result) == {
            *("strategy", "correction", "proportion", "draws", "selected_tokens", "supervised_selected"),
            *("supervised_share", "loss", "saved_bytes", "saved_ratio", "whole", "by_layer", "by_kind"),
        }
        assert set(result["whole"]) == FIGURES | {"effective_batch"}
        assert set(result["whole"]["mean_of_draws"]) == OF_MEAN
        assert [set(part) for part in result["by_layer"]] == 2 * [FIGURES | {"layer"}]
        assert {part["kind"] for part in result["by_kind"]} >= {"attention q", "attention v", "mlp", "norms", "head"}
    few, everything = report["results"][:2]
    assert everything["whole"]["cosine"]["mean"] == pytest.approx(1.0, abs=1e-6)
    assert everything["selected_tokens"] == report["data"]["tokens"]
    assert everything["saved_ratio"] == 1.0
    assert 0 < few["whole"]["cosine"]["mean"] < 1
    assert few["selected_tokens"] / report["data"]["tokens"] == pytest.approx(0.2, abs=0.02)
    assert few["whole"]["mean_of_draws"] != report["results"][2]["whole"]["mean_of_draws"]  # corrected
    *table, last = capsys.readouterr().out.splitlines()
    assert "effective batch" in " ".join(" ".join(table).split())
    assert last == f"recommendation: {report['recommendation']['message']}"
    for name in ("gradient_by_proportion.png", "gradient_by_part.png"):
        assert (tmp_path / "figures" / name).read_bytes().startswith(b"\x89PNG")
    again = command("--proportions", 0.2, "--selections", "random")
    assert len(capsys.readouterr().out.splitlines()) == 1  # the recommendation
    assert again["results"] == [few]
    assert (again["data"], again["full"]) == (report["data"], report["full"])
    assert command("--proportions", 0.2, "--selections", "random", "--seed", 7)["results"][0]["whole"] != few["whole"]


def test_a_runs_settings_are_taken_as_far_as_they_have_a_meaning(
    command: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    settings = tmp_path / "run.yaml"
    settings.write_text("learning_rate: 1e-3\nlora: true\nlora_r: 2\nprefix_length: '0.9'\n", encoding="utf-8")
    report = command("--config", settings, "--proportions", 0.5)
    assert report["settings"]["lora_r"] == 2
    assert report["results"][0]["by_kind"][0]["kind"].startswith("adapter of")
    assert "--config: without effect here: learning_rate, prefix_length" in capsys.readouterr().err


def test_adapters_are_diagnosed_without_their_dropout(command: Callable) -> None:
    with_dropout, without = (
        command("--lora", "--lora_dropout", rate, "--proportions", 0.3)["results"] for rate in (0.5, 0.0)
    )
    assert with_dropout == without
    assert {part["kind"] for part in without[0]["by_kind"]} == {f"adapter of {n}_proj" for n in ("gate", "up", "down")}


def test_strategies_with_scores_beside_those_without(command: Callable, tiny_llama_dir: Path) -> None:
    strategies = ("--selections", "supervised", "gradient", "excess_loss")
    words = (*strategies, "--selection_reference_model", tiny_llama_dir, "--selection_draw", "top")
    results = {result["strategy"]: result for result in command(*words, "--proportions", 0.05)["results"]}
    assert list(results) == ["supervised", "gradient", "excess_loss"]
    # What is no target scores nothing: as many targets as there are room for, or as a row has.
    assert results["gradient"]["supervised_selected"] == results["supervised"]["supervised_selected"]
    # The highest are the same in each draw, but for what fills up rows with few targets.
    assert results["gradient"]["whole"]["variance"] < 0.2 * results["supervised"]["whole"]["variance"]


def test_answers_beside_numbers(command: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Rows are cut to one length, so that those with fewer answer tokens are filled up: fillers do not count."""
    words = ("--proportions", "answers", "answers+0.50", 0.3, "--figure", tmp_path / "figures", "--full")
    report = command(*words)
    answers, share, number = report["results"]
    assert [result["proportion"] for result in report["results"]] == ["answers", "answers+0.5", 0.3]
    targets, tokens = report["data"]["supervised_tokens"], report["data"]["tokens"]
    assert answers["selected_tokens"] == answers["supervised_selected"] == share["supervised_selected"] == targets
    assert share["selected_tokens"] - targets == pytest.approx(0.5 * (tokens - targets), abs=5)
    assert answers["loss"]["mean"] == pytest.approx(report["full"]["loss"], rel=1e-5)  # no loss is left out
    assert answers["whole"]["variance"] < 1e-9 < share["whole"]["variance"]  # nothing is left to chance
    assert number == command("--proportions", 0.3)["results"][0]
    assert not [warning for warning in report["warnings"] if warning["sign"] == "proportion"]
    assert "answers+0.5" in capsys.readouterr().out


def test_answers_stand_at_their_share_in_the_figure() -> None:
    figures = {"cosine": {"mean": 0.9, "standard_error": 0.01}, "variance": 0.1, "effective_batch": 0.5}
    figures["mean_of_draws"] = {"bias": 0.2}
    kind = {"kind": "mlp"} | figures
    results = [
        {"strategy": "supervised", "correction": 0.0, "proportion": proportion, "selected_tokens": selected}
        | {"whole": figures, "by_layer": [{"layer": 0} | figures], "by_kind": [kind]}
        for proportion, selected in ((0.5, 501.0), ("answers", 120.0), (0.2, 199.0), ("answers+0.2", 290.0))
    ]
    report = {"data": {"tokens": 1000}, "results": results}
    panel = by_proportion(report).axes[0]
    assert [line.get_xdata().tolist() for line in panel.lines if line.get_marker() == "o"] == [
        [0.2, 0.5],
        [0.12],
        [0.29],
    ]
    assert [text.get_text() for text in panel.texts] == ["answers", "answers+0.2"]
    panel = by_part(report).axes[0]
    title = panel.get_title(loc=pyplot.rcParams["axes.titlelocation"])  # as the style of the figures has it
    assert title == "By layer, at proportion answers+0.2"
    pyplot.close("all")


SENTENCES = [
    ("unknown flag", ["--learning_rate", "1"], "unknown argument --learning_rate..."),
    ("proportion", ["--proportions", "0.3", "1.5"], "--proportions 1.5: must be above 0 and at most 1"),
    ("twice", ["--proportions", "0.3", "0.3"], "--proportions: 0.3 occurs twice"),
    ("answers twice", ["--proportions", "answers+0.1", "answers+.1"], "--proportions: answers+0.1 occurs twice"),
    ("no proportion", ["--proportions", "most"], "--proportions most: give numbers above 0 and at most 1 (0.3), ..."),
    ("a schedule", ["--proportions", "answers+0.3:answers"], "--proportions answers+0.3:answers: give numbers..."),
    ("too large a share", ["--proportions", "answers+1.5"], "--proportions answers+1.5: give numbers above 0..."),
    (
        "nothing to choose",
        ["--proportions", "0.3", "answers", "--selections", "random"],
        "--proportions answers with --selections random: it has nothing to choose; add a share of the other tokens, "
        "as in answers+0.1, or leave it out",
    ),
    (
        "scores",
        ["--proportions", "answers+0.1", "--selections", "stratified", "loss"],
        "--proportions answers+0.1 with --selections loss, which draws for a whole row: take one without scores...",
    ),
    (
        "a scoring pass",
        ["--proportions", "answers+0.1", "--selection_pass"],
        "--proportions answers+0.1 with --selection_pass: every supervised token has its loss already...",
    ),
    ("correction", ["--corrections", "2"], "--corrections 2.0: must lie between 0..."),
    (
        "correction of dependent draws",
        ["--selections", "random", "contiguous", "--corrections", "0", "1"],
        "--gradient_correction 1: contiguous does not draw each token independently of the others: take random, or...",
    ),
    ("strategy", ["--selections", "random", "nosuch"], "--selections nosuch: there is no such strategy..."),
    ("rows", ["--rows", "1"], "--rows 1: must be 2 or more"),
    ("too many", ["--rows", "500"], "--rows 500: the training data has 16 rows that can be learnt from; ask for fewer"),
    ("draws", ["--draws", "0"], "--draws 0: must be 2 or more"),
    ("micro-batch", ["--micro_batch_size", "0"], "--micro_batch_size 0: must be 1 or more"),
    ("no folder", ["--output", "{tmp}/none/x.json"], "--output {tmp}/none/x.json: there is no such folder"),
    ("a folder", ["--output", "{tmp}"], "--output {tmp}: give a JSON file"),
    (
        "no reference",
        ["--selections", "excess_loss"],
        "--selections excess_loss takes the loss of a reference model off: add --selection_reference_model",
    ),
    (
        "reference for nothing",
        ["--selection_reference_model", "x"],
        "--selection_reference_model is for --selection excess_loss: leave it out, or take that one",
    ),
    (
        "kernels without masks",
        ["--attn_implementation", "flash_attention_2"],
        "--attn_implementation flash_attention_2 with --tokentune: the positions of selected tokens have gaps...",
    ),
    ("figure", ["--figure", "{data}"], "--figure {data} is a file: give a folder"),
]


@pytest.mark.parametrize(("words", "sentence"), [row[1:] for row in SENTENCES], ids=[row[0] for row in SENTENCES])
@pytest.mark.usefixtures("no_weights_read")
def test_bad_input_is_refused_before_weights_are_read(
    words: list[str],
    sentence: str,
    tiny_llama_dir: Path,
    alpaca_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"tmp": tmp_path, "data": alpaca_file}
    given = {"--model_name_or_path": tiny_llama_dir, "--dataset_name_or_path": alpaca_file, "--data_cache": "none"}
    words = [word.format(**places) for word in words]
    check_sentence(refusal(diagnose.main, given, words, tmp_path, capsys), sentence, **places)


@pytest.mark.parametrize(
    ("changes", "signs"),
    [
        ({}, []),
        ({"proportion": 0.05}, ["proportion"]),
        ({"proportion": "answers"}, []),
        ({"proportion": "answers", "saved_ratio": 0.6}, ["memory"]),  # of 2 % of the tokens
        ({"supervised_share": 0.3}, ["no_loss"]),
        ({"supervised_share": 0.3, "supervised_selected": 100}, ["no_loss"]),
        ({"saved_ratio": 0.8}, ["memory"]),
        ({"proportion": 0.7, "saved_ratio": 0.8}, []),
        ({"cosine": 0.5}, ["direction"]),
    ],
)
def test_failure_signs(changes: dict, signs: list[str]) -> None:
    result = {"strategy": "random", "correction": 0.0, "proportion": 0.3, "saved_ratio": 0.35}
    result |= {"supervised_share": 0.9, "supervised_selected": 30, "selected_tokens": 20}
    result |= {"whole": {"mean_of_draws": {"cosine_corrected": changes.pop("cosine", 0.97)}}} | changes
    data = {"tokens": 1000, "supervised_tokens": 100}
    found = failure_signs(result, data)
    assert [warning["sign"] for warning in found] == signs
    if signs == ["no_loss"]:
        assert ("smaller proportion" in found[0]["message"]) == (result["supervised_selected"] == 100)
    if signs == ["direction"]:
        assert "--corrections 1" in found[0]["message"]
        assert "--gradient_correction" not in failure_signs(result | {"correction": 1.0}, data)[0]["message"]


def test_every_batch_is_counted(command: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Noted(progress.Progress):
        def __init__(self, batches: int) -> None:
            super().__init__(batches)
            made.append(self)

    monkeypatch.setattr(diagnose, "Progress", Noted)
    command("--proportions", 0.2, 0.5)
    (bar,) = made
    assert bar.done == bar.batches == 1 + 3 + 5 + 2 * 3 * 3  # 5 rows, 3 batches of 2, 2 settings of 3 draws
