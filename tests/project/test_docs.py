"""README and docs are true: generated parts are up to date, links lead somewhere, commands parse, code runs."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from chat_tokenizers import CHATML
from conftest import tiny_llama_config
from transformers import LlamaForCausalLM

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

import docs
from tokentune import estimate
from tokentune.cli.arguments import flags_given, parse_arguments
from tokentune.sampling.sampler import select_positions
from tokentune.settings.chat import ChatArguments
from tokentune.settings.classification import ClassificationArguments
from tokentune.settings.diagnose import DiagnoseArguments
from tokentune.settings.merge import MergeArguments

ROOT = docs.ROOT
README, *PAGES = docs.PAGES
TEXTS = {page: page.read_text(encoding="utf-8") for page in docs.PAGES}
COMMANDS = ("finetune", "classify", "diagnose", "estimate", "merge", "chat")
SET_UP = (
    "python3 -m venv .venv && source .venv/bin/activate",
    "pip install -r requirements.txt",
    "pip install .",
    "pip install '.[train]'",
)
NEEDED = ["--model_name_or_path", "model", "--dataset_name_or_path", "rows.jsonl"]  # what training scripts give
FLAGS_OF_SCRIPTS = {"--small", "--help", "--check", "--markdown", "--suites", "--output"}


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXTS[page], flags=re.DOTALL)


def command_lines() -> list[tuple[str, str]]:
    """Page and command of every line in a block of bash, continued lines as one."""
    text = {page: "\n".join(blocks(page, "bash")).replace("\\\n", " ") for page in TEXTS}
    return [(name(page), line) for page in TEXTS for line in text[page].splitlines() if line.strip()]


def slugs(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# ------------------------------------------------------------------------------------------------------ pages and links


def test_generated_parts_are_up_to_date() -> None:
    check = subprocess.run([sys.executable, docs.__file__, "--check"], capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


def test_a_generated_part_that_is_not_up_to_date_is_made_anew() -> None:
    old = "before\n<!-- generated flags_merge -->\nold\n<!-- end -->\nafter"
    new = docs.filled(old)
    assert new.startswith("before\n<!-- generated flags_merge -->\n| flag |") and new.endswith("<!-- end -->\nafter")
    assert "| `--output_dir` | required | the merged model's folder; an earlier merge is replaced |" in new
    assert "old" not in new.split()


def test_every_module_says_what_it_is() -> None:
    modules = [path for path in docs.PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    assert not [path for path in modules if not docs.first_line(path)]
    tree = TEXTS[ROOT / "docs" / "how-it-works.md"]
    assert all(re.search(rf"^ +{path.name} ", tree, flags=re.MULTILINE) for path in modules)


def test_the_layers_are_the_folders() -> None:
    layers = TEXTS[ROOT / "docs" / "contributing.md"].split("## Layers")[1].split("\n## ")[0]
    folders = {path.parent.name for path in docs.PACKAGE.glob("*/__init__.py")}
    assert set(re.findall(r"`(\w+)/`", layers)) == folders


def test_the_readme_is_short() -> None:
    assert len(TEXTS[README].splitlines()) <= 220
    assert README.stat().st_size <= 16_000


def test_the_readme_leads_to_every_page() -> None:
    assert {name(page) for page in PAGES} <= set(re.findall(r"\((docs/[\w.-]+)\)", TEXTS[README]))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_begins_with_a_command(page: Path) -> None:
    beginning = TEXTS[page].split("\n## ")[0]
    assert beginning.startswith("# ") and "```bash\n" in beginning


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", TEXTS[page])
    assert targets or page in PAGES
    for target in targets:
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), target
        assert not anchor or anchor in slugs(TEXTS[path]), target


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_paths_exist(page: Path) -> None:
    named = set(re.findall(r"(?:scripts|tests|tokentune|docs)/[\w/.-]+\.(?:py|sh|json|yaml|md)\b", TEXTS[page]))
    assert not [path for path in named if not (ROOT / path).exists()]


def test_versions_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [line for line in project["dependencies"] if line.startswith(("torch", "transformers"))]
    assert len(named) == 2 and all(f"`{line}`" in TEXTS[README] for line in named)
    assert f"Python {project['requires-python'].removeprefix('>=')} or newer" in TEXTS[README]


def test_the_oldest_and_the_newest_transformers_are_said() -> None:
    configuration = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    oldest, newest = configuration["tool"]["tokentune"]["tested-transformers"]
    assert any(
        line.startswith(f"transformers>={oldest.removesuffix('.0')},")
        for line in configuration["project"]["dependencies"]
    )
    assert f"transformers=={oldest}\n" in (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert f"tested with transformers {oldest} and {newest}" in TEXTS[README]
    assert f"bash scripts/test.sh --transformers {newest}" in TEXTS[ROOT / "docs" / "contributing.md"]


# ------------------------------------------------------------------------------------------------------------- commands


def check_command(line: str) -> None:
    """Fails on a command of README or docs that would not start."""
    if line.partition(" #")[0].strip() in SET_UP:
        return
    words = shlex.split(line, comments=True)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    place = next((n for n, word in enumerate(words) if re.search(r"(^|/)tokentune/\w+\.py$", word)), None)
    if words == ["tokentune", "--help"]:
        return None
    if words[0] == "tokentune":
        return check_own_command(words[1], words[2:])
    if place is not None:
        check_own_command(Path(words[place]).stem, words[place + 1 :])
        words = words[:place]
    if words[:2] == ["python", "-c"]:
        ast.parse(words[2])
    elif words[0] in ("bash", "sbatch") or (words[:1] == ["python"] and words[1:] not in ([], ["-u"])):
        check_script(next(word for word in words[1:] if not word.startswith("-")), words)
    elif words[:2] == ["accelerate", "launch"]:
        assert (ROOT / words[words.index("--config_file") + 1]).is_file()
    else:
        assert words[0] == "python", "a command that no test knows"


def check_own_command(command: str, words: list[str]) -> None:
    assert command in COMMANDS
    if words in (["--help"], ["--help", "all"], ["--version"]):
        return
    if command in ("merge", "chat"):
        flags_given(words, {"merge": MergeArguments, "chat": ChatArguments}[command])
    elif command == "estimate":
        estimate.parse(words)
    elif "--config" in words:  # a file that is not here: the flags beside it
        assert all(word in docs.parser_of(command)._option_string_actions for word in words if word.startswith("--"))
    else:
        kinds = {"classify": ClassificationArguments, "diagnose": DiagnoseArguments}
        assert parse_arguments(words, kinds[command]) if command in kinds else parse_arguments(words)


def check_script(script: str, words: list[str]) -> None:
    assert (ROOT / script).is_file()
    flags = [word for word in words[words.index(script) + 1 :] if word != "..."]
    if script.startswith(("scripts/train/", "scripts/launch/")):
        parse_arguments([*NEEDED, *flags])
    elif script == "scripts/test.sh":
        assert all((ROOT / flag).exists() for flag in flags if flag.startswith("tests/"))
    else:
        assert set(flags) <= FLAGS_OF_SCRIPTS


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_commands_would_start(page: str, line: str) -> None:
    check_command(line)


@pytest.mark.parametrize(
    "line",
    [
        "python ./tokentune/finetune.py --model_name_or_path m --dataset_name_or_path d --no_such_flag",
        "python ./tokentune/merge.py --base_model_name_or_path m",
        "bash scripts/nothing.sh",
        "bash scripts/train/lora_platypus_llama_2.sh --num_epochs many",
        "frobnicate --now",
    ],
)
def test_commands_that_would_not_start_are_found(line: str) -> None:
    with pytest.raises((Exception, SystemExit)):
        check_command(line)


def test_flags_that_are_named_exist() -> None:
    parsers = [docs.parser_of(command) for command in COMMANDS]
    known = {option for parser in parsers for option in parser._option_string_actions}
    known |= {f"--{name}" for parser in parsers for name in parser.other_names}
    for page, text in TEXTS.items():
        prose = re.sub(r"```.*?```|<!-- generated.*?<!-- end -->", "", text, flags=re.DOTALL)
        assert set(re.findall(r"(?<![\w-])--[a-z]\w*", prose)) <= known | FLAGS_OF_SCRIPTS, name(page)


# ----------------------------------------------------------------------------------------------------------------- code


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "python-api.md"], ids=name)
def test_the_code_runs(page: Path) -> None:
    code, *_ = blocks(page, "python")
    model = LlamaForCausalLM(tiny_llama_config()).train()
    ids = torch.randint(3, 90, (2, 20))
    names = {"model": model, "ids": ids, "mask": torch.ones_like(ids), "labels": ids}
    names["positions"] = torch.arange(0, 20, 4).expand(2, -1)
    exec(code, names)
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0
    if page != README:
        assert names["out"].logits.shape == (2, 5, 96)
        assert not hasattr(model, "_tokentune")


@pytest.mark.parametrize(
    "page, number, folder", [("python-api.md", 1, "my-model"), ("evaluation.md", 0, "my-tuned-model")]
)
def test_whole_scripts_run(
    page: str, number: int, folder: str, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llama_dir, tmp_path / folder)
    (tmp_path / folder / "chat_template.jinja").write_text(CHATML)  # as a run saves one
    exec(blocks(ROOT / "docs" / page, "python")[number], {})


def test_files_that_the_code_names_exist() -> None:
    package = ROOT / "tokentune"
    for source in package.rglob("*.py"):
        for named in set(re.findall(r"\b[a-z_]+(?:/[a-z_]+)+\.py\b", source.read_text(encoding="utf-8"))):
            folders = (ROOT, ROOT / "scripts", package, source.parent, source.parent.parent)
            assert named == "path/file.py" or any((folder / named).exists() for folder in folders), (source, named)


def test_a_strategy_of_ones_own_is_five_lines(tmp_path: Path) -> None:
    (code,) = blocks(ROOT / "docs" / "selection.md", "python")
    (tmp_path / "rare.py").write_text(code, encoding="utf-8")
    assert len([line for line in code.splitlines() if line.strip()]) <= 5
    mask, ids = torch.ones(2, 8, dtype=torch.int64), torch.randperm(90)[:16].view(2, 8)
    positions = select_positions(mask, 3, strategy=f"{tmp_path / 'rare.py'}:rare", input_ids=ids)
    assert torch.equal(ids.gather(1, positions).sort(1).values, ids.topk(3, dim=1).values.flip(1))


@pytest.mark.parametrize("word", ["HF_TOKEN", "Apache", "bibtex", "--prefix_length"])
def test_the_readme_says_what_users_look_for(word: str) -> None:
    assert word in TEXTS[README]
