"""TimeViper in plain PyTorch: frames to features, features and text to the next token. Never imports ray."""
