"""Publishing against a local fake of the Hub: what is sent, the card, and no token anywhere."""

from __future__ import annotations

import base64
import hashlib
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
from safetensors.torch import save_file
from support.processes import LIMIT_S
from support.runs import build_trainer, teacher_dir

from stepdistill.export import pipeline
from stepdistill.export.base_model import base_model, weights_sha256
from stepdistill.export.hub import RECORD, dry_run, files_to_push, payload

TOKEN = "hf_" + "ThisIsNoRealTokenAtAll" + "0123456789"
REPO = "someone/four-step"


PART = 10_000  # bytes of an upload in parts


class FakeHub(BaseHTTPRequestHandler):
    """The endpoints of one push: create, validate-yaml, preupload, large files, commit.

    Large files, as `seen["large"]` calls them, go by Git LFS (batch, PUT in one piece or in parts,
    verify) or by Xet: a token, the chunk store's xorbs and shards, which are counted.
    """

    seen: Any  # filled by the fixture
    protocol_version = "HTTP/1.1"

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def do_GET(self) -> None:
        if "/xet-write-token/" in self.path:
            self.seen["tokens"].add(self.headers.get("Authorization"))
            cas = f"http://{self.headers['Host']}/cas"
            self.answer({"casUrl": cas, "exp": 4_000_000_000, "accessToken": "short-lived"})
        else:
            self.answer({"error": "not there"}, 404)

    def do_PUT(self) -> None:
        """A large file, or one part of it: no token is sent to a signed address."""
        assert self.headers.get("Authorization") is None
        oid, _, part = self.path.removeprefix("/store/").partition("/")
        self.seen["parts"].setdefault(oid, {})[int(part or 1)] = self.body()
        self.answer({}, 403 if self.seen["store_fails"] else 200, etag=f"etag-{part or 1}")

    def batch(self, objects: list[dict[str, Any]], base: str) -> None:
        """Git LFS's answer: above 2 PART in parts, else in one piece."""
        made = []
        for entry in objects:
            oid, size = entry["oid"], entry["size"]
            href, header = f"{base}/store/{oid}", {}
            if size > 2 * PART:
                count = -(-size // PART)
                header = {f"{i + 1:05d}": f"{href}/{i + 1}" for i in range(count)}
                header["chunk_size"], href = str(PART), f"{base}/complete/{oid}"
            upload = {"href": href, "header": header}
            verify = {"href": f"{base}/verify/{oid}"}
            made.append({**entry, "actions": {"upload": upload, "verify": verify}})
        self.answer({"objects": made})

    def do_POST(self) -> None:
        body = self.body()
        base = f"http://{self.headers['Host']}"
        if self.path.startswith(("/cas/", "/v1/telemetry")):
            assert self.headers.get("Authorization") == "Bearer short-lived"
            self.seen["cas"].append(self.path.removeprefix("/cas").split("/")[2])
            known = "/v1/xorbs/" in self.path or self.path.endswith("/v1/shards")
            self.answer({"was_inserted": True, "result": 1}, 200 if known else 404)
            return
        if self.path.startswith("/complete/"):  # the token is not sent here
            parts = json.loads(body)["parts"]
            assert [part["etag"] for part in parts] == [f"etag-{i + 1}" for i in range(len(parts))]
            self.answer({})
            return
        self.seen["tokens"].add(self.headers.get("Authorization"))
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
                        {
                            "path": f["path"],
                            "uploadMode": "lfs" if self.seen["large"](f) else "regular",
                            "shouldIgnore": False,
                        }
                        for f in files
                    ]
                }
            )
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            self.batch(json.loads(body)["objects"], base)
        elif self.path.startswith("/verify/"):
            self.seen["verified"][self.path.split("/")[-1]] = json.loads(body)["size"]
            self.answer({})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            for line in lines:
                if line["key"] == "file":
                    value = line["value"]
                    self.seen["files"][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    value = line["value"]
                    self.seen["lfs"][value["path"]] = (value["oid"], value["size"])
            self.answer({"commitUrl": f"{base}/{REPO}/commit/1", "commitOid": "1" * 40})
        else:
            self.answer({"error": f"unexpected {self.path}"}, 404)

    def answer(self, value: Any, status: int = 200, etag: str | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if etag is not None:
            self.send_header("ETag", etag)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, dict[str, Any]]]:
    """(endpoint, what arrived)."""
    seen: dict[str, Any] = {"files": {}, "tokens": set(), "created": None, "lfs": {}, "parts": {}}
    seen |= {"verified": {}, "cas": [], "large": lambda _file: False, "store_fails": False}
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
    shutil.copytree(teacher_dir("sd3", tmp_path_factory), teacher)
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
        timeout=LIMIT_S,
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


