"""Runs a training config in a process of its own, for tests that kill it: CONFIG.json DELAY."""

import sys
import time
from pathlib import Path

from schemas.runs import TrainConfig
from student_train.loop import train

if __name__ == "__main__":
    result = train(
        TrainConfig.model_validate_json(Path(sys.argv[1]).read_text()),
        on_event=lambda event: time.sleep(float(sys.argv[2])),
    )
    print(f"resumed_from={result.resumed_from} reused={result.reused}")
