"""Pairs of images: both forms, what batches make of them, and what is said where one is wrong."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from support.runs import teacher_dir
from support.samples import SIZE, broken, caption, number_of, png

from stepdistill.cache.encoded import EncodedCache
from stepdistill.cache.precompute import fill, prepare_cache
from stepdistill.config.files import parse_run_config
from stepdistill.config.run import TrainConfig
from stepdistill.data.corrupt import CorruptItemError
from stepdistill.data.preferences import PreferenceFile, PreferenceRows
from stepdistill.data.stream import provided_fields, sample_item, stream
from stepdistill.families.registry import load_family
from stepdistill.training.batches import BatchMaker
from stepdistill.training.feed import Feed
from stepdistill.training.sources import open_dataset

COUNT, CPU = 6, torch.device("cpu")


def written(folder: Path, rows: Any = None, bad: tuple[str, ...] = ()) -> Path:
    """A file of pairs: image 2 i chosen over image 2 i + 1 of caption i."""
    (folder / "images").mkdir(parents=True)
    for i in range(2 * COUNT):
        name = f"{i:02d}.png"
        (folder / "images" / name).write_bytes(broken(i) if name in bad else png(10 * i))
    rows = [pair(i) for i in range(COUNT)] if rows is None else rows
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return file


def pair(i: int) -> dict[str, Any]:
    names = [f"images/{n:02d}.png" for n in (2 * i, 2 * i + 1)]
    return {"text": caption(i), "chosen": names[0], "rejected": names[1]}


def picked(folder: Path, labels: Any, **columns: Any) -> Any:
    """A saved dataset with Pick-a-Pic's columns, the images as plain bytes."""
    images = {f"jpg_{k}": [png(10 * (2 * i + k)) for i in range(len(labels))] for k in (0, 1)}
    columns = {
        "caption": [caption(i) for i in range(len(labels))],
        **images,
        "label_0": labels,
        **columns,
    }
    datasets.Dataset.from_dict(columns).save_to_disk(str(folder))
    return datasets.load_from_disk(str(folder))


def numbers(data: Any) -> list[tuple[str, int, int]]:
    items = [data[i] for i in range(len(data))]
    return [(i["prompt"], number_of(i["image"]), number_of(i["rejected"])) for i in items]


def run_of(teacher: Path, *argv: str) -> Any:
    words = ["--method", "preference", "--pretrained_model_name_or_path", str(teacher)]
    return parse_run_config([*words, *argv])


# -------------------------------------------------------------------------------- sources
def test_json_lines(tmp_path) -> None:
    data = PreferenceFile(written(tmp_path), SIZE)
    assert numbers(data) == [(caption(i), 20 * i, 20 * i + 10) for i in range(COUNT)]
    assert provided_fields(data) == {"cond", "prompts", "x0", "rejected"}
    assert set(sample_item(data)) == {"prompt", "image", "rejected"}
    before = data.fingerprint()
    (tmp_path / "images" / "11.png").write_bytes(b"longer than it was" * 100)
    assert data.fingerprint() != before
    with pytest.raises(CorruptItemError, match=r"11\.png"):
        data[5]


def test_json_lines_of_labels_and_of_nothing(tmp_path) -> None:
    rows = [{**pair(i), "label": i} for i in range(3)]
    file = written(tmp_path, rows)
    assert [PreferenceFile(file, SIZE, "label")[i]["label"] for i in range(3)] == [0, 1, 2]
    assert "prompt" not in PreferenceFile(file, SIZE, "none")[0]
    with pytest.raises(ValueError, match=r"pairs\.jsonl:3: expected a class label, 0 to 1"):
        PreferenceFile(file, SIZE, "label", num_labels=2)


def test_pick_a_pic_s_columns_without_ties(tmp_path) -> None:
    rows = picked(tmp_path / "d", [1, 0, 0.5, 0.0, 0.5], label_1=[0, 1, 0.5, 1.0, 0.5])
    with pytest.warns(UserWarning, match="left out 2 pairs without a winner"):
        data = PreferenceRows(rows, SIZE)
    assert numbers(data) == [(caption(0), 0, 10), (caption(1), 30, 20), (caption(3), 70, 60)]
    assert data.fingerprint() == PreferenceRows(rows, SIZE, "caption").fingerprint()


# ------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rejected": None}, "a pair without a winner"),
        ({"rejected": "images/00.png"}, "a pair without a winner"),
        ({"chosen": "images/77.png"}, "expected every file to exist, got no"),
        ({"chosen": "../../outside.png"}, "expected files inside"),
        ({"text": " "}, "expected a caption"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, change, said) -> None:
    (tmp_path / "outside.png").write_bytes(png(0))
    file = written(tmp_path / "a" / "b", [pair(1), {**pair(0), **change}])
    with pytest.raises(ValueError, match=rf"pairs\.jsonl:2: .*{said}") as err:
        PreferenceFile(file, SIZE)
    assert "\n" not in str(err.value)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a", "chosen": "images/00.png"}, r":1: .*text, chosen and rejected, got columns"),
        ("{", r":1: expected an object with text, chosen, rejected"),
        ("[]", r":1: expected an object with"),
        ("", "expected a pair a line, got none"),
    ],
)
def test_lines_of_another_form(tmp_path, row, said) -> None:
    with pytest.raises(ValueError, match=said):
        PreferenceFile(written(tmp_path, [row]), SIZE)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([1.0, None, 0.0], r"label_0 of 1, 0 or 0\.5 \(a tie\), got None .* in row 1: a pair with"),
        ([1.0, 0.0, 0.3], r"got 0\.3 \(float\) in row 2: a pair without a winner\. Filter 1 such"),
        ([0.5, 0.5], "expected a pair with a winner, got 2 ties"),
        (["a", "b"], "expected numbers in label_0"),
    ],
)
def test_rows_without_a_winner(tmp_path, labels, said) -> None:
    with pytest.raises(ValueError, match=said):
        PreferenceRows(picked(tmp_path / "d", labels), SIZE)


