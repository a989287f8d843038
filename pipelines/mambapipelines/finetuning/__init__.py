"""Fine-tuning on a table of labels, and predictions."""
