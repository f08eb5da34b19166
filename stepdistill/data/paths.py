"""Paths of an image folder in few bytes each: names end to end, and where each begins.

A million of them are a million times their length and twelve bytes; as objects some 300 MB, which
every data worker would come to copy.
"""

from __future__ import annotations

import os
import warnings
from array import array
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from stepdistill.data.captions import label_of
from stepdistill.data.corrupt import TOLD
from stepdistill.data.decode import IMAGE_SUFFIXES, OTHER_SUFFIXES, is_picture, readable_suffixes
from stepdistill.data.lines import Packed, Rows
from stepdistill.reporting.values import counted

_NOT_OURS = ("@eaDir", "__MACOSX")  # folders of thumbnails and of attributes


class PackedPaths(Rows[tuple[Path, int | None]]):
    """(file, class label) of images below a folder, or (file, None).

    Args: names: (path relative to root, label); labels must not be negative.
    """

    def __init__(self, root: Path, names: Iterable[tuple[str, int | None]]) -> None:
        self.root, self._labels = root, array("i")

        def encoded() -> Iterator[bytes]:
            for name, label in names:
                self._labels.append(-1 if label is None else label)
                yield os.fsencode(name)

        self._names = Packed(encoded())

    def __len__(self) -> int:
        return len(self._names)

    def row(self, index: int) -> tuple[Path, int | None]:
        """See Rows."""
        name, label = os.fsdecode(self._names[index]), self._labels[index]
        return self.root / name, None if label < 0 else label


class LeftOut:
    """Pictures that are not read, to be told in one line.

    Attributes: why: reason -> their number and first names.
    """

    def __init__(self) -> None:
        self.why: dict[str, tuple[int, list[str]]] = {}

    def add(self, why: str, name: str) -> None:
        count, names = self.why.get(why, (0, []))
        self.why[why] = count + 1, [*names, name][:TOLD]

    def tell(self, root: Path) -> None:
        """Warn, where there are any."""
        for why, (count, names) in self.why.items():
            warnings.warn(
                f"train_data_dir: left out {counted(count, 'picture')} in {root} {why} "
                f"({', '.join(names)}).",
                stacklevel=3,
            )


def image_names(folder: Path, left_out: LeftOut | None = None) -> Iterator[str]:
    """Names of the images below a folder, relative to it, in the order of sorted paths.

    Hidden files and folders (._a.png, .ipynb_checkpoints) are left out; links to folders are not
    followed.
    Args: left_out: where pictures of other formats are noted.
    """
    return _names(folder, "", True, LeftOut() if left_out is None else left_out)


def _names(folder: Path, below: str, deep: bool, left_out: LeftOut) -> Iterator[str]:
    readable = readable_suffixes()
    with os.scandir(folder) as listing:
        entries = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in listing)
    for name, is_folder in entries:
        if is_folder and deep and not name.startswith(".") and name not in _NOT_OURS:
            yield from _names(folder / name, f"{below}{name}/", deep, left_out)
        elif not is_folder and is_picture(name, readable):
            yield below + name
        elif not is_folder and is_picture(name, OTHER_SUFFIXES | IMAGE_SUFFIXES):
            left_out.add("of formats that are not read: convert them to PNG or JPEG", below + name)


def labelled_paths(root: Path, num_labels: int | None = None) -> PackedPaths:
    """Images in sub-folders named by class label.

    Args: num_labels: of the model, where it is known.
    Errors: ValueError for another sub-folder, or a label that the model has not.
    """
    folders = sorted(p for p in root.iterdir() if p.is_dir() and p.name[0] != ".")
    folders = [p for p in folders if p.name not in _NOT_OURS]
    odd = [p.name for p in folders if not (p.name.isascii() and p.name.isdigit())]
    if odd:
        raise ValueError(
            f"train_data_dir: expected sub-folders named by class label, got {odd[:3]}."
        )
    labels, left_out = [], LeftOut()
    for sub in folders:
        try:
            labels.append(label_of(sub.name, num_labels))
        except ValueError as err:
            raise ValueError(f"{sub}: {err}. Rename the folder, or take it out.") from err
    names = (
        ((name, label) for name in _names(sub, f"{sub.name}/", False, left_out))
        for sub, label in zip(folders, labels, strict=True)
    )
    paths = PackedPaths(root, chain.from_iterable(names))
    left_out.tell(root)
    return paths


def plain_paths(root: Path) -> PackedPaths:
    """All images below a folder, without labels."""
    left_out = LeftOut()
    paths = PackedPaths(root, ((name, None) for name in image_names(root, left_out)))
    left_out.tell(root)
    return paths
