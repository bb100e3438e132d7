"""Score units without a search."""
