"""Conversion between tensors of a model and those under foreign names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from mambacore.checkpoints.names import CONVOLUTION_WEIGHT, EMBEDDING, HEAD
from mambacore.errors import InputError

_LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def foreign_name(name: str, names: Mapping[str, str]) -> str:
    """Return the foreign name of our tensor, by a table of `names` (`{}` stands for the number of a layer)."""
    return names[_LAYER_NUMBER.sub("{}", name)].format(*_LAYER_NUMBER.findall(name))


class ForeignTensors:
    """Tensors of a model by the names of a foreign checkpoint.

    Attributes:
        tensors: their name to the tensor of the model, with one name per tensor.
        tied: their further names of tied tensors, to the name in `tensors`. Checkpoints may omit these.

    Args:
        model: a language model.
        names: a table of `names`.
    """

    def __init__(self, model: nn.Module, names: Mapping[str, str]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.tied: dict[str, str] = {}
        self._unsqueezed: set[str] = set()
        name_of: dict[int, str] = {}
        state = model.state_dict(keep_vars=True)
        for ours, tensor in state.items():
            theirs = foreign_name(ours, names)
            if id(tensor) in name_of:
                self.tied[theirs] = name_of[id(tensor)]
                continue
            name_of[id(tensor)] = theirs
            self.tensors[theirs] = tensor
            if ours.endswith(CONVOLUTION_WEIGHT):
                self._unsqueezed.add(theirs)
        if HEAD not in state:
            self.tied[names[HEAD]] = names[EMBEDDING]

    def export(self, with_tied: Iterable[str] = ()) -> dict[str, Tensor]:
        """Return copies for a file, on the CPU, with only the given tied ones."""
        exported = {name: self._foreign(name).detach().cpu().contiguous().clone() for name in self.tensors}
        return exported | {name: exported[self.tied[name]].clone() for name in with_tied}

    @torch.no_grad()
    def fill(self, found: Mapping[str, Tensor], source: object) -> None:
        """Copy a checkpoint's tensors into the model.

        Raises:
            InputError: if tensors are missing, unexpected, of another shape or kind, or differ from those they are tied
                to; all are listed, and the model is unchanged.
        """
        # Programs that write a shared tensor once differ in which name they keep.
        found = {self.tied[name]: tensor for name, tensor in found.items() if name in self.tied} | dict(found)
        problems = []
        missing = sorted(self.tensors.keys() - found.keys())
        if missing:
            problems.append(f"lacks {', '.join(missing)}")
        extra = sorted(found.keys() - self.tensors.keys() - self.tied.keys())
        if extra:
            problems.append(f"has {', '.join(extra)}, which the model does not have")
        expected = {name: self._foreign(name) for name in self.tensors}
        expected |= {name: expected[primary] for name, primary in self.tied.items()}
        misshapen = [
            f"{name} as {_describe(found[name])} where the model has {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in found and not (found[name].shape == tensor.shape and found[name].is_floating_point())
        ]
        if misshapen:
            problems.append(f"has {', '.join(misshapen)}")
        untied = [
            f"{name} unlike {primary}"
            for name, primary in self.tied.items()
            if name in found and primary in found and not torch.equal(found[name], found[primary])
        ]
        if untied and not misshapen:
            problems.append(
                f"has {', '.join(untied)}, although the configuration ties them (set there that they are not tied if "
                "they were trained separately, or remove them from the file if a program failed to tie them)"
            )
        if problems:
            raise InputError(f"{source} does not fit its configuration, it {'; it '.join(problems)}.")
        for name, tensor in self.tensors.items():
            tensor.copy_(found[name].squeeze(1) if name in self._unsqueezed else found[name])

    def _foreign(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        return tensor.unsqueeze(1) if name in self._unsqueezed else tensor


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
