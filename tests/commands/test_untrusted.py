"""What comes from elsewhere is read, never run: code of models, pickles in checkpoints, templates, data sets.

Each test plants a bomb, code that makes a file when it runs, and looks for the file.
"""

import ast
import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from bad_input import contents
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tokentune import classify, estimate, finetune, merge
from tokentune.errors import UserError

PROJECT = Path(__file__).resolve().parents[2]
SHORT = "--global_batch_size 4 --warmup_steps 0 --max_length 64 --learning_rate 5e-3 --report_to none"


class Bomb:
    """Unpickled without care, it makes the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (str(self.path), "w")


@pytest.fixture
def burnt(tmp_path: Path) -> Path:
    """The file that a bomb makes."""
    return tmp_path / "burnt"


@pytest.fixture
def arguments(alpaca_file: Path, tmp_path: Path):
    """A command line of finetune.py for a model."""

    def words(model: Path, *more: str) -> list[str]:
        names = ["--model_name_or_path", str(model), "--dataset_name_or_path", str(alpaca_file)]
        return [*names, "--model_save_path", str(tmp_path / "models"), *SHORT.split(), *more]

    return words


def test_the_bomb_is_one(burnt: Path, tmp_path: Path) -> None:
    """Else no test below could fail."""
    torch.save({"weight": Bomb(burnt)}, tmp_path / "bomb.bin")
    assert not burnt.exists()
    torch.load(tmp_path / "bomb.bin", weights_only=False)
    assert burnt.exists()


# ---- our own code ----------------------------------------------------------------------------------------------------

FORBIDDEN = {"eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "yaml.load", "os.system"}
CAREFUL = {"torch.load": ("weights_only", True), "numpy.load": ("allow_pickle", False)}


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("folder", ["tokentune", "scripts"])
def test_no_call_runs_what_it_reads(folder: str) -> None:
    looked_at = 0
    for path in (PROJECT / folder).rglob("*.py"):
        for name, call in calls(path):
            where = f"{path.relative_to(PROJECT)}, line {call.lineno}: {ast.unparse(call)}"
            given = {word.arg: getattr(word.value, "value", word.value) for word in call.keywords}
            assert name not in FORBIDDEN, where
            assert given.get("trust_remote_code") is not True, where
            assert given.get("shell") is not True, where
            if name in CAREFUL:
                word, value = CAREFUL[name]
                assert given.get(word) is value, where
            assert not name.endswith("Environment") or "Sandbox" in name, where  # Jinja's
            looked_at += 1
    assert looked_at > 500


# ---- code that comes with a model ------------------------------------------------------------------------------------


@pytest.fixture
def with_code(tiny_llama_dir: Path, tmp_path: Path, burnt: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose configuration and class are Python files beside its weights."""
    folder = Path(shutil.copytree(tiny_llama_dir, tmp_path / "own-code"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "configuration_own.py").write_text(
        f"from transformers import LlamaConfig\nopen({str(burnt)!r}, 'w')\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", sys.path.copy())
    yield folder
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def own_code(model: Path) -> str:
    return (
        f"--model_name_or_path {model}: comes with Python code of its own, which is not run unasked. "
        "Look at it, then add --trust_remote_code."
    )


@pytest.mark.parametrize("command", [finetune, classify, estimate], ids=lambda module: module.__name__)
def test_code_of_a_model_is_not_run(command: object, with_code: Path, burnt: Path, arguments) -> None:
    words = arguments(with_code)
    if command is classify:
        words += ["--eval_dataset_name_or_path", words[3]]
    before = contents(with_code.parent)
    with pytest.raises(UserError) as refused:
        command.main(words)
    assert str(refused.value) == own_code(with_code)
    assert not burnt.exists() and contents(with_code.parent) == before


def test_code_of_a_model_is_run_when_asked(with_code: Path, burnt: Path, arguments, tmp_path: Path) -> None:
    finetune.main(arguments(with_code, "--trust_remote_code", "--tokentune", "--prefix_length", "0.3"))
    assert burnt.exists()
    folder = tmp_path / "models" / "own-code-tiny_alpaca-tokentune-0.3"
    assert load_file(folder / "model.safetensors")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "own"


def test_estimate_runs_it_when_asked(with_code: Path, burnt: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--only", "--tokentune", "--device", "cpu", "--max_length", "32", "--trust_remote_code"]
    estimate.main(["--model_name_or_path", str(with_code), *words])
    assert burnt.exists() and "TokenTune" in capsys.readouterr().out


def test_a_merge_runs_it_when_asked(with_code: Path, burnt: Path, arguments, tmp_path: Path) -> None:
    finetune.main(arguments(with_code, "--trust_remote_code", "--lora"))
    (adapter,) = (tmp_path / "models").glob("own-code-*-lora")
    burnt.unlink()
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]
    with pytest.raises(UserError, match="add --trust_remote_code"):
        merge.merge(str(with_code), str(adapter), str(tmp_path / "merged"))
    assert not burnt.exists() and not (tmp_path / "merged").exists()
    merge.merge(str(with_code), str(adapter), str(tmp_path / "merged"), trust_remote_code=True)
    assert burnt.exists() and load_file(tmp_path / "merged" / "model.safetensors")


def test_code_of_a_tokenizer_is_not_run(tiny_llama_dir: Path, burnt: Path, arguments, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama_dir, tmp_path / "own-tokenizer"))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    path.write_text(json.dumps(config), encoding="utf-8")
    (folder / "own.py").write_text(f"open({str(burnt)!r}, 'w')\nclass OwnTokenizer: pass\n")
    with pytest.raises(UserError) as refused:
        finetune.main(arguments(folder))
    assert str(refused.value) == own_code(folder)
    assert not burnt.exists()