def is_weights(file: dict[str, Any]) -> bool:
    """What the Hub keeps apart whatever its size, by its default .gitattributes."""
    name: str = file["path"]
    return name.endswith(".safetensors")


def push(run, endpoint: str, home: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return cli(
        "push", str(run["pipeline"]), REPO,
        HF_ENDPOINT=endpoint, HF_TOKEN=TOKEN, HF_HUB_OFFLINE="0", HF_HOME=str(home), **env,
    )  # fmt: skip


@pytest.mark.full
def test_large_files_go_by_lfs_in_one_piece_or_in_parts(run, hub, tmp_path) -> None:
    """Preupload says lfs -> batch -> PUT -> verify -> a commit with their hashes."""
    endpoint, seen = hub
    seen["large"] = is_weights
    done = push(run, endpoint, tmp_path / "home", HF_HUB_DISABLE_XET="1")
    assert done.returncode == 0, done.stderr[-2000:]
    dry_run(run["pipeline"], REPO, tmp_path / "dry")
    wanted = contents(tmp_path / "dry")
    weights = {name: data for name, data in wanted.items() if name.endswith(".safetensors")}
    assert seen["files"] == {n: data for n, data in wanted.items() if n not in weights}
    assert seen["lfs"] == {
        n: (hashlib.sha256(data).hexdigest(), len(data)) for n, data in weights.items()
    }
    stored = {o: b"".join(parts[i] for i in sorted(parts)) for o, parts in seen["parts"].items()}
    assert stored == {hashlib.sha256(data).hexdigest(): data for data in weights.values()}
    assert seen["verified"] == {oid: len(data) for oid, data in stored.items()}
    counts = {len(parts) for parts in seen["parts"].values()}
    assert max(counts) > 1, "no file was sent in parts"
    assert seen["tokens"] == {f"Bearer {TOKEN}"}


@pytest.mark.full
def test_large_files_go_by_xet(run, hub, tmp_path) -> None:
    """The default where hf_xet is installed: chunks to the store, hashes into the commit."""
    pytest.importorskip("hf_xet")
    endpoint, seen = hub
    seen["large"] = is_weights
    done = push(run, endpoint, tmp_path / "home")
    assert done.returncode == 0, done.stderr[-2000:]
    weights = {n: p for n, p in payload(run["pipeline"], REPO).items() if n.endswith("tensors")}
    assert seen["lfs"] == {
        name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)
        for name, path in weights.items()
    }
    assert not seen["parts"]
    assert seen["cas"].index("xorbs") < seen["cas"].index("shards")
    assert seen["tokens"] == {f"Bearer {TOKEN}"}  # the store was given the short-lived one


@pytest.mark.full
def test_a_store_that_fails_is_one_line_and_no_commit(run, hub, tmp_path) -> None:
    endpoint, seen = hub
    seen["large"], seen["store_fails"] = is_weights, True
    done = push(run, endpoint, tmp_path / "home", HF_HUB_DISABLE_XET="1")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: push: expected the Hub to take someone/four-step")
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stderr
    assert not seen["files"]


@pytest.mark.full
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
    assert {"README.md", "distillation.json"} <= changed
    said = (".json", "README.md")  # of the others, those that named a folder of this machine
    assert all(name.endswith(said) and str(run["root"]).encode() in same[name] for name in changed)


