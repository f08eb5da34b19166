"""Files from elsewhere: pickles never load, code never runs, damage is one clear line.

Each case damages a good folder in one way and runs a command on it in this process.
"""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.runs import build_trainer, teacher_dir

from stepdistill import cli
from stepdistill.data.images import ImageFolderDataset
from stepdistill.export.run import sample_export
from stepdistill.families.registry import load_family
from stepdistill.loading.safe_files import no_pickles
from stepdistill.loading.teacher_lora import parse_lora
from stepdistill.pairs.dataset import PairDataset, PairWriter
from stepdistill.pairs.files import PairSettings
from stepdistill.storage.checkpoints import newest_valid
from stepdistill.training.checkpoint import read_state

PACKAGE = Path(cli.__file__).parent


class Bomb:
    """Unpickling it writes a file: proof that a pickle was loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.mark),)


def one_line(capsys: Any, *argv: str) -> str:
    """The one line that the command ends with, status 1 and no traceback."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(argv))
    message = str(stop.value.code)
    assert message.startswith("error: "), message
    assert "\n" not in message
    assert "Traceback" not in capsys.readouterr().err
    return message


@pytest.fixture
def teacher(tmp_path, tmp_path_factory) -> Path:
    return Path(shutil.copytree(teacher_dir("sd_v", tmp_path_factory), tmp_path / "teacher"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A finished run of one step."""
    root = tmp_path_factory.mktemp("trained")
    teacher = shutil.copytree(teacher_dir("sd_v", tmp_path_factory), root / "teacher")
    build_trainer("dmd2", Path(teacher), "lora", root / "run", max_train_steps=1).train()
    return root / "run"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


# ---------------------------------------------------------------------- pickles
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt"])
def test_pickled_part_of_a_pipeline(teacher, tmp_path, capsys, part, suffix) -> None:
    mark = tmp_path / "exploded"
    (weights,) = (teacher / part).glob("*.safetensors")
    weights.unlink()
    torch.save({"a": Bomb(mark)}, teacher / part / f"{weights.stem}{suffix}")
    message = one_line(capsys, "check", str(teacher))
    assert f"expected safetensors, got the pickled {weights.stem}{suffix}" in message
    assert not mark.exists()


def test_pickle_beside_safetensors_is_not_touched(teacher, tmp_path) -> None:
    mark = tmp_path / "exploded"
    torch.save({"a": Bomb(mark)}, teacher / "unet" / "diffusion_pytorch_model.bin")
    load_family(teacher)
    assert not mark.exists()


def _sent_to(part: Path, shard: str) -> None:
    """An index beside (or in place of) a part's weights that sends its keys to that shard."""
    (weights,) = part.glob("*.safetensors")
    keys = list(load_file(weights))
    weights.unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, shard)}
    (part / f"{weights.name}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("shard", ["evil.bin", "../evil.safetensors", "evil.safetensors"])
def test_an_index_that_leads_elsewhere(teacher, tmp_path, capsys, part, shard) -> None:
    mark = tmp_path / "exploded"
    _sent_to(teacher / part, shard)
    if shard != "evil.safetensors":  # that one is missing
        torch.save({"a": Bomb(mark)}, teacher / part / shard)
        (teacher / part / "whole.safetensors").write_bytes(
            next(teacher.glob("*/*.safetensors")).read_bytes()
        )
    message = one_line(capsys, "check", str(teacher))
    assert "index.json: expected" in message
    assert not mark.exists()


def test_a_loader_that_unpickles_is_stopped(tmp_path) -> None:
    """What a Hub id's index names is known to the stock loader alone."""
    mark = tmp_path / "exploded"
    torch.save(Bomb(mark), tmp_path / "evil.bin")
    unpickle = torch.load

    def load() -> None:
        try:
            torch.load(tmp_path / "evil.bin", weights_only=False)
        except ValueError as err:  # as stock loaders do
            raise OSError("unable to load") from err

    blocked = pytest.raises(ValueError, match=r"decoder: expected safetensors, got the pickled .*e")
    with blocked, no_pickles("decoder"):
        load()
    assert not mark.exists()
    assert torch.load is unpickle


@pytest.mark.parametrize("name", ["style.bin", "style.pt", "style.ckpt"])
def test_pickled_lora(tmp_path, name) -> None:
    torch.save({"a": Bomb(tmp_path / "exploded")}, tmp_path / name)
    with pytest.raises(ValueError, match="Pickled weights are not read"):
        parse_lora(str(tmp_path / name))
    assert not (tmp_path / "exploded").exists()


def test_pickled_adapter_in_pefts_folder(tmp_path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    torch.save({"a": Bomb(tmp_path / "exploded")}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"expected adapter_model\.safetensors .* not read"):
        parse_lora(str(tmp_path))


@pytest.mark.full
@pytest.mark.parametrize("name", ["optimizer.bin", "role_student.pt", "state.pkl"])
def test_pickled_checkpoint(run, tmp_path, capsys, name) -> None:
    torch.save({"a": Bomb(tmp_path / "exploded")}, run / "checkpoint-1" / name)
    message = one_line(capsys, "export", str(run), str(tmp_path / "out"))
    assert f"{name} is pickled, which is not read" in message
    assert not (tmp_path / "exploded").exists()


def test_pickled_single_file(tmp_path, capsys) -> None:
    torch.save({"a": Bomb(tmp_path / "exploded")}, tmp_path / "model.ckpt")
    message = one_line(capsys, "check", str(tmp_path / "model.ckpt"))
    assert "safetensors" in message
    assert not (tmp_path / "exploded").exists()


# ------------------------------------------------------------------ foreign code
EVIL = "from pathlib import Path\nPath({!r}).touch()\nclass Evil: pass\n"


@pytest.mark.parametrize(
    "entry",
    [["evil", "Evil"], ["os", "system"], ["unet.evil", "Evil"], ["diffusers", "a.b"], [None, "X"]],
)
def test_code_in_a_model_folder_never_runs(teacher, tmp_path, capsys, entry) -> None:
    mark = tmp_path / "ran"
    for place in (teacher, teacher / "unet"):
        (place / "evil.py").write_text(EVIL.format(str(mark)))
        (place / "pipeline.py").write_text(EVIL.format(str(mark)))
    edit(teacher / "model_index.json", unet=entry)
    message = one_line(capsys, "check", str(teacher))
    assert "expected classes of diffusers and transformers" in message
    assert not mark.exists()


def test_custom_pipeline_of_a_folder_is_refused(teacher, tmp_path, capsys) -> None:
    mark = tmp_path / "ran"
    (teacher / "pipeline.py").write_text(EVIL.format(str(mark)))
    edit(teacher / "model_index.json", _class_name=["pipeline", "Evil"])
    assert "string _class_name" in one_line(capsys, "check", str(teacher))
    assert not mark.exists()


def test_remote_code_is_trusted_nowhere() -> None:
    """No call in the package passes trust_remote_code or custom_pipeline."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword):
                assert node.arg not in ("trust_remote_code", "custom_pipeline"), path


def test_no_unpickling_call_in_the_package() -> None:
    """torch.load appears with weights_only=True alone; pickle is not imported."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            assert not {"pickle", "dill", "joblib"} & set(names), path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                told = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert told.get("weights_only") == "True", path


# ------------------------------------------------------------ broken safetensors
def header_lies(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 62) + path.read_bytes()[8:])


def header_oversized(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", path.stat().st_size * 2) + path.read_bytes()[8:])


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def header_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def no_header(path: Path) -> None:
    path.write_bytes(b"")


def header_no_json(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8:10] = b"]["
    path.write_bytes(data)


def offsets_lie(path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 400]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 32)


def integers(path: Path) -> None:
    save_file({k: v.long() for k, v in load_file(path).items()}, path)


def other_shapes(path: Path) -> None:
    save_file({k: torch.zeros(3, 1) for k in load_file(path)}, path)


DAMAGE = [
    header_lies, header_oversized, truncated, header_cut, no_header, header_no_json, offsets_lie,
]  # fmt: skip
named = pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)


