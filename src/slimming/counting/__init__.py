"""Cost of a model: parameters, multiply-adds and memory, by formula and by counting."""
