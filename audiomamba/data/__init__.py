"""Clips and recordings: reading, splitting, labelling, preparing and writing them, and quantisers."""
