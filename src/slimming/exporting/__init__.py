"""Files that run a model without this package, each checked against the model before anyone gets it."""
