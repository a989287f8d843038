"""Labels of sequences: the loss, the metrics, and predictions."""
