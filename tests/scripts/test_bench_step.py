"""The step benchmark: its figures against numbers worked out by hand, and its command on tiny models."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bash_scripts import call

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts" / "bench"))

import step
from steps import report
from steps.cases import METHODS, Case, Shape, Variant, build, inner_model, shrunk, switch, variants
from steps.measure import Bench, allocations, measure
from steps.sequence_chunks import ChunkedStep
from steps.suites import CPU_SUITES, GPU_SUITES, cases_of

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"
TINY = Shape("tiny", 32, 48, 2, 4, 2, 64)
CASE = Case("custom", TINY, variants(("full", "checkpointing", "tokentune")), length=16, rounds=1)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    """Runs the command in this process; returns its exit code and all that it printed."""

    def call(*flags: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["step.py", "--device", "cpu", *flags])
        code = 0
        try:
            step.main()
        except SystemExit as error:
            code = error.code
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return call


@pytest.mark.parametrize("train", ["full", "lora"])
@pytest.mark.parametrize("chunk", [5, 8, 16])
def test_a_sequence_in_chunks_has_the_gradient_of_ordinary_training(train: str, chunk: int) -> None:
    model = build(replace(CASE, train=train), "cpu").double()
    ids = torch.randint(0, 64, (2, 16))
    labels = ids.clone()
    labels[0, :9] = -100
    model(input_ids=ids, labels=labels).loss.backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    step_in_chunks = ChunkedStep(inner_model(model), ids, labels, chunk)
    assert step_in_chunks.kept_bytes == 2 * 2 * 2 * 2 * 16 * 8 * 8  # layers, keys and values, (B, G, S, d), float64
    step_in_chunks.backward()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            torch.testing.assert_close(weight.grad, expected[name], rtol=0, atol=1e-12)


# -------------------------------------------------------------------------------------------------------- what it says


@pytest.mark.parametrize(("count", "low", "high"), [(3, 0, 2), (6, 0, 5), (9, 1, 7), (11, 1, 9), (20, 5, 14)])
def test_interval_holds_the_median_with_95_percent(count: int, low: int, high: int) -> None:
    """Ranks from a table of the sign test's confidence limits for the median."""
    values = [float(n) for n in range(count)]
    assert report.median_with_interval(values[::-1]) == [low, (count - 1) / 2, high]


def test_power_fit_finds_the_exponent() -> None:
    fit = report.fit_power([(n, 3 * n**1.5) for n in (512, 1024, 2048)])
    assert fit["exponent"] == pytest.approx(1.5) and fit["r_squared"] == pytest.approx(1)


def layer_rows(layers: int, checkpointing: int, tokentune: int) -> list[dict]:
    common = {"suite": "layers", "train": "full", "key_value_heads": 4, "layers": layers, "dtype": "float32"}
    methods = {"checkpointing_chunked": checkpointing, "tokentune_checkpointing": tokentune}
    return [common | {"method": method, "saved_bytes": size} for method, size in methods.items()]


def test_bytes_per_added_layer_leave_out_what_is_there_once() -> None:
    rows = layer_rows(6, 1000 + 6 * 100, 7 + 6 * 65) + layer_rows(32, 1000 + 32 * 100, 7 + 32 * 65)
    added = {entry["method"]: entry for entry in report.per_added_layer(rows)}
    assert added["checkpointing_chunked"]["bytes_per_added_layer"] == 100
    assert added["tokentune_checkpointing"]["ratio_to_checkpointing_chunked"] == pytest.approx(0.65)
    (bound,) = report.bounds(rows, list(added.values()))
    assert bound["holds"] and bound["bound"] == 0.66


def test_a_bound_holds_where_the_interval_reaches_it() -> None:
    row = {"suite": "table", "method": "tokentune", "dtype": "float32", "train": "full", "key_value_heads": 4}
    for interval, holds in (([0.51, 0.54, 0.6], True), ([0.53, 0.54, 0.6], False)):
        (bound,) = report.bounds([row | {"time_ratio_to_full": interval}], [])
        assert bound["holds"] is holds and bound["interval"] == [interval[0], interval[2]]


def test_claims_are_shares_of_full_trainings_peak() -> None:
    peaks = {("full", "full"): 100, ("full", "tokentune"): 70, ("qlora", "full"): 40}
    rows = [{"suite": "gpu_7b", "train": t, "method": m, "peak_bytes": peak} for (t, m), peak in peaks.items()]
    assert [(claim["paper"], claim["measured"]) for claim in report.claims(rows)] == [(0.72, 0.7), (0.37, 0.4)]


