"""Parse untrusted JSON."""

import json
from typing import Any


def parse_json(text: str) -> Any:
    """Raises JSONDecodeError for whatever cannot be used: numbers too long, objects too deep, halves of characters."""
    try:
        found = json.loads(text)
        if "\\u" in text:
            # Half of a pair can be said, but neither written nor shown nor cut into tokens.
            json.dumps(found, ensure_ascii=False).encode()
        return found
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise json.JSONDecodeError(f"what cannot be used ({type(error).__name__})", text, 0) from error
