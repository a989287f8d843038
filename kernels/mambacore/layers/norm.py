"""Root-mean-square normalisation (Zhang & Sennrich, arXiv 1910.07467, equation 4) as a layer and an operator.

PyTorch's version takes ten passes over memory on a CPU, forward and backward; the native one takes three. On a GPU it
is a kernel each way (`mambacore.layers.triton_norm`).
"""

import torch
from torch import Tensor, nn

from mambacore.backends import ELEMENT_TYPES, TRITON_DTYPES, compute_dtype, native_library_for, triton_computes
from mambacore.contracts import Expected, check_devices, check_sequence, check_shapes
from mambacore.layers.plain_modules import is_plain
from mambacore.layout import sum_of_parts
from mambacore.native_library import Norm
from mambacore.vmap import vmap_by_loop

# Elements per thread below which another thread costs more than it saves.
_ELEMENTS_PER_THREAD = 1 << 16


class RootMeanSquareNorm(nn.Module):
    """Divide every position by the root mean square of its channels, then scale each channel.

    Args:
        width: channels.
        epsilon: keeps positions of zeros finite.
        in_dtype_of_weight: return the dtype of the weight instead of that of the sequence: the dtype of the following
            layers, if the residual sum is in float32.

    Attributes:
        before_linear: whether a linear layer is all that reads the outputs. Under autocast on a GPU they are then in
            its precision at once, which it would cast them to.
    """

    def __init__(self, width: int, epsilon: float = 1e-5, in_dtype_of_weight: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon
        self.in_dtype_of_weight = in_dtype_of_weight
        self.before_linear = False

    def forward(self, sequence: Tensor) -> Tensor:
        """Map (..., width) to the same shape."""
        dtype = self._low_precision(sequence)
        return self._as_wanted(root_mean_square_norm(sequence, self.weight, self.epsilon, dtype), dtype)

    def of_sum(self, sequence: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """Add the output of a residual branch and normalise the sum, on a GPU in one kernel.

        Args:
            sequence: (..., width).
            branch: the same shape.

        Returns:
            `self(sequence + branch)` and `sequence + branch`.
        """
        if not is_plain(self, RootMeanSquareNorm) or not adds_in_kernel(sequence, branch):
            sums = sequence + branch
            return self(sums), sums
        dtype = self._low_precision(sequence)
        normalised, sums = norm_of_sum(sequence, branch, self.weight, self.epsilon, dtype)
        return self._as_wanted(normalised, dtype), sums

    def _low_precision(self, sequence: Tensor) -> torch.dtype | None:
        """Return the dtype of autocast where the outputs may have it at once."""
        kind = sequence.device.type
        if not self.before_linear or torch.compiler.is_compiling() or not torch.is_autocast_enabled(kind):
            return None
        return torch.get_autocast_dtype(kind) if triton_computes(sequence) else None

    def _as_wanted(self, normalised: Tensor, dtype: torch.dtype | None) -> Tensor:
        return normalised.to(self.weight.dtype) if self.in_dtype_of_weight and dtype is None else normalised


def norm_and_sum(norm: nn.Module, sequence: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return `norm.of_sum`, also of a norm of another kind that has taken its place; no branch adds nothing."""
    if branch is None:
        return norm(sequence), sequence
    if isinstance(norm, RootMeanSquareNorm):
        return norm.of_sum(sequence, branch)
    sums = sequence + branch
    return norm(sums), sums


def root_mean_square_norm(
    inputs: Tensor, weight: Tensor, epsilon: float = 1e-5, dtype: torch.dtype | None = None
) -> Tensor:
    """Return inputs / sqrt(mean(inputs^2) + epsilon) * weight over the last dimension.

    Args:
        inputs: (..., width), float32, bfloat16, float16 or float64; computed in float64 for float64, else in float32.
        weight: (width,).
        epsilon: keeps rows of zeros finite.
        dtype: of the outputs; by default that of the inputs.

    Raises:
        ValueError: if the weight does not fit the inputs, or is on another device.
        TypeError: if a dtype is not supported.
    """
    check_sequence("inputs", inputs, dimensions=None)
    check_shapes({"weight": Expected(weight, tuple(inputs.shape[-1:]), "give one number per channel")})
    check_devices(inputs, {"weight": weight})
    outputs, _ = _forward(inputs, weight.to(compute_dtype(inputs.dtype)), epsilon, dtype)
    return outputs


def adds_in_kernel(inputs: Tensor, branch: Tensor | None = None) -> bool:
    """Return whether a kernel adds a residual branch and normalises the sum: on a GPU, if nothing is compiled."""
    fits = branch is None or (branch.shape == inputs.shape and branch.device == inputs.device)
    low = branch is None or branch.dtype in TRITON_DTYPES
    return fits and low and not torch.compiler.is_compiling() and triton_computes(inputs)


def norm_of_sum(
    inputs: Tensor, branch: Tensor, weight: Tensor, epsilon: float = 1e-5, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Return the root-mean-square norm of inputs + branch, and the sum, where `adds_in_kernel`.

    Args:
        inputs, branch: (..., width), of any dtypes of the GPU kernels; their sum has PyTorch's dtype.
        weight, epsilon: see `root_mean_square_norm`.
        dtype: of the normalised outputs; by default that of the sum.

    Raises:
        ValueError: if the weight does not fit the inputs, or is on another device.
    """
    check_shapes({"weight": Expected(weight, tuple(inputs.shape[-1:]), "give one number per channel")})
    check_devices(inputs, {"weight": weight, "branch": branch})
    outputs, sums, _ = _forward_of_sum(inputs, branch, weight.to(torch.float32), epsilon, dtype)
    return outputs, sums


def norm_arguments(inputs: Tensor, weight: Tensor, inverse: Tensor, epsilon: float) -> Norm:
    """Describe contiguous rows to the library, without what it writes but for `inverse`."""
    threads = max(1, min(torch.get_num_threads(), inputs.numel() // _ELEMENTS_PER_THREAD))
    return Norm(
        rows=inverse.numel(), width=inputs.shape[-1], element=ELEMENT_TYPES[inputs.dtype], threads=threads,
        segments=threads, epsilon=epsilon, inputs=inputs.data_ptr(), weight=weight.data_ptr(),
        inverse=inverse.data_ptr(),
    )  # fmt: skip


@torch.library.custom_op("mambacore::root_mean_square_norm_forward", mutates_args=())
def _forward(inputs: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    wanted = inputs.dtype if dtype is None else dtype
    if triton_computes(inputs):
        from mambacore.layers import triton_norm  # noqa: PLC0415  only where there is Triton

        return triton_norm.forward(inputs, weight, epsilon, wanted)
    library = native_library_for(inputs)
    if library is None:
        inverse = inputs.to(weight.dtype).square().mean(-1).add(epsilon).rsqrt()
        return (inputs * inverse.unsqueeze(-1) * weight).to(wanted), inverse
    inputs, weight = inputs.contiguous(), weight.contiguous()
    outputs, inverse = torch.empty_like(inputs), inputs.new_empty(inputs.shape[:-1], dtype=weight.dtype)
    norm = norm_arguments(inputs, weight, inverse, epsilon)
    norm.outputs = outputs.data_ptr()
    library.norm_forward(norm)
    return outputs.to(wanted), inverse


@_forward.register_fake
def _(inputs, weight, epsilon, dtype=None):
    return inputs.new_empty(inputs.shape, dtype=dtype), inputs.new_empty(inputs.shape[:-1], dtype=weight.dtype)


@torch.library.custom_op("mambacore::root_mean_square_norm_backward", mutates_args=())
def _backward(
    grad_outputs: Tensor, inputs: Tensor, weight: Tensor, inverse: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    if triton_computes(inputs):
        from mambacore.layers import triton_norm  # noqa: PLC0415

        grad_inputs, _, grad_weight = triton_norm.backward(grad_outputs, inputs, weight, inverse)
        return grad_inputs, grad_weight
    library = native_library_for(inputs)
    if library is None:
        along = grad_outputs.to(weight.dtype) * inputs
        pull = (along * weight).mean(-1, keepdim=True) * inverse.unsqueeze(-1).square()
        grad_inputs = (grad_outputs * weight - inputs * pull) * inverse.unsqueeze(-1)
        return grad_inputs.to(inputs.dtype), (along * inverse.unsqueeze(-1)).flatten(0, -2).sum(0)
    grad_outputs = grad_outputs.to(inputs.dtype)
    grad_outputs, inputs, weight, inverse = (tensor.contiguous() for tensor in (grad_outputs, inputs, weight, inverse))
    norm = norm_arguments(inputs, weight, inverse, epsilon)
    grad_inputs, grad_weight = torch.empty_like(inputs), weight.new_empty(norm.segments, weight.numel())
    norm.grad_outputs, norm.grad_inputs = grad_outputs.data_ptr(), grad_inputs.data_ptr()
    norm.grad_weight = grad_weight.data_ptr()
    library.norm_backward(norm)
    return grad_inputs, sum_of_parts(grad_weight)


@_backward.register_fake
def _(grad_outputs, inputs, weight, inverse, epsilon):
    return inputs.new_empty(inputs.shape), weight.new_empty(weight.shape)


def _keep_for_backward(ctx, inputs, output) -> None:
    sequence, weight, ctx.epsilon, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(sequence, weight, output[1])


def _gradient(ctx, grad_outputs, _grad_inverse):
    if grad_outputs is None:
        return None, None, None, None
    return (*_backward(grad_outputs, *ctx.saved_tensors, ctx.epsilon), None, None)


_forward.register_autograd(_gradient, setup_context=_keep_for_backward)
vmap_by_loop(_forward)
vmap_by_loop(_backward)


@torch.library.custom_op("mambacore::norm_of_sum_forward", mutates_args=())
def _forward_of_sum(
    inputs: Tensor, branch: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    from mambacore.layers import triton_norm  # noqa: PLC0415

    wanted = torch.promote_types(inputs.dtype, branch.dtype) if dtype is None else dtype
    return triton_norm.forward_of_sum(inputs, branch, weight, epsilon, wanted)


@_forward_of_sum.register_fake
def _(inputs, branch, weight, epsilon, dtype=None):
    of_sum = torch.promote_types(inputs.dtype, branch.dtype)
    outputs = inputs.new_empty(inputs.shape, dtype=of_sum if dtype is None else dtype)
    sums = inputs.new_empty(inputs.shape, dtype=of_sum)
    return outputs, sums, inputs.new_empty(inputs.shape[:-1], dtype=weight.dtype)


@torch.library.custom_op("mambacore::norm_of_sum_backward", mutates_args=())
def _backward_of_sum(
    grad_outputs: Tensor, grad_sums: Tensor | None, sums: Tensor, weight: Tensor, inverse: Tensor, own: torch.dtype,
    other: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from mambacore.layers import triton_norm  # noqa: PLC0415

    return triton_norm.backward(grad_outputs, sums, weight, inverse, grad_sums, (own, other))


@_backward_of_sum.register_fake
def _(grad_outputs, grad_sums, sums, weight, inverse, own, other):
    grad_branch = sums.new_empty(sums.shape if own != other else (0,), dtype=other)
    return sums.new_empty(sums.shape, dtype=own), grad_branch, weight.new_empty(weight.shape)


def _keep_sum_for_backward(ctx, inputs, output) -> None:
    sequence, branch, weight, _, _ = inputs
    ctx.dtypes = sequence.dtype, branch.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], weight, output[2])


def _gradient_of_sum(ctx, grad_outputs, grad_sums, _grad_inverse):
    if grad_outputs is None:
        both = (None, None) if grad_sums is None else (grad_sums.to(dtype) for dtype in ctx.dtypes)
        return (*both, None, None, None)
    grad_inputs, grad_branch, grad_weight = _backward_of_sum(grad_outputs, grad_sums, *ctx.saved_tensors, *ctx.dtypes)
    # One tensor for both where their dtypes are the same.
    return grad_inputs, grad_branch if grad_branch.numel() else grad_inputs, grad_weight, None, None


_forward_of_sum.register_autograd(_gradient_of_sum, setup_context=_keep_sum_for_backward)
vmap_by_loop(_forward_of_sum)
vmap_by_loop(_backward_of_sum)
