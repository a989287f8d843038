"""Raw waveforms on the shared core: reading, quantisers, clips, and the multi-scale models of waveforms."""
