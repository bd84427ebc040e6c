"""Kernels of NPUs: the fused operators that torch_npu registers with torch. Nothing here imports torch_npu: its device
does, in ranks alone."""
