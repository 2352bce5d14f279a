"""The parts of `selection_quality.py`: which runs (experiments, running), a step's time, and what the runs say."""
