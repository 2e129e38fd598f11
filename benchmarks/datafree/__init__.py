"""Distillation without data: where images come from, and how the losses of their maker are balanced."""
