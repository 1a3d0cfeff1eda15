"""Weights to an OpenAI-compatible endpoint: gateway, feature service, engine service."""
