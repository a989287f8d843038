"""Counts the small operators beside the kernels and the matrix products of a block, as a GPU would launch them."""

from __future__ import annotations

import collections
from collections.abc import Callable

import pytest
from torch.profiler import ProfilerActivity, profile

# Views, allocations and questions, which launch nothing; and products, which are not small.
NOTHING_LAUNCHED = {
    "as_strided", "resolve_conj", "resolve_neg", "empty", "empty_strided", "empty_like", "view", "_unsafe_view", "to",
    "_reshape_alias", "promote_types", "detach", "detach_", "result_type", "alias", "lift_fresh", "item",
}  # fmt: skip
PRODUCTS = {"mm", "addmm", "bmm"}
# On a CPU these begin with a conversion or with zeros, which are part of the kernel on a GPU.
WHOLE_ON_A_GPU = {"add", "mul", "sub", "div", "sum", "mean"}
ACCUMULATION = "torch::autograd::AccumulateGrad"


def small_operators(run: Callable[[], None]) -> collections.Counter[str]:
    """How many operators of each name a run starts."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    found: collections.Counter[str] = collections.Counter()
    for event in profiled.events():
        parents = []
        parent = event.cpu_parent
        while parent is not None:
            parents.append(parent.name)
            parent = parent.cpu_parent
        name = event.name.removeprefix("aten::")
        within = {one.removeprefix("aten::") for one in parents if one.startswith("aten::")}
        if not event.name.startswith("aten::") or within & WHOLE_ON_A_GPU or ACCUMULATION in parents:
            continue
        is_leaf = name in WHOLE_ON_A_GPU or not any(child.name.startswith("aten::") for child in event.cpu_children)
        if is_leaf and name not in NOTHING_LAUNCHED | PRODUCTS:
            found[name] += 1
    return found


def launches_instead_of_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the GPU's kernels be chosen for CPU tensors and compute nothing; the names of those that are started."""
    from mambacore.triton.launch import Kernel  # noqa: PLC0415  only where there is Triton

    started: list[str] = []
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(Kernel, "start", lambda self, *_, **options: started.append(self.fn.__name__))
    return started
