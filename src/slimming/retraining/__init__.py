"""Train a model that was cut, distilled from the dense one by default."""
