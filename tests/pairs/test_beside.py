"""Pair sets of models that read images beside the prompt: first frames, images to edit."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.runs import TWO_EXPERTS, build_trainer, fingerprint, teacher_dir

from stepdistill import Tuning, cli
from stepdistill.config.files import parse_run_config
from stepdistill.core.method import Role
from stepdistill.core.solvers import SamplerSpec, sample_x0
from stepdistill.core.times import uniform_grid
from stepdistill.data.images import ImageFolderDataset
from stepdistill.data.source import fitted
from stepdistill.families.registry import load_family
from stepdistill.loading.source import ModelSource
from stepdistill.pairs import teacher as pairs_teacher
from stepdistill.pairs.beside import from_bytes, to_bytes
from stepdistill.pairs.dataset import PairDataset, generate_pairs
from stepdistill.pairs.teacher import make_pairs
from stepdistill.roles.rolebank import RoleBank
from stepdistill.testing.tiny import TINY_FAMILY
from stepdistill.training.sources import open_dataset

GRID = {"num_steps": 4, "shift": 5.0, "critic_steps": 1}


def frames(folder: Path, count: int = 3, column: str = "file_name") -> Path:
    """A folder of captioned pictures."""
    folder.mkdir(exist_ok=True)
    lines = []
    for i in range(count):
        picture = Image.linear_gradient("L").rotate(90 * i).resize((40, 24)).convert("RGB")
        picture.save(folder / f"{i}.png")
        lines.append(json.dumps({column: f"{i}.png", "text": f"clip {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_bytes_give_back_what_came_from_bytes() -> None:
    grey = torch.arange(256.0)
    images = {"image": grey / 127.5 - 1.0, "mask": grey / 255.0}
    again = from_bytes(to_bytes(images))
    assert all(torch.equal(again[key], images[key]) for key in images)


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Path:
    """The export of an image to video student of the high-noise expert."""
    source = ModelSource(str(teacher_dir("wan_i2v_experts", tmp_path_factory)), expert="high")
    out = tmp_path_factory.mktemp("high")
    trainer = build_trainer(
        *("tdm", source, "lora", out / "run"), method_options=GRID, max_train_steps=1
    )
    trainer.train()
    with torch.no_grad():
        for param in trainer.bank.members("student").values():
            param += 0.05 * torch.randn(param.shape, generator=torch.Generator().manual_seed(1))
    return trainer.export(out / "pipeline")


def command(half: Path, folder: Path, out: Path, *more: str) -> PairDataset:
    argv = ["pairs", "--pretrained_model_name_or_path", str(half), "--pairs_dir", str(out)]
    cli.main([*argv, "--train_data_dir", str(folder), *more])
    return PairDataset(out)


@pytest.mark.full
def test_the_boundary_states_of_first_frames(half, tmp_path, tmp_path_factory) -> None:
    """Each state is of its own row's frame, which the item has; the low expert trains on the set,
    resumed exactly, and its export holds both."""
    folder = frames(tmp_path / "frames")
    data = command(half, folder, tmp_path / "states", "--num_pairs", "4", "--batch_size", "2")
    assert len(data) == 4
    assert set(data[0]) == {"prompt", "start", "image"}
    assert data.settings.until == pytest.approx(uniform_grid(4, 5.0)[2])
    family = load_family(half)
    rows = fitted(ImageFolderDataset(folder, None), family.image_size(None), family.size_multiple)
    for i in (0, 2, 3):
        assert torch.equal(data[i]["image"], rows[i % 3]["image"])
        assert data[i]["prompt"] == f"clip {i % 3}"
    shape = family.sample_shape()
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(2))
    denoiser = RoleBank(family, {"teacher": Role()}, Tuning())["teacher"]
    spec = SamplerSpec(uniform_grid(4, 5.0)[:2], "ode")

    def state(row: int) -> torch.Tensor:
        image = {"image": rows[row]["image"].unsqueeze(0)}
        cond = family.with_images(family.encode_text(["clip 2"]), image, shape)
        return sample_x0(denoiser, spec, noise, cond, None, until=data.settings.until)[0]

    assert torch.allclose(data[2]["start"], state(2), atol=1e-5)
    assert float((data[2]["start"] - state(0)).abs().max()) > 1e-3

    teacher = teacher_dir("wan_i2v_experts", tmp_path_factory)
    recipe = "--recipe wan22-i2v-a14b-4step --expert low --pretrained_model_name_or_path"
    run = parse_run_config([*recipe.split(), str(teacher), "--data.pairs_dir", str(data.folder)])
    make = partial(
        build_trainer,
        *(run.method, run.source, "lora", tmp_path / "run"),
        dataset=open_dataset(run),
        method_options=GRID,
        max_train_steps=2,
        checkpointing_steps=1,
    )
    low = make()
    low.train()
    again = make(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    again.train()
    members = [fingerprint(one.bank.members("student")) for one in (low, again)]
    assert members[0] == members[1]
    record = json.loads((low.export(tmp_path / "both") / "distillation.json").read_text())
    assert record["experts"]["calls"] == {"high": 2, "low": 2}


@pytest.mark.full
def test_a_set_that_was_cut_off_is_the_same(half, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(pairs_teacher, "generate_pairs", partial(generate_pairs, shard_size=2))
    folder = frames(tmp_path / "frames")
    command(half, folder, tmp_path / "states")
    files = {p.name: p.read_bytes() for p in (tmp_path / "states").iterdir()}
    assert len(files) == 3  # two shards and the manifest
    (tmp_path / "states" / "shard-00001.safetensors").unlink()
    command(half, folder, tmp_path / "states")
    assert {p.name: p.read_bytes() for p in (tmp_path / "states").iterdir()} == files
    frames(folder, 1)
    Image.new("RGB", (40, 24), "red").save(folder / "0.png")
    with pytest.raises(ValueError, match="another prompts_hash"):
        make_pairs(half, None, tmp_path / "states", train_data_dir=folder, num_pairs=3)
    (tmp_path / "states" / "manifest.json").write_text(
        files["manifest.json"].decode().replace('"image"', '"pixels"')
    )
    with pytest.raises(ValueError, match=r"settings of a pair set, got .*'pixels'"):
        PairDataset(tmp_path / "states")


READING = sorted(n for n, family in TINY_FAMILY.items() if family.reads and n not in TWO_EXPERTS)


@pytest.mark.full
@pytest.mark.parametrize("family", READING)
def test_images_beside_travel_in_a_set(family, tmp_path, tmp_path_factory) -> None:
    """Reflow of an editing model: noises solved for its rows, trained on with their images; of a
    first frame too."""
    teacher = teacher_dir(family, tmp_path_factory)
    folder = frames(tmp_path / "rows", column="conditioning_file_name")
    masked = "mask" in TINY_FAMILY[family].reads
    if masked:  # by one of the pictures, whose brightness it then is
        path = folder / "metadata.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [{**row, "mask_file_name": row["conditioning_file_name"]} for row in rows]
        path.write_text("\n".join(map(json.dumps, rows)))
    make_pairs(teacher, None, tmp_path / "pairs", train_data_dir=folder, num_steps=2)
    data = PairDataset(tmp_path / "pairs")
    beside = {"conditioning", "mask"} if masked else {"conditioning"}
    assert set(data[0]) == {"prompt", "noise", "x0", *beside}
    trainer = build_trainer(
        *("reflow", teacher, "lora", tmp_path / "run"), dataset=data, max_train_steps=1
    )
    trainer.train()


@pytest.mark.parametrize(
    ("family", "given", "match"),
    [
        ("wan_i2v", {"prompts_file": "p"}, "expected --train_data_dir FOLDER .*got --prompts_file"),
        ("wan_i2v", {}, "expected --train_data_dir FOLDER .*got neither"),
        ("wan", {"train_data_dir": "f"}, "expected --prompts_file .*, got --train_data_dir"),
        ("sd", {"prompts_file": "p", "invert": "f"}, ".* got --prompts_file and --invert"),
    ],
)
@pytest.mark.usefixtures("no_loading")
def test_what_it_begins_with_fits_the_model(
    family, given, match, tmp_path, tmp_path_factory
) -> None:
    teacher = teacher_dir(family, tmp_path_factory)
    with pytest.raises(ValueError, match=f"pairs: {match}"):
        make_pairs(teacher, given.get("prompts_file"), tmp_path, num_pairs=1,
                   **{k: v for k, v in given.items() if k != "prompts_file"})  # fmt: skip


@pytest.mark.full
def test_a_picture_that_can_t_be_read(half, tmp_path) -> None:
    folder = frames(tmp_path / "frames")
    (folder / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"images that can be read, got .*1\.png"):
        make_pairs(half, None, tmp_path / "states", train_data_dir=folder)
