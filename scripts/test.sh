#!/usr/bin/env bash
# Linter and tests, in .venv (made on the first call) or the active environment:
#     bash scripts/test.sh
#     bash scripts/test.sh tests/sampling/test_selection.py -k padding     # flags go to pytest
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$PROJECT_ROOT"

ensure_venv pytest xdist hypothesis ruff importlinter

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
