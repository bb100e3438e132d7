"""Cut a model by a plan, exactly, and compensate for what goes."""
