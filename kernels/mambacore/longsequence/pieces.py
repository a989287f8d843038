"""Exact backpropagation through a sequence in pieces, in the memory of one piece plus the states between pieces.

A causal model is a function `(sequence, state) -> (sequence, state)`, so the chain rule over pieces needs only the
gradient of the state between them. The forward pass runs without gradients and keeps the states at the boundaries;
then, from the last piece to the first, each is recomputed with gradients from its incoming state, and backward starts
from its share of the loss and from its outgoing state, whose gradient the next piece has computed. This is
checkpointing (Chen et al., arXiv 1604.06174) over the length instead of the depth: each piece but the last runs forward
twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import get_device_states, set_device_states

from mambacore.devices import wide_dtype
from mambacore.longsequence.distributed import average_gradients
from mambacore.longsequence.losses import Loss, PooledLoss, share_of_loss
from mambacore.longsequence.reference import LongSequenceResult
from mambacore.state import map_state, state_tensors

# Positions in a piece: the fastest of 1,024 to 16,384 on a CPU, which differ by a seventh (benchmarks/longsequence.py).
# Memory is proportional to it.
PIECE_LENGTH = 4096


def backward_in_pieces(
    model: Callable[..., tuple[Any, Any]],
    sequence: Tensor,
    loss: Loss,
    *,
    piece_length: int = PIECE_LENGTH,
    state: Any = None,
    sequence_starts: Tensor | None = None,
    scale: float = 1.0,
    synchronise: bool = True,
    progress: Callable[[int, int], object] | None = None,
) -> LongSequenceResult:
    """Add the gradients of the whole sequence to `.grad`, in bounded memory.

    Memory is that of one piece with its gradients, besides one state per piece, which is small where the state has a
    fixed size; the keys and values of attention grow with the sequence, and those at all boundaries are kept. The
    gradients are those of `backward_at_once` to rounding; nothing is cut off. They are added up piece by piece in
    the dtype of their parameter, so keep parameters in float32 and use autocast rather than parameters of 16 bits.

    Args:
        model: a causal `(piece, state) -> (outputs, state)`, also called with the keyword `sequence_starts` if that
            is given: a module, a DistributedDataParallel around one, or any function. The state before the first piece
            is `state`; outgoing states are nested tuples of tensors, numbers and None. Each piece but the last is
            run twice, so the model must depend on nothing else that changes, and hooks on it and its parameters run
            once per piece.
        sequence: (batch, length, ...): token ids, which the model embeds piece by piece, or real numbers; these get
            their gradient too if they require one.
        loss: either a function of a piece's outputs and its positions (a slice of the length) that returns the piece's
            *share* of the loss, a scalar; shares add up to the loss, so divide sums by the weight of the whole sequence
            (`TokenCrossEntropy`, `next_token_cross_entropy`). It is evaluated once per piece, from the
            last to the first. Or a `PooledLoss` of what is pooled over all positions
            (`pooled_cross_entropy`).
        piece_length: positions per piece; the last one may be shorter.
        state: the model's state before the sequence. Its tensors that require a gradient get theirs.
        sequence_starts: (batch, length), boolean, True where a new record begins (`mambacore.packing`).
        scale: factor for the gradients: 1 / steps for accumulation over several calls, or a gradient scaler's scale. It
            does not apply to the returned loss.
        synchronise: with a DistributedDataParallel: average `.grad` over the ranks at the end, as its own backward
            would. False on all but the last of several accumulated calls. Ranks may have different lengths. Where the
            model is a function around one, call `average_gradients` instead.
        progress: called with the number of pieces run so far and the total, which is twice the number of pieces less
            one.

    Random numbers (dropout) drawn from PyTorch's generators of the CPU and of the devices of the sequence and the
    module's parameters are the same when a piece is run again; a loss in shares draws what follows the model's last
    numbers. Autocast, where active, holds for both runs, and each operator's backward has the precision of its forward.

    Returns:
        The loss of this rank, and the model's state after the last position, detached.

    Raises:
        ValueError: if arguments are inconsistent, the loss is not a scalar, the state is not made of tuples, or nothing
            requires a gradient.
        RuntimeError: if the model modifies its incoming state in place, or returns another state when run again.
    """
    _check(sequence, piece_length, sequence_starts)
    # The module within, whose backward pass does not start the exchange that DistributedDataParallel prepares.
    function = model.module if isinstance(model, DistributedDataParallel) else model
    parameters = function.parameters() if isinstance(function, nn.Module) else ()
    on_devices = {tensor.device: tensor for tensor in (sequence, *parameters)}
    work = _Pieces(function, sequence, loss, sequence_starts, piece_length, scale, tuple(on_devices.values()))
    report = _Progress(progress, 2 * work.count - 1)
    _check_state(state)
    first = _Carried(map_state(_kept, state), None)
    boundaries = list(_walk(work, first, report))

    total = torch.zeros((), dtype=wide_dtype(sequence.device), device=sequence.device)
    input_gradient = torch.zeros_like(sequence) if sequence.requires_grad else None
    gradients: list[Tensor | None] | None = None
    final_state, random, reached = None, None, False
    for index in reversed(range(work.count)):
        boundary = boundaries.pop()
        boundary.random.restore()
        wanted = [tensor.requires_grad for tensor in state_tensors(state)] if index == 0 else None
        done = _backward_through_piece(work, index, boundary.carried, wanted, gradients, random)
        gradients, random, reached = done.gradients, done.random, reached or done.reached
        if done.share is not None:
            total += done.share.to(total)
        if input_gradient is not None and done.input_gradient is not None:
            input_gradient[:, work.positions(index)] = done.input_gradient
        if index == work.count - 1:
            final_state = done.state
        report()
    if not reached:
        raise ValueError("nothing that the loss depends on requires a gradient; unfreeze the model's parameters")
    assert gradients is not None and random is not None  # there is at least one piece
    random.restore()
    with work.precision_of_forward():
        _backward_through_arguments(sequence, input_gradient, state, gradients)
    if synchronise and isinstance(model, DistributedDataParallel):
        average_gradients(model)
    return LongSequenceResult(total, final_state)


class _Carried(NamedTuple):
    """The states carried between pieces: of the model and of the loss's pooling."""

    state: Any
    pooling: Any


