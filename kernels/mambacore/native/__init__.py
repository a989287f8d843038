"""The native CPU library: where it is, whether it can be used, and its C structures (kernels/native/interface.h)."""

from mambacore.native.library import Library, native_library, native_problem

__all__ = ["Library", "native_library", "native_problem"]
