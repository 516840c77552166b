"""Clustering propagation: one slice to the whole volume, by itself or from clicks."""
