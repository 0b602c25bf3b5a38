"""The process that carries a run's journal; started by `Trackers`, told what to do in the first line of its input."""

import json
import os
import sys
from pathlib import Path

from pydantic import TypeAdapter

from pretrain.track import Track
from pretrain.track.process import follow

if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    order = json.loads(sys.stdin.readline())
    track = TypeAdapter(list[Track]).validate_python(order["track"])
    follow([config.build(Path(order["run_folder"])) for config in track], sys.stdin, answers)
