"""Triton kernels, one file per operator; installed as ``tgdp_fast.kernels``.

Nothing is imported here: a kernel's module is loaded by the operator that launches it, so that the package
works without Triton.
"""
