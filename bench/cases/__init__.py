"""The cases, one file a family. Each file has ``cases(device) -> list[Case]``."""
