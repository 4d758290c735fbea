"""Layers that a mixture's router may send rows to: which sample a row is of is lost on the way."""


def among_experts(name: str) -> bool:
    """Whether the layer of this name is in a module called ``experts``. Its 2-D inputs may be what a router chose."""
    return "experts" in name.split(".")
