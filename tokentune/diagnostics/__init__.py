"""How good the selective gradient is: what `diagnose.py` measures, and what `--diagnose_steps` measures in training."""