# ---- pickles ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pickled(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """The tiny model with its weights as torch.save writes them."""
    folder = Path(shutil.copytree(tiny_llama_dir, tmp_path / "pickled"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_pickled_weights_are_refused_unless_asked(pickled: Path, arguments, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        finetune.main(arguments(pickled, "--lora"))
    assert str(refused.value) == (
        f"--model_name_or_path {pickled}: its weights are a pickle file (pytorch_model.bin), which could run code. "
        "Take them as safetensors or give --allow_pickle, which reads tensors alone."
    )
    assert not (tmp_path / "models").exists()
    finetune.main(arguments(pickled, "--lora", "--allow_pickle"))
    assert (tmp_path / "models" / "pickled-tiny_alpaca-lora" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("damage", ["bomb", "truncated", "empty", "no pickle"])
def test_only_tensors_are_taken_from_a_pickle(
    damage: str, pickled: Path, burnt: Path, arguments, tmp_path: Path
) -> None:
    path = pickled / "pytorch_model.bin"
    whole = path.read_bytes()
    if damage == "bomb":
        torch.save(torch.load(path, weights_only=True) | {"extra": Bomb(burnt)}, path)
    else:
        path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "no pickle": b"weights"}[damage])
    with pytest.raises(UserError) as refused:
        finetune.main(arguments(pickled, "--lora", "--allow_pickle"))
    assert str(refused.value) == (
        f"--model_name_or_path {pickled}: its pickle file is damaged, or holds more than tensors; nothing in it was "
        "run. Take the weights as safetensors."
    )
    assert not burnt.exists() and not (tmp_path / "models").exists()


def test_safetensors_come_first(pickled: Path, tiny_llama_dir: Path, burnt: Path, arguments) -> None:
    shutil.copy(tiny_llama_dir / "model.safetensors", pickled)
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(burnt)))
    finetune.main(arguments(pickled, "--allow_pickle"))
    assert not burnt.exists()


