"""Documents that hold pieces of evaluation sets, told by n-grams of words in common.

Words are runs of letters and digits in lower case, so that spaces and punctuation do not matter.
The sets' n-grams are held as they are: nothing is hashed, so that nothing is dropped by chance.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator

from schemas.corpus import DecontaminationConfig
from schemas.errors import ConfigError

_WORDS = re.compile(r"\w+")


def make(config: DecontaminationConfig, known: Collection[str]) -> Callable[[str], str | None]:
    """The filter, given the sets' n-grams."""

    def check(text: str) -> str | None:
        matches = 0
        for ngram in ngrams(text, config.ngram_words):
            matches += ngram in known
            if matches >= config.min_matches:
                return "decontamination"
        return None

    return check


def ngrams(text: str, size: int) -> Iterator[str]:
    """Runs of `size` words, each as one string."""
    words = _WORDS.findall(text.lower())
    return (" ".join(words[at : at + size]) for at in range(len(words) - size + 1))


def collect(config: DecontaminationConfig, texts: Iterable[str]) -> frozenset[str]:
    """The n-grams of the sets' texts. Raises ConfigError if there is none."""
    known = frozenset(ngram for text in texts for ngram in ngrams(text, config.ngram_words))
    if not known:
        raise ConfigError(
            f"Evaluation sets must hold texts of at least {config.ngram_words} words, but "
            f"{', '.join(config.paths)} holds none; mend corpus.decontamination."
        )
    return known
