"""Prefill: causal attention of a slice of one sequence over DCA views, from the paged cache."""

from pallas_kernels.prefill.api import prefill as prefill