STATES = ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"]


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_checkpoints_are_read_without_running_them(
    name: str, protocol: str, tiny_llama_dir: Path, burnt: Path, arguments, tmp_path: Path
) -> None:
    words = arguments(tiny_llama_dir, "--lora", "--save_steps", "2", "--max_steps", "4")
    finetune.main(words)
    (folder,) = (tmp_path / "models").iterdir()
    shutil.rmtree(folder / "checkpoint-4")
    (folder / "training_summary.json").unlink()
    planted = folder / "checkpoint-2" / name
    if protocol == "torch":
        torch.save({"state": Bomb(burnt)}, planted)
    else:
        planted.write_bytes(pickle.dumps(Bomb(burnt)))
    try:
        finetune.main([*words, "--resume_from_checkpoint", str(folder / "checkpoint-2")])
    except UserError as refused:
        assert "checkpoint-2" in str(refused)
    assert not burnt.exists()


def test_an_adapter_is_read_without_running_it(tiny_llama_dir: Path, burnt: Path, arguments, tmp_path: Path) -> None:
    finetune.main(arguments(tiny_llama_dir, "--lora"))
    (folder,) = (tmp_path / "models").iterdir()
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.lora_A.weight": Bomb(burnt)}, folder / "adapter_model.bin")
    words = {"--base_model_name_or_path": tiny_llama_dir, "--peft_model_path": folder, "--output_dir": tmp_path / "out"}
    with pytest.raises(UserError):
        merge.main([str(word) for pair in words.items() for word in pair])
    assert not burnt.exists() and not (tmp_path / "out").exists()


# ---- data and templates ----------------------------------------------------------------------------------------------


def test_scripts_beside_data_are_not_run(tiny_llama_dir: Path, alpaca_file: Path, burnt: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    shutil.copy(alpaca_file, folder / "rows.jsonl")
    (folder / "rows.py").write_text(f"open({str(burnt)!r}, 'w')\n")
    names = ["--model_name_or_path", str(tiny_llama_dir), "--dataset_name_or_path", str(folder)]
    finetune.main([*names, "--model_save_path", str(tmp_path / "models"), *SHORT.split()])
    assert not burnt.exists()


TEMPLATES = [
    "{{ cycler.__init__.__globals__.os.mkdir(BURNT) }}",
    "{{ ().__class__.__mro__[1].__subclasses__() }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['__builtins__']['open'](BURNT, 'w') }}",
    "{{ messages.append(1) }}",
    "{% include BURNT %}",
    "{% import 'os' as os %}",
]


@pytest.mark.parametrize("source", ["file", "tokenizer"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates_are_rendered_in_a_sandbox(
    template: str, source: str, tiny_llama_dir: Path, burnt: Path, arguments, tmp_path: Path
) -> None:
    data = tmp_path / "chats.jsonl"
    messages = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day."}]
    data.write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
    text = template.replace("BURNT", repr(str(burnt))) + "{% for m in messages %}{{ m.content }}{% endfor %}"
    model, more = tiny_llama_dir, []
    if source == "file":
        (tmp_path / "chat.jinja").write_text(text, encoding="utf-8")
        more = ["--chat_template", str(tmp_path / "chat.jinja")]
    else:
        model = Path(shutil.copytree(tiny_llama_dir, tmp_path / "chatty"))
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.chat_template = text
        tokenizer.save_pretrained(model)
    with pytest.raises(UserError, match="template"):
        finetune.main([*arguments(model, *more), "--dataset_name_or_path", str(data)])
    assert not burnt.exists()


def test_a_prompt_template_is_text(tiny_llama_dir: Path, arguments, tmp_path: Path) -> None:
    """Python's format strings reach into objects; these places are replaced, nothing is formatted."""
    prompt = "{instruction} {instruction.__class__.__mro__} {0} {input!r} %s {{ 7 * 7 }}"
    template = {"prompt_input": prompt + "{input}", "prompt_no_input": prompt, "response_split": "Response:"}
    path = tmp_path / "t.json"
    path.write_text(json.dumps(template), encoding="utf-8")
    finetune.main(arguments(tiny_llama_dir, "--prompt_template_name_or_path", str(path), "--max_length", "256"))
