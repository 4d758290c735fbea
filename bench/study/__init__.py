"""``python -m bench.study``: does ALLoRA help, and when? Methods side by side, each with its own tuned learning rate."""
