"""The demo's weights and held-out digits, read from the package without anything but torch.

Both files are safetensors: eight bytes of header length, a JSON header with dtype, shape and byte range by name, then
the data. The weights are stored in f16 and used in f32; the digits are stored as grey levels 0..16 in u8.
"""

import json
from dataclasses import dataclass
from importlib import resources

import torch
from torch import Tensor

from moec.demo.model import DigitsMoE

WEIGHTS = "digits_moe.safetensors"
HELD_OUT = "digits_held_out.safetensors"

_DTYPES = {"F16": torch.float16, "U8": torch.uint8}


@dataclass(frozen=True)
class Digits:
    """images[B, 8, 8] f32 in 0..1 and labels[B] i64."""

    images: Tensor
    labels: Tensor

    @property
    def num_images(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Digits":
        return Digits(self.images.to(device), self.labels.to(device))


def load_model() -> DigitsMoE:
    """The trained model in f32 and eval mode, on the CPU."""
    model = DigitsMoE()
    tensors, _ = read_tensors(WEIGHTS)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model.eval()


def load_held_out() -> Digits:
    """The digits that training never saw (the last of the set, in its own order)."""
    tensors, _ = read_tensors(HELD_OUT)
    return Digits(tensors["images"].float() / 16, tensors["labels"].long())


def read_tensors(file: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file of this package by name, and its metadata."""
    raw = bytearray(resources.files("moec.demo").joinpath(file).read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        dtype = _DTYPES[entry["dtype"]]
        first, last = entry["data_offsets"]
        flat = torch.frombuffer(raw, dtype=dtype, offset=start + first, count=(last - first) // dtype.itemsize)
        tensors[name] = flat.view(entry["shape"]).clone()
    return tensors, metadata
