"""The handler for RunInference, by the example of `docs/engines.md`."""

import re
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.ml.inference.base import RunInference
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from dump_world import digest, dump_config, make_world, tokenize_config
from rich.console import Console

from logit_store import manifests, storage
from logit_store.ledger import Ledger
from logit_store.verify import verify
from pipelines import dump, tokenize
from pipelines.inference import TargetsHandler
from schemas.errors import IncompleteStoreError
from schemas.manifest import LedgerRecord
from schemas.runs import CorpusConfig, SamplerConfig

QUIET = Console(quiet=True)
DOCS = Path(__file__).parent.parent / "docs/engines.md"


def test_the_example_writes_what_a_dump_writes(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    corpus = CorpusConfig(paths=(str(world / "corpus" / "0.py"),))
    sampler = SamplerConfig(name="multinomial", points=4, entries_per_token=4, block_tokens=32)
    for name in ("expected", "found"):
        tokenize.tokenize(tokenize_config(world, tmp_path / name, corpus=corpus), QUIET)
    dump.dump(dump_config(world, tmp_path / "expected", sampler=sampler), QUIET)
    config = dump_config(world, tmp_path / "found", sampler=sampler)
    [example] = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    exec(compile(example, str(DOCS), "exec"), {"config": config})
    assert digest(tmp_path / "found") == digest(tmp_path / "expected")
    assert verify(config.store).ok
    # What is done is not done again: only one shard is asked for, and its record comes out.
    before = digest(tmp_path / "found")
    manifest = manifests.read_manifest(config.store, "default")
    Ledger(config.store, "default", manifest).withdraw([1])
    handler = TargetsHandler(config)
    shards = handler.prepare()
    assert len(shards) == 1
    with pytest.raises(IncompleteStoreError, match=r"but 1 are not \(first: 1\)"):
        handler.finish()
    records = list(handler.run_inference(shards, handler.load_model()))
    assert [LedgerRecord.model_validate_json(x).spec.index for x in records] == [1]
    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        _ = pipeline | beam.Create([shards]) | RunInference(handler.with_no_batching())
    handler.finish()
    storage.sweep_locks(config.store)
    assert digest(tmp_path / "found") == before
