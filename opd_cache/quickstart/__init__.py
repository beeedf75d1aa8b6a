"""A task that needs no download: small real models and prompts with verifiable answers."""