class _RandomState(NamedTuple):
    """The random number generators of the CPU and of other devices."""

    cpu: Tensor
    devices: tuple[int, ...]
    states: tuple[Tensor, ...]
    device_type: str | None

    @classmethod
    def now(cls, tensors: tuple[Tensor, ...]) -> _RandomState:
        """Capture the current generators on the tensors' devices."""
        devices, states = get_device_states(*tensors)
        types = [tensor.device.type for tensor in tensors if tensor.device.type != "cpu"]
        return cls(torch.get_rng_state(), tuple(devices), tuple(states), types[0] if types else None)

    def restore(self) -> None:
        """Set the generators back, so that the same numbers follow."""
        torch.set_rng_state(self.cpu)
        if self.devices:
            set_device_states(self.devices, self.states, device_type=self.device_type)

    def equals(self, other: _RandomState) -> bool:
        """Return whether both would produce the same numbers."""
        pairs = zip([self.cpu, *self.states], [other.cpu, *other.states], strict=True)
        return all(torch.equal(one, two) for one, two in pairs)


class _Boundary(NamedTuple):
    """All that is kept of a piece between the forward and the backward pass."""

    carried: _Carried
    random: _RandomState


class _Done(NamedTuple):
    """Result of the backward pass through one piece."""

    share: Tensor | None  # of the loss, detached
    state: Any  # the model's outgoing one, detached; of the last piece only
    gradients: list[Tensor | None]  # of each tensor that came in
    input_gradient: Tensor | None
    random: _RandomState  # for the loss of the next piece
    reached: bool  # whether anything required a gradient