@named
def test_broken_weights_of_a_pipeline(teacher, capsys, damage) -> None:
    (path,) = (teacher / "unet").glob("*.safetensors")
    damage(path)
    message = one_line(capsys, "check", str(teacher))
    assert f"{path}: expected a whole safetensors file" in message


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_wrong_shapes_of_a_pipeline(teacher, capsys, part) -> None:
    (path,) = (teacher / part).glob("*.safetensors")
    other_shapes(path)
    assert "error: " in one_line(capsys, "check", str(teacher))


def test_integers_for_weights(teacher, capsys) -> None:
    (path,) = (teacher / "unet").glob("*.safetensors")
    integers(path)
    assert "expected floating-point weights, got ['I64']" in one_line(capsys, "check", str(teacher))


@named
def test_broken_pair_shard(tmp_path, damage) -> None:
    settings = PairSettings("m", "", (1.0,), 1.0, 0, (2,), "h", 2, 2)
    writer = PairWriter(tmp_path, settings, 2)
    writer.write(0, torch.zeros(2, 2), torch.zeros(2, 2), ["a", "b"])
    damage(tmp_path / "shard-00000.safetensors")
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors: expected"):
        PairDataset(tmp_path)


def reseal(folder: Path) -> None:
    """Give a tampered checkpoint the manifest of its own bytes, as an attacker would."""
    files = [p for p in folder.iterdir() if p.name != "manifest.json"]
    manifest = {
        p.name: {"bytes": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p in files
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.sampled(
    "role_student-header_lies",
    "role_student-truncated",
    "role_student-other_shapes",
    "optimizer_student-integers",
)
@pytest.mark.parametrize("damage", [*DAMAGE, integers, other_shapes], ids=lambda f: f.__name__)
@pytest.mark.parametrize("file", ["role_student", "optimizer_student"])
def test_broken_tensors_in_a_resealed_checkpoint(run, tmp_path, capsys, damage, file) -> None:
    if (file, damage) == ("optimizer_student", integers):
        pytest.skip("optimisers may keep integer counters")
    damage(run / "checkpoint-1" / f"{file}.safetensors")
    reseal(run / "checkpoint-1")
    message = one_line(capsys, "export", str(run), str(tmp_path / "out"))
    assert "expected" in message
    assert not (tmp_path / "out").exists()


def test_a_smaller_tensor_is_not_spread_over_a_larger(run, tmp_path, capsys) -> None:
    path = run / "checkpoint-1" / "role_student.safetensors"
    save_file({k: torch.zeros(1) for k in load_file(path)}, path)
    reseal(run / "checkpoint-1")
    assert "got (1,)" in one_line(capsys, "export", str(run), str(tmp_path / "out"))


# ----------------------------------------------------------------- broken JSON
def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


BROKEN = {
    "cut": '{"a": ',
    "list": "[]",
    "empty": "",
    "null": "null",
    "bytes": "\udcff",
    "deep": "[" * 100_000,
    "other": '{"b": 1}',
}


@pytest.fixture(params=BROKEN, ids=str)
def broken(request) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(BROKEN[request.param].encode("utf-8", "surrogateescape"))

    return write


@pytest.mark.parametrize(
    "file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"]
)
def test_broken_json_of_a_pipeline(teacher, capsys, broken, file, request) -> None:
    if "other" in request.node.callspec.id and file != "model_index.json":
        pytest.skip("an object without known keys is a configuration of defaults")
    broken(teacher / file)
    one_line(capsys, "check", str(teacher))


@pytest.mark.parametrize("file", ["run.json", "checkpoint-1/manifest.json"])
def test_broken_json_of_a_run(run, tmp_path, capsys, broken, file) -> None:
    broken(run / file)
    one_line(capsys, "export", str(run), str(tmp_path / "out"))


@pytest.mark.full
def test_broken_trainer_state(run, tmp_path, capsys, broken) -> None:
    broken(run / "checkpoint-1" / "trainer_state.json")
    reseal(run / "checkpoint-1")
    message = one_line(capsys, "export", str(run), str(tmp_path / "out"))
    assert "trainer_state.json: expected" in message


@pytest.mark.parametrize("command", ["sample", "push"])
def test_broken_record_of_an_export(tmp_path, capsys, broken, command) -> None:
    broken(tmp_path / "distillation.json")
    (tmp_path / "README.md").write_text("# x")
    rest = ["--prompt", "a"] if command == "sample" else ["a/b", "--dry_run", str(tmp_path / "d")]
    assert "distillation.json: expected" in one_line(capsys, command, str(tmp_path), *rest)


def test_broken_pair_manifest(tmp_path, broken) -> None:
    broken(tmp_path / "manifest.json")
    with pytest.raises(ValueError, match=r"manifest\.json: expected"):
        PairDataset(tmp_path)


@pytest.mark.parametrize(
    "line", ['{"file_name": ', "[]", '{"text": "a"}', '{"file_name": 3, "text": ""}']
)
def test_broken_metadata_line(tmp_path, line) -> None:
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(ValueError, match=r"metadata\.jsonl:1: expected an object"):
        ImageFolderDataset(tmp_path, 8)


@pytest.mark.parametrize("text", ["a: [", "\t- x", "!!python/object/apply:os.system ['true']"])
def test_broken_or_hostile_yaml(tmp_path, capsys, text) -> None:
    (tmp_path / "c.yaml").write_text(text)
    message = one_line(capsys, "train", "--config", str(tmp_path / "c.yaml"))
    assert "c.yaml: expected valid YAML" in message


# -------------------------------------------------------------- paths that leave
@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "a/../../b"])
def test_paths_in_metadata_stay_inside(tmp_path, name) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a"}))
    with pytest.raises(ValueError, match="expected files inside"):
        ImageFolderDataset(folder, 8)


