"""Data files that arrive: from the first source that has them, resumed where they were cut off, with a checksum.

python download.py FILE     compare a file with the SHA-256 that lies beside it
"""

import contextlib
import fcntl
import hashlib
import http.client
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from common import UserError, check, line, progress_bar, write_atomically


def fetch(urls: Sequence[str], file: Path, advice: str, check_file: Callable[[Path], None]) -> None:
    """Download `file` from the first of `urls` that gives it, with a progress bar, and put its SHA-256 beside it.

    `file` appears only when it is complete and `check_file` raises nothing. What was cut off stays as FILE.part and is continued
    if its source has not changed. Raises UserError, ending in `advice`, if no source gives the file or it cannot be written.
    """
    part, failures = file.with_name(f"{file.name}.part"), []
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        target = open(part, "ab")
    except OSError as error:
        raise UserError(f"cannot write {file} ({error.strerror or line(error)}). {advice}") from None
    source = file.with_name(f"{file.name}.part.source")
    with target:
        _wait_for_lock(target, file)
        if not file.exists():  # another process may have been faster
            for url in urls:
                try:
                    _download(url, target, source, file.name)
                    try:
                        check_file(part)
                    except Exception:
                        target.truncate(0)
                        raise
                    with open(part, "rb") as content:
                        digest = hashlib.file_digest(content, "sha256").hexdigest()
                    write_atomically(_sums(file), f"{digest}  {file.name}\n".encode())
                    part.replace(file)
                    break
                # URLError and timeouts are OSErrors; what is no HTTP, no address or another format is one of the others
                except (OSError, ValueError, http.client.HTTPException, UserError) as error:
                    failures.append(f"{url} ({line(error)[:200]})")
        if file.exists() or not part.stat().st_size:
            for left in (part, source):
                left.unlink(missing_ok=True)
    check(file.exists(), f"cannot download {', nor '.join(failures)}. {advice}")


def _wait_for_lock(target: BinaryIO, file: Path) -> None:
    try:
        fcntl.lockf(target, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        print(f"waiting for another process, which downloads {file}", file=sys.stderr)
        fcntl.lockf(target, fcntl.LOCK_EX)
    except OSError:  # a file system without locks: go on without
        pass


def _download(url: str, target: BinaryIO, source: Path, name: str) -> None:
    """Append to `target` what it lacks of `url`; all of it unless `source` says that it began there and is unchanged."""
    target.seek(0, os.SEEK_END)
    known = source.read_text().splitlines() if source.exists() else []
    request = urllib.request.Request(url)
    if target.tell() and known[:1] == [url] and len(known) == 2:
        request.headers |= {"Range": f"bytes={target.tell()}-", "If-range": known[1]}
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing after that byte
            raise
        response = urllib.request.urlopen(url, timeout=30)
    with response:
        if response.status != 206:
            target.truncate(0)
        validator = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        # A weak ETag says nothing of single bytes
        source.write_text(url + (f"\n{validator}" if validator and not validator.startswith("W/") else ""))
        begun = target.seek(0, os.SEEK_END)
        size = begun + int(response.headers.get("Content-Length", 0))
        with progress_bar(
            total=size if size > begun else None, initial=begun, unit="B", unit_scale=True, desc=name, disable=None
        ) as progress:
            while chunk := response.read(1 << 20):
                target.write(chunk)
                progress.update(len(chunk))
        target.flush()
        if size > begun and target.tell() != size:
            raise OSError(f"{target.tell()} of {size} bytes arrived; the same command goes on from there")


def _sums(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


CHECKED, DAMAGED = "# checked", "# damaged"  # last line of FILE.sha256, after the process below has looked
_checking: list[subprocess.Popen] = []


def verify_later(file: Path) -> None:
    """At the first start after a download, compare the file with its SHA-256, in another process.

    Raises UserError if an earlier such process found it damaged.
    """
    try:
        lines = _sums(file).read_text().splitlines()
    except OSError:
        return  # not downloaded by us
    check(DAMAGED not in lines, f"{file} is not what was downloaded (its SHA-256 has changed): delete it to download it again")
    if CHECKED not in lines:
        with contextlib.suppress(OSError):
            _checking.append(subprocess.Popen([sys.executable, __file__, str(file)], start_new_session=True))


def main(file: Path) -> None:
    """Compare `file` with its SHA-256 and note what came out there; on stderr too if it differs."""
    with contextlib.suppress(OSError):
        os.nice(10)
        first = _sums(file).read_text().splitlines()[0]
        with open(file, "rb") as content:
            equal = hashlib.file_digest(content, "sha256").hexdigest() == first.split()[0]
        write_atomically(_sums(file), f"{first}\n{CHECKED if equal else DAMAGED}\n".encode())
        if not equal:
            print(f"error: {file} is not what was downloaded (its SHA-256 has changed): stop, and delete it", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