@dataclass(frozen=True)
class _Pieces:
    """The computation, cut into pieces."""

    model: Callable[..., tuple[Any, Any]]
    sequence: Tensor
    loss: Loss
    sequence_starts: Tensor | None
    piece_length: int
    scale: float
    on_devices: tuple[Tensor, ...]  # one tensor on each device that may draw random numbers

    @property
    def count(self) -> int:
        return -(-self.sequence.shape[1] // self.piece_length)

    def positions(self, index: int) -> slice:
        begin = index * self.piece_length
        return slice(begin, min(begin + self.piece_length, self.sequence.shape[1]))

    def random(self) -> _RandomState:
        return _RandomState.now(self.on_devices)

    def inputs(self, index: int) -> Tensor:
        return self.sequence.detach()[:, self.positions(index)]

    @contextmanager
    def precision_of_forward(self) -> Iterator[None]:
        """Leave autocast for a backward pass, which would lower products that forward kept in full precision."""
        with ExitStack() as left:
            for kind in {tensor.device.type for tensor in self.on_devices}:
                if torch.is_autocast_enabled(kind):
                    left.enter_context(torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=False))
            yield

    def run(self, index: int, inputs: Tensor, state: Any) -> tuple[Any, Any]:
        """Run the model on a piece."""
        if self.sequence_starts is None:
            return self.model(inputs, state)
        return self.model(inputs, state, sequence_starts=self.sequence_starts[:, self.positions(index)])

    def advance(self, index: int, carried: _Carried) -> _Carried:
        """Return the states after a piece."""
        outputs, state = self.run(index, self.inputs(index), carried.state)
        pooling = self.loss.pool(outputs, carried.pooling)[1] if isinstance(self.loss, PooledLoss) else None
        return _Carried(state, pooling)


@dataclass
class _Progress:
    """Counts the pieces that have been run, and reports them."""

    listener: Callable[[int, int], object] | None
    total: int
    done: int = 0

    def __call__(self) -> None:
        self.done += 1
        if self.listener is not None:
            self.listener(self.done, self.total)


def _walk(work: _Pieces, carried: _Carried, report: _Progress) -> Iterator[_Boundary]:
    """Run forward without gradients and yield the incoming states of every piece; the last one is not run."""
    with_graph = False
    for index in range(work.count):
        boundary = _Boundary(carried, work.random())
        yield boundary
        if index == work.count - 1:
            return
        versions = [tensor._version for tensor in state_tensors(carried)]
        with torch.set_grad_enabled(with_graph):
            outgoing = work.advance(index, carried)
        if not with_graph and not boundary.random.equals(work.random()):
            # Without gradients a model may take another path (ResidualStack walks in small pieces), and so draw in
            # another order than it will with them. Where numbers are drawn, take the path that will be taken later.
            with_graph = True
            boundary.random.restore()
            with torch.enable_grad():
                outgoing = work.advance(index, carried)
        if versions != [tensor._version for tensor in state_tensors(carried)]:
            raise RuntimeError("the model modifies its incoming state in place; return a new state instead")
        _check_state(outgoing)
        carried = map_state(_kept, outgoing)
        report()


