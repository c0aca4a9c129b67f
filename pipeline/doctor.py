"""`asvr doctor`: what this machine has and lacks for either stage, a line each, with the remedy.

What has to be imported to be asked (torch, Ray) is asked in a child: a broken installation then is a line, not a crash.
Of credentials it says that they are there, never what they are.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from manifests.hashes import cache_dir
from pipeline import console

Health = Literal["ok", "note", "bad"]
"""`note` is something that only some uses need; `bad` keeps a stage from working."""

LEAST_DISK_GB = 10
LEAST_MEMORY_GB = 4
CHILD_SECONDS = 120
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - asked for its size only

_STAGES = {"tokenize": ("torch", "transformers", "ray"), "train": ("torch", "transformers", "deepspeed", "ninja")}
_TORCH = """
import json, torch
cuda = torch.cuda.is_available()
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
print(json.dumps({"build": torch.version.cuda, "gpus": names}))
"""


@dataclass(frozen=True)
class Finding:
    """One line of the report. `remedy` is empty where nothing is to be done."""

    name: str
    health: Health
    said: str
    remedy: str = ""


def examine() -> Iterator[Finding]:
    """All findings, one after the other as they are made."""
    yield _python()
    for stage, packages in _STAGES.items():
        yield _packages(stage, packages)
    gpus = yield from _torch()
    yield _ray()
    yield from _deepspeed(gpus)
    yield _memory()
    yield _shared_memory()
    for name, folder in {"cache": cache_dir(), "temporary files": Path(tempfile.gettempdir())}.items():
        yield _disk(name, folder)
    yield from _credentials()


def show(*, as_json: bool) -> bool:
    """Print the findings; whether nothing is bad."""
    findings = list(examine())
    if as_json:
        console.write_json({"findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            remedy = f": {finding.remedy}" if finding.remedy else ""
            console.write_line(f"{finding.health:<5} {finding.name:<20} {console.plain(finding.said + remedy)}")
    return all(finding.health != "bad" for finding in findings)


def _python() -> Finding:
    said = (
        f"{platform.python_version()} in {sys.prefix}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    )
    if sys.platform != "linux":
        return Finding("Python", "note", said, "only Linux is tested")
    return Finding("Python", "ok", said)


def _packages(stage: str, packages: tuple[str, ...]) -> Finding:
    found, lacking = [], []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            lacking.append(package)
    if lacking:
        return Finding(
            f"{stage} stage", "note", f"{', '.join(lacking)} not installed", f"pip install 'asvr[{stage}]' to use it"
        )
    return Finding(f"{stage} stage", "ok", ", ".join(found))


def _torch() -> Generator[Finding, None, int]:
    """The finding about torch and its GPUs; returns how many there are."""
    if not _installed("torch"):
        return 0
    try:
        child = subprocess.run(
            [sys.executable, "-c", _TORCH], capture_output=True, text=True, check=False, timeout=CHILD_SECONDS
        )
    except subprocess.TimeoutExpired:
        yield Finding(
            "GPU", "bad", f"torch did not answer in {CHILD_SECONDS} s", "look at nvidia-smi; restart the machine"
        )
        return 0
    if child.returncode:
        reason = (child.stderr.strip().splitlines() or ["it says nothing"])[-1]
        yield Finding("GPU", "bad", f"torch cannot be imported ({reason})", "install it again")
        return 0
    answer = json.loads(child.stdout)
    gpus: list[str] = answer["gpus"]
    if gpus:
        names = ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus))
        yield Finding("GPU", "ok", f"{names}, torch built for CUDA {answer['build']}")
    elif shutil.which("nvidia-smi"):
        built = f"for CUDA {answer['build']}" if answer["build"] else "without CUDA"
        yield Finding(
            "GPU",
            "bad",
            f"there is a driver, but torch, built {built}, sees no GPU",
            "install a torch that fits the driver",
        )
    else:
        yield Finding("GPU", "note", "none; both stages run on the CPU, for tests and demos")
    return len(gpus)


def _ray() -> Finding:
    address = os.environ.get("RAY_ADDRESS")
    if address:
        return Finding("Ray cluster", "ok", f"RAY_ADDRESS is {console.plain(address)}")
    if Path(tempfile.gettempdir(), "ray", "ray_current_cluster").exists():
        return Finding("Ray cluster", "ok", "one was started on this machine; `ray: {address: auto}` finds it")
    return Finding("Ray cluster", "note", "none known here", "`ray: {address: local}` starts one for the job alone")


def _deepspeed(gpus: int) -> Iterator[Finding]:
    """Compilers, and DeepSpeed's communication op, which it compiles where there is no GPU."""
    if not _installed("deepspeed"):
        return
    beside_python = str(Path(sys.executable).parent)
    places = os.pathsep.join([beside_python, os.environ.get("PATH", "")])
    compiler = os.environ.get("CXX", "g++")
    lacking = [program for program in ("ninja", compiler) if shutil.which(program, path=places) is None]
    if lacking:
        health: Health = "note" if gpus else "bad"
        yield Finding(
            "compiler",
            health,
            f"{' and '.join(lacking)} not on PATH",
            "apt-get install ninja-build g++, to train on a CPU",
        )
        return
    yield Finding("compiler", "ok", f"ninja and {compiler}")
    if gpus:
        return
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(sys.prefix) / "torch_extensions")
    built = sorted(folder.glob("deepspeed_shm_comm/*.so"))
    if built:
        yield Finding("DeepSpeed op", "ok", f"built, {built[0]}")
    else:
        yield Finding(
            "DeepSpeed op", "note", f"not built in {folder}", "the first training builds it, in a minute or two"
        )


