"""OLMo 2: branches read the stream as it is, and what they write is normalized; so are queries and keys."""

from compress.families._blocks import OLMO2

FAMILY = OLMO2
