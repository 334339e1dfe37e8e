"""Parts that the Mosaic GPU kernels share."""