def _memory() -> Finding:
    available = _available_memory_gb()
    if available is None:
        return Finding("memory", "note", "unknown on this system")
    said = f"{available:.1f} GB available"
    if available < LEAST_MEMORY_GB:
        return Finding("memory", "bad", said, f"either stage wants at least {LEAST_MEMORY_GB} GB")
    return Finding("memory", "ok", said)


def _available_memory_gb() -> float | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kilobytes = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    return None if kilobytes is None else kilobytes * 1024 / 1e9


def _shared_memory() -> Finding:
    if not _SHARED_MEMORY.is_dir():
        return Finding("shared memory", "note", f"no {_SHARED_MEMORY}", "Ray and DeepSpeed then use slower ways")
    size = shutil.disk_usage(_SHARED_MEMORY).total / 1e9
    said = f"{_SHARED_MEMORY} has {size:.1f} GB"
    if size < 1:
        return Finding("shared memory", "bad", said, "start the container with --shm-size 16g")
    return Finding("shared memory", "ok", said)


def _disk(name: str, folder: Path) -> Finding:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free / 1e9
    said = f"{free:.0f} GB free for {folder}"
    variable = "ASVR_CACHE" if name == "cache" else "TMPDIR"
    if not os.access(there, os.W_OK):
        return Finding(name, "bad", f"{there} cannot be written", f"set {variable} to a folder of your own")
    if free < LEAST_DISK_GB:
        return Finding(name, "bad", said, f"set {variable} to a disk with more")
    return Finding(name, "ok", said)


def _credentials() -> Iterator[Finding]:
    home = Path.home()
    kinds = {
        "s3": (("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE"), home / ".aws" / "credentials"),
        "gs": (
            ("GOOGLE_APPLICATION_CREDENTIALS",),
            home / ".config" / "gcloud" / "application_default_credentials.json",
        ),
        "hf": (("HF_TOKEN",), Path(os.environ.get("HF_HOME") or home / ".cache" / "huggingface") / "token"),
    }
    for scheme, (variables, file) in kinds.items():
        named = next((variable for variable in variables if os.environ.get(variable)), None)
        source = f"{named} is set" if named else f"{file} is there" if file.is_file() else None
        if source:
            yield Finding(f"{scheme}:// access", "ok", source)
        else:
            yield Finding(f"{scheme}:// access", "note", "no credentials", f"set {variables[0]} to use {scheme}://")


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
