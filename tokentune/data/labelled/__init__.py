"""The rows of classify.py: texts, words or images with labels."""
