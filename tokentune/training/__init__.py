"""The Trainer of a run: its settings, optimizers, callbacks and evaluations. Nothing about flags or reports."""
