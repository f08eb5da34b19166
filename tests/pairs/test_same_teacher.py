"""A pair set goes on with the teacher that it was begun with, wherever that lies."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from support.runs import teacher_dir

from stepdistill.pairs.teacher import make_pairs

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.full
def test_another_teacher_at_the_path_is_refused_and_a_moved_one_goes_on(
    tmp_path, tmp_path_factory, monkeypatch
) -> None:
    teacher = shutil.copytree(teacher_dir("sd_v", tmp_path_factory), tmp_path / "teacher")
    (tmp_path / "p.txt").write_text("a\n")

    def make(folder, count):
        options = {"num_pairs": count, "num_steps": 1, "batch_size": 1}
        return make_pairs(folder, tmp_path / "p.txt", tmp_path / "pairs", **options)

    make(teacher, 1)
    moved = teacher.rename(tmp_path / "moved")
    make(moved, 2)
    manifest = json.loads((tmp_path / "pairs" / "manifest.json").read_text())
    assert manifest["num_pairs"] == 2
    assert manifest["teacher"]["files"][UNET]
    save_file({name: value + 1 for name, value in load_file(moved / UNET).items()}, moved / UNET)
    monkeypatch.setattr("stepdistill.pairs.teacher.load_family", None)  # no weight is read
    with pytest.raises(ValueError, match=f"pairs: expected the teacher .* content of {UNET} in"):
        make(moved, 3)


@pytest.mark.full
def test_a_set_is_of_one_solver_and_an_inversion_has_none(tmp_path, tmp_path_factory) -> None:
    teacher, folder = teacher_dir("sd_v", tmp_path_factory), tmp_path / "pairs"
    (tmp_path / "p.txt").write_text("a\n")
    options = {"num_pairs": 1, "num_steps": 3, "batch_size": 1}
    make_pairs(teacher, tmp_path / "p.txt", folder, solver="multistep", **options)
    made = load_file(folder / "shard-00000.safetensors")["x0"]
    make_pairs(teacher, tmp_path / "p.txt", tmp_path / "ddim", **options)
    assert not made.equal(load_file(tmp_path / "ddim" / "shard-00000.safetensors")["x0"])
    with pytest.raises(ValueError, match="another solver"):
        make_pairs(teacher, tmp_path / "p.txt", folder, **options)
    (tmp_path / "real").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "real" / "0.png")
    (tmp_path / "real" / "0.txt").write_text("a")
    with pytest.raises(ValueError, match="solver: expected ddim for real images inverted"):
        make_pairs(teacher, None, tmp_path / "x", invert=tmp_path / "real", solver="multistep")
