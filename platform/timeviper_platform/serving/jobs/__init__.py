"""Questions about long videos, answered after the request has ended."""
