"""Raw datasets: reading, checking, merging. NumPy and image readers only, never torch."""
