"""``python -m bench.study``: does ALLoRA help, and when? Methods side by side on real models and data, learning rates tuned alike."""
