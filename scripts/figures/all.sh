#!/usr/bin/env bash
# The figures, and the tables of README and docs, from the committed results:
#     bash scripts/figures/all.sh
# PYTHON: python to run. Figures of runs and evaluations (loss_by_proportion.py, evaluation.py) read what you trained:
# scripts/reproduce.sh draws them.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

find_python matplotlib torch transformers
for figure in time_by_memory memory_by_proportion memory_by_length memory_breakdown score_by_selection \
    quality_by_strategy gradient_quality prompt_heavy; do
    "$PYTHON" "$PROJECT_ROOT/scripts/figures/$figure.py"
done
"$PYTHON" "$PROJECT_ROOT/scripts/docs.py"
