"""What all Triton kernels share: their arithmetic, and how they are launched. Nothing is compiled at install.

The kernels of an operator live beside its other implementations: `scan/triton*.py`, `convolution/triton*.py`,
`layers/triton_step*.py`. None of these modules is imported before Triton is known to be there
(`mambacore.backends.triton_problem`).
"""
