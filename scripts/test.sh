#!/usr/bin/env bash
# Linter and tests, in .venv (made on the first call) or the active environment:
#     bash scripts/test.sh
#     bash scripts/test.sh tests/sampling/test_selection.py -k padding     # flags go to pytest
#     bash scripts/test.sh --transformers 5.24.0                 # first: with that version, in an environment of its own
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$PROJECT_ROOT"
requirements=$PROJECT_ROOT/tests/requirements.txt

if [[ ${1:-} == --transformers ]]; then
    [[ ${2:-} =~ ^[0-9]+(\.[0-9]+)+$ ]] || die "--transformers needs a version, such as 5.24.0"
    OWN_VENV=$PROJECT_ROOT/.venv-transformers-$2
    changed=$(mktemp)
    trap 'rm -f "$changed"' EXIT
    all_requirements "$requirements" | sed "s/^transformers==.*/transformers==$2/" >"$changed"
    requirements=$changed
    shift 2
fi
ensure_venv "$requirements" lm_eval pytest xdist hypothesis ruff importlinter

say "ruff check"
"$PYTHON" -m ruff check .

say "ruff format --check"
"$PYTHON" -m ruff format --check .

say "lint-imports"
"$PYTHON" -c "from importlinter.cli import lint_imports_command; lint_imports_command()" --no-cache

say "pytest"
# One process per core, each with one thread: two that wait for each other's cores are slower than one. A file's tests
# stay in one process, for what they share.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
"$PYTHON" -m pytest -q --numprocesses auto --dist loadfile --no-loadscope-reorder "$@"
