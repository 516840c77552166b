"""The local web page for interactive segmentation: ``nnmosaic serve``."""
