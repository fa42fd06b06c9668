"""What is shipped: the package list matches the folders, wheel and sdist hold what they must, the wheel runs alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

import moec

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.xdist_group("packaging")  # the wheel is built once

FOLDERS = {"moec": "moec", "moec.passes": "passes", "moec.backends": "backends"}


def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def tracked() -> list[Path]:
    """The files of the checkout that are in git or about to be."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = (ROOT / name for name in sorted(set(listed.split("\0"))) if name)
    return [path for path in paths if path.exists()]


def shipped() -> dict[str, Path]:
    """Path in the wheel -> path in the checkout, of every file of every package."""
    found = {}
    for path in tracked():
        relative = path.relative_to(ROOT)
        for package, folder in FOLDERS.items():
            if relative.parts[0] == folder and path.is_file():
                found["/".join((*package.split("."), *relative.parts[1:]))] = path
    return found


def test_package_list_matches_the_folders() -> None:
    packages = {".".join(Path(name).parent.parts) for name in shipped() if name.endswith(".py")}
    listed = project()["tool"]["setuptools"]["packages"]  # type: ignore[index]
    assert listed == sorted(packages)
    for package in packages:
        assert f"{package.replace('.', '/')}/__init__.py" in shipped(), f"{package} has no __init__.py"


def test_links_lead_to_the_folders() -> None:
    for link, target in ((ROOT / "moec" / "passes", "../passes"), (ROOT / "moec" / "backends", "../backends")):
        assert link.is_symlink()
        assert str(link.readlink()) == target


def test_constraints_pin_everything_that_is_named() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {line.partition("==")[0].lower() for line in lines if "==" in line}
    table = project()["project"]
    named = [*table["dependencies"], *(one for extra in table["optional-dependencies"].values() for one in extra)]  # type: ignore[index]
    for requirement in named:
        name = requirement.partition(">=")[0].lower()
        assert name in pins or name.startswith("moec["), f"{requirement} is not pinned in constraints.txt"


class Built:
    """The wheel built from the sdist, the wheel built from the checkout, and the sdist."""

    def __init__(self, checkout: Path, out: Path) -> None:
        self._build(checkout, out / "both")
        self._build(checkout, out / "direct", "--wheel")
        (self.sdist,) = (out / "both").glob("*.tar.gz")
        (self.wheel,) = (out / "both").glob("*.whl")
        (self.direct,) = (out / "direct").glob("*.whl")

    @staticmethod
    def _build(checkout: Path, out: Path, *options: str) -> None:
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *options, str(checkout)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Built from a copy of what git has, as a fresh clone is: nothing left over from earlier builds gets in."""
    checkout = tmp_path_factory.mktemp("checkout")
    for path in tracked():
        target = checkout / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target, follow_symlinks=False)
    return Built(checkout, tmp_path_factory.mktemp("dist"))


def files(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def test_wheel_holds_every_package_file_and_no_test(built: Built) -> None:
    held = files(built.wheel)
    packages = {name for name in held if ".dist-info/" not in name}
    assert packages == set(shipped())
    for name, path in shipped().items():
        assert held[name] == path.read_bytes(), name
    assert "moec/py.typed" in packages
    assert any(name.startswith("moec/demo/") and name.endswith(".safetensors") for name in packages)
    assert "moec/demo/README.md" in packages, "the licence of the digits must travel with them"
    info = {name.partition(".dist-info/")[2] for name in held} - {""}
    assert {"METADATA", "entry_points.txt", "licenses/LICENSE", "licenses/NOTICE"} <= info


def test_wheel_is_pure(built: Built) -> None:
    assert built.wheel.name == f"moec-{moec.__version__}-py3-none-any.whl"


def test_wheel_from_the_checkout_equals_wheel_from_the_sdist(built: Built) -> None:
    first, second = files(built.wheel), files(built.direct)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name] and not name.endswith("/RECORD")] == []


def test_sdist_has_the_sources_and_the_licence(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {str(path.relative_to(ROOT)) for path in shipped().values()}
    assert wanted <= names
    assert {"LICENSE", "NOTICE", "README.md", "pyproject.toml"} <= names


class Fresh:
    """A virtual environment with the wheel and nothing else: no torch, no numpy."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        venv.create(folder, with_pip=False)
        self.bin = folder / ("Scripts" if sys.platform == "win32" else "bin")
        pip = [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "--disable-pip-version-check"]
        done = self.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], cwd=folder)
        assert done.returncode == 0, done.stderr

    def moec(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run([str(self.bin / "moec"), *arguments], cwd=self.bin.parent)

    @staticmethod
    def run(command: Sequence[str], *, cwd: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env={"PATH": ""})


@pytest.fixture(scope="module")
def fresh(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    return Fresh(tmp_path_factory.mktemp("fresh"), built.wheel)


def test_the_wheel_alone_tells_its_version(fresh: Fresh) -> None:
    done = fresh.moec("--version")
    assert (done.returncode, done.stdout) == (0, f"moec {moec.__version__}\n"), done.stderr


@pytest.mark.parametrize("command", ["demo", "inspect", "opt", "bench", "passes", "env"])
def test_the_wheel_alone_helps(fresh: Fresh, command: str) -> None:
    done = fresh.moec(command, "--help")
    assert done.returncode == 0, done.stderr
    assert f"usage: moec {command}" in done.stdout


def test_the_wheel_alone_lists_passes(fresh: Fresh) -> None:
    done = fresh.moec("passes", "--json")
    assert done.returncode == 0, done.stderr
    assert "fuse-experts" in {row["name"] for row in json.loads(done.stdout)}


def test_without_torch_a_command_that_needs_it_says_so(fresh: Fresh) -> None:
    done = fresh.moec("demo")
    assert done.returncode == 1
    assert done.stderr.startswith("[MOEC609] moec demo needs ")
    assert "Traceback" not in done.stderr
