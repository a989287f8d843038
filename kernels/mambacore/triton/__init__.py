"""Arithmetic and launching shared by all Triton kernels. Nothing is compiled at installation.

The kernels of an operator live beside its other implementations: `scan/triton*.py`, `convolution/triton*.py`,
`layers/triton_step*.py`. None of these modules is imported before Triton is known to be there
(`mambacore.backends.triton_problem`).
"""
