"""A teacher is what its files hold, not what its path says; told without reading its weights."""

from __future__ import annotations

import json
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.loras import style_lora
from support.original import denoiser_state
from support.runs import teacher_dir

from stepdistill.loading.identity import differing, identity_of
from stepdistill.loading.source import ModelSource
from stepdistill.loading.teacher_lora import lora_facts, lora_text, parse_lora, same_lora

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture
def teacher(tmp_path, tmp_path_factory) -> Path:
    return Path(shutil.copytree(teacher_dir("sd_v", tmp_path_factory), tmp_path / "teacher"))


def one_value(file: str) -> Callable[[Path], None]:
    """The last bit of one weight of the file flipped."""

    def change(folder: Path) -> None:
        content = bytearray((folder / file).read_bytes())
        content[-2] ^= 1
        (folder / file).write_bytes(content)

    return change


def other_dtype(folder: Path) -> None:
    save_file({k: v.half() for k, v in load_file(folder / UNET).items()}, folder / UNET)


def value(file: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, **values}))

    return change


def added(name: str, content: bytes = b"x") -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

    return change


def as_shard(folder: Path) -> None:
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model-00001-of-00001.safetensors")


SCHEDULER = "scheduler/scheduler_config.json"
DIFFERENT = {
    "unet weight": (one_value(UNET), [UNET]),
    "vae weight": (
        one_value("vae/diffusion_pytorch_model.safetensors"),
        ["vae/diffusion_pytorch_model.safetensors"],
    ),
    "text weight": (one_value(TEXT), [TEXT]),
    "dtype": (other_dtype, [UNET]),
    "shards": (as_shard, [UNET, "unet/diffusion_pytorch_model-00001-of-00001.safetensors"]),
    "prediction type": (value(SCHEDULER, prediction_type="epsilon"), [SCHEDULER]),
    "unet config": (value("unet/config.json", sample_size=16), ["unet/config.json"]),
    "parts": (value("model_index.json", requires_safety_checker=True), ["model_index.json"]),
    "tokenizer": (added("tokenizer/vocab.json", b"{}"), ["tokenizer/vocab.json"]),
    "no configuration": (added(SCHEDULER, b"{"), [SCHEDULER]),
}
SAME = {
    "card": added("README.md"),
    "safety checker": added("safety_checker/model.safetensors"),
    "another variant": added("unet/diffusion_pytorch_model.fp16.safetensors"),
    "a variant in shards": added("unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors"),
    "a pickle, never read": added("unet/diffusion_pytorch_model.bin"),
    "a foreign part": added("onnx/model.safetensors"),
    "who saved it": value("unet/config.json", _diffusers_version="0.1", _name_or_path="/x"),
    "when": lambda folder: (folder / UNET).touch(),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_another_content_is_named_by_its_file(teacher, name) -> None:
    change, files = DIFFERENT[name]
    before = identity_of(str(teacher))
    change(teacher)
    assert differing(before, identity_of(str(teacher))) == sorted(files)


@pytest.mark.parametrize("name", SAME)
def test_the_same_model_stays_the_same(teacher, name) -> None:
    before = identity_of(str(teacher))
    SAME[name](teacher)
    assert differing(before, identity_of(str(teacher))) == []


def test_a_moved_folder_is_the_same_model(teacher, tmp_path) -> None:
    before = identity_of(str(teacher))
    teacher.rename(tmp_path / "elsewhere")
    assert differing(before, identity_of(str(tmp_path / "elsewhere"))) == []


def test_a_variant_counts_where_it_is_asked_for(teacher) -> None:
    fp16 = "unet/diffusion_pytorch_model.fp16.safetensors"
    added(fp16)(teacher)
    found = identity_of(str(teacher), variant="fp16")
    assert fp16 in found
    assert UNET not in found
    assert TEXT in found  # no variant of it


def large(path: Path, tensors: int, each: int) -> dict[str, int]:
    """A sparse safetensors file of zeros; where each tensor starts."""
    spans = {f"t{i}": i * each for i in range(tensors)}
    facts = {
        n: {"dtype": "U8", "shape": [each], "data_offsets": [at, at + each]}
        for n, at in spans.items()
    }
    header = json.dumps(facts).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + tensors * each)
    return {name: 8 + len(header) + at for name, at in spans.items()}


