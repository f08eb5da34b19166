"""Paths of an image folder in few bytes each: names end to end, and where each begins.

A million of them are a million times their length and twelve bytes; as objects some 300 MB, which
every data worker would come to copy.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, overload

from stepdistill.data.decode import is_picture


class PackedPaths(Sequence[tuple[Path, int | None]]):
    """(file, class label) of images below a folder, or (file, None).

    Args: names: (path relative to root, label); labels must not be negative.
    """

    def __init__(self, root: Path, names: Iterable[tuple[str, int | None]]) -> None:
        self.root, packed = root, bytearray()
        self._ends, self._labels = array("Q"), array("i")
        for name, label in names:
            packed += os.fsencode(name)
            self._ends.append(len(packed))
            self._labels.append(-1 if label is None else label)
        self._packed = bytes(packed)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> tuple[Path, int | None]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[Path, int | None]]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        begin = self._ends[index - 1] if index else 0
        name = os.fsdecode(self._packed[begin : self._ends[index]])
        label = self._labels[index]
        return self.root / name, None if label < 0 else label


def image_names(folder: Path, deep: bool = True) -> Iterator[str]:
    """Names of a folder's images relative to it, in the order of sorted paths.

    Hidden files and folders (._a.png, .ipynb_checkpoints) are left out.
    Args: deep: also those of its sub-folders, which are not followed through links.
    """
    with os.scandir(folder) as found:
        entries = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in found)
    for name, is_folder in entries:
        if is_folder and deep and not name.startswith("."):
            yield from (f"{name}/{below}" for below in image_names(folder / name))
        elif not is_folder and is_picture(name):
            yield name


def labelled_paths(root: Path) -> PackedPaths:
    """Images in sub-folders named by class label. Errors: ValueError for another sub-folder."""
    folders = sorted(p for p in root.iterdir() if p.is_dir() and p.name[0] != ".")
    odd = [p.name for p in folders if not p.name.isdigit()]
    if odd:
        raise ValueError(
            f"train_data_dir: expected sub-folders named by class label, got {odd[:3]}."
        )
    names = (
        ((f"{sub.name}/{name}", int(sub.name)) for name in image_names(sub, deep=False))
        for sub in folders
    )
    return PackedPaths(root, chain.from_iterable(names))


def plain_paths(root: Path) -> PackedPaths:
    """All images below a folder, without labels."""
    return PackedPaths(root, ((name, None) for name in image_names(root)))
