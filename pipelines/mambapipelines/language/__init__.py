"""DNA language models: pretraining and applications."""
