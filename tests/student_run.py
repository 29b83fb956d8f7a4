"""Runs a training config in a process of its own, for tests that kill it: CONFIG.json DELAY.

Of several processes each writes the rows that it read to `out`/rows-INDEX.json.
"""

import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

from schemas.errors import RetortError
from schemas.runs import TrainConfig
from student_train import hosts
from student_train.batch import Batch
from student_train.data import StoreSource
from student_train.loop import train

# TensorBoard's writer imports it if it is there, in four seconds, and needs it for nothing here.
sys.modules["torch"] = None  # type: ignore[assignment]


def main() -> None:
    config = TrainConfig.model_validate_json(Path(sys.argv[1]).read_text())
    hosts.join()
    rows: list[list[int]] = []
    read = StoreSource.read

    def counted(self: StoreSource, wanted: np.ndarray) -> Batch:
        if self.targets_manifest is not None:
            rows.append(wanted.tolist())
        return read(self, wanted)

    StoreSource.read = counted  # type: ignore[method-assign]
    result = train(config, on_event=lambda event: time.sleep(float(sys.argv[2])))
    (config.out / f"rows-{jax.process_index()}.json").write_text(json.dumps(rows))
    print(f"resumed_from={result.resumed_from} reused={result.reused}")


if __name__ == "__main__":
    try:
        main()
    except RetortError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
