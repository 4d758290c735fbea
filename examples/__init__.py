"""Scripts to run and read: `python examples/NAME.py`. The study unpacks its decoder by one of them."""
