"""The GPU's kernels, written in Triton: nothing to compile at install.

``launch`` says how a kernel is started (compiled on a device, or by Triton's interpreter on CPU tensors), the modules
named after operators hold the kernels, and ``scan``, ``convolution`` and ``step`` adapt tensors to them. Nothing here
is imported before Triton is known to be there (``mambacore.backends.triton_problem``).
"""
