"""Public data sets: downloads, and the genomes and recordings that options name."""
