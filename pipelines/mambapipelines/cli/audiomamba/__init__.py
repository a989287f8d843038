"""The commands of `audiomamba`: one module per command."""
