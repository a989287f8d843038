"""Language models of DNA: pretraining, and what is done with one."""
