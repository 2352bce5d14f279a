"""What encoded rows hold, looked at before a run: counts, checks, previews."""
