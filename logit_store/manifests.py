"""Reads the manifests of a store; every reader, writer and tool begins here."""

import hashlib
import json
from collections.abc import Iterator

from logit_store import layout, storage
from schemas.base import canonical_json
from schemas.errors import (
    ConfigError,
    CorruptStoreError,
    FormatVersionError,
    StoreNotFoundError,
)
from schemas.manifest import (
    FORMAT_VERSION,
    Corpus,
    CorpusReport,
    DeadLetter,
    Manifest,
    TargetsManifest,
    TokensManifest,
)


def read_manifest(url: str, name: str | None) -> Manifest:
    """The manifest of the tokens (name None) or of a set of targets.

    Raises StoreNotFoundError, FormatVersionError or CorruptStoreError.
    """
    path = layout.group_path(name)
    raw = storage.read_bytes(storage.open_kvstore(url, path), layout.GROUP_KEY)
    what = "tokens" if name is None else f"targets '{name}'"
    if raw is None:
        sets = [] if name is None else list_targets(url)
        if name in sets:
            raise StoreNotFoundError(
                f"A manifest must be beside its copy, but of {what} {url} has the copy alone; "
                f"run `retort repair {url}`."
            )
        known = "" if name is None else f"; it has {', '.join(sets) or 'none'}"
        raise StoreNotFoundError(
            f"A store must have been created before it is read, but {url} holds no {what}{known}; "
            f"check the path or run `retort {'tokenize' if name is None else 'dump'}` first."
        )
    return parse_manifest(raw, url, name, f"{url}: {path}{layout.GROUP_KEY}")


def parse_manifest(raw: bytes, url: str, name: str | None, where: str) -> Manifest:
    """The manifest in a group's zarr.json. Raises FormatVersionError or CorruptStoreError."""
    try:
        attributes = json.loads(raw)["attributes"]
        document = attributes[layout.MANIFEST_ATTRIBUTE]
        version = document["format_version"]
        # Inside, as JSON may escape half a character, which no UTF-8 is of.
        found = hashlib.sha256(canonical_json(document).encode()).hexdigest()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptStoreError(
            f"A group's zarr.json must hold a retort manifest, but {where} does not ({error!r}); "
            f"run `retort repair {url}`."
        ) from error
    if version != FORMAT_VERSION:
        raise FormatVersionError(
            f"This retort reads format version {FORMAT_VERSION}, but {where} is of version "
            f"{version}; upgrade retort or use the version that wrote it."
        )
    if attributes.get(layout.CHECKSUM_ATTRIBUTE) != found:
        raise CorruptStoreError(
            f"A manifest must match its {layout.CHECKSUM_ATTRIBUTE}, but that of {where} does not; "
            f"run `retort repair {url}`."
        )
    kind = TokensManifest if name is None else TargetsManifest
    try:
        return kind.parse(document, where)
    except ConfigError as error:
        raise CorruptStoreError(f"A stored manifest must be valid, but {error}") from error


def read_corpus(url: str, manifest: TokensManifest) -> Corpus:
    """The list of a store's source files. Raises CorruptStoreError unless it is the manifest's."""
    key = layout.corpus_key(manifest)
    raw = storage.read_bytes(storage.open_kvstore(url), key)
    if raw is None or hashlib.sha256(raw).hexdigest() != manifest.corpus.sha256:
        raise CorruptStoreError(
            f"A store's list of sources must be the manifest's, but {key} of {url} is missing or "
            "another; restore it, or make the store again."
        )
    return Corpus.parse(json.loads(raw), f"{url}: {key}")


def corpus_files(corpus: Corpus) -> dict[str, str]:
    """SHA-256 of what lies beside the list of sources, by key."""
    files = {} if corpus.report_sha256 is None else {layout.REPORT_KEY: corpus.report_sha256}
    for number, split in enumerate(corpus.splits):
        if split.documents_sha256 is not None:
            files[layout.documents_key(number)] = split.documents_sha256
        if split.dead_letters_sha256 is not None:
            files[layout.dead_letters_key(number)] = split.dead_letters_sha256
    return files


def read_report(url: str) -> CorpusReport | None:
    """What became of the corpus, or None of a store that does not say. Raises CorruptStoreError."""
    raw = storage.read_bytes(storage.open_kvstore(url), layout.REPORT_KEY)
    if raw is None:
        return None
    try:
        return CorpusReport.parse(json.loads(raw), layout.REPORT_KEY)
    except (ValueError, RecursionError) as error:
        raise CorruptStoreError(
            f"{layout.REPORT_KEY} of {url} must be a corpus report, but it is not ({error}); run "
            "`retort tokenize` again, which writes it."
        ) from error


def read_dead_letters(url: str) -> Iterator[DeadLetter]:
    """All that are written down, in the corpus's order."""
    store = storage.open_kvstore(url, layout.DEAD_LETTERS)
    for key in storage.list_keys(store):
        for line in (storage.read_bytes(store, key) or b"").splitlines():
            yield DeadLetter.parse(json.loads(line), f"{url}: {layout.DEAD_LETTERS}{key}")


def list_targets(url: str) -> list[str]:
    """Names of the sets of targets, sorted. Their manifests' copies are listed: they are few."""
    keys = storage.list_keys(storage.open_kvstore(url, layout.COPIES + layout.TARGETS))
    return [key.removesuffix(".json") for key in keys if "/" not in key and key.endswith(".json")]
