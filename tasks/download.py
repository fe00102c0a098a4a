"""Where data is kept, and how it is downloaded."""

import http.client
import os
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import filelock

from common import UserError, check, line, progress_bar

SLOWEST = 1024  # bytes per second, over a minute


def folder(variable: str, below_home: str) -> Path:
    """The folder that an environment variable names, else one in the home folder. Raises UserError if there is neither."""
    try:
        return Path(os.environ.get(variable) or Path.home() / below_home)
    except RuntimeError:
        raise UserError(f"there is no home folder here: name a folder for the data in {variable}") from None


def fetch(
    variable: str,
    sources: Sequence[str],
    path: str,
    file: Path,
    advice: str,
    check_file: Callable[[Path], None],
    hub: str | None = None,
) -> None:
    """Download `file` unless it is there, from the first source that works: `variable`, `sources`, a Hugging Face data set `hub`.

    `file` appears only when it is complete and `check_file` accepts it. Raises UserError, ending in `advice`, if no source has
    it or it cannot be written.
    """
    if file.exists():
        return
    bases = [base for base in (os.environ.get(variable), *sources) if base]
    attempts = {f"{base.rstrip('/')}/{path}": _download for base in bases} | (
        {f"{hub} {path}": _download_from_hub} if hub else {}
    )
    part, failures = file.with_name(f"{file.name}.part"), []
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(file.with_name(f".{file.name}.lock"))
        with _waiting(lock, file):
            for source, attempt in attempts.items():
                if file.exists():  # another process was faster
                    return
                try:
                    part.unlink(missing_ok=True)
                    print(f"downloading {file.name} from {source}")
                    attempt(source, part)
                    check_file(part)
                    part.replace(file)
                # URLError and timeouts are OSErrors; broken HTTP, addresses and files are others
                except (OSError, ValueError, EOFError, http.client.HTTPException, UserError) as error:
                    failures.append(f"{source} ({line(error)[:200]})")
                finally:
                    part.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {file} ({error.strerror or line(error)}). {advice}") from None
    check(file.exists(), f"cannot download {', nor '.join(failures)}. {advice}")


def _waiting(lock: filelock.FileLock, file: Path) -> filelock.BaseFileLock:
    try:
        return lock.acquire(timeout=1)
    except filelock.Timeout:
        print(f"waiting for another process that downloads {file}", file=sys.stderr)
        return lock.acquire()


def _download(url: str, part: Path) -> None:
    started = time.monotonic()
    with urllib.request.urlopen(url, timeout=30) as response, open(part, "xb") as target:
        size = int(response.headers.get("Content-Length", 0))
        with progress_bar(total=size or None, unit="B", unit_scale=True, desc=part.stem) as progress:
            while chunk := response.read1(1 << 20):
                target.write(chunk)
                progress.update(len(chunk))
                if time.monotonic() - started > 60 and target.tell() < SLOWEST * (time.monotonic() - started):
                    raise OSError(f"only {target.tell()} bytes arrived in a minute")
        if size and target.tell() != size:
            raise OSError(f"{target.tell()} of {size} bytes arrived")


def _download_from_hub(source: str, part: Path) -> None:
    """Downloads from the Hugging Face hub are resumed by its own library."""
    import huggingface_hub
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its warnings would hide our one line
    repo, path = source.split()
    Path(huggingface_hub.hf_hub_download(repo, path, repo_type="dataset", local_dir=part.parent)).replace(part)
