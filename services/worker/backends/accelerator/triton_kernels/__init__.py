"""Kernels in Triton. Imported only where a step is computed with them: importing them imports triton."""