# ---------------------------------------------------------------------------------------------------------- measuring


def test_allocations_are_exact() -> None:
    kept = []

    def work() -> None:
        big = torch.ones(1000)  # 4,000 bytes, freed at the end
        kept.append(big[:250].clone())  # 1,000 bytes, kept

    assert allocations(work) == (1000, 5000)


def test_memory_of_a_step_is_in_order() -> None:
    """Held bytes are what autograd saved, the loss aside; the peak holds weights, these, and gradients."""
    case = replace(CASE, variants=variants(("full",)), length=64)
    (row,) = measure(Bench(case, "cpu", seed=0))
    parameters = sum(p.numel() for p in build(case, "cpu").parameters())
    assert row["gradients_bytes"] == 4 * parameters and row["optimizer_bytes"] == 0
    assert row["held_bytes"] == pytest.approx(row["saved_bytes"], rel=0.02)
    assert row["peak_bytes"] > row["weights_bytes"] + row["saved_bytes"]
    assert len(row["seconds"]) == 1 and row["seconds"][0] > row["forward_seconds"][0] > 0


def test_optimizer_counts() -> None:
    (row,) = measure(Bench(replace(CASE, variants=variants(("full",)), optimizer=True), "cpu", seed=0))
    assert row["optimizer_bytes"] == pytest.approx(2 * row["gradients_bytes"], rel=0.01)  # AdamW's moments, its steps


def test_weights_do_not_move() -> None:
    bench = Bench(replace(CASE, optimizer=True), "cpu", seed=0)
    before = [parameter.clone() for parameter in bench.model.parameters()]
    measure(bench)
    assert all(torch.equal(one, other) for one, other in zip(before, bench.model.parameters(), strict=True))


def test_methods_do_not_leak_into_each_other() -> None:
    bench = Bench(replace(CASE, variants=variants(("full", "tokentune_checkpointing", "full"))), "cpu", seed=0)
    first, *_, last = (bench.saved_bytes(variant) for variant in bench.case.variants)
    assert first == last
    switch(bench.model, "full")
    assert not hasattr(bench.model, "_tokentune") and not bench.model.is_activation_checkpointing


def test_a_chunked_loss_is_the_baselines_too() -> None:
    """All tokens keep their gradients: the loss and the weights' gradients of plain training, without its logits."""
    bench = Bench(replace(CASE, variants=variants(("full", "full_chunked", "checkpointing_chunked"))), "cpu", seed=0)
    losses, gradients, saved = [], [], []
    for variant in bench.case.variants:
        switch(bench.model, variant.method)
        bench.clear()
        loss = bench.forward(variant)
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in bench.model.parameters() if p.requires_grad]))
        saved.append(bench.saved_bytes(variant))
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-6)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-6)
    logits = bench.ids.numel() * TINY.vocabulary * 4
    assert saved[1] <= saved[0] - logits and saved[2] < saved[1]


def test_answers_select_the_positions_that_predict_them() -> None:
    bench = Bench(replace(CASE, variants=variants(("tokentune",), (None,)), answers=0.25), "cpu", seed=0)
    assert bench.positions[None].tolist() == [[11, 12, 13, 14]] * CASE.batch
    assert (bench.labels[0] == -100).sum() == 12
    assert torch.isfinite(bench.forward(bench.case.variants[0]))


def test_no_room_is_noted_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(CASE, "cpu", seed=0)
    forward = bench.forward

    def too_large(variant: Variant) -> torch.Tensor:
        if variant.method == "checkpointing":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(variant)

    monkeypatch.setattr(bench, "forward", too_large)
    rows = {row["method"]: row for row in measure(bench)}
    assert rows["checkpointing"]["error"] == "out of memory" and "saved_bytes" not in rows["checkpointing"]
    report.add_ratios(list(rows.values()))
    assert rows["tokentune"]["bytes_ratio_to_full"] < 1 and "bytes_ratio_to_checkpointing" not in rows["tokentune"]


