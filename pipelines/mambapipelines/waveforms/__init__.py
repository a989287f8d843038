"""Models of waveforms: training, generation and evaluation."""
