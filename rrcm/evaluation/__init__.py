"""Evaluation: metrics, representations, attacks and latency."""
