"""Export models to files that run without this package, and check each file against the model."""
