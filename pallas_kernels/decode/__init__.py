"""Decode: attention of a few new tokens of each of several sequences, from the paged cache."""

from pallas_kernels.decode.api import decode as decode
