"""A method and a family in a distribution of their own are found and used like ours.

They are installed by pip, by entry points alone: nothing of this package names them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.processes import LIMIT_S

ROOT = Path(__file__).parents[1]
ELSEWHERE = ROOT / "tests" / "support" / "elsewhere"
pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> dict[str, str]:
    """The environment of a process where the distribution is installed."""
    made = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(ELSEWHERE, made / "source")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", made / "site", "."],
        cwd=made / "source", check=True, timeout=LIMIT_S,
    )  # fmt: skip
    paths = [made / "site", ROOT, ROOT / "tests"]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "COLUMNS": "200"}


def run(where: Path, env: dict[str, str], *commands: str) -> str:
    """What commands of ours print in one new process; one that exits must exit with 0."""
    code = (
        "import shlex, sys\nfrom stepdistill.cli import main\n"
        "for command in sys.argv[1:]:\n"
        "    try:\n        main(shlex.split(command))\n"
        "    except SystemExit as end:\n        assert not end.code, end.code\n"
    )
    return process(where, env, "-c", code, *commands)


def process(where: Path, env: dict[str, str], *arguments: str) -> str:
    """What a Python process prints. Fails where it does."""
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=where, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_it_is_found_by_list_and_by_the_matrix(installed, tmp_path) -> None:
    listed = run(tmp_path, installed, "list")
    assert "elsewhere.pull:Pull" in listed  # read without importing it, so without its other names
    assert "elsewhere.aura_flow:AuraFlowFamily" in listed
    options = ["--collect-only", "-n", "0", "-m", "", "-k", "pull and aura_flow"]
    cells = process(ROOT, installed, "-m", "pytest", *options, "tests/test_matrix.py")
    assert "pull-aura_flow-lora" in cells
    assert "pull-aura_flow-full" in cells


def test_it_trains_resumes_exports_and_is_planned_and_compared(installed, tmp_path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    tiny = "from stepdistill.testing.tiny import TINY; TINY['aura_flow']().save_pretrained('model')"
    process(tmp_path, installed, "-c", tiny)
    given = (
        "--method pull-twice --pretrained_model_name_or_path model --data.prompts_file prompts.txt "
        "--tuning.rank 2 --output_dir out --max_train_steps 2 --train_batch_size 2 "
        "--checkpointing_steps 1"
    )
    assert "GiB" in run(tmp_path, installed, "check model", f"plan {given}", f"train {given}")
    saved = (tmp_path / "out" / "checkpoint-2").rglob("*.safetensors")
    first = {path.relative_to(tmp_path): load_file(path) for path in saved}
    assert first
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    shutil.rmtree(tmp_path / "out" / "pipeline")

    compare = (
        "compare --teacher model --prompts_file prompts.txt --features elsewhere.colours:Colours "
        "--methods pull --budget 1steps --steps 1 --output_dir compared "
        "--teacher_steps 1 "
        "--num_images_per_prompt 2 --curve_points 1 --resolution 16"  # the stock call says 1024
    )
    again = f"train {given} --resume_from_checkpoint latest"
    told = run(tmp_path, installed, again, "export out lora --format lora", compare)
    assert "| pull |" in told
    for path, tensors in first.items():
        resumed = load_file(tmp_path / path)
        assert all(value.equal(resumed[name]) for name, value in tensors.items()), path
    assert (tmp_path / "out" / "pipeline" / "model_index.json").is_file()
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").is_file()
