"""What each filter drops, what is masked, which copies are found, and which documents are drawn."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest

from schemas.corpus import CorpusConfig, DuplicatesConfig, MaskingConfig
from schemas.errors import ConfigError, MissingDependencyError
from teacher_dump import documents, duplicates, filters, mixture, selection
from teacher_dump.documents import Columns
from teacher_dump.masking import Masker


def reason(text: str, **settings: object) -> str | None:
    """What a text is dropped for."""
    config = CorpusConfig.model_validate({"paths": ["x"], **settings})
    found = filters.make(config, lambda: documents._evaluation_ngrams(config.decontamination))
    return filters.first_reason(found, text)


def test_nothing_is_dropped_unless_it_is_asked_for() -> None:
    assert reason("# ... badword" * 99) is None
    assert CorpusConfig(paths=("x",)).masking.kinds == ()


@pytest.mark.parametrize(
    ("rule", "bound", "inside", "outside"),
    [
        ("min_words", 3, "a b c", "a b"),
        ("max_words", 2, "a b", "a b c"),
        ("min_word_characters", 2.0, "aa b cc d eee fff", "a b cc"),
        ("max_word_characters", 2.0, "aaa b", "aaa bb"),
        ("max_symbol_ratio", 0.5, "a # b ... c d", "a # ... … b"),
        ("max_bullet_lines", 0.5, "- a\nb\n\n", "- a\n\n* b\nc"),
        ("max_ellipsis_lines", 0.5, "a...\nb", "a...\nb…\nc"),
        ("min_alphabetic_words", 0.5, "a 1", "a 1 2"),
        ("min_stop_words", 2, "The cat and", "the cat"),
        ("max_repeated_lines", 0.5, "a\n a \nb\nb", "a\na\na"),
    ],
)
def test_a_rule_of_quality(rule: str, bound: float, inside: str, outside: str) -> None:
    assert reason(inside, quality={rule: bound}) is None
    assert reason(outside, quality={rule: bound}) == f"quality.{rule}"


def test_gophers_rules_pass_prose_and_drop_tables() -> None:
    prose = "the people have to go with what is there and that will be the end of it. " * 10
    gopher = {"preset": "gopher"}
    assert reason(prose, quality=gopher) is None
    assert reason("12 34 56 78 90 " * 20, quality=gopher) == "quality.min_word_characters"
    assert reason("1234 5678 " * 40, quality=gopher) == "quality.min_alphabetic_words"
    assert reason("a word " * 9, quality=gopher | {"min_words": 5}) != "quality.min_words"


def test_a_blocklist_has_whole_words_and_phrases(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("# comment\n\nBad\nvery  poor\n")
    for text, hits in (
        ("badly done, not abad", 0),
        ("a bad, BAD thing", 2),
        ("very\npoor comment", 1),
    ):
        for allowed in range(3):
            found = reason(text, blocklist={"file": str(path), "max_hits": allowed})
            assert found == ("blocklist" if hits > allowed else None)
    path.write_text("# none\n")
    with pytest.raises(ConfigError, match="must hold a word"):
        reason("x", blocklist={"file": str(path)})
    with pytest.raises(ConfigError, match=r"must be readable, but .*absent is not"):
        reason("x", blocklist={"file": str(tmp_path / "absent")})


def test_languages_are_told_apart() -> None:
    german = "Der schnelle braune Fuchs springt über den faulen Hund und läuft dann weiter."
    english = "The quick brown fox jumps over the lazy dog and then it runs on and on."
    assert reason(german, language={"keep": ["de"]}) is None
    assert reason(english, language={"keep": ["de"]}) == "language.keep"
    assert reason(english, language={"keep": ["de", "en"], "min_probability": 0.9}) is None
    assert reason("xq", language={"min_probability": 0.999}) == "language.min_probability"
    with pytest.raises(ConfigError, match=r"must be codes .*, but klingon is not; it knows"):
        reason("x", language={"keep": ["en", "klingon"]})


def test_a_scorer_of_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "my_scorer.py").write_text("def score(text):\n    return len(text) / 10\n")
    monkeypatch.syspath_prepend(tmp_path)
    scorer = {"function": "my_scorer:score", "threshold": 0.5}
    assert reason("12345", scorer=scorer) is None
    assert reason("1234", scorer=scorer) == "scorer"
    with pytest.raises(ConfigError, match=r"must be importable .*, but my_scorer:absent is not"):
        reason("x", scorer=scorer | {"function": "my_scorer:absent"})


def test_evaluation_sets_are_kept_out(tmp_path: Path) -> None:
    path = tmp_path / "set.txt"
    path.write_text("What is the capital of France? It is Paris, on the Seine.")
    for text, ngram, matches, dropped in (
        ("we know: what is THE capital\nof france -- it is nice", 8, 1, True),
        ("we know: what is the capital of france", 8, 1, False),
        ("what is the capital of france it is", 7, 2, True),
        ("what is the capital of france it is", 7, 3, False),
        ("what is the capital of spain it is paris", 8, 1, False),
    ):
        found = reason(
            text,
            decontamination={"paths": [str(path)], "ngram_words": ngram, "min_matches": matches},
        )
        assert (found == "decontamination") == dropped, text
    with pytest.raises(ConfigError, match="must hold texts of at least 13 words, but"):
        reason("x", decontamination={"paths": [str(path)], "ngram_words": 13})


def mask(text: str, *kinds: str, **settings: object) -> str:
    return Masker(MaskingConfig.model_validate({"kinds": kinds, **settings}))(text)


ALL = ("email", "phone", "ip", "card", "iban")


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Mail a.b+c@sub.example.co.uk, please.", "Mail [EMAIL], please."),
        ("not@local, @decorator, a@b", "not@local, @decorator, a@b"),
        ("at 192.168.0.1:80 or 300.1.1.1", "at [IP]:80 or 300.1.1.1"),
        ("version 1.2.3.4.5 and 1.2.3", "version 1.2.3.4.5 and 1.2.3"),
        ("via 2001:db8::ff00:42:8329, at 12:30:45", "via [IP], at 12:30:45"),
        ("std::vector and a::b", "std::vector and a::b"),
        ("card 4111 1111 1111 1111.", "card [CARD]."),
        ("card 4111 1111 1111 1112.", "card 4111 1111 1111 1112."),
        ("zeros 0000000000000000", "zeros 0000000000000000"),
        ("to DE89 3704 0044 0532 0130 00 now", "to [IBAN] now"),
        ("to DE88 3704 0044 0532 0130 00 now", "to DE88 3704 0044 0532 0130 00 now"),
        ("call +44 20 7946 0958 today", "call [PHONE] today"),
        ("in 2024-11-26 there were 1234567", "in 2024-11-26 there were 1234567"),
    ],
)
def test_personal_data_is_masked_and_other_numbers_are_not(text: str, masked: str) -> None:
    assert mask(text, *ALL) == masked
    assert mask(text) == text


def test_masks_are_counted_and_regions_tell_local_numbers() -> None:
    masker = Masker(MaskingConfig(kinds=("email", "ip")))
    masker("a@b.org and c@d.org at 10.0.0.1")
    assert masker.counts == {"email": 2, "ip": 1}
    assert mask("call 020 7946 0958", "phone") == "call 020 7946 0958"
    assert mask("call 020 7946 0958", "phone", phone_region="GB") == "call [PHONE]"


@pytest.mark.parametrize(
    ("module", "settings", "what"),
    [
        ("py3langid.langid", {"language": {"keep": ["en"]}}, "corpus.language needs py3langid"),
        ("rensa", {"duplicates": {"near": True}}, "corpus.duplicates.near needs rensa"),
        ("phonenumbers", {"masking": {"kinds": ["phone"]}}, "phone needs phonenumberslite"),
        ("stdnum", {"masking": {"kinds": ["iban"]}}, "iban needs python-stdnum"),
    ],
)
def test_what_is_not_installed_is_named(
    module: str, settings: dict[str, object], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    filters._identifier.cache_clear()
    config = CorpusConfig.model_validate({"paths": ["x"], **settings})
    with pytest.raises(MissingDependencyError, match=rf"{what}.*pip install 'retort\[corpus\]'"):
        documents.check(config)
    filters._identifier.cache_clear()


def words(rng: random.Random, count: int) -> list[str]:
    return [f"w{rng.randrange(10_000)}" for _ in range(count)]


def test_signatures_estimate_jaccard_without_bias() -> None:
    rng = random.Random(0)
    config = DuplicatesConfig(near=True, ngram_words=1)
    sign = duplicates.Signer(config)
    errors = []
    for _ in range(100):
        common, one, two = words(rng, 300), words(rng, 50), words(rng, 50)
        a, b = {*common, *one}, {*common, *two}
        same = (sign(" ".join(a)) == sign(" ".join(b))).mean()
        errors.append(same - len(a & b) / len(a | b))
    # Of 128 places the mean of 100 pairs is known to 0.0039.
    assert abs(np.mean(errors)) < 4 * 0.0039
    assert np.std(errors) < 0.05
    assert (sign("a") == sign("a")).all()
    assert not (sign("a") == sign("b")).all()


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_bands_miss_few_that_are_just_similar_enough(threshold: float) -> None:
    config = DuplicatesConfig(near=True, threshold=threshold)
    count, rows = duplicates.bands(config)
    assert count * rows <= config.permutations
    assert 1 - (1 - threshold**rows) ** count >= 0.99


def columns(texts: list[str], config: CorpusConfig, **more: np.ndarray) -> Columns:
    sign = duplicates.Signer(config.duplicates)
    values = {
        "reason": np.zeros(len(texts), np.uint8),
        "tokens": np.asarray([len(text) for text in texts], np.uint32),
        "digest": np.asarray([duplicates.digest(text.encode()) for text in texts]).reshape(-1, 2),
        "signature": np.asarray([sign(text) for text in texts], np.uint32).reshape(-1, 128),
        **more,
    }
    return Columns(("kept", "dead_letter", "rule"), values)


def test_the_first_of_similar_documents_is_kept_whatever_the_splits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = random.Random(1)
    originals = [words(rng, 200) for _ in range(30)]
    texts, expected = [], []
    for number, document in enumerate(originals):
        texts.append(" ".join(document))
        expected.append(1)
        if number % 3 == 0:
            # One word of 200 is in 5 of 196 n-grams: similarity 0.95.
            texts.append(" ".join([*document[:50], "changed", *document[51:]]))
            expected.append(0)
        if number % 5 == 0:
            texts.append(texts[-1])
            expected.append(0)
        if number % 7 == 0:
            # 30 words in one place: similarity 0.7.
            texts.append(" ".join([*document[:50], *words(rng, 34), *document[84:]]))
            expected.append(1)
    config = CorpusConfig(paths=("x",), duplicates=DuplicatesConfig(exact=True, near=True))
    # As many bands at a time as fit: one.
    monkeypatch.setattr(selection, "_BAND_BYTES", 1)
    for cuts in ([], [10, 11, 11, 40]):
        pieces = [list(piece) for piece in np.split(np.asarray(texts), cuts)]
        every = [columns(piece, config) for piece in pieces]
        groups = [[(0, len(piece))] for piece in pieces]
        found = selection.select(config, groups, lambda split, every=every: every[split])
        copies = np.concatenate([index.copies for index in found.indices])
        assert copies.tolist() == expected
        assert sum(found.dropped.values()) == expected.count(0)
        assert found.dropped["duplicates.exact"] == 6


def test_dropped_documents_are_no_originals() -> None:
    config = CorpusConfig(paths=("x",), duplicates=DuplicatesConfig(exact=True))
    dropped = Columns(
        ("kept", "dead_letter", "rule"),
        {
            "reason": np.asarray([2, 0, 1, 0], np.uint8),
            "tokens": np.asarray([0, 5, 0, 5], np.uint32),
            # Of the two that are kept.
            "digest": np.asarray([[1, 2], [1, 2]], np.uint64),
        },
    )
    found = selection.select(config, [[(0, 4)]], lambda split: dropped)
    assert found.indices[0].copies.tolist() == [0, 1, 0, 0]
    assert found.dropped == {"duplicates.exact": 1, "rule": 1}


def test_weights_become_epochs() -> None:
    # The first has too little for its weight: it is taken twice, the others as it allows.
    assert mixture.epochs([1, 1, 2], [100, 1000, 400], 2.0) == [2.0, 0.2, 1.0]
    with pytest.raises(ValueError, match="empty"):
        mixture.epochs([1], [0], 1.0)


def test_draws_are_even_and_depend_on_seed_and_place_alone() -> None:
    draws = np.asarray([mixture.draw(1, "file", str(n)) for n in range(4000)], np.uint64)
    for rate in (0.0, 0.3, 1.0, 2.75):
        copies = mixture.copies(draws, np.full(len(draws), rate))
        assert copies.mean() == pytest.approx(rate, abs=0.03)
        assert set(copies.tolist()) <= {int(rate), int(rate) + 1}
    assert mixture.draw(1, "file", "0") == draws[0]
    assert mixture.draw(2, "file", "0") != draws[0]
    assert mixture.draw(1, "other", "0") != draws[0]
