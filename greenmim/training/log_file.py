"""log.jsonl: one JSON object a line, read, cut and written so that a bad disk loses nothing."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from greenmim.checkpoint import save_text


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl; a last line cut off by a crash is left out."""
    records = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def cut_log(path: Path, step: int) -> list[dict[str, Any]]:
    """Take out what a broken-off try logged after the checkpoint that the run goes on from.

    The whole is set aside, as log.1.jsonl and so on.

    Args:
        path: The file; it need not be there.
        step: Updates done at the checkpoint.

    Returns:
        The records that are left.

    Raises:
        OSError: the file is untouched.
    """
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8")
    kept = [record for record in read_log(path) if record.get("step", 0) <= step]
    text = "".join(json.dumps(record) + "\n" for record in kept)
    if text == whole:
        return kept
    number = 1
    while (aside := path.with_suffix(f".{number}{path.suffix}")).exists():
        number += 1
    save_text(whole, aside)
    save_text(text, path)
    return kept


class LogFile:
    """Appends records to log.jsonl.

    A disk that takes no more does not end a run: records wait here for the next try.

    Args:
        path: The file.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[str] = []
        self._file, self._end = None, 0
        self._open()
        self._end = self._file.seek(0, os.SEEK_END)

    def write(self, event: str, values: dict[str, Any]) -> str | None:
        """Append a record.

        Returns:
            Why it, and what waits, could not be written; None when all is in the file.
        """
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()  # JSON has no NaN
        }
        record = {"event": event, "time": round(time.time(), 3), **finite}
        self._waiting.append(json.dumps(record) + "\n")
        return self._write_waiting()

    def close(self) -> int:
        """Try a last time; the number of records that are lost."""
        if self._waiting:
            self._write_waiting()
        if self._file is not None:
            self._file.close()
        return len(self._waiting)

    def _open(self) -> None:
        self._file = self.path.open("ab", buffering=0)

    def _write_waiting(self) -> str | None:
        data = "".join(self._waiting).encode()
        try:
            if self._file is None:
                self._open()
                self._end = min(self._end, self._file.seek(0, os.SEEK_END))
                self._file.truncate(self._end)  # without the part of a line that got through
            done = 0
            while done < len(data):
                done += self._file.write(data[done:])
        except OSError as error:
            self._forget_file()
            return error.strerror or str(error)
        self._end += len(data)
        self._waiting.clear()
        return None

    def _forget_file(self) -> None:
        """Open anew at the next try: after a network file system's errors only that helps."""
        file, self._file = self._file, None
        try:
            if file is not None:
                file.close()
        except OSError:
            pass
