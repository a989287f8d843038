"""The training loop shared by all tasks."""
