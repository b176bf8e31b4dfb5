"""Write a bundle: everything goes into a temporary folder, which gets its name once it is complete."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from autodistill.bundle.answers import answers
from autodistill.bundle.board import unit
from autodistill.bundle.card import card
from autodistill.bundle.container import compose, dockerfile
from autodistill.bundle.exported import Exported, read_export
from autodistill.bundle.kubernetes import manifests
from autodistill.bundle.servers import MODEL, VLLM_FILE, Server, server_of, vllm_config
from autodistill.bundle.sums import write_sums
from autodistill.dashboards.grafana import dashboard
from autodistill.dashboards.prometheus import Job, rules, scrape
from autodistill.dashboards.student import MONITOR, SERVER, alerts, panels
from autodistill.errors import InputError
from autodistill.utils.durable import make_folder, put
from autodistill.utils.json_files import unwritable

MONITOR_PORT = 9465
"""Port of the monitor's own endpoint, next to a server."""
_PART = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_IMAGE = re.compile(rf"(?:{_PART}:\d{{1,5}}/)?{_PART}(?:/{_PART})*(?::\w[\w.-]{{0,127}})?\Z", re.ASCII)
_LONGEST_IMAGE = 255
_HERE = Path(__file__).parent
_ONNX_GENAI = "onnxruntime-genai>=0.9"


def write_bundle(export: Path, out: Path, runtime: str | None = None, image: str | None = None) -> dict[str, Any]:
    """Write everything that is needed to serve an export elsewhere, together with the export itself.

    Args:
        export: Folder of an export that has a proof.
        out: Folder of the bundle, which must not exist yet or must be empty.
        runtime: "llama.cpp", "vllm" or "onnxruntime"; by default one that reads the format.
        image: Name by which the image is built and pulled; by default the row's name and a hash of its files.

    Returns:
        Plain data: the folder, the name, the runtime, the image, and the files.

    Raises:
        InputError: The export does not exist or cannot be bundled, the image's name is invalid, or the folder is not
            empty or cannot be written.
        DamagedError: A file of the export has changed since it was written.
    """
    if image is not None and not (len(image) <= _LONGEST_IMAGE and _IMAGE.match(image)):
        raise InputError(f"{image!r} is no name of an image: write one like registry.example.com/team/student:1")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty folder: choose another one with --out")
    if out.absolute().is_relative_to(export.absolute()):
        raise InputError(f"{out} lies within the export, whose files are all known: choose another one with --out")
    exported = read_export(export, runtime)
    image = image or f"{exported.name}:{exported.tag}"
    if exported.runtime == "onnxruntime":
        files = _library_files(exported)
    else:
        files = _service_files(exported, server_of(exported), image)
    try:
        make_folder(out.absolute().parent)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.absolute().parent))
    except OSError as error:
        raise unwritable(out.absolute().parent, error) from error
    try:
        _write(exported, files, partial)
        put(partial, out.absolute())
    except OSError as error:
        raise unwritable(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    names = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    return {
        "bundle": str(out),
        "student": exported.name,
        "runtime": exported.runtime,
        **({} if exported.runtime == "onnxruntime" else {"image": image}),
        "files": names,
    }


def _write(exported: Exported, files: Mapping[str, str], folder: Path) -> None:
    folder.chmod(0o755)
    for name in exported.files:
        path = folder / MODEL / name
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        shutil.copyfile(exported.folder / name, path)
        path.chmod(0o644)  # the server runs as another user
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    write_sums(folder)


def _service_files(exported: Exported, server: Server, image: str) -> dict[str, str]:
    promise = exported.promise
    # llama.cpp's metrics need the key. vLLM's do not.
    key_file = "" if server.key_variable else "api_key"
    jobs = (
        Job(name=SERVER, target=f"127.0.0.1:{server.port}", key_file=key_file),
        Job(name=MONITOR, target=f"127.0.0.1:{MONITOR_PORT}"),
    )
    monitor = f"autodistill monitor http://127.0.0.1:{server.port} --promise {MODEL} --prometheus {MONITOR_PORT}"
    shown = dashboard(f"{exported.name}-{exported.tag}"[:40], exported.name, panels(promise, exported.runtime))
    files = {
        "README.md": card(exported, server, image, monitor),
        "Dockerfile": dockerfile(exported, server),
        "compose.yaml": _yaml([compose(exported, server, image)]),
        "kubernetes.yaml": _yaml(manifests(exported, server, image)),
        "prometheus.yml": _yaml([scrape(jobs, rules="alerts.yml")]),
        "alerts.yml": _yaml([rules(exported.name, alerts(promise))]),
        "dashboard.json": json.dumps(shown, indent=2) + "\n",
        f"{exported.name}.service": unit(exported, server),
        **_asked(exported),
    }
    if exported.runtime == "vllm":
        files[VLLM_FILE] = _yaml([vllm_config(exported)])
    return files


def _library_files(exported: Exported) -> dict[str, str]:
    return {
        "README.md": card(exported, None, "", ""),
        "example.py": (_HERE / "example.txt").read_text(encoding="utf-8"),
        "requirements.txt": f"{_ONNX_GENAI}\n",
        **_asked(exported),
    }


def _asked(exported: Exported) -> dict[str, str]:
    return {
        "smoke_test.py": (_HERE / "smoke_test.py").read_text(encoding="utf-8"),
        "answers.json": json.dumps(answers(exported)) + "\n",
    }


class _Plain(yaml.SafeDumper):
    """Writes each value in full, without YAML aliases: few programs read them, and no person does."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _yaml(documents: Sequence[Mapping[str, Any]]) -> str:
    return yaml.dump_all(documents, Dumper=_Plain, sort_keys=False, width=120, explicit_start=len(documents) > 1)
