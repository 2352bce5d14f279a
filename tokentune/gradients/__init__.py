"""How good the selective gradient is: what diagnose.py measures. Nothing that changes a run."""
