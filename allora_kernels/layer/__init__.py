"""One adapted linear layer: its backends, its autograd and its module."""
