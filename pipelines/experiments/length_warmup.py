"""Training on sequences that grow longer, resumable to the same bits: shared by the synthetic tasks."""

import io
import math
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mambacore.errors import InputError
from mambapipelines.files import write_whole

LOSSES_AVERAGED = 100
STEPS_BETWEEN_STATES = 500
WARMUP_STEPS, WARMUP_SHARE = 200, 0.05  # of the learning rate: whichever is shorter
# The loss in nats at which a length counts as learned, its share of the steps at most, and that of all but the last.
LEARNED_LOSS, STAGE_SHARE, SHARE_BEFORE_LAST = 0.1, 0.15, 0.75
LARGEST_GRADIENT_NORM = 1.0
LAST_LENGTH_SHARE = 0.5  # of the steps of mixed lengths; the shorter ones share the rest equally
LENGTHS_STREAM = 2  # of random numbers, besides those of training and test sequences


class Schedule(NamedTuple):
    """How a model is trained.

    Attributes:
        first_length: of the sequences at the beginning.
        last_length: doubling ends here.
        steps: at most.
        enough: training ends at the last length below this mean loss in nats.
        learning_rate: of AdamW.
        mixed: whether every second step, on average, is at a shorter length once the last one is reached.
        cooldown: share of the steps over which the learning rate falls linearly to 0 at the end.
        seed: of the mixed lengths.
    """

    first_length: int
    last_length: int
    steps: int
    enough: float
    learning_rate: float
    mixed: bool = False
    cooldown: float = 0.0
    seed: int = 0

    def length_at(self, step: int, stage: int) -> int:
        """Length of the sequences of a step of the stage at length `stage`: a function of the seed and the step."""
        if not self.mixed or stage < self.last_length:
            return stage
        random = np.random.default_rng([self.seed, LENGTHS_STREAM, step])
        doublings = (self.last_length // self.first_length).bit_length() - 1
        shorter = int(random.integers(doublings)) if doublings and random.random() >= LAST_LENGTH_SHARE else doublings
        return self.first_length * 2**shorter

    def rate_at(self, step: int) -> float:
        """Share of the learning rate at a step: a linear warm-up, then constant, then the cooldown."""
        warmup = max(1, min(WARMUP_STEPS, int(WARMUP_SHARE * self.steps)))
        falling = (self.steps - step) / (self.cooldown * self.steps) if self.cooldown else 1.0
        return min(1.0, (step + 1) / warmup, falling)


def train(
    name: str, model: nn.Module, loss_at: Callable[[int, int], Tensor], schedule: Schedule, kept: Path
) -> tuple[int, int]:
    """Train a model with AdamW, first with short sequences.

    A length is doubled when the mean loss of 100 steps is below 0.1 nats, or when its share of the steps is used up.
    Training continues from the state in `kept`, if there is one, to the same bits.

    Args:
        name: of the model, in what is printed.
        model: in training mode; it is in evaluation mode afterwards.
        loss_at: mean loss of sequences of a length at a step, both given; a function of them alone.
        schedule: lengths, steps and learning rate.
        kept: where states are kept.

    Returns:
        The steps taken, and the length of the last one's sequences.

    Raises:
        InputError: the loss is not finite.
    """
    doublings = max(1, (schedule.last_length // schedule.first_length).bit_length() - 1)
    stage_steps = min(STAGE_SHARE, SHARE_BEFORE_LAST / doublings) * schedule.steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.learning_rate, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.rate_at)
    begin, length, stage_begin, first = time.perf_counter(), schedule.first_length, 0, 0
    losses: deque[float] = deque(maxlen=LOSSES_AVERAGED)
    owners: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": rate}
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        for owner_name, owner in owners.items():
            owner.load_state_dict(state[owner_name])
        first, length, stage_begin = state["step"], state["length"], state["stage_begin"]
        losses.extend(state["losses"])
        print(f"{name}: continues after step {first}", flush=True)
    for step in range(first, schedule.steps):
        if step > first and step % STEPS_BETWEEN_STATES == 0:
            state = {owner_name: owner.state_dict() for owner_name, owner in owners.items()}
            state |= {"step": step, "length": length, "stage_begin": stage_begin, "losses": list(losses)}
            content = io.BytesIO()
            torch.save(state, content)
            write_whole(kept, content.getvalue())
        loss = loss_at(schedule.length_at(step, length), step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT_NORM)
        optimizer.step()
        rate.step()
        losses.append(loss.item())
        mean, whole = sum(losses) / len(losses), len(losses) == LOSSES_AVERAGED
        if (step + 1) % LOSSES_AVERAGED == 0:
            seconds = time.perf_counter() - begin
            print(f"{name}: step {step + 1}, length {length}, loss {mean:.4f}, {seconds:.0f} s", flush=True)
        if not math.isfinite(mean):
            raise InputError(f"the loss of {name} is not finite at step {step + 1}: use a lower --learning-rate.")
        if length == schedule.last_length:
            if whole and mean < schedule.enough:
                model.eval()
                return step + 1, length
        elif (whole and mean < LEARNED_LOSS) or step + 1 - stage_begin >= stage_steps:
            length, stage_begin = 2 * length, step + 1
            losses.clear()
    model.eval()
    return schedule.steps, length
