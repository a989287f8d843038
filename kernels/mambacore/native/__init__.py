"""The native CPU library: where it is, whether it can be used, and its C structures (kernels/native/interface.h)."""

from mambacore.native.library import Library, library, native_problem

__all__ = ["Library", "library", "native_problem"]
