"""Generation on a GPU: tokens per second with one captured graph per token, beside a Transformer of equal size.

    python kernels/benchmarks/gpu_generation.py --output bench-gpu --budget-seconds 120

A prompt of 2,048 tokens, then 128 new ones, bfloat16, batch 1 to 128, the prompt's time included. Ours: 24 selective
layers of width 768, whose states the captured step overwrites. The Transformer: 12 layers of width 768, each 12 heads
of attention with a cache of fixed size and a feed-forward layer of four times the width, which is as many parameters;
its step is one captured graph as well.
"""

import time
from collections.abc import Callable

import torch
from gpu_measure import Table, options_of, plot
from torch import Tensor, nn
from torch.nn import functional as F

from mambacore.layers import ResidualStack
from mambacore.layers.step import states_in_place
from mambacore.state import state_tensors

MODEL_WIDTH, HEADS, VOCABULARY = 768, 12, 32
SELECTIVE_LAYERS, TRANSFORMER_LAYERS = 24, 12
PROMPT, NEW = 2048, 128


class CachedLayer(nn.Module):
    """Attention over a cache of fixed size and a feed-forward layer, each after a norm and around a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(MODEL_WIDTH) for _ in range(2))
        self.come = nn.Linear(MODEL_WIDTH, 3 * MODEL_WIDTH, bias=False)
        self.go = nn.Linear(MODEL_WIDTH, MODEL_WIDTH, bias=False)
        self.feed_forward = nn.Sequential(
            nn.Linear(MODEL_WIDTH, 4 * MODEL_WIDTH, bias=False),
            nn.GELU(),
            nn.Linear(4 * MODEL_WIDTH, MODEL_WIDTH, bias=False),
        )

    def forward(self, sequence: Tensor, cache: Tensor, places: Tensor, mask: Tensor | None) -> Tensor:
        """``cache`` (2, batch, heads, positions, head width) takes the keys and values of ``places``."""
        batch, length, _ = sequence.shape
        parts = self.come(self.norms[0](sequence)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        cache.index_copy_(3, places, parts[1:])
        if mask is not None:
            key, value = cache.unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        sequence = sequence + self.go(mixed.transpose(1, 2).flatten(2))
        return sequence + self.feed_forward(self.norms[1](sequence))


def selective_runner(batch: int) -> tuple[Callable[[Tensor], object], int]:
    """A function that reads a prompt (batch, length) and generates, and how many parameters it has."""
    embedding = nn.Embedding(VOCABULARY, MODEL_WIDTH).cuda().bfloat16()
    stack = ResidualStack(MODEL_WIDTH, ["selective"] * SELECTIVE_LAYERS).cuda().bfloat16()
    token = torch.zeros(batch, 1, dtype=torch.long, device="cuda")

    def advance(tokens: Tensor, state):
        hidden, state = stack(embedding(tokens), state)
        token.copy_(F.linear(hidden[:, -1:], embedding.weight).argmax(-1))
        return state

    state = advance(token.expand(batch, 8).contiguous(), None)
    held = state_tensors(state)
    with states_in_place():
        advance(token, state)  # compiles before the capture
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            same = advance(token, state)
    if any(place is not value for place, value in zip(held, state_tensors(same), strict=True)):
        raise RuntimeError("the step did not overwrite its states, so the graph would repeat the first one")

    def run(prompt: Tensor) -> None:
        for place, value in zip(held, state_tensors(advance(prompt, None)), strict=True):
            place.copy_(value)
        for _ in range(NEW):
            graph.replay()

    return run, sum(parameter.numel() for parameter in stack.parameters())


def transformer_runner(batch: int) -> tuple[Callable[[Tensor], object], int]:
    """The same for the Transformer."""
    embedding = nn.Embedding(VOCABULARY, MODEL_WIDTH).cuda().bfloat16()
    layers = nn.ModuleList(CachedLayer() for _ in range(TRANSFORMER_LAYERS)).cuda().bfloat16()
    shape = (TRANSFORMER_LAYERS, 2, batch, HEADS, PROMPT + NEW, MODEL_WIDTH // HEADS)
    caches = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    token = torch.zeros(batch, 1, dtype=torch.long, device="cuda")
    place = torch.full((1,), PROMPT, device="cuda")
    positions = torch.arange(PROMPT + NEW, device="cuda")

    def advance(tokens: Tensor, places: Tensor, mask: Tensor | None) -> None:
        sequence = embedding(tokens)
        for layer, cache in zip(layers, caches, strict=True):
            sequence = layer(sequence, cache, places, mask)
        token.copy_(F.linear(sequence[:, -1:], embedding.weight).argmax(-1))

    def step() -> None:
        advance(token, place, (positions <= place)[None, None, None])
        place.add_(1)

    step()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step()

    def run(prompt: Tensor) -> None:
        advance(prompt, positions[:PROMPT], None)
        place.fill_(PROMPT)
        for _ in range(NEW):
            graph.replay()

    return run, sum(parameter.numel() for parameter in layers.parameters())


RUNNERS = {"genomamba": selective_runner, "Transformer": transformer_runner}


def main() -> None:
    options = options_of(__doc__, 120)
    table = Table(options.output / "gpu_generation.tsv", ["batch", "system", "million parameters", "tokens/s"])
    lines: dict[str, dict[float, float]] = {name: {} for name in RUNNERS}
    with torch.no_grad():
        for batch in (1, 2, 4, 8, 16, 32, 64, 128):
            for name, make in RUNNERS.items():
                if time.monotonic() > options.until:
                    print("the budget is spent; what is left is not measured", flush=True)
                    break
                try:
                    run, parameters = make(batch)
                    prompt = torch.randint(VOCABULARY, (batch, PROMPT), device="cuda")
                    run(prompt)
                    torch.cuda.synchronize()
                    begin = time.perf_counter()
                    run(prompt)
                    torch.cuda.synchronize()
                    rate = batch * NEW / (time.perf_counter() - begin)
                    table.add(batch, name, parameters / 1e6, rate)
                    lines[name][batch] = rate
                except torch.OutOfMemoryError:
                    table.add(batch, name, "", "out of memory")
                torch.cuda.empty_cache()
    plot(options.output / "gpu_generation.png", "Generation, prompt 2,048, 128 new", "batch", "tokens/s", lines)


if __name__ == "__main__":
    main()