def test_any_other_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(CASE, "cpu", seed=0)

    def broken(variant: Variant) -> torch.Tensor:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(bench, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        measure(bench)


def test_qlora_tells_dequantisation_from_the_rest() -> None:
    pytest.importorskip("bitsandbytes")
    shape = replace(TINY, hidden_size=64, intermediate_size=64)
    (row,) = measure(Bench(Case("custom", shape, (Variant("full"),), train="qlora", length=16, rounds=1), "cpu", 0))
    split = row["dequantisation"]
    assert 0 < split["dequantisation_seconds"] < split["step_seconds"]
    # Forward: 14 linear layers. Backward: those that a gradient passes through, in the first layer the last one alone,
    # as its MLP's own input needs none. Each for its weights and once more for their scales.
    assert split["calls"] >= 2 * (14 + 8)
    whole = sum(p.numel() for p in build(replace(CASE, shape=shape), "cpu").parameters()) * 4
    assert row["weights_bytes"] < whole / 2


# ----------------------------------------------------------------------------------------------------------- the suites


def test_suites_have_no_case_twice_and_a_base_for_every_ratio() -> None:
    cases = cases_of(["cpu", "gpu"])
    settings = [json.dumps(case.settings(v), sort_keys=True) for case in cases for v in case.variants]
    assert len(settings) == len(set(settings))
    assert all({"full", "checkpointing"} & {v.method for v in case.variants} for case in cases)
    assert {case.suite for case in cases} == {*CPU_SUITES, *GPU_SUITES}


def test_small_cases_keep_what_they_vary() -> None:
    for names in (["length"], ["depth"], ["layers"], ["long"], ["gpu_length"]):
        cases = cases_of(names)
        assert len({shrunk(case) for case in cases}) == len(cases)


def test_all_methods_are_measured_somewhere() -> None:
    assert {variant.method for case in cases_of(["cpu", "gpu"]) for variant in case.variants} == set(METHODS)


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command_goes_on_where_it_stopped(run: Callable, tmp_path: Path) -> None:
    output = tmp_path / "step.json"
    flags = ["--small", "--output", str(output), "--rounds", "1", "--train", "full", "--methods", "full", "tokentune"]
    code, _ = run(*flags, "--key_value_heads", "4")
    assert code == 0
    rows = json.loads(output.read_text())["rows"]
    assert [row["method"] for row in rows] == ["full", "tokentune"]
    assert rows[1]["bytes_ratio_to_full"] < 1 and len(rows[1]["time_ratio_to_full"]) == 3
    code, printed = run(*flags, "--key_value_heads", "4", "16")
    assert code == 0 and "1 of 2 models measured already" in printed
    written = json.loads(output.read_text())
    assert written["rows"][:2] == rows and len(written["rows"]) == 4
    assert written["machine"]["versions"]["torch"] == torch.__version__ and written["seed"] == 0

    code, printed = run(*flags, "--seed", "1")
    assert code == 2 and "--seed 0" in printed and "--fresh" in printed
    assert json.loads(output.read_text()) == written


def test_time_up_leaves_the_rest_for_the_next_call(run: Callable, tmp_path: Path) -> None:
    output = tmp_path / "step.json"
    code, printed = run("--small", "--output", str(output), "--rounds", "0", "--minutes", "0")
    assert code == 0 and "4 models left" in printed and not output.exists()


def test_bad_flags_end_with_a_sentence(run: Callable, tmp_path: Path) -> None:
    output = tmp_path / "step.json"
    code, printed = run("--output", str(output), "--key_value_heads", "3")
    assert code == 2 and printed.startswith("error: --key_value_heads 3") and not output.exists()
    output.write_text('{"schema_version": 1}')
    code, printed = run("--output", str(output), "--small")
    assert code == 2 and "--fresh" in printed


def test_the_gpu_suites_run_on_the_cpu(run: Callable, tmp_path: Path) -> None:
    output = tmp_path / "step.json"
    code, printed = run("--small", "--suites", "gpu_7b", "--output", str(output))
    assert code == 0, printed
    result = json.loads(output.read_text())
    assert len(result["rows"]) == 24 and not any("error" in row for row in result["rows"])
    assert [claim["paper"] for claim in result["claims"]] == [0.72, 0.37, 0.21]
    assert all(row["optimizer_bytes"] > 0 and row["tokens_per_second"] > 0 for row in result["rows"])


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_the_scripts_call_the_command(name: str, recorder: tuple, tmp_path: Path) -> None:
    environment, calls = recorder
    done = call(BENCH / f"{name}.sh", "--small", cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    ((unbuffered, script, *flags),) = calls()
    assert (unbuffered, script) == ("-u", str(BENCH / "step.py"))
    assert flags[flags.index("--suites") + 1] == name
    assert flags[flags.index("--output") + 1] == str(BENCH / "results" / f"step_{name}.json")
    assert flags[-1] == "--small"
