"""The numeric tests under other kernels."""
