"""Triton kernels, one file per operation; import them through covr_fast.ops."""
