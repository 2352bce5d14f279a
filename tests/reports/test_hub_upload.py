"""--push_to_hub: asked for, private, after everything is saved; a failure says where that is. The hub is a stub."""

import json
from pathlib import Path

import httpx2
import pytest
import yaml
from adapters_on_disk import make_adapter
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from tokentune import finetune
from tokentune.errors import UserError
from tokentune.merge import merge
from tokentune.reports import hub_upload
from tokentune.reports.hub_upload import check_push, push_folder, repository_name


class Hub:
    """Stands in for HfApi: records what it is asked, fails where told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict]] = []
        self.failing: dict[str, Exception] = {}
        self.files: dict[str, str] = {}  # uploaded: name -> the first 100,000 characters

    def __call__(self) -> "Hub":
        return self

    def create_repo(self, name: str, **options):
        self.calls.append(("create_repo", {"name": name, **options}))
        self._fail("create_repo")
        hub_id = name if "/" in name else f"me/{name}"

        class Address(str):
            repo_id = hub_id

        return Address(f"https://huggingface.co/{hub_id}")

    def upload_folder(self, **options) -> None:
        self.calls.append(("upload_folder", options))
        self._fail("upload_folder")
        folder = Path(options["folder_path"])
        paths = [path for path in folder.rglob("*") if path.is_file()]
        texts = [path.read_text(encoding="utf-8", errors="replace")[:100_000] for path in paths]
        self.files = {path.relative_to(folder).as_posix(): text for path, text in zip(paths, texts, strict=True)}

    def _fail(self, name: str) -> None:
        if name in self.failing:
            raise self.failing[name]


@pytest.fixture
def hub(monkeypatch) -> Hub:
    stub = Hub()
    monkeypatch.setattr(hub_upload, "HfApi", stub)
    monkeypatch.setattr(hub_upload, "get_token", lambda: "hf_of_a_test")
    monkeypatch.setattr(hub_upload.constants, "HF_HUB_OFFLINE", False)
    return stub


def http_error(status: int, words: str) -> HfHubHTTPError:
    request = httpx2.Request("POST", "https://huggingface.co/api/repos/create")
    return HfHubHTTPError(words, response=httpx2.Response(status, request=request))


RESULT = (
    *("README.md", "run.yaml", "training_summary.json", "training_curves.png", "adapter_config.json"),
    *("adapter_model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"),
    *("tokenizer.json", "tokenizer.model", "chat_template.jinja", "additional_chat_templates/tools.jinja"),
    *("modeling_own.py", "preprocessor_config.json"),
)
OTHERS = (
    *("nan_batch.json", "nan_batch-rank1.json", "predictions.jsonl", "rows.jsonl", "training_args.bin", "notes.txt"),
    *("checkpoint-8/model.safetensors", "checkpoint-8/README.md", "broken-checkpoint-8/optimizer.pt", "runs/events"),
    *("merged/model.safetensors", ".result.partial/model.safetensors", "run.yaml.tmp", "pytorch_model.bin", "my.py"),
)


def test_a_folder_is_uploaded_privately_by_a_list_of_what_belongs(hub, tmp_path):
    for name in (*RESULT, *OTHERS):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert push_folder(tmp_path, "owner/name", public=False) == "https://huggingface.co/owner/name"
    (_, created), (_, uploaded) = hub.calls
    assert created == {"name": "owner/name", "private": True, "exist_ok": True}
    assert uploaded["repo_id"] == "owner/name"
    assert sorted(hub.files) == sorted(RESULT)


def test_no_local_path_leaves_the_machine(hub, tmp_path):
    paths = {"model_name_or_path": str(tmp_path / "private" / "llama"), "dataset_name_or_path": ["../of-us/rows.jsonl"]}
    kept = {"learning_rate": 0.0004, "lora": True, "prefix_length": "0.3", "eval_dataset_name_or_path": "owner/set"}
    settings = paths | kept | {"selection": f"{tmp_path}/private/mine.py:score", "report_to": ["none"]}
    (tmp_path / "run.yaml").write_text(f"# started in {tmp_path}/private\n{yaml.safe_dump(settings)}")
    summary = {"run_folder": str(tmp_path), "settings": settings, "sources": [{"name": "~/private/rows.jsonl"}]}
    (tmp_path / "training_summary.json").write_text(json.dumps(summary))
    (tmp_path / "merge_summary.json").write_text(json.dumps({"peft_model_path": f"{tmp_path}/private/run/"}))
    adapter = {"base_model_name_or_path": f"{tmp_path}/private/llama", "target_modules": ["q_proj"], "r": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    push_folder(tmp_path, "owner/name", public=False)
    shown = {"model_name_or_path": "llama", "dataset_name_or_path": ["rows.jsonl"], "selection": "mine.py:score"}
    shown |= kept | {"report_to": ["none"]}
    assert yaml.safe_load(hub.files["run.yaml"]) == shown
    expected = {"run_folder": tmp_path.name, "settings": shown, "sources": [{"name": "rows.jsonl"}]}
    assert json.loads(hub.files["training_summary.json"]) == expected
    assert json.loads(hub.files["merge_summary.json"]) == {"peft_model_path": "run"}
    assert json.loads(hub.files["adapter_config.json"]) == adapter | {"base_model_name_or_path": "llama"}
    assert not [name for name, text in hub.files.items() if "private" in text or str(tmp_path) in text]
    assert json.loads((tmp_path / "training_summary.json").read_text()) == summary  # as they were, on this machine


def test_public_only_when_asked(hub, tmp_path):
    push_folder(tmp_path, "", public=True)
    assert hub.calls[0][1]["private"] is False
    assert hub.calls[1][1]["repo_id"] == f"me/{tmp_path.name}"  # the owner is the hub's answer


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("models/my-llama-lora-tokentune-0.3", "my-llama-lora-tokentune-0.3"),
        ("models/my run/merged", "my-run-merged"),
        ("a--b..c", "a-b.c"),
        ("x" * 120, "x" * 96),
    ],
)
def test_names_that_the_hub_allows(tmp_path, folder, name):
    assert repository_name("", tmp_path / folder) == name
    assert repository_name("mine/other", tmp_path / folder) == "mine/other"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (http_error(403, "Forbidden: you have no rights"), "no right to write there"),
        (http_error(401, "Unauthorized"), "no right to write there"),
        (http_error(500, "Internal Error"), "not uploaded: .*Internal Error"),
        (LocalTokenNotFoundError("no token"), "no token. Set HF_TOKEN"),
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE=1 forbids it"),
        (httpx2.ConnectError("no route to host"), "cannot be reached"),
        (ConnectionResetError("reset"), "cannot be reached"),
        (OSError(5, "Input/output error"), "Input/output error"),
    ],
)
@pytest.mark.parametrize("step", ["create_repo", "upload_folder"])
def test_a_failure_says_what_is_safe_and_how_to_upload_later(hub, tmp_path, step, error, words):
    hub.failing[step] = error
    folder = tmp_path / "my run"
    folder.mkdir()
    for name in ("model.safetensors", "run.yaml", "nan_batch.json"):
        (folder / name).write_text("{}")
    with pytest.raises(UserError, match=words) as refusal:
        push_folder(folder, "owner/name", public=False)
    lines = str(refusal.value).splitlines()
    assert lines[0].startswith("--push_to_hub owner/name: not uploaded")
    assert len(lines) == 3 and f"Everything is saved in {folder}" in lines[1]
    assert lines[2].strip() == f"hf upload owner/name '{folder}' . --private --include model.safetensors"


def test_what_cannot_succeed_is_refused_first(hub, tmp_path, monkeypatch):
    check_push(None, tmp_path)
    check_push("", tmp_path / "run")
    check_push("owner/name", tmp_path)
    for name in ("a/b/c", "owner/na me", "own--er/x"):
        with pytest.raises(UserError, match=f"--push_to_hub {name}: no name of a repository"):
            check_push(name, tmp_path)
    monkeypatch.setattr(hub_upload, "get_token", lambda: None)
    with pytest.raises(UserError, match="no token: set HF_TOKEN"):
        check_push("owner/name", tmp_path)
    monkeypatch.setattr(hub_upload.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE=1 forbids it"):
        check_push("owner/name", tmp_path)
    assert hub.calls == []


def test_the_command_line_of_the_cure_is_the_hubs_own():
    from huggingface_hub.cli.upload import upload

    parameters = upload.__wrapped__.__annotations__ if hasattr(upload, "__wrapped__") else upload.__annotations__
    assert {"repo_id", "local_path", "path_in_repo", "private", "include"} <= parameters.keys()


def test_merge_pushes_after_saving(hub, tiny_llama_dir, tmp_path, capsys):
    adapter = make_adapter(tiny_llama_dir, tmp_path / "run")
    output = adapter / "merged"
    merge(str(tiny_llama_dir), str(adapter), str(output))
    assert hub.calls == []  # not asked for
    merge(str(tiny_llama_dir), str(adapter), str(output), push_to_hub="")
    assert hub.calls[0][1]["name"] == "run-merged"
    assert {"README.md", "config.json", "model.safetensors", "merge_summary.json"} <= hub.files.keys()
    assert "uploaded to https://huggingface.co/me/run-merged" in capsys.readouterr().out
    hub.failing["create_repo"] = http_error(403, "Forbidden")
    with pytest.raises(UserError, match="Everything is saved in"):
        merge(str(tiny_llama_dir), str(adapter), str(output), push_to_hub="me/x")
    assert json.loads((output / "merge_summary.json").read_text())["dtype"] == "float32"


def test_finetune_pushes_after_saving(hub, tiny_llama_dir, alpaca_file, tmp_path):
    words = f"--model_name_or_path {tiny_llama_dir} --dataset_name_or_path {alpaca_file} --model_save_path {tmp_path} "
    words += "--global_batch_size 4 --max_steps 1 --warmup_steps 0 --max_length 128 --report_to none --lora "
    words += "--skip_memory_probe"
    hub.failing["upload_folder"] = http_error(500, "Internal Error")
    with pytest.raises(UserError, match="Everything is saved in"):
        finetune.main([*words.split(), "--push_to_hub", "--hub_public"])
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert hub.calls[0] == ("create_repo", {"name": folder.name, "private": False, "exist_ok": True})
    assert {"README.md", "adapter_model.safetensors", "training_summary.json"} <= {p.name for p in folder.iterdir()}
    # asked for once: the settings that rerun the run do not upload again
    assert not {"push_to_hub", "hub_public"} & yaml.safe_load((folder / "run.yaml").read_text()).keys()


def test_a_push_that_cannot_succeed_costs_no_run(hub, tiny_llama_dir, alpaca_file, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_upload, "get_token", lambda: None)
    words = f"--model_name_or_path {tiny_llama_dir} --dataset_name_or_path {alpaca_file} --model_save_path {tmp_path}"
    with pytest.raises(UserError, match="--push_to_hub me/x: no token"):
        finetune.main([*words.split(), "--push_to_hub", "me/x"])
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
