"""What a run on a GPU compiled, as one file that the next run takes: the caches of Triton and
Inductor, the extension and the cubins.

Steps keep the caches in build/compiled. The extension and the cubins are taken only by a run of the
same sources, Python and PyTorch. Of a Triton kernel only what a launch reads is kept.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import sysconfig
from pathlib import Path

import torch

from bench.archive import pack, unpack
from bench.environment import REPOSITORY

# Triton's intermediate forms, which a launch does not read.
NOT_KEPT = {".source", ".ttir", ".ttgir", ".llir", ".ptx", ".sass"}


class Compiled:
    """The file and the folder of what was compiled.

    Args:
        file: the .tar.gz that is read, if it is there, and written.
        repository: whose extension and cubins they are.
    """

    def __init__(self, file: Path, repository: Path = REPOSITORY):
        self.file, self._repository = file, repository
        self._folder = repository / "build" / "compiled"
        self._written: tuple[int, int] | None = None

    @property
    def env(self) -> dict[str, str]:
        """The environment in which a process uses the caches."""
        names = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
        return {name: str(self._folder / part) for name, part in names.items()}

    def restore(self) -> None:
        """Takes what the file has, and puts the extension and the cubins where they are missing.

        Raises:
            OSError, tarfile.TarError: it cannot be read.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        if self.file.exists():
            unpack(self.file, self._folder)
        # A group of Triton's files names them by absolute paths.
        for group in self._folder.glob("triton/*/__grp__*"):
            content = json.loads(group.read_text(encoding="utf-8"))
            here = {name: str(group.parent / name) for name in content["child_paths"]}
            group.write_text(json.dumps({"child_paths": here}), encoding="utf-8")
        for name in self._products():
            kept, target = self._build / name, self._repository / "tw_kernels" / name
            if kept.exists() and not target.exists():
                target.parent.mkdir(exist_ok=True)
                shutil.copy2(kept, target)

    def save(self, built: bool) -> None:
        """Writes the file, if more is there than when it was last written.

        Args:
            built: whether this run has built the extension and the cubins.
        """
        for name in self._products() if built else []:
            source, kept = self._repository / "tw_kernels" / name, self._build / name
            if source.exists() and not kept.exists():
                kept.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, kept)
        sizes = [path.stat().st_size for path in self._folder.rglob("*") if path.is_file()]
        there = len(sizes), sum(sizes)
        if there != self._written:
            pack(self.file, self._folder, lambda path: path.suffix not in NOT_KEPT)
            self._written = there

    def _products(self) -> list[str]:
        """What a build makes, relative to tw_kernels."""
        kernels = [source.stem for source in self._sources() if source.suffix == ".cu"]
        cubins = [f"cubins/{name}.{what}" for name in kernels for what in ("cubin", "digest")]
        return [f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", *cubins]

    def _sources(self) -> list[Path]:
        root = self._repository
        files = ["setup.py", "CMakeLists.txt", "tw_kernels/cuda_build.py"]
        own = [root / name for name in files if (root / name).exists()]
        return own + sorted(p for p in (root / "csrc").rglob("*") if p.is_file())

    @property
    def _build(self) -> Path:
        """The folder of what these sources are built into, by this Python for this PyTorch."""
        state = hashlib.sha256(f"{platform.python_version()} {torch.__version__}".encode())
        for path in self._sources():
            state.update(str(path.relative_to(self._repository)).encode() + path.read_bytes())
        return self._folder / f"build-{state.hexdigest()[:16]}"
