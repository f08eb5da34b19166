"""A pair set goes on with the teacher that it was begun with, wherever that lies."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from support.runs import teacher_dir

from stepdistill.pairs.teacher import make_pairs

UNET = "unet/diffusion_pytorch_model.safetensors"


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