def test_wrong_columns(tmp_path) -> None:
    rows = picked(tmp_path / "d", [1.0])
    with pytest.raises(ValueError, match=r"Pick-a-Pic's columns .* got \['caption', 'jpg_0', 'lab"):
        PreferenceRows(rows.remove_columns("jpg_1"), SIZE)
    with pytest.raises(ValueError, match="caption_column: expected one of"):
        PreferenceRows(rows.remove_columns("caption"), SIZE)
    with pytest.raises(ValueError, match="caption_column: expected a column of texts"):
        PreferenceRows(rows, SIZE, "label_0")


def test_what_a_run_opens(tmp_path, tmp_path_factory) -> None:
    teacher = teacher_dir("sd", tmp_path_factory)
    file = written(tmp_path / "pairs")
    opened = open_dataset(run_of(teacher, "--data.preferences_file", str(file)))
    assert isinstance(opened, PreferenceFile)
    picked(tmp_path / "d", [1.0, 0.0])
    argv = ["--data.dataset_name", str(tmp_path / "d")]
    assert isinstance(open_dataset(run_of(teacher, *argv)), PreferenceRows)
    with pytest.raises(ValueError, match=r"data\.streaming: expected a dataset that is downloaded"):
        open_dataset(run_of(teacher, *argv, "--data.streaming"))
    with pytest.raises(ValueError, match=r"data\.gan: .* got preferences_file"):
        run_of(teacher, *argv, "--data.gan.preferences_file", str(file))


# --------------------------------------------------------------------------------- batches
@pytest.fixture
def family(tmp_path_factory):
    return load_family(teacher_dir("sd", tmp_path_factory))


def test_both_images_become_latents_alike(tmp_path, family) -> None:
    data = PreferenceFile(written(tmp_path), 16)
    raw = next(stream(data, 4, seed=0))
    for room in (0, 1 << 20):
        batch = BatchMaker(family, CPU, 16, latents_cache_bytes=room)(raw)
        assert batch.x0 is not None
        for latents, images in (
            (batch.x0, raw["image"]),
            (batch.extra["rejected"], raw["rejected"]),
        ):
            torch.testing.assert_close(
                latents, family.latents(images).float(), atol=1e-5, rtol=1e-4
            )
        assert set(batch.extra) == {"rejected"}
        assert batch.has() >= {"x0", "rejected", "cond"}
    assert "rejected" not in BatchMaker(family, CPU, 16)(raw, with_x0=False).extra


def test_pairs_of_latents_pass_as_they_are(family) -> None:
    item = {"prompt": "a", "x0": torch.ones(4, 8, 8), "rejected": torch.zeros(4, 8, 8)}
    batch = BatchMaker(family, CPU)(next(stream(_Items(item), 2, seed=0)))
    assert torch.equal(batch.extra["rejected"], torch.zeros(2, 4, 8, 8))


class _Items:
    def __init__(self, item: dict[str, Any]) -> None:
        self.item = item

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.item


@pytest.mark.full
def test_the_cache_holds_both_and_nothing_is_decoded_again(tmp_path, family, monkeypatch) -> None:
    data = PreferenceFile(written(tmp_path / "pairs"), 16)
    plain = BatchMaker(family, CPU, 16)(next(stream(data, 4, seed=0)))
    cache, said = EncodedCache(tmp_path / "cache", family, 16), []
    fill(cache, data, CPU, 1 << 20, say=said.append)
    cache.reopen()
    assert cache.latents is not None
    assert len(cache.latents) == 2 * COUNT
    assert any(f"0 images there, {2 * COUNT} to encode" in line for line in said)
    known = prepare_cache(cache, data, TrainConfig(cache_dir="c", resolution=16), _Alone())
    monkeypatch.setattr("stepdistill.data.source.decode_image", None)
    raw = next(stream(known, 4, seed=0))
    assert not {"image", "rejected"} & raw.keys()
    made = BatchMaker(family, CPU, 16, disk=cache)(raw)
    assert made.x0 is not None
    torch.testing.assert_close(made.x0, plain.x0)
    torch.testing.assert_close(made.extra["rejected"], plain.extra["rejected"])


class _Alone:
    process_index, num_processes, is_main_process, device = 0, 1, True, CPU

    def wait_for_everyone(self) -> None:
        pass


def test_a_lost_latent_of_the_rejected_image_is_made_anew(tmp_path, family) -> None:
    data = PreferenceFile(written(tmp_path), 16)
    feed = Feed(data, TrainConfig(train_batch_size=2, resolution=16))
    raw = next(stream(data, 2, seed=0))
    plain = BatchMaker(family, CPU, 16)(raw)
    left_out = {key: value for key, value in raw.items() if key not in ("image", "rejected")}
    made = BatchMaker(family, CPU, 16)({**left_out, "reread": feed._reread})
    assert made.x0 is not None
    torch.testing.assert_close(made.x0, plain.x0)
    torch.testing.assert_close(made.extra["rejected"], plain.extra["rejected"])


def test_a_pair_with_an_unreadable_image_is_replaced(tmp_path) -> None:
    data = PreferenceFile(written(tmp_path, bad=("03.png",)), SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = stream(data, COUNT, seed=0)
        pairs = list(next(batches)["prompt"])
    assert caption(1) not in pairs
    assert len(pairs) == COUNT
