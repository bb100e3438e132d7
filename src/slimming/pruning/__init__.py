"""Cut a model by a plan, and compensate for the removed units."""
