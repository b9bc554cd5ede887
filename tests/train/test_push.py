"""A model pushed to a hub: a small server that answers as the hub does."""

import base64
import hashlib
import json
import shlex
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from lorank.comparison.settings import ComparisonSettings
from lorank.train.card import marked
from lorank.train.push import check_push, push
from lorank.train.run import pretrain

SHA, ADDRESS = "a" * 40, "HUB/{repo_id}/resolve/{revision}/{filename}"


class Hub:
    """What is on it, and what it does not do."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.repositories: list[dict[str, Any]] = []
        self.refuses: str | None = None


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, code: int, body: Any = b"", **headers: str) -> None:
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(text)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def do_GET(self) -> None:
        if self.hub.refuses and self.hub.refuses in self.path:
            return self.answer(401, {"error": "Invalid user token."})
        if self.path == "/api/whoami-v2":
            return self.answer(200, {"name": "me", "type": "user"})
        if "/resolve/" in self.path:
            found = self.hub.files.get(self.path.rpartition("/")[2])
            if found is None:
                return self.answer(404, X_Error_Code="EntryNotFound")
            return self.answer(200, found, ETag=f'"{hashlib.sha1(found).hexdigest()}"', X_Repo_Commit=SHA)
        return self.answer(404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.hub.refuses and self.hub.refuses in self.path:
            return self.answer(403, {"error": "You have exceeded your storage."})
        if self.path == "/api/repos/create":
            self.hub.repositories.append(json.loads(body))
            return self.answer(200, {"url": f"{constants.ENDPOINT}/me/model", "name": "me/model"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [{**one, "uploadMode": "regular", "shouldIgnore": False} for one in json.loads(body)["files"]]
            return self.answer(200, {"files": files})
        assert "/commit/" in self.path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.answer(200, {"commitUrl": f"{constants.ENDPOINT}/me/model/commit/{SHA}", "commitOid": SHA})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    served = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfThisTest", (Handler,), {"hub": served}))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", ADDRESS.replace("HUB", constants.ENDPOINT))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield served
    server.shutdown()
    server.server_close()


QUICK = {"steps": 2, "warmup_steps": 1, "eval_every": 0, "save_every": 1, "push_to_hub": "model"}


def test_a_finished_run_is_pushed(hub: Hub, recipe: Any, quick: None, tmp_path: Path) -> None:
    pretrain(recipe(**QUICK), tmp_path / "run")
    [created] = hub.repositories
    assert created["name"] == "model" and (created.get("private") or created["visibility"] == "private")
    assert hub.files == {name: (tmp_path / "run" / name).read_bytes() for name in hub.files}, "as it is in the folder"
    assert {"config.json", "model.safetensors", "modeling_lorank.py", "tokenizer.json", "README.md"} <= set(hub.files)
    assert not {"recipe.yaml", "run.json", "metrics.jsonl"} & set(hub.files), "they have places on this machine"
    assert 'from_pretrained("me/model", trust_remote_code=True)' in hub.files["README.md"].decode()


def test_a_push_that_fails_loses_nothing(
    hub: Hub, recipe: Any, quick: None, tmp_path: Path, in_this_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the command that it names repeats it."""
    monkeypatch.chdir(tmp_path)
    hub.refuses = "/commit/"
    with pytest.raises(OSError, match="has the whole model, but it could not be pushed to me/model") as failed:
        pretrain(recipe(**QUICK), tmp_path / "a run")
    assert {"model.safetensors", "summary.json", "README.md"} <= {one.name for one in (tmp_path / "a run").iterdir()}
    assert not hub.files
    command = shlex.split(str(failed.value).partition("repeat it with: ")[2])
    code, _, err = in_this_process(*command[1:])
    assert code == 2 and "hf upload me/model 'runs/export-a run' . --private" in err
    hub.refuses = None
    code, out, err = in_this_process(*command[1:], "--out", "again")
    assert code == 0 and "/me/model" in out, err
    assert hub.files["model.safetensors"] == (tmp_path / "again/model.safetensors").read_bytes()


@pytest.mark.parametrize("case", ["no name", "no login", "a wrong token", "no network"])
def test_what_cannot_be_pushed_is_told_before_training(
    case: str, hub: Hub, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {
        "no name": "push_to_hub must be a name on the hub such as me/my-model, got 'me/my/model'",
        "no login": "push_to_hub=me/model needs a login to the hub: run hf auth login, or set HF_TOKEN",
        "a wrong token": "push_to_hub=me/model is not possible now: Invalid user token",
        "no network": "push_to_hub=me/model is not possible now: Cannot reach .*: offline mode is enabled",
    }
    if case == "no login":
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    elif case == "a wrong token":
        hub.refuses = "whoami"
    elif case == "no network":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = recipe(push_to_hub="me/my/model" if case == "no name" else "me/model")
    with pytest.raises(ValueError, match=words[case]):
        pretrain(asked, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("there", "kept"), [("# Mine\n", True), (marked("Old.\n"), False)])
def test_a_card_changed_on_the_hub_is_kept(there: str, kept: bool, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(marked("New.\n"))
    (tmp_path / "config.json").write_text("{}")
    hub.files["README.md"] = there.encode()
    push(tmp_path, ["config.json", "README.md"], check_push("model"), again="")
    assert hub.files["config.json"] == b"{}" and (hub.files["README.md"].decode() == there) is kept


def test_without_an_answer_about_the_card_nothing_is_pushed(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(marked("New.\n"))
    hub.files["README.md"], hub.refuses = b"# Mine", "/resolve/"
    with pytest.raises(OSError, match="could not be pushed to me/model"):
        push(tmp_path, ["README.md"], "me/model", again="")
    assert hub.files == {"README.md": b"# Mine"}


def test_a_comparison_pushes_nothing(recipe: Any) -> None:
    with pytest.raises(ValueError, match="push_to_hub must be left out of a comparison"):
        ComparisonSettings(base=recipe(push_to_hub="me/model"), methods=("cola",))
