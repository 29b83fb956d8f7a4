"""What every typed document shares: frozen, strict about unknown keys, canonical when hashed."""

import hashlib
import json
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from schemas.errors import ConfigError

# For a choice of which one is called `none`: the command line reads that as None, as it is meant
# for all other fields.
NAMES_NONE = BeforeValidator(lambda value: "none" if value is None else value)


class Document(BaseModel):
    """A frozen pydantic model that refuses unknown keys and validates its defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    def canonical_json(self) -> str:
        """The document as JSON with sorted keys and no white space: equal documents, equal text."""
        return canonical_json(self.model_dump(mode="json"))

    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON, in lower-case hex."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()

    @classmethod
    def parse(cls, data: Any, where: str) -> Self:
        """Validate `data`; on failure raise ConfigError (where, field, rule, value)."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(describe(error, where)) from error

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a YAML file. Raises ConfigError if it is missing, unreadable or breaks a rule."""
        return cls.parse(load_yaml(path), str(path))


def canonical_json(data: Any) -> str:
    """JSON text with sorted keys and no white space."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file's mapping. Raises ConfigError if it is missing or holds anything else."""
    try:
        data = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(
            f"The config file must be readable, but {path} is not ({error.strerror}); "
            "check the path."
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"The config file must be YAML, but {path} is not: {error}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"The config file must hold key: value pairs, but {path} does not.")
    return data


def describe(error: ValidationError, where: str) -> str:
    """One sentence for each broken rule: where, which field, which rule, which value."""
    parts = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"]) or "(the whole document)"
        if item["type"] == "extra_forbidden":
            parts.append(f"{field} is not a known field; remove it or correct its spelling")
        elif item["type"] == "missing":
            parts.append(f"{field} is required; add it")
        else:
            message = item["msg"].removeprefix("Value error, ")
            parts.append(f"{field}: {message} (got {item['input']!r})")
    return f"{where}: " + "; ".join(parts) + "."
