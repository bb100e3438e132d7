"""How fast a model runs, in PyTorch and in other runtimes."""
