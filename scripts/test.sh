#!/usr/bin/env bash
# Linter and tests, in .venv (made on the first call) or the active environment:
#     bash scripts/test.sh
#     bash scripts/test.sh tests/test_selection.py -k padding     # flags go to pytest
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$PROJECT_ROOT"

ensure_venv pytest hypothesis ruff

say "ruff check"
"$PYTHON" -m ruff check .

say "ruff format --check"
"$PYTHON" -m ruff format --check .

say "pytest"
"$PYTHON" -m pytest -q "$@"
