"""The species classifier: training, evaluation, classification and the demo."""
