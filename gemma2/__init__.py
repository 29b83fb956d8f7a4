"""Gemma 2, the model that teacher and student share: decoder, presets, Hugging Face checkpoints."""
