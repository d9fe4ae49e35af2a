"""Triton kernels, installed as spos_fast.kernels. Imported when the first op needs one."""
