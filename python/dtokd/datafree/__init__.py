"""Distillation without images: what a student learns from is made from the teacher alone."""
