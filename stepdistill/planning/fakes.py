"""Tensors without numbers: how they lie in storages, and others that lie alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

CPU = torch.device("cpu")
Place = tuple[int, torch.Size, tuple[int, ...], int, torch.dtype]


def fake_mode() -> FakeTensorMode:
    """A mode that leaves this process able to fork others that train.

    It registers CUDA where there is none. Autograd counts devices at its first backward; counting
    that one, it would start a thread for it, and refuse to work in any process forked later.
    """
    torch.ones(1, requires_grad=True).backward()
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake(mode: FakeTensorMode, elem: Tensor) -> FakeTensor:
    """A fake tensor on the CPU over a meta tensor's storage."""
    return FakeTensor(mode, elem, CPU)


def fresh(mode: FakeTensorMode, size: Sequence[int], dtype: torch.dtype) -> FakeTensor:
    """A contiguous fake tensor of its own."""
    return fake(mode, torch.empty(size, dtype=dtype, device="meta"))


@dataclass(frozen=True)
class Shapes:
    """How tensors lie. storages: bytes of each, those that are given from outside first.
    tensors: storage, size, stride, offset and dtype of each."""

    storages: tuple[int, ...]
    tensors: tuple[Place, ...]
    given: int = 0

    @classmethod
    def of(
        cls, tensors: Sequence[Tensor], given: Sequence[torch.UntypedStorage | None] = ()
    ) -> Shapes:
        """Of those tensors; a given storage that is gone is None."""
        index: dict[int, int] = {}
        for i, storage in enumerate(given):
            if storage is not None:
                index.setdefault(id(storage), i)
        sizes, places = [0 if one is None else one.nbytes() for one in given], []
        alive = []  # an id is a storage's for as long as that lives
        for tensor in tensors:
            storage = tensor.untyped_storage()
            alive.append(storage)
            if id(storage) not in index:
                index[id(storage)] = len(sizes)
                sizes.append(storage.nbytes())
            place = (tensor.shape, tensor.stride(), int(tensor.storage_offset()), tensor.dtype)
            places.append((index[id(storage)], *place))
        return cls(tuple(sizes), tuple(places), len(given))

    @property
    def nbytes(self) -> int:
        """Of the storages that are not given."""
        return sum(self.storages[self.given :])

    def made(
        self, mode: FakeTensorMode, given: Sequence[torch.UntypedStorage] = ()
    ) -> list[Tensor]:
        """New tensors that lie so, over the given storages where they lie in those."""
        storages: dict[int, torch.UntypedStorage] = dict(enumerate(given))
        out: list[Tensor] = []
        for i, size, stride, offset, dtype in self.tensors:
            if i not in storages:
                elem = torch.empty_strided(size, stride, dtype=dtype, device="meta")
                if not offset and elem.untyped_storage().nbytes() == self.storages[i]:
                    storages[i] = elem.untyped_storage()
                    out.append(fake(mode, elem))
                    continue
                storage = torch.empty(self.storages[i], dtype=torch.uint8, device="meta")
                storages[i] = storage.untyped_storage()
            elem = torch.empty(0, dtype=dtype, device="meta")
            out.append(fake(mode, elem.set_(storages[i], offset, size, stride)))
        return out
