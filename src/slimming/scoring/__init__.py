"""Score the units of a model, which ranks them for removal."""
