"""Decode: attention of one new token of each of several sequences, from the paged cache."""

from pallas_kernels.decode.api import decode as decode
