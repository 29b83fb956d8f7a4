"""What a user says of a corpus: which documents are read, which are kept, what is masked.

Everything that drops or changes documents is off unless it is asked for.
"""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from schemas.base import NAMES_NONE, Document

MaskedKind = Literal["email", "phone", "ip", "card", "iban"]


def _one_or_more(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_one_or_more)]


class MixtureGroup(Document):
    """Files that get a share of the store's tokens."""

    paths: Names = Field(description="As corpus.paths.")
    weight: float = Field(gt=0, description="Its share of the tokens, relative to the others'.")


class QualityConfig(Document):
    """Rules on a document's words, lines and characters; a rule that is none is off."""

    preset: Annotated[Literal["none", "gopher"], NAMES_NONE] = Field(
        "none", description="gopher: the rules of arXiv 2112.11446 (A1.1), where none is given."
    )
    min_words: int | None = Field(None, ge=0)
    max_words: int | None = Field(None, ge=1)
    min_word_characters: float | None = Field(None, ge=0, description="Mean length of a word.")
    max_word_characters: float | None = Field(None, ge=0, description="Mean length of a word.")
    max_symbol_ratio: float | None = Field(
        None, ge=0, description="Hash signs and ellipses, for each word."
    )
    max_bullet_lines: float | None = Field(None, ge=0, le=1, description="Share of lines.")
    max_ellipsis_lines: float | None = Field(None, ge=0, le=1, description="Share of lines.")
    min_alphabetic_words: float | None = Field(
        None, ge=0, le=1, description="Share of words that have a letter."
    )
    min_stop_words: int | None = Field(
        None, ge=0, description="Of the, be, to, of, and, that, have, with; for English."
    )
    max_repeated_lines: float | None = Field(
        None, ge=0, le=1, description="Share of lines that were there before."
    )

    def rules(self) -> dict[str, float]:
        """Every rule that is on, by name, with its bound."""
        given = self.model_dump(exclude={"preset"}, exclude_none=True)
        return (GOPHER if self.preset == "gopher" else {}) | given


GOPHER: dict[str, float] = {
    "min_words": 50,
    "max_words": 100_000,
    "min_word_characters": 3,
    "max_word_characters": 10,
    "max_symbol_ratio": 0.1,
    "max_bullet_lines": 0.9,
    "max_ellipsis_lines": 0.3,
    "min_alphabetic_words": 0.8,
    "min_stop_words": 2,
    "max_repeated_lines": 0.3,
}


class LanguageConfig(Document):
    """Languages that are kept, told by py3langid; needs `[corpus]`."""

    keep: Names = Field((), description="Codes as en, de, zh; none: all.")
    min_probability: float = Field(
        0.0, ge=0, le=1, description="Less sure ones are dropped, whatever the language."
    )


class BlocklistConfig(Document):
    """Documents with words of a list are dropped."""

    file: str | None = Field(
        None, description="A word or phrase a line, in any case; # begins a comment."
    )
    max_hits: int = Field(0, ge=0, description="A document with more of them is dropped.")


class ScorerConfig(Document):
    """A function of the user's own that says how good a document is."""

    function: str | None = Field(
        None,
        pattern=r"^[\w.]+:\w+$",
        description="module:function, which takes the text and returns a number. It is called once "
        "for each document, wherever the job runs.",
    )
    threshold: float = Field(0.0, description="Documents of lower scores are dropped.")


class DecontaminationConfig(Document):
    """Documents that share n-grams of words with evaluation sets are dropped."""

    paths: Names = Field((), description="The evaluation sets, as corpus.paths.")
    text_field: str = Field("text", description="As corpus.text_field.")
    ngram_words: int = Field(13, ge=1)
    min_matches: int = Field(
        1, ge=1, description="A document with so many n-grams of the sets is dropped."
    )


class MaskingConfig(Document):
    """Personal data that is replaced by its kind, as [EMAIL]."""

    kinds: tuple[MaskedKind, ...] = Field(
        (), description="email, ip; phone, card and iban need `[corpus]`."
    )
    phone_region: str | None = Field(
        None,
        pattern=r"^[A-Z]{2}$",
        description="Where numbers without +COUNTRY are dialled, as US; none: they are left alone.",
    )


class DuplicatesConfig(Document):
    """Documents that were there before are dropped; the first in the corpus's order is kept."""

    exact: bool = Field(False, description="Of the same text.")
    near: bool = Field(False, description="Of much the same words (MinHash); needs `[corpus]`.")
    threshold: float = Field(
        0.8, gt=0, le=1, description="Share of common n-grams (Jaccard) from which on."
    )
    ngram_words: int = Field(5, ge=1)
    permutations: int = Field(
        128, ge=16, le=1024, description="Length of a signature: the longer, the surer."
    )


class CorpusConfig(Document):
    """Which documents are read, and what becomes of them before they are tokenized."""

    paths: Names = Field(
        (),
        description="Files, folders, globs or URLs: .txt .md .rst .py (one document a file) and "
        ".jsonl, each also .gz or .zst; .parquet; .arrow .feather; .zarr of token ids.",
    )
    mixture: tuple[MixtureGroup, ...] = Field(
        (), description="In place of paths: groups of them, each with a weight."
    )
    mixture_seed: int = Field(0, ge=0, lt=2**64, description="Decides which documents are taken.")
    mixture_epochs: float = Field(
        1.0,
        gt=0,
        le=100,
        description="How often the group that is shortest for its weight is taken; others less.",
    )
    text_field: str = Field(
        "text", min_length=1, description="Column or JSON key of the text; a.b for b inside a."
    )
    ids_field: str | None = Field(
        None,
        min_length=1,
        description="In place of text: column or JSON key of token ids, which are taken as they "
        "are. Of a .zarr array it is any name.",
    )
    max_document_bytes: int = Field(
        32 * 2**20,
        ge=1,
        lt=2**31,
        description="Longer documents (or lines that hold one) go to the dead letters unread.",
    )
    min_characters: int = Field(1, ge=0, description="Shorter documents are dropped.")
    max_characters: int | None = Field(None, ge=1, description="Longer documents are dropped.")
    language: LanguageConfig = LanguageConfig()
    quality: QualityConfig = QualityConfig()
    blocklist: BlocklistConfig = BlocklistConfig()
    scorer: ScorerConfig = ScorerConfig()
    decontamination: DecontaminationConfig = DecontaminationConfig()
    masking: MaskingConfig = MaskingConfig()
    duplicates: DuplicatesConfig = DuplicatesConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.paths) == bool(self.mixture):
            raise ValueError("a corpus must have either paths or a mixture; give one of them")
        if self.ids_field is not None:
            needs = [
                name
                for name, on in (
                    ("language", self.language.keep or self.language.min_probability),
                    ("quality", self.quality.rules()),
                    ("blocklist", self.blocklist.file),
                    ("scorer", self.scorer.function),
                    ("decontamination", self.decontamination.paths),
                    ("masking", self.masking.kinds),
                    ("duplicates.near", self.duplicates.near),
                )
                if on
            ]
            if needs:
                raise ValueError(
                    f"token ids are taken as they are, so ids_field goes with none of "
                    f"{', '.join(needs)}; leave these out or give text_field"
                )
        return self

    @property
    def groups(self) -> tuple[Names, ...]:
        """The paths of each group of the mixture; without one there is one group."""
        return tuple(group.paths for group in self.mixture) or (self.paths,)
