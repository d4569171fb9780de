"""Quantize models to GGUF, and measure what it costs."""

