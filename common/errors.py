"""Errors that a user can act on: each is printed as one line, and ends a command with exit code 2."""


class KVPlaneError(Exception):
    """Base of every error whose message names the culprit and the way out."""


class ConfigError(KVPlaneError):
    """A configuration key or value that cannot be used."""


class TraceError(KVPlaneError):
    """A trace file, or one row of it, that cannot be read."""


class CapacityError(KVPlaneError):
    """A model, request or cluster that cannot fit the memory it was given."""


class Stalled(KVPlaneError):
    """Requests live, but nothing except timers has happened for `stall_ns`: the policy has lost them."""


class ContractError(AssertionError):
    """A policy or executor broke the contract (a bug of ours, never of the user's input)."""
