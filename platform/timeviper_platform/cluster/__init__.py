"""Deployment: checks of a machine, manifests for Kubernetes and the cloud launcher, and dashboards."""
