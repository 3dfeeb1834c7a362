"""The server's log: a line of JSON on standard error for each event, whichever of its processes tells it."""

import json
import sys
import time
from collections.abc import Mapping


def write_line(level: str, event: str, fields: Mapping[str, object]) -> None:
    line = {"time": round(time.time(), 3), "level": level, "event": event, **fields}
    print(json.dumps(line, ensure_ascii=False), file=sys.stderr, flush=True)  # noqa: T201  # the server's log