def test_gigabytes_take_milliseconds_and_every_tensor_counts(tmp_path) -> None:
    path, each = tmp_path / "model.safetensors", 8 << 20
    starts = large(path, 1000, each)  # 8 GiB
    began = time.process_time()
    before = identity_of(str(path))
    assert time.process_time() - began < 0.5
    for name in ("t0", "t500", "t999"):
        with path.open("r+b") as file:
            file.seek(starts[name] + each // 2)
            file.write(b"\x01")
        after = identity_of(str(path))
        assert differing(before, after) == [""], name
        before = after


def test_a_large_file_whose_header_lies_has_an_identity(tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    for size in (2**60, 0, 40):
        path.write_bytes(struct.pack("<Q", size) + b"[" * (2 << 20))
        assert len(identity_of(str(path))[""]) == 16


def test_what_cannot_be_compared_is_no_difference() -> None:
    assert differing({}, {"a": "1"}) is None
    assert differing({"commit": "1"}, {"a": "1"}) is None
    assert differing({"commit": "1"}, {"commit": "2"}) == ["commit"]


def test_a_cached_hub_id_is_its_commit(tmp_path, monkeypatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    file = tmp_path / f"models--me--teacher/snapshots/{commit}/model_index.json"
    monkeypatch.setattr("stepdistill.loading.identity.hf_hub_download", lambda *a, **k: str(file))
    assert identity_of("me/teacher") == {"commit": commit}
    assert ModelSource("me/teacher").identity() == {"commit": commit}


@pytest.mark.parametrize("spelled", ["t", "./t", "t/", "../here/t", "{}", "{}/."])
def test_every_spelling_of_a_path_is_one_teacher(
    spelled, tmp_path, tmp_path_factory, monkeypatch
) -> None:
    here = tmp_path / "here"
    shutil.copytree(teacher_dir("sd_v", tmp_path_factory), here / "t")
    monkeypatch.chdir(here)
    source = ModelSource(spelled.format(here / "t"))
    assert source.model == str(here / "t")
    assert source.facts() == ModelSource(str(here / "t")).facts()


@pytest.mark.parametrize("name", ["t", "models/a/b", "./t", "../t", "/t", "~nobody/t", "a b/c", ""])
def test_a_path_that_is_not_there_is_no_hub_id(name, monkeypatch) -> None:
    def asked(*args: Any, **options: Any) -> Any:
        pytest.fail("the Hub was asked")

    monkeypatch.setattr("diffusers.DiffusionPipeline.load_config", asked)
    with pytest.raises(ValueError, match=r"expected a (pipeline folder or a Hub id|Diffusers)"):
        _ = ModelSource(name).index


class TestSingleFile:
    @pytest.fixture
    def source(self, teacher, tmp_path) -> ModelSource:
        from stepdistill.families.registry import load_family

        state = denoiser_state(load_family(teacher).net, "model.diffusion_model.")
        save_file(state, tmp_path / "net.safetensors")
        return ModelSource(str(tmp_path / "net.safetensors"), single_file_config=str(teacher))

    def test_it_and_what_describes_it_count(self, source, teacher, tmp_path) -> None:
        before = source.identity()
        one_value(TEXT)(teacher)  # read from there, as the file holds the denoiser alone
        assert differing(before, source.identity()) == [f"single_file_config/{TEXT}"]
        one_value("net.safetensors")(tmp_path)
        assert differing(before, source.identity()) == ["", f"single_file_config/{TEXT}"]


class TestLoras:
    @pytest.mark.full
    def test_a_moved_file_is_the_same_and_another_is_not(self, tmp_path, tmp_path_factory) -> None:
        folder = teacher_dir("sd_v", tmp_path_factory)
        style_lora(folder, tmp_path / "a", 0)
        style_lora(folder, tmp_path / "b", 1)
        (fact,) = lora_facts([f"{tmp_path / 'a'}:0.123456789"])
        shutil.move(tmp_path / "a", tmp_path / "moved")
        assert same_lora(fact, lora_facts([f"{tmp_path / 'moved'}:0.123456789"])[0])
        assert not same_lora(fact, lora_facts([f"{tmp_path / 'moved'}:0.5"])[0])
        assert not same_lora(fact, lora_facts([f"{tmp_path / 'b'}:0.123456789"])[0])

    def test_a_peft_folder_is_known_by_its_files(self, tmp_path) -> None:
        (tmp_path / "adapter_config.json").write_text("{}")
        save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
        (before,) = lora_facts([str(tmp_path)])
        save_file({"x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
        assert not same_lora(before, lora_facts([str(tmp_path)])[0])

    @pytest.mark.parametrize("text", ["me/style:0.123456789", "me/style/sub/x.safetensors:-2.0"])
    def test_a_record_names_the_same_file_and_scale(self, text, monkeypatch) -> None:
        monkeypatch.setattr("stepdistill.loading.teacher_lora.commit_of", lambda *a: "c")
        (fact,) = lora_facts([text])
        assert parse_lora(lora_text(fact)) == parse_lora(text)

    def test_of_several_files_in_a_folder_the_one_named(self, tmp_path) -> None:
        for name in ("a", "b"):
            save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
        (fact,) = lora_facts([str(tmp_path / "b.safetensors")])
        assert parse_lora(lora_text(fact)).weight_name == "b.safetensors"
