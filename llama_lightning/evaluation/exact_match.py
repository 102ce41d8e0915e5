"""Whether a response is the reference, white space around it aside."""


def exact_match(response: str, reference: str) -> bool:
    """Compare two texts after stripping."""
    return response.strip() == reference.strip()
