"""Filters that look at one document alone: its length, language, words, what a scorer says.

Each is off unless the config asks for it. What drops a document is named, for counting.
"""

import hashlib
import importlib
import re
from collections.abc import Callable, Collection
from functools import lru_cache
from typing import Any

import fsspec

from schemas.corpus import CorpusConfig, LanguageConfig, QualityConfig, ScorerConfig
from schemas.errors import ConfigError, MissingDependencyError
from teacher_dump import decontamination

Filter = Callable[[str], str | None]
"""Takes a text; returns what it is dropped for, or None."""

_SYMBOLS = re.compile(r"#|\.\.\.|…")
_BULLETS = ("-", "*", "•", "‣", "▪", "\u2013")
_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
# A language shows in its first lines, and reading on costs as much as tokenizing.
_LANGUAGE_CHARACTERS = 5000


def make(config: CorpusConfig, evaluation_ngrams: Callable[[], Collection[str]]) -> list[Filter]:
    """The filters that are on, cheap ones first; the n-grams are asked for if they are needed.

    Raises ConfigError or MissingDependencyError.
    """
    filters: list[Filter] = [lambda text: length(text, config)]
    if config.quality.rules():
        filters.append(lambda text: _quality(text, config.quality))
    if config.blocklist.file is not None:
        hits = _blocklist(config.blocklist.file, digest(config.blocklist.file))
        filters.append(
            lambda text: (
                "blocklist" if len(hits.findall(text)) > config.blocklist.max_hits else None
            )
        )
    if config.language.keep or config.language.min_probability:
        filters.append(_language(config.language))
    if config.decontamination.paths:
        filters.append(decontamination.make(config.decontamination, evaluation_ngrams()))
    if config.scorer.function is not None:
        filters.append(_scorer(config.scorer))
    return filters


def first_reason(filters: list[Filter], text: str) -> str | None:
    """What the first filter that does not pass the text drops it for, or None."""
    return next((reason for one in filters if (reason := one(text)) is not None), None)


def digest(path: str) -> str:
    """SHA-256 of a file. Raises ConfigError if it cannot be read."""
    return hashlib.sha256(_read(path)).hexdigest()


def _read(path: str) -> bytes:
    try:
        with fsspec.open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ConfigError(
            f"A file that a filter reads must be readable, but {path} is not ({error}); check it."
        ) from error


def length(text: str, config: CorpusConfig) -> str | None:
    if len(text) < config.min_characters:
        return "min_characters"
    if config.max_characters is not None and len(text) > config.max_characters:
        return "max_characters"
    return None


def _quality(text: str, config: QualityConfig) -> str | None:
    """Words are runs of what is no white space, and lines those that are not blank."""
    rules = config.rules()
    words = text.split()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    per_word, per_line = 1 / max(len(words), 1), 1 / max(len(lines), 1)
    # Only what a rule asks for is computed.
    measures: dict[str, Callable[[], float]] = {
        "words": lambda: len(words),
        "word_characters": lambda: sum(map(len, words)) * per_word,
        "symbol_ratio": lambda: len(_SYMBOLS.findall(text)) * per_word,
        "bullet_lines": lambda: sum(line.startswith(_BULLETS) for line in lines) * per_line,
        "ellipsis_lines": lambda: sum(line.endswith(("...", "…")) for line in lines) * per_line,
        "alphabetic_words": lambda: sum(any(map(str.isalpha, w)) for w in words) * per_word,
        "stop_words": lambda: sum(w in _STOP_WORDS for w in text.lower().split()),
        "repeated_lines": lambda: (len(lines) - len(set(lines))) * per_line,
    }
    for rule, bound in rules.items():
        side, name = rule.split("_", 1)
        found = measures[name]()
        if found < bound if side == "min" else found > bound:
            return f"quality.{rule}"
    return None


@lru_cache(maxsize=4)
def _blocklist(path: str, sha256: str) -> re.Pattern[str]:
    """Any of the file's words, whole and in any case; sha256 is its content's."""
    try:
        lines = _read(path).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"A blocklist must be UTF-8, but {path} is not; convert it.") from error
    words = sorted({line.strip() for line in lines} - {""})
    phrases = [r"\s+".join(map(re.escape, w.split())) for w in words if not w.startswith("#")]
    if not phrases:
        raise ConfigError(f"A blocklist must hold a word, but {path} holds none; fill it.")
    return re.compile(rf"(?<!\w)(?:{'|'.join(phrases)})(?!\w)", re.IGNORECASE)


def _language(config: LanguageConfig) -> Filter:
    identifier = _identifier()
    unknown = set(config.keep) - set(identifier.labels)
    if unknown:
        raise ConfigError(
            f"corpus.language.keep must be codes that py3langid knows, but "
            f"{', '.join(sorted(unknown))} is not; it knows {', '.join(identifier.labels)}."
        )

    def check(text: str) -> str | None:
        found, probability = identifier.classify(text[:_LANGUAGE_CHARACTERS])
        if config.keep and found not in config.keep:
            return "language.keep"
        return "language.min_probability" if probability < config.min_probability else None

    return check


@lru_cache(maxsize=1)
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise MissingDependencyError(
            "corpus.language needs py3langid, which is not installed; pip install 'retort[corpus]'."
        ) from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _scorer(config: ScorerConfig) -> Filter:
    module, _, name = (config.function or "").partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"corpus.scorer.function must be importable where the job runs, but "
            f"{config.function} is not ({error}); install it or correct the name."
        ) from error
    return lambda text: "scorer" if float(function(text)) < config.threshold else None
