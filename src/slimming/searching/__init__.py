"""Search: train weights and soft masks together."""
