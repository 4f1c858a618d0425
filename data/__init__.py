"""Text to traces: sources, criteria, capture, harvest, store and data modules."""
