"""llama.cpp, by the bindings and the build of the package xllamacpp, on a GGUF file of the checkpoint's own weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bigmodel.errors import BigModelError, InvalidArgumentError

__all__ = ["LlamaCpp"]


class LlamaCpp:
    """llama.cpp as its server runs by default: the file mapped, its own number of threads, accelerators where its build has them.

    A run imports neither torch nor anything that does: within a memory limit, that would be page cache that llama.cpp lacks.

    Args:
        dtype: of the matrices in its file: "bf16", "f16" or "f32". Which is faster depends on the processor and the build.
        num_positions: tokens of the longest text, prompt and answer: its cache takes memory for all of them at the load.
    """

    name = "llama.cpp"
    environment = {"OMP_WAIT_POLICY": "passive"}  # read as OpenMP is loaded, which may be before `load`

    def __init__(self, dtype: str = "bf16", num_positions: int = 2048) -> None:
        self._dtype = dtype
        self.num_positions = num_positions
        self._server: Any = None

    def settings(self) -> str:
        """Versions and how it is set up, in one line.

        Raises:
            ImportError: xllamacpp or gguf is not installed.
        """
        xllamacpp = _xllamacpp()
        try:
            import gguf  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "llama.cpp's files are written by gguf, which is not installed: pip install gguf."
            ) from error
        system = " ".join(xllamacpp.get_system_info().replace("= 1", "").replace("|", " ").split())
        return (
            f"xllamacpp {xllamacpp.__version__} ({system}), {self._dtype} file, mapped, its own number of threads, "
            f"passive waiting, f16 cache for {self.num_positions} tokens, flash attention where it chooses, no warm-up run"
        )

    def prepare(self, path: str, scratch: str) -> list[str]:
        """Writes the GGUF file, unless it is there.

        Args:
            path: as `open_checkpoint` takes it.
            scratch: a folder for the file; those of other checkpoints and dtypes may be beside it.

        Returns:
            The file that it will read.

        Raises:
            InvalidArgumentError: the checkpoint is not one that llama.cpp runs, or not in this dtype.
            CheckpointError: its files are not what they should be.
            DoesNotFitError: the disk has no room for the file.
        """
        from bigmodel.bench.peers.gguf_file import DTYPES, REVISION, convertible, write_gguf
        from bigmodel.checkpoint import open_checkpoint

        if self._dtype not in DTYPES:
            raise InvalidArgumentError(f"{self._dtype!r} is no dtype of a GGUF file here. Use {', '.join(DTYPES)}.")
        checkpoint = open_checkpoint(path)
        model = convertible(checkpoint, self.num_positions)
        key = hashlib.sha256(f"{REVISION} {checkpoint.content_key}".encode()).hexdigest()[:16]
        target = Path(scratch) / f"{self._stem(path)}-{key}.gguf"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            write_gguf(model, target, self._dtype)
        for other in self._files(path, scratch):
            if other != target:
                other.unlink(missing_ok=True)  # of the checkpoint as it was before
        return [str(target)]

    def load(self, path: str, scratch: str) -> None:
        """Opens the file that `prepare` wrote.

        Raises:
            InvalidArgumentError: it is not there.
            BigModelError: llama.cpp refuses it.
        """
        xllamacpp = _xllamacpp()
        file = next(iter(self._files(path, scratch)), None)
        if file is None:
            raise InvalidArgumentError(f"{path} has no {self._dtype} file in {scratch}. Call prepare first.")
        options = xllamacpp.CommonParams()
        options.model.path = str(file)
        options.n_ctx = self.num_positions
        options.n_parallel = 1
        options.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_MMAP
        options.cache_ram_mib = 0  # keeps the caches of earlier prompts
        options.warmup = False
        options.verbosity = 1  # errors
        try:
            self._server = xllamacpp.Server(options)
        except RuntimeError as error:
            raise BigModelError(f"llama.cpp could not load {file}: {error}") from error

    def generate(self, ids: list[int], new_tokens: int, on_token: Callable[[int], None]) -> None:
        """Greedy, one sequence; end tokens are left out of the choice.

        Args:
            ids: of the prompt.
            new_tokens: how many to add.
            on_token: called with each of them.

        Raises:
            InvalidArgumentError: more tokens than `num_positions`.
            BigModelError: llama.cpp failed.
        """
        if len(ids) + new_tokens > self.num_positions:
            raise InvalidArgumentError(
                f"{len(ids)} tokens and {new_tokens} more were asked for, and num_positions is {self.num_positions}. Raise it."
            )
        failed: list[BaseException | str] = []
        num_given = 0

        def receive(part: dict[str, Any]) -> bool:
            """Takes what the server streams; true ends the stream."""
            nonlocal num_given
            try:
                if "choices" not in part:
                    failed.append(str(part))
                for choice in part.get("choices", ()):
                    for text in choice["text"].split():  # the stand-in vocabulary's texts are the ids
                        num_given += 1
                        on_token(int(text))
            except BaseException as error:  # it would be lost between the server's frames
                failed.append(error)
            return bool(failed)

        asked = {
            "prompt": ids,
            "max_tokens": new_tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "samplers": ["temperature"],
            "cache_prompt": False,
            "stream": True,
        }
        self._server.handle_completions(asked, receive)
        for error in failed:
            if isinstance(error, BaseException):
                raise error
            raise BigModelError(f"llama.cpp could not generate: {error}")
        if num_given != new_tokens:
            raise BigModelError(f"llama.cpp ended after {num_given} tokens of {new_tokens}.")

    def _stem(self, path: str) -> str:
        """What names of this checkpoint's files begin with, also where it cannot be opened again."""
        return f"{hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:16]}-{self._dtype}"

    def _files(self, path: str, scratch: str) -> list[Path]:
        return sorted(Path(scratch).glob(f"{self._stem(path)}-*.gguf"))


_WAITING = "OMP_WAIT_POLICY"


def _xllamacpp() -> Any:
    """The bindings, whose threads wait for each other without spinning: their OpenMP reads the policy once, as it is loaded."""
    stated = os.environ.get(_WAITING)
    os.environ.setdefault(_WAITING, "passive")
    try:
        import xllamacpp
    except ImportError as error:
        raise ImportError(
            "llama.cpp is run through xllamacpp, which is not installed: pip install xllamacpp."
        ) from error
    finally:
        if stated is None:
            del os.environ[_WAITING]  # other programs that this process starts choose their own
    return xllamacpp
