# SPDX-License-Identifier: Apache-2.0
"""Hub ids: fetched from a hub on this machine, kept, and clear when absent."""

import http.server
import json
import os
import subprocess
import sys
import threading
from typing import ClassVar

import numpy as np
import pytest
from safetensors.numpy import save_file

from spatial_jax import hf, hf_hub

TENSORS = {"a.weight": np.ones((3, 2), np.float32)}
COMMIT = "a" * 40

CLIENT = """
import sys
from spatial_jax import hf_files, hf_hub
for name in sys.argv[1:]:
  for ask in (hf_hub.headers, lambda name: hf_files.Reader(name).shapes):
    try:
      print(ask(name))
    except FileNotFoundError as error:
      print(error)
"""


class Hub(http.server.BaseHTTPRequestHandler):
  """What the hub's client asks for of the one model org/name."""

  files: ClassVar[dict[str, bytes]] = {}

  def log_message(self, *_):
    pass

  def answer(self, body, code=200, **headers):
    self.send_response(code)
    for name, value in headers.items():
      self.send_header(name.replace("_", "-"), value)
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(body)

  def do_GET(self):
    path = self.path.partition("?")[0]
    head, _, rest = path.partition("/org/name")
    name = rest.rpartition("/")[2]
    if head == "/api/models" and rest.startswith("/tree"):
      rows = [
        {"type": "file", "path": k, "size": len(x), "oid": "b" * 40}
        for k, x in self.files.items()
      ]
      return self.answer(json.dumps(rows).encode())
    if head == "/api/models" and rest == "/revision/main":
      files = [{"rfilename": k} for k in self.files]
      model = {"id": "org/name", "sha": COMMIT, "siblings": files}
      return self.answer(json.dumps(model).encode())
    if head == "/api/models" and "/revision/" in rest:
      return self.answer(b"{}", 404, X_Error_Code="RevisionNotFound")
    if rest.startswith(("/resolve/main", f"/resolve/{COMMIT}")):
      if name not in self.files:
        return self.answer(b"", 404, X_Error_Code="EntryNotFound")
      body = self.files[name]
      return self.answer(body, ETag=f'"{name}"', X_Repo_Commit=COMMIT)
    return self.answer(b"{}", 404, X_Error_Code="RepoNotFound")

  do_HEAD = do_GET


def test_a_model_is_fetched_once_and_then_read_from_the_cache(tmp_path):
  pytest.importorskip("huggingface_hub", reason="not installed")
  save_file(TENSORS, tmp_path / "model.safetensors")
  Hub.files = {
    "model.safetensors": (tmp_path / "model.safetensors").read_bytes(),
    "config.json": b"{}",
    "pytorch_model.bin": b"never fetched",
  }
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
  environment = {
    k: v for k, v in os.environ.items() if "proxy" not in k.lower()
  }
  environment |= {
    "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
    "HF_HOME": str(tmp_path / "home"),
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "0",
  }

  def ask(*names):
    done = subprocess.run(
      [sys.executable, "-c", CLIENT, *names],
      capture_output=True,
      text=True,
      env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()

  threading.Thread(target=server.serve_forever, daemon=True).start()
  try:
    lines = ask("org/name", "org/name@v9", "org/other")
  finally:
    server.shutdown()
    server.server_close()
  assert lines[0] == "{'a.weight': ('F32', (3, 2))}"
  assert lines[1] == "{'a.weight': (3, 2)}"
  assert "has no safetensors files of such a model" in lines[2]
  assert "no revision v9; leave out @v9" in lines[3]
  assert "has no safetensors files of such a model" in lines[4]
  assert "no such model, or it is private" in lines[5]
  cached = [p.name for p in (tmp_path / "home").rglob("snapshots/*/*")]
  assert sorted(cached) == ["config.json", "model.safetensors"]
  # Nobody answers now.
  lines = ask("org/name")
  assert "the hub cannot be reached" in lines[0]
  assert lines[1] == "{'a.weight': (3, 2)}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("GatedRepoError", "terms must be accepted"),
    ("RepositoryNotFoundError", "no such model"),
    ("RevisionNotFoundError", "no revision v2"),
    ("OfflineModeIsEnabled", "cannot be reached .*download it elsewhere"),
    ("ConnectionError", "cannot be reached"),
  ],
)
def test_a_hub_id_that_cannot_be_fetched_says_why(name, message, monkeypatch):
  hub = pytest.importorskip("huggingface_hub", reason="not installed")

  def fail(repository, *, revision, allow_patterns):
    assert (repository, revision) == ("org/name", "v2")
    raise type(name, (Exception,), {})("what it says")

  monkeypatch.setattr(hub, "snapshot_download", fail)
  with pytest.raises(FileNotFoundError, match=message):
    hf.Reader("org/name@v2")


def test_a_hub_id_needs_its_package(monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(FileNotFoundError, match="pip install huggingface_hub"):
    hf.Reader("org/name")


def test_a_hub_id_is_the_folder_that_was_fetched(tmp_path, monkeypatch):
  hub = pytest.importorskip("huggingface_hub", reason="not installed")
  save_file(TENSORS, tmp_path / "model.safetensors")
  monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(tmp_path))
  assert hf.Reader("org/name").shapes == {"a.weight": (3, 2)}
  # Never for what can only be a path.
  for path in ("./org/name", "/org/name", "~/name", "a/b/c", "name"):
    with pytest.raises(FileNotFoundError, match="does not exist"):
      hf_hub.locate(path)
