"""Publishing against a local fake of the Hub: what is sent, the card, and no token anywhere."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from support.runs import build_trainer, teacher_dir

from stepdistill.export import pipeline
from stepdistill.export.base_model import base_model, weights_sha256
from stepdistill.export.hub import RECORD, dry_run, files_to_push, payload

TOKEN = "hf_" + "ThisIsNoRealTokenAtAll" + "0123456789"
REPO = "someone/four-step"


class FakeHub(BaseHTTPRequestHandler):
    """The endpoints of one push: create, validate-yaml, preupload (all regular), commit."""

    seen: Any  # filled by the fixture

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.seen["tokens"].add(self.headers.get("Authorization"))
        base = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            self.seen["created"] = json.loads(body)
            self.answer({"url": f"{base}/{REPO}", "name": REPO})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.answer(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for f in files
                    ]
                }
            )
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            for line in lines:
                if line["key"] == "file":
                    value = line["value"]
                    self.seen["files"][value["path"]] = base64.b64decode(value["content"])
            self.answer({"commitUrl": f"{base}/{REPO}/commit/1", "commitOid": "1" * 40})
        else:
            self.answer({"error": f"unexpected {self.path}"}, 404)

    def answer(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, dict[str, Any]]]:
    """(endpoint, what arrived)."""
    seen: dict[str, Any] = {"files": {}, "tokens": set(), "created": None}
    handler = type("Handler", (FakeHub,), {"seen": seen})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", seen
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> dict[str, Path]:
    """A run with EMA, a licensed base, metrics and validation prompts; both kinds of export.

    A token is in the environment and in the configuration (where a user may put it by mistake).
    """
    root = tmp_path_factory.mktemp("published")
    teacher = root / "teacher"
    shutil.copytree(teacher_dir("sd_v", tmp_path_factory), teacher)
    (teacher / "README.md").write_text(
        "---\nlicense: other\nlicense_name: openrail\nlicense_link: https://example.org/l\n---\n# T"
    )
    os.environ["HF_TOKEN"] = TOKEN
    try:
        trainer = build_trainer(
            "dmd2", teacher, "lora", root / "run", ema_decay=0.5, hub_model_id=REPO,
            validation_prompts=["a cat"], num_validation_images=2,
        )  # fmt: skip
        trainer.train()
        (root / "run" / "metrics.json").write_text(
            json.dumps({"dataset": "digits", "metrics": {"frechet_distance": 2.25}})
        )
        trainer.export(root / "pipeline")
        trainer.export(root / "lora", format="lora")
    finally:
        del os.environ["HF_TOKEN"]
    return {"root": root, "pipeline": root / "pipeline", "lora": root / "lora", "teacher": teacher}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def cli(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stepdistill.cli", *args],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **env},
        check=False,
    )


def test_a_push_sends_the_bytes_of_a_dry_run(run, hub, tmp_path) -> None:
    """Through the command, to the fake endpoint: private, with the token in its header alone."""
    endpoint, seen = hub
    done = cli(
        "push", str(run["pipeline"]), REPO,
        HF_ENDPOINT=endpoint, HF_TOKEN=TOKEN, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "home"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert seen["created"]["visibility"] == "private"
    assert seen["tokens"] == {f"Bearer {TOKEN}"}
    dry_run(run["pipeline"], REPO, tmp_path / "dry")
    assert seen["files"] == contents(tmp_path / "dry")
    assert not any(TOKEN.encode() in data for data in seen["files"].values())
    assert TOKEN not in done.stdout + done.stderr


def test_a_refusal_of_the_hub_is_one_line(run, hub, tmp_path) -> None:
    endpoint, _ = hub
    done = cli(
        "push", str(run["lora"]), REPO,
        HF_ENDPOINT=endpoint + "/nowhere", HF_TOKEN=TOKEN, HF_HUB_OFFLINE="0",
        HF_HOME=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: push: expected the Hub to take")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["pipeline", "lora"])
def test_dry_run_holds_every_file_of_the_export(run, kind, tmp_path) -> None:
    written = dry_run(run[kind], REPO, tmp_path / "dry")
    assert sorted(p.relative_to(tmp_path / "dry").as_posix() for p in written) == files_to_push(
        run[kind]
    )
    same = contents(run[kind])
    changed = {n for n, data in contents(tmp_path / "dry").items() if same[n] != data}
    assert changed == {"README.md", "distillation.json"}


@pytest.mark.parametrize("kind", ["pipeline", "lora"])
def test_the_cards_code_runs(run, kind, tmp_path, monkeypatch) -> None:
    """In a folder where the repository's name is a path, as the Hub's name is to Diffusers."""
    dry_run(run[kind], REPO, tmp_path / REPO)
    card = (tmp_path / REPO / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert REPO in code
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "card", "exec"), {})
    assert Image.open("image.png").size == (16, 16)


def test_metadata_is_the_bases_and_the_runs(run) -> None:
    card = ModelCard(payload(run["pipeline"], REPO)["README.md"].decode())
    data = card.data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "openrail")
    assert data["license_link"] == "https://example.org/l"
    assert data["library_name"] == "diffusers"
    assert data["pipeline_tag"] == "text-to-image"
    assert {"stepdistill", "dmd2", "few-step"} <= set(data["tags"])
    assert "base_model" not in data  # a local folder is no repository
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("frechet_distance", 2.25)
    assert "lora" in ModelCard(payload(run["lora"], REPO)["README.md"].decode()).data.tags


def test_provenance_is_on_the_card(run) -> None:
    text = payload(run["pipeline"], REPO)["README.md"].decode()
    record = json.loads((run["pipeline"] / "distillation.json").read_text())
    for told in (
        f"sha256 `{weights_sha256(run['teacher'])}`",
        f"sha256 `{record['run']['data']['sha256']}`" if record["run"]["data"]["sha256"] else "",
        f"{record['run']['data']['items']} items",
        f"torch {torch.__version__.split('+')[0]}",
        "averaged over training (EMA, decay 0.5)",
        "| seed | 0 |",
        "| student updates | 2 |",
        "| wall time |",
        "| frechet_distance | 2.25 |",
        "![samples](./samples.png)",
    ):
        assert told in text
    assert Image.open(run["pipeline"] / "samples.png").size == (32, 16)  # one prompt, two seeds


def test_unknown_licence_is_stated_not_guessed(run, tmp_path) -> None:
    assert base_model(str(tmp_path)).licence == {}
    record = json.loads((run["pipeline"] / "distillation.json").read_text())
    shutil.copytree(run["pipeline"], tmp_path / "p")
    (tmp_path / "p" / "distillation.json").write_text(
        json.dumps({**record, "base_model": "nobody/offline-model"})
    )
    card = ModelCard(payload(tmp_path / "p", REPO)["README.md"].decode())
    assert card.data.license is None
    assert "| licence of the base | not stated in its files |" in card.text
    assert card.data.base_model == "nobody/offline-model"


def test_a_snapshot_of_the_hubs_cache_is_known(tmp_path) -> None:
    folder = tmp_path / "models--who--what" / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    found = base_model(str(folder))
    assert (found.hub_id, found.commit) == ("who/what", "a" * 40)
    assert found.licence == {"license": "apache-2.0"}


def test_weights_hash_follows_names_and_bytes(tmp_path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"1")
    first = weights_sha256(tmp_path)
    (tmp_path / "a.safetensors").rename(tmp_path / "b.safetensors")
    second = weights_sha256(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(b"2")
    assert len({first, second, weights_sha256(tmp_path)}) == 3


def test_no_token_in_any_file_of_a_run(run) -> None:
    """Checkpoints, logs, records, exports: nothing that was saved holds it."""
    files = contents(run["root"])
    assert len(files) > 20
    assert [name for name, data in files.items() if TOKEN.encode() in data] == []


def copy_of(run: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(run["lora"], tmp_path / "lora"))


def test_a_token_in_a_file_stops_the_push_and_is_not_repeated(run, tmp_path) -> None:
    folder = copy_of(run, tmp_path)
    record = json.loads((folder / "distillation.json").read_text())
    record["run"]["note"] = TOKEN
    (folder / "distillation.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"got one in distillation\.json") as caught:
        payload(folder, REPO)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.ckpt", "unet/a.pt", "code.py", "a.pkl"])
def test_other_files_are_refused(run, tmp_path, name) -> None:
    folder = copy_of(run, tmp_path)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    with pytest.raises(ValueError, match="expected safetensors and text only"):
        files_to_push(folder)


def test_a_link_out_of_the_folder_is_refused(run, tmp_path) -> None:
    folder = copy_of(run, tmp_path)
    (tmp_path / "secret.txt").write_text("s")
    (folder / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ValueError, match="expected files inside"):
        files_to_push(folder)


@pytest.mark.parametrize("repo_id", ["a/b/c", "../up", "a b", ""])
def test_malformed_repository_names_are_refused(run, repo_id) -> None:
    with pytest.raises(ValueError, match="expected a repository user/name"):
        payload(run["lora"], repo_id)


def test_record_has_one_name() -> None:
    assert RECORD == pipeline.RECORD


def test_a_folder_that_is_no_export_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="expected an exported folder"):
        files_to_push(tmp_path)


def test_dry_run_writes_into_empty_folders_only(run, tmp_path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(ValueError, match="expected an empty folder"):
        dry_run(run["lora"], REPO, tmp_path)
    assert (tmp_path / "kept").read_text() == "mine"