def test_links_out_of_an_image_folder(tmp_path) -> None:
    (tmp_path / "secret.png").write_bytes(b"x")
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").symlink_to(tmp_path / "secret.png")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "a"}))
    with pytest.raises(ValueError, match="expected files inside"):
        ImageFolderDataset(folder, 8)


@pytest.mark.parametrize("name", ["../unet", "a/b", "unet\\..", "-x", ""])
def test_part_names_are_no_paths(teacher, capsys, name) -> None:
    edit(teacher / "model_index.json", **{name: ["diffusers", "UNet2DConditionModel"]})
    assert "expected names of parts" in one_line(capsys, "check", str(teacher))


@pytest.mark.parametrize("name", ["../run.json", "/etc/passwd", "a/../b", "a/b/c"])
def test_manifest_entries_are_no_paths(run, name) -> None:
    edit(run / "checkpoint-1" / "manifest.json", **{name: {"bytes": 1, "sha256": "0"}})
    found, skipped = newest_valid(run)
    assert found is None
    assert f"malformed entry '{name}'" in skipped[0]
    with pytest.raises(ValueError, match="malformed entry"):
        read_state(run / "checkpoint-1")


PROMPTS = ["../../escape", "/abs/path", "a\x00b", "con", "x" * 5000, ".."]


@pytest.mark.full
def test_prompts_never_become_paths(tmp_path, tmp_path_factory, trained, capsys) -> None:
    """Samples and validation grids are named by number; prompts stand in metadata."""
    teacher = teacher_dir("sd3", tmp_path_factory)
    before = set(tmp_path.parent.iterdir())
    cli.main(["export", str(trained), str(tmp_path / "out")])
    written = sample_export(tmp_path / "out", PROMPTS, tmp_path / "samples")
    assert [p.name for p in written] == [f"{i:04d}.png" for i in range(len(PROMPTS))]
    rows = (tmp_path / "samples" / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(row)["text"] for row in rows] == PROMPTS
    build_trainer(
        "dmd2", teacher, "lora", tmp_path / "run", max_train_steps=1, validation_steps=1,
        validation_prompts=PROMPTS, num_validation_images=1, validation_teacher_steps=1,
    ).train()  # fmt: skip
    names = sorted(p.name for p in (tmp_path / "run" / "validation").iterdir())
    assert names == ["step-0.png", "step-1.png", "teacher.png", "teacher.safetensors"]
    assert set(tmp_path.parent.iterdir()) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run", "samples"]
