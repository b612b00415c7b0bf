"""Metrics of the two layers: pure functions on batches, and LayerMetrics (layers.py), which aggregates over a set."""
