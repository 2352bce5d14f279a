"""The quick start: its generated data, tokenizer and tasks. The whole run is slow: QUICKSTART_RUN=1 turns it on."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CODE = ROOT / "scripts" / "quickstart"


@pytest.fixture(scope="module")
def quickstart():
    """The quick start's modules, importable as its commands import them."""
    sys.path.insert(0, str(CODE))
    import make_base
    import make_data
    import results
    import skills

    yield type("Modules", (), {"base": make_base, "data": make_data, "results": results, "skills": skills})
    sys.path.remove(str(CODE))


@pytest.fixture(scope="module")
def tokenizer(quickstart, tmp_path_factory):
    return quickstart.base.train_tokenizer(quickstart.skills.make_world(0), 0, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart") / "data"
    command = [sys.executable, str(CODE / "make_data.py"), "--output_dir", str(folder), "--seed", "3"]
    subprocess.run(command, check=True, cwd=folder.parent)
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_same_seed_same_world_and_data_another_seed_another(quickstart):
    world, other = quickstart.skills.make_world(0), quickstart.skills.make_world(1)
    assert world == quickstart.skills.make_world(0) and world != other
    for name in quickstart.skills.SKILLS:
        first = quickstart.data.skill_questions(name, world, 0)
        assert first == quickstart.data.skill_questions(name, world, 0)
        assert first != quickstart.data.skill_questions(name, world, 1)


def test_names_are_different_and_a_capital_is_no_country(quickstart):
    capitals = quickstart.skills.make_world(5).capitals
    assert len(capitals) == quickstart.skills.COUNTRIES
    assert len({*capitals, *capitals.values()}) == 2 * len(capitals)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_held_out_subject_is_trained_on(quickstart, seed):
    world = quickstart.skills.make_world(seed)
    for name in quickstart.skills.SKILLS:
        training, held_out = quickstart.data.skill_questions(name, world, seed)
        assert len(training) == quickstart.data.TRAINING_QUESTIONS
        assert len({(q.instruction, q.input) for q in held_out}) == quickstart.data.HELD_OUT_QUESTIONS
        assert not {q.subject for q in training} & {q.subject for q in held_out}, name


def test_a_sum_that_is_held_out_is_asked_by_no_skill(quickstart):
    world = quickstart.skills.make_world(0)
    (training, held_out), (others, also) = (quickstart.data.skill_questions(name, world, 0) for name in ("sum", "page"))
    assert not {q.subject for q in [*training, *others]} & {q.subject for q in [*held_out, *also]}


def test_held_out_files_share_no_question_with_the_training_file(data_folder, quickstart):
    """On the written files alone, without the generator's own idea of a subject: words compared as sets."""
    training = rows_of(data_folder / "train.jsonl")
    asked = {(row["output"], frozenset((row["instruction"] + " " + row["input"]).split())) for row in training}
    assert {tuple(row) for row in training} == {("instruction", "input", "output")}
    names = sorted(path.stem for path in (data_folder / "held_out").iterdir())
    assert names == sorted(quickstart.skills.SKILLS)
    for name in names:
        for row in rows_of(data_folder / "held_out" / f"{name}.jsonl"):
            words = frozenset((row["instruction"] + " " + row["input"]).split())
            assert (row["output"], words) not in asked


def test_every_answer_is_right(data_folder, quickstart):
    """Each answer worked out anew from the question's text."""
    world = quickstart.skills.make_world(3)
    questions = rows_of(data_folder / "train.jsonl")
    for path in (data_folder / "held_out").iterdir():
        questions += rows_of(path)
    categories = quickstart.skills.CATEGORIES
    counts = dict.fromkeys(quickstart.skills.SKILLS, 0)
    for row in questions:
        instruction, words = row["instruction"], row["input"].split()
        numbers = [int(word) for word in instruction.strip("?.").split() if word.isdigit()]
        if numbers:
            kind, answer = "page" if ". " in instruction else "sum", str(sum(numbers))
        elif "capital" in instruction:
            country = next(word for word in instruction.strip("?.").split() if word in world.capitals)
            kind, answer = "capital", world.capitals[country]
        elif words[0].isdigit():
            kind, answer = "numbers", " ".join(sorted(words, key=int))
        elif category := next((name for name in categories if name in instruction), None):
            (answer,) = set(words) & set(categories[category])
            kind = "find"
        else:
            kind, answer = "words", " ".join(sorted(words))
        counts[kind] += 1
        assert row["output"] == answer, row
        assert row["input"] != answer, "repeating the list must not be right"
    assert all(counts.values()), counts


def test_base_reads_neither_questions_nor_the_prompt(quickstart):
    world, rng = quickstart.skills.make_world(0), random.Random(0)
    text = "\n".join(quickstart.skills.random_note(rng, world) for _ in range(5000))
    for mark in ("###", "Instruction", "Response", "?", "capital city", "together", "A to Z", "size"):
        assert mark not in text


def test_tokenizer_round_trips_and_keeps_words_whole(quickstart, tokenizer):
    world, rng = quickstart.skills.make_world(0), random.Random(1)
    texts = [quickstart.skills.random_note(rng, world) for _ in range(300)]
    texts += ["Fünf Äpfel – 5 €?\n\n  two  spaces\t"]  # unseen characters go through bytes
    for text in texts:
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    for word in (*quickstart.skills.WORDS, *(str(n) for n in range(1, quickstart.skills.LARGEST_NUMBER + 1))):
        assert tokenizer.tokenize(f"\n{word} {word}?")[1:3] == [word, f"▁{word}"], "one token, whatever mark follows"


def test_a_prompt_fits_and_its_answer_starts_with_a_token_of_its_own(quickstart, tokenizer):
    """Within `--max_length`; below a page, the prompt is many times as long as the answer."""
    from tokentune.data.prompts import DEFAULT_TEMPLATE, PromptTemplate

    template, world, rng = PromptTemplate.load(DEFAULT_TEMPLATE), quickstart.skills.make_world(0), random.Random(2)
    most = int(re.search(r"--max_length (\d+)", (ROOT / "scripts" / "quickstart.sh").read_text())[1])
    for name, skill in quickstart.skills.SKILLS.items():
        for _ in range(50):
            question = skill.question(rng, world, None)
            prompt = template.prompt(question.instruction, question.input)
            ids, whole = tokenizer(prompt).input_ids, tokenizer(prompt + question.output).input_ids
            assert whole[: len(ids)] == ids and len(whole) < most  # an end token is added
            assert name != "page" or len(ids) > 60 * (len(whole) - len(ids))


def test_pretraining_rows_are_full_and_repeatable(quickstart, tokenizer):
    world = quickstart.skills.make_world(0)
    rows = quickstart.base.pretraining_rows(world, 0, tokenizer, 40)
    assert rows.shape == (40, quickstart.base.ROW_TOKENS)
    assert torch.equal(rows, quickstart.base.pretraining_rows(world, 0, tokenizer, 40))
    assert (rows == tokenizer.eos_token_id).sum() > 10 and (rows != tokenizer.unk_token_id).all()


def test_pretraining_lowers_the_loss(quickstart, tokenizer):
    torch.manual_seed(0)
    model = quickstart.base.new_model(tokenizer)
    rows = quickstart.base.pretraining_rows(quickstart.skills.make_world(0), 0, tokenizer, 4 + 32)
    unseen, seen = rows[:4], rows[4:].repeat(12, 1)
    with torch.no_grad():
        start = model(input_ids=unseen, labels=unseen).loss.item()
    mean = quickstart.base.pretrain(model, seen)
    with torch.no_grad():
        end = model(input_ids=unseen, labels=unseen).loss.item()
    assert end < start - 1.0 and mean < start


def test_lm_eval_loads_the_tasks_with_the_training_prompt(data_folder, quickstart, monkeypatch):
    tasks = pytest.importorskip("lm_eval.tasks")
    from tokentune.data.prompts import DEFAULT_TEMPLATE, PromptTemplate

    monkeypatch.chdir(data_folder.parent)
    manager = tasks.TaskManager(include_path=str(CODE / "tasks"), include_defaults=False)
    names = [f"quickstart_{name}" for name in quickstart.skills.SKILLS]
    assert sorted(manager.all_groups) == ["quickstart"] and sorted(manager.all_subtasks) == sorted(names)
    template = PromptTemplate.load(DEFAULT_TEMPLATE)
    loaded = manager.load(names)["tasks"]
    for name in quickstart.skills.SKILLS:
        task = loaded[f"quickstart_{name}"]
        rows = rows_of(data_folder / "held_out" / f"{name}.jsonl")
        documents = list(task.test_docs())
        assert documents == rows
        assert task.doc_to_text(documents[0]) == template.prompt(rows[0]["instruction"], rows[0]["input"])
        assert task.doc_to_target(documents[0]) == rows[0]["output"]
        assert task.config.num_fewshot in (None, 0) and task.config.generation_kwargs["until"] == ["\n"]


def fake_results(folder: Path, names: list[str], before: float, after: float) -> None:
    """Files as lm-eval and measure.py write them."""
    for model, share in (("base", before), ("lora", 0.95), ("merged", after)):
        place = folder / "evaluation" / model / "some__path"
        place.mkdir(parents=True)
        for date, value in (("2026-01-01T00-00-00.1", 0.5), ("2026-01-02T00-00-00.1", share)):  # an older file too
            scores = {f"quickstart_{name}": {"exact_match,none": value} for name in names}
            scores["quickstart"] = {"exact_match,none": value}
            (place / f"results_{date}.json").write_text(json.dumps({"results": scores}))
        for name in names:
            sample = {
                "doc_id": 0,
                "doc": {"instruction": "Ask?", "input": "x"},
                "target": "y",
                "filtered_resps": [f"said by {model}"],
            }
            (place / f"samples_quickstart_{name}_2026-01-02T00-00-00.1.jsonl").write_text(json.dumps(sample) + "\n")
    plain = {"full": "full", "TokenTune": "full", "LoRA": "LoRA", "TokenTune + LoRA": "LoRA"}
    figures = {"saved_bytes": 2**20, "seconds": 0.1, "saved_bytes_ratio": 0.5, "seconds_ratio": 0.75}
    rows = [{"method": method, "compared_with": other} | figures for method, other in plain.items()]
    setting = {"batch": [32, 60], "prefix_length": "answers", "tokens": 1000, "selected_tokens": 50}
    (folder / "measurements.json").write_text(json.dumps({"setting": setting, "rows": rows}))


@pytest.mark.parametrize(("before", "after", "code"), [(0.1, 0.9, 0), (0.1, 0.7, 1), (0.3, 0.9, 1)])
def test_report_shows_the_newest_results_and_fails_where_nothing_was_learnt(quickstart, tmp_path, before, after, code):
    fake_results(tmp_path, list(quickstart.skills.SKILLS), before, after)
    command = [sys.executable, str(CODE / "report.py"), "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    words = " ".join(done.stdout.split())
    for text in (
        f"{before:.0%} │ 95% │ {after:.0%}",
        "Ask? x │ said by base │ said by merged",
        "selects 5% of the tokens",
    ):
        assert text in words
    assert "LoRA + TokenTune │ 1.0 MiB │ 50% of LoRA │ 100 ms │ 75% of LoRA" in words
    assert json.loads((tmp_path / "report.json").read_text())["exact_match"]["merged"]["all"] == after
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def run_script(*options: str, **environment: str) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "scripts" / "quickstart.sh"), *options]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


