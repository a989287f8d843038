"""Readers and writers of the formats of the field: FASTA, FASTQ, VCF, indexed references and tables."""
