"""Triton kernels. Imported only when one of the operators runs: nothing else needs Triton."""
