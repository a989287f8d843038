"""The causal depthwise convolution: the definition (`reference`), the native adapter, and the operator."""

from mambacore.convolution.operator import causal_convolution
from mambacore.convolution.reference import causal_convolution_reference

__all__ = ["causal_convolution", "causal_convolution_reference"]
