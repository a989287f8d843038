"""Models of DNA and their folders."""
