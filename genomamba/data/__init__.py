"""What models are trained and tested on: genomes, windows, intervals, splits and simulated assemblies."""
