"""Flags of the two fsmount programs; argparse would cost each of them more than a megabyte of memory for its life."""

from collections.abc import Sequence


def parse_flags(arguments: Sequence[str]) -> dict[str, str]:
    """`--name value` pairs by name.

    Raises:
        SystemExit: something else was given.
    """
    if len(arguments) % 2 or not all(name.startswith("--") for name in arguments[::2]):
        raise SystemExit(f"flags come in pairs, --name value; these do not: {' '.join(arguments)}")
    return {name[2:]: value for name, value in zip(arguments[::2], arguments[1::2], strict=True)}
