"""Parse untrusted YAML: plain values only, of limited depth."""

from typing import Any

import yaml

DEEPEST = 50  # levels; the time that yaml takes grows with the square of them
OPENING = (
    yaml.tokens.BlockSequenceStartToken,
    yaml.tokens.BlockMappingStartToken,
    yaml.tokens.FlowSequenceStartToken,
    yaml.tokens.FlowMappingStartToken,
)
CLOSING = (yaml.tokens.BlockEndToken, yaml.tokens.FlowSequenceEndToken, yaml.tokens.FlowMappingEndToken)


def parse_yaml(text: str) -> tuple[Any, yaml.Node | None]:
    """Return the data and its nodes, which know their lines. Raises ValueError for whatever cannot be read."""
    try:
        check_depth(text)
        return yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    # A value that is not what its tag calls it comes out of yaml as any error.
    except Exception as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def check_depth(text: str) -> None:
    depth = 0
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        depth += isinstance(token, OPENING) - isinstance(token, CLOSING)
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} levels deep")
