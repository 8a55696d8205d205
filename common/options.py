"""What a system's options may be: each declares the kind of every key of its conf/system/<name>.yaml, and `checked`
refuses the rest in one line that names the key, the value and what is allowed.

Values come back as they were given: what they become (ns, bytes) is the system's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Protocol

from common.errors import ConfigError

SHOWN = 60  # characters of a value, or of a list of names, in a message
LEAST_PERIOD_MS = 0.1  # an iteration of real models takes longer; what happens more often costs a run only time
MOST_SECONDS = 1e9  # as nanoseconds still far from 63 bits


class Kind(Protocol):
    """One option's kind. `name` is the key as users write it."""

    def read(self, name: str, value: Any) -> Any:
        """The value; ConfigError where it is not allowed."""
        ...


def shown(value: object) -> str:
    """A value in a message: one line, and never a long one."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no whole number of thousands of digits
        text = f"a {type(value).__name__}"
    return shortened(text, SHOWN)


def shortened(text: str, most: int) -> str:
    """Its beginning, where it is longer."""
    return text if len(text) <= most else text[: most - 1] + "…"


def refusal(name: str, value: object, allowed: str) -> ConfigError:
    """The one line. Mended by what is `allowed`."""
    return ConfigError(f"{shortened(name, SHOWN)}={shown(value)}: {allowed}")


@dataclass(frozen=True, slots=True)
class Whole:
    """A whole number."""

    low: int = 0
    high: int = 10**9
    null: bool = False

    def read(self, name: str, value: Any) -> int | None:
        """As given."""
        if value is None and self.null:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not self.low <= value <= self.high:
            most = f", at most {self.high:,}" if isinstance(value, int) and value > self.high else ""
            raise refusal(name, value, f"give a whole number of at least {self.low}{most}{_or_null(self.null)}")
        return value


@dataclass(frozen=True, slots=True)
class Number:
    """A finite number. `zero`: 0 too, beside what `low` allows. `above`: `low` itself is not allowed."""

    low: float = 0.0
    high: float = 1e9
    null: bool = False
    zero: bool = False
    above: bool = False

    def read(self, name: str, value: Any) -> float | None:
        """As given: a whole number stays one."""
        if value is None and self.null:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not self._holds(value):
            beside = "0, or " if self.zero else ""
            span = f"above {self.low:g} up to" if self.above else f"from {self.low:g} to"
            raise refusal(name, value, f"give {beside}a number {span} {self.high:g}{_or_null(self.null)}")
        return value

    def _holds(self, value: float) -> bool:
        if self.zero and value == 0:
            return True
        return self.low <= value <= self.high and not (self.above and value == self.low)


@dataclass(frozen=True, slots=True)
class Switch:
    """true or false."""

    def read(self, name: str, value: Any) -> bool:
        """As given."""
        if not isinstance(value, bool):
            raise refusal(name, value, "use true or false")
        return value


@dataclass(frozen=True, slots=True)
class Choice:
    """One of some names. YAML reads on and off as booleans: they are given back as names."""

    names: tuple[str, ...]

    def read(self, name: str, value: Any) -> str:
        """The name."""
        if isinstance(value, bool):
            value = {True: "on", False: "off"}[value] if {"on", "off"} & set(self.names) else value
        if not isinstance(value, str) or value not in self.names:
            raise ConfigError(f"{name}={shown(value)} is unknown; choose one of: {', '.join(self.names)}")
        return value


@dataclass(frozen=True, slots=True)
class Group:
    """Keys below a key."""

    kinds: Mapping[str, Kind]

    def read(self, name: str, value: Any) -> dict[str, Any]:
        """Those that are given."""
        if not isinstance(value, Mapping):
            raise refusal(name, value, f"this is a group of keys: {', '.join(self.kinds)}")
        return checked(value, self.kinds, f"{name}.")


def share(high: float = 1.0) -> Number:
    """A part of something."""
    return Number(0.0, high)


def period_ms(high: float = 1e6) -> Number:
    """How often something happens: never without pause."""
    return Number(LEAST_PERIOD_MS, high)


def time_ms() -> Number:
    """How long something lasts, in ms."""
    return Number(0.0, MOST_SECONDS * 1e3)


def time_s(null: bool = False) -> Number:
    """How long something lasts, in seconds."""
    return Number(0.0, MOST_SECONDS, null)


def checked(given: Mapping[str, Any], kinds: Mapping[str, Kind], prefix: str = "system.") -> dict[str, Any]:
    """The options that are given, each of its declared kind; ConfigError, one line, on the first that is not."""
    for key in given:
        if key not in kinds:
            raise ConfigError(f"{prefix}{shortened(str(key), SHOWN)} is unknown; {_hint(str(key), prefix, kinds)}")
    return {key: kinds[key].read(prefix + key, value) for key, value in given.items()}


def _hint(key: str, prefix: str, known: Iterable[str]) -> str:
    names = list(known)
    close = get_close_matches(key, names, n=1)
    return f"did you mean {prefix}{close[0]}?" if close else f"known: {shortened(', '.join(names), 2 * SHOWN)}"


def _or_null(null: bool) -> str:
    return ", or null" if null else ""
