"""The web page of an endpoint."""
