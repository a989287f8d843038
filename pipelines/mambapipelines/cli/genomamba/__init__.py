"""The commands of `genomamba`: one module per command."""
