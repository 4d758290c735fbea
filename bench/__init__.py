"""Benchmarks and the proofs that need no GPU. Not part of the installed package."""
