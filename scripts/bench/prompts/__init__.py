"""The parts of `prompt_heavy.py`: tasks, arms, training and evaluation, the runs that are to be done, what they say."""