def _backward_through_piece(
    work: _Pieces,
    index: int,
    carried: _Carried,
    wanted: list[bool] | None,
    gradients: list[Tensor | None] | None,
    random: _RandomState | None,
) -> _Done:
    """Run a piece again, with gradients, and go backward from its share of the loss and its outgoing state.

    Args:
        work, index, carried: which piece, and what comes in.
        wanted: for each tensor of the model's incoming state whether it needs a gradient; all that can when None.
        gradients: those of the outgoing tensors; None for the last piece.
        random: what the loss draws from; None for the last piece, whose loss draws on from its model.
    """
    incoming = map_state(lambda tensor: tensor.detach(), carried)
    incoming_tensors = list(state_tensors(incoming))
    for number, tensor in enumerate(incoming_tensors):
        tensor.requires_grad_(_differentiable(tensor) if wanted is None else wanted[number])
    inputs = work.inputs(index).requires_grad_(work.sequence.requires_grad)
    with torch.enable_grad():
        outputs, state = work.run(index, inputs, incoming.state)
        if random is not None and not isinstance(work.loss, PooledLoss):
            random.restore()  # the next numbers after this piece's model were those of the next piece's
        share, pooling = share_of_loss(
            work.loss, outputs, work.positions(index), incoming.pooling, is_last=index == work.count - 1
        )
        if random is None or not isinstance(work.loss, PooledLoss):
            random = work.random()
    final_state = None
    outgoing = list(state_tensors(_Carried(state, pooling)))
    if gradients is None:
        _check_state(state)
        final_state = map_state(_kept, state)
        gradients = [None] * len(outgoing)
    if len(gradients) != len(outgoing) or any(
        gradient is not None and gradient.shape != tensor.shape
        for gradient, tensor in zip(gradients, outgoing, strict=True)
    ):
        raise RuntimeError(
            "the model returned another state when a piece was run again; "
            "it must depend only on the piece and the state"
        )
    roots = [(tensor, gradient) for tensor, gradient in zip(outgoing, gradients, strict=True) if gradient is not None]
    if share is not None:
        roots.append((share, torch.full_like(share, work.scale)))
    roots = [(tensor, gradient) for tensor, gradient in roots if tensor.requires_grad]
    if roots:
        with work.precision_of_forward():
            torch.autograd.backward([tensor for tensor, _ in roots], [gradient for _, gradient in roots])
    return _Done(
        None if share is None else share.detach(),
        final_state,
        [tensor.grad for tensor in incoming_tensors],
        inputs.grad,
        random,
        bool(roots),
    )


def _backward_through_arguments(
    sequence: Tensor, input_gradient: Tensor | None, state: Any, gradients: list[Tensor | None]
) -> None:
    """Backpropagate the gradients of the sequence and of the initial state to their origins."""
    roots = [] if input_gradient is None else [(sequence, input_gradient)]
    initial = list(state_tensors(state))
    # What follows the state's tensors is the pooling's state, which starts from nothing.
    pairs = zip(initial, gradients[: len(initial)], strict=True)
    roots += [(tensor, gradient) for tensor, gradient in pairs if gradient is not None]
    if roots:
        torch.autograd.backward([tensor for tensor, _ in roots], [gradient for _, gradient in roots])


def _differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _kept(tensor: Tensor) -> Tensor:
    """A copy without history.

    A copy, because a state may be a view of a whole piece, and because it was made among a piece's buffers: kept where
    it lies, it would hold their memory apart when they are freed. Measured: pieces of 1024 took 0.8 GB for 65,536
    positions instead of 0.1.
    """
    return tensor.detach().clone()


def _check(sequence: Tensor, piece_length: int, sequence_starts: Tensor | None) -> None:
    """Check the arguments."""
    if sequence.dim() < 2 or sequence.shape[1] < 1:
        raise ValueError(
            f"sequence must be (batch, length, ...) with at least one position but has shape {tuple(sequence.shape)}"
        )
    if piece_length < 1:
        raise ValueError(f"piece_length must be at least 1 but is {piece_length}")
    if sequence_starts is not None and sequence_starts.shape != sequence.shape[:2]:
        raise ValueError(
            f"sequence_starts must have shape {tuple(sequence.shape[:2])} to fit the sequence but has "
            f"{tuple(sequence_starts.shape)}"
        )
    if torch.is_inference_mode_enabled():
        raise ValueError("there are no gradients in inference mode; call backward_in_pieces outside of it")


def _check_state(state: Any) -> None:
    """Check that a state has no containers that could hide tensors from the chain rule."""
    if isinstance(state, tuple):
        for member in state:
            _check_state(member)
    elif state is not None and not isinstance(state, (Tensor, bool, int, float, str)):
        raise ValueError(
            f"a state must be nested tuples of tensors, numbers and None but holds a {type(state).__name__}; "
            "make it a tuple"
        )
