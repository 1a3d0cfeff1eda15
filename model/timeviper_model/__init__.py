"""TimeViper in plain PyTorch: a hybrid Mamba-2 / Transformer language model that reads long videos."""
