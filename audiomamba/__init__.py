"""Raw waveforms on the shared core. Nothing is here yet; DNA (``genomamba``) came first."""
