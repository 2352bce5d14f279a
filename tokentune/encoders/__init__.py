"""What `classify.py` has beside the rest: labels, tasks, images, scores."""
