"""JSON that somebody else wrote."""

import json
from typing import Any


def parse_json(text: str) -> Any:
    """Raises JSONDecodeError for whatever cannot be read: numbers too long and objects too deep for Python are, too."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise json.JSONDecodeError(f"beyond what can be read ({type(error).__name__})", text, 0) from error
