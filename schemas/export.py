"""JSON Schemas of the documents that others read or write: `python -m schemas.export DIR`."""

import json
import sys
from pathlib import Path

from schemas.base import Document
from schemas.manifest import (
    CorpusReport,
    DeadLetter,
    LedgerRecord,
    TargetsManifest,
    TokensManifest,
)
from schemas.model import ModelConfig
from schemas.runs import (
    CompileConfig,
    DumpConfig,
    EvalConfig,
    ExportConfig,
    PlanConfig,
    TokenizeConfig,
    TrainConfig,
)

DOCUMENTS: tuple[type[Document], ...] = (
    TokensManifest,
    TargetsManifest,
    LedgerRecord,
    CorpusReport,
    DeadLetter,
    ModelConfig,
    TokenizeConfig,
    CompileConfig,
    DumpConfig,
    TrainConfig,
    EvalConfig,
    ExportConfig,
    PlanConfig,
)


def schemas() -> dict[str, str]:
    """File name to JSON Schema text, one for each document."""
    return {
        f"{document.__name__}.json": json.dumps(document.model_json_schema(), indent=2) + "\n"
        for document in DOCUMENTS
    }


def main(folder: str) -> None:
    """Write every schema into `folder`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, text in schemas().items():
        (Path(folder) / name).write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
