"""Evaluation: what a sparse model costs in quality and in bytes, beside its brackets."""
