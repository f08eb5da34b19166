"""What `pip install` of the wheel gives does all that a checkout does, from any folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from PIL import Image
from support.processes import LIMIT_S

from stepdistill.testing.tiny import TINY

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The programs of an environment that holds the wheel, and these libraries."""
    made = tmp_path_factory.mktemp("wheel")
    built = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    source = made / "source"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(source)], check=True)
    subprocess.run([*built, "--wheel-dir", str(made), str(source)], check=True, timeout=LIMIT_S)
    subprocess.run([sys.executable, "-m", "venv", str(made / "env")], check=True)
    python = made / "env" / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, str(next(made.glob("*.whl")))], check=True, timeout=LIMIT_S)
    lib = next((made / "env" / "lib").glob("python*")) / "site-packages"
    (lib / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    return made / "env" / "bin"


def run(where: Path, *command: str | Path) -> str:
    """What a program prints. Fails where it does."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=where, env={**env, "ACCELERATE_USE_CPU": "true"},
        capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_a_recipe_an_export_with_a_scheduler_of_ours_and_a_launcher(installed, tmp_path) -> None:
    TINY["sd3"]().save_pretrained(tmp_path / "teacher")
    (tmp_path / "pictures").mkdir()
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"number {i}"}) for i in range(2)]
    (tmp_path / "pictures" / "metadata.jsonl").write_text("\n".join(lines))
    for i in range(2):
        Image.new("RGB", (16, 16), (90 * i, 20, 200)).save(tmp_path / "pictures" / f"{i}.png")
    program = installed / "stepdistill"
    folder = Path(run(tmp_path, program, "list", "--where").strip())
    assert folder.is_relative_to(installed.parent)

    common = "--pretrained_model_name_or_path teacher --max_train_steps 1 --train_batch_size 1 "
    common += "--mixed_precision no --resolution 16 --gradient_accumulation_steps 1"
    recipe = "--recipe sd15-tscd-one-lora --tuning.rank 2 --data.train_data_dir pictures"
    files = [*recipe.split(), *common.split()]
    run(tmp_path, program, "train", *files, "--output_dir", "one")
    code = tmp_path / "one" / "pipeline" / "scheduler" / "tcd_flow_match_scheduler.py"
    assert code.read_text() == (ROOT / "pipelines" / code.name).read_text()

    launcher = folder / "train" / "trajectory_segmented.py"
    run(tmp_path, installed / "python", launcher, *files, "--output_dir", "two")
    assert (tmp_path / "two" / "pipeline").is_dir()
    for name in ("configs/accelerate/fsdp2.yaml", "pipelines/negative_prompt_one_step.py"):
        assert (folder / name).read_text() == (ROOT / name).read_text()