@pytest.mark.parametrize("options", [("--sed", "1"), ("--seed", "one"), ("--seed",)])
def test_bad_options_end_with_a_sentence_and_nothing_written(tmp_path, options):
    done = run_script(*options, QUICKSTART_DIR=str(tmp_path / "out"))
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_finished_steps_are_skipped_and_a_failed_one_stops_the_script(tmp_path):
    """With all other steps marked as finished, only the report runs, and fails: there is nothing to report."""
    (tmp_path / ".done").mkdir()
    (tmp_path / ".made_with").write_text("seed 0, 10 steps\n")
    names = ["base", "data", "before", "lora", "finetune", "merge", "plain", "after", "measure"]
    for number, name in enumerate(names, start=1):
        (tmp_path / ".done" / f"{number}-{name}").touch()
    done = run_script(QUICKSTART_DIR=str(tmp_path), PYTHON=sys.executable)
    assert done.stderr.count("finished earlier, skipped") == 9
    assert done.returncode != 0 and not (tmp_path / ".done" / "10-report").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("QUICKSTART_RUN") != "1", reason="the whole quick start: QUICKSTART_RUN=1 runs it")
def test_the_whole_quick_start_learns(tmp_path):
    done = run_script(QUICKSTART_DIR=str(tmp_path), PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["exact_match"]["base"]["all"] < 0.2 and report["exact_match"]["merged"]["all"] > 0.8
    assert report["exact_match"]["lora"]["all"] > 0.8
    saved = {row["method"]: row["saved_bytes_ratio"] for row in report["measurements"]["rows"]}
    assert saved["TokenTune + LoRA"] < 0.5 and saved["TokenTune"] < 0.5
    again = run_script(QUICKSTART_DIR=str(tmp_path), PYTHON=sys.executable)
    assert again.returncode == 0 and again.stderr.count("finished earlier, skipped") == 10