@pytest.mark.parametrize("kind", ["pipeline", "lora"])
def test_the_cards_code_runs(run, kind, tmp_path, monkeypatch) -> None:
    """In a folder where the repository's name is a path, as the Hub's name is to Diffusers."""
    dry_run(run[kind], REPO, tmp_path / REPO)
    card = (tmp_path / REPO / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert REPO in code
    # The card names a base that is not on the Hub by its folder's name alone.
    (tmp_path / "teacher").symlink_to(run["teacher"])
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


SECRETS = {
    "Hugging Face": TOKEN,
    "old Hugging Face": "api_org_" + "a" * 30,
    "OpenAI": "sk-proj-" + "aB3_" * 10,
    "GitHub": "ghp_" + "a1" * 18,
    "AWS": "AKIA" + "ABCDEFGHIJKLMNOP",
    "Google": "AIza" + "a" * 35,
    "Slack": "xoxb-" + "123456789012-abc",
    "Azure": "AccountKey=" + "a" * 44,
    "PEM": "-----BEGIN RSA PRIVATE KEY-----",
    "URL": "https://me:secret@example.org/data",
}


@pytest.mark.parametrize("where", ["notes.txt", "card.md", "x.json", "a.safetensors"])
@pytest.mark.parametrize("kind", SECRETS)
def test_secrets_of_every_kind_stop_the_push(run, tmp_path, kind, where) -> None:
    folder, secret = copy_of(run, tmp_path), SECRETS[kind]
    if where.endswith(".safetensors"):
        save_file({"a": torch.zeros(1)}, folder / where, metadata={"note": secret})
    else:
        (folder / where).write_text(json.dumps({"note": secret}))
    with pytest.raises(ValueError, match=rf"no secret in any file, got one in {where}") as caught:
        payload(folder, REPO)
    assert secret not in str(caught.value)


def test_a_key_of_the_environment_is_known_by_its_value(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    folder = copy_of(run, tmp_path)
    (folder / "notes.txt").write_text("key: 0123456789abcdef")
    with pytest.raises(ValueError, match=r"notes\.txt \(token of this machine\)"):
        payload(folder, REPO)


def test_hidden_files_are_not_sent(run, tmp_path) -> None:
    folder = copy_of(run, tmp_path)
    for name in (".env", ".git/config", "unet/.cache.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(TOKEN)
    assert not [name for name in payload(folder, REPO) if "/." in f"/{name}"]


@pytest.mark.parametrize("kind", ["pipeline", "lora"])
def test_nothing_that_is_sent_holds_a_path_of_this_machine(run, kind, tmp_path) -> None:
    folder = Path(shutil.copytree(run[kind], tmp_path / "export"))
    config = folder / "unet" / "config.json"
    if config.is_file():
        edited = {**json.loads(config.read_text()), "_name_or_path": str(tmp_path / "private")}
        config.write_text(json.dumps(edited))
    record = json.loads((folder / RECORD).read_text())
    record["run"]["teacher_lora"] = [
        {"source": str(tmp_path / "styles"), "weight_name": "a.safetensors", "scale": 0.5}
    ]
    record["run"]["single_file_config"] = "~/models/base"
    (folder / RECORD).write_text(json.dumps(record))
    written = dry_run(folder, REPO, tmp_path / "dry")
    private = [str(tmp_path), str(run["root"]), str(Path.home()) + "/", str(Path.cwd()), "~/models"]
    held = [(p.name, path) for p in written for path in private if path.encode() in p.read_bytes()]
    assert held == []
    sent = json.loads((tmp_path / "dry" / RECORD).read_text())
    assert sent["base_model"] == "teacher"
    assert sent["run"]["teacher_lora"][0]["source"] == "styles"


def test_a_path_in_the_metadata_of_weights_stops_the_push(run, tmp_path) -> None:
    folder = copy_of(run, tmp_path)
    save_file({"a": torch.zeros(1)}, folder / "a.safetensors", metadata={"from": str(tmp_path)})
    with pytest.raises(ValueError, match=r"no path of this machine .* metadata of a\.safetensors"):
        payload(folder, REPO)


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
