"""Personal data in a text, replaced by its kind: [EMAIL], [PHONE], [IP], [CARD], [IBAN].

By form and check digits, not by meaning: names and addresses of streets stay. Numbers of cards and
accounts must pass their check digits and telephone numbers their country's plan, so that few other
numbers are taken for them.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from schemas.corpus import MaskingConfig
from schemas.errors import MissingDependencyError

_EMAIL = re.compile(
    r"(?<![\w.+-])[\w.+%-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}"
    r"[A-Za-z]{2,24}(?![\w-])"
)
_IP = re.compile(
    r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d)"
    r"|(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:]))"
)
_CARD = re.compile(r"(?<![\w-])\d(?:[ -]?\d){12,18}(?![\w-])")
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?(?!\w)")


class Masker:
    """Replaces what the config names, and counts it."""

    def __init__(self, config: MaskingConfig):
        # Longer forms first: an account's number may hold what looks like a telephone's.
        order = ("email", "iban", "card", "ip", "phone")
        makers: dict[str, Callable[[], Callable[[str], str]]] = {
            "email": lambda: self._by_pattern("email", _EMAIL, lambda found: True),
            "iban": lambda: self._by_pattern("iban", _IBAN, _stdnum("iban")),
            "card": lambda: self._by_pattern("card", _CARD, _stdnum("luhn")),
            "ip": lambda: self._by_pattern("ip", _IP, _is_address),
            "phone": lambda: self._phones(config.phone_region),
        }
        self._steps = [makers[kind]() for kind in order if kind in config.kinds]
        self.counts: Counter[str] = Counter()

    def __call__(self, text: str) -> str:
        for step in self._steps:
            text = step(text)
        return text

    def _by_pattern(
        self, kind: str, pattern: re.Pattern[str], is_one: Callable[[str], bool]
    ) -> Callable[[str], str]:
        def replace(match: re.Match[str]) -> str:
            if not is_one(match[0]):
                return match[0]
            self.counts[kind] += 1
            return f"[{kind.upper()}]"

        return lambda text: pattern.sub(replace, text)

    def _phones(self, region: str | None) -> Callable[[str], str]:
        try:
            import phonenumbers
        except ImportError as error:
            raise _missing("phone", "phonenumberslite") from error

        def step(text: str) -> str:
            pieces, at = [], 0
            for match in phonenumbers.PhoneNumberMatcher(text, region):
                pieces += [text[at : match.start], "[PHONE]"]
                at = match.end
                self.counts["phone"] += 1
            return "".join([*pieces, text[at:]])

        return step


def _is_address(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    # `a::b` is an address by the letter, and a name in C++; `::1` is no one's.
    return address.version == 4 or (len(text) > 3 and any(map(str.isdigit, text)))


def _stdnum(name: str) -> Callable[[str], bool]:
    try:
        from stdnum import iban, luhn
    except ImportError as error:
        raise _missing("iban" if name == "iban" else "card", "python-stdnum") from error
    if name == "iban":
        return lambda text: bool(iban.is_valid(text))

    def is_card(text: str) -> bool:
        digits = re.sub(r"\D", "", text)
        return len(set(digits)) > 1 and bool(luhn.is_valid(digits))

    return is_card


def _missing(kind: str, package: str) -> Any:
    return MissingDependencyError(
        f"corpus.masking of {kind} needs {package}, which is not installed; "
        "pip install 'retort[corpus]'."
    )
