"""Measurements against stock nnU-Net; each command writes its table to ``benchmarks/results``."""
