"""evaluation: metrics, representations, attacks and latency."""
