"""DNA on the shared core: alphabet, tokenizer, FASTA, genomes, windows, the species classifier and its baselines."""
