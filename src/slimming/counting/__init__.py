"""What a model costs: parameters, multiply-adds and memory, by formula and by counting."""
