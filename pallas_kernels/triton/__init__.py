"""Parts that the Triton kernels share."""
