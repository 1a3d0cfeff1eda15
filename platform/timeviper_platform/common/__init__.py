"""Configuration, storage, schemas, Ray clusters and devices."""
