"""Generation: sampling on the device, and an engine that streams tokens of many prompts at once."""
