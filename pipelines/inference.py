"""A model handler for RunInference, for Beam pipelines of one's own: shard names in, receipts out.

The same work as `retort dump`: the driver prepares and finishes, a worker computes and commits a
shard whole. For `RunInference(handler.with_no_batching())` alone: batches of Beam's own making have
sizes that depend on timing, and so results that differ in their last bits.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from apache_beam.ml.inference.base import ModelHandler
from rich.console import Console

from logit_store import manifests
from logit_store.ledger import Ledger
from pipelines import dump
from schemas.errors import IncompleteStoreError
from schemas.manifest import ShardSpec, TargetsManifest
from schemas.runs import DumpConfig
from teacher_dump.teacher import Teacher


class TargetsHandler(ModelHandler[str, str, Teacher]):
    """Elements are lists of shard specs, results their ledger records, both as JSON."""

    def __init__(self, config: DumpConfig):
        super().__init__()
        self._config = config

    def prepare(self) -> list[str]:
        """For the driver, before the pipeline: make the set of targets; the shards to be written.

        Raises what `retort dump` raises before it computes.
        """
        ledger = dump.prepare(self._config, Console(quiet=True))
        return [spec.canonical_json() for spec in ledger.pending()]

    def finish(self) -> None:
        """For the driver, after it. Raises IncompleteStoreError unless every shard is committed."""
        config = self._config
        ledger = Ledger(config.store, config.name, self._manifest())
        ledger.compact()
        left = ledger.pending()
        if left:
            raise IncompleteStoreError(
                f"Every shard must be committed when the pipeline ends, but {len(left)} are not "
                f"(first: {left[0].index}); run it again over prepare()'s shards."
            )

    def load_model(self) -> Teacher:
        """The teacher of this process, which has one however many threads and handlers ask."""
        return dump.load_teacher(self._config, self._manifest().teacher)

    def run_inference(
        self, batch: Sequence[str], model: Teacher, inference_args: dict[str, Any] | None = None
    ) -> Iterable[str]:
        """Write the shards of one element; those that are committed are left as they are."""
        for element in batch:
            spec = ShardSpec.model_validate_json(element)
            yield dump.write_shard(self._config, spec).canonical_json()

    def _manifest(self) -> TargetsManifest:
        manifest = manifests.read_manifest(self._config.store, self._config.name)
        assert isinstance(manifest, TargetsManifest)
        return manifest
