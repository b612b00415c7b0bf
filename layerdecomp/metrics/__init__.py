"""Metrics of the two layers: pure functions on batches, and LayerMetrics (layers.py), their averages over a set."""
