"""OLMo 3: OLMo 2 with a sliding window in most layers."""

from compress.families._blocks import OLMO2

FAMILY = OLMO2
